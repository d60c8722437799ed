//! The `sim` engine: simulated disks in virtual time.
//!
//! A step takes effect when it ends, at a moment drawn from the disk's delays; so operations that are
//! in flight together end, and take effect, in any order. Virtual time jumps to the next end: a turn
//! sleeps really only when nothing is in flight, for the watched descriptors.

use super::rng::Rng;
use crate::{
    EngineKind, File, FileKind, IoOp, SimDisk,
    eventfd::Waker,
    memory::{gather, pieces, scatter},
    poller::{INTERNAL, Poller},
    pool::Pool,
    queue::{Queue, Step, StepKind},
    runner::{Backend, Sleep},
};
use block::{Error, Result};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

struct Pending {
    due_ns: u64,
    job: u32,
    step: Step,
    disk: Arc<SimDisk>,
    /// When it began, by the disk's clock.
    begun: u64,
}

/// See the module's documentation.
pub(crate) struct Sim {
    poller: Poller,
    pending: Vec<Pending>,
    now_ns: u64,
    rng: Rng,
}

impl Sim {
    pub(crate) fn new(waker: &Waker) -> Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(waker.as_fd(), INTERNAL, false, false)?;
        Ok(Self {
            poller,
            pending: Vec::new(),
            now_ns: 0,
            rng: Rng::new(0),
        })
    }

    fn submit(&mut self, queue: &mut Queue) {
        if queue.ready.is_empty() {
            return;
        }
        queue.counters.submit_calls += 1;
        while let Some(job) = queue.ready.pop_front() {
            let step = queue.step(job);
            let Some(disk) = queue.file(step.file).file.simulated().cloned() else {
                // `attach` let nothing else in.
                continue;
            };
            queue.issued();
            let (least, most) = disk.delay_ns();
            let delay = least + self.rng.below(most.saturating_sub(least) + 1);
            self.pending.push(Pending {
                due_ns: self.now_ns + delay,
                job,
                step,
                begun: disk.clock().tick(),
                disk,
            });
        }
    }

    /// Lets the next operation end.
    fn advance(&mut self, queue: &mut Queue) {
        let next = (0..self.pending.len()).min_by_key(|i| self.pending[*i].due_ns);
        if let Some(next) = next {
            let pending = self.pending.swap_remove(next);
            let passes_ns = pending.due_ns.saturating_sub(self.now_ns);
            self.now_ns = self.now_ns.max(pending.due_ns);
            if pending.disk.real_time() {
                std::thread::sleep(Duration::from_nanos(passes_ns));
            }
            let (result, zeroed) = match perform(&pending) {
                Ok(result) => result,
                Err(e) => (-e.raw_os_error().unwrap_or(libc::EIO), false),
            };
            queue.complete(pending.job, result, zeroed);
        }
    }
}

fn perform(pending: &Pending) -> io::Result<(i32, bool)> {
    let Pending {
        step, disk, begun, ..
    } = pending;
    let begun = *begun;
    // SAFETY: `Engine::stage` makes the caller keep the array until the step's completion, which
    // follows.
    let iov = unsafe { pieces(step.iov, step.iov_len) };
    let bytes = block::total_len(iov).min(step.len) as usize;
    let done = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    match step.kind {
        StepKind::Read => {
            let mut buf = vec![0; bytes];
            let n = disk.read_up_to(step.offset, &mut buf)?;
            // SAFETY: the memory is valid and lent to us; `buf` is apart from it.
            unsafe { scatter(iov, 0, buf.as_ptr(), n) };
            Ok((done(n), false))
        }
        StepKind::Write => {
            let mut buf = vec![0; bytes];
            // SAFETY: the memory is valid; `buf` is apart from it and has room.
            unsafe { gather(iov, 0, buf.as_mut_ptr(), bytes) };
            disk.write_all(step.offset, &buf, begun)?;
            Ok((done(bytes), false))
        }
        StepKind::Sync => disk.sync_data(begun).map(|()| (0, false)),
        StepKind::Range(IoOp::Discard) => {
            disk.discard_range(step.offset, step.len, begun)?;
            Ok((0, false))
        }
        StepKind::Range(IoOp::Zero { .. }) => {
            disk.zero_range(step.offset, step.len, true, begun)?;
            Ok((0, false))
        }
        StepKind::Range(_) => {
            let zeroed = disk.allocate_range(step.offset, step.len, begun)?;
            Ok((0, zeroed))
        }
    }
}

impl Backend for Sim {
    const KIND: EngineKind = EngineKind::Sim;

    fn attach(&mut self, _slot: u16, file: &File) -> Result<()> {
        match file.simulated() {
            Some(disk) if file.kind() == FileKind::Simulated => {
                // The same seeds in the same order give the same run.
                let mixed = self.rng.next() ^ disk.seed();
                self.rng = Rng::new(mixed);
                Ok(())
            }
            _ => Err(Error::invalid("the sim engine drives simulated disks only")),
        }
    }

    fn detach(&mut self, _slot: u16) {}

    fn watch(&mut self, fd: BorrowedFd<'_>, key: u64, writable: bool) -> Result<()> {
        self.poller.add(fd, key, writable, false)
    }

    fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u64) -> Result<()> {
        self.poller.remove(fd, key)
    }

    fn push(&mut self, queue: &mut Queue, _pool: &mut Pool) -> Result<()> {
        self.submit(queue);
        Ok(())
    }

    fn drive(
        &mut self,
        queue: &mut Queue,
        _pool: &mut Pool,
        sleep: Option<Sleep>,
        ready: &mut Vec<u64>,
    ) -> Result<()> {
        let submitted = !queue.ready.is_empty();
        self.submit(queue);
        if self.pending.is_empty() {
            if let Some(Sleep(timeout)) = sleep {
                return self.poller.wait(timeout, ready, &mut queue.counters);
            }
        } else if sleep.is_some() || self.rng.below(2) == 0 {
            // Who polls may find nothing.
            self.advance(queue);
        }
        self.poller.glance(submitted, ready, &mut queue.counters)
    }
}
