//! A place for an entry that one thread writes while others read.
//!
//! The first word counts: odd while the entry is written, even when it is whole. A reader that finds
//! the same even number before and after reading the others has what was written under that number. All words are
//! atomic, so a torn entry is noticed rather than undefined; on x86 all of this is plain loads and stores.

use crate::entry::WORDS;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
    fence,
};
use zerocopy::FromZeros;

/// A cache line: sequence number and words.
#[derive(Debug, FromZeros)]
#[repr(C, align(64))]
pub(crate) struct Cell {
    sequence: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Cell {
    /// So many empty ones. They take memory when they are first written.
    ///
    /// # Panics
    ///
    /// When there is no memory: as any allocation.
    pub fn many(count: usize) -> Box<[Cell]> {
        <[Cell]>::new_box_zeroed_with_elems(count).expect("memory for a ring")
    }

    /// Writes what will be read as number `version`, 1 to 2^62. One thread only.
    #[inline]
    pub fn write(&self, version: u64, words: &[u64; WORDS]) {
        self.sequence.store(version * 2 - 1, Relaxed);
        // No word is seen before the odd number is.
        fence(Release);
        let [a, b, c, d, e, f, g] = &self.words;
        a.store(words[0], Relaxed);
        b.store(words[1], Relaxed);
        c.store(words[2], Relaxed);
        d.store(words[3], Relaxed);
        e.store(words[4], Relaxed);
        f.store(words[5], Relaxed);
        g.store(words[6], Relaxed);
        self.sequence.store(version * 2, Release);
    }

    /// What is there and its number; `None` while it is written, or when nothing was yet.
    pub fn read(&self) -> Option<(u64, [u64; WORDS])> {
        let before = self.sequence.load(Acquire);
        if before == 0 || before % 2 == 1 {
            return None;
        }
        let words = std::array::from_fn(|i| self.words[i].load(Relaxed));
        // The words are read before the number is read again.
        fence(Acquire);
        (self.sequence.load(Relaxed) == before).then_some((before / 2, words))
    }
}
