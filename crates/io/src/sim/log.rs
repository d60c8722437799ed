//! What happened to simulated disks, in one order for all of a machine's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Gives every event of a machine a number. Disks of one machine share it ([`crate::SimOptions::clock`]), so that
/// there is one order of what happened to all of them; and so may whoever uses them.
#[derive(Clone, Debug, Default)]
pub struct SimClock(Arc<AtomicU64>);

impl SimClock {
    /// The number of the event that happens now: larger than all before.
    pub fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The number of the latest event.
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// What an operation did to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Arc<[u8]>,
    },
    /// A range became zeros (zeroing or discard).
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The size changed.
    Resize {
        /// New size in bytes.
        len: u64,
    },
    /// What had ended before this began survives any crash.
    Sync,
    /// A sync failed: what had ended before it began and no sync had covered may be lost for good, whatever
    /// later syncs say (as with `fdatasync`, which reports an error once).
    FailedSync,
}

/// An operation that ended. It may have taken effect at any time since it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// When it was submitted, by the disk's clock.
    pub begun: u64,
    /// When it ended. Entries of a log are in this order.
    pub ended: u64,
    /// What it did.
    pub change: Change,
}
