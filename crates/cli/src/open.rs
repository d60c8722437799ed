//! Opening what a command works on: one way for all of them.
//!
//! Whoever comes right behind a server that was killed waits a moment for its lock: the kernel takes the ring of an
//! io_uring process that has ended apart in the background.

use crate::image_opts::{self, ImageOptions};
use crate::secret::Objects;
use crate::signals;
use anyhow::{Context as _, Result, bail};
use disk::chain::{Chain, ChainOptions, FileFaults};
use image::Format;
use io::{File, Lock, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

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

/// How NBD servers are waited for: `--nbd-timeout`, and signals.
static NBD_SILENCE: OnceLock<Option<Duration>> = OnceLock::new();

/// Sets how long NBD servers may be silent, for the rest of the process. `None`: for ever.
pub fn set_nbd_timeout(silence: Option<Duration>) {
    // Once, by `main`.
    let _ = NBD_SILENCE.set(silence);
}

/// How long NBD servers may be silent. `None`: for ever.
pub fn nbd_silence() -> Option<Duration> {
    let own = nbd::Options::default().silence;
    NBD_SILENCE.get().copied().unwrap_or(own)
}

/// How NBD servers are waited for.
pub fn server() -> nbd::Options {
    let own = nbd::Options::default();
    nbd::Options {
        cancelled: Some(signals::are_caught),
        silence: nbd_silence(),
        reconnect_for: Some(Duration::ZERO),
        ..own
    }
}

/// How NBD servers are waited for, of which options said so much.
fn waiting(said: &nbd::Options) -> nbd::Options {
    let own = server();
    nbd::Options {
        open_for: said.open_for,
        reconnect_for: said.reconnect_for.or(own.reconnect_for),
        ..own
    }
}

/// Opens the file at `path`.
pub fn file(path: &Path, access: Access) -> Result<Arc<File>> {
    file_of(path, access, &server())
}

/// The file, which was just opened, with the faults that it is to have.
pub fn faulty(file: Arc<File>, faults: Option<&FileFaults>) -> block::Result<Arc<File>> {
    match faults {
        Some(faults) => File::with_faults(file, Arc::clone(&faults.rules), faults.align),
        None => Ok(file),
    }
}

/// Opens the file at `path`; a server, where it is there, is waited for as `server` says.
pub fn file_of(path: &Path, access: Access, server: &nbd::Options) -> Result<Arc<File>> {
    let options = OpenOptions {
        read_only: access != Access::Write,
        lock: match access {
            Access::Read => Lock::Read { share_write: false },
            Access::ReadUnlocked => Lock::None,
            Access::Write => Lock::Write,
        },
        ..OpenOptions::default()
    };
    open_file_of(path, &options, server)
}

/// Opens the file at `path`, or the NBD export of that name.
pub fn open_file(path: &Path, options: &OpenOptions) -> Result<Arc<File>> {
    open_file_of(path, options, &server())
}

fn open_file_of(path: &Path, options: &OpenOptions, server: &nbd::Options) -> Result<Arc<File>> {
    match at_server(path) {
        Some(name) => Ok(disk::chain::open_export(name, options, server)?),
        None => Ok(io::wait_for_lock(|| File::open(path, options))?),
    }
}

/// The name of an NBD export, where `path` is one.
pub fn at_server(path: &Path) -> Option<&str> {
    path.to_str().filter(|name| nbd::is_name(name))
}

/// Where the file is that the image at `above` calls `name`: a relative name starts at the image's directory, one of an NBD
/// export is what it is.
pub fn beside(above: &Path, name: &str) -> PathBuf {
    match nbd::is_name(name) {
        true => PathBuf::from(name),
        false => above
            .parent()
            .unwrap_or(Path::new(""))
            .join(block::name::path(name)),
    }
}

/// Opens the image file at `path`. Its format is `format`, or the one whose magic it shows, or else raw.
pub fn image(path: &Path, format: Option<Format>, access: Access) -> Result<(Arc<File>, Format)> {
    known(path, format, file(path, access)?)
}

/// The image at `path`, whose file is open, and its format, as [`image`] has it.
fn known(path: &Path, format: Option<Format>, file: Arc<File>) -> Result<(Arc<File>, Format)> {
    let found = match format {
        Some(format) => Some(format),
        None => image::probe(&*file).with_context(|| path.display().to_string())?,
    };
    Ok((file, found.unwrap_or(Format::Raw)))
}

/// Opens an image and all below it.
pub fn chain(path: &Path, options: &ChainOptions) -> block::Result<Chain> {
    let options = ChainOptions {
        server: waiting(&options.server),
        ..options.clone()
    };
    io::wait_for_lock(|| Chain::open(path, &options))
}

/// Opens an image and all below it, by its file's name, by `json:{…}` or, with `image_opts`, by `key=value,…`. What is
/// named so was named by the user, and is opened wherever it is.
pub fn named(
    name: impl AsRef<Path>,
    image_opts: bool,
    objects: &Objects,
    options: ChainOptions,
) -> Result<Chain> {
    let (path, options) = resolve(name.as_ref(), image_opts, objects, options)?;
    Ok(chain(&path, &options)?)
}

/// Where the image is that `name` names, as [`named`] has it, and how it is opened.
pub fn resolve(
    name: &Path,
    image_opts: bool,
    objects: &Objects,
    options: ChainOptions,
) -> Result<(PathBuf, ChainOptions)> {
    let text = block::name::text(name);
    if !image_opts && !image_opts::is_json(&text) {
        return Ok((name.to_owned(), options));
    }
    let name = text.as_str();
    let said = ImageOptions::parse(name).with_context(|| format!("'{name}'"))?;
    if said.read_only && !options.read_only {
        bail!("'{name}': {}", image_opts::READ_ONLY);
    }
    let mut passphrases = Vec::new();
    for id in &said.secrets {
        passphrases.push(objects.find(id)?);
    }
    passphrases.extend(options.passphrases.iter().cloned());
    let format = match (options.format, said.format) {
        (Some(flag), Some(said)) if flag != said => {
            bail!("'{name}': -f {flag} and driver={said} contradict each other")
        }
        (flag, said) => flag.or(said),
    };
    let server = said.server();
    let options = ChainOptions {
        format,
        part: said.part,
        faults: said.faults,
        disk_faults: said.disk_faults,
        window: said.window,
        vhd_size: said.vhd_size,
        below: said.below,
        data_file: said.data_file.or(options.data_file.clone()),
        passphrases,
        force_share: options.force_share || said.force_share,
        cache: said.cache.unwrap_or(options.cache),
        server,
        ..options
    };
    Ok((said.path, options))
}

/// Refuses to write the image at `depth` below the one that `name` names, where its file is for reading only.
pub fn refuse_base(name: &Path, image_opts: bool, depth: usize) -> Result<()> {
    let name = block::name::text(name);
    if !image_opts && !image_opts::is_json(&name) {
        return Ok(());
    }
    match ImageOptions::parse(&name)?.read_only_below.contains(&depth) {
        true => bail!(image_opts::READ_ONLY),
        false => Ok(()),
    }
}

/// The file of an image alone, for what works on its tables.
pub struct Alone {
    /// Its path.
    pub path: PathBuf,
    /// It, open.
    pub file: Arc<File>,
    /// What is in it.
    pub format: Format,
}

/// Opens the file of an image alone: as [`image`], under a name that [`resolve`] understands.
///
/// # Errors
///
/// Besides, for a part of a file, which has no tables, and for one that is to be changed and shared.
pub fn alone(
    name: &Path,
    image_opts: bool,
    objects: &Objects,
    format: Option<Format>,
    access: Access,
) -> Result<Alone> {
    let options = ChainOptions {
        format,
        read_only: access != Access::Write,
        ..ChainOptions::default()
    };
    let (path, options) = resolve(name, image_opts, objects, options)?;
    if options.part.or(options.window).is_some() {
        bail!(
            "'{}': a part of a file has no tables to work on",
            name.display()
        );
    }
    let access = match (access, options.force_share) {
        (Access::Write, true) => {
            bail!("{}: force-share=on is for reading only", path.display())
        }
        (_, true) => Access::ReadUnlocked,
        (access, false) => access,
    };
    let file = file_of(&path, access, &waiting(&options.server))?;
    let file = faulty(file, options.faults.as_ref())?;
    let (file, format) = known(&path, options.format, file)?;
    Ok(Alone { path, file, format })
}
