//! Persistent bitmaps: the header extension, directory entries, table entries.
//!
//! ```text
//!   extension   0 bitmaps   4 reserved   8 directory size   16 directory offset
//!   directory   0 table offset   8 table entries   12 flags   16 type   17 granularity bits
//!               18 name length   20 extra data's length   24 … extra data, name, padding to 8
//!   table       55–9 offset of the bits   0 all ones (without an offset)   others reserved
//! ```

use super::Layout;
use crate::qcow2::entry::{OFFSET_MASK, ZERO};
use crate::qcow2::extensions;
use crate::qcow2::features;
use crate::qcow2::header::Header;
use crate::qcow2::{read_u32, read_u64};
use std::ops::RangeInclusive;

/// Most bitmaps (QEMU's limit).
pub const BITMAPS_MAX: u32 = 65535;
/// Largest directory: so many entries with the longest names.
pub const BITMAP_DIRECTORY_BYTES_MAX: u64 = 65535 * (24 + 1024);
/// Bytes of a directory entry before extra data and name.
pub const DIRECTORY_ENTRY_BYTES: usize = 24;

const TABLE_ENTRIES_MAX: u32 = 0x800_0000;
/// Most bytes of a bitmap's data (QEMU's limit).
pub const BITMAP_BYTES_MAX: u64 = 0x2000_0000;
/// Longest name of a bitmap in bytes (QEMU's limit).
pub const BITMAP_NAME_BYTES_MAX: u16 = 1023;
/// What log2 of a bitmap's granularity may be (QEMU's limits).
pub const BITMAP_GRANULARITY_BITS: RangeInclusive<u8> = 9..=31;
/// Flag: the bitmap was not saved after its last use.
pub const BITMAP_IN_USE: u32 = 1 << 0;
/// Flag: the bitmap must be told of all changes.
pub const BITMAP_AUTO: u32 = 1 << 1;
/// Flag: who does not know the extra data may use the bitmap all the same.
pub const BITMAP_EXTRA_COMPATIBLE: u32 = 1 << 2;
const FLAGS_KNOWN: u32 = BITMAP_IN_USE | BITMAP_AUTO;
/// Type: dirty tracking.
pub const BITMAP_DIRTY_TRACKING: u8 = 1;

/// What the header extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// How many bitmaps.
    pub count: u32,
    /// Where the directory is.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
}

impl BitmapDirectory {
    /// The directory of an image; `None` where there is none, or where the autoclear bit says that the
    /// extension is stale. `Err` says what is wrong with the extension.
    pub fn of(header: &Header, layout: &Layout) -> Option<Result<Self, &'static str>> {
        let bytes = header.extension(extensions::BITMAPS)?;
        if header.autoclear & features::BITMAPS == 0 {
            return None;
        }
        Some(Self::parse(bytes, layout))
    }

    fn parse(bytes: &[u8], layout: &Layout) -> Result<Self, &'static str> {
        if bytes.len() != 24 {
            return Err("is not 24 bytes long");
        }
        let short = "is too short";
        let found = Self {
            count: read_u32(bytes, 0).ok_or(short)?,
            len: read_u64(bytes, 8).ok_or(short)?,
            offset: read_u64(bytes, 16).ok_or(short)?,
        };
        if read_u32(bytes, 4) != Some(0) {
            Err("has a reserved field that is not zero")
        } else if found.count == 0 || found.count > BITMAPS_MAX {
            Err("counts none or more than 65535 bitmaps")
        } else if layout.within(found.offset) != 0 || found.offset == 0 {
            Err("points between clusters")
        } else if found.len == 0 || found.len > BITMAP_DIRECTORY_BYTES_MAX {
            Err("has a directory of no or too many bytes")
        } else {
            Ok(found)
        }
    }
}

/// The fixed part of a directory entry that is sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Where its table is.
    pub table: u64,
    /// Entries of that.
    pub entries: u32,
    /// Bytes of the whole directory entry, padding included.
    pub len: u64,
}

impl Bitmap {
    /// Reads and judges the fixed part as QEMU does; `Err` says what is wrong. `size` is the disk's.
    pub fn parse(bytes: &[u8], layout: &Layout, size: u64) -> Result<Self, &'static str> {
        let flags = read_u32(bytes, 12).unwrap_or(0);
        if flags & BITMAP_EXTRA_COMPATIBLE != 0 {
            Err("has reserved flags set")
        } else if read_u32(bytes, 20).unwrap_or(0) != 0 {
            Err("has extra data, which nobody knows")
        } else {
            let bitmap = Self::parse_any(bytes, layout, size)?;
            let granularity = bytes.get(17).copied().unwrap_or(0);
            let bits = size.div_ceil(1 << granularity);
            // It is saved in words of 64 bits.
            let len = bits.div_ceil(64) * 8;
            let entries = len.div_ceil(layout.cluster());
            match flags & BITMAP_IN_USE == 0 && u64::from(bitmap.entries) != entries {
                true => Err("has a table of more entries than its bits need"),
                false => Ok(bitmap),
            }
        }
    }

    /// The same with the extra data that the specification allows.
    pub fn parse_any(bytes: &[u8], layout: &Layout, size: u64) -> Result<Self, &'static str> {
        let short = "ends behind the directory";
        let table = read_u64(bytes, 0).ok_or(short)?;
        let entries = read_u32(bytes, 8).ok_or(short)?;
        let flags = read_u32(bytes, 12).ok_or(short)?;
        let kinds = read_u32(bytes, 16).ok_or(short)?;
        let extra = read_u32(bytes, 20).ok_or(short)?;
        let [kind, granularity, n0, n1] = kinds.to_be_bytes();
        let name = u16::from_be_bytes([n0, n1]);
        let bytes = u64::from(entries) << layout.cluster_bits;
        if table == 0 || layout.within(table) != 0 {
            Err("has a table that is not at a cluster")
        } else if entries == 0 || entries > TABLE_ENTRIES_MAX || bytes > BITMAP_BYTES_MAX {
            Err("has a table of no or too many entries")
        } else if !BITMAP_GRANULARITY_BITS.contains(&granularity) {
            Err("has a granularity outside 2^9 to 2^31")
        } else if flags & !(FLAGS_KNOWN | BITMAP_EXTRA_COMPATIBLE) != 0 {
            Err("has reserved flags set")
        } else if kind != BITMAP_DIRTY_TRACKING {
            Err("is of an unknown type")
        } else if name > BITMAP_NAME_BYTES_MAX {
            Err("has too long a name")
        } else if flags & BITMAP_IN_USE == 0 && size > (bytes * 8) << granularity {
            Err("is too small for the disk")
        } else {
            let len = DIRECTORY_ENTRY_BYTES as u64 + u64::from(extra) + u64::from(name);
            Ok(Self {
                table,
                entries,
                len: len.next_multiple_of(8),
            })
        }
    }
}

/// Where the bits behind a bitmap table's entry lie, 0 for nowhere; `None` for an entry that is not sound.
pub fn bitmap_data(layout: &Layout, raw: u64) -> Option<u64> {
    let offset = raw & OFFSET_MASK;
    let ones = raw & ZERO != 0;
    let sound = raw & !(OFFSET_MASK | ZERO) == 0 && (offset == 0 || !ones);
    (sound && layout.within(offset) == 0).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::super::layout;
    use super::*;

    #[test]
    fn directory_entries_are_judged() {
        let l = layout(16, 4);
        let size = 1 << 30;
        let sound = || {
            let mut bytes = [0; 24];
            bytes[..8].copy_from_slice(&0x5_0000u64.to_be_bytes());
            bytes[8..12].copy_from_slice(&1u32.to_be_bytes());
            bytes[16..20].copy_from_slice(&[1, 16, 0, 5]);
            bytes
        };
        let want = Bitmap {
            table: 0x5_0000,
            entries: 1,
            len: 32,
        };
        assert_eq!(Bitmap::parse(&sound(), &l, size), Ok(want));
        assert!(Bitmap::parse(&sound()[..23], &l, size).is_err());
        for (at, value) in [
            (6, 2),
            (5, 0),
            (11, 0),
            (8, 9),
            (12, 1),
            (16, 2),
            (17, 8),
            (17, 32),
            (18, 4),
            (23, 1),
        ] {
            let mut bytes = sound();
            bytes[at] = value;
            assert!(
                Bitmap::parse(&bytes, &l, size).is_err(),
                "byte {at} = {value}"
            );
        }
        // 64 KiB of bits at 512 bytes each cover 256 MiB, unless nobody trusts them anyway.
        let mut bytes = sound();
        bytes[17] = 9;
        assert!(Bitmap::parse(&bytes, &l, size).is_err());
        bytes[15] = 1;
        assert!(Bitmap::parse(&bytes, &l, size).is_ok());
    }

    #[test]
    fn table_entries_are_judged() {
        let l = layout(16, 4);
        for (raw, want) in [
            (0, Some(0)),
            (1, Some(0)),
            (0x5_0000, Some(0x5_0000)),
            (0x5_0001, None),
            (0x5_0200, None),
            (2, None),
            (1 << 56, None),
        ] {
            assert_eq!(bitmap_data(&l, raw), want, "{raw:#x}");
        }
    }
}
