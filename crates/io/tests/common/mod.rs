//! What the integration tests share: an engine with memory that outlives its operations.
#![allow(dead_code)]

use block::IoVec;
use io::{
    Alignment, Cache, Completion, Engine, EngineKind, EngineOptions, Events, File, FileSlot, Io,
    IoOp, Lock, OpenOptions, SimDisk, SimOptions, Token, Wait,
};
use std::{path::Path, sync::Arc, time::Duration};

/// Far longer than anything takes: a test that waits so long has found a hang.
pub const HANG: Duration = Duration::from_secs(60);

/// An engine and a kind of file that it works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    pub kind: EngineKind,
    /// For real files.
    pub cache: Cache,
    /// For simulated disks.
    pub align: u32,
}

const fn setup(kind: EngineKind, cache: Cache, align: u32) -> Setup {
    Setup { kind, cache, align }
}

/// Every engine on everything that it can do.
pub const SETUPS: [Setup; 7] = [
    setup(EngineKind::Threads, Cache::Writeback, 0),
    setup(EngineKind::Threads, Cache::None, 0),
    setup(EngineKind::Native, Cache::None, 0),
    setup(EngineKind::IoUring, Cache::Writeback, 0),
    setup(EngineKind::IoUring, Cache::None, 0),
    setup(EngineKind::Sim, Cache::None, 1),
    setup(EngineKind::Sim, Cache::None, 4096),
];

impl Setup {
    pub fn file(self, dir: &Path, seed: u64) -> Arc<File> {
        if self.kind == EngineKind::Sim {
            return File::sim(SimDisk::new(SimOptions {
                seed,
                alignment: Alignment {
                    offset: self.align,
                    memory: self.align.min(512),
                },
                ..SimOptions::default()
            }))
            .unwrap();
        }
        File::create_new(&dir.join(format!("file-{seed}")), &options(self.cache)).unwrap()
    }
}

impl Setup {
    /// An engine with a new file. The directory goes last.
    pub fn begin(self) -> (tempfile::TempDir, Rig, FileSlot) {
        let dir = scratch();
        let file = self.file(dir.path(), 1);
        let mut rig = Rig::new(self.kind);
        let slot = rig.engine.attach(&file).unwrap();
        (dir, rig, slot)
    }
}

pub fn options(cache: Cache) -> OpenOptions {
    OpenOptions {
        cache,
        lock: Lock::None,
        ..OpenOptions::default()
    }
}

/// Memory of an operation, at a chosen distance from a multiple of 4096.
pub struct Piece {
    buf: Vec<u8>,
    start: usize,
    len: usize,
}

impl Piece {
    pub fn new(len: usize, misaligned: usize) -> Self {
        let buf = vec![0xa5; len + 8192];
        let address = buf.as_ptr() as usize;
        let start = address.next_multiple_of(4096) - address + misaligned % 4096;
        Self { buf, start, len }
    }

    pub fn of(data: &[u8], misaligned: usize) -> Self {
        let mut piece = Self::new(data.len(), misaligned);
        let start = piece.start;
        piece.buf[start..start + data.len()].copy_from_slice(data);
        piece
    }

    pub fn bytes(&self) -> &[u8] {
        &self.buf[self.start..self.start + self.len]
    }

    fn iov(&mut self) -> IoVec {
        IoVec::from_mut(&mut self.buf[self.start..self.start + self.len])
    }
}

struct Op {
    token: Token,
    pieces: Vec<Piece>,
    _iov: Box<[IoVec]>,
}

/// An engine and the memory of its operations.
pub struct Rig {
    pub engine: Box<dyn Engine>,
    pub events: Events,
    next: u64,
    ops: Vec<Op>,
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
        mut pieces: Vec<Piece>,
    ) -> Option<Token> {
        let iov: Box<[IoVec]> = pieces.iter_mut().map(Piece::iov).collect();
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
        // SAFETY: array and memory are kept until `take`, after the completion; `Rig` drops the
        // engine first.
        if !unsafe { self.engine.stage(staged) } {
            return None;
        }
        self.next += 1;
        self.ops.push(Op {
            token,
            pieces,
            _iov: iov,
        });
        Some(token)
    }

    pub fn stage(
        &mut self,
        file: FileSlot,
        op: IoOp,
        offset: u64,
        len: u64,
        pieces: Vec<Piece>,
    ) -> Token {
        self.try_stage(file, op, offset, len, pieces)
            .expect("room in the engine")
    }

    pub fn write(&mut self, file: FileSlot, offset: u64, data: &[u8]) -> Token {
        let len = data.len() as u64;
        self.stage(file, IoOp::Write, offset, len, vec![Piece::of(data, 0)])
    }

    pub fn read(&mut self, file: FileSlot, offset: u64, len: usize) -> Token {
        self.stage(
            file,
            IoOp::Read,
            offset,
            len as u64,
            vec![Piece::new(len, 0)],
        )
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
        let at = self.ops.iter().position(|op| op.token == token);
        let op = self.ops.swap_remove(at.expect("staged"));
        let mut bytes = Vec::new();
        for piece in &op.pieces {
            bytes.extend_from_slice(piece.bytes());
        }
        bytes
    }

    /// Forgets the memory of everything that ended.
    pub fn clear(&mut self) {
        assert_eq!(self.engine.in_flight(), 0);
        self.ops.clear();
    }
}

/// A directory on a file system with `O_DIRECT`: where the tests are built.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("scratch directory")
}

/// Deterministic bytes that differ from place to place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}
