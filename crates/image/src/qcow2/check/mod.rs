//! What a check of an image needs to know of the format: how table bytes read, and what is wrong with
//! them. No I/O and no state: crate `tool` walks the image and counts.
//!
//! The judgement is `qemu-img check`'s, so that both find the same number of corruptions in
//! an image: each fault below counts as one.
//!
//! * `table`: L1 and L2 entries (specification: "Cluster mapping").
//! * `refcount`: the refcount table and its blocks ("Reference counting").
//! * `snapshot`: the snapshot table ("Snapshot table section").
//! * `bitmap`: directory and tables of persistent bitmaps ("Bitmaps").
//!
//! ```text
//!   header ─┬─▶ L1 ─▶ L2 ─▶ clusters        ┬─▶ refcount table ─▶ refcount blocks
//!           ├─▶ snapshot table ─▶ L1 ─▶ …   ├─▶ bitmap directory ─▶ bitmap table ─▶ bitmap
//!           └─▶ LUKS header
//! ```

mod bitmap;
mod refcount;
mod snapshot;
mod table;

pub use bitmap::{
    BITMAP_AUTO, BITMAP_BYTES_MAX, BITMAP_DIRECTORY_BYTES_MAX, BITMAP_DIRTY_TRACKING,
    BITMAP_EXTRA_COMPATIBLE, BITMAP_GRANULARITY_BITS, BITMAP_IN_USE, BITMAP_NAME_BYTES_MAX,
    BITMAPS_MAX, Bitmap, BitmapDirectory, DIRECTORY_ENTRY_BYTES, bitmap_data,
};
pub use refcount::{Block, BlockFault, block_at, each_refcount, set_refcount};
pub use snapshot::{
    NO_ICOUNT, SNAPSHOT_BYTES, SNAPSHOT_EXTRA_BYTES, SNAPSHOT_EXTRA_BYTES_KNOWN,
    SNAPSHOT_EXTRA_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX, Snapshot,
};
pub use table::{Fault, Faults, L1Entry, L2Entry, Target};

use super::entry::refcount_max;
use super::features;
use super::header::Header;

/// The constants of an image that its tables are read by.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// log2 of a refcount's width in bits.
    pub refcount_order: u32,
    /// L2 entries have 128 bits: an entry and the bitmap of its subclusters.
    pub extended: bool,
    /// Guest clusters lie in an external file: this file does not count them.
    pub data_file: bool,
}

impl Layout {
    /// The constants that `header` fixes.
    pub fn of(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            extended: header.extended_l2(),
            data_file: header.incompatible & features::DATA_FILE != 0,
        }
    }

    /// Bytes of a cluster.
    #[inline]
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The part of `offset` that lies behind the start of its cluster.
    #[inline]
    pub fn within(&self, offset: u64) -> u64 {
        offset & (self.cluster() - 1)
    }

    /// log2 of the clusters that one refcount block counts.
    #[inline]
    pub fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Largest refcount that fits.
    pub fn refcount_max(&self) -> u64 {
        refcount_max(self.refcount_order)
    }

    /// 64-bit words of an L2 entry.
    #[inline]
    pub fn entry_words(&self) -> usize {
        1 + usize::from(self.extended)
    }

    /// Bytes of a cluster up to the end of its last subcluster that has data, by the bitmap of its L2 entry, where that has one: the
    /// low half has a bit for each that does (qcow2 specification, "Extended L2 Entries").
    #[inline]
    pub fn used(&self, bitmap: u64) -> u64 {
        let last = 32 - u64::from((bitmap as u32).leading_zeros());
        match self.extended {
            true => last << (self.cluster_bits - 5),
            false => self.cluster(),
        }
    }
}

#[cfg(test)]
pub(super) fn layout(cluster_bits: u32, refcount_order: u32) -> Layout {
    Layout {
        cluster_bits,
        refcount_order,
        extended: false,
        data_file: false,
    }
}
