//! Checking and repairing a qcow2 image: `qemu-img check`'s work, with its numbers.
//!
//! What the tables refer to is counted and compared with the refcounts; every entry is judged by itself.
//! A repair makes the refcounts what the tables say, then the COPIED flags what the refcounts
//! say, and never drops a reference to data.
//!
//! # Memory
//!
//! One byte for each cluster in use, in pages of 4096, and 64 for each whose refcount is 7 or more:
//!
//! ```text
//!   counts   min(budget, 4096 × pages with a cluster in use + 8 × pages of the file + 64 × large counts)
//!   tables   refcount table (≤ 8 MiB) + 1 MiB of L2 tables to read + a run of them (≤ 2 MiB) + ≤ 2 MiB
//!   snapshots, findings, clashes   ≤ 1 MiB each
//! ```
//!
//! With the default budget of 40 MiB that is below 64 MiB whatever the image. Where the budget does not
//! suffice, the clusters are counted in windows, each in a walk of its own: a byte of
//! budget counts a cluster, so 16 TiB of data in clusters of 64 KiB take seven walks; a
//! sparse disk takes one, however large. At most [`WALKS_MAX`] walks are made.
//!
//! # Time
//!
//! Each walk reads each refcount block and each L2 table once, in the order of the file and in
//! runs of up to 1 MiB, however many snapshots share a table; holes are not read.
//!
//! # Order of a repair's writes
//!
//! Each step is durable before the next begins, so that a repair may be cut off anywhere:
//!
//! 1. The dirty bit (version 3): the refcounts are not to be trusted until the repair ends.
//! 2. Entries that name a cluster between clusters but have no data in it are emptied.
//! 3. Refcounts become the number of references: in place, or, where the refcount structures
//!    themselves are broken, as new ones behind the end of the file that one write of the header's
//!    sector puts in force. Nothing that a table refers to is overwritten, nor does anything new go
//!    where an entry of a cut file points behind its end: once the file is longer that is a
//!    cluster of zeros, and counted.
//! 4. COPIED flags become what the refcounts say.
//! 5. The dirty and corrupt bits are cleared, if nothing is wrong any more.

mod bitmaps;
mod counts;
mod image;
pub mod parallels;
pub mod qed;
mod rebuild;
mod repair;
mod source;
mod tables;
mod tally;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
mod walk;
mod whole;

pub use source::{FileSource, Source};
pub use tally::{FINDINGS_MAX, Fact, Finding, Severity};
pub use whole::{refuse_cut_off, refuse_short_data_file};

use self::image::Image;
use ::image::qcow2::{Header, features};
use block::{Error, Result, Storage};
use counts::{Counts, PAGE_BITS};
use tally::Tally;
use walk::{Manner, Walk};

/// Memory for counts when the user says nothing.
pub const BUDGET_DEFAULT: u64 = 40 << 20;
/// Walks over an image's tables that a check makes at most. More are needed only by an image with 100
/// million clusters in use, or one made for the purpose.
pub const WALKS_MAX: u32 = 64;

/// What to repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the file is not written to.
    #[default]
    No,
    /// Refcounts that are too high: space is given back, nothing else changes.
    Leaks,
    /// All that can be.
    All,
}

/// How to check.
#[derive(Clone, Copy, Debug)]
pub struct CheckOptions {
    /// What to repair.
    pub repair: Repair,
    /// Bytes of memory for counts; less than an image needs costs time. At least enough for what
    /// one refcount block counts, whatever is said.
    pub budget_bytes: u64,
    /// Bytes of the image's external data file, where it has one: data behind its end are told as cut off. `None`: it is not
    /// looked at.
    pub data_file_len: Option<u64>,
    /// Refuse to repair a qcow2 image whose file ends before, or within, an L2 table. A repair takes what only that refers to for
    /// unused, and makes a table of zeros of it; QEMU does so.
    pub spare_cut_off: bool,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self {
            repair: Repair::No,
            budget_bytes: BUDGET_DEFAULT,
            data_file_len: None,
            spare_cut_off: false,
        }
    }
}

/// The outcome of a check. Counts are those of `qemu-img check`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Contradictions that are left.
    pub corruptions: u64,
    /// Leaked clusters that are left.
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Contradictions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaked clusters that were given back.
    pub leaks_fixed: u64,
    /// Clusters that more than one kind of thing uses, or two that must not share. Where the
    /// refcounts say so too, this is not counted as a corruption.
    pub overlaps: u64,
    /// Tables and clusters of the guest that the file ends before, or within: what was in the rest is lost. Those that it ends
    /// within are no corruptions, as in QEMU.
    pub cut_off: u64,
    /// L2 tables are among them: a repair takes what only these refer to for unused.
    pub tables_cut: bool,
    /// Where the last cluster in use ends.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Those with data.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// Walks over the tables that one check took.
    pub walks: u32,
    /// What is wrong, in words: what was found first, also if it has been repaired.
    pub findings: Vec<Finding>,
    /// Findings beyond [`FINDINGS_MAX`].
    pub findings_left_out: u64,
    /// COPIED flags that a repair made what the refcounts say, once these were right: the first [`FINDINGS_MAX`].
    pub flags_repaired: Vec<Finding>,
    /// Where a repair made the refcounts anew, the clusters of the old ones that it gave back: the first
    /// [`FINDINGS_MAX`].
    pub rebuilt: Option<Vec<u64>>,
}

impl Report {
    fn of(image: &Image, found: &Found) -> Self {
        let (tally, cluster) = (&found.tally, image.layout.cluster());
        Self {
            corruptions: tally.errors(),
            leaks: tally.leaks,
            check_errors: tally.check_errors,
            overlaps: tally.overlaps,
            cut_off: tally.cut_off,
            tables_cut: tally.tables_cut,
            image_end_offset: (tally.last.unwrap_or(0) + 1) * cluster,
            total_clusters: image.header.size.div_ceil(cluster),
            allocated_clusters: tally.allocated,
            fragmented_clusters: tally.fragmented,
            compressed_clusters: tally.compressed,
            walks: found.walks,
            ..Self::default()
        }
    }
}

/// Checks the qcow2 image in `storage`, and repairs it as `options` say.
///
/// Nobody else may write to the file meanwhile; with [`Repair::No`] it is only read.
///
/// # Errors
///
/// `Corrupt` and `Unsupported` for a header that cannot be read (or a feature nobody knows), a snapshot table
/// or refcounts that this [`Repair`] may not touch, an image beyond [`WALKS_MAX`]; what reading and
/// writing fails with. A repair that failed leaves the image no worse than it was.
pub fn check(storage: &dyn Storage, options: &CheckOptions) -> Result<Report> {
    match options.repair {
        Repair::No => {
            let source = FileSource::new(storage)?.with_data_file(options.data_file_len);
            inspect(&source, options.budget_bytes)
        }
        _ => repair::repair(storage, options),
    }
}

/// Brings the qcow2 image in `storage` in order if its dirty bit is set, as QEMU does before it writes to
/// one: whoever wrote it had postponed refcounts, or a repair was cut off. Others are left alone, and so
/// is one that is marked corrupt, which takes a decision of the user. Returns what the repair did, where there was one.
///
/// # Errors
///
/// As [`check`]; `Corrupt` where it could not be repaired.
pub fn mend_dirty(storage: &dyn Storage) -> Result<Option<Report>> {
    let header = Header::read(storage)?;
    if header.incompatible & (features::DIRTY | features::CORRUPT) != features::DIRTY {
        return Ok(None);
    }
    let options = CheckOptions {
        repair: Repair::All,
        spare_cut_off: true,
        ..CheckOptions::default()
    };
    let report = check(storage, &options)?;
    if report.corruptions + report.check_errors > 0 {
        return Err(Error::corrupt(format!(
            "{}: was not closed cleanly, and {} errors could not be repaired: run diskplane check",
            storage.name(),
            report.corruptions + report.check_errors
        )));
    }
    Ok(Some(report))
}

/// Checks the image whose metadata `source` shows, without a repair.
///
/// # Errors
///
/// As [`check`].
pub fn inspect(source: &dyn Source, budget_bytes: u64) -> Result<Report> {
    let image = Image::load(source, false)?;
    let mut found = Found::search(source, &image, budget_bytes)?;
    let mut report = Report::of(&image, &found);
    report.take_findings(&mut found);
    Ok(report)
}

impl Report {
    fn take_findings(&mut self, found: &mut Found) {
        self.findings = std::mem::take(&mut found.tally.findings);
        self.findings_left_out = found.tally.findings_left_out;
    }
}

/// What the walks of a check found together.
#[derive(Debug, Default)]
struct Found {
    tally: Tally,
    /// Clusters that clash, in order.
    clashes: Vec<u64>,
    walks: u32,
}

impl Found {
    fn search(source: &dyn Source, image: &Image, budget: u64) -> Result<Self> {
        let mut found = Self {
            tally: image.tally.clone(),
            ..Self::default()
        };
        found.walks = windows(source, image, Manner::default(), budget, |walk| {
            found.tally.merge(std::mem::take(&mut walk.tally));
            found.clashes.append(&mut walk.clashes);
            Ok(())
        })?;
        found.clashes.sort_unstable();
        found.clashes.dedup();
        Ok(found)
    }
}

/// Walks over `image` in as many windows as the budget demands, and hands each walk to `each`.
/// Returns how many walks there were.
fn windows(
    source: &dyn Source,
    image: &Image,
    manner: Manner,
    budget: u64,
    mut each: impl FnMut(&mut Walk) -> Result<()>,
) -> Result<u32> {
    // Windows end where pages and refcount blocks do.
    let unit = 1u64 << PAGE_BITS.max(image.layout.block_bits());
    let budget = budget.max(2 * unit);
    // A table may reach into the cluster behind the file's last.
    let end = image.clusters + 1;
    let (mut from, mut span, mut walks) = (0, end, 0);
    while from < end {
        let until = from.saturating_add(span).min(end);
        if walks == WALKS_MAX {
            return Err(Error::unsupported(format!(
                "{}: {WALKS_MAX} walks over its tables with {budget} bytes of memory do not \
                 suffice to check it: give it more memory",
                source.name()
            )));
        }
        walks += 1;
        let mut walk = Walk::run(source, image, manner, from..until, budget)?;
        if walk.counts.full() {
            span = narrower(&walk.counts, from, until, unit).ok_or_else(|| {
                Error::unsupported(format!(
                    "{}: more refcounts of 7 and above than {budget} bytes of memory hold: \
                     give it more memory",
                    source.name()
                ))
            })?;
            continue;
        }
        each(&mut walk)?;
        from = until;
    }
    Ok(walks)
}

/// Clusters of a window that fits, when `from..until` did not.
fn narrower(counts: &Counts, from: u64, until: u64, unit: u64) -> Option<u64> {
    let span = counts.narrower() - from;
    // It always shrinks, so that this ends.
    let span = span.min((until - from) / 2) / unit * unit;
    match span {
        0 if until - from <= unit => None,
        span => Some(span.max(unit)),
    }
}
