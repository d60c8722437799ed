//! Another parent, or nothing above it: what commit and rebase change of an image that nobody uses.
//!
//! ```text
//!   another parent   one entry of the log: the parent locator, the metadata's table, the flag in the file parameters
//!   no parent        0 what has no bit becomes zeros, in its place
//!                    1 entries of the log: blocks that are there in part are there, and chunks have no bitmaps
//!                    2 as above: one entry of the log
//!   emptied          1 entries of the log: no block is there   2 the file is cut
//! ```
//!
//! Each step is durable before the next. One entry of the log changes all or nothing; where several are needed each leaves
//! an image that reads as before: what is made zeros the parent has as zeros, what is taken out the parent has.

use super::bat::{self, Bat, Entry};
use super::log::SECTORS_MAX;
use super::metadata::{self, TABLE_BYTES};
use super::open::{Blocks, cut};
use super::resize::Changes;
use super::{Guid, Headers, Layout, Locator, Metadata, mend};
use crate::words::each_gap;
use block::{Error, Result, Storage};

/// Sectors of the block table that one entry of the log changes.
const AT_ONCE: usize = SECTORS_MAX / 2;

/// Makes what `parent` says the parent of the image in `file`, which nobody else may use; `None`: it gets none.
///
/// # Errors
///
/// `Invalid` for names that do not fit; `Unsupported` for an image without a log, or without room for the entries that an
/// image over a parent has; as [`mend`], and what the host fails with. The image has its old parent then.
pub fn set_parent(file: &dyn Storage, parent: Option<&Locator>) -> Result<()> {
    let mut editor = Editor::open(file)?;
    let set = editor.set_parent(parent);
    set.map_err(|error| error.within(file.name()))
}

/// Takes everything out of the differencing image in `file`, which nobody else may use: it reads as its parent then, which
/// has it all.
///
/// # Errors
///
/// `Unsupported` for another image, and for one without a log; as [`mend`], and what the host fails with.
pub fn empty(file: &dyn Storage) -> Result<()> {
    let mut editor = Editor::open(file)?;
    let emptied = editor.empty();
    emptied.map_err(|error| error.within(file.name()))
}

/// An image that is being changed.
struct Editor<'a> {
    file: &'a dyn Storage,
    layout: Layout,
    headers: Headers,
}

impl<'a> Editor<'a> {
    fn open(file: &'a dyn Storage) -> Result<Self> {
        mend(file)?;
        let layout = Layout::read(file)?;
        let lacks = match layout.log.is_empty() {
            true => Some("it has no log, without which it cannot be changed".to_owned()),
            false => layout.headers.lacks(),
        };
        if let Some(lacks) = lacks {
            return Err(Error::unsupported(lacks).within(file.name()));
        }
        let headers = layout.headers.clone();
        Ok(Self {
            file,
            layout,
            headers,
        })
    }

    /// Before anything else of the file changes ([MS-VHDX] 2.2.2). What the disk reads as stays, and so does its GUID.
    fn announce(&mut self) -> Result<()> {
        let id = Guid::random()?;
        self.headers
            .update(self.file, |header| header.file_write = id)
    }

    fn commit(&mut self, changes: Changes) -> Result<()> {
        let end = self.file.len()?;
        changes.commit(self.file, &self.layout, &mut self.headers, end)
    }

    fn set_parent(&mut self, parent: Option<&Locator>) -> Result<()> {
        let old = &self.layout.metadata;
        let new = Metadata {
            parent: parent.cloned(),
            fixed: old.fixed && parent.is_none(),
            ..old.clone()
        };
        let (start, room) = {
            let region = &self.layout.regions.bat;
            (region.start, (region.end - region.start) / 8)
        };
        if new.entries() > room {
            return Err(Error::unsupported(format!(
                "an image over a parent has {} entries in its block table, and there is room for {room}: convert it",
                new.entries()
            )));
        }
        let table = self.layout.bat(self.file)?;
        let blocks = Blocks::read(&self.layout, &table)?;
        blocks.check_apart(old, &table)?;
        let mut changes = Changes::default();
        let region = self.layout.regions.metadata.clone();
        // The region has 1 MiB at least.
        let mut items = vec![0; TABLE_BYTES as usize];
        self.file.read_at(region.start, &mut items)?;
        let item = parent.map(Locator::to_bytes).transpose()?;
        let place = metadata::relink(&mut items, &region, item.as_ref().map(Vec::len))?;
        changes.put_changed(self.file, region.start, &items)?;
        if let (Some(at), Some(item)) = (place.locator, &item) {
            changes.put(self.file, region.start + at, item)?;
        }
        changes.put(self.file, place.flags_at, &new.flags().to_le_bytes())?;
        for index in old.entries()..new.entries() {
            changes.put(self.file, start + index * 8, &[0; 8])?;
        }
        self.announce()?;
        if parent.is_none() && old_parent(&self.layout) {
            self.make_whole(&table)?;
        }
        self.commit(changes)
    }

    /// Makes whole blocks of those that are there in part, and takes the sector bitmaps away.
    fn make_whole(&mut self, table: &Bat) -> Result<()> {
        let metadata = &self.layout.metadata;
        let entries = metadata.entries();
        let mut partial = Vec::new();
        table.each(entries, |index, entry| {
            if entry.state() == Some(bat::PARTIAL) {
                partial.push((index, entry.offset()));
            }
        });
        for (index, offset) in &partial {
            if let Some(block) = table.block(*index) {
                self.clear_rest(table, block, *offset)?;
            }
        }
        self.file.sync()?;
        self.rewrite(table, |index, entry| match table.block(index) {
            Some(_) if entry.state() == Some(bat::PARTIAL) => {
                Some(Entry::new(bat::PRESENT, entry.offset()))
            }
            Some(_) => None,
            None => Some(Entry::new(bat::NOT_PRESENT, 0)),
        })
    }

    /// Makes zeros of what a block at `offset` has where it has no bit. Nobody sees it: it is the parent's.
    fn clear_rest(&self, table: &Bat, block: u64, offset: u64) -> Result<()> {
        let metadata = &self.layout.metadata;
        let sector = u64::from(metadata.logical_sector);
        let (bits, chunk) = (metadata.block_bytes / sector, metadata.chunk_bits());
        let bitmap = table.get(table.bitmap_index(block >> chunk)).offset();
        let within = (block & ((1 << chunk) - 1)) * bits / 8;
        // At most 64 KiB: of 256 MiB in sectors of 512 bytes.
        let mut map = vec![0; (bits / 8) as usize];
        self.file.read_at(bitmap + within, &mut map)?;
        let has = |nth: u64| {
            let byte = map.get((nth / 8) as usize).copied().unwrap_or(0);
            byte >> (nth % 8) & 1 == 1
        };
        // Of the last block the file may have what the disk has.
        let left = metadata.disk_bytes - block * metadata.block_bytes;
        let bits = bits.min(left.div_ceil(sector));
        each_gap(bits, has, |gap| {
            let at = offset + gap.start * sector;
            let len = (gap.end - gap.start) * sector;
            self.file.write_zeroes(at, len, false)
        })
    }

    /// Puts what `change` makes of entries in their place, in the table's order.
    fn rewrite(&mut self, table: &Bat, change: impl Fn(u64, Entry) -> Option<Entry>) -> Result<()> {
        let mut sectors: Vec<u64> = Vec::new();
        for index in 0..self.layout.metadata.entries() {
            let entry = table.get(index);
            if let Some(new) = change(index, entry).filter(|new| *new != entry) {
                table.set(index, new);
                let sector = index / bat::SECTOR_ENTRIES;
                if sectors.last() != Some(&sector) {
                    sectors.push(sector);
                }
            }
        }
        for some in sectors.chunks(AT_ONCE) {
            let mut changes = Changes::default();
            for sector in some {
                let bytes = table.sector(*sector);
                let at = self.layout.regions.bat.start + sector * bytes.len() as u64;
                changes.put_changed(self.file, at, &bytes)?;
            }
            self.commit(changes)?;
        }
        Ok(())
    }

    fn empty(&mut self) -> Result<()> {
        if !old_parent(&self.layout) {
            return Err(Error::unsupported(
                "it has no parent that could have it all",
            ));
        }
        let table = self.layout.bat(self.file)?;
        Blocks::read(&self.layout, &table)?.check_apart(&self.layout.metadata, &table)?;
        self.announce()?;
        self.rewrite(&table, |_, _| Some(Entry::new(bat::NOT_PRESENT, 0)))?;
        cut(self.file, true).map(|_| ())
    }
}

fn old_parent(layout: &Layout) -> bool {
    layout.metadata.parent.is_some()
}
