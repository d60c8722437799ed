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
    memory::{self, GuestMemory},
    ring::{Buffer, Descriptor, PackedDescriptor, Ring, Split},
    spec::{DESC_BYTES, DESC_F_NEXT, DESC_F_WRITE},
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
    /// There is no byte for a status.
    Status,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Index(index) => write!(f, "descriptor {index} is beyond its table"),
            Fault::Endless => f.write_str("a descriptor chain has a loop or too many links"),
            Fault::Indirect => f.write_str("an indirect descriptor table is malformed"),
            Fault::Status => f.write_str("a descriptor chain has no byte for a status"),
        }
    }
}

/// An indirect table in the guest's memory.
struct Table {
    base: *mut u8,
    count: u16,
}

impl Table {
    /// The table that a descriptor of the ring is. It lasts as long as `memory`.
    fn new(memory: &GuestMemory, descriptor: Buffer, allowed: bool) -> Result<Self, Fault> {
        let len = u64::from(descriptor.len);
        // §2.7.5.3.1, §2.8.7: INDIRECT and NEXT exclude each other.
        let alone = descriptor.flags & DESC_F_NEXT == 0;
        if !allowed || !alone || len == 0 || !len.is_multiple_of(DESC_BYTES) {
            return Err(Fault::Indirect);
        }
        let base = memory.range(descriptor.addr, len).ok_or(Fault::Indirect)?;
        // The links are 16 bits: entries beyond cannot be reached.
        let count = u16::try_from(len / DESC_BYTES).unwrap_or(u16::MAX);
        Ok(Self { base, count })
    }

    #[inline]
    fn read(&self, index: u16) -> Result<[u8; DESC_BYTES as usize], Fault> {
        if index >= self.count {
            return Err(Fault::Index(index));
        }
        let mut bytes = [0; DESC_BYTES as usize];
        let at = self.base.wrapping_add(usize::from(index) * bytes.len());
        // SAFETY: `index < count`, so these bytes lie in the range that `range` vouched for, and whose memory outlives
        // the walk that `self` is made for.
        unsafe { memory::read(at, &mut bytes) };
        Ok(bytes)
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

    /// Whether what was walked can be answered. What cannot must not be noted as being in flight: it would be for ever.
    ///
    /// # Errors
    ///
    /// [`Fault::Status`].
    pub fn answerable(&self) -> Result<(), Fault> {
        match self.status.is_null() {
            true => Err(Fault::Status),
            false => Ok(()),
        }
    }

    /// Follows the chain that starts at descriptor `head` of a split ring. `indirect`: whether the
    /// driver may use indirect descriptors.
    ///
    /// # Errors
    ///
    /// A [`Fault`] when the queue is beyond help. Never takes more than [`DESCRIPTORS_MAX`] steps.
    pub fn walk_split(&mut self, ring: &Split, head: u16, indirect: bool) -> Result<(), Fault> {
        self.clear();
        let mut index = head;
        for _ in 0..ring.size() {
            let descriptor = ring.descriptor(index).ok_or(Fault::Index(index))?;
            let buffer = descriptor.buffer();
            if buffer.is_table() {
                let table = Table::new(ring.memory(), buffer, indirect)?;
                return self.walk_table(ring.memory(), &table);
            }
            self.take(ring.memory(), buffer);
            if buffer.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Fault::Endless)
    }

    /// Follows a chain of a packed ring, whose descriptors `read` gives one after the other, and `None` behind the last
    /// that there can be. Returns the driver's number for it, and how many descriptors of the ring it has.
    ///
    /// # Errors
    ///
    /// As [`Chain::walk_split`].
    pub fn walk_packed(
        &mut self,
        memory: &GuestMemory,
        mut read: impl FnMut(u16) -> Option<PackedDescriptor>,
        indirect: bool,
    ) -> Result<(u16, u16), Fault> {
        self.clear();
        let mut count = 0;
        loop {
            let PackedDescriptor { buffer, id } = read(count).ok_or(Fault::Endless)?;
            count += 1;
            if buffer.is_table() {
                let table = Table::new(memory, buffer, indirect)?;
                // §2.8.7: an entry is followed by the next, and no flag means anything but WRITE.
                if usize::from(table.count) > DESCRIPTORS_MAX {
                    return Err(Fault::Endless);
                }
                for index in 0..table.count {
                    let bytes = table.read(index)?;
                    let flags = u16::from_le_bytes([bytes[14], bytes[15]]) & DESC_F_WRITE;
                    self.take(memory, Buffer::parse(&bytes, flags));
                }
                return Ok((id, count));
            }
            self.take(memory, buffer);
            if buffer.flags & DESC_F_NEXT == 0 {
                return Ok((id, count));
            }
        }
    }

    fn walk_table(&mut self, memory: &GuestMemory, table: &Table) -> Result<(), Fault> {
        let count = table.count;
        let mut index = 0;
        for _ in 0..usize::from(count).min(DESCRIPTORS_MAX) {
            let descriptor = Descriptor::parse(&table.read(index)?);
            if descriptor.buffer().is_table() {
                return Err(Fault::Indirect);
            }
            self.take(memory, descriptor.buffer());
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Fault::Endless)
    }

    fn take(&mut self, memory: &GuestMemory, descriptor: Buffer) {
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
