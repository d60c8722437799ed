//! The batmap, an extension of XenServer's tools: a bit for each block that says that all its sectors are the image's, so
//! that nobody need look at its bitmap.
//!
//! ```text
//!   … block table │ header "tdbatmap": offset, sectors, version, checksum │ map, block 0 the highest bit │ …
//! ```
//!
//! It is believed where its checksum is right, and written only when an image is emptied: blocks that became whole since have no bit, which only
//! costs a look at their bitmaps.

use super::footer::Footer;
use super::header::{BLOCK_BYTES, Header};
use crate::words::{read_u32, read_u64};
use block::{Result, Storage};

const COOKIE: &[u8] = b"tdbatmap";

/// Bytes of its header's sector.
const HEADER_BYTES: u64 = 512;

/// Bytes of the largest map that is read: of 2 TiB.
const MAP_BYTES_MAX: u64 = 128 << 10;

/// A batmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batmap {
    /// Where what belongs to it ends, headers included.
    pub end: u64,
    /// Its bits, or why they do not count.
    pub map: std::result::Result<Vec<u8>, String>,
}

impl Batmap {
    /// Reads that of an image, where there is one: tapdisk made the image, from version 1.1 on.
    ///
    /// # Errors
    ///
    /// What reading the file fails with.
    pub(super) fn read(
        file: &dyn Storage,
        footer: &Footer,
        header: &Header,
        file_bytes: u64,
    ) -> Result<Option<Self>> {
        if !footer.by_tapdisk() || footer.creator_version <= 1 || header.block_bytes != BLOCK_BYTES
        {
            return Ok(None);
        }
        let at = header.table_offset + header.table_bytes();
        if at + HEADER_BYTES > file_bytes {
            return Ok(None);
        }
        let mut bytes = [0; HEADER_BYTES as usize];
        file.read_at(at, &mut bytes)?;
        if !bytes.starts_with(COOKIE) {
            return Ok(None);
        }
        let offset = read_u64(&bytes, 8).unwrap_or(0);
        let sectors = u64::from(read_u32(&bytes, 16).unwrap_or(0));
        let version = read_u32(&bytes, 20).unwrap_or(0);
        let sum = read_u32(&bytes, 24).unwrap_or(0);
        // As many bytes are summed up as the disk has use for, in whole sectors.
        let len = (footer.current_size >> 24).max(1).next_multiple_of(512);
        let end = offset.checked_add(sectors * 512);
        let fault = if len > MAP_BYTES_MAX || len > sectors * 512 {
            Some(format!("has {sectors} sectors for a map of {len} bytes"))
        } else if offset < at + HEADER_BYTES || end.is_none_or(|end| end > file_bytes) {
            Some(format!("has its map at byte {offset:#x}"))
        } else if version > 0x0001_0002 {
            Some(format!(
                "has version {}.{}",
                version >> 16,
                version & 0xffff
            ))
        } else {
            None
        };
        if let Some(fault) = fault {
            let map = Err(format!("batmap at byte {at:#x}: {fault}"));
            return Ok(Some(Self {
                end: at + HEADER_BYTES,
                map,
            }));
        }
        let mut map = vec![0; len as usize];
        file.read_at(offset, &mut map)?;
        // In version 1.1 the bytes are signed.
        let signed = version == 0x0001_0001;
        let right = !map.iter().fold(0u32, |all, byte| {
            all.wrapping_add(match signed {
                true => i32::from(byte.cast_signed()).cast_unsigned(),
                false => u32::from(*byte),
            })
        });
        let end = end.unwrap_or(u64::MAX);
        let map = match right == sum {
            true => Ok(map),
            false => Err(format!(
                "batmap at byte {at:#x}: checksum is {sum:#010x}, its map gives {right:#010x}"
            )),
        };
        Ok(Some(Self { end, map }))
    }

    /// Says of no block any more that it is whole, durably. Until the checksum is right the map does not count.
    ///
    /// # Errors
    ///
    /// What the host fails with.
    pub(super) fn clear(&self, file: &dyn Storage, header: &Header) -> Result<()> {
        let Ok(map) = &self.map else { return Ok(()) };
        let at = header.table_offset + header.table_bytes();
        let mut bytes = [0; HEADER_BYTES as usize];
        file.read_at(at, &mut bytes)?;
        let offset = read_u64(&bytes, 8).unwrap_or(0);
        file.write_zeroes(offset, map.len() as u64, false)?;
        file.sync()?;
        // The complement of a sum of zeros.
        if let Some(sum) = bytes.get_mut(24..28) {
            sum.fill(0xff);
        }
        file.write_at(at, &bytes)?;
        file.sync()
    }

    /// Whether all sectors of `block` are the image's.
    pub fn has(&self, block: u64) -> bool {
        let map = self.map.as_deref().unwrap_or_default();
        let byte = map.get((block / 8) as usize).copied().unwrap_or(0);
        byte << (block % 8) & 0x80 != 0
    }
}
