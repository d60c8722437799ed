//! The queue against a model: many requests in flight, in neighbouring parts of the same
//! clusters, over every kind of chain; and what qemu then makes of the image.

#[allow(dead_code)]
mod common;

use block::{GuestError, Op};
use common::{Random, Rig, arg, open, open_cached, qemu_content, qemu_create, run};
use disk::DiskOptions;
use image::Format;
use io::{Cache, EngineKind};
use std::{collections::HashMap, path::Path};

/// A request in flight and what it does to the model.
enum Effect {
    Read(u64, u64),
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

impl Effect {
    fn range(&self) -> (u64, u64) {
        match self {
            Effect::Read(at, len) | Effect::Zero(at, len) | Effect::Discard(at, len) => (*at, *len),
            Effect::Write(at, data) => (*at, data.len() as u64),
            Effect::Flush => (0, 0),
        }
    }
}

/// A thread's share of a disk: every `of`th unit, so that several meet in one cluster.
#[derive(Clone, Copy)]
struct Stripe {
    unit: u64,
    of: u64,
    index: u64,
}

impl Stripe {
    /// All of the disk.
    const WHOLE: Stripe = Stripe {
        unit: u64::MAX,
        of: 1,
        index: 0,
    };

    /// Where on the disk byte `at` of the share is.
    fn place(self, at: u64) -> u64 {
        if self.of == 1 {
            return at;
        }
        (at / self.unit * self.of + self.index) * self.unit + at % self.unit
    }

    /// Bytes from `at` to the end of its unit.
    fn left(self, at: u64) -> u64 {
        self.unit - at % self.unit
    }
}

/// What a disk holds.
struct Model {
    bytes: Vec<u8>,
    /// Sectors that were discarded: they read as before or as zeros, and stay with what
    /// they were first seen as.
    open: Vec<bool>,
}

impl Model {
    fn new(bytes: Vec<u8>) -> Self {
        let open = vec![false; bytes.len().div_ceil(512)];
        Self { bytes, open }
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        let at = at as usize;
        self.bytes[at..at + data.len()].copy_from_slice(data);
        self.open[at / 512..(at + data.len()).div_ceil(512)].fill(false);
    }

    fn discard(&mut self, at: u64, len: u64) {
        self.open[at as usize / 512..(at + len) as usize / 512].fill(true);
    }

    /// Where `got`, read at `at`, is something that it must not be.
    fn differs(&mut self, at: u64, got: &[u8]) -> Option<u64> {
        for (i, sector) in got.chunks(512).enumerate() {
            let from = at as usize + i * 512;
            let bytes = &mut self.bytes[from..from + sector.len()];
            let open = std::mem::take(&mut self.open[from / 512]);
            if open && sector.iter().all(|b| *b == 0) {
                bytes.fill(0);
            } else if bytes != sector {
                return Some(from as u64);
            }
        }
        None
    }
}

/// Runs `count` random requests with up to `depth` in flight that never overlap; `model` is what
/// the disk holds.
#[allow(clippy::too_many_arguments)]
fn storm(
    rig: &mut Rig,
    model: &mut Model,
    stripe: Stripe,
    seed: u64,
    count: u32,
    depth: usize,
    len_max: u64,
) {
    let size = model.len();
    let mut random = Random(seed);
    let mut running: HashMap<u64, Effect> = HashMap::new();
    let mut begun = 0;
    while begun < count || !running.is_empty() {
        let mut tries = 0;
        while begun < count && running.len() < depth && tries < 20 {
            tries += 1;
            let at = random.below(size / 512) * 512;
            let len = ((1 + random.below(len_max / 512)) * 512)
                .min(size - at)
                .min(stripe.left(at));
            let place = stripe.place(at);
            let overlaps = running.values().any(|e| {
                let (a, l) = e.range();
                at < a + l && a < at + len
            });
            if overlaps {
                continue;
            }
            let cut = [random.below(len) as usize];
            let (effect, tag) = match random.below(20) {
                0..7 => (
                    Effect::Read(at, len),
                    rig.submit(Op::Read, place, vec![], len, &cut),
                ),
                7..15 => {
                    let byte = 1 + random.below(255) as u8;
                    let data: Vec<u8> = (0..len).map(|i| byte ^ (i / 512) as u8).collect();
                    let fua = random.below(10) == 0;
                    let op = Op::Write { fua };
                    let tag = rig.submit(op, place, data.clone(), len, &cut);
                    (Effect::Write(at, data), tag)
                }
                15 | 16 => {
                    let op = Op::WriteZeroes {
                        unmap: random.below(2) == 0,
                        fast: false,
                        fua: false,
                    };
                    (
                        Effect::Zero(at, len),
                        rig.submit(op, place, vec![], len, &[]),
                    )
                }
                17 | 18 => (
                    Effect::Discard(at, len),
                    rig.submit(Op::Discard, place, vec![], len, &[]),
                ),
                _ => (Effect::Flush, rig.submit(Op::Flush, 0, vec![], 0, &[])),
            };
            running.insert(tag, effect);
            begun += 1;
        }
        for ended in rig.some() {
            ended.result.expect("succeeds");
            match running.remove(&ended.tag).expect("ours") {
                Effect::Read(at, len) => {
                    let differs = model.differs(at, &ended.buffer);
                    assert_eq!(differs, None, "read of {len:#x} at {at:#x}, seed {seed}");
                }
                Effect::Write(at, data) => model.write(at, &data),
                Effect::Zero(at, len) => model.write(at, &vec![0; len as usize]),
                Effect::Discard(at, len) => model.discard(at, len),
                Effect::Flush => {}
            }
        }
    }
}

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
            storm(
                &mut rig,
                &mut model,
                Stripe::WHOLE,
                seed + round,
                300,
                24,
                len_max,
            );
            rig.detach();
            disk.close().expect("closes");
            drop(disk);
            let name = format.to_string();
            if format != Format::Raw {
                run("qemu-img", &["check", "-q", "-f", &name, arg(path)]);
            }
            let content = qemu_content(path, &name);
            assert_eq!(content.len() as u64, model.len());
            let differs = model.differs(0, &content);
            assert_eq!(differs, None, "qemu reads other bytes, seed {seed}");
        }
    }
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; len];
    for sector in bytes.chunks_mut(512) {
        // Some of it zeros, as real images have.
        if random.below(3) > 0 {
            let word = random.next().to_le_bytes();
            for chunk in sector.chunks_mut(8) {
                chunk.copy_from_slice(&word[..chunk.len()]);
            }
        }
    }
    bytes
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
fn overlays_longer_and_shorter_than_their_base() {
    let dir = common::dir();
    for (index, (base_len, top_len, options)) in [
        (4 << 20, 4 << 20, "cluster_size=64k"),
        ((1 << 20) + 512 * 7, 4 << 20, "cluster_size=64k"),
        (4 << 20, (2 << 20) + 512 * 3, "cluster_size=16k"),
        (4 << 20, 4 << 20, "cluster_size=64k,compat=0.10"),
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
                storm(
                    &mut rig,
                    &mut model,
                    stripe,
                    seed + index,
                    1500,
                    16,
                    len_max,
                );
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
    for seed in [100, 200] {
        let path = dir.path().join(format!("{seed}.qcow2"));
        qemu_create(&path, "cluster_size=64k", Some((&base, "raw")), 12 << 20);
        threads_meet(&path, 12 << 20, 4096, 4096, seed, &bytes);
    }
}

#[test]
fn threads_reuse_what_others_freed() {
    let dir = common::dir();
    for (seed, options) in [
        (300, "cluster_size=4k"),
        (400, "cluster_size=4k,refcount_bits=1"),
    ] {
        let path = dir.path().join(format!("{seed}.qcow2"));
        qemu_create(&path, options, None, 3 << 20);
        threads_meet(&path, 3 << 20, 16 << 10, 16 << 10, seed, &[]);
    }
}
