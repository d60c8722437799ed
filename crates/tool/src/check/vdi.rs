//! Checking a VDI image: what `qemu-img check` looks at, and what it has no check for.
//!
//! Each entry of the map names a block within the file, of a number that the disk can have and no other entry has; and the
//! header counts the blocks. Where it counts more than there are, numbers are left out, or a resize that was cut off has
//! given blocks numbers behind the map's length, space is lost and nothing else: so it is after a crash. (QEMU calls the
//! first and the last errors.) Where it counts fewer, the next block that QEMU or VirtualBox
//! adds would lie on another.
//!
//! A block that is not within the file bars a repair: nobody knows where its data are.
//!
//! A repair counts anew, brings blocks together where numbers were left out, and gives blocks that share one place a place
//! each, with the same bytes. Nothing that the disk reads as changes.
//!
//! # Memory
//!
//! A bit for each block of the disk, at most 4 MiB; twice that when a repair writes.

use super::tally::{Severity, Tally};
use super::{CheckOptions, Repair, Report};
use block::{Result, Storage};
use image::vdi::{Layout, ZERO, mend, repair};

/// Checks the VDI image in `storage`, and repairs it as `options` say.
///
/// # Errors
///
/// `Corrupt` and `Unsupported` where the header does not say what the image is; what reading and writing fails with.
pub fn check(storage: &dyn Storage, options: &CheckOptions) -> Result<Report> {
    let first = inspect(storage)?;
    let found = &first.report;
    let wanted = match options.repair {
        Repair::No => false,
        Repair::Leaks => found.corruptions == 0 && found.leaks > 0,
        // Blocks that the file does not have bar all else.
        Repair::All => first.outside == 0 && found.corruptions + found.leaks > 0,
    };
    if !wanted {
        return Ok(first.report);
    }
    match first.scattered || found.corruptions > 0 {
        true => repair(storage)?,
        false => drop(mend(storage)?),
    }
    let first = first.report;
    let again = inspect(storage)?.report;
    Ok(Report {
        corruptions_fixed: first.corruptions.saturating_sub(again.corruptions),
        leaks_fixed: first.leaks.saturating_sub(again.leaks),
        findings: first.findings,
        findings_left_out: first.findings_left_out,
        ..again
    })
}

struct Found {
    report: Report,
    /// Blocks that are not within the file.
    outside: u64,
    /// There are numbers between the blocks that none has.
    scattered: bool,
}

fn inspect(storage: &dyn Storage) -> Result<Found> {
    let layout = Layout::read(storage)?;
    let header = &layout.header;
    let mut tally = Tally::default();
    let numbers = header.numbers();
    let mut used = vec![0u64; u64::from(numbers).div_ceil(64) as usize];
    let (mut outside, mut numbered, mut moved, mut end) = (0, 0, 0u64, 0u64);
    let mut last: Option<u32> = None;
    let disk_blocks = header.disk_bytes.div_ceil(u64::from(header.block_bytes));
    layout.entries(storage, |block, entry| {
        if entry >= ZERO {
            return;
        }
        let place = || {
            let at = header.entry_offset(u64::from(block));
            format!("block {block}: its entry at byte {at:#x} is {entry}")
        };
        tally.allocated += 1;
        if last.is_some_and(|last| last.checked_add(1) != Some(entry)) {
            tally.fragmented += 1;
        }
        last = Some(entry);
        if u64::from(block) >= disk_blocks {
            tally.found(Severity::Leak, 1, || {
                format!("{}: the disk has {disk_blocks} blocks", place())
            });
        }
        let block_end = header.block_offset(u64::from(entry) + 1);
        if block_end > layout.file_bytes {
            outside += 1;
            tally.found(Severity::Corruption, 1, || {
                format!(
                    "{}: it ends behind the file, at byte {block_end:#x}: convert --salvage reads the others",
                    place()
                )
            });
        }
        // One that can be neither says nothing of the others.
        if block_end <= layout.file_bytes || entry < numbers {
            end = end.max(u64::from(entry) + 1);
            numbered += 1;
        }
        let word = used.get_mut((entry / 64) as usize);
        if (header.blocks..numbers).contains(&entry) {
            moved += 1;
        }
        match word.filter(|_| entry < numbers) {
            None => tally.found(Severity::Corruption, 1, || {
                format!(
                    "{}: too large, the map has {} entries",
                    place(),
                    header.blocks
                )
            }),
            Some(word) if *word >> (entry % 64) & 1 == 1 => {
                tally.overlaps += 1;
                tally.found(Severity::Corruption, 1, || {
                    format!("{}: another block has it too", place())
                });
            }
            Some(word) => *word |= 1 << (entry % 64),
        }
    })?;
    let counted = u64::from(header.allocated);
    if counted < end {
        tally.found(Severity::Corruption, 1, || {
            format!(
                "allocated blocks mismatch: the header at byte 0x184 counts {counted}, and the last one is number {}: the \
                 next one would lie on another",
                end - 1
            )
        });
    }
    if moved > 0 {
        tally.found(Severity::Leak, moved, || {
            format!(
                "{moved} blocks have numbers that the map of {} entries is too short for: a resize was cut off, the next \
                 writer moves them back",
                header.blocks
            )
        });
    }
    let lost = end.saturating_sub(numbered - tally.overlaps);
    let scattered = lost > 0 || moved > 0;
    if lost > 0 {
        tally.found(Severity::Leak, lost, || {
            format!("{lost} numbers below {end} are no block's: their space in the file is lost")
        });
    }
    if counted > end {
        tally.found(Severity::Leak, counted - end, || {
            format!("allocated blocks mismatch: the header at byte 0x184 counts {counted}, there are {end}")
        });
    }
    let used_end = header.block_offset(end);
    if layout.file_bytes > used_end && outside == 0 {
        let over = layout.file_bytes - used_end;
        let blocks = over.div_ceil(u64::from(header.block_bytes));
        // What the header counts has been said.
        if blocks > counted.saturating_sub(end) {
            tally.found(Severity::Leak, 1, || {
                format!("{over} bytes lie behind the last block: it was not closed cleanly")
            });
        }
    }
    let report = Report {
        corruptions: tally.errors(),
        leaks: tally.leaks,
        check_errors: tally.check_errors,
        overlaps: tally.overlaps,
        image_end_offset: used_end,
        total_clusters: disk_blocks,
        allocated_clusters: tally.allocated,
        fragmented_clusters: tally.fragmented,
        walks: 1,
        findings: tally.findings,
        findings_left_out: tally.findings_left_out,
        ..Report::default()
    };
    Ok(Found {
        report,
        outside,
        scattered,
    })
}
