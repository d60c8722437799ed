//! The queue against a model: many requests in flight, in neighbouring parts of the same
//! clusters, over every kind of chain; and what qemu then makes of the image.

use crate::common;

use block::{GuestError, Op};
use common::{
    Rig, arg,
    model::Model,
    open, open_cached, pattern, qemu_content, qemu_create, run,
    storm::{Storm, Stripe},
};
use disk::DiskOptions;
use image::Format;
use io::{Cache, EngineKind};
use std::path::Path;

/// A storm, a close, qemu's opinion, and a second storm on the reopened image.
fn torture(path: &Path, format: Format, bytes: Vec<u8>, seed: u64, len_max: u64) {
    let mut model = Model::new(bytes);
    for round in 0..2 {
        for kind in [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring] {
            // Linux AIO is for O_DIRECT, which the unaligned memory of these requests makes
            // the engine bounce.
            let cache = match kind {
                EngineKind::Native => Cache::None,
                _ => Cache::Writeback,
            };
            let disk = open_cached(path, format, DiskOptions::default(), cache);
            let mut rig = Rig::new(&disk, kind, 64);
            let storm = Storm {
                seed: seed + round,
                len_max,
                ..Storm::default()
            };
            storm.run(&mut rig, &mut model);
            rig.detach();
            disk.close().expect("closes");
            drop(disk);
            let name = format.qemu_name();
            // QEMU checks no VHD image.
            if !matches!(format, Format::Raw | Format::Vhd) {
                run("qemu-img", &["check", "-q", "-f", name, arg(path)]);
            }
            let content = qemu_content(path, name);
            assert_eq!(content.len() as u64, model.len());
            let differs = model.differs(0, &content);
            assert_eq!(differs, None, "qemu reads other bytes, seed {seed}");
        }
    }
}

#[test]
fn raw() {
    let dir = common::dir();
    let path = dir.path().join("disk.raw");
    let model = pattern(4 << 20, 3);
    std::fs::write(&path, &model).unwrap();
    torture(&path, Format::Raw, model, 1, 64 << 10);
}

#[test]
fn qcow2_of_every_cluster_size() {
    let dir = common::dir();
    for (index, options) in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=64k",
        "cluster_size=64k,compat=0.10",
        "cluster_size=2M,refcount_bits=64",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=2M,extended_l2=on",
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("{index}.qcow2"));
        qemu_create(&path, options, None, 8 << 20);
        torture(
            &path,
            Format::Qcow2,
            vec![0; 8 << 20],
            11 + index as u64,
            200 << 10,
        );
    }
}

#[test]
fn qed_alone_and_over_others() {
    let dir = common::dir();
    let base = dir.path().join("base.raw");
    let bytes = pattern((1 << 20) + 512 * 7, 5);
    std::fs::write(&base, &bytes).unwrap();
    let middle = dir.path().join("middle.qcow2");
    qemu_create(&middle, "", Some((&base, "raw")), 3 << 20);
    for (index, (options, below)) in [
        ("cluster_size=4k,table_size=2", None),
        ("cluster_size=64k,table_size=4", Some((&middle, "qcow2"))),
    ]
    .into_iter()
    .enumerate()
    {
        let top = dir.path().join(format!("{index}.qed"));
        let mut args = vec!["create", "-q", "-f", "qed", "-o", options];
        let mut model = Vec::new();
        if let Some((below, format)) = below {
            args.extend(["-b", arg(below), "-F", format]);
            model.clone_from(&bytes);
        }
        args.extend([arg(&top), "5M"]);
        run("qemu-img", &args);
        model.resize(5 << 20, 0);
        torture(&top, Format::Qed, model, 71 + index as u64, 150 << 10);
    }
}

#[test]
fn vhd() {
    let dir = common::dir();
    let alone = dir.path().join("alone.vhd");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "vpc",
            "-o",
            "force_size=on",
            arg(&alone),
            "5M",
        ],
    );
    torture(&alone, Format::Vhd, vec![0; 5 << 20], 81, 150 << 10);
}

#[test]
fn vdi() {
    let dir = common::dir();
    let path = dir.path().join("disk.vdi");
    run("qemu-img", &["create", "-q", "-f", "vdi", arg(&path), "5M"]);
    torture(&path, Format::Vdi, vec![0; 5 << 20], 91, 150 << 10);
}

#[test]
fn overlays_longer_and_shorter_than_their_base() {
    let dir = common::dir();
    for (index, (base_len, top_len, options)) in [
        (4 << 20, 4 << 20, "cluster_size=64k"),
        ((1 << 20) + 512 * 7, 4 << 20, "cluster_size=64k"),
        (4 << 20, (2 << 20) + 512 * 3, "cluster_size=16k"),
        (4 << 20, 4 << 20, "cluster_size=64k,compat=0.10"),
        (4 << 20, 4 << 20, "cluster_size=64k,extended_l2=on"),
        (
            (1 << 20) + 512 * 7,
            (2 << 20) + 512 * 3,
            "cluster_size=16k,extended_l2=on",
        ),
        (
            (4 << 20) + 512,
            4 << 20,
            "cluster_size=2M,extended_l2=on,refcount_bits=64",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let base = dir.path().join(format!("base{index}.raw"));
        let middle = dir.path().join(format!("middle{index}.qcow2"));
        let top = dir.path().join(format!("top{index}.qcow2"));
        let bytes = pattern(base_len, 5);
        std::fs::write(&base, &bytes).unwrap();
        qemu_create(
            &middle,
            "cluster_size=4k",
            Some((&base, "raw")),
            base_len as u64,
        );
        qemu_create(&top, options, Some((&middle, "qcow2")), top_len as u64);
        let mut model = bytes;
        model.resize(top_len, 0);
        torture(&top, Format::Qcow2, model, 31 + index as u64, 150 << 10);
    }
}

#[test]
fn compressed_images_are_read_and_overwritten() {
    let dir = common::dir();
    for compression in ["zlib", "zstd"] {
        let flat = dir.path().join("flat.raw");
        let path = dir.path().join(format!("{compression}.qcow2"));
        let model = pattern(4 << 20, 8);
        std::fs::write(&flat, &model).unwrap();
        let option = format!("compression_type={compression}");
        run(
            "qemu-img",
            &[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &option,
                arg(&flat),
                arg(&path),
            ],
        );
        torture(&path, Format::Qcow2, model, 51, 150 << 10);
    }
}

#[test]
fn what_cannot_be_done_is_refused() {
    let dir = common::dir();
    let path = dir.path().join("disk.qcow2");
    qemu_create(&path, "", None, 1 << 20);
    let disk = open(&path, Format::Qcow2, DiskOptions::default());
    let mut rig = Rig::new(&disk, EngineKind::Threads, 4);
    let write = Op::Write { fua: false };
    let refused = Err(GuestError::Invalid);
    assert_eq!(rig.one(write, 1 << 20, vec![1; 512], 512), refused);
    assert_eq!(rig.one(write, u64::MAX - 100, vec![1; 512], 512), refused);
    assert_eq!(rig.one(Op::Read, (1 << 20) - 512, vec![], 1024), refused);
    assert_eq!(rig.one(Op::Discard, 512, vec![], 1 << 20), refused);
    assert_eq!(rig.one(Op::Read, 1 << 20, vec![], 0), Ok(vec![]));
    rig.detach();
    disk.close().unwrap();
    drop(disk);

    let read_only = DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    };
    let disk = open(&path, Format::Qcow2, read_only);
    let mut rig = Rig::new(&disk, EngineKind::Threads, 4);
    let refused = Err(GuestError::ReadOnly);
    assert_eq!(rig.one(write, 0, vec![1; 512], 512), refused);
    assert_eq!(rig.one(Op::Discard, 0, vec![], 512), refused);
    assert_eq!(rig.one(Op::Flush, 0, vec![], 0), Ok(vec![]));
    assert_eq!(rig.one(Op::Read, 0, vec![], 512), Ok(vec![0; 512]));
    rig.detach();
    disk.close().unwrap();
}

/// Several threads, each with a queue of its own, in alternating units of the same disk.
fn threads_meet(path: &Path, size: u64, unit: u64, len_max: u64, seed: u64, base: &[u8]) {
    const THREADS: u64 = 3;
    let disk = open(path, Format::Qcow2, DiskOptions::default());
    let share = size / THREADS / unit * unit;
    let models: Vec<Model> = std::thread::scope(|scope| {
        let run = |index: u64| {
            let disk = &disk;
            move || {
                let stripe = Stripe {
                    unit,
                    of: THREADS,
                    index,
                };
                let bytes = (0..share)
                    .map(|at| base.get(stripe.place(at) as usize).copied().unwrap_or(0))
                    .collect();
                let mut model = Model::new(bytes);
                let mut rig = Rig::new(disk, EngineKind::IoUring, 32);
                let storm = Storm {
                    stripe,
                    seed: seed + index,
                    count: 1500,
                    depth: 16,
                    len_max,
                    ..Storm::default()
                };
                storm.run(&mut rig, &mut model);
                rig.detach();
                model
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|index| scope.spawn(run(index))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    disk.close().expect("closes");
    drop(disk);
    run("qemu-img", &["check", "-q", "-f", "qcow2", arg(path)]);
    let content = qemu_content(path, "qcow2");
    for (index, mut model) in models.into_iter().enumerate() {
        let stripe = Stripe {
            unit,
            of: THREADS,
            index: index as u64,
        };
        let got: Vec<u8> = (0..model.len())
            .map(|at| content[stripe.place(at) as usize])
            .collect();
        assert_eq!(model.differs(0, &got), None, "thread {index}, seed {seed}");
    }
}

#[test]
fn threads_write_into_the_same_clusters() {
    let dir = common::dir();
    let base = dir.path().join("base.raw");
    let bytes = pattern(12 << 20, 9);
    std::fs::write(&base, &bytes).unwrap();
    for (seed, options) in [
        (100, "cluster_size=64k"),
        (200, "cluster_size=64k"),
        (110, "cluster_size=64k,extended_l2=on"),
        (120, "cluster_size=256k,extended_l2=on"),
    ] {
        let path = dir.path().join(format!("{seed}.qcow2"));
        qemu_create(&path, options, Some((&base, "raw")), 12 << 20);
        threads_meet(&path, 12 << 20, 4096, 4096, seed, &bytes);
    }
}

#[test]
fn threads_reuse_what_others_freed() {
    let dir = common::dir();
    for (seed, options) in [
        (300, "cluster_size=4k"),
        (400, "cluster_size=4k,refcount_bits=1"),
        (500, "cluster_size=16k,extended_l2=on"),
    ] {
        let path = dir.path().join(format!("{seed}.qcow2"));
        qemu_create(&path, options, None, 3 << 20);
        threads_meet(&path, 3 << 20, 16 << 10, 16 << 10, seed, &[]);
    }
}

#[test]
fn neighbours_that_arrive_together_copy_what_they_leave_only() {
    const CLUSTER: u64 = 64 << 10;
    const BLOCK: u64 = 4 << 10;
    let dir = common::dir();
    let base = dir.path().join("base.raw");
    let mut model: Vec<u8> = (0..4 * CLUSTER).map(|at| (at / BLOCK) as u8 + 1).collect();
    std::fs::write(&base, &model).unwrap();
    let path = dir.path().join("top.qcow2");
    qemu_create(&path, "", Some((&base, "raw")), 4 * CLUSTER);
    let disk = open(&path, Format::Qcow2, DiskOptions::default());
    let mut rig = Rig::new(&disk, EngineKind::Threads, 64);
    let mut begun = false;
    let mut write = |blocks: Vec<u64>| {
        let before = disk.statistics();
        for block in blocks {
            let at = block * BLOCK;
            let data = vec![block as u8 ^ 0xff; BLOCK as usize];
            model[at as usize..(at + BLOCK) as usize].copy_from_slice(&data);
            rig.submit(Op::Write { fua: false }, at, data, BLOCK, &[]);
        }
        begun |= rig.queue().must_advance();
        assert!(rig.drain().iter().all(|ended| ended.result.is_ok()));
        let after = disk.statistics();
        (after.copies - before.copies, after.joins - before.joins)
    };
    // The table's first use reads it, and who waits for that is not in time for the others: the
    // first cluster alone.
    write(vec![3]);
    assert_eq!(write((16..32).collect()), (0, 15), "a whole cluster");
    assert_eq!(write(vec![40, 33, 47, 36]), (1, 3), "parts of one");
    assert_eq!(write(vec![48, 34, 63]), (1, 1), "one is there already");
    assert!(
        begun,
        "whoever slept before the next step would leave an open allocation unwritten"
    );
    rig.detach();
    disk.close().unwrap();
    drop(disk);
    run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
    assert!(
        qemu_content(&path, "qcow2") == model,
        "qemu reads other bytes"
    );
}

/// Writes sectors in one turn; how often the engine was handed something before the turn's end, and how
/// many joined an allocation.
fn before_the_end(
    rig: &mut Rig,
    disk: &disk::Disk,
    sectors: impl Iterator<Item = u64>,
) -> (u64, u64) {
    let (joins, calls) = (disk.statistics().joins, rig.engine.counters().submit_calls);
    for sector in sectors {
        let data = vec![sector as u8; 512];
        rig.submit(Op::Write { fua: false }, sector * 512, data, 512, &[]);
    }
    let early = rig.engine.counters().submit_calls - calls;
    assert!(rig.drain().iter().all(|ended| ended.result.is_ok()));
    (early, disk.statistics().joins - joins)
}

#[test]
fn a_long_turn_starts_before_its_end_unless_its_writes_belong_together() {
    /// Sectors of a cluster.
    const CLUSTER: u64 = 8;
    let dir = common::dir();
    for kind in [EngineKind::Threads, EngineKind::IoUring] {
        let path = dir.path().join(format!("{kind}.qcow2"));
        qemu_create(&path, "cluster_size=4k", None, 512 << 20);
        let disk = open(&path, Format::Qcow2, DiskOptions::default());
        let mut rig = Rig::new(&disk, kind, 64);
        let mut write =
            |sectors: &mut dyn Iterator<Item = u64>| before_the_end(&mut rig, &disk, sectors);
        // The table, and space enough that nobody waits for more.
        for first in (4096..4352).step_by(64) {
            write(&mut (first..first + 64).map(|cluster| cluster * CLUSTER));
        }
        let mut scattered = (1..33).map(|cluster| cluster * CLUSTER);
        assert_eq!(write(&mut scattered), (4, 0), "{kind}: by eights");
        // Writers in turn, each in a cluster of its own: they come too late, but once.
        let mut writers =
            |first: u64| write(&mut (0..64).map(|n| (first + n % 16) * CLUSTER + n / 16));
        let (early, joined) = writers(100);
        assert!(early > 0 && joined < 48, "{kind}: {early} {joined}");
        assert_eq!(writers(200), (0, 48), "{kind}: one write for each cluster");
        // And it takes some that nobody joins.
        let scattered = |first: u64| (first..first + 60).map(|cluster| cluster * CLUSTER);
        assert_eq!(write(&mut scattered(300)).0, 0, "{kind}");
        let (early, _) = write(&mut scattered(400));
        assert!(early >= 6, "{kind}: by eights again: {early}");
        rig.detach();
        disk.close().unwrap();
        drop(disk);
        run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
    }
}
