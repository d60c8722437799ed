//! Clusters counted ahead: free clusters whose refcount is 1 and whose bytes are zeros, both durably,
//! before anything refers to them.
//!
//! A cluster from here needs no order. Whenever its L2 entry becomes durable, it is counted; and where
//! the guest read zeros before, it reads zeros or what it wrote, whichever of its data are
//! durable by then. So a flush that covers only such writes is one stage: data, entries, one barrier.
//!
//! Counting is done by a flush, beside what else it writes, when there are few allocations from flush to flush:
//! a guest that writes and flushes in turn. After a crash these clusters are leaks; a clean close gives them back.
//!
//! Their zeros may be written, too, before they are used ([`crate::Image::prewrite`]): space that is only reserved is an
//! *unwritten* extent, the first write there has the file system note that it is not any more, and the flush behind it waits for a
//! commit of the file system's journal. (4 KiB, `fdatasync`, one at a time, on ext4: the barrier took 200 µs in reserved space and 50
//! in written space.) Worth its bandwidth where a guest flushes after each few writes, which leave the device idle most of the
//! time, and which write only a part of each cluster at first: once in the life of a cluster.

use super::Qcow2;
use super::alloc::{Piece, Run};
use super::cache::Owner;
use super::state::State;
use crate::{FileId, Prewrite};
use block::HostOffset;
use std::sync::atomic::Ordering;

/// Clusters counted for each that was allocated since the last flush, so that few flushes count.
const FLUSHES: u64 = 16;
/// Fewest and most clusters that one flush counts.
const LOT_MIN: u64 = 64;
const LOT_MAX: u64 = 512;
/// Bytes that one flush counts at most: what a crash may leak, twice.
const LOT_BYTES_MAX: u64 = 16 << 20;
/// Zeros are written to lots where the guest allocates no more bytes than this from flush to flush.
const PREWRITE_PER_FLUSH_MAX: u64 = 256 << 10;
/// Bytes of zeros that are written at once: few, so that the guest's own writes do not wait for them long.
const PREWRITE_BYTES: u64 = 256 << 10;
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
    /// Clusters at its end to which zeros are still to be written. Until there are none it is not taken from.
    unwritten: u64,
    /// The first of these are being written.
    writing: bool,
}

/// The clusters counted ahead.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    lots: Vec<Lot>,
    /// Clusters allocated since the last flush began.
    recent: u64,
    /// Bytes that the allocations since then write: the guest's, and what is copied around them.
    written: u64,
    /// Zeros are to be written to lots.
    prewrites: bool,
}

impl Ahead {
    /// Notes an allocation.
    pub(super) fn allocated(&mut self, count: u64) {
        self.recent += count;
    }

    /// Notes that an allocation writes so many bytes.
    pub(super) fn wrote(&mut self, bytes: u64) {
        self.written += bytes;
    }

    /// See [`crate::Image::prewrite`].
    pub(super) fn prewrite(&mut self, on: bool) {
        self.prewrites = on;
    }

    /// Whether a lot lacks zeros that nobody writes.
    pub(super) fn wants_zeros(&self) -> bool {
        self.lots
            .iter()
            .any(|lot| lot.unwritten > 0 && !lot.writing)
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
        let ready = |lot: &&mut Lot| lot.durable && lot.unwritten == 0;
        let lot = st.ahead.lots.first_mut().filter(ready)?;
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
        let written = std::mem::take(&mut st.ahead.written);
        let allocated = recent << self.geometry.cluster_bits;
        let most = (LOT_BYTES_MAX >> self.geometry.cluster_bits).clamp(1, LOT_MAX);
        let want = (recent * FLUSHES).clamp(LOT_MIN, LOT_MAX).min(most);
        let left: u64 = st.ahead.lots.iter().map(|lot| lot.count).sum();
        // Who writes clusters whole gains little: zeros would only double what is written.
        let prewrites =
            st.ahead.prewrites && allocated <= PREWRITE_PER_FLUSH_MAX && written <= allocated / 2;
        // Written lots take longer to be ready.
        let spare = if prewrites { want / 2 } else { want / 4 };
        let enough = left > 2 * recent && left > spare;
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
                unwritten: if prewrites { count } else { 0 },
                writing: false,
            })
        });
        let Some(lot) = found else { return };
        st.space.take(lot.first, lot.count);
        st.cache.pin(lot.frame);
        for cluster in lot.first..lot.first + lot.count {
            self.set_refcount(st, lot.frame, cluster, 1);
        }
        st.ahead.lots.push(lot);
        if prewrites {
            self.ahead.store(true, Ordering::Relaxed);
        }
    }

    /// The next zeros to write, for one caller.
    pub(super) fn next_prewrite(&self, st: &mut State) -> Option<Prewrite> {
        let bits = self.geometry.cluster_bits;
        let lot = st.ahead.lots.iter_mut().find(|lot| lot.unwritten > 0)?;
        if lot.writing {
            return None;
        }
        lot.writing = true;
        let count = lot.unwritten.min(PREWRITE_BYTES >> bits);
        Some(Prewrite {
            file: FileId::IMAGE,
            offset: HostOffset((lot.first + lot.count - lot.unwritten) << bits),
            len: count << bits,
        })
    }

    /// Zeros were written, or could not be: then no more are.
    pub(super) fn end_prewrite(&self, st: &mut State, prewrite: &Prewrite, ok: bool) {
        let bits = self.geometry.cluster_bits;
        let Some(lot) = st.ahead.lots.iter_mut().find(|lot| lot.writing) else {
            return;
        };
        lot.writing = false;
        lot.unwritten = lot.unwritten.saturating_sub(prewrite.len >> bits);
        if !ok {
            // They are zeros all the same.
            st.ahead.prewrites = false;
            for lot in &mut st.ahead.lots {
                lot.unwritten = 0;
            }
        }
        if st.ahead.wants_zeros() {
            self.ahead.store(true, Ordering::Relaxed);
        }
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
