//! Descriptor chains: from a head's number to pieces of memory.
//!
//! What the driver wrote is hostile until walked. Two kinds of wrong are told apart:
//!
//! - a [`Fault`] means that the chain's shape makes no sense (a loop, a number beyond the table, an
//!   indirect table within another): where it ends, or what it is, is unknown, so it cannot
//!   be answered, and the queue is broken (virtio 1.2 §2.1.2: the device needs a reset);
//! - a chain that is [`Chain::malformed`] has an end and, with luck, a byte for its status, but a
//!   buffer in it is empty, not in memory, in the wrong order, or there are too many: that request fails.

use super::{
    memory,
    ring::{Descriptor, Ring},
    spec::{DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE},
};
use block::{IoVec, limits::REQUEST_SEGMENTS_MAX};
use std::fmt;

/// Descriptors that a chain may have. A chain through an indirect table may be longer than
/// the ring (Linux makes such); header and status come on top of the data.
pub const DESCRIPTORS_MAX: usize = REQUEST_SEGMENTS_MAX + 2;

/// Why a chain cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The number of a descriptor is beyond its table.
    Index(u16),
    /// More descriptors than the table has (so it loops), or than are supported.
    Endless,
    /// The indirect table is within another, goes on with `next`, is empty, has a length that is
    /// no multiple of 16, or is not in the guest's memory.
    Indirect,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Index(index) => write!(f, "descriptor {index} is beyond its table"),
            Fault::Endless => f.write_str("a descriptor chain has a loop or too many links"),
            Fault::Indirect => f.write_str("an indirect descriptor table is malformed"),
        }
    }
}

/// A walked chain. Kept and reused: its vector stops growing soon.
#[derive(Debug, Default)]
pub struct Chain {
    /// Pieces of memory that the device reads, then those that it writes.
    pub iov: Vec<IoVec>,
    /// How many of `iov` are read.
    pub readable: usize,
    /// Bytes that the device reads.
    pub readable_len: u64,
    /// Bytes that the device may write.
    pub writable_len: u64,
    /// A buffer is unusable; only [`Chain::status`] may be used.
    pub malformed: bool,
    /// The last writable byte: a block request's status. Null when there is none, or it is not
    /// in memory.
    pub status: *mut u8,
}

impl Chain {
    /// An empty chain with room for a usual request.
    pub fn new() -> Self {
        Self {
            iov: Vec::with_capacity(16),
            ..Self::default()
        }
    }

    fn clear(&mut self) {
        self.iov.clear();
        *self = Self {
            iov: std::mem::take(&mut self.iov),
            ..Self::default()
        };
    }

    /// Follows the chain that starts at descriptor `head` of `ring`. `indirect`: whether the
    /// driver may use indirect descriptors.
    ///
    /// # Errors
    ///
    /// A [`Fault`] when the queue is beyond help. Never takes more than [`DESCRIPTORS_MAX`] steps.
    pub fn walk(&mut self, ring: &Ring, head: u16, indirect: bool) -> Result<(), Fault> {
        self.clear();
        let mut index = head;
        for _ in 0..ring.size() {
            let descriptor = ring.descriptor(index).ok_or(Fault::Index(index))?;
            if descriptor.flags & DESC_F_INDIRECT != 0 {
                // §2.7.5.3.1: INDIRECT and NEXT exclude each other.
                if !indirect || descriptor.flags & DESC_F_NEXT != 0 {
                    return Err(Fault::Indirect);
                }
                return self.walk_indirect(ring, descriptor);
            }
            self.take(ring, descriptor);
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Fault::Endless)
    }

    fn walk_indirect(&mut self, ring: &Ring, table: Descriptor) -> Result<(), Fault> {
        let len = u64::from(table.len);
        if len == 0 || !len.is_multiple_of(DESC_BYTES) {
            return Err(Fault::Indirect);
        }
        let base = ring
            .memory()
            .range(table.addr, len)
            .ok_or(Fault::Indirect)?;
        // The links are 16 bits: entries beyond cannot be reached.
        let count = u16::try_from(len / DESC_BYTES).unwrap_or(u16::MAX);
        let mut index = 0;
        for _ in 0..usize::from(count).min(DESCRIPTORS_MAX) {
            if index >= count {
                return Err(Fault::Index(index));
            }
            let mut bytes = [0; DESC_BYTES as usize];
            let at = base.wrapping_add(usize::from(index) * bytes.len());
            // SAFETY: `index < count`, so these bytes lie in the range that `range` vouched for.
            unsafe { memory::read(at, &mut bytes) };
            let descriptor = Descriptor::parse(&bytes);
            if descriptor.flags & DESC_F_INDIRECT != 0 {
                return Err(Fault::Indirect);
            }
            self.take(ring, descriptor);
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Fault::Endless)
    }

    fn take(&mut self, ring: &Ring, descriptor: Descriptor) {
        let memory = ring.memory();
        let writable = descriptor.flags & DESC_F_WRITE != 0;
        if descriptor.len == 0 || !writable && self.writable_len > 0 {
            self.malformed = true;
        }
        if writable && descriptor.len > 0 {
            self.status = descriptor
                .addr
                .checked_add(u64::from(descriptor.len) - 1)
                .and_then(|last| memory.range(last, 1))
                .unwrap_or(std::ptr::null_mut());
        }
        let len = u64::from(descriptor.len);
        if writable {
            self.writable_len += len;
        } else {
            self.readable_len += len;
        }
        let iov = &mut self.iov;
        if !self.malformed {
            let mapped = memory.pieces(descriptor.addr, descriptor.len, |piece| iov.push(piece));
            self.malformed = !mapped || iov.len() > DESCRIPTORS_MAX;
            if !writable {
                self.readable = iov.len();
            }
        }
    }
}
