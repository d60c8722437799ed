//! The file identifier and the two headers ([MS-VHDX] 2.2.1 and 2.2.2).
//!
//! ```text
//!   0      "vhdxfile" │ creator, UTF-16, 512 bytes
//!   64 K   header 1   │ 4096 bytes:
//!   128 K  header 2   │  0 "head"  4 checksum  8 sequence number  16 FileWriteGuid  32 DataWriteGuid
//!                     │ 48 LogGuid  64 log version  66 version  68 log length  72 log offset
//! ```
//!
//! The header with the higher sequence number counts. A change is written to the other one, which counts then, so
//! that a crash leaves one of them; and a second time, so that both say the same.

use super::crc;
use super::guid::Guid;
use super::{KIB, MIB};
use crate::words::{read_u16_le, read_u32_le, read_u64_le};
use block::{Error, Result, Storage};

/// What a file begins with.
pub const SIGNATURE: [u8; 8] = *b"vhdxfile";

/// Bytes of a header.
pub const HEADER_BYTES: usize = 4096;

/// Where the headers are.
pub const HEADERS_AT: [u64; 2] = [64 * KIB, 128 * KIB];

/// Bytes at the file's beginning that hold identifier, headers and region tables.
pub const HEAD_BYTES: u64 = MIB;

/// The highest sequence number with which an image is still written to: it must be able to count.
const SEQUENCE_MAX: u64 = u64::MAX - (1 << 32);

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The higher one counts.
    pub sequence: u64,
    /// Changes with the first write after an open.
    pub file_write: Guid,
    /// Changes with the first write after an open that a reader of the disk could see.
    pub data_write: Guid,
    /// Which entries of the log count; [`Guid::NONE`] when none do.
    pub log: Guid,
    /// The log's version, of which 0 is known.
    pub log_version: u16,
    /// Bytes of the log, a multiple of 1 MiB.
    pub log_bytes: u32,
    /// Where the log is, a multiple of 1 MiB.
    pub log_offset: u64,
}

impl Header {
    /// Reads one. The inner error says why it does not count.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Unsupported`] for a version that is not known: no damage, so that the other is no better.
    fn parse(bytes: &[u8]) -> Result<Result<Self, String>> {
        let u32_at = |at| read_u32_le(bytes, at).unwrap_or(0);
        if !bytes.starts_with(b"head") {
            return Ok(Err("it does not begin with \"head\"".to_owned()));
        }
        let (found, right) = (u32_at(4), crc::of_structure(bytes));
        if found != right {
            return Ok(Err(format!(
                "checksum at byte 4 is {found:#010x}, its bytes give {right:#010x}"
            )));
        }
        let version = read_u16_le(bytes, 66).unwrap_or(0);
        if version != 1 {
            return Err(Error::unsupported(format!(
                "header: version at byte 66 is {version}, known is 1"
            )));
        }
        Ok(Ok(Self {
            sequence: read_u64_le(bytes, 8).unwrap_or(0),
            file_write: Guid::at(bytes, 16),
            data_write: Guid::at(bytes, 32),
            log: Guid::at(bytes, 48),
            log_version: read_u16_le(bytes, 64).unwrap_or(0),
            log_bytes: u32_at(68),
            log_offset: read_u64_le(bytes, 72).unwrap_or(0),
        }))
    }

    /// Its bytes, with the checksum.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, b"head");
        put(8, &self.sequence.to_le_bytes());
        put(16, &self.file_write.0);
        put(32, &self.data_write.0);
        put(48, &self.log.0);
        put(64, &self.log_version.to_le_bytes());
        put(66, &1u16.to_le_bytes());
        put(68, &self.log_bytes.to_le_bytes());
        put(72, &self.log_offset.to_le_bytes());
        crc::seal(&mut bytes);
        bytes
    }

    /// Where the log is in a file of `file_bytes`: nothing where there is none.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for a place that cannot be, [`block::ErrorKind::Unsupported`] for a log of a
    /// version that is not known.
    pub(super) fn log_range(&self, file_bytes: u64) -> Result<std::ops::Range<u64>> {
        let (at, len) = (self.log_offset, u64::from(self.log_bytes));
        if self.log != Guid::NONE && self.log_version != 0 {
            return Err(Error::unsupported(format!(
                "header: log version at byte 64 is {}, known is 0",
                self.log_version
            )));
        }
        if len == 0 {
            return Ok(0..0);
        }
        let end = at.checked_add(len).filter(|end| *end <= file_bytes);
        match end {
            Some(end) if at >= HEAD_BYTES && at.is_multiple_of(MIB) && len.is_multiple_of(MIB) => {
                Ok(at..end)
            }
            _ => Err(Error::corrupt(format!(
                "header: the log at byte {at:#x} with {len} bytes: both must be multiples of 1 MiB, behind the first \
                 and within the file of {file_bytes} bytes"
            ))),
        }
    }
}

/// Both headers of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The one that counts.
    pub current: Header,
    /// Which it is: 0 or 1.
    pub index: usize,
    /// What is wrong with the other.
    pub damaged: Option<String>,
}

impl Headers {
    /// Reads the identifier and both headers.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] where there is no telling what counts, [`block::ErrorKind::Unsupported`] for a
    /// version that is not known.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        let file_bytes = file.len()?;
        if file_bytes < HEAD_BYTES {
            return Err(Error::corrupt(format!(
                "of {file_bytes} bytes: too short for a VHDX image, which has 1 MiB of headers"
            )));
        }
        let mut signature = [0; 8];
        file.read_at(0, &mut signature)?;
        if signature != SIGNATURE {
            return Err(Error::corrupt("it does not begin with \"vhdxfile\""));
        }
        let mut found = Vec::with_capacity(2);
        for at in HEADERS_AT {
            let mut bytes = [0; HEADER_BYTES];
            file.read_at(at, &mut bytes)?;
            let header = Header::parse(&bytes)?;
            found.push(header.map_err(|why| format!("header at byte {at:#x}: {why}")));
        }
        let second = found.pop();
        match (found.pop(), second) {
            (Some(Ok(first)), Some(Ok(second))) => {
                // Microsoft's disk2vhd makes two that are the same.
                if first.sequence == second.sequence && first != second {
                    return Err(Error::corrupt(format!(
                        "both headers have sequence number {}, and say different things",
                        first.sequence
                    )));
                }
                let index = usize::from(second.sequence > first.sequence);
                Ok(Self {
                    current: if index == 1 { second } else { first },
                    index,
                    damaged: None,
                })
            }
            (Some(Ok(current)), Some(Err(why))) => Ok(Self {
                current,
                index: 0,
                damaged: Some(why),
            }),
            (Some(Err(why)), Some(Ok(current))) => Ok(Self {
                current,
                index: 1,
                damaged: Some(why),
            }),
            (Some(Err(first)), Some(Err(second))) => Err(Error::corrupt(format!(
                "no header is sound: {first}; {second}"
            ))),
            _ => Err(Error::corrupt("no header")),
        }
    }

    /// Makes the other header the one that counts, changed by `change`. Returns where it is to be written, and its
    /// bytes.
    pub(super) fn turn(&mut self, change: impl FnOnce(&mut Header)) -> (u64, [u8; HEADER_BYTES]) {
        self.index ^= 1;
        self.current.sequence = self.current.sequence.saturating_add(1);
        change(&mut self.current);
        let at = HEADERS_AT.get(self.index).copied().unwrap_or(HEADERS_AT[0]);
        (at, self.current.to_bytes())
    }

    /// Writes what `change` makes of the header into both, durably.
    ///
    /// # Errors
    ///
    /// What writing fails with: what counts then is the header before, or the new one.
    pub(super) fn update(
        &mut self,
        file: &dyn Storage,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let (at, bytes) = self.turn(change);
        file.write_at(at, &bytes)?;
        file.sync()?;
        let (at, bytes) = self.turn(|_| {});
        file.write_at(at, &bytes)?;
        file.sync()?;
        self.damaged = None;
        Ok(())
    }

    /// Why no header can be written any more.
    pub(super) fn lacks(&self) -> Option<String> {
        (self.current.sequence > SEQUENCE_MAX).then(|| {
            format!(
                "the header's sequence number is {}: it cannot be counted on",
                self.current.sequence
            )
        })
    }
}
