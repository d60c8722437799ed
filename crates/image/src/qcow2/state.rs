//! What the lock of an image guards, and how its parts say that they cannot answer yet.

use super::ahead::Ahead;
use super::alloc::Space;
use super::cache::{Cache, Changed};
use super::lazy::Lazy;
use super::pending::{Births, Pending};
use super::refcount::RefTable;
use super::shared::Copies;
use crate::metadata::Tickets;
pub(super) use crate::metadata::{Ask, Halt, Sectors};
use crate::{Need, Step};
use block::Result;
use std::collections::HashSet;
use std::ops::Range;

/// Host clusters `first .. first + count` whose refcounts go down by one when the change that
/// stopped referring to them is durable. Their refcount slices are pinned until then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deref {
    pub(super) first: u64,
    pub(super) count: u64,
}

/// How much of the growing lists the flush under way covers: the first so many of each.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Covered {
    pub(super) running: bool,
    pub(super) tables: usize,
    pub(super) blocks: usize,
    pub(super) derefs: usize,
    /// First cluster and clusters of the place that the run gives the refcount table.
    pub(super) moved: Option<(u64, u64)>,
    pub(super) ordered: bool,
    /// The run writes refcounts.
    pub(super) refcounts: bool,
    /// The run brings the marks of the bitmaps.
    pub(super) bitmaps: bool,
    /// The run sets the corrupt bit.
    pub(super) marks: bool,
}

/// Which host clusters hold metadata.
#[derive(Debug)]
pub(super) struct Places {
    /// L2 tables and refcount blocks.
    pub(super) blocks: HashSet<u64>,
    /// Header, L1 table, and all places where the refcount table is or was.
    pub(super) fixed: Vec<Range<u64>>,
}

impl Places {
    /// Whether host cluster `cluster` holds metadata.
    pub(super) fn holds(&self, cluster: u64) -> bool {
        self.fixed.iter().any(|r| r.contains(&cluster)) || self.blocks.contains(&cluster)
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) cache: Cache,
    pub(super) refs: RefTable,
    pub(super) space: Space,
    pub(super) ahead: Ahead,
    /// Where the next compressed cluster's bytes go, within a host cluster that has some: see `compressed`.
    pub(super) tail: Option<u64>,
    pub(super) tickets: Tickets<Pending>,
    pub(super) births: Births,
    pub(super) places: Places,
    pub(super) l1_changed: Sectors,
    /// L1 indices of tables that no flush has written yet.
    pub(super) fresh_tables: Vec<u32>,
    /// L2 tables that were shared.
    pub(super) copies: Copies,
    pub(super) derefs: Vec<Deref>,
    /// Whether something became referenced since the last flush began that was not counted ahead, or not
    /// zeros before: only then must stage 1 be durable before stage 2.
    pub(super) ordered: bool,
    pub(super) lazy: Lazy,
    /// The last flush failed: some of what counts as never written may be on disk, and referred to.
    pub(super) failed: bool,
    pub(super) covered: Covered,
    /// Kept from flush to flush for its memory.
    pub(super) scratch: Vec<Changed>,
    /// A loaded slice's words; kept for its memory.
    pub(super) words: Vec<u64>,
    /// There is a frame for each L2 slice of the disk: dirty ones are in nobody's way.
    pub(super) covers: bool,
}

/// New L2 tables that may wait for a flush.
pub(super) const FRESH_TABLES_MAX: usize = 1024;
/// Dereferences that may wait for a flush.
pub(super) const DEREFS_MAX: usize = 65536;

impl State {
    /// Halts when metadata must be flushed before more of it is changed.
    pub(super) fn admit(&self) -> Ask<()> {
        if self.fresh_tables.len() >= FRESH_TABLES_MAX || self.derefs.len() >= DEREFS_MAX {
            return Err(Halt::Need(Need::Commit));
        }
        if self.cache.crowded() {
            // Pins of writes in flight go away by themselves; a flush would not help.
            if self.cache.pins_crowd() && self.derefs.is_empty() && !self.cache.is_dirty() {
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
                || self.derefs.len() >= DEREFS_MAX / 2
                || self.copies.filling()
                || !self.covers && self.cache.filling())
    }

    /// The answer as the contract wants it.
    pub(super) fn step<T>(&mut self, ask: Ask<T>) -> Result<Step<T>> {
        match ask {
            Ok(answer) => Ok(Step::Done(answer)),
            Err(Halt::Need(need)) => {
                // Whatever there is too much of: this flush is to make room.
                self.lazy.pressed |= need == Need::Commit;
                Ok(Step::Need(need))
            }
            Err(Halt::Wait(key)) => Ok(Step::Wait(key)),
            Err(Halt::Busy) => match self.tickets.any_key() {
                Some(key) => Ok(Step::Wait(key)),
                None => {
                    self.lazy.pressed = true;
                    Ok(Step::Need(Need::Commit))
                }
            },
            Err(Halt::Fail(error)) => Err(error),
        }
    }
}
