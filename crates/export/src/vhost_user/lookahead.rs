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
    ring::{Descriptor, Ring},
    spec::{DESC_BYTES, DESC_F_INDIRECT, HEADER_BYTES, HEADER_SECTOR, SECTOR_BYTES},
};
use block::prefetch;

/// How many requests, the next one among them, are fetched ahead. The descriptor must have arrived when the table is
/// fetched for it, the table when the header is, and that when its sector is asked for.
const DESCRIPTOR_AHEAD: u16 = 8;
const TABLE_AHEAD: u16 = 5;
const HEADER_AHEAD: u16 = 3;
const SECTOR_AHEAD: u16 = 2;

/// What was fetched so far: entries of the available ring.
#[derive(Debug, Default)]
pub struct Lookahead {
    descriptor: u16,
    table: u16,
    header: u16,
    sector: u16,
}

impl Lookahead {
    /// Fetches for the requests behind the next one. To be called before each [`Ring::pop`]. Tells `expect` where on
    /// the disk the next ones will probably be: a byte offset, which may be any number.
    #[inline]
    pub fn advance(&mut self, ring: &Ring, expect: impl Fn(u64)) {
        if ring.known() > 1 {
            self.fetch(ring, expect);
        }
    }

    fn fetch(&mut self, ring: &Ring, expect: impl Fn(u64)) {
        let (next, known) = (ring.next_avail(), ring.known());
        let each = |done: &mut u16, ahead: u16, fetch: &dyn Fn(u16)| {
            let end = next.wrapping_add(ahead.min(known));
            // Behind after a pause, and in front of the end after the ring was moved.
            if end.wrapping_sub(*done) > ahead {
                *done = next;
            }
            while *done != end {
                fetch(*done);
                *done = done.wrapping_add(1);
            }
        };
        each(&mut self.descriptor, DESCRIPTOR_AHEAD, &|entry| {
            prefetch(ring.descriptor_at(ring.head(entry)));
        });
        each(&mut self.table, TABLE_AHEAD, &|entry| {
            if let Some(buffer) = Self::first_buffer(ring, entry, 1) {
                prefetch(buffer);
            }
        });
        each(&mut self.header, HEADER_AHEAD, &|entry| {
            // A header in a descriptor of the ring was fetched like a table.
            if Self::indirect(ring, entry).is_some()
                && let Some(header) = Self::header(ring, entry)
            {
                prefetch(header);
            }
        });
        each(&mut self.sector, SECTOR_AHEAD, &|entry| {
            if let Some(header) = Self::header(ring, entry) {
                let mut sector = [0; 8];
                // SAFETY: `header` is followed by so many bytes of guest memory.
                unsafe { memory::read(header.wrapping_add(HEADER_SECTOR), &mut sector) };
                expect(u64::from_le_bytes(sector).saturating_mul(SECTOR_BYTES));
            }
        });
    }

    /// Where the header of an entry's request lies, if it is in one piece.
    fn header(ring: &Ring, entry: u16) -> Option<*mut u8> {
        if Self::indirect(ring, entry).is_none() {
            return Self::first_buffer(ring, entry, HEADER_BYTES as u64);
        }
        let table = Self::first_buffer(ring, entry, DESC_BYTES)?;
        let mut bytes = [0; DESC_BYTES as usize];
        // SAFETY: `first_buffer` vouched for these bytes of guest memory.
        unsafe { memory::read(table, &mut bytes) };
        let addr = Descriptor::parse(&bytes).addr;
        ring.memory().range(addr, HEADER_BYTES as u64)
    }

    fn indirect(ring: &Ring, entry: u16) -> Option<Descriptor> {
        ring.descriptor(ring.head(entry))
            .filter(|d| d.flags & DESC_F_INDIRECT != 0)
    }

    /// Where the table, or the buffer, of an entry's first descriptor lies: at least `len` bytes.
    fn first_buffer(ring: &Ring, entry: u16, len: u64) -> Option<*mut u8> {
        let descriptor = ring.descriptor(ring.head(entry))?;
        ring.memory().range(descriptor.addr, len)
    }
}
