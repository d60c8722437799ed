//! `diskplane bench clear`: what a run of an experiment left that was killed, and the end of one that is stopped.

use crate::{
    bench_versus::{INTERRUPTED, stopped_text},
    print,
};
use anyhow::Result;
use bench::{experiment, machine::process::Stopped};
use clap::Args;
use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{self, Command},
};

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
    // A run that was stopped while it began.
    let there = !args.stopped || args.dir.exists();
    let cleared = match there {
        true => experiment::clear(&args.dir, args.device.as_deref()),
        false => Ok(false),
    };
    if args.stopped {
        let stay = cleared.err().map(|why| (args.dir.clone(), why.into()));
        crate::say(&stopped_text(stay.into_iter().collect(), KEPT));
        process::exit(INTERRUPTED);
    }
    print(match cleared? {
        true => "what a run had left is gone\n",
        false => "nothing was left\n",
    })
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
    stopped_text(stopped.remove(), KEPT)
}
