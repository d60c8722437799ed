//! Load on a file through one of our engines, without any server: what the host can do. Unsafe code: memory lent
//! to an engine.

use super::{
    By, Report, Spec,
    drive::{Client, Ended},
    fill,
    plan::{Geometry, Kind, Places, Request},
    run::run_queues,
};
use block::{Context, Error, ErrorKind, IoVec, Result};
use io::{
    Aio, Cache, Engine, EngineKind, EngineOptions, Events, File, FileSlot, Io, IoOp, OpenOptions,
    Token, Wait, memory::AlignedBuf,
};
use std::{path::Path, sync::Arc, time::Duration};

/// How long a turn may sleep.
const WAIT: Wait = Wait::For(Duration::from_secs(1));

pub(crate) fn run(
    spec: &Spec,
    path: &Path,
    engine: &str,
    direct: bool,
    by: By<'_>,
) -> Result<Report> {
    let named = || path.display().to_string();
    let aio: Aio = engine.parse()?;
    let options = OpenOptions {
        cache: if direct {
            Cache::None
        } else {
            Cache::Writeback
        },
        ..if spec.writes() {
            OpenOptions::default()
        } else {
            OpenOptions::reading()
        }
    };
    let file = io::wait_for_lock(|| File::open(path, &options))?;
    let kind = io::choose(aio, std::slice::from_ref(&file))
        .context(named)?
        .kind;
    let geometry = Geometry {
        capacity: file.len()?,
        read_only: false,
        flushes: true,
        // Others would go through bounce buffers, with reads around writes: that is not the host's rate.
        block_bytes: file.alignment().offset.into(),
    };
    let places = Places::new(spec, &geometry).context(named)?;
    let openers = (0..spec.queues).map(|queue| {
        let file = file.clone();
        move || Bare::new(spec, &file, kind, queue).context(|| file.path().display().to_string())
    });
    run_queues(spec, places, openers.collect(), by).context(named)
}

struct Bare {
    // Dropped first: it waits for what is in flight, which uses the memory below.
    engine: Box<dyn Engine>,
    file: FileSlot,
    block: u64,
    pieces: Vec<IoVec>,
    _data: AlignedBuf,
    events: Events,
    wait: Wait,
}

impl Bare {
    fn new(spec: &Spec, file: &Arc<File>, kind: EngineKind, queue: u32) -> Result<Self> {
        let depth = spec.depth as usize;
        let options = EngineOptions::default();
        let options = EngineOptions {
            depth: options.depth.max(depth),
            ..options
        };
        let mut engine = io::open_engine(kind, &options)?;
        let slot = engine.attach(file)?;
        let block = spec.block_bytes as usize;
        let room = block.next_multiple_of(4096);
        let mut data = AlignedBuf::new(room * depth, 4096);
        for i in 0..depth {
            fill(&mut data[i * room..i * room + block], spec.seed, queue, i);
        }
        Ok(Self {
            engine,
            file: slot,
            block: spec.block_bytes,
            pieces: (0..depth).map(|i| data.piece(i * room, block)).collect(),
            _data: data,
            events: Events::default(),
            wait: if spec.poll { Wait::Poll } else { WAIT },
        })
    }
}

impl Client for Bare {
    fn submit(&mut self, slot: usize, request: Request) -> Result<()> {
        let (op, len) = match request.kind {
            Kind::Read => (IoOp::Read, self.block),
            Kind::Write => (IoOp::Write, self.block),
            Kind::Flush => (IoOp::Sync, 0),
        };
        let io = Io {
            file: self.file,
            op,
            offset: request.offset,
            len,
            iov: &self.pieces[slot],
            iov_len: u32::from(len > 0),
            token: Token(slot as u64),
        };
        // SAFETY: pieces and memory are `self`'s, whose engine is dropped before them; a slot has one operation
        // at a time, and the data are not looked at.
        if unsafe { self.engine.stage(io) } {
            Ok(())
        } else {
            // It was made for the depth.
            Err(Error::new(ErrorKind::Io, "the engine is full"))
        }
    }

    /// The engine submits in the same turn that reaps.
    fn send(&mut self) -> Result<()> {
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) -> Result<()> {
        self.events.completions.clear();
        self.engine.turn(self.wait, &mut self.events)?;
        for done in &self.events.completions {
            let slot = usize::try_from(done.token.0).ok();
            let Some(slot) = slot.filter(|slot| *slot < self.pieces.len()) else {
                return Err(Error::new(ErrorKind::Io, "the engine made up an operation"));
            };
            ended.push(Ended {
                slot,
                ok: done.errno == 0,
            });
        }
        Ok(())
    }

    fn put(&mut self, slot: usize, block: &[u8]) {
        let piece = self.pieces[slot];
        assert!(block.len() <= piece.len());
        // SAFETY: the piece is of `self`'s memory and as long, and its slot has no operation.
        unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), piece.base(), block.len()) }
    }

    fn get(&mut self, slot: usize, block: &mut [u8]) {
        let piece = self.pieces[slot];
        assert!(block.len() <= piece.len());
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(piece.base(), block.as_mut_ptr(), block.len()) }
    }

    fn notifications(&self) -> (u64, u64) {
        let counters = self.engine.counters();
        (counters.submit_calls, counters.wait_calls)
    }
}
