//! Every engine does the same: random batches against a model of the file.

use crate::common;

use block::Storage;
use common::{HANG, Piece, Rig, SETUPS, Setup, pattern, scratch};
use io::{Cache, EngineKind, EngineOptions, EventFd, Events, IoOp, Wait, Waker};
use proptest::prelude::*;
use std::{
    io::{ErrorKind, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::Arc,
    time::Duration,
};

const SPACE: u64 = 600_000;

#[derive(Clone, Debug)]
struct Gen {
    op: u8,
    gap: u64,
    len: u64,
    cuts: Vec<u16>,
    misaligned: usize,
    aligned: bool,
}

fn gen_op() -> impl Strategy<Value = Gen> {
    (
        0..12u8,
        prop_oneof![3 => Just(0u64), 2 => 0..5000u64, 1 => 0..100_000u64],
        prop_oneof![3 => 1..600u64, 3 => 600..9000u64, 1 => 9000..400_000u64],
        prop::collection::vec(any::<u16>(), 0..4),
        prop_oneof![2 => Just(0usize), 1 => 1..4096usize],
        any::<bool>(),
    )
        .prop_map(|(op, gap, len, cuts, misaligned, aligned)| Gen {
            op,
            gap,
            len,
            cuts,
            misaligned,
            aligned,
        })
}

/// Cuts `data` into pieces at pseudo-random places; whole blocks where it must stay aligned.
fn pieces(data: &[u8], g: &Gen) -> Vec<Piece> {
    let mut cuts: Vec<usize> = g
        .cuts
        .iter()
        .map(|c| {
            let at = usize::from(*c) * 16 % (data.len() + 1);
            if g.aligned { at & !4095 } else { at }
        })
        .collect();
    cuts.extend([0, data.len()]);
    cuts.sort_unstable();
    let misaligned = if g.aligned { 0 } else { g.misaligned };
    cuts.windows(2)
        .map(|w| Piece::of(&data[w[0]..w[1]], misaligned))
        .collect()
}

fn run(setup: Setup, seed: u64, batches: &[Vec<Gen>]) {
    let dir = scratch();
    let file = setup.file(dir.path(), seed);
    let mut rig = Rig::new(setup.kind);
    let slot = rig.engine.attach(&file).unwrap();
    let mut model = vec![0u8; SPACE as usize];
    let mut counter = seed;
    for (b, batch) in batches.iter().enumerate() {
        // The operations of a batch do not overlap, so that its outcome does not depend on order;
        // but they share blocks.
        let mut at = 0;
        let before = model.clone();
        let mut reads = Vec::new();
        for g in batch {
            let mask = if g.aligned { 4095 } else { 0 };
            let offset = (at + g.gap + mask) & !mask;
            let len = ((g.len + mask) & !mask).min(SPACE.saturating_sub(offset));
            if len == 0 {
                break;
            }
            at = offset + len;
            let range = offset as usize..at as usize;
            counter += 1;
            match g.op {
                0..=4 => {
                    let data = pattern(counter, len as usize);
                    rig.stage(slot, IoOp::Write, offset, len, pieces(&data, g));
                    model[range].copy_from_slice(&data);
                }
                5..=8 => {
                    let blank = vec![0xee; len as usize];
                    let token = rig.stage(slot, IoOp::Read, offset, len, pieces(&blank, g));
                    reads.push((token, range));
                }
                9 => {
                    let unmap = g.misaligned % 2 == 0;
                    rig.other(slot, IoOp::Zero { unmap, fast: false }, offset, len);
                    model[range].fill(0);
                }
                10 => {
                    rig.other(slot, IoOp::Discard, offset, len);
                    model[range].fill(0);
                }
                _ => {
                    rig.other(slot, IoOp::Allocate, offset, len);
                }
            }
        }
        for completion in rig.finish() {
            assert_eq!(completion.errno, 0, "{setup:?} seed {seed} batch {b}");
        }
        for (token, range) in reads {
            assert!(
                rig.take(token) == before[range.clone()],
                "{setup:?} seed {seed} batch {b} read {range:?}"
            );
        }
        rig.clear();
        let all = rig.read(slot, 0, SPACE as usize);
        rig.finish_ok();
        let all = rig.take(all);
        let wrong = all.iter().zip(&model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{setup:?} seed {seed} after batch {b}");
    }
    rig.other(slot, IoOp::Sync, 0, 0);
    rig.finish_ok();
    // The blocking side sees the same bytes.
    let len = Storage::len(&*file).unwrap().min(SPACE) as usize;
    let mut bytes = vec![0; len];
    file.read_at(0, &mut bytes).unwrap();
    assert!(bytes == model[..len], "{setup:?} seed {seed} Storage");
    assert!(model[len..].iter().all(|b| *b == 0));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 6,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn batches_match_the_model(
        seed in 0..1u64 << 40,
        batches in prop::collection::vec(prop::collection::vec(gen_op(), 1..24), 1..6),
    ) {
        for setup in SETUPS {
            run(setup, seed, &batches);
        }
    }

    #[test]
    fn storage_matches_the_model(
        seed in 0..1u64 << 40,
        ops in prop::collection::vec(gen_op(), 1..20),
    ) {
        for setup in SETUPS {
            let dir = scratch();
            let file = setup.file(dir.path(), seed);
            let mut model: Vec<u8> = Vec::new();
            for (i, g) in ops.iter().enumerate() {
                let offset = (g.gap * 7 + g.misaligned as u64) % 300_000;
                let (from, to) = (offset as usize, (offset + g.len) as usize);
                match g.op {
                    0..=5 => {
                        let data = pattern(seed + i as u64, g.len as usize);
                        file.write_at(offset, &data).unwrap();
                        // Under O_DIRECT the file may end at the end of the block.
                        let len = Storage::len(&*file).unwrap() as usize;
                        prop_assert!(len >= to.max(model.len()));
                        model.resize(len, 0);
                        model[from..to].copy_from_slice(&data);
                    }
                    6..=7 => {
                        file.write_zeroes(offset, g.len, g.aligned).unwrap();
                        let end = to.min(model.len());
                        if from < end {
                            model[from..end].fill(0);
                        }
                    }
                    8 => {
                        file.set_len(offset).unwrap();
                        model.resize(from, 0);
                    }
                    9 => {
                        file.allocate(offset, g.len).unwrap();
                        let len = to.max(model.len());
                        model.resize(len, 0);
                    }
                    _ => file.sync().unwrap(),
                }
                prop_assert_eq!(Storage::len(&*file).unwrap() as usize, model.len(), "{:?} {:?}", setup, g);
            }
            let mut bytes = vec![1; model.len()];
            file.read_at(0, &mut bytes).unwrap();
            prop_assert!(bytes == model, "{:?}", setup);
            // Holes read as zeros, and the runs cover the file exactly.
            let mut at = 0;
            while let Some(range) = file.range_at(at).unwrap() {
                prop_assert!(range.offset == at && range.len > 0);
                let end = (at + range.len) as usize;
                if range.kind == block::RangeKind::Hole {
                    prop_assert!(model[at as usize..end].iter().all(|b| *b == 0));
                }
                at += range.len;
            }
            prop_assert_eq!(at as usize, model.len());
            let past = file.read_at(model.len() as u64, &mut [0]).unwrap_err();
            prop_assert_eq!(past.kind(), block::ErrorKind::Corrupt);
        }
    }
}

#[test]
fn more_than_fits_is_refused_not_lost() {
    for setup in SETUPS {
        let dir = scratch();
        let file = setup.file(dir.path(), 1);
        let mut rig = Rig::with(
            setup.kind,
            &EngineOptions {
                depth: 4,
                threads: 2,
            },
        );
        let slot = rig.engine.attach(&file).unwrap();
        assert_eq!(rig.engine.capacity(), 4);
        let stage = |rig: &mut Rig, i: u64| {
            rig.try_stage(
                slot,
                IoOp::Write,
                i * 8192,
                4096,
                vec![Piece::of(&[7; 4096], 0)],
            )
        };
        for i in 0..4 {
            assert!(stage(&mut rig, i).is_some());
        }
        assert!(stage(&mut rig, 4).is_none(), "{setup:?}");
        assert_eq!(rig.finish().len(), 4);
        assert!(stage(&mut rig, 4).is_some());
        rig.finish_ok();
    }
}

/// More operations than there are chunks of bounce memory, each larger than a chunk.
#[test]
fn bounced_operations_wait_for_memory() {
    let data: Vec<Vec<u8>> = (0..40).map(|i| pattern(i, 300_000)).collect();
    for setup in SETUPS {
        let (_dir, mut rig, slot) = setup.begin();
        for (i, d) in data.iter().enumerate() {
            let pieces = vec![Piece::of(d, 1)];
            rig.stage(
                slot,
                IoOp::Write,
                i as u64 * 300_001,
                d.len() as u64,
                pieces,
            );
        }
        rig.finish_ok();
        let tokens: Vec<_> = (0..40)
            .map(|i| rig.read(slot, i * 300_001, 300_000))
            .collect();
        rig.finish_ok();
        for (token, d) in tokens.into_iter().zip(&data) {
            assert!(rig.take(token) == *d, "{setup:?}");
        }
    }
}

/// Misaligned writes hold the gate over several steps; what waits there must not keep the threads that
/// these steps need.
#[test]
fn ranges_and_misaligned_writes_do_not_deadlock() {
    for setup in SETUPS {
        let dir = scratch();
        let file = setup.file(dir.path(), 1);
        let mut rig = Rig::with(
            setup.kind,
            &EngineOptions {
                depth: 64,
                threads: 1,
            },
        );
        let slot = rig.engine.attach(&file).unwrap();
        for _ in 0..10 {
            for i in 0..16u64 {
                rig.write(slot, i * 8192 + 100, &[i as u8 + 1; 200]);
                let zero = IoOp::Zero {
                    unmap: i % 2 == 0,
                    fast: false,
                };
                rig.other(slot, zero, i * 8192 + 300, 4000);
                rig.other(slot, IoOp::Discard, i * 8192 + 4300, 100);
            }
            rig.finish_ok();
            rig.clear();
        }
        let back = rig.read(slot, 0, 16 * 8192);
        rig.finish_ok();
        for (i, block) in rig.take(back).chunks(8192).enumerate() {
            let expected: Vec<u8> = (0..8192)
                .map(|at| {
                    if (100..300).contains(&at) {
                        i as u8 + 1
                    } else {
                        0
                    }
                })
                .collect();
            assert!(block == expected, "{setup:?} block {i}");
        }
    }
}

/// Two threads with an engine each write interleaved records that share blocks.
#[test]
fn engines_do_not_lose_each_others_bytes() {
    const RECORD: u64 = 100;
    const COUNT: u64 = 600;
    for setup in SETUPS {
        if setup.kind == EngineKind::Sim {
            continue;
        }
        let dir = scratch();
        let file = setup.file(dir.path(), 1);
        file.set_len(2 * COUNT * RECORD).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..2u64 {
                let file = &file;
                scope.spawn(move || {
                    let mut rig = Rig::new(setup.kind);
                    let slot = rig.engine.attach(file).unwrap();
                    for i in 0..COUNT {
                        let record = pattern(2 * i + thread, RECORD as usize);
                        rig.write(slot, (2 * i + thread) * RECORD, &record);
                        if i % 8 == 7 {
                            rig.finish_ok();
                        }
                    }
                    rig.finish_ok();
                });
            }
        });
        let mut bytes = vec![0; (2 * COUNT * RECORD) as usize];
        file.read_at(0, &mut bytes).unwrap();
        for (i, record) in bytes.chunks(RECORD as usize).enumerate() {
            assert!(
                record == pattern(i as u64, RECORD as usize),
                "{setup:?} record {i}"
            );
        }
    }
}

#[test]
fn watches_report_and_wakers_wake() {
    for kind in [
        EngineKind::Threads,
        EngineKind::Native,
        EngineKind::IoUring,
        EngineKind::Sim,
    ] {
        let mut engine = io::open_engine(kind, &EngineOptions::default()).unwrap();
        let mut events = Events::default();
        let (a, b) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        let waker = Arc::new(Waker::new().unwrap());
        engine.watch(a.as_fd(), 10, false).unwrap();
        engine.watch(b.as_fd(), 11, false).unwrap();
        engine.watch(waker.as_fd(), 12, false).unwrap();
        engine
            .turn(Wait::For(Duration::from_millis(1)), &mut events)
            .unwrap();
        assert!(events.ready.is_empty(), "{kind}");
        for round in 0..3 {
            b.write().unwrap();
            engine.turn(Wait::For(HANG), &mut events).unwrap();
            assert_eq!(events.ready, [11], "{kind} round {round}");
            assert_eq!(b.read().unwrap(), Some(1));
            events.ready.clear();
        }
        assert!(waker.prepare_sleep());
        let other = waker.clone();
        let thread = std::thread::spawn(move || other.wake());
        engine.turn(Wait::For(HANG), &mut events).unwrap();
        assert_eq!(events.ready, [12], "{kind}");
        assert!(waker.awake());
        events.ready.clear();
        thread.join().unwrap();
        engine.unwatch(b.as_fd(), 11).unwrap();
        assert!(engine.unwatch(b.as_fd(), 11).is_err());
        b.write().unwrap();
        a.write().unwrap();
        engine.turn(Wait::For(HANG), &mut events).unwrap();
        assert_eq!(
            events.ready,
            [10],
            "{kind}: an unwatched descriptor is silent"
        );
    }
}

/// Whose descriptor is unwatched and closed is gone for its peer at once, also when an event of it is under way.
#[test]
fn a_closed_descriptor_is_not_kept_open() {
    for kind in [
        EngineKind::Threads,
        EngineKind::Native,
        EngineKind::IoUring,
        EngineKind::Sim,
    ] {
        let mut engine = io::open_engine(kind, &EngineOptions::default()).unwrap();
        let mut events = Events::default();
        for speaks in [false, true] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.set_read_timeout(Some(HANG)).unwrap();
            engine.watch(ours.as_fd(), 10, false).unwrap();
            engine.turn(Wait::Poll, &mut events).unwrap();
            if speaks {
                theirs.write_all(b"the last word").unwrap();
            }
            engine.unwatch(ours.as_fd(), 10).unwrap();
            drop(ours);
            let end = theirs.read_to_end(&mut Vec::new()).map_err(|e| e.kind());
            assert!(
                matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)),
                "{kind}, speaks: {speaks}: {end:?}"
            );
        }
    }
}

/// A thread that always has I/O to do still sees its descriptors.
#[test]
fn polling_does_not_starve_watches() {
    for setup in SETUPS {
        let (_dir, mut rig, slot) = setup.begin();
        rig.write(slot, 0, &[1; 4096]);
        rig.finish_ok();
        let fd = EventFd::new().unwrap();
        rig.engine.watch(fd.as_fd(), 5, false).unwrap();
        fd.write().unwrap();
        for wait in [Wait::Poll, Wait::For(HANG)] {
            let mut turns = 0;
            while rig.events.ready.is_empty() {
                rig.read(slot, 0, 4096);
                while rig.engine.in_flight() > 0 {
                    rig.engine.turn(wait, &mut rig.events).unwrap();
                }
                rig.clear();
                turns += 1;
                assert!(turns < 5000, "{setup:?} {wait:?}");
            }
            assert_eq!(rig.events.ready[0], 5);
            rig.events.ready.clear();
            // Signalled again for the next round, for engines that report edges.
            fd.write().unwrap();
        }
    }
}

/// Dropping an engine waits for what the kernel does with the callers' memory.
#[test]
fn drops_with_work_in_flight() {
    for setup in SETUPS {
        let dir = scratch();
        let file = setup.file(dir.path(), 1);
        file.set_len(8 << 20).unwrap();
        for round in 0..20 {
            let mut rig = Rig::new(setup.kind);
            let slot = rig.engine.attach(&file).unwrap();
            for i in 0..32u64 {
                let pieces = vec![Piece::new(100_000, round % 2)];
                rig.stage(slot, IoOp::Read, i * 200_000, 100_000, pieces);
            }
            rig.other(slot, IoOp::Allocate, 0, 1 << 20);
            rig.engine.turn(Wait::Poll, &mut rig.events).unwrap();
        }
        // Nothing holds the gate any more.
        file.write_at(100, &[1; 1000]).unwrap();
    }
}

#[test]
fn what_a_file_cannot_do_is_an_error_of_that_operation() {
    for setup in SETUPS {
        let dir = scratch();
        let file = setup.file(dir.path(), 1);
        let mut rig = Rig::new(setup.kind);
        let slot = rig.engine.attach(&file).unwrap();
        let far = rig.other(slot, IoOp::Discard, u64::MAX - 5, 10);
        let none = rig.other(slot, IoOp::Discard, 5, 0);
        let good = rig.write(slot, 0, &[1; 512]);
        let ends = rig.finish();
        let errno = |token| ends.iter().find(|c| c.token == token).unwrap().errno;
        assert_eq!(errno(far), libc::EFBIG, "{setup:?}");
        assert_eq!((errno(none), errno(good)), (0, 0), "{setup:?}");
        if setup.kind == EngineKind::Sim {
            continue;
        }
        let options = io::OpenOptions {
            cache: setup.cache,
            ..io::OpenOptions::reading()
        };
        let read_only = io::File::open(&dir.path().join("file-1"), &options).unwrap();
        let slot = rig.engine.attach(&read_only).unwrap();
        rig.write(slot, 0, &[2; 512]);
        rig.other(slot, IoOp::Allocate, 0, 512);
        assert!(rig.finish().iter().all(|c| c.errno == libc::EROFS));
        let back = rig.read(slot, 0, 512);
        rig.finish_ok();
        assert_eq!(rig.take(back), [1; 512]);
    }
}

#[test]
fn native_refuses_buffered_files() {
    let dir = scratch();
    let file = io::File::create_new(&dir.path().join("f"), &common::options(Cache::Writeback));
    let file = file.unwrap();
    let mut engine = io::open_engine(EngineKind::Native, &EngineOptions::default()).unwrap();
    let error = engine.attach(&file).unwrap_err();
    assert!(error.to_string().contains("O_DIRECT"), "{error}");
    let native = io::Aio::Only(EngineKind::Native);
    let error = io::choose(native, std::slice::from_ref(&file)).unwrap_err();
    assert!(error.to_string().contains("--cache none"), "{error}");
    let choice = io::choose(io::Aio::Auto, &[file]).unwrap();
    assert_ne!(choice.kind, EngineKind::Native);
    assert!(!choice.reason.is_empty());
}
