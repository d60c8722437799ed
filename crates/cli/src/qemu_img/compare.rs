//! `qemu-img compare`.

use super::line::usage;
use super::open::{self, How, Name};
use super::progress::Progress;
use crate::secret::Objects;
use crate::{print, signals};
use anyhow::{Error, Result, anyhow};
use clap::Args;
use tool::compare::{Difference, Failure, Outcome, compare};
use tool::source::Source;
use tool::work::Work;

/// `compare`.
#[derive(Args, Debug)]
pub struct Compare {
    /// quiet operation
    #[arg(short, long)]
    quiet: bool,
    /// show operation progress
    #[arg(short, long)]
    progress: bool,
    /// specify FILENAME1 image format explicitly
    #[arg(
        short = 'f',
        long = "a-format",
        alias = "left-format",
        value_name = "FMT"
    )]
    format: Option<String>,
    /// specify FILENAME2 image format explicitly
    #[arg(
        short = 'F',
        long = "b-format",
        alias = "right-format",
        value_name = "FMT"
    )]
    second_format: Option<String>,
    /// indicates that FILENAMEs are complete image specifications instead of file names
    #[arg(long)]
    image_opts: bool,
    /// strict mode, also check if sizes are equal
    #[arg(short, long)]
    strict: bool,
    /// images caching mode (writeback)
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// open images in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    pub(super) objects: Objects,
    /// image files (or specifications) to compare
    #[arg(value_name = "FILENAME1 FILENAME2")]
    files: Vec<String>,
}

/// Exit codes beside 0 for the same and 1 for different: no image, no map of it, no data of it.
const OPENING: u8 = 2;
const MAPPING: u8 = 3;
const READING: u8 = 4;

/// Compares two images.
pub fn run(args: &Compare) -> Result<u8> {
    let [first, second] = args.files.as_slice() else {
        return Err(usage("Expecting two image file names"));
    };
    let failed = |code: u8| {
        move |error: Error| {
            super::complain(&error);
            code
        }
    };
    match outcome(args, first, second, failed(OPENING)) {
        Ok(outcome) => tell(args, &outcome),
        Err(Stopped::Code(code)) => Ok(code),
        Err(Stopped::Failed(failure, sizes)) => match failure {
            Failure::Stopped(error) => Err(error.into()),
            Failure::Map { error, .. } if is_stop(&error) => Err(error.into()),
            Failure::Map { image, .. } => {
                let name = if image == 0 { first } else { second };
                super::complain(&anyhow!("Sector allocation test failed for {name}"));
                Ok(MAPPING)
            }
            Failure::Read { error, .. } if is_stop(&error) => Err(error.into()),
            Failure::Read { image, at, error } => {
                let name = if image == 0 { first } else { second };
                let why = open::os_reason(&error);
                super::complain(&anyhow!("Error while reading offset {at} of {name}: {why}"));
                let [a, b] = sizes;
                if a != b && at >= a.min(b) && !args.quiet {
                    print("Warning: Image size mismatch!\n")?;
                }
                Ok(READING)
            }
        },
    }
}

fn is_stop(error: &block::Error) -> bool {
    error.kind() == block::ErrorKind::Interrupted
}

/// Why there is no outcome.
enum Stopped {
    /// It was said already.
    Code(u8),
    /// The disks have these sizes.
    Failed(Failure, [u64; 2]),
}

fn outcome(
    args: &Compare,
    first: &str,
    second: &str,
    opening: impl Fn(Error) -> u8,
) -> Result<Outcome, Stopped> {
    let failed = |error| Stopped::Code(opening(error));
    let cache = open::cache(args.cache.as_deref(), "source cache").map_err(failed)?;
    let how = How {
        cache,
        force_share: args.force_share,
        ..How::default()
    };
    let chain = |text, format: &Option<String>| {
        let name = Name {
            text,
            format: format.as_deref(),
            image_opts: args.image_opts,
        };
        open::chain(&name, &how, &args.objects).map_err(failed)
    };
    let a = chain(first, &args.format)?;
    let b = chain(second, &args.second_format)?;
    let source = |chain| Source::new(chain).map_err(|error| failed(error.into()));
    let (a, b) = (source(&a)?, source(&b)?);
    let stop = signals::stop_on_signals().map_err(failed)?;
    let sizes = [a.size(), b.size()];
    let mut progress = Progress::new(a.size().max(b.size()), args.progress && !args.quiet);
    let mut tell = |done| progress.set(done);
    let mut work = Work::new(stop, &mut tell);
    let found = compare(a, b, args.strict, &mut work);
    progress.end();
    found.map_err(|failure| Stopped::Failed(failure, sizes))
}

fn tell(args: &Compare, outcome: &Outcome) -> Result<u8> {
    if !args.quiet {
        print(&crate::compare::text(outcome, args.strict))?;
    }
    Ok(outcome.difference.map_or(0, |difference| match difference {
        Difference::Size | Difference::Status { .. } | Difference::Content { .. } => 1,
    }))
}
