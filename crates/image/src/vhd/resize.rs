//! A larger disk in an image that nobody uses.
//!
//! ```text
//!   fixed     zeros between the disk and its footer · the same footer at the new end · zeros where it was · the new one
//!             where new and old place overlap, the new end is behind both first: footer in its place · the file is cut
//!   others    zeros behind the old end in the last block
//!             where the table is too small: a larger one behind the last block · header's first sector
//!             footer's copy · footer at the end
//! ```
//!
//! Each step is durable before the next, and one of them is one sector that changes everything: a crash
//! leaves the old size or the new. A fixed image has one footer only, the file's last 512 bytes; how long the disk is says
//! the footer, not where it lies.

use super::footer::{DiskType, FOOTER_BYTES, Footer};
use super::geometry::{Geometry, MAX_SECTORS};
use super::open::{Blocks, Layout, put_end};
use super::tables::NONE;
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
    let old = layout.disk_bytes;
    if !bytes.is_multiple_of(512) {
        return Err(Error::invalid(format!(
            "a size of {bytes} bytes: it must be a multiple of 512"
        )));
    }
    if bytes < old {
        return Err(Error::unsupported(
            "a vhd image cannot shrink: convert it into a smaller one",
        ));
    }
    if bytes / 512 > MAX_SECTORS {
        return Err(Error::unsupported(format!(
            "a disk of {bytes} bytes is too large for a VHD image: the most is 2040 GiB"
        )));
    }
    if bytes == old {
        return Ok(());
    }
    let footer = resized(&layout.footer, bytes);
    if layout.footer.disk_type == DiskType::Fixed {
        return grow_fixed(file, layout, bytes, &footer.to_bytes());
    }
    let blocks = Blocks::read(file, layout)?;
    blocks.check_writable(layout)?;
    clear_last(file, layout, &blocks)?;
    let layout = make_room(file, layout, &blocks, bytes)?;
    file.write_at(0, &footer.to_bytes())?;
    file.sync()?;
    put_end(file, layout.used_end(blocks.end), &footer)
}

/// Makes the disk of a fixed image `bytes` large. Its footer lies where the file ends, not always where the disk does.
fn grow_fixed(file: &dyn Storage, layout: &Layout, bytes: u64, footer: &[u8]) -> Result<()> {
    let len = FOOTER_BYTES as u64;
    let old_end = layout.file_bytes - len;
    // Nobody's bytes become the disk's. What only the footer's size counts is the disk's to other programs.
    let slack = layout.disk_bytes.max(layout.footer.current_size);
    let slack_end = bytes.min(old_end);
    if slack < slack_end {
        file.write_zeroes(slack, slack_end - slack, false)?;
        file.sync()?;
    }
    let place = bytes.max(old_end);
    if place == old_end && place.is_multiple_of(len) {
        file.write_at(place, footer)?;
        return file.sync();
    }
    // Half of one and half of the other would be none: meanwhile the file ends with a third, of one sector.
    let across = place < old_end + len;
    let end = match across {
        true => (place + len).next_multiple_of(len),
        false => place,
    };
    // The disk has its old size, with more behind it, until nothing of the old footer is left that it would show.
    file.write_at(end, &layout.footer.to_bytes())?;
    file.sync()?;
    file.write_at(old_end, &[0; FOOTER_BYTES])?;
    file.sync()?;
    file.write_at(end, footer)?;
    file.sync()?;
    if across {
        file.write_at(place, footer)?;
        file.sync()?;
        file.set_len(place + len)?;
        file.sync()?;
    }
    Ok(())
}

/// The footer of the disk when it has `bytes`. Where no geometry has as many, the footer's size counts from now on.
fn resized(footer: &Footer, bytes: u64) -> Footer {
    let mut footer = footer.clone();
    let sectors = bytes / 512;
    footer.current_size = bytes;
    if footer.size_is_current() {
        footer.geometry = Geometry::below(sectors);
        if !footer.size_is_current() {
            footer.geometry = Geometry::holding(sectors);
        }
    } else {
        footer.geometry = Geometry::holding(sectors);
    }
    if !footer.size_is_current() && footer.geometry.sectors() != sectors {
        footer.creator = *b"qem2";
    }
    footer
}

/// What the last block has behind the disk's end becomes zeros: nobody sees it yet.
fn clear_last(file: &dyn Storage, layout: &Layout, blocks: &Blocks) -> Result<()> {
    let (span, bitmap) = layout.block_span();
    let block_bytes = span - bitmap;
    let within = layout.disk_bytes % block_bytes;
    let last = (layout.disk_bytes / block_bytes) as usize;
    let entry = blocks.entries.get(last).copied().unwrap_or(NONE);
    if within == 0 || entry == NONE {
        return Ok(());
    }
    let at = u64::from(entry) * 512 + bitmap;
    file.write_zeroes(at + within, block_bytes - within, false)?;
    // In a differencing image what has no bit is the parent's, which must end there.
    file.sync()
}

/// Sees to it that the table has an entry for each block of a disk of `bytes`.
fn make_room(file: &dyn Storage, layout: &Layout, blocks: &Blocks, bytes: u64) -> Result<Layout> {
    let mut layout = layout.clone();
    let used_end = layout.used_end(blocks.end);
    let Some(header) = &mut layout.header else {
        return Ok(layout);
    };
    let needed = bytes.div_ceil(u64::from(header.block_bytes));
    let old_blocks = layout.disk_bytes.div_ceil(u64::from(header.block_bytes));
    if blocks.beyond(old_blocks) {
        return Err(Error::corrupt(
            "the table has blocks behind the disk's end: what they hold would become visible",
        ));
    }
    if needed <= u64::from(header.table_entries) {
        return Ok(layout);
    }
    if layout.batmap.is_some() {
        return Err(Error::unsupported(format!(
            "the table has {} entries, and the new disk {needed} blocks: XenServer's tools find the batmap behind the \
             table, so that it cannot move: use vhd-util resize",
            header.table_entries
        )));
    }
    let mut larger = header.clone();
    larger.table_offset = used_end;
    larger.table_entries = u32::try_from(needed)
        .map_err(|_| Error::unsupported(format!("{needed} blocks are too many for a table")))?;
    larger.check_table(bytes)?;
    let old_len = u64::from(header.table_entries) * 4;
    let mut done = 0;
    while done < larger.table_bytes() {
        let mut piece = vec![0xff; (larger.table_bytes() - done).min(64 << 10) as usize];
        let there = old_len.saturating_sub(done).min(piece.len() as u64) as usize;
        if let Some(part) = piece.get_mut(..there).filter(|part| !part.is_empty()) {
            file.read_at(header.table_offset + done, part)?;
        }
        file.write_at(larger.table_offset + done, &piece)?;
        done += piece.len() as u64;
    }
    file.write_at(
        larger.table_offset + larger.table_bytes(),
        &layout.footer.to_bytes(),
    )?;
    file.sync()?;
    // Of the second sector not all may be understood.
    let bytes = larger.with_table();
    let first = bytes.get(..512).unwrap_or_default();
    file.write_at(layout.footer.header_offset, first)?;
    file.sync()?;
    layout.header = Some(larger);
    Ok(layout)
}
