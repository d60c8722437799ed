//! Which engine to use, and making it.

use crate::{Aio, Engine, EngineKind, File, FileKind, runner::Runner, threads::Threads};
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
    match kind {
        EngineKind::Threads => Ok(Box::new(Runner::new(options, Threads::new)?)),
        EngineKind::Native | EngineKind::IoUring | EngineKind::Sim => Err(Error::unsupported(
            format!("the engine '{kind}' is not built in"),
        )),
    }
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
    match aio {
        Aio::Auto => chosen(EngineKind::Threads, "the only one built in"),
        Aio::Only(kind) => chosen(kind, "asked for"),
    }
}
