//! Counts and latencies, per queue, operation and stage, and each queue's record of its last and its slowest requests.
//!
//! Written by the queue's thread alone with plain relaxed stores; read by anyone at any time. What the stages are says
//! crate [`trace`].

use crate::clock;
use block::{GuestError, Op, size};
use serde::Serialize;
use std::{
    fmt::Write as _,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};
use trace::{Counter, Entry, Histograms, Operation, Ring, Slowest, Snapshot, Stage, Stamps};

/// A request that ended and whose submitter was not told yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub op: Op,
    pub at: u64,
    pub bytes: u64,
    pub result: Result<(), GuestError>,
    pub stamps: Stamps,
}

#[derive(Debug, Default)]
struct Row {
    bytes: Counter,
    errors: Counter,
}

/// The statistics of one queue.
#[derive(Debug)]
pub(crate) struct QueueStats {
    /// Its number among the disk's queues, past ones included, and what its export calls it.
    pub number: u64,
    name: OnceLock<String>,
    rows: [Row; Operation::ALL.len()],
    latencies: Histograms,
    ring: Ring,
    slowest: Slowest,
    commits: Counter,
    barriers: Counter,
    ahead: Counter,
    spared: Counter,
    prewritten: Counter,
    loads: Counter,
    copies: Counter,
    joins: Counter,
    waits: Counter,
    stalls: Counter,
    /// It still runs.
    live: AtomicBool,
}

impl QueueStats {
    /// Of a queue that keeps its last `entries` requests; with 0 it times the whole of requests alone.
    pub fn new(number: u64, entries: u32) -> Self {
        Self {
            number,
            name: OnceLock::new(),
            rows: Default::default(),
            latencies: Histograms::new(entries > 0),
            ring: Ring::new(entries),
            slowest: Slowest::default(),
            commits: Counter::default(),
            barriers: Counter::default(),
            ahead: Counter::default(),
            spared: Counter::default(),
            prewritten: Counter::default(),
            loads: Counter::default(),
            copies: Counter::default(),
            joins: Counter::default(),
            waits: Counter::default(),
            stalls: Counter::default(),
            live: AtomicBool::new(true),
        }
    }

    /// What the export calls the queue; said once.
    pub fn set_name(&self, name: String) {
        let _ = self.name.set(name);
    }

    pub fn name(&self) -> &str {
        self.name.get().map_or("", String::as_str)
    }

    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    pub fn slowest(&self) -> &Slowest {
        &self.slowest
    }

    pub fn latencies(&self) -> &Histograms {
        &self.latencies
    }

    /// Whether requests are noted one by one.
    pub fn traces(&self) -> bool {
        self.ring.capacity() > 0
    }

    pub fn is_live(&self) -> bool {
        self.live.load(Relaxed)
    }

    /// A number that no other queue of this process has while it lives: how probes tell queues apart.
    pub fn key(&self) -> u64 {
        std::ptr::from_ref(self).addr() as u64
    }

    /// Its queue left.
    pub fn end(&self) {
        self.live.store(false, Relaxed);
    }

    /// A request ended, and its submitter was told: in the ring at `told`, by a call at `notified`.
    pub fn ended(&self, ended: &Ended, told: u64, notified: u64) {
        let operation = Operation::from(ended.op);
        let row = &self.rows[operation as usize];
        if ended.result.is_err() {
            row.errors.add(1);
        } else {
            row.bytes.add(ended.bytes);
        }
        let stamps = Stamps {
            told,
            notified,
            ..ended.stamps
        };
        let stages_ns = stamps.times();
        let total_ns = stages_ns.total();
        self.latencies.add(operation, &stages_ns, total_ns);
        probe::probe!(
            diskplane,
            notified,
            self.key(),
            operation as u64,
            ended.at,
            ended.bytes,
            total_ns
        );
        if !self.traces() {
            return;
        }
        let entry = Entry {
            number: self.ring.written(),
            operation,
            offset: ended.at,
            bytes: ended.bytes,
            status: ended.result.into(),
            begin_ns: stamps.begin(),
            stages_ns,
        };
        self.ring.push(&entry);
        if self.slowest.admits(total_ns) {
            self.slowest.note(&entry);
        }
    }

    /// Adds what `other` counted. One caller at a time, and no other writer of either.
    pub fn absorb(&self, other: &QueueStats) {
        for (row, from) in self.rows.iter().zip(&other.rows) {
            row.bytes.add(from.bytes.get());
            row.errors.add(from.errors.get());
        }
        self.latencies.absorb(&other.latencies);
        self.slowest.absorb(&other.slowest);
        self.commits.add(other.commits.get());
        self.barriers.add(other.barriers.get());
        self.ahead.add(other.ahead.get());
        self.spared.add(other.spared.get());
        self.prewritten.add(other.prewritten.get());
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

    pub fn ahead(&self) {
        self.ahead.add(1);
    }

    pub fn prewrite(&self, bytes: u64) {
        self.prewritten.add(bytes);
    }

    pub fn spare(&self) {
        self.spared.add(1);
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

/// A queue's record of its requests, for whoever wants to look at it. It does not keep the queue.
#[derive(Clone, Debug)]
pub struct QueueTrace(pub(crate) Arc<QueueStats>);

impl QueueTrace {
    /// Its number among the queues that its disk ever had.
    pub fn number(&self) -> u64 {
        self.0.number
    }

    /// What its export calls it.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// Whether it still runs.
    pub fn is_live(&self) -> bool {
        self.0.is_live()
    }

    /// Its last requests.
    pub fn ring(&self) -> &Ring {
        self.0.ring()
    }

    /// Its slowest requests.
    pub fn slowest(&self) -> Vec<Entry> {
        self.0.slowest().read()
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
    /// Commits that began before a flush asked for them: the client flushes after each write that it waits for, or in another
    /// pattern that is known by now.
    pub ahead: u64,
    /// Flushes, and writes that must be durable, that needed no commit of their own: nothing had changed since the last one began.
    pub spared: u64,
    /// Bytes of zeros written to space before it was used (see [`crate::DiskOptions::prewrite`]).
    pub prewritten: u64,
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
    /// Mean nanoseconds in the ring; the stages are those of [`Stage`].
    pub ring_ns: u64,
    /// Mean nanoseconds until it was read and checked.
    pub parse_ns: u64,
    /// Mean nanoseconds until it was mapped.
    pub map_ns: u64,
    /// Mean nanoseconds from mapped to submitted with the rest of its batch.
    pub submit_ns: u64,
    /// Mean nanoseconds at the device.
    pub device_ns: u64,
    /// Mean nanoseconds from device done to durable, where it must be.
    pub commit_ns: u64,
    /// Mean nanoseconds from there to the answer in the ring.
    pub complete_ns: u64,
    /// Mean nanoseconds of telling the client.
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
            ahead: total(|q| &q.ahead),
            spared: total(|q| &q.spared),
            prewritten: total(|q| &q.prewritten),
            metadata_loads: total(|q| &q.loads),
            copies: total(|q| &q.copies),
            joins: total(|q| &q.joins),
            waits: total(|q| &q.waits),
            stalls: total(|q| &q.stalls),
        };
        for operation in Operation::ALL {
            let mut whole = Snapshot::default();
            for queue in queues.clone() {
                whole.merge(&queue.latencies.snapshot(operation, None));
            }
            if whole.count == 0 {
                continue;
            }
            let rows = || queues.clone().map(|q| &q.rows[operation as usize]);
            let mean = |stage: Stage| {
                let sums = queues.clone().map(|q| q.latencies.sum_ns(operation, stage));
                sums.fold(0, u64::wrapping_add) / whole.count
            };
            statistics.operations.push(OpStatistics {
                operation: operation.name(),
                count: whole.count,
                bytes: rows().map(|r| r.bytes.get()).sum(),
                errors: rows().map(|r| r.errors.get()).sum(),
                ring_ns: mean(Stage::Ring),
                parse_ns: mean(Stage::Parse),
                map_ns: mean(Stage::Map),
                submit_ns: mean(Stage::Submit),
                device_ns: mean(Stage::Device),
                commit_ns: mean(Stage::Commit),
                complete_ns: mean(Stage::Complete),
                notify_ns: mean(Stage::Notify),
                total_ns: whole.mean_ns(),
                p50_ns: whole.quantile_ns(0.5),
                p99_ns: whole.quantile_ns(0.99),
                p999_ns: whole.quantile_ns(0.999),
                max_ns: whole.quantile_ns(1.0),
            });
        }
        statistics
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{:<13}{:>12}{:>12}{:>8}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "operation",
            "requests",
            "bytes",
            "errors",
            "ring",
            "parse",
            "map",
            "submit",
            "device",
            "commit",
            "complete",
            "notify",
            "mean",
            "p50",
            "p99",
            "p99.9"
        );
        for o in &self.operations {
            let _ = write!(
                text,
                "{:<13}{:>12}{:>12}{:>8}",
                o.operation,
                o.count,
                block::size::human(o.bytes),
                o.errors,
            );
            for ns in [
                o.ring_ns,
                o.parse_ns,
                o.map_ns,
                o.submit_ns,
                o.device_ns,
                o.commit_ns,
                o.complete_ns,
                o.notify_ns,
                o.total_ns,
                o.p50_ns,
                o.p99_ns,
                o.p999_ns,
            ] {
                let _ = write!(text, "{:>10}", clock::human(ns));
            }
            text.push('\n');
        }
        let _ = writeln!(
            text,
            "commits {} ({} ahead), barriers {}, flushes spared {}, prewritten {}, metadata loads {}, copy-on-write fills {}, joined writes {}, waits {}, \
             stalls {}",
            self.commits,
            self.ahead,
            self.barriers,
            self.spared,
            size::human(self.prewritten),
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
    fn sums_over_queues() {
        let (a, b) = (QueueStats::new(0, 8), QueueStats::new(1, 8));
        let mut ended = Ended {
            op: Op::Read,
            at: 512,
            bytes: 4096,
            result: Ok(()),
            stamps: Stamps {
                arrived: 70,
                taken: 90,
                parsed: 100,
                mapped: 200,
                submitted: 250,
                device_done: 1000,
                completed: 1050,
                ..Stamps::default()
            },
        };
        for _ in 0..99 {
            a.ended(&ended, 1070, 1100);
        }
        ended.result = Err(GuestError::NoSpace);
        b.ended(&ended, 1070, 100_070);
        let sum = Statistics::sum([&a, &b].into_iter());
        let read = &sum.operations[0];
        assert_eq!((read.count, read.errors), (100, 1));
        assert_eq!(read.bytes, 99 * 4096);
        assert_eq!((read.ring_ns, read.parse_ns), (20, 10));
        assert_eq!(
            (read.map_ns, read.submit_ns, read.device_ns),
            (100, 50, 750)
        );
        assert_eq!((read.commit_ns, read.complete_ns), (50, 20));
        assert!((1030..1170).contains(&read.p50_ns), "{}", read.p50_ns);
        assert!((100_000..113_000).contains(&read.max_ns));
        assert!(sum.table().contains("read"));
        let noted = b.ring.last(10).entries;
        assert_eq!(noted.len(), 1);
        assert_eq!(noted[0].status, trace::Status::NoSpace);
        assert_eq!((noted[0].offset, noted[0].total_ns()), (512, 100_000));
        assert_eq!(b.slowest.read(), noted);
        assert_eq!(a.ring.last(100).entries.len(), 8);
    }
}
