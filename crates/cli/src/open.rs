//! Opening what a command works on: one way for all of them.
//!
//! Whoever comes right behind a server that was killed waits a moment for its lock: the kernel takes the ring of an
//! io_uring process that has ended apart in the background.

use anyhow::{Context as _, Result, anyhow};
use disk::chain::{Chain, ChainOptions};
use image::Format;
use io::{File, Lock, OpenOptions};
use std::path::Path;
use std::sync::Arc;

/// What a command does to an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads it while nobody writes.
    Read,
    /// Reads it whoever writes.
    ReadUnlocked,
    /// Changes it; nobody else may use it.
    Write,
}

impl Access {
    /// What a command does that reads, with or without `--force-share`.
    pub fn reading(force_share: bool) -> Self {
        match force_share {
            true => Access::ReadUnlocked,
            false => Access::Read,
        }
    }
}

/// Opens the file at `path`.
pub fn file(path: &Path, access: Access) -> Result<Arc<File>> {
    let options = OpenOptions {
        read_only: access != Access::Write,
        lock: match access {
            Access::Read => Lock::Read { share_write: false },
            Access::ReadUnlocked => Lock::None,
            Access::Write => Lock::Write,
        },
        ..OpenOptions::default()
    };
    Ok(io::wait_for_lock(|| File::open(path, &options))?)
}

/// Opens the image file at `path`. Its format is `format`, or the one whose magic it shows, or else raw.
pub fn image(path: &Path, format: Option<Format>, access: Access) -> Result<(Arc<File>, Format)> {
    let file = file(path, access)?;
    let found = match format {
        Some(format) => Some(format),
        None => image::probe(&*file).with_context(|| path.display().to_string())?,
    };
    Ok((file, found.unwrap_or(Format::Raw)))
}

/// Opens an image and all below it.
pub fn chain(spec: &str, options: &ChainOptions) -> block::Result<Chain> {
    io::wait_for_lock(|| Chain::open(spec, options))
}

/// `path` as the text that a chain is opened by.
pub fn spec(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| anyhow!("{}: the name is not UTF-8", path.display()))
}
