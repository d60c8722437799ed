//! Images whose guest data are in an external data file (specification: incompatible feature bit 2,
//! "External data file name", and the note on bit 63 of an L2 entry).
//!
//! ```text
//!   image file   header, refcounts, L1, L2 (and bitmaps, LUKS header …)
//!   data file    guest offset 0 … the disk's end: guest cluster n is at n × cluster size
//! ```
//!
//! Guest clusters have no refcounts: each has its place, and is nobody else's. Their L2 entries have the COPIED
//! flag, which also tells cluster 0 (host offset 0) from none; nothing is compressed. An entry that points
//! elsewhere is refused where it is used, as QEMU does.
//!
//! **Allocating** is setting the entry. Data and fill are durable before it, as in other images; the place is not
//! known to be zeros, so the fill is written. Nothing is written behind the disk's end.
//!
//! **Zeroing and discarding** of what has data is done in the data file and leaves the entry: a
//! cluster cannot be given to anybody else, so nothing would be won by unlinking it, and a hole punched after
//! a later flush could hit what the guest wrote there again meanwhile.
//!
//! With *raw external data* (autoclear bit 1) the file must read as the disk does without looking at
//! the entries: everything is zeroed in the file, and no entry gets a zero flag. New images of this kind have all
//! their entries from the beginning (`create`), so that both ways of reading agree whatever is written to the file.

use super::Qcow2;
use super::entry::{Entry, Geometry, OVERLAP, SECTOR};
use super::state::{Ask, State};
use super::subcluster::{Cluster, Kind};
use crate::metadata::Walk;
use crate::{FileId, ZeroMode, ZeroPlan};
use block::{GuestOffset, HostOffset};

/// Clusters taken for the guest, with their refcounts' frame pinned where they have any.
#[derive(Clone, Copy, Debug)]
pub(super) struct Given {
    pub(super) first: u64,
    pub(super) count: u64,
    /// They read as zeros.
    pub(super) zeroed: bool,
    /// Their refcounts are 1 already, durably.
    pub(super) counted: bool,
    pub(super) frame: Option<u32>,
}

impl Geometry {
    /// The file with the guest's clusters.
    #[inline]
    pub(super) fn guest_file(&self) -> FileId {
        match self.data_file {
            true => FileId::DATA,
            false => FileId::IMAGE,
        }
    }

    /// Marks an L2 entry that does not point at guest cluster `cluster`'s own place.
    pub(super) fn judge_outside(&self, raw: u64, cluster: u64) -> u64 {
        let own = cluster << self.cluster_bits;
        match self.decode(raw) {
            Ok(Entry::Data { host, .. }) if host != own => raw | OVERLAP,
            Ok(Entry::Zero {
                host: Some(host), ..
            }) if host != own => raw | OVERLAP,
            _ => raw,
        }
    }
}

impl Qcow2 {
    /// Up to `count` clusters for the guest's from `cluster` on, at least one.
    pub(super) fn give_clusters(&self, st: &mut State, cluster: u64, count: u64) -> Ask<Given> {
        if self.geometry.data_file {
            return Ok(Given {
                first: cluster,
                count,
                zeroed: false,
                counted: false,
                frame: None,
            });
        }
        let piece = self.alloc(st, count)?;
        st.cache.pin(piece.frame);
        Ok(Given {
            first: piece.first,
            count: piece.count,
            zeroed: piece.zeroed,
            counted: piece.counted,
            frame: Some(piece.frame),
        })
    }

    /// How to zero or discard what has data from `at` on. `None` where there are none, and entries may
    /// be changed.
    pub(super) fn zero_outside(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        mode: ZeroMode,
        has_table: bool,
    ) -> Ask<Option<ZeroPlan>> {
        let g = &self.geometry;
        // Nothing in flight from here on: the first unit is not busy.
        let free = st.tickets.next_start(at.0 >> g.unit_bits);
        let len = len.min(free.saturating_mul(g.unit()).saturating_sub(at.0));
        let covered = match (g.data_raw, has_table) {
            (true, _) => len,
            (false, true) => self.data_run(st, at, len)?,
            (false, false) => 0,
        };
        Ok(match covered {
            0 => None,
            len if (at.0 | len).is_multiple_of(SECTOR) => Some(ZeroPlan::Host {
                file: FileId::DATA,
                offset: HostOffset(at.0),
                len,
            }),
            len if mode == ZeroMode::Discard => Some(ZeroPlan::Skip { len }),
            len => Some(ZeroPlan::Write { len }),
        })
    }

    /// How many of `len` bytes from `at` on are allocated, within one slice of a table that exists.
    fn data_run(&self, st: &mut State, at: GuestOffset, len: u64) -> Ask<u64> {
        let g = &self.geometry;
        let first = at.0 >> g.cluster_bits;
        let place = self.place(first);
        let frame = self.l2_frame(st, &place)?;
        let mut done = 0;
        for (index, cluster) in (place.index..g.slice_entries()).zip(first..) {
            let skip = (at.0 + done) & (g.cluster() - 1);
            let room = if g.extended() {
                let Ok(Cluster::Standard { bits, .. }) = self.cluster_at(frame, index, cluster)
                else {
                    break;
                };
                let sub = g.subcluster(skip);
                match bits.run(sub) {
                    (Kind::Allocated, count) => (u64::from(sub + count) << g.unit_bits) - skip,
                    _ => 0,
                }
            } else {
                match g.decode(self.l2_raw(frame, index)) {
                    Ok(Entry::Data { .. }) => g.cluster() - skip,
                    _ => 0,
                }
            };
            done += room.min(len - done);
            if done == len || skip + room < g.cluster() {
                break;
            }
        }
        Ok(done)
    }
}
