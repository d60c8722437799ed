//! Allocations in flight: which of the guest's clusters or subclusters they cover, and what commit needs
//! to know. *Units* are clusters, or subclusters where the image has them.
//!
//! Allocations of different subclusters of one new cluster share its host cluster, the
//! [`Birth`]: the first commit makes it the guest's, and the last abort gives it back.

use super::cache::KEY_TICKET;
use super::state::Deref;
use crate::{Key, Ticket};

/// Allocations that may be in flight: as many as a queue is deep. What they pin is bounded by
/// `State::admit`.
const TICKETS_MAX: usize = 1024;

/// One allocation between its plan and its commit or abort.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    /// First unit.
    pub(super) start: u64,
    /// Units.
    pub(super) count: u64,
    /// First host cluster.
    pub(super) host: u64,
    /// Host clusters.
    pub(super) clusters: u64,
    /// The L2 slice's frame, pinned.
    pub(super) l2_frame: u32,
    /// A part of a cluster with subclusters: nothing but bits to change, and perhaps a birth to end.
    pub(super) part: bool,
    /// The frame with the new clusters' refcounts, pinned; `None` when the clusters were the
    /// guest's already (a preallocated zero cluster), when their birth has it, or when they are in a data file.
    pub(super) ref_frame: Option<u32>,
    /// The new clusters were counted ahead.
    pub(super) counted: bool,
    /// Besides, the guest read zeros there: the data need not be durable before what refers to them.
    pub(super) independent: bool,
    /// What the guest's clusters referred to before; its refcounts are pinned.
    pub(super) old: Option<Deref>,
}

/// A new cluster of which allocations in flight write parts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Birth {
    /// Guest cluster.
    pub(super) cluster: u64,
    /// Host cluster.
    pub(super) host: u64,
    /// The frame with its refcount, pinned; none in a data file.
    pub(super) ref_frame: Option<u32>,
    /// It was counted ahead.
    pub(super) counted: bool,
    /// It reads as zeros where nobody wrote.
    pub(super) zeroed: bool,
    /// Allocations that write parts of it.
    pub(super) users: u32,
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
    /// `(first unit, end, slot)`, sorted; ranges never overlap.
    active: Vec<(u64, u64, u16)>,
    /// Sorted by guest cluster.
    births: Vec<Birth>,
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
            births: Vec::with_capacity(count),
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

    fn after(&self, unit: u64) -> usize {
        self.active.partition_point(|(start, _, _)| *start <= unit)
    }

    /// The key of the allocation that covers `unit`.
    pub(super) fn busy(&self, unit: u64) -> Option<Key> {
        let (_, end, slot) = self.active.get(self.after(unit).checked_sub(1)?)?;
        (unit < *end).then(|| Self::key(self.ticket(*slot)))
    }

    /// The key of the first allocation that covers any of the units from `first` to before `end`.
    pub(super) fn busy_within(&self, first: u64, end: u64) -> Option<Key> {
        self.busy(first).or_else(|| {
            let (start, _, slot) = self.active.get(self.after(first))?;
            (*start < end).then(|| Self::key(self.ticket(*slot)))
        })
    }

    /// The first unit of an allocation behind `unit`.
    pub(super) fn next_start(&self, unit: u64) -> u64 {
        self.active
            .get(self.after(unit))
            .map_or(u64::MAX, |(start, _, _)| *start)
    }

    fn birth_at(&self, cluster: u64) -> Result<usize, usize> {
        self.births.binary_search_by_key(&cluster, |b| b.cluster)
    }

    /// The new cluster that becomes guest cluster `cluster`.
    pub(super) fn birth(&mut self, cluster: u64) -> Option<&mut Birth> {
        let at = self.birth_at(cluster).ok()?;
        self.births.get_mut(at)
    }

    /// Notes a new cluster. The caller has checked that there is none yet.
    pub(super) fn add_birth(&mut self, birth: Birth) {
        match self.birth_at(birth.cluster) {
            Ok(_) => debug_assert!(false, "two new clusters for one"),
            Err(at) => self.births.insert(at, birth),
        }
    }

    /// Ends the birth of guest cluster `cluster`.
    pub(super) fn take_birth(&mut self, cluster: u64) -> Option<Birth> {
        let at = self.birth_at(cluster).ok()?;
        Some(self.births.remove(at))
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
        pending.map(|p| (p.host, p.clusters))
    }
}
