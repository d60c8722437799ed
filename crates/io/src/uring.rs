//! The `io_uring` engine: one `io_uring_enter` per turn, which submits the batch and waits; a long batch
//! goes in parts (`SUBMIT_MAX`).
//!
//! - One issuer, task work deferred to the call that waits (Linux 6.1), so that completions cost no
//!   interrupts of the thread; without that, cooperative (5.19), without that, plain rings (5.11).
//! - The ring is made disabled and enabled by the first turn, whose thread becomes the issuer.
//! - Files are registered; watched descriptors are multishot polls in the same ring. These report an
//!   edge: whoever is told reads until `EAGAIN`.
//! - A turn that must not sleep and has nothing to submit reads the completion ring and makes a system
//!   call only where the kernel says that something waits for one (`IORING_SQ_TASKRUN`,
//!   `IORING_SQ_CQ_OVERFLOW`).

use crate::{
    Counters, EngineKind, EngineOptions, File,
    eventfd::Waker,
    poller::{INTERNAL, WATCHES_MAX},
    pool::Pool,
    queue::{FILES_MAX, Queue, Step, StepKind},
    runner::{Backend, Sleep},
    threads::{refuse_remote, refuse_simulated},
};
use block::{Context, Error, IoVec, Result};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::OnceLock,
};

const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 8;

/// What a completion belongs to, in the upper bits of `user_data`: a job (its index below), …
const TAG_JOB: u64 = 0;
/// … a watch (generation and index below), …
const TAG_WATCH: u64 = 1 << 62;
/// … or nothing that matters.
const TAG_IGNORE: u64 = 2 << 62;
const TAG_MASK: u64 = 3 << 62;

/// Most that the kernel transfers in one call (`MAX_RW_COUNT`).
const TRANSFER_MAX: u64 = 0x7fff_f000;

/// Most steps that one call submits while more are behind them. The kernel holds the requests of a call
/// back until it has seen all of them, so the device would idle while a long batch is prepared. A part is
/// therefore only as long as what the device has to do already (see [`part`]).
const SUBMIT_MAX: u32 = 8;

/// So few steps are never parted: a call costs more than the device would gain.
const SUBMIT_MIN: u32 = 3;

/// How many of `left` steps the next call submits when the kernel has `running`: a device without work gets
/// its first at once, and while it is at that the next part is prepared, which may be as long again.
fn part(left: u32, running: usize) -> u32 {
    if left <= SUBMIT_MIN {
        return left;
    }
    left.min(running.clamp(1, SUBMIT_MAX as usize) as u32)
}

#[derive(Clone, Copy, Debug)]
struct Watch {
    fd: RawFd,
    key: u64,
    events: u32,
    generation: u32,
}

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct GetEvents {
    sigmask: u64,
    sigmask_sz: u32,
    pad: u32,
    ts: u64,
}

/// See the module's documentation.
pub(crate) struct Uring {
    ring: IoUring,
    /// The table of registered files is there; else plain descriptors are used.
    fixed_files: bool,
    fds: Vec<RawFd>,
    enabled: bool,
    deferred: bool,
    watches: Vec<Option<Watch>>,
    generation: u32,
}

/// Whether the kernel offers what the engine needs; else why not.
pub(crate) fn available() -> Result<(), &'static str> {
    static ANSWER: OnceLock<Result<(), String>> = OnceLock::new();
    ANSWER
        .get_or_init(|| {
            let (ring, _) = build(8, 16).map_err(|e| match e.raw_os_error() {
                Some(libc::ENOSYS) => "the kernel has no io_uring".to_owned(),
                Some(libc::EPERM | libc::EACCES) => {
                    "the system forbids io_uring (kernel.io_uring_disabled, seccomp)".to_owned()
                }
                _ => format!("io_uring_setup: {e}"),
            })?;
            let params = ring.params();
            if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
                return Err("the kernel's io_uring is older than Linux 5.11".to_owned());
            }
            let mut probe = Probe::new();
            ring.submitter()
                .register_probe(&mut probe)
                .map_err(|e| format!("io_uring probe: {e}"))?;
            for (code, name) in [
                (opcode::Readv::CODE, "readv"),
                (opcode::Writev::CODE, "writev"),
                (opcode::Read::CODE, "read"),
                (opcode::Write::CODE, "write"),
                (opcode::Fsync::CODE, "fsync"),
                (opcode::PollAdd::CODE, "poll"),
                (opcode::AsyncCancel::CODE, "cancel"),
            ] {
                if !probe.is_supported(code) {
                    return Err(format!("the kernel's io_uring lacks {name}"));
                }
            }
            Ok(())
        })
        .as_ref()
        .map_err(String::as_str)
        .copied()
}

/// A disabled ring with the best flags that the kernel takes; whether task work is deferred.
fn build(entries: u32, cq_entries: u32) -> io::Result<(IoUring, bool)> {
    let base = || {
        let mut builder = IoUring::builder();
        builder
            .dontfork()
            .setup_clamp()
            .setup_cqsize(cq_entries)
            .setup_r_disabled();
        builder
    };
    let mut best = base();
    best.setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag();
    let mut cooperative = base();
    cooperative
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag();
    for (builder, deferred) in [(best, true), (cooperative, false), (base(), false)] {
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, deferred)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

impl Uring {
    pub(crate) fn new(options: &EngineOptions, waker: &Waker) -> Result<Self> {
        available().map_err(Error::unsupported)?;
        let entries = (options.depth.clamp(8, 1 << 14) as u32).next_power_of_two();
        let (ring, deferred) = build(entries, entries * 4).context(|| "io_uring_setup")?;
        let fixed_files = ring
            .submitter()
            .register_files_sparse(FILES_MAX as u32)
            .is_ok();
        let mut this = Self {
            ring,
            fixed_files,
            fds: Vec::new(),
            enabled: false,
            deferred,
            watches: Vec::new(),
            generation: 0,
        };
        this.add_watch(waker.as_fd(), INTERNAL, false)?;
        Ok(this)
    }

    /// Makes the calling thread the issuer.
    fn enable(&mut self) -> Result<()> {
        if self.enabled {
            return Ok(());
        }
        self.ring
            .submitter()
            .register_enable_rings()
            .context(|| "enabling an io_uring")?;
        // Spares the look-up of the ring's descriptor in each call; fine without.
        let _ = self.ring.submitter().register_ring_fd();
        self.enabled = true;
        Ok(())
    }

    fn add_watch(&mut self, fd: BorrowedFd<'_>, key: u64, writable: bool) -> Result<()> {
        let index = match self.watches.iter().position(Option::is_none) {
            Some(index) => index,
            None if self.watches.len() < WATCHES_MAX => {
                self.watches.push(None);
                self.watches.len() - 1
            }
            None => {
                return Err(Error::invalid(format!(
                    "an engine watches at most {WATCHES_MAX} descriptors"
                )));
            }
        };
        let mut events = libc::POLLIN as u32;
        if writable {
            events |= libc::POLLOUT as u32;
        }
        self.generation = self.generation.wrapping_add(1) & 0x3fff_ffff;
        let watch = Watch {
            fd: fd.as_raw_fd(),
            key,
            events,
            generation: self.generation,
        };
        self.push(&poll_entry(index, &watch))?;
        self.watches[index] = Some(watch);
        Ok(())
    }

    /// Puts an entry into the submission ring, making room if it must.
    fn push(&mut self, entry: &squeue::Entry) -> Result<()> {
        for _ in 0..2 {
            // SAFETY: polls and cancellations refer to no memory.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enable()?;
            let len = self.ring.submission().len() as u32;
            self.enter(len, true, None)?;
        }
        Err(Error::os(
            "io_uring submission",
            io::Error::from_raw_os_error(libc::EBUSY),
        ))
    }

    /// `io_uring_enter`: submits, with `reap` does what ended operations deferred to this thread, and
    /// with `sleep` waits for a completion. The outcomes that only mean "look again" are successes.
    fn enter(&mut self, to_submit: u32, reap: bool, sleep: Option<Sleep>) -> Result<()> {
        let spec = sleep.and_then(|s| s.0).map(|t| {
            types::Timespec::new()
                .sec(t.as_secs())
                .nsec(t.subsec_nanos())
        });
        let arg = spec.as_ref().map(|spec| GetEvents {
            sigmask: 0,
            sigmask_sz: 8,
            pad: 0,
            ts: std::ptr::from_ref(spec) as u64,
        });
        let mut flags = 0;
        if reap && (sleep.is_some() || self.deferred || to_submit == 0) {
            flags |= ENTER_GETEVENTS;
        }
        if arg.is_some() {
            flags |= ENTER_EXT_ARG;
        }
        let wanted = u32::from(sleep.is_some());
        // SAFETY: the entries in the ring refer to memory that `Engine::stage` makes callers keep (or
        // to the queue's own); `arg` and `spec` live through the call.
        let result = unsafe {
            self.ring
                .submitter()
                .enter(to_submit, wanted, flags, arg.as_ref())
        };
        match result {
            Ok(_) => Ok(()),
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) =>
            {
                Ok(())
            }
            Err(e) => Err(e).context(|| "io_uring_enter"),
        }
    }

    /// Puts the steps of ready jobs into the submission ring, as far as there is room.
    fn fill(&mut self, queue: &mut Queue) {
        if queue.ready.is_empty() {
            return;
        }
        let mut ring = self.ring.submission();
        while let Some(&job) = queue.ready.front() {
            let step = queue.step(job);
            // With FIXED_FILE the number is an index of the table of registered files.
            let (fd, flags) = if self.fixed_files {
                (RawFd::from(step.file), squeue::Flags::FIXED_FILE)
            } else {
                (self.fds[usize::from(step.file)], squeue::Flags::empty())
            };
            let entry = entry(&step, types::Fd(fd))
                .flags(flags)
                .user_data(TAG_JOB | u64::from(job));
            // SAFETY: `Engine::stage` makes the caller keep array and memory until the completion;
            // bounce memory is the queue's, which the engine drops after its last step has ended.
            if unsafe { ring.push(&entry) }.is_err() {
                break;
            }
            queue.ready.pop_front();
            queue.issued();
        }
    }

    /// Completes what the completion ring has.
    fn reap(&mut self, queue: &mut Queue, ready: &mut Vec<u64>) -> Result<()> {
        let mut again = [usize::MAX; 16];
        loop {
            let mut ended = 0;
            {
                let mut ring = self.ring.completion();
                while ended < again.len() {
                    let Some(entry) = ring.next() else { break };
                    let data = entry.user_data();
                    match data & TAG_MASK {
                        TAG_JOB => queue.complete(data as u32, entry.result(), false),
                        TAG_WATCH => {
                            let index = (data & 0xffff_ffff) as usize;
                            let generation = (data >> 32) as u32 & 0x3fff_ffff;
                            let Some(Some(watch)) = self.watches.get(index) else {
                                continue;
                            };
                            if watch.generation != generation {
                                continue;
                            }
                            if watch.key != INTERNAL {
                                ready.push(watch.key);
                            }
                            // An error ends the watch: the caller finds it when it reads.
                            if !cqueue::more(entry.flags()) && entry.result() >= 0 {
                                again[ended] = index;
                                ended += 1;
                            }
                        }
                        _ => {}
                    }
                }
            }
            for index in &again[..ended] {
                if let Some(Some(watch)) = self.watches.get(*index) {
                    let entry = poll_entry(*index, watch);
                    self.push(&entry)?;
                }
            }
            if ended < again.len() {
                return Ok(());
            }
        }
    }
}

fn poll_entry(index: usize, watch: &Watch) -> squeue::Entry {
    opcode::PollAdd::new(types::Fd(watch.fd), watch.events)
        .multi(true)
        .build()
        .user_data(watch_data(index, watch))
}

fn watch_data(index: usize, watch: &Watch) -> u64 {
    TAG_WATCH | u64::from(watch.generation) << 32 | index as u64
}

fn entry(step: &Step, file: types::Fd) -> squeue::Entry {
    match step.kind {
        StepKind::Read | StepKind::Write if step.iov_len == 1 => {
            // SAFETY: a step's array has the pieces that it names.
            let piece: IoVec = unsafe { *step.iov };
            let len = (piece.len() as u64).min(TRANSFER_MAX) as u32;
            if step.kind == StepKind::Read {
                opcode::Read::new(file, piece.base(), len)
                    .offset(step.offset)
                    .build()
            } else {
                opcode::Write::new(file, piece.base(), len)
                    .offset(step.offset)
                    .build()
            }
        }
        StepKind::Read => opcode::Readv::new(file, step.iov.cast(), step.iov_len)
            .offset(step.offset)
            .build(),
        StepKind::Write => opcode::Writev::new(file, step.iov.cast(), step.iov_len)
            .offset(step.offset)
            .build(),
        // Ranges never come here: they are the pool's.
        StepKind::Sync | StepKind::Range(_) => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}

fn count(counters: &mut Counters, submitted: bool) {
    if submitted {
        counters.submit_calls += 1;
    } else {
        counters.wait_calls += 1;
    }
}

impl Backend for Uring {
    const KIND: EngineKind = EngineKind::IoUring;

    fn attach(&mut self, slot: u16, file: &File) -> Result<()> {
        refuse_simulated(file)?;
        refuse_remote(file)?;
        let index = usize::from(slot);
        if self.fds.len() <= index {
            self.fds.resize(index + 1, -1);
        }
        self.fds[index] = file.raw_fd();
        if self.fixed_files {
            self.ring
                .submitter()
                .register_files_update(u32::from(slot), &[file.raw_fd()])
                .context(|| "registering a file with io_uring")?;
        }
        Ok(())
    }

    fn detach(&mut self, slot: u16) {
        if let Some(fd) = self.fds.get_mut(usize::from(slot)) {
            *fd = -1;
        }
        if self.fixed_files
            && let Err(e) = self
                .ring
                .submitter()
                .register_files_update(u32::from(slot), &[-1])
        {
            tracing::warn!("cannot unregister a file from io_uring: {e}");
        }
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, key: u64, writable: bool) -> Result<()> {
        self.add_watch(fd, key, writable)
    }

    fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u64) -> Result<()> {
        let raw = fd.as_raw_fd();
        let found = self
            .watches
            .iter()
            .position(|w| w.is_some_and(|w| w.fd == raw && w.key == key));
        let Some(index) = found else {
            return Err(Error::invalid("this descriptor is not watched"));
        };
        let Some(watch) = self.watches[index].take() else {
            return Ok(());
        };
        // Not a poll's own removal, which leaves one alone whose descriptor has just become ready (EALREADY):
        // the file would stay open, and its peer wait for the end of the connection.
        let cancel = opcode::AsyncCancel::new(watch_data(index, &watch))
            .build()
            .user_data(TAG_IGNORE);
        self.push(&cancel)?;
        // At once, so that the ring does not keep the file open when the caller closes it.
        self.enable()?;
        let len = self.ring.submission().len() as u32;
        self.enter(len, true, None)
    }

    fn push(&mut self, queue: &mut Queue, _pool: &mut Pool) -> Result<()> {
        self.enable()?;
        self.fill(queue);
        let len = self.ring.submission().len() as u32;
        count(&mut queue.counters, true);
        // What the call does not take is still in the ring, and the next turn's.
        self.enter(len, false, None)
    }

    fn drive(
        &mut self,
        queue: &mut Queue,
        _pool: &mut Pool,
        sleep: Option<Sleep>,
        ready: &mut Vec<u64>,
    ) -> Result<()> {
        self.enable()?;
        let before = queue.running;
        self.fill(queue);
        let (len, asks) = {
            let ring = self.ring.submission();
            (ring.len() as u32, ring.taskrun() || ring.cq_overflow())
        };
        // With work left over the ring is full: submit, reap, and come again.
        let sleep = sleep.filter(|_| queue.ready.is_empty());
        // What has ended already is taken before anything is waited for.
        let sleep = sleep.filter(|_| len > 0 || self.ring.completion().is_empty());
        if len > 0 || sleep.is_some() || asks {
            let (mut left, mut stuck) = (len, false);
            while !stuck {
                let now = part(left, before + (len - left) as usize);
                if now == left {
                    break;
                }
                count(&mut queue.counters, true);
                self.enter(now, false, None)?;
                // A call may take less (memory is short): nothing sleeps on what it left.
                let rest = self.ring.submission().len() as u32;
                stuck = rest == left;
                left = rest;
            }
            let sleep = sleep.filter(|_| !stuck);
            count(&mut queue.counters, len > 0);
            self.enter(left, true, sleep)?;
            // A sleeper is woken by the first completion and brings home that one alone. The others
            // of its interrupt are there by now: one call more for all, instead of a turn (and
            // a notification) for the first.
            if sleep.is_some() && self.ring.submission().taskrun() {
                count(&mut queue.counters, false);
                self.enter(0, true, None)?;
            }
        }
        self.reap(queue, ready)
    }
}
