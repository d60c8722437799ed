//! How large the file of an image will be: what `qemu-img measure` says.
//!
//! The figures are bounds that an image never passes, by the arithmetic that QEMU publishes for a preallocated image:
//! header, L1, L2 tables, refcount table and blocks, and data (specification of qcow2: "Header", "Cluster mapping",
//! "Host cluster management").

use crate::source::Source;
use crate::work::Work;
use block::{Result, Storage};
use image::qcow2::bitmap;

/// Bytes of a sector: a raw image has whole ones.
const SECTOR: u64 = 512;
/// Bytes of an L1 or refcount table entry.
const ENTRY: u64 = 8;
/// Bytes of a bitmap's entry in the directory, before its name.
const BITMAP_ENTRY: u64 = 24;

/// How large a file will be, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// With the data that the source has.
    pub required: u64,
    /// Once all of the disk was written to.
    pub fully_allocated: u64,
    /// Besides, for the source's bitmaps; `None` where there cannot be any.
    pub bitmaps: Option<u64>,
}

/// What of a new qcow2 image its size depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// L2 entries have 16 bytes.
    pub extended_l2: bool,
    /// Bytes of an encryption header, or 0.
    pub encryption_len: u64,
    /// All clusters are allocated from the beginning.
    pub allocated: bool,
    /// There is a backing file, whose data are not known.
    pub backed: bool,
}

/// A raw image of `size` bytes.
pub fn raw(size: u64) -> Measured {
    let size = size.next_multiple_of(SECTOR);
    Measured {
        required: size,
        fully_allocated: size,
        bitmaps: None,
    }
}

/// A new qcow2 image of `size` bytes, with the data of `source`, where there is one.
///
/// # Errors
///
/// What asking for the source's map fails with; `Interrupted`.
pub fn qcow2(
    layout: &Layout,
    size: u64,
    source: Option<&mut Source<'_>>,
    work: &mut Work<'_>,
) -> Result<Measured> {
    let cluster = layout.cluster_size;
    let disk = size.next_multiple_of(cluster);
    let data = match source {
        _ if layout.allocated => disk,
        Some(_) if layout.backed => disk,
        Some(source) => data_of(source, cluster, work)?,
        None => 0,
    };
    let encryption = layout.encryption_len.next_multiple_of(cluster);
    let fully_allocated = encryption + layout.metadata(disk) + disk;
    Ok(Measured {
        required: fully_allocated - disk + data,
        fully_allocated,
        bitmaps: None,
    })
}

/// Bytes of the clusters that have data.
fn data_of(source: &mut Source<'_>, cluster: u64, work: &mut Work<'_>) -> Result<u64> {
    let (size, mut at, mut data) = (source.size(), 0, 0);
    while at < size {
        work.reached(at)?;
        let run = source.run(at, size - at)?;
        if run.lost {
            // What cannot be converted is not measured: that fails, and says why.
            source.read(at, &mut [0])?;
        }
        let mut end = at + run.len;
        if run.data && run.allocated && !run.zero {
            end = end.next_multiple_of(cluster);
            data += end - at + at % cluster;
        }
        at = end;
    }
    Ok(data)
}

impl Layout {
    /// Bytes of metadata of an image with all of `disk` bytes, whole clusters.
    fn metadata(&self, disk: u64) -> u64 {
        let cluster = self.cluster_size;
        let entry = if self.extended_l2 { 16 } else { 8 };
        let l2_tables = (disk / cluster).div_ceil(cluster / entry);
        let l1 = (l2_tables * ENTRY).next_multiple_of(cluster);
        let before = cluster + l2_tables * cluster + l1;
        before + self.refcounts((before + disk) / cluster) * cluster
    }

    /// Clusters of refcount blocks and their table that count `clusters` others, and themselves.
    fn refcounts(&self, clusters: u64) -> u64 {
        let per_block = self.cluster_size * 8 / u64::from(self.refcount_bits);
        let per_table = self.cluster_size / ENTRY;
        let mut own = 0;
        // Each turn adds what the turn before lacked.
        loop {
            let blocks = (clusters + own).div_ceil(per_block);
            let needed = blocks + blocks.div_ceil(per_table);
            if needed == own {
                return own;
            }
            own = needed;
        }
    }
}

/// Bytes that the bitmaps of the image in `source` take in an image with such clusters, with all of their bits
/// stored. Inconsistent ones do not count: they cannot be copied.
///
/// # Errors
///
/// As [`bitmap::list`].
pub fn bitmaps(source: &dyn Storage, size: u64, cluster: u64) -> Result<u64> {
    let (mut bits, mut directory) = (0, 0);
    for entry in bitmap::list(source)?.iter().filter(|entry| !entry.in_use()) {
        let bytes = size.div_ceil(entry.granularity()).div_ceil(8);
        let clusters = bytes.div_ceil(cluster);
        bits += clusters * cluster + (clusters * ENTRY).next_multiple_of(cluster);
        directory += (BITMAP_ENTRY + entry.raw_name().len() as u64).next_multiple_of(8);
    }
    Ok(bits + directory.next_multiple_of(cluster))
}
