//! Of the whole format, against a model and against the installed QEMU. What a crash leaves: crate `crash`.

use super::{CreateOptions, F_NEED_CHECK, Header, OpenOptions, Qed, create};
use crate::qcow2::testing::{Checked, Driver, MemFile, Rng, check_as, run};
use crate::{ExtentKind, FlushRun, Image, Need, Step, ZeroMode};
use block::{ErrorKind, GuestOffset, Storage};
use std::fs;
use std::path::Path;

const KINDS: [(u64, u64); 5] = [(4096, 2), (4096, 16), (8192, 4), (65536, 4), (1 << 20, 1)];

fn options(size: u64, (cluster_size, table_size): (u64, u64)) -> CreateOptions {
    CreateOptions {
        size,
        cluster_size,
        table_size,
        backing: None,
    }
}

fn created(options: &CreateOptions) -> MemFile {
    let file = MemFile::default();
    create(&file, options).unwrap();
    file
}

fn open(file: &MemFile) -> Driver<Qed> {
    let image = Qed::open(file, &OpenOptions::default()).unwrap();
    Driver::of(file.clone(), image)
}

fn over(size: u64, kind: (u64, u64), backing: &[u8]) -> (CreateOptions, Driver<Qed>) {
    let mut options = options(size, kind);
    if !backing.is_empty() {
        options.backing = Some(("base.raw".into(), true));
    }
    let mut driver = open(&created(&options));
    driver.backing = backing.to_vec();
    (options, driver)
}

/// What QEMU makes of the image in `bytes`.
fn judged(dir: &Path, bytes: &[u8]) -> Checked {
    let path = dir.join("judged.qed");
    fs::write(&path, bytes).unwrap();
    check_as("qed", &path)
}

#[test]
fn behaves_as_the_model_and_qemu_reads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, kind) in (0u64..).zip(KINDS) {
        for with_backing in [false, true] {
            let mut rng = Rng(seed);
            let size = (kind.0 * 40).min(3 << 20) + 512;
            let backing = match with_backing {
                true => rng.bytes(size - 1024),
                false => Vec::new(),
            };
            let mut model = backing.clone();
            model.resize(size as usize, 0);
            let (_, mut driver) = over(size, kind, &backing);
            for turn in 0..40 {
                driver.change(&mut model, &mut rng, 3 * kind.0.min(65536));
                if turn % 20 == 19 {
                    assert!(driver.read(0, size).unwrap() == model, "{kind:?}");
                    let file = driver.file.clone();
                    driver.close();
                    driver = open(&file);
                    driver.backing.clone_from(&backing);
                }
            }
            assert!(driver.read(0, size).unwrap() == model, "{kind:?}");
            let file = driver.close();
            // QEMU does not open images with tables of one cluster.
            if kind.1 == 1 {
                continue;
            }
            assert_eq!(judged(dir.path(), &file), Checked::Clean, "{kind:?}");
            fs::write(dir.path().join("base.raw"), &backing).unwrap();
            let (from, to) = (dir.path().join("judged.qed"), dir.path().join("out.raw"));
            let paths = [from.to_str().unwrap(), to.to_str().unwrap()];
            run(
                "qemu-img",
                &["convert", "-f", "qed", "-O", "raw", paths[0], paths[1]],
            );
            assert!(fs::read(&to).unwrap() == model, "{kind:?}");
        }
    }
}

/// In an image without a backing file a flush is one barrier, but for the first, and without the need-check bit.
#[test]
fn flushes_of_a_growing_image_are_one_barrier() {
    let (_, mut driver) = over(64 << 20, (65536, 4), &[]);
    driver.write(0, &[1; 4096]).unwrap();
    driver.flush().unwrap();
    assert_eq!(
        driver.barriers, 2,
        "the file's end, then what points before it"
    );
    let first = driver.barriers;
    for i in 1..10u64 {
        driver.write(i * 65536, &[i as u8; 4096]).unwrap();
        driver.flush().unwrap();
    }
    assert_eq!(driver.barriers - first, 9);
    // Copies of a backing file's bytes are to be durable before the entries.
    let (_, mut driver) = over(64 << 20, (65536, 4), &[7; 1 << 20]);
    for i in 0..5u64 {
        driver.write(i * 65536, &[i as u8; 4096]).unwrap();
        driver.flush().unwrap();
    }
    assert_eq!(driver.barriers, 10);
    // What is not an allocation needs none.
    driver.write(512, &[9; 512]).unwrap();
    driver.flush().unwrap();
    assert_eq!(driver.barriers, 11);
    let header = Header::read(&driver.file).unwrap();
    assert_eq!(header.features & F_NEED_CHECK, 0);
}

#[test]
fn a_closed_image_has_no_leaks_and_a_killed_one_no_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut driver) = over(8 << 20, (65536, 2), &[]);
    driver.write(1 << 20, &[5; 100_000]).unwrap();
    // Given up: its clusters are free again.
    let (_, ticket) = driver.start_write(4 << 20, &[6; 512]).unwrap();
    driver.image.abort(ticket.unwrap());
    driver.flush().unwrap();
    assert_eq!(judged(dir.path(), &driver.file.bytes()), Checked::Leaks);
    let file = driver.file.clone();
    driver.write((4 << 20) + 4096, &[7; 512]).unwrap();
    driver.close();
    assert_eq!(judged(dir.path(), &file.bytes()), Checked::Clean);
    let mut again = open(&file);
    // The bytes of the write that was given up, into the same cluster, are not the guest's.
    let mut want = vec![0; 65536];
    want[4096..4608].fill(7);
    assert!(again.read(4 << 20, 65536).unwrap() == want);
}

#[test]
fn an_image_that_needs_a_check_is_for_reading_only() {
    let file = created(&options(1 << 20, (4096, 2)));
    file.patch(16, &F_NEED_CHECK.to_le_bytes());
    let before = file.bytes();
    let mut driver = open(&file);
    assert!(driver.read(0, 4096).unwrap().iter().all(|b| *b == 0));
    let error = driver.write(0, &[1; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.to_string().contains("need-check"), "{error}");
    driver.image.close(&[&file]).unwrap();
    assert!(super::grow(&file, 2 << 20).is_err());
    assert!(file.bytes() == before);
    super::clear_need_check(&file).unwrap();
    open(&file).write(0, &[1; 512]).unwrap();
}

#[test]
fn unknown_features_are_refused_ignored_or_cleared() {
    let file = created(&options(1 << 20, (4096, 2)));
    file.patch(24, &[0xff; 16]);
    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let before = file.bytes();
    Qed::open(&file, &read_only).unwrap();
    assert!(file.bytes() == before, "a reader changes nothing");
    Qed::open(&file, &OpenOptions::default()).unwrap();
    let header = Header::read(&file).unwrap();
    assert_eq!(
        (header.compat_features, header.autoclear_features),
        (u64::MAX, 0)
    );
    file.patch(16, &8u64.to_le_bytes());
    let error = Qed::open(&file, &read_only).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("0x8"), "{error}");
}

/// Headers that cannot be: each is refused with the field's name, and nothing is allocated for it.
#[test]
fn wrong_headers_are_refused_by_field() {
    let max = u64::MAX.to_le_bytes();
    for (at, bytes, field) in [
        (0, &b"QEE\0"[..], "magic"),
        (4, &2048u32.to_le_bytes()[..], "cluster_size"),
        (4, &12288u32.to_le_bytes()[..], "cluster_size"),
        (4, &(128u32 << 20).to_le_bytes()[..], "cluster_size"),
        (4, &[0; 4], "cluster_size"),
        (8, &[0; 4], "table_size"),
        (8, &3u32.to_le_bytes()[..], "table_size"),
        (8, &32u32.to_le_bytes()[..], "table_size"),
        (12, &[0; 4], "header_size"),
        (12, &[0xff; 4], "header_size"),
        (40, &[0; 8], "l1_table_offset"),
        (40, &4097u64.to_le_bytes()[..], "l1_table_offset"),
        (40, &8192u64.to_le_bytes()[..], "l1_table_offset"),
        (40, &max, "l1_table_offset"),
        (40, &(u64::MAX - 4095).to_le_bytes()[..], "l1_table_offset"),
        (48, &513u64.to_le_bytes()[..], "image_size"),
        (48, &max, "image_size"),
        (48, &(1u64 << 62).to_le_bytes()[..], "image_size"),
        (56, &[0xff; 4], "backing_filename_offset"),
        (60, &4096u32.to_le_bytes()[..], "backing_filename_size"),
        (60, &[0xff; 4], "backing_filename_size"),
    ] {
        let mut options = options(1 << 20, (4096, 2));
        options.backing = Some(("base".into(), false));
        let file = created(&options);
        file.patch(at, bytes);
        let error = Qed::open(&file, &OpenOptions::default())
            .unwrap_err()
            .to_string();
        let named = error.contains(field) || field == "magic" && error.contains("not a QED image");
        assert!(named, "{field} {bytes:x?}: {error}");
    }
    for len in [0, 4, 63, 64, 4096, 8191, 12287] {
        let file = created(&options(1 << 20, (4096, 2)));
        file.set_len(len).unwrap();
        assert!(Qed::open(&file, &OpenOptions::default()).is_err(), "{len}");
    }
}

/// The image with another first entry of its L2 table.
fn at_entry(sound: &[u8], l2: u64, entry: u64) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    bytes[l2 as usize..l2 as usize + 8].copy_from_slice(&entry.to_le_bytes());
    bytes
}

/// Entries that no sound image has: reads fail, writes fail, and neither panics, hangs, nor harms a table.
#[test]
fn wrong_entries_are_errors() {
    let file = {
        let mut driver = open(&created(&options(16 << 20, (4096, 2))));
        driver.write(0, &[1; 8192]).unwrap();
        let file = driver.file.clone();
        driver.close();
        file
    };
    let (sound, len) = (file.bytes(), file.len().unwrap());
    let l1 = 4096usize;
    let l2 = u64::from_le_bytes(sound[l1..l1 + 8].try_into().unwrap());
    for entry in [
        2,
        512,
        l2,
        4096,
        len,
        len + 4096,
        u64::MAX,
        u64::MAX - 4095,
        1 << 63,
        1 << 56,
    ] {
        let file = MemFile::of(sound.clone());
        file.patch(l2 as usize, &entry.to_le_bytes());
        let mut driver = open(&file);
        let error = driver.write(0, &[2; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x}: {error}");
        assert!(driver.read(0, 512).is_err());
        if entry.is_multiple_of(4096) && entry >= len {
            // It must not come to refer to what the file gets there: nothing is written any more.
            let error = driver.write(8192, &[3; 512]).unwrap_err();
            assert!(error.to_string().contains("not written to"), "{error}");
            assert_eq!(driver.read(4096, 512).unwrap(), [1; 512]);
            driver.close();
            assert!(file.bytes()[l2 as usize..] == at_entry(&sound, l2, entry)[l2 as usize..]);
            continue;
        }
        assert!(
            driver
                .zero(0, 4096, ZeroMode::Zero { unmap: true })
                .is_err()
        );
        assert!(driver.zero(0, 4096, ZeroMode::Discard).is_err());
        // Its neighbour works, and writing that leaves the wrong entry as it was.
        assert_eq!(driver.read(4096, 512).unwrap(), [1; 512]);
        driver.write(8192, &[3; 512]).unwrap();
        driver.close();
        let after = &file.bytes()[l2 as usize..l2 as usize + 8];
        assert_eq!(after, entry.to_le_bytes(), "{entry:#x}");
    }
    for entry in [
        1,
        2,
        3,
        512,
        4096,
        8192,
        len,
        len - 4096,
        u64::MAX,
        u64::MAX - 4095,
    ] {
        for index in [0, 1] {
            let file = MemFile::of(sound.clone());
            file.patch(l1 + 8 * index, &entry.to_le_bytes());
            let mut driver = open(&file);
            let error = driver.write(0, &[2; 512]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReadOnly, "{entry:#x}: {error}");
            assert!(error.to_string().contains("damaged"), "{error}");
            // Reading it must end, whatever it gives.
            let _ = driver.read((index as u64) << 22, 4096);
        }
    }
    // Two tables in one place.
    let file = MemFile::of(sound);
    file.patch(l1 + 8, &l2.to_le_bytes());
    let error = open(&file).write(0, &[2; 512]).unwrap_err();
    assert!(error.to_string().contains("overlaps"), "{error}");
    assert_eq!(open(&file).read(4 << 20, 512).unwrap(), [1; 512]);
}

/// Entries behind the end of the file whose slice is read only after the file has grown over them: they read as errors, not
/// as what the file has there by then, and end all changes.
#[test]
fn entries_that_the_file_grew_over_are_errors() {
    let file = {
        let mut driver = open(&created(&options(16 << 20, (4096, 2))));
        // A table has entries for 4 MiB.
        for table in 0..3u64 {
            driver.write(table << 22, &[1; 512]).unwrap();
        }
        let file = driver.file.clone();
        driver.close();
        file
    };
    let (sound, len) = (file.bytes(), file.len().unwrap());
    let l2 = u64::from_le_bytes(sound[4096 + 8..4096 + 16].try_into().unwrap());
    // What comes to lie there: data, data, a table of two clusters, data, space that is reserved, and nothing.
    for ahead in [0, 1, 2, 3, 4, 5, 200, 1 << 40] {
        let entry = len + ahead * 4096;
        let file = MemFile::of(at_entry(&sound, l2, entry));
        let mut driver = open(&file);
        driver.write(4096, &[2; 8192]).unwrap();
        driver.write(12 << 20, &[3; 512]).unwrap();
        driver.flush().unwrap();
        let error = driver.read(4 << 20, 512).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{ahead}: {error}");
        assert!(error.to_string().contains("behind the end"), "{error}");
        for at in [4 << 20, (4 << 20) + 4096, 0, 12 << 20, 13 << 20] {
            let error = driver.write(at, &[4; 512]).unwrap_err();
            assert!(error.to_string().contains("not written to"), "{error}");
            let error = driver.zero(at, 512, ZeroMode::Discard).unwrap_err();
            assert!(error.to_string().contains("not written to"), "{error}");
        }
        driver.close();
        assert_eq!(
            file.bytes()[l2 as usize..l2 as usize + 8],
            entry.to_le_bytes()
        );
        let mut again = open(&file);
        assert_eq!(again.read(4096, 8192).unwrap(), [2; 8192], "{ahead}");
        assert_eq!(again.read(12 << 20, 512).unwrap(), [3; 512], "{ahead}");
    }
}

/// What was written since the image was opened lies behind its end at open: it is no such entry when its slice has left the
/// cache and is read again.
#[test]
fn what_was_written_since_open_is_read_again() {
    let size = 96u64 << 20;
    let mut driver = open(&created(&options(size, (4096, 2))));
    // Half of the tables are there before.
    for table in 0..12u64 {
        driver.write(table << 22, &[1; 512]).unwrap();
    }
    let file = driver.file.clone();
    driver.close();
    let small = OpenOptions {
        cache_bytes: Some(0),
        ..OpenOptions::default()
    };
    let mut driver = Driver::of(file.clone(), Qed::open(&file, &small).unwrap());
    let mut rng = Rng(1);
    let mut model = std::collections::BTreeMap::new();
    // A slice after the other, which has entries for 2 MiB, and all of them again.
    for turn in 0..96u64 {
        for _ in 0..100 {
            let cluster = turn % 48 * 512 + rng.below(512);
            driver
                .write(cluster * 4096, &[turn as u8 + 1; 512])
                .unwrap();
            model.insert(cluster, turn as u8 + 1);
        }
    }
    driver.flush().unwrap();
    for (cluster, value) in &model {
        let read = driver.read(cluster * 4096, 512).unwrap();
        assert_eq!(read, [*value; 512], "{cluster}");
    }
    let facts = driver.image.describe().facts;
    let misses = facts
        .iter()
        .filter_map(|(_, fact)| fact.strip_suffix(" misses")?.rsplit(' ').next());
    let misses: u64 = misses.map(|text| text.parse::<u64>().unwrap()).sum();
    assert!(misses > 48, "the cache had everything: {misses}");
    driver.close();
}

/// A disk of 2^58 bytes: its tables would have terabytes, and what is in memory of them stays bounded.
#[test]
fn the_largest_disk_opens() {
    let (cluster, table) = (1 << 20, 4);
    let file = created(&options(
        super::disk_bytes_max(cluster, table),
        (cluster, table),
    ));
    let mut driver = open(&file);
    assert_eq!(driver.image.size(), 1 << 58);
    let last = driver.image.size() - 512;
    assert_eq!(driver.read(last, 512).unwrap(), [0; 512]);
    driver.write(last, &[4; 512]).unwrap();
    driver.flush().unwrap();
    assert_eq!(driver.read(last, 512).unwrap(), [4; 512]);
    for (cluster, table, most) in [
        (4096, 1, 1 << 30),
        (65536, 4, 1 << 46),
        (64 << 20, 16, block::limits::DISK_BYTES_MAX),
    ] {
        assert_eq!(super::disk_bytes_max(cluster, table), most);
    }
}

#[test]
fn zeros_over_a_backing_file_take_no_space() {
    let (_, mut driver) = over(1 << 20, (4096, 2), &[7; 1 << 20]);
    driver
        .zero(4096, 3 * 4096, ZeroMode::Zero { unmap: false })
        .unwrap();
    let step = driver.ask(|i| i.map(GuestOffset(4096), 1 << 19)).unwrap();
    assert_eq!(
        (step.len, step.kind),
        (3 * 4096, ExtentKind::Zero { host: None })
    );
    driver.flush().unwrap();
    let len = driver.file.len().unwrap();
    driver
        .zero(65536, 100 * 4096, ZeroMode::Zero { unmap: true })
        .unwrap();
    driver.zero(600 * 512, 512, ZeroMode::Discard).unwrap();
    assert_eq!(driver.file.len().unwrap(), len);
    // A write into such a cluster is over zeros, not over the backing file's bytes.
    driver.write(4096 + 512, &[9; 512]).unwrap();
    let read = driver.read(4096, 4096).unwrap();
    assert!(read[..512].iter().chain(&read[1024..]).all(|b| *b == 0));
    assert_eq!(&read[512..1024], [9; 512]);
}

/// A flush that fails keeps everything to be written again, in the same order.
#[test]
fn a_failed_flush_is_done_again() {
    let (_, mut driver) = over(8 << 20, (4096, 2), &[]);
    driver.write(0, &[1; 4096]).unwrap();
    driver.file.fail_after(Some(0));
    assert!(driver.flush().is_err());
    assert!(driver.image.is_dirty());
    driver.file.fail_after(None);
    let before = driver.barriers;
    driver.flush().unwrap();
    assert_eq!(driver.barriers - before, 2, "still data first");
    let mut run = FlushRun::default();
    driver.image.flush_begin(&mut run).unwrap();
    assert_eq!((run.stages.len(), run.writes.len()), (1, 0));
    // Nobody may begin another meanwhile.
    assert!(driver.image.flush_begin(&mut FlushRun::default()).is_err());
}

/// Space that is not zeros takes data, but no tables.
#[test]
fn tables_need_space_that_reads_as_zeros() {
    let (_, mut driver) = over(8 << 20, (4096, 2), &[]);
    driver.zeroed = false;
    let error = driver.write(0, &[1; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[test]
fn a_disk_grows_to_what_its_tables_can_hold() {
    let file = created(&options(1 << 20, (4096, 2)));
    super::grow(&file, 4 << 20).unwrap();
    assert_eq!(open(&file).image.size(), 4 << 20);
    let most = super::disk_bytes_max(4096, 2);
    assert!(super::grow(&file, most + 512).is_err());
    let error = super::grow(&file, 1 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    super::grow(&file, most).unwrap();
    let mut driver = open(&file);
    driver.write(most - 512, &[1; 512]).unwrap();
    assert_eq!(driver.read(most - 512, 512).unwrap(), [1; 512]);
}

#[test]
fn hits_and_waits_are_what_the_contract_says() {
    let (_, mut driver) = over(8 << 20, (4096, 2), &[]);
    let (_, ticket) = driver.start_write(0, &[1; 512]).unwrap();
    // The cluster is busy; its neighbour is not.
    let step = driver.image.plan_write(GuestOffset(512), 512).unwrap();
    assert!(matches!(step, Step::Wait(_)), "{step:?}");
    let step = driver
        .image
        .plan_zero(GuestOffset(0), 4096, ZeroMode::Discard);
    assert!(matches!(step, Ok(Step::Wait(_))));
    driver.write(4096, &[2; 512]).unwrap();
    driver.image.commit(ticket.unwrap());
    assert_eq!(driver.read(0, 512).unwrap(), [1; 512]);
    let file = driver.file.clone();
    driver.close();
    // A load is given to one caller.
    let driver = open(&file);
    let Step::Need(Need::Load(load)) = driver.image.map(GuestOffset(0), 512).unwrap() else {
        panic!("nothing is in memory yet");
    };
    let step = driver.image.map(GuestOffset(4096), 512).unwrap();
    assert_eq!(step, Step::Wait(load.key));
    driver.image.load_failed(&load);
    let step = driver.image.map(GuestOffset(4096), 512).unwrap();
    assert!(matches!(step, Step::Need(Need::Load(_))));
}
