//! `diskplane check`.
//!
//! Numbers and exit codes are those of `qemu-img check`. With `--json` an object; fields, as in
//! `qemu-img check --output=json` (which leaves out all but the first three where they are 0):
//!
//! | field | |
//! |---|---|
//! | `filename`, `format` | as given; `qcow2`, `qed`, `vhd`, `vhdx`, `vdi`, `parallels`, `vmdk` |
//! | `check-errors` | things that could not be checked |
//! | `image-end-offset` | where the last cluster in use ends |
//! | `corruptions`, `leaks` | what is wrong; absent where nothing is, as all below |
//! | `corruptions-fixed`, `leaks-fixed` | what was repaired |
//! | `total-clusters`, `allocated-clusters`, `fragmented-clusters`, `compressed-clusters` | of the guest's disk |
//! | `overlaps` | ours: clusters that two things use which must not share one |
//! | `cut-off` | ours: tables and clusters that the file ends before, or within: what was in the rest is lost |
//! | `findings` | ours: array of strings, what was found, at most 1000 |
//! | `findings-left-out` | ours: how many more there are |

use crate::args::{self, Repair};
use crate::open::{self, Access};
use crate::print;
use anyhow::{Result, bail};
use block::{Storage, plain};
use disk::chain::{Below, ChainOptions};
use image::Format;
use image::qcow2::{Header, features};
use io::File;
use serde::Serialize;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tool::check::{CheckOptions, Report, check, parallels, qed, vdi, vhd, vhdx, vmdk};

/// As `qemu-img check`: the format has no metadata that could be wrong.
pub const NO_CHECKS: u8 = 63;
/// Findings that people get to see; with `--json` there are more.
const SHOWN_MAX: usize = 50;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    filename: String,
    format: &'static str,
    check_errors: u64,
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    overlaps: u64,
    #[serde(skip_serializing_if = "is_zero")]
    cut_off: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    findings: Vec<String>,
    #[serde(skip_serializing_if = "is_zero")]
    findings_left_out: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Checks an image, repairs it if asked to, and reports.
pub fn run(args: &args::Check) -> Result<ExitCode> {
    let access = match args.repair {
        Some(_) => Access::Write,
        None => Access::reading(args.force_share),
    };
    let image = open::alone(
        &args.file,
        args.image_opts,
        &args.objects,
        args.format,
        access,
    )?;
    let (file, format) = (image.file, image.format);
    let shown = args.file.display();
    let repair = match args.repair {
        None => tool::check::Repair::No,
        Some(Repair::Leaks) => tool::check::Repair::Leaks,
        Some(Repair::All) => tool::check::Repair::All,
    };
    let options = CheckOptions {
        repair,
        budget_bytes: args.memory,
        data_file_len: match format {
            Format::Qcow2 => data_file_len(&image.path, &file, args),
            _ => None,
        },
        spare_cut_off: true,
    };
    let found = match format {
        Format::Vmdk => {
            // With the lock that all of its files get.
            drop(file);
            Some(vmdk_image(&image.path, access, &options)?)
        }
        _ => of(&*file, format, &options)?,
    };
    let Some(report) = found else {
        eprintln!("diskplane: {shown}: a {format} image has no metadata to check");
        return Ok(ExitCode::from(NO_CHECKS));
    };
    if !args.json {
        tell(&report);
    }
    if !args.quiet {
        print(&match args.json {
            true => json(args, format, &report)?,
            false => text(&report)?,
        })?;
    }
    if report.check_errors > 0 {
        bail!(
            "{shown}: {} things could not be checked",
            report.check_errors
        );
    }
    Ok(ExitCode::from(match &report {
        Report {
            corruptions: 1.., ..
        }
        | Report { cut_off: 1.., .. } => 2,
        Report { leaks: 1.., .. } => 3,
        _ => 0,
    }))
}

/// Bytes of the external data file of the qcow2 image in `file`, if it has one. One that cannot be had is told: what is in
/// the image can be checked without.
fn data_file_len(path: &Path, file: &File, args: &args::Check) -> Option<u64> {
    // What is wrong with its header the check tells.
    Header::read(file)
        .ok()
        .filter(|header| header.incompatible & features::DATA_FILE != 0)?;
    let options = ChainOptions {
        format: Some(Format::Qcow2),
        read_only: true,
        // The image itself is open, and locked, already; of the other file only the length is wanted.
        force_share: true,
        allow_locked: true,
        allow_backing: args.allow_backing.clone(),
        data_file: args.data_file.clone(),
        below: vec![Below::Nothing],
        ..ChainOptions::default()
    };
    let len = open::chain(path, &options).and_then(|chain| {
        let data = chain.layers.first().and_then(|layer| layer.files.get(1));
        data.map(|file| file.len()).transpose()
    });
    match len {
        Ok(len) => len,
        Err(error) => {
            let name = plain(&format!("{error:#}"));
            eprintln!("diskplane: {name}: whether its data file is whole is not known");
            None
        }
    }
}

/// Checks an image of that format; `None` where it has no metadata that could be wrong.
pub fn of(
    storage: &dyn Storage,
    format: Format,
    options: &CheckOptions,
) -> block::Result<Option<Report>> {
    if !format.has_check() {
        return Ok(None);
    }
    match format {
        Format::Qcow2 => check(storage, options).map(Some),
        Format::Qed => qed::check(storage, options).map(Some),
        Format::Vhd => vhd::check(storage, options).map(Some),
        Format::Vhdx => vhdx::check(storage, options).map(Some),
        Format::Vdi => vdi::check(storage, options).map(Some),
        Format::Vmdk => Err(block::Error::invalid("a vmdk image may have several files")),
        Format::Parallels => parallels::check(storage, options).map(Some),
        _ => Err(block::Error::unsupported(format!(
            "no check of {format} images is known"
        ))),
    }
}

/// Checks an image that may have several files.
pub fn vmdk_image(path: &Path, access: Access, options: &CheckOptions) -> Result<Report> {
    let options_of_chain = ChainOptions {
        format: Some(Format::Vmdk),
        read_only: true,
        force_share: access == Access::ReadUnlocked,
        without_backing: true,
        ..ChainOptions::default()
    };
    let chain = open::chain(path, &options_of_chain)?;
    let Some(layer) = chain.layers.first() else {
        bail!("a chain without an image");
    };
    let paths: Vec<PathBuf> = layer.files.iter().map(|f| f.path().to_owned()).collect();
    let files = match access {
        Access::Write => {
            // Which files these are is known now.
            drop(chain);
            let open = |path: &PathBuf| open::file(path, access);
            paths.iter().map(open).collect::<Result<Vec<_>>>()?
        }
        _ => layer.files.clone(),
    };
    let storages: Vec<&dyn Storage> = files.iter().map(|file| &**file as _).collect();
    let Some(first) = storages.first() else {
        bail!("an image without a file");
    };
    let parts = image::vmdk::Parts::read(*first)?;
    Ok(vmdk::check(&parts, &storages, options)?)
}

fn json(args: &args::Check, format: Format, report: &Report) -> Result<String> {
    crate::json(&Json {
        filename: args.file.display().to_string(),
        format: format.name(),
        check_errors: report.check_errors,
        image_end_offset: report.image_end_offset,
        corruptions: report.corruptions,
        leaks: report.leaks,
        corruptions_fixed: report.corruptions_fixed,
        leaks_fixed: report.leaks_fixed,
        total_clusters: report.total_clusters,
        allocated_clusters: report.allocated_clusters,
        fragmented_clusters: report.fragmented_clusters,
        compressed_clusters: report.compressed_clusters,
        overlaps: report.overlaps,
        cut_off: report.cut_off,
        findings: report.findings.iter().map(ToString::to_string).collect(),
        findings_left_out: report.findings_left_out,
    })
}

/// For commands and servers that write, and may go on where a file is cut off.
pub const MEND: disk::chain::Repair = disk::chain::Repair {
    image: mend,
    data_file: None,
};

/// For commands that change an image, and could hide that it is cut off.
pub const PREPARE: disk::chain::Repair = disk::chain::Repair {
    image: prepare,
    data_file: Some(tool::check::refuse_short_data_file),
};

/// Brings an image that was not closed cleanly in order before a command writes to it, and says so.
pub fn mend(storage: &dyn Storage, format: Format) -> block::Result<()> {
    let (report, what) = match format {
        Format::Qcow2 => (
            tool::check::mend_dirty(storage)?,
            "was not closed cleanly: its refcounts were counted anew",
        ),
        Format::Qed => (
            qed::mend(storage)?,
            "was not closed cleanly: its tables were checked",
        ),
        // What of these is mended is when they are opened.
        _ => return Ok(()),
    };
    if let Some(report) = report {
        tracing::warn!(
            image = storage.name(),
            repaired = report.corruptions_fixed,
            leaks = report.leaks_fixed,
            "{what}"
        );
    }
    Ok(())
}

/// The same for a command that changes the image, and could hide that its file is cut off.
pub fn prepare(storage: &dyn Storage, format: Format) -> block::Result<()> {
    // First: what mends a dirty one may make the file longer.
    if format == Format::Qcow2 {
        tool::check::refuse_cut_off(storage)?;
    }
    mend(storage, format)
}

/// What is wrong, line by line, on stderr.
fn tell(report: &Report) {
    for finding in report.findings.iter().take(SHOWN_MAX) {
        eprintln!("{}", plain(&finding.to_string()));
    }
    let over = report.findings.len().saturating_sub(SHOWN_MAX) as u64 + report.findings_left_out;
    if over > 0 {
        eprintln!("… and {over} more (--json shows up to 1000)");
    }
}

fn text(report: &Report) -> Result<String> {
    let mut out = String::new();
    let fixed = [
        (report.leaks_fixed, "leaked clusters were given back"),
        (report.corruptions_fixed, "errors were repaired"),
    ];
    for (count, what) in fixed.iter().filter(|(count, _)| *count > 0) {
        writeln!(out, "{count} {what}.")?;
    }
    let found = [
        (
            report.corruptions,
            "errors are in the image: data may be wrong, and writing to it may destroy more",
        ),
        (
            report.leaks,
            "clusters are leaked: they waste space, and harm nothing",
        ),
        (report.check_errors, "things could not be checked"),
        (
            report.overlaps,
            "clusters are used by two things that must not share one",
        ),
        (
            report.cut_off,
            "tables or clusters are cut off by the end of the file: what was in the rest is lost, and 'diskplane convert --salvage' \
             copies what is left",
        ),
    ];
    for (count, what) in found.iter().filter(|(count, _)| *count > 0) {
        writeln!(out, "{count} {what}.")?;
    }
    if found.iter().all(|(count, _)| *count == 0) {
        writeln!(out, "No errors were found on the image.")?;
    }
    let percent = |part: u64, whole: u64| match whole {
        0 => 0.0,
        whole => part as f64 * 100.0 / whole as f64,
    };
    let allocated = report.allocated_clusters;
    writeln!(
        out,
        "{allocated}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
        report.total_clusters,
        percent(allocated, report.total_clusters),
        percent(report.fragmented_clusters, allocated),
        percent(report.compressed_clusters, allocated),
    )?;
    writeln!(out, "Image end offset: {}", report.image_end_offset)?;
    Ok(out)
}
