//! A split virtqueue in a guest's memory, from the driver's side (virtio 1.2 §2.7).
//!
//! ```text
//!   + 0x0000   descriptor table     16 bytes each: address, length, flags, next
//!   + 0x8000   available ring       flags, idx, heads…, used_event      the driver writes
//!   + 0xa000   used ring            flags, idx, (id, length)…, avail_event   the device writes
//!   +0x10000   indirect tables      the owner's
//! ```

use super::Ram;
use io::EventFd;
use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};
use std::{
    io::Result,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFICATION: u16 = 1;

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

/// The rings and their notifications, without any notion of which descriptors are free:
/// [`super::DriverQueue`] has one, the load generator another.
#[derive(Debug)]
pub struct Ring {
    ram: Arc<Ram>,
    index: u32,
    size: u16,
    descriptors: u64,
    event_idx: bool,
    next_avail: u16,
    /// `avail.idx` when the device was last kicked or found not to need it.
    kicked: u16,
    last_used: u16,
    kick: EventFd,
    call: OwnedFd,
    err: EventFd,
    /// Kicks written.
    pub kicks: u64,
    /// Calls received by [`Ring::wait_call`].
    pub calls: u64,
}

impl Ring {
    /// Rings of `size` entries (a power of two up to [`RING_ENTRIES_MAX`]) in the [`RING_BYTES`] at guest
    /// address `at`.
    ///
    /// # Errors
    ///
    /// The system gives no eventfd, or the size is none.
    pub fn new(ram: Arc<Ram>, at: u64, index: u32, size: u16, event_idx: bool) -> Result<Self> {
        if !size.is_power_of_two() || size > RING_ENTRIES_MAX {
            return Err(std::io::Error::other(format!(
                "a ring of {size} entries: it must be a power of two up to {RING_ENTRIES_MAX}"
            )));
        }
        let fd = || EventFd::new().map_err(|e| std::io::Error::other(e.to_string()));
        ram.write(at, &[0; TABLES as usize]);
        Ok(Self {
            ram,
            index,
            size,
            descriptors: at,
            event_idx,
            next_avail: 0,
            kicked: 0,
            last_used: 0,
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

    /// The memory that it lies in.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Entry of the available ring that comes next.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Guest address of a descriptor.
    pub fn descriptor_at(&self, index: u16) -> u64 {
        self.descriptors + 16 * u64::from(index)
    }

    /// Guest address of the memory for indirect tables, and its bytes.
    pub fn tables(&self) -> (u64, u64) {
        (self.descriptors + TABLES, RING_BYTES - TABLES)
    }

    fn available(&self) -> u64 {
        self.descriptors + 0x8000
    }

    fn used(&self) -> u64 {
        self.descriptors + 0xa000
    }

    /// Descriptor table, available ring and used ring, as this process addresses them.
    pub fn user_addresses(&self) -> (u64, u64, u64) {
        (
            self.ram.user(self.descriptors),
            self.ram.user(self.available()),
            self.ram.user(self.used()),
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

    /// Writes a descriptor at guest address `at` with `flags` besides what `piece` says.
    #[inline]
    pub fn write_descriptor(&self, at: u64, piece: Piece, flags: u16, next: u16) {
        let write = if piece.device_writes { WRITE } else { 0 };
        let word = u128::from(piece.at)
            | u128::from(piece.len) << 64
            | u128::from(flags | write) << 96
            | u128::from(next) << 112;
        self.ram.write(at, &word.to_le_bytes());
    }

    /// Writes a chain of descriptors: the `i`-th piece at `at(i)`, which is number `number(i)`.
    pub fn write_chain(
        &self,
        pieces: &[Piece],
        at: impl Fn(usize) -> u64,
        number: impl Fn(usize) -> u16,
    ) {
        for (i, piece) in pieces.iter().enumerate() {
            let (flags, next) = if i + 1 < pieces.len() {
                (NEXT, number(i + 1))
            } else {
                (0, 0)
            };
            self.write_descriptor(at(i), *piece, flags, next);
        }
    }

    /// Makes the descriptor `head` one for an indirect table of `count` entries at `table`.
    #[inline]
    pub fn write_indirect(&self, head: u16, table: u64, count: u32) {
        let piece = Piece::read(table, 16 * count);
        self.write_descriptor(self.descriptor_at(head), piece, INDIRECT, 0);
    }

    /// Puts any number in the available ring.
    #[inline]
    pub fn make_available(&mut self, head: u16) {
        let entry = self.available() + 4 + 2 * u64::from(self.next_avail % self.size);
        self.ram.store(entry, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_available_index(self.next_avail);
    }

    /// Sets the available index to any value.
    #[inline]
    pub fn set_available_index(&mut self, idx: u16) {
        self.ram.store(self.available() + 2, idx, Ordering::Release);
    }

    /// Kicks, if the device wants it.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be written.
    #[inline]
    pub fn kick(&mut self) -> Result<()> {
        let (old, new) = (self.kicked, self.next_avail);
        if old == new {
            return Ok(());
        }
        fence(Ordering::SeqCst);
        self.kicked = new;
        let wanted = if self.event_idx {
            let at = self.used() + 4 + 8 * u64::from(self.size);
            let event = self.ram.load(at, Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.ram.load(self.used(), Ordering::Relaxed) & NO_NOTIFICATION == 0
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

    /// Does what a device does at the end of a chain: for a device that died afterwards.
    pub fn push_used(&mut self, head: u16) {
        let used = self.used();
        let idx = self.ram.load(used + 2, Ordering::Relaxed);
        let entry = used + 4 + 8 * u64::from(idx % self.size);
        self.ram.write(entry, &u32::from(head).to_le_bytes());
        self.ram
            .store(used + 2, idx.wrapping_add(1), Ordering::Release);
    }

    /// The device's next entry in the used ring, unchecked: id and bytes written.
    #[inline]
    pub fn pop_used(&mut self) -> Option<(u32, u32)> {
        if self.ram.load(self.used() + 2, Ordering::Acquire) == self.last_used {
            return None;
        }
        let mut entry = [0; 8];
        let at = self.used() + 4 + 8 * u64::from(self.last_used % self.size);
        self.ram.read_into(at, &mut entry);
        self.last_used = self.last_used.wrapping_add(1);
        let word = u64::from_le_bytes(entry);
        Some((word as u32, (word >> 32) as u32))
    }

    /// Asks for a call when the next chain is done; `false` when one is done already.
    #[inline]
    pub fn enable_call(&mut self) -> bool {
        if self.event_idx {
            let at = self.available() + 4 + 2 * u64::from(self.size);
            self.ram.store(at, self.last_used, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.ram.load(self.used() + 2, Ordering::Relaxed) == self.last_used
    }

    /// Asks for no calls at all (with the event index: one in 65,536 chains), for a driver that polls.
    pub fn refuse_calls(&mut self) {
        if self.event_idx {
            let at = self.available() + 4 + 2 * u64::from(self.size);
            let behind = self.last_used.wrapping_sub(1);
            self.ram.store(at, behind, Ordering::Relaxed);
        } else {
            self.ram
                .store(self.available(), NO_NOTIFICATION, Ordering::Relaxed);
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
