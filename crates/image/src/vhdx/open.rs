//! Opening, and bringing in order what was not closed.

use super::bat::{self, Bat, Entry};
use super::flush::end_log;
use super::guid::Guid;
use super::header::{HEAD_BYTES, Headers};
use super::log::{Log, Overlay, SECTOR, View};
use super::region::{Regions, TABLE_BYTES, TABLES_AT};
use super::state::{PAGE_SECTORS, Space, State};
use super::{MIB, Metadata, Vhdx};
use crate::Parent;
use crate::metadata::bitmaps::{Bitmaps, Order};
use block::{Context, Error, Result, Storage};
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// Bytes of memory for sector bitmaps, unless [`OpenOptions::cache_bytes`] says otherwise.
const CACHE_BYTES: u64 = 16 << 20;

/// Pages of sector bitmaps that there is memory for in any case: more than flushes, and writes under way, hold.
const FRAMES_MIN: u64 = 512;

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For reading only.
    pub read_only: bool,
    /// Most bytes of memory for sector bitmaps; 16 MiB when absent.
    pub cache_bytes: Option<u64>,
    /// The DataWriteGuid stays although the disk is written: what lies above, and is committed into it, must go on to
    /// know it.
    pub keeps_id: bool,
}

/// What the structures of a file say, before anything is believed of its blocks.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Both headers.
    pub headers: Headers,
    /// Where the log is; nothing where there is none.
    pub log: Range<u64>,
    /// Entries of the log that are not in their places.
    pub log_entries: usize,
    /// The region table.
    pub regions: Regions,
    /// The metadata.
    pub metadata: Metadata,
    /// What made the file, as it says.
    pub creator: String,
    /// Bytes of the file, when its log is in place.
    pub file_bytes: u64,
    overlay: Arc<Overlay>,
}

impl Layout {
    /// Reads them. Of a file that was not closed, as they are when its log is in place.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] naming what cannot be, and [`block::ErrorKind::Unsupported`] for what no code here
    /// knows.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        Self::read_unnamed(file).map_err(|error| error.within(file.name()))
    }

    fn read_unnamed(file: &dyn Storage) -> Result<Self> {
        let headers = Headers::read(file)?;
        let file_bytes = file.len()?;
        let log = headers.current.log_range(file_bytes)?;
        let mut found = Log::read(file, &headers.current)?;
        let log_entries = found.entries();
        let overlay = found.keep()?;
        let view = View {
            file,
            overlay: &overlay,
            file_bytes,
        };
        let regions = Regions::read(&view, &log)?;
        let metadata = Metadata::read(&view, &regions.metadata)?;
        let entries = metadata.entries();
        let room = (regions.bat.end - regions.bat.start) / 8;
        if entries > room {
            return Err(Error::corrupt(format!(
                "the block table at byte {:#x} has room for {room} entries, the disk needs {entries}",
                regions.bat.start
            )));
        }
        let mut creator = [0; 512];
        file.read_at(8, &mut creator)?;
        let units = creator.as_chunks::<2>().0.iter();
        let units = units.map(|unit| u16::from_le_bytes(*unit));
        let units = units.take_while(|unit| *unit != 0);
        let creator = char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER));
        Ok(Self {
            creator: creator.collect(),
            headers,
            log,
            log_entries,
            regions,
            metadata,
            file_bytes: view.end(),
            overlay: Arc::new(overlay),
        })
    }

    /// Whether a header names a log: it was not closed, or is open elsewhere.
    pub fn is_open(&self) -> bool {
        self.headers.current.log != Guid::NONE
    }

    /// Puts what the log says into `bytes`, which were read at `offset`.
    pub(super) fn patch(&self, offset: u64, bytes: &mut [u8]) {
        self.overlay.patch(offset, bytes);
    }

    /// The block table of the image in `file`.
    pub(super) fn bat(&self, file: &dyn Storage) -> Result<Bat> {
        let view = View {
            file,
            overlay: &self.overlay,
            file_bytes: self.file_bytes,
        };
        let (at, metadata) = (self.regions.bat.start, &self.metadata);
        Bat::read(&view, at, metadata.entries(), metadata.chunk_bits())
    }

    /// Hands out what the block table of the image in `file` says, in order, but for blocks that are not there.
    ///
    /// # Errors
    ///
    /// What reading the file fails with.
    pub fn blocks(&self, file: &dyn Storage, mut each: impl FnMut(&BlockPlace)) -> Result<()> {
        let (bat, tables) = (self.bat(file)?, self.tables());
        bat.each(self.metadata.entries(), |index, entry| {
            each(&BlockPlace::of(self, &tables, &bat, index, entry));
        });
        Ok(())
    }

    /// Where no block may lie.
    pub fn tables(&self) -> Vec<Range<u64>> {
        let Regions {
            bat,
            metadata,
            others,
            ..
        } = &self.regions;
        let mut taken = vec![
            0..HEAD_BYTES,
            self.log.clone(),
            bat.clone(),
            metadata.clone(),
        ];
        taken.extend(others.iter().cloned());
        taken
    }

    /// Where what is in use ends: blocks, log and regions.
    pub fn used_end(&self, last_block_end: u64) -> u64 {
        let tables = self.tables();
        tables.iter().fold(last_block_end, |end, t| end.max(t.end))
    }
}

impl Vhdx {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// As [`Layout::read`]; and [`block::ErrorKind::Corrupt`] where a block lies behind the end of the file or on a
    /// table, or, for writing, on another block.
    pub fn open(file: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        Self::open_unnamed(file, options).map_err(|error| error.within(file.name()))
    }

    fn open_unnamed(file: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        let layout = Layout::read_unnamed(file)?;
        let metadata = &layout.metadata;
        let bat = layout.bat(file)?;
        let blocks = Blocks::read(&layout, &bat)?;
        check_overlay(&layout, &blocks.bitmaps, file.len()?)?;
        let lacks = lacks(&layout, &bat);
        let read_only = options.read_only || lacks.is_some();
        let mut guids = [Guid::NONE; 3];
        if !options.read_only {
            if layout.log_entries > 0 {
                return Err(Error::invalid(
                    "its log is to be put in place before it is written to",
                ));
            }
            blocks.check_apart(metadata, &bat)?;
            for guid in &mut guids {
                *guid = Guid::random()?;
            }
            if options.keeps_id {
                guids[1] = layout.headers.current.data_write;
            }
        }
        let space = Space::new(
            layout.used_end(blocks.end),
            layout.file_bytes,
            blocks.payload,
        );
        let parent = match &metadata.parent {
            Some(locator) => Some(Parent {
                names: locator.names(),
                unique_ids: locator.linkages()?.iter().map(|id| id.0).collect(),
                changed: None,
            }),
            None => None,
        };
        // At most 2^22: of 64 TiB in sectors of 512 bytes.
        let pages = match &parent {
            Some(_) => {
                let sectors = metadata.disk_bytes / u64::from(metadata.logical_sector);
                sectors.div_ceil(PAGE_SECTORS)
            }
            None => 0,
        };
        let cache = options.cache_bytes.unwrap_or(CACHE_BYTES) / SECTOR as u64;
        let frames = cache.max(FRAMES_MIN).min(pages) as usize;
        let state = State::new(layout.headers.clone(), guids, bat.sectors(), space, frames);
        Ok(Self {
            name: file.name(),
            size: metadata.disk_bytes,
            block_bits: metadata.block_bytes.trailing_zeros(),
            sector_bits: metadata.logical_sector.trailing_zeros(),
            read_only,
            lacks,
            parent,
            bitmaps: Bitmaps::new(pages, frames, PAGE_SECTORS, Order::LowFirst),
            announced: AtomicBool::new(false),
            ahead: AtomicBool::new(false),
            state: Mutex::new(state),
            bat,
            layout,
        })
    }
}

/// Why the image may not be written.
fn lacks(layout: &Layout, bat: &Bat) -> Option<String> {
    if layout.log.is_empty() {
        return Some("it has no log, without which its block table cannot be changed".to_owned());
    }
    if bat.unsound_behind(layout.metadata.entries()) {
        return Some(
            "its block table has entries behind the last that set reserved bits".to_owned(),
        );
    }
    layout.headers.lacks()
}

/// What an entry of the block table says, where it is not that there is no block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPlace {
    /// The payload block's number; `None` for a sector bitmap block.
    pub block: Option<u64>,
    /// Where in the file the entry is.
    pub entry_at: u64,
    /// Where the block is.
    pub offset: u64,
    /// Bytes of the block; 0 where the entry names none.
    pub len: u64,
    /// What is wrong with the entry.
    pub fault: Option<String>,
    /// The block lies on the image's tables.
    pub on_tables: bool,
}

impl BlockPlace {
    /// What it is, for people.
    pub fn what(&self) -> String {
        match self.block {
            Some(block) => format!("block {block}"),
            None => "a sector bitmap block".to_owned(),
        }
    }

    fn of(layout: &Layout, tables: &[Range<u64>], bat: &Bat, index: u64, entry: Entry) -> Self {
        let (metadata, block) = (&layout.metadata, bat.block(index));
        let has_bits = block.is_none_or(|block| {
            let bitmap = bat.get(bat.bitmap_index(block >> metadata.chunk_bits()));
            bitmap.state() == Some(bat::PRESENT)
        });
        let offset = entry.offset();
        let (len, needed) = match block {
            // Of the last block the file may have what the disk has.
            Some(block) => {
                let left = metadata
                    .disk_bytes
                    .saturating_sub(block * metadata.block_bytes);
                (metadata.block_bytes, metadata.block_bytes.min(left))
            }
            None => (MIB, MIB),
        };
        let can_be = match (entry.state(), block) {
            (Some(bat::PRESENT), Some(_)) => true,
            // Without a parent, there is nothing else.
            (Some(bat::PARTIAL), Some(_)) | (Some(bat::PRESENT), None) => metadata.parent.is_some(),
            _ => false,
        };
        let on_tables = tables
            .iter()
            .any(|t| offset < t.end && t.start < offset + len);
        let fault = match (entry.state(), can_be) {
            (None, _) => {
                Some("sets reserved bits, or leads further than a file is long".to_owned())
            }
            (Some(state), false) => Some(format!(
                "has state {state}, which it cannot have in such an image"
            )),
            (Some(bat::PARTIAL), true) if !has_bits => {
                Some("is there in part, but its chunk has no sector bitmap".to_owned())
            }
            (Some(_), true) if offset + needed > layout.file_bytes => Some(format!(
                "has it at byte {offset:#x}, but the file ends at byte {:#x}: it is cut off",
                layout.file_bytes
            )),
            (Some(_), true) => {
                on_tables.then(|| format!("has it at byte {offset:#x}, on the image's tables"))
            }
        };
        Self {
            block,
            entry_at: layout.regions.bat.start + index * 8,
            offset,
            len: if can_be { len } else { 0 },
            on_tables: can_be && on_tables,
            fault,
        }
    }
}

/// The blocks of an image.
pub(super) struct Blocks {
    /// Where in the file each is that is there, in MiB, and under that its place in the table.
    there: Vec<u64>,
    /// Payload blocks among them.
    pub(super) payload: u64,
    /// Where the last one ends; 0 when there is none.
    pub(super) end: u64,
    /// Sector bitmap blocks, of an image whose log is not in place.
    bitmaps: Vec<Range<u64>>,
}

impl Blocks {
    /// Judges all entries: each block must be within the file and on no table.
    pub(super) fn read(layout: &Layout, bat: &Bat) -> Result<Self> {
        let mut blocks = Self {
            there: Vec::new(),
            payload: 0,
            end: 0,
            bitmaps: Vec::new(),
        };
        let mut bad = None;
        let tables = layout.tables();
        bat.each(layout.metadata.entries(), |index, entry| {
            if bad.is_some() {
                return;
            }
            let place = BlockPlace::of(layout, &tables, bat, index, entry);
            if let Some(fault) = &place.fault {
                let text = format!(
                    "{}: its entry at byte {:#x} {fault}",
                    place.what(),
                    place.entry_at
                );
                bad = Some(Error::corrupt(text));
                return;
            }
            blocks.end = blocks.end.max(place.offset + place.len);
            blocks.payload += u64::from(place.block.is_some());
            if place.block.is_none() && layout.log_entries > 0 {
                blocks.bitmaps.push(place.offset..place.offset + place.len);
            }
            // 29 bits and 27.
            blocks.there.push((place.offset / MIB) << 32 | index);
            if blocks.there.len() as u64 * MIB > layout.file_bytes {
                let text = "the block table has more blocks than fit into the file";
                bad = Some(Error::corrupt(text));
            }
        });
        bad.map_or(Ok(blocks), Err)
    }

    /// Refuses blocks that overlap: a write to one would change the other.
    pub(super) fn check_apart(&self, metadata: &Metadata, bat: &Bat) -> Result<()> {
        let mut sorted = self.there.clone();
        sorted.sort_unstable();
        let len = |index| match bat.block(index) {
            Some(_) => metadata.block_bytes,
            None => MIB,
        };
        for pair in sorted.windows(2) {
            let [a, b] = pair else { continue };
            let (first, second) = (a & u64::from(u32::MAX), b & u64::from(u32::MAX));
            if (b >> 32) * MIB < (a >> 32) * MIB + len(first) {
                return Err(Error::corrupt(format!(
                    "the blocks of entries {first} and {second}, at bytes {:#x} and {:#x}, overlap",
                    (a >> 32) * MIB,
                    (b >> 32) * MIB
                )));
            }
        }
        Ok(())
    }
}

/// Refuses a log that changes what is read from the file itself.
fn check_overlay(layout: &Layout, bitmaps: &[Range<u64>], file_bytes: u64) -> Result<()> {
    if file_bytes < layout.file_bytes {
        return Err(Error::unsupported(format!(
            "its log must be replayed, and makes the file longer, {} bytes: run diskplane check --repair all",
            layout.file_bytes
        )));
    }
    let tables_end = TABLES_AT[1] + TABLE_BYTES as u64;
    let mut known = layout.tables().split_off(2);
    known.push(TABLES_AT[0]..tables_end);
    known.extend_from_slice(bitmaps);
    let within = |range: &Range<u64>| {
        known
            .iter()
            .any(|k| k.start <= range.start && range.end <= k.end)
    };
    let mut ranges = layout.overlay.ranges();
    match ranges.find(|range| !within(range)) {
        None => Ok(()),
        Some(range) => Err(Error::unsupported(format!(
            "its log must be replayed, and changes bytes {:#x} to {:#x}, which are no tables: run diskplane check --repair \
             all",
            range.start, range.end
        ))),
    }
}

/// Brings an image in order whose last writer did not close it, before it is written to: what its log says is put in
/// place, and the space behind the last block goes back, which may hold what the writer had begun. An image whose headers
/// name no log is left alone. Returns what was done, for people.
///
/// # Errors
///
/// As [`Layout::read`], and what writing fails with: the log counts still then.
pub fn mend(file: &dyn Storage) -> Result<Option<String>> {
    mend_unnamed(file).map_err(|error| error.within(file.name()))
}

fn mend_unnamed(file: &dyn Storage) -> Result<Option<String>> {
    let mut headers = Headers::read(file)?;
    if headers.current.log == Guid::NONE {
        return Ok(None);
    }
    let mut log = Log::read(file, &headers.current)?;
    if let Some(lacks) = headers.lacks() {
        return Err(Error::unsupported(lacks));
    }
    // Before anything else of the file changes (2.2.2).
    let id = Guid::random()?;
    headers
        .update(file, |header| header.file_write = id)
        .context(|| "headers")?;
    log.apply(file).context(|| "log")?;
    let entries = log.entries();
    end_log(&mut headers, file).context(|| "headers")?;
    cut(file, true)?;
    Ok(Some(match entries {
        0 => "its log had no entry that counts, and was emptied".to_owned(),
        entries => format!("{entries} entries of its log were put in place"),
    }))
}

/// What the file has behind the last block: how many bytes; where `really`, they are cut off. None, of a fixed image, or one
/// that is not sound.
pub(super) fn cut(file: &dyn Storage, really: bool) -> Result<u64> {
    let layout = Layout::read(file)?;
    let Ok(blocks) = Blocks::read(&layout, &layout.bat(file)?) else {
        return Ok(0);
    };
    let end = layout.used_end(blocks.end);
    if layout.metadata.fixed || end >= layout.file_bytes {
        return Ok(0);
    }
    if really {
        file.set_len(end)?;
        file.sync()?;
    }
    Ok(layout.file_bytes - end)
}
