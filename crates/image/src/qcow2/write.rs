//! Planning writes: in place, or into clusters of their own.

use super::Qcow2;
use super::alloc::Piece;
use super::entry::{COPIED, Entry, FRESH, FRESH_ZEROED};
use super::pending::Pending;
use super::state::{Ask, Deref, FRESH_TABLES_MAX, Halt, State};
use super::subcluster::Bitmap;
use crate::metadata::{Place, Walk, key_of};
use crate::{Allocation, Fill, Need, Plan, Ticket};
use block::{GuestOffset, HostOffset};
use std::sync::atomic::Ordering;

/// Bytes of one allocation, unless a cluster is larger.
pub(super) const ALLOC_BYTES_MAX: u64 = 2 << 20;

impl Qcow2 {
    /// The raw L2 entry of a cluster whose slice is in `frame`.
    pub(super) fn l2_raw(&self, frame: u32, index: usize) -> u64 {
        let words = self.tables.words(frame);
        words.get(index).map_or(0, |w| w.load(Ordering::Relaxed))
    }

    /// Changes an L2 entry in `frame`. `bits` is for an extended one.
    pub(super) fn put_entry(
        &self,
        st: &mut State,
        frame: u32,
        index: usize,
        raw: u64,
        bits: Bitmap,
    ) {
        let g = &self.geometry;
        if g.extended() {
            let words = [raw, bits.raw()];
            st.cache.set_pair(&self.tables, g, frame, 2 * index, words);
        } else {
            st.cache.set(&self.tables, g, frame, index, raw);
        }
    }

    /// Gives L1 entry `place.l1` a table if it has none, and sees to it that the table may be changed.
    pub(super) fn writable_table(&self, st: &mut State, place: &Place) -> Ask<()> {
        // Under the lock it may have changed since `place` was made.
        let Some(entry) = self.tables.l1.get(place.l1) else {
            return Ok(());
        };
        let raw = entry.load(Ordering::Acquire);
        let table = self
            .geometry
            .decode_l1(raw)
            .map_err(|bad| self.bad_l1(place.l1, bad))?;
        if table != 0 {
            return self.own_table(st, place.l1, raw);
        }
        if st.fresh_tables.len() >= FRESH_TABLES_MAX {
            return Err(Halt::Need(Need::Commit));
        }
        let piece = self.alloc_meta(st)?;
        let marks = if piece.zeroed {
            FRESH | FRESH_ZEROED
        } else {
            FRESH
        };
        let host = piece.first << self.geometry.cluster_bits;
        entry.store(host | COPIED | marks, Ordering::Release);
        st.l1_changed.mark_entry(place.l1);
        // At most 4 Mi L1 entries.
        st.fresh_tables.push(place.l1 as u32);
        Ok(())
    }

    /// Host clusters that a compressed cluster's bytes touch.
    pub(super) fn compressed_clusters(&self, offset: u64, len: u64) -> Deref {
        let bits = self.geometry.cluster_bits;
        let first = offset >> bits;
        Deref {
            first,
            count: ((offset + len - 1) >> bits) - first + 1,
        }
    }

    /// Host clusters that an entry refers to.
    pub(super) fn clusters_of(&self, entry: Entry) -> Option<Deref> {
        match entry {
            Entry::Unallocated | Entry::Zero { host: None, .. } => None,
            Entry::Data { host, .. }
            | Entry::Zero {
                host: Some(host), ..
            } => Some(self.compressed_clusters(host, 1)),
            Entry::Compressed { offset, len } => Some(self.compressed_clusters(offset, len)),
        }
    }

    /// Where the entry of `cluster` is, in a table that may be changed, where there is room for an allocation. Its
    /// frame is pinned: it must not leave while the rest is looked for, nor before the commit.
    pub(super) fn pinned_slice(&self, st: &mut State, cluster: u64) -> Ask<(Place, u32)> {
        st.admit()?;
        if st.tickets.is_full() {
            return Err(Halt::Busy);
        }
        let place = self.place(cluster);
        self.writable_table(st, &place)?;
        let place = self.place(cluster);
        let frame = self.l2_frame(st, &place)?;
        st.cache.pin(frame);
        Ok((place, frame))
    }

    pub(super) fn plan_allocating(&self, st: &mut State, at: GuestOffset, len: u64) -> Ask<Plan> {
        let g = &self.geometry;
        let cluster = at.0 >> g.cluster_bits;
        if let Some(key) = st.tickets.busy(at.0 >> g.unit_bits) {
            return Err(Halt::Wait(key));
        }
        let (place, frame) = self.pinned_slice(st, cluster)?;
        let plan = match g.extended() {
            true => self.plan_at_extended(st, at, len, frame, &place),
            false => self.plan_at(st, at, len, frame, &place),
        };
        match &plan {
            Ok(Plan::Allocate(_)) => {}
            _ => st.cache.unpin(frame),
        }
        plan
    }

    fn plan_at(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        frame: u32,
        place: &Place,
    ) -> Ask<Plan> {
        let g = &self.geometry;
        let cluster = at.0 >> g.cluster_bits;
        let entry = g
            .decode(self.l2_raw(frame, place.index))
            .map_err(|bad| self.bad_l2(cluster, bad))?;
        // How many clusters the caller's bytes touch, within what one allocation may be.
        let want = ((at.0 + len - 1) >> g.cluster_bits) - cluster + 1;
        let want = want
            .min((g.slice_entries() - place.index) as u64)
            .min((ALLOC_BYTES_MAX >> g.cluster_bits).max(1))
            .min(st.tickets.next_start(cluster) - cluster);
        let like = |same: &dyn Fn(u64, Entry) -> bool| {
            (0..want)
                .take_while(|i| {
                    let raw = self.l2_raw(frame, place.index + *i as usize);
                    g.decode(raw).is_ok_and(|e| same(*i, e))
                })
                .count() as u64
        };
        let unread = if g.has_backing {
            Fill::Existing
        } else {
            Fill::Zero
        };
        let (count, fill, old) = match entry {
            Entry::Data { host, copied: true } => {
                // Someone committed since the caller looked.
                let count = like(&|i, e| {
                    e == Entry::Data {
                        host: host + (i << g.cluster_bits),
                        copied: true,
                    }
                });
                let skip = at.0 & (g.cluster() - 1);
                return Ok(Plan::InPlace {
                    file: g.guest_file(),
                    offset: HostOffset(host + skip),
                    len: len.min((count << g.cluster_bits) - skip),
                });
            }
            Entry::Zero {
                host: Some(host),
                copied: true,
            } => {
                let count = like(&|i, e| {
                    e == Entry::Zero {
                        host: Some(host + (i << g.cluster_bits)),
                        copied: true,
                    }
                });
                let pending = Pending {
                    start: cluster,
                    count,
                    host: host >> g.cluster_bits,
                    clusters: count,
                    l2_frame: frame,
                    part: false,
                    ref_frame: None,
                    counted: false,
                    independent: false,
                    old: None,
                    packed: None,
                };
                return self.ticket(st, pending, at, len, Fill::Zero, false);
            }
            Entry::Data { .. } | Entry::Compressed { .. } => {
                (1, Fill::Existing, self.clusters_of(entry))
            }
            Entry::Zero { host: Some(_), .. } => (1, Fill::Zero, self.clusters_of(entry)),
            Entry::Zero { host: None, .. } => {
                let same = |_, e: Entry| matches!(e, Entry::Zero { host: None, .. });
                (like(&same), Fill::Zero, None)
            }
            Entry::Unallocated => (like(&|_, e| e == Entry::Unallocated), unread, None),
        };
        let blank = match entry {
            Entry::Zero { host: None, .. } => true,
            Entry::Unallocated => !g.has_backing,
            _ => false,
        };
        if let Some(old) = old {
            self.pin_old(st, old)?;
        }
        let given = match self.give_clusters(st, cluster, count) {
            Ok(given) => given,
            Err(halt) => {
                if let Some(old) = old {
                    self.unpin_old(st, old);
                }
                return Err(halt);
            }
        };
        let pending = Pending {
            start: cluster,
            count: given.count,
            host: given.first,
            clusters: given.count,
            l2_frame: frame,
            part: false,
            ref_frame: given.frame,
            counted: given.counted,
            independent: given.counted && blank && !self.encrypted(),
            old,
            packed: None,
        };
        self.ticket(st, pending, at, len, fill, given.zeroed)
    }

    /// The plan for an allocation. Its first byte is in the first host cluster where it is in
    /// its guest cluster.
    pub(super) fn ticket(
        &self,
        st: &mut State,
        pending: Pending,
        at: GuestOffset,
        len: u64,
        fill: Fill,
        zeroed: bool,
    ) -> Ask<Plan> {
        let g = &self.geometry;
        let Some(ticket) = st.tickets.add(pending) else {
            // `is_full` was asked under the same lock.
            debug_assert!(false, "the table of allocations overflowed");
            return Err(Halt::Busy);
        };
        let start = pending.start << g.unit_bits;
        let mut bytes = pending.count << g.unit_bits;
        if g.data_file {
            // It ends where the disk does: as a raw image it has the disk's size.
            bytes = bytes.min(g.size - start);
        }
        let skip = start & (g.cluster() - 1);
        let write_len = len.min(start + bytes - at.0);
        // A tail behind the disk's end needs no care: nobody can read it before the
        // disk grows, and it is filled like the rest.
        let whole = at.0 == start && write_len == bytes;
        st.ahead.wrote(match fill {
            Fill::Existing => bytes,
            Fill::Zero | Fill::Nothing => write_len,
        });
        Ok(Plan::Allocate(Allocation {
            ticket,
            key: key_of(ticket),
            file: g.guest_file(),
            host: HostOffset((pending.host << g.cluster_bits) + skip),
            start: GuestOffset(start),
            len: bytes,
            write_len,
            zeroed: zeroed && !self.encrypted(),
            fill: if whole { Fill::Nothing } else { fill },
        }))
    }

    /// Ends an allocation: the clusters become the guest's (`commit`), or are free again.
    pub(super) fn end_ticket(&self, st: &mut State, ticket: Ticket, commit: bool) {
        let Some(pending) = st.tickets.remove(ticket) else {
            tracing::warn!(image = self.name, ticket = ticket.0, "no such allocation");
            return;
        };
        let g = &self.geometry;
        if let Some(raw) = pending.packed {
            return self.end_compressed(st, &pending, raw, commit);
        }
        if pending.part {
            return self.end_part(st, &pending, commit);
        }
        if commit {
            let first = self.place(pending.start >> g.cluster_unit_bits()).index;
            for i in 0..pending.clusters {
                let cluster = pending.host + i;
                if let Some(frame) = pending.ref_frame.filter(|_| !pending.counted) {
                    self.set_refcount(st, frame, cluster, 1);
                }
                let raw = cluster << g.cluster_bits | COPIED;
                let index = first + i as usize;
                self.put_entry(st, pending.l2_frame, index, raw, Bitmap::ALLOCATED);
            }
            st.ordered |= !pending.independent;
            if st.flush_soon() {
                self.ahead.store(true, Ordering::Relaxed);
            }
        } else if let Some(frame) = pending.ref_frame {
            let piece = Piece {
                first: pending.host,
                count: pending.clusters,
                // Parts may have been written.
                zeroed: false,
                counted: pending.counted,
                frame,
            };
            self.take_back(st, piece);
        }
        match pending.old {
            // Stays pinned until the dereference is applied.
            Some(old) if commit => self.dereference(st, old),
            Some(old) => self.unpin_old(st, old),
            None => {}
        }
        if let Some(frame) = pending.ref_frame {
            st.cache.unpin(frame);
        }
        st.cache.unpin(pending.l2_frame);
    }
}
