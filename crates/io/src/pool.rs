//! A bounded pool of threads that make blocking calls: the `threads` engine, and for every engine the
//! calls that the kernel offers only blocking (`fallocate`, `BLKDISCARD`).
//!
//! A batch is handed over under one lock with at most one wake-up: a thread that takes a
//! task and leaves others behind wakes the next thread itself. Completions gather in a list; the
//! engine takes all of them at once, and is woken only when it sleeps.

use crate::{
    File, FileKind, IoOp,
    eventfd::Waker,
    file::GateHeld,
    queue::{Queue, Step, StepKind},
    sys,
};
use block::faults::IoType;
use block::{ErrorKind, IoVec};
use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

/// A step and who wants to know of its end.
struct Task {
    job: u32,
    file: Arc<File>,
    kind: StepKind,
    offset: u64,
    len: u64,
    iov: Pieces,
}

/// The pieces of memory of a step.
#[derive(Clone, Copy)]
struct Pieces(*const IoVec, u32);

// SAFETY: the array and the memory stay valid until the step's completion was taken from the
// list of completions, whichever thread looks at them (`Engine::stage`).
unsafe impl Send for Pieces {}

struct Done {
    job: u32,
    result: i32,
    zeroed: bool,
}

#[derive(Default)]
struct Tasks {
    queue: VecDeque<Task>,
    idle: usize,
    stop: bool,
}

struct Shared {
    tasks: Mutex<Tasks>,
    work: Condvar,
    done: Mutex<Vec<Done>>,
    has_done: AtomicBool,
    waker: Arc<Waker>,
}

impl Shared {
    fn pop(&self) -> Option<Task> {
        lock(&self.tasks).queue.pop_front()
    }

    /// Makes a task's call and reports its end.
    fn run(&self, task: Task) {
        let (result, zeroed) = match perform(&task) {
            Ok((n, zeroed)) => (n, zeroed),
            Err(e) => {
                let errno = e.raw_os_error();
                (-errno.unwrap_or_else(|| ErrorKind::of(&e).errno()), false)
            }
        };
        let job = task.job;
        // Before the completion is seen: the caller may close the file then.
        drop(task);
        lock(&self.done).push(Done {
            job,
            result,
            zeroed,
        });
        self.has_done.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// See the module's documentation. Belongs to one engine.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    threads_max: usize,
    taken: Vec<Done>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked left the lists in order: they change in single steps.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of at most `threads_max` threads, which start when they are needed. `waker` is woken
    /// when there are completions to collect.
    pub(crate) fn new(threads_max: usize, capacity: usize, waker: Arc<Waker>) -> Self {
        Self {
            shared: Arc::new(Shared {
                tasks: Mutex::new(Tasks {
                    queue: VecDeque::with_capacity(capacity),
                    ..Tasks::default()
                }),
                work: Condvar::new(),
                done: Mutex::new(Vec::with_capacity(capacity)),
                has_done: AtomicBool::new(false),
                waker,
            }),
            threads: Vec::new(),
            threads_max: threads_max.max(1),
            taken: Vec::with_capacity(capacity),
        }
    }

    /// Hands over the steps of the jobs in `jobs`.
    pub(crate) fn submit(&mut self, queue: &mut Queue, jobs: Jobs) {
        if jobs.of(queue).is_empty() {
            return;
        }
        queue.counters.submit_calls += 1;
        let (wake, missing) = {
            let mut tasks = lock(&self.shared.tasks);
            while let Some(job) = jobs.of(queue).pop_front() {
                let step = queue.step(job);
                tasks.queue.push_back(task(queue, job, step));
                queue.issued();
            }
            (tasks.idle > 0, tasks.queue.len().saturating_sub(tasks.idle))
        };
        if wake {
            self.shared.work.notify_one();
        }
        for _ in 0..missing.min(self.threads_max - self.threads.len()) {
            match spawn(&self.shared) {
                Ok(thread) => self.threads.push(thread),
                // The threads that there are will do it.
                Err(e) if !self.threads.is_empty() => {
                    tracing::warn!("cannot start another I/O thread: {e}");
                    self.threads_max = self.threads.len();
                    break;
                }
                Err(e) => {
                    // None at all: slow is better than never.
                    tracing::warn!("cannot start an I/O thread, calls block the queue: {e}");
                    while let Some(task) = self.shared.pop() {
                        self.shared.run(task);
                    }
                    break;
                }
            }
        }
    }

    /// Takes what ended since the last time.
    pub(crate) fn collect(&mut self, queue: &mut Queue) {
        if !self.shared.has_done.load(Ordering::Acquire) {
            return;
        }
        {
            let mut done = lock(&self.shared.done);
            self.shared.has_done.store(false, Ordering::Release);
            std::mem::swap(&mut *done, &mut self.taken);
        }
        for done in self.taken.drain(..) {
            queue.complete(done.job, done.result, done.zeroed);
        }
    }
}

/// Which of the queue's lists to hand over.
#[derive(Clone, Copy)]
pub(crate) enum Jobs {
    /// Everything that is ready.
    Ready,
    /// Only what no backend can do.
    Ranges,
}

impl Jobs {
    fn of(self, queue: &mut Queue) -> &mut VecDeque<u32> {
        match self {
            Jobs::Ready => &mut queue.ready,
            Jobs::Ranges => &mut queue.ready_ranges,
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.tasks).stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn task(queue: &Queue, job: u32, step: Step) -> Task {
    Task {
        job,
        file: queue.file(step.file).file.clone(),
        kind: step.kind,
        offset: step.offset,
        len: step.len,
        iov: Pieces(step.iov, step.iov_len),
    }
}

fn spawn(shared: &Arc<Shared>) -> io::Result<JoinHandle<()>> {
    let shared = shared.clone();
    thread::Builder::new()
        .name("io-worker".to_owned())
        .stack_size(256 << 10)
        .spawn(move || work(&shared))
}

fn work(shared: &Shared) {
    let mut tasks = lock(&shared.tasks);
    loop {
        let Some(task) = tasks.queue.pop_front() else {
            if tasks.stop {
                return;
            }
            tasks.idle += 1;
            tasks = shared
                .work
                .wait(tasks)
                .unwrap_or_else(PoisonError::into_inner);
            tasks.idle -= 1;
            continue;
        };
        let wake = !tasks.queue.is_empty() && tasks.idle > 0;
        drop(tasks);
        if wake {
            shared.work.notify_one();
        }
        shared.run(task);
        tasks = lock(&shared.tasks);
    }
}

fn perform(task: &Task) -> io::Result<(i32, bool)> {
    let (file, offset, len) = (&task.file, task.offset, task.len);
    let Pieces(iov, count) = task.iov;
    // At most 0x7ffff000 bytes in one call of the kernel.
    let bytes = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    match task.kind {
        StepKind::Read => file.fault(IoType::Read, offset, len)?,
        StepKind::Write => file.fault(IoType::Write, offset, len)?,
        _ => {}
    }
    match task.kind {
        StepKind::Read | StepKind::Write if file.kind() == FileKind::Remote => {
            // SAFETY: as below; an `IoVec` with its pieces is lent to the step, and to nobody else meanwhile.
            let pieces = unsafe { std::slice::from_raw_parts(iov, count as usize) };
            remote(task, pieces).map(|n| (bytes(n), false))
        }
        StepKind::Read => {
            // SAFETY: `Engine::stage` makes the caller keep and lend the memory; bounce memory is
            // the engine's, which waits for its steps before it ends.
            let n = unsafe { sys::preadv(file.raw_fd(), iov, count, offset) }?;
            Ok((bytes(n), false))
        }
        StepKind::Write => {
            // SAFETY: as above.
            let n = unsafe { sys::pwritev(file.raw_fd(), iov, count, offset) }?;
            Ok((bytes(n), false))
        }
        StepKind::Sync => file.sync_data().map(|()| (0, false)),
        // The job holds the gate (see `GateHeld`).
        StepKind::Range(IoOp::Discard) => {
            file.discard_range(offset, len, GateHeld::Yes)?;
            Ok((0, false))
        }
        StepKind::Range(IoOp::Zero { unmap, fast }) => {
            file.zero_range(offset, len, unmap, fast, true, GateHeld::Yes)?;
            Ok((0, false))
        }
        StepKind::Range(IoOp::Allocate) => {
            let zeroed = file.allocate_range(offset, len, GateHeld::Yes)?;
            Ok((0, zeroed))
        }
        StepKind::Range(_) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// Moves the bytes of a step to or from a server.
fn remote(task: &Task, pieces: &[IoVec]) -> io::Result<usize> {
    let mut done = 0;
    for piece in pieces.iter().filter(|piece| piece.len() > 0) {
        let at = task.offset + done as u64;
        if task.kind == StepKind::Read {
            // SAFETY: the memory is lent to this step alone until its completion was taken (`Engine::stage`).
            let buf = unsafe { std::slice::from_raw_parts_mut(piece.base(), piece.len()) };
            let there = task.file.read_up_to(at, buf)?;
            if there < buf.len() {
                return Ok(done + there);
            }
        } else {
            // SAFETY: as above, and it is only read.
            let data = unsafe { std::slice::from_raw_parts(piece.base(), piece.len()) };
            task.file.write_all(at, data, GateHeld::Yes)?;
        }
        done += piece.len();
    }
    Ok(done)
}
