//! Growing disk images of Bochs, for reading (sources: Bochs' `iodev/hdimage/hdimage.h`, QEMU's `block/bochs.c`).
//!
//! ```text
//!   header, 512 bytes │ catalog: an entry for each extent │ bitmap, extent │ bitmap, extent │ …
//!
//!    0  "Bochs Virtual HD Image"     72  entries of the catalog
//!   32  "Redolog"                    76  bytes of a bitmap
//!   48  "Growing"                    80  bytes of an extent, a power of two
//!   64  version: 1.0 or 2.0          84  bytes of the disk (version 1.0), or
//!   68  bytes of the header          88  bytes of the disk (version 2.0)
//! ```
//!
//! All numbers are little-endian. An entry of the catalog is the number of an extent in the file, behind its bitmap, each of
//! which has whole sectors; bit *n* of the bitmap, the lowest of a byte first, says that sector *n* was written. What was not
//! reads as zeros.
//!
//! The catalog is kept in memory, bitmaps in frames as far as they were asked for last.

#[cfg(test)]
mod tests;

use crate::contract::{
    Description, Extent, ExtentKind, FileId, Image, Load, Plan, Step, ZeroMode, ZeroPlan,
    reading_only, why_reading_only,
};
use crate::head;
use crate::metadata::bitmaps::Order;
use crate::metadata::{Ask, Reading, step};
use crate::words::{read_u32_le, read_u64_le};
use block::{Error, GuestOffset, HostOffset, Result, Storage, limits, size};

/// Where an image has its strings, each up to a NUL.
pub const MAGIC: [(usize, &[u8]); 3] = [
    (0, b"Bochs Virtual HD Image\0"),
    (32, b"Redolog\0"),
    (48, b"Growing\0"),
];

/// Bytes of the header.
pub const HEADER_BYTES: usize = 512;
/// Most entries of a catalog, as in QEMU: what the largest image of bximage has (8 TiB).
pub const ENTRIES_MAX: u32 = 1 << 20;
/// Largest extent, as in QEMU.
pub const EXTENT_BYTES_MAX: u32 = 8 << 20;

const VERSION_1: u32 = 0x0001_0000;
const VERSION_2: u32 = 0x0002_0000;
/// An entry of an extent that is not there.
const ABSENT: u32 = u32::MAX;
const SECTOR: u64 = 512;
/// Bytes of the catalog that are read at a time.
const CHUNK: usize = 64 << 10;
/// Memory for bitmaps, of 2 KiB each at most.
const CACHE_BYTES: u64 = 4 << 20;

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where the catalog is.
    pub header_bytes: u64,
    /// Entries of the catalog.
    pub entries: u32,
    /// Bytes of a bitmap in the file.
    pub bitmap_bytes: u64,
    /// Bytes of an extent.
    pub extent_bytes: u64,
    /// Bytes of the disk: whole sectors.
    pub disk_bytes: u64,
}

/// Whether `start`, the first bytes of a file, are those of such an image.
pub fn shows(start: &[u8]) -> bool {
    let has = |(at, magic): &(usize, &[u8])| start.get(*at..).is_some_and(|s| s.starts_with(magic));
    let version = read_u32_le(start, 64);
    MAGIC.iter().all(has) && matches!(version, Some(VERSION_1 | VERSION_2))
}

impl Header {
    /// Parses the first sector of a file.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for what cannot be, [`block::ErrorKind::Unsupported`] for what is too large; the field is named.
    pub fn parse(raw: &[u8; HEADER_BYTES]) -> Result<Self> {
        let word = |at| read_u32_le(raw, at).unwrap_or(0);
        if !shows(raw) {
            return Err(Error::corrupt(
                "header: not that of a growing disk image of Bochs, of version 1.0 or 2.0",
            ));
        }
        let wrong = |field: &str, at: usize, what: String| {
            Error::corrupt(format!("header: {field} at byte {at} {what}"))
        };
        let (header_bytes, entries) = (word(68), word(72));
        if header_bytes < HEADER_BYTES as u32 {
            let what = format!("is {header_bytes}: it has {HEADER_BYTES} at least");
            return Err(wrong("bytes of the header", 68, what));
        }
        if entries > ENTRIES_MAX {
            return Err(Error::unsupported(format!(
                "header: entries of the catalog at byte 72 are {entries}: the most is {ENTRIES_MAX}"
            )));
        }
        let (bitmap, extent) = (word(76), word(80));
        if !extent.is_power_of_two() || extent < SECTOR as u32 || extent > EXTENT_BYTES_MAX {
            let what = format!("is {extent}: it must be a power of two from 512 to 8M");
            return Err(wrong("bytes of an extent", 80, what));
        }
        let sectors = extent / SECTOR as u32;
        if u64::from(bitmap) * 8 < u64::from(sectors) {
            let what = format!("is {bitmap}: an extent has {sectors} sectors");
            return Err(wrong("bytes of a bitmap", 76, what));
        }
        let at = if word(64) == VERSION_1 { 84 } else { 88 };
        let disk = read_u64_le(raw, at).unwrap_or(0);
        if disk > limits::DISK_BYTES_MAX {
            let what = format!("is {disk}: the most is {}", limits::DISK_BYTES_MAX);
            return Err(wrong("bytes of the disk", at, what));
        }
        let disk_bytes = disk & !(SECTOR - 1);
        if u64::from(entries) < disk_bytes.div_ceil(u64::from(extent)) {
            let what = format!(
                "are {entries}: too few for a disk of {disk_bytes} bytes in extents of {extent}"
            );
            return Err(wrong("entries of the catalog", 72, what));
        }
        Ok(Self {
            header_bytes: u64::from(header_bytes),
            entries,
            bitmap_bytes: u64::from(bitmap).next_multiple_of(SECTOR),
            extent_bytes: u64::from(extent),
            disk_bytes,
        })
    }

    /// Where the bitmap is of the extent with that number in the file.
    fn bitmap_at(&self, number: u32) -> u64 {
        let extents = self.header_bytes + u64::from(self.entries) * 4;
        // Less than 2^32 times less than 2^33.
        extents
            .saturating_add(u64::from(number).saturating_mul(self.bitmap_bytes + self.extent_bytes))
    }

    /// Bytes of a bitmap that count: those of an extent's sectors, in whole sectors.
    fn bits_bytes(&self) -> u64 {
        (self.extent_bytes / SECTOR / 8)
            .max(1)
            .next_multiple_of(SECTOR)
    }

    /// Bytes that all bitmaps lie behind the beginning of a sector.
    fn skew(&self) -> u64 {
        self.bitmap_at(0) % SECTOR
    }

    /// Bytes that are loaded of a bitmap, from the beginning of a sector on: an odd number of these, since a load is aligned to
    /// what its length is a multiple of.
    fn load_bytes(&self) -> u64 {
        let sectors = (self.skew() + self.bits_bytes()).div_ceil(SECTOR);
        (sectors | 1) * SECTOR
    }
}

/// An open image.
#[derive(Debug)]
pub struct Bochs {
    name: String,
    header: Header,
    catalog: Vec<u32>,
    file_bytes: u64,
    bitmaps: Reading,
}

impl Bochs {
    /// Opens the image in `file`, for reading.
    ///
    /// # Errors
    ///
    /// As [`Header::parse`]; what reading fails with.
    pub fn open(file: &dyn Storage) -> Result<Self> {
        let name = file.name();
        Self::open_unnamed(file).map_err(|error| error.within(name))
    }

    fn open_unnamed(file: &dyn Storage) -> Result<Self> {
        let file_bytes = file.len()?;
        let header = Header::parse(&head::read(file, file_bytes)?)?;
        let mut at = header.header_bytes;
        let end = at + u64::from(header.entries) * 4;
        if end > file_bytes {
            return Err(Error::corrupt(format!(
                "the catalog of {} entries ends at byte {end:#x}, but the file at byte {file_bytes:#x}: it is cut off",
                header.entries
            )));
        }
        // At most 4 MiB.
        let mut catalog = Vec::with_capacity(header.entries as usize);
        let mut chunk = Vec::new();
        while at < end {
            chunk.resize((end - at).min(CHUNK as u64) as usize, 0);
            file.read_at(at, &mut chunk)?;
            let entries = chunk.as_chunks::<4>().0.iter();
            catalog.extend(entries.map(|entry| u32::from_le_bytes(*entry)));
            at += chunk.len() as u64;
        }
        let frames = (CACHE_BYTES / header.load_bytes()).min(u64::from(header.entries).max(1));
        let bits = header.load_bytes() * 8;
        Ok(Self {
            name: file.name(),
            catalog,
            file_bytes,
            bitmaps: Reading::new(
                file.name(),
                u64::from(header.entries),
                frames as usize,
                bits,
                Order::LowFirst,
            ),
            header,
        })
    }

    /// An extent that lies behind the end of the file.
    fn outside(&self, extent: u64, number: u32) -> Error {
        Error::corrupt(format!(
            "{}: extent {extent}: its catalog entry at byte {:#x} is {number}: it ends behind the file, which is cut off",
            self.name,
            self.header.header_bytes + extent * 4
        ))
    }

    fn map_at(&self, at: GuestOffset, len: u64) -> Ask<Extent> {
        let header = &self.header;
        let (extent, within) = (at.0 / header.extent_bytes, at.0 % header.extent_bytes);
        let len = len.min(header.extent_bytes - within);
        let entry = self.catalog.get(extent as usize).copied();
        let Some(number) = entry.filter(|number| *number != ABSENT) else {
            return Ok(Extent {
                len,
                kind: ExtentKind::Unallocated,
            });
        };
        let bitmap = header.bitmap_at(number);
        if bitmap.saturating_add(header.bits_bytes()) > self.file_bytes {
            return Err(self.outside(extent, number).into());
        }
        let (first, end) = (within / SECTOR, (within + len).div_ceil(SECTOR));
        // At most 3 KiB.
        let at = (bitmap - header.skew(), header.load_bytes() as u32);
        let skew = header.skew() * 8;
        let run = self.bitmaps.ask(extent, at, |bitmaps| {
            bitmaps.run(extent, first + skew, end + skew)
        })?;
        let len = len.min((first + run.sectors) * SECTOR - within);
        if !run.present {
            return Ok(Extent {
                len,
                kind: ExtentKind::Unallocated,
            });
        }
        let host = bitmap + header.bitmap_bytes + within;
        match self.file_bytes.saturating_sub(host) {
            0 => Err(self.outside(extent, number).into()),
            there => Ok(Extent {
                len: len.min(there),
                kind: ExtentKind::Data {
                    file: FileId::IMAGE,
                    offset: HostOffset(host),
                },
            }),
        }
    }
}

impl Image for Bochs {
    fn describe(&self) -> Description {
        let used = self.catalog.iter().filter(|entry| **entry != ABSENT);
        Description {
            read_only_because: Some(why_reading_only("bochs")),
            facts: vec![(
                "extents",
                format!(
                    "{} of {} are there, of {} each",
                    used.count(),
                    self.header.entries,
                    size::human(self.header.extent_bytes)
                ),
            )],
            ..Description::new("bochs", self.header.disk_bytes, 1)
        }
    }

    fn size(&self) -> u64 {
        self.header.disk_bytes
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        step(self.map_at(at, len))
    }

    fn plan_write(&self, _: GuestOffset, _: u64) -> Result<Step<Plan>> {
        Err(reading_only(&self.name, "bochs"))
    }

    fn plan_zero(&self, _: GuestOffset, _: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        Err(reading_only(&self.name, "bochs"))
    }

    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        self.bitmaps.end_load(load, Some(bytes))
    }

    fn load_failed(&self, load: &Load) {
        let _ = self.bitmaps.end_load(load, None);
    }
}
