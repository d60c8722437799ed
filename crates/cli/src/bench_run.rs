//! `diskplane bench run`: the background's studies.

use crate::{bench_clear, bench_report, bench_versus::end_on_signals, print, signals::Signals};
use anyhow::{Context, Result, bail};
use bench::{
    experiment::{self, Event, Experiment, Options, Progress},
    record::{Failure, Sample, Set},
};
use clap::{ArgGroup, Args};
use std::{
    fmt::Write as _,
    io::{IsTerminal, Write as _},
    path::PathBuf,
    time::Duration,
};

/// Rounds of each cell; and of those of a quick run whose findings are undecided then, as far as there is time.
const SAMPLES: usize = 5;
const SAMPLES_MORE: usize = 20;
/// A quick run takes so long at most, with what it sets up and takes down.
const QUICK: Duration = Duration::from_secs(560);

/// `bench run`.
#[derive(Args, Debug)]
#[command(
    group(ArgGroup::new("extent").args(["quick", "full"])),
    after_help = "A run that was stopped goes on where it was when it is started again with the same --out and options; what a killed \
                  one left is removed then, or by bench clear. Sides that cannot be measured are named, and the run goes on; it fails \
                  (exit status 1) if it could measure nothing of what lacked. \
                  File systems on loop devices and simulated disks need root, E2 also nbdfuse (libnbd); without, cells that want \
                  them say so."
)]
pub struct RunArgs {
    /// E0 (metadata cache), E1 (native or threads), E2 (file systems on virtual disks) or E3 (where the latency goes)
    #[arg(value_name = "EXPERIMENT")]
    pub experiment: String,
    /// Fewer cells, shorter samples on smaller images: 10 minutes at most (the default)
    #[arg(long)]
    pub quick: bool,
    /// Every cell
    #[arg(long)]
    pub full: bool,
    /// Only cells whose names match, * standing for anything; also such as --quick leaves out
    #[arg(long, value_name = "PATTERN")]
    pub cells: Option<String>,
    /// Rounds: samples of each side of a cell, taken in turn [default: 5; with --quick as many as there is time for, and more of
    /// cells that leave a finding undecided]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub samples: Option<u16>,
    /// Seconds that each sample measures [default: 2, with --quick 0.5]
    #[arg(long, value_name = "S", value_parser = crate::bench_versus::seconds)]
    pub seconds: Option<Duration>,
    /// Bytes of a disk [default: what the experiment says]
    #[arg(long, value_name = "SIZE", value_parser = crate::args::bytes)]
    pub disk: Option<u64>,
    /// Where images (gone afterwards), records and the report go [default: the experiment's name]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Also write each chart as a file into this folder
    #[arg(long, value_name = "DIR")]
    pub svg: Option<PathBuf>,
    /// For the cells in a Linux guest (E2: guest-…): the folder that scripts/guest-build.sh prints
    #[arg(long, value_name = "DIR")]
    pub guest: Option<PathBuf>,
    /// Also draw a flame graph of each server's CPU in DIR/flame (needs perf); the page links to them
    #[arg(long)]
    pub flamegraph: bool,
    /// A block device that file systems are made on and bare disks are, in place of loop devices on files (E1). All that is on it
    /// is lost; one that is in use, or on which something is known to be, is refused
    #[arg(long, value_name = "PATH")]
    pub device: Option<PathBuf>,
    /// Take --device also where a file system, partitions or the like are found on it, which are lost
    #[arg(long, requires = "device")]
    pub overwrite_device: bool,
    /// Show the cells and their sides, and do nothing
    #[arg(long)]
    pub list: bool,
}

/// Runs an experiment and reports on it.
pub fn run(args: &RunArgs) -> Result<()> {
    let experiment = experiment::find(&args.experiment)?;
    if args.list {
        return print(&experiment::list(&experiment));
    }
    let options = options(args, &experiment)?;
    // Before anything starts a thread, so that all of them leave these signals to the one that waits for them.
    let (dir, device) = (options.dir.clone(), options.device.clone());
    end_on_signals(Signals::block()?, move |stopped| {
        bench_clear::instead(stopped, &dir, device.as_deref())
    })?;
    let ran = drive(&experiment, &options)?;
    bench_report::report(&ran.set, None, args.svg.as_deref(), false)?;
    let cells = experiment::cells(&experiment, options.quick, options.cells.as_deref())?;
    let is_there = |sample: &Sample| cells.iter().any(|cell| cell.name == sample.cell);
    match (ran.taken, ran.failed) {
        (0, Some(failure)) => bail!(
            "nothing could be measured{}: {}, {}: {}",
            match ran.set.samples.iter().any(is_there) {
                true => " of what lacked",
                false => "",
            },
            failure.cell,
            failure.side,
            failure.why
        ),
        (0, None) if !ran.set.samples.iter().any(is_there) => {
            bail!("nothing was measured: there was no time for it (give --samples)")
        }
        _ => Ok(()),
    }
}

/// What came of a run.
struct Ran {
    /// All that there is in its folder.
    set: Set,
    /// Samples that this run took itself.
    taken: usize,
    /// What failed in this run last.
    failed: Option<Failure>,
}

fn drive(experiment: &Experiment, options: &Options) -> Result<Ran> {
    let terminal = std::io::stderr().is_terminal();
    let (mut taken, mut failed) = (0, None);
    let run = experiment::run(experiment, options, &mut |event| {
        let say = |note: &str| {
            let clear = if terminal { "\r\x1b[K" } else { "" };
            // A line that cannot be shown is no reason to stop.
            let _ = writeln!(std::io::stderr(), "{clear}{}", block::plain(note));
        };
        match event {
            Event::Progress(progress) if terminal => {
                let mut err = std::io::stderr().lock();
                let _ = write!(err, "\r\x1b[K{}", line(&progress)).and_then(|()| err.flush());
            }
            Event::Progress(progress) => tracing::info!("{}", line(&progress)),
            Event::Note(note) => say(note),
            Event::Failure(failure) => {
                say(&format!(
                    "{}, {}: {}",
                    failure.cell, failure.side, failure.why
                ));
                failed = Some(failure.clone());
            }
            Event::Sample(_) => taken += 1,
        }
    });
    if terminal {
        crate::say("\r\x1b[K");
    }
    Ok(Ran {
        set: run?,
        taken,
        failed,
    })
}

/// Cell, what is done, how far, time left, the last result; in the width of a terminal, mostly.
fn line(progress: &Progress<'_>) -> String {
    let minutes = progress.left.as_secs() / 60;
    let seconds = progress.left.as_secs() % 60;
    let mut text = format!(
        "{}: {} ({}/{}, {minutes}:{seconds:02} left)",
        progress.cell,
        progress.what,
        progress.done + 1,
        progress.total.max(progress.done + 1)
    );
    if let Some(last) = progress.last {
        let _ = write!(text, " · {last}");
    }
    block::plain(&text)
}

fn options(args: &RunArgs, experiment: &Experiment) -> Result<Options> {
    let quick = !args.full;
    let (full_bytes, quick_bytes) = experiment.disk_bytes;
    let disk_bytes = args
        .disk
        .unwrap_or(if quick { quick_bytes } else { full_bytes });
    if !(16 << 20..=1 << 40).contains(&disk_bytes) || !disk_bytes.is_multiple_of(1 << 20) {
        bail!("--disk: it must be 16M to 1T, and a multiple of 1M");
    }
    let (duration, ramp) = match quick {
        true => (Duration::from_millis(500), Duration::from_millis(100)),
        false => (Duration::from_secs(2), Duration::from_millis(400)),
    };
    let duration = args.seconds.unwrap_or(duration);
    let samples = args.samples.map_or(SAMPLES, usize::from);
    // Who says how many has said how long.
    let limit = (quick && args.samples.is_none()).then_some(QUICK);
    Ok(Options {
        guest: args.guest.clone(),
        flamegraphs: args.flamegraph,
        diskplane: std::env::current_exe().context("find this executable")?,
        dir: args
            .out
            .clone()
            .unwrap_or_else(|| experiment.name.to_lowercase().into()),
        cells: args.cells.clone(),
        samples,
        samples_more: match limit {
            Some(_) => samples.max(SAMPLES_MORE),
            None => samples,
        },
        duration,
        ramp: ramp.min(duration),
        quick,
        limit,
        disk_bytes,
        device: args.device.clone(),
        overwrite: args.overwrite_device,
        command: command(args, experiment),
    })
}

/// The command line, without where things lie on this machine.
fn command(args: &RunArgs, experiment: &Experiment) -> String {
    let mut text = format!(
        "diskplane bench run {} {}",
        experiment.name,
        if args.full { "--full" } else { "--quick" }
    );
    if let Some(pattern) = &args.cells {
        let _ = write!(text, " --cells '{pattern}'");
    }
    if let Some(samples) = args.samples {
        let _ = write!(text, " --samples {samples}");
    }
    if let Some(seconds) = args.seconds {
        let _ = write!(text, " --seconds {}", seconds.as_secs_f64());
    }
    if let Some(bytes) = args.disk {
        let _ = write!(text, " --disk {bytes}");
    }
    if let Some(device) = &args.device {
        let _ = write!(text, " --device {}", device.display());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn progress_says_where_how_far_how_long_and_what_came_last() {
        let mut progress = Progress {
            cell: "read-4k",
            what: "round 2, all sides in turns",
            done: 3,
            total: 12,
            left: Duration::from_secs(605),
            last: None,
        };
        let without = "read-4k: round 2, all sides in turns (4/12, 10:05 left)";
        assert_eq!(line(&progress), without);
        progress.last = Some("read-4k, qsd: 5 IOPS");
        assert_eq!(line(&progress), format!("{without} · read-4k, qsd: 5 IOPS"));
        // One that is the last, and more.
        (progress.done, progress.last) = (12, None);
        assert!(line(&progress).contains("(13/13, "));
    }
}
