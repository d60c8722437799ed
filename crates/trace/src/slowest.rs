//! The slowest requests of a queue.

use crate::{cell::Cell, entry::Entry};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// How many requests are kept.
pub const SLOWEST_MAX: usize = 32;

/// The slowest requests since the queue began. One thread writes; any number of others read.
#[derive(Debug)]
pub struct Slowest {
    cells: Box<[Cell]>,
    /// Nanoseconds of each.
    totals: [AtomicU64; SLOWEST_MAX],
    used: AtomicUsize,
    /// Who is not slower than this is none of them.
    floor: AtomicU64,
}

impl Default for Slowest {
    fn default() -> Self {
        Self {
            cells: Cell::many(SLOWEST_MAX),
            totals: std::array::from_fn(|_| AtomicU64::new(0)),
            used: AtomicUsize::new(0),
            floor: AtomicU64::new(0),
        }
    }
}

impl Slowest {
    /// Whether a request of so many nanoseconds is among the slowest. One look for nearly all of them.
    #[inline]
    pub fn admits(&self, total_ns: u64) -> bool {
        total_ns > self.floor.load(Relaxed)
    }

    /// Notes a request that [is admitted](Self::admits). One thread at a time.
    #[cold]
    pub fn note(&self, entry: &Entry) {
        let used = self.used.load(Relaxed);
        let place = if used < SLOWEST_MAX {
            self.used.store(used + 1, Relaxed);
            used
        } else {
            self.least()
        };
        self.totals[place].store(entry.total_ns(), Relaxed);
        // A queue's requests have numbers of their own, so a place's version never comes back.
        self.cells[place].write(entry.number + 1, &entry.pack());
        if used + 1 >= SLOWEST_MAX {
            let floor = self.totals[self.least()].load(Relaxed);
            self.floor.store(floor, Relaxed);
        }
    }

    fn least(&self) -> usize {
        let places = 0..SLOWEST_MAX;
        let least = places.min_by_key(|place| self.totals[*place].load(Relaxed));
        least.unwrap_or(0)
    }

    /// Adds those of another, both of which nobody else reads or writes meanwhile.
    pub fn absorb(&self, other: &Slowest) {
        for entry in other.read() {
            if self.admits(entry.total_ns()) {
                self.note(&entry);
            }
        }
    }

    /// The slowest, from the slowest on. One that is being replaced is left out.
    pub fn read(&self) -> Vec<Entry> {
        let cells = self.cells.iter();
        let mut entries: Vec<Entry> = cells
            .filter_map(|cell| {
                let (version, words) = cell.read()?;
                Entry::unpack(version - 1, words)
            })
            .collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.total_ns()));
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Operation, Stage, Status, Times};

    fn entry(number: u64, ns: u64) -> Entry {
        let mut stages_ns = Times::default();
        stages_ns[Stage::Device] = ns;
        Entry {
            number,
            operation: Operation::Read,
            offset: ns,
            bytes: 512,
            status: Status::Ok,
            begin_ns: 1,
            stages_ns,
        }
    }

    #[test]
    fn the_slowest_are_kept() {
        let slowest = Slowest::default();
        let other = Slowest::default();
        // All numbers up to 1000 in a scattered order.
        for n in 0..1000 {
            let entry = entry(n, 1 + n * 373 % 1000);
            let to = if n % 2 == 0 { &slowest } else { &other };
            if to.admits(entry.total_ns()) {
                to.note(&entry);
            }
        }
        slowest.absorb(&other);
        let found = slowest.read();
        let totals: Vec<u64> = found.iter().map(Entry::total_ns).collect();
        let expected: Vec<u64> = (1000 - SLOWEST_MAX as u64 + 1..=1000).rev().collect();
        assert_eq!(totals, expected);
        for one in found {
            assert_eq!(one, entry(one.number, 1 + one.number * 373 % 1000));
        }
        assert!(!slowest.admits(1000 - SLOWEST_MAX as u64 + 1));
    }
}
