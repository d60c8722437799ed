//! A split virtqueue (virtio 1.2 §2.7), from the device's side. Unsafe code: shared memory.
//!
//! ```text
//!   descriptor table   size × { addr u64, len u32, flags u16, next u16 }   driver writes
//!   available ring     { flags u16, idx u16, ring[size] u16, used_event u16 }       driver writes
//!   used ring          { flags u16, idx u16, ring[size] { id u32, len u32 }, avail_event u16 }   device writes
//! ```
//!
//! All fields are little endian. The driver's fields change at any time: each is read once, as an
//! atomic, and judged after. An index can be anything; the ring's arrays are only ever accessed modulo
//! the size, and the caller checks descriptor numbers ([`Ring::descriptor`] does).

use super::{
    memory::GuestMemory,
    spec::{AVAIL_F_NO_INTERRUPT, DESC_BYTES, USED_F_NO_NOTIFY},
};
use block::{Error, Result};
use std::sync::{
    Arc,
    atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence},
};

/// Where a front-end says that a ring lies, in its own address space (`VHOST_USER_SET_VRING_ADDR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// A descriptor as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of its buffer.
    pub addr: u64,
    /// The buffer's length in bytes.
    pub len: u32,
    /// `DESC_F_*`.
    pub flags: u16,
    /// The next one, with `DESC_F_NEXT`.
    pub next: u16,
}

impl Descriptor {
    /// Decodes the 16 bytes of a descriptor.
    pub fn parse(bytes: &[u8; DESC_BYTES as usize]) -> Self {
        let word = u128::from_le_bytes(*bytes);
        Self {
            addr: word as u64,
            len: (word >> 64) as u32,
            flags: (word >> 96) as u16,
            next: (word >> 112) as u16,
        }
    }
}

/// The driver claims more available entries than the ring has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun {
    /// `avail.idx` as read.
    pub idx: u16,
    /// The entry that we would take next.
    pub next: u16,
}

/// A virtqueue in guest memory.
pub struct Ring {
    /// Keeps what the pointers point to mapped.
    memory: Arc<GuestMemory>,
    descriptors: *mut u8,
    available: *mut u8,
    used: *mut u8,
    size: u16,
    event_idx: bool,
    /// Entry of the available ring to take next.
    next_avail: u16,
    /// `avail.idx` when last read: spares reading it for each entry.
    seen_avail: u16,
    /// Entry of the used ring to fill next.
    next_used: u16,
    /// `used.idx` as the driver sees it.
    published: u16,
    /// The driver was last asked to notify us.
    notify: bool,
}

// SAFETY: the pointers go to shared memory that lives as long as `memory`; one thread uses them at a time.
unsafe impl Send for Ring {}

impl Ring {
    /// The ring of `size` entries at `at`, whose entry `next_avail` of the available ring is
    /// to be taken first.
    ///
    /// # Errors
    ///
    /// When the size is not a power of two up to 32768, or a part is unaligned or outside the
    /// guest's memory.
    pub fn new(
        memory: Arc<GuestMemory>,
        at: RingAddresses,
        size: u16,
        next_avail: u16,
        event_idx: bool,
    ) -> Result<Self> {
        if !size.is_power_of_two() || size > 1 << 15 {
            return Err(Error::invalid(format!(
                "a ring of {size} entries: a power of two up to 32768 is needed"
            )));
        }
        let entries = u64::from(size);
        let part = |name, at: u64, len, align: u64| {
            let found = memory
                .user_range(at, len)
                .filter(|p| at.is_multiple_of(align) && (p.addr() as u64).is_multiple_of(align));
            found.ok_or_else(|| {
                Error::invalid(format!(
                    "the ring's {name} ({len} bytes at front-end address {at:#x}) is not in the guest's memory \
                     or not aligned to {align} bytes"
                ))
            })
        };
        let descriptors = part("descriptor table", at.descriptors, entries * DESC_BYTES, 16)?;
        let available = part("available ring", at.available, 6 + entries * 2, 2)?;
        let used = part("used ring", at.used, 6 + entries * 8, 4)?;
        let mut ring = Self {
            memory,
            descriptors,
            available,
            used,
            size,
            event_idx,
            next_avail,
            seen_avail: next_avail,
            next_used: 0,
            published: 0,
            notify: true,
        };
        // The used index is nobody's but the ring's: a server that was killed left it there.
        let used_idx = ring.load(ring.used, 2, Ordering::Relaxed);
        ring.next_used = used_idx;
        ring.published = used_idx;
        ring.start_notify_state();
        Ok(ring)
    }

    /// The guest memory that the ring lies in, and its buffers.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// How many entries it has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Chains that are known to wait, without looking at the driver's index again.
    #[inline]
    pub fn known(&self) -> u16 {
        self.seen_avail.wrapping_sub(self.next_avail)
    }

    /// What entry `entry` of the available ring says now: anything.
    #[inline]
    pub fn head(&self, entry: u16) -> u16 {
        self.load(self.available, 4 + 2 * self.index(entry), Ordering::Relaxed)
    }

    /// Where descriptor `index`, modulo the table's size, lies.
    #[inline]
    pub fn descriptor_at(&self, index: u16) -> *const u8 {
        self.descriptors
            .wrapping_add(self.index(index) * DESC_BYTES as usize)
    }

    /// The entry of the available ring that is next (`last_avail_idx` of vhost).
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index as the driver sees it.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Goes on at another entry of the available ring.
    pub fn set_next_avail(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
        self.seen_avail = next_avail;
    }

    #[inline]
    fn load(&self, part: *mut u8, offset: usize, order: Ordering) -> u16 {
        // SAFETY: the callers' offsets lie within the part, whose length `new` checked together
        // with its alignment of at least 2; the mapping lives as long as `self.memory`.
        let field = unsafe { AtomicU16::from_ptr(part.wrapping_add(offset).cast()) };
        u16::from_le(field.load(order))
    }

    #[inline]
    fn store(&self, part: *mut u8, offset: usize, value: u16, order: Ordering) {
        // SAFETY: as in `load`.
        let field = unsafe { AtomicU16::from_ptr(part.wrapping_add(offset).cast()) };
        field.store(value.to_le(), order);
    }

    #[inline]
    fn index(&self, entry: u16) -> usize {
        usize::from(entry & (self.size - 1))
    }

    fn used_event(&self) -> u16 {
        let offset = 4 + 2 * usize::from(self.size);
        self.load(self.available, offset, Ordering::Relaxed)
    }

    fn set_avail_event(&self, value: u16) {
        let offset = 4 + 8 * usize::from(self.size);
        self.store(self.used, offset, value, Ordering::Relaxed);
    }

    fn start_notify_state(&self) {
        self.store(self.used, 0, 0, Ordering::Relaxed);
        if self.event_idx {
            self.set_avail_event(self.next_avail);
        }
    }

    /// The head of the next chain that the driver made available.
    ///
    /// # Errors
    ///
    /// When the driver's index is further ahead than the ring is long.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, Overrun> {
        if self.next_avail == self.seen_avail {
            // Acquire: pairs with the driver's barrier between filling entries and moving the
            // index; what we read of the entries and descriptors comes after.
            self.seen_avail = self.load(self.available, 2, Ordering::Acquire);
            let ahead = self.seen_avail.wrapping_sub(self.next_avail);
            if ahead == 0 {
                return Ok(None);
            }
            if ahead > self.size {
                let idx = self.seen_avail;
                self.seen_avail = self.next_avail;
                return Err(Overrun {
                    idx,
                    next: self.next_avail,
                });
            }
        }
        let head = self.head(self.next_avail);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Descriptor `index` of the table; `None` when there is none.
    #[inline]
    pub fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let at = self
            .descriptors
            .wrapping_add(usize::from(index) * DESC_BYTES as usize);
        // SAFETY: the table holds `size` descriptors and is aligned to 16 bytes (checked in
        // `new`), so both halves are there and aligned to 8.
        let (low, high) = unsafe {
            (
                AtomicU64::from_ptr(at.cast()).load(Ordering::Relaxed),
                AtomicU64::from_ptr(at.wrapping_add(8).cast()).load(Ordering::Relaxed),
            )
        };
        let (low, high) = (u64::from_le(low), u64::from_le(high));
        Some(Descriptor {
            addr: low,
            len: high as u32,
            flags: (high >> 32) as u16,
            next: (high >> 48) as u16,
        })
    }

    /// Puts a chain that is done into the used ring; the driver sees it after [`Ring::publish`].
    /// `written` is the number of bytes written to its buffers.
    #[inline]
    pub fn push(&mut self, head: u16, written: u32) {
        let at = self.used.wrapping_add(4 + 8 * self.index(self.next_used));
        // SAFETY: the used ring holds `size` entries and is aligned to 4 bytes (checked in `new`).
        unsafe {
            AtomicU32::from_ptr(at.cast()).store(u32::from(head).to_le(), Ordering::Relaxed);
            AtomicU32::from_ptr(at.wrapping_add(4).cast())
                .store(written.to_le(), Ordering::Relaxed);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver everything pushed; whether it wants to be notified.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        // Release: the entries, the status bytes and the data that threads of this process wrote
        // are visible before the index.
        self.store(self.used, 2, new, Ordering::Release);
        self.published = new;
        // The driver writes used_event (or the flag) and then looks at the index; we wrote the
        // index and look at used_event now. A full barrier on both sides lets one of us see the other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            // vring_need_event (§2.7.7.2): the index passed `event` in going from `old` to `new`.
            let event = self.used_event();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(self.available, 0, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver not to notify us. With event index, an index just behind what was taken is
    /// passed only after all others (and [`Ring::enable_notify`] sets it anew long before that).
    #[inline]
    pub fn disable_notify(&mut self) {
        if !self.notify {
            return;
        }
        self.notify = false;
        if self.event_idx {
            self.set_avail_event(self.next_avail.wrapping_sub(1));
        } else {
            self.store(self.used, 0, USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks the driver to notify us of the next chain. `false` when there is one already,
    /// of which it may not notify.
    #[inline]
    pub fn enable_notify(&mut self) -> bool {
        self.notify = true;
        if self.event_idx {
            self.set_avail_event(self.next_avail);
        } else {
            self.store(self.used, 0, 0, Ordering::Relaxed);
        }
        // As in `publish`, with the roles exchanged.
        fence(Ordering::SeqCst);
        self.load(self.available, 2, Ordering::Relaxed) == self.next_avail
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("size", &self.size)
            .field("next_avail", &self.next_avail)
            .field("next_used", &self.next_used)
            .finish_non_exhaustive()
    }
}
