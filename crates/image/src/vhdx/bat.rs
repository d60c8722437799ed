//! The block allocation table ([MS-VHDX] 2.5) in memory: read without a lock.
//!
//! ```text
//!   … │ payload block … (one chunk's) │ sector bitmap block of the chunk │ payload block … │ …
//!
//!   on disk, 64 bits   0 state  3 reserved  20 offset in MiB
//!   in memory, 32      0 state  3 offset in MiB
//! ```
//!
//! Kept by sectors of 4 KiB, as the log has them. One whose entries are all the same takes no memory: of an image of
//! 64 TiB in blocks of 1 MiB, which has 64 Mi entries, what is used counts.

use super::log::View;
use super::{FILE_BYTES_MAX, MIB};
use block::Result;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Entries of a sector of the table.
pub(super) const SECTOR_ENTRIES: u64 = 512;

/// Bytes of the table that are read at a time.
const PIECE: u64 = 1 << 20;

/// Payload block: never written.
pub const NOT_PRESENT: u32 = 0;
/// Payload block: what it holds does not count.
pub const UNDEFINED: u32 = 1;
/// Payload block: zeros.
pub const ZERO: u32 = 2;
/// Payload block: discarded.
pub const UNMAPPED: u32 = 3;
/// Payload block: discarded, in version 0.95 of the specification.
pub const UNMAPPED_095: u32 = 5;
/// Payload block, or sector bitmap block: all of it is there.
pub const PRESENT: u32 = 6;

/// Payload block: what its sector bitmap says is there.
pub const PARTIAL: u32 = 7;

/// In memory: an entry that sets reserved bits, or leads further than a file is long.
const UNSOUND: u32 = u32::MAX;

const _: () = assert!(FILE_BYTES_MAX / MIB <= 1 << 29);

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u32);

impl Entry {
    /// One in that state, at `offset` in the file.
    pub(super) fn new(state: u32, offset: u64) -> Self {
        Self(((offset / MIB) as u32) << 3 | state)
    }

    fn decode(raw: u64) -> Self {
        let mib = raw >> 20;
        match raw & 0xf_fff8 == 0 && mib < FILE_BYTES_MAX / MIB - 1 {
            true => Self((mib as u32) << 3 | (raw & 7) as u32),
            false => Self(UNSOUND),
        }
    }

    pub(super) fn encode(self) -> u64 {
        u64::from(self.0 >> 3) << 20 | u64::from(self.0 & 7)
    }

    /// Its state; `None` for one that is not sound.
    #[inline]
    pub(super) fn state(self) -> Option<u32> {
        (self.0 != UNSOUND).then_some(self.0 & 7)
    }

    /// Whether it says that there is no block.
    fn is_absent(self) -> bool {
        matches!(
            self.state(),
            Some(NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED | UNMAPPED_095)
        )
    }

    /// Where its block is in the file.
    #[inline]
    pub(super) fn offset(self) -> u64 {
        u64::from(self.0 >> 3) << 20
    }
}

/// A sector of the table.
#[derive(Debug)]
struct Sector {
    /// What all entries were when the sector was read, if they were the same.
    fill: u32,
    /// What they are, where they are not.
    entries: OnceLock<Box<[AtomicU32]>>,
}

impl Sector {
    fn of(raw: &[u8]) -> Self {
        let decode = |bytes: &[u8; 8]| Entry::decode(u64::from_le_bytes(*bytes)).0;
        let all = raw.as_chunks::<8>().0;
        let fill = all.first().map_or(0, decode);
        let entries = OnceLock::new();
        if all.iter().any(|bytes| decode(bytes) != fill) {
            entries.get_or_init(|| all.iter().map(decode).map(AtomicU32::new).collect());
        }
        Self { fill, entries }
    }
}

/// The table.
#[derive(Debug)]
pub(super) struct Bat {
    sectors: Vec<Sector>,
    chunk_bits: u32,
}

impl Bat {
    /// Reads the `entries` of a table, and what of its last sector is behind them.
    pub(super) fn read(view: &View<'_>, at: u64, entries: u64, chunk_bits: u32) -> Result<Self> {
        let count = entries.div_ceil(SECTOR_ENTRIES);
        // At most 131 104: of 64 TiB in blocks of 1 MiB.
        let mut sectors = Vec::with_capacity(count as usize);
        let (mut done, all) = (0, count * SECTOR_ENTRIES * 8);
        let mut piece = vec![0; all.min(PIECE) as usize];
        while done < all {
            let len = (all - done).min(PIECE) as usize;
            let part = piece.get_mut(..len).unwrap_or_default();
            view.read(at + done, part)?;
            sectors.extend(part.chunks(SECTOR_ENTRIES as usize * 8).map(Sector::of));
            done += len as u64;
        }
        Ok(Self {
            sectors,
            chunk_bits,
        })
    }

    /// Where in the table a payload block's entry is.
    #[inline]
    pub(super) fn index(&self, block: u64) -> u64 {
        block + (block >> self.chunk_bits)
    }

    /// Where in the table the entry of a chunk's sector bitmap block is.
    pub(super) fn bitmap_index(&self, chunk: u64) -> u64 {
        (chunk << self.chunk_bits) + chunk + (1 << self.chunk_bits)
    }

    /// The payload block whose entry is at `index`; `None` where a sector bitmap block's is.
    pub(super) fn block(&self, index: u64) -> Option<u64> {
        let each = (1 << self.chunk_bits) + 1;
        let (chunk, within) = (index / each, index % each);
        (within + 1 < each).then_some((chunk << self.chunk_bits) + within)
    }

    /// The entry at `index`.
    #[inline]
    pub(super) fn get(&self, index: u64) -> Entry {
        let Some(sector) = self.sectors.get((index / SECTOR_ENTRIES) as usize) else {
            return Entry(0);
        };
        let entry = match sector.entries.get() {
            None => return Entry(sector.fill),
            Some(entries) => entries.get((index % SECTOR_ENTRIES) as usize),
        };
        Entry(entry.map_or(0, |entry| entry.load(Ordering::Acquire)))
    }

    /// Changes the entry at `index`. One thread at a time.
    pub(super) fn set(&self, index: u64, entry: Entry) {
        let Some(sector) = self.sectors.get((index / SECTOR_ENTRIES) as usize) else {
            return;
        };
        let fresh = || {
            (0..SECTOR_ENTRIES)
                .map(|_| AtomicU32::new(sector.fill))
                .collect()
        };
        let entries = sector.entries.get_or_init(fresh);
        if let Some(cell) = entries.get((index % SECTOR_ENTRIES) as usize) {
            cell.store(entry.0, Ordering::Release);
        }
    }

    /// The bytes of sector `sector` of the table as they are on disk.
    pub(super) fn sector(&self, sector: u64) -> [u8; 4096] {
        let mut bytes = [0; 4096];
        let first = sector * SECTOR_ENTRIES;
        for (index, place) in (first..).zip(bytes.as_chunks_mut::<8>().0) {
            *place = self.get(index).encode().to_le_bytes();
        }
        bytes
    }

    /// Sectors of the table.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Hands out those of the first `entries` that have a block, or cannot be, with their places in the table.
    pub(super) fn each(&self, entries: u64, mut each: impl FnMut(u64, Entry)) {
        for (number, sector) in (0..).zip(&self.sectors) {
            if Entry(sector.fill).is_absent() && sector.entries.get().is_none() {
                continue;
            }
            let first: u64 = number * SECTOR_ENTRIES;
            let range: Range<u64> = first..(first + SECTOR_ENTRIES).min(entries);
            for index in range {
                let entry = self.get(index);
                if !entry.is_absent() {
                    each(index, entry);
                }
            }
        }
    }

    /// Whether there are entries behind the first `entries` that could not be written back as they are.
    pub(super) fn unsound_behind(&self, entries: u64) -> bool {
        let end = self.sectors() * SECTOR_ENTRIES;
        (entries..end).any(|index| self.get(index).state().is_none())
    }
}
