//! The header in the first cluster of an image (specification: "Header").
//!
//! ```text
//!     0 magic "QFI\xfb"          48 refcount_table_offset      80 compatible_features
//!     4 version                  56 refcount_table_clusters    88 autoclear_features
//!     8 backing_file_offset      60 nb_snapshots               96 refcount_order
//!    16 backing_file_size        64 snapshots_offset          100 header_length
//!    20 cluster_bits             ── version 3 only ──         104 compression_type
//!    24 size                     72 incompatible_features     105 … header_length: unknown
//!    32 crypt_method                                          then extensions, then the
//!    36 l1_size   40 l1_table_offset                          backing file's name
//! ```

use super::extensions::{self, Extension};
use super::features::{self, FeatureKind};
use super::{read_u32, read_u64};
use crate::DataFile;
use crate::head::{self, wrong};
use block::{Context, Error, Result, Storage, limits};
use std::borrow::Cow;

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header.
pub const V2_LEN: u32 = 72;
/// Bytes of a version 3 header as this code writes it.
pub const V3_LEN: u32 = 112;
/// Largest L1 table in bytes (QEMU's limit).
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table in bytes (QEMU's limit).
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Most internal snapshots (QEMU's limit).
pub const SNAPSHOTS_MAX: u32 = 65536;
/// log2 of the smallest cluster that has subclusters: they are sectors of 512 bytes then.
pub const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;
/// Host offsets are 56 bits.
pub const HOST_OFFSET_END: u64 = 1 << 56;

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate (QEMU calls it zlib).
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A qcow2 header with everything that hangs on it. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The backing file's name.
    pub backing: Option<String>,
    /// log2 of the cluster size, 9–21.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the L1 table.
    pub l1_size: u32,
    /// Where the L1 table is.
    pub l1_table_offset: u64,
    /// Where the refcount table is.
    pub refcount_table_offset: u64,
    /// Clusters that the refcount table takes.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub nb_snapshots: u32,
    /// Where the snapshot table is.
    pub snapshots_offset: u64,
    /// See [`features`].
    pub incompatible: u64,
    /// See [`features`].
    pub compatible: u64,
    /// See [`features`].
    pub autoclear: u64,
    /// log2 of the refcounts' width in bits, 0–6.
    pub refcount_order: u32,
    /// Length of the header itself.
    pub header_length: u32,
    /// 0 zlib, 1 zstd.
    pub compression_type: u8,
    /// Fields behind `compression_type` that this code does not know: bytes `105..header_length`.
    pub unknown_fields: Vec<u8>,
    /// All extensions in their order, unknown ones included.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// Reads and parses the header of `storage`. Does not judge features: see
    /// [`Header::check_features`].
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        Self::read_unnamed(storage).context(|| storage.name())
    }

    pub(super) fn read_unnamed(storage: &dyn Storage) -> Result<Self> {
        let file_len = storage.len()?;
        let mut bytes = vec![0; file_len.min(512) as usize];
        storage.read_at(0, &mut bytes)?;
        let bits = Self::cluster_bits_of(&bytes)?;
        // At most 2 MiB.
        let first = file_len.min(1 << bits) as usize;
        if first > bytes.len() {
            bytes.resize(first, 0);
            storage.read_at(0, &mut bytes)?;
        }
        Self::parse(&bytes)
    }

    fn cluster_bits_of(bytes: &[u8]) -> Result<u32> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(Error::corrupt(
                "header: the first 4 bytes are not 'QFI\\xfb': not a qcow2 image",
            ));
        }
        let field = |at| read_u32(bytes, at).ok_or_else(head::cut_off);
        let version = field(4)?;
        if !matches!(version, 2 | 3) {
            return Err(Error::unsupported(format!(
                "header: version at byte 4 is {version}, known are 2 and 3"
            )));
        }
        let bits = field(20)?;
        if !(9..=21).contains(&bits) {
            return Err(wrong(
                "cluster_bits",
                20,
                format_args!("is {bits}, allowed are 9 to 21"),
            ));
        }
        Ok(bits)
    }

    /// Parses a header from `bytes`, the image's first cluster or as much of it as the file has.
    ///
    /// Fails with [`block::ErrorKind::Corrupt`] or `Unsupported` (unknown version), naming byte and field.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let header = Self::parse_repairable(bytes)?;
        header.validate_refcount_table()?;
        header.validate_snapshots()?;
        Ok(header)
    }

    /// As [`Header::parse`], but lets pass what a repair replaces: the fields of the refcount table
    /// ([`Header::validate_refcount_table`]) and of the snapshot table ([`Header::validate_snapshots`]).
    pub fn parse_repairable(bytes: &[u8]) -> Result<Self> {
        let cluster_bits = Self::cluster_bits_of(bytes)?;
        let cluster_size = 1usize << cluster_bits;
        let bytes = bytes.get(..cluster_size).unwrap_or(bytes);
        let short = head::cut_off;
        let u32_at = |at| read_u32(bytes, at).ok_or_else(short);
        let u64_at = |at| read_u64(bytes, at).ok_or_else(short);

        let version = u32_at(4)?;
        let v3 = version >= 3;
        let header_length = if v3 { u32_at(100)? } else { V2_LEN };
        if v3 && (header_length < 104 || header_length % 8 != 0) {
            return Err(wrong(
                "header_length",
                100,
                format_args!("is {header_length}, not a multiple of 8 from 104 on"),
            ));
        }
        let header_end = header_length as usize;
        if header_end > cluster_size {
            return Err(wrong(
                "header_length",
                100,
                format_args!("is {header_length}, more than a cluster"),
            ));
        }
        if header_end > bytes.len() {
            return Err(short());
        }
        let backing =
            Self::parse_backing(bytes, header_end, u64_at(8)?, u32_at(16)?, cluster_size)?;
        let extensions_end = match &backing {
            Some((at, _)) => *at,
            None => bytes.len(),
        };
        let area = bytes.get(header_end..extensions_end).unwrap_or_default();
        let header = Self {
            version,
            backing: backing.map(|(_, name)| name),
            cluster_bits,
            size: u64_at(24)?,
            crypt_method: u32_at(32)?,
            l1_size: u32_at(36)?,
            l1_table_offset: u64_at(40)?,
            refcount_table_offset: u64_at(48)?,
            refcount_table_clusters: u32_at(56)?,
            nb_snapshots: u32_at(60)?,
            snapshots_offset: u64_at(64)?,
            incompatible: if v3 { u64_at(72)? } else { 0 },
            compatible: if v3 { u64_at(80)? } else { 0 },
            autoclear: if v3 { u64_at(88)? } else { 0 },
            refcount_order: if v3 { u32_at(96)? } else { 4 },
            header_length,
            compression_type: match header_end {
                0..=104 => 0,
                _ => bytes.get(104).copied().unwrap_or(0),
            },
            unknown_fields: bytes.get(105..header_end).unwrap_or_default().to_vec(),
            extensions: extensions::parse(area, header_end)?,
        };
        header.validate_irreparable()?;
        Ok(header)
    }

    fn parse_backing(
        bytes: &[u8],
        header_end: usize,
        offset: u64,
        len: u32,
        cluster_size: usize,
    ) -> Result<Option<(usize, String)>> {
        if offset == 0 {
            return Ok(None);
        }
        let len = len as usize;
        if len == 0 || len > limits::FILE_NAME_BYTES_MAX {
            return Err(wrong(
                "backing_file_size",
                16,
                format_args!("is {len}, allowed are 1 to {}", limits::FILE_NAME_BYTES_MAX),
            ));
        }
        let start = usize::try_from(offset)
            .ok()
            .filter(|start| *start >= header_end && *start <= cluster_size - len.min(cluster_size))
            .ok_or_else(|| {
                wrong(
                    "backing_file_offset",
                    8,
                    format_args!(
                        "is {offset:#x}: the name is not between header and first cluster's end"
                    ),
                )
            })?;
        let name = bytes
            .get(start..)
            .and_then(|rest| rest.get(..len))
            .ok_or_else(|| {
                Error::corrupt("header: the file ends inside the backing file's name")
            })?;
        if name.contains(&0) {
            return Err(Error::corrupt(format!(
                "header: the backing file's name at byte {start} contains a zero byte"
            )));
        }
        Ok(Some((start, block::name::of_bytes(name))))
    }

    /// Checks everything that a parsed or hand-made header must fulfil.
    pub fn validate(&self) -> Result<()> {
        self.validate_irreparable()?;
        self.validate_refcount_table()?;
        self.validate_snapshots()
    }

    /// Fails where `at`, for `len` bytes, is no place for a table.
    fn placed(&self, field: &str, byte: usize, at: u64, len: u64) -> Result<()> {
        if !at.is_multiple_of(self.cluster_size())
            || at.checked_add(len).is_none_or(|end| end > HOST_OFFSET_END)
        {
            let what = format!("is {at:#x}: not a cluster within 56 bits");
            return Err(wrong(field, byte, what));
        }
        Ok(())
    }

    /// Checks place and size of the refcount table.
    pub fn validate_refcount_table(&self) -> Result<()> {
        let cluster = self.cluster_size();
        let table = u64::from(self.refcount_table_clusters) * cluster;
        if table == 0 || table > REFCOUNT_TABLE_BYTES_MAX.max(cluster) {
            return Err(wrong(
                "refcount_table_clusters",
                56,
                format_args!(
                    "is {}: at least 1, at most 8 MiB",
                    self.refcount_table_clusters
                ),
            ));
        }
        if self.refcount_table_offset == 0 {
            return Err(wrong("refcount_table_offset", 48, "is 0"));
        }
        let at = self.refcount_table_offset;
        self.placed("refcount_table_offset", 48, at, table)
    }

    /// Checks place and size of the snapshot table.
    pub fn validate_snapshots(&self) -> Result<()> {
        if self.nb_snapshots > SNAPSHOTS_MAX {
            return Err(wrong(
                "nb_snapshots",
                60,
                format_args!("is {}, the highest is {SNAPSHOTS_MAX}", self.nb_snapshots),
            ));
        }
        if self.nb_snapshots > 0 {
            self.placed("snapshots_offset", 64, self.snapshots_offset, 0)?;
        }
        Ok(())
    }

    fn validate_irreparable(&self) -> Result<()> {
        if self.size > limits::DISK_BYTES_MAX {
            return Err(wrong(
                "size",
                24,
                format_args!("is {}: too large", self.size),
            ));
        }
        if self.extended_l2() && self.cluster_bits < EXTENDED_CLUSTER_BITS_MIN {
            return Err(wrong(
                "cluster_bits",
                20,
                format_args!(
                    "is {}: extended L2 entries need at least {EXTENDED_CLUSTER_BITS_MIN}",
                    self.cluster_bits
                ),
            ));
        }
        if self.refcount_order > 6 {
            return Err(wrong(
                "refcount_order",
                96,
                format_args!("is {}, the highest is 6", self.refcount_order),
            ));
        }
        if u64::from(self.l1_size) * 8 > L1_BYTES_MAX {
            return Err(wrong(
                "l1_size",
                36,
                format_args!("is {}, the highest is {}", self.l1_size, L1_BYTES_MAX / 8),
            ));
        }
        let needed = self.l1_entries_needed();
        if u64::from(self.l1_size) < needed {
            return Err(wrong(
                "l1_size",
                36,
                format_args!("is {}, but the disk's size needs {needed}", self.l1_size),
            ));
        }
        if self.l1_size > 0 {
            if self.l1_table_offset == 0 {
                return Err(wrong("l1_table_offset", 40, "is 0"));
            }
            self.placed(
                "l1_table_offset",
                40,
                self.l1_table_offset,
                u64::from(self.l1_size) * 8,
            )?;
        }
        if self.crypt_method > 2 {
            return Err(wrong(
                "crypt_method",
                32,
                format_args!("is {}, the highest is 2", self.crypt_method),
            ));
        }
        let packed = self.incompatible & features::COMPRESSION != 0;
        if packed != (self.compression_type != 0) {
            return Err(wrong(
                "compression_type",
                104,
                format_args!(
                    "is {}, the incompatible feature bit 3 says otherwise",
                    self.compression_type
                ),
            ));
        }
        Ok(())
    }

    /// Refuses incompatible features that the specification does not have, by name.
    pub fn check_known(&self) -> Result<()> {
        self.refuse(self.incompatible & !features::INCOMPATIBLE_KNOWN)
    }

    fn refuse(&self, features: u64) -> Result<()> {
        if features == 0 {
            return Ok(());
        }
        let table = self.extension(extensions::FEATURE_NAMES);
        Err(Error::unsupported(format!(
            "needs a feature that diskplane lacks: {}",
            features::names(FeatureKind::Incompatible, features, table)
        )))
    }

    /// Refuses features that make the image unreadable to this code, by name.
    pub fn check_features(&self) -> Result<()> {
        self.check_known()?;
        if self.data_file_raw() && self.backing.is_some() {
            return Err(Error::corrupt(
                "header: 'raw external data' (autoclear bit 1) and a backing file exclude each other",
            ));
        }
        self.compression().map(drop)
    }

    /// Why a writer of this code's abilities must leave the image alone, if so.
    pub fn read_only_because(&self) -> Option<String> {
        if self.incompatible & features::CORRUPT != 0 {
            return Some("it is marked corrupt: run diskplane check --repair all".into());
        }
        if self.incompatible & features::DIRTY != 0 {
            return Some(
                "it was not closed cleanly (its dirty bit is set), and is to be repaired before: run \
                 diskplane check --repair all"
                    .into(),
            );
        }
        if self.nb_snapshots > 0 && self.has_data_file() {
            return Some("internal snapshots beside an external data file".into());
        }
        None
    }

    /// The header's bytes: fields, extensions, backing file's name. Fails with
    /// [`block::ErrorKind::Invalid`] when they do not fit a cluster.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = self.encode_fields(0);
        extensions::encode(&self.extensions, &mut out)?;
        let name = self.backing_bytes();
        let name_at = if name.is_empty() { 0 } else { out.len() };
        out.extend_from_slice(&name);
        if out.len() as u64 > self.cluster_size() {
            return Err(Error::invalid(format!(
                "header, extensions and backing file's name take {} bytes, more than a cluster",
                out.len()
            )));
        }
        let fields = self.encode_fields(name_at as u64);
        out.splice(..fields.len(), fields);
        Ok(out)
    }

    /// Bytes `0..header_length`, with the backing file's name at byte `name_at` of the file.
    pub(super) fn encode_fields(&self, name_at: u64) -> Vec<u8> {
        let mut out = vec![0; self.header_length as usize];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = out.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        if self.version >= 3 {
            put(72, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &self.header_length.to_be_bytes());
            put(104, &[self.compression_type]);
            put(105, &self.unknown_fields);
        }
        let name_len = self.backing_bytes().len();
        let head: [(usize, &[u8]); 13] = [
            (0, &MAGIC),
            (4, &self.version.to_be_bytes()),
            (8, &name_at.to_be_bytes()),
            (
                16,
                &u32::try_from(name_len).unwrap_or(u32::MAX).to_be_bytes(),
            ),
            (20, &self.cluster_bits.to_be_bytes()),
            (24, &self.size.to_be_bytes()),
            (32, &self.crypt_method.to_be_bytes()),
            (36, &self.l1_size.to_be_bytes()),
            (40, &self.l1_table_offset.to_be_bytes()),
            (48, &self.refcount_table_offset.to_be_bytes()),
            (56, &self.refcount_table_clusters.to_be_bytes()),
            (60, &self.nb_snapshots.to_be_bytes()),
            (64, &self.snapshots_offset.to_be_bytes()),
        ];
        for (at, bytes) in head {
            put(at, bytes);
        }
        out
    }

    /// Data of the first extension of type `kind`.
    pub fn extension(&self, kind: u32) -> Option<&[u8]> {
        let found = self.extensions.iter().find(|e| e.kind == kind)?;
        Some(&found.data)
    }

    /// The backing file's name as the image stores it; empty where there is none.
    pub(crate) fn backing_bytes(&self) -> Cow<'_, [u8]> {
        block::name::bytes(self.backing.as_deref().unwrap_or_default())
    }

    /// The backing file's format as the image stores it.
    pub fn backing_format(&self) -> Option<String> {
        self.extension(extensions::BACKING_FORMAT)
            .map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// Whether the guest's clusters are in an external file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & features::DATA_FILE != 0
    }

    /// Whether that file is to be the disk's raw image too.
    pub fn data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & features::DATA_FILE_RAW != 0
    }

    /// The external data file, with its name as the image stores it.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for a name that cannot be one.
    pub fn data_file(&self) -> Result<Option<DataFile>> {
        if !self.has_data_file() {
            return Ok(None);
        }
        let name = match self.extension(extensions::DATA_FILE_NAME) {
            None => None,
            Some(name) if name.is_empty() || name.len() > limits::FILE_NAME_BYTES_MAX => {
                return Err(Error::corrupt(format!(
                    "header: the data file's name has {} bytes, allowed are 1 to {}",
                    name.len(),
                    limits::FILE_NAME_BYTES_MAX
                )));
            }
            Some(name) if name.contains(&0) => {
                return Err(Error::corrupt(
                    "header: the data file's name contains a zero byte",
                ));
            }
            Some(name) => Some(block::name::of_bytes(name)),
        };
        Ok(Some(DataFile {
            name,
            raw: self.data_file_raw(),
        }))
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bits of a refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Guest bytes that one L1 entry (one L2 table) covers.
    pub fn l1_entry_bytes(&self) -> u64 {
        1 << (2 * self.cluster_bits - self.l2_entry_bits())
    }

    /// Whether L2 entries have 128 bits, with subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & features::EXTENDED_L2 != 0
    }

    /// log2 of the bytes of an L2 entry.
    pub(super) fn l2_entry_bits(&self) -> u32 {
        3 + u32::from(self.extended_l2())
    }

    /// L1 entries that the disk's size needs.
    pub fn l1_entries_needed(&self) -> u64 {
        self.size.div_ceil(self.l1_entry_bytes())
    }

    /// How compressed clusters are packed; an unknown way is refused.
    pub fn compression(&self) -> Result<Compression> {
        match self.compression_type {
            0 => Ok(Compression::Zlib),
            1 => Ok(Compression::Zstd),
            other => Err(Error::unsupported(format!(
                "header: compression_type at byte 104 is {other}, known are 0 (zlib) and 1 (zstd)"
            ))),
        }
    }
}
