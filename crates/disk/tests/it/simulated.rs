//! The queue over a simulated disk: operations that fail. (Crashes: crate `crash`.)
//!
//! A failure prints its seed; every run is decided by it.

use crate::common;

use block::{Op, Storage};
use common::{Rig, arg, model::Model, qemu_create, storm::Storm};
use disk::{Chain, Disk, DiskOptions, Layer, blocking::Driver};
use image::{
    Format,
    qcow2::{self, Qcow2},
};
use io::{EngineKind, Fault, FaultOp, File, SimDisk, SimOptions};
use std::{path::Path, process::Command, sync::Arc};

/// As in errno(3).
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

const SIZE: u64 = 4 << 20;

/// A simulated disk that holds a fresh qcow2 image.
fn image(dir: &Path, options: &str, seed: u64) -> Arc<SimDisk> {
    let path = dir.join("fresh.qcow2");
    qemu_create(&path, options, None, SIZE);
    let bytes = std::fs::read(&path).expect("the image");
    let options = SimOptions {
        seed,
        ..SimOptions::default()
    };
    SimDisk::from_bytes(options, &bytes)
}

fn chain(sim: &Arc<SimDisk>) -> Chain {
    let file = File::sim(Arc::clone(sim)).expect("a file");
    let image = Qcow2::open(&*file, &qcow2::OpenOptions::default()).expect("the image opens");
    Chain::new(
        vec![Layer {
            image: Arc::new(image),
            files: vec![file],
            path: "sim".into(),
            format: Format::Qcow2,
            part: None,
        }],
        false,
    )
}

fn rig(sim: &Arc<SimDisk>) -> (Arc<Disk>, Rig) {
    let disk = Disk::new(chain(sim), DiskOptions::default()).expect("the disk");
    let rig = Rig::new(&disk, EngineKind::Sim, 64);
    (disk, rig)
}

/// What the disk holds, read by the blocking driver.
fn content(sim: &Arc<SimDisk>) -> Vec<u8> {
    let mut driver: Driver = chain(sim).driver().expect("a driver");
    let mut bytes = vec![0; SIZE as usize];
    driver.read(0, &mut bytes).expect("reads");
    bytes
}

/// The file as qemu-img check finds it: nothing but leaks.
fn check(dir: &Path, sim: &Arc<SimDisk>, what: &str) {
    let path = dir.join("checked.qcow2");
    let mut bytes = vec![0; Storage::len(&**sim).expect("a length") as usize];
    sim.read_at(0, &mut bytes).expect("reads");
    std::fs::write(&path, &bytes).expect("a copy");
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", arg(&path)])
        .output()
        .expect("qemu-img runs");
    // 3 is leaked clusters, nothing worse.
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "{what}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_failing_host_fails_requests_and_nothing_else() {
    let dir = common::dir();
    for (seed, options, op, errno) in [
        (1, "cluster_size=64k", FaultOp::Read, EIO),
        (2, "cluster_size=4k", FaultOp::Write, EIO),
        (3, "cluster_size=64k,refcount_bits=1", FaultOp::Write, EIO),
        (4, "cluster_size=512", FaultOp::Range, ENOSPC),
        (5, "cluster_size=16k", FaultOp::Write, ENOSPC),
        (6, "cluster_size=16k,extended_l2=on", FaultOp::Write, EIO),
        (7, "cluster_size=2M,extended_l2=on", FaultOp::Write, EIO),
        (8, "cluster_size=64k,extended_l2=on", FaultOp::Range, ENOSPC),
    ] {
        let sim = image(dir.path(), options, seed);
        let mut model = Model::new(vec![0; SIZE as usize]);
        let (disk, mut rig) = rig(&sim);
        for round in 0..4 {
            sim.inject(Fault {
                per_mille: 60,
                ..Fault::always(op, errno)
            });
            let storm = Storm {
                seed: seed * 100 + round,
                faults: true,
                ..Storm::default()
            };
            storm.run(&mut rig, &mut model);
            sim.heal();
            // Well again: everything succeeds, and reads as it must.
            let storm = Storm {
                seed: seed * 100 + 50 + round,
                count: 100,
                ..Storm::default()
            };
            storm.run(&mut rig, &mut model);
            rig.one(Op::Flush, 0, vec![], 0).expect("flushes");
        }
        rig.detach();
        disk.close().expect("closes");
        drop(disk);
        assert_eq!(model.differs(0, &content(&sim)), None, "seed {seed}");
        check(dir.path(), &sim, &format!("seed {seed}"));
    }
}

#[test]
fn a_failed_sync_fails_every_later_flush() {
    // What a failed fdatasync did not write may be gone from the page cache: no later one
    // makes it durable, so none may say so.
    let dir = common::dir();
    let sim = image(dir.path(), "", 6);
    let (disk, mut rig) = rig(&sim);
    let write = Op::Write { fua: false };
    rig.one(write, 0, vec![5; 4096], 4096).expect("writes");
    sim.inject(Fault {
        count: 1,
        ..Fault::always(FaultOp::Sync, EIO)
    });
    assert!(rig.one(Op::Flush, 0, vec![], 0).is_err());
    sim.heal();
    assert!(rig.one(Op::Flush, 0, vec![], 0).is_err());
    let read = rig.one(Op::Read, 0, vec![], 4096).expect("reads");
    assert_eq!(read, vec![5; 4096]);
    rig.detach();
    assert!(disk.close().is_err());
}

#[test]
fn a_full_disk_stops_writes_and_damages_nothing() {
    let dir = common::dir();
    let fresh = image(dir.path(), "cluster_size=64k", 9);
    let mut bytes = vec![0; Storage::len(&*fresh).expect("a length") as usize];
    fresh.read_at(0, &mut bytes).expect("reads");
    let options = SimOptions {
        seed: 9,
        size_max: 2 << 20,
        ..SimOptions::default()
    };
    let sim = SimDisk::from_bytes(options, &bytes);
    let mut model = Model::new(vec![0; SIZE as usize]);
    let (disk, mut rig) = rig(&sim);
    let storm = Storm {
        seed: 9,
        count: 600,
        faults: true,
        ..Storm::default()
    };
    storm.run(&mut rig, &mut model);
    let errors: u64 = disk.statistics().operations.iter().map(|o| o.errors).sum();
    assert!(errors > 0, "2 MiB are too few for this storm");
    rig.detach();
    disk.close().expect("closes");
    drop(disk);
    assert_eq!(model.differs(0, &content(&sim)), None);
    check(dir.path(), &sim, "after ENOSPC");
}
