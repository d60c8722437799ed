//! Headers of sparse extents. All numbers are little-endian; offsets and sizes are sectors of 512 bytes.
//!
//! Hosted sparse extents (specification: "Hosted Sparse Extent Header"):
//!
//! ```text
//!    0 magic "KDMV"       20 grain size           48 redundant grain directory    73 "\n \r\n"
//!    4 version            28 descriptor's offset  56 grain directory              77 compression: 0, 1 deflate
//!    8 flags              36 descriptor's size    64 overhead: where grains begin
//!   12 capacity           44 entries of a table   72 unclean shutdown
//! ```
//!
//! ESX server sparse extents (specification: "ESX Server Sparse Extent") begin with `COWD`; those of space-efficient disks
//! are described by QEMU's `block/vmdk.c` only.

use crate::head::wrong;
use block::{Error, Result, Storage, align_up, limits};

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;
/// The first four bytes of a hosted sparse extent.
pub const MAGIC: [u8; 4] = *b"KDMV";
/// The first four bytes of an ESX server sparse extent.
pub const COWD_MAGIC: [u8; 4] = *b"COWD";
/// Flag: the four bytes behind the header tell whether line ends were changed in transfer.
pub const F_NEW_LINES: u32 = 1;
/// Flag: there is a redundant grain directory.
pub const F_REDUNDANT: u32 = 1 << 1;
/// Flag: a grain table entry of 1 stands for zeros.
pub const F_ZEROED_GRAIN: u32 = 1 << 2;
/// Flag: grains are compressed.
pub const F_COMPRESSED: u32 = 1 << 16;
/// Flag: grains and tables are announced by markers.
pub const F_MARKERS: u32 = 1 << 17;
/// The grain directory's offset where the footer has it.
pub const GD_AT_END: u64 = u64::MAX;
/// Compression: none, or each grain as a zlib stream.
pub const DEFLATE: u16 = 1;
/// Entries of a grain table as every program makes them.
pub const TABLE_ENTRIES: u32 = 512;
/// The four bytes at 73 of a header that no text transfer has changed.
pub const NEW_LINES: [u8; 4] = *b"\n \r\n";
/// Bytes of a grain at most, and of a compressed one.
pub const GRAIN_BYTES_MAX: u64 = 64 << 20;
/// See above.
pub const COMPRESSED_GRAIN_BYTES_MAX: u64 = 2 << 20;
/// Entries of a grain directory at most: 32 MiB in memory.
pub const DIRECTORY_ENTRIES_MAX: u64 = 4 << 20;
/// A grain table entry that stands for zeros.
pub(crate) const ZEROED: u32 = 1;
/// Kinds of markers: the end of the stream, the footer.
pub(crate) const MARKER_END: u32 = 0;
pub(crate) const MARKER_FOOTER: u32 = 3;

/// The header of a hosted sparse extent. Sectors where nothing else is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 1 to 3.
    pub version: u32,
    /// See the constants.
    pub flags: u32,
    /// Of the disk.
    pub capacity: u64,
    /// Of a grain.
    pub grain: u64,
    /// Where the descriptor is; 0 without one.
    pub descriptor: u64,
    /// Of the descriptor.
    pub descriptor_len: u64,
    /// Entries of a grain table.
    pub table_entries: u32,
    /// Where the redundant grain directory is.
    pub redundant: u64,
    /// Where the grain directory is, or [`GD_AT_END`].
    pub directory: u64,
    /// Where grains begin.
    pub overhead: u64,
    /// A writer did not come to its end.
    pub unclean: bool,
    /// 0, or [`DEFLATE`].
    pub compression: u16,
    /// Bytes 73 to 76.
    pub new_lines: [u8; 4],
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    field.map_or(0, u32::from_le_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    field.map_or(0, u64::from_le_bytes)
}

impl Header {
    /// The header in `bytes`, 512 of them, without a judgement.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let short = |at: usize| u16::from_le_bytes([at_byte(bytes, at), at_byte(bytes, at + 1)]);
        bytes.starts_with(&MAGIC).then(|| Self {
            version: u32_at(bytes, 4),
            flags: u32_at(bytes, 8),
            capacity: u64_at(bytes, 12),
            grain: u64_at(bytes, 20),
            descriptor: u64_at(bytes, 28),
            descriptor_len: u64_at(bytes, 36),
            table_entries: u32_at(bytes, 44),
            redundant: u64_at(bytes, 48),
            directory: u64_at(bytes, 56),
            overhead: u64_at(bytes, 64),
            unclean: at_byte(bytes, 72) != 0,
            new_lines: [73, 74, 75, 76].map(|at| at_byte(bytes, at)),
            compression: short(77),
        })
    }

    /// As the file has it: 512 bytes.
    pub fn to_bytes(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        let mut put = |at: usize, field: &[u8]| {
            let room = bytes.iter_mut().skip(at);
            room.zip(field).for_each(|(to, from)| *to = *from);
        };
        put(0, &MAGIC);
        put(4, &self.version.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &self.grain.to_le_bytes());
        put(28, &self.descriptor.to_le_bytes());
        put(36, &self.descriptor_len.to_le_bytes());
        put(44, &self.table_entries.to_le_bytes());
        put(48, &self.redundant.to_le_bytes());
        put(56, &self.directory.to_le_bytes());
        put(64, &self.overhead.to_le_bytes());
        put(72, &[u8::from(self.unclean)]);
        put(73, &self.new_lines);
        put(77, &self.compression.to_le_bytes());
        bytes
    }

    /// Reads the header of `file`, or what its footer has in its place.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] and `Unsupported`, naming the field.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        let bytes = sector(file, 0)?;
        let Some(header) = Self::parse(&bytes) else {
            return Err(wrong("magic", 0, "is not that of a sparse extent (KDMV)"));
        };
        if header.flags & F_NEW_LINES != 0 && header.new_lines != NEW_LINES {
            return Err(wrong(
                "line ends",
                73,
                "were changed: the file was transferred as text, and is damaged",
            ));
        }
        if header.directory != GD_AT_END {
            return Ok(header);
        }
        // Specification: "Stream-Optimized Compressed Sparse Extents". The footer is followed by an end-of-stream marker.
        let end = align_up(file.len()?, SECTOR);
        let Some(at) = end.checked_sub(3 * SECTOR).filter(|at| *at >= SECTOR) else {
            return Err(wrong(
                "grain directory",
                56,
                "is in a footer, which the file lacks",
            ));
        };
        let markers = (sector(file, at)?, sector(file, at + 2 * SECTOR)?);
        let footer = Self::parse(&sector(file, at + SECTOR)?);
        let is = |marker: &[u8], kind| u32_at(marker, 8) == 0 && u32_at(marker, 12) == kind;
        let footer = footer.filter(|footer| {
            is(&markers.0, MARKER_FOOTER)
                && is(&markers.1, MARKER_END)
                && u64_at(&markers.1, 0) == 0
                && footer.directory != GD_AT_END
        });
        footer.ok_or_else(|| {
            Error::corrupt(format!(
                "its footer, behind the marker at byte {at:#x}, is none: the file was cut off, or is still being written"
            ))
        })
    }

    /// Whether grains are compressed.
    pub fn is_compressed(&self) -> bool {
        self.compression == DEFLATE
    }

    /// Entries that the grain directory needs.
    pub fn directory_entries(&self) -> u64 {
        self.capacity
            .div_ceil(self.grain.max(1))
            .div_ceil(u64::from(self.table_entries.max(1)))
    }

    /// Whether what it says can be.
    ///
    /// # Errors
    ///
    /// As [`Header::read`].
    pub fn validate(&self, file_bytes: u64) -> Result<()> {
        if !(1..=3).contains(&self.version) {
            return Err(Error::unsupported(format!(
                "header: version {}: 1 to 3 are known",
                self.version
            )));
        }
        if self.compression > DEFLATE {
            return Err(Error::unsupported(format!(
                "header: compression {} at byte 77: 0 (none) and 1 (deflate) are known",
                self.compression
            )));
        }
        let most = match self.is_compressed() {
            true => COMPRESSED_GRAIN_BYTES_MAX,
            false => GRAIN_BYTES_MAX,
        };
        if !self.grain.is_power_of_two() || self.grain > most / SECTOR {
            return Err(wrong(
                "grain size",
                20,
                format_args!(
                    "is {} sectors: it must be a power of two, at most {}",
                    self.grain,
                    most / SECTOR
                ),
            ));
        }
        // Tables of 512 are in all files; of others QEMU reads smaller ones.
        if !self.table_entries.is_power_of_two()
            || !(128..=TABLE_ENTRIES).contains(&self.table_entries)
        {
            return Err(Error::unsupported(format!(
                "header: grain tables of {} entries (byte 44): 512, 256 and 128 are known",
                self.table_entries
            )));
        }
        if self.capacity == 0 || self.capacity > limits::DISK_BYTES_MAX / SECTOR {
            return Err(wrong(
                "capacity",
                12,
                format_args!("is {} sectors", self.capacity),
            ));
        }
        check_directory(
            "grain directory",
            56,
            self.directory,
            self.directory_entries() * 4,
            file_bytes,
        )?;
        if self.flags & F_REDUNDANT != 0 {
            let entries = self.directory_entries();
            check_directory(
                "redundant grain directory",
                48,
                self.redundant,
                entries * 4,
                file_bytes,
            )?;
        }
        if self.overhead > file_bytes.div_ceil(SECTOR) {
            return Err(wrong(
                "overhead",
                64,
                format_args!(
                    "is {} sectors: the file ends before, at byte {file_bytes:#x}",
                    self.overhead
                ),
            ));
        }
        Ok(())
    }
}

/// Whether a grain directory of `bytes` at sector `at` lies in the file, and is not too large.
pub(super) fn check_directory(
    field: &str,
    byte: usize,
    at: u64,
    bytes: u64,
    file_bytes: u64,
) -> Result<()> {
    if bytes > DIRECTORY_ENTRIES_MAX * 8 {
        return Err(Error::unsupported(format!(
            "header: {field}: of {bytes} bytes, the most is {}: the disk is too large for its grains",
            DIRECTORY_ENTRIES_MAX * 8
        )));
    }
    let end = at.checked_mul(SECTOR).and_then(|at| at.checked_add(bytes));
    if at == 0 || end.is_none_or(|end| end > align_up(file_bytes, SECTOR)) {
        return Err(wrong(
            field,
            byte,
            format_args!(
                "is sector {at}, for {bytes} bytes: it must lie in the file, which ends at byte {file_bytes:#x}"
            ),
        ));
    }
    Ok(())
}

fn at_byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

/// The 512 bytes at `at`; zeros behind the end of the file.
pub(crate) fn sector(file: &dyn Storage, at: u64) -> Result<Vec<u8>> {
    crate::metadata::read_short(file, at, SECTOR as usize)
}

/// The tables of an ESX server sparse extent, which are read only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cowd {
    /// Sectors of the disk.
    pub(crate) capacity: u64,
    /// Sectors of a grain.
    pub(crate) grain: u64,
    /// Where the grain directory is.
    pub(crate) directory: u64,
}

impl Cowd {
    /// Entries of a grain table.
    pub(crate) const TABLE_ENTRIES: u64 = 4096;

    pub(crate) fn read(file: &dyn Storage) -> Result<Self> {
        let bytes = sector(file, 0)?;
        let field = |at| u64::from(u32_at(&bytes, at));
        if field(4) != 1 {
            return Err(Error::unsupported(format!(
                "header: version {}: 1 is known",
                field(4)
            )));
        }
        let cowd = Self {
            capacity: field(12),
            grain: field(16),
            directory: field(20),
        };
        if !cowd.grain.is_power_of_two() || cowd.grain > GRAIN_BYTES_MAX / SECTOR {
            return Err(wrong(
                "grain size",
                16,
                format_args!("is {} sectors", cowd.grain),
            ));
        }
        let needed = cowd
            .capacity
            .div_ceil(cowd.grain)
            .div_ceil(Self::TABLE_ENTRIES);
        if cowd.capacity == 0 || needed > field(24) {
            return Err(wrong(
                "grain directory",
                24,
                format_args!("has {} entries, the disk needs {needed}", field(24)),
            ));
        }
        check_directory(
            "grain directory",
            20,
            cowd.directory,
            needed * 4,
            file.len()?,
        )?;
        Ok(cowd)
    }
}

/// The tables of an extent of a space-efficient disk, which are read only. Sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Se {
    pub(crate) capacity: u64,
    pub(crate) directory: u64,
    pub(crate) directory_entries: u64,
    pub(crate) tables: u64,
    pub(crate) grains: u64,
}

impl Se {
    /// Entries of a grain table: 64 sectors of 8 bytes each.
    pub(crate) const TABLE_ENTRIES: u64 = 4096;
    /// Sectors of a grain.
    pub(crate) const GRAIN: u64 = 8;

    pub(crate) fn read(file: &dyn Storage) -> Result<Self> {
        let bytes = sector(file, 0)?;
        let field = |nth: usize| u64_at(&bytes, nth * 8);
        if field(0) != 0xcafe_babe {
            return Err(wrong("magic", 0, "is not that of a SESPARSE extent"));
        }
        let known = [
            (1, "version", 0x0000_0002_0000_0001),
            (3, "grain size", Self::GRAIN),
            (4, "grain table size", 64),
            (5, "flags", 0),
        ];
        for (nth, name, want) in known {
            if field(nth) != want {
                return Err(Error::unsupported(format!(
                    "header: {name} at byte {} is {:#x}: only {want:#x} is known",
                    nth * 8,
                    field(nth)
                )));
            }
        }
        let rest = bytes.get(208..).unwrap_or_default();
        if (6..10).any(|nth| field(nth) != 0) || rest.iter().any(|b| *b != 0) {
            return Err(Error::unsupported("header: reserved fields are in use"));
        }
        let volatile_at = field(10).checked_mul(SECTOR);
        let volatile = volatile_at.map_or_else(|| Ok(Vec::new()), |at| sector(file, at))?;
        if u64_at(&volatile, 0) != 0xcafe_cafe {
            return Err(wrong("volatile header", 80, "is none"));
        }
        if u64_at(&volatile, 24) != 0 {
            return Err(Error::unsupported(
                "it was not closed cleanly: its journal would have to be replayed, which only ESX can",
            ));
        }
        let se = Self {
            capacity: field(2),
            directory: field(16),
            directory_entries: field(17).saturating_mul(SECTOR / 8),
            tables: field(18),
            grains: field(24),
        };
        let needed = se
            .capacity
            .div_ceil(Self::GRAIN)
            .div_ceil(Self::TABLE_ENTRIES);
        if se.capacity == 0
            || se.capacity > limits::DISK_BYTES_MAX / SECTOR
            || needed > se.directory_entries
            || se.grains > limits::DISK_BYTES_MAX / SECTOR
        {
            return Err(wrong(
                "capacity",
                16,
                format_args!("is {} sectors, more than its tables have", se.capacity),
            ));
        }
        check_directory(
            "grain directory",
            128,
            se.directory,
            needed * 8,
            file.len()?,
        )?;
        Ok(se)
    }

    /// Where the table of a grain directory entry begins, in bytes; 0 for none. What is no entry is misaligned.
    pub(crate) fn table(&self, raw: u64) -> u64 {
        let number = raw & 0xffff_ffff;
        match raw >> 32 {
            0 if raw == 0 => 0,
            0x1000_0000 => self
                .tables
                .checked_add(number * 64)
                .and_then(|sector| sector.checked_mul(SECTOR))
                .unwrap_or(4),
            _ => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_the_same_after_writing() {
        let header = Header {
            version: 3,
            flags: F_NEW_LINES | F_REDUNDANT | F_COMPRESSED,
            capacity: 1 << 40,
            grain: 128,
            descriptor: 1,
            descriptor_len: 20,
            table_entries: 512,
            redundant: 21,
            directory: 77,
            overhead: 256,
            unclean: true,
            compression: DEFLATE,
            new_lines: NEW_LINES,
        };
        assert_eq!(Header::parse(&header.to_bytes()), Some(header.clone()));
        assert_eq!(header.to_bytes()[72..79], *b"\x01\n \r\n\x01\0");
        assert_eq!(Header::parse(&[0; 512]), None);
    }
}
