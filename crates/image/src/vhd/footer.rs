//! The footer (specification: "Hard Disk Footer Format"), 512 bytes, numbers big-endian.
//!
//! ```text
//!     0  cookie "conectix"      24  timestamp, s since 2000    56  geometry: cylinders, heads, sectors
//!     8  features               28  creator application        60  disk type
//!    12  file format version    32  creator version            64  checksum
//!    16  offset of the header   36  creator host OS            68  unique id
//!                               40  original size              84  saved state
//!                               48  current size               85  hidden (XenServer's tools)
//! ```
//!
//! A fixed image has it in its last 512 bytes; others there, and a copy in their first.

use super::geometry::{Geometry, MAX_SECTORS};
use crate::words::{read_u32, read_u64};
use block::{Error, Result};
use std::fmt;

/// Bytes of a footer.
pub const FOOTER_BYTES: usize = 512;

/// What a footer begins with.
pub const COOKIE: [u8; 8] = *b"conectix";

/// What XenServer's tools put in the cookie's place of an image that must not be used.
const POISON: [u8; 8] = *b"v_poison";

/// Seconds from 1970 to 2000, the beginning of VHD's time.
pub const EPOCH: u64 = 946_684_800;

/// Where the sum over the other bytes is.
const CHECKSUM: usize = 64;

/// Where XenServer's tools mark what no list shows.
const HIDDEN: usize = 85;

/// What a structure's checksum is to be: the complement of the sum of its bytes, with those of the checksum, the
/// four at `at`, as zeros.
pub(super) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let others = bytes.iter().enumerate();
    let others = others.filter(|(index, _)| !(at..at + 4).contains(index));
    !others.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

/// How an image keeps its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskType {
    /// All of it, as a raw image does, and a footer behind.
    Fixed,
    /// Blocks that were written.
    Dynamic,
    /// Sectors that differ from those of its parent.
    Differencing,
}

impl DiskType {
    fn of(raw: u32) -> Result<Self> {
        match raw {
            2 => Ok(Self::Fixed),
            3 => Ok(Self::Dynamic),
            4 => Ok(Self::Differencing),
            _ => Err(Error::unsupported(format!(
                "footer: disk type at byte 60 is {raw}: there are 2 (fixed), 3 (dynamic) and 4 (differencing)"
            ))),
        }
    }

    fn raw(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }
}

impl fmt::Display for DiskType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        })
    }
}

/// Names an image to those that lie over it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct UniqueId(pub [u8; 16]);

impl UniqueId {
    /// What images over a raw one say.
    pub const NONE: Self = Self([0; 16]);

    /// A new one (RFC 4122, version 4).
    ///
    /// # Errors
    ///
    /// When the kernel gives no random numbers.
    pub fn random() -> Result<Self> {
        let mut id = [0; 16];
        crypto::random(&mut id)?;
        id[6] = id[6] & 0x0f | 0x40;
        id[8] = id[8] & 0x3f | 0x80;
        Ok(Self(id))
    }
}

impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Which field of a footer is the disk's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeFrom {
    /// The current size.
    CurrentSize,
    /// The geometry.
    Geometry,
}

/// A footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// How the image keeps its disk.
    pub disk_type: DiskType,
    /// Where the header is; `u64::MAX` in a fixed image.
    pub header_offset: u64,
    /// When it was created, seconds since 2000.
    pub timestamp: u32,
    /// What created it: `qemu`, `qem2`, `vpc `, `win `, `tap\0`, …
    pub creator: [u8; 4],
    /// Its version: major and minor, 16 bits each.
    pub creator_version: u32,
    /// Bytes of the disk when it was created.
    pub original_size: u64,
    /// Bytes of the disk now, see [`Footer::disk_bytes`].
    pub current_size: u64,
    /// Its geometry.
    pub geometry: Geometry,
    /// Names the image.
    pub unique_id: UniqueId,
    /// It belongs to a machine whose state was saved.
    pub saved_state: bool,
    /// XenServer's tools show it in no list: others lie over it.
    pub hidden: bool,
    /// The bytes that it was read from: what nobody here knows is kept.
    raw: [u8; FOOTER_BYTES],
}

impl Footer {
    /// A footer as QEMU's of an image that is new.
    pub fn new(disk_type: DiskType, bytes: u64, geometry: Geometry, unique_id: UniqueId) -> Self {
        let mut raw = [0; FOOTER_BYTES];
        raw[..8].copy_from_slice(&COOKIE);
        raw[11] = 2; // A bit that is always set.
        raw[13] = 1; // Version 1.0.
        raw[36..40].copy_from_slice(b"Wi2k");
        Self {
            disk_type,
            header_offset: match disk_type {
                DiskType::Fixed => u64::MAX,
                DiskType::Dynamic | DiskType::Differencing => FOOTER_BYTES as u64,
            },
            timestamp: 0,
            creator: *b"qemu",
            creator_version: 0x0005_0003,
            original_size: bytes,
            current_size: bytes,
            geometry,
            unique_id,
            saved_state: false,
            hidden: false,
            raw,
        }
    }

    /// Reads a footer.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for one that is none, or whose checksum is wrong,
    /// [`block::ErrorKind::Unsupported`] for a version or a disk type that is not known, and for an image that
    /// XenServer's tools made unusable.
    pub fn parse(bytes: &[u8; FOOTER_BYTES]) -> Result<Self> {
        let u32_at = |at| read_u32(bytes, at).unwrap_or(0);
        let u64_at = |at| read_u64(bytes, at).unwrap_or(0);
        let poisoned = bytes.starts_with(&POISON);
        if !bytes.starts_with(&COOKIE) && !poisoned {
            return Err(Error::corrupt(
                "footer: it does not begin with \"conectix\"",
            ));
        }
        let (found, right) = (u32_at(CHECKSUM), checksum(bytes, CHECKSUM));
        if found != right && !hidden_later(bytes, found) {
            return Err(Error::corrupt(format!(
                "footer: checksum at byte {CHECKSUM} is {found:#010x}, its bytes give {right:#010x}"
            )));
        }
        if poisoned {
            return Err(Error::unsupported(
                "footer: it is marked as not to be used (\"v_poison\"): a resize by XenServer's tools was not \
                 finished; finish it with vhd-util",
            ));
        }
        if u32_at(12) >> 16 != 1 {
            return Err(Error::unsupported(format!(
                "footer: version at byte 12 is {}.{}, known is 1.0",
                u32_at(12) >> 16,
                u32_at(12) & 0xffff
            )));
        }
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[68..84]);
        Ok(Self {
            disk_type: DiskType::of(u32_at(60))?,
            header_offset: u64_at(16),
            timestamp: u32_at(24),
            creator: u32_at(28).to_be_bytes(),
            creator_version: u32_at(32),
            original_size: u64_at(40),
            current_size: u64_at(48),
            geometry: Geometry::of(u32_at(56)),
            unique_id: UniqueId(id),
            saved_state: bytes[84] != 0,
            hidden: bytes[HIDDEN] != 0,
            raw: *bytes,
        })
    }

    /// Its bytes, with the checksum.
    pub fn to_bytes(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = self.raw;
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(16, &self.header_offset.to_be_bytes());
        put(24, &self.timestamp.to_be_bytes());
        put(28, &self.creator);
        put(32, &self.creator_version.to_be_bytes());
        put(40, &self.original_size.to_be_bytes());
        put(48, &self.current_size.to_be_bytes());
        put(56, &self.geometry.raw().to_be_bytes());
        put(60, &self.disk_type.raw().to_be_bytes());
        put(68, &self.unique_id.0);
        put(84, &[u8::from(self.saved_state)]);
        if self.hidden != (self.raw[HIDDEN] != 0) {
            put(HIDDEN, &[u8::from(self.hidden)]);
        }
        let sum = checksum(&bytes, CHECKSUM);
        bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Whether the size comes from the current size, as QEMU decides: Virtual PC, and QEMU without `force_size`,
    /// mean the geometry, unless that is the largest there is.
    pub fn size_is_current(&self) -> bool {
        matches!(
            &self.creator,
            b"win " | b"qem2" | b"d2v " | b"CTXS" | b"tap\0" | b"wa\0\0"
        ) || self.geometry == Geometry::MAX
    }

    /// Bytes of the disk, whole sectors.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Unsupported`] for more than 2040 GiB.
    pub fn disk_bytes(&self) -> Result<u64> {
        self.disk_bytes_by(None)
    }

    /// As [`disk_bytes`](Self::disk_bytes), where `said` overrules what the creator means; not a geometry that says nothing.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn disk_bytes_by(&self, said: Option<SizeFrom>) -> Result<u64> {
        let current = match said {
            None => self.size_is_current(),
            Some(SizeFrom::CurrentSize) => true,
            Some(SizeFrom::Geometry) => self.geometry == Geometry::MAX,
        };
        let (sectors, what) = match current {
            true => (self.current_size / 512, "current size at byte 48"),
            false => (self.geometry.sectors(), "geometry at byte 56"),
        };
        // XenServer's tools allow 2 TiB, which no block can be behind: the table's entries are sectors in 32 bits.
        if sectors > MAX_SECTORS {
            return Err(Error::unsupported(format!(
                "footer: {what} means a disk of {sectors} sectors; the most is 2040 GiB, {MAX_SECTORS} sectors"
            )));
        }
        Ok(sectors * 512)
    }

    /// Whether XenServer's tools made the image.
    pub fn by_tapdisk(&self) -> bool {
        self.creator.starts_with(b"tap")
    }

    /// What created it, for people.
    pub fn creator_name(&self) -> String {
        let name = String::from_utf8_lossy(&self.creator);
        let name: String = name
            .trim_end_matches(['\0', ' '])
            .escape_default()
            .collect();
        format!(
            "{name} {}.{}",
            self.creator_version >> 16,
            self.creator_version & 0xffff
        )
    }
}

/// Whether the checksum was right before early XenServer tools marked the image as hidden.
fn hidden_later(bytes: &[u8; FOOTER_BYTES], found: u32) -> bool {
    let early = matches!(read_u32(bytes, 32), Some(1 | 0x0001_0001));
    if bytes[HIDDEN] == 0 || !bytes[28..].starts_with(b"tap") || !early {
        return false;
    }
    let mut shown = *bytes;
    shown[HIDDEN] = 0;
    checksum(&shown, CHECKSUM) == found
}
