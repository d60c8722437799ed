//! `diskplane convert`.
//!
//! With `--json` an object; bytes are the disk's:
//!
//! | field | |
//! |---|---|
//! | `filename`, `format` | of the target |
//! | `virtual-size` | bytes of the disk |
//! | `written`, `zero`, `same` | bytes written as data, bytes that are zeros, bytes that BASE has |
//! | `offloaded`, `resumed` | of `written`: bytes that the host copied (`-C`), that were there already (`--resume`) |
//! | `compressed-clusters`, `compressed-bytes` | how many clusters were compressed, and what they take in the file |
//! | `unreadable-bytes`, `unreadable` | with `--salvage`: how many, and array of objects with `offset`, `length`, `error` of the first 100 places |
//! | `bitmaps`, `bitmaps-left-out` | with `--bitmaps`: arrays of names, copied and inconsistent |
//! | `file-size`, `actual-size` | bytes of the target's file, and bytes that it takes on the host |

use crate::args::Convert as Arguments;
use crate::partial::Partial;
use crate::{create, encrypt, open, options, signals};
use anyhow::{Context, Result, bail};
use block::{Storage, plain, size};
use crypto::Passphrase;
use disk::chain::{Chain, ChainOptions, Layer};
use image::{Format, qcow2};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use io::{Cache, File, FileKind, OpenOptions};
use serde::Serialize;
use std::io::IsTerminal as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, sync::Arc, thread};
use tool::bitmap::{self, Broken};
use tool::convert::{ConvertOptions, Report, Target, WORKERS_MAX, convert};
use tool::prealloc::Preallocation;
use tool::source::Source;
use tool::work::Work;

/// Bytes of each image's metadata cache: below 256 MiB with all that goes round, but for maps that are kept whole (VDI,
/// Parallels).
pub(crate) const CACHE_BYTES: u64 = 16 << 20;
/// Bytes that are copied between two states from which `--resume` can go on.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// Pieces that are copied past the page cache at a time, at least.
const WORKERS: usize = 8;
/// Places of unreadable bytes that people get to see; with `--json` there are more.
const SHOWN_MAX: usize = 20;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    filename: String,
    format: &'a str,
    virtual_size: u64,
    written: u64,
    zero: u64,
    same: u64,
    offloaded: u64,
    resumed: u64,
    compressed_clusters: u64,
    compressed_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<Vec<Hole<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps_left_out: Option<&'a [String]>,
    file_size: u64,
    actual_size: u64,
}

#[derive(Debug, Serialize)]
struct Hole<'a> {
    offset: u64,
    length: u64,
    error: &'a str,
}

/// What is copied, and how.
struct Copying<'a> {
    args: &'a Arguments,
    target: &'a Path,
    sources: Vec<Chain>,
    window: Option<Window>,
    bytes: u64,
    base: Option<Chain>,
    workers: usize,
}

/// What was copied.
struct Copied {
    format: Format,
    report: Report,
    bitmaps: Vec<String>,
    bitmaps_left_out: Vec<String>,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its first byte.
    pub skip: u64,
    /// Bytes at most.
    pub len: u64,
}

/// Copies a disk.
pub fn run(args: &Arguments) -> Result<()> {
    copy(args, None)
}

/// Copies a disk, or of a single one the part that `window` says.
pub fn copy(args: &Arguments, window: Option<Window>) -> Result<()> {
    let stop = signals::stop_on_signals()?;
    let (names, target) = args.files()?;
    if names.len() > 1 {
        let single = [
            (args.backing.is_some(), "-B: an overlay"),
            (args.snapshot.is_some(), "-l: a snapshot"),
            (args.bitmaps, "--bitmaps: bitmaps"),
            (args.data_file.is_some(), "--data-file: a data file"),
        ];
        if let Some((_, what)) = single.iter().find(|(said, _)| *said) {
            bail!("{what} of several images makes no sense: give one SRC");
        }
    }
    let passphrases = args.moving.keys.read()?;
    let open_source = |spec: &String| {
        let options = ChainOptions {
            format: args.format,
            read_only: true,
            cache: args.source_cache,
            force_share: args.force_share,
            allow_backing: args.moving.allow_backing.clone(),
            data_file: args.data_file.clone(),
            snapshot: args.snapshot.clone(),
            cache_bytes: Some(CACHE_BYTES),
            passphrases: passphrases.clone(),
            ..ChainOptions::default()
        };
        open::named(spec, args.image_opts, &args.moving.keys.objects, options)
    };
    let sources = names.iter().map(open_source);
    let sources = sources.collect::<Result<Vec<Chain>>>()?;
    let below = target_passphrases(args)?;
    let mut copying = Copying {
        args,
        target,
        window,
        bytes: 0,
        base: base(args, target, &below)?,
        workers: match args.workers {
            Some(workers) => usize::from(workers),
            None => workers(args),
        },
        sources,
    };
    let bytes = copying.source()?.size();
    copying.bytes = bytes;
    let bar = progress_bar(bytes, args.moving.progress);
    let mut progress = |done| bar.set_position(done);
    let mut work = Work::new(stop, &mut progress);
    work.rate = args.moving.rate;
    let copied = match args.no_create {
        true => copying.write_existing(below, &mut work),
        false => copying.write_new(below, &mut work),
    };
    bar.finish_and_clear();
    print(args, &copied?)
}

/// How the host caches the target. Past the page cache is faster, and leaves that to others. What `--resume` goes on
/// with goes through it: only there a failed sync is remembered, after which nothing of the file is believed.
fn cache(args: &Arguments) -> Cache {
    let usual = match args.resume {
        true => Cache::Writeback,
        false => Cache::None,
    };
    args.moving.cache.unwrap_or(usual)
}

/// How many pieces are copied at a time. Those that go to the disk wait for it; those that go to memory, or are
/// compressed, take a core each, and more of them would wait for one another.
fn workers(args: &Arguments) -> usize {
    let cores = thread::available_parallelism().map_or(1, |n| n.get().min(WORKERS_MAX));
    match !args.compress && cache(args).direct() {
        true => cores.max(WORKERS),
        false => cores,
    }
}

/// What `--target-key-secret` names.
fn target_passphrases(args: &Arguments) -> Result<Vec<Arc<Passphrase>>> {
    let find = |id: &String| Ok(Arc::new(args.moving.keys.objects.find(id)?));
    args.target_key_secret.iter().map(find).collect()
}

/// The image that the target is to be an overlay of.
fn base(args: &Arguments, target: &Path, passphrases: &[Arc<Passphrase>]) -> Result<Option<Chain>> {
    let Some(name) = &args.backing else {
        return Ok(None);
    };
    // A relative name starts at the directory of the image that stores it.
    let path = target.parent().unwrap_or(Path::new("")).join(name);
    let spec = open::spec(&path).context("-B")?;
    let options = ChainOptions {
        format: args.backing_format,
        read_only: true,
        cache: args.source_cache,
        allow_backing: args.moving.allow_backing.clone(),
        cache_bytes: Some(CACHE_BYTES),
        passphrases: passphrases.to_vec(),
        ..ChainOptions::default()
    };
    Ok(Some(open::chain(spec, &options).context("-B")?))
}

/// A bar for a disk of `bytes` bytes, on a terminal or `anywhere`.
pub(crate) fn progress_bar(bytes: u64, anywhere: bool) -> ProgressBar {
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

/// The image that is written, before its data.
struct Made<'a> {
    path: &'a Path,
    format: Format,
    passphrases: Vec<Arc<Passphrase>>,
    /// It reads as zeros, or as its backing file.
    blank: bool,
    resume: bool,
    /// The host could not write all of it: what it reads as may not be on the disk.
    doubtful: bool,
}

impl Copying<'_> {
    /// The disk that is copied.
    fn source(&self) -> Result<Source<'_>> {
        let source = match (self.window, self.sources.as_slice()) {
            (Some(window), [chain]) => Source::window(chain, window.skip, window.len),
            (_, chains) => Source::join(&chains.iter().collect::<Vec<_>>()),
        };
        Ok(source?.salvaging(self.args.salvage))
    }

    fn options(&self) -> ConvertOptions<'_> {
        ConvertOptions {
            base: self.base.as_ref(),
            workers: self.workers,
            out_of_order: self.args.out_of_order,
            sparse: self.args.sparse,
            offload: self.args.copy_range,
            checkpoint: self.args.resume.then_some(CHECKPOINT_BYTES),
        }
    }

    fn write_existing(
        &self,
        passphrases: Vec<Arc<Passphrase>>,
        work: &mut Work<'_>,
    ) -> Result<Copied> {
        // Opened for writing, raw has to be said.
        let chain = self.open(self.target, self.args.target_format, passphrases)?;
        let format = chain
            .layers
            .first()
            .map_or(Format::Raw, |layer| layer.format);
        if self.args.target_is_zero && chain.layers.len() > 1 {
            bail!("--target-is-zero: DST has a backing file, which it reads as");
        }
        if let Some(base) = &self.base {
            let below = |chain: &Chain, nth: usize| {
                let file = chain.layers.get(nth).and_then(|layer| layer.files.first());
                file.map(|file| file.identity()).transpose()
            };
            if below(&chain, 1)? != below(base, 0)? {
                bail!("-B: with -n it must be the backing file that DST has");
            }
            // The same bytes are another disk in another format.
            let kind = |chain: &Chain, nth: usize| chain.layers.get(nth).map(|l| l.format);
            match (kind(&chain, 1), kind(base, 0)) {
                (recorded, said) if recorded == said => {}
                (Some(recorded), Some(said)) => bail!(
                    "-F {said}: DST has its backing file as {recorded}: say -F {recorded}, or change that \
                     first (diskplane rebase -u)"
                ),
                _ => bail!("-B: with -n it must be the backing file that DST has"),
            }
        }
        self.refuse_sources(&chain)?;
        let entries = self.bitmaps(format)?;
        let report = self.copy(&chain, self.args.target_is_zero, false, work)?;
        drop(chain);
        self.copy_bitmaps(self.target, &entries)?;
        Ok(self.copied(format, report, entries))
    }

    /// Refuses a target that is read from, too. Locks do, unless they are left out (`-U`).
    fn refuse_sources(&self, target: &Chain) -> Result<()> {
        let files = |layers: &[Layer]| -> block::Result<Vec<(u64, u64)>> {
            let files = layers.iter().flat_map(|layer| &layer.files);
            files.map(|file| file.identity()).collect()
        };
        let written = files(target.layers.get(..1).unwrap_or_default())?;
        for source in &self.sources {
            if files(&source.layers)?.iter().any(|id| written.contains(id)) {
                bail!(
                    "{}: is read from, too: it would be overwritten while it is copied",
                    self.target.display()
                );
            }
        }
        Ok(())
    }

    fn copied(&self, format: Format, report: Report, entries: Bitmaps) -> Copied {
        let (entries, bitmaps_left_out) = entries;
        Copied {
            format,
            report,
            bitmaps: entries.iter().map(qcow2::bitmap::Entry::name).collect(),
            bitmaps_left_out,
        }
    }

    /// Opens the target for writing.
    fn open(
        &self,
        path: &Path,
        format: Option<Format>,
        passphrases: Vec<Arc<Passphrase>>,
    ) -> Result<Chain> {
        let options = ChainOptions {
            format,
            cache: cache(self.args),
            // Unless it was asked for: what matters is that it is on the disk in the end.
            direct_fallback: self.args.moving.cache.is_none(),
            allow_backing: self.args.moving.allow_backing.clone(),
            cache_bytes: Some(CACHE_BYTES),
            repair: Some(crate::check::mend),
            passphrases,
            ..ChainOptions::default()
        };
        Ok(open::chain(open::spec(path)?, &options)?)
    }

    fn copy(
        &self,
        target: &Chain,
        blank: bool,
        resume: bool,
        work: &mut Work<'_>,
    ) -> Result<Report> {
        let mut driver = target.driver()?;
        let cluster_size = (target.layers.first()).map_or(1, |layer| layer.unit_bytes());
        let image = Target::Image {
            driver: &mut driver,
            blank,
            cluster_size,
            resume,
        };
        let source = self.source()?;
        let report = convert(source, image, &self.options(), work);
        match report {
            Err(error) if self.args.resume => {
                // What is done is what the next run goes on with; what matters is why this one ended.
                let _ = driver.close();
                Err(error.into())
            }
            Err(error) => Err(error.into()),
            Ok(report) => driver.close().map(|()| report).map_err(Into::into),
        }
    }

    /// The bitmaps that are to be copied; nothing is done where that cannot be.
    fn bitmaps(&self, format: Format) -> Result<Bitmaps> {
        let active = self.sources.first().and_then(|chain| chain.layers.first());
        let file = match active {
            _ if !self.args.bitmaps => return Ok((Vec::new(), Vec::new())),
            Some(layer) if layer.format == Format::Qcow2 => layer.files.first(),
            _ => None,
        };
        let Some(file) = file else {
            bail!("--bitmaps: SRC has no bitmaps: only qcow2 images have");
        };
        if format != Format::Qcow2 {
            bail!("--bitmaps: {format} images have no bitmaps; qcow2 images of version 3 have");
        }
        let broken = match self.args.skip_broken_bitmaps {
            true => Broken::Skip,
            false => Broken::Refuse,
        };
        let found = bitmap::to_copy(&**file, broken)?;
        for name in &found.1 {
            eprintln!(
                "diskplane: note: bitmap '{}' is inconsistent, and left out",
                plain(name)
            );
        }
        Ok(found)
    }

    fn copy_bitmaps(&self, target: &Path, (entries, _): &Bitmaps) -> Result<()> {
        let active = self.sources.first().and_then(|chain| chain.layers.first());
        let Some(file) = active.and_then(|layer| layer.files.first()) else {
            return Ok(());
        };
        if entries.is_empty() {
            return Ok(());
        }
        let target = open::file(target, open::Access::Write)?;
        Ok(bitmap::copy(&**file, entries, &*target)?)
    }

    fn write_new(&self, below: Vec<Arc<Passphrase>>, work: &mut Work<'_>) -> Result<Copied> {
        let args = self.args;
        let format = create::format_of(args.target_format, self.target, "-O")?;
        let mut options = self.creation(format)?;
        let entries = self.bitmaps(format)?;
        if !entries.0.is_empty() && options.qcow2.version < 3 {
            bail!("--bitmaps: images of version 2 (compat=0.10) have none");
        }
        // A device is taken as it is, and stays where it is.
        let device = match fs::metadata(self.target) {
            Ok(metadata) if metadata.is_file() => bail!(create::exists(self.target)),
            found => found.is_ok(),
        };
        let mut passphrases = below;
        if matches!(format, Format::Qcow2 | Format::Luks)
            && let Some(passphrase) = self.target_passphrase(&options.encrypt)?
        {
            options.seal_with(format, &passphrase)?;
            options.qcow2.validate()?;
            passphrases.insert(0, passphrase);
        }
        if device && args.resume {
            bail!("--resume: DST is a device, in which nothing tells how far a copy came");
        }
        if device {
            let mut made = Made {
                path: self.target,
                format,
                passphrases,
                blank: !matches!(format, Format::Raw | Format::Luks),
                resume: false,
                doubtful: false,
            };
            let report = self.fill(&mut made, true, &options, work)?;
            self.copy_bitmaps(self.target, &entries)?;
            return Ok(self.copied(format, report, entries));
        }
        let mut partial = match args.resume {
            true => Partial::lasting(self.target),
            false => Partial::new(self.target),
        };
        if let Some(data) = self.data_file(&options) {
            // The image has another name until it is complete.
            create::refuse_as_data(self.target, &data)?;
            partial.add(data);
        }
        for extent in options
            .vmdk
            .files()
            .iter()
            .filter(|_| format == Format::Vmdk)
        {
            partial.add(self.target.with_file_name(&extent.name));
        }
        let path = partial.path().to_owned();
        let mut made = Made {
            path: &path,
            format,
            passphrases,
            // Zeros in the file are not zeros of the disk there.
            blank: format != Format::Luks,
            resume: args.resume && self.goes_on(&path, format, &options)?,
            doubtful: false,
        };
        let report = self
            .fill(&mut made, false, &options, work)
            // Nobody is to see the name before all is there.
            .and_then(|report| self.copy_bitmaps(&path, &entries).map(|()| report))
            .map_err(|error| partial.name(error));
        if args.resume && made.doubtful {
            eprintln!(
                "diskplane: note: {} is removed: the host failed to write it, and may show what is not on the disk",
                path.display()
            );
            partial.forget();
        }
        let report = report?;
        partial.finish()?;
        Ok(self.copied(format, report, entries))
    }

    /// Makes the target, unless it goes on with one, and copies.
    fn fill(
        &self,
        made: &mut Made<'_>,
        device: bool,
        options: &options::Options,
        work: &mut Work<'_>,
    ) -> Result<Report> {
        if self.args.compress || options.packs_always(made.format) {
            return self.compressed(made, device, options, work);
        }
        if !made.resume {
            create::write_all(made.path, made.format, options, &work.stop)?;
        }
        let passphrases = std::mem::take(&mut made.passphrases);
        let target = self.open(made.path, Some(made.format), passphrases)?;
        let report = self.copy(&target, made.blank && !made.resume, made.resume, work);
        let mut files = target.layers.first().into_iter().flat_map(|l| &l.files);
        made.doubtful = files.any(|file| file.sync_failure().is_some());
        report
    }

    /// What the new image is to be.
    fn creation(&self, format: Format) -> Result<options::Options> {
        let args = self.args;
        let mut options = options::parse(format, &args.options)?;
        if options.backing_file.is_some() || options.backing_format.is_some() {
            bail!("-o backing_file, backing_fmt: say -B and -F");
        }
        if let (Some(name), Some(backing)) = (&args.backing, args.backing_format) {
            create::refuse_backing("-B", format)?;
            options.set_backing(format, self.target, name, backing)?;
        }
        if format == Format::Vmdk {
            options.vmdk.name = create::file_name(self.target)?;
        }
        options.qcow2.extended_l2 = options.extended_l2.unwrap_or(false);
        options.settle(format, self.bytes)?;
        let streams = options.packs_always(format);
        if args.compress && format == Format::Vmdk && !streams {
            bail!(
                "-c: of vmdk images only streamOptimized ones have compressed grains: -o subformat=streamOptimized"
            );
        }
        if args.compress && !matches!(format, Format::Qcow2 | Format::Vmdk) {
            bail!("-c: {format} images have no compressed clusters");
        }
        if args.compress && options.preallocation != Preallocation::Off {
            bail!("-c and -o preallocation exclude each other");
        }
        if args.compress && options.encrypt.is_wanted() {
            bail!("-c and -o encrypt.…: compressed clusters would not be encrypted");
        }
        if args.resume && !matches!(format, Format::Raw | Format::Qcow2) {
            bail!("--resume: a {format} image cannot be gone on with; raw and qcow2 images can");
        }
        if args.resume && options.qcow2.data_file.is_some() {
            bail!(
                "--resume and -o data_file exclude each other: the data file has no other name to wait under"
            );
        }
        Ok(options)
    }

    fn data_file(&self, options: &options::Options) -> Option<PathBuf> {
        let directory = self.target.parent().unwrap_or(Path::new(""));
        let name = options.qcow2.data_file.as_ref();
        name.map(|name| directory.join(name))
    }

    /// Whether `path` is there to go on with. What a run that was killed left before there was a disk is removed, and
    /// so are bitmaps, which come last.
    fn goes_on(&self, path: &Path, format: Format, options: &options::Options) -> Result<bool> {
        let Ok(there) = fs::symlink_metadata(path) else {
            return Ok(false);
        };
        let foreign = || {
            format!(
                "{}: is not a regular file, so no part of a copy: remove it",
                path.display()
            )
        };
        if !there.is_file() {
            bail!(foreign());
        }
        // What a raw disk holds may look like anything.
        let said = (format == Format::Raw).then_some(format);
        let (file, found) = open::image(path, said, open::Access::Write)?;
        // Whoever may write to the directory could put a link in the way, to a file that only we may write to.
        if file.identity()? != (there.dev(), there.ino()) {
            bail!(foreign());
        }
        // A run before may have failed to write what the host still has in memory.
        if let Err(error) = file.read_anew() {
            fs::remove_file(path)?;
            return Err(error).context("the host failed to write it, so it is removed: copy again");
        }
        let differ = match (format, found) {
            (Format::Qcow2, Format::Qcow2) => differences(&qcow2::Header::read(&*file)?, options),
            // Its header is written last, and a raw disk gets its size first.
            (Format::Qcow2, Format::Raw) if !has_begun(&*file)? => {
                fs::remove_file(path)?;
                return Ok(false);
            }
            (Format::Raw, _) => match (file.len()?, block::align_up(options.qcow2.size, 512)) {
                (there, wanted) if there == wanted => Vec::new(),
                (0, _) => {
                    fs::remove_file(path)?;
                    return Ok(false);
                }
                _ => vec!["size"],
            },
            _ => vec!["format"],
        };
        if !differ.is_empty() {
            bail!(
                "{}: is no part of this copy, it has another {}: remove it, or say what it was begun with",
                path.display(),
                differ.join(", ")
            );
        }
        if format == Format::Qcow2 {
            bitmap::remove_all(&*file)?;
        }
        Ok(true)
    }

    /// The passphrase that a new image is to be encrypted with, if it is to be.
    fn target_passphrase(&self, options: &encrypt::Options) -> Result<Option<Arc<Passphrase>>> {
        let is_encrypted = |layer: &Layer| layer.image.encryption().is_some();
        let mut layers = self.sources.iter().flat_map(|source| &source.layers);
        if options.is_wanted() && !options.names_secret() && layers.any(is_encrypted) {
            bail!(
                "-o encrypt.format=luks: SRC has a passphrase of its own: name the new one, \
                 --object secret,id=ID,file=FILE -o encrypt.key-secret=ID"
            );
        }
        options.passphrase(&self.args.moving.keys)
    }

    fn compressed(
        &self,
        made: &Made<'_>,
        device: bool,
        options: &options::Options,
        work: &mut Work<'_>,
    ) -> Result<Report> {
        let path = made.path;
        let open = OpenOptions {
            cache: self.args.moving.cache.unwrap_or_default(),
            ..OpenOptions::default()
        };
        let file = match device {
            true => io::wait_for_lock(|| File::open(path, &open))?,
            false => File::create_new(path, &open)?,
        };
        if device && file.kind() != FileKind::BlockDevice {
            bail!("{}: neither a file nor a block device", path.display());
        }
        let target = Target::Compressed {
            writer: options.sequential(made.format, &*file)?,
        };
        let source = self.source()?;
        Ok(convert(source, target, &self.options(), work)?)
    }
}

/// Whether the file shows a header, of whatever it is.
fn has_begun(file: &dyn Storage) -> Result<bool> {
    let mut start = [0; 512];
    let len = file.len()?.min(start.len() as u64) as usize;
    if let Some(there) = start.get_mut(..len).filter(|there| !there.is_empty()) {
        file.read_at(0, there)?;
    }
    Ok(start.iter().any(|byte| *byte != 0))
}

/// In what an image with `header` is not as `options` have it.
fn differences(header: &qcow2::Header, options: &options::Options) -> Vec<&'static str> {
    let wanted = &options.qcow2;
    let (name, format) = wanted.backing.clone().unzip();
    let packs = u8::from(wanted.compression == qcow2::Compression::Zstd);
    let lazy = header.compatible & qcow2::features::LAZY_REFCOUNTS != 0;
    [
        ("size", header.size == block::align_up(wanted.size, 512)),
        ("cluster_size", header.cluster_size() == wanted.cluster_size),
        ("compat", header.version == wanted.version),
        (
            "refcount_bits",
            1 << header.refcount_order == wanted.refcount_bits,
        ),
        ("lazy_refcounts", lazy == wanted.lazy_refcounts),
        ("extended_l2", header.extended_l2() == wanted.extended_l2),
        ("compression_type", header.compression_type == packs),
        ("backing file (-B)", header.backing == name),
        (
            "format of the backing file (-F)",
            header.backing_format() == format,
        ),
        (
            "encrypt.format",
            (header.crypt_method != 0) == options.encrypt.is_wanted(),
        ),
    ]
    .into_iter()
    .filter_map(|(what, same)| (!same).then_some(what))
    .collect()
}

/// Bitmaps to copy, and names of those that are left out.
type Bitmaps = (Vec<qcow2::bitmap::Entry>, Vec<String>);

fn print(args: &Arguments, copied: &Copied) -> Result<()> {
    let Copied { format, report, .. } = copied;
    let (names, target) = args.files()?;
    let metadata = fs::metadata(target)?;
    let (file_size, actual_size) = (metadata.len(), metadata.blocks().saturating_mul(512));
    if args.moving.json {
        let places = report.unreadable.iter().map(|found| Hole {
            offset: found.at,
            length: found.len,
            error: &found.error,
        });
        let json = Json {
            filename: target.display().to_string(),
            format: format.name(),
            virtual_size: report.size,
            written: report.written,
            zero: report.zero,
            same: report.same,
            offloaded: report.offloaded,
            resumed: report.resumed,
            compressed_clusters: report.compressed_clusters,
            compressed_bytes: report.compressed_bytes,
            unreadable_bytes: args.salvage.then_some(report.unreadable_bytes),
            unreadable: args.salvage.then(|| places.collect()),
            bitmaps: args.bitmaps.then_some(&copied.bitmaps),
            bitmaps_left_out: args.bitmaps.then_some(&copied.bitmaps_left_out),
            file_size,
            actual_size,
        };
        return crate::print(&crate::json(&json)?);
    }
    for found in report.unreadable.iter().take(SHOWN_MAX) {
        eprintln!(
            "diskplane: note: {} bytes at {:#x} are zeros now: {}",
            found.len,
            found.at,
            plain(&found.error)
        );
    }
    let mut line = format!(
        "converted {} to {}: {format}, {}; {} of data",
        names.join(" and "),
        target.display(),
        size::human(report.size),
        size::human(report.written)
    );
    let mut add = |bytes: u64, what: &str| {
        if bytes > 0 {
            line.push_str(&format!(", {} {what}", size::human(bytes)));
        }
    };
    let base = args.backing.as_deref().unwrap_or_default();
    add(report.same, &format!("as in {base}"));
    add(report.offloaded, "copied by the host");
    add(report.resumed, "there already");
    add(report.unreadable_bytes, "unreadable");
    if report.compressed_clusters > 0 {
        let packed = size::human(report.compressed_bytes);
        line.push_str(&format!(
            ", {} clusters compressed to {packed}",
            report.compressed_clusters
        ));
    }
    match copied.bitmaps.len() {
        0 => {}
        1 => line.push_str(", 1 bitmap"),
        count => line.push_str(&format!(", {count} bitmaps")),
    }
    match args.moving.quiet {
        true => Ok(()),
        false => crate::print(&(line + "\n")),
    }
}
