//! Checking a VHDX image. QEMU's check of the format puts the log in place and looks at nothing else.
//!
//! Both headers, both copies of the region table, the log, the block table (each block within the file, none on a table or
//! on another, states that such an image can have), the names of a parent, and space that nothing refers to.
//!
//! A repair puts the log in place, cuts off what is behind the last block, writes a damaged header, and (`all`) a region
//! table from its other copy. Nothing else can be repaired without a guess: what the table says is said once.
//!
//! # Memory
//!
//! 16 bytes for each block that is there, at most the budget, and what an opened image has.

use super::tally::{Severity, Tally};
use super::{CheckOptions, Repair, Report};
use block::{Error, Result, Storage};
use image::vhdx::{BlockPlace, Layout, Metadata, repair};

/// Bytes behind the tables that QEMU leaves free in each new image.
const ROOM_BYTES: u64 = 4 << 20;

/// Checks the VHDX image in `storage`, and repairs it as `options` say.
///
/// # Errors
///
/// `Corrupt` and `Unsupported` where headers, log, regions and metadata do not say what the image is, and for one that
/// takes more memory than it may; what reading and writing fails with.
pub fn check(storage: &dyn Storage, options: &CheckOptions) -> Result<Report> {
    let Inspected {
        report: first,
        repairable,
        logged,
    } = inspect(storage, options.budget_bytes)?;
    let something = first.corruptions + first.leaks > 0 || logged.is_some();
    let wanted = match options.repair {
        Repair::No => false,
        Repair::Leaks => first.corruptions == 0 && something,
        // Whatever else is wrong stays as it is, and bars the repair of what depends on it.
        Repair::All => first.corruptions == repairable && something,
    };
    if !wanted || !repair(storage, options.repair == Repair::All)? {
        return Ok(first);
    }
    let again = inspect(storage, options.budget_bytes)?.report;
    // A log that was put in place counts as one, as in QEMU.
    let logs = u64::from(logged.is_some_and(|entries| entries > 0));
    Ok(Report {
        corruptions_fixed: first.corruptions.saturating_sub(again.corruptions) + logs,
        leaks_fixed: first.leaks.saturating_sub(again.leaks),
        findings: first.findings,
        findings_left_out: first.findings_left_out,
        ..again
    })
}

/// A range of the file that something has: its beginning, its end, and what for people.
type Taken = (u64, u64, Option<u64>);

/// What an inspection found.
struct Inspected {
    report: Report,
    /// How many of the errors a repair takes away.
    repairable: u64,
    /// Of an image that was not closed: how many entries of its log are not in their places.
    logged: Option<usize>,
}

/// What is wrong.
fn inspect(storage: &dyn Storage, budget: u64) -> Result<Inspected> {
    let layout = Layout::read(storage)?;
    let mut tally = Tally::default();
    let mut repairable = 0;
    if let Some((_, damaged)) = &layout.regions.damaged {
        repairable += 1;
        tally.found(Severity::Corruption, 1, || damaged.clone());
    }
    if let Some(damaged) = &layout.headers.damaged {
        // So it may be after a crash; the other serves.
        tally.found(Severity::Leak, 1, || damaged.clone());
    }
    let logged = layout.is_open().then_some(layout.log_entries);
    if let Some(entries) = logged {
        // Nothing is wrong: who reads it sees it as if they were in place.
        tally.found(Severity::Note, 1, || {
            format!(
                "log: it was not closed cleanly: the next writer puts {entries} entries in their places, and gives back \
                 what was reserved behind the last block"
            )
        });
    }
    if let Some(parent) = &layout.metadata.parent {
        if let Err(error) = parent.linkages() {
            tally.found(Severity::Corruption, 1, || error.to_string());
        }
        if parent.names().is_empty() {
            tally.found(Severity::Corruption, 1, || {
                "no name of the parent can be read".to_owned()
            });
        }
    }
    let mut taken: Vec<Taken> = Vec::new();
    let (mut too_many, mut last_end) = (false, None);
    layout.blocks(storage, |place: &BlockPlace| {
        let at = place.entry_at;
        if let Some(fault) = &place.fault {
            tally.overlaps += u64::from(place.on_tables);
            tally.found(Severity::Corruption, 1, || {
                format!("{}: its entry at byte {at:#x} {fault}", place.what())
            });
        }
        if place.block.is_some() {
            tally.allocated += 1;
            if last_end.is_some_and(|end| end != place.offset) {
                tally.fragmented += 1;
            }
            last_end = Some(place.offset + place.len);
        }
        if (taken.len() as u64 + 1) * 24 > budget {
            too_many = true;
        } else if place.len > 0 {
            taken.push((place.offset, place.offset + place.len, Some(at)));
        }
    })?;
    if too_many {
        return Err(Error::unsupported(format!(
            "{}: {budget} bytes of memory do not suffice to check it: give it more memory",
            storage.name()
        )));
    }
    let used_end = layout.used_end(taken.iter().fold(0, |end, (_, to, _)| end.max(*to)));
    taken.extend(layout.tables().into_iter().map(|t| (t.start, t.end, None)));
    let end = match logged {
        // What its last writer reserved is no leak before the log is put in place.
        Some(_) => used_end,
        None => layout.file_bytes.max(used_end),
    };
    taken.push((end, u64::MAX, None));
    taken.sort_unstable();
    spaces(&taken, &layout.metadata, &mut tally);
    let mut report = Report {
        corruptions: tally.errors(),
        leaks: tally.leaks,
        check_errors: tally.check_errors,
        overlaps: tally.overlaps,
        image_end_offset: used_end,
        total_clusters: layout.metadata.blocks(),
        allocated_clusters: tally.allocated,
        fragmented_clusters: tally.fragmented,
        walks: 1,
        ..Report::default()
    };
    report.findings = tally.findings;
    report.findings_left_out = tally.findings_left_out;
    Ok(Inspected {
        report,
        repairable,
        logged,
    })
}

/// Looks for blocks that overlap, and for space between what is in use in which a block would have room.
fn spaces(taken: &[Taken], metadata: &Metadata, tally: &mut Tally) {
    // A fixed image has the space of all of its blocks, also of those that its entries call zeros: so QEMU makes it.
    let (block_bytes, fixed) = (metadata.block_bytes, metadata.fixed);
    let (mut end, mut of): (u64, Option<u64>) = (0, None);
    for (from, to, entry) in taken {
        // Behind the tables, QEMU leaves some room.
        let room = if of.is_none() { ROOM_BYTES } else { 0 };
        if *from < end {
            // Of a block on a table the table's entry has been told.
            if let (Some(first), Some(second)) = (of, *entry) {
                tally.overlaps += 1;
                tally.found(Severity::Corruption, 1, || {
                    format!(
                        "the blocks of the entries at bytes {first:#x} and {second:#x} overlap at byte {from:#x}"
                    )
                });
            }
        } else if !fixed && from - end >= block_bytes && from - end > room {
            let count = (from - end) / block_bytes;
            tally.found(Severity::Leak, count, || {
                format!("bytes {end:#x} to {from:#x} of the file: nothing refers to them")
            });
        }
        if *to > end {
            (end, of) = (*to, *entry);
        }
    }
}
