//! From the slots to the socket: as many replies as there are with one `sendmsg`; long ones one at a time.

use super::{Connection, SEND_BYTES, SEND_PIECES};
use crate::nbd::wire::{self, Transfer};
use std::{io::IoSlice, os::fd::BorrowedFd};

impl Connection {
    /// Sends the replies that there are, or [`SEND_BYTES`] of them. Says whether there were any.
    pub(super) fn transmit(&mut self, fd: BorrowedFd<'_>) -> bool {
        let mut worked = false;
        let mut left = SEND_BYTES;
        while !self.replies.is_empty() && !self.blocked && left > 0 {
            match self.send(fd) {
                Transfer::Bytes(bytes) => {
                    worked = true;
                    left = left.saturating_sub(bytes);
                    self.advance(bytes);
                }
                Transfer::WouldBlock => self.blocked = true,
                Transfer::End | Transfer::Gone => self.abandon(),
            }
        }
        worked
    }

    pub(super) fn send(&self, fd: BorrowedFd<'_>) -> Transfer {
        let mut pieces = [IoSlice::new(&[]); SEND_PIECES];
        let mut count = 0;
        let mut bytes = 0;
        let mut skip = self.sent;
        for &slot in self.replies.iter().take(SEND_PIECES / 2) {
            if bytes >= SEND_BYTES {
                break;
            }
            let entry = &self.slots[slot];
            for part in [entry.head.bytes(), &self.loans.bytes(slot)[..entry.payload]] {
                let passed = skip.min(part.len());
                skip -= passed;
                if passed < part.len() {
                    pieces[count] = IoSlice::new(&part[passed..]);
                    count += 1;
                    bytes += part.len() - passed;
                }
            }
        }
        wire::send(fd, &pieces[..count])
    }

    /// `bytes` more of the replies were sent.
    pub(super) fn advance(&mut self, mut bytes: usize) {
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
