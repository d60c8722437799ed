//! `qemu-img commit`.

use super::line;
use super::open::{self, How};
use super::progress::Progress;
use super::spec::{Image, Shown};
use crate::{commit, print, signals};
use anyhow::{Result, anyhow, bail};
use clap::Args;
use std::path::Path;
use tool::work::Work;

/// `commit`.
#[derive(Args, Debug)]
pub struct Commit {
    #[command(flatten)]
    shown: Shown,
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
    pub(super) image: Image,
}

/// Puts what an overlay has into an image below it.
pub fn run(args: &Commit) -> Result<u8> {
    let rate = args.rate.as_deref();
    let rate = rate
        .map(|text| line::bytes("rate limit", text))
        .transpose()?;
    let file = args.image.file()?;
    let cache = open::cache(args.cache.as_deref(), "cache")?;
    let name = args.image.spec.name(file);
    let how = How {
        write: true,
        cache,
        ..How::default()
    };
    let (chain, options) = open::chain_and_options(&name, &how, &args.image.spec.objects)?;
    let depth = match &args.base {
        Some(base) => commit::depth_of(Path::new(file), Path::new(base), &chain.layers)
            .map_err(|_| anyhow!("Did not find '{base}' in the backing chain of '{file}'"))?,
        None if chain.layers.len() < 2 => bail!("Image does not have a backing file"),
        None => 1,
    };
    open::refuse_base(&name, depth)?;
    let empties = !args.drop && args.base.is_none();
    let format = open::active(&chain)?.format;
    if empties && !tool::commit::can_empty(format) {
        bail!("Could not empty {file}: Operation not supported");
    }
    let stop = signals::stop_on_signals()?;
    let size = open::active(&chain)?.image.size();
    let mut progress = Progress::new(size, args.shown.progress());
    let mut tell = |done| progress.set(done);
    let mut work = Work::new(stop, &mut tell);
    work.rate = rate.filter(|rate| *rate > 0);
    commit::into(chain, depth, empties, &options, &mut work)?;
    progress.end();
    if !args.shown.quiet {
        print("Image committed.\n")?;
    }
    Ok(0)
}
