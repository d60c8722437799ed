//! Checking a VHD image: what `vhd-util check` looks at; QEMU has no check for the format.
//!
//! Both footers, the header, the block table (each block within the file, none on a table or on another), the names of
//! a parent, and the batmap against the bitmaps.
//!
//! A repair writes a footer that is missing or damaged from the other one, and cuts off what a writer that was killed had
//! reserved behind the last block. Nothing else can be repaired without a guess: what the table says is said once.
//!
//! # Memory
//!
//! 8 bytes for each block that is there, at most the budget, and 4 for each of the disk's: 2040 GiB in blocks of 2 MiB
//! take 12 MiB.

use super::tally::{Severity, Tally};
use super::{CheckOptions, Repair, Report};
use block::{Error, Result, Storage};
use image::vhd::{DiskType, FOOTER_BYTES, Layout, mend};

/// An entry of a block that is not there.
const NONE: u32 = u32::MAX;

/// Checks the VHD image in `storage`, and repairs it as `options` say.
///
/// # Errors
///
/// `Corrupt` and `Unsupported` where footer and header do not say what the image is, and for one that takes more memory
/// than it may; what reading and writing fails with.
pub fn check(storage: &dyn Storage, options: &CheckOptions) -> Result<Report> {
    let (first, repairable) = inspect(storage, options.budget_bytes)?;
    let wanted = match options.repair {
        Repair::No => false,
        Repair::Leaks => first.corruptions == 0 && first.leaks > 0,
        // Whatever else is wrong stays as it is, and bars the repair of what depends on it.
        Repair::All => first.corruptions == repairable && first.corruptions + first.leaks > 0,
    };
    if !wanted || mend(storage)?.is_none() {
        return Ok(first);
    }
    let (again, _) = inspect(storage, options.budget_bytes)?;
    Ok(Report {
        corruptions_fixed: first.corruptions.saturating_sub(again.corruptions),
        leaks_fixed: first.leaks.saturating_sub(again.leaks),
        findings: first.findings,
        findings_left_out: first.findings_left_out,
        ..again
    })
}

/// What is wrong, and how many of the errors a repair takes away.
fn inspect(storage: &dyn Storage, budget: u64) -> Result<(Report, u64)> {
    let layout = Layout::read(storage)?;
    let mut tally = Tally::default();
    let mut repairable = 0;
    if let Some(damaged) = &layout.copy_damaged {
        repairable += 1;
        tally.found(Severity::Corruption, 1, || {
            format!("the footer's copy is damaged, which QEMU needs: {damaged}")
        });
    }
    for fault in &layout.parent_faults {
        tally.found(Severity::Corruption, 1, || fault.clone());
    }
    if layout.footer.disk_type == DiskType::Differencing && layout.parent_names.is_empty() {
        tally.found(Severity::Corruption, 1, || {
            "no name of the parent can be read".to_owned()
        });
    }
    let (span, bitmap) = layout.block_span();
    let blocks = match span - bitmap {
        0 => 0,
        bytes => layout.disk_bytes.div_ceil(bytes),
    };
    let mut there: Vec<(u32, u32)> = Vec::new();
    let mut too_many = false;
    layout.entries(storage, |index, entry| {
        if entry == NONE {
            return;
        }
        if (there.len() as u64 + 1) * 8 > budget {
            too_many = true;
            return;
        }
        // Tables have fewer entries than 2^32.
        there.push((entry, index as u32));
    })?;
    if too_many {
        return Err(Error::unsupported(format!(
            "{}: {budget} bytes of memory do not suffice to check it: give it more memory",
            storage.name()
        )));
    }
    let mut last_end = None;
    for (entry, index) in &there {
        let at = u64::from(*entry) * 512;
        let place = || format!("block {index}: its entry is {entry}, byte {at:#x}");
        if u64::from(*index) >= blocks {
            tally.found(Severity::Leak, 1, || {
                format!("{}: the disk has {blocks} blocks", place())
            });
        }
        if at + span > layout.file_bytes {
            tally.found(Severity::Corruption, 1, || {
                format!(
                    "{}: it ends behind the file, at byte {:#x}",
                    place(),
                    at + span
                )
            });
        }
        if layout.is_taken(at, span) {
            tally.overlaps += 1;
            tally.found(Severity::Corruption, 1, || {
                format!(
                    "{}: it lies on the image's tables or its parent's names",
                    place()
                )
            });
        }
        // What aligns the next one is no fragment.
        if last_end.is_some_and(|end: u64| at < end || at - end > 4096) {
            tally.fragmented += 1;
        }
        last_end = Some(at + span);
    }
    tally.allocated = there.len() as u64;
    batmap(storage, &layout, &there, &mut tally)?;
    there.sort_unstable();
    for pair in there.windows(2) {
        let [(a, first), (b, second)] = pair else {
            continue;
        };
        if u64::from(b - a) * 512 < span {
            tally.overlaps += 1;
            tally.found(Severity::Corruption, 1, || {
                format!("blocks {first} and {second}, at sectors {a} and {b}, overlap: each has {} sectors", span / 512)
            });
        }
    }
    let blocks_end = there
        .last()
        .map_or(0, |(entry, _)| u64::from(*entry) * 512 + span);
    let used_end = layout.used_end(blocks_end);
    if let Some(damaged) = &layout.end_damaged {
        // So it is after every crash; the copy serves.
        tally.found(Severity::Leak, 1, || {
            format!("the footer at the end of the file is missing: it was not closed cleanly ({damaged})")
        });
    }
    let mut report = Report {
        corruptions: tally.errors(),
        leaks: tally.leaks,
        check_errors: tally.check_errors,
        overlaps: tally.overlaps,
        image_end_offset: match layout.header {
            Some(_) => used_end + FOOTER_BYTES as u64,
            None => layout.file_bytes,
        },
        total_clusters: blocks,
        allocated_clusters: tally.allocated,
        fragmented_clusters: tally.fragmented,
        walks: 1,
        ..Report::default()
    };
    report.findings = tally.findings;
    report.findings_left_out = tally.findings_left_out;
    Ok((report, repairable))
}

/// Compares the batmap with the bitmaps: XenServer's tools look at no bitmap where the batmap has a bit.
fn batmap(
    storage: &dyn Storage,
    layout: &Layout,
    there: &[(u32, u32)],
    tally: &mut Tally,
) -> Result<()> {
    let Some(batmap) = &layout.batmap else {
        return Ok(());
    };
    if let Err(fault) = &batmap.map {
        tally.found(Severity::Corruption, 1, || fault.clone());
        return Ok(());
    }
    let (span, bitmap_bytes) = layout.block_span();
    let sectors = (span - bitmap_bytes) / 512;
    let mut bitmap = vec![0; bitmap_bytes as usize];
    for (entry, index) in there {
        let at = u64::from(*entry) * 512;
        if !batmap.has(u64::from(*index)) || at + bitmap_bytes > layout.file_bytes {
            continue;
        }
        storage.read_at(at, &mut bitmap)?;
        let start = u64::from(*index) * sectors;
        // The last block may be there in part.
        let mine = (layout.disk_bytes / 512).saturating_sub(start).min(sectors);
        let set = |sector: u64| {
            let byte = bitmap.get((sector / 8) as usize).copied().unwrap_or(0);
            byte << (sector % 8) & 0x80 != 0
        };
        if let Some(absent) = (0..mine).find(|sector| !set(*sector)) {
            tally.found(Severity::Corruption, 1, || {
                format!("block {index}: the batmap says that it is whole, its bitmap has no bit for sector {absent}")
            });
        }
    }
    Ok(())
}
