//! Pages: frames that hold packed slices, in blocks of one size for each page.
//!
//! ```text
//!   blocks, back to back; the first word of each names its slice
//! ```
//!
//! A packed slice goes into a page with the smallest blocks that it fits, so nothing needs to be moved to make
//! room, and a block given back fits the next slice of its size. A page whose last block is given back is a
//! vacant frame again; the clock evicts a page as a whole.

use super::cache::{Cache, Holds, Meta};
use super::layout::Layout;
use super::packed::slice_of;
use super::tables::{PAGE_BLOCKS_MAX, Slot, Tables};
use std::sync::atomic::Ordering;

/// How many blocks pages are divided into.
const BLOCKS: [u32; 14] = [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64];
const _: () = assert!(BLOCKS[BLOCKS.len() - 1] as usize == PAGE_BLOCKS_MAX);

/// A frame that is a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// Index into `Pages::classes`.
    class: u8,
    /// Place in the class's list of pages with room; `NOT_OPEN` when it is full.
    at: u32,
    /// Which blocks are in use.
    used: u64,
}

const NOT_OPEN: u32 = u32::MAX;

#[derive(Debug)]
struct Class {
    blocks: u32,
    /// Words of a block.
    words: usize,
    /// Pages with room.
    open: Vec<u32>,
}

/// Pages with room, by the size of their blocks: the largest first.
#[derive(Debug)]
pub(crate) struct Pages {
    classes: Vec<Class>,
}

impl Pages {
    /// For frames of `words` words.
    pub(crate) fn new(words: usize) -> Self {
        let classes = BLOCKS.iter().map(|blocks| Class {
            blocks: *blocks,
            words: words / *blocks as usize,
            open: Vec::new(),
        });
        Self {
            classes: classes.collect(),
        }
    }

    /// Words of the largest block there is.
    pub(crate) fn block_words_max(&self) -> usize {
        self.classes.first().map_or(0, |c| c.words)
    }

    /// The class with the smallest blocks that hold `words`.
    fn class_of(&self, words: usize) -> Option<usize> {
        self.classes
            .partition_point(|c| c.words >= words)
            .checked_sub(1)
    }
}

impl Cache {
    fn page(&mut self, frame: u32) -> Option<&mut Page> {
        match self.meta.get_mut(frame as usize).map(|m| &mut m.holds) {
            Some(Holds::Page(page)) => Some(page),
            _ => None,
        }
    }

    /// Stores packed slice `slice` in a page. Without one that has blocks of its size, `spare` becomes one, if
    /// there is one; else a larger block is taken. `false` when there is no place.
    pub(crate) fn place(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        slice: u64,
        words: &[u64],
        spare: &mut Option<u32>,
    ) -> bool {
        let Some(fitting) = self.pages.class_of(words.len()) else {
            return false;
        };
        let open = |class: usize| self.pages.classes.get(class).and_then(|c| c.open.last());
        let page = match (open(fitting), spare.take()) {
            (Some(page), kept) => {
                *spare = kept;
                *page
            }
            (None, Some(frame)) => {
                self.make_page(tables, geometry, frame, fitting);
                frame
            }
            (None, None) => match (0..fitting).rev().find_map(open) {
                Some(page) => *page,
                None => return false,
            },
        };
        self.store(tables, page, slice, words)
    }

    fn make_page(&mut self, tables: &Tables, geometry: &Layout, frame: u32, class: usize) {
        let Some(c) = self.pages.classes.get_mut(class) else {
            return;
        };
        let at = c.open.len() as u32;
        c.open.push(frame);
        if let Some(f) = tables.frames.get(frame as usize) {
            f.make(geometry.slice_words());
            f.close();
            // A frame has some thousand words at most.
            f.divide(c.words as u32);
        }
        if let Some(meta) = self.meta.get_mut(frame as usize) {
            // There are 14 classes.
            let class = class as u8;
            *meta = Meta::default();
            meta.holds = Holds::Page(Page { class, at, used: 0 });
        }
    }

    fn store(&mut self, tables: &Tables, frame: u32, slice: u64, words: &[u64]) -> bool {
        let Some(page) = self.page(frame) else {
            return false;
        };
        let block = page.used.trailing_ones();
        page.used |= 1 << block;
        let (class, used) = (usize::from(page.class), page.used.count_ones());
        if let Some(f) = tables.frames.get(frame as usize) {
            f.close();
            for (to, from) in tables.block(frame, block).iter().zip(words) {
                to.store(*from, Ordering::Relaxed);
            }
            f.open_page();
            f.touch();
        }
        if self
            .pages
            .classes
            .get(class)
            .is_some_and(|c| used == c.blocks)
        {
            self.unlist(frame);
        }
        self.move_slot(tables, slice, Slot::Packed { page: frame, block });
        true
    }

    /// Takes a page from its class's list.
    fn unlist(&mut self, frame: u32) {
        let Some(page) = self.page(frame) else { return };
        let (class, at) = (usize::from(page.class), page.at);
        page.at = NOT_OPEN;
        let Some(class) = self.pages.classes.get_mut(class) else {
            return;
        };
        let at = at as usize;
        if class.open.get(at) != Some(&frame) {
            return;
        }
        class.open.swap_remove(at);
        let moved = class.open.get(at).copied();
        if let Some(page) = moved.and_then(|frame| self.page(frame)) {
            page.at = at as u32;
        }
    }

    /// Gives a block back. Its words stay until another slice gets them, for readers who are at it.
    pub(crate) fn free_block(&mut self, frame: u32, block: u32) {
        let Some(page) = self.page(frame) else { return };
        debug_assert!(page.used >> block & 1 != 0, "a free block is given back");
        page.used &= !(1 << block);
        let (class, at, empty) = (usize::from(page.class), page.at, page.used == 0);
        if empty {
            self.unlist(frame);
            self.give_back(frame);
        } else if at == NOT_OPEN
            && let Some(class) = self.pages.classes.get_mut(class)
        {
            class.open.push(frame);
            let at = class.open.len() as u32 - 1;
            if let Some(page) = self.page(frame) {
                page.at = at;
            }
        }
    }

    /// Lets all slices of a page go. The frame is the caller's then.
    pub(crate) fn drop_page(&mut self, tables: &Tables, frame: u32, page: Page) {
        self.unlist(frame);
        let mut used = page.used;
        while used != 0 {
            let block = used.trailing_zeros();
            used &= used - 1;
            let header = tables.block(frame, block).first();
            let header = header.map_or(0, |w| w.load(Ordering::Relaxed));
            self.move_slot(tables, slice_of(header), Slot::Absent);
        }
    }
}
