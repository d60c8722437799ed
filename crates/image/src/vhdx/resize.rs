//! A larger disk in an image that nobody uses, and repairs.
//!
//! ```text
//!   1 zeros behind the old end in the last block · places for the new blocks of a fixed image
//!   2 entries of the new blocks, which nobody looks at yet; where the table has no room, a larger one behind the last block
//!   3 one entry of the log: the size, and where the table moves, the region tables
//! ```
//!
//! Each step is durable before the next: a crash leaves the old size or the new.

use super::bat::{self, Bat, Entry};
use super::flush::end_log;
use super::log::{NewEntry, SECTOR, SECTORS_MAX};
use super::metadata::DISK_BYTES_MAX;
use super::open::{Blocks, cut};
use super::region::{TABLE_BYTES, TABLES_AT, moved_bat};
use super::{Guid, Headers, Layout, MIB, Metadata, mend};
use block::{Error, Result, Storage, align_down};
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of a table that are written at a time.
const PIECE: u64 = 64 << 10;

/// Makes the disk of the image in `file`, which nobody uses and which is in order (see [`mend`]), `bytes` large.
/// `keeps_id`: its DataWriteGuid stays, as [`super::OpenOptions::keeps_id`].
///
/// # Errors
///
/// `Invalid` and `Unsupported` for what cannot be, before anything is written; what the host fails with.
pub fn grow(file: &dyn Storage, bytes: u64, keeps_id: bool) -> Result<()> {
    let layout = Layout::read(file)?;
    grow_layout(file, &layout, bytes, keeps_id).map_err(|error| error.within(file.name()))
}

fn grow_layout(file: &dyn Storage, layout: &Layout, bytes: u64, keeps_id: bool) -> Result<()> {
    let old = &layout.metadata;
    let new = Metadata {
        disk_bytes: bytes,
        ..old.clone()
    };
    if !bytes.is_multiple_of(u64::from(old.logical_sector)) {
        return Err(Error::invalid(format!(
            "a size of {bytes} bytes: it must be a multiple of the disk's sectors of {}",
            old.logical_sector
        )));
    }
    if bytes < old.disk_bytes {
        return Err(Error::unsupported(
            "a vhdx image cannot shrink: convert it into a smaller one",
        ));
    }
    if bytes > DISK_BYTES_MAX {
        return Err(Error::unsupported(format!(
            "a disk of {bytes} bytes is too large for a VHDX image: the most is 64 TiB"
        )));
    }
    if bytes == old.disk_bytes {
        return Ok(());
    }
    if layout.log.is_empty() {
        return Err(Error::unsupported(
            "it has no log, without which its size cannot change",
        ));
    }
    if layout.headers.current.log != Guid::NONE {
        return Err(Error::invalid(
            "its log is to be put in place before it grows",
        ));
    }
    if let Some(lacks) = layout.headers.lacks() {
        return Err(Error::unsupported(lacks));
    }
    let table = layout.bat(file)?;
    let blocks = Blocks::read(layout, &table)?;
    blocks.check_apart(old, &table)?;
    let mut headers = layout.headers.clone();
    let (file_id, data_id) = (Guid::random()?, Guid::random()?);
    headers.update(file, |header| {
        header.file_write = file_id;
        if !keeps_id {
            header.data_write = data_id;
        }
    })?;
    let mut end = layout
        .used_end(blocks.end)
        .max(layout.file_bytes)
        .next_multiple_of(MIB);
    clear_last(file, layout, &table, end)?;
    let first = match new.fixed {
        true => {
            let first = end;
            end += (new.blocks() - old.blocks()) * new.block_bytes;
            Some(first)
        }
        false => None,
    };
    file.set_len(end)?;
    let region = layout.regions.bat.clone();
    let region = match new.entries() * 8 <= region.end - region.start {
        true => region,
        false => {
            let len = (new.entries() * 8).next_multiple_of(MIB);
            if len > u64::from(u32::MAX) {
                return Err(Error::unsupported("its block table would be too large"));
            }
            end += len;
            file.set_len(end)?;
            end - len..end
        }
    };
    put_entries(file, layout, &new, &region, first)?;
    file.sync()?;
    let mut changes = Changes::default();
    changes.put(file, old.disk_size_at, &bytes.to_le_bytes())?;
    if region != layout.regions.bat {
        for at in TABLES_AT {
            let mut copy = vec![0; TABLE_BYTES];
            file.read_at(at, &mut copy)?;
            // A damaged copy is no base for a change: the sound one is.
            if layout
                .regions
                .damaged
                .as_ref()
                .is_some_and(|(bad, _)| *bad == at)
            {
                let other = TABLES_AT
                    .into_iter()
                    .find(|other| *other != at)
                    .unwrap_or(at);
                file.read_at(other, &mut copy)?;
            }
            moved_bat(&mut copy, &region);
            changes.put_changed(file, at, &copy)?;
        }
    }
    changes.commit(file, layout, &mut headers, end)
}

/// What the last block has behind the disk's end becomes zeros, in a file of `end` bytes: nobody sees it yet.
fn clear_last(file: &dyn Storage, layout: &Layout, table: &Bat, end: u64) -> Result<()> {
    let Metadata {
        block_bytes,
        disk_bytes,
        ..
    } = layout.metadata;
    let within = disk_bytes % block_bytes;
    let entry = table.get(table.index(disk_bytes / block_bytes));
    let there = matches!(entry.state(), Some(bat::PRESENT | bat::PARTIAL));
    if within == 0 || !there {
        return Ok(());
    }
    // Of the last block the file may have had what the disk had.
    file.set_len(end)?;
    file.write_zeroes(entry.offset() + within, block_bytes - within, false)?;
    file.sync()
}

/// Writes the entries of the blocks that the disk of `new` has and the image's has not, and where `region` is
/// another, all before them. With `first` the new blocks are there, from that byte on.
fn put_entries(
    file: &dyn Storage,
    layout: &Layout,
    new: &Metadata,
    region: &Range<u64>,
    first: Option<u64>,
) -> Result<()> {
    let (old_entries, entries) = (layout.metadata.entries(), new.entries());
    let from = layout.regions.bat.start;
    let each = (1u64 << new.chunk_bits()) + 1;
    let old_blocks = layout.metadata.blocks();
    let mut done = match *region == layout.regions.bat {
        true => align_down(old_entries * 8, PIECE),
        false => 0,
    };
    while done < entries * 8 {
        let len = (entries * 8 - done).next_multiple_of(512).min(PIECE);
        let mut piece = vec![0; len as usize];
        let there = (old_entries * 8).saturating_sub(done).min(len) as usize;
        if let Some(part) = piece.get_mut(..there).filter(|part| !part.is_empty()) {
            file.read_at(from + done, part)?;
        }
        for (index, place) in (done / 8..).zip(piece.as_chunks_mut::<8>().0) {
            let (chunk, within) = (index / each, index % each);
            let block = (chunk << new.chunk_bits()) + within;
            if let Some(first) = first
                && index >= old_entries
                && index < entries
                && within + 1 < each
            {
                let at = first + (block - old_blocks) * new.block_bytes;
                *place = Entry::new(bat::PRESENT, at).encode().to_le_bytes();
            }
        }
        file.write_at(region.start + done, &piece)?;
        done += len;
    }
    Ok(())
}

/// Sectors that are to change all at once.
#[derive(Debug, Default)]
pub(super) struct Changes {
    sectors: BTreeMap<u64, [u8; SECTOR]>,
}

impl Changes {
    /// Notes that `bytes` are to be at `offset` of the file.
    pub(super) fn put(&mut self, file: &dyn Storage, offset: u64, bytes: &[u8]) -> Result<()> {
        for (at, byte) in (offset..).zip(bytes) {
            let start = align_down(at, SECTOR as u64);
            let sector = match self.sectors.entry(start) {
                std::collections::btree_map::Entry::Occupied(there) => there.into_mut(),
                std::collections::btree_map::Entry::Vacant(place) => {
                    let mut sector = [0; SECTOR];
                    file.read_at(start, &mut sector)?;
                    place.insert(sector)
                }
            };
            if let Some(place) = sector.get_mut((at - start) as usize) {
                *place = *byte;
            }
        }
        Ok(())
    }

    /// The same for whole sectors at `offset`, where they differ from the file's.
    pub(super) fn put_changed(
        &mut self,
        file: &dyn Storage,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        for (at, new) in (offset..)
            .step_by(SECTOR)
            .zip(bytes.as_chunks::<SECTOR>().0)
        {
            let mut old = [0; SECTOR];
            file.read_at(at, &mut old)?;
            if old != *new {
                self.sectors.insert(at, *new);
            }
        }
        Ok(())
    }

    /// Carries them out through the log of an image whose log is empty; `end` is the file's length.
    ///
    /// # Errors
    ///
    /// What writing fails with: all is as it was, or done once the log is put in place.
    pub(super) fn commit(
        self,
        file: &dyn Storage,
        layout: &Layout,
        headers: &mut Headers,
        end: u64,
    ) -> Result<()> {
        let sectors: Vec<(u64, [u8; SECTOR])> = self.sectors.into_iter().collect();
        if sectors.len() > SECTORS_MAX {
            return Err(Error::unsupported(format!(
                "{} sectors are to change at once: the most is {SECTORS_MAX}",
                sectors.len()
            )));
        }
        let entry = NewEntry {
            guid: Guid::random()?,
            sequence: 1,
            at: 0,
            flushed: align_down(file.len()?, MIB),
            last: end,
        };
        let mut bytes = Vec::new();
        entry.put(&sectors, &mut bytes);
        file.write_at(layout.log.start, &bytes)?;
        file.sync()?;
        headers.update(file, |header| header.log = entry.guid)?;
        for (at, bytes) in &sectors {
            file.write_at(*at, bytes)?;
        }
        file.sync()?;
        end_log(headers, file)
    }
}

/// Repairs what can be without a guess: puts the log in place, writes a damaged header anew, where `structures` says so a
/// damaged copy of the region table too, and cuts off what is behind the last block. Returns whether anything was written.
///
/// # Errors
///
/// As [`mend`].
pub fn repair(file: &dyn Storage, structures: bool) -> Result<bool> {
    let mended = mend(file)?.is_some();
    let repaired = repair_unnamed(file, structures);
    Ok(repaired.map_err(|error| error.within(file.name()))? || mended)
}

fn repair_unnamed(file: &dyn Storage, structures: bool) -> Result<bool> {
    let layout = Layout::read(file)?;
    let mut headers = layout.headers.clone();
    let region = layout.regions.damaged.filter(|_| structures);
    if cut(file, false)? == 0 && headers.damaged.is_none() && region.is_none() {
        return Ok(false);
    }
    if let Some(lacks) = headers.lacks() {
        return Err(Error::unsupported(lacks));
    }
    let id = Guid::random()?;
    headers.update(file, |header| header.file_write = id)?;
    if let Some((bad, _)) = region {
        let good = TABLES_AT.into_iter().find(|at| *at != bad).unwrap_or(bad);
        let mut copy = vec![0; TABLE_BYTES];
        file.read_at(good, &mut copy)?;
        file.write_at(bad, &copy)?;
        file.sync()?;
    }
    cut(file, true)?;
    Ok(true)
}
