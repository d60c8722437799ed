//! The packed layout (virtio 1.2 §2.8): the event suppression structures lie where the other has its rings.

use super::{AVAILABLE, INDIRECT, NEXT, Piece, USED, WRITE};
use crate::driver::Ram;
use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

/// `VIRTQ_DESC_F_AVAIL`, `VIRTQ_DESC_F_USED`.
const F_AVAIL: u16 = 1 << 7;
const F_USED: u16 = 1 << 15;
/// `RING_EVENT_FLAGS_*`.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const DESC: u16 = 2;

/// A place in the ring and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    fn advance(&mut self, count: u16, size: u16) {
        self.index += count;
        if self.index >= size {
            self.index -= size;
            self.wrap = !self.wrap;
        }
    }

    /// The flags of a descriptor that is available, and of one that is used here.
    fn flags(self) -> (u16, u16) {
        if self.wrap {
            (F_AVAIL, F_AVAIL | F_USED)
        } else {
            (F_USED, 0)
        }
    }
}

/// A packed ring's indices.
#[derive(Debug)]
pub(super) struct Packed {
    ram: Arc<Ram>,
    at: u64,
    size: u16,
    event_idx: bool,
    avail: Place,
    used: Place,
    /// By number: how many descriptors the chain has that is in flight.
    counts: Vec<u16>,
    /// Descriptors that are not in flight.
    free: u16,
    /// Descriptors added since the device was last kicked or found not to need it.
    added: u16,
}

/// A descriptor, also of an indirect table.
pub(super) fn descriptor(piece: Piece, id: u16, flags: u16) -> u128 {
    let write = if piece.device_writes { WRITE } else { 0 };
    u128::from(piece.at)
        | u128::from(piece.len) << 64
        | u128::from(id) << 96
        | u128::from(flags | write) << 112
}

impl Packed {
    pub fn new(ram: Arc<Ram>, at: u64, size: u16, event_idx: bool) -> Self {
        let start = Place {
            index: 0,
            wrap: true,
        };
        Self {
            ram,
            at,
            size,
            event_idx,
            avail: start,
            used: start,
            counts: vec![0; usize::from(size)],
            free: size,
            added: 0,
        }
    }

    fn descriptor_at(&self, place: Place) -> u64 {
        self.at + 16 * u64::from(place.index)
    }

    /// Where the ring stands, as `VHOST_USER_SET_VRING_BASE` says it, when nothing is in flight but what the device has not taken.
    pub fn base(&self) -> u32 {
        let used = self.used.bits();
        u32::from(used) | u32::from(used) << 16
    }

    pub fn free(&self) -> u16 {
        self.free
    }

    /// Makes a chain available. There must be room, and `id` is below the size and not in flight.
    #[inline]
    pub fn offer(&mut self, id: u16, pieces: impl ExactSizeIterator<Item = (Piece, u16)>) {
        let first = self.avail;
        let mut head = 0;
        let last = pieces.len() - 1;
        self.counts[usize::from(id)] = pieces.len() as u16;
        self.free -= pieces.len() as u16;
        self.added += pieces.len() as u16;
        for (i, (piece, flags)) in pieces.enumerate() {
            let next = if i < last { NEXT } else { 0 };
            let word = descriptor(piece, id, flags | next | self.avail.flags().0);
            if i == 0 {
                head = word;
            } else {
                self.ram
                    .write(self.descriptor_at(self.avail), &word.to_le_bytes());
            }
            self.avail.advance(1, self.size);
        }
        let at = self.descriptor_at(first);
        self.ram.write(at, &head.to_le_bytes()[..14]);
        self.ram
            .store(at + 14, (head >> 112) as u16, Ordering::Release);
    }

    pub fn offer_table(&mut self, id: u16, table: u64, count: u32) {
        let piece = Piece::read(table, 16 * count);
        self.offer(id, [(piece, INDIRECT)].into_iter());
    }

    /// Makes the next descriptor of the ring available, whatever lies there.
    pub fn make_available(&mut self) {
        let at = self.descriptor_at(self.avail) + 14;
        let flags = self.ram.load(at, Ordering::Relaxed) & !(F_AVAIL | F_USED);
        self.ram
            .store(at, flags | self.avail.flags().0, Ordering::Release);
        self.avail.advance(1, self.size);
        self.added = self.added.saturating_add(1);
    }

    /// Turns the ownership of a descriptor over.
    pub fn turn_over(&mut self, index: u16) {
        let at = self.at + 16 * u64::from(index % self.size) + 14;
        let flags = self.ram.load(at, Ordering::Relaxed);
        self.ram.store(at, flags ^ F_USED, Ordering::Release);
    }

    #[inline]
    pub fn wants_kick(&mut self) -> bool {
        let added = std::mem::take(&mut self.added);
        if added == 0 {
            return false;
        }
        fence(Ordering::SeqCst);
        let wanted = self.ram.load(self.at + USED + 2, Ordering::Acquire);
        match wanted & 3 {
            DISABLE => false,
            DESC if self.event_idx => {
                let event = self.ram.load(self.at + USED, Ordering::Relaxed);
                let mut index = event & !(1 << 15);
                if (event >> 15 != 0) != self.avail.wrap {
                    index = index.wrapping_sub(self.size);
                }
                self.avail.index.wrapping_sub(index).wrapping_sub(1) < added
            }
            _ => true,
        }
    }

    #[inline]
    fn is_used(&self) -> bool {
        let flags = self
            .ram
            .load(self.descriptor_at(self.used) + 14, Ordering::Acquire);
        flags & (F_AVAIL | F_USED) == self.used.flags().1
    }

    #[inline]
    pub fn pop_used(&mut self) -> Option<(u32, u32)> {
        if !self.is_used() {
            return None;
        }
        let mut half = [0; 8];
        self.ram
            .read_into(self.descriptor_at(self.used) + 8, &mut half);
        let word = u64::from_le_bytes(half);
        let id = (word >> 32) as u16;
        // A number that is not in flight is the caller's to judge.
        let count = self
            .counts
            .get_mut(usize::from(id))
            .map_or(0, std::mem::take);
        self.free += count;
        self.used.advance(count.max(1), self.size);
        Some((id.into(), word as u32))
    }

    #[inline]
    pub fn enable_call(&mut self) -> bool {
        let wanted = if self.event_idx {
            self.ram
                .store(self.at + AVAILABLE, self.used.bits(), Ordering::Relaxed);
            DESC
        } else {
            ENABLE
        };
        self.ram
            .store(self.at + AVAILABLE + 2, wanted, Ordering::Release);
        fence(Ordering::SeqCst);
        !self.is_used()
    }

    pub fn refuse_calls(&mut self) {
        self.ram
            .store(self.at + AVAILABLE + 2, DISABLE, Ordering::Relaxed);
    }
}
