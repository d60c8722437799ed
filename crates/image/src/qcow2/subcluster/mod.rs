//! Subclusters (specification: "Extended L2 Entries").
//!
//! An image with extended L2 entries keeps for each of the 32 subclusters of a cluster whether it is
//! there, so that a small write into a large cluster copies little or nothing:
//!
//! ```text
//!   word 0   the standard entry; its bit 0 is reserved
//!   word 1   63 … 32: subcluster 31 … 0 reads as zeros │ 31 … 0: subcluster 31 … 0 is allocated
//! ```
//!
//! | bits (zeros, allocated) | with a cluster | without |
//! |---|---|---|
//! | 0 0 | the backing file's bytes, or zeros | the same |
//! | 1 0 | zeros | zeros |
//! | 0 1 | the cluster's bytes | corrupt |
//! | 1 1 | corrupt | corrupt |
//!
//! A compressed cluster has no subclusters: its bitmap is zero.
//!
//! Readers without the lock must see both words of one moment. Where only the bitmap changes that is
//! one store; where both change the frame's tag changes with them (`cache::Cache::set_pair`), so that a reader
//! throws away what it read.
//!
//! * `map`: reading. `write`: planning writes, and what a commit does. `zero`: zeroing and discarding.

#[cfg(test)]
mod corners;
mod map;
mod write;
mod zero;

use super::Qcow2;
use super::entry::{Bad, Entry, Geometry, ZERO};
use super::state::Ask;
use crate::metadata::Walk;
use std::sync::atomic::Ordering;

/// Subclusters of a cluster.
pub(super) const SUBCLUSTERS: u32 = 32;

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Unallocated,
    Zero,
    Allocated,
}

/// The second word of an extended L2 entry, sound: no subcluster has both bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bitmap {
    allocated: u32,
    zero: u32,
}

/// Bits of `count` subclusters from `first` on.
fn mask(first: u32, count: u32) -> u32 {
    debug_assert!(first + count <= SUBCLUSTERS);
    // In 64 bits, since 32 subclusters are possible.
    (((1u64 << count) - 1) << first) as u32
}

impl Bitmap {
    /// All subclusters unallocated.
    pub(super) const NONE: Self = Self {
        allocated: 0,
        zero: 0,
    };
    /// All allocated.
    pub(super) const ALLOCATED: Self = Self {
        allocated: u32::MAX,
        zero: 0,
    };
    /// All zeros.
    pub(super) const ZERO: Self = Self {
        allocated: 0,
        zero: u32::MAX,
    };

    #[inline]
    fn decode(raw: u64) -> Result<Self, Bad> {
        let bits = Self {
            allocated: raw as u32,
            zero: (raw >> 32) as u32,
        };
        match bits.allocated & bits.zero {
            0 => Ok(bits),
            _ => Err(Bad::BothBits),
        }
    }

    /// As it is on disk.
    pub(super) fn raw(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.allocated)
    }

    /// What subcluster `index` is.
    pub(super) fn kind(self, index: u32) -> Kind {
        match (self.allocated >> index & 1, self.zero >> index & 1) {
            (0, 0) => Kind::Unallocated,
            (0, _) => Kind::Zero,
            _ => Kind::Allocated,
        }
    }

    /// What subcluster `first` is, and how many from it on are the same.
    #[inline]
    pub(super) fn run(self, first: u32) -> (Kind, u32) {
        let (allocated, zero) = (self.allocated >> first, self.zero >> first);
        let left = SUBCLUSTERS - first;
        if allocated & 1 != 0 {
            (Kind::Allocated, allocated.trailing_ones())
        } else if zero & 1 != 0 {
            (Kind::Zero, zero.trailing_ones())
        } else {
            let used = allocated | zero;
            (Kind::Unallocated, used.trailing_zeros().min(left))
        }
    }

    /// With `count` subclusters from `first` on allocated.
    pub(super) fn allocate(self, first: u32, count: u32) -> Self {
        let mask = mask(first, count);
        Self {
            allocated: self.allocated | mask,
            zero: self.zero & !mask,
        }
    }

    /// With `count` subclusters from `first` on zeros.
    pub(super) fn make_zero(self, first: u32, count: u32) -> Self {
        let mask = mask(first, count);
        Self {
            allocated: self.allocated & !mask,
            zero: self.zero | mask,
        }
    }

    /// Whether any of `count` subclusters from `first` on is allocated.
    pub(super) fn any_allocated(self, first: u32, count: u32) -> bool {
        self.allocated & mask(first, count) != 0
    }
}

/// What an extended L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// `len` bytes from `offset` on hold the compressed cluster.
    Compressed { offset: u64, len: u64 },
    /// The bitmap says; `host` is there where anything is allocated.
    Standard {
        host: Option<u64>,
        copied: bool,
        bits: Bitmap,
    },
}

impl Geometry {
    /// Decodes the two words of an extended L2 entry.
    #[inline]
    pub(super) fn decode_extended(&self, raw: u64, bitmap: u64) -> Result<Cluster, Bad> {
        let (host, copied) = match self.decode(raw)? {
            Entry::Compressed { offset, len } if bitmap == 0 => {
                return Ok(Cluster::Compressed { offset, len });
            }
            Entry::Compressed { .. } => return Err(Bad::Compressed),
            Entry::Zero { .. } => return Err(Bad::Reserved),
            Entry::Data { host, copied } => (Some(host), copied),
            Entry::Unallocated => (None, false),
        };
        debug_assert_eq!(raw & ZERO, 0);
        let bits = Bitmap::decode(bitmap)?;
        if host.is_none() && bits.allocated != 0 {
            return Err(Bad::NoCluster);
        }
        Ok(Cluster::Standard { host, copied, bits })
    }

    /// Bytes of a subcluster.
    #[inline]
    pub(super) fn unit(&self) -> u64 {
        1 << self.unit_bits
    }

    /// Which subcluster of its cluster guest byte `at` is in.
    #[inline]
    pub(super) fn subcluster(&self, at: u64) -> u32 {
        (at >> self.unit_bits) as u32 & (SUBCLUSTERS - 1)
    }
}

impl Qcow2 {
    /// What entry `index` of the slice in `frame` says. With the lock held.
    pub(super) fn cluster_at(&self, frame: u32, index: usize, cluster: u64) -> Ask<Cluster> {
        let word = |at: usize| {
            let words = self.tables.words(frame);
            words.get(at).map_or(0, |w| w.load(Ordering::Relaxed))
        };
        let decoded = self
            .geometry
            .decode_extended(word(2 * index), word(2 * index + 1));
        Ok(decoded.map_err(|bad| self.bad_l2(cluster, bad))?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::entry::COPIED;
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            layout: crate::metadata::Layout::new(1 << 30, 16, 16, true),
            refcount_order: 4,
            version: 3,
            has_backing: false,
            unit_bits: 11,
            data_file: false,
            data_raw: false,
        }
    }

    #[test]
    fn decodes_extended_entries() {
        let g = geometry();
        let standard = |host, copied, allocated, zero| {
            let bits = Bitmap { allocated, zero };
            Ok(Cluster::Standard { host, copied, bits })
        };
        for (raw, bitmap, want) in [
            (0, 0, standard(None, false, 0, 0)),
            (0, 5 << 32, standard(None, false, 0, 5)),
            (0x5_0000, 0, standard(Some(0x5_0000), false, 0, 0)),
            (
                COPIED | 0x5_0000,
                0x8000_0000_0000_0001,
                standard(Some(0x5_0000), true, 1, 0x8000_0000),
            ),
            (COPIED | 0x5_0000, 2 << 32 | 2, Err(Bad::BothBits)),
            (0, 1, Err(Bad::NoCluster)),
            (0x5_0001, 1, Err(Bad::Reserved)),
            (1, 0, Err(Bad::Reserved)),
            (0x5_0800, 1, Err(Bad::Misaligned)),
            (
                1 << 62 | 0x5_0123,
                0,
                Ok(Cluster::Compressed {
                    offset: 0x5_0123,
                    len: 512 - 0x123,
                }),
            ),
            (1 << 62 | 0x5_0123, 1 << 40, Err(Bad::Compressed)),
        ] {
            assert_eq!(g.decode_extended(raw, bitmap), want, "{raw:#x} {bitmap:#x}");
        }
    }

    #[test]
    fn bitmaps_have_runs() {
        use Kind::{Allocated, Unallocated, Zero};
        let bits = Bitmap::NONE.allocate(3, 2).make_zero(5, 4).allocate(31, 1);
        assert_eq!(bits.run(0), (Unallocated, 3));
        assert_eq!(bits.run(2), (Unallocated, 1));
        assert_eq!(bits.run(3), (Allocated, 2));
        assert_eq!(bits.run(6), (Zero, 3));
        assert_eq!(bits.run(9), (Unallocated, 22));
        assert_eq!(bits.run(31), (Allocated, 1));
        assert_eq!(Bitmap::ALLOCATED.run(0), (Allocated, 32));
        assert_eq!(Bitmap::ZERO.run(31), (Zero, 1));
        assert_eq!(Bitmap::NONE.run(31), (Unallocated, 1));
        assert_eq!(
            [2, 3, 5].map(|i| bits.kind(i)),
            [Unallocated, Allocated, Zero]
        );
        assert!(bits.any_allocated(0, 4) && !bits.any_allocated(5, 26));
        assert_eq!(Bitmap::decode(bits.raw()), Ok(bits));
        assert_eq!(bits.allocate(0, 32), Bitmap::ALLOCATED);
        assert_eq!(bits.make_zero(0, 32), Bitmap::ZERO);
    }
}
