//! What a flush writes, and in which order.
//!
//! ```text
//!   ── barrier ──  the guest's data, and the end of the file           (only if something must precede its reference)
//!   entries of L2 tables, entries of the L1 table
//!   ── barrier ──
//! ```
//!
//! Why a crash anywhere leaves no error, only leaks, without the need-check bit:
//!
//! * An L2 entry that refers to a new cluster got there by a commit, so the guest's data and the fill around it were
//!   written before the run's moment under the lock. The first barrier makes them durable, and with them the end of the
//!   file, before which an entry must point.
//! * A new L2 table takes clusters that read as zeros. After the first barrier they do so durably, so an L1 entry and the
//!   entries of its table may become durable in any order: an entry that is not there yet reads as unallocated, as before.
//! * Each entry by itself is right before and after, and 512 bytes are written whole or not at all.
//! * A table's copy (VMDK's redundant grain tables) is written with it, in the same stage: both refer to what is durable
//!   by then, so that either serves whatever of the other was written; and the next change of the table writes both.
//!
//! The first barrier is left out when all that is newly referred to was in the file durably, as zeros, when it was
//! allocated (`Space::durable`), and the guest read zeros there before: whichever of data and entry survive, it reads zeros or
//! what it wrote. With space reserved ahead of need this is so for all writes of an image without a backing file.
//!
//! A run that failed part of the way may have made any part of it durable. All it covered is dirty again, and
//! written again in the same order.

use super::map::OVERLAP;
use super::state::{Covered, State};
use super::{Appended, Around};
use crate::FlushRun;
use crate::metadata::cache::{Changed, Owner};
use crate::metadata::{FRESH, FRESH_ZEROED, extend};
use block::{Error, ErrorKind, Result};
use std::sync::atomic::Ordering;

/// Bytes of the writes of the L1 table.
const SECTOR: u64 = 512;

impl State {
    pub(super) fn is_dirty(&self) -> bool {
        self.cache.is_dirty() || self.l1_changed.any()
    }
}

impl Appended {
    /// Appends entries as the file has them. They are whole sectors of it.
    fn push(&self, run: &mut FlushRun, host: u64, words: impl Iterator<Item = u64>) {
        let start = run.bytes.len();
        for word in words {
            self.form.encode(word, &mut run.bytes);
        }
        extend(run, self.file, host, start);
    }

    fn push_granules(&self, run: &mut FlushRun, changed: &Changed, base: u64) {
        let bits = self.layout.granule_bits();
        let words = self.tables.words(changed.frame);
        let per_granule = 1usize << (bits - 3);
        // An entry as it goes to disk: without our mark. In a file that has the bit itself nothing changes any more.
        let plain = |raw: u64| match self.is_marked(raw) {
            true => raw & !OVERLAP,
            false => raw,
        };
        for granule in 0..64usize {
            if changed.granules >> granule & 1 == 0 {
                continue;
            }
            let first = granule * per_granule;
            let part = words.get(first..first + per_granule).unwrap_or_default();
            let host = base + (((granule as u64) << bits) >> self.form.shift());
            self.push(
                run,
                host,
                part.iter().map(|w| plain(w.load(Ordering::Relaxed))),
            );
        }
    }

    /// Appends what is dirty to the stage of `run` that is being built. Returns whether a barrier must come before it:
    /// what was written so far, and the file's end, must be durable first.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] after a flush that was never ended.
    pub(crate) fn begin_flush(&self, run: &mut FlushRun) -> Result<bool> {
        let st = &mut *self.lock();
        if st.covered.running {
            // The thread that carried it out is gone, and what it wrote nobody knows: the file stays as a crash leaves it.
            let text = format!("{}: a flush was cut off", self.name);
            return Err(Error::new(ErrorKind::Io, text));
        }
        st.covered = Covered {
            running: true,
            tables: st.fresh_tables.len(),
            end: st.space.end,
            ordered: std::mem::take(&mut st.ordered),
        };
        let mut changed = std::mem::take(&mut st.scratch);
        changed.clear();
        st.cache.take_changed(true, |c| changed.push(c));
        changed.sort_unstable_by_key(|c| c.host);
        for c in &changed {
            self.push_granules(run, c, c.host);
        }
        for c in changed.iter().filter(|_| !self.copies.is_empty()) {
            if let Some(host) = self.copy_of(c) {
                self.push_granules(run, c, host);
            }
        }
        st.scratch = changed;
        st.l1_changed.take(|sector| self.push_l1(run, sector));
        Ok(st.covered.ordered)
    }

    /// Appends a sector of the L1 table, with what else is in it.
    fn push_l1(&self, run: &mut FlushRun, sector: usize) {
        let start = run.bytes.len();
        let Around { before, behind } = &self.l1_around;
        let entries = self.tables.l1.get(..self.l1_entries).unwrap_or_default();
        let put = |bytes: &[u8], at: usize, out: &mut Vec<u8>| {
            let bytes = bytes.get(at * 8..at * 8 + 8);
            out.extend_from_slice(bytes.unwrap_or(&[0; 8]));
        };
        for place in sector * 64..sector * 64 + 64 {
            match place.checked_sub(before.len() / 8) {
                None => put(before, place, &mut run.bytes),
                Some(index) => match entries.get(index) {
                    Some(entry) => {
                        let raw = entry.load(Ordering::Relaxed);
                        self.form
                            .encode(raw & !(FRESH | FRESH_ZEROED), &mut run.bytes);
                    }
                    None => put(behind, index - entries.len(), &mut run.bytes),
                },
            }
        }
        let first = self.l1_offset - before.len() as u64;
        extend(run, self.file, first + sector as u64 * SECTOR, start);
    }

    /// Notes a change of L1 entry `index`.
    pub(super) fn mark_l1(&self, st: &mut State, index: usize) {
        st.l1_changed
            .mark_entry(self.l1_around.before.len() / 8 + index);
    }

    /// Where the copy of a changed slice is, in formats that have copies.
    fn copy_of(&self, changed: &Changed) -> Option<u64> {
        let Owner::L2(slice) = changed.owner else {
            return None;
        };
        let per_table = self.layout.slices_per_table_bits();
        let copy = *self.copies.get((slice >> per_table) as usize)?;
        let within = (slice & ((1 << per_table) - 1)) << self.layout.slice_bits;
        (copy != 0).then(|| copy + (within >> self.form.shift()))
    }

    /// Ends the flush that [`begin_flush`](Self::begin_flush) began: what it covered is durable, or dirty again.
    pub(crate) fn end_flush(&self, ok: bool) {
        let st = &mut *self.lock();
        let covered = std::mem::take(&mut st.covered);
        if !covered.running {
            return;
        }
        st.cache.end_flush(ok);
        st.l1_changed.end(ok);
        if !ok {
            st.ordered |= covered.ordered;
            return;
        }
        st.space.durable = st.space.durable.max(covered.end);
        for index in st.fresh_tables.drain(..covered.tables) {
            if let Some(entry) = self.tables.l1.get(index as usize) {
                entry.fetch_and(!(FRESH | FRESH_ZEROED), Ordering::AcqRel);
            }
        }
    }
}
