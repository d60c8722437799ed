//! Discarding and zeroing subclusters.
//!
//! Whole clusters are treated as in an image without subclusters (`zero`), with all 32 bits in the
//! place of the zero flag. Of a part of a cluster:
//!
//! | the subcluster is | discard | zero |
//! |---|---|---|
//! | allocated, covered | as it is | its bit |
//! | allocated, touched | as it is | zeros in place |
//! | unallocated, backing file, covered | as it is | its bit |
//! | unallocated, backing file, touched | as it is | zeros as data |
//! | zero, or unallocated without backing file | as it is | as it is |
//! | in a compressed or shared cluster | as it is | zeros as data |

use super::super::Qcow2;
use super::super::entry::COPIED;
use super::super::state::{Ask, State};
use super::super::zero::Change;
use super::{Bitmap, Cluster, Kind, SUBCLUSTERS};
use crate::metadata::Walk;
use crate::{ZeroMode, ZeroPlan};
use block::GuestOffset;

impl Qcow2 {
    /// What zeroing or discarding makes of a whole cluster.
    pub(in super::super) fn change_extended(&self, cluster: Cluster, mode: ZeroMode) -> Change {
        // What is in a data file has its place there anyway.
        let keep = mode == ZeroMode::Zero { unmap: false } || self.geometry.data_file;
        let zeros = match self.geometry.has_backing {
            true => Bitmap::ZERO,
            false => Bitmap::NONE,
        };
        match cluster {
            Cluster::Standard {
                host: None, bits, ..
            } => match mode {
                ZeroMode::Discard => Change::Keep,
                _ if bits == Bitmap::ZERO || zeros == Bitmap::NONE => Change::Keep,
                _ => Change::To(0, zeros, None),
            },
            Cluster::Standard {
                host: Some(host),
                copied: true,
                bits,
            } if keep => match bits {
                Bitmap::ZERO => Change::Keep,
                _ => Change::To(host | COPIED, Bitmap::ZERO, None),
            },
            Cluster::Standard {
                host: Some(host), ..
            } => Change::To(0, zeros, Some(self.compressed_clusters(host, 1))),
            Cluster::Compressed { offset, len } => {
                Change::To(0, zeros, Some(self.compressed_clusters(offset, len)))
            }
        }
    }

    /// Zeroes `len` bytes within one cluster, `has_table` of which says whether it has an L2 table.
    pub(in super::super) fn zero_subclusters(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        has_table: bool,
    ) -> Ask<ZeroPlan> {
        let g = &self.geometry;
        let index = at.0 >> g.cluster_bits;
        let first = g.subcluster(at.0);
        // Up to the end of the first subcluster, or whole ones; the disk's last is whole at its end.
        let skip = at.0 & (g.unit() - 1);
        let end = match at.0 + len {
            end if end == g.size => end.next_multiple_of(g.unit()),
            end => end,
        };
        let count = match skip {
            // At most 32.
            0 => ((end - at.0) >> g.unit_bits) as u32,
            _ => 0,
        };
        let (whole, len) = match count {
            0 => (false, len.min(g.unit() - skip)),
            _ => (true, len.min(u64::from(count) << g.unit_bits)),
        };
        debug_assert!(first + count <= SUBCLUSTERS);
        if !has_table && !whole {
            return Ok(ZeroPlan::Write { len });
        }
        if whole {
            st.admit()?;
            self.writable_table(st, &self.place(index))?;
        }
        let place = self.place(index);
        let frame = self.l2_frame(st, &place)?;
        let cluster = self.cluster_at(frame, place.index, index)?;
        let Cluster::Standard { host, copied, bits } = cluster else {
            return Ok(ZeroPlan::Write { len });
        };
        if !whole {
            let offset = at.0 & (g.cluster() - 1);
            return Ok(match (bits.kind(first), host) {
                (Kind::Zero, _) => ZeroPlan::Skip { len },
                (Kind::Unallocated, _) if !g.has_backing => ZeroPlan::Skip { len },
                (Kind::Allocated, Some(host)) if copied && place.raw & COPIED != 0 => {
                    self.zero_in_place(host + offset, len)
                }
                _ => ZeroPlan::Write { len },
            });
        }
        let zeros = bits.make_zero(first, count);
        if zeros == bits || !g.has_backing && !bits.any_allocated(first, count) {
            return Ok(ZeroPlan::Skip { len });
        }
        if host.is_some() && !copied {
            return Ok(ZeroPlan::Write { len });
        }
        self.put_bits(st, frame, place.index, zeros);
        Ok(ZeroPlan::Done { len })
    }
}
