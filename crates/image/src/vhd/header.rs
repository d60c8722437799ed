//! The dynamic disk header (specification: "Dynamic Disk Header Format"), 1024 bytes.
//!
//! ```text
//!     0  cookie "cxsparse"      32  block size             64  parent's name, UTF-16 big-endian, 512 bytes
//!    16  offset of the table    36  checksum              576  8 parent locators of 24 bytes
//!    24  version                40  parent's unique id
//!    28  entries of the table   56  parent's time stamp
//! ```

use super::footer::{UniqueId, checksum};
use super::geometry::MAX_SECTORS;
use crate::words::{read_u32, read_u64};
use block::{Error, Result};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 1024;

/// What a header begins with.
pub const COOKIE: [u8; 8] = *b"cxsparse";

/// Bytes of the parent's name.
pub const NAME_BYTES: usize = 512;

/// Parent locators of a header.
pub const LOCATORS: usize = 8;

/// Block size of new images in bytes.
pub const BLOCK_BYTES: u32 = 2 << 20;

/// Blocks of the largest table: what the memory for a table is bounded by.
pub const BLOCKS_MAX: u64 = 1 << 23;

const CHECKSUM: usize = 36;
const NAME: usize = 64;
const LOCATOR: usize = 576;

/// Where one of the parent's names is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Locator {
    /// Its kind: `MACX`, `W2ku`, `W2ru`, …; zeros for none.
    pub code: [u8; 4],
    /// The field for the space that it has: in sectors says the specification, in bytes say most programs.
    pub space: u32,
    /// Bytes of the name.
    pub len: u32,
    /// Where it is in the file.
    pub offset: u64,
}

impl Locator {
    /// Bytes set aside for it: small numbers are sectors.
    pub fn space_bytes(&self) -> u64 {
        match self.space {
            sectors @ 0..512 => u64::from(sectors) * 512,
            bytes => u64::from(bytes),
        }
    }
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where the block allocation table is.
    pub table_offset: u64,
    /// Its entries.
    pub table_entries: u32,
    /// Bytes of a block: a power of two.
    pub block_bytes: u32,
    /// The parent's unique id; zeros for a raw parent, and for none.
    pub parent_id: UniqueId,
    /// When the parent was changed last, seconds since 2000.
    pub parent_timestamp: u32,
    /// The parent's file name without directories.
    pub parent_name: String,
    /// Where its names are.
    pub locators: [Locator; LOCATORS],
    raw: Vec<u8>,
}

/// Puts the checksum of a whole header right.
fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes, CHECKSUM);
    bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
}

impl Header {
    /// A header for a disk of `blocks` blocks, with the table right behind it.
    pub fn new(table_offset: u64, table_entries: u32, block_bytes: u32) -> Self {
        let mut raw = vec![0; HEADER_BYTES];
        raw[..8].copy_from_slice(&COOKIE);
        raw[8..16].fill(0xff);
        raw[25] = 1; // Version 1.0.
        Self {
            table_offset,
            table_entries,
            block_bytes,
            parent_id: UniqueId::NONE,
            parent_timestamp: 0,
            parent_name: String::new(),
            locators: [Locator::default(); LOCATORS],
            raw,
        }
    }

    /// Reads a header.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for one that is none, or that contradicts itself, and
    /// [`block::ErrorKind::Unsupported`] for a version that is not known.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self> {
        let u32_at = |at| read_u32(bytes, at).unwrap_or(0);
        let u64_at = |at| read_u64(bytes, at).unwrap_or(0);
        if !bytes.starts_with(&COOKIE) {
            return Err(Error::corrupt(
                "header: it does not begin with \"cxsparse\"",
            ));
        }
        let (found, right) = (u32_at(CHECKSUM), checksum(bytes, CHECKSUM));
        if found != right {
            return Err(Error::corrupt(format!(
                "header: checksum at byte {CHECKSUM} is {found:#010x}, its bytes give {right:#010x}"
            )));
        }
        if u32_at(24) >> 16 != 1 {
            return Err(Error::unsupported(format!(
                "header: version at byte 24 is {}.{}, known is 1.0",
                u32_at(24) >> 16,
                u32_at(24) & 0xffff
            )));
        }
        let block_bytes = u32_at(32);
        if !block_bytes.is_power_of_two() || block_bytes < 512 {
            return Err(Error::corrupt(format!(
                "header: block size at byte 32 is {block_bytes}: it must be a power of two from 512 on"
            )));
        }
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[40..56]);
        let mut locators = [Locator::default(); LOCATORS];
        for (index, locator) in locators.iter_mut().enumerate() {
            let at = LOCATOR + index * 24;
            *locator = Locator {
                code: u32_at(at).to_be_bytes(),
                space: u32_at(at + 4),
                len: u32_at(at + 8),
                offset: u64_at(at + 16),
            };
        }
        let name = bytes[NAME..NAME + NAME_BYTES].as_chunks::<2>().0;
        let units = name.iter().map(|unit| u16::from_be_bytes(*unit));
        let units = units.take_while(|unit| *unit != 0);
        let name = char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER));
        Ok(Self {
            table_offset: u64_at(16),
            table_entries: u32_at(28),
            block_bytes,
            parent_id: UniqueId(id),
            parent_timestamp: u32_at(56),
            parent_name: name.collect(),
            locators,
            raw: bytes.to_vec(),
        })
    }

    /// Its bytes, with the checksum. Of the parent's name what fits.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.raw.clone();
        bytes.resize(HEADER_BYTES, 0);
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(16, &self.table_offset.to_be_bytes());
        put(28, &self.table_entries.to_be_bytes());
        put(32, &self.block_bytes.to_be_bytes());
        put(40, &self.parent_id.0);
        put(56, &self.parent_timestamp.to_be_bytes());
        let mut name: Vec<u8> = self
            .parent_name
            .encode_utf16()
            .flat_map(u16::to_be_bytes)
            .collect();
        name.resize(NAME_BYTES, 0);
        put(NAME, &name);
        for (index, locator) in self.locators.iter().enumerate() {
            let at = LOCATOR + index * 24;
            put(at, &locator.code);
            put(at + 4, &locator.space.to_be_bytes());
            put(at + 8, &locator.len.to_be_bytes());
            put(at + 12, &[0; 4]);
            put(at + 16, &locator.offset.to_be_bytes());
        }
        seal(&mut bytes);
        bytes
    }

    /// Its bytes as they were read, but for where the table is and how many entries it has: that is in the first sector.
    pub fn with_table(&self) -> Vec<u8> {
        let mut bytes = self.raw.clone();
        bytes.resize(HEADER_BYTES, 0);
        bytes[16..24].copy_from_slice(&self.table_offset.to_be_bytes());
        bytes[28..32].copy_from_slice(&self.table_entries.to_be_bytes());
        seal(&mut bytes);
        bytes
    }

    /// Bytes of the block allocation table on disk, whole sectors.
    pub fn table_bytes(&self) -> u64 {
        (u64::from(self.table_entries) * 4).next_multiple_of(512)
    }

    /// Bytes of a block's bitmap, whole sectors.
    pub fn bitmap_bytes(&self) -> u64 {
        (u64::from(self.block_bytes) / 512)
            .div_ceil(8)
            .next_multiple_of(512)
    }

    /// Whether the table can hold a disk of `bytes`, and is no larger than one may be.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] when it cannot, [`block::ErrorKind::Unsupported`] above the bound.
    pub fn check_table(&self, bytes: u64) -> Result<()> {
        let entries = u64::from(self.table_entries);
        let needed = bytes.div_ceil(u64::from(self.block_bytes));
        if entries < needed {
            return Err(Error::corrupt(format!(
                "header: table entries at byte 28 are {entries}, the disk has {needed} blocks"
            )));
        }
        // A table for 2 TiB, which XenServer's tools make, has a few more than a disk can have.
        let most = ((MAX_SECTORS + (8 << 21)) * 512 / u64::from(self.block_bytes)).min(BLOCKS_MAX);
        if entries > most {
            return Err(Error::unsupported(format!(
                "header: table entries at byte 28 are {entries}: with blocks of {} bytes at most {most} are read",
                self.block_bytes
            )));
        }
        if !self.table_offset.is_multiple_of(512) {
            return Err(Error::corrupt(format!(
                "header: offset of the table at byte 16 is {:#x}, no multiple of 512",
                self.table_offset
            )));
        }
        Ok(())
    }
}
