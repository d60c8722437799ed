//! The steady state allocates nothing, on any thread.

mod common;

use block::IoVec;
use common::{HANG, Rig, SETUPS, scratch};
use io::{EngineKind, Io, IoOp, Token, Wait};
use testkit::allocations::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

/// Everything in one test: the counter is the process's.
#[test]
fn steady_state_allocates_nothing() {
    for setup in SETUPS {
        if setup.kind == EngineKind::Sim {
            // It stores what is written, and logs it.
            continue;
        }
        let dir = scratch();
        let file = setup.file(dir.path(), 1);
        let mut rig = Rig::new(setup.kind);
        let slot = rig.engine.attach(&file).unwrap();
        let mut memory = vec![0u8; 64 * 8192 + 4096];
        let start = memory.as_ptr().align_offset(4096);
        let iov: Vec<IoVec> = (0..64)
            .map(|i| IoVec::from_mut(&mut memory[start + i * 8192..][..4096]))
            .collect();
        let round = |rig: &mut Rig, round: u64| {
            for (i, piece) in iov.iter().enumerate() {
                // Neighbours and strangers, reads and writes; misaligned ones, and a sync.
                let i = i as u64;
                let (op, offset) = match i % 4 {
                    0 => (IoOp::Write, i / 4 * 4096),
                    1 => (IoOp::Read, (round + i * 3) % 200 * 12288),
                    2 => (IoOp::Write, (4 << 20) + i * 20000 + 7),
                    _ => (IoOp::Read, (8 << 20) + i * 20000 + 7),
                };
                let staged = Io {
                    file: slot,
                    op,
                    offset,
                    len: 4096,
                    iov: piece,
                    iov_len: 1,
                    token: Token(i),
                };
                // SAFETY: array and memory outlive the loop below, which ends all operations.
                assert!(unsafe { rig.engine.stage(staged) });
            }
            let sync = Io {
                file: slot,
                op: IoOp::Sync,
                offset: 0,
                len: 0,
                iov: std::ptr::null(),
                iov_len: 0,
                token: Token(99),
            };
            // SAFETY: it has no memory.
            assert!(!round.is_multiple_of(16) || unsafe { rig.engine.stage(sync) });
            while rig.engine.in_flight() > 0 {
                rig.engine.turn(Wait::For(HANG), &mut rig.events).unwrap();
                for c in rig.events.completions.drain(..) {
                    assert_eq!(c.errno, 0);
                }
            }
        };
        for i in 0..100 {
            round(&mut rig, i);
        }
        // The least of some windows: a list may reach a new longest length once, but what
        // each round costs shows in every window.
        let made = (0..5).map(|window| {
            let before = ALLOCATOR.count();
            for i in 0..20 {
                round(&mut rig, 100 + window * 20 + i);
            }
            ALLOCATOR.count() - before
        });
        let made = made.min().unwrap_or(u64::MAX);
        assert_eq!(made, 0, "{setup:?}");
        drop(rig);
    }
}
