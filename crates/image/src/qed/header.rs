//! The header at the start of an image (specification: "Header"). All numbers are little-endian.
//!
//! ```text
//!    0 magic "QED\0"        16 features              40 l1_table_offset
//!    4 cluster_size         24 compat_features       48 image_size
//!    8 table_size           32 autoclear_features    56 backing_filename_offset
//!   12 header_size                                   60 backing_filename_size
//! ```

use crate::head::{self, wrong};
use block::{Context, Error, Result, Storage, limits};

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QED\0";
/// Bytes of the header.
pub const HEADER_LEN: usize = 64;
/// Feature bit: the image has a backing file.
pub const F_BACKING_FILE: u64 = 1;
/// Feature bit: it was not closed cleanly by a writer that keeps no order, and is to be checked.
pub const F_NEED_CHECK: u64 = 2;
/// Feature bit: the backing file is raw, whatever its first bytes show.
pub const F_BACKING_FORMAT_NO_PROBE: u64 = 4;
/// Sizes that a cluster can have, in bytes.
pub const CLUSTER_BYTES: std::ops::RangeInclusive<u64> = 4096..=64 << 20;
/// Clusters that a table can have.
pub const TABLE_CLUSTERS: std::ops::RangeInclusive<u64> = 1..=16;
/// Bytes of a backing file's name at most: what the longest path has.
pub const BACKING_NAME_MAX: u32 = 4095;

/// Feature bits that this code knows.
const FEATURES: u64 = F_BACKING_FILE | F_NEED_CHECK | F_BACKING_FORMAT_NO_PROBE;

/// A QED header, and the name that it leads to. Offsets and lengths are bytes where nothing else is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of a cluster.
    pub cluster_size: u32,
    /// Clusters of an L1 or L2 table.
    pub table_size: u32,
    /// Clusters before the first regular one.
    pub header_size: u32,
    /// Features without which an image must not be opened.
    pub features: u64,
    /// Features that need not be known.
    pub compat_features: u64,
    /// Features that end when the image is changed by who does not know them.
    pub autoclear_features: u64,
    /// Where the L1 table is.
    pub l1_table_offset: u64,
    /// Bytes of the virtual disk.
    pub image_size: u64,
    /// Where the backing file's name is.
    pub backing_filename_offset: u32,
    /// Bytes of it.
    pub backing_filename_size: u32,
    /// The backing file's name.
    pub backing: Option<String>,
}

/// The largest disk with clusters of `cluster` bytes and tables of `table` clusters.
pub fn disk_bytes_max(cluster: u64, table: u64) -> u64 {
    let entries = u128::from(table) * u128::from(cluster) / 8;
    let bytes = entries * entries * u128::from(cluster);
    u64::try_from(bytes)
        .unwrap_or(u64::MAX)
        .min(limits::DISK_BYTES_MAX)
}

impl Header {
    /// Reads the header of `storage` and judges it: what it refers to lies within the file.
    ///
    /// Fails with `Corrupt` (naming the field), or `Unsupported` when it has features that nobody here knows.
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
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        if !bytes.starts_with(&MAGIC) {
            return Err(Error::corrupt(
                "header: the first 4 bytes are not 'QED\\0': not a QED image",
            ));
        }
        Ok(Self {
            cluster_size: u32_at(bytes, 4),
            table_size: u32_at(bytes, 8),
            header_size: u32_at(bytes, 12),
            features: u64_at(bytes, 16),
            compat_features: u64_at(bytes, 24),
            autoclear_features: u64_at(bytes, 32),
            l1_table_offset: u64_at(bytes, 40),
            image_size: u64_at(bytes, 48),
            backing_filename_offset: u32_at(bytes, 56),
            backing_filename_size: u32_at(bytes, 60),
            backing: None,
        })
    }

    /// The bytes of all fields.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        head::packed(
            MAGIC
                .into_iter()
                .chain(self.cluster_size.to_le_bytes())
                .chain(self.table_size.to_le_bytes())
                .chain(self.header_size.to_le_bytes())
                .chain(self.features.to_le_bytes())
                .chain(self.compat_features.to_le_bytes())
                .chain(self.autoclear_features.to_le_bytes())
                .chain(self.l1_table_offset.to_le_bytes())
                .chain(self.image_size.to_le_bytes())
                .chain(self.backing_filename_offset.to_le_bytes())
                .chain(self.backing_filename_size.to_le_bytes()),
        )
    }

    /// Judges the fields of a file of `file_len` bytes.
    pub fn validate(&self, file_len: u64) -> Result<()> {
        let unknown = self.features & !FEATURES;
        if unknown != 0 {
            return Err(Error::unsupported(format!(
                "header: features at byte 16 has the unknown bits {unknown:#x}: the image needs a newer program"
            )));
        }
        let cluster = u64::from(self.cluster_size);
        if !cluster.is_power_of_two() || !CLUSTER_BYTES.contains(&cluster) {
            let what = format!("is {cluster}, it must be a power of two from 4096 to 64 MiB");
            return Err(wrong("cluster_size", 4, what));
        }
        let table = u64::from(self.table_size);
        if !table.is_power_of_two() || !TABLE_CLUSTERS.contains(&table) {
            let what = format!("is {table}, it must be 1, 2, 4, 8 or 16");
            return Err(wrong("table_size", 8, what));
        }
        let head = u64::from(self.header_size) * cluster;
        if head == 0 || head > u64::from(u32::MAX) {
            let what = format!(
                "is {} clusters, it must be at least 1 and below 4 GiB",
                self.header_size
            );
            return Err(wrong("header_size", 12, what));
        }
        let most = disk_bytes_max(cluster, table);
        if !self.image_size.is_multiple_of(512) || self.image_size > most {
            let what = format!(
                "is {}, it must be a multiple of 512 up to {most}",
                self.image_size
            );
            return Err(wrong("image_size", 48, what));
        }
        let end = file_len & !(cluster - 1);
        let l1 = self.l1_table_offset;
        let l1_end = l1.checked_add(self.table_bytes());
        if !l1.is_multiple_of(cluster) || l1 < head || l1_end.is_none_or(|e| e > end) {
            let what = format!(
                "is {l1:#x}: a table of {:#x} bytes does not lie there on whole clusters between the header \
                 ({head:#x}) and the end of the file ({file_len:#x})",
                self.table_bytes()
            );
            return Err(wrong("l1_table_offset", 40, what));
        }
        Ok(())
    }

    /// Bytes of a table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_size) * u64::from(self.cluster_size)
    }

    /// Whether the image is to be checked before it is written to.
    pub fn needs_check(&self) -> bool {
        self.features & F_NEED_CHECK != 0
    }

    /// The backing file's format, where the image says it: raw or nothing.
    pub fn backing_format(&self) -> Option<&'static str> {
        let raw = self.features & F_BACKING_FORMAT_NO_PROBE != 0;
        (raw && self.backing.is_some()).then_some("raw")
    }

    /// The name, which lies within the header's clusters.
    fn read_backing(&self, storage: &dyn Storage, file_len: u64) -> Result<Option<String>> {
        if self.features & F_BACKING_FILE == 0 || self.backing_filename_size == 0 {
            return Ok(None);
        }
        let (at, len) = (self.backing_filename_offset, self.backing_filename_size);
        if len > BACKING_NAME_MAX {
            let what = format!("is {len}, the longest name has {BACKING_NAME_MAX} bytes");
            return Err(wrong("backing_filename_size", 60, what));
        }
        let head = u64::from(self.header_size) * u64::from(self.cluster_size);
        let end = u64::from(at) + u64::from(len);
        if end > head.min(file_len) {
            let what = format!(
                "is {at}: a name of {len} bytes there ends behind the header's clusters ({head:#x})"
            );
            return Err(wrong("backing_filename_offset", 56, what));
        }
        // At most 4095 bytes.
        let mut name = vec![0; len as usize];
        storage.read_at(u64::from(at), &mut name)?;
        match name.contains(&0) {
            false => Ok(Some(block::name::of_bytes(&name))),
            true => Err(Error::unsupported(format!(
                "header: the backing file's name at {at:#x} has a zero byte"
            ))),
        }
    }
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}
