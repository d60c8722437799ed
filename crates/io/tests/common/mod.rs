//! What the integration tests share: an engine with memory that outlives its operations.
#![allow(dead_code)]

use block::IoVec;
use io::{Completion, Engine, EngineKind, EngineOptions, Events, FileSlot, Io, IoOp, Token, Wait};
use std::time::Duration;

/// Far longer than anything takes: a test that waits so long has found a hang.
pub const HANG: Duration = Duration::from_secs(60);

/// The engines that work on real files.
pub const KINDS: [EngineKind; 3] = [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring];

/// An engine and the memory of its operations.
pub struct Rig {
    pub engine: Box<dyn Engine>,
    pub events: Events,
    next: u64,
    ops: Vec<(Token, Vec<Vec<u8>>, Box<[IoVec]>)>,
}

impl Rig {
    pub fn new(kind: EngineKind) -> Self {
        Self::with(kind, &EngineOptions::default())
    }

    pub fn with(kind: EngineKind, options: &EngineOptions) -> Self {
        Self {
            engine: io::open_engine(kind, options).unwrap_or_else(|e| panic!("{kind}: {e}")),
            events: Events::default(),
            next: 0,
            ops: Vec::new(),
        }
    }

    /// Stages an operation on pieces of memory that the rig keeps. `None` when the engine is full.
    pub fn try_stage(
        &mut self,
        file: FileSlot,
        op: IoOp,
        offset: u64,
        len: u64,
        mut pieces: Vec<Vec<u8>>,
    ) -> Option<Token> {
        let iov: Box<[IoVec]> = pieces.iter_mut().map(|p| IoVec::from_mut(p)).collect();
        let token = Token(self.next);
        let staged = Io {
            file,
            op,
            offset,
            len,
            iov: iov.as_ptr(),
            iov_len: iov.len() as u32,
            token,
        };
        // SAFETY: array and memory are kept until `take` after the completion; `Rig` drops the engine
        // first.
        if !unsafe { self.engine.stage(staged) } {
            return None;
        }
        self.next += 1;
        self.ops.push((token, pieces, iov));
        Some(token)
    }

    pub fn stage(
        &mut self,
        file: FileSlot,
        op: IoOp,
        offset: u64,
        len: u64,
        pieces: Vec<Vec<u8>>,
    ) -> Token {
        self.try_stage(file, op, offset, len, pieces)
            .expect("room in the engine")
    }

    pub fn write(&mut self, file: FileSlot, offset: u64, data: &[u8]) -> Token {
        self.stage(
            file,
            IoOp::Write,
            offset,
            data.len() as u64,
            vec![data.to_vec()],
        )
    }

    pub fn read(&mut self, file: FileSlot, offset: u64, len: usize) -> Token {
        self.stage(file, IoOp::Read, offset, len as u64, vec![vec![0xa5; len]])
    }

    pub fn other(&mut self, file: FileSlot, op: IoOp, offset: u64, len: u64) -> Token {
        self.stage(file, op, offset, len, Vec::new())
    }

    /// Turns until nothing is in flight; all completions in the order in which they came.
    pub fn finish(&mut self) -> Vec<Completion> {
        let mut all = Vec::new();
        while self.engine.in_flight() > 0 {
            self.events.completions.clear();
            self.engine
                .turn(Wait::For(HANG), &mut self.events)
                .expect("turn");
            assert!(
                !self.events.completions.is_empty() || !self.events.ready.is_empty(),
                "{} operations hang",
                self.engine.in_flight()
            );
            self.events.ready.clear();
            all.append(&mut self.events.completions);
        }
        all
    }

    /// Finishes, and expects that everything succeeded.
    pub fn finish_ok(&mut self) {
        for c in self.finish() {
            assert_eq!(c.errno, 0, "{c:?}");
        }
    }

    /// The bytes of an operation that ended.
    pub fn take(&mut self, token: Token) -> Vec<u8> {
        let at = self
            .ops
            .iter()
            .position(|(t, ..)| *t == token)
            .expect("staged");
        self.ops.swap_remove(at).1.concat()
    }
}

/// A directory on a file system with `O_DIRECT`: where the tests are built.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("scratch directory")
}

/// Deterministic bytes that differ from place to place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 24) as u8
        })
        .collect()
}
