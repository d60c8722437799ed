//! Entries of L1 and L2 tables as a check sees them.

use super::Layout;
use crate::qcow2::entry::{
    COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, OFFSET_MASK, ZERO, compressed_range,
};

/// One thing that is wrong with an entry. Each counts as one corruption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Reserved bits are set.
    Reserved,
    /// It points between two clusters.
    Misaligned,
    /// The same for a cluster that holds no data (it reads as zeros): can be repaired.
    MisalignedEmpty,
    /// A compressed cluster marked as exclusively its own.
    CompressedCopied,
    /// A compressed cluster in an image whose data are in another file.
    CompressedDataFile,
    /// A compressed cluster with subclusters.
    CompressedBitmap,
    /// A subcluster that is both allocated and zeros.
    BothBits,
    /// Allocated subclusters without a cluster.
    NoCluster,
}

impl Fault {
    const ALL: [Fault; 8] = [
        Fault::Reserved,
        Fault::Misaligned,
        Fault::MisalignedEmpty,
        Fault::CompressedCopied,
        Fault::CompressedDataFile,
        Fault::CompressedBitmap,
        Fault::BothBits,
        Fault::NoCluster,
    ];

    /// What is wrong, to follow "the entry".
    pub fn text(self) -> &'static str {
        match self {
            Fault::Reserved => "has reserved bits set",
            Fault::Misaligned => "points between clusters",
            Fault::MisalignedEmpty => "points between clusters, and holds no data",
            Fault::CompressedCopied => "is of a compressed cluster, but has the COPIED flag",
            Fault::CompressedDataFile => {
                "is of a compressed cluster, but data are in an external file"
            }
            Fault::CompressedBitmap => "is of a compressed cluster, but has a subcluster bitmap",
            Fault::BothBits => "marks a subcluster as allocated and as zeros",
            Fault::NoCluster => "marks subclusters as allocated where there is no cluster",
        }
    }
}

/// A set of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults(u8);

impl Faults {
    #[inline]
    fn add_if(&mut self, fault: Fault, there: bool) {
        self.0 |= u8::from(there) << fault as u8;
    }

    /// Whether there is none.
    #[inline]
    pub fn none(self) -> bool {
        self.0 == 0
    }

    /// How many.
    pub fn count(self) -> u64 {
        u64::from(self.0.count_ones())
    }

    /// Whether `fault` is one.
    pub fn has(self, fault: Fault) -> bool {
        self.0 >> fault as u8 & 1 == 1
    }

    /// All of them.
    pub fn iter(self) -> impl Iterator<Item = Fault> {
        Fault::ALL.into_iter().filter(move |f| self.has(*f))
    }
}

/// An L1 entry that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// Where the L2 table is, even if that is nonsense.
    pub table: u64,
    /// The table is exclusively this entry's.
    pub copied: bool,
    /// What is wrong with it.
    pub faults: Faults,
}

/// What an L2 entry refers to. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing.
    Nothing,
    /// The cluster at `offset`, also if it reads as zeros.
    Cluster {
        /// Where; not aligned if the entry says so.
        offset: u64,
        /// The cluster is exclusively this entry's.
        copied: bool,
    },
    /// The sectors that a compressed cluster touches.
    Compressed {
        /// First byte of its data.
        offset: u64,
        /// Bytes to the end of its last sector.
        len: u64,
    },
    /// Not to be followed: too wrong.
    Refused,
}

/// An L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Entry {
    /// What it refers to.
    pub target: Target,
    /// What is wrong with it.
    pub faults: Faults,
}

impl Layout {
    /// Judges an L1 entry; `None` for zero, which is no entry.
    pub fn l1_entry(&self, raw: u64) -> Option<L1Entry> {
        if raw == 0 {
            return None;
        }
        let table = raw & OFFSET_MASK;
        let mut faults = Faults::default();
        faults.add_if(Fault::Reserved, raw & L1_RESERVED != 0);
        faults.add_if(Fault::Misaligned, self.within(table) != 0);
        Some(L1Entry {
            table,
            copied: raw & COPIED != 0,
            faults,
        })
    }

    /// Judges an L2 entry; `bitmap` is the second half of an extended one, else 0.
    #[inline]
    pub fn l2_entry(&self, raw: u64, bitmap: u64) -> L2Entry {
        let mut faults = Faults::default();
        if raw & COMPRESSED != 0 {
            faults.add_if(Fault::CompressedCopied, raw & COPIED != 0);
            let (offset, len) = compressed_range(self.cluster_bits, raw);
            let mut target = Target::Compressed { offset, len };
            // Only the first of the two is counted, as qemu-img does.
            if self.data_file {
                faults.add_if(Fault::CompressedDataFile, true);
                target = Target::Refused;
            } else if bitmap != 0 {
                faults.add_if(Fault::CompressedBitmap, true);
                target = Target::Refused;
            }
            return L2Entry { target, faults };
        }
        faults.add_if(Fault::Reserved, raw & L2_RESERVED != 0);
        let offset = raw & OFFSET_MASK;
        let copied = raw & COPIED != 0;
        // With extended entries the bitmap says what is zero, and bit 0 means nothing.
        let zero = raw & ZERO != 0 && !self.extended;
        // In an external file offset 0 is a place like any other: COPIED tells it from none.
        let there = offset != 0 || self.data_file && copied && !zero;
        let allocated = bitmap & u64::from(u32::MAX);
        if !there {
            faults.add_if(Fault::NoCluster, !zero && allocated != 0);
            let target = Target::Nothing;
            return L2Entry { target, faults };
        }
        faults.add_if(Fault::BothBits, bitmap >> 32 & bitmap != 0);
        if self.within(offset) != 0 {
            let empty = match self.extended {
                true => allocated == 0,
                false => zero,
            };
            faults.add_if(Fault::Misaligned, !empty);
            faults.add_if(Fault::MisalignedEmpty, empty);
        }
        L2Entry {
            target: Target::Cluster { offset, copied },
            faults,
        }
    }

    /// `raw` with its COPIED flag as `copied` says: for L1 and L2 entries.
    #[inline]
    pub fn with_copied(&self, raw: u64, copied: bool) -> u64 {
        match copied {
            true => raw | COPIED,
            false => raw & !COPIED,
        }
    }

    /// The entry (and bitmap) that reads as the one with [`Fault::MisalignedEmpty`] does, without
    /// its cluster.
    pub fn emptied(&self, bitmap: u64) -> (u64, u64) {
        match self.extended {
            // What was allocated has no data; what was zeros stays zeros.
            true => (0, (bitmap | bitmap << 32) & !u64::from(u32::MAX)),
            false => (ZERO, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout;
    use super::*;

    fn faults(of: &[Fault]) -> Faults {
        let mut set = Faults::default();
        for fault in of {
            set.add_if(*fault, true);
        }
        set
    }

    #[test]
    fn l1_entries_are_judged() {
        let l = layout(16, 4);
        assert_eq!(l.l1_entry(0), None);
        for (raw, table, copied, wrong) in [
            (COPIED | 0x5_0000, 0x5_0000, true, &[][..]),
            (0x5_0200, 0x5_0200, false, &[Fault::Misaligned]),
            (1 << 56 | 0x5_0000, 0x5_0000, false, &[Fault::Reserved]),
            (
                0x5_0201,
                0x5_0200,
                false,
                &[Fault::Reserved, Fault::Misaligned],
            ),
            // The flag alone makes an entry, of a table in the header's cluster.
            (COPIED, 0, true, &[]),
        ] {
            let entry = l.l1_entry(raw).expect("an entry");
            let want = L1Entry {
                table,
                copied,
                faults: faults(wrong),
            };
            assert_eq!(entry, want, "{raw:#x}");
        }
    }

    #[test]
    fn l2_entries_are_judged() {
        let plain = layout(16, 4);
        let extended = Layout {
            extended: true,
            ..plain
        };
        let outside = Layout {
            data_file: true,
            ..plain
        };
        let cluster = |offset, copied| Target::Cluster { offset, copied };
        use Fault::*;
        for (l, raw, bitmap, target, wrong) in [
            (plain, 0, 0, Target::Nothing, &[][..]),
            (plain, 1, 0, Target::Nothing, &[]),
            (plain, COPIED, 0, Target::Nothing, &[]),
            (outside, COPIED, 0, cluster(0, true), &[]),
            (outside, COPIED | 1, 0, Target::Nothing, &[]),
            (plain, COPIED | 0x5_0001, 0, cluster(0x5_0000, true), &[]),
            (plain, 0x5_0002, 0, cluster(0x5_0000, false), &[Reserved]),
            (plain, 0x5_0200, 0, cluster(0x5_0200, false), &[Misaligned]),
            (
                plain,
                0x5_0201,
                0,
                cluster(0x5_0200, false),
                &[MisalignedEmpty],
            ),
            (
                plain,
                COMPRESSED | 3 << 54 | 0x5_0123,
                0,
                Target::Compressed {
                    offset: 0x5_0123,
                    len: 4 * 512 - 0x123,
                },
                &[],
            ),
            (
                plain,
                COPIED | COMPRESSED | 0x5_0000,
                0,
                Target::Compressed {
                    offset: 0x5_0000,
                    len: 512,
                },
                &[CompressedCopied],
            ),
            (
                outside,
                COMPRESSED | 0x5_0000,
                0,
                Target::Refused,
                &[CompressedDataFile],
            ),
            (
                extended,
                COMPRESSED | 0x5_0000,
                1,
                Target::Refused,
                &[CompressedBitmap],
            ),
            (
                extended,
                0x5_0000,
                1 << 32 | 2,
                cluster(0x5_0000, false),
                &[],
            ),
            (
                extended,
                0x5_0000,
                2 << 32 | 2,
                cluster(0x5_0000, false),
                &[BothBits],
            ),
            (extended, 0, 4, Target::Nothing, &[NoCluster]),
            (extended, 0, 4 << 32, Target::Nothing, &[]),
            (
                extended,
                0x5_0200,
                4 << 32,
                cluster(0x5_0200, false),
                &[MisalignedEmpty],
            ),
            (
                extended,
                0x5_0200,
                4,
                cluster(0x5_0200, false),
                &[Misaligned],
            ),
        ] {
            let want = L2Entry {
                target,
                faults: faults(wrong),
            };
            assert_eq!(l.l2_entry(raw, bitmap), want, "{raw:#x} {bitmap:#x}");
        }
        assert_eq!(plain.emptied(0), (1, 0));
        assert_eq!(extended.emptied(2 << 32 | 1), (0, 3 << 32));
    }
}
