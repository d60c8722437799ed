//! Opening, closing, and bringing in order what was not closed.
//!
//! **Which footer counts.** The last 512 bytes and, in all but fixed images, the copy in the first 512. Where one is
//! damaged the other serves, as in XenServer's tools. Where both are sound and speak of different images the file is
//! refused: a guest can write a footer where its disk begins, or where a crash left its data at the end of the file.

use super::batmap::Batmap;
use super::footer::{COOKIE, DiskType, EPOCH, FOOTER_BYTES, Footer, SizeFrom, UniqueId};
use super::header::{HEADER_BYTES, Header};
use super::state::State;
use super::tables::{NONE, Tables};
use super::{Vhd, header, locator};
use crate::Parent;
use crate::metadata::Space;
use block::{Context, Error, Result, Storage};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// Bytes of memory for bitmaps, unless [`OpenOptions::cache_bytes`] says otherwise.
const CACHE_BYTES: u64 = 16 << 20;

/// Bitmaps that there is memory for in any case.
const FRAMES_MIN: u64 = 16;

/// Bytes of the table that are read at a time.
const CHUNK: usize = 64 << 10;

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For reading only.
    pub read_only: bool,
    /// Most bytes for bitmaps of blocks that are there in part; 16 MiB when absent.
    pub cache_bytes: Option<u64>,
    /// Which field is the disk's size, whatever the image's creator means by them.
    pub size_from: Option<SizeFrom>,
}

/// What the structures of a file say, before anything is believed of its blocks.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The footer that counts.
    pub footer: Footer,
    /// What is wrong with the one at the end of the file, if it does not count.
    pub end_damaged: Option<String>,
    /// What is wrong with the copy in the first sector, if there should be one and it does not count.
    pub copy_damaged: Option<String>,
    /// The header, of all but fixed images.
    pub header: Option<Header>,
    /// The batmap, in images of XenServer's tools that have one.
    pub batmap: Option<Batmap>,
    /// The parent's names, the best first, of a differencing image.
    pub parent_names: Vec<String>,
    /// What is wrong with other names of it.
    pub parent_faults: Vec<String>,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl Layout {
    /// Reads footer and header.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] where neither footer is sound or the header is not,
    /// [`block::ErrorKind::Unsupported`] for what no code here knows.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        Self::read_sized(file, None)
    }

    /// As [`read`](Self::read), with the disk's size from where it is said.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn read_sized(file: &dyn Storage, size_from: Option<SizeFrom>) -> Result<Self> {
        Self::read_unnamed(file, size_from).map_err(|error| error.within(file.name()))
    }

    fn read_unnamed(file: &dyn Storage, size_from: Option<SizeFrom>) -> Result<Self> {
        let file_bytes = file.len()?;
        let end_at = file_bytes.checked_sub(FOOTER_BYTES as u64).ok_or_else(|| {
            Error::corrupt(format!("of {file_bytes} bytes: too short for a VHD image"))
        })?;
        let end = read_footer(file, end_at)?.context(|| format!("at byte {end_at:#x}"));
        let copy = read_footer(file, 0)?.context(|| "at byte 0");
        let fixed = |footer: &Footer| footer.disk_type == DiskType::Fixed;
        let (footer, end_damaged, copy_damaged) = match (end, copy) {
            (Ok(end), Ok(copy)) if end_at > 0 => {
                let same = end.unique_id == copy.unique_id && end.disk_type == copy.disk_type;
                if !same {
                    return Err(Error::corrupt(format!(
                        "has two footers of different images: at byte {end_at:#x} a {} one with unique id {}, at byte \
                         0 a {} one with {}: no telling which is the image's and which was written by a guest",
                        end.disk_type, end.unique_id, copy.disk_type, copy.unique_id
                    )));
                }
                // The copy is what QEMU believes, and what is written first.
                (copy, None, None)
            }
            (Ok(end), Ok(_)) => (end, None, None),
            (Ok(end), Err(_)) if fixed(&end) => (end, None, None),
            (Ok(end), Err(damaged)) => (end, None, Some(damaged.to_string())),
            (Err(damaged), Ok(copy)) if !fixed(&copy) => (copy, Some(damaged.to_string()), None),
            (Err(error), _) => return Err(error),
        };
        let disk_bytes = footer.disk_bytes_by(size_from)?;
        let header = match footer.disk_type {
            DiskType::Fixed => {
                if disk_bytes > end_at {
                    return Err(Error::corrupt(format!(
                        "the disk has {disk_bytes} bytes, but the file has {end_at} before its footer: it is cut off"
                    )));
                }
                None
            }
            DiskType::Dynamic | DiskType::Differencing => {
                let header = read_header(file, footer.header_offset, file_bytes)?;
                header.check_table(disk_bytes)?;
                let tables = [
                    ("the footer's copy", 0, FOOTER_BYTES as u64),
                    ("the header", footer.header_offset, HEADER_BYTES as u64),
                    ("the block table", header.table_offset, header.table_bytes()),
                ];
                for (what, at, len) in tables {
                    if at.checked_add(len).is_none_or(|end| end > file_bytes) {
                        return Err(Error::corrupt(format!(
                            "{what} has {len} bytes from byte {at:#x} on, but the file ends at byte {file_bytes:#x}"
                        )));
                    }
                }
                for (n, (what, at, len)) in tables.iter().enumerate() {
                    let mut others = tables.iter().skip(n + 1);
                    let hit = others.find(|(_, at2, len2)| *at < at2 + len2 && *at2 < at + len);
                    if let Some((other, at2, _)) = hit {
                        return Err(Error::corrupt(format!(
                            "{what} at byte {at:#x} and {other} at byte {at2:#x} overlap"
                        )));
                    }
                }
                Some(header)
            }
        };
        let mut batmap = None;
        let (mut parent_names, mut parent_faults) = Default::default();
        if let Some(header) = &header {
            batmap = Batmap::read(file, &footer, header, file_bytes)?;
            if footer.disk_type == DiskType::Differencing {
                (parent_names, parent_faults) = locator::names(file, header, file_bytes)?;
                // In the image's own directory, where none of the others leads anywhere.
                let name = &header.parent_name;
                if !name.is_empty()
                    && !name.contains(['/', '\\', ':'])
                    && !parent_names.contains(name)
                {
                    parent_names.push(name.clone());
                }
            }
        }
        Ok(Self {
            footer,
            end_damaged,
            copy_damaged,
            header,
            batmap,
            parent_names,
            parent_faults,
            disk_bytes,
            file_bytes,
        })
    }

    /// Where no block may lie: from the header on and from the table on, what belongs to them.
    pub fn tables(&self) -> [Range<u64>; 2] {
        let Some(header) = &self.header else {
            return [0..0, 0..0];
        };
        let header_at = self.footer.header_offset;
        let table_end = header.table_offset + header.table_bytes();
        let batmap_end = self.batmap.as_ref().map_or(0, |batmap| batmap.end);
        [
            header_at..header_at + HEADER_BYTES as u64,
            header.table_offset..table_end.max(batmap_end),
        ]
    }

    /// Whether `len` bytes at `at` are where no block may lie.
    pub fn is_taken(&self, at: u64, len: u64) -> bool {
        let on_it = |there: &Range<u64>| at < there.end && there.start < at + len;
        let header = self.header.as_ref();
        let differs = self.footer.disk_type == DiskType::Differencing;
        let mut locators = header
            .filter(|_| differs)
            .into_iter()
            .flat_map(|h| &h.locators);
        at < FOOTER_BYTES as u64
            || self.tables().iter().any(on_it)
            || locators.any(|locator| locator.name_at().as_ref().is_some_and(on_it))
    }

    /// Hands all entries of the table out in order.
    ///
    /// # Errors
    ///
    /// What reading the file fails with.
    pub fn entries(&self, file: &dyn Storage, mut each: impl FnMut(u64, u32)) -> Result<()> {
        let Some(header) = &self.header else {
            return Ok(());
        };
        let mut buffer = vec![0; CHUNK];
        let bytes = u64::from(header.table_entries) * 4;
        let mut done = 0;
        while done < bytes {
            let len = (bytes - done).min(CHUNK as u64) as usize;
            let part = buffer.get_mut(..len).unwrap_or_default();
            file.read_at(header.table_offset + done, part)?;
            for (index, entry) in (done / 4..).zip(part.as_chunks::<4>().0) {
                each(index, u32::from_be_bytes(*entry));
            }
            done += len as u64;
        }
        Ok(())
    }

    /// Bytes that a block takes in the file, and of them its bitmap's.
    pub fn block_span(&self) -> (u64, u64) {
        self.header.as_ref().map_or((0, 0), |header| {
            let bitmap = header.bitmap_bytes();
            (bitmap + u64::from(header.block_bytes), bitmap)
        })
    }

    /// Where what is in use ends: blocks, tables, and what XenServer's tools and others keep before the first block.
    pub fn used_end(&self, last_block_end: u64) -> u64 {
        let tables = self.tables();
        let mut end = tables
            .iter()
            .fold(last_block_end, |end, range| end.max(range.end));
        let Some(header) = &self.header else {
            return end;
        };
        let own = header.locators.iter().filter(|l| l.code != [0; 4]);
        let own = own.filter_map(|l| l.offset.checked_add(l.space_bytes()));
        for there in own.filter(|end| *end <= self.file_bytes) {
            end = end.max(there.next_multiple_of(512));
        }
        end
    }
}

/// The footer at `at`; the inner error says why it does not count.
fn read_footer(file: &dyn Storage, at: u64) -> Result<Result<Footer>> {
    let mut bytes = [0; FOOTER_BYTES];
    file.read_at(at, &mut bytes)?;
    match Footer::parse(&bytes) {
        // What is no damage is no reason to look for another.
        Err(error) if error.kind() == block::ErrorKind::Unsupported => Err(error),
        parsed => Ok(parsed),
    }
}

fn read_header(file: &dyn Storage, at: u64, file_bytes: u64) -> Result<Header> {
    let end = at.checked_add(HEADER_BYTES as u64);
    if end.is_none_or(|end| end > file_bytes) || !at.is_multiple_of(512) {
        return Err(Error::corrupt(format!(
            "footer: offset of the header at byte 16 is {at:#x}: it must be a multiple of 512 within the file, which \
             ends at byte {file_bytes:#x}"
        )));
    }
    let mut bytes = [0; HEADER_BYTES];
    file.read_at(at, &mut bytes)?;
    Header::parse(&bytes).context(|| format!("at byte {at:#x}"))
}

/// Whether the last 512 bytes of a file are the footer of a fixed image that is as long as the file.
///
/// # Errors
///
/// What reading the file fails with.
pub fn fixed_footer(file: &dyn Storage) -> Result<bool> {
    let Some(at) = file.len()?.checked_sub(FOOTER_BYTES as u64) else {
        return Ok(false);
    };
    let mut bytes = [0; FOOTER_BYTES];
    file.read_at(at, &mut bytes)?;
    let footer = Footer::parse(&bytes).ok();
    let footer = footer.filter(|f| f.disk_type == DiskType::Fixed && bytes.starts_with(&COOKIE));
    Ok(footer.is_some_and(|f| f.disk_bytes().is_ok_and(|bytes| bytes <= at)))
}

impl Vhd {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// As [`Layout::read`]; and [`block::ErrorKind::Corrupt`] where a block lies behind the end of the file, or, for
    /// writing, on another or on a table.
    pub fn open(file: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        let layout = Layout::read_sized(file, options.size_from)?;
        Self::of(file, layout, options).map_err(|error| error.within(file.name()))
    }

    fn of(file: &dyn Storage, layout: Layout, options: &OpenOptions) -> Result<Self> {
        let blocks = Blocks::read(file, &layout)?;
        if !options.read_only {
            blocks.check_writable(&layout)?;
        }
        let (block_bytes, bitmap_bytes) = match &layout.header {
            Some(header) => (u64::from(header.block_bytes), header.bitmap_bytes()),
            None => (1, 512),
        };
        let count = blocks.entries.len() as u64;
        let cache = options.cache_bytes.unwrap_or(CACHE_BYTES);
        let frames = (cache / bitmap_bytes).max(FRAMES_MIN).min(count) as usize;
        let used_end = layout.used_end(blocks.end);
        let space = Space::new(used_end, layout.file_bytes, blocks.present);
        let lacks = lacks(&layout);
        let tables = Tables::new(blocks.entries, frames, block_bytes / 512);
        if let Some(batmap) = &layout.batmap {
            for block in 0..tables.blocks() {
                if tables.entry(block).is_some() && batmap.has(block) {
                    tables.set_whole(block);
                }
            }
        }
        let parent = parent(&layout);
        Ok(Self {
            name: file.name(),
            disk_type: layout.footer.disk_type,
            size: layout.disk_bytes,
            block_bytes,
            block_bits: block_bytes.trailing_zeros(),
            bitmap_bytes,
            table_offset: layout.header.as_ref().map_or(0, |h| h.table_offset),
            taken: layout.tables(),
            read_only: options.read_only || lacks.is_some(),
            lacks,
            parent,
            tables,
            state: Mutex::new(State::new(frames, count, space)),
            ahead: AtomicBool::new(false),
            footer: layout.footer,
            header: layout.header,
        })
    }

    /// Leaves the file as that of a closed image: nothing behind the last block but the footer.
    pub(super) fn close_blocking(&self, file: &dyn Storage) -> Result<()> {
        let st = self.lock();
        if self.read_only || !st.grown {
            return Ok(());
        }
        put_end(file, st.space.next, &self.footer).map_err(|error| error.within(&self.name))
    }
}

/// The parent of a differencing image.
fn parent(layout: &Layout) -> Option<Parent> {
    let header = layout.header.as_ref()?;
    let id = header.parent_id;
    (layout.footer.disk_type == DiskType::Differencing).then(|| Parent {
        names: layout.parent_names.clone(),
        // Over a raw image there is none.
        unique_ids: Vec::from_iter((id != UniqueId::NONE).then_some(id.0)),
        changed: Some(u64::from(header.parent_timestamp) + EPOCH),
    })
}

/// Why the image may not be written.
pub(super) fn lacks(layout: &Layout) -> Option<String> {
    let footer = &layout.footer;
    (footer.by_tapdisk() && footer.creator_version == 1 && layout.header.is_some()).then(|| {
        "made by tapdisk 0.1, whose bitmaps have another order of bits: convert it with vhd-update".to_owned()
    })
}

/// The blocks of an image.
pub(super) struct Blocks {
    /// Entries of the disk's blocks, and of the rest of their last sector.
    pub(super) entries: Vec<u32>,
    /// Blocks that are there.
    pub(super) present: u64,
    /// Where the last one ends; 0 when there is none.
    pub(super) end: u64,
    /// The last entry that names one.
    last: Option<u64>,
}

impl Blocks {
    /// Whether there are blocks from number `first` on.
    pub(super) fn beyond(&self, first: u64) -> bool {
        self.last.is_some_and(|last| last >= first)
    }

    pub(super) fn read(file: &dyn Storage, layout: &Layout) -> Result<Self> {
        let (span, _) = layout.block_span();
        let block_bytes = layout
            .header
            .as_ref()
            .map_or(1, |h| u64::from(h.block_bytes));
        let wanted = match &layout.header {
            // At most `BLOCKS_MAX`, which `check_table` has seen to.
            Some(header) => {
                let blocks = layout.disk_bytes.div_ceil(block_bytes);
                blocks
                    .next_multiple_of(128)
                    .min(u64::from(header.table_entries))
            }
            None => 0,
        };
        debug_assert!(wanted <= header::BLOCKS_MAX);
        let mut entries = Vec::with_capacity(wanted as usize);
        let (mut end, mut present, mut highest, mut last) = (0, 0, None, None);
        layout.entries(file, |index, entry| {
            if index < wanted {
                entries.push(entry);
            }
            if entry != NONE {
                present += 1;
                last = Some(index);
                let this = u64::from(entry) * 512 + span;
                if this > end {
                    (end, highest) = (this, Some((index, entry)));
                }
            }
        })?;
        if let Some((index, entry)) = highest.filter(|_| end > layout.file_bytes) {
            return Err(Error::corrupt(format!(
                "block {index}: its entry is {entry}: the block ends at byte {end:#x}, but the file at byte {:#x}: it \
                 is cut off",
                layout.file_bytes
            )));
        }
        Ok(Self {
            entries,
            present,
            end,
            last,
        })
    }

    /// No block lies on another or on a table.
    pub(super) fn check_writable(&self, layout: &Layout) -> Result<()> {
        let (span, _) = layout.block_span();
        let sectors = span / 512;
        let mut sorted: Vec<u32> = self
            .entries
            .iter()
            .copied()
            .filter(|e| *e != NONE)
            .collect();
        sorted.sort_unstable();
        let refused = |what: String| {
            Err(Error::corrupt(format!(
                "{what}: it can only be opened for reading, and 'check' says more"
            )))
        };
        let on_table = |entry: &&u32| layout.is_taken(u64::from(**entry) * 512, span);
        if let Some(first) = sorted.iter().find(on_table) {
            return refused(format!(
                "a block at sector {first} lies on the image's tables or its parent's names"
            ));
        }
        let mut pairs = sorted.windows(2);
        let hit = pairs.find(|pair| matches!(pair, [a, b] if u64::from(b - a) < sectors));
        match hit {
            Some([a, b]) => refused(format!(
                "blocks at sectors {a} and {b} overlap: a block has {sectors} sectors"
            )),
            _ => Ok(()),
        }
    }
}

/// Cuts the file off behind what is in use and puts the footer there, durably. On a device, which is as long as it
/// is, the footer goes to its end.
pub(super) fn put_end(file: &dyn Storage, used_end: u64, footer: &Footer) -> Result<()> {
    let end = used_end + FOOTER_BYTES as u64;
    file.set_len(end)?;
    let at = file.len()?.max(end) - FOOTER_BYTES as u64;
    file.write_at(at, &footer.to_bytes())?;
    file.sync()
}

/// Brings an image in order whose last writer did not close it, before it is written to: the footer goes to the end of
/// the file, and what was reserved behind the last block goes back. Nothing else is touched; an image that is in order,
/// or is of no kind that could be out of it, is left alone. Returns what was done, for people.
///
/// # Errors
///
/// As [`Vhd::open`] for writing; the file is as it was then, or in order but for what was being written.
pub fn mend(file: &dyn Storage) -> Result<Option<String>> {
    let layout = Layout::read(file)?;
    let named = |error: Error| error.within(file.name());
    if layout.header.is_none() || lacks(&layout).is_some() {
        return Ok(None);
    }
    let mut done = Vec::new();
    if let Some(damaged) = &layout.copy_damaged {
        file.write_at(0, &layout.footer.to_bytes())?;
        file.sync()?;
        done.push(format!("wrote the footer's copy anew ({damaged})"));
    }
    if let Some(damaged) = &layout.end_damaged {
        let blocks = Blocks::read(file, &layout).map_err(named)?;
        blocks.check_writable(&layout).map_err(named)?;
        let used_end = layout.used_end(blocks.end);
        put_end(file, used_end, &layout.footer).map_err(named)?;
        done.push(format!(
            "wrote the footer behind the last block ({damaged})"
        ));
    }
    Ok((!done.is_empty()).then(|| done.join("; ")))
}
