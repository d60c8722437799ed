//! What is read without a lock: the block allocation table, and which sectors of a block the image has.
//!
//! ```text
//!   block ─▶ entry of the table: none, or where the block is
//!         ─▶ whole?  the image has all its sectors, its bitmap need not be looked at
//!         ─▶ slot ─▶ frame with its bitmap
//! ```
//!
//! Entries, marks and bits change from none to some only, and after what they stand for is there. A frame that
//! changes its owner has an odd version meanwhile, and another one afterwards: who read it looks again.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// An entry of a block that is not there, and a slot of one without a frame.
pub(super) const NONE: u32 = u32::MAX;

/// A run of sectors that are all in the image, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) present: bool,
    pub(super) sectors: u64,
}

/// A bitmap in memory. Sector 0 is the highest bit of the first word.
#[derive(Debug, Default)]
pub(super) struct Frame {
    version: AtomicU64,
    block: AtomicU32,
    /// Somebody looked at it since the clock's hand passed.
    recent: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Frame {
    pub(super) fn words(&self) -> &[AtomicU64] {
        self.words.get().map_or(&[], |words| words)
    }

    /// Whether somebody looked at it since this was asked last.
    pub(super) fn was_used(&self) -> bool {
        self.recent.swap(false, Ordering::Relaxed)
    }

    /// The run of sectors from `first` on, up to `end`, which is behind it.
    pub(super) fn run(&self, first: u64, end: u64) -> Run {
        run_in(self.words(), first, end)
    }

    /// Nobody may read it until it is filled. One thread at a time.
    pub(super) fn close(&self) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version | 1, Ordering::Relaxed);
        fence(Ordering::Release);
    }

    /// Makes it the bitmap of `block`, whose bytes are `bytes`. One thread at a time.
    pub(super) fn fill(&self, block: u32, bytes: &[u8], words: usize) {
        self.close();
        let all = self
            .words
            .get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect());
        let chunks = bytes.as_chunks::<8>().0;
        let values = chunks.iter().map(|chunk| u64::from_be_bytes(*chunk));
        for (word, value) in all.iter().zip(values.chain(std::iter::repeat(0))) {
            word.store(value, Ordering::Relaxed);
        }
        self.block.store(block, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Notes that the image has sectors `first` to before `end`. Their data are down.
    pub(super) fn set(&self, first: u64, end: u64) {
        let mut at = first;
        while at < end {
            let last = end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (at % 64)) & (u64::MAX << (63 - (last - 1) % 64));
            if let Some(word) = self.words().get((at / 64) as usize) {
                word.fetch_or(mask, Ordering::Release);
            }
            at = last;
        }
    }

    /// Appends the bitmap as it is on disk: `len` bytes.
    pub(super) fn put(&self, len: usize, out: &mut Vec<u8>) {
        let end = out.len() + len;
        for word in self.words() {
            out.extend_from_slice(&word.load(Ordering::Acquire).to_be_bytes());
        }
        out.resize(end, 0);
    }
}

/// The run of sectors from `first` on, up to `end`, in a bitmap.
fn run_in(words: &[AtomicU64], first: u64, end: u64) -> Run {
    let word = |index: u64| {
        words
            .get(index as usize)
            .map_or(0, |w| w.load(Ordering::Acquire))
    };
    let present = word(first / 64) << (first % 64) >> 63 == 1;
    let mut at = first;
    while at < end {
        let skip = at % 64;
        let bits = word(at / 64);
        // Equal bits as zeros.
        let bits = (if present { !bits } else { bits }) << skip;
        let same = u64::from(bits.leading_zeros()).min(64 - skip);
        at += same;
        if same < 64 - skip {
            break;
        }
    }
    Run {
        present,
        sectors: at.min(end) - first,
    }
}

/// The tables of an open image.
#[derive(Debug)]
pub(super) struct Tables {
    entries: Vec<AtomicU32>,
    whole: Vec<AtomicU64>,
    slots: Vec<AtomicU32>,
    pub(super) frames: Vec<Frame>,
}

impl Tables {
    /// Tables with these entries, and room for so many bitmaps.
    pub(super) fn new(entries: Vec<u32>, frames: usize) -> Self {
        let blocks = entries.len();
        Self {
            entries: entries.into_iter().map(AtomicU32::new).collect(),
            whole: (0..blocks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            slots: (0..blocks).map(|_| AtomicU32::new(NONE)).collect(),
            frames: (0..frames).map(|_| Frame::default()).collect(),
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

    pub(super) fn slot(&self, block: u64) -> Option<u32> {
        let slot = self.slots.get(block as usize)?.load(Ordering::Acquire);
        (slot != NONE).then_some(slot)
    }

    pub(super) fn set_slot(&self, block: u64, slot: u32) {
        if let Some(cell) = self.slots.get(block as usize) {
            cell.store(slot, Ordering::Release);
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
        let frame = self.frames.get(self.slot(block)? as usize)?;
        let version = frame.version.load(Ordering::Acquire);
        if version % 2 == 1 || u64::from(frame.block.load(Ordering::Relaxed)) != block {
            return None;
        }
        let run = frame.run(first, end);
        if !frame.recent.load(Ordering::Relaxed) {
            frame.recent.store(true, Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        (frame.version.load(Ordering::Relaxed) == version).then_some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_is_read_only_when_it_is_there() {
        let tables = Tables::new(vec![7, 9], 1);
        let frame = &tables.frames[0];
        frame.fill(0, &[0xff; 8], 1);
        tables.set_slot(0, 0);
        let present = |block| tables.run(block, 0, 64).map(|run| run.present);
        assert_eq!(present(0), Some(true));
        // It is to be that of block 1, which is being loaded.
        tables.set_slot(0, NONE);
        frame.close();
        tables.set_slot(1, 0);
        assert_eq!((present(0), present(1)), (None, None));
        frame.fill(1, &[0; 8], 1);
        assert_eq!(present(1), Some(false));
        // Whoever still holds the old slot sees that it is another's.
        tables.set_slot(0, 0);
        assert_eq!(present(0), None);
    }

    #[test]
    fn bits_are_set_and_found_in_runs() {
        let frame = Frame::default();
        frame.fill(3, &[], 4);
        for (first, end) in [(5, 6), (60, 70), (128, 200)] {
            frame.set(first, end);
        }
        let mut runs = Vec::new();
        let mut at = 0;
        while at < 256 {
            let run = frame.run(at, 256);
            runs.push((run.present, run.sectors));
            at += run.sectors;
        }
        let want = [
            (false, 5),
            (true, 1),
            (false, 54),
            (true, 10),
            (false, 58),
            (true, 72),
            (false, 56),
        ];
        assert_eq!(runs, want);
        let mut bytes = Vec::new();
        frame.put(512, &mut bytes);
        assert_eq!(
            (bytes.len(), bytes[0], bytes[7], bytes[8]),
            (512, 4, 0x0f, 0xfc)
        );
        let again = Frame::default();
        again.fill(3, &bytes, 4);
        assert_eq!(again.run(60, 256), frame.run(60, 256));
    }
}
