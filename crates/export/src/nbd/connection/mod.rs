//! The transmission phase of one connection, without a worker or a disk of its own.
//!
//! ```text
//!   socket ─▶ staging ─▶ header ─▶ plan ─▶ slot, memory ─▶ disk
//!                 └─ payloads, straight into the slot's memory   │
//!   socket ◀─ one sendmsg ◀─ replies in order of completion ◀────┘
//! ```
//!
//! | file | from | to |
//! |---|---|---|
//! | `intake.rs` | socket | disk |
//! | `work.rs` | disk | reply |
//! | `output.rs` | reply | socket |
//!
//! Nothing is read while all slots or all memory are in use: a client that does not take
//! its replies holds its own slots and memory and no more. In the steady state nothing here allocates.

mod intake;
mod output;
mod work;

use super::{
    lend::{Backend, Loans, Seen},
    memory::Pool,
    reply::{Head, Subject},
    request::{Limits, Work},
};
use std::{collections::VecDeque, ops::Range, os::fd::BorrowedFd};

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
/// Extents of one block status reply, and bytes that one query looks at: what a worker can find out without
/// keeping its other sessions waiting. Clients ask again for the rest.
const EXTENTS_MAX: usize = 256;
const STATUS_BYTES_MAX: u64 = 4 << 30;
/// Reads from here on ask first whether there is anything but zeros.
const PROBE_BYTES: u64 = 64 << 10;
/// So far ahead is asked where reads follow each other.
const PROBE_AHEAD: u64 = 64 << 20;
/// Replies of so many bytes are long: copying them takes as long as a device needs for a request.
const LONG_BYTES: usize = 128 << 10;
/// Bytes of one `sendmsg`, to within a reply: what ended meanwhile and new requests have their turn then.
const SEND_BYTES: usize = 256 << 10;

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
    seen: Seen,
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
    /// When the worker was woken for what is received next; 0: it was not.
    woken_ns: u64,
    /// Where the last probe found data: reads within it need none. What others trim meanwhile is read as the zeros
    /// that it is, and only not sent as a hole.
    data: Range<u64>,
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
                    seen: Seen::default(),
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
            woken_ns: 0,
            data: 0..0,
        }
    }

    /// The socket has something to receive, or is gone. `false` when that changes nothing: there was
    /// something already, and it has to wait.
    pub(crate) fn readable(&mut self) -> bool {
        let useful = !(self.readable && self.stalled());
        self.readable = true;
        useful
    }

    /// The worker was woken at `ns` (of [`disk::now_ns`]) since the socket has something to receive.
    pub(crate) fn woken(&mut self, ns: u64) {
        self.woken_ns = ns;
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

    /// Whether [`Connection::receive`], [`Connection::deliver_first`] would get further without anything
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

    /// Before requests are taken: what the disk finished, and its replies. Their client waits for them, and they free
    /// slots and memory. Long ones wait for [`Self::deliver_last`]. Says whether there was anything.
    pub(crate) fn deliver_first(&mut self, backend: &mut impl Backend, fd: BorrowedFd<'_>) -> bool {
        let worked = self.reap(backend);
        worked | (!self.has_long_replies() && self.transmit(fd))
    }

    /// After requests were taken: what the disk had in memory, refusals, and long replies. The device works while these
    /// are copied. Says whether there was anything.
    pub(crate) fn deliver_last(&mut self, backend: &mut impl Backend, fd: BorrowedFd<'_>) -> bool {
        let worked = self.reap(backend);
        if self.has_long_replies() {
            backend.push();
        }
        worked | self.transmit(fd)
    }

    /// Whether copying the replies that there are takes its time.
    fn has_long_replies(&self) -> bool {
        let payloads = self.replies.iter().map(|slot| self.slots[*slot].payload);
        !self.blocked && payloads.sum::<usize>() >= LONG_BYTES
    }
}

#[cfg(test)]
mod storm;
#[cfg(test)]
mod tests;
