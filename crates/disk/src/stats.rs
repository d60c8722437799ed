//! Counts and latencies, per queue, operation and stage.
//!
//! Written by the queue's thread alone with plain relaxed stores; read by anyone at any time.
//! A stage's time ends where the next one's begins:
//!
//! ```text
//!   seen ─map─▶ mapped ─submit─▶ submitted ─device─▶ device done ─complete─▶ completed ─notify─▶ notified
//! ```

use crate::clock;
use block::Op;
use serde::Serialize;
use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// Operations that are counted apart.
pub(crate) const OPS: [&str; 5] = ["read", "write", "flush", "discard", "write-zeroes"];

/// Stages that are timed apart; the last is the whole request.
const STAGES: [&str; 6] = ["map", "submit", "device", "complete", "notify", "total"];

/// Linear steps per power of two: a bucket is at most 1/8 wide.
const STEPS_LOG2: u32 = 3;
/// Buckets: latencies to 2^40 ns (18 minutes); the last takes all above.
const BUCKETS: usize = (40 << STEPS_LOG2) as usize;

/// The row of `op` in [`OPS`].
pub(crate) fn row(op: Op) -> usize {
    match op {
        Op::Read => 0,
        Op::Write { .. } => 1,
        Op::Flush => 2,
        Op::Discard => 3,
        Op::WriteZeroes { .. } => 4,
    }
}

/// When a request reached each stage; nanoseconds of [`crate::now_ns`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stamps {
    pub seen: u64,
    pub mapped: u64,
    pub submitted: u64,
    pub device_done: u64,
    pub completed: u64,
}

/// A request that ended and whose submitter was not told yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    /// Its operation's row in [`OPS`].
    pub row: usize,
    pub bytes: u64,
    pub failed: bool,
    pub stamps: Stamps,
}

/// A counter that one thread writes.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, value: u64) {
        self.0
            .store(self.0.load(Relaxed).wrapping_add(value), Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A log-linear histogram of nanoseconds.
#[derive(Debug)]
struct Histogram(Box<[Counter]>);

impl Default for Histogram {
    fn default() -> Self {
        Self((0..BUCKETS).map(|_| Counter::default()).collect())
    }
}

impl Histogram {
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
}

#[derive(Debug, Default)]
struct Row {
    count: Counter,
    bytes: Counter,
    errors: Counter,
    /// Sums of nanoseconds per stage.
    sums: [Counter; STAGES.len()],
    total: Histogram,
}

/// The statistics of one queue.
#[derive(Debug, Default)]
pub(crate) struct QueueStats {
    rows: [Row; OPS.len()],
    commits: Counter,
    barriers: Counter,
    loads: Counter,
    copies: Counter,
    joins: Counter,
    waits: Counter,
    stalls: Counter,
}

impl QueueStats {
    /// A request ended, and its submitter was told at `notified`.
    pub fn ended(&self, ended: &Ended, notified: u64) {
        let row = &self.rows[ended.row];
        row.count.add(1);
        if ended.failed {
            row.errors.add(1);
        } else {
            row.bytes.add(ended.bytes);
        }
        // A stage that a request did not go through took no time: it ends when the one before did.
        let stamps = &ended.stamps;
        let mut last = stamps.seen;
        let ends = [
            stamps.mapped,
            stamps.submitted,
            stamps.device_done,
            stamps.completed,
            notified,
        ];
        for (sum, end) in row.sums.iter().zip(ends) {
            sum.add(end.saturating_sub(last));
            last = last.max(end);
        }
        let total = last - stamps.seen;
        row.sums[STAGES.len() - 1].add(total);
        row.total.0[Histogram::bucket(total)].add(1);
    }

    /// Adds what `other` counted. One caller at a time, and no other writer of either.
    pub fn absorb(&self, other: &QueueStats) {
        for (row, from) in self.rows.iter().zip(&other.rows) {
            row.count.add(from.count.get());
            row.bytes.add(from.bytes.get());
            row.errors.add(from.errors.get());
            for (to, from) in row.sums.iter().zip(&from.sums) {
                to.add(from.get());
            }
            for (to, from) in row.total.0.iter().zip(&from.total.0) {
                to.add(from.get());
            }
        }
        self.commits.add(other.commits.get());
        self.barriers.add(other.barriers.get());
        self.loads.add(other.loads.get());
        self.copies.add(other.copies.get());
        self.joins.add(other.joins.get());
        self.waits.add(other.waits.get());
        self.stalls.add(other.stalls.get());
    }

    pub fn commit(&self) {
        self.commits.add(1);
    }

    pub fn barrier(&self) {
        self.barriers.add(1);
    }

    pub fn load(&self) {
        self.loads.add(1);
    }

    pub fn copy(&self) {
        self.copies.add(1);
    }

    pub fn join(&self) {
        self.joins.add(1);
    }

    pub fn wait(&self) {
        self.waits.add(1);
    }

    pub fn stall(&self) {
        self.stalls.add(1);
    }
}

/// What a disk did so far; sums over its queues.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Statistics {
    /// One entry per operation that occurred.
    pub operations: Vec<OpStatistics>,
    /// Runs of the format's flush stages.
    pub commits: u64,
    /// Barriers (`fdatasync`) that these made, counted per file.
    pub barriers: u64,
    /// Metadata blocks loaded: misses of the metadata cache.
    pub metadata_loads: u64,
    /// Copy-on-write fills: allocations of which something was read first.
    pub copies: u64,
    /// Writes that joined an allocation which another request had begun.
    pub joins: u64,
    /// Times that a request waited for another one's allocation or load.
    pub waits: u64,
    /// Times that a request waited for a free slot or buffer.
    pub stalls: u64,
}

/// One operation's counts and latencies.
#[derive(Clone, Debug, Serialize)]
pub struct OpStatistics {
    /// `read`, `write`, `flush`, `discard` or `write-zeroes`.
    pub operation: &'static str,
    /// Requests that ended.
    pub count: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Mean nanoseconds from seen in the ring to mapped.
    pub map_ns: u64,
    /// Mean nanoseconds from mapped to submitted with the rest of its batch.
    pub submit_ns: u64,
    /// Mean nanoseconds at the device.
    pub device_ns: u64,
    /// Mean nanoseconds from device done to completed.
    pub complete_ns: u64,
    /// Mean nanoseconds from completed to the client told.
    pub notify_ns: u64,
    /// Mean nanoseconds in all.
    pub total_ns: u64,
    /// Median nanoseconds in all (upper edge of its bucket, as the following).
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
    /// Slowest.
    pub max_ns: u64,
}

impl Statistics {
    /// Sums `queues` up.
    pub(crate) fn sum<'a>(queues: impl Iterator<Item = &'a QueueStats> + Clone) -> Self {
        let total = |pick: fn(&QueueStats) -> &Counter| queues.clone().map(|q| pick(q).get()).sum();
        let mut statistics = Statistics {
            operations: Vec::new(),
            commits: total(|q| &q.commits),
            barriers: total(|q| &q.barriers),
            metadata_loads: total(|q| &q.loads),
            copies: total(|q| &q.copies),
            joins: total(|q| &q.joins),
            waits: total(|q| &q.waits),
            stalls: total(|q| &q.stalls),
        };
        for (index, operation) in OPS.into_iter().enumerate() {
            let rows = || queues.clone().map(|q| &q.rows[index]);
            let count: u64 = rows().map(|r| r.count.get()).sum();
            if count == 0 {
                continue;
            }
            let mean = |stage: usize| rows().map(|r| r.sums[stage].get()).sum::<u64>() / count;
            let buckets: Vec<u64> = (0..BUCKETS)
                .map(|b| rows().map(|r| r.total.0[b].get()).sum())
                .collect();
            // Read while it is written: its own sum is the consistent one.
            let samples: u64 = buckets.iter().sum();
            let percentile = |per_mille: u64| {
                let rank = (samples * per_mille).div_ceil(1000).max(1);
                let mut seen = 0;
                for (bucket, n) in buckets.iter().enumerate() {
                    seen += n;
                    if seen >= rank {
                        return Histogram::upper(bucket);
                    }
                }
                0
            };
            statistics.operations.push(OpStatistics {
                operation,
                count,
                bytes: rows().map(|r| r.bytes.get()).sum(),
                errors: rows().map(|r| r.errors.get()).sum(),
                map_ns: mean(0),
                submit_ns: mean(1),
                device_ns: mean(2),
                complete_ns: mean(3),
                notify_ns: mean(4),
                total_ns: mean(5),
                p50_ns: percentile(500),
                p99_ns: percentile(990),
                p999_ns: percentile(999),
                max_ns: percentile(1000),
            });
        }
        statistics
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{:<13}{:>12}{:>12}{:>8}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "operation",
            "requests",
            "bytes",
            "errors",
            "map",
            "submit",
            "device",
            "complete",
            "notify",
            "mean",
            "p50",
            "p99",
            "p99.9"
        );
        for o in &self.operations {
            let _ = writeln!(
                text,
                "{:<13}{:>12}{:>12}{:>8}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
                o.operation,
                o.count,
                block::size::human(o.bytes),
                o.errors,
                clock::human(o.map_ns),
                clock::human(o.submit_ns),
                clock::human(o.device_ns),
                clock::human(o.complete_ns),
                clock::human(o.notify_ns),
                clock::human(o.total_ns),
                clock::human(o.p50_ns),
                clock::human(o.p99_ns),
                clock::human(o.p999_ns),
            );
        }
        let _ = writeln!(
            text,
            "commits {}, barriers {}, metadata loads {}, copy-on-write fills {}, joined writes {}, waits {}, \
             stalls {}",
            self.commits,
            self.barriers,
            self.metadata_loads,
            self.copies,
            self.joins,
            self.waits,
            self.stalls
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        let mut last = 0;
        for ns in 0..100_000u64 {
            let bucket = Histogram::bucket(ns);
            assert!(bucket == last || bucket == last + 1, "{ns}");
            assert!(Histogram::upper(bucket) >= ns);
            assert!(Histogram::upper(bucket) <= ns + ns / 8 + 1, "{ns}");
            last = bucket;
        }
        assert_eq!(Histogram::bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn sums_over_queues() {
        let (a, b) = (QueueStats::default(), QueueStats::default());
        let mut ended = Ended {
            row: 0,
            bytes: 4096,
            failed: false,
            stamps: Stamps {
                seen: 100,
                mapped: 200,
                submitted: 250,
                device_done: 1000,
                completed: 1050,
            },
        };
        for _ in 0..99 {
            a.ended(&ended, 1100);
        }
        ended.failed = true;
        b.ended(&ended, 100_100);
        let sum = Statistics::sum([&a, &b].into_iter());
        let read = &sum.operations[0];
        assert_eq!((read.count, read.errors), (100, 1));
        assert_eq!(read.bytes, 99 * 4096);
        assert_eq!(
            (read.map_ns, read.submit_ns, read.device_ns),
            (100, 50, 750)
        );
        assert!((1000..1130).contains(&read.p50_ns), "{}", read.p50_ns);
        assert!((100_000..113_000).contains(&read.max_ns));
        assert!(sum.table().contains("read"));
    }
}
