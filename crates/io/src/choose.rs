//! Which engine to use, and making it.

use crate::{
    Aio, Engine, EngineKind, File, FileKind,
    native::Native,
    runner::Runner,
    sim::Sim,
    threads::Threads,
    uring::{self, Uring},
};
use block::{Error, Result};
use std::sync::Arc;

/// How large an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Operations that may be in flight.
    pub depth: usize,
    /// Threads that make blocking calls, at most.
    pub threads: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            depth: 1024,
            threads: 16,
        }
    }
}

/// The engine for some files, and why it is that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which one.
    pub kind: EngineKind,
    /// Why, for `info` and the log.
    pub reason: String,
}

/// Makes an engine. It belongs to the thread that first turns it.
pub fn open_engine(kind: EngineKind, options: &EngineOptions) -> Result<Box<dyn Engine>> {
    Ok(match kind {
        EngineKind::Threads => Box::new(Runner::new(options, Threads::new)?),
        EngineKind::Native => Box::new(Runner::new(options, |waker| Native::new(options, waker))?),
        EngineKind::IoUring => Box::new(Runner::new(options, |waker| Uring::new(options, waker))?),
        EngineKind::Sim => Box::new(Runner::new(options, Sim::new)?),
    })
}

/// Chooses an engine that can do all of `files`.
///
/// # Errors
///
/// The engine that was asked for cannot do one of them, or the kernel does not offer it.
pub fn choose(aio: Aio, files: &[Arc<File>]) -> Result<Choice> {
    let chosen = |kind, reason: &str| {
        Ok(Choice {
            kind,
            reason: reason.to_owned(),
        })
    };
    let simulated = files
        .iter()
        .filter(|f| f.kind() == FileKind::Simulated)
        .count();
    if simulated > 0 {
        if simulated < files.len() || !matches!(aio, Aio::Auto | Aio::Only(EngineKind::Sim)) {
            return Err(Error::invalid(
                "simulated disks need the engine 'sim', and all files must be simulated",
            ));
        }
        return chosen(EngineKind::Sim, "the disk is simulated");
    }
    if let Some(file) = files.iter().find(|f| f.needs_threads()) {
        let name = file.path().display();
        let what = match file.kind() {
            FileKind::Remote => "is a disk of a server",
            _ => "has accesses that are to fail",
        };
        return match aio {
            Aio::Auto => chosen(EngineKind::Threads, &format!("{name} {what}")),
            Aio::Only(EngineKind::Threads) => chosen(EngineKind::Threads, "asked for"),
            Aio::Only(other) => Err(Error::invalid(format!(
                "--aio {other}: {name} {what}, which is for threads only: use --aio threads or auto"
            ))),
        };
    }
    let buffered = files.iter().find(|f| !f.direct());
    match aio {
        Aio::Auto => match (uring::available(), buffered) {
            (Ok(()), _) => chosen(EngineKind::IoUring, "the kernel offers io_uring"),
            (Err(why), None) => chosen(
                EngineKind::Native,
                &format!("{why}; all files are open with O_DIRECT"),
            ),
            (Err(why), Some(file)) => chosen(
                EngineKind::Threads,
                &format!(
                    "{why}; {} goes through the page cache",
                    file.path().display()
                ),
            ),
        },
        Aio::Only(EngineKind::Sim) => Err(Error::invalid(
            "the engine 'sim' drives simulated disks only",
        )),
        Aio::Only(EngineKind::IoUring) => match uring::available() {
            Ok(()) => chosen(EngineKind::IoUring, "asked for"),
            Err(why) => Err(Error::unsupported(format!(
                "--aio io_uring: {why}; use --aio auto"
            ))),
        },
        Aio::Only(EngineKind::Native) => match buffered {
            None => chosen(EngineKind::Native, "asked for"),
            Some(file) => Err(Error::unsupported(format!(
                "--aio native needs O_DIRECT, but {} goes through the page cache{}: \
                 use --cache none or directsync, or another engine",
                file.path().display(),
                file.fallback()
                    .map(|why| format!(" ({why})"))
                    .unwrap_or_default()
            ))),
        },
        Aio::Only(EngineKind::Threads) => chosen(EngineKind::Threads, "asked for"),
    }
}
