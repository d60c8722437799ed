//! New images.
//!
//! ```text
//!   1 block table, metadata, region tables   durable
//!   2 identifier and headers, without which the file is no image
//! ```

use super::bat::{self, Entry};
use super::header::{HEAD_BYTES, HEADERS_AT, Header, SIGNATURE};
use super::metadata::{BLOCK_BYTES, DISK_BYTES_MAX};
use super::region::{TABLES_AT, table_bytes};
use super::{Guid, Locator, MIB, Metadata};
use block::{Context, Error, Result, Storage};
use std::ops::Range;

/// Bytes of the smallest log, and of that of an image of which nothing else is said.
pub const LOG_BYTES: u64 = MIB;

/// Bytes of the largest log.
pub const LOG_BYTES_MAX: u64 = (4 << 30) - MIB;

/// What new images say made them.
const CREATOR: &str = concat!("diskplane ", env!("CARGO_PKG_VERSION"));

/// Bytes of the table that are written at a time.
const PIECE: usize = 64 << 10;

/// How to make an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to whole sectors.
    pub size: u64,
    /// All blocks get a place at once.
    pub fixed: bool,
    /// Bytes of a block; chosen by the size, as QEMU does, when absent.
    pub block_bytes: Option<u64>,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Blocks that are not there are zeros, and not only read so. (For differencing images it says nothing.)
    pub zero_blocks: bool,
    /// Bytes of a logical sector of the disk: 512 or 4096.
    pub logical_sector: u32,
    /// Bytes of a physical one.
    pub physical_sector: u32,
    /// What a differencing image lies over.
    pub parent: Option<Locator>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            fixed: false,
            block_bytes: None,
            log_bytes: LOG_BYTES,
            zero_blocks: true,
            logical_sector: 512,
            physical_sector: 512,
            parent: None,
        }
    }
}

/// Where everything goes.
struct Places {
    metadata: Metadata,
    log: Range<u64>,
    bat: Range<u64>,
    items: Range<u64>,
}

impl CreateOptions {
    /// Bytes that the disk will have.
    pub fn disk_bytes(&self) -> u64 {
        block::align_up(self.size, u64::from(self.logical_sector))
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u64 {
        const GIB: u64 = 1 << 30;
        self.block_bytes.unwrap_or(match self.size {
            // As Hyper-V does.
            _ if self.parent.is_some() => 2 * MIB,
            size if size > 32 << 40 => 64 * MIB,
            size if size > 100 * GIB => 32 * MIB,
            size if size > GIB => 16 * MIB,
            _ => 8 * MIB,
        })
    }

    /// Whether an image can be made so.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Invalid`]: why not.
    pub fn validate(&self) -> Result<()> {
        let block_bytes = self.block_bytes();
        if self.size > DISK_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a disk of {} bytes is too large for a VHDX image: the most is 64 TiB",
                self.size
            )));
        }
        if !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes) {
            return Err(Error::invalid(format!(
                "blocks of {block_bytes} bytes: they must be a power of two from 1 MiB to 256 MiB"
            )));
        }
        if !self.log_bytes.is_multiple_of(MIB)
            || !(LOG_BYTES..=LOG_BYTES_MAX).contains(&self.log_bytes)
        {
            return Err(Error::invalid(format!(
                "a log of {} bytes: it must be a multiple of 1 MiB, from there to less than 4 GiB",
                self.log_bytes
            )));
        }
        if self.fixed && self.parent.is_some() {
            return Err(Error::invalid(
                "a fixed image has all of its disk, and no parent",
            ));
        }
        for bytes in [self.logical_sector, self.physical_sector] {
            if bytes != 512 && bytes != 4096 {
                return Err(Error::invalid(format!(
                    "sectors of {bytes} bytes: they must have 512 or 4096"
                )));
            }
        }
        Ok(())
    }

    fn places(&self) -> Result<Places> {
        self.validate()?;
        let metadata = Metadata {
            block_bytes: self.block_bytes(),
            fixed: self.fixed,
            disk_bytes: self.disk_bytes(),
            page_83: Guid::random()?,
            logical_sector: self.logical_sector,
            physical_sector: self.physical_sector,
            parent: self.parent.clone(),
            disk_size_at: 0,
        };
        let log = HEAD_BYTES..HEAD_BYTES + self.log_bytes;
        let entries = match metadata.blocks() {
            // QEMU takes as many for needed by an empty disk (block/vhdx.c, vhdx_calc_bat_entries), and opens none that
            // has fewer. Nothing is written there.
            0 => u64::from(u32::MAX) >> metadata.chunk_bits(),
            _ => metadata.entries(),
        };
        let table = (entries * 8).next_multiple_of(MIB);
        let bat = log.end..log.end + table;
        let items = bat.end..bat.end + MIB;
        Ok(Places {
            metadata,
            log,
            bat,
            items,
        })
    }

    /// Where the blocks of a fixed image are in its file; nothing, of another.
    ///
    /// # Errors
    ///
    /// As [`CreateOptions::validate`].
    pub fn data_range(&self) -> Result<Range<u64>> {
        let Places {
            metadata, items, ..
        } = self.places()?;
        let bytes = match self.fixed {
            true => metadata.blocks() * metadata.block_bytes,
            false => 0,
        };
        Ok(items.end..items.end + bytes)
    }
}

/// Makes an image in `file`, which is a new one: it reads as zeros.
///
/// # Errors
///
/// As [`CreateOptions::validate`], and what writing fails with: the file holds no image then.
pub fn create(file: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let places = options.places()?;
    write(file, options, &places).context(|| format!("{}: create", file.name()))
}

fn write(file: &dyn Storage, options: &CreateOptions, places: &Places) -> Result<()> {
    let Places {
        metadata,
        log,
        bat,
        items,
    } = places;
    // Before anything is written: what the file must have is then there, and reads as zeros.
    file.set_len(options.data_range()?.end)?;
    put_table(file, options, places)?;
    file.write_at(items.start, &metadata.to_bytes()?)?;
    let regions = table_bytes(bat, items);
    for at in TABLES_AT {
        file.write_at(at, &regions)?;
    }
    file.sync()?;
    let mut header = Header {
        sequence: 1,
        file_write: Guid::random()?,
        data_write: Guid::random()?,
        log: Guid::NONE,
        log_version: 0,
        // Less than 4 GiB.
        log_bytes: (log.end - log.start) as u32,
        log_offset: log.start,
    };
    for at in HEADERS_AT {
        file.write_at(at, &header.to_bytes())?;
        header.sequence += 1;
    }
    let mut identifier = SIGNATURE.to_vec();
    identifier.extend(CREATOR.encode_utf16().flat_map(u16::to_le_bytes));
    file.write_at(0, &identifier)?;
    file.sync()
}

/// Writes the table, where it is not all zeros.
fn put_table(file: &dyn Storage, options: &CreateOptions, places: &Places) -> Result<()> {
    let metadata = &places.metadata;
    let state = match (options.fixed, options.zero_blocks) {
        (true, _) => bat::PRESENT,
        (false, true) => bat::ZERO,
        (false, false) => return Ok(()),
    };
    if metadata.parent.is_some() {
        // They would hide what the parent has.
        return Ok(());
    }
    let each = (1u64 << metadata.chunk_bits()) + 1;
    let entries = metadata.entries();
    let mut next = 0;
    let mut at = places.items.end;
    let mut piece = Vec::with_capacity(PIECE);
    while next < entries {
        let start = next;
        piece.clear();
        while next < entries && piece.len() < PIECE {
            // Behind each chunk is the entry of its sector bitmap block.
            let entry = match (next % each == each - 1, state) {
                (true, _) => 0,
                (false, bat::PRESENT) => {
                    at += metadata.block_bytes;
                    Entry::new(state, at - metadata.block_bytes).encode()
                }
                (false, _) => Entry::new(state, 0).encode(),
            };
            piece.extend_from_slice(&entry.to_le_bytes());
            next += 1;
        }
        file.write_at(places.bat.start + start * 8, &piece)?;
    }
    Ok(())
}
