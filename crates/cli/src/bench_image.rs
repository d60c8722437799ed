//! `diskplane bench image`: requests to an image, with no server between.
//!
//! With `--json` one object: `filename`, `engine`; `requests`, `flushes`, `seconds`; `iops` and `bytes-per-second` of the
//! reads or writes.

use crate::args::{bytes, format};
use crate::secret::Keys;
use crate::{check, open, print};
use anyhow::Result;
use bench::image::{Outcome, Run, run as drive};
use block::size;
use clap::Args;
use disk::chain::{Chain, ChainOptions};
use disk::{Disk, DiskOptions};
use image::Format;
use io::{Aio, Cache, EngineKind};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;

/// `bench image`.
#[derive(Args, Debug)]
#[command(
    after_help = "As qemu-img bench: each request is a step behind the one before, from the disk's end on at its \
                  beginning again. With -w what the image holds there is lost."
)]
pub struct Image {
    /// Format of the image: needed for raw with -w, known by its magic otherwise
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Requests in all
    #[arg(short, long, value_name = "N", default_value_t = 75_000)]
    pub count: u64,
    /// Requests in flight
    #[arg(short, long, value_name = "N", default_value_t = 64)]
    pub depth: u16,
    /// Bytes of a request
    #[arg(short = 's', long, value_name = "SIZE", default_value = "4K", value_parser = bytes)]
    pub bs: u64,
    /// Bytes from one request to the next [default: those of a request]
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = bytes)]
    pub step: Option<u64>,
    /// Where the first request begins
    #[arg(short, long, value_name = "OFFSET", default_value = "0", value_parser = bytes)]
    pub offset: u64,
    /// Write instead of read
    #[arg(short, long)]
    pub write: bool,
    /// Write this byte
    #[arg(long, value_name = "BYTE", default_value_t = 0, requires = "write")]
    pub pattern: u8,
    /// Flush after so many writes
    #[arg(long, value_name = "N", default_value_t = 0, requires = "write")]
    pub flush_interval: u64,
    /// Requests go on while a flush is under way
    #[arg(long, requires = "flush_interval")]
    pub no_drain: bool,
    /// How I/O is submitted: auto, threads, native or io_uring
    #[arg(short = 'i', long, value_name = "ENGINE", default_value = "auto", value_parser = str::parse::<Aio>)]
    pub aio: Aio,
    /// How the host caches: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub cache: Cache,
    /// Read the image even while another process writes it
    #[arg(short = 'U', long, conflicts_with = "write")]
    pub force_share: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// IMAGE is key=value,…, as in qemu-img, rather than a file's name
    #[arg(long)]
    pub image_opts: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory; an NBD export's name lets images
    /// lie on that export
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// Image, or null:SIZE
    pub image: PathBuf,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    filename: String,
    engine: String,
    requests: u64,
    flushes: u64,
    seconds: f64,
    iops: f64,
    bytes_per_second: f64,
}

/// Runs requests on an image.
pub fn run(args: &Image) -> Result<()> {
    let run = Run {
        write: args.write,
        count: args.count,
        depth: args.depth,
        len: u32::try_from(args.bs).unwrap_or(u32::MAX),
        offset: args.offset,
        step: args.step.unwrap_or(args.bs),
        pattern: args.pattern,
        flush_interval: args.flush_interval,
        drain: !args.no_drain,
    };
    run.validate()?;
    let options = ChainOptions {
        format: args.format,
        read_only: !args.write,
        cache: args.cache,
        direct_fallback: args.aio == Aio::Auto,
        force_share: args.force_share,
        allow_backing: args.allow_backing.clone(),
        passphrases: args.keys.read()?,
        repair: Some(check::MEND),
        ..ChainOptions::default()
    };
    let chain = open::named(&args.image, args.image_opts, &args.keys.objects, options)?;
    let (kind, outcome) = on(chain, args.aio, args.cache, &run)?;
    let seconds = outcome.elapsed.as_secs_f64().max(1e-9);
    let iops = outcome.requests as f64 / seconds;
    print(&match args.json {
        true => crate::json(&Json {
            filename: args.image.display().to_string(),
            engine: kind.to_string(),
            requests: outcome.requests,
            flushes: outcome.flushes,
            seconds,
            iops,
            bytes_per_second: iops * args.bs as f64,
        })?,
        false => format!(
            "{} {} of {}, {} in flight, {} flushes, {kind}: {seconds:.3} s, {iops:.0} a second, {}/s\n",
            outcome.requests,
            if args.write { "writes" } else { "reads" },
            size::human(args.bs),
            args.depth,
            outcome.flushes,
            size::human((iops * args.bs as f64) as u64),
        ),
    })
}

/// Runs requests on an open chain, and closes it.
pub fn on(chain: Chain, aio: Aio, cache: Cache, run: &Run) -> Result<(EngineKind, Outcome)> {
    let files: Vec<_> = chain.layers.iter().flat_map(|l| l.files.clone()).collect();
    let kind = io::choose(aio, &files)?.kind;
    let options = DiskOptions {
        read_only: !run.write,
        writethrough: cache.writethrough(),
        ..DiskOptions::default()
    };
    let disk: Arc<Disk> = Disk::new(chain, options)?;
    let outcome = drive(&disk, kind, run)?;
    disk.close()?;
    Ok((kind, outcome))
}
