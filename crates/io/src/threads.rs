//! The `threads` engine: every step is a blocking call of a pool's thread.

use crate::{
    EngineKind, File, FileKind,
    eventfd::Waker,
    poller::{INTERNAL, Poller},
    pool::{Jobs, Pool},
    queue::Queue,
    runner::{Backend, Sleep},
};
use block::{Error, Result};
use std::os::fd::{AsFd, BorrowedFd};

/// See the module's documentation.
pub(crate) struct Threads {
    poller: Poller,
}

impl Threads {
    pub(crate) fn new(waker: &Waker) -> Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(waker.as_fd(), INTERNAL, false, false)?;
        Ok(Self { poller })
    }
}

/// Every engine but `sim` refuses simulated files.
pub(crate) fn refuse_simulated(file: &File) -> Result<()> {
    if file.kind() == FileKind::Simulated {
        return Err(Error::invalid(
            "only the sim engine drives a simulated disk",
        ));
    }
    Ok(())
}

/// What the kernel submits has a descriptor.
pub(crate) fn refuse_remote(file: &File) -> Result<()> {
    if file.needs_threads() {
        return Err(Error::invalid(
            "only the engine 'threads' drives a disk of a server, or a file with faults",
        ));
    }
    Ok(())
}

impl Backend for Threads {
    const KIND: EngineKind = EngineKind::Threads;

    fn attach(&mut self, _slot: u16, file: &File) -> Result<()> {
        refuse_simulated(file)
    }

    fn detach(&mut self, _slot: u16) {}

    fn watch(&mut self, fd: BorrowedFd<'_>, key: u64, writable: bool) -> Result<()> {
        self.poller.add(fd, key, writable, false)
    }

    fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u64) -> Result<()> {
        self.poller.remove(fd, key)
    }

    fn push(&mut self, queue: &mut Queue, pool: &mut Pool) -> Result<()> {
        pool.submit(queue, Jobs::Ready);
        Ok(())
    }

    fn drive(
        &mut self,
        queue: &mut Queue,
        pool: &mut Pool,
        sleep: Option<Sleep>,
        ready: &mut Vec<u64>,
    ) -> Result<()> {
        let submitted = !queue.ready.is_empty();
        pool.submit(queue, Jobs::Ready);
        match sleep {
            Some(Sleep(timeout)) => self.poller.wait(timeout, ready, &mut queue.counters),
            None => self.poller.glance(submitted, ready, &mut queue.counters),
        }
    }
}
