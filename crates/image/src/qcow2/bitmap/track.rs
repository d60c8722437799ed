//! The enabled bitmaps of an image that is open for writing.
//!
//! ```text
//!   open          their tables are looked through
//!   first write   `in_use` is set in their directory entries, in place, by a flush before the write
//!   each write    marks its range in memory: atomics, no lock
//!   close         what was marked is added to the bits on disk: new ones, tables and a new directory without the marks,
//!                 switched over by the header
//! ```
//!
//! Each entry's flags are within one sector, so a crash in the middle of the marking leaves each bitmap as it was
//! or marked; and since nothing was written for the guest yet, both are true. An image that was opened, and not
//! written, keeps its bitmaps as they are.
//!
//! Disabled and inconsistent bitmaps stay on disk as they are.

use super::bits::{Bits, bytes_needed};
use super::directory::{Directory, Entry};
use super::ops::Bitmaps;
use super::stored::Stored;
use crate::qcow2::check::{BITMAP_BYTES_MAX, BITMAP_IN_USE, Layout};
use crate::qcow2::close::read_short;
use crate::qcow2::header::Header;
use block::{Context, Error, Result, Storage, size};
use std::sync::atomic::{AtomicU8, Ordering};

/// Bytes of a sector, which is written whole or not at all.
const SECTOR: usize = 512;
/// Where an entry's flags are.
const FLAGS_AT: u64 = 12;

/// What is on disk: the marks are not there, and nobody has asked for them.
const CLEAN: u8 = 0;
/// A write waits for the next flush, which brings the marks.
const WANTED: u8 = 1;
/// The marks are there, durably.
const MARKED: u8 = 2;
/// The bitmaps were saved: nothing may be written any more.
const SAVED: u8 = 3;

/// A sector of the directory.
type Sector = (u64, [u8; SECTOR]);

/// See the module.
#[derive(Debug)]
pub(in crate::qcow2) struct Tracker {
    /// Numbers in the directory, and what has changed since the image was opened.
    tracked: Vec<(usize, Bits)>,
    /// Sectors of the directory with the marks set. As many bytes as it has, at most.
    sectors: Vec<Sector>,
    state: AtomicU8,
}

/// Whether a write may be planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Ready {
    /// Go on.
    Yes,
    /// A flush first.
    Flush,
    /// Never again.
    Closed,
}

impl Tracker {
    /// Looks at the enabled bitmaps of an image; `None` where there are none. `is_metadata` tells clusters that
    /// hold something else. Memory: twice the directory; by and by the bits of what is written, 512 MiB at most.
    ///
    /// # Errors
    ///
    /// `Corrupt` for bitmaps that break the specification; `Unsupported` for what this code cannot track.
    pub(in crate::qcow2) fn load(
        storage: &dyn Storage,
        header: &Header,
        is_metadata: impl Fn(u64) -> bool,
    ) -> Result<Option<Box<Self>>> {
        let directory = Directory::read(storage, header)?;
        let layout = Layout::of(header);
        let end = directory.offset + directory.len;
        for at in (directory.offset..end).step_by(layout.cluster() as usize) {
            if is_metadata(at >> layout.cluster_bits) {
                return Err(Error::corrupt(format!(
                    "bitmap directory at {at:#x} overlaps other metadata"
                )));
            }
        }
        let is_tracked = |entry: &&Entry| entry.auto() && !entry.in_use();
        let bits = directory.entries.iter().filter(is_tracked);
        // At most 65535 times 512 MiB.
        let bytes: u64 = bits
            .map(|entry| bytes_needed(header.size, u32::from(entry.granularity_bits)))
            .sum();
        if bytes > BITMAP_BYTES_MAX {
            return Err(Error::unsupported(format!(
                "its enabled bitmaps take {} of memory, more than {}: disable some with diskplane \
                 bitmap --disable",
                size::human(bytes),
                size::human(BITMAP_BYTES_MAX)
            )));
        }
        let mut tracked = Vec::new();
        let mut sectors: Vec<Sector> = Vec::new();
        let mut start = directory.offset;
        for (nth, entry) in directory.entries.iter().enumerate() {
            let flags_at = start + FLAGS_AT;
            start += entry.len();
            if !is_tracked(&entry) {
                continue;
            }
            Stored::open(storage, layout, header.size, entry)?;
            let bits = Bits::new(header.size, u32::from(entry.granularity_bits))?;
            tracked.push((nth, bits));
            let sector_at = flags_at & !(SECTOR as u64 - 1);
            if sectors.last().is_none_or(|(at, _)| *at != sector_at) {
                let mut sector = [0; SECTOR];
                sector.copy_from_slice(&read_short(storage, sector_at, SECTOR)?);
                sectors.push((sector_at, sector));
            }
            // Big-endian: the lowest bits are in the last byte.
            let last = (flags_at - sector_at) as usize + 3;
            if let Some((_, sector)) = sectors.last_mut()
                && let Some(byte) = sector.get_mut(last)
            {
                *byte |= BITMAP_IN_USE as u8;
            }
        }
        Ok((!tracked.is_empty()).then(|| {
            Box::new(Self {
                tracked,
                sectors,
                state: AtomicU8::new(CLEAN),
            })
        }))
    }

    /// Whether a write may be planned now. Where not, the next flush brings the marks.
    #[inline]
    pub(in crate::qcow2) fn ready(&self) -> Ready {
        match self.state.load(Ordering::Acquire) {
            MARKED => Ready::Yes,
            SAVED => Ready::Closed,
            _ => {
                let wanted = Ordering::Relaxed;
                // Who was faster with the marks is not undone.
                let _ = self.state.compare_exchange(CLEAN, WANTED, wanted, wanted);
                Ready::Flush
            }
        }
    }

    /// The guest changes `len` bytes at `at`.
    #[inline]
    pub(in crate::qcow2) fn mark(&self, at: u64, len: u64) {
        for (_, bits) in &self.tracked {
            bits.mark(at, len);
        }
    }

    /// Whether a flush has to bring the marks.
    pub(in crate::qcow2) fn wanted(&self) -> bool {
        self.state.load(Ordering::Relaxed) == WANTED
    }

    /// What the flush has to write for that.
    pub(in crate::qcow2) fn sectors(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.sectors.iter().map(|(at, bytes)| (*at, &bytes[..]))
    }

    /// The marks are durable.
    pub(in crate::qcow2) fn marked(&self) {
        self.state.store(MARKED, Ordering::Release);
    }

    /// Whether the bitmaps were saved.
    pub(in crate::qcow2) fn is_saved(&self) -> bool {
        self.state.load(Ordering::Acquire) == SAVED
    }

    /// Saves the bitmaps. Everything else of the image is on disk, and nobody uses it any more.
    ///
    /// # Errors
    ///
    /// What the host fails with: the bitmaps are inconsistent then, and everything else is as it should be.
    pub(in crate::qcow2) fn save(&self, storage: &dyn Storage) -> Result<()> {
        let before = self.state.swap(SAVED, Ordering::AcqRel);
        if before != MARKED {
            return Ok(());
        }
        let saved = || {
            let mut bitmaps = Bitmaps::open(storage)?;
            bitmaps.save(self.tracked.iter().map(|(nth, bits)| (*nth, bits)))?;
            bitmaps.commit()
        };
        saved().context(|| "bitmaps could not be saved, and are inconsistent now")
    }
}
