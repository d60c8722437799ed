//! Apple's disk images (UDIF), for reading (source: QEMU's `block/dmg.c`; Apple describes them nowhere).
//!
//! ```text
//!   chunks: bytes as they are, zlib, bzip2 or LZFSE streams │ property list, or resource fork │ trailer "koly", 512 bytes
//!                                                              tables "mish" of chunks
//! ```
//!
//! All numbers are big-endian. A chunk says which sectors of the disk it has, where its bytes are and how they are packed.
//! Chunks are kept in memory, sorted by sector: 40 bytes each, of tables of 16 MiB at most.
//!
//! Chunks that are packed in a way that nobody here unpacks (ADC, LZFSE, LZMA) are told when they are read, as by QEMU.

mod table;
#[cfg(test)]
mod tests;

pub use table::{TABLES_BYTES_MAX, trailer};

use crate::contract::{
    Compressed, Description, Extent, ExtentKind, FileId, Image, Plan, Step, ZeroMode, ZeroPlan,
    reading_only, why_reading_only,
};
use crate::inflate;
use block::{Error, GuestOffset, HostOffset, Result, Storage};
use table::{Chunk, Kind};

/// Most sectors of a packed chunk, as in QEMU.
pub const CHUNK_SECTORS_MAX: u64 = CHUNK_BYTES_MAX / SECTOR;
/// Most bytes of a chunk in the file, as in QEMU.
pub const CHUNK_BYTES_MAX: u64 = 64 << 20;

const SECTOR: u64 = 512;

/// An open image.
#[derive(Debug)]
pub struct Dmg {
    name: String,
    disk_bytes: u64,
    file_bytes: u64,
    /// By sector; none overlap.
    chunks: Vec<Chunk>,
}

impl Dmg {
    /// Opens the image in `file`, for reading.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for what cannot be, [`block::ErrorKind::Unsupported`] for what is too large; the place is named.
    pub fn open(file: &dyn Storage) -> Result<Self> {
        let name = file.name();
        let read = table::read(file).map_err(|error| error.within(&name))?;
        Ok(Self {
            name,
            disk_bytes: read.sectors * SECTOR,
            file_bytes: file.len()?,
            chunks: read.chunks,
        })
    }

    fn corrupt(&self, chunk: &Chunk, what: &str) -> Error {
        Error::corrupt(format!(
            "{}: the chunk of sector {}, {} bytes at {:#x}, {what}",
            self.name, chunk.sector, chunk.len, chunk.offset
        ))
    }

    /// The chunk that has a sector of the disk, or else the first sector behind it that a chunk has, or could have.
    fn chunk(&self, sector: u64) -> Result<&Chunk, u64> {
        let behind = self.chunks.partition_point(|chunk| chunk.sector <= sector);
        let next = self.chunks.get(behind).map(|chunk| chunk.sector);
        let chunk = behind.checked_sub(1).and_then(|nth| self.chunks.get(nth));
        chunk
            .filter(|chunk| sector - chunk.sector < chunk.count)
            .ok_or(next.unwrap_or(u64::MAX / SECTOR))
    }

    fn map_at(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let sector = at.0 / SECTOR;
        let Ok(chunk) = self.chunk(sector) else {
            return Err(Error::corrupt(format!(
                "{}: no chunk has sector {sector} of the disk",
                self.name
            )));
        };
        let skip = at.0 - chunk.sector * SECTOR;
        // It ends before the last sector that can be.
        let len = len.min((chunk.sector + chunk.count) * SECTOR - at.0);
        let end = chunk.offset.saturating_add(chunk.len);
        let kind = match chunk.kind {
            Kind::Zero => ExtentKind::Zero { host: None },
            Kind::Raw => {
                let there = end.min(self.file_bytes).saturating_sub(chunk.offset);
                return match there.saturating_sub(skip) {
                    0 => Err(self.corrupt(chunk, "has less than its sectors")),
                    there => Ok(Extent {
                        len: len.min(there),
                        kind: ExtentKind::Data {
                            file: FileId::IMAGE,
                            offset: HostOffset(chunk.offset + skip),
                        },
                    }),
                };
            }
            Kind::Unread(_) => {
                return Err(Error::unsupported(format!(
                    "{}: the chunk of sector {} is packed as {}, which is not supported: convert the image with \
                     Apple's hdiutil (hdiutil convert -format UDZO)",
                    self.name,
                    chunk.sector,
                    chunk.kind.name()
                )));
            }
            Kind::Zlib | Kind::Bzip2 => {
                if chunk.len == 0 || end > self.file_bytes {
                    return Err(self.corrupt(chunk, "is not in the file"));
                }
                ExtentKind::Compressed(Compressed {
                    file: FileId::IMAGE,
                    offset: HostOffset(chunk.offset),
                    // All are 64 MiB at most.
                    len: chunk.len as u32,
                    unpacked_len: (chunk.count * SECTOR) as u32,
                    skip: skip as u32,
                    packing: u32::from(chunk.kind == Kind::Bzip2),
                    lasting: true,
                })
            }
        };
        Ok(Extent { len, kind })
    }
}

impl Image for Dmg {
    fn describe(&self) -> Description {
        let mut kinds: Vec<(Kind, u64)> = Vec::new();
        for chunk in &self.chunks {
            match kinds.iter().position(|(kind, _)| *kind == chunk.kind) {
                Some(nth) => kinds
                    .iter_mut()
                    .skip(nth)
                    .take(1)
                    .for_each(|(_, n)| *n += 1),
                // There are few, but of those that nobody knows.
                None if kinds.len() < 8 => kinds.push((chunk.kind, 1)),
                None => {}
            }
        }
        let kinds: Vec<String> = kinds
            .iter()
            .map(|(kind, count)| format!("{count} {}", kind.name()))
            .collect();
        Description {
            read_only_because: Some(why_reading_only("dmg")),
            facts: vec![("chunks", kinds.join(", "))],
            ..Description::new("dmg", self.disk_bytes, 1)
        }
    }

    fn size(&self) -> u64 {
        self.disk_bytes
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        Ok(Step::Done(self.map_at(at, len)?))
    }

    fn unreadable(&self, at: GuestOffset) -> Option<u64> {
        let end = match self.chunk(at.0 / SECTOR) {
            Ok(chunk) => chunk.sector + chunk.count,
            Err(next) => next,
        };
        Some(
            (end * SECTOR)
                .min(self.disk_bytes)
                .saturating_sub(at.0)
                .max(1),
        )
    }

    fn plan_write(&self, _: GuestOffset, _: u64) -> Result<Step<Plan>> {
        Err(reading_only(&self.name, "dmg"))
    }

    fn plan_zero(&self, _: GuestOffset, _: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        Err(reading_only(&self.name, "dmg"))
    }

    fn decompress(&self, cluster: &Compressed, input: &[u8], output: &mut [u8]) -> Result<()> {
        let unpacked = match cluster.packing {
            0 => inflate::zlib(input, output),
            _ => inflate::bzip2(input, output),
        };
        unpacked.map_err(|error| error.within(&self.name))
    }
}
