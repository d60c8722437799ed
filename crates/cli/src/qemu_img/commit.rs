//! `qemu-img commit`.

use super::line;
use super::open::{self, How};
use super::progress::Progress;
use super::spec::{Image, Shown};
use crate::{commit, print, signals};
use anyhow::{Result, anyhow, bail};
use clap::Args;
use disk::chain::Layer;
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
        Some(base) => depth_of(base, &chain.layers)
            .ok_or_else(|| anyhow!("Did not find '{base}' in the backing chain of '{file}'"))?,
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
    let done = commit::into(chain, depth, empties, &options, &mut work);
    done.map_err(|error| match error.downcast_ref::<block::Error>() {
        Some(own) if own.os_errno().is_some() => {
            anyhow!("Block job failed: {}", open::os_reason(own))
        }
        _ => error,
    })?;
    progress.end();
    if !args.shown.quiet {
        print("Image committed.\n")?;
    }
    Ok(0)
}

/// Which image of the chain `base` is: the name that the image above has for it, or a path from that one's directory.
fn depth_of(base: &str, layers: &[Layer]) -> Option<usize> {
    let pairs = layers.iter().zip(layers.iter().skip(1));
    let found = pairs.enumerate().find(|(_, (above, layer))| {
        let named = above.image.describe().backing;
        let from = above.path.parent().unwrap_or(Path::new(""));
        let meant = std::fs::canonicalize(from.join(block::name::path(base))).ok();
        named.as_deref() == Some(base)
            || meant.is_some() && meant == std::fs::canonicalize(&layer.path).ok()
    });
    found.map(|(nth, _)| nth + 1)
}
