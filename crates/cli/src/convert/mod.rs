//! `diskplane convert`.
//!
//! What is read, and how, is here; `existing` and `fresh` write the target, `resume` finds what a run before left of it, and
//! `report` says what was copied.

mod existing;
mod fresh;
mod report;
mod resume;

use crate::args::Convert as Arguments;
use crate::{create, open, options, signals};
use anyhow::{Context, Result, bail};
use block::plain;
use crypto::Passphrase;
use disk::chain::{Chain, ChainOptions};
use image::{Format, qcow2};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use io::Cache;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::{sync::Arc, thread};
use tool::bitmap::{self, Broken};
use tool::convert::{ConvertOptions, Report, Target, WORKERS_MAX, convert};
use tool::source::Source;
use tool::work::Work;

/// Bytes of each image's metadata cache: below 256 MiB with all that goes round, but for maps that are kept whole (VDI,
/// Parallels).
pub(crate) const CACHE_BYTES: u64 = 16 << 20;
/// Bytes that are copied between two states from which `--resume` can go on.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// Pieces that are copied past the page cache at a time, at least.
const WORKERS: usize = 8;

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

/// Bitmaps to copy, and names of those that are left out.
type Bitmaps = (Vec<qcow2::bitmap::Entry>, Vec<String>);

/// Copies a disk.
pub fn run(args: &Arguments) -> Result<()> {
    copy(args, None)
}

/// Copies a disk, or of a single one the part that `window` says.
pub fn copy(args: &Arguments, window: Option<Window>) -> Result<()> {
    if options::wants_help(&args.options) {
        let name = args.files.last().map_or(Path::new(""), PathBuf::as_path);
        let format = create::format_of(args.target_format, name, "-O")?;
        return crate::print(&options::help(format));
    }
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
    let open_source = |name: &PathBuf| {
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
        open::named(name, args.image_opts, &args.moving.keys.objects, options)
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
    let mut progress = |done| show(&bar, done);
    let mut work = Work::new(stop, &mut progress);
    work.rate = args.moving.rate;
    let copied = match args.no_create {
        true => copying.write_existing(below, &mut work),
        false => copying.write_new(below, &mut work),
    };
    bar.finish_and_clear();
    report::print(args, &copied?)
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
    let find = |id: &String| args.moving.keys.objects.find(id);
    args.target_key_secret.iter().map(find).collect()
}

/// The image that the target is to be an overlay of.
fn base(args: &Arguments, target: &Path, passphrases: &[Arc<Passphrase>]) -> Result<Option<Chain>> {
    let Some(name) = &args.backing else {
        return Ok(None);
    };
    // A relative name starts at the directory of the image that stores it.
    let path = open::beside(target, name);
    let options = ChainOptions {
        format: args.backing_format,
        read_only: true,
        cache: args.source_cache,
        allow_backing: args.moving.allow_backing.clone(),
        cache_bytes: Some(CACHE_BYTES),
        passphrases: passphrases.to_vec(),
        ..ChainOptions::default()
    };
    Ok(Some(open::chain(&path, &options).context("-B")?))
}

/// Shows on `bar` that `done` bytes are done; SIGUSR1 has that said on stderr, where there is none to see.
pub(crate) fn show(bar: &ProgressBar, done: u64) {
    bar.set_position(done);
    if signals::progress_wanted() {
        let percent = match bar.length() {
            None | Some(0) => 100.0,
            Some(bytes) => done.min(bytes) as f64 * 100.0 / bytes as f64,
        };
        bar.suspend(|| eprintln!("diskplane: {percent:.1} % done"));
    }
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
            repair: Some(crate::check::PREPARE),
            passphrases,
            ..ChainOptions::default()
        };
        Ok(open::chain(path, &options)?)
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
            // Of new images the writer does, in one go.
            packs: self.args.compress,
        };
        let source = self.source()?;
        let report = convert(source, image, &self.options(), work);
        match report {
            Err(error) if self.args.resume || self.args.no_create => {
                // What is done is what the next run goes on with, or what DST has then; what matters is why this one ended.
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
}
