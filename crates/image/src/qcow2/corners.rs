//! Corner cases, one by one.

use super::testing::{Checked, Driver, MemFile, Rng, check, run};
use super::{Compression, CreateOptions, OpenOptions, Qcow2, features};
use crate::{
    Compressed, ExtentKind, FileId, Fill, FlushRun, Image, Need, Plan, Step, ZeroMode, ZeroPlan,
};
use block::{ErrorKind, GuestOffset, HostOffset, Storage, Zeroed};
use std::fs;

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;

fn options(size: u64) -> CreateOptions {
    CreateOptions {
        size,
        version: 3,
        cluster_size: CLUSTER,
        refcount_bits: 16,
        lazy_refcounts: false,
        backing: None,
        compression: Compression::Zlib,
        extended_l2: false,
        ..CreateOptions::default()
    }
}

fn fresh(size: u64) -> Driver {
    Driver::create(&options(size), &OpenOptions::default())
}

/// An image with clusters 0 to 3 written, and the offset of its L2 table.
fn written() -> (MemFile, u64) {
    let mut driver = fresh(64 * CLUSTER);
    driver.write(0, &vec![0x11; 4 * CLUSTER as usize]).unwrap();
    let l1 = driver.image.header().l1_table_offset;
    let file = driver.file.clone();
    driver.close();
    let l2 = file.word(l1) & !COPIED;
    (file, l2)
}

fn open(file: &MemFile) -> Driver {
    Driver::open(file.clone(), &OpenOptions::default())
}

fn checked(file: &MemFile) -> Checked {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    fs::write(&path, file.bytes()).unwrap();
    check(&path)
}

#[test]
fn entries_that_point_at_metadata_are_never_followed() {
    let (file, l2) = written();
    let header = Qcow2::open(&file, &OpenOptions::default())
        .unwrap()
        .header()
        .clone();
    let block = file.word(header.refcount_table_offset);
    for target in [
        header.l1_table_offset,
        header.refcount_table_offset,
        block,
        l2,
    ] {
        for flags in [COPIED, 0, COPIED | 1, 1] {
            let file = MemFile::of(file.bytes());
            file.patch(l2 as usize, &(target | flags).to_be_bytes());
            let before = file.bytes();
            // A change that meets it is the last one: each on an opening of its own.
            let zeroes = ZeroMode::Zero { unmap: false };
            let kinds = [
                open(&file).read(0, 512).unwrap_err().kind(),
                open(&file).write(0, &[1; 512]).unwrap_err().kind(),
                open(&file)
                    .zero(0, CLUSTER, ZeroMode::Discard)
                    .unwrap_err()
                    .kind(),
                open(&file).zero(512, 512, zeroes).unwrap_err().kind(),
            ];
            assert_eq!(kinds, [ErrorKind::Corrupt; 4], "{target:#x} {flags:#x}");
            assert!(file.bytes() == before);
            // The rest of the disk is not affected, and the entry stays as it was.
            let mut driver = open(&file);
            assert_eq!(driver.read(CLUSTER, 512).unwrap(), [0x11; 512]);
            driver.write(8 * CLUSTER, &[2; 512]).unwrap();
            driver.close();
            assert_eq!(file.word(l2), target | flags);
        }
    }
}

#[test]
fn unsound_entries_are_named() {
    let (file, l2) = written();
    for (raw, text) in [
        (COPIED | 0x5_0002, "reserved bits"),
        (COPIED | 1 << 57 | 0x5_0000, "reserved bits"),
        (COPIED | 0x5_0200, "between clusters"),
    ] {
        let file = MemFile::of(file.bytes());
        file.patch(l2 as usize + 8, &u64::to_be_bytes(raw));
        let mut driver = open(&file);
        for error in [
            driver.read(CLUSTER, 512).unwrap_err(),
            driver.write(CLUSTER, &[1; 512]).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let message = error.to_string();
            assert!(message.contains(text), "{message}");
            assert!(message.contains("test.qcow2"), "{message}");
            assert!(message.contains(&format!("{:#x}", l2 + 8)), "{message}");
        }
        // What lies before it in the same range is still told.
        let extent = driver.ask(|i| i.map(GuestOffset(0), 4 * CLUSTER)).unwrap();
        assert_eq!(extent.len, CLUSTER);
    }
}

#[test]
fn a_cluster_with_refcount_0_is_not_given_up() {
    let (file, l2) = written();
    let header = open(&file).image.header().clone();
    let block = file.word(header.refcount_table_offset);
    let host = file.word(l2) & !COPIED;
    file.patch((block + (host / CLUSTER) * 2) as usize, &[0, 0]);
    // Not marked as the guest's own: a write would copy it, and count it down.
    file.patch(l2 as usize, &host.to_be_bytes());
    for error in [
        open(&file).write(0, &[1; 512]).unwrap_err(),
        open(&file).zero(0, CLUSTER, ZeroMode::Discard).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("refcount is 0"), "{error}");
    }
    assert_eq!(open(&file).read(0, 512).unwrap(), [0x11; 512]);
}

#[test]
fn a_shared_cluster_is_copied_before_it_is_written() {
    let (file, l2) = written();
    let header = open(&file).image.header().clone();
    let block = file.word(header.refcount_table_offset);
    let host = file.word(l2) & !COPIED;
    // Clusters 0 and 9 of the disk share a host cluster.
    file.patch((block + (host / CLUSTER) * 2) as usize, &[0, 2]);
    file.patch(l2 as usize, &host.to_be_bytes());
    file.patch(l2 as usize + 9 * 8, &host.to_be_bytes());
    assert_eq!(checked(&file), Checked::Clean);
    let mut driver = open(&file);
    driver.write(512, &[2; 512]).unwrap();
    let mut want = vec![0x11; CLUSTER as usize];
    assert!(driver.read(9 * CLUSTER, CLUSTER).unwrap() == want);
    want[512..1024].fill(2);
    assert!(driver.read(0, CLUSTER).unwrap() == want);
    driver.flush().unwrap();
    driver.write(9 * CLUSTER, &[3; 512]).unwrap();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn damaged_tables_open_for_reading_only() {
    let (file, l2) = written();
    let header = open(&file).image.header().clone();
    let (l1, table) = (header.l1_table_offset, header.refcount_table_offset);
    let mut big = fresh(20 << 30);
    big.write(0, &[1; 512]).unwrap();
    let big_l1 = big.image.header().l1_table_offset;
    let big_file = big.file.clone();
    big.close();
    for (file, at, value, text) in [
        (&file, l1, COPIED | l2 | 0x200, "L1 entry 0"),
        (&file, l1, COPIED | l2 | 1, "L1 entry 0"),
        (&file, l1, COPIED | l1, "overlaps"),
        (&file, table, l1, "overlaps"),
        (&file, table, 0x1_0200, "refcount table entry 0"),
        (&big_file, big_l1 + 8, big_file.word(big_l1), "L2 table 1"),
    ] {
        let file = MemFile::of(file.bytes());
        file.patch(at as usize, &value.to_be_bytes());
        let before = file.bytes();
        let mut driver = open(&file);
        let why = driver.image.describe().read_only_because.unwrap();
        assert!(why.contains(text), "{why}");
        let error = driver.write(0, &[1; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert!(error.to_string().contains(text), "{error}");
        let _ = driver.read(0, 512);
        driver.close();
        assert!(file.bytes() == before);
    }
}

#[test]
fn features_that_are_lacking_are_named() {
    let (file, _) = written();
    for (at, value, kind, text) in [
        (79, 1 << 7, ErrorKind::Unsupported, "unknown feature bit 7"),
        (35, 2, ErrorKind::Corrupt, "LUKS"),
        (7, 4, ErrorKind::Unsupported, "version at byte 4 is 4"),
        (23, 22, ErrorKind::Corrupt, "cluster_bits"),
        (23, 8, ErrorKind::Corrupt, "cluster_bits"),
        (79, 1 << 5, ErrorKind::Unsupported, "unknown feature bit 5"),
        (99, 7, ErrorKind::Corrupt, "refcount_order"),
        (103, 100, ErrorKind::Corrupt, "header_length"),
        (39, 0, ErrorKind::Corrupt, "l1_size"),
        (59, 0, ErrorKind::Corrupt, "refcount_table_clusters"),
        (46, 1, ErrorKind::Corrupt, "l1_table_offset"),
        (24, 0x80, ErrorKind::Corrupt, "size at byte 24"),
        (0, 0, ErrorKind::Corrupt, "not a qcow2 image"),
    ] {
        let file = MemFile::of(file.bytes());
        file.patch(at, &[value]);
        let error = Qcow2::open(&file, &OpenOptions::default()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert!(error.to_string().starts_with("test.qcow2: "), "{error}");
    }
}

#[test]
fn what_is_not_written_yet_opens_for_reading() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let make = || {
        let (file, _) = written();
        fs::write(&path, file.bytes()).unwrap();
    };
    let judge = |text: &str| {
        let file = MemFile::of(fs::read(&path).unwrap());
        let mut driver = open(&file);
        let why = driver.image.describe().read_only_because.unwrap();
        assert!(why.contains(text), "{why}");
        assert_eq!(driver.read(0, 512).unwrap(), [0x11; 512]);
        let error = driver.write(0, &[1; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        let error = driver.zero(0, CLUSTER, ZeroMode::Discard).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
    };
    for (bit, text) in [(1, "dirty bit"), (2, "corrupt")] {
        make();
        let mut bytes = fs::read(&path).unwrap();
        bytes[79] = bit;
        fs::write(&path, bytes).unwrap();
        judge(text);
    }
}

#[test]
fn autoclear_features_that_nobody_knows_are_cleared_by_a_writer() {
    let (file, _) = written();
    let all = !features::AUTOCLEAR_KNOWN;
    file.patch(88, &all.to_be_bytes());
    let image = Qcow2::open(
        &file,
        &OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        },
    );
    drop(image.unwrap());
    assert_eq!(file.word(88), all, "a reader changes nothing");
    drop(open(&file));
    assert_eq!(file.word(88), 0);
}

#[test]
fn a_file_that_ends_early_reads_as_zeros() {
    let (file, l2) = written();
    let host = file.word(l2 + 3 * 8) & !COPIED;
    let mut bytes = file.bytes();
    bytes.truncate(host as usize + 1000);
    let mut driver = open(&MemFile::of(bytes));
    let got = driver.read(3 * CLUSTER, CLUSTER).unwrap();
    assert!(got[..1000].iter().all(|b| *b == 0x11) && got[1000..].iter().all(|b| *b == 0));
    for (len, text) in [
        (0, "not a qcow2"),
        (70, "ends inside"),
        (300, "run out of the header"),
    ] {
        let file = MemFile::of(file.bytes()[..len].to_vec());
        let error = Qcow2::open(&file, &OpenOptions::default()).unwrap_err();
        assert!(error.to_string().contains(text), "{len}: {error}");
    }
    let cut = file.bytes()[..CLUSTER as usize].to_vec();
    let error = Qcow2::open(&MemFile::of(cut), &OpenOptions::default()).unwrap_err();
    assert!(
        error.to_string().contains("behind the file's end"),
        "{error}"
    );
}

#[test]
fn compressed_clusters_are_read_overwritten_and_freed() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("disk.raw");
    let path = directory.path().join("disk.qcow2");
    let mut rng = Rng(3);
    let mut model: Vec<u8> = (0..4u64 << 20)
        .map(|i| ((i / 100 * 77) >> 3) as u8 | 1)
        .collect();
    for _ in 0..50 {
        // Some of it does not compress well.
        let at = rng.below(model.len() as u64 - 8) as usize;
        let noise = rng.next().to_be_bytes();
        model[at..at + 8].copy_from_slice(&noise);
    }
    for (kind, cluster) in [
        ("zlib", "64k"),
        ("zstd", "64k"),
        ("zlib", "4k"),
        ("zstd", "2M"),
    ] {
        fs::write(&raw, &model).unwrap();
        let how = format!("compression_type={kind},cluster_size={cluster}");
        run(
            "qemu-img",
            &[
                "convert",
                "-c",
                "-O",
                "qcow2",
                "-o",
                &how,
                raw.to_str().unwrap(),
                path.to_str().unwrap(),
            ],
        );
        let mut model = model.clone();
        let mut driver = open(&MemFile::of(fs::read(&path).unwrap()));
        let extent = driver.ask(|i| i.map(GuestOffset(0), 1 << 20)).unwrap();
        assert!(
            matches!(extent.kind, ExtentKind::Compressed(_)),
            "{extent:?}"
        );
        assert!(driver.read(0, 4 << 20).unwrap() == model, "{how}");
        for at in [5000usize, 70_000, 1 << 20, 3 << 20] {
            driver.write(at as u64, &[7; 3000]).unwrap();
            model[at..at + 3000].fill(7);
        }
        let zero = 2 << 20..3 << 20;
        driver
            .zero(zero.start as u64, 1 << 20, ZeroMode::Zero { unmap: true })
            .unwrap();
        model[zero].fill(0);
        assert!(driver.read(0, 4 << 20).unwrap() == model, "{how}");
        let file = driver.file.clone();
        driver.close();
        fs::write(&path, file.bytes()).unwrap();
        fs::write(&raw, &model).unwrap();
        assert_eq!(check(&path), Checked::Clean, "{how}");
        let (path, raw) = (path.to_str().unwrap(), raw.to_str().unwrap());
        run("qemu-img", &["compare", path, raw]);
    }
}

#[test]
fn garbage_does_not_unpack() {
    let driver = fresh(1 << 20);
    let mut output = vec![0; CLUSTER as usize];
    let mut unpack = |input: &[u8]| {
        let place = Compressed {
            file: FileId::IMAGE,
            offset: HostOffset(0),
            len: input.len() as u32,
            unpacked_len: CLUSTER as u32,
            skip: 0,
            packing: 0,
            lasting: false,
        };
        driver.image.decompress(&place, input, &mut output)
    };
    let mut rng = Rng(1);
    for len in [0, 1, 100, 5000] {
        let input: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        let error = unpack(&input).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    // Sound, but too short.
    let error = unpack(&[3, 0]).unwrap_err();
    assert!(error.to_string().contains("unpacks to 0 bytes"), "{error}");
}

#[test]
fn flushes_have_as_few_stages_as_they_may() {
    let mut driver = fresh(64 * CLUSTER);
    let mut run = FlushRun::default();
    let mut stages = |driver: &mut Driver| {
        driver.image.flush_begin(&mut run).unwrap();
        let counts: Vec<usize> = run.stages.iter().map(|s| s.end - s.first).collect();
        for w in &run.writes {
            let bytes = &run.bytes[w.start..w.start + w.len];
            driver.file.write_at(w.offset.0, bytes).unwrap();
        }
        driver.image.flush_end(&mut run, true);
        counts
    };
    assert_eq!(stages(&mut driver), [0], "a barrier for the guest's data");
    driver.write(0, &[1; 512]).unwrap();
    // Refcounts and the new L2 table; the L1 entry.
    assert_eq!(stages(&mut driver), [2, 1]);
    assert_eq!(stages(&mut driver), [0]);
    driver.write(512, &[1; 512]).unwrap();
    assert_eq!(stages(&mut driver), [0], "in place: nothing to say");
    driver.write(CLUSTER, &[1; 512]).unwrap();
    assert_eq!(stages(&mut driver), [1], "L2 entry: the refcount is there");
    driver.zero(0, CLUSTER, ZeroMode::Discard).unwrap();
    assert_eq!(stages(&mut driver), [1], "nothing newly referred to");
    assert!(driver.image.is_dirty());
    assert_eq!(stages(&mut driver), [1], "the refcount that went down");
    assert!(!driver.image.is_dirty());
}

#[test]
fn a_failed_flush_is_repeated() {
    for (fail, zeroed) in (0..12).flat_map(|fail| [(fail, false), (fail, true)]) {
        let mut driver = fresh(64 * CLUSTER);
        // Clusters that are zeros are counted ahead.
        driver.zeroed = zeroed;
        driver.write(0, &[1; 512]).unwrap();
        driver.flush().unwrap();
        driver.write(9 * CLUSTER, &[2; 512]).unwrap();
        driver.zero(0, CLUSTER, ZeroMode::Discard).unwrap();
        driver.file.fail_after(Some(fail));
        let failed = driver.flush().is_err();
        // Two stages (one) of one write each, their barriers, and the freed cluster's hole.
        let steps = if zeroed { 2 } else { 4 };
        assert_eq!(failed, fail <= steps, "{fail} {zeroed}");
        if fail < steps {
            assert!(driver.image.is_dirty());
        }
        driver.file.fail_after(None);
        driver.write(10 * CLUSTER, &[3; 512]).unwrap();
        let file = driver.file.clone();
        driver.close();
        assert_eq!(checked(&file), Checked::Clean);
        let mut driver = open(&file);
        assert_eq!(driver.read(0, 512).unwrap(), [0; 512]);
        assert_eq!(driver.read(9 * CLUSTER, 512).unwrap(), [2; 512]);
        assert_eq!(driver.read(10 * CLUSTER, 512).unwrap(), [3; 512]);
    }
}

#[test]
fn new_tables_wait_for_refcounts_after_a_failed_flush() {
    let mut driver = fresh(64 * CLUSTER);
    driver.write(0, &[1; 512]).unwrap();
    // Refcounts, table, barrier, L1 entry; then the barrier fails.
    driver.file.fail_after(Some(4));
    assert!(driver.flush().is_err());
    driver.file.fail_after(None);
    let l1 = driver.image.header().l1_table_offset;
    assert_ne!(driver.file.word(l1), 0, "the L1 entry is there already");
    driver.write(CLUSTER, &[1; 512]).unwrap();
    let mut run = FlushRun::default();
    driver.image.flush_begin(&mut run).unwrap();
    let counts: Vec<usize> = run.stages.iter().map(|s| s.end - s.first).collect();
    assert_eq!(counts, [1, 1, 1]);
    driver.image.flush_end(&mut run, false);
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn a_full_disk_fails_one_request_and_nothing_else() {
    let mut driver = fresh(64 * CLUSTER);
    driver.file.fail_after(Some(0));
    for _ in 0..3 {
        assert!(driver.write(0, &[1; 512]).is_err());
    }
    driver.file.fail_after(None);
    driver.write(0, &[1; 512]).unwrap();
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn a_block_is_needed_by_one_and_waited_for_by_others() {
    let (file, _) = written();
    let driver = open(&file);
    let ask = || driver.image.map(GuestOffset(0), 512).unwrap();
    let Step::Need(Need::Load(load)) = ask() else {
        panic!("nothing is in memory yet");
    };
    assert_eq!(ask(), Step::Wait(load.key));
    driver.image.load_failed(&load);
    let Step::Need(Need::Load(again)) = ask() else {
        panic!("a failed load is given up");
    };
    assert_eq!(again, load);
    let bytes = super::close::read_short(&file, load.offset.0, load.len as usize).unwrap();
    driver.image.loaded(&load, &bytes).unwrap();
    assert!(matches!(ask(), Step::Done(_)));
    assert!(driver.image.loaded(&load, &bytes).is_err(), "only once");
}

fn allocation(step: Step<Plan>) -> crate::Allocation {
    match step {
        Step::Done(Plan::Allocate(allocation)) => allocation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn writes_to_one_new_cluster_wait_for_each_other() {
    // Large, so that enough is reserved at once.
    let mut driver = fresh(1 << 30);
    driver.write(20 * CLUSTER, &[1; 512]).unwrap();
    let image = &driver.image;
    let plan = |at, len| image.plan_write(GuestOffset(at), len).unwrap();
    let first = allocation(plan(4 * CLUSTER + 512, 2 * CLUSTER));
    assert_eq!(first.start, GuestOffset(4 * CLUSTER));
    assert_eq!((first.len, first.write_len), (3 * CLUSTER, 2 * CLUSTER));
    assert_eq!(first.fill, Fill::Zero);
    for cluster in 4..7 {
        assert_eq!(plan(cluster * CLUSTER, 512), Step::Wait(first.key));
        let mode = ZeroMode::Zero { unmap: true };
        let zero = image.plan_zero(GuestOffset(cluster * CLUSTER), CLUSTER, mode);
        assert_eq!(zero.unwrap(), Step::Wait(first.key));
    }
    // One that would run into it ends before.
    let second = allocation(plan(3 * CLUSTER, 4 * CLUSTER));
    assert_eq!((second.len, second.fill), (CLUSTER, Fill::Nothing));
    assert_ne!(second.key, first.key);
    let zero = image.plan_zero(GuestOffset(0), 64 * CLUSTER, ZeroMode::Discard);
    assert_eq!(
        zero.unwrap(),
        Step::Done(ZeroPlan::Skip { len: 3 * CLUSTER })
    );
    // A reader sees the old state until the commit.
    let map = |at| match image.map(GuestOffset(at), CLUSTER).unwrap() {
        Step::Done(extent) => extent.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(map(4 * CLUSTER), ExtentKind::Unallocated);
    image.commit(first.ticket);
    assert!(matches!(map(4 * CLUSTER), ExtentKind::Data { offset, .. } if offset == first.host));
    assert!(matches!(
        plan(4 * CLUSTER, 512),
        Step::Done(Plan::InPlace { .. })
    ));
    image.abort(second.ticket);
    assert_eq!(map(3 * CLUSTER), ExtentKind::Unallocated);
    // Ended tickets are nobody's.
    image.commit(first.ticket);
    image.commit(second.ticket);
    assert_eq!(map(3 * CLUSTER), ExtentKind::Unallocated);
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn freed_space_waits_for_the_flush_and_the_release() {
    let mut driver = fresh(64 * CLUSTER);
    driver.write(0, &vec![1; 4 * CLUSTER as usize]).unwrap();
    // Behind them in the file, so that the close does not cut them off.
    driver.write(20 * CLUSTER, &[1; 512]).unwrap();
    driver.flush().unwrap();
    driver.zero(0, 4 * CLUSTER, ZeroMode::Discard).unwrap();
    let mut freed = Vec::new();
    driver.image.take_freed(&mut freed);
    assert!(freed.is_empty(), "the old table on disk still shows it");
    let mut run = FlushRun::default();
    driver.image.flush_begin(&mut run).unwrap();
    for w in &run.writes {
        let bytes = &run.bytes[w.start..w.start + w.len];
        driver.file.write_at(w.offset.0, bytes).unwrap();
    }
    driver.image.take_freed(&mut freed);
    assert!(freed.is_empty());
    driver.image.flush_end(&mut run, true);
    driver.image.take_freed(&mut freed);
    let total: u64 = freed.iter().map(|f| f.len).sum();
    assert_eq!(total, 4 * CLUSTER);
    let overlaps = |host: u64| {
        freed
            .iter()
            .any(|f| host - f.offset.0.min(host) < f.len && host >= f.offset.0)
    };
    let a = allocation(driver.image.plan_write(GuestOffset(0), CLUSTER).unwrap());
    assert!(!overlaps(a.host.0), "requests in flight may still use it");
    driver.image.abort(a.ticket);
    for f in &freed {
        driver.image.release(f, Zeroed::No);
    }
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
    // Opened again, the space is found and used before the file grows.
    let len = file.len().unwrap();
    let mut driver = open(&file);
    driver.write(0, &vec![1; 4 * CLUSTER as usize]).unwrap();
    assert_eq!(file.len().unwrap(), len);
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

/// A scan of the refcounts sees zeros at clusters that are freed, free or being
/// allocated already.
#[test]
fn a_scan_does_not_find_what_is_taken() {
    let mut driver = fresh(1 << 30);
    driver.write(0, &vec![1; 4 * CLUSTER as usize]).unwrap();
    driver.write(20 * CLUSTER, &[1; 512]).unwrap();
    let file = driver.file.clone();
    driver.close();
    for release in [false, true] {
        let mut driver = open(&MemFile::of(file.bytes()));
        driver.zero(0, 3 * CLUSTER, ZeroMode::Discard).unwrap();
        let mut run = FlushRun::default();
        driver.image.flush_begin(&mut run).unwrap();
        driver.image.flush_end(&mut run, true);
        let mut freed = Vec::new();
        driver.image.take_freed(&mut freed);
        assert_eq!(freed.len(), 1, "{freed:?}");
        let (start, end) = (freed[0].offset.0, freed[0].offset.0 + freed[0].len);
        if release {
            driver.image.release(&freed[0], Zeroed::No);
        }
        let mut hosts = Vec::new();
        for i in 0..6 {
            let at = GuestOffset((30 + 2 * i) * CLUSTER);
            let plan = driver.ask(|image| image.plan_write(at, CLUSTER)).unwrap();
            hosts.push(allocation(Step::Done(plan)).host.0);
        }
        let inside = hosts.iter().filter(|h| (start..end).contains(h)).count();
        assert_eq!(inside, if release { 3 } else { 0 }, "{hosts:x?}");
        hosts.sort_unstable();
        hosts.dedup();
        assert_eq!(hosts.len(), 6, "one cluster for two");
    }
}

#[test]
fn a_crash_without_a_flush_leaks_nothing() {
    let mut driver = fresh(1 << 30);
    let before = driver.file.len().unwrap();
    for i in 0..40 {
        driver.write(i * CLUSTER, &[1; 512]).unwrap();
    }
    assert!(
        driver.file.len().unwrap() > before + 40 * CLUSTER,
        "reserved ahead"
    );
    assert_eq!(checked(&driver.file), Checked::Clean);
    // And a close gives back what was reserved and not used: 40 clusters and an L2 table.
    let file = driver.file.clone();
    driver.close();
    assert_eq!(file.len().unwrap(), before + 41 * CLUSTER);
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn odd_sizes_have_a_last_cluster_too() {
    let size = 3 * CLUSTER + 512;
    let mut driver = fresh(size);
    driver.write(3 * CLUSTER, &[1; 512]).unwrap();
    driver
        .zero(3 * CLUSTER, 512, ZeroMode::Zero { unmap: true })
        .unwrap();
    // The rest of the cluster lies behind the end: the whole cluster went.
    let extent = driver.ask(|i| i.map(GuestOffset(0), size)).unwrap();
    assert_eq!((extent.len, extent.kind), (size, ExtentKind::Unallocated));
    for (at, len) in [(size, 1), (0, size + 1), (u64::MAX, 2), (0, 0)] {
        let error = driver.image.map(GuestOffset(at), len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(driver.image.plan_write(GuestOffset(at), len).is_err());
        let zero = driver
            .image
            .plan_zero(GuestOffset(at), len, ZeroMode::Discard);
        assert!(zero.is_err());
    }
}

#[test]
fn version_2_never_shows_the_backing_file_again() {
    let base = vec![9; 8 * CLUSTER as usize];
    let mut options = options(8 * CLUSTER);
    options.version = 2;
    options.backing = Some(("base".into(), "raw".into()));
    let mut driver = Driver::create(&options, &OpenOptions::default());
    driver.backing = base;
    driver.write(0, &vec![1; CLUSTER as usize]).unwrap();
    driver.zero(0, 2 * CLUSTER, ZeroMode::Discard).unwrap();
    assert_eq!(driver.read(0, 512).unwrap(), [1; 512]);
    assert_eq!(driver.read(CLUSTER, 512).unwrap(), [9; 512]);
    for unmap in [true, false] {
        driver
            .zero(0, 3 * CLUSTER, ZeroMode::Zero { unmap })
            .unwrap();
        assert!(driver.read(0, 3 * CLUSTER).unwrap().iter().all(|b| *b == 0));
    }
    assert_eq!(driver.read(3 * CLUSTER, 512).unwrap(), [9; 512]);
}

#[test]
fn a_preallocated_zero_cluster_is_used_again() {
    let mut driver = fresh(8 * CLUSTER);
    driver.write(0, &vec![1; 2 * CLUSTER as usize]).unwrap();
    let host = |driver: &mut Driver| {
        let extent = driver.ask(|i| i.map(GuestOffset(0), 2 * CLUSTER)).unwrap();
        assert_eq!(extent.len, 2 * CLUSTER);
        extent.kind
    };
    let before = host(&mut driver);
    driver
        .zero(0, 2 * CLUSTER, ZeroMode::Zero { unmap: false })
        .unwrap();
    let ExtentKind::Data { file, offset } = before else {
        panic!("{before:?}");
    };
    let under = ExtentKind::Zero {
        host: Some((file, offset)),
    };
    assert_eq!(host(&mut driver), under);
    driver.write(512, &vec![2; CLUSTER as usize]).unwrap();
    assert_eq!(host(&mut driver), before);
    let mut want = vec![0; 2 * CLUSTER as usize];
    want[512..512 + CLUSTER as usize].fill(2);
    assert!(driver.read(0, 2 * CLUSTER).unwrap() == want);
}

#[test]
fn a_flush_that_was_cut_off_is_the_last_one() {
    let mut driver = fresh(64 * CLUSTER);
    driver.write(0, &vec![0x11; CLUSTER as usize]).unwrap();
    let mut run = FlushRun::default();
    driver.image.flush_begin(&mut run).unwrap();
    // Whoever carried it out is gone, and the L1 table with it. Nothing may be called written now.
    driver.write(CLUSTER, &vec![0x22; 512]).unwrap();
    let again = driver.image.flush_begin(&mut FlushRun::default());
    assert!(again.unwrap_err().to_string().contains("cut off"));
    let closed = driver.image.close(&[&driver.file]);
    assert!(closed.unwrap_err().to_string().contains("cut off"));
}
