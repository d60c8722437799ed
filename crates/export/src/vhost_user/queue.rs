//! A virtqueue on a worker: the data path. Unsafe code: it lends guest memory to the disk.
//!
//! ```text
//!   kick ─▶ ready
//!           run:   deliver   DiskQueue::done ─▶ status byte ─▶ used ring
//!                  publish   used.idx, and one call for the batch if the driver asked for it
//!                  take      avail ring ─▶ walk ─▶ parse ─▶ DiskQueue::submit
//!                  deliver, publish   what ended without any I/O
//!           idle:  notifications on, look once more
//! ```
//!
//! Every request has a slot from a table made when the queue starts; its vector of pieces
//! keeps its capacity. In the steady state nothing is allocated and nothing is locked.

use super::{
    chain::Chain,
    lookahead::Lookahead,
    memory,
    request::{self, Limits, SEGMENTS_MAX, Segment, Task},
    ring::{Packed, Place, Ring, Split},
    spec::{Status, feature},
};
use crate::worker::{Cx, Session, SessionId};
use block::{Error, GuestError, GuestOffset, Op, Result};
use disk::{Disk, DiskQueue, QueueOptions, Request};
use io::{Completion, EventFd};
use std::{
    os::fd::AsFd,
    ptr,
    sync::{Arc, mpsc::SyncSender},
};

/// The key under which the kick is watched.
const KICK: u32 = 1;

/// Batches that come faster have the clock read as rarely as can be: a look takes some 25 ns, two of them a hundredth of
/// this.
const LOOK_NS: u64 = 4000;

/// Answers that were there at once (zeros, cached metadata) are shown to a driver that sleeps by so many while a batch is taken:
/// one that finds some when it looks does not sleep, and waking it may take longer than a whole batch. Measured on `null` at
/// depth 32, where 1 moves lines between the cores more often and 4 lets the driver sleep more often.
const PART: u32 = 2;

/// A driver that wanted no call for so many answers does not sleep, and is shown whole batches.
const AWAKE: u32 = 256;

/// Everything that a queue needs to start.
pub(super) struct Setup {
    /// Its number, for messages.
    pub index: usize,
    pub disk: Arc<Disk>,
    pub ring: Place,
    pub limits: Limits,
    pub kick: EventFd,
    pub call: Option<EventFd>,
    pub err: Option<EventFd>,
}

/// A queue's state when it has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stopped {
    /// Where its ring can go on.
    pub base: u32,
}

/// What the control thread asks of a running queue, whatever its ring.
pub(super) trait Control {
    /// Replaces the descriptor that tells the driver of finished requests. It is written
    /// once, since a notification may have gone to the old one.
    fn set_call(&mut self, call: Option<EventFd>);

    /// Replaces the descriptor that tells the driver of a broken ring.
    fn set_err(&mut self, err: Option<EventFd>);

    /// Takes nothing more from the ring; when everything taken is done, the queue leaves the
    /// worker and tells `drained`.
    fn drain(&mut self, drained: SyncSender<Stopped>);
}

/// A queue on a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Running {
    id: SessionId,
    packed: bool,
}

impl Running {
    /// Starts a queue on the worker of `cx`, with the kind of ring that was agreed on.
    pub fn start(setup: Setup, cx: &mut Cx) -> Result<Self> {
        let packed = setup.limits.features & feature::RING_PACKED != 0;
        tracing::debug!(queue = setup.index, packed, "a virtqueue runs");
        let id = if packed {
            cx.add(|cx| Queue::<Packed>::start(setup, cx))?
        } else {
            cx.add(|cx| Queue::<Split>::start(setup, cx))?
        };
        Ok(Self { id, packed })
    }

    /// Calls `f` with the queue, on its worker. `None` when it is gone.
    pub fn with<T>(self, cx: &mut Cx, f: impl FnOnce(&mut dyn Control) -> T) -> Option<T> {
        if self.packed {
            cx.with::<Queue<Packed>, _>(self.id, |queue, _| f(queue))
        } else {
            cx.with::<Queue<Split>, _>(self.id, |queue, _| f(queue))
        }
    }
}

/// When a request came; nanoseconds of [`disk::now_ns`].
#[derive(Clone, Copy, Default)]
struct Arrival {
    arrived_ns: u64,
    taken_ns: u64,
    /// No other was taken before it in this batch.
    is_first: bool,
}

/// A request's place while the disk has it.
struct Slot<H> {
    chain: Chain,
    head: H,
    /// Bytes that a success writes to the guest, the status not counted.
    written: u32,
    /// Discard and write zeroes: the segments, and which of them is under way.
    segments: [Segment; SEGMENTS_MAX],
    segment: usize,
    segment_count: usize,
    discard: bool,
    /// What the disk was last asked, for when it had no room.
    request: Request,
}

impl<H: Default> Slot<H> {
    fn new() -> Self {
        Self {
            chain: Chain::new(),
            head: H::default(),
            written: 0,
            segments: [Segment::default(); SEGMENTS_MAX],
            segment: 0,
            segment_count: 0,
            discard: false,
            request: Request {
                op: Op::Flush,
                at: GuestOffset(0),
                len: 0,
                iov: ptr::null(),
                iov_len: 0,
                tag: 0,
                arrived_ns: 0,
                seen_ns: 0,
                parsed_ns: 0,
            },
        }
    }
}

/// A running virtqueue.
pub(super) struct Queue<R: Ring> {
    index: usize,
    ring: R,
    lookahead: Lookahead,
    /// There until the queue has stopped.
    disk: Option<DiskQueue>,
    limits: Limits,
    slots: Box<[Slot<R::Head>]>,
    free: Vec<u16>,
    /// Slots whose request the disk had no room for.
    refused: Vec<u16>,
    kick: EventFd,
    /// When the last batch was taken, and whether the clock is read for its stages one by one.
    batch_ns: u64,
    looks: bool,
    /// Answers since the driver wanted a call.
    uncalled: u32,
    /// When the worker was woken by a kick whose requests were not taken yet; 0: it was not.
    kicked_ns: u64,
    call: Option<EventFd>,
    err: Option<EventFd>,
    /// The ring made no sense: nothing is taken from it any more.
    broken: bool,
    /// Takes nothing more; ends when nothing is in flight.
    draining: bool,
    drained: Vec<SyncSender<Stopped>>,
}

impl<R: Ring> Queue<R> {
    /// Starts the queue on the worker of `cx`, as its current session.
    fn start(setup: Setup, cx: &mut Cx) -> Result<Self> {
        let size = setup.ring.size;
        let noted = setup.ring.inflight.is_some();
        let ring = R::new(setup.ring)?;
        let options = QueueOptions {
            depth: size,
            token_base: cx.token_base(),
            waker: cx.waker().clone(),
        };
        let disk = DiskQueue::attach(&setup.disk, cx.engine(), options)?;
        disk.set_name(format!("vhost-user {}", setup.index));
        if let Err(error) = cx.watch(setup.kick.as_fd(), KICK, false) {
            disk.detach(cx.engine());
            return Err(error);
        }
        let queue = Self {
            index: setup.index,
            ring,
            lookahead: Lookahead::new(),
            disk: Some(disk),
            limits: setup.limits,
            slots: (0..size).map(|_| Slot::new()).collect(),
            free: (0..size).rev().collect(),
            refused: Vec::with_capacity(usize::from(size)),
            kick: setup.kick,
            batch_ns: 0,
            looks: false,
            uncalled: 0,
            kicked_ns: 0,
            call: setup.call,
            err: setup.err,
            broken: false,
            draining: false,
            drained: Vec::new(),
        };
        if noted {
            // A server before us may have died between showing its last answers and telling of them.
            queue.notify();
        }
        Ok(queue)
    }

    fn notify(&self) {
        if let Some(call) = &self.call
            && let Err(error) = call.write()
        {
            // The front-end's descriptor: its loss.
            tracing::debug!(queue = self.index, %error, "cannot notify the driver");
        }
    }

    #[cold]
    fn break_down(&mut self, why: std::fmt::Arguments<'_>) {
        self.broken = true;
        tracing::warn!(queue = self.index, "virtqueue is broken and stops: {why}");
        if let Some(err) = &self.err {
            let _ = err.write();
        }
    }

    /// Takes what the driver made available and hands it to the disk.
    fn take(&mut self, cx: &mut Cx) -> bool {
        if self.broken || self.draining {
            return false;
        }
        let mut taken = 0u32;
        let mut stamps = Arrival::default();
        while let Some(&slot) = self.free.last() {
            self.lookahead.advance(&self.ring, |at| {
                if let Some(disk) = &self.disk {
                    disk.expect(GuestOffset(at));
                }
            });
            let entry = match self.ring.pop() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(overrun) => {
                    self.break_down(format_args!("{overrun}"));
                    break;
                }
            };
            if taken > 0 {
                // Until now the server was at the one before.
                let before = self.disk.as_ref().map_or(0, DiskQueue::mapped_ns);
                stamps.taken_ns = stamps.taken_ns.max(before);
                stamps.is_first = false;
            } else {
                stamps.taken_ns = disk::now_ns();
                stamps.is_first = true;
                let since = stamps.taken_ns.saturating_sub(self.batch_ns);
                self.batch_ns = stamps.taken_ns;
                self.looks = since >= LOOK_NS && self.disk.as_ref().is_some_and(DiskQueue::traces);
                stamps.arrived_ns = match self.kicked_ns {
                    // Looked at without being asked: it is not known when it came.
                    0 => stamps.taken_ns,
                    kicked => kicked,
                };
            }
            self.free.pop();
            if !self.begin(cx, slot, entry, stamps) {
                // Not in flight, and never to be answered.
                self.free.push(slot);
                break;
            }
            taken += 1;
            if taken.is_multiple_of(PART) && self.uncalled < AWAKE && self.deliver(cx) {
                self.publish();
            }
            // Answered slots are free again, and a driver may be as fast as we are: others have their turn.
            if taken >= self.slots.len() as u32 {
                break;
            }
        }
        self.kicked_ns = 0;
        taken > 0
    }

    /// Starts the request at `entry`; `false` when the queue broke on it.
    fn begin(&mut self, cx: &mut Cx, index: u16, entry: R::Entry, stamps: Arrival) -> bool {
        let indirect = self.limits.features & feature::RING_INDIRECT_DESC != 0;
        let slot = &mut self.slots[usize::from(index)];
        let walked = self.ring.walk(entry, &mut slot.chain, indirect);
        let parsed = walked.and_then(|head| {
            let task = request::parse(&mut slot.chain, &self.limits, &mut slot.segments)?;
            Ok((head, task))
        });
        let (head, task) = match parsed {
            Ok(parsed) => parsed,
            Err(fault) => {
                self.break_down(format_args!("{fault}"));
                return false;
            }
        };
        slot.head = head;
        slot.written = 0;
        slot.segment_count = 0;
        // The clock is read once for each request, when it is mapped; where they come slowly there is time for another look.
        let look = stamps.is_first && self.looks;
        let parsed_ns = if look { disk::now_ns() } else { 0 };
        match task {
            Task::Answer { status, written } => {
                slot.written = written;
                self.answer(index, status);
            }
            Task::Single { op, at, len, iov } => {
                let pieces = &slot.chain.iov[iov];
                if op == Op::Read {
                    // At most REQUEST_BYTES_MAX.
                    slot.written = len as u32;
                }
                slot.request = Request {
                    op,
                    at,
                    len,
                    iov: pieces.as_ptr(),
                    iov_len: pieces.len() as u32,
                    tag: u64::from(index),
                    arrived_ns: stamps.arrived_ns,
                    seen_ns: stamps.taken_ns,
                    parsed_ns,
                };
                self.submit(cx, index);
            }
            Task::Segments { discard, count } => {
                slot.discard = discard;
                slot.segment = 0;
                slot.segment_count = count;
                slot.request.arrived_ns = stamps.arrived_ns;
                slot.request.seen_ns = stamps.taken_ns;
                slot.request.parsed_ns = parsed_ns;
                slot.request.tag = u64::from(index);
                slot.request.iov = ptr::null();
                slot.request.iov_len = 0;
                if self.submit_segment(cx, index) {
                    self.answer(index, Status::Ok);
                }
            }
        }
        true
    }

    /// Hands the current segment of a slot to the disk; `true` behind the last.
    fn submit_segment(&mut self, cx: &mut Cx, index: u16) -> bool {
        let slot = &mut self.slots[usize::from(index)];
        let left = &slot.segments[slot.segment..slot.segment_count];
        // A segment of no sectors is legal, and done.
        let Some(skip) = left.iter().position(|segment| segment.len > 0) else {
            return true;
        };
        slot.segment += skip;
        let segment = slot.segments[slot.segment];
        slot.request.op = if slot.discard {
            Op::Discard
        } else {
            Op::WriteZeroes {
                unmap: segment.unmap,
                fast: false,
                fua: false,
            }
        };
        slot.request.at = GuestOffset(segment.at);
        slot.request.len = segment.len;
        self.submit(cx, index);
        false
    }

    fn submit(&mut self, cx: &mut Cx, index: u16) {
        let request = self.slots[usize::from(index)].request;
        let Some(disk) = &mut self.disk else {
            return;
        };
        // SAFETY: the pieces are in the slot's chain, which is not touched before the request's
        // `Done` was taken. They describe guest memory that stays mapped, since `self.ring`
        // holds it and a queue is dropped only when nothing is in flight (a worker's engine
        // is dropped before its sessions otherwise). No reference to guest memory exists.
        if unsafe { disk.submit(cx.engine(), request) }.is_err() {
            self.refused.push(index);
        }
    }

    /// Answers the requests that the disk is done with.
    fn deliver(&mut self, cx: &mut Cx) -> bool {
        let mut any = false;
        while let Some(done) = self.disk.as_mut().and_then(DiskQueue::done) {
            any = true;
            // The tag is the slot's number, as `begin` set it.
            let index = done.tag as u16;
            let slot = &mut self.slots[usize::from(index)];
            match done.result {
                Ok(()) if slot.segment_count > 0 => {
                    slot.segment += 1;
                    if self.submit_segment(cx, index) {
                        self.finish(index, Status::Ok);
                    }
                }
                Ok(()) => self.finish(index, Status::Ok),
                Err(error) => {
                    slot.written = 0;
                    let status = match error {
                        GuestError::Unsupported => Status::Unsupp,
                        _ => Status::IoErr,
                    };
                    self.finish(index, status);
                }
            }
        }
        any
    }

    /// Answers a request that is none for the disk, while others are taken. The driver is shown it at once: the file of what is
    /// in flight takes no note of another while an answer waits to be shown.
    fn answer(&mut self, index: u16, status: Status) {
        self.finish(index, status);
        self.publish();
    }

    /// Writes a request's status and puts it into the used ring.
    fn finish(&mut self, index: u16, status: Status) {
        let slot = &mut self.slots[usize::from(index)];
        // SAFETY: `walk` found the status byte in guest memory (`parse` refuses a chain without
        // one), and `self.ring` keeps it mapped.
        unsafe { memory::write(slot.chain.status, &[status as u8]) };
        self.ring.push(slot.head, slot.written.saturating_add(1));
        self.uncalled = self.uncalled.saturating_add(1);
        self.free.push(index);
    }

    /// Shows the driver what was answered, and calls it if it asked for that.
    fn publish(&mut self) {
        let wanted = self.ring.publish();
        let mut told_ns = None;
        if wanted {
            self.uncalled = 0;
            if self.looks && self.disk.as_ref().is_some_and(DiskQueue::has_ended) {
                told_ns = Some(disk::now_ns());
            }
            self.notify();
        }
        if let Some(disk) = &mut self.disk {
            disk.notified(told_ns);
        }
    }

    fn retry_refused(&mut self, cx: &mut Cx) {
        for _ in 0..self.refused.len() {
            // Taken from the front would keep their order, but any order is allowed.
            if let Some(index) = self.refused.pop() {
                self.submit(cx, index);
            }
        }
    }

    /// Leaves the worker when nothing is in flight any more.
    fn try_end(&mut self, cx: &mut Cx) {
        let idle = self.free.len() == self.slots.len();
        if !idle || self.disk.as_ref().is_some_and(DiskQueue::is_busy) {
            return;
        }
        if let Some(disk) = self.disk.take() {
            disk.detach(cx.engine());
            if let Err(error) = cx.unwatch(self.kick.as_fd(), KICK) {
                tracing::debug!(queue = self.index, %error, "cannot stop watching a kick");
            }
        }
        for drained in self.drained.drain(..) {
            let _ = drained.try_send(Stopped {
                base: self.ring.base(),
            });
        }
        cx.close();
    }
}

impl<R: Ring> Control for Queue<R> {
    fn set_call(&mut self, call: Option<EventFd>) {
        self.call = call;
        self.notify();
    }

    fn set_err(&mut self, err: Option<EventFd>) {
        self.err = err;
    }

    fn drain(&mut self, drained: SyncSender<Stopped>) {
        self.draining = true;
        self.drained.push(drained);
    }
}

impl<R: Ring> Session for Queue<R> {
    fn ready(&mut self, cx: &mut Cx, _key: u32) {
        // Its value says how many kicks came; what they were for is in the ring.
        if let Err(error) = self.kick.read() {
            self.break_down(format_args!("{error}"));
            let _ = cx.unwatch(self.kick.as_fd(), KICK);
        }
        probe::probe!(diskplane, kicked, self.index);
        if self.kicked_ns == 0 {
            self.kicked_ns = cx.woken_ns();
        }
    }

    fn completed(&mut self, cx: &mut Cx, completion: &Completion) {
        if let Some(disk) = &mut self.disk {
            disk.completed(cx.engine(), completion);
        }
    }

    fn run(&mut self, cx: &mut Cx) -> bool {
        // Awake: the driver need not kick, least of all for what it adds in answer to a call.
        self.ring.disable_notify();
        let mut any = self.deliver(cx);
        // The driver first, which may have the next requests ready when we look for them: those
        // would reach the device a turn later otherwise.
        if any {
            self.publish();
        }
        if !self.refused.is_empty() {
            self.retry_refused(cx);
        }
        any |= self.take(cx);
        if let Some(disk) = &mut self.disk {
            disk.advance(cx.engine());
        }
        any |= self.deliver(cx);
        self.publish();
        if self.draining {
            self.try_end(cx);
        }
        any
    }

    fn idle(&mut self, _cx: &mut Cx) -> bool {
        // A segment that followed another at the end of `run` may have asked for a commit.
        if self.disk.as_ref().is_some_and(DiskQueue::must_advance) {
            return false;
        }
        // Without a free slot there is nothing to be told: a completion goes on.
        if self.broken || self.draining || self.free.is_empty() {
            return true;
        }
        self.ring.enable_notify()
    }

    fn stop(&mut self, cx: &mut Cx) {
        self.draining = true;
        self.try_end(cx);
    }
}

/// A descriptor from a front-end, which must be an eventfd: anything else could be
/// readable for ever, or block a worker that writes to it.
pub(super) fn eventfd(file: std::fs::File) -> Result<EventFd> {
    use std::os::fd::AsRawFd;
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let name = std::fs::read_link(link).unwrap_or_default();
    if name.as_os_str() != "anon_inode:[eventfd]" {
        return Err(Error::invalid(format!(
            "a kick, call or error descriptor is {}, not an eventfd",
            name.display()
        )));
    }
    rustix::io::ioctl_fionbio(&file, true).map_err(|e| Error::os("FIONBIO", e.into()))?;
    Ok(EventFd::from_fd(file.into()))
}
