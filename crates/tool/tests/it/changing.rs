//! Resizing and amending, cut off by a crash or an error at every step: the disk is then what it was or what
//! it was to be, and nothing worse than leaks is left.

use crate::common;

use block::Storage;
use common::{KINDS, Kind, check_with, make, qemu_check};
use crash::Random;
use crash::states::{Bounds, Moment, StateId, moments};
use disk::blocking::{Driver, Member};
use image::Format;
use image::qcow2::{AmendOptions, OpenOptions, Qcow2, amend, downgrade};
use io::{Fault, FaultOp, SimDisk, SimOptions};
use std::fs;
use std::sync::Arc;
use testkit::{TempDir, qemu};
use tool::check::Repair;
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};

const MIB: u64 = 1 << 20;
/// States of each case, about.
const STATES: usize = 30;

fn member(sim: &Arc<SimDisk>, read_only: bool) -> block::Result<Member> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    Ok(Member {
        image: Arc::new(Qcow2::open(&**sim, &options)?),
        files: vec![Arc::clone(sim) as Arc<dyn Storage>],
    })
}

fn guest(sim: &Arc<SimDisk>) -> Vec<u8> {
    let mut driver = Driver::new(vec![member(sim, true).expect("opens")], true).expect("drives");
    let mut bytes = vec![0; driver.size() as usize];
    driver.read(0, &mut bytes).expect("reads");
    bytes
}

/// A change of an image.
#[derive(Clone, Copy, Debug)]
enum Change {
    Resize(u64, Preallocation),
    Amend {
        version: Option<u32>,
        refcount_bits: Option<u32>,
    },
}

impl Change {
    fn make(self, sim: &Arc<SimDisk>) -> block::Result<()> {
        match self {
            Change::Resize(size, preallocation) => {
                let options = ResizeOptions {
                    size,
                    shrink: true,
                    preallocation,
                };
                let members = [member(sim, false)?];
                resize(&members, Format::Qcow2, &options).map(drop)
            }
            Change::Amend {
                version,
                refcount_bits,
            } => {
                let options = AmendOptions {
                    version,
                    refcount_bits,
                    ..AmendOptions::default()
                };
                amend(&**sim, "sim", &options)?;
                match version {
                    Some(2) => downgrade(&**sim, "sim"),
                    _ => Ok(()),
                }
            }
        }
    }

    fn size(self, old: u64) -> u64 {
        match self {
            Change::Resize(size, _) => size,
            Change::Amend { .. } => old,
        }
    }
}

/// An image of `size` MiB, made with `options`, with so many snapshots.
fn kind(options: &'static str, size: u64, snapshots: u32) -> Kind {
    Kind {
        options,
        size,
        snapshots,
        ..KINDS[0]
    }
}

fn cases() -> Vec<(Kind, Change)> {
    use Preallocation::{Metadata, Off};
    let amended = |version, refcount_bits| Change::Amend {
        version,
        refcount_bits,
    };
    let small = kind("cluster_size=512", 1, 0);
    let pages = kind("cluster_size=4k", 2, 0);
    let shared = kind("cluster_size=4k", 2, 2);
    let packed = Kind {
        compressed: true,
        ..kind("cluster_size=16k", 2, 0)
    };
    vec![
        (pages, Change::Resize(9 * MIB, Off)),
        (small, Change::Resize(2 * MIB + 512, Off)),
        (small, Change::Resize(MIB + 100 * 1024, Metadata)),
        (
            kind("extended_l2=on,cluster_size=16k", 1, 0),
            Change::Resize(2 * MIB, Metadata),
        ),
        (shared, Change::Resize(MIB - 512, Off)),
        (small, Change::Resize(512, Off)),
        (packed, Change::Resize(MIB, Off)),
        (
            kind("compat=0.10,cluster_size=4k", 2, 2),
            amended(Some(3), None),
        ),
        (shared, amended(Some(2), None)),
        (pages, amended(Some(2), None)),
        (small, amended(None, Some(64))),
        (shared, amended(None, Some(2))),
        (
            kind("refcount_bits=64,cluster_size=512", 1, 0),
            amended(None, Some(1)),
        ),
    ]
}

/// The disk reads as before or as it was to be, and its image has no errors.
fn judge(dir: &TempDir, what: &str, sim: &Arc<SimDisk>, old: &[u8], new: u64, ask_qemu: bool) {
    let report = check_with(&**sim, Repair::No).unwrap_or_else(|e| panic!("{what}: {e}"));
    let errors = (report.corruptions, report.check_errors);
    assert_eq!(errors, (0, 0), "{what}: {:?}", report.findings);
    let found = guest(sim);
    let len = found.len() as u64;
    assert!(len == old.len() as u64 || len == new, "{what}: {len} bytes");
    let kept = found.len().min(old.len());
    assert!(found[..kept] == old[..kept], "{what}: guest data");
    assert!(found[kept..].iter().all(|b| *b == 0), "{what}: new part");
    if ask_qemu {
        let mut bytes = vec![0; Storage::len(&**sim).expect("a length") as usize];
        sim.read_at(0, &mut bytes).expect("reads");
        let image = dir.path("crashed.qcow2");
        fs::write(&image, bytes).expect("writes");
        let verdict = qemu_check(&image, "").expect("qemu-img ends");
        let errors = (verdict.corruptions, verdict.check_errors);
        assert_eq!(errors, (0, 0), "{what}: {}", verdict.messages);
    }
}

fn each(mut with: impl FnMut(&TempDir, &str, Change, &[u8], &[u8])) {
    let dir = TempDir::new();
    for (kind, change) in cases() {
        let image = make(&dir, &kind, 7);
        let raw = dir.path("guest.raw");
        qemu::convert("qcow2", &image, "raw", &raw);
        let old = fs::read(&raw).expect("reads");
        let bytes = fs::read(&image).expect("reads");
        with(
            &dir,
            &format!("{}, {change:?}", kind.options),
            change,
            &bytes,
            &old,
        );
    }
}

fn simulated(bytes: &[u8], seed: u64) -> Arc<SimDisk> {
    let options = SimOptions {
        seed,
        ..SimOptions::default()
    };
    SimDisk::from_bytes(options, bytes)
}

/// States that crashes may leave of what was done to a disk: some of each moment.
fn each_crash(sim: &Arc<SimDisk>, mut each: impl FnMut(usize, StateId, &Arc<SimDisk>)) {
    let disks = [Arc::clone(sim)];
    let moments = moments(&disks);
    let share = (STATES / moments.len().max(1)).max(2);
    let mut nth = 0;
    for (number, at) in moments.into_iter().enumerate() {
        let moment = Moment::new(&disks, at);
        let mut random = Random::new(1, number as u64);
        let states = moment.states(&Bounds::FAST, &mut random);
        let step = states.len().div_ceil(share).max(1);
        for (state, keep) in states.iter().enumerate().step_by(step) {
            let id = StateId {
                moment: number,
                state,
            };
            each(nth, id, &moment.disks(keep)[0]);
            nth += 1;
        }
    }
}

#[test]
fn a_crash_leaves_the_disk_old_or_new() {
    each(|dir, what, change, bytes, old| {
        let sim = simulated(bytes, 1);
        change.make(&sim).unwrap_or_else(|e| panic!("{what}: {e}"));
        let new = change.size(old.len() as u64);
        judge(dir, what, &sim, old, new, true);
        assert_eq!(guest(&sim).len() as u64, new, "{what}");
        let report = check_with(&*sim, Repair::No).expect("checks");
        assert_eq!(report.leaks, 0, "{what}: {:?}", report.findings);
        each_crash(&sim, |nth, state, crashed| {
            let what = format!("{what}: crash state {state}");
            judge(dir, &what, crashed, old, new, nth.is_multiple_of(11));
        });
    });
}

#[test]
fn a_failure_leaves_the_disk_old_or_new() {
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;
    each(|dir, what, change, bytes, old| {
        let new = change.size(old.len() as u64);
        for (op, errno) in [
            (FaultOp::Write, EIO),
            (FaultOp::Sync, EIO),
            (FaultOp::Range, ENOSPC),
        ] {
            for skip in [0, 1, 3, 6, 11] {
                let sim = simulated(bytes, skip);
                sim.inject(Fault {
                    skip,
                    ..Fault::always(op, errno)
                });
                let done = change.make(&sim);
                sim.heal();
                let what = format!("{what}: {op:?} fails from {skip} on: {:?}", done.is_ok());
                judge(dir, &what, &sim, old, new, false);
                if done.is_ok() {
                    break;
                }
            }
        }
    });
}
