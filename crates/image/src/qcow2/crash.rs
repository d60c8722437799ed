//! Crashes at every barrier and between: what `qemu-img check` and the guest find afterwards.
//!
//! A crash keeps everything up to some barrier and, of what was written after it, any
//! sectors (a seeded choice of them). The guest must find for each sector what it held at the last flush
//! that had completed, or anything that it was given since.

use super::snapshot::{self, NewSnapshot};
use super::testing::{Change, Checked, Driver, MemFile, Rng, apply, check};
use super::{Compression, CreateOptions, OpenOptions};
use crate::ZeroMode;
use std::fs;

const SECTOR: u64 = 512;
/// Crashes tried in each run.
const CRASHES: u32 = 30;

/// What each sector may read as after a crash: what it was at the last flush, and all since.
struct Model {
    now: Vec<u64>,
    allowed: Vec<Vec<u64>>,
}

impl Model {
    fn set(&mut self, sector: u64, value: u64) {
        self.now[sector as usize] = value;
        self.allowed[sector as usize].push(value);
    }

    fn flushed(&mut self) {
        for (now, allowed) in self.now.iter().zip(&mut self.allowed) {
            *allowed = vec![*now];
        }
    }
}

fn sector_of(value: u64) -> Vec<u8> {
    value.to_be_bytes().repeat(SECTOR as usize / 8)
}

/// The file after a crash that lost some of what was written behind journal entry `barrier`.
fn crashed(start: &[u8], journal: &[Change], barrier: usize, end: usize, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = start.to_vec();
    for change in &journal[..barrier] {
        apply(&mut bytes, change);
    }
    let keep_of_8 = rng.below(9);
    for change in &journal[barrier..end] {
        match change {
            Change::Write(at, data) => {
                for (i, part) in data.chunks(SECTOR as usize).enumerate() {
                    if rng.below(8) < keep_of_8 {
                        apply(
                            &mut bytes,
                            &Change::Write(at + i as u64 * SECTOR, part.to_vec()),
                        );
                    }
                }
            }
            // A file system may keep the length without the data. What it loses of a
            // growth reads as zeros here, since opening does not mind a short file.
            other => apply(&mut bytes, other),
        }
    }
    bytes
}

/// What is special about the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum With {
    Nothing,
    Backing,
    /// An internal snapshot, made when it had content.
    Snapshot,
}

/// Fills some of the disk and makes a snapshot of it. Returns what it holds then.
fn take_snapshot(driver: Driver, rng: &mut Rng, size: u64) -> (Driver, Vec<u8>) {
    let mut driver = driver;
    let mut value = 1 << 40;
    for _ in 0..12 {
        let sector = rng.below(size / SECTOR);
        let count = (1 + rng.below(200)).min(size / SECTOR - sector);
        let data: Vec<u8> = (0..count).flat_map(|i| sector_of(value + i)).collect();
        driver.write(sector * SECTOR, &data).unwrap();
        value += count;
    }
    let content = driver.read(0, size).unwrap();
    let (punch, zeroed) = (driver.punch, driver.zeroed);
    let file = MemFile::of(driver.close());
    snapshot::create(&file, &NewSnapshot::default()).unwrap();
    let mut driver = Driver::open(file, &OpenOptions::default());
    (driver.punch, driver.zeroed) = (punch, zeroed);
    (driver, content)
}

fn storm((cluster_bits, extended_l2): (u32, bool), order: u32, seed: u64, with: With, punch: bool) {
    let backing = with == With::Backing;
    // Small clusters: many refcount blocks. Large ones: few of everything.
    let size = (96u64 << cluster_bits).clamp(512 << 10, 2 << 20);
    let sectors = size / SECTOR;
    let mut rng = Rng(seed);
    let options = CreateOptions {
        size,
        version: 3,
        cluster_size: 1 << cluster_bits,
        refcount_bits: 1 << order,
        lazy_refcounts: false,
        backing: backing.then(|| ("base".into(), "raw".into())),
        compression: Compression::Zlib,
        extended_l2,
        ..CreateOptions::default()
    };
    let open = OpenOptions::default();
    let base: Vec<u8> = match backing {
        true => (0..sectors).flat_map(|s| sector_of(1 << 32 | s)).collect(),
        false => Vec::new(),
    };
    let mut driver = Driver::create(&options, &open);
    driver.backing = base.clone();
    driver.punch = punch;
    driver.zeroed = punch;
    let kept = match with {
        With::Snapshot => {
            let kept;
            (driver, kept) = take_snapshot(driver, &mut rng, size);
            kept
        }
        _ => Vec::new(),
    };
    let before = driver.read(0, size).unwrap();
    let first = |sector: &[u8]| u64::from_be_bytes(sector[..8].try_into().unwrap());
    let mut model = Model {
        now: before.chunks(SECTOR as usize).map(first).collect(),
        allowed: Vec::new(),
    };
    model.allowed = model.now.iter().map(|v| vec![*v]).collect();
    let start = driver.file.bytes();
    driver.file.record();
    // What was allowed when the journal had so many entries.
    let mut snapshots = vec![(0, model.allowed.clone())];
    let mut value = 1;
    for _ in 0..80 {
        let sector = rng.below(sectors);
        let most = ((3 << cluster_bits) / SECTOR).max(24);
        let count = (1 + rng.below(most)).min(sectors - sector);
        let (at, len) = (sector * SECTOR, count * SECTOR);
        match rng.below(10) {
            0..5 => {
                // As an allowed value it counts from its first byte on.
                let data: Vec<u8> = (0..count).flat_map(|i| sector_of(value + i)).collect();
                for i in 0..count {
                    model.set(sector + i, value + i);
                }
                snapshots.push((driver.file.journal().len(), model.allowed.clone()));
                driver.write(at, &data).unwrap();
                value += count;
            }
            5..7 => {
                for i in 0..count {
                    model.set(sector + i, 0);
                }
                snapshots.push((driver.file.journal().len(), model.allowed.clone()));
                let unmap = rng.below(2) == 0;
                driver.zero(at, len, ZeroMode::Zero { unmap }).unwrap();
            }
            7 => {
                for i in 0..count {
                    model.allowed[(sector + i) as usize].push(0);
                }
                snapshots.push((driver.file.journal().len(), model.allowed.clone()));
                driver.zero(at, len, ZeroMode::Discard).unwrap();
                let bytes = driver.read(at, len).unwrap();
                for (i, part) in (0..).zip(bytes.chunks(SECTOR as usize)) {
                    model.now[(sector + i) as usize] =
                        u64::from_be_bytes(part[..8].try_into().unwrap());
                }
            }
            _ => {
                driver.flush().unwrap();
                model.flushed();
                // Punching follows the flush; nothing there may hurt what it promised.
                snapshots.push((driver.file.journal().len(), model.allowed.clone()));
            }
        }
    }
    let close_at = driver.file.journal().len();
    let file = driver.file.clone();
    driver.close();
    let journal = file.journal();
    assert!(close_at < journal.len(), "the close has something to write");

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("crashed.qcow2");
    fs::write(directory.path().join("base"), &base).unwrap();
    let syncs: Vec<usize> = (0..journal.len())
        .filter(|i| matches!(journal[*i], Change::Sync))
        .collect();
    let mut leaks = 0;
    for _ in 0..CRASHES {
        // Half of them right before a barrier, when all of a stage is under way.
        let end = match rng.below(2) {
            0 => syncs[rng.below(syncs.len() as u64) as usize],
            _ => rng.below(journal.len() as u64 + 1) as usize,
        };
        let barrier = syncs.iter().rev().find(|s| **s < end).map_or(0, |s| s + 1);
        let bytes = crashed(&start, &journal, barrier, end, &mut rng);
        fs::write(&path, &bytes).unwrap();
        let what = format!(
            "cluster_bits {cluster_bits} extended {extended_l2} order {order} seed {seed} end {end} barrier {barrier}"
        );
        match check(&path) {
            Checked::Clean => {}
            Checked::Leaks => leaks += 1,
            Checked::Errors(text) => panic!("{what}: {text}"),
        }
        // The last promise made before the crash, and all that was begun by then.
        let at = snapshots.partition_point(|(len, _)| *len <= end) - 1;
        let allowed = &snapshots[at].1;
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let mut after = Driver::open(MemFile::of(bytes), &read_only);
        if with == With::Snapshot {
            let snapshot = OpenOptions {
                snapshot: Some("1".into()),
                ..OpenOptions::default()
            };
            let mut then = Driver::open(after.file.clone(), &snapshot);
            assert!(then.read(0, size).unwrap() == kept, "{what}: snapshot");
        }
        after.backing = base.clone();
        let found = after.read(0, size).unwrap();
        for (sector, part) in found.chunks(SECTOR as usize).enumerate() {
            let value = u64::from_be_bytes(part[..8].try_into().unwrap());
            assert!(
                part == sector_of(value) && allowed[sector].contains(&value),
                "{what}: sector {sector} is {value:#x}, allowed {:x?}",
                allowed[sector]
            );
        }
    }
    println!(
        "cluster_bits {cluster_bits} extended {extended_l2} order {order} seed {seed}: {leaks} of {CRASHES} crashes leak"
    );
}

fn storms(seed: u64, cluster_bits: u32, order: u32) {
    storms_with(seed, (cluster_bits, false), order);
}

fn storms_with(seed: u64, clusters: (u32, bool), order: u32) {
    storm(clusters, order, seed, With::Nothing, true);
    storm(clusters, order, seed + 100, With::Backing, false);
    storm(clusters, order, seed + 200, With::Backing, true);
}

#[test]
fn crashes_with_subclusters() {
    storms_with(5, (14, true), 4);
    storms_with(6, (16, true), 6);
    // The largest cost most: one of them.
    storm((21, true), 4, 7, With::Backing, true);
}

#[test]
fn crashes_with_a_snapshot() {
    storm((9, false), 6, 8, With::Snapshot, true);
    storm((9, false), 1, 9, With::Snapshot, false);
    storm((12, false), 4, 10, With::Snapshot, true);
    storm((16, false), 4, 11, With::Snapshot, false);
    storm((14, true), 4, 12, With::Snapshot, true);
    storm((16, true), 3, 13, With::Snapshot, false);
}

#[test]
fn crashes_with_many_refcount_blocks() {
    storms(0, 9, 6);
    storms(1, 9, 5);
}

#[test]
fn crashes_with_small_refcounts() {
    storms(2, 9, 0);
}

#[test]
fn crashes_with_large_clusters() {
    storms(3, 12, 4);
    storms(4, 16, 6);
}
