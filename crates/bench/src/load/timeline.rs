//! Latency over time, in bounded memory: what a heat map shows.
//!
//! A row is a slice of the time, a column a range of latencies. When the measurement outlasts the rows, two become one,
//! so that there are always between half and all of them.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Rows at most.
pub const ROWS_MAX: usize = 64;
/// Columns: the last one holds everything slower.
pub const COLUMNS: usize = 96;
/// Columns for each doubling of the latency.
const PER_OCTAVE: u32 = 4;
/// Upper edge of the first column.
const FIRST_NS: u64 = 1000;
/// A row's time at first.
const SLICE: Duration = Duration::from_millis(10);

/// How many requests ended when, and how slow they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline {
    slice: Duration,
    /// Row by row.
    cells: Vec<u32>,
    rows: usize,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            slice: SLICE,
            cells: vec![0; ROWS_MAX * COLUMNS],
            rows: 0,
        }
    }
}

impl Timeline {
    /// Counts a request that ended `at` after the measurement began. Allocates nothing.
    pub(crate) fn add(&mut self, at: Duration, latency: Duration) {
        let mut row = self.row(at);
        while row >= ROWS_MAX {
            self.fold();
            row = self.row(at);
        }
        self.rows = self.rows.max(row + 1);
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let cell = &mut self.cells[row * COLUMNS + column(ns)];
        *cell = cell.saturating_add(1);
    }

    /// Counts all of `other`'s requests too.
    pub(crate) fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        while self.slice < other.slice {
            self.fold();
        }
        while other.slice < self.slice {
            other.fold();
        }
        self.rows = self.rows.max(other.rows);
        for (cell, more) in self.cells.iter_mut().zip(&other.cells) {
            *cell = cell.saturating_add(*more);
        }
    }

    fn row(&self, at: Duration) -> usize {
        usize::try_from(at.as_nanos() / self.slice.as_nanos()).unwrap_or(usize::MAX)
    }

    /// Makes one row of two.
    fn fold(&mut self) {
        self.slice = self.slice.saturating_mul(2);
        self.rows = self.rows.div_ceil(2);
        for row in 0..ROWS_MAX {
            for column in 0..COLUMNS {
                let of = |row: usize| match row < ROWS_MAX {
                    true => self.cells[row * COLUMNS + column],
                    false => 0,
                };
                self.cells[row * COLUMNS + column] = of(2 * row).saturating_add(of(2 * row + 1));
            }
        }
    }

    /// For the record.
    pub fn store(&self) -> Stored {
        let rows = self.cells.chunks(COLUMNS).take(self.rows);
        Stored {
            slice_ms: self.slice.as_secs_f64() * 1000.0,
            rows: rows
                .map(|row| {
                    let cells = (0u16..).zip(row).filter(|(_, count)| **count > 0);
                    cells.map(|(column, count)| (column, *count)).collect()
                })
                .collect(),
        }
    }
}

/// A timeline as it is stored: only what is not empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    /// Milliseconds of a row.
    pub slice_ms: f64,
    /// For each row, columns that are not empty and their requests. Column 0 holds what took up to 1 µs, and each further
    /// one what took up to 2^(1/4) times as long.
    pub rows: Vec<Vec<(u16, u32)>>,
}

impl Stored {
    /// Counts all of `other`'s requests too: those of another load that ran at the same time.
    pub(crate) fn merge(&mut self, other: &Self) {
        if self.rows.is_empty() {
            self.clone_from(other);
            return;
        }
        let mut other = other.clone();
        // Slices are doublings of the same one.
        while self.slice_ms < other.slice_ms {
            self.fold();
        }
        while other.slice_ms < self.slice_ms && !other.rows.is_empty() {
            other.fold();
        }
        self.rows
            .resize(self.rows.len().max(other.rows.len()), Vec::new());
        for (row, more) in self.rows.iter_mut().zip(&other.rows) {
            add(row, more);
        }
    }

    fn fold(&mut self) {
        self.slice_ms *= 2.0;
        let pairs = self.rows.chunks(2).map(|pair| {
            let mut row = pair[0].clone();
            for more in &pair[1..] {
                add(&mut row, more);
            }
            row
        });
        self.rows = pairs.collect();
    }
}

/// Adds counts of columns to those of another row.
fn add(row: &mut Vec<(u16, u32)>, more: &[(u16, u32)]) {
    for (column, count) in more {
        match row.binary_search_by_key(column, |cell| cell.0) {
            Ok(at) => row[at].1 = row[at].1.saturating_add(*count),
            Err(at) => row.insert(at, (*column, *count)),
        }
    }
}

/// The upper edge of a column, microseconds.
pub fn edge_us(column: u16) -> f64 {
    2f64.powf(f64::from(column) / f64::from(PER_OCTAVE))
}

fn column(ns: u64) -> usize {
    if ns <= FIRST_NS {
        return 0;
    }
    let log = (ns as f64 / FIRST_NS as f64).log2() * f64::from(PER_OCTAVE);
    (log.ceil() as usize).min(COLUMNS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn requests(stored: &Stored) -> u32 {
        stored.rows.iter().flatten().map(|(_, count)| count).sum()
    }

    #[test]
    fn time_folds_and_nothing_is_lost() {
        let mut line = Timeline::default();
        for ms in 0..10_000 {
            line.add(MS * ms, Duration::from_micros(100));
        }
        let stored = line.store();
        assert_eq!(requests(&stored), 10_000);
        assert!((32..=ROWS_MAX).contains(&stored.rows.len()));
        assert_eq!(stored.slice_ms, 160.0);
        // As long as a clock can say.
        line.add(Duration::MAX, MS);
        assert_eq!(requests(&line.store()), 10_001);
    }

    #[test]
    fn queues_of_other_lengths_are_added() {
        let (mut short, mut long) = (Timeline::default(), Timeline::default());
        short.add(MS * 15, MS);
        long.add(MS * 2000, MS * 3);
        let mut both = short.clone();
        both.merge(&long);
        long.merge(&short);
        assert_eq!(both, long);
        let stored = both.store();
        assert_eq!((requests(&stored), stored.slice_ms), (2, 40.0));
        assert_eq!((stored.rows[0].len(), stored.rows[50].len()), (1, 1));
    }

    #[test]
    fn stored_ones_are_added_as_others_are() {
        let (mut short, mut long) = (Timeline::default(), Timeline::default());
        for ms in 0..90 {
            short.add(MS * ms, MS * (1 + ms % 3));
            long.add(MS * (ms * 40), MS * (1 + ms % 5));
        }
        for (one, other) in [(&short, &long), (&long, &short), (&long, &long)] {
            let mut stored = one.store();
            stored.merge(&other.store());
            let mut both = one.clone();
            both.merge(other);
            assert_eq!(stored, both.store());
        }
        let mut none = Stored::default();
        none.merge(&long.store());
        assert_eq!(none, long.store());
    }

    #[test]
    fn columns_are_where_their_edges_say() {
        for (ns, expected) in [(0, 0), (1000, 0), (1001, 1), (2000, 4), (2001, 5)] {
            assert_eq!(column(ns), expected, "{ns}");
        }
        assert_eq!(column(u64::MAX), COLUMNS - 1);
        for ns in [1500_u64, 77_000, 9_000_000] {
            let column = u16::try_from(column(ns)).unwrap();
            let us = ns as f64 / 1000.0;
            assert!(us <= edge_us(column) * 1.001 && us > edge_us(column - 1) * 0.999);
        }
    }
}
