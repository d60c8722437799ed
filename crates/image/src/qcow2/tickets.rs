//! Allocations in flight: which guest clusters they cover, and what commit needs to know.

use super::cache::KEY_TICKET;
use super::state::Deref;
use crate::{Key, Ticket};

/// Allocations that may be in flight: as many as a queue is deep. What they pin is bounded by
/// `State::admit`.
const TICKETS_MAX: usize = 1024;

/// One allocation between its plan and its commit or abort.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    /// First guest cluster.
    pub(super) start: u64,
    /// Guest and host clusters.
    pub(super) count: u64,
    /// First host cluster.
    pub(super) host: u64,
    /// The L2 slice's frame, pinned.
    pub(super) l2_frame: u32,
    /// The frame with the new clusters' refcounts, pinned; `None` when the clusters
    /// were the guest's already (a preallocated zero cluster).
    pub(super) ref_frame: Option<u32>,
    /// What the guest's clusters referred to before; its refcounts are pinned.
    pub(super) old: Option<Deref>,
}

#[derive(Debug)]
struct Slot {
    generation: u64,
    pending: Option<Pending>,
}

/// The table of allocations in flight.
#[derive(Debug)]
pub(super) struct Tickets {
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// `(first guest cluster, end, slot)`, sorted; ranges never overlap.
    active: Vec<(u64, u64, u16)>,
}

impl Tickets {
    /// An empty table.
    pub(super) fn new() -> Self {
        let count = TICKETS_MAX;
        Self {
            slots: (0..count)
                .map(|_| Slot {
                    generation: 0,
                    pending: None,
                })
                .collect(),
            // It fits.
            free: (0..count as u16).rev().collect(),
            active: Vec::with_capacity(count),
        }
    }

    fn ticket(&self, slot: u16) -> Ticket {
        let generation = self
            .slots
            .get(usize::from(slot))
            .map_or(0, |s| s.generation);
        Ticket(generation << 16 & !KEY_TICKET | u64::from(slot))
    }

    /// The key that is woken when `ticket` ends.
    pub(super) fn key(ticket: Ticket) -> Key {
        Key(KEY_TICKET | ticket.0)
    }

    /// A key of some allocation in flight.
    pub(super) fn any_key(&self) -> Option<Key> {
        let (_, _, slot) = self.active.first()?;
        Some(Self::key(self.ticket(*slot)))
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    fn after(&self, cluster: u64) -> usize {
        self.active
            .partition_point(|(start, _, _)| *start <= cluster)
    }

    /// The key of the allocation that covers guest cluster `cluster`.
    pub(super) fn busy(&self, cluster: u64) -> Option<Key> {
        let (_, end, slot) = self.active.get(self.after(cluster).checked_sub(1)?)?;
        (cluster < *end).then(|| Self::key(self.ticket(*slot)))
    }

    /// The first cluster of an allocation behind `cluster`.
    pub(super) fn next_start(&self, cluster: u64) -> u64 {
        self.active
            .get(self.after(cluster))
            .map_or(u64::MAX, |(start, _, _)| *start)
    }

    /// Takes a free slot. The caller has checked that there is one and that the range is free.
    pub(super) fn add(&mut self, pending: Pending) -> Option<Ticket> {
        let slot = self.free.pop()?;
        let at = self.after(pending.start);
        self.active
            .insert(at, (pending.start, pending.start + pending.count, slot));
        let entry = self.slots.get_mut(usize::from(slot))?;
        entry.generation += 1;
        entry.pending = Some(pending);
        Some(self.ticket(slot))
    }

    /// Ends an allocation. `None` for a ticket that is not in flight.
    pub(super) fn remove(&mut self, ticket: Ticket) -> Option<Pending> {
        let slot = (ticket.0 & 0xffff) as u16;
        if self.ticket(slot) != ticket {
            return None;
        }
        let pending = self.slots.get_mut(usize::from(slot))?.pending.take()?;
        self.active.retain(|(_, _, s)| *s != slot);
        self.free.push(slot);
        Some(pending)
    }

    /// New host clusters of the allocations in flight, as `(first, count)`.
    pub(super) fn hosts(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let pending = self.slots.iter().filter_map(|s| s.pending);
        pending.map(|p| (p.host, p.count))
    }
}
