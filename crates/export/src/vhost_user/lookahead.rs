//! Has the cache fetch what the next requests will be read from.
//!
//! A driver on another core wrote a request's descriptors, indirect table and header just now, so
//! each of them is a miss of some hundred cycles, one behind the other. With several requests
//! waiting, these are fetched some requests ahead and overlap: measured with the null disk and a polling
//! driver, waiting for them was a third of all time.
//!
//! ```text
//!   next ─▶ taken now     next+1: map   next+2: header   next+4: indirect table   next+7: descriptor
//! ```
//!
//! What the image maps the next request with is fetched too: a random place of a large disk is in no cache either.
//!
//! Nothing is concluded from what is read here: the driver may change it until the request is taken, and
//! that reads and judges everything anew.

use super::{
    memory,
    ring::{Buffer, Ring},
    spec::{DESC_BYTES, HEADER_BYTES, HEADER_SECTOR, SECTOR_BYTES},
};
use block::prefetch;
use std::ptr;

/// How many requests, the next one among them, are fetched ahead. The descriptor must have arrived when the table is
/// fetched for it, the table when the header is, and that when its sector is asked for. Each stage covers
/// what the one behind it does.
const DESCRIPTOR_AHEAD: u16 = 8;
const TABLE_AHEAD: u16 = 5;
const HEADER_AHEAD: u16 = 3;
const SECTOR_AHEAD: u16 = 2;

/// What a stage found for the next one: null where there is nothing more to fetch.
#[derive(Clone, Copy, Debug)]
struct Found {
    /// Of the request's indirect table, its first descriptor, else its header.
    at: *mut u8,
    indirect: bool,
}

const NOTHING: Found = Found {
    at: ptr::null_mut(),
    indirect: false,
};

/// What was fetched so far: entries, as [`Ring::next`] counts them.
#[derive(Debug)]
pub struct Lookahead {
    descriptor: u16,
    table: u16,
    header: u16,
    sector: u16,
    /// By entry, modulo the length. Addresses of the memory of the ring that [`Lookahead::advance`] is given.
    found: [Found; TABLE_AHEAD.next_power_of_two() as usize],
}

impl Lookahead {
    /// For a ring, which must be the same one in all calls.
    pub fn new() -> Self {
        Self {
            descriptor: 0,
            table: 0,
            header: 0,
            sector: 0,
            found: [NOTHING; _],
        }
    }

    /// Fetches for the requests behind the next one. To be called before each [`Ring::pop`]. Tells `expect` where on
    /// the disk the next ones will probably be: a byte offset, which may be any number.
    #[inline]
    pub fn advance(&mut self, ring: &impl Ring, expect: impl Fn(u64)) {
        if ring.known() > 1 {
            self.fetch(ring, expect);
        }
    }

    fn fetch(&mut self, ring: &impl Ring, expect: impl Fn(u64)) {
        let (next, known) = (ring.next(), ring.known());
        // The entries that a stage has to do now.
        let stage = |done: &mut u16, ahead: u16| {
            let end = next.wrapping_add(ahead.min(known));
            // Behind after a pause, and in front of the end after the ring was moved.
            if end.wrapping_sub(*done) > ahead {
                *done = next;
            }
            let from = std::mem::replace(done, end);
            (0..end.wrapping_sub(from)).map(move |n| from.wrapping_add(n))
        };
        for entry in stage(&mut self.descriptor, DESCRIPTOR_AHEAD) {
            prefetch(ring.descriptor_at(entry));
        }
        for entry in stage(&mut self.table, TABLE_AHEAD) {
            let found = Self::first(ring, entry);
            prefetch(found.at);
            self.found[Self::place(entry)] = found;
        }
        for entry in stage(&mut self.header, HEADER_AHEAD) {
            let found = &mut self.found[Self::place(entry)];
            // A header in a descriptor of the ring was fetched like a table.
            if found.indirect {
                *found = Self::behind(ring, found.at);
                prefetch(found.at);
            }
        }
        for entry in stage(&mut self.sector, SECTOR_AHEAD) {
            let found = self.found[Self::place(entry)];
            if !found.at.is_null() && !found.indirect {
                let mut sector = [0; 8];
                // SAFETY: the header is as long in the memory of the ring, which keeps it mapped.
                unsafe { memory::read(found.at.wrapping_add(HEADER_SECTOR), &mut sector) };
                expect(u64::from_le_bytes(sector).saturating_mul(SECTOR_BYTES));
            }
        }
    }

    fn place(entry: u16) -> usize {
        usize::from(entry) % TABLE_AHEAD.next_power_of_two() as usize
    }

    /// Where the indirect table or the header of an entry's request lies, if its beginning is in one piece.
    fn first(ring: &impl Ring, entry: u16) -> Found {
        let Some(descriptor) = ring.first(entry) else {
            return NOTHING;
        };
        let indirect = descriptor.is_table();
        let len = if indirect {
            DESC_BYTES
        } else {
            HEADER_BYTES as u64
        };
        match ring.memory().range(descriptor.addr, len) {
            Some(at) => Found { at, indirect },
            None => NOTHING,
        }
    }

    /// Where the header lies to which the first descriptor of the indirect table at `table` points.
    fn behind(ring: &impl Ring, table: *mut u8) -> Found {
        let mut bytes = [0; DESC_BYTES as usize];
        // SAFETY: `first` found so many bytes in the memory of the ring, which keeps them mapped.
        unsafe { memory::read(table, &mut bytes) };
        let addr = Buffer::parse(&bytes, 0).addr;
        match ring.memory().range(addr, HEADER_BYTES as u64) {
            Some(at) => Found {
                at,
                indirect: false,
            },
            None => NOTHING,
        }
    }
}
