//! Rings, chains and requests against a guest that writes them by hand.

mod hostile;
mod packed;
mod parse;
mod rings;

use super::{
    memory::{self, GuestMemory, tests::region},
    ring::{Place, Ring, RingAddresses, Split},
    spec::{DESC_F_NEXT, DESC_F_WRITE},
};
use std::sync::Arc;

/// The fake guest's memory: 1 MiB at [`GUEST`], and a second region right behind it.
pub const GUEST: u64 = 0x4000_0000;
pub const GUEST_LEN: u64 = 1 << 20;
const USER: u64 = 0x7f00_0000_0000;
pub const DESCRIPTORS: u64 = GUEST;
pub const AVAILABLE: u64 = GUEST + 0x8000;
pub const USED: u64 = GUEST + 0xa000;
/// Buffers lie from here on.
pub const BUFFERS: u64 = GUEST + 0x10000;

/// One descriptor as a test writes it.
pub type Raw = (u64, u32, u16, u16);

pub struct Guest {
    pub memory: Arc<GuestMemory>,
    pub size: u16,
}

impl Guest {
    pub fn new(size: u16) -> Self {
        let memory = GuestMemory::new(vec![
            region(GUEST, USER, GUEST_LEN),
            region(GUEST + GUEST_LEN, USER + (1 << 30), 0x10000),
        ])
        .unwrap();
        Self {
            memory: Arc::new(memory),
            size,
        }
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        let to = self.memory.range(at, bytes.len() as u64).unwrap();
        // SAFETY: `range` vouches for the bytes.
        unsafe { memory::write(to, bytes) }
    }

    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        let from = self.memory.range(at, N as u64).unwrap();
        // SAFETY: as in `put`.
        unsafe { memory::read(from, &mut out) };
        out
    }

    pub fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    pub fn table(&self, at: u64, descriptors: &[Raw]) {
        for (i, (addr, len, flags, next)) in descriptors.iter().enumerate() {
            let at = at + 16 * i as u64;
            self.put(at, &addr.to_le_bytes());
            self.put(at + 8, &len.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
            self.put(at + 14, &next.to_le_bytes());
        }
    }

    /// Writes a chain of the pieces (guest address, length, device writes) from descriptor 0 on.
    pub fn chain(&self, pieces: &[(u64, u32, bool)]) {
        let last = pieces.len() - 1;
        let descriptors: Vec<Raw> = pieces
            .iter()
            .enumerate()
            .map(|(i, (addr, len, writes))| {
                let next = if i < last { DESC_F_NEXT } else { 0 };
                let write = if *writes { DESC_F_WRITE } else { 0 };
                (*addr, *len, next | write, i as u16 + 1)
            })
            .collect();
        self.table(DESCRIPTORS, &descriptors);
    }

    pub fn make_available(&self, entry: u16, head: u16) {
        let slot = u64::from(entry % self.size);
        self.put(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.put(AVAILABLE + 2, &entry.wrapping_add(1).to_le_bytes());
    }

    pub fn ring(&self, event_idx: bool) -> Split {
        self.ring_at(event_idx, 0)
    }

    pub fn ring_at(&self, event_idx: bool, next_avail: u16) -> Split {
        Split::new(self.place(event_idx, Some(next_avail.into()))).unwrap()
    }

    pub fn place(&self, event_idx: bool, base: Option<u32>) -> Place {
        let to_user = |at: u64| at - GUEST + USER;
        Place {
            memory: self.memory.clone(),
            at: RingAddresses {
                descriptors: to_user(DESCRIPTORS),
                available: to_user(AVAILABLE),
                used: to_user(USED),
            },
            size: self.size,
            base,
            event_idx,
            inflight: None,
        }
    }
}
