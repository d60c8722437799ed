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
//!
//! The first barrier is left out when all that is newly referred to was in the file durably, as zeros, when it was
//! allocated (`Space::durable`), and the guest read zeros there before: whichever of data and entry survive, it reads zeros or
//! what it wrote. With space reserved ahead of need this is so for all writes of an image without a backing file.
//!
//! A run that failed part of the way may have made any part of it durable. All it covered is dirty again, and
//! written again in the same order.

use super::Qed;
use super::map::OVERLAP;
use super::state::{Covered, State};
use crate::FlushRun;
use crate::metadata::cache::Changed;
use crate::metadata::{FRESH, FRESH_ZEROED, extend, open_stage};
use block::{Error, ErrorKind, Result};
use std::sync::atomic::Ordering;

/// Bytes of the writes of the L1 table.
const SECTOR: u64 = 512;

fn push(run: &mut FlushRun, host: u64, words: impl Iterator<Item = u64>) {
    let start = run.bytes.len();
    for word in words {
        run.bytes.extend_from_slice(&word.to_le_bytes());
    }
    extend(run, host, start);
}

impl State {
    pub(super) fn is_dirty(&self) -> bool {
        self.cache.is_dirty() || self.l1_changed.any()
    }
}

impl Qed {
    fn push_granules(&self, st: &State, run: &mut FlushRun, changed: &Changed) {
        let bits = self.layout.granule_bits();
        let words = self.tables.words(changed.frame);
        let per_granule = 1usize << (bits - 3);
        // An entry as it goes to disk: without our mark.
        let plain = |raw: u64| {
            let host = raw & !OVERLAP;
            let marked = raw & OVERLAP != 0 && st.places.holds(host >> self.layout.cluster_bits);
            if marked { host } else { raw }
        };
        for granule in 0..64usize {
            if changed.granules >> granule & 1 == 0 {
                continue;
            }
            let first = granule * per_granule;
            let part = words.get(first..first + per_granule).unwrap_or_default();
            let host = changed.host + ((granule as u64) << bits);
            push(
                run,
                host,
                part.iter().map(|w| plain(w.load(Ordering::Relaxed))),
            );
        }
    }

    pub(super) fn begin_flush(&self, st: &mut State, run: &mut FlushRun) -> Result<()> {
        run.clear();
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
        if st.covered.ordered {
            run.seal();
        }
        let mut changed = std::mem::take(&mut st.scratch);
        changed.clear();
        st.cache.take_changed(true, |c| changed.push(c));
        changed.sort_unstable_by_key(|c| c.host);
        for c in &changed {
            self.push_granules(st, run, c);
        }
        st.scratch = changed;
        let l1 = &self.tables.l1;
        st.l1_changed.take(|sector| {
            let part = l1.get(sector * 64..sector * 64 + 64).unwrap_or_default();
            let host = self.header.l1_table_offset + sector as u64 * SECTOR;
            let words = part.iter().map(|w| w.load(Ordering::Relaxed));
            push(run, host, words.map(|raw| raw & !(FRESH | FRESH_ZEROED)));
        });
        if open_stage(run) || run.stages.is_empty() {
            run.seal();
        }
        Ok(())
    }

    pub(super) fn finish_flush(&self, st: &mut State, ok: bool) {
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
