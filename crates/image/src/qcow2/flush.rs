//! What a flush writes, and in which order.
//!
//! ```text
//!   bitmaps   their marks (see `bitmap::track`)                                 (only once)
//!   ── barrier ──
//!   header    the dirty bit (see `lazy`)                                       (only once, if refcounts are postponed)
//!   ── barrier ──
//!   stage 0   refcount blocks that the table on disk does not know yet        (only if any)
//!   ── barrier ──
//!   stage 1   refcounts, refcount table, L2 tables that the L1 table on disk does not know yet (new ones,
//!             and copies of those that snapshots share)
//!   ── barrier ──
//!   header    where the refcount table is                                     (only if it moved)
//!   ── barrier ──
//!   stage 2   entries of L2 tables, entries of the L1 table
//!   ── barrier ──
//! ```
//!
//! Why a crash anywhere leaves no error, only leaks:
//!
//! * All bytes come from one moment under the lock ([`crate::Image::flush_begin`]). An L2 entry
//!   that refers to a new cluster got there by a commit, so the guest's data and the fill around it were
//!   written before that moment, and the first barrier makes them durable. Entries that are committed
//!   later are not in the run, however long it takes.
//! * Nothing on disk refers to what stages 0 and 1 write but what was there before: raised
//!   refcounts of new clusters are leaks until stage 2; a new refcount block is complete before the
//!   table refers to it; a new table is complete before the header does; a new L2 table is
//!   complete before the L1 table does.
//! * Lowered refcounts in stage 1 are of clusters whose last reference went away in an *earlier* flush
//!   that succeeded: `State::derefs` are applied when a flush ends.
//! * Stage 2 changes sectors of 512 bytes, each of them whole or not at all, and each entry by itself
//!   is right before and after: what it refers to is durable and counted. An L1 entry and the
//!   entries of its new table became durable in the other order.
//! * A freed cluster is given out again only after its dereference is durable, so no old entry can show
//!   a new owner's bytes.
//!
//! Without anything newly referred to (`State::ordered`) stages 1 and 2 are independent, and share one barrier.
//! So they are when all that is newly referred to was counted ahead (see `ahead`): it is counted durably, and until
//! the guest's data or the entries of a new table are durable, zeros are in their place, which is what the guest read
//! there before.
//!
//! A run that failed part of the way may have made any part of it durable. All it covered is dirty
//! again, and written again in the same order; but since the L1 table on disk may
//! refer to new L2 tables by then, these wait for the refcounts once.

use super::Qcow2;
use super::cache::{Changed, Owner};
use super::entry::{FRESH, FRESH_ZEROED, OFFSET_MASK, OVERLAP, SECTOR};
use super::lazy::DirtyBit;
use super::state::{Covered, State};
pub(super) use crate::metadata::extend;
use crate::metadata::open_stage;
use crate::{FileId, FlushRun};
use block::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicU64, Ordering};

/// A table's entry as it goes to disk: without our marks.
fn table_entry(raw: u64) -> u64 {
    raw & !(FRESH | FRESH_ZEROED)
}

/// An L2 entry as it goes to disk; of extended entries, its first word.
fn l2_entry(raw: u64) -> u64 {
    // Compressed entries have bit 62 and are never marked.
    if raw & (1 << 62) == 0 && raw & OVERLAP == OVERLAP {
        raw & !OVERLAP
    } else {
        raw
    }
}

/// Appends a write to the stage being built, growing the last one where they touch.
fn push(run: &mut FlushRun, host: u64, words: impl Iterator<Item = u64>) {
    let start = run.bytes.len();
    for word in words {
        run.bytes.extend_from_slice(&word.to_be_bytes());
    }
    extend(run, FileId::IMAGE, host, start);
}

impl Qcow2 {
    fn is_fresh(&self, st: &State, owner: Owner) -> bool {
        let bits = self.geometry.slices_per_table_bits();
        match owner {
            Owner::L2(slice) => {
                let entry = self.tables.l1.get((slice >> bits) as usize);
                entry.is_some_and(|e| e.load(Ordering::Relaxed) & FRESH != 0)
            }
            Owner::Ref(slice) => {
                let entry = st.refs.entries.get((slice >> bits) as usize);
                entry.is_some_and(|e| e & FRESH != 0)
            }
        }
    }

    fn push_granules(&self, run: &mut FlushRun, changed: &Changed) {
        let bits = self.geometry.granule_bits();
        let words = self.tables.words(changed.frame);
        let per_granule = 1usize << (bits - 3);
        for granule in 0..64usize {
            if changed.granules >> granule & 1 == 0 {
                continue;
            }
            let first = granule * per_granule;
            let part = words.get(first..first + per_granule).unwrap_or_default();
            let load = |w: &AtomicU64| w.load(Ordering::Relaxed);
            let host = changed.host + ((granule as u64) << bits);
            match changed.owner {
                Owner::L2(_) => {
                    let second = self.geometry.entry_word_bits() as usize;
                    let words = part.iter().map(load).enumerate();
                    let words = words.map(|(at, raw)| match at & second {
                        0 => l2_entry(raw),
                        _ => raw,
                    });
                    push(run, host, words);
                }
                Owner::Ref(_) => push(run, host, part.iter().map(load)),
            }
        }
    }

    /// Pushes a block or table that was never written: all of it, or what is
    /// not zeros when its cluster reads as zeros. `owner` makes the owner of its n-th slice.
    fn push_fresh(
        &self,
        st: &State,
        run: &mut FlushRun,
        raw: u64,
        changed: &[Changed],
        owner: impl Fn(u64) -> Owner,
    ) {
        let g = &self.geometry;
        let base = raw & OFFSET_MASK;
        if raw & FRESH_ZEROED != 0 {
            let first = changed.partition_point(|c| c.host < base);
            for c in changed.iter().skip(first) {
                if c.host >= base + g.cluster() {
                    break;
                }
                self.push_granules(run, c);
            }
            return;
        }
        for n in 0..1u64 << g.slices_per_table_bits() {
            let host = base + (n << g.slice_bits);
            match st.cache.find(&self.tables, owner(n)) {
                Some(frame) => {
                    let words = self.tables.words(frame);
                    push(run, host, words.iter().map(|w| w.load(Ordering::Relaxed)));
                }
                None => push(run, host, std::iter::repeat_n(0, g.slice_words())),
            }
        }
    }

    pub(super) fn begin_flush(&self, st: &mut State, run: &mut FlushRun) -> Result<()> {
        run.clear();
        if st.covered.running {
            // The thread that carried it out is gone, and what it wrote nobody knows: the file stays as a crash leaves it.
            let text = format!("{}: a flush was cut off", self.name);
            return Err(Error::new(ErrorKind::Io, text));
        }
        if !st.lazy.closing {
            self.count_ahead(st);
        }
        let mut changed = std::mem::take(&mut st.scratch);
        changed.clear();
        let refcounts = st.writes_refcounts();
        let moved = refcounts && std::mem::take(&mut st.refs.moved);
        st.covered = Covered {
            running: true,
            tables: st.fresh_tables.len(),
            blocks: if refcounts { st.refs.fresh.len() } else { 0 },
            derefs: st.derefs.len(),
            moved: moved.then_some((st.refs.first, st.refs.clusters)),
            refcounts,
            ordered: st.ordered,
            marks: false,
            bitmaps: self.bitmaps.as_ref().is_some_and(|b| b.wanted()),
        };
        if st.covered.bitmaps
            && let Some(bitmaps) = &self.bitmaps
        {
            for (host, sector) in bitmaps.sectors() {
                let start = run.bytes.len();
                run.bytes.extend_from_slice(sector);
                extend(run, FileId::IMAGE, host, start);
            }
            run.seal();
        }
        self.push_dirty_bit(st, run, refcounts);
        st.cache.take_changed(refcounts, |c| changed.push(c));
        changed.sort_unstable_by_key(|c| c.host);
        let bits = self.geometry.slices_per_table_bits();

        for &block in st.refs.fresh.get(..st.covered.blocks).unwrap_or_default() {
            let raw = st.refs.entries.get(block as usize).copied().unwrap_or(0);
            self.push_fresh(st, run, raw, &changed, |n| {
                Owner::Ref((u64::from(block) << bits) + n)
            });
        }
        if open_stage(run) {
            run.seal();
        }

        for c in &changed {
            if matches!(c.owner, Owner::Ref(_)) && !self.is_fresh(st, c.owner) {
                self.push_granules(run, c);
            }
        }
        if refcounts {
            self.push_table(st, run);
        }
        if st.failed && (open_stage(run) || st.ordered) {
            // The L1 table on disk may know the new tables already: refcounts and data before them.
            run.seal();
        }
        for &index in &st.fresh_tables {
            let entry = self.tables.l1.get(index as usize);
            let raw = entry.map_or(0, |e| e.load(Ordering::Relaxed));
            self.push_fresh(st, run, raw, &changed, |n| {
                Owner::L2((u64::from(index) << bits) + n)
            });
        }
        self.push_copies(st, run);
        if let Some(table) = st.covered.moved {
            run.seal();
            let start = run.bytes.len();
            let sector = self.header_sector(st, table);
            run.bytes.extend_from_slice(&sector);
            extend(run, FileId::IMAGE, 0, start);
            run.seal();
        } else if st.ordered && (open_stage(run) || run.stages.is_empty()) {
            run.seal();
        }
        st.ordered = false;

        for c in &changed {
            if matches!(c.owner, Owner::L2(_)) && !self.is_fresh(st, c.owner) {
                self.push_granules(run, c);
            }
        }
        let l1 = &self.tables.l1;
        st.l1_changed.take(|sector| {
            let part = l1.get(sector * 64..sector * 64 + 64).unwrap_or_default();
            let host = self.header.l1_table_offset + sector as u64 * SECTOR;
            let words = part.iter().map(|w| w.load(Ordering::Relaxed));
            push(run, host, words.map(table_entry));
        });
        st.covered.marks = self.mark_wanted();
        if st.covered.marks && st.covered.moved.is_none() {
            let start = run.bytes.len();
            let sector = self.header_sector(st, st.refs.known);
            run.bytes.extend_from_slice(&sector);
            extend(run, FileId::IMAGE, 0, start);
        }
        if open_stage(run) || run.stages.is_empty() {
            run.seal();
        }
        st.scratch = changed;
        Ok(())
    }

    /// Pushes changed sectors of the refcount table; all of it when it moved.
    fn push_table(&self, st: &mut State, run: &mut FlushRun) {
        let base = st.refs.first << self.geometry.cluster_bits;
        let entries = &st.refs.entries;
        if st.covered.moved.is_some() {
            st.refs.changed.take(|_| {});
            push(run, base, entries.iter().copied().map(table_entry));
            return;
        }
        st.refs.changed.take(|sector| {
            let part = entries.get(sector * 64..sector * 64 + 64);
            let part = part.unwrap_or_default().iter().copied();
            push(run, base + sector as u64 * SECTOR, part.map(table_entry));
        });
    }

    /// The first sector of the file, with the refcount table at `first` for so many clusters, and with the
    /// feature bits that were set since the image was opened.
    pub(super) fn header_sector(
        &self,
        st: &State,
        (first, clusters): (u64, u64),
    ) -> [u8; SECTOR as usize] {
        let mut sector = self.first_sector;
        let offset = first << self.geometry.cluster_bits;
        // At most 8 MiB of clusters.
        let clusters = clusters as u32;
        let fields = offset
            .to_be_bytes()
            .into_iter()
            .chain(clusters.to_be_bytes());
        for (to, from) in sector.iter_mut().skip(48).zip(fields) {
            *to = from;
        }
        let marks = self.mark() | st.lazy.mark();
        for (to, bits) in sector.iter_mut().skip(72).zip(marks.to_be_bytes()) {
            *to |= bits;
        }
        sector
    }

    pub(super) fn finish_flush(&self, st: &mut State, ok: bool) {
        let covered = std::mem::take(&mut st.covered);
        if !covered.running {
            return;
        }
        st.cache.end_flush(ok);
        st.l1_changed.end(ok);
        st.refs.changed.end(ok);
        st.failed = !ok;
        self.copies_flushed(st, ok);
        if !ok {
            st.ordered |= covered.ordered;
            st.refs.moved |= covered.moved.is_some();
            return;
        }
        if let Some(table) = covered.moved {
            st.refs.known = table;
        }
        if covered.refcounts {
            st.lazy.pressed = false;
        }
        if st.lazy.bit == DirtyBit::Begun {
            st.lazy.bit = DirtyBit::Set;
        }
        if covered.marks {
            self.marked();
        }
        if covered.bitmaps
            && let Some(bitmaps) = &self.bitmaps
        {
            bitmaps.marked();
        }
        for index in st.fresh_tables.drain(..covered.tables) {
            if let Some(entry) = self.tables.l1.get(index as usize) {
                entry.fetch_and(!(FRESH | FRESH_ZEROED), Ordering::AcqRel);
            }
        }
        for block in st.refs.fresh.drain(..covered.blocks) {
            if let Some(entry) = st.refs.entries.get_mut(block as usize) {
                *entry &= !(FRESH | FRESH_ZEROED);
            }
        }
        st.ahead.flushed();
        self.apply_derefs(st, covered.derefs);
    }

    pub(super) fn has_dirty(&self, st: &State) -> bool {
        self.has_changes(st, st.writes_refcounts())
            || self.mark_wanted()
            || self.bitmaps.as_ref().is_some_and(|b| b.wanted())
    }

    /// Whether tables changed, or `refcounts`.
    pub(super) fn has_changes(&self, st: &State, refcounts: bool) -> bool {
        st.cache.tables_dirty()
            || st.l1_changed.any()
            || !st.fresh_tables.is_empty()
            || !st.derefs.is_empty()
            || refcounts
                && (st.cache.is_dirty()
                    || st.refs.changed.any()
                    || st.refs.moved
                    || !st.refs.fresh.is_empty())
    }
}
