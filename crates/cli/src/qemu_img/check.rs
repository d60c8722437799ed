//! `qemu-img check`.

use super::line::usage;
use super::open;
use super::spec::{Image, Output};
use super::value;
use crate::check::NO_CHECKS;
use crate::open::Access;
use crate::print;
use anyhow::{Result, anyhow};
use block::{Storage, plain};
use clap::Args;
use image::Format;
use serde_json::json;
use tool::check::{CheckOptions, Repair, Report, Severity};

/// `check`.
#[derive(Args, Debug)]
pub struct Check {
    /// quiet operations
    #[arg(short, long)]
    quiet: bool,
    /// image cache mode (writeback)
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// open image in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// repair particular aspect of the image
    #[arg(short, long, value_name = "leaks|all")]
    repair: Option<String>,
    #[command(flatten)]
    pub(super) image: Image,
}

/// Checks an image.
pub fn run(args: &Check) -> Result<u8> {
    let repair = match args.repair.as_deref() {
        None => Repair::No,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            return Err(usage(format!(
                "--repair (-r) expects 'leaks' or 'all' not '{other}'"
            )));
        }
    };
    let as_json = args.output.is_json()?;
    let file = args.image.file()?;
    open::cache(args.cache.as_deref(), "source cache")?;
    let name = args.image.spec.name(file);
    let access = match repair {
        Repair::No => Access::reading(args.force_share),
        _ => Access::Write,
    };
    let (mut storage, format) =
        open::shared_file(&name, access, args.force_share, &args.image.spec.objects)?;
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let could_not = |error: block::Error| {
        let why = open::explain(file, &error, access == Access::Write);
        anyhow!("Could not open '{file}': {why}")
    };
    let logged = has_log(&*storage, format).map_err(could_not)?;
    if logged && repair == Repair::No {
        return Err(anyhow!(
            "Could not open '{file}': VHDX image file '{file}' opened read-only, but contains a log that needs to be \
             replayed\nTo replay the log, run:\nqemu-img check -r all '{file}'"
        ));
    }
    open::need_key(&name, &*storage, format, &args.image.spec.objects)?;
    let report = match format {
        // Ours does: diskplane check. QEMU opens it before it says so.
        Format::Vhd => {
            image::vhd::Layout::read(&*storage).map_err(could_not)?;
            None
        }
        // It checks these, and repairs none.
        Format::Vdi | Format::Vmdk if repair != Repair::No => None,
        Format::Vmdk => {
            // With the lock that all of its files get.
            let path = storage.path().to_owned();
            drop(storage);
            let report = crate::check::vmdk_image(&path, access, &options)?;
            storage = crate::open::file(&path, Access::ReadUnlocked)?;
            Some(report)
        }
        _ => crate::check::of(&*storage, format, &options).map_err(could_not)?,
    };
    let Some(mut report) = report else {
        super::complain(&anyhow!("This image format does not support checks"));
        return Ok(NO_CHECKS);
    };
    for line in findings(&report, &*storage, format, repair) {
        eprintln!("{line}");
    }
    // QEMU tells of a file's end only in these formats, and of the clusters of others nothing.
    match format {
        Format::Qcow2 | Format::Parallels => {}
        Format::Qed => report.image_end_offset = 0,
        _ => {
            report.image_end_offset = 0;
            report.total_clusters = 0;
            report.allocated_clusters = 0;
            report.fragmented_clusters = 0;
        }
    }
    let repaired = report.leaks_fixed + report.corruptions_fixed > 0;
    if repaired && !as_json && !args.quiet {
        print(&format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} \
             corruptions\n\nDouble checking the fixed image now...\n",
            report.leaks_fixed, report.corruptions_fixed
        ))?;
    }
    if !args.quiet {
        print(&match as_json {
            true => value::json(&json_of(file, format, &report)),
            false => human(&report),
        })?;
    }
    if report.check_errors > 0 {
        return Err(anyhow!("Check failed"));
    }
    Ok(match report {
        Report {
            corruptions: 1.., ..
        } => 2,
        Report { leaks: 1.., .. } => 3,
        _ => 0,
    })
}

/// Whether the image has a log that is not in its place. QEMU reads no such image; our own check reads through the log.
fn has_log(storage: &dyn Storage, format: Format) -> block::Result<bool> {
    Ok(match format {
        Format::Vhdx => image::vhdx::Layout::read(storage)?.log_entries > 0,
        _ => false,
    })
}

/// What was found, as QEMU says it where it is the same thing: refcounts first, then flags.
fn findings(report: &Report, storage: &dyn Storage, format: Format, repair: Repair) -> Vec<String> {
    let cluster = match format {
        Format::Qcow2 => image::qcow2::Header::read(storage).map_or(0, |h| h.cluster_size()),
        _ => 0,
    };
    let (mut refcounts, mut others) = (Vec::new(), Vec::new());
    for finding in &report.findings {
        if finding.severity == Severity::Note {
            continue;
        }
        let text = finding.to_string();
        let repaired = match finding.severity {
            Severity::Leak => repair != Repair::No,
            _ => repair == Repair::All,
        };
        match in_qemus_words(&text, cluster, repaired) {
            Some((true, line)) => refcounts.push(line),
            Some((false, line)) => others.push(line),
            None => others.push(plain(&text)),
        }
    }
    refcounts.append(&mut others);
    refcounts
}

/// A finding about a refcount or a flag in QEMU's words, and whether it is the former.
fn in_qemus_words(text: &str, cluster: u64, repaired: bool) -> Option<(bool, String)> {
    let (severity, rest) = text.split_once(": ")?;
    let word = match (repaired, severity) {
        (true, _) => "Repairing",
        (false, "leak") => "Leaked",
        (false, _) => "ERROR",
    };
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    if let Some(rest) = rest.strip_prefix("cluster at ") {
        let (at, rest) = rest.split_once(" has refcount ")?;
        let (refcount, rest) = rest.split_once(", but ")?;
        let references = rest.strip_suffix(" references")?;
        let nth = number(at)?.checked_div(cluster)?;
        let line = format!("{word} cluster {nth} refcount={refcount} reference={references}");
        return Some((true, line));
    }
    let (place, refcount) = rest.split_once(" has a COPIED flag that denies refcount ")?;
    let (_, entry) = place.strip_suffix(')')?.rsplit_once('(')?;
    let entry = number(entry)?;
    let line = match place.strip_prefix("L1 entry ") {
        Some(nth) => format!(
            "{word} OFLAG_COPIED L2 cluster: l1_index={} l1_entry={entry:x} refcount={refcount}",
            nth.split_once(' ')?.0
        ),
        None => format!("{word} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"),
    };
    Some((false, line))
}

fn json_of(file: &str, format: Format, report: &Report) -> serde_json::Value {
    let mut value = json!({
        "filename": file,
        "format": format.qemu_name(),
        "check-errors": report.check_errors,
    });
    let counts = [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("image-end-offset", report.image_end_offset),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    if let Some(object) = value.as_object_mut() {
        for (name, count) in counts.iter().filter(|(_, count)| *count != 0) {
            object.insert((*name).to_owned(), (*count).into());
        }
    }
    value
}

fn human(report: &Report) -> String {
    let mut text = String::new();
    let found = [
        (
            report.corruptions,
            "errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
        ),
        (
            report.leaks,
            "leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
        ),
        (
            report.check_errors,
            "internal errors have occurred during the check.",
        ),
    ];
    for (count, what) in found.iter().filter(|(count, _)| *count > 0) {
        text.push_str(&format!("\n{count} {what}\n"));
    }
    if text.is_empty() {
        text.push_str("No errors were found on the image.\n");
    }
    let (total, allocated) = (report.total_clusters, report.allocated_clusters);
    if total != 0 && allocated != 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        text.push_str(&format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        ));
    }
    if report.image_end_offset != 0 {
        text.push_str(&format!("Image end offset: {}\n", report.image_end_offset));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_said_as_qemu_says_them() {
        for (text, repaired, line) in [
            (
                "error: cluster at 0x50000 has refcount 0, but 1 references",
                false,
                Some("ERROR cluster 5 refcount=0 reference=1"),
            ),
            (
                "leak: cluster at 0x40000 has refcount 2, but 1 references",
                false,
                Some("Leaked cluster 4 refcount=2 reference=1"),
            ),
            (
                "leak: cluster at 0x40000 has refcount 2, but 1 references",
                true,
                Some("Repairing cluster 4 refcount=2 reference=1"),
            ),
            (
                "error: L2 table at 0x40000: entry 0 (0x8000000000050000) has a COPIED flag that denies refcount 0",
                false,
                Some("ERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=0"),
            ),
            (
                "error: L1 entry 3 (0x40000) has a COPIED flag that denies refcount 1",
                true,
                Some("Repairing OFLAG_COPIED L2 cluster: l1_index=3 l1_entry=40000 refcount=1"),
            ),
            ("error: something else", false, None),
        ] {
            let found = in_qemus_words(text, 65536, repaired).map(|(_, line)| line);
            assert_eq!(found.as_deref(), line, "{text}");
        }
    }
}
