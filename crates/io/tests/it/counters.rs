//! One submission call per batch (or part of a long one), none when idle; neighbours merge; errors do not spread.

use crate::common;

use common::{HANG, Piece, Rig, SETUPS, pattern, scratch};
use io::{
    Alignment, Cache, Counters, EngineKind, Fault, FaultOp, File, IoOp, SimDisk, SimOptions, Wait,
};

fn difference(now: Counters, before: Counters) -> Counters {
    Counters {
        staged: now.staged - before.staged,
        issued: now.issued - before.issued,
        submit_calls: now.submit_calls - before.submit_calls,
        wait_calls: now.wait_calls - before.wait_calls,
        bounced: now.bounced - before.bounced,
        syncs: now.syncs - before.syncs,
    }
}

#[test]
fn a_push_submits_what_is_staged_and_collects_nothing() {
    for setup in SETUPS {
        let (_dir, mut rig, slot) = setup.begin();
        rig.write(slot, 0, &pattern(1, 1 << 20));
        rig.finish_ok();
        let before = rig.engine.counters();
        rig.engine.push();
        for (pushes, begin) in [(1, 0), (2, 8)] {
            for i in begin..begin + 8 {
                rig.read(slot, i * 8192, 4096);
            }
            rig.engine.push();
            let made = difference(rig.engine.counters(), before);
            let done = (made.staged, made.issued, made.submit_calls);
            assert_eq!(done, (pushes * 8, pushes * 8, pushes), "{setup:?}");
        }
        assert_eq!(rig.engine.in_flight(), 16, "{setup:?}");
        rig.finish_ok();
        let made = difference(rig.engine.counters(), before);
        assert_eq!(made.submit_calls, 2, "{setup:?}: nothing was left over");
    }
}

#[test]
fn a_batch_is_submitted_with_few_calls() {
    for setup in SETUPS {
        let (_dir, mut rig, slot) = setup.begin();
        rig.write(slot, 0, &pattern(1, 1 << 20));
        rig.finish_ok();
        for round in 0..20u64 {
            let before = rig.engine.counters();
            for i in 0..32 {
                let offset = ((i * 37 + round) % 100) * 8192;
                rig.read(slot, offset, 4096);
            }
            rig.finish_ok();
            let made = difference(rig.engine.counters(), before);
            // io_uring hands a long batch to an idle device in parts of 1, 1, 2, 4, 8, 8 and 8 steps.
            let calls = if setup.kind == EngineKind::IoUring {
                7
            } else {
                1
            };
            assert_eq!(
                (made.staged, made.issued, made.submit_calls, made.bounced),
                (32, 32, calls, 0),
                "{setup:?}"
            );
            rig.clear();
        }
        let before = rig.engine.counters();
        rig.other(slot, IoOp::Sync, 0, 0);
        rig.write(slot, 1 << 20, &[3; 4096]);
        rig.finish_ok();
        let made = difference(rig.engine.counters(), before);
        assert_eq!((made.issued, made.submit_calls, made.syncs), (2, 1, 1));
    }
}

#[test]
fn idle_polling_makes_no_calls() {
    for setup in SETUPS {
        let (_dir, mut rig, slot) = setup.begin();
        rig.write(slot, 0, &[1; 4096]);
        rig.finish_ok();
        // The first turns may still see what the start left.
        for _ in 0..10 {
            rig.engine.turn(Wait::Poll, &mut rig.events).unwrap();
        }
        let before = rig.engine.counters();
        for _ in 0..5000 {
            rig.engine.turn(Wait::Poll, &mut rig.events).unwrap();
        }
        assert_eq!(rig.engine.counters(), before, "{setup:?}");
    }
}

/// With one operation after the other, each turn makes one call that submits and (but for the
/// engines that sleep in epoll) waits in the same one.
#[test]
fn io_uring_waits_in_the_call_that_submits() {
    let dir = scratch();
    let setup = SETUPS[4];
    assert_eq!(
        (setup.kind, setup.cache),
        (EngineKind::IoUring, Cache::None)
    );
    let file = setup.file(dir.path(), 1);
    let mut rig = Rig::new(setup.kind);
    let slot = rig.engine.attach(&file).unwrap();
    rig.write(slot, 0, &pattern(1, 1 << 20));
    rig.finish_ok();
    let before = rig.engine.counters();
    for i in 0..100u64 {
        rig.read(slot, i % 7 * 4096, 4096);
        rig.engine.turn(Wait::For(HANG), &mut rig.events).unwrap();
        assert_eq!(rig.engine.in_flight(), 0);
        rig.clear();
    }
    let made = difference(rig.engine.counters(), before);
    assert_eq!((made.submit_calls, made.wait_calls), (100, 0));
}

#[test]
fn neighbours_merge_whatever_their_order() {
    for setup in SETUPS {
        let (_dir, mut rig, slot) = setup.begin();
        let data = pattern(9, 16 * 4096);
        rig.write(slot, 1 << 20, &data);
        rig.finish_ok();
        let before = rig.engine.counters();
        let mut reads = Vec::new();
        for i in [3usize, 0, 7, 1, 6, 2, 5, 4] {
            let at = i * 4096;
            rig.write(slot, at as u64, &data[at..at + 4096]);
            reads.push((i, rig.read(slot, (1 << 20) + at as u64, 4096)));
        }
        rig.finish_ok();
        let made = difference(rig.engine.counters(), before);
        assert_eq!((made.staged, made.issued), (16, 2), "{setup:?}");
        for (i, token) in reads {
            assert!(
                rig.take(token) == data[i * 4096..(i + 1) * 4096],
                "{setup:?}"
            );
        }
        let back = rig.read(slot, 0, 8 * 4096);
        rig.finish_ok();
        assert!(rig.take(back) == data[..8 * 4096]);
        // At most 1 MiB and 1024 pieces in one.
        let before = rig.engine.counters();
        for i in 0..3u64 {
            let pieces = (0..150).map(|_| Piece::new(4096, 0)).collect();
            rig.stage(slot, IoOp::Read, i * 150 * 4096, 150 * 4096, pieces);
        }
        rig.finish_ok();
        let made = difference(rig.engine.counters(), before);
        assert!(made.issued >= 3, "{setup:?} {made:?}");
    }
}

#[test]
fn a_failure_hits_only_its_own_operation() {
    let disk = SimDisk::new(SimOptions {
        size: 1 << 20,
        ..SimOptions::default()
    });
    let mut rig = Rig::new(EngineKind::Sim);
    let slot = rig
        .engine
        .attach(&File::sim(disk.clone()).unwrap())
        .unwrap();
    disk.inject(Fault {
        bytes: 8192..8193,
        ..Fault::always(FaultOp::Any, libc::ENOSPC)
    });
    let tokens: Vec<_> = (0..4u64)
        .map(|i| rig.write(slot, i * 4096, &[i as u8 + 1; 4096]))
        .collect();
    let ends = rig.finish();
    assert_eq!(ends.len(), 4, "exactly one completion each");
    for (i, token) in tokens.iter().enumerate() {
        let end = ends.iter().find(|c| c.token == *token).unwrap();
        assert_eq!(end.errno, if i == 2 { libc::ENOSPC } else { 0 });
    }
    let back = rig.read(slot, 4096, 4096);
    rig.finish_ok();
    assert_eq!(rig.take(back), [2; 4096]);
}

#[test]
fn simulated_runs_repeat_with_their_seed() {
    let order = |seed| {
        let disk = SimDisk::new(SimOptions {
            seed,
            size: 1 << 20,
            ..SimOptions::default()
        });
        let mut rig = Rig::new(EngineKind::Sim);
        let slot = rig.engine.attach(&File::sim(disk).unwrap()).unwrap();
        for i in 0..32u64 {
            rig.write(slot, i * 8192, &[1; 4096]);
        }
        rig.finish().iter().map(|c| c.token.0).collect::<Vec<_>>()
    };
    assert_eq!(order(7), order(7));
    assert_ne!(order(7), order(8));
    assert_ne!(
        order(7),
        (0..32).collect::<Vec<_>>(),
        "nothing is reordered"
    );
}

#[test]
fn flushes_are_ignored_only_in_cache_mode_unsafe() {
    for (cache, issued) in [(Cache::Unsafe, 0), (Cache::Writeback, 1)] {
        let dir = scratch();
        let file = File::create_new(&dir.path().join("f"), &common::options(cache)).unwrap();
        let mut rig = Rig::new(EngineKind::Threads);
        let slot = rig.engine.attach(&file).unwrap();
        rig.other(slot, IoOp::Sync, 0, 0);
        rig.finish_ok();
        assert_eq!(rig.engine.counters().issued, issued, "{cache}");
    }
}

/// After a failed sync of the page cache a later success would promise what may be lost. A simulated
/// disk without alignment stands for a buffered file.
#[test]
fn a_failed_sync_of_a_buffered_file_stays_failed() {
    for (align, later) in [(1, libc::EIO), (512, 0)] {
        let disk = SimDisk::new(SimOptions {
            alignment: Alignment {
                offset: align,
                memory: 1,
            },
            ..SimOptions::default()
        });
        disk.inject(Fault {
            count: 1,
            ..Fault::always(FaultOp::Sync, libc::EIO)
        });
        let mut rig = Rig::new(EngineKind::Sim);
        let slot = rig.engine.attach(&File::sim(disk).unwrap()).unwrap();
        for expected in [libc::EIO, later, later] {
            rig.other(slot, IoOp::Sync, 0, 0);
            assert_eq!(rig.finish()[0].errno, expected, "alignment {align}");
        }
    }
}
