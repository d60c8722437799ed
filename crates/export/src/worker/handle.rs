//! Starting a worker, reaching it from other threads, ending it.

use super::{
    cx::Cx,
    poll::{For, Poll},
};
use block::{Context, Error, ErrorKind, Result};
use io::{EngineKind, EngineOptions, Events, Wait, Waker};
use std::{
    fmt,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// When a worker looks for work again rather than sleeping until it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// While the next event mostly comes within so many nanoseconds; 0: never.
    Adaptive {
        /// The longest look while operations are in flight, in nanoseconds.
        device_ns: u64,
        /// The longest look while only clients are waited for, in nanoseconds.
        client_ns: u64,
    },
    /// As long as it has a session: a core for the lowest latency.
    Always,
}

impl Polling {
    /// Sleeps whenever there is nothing to do.
    pub const OFF: Self = Polling::Adaptive {
        device_ns: 0,
        client_ns: 0,
    };

    /// What [`Polling::default`] is up to.
    pub const DEFAULT_US: u64 = 32;

    /// Up to `max_us` microseconds for clients, half of that for devices.
    pub fn up_to(max_us: u64) -> Self {
        let client_ns = max_us.saturating_mul(1000);
        Polling::Adaptive {
            device_ns: client_ns / 2,
            client_ns,
        }
    }
}

impl Default for Polling {
    /// 32 µs for clients, as QEMU's I/O threads; 16 µs for devices: a fast one's next answer at some depth, and far less
    /// than a read takes alone.
    fn default() -> Self {
        Self::up_to(Self::DEFAULT_US)
    }
}

/// Calls that may wait in a mailbox: far more than control threads make, so that only
/// a stuck worker ever refuses one.
const CALLS_MAX: usize = 4096;

/// How a worker runs.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// The worker's number, for its name and for spreading queues.
    pub index: usize,
    /// Which engine it owns.
    pub engine: EngineKind,
    /// How that engine is made.
    pub engine_options: EngineOptions,
    /// When it polls.
    pub polling: Polling,
}

impl WorkerOptions {
    /// Worker `index` with a default engine of `kind`.
    pub fn new(index: usize, kind: EngineKind) -> Self {
        Self {
            index,
            engine: kind,
            engine_options: EngineOptions::default(),
            polling: Polling::default(),
        }
    }
}

type Call = Box<dyn FnOnce(&mut Cx) + Send>;

struct Mailbox {
    calls: Vec<Call>,
    closed: bool,
}

struct Shared {
    index: usize,
    waker: Arc<Waker>,
    mailbox: Mutex<Mailbox>,
    /// The mailbox holds something; spares the thread the lock in each turn.
    pending: AtomicBool,
    stopping: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    /// The mailbox; a panic in another thread leaves a `Vec` of whole calls behind.
    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An I/O thread. Reached through its [`WorkerHandle`].
pub struct Worker {
    shared: Arc<Shared>,
    cx: Cx,
    poll: Poll,
    events: Events,
    calls: Vec<Call>,
    stopping: bool,
}

/// Reaches a worker from other threads. Clones reach the same one.
#[derive(Clone)]
pub struct WorkerHandle(Arc<Shared>);

impl fmt::Debug for WorkerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WorkerHandle({})", self.0.index)
    }
}

impl Worker {
    /// Starts a thread and returns when its engine works.
    ///
    /// # Errors
    ///
    /// When the thread or its engine cannot be made.
    pub fn spawn(options: WorkerOptions) -> Result<WorkerHandle> {
        let index = options.index;
        let shared = Arc::new(Shared {
            index,
            waker: Arc::new(Waker::new()?),
            mailbox: Mutex::new(Mailbox {
                calls: Vec::new(),
                closed: false,
            }),
            pending: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            thread: Mutex::new(None),
        });
        let (started, start) = mpsc::sync_channel(1);
        let of_thread = shared.clone();
        let thread = thread::Builder::new()
            .name(format!("io-{index}"))
            .spawn(move || match Worker::new(of_thread.clone(), &options) {
                Ok(mut worker) => {
                    let _ = started.send(Ok(()));
                    worker.main();
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            })
            .context(|| format!("start I/O thread {index}"))?;
        let result = start
            .recv()
            .unwrap_or_else(|_| Err(gone(index)))
            .context(|| format!("I/O thread {index}"));
        if let Err(error) = result {
            let _ = thread.join();
            return Err(error);
        }
        *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(WorkerHandle(shared))
    }

    fn new(shared: Arc<Shared>, options: &WorkerOptions) -> Result<Self> {
        let mut engine = io::open_engine(options.engine, &options.engine_options)?;
        // Key 0 belongs to no session: the waker's only job is to end the wait.
        engine.watch(shared.waker.as_fd(), 0, false)?;
        // Room for what one turn can bring, so that no later turn has to make it.
        let events = Events {
            completions: Vec::with_capacity(engine.capacity()),
            ready: Vec::with_capacity(64),
        };
        Ok(Self {
            cx: Cx::new(engine, shared.waker.clone(), shared.index),
            shared,
            poll: Poll::new(options.polling),
            events,
            calls: Vec::new(),
            stopping: false,
        })
    }

    fn main(&mut self) {
        while !self.finished() {
            let called = self.take_calls();
            let worked = self.cx.run() | called;
            self.turn(worked);
        }
        let left = {
            let mut mailbox = self.shared.mailbox();
            mailbox.closed = true;
            std::mem::take(&mut mailbox.calls)
        };
        // Dropped outside the lock: whoever waits for one of them learns that the thread ended.
        drop(left);
    }

    fn finished(&mut self) -> bool {
        if !self.stopping && self.shared.stopping.load(Ordering::Acquire) {
            self.stopping = true;
            self.cx.stop_all();
        }
        self.stopping
            && self.cx.session_count() == 0
            && self.cx.engine.in_flight() == 0
            && !self.shared.pending.load(Ordering::Acquire)
    }

    /// Runs what other threads handed over.
    fn take_calls(&mut self) -> bool {
        if !self.shared.pending.swap(false, Ordering::Acquire) {
            return false;
        }
        std::mem::swap(&mut self.shared.mailbox().calls, &mut self.calls);
        for call in self.calls.drain(..) {
            call(&mut self.cx);
        }
        true
    }

    /// Submits, waits as long as it makes sense, hands out what happened.
    fn turn(&mut self, worked: bool) {
        let ending =
            self.stopping && self.cx.session_count() == 0 && self.cx.engine.in_flight() == 0;
        let mut sleeps = false;
        let asleep = !ending && !self.polls_on(worked) && self.cx.idle();
        let waker = &self.shared.waker;
        if asleep {
            sleeps = waker.prepare_sleep();
            if sleeps {
                self.poll.sleeps(self.waits_for());
            } else {
                self.cx.wake_all();
            }
        }
        let wait = if sleeps { Wait::Forever } else { Wait::Poll };
        // Sessions whose operations it had no room for hear of room that others make.
        let full = self.cx.engine.in_flight() >= self.cx.engine.capacity();
        let result = self.cx.engine.turn(wait, &mut self.events);
        // A wake-up does not say which disk queue it is for, so all of them look.
        let woken = if sleeps { waker.awake() } else { waker.take() };
        if woken || (full && !self.events.completions.is_empty()) {
            self.cx.wake_all();
        }
        if let Err(error) = result {
            // Nothing can be done about it here, and the requests in flight may still end:
            // keep going, but neither spin nor fill the log.
            tracing::error!(worker = self.shared.index, %error, "engine failed");
            thread::sleep(Duration::from_millis(100));
        }
        if !self.events.ready.is_empty() {
            self.cx.woken_ns = disk::now_ns();
        }
        for completion in self.events.completions.drain(..) {
            self.cx.completed(&completion);
        }
        for key in self.events.ready.drain(..) {
            self.cx.ready(key);
        }
    }

    fn polls_on(&mut self, worked: bool) -> bool {
        match self.poll.fixed() {
            // With nobody to look for, even who polls for ever sleeps.
            Some(always) => always && self.cx.session_count() > 0,
            None => {
                let now_ns = disk::now_ns();
                if worked {
                    self.poll.active(now_ns);
                }
                self.poll.goes_on(now_ns, self.waits_for())
            }
        }
    }

    fn waits_for(&self) -> For {
        if self.cx.engine.in_flight() > 0 {
            For::Device
        } else {
            For::Client
        }
    }
}

fn gone(index: usize) -> Error {
    Error::new(ErrorKind::Io, format!("I/O thread {index} has ended"))
}

impl WorkerHandle {
    /// The worker's number.
    pub fn index(&self) -> usize {
        self.0.index
    }

    /// Wakes the worker: every session is run.
    pub fn waker(&self) -> &Arc<Waker> {
        &self.0.waker
    }

    /// Runs `call` on the worker's thread, soon.
    ///
    /// # Errors
    ///
    /// When the worker has ended, or is so stuck that its mailbox is full.
    pub fn call(&self, call: Box<dyn FnOnce(&mut Cx) + Send>) -> Result<()> {
        {
            let mut mailbox = self.0.mailbox();
            if mailbox.closed {
                return Err(gone(self.0.index));
            }
            if mailbox.calls.len() >= CALLS_MAX {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("I/O thread {} does not take its calls", self.0.index),
                ));
            }
            mailbox.calls.push(call);
        }
        self.0.pending.store(true, Ordering::Release);
        self.0.waker.wake();
        Ok(())
    }

    /// Runs `call` on the worker's thread and waits for what it returns.
    ///
    /// # Errors
    ///
    /// As [`WorkerHandle::call`]. Must not be used on a worker's thread: it would wait for itself,
    /// or two would wait for each other.
    pub fn call_wait<R: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Cx) -> R + Send + 'static,
    ) -> Result<R> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.call(Box::new(move |cx| {
            let _ = sender.send(call(cx));
        }))?;
        receiver.recv().map_err(|_| gone(self.0.index))
    }

    /// Ends the worker: its sessions are told to stop, and when the last is closed and
    /// nothing is in flight, the thread ends; waits for that.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.waker.wake();
        let thread = self
            .0
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(worker = self.0.index, "I/O thread panicked");
        }
    }
}
