//! `diskplane rebase`.
//!
//! With `--json` an object: `filename`; `backing-filename` and `backing-filename-format`, absent where there is none
//! any more; `copied` and `zeroed`, bytes of the disk that the image has now since the new backing file differs;
//! `compressed-clusters` and `compressed-bytes`, how many clusters were compressed, and what they take in the file.

use crate::convert::{CACHE_BYTES, progress_bar, show};
use crate::open::{self, Access};
use crate::{args, check, create, print, signals};
use anyhow::{Context as _, Result, bail};
use block::size;
use disk::chain::{self, Chain, ChainOptions};
use image::Format;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tool::rebase::{Link, Report, can_rebase, copy_differences, set_backing};
use tool::work::Work;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<&'static str>,
    copied: u64,
    zeroed: u64,
    compressed_clusters: u64,
    compressed_bytes: u64,
}

/// Gives an image another backing file.
pub fn run(args: &args::Rebase) -> Result<()> {
    let stop = signals::stop_on_signals()?;
    let backing = match (args.backing.as_str(), args.backing_format) {
        ("", None) => None,
        ("", Some(_)) => bail!("-F: without a backing file there is no format of one"),
        (name, Some(format)) => Some((name, format)),
        (name, None) => bail!("-b {name}: say its format with -F"),
    };
    if let Some((name, _)) = backing
        && !chain::is_file_name(name)
        && !nbd::is_name(name)
    {
        bail!(
            "-b {name}: it has a protocol: only files and exports of NBD servers (nbd://…) are opened"
        );
    }
    let (format, report) = match args.unsafe_mode {
        true => {
            let objects = &args.moving.keys.objects;
            let image = open::alone(
                &args.file,
                args.image_opts,
                objects,
                args.format,
                Access::Write,
            )?;
            let (file, format) = (image.file, image.format);
            refuse_others(&args.file, format)?;
            let link = link_to(args, format, backing)?;
            check::mend(&*file, format)?;
            set_backing(&*file, format, link.as_ref())?;
            (format, Report::default())
        }
        false => {
            let (path, options) = overlay(args)?;
            let base = backing.map(|(name, format)| base(args, &path, name, format));
            let base = base.transpose()?;
            let overlay = open::chain(&path, &options)?;
            let Some(active) = overlay.layers.first() else {
                bail!("a chain without an image");
            };
            let format = active.format;
            refuse_others(&args.file, format)?;
            let link = link_to(args, format, backing)?;
            if args.compress && format != Format::Qcow2 {
                bail!("-c: {format} images take no compressed clusters; qcow2 images do");
            }
            let bar = progress_bar(active.image.size(), args.moving.progress);
            let mut progress = |done| show(&bar, done);
            let mut work = Work::new(stop, &mut progress);
            work.rate = args.moving.rate;
            let report = copy_differences(&overlay, base.as_ref(), args.compress, &mut work);
            bar.finish_and_clear();
            let report = report?;
            // From here on nothing of the image is in memory; its lock is still held.
            let file = active.files.first().map(Arc::clone);
            drop(overlay);
            let file = file.context("an image without a file")?;
            set_backing(&*file, format, link.as_ref())?;
            (format, report)
        }
    };
    if !args.moving.quiet {
        tell(args, backing, &report)?;
    }
    create::warn_of_policy(&args.file, format, backing.is_some());
    Ok(())
}

/// What the image is to say of its new backing file.
fn link_to(
    args: &args::Rebase,
    format: Format,
    backing: Option<(&str, Format)>,
) -> Result<Option<Link>> {
    let link = |(name, below)| create::link(&args.file, format, name, below);
    backing.map(link).transpose().context("-b")
}

fn refuse_others(path: &Path, format: Format) -> Result<()> {
    match can_rebase(format) {
        true => Ok(()),
        false => bail!(
            "{}: a {format} image cannot get another backing file; qcow2, qed, vhd, vhdx and vmdk images can",
            path.display()
        ),
    }
}

/// Where the image is that is to be changed, and how it is opened.
fn overlay(args: &args::Rebase) -> Result<(PathBuf, ChainOptions)> {
    let options = ChainOptions {
        format: args.format,
        cache: args.moving.cache.unwrap_or_default(),
        allow_backing: args.moving.allow_backing.clone(),
        cache_bytes: Some(CACHE_BYTES),
        passphrases: args.moving.keys.read()?,
        repair: Some(check::PREPARE),
        ..ChainOptions::default()
    };
    let objects = &args.moving.keys.objects;
    open::resolve(&args.file, args.image_opts, objects, options)
}

/// The new backing file.
fn base(args: &args::Rebase, file: &Path, name: &str, format: Format) -> Result<Chain> {
    // A relative name starts at the directory of the image that stores it.
    let path = open::beside(file, name);
    let options = ChainOptions {
        format: Some(format),
        read_only: true,
        cache: args.source_cache,
        allow_backing: args.moving.allow_backing.clone(),
        cache_bytes: Some(CACHE_BYTES),
        passphrases: args.moving.keys.read()?,
        ..ChainOptions::default()
    };
    let chain = open::chain(&path, &options).context("-b")?;
    let overlay = std::fs::canonicalize(file).with_context(|| file.display().to_string())?;
    let is_overlay = |path: &Path| std::fs::canonicalize(path).is_ok_and(|path| path == overlay);
    if chain.layers.iter().any(|layer| is_overlay(&layer.path)) {
        bail!(
            "-b {name}: lies on {} itself: the chain would be a loop",
            args.file.display()
        );
    }
    Ok(chain)
}

fn tell(args: &args::Rebase, backing: Option<(&str, Format)>, report: &Report) -> Result<()> {
    if args.moving.json {
        return print(&crate::json(&Json {
            filename: args.file.display().to_string(),
            backing_filename: backing.map(|(name, _)| name.to_owned()),
            backing_filename_format: backing.map(|(_, format)| format.name()),
            copied: report.copied,
            zeroed: report.zeroed,
            compressed_clusters: report.compressed_clusters,
            compressed_bytes: report.compressed_bytes,
        })?);
    }
    let onto = match backing {
        Some((name, format)) => format!("onto {name} ({format})"),
        None => "onto nothing".to_owned(),
    };
    let packed = match report.compressed_clusters {
        0 => String::new(),
        clusters => {
            let bytes = size::human(report.compressed_bytes);
            format!(", {clusters} clusters compressed to {bytes}")
        }
    };
    print(&format!(
        "rebased {} {onto}: {} of data copied, {} of zeros{packed}\n",
        args.file.display(),
        size::human(report.copied),
        size::human(report.zeroed)
    ))
}
