//! Allocations in flight: which of the guest's clusters (or subclusters: *units*) they cover, and what the
//! format's commit needs to know of each.

use super::cache::KEY_TICKET;
use crate::{Key, Ticket};

/// Allocations that may be in flight: as many as a queue is deep.
pub(crate) const TICKETS_MAX: usize = 1024;

/// What an allocation covers.
pub(crate) trait Span {
    /// First unit, and units.
    fn units(&self) -> (u64, u64);
}

#[derive(Debug)]
struct Slot<P> {
    generation: u64,
    pending: Option<P>,
}

/// The table of allocations in flight.
#[derive(Debug)]
pub(crate) struct Tickets<P> {
    slots: Vec<Slot<P>>,
    free: Vec<u16>,
    /// `(first unit, end, slot)`, sorted; ranges never overlap.
    active: Vec<(u64, u64, u16)>,
}

/// The key that is woken when `ticket` ends.
pub(crate) fn key_of(ticket: Ticket) -> Key {
    Key(KEY_TICKET | ticket.0)
}

impl<P: Span> Tickets<P> {
    /// An empty table.
    pub(crate) fn new() -> Self {
        Self::with_room(TICKETS_MAX)
    }

    /// An empty table for so many allocations, at most [`TICKETS_MAX`].
    pub(crate) fn with_room(count: usize) -> Self {
        let count = count.clamp(1, TICKETS_MAX);
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

    /// A key of some allocation in flight.
    pub(crate) fn any_key(&self) -> Option<Key> {
        let (_, _, slot) = self.active.first()?;
        Some(key_of(self.ticket(*slot)))
    }

    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    fn after(&self, unit: u64) -> usize {
        self.active.partition_point(|(start, _, _)| *start <= unit)
    }

    /// The key of the allocation that covers `unit`.
    pub(crate) fn busy(&self, unit: u64) -> Option<Key> {
        let (_, end, slot) = self.active.get(self.after(unit).checked_sub(1)?)?;
        (unit < *end).then(|| key_of(self.ticket(*slot)))
    }

    /// The key of the first allocation that covers any of the units from `first` to before `end`.
    pub(crate) fn busy_within(&self, first: u64, end: u64) -> Option<Key> {
        self.busy(first).or_else(|| {
            let (start, _, slot) = self.active.get(self.after(first))?;
            (*start < end).then(|| key_of(self.ticket(*slot)))
        })
    }

    /// The first unit of an allocation behind `unit`.
    pub(crate) fn next_start(&self, unit: u64) -> u64 {
        self.active
            .get(self.after(unit))
            .map_or(u64::MAX, |(start, _, _)| *start)
    }

    /// Takes a free slot. The caller has checked that there is one and that the range is free.
    pub(crate) fn add(&mut self, pending: P) -> Option<Ticket> {
        let slot = self.free.pop()?;
        let (start, count) = pending.units();
        let at = self.after(start);
        self.active.insert(at, (start, start + count, slot));
        let entry = self.slots.get_mut(usize::from(slot))?;
        entry.generation += 1;
        entry.pending = Some(pending);
        Some(self.ticket(slot))
    }

    /// Ends an allocation. `None` for a ticket that is not in flight.
    pub(crate) fn remove(&mut self, ticket: Ticket) -> Option<P> {
        let slot = (ticket.0 & 0xffff) as u16;
        if self.ticket(slot) != ticket {
            return None;
        }
        let pending = self.slots.get_mut(usize::from(slot))?.pending.take()?;
        self.active.retain(|(_, _, s)| *s != slot);
        self.free.push(slot);
        Some(pending)
    }

    /// The allocations in flight.
    pub(crate) fn pending(&self) -> impl Iterator<Item = &P> + '_ {
        self.slots.iter().filter_map(|s| s.pending.as_ref())
    }
}
