//! The turn of an engine, the same for all backends.

use crate::{
    Counters, Engine, EngineKind, EngineOptions, Events, File, FileSlot, Io, Wait,
    eventfd::Waker,
    pool::{Jobs, Pool},
    queue::Queue,
};
use block::Result;
use std::{
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

/// Threads for `fallocate` and the like beside an engine that does the rest itself: file systems
/// serialise these calls per file anyway.
const RANGE_THREADS_MAX: usize = 4;

/// How long a backend may sleep: `None` without limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sleep(pub(crate) Option<Duration>);

/// What differs between engines: how steps reach the kernel and how their end is seen.
pub(crate) trait Backend {
    /// Which engine this makes.
    const KIND: EngineKind;

    /// Refuses a file that the backend cannot do, or prepares for it.
    fn attach(&mut self, slot: u16, file: &File) -> Result<()>;

    /// The slot is free again.
    fn detach(&mut self, slot: u16);

    /// See [`Engine::watch`].
    fn watch(&mut self, fd: BorrowedFd<'_>, key: u64, writable: bool) -> Result<()>;

    /// See [`Engine::unwatch`].
    fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u64) -> Result<()>;

    /// Submits the jobs in `queue.ready` and does nothing else. See [`Engine::push`].
    fn push(&mut self, queue: &mut Queue, pool: &mut Pool) -> Result<()>;

    /// Submits the jobs in `queue.ready`, sleeps if told to until something ends or a watched
    /// descriptor is ready, and completes what ended.
    fn drive(
        &mut self,
        queue: &mut Queue,
        pool: &mut Pool,
        sleep: Option<Sleep>,
        ready: &mut Vec<u64>,
    ) -> Result<()>;
}

/// An engine made of a backend.
pub(crate) struct Runner<B: Backend> {
    // Declared first, dropped first: the ring must not outlive the memory that it works on.
    backend: B,
    pool: Pool,
    queue: Queue,
    waker: Arc<Waker>,
}

impl<B: Backend> Runner<B> {
    /// `make` gets the waker, whose descriptor the backend watches for itself.
    pub(crate) fn new(
        options: &EngineOptions,
        make: impl FnOnce(&Waker) -> Result<B>,
    ) -> Result<Self> {
        let waker = Arc::new(Waker::new()?);
        let threads = match B::KIND {
            EngineKind::Threads => options.threads,
            _ => options.threads.min(RANGE_THREADS_MAX),
        };
        Ok(Self {
            backend: make(&waker)?,
            pool: Pool::new(threads, options.depth, waker.clone()),
            queue: Queue::new(options.depth),
            waker,
        })
    }

    fn once(&mut self, sleep: Option<Sleep>, ready: &mut Vec<u64>) -> Result<bool> {
        // A wake that came so far is about what the next lines look at.
        self.waker.take();
        let running = self.queue.running;
        self.pool.collect(&mut self.queue);
        let collected = self.queue.running != running;
        self.queue.begin();
        self.pool.submit(&mut self.queue, Jobs::Ranges);
        let sleep = sleep.filter(|_| {
            !collected
                && !self.queue.has_finished()
                && self.queue.arm_gates(&self.waker)
                && self.waker.prepare_sleep()
        });
        let result = self
            .backend
            .drive(&mut self.queue, &mut self.pool, sleep, ready);
        if sleep.is_some() {
            self.waker.awake();
        }
        result?;
        self.pool.collect(&mut self.queue);
        Ok(sleep.is_some())
    }
}

impl<B: Backend> Engine for Runner<B> {
    fn kind(&self) -> EngineKind {
        B::KIND
    }

    fn attach(&mut self, file: &Arc<File>) -> Result<FileSlot> {
        let slot = self.queue.attach(file)?;
        if let Err(e) = self.backend.attach(slot, file) {
            self.queue.detach(slot);
            return Err(e.within(file.path().display()));
        }
        Ok(FileSlot(slot))
    }

    fn detach(&mut self, slot: FileSlot) {
        self.backend.detach(slot.0);
        self.queue.detach(slot.0);
    }

    unsafe fn stage(&mut self, io: Io) -> bool {
        self.queue.stage(io)
    }

    fn capacity(&self) -> usize {
        self.queue.capacity()
    }

    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, key: u64, writable: bool) -> Result<()> {
        self.backend.watch(fd, key, writable)
    }

    fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u64) -> Result<()> {
        self.backend.unwatch(fd, key)
    }

    fn push(&mut self) {
        self.queue.begin();
        if !self.queue.ready.is_empty() {
            // What is wrong stays wrong, and what was not taken stays ready: the next turn says it.
            let _ = self.backend.push(&mut self.queue, &mut self.pool);
        }
    }

    fn turn(&mut self, wait: Wait, events: &mut Events) -> Result<()> {
        let before = (events.completions.len(), events.ready.len());
        let deadline = match wait {
            // So far in the future that it does not fit: no limit.
            Wait::For(limit) => Instant::now().checked_add(limit),
            _ => None,
        };
        let mut slept_out = false;
        loop {
            let sleep = match (wait, deadline) {
                (Wait::Poll, _) => None,
                (_, Some(at)) => {
                    let left = at.saturating_duration_since(Instant::now());
                    slept_out = left.is_zero();
                    Some(Sleep(Some(left)))
                }
                (_, None) => Some(Sleep(None)),
            };
            let slept = self.once(sleep, &mut events.ready)?;
            self.queue.drain(&mut events.completions);
            let progress = (events.completions.len(), events.ready.len()) != before;
            if progress || wait == Wait::Poll || (slept_out && slept) {
                return Ok(());
            }
        }
    }

    fn counters(&self) -> Counters {
        self.queue.counters
    }
}

impl<B: Backend> Drop for Runner<B> {
    /// Waits until the kernel and the threads are done with the callers' memory.
    fn drop(&mut self) {
        self.queue.close();
        let mut ready = Vec::new();
        let mut failures = 0;
        while self.queue.running > 0 {
            if let Err(e) = self.once(Some(Sleep(None)), &mut ready) {
                failures += 1;
                if failures > 100 {
                    // Going on would let the kernel write into memory that is somebody else's.
                    tracing::error!("an engine cannot wait for its I/O: {e}");
                    std::process::abort();
                }
            }
            ready.clear();
        }
    }
}
