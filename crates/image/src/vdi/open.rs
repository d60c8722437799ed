//! Opening, closing, and bringing in order what was not closed.
//!
//! The map is read through when the image is opened, to see which numbers blocks have. For writing it is judged then:
//! afterwards an entry of a block that is there leads to a block within the file, and to no other's. For reading each block
//! is judged when it is asked for, so that one bad entry, or a file whose end is gone, takes nothing from the others.

use super::header::{HEADER_BYTES, Header};
use super::holes::Holes;
use super::repair::move_together;
use super::state::State;
use super::{FREE, Vdi, ZERO, pages};
use crate::metadata::Space;
use block::{Context, Error, Result, Storage};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// Bytes of the map that are read or written at a time.
pub(super) const CHUNK: usize = 64 << 10;

/// Bytes of the disk's sectors.
const SECTOR: u64 = 512;

/// The largest block that a hole in the file is used for again: it is filled whole.
const HOLE_BYTES_MAX: u32 = 2 << 20;

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For reading only.
    pub read_only: bool,
    /// Memory for the map, in bytes; `None` for the default.
    pub cache_bytes: Option<u64>,
}

/// What the header of a file says.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The header.
    pub header: Header,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl Layout {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// As [`Header::parse`], and where the file ends within the map.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        Self::read_unnamed(file).map_err(|error| error.within(file.name()))
    }

    fn read_unnamed(file: &dyn Storage) -> Result<Self> {
        let file_bytes = file.len()?;
        if file_bytes < HEADER_BYTES as u64 {
            return Err(Error::corrupt(format!(
                "of {file_bytes} bytes: too short for a VDI image"
            )));
        }
        let mut raw = [0; HEADER_BYTES];
        file.read_at(0, &mut raw)?;
        let header = Header::parse(&raw)?;
        let map_end = u64::from(header.map_offset) + u64::from(header.blocks) * 4;
        if map_end > file_bytes {
            return Err(Error::corrupt(format!(
                "the map of {} entries ends at byte {map_end:#x}, but the file at byte {file_bytes:#x}: it is cut off",
                header.blocks
            )));
        }
        Ok(Self { header, file_bytes })
    }

    /// Hands all entries of the map out in order.
    ///
    /// # Errors
    ///
    /// What reading the file fails with.
    pub fn entries(&self, file: &dyn Storage, mut each: impl FnMut(u32, u32)) -> Result<()> {
        self.each(file, |index, entry| {
            each(index, entry);
            Ok(())
        })
    }

    /// Hands all entries of the map out in order, until `each` fails.
    ///
    /// # Errors
    ///
    /// What `each` fails with, and reading the file.
    pub(super) fn each(
        &self,
        file: &dyn Storage,
        mut each: impl FnMut(u32, u32) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let bytes = u64::from(self.header.blocks) * 4;
        let (mut done, mut index) = (0, 0);
        while done < bytes {
            let len = (bytes - done).min(CHUNK as u64) as usize;
            let part = buffer.get_mut(..len).unwrap_or_default();
            file.read_at(u64::from(self.header.map_offset) + done, part)?;
            for entry in part.as_chunks::<4>().0 {
                each(index, u32::from_le_bytes(*entry))?;
                index += 1;
            }
            done += len as u64;
        }
        Ok(())
    }
}

/// What the map of an image says, as a whole.
#[derive(Debug)]
pub(super) struct Blocks {
    /// Blocks that are there.
    pub(super) present: u32,
    /// One more than the highest number of a block.
    pub(super) end: u32,
    /// The first block with the highest number, and that number.
    highest: Option<(u32, u32)>,
    /// The last entry that names a block.
    pub(super) last: Option<u32>,
}

impl Blocks {
    /// Reads the map, and judges nothing.
    ///
    /// # Errors
    ///
    /// What reading the file fails with.
    pub(super) fn read(file: &dyn Storage, layout: &Layout) -> Result<Self> {
        let mut highest: Option<(u32, u32)> = None;
        let (mut present, mut last) = (0, None);
        layout.entries(file, |index, entry| {
            if is_there(entry) {
                present += 1;
                last = Some(index);
                if highest.is_none_or(|(_, most)| entry > most) {
                    highest = Some((index, entry));
                }
            }
        })?;
        Ok(Self {
            present,
            end: highest.map_or(0, |(_, entry)| entry + 1),
            highest,
            last,
        })
    }

    /// Whether all blocks are within the file.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for one that is not.
    pub(super) fn check_within(&self, layout: &Layout) -> Result<()> {
        let Some((index, entry)) = self.highest else {
            return Ok(());
        };
        let end = layout.header.block_offset(u64::from(entry) + 1);
        if end <= layout.file_bytes {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "block {index}: its entry at byte {:#x} is {entry}: the block ends at byte {end:#x}, but the file at byte \
             {:#x}: the entry is wrong, or the file is cut off. Nothing can bring that in order: read what is there with \
             diskplane convert --salvage",
            layout.header.entry_offset(u64::from(index)),
            layout.file_bytes
        )))
    }

    /// The numbers below [`Blocks::end`] that no block has, where all are below `numbers`.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] where a block is not within the file, two blocks have the same number, or one has a
    /// number that no other program gives: writing would destroy what is there. What reading the file fails with.
    pub(super) fn holes(&self, file: &dyn Storage, layout: &Layout, numbers: u32) -> Result<Holes> {
        self.check_within(layout)?;
        let header = &layout.header;
        let mut used = vec![0u64; u64::from(numbers).div_ceil(64) as usize];
        layout.each(file, |index, entry| {
            if !is_there(entry) {
                return Ok(());
            }
            let fault = match used.get_mut((entry / 64) as usize) {
                Some(word) if entry < numbers && *word >> (entry % 64) & 1 == 0 => {
                    *word |= 1 << (entry % 64);
                    return Ok(());
                }
                Some(_) if entry < numbers => "which another block has too".to_owned(),
                _ => format!("and the disk has {} blocks", header.blocks),
            };
            Err(Error::corrupt(format!(
                "block {index}: its entry at byte {:#x} is {entry}, {fault}: run diskplane check --repair all",
                header.entry_offset(u64::from(index))
            )))
        })?;
        Ok(Holes::not_in(used, self.end))
    }
}

/// Whether an entry names a block of the file.
pub(super) fn is_there(entry: u32) -> bool {
    entry < ZERO
}

impl Vdi {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// As [`Layout::read`]; and, for writing, [`block::ErrorKind::Corrupt`] where a block lies behind the end of the file,
    /// or two have the same place.
    pub fn open(file: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        let layout = Layout::read(file)?;
        Self::of(file, layout, options).map_err(|error| error.within(file.name()))
    }

    fn of(file: &dyn Storage, layout: Layout, options: &OpenOptions) -> Result<Self> {
        let blocks = Blocks::read(file, &layout)?;
        let mut holes = match options.read_only {
            true => Holes::default(),
            false => blocks.holes(file, &layout, layout.header.blocks)?,
        };
        let Layout { header, file_bytes } = layout;
        let data_offset = u64::from(header.data_offset);
        let readable_end = match options.read_only {
            true => data_offset + file_bytes.saturating_sub(data_offset) / SECTOR * SECTOR,
            // It grows.
            false => u64::MAX,
        };
        if header.block_bytes > HOLE_BYTES_MAX {
            holes = Holes::default();
        }
        let used_end = header.block_offset(u64::from(blocks.end));
        let space = Space::new(used_end, file_bytes, u64::from(blocks.present));
        let (pages, frames) = pages::of(&header, options.cache_bytes);
        let mut state = State::new(&header, blocks.end, holes, space, frames);
        // Nothing is to be written of one that is only read.
        state.count_dirty &= !options.read_only;
        Ok(Self {
            name: file.name(),
            size: header.disk_bytes,
            block_bits: header.block_bytes.trailing_zeros(),
            data_offset,
            readable_end,
            map_offset: u64::from(header.map_offset),
            read_only: options.read_only,
            pages,
            state: Mutex::new(state),
            ahead: AtomicBool::new(false),
            header,
        })
    }

    /// Cuts off what was reserved behind the last block.
    pub(super) fn close_blocking(&self, file: &dyn Storage) -> Result<()> {
        let st = self.lock();
        if self.read_only || !st.grown {
            return Ok(());
        }
        let done = file.set_len(st.space.next).and_then(|()| file.sync());
        done.map_err(|error| error.within(&self.name))
    }
}

/// Brings an image in order whose last writer did not close it, before it is written to: the header counts the blocks
/// that are there, and what lies behind the last one is cut off. Holes between blocks are left: they are used again. Blocks
/// that a resize had brought out of its way get numbers again that the map can have. Returns what was done, for people.
///
/// # Errors
///
/// As [`Vdi::open`] for writing; the file is as it was then, or in order but for what was being written.
pub fn mend(file: &dyn Storage) -> Result<Option<String>> {
    let layout = Layout::read(file)?;
    let named = || file.name();
    let blocks = Blocks::read(file, &layout).context(named)?;
    let numbers = layout.header.numbers();
    blocks.holes(file, &layout, numbers).context(named)?;
    if blocks.end > layout.header.blocks {
        move_together(file, &layout).context(named)?;
        let done = "blocks that a resize had moved lie among the others again";
        return Ok(Some(done.to_owned()));
    }
    settle_end(file, &layout, blocks.end).context(named)
}

/// Makes the header count `end` blocks, and cuts the file off behind them.
pub(super) fn settle_end(file: &dyn Storage, layout: &Layout, end: u32) -> Result<Option<String>> {
    let mut done = Vec::new();
    let counted = layout.header.allocated;
    if counted != end {
        let header = Header {
            allocated: end,
            ..layout.header.clone()
        };
        file.write_at(0, &header.to_bytes())?;
        file.sync()?;
        done.push(format!(
            "the header counted {counted} blocks, and now {end}"
        ));
    }
    let used_end = layout.header.block_offset(u64::from(end));
    if layout.file_bytes > used_end {
        file.set_len(used_end)?;
        file.sync()?;
        if file.len()? == used_end {
            let cut = layout.file_bytes - used_end;
            done.push(format!("cut off {cut} bytes behind the last block"));
        }
    }
    Ok((!done.is_empty()).then(|| done.join("; ")))
}

/// A map entry's bytes of a block that is not there.
pub(super) const FREE_BYTES: [u8; 4] = FREE.to_le_bytes();
