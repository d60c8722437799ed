//! Commits that begin before a flush asks for them, and flushes that need none.

use crate::common::{Rig, arg, open_cached, qemu_create, run};
use block::{GuestError, Op};
use disk::{Disk, DiskOptions, Statistics};
use image::Format;
use io::{Cache, EngineKind};
use std::sync::Arc;

const CLUSTER: u64 = 64 << 10;
/// Pairs of a write and a flush after which the next flush is expected.
const LEARNED: u64 = 16;

struct Pairs {
    disk: Arc<Disk>,
    rig: Rig,
    at: u64,
    dir: tempfile::TempDir,
}

impl Pairs {
    fn new(options: DiskOptions) -> Self {
        Self::cached(options, Cache::Writeback)
    }

    fn cached(options: DiskOptions, cache: Cache) -> Self {
        let dir = crate::common::dir();
        let path = dir.path().join("pairs.qcow2");
        qemu_create(&path, "", None, 1 << 30);
        let disk = open_cached(&path, Format::Qcow2, options, cache);
        let rig = Rig::new(&disk, EngineKind::IoUring, 16);
        Self {
            disk,
            rig,
            at: 0,
            dir,
        }
    }

    /// Writes to a new cluster; the commit that this may begin is not waited for.
    fn write(&mut self, fua: bool) {
        let at = self.at;
        self.at += CLUSTER;
        write(&mut self.rig, at, fua);
    }

    fn flush(&mut self) {
        assert_eq!(one(&mut self.rig, Op::Flush, 0, Vec::new()), Ok(()));
    }

    fn learn(&mut self) {
        for _ in 0..LEARNED {
            self.write(false);
            self.flush();
        }
    }

    /// What `does` adds to the statistics: commits, those that began ahead, and flushes that needed none of their own.
    fn counts(&mut self, does: impl FnOnce(&mut Self)) -> (u64, u64, u64) {
        let before = self.disk.statistics();
        does(self);
        let after = self.disk.statistics();
        let grew = |count: fn(&Statistics) -> u64| count(&after) - count(&before);
        (grew(|s| s.commits), grew(|s| s.ahead), grew(|s| s.spared))
    }
}

fn one(rig: &mut Rig, op: Op, at: u64, data: Vec<u8>) -> Result<(), GuestError> {
    let len = data.len() as u64;
    rig.submit(op, at, data, len, &[]);
    let ended = rig.some();
    assert_eq!(ended.len(), 1);
    ended[0].result
}

fn write(rig: &mut Rig, at: u64, fua: bool) {
    assert_eq!(one(rig, Op::Write { fua }, at, vec![7; 4096]), Ok(()));
}

#[test]
fn flushes_that_follow_each_write_find_their_commits_begun() {
    let mut pairs = Pairs::new(DiskOptions::default());
    pairs.learn();
    let barriers = pairs.disk.statistics().barriers;
    let counts = pairs.counts(|pairs| {
        for _ in 0..10 {
            pairs.write(false);
            pairs.flush();
        }
    });
    assert_eq!(counts, (10, 10, 10));
    assert_eq!(pairs.disk.statistics().barriers, barriers + 10);
}

#[test]
fn a_disk_that_is_told_so_flushes_only_when_asked() {
    let mut pairs = Pairs::new(DiskOptions {
        flush_ahead: false,
        ..DiskOptions::default()
    });
    pairs.learn();
    let counts = pairs.counts(Pairs::learn);
    assert_eq!(counts, (LEARNED, 0, 0));
}

#[test]
fn space_is_written_before_it_is_used_where_each_write_is_flushed() {
    let mut pairs = Pairs::cached(DiskOptions::default(), Cache::Writeback);
    let prewritten = |pairs: &Pairs| pairs.disk.statistics().prewritten;
    pairs.learn();
    assert_eq!(prewritten(&pairs), 0, "a buffered file");
    pairs.disk.layers()[0].image.prewrite(true);
    for _ in 0..40 {
        pairs.learn();
    }
    // Half a lot ahead at least, and two of them at most.
    pairs.rig.drain();
    let taken = 40 * LEARNED * CLUSTER;
    let spare = prewritten(&pairs).checked_sub(taken - 64 * CLUSTER);
    assert!(
        spare.is_some_and(|spare| spare < 256 * CLUSTER),
        "{spare:?}"
    );
    // No zeros came over what was written.
    for at in (0..pairs.at).step_by(CLUSTER as usize) {
        let read = pairs.rig.one(Op::Read, at, Vec::new(), 4096);
        assert_eq!(read, Ok(vec![7; 4096]), "at {at}");
    }
    pairs.rig.detach();
    pairs.disk.close().unwrap();
    drop(pairs.disk);
    let path = pairs.dir.path().join("pairs.qcow2");
    run("qemu-img", &["check", arg(&path)]);
}

#[test]
fn space_is_written_before_it_is_used_only_where_that_pays() {
    let prewritten = |options, cache, whole: bool| {
        let mut pairs = Pairs::cached(options, cache);
        for _ in 0..20 * LEARNED {
            match whole {
                false => pairs.write(false),
                true => {
                    let data = vec![7; CLUSTER as usize];
                    let wrote = one(&mut pairs.rig, Op::Write { fua: false }, pairs.at, data);
                    assert_eq!(wrote, Ok(()));
                    pairs.at += CLUSTER;
                }
            }
            pairs.flush();
        }
        pairs.rig.drain();
        pairs.disk.statistics().prewritten
    };
    let (asked, not) = (
        DiskOptions::default(),
        DiskOptions {
            prewrite: false,
            ..DiskOptions::default()
        },
    );
    // The files of this test are on the file system of the next one's.
    let file = tempfile::NamedTempFile::new_in(crate::common::dir().path().parent().unwrap());
    let options = io::OpenOptions {
        cache: Cache::None,
        ..io::OpenOptions::default()
    };
    let file = io::File::open(file.unwrap().path(), &options).unwrap();
    let there = file.has_unwritten_extents();
    assert_eq!(prewritten(asked, Cache::None, false) > 0, there);
    assert_eq!(
        prewritten(asked, Cache::None, true),
        0,
        "clusters are written whole"
    );
    assert_eq!(prewritten(asked, Cache::DirectUnsafe, false), 0);
    assert_eq!(prewritten(not, Cache::None, false), 0);
}

#[test]
fn a_write_that_ended_since_wants_another_commit() {
    let mut pairs = Pairs::new(DiskOptions::default());
    pairs.learn();
    // By the same queue, ...
    let counts = pairs.counts(|pairs| {
        pairs.write(false);
        pairs.write(false);
        pairs.flush();
    });
    assert_eq!((counts.0, counts.2), (2, 0));
    // ... and by another, before the flush comes: under way or over, the commit does not cover it.
    let mut other = Rig::new(&pairs.disk, EngineKind::IoUring, 16);
    for wait in [false, true] {
        pairs.learn();
        let counts = pairs.counts(|pairs| {
            pairs.write(false);
            if wait {
                pairs.rig.drain();
            }
            write(&mut other, 512 << 20, false);
            pairs.flush();
        });
        assert_eq!(counts, (2, 1, 0));
    }
    other.detach();
}

#[test]
fn a_flush_that_nothing_came_before_needs_no_commit() {
    let mut pairs = Pairs::new(DiskOptions::default());
    // What another process wrote before is not known: the first one is made.
    assert_eq!(pairs.counts(Pairs::flush), (1, 0, 0));
    assert_eq!(pairs.counts(Pairs::flush), (0, 0, 1));
    pairs.write(false);
    assert_eq!(pairs.counts(Pairs::flush), (1, 0, 0));
    // A durable write has its own; reads change nothing.
    assert_eq!(pairs.counts(|pairs| pairs.write(true)), (1, 0, 0));
    pairs.rig.one(Op::Read, 0, Vec::new(), 4096).expect("reads");
    assert_eq!(pairs.counts(Pairs::flush), (0, 0, 1));
    for op in [
        Op::Discard,
        Op::WriteZeroes {
            unmap: false,
            fast: false,
            fua: false,
        },
    ] {
        pairs.rig.one(op, 0, Vec::new(), CLUSTER).expect("ends");
        assert_eq!(pairs.counts(Pairs::flush), (1, 0, 0), "{op:?}");
    }
}

#[test]
fn who_stops_flushing_is_flushed_for_once() {
    let mut pairs = Pairs::new(DiskOptions::default());
    pairs.learn();
    let counts = pairs.counts(|pairs| {
        for _ in 0..100 {
            pairs.write(false);
        }
    });
    // The history has to pass what it knows: at each place of the pattern one.
    assert!((1..=4).contains(&counts.1), "{counts:?}");
}
