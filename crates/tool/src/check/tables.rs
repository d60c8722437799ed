//! L2 tables: collected, sorted, read in long runs, judged.

use super::counts::Role;
use super::tally::{Fact, Severity};
use super::walk::Walk;
use block::Result;
use image::qcow2::check::{Fault, Target};
use std::ops::Range;

/// Tables that are collected before they are read: 1 MiB of them.
const TABLES_MAX: usize = 1 << 16;
/// Bytes that one read fetches at most.
const RUN_BYTES: u64 = 1 << 20;
/// What lies between two tables is read along if it is this short.
const GAP_BYTES: u64 = 64 << 10;

/// An L2 table, and how many L1 entries refer to it.
#[derive(Clone, Copy, Debug)]
struct Table {
    offset: u64,
    /// Of an active one the L1 entry, or the first of them.
    index: Option<u64>,
    active: u32,
    others: u32,
}

/// The L2 tables to read next. A table that many L1 tables share is read once.
#[derive(Debug)]
pub struct Tables {
    list: Vec<Table>,
    buffer: Vec<u8>,
}

impl Tables {
    /// None yet. Allocates the buffer for runs of tables of `cluster` bytes.
    pub fn new(cluster: u64) -> Self {
        Self {
            list: Vec::new(),
            buffer: vec![0; RUN_BYTES.max(cluster) as usize],
        }
    }

    /// Adds the table at `offset`; `active`: of the active L1 table, by the entry of that number.
    pub fn push(&mut self, offset: u64, active: Option<u64>, weight: u32) {
        self.list.push(Table {
            offset,
            index: active,
            active: if active.is_some() { weight } else { 0 },
            others: if active.is_some() { 0 } else { weight },
        });
    }

    /// Whether [`Tables::work_off`] has to make room.
    pub fn is_full(&self) -> bool {
        self.list.len() >= TABLES_MAX
    }

    fn merge(&mut self) {
        self.list.sort_unstable_by_key(|table| table.offset);
        self.list.dedup_by(|next, kept| {
            let same = next.offset == kept.offset;
            if same {
                kept.index = kept.index.or(next.index);
                kept.active = kept.active.saturating_add(next.active);
                kept.others = kept.others.saturating_add(next.others);
            }
            same
        });
    }

    /// Makes room: by merging, and if that does not help by reading and judging all.
    pub fn work_off(&mut self, walk: &mut Walk) -> Result<()> {
        self.merge();
        if self.list.len() > TABLES_MAX / 4 * 3 {
            self.judge(walk)?;
        }
        Ok(())
    }

    /// Reads and judges what is left.
    pub fn finish(mut self, walk: &mut Walk) -> Result<()> {
        self.merge();
        self.judge(walk)
    }

    fn judge(&mut self, walk: &mut Walk) -> Result<()> {
        let cluster = walk.image.layout.cluster();
        let mut rest = self.list.as_slice();
        while let (Some(first), false) = (rest.first(), walk.counts.full()) {
            let start = first.offset;
            let mut end = start + cluster;
            let longer = |table: &&Table| {
                let next = table.offset + cluster;
                let fits = next - start <= self.buffer.len() as u64
                    && table.offset <= end.saturating_add(GAP_BYTES);
                if fits {
                    end = next;
                }
                fits
            };
            let count = rest.iter().take_while(longer).count().max(1);
            let (run, after) = rest.split_at(count);
            rest = after;
            // What reads as zeros has no entries.
            if walk.source.is_hole(start, end - start) {
                continue;
            }
            let Some(bytes) = self.buffer.get_mut(..(end - start) as usize) else {
                continue;
            };
            walk.source.read(start, bytes)?;
            for table in run {
                let at = (table.offset - start) as usize;
                if let Some(bytes) = bytes.get_mut(at..at + cluster as usize) {
                    walk.l2_table(table, bytes)?;
                }
            }
        }
        self.list.clear();
        Ok(())
    }
}

/// Which sectors of a table were changed, and how many entries.
#[derive(Debug)]
pub struct Changed {
    sectors: Vec<u64>,
    entries: u64,
    len: usize,
}

impl Changed {
    /// None, of `len` bytes.
    pub fn new(len: usize) -> Self {
        Self {
            sectors: Vec::new(),
            entries: 0,
            len,
        }
    }

    /// The entry at byte `at` was changed.
    pub fn mark(&mut self, at: usize) {
        self.entries += 1;
        let sector = at / 512;
        if self.sectors.is_empty() {
            self.sectors = vec![0; self.len.div_ceil(512).div_ceil(64)];
        }
        if let Some(word) = self.sectors.get_mut(sector / 64) {
            *word |= 1 << (sector % 64);
        }
    }

    /// Whether any was.
    pub fn any(&self) -> bool {
        self.entries > 0
    }

    /// How many entries were.
    pub fn count(&self) -> u64 {
        self.entries
    }

    /// Bytes of runs of changed sectors.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let sectors = self.len.div_ceil(512);
        let has = |s: usize| {
            self.sectors
                .get(s / 64)
                .is_some_and(|w| w >> (s % 64) & 1 == 1)
        };
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = (at..sectors).find(|s| has(*s))?;
            at = (start..sectors).find(|s| !has(*s)).unwrap_or(sectors);
            Some(start * 512..(at * 512).min(self.len))
        })
    }
}

impl Walk<'_> {
    fn l2_table(&mut self, table: &Table, bytes: &mut [u8]) -> Result<()> {
        let image = self.image;
        let layout = image.layout;
        let step = layout.entry_words() * 8;
        let active = u64::from(table.active);
        let weight = active + u64::from(table.others);
        let mut changed = Changed::new(bytes.len());
        // A table in the header's cluster is none, and one whose own refcount cannot be had is not
        // to be trusted: their flags mean nothing.
        let own = table.offset >> layout.cluster_bits;
        let flags = active > 0 && table.offset != 0 && !self.is_lost(own);
        // The number of its first cluster on the disk; that of a snapshot's only table may have another size.
        let first = table.index.map(|index| index * (bytes.len() / step) as u64);
        // Where the next cluster would be if the file went on as the disk does; 0 before the first.
        let mut next = 0;
        let mut sound = true;
        for (nth, chunk) in bytes.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            // Most tables of a sparse disk are mostly empty.
            if *chunk == [0; 64] {
                continue;
            }
            for (in_chunk, bytes) in chunk.chunks_exact_mut(step).enumerate() {
                let at = nth * 64 + in_chunk * step;
                let (raw, bitmap) = words(bytes);
                if raw | bitmap == 0 {
                    continue;
                }
                let entry = layout.l2_entry(raw, bitmap);
                if !entry.faults.none() {
                    sound = false;
                    let empty = self.manner.fix.is_some_and(|fix| fix.empty);
                    if empty && entry.faults.has(Fault::MisalignedEmpty) {
                        let (raw, bitmap) = layout.emptied(bitmap);
                        put(bytes, raw, bitmap);
                        changed.mark(at);
                        continue;
                    }
                    self.l2_faults(table, at / step, raw, entry.faults, weight);
                }
                match entry.target {
                    Target::Cluster { offset, copied } => {
                        if self.first {
                            self.tally.allocated += active;
                            if next != 0 && next != offset {
                                self.tally.fragmented += active;
                            }
                            next = offset.saturating_add(layout.cluster());
                        }
                        let used = layout.used(bitmap);
                        if offset.saturating_add(used) > image.data_end()
                            && let Some(first) = first
                            && image.cuts(first + (at / step) as u64, offset, used)
                        {
                            self.cut_data(offset, &|| entry_name(table, at / step, raw));
                        }
                        if !layout.data_file {
                            sound &= offset < image.file_len;
                            self.cluster(table, at / step, offset, weight);
                        }
                        if flags {
                            let refcount = match layout.data_file {
                                true => Some(1).filter(|_| self.first),
                                false => self.refcount(offset >> layout.cluster_bits),
                            };
                            let wrong = refcount.filter(|r| (*r == 1) != copied);
                            if let Some(refcount) = wrong {
                                if self.manner.fix.is_some_and(|fix| fix.flags) {
                                    let raw = layout.with_copied(raw, refcount == 1);
                                    put(bytes, raw, bitmap);
                                    changed.mark(at);
                                }
                                self.wrong_l2_flag(table, at / step, raw, refcount);
                            }
                        }
                    }
                    Target::Compressed { offset, len } => {
                        sound &= offset < image.file_len;
                        let what = || entry_name(table, at / step, raw);
                        self.region(offset, len, Role::Data, weight, what);
                        if self.first {
                            self.tally.allocated += active;
                            self.tally.compressed += active;
                            self.tally.fragmented += active;
                        }
                    }
                    Target::Nothing | Target::Refused => {}
                }
            }
        }
        if image.layout.within(table.offset) != 0 {
            // Between clusters it is somebody else's bytes that would change.
            return Ok(());
        }
        self.write_back(table.offset, bytes, &changed, sound)
    }

    /// Counts the reference to a whole cluster.
    #[inline]
    fn cluster(&mut self, table: &Table, index: usize, offset: u64, weight: u64) {
        let layout = self.image.layout;
        let cluster = offset >> layout.cluster_bits;
        // The usual case of `region`.
        if layout.within(offset) == 0 && offset < self.image.file_len {
            if !self.counts.refer(cluster, Role::Data, weight) {
                return;
            }
            // It was counted; now only the clash is told.
            let what = || entry_name(table, index, offset);
            self.clash(cluster, &what);
        } else {
            let what = || entry_name(table, index, offset);
            self.region(offset, layout.cluster(), Role::Data, weight, what);
        }
    }

    #[cold]
    fn l2_faults(
        &mut self,
        table: &Table,
        index: usize,
        raw: u64,
        faults: image::qcow2::check::Faults,
        weight: u64,
    ) {
        if !self.first {
            return;
        }
        self.tally.emptiable += u64::from(faults.has(Fault::MisalignedEmpty));
        for fault in faults.iter() {
            self.tally.found(Severity::Corruption, weight, || {
                format!("{} {}", entry_name(table, index, raw), fault.text())
            });
        }
    }

    #[cold]
    fn wrong_l2_flag(&mut self, table: &Table, index: usize, raw: u64, refcount: u64) {
        self.tally.wrong_flag(u64::from(table.active), || {
            let text = format!(
                "{} has a COPIED flag that denies refcount {refcount}",
                entry_name(table, index, raw)
            );
            let fact = Fact::L2Copied {
                entry: raw,
                refcount,
            };
            (text, fact)
        });
    }
}

fn entry_name(table: &Table, index: usize, raw: u64) -> String {
    format!("L2 table at {:#x}: entry {index} ({raw:#x})", table.offset)
}

#[inline]
fn words(bytes: &[u8]) -> (u64, u64) {
    let word = |part: Option<&[u8; 8]>| part.map_or(0, |b| u64::from_be_bytes(*b));
    let (parts, _) = bytes.as_chunks::<8>();
    (word(parts.first()), word(parts.get(1)))
}

fn put(bytes: &mut [u8], raw: u64, bitmap: u64) {
    let (parts, _) = bytes.as_chunks_mut::<8>();
    for (part, word) in parts.iter_mut().zip([raw, bitmap]) {
        *part = word.to_be_bytes();
    }
}
