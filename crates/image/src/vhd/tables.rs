//! What is read without a lock: the block allocation table, and which sectors of a block the image has.
//!
//! ```text
//!   block ─▶ entry of the table: none, or where the block is
//!         ─▶ whole?  the image has all its sectors, its bitmap need not be looked at
//!         ─▶ its bitmap (see `crate::metadata::bitmaps`)
//! ```
//!
//! Entries and marks change from none to some only, and after what they stand for is there.

use crate::metadata::bitmaps::{Bitmaps, Order, Run};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// An entry of a block that is not there.
pub(super) const NONE: u32 = u32::MAX;

/// The tables of an open image.
#[derive(Debug)]
pub(super) struct Tables {
    entries: Vec<AtomicU32>,
    whole: Vec<AtomicU64>,
    pub(super) bitmaps: Bitmaps,
}

impl Tables {
    /// Tables with these entries, and room for so many bitmaps of up to `bits`.
    pub(super) fn new(entries: Vec<u32>, frames: usize, bits: u64) -> Self {
        let blocks = entries.len();
        Self {
            entries: entries.into_iter().map(AtomicU32::new).collect(),
            whole: (0..blocks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            bitmaps: Bitmaps::new(blocks as u64, frames, bits, Order::HighFirst),
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The first sector of the block in the file, where its bitmap is. `None` for one that is not there.
    #[inline]
    pub(super) fn entry(&self, block: u64) -> Option<u32> {
        let entry = self.entries.get(block as usize)?.load(Ordering::Acquire);
        (entry != NONE).then_some(entry)
    }

    pub(super) fn set_entry(&self, block: u64, entry: u32) {
        if let Some(cell) = self.entries.get(block as usize) {
            cell.store(entry, Ordering::Release);
        }
    }

    /// The entries from `first` on, as they are on disk, in a sector of the table.
    pub(super) fn put_sector(&self, first: u64, out: &mut Vec<u8>) {
        let end = out.len() + 512;
        for entry in self.entries.iter().skip(first as usize).take(128) {
            out.extend_from_slice(&entry.load(Ordering::Acquire).to_be_bytes());
        }
        out.resize(end, 0xff);
    }

    #[inline]
    pub(super) fn is_whole(&self, block: u64) -> bool {
        let word = self.whole.get((block / 64) as usize);
        word.is_some_and(|w| w.load(Ordering::Acquire) >> (block % 64) & 1 == 1)
    }

    /// The image has all sectors of the block.
    pub(super) fn set_whole(&self, block: u64) {
        if let Some(word) = self.whole.get((block / 64) as usize) {
            word.fetch_or(1 << (block % 64), Ordering::Release);
        }
    }

    /// What the image has of a block that is there, from sector `first` on and up to `end`. `None` when its bitmap is
    /// not in memory.
    #[inline]
    pub(super) fn run(&self, block: u64, first: u64, end: u64) -> Option<Run> {
        if self.is_whole(block) {
            return Some(Run {
                present: true,
                sectors: end - first,
            });
        }
        self.bitmaps.run(block, first, end)
    }
}
