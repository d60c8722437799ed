//! A larger disk in an image that nobody uses.
//!
//! ```text
//!   zeros behind the old end in the last block
//!   there is room     entries behind the map · header
//!   there is none     the first blocks move behind the last · a new map in their place · header
//! ```
//!
//! Each step is durable before the next, and the last is one sector that changes everything: a crash leaves the old size
//! or the new, and perhaps blocks that the header counts and nothing refers to.

use super::header::{BLOCKS_MAX, Header, ImageType};
use super::open::{Blocks, CHUNK, Layout, is_there};
use super::repair::Mover;
use super::{FREE, ZERO};
use block::{Error, Result, Storage};

/// Makes the disk of the image in `file`, which nobody uses and which is in order (see [`super::mend`]), `bytes` large.
///
/// # Errors
///
/// `Invalid` and `Unsupported` for what cannot be, before anything is written; what the host fails with.
pub fn grow(file: &dyn Storage, bytes: u64) -> Result<()> {
    let layout = Layout::read(file)?;
    grow_layout(file, &layout, bytes).map_err(|error| error.within(file.name()))
}

fn grow_layout(file: &dyn Storage, layout: &Layout, bytes: u64) -> Result<()> {
    let header = &layout.header;
    if !bytes.is_multiple_of(512) {
        return Err(Error::invalid(format!(
            "a size of {bytes} bytes: it must be a multiple of 512"
        )));
    }
    if bytes < header.disk_bytes {
        return Err(Error::unsupported(
            "a vdi image cannot shrink: convert it into a smaller one",
        ));
    }
    if bytes == header.disk_bytes {
        return Ok(());
    }
    let block = u64::from(header.block_bytes);
    let needed = u32::try_from(bytes.div_ceil(block)).ok();
    let needed = needed.filter(|n| *n <= BLOCKS_MAX).ok_or_else(|| {
        Error::unsupported(format!(
            "a disk of {bytes} bytes is too large for a vdi image: the most is {BLOCKS_MAX} blocks of {block} bytes"
        ))
    })?;
    let blocks = Blocks::read(file, layout)?;
    blocks.holes(layout)?;
    let old = header.disk_bytes.div_ceil(block);
    if blocks.last.is_some_and(|last| u64::from(last) >= old) {
        return Err(Error::corrupt(
            "the map has blocks behind the disk's end: what they hold would become visible",
        ));
    }
    let mut grown = Header {
        disk_bytes: bytes,
        blocks: needed.max(header.blocks),
        ..header.clone()
    };
    let fits = u64::from(grown.map_offset) + grown.map_bytes() <= u64::from(grown.data_offset);
    if !fits {
        grown = moved(&grown)?;
    }
    clear_last(file, header, &blocks)?;
    let end = blocks.end;
    let mut mover = Mover {
        file,
        header: header.clone(),
        entries: blocks.entries,
    };
    let shift = make_room(&mut mover, &grown, end)?;
    let mut end = end;
    if shift > 0 {
        let there = mover.entries.iter().take(header.blocks as usize);
        let there = there.filter(|entry| is_there(**entry));
        // None is below `shift` any more.
        end = there.map(|entry| entry - shift + 1).max().unwrap_or(0);
    }
    let mut entries = mover.entries;
    entries.truncate(header.blocks as usize);
    for entry in entries.iter_mut().filter(|entry| is_there(**entry)) {
        *entry -= shift;
    }
    // All blocks of a static image are there; the map's new entries are nobody's until the header counts them.
    for _ in header.blocks..grown.blocks {
        match grown.image_type {
            ImageType::Dynamic => entries.push(FREE),
            ImageType::Static => {
                entries.push(end);
                end += 1;
            }
        }
    }
    debug_assert!(end < ZERO);
    entries.resize((grown.map_bytes() / 4) as usize, 0);
    let file_end = grown.block_offset(u64::from(end));
    if file.len()? < file_end {
        file.set_len(file_end)?;
    }
    write_map(file, header, &grown, &entries)?;
    file.sync()?;
    grown.allocated = end;
    file.write_at(0, &grown.to_bytes())?;
    file.sync()
}

/// What the last block has behind the disk's end becomes zeros: nobody sees it yet.
fn clear_last(file: &dyn Storage, header: &Header, blocks: &Blocks) -> Result<()> {
    let block = u64::from(header.block_bytes);
    let within = header.disk_bytes % block;
    let last = (header.disk_bytes / block) as usize;
    let entry = blocks.entries.get(last).copied().unwrap_or(FREE);
    if within == 0 || !is_there(entry) {
        return Ok(());
    }
    let at = header.block_offset(u64::from(entry)) + within;
    file.write_zeroes(at, block - within, false)?;
    file.sync()
}

/// Where the map is to be, and the blocks behind it, when the map lies where the first blocks are now.
fn moved(grown: &Header) -> Result<Header> {
    let block = u64::from(grown.block_bytes);
    let room = grown.map_bytes().next_multiple_of(block);
    let data = u64::from(grown.data_offset) + room;
    let Ok(data_offset) = u32::try_from(data) else {
        return Err(Error::unsupported(format!(
            "the blocks would begin at byte {data:#x}, which the header cannot say: convert the image into a new one"
        )));
    };
    Ok(Header {
        map_offset: grown.data_offset,
        data_offset,
        ..grown.clone()
    })
}

/// Sees to it that no block lies where the map is to be. Returns by how much the numbers of all blocks become less.
fn make_room(mover: &mut Mover<'_>, grown: &Header, end: u32) -> Result<u32> {
    let header = &mover.header;
    let room = grown.data_offset - header.data_offset;
    // A multiple of the size of a block.
    let shift = room / header.block_bytes;
    let entries = mover.entries.iter().take(header.blocks as usize);
    let first = (0..).zip(entries).filter(|(_, entry)| **entry < shift);
    let moves: Vec<(u32, u32)> = first
        .map(|(block, _)| block)
        .zip(end.max(shift)..)
        .collect();
    mover.carry(&moves)?;
    Ok(shift)
}

/// Writes what is new of the map: all of one that has moved.
fn write_map(file: &dyn Storage, old: &Header, grown: &Header, entries: &[u32]) -> Result<()> {
    let kept = match grown.map_offset == old.map_offset {
        // Whole sectors: the last one of the old map has entries of the new.
        true => old.blocks as usize / 128 * 128,
        false => 0,
    };
    let mut at = u64::from(grown.map_offset) + kept as u64 * 4;
    for part in entries.get(kept..).unwrap_or_default().chunks(CHUNK / 4) {
        let bytes: Vec<u8> = part.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        file.write_at(at, &bytes)?;
        at += bytes.len() as u64;
    }
    Ok(())
}
