//! The transmission phase of one connection, without a worker or a disk of its own.
//!
//! ```text
//!   socket ─▶ staging ─▶ header ─▶ plan ─▶ slot, memory ─▶ disk
//!                 └─ payloads, straight into the slot's memory   │
//!   socket ◀─ one sendmsg ◀─ replies in order of completion ◀────┘
//! ```
//!
//! Nothing is read while all slots or all memory are in use: a client that does not take
//! its replies holds its own slots and memory and no more. In the steady state nothing here allocates.

use super::{
    handshake::Style,
    lend::{Backend, Loans},
    memory::Pool,
    proto::cmd,
    reply::{self, Head, Subject},
    request::{HEADER_BYTES_MAX, Header, Limits, Plan, Refusal, Work, plan},
    wire::{self, Transfer},
};
use block::{GuestError, GuestOffset, Op};
use disk::Done;
use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut},
    os::fd::BorrowedFd,
};

/// Requests of one connection that may be in flight: what the Linux client sends at most by default.
pub(crate) const DEPTH: u16 = 128;
/// Bytes that are received at once, beside the rest of a payload.
const STAGING_BYTES: usize = 128 << 10;
/// While payloads are large, so much is received beside one: its successor's header, and as
/// little as possible of what has to be copied.
const STAGING_BYTES_SMALL: usize = 1 << 10;
/// From here on payloads are large.
const LARGE_BYTES: usize = 32 << 10;
/// Bytes received in one go before other sessions have their turn.
const TURN_BYTES: usize = 1 << 20;
/// Pieces of one `sendmsg`: two for each reply.
const SEND_PIECES: usize = 128;
/// Extents of one block status reply.
const EXTENTS_MAX: usize = 1024;
/// Reads from here on ask first whether there is anything but zeros.
const PROBE_BYTES: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Free,
    /// The payload arrives.
    Filling(Work),
    /// The disk's table was full.
    Waiting(Work),
    /// The disk works on it.
    AtDisk(Work),
    /// A read, while the disk is asked whether it would be all zeros.
    Probing,
    /// Answered; in the queue of replies, or in front of it while its payload is skipped.
    Replied,
}

#[derive(Debug)]
struct Slot {
    phase: Phase,
    subject: Subject,
    len: u64,
    head: Head,
    /// Bytes of the slot's memory that follow the head.
    payload: usize,
}

/// What is received next.
#[derive(Clone, Copy, Debug)]
enum Receiving {
    Header,
    Payload {
        slot: usize,
        filled: usize,
    },
    /// Payload of a request that is refused.
    Skip {
        slot: usize,
        left: u64,
    },
}

/// What keeps the next request from being taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stall {
    None,
    Slot,
    Bytes(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// No more requests; closed when all are answered.
    Draining,
    /// The socket is gone, or as good as: replies go nowhere.
    Dead,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    limits: Limits,
    state: State,
    slots: Box<[Slot]>,
    free: Vec<usize>,
    loans: Loans,
    pool: Pool,
    staging: Box<[u8]>,
    /// Bytes of `staging` that were received and not used yet.
    start: usize,
    end: usize,
    receiving: Receiving,
    large: bool,
    stall: Stall,
    /// There may be something to receive.
    readable: bool,
    /// The socket took no more.
    blocked: bool,
    replies: VecDeque<usize>,
    /// Bytes of the first reply that were sent.
    sent: usize,
    waiting: VecDeque<usize>,
    at_disk: usize,
}

impl Connection {
    /// A connection whose client already sent `early` bytes of requests (at most [`STAGING_BYTES`]; the
    /// handshake reads no more).
    pub(crate) fn new(limits: Limits, early: &[u8]) -> Self {
        let depth = usize::from(DEPTH);
        let mut staging = vec![0; STAGING_BYTES].into_boxed_slice();
        let end = early.len().min(STAGING_BYTES);
        staging[..end].copy_from_slice(&early[..end]);
        Self {
            limits,
            state: State::Open,
            slots: (0..depth)
                .map(|_| Slot {
                    phase: Phase::Free,
                    subject: Subject::default(),
                    len: 0,
                    head: Head::EMPTY,
                    payload: 0,
                })
                .collect(),
            free: (0..depth).rev().collect(),
            loans: Loans::new(depth),
            pool: Pool::new(),
            staging,
            start: 0,
            end,
            receiving: Receiving::Header,
            large: false,
            stall: Stall::None,
            readable: true,
            blocked: false,
            replies: VecDeque::with_capacity(depth),
            sent: 0,
            waiting: VecDeque::with_capacity(depth),
            at_disk: 0,
        }
    }

    /// The socket has something to receive, or is gone. `false` when that changes nothing: there was
    /// something already, and it has to wait.
    pub(crate) fn readable(&mut self) -> bool {
        let useful = !(self.readable && self.stalled());
        self.readable = true;
        useful
    }

    /// The socket takes more.
    pub(crate) fn writable(&mut self) {
        self.blocked = false;
    }

    /// Whether requests are taken still.
    pub(crate) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether requests wait for slots or memory.
    pub(crate) fn stalled(&self) -> bool {
        !self.stall_is_over()
    }

    /// Takes no more requests.
    pub(crate) fn drain(&mut self) {
        if self.state == State::Open {
            self.state = State::Draining;
            self.stall = Stall::None;
            // A request whose payload is not complete was never begun.
            match std::mem::replace(&mut self.receiving, Receiving::Header) {
                Receiving::Header => {}
                Receiving::Payload { slot, .. } | Receiving::Skip { slot, .. } => {
                    self.release(slot);
                }
            }
        }
    }

    /// Gives up on the socket: what is at the disk ends, replies go nowhere.
    pub(crate) fn abandon(&mut self) {
        self.drain();
        self.state = State::Dead;
        self.sent = 0;
        while let Some(slot) = self.replies.pop_front() {
            self.release(slot);
        }
        while let Some(slot) = self.waiting.pop_front() {
            self.release(slot);
        }
    }

    /// Whether nothing is left to do: the disk uses none of the memory, and
    /// there is nothing to send or nobody to send it to.
    pub(crate) fn finished(&self) -> bool {
        self.at_disk == 0
            && self.waiting.is_empty()
            && self.state != State::Open
            && self.replies.is_empty()
    }

    /// Whether the next step waits for the socket to become writable.
    pub(crate) fn blocked(&self) -> bool {
        self.blocked && !self.replies.is_empty()
    }

    /// Whether [`Connection::receive`] or [`Connection::deliver`] would get further without anything
    /// happening before.
    pub(crate) fn has_work(&self) -> bool {
        // What stalled lies in the staging area, so its end is work without anything to receive.
        let receives = self.readable || self.stall != Stall::None;
        (self.state == State::Open && receives && self.stall_is_over())
            || (!self.replies.is_empty() && !self.blocked)
    }

    fn stall_is_over(&self) -> bool {
        match self.stall {
            Stall::None => true,
            Stall::Slot => !self.free.is_empty(),
            Stall::Bytes(len) => self.pool.fits(len),
        }
    }

    /// Takes what the disk finished and sends all replies that there are. Says whether there was anything.
    pub(crate) fn deliver(&mut self, backend: &mut impl Backend, fd: BorrowedFd<'_>) -> bool {
        let worked = self.reap(backend);
        self.transmit(fd) | worked
    }

    // Requests

    /// Takes requests and gives them to the disk. Says whether there were any.
    pub(crate) fn receive(&mut self, backend: &mut impl Backend, fd: BorrowedFd<'_>) -> bool {
        if self.state != State::Open || !self.stall_is_over() {
            return false;
        }
        if !self.readable && self.stall == Stall::None {
            return false;
        }
        self.stall = Stall::None;
        let seen_ns = disk::now_ns();
        let mut left = TURN_BYTES;
        let mut worked = false;
        loop {
            worked |= self.parse(backend, seen_ns);
            if self.state != State::Open || self.stall != Stall::None {
                break;
            }
            if !self.readable || left == 0 {
                break;
            }
            match self.fill(fd) {
                Transfer::Bytes(bytes) => {
                    worked = true;
                    left = left.saturating_sub(bytes);
                }
                Transfer::WouldBlock => {
                    self.readable = false;
                    break;
                }
                // The client may have closed one direction only, and still take its replies.
                Transfer::End => self.drain(),
                Transfer::Gone => self.abandon(),
            }
        }
        worked
    }

    /// Receives once: the rest of a payload where it belongs, what follows into the staging area.
    fn fill(&mut self, fd: BorrowedFd<'_>) -> Transfer {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && self.staging.len() - self.end < HEADER_BYTES_MAX {
            self.staging.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = if self.large {
            STAGING_BYTES_SMALL.max(self.end + HEADER_BYTES_MAX)
        } else {
            STAGING_BYTES
        };
        let room = room.min(self.staging.len());
        let space = &mut self.staging[self.end..room];
        let Receiving::Payload { slot, filled } = &mut self.receiving else {
            let got = wire::receive(fd, &mut [IoSliceMut::new(space)]);
            if let Transfer::Bytes(bytes) = got {
                self.end += bytes;
            }
            return got;
        };
        let len = self.slots[*slot].len as usize;
        let rest = &mut self.loans.bytes_mut(*slot)[*filled..len];
        let rest_len = rest.len();
        let pieces = &mut [IoSliceMut::new(rest), IoSliceMut::new(space)];
        let got = wire::receive(fd, pieces);
        if let Transfer::Bytes(bytes) = got {
            let of_payload = bytes.min(rest_len);
            *filled += of_payload;
            self.end += bytes - of_payload;
        }
        got
    }

    /// Uses what was received as far as it goes.
    fn parse(&mut self, backend: &mut impl Backend, seen_ns: u64) -> bool {
        let mut worked = false;
        while self.state == State::Open {
            match &mut self.receiving {
                Receiving::Payload { slot, filled } => {
                    let slot = *slot;
                    let len = self.slots[slot].len as usize;
                    let take = (len - *filled).min(self.end - self.start);
                    self.loans.bytes_mut(slot)[*filled..*filled + take]
                        .copy_from_slice(&self.staging[self.start..self.start + take]);
                    *filled += take;
                    self.start += take;
                    if *filled < len {
                        break;
                    }
                    self.receiving = Receiving::Header;
                    if let Phase::Filling(work) = self.slots[slot].phase {
                        self.begin(backend, slot, work, seen_ns);
                    }
                }
                Receiving::Skip { slot, left } => {
                    let slot = *slot;
                    // The minimum with a `usize` is one.
                    let take = (*left).min((self.end - self.start) as u64) as usize;
                    *left -= take as u64;
                    self.start += take;
                    if *left > 0 {
                        break;
                    }
                    self.receiving = Receiving::Header;
                    self.replies.push_back(slot);
                }
                Receiving::Header => {
                    let input = &self.staging[self.start..self.end];
                    match Header::parse(self.limits.style, input) {
                        None => break,
                        Some(Err(_)) => {
                            // Not a request: what follows has no meaning. What is in flight is answered.
                            self.drain();
                            break;
                        }
                        Some(Ok(header)) => {
                            if !self.accept(backend, &header, seen_ns) {
                                break;
                            }
                        }
                    }
                }
            }
            worked = true;
        }
        worked
    }

    /// Takes the request whose header lies at `start`; `false` when it has to wait.
    fn accept(&mut self, backend: &mut impl Backend, header: &Header, seen_ns: u64) -> bool {
        let plan = plan(header, &self.limits);
        if plan == Plan::Disconnect {
            self.drain();
            return true;
        }
        let memory = match plan {
            // Checked to be at most 32 MiB.
            Plan::Work(Work::Read { .. } | Work::Write { .. }) => header.len as usize,
            Plan::Work(Work::Status { .. }) => {
                EXTENTS_MAX * reply::descriptor_bytes(self.limits.style)
            }
            _ => 0,
        };
        let Some(&slot) = self.free.last() else {
            self.stall = Stall::Slot;
            return false;
        };
        if memory > 0 {
            let Some(buffer) = self.pool.take(memory) else {
                self.stall = Stall::Bytes(memory);
                return false;
            };
            self.loans.put(slot, buffer);
        }
        self.free.pop();
        self.start += Header::size(self.limits.style);
        let entry = &mut self.slots[slot];
        entry.subject = Subject {
            cookie: header.cookie,
            offset: header.offset,
        };
        entry.len = header.len;
        entry.payload = 0;
        match plan {
            Plan::Work(work @ Work::Write { .. }) => {
                entry.phase = Phase::Filling(work);
                self.large = memory >= LARGE_BYTES;
                self.receiving = Receiving::Payload { slot, filled: 0 };
            }
            Plan::Work(work) => {
                self.large = false;
                self.begin(backend, slot, work, seen_ns);
            }
            Plan::Answer { skip, result } => {
                self.answer(slot, result, header.kind == cmd::READ);
                if skip > 0 {
                    self.receiving = Receiving::Skip { slot, left: skip };
                } else {
                    self.replies.push_back(slot);
                }
            }
            Plan::Fatal(refusal) => {
                self.answer(slot, Err(refusal), false);
                self.replies.push_back(slot);
                self.drain();
            }
            Plan::Disconnect => {}
        }
        true
    }

    // The disk

    fn begin(&mut self, backend: &mut impl Backend, slot: usize, work: Work, seen_ns: u64) {
        let entry = &mut self.slots[slot];
        let (at, len) = (entry.subject.offset, entry.len);
        let probe = matches!(work, Work::Read { whole: false }) && len >= PROBE_BYTES;
        let op = match work {
            _ if probe => None,
            Work::Status { .. } => None,
            Work::Read { .. } => Some(Op::Read),
            Work::Write { fua } => Some(Op::Write { fua }),
            Work::Flush => Some(Op::Flush),
            Work::Trim { .. } => Some(Op::Discard),
            Work::Zero { unmap, fast, fua } => Some(Op::WriteZeroes { unmap, fast, fua }),
        };
        let taken = match op {
            Some(Op::Flush) => self.loans.submit(slot, backend, Op::Flush, 0, 0, seen_ns),
            Some(op) => self.loans.submit(slot, backend, op, at, len, seen_ns),
            None => {
                let extents_max = match work {
                    Work::Status { one: false } => EXTENTS_MAX,
                    _ => 1,
                };
                backend.block_status(GuestOffset(at), len, extents_max, slot as u64)
            }
        };
        entry.phase = match (taken, probe) {
            (true, true) => Phase::Probing,
            (true, false) => Phase::AtDisk(work),
            (false, _) => Phase::Waiting(work),
        };
        if taken {
            self.at_disk += 1;
        } else {
            self.waiting.push_back(slot);
        }
    }

    fn reap(&mut self, backend: &mut impl Backend) -> bool {
        let mut worked = false;
        while let Some(done) = backend.done() {
            self.ended(backend, done);
            worked = true;
        }
        // The table has room again; those that waited go first, once each.
        for _ in 0..self.waiting.len() {
            let Some(slot) = self.waiting.pop_front() else {
                break;
            };
            if let Phase::Waiting(work) = self.slots[slot].phase {
                self.begin(backend, slot, work, disk::now_ns());
                worked = true;
            }
        }
        worked
    }

    fn ended(&mut self, backend: &mut impl Backend, done: Done) {
        let slot = done.tag as usize;
        let Some(entry) = self.slots.get(slot) else {
            debug_assert!(false, "no slot {slot}");
            return;
        };
        let phase = entry.phase;
        let len = entry.len;
        self.at_disk -= 1;
        self.loans.settle(slot);
        let asked = matches!(phase, Phase::Probing | Phase::AtDisk(Work::Status { .. }));
        let extents = if asked {
            // Also after an error: the disk keeps the answer until it is taken.
            backend.take_status(done.tag)
        } else {
            Vec::new()
        };
        if self.state == State::Dead {
            return self.release(slot);
        }
        match (phase, done.result) {
            (Phase::Probing, result) => {
                let zero =
                    result.is_ok() && matches!(&extents[..], [e, ..] if e.zero && e.len >= len);
                match u32::try_from(len) {
                    Ok(hole) if zero => {
                        let entry = &mut self.slots[slot];
                        entry.head.hole(self.limits.style, entry.subject, hole);
                        self.replied(slot, 0);
                    }
                    // Also when the probe failed: the read will tell the error.
                    _ => self.begin(backend, slot, Work::Read { whole: true }, disk::now_ns()),
                }
            }
            (Phase::AtDisk(Work::Read { .. }), Ok(())) => {
                let entry = &mut self.slots[slot];
                let payload = len as usize;
                entry.head.data(self.limits.style, entry.subject, payload);
                self.replied(slot, payload);
            }
            (Phase::AtDisk(Work::Status { one }), Ok(())) => {
                self.status(slot, &extents, one);
            }
            (Phase::AtDisk(Work::Trim { fua: true }), Ok(())) => {
                self.begin(backend, slot, Work::Flush, disk::now_ns());
            }
            (phase, result) => {
                let fast = matches!(phase, Phase::AtDisk(Work::Zero { fast: true, .. }));
                let result = result.map_err(|error| reply::refusal_of(error, fast));
                self.answer(slot, result, false);
                self.replied(slot, 0);
            }
        }
    }

    fn status(&mut self, slot: usize, extents: &[disk::StatusExtent], one: bool) {
        let style = self.limits.style;
        let size = reply::descriptor_bytes(style);
        let entry = &mut self.slots[slot];
        let room = &mut self.loans.bytes_mut(slot)[..EXTENTS_MAX * size];
        let count = reply::put_descriptors(style, extents, entry.len, one, room);
        if count == 0 {
            // A disk that has nothing to say of a range that it has.
            let refusal = reply::refusal_of(GuestError::Io, false);
            entry.head.error(style, entry.subject, &refusal);
        } else {
            entry.head.status(style, entry.subject, count);
        }
        self.replied(slot, count * size);
    }

    /// Encodes an answer without data.
    fn answer(&mut self, slot: usize, result: Result<(), Refusal>, read: bool) {
        let entry = &mut self.slots[slot];
        entry.phase = Phase::Replied;
        entry.payload = 0;
        let style: Style = self.limits.style;
        match result {
            Ok(()) => entry.head.ok(style, entry.subject, read),
            Err(refusal) => entry.head.error(style, entry.subject, &refusal),
        }
    }

    /// Queues the reply of `slot`, whose head is encoded, with so many bytes of its memory behind the head.
    fn replied(&mut self, slot: usize, payload: usize) {
        let entry = &mut self.slots[slot];
        entry.phase = Phase::Replied;
        entry.payload = payload;
        if payload == 0
            && let Some(buffer) = self.loans.take(slot)
        {
            self.pool.give(buffer);
        }
        self.replies.push_back(slot);
    }

    fn release(&mut self, slot: usize) {
        self.slots[slot].phase = Phase::Free;
        if let Some(buffer) = self.loans.take(slot) {
            self.pool.give(buffer);
        }
        self.free.push(slot);
    }

    // Replies

    fn transmit(&mut self, fd: BorrowedFd<'_>) -> bool {
        let mut worked = false;
        while !self.replies.is_empty() && !self.blocked {
            match self.send(fd) {
                Transfer::Bytes(bytes) => {
                    worked = true;
                    self.advance(bytes);
                }
                Transfer::WouldBlock => self.blocked = true,
                Transfer::End | Transfer::Gone => self.abandon(),
            }
        }
        worked
    }

    fn send(&self, fd: BorrowedFd<'_>) -> Transfer {
        let mut pieces = [IoSlice::new(&[]); SEND_PIECES];
        let mut count = 0;
        let mut skip = self.sent;
        for &slot in self.replies.iter().take(SEND_PIECES / 2) {
            let entry = &self.slots[slot];
            for part in [entry.head.bytes(), &self.loans.bytes(slot)[..entry.payload]] {
                let passed = skip.min(part.len());
                skip -= passed;
                if passed < part.len() {
                    pieces[count] = IoSlice::new(&part[passed..]);
                    count += 1;
                }
            }
        }
        wire::send(fd, &pieces[..count])
    }

    /// `bytes` more of the replies were sent.
    fn advance(&mut self, mut bytes: usize) {
        while let Some(&slot) = self.replies.front() {
            let entry = &self.slots[slot];
            let left = entry.head.bytes().len() + entry.payload - self.sent;
            if bytes < left {
                self.sent += bytes;
                return;
            }
            bytes -= left;
            self.sent = 0;
            self.replies.pop_front();
            self.release(slot);
        }
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
