//! A disk that is served: what all its queues share.

use crate::{
    blocking::{Driver, Member},
    chain::{Chain, Layer},
    commit::GroupCommit,
    grace::Epochs,
    stats::{QueueStats, Statistics},
    wait::WaitTable,
};
use block::{Result, Storage, Zeroed, limits};
use image::Freed;
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

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
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            writethrough: false,
            discard: true,
        }
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
    always_durable: bool,
    writeback: AtomicBool,
    pub(crate) waits: WaitTable,
    pub(crate) commits: GroupCommit,
    pub(crate) epochs: Epochs,
    stats: Mutex<Vec<Arc<QueueStats>>>,
    /// What queues that have left did, in one sum; written under the lock of `stats`.
    past_stats: QueueStats,
    /// Freed space that queues left behind when they were detached, with the epoch that must
    /// have passed; the next queue takes it over.
    pub(crate) orphans: Mutex<Vec<(u64, Freed)>>,
    cluster_size: u64,
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
        Ok(Arc::new(Disk {
            size: active.image.size(),
            read_only: options.read_only,
            discard: options.discard,
            always_durable: options.writethrough,
            writeback: AtomicBool::new(!options.writethrough),
            waits: WaitTable::default(),
            commits: GroupCommit::default(),
            epochs: Epochs::default(),
            stats: Mutex::default(),
            past_stats: QueueStats::default(),
            orphans: Mutex::default(),
            cluster_size: description.cluster_size,
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
        let stats = Arc::new(QueueStats::default());
        self.stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(stats.clone());
        stats
    }

    /// A queue left: only the sum of those that did is kept.
    pub(crate) fn end_stats(&self, ended: &Arc<QueueStats>) {
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.retain(|s| !Arc::ptr_eq(s, ended));
        self.past_stats.absorb(ended);
    }

    /// What the disk did so far, over all its queues, past ones included.
    pub fn statistics(&self) -> Statistics {
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        Statistics::sum(stats.iter().map(|s| &**s).chain([&self.past_stats]))
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
        Driver::new(vec![Member { image, files }], false)?.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{Ended, Stamps};

    #[test]
    fn queues_that_left_are_counted_but_not_kept() {
        let layer = Layer {
            image: Arc::new(image::Null::new(1 << 20).unwrap()),
            files: Vec::new(),
            path: "null".into(),
            format: image::Format::Null,
            part: None,
        };
        let chain = Chain {
            layers: vec![layer],
            read_only: false,
        };
        let disk = Disk::new(chain, DiskOptions::default()).unwrap();
        for _ in 0..3 {
            let stats = disk.new_stats();
            let ended = Ended {
                row: 0,
                bytes: 512,
                failed: false,
                stamps: Stamps::default(),
            };
            stats.ended(&ended, 1000);
            stats.wait();
            let before = disk.statistics();
            disk.end_stats(&stats);
            let after = disk.statistics();
            assert_eq!(format!("{after:?}"), format!("{before:?}"));
        }
        assert_eq!(disk.statistics().operations[0].count, 3);
        assert_eq!(disk.stats.lock().unwrap().len(), 0);
    }
}
