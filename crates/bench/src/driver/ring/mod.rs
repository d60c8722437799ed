//! A virtqueue in a guest's memory, from the driver's side: split (virtio 1.2 §2.7) or packed (§2.8).
//!
//! ```text
//!              split                                                              packed
//!   + 0x0000   descriptor table     16 bytes each: address, length, flags, next   descriptor ring: address, length, id, flags
//!   + 0x8000   available ring       flags, idx, heads…, used_event                driver event suppression     the driver writes
//!   + 0xa000   used ring            flags, idx, (id, length)…, avail_event        device event suppression     the device writes
//!   +0x10000   indirect tables      the owner's
//! ```

mod packed;
mod split;

use super::{Ram, feature};
use io::EventFd;
use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};
use std::{
    io::Result,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where the driver's ring or structure lies, and the device's.
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;
/// Where indirect tables may lie in a ring's memory.
const TABLES: u64 = 0x10000;
/// Bytes of a ring's memory.
pub const RING_BYTES: u64 = 256 << 10;
/// Entries of a ring at most: 32 KiB of descriptors.
pub const RING_ENTRIES_MAX: u16 = 2048;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Guest address.
    pub at: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it, else it reads.
    pub device_writes: bool,
}

impl Piece {
    /// The device reads it.
    pub fn read(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            device_writes: false,
        }
    }

    /// The device writes it.
    pub fn write(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            device_writes: true,
        }
    }
}

/// A chain to offer to the device.
#[derive(Clone, Copy, Debug)]
pub enum Chain<'a> {
    /// An indirect table of so many descriptors at a guest address.
    Table(u64, u32),
    /// Descriptors of the ring. Of a split one those from the head on, one after the other.
    Pieces(&'a [Piece]),
}

#[derive(Debug)]
enum Layout {
    Split(split::Split),
    Packed(packed::Packed),
}

/// The rings and their notifications, without any notion of which descriptors are free:
/// [`super::DriverQueue`] has one, the load generator another.
#[derive(Debug)]
pub struct Ring {
    ram: Arc<Ram>,
    index: u32,
    size: u16,
    at: u64,
    layout: Layout,
    kick: EventFd,
    call: OwnedFd,
    err: EventFd,
    /// Kicks written.
    pub kicks: u64,
    /// Calls received by [`Ring::wait_call`].
    pub calls: u64,
}

impl Ring {
    /// Rings of `size` entries (up to [`RING_ENTRIES_MAX`]; of a split one a power of two) in the [`RING_BYTES`] at guest
    /// address `at`. What was agreed on in `features` says which layout, and how each side says when it wants to be told.
    ///
    /// # Errors
    ///
    /// The system gives no eventfd, or the size is none.
    pub fn new(ram: Arc<Ram>, at: u64, index: u32, size: u16, features: u64) -> Result<Self> {
        let packed = features & feature::PACKED != 0;
        let event_idx = features & feature::EVENT_IDX != 0;
        if size == 0 || size > RING_ENTRIES_MAX || !packed && !size.is_power_of_two() {
            let what = if packed { "a number" } else { "a power of two" };
            return Err(std::io::Error::other(format!(
                "a ring of {size} entries: it must be {what} up to {RING_ENTRIES_MAX}"
            )));
        }
        let fd = || EventFd::new().map_err(|e| std::io::Error::other(e.to_string()));
        ram.write(at, &[0; TABLES as usize]);
        let layout = if packed {
            Layout::Packed(packed::Packed::new(ram.clone(), at, size, event_idx))
        } else {
            Layout::Split(split::Split::new(ram.clone(), at, size, event_idx))
        };
        Ok(Self {
            ram,
            index,
            size,
            at,
            layout,
            kick: fd()?,
            // Blocking: sleeping until a call is one system call.
            call: eventfd(0, EventfdFlags::CLOEXEC)?,
            err: fd()?,
            kicks: 0,
            calls: 0,
        })
    }

    /// Which queue of the device it is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether it is a packed one.
    pub fn is_packed(&self) -> bool {
        matches!(self.layout, Layout::Packed(_))
    }

    /// The memory that it lies in.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Of a split ring: the entry of the available ring that comes next.
    ///
    /// # Panics
    ///
    /// The ring is a packed one.
    pub fn next_avail(&self) -> u16 {
        match &self.layout {
            Layout::Split(ring) => ring.next_avail,
            Layout::Packed(_) => panic!("a packed ring has no available ring"),
        }
    }

    /// The descriptors that are free: of a split ring that is the owner's knowledge.
    pub(super) fn free(&self) -> Option<u16> {
        match &self.layout {
            Layout::Split(_) => None,
            Layout::Packed(ring) => Some(ring.free()),
        }
    }

    /// Where the ring begins for a device that has taken nothing of what is not done, as `VHOST_USER_SET_VRING_BASE` says it: of a
    /// split ring that is 0, where it is new.
    pub fn base(&self) -> u32 {
        match &self.layout {
            Layout::Split(_) => 0,
            Layout::Packed(ring) => ring.base(),
        }
    }

    /// Guest address of a descriptor.
    pub fn descriptor_at(&self, index: u16) -> u64 {
        self.at + 16 * u64::from(index)
    }

    /// Guest address of the memory for indirect tables, and its bytes.
    pub fn tables(&self) -> (u64, u64) {
        (self.at + TABLES, RING_BYTES - TABLES)
    }

    /// What `VHOST_USER_SET_VRING_ADDR` calls descriptor table, available ring and used ring, as this process addresses them.
    pub fn user_addresses(&self) -> (u64, u64, u64) {
        (
            self.ram.user(self.at),
            self.ram.user(self.at + AVAILABLE),
            self.ram.user(self.at + USED),
        )
    }

    /// What the device waits on.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// What the driver waits on.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// What the device signals a broken ring on.
    pub fn err_fd(&self) -> BorrowedFd<'_> {
        self.err.as_fd()
    }

    /// Whether the device signalled an error, waiting for it a while.
    pub fn wait_err(&self) -> bool {
        super::wait_readable(self.err.as_fd()) && matches!(self.err.read(), Ok(Some(_)))
    }

    /// Writes a descriptor at guest address `at`, as the ring's layout has it, with `flags` besides what `piece` says. `link` is the
    /// next one's number, or of a packed ring the chain's.
    #[inline]
    pub fn write_descriptor(&self, at: u64, piece: Piece, flags: u16, link: u16) {
        let word = match &self.layout {
            Layout::Split(_) => split::descriptor(piece, flags, link),
            Layout::Packed(_) => packed::descriptor(piece, link, flags),
        };
        self.ram.write(at, &word.to_le_bytes());
    }

    /// Writes an indirect table at guest address `at`.
    pub fn write_table(&self, at: u64, pieces: &[Piece]) {
        let place = |i| at + 16 * i as u64;
        match &self.layout {
            Layout::Split(ring) => ring.write_chain(pieces, place, |i| i as u16),
            Layout::Packed(_) => {
                for (i, piece) in pieces.iter().enumerate() {
                    self.write_descriptor(place(i), *piece, 0, 0);
                }
            }
        }
    }

    /// Of a split ring: writes a chain of its descriptors, which have these numbers.
    ///
    /// # Panics
    ///
    /// The ring is a packed one.
    pub(super) fn write_chain(&self, pieces: &[Piece], number: impl Fn(usize) -> u16) {
        match &self.layout {
            Layout::Split(ring) => {
                ring.write_chain(pieces, |i| self.descriptor_at(number(i)), &number);
            }
            Layout::Packed(_) => panic!("a packed ring's chains have their place"),
        }
    }

    /// Makes a chain available under a number, which is not in flight: of a split ring its head's. There must be room. `same`
    /// says that the number's last chain was the same.
    #[inline]
    pub fn offer(&mut self, head: u16, chain: Chain<'_>, same: bool) {
        match (&mut self.layout, chain) {
            (Layout::Split(ring), chain) => {
                match chain {
                    _ if same => {}
                    Chain::Table(at, count) => ring.write_indirect(head, at, count),
                    Chain::Pieces(pieces) => {
                        let at = ring.at;
                        ring.write_chain(
                            pieces,
                            |i| at + 16 * (u64::from(head) + i as u64),
                            |i| head + i as u16,
                        );
                    }
                }
                ring.make_available(head);
            }
            (Layout::Packed(ring), Chain::Table(at, count)) => ring.offer_table(head, at, count),
            (Layout::Packed(ring), Chain::Pieces(pieces)) => {
                ring.offer(head, pieces.iter().map(|piece| (*piece, 0)));
            }
        }
    }

    /// Puts any number in the available ring; of a packed ring makes the next descriptor available, whatever lies there.
    #[inline]
    pub fn make_available(&mut self, head: u16) {
        match &mut self.layout {
            Layout::Split(ring) => ring.make_available(head),
            Layout::Packed(ring) => ring.make_available(),
        }
    }

    /// Sets the available index to any value; of a packed ring turns the ownership of that descriptor over.
    #[inline]
    pub fn set_available_index(&mut self, idx: u16) {
        match &mut self.layout {
            Layout::Split(ring) => ring.set_available_index(idx),
            Layout::Packed(ring) => ring.turn_over(idx),
        }
    }

    /// Kicks, if the device wants it.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    #[inline]
    pub fn kick(&mut self) -> Result<()> {
        let wanted = match &mut self.layout {
            Layout::Split(ring) => ring.wants_kick(),
            Layout::Packed(ring) => ring.wants_kick(),
        };
        if wanted { self.kick_always() } else { Ok(()) }
    }

    /// Kicks, whether the device wants it or not.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    pub fn kick_always(&mut self) -> Result<()> {
        self.kicks += 1;
        self.kick
            .write()
            .map_err(|e| std::io::Error::other(e.to_string()))
    }

    /// Does what a device does at the end of a chain of a split ring: for a device that died afterwards.
    ///
    /// # Panics
    ///
    /// The ring is a packed one.
    pub fn push_used(&mut self, head: u16) {
        match &mut self.layout {
            Layout::Split(ring) => ring.push_used(head),
            Layout::Packed(_) => panic!("a packed ring has no used ring"),
        }
    }

    /// The device's next used chain, unchecked: id and bytes written.
    #[inline]
    pub fn pop_used(&mut self) -> Option<(u32, u32)> {
        match &mut self.layout {
            Layout::Split(ring) => ring.pop_used(),
            Layout::Packed(ring) => ring.pop_used(),
        }
    }

    /// Asks for a call when the next chain is done; `false` when one is done already.
    #[inline]
    pub fn enable_call(&mut self) -> bool {
        match &mut self.layout {
            Layout::Split(ring) => ring.enable_call(),
            Layout::Packed(ring) => ring.enable_call(),
        }
    }

    /// Asks for no calls at all (of a split ring with the event index: one in 65,536 chains), for a driver that polls.
    pub fn refuse_calls(&mut self) {
        match &mut self.layout {
            Layout::Split(ring) => ring.refuse_calls(),
            Layout::Packed(ring) => ring.refuse_calls(),
        }
    }

    /// Sleeps until the device calls.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be read.
    pub fn wait_call(&mut self) -> Result<()> {
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&self.call, &mut count) {
                Ok(_) => {
                    self.calls += 1;
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                // Some servers make the descriptors that they get non-blocking, which is then true here too.
                Err(Errno::AGAIN) => {
                    super::wait_readable(self.call.as_fd());
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}
