//! `qemu-img commit`.

use super::line;
use super::open::{self, How, Name};
use super::progress::Progress;
use crate::secret::Objects;
use crate::{commit, print, signals};
use anyhow::{Result, anyhow, bail};
use clap::Args;
use image::Format;
use std::path::Path;
use tool::work::Work;

/// `commit`.
#[derive(Args, Debug)]
pub struct Commit {
    /// quiet operations
    #[arg(short, long)]
    quiet: bool,
    /// show operation progress
    #[arg(short, long)]
    progress: bool,
    /// specify FILENAME image format explicitly
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// indicates that FILENAME is a complete image specification instead of a file name
    #[arg(long)]
    image_opts: bool,
    /// image cache mode (writeback)
    #[arg(short = 't', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// skip emptying FILENAME on completion
    #[arg(short, long)]
    drop: bool,
    /// image in the backing chain to which to commit changes instead of the previous one (implies --drop)
    #[arg(short, long, value_name = "BASE_IMG")]
    base: Option<String>,
    /// I/O rate limit
    #[arg(short, long, value_name = "RATE")]
    rate: Option<String>,
    #[command(flatten)]
    objects: Objects,
    /// name of the image file to operate on
    #[arg(value_name = "FILENAME")]
    files: Vec<String>,
}

/// Puts what an overlay has into an image below it.
pub fn run(args: &Commit) -> Result<u8> {
    let rate = args.rate.as_deref();
    let rate = rate
        .map(|text| line::bytes("rate limit", text))
        .transpose()?;
    let file = line::one(&args.files, "Expecting one image file name")?;
    let cache = open::cache(args.cache.as_deref(), "cache")?;
    let name = Name {
        text: file,
        format: args.format.as_deref(),
        image_opts: args.image_opts,
    };
    let how = How {
        write: true,
        cache,
        ..How::default()
    };
    let (chain, options) = open::chain_and_options(&name, &how, &args.objects)?;
    let depth = match &args.base {
        Some(base) => commit::depth_of(Path::new(file), Path::new(base), &chain.layers)
            .map_err(|_| anyhow!("Did not find '{base}' in the backing chain of '{file}'"))?,
        None if chain.layers.len() < 2 => bail!("Image does not have a backing file"),
        None => 1,
    };
    let empties = !args.drop && args.base.is_none();
    let format = open::active(&chain)?.format;
    if empties && !matches!(format, Format::Qcow2 | Format::Qed) {
        bail!("Could not empty {file}: Operation not supported");
    }
    let stop = signals::stop_on_signals()?;
    let size = open::active(&chain)?.image.size();
    let mut progress = Progress::new(size, args.progress && !args.quiet);
    let mut tell = |done| progress.set(done);
    let mut work = Work::new(stop, &mut tell);
    work.rate = rate.filter(|rate| *rate > 0);
    commit::into(chain, depth, empties, &options, &mut work)?;
    progress.end();
    if !args.quiet {
        print("Image committed.\n")?;
    }
    Ok(0)
}
