//! The header: the first 512 bytes, all numbers little-endian.
//!
//! ```text
//!   0x000  text for people, 64 bytes          0x16c  unused
//!   0x040  signature 0xbeda107f               0x170  bytes of the disk, 64 bits
//!   0x044  version: major << 16 | minor       0x178  bytes of a block
//!   0x048  bytes of the header from here      0x17c  bytes before the data of each block
//!   0x04c  type                               0x180  blocks of the disk: entries of the map
//!   0x050  flags                              0x184  blocks that are allocated
//!   0x054  comment, 256 bytes                 0x188  UUID of the image
//!   0x154  where the map begins               0x198  UUID of its last change
//!   0x158  where the blocks begin             0x1a8  UUID of the image that this one is a change of
//!   0x15c  geometry, not used any more        0x1b8  UUID of that image's last change
//!   0x168  bytes of a sector: 512             0x1c8  geometry as the BIOS shows it
//! ```

use crate::words::{read_u32_le, read_u64_le};
use block::{Error, Result, limits};
use std::fmt;

/// Bytes of the header, and of the sector that it is in.
pub const HEADER_BYTES: usize = 512;

/// What stands at [`MAGIC_AT`].
pub const MAGIC: [u8; 4] = 0xbeda_107fu32.to_le_bytes();

/// Where the signature is.
pub const MAGIC_AT: usize = 0x40;

/// Version 1.1, the only one.
const VERSION: u32 = 0x0001_0001;

/// Bytes of a block, as both VirtualBox and QEMU make them. QEMU opens no others.
pub const BLOCK_BYTES: u32 = 1 << 20;

/// Most blocks of an image: a map of 128 MiB, which is read through at each open.
pub const BLOCKS_MAX: u32 = 32 << 20;

/// Bytes of the header that QEMU writes into the field at byte 0x48.
const HEADER_SIZE: u32 = 0x180;

/// What the text says for people, in images that QEMU makes and ours.
const TEXT: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n";

/// A UUID, in the order of bytes of Microsoft's GUIDs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// A new one (RFC 4122, version 4).
    ///
    /// # Errors
    ///
    /// When the kernel gives no random numbers.
    pub fn random() -> Result<Self> {
        let mut id = [0; 16];
        crypto::random(&mut id)?;
        id[7] = id[7] & 0x0f | 0x40;
        id[8] = id[8] & 0x3f | 0x80;
        Ok(Self(id))
    }

    /// Whether it names nothing.
    pub fn is_null(&self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        for (at, byte) in order.into_iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0.get(byte).copied().unwrap_or(0))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// How an image keeps its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageType {
    /// Blocks are added when they are written.
    Dynamic,
    /// All blocks are there from the beginning, in their order.
    Static,
}

impl fmt::Display for ImageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageType::Dynamic => "dynamic",
            ImageType::Static => "static",
        })
    }
}

/// A header that both worlds take for sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// How it keeps its disk.
    pub image_type: ImageType,
    /// What somebody noted in it.
    pub comment: String,
    /// Where the map begins, a multiple of 512.
    pub map_offset: u32,
    /// Where the blocks begin, a multiple of 512 behind the map.
    pub data_offset: u32,
    /// Bytes of the disk, a multiple of 512.
    pub disk_bytes: u64,
    /// Bytes of a block, a power of two.
    pub block_bytes: u32,
    /// Entries of the map.
    pub blocks: u32,
    /// Blocks that are allocated: the next one comes behind as many.
    pub allocated: u32,
    /// Names the image.
    pub uuid: Uuid,
    /// What it was read from: what nobody here knows is kept.
    pub(super) raw: [u8; HEADER_BYTES],
}

impl Header {
    /// Parses the first sector of a file.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for what cannot be, [`block::ErrorKind::Unsupported`] for what VirtualBox
    /// knows and no code here; the field is named.
    pub fn parse(raw: &[u8; HEADER_BYTES]) -> Result<Self> {
        let word = |at| read_u32_le(raw, at).unwrap_or(0);
        let bytes = |at: usize, len: usize| raw.get(at..at + len).unwrap_or_default();
        let uuid = |at| Uuid(<[u8; 16]>::try_from(bytes(at, 16)).unwrap_or_default());
        if bytes(MAGIC_AT, 4) != MAGIC {
            return Err(Error::corrupt(format!(
                "signature at byte {MAGIC_AT:#x} is {:#010x}: a VDI image has 0xbeda107f",
                word(MAGIC_AT)
            )));
        }
        if word(0x44) != VERSION {
            return Err(Error::unsupported(format!(
                "version at byte 0x44 is {}.{}: only 1.1 is known",
                word(0x44) >> 16,
                word(0x44) & 0xffff
            )));
        }
        let image_type = match word(0x4c) {
            1 => ImageType::Dynamic,
            2 => ImageType::Static,
            3 => {
                return Err(unsupported(
                    "type at byte 0x4c is 3: an undo image of VirtualBox",
                ));
            }
            4 => return Err(unsupported("type at byte 0x4c is 4: a differencing image")),
            other => {
                return Err(Error::corrupt(format!(
                    "type at byte 0x4c is {other}: there are 1 (dynamic) and 2 (static)"
                )));
            }
        };
        for (at, what) in [(0x1a8, "parent"), (0x1b8, "parent's last change")] {
            let parent = uuid(at);
            if !parent.is_null() {
                return Err(unsupported(&format!(
                    "UUID of the {what} at byte {at:#x} is {parent}: a differencing image"
                )));
            }
        }
        let said = word(0x48);
        let sector = word(0x168);
        if sector != 512 {
            return Err(Error::unsupported(format!(
                "bytes of a sector at byte 0x168 are {sector}: only 512 is known"
            )));
        }
        let extra = word(0x17c);
        if extra != 0 {
            return Err(Error::unsupported(format!(
                "bytes before the data of each block at byte 0x17c are {extra}: QEMU and VirtualBox differ on where \
                 the data are then"
            )));
        }
        let comment = bytes(0x54, 256);
        let comment = comment.split(|byte| *byte == 0).next().unwrap_or_default();
        let header = Self {
            image_type,
            comment: String::from_utf8_lossy(comment).into_owned(),
            map_offset: word(0x154),
            data_offset: word(0x158),
            disk_bytes: read_u64_le(raw, 0x170).unwrap_or(0),
            block_bytes: word(0x178),
            blocks: word(0x180),
            allocated: word(0x184),
            uuid: uuid(0x188),
            raw: *raw,
        };
        // VirtualBox's own first headers ended behind the parent's UUID.
        if said < 0x180 {
            return Err(Error::corrupt(format!(
                "bytes of the header at byte 0x48 are {said:#x}: they must be at least 0x180"
            )));
        }
        header.checked()
    }

    fn checked(mut self) -> Result<Self> {
        let (map, data) = (self.map_offset, self.data_offset);
        for (what, at, offset) in [("map", 0x154, map), ("blocks", 0x158, data)] {
            if !offset.is_multiple_of(512) || offset < HEADER_BYTES as u32 {
                return Err(Error::corrupt(format!(
                    "offset of the {what} at byte {at:#x} is {offset:#x}: it must be a multiple of 512 behind the header"
                )));
            }
        }
        let block = self.block_bytes;
        if !block.is_power_of_two() || block < 512 {
            return Err(Error::corrupt(format!(
                "bytes of a block at byte 0x178 are {block}: they must be a power of two from 512 on"
            )));
        }
        // As in QEMU: VirtualBox made images of odd sizes once.
        let disk = self.disk_bytes;
        self.disk_bytes = disk
            .checked_next_multiple_of(512)
            .filter(|bytes| *bytes <= limits::DISK_BYTES_MAX)
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "bytes of the disk at byte 0x170 are {disk}: that is no size"
                ))
            })?;
        let reach = u64::from(self.blocks) * u64::from(block);
        if self.disk_bytes > reach {
            return Err(Error::corrupt(format!(
                "bytes of the disk at byte 0x170 are {disk}, but the map at byte 0x180 has {} blocks of {block}",
                self.blocks
            )));
        }
        if self.blocks > BLOCKS_MAX {
            return Err(Error::unsupported(format!(
                "blocks of the disk at byte 0x180 are {}: at most {BLOCKS_MAX} are supported, whose map takes 128 MiB of \
                 memory",
                self.blocks
            )));
        }
        if u64::from(data) < u64::from(map) + self.map_bytes() {
            return Err(Error::corrupt(format!(
                "offset of the blocks at byte 0x158 is {data:#x}: the map of {} entries, from {map:#x} on, reaches into \
                 them",
                self.blocks
            )));
        }
        Ok(self)
    }

    /// Numbers that blocks may have are below this: the map has so many entries. While a resize brings the first blocks
    /// out of the way of a larger map, they have numbers behind that, which the header counts: as many as it may move.
    pub fn numbers(&self) -> u32 {
        let moved = BLOCKS_MAX.saturating_mul(4) / self.block_bytes.max(1) + 1;
        let most = self.blocks.saturating_add(moved);
        self.blocks.max(self.allocated.min(most))
    }

    /// The header of a new image that has no blocks, or, static, all.
    ///
    /// # Errors
    ///
    /// When the disk has too many blocks, or the kernel gives no random numbers.
    pub fn new(image_type: ImageType, disk_bytes: u64, block_bytes: u32) -> Result<Self> {
        let blocks = disk_bytes.div_ceil(u64::from(block_bytes.max(1)));
        let blocks = u32::try_from(blocks).ok().filter(|n| *n <= BLOCKS_MAX);
        let blocks = blocks.ok_or_else(|| {
            Error::unsupported(format!(
                "a disk of {disk_bytes} bytes is too large for a vdi image: the most is {BLOCKS_MAX} blocks of \
                 {block_bytes} bytes"
            ))
        })?;
        let mut raw = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| {
            let to = raw.iter_mut().skip(at);
            to.zip(field).for_each(|(to, from)| *to = *from);
        };
        put(0, TEXT);
        put(MAGIC_AT, &MAGIC);
        put(0x44, &VERSION.to_le_bytes());
        put(0x48, &HEADER_SIZE.to_le_bytes());
        let number = if image_type == ImageType::Static {
            2u32
        } else {
            1
        };
        put(0x4c, &number.to_le_bytes());
        put(0x168, &512u32.to_le_bytes());
        put(0x178, &block_bytes.to_le_bytes());
        put(0x198, &Uuid::random()?.0);
        let uuid = Uuid::random()?;
        put(0x188, &uuid.0);
        let mut header = Self {
            image_type,
            comment: String::new(),
            map_offset: HEADER_BYTES as u32,
            data_offset: 0,
            disk_bytes,
            block_bytes,
            blocks,
            allocated: match image_type {
                ImageType::Dynamic => 0,
                ImageType::Static => blocks,
            },
            uuid,
            raw,
        };
        let end = HEADER_BYTES as u64 + header.map_bytes();
        // It fits: the map has at most 128 MiB. So aligned, `O_DIRECT` takes the blocks.
        header.data_offset = block::align_up(end, 4096) as u32;
        Ok(header)
    }

    /// The sector as it is on disk.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut raw = self.raw;
        let mut put = |at: usize, field: &[u8]| {
            let to = raw.iter_mut().skip(at);
            to.zip(field).for_each(|(to, from)| *to = *from);
        };
        put(0x154, &self.map_offset.to_le_bytes());
        put(0x158, &self.data_offset.to_le_bytes());
        put(0x170, &self.disk_bytes.to_le_bytes());
        put(0x180, &self.blocks.to_le_bytes());
        put(0x184, &self.allocated.to_le_bytes());
        raw
    }

    /// Bytes of the map, in whole sectors.
    pub fn map_bytes(&self) -> u64 {
        (u64::from(self.blocks) * 4).next_multiple_of(512)
    }

    /// Where the entry of that block is in the file.
    pub fn entry_offset(&self, block: u64) -> u64 {
        u64::from(self.map_offset) + block * 4
    }

    /// Where the block with number `index` in the file begins.
    pub fn block_offset(&self, index: u64) -> u64 {
        u64::from(self.data_offset) + index * u64::from(self.block_bytes)
    }
}

fn unsupported(what: &str) -> Error {
    Error::unsupported(format!(
        "{what}, whose data are partly in another image: neither QEMU nor this program opens such; have VirtualBox make a \
         whole one: VBoxManage clonemedium"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let mut header = Header::new(ImageType::Static, 5 << 20, BLOCK_BYTES).unwrap();
        header.allocated = 3;
        let read = Header::parse(&header.to_bytes()).unwrap();
        assert_eq!(
            (read.blocks, read.allocated, read.data_offset),
            (5, 3, 4096)
        );
        assert_eq!(read.to_bytes(), header.to_bytes());
        assert_eq!(read.image_type, ImageType::Static);
    }

    #[test]
    fn sizes_are_bounded() {
        let most = u64::from(BLOCKS_MAX) << 20;
        assert!(Header::new(ImageType::Dynamic, most, BLOCK_BYTES).is_ok());
        let error = Header::new(ImageType::Dynamic, most + 1, BLOCK_BYTES).unwrap_err();
        assert!(error.to_string().contains("too large"), "{error}");
        let odd = Header::new(ImageType::Dynamic, 1_000_001, BLOCK_BYTES).unwrap();
        let read = Header::parse(&odd.to_bytes()).unwrap();
        assert_eq!(read.disk_bytes, 1_000_448);
    }
}
