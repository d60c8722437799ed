//! A packed virtqueue (virtio 1.2 §2.8), from the device's side. Unsafe code: shared memory.
//!
//! ```text
//!   descriptor ring            size × { addr u64, len u32, id u16, flags u16 }     both write
//!   driver event suppression   { off_wrap u16, flags u16 }                         driver writes
//!   device event suppression   { off_wrap u16, flags u16 }                         device writes
//! ```
//!
//! A descriptor is available where its flag AVAIL is the driver's wrap counter and USED is not; it is used where both are
//! the device's. A chain of several has its place in the ring one behind the other, and its number in the last. What is used is
//! written from where the last one ended, over whatever was taken there, and skips as many as were taken.
//!
//! All fields are little endian. The driver's change at any time: each descriptor is read once and judged after. Nothing
//! in the ring says where something else lies, but the addresses of buffers.

use super::{Buffer, Overrun, Place, Ring};
use crate::vhost_user::{
    chain::{Chain, Fault},
    inflight,
    memory::GuestMemory,
    spec::{
        DESC_BYTES, DESC_F_AVAIL, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE, EVENT_F_DESC,
        EVENT_F_DISABLE, EVENT_F_ENABLE,
    },
};
use block::{Error, Result};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU64, Ordering, fence},
    },
};

/// Entries of a ring at most (§2.8.10.1).
const SIZE_MAX: u16 = 1 << 15;

/// How many descriptors are looked at ahead: what is fetched for the next requests is as far ahead as this.
const LOOK: u16 = 8;
/// With fewer left, more are looked for.
const LOOK_AGAIN: u16 = 5;

/// A descriptor as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedDescriptor {
    /// Address, length and flags.
    pub buffer: Buffer,
    /// The driver's number for the chain, in its last descriptor.
    pub id: u16,
}

/// A place in the ring, and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Descriptor.
    pub index: u16,
    /// Turns over with each lap, and begins as true.
    pub wrap: bool,
}

impl Position {
    /// Where a new ring begins.
    pub const START: Self = Self {
        index: 0,
        wrap: true,
    };

    /// Index, and the wrap counter in bit 15.
    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    fn from_bits(bits: u16) -> Self {
        Self {
            index: bits & !(1 << 15),
            wrap: bits >> 15 != 0,
        }
    }

    /// `count`, at most `size`, further in a ring of `size`.
    #[inline]
    pub fn plus(self, count: u16, size: u16) -> Self {
        // Both are at most 32768.
        let index = u32::from(self.index) + u32::from(count);
        if index < u32::from(size) {
            Self {
                index: index as u16,
                ..self
            }
        } else {
            Self {
                index: (index - u32::from(size)) as u16,
                wrap: !self.wrap,
            }
        }
    }

    /// The two flags of a descriptor that is available here.
    #[inline]
    fn available(self) -> u16 {
        if self.wrap { DESC_F_AVAIL } else { DESC_F_USED }
    }

    /// The two flags of a descriptor that is used here.
    #[inline]
    fn used(self) -> u16 {
        if self.wrap {
            DESC_F_AVAIL | DESC_F_USED
        } else {
            0
        }
    }
}

/// A chain to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// At the ring's next descriptor.
    Next,
    /// One that a server before us took: its entry among those in flight, and how many descriptors it has.
    Again(u16, u16),
}

/// A chain in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The driver's number for it.
    pub id: u16,
    /// Descriptors of the ring that it has.
    pub count: u16,
    /// Where it is noted as being in flight.
    note: u16,
}

/// A packed virtqueue in guest memory.
pub struct Packed {
    /// Keeps what the pointers point to mapped.
    memory: Arc<GuestMemory>,
    descriptors: *mut u8,
    driver_event: *mut u8,
    device_event: *mut u8,
    size: u16,
    event_idx: bool,
    /// What is next to take.
    avail: Position,
    /// Descriptors from there on that were seen to be available.
    known: u16,
    /// Descriptors taken, for [`Ring::next`].
    taken: u16,
    /// Where the next used descriptor goes.
    used: Position,
    /// Descriptors that were taken, and that the driver does not see as used.
    outstanding: u16,
    /// What was pushed and is not shown: where the first one is, its flags, and how many descriptors all skip.
    hidden: Option<(u16, u16)>,
    hidden_count: u16,
    /// The driver was last asked to notify us.
    notify: bool,
    inflight: Option<inflight::Packed>,
    /// What a server before us took and did not answer, the oldest last.
    resume: Vec<(u16, u16)>,
    /// The chain walked last. As long as the ring at most.
    walked: Vec<PackedDescriptor>,
}

// SAFETY: the pointers go to shared memory that lives as long as `memory`; one thread uses them at a time.
unsafe impl Send for Packed {}

impl Packed {
    /// [`Ring::base`] of a new ring.
    pub const START: u32 = 0x8000_8000;

    #[inline]
    fn at(&self, index: u16) -> *mut u8 {
        debug_assert!(index < self.size);
        self.descriptors
            .wrapping_add(usize::from(index) * DESC_BYTES as usize)
    }

    #[inline]
    fn flags(&self, index: u16) -> &AtomicU16 {
        // SAFETY: the ring holds `size` descriptors and is aligned to 16 bytes (checked in `new`), callers pass an
        // index below; the mapping lives as long as `self.memory`.
        unsafe { AtomicU16::from_ptr(self.at(index).wrapping_add(14).cast()) }
    }

    /// The half of a descriptor with length, number and flags.
    #[inline]
    fn second_half(&self, index: u16) -> &AtomicU64 {
        // SAFETY: as in `flags`.
        unsafe { AtomicU64::from_ptr(self.at(index).wrapping_add(8).cast()) }
    }

    #[inline]
    fn read(&self, index: u16) -> PackedDescriptor {
        // SAFETY: as in `flags`.
        let first = unsafe { AtomicU64::from_ptr(self.at(index).cast()) };
        let low = u64::from_le(first.load(Ordering::Relaxed));
        let high = u64::from_le(self.second_half(index).load(Ordering::Relaxed));
        PackedDescriptor {
            buffer: Buffer {
                addr: low,
                len: high as u32,
                flags: (high >> 48) as u16,
            },
            id: (high >> 32) as u16,
        }
    }

    /// A field of an event suppression structure: 0 is where, 2 is whether.
    #[inline]
    fn event(&self, of: *mut u8, field: usize) -> &AtomicU16 {
        // SAFETY: `new` checked that both structures are mapped, 4 bytes long and aligned to 4.
        unsafe { AtomicU16::from_ptr(of.wrapping_add(field).cast()) }
    }

    #[inline]
    fn is_available(&self, at: Position) -> bool {
        // Acquire: pairs with the driver's barrier before it sets the flags of a chain's first descriptor; what we read
        // of the chain comes after.
        let flags = u16::from_le(self.flags(at.index).load(Ordering::Acquire));
        flags & (DESC_F_AVAIL | DESC_F_USED) == at.available()
    }

    /// Looks for more descriptors that are available, as far as the ring has room for them.
    #[inline]
    fn look(&mut self) {
        let limit = LOOK.min(self.size - self.outstanding);
        while self.known < limit && self.is_available(self.avail.plus(self.known, self.size)) {
            self.known += 1;
        }
    }

    /// Takes over what a server before us left.
    fn recover(&mut self) -> Result<()> {
        let Some(mut inflight) = self.inflight.take() else {
            return Ok(());
        };
        let found = inflight.recover(self.size, self.used, |at| {
            let flags = u16::from_le(self.flags(at.index).load(Ordering::Acquire));
            flags & (DESC_F_AVAIL | DESC_F_USED) != at.available()
        })?;
        if let Some(used) = found.used {
            // The front-end knows where the ring stood when it last saw a server stop, at most.
            self.used = used;
            self.avail = used;
            // The file's word alone: what the base says to be in flight is the same. All chains together are no longer than
            // the ring.
            self.outstanding = found.chains.iter().map(|(_, count)| count).sum();
            // Where a batch was being written, used descriptors may lie behind the first one, which hid them.
            for _ in 0..self.outstanding {
                self.flags(self.avail.index)
                    .store(self.avail.available().to_le(), Ordering::Relaxed);
                self.avail = self.avail.plus(1, self.size);
            }
        }
        self.resume = found.chains;
        self.resume.reverse();
        self.inflight = Some(inflight);
        Ok(())
    }
}

impl Ring for Packed {
    type Entry = Entry;
    type Head = Head;

    fn new(place: Place) -> Result<Self> {
        let size = place.size;
        if size == 0 || size > SIZE_MAX {
            return Err(Error::invalid(format!(
                "a packed ring of {size} entries: 1 to {SIZE_MAX} are possible"
            )));
        }
        let (avail, used) = match place.base {
            None => (Position::START, Position::START),
            Some(base) => {
                let (avail, used) = (base as u16, (base >> 16) as u16);
                // Some front-ends keep and say 16 bits alone. A ring that was stopped had nothing in flight then.
                let used = if used == 0 { avail } else { used };
                (Position::from_bits(avail), Position::from_bits(used))
            }
        };
        if avail.index >= size || used.index >= size {
            return Err(Error::invalid(format!(
                "a packed ring of {size} entries is to go on at {} and {}",
                avail.index, used.index
            )));
        }
        // Two laps bring back index and counter.
        let of_two = |at: Position| u32::from(at.index) + u32::from(size) * u32::from(!at.wrap);
        let ahead = (of_two(avail) + 2 * u32::from(size) - of_two(used)) % (2 * u32::from(size));
        let outstanding = u16::try_from(ahead).ok().filter(|ahead| *ahead <= size);
        let outstanding = outstanding.ok_or_else(|| {
            Error::invalid(format!(
                "base {base:#x} of a packed ring of {size} entries: {ahead} descriptors are in flight",
                base = place.base.unwrap_or_default()
            ))
        })?;
        let at = place.at;
        let bytes = u64::from(size) * DESC_BYTES;
        let descriptors = place.part("descriptors", at.descriptors, bytes, DESC_BYTES)?;
        let driver_event = place.part("driver event suppression", at.available, 4, 4)?;
        let device_event = place.part("device event suppression", at.used, 4, 4)?;
        let mut ring = Self {
            memory: place.memory,
            descriptors,
            driver_event,
            device_event,
            size,
            event_idx: place.event_idx,
            avail,
            known: 0,
            taken: 0,
            used,
            outstanding,
            hidden: None,
            hidden_count: 0,
            notify: true,
            inflight: place.inflight.map(inflight::Packed::new).transpose()?,
            resume: Vec::new(),
            walked: Vec::with_capacity(usize::from(size)),
        };
        ring.recover()?;
        ring.event(device_event, 2)
            .store(EVENT_F_ENABLE.to_le(), Ordering::Relaxed);
        Ok(ring)
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    #[inline]
    fn pop(&mut self) -> Result<Option<Entry>, Overrun> {
        if let Some((note, count)) = self.resume.pop() {
            return Ok(Some(Entry::Again(note, count)));
        }
        if self.known < LOOK_AGAIN {
            self.look();
            if self.known == 0 {
                if self.outstanding == self.size && self.is_available(self.avail) {
                    return Err(Overrun::Descriptor(self.avail.index));
                }
                return Ok(None);
            }
        }
        Ok(Some(Entry::Next))
    }

    #[inline]
    fn walk(&mut self, entry: Entry, chain: &mut Chain, indirect: bool) -> Result<Head, Fault> {
        let mut walked = std::mem::take(&mut self.walked);
        let result = match entry {
            Entry::Again(note, count) => {
                if let Some(inflight) = &self.inflight {
                    inflight.read(note, count, &mut walked);
                }
                let mut chain_of = walked.iter().copied();
                chain
                    .walk_packed(&self.memory, |_| chain_of.next(), indirect)
                    .map(|(id, _)| Head { id, count, note })
            }
            Entry::Next => {
                walked.clear();
                let room = self.size - self.outstanding;
                let keep = self.inflight.is_some();
                let read = |nth: u16| {
                    let within = nth < room;
                    within.then(|| {
                        let descriptor = self.read(self.avail.plus(nth, self.size).index);
                        if keep {
                            walked.push(descriptor);
                        }
                        descriptor
                    })
                };
                chain
                    .walk_packed(&self.memory, read, indirect)
                    .and_then(|found| chain.answerable().map(|()| found))
                    .map(|(id, count)| {
                        self.avail = self.avail.plus(count, self.size);
                        self.known = self.known.saturating_sub(count);
                        self.taken = self.taken.wrapping_add(count);
                        self.outstanding += count;
                        let noted = self.inflight.as_mut();
                        let note = noted.map_or(0, |inflight| inflight.take(&walked));
                        Head { id, count, note }
                    })
            }
        };
        self.walked = walked;
        result
    }

    #[inline]
    fn push(&mut self, head: Head, written: u32) {
        let at = self.used;
        // §2.8.8: whether anything was written.
        let write = if written > 0 { DESC_F_WRITE } else { 0 };
        let flags = at.used() | write;
        // The first one of a batch stays available to the driver until all are written.
        let shown = match self.hidden {
            Some(_) => flags,
            None => {
                self.hidden = Some((at.index, flags));
                at.available()
            }
        };
        let word = u64::from(written) | u64::from(head.id) << 32 | u64::from(shown) << 48;
        self.second_half(at.index)
            .store(word.to_le(), Ordering::Relaxed);
        self.used = at.plus(head.count, self.size);
        self.hidden_count += head.count;
        if let Some(inflight) = &mut self.inflight {
            inflight.done(head.note);
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let Some((first, flags)) = self.hidden.take() else {
            return false;
        };
        if let Some(inflight) = &mut self.inflight {
            inflight.publishing(self.used);
        }
        // Release: the other descriptors, the status bytes and the data that threads of this process wrote are visible
        // before the flags.
        self.flags(first).store(flags.to_le(), Ordering::Release);
        let count = std::mem::take(&mut self.hidden_count);
        self.outstanding -= count;
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.used);
        }
        // The driver writes what it wants to be told of and then looks at the descriptors; we wrote those and look at what
        // it wants now. A full barrier on both sides lets one of us see the other.
        fence(Ordering::SeqCst);
        // Acquire: a driver that asks for a descriptor says first for which.
        let wanted = u16::from_le(self.event(self.driver_event, 2).load(Ordering::Acquire));
        match wanted & 3 {
            EVENT_F_DISABLE => false,
            EVENT_F_DESC if self.event_idx => {
                let event = self.event(self.driver_event, 0).load(Ordering::Relaxed);
                let event = Position::from_bits(u16::from_le(event));
                // §2.8.10: as for a split ring, with indices of the last lap below those of this one.
                let mut at = event.index;
                if event.wrap != self.used.wrap {
                    at = at.wrapping_sub(self.size);
                }
                self.used.index.wrapping_sub(at).wrapping_sub(1) < count
            }
            _ => true,
        }
    }

    #[inline]
    fn disable_notify(&mut self) {
        if !self.notify {
            return;
        }
        self.notify = false;
        self.event(self.device_event, 2)
            .store(EVENT_F_DISABLE.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn enable_notify(&mut self) -> bool {
        self.notify = true;
        let wanted = if self.event_idx {
            self.event(self.device_event, 0)
                .store(self.avail.bits().to_le(), Ordering::Relaxed);
            EVENT_F_DESC
        } else {
            EVENT_F_ENABLE
        };
        // Release: the driver sees where before it sees that it matters.
        self.event(self.device_event, 2)
            .store(wanted.to_le(), Ordering::Release);
        // As in `publish`, with the roles exchanged.
        fence(Ordering::SeqCst);
        !self.is_available(self.avail)
    }

    fn base(&self) -> u32 {
        u32::from(self.avail.bits()) | u32::from(self.used.bits()) << 16
    }

    #[inline]
    fn known(&self) -> u16 {
        self.known
    }

    #[inline]
    fn next(&self) -> u16 {
        self.taken
    }

    #[inline]
    fn descriptor_at(&self, entry: u16) -> *const u8 {
        let ahead = entry.wrapping_sub(self.taken) % self.size;
        self.at(self.avail.plus(ahead, self.size).index)
    }

    #[inline]
    fn first(&self, entry: u16) -> Option<Buffer> {
        let ahead = entry.wrapping_sub(self.taken) % self.size;
        let at = self.avail.plus(ahead, self.size);
        // In the middle of a chain lies data.
        if ahead > 0 {
            let before = self.avail.plus(ahead - 1, self.size).index;
            let flags = u16::from_le(self.flags(before).load(Ordering::Relaxed));
            if flags & DESC_F_NEXT != 0 {
                return None;
            }
        }
        Some(self.read(at.index).buffer)
    }
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packed")
            .field("size", &self.size)
            .field("avail", &self.avail)
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}
