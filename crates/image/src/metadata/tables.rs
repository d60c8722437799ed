//! What can be read without the lock: the L1 table, the slots of L2 slices and the frames.
//!
//! ```text
//!   guest cluster ─▶ L1 entry (table there?) ─▶ slot of the slice ─▶ frame ─▶ L2 entry
//!                                                    │    └─▶ block in a page ─▶ L2 entry
//!                                                    └─▶ nothing allocated
//! ```
//!
//! A frame holds one slice as it is on disk (it may be changed there), or is a *page* of packed slices
//! (see `packed`), which are only read. The slot of a slice says where it is; a slice without any allocated
//! cluster is its slot and nothing else.
//!
//! Frames are evicted and used again while readers look at them, so each carries a *tag*: the slice
//! it holds or that it is a page, and a count that grows with every change of its content's place. A
//! reader takes the tag, reads the entries, and takes the tag again; when both are the same the
//! entries were that slice's. In a page the slot must also be what it was *after* the tag was
//! taken: then the block was there in a page that did not change until the tag was taken again.
//! Everything is an atomic, so the race is only a wrong answer that is thrown away. Writers
//! hold the image's lock. The same tag guards changes of entries that take more than one word.

use super::layout::Layout;
use super::packed::Block;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// Words of a cache line.
const LINE_WORDS: usize = 8;
/// Lines of a block that are fetched ahead.
const LINES_EXPECTED: usize = 5;
/// Slots per lazily made part of the slot table.
const CHUNK_BITS: u32 = 10;
/// Low bits of a tag that hold what the frame holds, plus one; zero for nothing to be read.
/// (`SLOTS_MAX` is 2^24.)
const TAG_SLICE_BITS: u32 = 28;
const TAG_MASK: u64 = (1 << TAG_SLICE_BITS) - 1;
/// The low bits of a page's tag.
const TAG_PAGE: u64 = TAG_MASK;

/// A slot: the slice is in no frame, and none is needed.
const SLOT_EMPTY: u32 = u32::MAX;
/// A slot: the slice is a block of a page.
const SLOT_PACKED: u32 = 1 << 31;
/// Low bits of such a slot: the block's number in its page.
const SLOT_BLOCK_BITS: u32 = 6;
/// Blocks of a page at most.
pub(crate) const PAGE_BLOCKS_MAX: usize = 1 << SLOT_BLOCK_BITS;
/// Frames at most, so that every block of every page has a slot value that is none of the others.
pub(crate) const FRAMES_MAX: u64 = (1 << (31 - SLOT_BLOCK_BITS)) - 1;

/// Where a slice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Not in memory.
    Absent,
    /// All of its entries are unallocated.
    Empty,
    /// In this frame.
    Frame(u32),
    /// Block `block` of the page in frame `page`.
    Packed { page: u32, block: u32 },
}

impl Slot {
    #[inline]
    fn of(raw: u32) -> Self {
        match raw {
            0 => Slot::Absent,
            SLOT_EMPTY => Slot::Empty,
            _ if raw & SLOT_PACKED != 0 => Slot::Packed {
                page: (raw & !SLOT_PACKED) >> SLOT_BLOCK_BITS,
                block: raw & ((1 << SLOT_BLOCK_BITS) - 1),
            },
            _ => Slot::Frame(raw - 1),
        }
    }

    fn raw(self) -> u32 {
        match self {
            Slot::Absent => 0,
            Slot::Empty => SLOT_EMPTY,
            Slot::Frame(frame) => frame + 1,
            Slot::Packed { page, block } => SLOT_PACKED | page << SLOT_BLOCK_BITS | block,
        }
    }
}

/// The entries of a slice, in whichever form it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Entries<'a> {
    /// All unallocated; so many.
    Empty(usize),
    /// As on disk.
    Words(&'a [AtomicU64]),
    /// Packed.
    Packed(Block<'a>),
}

impl Entries<'_> {
    /// Entry `at`, and for how many it goes on: as unallocated, as plain zeros, or as clusters in
    /// order on the host. At least 1, and counted up to `most`. Zero behind the slice's end.
    #[inline]
    pub(crate) fn run(&self, at: usize, most: usize) -> (u64, usize) {
        match self {
            Entries::Words(words) => words
                .get(at)
                .map_or((0, 0), |w| (w.load(Ordering::Relaxed), 1)),
            Entries::Packed(block) if at < block.count => block.run(at, most),
            Entries::Packed(_) => (0, 0),
            Entries::Empty(count) => (0, count.saturating_sub(at).min(most)),
        }
    }

    /// The two words of extended entry `at`.
    #[inline]
    pub(crate) fn pair(&self, at: usize) -> (u64, u64) {
        match self {
            Entries::Words(words) => match words.get(2 * at..2 * at + 2) {
                Some([raw, bitmap]) => {
                    (raw.load(Ordering::Relaxed), bitmap.load(Ordering::Relaxed))
                }
                _ => (0, 0),
            },
            Entries::Packed(block) => block.pair(at),
            Entries::Empty(_) => (0, 0),
        }
    }
}

/// A buffer for one slice of an L2 table or refcount block.
#[derive(Debug, Default)]
pub(crate) struct Frame {
    tag: AtomicU64,
    /// Looked at since the clock's hand came by.
    pub(crate) used: AtomicBool,
    /// Words of a block, when it is a page.
    block_words: AtomicU32,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Frame {
    /// Its words; empty when it was never used.
    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        self.words.get().map_or(&[], |w| w)
    }

    /// Makes its memory.
    pub(crate) fn make(&self, words: usize) {
        self.words
            .get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect());
    }

    /// Marks it as in change: readers throw away what they read from here on.
    pub(crate) fn close(&self) {
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

    /// Divides it into blocks of so many words. It is closed.
    pub(crate) fn divide(&self, block_words: u32) {
        self.block_words.store(block_words, Ordering::Relaxed);
    }

    /// Opens it to readers of the slices that are packed in it. The words were stored before.
    pub(crate) fn open_page(&self) {
        let tag = self.tag.load(Ordering::Relaxed);
        self.tag.store(tag | TAG_PAGE, Ordering::Release);
    }

    /// The words of block `block` of a page.
    #[inline]
    fn block(&self, block: u32) -> &[AtomicU64] {
        // While it changes it may be that of another page; what is outside is no words.
        let len = self.block_words.load(Ordering::Relaxed) as usize;
        let first = block as usize * len;
        self.words().get(first..first + len).unwrap_or_default()
    }

    /// Notes a use for the clock. A plain load keeps the line shared between threads.
    #[inline]
    pub(crate) fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }
}

impl Frame {
    /// Changes words so that no reader believes to have seen some of them before and some after.
    pub(crate) fn change(&self, change: impl FnOnce(&[AtomicU64])) {
        let slice = self.tag.load(Ordering::Relaxed) & ((1 << TAG_SLICE_BITS) - 1);
        self.close();
        change(self.words());
        let tag = self.tag.load(Ordering::Relaxed);
        self.tag.store(tag | slice, Ordering::Release);
    }
}

#[derive(Debug)]
pub(crate) struct Tables {
    /// Entries of the L1 table, padded to whole sectors; with the marks of fresh tables.
    pub(crate) l1: Box<[AtomicU64]>,
    slots: Box<[OnceLock<Box<[AtomicU32]>>]>,
    pub(crate) frames: Box<[Frame]>,
    slice_entries: usize,
    cluster_bits: u32,
}

impl Tables {
    pub(crate) fn new(geometry: &Layout, l1: Box<[AtomicU64]>, frames: usize) -> Self {
        let slots = geometry.l2_slices().max(1);
        let chunks = slots.div_ceil(1 << CHUNK_BITS) as usize;
        Self {
            l1,
            slots: (0..chunks).map(|_| OnceLock::new()).collect(),
            frames: (0..frames).map(|_| Frame::default()).collect(),
            slice_entries: geometry.slice_entries(),
            cluster_bits: geometry.cluster_bits,
        }
    }

    #[inline]
    fn raw_slot(&self, slice: u64) -> u32 {
        let chunk = self.slots.get((slice >> CHUNK_BITS) as usize);
        let chunk = chunk.and_then(OnceLock::get);
        let slot = chunk.and_then(|c| c.get(slice as usize & ((1 << CHUNK_BITS) - 1)));
        slot.map_or(0, |s| s.load(Ordering::Acquire))
    }

    /// Where L2 slice `slice` is.
    #[inline]
    pub(crate) fn slot(&self, slice: u64) -> Slot {
        Slot::of(self.raw_slot(slice))
    }

    /// Says where `slice` is. What it was in is to be closed before it changes.
    pub(crate) fn set_slot(&self, slice: u64, slot: Slot) {
        let Some(chunk) = self.slots.get((slice >> CHUNK_BITS) as usize) else {
            return;
        };
        let chunk = chunk.get_or_init(|| (0..1 << CHUNK_BITS).map(|_| AtomicU32::new(0)).collect());
        if let Some(place) = chunk.get(slice as usize & ((1 << CHUNK_BITS) - 1)) {
            place.store(slot.raw(), Ordering::Release);
        }
    }

    /// Shows `frame`, whose words are in place, to readers of `slice`.
    pub(crate) fn publish(&self, slice: u64, frame: u32) {
        if let Some(f) = self.frames.get(frame as usize) {
            f.open(slice);
            f.used.store(true, Ordering::Relaxed);
        }
        self.set_slot(slice, Slot::Frame(frame));
    }

    /// Words of `frame`; empty for a number that is none.
    #[inline]
    pub(crate) fn words(&self, frame: u32) -> &[AtomicU64] {
        self.frames.get(frame as usize).map_or(&[], Frame::words)
    }

    /// Words of a block of the page in frame `page`.
    pub(crate) fn block(&self, page: u32, block: u32) -> &[AtomicU64] {
        self.frames
            .get(page as usize)
            .map_or(&[], |f| f.block(block))
    }

    /// Lets `look` read the entries of L2 slice `slice`. `None` when it is not in memory (or changed its
    /// place too often): ask with the lock held. `look` may run more than once.
    #[inline]
    pub(crate) fn read<R>(&self, slice: u64, mut look: impl FnMut(Entries<'_>) -> R) -> Option<R> {
        for _ in 0..4 {
            let raw = self.raw_slot(slice);
            let (frame, block) = match Slot::of(raw) {
                Slot::Absent => return None,
                Slot::Empty => return Some(look(Entries::Empty(self.slice_entries))),
                Slot::Frame(frame) => (frame, None),
                Slot::Packed { page, block } => (page, Some(block)),
            };
            let frame = self.frames.get(frame as usize)?;
            let tag = frame.tag.load(Ordering::Acquire);
            let answer = match block {
                None if tag & TAG_MASK == slice + 1 => look(Entries::Words(frame.words())),
                // The block was there before the tag was taken; was it still?
                Some(block) if tag & TAG_MASK == TAG_PAGE && self.raw_slot(slice) == raw => {
                    look(Entries::Packed(self.packed(frame.block(block))))
                }
                _ => continue,
            };
            // Pairs with the fence of `close`.
            fence(Ordering::Acquire);
            if frame.tag.load(Ordering::Relaxed) == tag {
                frame.touch();
                return Some(answer);
            }
        }
        None
    }

    /// Has the processor fetch what [`read`](Self::read) of entry `at` of `slice` will look at.
    #[inline]
    pub(crate) fn expect(&self, slice: u64, at: usize) {
        let (frame, block) = match self.slot(slice) {
            Slot::Absent | Slot::Empty => return,
            Slot::Frame(frame) => (frame, None),
            Slot::Packed { page, block } => (page, Some(block)),
        };
        let Some(frame) = self.frames.get(frame as usize) else {
            return;
        };
        let Some(block) = block else {
            let words = frame.words();
            // Extended entries are of two words.
            let words_each = words.len() / self.slice_entries.max(1);
            return words
                .get(at * words_each)
                .map_or((), |w| block::prefetch(w));
        };
        // The fields of a scattered slice follow its start bits, and are a few lines at most.
        let lines = frame.block(block).chunks(LINE_WORDS).take(LINES_EXPECTED);
        for line in lines.filter_map(<[_]>::first) {
            block::prefetch(line);
        }
    }

    /// The entries of a slice, for whoever holds the lock. `None` when it is not in memory.
    pub(crate) fn entries(&self, slice: u64) -> Option<Entries<'_>> {
        Some(match self.slot(slice) {
            Slot::Absent => return None,
            Slot::Empty => Entries::Empty(self.slice_entries),
            Slot::Frame(frame) => Entries::Words(self.words(frame)),
            Slot::Packed { page, block } => Entries::Packed(self.packed(self.block(page, block))),
        })
    }

    #[inline]
    fn packed<'a>(&self, words: &'a [AtomicU64]) -> Block<'a> {
        Block {
            words,
            count: self.slice_entries,
            cluster_bits: self.cluster_bits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packed::{Packer, Shape};
    use super::*;

    fn geometry() -> Layout {
        Layout::new(1 << 30, 12, 12, false)
    }

    fn tables() -> Tables {
        let geometry = geometry();
        let tables = Tables::new(&geometry, Box::new([]), 2);
        for frame in &tables.frames {
            frame.make(geometry.slice_words());
        }
        tables
    }

    /// What the cache does when `frame` gets another slice.
    fn replace(tables: &Tables, frame: u32, old: Option<u64>, new: u64) {
        if let Some(old) = old {
            tables.set_slot(old, Slot::Absent);
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
        let first = |entries: Entries<'_>| entries.run(0, 1).0;
        assert_eq!(tables.read(7, first), None);
        replace(&tables, 0, None, 7);
        assert_eq!(tables.read(7, first), Some(7));
        // It leaves in the middle of the read.
        let mut runs = 0;
        let answer = tables.read(7, |entries| {
            runs += 1;
            replace(&tables, 0, Some(7), 9);
            first(entries)
        });
        assert_eq!((answer, runs), (None, 1));
        // It leaves and comes back to the same frame: the words may have been another's meanwhile.
        let mut runs = 0;
        let answer = tables.read(9, |entries| {
            runs += 1;
            if runs == 1 {
                replace(&tables, 0, Some(9), 7);
                let seen = first(entries);
                replace(&tables, 0, Some(7), 9);
                return seen;
            }
            first(entries)
        });
        assert_eq!((answer, runs), (Some(9), 2));
        // It moves to the other frame.
        let mut runs = 0;
        let answer = tables.read(9, |entries| {
            runs += 1;
            if runs == 1 {
                replace(&tables, 0, Some(9), 7);
                replace(&tables, 1, None, 9);
            }
            first(entries)
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
        let both = |entries: Entries<'_>| [0, 1].map(|i| entries.run(i, 1).0);
        let mut runs = 0;
        let answer = tables.read(7, |entries| {
            runs += 1;
            let first = entries.run(0, 1).0;
            if runs == 1 {
                tables.frames[0].change(|words| {
                    for word in &words[..2] {
                        word.store(9, Ordering::Relaxed);
                    }
                    // In the middle of it there is nothing to be read.
                    assert_eq!(tables.read(7, both), None);
                });
            }
            [first, entries.run(1, 1).0]
        });
        assert_eq!((answer, runs), (Some([9, 9]), 2));
    }

    /// What the cache does when block 0 of the page in `frame` becomes `slice`, all of whose entries lead to
    /// clusters from `cluster` on.
    fn repack(tables: &Tables, geometry: &Layout, frame: u32, slice: u64, cluster: u64) {
        let page = &tables.frames[frame as usize];
        let mut packer = Packer::default();
        let shape = packer.pack(slice, geometry, 100, |at| (cluster + at as u64) << 12);
        let Shape::Block(words) = shape else {
            panic!("a single run is small");
        };
        page.close();
        page.divide(100);
        for (to, from) in page.words().iter().zip(words) {
            to.store(*from, Ordering::Relaxed);
        }
        page.open_page();
        let slot = Slot::Packed {
            page: frame,
            block: 0,
        };
        tables.set_slot(slice, slot);
    }

    #[test]
    fn a_reader_never_believes_a_page_that_changed_under_it() {
        let (tables, geometry) = (tables(), geometry());
        let third = |entries: Entries<'_>| entries.run(3, 1).0 >> 12;
        repack(&tables, &geometry, 0, 7, 1000);
        assert_eq!(tables.read(7, third), Some(1003));
        // Its block is given to another slice in the middle of the read.
        let mut runs = 0;
        let answer = tables.read(7, |entries| {
            runs += 1;
            tables.set_slot(7, Slot::Absent);
            repack(&tables, &geometry, 0, 9, 2000);
            third(entries)
        });
        assert_eq!((answer, runs), (None, 1));
        // And comes back to the same place with other entries.
        let mut runs = 0;
        let answer = tables.read(9, |entries| {
            runs += 1;
            if runs == 1 {
                repack(&tables, &geometry, 0, 9, 3000);
            }
            third(entries)
        });
        assert_eq!((answer, runs), (Some(3003), 2));
        // The page becomes a frame of another slice.
        let answer = tables.read(9, |entries| {
            tables.set_slot(9, Slot::Absent);
            replace(&tables, 0, None, 7);
            third(entries)
        });
        assert_eq!(answer, None);
        // A slot that leads to a page's place when there is a slice in the frame is not believed.
        let slot = Slot::Packed { page: 0, block: 0 };
        tables.set_slot(9, slot);
        assert_eq!(tables.read(9, third), None);
    }

    #[test]
    fn slots_tell_their_states_apart() {
        let last = (FRAMES_MAX - 1) as u32;
        for slot in [
            Slot::Absent,
            Slot::Empty,
            Slot::Frame(0),
            Slot::Frame(last),
            Slot::Packed { page: 0, block: 0 },
            Slot::Packed {
                page: last,
                block: 63,
            },
        ] {
            assert_eq!(Slot::of(slot.raw()), slot);
        }
    }

    #[test]
    fn slices_behind_the_disk_have_no_slot() {
        let tables = tables();
        tables.set_slot(1 << 40, Slot::Frame(1));
        assert_eq!(tables.slot(1 << 40), Slot::Absent);
    }
}
