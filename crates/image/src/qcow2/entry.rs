//! Entries of L1, L2 and refcount tables, and the arithmetic between guest clusters and them
//! (specification: "L1 table entry", "L2 table entry").
//!
//! ```text
//!   L2   63 COPIED │ 62 compressed │ 61–56 reserved │ 55–9 host offset │ 8–1 reserved │ 0 reads as zeros
//!   L1   63 COPIED │ 62–56 reserved                 │ 55–9 L2 table    │ 8–0 reserved
//! ```

use super::header::{HOST_OFFSET_END, Header};
use crate::metadata::Layout;
pub(super) use crate::metadata::{COPIED, FRESH, FRESH_ZEROED, OFFSET_MASK, ZERO};
use std::ops::Deref;

/// The entry is of a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Reserved bits of an entry that is not compressed.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Reserved bits of an L1 entry.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// In memory only: the entry points at a cluster that holds metadata, or in an external data file at
/// another place than its own. All of the low reserved bits, which no sound entry has.
pub(super) const OVERLAP: u64 = 0x1fe;

/// Bytes of the writes that make metadata durable: what a disk writes without tearing.
pub(super) const SECTOR: u64 = 512;
/// Where the largest file ends: what a signed 64-bit offset can address.
pub(super) const HOST_END_MAX: u64 = i64::MAX as u64 & !(SECTOR - 1);
/// log2 of the subclusters of a cluster.
const SUBCLUSTERS_BITS: u32 = 5;

/// What an L2 entry says. Offsets are bytes of the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing here: the backing file's bytes, or zeros.
    Unallocated,
    /// Zeros, perhaps with a cluster under them.
    Zero { host: Option<u64>, copied: bool },
    /// A cluster of data.
    Data { host: u64, copied: bool },
    /// `len` bytes from `offset` on hold the compressed cluster.
    Compressed { offset: u64, len: u64 },
}

/// Why an entry is not sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    Reserved,
    Misaligned,
    ZeroInV2,
    Overlap,
    TooFar,
    /// From here on: of the subclusters' bitmap.
    BothBits,
    NoCluster,
    Compressed,
    /// From here on: in an image with an external data file.
    Elsewhere,
    CompressedOutside,
}

impl Bad {
    pub(super) fn text(self) -> &'static str {
        match self {
            Bad::Reserved => "has reserved bits set",
            Bad::Misaligned => "points between clusters",
            Bad::ZeroInV2 => "has the zero flag, which version 2 lacks",
            Bad::Overlap => "points at a cluster that holds metadata",
            Bad::TooFar => "points behind 2^56",
            Bad::BothBits => "marks a subcluster as allocated and as zeros",
            Bad::NoCluster => "marks subclusters as allocated where there is no cluster",
            Bad::Compressed => "is not zero for a compressed cluster",
            Bad::Elsewhere => "points at another place of the data file than the guest's own",
            Bad::CompressedOutside => {
                "is of a compressed cluster, but data are in an external file"
            }
        }
    }

    /// Whether the second half of the entry is what is wrong.
    pub(super) fn in_bitmap(self) -> bool {
        matches!(self, Bad::BothBits | Bad::NoCluster | Bad::Compressed)
    }
}

/// The image's constants, as shifts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// Clusters, tables, and how the tables are cached.
    pub(super) layout: Layout,
    /// log2 of a refcount's width in bits.
    pub(super) refcount_order: u32,
    /// 2 or 3.
    pub(super) version: u32,
    /// Whether unallocated clusters read from elsewhere.
    pub(super) has_backing: bool,
    /// log2 of the unit in which clusters are allocated to the guest: a subcluster with extended
    /// L2 entries, else the cluster.
    pub(super) unit_bits: u32,
    /// Whether the guest's clusters are in an external file.
    pub(super) data_file: bool,
    /// Besides, that file is to be the disk's raw image.
    pub(super) data_raw: bool,
}

/// A geometry is a layout, and what else qcow2 has.
impl Deref for Geometry {
    type Target = Layout;

    #[inline]
    fn deref(&self) -> &Layout {
        &self.layout
    }
}

impl Geometry {
    pub(super) fn of(header: &Header) -> Self {
        let bits = header.cluster_bits;
        Self {
            layout: Layout::new(header.size, bits, bits, header.extended_l2()),
            refcount_order: header.refcount_order,
            version: header.version,
            has_backing: header.backing.is_some(),
            unit_bits: match header.extended_l2() {
                true => header.cluster_bits - SUBCLUSTERS_BITS,
                false => header.cluster_bits,
            },
            data_file: header.has_data_file(),
            data_raw: header.data_file_raw(),
        }
    }

    /// log2 of the units of a cluster.
    #[inline]
    pub(super) fn cluster_unit_bits(&self) -> u32 {
        self.cluster_bits - self.unit_bits
    }

    /// log2 of the refcounts in a slice.
    #[inline]
    pub(super) fn slice_refcount_bits(&self) -> u32 {
        self.slice_bits + 3 - self.refcount_order
    }

    /// log2 of the refcounts in a refcount block.
    #[inline]
    pub(super) fn block_refcount_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Decodes an L2 entry.
    #[inline]
    pub(super) fn decode(&self, raw: u64) -> Result<Entry, Bad> {
        if raw & COMPRESSED != 0 {
            return self.decode_compressed(raw);
        }
        if raw & L2_RESERVED != 0 {
            return Err(match raw & L2_RESERVED {
                OVERLAP if self.data_file => Bad::Elsewhere,
                OVERLAP => Bad::Overlap,
                _ => Bad::Reserved,
            });
        }
        let host = raw & OFFSET_MASK;
        if host & (self.cluster() - 1) != 0 {
            return Err(Bad::Misaligned);
        }
        // What is in the data file is nobody else's, whatever the flag says.
        let copied = raw & COPIED != 0 || self.data_file;
        Ok(match (raw & ZERO != 0, host) {
            (true, _) if self.version < 3 => return Err(Bad::ZeroInV2),
            (true, 0) => Entry::Zero {
                host: None,
                copied: false,
            },
            (true, _) => Entry::Zero {
                host: Some(host),
                copied,
            },
            // There, offset 0 is a place like any other: the flag tells it from none.
            (false, 0) if self.data_file && raw & COPIED != 0 => Entry::Data { host, copied },
            (false, 0) => Entry::Unallocated,
            (false, _) => Entry::Data { host, copied },
        })
    }

    fn decode_compressed(&self, raw: u64) -> Result<Entry, Bad> {
        if self.data_file {
            return Err(Bad::CompressedOutside);
        }
        let (offset, len) = compressed_range(self.cluster_bits, raw);
        if offset + len > HOST_OFFSET_END {
            return Err(Bad::TooFar);
        }
        Ok(Entry::Compressed { offset, len })
    }

    /// The L2 table's offset in an L1 entry, 0 for none.
    #[inline]
    pub(super) fn decode_l1(&self, raw: u64) -> Result<u64, Bad> {
        // The marks of fresh tables are ours.
        if raw & L1_RESERVED & !(FRESH | FRESH_ZEROED) != 0 {
            return Err(Bad::Reserved);
        }
        let offset = raw & OFFSET_MASK;
        if offset & (self.cluster() - 1) != 0 {
            return Err(Bad::Misaligned);
        }
        Ok(offset)
    }

    /// Whether an L1 entry read from a file is sound: the in-memory marks are not allowed there.
    pub(super) fn l1_sound(&self, raw: u64) -> bool {
        raw & L1_RESERVED == 0 && raw & OFFSET_MASK & (self.cluster() - 1) == 0
    }

    /// The refcount block's offset in an entry of the refcount table as the file has it.
    pub(super) fn decode_ref(&self, raw: u64) -> Result<u64, Bad> {
        if raw & (SECTOR - 1) != 0 {
            Err(Bad::Reserved)
        } else if raw & (self.cluster() - 1) != 0 {
            Err(Bad::Misaligned)
        } else if raw >= HOST_OFFSET_END {
            Err(Bad::TooFar)
        } else {
            Ok(raw)
        }
    }
}

/// The bit of a compressed cluster's entry from which on the further 512-byte sectors are counted; below is the offset.
#[inline]
fn compressed_shift(cluster_bits: u32) -> u32 {
    62 - (cluster_bits - 8)
}

/// The first byte of a file that a compressed cluster's entry cannot point at any more.
#[inline]
pub(super) fn compressed_end(cluster_bits: u32) -> u64 {
    1 << compressed_shift(cluster_bits).min(56)
}

/// The entry of a cluster that was packed into `len` bytes, at least one, which lie at `offset` and end at
/// [`compressed_end`] at most.
#[inline]
pub(super) fn compressed_entry(cluster_bits: u32, offset: u64, len: u64) -> u64 {
    let sectors = (offset + len - 1) / SECTOR - offset / SECTOR;
    COMPRESSED | sectors << compressed_shift(cluster_bits) | offset
}

/// Largest refcount in a width of 2^`order` bits.
#[inline]
pub(super) fn refcount_max(order: u32) -> u64 {
    match order {
        6.. => u64::MAX,
        order => (1 << (1u32 << order)) - 1,
    }
}

/// Where the data of a compressed cluster's entry lie, and how many bytes it is to the end of
/// their last sector.
#[inline]
pub(super) fn compressed_range(cluster_bits: u32, raw: u64) -> (u64, u64) {
    let split = compressed_shift(cluster_bits);
    let offset = raw & ((1 << split) - 1);
    let sectors = ((raw & (COMPRESSED - 1)) >> split) + 1;
    (offset, sectors * SECTOR - offset % SECTOR)
}

/// Where refcount `index` of a block lies in the big-endian 64-bit words of the block:
/// word, shift, mask.
#[inline]
pub(super) fn refcount_at(index: u64, order: u32) -> (usize, u32, u64) {
    let width = 1u32 << order;
    let bit = index << order;
    let word = (bit >> 6) as usize;
    let bit = (bit & 63) as u32;
    let mask = if width == 64 {
        u64::MAX
    } else {
        (1 << width) - 1
    };
    // Bytes count from the word's high end, bits within a byte from its low end; wider
    // refcounts are big-endian.
    let shift = if width < 8 {
        56 - (bit & !7) + (bit & 7)
    } else {
        64 - width - bit
    };
    (word, shift, mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, version: u32) -> Geometry {
        Geometry {
            layout: Layout::new(1 << 30, cluster_bits, cluster_bits, false),
            refcount_order: 4,
            version,
            has_backing: false,
            unit_bits: cluster_bits,
            data_file: false,
            data_raw: false,
        }
    }

    #[test]
    fn decodes_l2_entries() {
        let (v2, v3) = (geometry(16, 2), geometry(16, 3));
        for (g, raw, want) in [
            (v3, 0, Ok(Entry::Unallocated)),
            (v3, COPIED, Ok(Entry::Unallocated)),
            (
                v3,
                1,
                Ok(Entry::Zero {
                    host: None,
                    copied: false,
                }),
            ),
            (
                v3,
                COPIED | 0x5_0001,
                Ok(Entry::Zero {
                    host: Some(0x5_0000),
                    copied: true,
                }),
            ),
            (v2, 1, Err(Bad::ZeroInV2)),
            (
                v3,
                0x5_0000,
                Ok(Entry::Data {
                    host: 0x5_0000,
                    copied: false,
                }),
            ),
            (v3, 0x5_0200, Err(Bad::Misaligned)),
            (v3, 0x5_0002, Err(Bad::Reserved)),
            (v3, 1 << 56 | 0x5_0000, Err(Bad::Reserved)),
            (v3, 0x5_0000 | OVERLAP, Err(Bad::Overlap)),
            // 16-bit clusters: 54 bits of offset, 8 of sectors.
            (
                v3,
                COMPRESSED | 3 << 54 | 0x5_0123,
                Ok(Entry::Compressed {
                    offset: 0x5_0123,
                    len: 4 * 512 - 0x123,
                }),
            ),
            (
                geometry(9, 3),
                COMPRESSED | ((1 << 61) - 512),
                Err(Bad::TooFar),
            ),
        ] {
            assert_eq!(g.decode(raw), want, "{raw:#x}");
        }
    }

    #[test]
    fn refcounts_lie_where_the_specification_says() {
        let block: Vec<u8> = (1..=16).collect();
        let words: Vec<u64> = block
            .chunks_exact(8)
            .map(|b| u64::from_be_bytes(b.try_into().unwrap()))
            .collect();
        let get = |index, order| {
            let (word, shift, mask) = refcount_at(index, order);
            words[word] >> shift & mask
        };
        // Byte 2 is 0b11, byte 8 is 9 = 0b1001.
        assert_eq!([0, 1].map(|i| get(16 + i, 0)), [1, 1]);
        assert_eq!([0, 1, 2, 3].map(|i| get(64 + i, 0)), [1, 0, 0, 1]);
        assert_eq!([0, 1].map(|i| get(32 + i, 1)), [1, 2]);
        assert_eq!([0, 1].map(|i| get(18 + i, 2)), [10, 0]);
        assert_eq!(get(8, 3), 9);
        assert_eq!(get(5, 4), 0x0b0c);
        assert_eq!(get(3, 5), 0x0d0e_0f10);
        assert_eq!(get(1, 6), 0x090a_0b0c_0d0e_0f10);
    }
}
