//! `qemu-img check`.

use super::line::{self, usage};
use super::open::{self, Name};
use super::value;
use crate::check::NO_CHECKS;
use crate::open::Access;
use crate::print;
use crate::secret::Objects;
use anyhow::{Result, anyhow};
use block::plain;
use clap::Args;
use image::Format;
use serde_json::json;
use tool::check::{CheckOptions, Repair, Report};

/// `check`.
#[derive(Args, Debug)]
pub struct Check {
    /// quiet operations
    #[arg(short, long)]
    quiet: bool,
    /// specifies format of the image explicitly
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// indicates that FILENAME is a complete image specification instead of a file name
    #[arg(long)]
    image_opts: bool,
    /// image cache mode (writeback)
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// open image in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    /// output format
    #[arg(long, value_name = "human|json")]
    output: Option<String>,
    /// repair particular aspect of the image
    #[arg(short, long, value_name = "leaks|all")]
    repair: Option<String>,
    #[command(flatten)]
    objects: Objects,
    /// the image file (or image specification) to operate on
    #[arg(value_name = "FILENAME")]
    files: Vec<String>,
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
    let as_json = line::is_json(args.output.as_deref())?;
    let file = line::one(&args.files, "Expecting one image file name")?;
    open::cache(args.cache.as_deref(), "source cache")?;
    let name = Name {
        text: file,
        format: args.format.as_deref(),
        image_opts: args.image_opts,
    };
    let access = match repair {
        Repair::No => Access::reading(args.force_share),
        _ => Access::Write,
    };
    let (storage, format) = open::file(&name, access, &args.objects)?;
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let could_not =
        |error: block::Error| anyhow!("Could not open '{file}': {}", open::explain(file, &error));
    let report = crate::check::of(&*storage, format, &options).map_err(could_not)?;
    let Some(mut report) = report else {
        super::complain(&anyhow!("This image format does not support checks"));
        return Ok(NO_CHECKS);
    };
    for finding in &report.findings {
        eprintln!("{}", plain(&finding.to_string()));
    }
    // QEMU tells of a file's end only in these formats, and of a VDI image's blocks nothing.
    match format {
        Format::Qcow2 | Format::Parallels => {}
        Format::Vdi => {
            report.image_end_offset = 0;
            report.total_clusters = 0;
            report.allocated_clusters = 0;
            report.fragmented_clusters = 0;
        }
        _ => report.image_end_offset = 0,
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
