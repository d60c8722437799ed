//! Checking and repairing a QED image: `qemu-img check`'s work, with its numbers (specification: "Consistency checking").
//!
//! Every cluster is referred to once, offsets are those of whole clusters within the file, and tables fit in it.
//! Clusters that nothing refers to are leaked; the format cannot note them as free.
//!
//! A repair empties entries that refer to no cluster of the file ([`Repair::All`]), as QEMU does, cuts leaked clusters
//! off at the end of the file, and clears the need-check bit where nothing but leaks is left. What two entries
//! refer to stays as it is, and so does the bit then.
//!
//! # Memory
//!
//! One bit for each cluster, in pages of 32768 that exist where a cluster is in use: at most the budget, and 1 MiB of a
//! table. An image that needs more is refused with how much it was given.
//!
//! # Time
//!
//! Each table is read once, in pieces of 1 MiB; one whose clusters are in use already is not read, so that no more
//! is read than the file has. Holes are not read.

use super::tally::{Severity, Tally};
use super::{CheckOptions, FileSource, Repair, Report, Source};
use block::{Error, Result, Storage};
use image::qed::{Header, clear_need_check};
use std::collections::BTreeMap;

/// log2 of the clusters of a page.
const PAGE_BITS: u32 = 15;
const PAGE_WORDS: usize = 1 << (PAGE_BITS - 6);
/// What a page is taken to cost in bytes.
const PAGE_BYTES: u64 = PAGE_WORDS as u64 * 8 + 64;
/// Bytes of a table in memory at a time.
const PIECE: u64 = 1 << 20;
const SECTOR: usize = 512;
/// An entry: the cluster is all zeros.
const ZERO: u64 = 1;

/// Which clusters are in use.
#[derive(Debug)]
struct Used {
    pages: BTreeMap<u64, Box<[u64; PAGE_WORDS]>>,
    count: u64,
    budget: u64,
}

impl Used {
    /// Notes `cluster`. `false` when it was in use already.
    fn add(&mut self, cluster: u64, name: &dyn Fn() -> String) -> Result<bool> {
        let pages = self.pages.len() as u64;
        let page = match self.pages.entry(cluster >> PAGE_BITS) {
            std::collections::btree_map::Entry::Occupied(page) => page.into_mut(),
            std::collections::btree_map::Entry::Vacant(_) if pages * PAGE_BYTES >= self.budget => {
                return Err(Error::unsupported(format!(
                    "{}: {} bytes of memory do not suffice to check it: give it more memory",
                    name(),
                    self.budget
                )));
            }
            std::collections::btree_map::Entry::Vacant(page) => {
                page.insert(Box::new([0; PAGE_WORDS]))
            }
        };
        let at = cluster & ((1 << PAGE_BITS) - 1);
        let Some(word) = page.get_mut((at >> 6) as usize) else {
            return Ok(true);
        };
        let new = *word >> (at & 63) & 1 == 0;
        *word |= 1 << (at & 63);
        self.count += u64::from(new);
        Ok(new)
    }

    /// The clusters in use, in order.
    fn clusters(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.iter().flat_map(|(page, words)| {
            let words = words.iter().zip((page << PAGE_BITS..).step_by(64));
            words.flat_map(|(word, first)| {
                (0..64)
                    .filter(move |bit| word >> bit & 1 != 0)
                    .map(move |bit| first + bit)
            })
        })
    }
}

/// A check under way.
struct Check<'a> {
    source: &'a dyn Source,
    /// Where repairs go.
    storage: Option<&'a dyn Storage>,
    header: Header,
    /// Clusters of the file.
    clusters: u64,
    used: Used,
    tally: Tally,
    fixed: u64,
}

/// Checks the QED image in `storage`, and repairs it as `options` say.
///
/// Nobody else may write to the file meanwhile; with [`Repair::No`] it is only read.
///
/// # Errors
///
/// `Corrupt` and `Unsupported` for a header that cannot be read, an image beyond the budget; what reading and
/// writing fails with. A repair that failed leaves the image no worse than it was.
pub fn check(storage: &dyn Storage, options: &CheckOptions) -> Result<Report> {
    let source = FileSource::new(storage)?;
    let header = Header::read(storage)?;
    let all = options.repair == Repair::All;
    let mut check = Check::new(&source, header, options.budget_bytes);
    check.storage = all.then_some(storage);
    check.walk()?;
    if check.fixed > 0 {
        storage.sync()?;
    }
    let mut report = check.report();
    if options.repair == Repair::No || report.corruptions + report.check_errors > 0 {
        return Ok(report);
    }
    check.cut_tail(storage, &mut report)?;
    if all && check.header.needs_check() {
        clear_need_check(storage)?;
    }
    Ok(report)
}

/// Checks the QED image whose metadata `source` shows, without a repair.
///
/// # Errors
///
/// As [`check`].
pub fn inspect(source: &dyn Source, header: Header, budget_bytes: u64) -> Result<Report> {
    let mut check = Check::new(source, header, budget_bytes);
    check.walk()?;
    Ok(check.report())
}

/// Checks and repairs the QED image in `storage` if its need-check bit is set, as QEMU does before it writes to
/// one. Others are left alone. Returns what the repair did, where there was one.
///
/// # Errors
///
/// As [`check`]; `Corrupt` where it could not be repaired.
pub fn mend(storage: &dyn Storage) -> Result<Option<Report>> {
    if !Header::read(storage)?.needs_check() {
        return Ok(None);
    }
    let options = CheckOptions {
        repair: Repair::All,
        ..CheckOptions::default()
    };
    let report = check(storage, &options)?;
    match report.corruptions + report.check_errors {
        0 => Ok(Some(report)),
        errors => Err(Error::corrupt(format!(
            "{}: was not closed cleanly, and {errors} errors could not be repaired: run diskplane check",
            storage.name(),
        ))),
    }
}

impl<'a> Check<'a> {
    fn new(source: &'a dyn Source, header: Header, budget: u64) -> Self {
        let clusters = source.len() / u64::from(header.cluster_size);
        Self {
            source,
            storage: None,
            header,
            clusters,
            used: Used {
                pages: BTreeMap::new(),
                count: 0,
                budget: budget.max(2 * PAGE_BYTES),
            },
            tally: Tally::default(),
            fixed: 0,
        }
    }

    fn cluster(&self) -> u64 {
        u64::from(self.header.cluster_size)
    }

    fn is_cluster(&self, offset: u64) -> bool {
        let cluster = offset / self.cluster();
        offset.is_multiple_of(self.cluster())
            && cluster >= u64::from(self.header.header_size)
            && cluster < self.clusters
    }

    fn is_table(&self, offset: u64) -> bool {
        let end = offset.checked_add(self.header.table_bytes());
        self.is_cluster(offset) && end.is_some_and(|end| end <= self.clusters * self.cluster())
    }

    /// Notes a use of `count` clusters; each that has another is wrong. `false` when there is one.
    fn take(&mut self, offset: u64, count: u64, what: &dyn Fn() -> String) -> Result<bool> {
        let first = offset / self.cluster();
        let mut sound = true;
        for cluster in first..first + count {
            let source = self.source;
            if !self.used.add(cluster, &|| source.name())? {
                sound = false;
                self.tally.found(Severity::Corruption, 1, || {
                    let at = cluster * u64::from(self.header.cluster_size);
                    format!("{} refers to {at:#x}, which is in use already", what())
                });
            }
        }
        Ok(sound)
    }

    fn walk(&mut self) -> Result<()> {
        let (l1, size) = (
            self.header.l1_table_offset,
            u64::from(self.header.table_size),
        );
        self.take(l1, size, &|| "the header's l1_table_offset".into())?;
        let mut tables = Vec::new();
        let mut from = 0;
        while from < self.header.table_bytes() {
            // One piece of the L1 table, then the tables that it leads to.
            tables.clear();
            self.piece(l1, from, |check, at, raw| {
                if raw == 0 {
                    return Ok(true);
                }
                let sound = check.is_table(raw);
                if sound {
                    tables.push((at, raw));
                } else {
                    check.wrong(|| {
                        format!("L1 entry at {at:#x} refers to {raw:#x}, where no table is")
                    });
                }
                Ok(sound)
            })?;
            for (at, table) in &tables {
                let what = || format!("L1 entry at {at:#x}");
                if self.take(*table, size, &what)? {
                    self.walk_table(*table)?;
                }
            }
            from += PIECE;
        }
        Ok(())
    }

    fn walk_table(&mut self, table: u64) -> Result<()> {
        let mut last = 0;
        let mut from = 0;
        while from < self.header.table_bytes() {
            self.piece(table, from, |check, at, raw| {
                if matches!(raw, 0 | ZERO) {
                    return Ok(true);
                }
                check.tally.allocated += 1;
                if last != 0 && raw.wrapping_sub(check.cluster()) != last {
                    check.tally.fragmented += 1;
                }
                last = raw;
                let sound = check.is_cluster(raw);
                if sound {
                    check.take(raw, 1, &|| format!("L2 entry at {at:#x}"))?;
                } else {
                    check.wrong(|| format!("L2 entry at {at:#x} is {raw:#x}, where no cluster is"));
                }
                Ok(sound)
            })?;
            from += PIECE;
        }
        Ok(())
    }

    /// Something wrong that a repair mends at once.
    fn wrong(&mut self, text: impl FnOnce() -> String) {
        self.tally.found(Severity::Corruption, 1, text);
        if self.storage.is_some() {
            self.tally.corruptions -= 1;
            self.fixed += 1;
        }
    }

    /// Looks at the entries of a piece of the table at `table`, from its byte `from` on. Those that are not sound
    /// are emptied where that is wanted.
    fn piece(
        &mut self,
        table: u64,
        from: u64,
        mut look: impl FnMut(&mut Self, u64, u64) -> Result<bool>,
    ) -> Result<()> {
        let len = PIECE.min(self.header.table_bytes() - from);
        let start = table + from;
        if self.source.is_hole(start, len) {
            return Ok(());
        }
        // At most 1 MiB.
        let mut bytes = vec![0; len as usize];
        if let Err(error) = self.source.read(start, &mut bytes) {
            self.tally.found(Severity::CheckError, 1, || {
                format!("the table at {table:#x} cannot be read: {error}")
            });
            return Ok(());
        }
        for (sector, at) in bytes.chunks_mut(SECTOR).zip((start..).step_by(SECTOR)) {
            let mut changed = false;
            for (entry, at) in sector.chunks_exact_mut(8).zip((at..).step_by(8)) {
                let raw = entry
                    .iter()
                    .rev()
                    .fold(0, |word, byte| word << 8 | u64::from(*byte));
                if raw != 0 && !look(self, at, raw)? {
                    entry.fill(0);
                    changed = true;
                }
            }
            if let Some(storage) = self.storage.filter(|_| changed) {
                storage.write_at(at, sector)?;
            }
        }
        Ok(())
    }

    fn report(&mut self) -> Report {
        let head = u64::from(self.header.header_size);
        if self.tally.check_errors == 0 {
            // What could not be read may refer to any of them.
            let leaks = self.clusters.saturating_sub(head + self.used.count);
            let mut next = head;
            let ends = std::iter::once(self.clusters);
            let mut told = 0;
            for cluster in self.used.clusters().chain(ends) {
                if cluster > next {
                    let (from, to) = (next * self.cluster(), cluster * self.cluster());
                    told += cluster - next;
                    self.tally.found(Severity::Leak, cluster - next, || {
                        format!("nothing refers to the clusters from {from:#x} to {to:#x}")
                    });
                }
                if told == leaks {
                    break;
                }
                next = cluster + 1;
            }
        }
        let last = self.used.clusters().last().unwrap_or(0);
        Report {
            corruptions: self.tally.corruptions,
            leaks: self.tally.leaks,
            check_errors: self.tally.check_errors,
            corruptions_fixed: self.fixed,
            image_end_offset: (last + 1).max(head) * self.cluster(),
            total_clusters: self.header.image_size.div_ceil(self.cluster()),
            allocated_clusters: self.tally.allocated,
            fragmented_clusters: self.tally.fragmented,
            walks: 1,
            findings: std::mem::take(&mut self.tally.findings),
            findings_left_out: self.tally.findings_left_out,
            ..Report::default()
        }
    }

    /// Gives leaked clusters at the end of the file back.
    fn cut_tail(&self, storage: &dyn Storage, report: &mut Report) -> Result<()> {
        let end = report.image_end_offset;
        let tail = self.clusters.saturating_sub(end / self.cluster());
        if tail == 0 {
            return Ok(());
        }
        storage.set_len(end)?;
        storage.sync()?;
        report.leaks -= tail;
        report.leaks_fixed += tail;
        Ok(())
    }
}
