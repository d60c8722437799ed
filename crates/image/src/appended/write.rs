//! Planning writes into clusters of their own.

use super::Appended;
use super::map::Entry;
use super::space::Run;
use super::state::{FRESH_TABLES_MAX, Pending, State};
use crate::metadata::{Ask, FRESH, FRESH_ZEROED, Halt, Place, Walk, key_of};
use crate::{Allocation, Fill, Need, Plan, Ticket};
use block::{GuestOffset, HostOffset};
use std::sync::atomic::Ordering;

/// Bytes of one allocation, unless a cluster is larger.
const ALLOC_BYTES_MAX: u64 = 2 << 20;

impl Appended {
    /// The L2 entry of guest cluster `cluster`, whose slice is in `frame`.
    pub(super) fn entry_in(&self, frame: u32, index: usize, cluster: u64) -> Ask<Entry> {
        let words = self.tables.words(frame);
        let raw = words.get(index).map_or(0, |w| w.load(Ordering::Relaxed));
        Ok(self.decode(raw).map_err(|bad| self.bad_l2(cluster, bad))?)
    }

    pub(super) fn put_entry(&self, st: &mut State, frame: u32, index: usize, raw: u64) {
        st.cache.set(&self.tables, &self.layout, frame, index, raw);
    }

    /// Gives L1 entry `place.l1` a table if it has none.
    pub(super) fn make_table(&self, st: &mut State, place: &Place) -> Ask<()> {
        // Under the lock it may have changed since `place` was made.
        let Some(entry) = self.tables.l1.get(place.l1) else {
            return Ok(());
        };
        let table = self
            .decode_l1(entry.load(Ordering::Acquire))
            .map_err(|bad| self.bad_l1(place.l1, bad))?;
        if table != 0 {
            return Ok(());
        }
        if st.fresh_tables.len() >= FRESH_TABLES_MAX {
            return Err(Halt::Need(Need::Commit));
        }
        let run = self.alloc_table(st)?;
        let host = run.first << self.layout.cluster_bits;
        entry.store(host | FRESH | FRESH_ZEROED, Ordering::Release);
        st.places.tables.insert(run.first);
        // An entry that refers to it must not be durable before it is there as zeros.
        st.ordered |= run.first + run.count > st.space.durable;
        self.mark_l1(st, place.l1);
        // Less than 2^27 L1 entries.
        st.fresh_tables.push(place.l1 as u32);
        Ok(())
    }

    pub(super) fn plan_allocating(&self, st: &mut State, at: GuestOffset, len: u64) -> Ask<Plan> {
        // Since the caller asked, a load may have shown the damage.
        self.check_writable()?;
        let cluster = at.0 >> self.layout.cluster_bits;
        if let Some(key) = st.tickets.busy(cluster) {
            return Err(Halt::Wait(key));
        }
        st.admit()?;
        if st.tickets.is_full() {
            return Err(Halt::Busy);
        }
        self.make_table(st, &self.place(cluster))?;
        let place = self.place(cluster);
        let frame = self.l2_frame(st, &place)?;
        self.plan_at(st, at, len, frame, &place)
    }

    fn plan_at(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        frame: u32,
        place: &Place,
    ) -> Ask<Plan> {
        let g = &self.layout;
        let cluster = at.0 >> g.cluster_bits;
        // How many clusters the caller's bytes touch, within what one allocation may be.
        let want = ((at.0 + len - 1) >> g.cluster_bits) - cluster + 1;
        let want = want
            .min((g.slice_entries() - place.index) as u64)
            .min((ALLOC_BYTES_MAX >> g.cluster_bits).max(1))
            .min(st.tickets.next_start(cluster) - cluster);
        let like = |same: &dyn Fn(u64, Entry) -> bool| {
            (0..want)
                .take_while(|i| {
                    let found = self.entry_in(frame, place.index + *i as usize, cluster + i);
                    found.is_ok_and(|e| same(*i, e))
                })
                .count() as u64
        };
        let entry = self.entry_in(frame, place.index, cluster)?;
        let (count, blank) = match entry {
            Entry::Data(host) => {
                // Someone committed since the caller looked.
                let count = like(&|i, e| e == Entry::Data(host + (i << g.cluster_bits)));
                let skip = at.0 & (g.cluster() - 1);
                return Ok(Plan::InPlace {
                    file: self.file,
                    offset: HostOffset(host + skip),
                    len: len.min((count << g.cluster_bits) - skip),
                });
            }
            Entry::Zero => (like(&|_, e| e == entry), true),
            Entry::Unallocated => (like(&|_, e| e == entry), !self.has_backing),
            Entry::Compressed { .. } => {
                let packed = |_, e| matches!(e, Entry::Compressed { .. });
                (like(&packed), false)
            }
        };
        let run = self.alloc(st, count)?;
        let durable = run.first + run.count <= st.space.durable;
        let pending = Pending {
            start: cluster,
            count: run.count,
            host: run.first,
            l2_frame: frame,
            independent: blank && run.zeroed && durable,
        };
        let fill = if blank { Fill::Zero } else { Fill::Existing };
        let Some(ticket) = st.tickets.add(pending) else {
            // `is_full` was asked under the same lock.
            debug_assert!(false, "the table of allocations overflowed");
            st.space.add(run);
            return Err(Halt::Busy);
        };
        // It must not leave before the commit.
        st.cache.pin(frame);
        let start = cluster << g.cluster_bits;
        let bytes = run.count << g.cluster_bits;
        let write_len = len.min(start + bytes - at.0);
        // A tail behind the disk's end is filled like the rest: the disk may grow.
        let whole = at.0 == start && write_len == bytes;
        Ok(Plan::Allocate(Allocation {
            ticket,
            key: key_of(ticket),
            file: self.file,
            host: HostOffset(run.first << g.cluster_bits),
            start: GuestOffset(start),
            len: bytes,
            write_len,
            zeroed: run.zeroed,
            fill: if whole { Fill::Nothing } else { fill },
        }))
    }

    /// Ends an allocation: the clusters become the guest's (`commit`), or are free again.
    pub(super) fn end_ticket(&self, st: &mut State, ticket: Ticket, commit: bool) {
        let Some(pending) = st.tickets.remove(ticket) else {
            tracing::warn!(image = self.name, ticket = ticket.0, "no such allocation");
            return;
        };
        if commit {
            let first = self.place(pending.start).index;
            for i in 0..pending.count {
                let raw = (pending.host + i) << self.layout.cluster_bits;
                self.put_entry(st, pending.l2_frame, first + i as usize, raw);
            }
            st.ordered |= !pending.independent;
            if st.flush_soon() {
                self.ahead.store(true, Ordering::Relaxed);
            }
        } else {
            st.space.add(Run {
                first: pending.host,
                count: pending.count,
                // Parts may have been written.
                zeroed: false,
            });
        }
        st.cache.unpin(pending.l2_frame);
    }
}
