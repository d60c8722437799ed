//! Checking a Parallels image: what `qemu-img check` looks at.
//!
//! Each entry of the BAT leads to a cluster within the file that no other one leads to; the data begin where they can; the
//! image was closed. Space behind the last cluster is lost. Nothing is repaired: such images are for reading only.
//!
//! # Memory
//!
//! 8 bytes for each cluster that is there, at most the budget.

use super::tally::{Severity, Tally};
use super::{CheckOptions, Repair, Report};
use block::{Error, Result, Storage};
use image::parallels::{HEADER_BYTES, Header, Place};

/// Checks the Parallels image in `storage`.
///
/// # Errors
///
/// `Corrupt` and `Unsupported` where the header does not say what the image is, `Unsupported` for a repair of what is not sound
/// and for an image that takes more memory than it may; what reading fails with.
pub fn check(storage: &dyn Storage, options: &CheckOptions) -> Result<Report> {
    let header = Header::read(storage)?;
    let refuse = |why: String| Error::unsupported(why).within(storage.name());
    let mut tally = Tally::default();
    if header.in_use {
        tally.found(Severity::Corruption, 1, || {
            "the image was not closed correctly: it is marked as in use at byte 44".to_owned()
        });
    }
    let sound = header.data_offset_is_sound();
    if !sound {
        let at = header.data_offset;
        tally.found(Severity::Corruption, 1, || {
            format!("where the data begin, at byte 48, is {at:#x}, which cannot be")
        });
    }
    let base = header.data_begin();
    let cluster_bytes = header.cluster_bytes;
    let mut there: Vec<(u32, u32)> = Vec::new();
    let (mut previous, mut too_many, mut end) = (None, false, base);
    header.each_entry(storage, |cluster, entry| {
        let place = || {
            let at = HEADER_BYTES as u64 + u64::from(cluster) * 4;
            format!("cluster {cluster}: its entry at byte {at:#x} is {entry}")
        };
        let at = match header.place(u64::from(cluster), entry) {
            // As QEMU counts: what follows a cluster of zeros is no fragment.
            Place::Zero => {
                previous = None;
                return;
            }
            Place::At(at) => at,
            Place::Nowhere(why) => {
                tally.found(Severity::Corruption, 1, || {
                    format!("{}: it is outside the image: {why}", place())
                });
                return;
            }
        };
        tally.allocated += 1;
        if previous.is_some_and(|previous: u64| previous + cluster_bytes != at) {
            tally.fragmented += 1;
        }
        previous = Some(at);
        end = end.max(at + cluster_bytes);
        if sound && (at < base || !(at - base).is_multiple_of(cluster_bytes)) {
            tally.found(Severity::Corruption, 1, || {
                format!("{}: no cluster can begin there", place())
            });
        }
        match (there.len() as u64 + 1) * 8 > options.budget_bytes {
            true => too_many = true,
            false => there.push((entry, cluster)),
        }
    })?;
    if too_many {
        let budget = options.budget_bytes;
        return Err(refuse(format!(
            "{budget} bytes of memory do not suffice to check it: give it more memory"
        )));
    }
    there.sort_unstable();
    for pair in there.windows(2) {
        if let [(a, first), (b, second)] = pair
            && a == b
        {
            tally.overlaps += 1;
            tally.found(Severity::Corruption, 1, || {
                format!(
                    "duplicate offset in the BAT: clusters {first} and {second} have the entry {a}"
                )
            });
        }
    }
    if header.extension_offset > 0 {
        // Its own clusters and those that it refers to are not told apart from lost ones.
        end = end.max(header.file_bytes);
    }
    if header.file_bytes > end {
        let over = header.file_bytes - end;
        tally.found(Severity::Leak, over.div_ceil(cluster_bytes), || {
            format!("space leaked at the end of the image: {over} bytes")
        });
    }
    let wrong = tally.errors() + tally.leaks > 0;
    if wrong && options.repair != Repair::No {
        let why = "parallels images are for reading only, and not repaired: convert it into another format";
        return Err(refuse(why.to_owned()));
    }
    Ok(Report {
        corruptions: tally.errors(),
        leaks: tally.leaks,
        check_errors: tally.check_errors,
        overlaps: tally.overlaps,
        image_end_offset: end,
        total_clusters: u64::from(header.entries),
        allocated_clusters: tally.allocated,
        fragmented_clusters: tally.fragmented,
        walks: 1,
        findings: tally.findings,
        findings_left_out: tally.findings_left_out,
        ..Report::default()
    })
}
