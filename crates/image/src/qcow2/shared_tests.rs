//! Writing to images with internal snapshots.

use super::shared::copy_of_key;
use super::snapshot::{self, NewSnapshot};
use super::testing::{Checked, Driver, MemFile, Rng, check, run};
use super::{CreateOptions, OpenOptions, Qcow2};
use crate::{FlushRun, Image, MetaWrite, Need, Plan, Step, ZeroMode};
use block::GuestOffset;
use std::fs;

const CLUSTER: u64 = 512;
/// Guest bytes behind one L2 table.
const TABLE: u64 = 64 * CLUSTER;
const COPIED: u64 = 1 << 63;

/// An image with content in three tables and a snapshot of it.
fn image() -> MemFile {
    let options = CreateOptions {
        size: 8 * TABLE,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    };
    let mut driver = Driver::create(&options, &OpenOptions::default());
    for table in 0..3 {
        driver
            .write(table * TABLE, &[table as u8 + 1; 3 * CLUSTER as usize])
            .unwrap();
    }
    let file = MemFile::of(driver.close());
    snapshot::create(&file, &NewSnapshot::default()).unwrap();
    file
}

fn open(file: &MemFile) -> Driver {
    Driver::open(file.clone(), &OpenOptions::default())
}

/// The disk as the snapshot has it.
fn then(file: &MemFile) -> Vec<u8> {
    let options = OpenOptions {
        snapshot: Some("1".into()),
        ..OpenOptions::default()
    };
    let mut driver = Driver::open(file.clone(), &options);
    let size = driver.image.size();
    driver.read(0, size).unwrap()
}

fn opinion(file: &MemFile) -> Checked {
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(path.path(), file.bytes()).unwrap();
    check(path.path())
}

fn load(image: &Qcow2, at: u64) -> crate::Load {
    match image.plan_write(GuestOffset(at), 512).unwrap() {
        Step::Need(Need::Load(load)) => load,
        other => panic!("{other:?}"),
    }
}

/// The load that copies the table behind guest byte `at`, after all others that it takes.
fn load_of_copy(driver: &mut Driver, at: u64) -> crate::Load {
    loop {
        match driver.image.plan_write(GuestOffset(at), 512).unwrap() {
            Step::Need(Need::Load(load)) if copy_of_key(load.key).is_some() => return load,
            Step::Need(need) => driver.need(need).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_shared_table_is_copied_once_and_only_when_it_changes() {
    let file = image();
    let before = then(&file);
    let mut driver = open(&file);
    let l1 = driver.image.header().l1_table_offset;
    let shared: Vec<u64> = (0..3).map(|n| file.word(l1 + 8 * n)).collect();
    assert!(shared.iter().all(|raw| raw & COPIED == 0));
    let tables: Vec<Vec<u8>> = shared.iter().map(|at| table(&file, *at)).collect();
    // Reading copies nothing.
    driver.read(0, 3 * TABLE).unwrap();
    driver.flush().unwrap();
    assert_eq!(file.word(l1), shared[0]);
    driver.write(CLUSTER, &[9; 512]).unwrap();
    driver.flush().unwrap();
    let copy = file.word(l1);
    assert!(copy & COPIED != 0 && copy & !COPIED != shared[0]);
    // Zeroing and discarding change the second table, and more writes the first again.
    driver.write(2 * CLUSTER, &[9; 512]).unwrap();
    driver.zero(TABLE, CLUSTER, ZeroMode::Discard).unwrap();
    let keep = ZeroMode::Zero { unmap: false };
    driver.zero(TABLE + CLUSTER, CLUSTER, keep).unwrap();
    driver.flush().unwrap();
    assert_eq!(file.word(l1), copy);
    assert!(file.word(l1 + 8) & COPIED != 0);
    assert_eq!(file.word(l1 + 16), shared[2]);
    for (at, then) in shared.iter().zip(&tables) {
        assert!(table(&file, *at) == *then, "a snapshot's table changed");
    }
    let mut now = before.clone();
    now[CLUSTER as usize..][..512].fill(9);
    now[2 * CLUSTER as usize..][..512].fill(9);
    now[TABLE as usize..][..2 * CLUSTER as usize].fill(0);
    let all = driver.read(0, 8 * TABLE).unwrap();
    assert!(all == now);
    driver.close();
    assert_eq!(opinion(&file), Checked::Clean);
    assert!(then(&file) == before);
    snapshot::apply(&file, "1").unwrap();
    snapshot::delete(&file, "1").unwrap();
    assert_eq!(opinion(&file), Checked::Clean);
    assert!(open(&file).read(0, 8 * TABLE).unwrap() == before);
}

fn table(file: &MemFile, at: u64) -> Vec<u8> {
    file.bytes()[at as usize..(at + CLUSTER) as usize].to_vec()
}

#[test]
fn who_comes_meanwhile_waits_for_the_copy() {
    let file = image();
    let mut driver = open(&file);
    driver.write(7 * TABLE, &[1; 512]).unwrap();
    let first = load_of_copy(&mut driver, 0);
    // Of the same table, and of the same snapshot's other table.
    let plan = driver.image.plan_write(GuestOffset(CLUSTER), 512).unwrap();
    assert!(
        matches!(plan, Step::Wait(key) if key == first.key),
        "{plan:?}"
    );
    let other = load(&driver.image, TABLE);
    assert_ne!(other.key, first.key);
    // A load that fails leaves everything as it was, and another one may begin.
    driver.image.load_failed(&first);
    driver.image.load_failed(&other);
    driver.flush().unwrap();
    assert!(matches!(opinion(&file), Checked::Clean | Checked::Leaks));
    let again = load(&driver.image, 0);
    assert_eq!(again.key, first.key);
    // A flush that ends while it is loaded does not mind.
    driver.flush().unwrap();
    driver.need(Need::Load(again)).unwrap();
    // What is not in memory is read from the table that the copy is of.
    let entries = load(&driver.image, 0);
    assert_eq!(entries.offset, again.offset);
    driver.need(Need::Load(entries)).unwrap();
    let plan = driver.image.plan_write(GuestOffset(0), 512).unwrap();
    let Step::Done(Plan::Allocate(plan)) = plan else {
        panic!("{plan:?}");
    };
    driver.image.abort(plan.ticket);
    driver.write(0, &[5; 512]).unwrap();
    assert!(driver.image.loaded(&again, &[0; 512]).is_err());
    driver.close();
    assert_eq!(opinion(&file), Checked::Clean);
}

#[test]
fn a_copy_is_durable_before_what_refers_to_it() {
    let file = image();
    let mut driver = open(&file);
    let l1 = driver.image.header().l1_table_offset;
    let copy = load_of_copy(&mut driver, 0);
    // All that the copy's cluster made dirty is written before the copy is there.
    driver.flush().unwrap();
    driver.need(Need::Load(copy)).unwrap();
    let mut run = FlushRun::default();
    driver.image.flush_begin(&mut run).unwrap();
    // Neighbours are written together.
    let holds = |w: &MetaWrite, at: u64| w.offset.0 <= at && at < w.offset.0 + w.len as u64;
    let stage_of = |at: u64| {
        let write = run.writes.iter().position(|w| holds(w, at)).unwrap();
        run.stages.iter().position(|s| write < s.end).unwrap()
    };
    let write = run.writes.iter().find(|w| holds(w, l1)).unwrap();
    let entry = write.start + (l1 - write.offset.0) as usize;
    let entry = u64::from_be_bytes(run.bytes[entry..][..8].try_into().unwrap());
    assert!(stage_of(entry & !COPIED) < stage_of(l1));
    driver.image.flush_end(&mut run, false);
    driver.close();
    assert_eq!(opinion(&file), Checked::Clean);
}

#[test]
fn a_flush_that_fails_is_made_up_for() {
    for writes in 0..30 {
        let file = image();
        let before = then(&file);
        let mut driver = open(&file);
        driver.write(100, &[9; 9000]).unwrap();
        driver.write(TABLE, &[8; 9000]).unwrap();
        file.fail_after(Some(writes));
        let failed = driver.flush().is_err();
        assert!(matches!(opinion(&file), Checked::Clean | Checked::Leaks));
        file.fail_after(None);
        driver.write(2 * TABLE, &[7; 100]).unwrap();
        let mut now = before.clone();
        now[100..9100].fill(9);
        now[TABLE as usize..][..9000].fill(8);
        now[2 * TABLE as usize..][..100].fill(7);
        assert!(driver.read(0, 8 * TABLE).unwrap() == now);
        driver.close();
        assert_eq!(opinion(&file), Checked::Clean);
        assert!(then(&file) == before);
        assert!(open(&file).read(0, 8 * TABLE).unwrap() == now);
        if !failed {
            assert!(writes > 3);
            return;
        }
    }
    panic!("never ended");
}

#[test]
fn flags_that_lie_in_a_shared_table_do_not_cost_the_snapshot_its_data() {
    let file = image();
    let before = then(&file);
    let l1 = Qcow2::open(&file, &OpenOptions::default())
        .unwrap()
        .header()
        .l1_table_offset;
    let l2 = file.word(l1);
    for n in 0..3 {
        let raw = file.word(l2 + 8 * n) | COPIED;
        file.patch((l2 + 8 * n) as usize, &raw.to_be_bytes());
    }
    let mut driver = open(&file);
    // Some are in memory before the table is copied.
    driver.read(0, 512).unwrap();
    driver.write(0, &[9; 3 * CLUSTER as usize]).unwrap();
    driver.close();
    assert!(then(&file) == before);
}

#[test]
fn many_tables_are_copied_with_little_memory() {
    let options = CreateOptions {
        size: 300 * 64 * 512,
        cluster_size: 512,
        ..CreateOptions::default()
    };
    let mut driver = Driver::create(&options, &OpenOptions::default());
    for table in 0..300 {
        driver.write(table * 64 * 512, &[3; 700]).unwrap();
    }
    let file = MemFile::of(driver.close());
    snapshot::create(&file, &NewSnapshot::default()).unwrap();
    let before = then(&file);
    let few = OpenOptions {
        cache_bytes: Some(0),
        ..OpenOptions::default()
    };
    let mut driver = Driver::open(file.clone(), &few);
    for table in 0..300 {
        driver.write(table * 64 * 512, &[4; 200]).unwrap();
    }
    // At most 64 copies wait for a flush.
    assert!(driver.barriers >= 2 * (300 / 64), "{}", driver.barriers);
    for table in 0..300 {
        let bytes = driver.read(table * 64 * 512, 700).unwrap();
        assert!(bytes[..200] == [4; 200] && bytes[200..] == [3; 500]);
    }
    driver.close();
    assert_eq!(opinion(&file), Checked::Clean);
    assert!(then(&file) == before);
}

/// Snapshots by qemu-img while the image is closed, writes by this code and by qemu-io.
#[test]
fn what_is_written_after_a_snapshot_reads_the_same_in_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let arg = |name: &str| dir.path().join(name).display().to_string();
    let (image, raw) = (arg("i"), arg("raw"));
    for (nth, options) in [
        "cluster_size=512,refcount_bits=32",
        "cluster_size=4k,refcount_bits=2",
        "compat=0.10,cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "cluster_size=64k",
    ]
    .into_iter()
    .enumerate()
    {
        const SIZE: u64 = 2 << 20;
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, &image, "2M"],
        );
        if !options.contains("bits=2") {
            run(
                "qemu-io",
                &["-f", "qcow2", "-c", "write -c -P 77 1M 128k", &image],
            );
        }
        let mut rng = Rng(nth as u64);
        let mut kept: Vec<Vec<u8>> = Vec::new();
        for round in 0..4 {
            let file = MemFile::of(fs::read(&image).unwrap());
            let mut driver = Driver::open(
                file,
                &OpenOptions {
                    cache_bytes: (round % 2 == 0).then_some(0),
                    ..OpenOptions::default()
                },
            );
            let mut disk = driver.read(0, SIZE).unwrap();
            for _ in 0..25 {
                let at = rng.below(SIZE);
                let len = (1 + rng.below(30_000)).min(SIZE - at);
                match rng.below(6) {
                    0 => {
                        let mode = ZeroMode::Zero {
                            unmap: rng.below(2) == 0,
                        };
                        driver.zero(at, len, mode).unwrap();
                        disk[at as usize..(at + len) as usize].fill(0);
                    }
                    1 => {
                        driver.zero(at, len, ZeroMode::Discard).unwrap();
                        disk = driver.read(0, SIZE).unwrap();
                    }
                    2 => driver.flush().unwrap(),
                    _ => {
                        let byte = rng.below(255) as u8;
                        driver.write(at, &vec![byte; len as usize]).unwrap();
                        disk[at as usize..(at + len) as usize].fill(byte);
                    }
                }
            }
            assert!(driver.read(0, SIZE).unwrap() == disk, "{options}");
            fs::write(&image, driver.close()).unwrap();
            let what = format!("{options}, round {round}");
            assert_eq!(check(image.as_ref()), Checked::Clean, "{what}");
            for (n, kept) in kept.iter().enumerate() {
                let name = format!("snapshot.name=s{n}");
                let convert = [
                    "convert", "-f", "qcow2", "-O", "raw", "-l", &name, &image, &raw,
                ];
                run("qemu-img", &convert);
                assert!(fs::read(&raw).unwrap() == *kept, "{what}: snapshot {n}");
            }
            run(
                "qemu-img",
                &["convert", "-f", "qcow2", "-O", "raw", &image, &raw],
            );
            assert!(fs::read(&raw).unwrap() == disk, "{what}");
            if kept.len() < 2 {
                let name = format!("s{}", kept.len());
                run("qemu-img", &["snapshot", "-c", &name, &image]);
                kept.push(disk);
            }
        }
    }
}
