//! Corner cases of subclusters, one by one.

use super::super::testing::{Checked, Driver, MemFile, check, run};
use super::super::{CreateOptions, OpenOptions};
use crate::{Allocation, ExtentKind, Fill, Image, Plan, Step, ZeroMode, ZeroPlan};
use block::{ErrorKind, GuestOffset};
use std::fs;

const CLUSTER: u64 = 65536;
/// A subcluster.
const UNIT: u64 = 2048;
const COPIED: u64 = 1 << 63;
const KEEP: ZeroMode = ZeroMode::Zero { unmap: false };
const UNMAP: ZeroMode = ZeroMode::Zero { unmap: true };

fn options(backing: bool) -> CreateOptions {
    CreateOptions {
        // So large that enough is reserved at once.
        size: 1 << 30,
        extended_l2: true,
        backing: backing.then(|| ("base".into(), "raw".into())),
        ..CreateOptions::default()
    }
}

/// A new image; with `backing`, over nines.
fn fresh(backing: bool) -> Driver {
    let mut driver = Driver::create(&options(backing), &OpenOptions::default());
    if backing {
        driver.backing = vec![9; 64 * CLUSTER as usize];
    }
    // The first needs tables and space.
    driver.write(60 * CLUSTER, &[1; UNIT as usize]).unwrap();
    driver
}

fn open(file: &MemFile) -> Driver {
    Driver::open(file.clone(), &OpenOptions::default())
}

fn checked(file: &MemFile) -> Checked {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    fs::write(&path, file.bytes()).unwrap();
    fs::write(directory.path().join("base"), [9; 512]).unwrap();
    check(&path)
}

/// Where cluster `index`'s entry is, in an image that was flushed.
fn entry_at(driver: &Driver, index: u64) -> u64 {
    let l1 = driver.image.header().l1_table_offset;
    (driver.file.word(l1) & !COPIED) + index * 16
}

fn allocation(step: Step<Plan>) -> Allocation {
    match step {
        Step::Done(Plan::Allocate(allocation)) => allocation,
        other => panic!("{other:?}"),
    }
}

fn plan(driver: &Driver, at: u64, len: u64) -> Step<Plan> {
    driver.image.plan_write(GuestOffset(at), len).unwrap()
}

fn kind(driver: &mut Driver, at: u64, len: u64) -> (u64, ExtentKind) {
    let extent = driver.ask(|i| i.map(GuestOffset(at), len)).unwrap();
    (extent.len, extent.kind)
}

#[test]
fn what_a_write_covers_is_neither_read_nor_copied() {
    let (existing, zero, nothing) = (Fill::Existing, Fill::Zero, Fill::Nothing);
    for (backing, at, len, start, end, fill) in [
        (true, 0, 4096, 0, 4096, nothing),
        (true, 3 * UNIT, UNIT, 3 * UNIT, 4 * UNIT, nothing),
        (true, 512, 512, 0, UNIT, existing),
        (true, 512, UNIT, 0, 2 * UNIT, existing),
        (true, UNIT, UNIT + 512, UNIT, 3 * UNIT, existing),
        (false, 512, 512, 0, UNIT, zero),
        (false, 2 * UNIT, 3 * UNIT, 2 * UNIT, 5 * UNIT, nothing),
        // Whole clusters together, parts of one by themselves.
        (true, 0, 3 * CLUSTER, 0, 3 * CLUSTER, nothing),
        (true, 0, CLUSTER + 512, 0, CLUSTER, nothing),
        (true, 30 * UNIT, CLUSTER, 30 * UNIT, CLUSTER, nothing),
    ] {
        let what = format!("backing {backing}, {len} bytes at {at}");
        let driver = fresh(backing);
        let a = allocation(plan(&driver, at, len));
        assert_eq!((a.start.0, a.start.0 + a.len), (start, end), "{what}");
        assert_eq!(a.write_len, len.min(end - at), "{what}");
        assert_eq!(a.fill, fill, "{what}");
        assert_eq!(a.host.0 % CLUSTER, start % CLUSTER, "{what}");
    }
}

#[test]
fn a_part_ends_before_what_needs_another_fill() {
    let mut driver = fresh(true);
    // Cluster 0: unallocated 0–3, allocated 4–5, zeros 6–7, unallocated from 8 on.
    driver.write(4 * UNIT, &[2; 2 * UNIT as usize]).unwrap();
    driver.zero(6 * UNIT, 2 * UNIT, UNMAP).unwrap();
    for (at, len, end, fill) in [
        // Everything is covered: one write, whatever was there.
        (2 * UNIT, 8 * UNIT, 10 * UNIT, Fill::Nothing),
        // It ends within an allocated one, which is written in place.
        (2 * UNIT, 2 * UNIT + 512, 4 * UNIT, Fill::Nothing),
        (2 * UNIT + 512, 2 * UNIT, 4 * UNIT, Fill::Existing),
        // It ends within zeros.
        (2 * UNIT, 4 * UNIT + 512, 7 * UNIT, Fill::Zero),
        (2 * UNIT + 512, 4 * UNIT, 6 * UNIT, Fill::Existing),
        // It begins within zeros.
        (6 * UNIT + 512, 512, 7 * UNIT, Fill::Zero),
        (7 * UNIT + 512, UNIT, 8 * UNIT, Fill::Zero),
        (7 * UNIT, UNIT + 512, 9 * UNIT, Fill::Existing),
    ] {
        let a = allocation(plan(&driver, at, len));
        assert_eq!((a.start.0 + a.len, a.fill), (end, fill), "{len} at {at}");
        assert!(!a.zeroed, "who knows what is there");
        driver.image.abort(a.ticket);
    }
    let step = plan(&driver, 5 * UNIT, 2 * UNIT);
    assert!(
        matches!(step, Step::Done(Plan::InPlace { len: UNIT, .. })),
        "{step:?}"
    );
    let mut want = vec![9; CLUSTER as usize];
    want[4 * UNIT as usize..6 * UNIT as usize].fill(2);
    want[6 * UNIT as usize..8 * UNIT as usize].fill(0);
    for (at, len) in [(512, 6 * UNIT), (5 * UNIT + 1, 5 * UNIT), (3, 12 * UNIT)] {
        driver.write(at, &vec![5; len as usize]).unwrap();
        want[at as usize..(at + len) as usize].fill(5);
        assert!(driver.read(0, CLUSTER).unwrap() == want, "{len} at {at}");
    }
}

#[test]
fn writes_to_one_new_cluster_share_it() {
    let mut driver = fresh(true);
    let first = allocation(plan(&driver, 2 * UNIT, 2 * UNIT));
    let second = allocation(plan(&driver, 8 * UNIT + 512, 512));
    let third = allocation(plan(&driver, 4 * UNIT, UNIT));
    let base = first.host.0 - 2 * UNIT;
    assert_eq!(second.host.0, base + 8 * UNIT);
    assert_eq!(third.host.0, base + 4 * UNIT);
    // The same subcluster waits for the one who is at it; no other does.
    assert_eq!(plan(&driver, 3 * UNIT, UNIT), Step::Wait(first.key));
    assert_eq!(plan(&driver, 8 * UNIT, 512), Step::Wait(second.key));
    let zero = |at, len, mode| driver.image.plan_zero(GuestOffset(at), len, mode).unwrap();
    assert_eq!(zero(0, CLUSTER, ZeroMode::Discard), Step::Wait(first.key));
    assert_eq!(zero(7 * UNIT, 3 * UNIT, UNMAP), Step::Wait(second.key));
    // A write that would run into one ends before.
    let fourth = allocation(plan(&driver, 0, CLUSTER));
    assert_eq!((fourth.len, fourth.fill), (2 * UNIT, Fill::Nothing));
    assert_eq!(fourth.host.0, base);
    let before = vec![9; CLUSTER as usize];
    assert!(
        driver.read(0, CLUSTER).unwrap() == before,
        "nothing is committed"
    );
    // The first commit makes the cluster the guest's, whoever has it; aborts take nothing away then.
    driver.image.abort(first.ticket);
    driver.image.commit(second.ticket);
    let host = block::HostOffset(base + 8 * UNIT);
    let data = |offset| ExtentKind::Data {
        file: crate::FileId::IMAGE,
        offset,
    };
    assert_eq!(kind(&mut driver, 8 * UNIT, CLUSTER), (UNIT, data(host)));
    assert_eq!(
        kind(&mut driver, 0, CLUSTER),
        (8 * UNIT, ExtentKind::Unallocated)
    );
    driver.image.abort(third.ticket);
    driver.image.commit(fourth.ticket);
    assert_eq!(
        kind(&mut driver, 0, CLUSTER),
        (2 * UNIT, data(block::HostOffset(base)))
    );
    let again = allocation(plan(&driver, 4 * UNIT, UNIT));
    assert_eq!(again.host.0, base + 4 * UNIT);
    driver.image.commit(again.ticket);
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn the_last_abort_gives_a_new_cluster_back() {
    let driver = fresh(true);
    let hosts = |driver: &Driver| {
        let first = allocation(plan(driver, 0, UNIT));
        let second = allocation(plan(driver, UNIT, UNIT));
        assert!(first.zeroed && second.zeroed, "reserved space is zeros");
        driver.image.abort(first.ticket);
        // What it wrote is there: nobody may take it for zeros.
        let again = allocation(plan(driver, 0, UNIT));
        assert!(!again.zeroed);
        assert_eq!(again.host, first.host);
        driver.image.abort(again.ticket);
        driver.image.abort(second.ticket);
        first.host
    };
    let host = hosts(&driver);
    // Free again: taken before the file grows.
    let mut seen = Vec::new();
    for i in (1..60).chain(61..200) {
        let a = allocation(plan(&driver, i * CLUSTER, UNIT));
        seen.push(a.host.0 - a.host.0 % CLUSTER);
        driver.image.abort(a.ticket);
    }
    assert!(seen.contains(&host.0), "the cluster is lost");
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn zeroing_goes_by_subclusters_and_discarding_by_clusters() {
    let host = Some(());
    let (all, parts) = ((0, CLUSTER), (4 * UNIT, 3 * UNIT));
    // Before: 4–5 allocated, 6 zeros. Bits after; whether the cluster stays.
    let bits = |zero: u64, allocated: u64| zero << 32 | allocated;
    let (before, none) = (bits(1 << 6, 3 << 4), bits(0, 0));
    let every = bits(u64::from(u32::MAX), 0);
    for (backing, (at, len), mode, after, stays) in [
        (true, all, ZeroMode::Discard, every, None),
        (true, all, UNMAP, every, None),
        (true, all, KEEP, every, host),
        (false, all, ZeroMode::Discard, none, None),
        (false, all, UNMAP, none, None),
        (false, all, KEEP, every, host),
        (true, parts, ZeroMode::Discard, before, host),
        (true, parts, UNMAP, bits(7 << 4, 0), host),
        (false, parts, KEEP, bits(7 << 4, 0), host),
        (
            true,
            (5 * UNIT, 4 * UNIT),
            UNMAP,
            bits(15 << 5, 1 << 4),
            host,
        ),
        // Ends of subclusters are zeroed as data.
        (true, (4 * UNIT + 512, 512), UNMAP, before, host),
    ] {
        let what = format!("backing {backing}, {mode:?} of {len} at {at}");
        let mut driver = fresh(backing);
        driver.write(4 * UNIT, &[2; 2 * UNIT as usize]).unwrap();
        driver.zero(6 * UNIT, UNIT, KEEP).unwrap();
        driver.flush().unwrap();
        let entry = entry_at(&driver, 0);
        let (old, was) = (driver.file.word(entry), driver.file.word(entry + 8));
        // Without a backing file there is nothing to be hidden by zeros.
        assert_eq!(was | 1 << 38, before, "{what}");
        let read = driver.read(0, CLUSTER).unwrap();
        driver.zero(at, len, mode).unwrap();
        let mut want = read.clone();
        if mode != ZeroMode::Discard || after != before {
            want[at as usize..(at + len) as usize].fill(0);
        }
        assert!(driver.read(0, CLUSTER).unwrap() == want, "{what}");
        driver.flush().unwrap();
        assert_eq!(driver.file.word(entry + 8), after, "{what}");
        let entry = driver.file.word(entry);
        assert_eq!(entry, stays.map_or(0, |()| old), "{what}");
        let file = driver.file.clone();
        driver.close();
        assert_eq!(checked(&file), Checked::Clean, "{what}");
    }
}

#[test]
fn zeroing_without_a_table_copies_nothing() {
    let driver = fresh(true);
    let far = (CLUSTER / 16) * CLUSTER;
    let plan = |at, len| driver.image.plan_zero(GuestOffset(at), len, KEEP).unwrap();
    assert_eq!(
        plan(far + UNIT, 3 * UNIT + 512),
        Step::Done(ZeroPlan::Done { len: 3 * UNIT })
    );
    assert_eq!(
        plan(far + 4 * UNIT, 512),
        Step::Done(ZeroPlan::Write { len: 512 })
    );
}

#[test]
fn unsound_bitmaps_are_named() {
    let mut driver = fresh(true);
    driver.write(CLUSTER, &[1; UNIT as usize]).unwrap();
    let file = driver.file.clone();
    driver.flush().unwrap();
    let at = entry_at(&driver, 1);
    driver.close();
    let raw = file.word(at);
    for (word0, word1, place, text) in [
        (raw, 1 << 32 | 1, at + 8, "as allocated and as zeros"),
        (0, 1, at + 8, "where there is no cluster"),
        (raw | 1, 1, at, "reserved bits"),
        (1 << 62 | CLUSTER, 1 << 33, at + 8, "a compressed cluster"),
    ] {
        let file = MemFile::of(file.bytes());
        file.patch(at as usize, &u64::to_be_bytes(word0));
        file.patch(at as usize + 8, &u64::to_be_bytes(word1));
        // A change that meets it is the last one: each on an image of its own.
        let copy = || open(&MemFile::of(file.bytes()));
        for error in [
            copy().read(CLUSTER, 512).unwrap_err(),
            copy().write(CLUSTER, &[1; 512]).unwrap_err(),
            copy().write(CLUSTER, &[1; CLUSTER as usize]).unwrap_err(),
            copy().zero(CLUSTER, UNIT, UNMAP).unwrap_err(),
            copy()
                .zero(CLUSTER, CLUSTER, ZeroMode::Discard)
                .unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let message = error.to_string();
            for part in ["test.qcow2", text, &format!("{place:#x} (guest offset")] {
                assert!(message.contains(part), "{message}: no {part}");
            }
        }
        // The others are not affected, and it stays as it was.
        let mut driver = open(&file);
        driver.backing = vec![9; 64 * CLUSTER as usize];
        assert_eq!(kind(&mut driver, 0, 4 * CLUSTER).0, CLUSTER);
        driver.write(2 * CLUSTER, &[2; 512]).unwrap();
        driver.close();
        assert_eq!((file.word(at), file.word(at + 8)), (word0, word1));
    }
}

/// As the first word of an entry these would point at metadata, or carry our mark of that.
#[test]
fn bitmaps_are_not_taken_for_entries() {
    let mut driver = fresh(false);
    // Bit 16: cluster 1 is the refcount table. Bits 1 to 8: the mark.
    for (cluster, first, count) in [(0, 16, 1), (1, 1, 8)] {
        let data = vec![3; (count * UNIT) as usize];
        driver
            .write(cluster * CLUSTER + first * UNIT, &data)
            .unwrap();
    }
    let file = driver.file.clone();
    driver.close();
    // Loaded, judged and written again, with a neighbour.
    let mut driver = open(&file);
    driver.write(2 * CLUSTER, &[4; 512]).unwrap();
    driver.flush().unwrap();
    let at = entry_at(&driver, 0);
    assert_eq!(file.word(at + 8), 1 << 16);
    assert_eq!(file.word(at + 24), 0x1fe);
    assert_eq!(driver.read(16 * UNIT, 512).unwrap(), [3; 512]);
    assert_eq!(driver.read(CLUSTER + UNIT, 512).unwrap(), [3; 512]);
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn compressed_clusters_have_no_subclusters() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, path) = (
        directory.path().join("disk.raw"),
        directory.path().join("disk.qcow2"),
    );
    let mut model: Vec<u8> = (0..1u64 << 20).map(|i| (i / 300) as u8 | 1).collect();
    fs::write(&raw, &model).unwrap();
    let (raw_name, name) = (raw.to_str().unwrap(), path.to_str().unwrap());
    let how = ["convert", "-c", "-O", "qcow2", "-o", "extended_l2=on"];
    run("qemu-img", &[&how[..], &[raw_name, name]].concat());
    let mut driver = open(&MemFile::of(fs::read(&path).unwrap()));
    assert!(matches!(
        kind(&mut driver, 0, CLUSTER),
        (CLUSTER, ExtentKind::Compressed(_))
    ));
    // A write to a part needs all of it: unpacked, and a cluster of its own.
    let a = driver
        .ask(|i| i.plan_write(GuestOffset(CLUSTER + 5 * UNIT), UNIT))
        .unwrap();
    let a = allocation(Step::Done(a));
    assert_eq!((a.start.0, a.len), (CLUSTER, CLUSTER));
    assert_eq!(a.fill, Fill::Existing);
    assert_eq!(plan(&driver, CLUSTER, 512), Step::Wait(a.key));
    driver.image.abort(a.ticket);
    for (at, len) in [(5 * UNIT, UNIT), (3 * CLUSTER - 512, 1024)] {
        driver.write(at, &vec![7; len as usize]).unwrap();
        model[at as usize..(at + len) as usize].fill(7);
    }
    driver.zero(4 * CLUSTER + UNIT, UNIT, UNMAP).unwrap();
    model[(4 * CLUSTER + UNIT) as usize..][..UNIT as usize].fill(0);
    driver.zero(6 * CLUSTER, CLUSTER, KEEP).unwrap();
    model[6 * CLUSTER as usize..][..CLUSTER as usize].fill(0);
    assert!(driver.read(0, 1 << 20).unwrap() == model);
    let file = driver.file.clone();
    driver.close();
    fs::write(&path, file.bytes()).unwrap();
    fs::write(&raw, &model).unwrap();
    assert_eq!(check(&path), Checked::Clean);
    run("qemu-img", &["compare", name, raw_name]);
}

#[test]
fn a_small_cluster_has_no_subclusters() {
    let driver = fresh(false);
    // cluster_bits is at byte 20.
    driver.file.patch(23, &[13]);
    let error = super::super::Qcow2::open(&driver.file, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("cluster_bits"), "{error}");
}
