//! From the socket to the disk: receiving, taking apart, giving a request its slot and memory.

use super::{
    Connection, EXTENTS_MAX, LARGE_BYTES, Phase, Receiving, STAGING_BYTES, STAGING_BYTES_SMALL,
    Stall, State, TURN_BYTES,
};
use crate::nbd::{
    lend::{Backend, Seen},
    reply::{self, Subject},
    request::{Plan, Work, plan},
    wire::{self, Transfer},
};
use nbd::{proto::cmd, request::Header};
use std::{io::IoSliceMut, os::fd::BorrowedFd};

impl Connection {
    /// Takes requests and gives them to the disk. Says whether there were any.
    pub(crate) fn receive(&mut self, backend: &mut impl Backend, fd: BorrowedFd<'_>) -> bool {
        if self.state != State::Open || !self.stall_is_over() {
            return false;
        }
        if !self.readable && self.stall == Stall::None {
            return false;
        }
        self.stall = Stall::None;
        let arrived_ns = match std::mem::take(&mut self.woken_ns) {
            0 => disk::now_ns(),
            woken_ns => woken_ns,
        };
        let mut left = TURN_BYTES;
        let mut worked = false;
        loop {
            worked |= self.parse(backend, arrived_ns);
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
    pub(super) fn fill(&mut self, fd: BorrowedFd<'_>) -> Transfer {
        // What is left is less than a header, or nothing.
        self.staging.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let room = if self.large {
            STAGING_BYTES_SMALL
        } else {
            STAGING_BYTES
        };
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

    /// Uses what was received as far as it goes; it was there at `arrived_ns`.
    pub(super) fn parse(&mut self, backend: &mut impl Backend, arrived_ns: u64) -> bool {
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
                        self.begin(backend, slot, work);
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
                            if !self.accept(backend, &header, arrived_ns) {
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
    pub(super) fn accept(
        &mut self,
        backend: &mut impl Backend,
        header: &Header,
        arrived_ns: u64,
    ) -> bool {
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
        // Since its turn began it has waited behind those before it.
        entry.seen = Seen {
            arrived_ns,
            taken_ns: disk::now_ns(),
        };
        entry.payload = 0;
        match plan {
            Plan::Work(work @ Work::Write { .. }) => {
                entry.phase = Phase::Filling(work);
                self.large = memory >= LARGE_BYTES;
                self.receiving = Receiving::Payload { slot, filled: 0 };
            }
            Plan::Work(work) => {
                self.large = false;
                self.begin(backend, slot, work);
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
}
