//! Counts of latencies, per operation and stage: written by one thread, read by any.

use crate::{
    buckets::Buckets,
    entry::Operation,
    stage::{STAGES, Stage, Times},
};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use zerocopy::FromZeros;

/// Linear steps per power of two: a bucket is at most 1/8 wide.
const STEPS_LOG2: u32 = 3;
/// Buckets: latencies to 2^40 ns (18 minutes); the last takes all above.
const BUCKETS: usize = (40 << STEPS_LOG2) as usize;

/// A counter that one thread writes.
#[derive(Debug, Default, FromZeros)]
#[repr(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `value` more.
    #[inline]
    pub fn add(&self, value: u64) {
        self.0
            .store(self.0.load(Relaxed).wrapping_add(value), Relaxed);
    }

    /// What was counted.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Zeros that take memory when they are first counted.
fn counters(count: usize) -> Box<[Counter]> {
    <[Counter]>::new_box_zeroed_with_elems(count).expect("memory for a histogram")
}

#[inline]
fn bucket(ns: u64) -> usize {
    let steps = 1u64 << STEPS_LOG2;
    if ns < steps {
        return ns as usize;
    }
    let log = 63 - ns.leading_zeros();
    let step = (ns >> (log - STEPS_LOG2)) - steps;
    (((log - STEPS_LOG2 + 1) << STEPS_LOG2) as usize + step as usize).min(BUCKETS - 1)
}

/// The highest value that falls into a bucket.
fn upper(bucket: usize) -> u64 {
    let steps = 1u64 << STEPS_LOG2;
    let bucket = bucket as u64;
    if bucket < steps {
        return bucket;
    }
    let log = (bucket >> STEPS_LOG2) - 1;
    let step = bucket & (steps - 1);
    ((steps + step + 1) << log) - 1
}

/// Everything of an operation: its stages, and the whole behind them.
const SERIES: usize = STAGES + 1;

/// Counts and sums of a queue's latencies: per operation, those of each stage and of the whole.
///
/// One thread writes. 113 KiB of address space, of which only the pages that are counted in take memory.
#[derive(Debug)]
pub struct Histograms {
    counts: [Counter; Operation::ALL.len()],
    /// By operation, then series.
    sums: [[Counter; SERIES]; Operation::ALL.len()],
    /// By operation, series and bucket. Stages that took no time are not counted: what lacks are those.
    buckets: Box<[Counter]>,
    /// Whether the stages are counted, beside the whole.
    stages: bool,
}

impl Histograms {
    /// Empty ones; without `stages` only sums and the whole are counted.
    pub fn new(stages: bool) -> Self {
        Self {
            counts: Default::default(),
            sums: Default::default(),
            buckets: counters(Operation::ALL.len() * SERIES * BUCKETS),
            stages,
        }
    }

    /// Counts a request. One thread at a time.
    #[inline]
    pub fn add(&self, operation: Operation, times: &Times, total_ns: u64) {
        let row = operation as usize;
        self.counts[row].add(1);
        let sums = &self.sums[row];
        for (series, ns) in times.0.into_iter().enumerate() {
            if ns == 0 {
                continue;
            }
            sums[series].add(ns);
            if self.stages {
                self.count(row, series, ns);
            }
        }
        sums[STAGES].add(total_ns);
        self.count(row, STAGES, total_ns);
    }

    #[inline]
    fn count(&self, row: usize, series: usize, ns: u64) {
        let at = (row * SERIES + series) * BUCKETS + bucket(ns);
        if let Some(counter) = self.buckets.get(at) {
            counter.add(1);
        }
    }

    /// Adds what `other` counted. One caller at a time, and no other writer of either.
    pub fn absorb(&self, other: &Histograms) {
        for (to, from) in self.counts.iter().zip(&other.counts) {
            to.add(from.get());
        }
        let sums = self.sums.as_flattened().iter();
        for (to, from) in sums.zip(other.sums.as_flattened()) {
            to.add(from.get());
        }
        for (to, from) in self.buckets.iter().zip(&other.buckets) {
            // Pages of zeros stay untouched.
            match from.get() {
                0 => {}
                count => to.add(count),
            }
        }
    }

    /// Nanoseconds of a stage of an operation, of all its requests.
    pub fn sum_ns(&self, operation: Operation, stage: Stage) -> u64 {
        self.sums[operation as usize][stage as usize].get()
    }

    /// What was counted of an operation: of a stage, or for `None` of the whole. Without [stages](Self::new) a stage
    /// has its sum and no buckets.
    pub fn snapshot(&self, operation: Operation, stage: Option<Stage>) -> Snapshot {
        let series = stage.map_or(STAGES, |stage| stage as usize);
        let row = operation as usize;
        let at = (row * SERIES + series) * BUCKETS;
        let mut snapshot = Snapshot {
            count: self.counts[row].get(),
            sum_ns: self.sums[row][series].get(),
            buckets: Buckets::default(),
        };
        if !self.stages && stage.is_some() {
            return snapshot;
        }
        let counts: Vec<u64> = self.buckets[at..at + BUCKETS]
            .iter()
            .map(Counter::get)
            .collect();
        // Read while it is written: what was counted meanwhile is in one and not in the other.
        let counted: u64 = counts.iter().sum();
        let untimed = match stage {
            Some(_) => snapshot.count.saturating_sub(counted),
            None => 0,
        };
        let timed = counts
            .into_iter()
            .enumerate()
            .map(|(bucket, count)| (upper(bucket), count));
        snapshot.buckets = std::iter::once((0, untimed)).chain(timed).collect();
        snapshot
    }
}

/// Latencies as they were counted at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Requests.
    pub count: u64,
    /// Nanoseconds of all of them.
    pub sum_ns: u64,
    /// Each is at most an eighth wide.
    pub buckets: Buckets,
}

impl Snapshot {
    /// Adds another's.
    pub fn merge(&mut self, other: &Snapshot) {
        self.count += other.count;
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        self.buckets.merge(&other.buckets);
    }

    /// What came since `earlier`, a snapshot of the same.
    pub fn since(&self, earlier: &Snapshot) -> Snapshot {
        Snapshot {
            count: self.count.saturating_sub(earlier.count),
            sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns),
            buckets: self.buckets.since(&earlier.buckets),
        }
    }

    /// Mean nanoseconds; 0 where there are none.
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.count).unwrap_or(0)
    }

    /// The nanoseconds that `quantile` (0 to 1) of the requests did not exceed: the upper edge of the bucket.
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        // Read while it is written: the buckets' own sum is the consistent one.
        self.buckets.quantile_ns(quantile).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        let mut last = 0;
        for ns in 0..100_000u64 {
            let bucket = bucket(ns);
            assert!(bucket == last || bucket == last + 1, "{ns}");
            assert!(upper(bucket) >= ns);
            assert!(upper(bucket) <= ns + ns / 8 + 1, "{ns}");
            last = bucket;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn stages_are_counted_apart() {
        let histograms = Histograms::new(true);
        for n in 0..1000u64 {
            let mut times = Times::default();
            times[Stage::Map] = 5;
            times[Stage::Device] = if n < 999 { 1000 } else { 100_000 };
            histograms.add(Operation::Write, &times, times.total());
        }
        let device = histograms.snapshot(Operation::Write, Some(Stage::Device));
        assert_eq!((device.count, device.sum_ns), (1000, 999_000 + 100_000));
        assert_eq!(device.mean_ns(), 1099);
        assert!((1000..1130).contains(&device.quantile_ns(0.999)));
        assert!((100_000..113_000).contains(&device.quantile_ns(0.9999)));
        let map = histograms.snapshot(Operation::Write, Some(Stage::Map));
        assert_eq!(map.buckets.as_slice(), [(5, 1000)]);
        // Those that did not go through a stage took no time there.
        let commit = histograms.snapshot(Operation::Write, Some(Stage::Commit));
        assert_eq!(commit.buckets.as_slice(), [(0, 1000)]);
        let whole = histograms.snapshot(Operation::Write, None);
        assert_eq!(whole.sum_ns, 5000 + device.sum_ns);
        let none = histograms.snapshot(Operation::Read, None);
        assert_eq!(none, Snapshot::default());
        assert_eq!((none.mean_ns(), none.quantile_ns(0.5)), (0, 0));

        let sum = Histograms::new(true);
        sum.absorb(&histograms);
        sum.absorb(&histograms);
        let mut twice = device.clone();
        twice.merge(&device);
        let absorbed = sum.snapshot(Operation::Write, Some(Stage::Device));
        assert_eq!(absorbed, twice);
        assert_eq!(absorbed.since(&device), device);
        assert_eq!(device.since(&device).buckets, Buckets::default());
    }

    #[test]
    fn without_stages_their_sums_remain() {
        let histograms = Histograms::new(false);
        let mut times = Times::default();
        times[Stage::Device] = 70;
        histograms.add(Operation::Read, &times, 70);
        let device = histograms.snapshot(Operation::Read, Some(Stage::Device));
        assert_eq!((device.sum_ns, device.buckets.count()), (70, 0));
        assert_eq!(
            histograms.snapshot(Operation::Read, None).buckets.count(),
            1
        );
    }
}
