//! Virtqueues in a guest's memory, from the device's side: what both layouts have in common.
//!
//! ```text
//!   split    a table of descriptors, a ring of heads to take, a ring of heads that are done    (virtio 1.2 §2.7)
//!   packed   one ring of descriptors, whose flags say whose turn it is                         (§2.8)
//! ```
//!
//! A queue is compiled for each layout, so that neither pays for the other.

mod packed;
mod split;

pub use packed::{Packed, PackedDescriptor, Position};
pub use split::{Descriptor, DriverIndex, Split};

use super::{
    chain::{Chain, Fault},
    inflight::File,
    memory::GuestMemory,
    spec::{DESC_BYTES, DESC_F_INDIRECT},
};
use block::{Error, Result};
use std::{fmt, sync::Arc};

/// Where a front-end says that a ring lies, in its own address space (`VHOST_USER_SET_VRING_ADDR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table; of a packed ring, the ring.
    pub descriptors: u64,
    /// The available ring; of a packed ring, the driver's event suppression.
    pub available: u64,
    /// The used ring; of a packed ring, the device's event suppression.
    pub used: u64,
}

/// All that a ring is made from.
pub struct Place {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Where in it.
    pub at: RingAddresses,
    /// Entries.
    pub size: u16,
    /// Where to go on, as [`Ring::base`] gave it; `None` where a new ring begins.
    pub base: Option<u32>,
    /// Whether the driver and we say of which entry we want to be told (`VIRTIO_F_EVENT_IDX`).
    pub event_idx: bool,
    /// Where requests in flight are noted for the next server.
    pub inflight: Option<File>,
}

impl Place {
    /// The process's address of a part of the ring.
    fn part(&self, name: &str, at: u64, len: u64, align: u64) -> Result<*mut u8> {
        let found = self
            .memory
            .user_range(at, len)
            .filter(|p| at.is_multiple_of(align) && (p.addr() as u64).is_multiple_of(align));
        found.ok_or_else(|| {
            Error::invalid(format!(
                "the ring's {name} ({len} bytes at front-end address {at:#x}) is not in the guest's memory or not \
                 aligned to {align} bytes"
            ))
        })
    }
}

/// What all descriptors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// `DESC_F_*`.
    pub flags: u16,
}

impl Buffer {
    /// Decodes address and length of a descriptor, with which both layouts begin; flags are none.
    pub fn parse(bytes: &[u8; DESC_BYTES as usize], flags: u16) -> Self {
        let word = u128::from_le_bytes(*bytes);
        Self {
            addr: word as u64,
            len: (word >> 64) as u32,
            flags,
        }
    }

    /// Whether it is a table of descriptors.
    pub fn is_table(&self) -> bool {
        self.flags & DESC_F_INDIRECT != 0
    }
}

/// The driver claims to have made more available than the ring holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overrun {
    /// Of a split ring: `avail.idx` as read, and the entry that we would take next.
    Index(DriverIndex),
    /// Of a packed ring: the descriptor at this place is said to be available, and all of the ring's are in flight.
    Descriptor(u16),
}

impl fmt::Display for Overrun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(DriverIndex { idx, next }) => {
                write!(f, "available index {idx} is too far ahead of {next}")
            }
            Self::Descriptor(at) => write!(
                f,
                "descriptor {at} is available although all of the ring are in flight"
            ),
        }
    }
}

/// A virtqueue in a guest's memory.
pub trait Ring: Send + Sized + 'static {
    /// A chain that the driver made available.
    type Entry: Copy;
    /// What names a chain while it is in flight.
    type Head: Copy + Default;

    /// The ring at a place. With a file for requests in flight, those that the last server left come first.
    ///
    /// # Errors
    ///
    /// When the size is none for such a ring, a part is unaligned or outside the guest's memory, there is no such base, or
    /// the file for requests in flight is too small or of another ring.
    fn new(place: Place) -> Result<Self>;

    /// The guest memory that the ring lies in, and its buffers.
    fn memory(&self) -> &Arc<GuestMemory>;

    /// The next chain that the driver made available.
    ///
    /// # Errors
    ///
    /// When the driver claims more than the ring can hold.
    fn pop(&mut self) -> Result<Option<Self::Entry>, Overrun>;

    /// Follows the chain of an entry that [`Ring::pop`] gave just now, which is in flight from then on. `indirect`: whether the
    /// driver may use indirect descriptors.
    ///
    /// # Errors
    ///
    /// The chain makes no sense, and the ring none any more.
    fn walk(
        &mut self,
        entry: Self::Entry,
        chain: &mut Chain,
        indirect: bool,
    ) -> Result<Self::Head, Fault>;

    /// A chain is done, with so many bytes written to its buffers; the driver sees it after [`Ring::publish`].
    fn push(&mut self, head: Self::Head, written: u32);

    /// Shows the driver everything pushed; whether it wants to be notified.
    fn publish(&mut self) -> bool;

    /// Asks the driver not to notify us.
    fn disable_notify(&mut self);

    /// Asks the driver to notify us of the next chain. `false` when there is one already, of which it may not notify.
    fn enable_notify(&mut self) -> bool;

    /// Where the ring stands, as `VHOST_USER_GET_VRING_BASE` says it: of a split ring the entry of the available ring that is
    /// next; of a packed one two times index and, in bit 15, wrap counter: of what is next to take, and of what is next to show as
    /// used.
    fn base(&self) -> u32;

    /// Entries that are known to wait, without looking anew.
    fn known(&self) -> u16;

    /// A number for the entry that is next: it grows by one with each, and wraps around.
    fn next(&self) -> u16;

    /// Where the first descriptor of an entry, one of those known, lies.
    fn descriptor_at(&self, entry: u16) -> *const u8;

    /// The first descriptor of an entry as it is now, which may be anything.
    fn first(&self, entry: u16) -> Option<Buffer>;
}
