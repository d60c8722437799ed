//! Requests to an image in this process, with no server between: what the formats, the disk layer and the engine cost.
//!
//! The run is that of `qemu-img bench`: so many requests of one size, so many of them in flight, each a step behind the
//! one before, from the disk's end back to its beginning; writes with a flush after so many of them.

use block::{Error, GuestOffset, IoVec, Op, Result, limits};
use disk::{Disk, DiskQueue, QueueOptions, Request};
use io::memory::AlignedBuf;
use io::{Engine, EngineKind, EngineOptions, Events, Wait, Waker};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Memory that all requests in flight may have.
pub const BUFFERS_MAX: u64 = 1 << 30;
/// What direct I/O takes everywhere.
const ALIGN: usize = 4096;
/// The queue's name among the engine's users.
const TOKEN_BASE: u64 = 1 << 32;

/// What is done.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Writes instead of reads.
    pub write: bool,
    /// Requests in all.
    pub count: u64,
    /// Requests in flight.
    pub depth: u16,
    /// Bytes of each.
    pub len: u32,
    /// The first one's byte of the disk.
    pub offset: u64,
    /// Bytes from one to the next.
    pub step: u64,
    /// What is written.
    pub pattern: u8,
    /// A flush after so many requests; 0: none.
    pub flush_interval: u64,
    /// A flush waits for the requests before it, and those behind it wait for the flush.
    pub drain: bool,
}

impl Run {
    /// Whether it can be done.
    ///
    /// # Errors
    ///
    /// `Invalid`: why not.
    pub fn validate(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::invalid(what));
        let bytes = u64::from(self.depth) * u64::from(self.len);
        // One more is for a flush that does not wait.
        if self.depth == 0 || self.depth >= limits::QUEUE_DEPTH_MAX {
            return wrong(format!(
                "a depth of {}: 1 to {} requests can be in flight",
                self.depth,
                limits::QUEUE_DEPTH_MAX - 1
            ));
        }
        if self.len == 0 || u64::from(self.len) > limits::REQUEST_BYTES_MAX {
            return wrong(format!(
                "requests of {} bytes: 1 to {} are possible",
                self.len,
                limits::REQUEST_BYTES_MAX
            ));
        }
        if bytes > BUFFERS_MAX {
            return wrong(format!(
                "{} requests of {} bytes in flight: the most is {BUFFERS_MAX} bytes",
                self.depth, self.len
            ));
        }
        Ok(())
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// From the first request to the end of the last.
    pub elapsed: Duration,
    /// Reads or writes.
    pub requests: u64,
    /// Flushes between and behind them.
    pub flushes: u64,
}

/// Runs `run` on `disk`, with an engine of that kind.
///
/// # Errors
///
/// What the run or the engine cannot do, and the first request that failed (by then the others have ended too).
pub fn run(disk: &Arc<Disk>, kind: EngineKind, run: &Run) -> Result<Outcome> {
    run.validate()?;
    // One that goes beyond the end comes later, and fails; here none would fit.
    if u64::from(run.len) > disk.size() {
        return Err(Error::invalid(format!(
            "requests of {} bytes do not fit a disk of {}",
            run.len,
            disk.size()
        )));
    }
    let mut engine = io::open_engine(kind, &EngineOptions::default())?;
    let waker = Arc::new(Waker::new()?);
    engine.watch(waker.as_fd(), u64::MAX, false)?;
    let options = QueueOptions {
        depth: run.depth + 1,
        token_base: TOKEN_BASE,
        waker: Arc::clone(&waker),
    };
    let queue = DiskQueue::attach(disk, &mut *engine, options)?;
    let mut driver = Driver {
        size: disk.size(),
        at: run.offset,
        free: (0..run.depth).rev().collect(),
        memory: Memory::new(run),
        run: *run,
        queue,
        engine,
        waker,
        events: Events::default(),
        outcome: Outcome::default(),
        started: 0,
        wants_flush: false,
        flushing: 0,
        failed: None,
    };
    let begin = Instant::now();
    // A failed driver is dropped as a whole: the queue, the engine, which waits for what is under way, the memory.
    driver.drive()?;
    driver.outcome.elapsed = begin.elapsed();
    let Driver {
        queue,
        mut engine,
        outcome,
        memory,
        ..
    } = driver;
    queue.detach(&mut *engine);
    drop(engine);
    drop(memory);
    Ok(outcome)
}

/// What requests read into and write from: a piece of one buffer for each in flight.
struct Memory {
    _buffer: AlignedBuf,
    pieces: Box<[IoVec]>,
}

impl Memory {
    fn new(run: &Run) -> Self {
        let len = run.len as usize;
        let depth = usize::from(run.depth);
        let mut buffer = AlignedBuf::new(len * depth, ALIGN);
        buffer.fill(run.pattern);
        let pieces = (0..depth).map(|nth| buffer.piece(nth * len, len)).collect();
        Self {
            _buffer: buffer,
            pieces,
        }
    }
}

/// The tag of flushes; those of other requests are their pieces of memory.
const FLUSH: u64 = u64::MAX;

struct Driver {
    run: Run,
    size: u64,
    /// Where the next request goes.
    at: u64,
    /// Pieces of memory that no request has.
    free: Vec<u16>,
    queue: DiskQueue,
    engine: Box<dyn Engine>,
    waker: Arc<Waker>,
    events: Events,
    outcome: Outcome,
    started: u64,
    /// A flush is due.
    wants_flush: bool,
    /// Flushes under way.
    flushing: u32,
    failed: Option<Error>,
    /// Last: it outlives what uses it.
    memory: Memory,
}

impl Driver {
    fn in_flight(&self) -> usize {
        usize::from(self.run.depth) - self.free.len()
    }

    fn drive(&mut self) -> Result<()> {
        loop {
            if self.failed.is_none() {
                self.submit();
            }
            if self.in_flight() == 0 && self.flushing == 0 && !self.queue.is_busy() {
                return self.failed.take().map_or(Ok(()), Err);
            }
            self.turn()?;
        }
    }

    fn submit(&mut self) {
        loop {
            if self.wants_flush && self.flushing == 0 && (!self.run.drain || self.in_flight() == 0)
            {
                self.wants_flush = false;
                self.flushing += 1;
                self.start(Op::Flush, 0, None);
            }
            let waits = self.run.drain && (self.wants_flush || self.flushing > 0);
            // Flushes that do not wait for each other would have no room.
            let waits = waits || self.wants_flush;
            if waits || self.started == self.run.count {
                return;
            }
            let Some(nth) = self.free.pop() else { return };
            let op = match self.run.write {
                true => Op::Write { fua: false },
                false => Op::Read,
            };
            let at = self.at;
            self.at = match self.size {
                0 => 0,
                size => self.at.saturating_add(self.run.step) % size,
            };
            self.started += 1;
            let left = self.run.count - self.started;
            self.wants_flush =
                self.run.flush_interval > 0 && left.is_multiple_of(self.run.flush_interval);
            self.start(op, at, Some(nth));
        }
    }

    /// Starts a request; `nth` is its piece of memory.
    fn start(&mut self, op: Op, at: u64, nth: Option<u16>) {
        let piece = nth.and_then(|nth| self.memory.pieces.get(usize::from(nth)));
        let request = Request {
            op,
            at: GuestOffset(at),
            len: piece.map_or(0, |_| u64::from(self.run.len)),
            iov: piece.map_or(std::ptr::null(), std::ptr::from_ref),
            iov_len: u32::from(piece.is_some()),
            tag: nth.map_or(FLUSH, u64::from),
            arrived_ns: 0,
            seen_ns: disk::now_ns(),
            parsed_ns: 0,
        };
        // SAFETY: pieces and buffer are dropped behind the queue and the engine, and a piece is used by one
        // request at a time: its number comes back into `free` with the request's end.
        let taken = unsafe { self.queue.submit(&mut *self.engine, request) };
        if taken.is_err() {
            // There is a slot for each piece of memory and one for a flush.
            self.end(request.tag, Err(Error::invalid("the queue has no room")));
        }
    }

    fn turn(&mut self) -> Result<()> {
        self.queue.advance(&mut *self.engine);
        let mut ended = self.take();
        let wait = match !ended && self.waker.prepare_sleep() {
            true => Wait::Forever,
            false => Wait::Poll,
        };
        self.engine.turn(wait, &mut self.events)?;
        self.waker.awake();
        for completion in self.events.completions.drain(..) {
            self.queue.completed(&mut *self.engine, &completion);
        }
        self.events.ready.clear();
        self.queue.advance(&mut *self.engine);
        ended |= self.take();
        if ended {
            self.queue.notified(None);
        }
        Ok(())
    }

    /// Takes what ended; whether anything did.
    fn take(&mut self) -> bool {
        let mut any = false;
        while let Some(done) = self.queue.done() {
            any = true;
            let result = done.result.map_err(|error| {
                Error::new(block::ErrorKind::Io, format!("a request failed: {error}"))
            });
            self.end(done.tag, result);
        }
        any
    }

    fn end(&mut self, tag: u64, result: Result<()>) {
        if let Err(error) = result {
            self.failed.get_or_insert(error);
        }
        match u16::try_from(tag) {
            Ok(nth) => {
                self.free.push(nth);
                self.outcome.requests += 1;
            }
            Err(_) => {
                self.flushing -= 1;
                self.outcome.flushes += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk::{Chain, ChainOptions, DiskOptions};

    fn outcome(path: &std::path::Path, run_: &Run) -> Result<Outcome> {
        let options = ChainOptions {
            format: Some(image::Format::Raw),
            read_only: !run_.write,
            ..ChainOptions::default()
        };
        let chain = Chain::open(path.to_str().unwrap(), &options).unwrap();
        let options = DiskOptions {
            read_only: !run_.write,
            ..DiskOptions::default()
        };
        let disk = Disk::new(chain, options).unwrap();
        let outcome = run(&disk, EngineKind::Threads, run_)?;
        disk.close().unwrap();
        Ok(outcome)
    }

    #[test]
    fn requests_go_from_the_end_to_the_beginning_and_flushes_between() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 10).unwrap();
        let run = Run {
            write: true,
            count: 10,
            depth: 4,
            len: 4096,
            offset: 48 << 10,
            step: 8192,
            pattern: 7,
            flush_interval: 4,
            drain: true,
        };
        let found = outcome(file.path(), &run).unwrap();
        assert_eq!((found.requests, found.flushes), (10, 3));
        let bytes = std::fs::read(file.path()).unwrap();
        for (nth, piece) in bytes.chunks(4096).enumerate() {
            let want = if nth % 2 == 0 { 7 } else { 0 };
            assert!(piece.iter().all(|byte| *byte == want), "piece {nth}");
        }
        let drained = Run {
            drain: false,
            ..run
        };
        let found = outcome(file.path(), &drained).unwrap();
        assert_eq!((found.requests, found.flushes), (10, 3));
        // The last one goes beyond the end.
        let beyond = Run {
            write: false,
            offset: (64 << 10) - 512,
            count: 1,
            flush_interval: 0,
            ..run
        };
        let error = outcome(file.path(), &beyond).unwrap_err().to_string();
        assert!(error.contains("a request failed"), "{error}");
        for wrong in [Run { depth: 0, ..run }, Run { len: 0, ..run }] {
            assert!(wrong.validate().is_err());
        }
    }
}
