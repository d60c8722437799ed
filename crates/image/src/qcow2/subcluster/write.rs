//! Planning writes into an image with subclusters.
//!
//! | the cluster is | the write is planned as |
//! |---|---|
//! | the guest's, and the subclusters are allocated | in place |
//! | the guest's, and they are not | an allocation of these subclusters: nothing but bits to commit |
//! | not there, and the write covers whole clusters | an allocation of clusters |
//! | not there, and the write covers a part | an allocation of subclusters in a new cluster, see below |
//! | compressed, or shared | an allocation of the whole cluster, which is copied |
//!
//! A ticket covers the subclusters of its allocation alone. Another write to the same new
//! cluster, but to other subclusters of it, gets its own ticket for the same host cluster at once (`Birth`).

use super::super::Qcow2;
use super::super::alloc::Piece;
use super::super::entry::COPIED;
use super::super::pending::{Birth, Pending};
use super::super::state::{Ask, Deref, State};
use super::super::write::ALLOC_BYTES_MAX;
use super::{Bitmap, Cluster, Kind, SUBCLUSTERS};
use crate::metadata::{Place, Walk};
use crate::{Fill, Plan};
use block::{GuestOffset, HostOffset};

/// Subclusters of one cluster that an allocation covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    count: u32,
    fill: Fill,
}

impl Qcow2 {
    /// As `plan_at`, with extended L2 entries.
    pub(in super::super) fn plan_at_extended(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        frame: u32,
        place: &Place,
    ) -> Ask<Plan> {
        let g = &self.geometry;
        let cluster = at.0 >> g.cluster_bits;
        let first = g.subcluster(at.0);
        match self.cluster_at(frame, place.index, cluster)? {
            Cluster::Compressed { offset, len: bytes } => {
                let old = self.compressed_clusters(offset, bytes);
                self.plan_whole_copy(st, at, len, frame, old)
            }
            Cluster::Standard {
                host: Some(host),
                copied: false,
                ..
            } => {
                let old = self.compressed_clusters(host, 1);
                self.plan_whole_copy(st, at, len, frame, old)
            }
            Cluster::Standard {
                host: Some(host),
                bits,
                ..
            } => {
                if let (Kind::Allocated, count) = bits.run(first) {
                    // Someone committed since the caller looked.
                    let skip = at.0 & (g.cluster() - 1);
                    return Ok(Plan::InPlace {
                        file: g.guest_file(),
                        offset: HostOffset(host + skip),
                        len: len.min((u64::from(first + count) << g.unit_bits) - skip),
                    });
                }
                let part = self.part(st, at, len, bits);
                self.plan_part(st, at, len, frame, host >> g.cluster_bits, part, false)
            }
            Cluster::Standard {
                host: None, bits, ..
            } => {
                let whole = self.new_clusters(st, at, len, frame, place);
                if whole > 0 {
                    return self.plan_clusters(st, at, len, frame, whole, Fill::Nothing, None);
                }
                let part = self.part(st, at, len, bits);
                let (host, zeroed) = match st.births.birth(cluster) {
                    Some(birth) => (birth.host, birth.zeroed),
                    None => {
                        let given = self.give_clusters(st, cluster, 1)?;
                        st.births.add_birth(Birth {
                            cluster,
                            host: given.first,
                            ref_frame: given.frame,
                            counted: given.counted,
                            zeroed: given.zeroed,
                            users: 0,
                        });
                        (given.first, given.zeroed)
                    }
                };
                let plan = self.plan_part(st, at, len, frame, host, part, zeroed);
                match (&plan, st.births.birth(cluster)) {
                    (Ok(_), Some(birth)) => birth.users += 1,
                    (Err(_), _) => self.drop_user(st, cluster, 0),
                    (Ok(_), None) => debug_assert!(false, "the birth was just there"),
                }
                plan
            }
        }
    }

    /// How many clusters from `at` on are not there, are wholly written, and no
    /// allocation is under way in.
    fn new_clusters(
        &self,
        st: &State,
        at: GuestOffset,
        len: u64,
        frame: u32,
        place: &Place,
    ) -> u64 {
        let g = &self.geometry;
        if at.0 & (g.cluster() - 1) != 0 {
            return 0;
        }
        let unit = at.0 >> g.unit_bits;
        let cluster = at.0 >> g.cluster_bits;
        let want = (len >> g.cluster_bits)
            .min((g.slice_entries() - place.index) as u64)
            .min((ALLOC_BYTES_MAX >> g.cluster_bits).max(1))
            .min((st.tickets.next_start(unit) >> g.cluster_unit_bits()) - cluster);
        let absent = |i: &u64| {
            let found = self.cluster_at(frame, place.index + *i as usize, cluster + i);
            matches!(found, Ok(Cluster::Standard { host: None, .. }))
        };
        (0..want).take_while(absent).count() as u64
    }

    /// What a write that begins in a subcluster that is not allocated covers of its cluster.
    fn part(&self, st: &State, at: GuestOffset, len: u64, bits: Bitmap) -> Part {
        let g = &self.geometry;
        let first = g.subcluster(at.0);
        let unit = at.0 >> g.unit_bits;
        let fill = |index: u32| match bits.kind(index) {
            Kind::Unallocated if g.has_backing => Some(Fill::Existing),
            Kind::Unallocated | Kind::Zero => Some(Fill::Zero),
            Kind::Allocated => None,
        };
        let end = at.0 + len;
        let touched = ((end - 1) >> g.unit_bits) - unit + 1;
        let count = touched
            .min(u64::from(SUBCLUSTERS - first))
            .min(st.tickets.next_start(unit) - unit);
        // At most 32.
        let count = count as u32;
        let head = at.0 & (g.unit() - 1) != 0;
        let last = first + count - 1;
        let tail = end < (unit + u64::from(count)) << g.unit_bits;
        let head_fill = fill(first).unwrap_or(Fill::Nothing);
        if !head && !tail {
            let fill = Fill::Nothing;
            return Part { count, fill };
        }
        if !tail || count == 1 {
            let fill = head_fill;
            return Part { count, fill };
        }
        match fill(last) {
            // One allocation has one fill.
            Some(tail_fill) if !head || tail_fill == head_fill => Part {
                count,
                fill: tail_fill,
            },
            _ => Part {
                count: count - 1,
                fill: if head { head_fill } else { Fill::Nothing },
            },
        }
    }

    /// The plan for a part of guest cluster `at` in host cluster `host`.
    #[allow(clippy::too_many_arguments)]
    fn plan_part(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        frame: u32,
        host: u64,
        part: Part,
        zeroed: bool,
    ) -> Ask<Plan> {
        let pending = Pending {
            start: at.0 >> self.geometry.unit_bits,
            count: u64::from(part.count),
            host,
            clusters: 1,
            l2_frame: frame,
            part: true,
            ref_frame: None,
            counted: false,
            independent: false,
            old: None,
            packed: None,
        };
        self.ticket(st, pending, at, len, part.fill, zeroed)
    }

    /// The plan for a write into a cluster that is copied as a whole.
    fn plan_whole_copy(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        frame: u32,
        old: Deref,
    ) -> Ask<Plan> {
        self.pin_old(st, old)?;
        let plan = self.plan_clusters(st, at, len, frame, 1, Fill::Existing, Some(old));
        if plan.is_err() {
            self.unpin_old(st, old);
        }
        plan
    }

    /// The plan for a write into up to `count` new clusters, from the one on that `at` is in.
    #[allow(clippy::too_many_arguments)]
    fn plan_clusters(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        frame: u32,
        count: u64,
        fill: Fill,
        old: Option<Deref>,
    ) -> Ask<Plan> {
        let g = &self.geometry;
        let unit_bits = g.cluster_unit_bits();
        let cluster = at.0 >> g.cluster_bits;
        let given = self.give_clusters(st, cluster, count)?;
        let pending = Pending {
            start: cluster << unit_bits,
            count: given.count << unit_bits,
            host: given.first,
            clusters: given.count,
            l2_frame: frame,
            part: false,
            ref_frame: given.frame,
            counted: given.counted,
            independent: false,
            old,
            packed: None,
        };
        self.ticket(st, pending, at, len, fill, given.zeroed)
    }

    /// Ends an allocation of subclusters of one cluster.
    pub(in super::super) fn end_part(&self, st: &mut State, pending: &Pending, commit: bool) {
        let g = &self.geometry;
        let cluster = pending.start >> g.cluster_unit_bits();
        let frame = pending.l2_frame;
        if !commit {
            self.drop_user(st, cluster, 1);
        } else {
            let index = self.place(cluster).index;
            // It was sound when the allocation was planned, and nobody else changes these bits.
            let (host, bits) = match self.cluster_at(frame, index, cluster) {
                Ok(Cluster::Standard { host, bits, .. }) => (host, bits),
                _ => {
                    debug_assert!(false, "an entry changed under its allocation");
                    (None, Bitmap::NONE)
                }
            };
            // At most 32 each.
            let first = g.subcluster(pending.start << g.unit_bits);
            let bits = bits.allocate(first, pending.count as u32);
            match st.births.take_birth(cluster) {
                Some(birth) => {
                    debug_assert!(host.is_none() && birth.host == pending.host);
                    if let Some(frame) = birth.ref_frame {
                        if !birth.counted {
                            self.set_refcount(st, frame, birth.host, 1);
                        }
                        st.cache.unpin(frame);
                    }
                    let raw = birth.host << g.cluster_bits | COPIED;
                    self.put_entry(st, frame, index, raw, bits);
                }
                None => {
                    debug_assert_eq!(host, Some(pending.host << g.cluster_bits));
                    self.put_bits(st, frame, index, bits);
                }
            }
            // The data are to be durable before the bits.
            st.ordered = true;
        }
        st.cache.unpin(frame);
    }

    /// Changes the bitmap of an entry in `frame`, and nothing else of it.
    pub(super) fn put_bits(&self, st: &mut State, frame: u32, index: usize, bits: Bitmap) {
        let (tables, g) = (&self.tables, &self.geometry);
        st.cache.set(tables, g, frame, 2 * index + 1, bits.raw());
    }

    /// `count` allocations in a new cluster ended without a commit: without any left it is free again.
    fn drop_user(&self, st: &mut State, cluster: u64, count: u32) {
        let Some(birth) = st.births.birth(cluster) else {
            return;
        };
        birth.users = birth.users.saturating_sub(count);
        // What the others take for zeros may have been written.
        birth.zeroed = false;
        if birth.users > 0 {
            return;
        }
        if let Some(birth) = st.births.take_birth(cluster)
            && let Some(frame) = birth.ref_frame
        {
            let piece = Piece {
                first: birth.host,
                count: 1,
                zeroed: false,
                counted: birth.counted,
                frame,
            };
            self.take_back(st, piece);
            st.cache.unpin(frame);
        }
    }
}
