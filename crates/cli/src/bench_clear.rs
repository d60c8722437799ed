//! `diskplane bench clear`: what a run of an experiment left that was killed, and the end of one that is stopped.

use crate::{
    bench_versus::{INTERRUPTED, stayed, stopped_text},
    print,
    signals::{Signal, Signals},
};
use anyhow::{Context, Result, bail};
use bench::{
    experiment::{self, Cleared},
    machine::process::Stopped,
};
use clap::Args;
use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{self, Command},
    thread,
    time::{Duration, Instant},
};

/// What comes so soon after the signal that stopped the run belongs to it: `timeout` and others signal a process and its group.
const TOGETHER: Duration = Duration::from_millis(500);

/// What is said of a run that was stopped.
const KEPT: &str = "what was measured is kept: the same command goes on with it";

/// `bench clear`.
#[derive(Args, Debug)]
#[command(
    after_help = "Whatever ends a run of bench run takes away what it had set up, but for SIGKILL and a crash of the machine. After \
                  these the next run in the folder does it first; this command does it without one. What was measured (records, \
                  report) stays. The device is left without a file system that a run made; any other stays."
)]
pub struct Clear {
    /// The folder that the run was given (--out)
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// The block device that the run was given
    #[arg(long, value_name = "PATH")]
    pub device: Option<PathBuf>,
    /// In the place of a run that was stopped by a signal.
    #[arg(long, hide = true)]
    pub stopped: bool,
}

/// Removes what is there, and says so.
pub fn run(args: &Clear) -> Result<()> {
    if args.stopped {
        end_on_another(args.again())?;
    }
    // A run that was stopped while it began.
    let there = !args.stopped || args.dir.exists();
    let cleared = match there {
        true => experiment::clear(&args.dir, args.device.as_deref()),
        false => Ok(Cleared::default()),
    };
    if args.stopped {
        let failed = cleared.map_or_else(|error| vec![error], |cleared| cleared.failed);
        let again = args.again();
        let stay = failed
            .iter()
            .map(|why| format!("{why}; to try again: {again}"));
        crate::say(&stopped_text(&stay.collect::<Vec<_>>(), KEPT));
        process::exit(INTERRUPTED);
    }
    let cleared = cleared?;
    if !cleared.failed.is_empty() {
        let all: Vec<String> = cleared.failed.iter().map(ToString::to_string).collect();
        bail!("{}", all.join("; "));
    }
    print(match cleared.any {
        true => "what a run had left is gone\n",
        false => "nothing was left\n",
    })
}

impl Clear {
    /// The command that does the same.
    fn again(&self) -> String {
        let device = self.device.as_ref();
        let device = device.map(|device| format!(" --device {}", device.display()));
        format!(
            "diskplane bench clear{} {}",
            device.unwrap_or_default(),
            self.dir.display()
        )
    }
}

/// Ends the process on a further signal: the run's are blocked still in the command that takes its place.
fn end_on_another(again: String) -> Result<()> {
    let (began, mut signals) = (Instant::now(), Signals::block()?);
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            if signal == Signal::Stop && began.elapsed() >= TOGETHER {
                crate::say(&format!(
                    "\ndiskplane: stopped again, before all of the run was gone; for what is left: {again}\n"
                ));
                process::exit(INTERRUPTED);
            }
        }
    };
    let thread = thread::Builder::new().name("signals".into());
    thread
        .spawn(wait)
        .map(drop)
        .context("start a thread for signals")
}

/// Becomes this command, in a run's place: file systems that the run's own threads have files on can be unmounted only when these are
/// gone, and a device be cleared only then. What is to be said, where that cannot be.
pub(crate) fn instead(stopped: Stopped, dir: &Path, device: Option<&Path>) -> String {
    let mut command = Command::new("/proc/self/exe");
    command.args(["bench", "clear", "--stopped"]).arg(dir);
    if let Some(device) = device {
        command.arg("--device").arg(device);
    }
    // Comes back only if it fails.
    let error = command.exec();
    tracing::warn!("bench clear cannot take the run's place: {error}");
    stopped_text(&stayed(stopped.remove()), KEPT)
}
