//! The `native` engine: Linux AIO, one `io_submit` per batch.
//!
//! Completions are read in user space from the ring that the kernel maps at the context's address
//! (`struct aio_ring`); the kernel signals an eventfd for each, which is watched edge-triggered
//! and never read, so that only sleeping costs a call (`epoll_wait`).
//!
//! ```text
//!   context ─▶ u32 id │ nr │ head │ tail │ magic 0xa10a10a1 │ compat │ incompat │ header_length
//!              io_event[nr]   data u64, obj u64, res i64, res2 i64
//! ```
//!
//! `io_submit` on a buffered file blocks until the transfer is done: such files are refused, as in
//! QEMU (`aio=native requires cache.direct=on`).

use crate::{
    EngineKind, EngineOptions, File,
    eventfd::{EventFd, Waker},
    poller::{INTERNAL, Poller},
    pool::Pool,
    queue::{Queue, StepKind},
    runner::{Backend, Sleep},
    threads::{refuse_remote, refuse_simulated},
};
use block::{Error, Result};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

const IOCB_CMD_FDSYNC: u16 = 3;
const IOCB_CMD_PREADV: u16 = 7;
const IOCB_CMD_PWRITEV: u16 = 8;
const IOCB_FLAG_RESFD: u32 = 1;
const RING_MAGIC: u32 = 0xa10a_10a1;

/// `struct iocb`, in the layout of little-endian machines (`aio_key` and `aio_rw_flags`, both
/// unused here, change places on the others).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    reqprio: i16,
    fildes: u32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved2: u64,
    flags: u32,
    resfd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

#[repr(C)]
struct RingHeader {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

const _: () = assert!(size_of::<Iocb>() == 64 && size_of::<IoEvent>() == 32);
const _: () = assert!(size_of::<RingHeader>() == 32);

/// An AIO context; destroyed when dropped, after what is in flight has ended.
struct AioContext(u64);

impl AioContext {
    fn new(depth: usize) -> io::Result<Self> {
        let mut id: u64 = 0;
        // SAFETY: io_setup writes the context's name to `id`, which must be zero before.
        let ret = unsafe { libc::syscall(libc::SYS_io_setup, depth as libc::c_uint, &raw mut id) };
        if ret < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(id))
    }

    /// The completion ring, where it has the layout that this code knows.
    fn ring(&self) -> Option<&RingHeader> {
        // SAFETY: the kernel maps a page at least at the context's address, as long as it exists.
        let ring = unsafe { &*(self.0 as *const RingHeader) };
        (ring.magic == RING_MAGIC
            && ring.incompat_features == 0
            && ring.header_length as usize == size_of::<RingHeader>()
            && ring.nr > 0)
            .then_some(ring)
    }

    /// Takes the next completion out of the mapped ring.
    fn next(&self, ring: &RingHeader) -> Option<IoEvent> {
        // Only this thread moves the head.
        let head = ring.head.load(Ordering::Relaxed);
        // Acquire: the event is read after the tail that covers it.
        if head == ring.tail.load(Ordering::Acquire) || head >= ring.nr {
            return None;
        }
        let events = self.0 as usize + size_of::<RingHeader>();
        // SAFETY: `head < nr`, and the kernel mapped `nr` events behind the header.
        let event = unsafe { *(events as *const IoEvent).add(head as usize) };
        // Release: the kernel reuses the place only after it was read.
        ring.head.store((head + 1) % ring.nr, Ordering::Release);
        Some(event)
    }

    /// `io_getevents` without waiting, where the ring cannot be read.
    fn get_events(&self, events: &mut [IoEvent]) -> io::Result<usize> {
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `events` has room for as many as are asked for.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                0 as libc::c_long,
                events.len() as libc::c_long,
                events.as_mut_ptr(),
                &raw const none,
            )
        };
        usize::try_from(ret).map_err(|_| io::Error::last_os_error())
    }

    /// `io_submit`; how many it took.
    ///
    /// # Safety
    ///
    /// The pointers are to control blocks that stay in place during the call, and what these
    /// refer to is valid until the completion.
    unsafe fn submit(&self, iocbs: &mut [*mut Iocb]) -> io::Result<usize> {
        // SAFETY: the caller's promise; the kernel reads `len` pointers.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.0,
                iocbs.len() as libc::c_long,
                iocbs.as_mut_ptr(),
            )
        };
        usize::try_from(ret).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for AioContext {
    fn drop(&mut self) {
        // SAFETY: destroys our own context; waits for its operations.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

/// See the module's documentation.
pub(crate) struct Native {
    context: AioContext,
    poller: Poller,
    signal: EventFd,
    fds: Vec<RawFd>,
    /// One per job.
    iocbs: Vec<Iocb>,
    /// The batch: pointers into `iocbs`.
    batch: Vec<*mut Iocb>,
    /// Steps that the context has.
    running: usize,
}

impl Native {
    pub(crate) fn new(options: &EngineOptions, waker: &Waker) -> Result<Self> {
        let depth = options.depth.clamp(1, 1 << 16);
        let context = AioContext::new(depth).map_err(|e| match e.raw_os_error() {
            Some(libc::EAGAIN) => Error::os(
                format!("Linux AIO for {depth} operations: raise the sysctl fs.aio-max-nr"),
                e,
            ),
            Some(libc::ENOSYS) => Error::unsupported("the kernel has no Linux AIO"),
            _ => Error::os("io_setup", e),
        })?;
        let signal = EventFd::new()?;
        let mut poller = Poller::new()?;
        poller.add(waker.as_fd(), INTERNAL, false, false)?;
        poller.add(signal.as_fd(), INTERNAL, false, true)?;
        Ok(Self {
            context,
            poller,
            signal,
            fds: Vec::new(),
            iocbs: vec![Iocb::default(); depth],
            batch: Vec::with_capacity(depth),
            running: 0,
        })
    }

    /// Submits what is ready: one call, more only where the kernel takes a part.
    fn submit(&mut self, queue: &mut Queue) -> Result<()> {
        self.batch.clear();
        for &job in &queue.ready {
            let step = queue.step(job);
            let opcode = match step.kind {
                StepKind::Read => IOCB_CMD_PREADV,
                StepKind::Write => IOCB_CMD_PWRITEV,
                // Ranges never come here: they are the pool's.
                StepKind::Sync | StepKind::Range(_) => IOCB_CMD_FDSYNC,
            };
            let sync = opcode == IOCB_CMD_FDSYNC;
            let iocb = &mut self.iocbs[job as usize];
            *iocb = Iocb {
                data: u64::from(job),
                opcode,
                fildes: self.fds[usize::from(step.file)] as u32,
                buf: if sync { 0 } else { step.iov as u64 },
                nbytes: if sync { 0 } else { u64::from(step.iov_len) },
                offset: if sync { 0 } else { step.offset as i64 },
                flags: IOCB_FLAG_RESFD,
                resfd: self.signal.as_fd().as_raw_fd() as u32,
                ..Iocb::default()
            };
            self.batch.push(iocb);
        }
        let mut from = 0;
        while from < self.batch.len() {
            queue.counters.submit_calls += 1;
            // SAFETY: the control blocks are ours and stay in place; `Engine::stage` makes callers
            // keep arrays and memory, bounce memory is the queue's.
            match unsafe { self.context.submit(&mut self.batch[from..]) } {
                Ok(n) => {
                    for _ in 0..n {
                        queue.ready.pop_front();
                        queue.issued();
                    }
                    self.running += n;
                    from += n;
                    if n == 0 {
                        return Ok(());
                    }
                }
                Err(e) => match e.raw_os_error() {
                    // The context is full, or memory short: what runs must end first.
                    Some(libc::EAGAIN) => return Ok(()),
                    Some(libc::EINTR) => {}
                    Some(errno) => {
                        // The first one's fault, and only its: the others go on.
                        let Some(job) = queue.ready.pop_front() else {
                            return Ok(());
                        };
                        queue.issued();
                        queue.complete(job, -errno, false);
                        from += 1;
                    }
                    None => return Err(Error::os("io_submit", e)),
                },
            }
        }
        Ok(())
    }

    /// Completes what ended.
    fn reap(&mut self, queue: &mut Queue) -> Result<()> {
        if self.running == 0 {
            return Ok(());
        }
        if let Some(ring) = self.context.ring() {
            while let Some(event) = self.context.next(ring) {
                self.running -= 1;
                complete(queue, &event);
            }
            return Ok(());
        }
        let mut events = [IoEvent::default(); 64];
        loop {
            queue.counters.wait_calls += 1;
            let n = match self.context.get_events(&mut events) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::os("io_getevents", e)),
            };
            for event in &events[..n] {
                self.running -= 1;
                complete(queue, event);
            }
            if n < events.len() {
                return Ok(());
            }
        }
    }
}

fn complete(queue: &mut Queue, event: &IoEvent) {
    let result =
        i32::try_from(event.res).unwrap_or(if event.res < 0 { -libc::EIO } else { i32::MAX });
    queue.complete(event.data as u32, result, false);
}

impl Backend for Native {
    const KIND: EngineKind = EngineKind::Native;

    fn attach(&mut self, slot: u16, file: &File) -> Result<()> {
        refuse_simulated(file)?;
        refuse_remote(file)?;
        if !file.direct() {
            return Err(Error::unsupported(
                "Linux AIO needs O_DIRECT: use --cache none or directsync, or --aio threads or io_uring",
            ));
        }
        let index = usize::from(slot);
        if self.fds.len() <= index {
            self.fds.resize(index + 1, -1);
        }
        self.fds[index] = file.raw_fd();
        Ok(())
    }

    fn detach(&mut self, slot: u16) {
        if let Some(fd) = self.fds.get_mut(usize::from(slot)) {
            *fd = -1;
        }
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, key: u64, writable: bool) -> Result<()> {
        self.poller.add(fd, key, writable, false)
    }

    fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u64) -> Result<()> {
        self.poller.remove(fd, key)
    }

    fn push(&mut self, queue: &mut Queue, _pool: &mut Pool) -> Result<()> {
        self.submit(queue)
    }

    fn drive(
        &mut self,
        queue: &mut Queue,
        _pool: &mut Pool,
        sleep: Option<Sleep>,
        ready: &mut Vec<u64>,
    ) -> Result<()> {
        let submitted = !queue.ready.is_empty();
        if submitted {
            self.submit(queue)?;
        }
        let (left, running) = (queue.ready.len(), self.running);
        self.reap(queue)?;
        match sleep {
            // Something ended: it is handed out, or has a next step to submit.
            Some(_) if self.running != running || queue.has_finished() => {
                self.poller.glance(submitted, ready, &mut queue.counters)?;
            }
            Some(Sleep(timeout)) => {
                // What the context did not take goes when something ends; nothing runs: try again soon.
                let timeout = if left > 0 && running == 0 {
                    Some(Duration::from_millis(1))
                } else {
                    timeout
                };
                self.poller.wait(timeout, ready, &mut queue.counters)?;
                self.reap(queue)?;
            }
            None => self.poller.glance(submitted, ready, &mut queue.counters)?,
        }
        Ok(())
    }
}
