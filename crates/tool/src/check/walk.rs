//! One walk over everything that refers to clusters, counting those of one window.
//!
//! ```text
//!   refcount blocks of the window ─▶ counts (as the file has them)
//!   header, L1s, L2s, snapshot table, refcount table, LUKS header, bitmaps, refcount blocks ─▶ references
//!   the two compared ─▶ tally
//! ```
//!
//! Only the window's clusters are counted; what is wrong with an entry by itself is counted in the walk
//! that begins at cluster 0, so that the walks of all windows together show everything once.

use super::counts::{Counts, Role};
use super::image::{Image, L1};
use super::source::Source;
use super::tally::{Fact, Severity, Tally};
use block::{Result, Storage};
use image::qcow2::check::{Block, block_at, each_refcount};

/// What a walk writes while it goes.
#[derive(Clone, Copy, Debug)]
pub struct Fix<'a> {
    /// The file.
    pub storage: &'a dyn Storage,
    /// Replace entries with the fault `MisalignedEmpty` by ones that read the same.
    pub empty: bool,
    /// Make COPIED flags of the active tables agree with the file's refcounts.
    pub flags: bool,
    /// Clusters that more than one kind of thing uses: nothing is written there.
    pub overlaps: &'a [u64],
}

/// How a walk goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner<'a> {
    /// Repair entries on the way.
    pub fix: Option<Fix<'a>>,
    /// Refcount table and blocks, and a snapshot table that has to be rewritten, are about to be
    /// replaced: they are kept from being overwritten, but do not count.
    pub replacing: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Walk<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) image: &'a Image,
    pub(super) manner: Manner<'a>,
    /// The window's counts.
    pub counts: Counts,
    /// What was found.
    pub tally: Tally,
    /// Clusters that clash, each at least once.
    pub clashes: Vec<u64>,
    /// Clusters behind the file's end that something refers to, of the first [`BEYOND_MAX`]: a bit for
    /// each. Empty where there are none.
    beyond: Vec<u64>,
    /// The window begins at cluster 0.
    pub(super) first: bool,
    until: u64,
}

/// Clashes that are remembered; an image with more is not repaired in place.
pub const CLASHES_MAX: usize = 1 << 16;
/// The longest file that QEMU, which makes a file reach its refcount blocks, finds room for: ext4's limit.
const GROWN_MAX: u64 = 16 << 40;
/// Clusters behind the file's end of which it is known whether something refers to them.
const BEYOND_MAX: u64 = 1 << 16;

impl<'a> Walk<'a> {
    /// Walks over `image`, counting clusters `window`, in about `budget` bytes. The counts are
    /// worthless when [`Counts::full`] says so.
    pub fn run(
        source: &'a dyn Source,
        image: &'a Image,
        manner: Manner<'a>,
        window: std::ops::Range<u64>,
        budget: u64,
    ) -> Result<Self> {
        let mut walk = Self {
            source,
            image,
            manner,
            counts: Counts::new(window.start, window.end, budget),
            tally: Tally::default(),
            clashes: Vec::new(),
            beyond: Vec::new(),
            first: window.start == 0,
            until: window.end,
        };
        walk.note_refcounts()?;
        if !walk.counts.full() {
            walk.refer()?;
        }
        if !walk.counts.full() {
            walk.compare();
        }
        Ok(walk)
    }

    fn note_refcounts(&mut self) -> Result<()> {
        let layout = self.image.layout;
        let per_block = 1u64 << layout.block_bits();
        // A table may reach into the cluster behind the file's last.
        let end = self.until.min(self.image.clusters + 1);
        let mut bytes = vec![0; layout.cluster() as usize];
        for (index, raw) in self.image.table.iter().enumerate() {
            let first = (index as u64) << layout.block_bits();
            if first >= end || self.counts.full() {
                break;
            }
            let (Block::At(offset), _) = block_at(&layout, *raw) else {
                continue;
            };
            if !self.counts.holds(first) {
                continue;
            }
            let count = per_block.min(end - first);
            let len = ((count << layout.refcount_order).div_ceil(64) * 8).min(layout.cluster());
            let Some(part) = bytes.get_mut(..len as usize) else {
                continue;
            };
            self.source.read(offset, part)?;
            let counts = &mut self.counts;
            each_refcount(layout.refcount_order, part, count, |index, value| {
                counts.note(first + index, value);
            });
        }
        Ok(())
    }

    fn refer(&mut self) -> Result<()> {
        let header = &self.image.header;
        let cluster = self.image.layout.cluster();
        self.region(0, cluster, Role::Own, 1, || "the header".into());
        self.l1_tables()?;
        let at = header.snapshots_offset;
        if self.manner.replacing && self.image.rewrite_snapshots {
            self.keep(at, self.image.snapshots_len);
        } else {
            let what = || "the snapshot table".into();
            self.region(at, self.image.snapshots_len, Role::Own, 1, what);
        }
        if let Ok((at, len)) = self.image.refcount_table() {
            match self.manner.replacing {
                true => self.keep(at, len),
                false => self.region(at, len, Role::Own, 1, || "the refcount table".into()),
            }
        }
        match self.image.crypto_header() {
            Some(Ok((at, len))) => {
                self.region(at, len, Role::Own, 1, || "the LUKS header".into());
            }
            Some(Err(what)) => {
                self.unread(format!("header: the extension of the LUKS header {what}"));
            }
            None => {}
        }
        self.bitmaps()?;
        self.refcount_blocks();
        Ok(())
    }

    /// Counts a corruption that is no matter of clusters.
    pub(super) fn wrong(&mut self, text: impl FnOnce() -> String) {
        if self.first {
            self.tally.found(Severity::Corruption, 1, text);
        }
    }

    /// Counts `weight` references to all clusters of a range of the file. One that ends a cluster or more
    /// behind the file's end is a corruption instead (the last cluster of a file may be cut short).
    pub(super) fn region(
        &mut self,
        offset: u64,
        len: u64,
        role: Role,
        weight: u64,
        what: impl Fn() -> String,
    ) {
        if len == 0 {
            return;
        }
        let layout = self.image.layout;
        let end = offset.saturating_add(len);
        if end >= self.image.file_len.saturating_add(layout.cluster()) {
            if self.first {
                self.tally.found(Severity::Corruption, weight, || {
                    let text = format!("{} at {offset:#x} ends behind the file's end", what());
                    (text, Fact::Beyond { offset, len })
                });
                self.tally.cut_off += weight;
                self.tally.tables_cut |= role == Role::Table;
                self.note_beyond(
                    offset >> layout.cluster_bits,
                    (end - 1) >> layout.cluster_bits,
                );
            }
            return;
        }
        // Of a compressed cluster the length is known in sectors.
        let there = match role {
            Role::Data => self.image.file_len,
            _ => self.image.end,
        };
        if end > there {
            self.cut_off(offset, 1, &what);
            self.tally.tables_cut |= role == Role::Table;
        }
        for cluster in offset >> layout.cluster_bits..=(end - 1) >> layout.cluster_bits {
            if self.counts.refer(cluster, role, weight) {
                self.clash(cluster, &what);
            }
        }
    }

    /// Counts something that the end of the file cuts, which QEMU does not.
    #[cold]
    pub(super) fn cut_off(&mut self, offset: u64, times: u64, what: &dyn Fn() -> String) {
        let end = self.image.end;
        if self.first {
            self.tally.found(Severity::CutOff, times, || {
                format!(
                    "{} at {offset:#x} is not whole: the file ends at {end:#x}",
                    what()
                )
            });
        }
    }

    /// Counts a cluster of the disk that is cut.
    #[cold]
    pub(super) fn cut_data(&mut self, offset: u64, what: &dyn Fn() -> String) {
        if !self.image.layout.data_file {
            self.cut_off(offset, 1, what);
        } else if self.first {
            let end = self.image.data_end();
            self.tally.found(Severity::CutOff, 1, || {
                format!(
                    "{} is at {offset:#x} of the data file, which ends at {end:#x}",
                    what()
                )
            });
        }
    }

    #[cold]
    fn note_beyond(&mut self, first: u64, last: u64) {
        let end = self.image.clusters;
        if self.beyond.is_empty() {
            self.beyond = vec![0; BEYOND_MAX as usize / 64];
        }
        let first = first.max(end) - end;
        for at in first..=last.saturating_sub(end).min(BEYOND_MAX - 1) {
            if let Some(word) = self.beyond.get_mut(at as usize / 64) {
                *word |= 1 << (at % 64);
            }
        }
    }

    /// Clusters behind the file's end that something refers to, in order, of those near to it.
    pub fn beyond(&self) -> impl Iterator<Item = u64> {
        let has = |at: &u64| {
            let word = self.beyond.get(*at as usize / 64);
            word.is_some_and(|word| word >> (at % 64) & 1 == 1)
        };
        let end = self.image.clusters;
        let known = self.beyond.len() as u64 * 64;
        (0..known).filter(has).map(move |at| end + at)
    }

    #[cold]
    pub(super) fn clash(&mut self, cluster: u64, what: &dyn Fn() -> String) {
        let at = cluster << self.image.layout.cluster_bits;
        self.tally.found(Severity::Overlap, 1, || {
            format!(
                "{} uses the cluster at {at:#x}, which something else uses",
                what()
            )
        });
        if self.clashes.len() <= CLASHES_MAX {
            self.clashes.push(cluster);
        }
    }

    fn keep(&mut self, offset: u64, len: u64) {
        let bits = self.image.layout.cluster_bits;
        let end = offset.saturating_add(len).min(self.image.file_len);
        for cluster in offset >> bits..end.div_ceil(1 << bits) {
            self.counts.keep(cluster);
        }
    }

    fn refcount_blocks(&mut self) {
        let image = self.image;
        let layout = image.layout;
        for (index, raw) in image.table.iter().enumerate() {
            let offset = raw & !511;
            let cluster = offset >> layout.cluster_bits;
            if let (_, Some(fault)) = block_at(&layout, *raw) {
                self.wrong(|| format!("refcount table: entry {index} ({raw:#x}) {}", fault.text()));
                self.tally.rebuild = true;
            } else if offset == 0 {
            } else if cluster >= image.clusters.max(self.counted_end()) {
                self.wrong(|| {
                    format!("refcount table: entry {index} ({raw:#x}) points behind the file's end")
                });
                // Then its refcounts are zeros, or cannot be had.
                self.tally.blocks_beyond += u64::from(self.first);
                let growable = offset.saturating_add(layout.cluster()) <= GROWN_MAX;
                self.tally.blocks_growable += u64::from(self.first && growable);
            } else if self.manner.replacing {
                self.keep(offset, layout.cluster());
            } else if self.counts.holds(cluster) {
                let what = || format!("refcount block {index}");
                // What it has lost can be counted anew: not a loss.
                let mut len = layout.cluster();
                let there = image.end.saturating_sub(offset);
                if (1..len).contains(&there) {
                    self.tally.block_cut = true;
                    self.cut_off(offset, 0, &what);
                    len = there;
                }
                self.region(offset, len, Role::Own, 1, what);
                // More than a refcount can say are not more than that, as in QEMU.
                if self.counts.references(cluster).min(layout.refcount_max()) != 1 {
                    self.tally.found(Severity::Corruption, 1, || {
                        format!("refcount block {index} at {offset:#x} is used by something else")
                    });
                    self.tally.rebuild = true;
                }
            }
        }
    }

    /// The end of the clusters that count: one more than the file has where a table reaches behind its end.
    fn counted_end(&self) -> u64 {
        let end = self.image.clusters;
        end + u64::from(self.counts.references(end) > 0)
    }

    /// The refcount that the file has for `cluster`, where this walk is to judge it: `None` in
    /// another window, or where it cannot be had.
    #[inline]
    pub(super) fn refcount(&self, cluster: u64) -> Option<u64> {
        if self.is_lost(cluster) {
            return None;
        }
        if self.counts.holds(cluster) && cluster <= self.image.clusters {
            return Some(self.counts.in_file(cluster));
        }
        match self.first && cluster > self.image.clusters {
            true => self.refcount_beyond(cluster),
            false => None,
        }
    }

    /// Whether the refcount of `cluster` cannot be had.
    #[inline]
    pub(super) fn is_lost(&self, cluster: u64) -> bool {
        self.image.lost && self.block_of(cluster) == Block::Lost
    }

    fn block_of(&self, cluster: u64) -> Block {
        self.image.block(cluster >> self.image.layout.block_bits())
    }

    /// The refcount of a cluster behind the file's end, which is in no window.
    #[cold]
    fn refcount_beyond(&self, cluster: u64) -> Option<u64> {
        let layout = self.image.layout;
        let Block::At(offset) = self.block_of(cluster) else {
            return Some(0);
        };
        let index = cluster & ((1 << layout.block_bits()) - 1);
        let per_word_bits = 6 - layout.refcount_order;
        let mut word = [0; 8];
        let at = offset + (index >> per_word_bits) * 8;
        self.source.read(at, &mut word).ok()?;
        let (mut value, index) = (0, index & ((1 << per_word_bits) - 1));
        each_refcount(layout.refcount_order, &word, 64, |at, refcount| {
            if at == index {
                value = refcount;
            }
        });
        Some(value)
    }

    fn compare(&mut self) {
        let image = self.image;
        let layout = image.layout;
        let max = layout.refcount_max();
        let end = self.counted_end();
        // What the table says of the cluster behind the file's last counts only if a table is in it.
        self.counts.note(end, 0);
        self.tally.last = match image.lost {
            false => self.counts.last(),
            true => {
                let used = self.counts.used();
                used.filter(|cluster| !self.is_lost(*cluster)).last()
            }
        };
        for found in self.counts.differences() {
            let (cluster, file) = (found.cluster, found.file);
            let at = cluster << layout.cluster_bits;
            let references = found.references.min(max);
            if found.references > max {
                let over = found.references - max;
                self.tally.found(Severity::Corruption, over, || {
                    let text =
                        format!("cluster at {at:#x} has more references than refcounts can count");
                    (text, Fact::Overflow { offset: at })
                });
            }
            if cluster >= end || file == references || self.is_lost(cluster) {
                continue;
            }
            self.tally.rebuild |= file == 0;
            let severity = match file < references {
                true => Severity::Corruption,
                false => Severity::Leak,
            };
            self.tally.found(severity, 1, || {
                let text =
                    format!("cluster at {at:#x} has refcount {file}, but {references} references");
                let fact = Fact::Refcount {
                    cluster,
                    refcount: file,
                    references,
                };
                (text, fact)
            });
        }
        if image.lost {
            self.count_lost(end);
        }
    }

    /// Clusters whose refcount cannot be had.
    fn count_lost(&mut self, end: u64) {
        let layout = self.image.layout;
        for (index, raw) in self.image.table.iter().enumerate() {
            let first = (index as u64) << layout.block_bits();
            let after = (first + (1 << layout.block_bits())).min(end);
            let lost = block_at(&layout, *raw).0 == Block::Lost;
            if lost && self.counts.holds(first) && first < after {
                self.tally.found(Severity::CheckError, after - first, || {
                    format!("the refcounts of {} clusters cannot be read", after - first)
                });
            }
        }
    }

    /// All L1 tables, with the tables behind them.
    fn l1_tables(&mut self) -> Result<()> {
        let mut tables = super::tables::Tables::new(self.image.layout.cluster());
        for l1 in &self.image.l1s {
            self.l1_table(*l1, &mut tables)?;
        }
        tables.finish(self)
    }
}

impl Walk<'_> {
    fn l1_table(&mut self, l1: L1, tables: &mut super::tables::Tables) -> Result<()> {
        let len = u64::from(l1.entries) * 8;
        let kind = if l1.active { "the" } else { "a snapshot's" };
        let weight = u64::from(l1.weight);
        self.region(l1.offset, len, Role::Own, weight, || {
            format!("{kind} L1 table")
        });
        let mut bytes = vec![0; len.min(1 << 16) as usize];
        let mut at = 0;
        while at < len && !self.counts.full() {
            let part = bytes.len().min((len - at) as usize);
            let Some(part) = bytes.get_mut(..part) else {
                break;
            };
            let offset = l1.offset.saturating_add(at);
            if !self.source.is_hole(offset, part.len() as u64) {
                self.source.read(offset, part)?;
                self.l1_part(l1, at / 8, part, tables)?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn l1_part(
        &mut self,
        l1: L1,
        first: u64,
        part: &mut [u8],
        tables: &mut super::tables::Tables,
    ) -> Result<()> {
        let layout = self.image.layout;
        let weight = u64::from(l1.weight);
        let mut changed = super::tables::Changed::new(part.len());
        let mut sound = true;
        for (nth, bytes) in part.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let raw = u64::from_be_bytes(*bytes);
            let Some(entry) = layout.l1_entry(raw) else {
                continue;
            };
            sound &= entry.faults.none() && entry.table < self.image.file_len;
            let index = first + nth as u64;
            let what = || format!("L1 entry {index} ({raw:#x})");
            if self.first {
                for fault in entry.faults.iter() {
                    self.tally.found(Severity::Corruption, weight, || {
                        format!("{} {}", what(), fault.text())
                    });
                }
            }
            self.region(entry.table, layout.cluster(), Role::Table, weight, || {
                format!("the L2 table of {}", what())
            });
            if l1.active && entry.table != 0 {
                let refcount = self.refcount(entry.table >> layout.cluster_bits);
                if let Some(refcount) = refcount.filter(|r| (*r == 1) != entry.copied) {
                    if self.manner.fix.is_some_and(|fix| fix.flags) {
                        *bytes = layout.with_copied(raw, refcount == 1).to_be_bytes();
                        changed.mark(nth * 8);
                    }
                    self.tally.wrong_flag(1, || {
                        let text = format!(
                            "{} has a COPIED flag that denies refcount {refcount}",
                            what()
                        );
                        let fact = Fact::L1Copied {
                            index,
                            entry: raw,
                            refcount,
                        };
                        (text, fact)
                    });
                }
            }
            tables.push(entry.table, l1.active.then_some(index), l1.weight);
            if tables.is_full() {
                tables.work_off(self)?;
            }
        }
        let offset = l1.offset.saturating_add(first * 8);
        self.write_back(offset, part, &changed, sound)
    }

    /// Writes the changed sectors of a piece of a table. Where something else is in the same place, only
    /// if all of its entries are `sound`: then it is a table, and not somebody's data.
    pub(super) fn write_back(
        &mut self,
        offset: u64,
        bytes: &[u8],
        changed: &super::tables::Changed,
        sound: bool,
    ) -> Result<()> {
        let Some(fix) = self.manner.fix.filter(|_| changed.any()) else {
            return Ok(());
        };
        let bits = self.image.layout.cluster_bits;
        let end = offset.saturating_add(bytes.len() as u64);
        let clusters = offset >> bits..end.div_ceil(1 << bits);
        let clash = |cluster| fix.overlaps.binary_search(&cluster).is_ok();
        // Between clusters it is somebody else's bytes that would change.
        let misplaced = !offset.is_multiple_of(512) || end > self.image.file_len;
        if misplaced || !sound && clusters.clone().any(clash) {
            return Ok(());
        }
        for sectors in changed.runs() {
            if let Some(part) = bytes.get(sectors.clone()) {
                fix.storage.write_at(offset + sectors.start as u64, part)?;
            }
        }
        self.tally.repaired += changed.count();
        Ok(())
    }
}
