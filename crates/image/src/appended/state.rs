//! What the lock of an image guards.

use super::space::Space;
use crate::metadata::cache::{Cache, Changed};
use crate::metadata::{Ask, Halt, Sectors, Span, Tickets};
use crate::{Need, Step};
use block::Result;
use std::collections::BTreeSet;
use std::ops::Range;

/// New L2 tables that may wait for a flush.
pub(super) const FRESH_TABLES_MAX: usize = 1024;

/// One allocation between its plan and its commit or abort.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    /// First guest cluster.
    pub(super) start: u64,
    /// Clusters.
    pub(super) count: u64,
    /// First host cluster.
    pub(super) host: u64,
    /// The L2 slice's frame, pinned.
    pub(super) l2_frame: u32,
    /// The guest read zeros there, and so it does of the new clusters, durably: data and entry may become
    /// durable in any order.
    pub(super) independent: bool,
}

impl Span for Pending {
    fn units(&self) -> (u64, u64) {
        (self.start, self.count)
    }
}

/// Which host clusters hold metadata.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// First clusters of the L2 tables.
    pub(crate) tables: BTreeSet<u64>,
    /// Clusters of an L2 table.
    pub(crate) table_size: u64,
    /// Clusters that hold what is neither (the L1 table, a header), a few runs.
    pub(crate) fixed: Vec<Range<u64>>,
}

impl Places {
    /// Whether host cluster `cluster` holds a table.
    pub(super) fn holds(&self, cluster: u64) -> bool {
        let within = |first: u64| cluster >= first && cluster - first < self.table_size;
        let last = self.tables.range(..=cluster).next_back();
        let fixed = || self.fixed.iter().any(|range| range.contains(&cluster));
        last.is_some_and(|first| within(*first)) || fixed()
    }

    /// Notes an L2 table that begins with cluster `first`. `false` where another table has one of its clusters.
    pub(crate) fn claim(&mut self, first: u64) -> bool {
        let end = first + self.table_size;
        let near = self.tables.range(..end).next_back();
        let free = near.is_none_or(|other| other + self.table_size <= first)
            && self.fixed.iter().all(|r| r.end <= first || end <= r.start);
        free && self.tables.insert(first)
    }
}

/// What the flush under way covers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Covered {
    pub(super) running: bool,
    /// The first so many of the new tables.
    pub(super) tables: usize,
    /// The end of the file when it began, in clusters.
    pub(super) end: u64,
    pub(super) ordered: bool,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) cache: Cache,
    pub(super) space: Space,
    pub(super) tickets: Tickets<Pending>,
    pub(super) places: Places,
    pub(super) l1_changed: Sectors,
    /// L1 indices of tables that no flush has written yet.
    pub(super) fresh_tables: Vec<u32>,
    /// Something is referred to that must be durable before the reference.
    pub(super) ordered: bool,
    pub(super) covered: Covered,
    /// Kept from flush to flush for its memory.
    pub(super) scratch: Vec<Changed>,
    /// A loaded slice's words; kept for its memory.
    pub(super) words: Vec<u64>,
    /// There is a frame for each L2 slice of the disk: dirty ones are in nobody's way.
    pub(super) covers: bool,
    /// A bit for each L2 slice whose entries were sound when it was first read: it has changed through us only.
    pub(super) judged: Vec<u64>,
}

impl State {
    /// Halts when metadata must be flushed before more of it is changed.
    pub(super) fn admit(&self) -> Ask<()> {
        if self.fresh_tables.len() >= FRESH_TABLES_MAX {
            return Err(Halt::Need(Need::Commit));
        }
        if self.cache.crowded() {
            // Pins of writes in flight go away by themselves; a flush would not help.
            if self.cache.pins_crowd() && !self.cache.is_dirty() {
                return Err(Halt::Busy);
            }
            return Err(Halt::Need(Need::Commit));
        }
        Ok(())
    }

    /// Whether a flush should begin before `admit` halts for one.
    pub(super) fn flush_soon(&self) -> bool {
        !self.covered.running
            && (self.fresh_tables.len() >= FRESH_TABLES_MAX / 2
                || !self.covers && self.cache.filling())
    }

    /// The answer as the contract wants it.
    pub(super) fn step<T>(&mut self, ask: Ask<T>) -> Result<Step<T>> {
        match ask {
            Ok(answer) => Ok(Step::Done(answer)),
            Err(Halt::Need(need)) => Ok(Step::Need(need)),
            Err(Halt::Wait(key)) => Ok(Step::Wait(key)),
            Err(Halt::Busy) => Ok(match self.tickets.any_key() {
                Some(key) => Step::Wait(key),
                None => Step::Need(Need::Commit),
            }),
            Err(Halt::Fail(error)) => Err(error),
        }
    }
}
