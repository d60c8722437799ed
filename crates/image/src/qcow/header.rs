//! The header at the start of an image (QEMU's `QCowHeader`). All numbers are big-endian.
//!
//! ```text
//!    0 magic "QFI\xfb"          20 mtime                 36 crypt_method
//!    4 version: 1               24 size                  40 l1_table_offset
//!    8 backing_file_offset      32 cluster_bits (8)
//!   16 backing_file_size        33 l2_bits (8)
//! ```

use crate::head::{self, wrong};
use crate::words::{read_u32, read_u64};
use block::{Context, Error, Result, Storage, limits, size};

/// The first bytes of every image: those of qcow2, and the version.
pub const MAGIC: [u8; 8] = *b"QFI\xfb\0\0\0\x01";
/// Bytes of the header.
pub const HEADER_LEN: usize = 48;
/// Bytes of a backing file's name at most.
pub const BACKING_NAME_MAX: u32 = 1023;
/// Entries of an L1 table at most: it is kept in memory, at 8 bytes each. With the clusters and tables that QEMU makes, a
/// disk of 16 TiB.
pub const L1_ENTRIES_MAX: u64 = 8 << 20;

/// log2 of the bytes of a cluster.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=16;
/// log2 of the entries of an L2 table.
const L2_BITS: std::ops::RangeInclusive<u32> = 6..=13;
/// `crypt_method` without encryption, and of QEMU's only one.
const CRYPT_NONE: u32 = 0;
const CRYPT_AES: u32 = 1;

/// A header, and the name that it leads to. Offsets and lengths are bytes where nothing else is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where the backing file's name is; 0 where there is none.
    pub backing_file_offset: u64,
    /// Bytes of it.
    pub backing_file_size: u32,
    /// When the backing file was changed last, of old images; nobody looks.
    pub mtime: u32,
    /// Bytes of the virtual disk as the image says them: what is no whole sector is not of the disk.
    pub size: u64,
    /// log2 of the bytes of a cluster.
    pub cluster_bits: u32,
    /// log2 of the entries of an L2 table.
    pub l2_bits: u32,
    /// Data are encrypted with AES.
    pub encrypted: bool,
    /// Where the L1 table is.
    pub l1_table_offset: u64,
    /// The backing file's name.
    pub backing: Option<String>,
}

impl Header {
    /// Reads the header of `storage` and judges it: what it refers to lies within the file.
    ///
    /// # Errors
    ///
    /// `Corrupt` (naming the field), or `Unsupported` for a disk whose L1 table is too large.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        Self::read_unnamed(storage).context(|| storage.name())
    }

    pub(super) fn read_unnamed(storage: &dyn Storage) -> Result<Self> {
        let len = storage.len()?;
        let mut header = Self::parse(&head::read(storage, len)?)?;
        header.validate(len)?;
        header.backing = header.read_backing(storage, len)?;
        Ok(header)
    }

    /// Takes the fields from the first bytes of a file.
    ///
    /// # Errors
    ///
    /// `Corrupt` for a file that is no qcow image, and for a `crypt_method` that nobody knows.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        let word = |at| read_u32(bytes, at).unwrap_or(0);
        let long = |at| read_u64(bytes, at).unwrap_or(0);
        if !bytes.starts_with(&MAGIC) {
            return Err(match bytes.starts_with(&MAGIC[..4]) {
                true => wrong(
                    "version",
                    4,
                    format!("is {}: version 1 is qcow, 2 and 3 are qcow2", word(4)),
                ),
                false => {
                    Error::corrupt("header: the first 4 bytes are not 'QFI\\xfb': not a qcow image")
                }
            });
        }
        let [cluster_bits, l2_bits] = [bytes[32], bytes[33]].map(u32::from);
        let encrypted = match word(36) {
            CRYPT_NONE => false,
            CRYPT_AES => true,
            other => {
                let what = format!("is {other}: 0 (none) and 1 (AES) are known");
                return Err(wrong("crypt_method", 36, what));
            }
        };
        Ok(Self {
            backing_file_offset: long(8),
            backing_file_size: word(16),
            mtime: word(20),
            size: long(24),
            cluster_bits,
            l2_bits,
            encrypted,
            l1_table_offset: long(40),
            backing: None,
        })
    }

    /// The bytes of all fields.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        // Both were checked.
        let bits = [self.cluster_bits as u8, self.l2_bits as u8, 0, 0];
        let crypt = if self.encrypted {
            CRYPT_AES
        } else {
            CRYPT_NONE
        };
        head::packed(
            MAGIC
                .into_iter()
                .chain(self.backing_file_offset.to_be_bytes())
                .chain(self.backing_file_size.to_be_bytes())
                .chain(self.mtime.to_be_bytes())
                .chain(self.size.to_be_bytes())
                .chain(bits)
                .chain(crypt.to_be_bytes())
                .chain(self.l1_table_offset.to_be_bytes()),
        )
    }

    /// Judges the fields, for a file of `file_len` bytes.
    fn validate(&self, file_len: u64) -> Result<()> {
        if self.size <= 1 {
            let what = format!("is {}: a disk has 2 bytes at least", self.size);
            return Err(wrong("size", 24, what));
        }
        if self.size > limits::DISK_BYTES_MAX {
            let what = format!("is {}: the most is {}", self.size, limits::DISK_BYTES_MAX);
            return Err(wrong("size", 24, what));
        }
        if !CLUSTER_BITS.contains(&self.cluster_bits) {
            let what = format!(
                "is {}: 9 to 16 are possible (512 bytes to 64K)",
                self.cluster_bits
            );
            return Err(wrong("cluster_bits", 32, what));
        }
        if !L2_BITS.contains(&self.l2_bits) {
            let what = format!(
                "is {}: 6 to 13 are possible (tables of 512 bytes to 64K)",
                self.l2_bits
            );
            return Err(wrong("l2_bits", 33, what));
        }
        let entries = self.l1_entries();
        if entries > L1_ENTRIES_MAX {
            return Err(Error::unsupported(format!(
                "header: size at byte 24 is {}: the L1 table would have {entries} entries, and {L1_ENTRIES_MAX} are the most \
                 that are supported (64 MiB of memory): for clusters of {} and tables of {} a disk of {}",
                size::human(self.size),
                size::human(self.cluster_size()),
                size::human(self.table_bytes()),
                size::human(L1_ENTRIES_MAX << (self.cluster_bits + self.l2_bits)),
            )));
        }
        let l1 = self.l1_table_offset;
        if l1 < HEADER_LEN as u64 {
            let what = format!("is {l1}: the header is there");
            return Err(wrong("l1_table_offset", 40, what));
        }
        let end = l1.checked_add(entries * 8);
        if end.is_none_or(|end| end > file_len) {
            let what = format!(
                "is {l1:#x}: the table of {entries} entries there ends behind the file ({file_len:#x}): it is cut off"
            );
            return Err(wrong("l1_table_offset", 40, what));
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 table.
    pub fn table_bytes(&self) -> u64 {
        8 << self.l2_bits
    }

    /// Bytes of the virtual disk: whole sectors.
    pub fn disk_bytes(&self) -> u64 {
        self.size & !511
    }

    /// Entries of the L1 table.
    pub fn l1_entries(&self) -> u64 {
        self.size.div_ceil(1 << (self.cluster_bits + self.l2_bits))
    }

    /// Where the L1 table ends.
    pub(super) fn l1_end(&self) -> u64 {
        self.l1_table_offset + self.l1_entries() * 8
    }

    fn read_backing(&self, storage: &dyn Storage, file_len: u64) -> Result<Option<String>> {
        let (at, len) = (self.backing_file_offset, self.backing_file_size);
        if at == 0 || len == 0 {
            return Ok(None);
        }
        if len > BACKING_NAME_MAX {
            let what = format!("is {len}, the longest name has {BACKING_NAME_MAX} bytes");
            return Err(wrong("backing_file_size", 16, what));
        }
        let end = at.checked_add(u64::from(len));
        if end.is_none_or(|end| end > file_len) {
            let what = format!(
                "is {at:#x}: a name of {len} bytes there ends behind the file ({file_len:#x})"
            );
            return Err(wrong("backing_file_offset", 8, what));
        }
        // At most 1023 bytes.
        let mut name = vec![0; len as usize];
        storage.read_at(at, &mut name)?;
        match name.contains(&0) {
            false => Ok(Some(block::name::of_bytes(&name))),
            true => Err(Error::unsupported(format!(
                "header: the backing file's name at {at:#x} has a zero byte"
            ))),
        }
    }
}
