//! What the steady state costs: no allocation, and at most one submission call per batch.

#[allow(dead_code)]
mod common;

use block::{GuestOffset, IoVec, Op};
use common::{Rig, open, open_cached, qemu_create};
use disk::{DiskOptions, Request};
use image::Format;
use io::{Cache, Engine, EngineKind, Events, Wait};
use std::path::Path;
use testkit::allocations::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

const DEPTH: usize = 32;

#[derive(Clone)]
#[repr(align(4096))]
struct Page([u8; 4096]);

/// Batches of `DEPTH` scattered 4 KiB requests; returns allocations and submission calls per batch
/// after a warm-up. A batch of flushes has a write before it: they need no commit otherwise.
fn measure(path: &Path, format: Format, kind: EngineKind, op: Op, batches: u64) -> (u64, f64) {
    // Aligned memory and O_DIRECT, as a guest's requests have and cache=none gives.
    let disk = open_cached(path, format, DiskOptions::default(), Cache::None);
    let mut rig = Rig::new(&disk, kind, DEPTH as u16);
    let mut buffers = vec![Page([7u8; 4096]); DEPTH];
    let iov: Vec<IoVec> = buffers
        .iter_mut()
        .map(|b| IoVec::from_mut(&mut b.0))
        .collect();
    let mut queue = rig.queue.take().expect("attached");
    let engine = &mut *rig.engine;
    let mut events = Events::default();
    let mut batch_of = |engine: &mut dyn Engine, number: u64, op: Op, count: usize| {
        for (tag, piece) in iov.iter().take(count).enumerate() {
            // Scattered, so that nothing merges.
            let at = ((number * 37 + tag as u64 * 211) % 1000) * 8192;
            let request = Request {
                op,
                at: GuestOffset(at),
                len: if op == Op::Flush { 0 } else { 4096 },
                iov: piece,
                iov_len: u32::from(op.has_data()),
                tag: tag as u64,
                arrived_ns: 0,
                seen_ns: disk::now_ns(),
                parsed_ns: 0,
            };
            // SAFETY: buffers and pieces outlive the loop below, which waits for every `Done`.
            let taken = unsafe { queue.submit(engine, request) };
            assert!(taken.is_ok());
        }
        let mut left = count;
        loop {
            queue.advance(engine);
            while let Some(done) = queue.done() {
                done.result.expect("succeeds");
                left -= 1;
            }
            if left == 0 {
                break;
            }
            engine.turn(Wait::Forever, &mut events).expect("a turn");
            for completion in events.completions.drain(..) {
                queue.completed(engine, &completion);
            }
            events.ready.clear();
        }
    };
    let mut batch = |engine: &mut dyn Engine, number: u64| {
        if op == Op::Flush {
            batch_of(engine, number, Op::Write { fua: false }, 1);
        }
        batch_of(engine, number, op, DEPTH);
    };
    for number in 0..64 {
        batch(engine, number);
    }
    // The least of some rounds: a pool that starts a thread, or a table that grows to its
    // bound, does so once; what each batch costs shows in every round.
    let round = |batch: &mut dyn FnMut(&mut dyn Engine, u64), engine: &mut dyn Engine| {
        let before = ALLOCATOR.count();
        for number in 0..batches {
            batch(engine, number);
        }
        ALLOCATOR.count() - before
    };
    let allocations = (0..5)
        .map(|_| round(&mut batch, engine))
        .min()
        .unwrap_or(u64::MAX);
    let calls_before = engine.counters().submit_calls;
    for number in 0..batches {
        batch(engine, number);
    }
    let calls = engine.counters().submit_calls - calls_before;
    while queue.is_busy() {
        engine.turn(Wait::Forever, &mut events).expect("a turn");
        for completion in events.completions.drain(..) {
            queue.completed(engine, &completion);
        }
        queue.advance(engine);
    }
    queue.detach(engine);
    disk.close().expect("closes");
    (allocations, calls as f64 / batches as f64)
}

#[test]
fn nothing_is_allocated_and_a_batch_is_one_call() {
    let dir = common::dir();
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, vec![1; 8 << 20]).unwrap();
    let qcow2 = dir.path().join("disk.qcow2");
    qemu_create(&qcow2, "cluster_size=64k", None, 8 << 20);
    let subclusters = dir.path().join("subclusters.qcow2");
    let options = "cluster_size=64k,extended_l2=on";
    qemu_create(&subclusters, options, None, 8 << 20);
    let qed = dir.path().join("disk.qed");
    common::run(
        "qemu-img",
        &["create", "-q", "-f", "qed", common::arg(&qed), "8M"],
    );
    let vhd = dir.path().join("disk.vhd");
    common::run(
        "qemu-img",
        &["create", "-q", "-f", "vpc", common::arg(&vhd), "8M"],
    );
    let vdi = dir.path().join("disk.vdi");
    common::run(
        "qemu-img",
        &["create", "-q", "-f", "vdi", common::arg(&vdi), "8M"],
    );
    for (path, format) in [
        (&qcow2, Format::Qcow2),
        (&subclusters, Format::Qcow2),
        (&qed, Format::Qed),
        (&vhd, Format::Vhd),
        (&vdi, Format::Vdi),
    ] {
        let disk = open(path, format, DiskOptions::default());
        let mut rig = Rig::new(&disk, EngineKind::Threads, 4);
        let write = Op::Write { fua: false };
        for at in (0..8 << 20).step_by(1 << 20) {
            rig.one(write, at, vec![3; 1 << 20], 1 << 20).unwrap();
        }
        rig.detach();
        disk.close().unwrap();
    }
    for (path, format) in [
        (&raw, Format::Raw),
        (&qcow2, Format::Qcow2),
        (&subclusters, Format::Qcow2),
        (&qed, Format::Qed),
        (&vhd, Format::Vhd),
        (&vdi, Format::Vdi),
    ] {
        for kind in [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring] {
            for op in [Op::Read, Op::Write { fua: false }, Op::Flush] {
                let (allocations, calls) = measure(path, format, kind, op, 50);
                let what = format!("{op:?} of {} with {kind}", path.display());
                assert_eq!(allocations, 0, "{what} allocates");
                // io_uring is handed a batch of 32 in 7 parts, so that the device can begin; flushes have their write.
                let parts = match (kind, op) {
                    (EngineKind::IoUring, _) => 7.0,
                    (_, Op::Flush) => 2.0,
                    _ => 1.0,
                };
                assert!(calls <= parts, "{what}: {calls} submission calls per batch");
            }
        }
    }
}
