//! The map in memory, by pages of 4 KiB: those that were asked for last, read without a lock.
//!
//! ```text
//!   block ─▶ page ─▶ frame with its 1024 entries
//! ```
//!
//! The map of a disk of 32 TiB has 128 MiB; what is held of it is bounded ([`CACHE_BYTES`]). A page with an entry that no flush
//! has written, or that an allocation in flight will change, stays.

use super::Vdi;
use super::header::Header;
use super::state::State;
use crate::Load;
use crate::metadata::Ask;
use crate::metadata::bitmaps::{Bitmaps, Order};
use block::{Error, Result};

/// Bytes of a page, but of the last one: whole sectors.
pub(super) const PAGE_BYTES: u64 = 4096;

/// Entries of a page.
const PAGE_ENTRIES: u64 = PAGE_BYTES / 4;

/// Memory for pages: all of a disk of 4 TiB in blocks of 1 MiB.
const CACHE_BYTES: u64 = 16 << 20;

/// Pages that there is memory for in any case.
const FRAMES_MIN: u64 = 16;

/// Where the map of an image is to be in memory, and in how many frames.
pub(super) fn of(header: &Header, cache_bytes: Option<u64>) -> (Bitmaps, usize) {
    let pages = header.map_bytes().div_ceil(PAGE_BYTES);
    let cache = cache_bytes.unwrap_or(CACHE_BYTES) / PAGE_BYTES;
    // At most as many as pages, of which there are 32768.
    let frames = cache.max(FRAMES_MIN).min(pages) as usize;
    let map = Bitmaps::new(pages, frames, PAGE_BYTES * 8, Order::HighFirst);
    (map, frames)
}

/// The page with a block's entry, and which of it that is.
#[inline]
fn split(block: u64) -> (u64, usize) {
    (block / PAGE_ENTRIES, (block % PAGE_ENTRIES) as usize)
}

impl Vdi {
    /// A block's entry; `None` when it is not in memory. Takes no lock.
    #[inline]
    pub(super) fn entry(&self, block: u64) -> Option<u32> {
        let (page, index) = split(block);
        self.pages.entry(page, index)
    }

    /// The same, which whoever asks loads where it is not in memory. With `st` under the lock.
    #[cold]
    pub(super) fn load_entry(&self, st: Option<&mut State>, block: u64) -> Ask<u32> {
        let mut guard;
        let st = match st {
            Some(st) => st,
            None => {
                guard = self.lock();
                &mut *guard
            }
        };
        self.page_of(st, block)?;
        let lost = || Error::corrupt(format!("{}: no entry of block {block}", self.name));
        Ok(self.entry(block).ok_or_else(lost)?)
    }

    /// The frame with the page with a block's entry.
    pub(super) fn page_of(&self, st: &mut State, block: u64) -> Ask<u32> {
        let busy = st.busy();
        let (page, _) = split(block);
        st.uses.frame_of(&self.pages, page, busy, || {
            // At most 4 KiB.
            Ok((self.page_offset(page), self.page_bytes(page) as u32))
        })
    }

    /// Where a page is in the file.
    pub(super) fn page_offset(&self, page: u64) -> u64 {
        self.map_offset + page * PAGE_BYTES
    }

    /// Bytes of a page.
    pub(super) fn page_bytes(&self, page: u64) -> u64 {
        let left = self.header.map_bytes().saturating_sub(page * PAGE_BYTES);
        left.min(PAGE_BYTES)
    }

    /// Changes a block's entry in the frame with its page.
    pub(super) fn set_entry(&self, st: &mut State, frame: u32, block: u64, entry: u32) {
        if let Some(frame) = self.pages.frame(frame) {
            frame.set_entry(split(block).1, entry);
        }
        st.uses.mark(frame);
    }

    /// Takes a page in, or gives it up.
    pub(super) fn end_load(&self, st: &mut State, load: &Load, bytes: Option<&[u8]>) -> Result<()> {
        match st.uses.loaded(&self.pages, load, bytes) {
            Some(_) => Ok(()),
            None => Err(Error::invalid(format!(
                "{}: a load nobody asked for",
                self.name
            ))),
        }
    }
}
