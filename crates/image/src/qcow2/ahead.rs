//! Clusters counted ahead: free clusters whose refcount is 1 and whose bytes are zeros, both durably,
//! before anything refers to them.
//!
//! A cluster from here needs no order. Whenever its L2 entry becomes durable, it is counted; and where
//! the guest read zeros before, it reads zeros or what it wrote, whichever of its data are
//! durable by then. So a flush that covers only such writes is one stage: data, entries, one barrier.
//!
//! Counting is done by a flush, beside what else it writes, when there are few allocations from flush to flush:
//! a guest that writes and flushes in turn. After a crash these clusters are leaks; a clean close gives them back.

use super::Qcow2;
use super::alloc::{Piece, Run};
use super::cache::Owner;
use super::state::State;

/// Clusters counted for each that was allocated since the last flush, so that few flushes count.
const FLUSHES: u64 = 16;
/// Fewest and most clusters that one flush counts.
const LOT_MIN: u64 = 64;
const LOT_MAX: u64 = 512;
/// Bytes that one flush counts at most: what a crash may leak, twice.
const LOT_BYTES_MAX: u64 = 16 << 20;
/// Lots at a time: one to take from, one being counted.
const LOTS_MAX: usize = 2;

/// Clusters next to one another, with their refcounts in one slice.
#[derive(Clone, Copy, Debug)]
struct Lot {
    first: u64,
    count: u64,
    /// The slice's frame, pinned while the lot lasts.
    frame: u32,
    /// A flush that wrote the refcounts has succeeded.
    durable: bool,
}

/// The clusters counted ahead.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    lots: Vec<Lot>,
    /// Clusters allocated since the last flush began.
    recent: u64,
}

impl Ahead {
    /// Notes an allocation.
    pub(super) fn allocated(&mut self, count: u64) {
        self.recent += count;
    }

    /// The flush under way has succeeded. No lot is added while one is under way.
    pub(super) fn flushed(&mut self) {
        for lot in &mut self.lots {
            lot.durable = true;
        }
    }
}

impl Qcow2 {
    /// Up to `want` clusters counted ahead.
    pub(super) fn take_ahead(&self, st: &mut State, want: u64) -> Option<Piece> {
        let lot = st.ahead.lots.first_mut().filter(|lot| lot.durable)?;
        let piece = Piece {
            first: lot.first,
            count: want.min(lot.count),
            zeroed: true,
            counted: true,
            frame: lot.frame,
        };
        lot.first += piece.count;
        lot.count -= piece.count;
        if lot.count == 0 {
            st.cache.unpin(lot.frame);
            st.ahead.lots.remove(0);
        }
        Some(piece)
    }

    /// Begins to count clusters where that will save later flushes a barrier. The flush that
    /// is about to begin writes their refcounts.
    pub(super) fn count_ahead(&self, st: &mut State) {
        let recent = std::mem::take(&mut st.ahead.recent);
        let most = (LOT_BYTES_MAX >> self.geometry.cluster_bits).clamp(1, LOT_MAX);
        let want = (recent * FLUSHES).clamp(LOT_MIN, LOT_MAX).min(most);
        let left: u64 = st.ahead.lots.iter().map(|lot| lot.count).sum();
        let enough = left > 2 * recent && left > want / 4;
        // With a data file, the guest's writes take no clusters of this one.
        if self.geometry.data_file
            || recent == 0
            || recent > want
            || enough
            || st.ahead.lots.len() >= LOTS_MAX
        {
            return;
        }
        let slice_bits = self.geometry.slice_refcount_bits();
        // What is not in memory is not worth a load.
        let found = st.space.runs().find_map(|run| {
            let owner = Owner::Ref(self.ref_slice_of(run.first));
            let known = run.zeroed && self.has_block(st, run.first);
            let frame = known.then(|| st.cache.find(&self.tables, owner))??;
            let end = ((run.first >> slice_bits) + 1) << slice_bits;
            let end = end.min(run.first + run.count.min(want));
            let free = |c: &u64| self.refcount(frame, *c) == 0 && !st.places.holds(*c);
            let count = (run.first..end).take_while(free).count() as u64;
            let first = run.first;
            (count > 0).then_some(Lot {
                first,
                count,
                frame,
                durable: false,
            })
        });
        let Some(lot) = found else { return };
        st.space.take(lot.first, lot.count);
        st.cache.pin(lot.frame);
        for cluster in lot.first..lot.first + lot.count {
            self.set_refcount(st, lot.frame, cluster, 1);
        }
        st.ahead.lots.push(lot);
    }

    /// Makes clusters free again that were allocated, written perhaps, and never referred to.
    pub(super) fn take_back(&self, st: &mut State, piece: Piece) {
        if piece.counted {
            for cluster in piece.first..piece.first + piece.count {
                self.set_refcount(st, piece.frame, cluster, 0);
            }
        }
        st.space.add(Run {
            first: piece.first,
            count: piece.count,
            zeroed: piece.zeroed,
        });
    }

    /// Gives everything back, for a clean close.
    pub(super) fn end_ahead(&self, st: &mut State) {
        for lot in std::mem::take(&mut st.ahead.lots) {
            let piece = Piece {
                first: lot.first,
                count: lot.count,
                zeroed: true,
                counted: true,
                frame: lot.frame,
            };
            self.take_back(st, piece);
            st.cache.unpin(lot.frame);
        }
    }
}
