//! The split layout (virtio 1.2 §2.7).

use super::{AVAILABLE, INDIRECT, NEXT, Piece, USED, WRITE};
use crate::driver::Ram;
use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFICATION: u16 = 1;

/// A split ring's indices.
#[derive(Debug)]
pub(super) struct Split {
    pub ram: Arc<Ram>,
    pub at: u64,
    pub size: u16,
    pub event_idx: bool,
    pub next_avail: u16,
    /// `avail.idx` when the device was last kicked or found not to need it.
    kicked: u16,
    last_used: u16,
}

/// A descriptor, also of an indirect table.
pub(super) fn descriptor(piece: Piece, flags: u16, next: u16) -> u128 {
    let write = if piece.device_writes { WRITE } else { 0 };
    u128::from(piece.at)
        | u128::from(piece.len) << 64
        | u128::from(flags | write) << 96
        | u128::from(next) << 112
}

impl Split {
    pub fn new(ram: Arc<Ram>, at: u64, size: u16, event_idx: bool) -> Self {
        Self {
            ram,
            at,
            size,
            event_idx,
            next_avail: 0,
            kicked: 0,
            last_used: 0,
        }
    }

    /// Where the available ring's `used_event` is.
    fn used_event(&self) -> u64 {
        self.at + AVAILABLE + 4 + 2 * u64::from(self.size)
    }

    #[inline]
    pub fn write(&self, at: u64, piece: Piece, flags: u16, next: u16) {
        self.ram
            .write(at, &descriptor(piece, flags, next).to_le_bytes());
    }

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
            self.write(at(i), *piece, flags, next);
        }
    }

    #[inline]
    pub fn write_indirect(&self, head: u16, table: u64, count: u32) {
        let piece = Piece::read(table, 16 * count);
        self.write(self.at + 16 * u64::from(head), piece, INDIRECT, 0);
    }

    #[inline]
    pub fn make_available(&mut self, head: u16) {
        let entry = self.at + AVAILABLE + 4 + 2 * u64::from(self.next_avail % self.size);
        self.ram.store(entry, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_available_index(self.next_avail);
    }

    #[inline]
    pub fn set_available_index(&mut self, idx: u16) {
        self.ram
            .store(self.at + AVAILABLE + 2, idx, Ordering::Release);
    }

    #[inline]
    pub fn wants_kick(&mut self) -> bool {
        let (old, new) = (self.kicked, self.next_avail);
        if old == new {
            return false;
        }
        fence(Ordering::SeqCst);
        self.kicked = new;
        if self.event_idx {
            let at = self.at + USED + 4 + 8 * u64::from(self.size);
            let event = self.ram.load(at, Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.ram.load(self.at + USED, Ordering::Relaxed) & NO_NOTIFICATION == 0
        }
    }

    pub fn push_used(&mut self, head: u16) {
        let used = self.at + USED;
        let idx = self.ram.load(used + 2, Ordering::Relaxed);
        let entry = used + 4 + 8 * u64::from(idx % self.size);
        self.ram.write(entry, &u32::from(head).to_le_bytes());
        self.ram
            .store(used + 2, idx.wrapping_add(1), Ordering::Release);
    }

    #[inline]
    pub fn pop_used(&mut self) -> Option<(u32, u32)> {
        let used = self.at + USED;
        if self.ram.load(used + 2, Ordering::Acquire) == self.last_used {
            return None;
        }
        let mut entry = [0; 8];
        let at = used + 4 + 8 * u64::from(self.last_used % self.size);
        self.ram.read_into(at, &mut entry);
        self.last_used = self.last_used.wrapping_add(1);
        let word = u64::from_le_bytes(entry);
        Some((word as u32, (word >> 32) as u32))
    }

    #[inline]
    pub fn enable_call(&mut self) -> bool {
        if self.event_idx {
            self.ram
                .store(self.used_event(), self.last_used, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.ram.load(self.at + USED + 2, Ordering::Relaxed) == self.last_used
    }

    /// With the event index one in 65,536 chains.
    pub fn refuse_calls(&mut self) {
        if self.event_idx {
            let behind = self.last_used.wrapping_sub(1);
            self.ram.store(self.used_event(), behind, Ordering::Relaxed);
        } else {
            self.ram
                .store(self.at + AVAILABLE, NO_NOTIFICATION, Ordering::Relaxed);
        }
    }
}
