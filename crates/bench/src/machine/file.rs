//! Files of the host.

use block::{Context, Result};
use rustix::fs::{FallocateFlags, fallocate};
use std::{fs::OpenOptions, path::Path};

/// Makes a file of `bytes` that the file system has allocated, in place of what is there.
///
/// # Errors
///
/// What the host says, with the file's name.
pub(crate) fn preallocate(path: &Path, bytes: u64) -> Result<()> {
    let named = || path.display().to_string();
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .context(named)?;
    fallocate(&file, FallocateFlags::empty(), 0, bytes)
        .map_err(std::io::Error::from)
        .context(named)
}
