//! What can be read without the lock: the L1 table, the slots of L2 slices and the frames.
//!
//! ```text
//!   guest cluster ─▶ L1 entry (table there?) ─▶ slot of the slice ─▶ frame ─▶ L2 entry
//! ```
//!
//! Frames are evicted and used again while readers look at them, so each carries a *tag*: the slice
//! it holds, and a count that grows with every change of owner. A reader takes the tag, reads the
//! entries, and takes the tag again; when both are the same the entries were that slice's.
//! Everything is an atomic, so the race is only a wrong answer that is thrown away. Writers
//! hold the image's lock. The same tag guards changes of entries that take more than one word.

use super::entry::Geometry;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// Slots per lazily made part of the slot table.
const CHUNK_BITS: u32 = 10;
/// Low bits of a tag that hold what the frame holds, plus one; zero for nothing to be read.
/// (`SLOTS_MAX` is 2^24.)
const TAG_SLICE_BITS: u32 = 28;

/// A buffer for one slice of an L2 table or refcount block.
#[derive(Debug, Default)]
pub(super) struct Frame {
    tag: AtomicU64,
    /// Looked at since the clock's hand came by.
    pub(super) used: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Frame {
    /// Its words; empty when it was never used.
    #[inline]
    pub(super) fn words(&self) -> &[AtomicU64] {
        self.words.get().map_or(&[], |w| w)
    }

    /// Makes its memory.
    pub(super) fn make(&self, words: usize) {
        self.words
            .get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect());
    }

    /// Marks it as in change: readers throw away what they read from here on.
    pub(super) fn close(&self) {
        let tag = self.tag.load(Ordering::Relaxed);
        let next = ((tag >> TAG_SLICE_BITS) + 1) << TAG_SLICE_BITS;
        self.tag.store(next, Ordering::Relaxed);
        // The words' stores that follow must not be seen before the tag's.
        fence(Ordering::Release);
    }

    /// Opens it to readers of L2 slice `slice`. The words were stored before.
    fn open(&self, slice: u64) {
        let tag = self.tag.load(Ordering::Relaxed);
        self.tag.store(tag | (slice + 1), Ordering::Release);
    }
}

impl Frame {
    /// Changes words so that no reader believes to have seen some of them before and some after.
    pub(super) fn change(&self, change: impl FnOnce(&[AtomicU64])) {
        let slice = self.tag.load(Ordering::Relaxed) & ((1 << TAG_SLICE_BITS) - 1);
        self.close();
        change(self.words());
        let tag = self.tag.load(Ordering::Relaxed);
        self.tag.store(tag | slice, Ordering::Release);
    }
}

#[derive(Debug)]
pub(super) struct Tables {
    /// Entries of the L1 table, padded to whole sectors; with the marks of fresh tables.
    pub(super) l1: Box<[AtomicU64]>,
    slots: Box<[OnceLock<Box<[AtomicU32]>>]>,
    pub(super) frames: Box<[Frame]>,
}

impl Tables {
    pub(super) fn new(geometry: &Geometry, l1: Box<[AtomicU64]>, frames: usize) -> Self {
        let slots = geometry.l2_slices().max(1);
        let chunks = slots.div_ceil(1 << CHUNK_BITS) as usize;
        Self {
            l1,
            slots: (0..chunks).map(|_| OnceLock::new()).collect(),
            frames: (0..frames).map(|_| Frame::default()).collect(),
        }
    }

    /// The frame that holds L2 slice `slice`.
    #[inline]
    pub(super) fn slot(&self, slice: u64) -> Option<u32> {
        let chunk = self.slots.get((slice >> CHUNK_BITS) as usize)?.get()?;
        let slot = chunk.get(slice as usize & ((1 << CHUNK_BITS) - 1))?;
        slot.load(Ordering::Acquire).checked_sub(1)
    }

    fn set_slot(&self, slice: u64, value: u32) {
        let Some(chunk) = self.slots.get((slice >> CHUNK_BITS) as usize) else {
            return;
        };
        let chunk = chunk.get_or_init(|| (0..1 << CHUNK_BITS).map(|_| AtomicU32::new(0)).collect());
        if let Some(slot) = chunk.get(slice as usize & ((1 << CHUNK_BITS) - 1)) {
            slot.store(value, Ordering::Release);
        }
    }

    /// Shows `frame`, whose words are in place, to readers of `slice`.
    pub(super) fn publish(&self, slice: u64, frame: u32) {
        if let Some(f) = self.frames.get(frame as usize) {
            f.open(slice);
            f.used.store(true, Ordering::Relaxed);
        }
        self.set_slot(slice, frame + 1);
    }

    /// Takes `slice` away from readers. The frame is to be closed before it changes.
    pub(super) fn hide(&self, slice: u64) {
        self.set_slot(slice, 0);
    }

    /// Words of `frame`; empty for a number that is none.
    #[inline]
    pub(super) fn words(&self, frame: u32) -> &[AtomicU64] {
        self.frames.get(frame as usize).map_or(&[], Frame::words)
    }

    /// Lets `look` read the entries of L2 slice `slice`. `None` when it is not in memory (or changed its
    /// place too often): ask with the lock held. `look` may run more than once.
    #[inline]
    pub(super) fn read<R>(&self, slice: u64, mut look: impl FnMut(&[AtomicU64]) -> R) -> Option<R> {
        for _ in 0..4 {
            let frame = self.frames.get(self.slot(slice)? as usize)?;
            let tag = frame.tag.load(Ordering::Acquire);
            if tag & ((1 << TAG_SLICE_BITS) - 1) != slice + 1 {
                continue;
            }
            let answer = look(frame.words());
            // Pairs with the fence of `close`.
            fence(Ordering::Acquire);
            if frame.tag.load(Ordering::Relaxed) == tag {
                // A plain load keeps the line shared between threads.
                if !frame.used.load(Ordering::Relaxed) {
                    frame.used.store(true, Ordering::Relaxed);
                }
                return Some(answer);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> Tables {
        let geometry = Geometry {
            cluster_bits: 12,
            slice_bits: 12,
            refcount_order: 4,
            version: 3,
            size: 1 << 30,
            has_backing: false,
            unit_bits: 12,
        };
        let tables = Tables::new(&geometry, Box::new([]), 2);
        for frame in &tables.frames {
            frame.make(geometry.slice_words());
        }
        tables
    }

    /// What the cache does when `frame` gets another slice.
    fn replace(tables: &Tables, frame: u32, old: Option<u64>, new: u64) {
        if let Some(old) = old {
            tables.hide(old);
        }
        tables.frames[frame as usize].close();
        for word in tables.words(frame) {
            word.store(new, Ordering::Relaxed);
        }
        tables.publish(new, frame);
    }

    #[test]
    fn a_reader_never_believes_a_frame_that_changed_under_it() {
        let tables = tables();
        let first = |words: &[AtomicU64]| words[0].load(Ordering::Relaxed);
        assert_eq!(tables.read(7, first), None);
        replace(&tables, 0, None, 7);
        assert_eq!(tables.read(7, first), Some(7));
        // It leaves in the middle of the read.
        let mut runs = 0;
        let answer = tables.read(7, |words| {
            runs += 1;
            replace(&tables, 0, Some(7), 9);
            first(words)
        });
        assert_eq!((answer, runs), (None, 1));
        // It leaves and comes back to the same frame: the words may have been another's meanwhile.
        let mut runs = 0;
        let answer = tables.read(9, |words| {
            runs += 1;
            if runs == 1 {
                replace(&tables, 0, Some(9), 7);
                let seen = first(words);
                replace(&tables, 0, Some(7), 9);
                return seen;
            }
            first(words)
        });
        assert_eq!((answer, runs), (Some(9), 2));
        // It moves to the other frame.
        let mut runs = 0;
        let answer = tables.read(9, |words| {
            runs += 1;
            if runs == 1 {
                replace(&tables, 0, Some(9), 7);
                replace(&tables, 1, None, 9);
            }
            first(words)
        });
        assert_eq!((answer, runs), (Some(9), 2));
        // A frame that is never at rest is given up on.
        let answer = tables.read(9, |_| replace(&tables, 1, Some(9), 9));
        assert_eq!(answer, None);
    }

    #[test]
    fn a_change_of_two_words_is_seen_whole_or_not_at_all() {
        let tables = tables();
        replace(&tables, 0, None, 7);
        let both = |words: &[AtomicU64]| [0, 1].map(|i| words[i].load(Ordering::Relaxed));
        let mut runs = 0;
        let answer = tables.read(7, |words| {
            runs += 1;
            let first = words[0].load(Ordering::Relaxed);
            if runs == 1 {
                tables.frames[0].change(|words| {
                    for word in &words[..2] {
                        word.store(9, Ordering::Relaxed);
                    }
                    // In the middle of it there is nothing to be read.
                    assert_eq!(tables.read(7, both), None);
                });
            }
            [first, words[1].load(Ordering::Relaxed)]
        });
        assert_eq!((answer, runs), (Some([9, 9]), 2));
    }

    #[test]
    fn slices_behind_the_disk_have_no_slot() {
        let tables = tables();
        tables.set_slot(1 << 40, 1);
        assert_eq!(tables.slot(1 << 40), None);
    }
}
