//! A disk that is served: what all its queues share.

use crate::{
    blocking::{Driver, Member},
    chain::{Chain, Layer},
    commit::GroupCommit,
    grace::Epochs,
    packed::Large,
    stats::{QueueStats, QueueTrace, Statistics},
    unsynced::Unsynced,
    wait::WaitTable,
};
use block::{Result, Storage, Zeroed, limits};
use image::Freed;
use io::File;
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use trace::{Entry, Operation, Ring, Snapshot, Stage};

/// How a disk treats its guests.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Refuse everything that changes the disk.
    pub read_only: bool,
    /// Make each write stable before it completes, whatever the guest asks
    /// (cache modes `writethrough` and `directsync`).
    pub writethrough: bool,
    /// Give discarded space back to the host (`--discard unmap`); otherwise discards are ignored.
    pub discard: bool,
    /// Begin the commit of a flush that is to be expected when the write before it has ended (see [`crate::Statistics::ahead`]).
    pub flush_ahead: bool,
    /// Write zeros to space of the active image before it is used, where a client flushes after each few writes and that spares the flushes
    /// a commit of the file system's journal ([`io::File::has_unwritten_extents`]).
    pub prewrite: bool,
    /// Requests that each queue remembers with the times of their stages, 64 bytes each: rounded up to a power of two,
    /// at most [`trace::RING_ENTRIES_MAX`], fewer when there are many queues (see [`Disk::queue_traces`]). 0: none, and
    /// no histograms of stages.
    pub trace_entries: u32,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            writethrough: false,
            discard: true,
            flush_ahead: true,
            prewrite: true,
            trace_entries: trace::RING_ENTRIES_DEFAULT,
        }
    }
}

/// Bytes that the records of all a disk's queues take together at most, and 4 KiB for each queue.
const TRACE_BYTES_MAX: usize = 4 << 20;
/// Entries of a queue's record at least.
const TRACE_ENTRIES_MIN: u32 = 64;
/// Queues that have left and whose last requests are kept.
const PAST_QUEUES: usize = 4;

/// The statistics of queues.
#[derive(Debug, Default)]
struct Queues {
    live: Vec<Arc<QueueStats>>,
    /// The last ones that left, with their rings, oldest first.
    past: VecDeque<Arc<QueueStats>>,
    /// Queues there were ever.
    count: u64,
}

impl Queues {
    fn ring_bytes(&self) -> usize {
        let all = self.live.iter().chain(&self.past);
        all.map(|queue| queue.ring().bytes()).sum()
    }
}

/// An open disk: a chain of images, the active one first, and what its queues share.
///
/// Queues ([`crate::DiskQueue`]) belong to threads; this is what they meet in. Nothing in
/// here is locked while I/O runs, and a request on clusters that are allocated takes no lock of it.
#[derive(Debug)]
pub struct Disk {
    pub(crate) layers: Vec<Layer>,
    size: u64,
    read_only: bool,
    discard: bool,
    flush_ahead: bool,
    always_durable: bool,
    writeback: AtomicBool,
    pub(crate) waits: WaitTable,
    pub(crate) commits: GroupCommit,
    pub(crate) unsynced: Unsynced,
    pub(crate) epochs: Epochs,
    trace_entries: u32,
    stats: Mutex<Queues>,
    /// What queues that have left did, in one sum; written under the lock of `stats`.
    past_stats: QueueStats,
    /// Freed space that queues left behind when they were detached, with the epoch that must
    /// have passed; the next queue takes it over.
    pub(crate) orphans: Mutex<Vec<(u64, Freed)>>,
    cluster_size: u64,
    pub(crate) large: Large,
}

impl Disk {
    /// A disk over an open chain.
    pub fn new(chain: Chain, options: DiskOptions) -> Result<Arc<Disk>> {
        let layers = chain.layers;
        let Some(active) = layers.first() else {
            return Err(block::Error::invalid("a disk needs at least one image"));
        };
        if layers.len() > limits::CHAIN_LENGTH_MAX {
            return Err(block::Error::invalid(format!(
                "the backing chain has {} images, the limit is {}",
                layers.len(),
                limits::CHAIN_LENGTH_MAX
            )));
        }
        if chain.faults.is_some() {
            return Err(block::Error::unsupported(
                "blkdebug over the image's format: only that of its file is served",
            ));
        }
        for layer in &layers {
            let encryption = layer.image.encryption();
            if encryption.is_some_and(|e| e.cipher.is_none()) {
                return Err(block::Error::new(
                    block::ErrorKind::Denied,
                    format!(
                        "{}: is encrypted, and its passphrase was not given",
                        layer.path.display()
                    ),
                ));
            }
        }
        let description = active.image.describe();
        if let (Some(why), false) = (&description.read_only_because, options.read_only) {
            return Err(block::Error::unsupported(format!(
                "{}: cannot be written: {why}; open it with --read-only",
                active.path.display()
            )));
        }
        let unwritten = |file: &Arc<File>| file.has_unwritten_extents();
        if options.prewrite && !options.read_only && active.files.first().is_some_and(unwritten) {
            active.image.prewrite(true);
        }
        Ok(Arc::new(Disk {
            size: active.image.size(),
            read_only: options.read_only,
            discard: options.discard,
            flush_ahead: options.flush_ahead,
            always_durable: options.writethrough,
            writeback: AtomicBool::new(!options.writethrough),
            waits: WaitTable::default(),
            commits: GroupCommit::default(),
            unsynced: Unsynced::new(active.files.len()),
            epochs: Epochs::default(),
            trace_entries: options.trace_entries,
            stats: Mutex::default(),
            past_stats: QueueStats::new(0, u32::from(options.trace_entries > 0)),
            orphans: Mutex::default(),
            cluster_size: description.cluster_size,
            large: Large::default(),
            layers,
        }))
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether guests may not write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// What guests should see as their sector size: 512, or the alignment that O_DIRECT asks of offsets
    /// where that is larger.
    pub fn logical_block_size(&self) -> u32 {
        let files = self.layers.iter().flat_map(|l| &l.files);
        let align = files
            .filter(|f| f.direct())
            .map(|f| f.alignment().offset)
            .max()
            .unwrap_or(512);
        align.clamp(512, 4096)
    }

    /// What writes must be multiples of, in bytes: 1, or a sector where the active image is encrypted.
    pub fn write_unit(&self) -> u32 {
        match self.layers.first().and_then(|l| l.image.encryption()) {
            Some(_) => crypto::SECTOR as u32,
            None => 1,
        }
    }

    /// Allocation unit of the active image in bytes, at least 512.
    pub fn cluster_size(&self) -> u32 {
        u32::try_from(self.cluster_size).unwrap_or(512).max(512)
    }

    /// Whether discards give space back.
    pub fn can_discard(&self) -> bool {
        self.discard && !self.read_only
    }

    /// Whether commits may begin before they are asked for.
    pub(crate) fn flush_ahead(&self) -> bool {
        self.flush_ahead
    }

    /// Whether a write may complete before it is stable. Guests see it as their write cache.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// A guest switches its write cache. Without one (`false`), each write is made stable
    /// before it completes. Ignored where the cache mode says so for good.
    pub fn set_writeback(&self, on: bool) {
        if !self.always_durable {
            self.writeback.store(on, Ordering::Relaxed);
        }
    }

    /// The chain, active image first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Statistics of a new queue.
    pub(crate) fn new_stats(&self) -> Arc<QueueStats> {
        let mut queues = self.queues();
        let mut entries = self.trace_entries;
        if entries > 0 {
            while queues.ring_bytes() + Ring::ENTRY_BYTES * entries.next_power_of_two() as usize
                > TRACE_BYTES_MAX
                && !queues.past.is_empty()
            {
                queues.past.pop_front();
            }
            let left = TRACE_BYTES_MAX.saturating_sub(queues.ring_bytes()) / Ring::ENTRY_BYTES;
            // The largest power of two that fits; at most 65536 fit.
            let fits = (left + 1).next_power_of_two() as u32 / 2;
            entries = entries.min(fits).max(TRACE_ENTRIES_MIN.min(entries));
        }
        let stats = Arc::new(QueueStats::new(queues.count, entries));
        queues.count += 1;
        queues.live.push(stats.clone());
        stats
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue left: the sum of those that did is kept, and the records of the last few.
    pub(crate) fn end_stats(&self, ended: &Arc<QueueStats>) {
        let mut queues = self.queues();
        queues.live.retain(|s| !Arc::ptr_eq(s, ended));
        self.past_stats.absorb(ended);
        ended.end();
        if ended.traces() && ended.ring().written() > 0 {
            queues.past.push_back(ended.clone());
            if queues.past.len() > PAST_QUEUES {
                queues.past.pop_front();
            }
        }
    }

    /// What the disk did so far, over all its queues, past ones included.
    pub fn statistics(&self) -> Statistics {
        let queues = self.queues();
        Statistics::sum(queues.live.iter().map(|s| &**s).chain([&self.past_stats]))
    }

    /// The records of its queues: those that run, and the last four that have left. All rings of a disk take 4 MiB at
    /// most, and 4 KiB for each queue beyond.
    pub fn queue_traces(&self) -> Vec<QueueTrace> {
        let queues = self.queues();
        let all = queues.past.iter().chain(&queues.live);
        all.map(|stats| QueueTrace(stats.clone())).collect()
    }

    /// Latencies of an operation over all queues, past ones included: of a stage, or for `None` of the whole.
    pub fn latencies(&self, operation: Operation, stage: Option<Stage>) -> Snapshot {
        let queues = self.queues();
        let mut sum = self.past_stats.latencies().snapshot(operation, stage);
        for queue in &queues.live {
            sum.merge(&queue.latencies().snapshot(operation, stage));
        }
        sum
    }

    /// The slowest requests of all queues, past ones included, from the slowest on, at most `max`. Their numbers are their
    /// queues'.
    pub fn slowest(&self, max: usize) -> Vec<Entry> {
        let queues = self.queues();
        let mut all = self.past_stats.slowest().read();
        for queue in &queues.live {
            all.extend(queue.slowest().read());
        }
        all.sort_by_key(|entry| std::cmp::Reverse(entry.total_ns()));
        all.truncate(max);
        all
    }

    /// Clean close with blocking I/O: commits what is in memory, returns freed and reserved space and
    /// leaves the image as one that was closed. All queues must be detached. An error
    /// says what could not be written; what earlier flushes covered is safe all the same.
    pub fn close(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let active = &self.layers[0];
        let files: Vec<Arc<dyn Storage>> = active
            .files
            .iter()
            .map(|file| Arc::clone(file) as Arc<dyn Storage>)
            .collect();
        let orphans =
            std::mem::take(&mut *self.orphans.lock().unwrap_or_else(PoisonError::into_inner));
        for (_, freed) in orphans {
            if self.discard
                && let Some(file) = files.get(usize::from(freed.file.0))
            {
                // A hint: the space is free either way.
                let _ = file.discard(freed.offset.0, freed.len);
            }
            active.image.release(&freed, Zeroed::No);
        }
        let image = Arc::clone(&active.image);
        Driver::new(vec![Member { image, files }], false)?.close()?;
        match self.commits.owed() {
            None => Ok(()),
            Some(error) => Err(block::Error::new(
                block::ErrorKind::Io,
                format!(
                    "{}: a flush before failed ({error:?}): what was written may not be durable",
                    active.path.display()
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Ended;
    use block::Op;
    use trace::Stamps;

    fn disk() -> Arc<Disk> {
        let layer = Layer {
            image: Arc::new(image::Null::new(1 << 20).unwrap()),
            files: Vec::new(),
            path: "null".into(),
            format: image::Format::Null,
            part: None,
        };
        let chain = Chain::new(vec![layer], false);
        Disk::new(chain, DiskOptions::default()).unwrap()
    }

    fn read_of(taken: u64) -> Ended {
        Ended {
            op: Op::Read,
            at: 0,
            bytes: 512,
            result: Ok(()),
            stamps: Stamps {
                taken,
                ..Stamps::default()
            },
        }
    }

    #[test]
    fn queues_that_left_are_counted_but_only_few_are_kept() {
        let disk = disk();
        for n in 0..6 {
            let stats = disk.new_stats();
            stats.ended(&read_of(n), 1000, 1000);
            stats.wait();
            let before = disk.statistics();
            let slowest = disk.slowest(100);
            disk.end_stats(&stats);
            let after = disk.statistics();
            assert_eq!(format!("{after:?}"), format!("{before:?}"));
            assert_eq!(disk.slowest(100), slowest);
        }
        assert_eq!(disk.statistics().operations[0].count, 6);
        assert_eq!(disk.slowest(100).len(), 6);
        let whole = disk.latencies(Operation::Read, None);
        assert_eq!((whole.count, whole.sum_ns), (6, 6000 - 15));
        // The last ones' requests can still be looked at.
        let traces = disk.queue_traces();
        let numbers: Vec<u64> = traces.iter().map(QueueTrace::number).collect();
        assert_eq!(numbers, [2, 3, 4, 5]);
        assert!(traces.iter().all(|trace| !trace.is_live()));
        assert_eq!(traces[0].ring().last(9).entries[0].begin_ns, 2);
    }

    #[test]
    fn many_queues_remember_less() {
        let disk = disk();
        let ended = disk.new_stats();
        ended.ended(&read_of(1), 1, 1);
        disk.end_stats(&ended);
        let queues: Vec<_> = (0..256).map(|_| disk.new_stats()).collect();
        let entries = |n: usize| queues[n].ring().capacity() as u32;
        assert_eq!(entries(0), trace::RING_ENTRIES_DEFAULT);
        assert_eq!(entries(255), TRACE_ENTRIES_MIN);
        let bytes: usize = queues.iter().map(|q| q.ring().bytes()).sum();
        assert!(bytes <= TRACE_BYTES_MAX + 256 * 4096, "{bytes}");
        // They come before those that have left.
        assert!(disk.queue_traces().iter().all(QueueTrace::is_live));
    }
}
