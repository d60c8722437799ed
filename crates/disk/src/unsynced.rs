//! Which files of the active image have changes that no barrier covers yet.
//!
//! An image of one file asks nothing of this: each of its barriers waits for that file. One of many (the extents of a VMDK
//! image, an external data file) has its barriers wait only for files that something was written to since the last.
//!
//! # Why nothing is missed
//!
//! A change is noted when it *ends*, before anybody hears of it: what a flush must cover has ended before the flush
//! came, and so before its barriers look here. A barrier takes a file's mark before its sync is issued: a
//! change that ends in between leaves a mark of its own, and the next barrier syncs once more than it had to. A sync that
//! failed puts its mark back. A flush may also be covered by a run that began before it came, where nothing was seen to end since
//! (`commit::GroupCommit::changed`): the mark comes before that look, the run's beginning before its barriers look here, and all four are
//! `SeqCst`, so that one of the two is seen.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// A mark for each file; none at all where there are less than two.
#[derive(Debug)]
pub(crate) struct Unsynced(Box<[AtomicBool]>);

impl Unsynced {
    /// All files count as changed: what was done to them before the disk was opened is not known.
    pub fn new(files: usize) -> Self {
        let files = if files < 2 { 0 } else { files };
        Self((0..files).map(|_| AtomicBool::new(true)).collect())
    }

    /// Whether there is anything to note.
    pub fn is_kept(&self) -> bool {
        !self.0.is_empty()
    }

    /// A change of the file ended, well or not, or a sync of it failed.
    pub fn mark(&self, file: usize) {
        // Stored whatever is there: who looked first might see a mark that a barrier has taken meanwhile.
        if let Some(mark) = self.0.get(file) {
            mark.store(true, SeqCst);
        }
    }

    /// Whether a barrier must wait for the file; what was noted until now is the asker's to sync.
    pub fn take(&self, file: usize) -> bool {
        (self.0.get(file)).is_none_or(|mark| mark.swap(false, SeqCst))
    }
}
