//! A larger disk in an image that nobody uses.
//!
//! ```text
//!   zeros behind the old end in the last block
//!   there is room     entries behind the map · header
//!   there is none     the first blocks move behind the last · a new map in their place · header
//! ```
//!
//! Each step is durable before the next, and the last is one sector that changes everything: a crash leaves the old size
//! or the new, and perhaps blocks that the header counts and nothing refers to. Of an image that is full, the blocks that
//! move have numbers meanwhile that the old map is too short for. The header counts them before an entry has one
//! ([`Header::numbers`]): every reader finds them there, and the next writer brings them back ([`super::mend`]).

use super::header::{BLOCKS_MAX, Header, ImageType};
use super::open::{Blocks, CHUNK, Layout, is_there};
use super::repair::{Move, Mover};
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
    blocks.holes(file, layout, header.blocks)?;
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
    clear_last(file, header)?;
    let shift = make_room(file, layout, &grown, blocks.end)?;
    // As the blocks are now: moves leave the rest as it is.
    let moved = Layout {
        header: header.clone(),
        file_bytes: file.len()?,
    };
    let mut end = blocks.end;
    if shift > 0 {
        // None is below `shift` any more.
        end = Blocks::read(file, &moved)?.end.saturating_sub(shift);
    }
    // All blocks of a static image are there; the map's new entries are nobody's until the header counts them.
    let first = end;
    if grown.image_type == ImageType::Static {
        end += grown.blocks - header.blocks;
    }
    debug_assert!(end < ZERO);
    let file_end = grown.block_offset(u64::from(end));
    if file.len()? < file_end {
        file.set_len(file_end)?;
    }
    write_map(file, &moved, &grown, shift, first)?;
    file.sync()?;
    grown.allocated = end;
    file.write_at(0, &grown.to_bytes())?;
    file.sync()
}

/// What the last block has behind the disk's end becomes zeros: nobody sees it yet.
fn clear_last(file: &dyn Storage, header: &Header) -> Result<()> {
    let block = u64::from(header.block_bytes);
    let within = header.disk_bytes % block;
    if within == 0 {
        return Ok(());
    }
    let mut entry = [0; 4];
    file.read_at(header.entry_offset(header.disk_bytes / block), &mut entry)?;
    let entry = u32::from_le_bytes(entry);
    if !is_there(entry) {
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
fn make_room(file: &dyn Storage, layout: &Layout, grown: &Header, end: u32) -> Result<u32> {
    let header = &layout.header;
    let room = grown.data_offset - header.data_offset;
    // A multiple of the size of a block.
    let shift = room / header.block_bytes;
    let mut mover = Mover::new(file, header);
    let mut to = end.max(shift);
    layout.each(file, |block, from| {
        if from >= shift {
            return Ok(());
        }
        let next = Move { block, from, to };
        to += 1;
        mover.add(next)
    })?;
    mover.carry()?;
    Ok(shift)
}

/// Writes what is new of the map: all of one that has moved, whose numbers are less by `shift`. New blocks of a static
/// image have the numbers from `first` on.
fn write_map(
    file: &dyn Storage,
    old: &Layout,
    grown: &Header,
    shift: u32,
    first: u32,
) -> Result<()> {
    let header = &old.header;
    // Whole sectors: the last one of the old map has entries of the new.
    let kept = match grown.map_offset == header.map_offset {
        true => header.blocks / 128 * 128,
        false => 0,
    };
    let mut at = grown.entry_offset(u64::from(kept));
    let mut bytes = Vec::with_capacity(CHUNK);
    let mut put = |entry: Option<u32>| {
        bytes.extend(entry.map(u32::to_le_bytes).into_iter().flatten());
        if bytes.len() < CHUNK && entry.is_some() {
            return Ok(());
        }
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        file.write_at(at, &bytes)?;
        at += bytes.len() as u64;
        bytes.clear();
        Ok(())
    };
    old.each(file, |block, entry| match block < kept {
        true => Ok(()),
        false => put(Some(match is_there(entry) {
            true => entry - shift,
            false => entry,
        })),
    })?;
    for new in 0..grown.blocks - header.blocks {
        put(Some(match grown.image_type {
            ImageType::Dynamic => FREE,
            ImageType::Static => first + new,
        }))?;
    }
    put(None)
}
