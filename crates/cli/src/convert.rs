//! `diskplane convert`.
//!
//! With `--json` an object; bytes are the disk's:
//!
//! | field | |
//! |---|---|
//! | `filename`, `format` | of the target |
//! | `virtual-size` | bytes of the disk |
//! | `written`, `zero`, `same` | bytes written as data, bytes that are zeros, bytes that BASE has |
//! | `compressed-clusters`, `compressed-bytes` | how many clusters were compressed, and what they take in the file |
//! | `file-size`, `actual-size` | bytes of the target's file, and bytes that it takes on the host |

use crate::{args, create, encrypt, options};
use anyhow::{Context, Result, bail};
use block::size;
use crypto::Passphrase;
use disk::chain::{Chain, ChainOptions, Layer};
use image::{Format, qcow2};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use io::{File, FileKind, OpenOptions};
use serde::Serialize;
use std::{fs, io::IsTerminal as _, os::unix::fs::MetadataExt, path::Path, sync::Arc, thread};
use tool::convert::{ConvertOptions, Report, Target, WORKERS_MAX, convert};

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    filename: String,
    format: &'a str,
    virtual_size: u64,
    written: u64,
    zero: u64,
    same: u64,
    compressed_clusters: u64,
    compressed_bytes: u64,
    file_size: u64,
    actual_size: u64,
}

/// Copies a disk.
pub fn run(args: &args::Convert) -> Result<()> {
    let source = Chain::open(
        &args.source,
        &ChainOptions {
            format: args.format,
            read_only: true,
            force_share: args.force_share,
            allow_backing: args.allow_backing.clone(),
            data_file: args.data_file.clone(),
            passphrases: args.keys.read()?,
            ..ChainOptions::default()
        },
    )?;
    let bytes = source.layers.first().map_or(0, |l| l.image.size());
    let below = target_passphrases(args)?;
    let base = base(args, &below)?;
    let workers = match args.workers {
        Some(workers) => usize::from(workers),
        None => thread::available_parallelism().map_or(1, |n| n.get().min(WORKERS_MAX)),
    };
    let options = ConvertOptions {
        base: base.as_ref(),
        workers,
    };
    let bar = bar(bytes, args.progress);
    let mut progress = |done| bar.set_position(done);
    let (format, report) = match args.no_create {
        true => into_existing(args, below, &source, &options, &mut progress)?,
        false => {
            let format = create::format_of(args.target_format, &args.target, "-O")?;
            let report = into_new(args, format, bytes, below, &source, &options, &mut progress)?;
            (format, report)
        }
    };
    bar.finish_and_clear();
    print(args, format, &report)
}

/// What `--target-key-secret` names.
fn target_passphrases(args: &args::Convert) -> Result<Vec<Arc<Passphrase>>> {
    let find = |id: &String| Ok(Arc::new(args.keys.objects.find(id)?));
    args.target_key_secret.iter().map(find).collect()
}

/// The image that the target is to be an overlay of.
fn base(args: &args::Convert, passphrases: &[Arc<Passphrase>]) -> Result<Option<Chain>> {
    let Some(name) = &args.backing else {
        return Ok(None);
    };
    // A relative name starts at the directory of the image that stores it.
    let path = args.target.parent().unwrap_or(Path::new("")).join(name);
    let Some(spec) = path.to_str() else {
        bail!("-B {}: the name is not UTF-8", path.display());
    };
    let options = ChainOptions {
        format: args.backing_format,
        read_only: true,
        allow_backing: args.allow_backing.clone(),
        passphrases: passphrases.to_vec(),
        ..ChainOptions::default()
    };
    Ok(Some(Chain::open(spec, &options).context("-B")?))
}

fn bar(bytes: u64, anywhere: bool) -> ProgressBar {
    let target = match anywhere || std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(bytes), target);
    if let Ok(style) =
        ProgressStyle::with_template("{wide_bar} {percent:>3}% {binary_bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    bar
}

fn into_existing(
    args: &args::Convert,
    passphrases: Vec<Arc<Passphrase>>,
    source: &Chain,
    options: &ConvertOptions<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<(Format, Report)> {
    // Opened for writing, raw has to be said.
    let target = open(args, args.target_format, passphrases)?;
    let report = copy(source, &target, false, options, progress)?;
    let format = target.layers.first().map_or(Format::Raw, |l| l.format);
    Ok((format, report))
}

/// Opens the target for writing.
fn open(
    args: &args::Convert,
    format: Option<Format>,
    passphrases: Vec<Arc<Passphrase>>,
) -> Result<Chain> {
    let Some(spec) = args.target.to_str() else {
        bail!("{}: the name is not UTF-8", args.target.display());
    };
    let options = ChainOptions {
        format,
        allow_backing: args.allow_backing.clone(),
        repair: Some(crate::check::mend),
        passphrases,
        ..ChainOptions::default()
    };
    Ok(io::wait_for_lock(|| Chain::open(spec, &options))?)
}

fn copy(
    source: &Chain,
    target: &Chain,
    blank: bool,
    options: &ConvertOptions<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Report> {
    let mut driver = target.driver()?;
    let cluster_size = (target.layers.first()).map_or(1, |l| l.image.describe().cluster_size);
    let image = Target::Image {
        driver: &mut driver,
        blank,
        cluster_size,
    };
    let report = convert(source, image, options, progress)?;
    driver.close()?;
    Ok(report)
}

fn into_new(
    args: &args::Convert,
    format: Format,
    bytes: u64,
    below: Vec<Arc<Passphrase>>,
    source: &Chain,
    convert_options: &ConvertOptions<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Report> {
    let mut options = options::parse(format, &args.options)?;
    if options.backing_file.is_some() || options.backing_format.is_some() {
        bail!("-o backing_file, backing_fmt: say -B and -F");
    }
    options.qcow2.size = bytes;
    if let (Some(name), Some(backing)) = (&args.backing, args.backing_format) {
        if format != Format::Qcow2 {
            bail!("-B: {format} images have no backing file");
        }
        options.qcow2.backing = Some((name.clone(), backing.name().to_owned()));
    }
    options.qcow2.extended_l2 = options.extended_l2.unwrap_or(false);
    match format {
        Format::Qcow2 => options.qcow2.validate()?,
        _ if args.compress => bail!("-c: {format} images have no compressed clusters"),
        _ => {}
    }
    if args.compress && options.preallocation != tool::prealloc::Preallocation::Off {
        bail!("-c and -o preallocation exclude each other");
    }
    if args.compress && options.encrypt.is_wanted() {
        bail!("-c and -o encrypt.…: compressed clusters would not be encrypted");
    }
    // A device is taken as it is, and stays where it is.
    let device = match fs::metadata(&args.target) {
        Ok(metadata) if metadata.is_file() => bail!(create::exists(&args.target)),
        found => found.is_ok(),
    };
    // Only what is made here is taken away after a failure.
    let directory = args.target.parent().unwrap_or(Path::new(""));
    let data = (options.qcow2.data_file.as_ref()).map(|name| directory.join(name));
    let files = [Some(args.target.clone()), data];
    let new: Vec<_> = (files.into_iter().flatten())
        .filter(|file| fs::symlink_metadata(file).is_err())
        .collect();
    let mut passphrases = below;
    if format == Format::Qcow2
        && let Some(passphrase) = target_passphrase(args, source, &options.encrypt)?
    {
        options.qcow2.encryption = Some(options.encrypt.volume(&passphrase)?);
        options.qcow2.validate()?;
        passphrases.insert(0, passphrase);
    }
    let written = match args.compress {
        true => compressed(
            args,
            device,
            &options.qcow2,
            source,
            convert_options,
            progress,
        ),
        false => create::write_all(&args.target, format, &options).and_then(|()| {
            let blank = !device || format != Format::Raw;
            let target = open(args, Some(format), passphrases)?;
            copy(source, &target, blank, convert_options, progress)
        }),
    };
    if written.is_err() {
        // Half a copy is of no use; what matters is why it failed.
        for file in new {
            let _ = fs::remove_file(file);
        }
    }
    written
}

/// The passphrase that a new image is to be encrypted with, if it is to be.
fn target_passphrase(
    args: &args::Convert,
    source: &Chain,
    options: &encrypt::Options,
) -> Result<Option<Arc<Passphrase>>> {
    let is_encrypted = |layer: &Layer| layer.image.encryption().is_some();
    if options.is_wanted() && !options.names_secret() && source.layers.iter().any(is_encrypted) {
        bail!(
            "-o encrypt.format=luks: SRC has a passphrase of its own: name the new one, \
             --object secret,id=ID,file=FILE -o encrypt.key-secret=ID"
        );
    }
    options.passphrase(&args.keys)
}

fn compressed(
    args: &args::Convert,
    device: bool,
    options: &qcow2::CreateOptions,
    source: &Chain,
    convert_options: &ConvertOptions<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Report> {
    let open = OpenOptions::default();
    let file = match device {
        true => File::open(&args.target, &open)?,
        false => File::create_new(&args.target, &open)?,
    };
    if device && file.kind() != FileKind::BlockDevice {
        bail!(
            "{}: neither a file nor a block device",
            args.target.display()
        );
    }
    let target = Target::Compressed {
        writer: Box::new(qcow2::ImageWriter::new(&*file, options)?),
        compression: options.compression,
    };
    let report = convert(source, target, convert_options, progress)?;
    if !device {
        create::sync_directory(&args.target)?;
    }
    Ok(report)
}

fn print(args: &args::Convert, format: Format, report: &Report) -> Result<()> {
    let metadata = fs::metadata(&args.target)?;
    let (file_size, actual_size) = (metadata.len(), metadata.blocks().saturating_mul(512));
    if args.json {
        let json = Json {
            filename: args.target.display().to_string(),
            format: format.name(),
            virtual_size: report.size,
            written: report.written,
            zero: report.zero,
            same: report.same,
            compressed_clusters: report.compressed_clusters,
            compressed_bytes: report.compressed_bytes,
            file_size,
            actual_size,
        };
        return crate::print(&crate::json(&json)?);
    }
    let mut line = format!(
        "converted {} to {}: {format}, {}; {} of data",
        args.source,
        args.target.display(),
        size::human(report.size),
        size::human(report.written)
    );
    if let Some(base) = args.backing.as_ref().filter(|_| report.same > 0) {
        line.push_str(&format!(", {} as in {base}", size::human(report.same)));
    }
    if report.compressed_clusters > 0 {
        let packed = size::human(report.compressed_bytes);
        line.push_str(&format!(
            ", {} clusters compressed to {packed}",
            report.compressed_clusters
        ));
    }
    crate::print(&(line + "\n"))
}
