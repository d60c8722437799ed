//! Several queues of a disk on one thread, in virtual time.

use crate::random::Random;
use crate::script::{Ask, Request};
use block::{GuestOffset, IoVec, Op};
use disk::{Disk, DiskQueue, QueueOptions};
use io::{Engine, EngineKind, EngineOptions, Events, Wait, Waker};
use std::collections::HashMap;
use std::sync::Arc;

/// Requests that a queue has in flight at most.
const DEPTH: u16 = 16;
/// Turns in a row without an end after which the queues count as hanging. One operation ends in two turns.
const TURNS_MAX: u32 = 100_000;

/// A request in flight: its memory must outlive it.
struct Running {
    bytes: Vec<u8>,
    _piece: Box<IoVec>,
}

/// What ended.
pub(crate) struct Ended {
    pub tag: u64,
    pub ok: bool,
    /// What was read; what was written.
    pub bytes: Vec<u8>,
}

struct Queue {
    engine: Box<dyn Engine>,
    queue: DiskQueue,
    running: HashMap<u64, Running>,
}

/// The queues.
pub(crate) struct Queues {
    pub disk: Arc<Disk>,
    queues: Vec<Queue>,
    /// The queue that requests go to; without one, any.
    pub favourite: Option<usize>,
    events: Events,
    next: u64,
}

impl Queues {
    pub fn new(disk: Arc<Disk>, count: usize) -> block::Result<Self> {
        let mut queues = Vec::new();
        for n in 0..count as u64 {
            let mut engine = io::open_engine(EngineKind::Sim, &EngineOptions::default())?;
            let options = QueueOptions {
                depth: DEPTH,
                token_base: (n + 1) << 32,
                waker: Arc::new(Waker::new()?),
            };
            queues.push(Queue {
                queue: DiskQueue::attach(&disk, &mut *engine, options)?,
                engine,
                running: HashMap::new(),
            });
        }
        Ok(Self {
            disk,
            queues,
            favourite: None,
            events: Events::default(),
            next: 0,
        })
    }

    pub fn in_flight(&self) -> usize {
        self.queues.iter().map(|q| q.running.len()).sum()
    }

    /// Submits to one of the queues, or says that none has room. Returns the request's tag.
    pub fn submit(
        &mut self,
        random: &mut Random,
        request: Request,
        mut bytes: Vec<u8>,
    ) -> Option<u64> {
        let any = random.below(self.queues.len() as u64) as usize;
        let Queue {
            engine,
            queue,
            running,
        } = &mut self.queues[self.favourite.unwrap_or(any)];
        if running.len() >= usize::from(DEPTH) {
            return None;
        }
        let op = match request.ask {
            Ask::Write { fua } => Op::Write { fua },
            Ask::Zero { unmap } => Op::WriteZeroes {
                unmap,
                fast: false,
                fua: false,
            },
            Ask::Discard => Op::Discard,
            Ask::Flush => Op::Flush,
            Ask::Read => Op::Read,
        };
        let piece = Box::new(IoVec::from_mut(&mut bytes));
        let (iov, iov_len) = match op.has_data() {
            true => (&raw const *piece, 1),
            false => (std::ptr::null(), 0),
        };
        let tag = self.next;
        self.next += 1;
        let request = disk::Request {
            op,
            at: GuestOffset(request.at),
            len: request.len,
            iov,
            iov_len,
            tag,
            arrived_ns: 0,
            seen_ns: disk::now_ns(),
            parsed_ns: 0,
        };
        // SAFETY: bytes and piece stay in `running` until the request's `Done` was taken.
        let taken = unsafe { queue.submit(&mut **engine, request) };
        assert!(taken.is_ok(), "fewer are in flight than the queue takes");
        let running_now = Running {
            bytes,
            _piece: piece,
        };
        running.insert(tag, running_now);
        Some(tag)
    }

    /// A turn of one of the queues: what ended.
    pub fn turn(&mut self, random: &mut Random) -> block::Result<Vec<Ended>> {
        let nth = random.below(self.queues.len() as u64) as usize;
        let Queue {
            engine,
            queue,
            running,
        } = &mut self.queues[nth];
        queue.advance(&mut **engine);
        engine.turn(Wait::Poll, &mut self.events)?;
        for completion in self.events.completions.drain(..) {
            queue.completed(&mut **engine, &completion);
        }
        self.events.ready.clear();
        queue.advance(&mut **engine);
        queue.notified(None);
        let mut ended = Vec::new();
        while let Some(done) = queue.done() {
            let running = running.remove(&done.tag).expect("ends once");
            ended.push(Ended {
                tag: done.tag,
                ok: done.result.is_ok(),
                bytes: running.bytes,
            });
        }
        Ok(ended)
    }

    /// Turns until something ended, or nothing is at work any more.
    pub fn some(&mut self, random: &mut Random) -> block::Result<Vec<Ended>> {
        for _ in 0..TURNS_MAX {
            let ended = self.turn(random)?;
            if !ended.is_empty() || !self.queues.iter().any(|q| q.queue.is_busy()) {
                return Ok(ended);
            }
        }
        let queues: Vec<_> = self.queues.iter().map(|q| &q.queue).collect();
        panic!("the queues hang: {queues:#?}");
    }

    /// Lets all that is at work come to its end: what ended.
    pub fn drain(&mut self, random: &mut Random) -> block::Result<Vec<Ended>> {
        let mut ended = Vec::new();
        while self.queues.iter().any(|q| q.queue.is_busy()) {
            ended.extend(self.some(random)?);
        }
        Ok(ended)
    }

    /// Detaches all, with nothing at work.
    pub fn detach(self) -> Arc<Disk> {
        for mut queue in self.queues {
            queue.queue.detach(&mut *queue.engine);
        }
        self.disk
    }
}
