//! Writing a new, empty image.
//!
//! ```text
//!   cluster 0   header, extensions, backing file's name
//!           1 … refcount table
//!           …   refcount blocks, as many as cover all of this
//!           …   L1 table, all zeros
//!           …   L2 tables, only where the guest's clusters are preallocated
//!           …   LUKS header and key slots, where data are to be encrypted
//!           …   the guest's clusters, where they are preallocated in this file
//! ```
//!
//! The header is written last, behind a barrier: until then the file shows no
//! format, so a crash leaves no half of an image that looks like one.

use super::crypt::{CRYPT_LUKS, CRYPT_NONE};
use super::entry::{COPIED, ZERO};
use super::extensions::{self, Extension};
use super::subcluster::SUBCLUSTERS;
use super::{
    Compression, EXTENDED_CLUSTER_BITS_MIN, Header, L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX, V2_LEN,
    V3_LEN, features,
};
use block::{Context, Error, Result, Storage, align_up, limits, size};
use crypto::luks;

/// What a new image is to be. The default is QEMU's: version 3, 64 KiB clusters, 16-bit refcounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the virtual disk, rounded up to whole sectors of 512.
    pub size: u64,
    /// 2 (QEMU's `compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Bits of a refcount: a power of two up to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Allow writers to defer refcounts under the dirty bit; version 3 only.
    pub lazy_refcounts: bool,
    /// Name and format of the backing file, as they are to be stored.
    pub backing: Option<(String, String)>,
    /// How compressed clusters will be packed; version 2 knows zlib only.
    pub compression: Compression,
    /// L2 entries with subclusters, 32 to a cluster; version 3 with clusters of 16 KiB or more only.
    pub extended_l2: bool,
    /// Name of the external data file, as it is to be stored; version 3 only. The file itself is not made here.
    pub data_file: Option<String>,
    /// The data file is to be the disk's raw image too: without a backing file only. All L2 entries are
    /// there from the beginning then (8 or 16 bytes a cluster).
    pub data_file_raw: bool,
    /// Every guest cluster has its place in the file from the beginning; the space itself is not reserved. With a
    /// backing file only where there are subclusters.
    pub preallocated: bool,
    /// The header and first key of data that are to be encrypted with LUKS.
    pub encryption: Option<luks::Volume>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            lazy_refcounts: false,
            backing: None,
            compression: Compression::Zlib,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            preallocated: false,
            encryption: None,
        }
    }
}

/// Where the tables of a new image go, in clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
    l2: u64,
    luks: u64,
    /// The guest's clusters.
    data: u64,
}

impl Layout {
    /// The fewest refcount structures that cover so many clusters of the other kinds, the header and themselves.
    fn of([l1, l2, luks, data]: [u64; 4], cluster_size: u64, refcount_bits: u32) -> Self {
        let per_block = cluster_size * 8 / u64::from(refcount_bits);
        let mut layout = Self {
            refcount_table: 1,
            refcount_blocks: 1,
            l1,
            l2,
            luks,
            data,
        };
        // Each turn adds what the turn before lacked; a block covers at least 64 clusters, so the
        // additions shrink and this ends.
        loop {
            let blocks = layout.clusters().div_ceil(per_block);
            let table = (blocks * 8).div_ceil(cluster_size);
            if blocks <= layout.refcount_blocks && table <= layout.refcount_table {
                return layout;
            }
            layout.refcount_blocks = blocks.max(layout.refcount_blocks);
            layout.refcount_table = table.max(layout.refcount_table);
        }
    }

    fn clusters(&self) -> u64 {
        self.data_first() + self.data
    }

    /// The first of the guest's clusters.
    fn data_first(&self) -> u64 {
        self.luks_first() + self.luks
    }

    /// The first cluster of the L1 table.
    fn l1_first(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks
    }

    /// The first cluster of the LUKS header.
    fn luks_first(&self) -> u64 {
        self.l1_first() + self.l1 + self.l2
    }
}

impl CreateOptions {
    /// Checks the rules that qemu-img has too. Errors name the option and what it may be.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::invalid(message));
        if self.encryption.is_some() && self.data_file_raw {
            return wrong("data_file_raw=on and encryption exclude each other".into());
        }
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return wrong(format!(
                "cluster_size is {}: it must be a power of two from 512 to 2M",
                self.cluster_size
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return wrong(format!(
                "refcount_bits is {}: it must be a power of two from 1 to 64",
                self.refcount_bits
            ));
        }
        match self.version {
            2 if self.refcount_bits != 16 => {
                return wrong("refcount_bits other than 16 need compat=1.1".into());
            }
            2 if self.lazy_refcounts => return wrong("lazy_refcounts=on needs compat=1.1".into()),
            2 if self.compression != Compression::Zlib => {
                return wrong("compression_type=zstd needs compat=1.1".into());
            }
            2 if self.extended_l2 => return wrong("extended_l2=on needs compat=1.1".into()),
            2 if self.data_file.is_some() => return wrong("data_file needs compat=1.1".into()),
            2 | 3 => {}
            other => return wrong(format!("version {other} is not known: 2 or 3")),
        }
        if self.extended_l2 && self.cluster_size < 1 << EXTENDED_CLUSTER_BITS_MIN {
            return wrong(format!(
                "extended_l2=on needs a cluster_size of {} or more",
                size::human(1 << EXTENDED_CLUSTER_BITS_MIN)
            ));
        }
        self.validate_data_file()?;
        if self.preallocated && self.backing.is_some() && !self.extended_l2 {
            return wrong(
                "preallocation and a backing file exclude each other, unless extended_l2=on: the clusters \
                 would hide what the backing file has"
                    .into(),
            );
        }
        if self.preallocated && self.encryption.is_some() && self.version < 3 {
            return wrong("preallocation of an encrypted image needs compat=1.1".into());
        }
        if let Some((name, format)) = &self.backing {
            if !block::name::fits(name, limits::FILE_NAME_BYTES_MAX) {
                return wrong(format!(
                    "the backing file's name has {} bytes: 1 to {} without a zero byte are possible",
                    block::name::len(name),
                    limits::FILE_NAME_BYTES_MAX
                ));
            }
            if format.is_empty() || format.len() > 16 {
                return wrong(format!(
                    "the backing file's format '{}' is not one",
                    format.escape_default()
                ));
            }
        }
        let size_max = (L1_BYTES_MAX / 8)
            .saturating_mul(self.l2_bytes())
            .min(limits::DISK_BYTES_MAX);
        if self.size > size_max {
            return wrong(format!(
                "a disk of {} is too large for clusters of {}: the most is {}",
                size::human(self.size),
                size::human(self.cluster_size),
                size::human(size_max)
            ));
        }
        Ok(())
    }

    fn validate_data_file(&self) -> Result<()> {
        let Some(name) = &self.data_file else {
            return match self.data_file_raw {
                true => Err(Error::invalid("data_file_raw=on needs a data_file")),
                false => Ok(()),
            };
        };
        if !block::name::fits(name, limits::FILE_NAME_BYTES_MAX) {
            return Err(Error::invalid(format!(
                "the data file's name has {} bytes: 1 to {} without a zero byte are possible",
                block::name::len(name),
                limits::FILE_NAME_BYTES_MAX
            )));
        }
        if self.data_file_raw && self.backing.is_some() {
            return Err(Error::invalid(
                "data_file_raw=on and a backing file exclude each other: the raw file would lack what is \
                 in the backing file only",
            ));
        }
        Ok(())
    }

    /// Bytes of a subcluster: what `extended_l2` makes of a cluster.
    pub fn subcluster_size(&self) -> u64 {
        self.cluster_size / u64::from(SUBCLUSTERS)
    }

    /// Guest bytes that one L2 table covers.
    fn l2_bytes(&self) -> u64 {
        let entry = if self.extended_l2 { 16 } else { 8 };
        self.cluster_size / entry * self.cluster_size
    }

    /// Where in the file the guest's clusters are, in bytes; none unless they are preallocated in it.
    pub fn data_range(&self) -> std::ops::Range<u64> {
        let (_, layout) = self.header();
        layout.data_first() * self.cluster_size..layout.clusters() * self.cluster_size
    }

    pub(super) fn header(&self) -> (Header, Layout) {
        let size = align_up(self.size, 512);
        let l1_entries = size.div_ceil(self.l2_bytes());
        let l1 = (l1_entries * 8).div_ceil(self.cluster_size);
        let l2 = match self.preallocated || self.data_file_raw {
            true => l1_entries,
            false => 0,
        };
        let data = match self.preallocated && self.data_file.is_none() {
            true => size.div_ceil(self.cluster_size),
            false => 0,
        };
        let luks = self.encryption.as_ref().map_or(0, luks::Volume::len);
        let luks_clusters = luks.div_ceil(self.cluster_size);
        let other = [l1, l2, luks_clusters, data];
        let layout = Layout::of(other, self.cluster_size, self.refcount_bits);
        let v3 = self.version >= 3;
        let packed = self.compression == Compression::Zstd;
        let mut extensions = Vec::new();
        if let Some((_, format)) = &self.backing {
            extensions.push(Extension {
                kind: extensions::BACKING_FORMAT,
                data: format.as_bytes().to_vec(),
            });
        }
        if let Some(name) = &self.data_file {
            extensions.push(Extension {
                kind: extensions::DATA_FILE_NAME,
                data: block::name::bytes(name).into_owned(),
            });
        }
        if self.encryption.is_some() {
            let at = layout.luks_first() * self.cluster_size;
            extensions.push(Extension {
                kind: extensions::CRYPTO_HEADER,
                data: [at.to_be_bytes(), luks.to_be_bytes()].concat(),
            });
        }
        if v3 {
            extensions.push(Extension {
                kind: extensions::FEATURE_NAMES,
                data: features::standard_table(),
            });
        }
        let header = Header {
            version: self.version,
            backing: self.backing.as_ref().map(|(name, _)| name.clone()),
            cluster_bits: self.cluster_size.trailing_zeros(),
            size,
            crypt_method: match self.encryption {
                Some(_) => CRYPT_LUKS,
                None => CRYPT_NONE,
            },
            // `validate` bounds the table to 32 MiB.
            l1_size: u32::try_from(l1_entries).unwrap_or(u32::MAX),
            l1_table_offset: if l1 == 0 {
                0
            } else {
                layout.l1_first() * self.cluster_size
            },
            refcount_table_offset: self.cluster_size,
            refcount_table_clusters: u32::try_from(layout.refcount_table).unwrap_or(u32::MAX),
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible: [
                (self.data_file.is_some(), features::DATA_FILE),
                (packed, features::COMPRESSION),
                (self.extended_l2, features::EXTENDED_L2),
            ]
            .into_iter()
            .filter_map(|(on, bit)| on.then_some(bit))
            .sum(),
            compatible: match self.lazy_refcounts {
                true => features::LAZY_REFCOUNTS,
                false => 0,
            },
            autoclear: match self.data_file_raw {
                true => features::DATA_FILE_RAW,
                false => 0,
            },
            refcount_order: self.refcount_bits.trailing_zeros(),
            header_length: if v3 { V3_LEN } else { V2_LEN },
            compression_type: u8::from(packed),
            unknown_fields: if v3 { vec![0; 7] } else { Vec::new() },
            extensions,
        };
        (header, layout)
    }
}

/// Writes an empty image to `storage`: a new file, or one whose contents may be lost.
///
/// # Errors
///
/// [`block::ErrorKind::Invalid`] for options that qemu-img refuses too (nothing is written then), or
/// what the host refused.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.validate()?;
    let (mut header, layout) = options.header();
    let encoded = encode(&mut header)?;
    let table_bytes = layout.refcount_table * options.cluster_size;
    if table_bytes > REFCOUNT_TABLE_BYTES_MAX.max(options.cluster_size) {
        return Err(Error::invalid(format!(
            "the disk needs a refcount table of {}: choose larger clusters",
            size::human(table_bytes)
        )));
    }
    write(storage, options, &layout, &encoded).context(|| storage.name())
}

/// The bytes of a new image's header, which is judged once more.
pub(super) fn encode(header: &mut Header) -> Result<Vec<u8>> {
    let encoded = match header.encode() {
        Ok(bytes) => bytes,
        // The feature names are for people: in small clusters a backing file's name goes first.
        Err(_) => {
            header
                .extensions
                .retain(|e| e.kind != extensions::FEATURE_NAMES);
            header.encode()?
        }
    };
    header.validate()?;
    Ok(encoded)
}

fn write(
    storage: &dyn Storage,
    options: &CreateOptions,
    layout: &Layout,
    header: &[u8],
) -> Result<()> {
    let cluster = options.cluster_size;
    let end = layout.clusters() * cluster;
    let len = storage.len()?;
    forget(storage, cluster)?;
    if len > cluster {
        storage.write_zeroes(cluster, len.min(end) - cluster, false)?;
    }
    if len < end {
        storage.set_len(end)?;
    }
    let blocks_at = 1 + layout.refcount_table;
    let mut table = Vec::new();
    for block in 0..layout.refcount_blocks {
        table.extend_from_slice(&((blocks_at + block) * cluster).to_be_bytes());
    }
    storage.write_at(cluster, &table)?;
    let per_block = cluster * 8 / u64::from(options.refcount_bits);
    for block in 0..layout.refcount_blocks {
        let used = (layout.clusters() - block * per_block).min(per_block);
        let ones = ones(used, options.refcount_bits);
        storage.write_at((blocks_at + block) * cluster, &ones)?;
    }
    if layout.l2 > 0 {
        preallocate(storage, options, layout)?;
    }
    if let Some(volume) = &options.encryption {
        volume.write(storage, layout.luks_first() * cluster)?;
    }
    storage.sync()?;
    storage.write_at(0, header)?;
    storage.sync()
}

/// Makes sure that no old header shows in a file that is begun anew: a crash would leave one over what it knows
/// nothing of.
pub(super) fn forget(storage: &dyn Storage, cluster: u64) -> Result<()> {
    let old = storage.len()?.min(cluster);
    if old == 0 {
        return Ok(());
    }
    storage.write_zeroes(0, old, false)?;
    storage.sync()
}

/// Writes L1 and L2 tables in which each guest cluster has its place: its own in the data file, or the
/// next one in this file.
fn preallocate(storage: &dyn Storage, options: &CreateOptions, layout: &Layout) -> Result<()> {
    let cluster = options.cluster_size;
    let first = layout.l1_first() + layout.l1;
    let tables = (first..first + layout.l2).map(|at| (at * cluster) | COPIED);
    // At most 32 MiB.
    let l1: Vec<u8> = tables.flat_map(u64::to_be_bytes).collect();
    storage.write_at(layout.l1_first() * cluster, &l1)?;
    let place = match options.data_file {
        Some(_) => 0,
        None => layout.data_first(),
    };
    // What is not encrypted zeros does not read as zeros: the entry says so then.
    let mark = match options.encryption.is_some() && !options.extended_l2 {
        true => ZERO,
        false => 0,
    };
    // With a raw data file all subclusters are allocated; else none is, and each shows what is behind it.
    let bitmap = match options.data_file_raw {
        true => u64::from(u32::MAX),
        false => 0,
    };
    let entry = if options.extended_l2 { 16 } else { 8 };
    let clusters = align_up(options.size, 512).div_ceil(cluster);
    let mut table = Vec::new();
    for (nth, first_guest) in (0..clusters)
        .step_by((cluster / entry) as usize)
        .enumerate()
    {
        table.clear();
        for guest in first_guest..clusters.min(first_guest + cluster / entry) {
            let raw = ((place + guest) * cluster) | COPIED | mark;
            table.extend_from_slice(&raw.to_be_bytes());
            if options.extended_l2 {
                table.extend_from_slice(&bitmap.to_be_bytes());
            }
        }
        storage.write_at((first + nth as u64) * cluster, &table)?;
    }
    Ok(())
}

/// `count` refcounts of 1, each `bits` wide: below a byte the first is in the lowest bits, else big-endian.
fn ones(count: u64, bits: u32) -> Vec<u8> {
    let bits = u64::from(bits);
    // At most 2 MiB: what a refcount block holds.
    let mut out = vec![0u8; (count * bits).div_ceil(8) as usize];
    for index in 0..count {
        let (byte, shift) = match bits {
            1 | 2 | 4 => (index * bits / 8, index * bits % 8),
            _ => ((index + 1) * bits / 8 - 1, 0),
        };
        if let Some(byte) = out.get_mut(byte as usize) {
            *byte |= 1 << shift;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::ErrorKind;

    #[test]
    fn refcounts_of_every_width() {
        for (bits, count, bytes) in [
            (1, 10, &[0xff, 0x03][..]),
            (2, 3, &[0b0001_0101]),
            (4, 3, &[0x11, 0x01]),
            (8, 2, &[1, 1]),
            (16, 2, &[0, 1, 0, 1]),
            (32, 1, &[0, 0, 0, 1]),
            (64, 1, &[0, 0, 0, 0, 0, 0, 0, 1]),
        ] {
            assert_eq!(ones(count, bits), bytes, "{bits}");
        }
    }

    #[test]
    fn refcount_structures_cover_themselves() {
        for (l1, luks, cluster, bits) in [
            (1, 0, 65536, 16),
            (0, 0, 65536, 16),
            (65536, 0, 512, 64),
            (61, 0, 512, 64),
            (62, 0, 512, 64),
            (1, 61, 512, 64),
            (1, 4040, 512, 64),
            (16, 1, 2 << 20, 1),
        ] {
            let layout = Layout::of([l1, l1 / 2, luks, l1], cluster, bits);
            let per_block = cluster * 8 / u64::from(bits);
            assert!(layout.refcount_blocks * per_block >= layout.clusters());
            assert!(layout.refcount_table * cluster / 8 >= layout.refcount_blocks);
            // And no more than that.
            assert!((layout.refcount_blocks - 1) * per_block < layout.clusters());
        }
    }

    #[test]
    fn refuses_what_qemu_img_refuses() {
        let good = CreateOptions {
            size: 1 << 30,
            ..CreateOptions::default()
        };
        assert!(good.validate().is_ok());
        let change = |f: fn(&mut CreateOptions)| {
            let mut options = good.clone();
            f(&mut options);
            options.validate()
        };
        for (refused, why) in [
            (change(|o| o.cluster_size = 1000), "cluster_size is 1000"),
            (change(|o| o.cluster_size = 256), "cluster_size is 256"),
            (change(|o| o.cluster_size = 4 << 20), "cluster_size is"),
            (change(|o| o.refcount_bits = 3), "refcount_bits is 3"),
            (change(|o| o.refcount_bits = 128), "refcount_bits is 128"),
            (change(|o| o.refcount_bits = 0), "refcount_bits is 0"),
            (change(|o| o.version = 4), "version 4"),
            (
                change(|o| (o.version, o.refcount_bits) = (2, 8)),
                "refcount_bits other",
            ),
            (
                change(|o| (o.version, o.lazy_refcounts) = (2, true)),
                "lazy_refcounts",
            ),
            (
                change(|o| (o.version, o.compression) = (2, Compression::Zstd)),
                "compression_type",
            ),
            (
                change(|o| (o.version, o.extended_l2) = (2, true)),
                "extended_l2=on needs compat",
            ),
            (
                change(|o| (o.version, o.data_file) = (2, Some("d".into()))),
                "data_file needs compat",
            ),
            (change(|o| o.data_file_raw = true), "data_file_raw=on needs"),
            (
                change(|o| o.data_file = Some(String::new())),
                "the data file's name has 0 bytes",
            ),
            (
                change(|o| {
                    (o.data_file, o.data_file_raw) = (Some("d".into()), true);
                    o.backing = Some(("b".into(), "raw".into()));
                }),
                "data_file_raw=on and a backing file",
            ),
            (
                change(|o| (o.cluster_size, o.extended_l2) = (8192, true)),
                "extended_l2=on needs a cluster_size of 16 KiB",
            ),
            (
                change(|o| (o.cluster_size, o.size) = (512, (128 << 30) + 1)),
                "a disk of 128 GiB",
            ),
            (
                change(|o| o.backing = Some(("x".repeat(1024), "raw".into()))),
                "the backing file's name",
            ),
        ] {
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().starts_with(why), "{error}");
        }
        assert!(change(|o| (o.cluster_size, o.size) = (512, 128 << 30)).is_ok());
    }

    #[test]
    fn the_header_reads_back() {
        for (version, extended_l2) in [(2, false), (3, false), (3, true)] {
            let options = CreateOptions {
                size: 1000,
                version,
                cluster_size: 16384,
                extended_l2,
                backing: Some(("base.raw".into(), "raw".into())),
                ..CreateOptions::default()
            };
            let (header, _) = options.header();
            let parsed = Header::parse(&header.encode().unwrap()).unwrap();
            assert_eq!(parsed, header);
            assert_eq!(parsed.size, 1024);
            assert_eq!(parsed.extended_l2(), extended_l2);
            assert_eq!(parsed.backing_format().as_deref(), Some("raw"));
        }
    }
}
