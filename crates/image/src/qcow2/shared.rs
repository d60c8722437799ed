//! L2 tables that internal snapshots share: they are copied before an entry of them changes.
//!
//! ```text
//!   ask ──▶ a cluster for the copy, counted ──▶ load of the table ──▶ L1 entry points at the copy, COPIED
//!                                                                     flush: copy, refcount ─ barrier ─ L1 entry
//! ```
//!
//! What the entries refer to is shared as before, by the copy instead of the table: no other refcount
//! changes. Until a flush has written the copy, slices of it that are not in memory are read from the table
//! that it is a copy of, which a snapshot keeps as it is. Clusters of data are copied by the ordinary
//! plan for a write into a cluster without COPIED.

use super::Qcow2;
use super::cache::KEY_COPY;
use super::entry::{COPIED, OFFSET_MASK};
use super::flush::extend;
use super::state::{Ask, Deref, Halt, State};
use crate::{FileId, FlushRun, Key, Load, Need};
use block::{Error, Result};
use std::sync::atomic::Ordering;

/// Copies that may wait for a flush, and bytes of them (but one copy at least).
const COPIES_MAX: usize = 64;
const COPIES_BYTES_MAX: u64 = 4 << 20;

/// A copy of an L2 table, from its load until it is on disk.
#[derive(Debug)]
struct Copy {
    /// Index of its L1 entry.
    l1: usize,
    /// Host offset of the table that it is a copy of.
    from: u64,
    /// Its host cluster, and the pinned frame with the refcount while the load is under way.
    to: u64,
    frame: u32,
    /// The table's bytes, once loaded.
    bytes: Option<Vec<u8>>,
    /// The flush under way writes it.
    flight: bool,
}

/// The copies that are not on disk yet.
#[derive(Debug, Default)]
pub(super) struct Copies(Vec<Copy>);

impl Copies {
    fn full(&self, cluster: u64) -> bool {
        let most = (COPIES_BYTES_MAX / cluster).max(1);
        self.0.len() >= COPIES_MAX.min(usize::try_from(most).unwrap_or(COPIES_MAX))
    }

    /// Whether a flush should begin before there is no room.
    pub(super) fn filling(&self) -> bool {
        self.0.len() >= COPIES_MAX / 2
    }

    fn loading(&mut self, l1: u64) -> Option<usize> {
        let found = |c: &Copy| c.l1 as u64 == l1 && c.bytes.is_none();
        self.0.iter().position(found)
    }

    /// Where the table of L1 entry `l1`, whose place is `table`, can be read from.
    pub(super) fn source(&self, l1: usize, table: u64) -> u64 {
        let found = |c: &&Copy| c.l1 == l1 && c.bytes.is_some();
        self.0.iter().find(found).map_or(table, |copy| copy.from)
    }
}

fn key(l1: usize) -> Key {
    // At most 4 Mi L1 entries.
    Key(KEY_COPY | l1 as u64)
}

/// The L1 index of a load that `key` made.
pub(super) fn copy_of_key(key: Key) -> Option<u64> {
    (key.0 & !0 << 60 == KEY_COPY).then_some(key.0 & !(!0 << 60))
}

impl Qcow2 {
    /// Sees to it that the L2 table of L1 entry `index` may be written in place.
    pub(super) fn own_table(&self, st: &mut State, index: usize, raw: u64) -> Ask<()> {
        if raw & COPIED != 0 {
            return Ok(());
        }
        let offset = raw & OFFSET_MASK;
        match self.refcount_of(st, offset >> self.geometry.cluster_bits)? {
            0 => Err(Halt::Fail(Error::corrupt(format!(
                "{}: L2 table at {offset:#x} is in use, but its refcount is 0: run diskplane check",
                self.name
            )))),
            1 => {
                if let Some(entry) = self.tables.l1.get(index) {
                    entry.store(raw | COPIED, Ordering::Release);
                    st.l1_changed.mark_entry(index);
                }
                Ok(())
            }
            _ => self.copy_table(st, index, offset),
        }
    }

    /// Begins to copy the table at `from`. Always halts.
    fn copy_table(&self, st: &mut State, index: usize, from: u64) -> Ask<()> {
        let g = &self.geometry;
        if st.copies.loading(index as u64).is_some() {
            return Err(Halt::Wait(key(index)));
        }
        if st.copies.full(g.cluster()) {
            let ready = st.copies.0.iter().any(|copy| copy.bytes.is_some());
            return Err(match st.copies.0.first() {
                Some(copy) if !ready => Halt::Wait(key(copy.l1)),
                _ => Halt::Need(Need::Commit),
            });
        }
        let old = self.table_at(from);
        let frame = self.ref_frame(st, old.first)?;
        st.cache.pin(frame);
        let piece = match self.alloc_meta(st) {
            Ok(piece) => piece,
            Err(halt) => {
                self.unpin_old(st, old);
                return Err(halt);
            }
        };
        st.cache.pin(piece.frame);
        st.copies.0.push(Copy {
            l1: index,
            from,
            to: piece.first,
            frame: piece.frame,
            bytes: None,
            flight: false,
        });
        Err(Halt::Need(Need::Load(Load {
            key: key(index),
            file: crate::FileId::IMAGE,
            offset: block::HostOffset(from),
            // At most 2 MiB.
            len: g.cluster() as u32,
        })))
    }

    fn table_at(&self, offset: u64) -> Deref {
        Deref {
            first: offset >> self.geometry.cluster_bits,
            count: 1,
        }
    }

    /// Takes the bytes of a table in that is copied: the L1 entry is the copy's from here on.
    pub(super) fn end_copy(&self, st: &mut State, l1: u64, bytes: &[u8]) -> Result<()> {
        let g = &self.geometry;
        let Some(at) = st.copies.loading(l1) else {
            return Err(Error::invalid(format!(
                "{}: a load nobody asked for",
                self.name
            )));
        };
        let mut bytes = bytes.to_vec();
        let stale = unflag(&mut bytes, 1 << g.entry_word_bits());
        let Some(copy) = st.copies.0.get_mut(at) else {
            return Ok(());
        };
        copy.bytes = Some(bytes);
        let (index, from, to, frame) = (copy.l1, copy.from, copy.to, copy.frame);
        let to = to << g.cluster_bits;
        let slices = 1u64 << g.slices_per_table_bits();
        let first = (l1 << g.slices_per_table_bits())..;
        for (slice, n) in first.zip(0..slices) {
            let host = to + (n << g.slice_bits);
            st.cache.rehome(&self.tables, slice, host, stale);
        }
        if let Some(entry) = self.tables.l1.get(index) {
            entry.store(to | COPIED, Ordering::Release);
            st.l1_changed.mark_entry(index);
        }
        st.ordered = true;
        self.dereference(st, self.table_at(from));
        st.cache.unpin(frame);
        if st.flush_soon() {
            self.ahead.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The table to copy could not be read.
    pub(super) fn cancel_copy(&self, st: &mut State, l1: u64) {
        let Some(at) = st.copies.loading(l1) else {
            return;
        };
        let copy = st.copies.0.swap_remove(at);
        self.unpin_old(st, self.table_at(copy.from));
        self.set_refcount(st, copy.frame, copy.to, 0);
        st.places.blocks.remove(&copy.to);
        st.space.add(super::alloc::Run {
            first: copy.to,
            count: 1,
            zeroed: false,
        });
        st.cache.unpin(copy.frame);
    }

    /// The L2 entries of a slice read from `host`: without COPIED flags where the table has been copied
    /// from there. Returns where the slice belongs.
    pub(super) fn home_of(&self, slice: u64, host: u64, words: &mut [u64]) -> u64 {
        let g = &self.geometry;
        let bits = g.slices_per_table_bits();
        // At most 4 Mi.
        let entry = self.tables.l1.get((slice >> bits) as usize);
        let table = entry.map_or(0, |e| e.load(Ordering::Acquire)) & OFFSET_MASK;
        let home = table + ((slice & ((1 << bits) - 1)) << g.slice_bits);
        if home != host {
            for raw in words.iter_mut().step_by(1 << g.entry_word_bits()) {
                *raw &= !COPIED;
            }
        }
        home
    }

    /// Writes copies that are not on disk yet, in the stage that L2 tables are written in which the L1 table on
    /// disk does not know yet.
    pub(super) fn push_copies(&self, st: &mut State, run: &mut FlushRun) {
        for copy in &mut st.copies.0 {
            let Some(bytes) = &copy.bytes else { continue };
            copy.flight = true;
            let start = run.bytes.len();
            run.bytes.extend_from_slice(bytes);
            extend(
                run,
                FileId::IMAGE,
                copy.to << self.geometry.cluster_bits,
                start,
            );
        }
    }

    /// Ends the flush that wrote copies.
    pub(super) fn copies_flushed(&self, st: &mut State, ok: bool) {
        st.copies.0.retain_mut(|copy| {
            let durable = ok && copy.flight;
            copy.flight = false;
            !durable
        });
    }
}

/// Takes COPIED flags off the L2 entries in `bytes`, whose first words are `step` words apart. None are
/// there unless something is wrong; says whether there were.
fn unflag(bytes: &mut [u8], step: usize) -> bool {
    let mut stale = false;
    for word in bytes.chunks_exact_mut(8 * step) {
        if let Some(byte) = word.first_mut() {
            // The flag is the highest bit of the big-endian word.
            stale |= *byte & 0x80 != 0;
            *byte &= 0x7f;
        }
    }
    stale
}
