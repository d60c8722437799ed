//! Load on a file through one of our engines, without any server: what the host can do. Unsafe code: memory lent
//! to an engine.

use super::{
    By, Report, Spec, Target,
    drive::{Client, Ended},
    fill,
    plan::{Geometry, Kind, Places, Request},
    psync::{self, Psync},
    run::run_queues,
};
use block::{Context, Error, ErrorKind, IoVec, Result};
use io::{
    Aio, Cache, Engine, EngineKind, EngineOptions, Events, File, FileSlot, Io, IoOp, Lock,
    OpenOptions, Token, Wait, memory::AlignedBuf,
};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

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
    let aio: Option<Aio> = match engine {
        psync::NAME => None,
        engine => Some(engine.parse()?),
    };
    let options = OpenOptions {
        cache: if direct {
            Cache::None
        } else {
            Cache::Writeback
        },
        ..access(spec.writes())
    };
    let options = match by.locked {
        true => OpenOptions {
            lock: Lock::None,
            ..options
        },
        false => options,
    };
    let paths = [path]
        .into_iter()
        .chain(spec.shape.more_files.iter().map(PathBuf::as_path));
    let files = paths.map(|path| io::wait_for_lock(|| File::open(path, &options)));
    let files = files.collect::<Result<Vec<_>>>()?;
    let kind = aio.map(|aio| io::choose(aio, &files)).transpose();
    let kind = kind.context(named)?.map(|choice| choice.kind);
    let mut capacity = u64::MAX;
    for file in &files {
        capacity = capacity.min(file.len()?);
    }
    let alignments = files.iter().map(|file| file.alignment().offset);
    let geometry = Geometry {
        capacity,
        read_only: false,
        flushes: true,
        // Others would go through bounce buffers, with reads around writes: that is not the host's rate.
        block_bytes: alignments.max().unwrap_or(512).into(),
    };
    let places = Places::new(spec, &geometry).context(named)?;
    let span = places.span();
    let queues = 0..spec.queues;
    let report = match kind {
        Some(kind) => {
            let openers = queues.map(|queue| {
                let files = &files;
                move || {
                    Bare::new(spec, files, span, kind, queue).context(|| path.display().to_string())
                }
            });
            run_queues(spec, places, openers.collect(), by)
        }
        None => {
            let openers = queues.map(|queue| {
                let files = files.clone();
                move || Ok(Psync::new(spec, files, span, queue))
            });
            run_queues(spec, places, openers.collect(), by)
        }
    };
    report.context(named)
}

/// Which of `count` files has what is at `offset` of all, `span` bytes each, and where.
pub(super) fn place(offset: u64, span: u64, count: usize) -> (usize, u64) {
    match count {
        1 => (0, offset),
        _ => ((offset / span) as usize, offset % span),
    }
}

/// How files are opened that are written or read.
fn access(writes: bool) -> OpenOptions {
    match writes {
        true => OpenOptions::default(),
        false => OpenOptions::reading(),
    }
}

/// Locks the files of loads that are to run at the same time ([`super::run_locked`]), as long as what comes back is there.
pub(crate) fn lock(specs: &[&Spec]) -> Result<Vec<Arc<File>>> {
    // By what they are: one file may have several names, of which each would lock out the others.
    let mut files: BTreeMap<(u64, u64), (&Path, bool)> = BTreeMap::new();
    for spec in specs {
        let Target::File { path, .. } = &spec.target else {
            continue;
        };
        for path in [path].into_iter().chain(&spec.shape.more_files) {
            let meta = fs::metadata(path).context(|| path.display().to_string())?;
            let key = (meta.dev(), meta.ino());
            files.entry(key).or_insert((path, false)).1 |= spec.writes();
        }
    }
    let locked = files.into_values().map(|(path, writes)| {
        let options = OpenOptions {
            cache: Cache::Writeback,
            ..access(writes)
        };
        io::wait_for_lock(|| File::open(path, &options))
    });
    locked.collect()
}

struct Bare {
    // Dropped first: it waits for what is in flight, which uses the memory below.
    engine: Box<dyn Engine>,
    files: Vec<FileSlot>,
    /// Bytes from a file's first to the next one's, where they are several.
    span: u64,
    /// Bytes of a slot's memory.
    block: usize,
    /// Of each slot's memory what its request is about.
    pieces: Vec<IoVec>,
    _data: AlignedBuf,
    events: Events,
    wait: Wait,
}

impl Bare {
    fn new(
        spec: &Spec,
        files: &[Arc<File>],
        span: u64,
        kind: EngineKind,
        queue: u32,
    ) -> Result<Self> {
        let depth = spec.depth as usize;
        let options = EngineOptions::default();
        let options = EngineOptions {
            depth: options.depth.max(depth),
            ..options
        };
        let mut engine = io::open_engine(kind, &options)?;
        let files = files.iter().map(|file| engine.attach(file));
        let files = files.collect::<Result<Vec<_>>>()?;
        let block = spec.block_bytes as usize;
        let room = block.next_multiple_of(4096);
        let mut data = AlignedBuf::new(room * depth, 4096);
        for i in 0..depth {
            fill(&mut data[i * room..i * room + block], spec.seed, queue, i);
        }
        Ok(Self {
            engine,
            files,
            span,
            block,
            pieces: (0..depth).map(|i| data.piece(i * room, block)).collect(),
            _data: data,
            events: Events::default(),
            wait: if spec.poll { Wait::Poll } else { WAIT },
        })
    }
}

impl Client for Bare {
    fn submit(&mut self, slot: usize, request: Request) -> Result<()> {
        let op = match request.kind {
            Kind::Read => IoOp::Read,
            Kind::Write => IoOp::Write,
            Kind::Flush => IoOp::Sync,
        };
        let (file, offset) = place(request.offset, self.span, self.files.len());
        let Some(file) = self.files.get(file) else {
            return Err(Error::new(ErrorKind::Io, "a request for no file"));
        };
        let len = request.bytes.min(self.block as u64);
        if op != IoOp::Sync {
            self.pieces[slot] = IoVec::new(self.pieces[slot].base(), len as usize);
        }
        let io = Io {
            file: *file,
            op,
            offset: if op == IoOp::Sync { 0 } else { offset },
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
        assert!(block.len() <= self.block);
        // SAFETY: the piece begins `self.block` bytes of `self`'s memory, and its slot has no operation.
        unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), piece.base(), block.len()) }
    }

    fn get(&mut self, slot: usize, block: &mut [u8]) {
        let piece = self.pieces[slot];
        assert!(block.len() <= self.block);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(piece.base(), block.as_mut_ptr(), block.len()) }
    }

    fn notifications(&self) -> (u64, u64) {
        let counters = self.engine.counters();
        (counters.submit_calls, counters.wait_calls)
    }
}
