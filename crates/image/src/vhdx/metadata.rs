//! The metadata region ([MS-VHDX] 2.6): a table of items, and the items.
//!
//! ```text
//!   0     "metadata"  10 entries │ 32 … entries of 32 bytes: 0 GUID  16 offset  20 length  24 flags
//!   64 K  the items, anywhere from here on
//! ```

use super::guid::Guid;
use super::locator::Locator;
use super::log::View;
use super::{KIB, MIB};
use crate::words::{read_u16_le, read_u32_le, read_u64_le};
use block::{Context, Error, Result};
use std::ops::Range;

/// Bytes of the table: items are behind it.
pub(super) const TABLE_BYTES: u64 = 64 * KIB;

/// Entries of a table, at most.
const ENTRIES_MAX: u16 = 2047;

/// Bytes of an item, at most: what the memory for a parent's names is bounded by.
const ITEM_BYTES_MAX: u64 = MIB;

/// Bytes of the largest disk.
pub const DISK_BYTES_MAX: u64 = 64 << 40;

/// Bytes of the smallest and of the largest block.
pub const BLOCK_BYTES: Range<u64> = MIB..(256 * MIB + 1);

const FILE_PARAMETERS: Guid = Guid::new(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
const DISK_SIZE: Guid = Guid::new(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
const PAGE_83: Guid = Guid::new(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
const LOGICAL_SECTOR: Guid = Guid::new(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: Guid = Guid::new(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
const PARENT_LOCATOR: Guid = Guid::new(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);

const F_USER: u32 = 1;
const F_VIRTUAL_DISK: u32 = 2;
const F_REQUIRED: u32 = 4;

/// File parameters: no block is ever given back.
const LEAVE_ALLOCATED: u32 = 1;
/// File parameters: it lies over a parent.
const HAS_PARENT: u32 = 2;

/// The known items, with the bytes that each has at least.
const KNOWN: [(Guid, &str, u64); 6] = [
    (FILE_PARAMETERS, "file parameters", 8),
    (DISK_SIZE, "virtual disk size", 8),
    (PAGE_83, "page 83 data", 16),
    (LOGICAL_SECTOR, "logical sector size", 4),
    (PHYSICAL_SECTOR, "physical sector size", 4),
    (PARENT_LOCATOR, "parent locator", 20),
];

/// What the metadata say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a payload block: a power of two from 1 MiB to 256 MiB.
    pub block_bytes: u64,
    /// All blocks are there: a fixed image.
    pub fixed: bool,
    /// Bytes of the disk: whole logical sectors.
    pub disk_bytes: u64,
    /// Names the disk to SCSI guests.
    pub page_83: Guid,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector: u32,
    /// Bytes of a physical sector: 512 or 4096.
    pub physical_sector: u32,
    /// What it lies over: a differencing image then.
    pub parent: Option<Locator>,
    /// Where in the file the item with the disk's size is.
    pub disk_size_at: u64,
}

impl Metadata {
    /// Reads those of the metadata region at `region`.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] naming the field that cannot be, [`block::ErrorKind::Unsupported`] for a required
    /// item that is not known.
    pub(super) fn read(view: &View<'_>, region: &Range<u64>) -> Result<Self> {
        let at = region.start;
        Self::read_region(view, region).context(|| format!("metadata at byte {at:#x}"))
    }

    fn read_region(view: &View<'_>, region: &Range<u64>) -> Result<Self> {
        // A region has 1 MiB at least.
        let mut table = vec![0; TABLE_BYTES as usize];
        view.read(region.start, &mut table)?;
        if !table.starts_with(b"metadata") {
            return Err(Error::corrupt("they do not begin with \"metadata\""));
        }
        let count = read_u16_le(&table, 10).unwrap_or(0);
        if count > ENTRIES_MAX {
            return Err(Error::corrupt(format!(
                "entries at byte 10 are {count}: the most is {ENTRIES_MAX}"
            )));
        }
        let mut places: [Option<Range<u64>>; KNOWN.len()] = Default::default();
        for index in 0..usize::from(count) {
            let entry = table
                .get(32 + index * 32..64 + index * 32)
                .unwrap_or_default();
            let id = Guid::at(entry, 0);
            let offset = u64::from(read_u32_le(entry, 16).unwrap_or(0));
            let len = u64::from(read_u32_le(entry, 20).unwrap_or(0));
            let flags = read_u32_le(entry, 24).unwrap_or(0);
            // A user's item may have any GUID.
            let known = KNOWN.iter().position(|(known, ..)| *known == id);
            let Some(number) = known.filter(|_| flags & F_USER == 0) else {
                if flags & F_REQUIRED != 0 {
                    return Err(Error::unsupported(format!(
                        "item {index} ({id}) is required, and not known here"
                    )));
                }
                continue;
            };
            let Some(((_, name, least), place)) = KNOWN.get(number).zip(places.get_mut(number))
            else {
                continue;
            };
            let end = offset + len;
            if offset < TABLE_BYTES
                || end > region.end - region.start
                || !(*least..=ITEM_BYTES_MAX).contains(&len)
            {
                return Err(Error::corrupt(format!(
                    "{name}: has {len} bytes at byte {offset:#x} of the region: it must have from {least} bytes to 1 MiB \
                     behind byte {TABLE_BYTES:#x}, within the region's {} bytes",
                    region.end - region.start
                )));
            }
            if place
                .replace(region.start + offset..region.start + end)
                .is_some()
            {
                return Err(Error::corrupt(format!("{name}: is there twice")));
            }
        }
        let [parameters, size, page_83, logical, physical, locator] = places;
        let item = |number: usize, place: Option<Range<u64>>| -> Result<Vec<u8>> {
            let name = KNOWN.get(number).map_or("item", |(_, name, _)| *name);
            let place = place.ok_or_else(|| Error::corrupt(format!("{name}: is missing")))?;
            // At most `ITEM_BYTES_MAX`.
            let mut bytes = vec![0; (place.end - place.start) as usize];
            view.read(place.start, &mut bytes)?;
            Ok(bytes)
        };
        let disk_size_at = size.as_ref().map_or(0, |place| place.start);
        let parameters = item(0, parameters)?;
        let disk_bytes = read_u64_le(&item(1, size)?, 0).unwrap_or(0);
        let page_83 = Guid::at(&item(2, page_83)?, 0);
        let logical_sector = read_u32_le(&item(3, logical)?, 0).unwrap_or(0);
        let physical_sector = read_u32_le(&item(4, physical)?, 0).unwrap_or(0);
        let block_bytes = u64::from(read_u32_le(&parameters, 0).unwrap_or(0));
        let flags = read_u32_le(&parameters, 4).unwrap_or(0);
        if !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes) {
            return Err(Error::corrupt(format!(
                "file parameters: block size is {block_bytes}: it must be a power of two from 1 MiB to 256 MiB"
            )));
        }
        if flags & !(LEAVE_ALLOCATED | HAS_PARENT) != 0 {
            return Err(Error::unsupported(format!(
                "file parameters: flags at byte 4 are {flags:#x}, known are 1 and 2"
            )));
        }
        for (what, bytes) in [("logical", logical_sector), ("physical", physical_sector)] {
            if bytes != 512 && bytes != 4096 {
                return Err(Error::corrupt(format!(
                    "{what} sector size is {bytes}: it must be 512 or 4096"
                )));
            }
        }
        if !disk_bytes.is_multiple_of(u64::from(logical_sector)) || disk_bytes > DISK_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "virtual disk size is {disk_bytes}: it must be a multiple of the sector size, {logical_sector}, and at \
                 most 64 TiB"
            )));
        }
        let parent = match flags & HAS_PARENT != 0 {
            true => Some(Locator::parse(&item(5, locator)?).context(|| "parent locator")?),
            false => None,
        };
        Ok(Self {
            block_bytes,
            fixed: flags & LEAVE_ALLOCATED != 0 && parent.is_none(),
            disk_bytes,
            page_83,
            logical_sector,
            physical_sector,
            parent,
            disk_size_at,
        })
    }

    /// Those of the file parameters.
    pub(super) fn flags(&self) -> u32 {
        match (&self.parent, self.fixed) {
            (Some(_), _) => HAS_PARENT,
            (None, true) => LEAVE_ALLOCATED,
            (None, false) => 0,
        }
    }

    /// The region's bytes up to the end of the last item. The table has all of its 64 KiB.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Invalid`] for a parent's names that do not fit.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        // Block sizes are of 32 bits.
        let mut parameters = (self.block_bytes as u32).to_le_bytes().to_vec();
        parameters.extend_from_slice(&self.flags().to_le_bytes());
        let mut items = vec![
            (FILE_PARAMETERS, parameters, F_REQUIRED),
            (
                DISK_SIZE,
                self.disk_bytes.to_le_bytes().to_vec(),
                F_REQUIRED | F_VIRTUAL_DISK,
            ),
            (
                PAGE_83,
                self.page_83.0.to_vec(),
                F_REQUIRED | F_VIRTUAL_DISK,
            ),
            (
                LOGICAL_SECTOR,
                self.logical_sector.to_le_bytes().to_vec(),
                F_REQUIRED | F_VIRTUAL_DISK,
            ),
            (
                PHYSICAL_SECTOR,
                self.physical_sector.to_le_bytes().to_vec(),
                F_REQUIRED | F_VIRTUAL_DISK,
            ),
        ];
        if let Some(parent) = &self.parent {
            items.push((PARENT_LOCATOR, parent.to_bytes()?, F_REQUIRED));
        }
        let mut bytes = vec![0; TABLE_BYTES as usize];
        bytes[..8].copy_from_slice(b"metadata");
        // Six at most.
        bytes[10..12].copy_from_slice(&(items.len() as u16).to_le_bytes());
        for (index, (id, item, flags)) in items.iter().enumerate() {
            let at = 32 + index * 32;
            let (offset, len) = (bytes.len() as u32, item.len() as u32);
            bytes[at..at + 16].copy_from_slice(&id.0);
            bytes[at + 16..at + 20].copy_from_slice(&offset.to_le_bytes());
            bytes[at + 20..at + 24].copy_from_slice(&len.to_le_bytes());
            bytes[at + 24..at + 28].copy_from_slice(&flags.to_le_bytes());
            bytes.extend_from_slice(item);
        }
        Ok(bytes)
    }

    /// log2 of the payload blocks that share a sector bitmap block: of 2^23 sectors (2.4).
    pub fn chunk_bits(&self) -> u32 {
        (23 + self.logical_sector.trailing_zeros()) - self.block_bytes.trailing_zeros()
    }

    /// Payload blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.disk_bytes.div_ceil(self.block_bytes)
    }

    /// Entries that the block table must have (2.5).
    pub fn entries(&self) -> u64 {
        let (blocks, bits) = (self.blocks(), self.chunk_bits());
        match self.parent {
            Some(_) => blocks.div_ceil(1 << bits) * ((1 << bits) + 1),
            None => blocks + (blocks.saturating_sub(1) >> bits),
        }
    }
}

/// Where what says that there is a parent goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkPlace {
    /// Of the parent locator, from the region's beginning; `None` where there is to be none.
    pub(super) locator: Option<u64>,
    /// Of the file parameters' flags in the file.
    pub(super) flags_at: u64,
}

/// Changes `table`, the one of the metadata at `region`, so that it has a parent locator of `len` bytes, in place of the
/// one that it may have; `None`: none. What it has was read before without an error.
///
/// # Errors
///
/// [`block::ErrorKind::Invalid`] where there is no room for it.
pub(super) fn relink(
    table: &mut [u8],
    region: &Range<u64>,
    len: Option<usize>,
) -> Result<LinkPlace> {
    let mut count = usize::from(read_u16_le(table, 10).unwrap_or(0));
    let at = |index: usize| 32 + index * 32;
    let number = |table: &[u8], at| u64::from(read_u32_le(table, at).unwrap_or(0));
    let is = |table: &[u8], index: usize, id: Guid| {
        let flags = read_u32_le(table, at(index) + 24).unwrap_or(0);
        Guid::at(table, at(index)) == id && flags & F_USER == 0
    };
    let parameters = (0..count).find(|index| is(table, *index, FILE_PARAMETERS));
    let flags_at = parameters.map_or(0, |index| number(table, at(index) + 16)) + 4;
    // The entries behind the old one's move up.
    if let Some(old) = (0..count).find(|index| is(table, *index, PARENT_LOCATOR)) {
        table.copy_within(at(old + 1)..at(count), at(old));
        if let Some(last) = table.get_mut(at(count - 1)..at(count)) {
            last.fill(0);
        }
        count -= 1;
    }
    let mut locator = None;
    if let Some(len) = len {
        let no_room = || Error::invalid("the metadata region has no room for the parent's names");
        let mut taken: Vec<(u64, u64)> = (0..count)
            .map(|index| (number(table, at(index) + 16), number(table, at(index) + 20)))
            .collect();
        taken.sort_unstable();
        let mut free = TABLE_BYTES;
        for (start, bytes) in taken.into_iter().filter(|(_, bytes)| *bytes > 0) {
            if start >= free + len as u64 {
                break;
            }
            free = free.max((start + bytes).next_multiple_of(8));
        }
        let fits = free + len as u64 <= region.end - region.start;
        let place = table.get_mut(at(count)..at(count + 1));
        let place = place.filter(|_| fits && count < usize::from(ENTRIES_MAX));
        let place = place.ok_or_else(no_room)?;
        place.fill(0);
        let fields = [
            (0, &PARENT_LOCATOR.0[..]),
            // Within a region, which has less than 4 GiB.
            (16, &(free as u32).to_le_bytes()),
            (20, &(len as u32).to_le_bytes()),
            (24, &F_REQUIRED.to_le_bytes()),
        ];
        for (at, field) in fields {
            if let Some(part) = place.get_mut(at..at + field.len()) {
                part.copy_from_slice(field);
            }
        }
        locator = Some(free);
        count += 1;
    }
    if let Some(field) = table.get_mut(10..12) {
        // At most `ENTRIES_MAX`.
        field.copy_from_slice(&(count as u16).to_le_bytes());
    }
    Ok(LinkPlace {
        locator,
        flags_at: region.start + flags_at,
    })
}
