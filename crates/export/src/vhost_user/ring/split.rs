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
//! the size, and the caller checks descriptor numbers ([`Split::descriptor`] does).

use super::{Buffer, Overrun, Place, Ring};
use crate::vhost_user::{
    chain::{Chain, Fault},
    inflight,
    memory::GuestMemory,
    spec::{AVAIL_F_NO_INTERRUPT, DESC_BYTES, USED_F_NO_NOTIFY},
};
use block::{Error, Result};
use std::sync::{
    Arc,
    atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence},
};

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
    /// What it has in common with those of the other layout.
    #[inline]
    pub fn buffer(&self) -> Buffer {
        Buffer {
            addr: self.addr,
            len: self.len,
            flags: self.flags,
        }
    }

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
pub struct DriverIndex {
    /// `avail.idx` as read.
    pub idx: u16,
    /// The entry that we would take next.
    pub next: u16,
}

/// A split virtqueue in guest memory.
pub struct Split {
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
    inflight: Option<inflight::Split>,
    /// Heads that a server before us took and did not answer, the oldest last.
    resume: Vec<u16>,
}

// SAFETY: the pointers go to shared memory that lives as long as `memory`; one thread uses them at a time.
unsafe impl Send for Split {}

impl Split {
    /// How many entries it has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// What entry `entry` of the available ring says now: anything.
    #[inline]
    fn head(&self, entry: u16) -> u16 {
        self.load(self.available, 4 + 2 * self.index(entry), Ordering::Relaxed)
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
}

impl Ring for Split {
    type Entry = u16;
    type Head = u16;

    fn new(place: Place) -> Result<Self> {
        let size = place.size;
        if !size.is_power_of_two() || size > 1 << 15 {
            return Err(Error::invalid(format!(
                "a ring of {size} entries: a power of two up to 32768 is needed"
            )));
        }
        let next_avail = u16::try_from(place.base.unwrap_or(0)).map_err(|_| {
            Error::invalid(format!(
                "base {:#x} is not 16 bits, as an entry of a split ring is",
                place.base.unwrap_or(0)
            ))
        })?;
        let entries = u64::from(size);
        let at = place.at;
        let descriptors =
            place.part("descriptor table", at.descriptors, entries * DESC_BYTES, 16)?;
        let available = place.part("available ring", at.available, 6 + entries * 2, 2)?;
        let used = place.part("used ring", at.used, 6 + entries * 8, 4)?;
        let mut ring = Self {
            memory: place.memory,
            descriptors,
            available,
            used,
            size,
            event_idx: place.event_idx,
            next_avail,
            seen_avail: next_avail,
            next_used: 0,
            published: 0,
            notify: true,
            inflight: place.inflight.map(inflight::Split::new).transpose()?,
            resume: Vec::new(),
        };
        // The used index is nobody's but the ring's: a server that was killed left it there.
        let used_idx = ring.load(ring.used, 2, Ordering::Relaxed);
        ring.next_used = used_idx;
        ring.published = used_idx;
        if let Some(inflight) = &mut ring.inflight {
            let mut resume = inflight.recover(used_idx);
            // More cannot be taken from a ring than it has entries.
            resume.truncate(usize::from(size));
            resume.reverse();
            if !resume.is_empty() {
                // Everything that was taken and not answered is in `resume`, whatever the
                // front-end, which only sees the used index, makes of it.
                ring.next_avail = used_idx.wrapping_add(resume.len() as u16);
                ring.seen_avail = ring.next_avail;
            }
            ring.resume = resume;
        }
        ring.start_notify_state();
        Ok(ring)
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    #[inline]
    fn pop(&mut self) -> Result<Option<u16>, Overrun> {
        if let Some(head) = self.resume.pop() {
            return Ok(Some(head));
        }
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
                let next = self.next_avail;
                return Err(Overrun::Index(DriverIndex { idx, next }));
            }
        }
        let head = self.head(self.next_avail);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    #[inline]
    fn walk(&mut self, head: u16, chain: &mut Chain, indirect: bool) -> Result<u16, Fault> {
        chain.walk_split(self, head, indirect)?;
        chain.answerable()?;
        if let Some(inflight) = &mut self.inflight {
            inflight.take(head);
        }
        Ok(head)
    }

    #[inline]
    fn push(&mut self, head: u16, written: u32) {
        let at = self.used.wrapping_add(4 + 8 * self.index(self.next_used));
        // SAFETY: the used ring holds `size` entries and is aligned to 4 bytes (checked in `new`).
        unsafe {
            AtomicU32::from_ptr(at.cast()).store(u32::from(head).to_le(), Ordering::Relaxed);
            AtomicU32::from_ptr(at.wrapping_add(4).cast())
                .store(written.to_le(), Ordering::Relaxed);
        }
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.done(head);
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        // Release: the entries, the status bytes and the data that threads of this process wrote
        // are visible before the index.
        self.store(self.used, 2, new, Ordering::Release);
        self.published = new;
        if let Some(inflight) = &mut self.inflight {
            inflight.published(new);
        }
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

    /// With event index, an index just behind what was taken is passed only after all others (and
    /// [`Ring::enable_notify`] sets it anew long before that).
    #[inline]
    fn disable_notify(&mut self) {
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

    #[inline]
    fn enable_notify(&mut self) -> bool {
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

    fn base(&self) -> u32 {
        self.next_avail.into()
    }

    #[inline]
    fn known(&self) -> u16 {
        self.seen_avail.wrapping_sub(self.next_avail)
    }

    #[inline]
    fn next(&self) -> u16 {
        self.next_avail
    }

    #[inline]
    fn descriptor_at(&self, entry: u16) -> *const u8 {
        self.descriptors
            .wrapping_add(self.index(self.head(entry)) * DESC_BYTES as usize)
    }

    #[inline]
    fn first(&self, entry: u16) -> Option<Buffer> {
        Some(self.descriptor(self.head(entry))?.buffer())
    }
}
