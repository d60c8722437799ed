//! Images of the compressed loop driver, version 2.0, for reading (sources: cloop's `compressed_loop.h`, QEMU's
//! `block/cloop.c`).
//!
//! ```text
//!   128 bytes: a shell script that mounts itself │ block size │ blocks │ offsets: one more than blocks │ zlib streams
//!                                                  128          132      136, 64 bits each
//! ```
//!
//! All numbers are big-endian. A block is the zlib stream between its offset and the next.
//!
//! Of the offsets pages of 4 KiB of the file are kept in memory as far as they were asked for last; all were looked at
//! once when the image was opened.

#[cfg(test)]
mod tests;

use crate::contract::{
    Compressed, Description, Extent, ExtentKind, FileId, Image, Load, Plan, Step, ZeroMode,
    ZeroPlan, reading_only, why_reading_only,
};
use crate::head;
use crate::inflate;
use crate::metadata::bitmaps::Order;
use crate::metadata::{Ask, Reading, step};
use crate::words::read_u32;
use block::{Error, GuestOffset, HostOffset, Result, Storage};

/// Bytes at the start of an image.
pub const MAGIC: &[u8] =
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";

/// Largest block, as in QEMU; packed it may have twice as much.
pub const BLOCK_BYTES_MAX: u32 = 64 << 20;
/// Most bytes of the offsets, as in QEMU.
const OFFSETS_BYTES_MAX: u64 = 512 << 20;
/// Where the block size is.
const HEADER_AT: u64 = 128;
/// Where the offsets are.
const OFFSETS_AT: u64 = 136;
/// Bytes of the file that are a page, and numbers in it.
const PAGE_BYTES: u64 = 4096;
const PAGE_WORDS: u64 = PAGE_BYTES / 8;
/// Memory for pages.
const CACHE_BYTES: u64 = 16 << 20;
/// Bytes of the offsets that are looked at at a time.
const CHUNK: usize = 1 << 20;

/// An open image.
#[derive(Debug)]
pub struct Cloop {
    name: String,
    block_bytes: u32,
    blocks: u32,
    file_bytes: u64,
    pages: Reading,
}

impl Cloop {
    /// Opens the image in `file`, for reading.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for what cannot be, [`block::ErrorKind::Unsupported`] for what is too large; the field is named.
    pub fn open(file: &dyn Storage) -> Result<Self> {
        let name = file.name();
        Self::open_unnamed(file).map_err(|error| error.within(name))
    }

    fn open_unnamed(file: &dyn Storage) -> Result<Self> {
        let file_bytes = file.len()?;
        if file_bytes < OFFSETS_AT {
            return Err(head::cut_off());
        }
        let mut head = [0; 8];
        file.read_at(HEADER_AT, &mut head)?;
        let block_bytes = read_u32(&head, 0).unwrap_or(0);
        let blocks = read_u32(&head, 4).unwrap_or(0);
        if block_bytes == 0 || !block_bytes.is_multiple_of(512) {
            return Err(Error::corrupt(format!(
                "block size at byte 128 is {block_bytes}: it must be a multiple of 512"
            )));
        }
        if block_bytes > BLOCK_BYTES_MAX {
            return Err(Error::unsupported(format!(
                "block size at byte 128 is {block_bytes}: the most is {BLOCK_BYTES_MAX}"
            )));
        }
        let offsets = (u64::from(blocks) + 1) * 8;
        if offsets > OFFSETS_BYTES_MAX {
            return Err(Error::unsupported(format!(
                "blocks at byte 132 are {blocks}: the most is {}",
                OFFSETS_BYTES_MAX / 8 - 1
            )));
        }
        let end = OFFSETS_AT + offsets;
        if end > file_bytes {
            return Err(Error::corrupt(format!(
                "the offsets of {blocks} blocks end at byte {end:#x}, but the file at byte {file_bytes:#x}: it is cut off"
            )));
        }
        let count = end.div_ceil(PAGE_BYTES);
        // At most 4096.
        let frames = (CACHE_BYTES / PAGE_BYTES).min(count) as usize;
        let image = Self {
            name: file.name(),
            block_bytes,
            blocks,
            file_bytes,
            pages: Reading::new(file.name(), count, frames, PAGE_BYTES * 8, Order::HighFirst),
        };
        image.look_through(file)?;
        Ok(image)
    }

    /// Looks at all offsets, as QEMU does: they must not go back, nor lie too far from one another.
    fn look_through(&self, file: &dyn Storage) -> Result<()> {
        let end = OFFSETS_AT + (u64::from(self.blocks) + 1) * 8;
        let mut chunk = Vec::new();
        let (mut at, mut index, mut last) = (OFFSETS_AT, 0u64, None);
        while at < end {
            chunk.resize((end - at).min(CHUNK as u64) as usize, 0);
            file.read_at(at, &mut chunk)?;
            for bytes in chunk.as_chunks::<8>().0 {
                let next = u64::from_be_bytes(*bytes);
                if let Some(last) = last {
                    judge(index - 1, last, next)?;
                }
                last = Some(next);
                index += 1;
            }
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// The offset with that number.
    fn offset(&self, index: u64) -> Ask<u64> {
        let word = OFFSETS_AT / 8 + index;
        let (page, place) = (word / PAGE_WORDS, (word % PAGE_WORDS) as usize);
        // No more than there are: the file may end behind them.
        let end = OFFSETS_AT + (u64::from(self.blocks) + 1) * 8;
        let at = page * PAGE_BYTES;
        let len = end.saturating_sub(at).min(PAGE_BYTES) as u32;
        self.pages
            .ask(page, (at, len), |pages| pages.word(page, place))
    }

    fn map_at(&self, at: GuestOffset, len: u64) -> Ask<Extent> {
        let block_bytes = u64::from(self.block_bytes);
        let (block, skip) = (at.0 / block_bytes, at.0 % block_bytes);
        let (from, to) = (self.offset(block)?, self.offset(block + 1)?);
        // The file may have changed since it was opened.
        judge(block, from, to).map_err(|error| error.within(&self.name))?;
        if from == to || to > self.file_bytes {
            return Err(Error::corrupt(format!(
                "{}: block {block} is from byte {from:#x} to {to:#x} of a file of {:#x} bytes",
                self.name, self.file_bytes
            ))
            .into());
        }
        Ok(Extent {
            len: len.min(block_bytes - skip),
            kind: ExtentKind::Compressed(Compressed {
                file: FileId::IMAGE,
                offset: HostOffset(from),
                // At most 128 MiB, and less than a block.
                len: (to - from) as u32,
                unpacked_len: self.block_bytes,
                skip: skip as u32,
                packing: 0,
                lasting: true,
            }),
        })
    }
}

/// Refuses a block from one offset to another that cannot be.
fn judge(block: u64, from: u64, to: u64) -> Result<()> {
    let at = OFFSETS_AT + block * 8;
    if to < from {
        return Err(Error::corrupt(format!(
            "offset at byte {:#x} is {to:#x}, the one before it {from:#x}: they must not go back",
            at + 8
        )));
    }
    if to - from > 2 * u64::from(BLOCK_BYTES_MAX) {
        return Err(Error::corrupt(format!(
            "offset at byte {at:#x}: block {block} has {} packed bytes: the most is {}",
            to - from,
            2 * BLOCK_BYTES_MAX
        )));
    }
    Ok(())
}

impl Image for Cloop {
    fn describe(&self) -> Description {
        Description {
            read_only_because: Some(why_reading_only("cloop")),
            facts: vec![("blocks", self.blocks.to_string())],
            ..Description::new("cloop", self.size(), u64::from(self.block_bytes))
        }
    }

    fn size(&self) -> u64 {
        u64::from(self.blocks) * u64::from(self.block_bytes)
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        step(self.map_at(at, len))
    }

    fn plan_write(&self, _: GuestOffset, _: u64) -> Result<Step<Plan>> {
        Err(reading_only(&self.name, "cloop"))
    }

    fn plan_zero(&self, _: GuestOffset, _: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        Err(reading_only(&self.name, "cloop"))
    }

    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        self.pages.end_load(load, Some(bytes))
    }

    fn load_failed(&self, load: &Load) {
        let _ = self.pages.end_load(load, None);
    }

    fn decompress(&self, _: &Compressed, input: &[u8], output: &mut [u8]) -> Result<()> {
        inflate::zlib(input, output).map_err(|error| error.within(&self.name))
    }
}
