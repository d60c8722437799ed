//! Repairing: see the order of writes in the module above.

use super::image::Image;
use super::rebuild;
use super::source::FileSource;
use super::walk::{CLASHES_MAX, Fix, Manner, Walk};
use super::whole;
use super::{CheckOptions, FINDINGS_MAX, Finding, Found, Repair, Report, windows};
use ::image::qcow2::check::{Block, set_refcount};
use ::image::qcow2::features;
use block::{Error, Result, Storage};

/// Ranges of freed clusters that are given back to the host at once; more are only free in the image.
const FREED_MAX: usize = 1 << 16;

pub(super) fn repair(storage: &dyn Storage, options: &CheckOptions) -> Result<Report> {
    let all = options.repair == Repair::All;
    let source = FileSource::new(storage)?.with_data_file(options.data_file_len);
    let mut image = Image::load(&source, all)?;
    let mut before = Found::search(&source, &image, options.budget_bytes)?;
    if options.spare_cut_off && before.tally.tables_cut {
        let mut report = Report::of(&image, &before);
        report.take_findings(&mut before);
        return Err(Error::corrupt(format!(
            "{}: not repaired, because what seems unused may be used: it {}",
            storage.name(),
            whole::lost(&report)
        )));
    }
    if all && before.tally.block_cut {
        // The refcounts that it has lost are found from what refers to the clusters; no writer may append in their place.
        storage.set_len(image.clusters << image.layout.cluster_bits)?;
        let source = FileSource::new(storage)?.with_data_file(options.data_file_len);
        image = Image::load(&source, all)?;
        before = Found::search(&source, &image, options.budget_bytes)?;
    }
    let mut report = Report::of(&image, &before);
    report.take_findings(&mut before);
    let flagged = image.header.incompatible & (features::DIRTY | features::CORRUPT) != 0;
    let unknown = image.header.autoclear & !features::AUTOCLEAR_KNOWN != 0;
    let errors = before.tally.errors() > 0 || before.tally.check_errors > 0;
    let flags = before.tally.flags > 0 && trusted(&image, &before);
    if !all && before.tally.rebuild {
        return Err(Error::corrupt(format!(
            "{}: the refcounts have to be rebuilt to repair anything: that takes a repair of all",
            storage.name()
        )));
    }
    if before.tally.leaks == 0 && !(all && errors) && !flags {
        let was_dirty = image.header.incompatible & features::DIRTY != 0;
        match errors {
            false if flagged || unknown => settle(storage, &image, true, false)?,
            // Whoever opens it for writing says that it does not keep what it does not know.
            true if unknown => settle(storage, &image, false, was_dirty)?,
            _ => {}
        }
        return Ok(report);
    }
    if let Some(what) = before.tally.unread {
        return Err(Error::corrupt(format!(
            "{}: not repaired, because what seems unused may be used: {what}",
            storage.name()
        )));
    }
    if !all && image.cut {
        return Err(Error::corrupt(format!(
            "{}: the snapshot table has an entry that is too large: \
             that takes a repair of all, which cuts it",
            storage.name()
        )));
    }
    let mut work = Work {
        storage,
        options,
        corruptions_fixed: 0,
        leaks_fixed: 0,
        flags_repaired: Vec::new(),
        rebuilt: None,
    };
    let was_dirty = image.header.incompatible & features::DIRTY != 0;
    work.mark_dirty(&image)?;
    work.run(image, before)?;
    // As the file is now, from scratch.
    let source = FileSource::new(storage)?.with_data_file(options.data_file_len);
    let image = Image::load(&source, false)?;
    let after = Found::search(&source, &image, options.budget_bytes)?;
    let sound = after.tally.errors() == 0 && after.tally.check_errors == 0;
    settle(storage, &image, sound, was_dirty)?;
    // A broken table may lie over the header, which was just written.
    let (image, after) = match sound {
        true => (image, after),
        false => work.again(false)?,
    };
    let findings = std::mem::take(&mut report.findings);
    Ok(Report {
        corruptions_fixed: work.corruptions_fixed,
        leaks_fixed: work.leaks_fixed,
        findings,
        findings_left_out: report.findings_left_out,
        flags_repaired: work.flags_repaired,
        rebuilt: work.rebuilt,
        ..Report::of(&image, &after)
    })
}

/// Whether the refcounts are right, so that flags can be made right after them.
fn trusted(image: &Image, found: &Found) -> bool {
    let tally = &found.tally;
    tally.corruptions == image.snapshot_faults && tally.leaks == 0 && tally.check_errors == 0
}

struct Work<'a> {
    storage: &'a dyn Storage,
    options: &'a CheckOptions,
    corruptions_fixed: u64,
    leaks_fixed: u64,
    flags_repaired: Vec<Finding>,
    rebuilt: Option<Vec<u64>>,
}

impl Work<'_> {
    fn run(&mut self, image: Image, before: Found) -> Result<()> {
        let (mut image, mut found) = (image, before);
        let all = self.options.repair == Repair::All;
        if all && found.tally.emptiable > 0 {
            let fix = self.fix(&found)?;
            self.corruptions_fixed += self.tables(&image, Fix { empty: true, ..fix })?;
            (image, found) = self.again(all)?;
        }
        let broken = found.tally.rebuild || found.tally.blocks_beyond > 0;
        if all && (broken || image.rewrite_snapshots) {
            // A block behind the file's end counts twice, as in QEMU, which makes the file longer and
            // finds that the block is not counted.
            let corruptions = found.tally.corruptions + found.tally.blocks_growable;
            let leaks = found.tally.leaks;
            let old = image.refcount_clusters();
            self.rebuilt = broken.then(|| {
                let own = |cluster: &u64| found.clashes.binary_search(cluster).is_err();
                old.into_iter().filter(own).take(FINDINGS_MAX).collect()
            });
            rebuild::rebuild(self.storage, &mut image, self.options.budget_bytes)?;
            (image, found) = self.again(false)?;
            self.corruptions_fixed += corruptions.saturating_sub(found.tally.corruptions);
            self.leaks_fixed += leaks.saturating_sub(found.tally.leaks);
        } else {
            self.refcounts(&image, all)?;
            (image, found) = self.again(false)?;
        }
        if found.tally.flags > 0 && (all || trusted(&image, &found)) {
            let fix = self.fix(&found)?;
            self.corruptions_fixed += self.tables(&image, Fix { flags: true, ..fix })?;
            let flags = found.tally.findings.into_iter();
            self.flags_repaired = flags.filter(Finding::is_flag).collect();
        }
        Ok(())
    }

    /// The image as it is after what was written.
    fn again(&self, truncate: bool) -> Result<(Image, Found)> {
        let source = FileSource::new(self.storage)?.with_data_file(self.options.data_file_len);
        let image = Image::load(&source, truncate)?;
        let found = Found::search(&source, &image, self.options.budget_bytes)?;
        Ok((image, found))
    }

    fn fix<'f>(&self, found: &'f Found) -> Result<Fix<'f>>
    where
        Self: 'f,
    {
        if found.clashes.len() > CLASHES_MAX {
            return Err(Error::corrupt(format!(
                "{}: more than {CLASHES_MAX} clusters are used by several things: \
                 too damaged to repair in place",
                self.storage.name()
            )));
        }
        Ok(Fix {
            storage: self.storage,
            empty: false,
            flags: false,
            overlaps: &found.clashes,
        })
    }

    /// Repairs entries of tables; returns how many.
    fn tables(&self, image: &Image, fix: Fix) -> Result<u64> {
        let source = FileSource::new(self.storage)?;
        let manner = Manner {
            fix: Some(fix),
            replacing: false,
        };
        let mut repaired = 0;
        windows(&source, image, manner, self.options.budget_bytes, |walk| {
            repaired += walk.tally.repaired;
            Ok(())
        })?;
        self.storage.sync()?;
        Ok(repaired)
    }

    /// Makes refcounts what the tables say; only lowers them if not `all`.
    fn refcounts(&mut self, image: &Image, all: bool) -> Result<()> {
        let source = FileSource::new(self.storage)?;
        let manner = Manner::default();
        windows(&source, image, manner, self.options.budget_bytes, |walk| {
            let freed = self.window(image, walk, all)?;
            // No crash may leave a refcount on clusters whose bytes are gone already: a repair that
            // is wrong about them could not be taken back.
            self.storage.sync()?;
            for (offset, len) in freed {
                self.storage.discard(offset, len)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Writes the blocks of a window in which a refcount changes. Returns the ranges that were freed.
    fn window(&mut self, image: &Image, walk: &Walk, all: bool) -> Result<Vec<(u64, u64)>> {
        let layout = image.layout;
        let cluster_len = layout.cluster();
        let mut freed: Vec<(u64, u64)> = Vec::new();
        let mut block = Buffer::new(cluster_len);
        for found in walk.counts.differences() {
            let cluster = found.cluster;
            let references = found.references.min(layout.refcount_max());
            let wanted = match found.file > references {
                true => true,
                false => all && found.file < references,
            };
            let index = cluster >> layout.block_bits();
            let (true, Block::At(offset)) = (wanted, image.block(index)) else {
                continue;
            };
            block.open(self.storage, offset)?;
            let within = cluster & ((1 << layout.block_bits()) - 1);
            if let Some(at) = set_refcount(&layout, &mut block.bytes, within, references) {
                block.changed(at);
            }
            match found.file > references {
                true => self.leaks_fixed += 1,
                false => self.corruptions_fixed += 1,
            }
            if references == 0 {
                let at = cluster << layout.cluster_bits;
                let room = freed.len() < FREED_MAX;
                match freed.last_mut() {
                    Some((start, len)) if *start + *len == at => *len += cluster_len,
                    _ if room => freed.push((at, cluster_len)),
                    _ => {}
                }
            }
        }
        block.write(self.storage)?;
        Ok(freed)
    }

    fn mark_dirty(&self, image: &Image) -> Result<()> {
        if image.header.version < 3 {
            return Ok(());
        }
        patch_header(self.storage, |sector| {
            update(sector, 72, |bits| bits | features::DIRTY);
            update(sector, 88, |bits| bits & features::AUTOCLEAR_KNOWN);
        })
    }
}

/// Ends a repair: a sound image loses its dirty and corrupt bits, another keeps those it had.
fn settle(storage: &dyn Storage, image: &Image, sound: bool, was_dirty: bool) -> Result<()> {
    if image.header.version < 3 {
        return Ok(());
    }
    let cleared = match (sound, was_dirty) {
        (true, _) => features::DIRTY | features::CORRUPT,
        (false, false) => features::DIRTY,
        (false, true) => 0,
    };
    patch_header(storage, |sector| {
        update(sector, 72, |bits| bits & !cleared);
        update(sector, 88, |bits| bits & features::AUTOCLEAR_KNOWN);
    })
}

fn update(sector: &mut [u8; 512], at: usize, change: impl FnOnce(u64) -> u64) {
    if let Some((field, _)) = sector.get_mut(at..).and_then(<[u8]>::split_first_chunk_mut) {
        *field = change(u64::from_be_bytes(*field)).to_be_bytes();
    }
}

/// Changes the header's first sector, which is written whole or not at all, durably.
pub(super) fn patch_header(
    storage: &dyn Storage,
    change: impl FnOnce(&mut [u8; 512]),
) -> Result<()> {
    let mut sector = [0; 512];
    let there = storage.len()?.min(512) as usize;
    let (there, _) = sector.split_at_mut(there);
    storage.read_at(0, there)?;
    let before = sector;
    change(&mut sector);
    if sector == before {
        return Ok(());
    }
    storage.write_at(0, &sector)?;
    storage.sync()
}

/// A refcount block under change.
struct Buffer {
    bytes: Vec<u8>,
    offset: Option<u64>,
    changed: super::tables::Changed,
}

impl Buffer {
    fn new(len: u64) -> Self {
        Self {
            bytes: vec![0; len as usize],
            offset: None,
            changed: super::tables::Changed::new(len as usize),
        }
    }

    /// Makes it the block at `offset`, writing the one that it was.
    fn open(&mut self, storage: &dyn Storage, offset: u64) -> Result<()> {
        if self.offset == Some(offset) {
            return Ok(());
        }
        self.write(storage)?;
        storage.read_at(offset, &mut self.bytes)?;
        self.offset = Some(offset);
        Ok(())
    }

    fn changed(&mut self, at: usize) {
        self.changed.mark(at);
    }

    fn write(&mut self, storage: &dyn Storage) -> Result<()> {
        if let Some(offset) = self.offset {
            for sectors in self.changed.runs() {
                if let Some(part) = self.bytes.get(sectors.clone()) {
                    storage.write_at(offset + sectors.start as u64, part)?;
                }
            }
        }
        self.offset = None;
        self.changed = super::tables::Changed::new(self.bytes.len());
        Ok(())
    }
}
