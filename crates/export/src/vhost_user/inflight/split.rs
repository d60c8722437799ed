//! The region of a split ring. Unsafe code: shared memory.
//!
//! ```text
//!   features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16
//!   desc_num × { inflight u8, pad[5], next u16, counter u64 }
//! ```
//!
//! A batch of answers is linked from `last_batch_head` before `used.idx` moves, and its flags are
//! cleared after. If `used_idx` here is not the ring's, the crash came in between, and the last
//! batch was answered although its flags say otherwise.

use super::{File, VERSION, region_bytes};
use crate::vhost_user::memory::Region;
use block::Result;
use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering},
};

const HEADER_BYTES: u64 = 16;
const ENTRY_BYTES: u64 = 16;

const VERSION_AT: usize = 8;
const COUNT_AT: usize = 10;
const BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;

/// Bytes of the region of one queue of `size` entries.
pub(super) fn queue_bytes(size: u16) -> u64 {
    region_bytes(HEADER_BYTES, ENTRY_BYTES, size)
}

/// The part of the file that belongs to one queue.
pub(in crate::vhost_user) struct Split {
    /// Keeps the mapping.
    _region: Arc<Region>,
    base: *mut u8,
    size: u16,
    counter: u64,
    /// Answered since the last publication. As long as the ring at most.
    batch: Vec<u16>,
}

// SAFETY: `base` points into shared memory that `_region` keeps mapped; only atomics go there.
unsafe impl Send for Split {}

impl Split {
    /// The part of the file that it says.
    ///
    /// # Errors
    ///
    /// When the file is too small for that queue.
    pub(in crate::vhost_user) fn new(file: File) -> Result<Self> {
        let base = file.part(queue_bytes(file.size))?;
        Ok(Self {
            _region: file.region,
            base,
            size: file.size,
            counter: 0,
            batch: Vec::with_capacity(usize::from(file.size)),
        })
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        // SAFETY: `new` checked that header and entries are mapped and aligned to 64 bytes;
        // callers pass even offsets within. The mapping lives as long as `self`.
        unsafe { AtomicU16::from_ptr(self.base.wrapping_add(at).cast()) }
    }

    fn entry(&self, head: u16) -> usize {
        HEADER_BYTES as usize + usize::from(head) * ENTRY_BYTES as usize
    }

    fn flag(&self, head: u16) -> &AtomicU8 {
        // SAFETY: as in `word`; callers pass heads below `size`.
        unsafe { AtomicU8::from_ptr(self.base.wrapping_add(self.entry(head))) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.word(self.entry(head) + 6)
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        let at = self.entry(head) + 8;
        // SAFETY: as in `flag`; entries are aligned to 16 bytes.
        unsafe { AtomicU64::from_ptr(self.base.wrapping_add(at).cast()) }
    }

    /// What the last server left: the heads that it took and did not answer, oldest first.
    /// `used_idx` is the ring's.
    pub(in crate::vhost_user) fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        let fresh = self.word(VERSION_AT).load(Ordering::Relaxed) != VERSION
            || self.word(COUNT_AT).load(Ordering::Relaxed) != self.size;
        if fresh {
            for head in 0..self.size {
                self.flag(head).store(0, Ordering::Relaxed);
            }
            self.word(COUNT_AT).store(self.size, Ordering::Relaxed);
            self.word(VERSION_AT).store(VERSION, Ordering::Release);
        } else {
            let noted = self.word(USED_IDX_AT).load(Ordering::Relaxed);
            let mut head = self.word(BATCH_HEAD_AT).load(Ordering::Relaxed);
            for _ in 0..used_idx.wrapping_sub(noted).min(self.size) {
                if head >= self.size {
                    break;
                }
                self.flag(head).store(0, Ordering::Relaxed);
                head = self.next(head).load(Ordering::Relaxed);
            }
        }
        self.word(USED_IDX_AT).store(used_idx, Ordering::Release);
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.flag(*head).load(Ordering::Relaxed) == 1)
            .map(|head| (self.counter_of(head).load(Ordering::Relaxed), head))
            .collect();
        heads.sort_unstable();
        self.counter = heads
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| head).collect()
    }

    /// The chain at `head` was taken from the available ring.
    #[inline]
    pub(in crate::vhost_user) fn take(&mut self, head: u16) {
        if head >= self.size {
            return;
        }
        self.counter_of(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.flag(head).store(1, Ordering::Release);
    }

    /// The chain at `head` is in the used ring, which is not published yet.
    #[inline]
    pub(in crate::vhost_user) fn done(&mut self, head: u16) {
        if head >= self.size || self.batch.len() >= usize::from(self.size) {
            return;
        }
        let last = self.word(BATCH_HEAD_AT).load(Ordering::Relaxed);
        self.next(head).store(last, Ordering::Relaxed);
        self.word(BATCH_HEAD_AT).store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// The used ring was published up to `used_idx`.
    #[inline]
    pub(in crate::vhost_user) fn published(&mut self, used_idx: u16) {
        while let Some(head) = self.batch.pop() {
            self.flag(head).store(0, Ordering::Release);
        }
        self.word(USED_IDX_AT).store(used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::memory::tests::region;

    fn file() -> Arc<Region> {
        region(0, 0, 0x1000)
    }

    fn part(region: Arc<Region>, index: usize) -> Result<Split> {
        Split::new(File {
            region,
            index,
            size: 8,
        })
    }

    #[test]
    fn what_was_not_answered_comes_back_in_order() {
        let file = file();
        let mut first = part(file.clone(), 1).unwrap();
        assert_eq!(first.recover(5), [0u16; 0]);
        for head in [3, 0, 7, 2] {
            first.take(head);
        }
        first.done(0);
        first.published(6);
        drop(first);
        let mut second = part(file.clone(), 1).unwrap();
        assert_eq!(second.recover(6), [3, 7, 2]);
        // The count goes on: what comes now is younger.
        second.take(1);
        let mut third = part(file.clone(), 1).unwrap();
        assert_eq!(third.recover(6), [3, 7, 2, 1]);
        let mut other = part(file, 0).unwrap();
        assert_eq!(other.recover(0), [0u16; 0], "queue 0 is not queue 1");
    }

    #[test]
    fn a_crash_behind_the_publication_repeats_nothing() {
        let file = file();
        let mut first = part(file.clone(), 0).unwrap();
        first.recover(0);
        (0..4).for_each(|head| first.take(head));
        first.done(2);
        first.published(1);
        first.done(3);
        first.done(0);
        // The ring's index moved to 3; the crash came before `published`.
        let mut second = part(file.clone(), 0).unwrap();
        assert_eq!(second.recover(3), [1]);
        // Had it not moved, both would be done again.
        let mut first = part(file.clone(), 0).unwrap();
        first.recover(3);
        first.take(0);
        first.done(0);
        let mut second = part(file, 0).unwrap();
        assert_eq!(second.recover(3), [1, 0]);
    }

    #[test]
    fn garbage_is_bounded() {
        let file = file();
        let mut inflight = part(file.clone(), 0).unwrap();
        inflight.recover(0);
        inflight.word(BATCH_HEAD_AT).store(9, Ordering::Relaxed);
        assert_eq!(inflight.recover(u16::MAX), [0u16; 0]);
        inflight.word(BATCH_HEAD_AT).store(2, Ordering::Relaxed);
        inflight.next(2).store(2, Ordering::Relaxed);
        (0..8).for_each(|head| inflight.flag(head).store(1, Ordering::Relaxed));
        assert_eq!(inflight.recover(7).len(), 7);
        inflight.take(8);
        inflight.done(u16::MAX);
        assert!(part(file.clone(), 40).is_err());
        assert!(part(file, usize::MAX).is_err());
    }
}
