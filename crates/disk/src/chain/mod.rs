//! Opening a chain of images: the active one, its backing image, that one's, and so on.
//!
//! ```text
//!   layers[0]   active      opened as asked, under a lock that keeps writers out
//!   layers[1]   backing     read-only, locked so that others may read it too
//!   …
//! ```
//!
//! `names`: which file a name means, and whether it may; `formats`: an image in its files.
//!
//! **What an image may name.** A backing file's name is data from a file that we do not trust: it
//! could name a private key, and the guest would read it. So a name is resolved (symbolic links
//! too), and the result must lie below the directory of the image that names it or below one
//! that the user allowed. The format must be recorded beside the name: probing
//! would let a guest turn its raw base into a qcow2 that names what it likes. (QED records only whether the file is
//! raw: one that is not is known by its magic, and is never raw.) Names with
//! a protocol (`nbd://`, `json:`) are refused; but an export of an NBD server that the user allowed by its name is opened, as
//! one is that the user named. An external data file is treated as a backing file is (it is raw, so
//! there is no format to record), and no file may be in the chain twice: a guest's data would overwrite metadata.

mod formats;
mod names;
mod server;

pub use names::is_file_name;
pub use server::open_export;

use crate::blocking::{CutOff, Driver, Member};
use block::faults::Faults;
use block::{Context, Error, ErrorKind, Result, Storage, limits};
use crypto::Passphrase;
use formats::{Keys, open_image, open_vmdk};
use image::{FileId, Format, Image, Null, vdi, vhd, vhdx};
use io::{Cache, File, Lock};
use names::{Seen, has_protocol, identity, once, recorded, resolve, resolve_any, verify};
use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Bytes that are written together of the blocks of a VHD or VHDX image.
const HOLES_UNIT: u64 = 64 << 10;

/// The lock of who only reads: others may read too.
const SHARED: Lock = Lock::Read { share_write: false };

/// What is done with the active image before it is written to.
#[derive(Clone, Copy, Debug)]
pub struct Repair {
    /// Brings a qcow2 or QED image, which was not closed cleanly, in order; or refuses it.
    pub image: fn(&dyn Storage, Format) -> Result<()>,
    /// Refuses a qcow2 image for its external data file.
    pub data_file: Option<DataFileCheck>,
}

/// Judges a qcow2 image, and its external data file.
pub type DataFileCheck = fn(&dyn Storage, &dyn Storage) -> Result<()>;

/// A part of a file that is a raw disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its first byte, a multiple of 512.
    pub offset: u64,
    /// Bytes, a multiple of 512; absent: up to the file's end.
    pub size: Option<u64>,
}

/// What an image of the chain lies on, in place of what it records itself.
#[derive(Clone, Debug)]
pub enum Below {
    /// What it records.
    Recorded,
    /// Nothing.
    Nothing,
    /// That file, wherever it is: the user named it.
    Image {
        /// The file.
        path: PathBuf,
        /// Its format; absent: as its magic says, or else raw.
        format: Option<Format>,
        /// Of a raw one, the part that is meant.
        part: Option<Part>,
        /// The faults of the file.
        faults: Option<FileFaults>,
    },
}

/// Faults of a file: accesses to it that are to fail.
#[derive(Clone, Debug)]
pub struct FileFaults {
    /// Which.
    pub rules: Arc<Faults>,
    /// What its accesses are aligned to at least, in bytes; a power of two.
    pub align: u32,
}

/// What a name with a protocol means.
pub type Names = fn(&str) -> Result<Below>;

/// How to open a chain.
#[derive(Clone, Debug, Default)]
pub struct ChainOptions {
    /// What the images lie on, the active one first; further ones lie on what they record.
    pub below: Vec<Below>,
    /// Of a raw active image, the part that is meant.
    pub part: Option<Part>,
    /// Faults of the active image's file.
    pub faults: Option<FileFaults>,
    /// Faults of the disk that the chain is: accesses of the guest that are to fail.
    pub disk_faults: Option<Arc<Faults>>,
    /// The part of the active image's file that the image is in, header and all; it is for reading only then.
    pub window: Option<Part>,
    /// The active image's format; probed when absent, see [`Chain::open`].
    pub format: Option<Format>,
    /// Open the active image for reading only.
    pub read_only: bool,
    /// How the host caches the files.
    pub cache: Cache,
    /// Go through the host's page cache where the file system refuses `O_DIRECT`.
    pub direct_fallback: bool,
    /// Read although another process may be writing (no locks). Needs `read_only`.
    pub force_share: bool,
    /// Raw images are read while others write them, as QEMU's tools do: they have no metadata that could be read half done.
    pub shares_raw: bool,
    /// Directories, besides each image's own, below which backing and data files may lie; and names of NBD exports that
    /// images may lie on.
    pub allow_backing: Vec<PathBuf>,
    /// The active image's external data file, whatever name the image has for it, and wherever it is.
    pub data_file: Option<PathBuf>,
    /// Of the active image, which must be qcow2, open the internal snapshot of that id, or else name.
    /// Needs `read_only`.
    pub snapshot: Option<String>,
    /// The active image is known to those above it as before, although it is written (see
    /// [`vhdx::OpenOptions::keeps_id`]): they are being committed into it.
    pub keeps_id: bool,
    /// Most bytes of memory for each image's metadata cache; sized from the disk when absent.
    pub cache_bytes: Option<u64>,
    /// Leave backing images and data files closed. What the chain reads as is wrong then: for
    /// `info` only.
    pub without_backing: bool,
    /// The passphrases of encrypted images, in the order of the chain; the last holds for all
    /// further ones too.
    pub passphrases: Vec<Arc<Passphrase>>,
    /// Of the active image, where it is a VHD one: which field is the disk's size, whatever its creator means.
    pub vhd_size: Option<vhd::SizeFrom>,
    /// Open encrypted images for which there is no passphrase: their data cannot be read then.
    pub allow_locked: bool,
    /// What is done with the active image before it is opened for writing. Without it one that was not closed cleanly is
    /// refused.
    pub repair: Option<Repair>,
    /// The active image's file, where that is an NBD export and open already, for writing or not as asked here.
    pub opened: Option<Arc<File>>,
    /// How NBD servers are waited for.
    pub server: nbd::Options,
    /// What becomes of bytes of the disk that a file is too short for, where a [`Driver`] reads them. (A served disk shows guests
    /// zeros there, as QEMU does.)
    pub cut_off: CutOff,
    /// Understands names with a protocol that images have for their backing files. Without it those are refused.
    pub names: Option<Names>,
    /// Open a backing file whose format the image above does not record as what its magic says, or else as raw, as QEMU
    /// does. A guest that could write a raw one chooses the format then.
    pub probe_backing: bool,
}

/// One image of a chain.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The format's state.
    pub image: Arc<dyn Image>,
    /// Its files by [`image::FileId`]; none for `null:`.
    pub files: Vec<Arc<File>>,
    /// As the user gave it; for a backing image resolved.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// Of a raw one, the part of its file that it is; absent: all of it.
    pub part: Option<Part>,
}

impl Layer {
    /// The faults of its file, to open that once more.
    pub fn file_faults(&self) -> Option<FileFaults> {
        let file = self.files.first()?;
        let rules = Arc::clone(file.faults()?);
        let align = file.alignment().offset;
        Some(FileFaults { rules, align })
    }

    /// Whether holes of its file `id` are zeros to the guest: in a raw image, an external data file, and a qcow, QED, VHD, VHDX,
    /// VDI or VMDK image, in which holes are punched without a change of the tables. Other formats know themselves what is allocated;
    /// and a hole is not zeros where the data are encrypted.
    pub fn holes_are_zeros(&self, id: FileId) -> bool {
        let tells = matches!(
            self.format,
            Format::Raw
                | Format::Qcow
                | Format::Qed
                | Format::Vhd
                | Format::Vhdx
                | Format::Vdi
                | Format::Vmdk
        ) || id == FileId::DATA;
        tells && self.image.encryption().is_none()
    }

    /// Bytes of the disk that get their space together: to write fewer of them saves none. A cluster; but blocks of a VHD or
    /// VHDX image are mostly holes until they are written.
    pub fn unit_bytes(&self) -> u64 {
        let cluster = self.image.describe().cluster_size;
        match self.format {
            Format::Vhd | Format::Vhdx => cluster.min(HOLES_UNIT),
            _ => cluster,
        }
    }
}

/// Open images, each the backing of the one before.
#[derive(Clone, Debug)]
pub struct Chain {
    /// The first is the active one; never empty.
    pub layers: Vec<Layer>,
    /// Whether the active image was opened for reading only.
    pub read_only: bool,
    /// Accesses of the guest that are to fail.
    pub faults: Option<Arc<Faults>>,
    /// See [`ChainOptions::cut_off`].
    pub cut_off: CutOff,
}

impl Chain {
    /// A chain of images that are open, the active one first.
    pub fn new(layers: Vec<Layer>, read_only: bool) -> Self {
        Self {
            layers,
            read_only,
            faults: None,
            cut_off: CutOff::default(),
        }
    }

    /// Opens `spec` (a path, the name of an NBD export, or `null:SIZE`) and all its backing images.
    ///
    /// Without a format in `options`, the format is known by its magic, and a file that shows none counts as raw only when it is opened read-only: a guest that could write such a file could make
    /// it show any format next time.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] for a backing name that the policy forbids, [`ErrorKind::Locked`] when another process
    /// uses an image, [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`] for contents; nothing was
    /// written to any file then.
    pub fn open(spec: impl AsRef<Path>, options: &ChainOptions) -> Result<Self> {
        // A file may have a name that is no text; anything else is one.
        let (path, text) = (spec.as_ref(), spec.as_ref().to_str());
        let shown = path.display();
        if options.force_share && !options.read_only {
            return Err(Error::invalid(
                "--force-share is for reading only: another process may be writing",
            ));
        }
        let mut layers = Vec::new();
        if let Some(null) = text.and_then(Null::parse) {
            layers.push(null_layer(null?, path));
            return Ok(Self {
                faults: options.disk_faults.clone(),
                ..Self::new(layers, options.read_only)
            });
        }
        let mut seen = Seen::new();
        if !text.is_some_and(nbd::is_name) {
            let found = identity(path);
            seen.push(found.map_err(|error| match error.kind() {
                ErrorKind::NotFound if text.is_some_and(has_protocol) => Error::unsupported(format!(
                    "{shown}: has a protocol, only files, block devices and NBD exports are opened"
                )),
                _ => error,
            })?);
        }
        let mut keys = Keys::new(options);
        let mut active = open_active(path, &mut keys, &mut seen)?;
        let said = options.data_file.as_deref();
        open_data_file(&mut active, options, options.read_only, said, &mut seen)?;
        if let (false, Some(refuse)) = (options.read_only, options.repair.and_then(|r| r.data_file))
            && let (Format::Qcow2, [image, data]) = (active.format, &*active.files)
        {
            refuse(&**image, &**data)?;
        }
        layers.push(active);
        while let Some(above) = layers.last() {
            if layers.len() > limits::CHAIN_LENGTH_MAX {
                return Err(Error::invalid(format!(
                    "{shown}: its chain of backing files is longer than {} images",
                    limits::CHAIN_LENGTH_MAX
                )));
            }
            match options.below.get(layers.len() - 1) {
                None | Some(Below::Recorded) => {}
                Some(Below::Nothing) => break,
                Some(Below::Image { .. }) if options.without_backing => break,
                Some(Below::Image {
                    path,
                    format,
                    part,
                    faults,
                }) => {
                    let said = (path.as_path(), *format, *part, faults.as_ref());
                    let layer = open_said(above, said, options, &mut keys, &mut seen)?;
                    layers.push(layer);
                    continue;
                }
            }
            let description = above.image.describe();
            let Some(name) = description.backing.filter(|_| !options.without_backing) else {
                break;
            };
            if layers.len() >= limits::CHAIN_LENGTH_MAX {
                return Err(Error::invalid(format!(
                    "{shown}: its chain of backing files is longer than {} images",
                    limits::CHAIN_LENGTH_MAX
                )));
            }
            let named = || format!("{}: backing file", above.path.display());
            if let (Some(names), true) = (options.names, has_protocol(&name))
                && let Below::Image {
                    path,
                    format,
                    part,
                    faults,
                } = names(&name).context(named)?
            {
                let recorded = description.backing_format.as_deref();
                let recorded = recorded.and_then(|format| Format::recorded(format).ok());
                let said = (path.as_path(), format.or(recorded), part, faults.as_ref());
                let layer = open_said(above, said, options, &mut keys, &mut seen)?;
                layers.push(layer);
                continue;
            }
            let parent = above.image.parent();
            let names = parent
                .as_ref()
                .map_or(vec![name.clone()], |p| p.names.clone());
            let recorded_format = description.backing_format.as_deref();
            if let Some(server) = server::allowed(&name, options) {
                let format = recorded(&above.path, &name, recorded_format).context(named)?;
                let said = (server.as_path(), Some(format), None, None);
                let layer = open_said(above, said, options, &mut keys, &mut seen)?;
                layers.push(layer);
                continue;
            }
            let (name, path) =
                resolve_any(&above.path, &names, &options.allow_backing).context(named)?;
            let format = match (above.format, description.backing_format.as_deref()) {
                // The format can record raw only: that it is another; or nothing.
                (Format::Qed | Format::Qcow, None) => None,
                (_, None) if options.probe_backing => None,
                (_, said) => Some(recorded(&above.path, &name, said).context(named)?),
            };
            once(&mut seen, &path, &name).context(named)?;
            let mut layer =
                open_backing(path, format, None, None, &mut keys, &mut seen).context(named)?;
            if let Some(parent) = parent {
                verify(&parent, &layer).context(named)?;
            }
            open_data_file(&mut layer, options, true, None, &mut seen)?;
            layers.push(layer);
        }
        Ok(Self {
            layers,
            read_only: options.read_only,
            faults: options.disk_faults.clone(),
            cut_off: options.cut_off,
        })
    }

    /// The images and files, for a blocking [`Driver`].
    pub fn members(&self) -> Vec<Member> {
        let members = self.layers.iter().map(|layer| Member {
            image: Arc::clone(&layer.image),
            files: layer
                .files
                .iter()
                .map(|file| Arc::clone(file) as Arc<dyn Storage>)
                .collect(),
        });
        members.collect()
    }

    /// A blocking driver of the chain.
    pub fn driver(&self) -> Result<Driver> {
        let driver = Driver::new(self.members(), self.read_only)?;
        Ok(driver
            .with_faults(self.faults.clone())
            .with_cut_off(self.cut_off))
    }
}

/// Opens the external data file of `layer`, if it has one, as the layer's second file. `said`: what the user
/// calls it, in place of the name in the image.
fn open_data_file(
    layer: &mut Layer,
    options: &ChainOptions,
    read_only: bool,
    said: Option<&Path>,
    seen: &mut Seen,
) -> Result<()> {
    let Some(data) = layer.image.describe().data_file else {
        return match said {
            Some(said) => Err(Error::invalid(format!(
                "{}: has no external data file, but {} is given for one",
                layer.path.display(),
                said.display()
            ))),
            None => Ok(()),
        };
    };
    if options.without_backing {
        return Ok(());
    }
    let named = || format!("{}: data file", layer.path.display());
    let lock = match (options.force_share, read_only) {
        (true, _) => Lock::None,
        (false, true) => SHARED,
        (false, false) => Lock::Write,
    };
    let file = match (said, &data.name) {
        (Some(said), _) => {
            once(seen, said, &block::name::text(said)).context(named)?;
            open_file(said, options, read_only, lock).context(named)?
        }
        (None, Some(name)) => {
            let path = resolve(&layer.path, name, &options.allow_backing).context(named)?;
            once(seen, &path, name).context(named)?;
            open_named(&path, options, read_only, lock).context(named)?
        }
        (None, None) => {
            return Err(Error::unsupported(
                "the image does not say where it is: say --data-file PATH",
            )
            .within(named()));
        }
    };
    layer.files.push(file);
    Ok(())
}

/// The lock of who reads an image, whose format may be known.
fn lock_of_reader(options: &ChainOptions, format: Option<Format>) -> Lock {
    match format {
        Some(Format::Raw) if options.shares_raw => Lock::Read { share_write: true },
        _ => SHARED,
    }
}

fn open_active(path: &Path, keys: &mut Keys<'_>, seen: &mut Seen) -> Result<Layer> {
    let options = keys.options;
    let lock = match (options.force_share, options.read_only) {
        (true, _) => Lock::None,
        (false, true) => lock_of_reader(options, options.format),
        (false, false) => Lock::Write,
    };
    let file = match server::name(path) {
        Some(_) if let Some(file) = &options.opened => {
            seen.push(file.identity()?);
            Arc::clone(file)
        }
        Some(name) => server::open(name, options, options.read_only, seen)?,
        None => open_file(path, options, options.read_only, lock)?,
    };
    let file = faulty(file, options.faults.as_ref())?;
    let file = match options.window {
        Some(_) if !options.read_only => {
            return Err(Error::unsupported(format!(
                "{}: an image in a part of a file can only be read",
                path.display()
            )));
        }
        Some(part) => File::window(file, part.offset, part.size)?,
        None => file,
    };
    let format = match options.format {
        Some(format) => format,
        None => match image::probe(&*file)? {
            Some(format) => format,
            None if options.read_only => Format::Raw,
            None => {
                return Err(Error::invalid(format!(
                    "{}: its first bytes show no known format: say -f raw if it is a raw disk",
                    path.display()
                )));
            }
        },
    };
    match (format, options.read_only, options.repair) {
        (Format::Qcow2 | Format::Qed, false, Some(repair)) => (repair.image)(&*file, format)?,
        (Format::Vhd, false, _) => tell_mended(&file, vhd::mend(&*file)?),
        (Format::Vhdx, false, _) => tell_mended(&file, vhdx::mend(&*file)?),
        (Format::Vdi, false, _) => tell_mended(&file, vdi::mend(&*file)?),
        _ => {}
    }
    let mut files = vec![file];
    let image = match format {
        Format::Vmdk if options.part.is_none() => {
            open_vmdk(path, &mut files, (options.read_only, lock), keys, seen)?
        }
        _ => open_image(
            &files,
            format,
            options.read_only,
            &options.snapshot,
            options.part,
            keys,
        )?,
    };
    if let (false, Some(why)) = (options.read_only, image.describe().read_only_because) {
        return Err(Error::unsupported(format!(
            "{}: can only be opened with --read-only: {why}",
            path.display()
        )));
    }
    Ok(Layer {
        image,
        files,
        path: path.to_owned(),
        format,
        part: options.part,
    })
}

/// The file, which was just opened, with the faults that it is to have.
fn faulty(file: Arc<File>, faults: Option<&FileFaults>) -> Result<Arc<File>> {
    match faults {
        Some(faults) => File::with_faults(file, Arc::clone(&faults.rules), faults.align),
        None => Ok(file),
    }
}

/// Says what was done to an image that was not closed.
fn tell_mended(file: &File, done: Option<String>) {
    if let Some(done) = done {
        tracing::warn!(image = file.name(), "was not closed cleanly: {done}");
    }
}

/// A disk of nothing in the place of an image.
fn null_layer(null: Null, path: &Path) -> Layer {
    Layer {
        image: Arc::new(null),
        files: Vec::new(),
        path: path.to_owned(),
        format: Format::Null,
        part: None,
    }
}

/// Opens what the user said that `above` lies on.
fn open_said(
    above: &Layer,
    (path, format, part, faults): (&Path, Option<Format>, Option<Part>, Option<&FileFaults>),
    options: &ChainOptions,
    keys: &mut Keys<'_>,
    seen: &mut Seen,
) -> Result<Layer> {
    let named = || format!("{}: backing file", above.path.display());
    if let Some(null) = path.to_str().and_then(Null::parse) {
        return Ok(null_layer(null.context(named)?, path));
    }
    if let Some(name) = server::name(path) {
        let file = server::open(name, options, true, seen).context(named)?;
        let file = faulty(file, faults).context(named)?;
        let format = match format {
            Some(format) => format,
            None => image::probe(&*file).context(named)?.unwrap_or(Format::Raw),
        };
        let layer = open_backing_in(file, path.to_owned(), format, part, keys, seen);
        let mut layer = layer.context(named)?;
        open_data_file(&mut layer, options, true, None, seen)?;
        return Ok(layer);
    }
    let shown = path.display();
    let path = fs::canonicalize(path).context(|| format!("'{shown}'"));
    let path = path.context(named)?;
    once(seen, &path, &block::name::text(&path)).context(named)?;
    let probe = || -> Result<Format> {
        let file = open_file(&path, options, true, Lock::None)?;
        Ok(image::probe(&*file)?.unwrap_or(Format::Raw))
    };
    let format = format.map_or_else(probe, Ok).context(named)?;
    let layer = open_backing(path, Some(format), part, faults, keys, seen);
    let mut layer = layer.context(named)?;
    open_data_file(&mut layer, options, true, None, seen)?;
    Ok(layer)
}

/// Opens a backing image. Without a format, by its magic: it is not raw then.
fn open_backing(
    path: PathBuf,
    format: Option<Format>,
    part: Option<Part>,
    faults: Option<&FileFaults>,
    keys: &mut Keys<'_>,
    seen: &mut Seen,
) -> Result<Layer> {
    let options = keys.options;
    let lock = match options.force_share {
        true => Lock::None,
        false => lock_of_reader(options, format),
    };
    let file = faulty(open_named(&path, options, true, lock)?, faults)?;
    let format = match format {
        Some(format) => format,
        None if options.probe_backing => image::probe(&*file)?.unwrap_or(Format::Raw),
        None => image::probe(&*file)?.ok_or_else(|| {
            Error::new(
                ErrorKind::Denied,
                format!(
                    "{}: its first bytes show no known format, and the image above does not say that it is raw",
                    path.display()
                ),
            )
        })?,
    };
    open_backing_in(file, path, format, part, keys, seen)
}

/// Opens a backing image in its file, which is open.
fn open_backing_in(
    file: Arc<File>,
    path: PathBuf,
    format: Format,
    part: Option<Part>,
    keys: &mut Keys<'_>,
    seen: &mut Seen,
) -> Result<Layer> {
    let lock = file.lock();
    let mut files = vec![file];
    let image = match format {
        Format::Vmdk if part.is_none() => open_vmdk(&path, &mut files, (true, lock), keys, seen)?,
        _ => open_image(&files, format, true, &None, part, keys)?,
    };
    Ok(Layer {
        image,
        files,
        path,
        format,
        part,
    })
}

/// Opens the file at a path that was resolved and allowed.
fn open_named(
    path: &Path,
    options: &ChainOptions,
    read_only: bool,
    lock: Lock,
) -> Result<Arc<File>> {
    let file = open_file(path, options, read_only, lock)?;
    // Between the check and the opening someone may have put a link in the way.
    let opened = fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
        .context(|| format!("{}: which file was opened", path.display()))?;
    if opened != *path {
        return Err(Error::new(
            ErrorKind::Denied,
            format!(
                "'{}' became '{}' while it was opened",
                path.display(),
                opened.display()
            ),
        ));
    }
    Ok(file)
}

fn open_file(
    path: &Path,
    options: &ChainOptions,
    read_only: bool,
    lock: Lock,
) -> Result<Arc<File>> {
    File::open(
        path,
        &io::OpenOptions {
            read_only,
            cache: options.cache,
            direct_fallback: options.direct_fallback,
            lock,
        },
    )
}
