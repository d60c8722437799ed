//! Has the cache fetch what the next requests will be read from.
//!
//! A driver on another core wrote a request's descriptors, indirect table and header just now, so
//! each of them is a miss of some hundred cycles, one behind the other. With several requests
//! waiting, these are fetched some requests ahead and overlap: measured with the null disk and a polling
//! driver, waiting for them was a third of all time.
//!
//! ```text
//!   next ─▶ taken now     …     next+2: header     next+4: indirect table     next+8: descriptor
//! ```
//!
//! Nothing is concluded from what is read here: the driver may change it until the request is taken, and
//! that reads and judges everything anew.

use super::{
    memory,
    ring::{Descriptor, Ring},
    spec::{DESC_BYTES, DESC_F_INDIRECT},
};

/// How many requests ahead each is fetched. The descriptor must have arrived when the table is fetched for
/// it, and the table when the header is.
const DESCRIPTOR_AHEAD: u16 = 8;
const TABLE_AHEAD: u16 = 4;
const HEADER_AHEAD: u16 = 2;

/// What was fetched so far: entries of the available ring.
#[derive(Debug, Default)]
pub struct Lookahead {
    descriptor: u16,
    table: u16,
    header: u16,
}

impl Lookahead {
    /// Fetches for the requests behind the next one. To be called before each [`Ring::pop`].
    #[inline]
    pub fn advance(&mut self, ring: &Ring) {
        let next = ring.next_avail();
        if ring.known() > 1 {
            self.fetch(ring, next);
        }
    }

    fn fetch(&mut self, ring: &Ring, next: u16) {
        let known = ring.known();
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
            memory::prefetch(ring.descriptor_at(ring.head(entry)));
        });
        each(&mut self.table, TABLE_AHEAD, &|entry| {
            if let Some(buffer) = Self::first_buffer(ring, entry) {
                memory::prefetch(buffer);
            }
        });
        each(&mut self.header, HEADER_AHEAD, &|entry| {
            // A header in a descriptor of the ring was fetched like a table.
            let table = Self::indirect(ring, entry);
            let Some(table) = table.and_then(|d| ring.memory().range(d.addr, DESC_BYTES)) else {
                return;
            };
            let mut bytes = [0; DESC_BYTES as usize];
            // SAFETY: `range` vouched for these bytes of guest memory.
            unsafe { memory::read(table, &mut bytes) };
            if let Some(header) = ring.memory().range(Descriptor::parse(&bytes).addr, 1) {
                memory::prefetch(header);
            }
        });
    }

    fn indirect(ring: &Ring, entry: u16) -> Option<Descriptor> {
        ring.descriptor(ring.head(entry))
            .filter(|d| d.flags & DESC_F_INDIRECT != 0)
    }

    /// Where the table, or the buffer, of an entry's first descriptor lies.
    fn first_buffer(ring: &Ring, entry: u16) -> Option<*mut u8> {
        let descriptor = ring.descriptor(ring.head(entry))?;
        ring.memory().range(descriptor.addr, 1)
    }
}
