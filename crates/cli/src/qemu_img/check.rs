//! `qemu-img check`.

use super::line::usage;
use super::open::{self, Header};
use super::refused::{self, Purpose};
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
use tool::check::{CheckOptions, Fact, Finding, Repair, Report, Severity};

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
    let (storage, format) =
        open::shared_file(&name, access, args.force_share, &args.image.spec.objects)?;
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let could_not = |error: block::Error| {
        let header = Some(Header {
            format,
            window: None,
        });
        let why = open::explain(file, &error, header, access == Access::Write);
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
    // Of what is opened to be checked much is told by the check.
    if format == Format::Qcow2
        && let Some(why) = refused::by_header(&*storage, format, Purpose::Check)
    {
        return Err(anyhow!("Could not open '{file}': {why}"));
    }
    let report = match format {
        // Ours does: diskplane check. QEMU opens it before it says so.
        Format::Vhd => {
            image::vhd::Layout::read(&*storage).map_err(could_not)?;
            None
        }
        Format::Qcow => {
            image::qcow::Header::read(&*storage).map_err(could_not)?;
            None
        }
        // It checks these, and repairs none.
        Format::Vdi | Format::Vmdk if repair != Repair::No => None,
        Format::Vmdk => {
            // With the lock that all of its files get.
            let path = storage.path().to_owned();
            drop(storage);
            let checked = crate::check::vmdk_image(&path, access, &options);
            Some(
                checked.map_err(|error| match error.downcast::<block::Error>() {
                    Ok(own) => could_not(own),
                    Err(other) => other,
                })?,
            )
        }
        _ => crate::check::of(&*storage, format, &options).map_err(could_not)?,
    };
    let Some(mut report) = report else {
        super::complain(&anyhow!("This image format does not support checks"));
        return Ok(NO_CHECKS);
    };
    for line in findings(&report, repair) {
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

/// What was found and repaired, as QEMU says it where it is the same thing: what tables say, refcounts, flags.
pub fn findings(report: &Report, repair: Repair) -> Vec<String> {
    let (mut lines, mut refcounts, mut flags) = (Vec::new(), Vec::new(), Vec::new());
    let mut repaired = Vec::new();
    for finding in &report.findings {
        match finding.fact {
            // QEMU does not know the second.
            _ if matches!(finding.severity, Severity::Note | Severity::CutOff) => {}
            Some(Fact::Refcount { .. }) => {
                refcounts.extend(said(finding, false));
                let repairs = match finding.severity {
                    Severity::Leak => repair != Repair::No,
                    _ => repair == Repair::All,
                };
                // What is left is told a second time.
                repaired.extend(said(finding, repairs));
            }
            // Which of them are repaired is known later.
            Some(Fact::L1Copied { .. } | Fact::L2Copied { .. }) => {
                flags.extend(said(finding, false).filter(|_| repair == Repair::No));
            }
            _ => lines.push(said(finding, false).unwrap_or_else(|| plain(&finding.to_string()))),
        }
    }
    lines.append(&mut refcounts);
    match &report.rebuilt {
        Some(freed) => {
            lines.push("Rebuilding refcount structure".to_owned());
            let freed = freed.iter();
            lines.extend(freed.map(|n| format!("Repairing cluster {n} refcount=1 reference=0")));
        }
        None if repair != Repair::No => lines.append(&mut repaired),
        None => {}
    }
    flags.extend(report.flags_repaired.iter().filter_map(|f| said(f, true)));
    lines.append(&mut flags);
    lines
}

/// A finding in QEMU's words, where it has any; `repairing`: while it is repaired.
fn said(finding: &Finding, repairing: bool) -> Option<String> {
    let word = match (repairing, finding.severity) {
        (true, _) => "Repairing",
        (false, Severity::Leak) => "Leaked",
        (false, _) => "ERROR",
    };
    Some(match finding.fact? {
        Fact::Refcount {
            cluster,
            refcount,
            references,
        } => format!("{word} cluster {cluster} refcount={refcount} reference={references}"),
        Fact::L1Copied {
            index,
            entry,
            refcount,
        } => format!(
            "{word} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
        ),
        Fact::L2Copied { entry, refcount } => {
            format!("{word} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
        }
        Fact::Overflow { offset } => format!(
            "ERROR: overflow cluster offset={offset:#x}\nUse qemu-img amend to increase the refcount entry width or \
             qemu-img convert to create a clean copy if the image cannot be opened for writing"
        ),
        Fact::Beyond { offset, len } => format!(
            "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset \
             {offset:#x} size {len:#x}"
        ),
    })
}

/// For commands that write: as QEMU, which looks at no data file.
pub const MEND: disk::chain::Repair = disk::chain::Repair {
    image: mend,
    data_file: None,
};

/// Brings an image that was not closed cleanly in order before it is written to, and says so as QEMU does.
/// Brings an image that was not closed cleanly in order, and says what was wrong as QEMU does.
pub fn mend(storage: &dyn Storage, format: Format) -> block::Result<()> {
    if format != Format::Qcow2 {
        return crate::check::mend(storage, format);
    }
    if let Some(report) = tool::check::mend_dirty(storage)? {
        for line in findings(&report, Repair::All) {
            eprintln!("{line}");
        }
    }
    Ok(())
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
