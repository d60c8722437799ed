//! Disks of NBD servers in the place of files.

use super::ChainOptions;
use super::names::Seen;
use block::{Error, Result};
use io::File;
use nbd::{Client, Uri};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The name of an NBD export, where `path` is one.
pub(super) fn name(path: &Path) -> Option<&str> {
    path.to_str().filter(|name| nbd::is_name(name))
}

/// The export that an image calls `name`, where the user allowed that one: the very same, whatever else that server has.
pub(super) fn allowed(name: &str, options: &ChainOptions) -> Option<PathBuf> {
    if !nbd::is_name(name) {
        return None;
    }
    let meant = Uri::parse(name).ok()?;
    let said = options
        .allow_backing
        .iter()
        .filter_map(|path| self::name(path));
    let mut said = said.filter_map(|said| Uri::parse(said).ok());
    said.any(|said| said == meant).then(|| PathBuf::from(name))
}

/// Opens an export, which must not be in the chain already.
pub(super) fn open(
    name: &str,
    options: &ChainOptions,
    read_only: bool,
    seen: &mut Seen,
) -> Result<Arc<File>> {
    let uri = Uri::parse(name)?;
    if seen.contains(&uri.identity()) {
        return Err(Error::corrupt(format!(
            "'{uri}' is in the chain already: the chain is a loop"
        )));
    }
    seen.push(uri.identity());
    let file = io::OpenOptions {
        read_only,
        cache: options.cache,
        direct_fallback: options.direct_fallback,
        lock: io::Lock::None,
    };
    connect(&uri, &file, &options.server)
}

/// Opens the NBD export `name` in the place of a file. `server`: see [`ChainOptions::server`].
///
/// # Errors
///
/// What is wrong with the name, and what connecting fails with.
pub fn open_export(
    name: &str,
    options: &io::OpenOptions,
    server: &nbd::Options,
) -> Result<Arc<File>> {
    connect(&Uri::parse(name)?, options, server)
}

fn connect(uri: &Uri, options: &io::OpenOptions, server: &nbd::Options) -> Result<Arc<File>> {
    let client = Client::shared(uri, server)?;
    File::remote(&uri.to_string(), client, options)
}
