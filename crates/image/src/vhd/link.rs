//! Another parent, or nothing above it: what commit and rebase change of an image that nobody uses.
//!
//! ```text
//!   another parent   1 a header and the parent's names, where nothing is   2 the footer's copy, which leads there
//!                    3 the footer at the end
//!   no parent        0 what has no bit becomes zeros: a dynamic image has all of its blocks
//!   emptied          1 batmap: no block is whole · its checksum   2 the table   3 a header before where blocks were
//!                    4 the file is cut
//! ```
//!
//! Each step is durable before the next. What puts a header in force is one sector: a crash leaves the old one or
//! the new. What an emptied table loses entry by entry the parent has by then, which is as vhd-util's coalesce leaves it.

use super::footer::{DiskType, FOOTER_BYTES, UniqueId};
use super::header::HEADER_BYTES;
use super::locator::{NAME_BYTES_MAX, NewParent};
use super::open::{Blocks, Layout, lacks, mend, put_end};
use super::tables::NONE;
use crate::words::each_gap;
use block::{Error, Result, Storage};

/// Bytes of the table that are written at a time.
const PIECE: u64 = 64 << 10;

/// Makes `parent` the parent of the image in `file`, which nobody else may use; `None`: it gets none, and is a dynamic
/// image.
///
/// # Errors
///
/// `Unsupported` for a fixed image; `Invalid` for a name that is too long; as [`mend`], and what the host fails with. The
/// image has its old parent then.
pub fn set_parent(file: &dyn Storage, parent: Option<&NewParent>) -> Result<()> {
    mend(file)?;
    let layout = Layout::read(file)?;
    change(file, &layout, parent).map_err(|error| error.within(file.name()))
}

fn change(file: &dyn Storage, layout: &Layout, parent: Option<&NewParent>) -> Result<()> {
    let mut new = layout.clone();
    let Some(header) = &mut new.header else {
        return Err(Error::unsupported(
            "a fixed vhd image has all of its disk, and no parent",
        ));
    };
    if let Some(lacks) = lacks(layout) {
        return Err(Error::unsupported(lacks));
    }
    let blocks = Blocks::read(file, layout)?;
    blocks.check_writable(layout)?;
    header.locators = Default::default();
    header.parent_id = UniqueId::NONE;
    header.parent_timestamp = 0;
    header.parent_name = String::new();
    let mut put = |at| parent.map_or(Ok(Vec::new()), |parent| parent.put(header, at));
    let len = (HEADER_BYTES + put(0)?.len()) as u64;
    let at = free_place(layout, &blocks, len);
    let names = put(at + HEADER_BYTES as u64)?;
    let mut bytes = header.to_bytes();
    bytes.extend_from_slice(&names);
    if parent.is_none() && layout.footer.disk_type == DiskType::Differencing {
        clear_rest(file, layout, &blocks)?;
    }
    new.footer.disk_type = match parent {
        Some(_) => DiskType::Differencing,
        None => DiskType::Dynamic,
    };
    put_header(file, &mut new, at, &bytes)?;
    put_end(file, new.used_end(blocks.end), &new.footer)
}

/// Writes the header of `layout`, which `bytes` begin with, where nothing is, and puts it in force.
fn put_header(file: &dyn Storage, layout: &mut Layout, at: u64, bytes: &[u8]) -> Result<()> {
    file.write_at(at, bytes)?;
    file.sync()?;
    // Names behind what was the end are in use.
    layout.file_bytes = file.len()?;
    layout.footer.header_offset = at;
    file.write_at(0, &layout.footer.to_bytes())?;
    file.sync()
}

/// The first place before the blocks where nothing is for `len` bytes, or else behind all that is in use.
fn free_place(layout: &Layout, blocks: &Blocks, len: u64) -> u64 {
    let used_end = layout.used_end(blocks.end);
    let first = blocks.entries.iter().filter(|entry| **entry != NONE).min();
    let first = match first {
        // Of blocks behind the disk's end nobody knows where the first is.
        _ if blocks.beyond(blocks.entries.len() as u64) => 0,
        Some(entry) => u64::from(*entry) * 512,
        None => used_end,
    };
    let mut taken = layout.tables().to_vec();
    taken.push(first..used_end);
    let locators = layout.header.iter().flat_map(|header| &header.locators);
    for locator in locators.filter(|locator| locator.code != [0; 4]) {
        let end = locator.offset.checked_add(locator.space_bytes());
        if let Some(end) = end.filter(|end| *end <= layout.file_bytes) {
            taken.push(locator.offset..end);
        }
    }
    taken.sort_by_key(|range| range.start);
    let mut at = FOOTER_BYTES as u64;
    for range in taken {
        if range.start >= at + len {
            break;
        }
        at = at.max(range.end.next_multiple_of(512));
    }
    at.min(used_end)
}

/// Makes zeros of what blocks have where they have no bit. Nobody sees it: it is the parent's.
fn clear_rest(file: &dyn Storage, layout: &Layout, blocks: &Blocks) -> Result<()> {
    let (span, bitmap) = layout.block_span();
    let sectors = (span - bitmap) / 512;
    // At most 512 KiB.
    let mut bits = vec![0; bitmap as usize];
    for entry in blocks.entries.iter().filter(|entry| **entry != NONE) {
        let at = u64::from(*entry) * 512;
        file.read_at(at, &mut bits)?;
        let has = |sector: u64| {
            let byte = bits.get((sector / 8) as usize).copied().unwrap_or(0);
            byte << (sector % 8) & 0x80 != 0
        };
        each_gap(sectors, has, |gap| {
            let len = (gap.end - gap.start) * 512;
            file.write_zeroes(at + bitmap + gap.start * 512, len, false)
        })?;
    }
    file.sync()
}

/// Takes everything out of the differencing image in `file`, which nobody else may use: it reads as its parent then, which
/// has it all.
///
/// # Errors
///
/// `Unsupported` for another image; as [`mend`], and what the host fails with.
pub fn empty(file: &dyn Storage) -> Result<()> {
    mend(file)?;
    let layout = Layout::read(file)?;
    empty_layout(file, &layout).map_err(|error| error.within(file.name()))
}

fn empty_layout(file: &dyn Storage, layout: &Layout) -> Result<()> {
    let header = match &layout.header {
        Some(header) if layout.footer.disk_type == DiskType::Differencing => header,
        _ => {
            return Err(Error::unsupported(
                "it has no parent that could have it all",
            ));
        }
    };
    if let Some(lacks) = lacks(layout) {
        return Err(Error::unsupported(lacks));
    }
    if let Some(batmap) = &layout.batmap {
        batmap.clear(file, header)?;
    }
    let nothing = vec![0xff; PIECE as usize];
    let end = header.table_offset + header.table_bytes();
    let mut at = header.table_offset;
    while at < end {
        let len = (end - at).min(PIECE);
        file.write_at(at, nothing.get(..len as usize).unwrap_or_default())?;
        at += len;
    }
    file.sync()?;
    let layout = to_front(file, layout)?;
    put_end(file, layout.used_end(0), &layout.footer)
}

/// Brings header and names of an empty image to the front, where blocks were before them.
fn to_front(file: &dyn Storage, layout: &Layout) -> Result<Layout> {
    let mut new = layout.clone();
    let Some(header) = &mut new.header else {
        return Ok(new);
    };
    let mut names: Vec<u8> = Vec::new();
    for locator in header.locators.iter_mut().filter(|l| l.code != [0; 4]) {
        let end = locator.offset.checked_add(u64::from(locator.len));
        if locator.len > NAME_BYTES_MAX || end.is_none_or(|end| end > layout.file_bytes) {
            // Not understood: it stays where it is.
            return Ok(layout.clone());
        }
        let start = names.len();
        names.resize(start + locator.len as usize, 0);
        file.read_at(locator.offset, names.get_mut(start..).unwrap_or_default())?;
        names.resize(names.len().next_multiple_of(512), 0);
        locator.offset = start as u64;
        locator.space = locator.len.next_multiple_of(512);
    }
    let len = HEADER_BYTES + names.len();
    let at = free_place(layout, &Blocks::read(file, layout)?, len as u64);
    if at >= layout.footer.header_offset {
        return Ok(layout.clone());
    }
    for locator in header.locators.iter_mut().filter(|l| l.code != [0; 4]) {
        locator.offset += at + HEADER_BYTES as u64;
    }
    let mut bytes = header.to_bytes();
    bytes.append(&mut names);
    put_header(file, &mut new, at, &bytes)?;
    Ok(new)
}
