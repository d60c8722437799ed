//! `qemu-img convert`, and what `dd` has of it.

use super::create_options::Said;
use super::line;
use super::open::{self, How, Name};
use super::progress::{CHUNK_BYTES, Progress, Steps};
use super::spec::Shown;
use super::{create, create_options};
use crate::open::Access;
use crate::options::Options;
use crate::secret::Objects;
use crate::{print, signals};
use anyhow::{Result, anyhow, bail};
use clap::Args;
use disk::blocking::Driver;
use disk::chain::Chain;
use image::{Format, qcow2};
use io::Cache;
use tool::bitmap;
use tool::convert::{ConvertOptions, SPARSE_BYTES, Target, convert};
use tool::prealloc::Preallocation;
use tool::source::{Damage, Source, UNMAPPED, Unreadable};
use tool::work::Work;

/// Bytes that `-S` takes at most.
const SPARSE_MAX: u64 = 16 << 20;
/// Coroutines that `-m` takes at most.
const COROUTINES_MAX: u64 = 16;
/// How many there are where none is said.
const COROUTINES: u64 = 8;

/// `convert`.
#[derive(Args, Debug)]
pub struct Convert {
    #[command(flatten)]
    shown: Shown,
    /// indicates that SRC_FILENAME is a complete image specification instead of a file name
    #[arg(long, alias = "image-opts")]
    source_image_opts: bool,
    /// specify SRC_FILENAME source image format explicitly
    #[arg(short = 'f', long, value_name = "SRC_FMT")]
    source_format: Option<String>,
    /// source image(s) cache mode (writeback)
    #[arg(short = 'T', long, value_name = "SRC_CACHE")]
    source_cache: Option<String>,
    /// specify source snapshot parameters
    #[arg(short = 'l', long = "snapshot", value_name = "SNAPSHOT_PARAMS")]
    source_snapshot: Option<String>,
    #[command(flatten)]
    pub(super) objects: Objects,
    /// indicates that TGT_FILENAME is a complete image specification instead of a file name
    #[arg(long)]
    target_image_opts: bool,
    /// the target reads as zeros (with -n)
    #[arg(long)]
    target_is_zero: bool,
    /// specify TGT_FILENAME image format (default is raw)
    #[arg(short = 'O', long = "output-format", value_name = "TGT_FMT")]
    target_format: Option<String>,
    /// TARGET_FMT-specific options
    #[arg(short = 'o', long = "options", value_name = "TGT_OPTS")]
    target_options: Vec<String>,
    /// create compressed output image (qcow2 format only)
    #[arg(short)]
    compress: bool,
    /// cache mode when opening output image (unsafe)
    #[arg(short = 't', long = "output-cache", value_name = "TGT_CACHE")]
    target_cache: Option<String>,
    /// create output to be a CoW on top of BACKING_FILENAME
    #[arg(short = 'B', long, value_name = "BACKING_FILENAME")]
    backing: Option<String>,
    /// specify BACKING_FILENAME image format explicitly
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// omit target volume creation
    #[arg(short)]
    no_create: bool,
    /// zeros that become a hole, at least
    #[arg(short = 'S', long, value_name = "SPARSE_SIZE")]
    sparse_size: Option<String>,
    /// open images in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    /// I/O rate limit
    #[arg(short, long, value_name = "RATE")]
    rate: Option<String>,
    /// specify parallelism (default 8)
    #[arg(short = 'm', long, value_name = "NUM_COROUTINES")]
    parallel: Option<String>,
    /// use copy_range offloading
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// take what cannot be read for zeros
    #[arg(long)]
    salvage: bool,
    /// the target need not have the disk's order
    #[arg(short = 'W', long)]
    oob_writes: bool,
    /// also copy any persistent bitmaps present in source
    #[arg(long)]
    bitmaps: bool,
    /// skip (do not error out) any broken bitmaps
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// SRC_FILENAME [SRC_FILENAME2 [...]] TGT_FILENAME
    #[arg(value_name = "SRC_FILENAME… TGT_FILENAME")]
    files: Vec<String>,
}

/// What is copied where.
pub struct Copy<'a> {
    /// The disk.
    pub source: Source<'a>,
    /// The image that is written, which is there.
    pub file: &'a str,
    /// What it is.
    pub format: Format,
    /// How.
    pub options: ConvertOptions<'a>,
    /// It reads as zeros, or as its backing file.
    pub blank: bool,
    /// How it is opened.
    pub how: How,
    /// `--target-image-opts`.
    pub image_opts: bool,
    /// Clusters of an image that is there already are to be compressed.
    pub compress: bool,
    /// Bytes in a second.
    pub rate: Option<u64>,
    /// Show how far it is.
    pub progress: Option<Steps<'a>>,
    /// Do not warn of what could not be read.
    pub quiet: bool,
}

/// A copy that was not made.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub why: anyhow::Error,
    /// What was written of it is no image that can be opened.
    torn: bool,
}

impl From<anyhow::Error> for Failed {
    fn from(why: anyhow::Error) -> Self {
        Self { why, torn: false }
    }
}

/// Copies a disk.
pub fn run(args: &Convert) -> Result<u8> {
    let numbers = Numbers::parse(args)?;
    let list = line::joined(&args.target_options)?;
    refuse(args, &list)?;
    let format = args.target_format.as_deref().unwrap_or("raw");
    if line::wants_help(&list) {
        create_options::of_new(format)?;
        print(&create_options::help(format, args.files.len() > 1))?;
        return Ok(0);
    }
    let Some((file, sources)) = args.files.split_last().filter(|(_, s)| !s.is_empty()) else {
        return Err(anyhow!("Must specify image file name"));
    };
    let source_cache = open::cache(args.source_cache.as_deref(), "source cache")?;
    if args.source_snapshot.is_some() && sources.len() > 1 {
        bail!("No support for concatenating multiple snapshot");
    }
    let chains = sources
        .iter()
        .map(|source| open_source(args, source, source_cache));
    let chains = chains.collect::<Result<Vec<Chain>>>()?;
    let source = Source::join(&chains.iter().collect::<Vec<_>>())?.salvaging(args.salvage);
    let target = Made {
        file,
        format,
        list: &list,
        size: source.size(),
    };
    let (said, format) = target.settle(args)?;
    if args.target_is_zero && said.get("backing_file").is_some() {
        bail!("Cannot use --target-is-zero when the destination image has a backing file");
    }
    let backing = backing(args, &said, file)?;
    if args.compress && !args.target_image_opts {
        refuse_compressed(format, &said)?;
    }
    let entries = bitmaps(args, &chains)?;
    let cache = match args.target_cache.as_deref() {
        None => Cache::Unsafe,
        said => open::cache(said, "cache")?,
    };
    // What options name is known once it is open.
    if args.bitmaps && !args.target_image_opts {
        refuse_bitmaps(format, said.get("compat"))?;
    }
    let options = match args.no_create {
        true => None,
        false => Some(made(args, file, format, &said)?),
    };
    let copy = Copy {
        source,
        file,
        format,
        options: ConvertOptions {
            base: backing.as_ref(),
            // Coroutines cost nothing where they wait; threads that write to the page cache keep each other waiting.
            workers: match cache.direct() && !args.compress {
                true => numbers.workers,
                false => numbers.workers.min(cores()),
            },
            out_of_order: args.oob_writes,
            sparse: numbers.sparse,
            offload: args.copy_range_offloading,
            checkpoint: None,
        },
        blank: args.target_is_zero || (!args.no_create && reads_as_zeros(file, format)),
        how: How {
            write: true,
            cache,
            passphrases: match &options {
                Some(options) => create::passphrases(options, &args.objects)?,
                None => Vec::new(),
            },
            ..How::default()
        },
        image_opts: args.target_image_opts,
        compress: args.compress,
        rate: numbers.rate,
        progress: match args.shown.progress() {
            true => {
                let chunk = match &options {
                    Some(options) if args.compress && format == Format::Qcow => {
                        options.qcow.cluster_size()
                    }
                    Some(options) if args.compress => options.qcow2.cluster_size,
                    _ => CHUNK_BYTES,
                };
                let source = Source::join(&chains.iter().collect::<Vec<_>>())?;
                Some(Steps::new(source, chunk, numbers.sparse == 0)?)
            }
            false => None,
        },
        quiet: args.shown.quiet,
    };
    let packs = |options: &&Options| args.compress || options.packs_always(format);
    let copied = match options.as_ref().filter(packs) {
        Some(options) => compressed(copy, options),
        None => copy.run(&entries, &args.objects),
    };
    if let (Err(Failed { why, torn: true }), Some(options)) = (&copied, &options) {
        // As qemu-img's, what is left can be opened. What matters is why: this may fail for the same reason.
        if create::write(file, format, options).is_err() {
            bail!("{why}\nqemu-img: '{file}' is no image now: remove it");
        }
    }
    copied.map_err(|failed| failed.why)?;
    let name = Name {
        text: file,
        format: Some(format.qemu_name()).filter(|_| !args.target_image_opts),
        image_opts: args.target_image_opts,
    };
    copy_bitmaps(&chains, &entries, &name, &args.objects)?;
    Ok(0)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The numbers of the command line.
struct Numbers {
    sparse: u64,
    rate: Option<u64>,
    workers: usize,
}

impl Numbers {
    fn parse(args: &Convert) -> Result<Self> {
        let sparse = match args.sparse_size.as_deref() {
            None => SPARSE_BYTES,
            Some(text) => line::bytes("buffer size for sparse output", text)?,
        };
        if sparse % 512 != 0 || sparse > SPARSE_MAX {
            bail!(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {SPARSE_MAX}. \
                 Select 0 to disable sparse detection (fully allocates output)."
            );
        }
        let rate = args.rate.as_deref();
        let rate = rate
            .map(|text| line::bytes("rate limit", text))
            .transpose()?;
        let workers = match args.parallel.as_deref() {
            Some(text) => line::number("number of coroutines", text, 1, COROUTINES_MAX)?,
            None => COROUTINES,
        };
        Ok(Self {
            sparse,
            rate: rate.filter(|rate| *rate > 0),
            workers: usize::try_from(workers)?.min(COROUTINES_MAX as usize),
        })
    }
}

/// Refuses what makes no sense together.
fn refuse(args: &Convert, list: &str) -> Result<()> {
    let wrong = [
        (
            args.skip_broken_bitmaps && !args.bitmaps,
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (
            args.compress && args.copy_range_offloading,
            "Cannot enable copy offloading when -c is used",
        ),
        (
            args.sparse_size.is_some() && args.copy_range_offloading,
            "Cannot enable copy offloading when -S is used",
        ),
        (
            args.copy_range_offloading && args.salvage,
            "Cannot use copy offloading in salvaging mode",
        ),
        (
            args.target_image_opts && !args.no_create,
            "--target-image-opts requires use of -n flag",
        ),
        (
            args.no_create && !list.is_empty(),
            "-o has no effect when skipping image creation",
        ),
        (
            args.target_is_zero && !args.no_create,
            "--target-is-zero requires use of -n flag",
        ),
    ];
    match wrong.iter().find(|(is, _)| *is) {
        Some((_, why)) => Err(anyhow!("{why}")),
        None => Ok(()),
    }
}

fn open_source(args: &Convert, file: &str, cache: Cache) -> Result<Chain> {
    let name = Name {
        text: file,
        format: args.source_format.as_deref(),
        image_opts: args.source_image_opts,
    };
    let how = How {
        force_share: args.force_share,
        alone: true,
        cache,
        ..How::default()
    };
    let chain = open::chain(&name, &how, &args.objects)?;
    let Some(snapshot) = &args.source_snapshot else {
        return Ok(chain);
    };
    if snapshot.starts_with("snapshot.") {
        for piece in crate::options::split(snapshot) {
            let key = piece.split('=').next().unwrap_or_default();
            if !matches!(key, "snapshot.id" | "snapshot.name") {
                bail!(
                    "Invalid parameter '{key}'\nqemu-img: Failed in parsing snapshot param '{snapshot}'"
                );
            }
        }
    }
    let format = open::active(&chain)?.format;
    if format != Format::Qcow2 {
        bail!(
            "Failed to load snapshot: Block format '{}' used by device '' does not support temporarily loading \
             internal snapshots",
            format.qemu_name()
        );
    }
    drop(chain);
    let how = How {
        snapshot: Some(snapshot.clone()),
        ..how
    };
    open::chain(&name, &how, &args.objects).map_err(|error| {
        match error.to_string().contains("there is no snapshot") {
            true => anyhow!("Failed to load snapshot: Can't find snapshot"),
            false => error,
        }
    })
}

/// The image that is made.
struct Made<'a> {
    file: &'a str,
    format: &'a str,
    list: &'a str,
    size: u64,
}

impl Made<'_> {
    /// Decides what it is to be.
    fn settle(&self, args: &Convert) -> Result<(Said, Format)> {
        if args.target_image_opts {
            if args.target_format.is_some() {
                bail!("--image-opts and --format are mutually exclusive");
            }
            return Ok((Said::default(), Format::Raw));
        }
        let format = match open::format_named(self.format) {
            Some(format) if args.no_create => format,
            None if args.no_create => bail!(
                "Could not open '{}': Unknown driver '{}'",
                self.file,
                self.format
            ),
            _ => create_options::of_new(self.format)?,
        };
        if !args.no_create {
            open::check_protocol(self.file)?;
        }
        let mut said = Said::parse(self.format, self.list)?;
        // Whatever was said: a copy is as large as its source.
        said.set("size", &self.size.to_string())?;
        let old_style = [
            ("backing_file", &args.backing, "Backing file"),
            ("backing_fmt", &args.backing_format, "Backing file format"),
        ];
        if args.backing.is_none()
            && args.backing_format.is_some()
            && said.get("backing_file").is_none()
        {
            bail!(
                "{}: error while converting {}: Backing format cannot be used without backing file",
                self.file,
                self.format
            );
        }
        for (name, value, what) in old_style {
            let Some(value) = value else { continue };
            if !said.has(name) && !args.no_create {
                bail!("{what} not supported for file format '{}'", self.format);
            }
            if said.has(name) {
                said.set(name, value)?;
            }
        }
        Ok((said, format))
    }
}

/// What the target is to lie on, open.
fn backing(args: &Convert, said: &Said, file: &str) -> Result<Option<Chain>> {
    let Some(name) = said.get("backing_file") else {
        return Ok(None);
    };
    if args.files.len() > 2 {
        bail!(
            "Having a backing file for the target makes no sense when concatenating multiple input images"
        );
    }
    let format = said.get("backing_fmt");
    // What is there already has its own record of what it lies on.
    if format.is_none() && !args.no_create {
        bail!("Use of backing file requires explicit backing format");
    }
    let path = create::below(&create::path(file), name);
    let base = Name {
        text: &path,
        format,
        image_opts: false,
    };
    let how = How {
        force_share: args.force_share,
        ..How::default()
    };
    open::chain(&base, &how, &args.objects)
        .map(Some)
        .map_err(|error| {
            // It is the target that cannot be opened for want of it.
            let why = create::once(&path, &error.to_string()).to_owned();
            anyhow!("Could not open '{file}': Could not open backing file: {why}")
        })
}

fn refuse_compressed(format: Format, said: &Said) -> Result<()> {
    let streams = format == Format::Vmdk && said.get("subformat") == Some("streamOptimized");
    if !matches!(format, Format::Qcow2 | Format::Qcow) && !streams {
        bail!("Compression not supported for this file format");
    }
    if said.get("encrypt.format").is_some() || said.get("encryption").is_some() {
        bail!("Compression and encryption not supported at the same time");
    }
    if said.get("preallocation").is_some_and(|mode| mode != "off") {
        bail!("Compression and preallocation not supported at the same time");
    }
    if said.get("data_file").is_some() {
        bail!("Compression and an external data file not supported at the same time");
    }
    Ok(())
}

/// The bitmaps that are to be copied.
fn bitmaps(args: &Convert, chains: &[Chain]) -> Result<Vec<qcow2::bitmap::Entry>> {
    if !args.bitmaps {
        return Ok(Vec::new());
    }
    let [chain] = chains else {
        bail!("Copying bitmaps only possible with single source");
    };
    let layer = open::active(chain)?;
    let Some(file) = layer
        .files
        .first()
        .filter(|_| layer.format == Format::Qcow2)
    else {
        bail!("Source lacks bitmap support");
    };
    let (entries, left_out) = bitmap::to_copy(&**file, bitmap::Broken::Skip)?;
    // The last one of the directory first, as QEMU has them.
    for name in left_out.iter().rev().map(|name| block::plain(name)) {
        match args.skip_broken_bitmaps {
            true => eprintln!("qemu-img: warning: Skipping inconsistent bitmap '{name}'"),
            false => bail!(
                "Cannot copy inconsistent bitmap '{name}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            ),
        }
    }
    Ok(entries)
}

fn refuse_bitmaps(format: Format, compat: Option<&str>) -> Result<()> {
    match format == Format::Qcow2 && !matches!(compat, Some("0.10" | "v2")) {
        true => Ok(()),
        false => bail!(
            "Format driver '{}' does not support bitmaps",
            format.qemu_name()
        ),
    }
}

fn copy_bitmaps(
    chains: &[Chain],
    entries: &[qcow2::bitmap::Entry],
    name: &Name<'_>,
    objects: &Objects,
) -> Result<()> {
    let source = chains.first().and_then(|chain| chain.layers.first());
    let Some(source) = source
        .and_then(|layer| layer.files.first())
        .filter(|_| !entries.is_empty())
    else {
        return Ok(());
    };
    let (target, _) = open::file(name, Access::Write, objects)?;
    bitmap::copy(&**source, entries, &*target)
        .map_err(|error| anyhow!("Failed to create bitmap {}: {error}", first_name(entries)))
}

fn first_name(entries: &[qcow2::bitmap::Entry]) -> String {
    entries
        .first()
        .map_or(String::new(), |entry| block::plain(&entry.name()))
}

/// Makes the target, but for one that is to be compressed. Returns what it is to be.
fn made(args: &Convert, file: &str, format: Format, said: &Said) -> Result<Options> {
    let failed = |error: anyhow::Error| {
        anyhow!(
            "{file}: error while converting {}: {error}",
            format.qemu_name()
        )
    };
    let options = create::options_of(format, said, &args.objects, file).map_err(failed)?;
    if !args.compress && !options.packs_always(format) {
        create::write(file, format, &options).map_err(failed)?;
    }
    Ok(options)
}

/// Whether a new image at `file` reads as zeros: a raw disk on a device is what the device holds, and zeros of a luks image
/// are not encrypted ones.
pub fn reads_as_zeros(file: &str, format: Format) -> bool {
    let device = crate::open::at_server(&create::path(file)).is_some()
        || crate::open::file(&create::path(file), Access::ReadUnlocked)
            .is_ok_and(|file| file.is_fixed());
    format != Format::Luks && (format != Format::Raw || !device)
}

impl Copy<'_> {
    /// Copies into the image, which is there, and is to get the `bitmaps` afterwards.
    pub fn run(self, bitmaps: &[qcow2::bitmap::Entry], objects: &Objects) -> Result<(), Failed> {
        let (chain, mut driver) = self.open(bitmaps, objects)?;
        let cluster_size = open::active(&chain)?.image.describe().cluster_size;
        // Zeros that are not written would show what the backing file has.
        let blank = self.blank && (self.options.base.is_some() || chain.layers.len() < 2);
        let target = Target::Image {
            driver: &mut driver,
            blank,
            cluster_size,
            resume: false,
            packs: self.compress,
        };
        let copied = work(
            self.source,
            target,
            &self.options,
            self.rate,
            self.progress,
            self.quiet,
        );
        // What was written stays, as in QEMU, and the image is a sound one.
        let closed = driver.close().map_err(anyhow::Error::from);
        let torn = closed.is_err();
        copied.and(closed).map_err(|why| Failed { why, torn })
    }

    /// Opens the target, which must be fit for it.
    fn open(&self, bitmaps: &[qcow2::bitmap::Entry], objects: &Objects) -> Result<(Chain, Driver)> {
        let name = Name {
            text: self.file,
            format: Some(self.format.qemu_name()).filter(|_| !self.image_opts),
            image_opts: self.image_opts,
        };
        let chain = open::chain(&name, &self.how, objects)?;
        if !bitmaps.is_empty() {
            refuse_bitmaps(open::active(&chain)?.format, None)?;
        }
        if open::active(&chain)?.image.size() < self.source.size() {
            bail!("output file is smaller than input file");
        }
        if self.compress && open::active(&chain)?.format != Format::Qcow2 {
            bail!("Compression not supported for this file format");
        }
        let driver = chain.driver()?;
        Ok((chain, driver))
    }
}

/// Copies into a new image with compressed clusters.
fn compressed(copy: Copy<'_>, options: &Options) -> Result<(), Failed> {
    // Before the target is touched.
    refuse_to_pack(options)?;
    let torn = |why| Failed { why, torn: true };
    let file = crate::create::emptied(&create::path(copy.file), copy.how.cache)?;
    let writer = options.sequential(copy.format, &*file);
    let writer = writer.map_err(|error| torn(error.into()))?;
    let target = Target::Compressed { writer };
    work(
        copy.source,
        target,
        &copy.options,
        copy.rate,
        copy.progress,
        copy.quiet,
    )
    .map_err(torn)
}

fn refuse_to_pack(options: &Options) -> Result<()> {
    if options.preallocation != Preallocation::Off {
        bail!("Compression and preallocation not supported at the same time");
    }
    if let Some(name) = &options.qcow2.data_file {
        bail!("Compression and an external data file ({name}) not supported at the same time");
    }
    Ok(())
}

fn work(
    source: Source<'_>,
    target: Target<'_>,
    options: &ConvertOptions<'_>,
    rate: Option<u64>,
    mut steps: Option<Steps<'_>>,
    quiet: bool,
) -> Result<()> {
    let stop = signals::stop_on_signals()?;
    let mut progress = Progress::new(source.size(), steps.is_some());
    let mut tell = |done| match &mut steps {
        Some(steps) => steps.reached(done, &mut progress),
        None => progress.set(done),
    };
    let mut work = Work::new(stop, &mut tell);
    work.rate = rate;
    let report = convert(source, target, options, &mut work).map_err(unmapped)?;
    progress.end();
    if !quiet {
        warn_of(&report.damage);
    }
    Ok(())
}

/// Why a copy was not made, where the source's map failed.
fn unmapped(error: block::Error) -> anyhow::Error {
    let text = error.to_string();
    let offset = text
        .strip_prefix(UNMAPPED)
        .and_then(|rest| rest.trim_start().split(':').next());
    match offset {
        Some(offset) => anyhow!(
            "error while reading block status at offset {offset}: {}",
            open::os_reason(&error)
        ),
        None => error.into(),
    }
}

/// Says what was not as it should be, of each sector: in qemu-img's order, which looks at the map once to count, and then
/// again while it copies.
fn warn_of(damage: &Damage) {
    let sectors = |found: &Unreadable| (found.at..found.at + found.len).step_by(512);
    let unmapped = || damage.unmapped.iter().map(|found| (found.at, true, found));
    let unreadable = (damage.unreadable.iter())
        .flat_map(|found| sectors(found).map(move |at| (at, false, found)));
    let mut second: Vec<_> = unmapped().chain(unreadable).collect();
    second.sort_by_key(|(at, is_map, _)| (*at, !is_map));
    for (at, is_map, found) in unmapped().chain(second) {
        let what = if is_map { "block status at " } else { "" };
        crate::say(&format!(
            "qemu-img: warning: error while reading {what}offset {at}: {}\n",
            block::plain(&open::reason_of(found.errno, &found.error))
        ));
    }
}
