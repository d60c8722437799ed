//! `qemu-img bench`.

use super::line::{self, usage};
use super::open::{self, How};
use super::spec::Image;
use crate::bench_image::on;
use crate::print;
use anyhow::{Result, anyhow, bail};
use bench::image::Run;
use clap::Args;
use io::{Aio, EngineKind};

/// `bench`.
#[derive(Args, Debug)]
pub struct Bench {
    /// accepted: the figures are what is asked for
    #[arg(short, long)]
    _quiet: bool,
    /// cache mode for FILENAME (writeback)
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// number of I/O requests to perform
    #[arg(short, long, value_name = "COUNT")]
    count: Option<String>,
    /// size of each I/O request
    #[arg(short = 's', long, value_name = "BUFFER_SIZE")]
    buffer_size: Option<String>,
    /// number of requests to perform in parallel
    #[arg(short, long, value_name = "DEPTH")]
    depth: Option<String>,
    /// start first request at this OFFSET
    #[arg(short, long, value_name = "OFFSET")]
    offset: Option<String>,
    /// each next request offset increment
    #[arg(short = 'S', long, value_name = "STEP_SIZE")]
    step_size: Option<String>,
    /// async-io backend (threads, native, io_uring)
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// use native AIO backend if possible
    #[arg(short, long)]
    native: bool,
    /// perform write test (default is read)
    #[arg(short, long)]
    write: bool,
    /// write this pattern byte instead of zero
    #[arg(long, value_name = "PATTERN")]
    pattern: Option<String>,
    /// issue flush after this number of requests
    #[arg(long, value_name = "FLUSH_INTERVAL")]
    flush_interval: Option<String>,
    /// do not wait when flushing pending requests
    #[arg(long)]
    no_drain: bool,
    /// open images in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    pub(super) image: Image,
}

const MOST: u64 = i32::MAX as u64;

/// Runs requests on an image.
pub fn run(args: &Bench) -> Result<u8> {
    let number = |what, text: &Option<String>, min, max, default| match text {
        Some(text) => line::number(what, text, min, max),
        None => Ok(default),
    };
    let count = number("request count", &args.count, 1, MOST, 75_000)?;
    let depth = number("queue depth", &args.depth, 1, MOST, 64)?;
    let offset = number("offset", &args.offset, 0, i64::MAX as u64, 0)?;
    let len = number("buffer size", &args.buffer_size, 1, MOST, 4096)?;
    let step = number("step size", &args.step_size, 0, MOST, 0)?;
    let pattern = number("pattern byte", &args.pattern, 0, 0xff, 0)?;
    let flush_interval = number("flush interval", &args.flush_interval, 0, MOST, 0)?;
    let aio = match args.aio.as_deref() {
        Some("threads") => Aio::Only(EngineKind::Threads),
        Some("native") => Aio::Only(EngineKind::Native),
        Some("io_uring") => Aio::Only(EngineKind::IoUring),
        Some(other) => bail!("Invalid aio option: {other}"),
        None if args.native => Aio::Only(EngineKind::Native),
        None => Aio::Auto,
    };
    let cache =
        open::cache(args.cache.as_deref(), "cache").map_err(|_| anyhow!("Invalid cache mode"))?;
    let [file] = args.image.files.as_slice() else {
        return Err(usage("Expecting one image file name"));
    };
    if !args.write && flush_interval > 0 {
        bail!("--flush-interval is only available in write tests");
    }
    if flush_interval > 0 && flush_interval < depth {
        bail!("Flush interval can't be smaller than depth");
    }
    let run = Run {
        write: args.write,
        count,
        depth: u16::try_from(depth).unwrap_or(u16::MAX),
        len: u32::try_from(len)?,
        offset,
        step: if step == 0 { len } else { step },
        pattern: u8::try_from(pattern)?,
        flush_interval,
        drain: !args.no_drain,
    };
    run.validate()?;
    let name = args.image.spec.name(file);
    let how = How {
        write: args.write,
        force_share: args.force_share,
        cache,
        ..How::default()
    };
    let chain = open::chain(&name, &how, &args.image.spec.objects)?;
    if aio == Aio::Only(EngineKind::Native) && !cache.direct() {
        bail!(
            "Could not open '{file}': aio=native was specified, but it requires cache.direct=on, which was not specified."
        );
    }
    // With -q too, as qemu-img does.
    let what = if args.write { "write" } else { "read" };
    print(&format!(
        "Sending {count} {what} requests, {len} bytes each, {depth} in parallel (starting at offset {offset}, step \
         size {})\n",
        run.step
    ))?;
    if flush_interval > 0 {
        print(&format!("Sending flush every {flush_interval} requests\n"))?;
    }
    let (_, outcome) = on(chain, aio, cache, &run)?;
    print(&format!(
        "Run completed in {:.3} seconds.\n",
        outcome.elapsed.as_secs_f64()
    ))?;
    Ok(0)
}
