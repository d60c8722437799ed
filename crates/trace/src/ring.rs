//! The last entries of a queue.

use crate::{cell::Cell, entry::Entry};
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Entries of a ring where nobody says otherwise: 64 KiB.
pub const RING_ENTRIES_DEFAULT: u32 = 1024;
/// Entries of a ring at most: 4 MiB.
pub const RING_ENTRIES_MAX: u32 = 65536;

/// The last so many requests of a queue that ended, 64 bytes each.
///
/// One thread writes; any number of others read without stopping it.
#[derive(Debug)]
pub struct Ring {
    cells: Box<[Cell]>,
    /// Entries that were written ever.
    written: AtomicU64,
}

/// What reading a ring brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// The entries, oldest first.
    pub entries: Vec<Entry>,
    /// Entries that were asked for and are overwritten.
    pub lost: u64,
    /// Where to go on reading.
    pub next: u64,
}

impl Ring {
    /// Bytes of an entry.
    pub const ENTRY_BYTES: usize = size_of::<Cell>();

    /// A ring for at least `entries`, rounded up to a power of two and at most [`RING_ENTRIES_MAX`]; none for 0.
    pub fn new(entries: u32) -> Self {
        let entries = match entries {
            0 => 0,
            entries => entries.min(RING_ENTRIES_MAX).next_power_of_two(),
        };
        Self {
            cells: Cell::many(entries as usize),
            written: AtomicU64::new(0),
        }
    }

    /// How many entries it keeps.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.cells.len()
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.cells.len() * Self::ENTRY_BYTES
    }

    /// How many entries were ever written.
    #[inline]
    pub fn written(&self) -> u64 {
        self.written.load(Acquire)
    }

    /// Notes `entry`, whose number is the ring's own. One thread at a time.
    #[inline]
    pub fn push(&self, entry: &Entry) {
        let number = self.written.load(Relaxed);
        let mask = self.cells.len().wrapping_sub(1);
        // The number's low bits say where; a ring of none has no place 0 either.
        if let Some(cell) = self.cells.get(number as usize & mask) {
            cell.write(number + 1, &entry.pack());
            self.written.store(number + 1, Release);
        }
    }

    /// Entries from number `since` on, oldest first, `max` at most. Those that are overwritten meanwhile count as lost.
    pub fn read(&self, since: u64, max: usize) -> Read {
        let written = self.written();
        let oldest = written.saturating_sub(self.cells.len() as u64);
        let since = since.min(written);
        let first = since.max(oldest);
        // Limited by the ring's length.
        let count = (written - first).min(max as u64);
        let mut read = Read {
            entries: Vec::with_capacity(count as usize),
            lost: first - since,
            next: first + count,
        };
        for number in first..first + count {
            let cell = &self.cells[number as usize & (self.cells.len() - 1)];
            let entry = match cell.read() {
                Some((version, words)) if version == number + 1 => Entry::unpack(number, words),
                _ => None,
            };
            match entry {
                Some(entry) => read.entries.push(entry),
                None => read.lost += 1,
            }
        }
        read
    }

    /// The last `max` entries, oldest first.
    pub fn last(&self, max: usize) -> Read {
        let keeps = max.min(self.cells.len()) as u64;
        self.read(self.written().saturating_sub(keeps), max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Operation, Status, Times};

    /// An entry all of whose fields follow from `n`, so that a mixture of two shows.
    fn entry(n: u64) -> Entry {
        let n32 = n & 0x3fff_ffff;
        Entry {
            number: n,
            operation: Operation::ALL[(n % 5) as usize],
            offset: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            bytes: n & 0xffff_ffff,
            status: Status::Ok,
            begin_ns: !n,
            stages_ns: Times([
                n32,
                n32 + 1,
                n32 + 2,
                n32 + 3,
                n32 + 4,
                n32 + 5,
                n32 + 6,
                n32 + 7,
            ]),
        }
    }

    #[test]
    fn the_last_entries_are_kept_in_order() {
        let ring = Ring::new(5);
        assert_eq!((ring.capacity(), ring.bytes()), (8, 512));
        assert_eq!(ring.read(0, 100), Read::default());
        for n in 0..20 {
            ring.push(&entry(n));
            let read = ring.read(0, 100);
            let kept = (n + 1).min(8);
            let first = n + 1 - kept;
            let expected: Vec<_> = (first..=n).map(entry).collect();
            assert_eq!(read.entries, expected);
            assert_eq!((read.lost, read.next), (first, n + 1));
        }
        let read = ring.read(14, 3);
        assert_eq!(read.entries, [entry(14), entry(15), entry(16)]);
        assert_eq!((read.lost, read.next), (0, 17));
        assert_eq!(ring.last(2).entries, [entry(18), entry(19)]);
        assert_eq!(ring.last(100).entries.len(), 8);
        // Who asks for what is yet to come gets it when it has come.
        assert_eq!(
            ring.read(1000, 5),
            Read {
                next: 20,
                ..Read::default()
            }
        );
        assert_eq!(Ring::new(u32::MAX).capacity(), RING_ENTRIES_MAX as usize);
        let none = Ring::new(0);
        none.push(&entry(0));
        assert_eq!((none.last(9), none.bytes()), (Read::default(), 0));
    }

    /// A writer that never waits, and readers that look all the time: each entry read is one that was written.
    #[test]
    fn a_reader_never_sees_a_torn_entry() {
        const WRITES: u64 = 400_000;
        let ring = Ring::new(16);
        let (whole, lost) = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let (mut next, mut whole, mut lost) = (0, 0u64, 0);
                        while next < WRITES {
                            let read = ring.read(next, 64);
                            for found in &read.entries {
                                assert_eq!(*found, entry(found.number));
                                assert!(found.number >= next);
                            }
                            whole += read.entries.len() as u64;
                            lost += read.lost;
                            next = read.next;
                        }
                        assert_eq!(whole + lost, WRITES);
                        (whole, lost)
                    })
                })
                .collect();
            for n in 0..WRITES {
                ring.push(&entry(n));
            }
            readers.into_iter().fold((0, 0), |sum, reader| {
                let (whole, lost) = reader.join().unwrap();
                (sum.0 + whole, sum.1 + lost)
            })
        });
        assert!(
            whole >= 16,
            "the last entries at least: {whole}, lost {lost}"
        );
    }
}
