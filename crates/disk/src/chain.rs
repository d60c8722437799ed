//! Opening a chain of images: the active one, its backing image, that one's, and so on.
//!
//! ```text
//!   layers[0]   active      opened as asked, under a lock that keeps writers out
//!   layers[1]   backing     read-only, locked so that others may read it too
//!   …
//! ```
//!
//! **What an image may name.** A backing file's name is data from a file that we do not trust: it
//! could name a private key, and the guest would read it. So a name is resolved (symbolic links
//! too), and the result must lie below the directory of the image that names it or below one
//! that the user allowed. The format must be recorded beside the name: probing
//! would let a guest turn its raw base into a qcow2 that names what it likes. (QED records only whether the file is
//! raw: one that is not is known by its magic, and is never raw.) Names with
//! a protocol (`nbd://`, `json:`) are refused. An external data file is treated as a backing file is (it is raw, so
//! there is no format to record), and no file may be in the chain twice: a guest's data would overwrite metadata.

use crate::blocking::{Driver, Member};
use block::{Context, Error, ErrorKind, Result, Storage, limits};
use crypto::Passphrase;
use image::{
    FileId, Format, Image, Null, Parallels, Parent, Raw, luks, qcow2, qed, vdi, vhd, vhdx, vmdk,
};
use io::{Cache, File, Lock};
use std::{
    fs,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

/// Bytes of a VHDX image's blocks that are written together.
const VHDX_UNIT: u64 = 64 << 10;

/// The lock of who only reads: others may read too.
const SHARED: Lock = Lock::Read { share_write: false };

/// Brings an image of that format, which was not closed cleanly, in order.
pub type Repair = fn(&dyn Storage, Format) -> Result<()>;

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
    },
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
    /// Directories, besides each image's own, below which backing and data files may lie.
    pub allow_backing: Vec<PathBuf>,
    /// The active image's external data file, whatever name the image has for it, and wherever it is.
    pub data_file: Option<PathBuf>,
    /// Of the active image, which must be qcow2, open the internal snapshot of that id, or else name.
    /// Needs `read_only`.
    pub snapshot: Option<String>,
    /// Most bytes of memory for each image's metadata cache; sized from the disk when absent.
    pub cache_bytes: Option<u64>,
    /// Leave backing images and data files closed. What the chain reads as is wrong then: for
    /// `info` only.
    pub without_backing: bool,
    /// The passphrases of encrypted images, in the order of the chain; the last holds for all
    /// further ones too.
    pub passphrases: Vec<Arc<Passphrase>>,
    /// Open encrypted images for which there is no passphrase: their data cannot be read then.
    pub allow_locked: bool,
    /// Called with the active qcow2 or QED image before that is opened for writing: brings one that was not closed
    /// cleanly in order. Without it such an image is refused.
    pub repair: Option<Repair>,
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
}

impl Layer {
    /// Whether holes of its file `id` are zeros to the guest: in a raw image, an external data file, and a QED, VHD, VHDX, VDI
    /// or VMDK image, in which holes are punched without a change of the tables. Other formats know themselves what is allocated;
    /// and a hole is not zeros where the data are encrypted.
    pub fn holes_are_zeros(&self, id: FileId) -> bool {
        let tells = matches!(
            self.format,
            Format::Raw | Format::Qed | Format::Vhd | Format::Vhdx | Format::Vdi | Format::Vmdk
        ) || id == FileId::DATA;
        tells && self.image.encryption().is_none()
    }

    /// Bytes of the disk that get their space together: to write fewer of them saves none. A cluster; but blocks of a VHDX
    /// image are mostly holes until they are written.
    pub fn unit_bytes(&self) -> u64 {
        let cluster = self.image.describe().cluster_size;
        match self.format {
            Format::Vhdx => cluster.min(VHDX_UNIT),
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
}

impl Chain {
    /// Opens `spec` (a path, or `null:SIZE`) and all its backing images.
    ///
    /// Without a format in `options`, qcow2, QED, VHD, VHDX, VDI, LUKS and Parallels' are known by their magic, and a file that shows none counts as
    /// raw only when it is opened read-only: a guest that could write such a file could make
    /// it show any format next time.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] for a backing name that the policy forbids, [`ErrorKind::Locked`] when another process
    /// uses an image, [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`] for contents; nothing was
    /// written to any file then.
    pub fn open(spec: &str, options: &ChainOptions) -> Result<Self> {
        if options.force_share && !options.read_only {
            return Err(Error::invalid(
                "--force-share is for reading only: another process may be writing",
            ));
        }
        let mut layers = Vec::new();
        if let Some(null) = Null::parse(spec) {
            layers.push(Layer {
                image: Arc::new(null?),
                files: Vec::new(),
                path: PathBuf::from(spec),
                format: Format::Null,
            });
            return Ok(Self {
                layers,
                read_only: options.read_only,
            });
        }
        let path = PathBuf::from(spec);
        let mut seen = vec![identity(&path)?];
        let mut keys = Keys::new(options);
        let mut active = open_active(&path, &mut keys, &mut seen)?;
        let said = options.data_file.as_deref();
        open_data_file(&mut active, options, options.read_only, said, &mut seen)?;
        layers.push(active);
        while let Some(above) = layers.last() {
            if layers.len() > limits::CHAIN_LENGTH_MAX {
                return Err(Error::invalid(format!(
                    "{spec}: its chain of backing files is longer than {} images",
                    limits::CHAIN_LENGTH_MAX
                )));
            }
            match options.below.get(layers.len() - 1) {
                None | Some(Below::Recorded) => {}
                Some(Below::Nothing) => break,
                Some(Below::Image { .. }) if options.without_backing => break,
                Some(Below::Image { path, format, part }) => {
                    let said = (path.as_path(), *format, *part);
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
                    "{spec}: its chain of backing files is longer than {} images",
                    limits::CHAIN_LENGTH_MAX
                )));
            }
            let named = || format!("{}: backing file", above.path.display());
            if let (Some(names), true) = (options.names, has_protocol(&name))
                && let Below::Image { path, format, part } = names(&name).context(named)?
            {
                let recorded = description.backing_format.as_deref();
                let recorded = recorded.and_then(|format| format.parse().ok());
                let said = (path.as_path(), format.or(recorded), part);
                let layer = open_said(above, said, options, &mut keys, &mut seen)?;
                layers.push(layer);
                continue;
            }
            let parent = above.image.parent();
            let names = parent
                .as_ref()
                .map_or(vec![name.clone()], |p| p.names.clone());
            let (name, path) =
                resolve_any(&above.path, &names, &options.allow_backing).context(named)?;
            let format = match (above.format, description.backing_format.as_deref()) {
                // The format can record raw only: that it is another.
                (Format::Qed, None) => None,
                (_, None) if options.probe_backing => None,
                (_, said) => Some(recorded(&above.path, &name, said).context(named)?),
            };
            once(&mut seen, &path, &name).context(named)?;
            let mut layer =
                open_backing(path, format, None, &mut keys, &mut seen).context(named)?;
            if let Some(parent) = parent {
                verify(&parent, &layer).context(named)?;
            }
            open_data_file(&mut layer, options, true, None, &mut seen)?;
            layers.push(layer);
        }
        Ok(Self {
            layers,
            read_only: options.read_only,
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
        Driver::new(self.members(), self.read_only)
    }
}

/// Device and inode of each file of a chain.
type Seen = Vec<(u64, u64)>;

/// Notes that the file at `path`, called `name`, is in the chain; it must not be there already.
fn once(seen: &mut Seen, path: &Path, name: &str) -> Result<()> {
    let this = identity(path)?;
    if seen.contains(&this) {
        return Err(Error::corrupt(format!(
            "'{}' is in the chain already: the chain is a loop",
            name.escape_default()
        )));
    }
    seen.push(this);
    Ok(())
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
            once(seen, said, &said.to_string_lossy()).context(named)?;
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

fn open_active(path: &Path, keys: &mut Keys<'_>, seen: &mut Seen) -> Result<Layer> {
    let options = keys.options;
    let lock = match (options.force_share, options.read_only) {
        (true, _) => Lock::None,
        (false, true) => SHARED,
        (false, false) => Lock::Write,
    };
    let file = open_file(path, options, options.read_only, lock)?;
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
        (Format::Qcow2 | Format::Qed, false, Some(repair)) => repair(&*file, format)?,
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
    })
}

/// Says what was done to an image that was not closed.
fn tell_mended(file: &File, done: Option<String>) {
    if let Some(done) = done {
        tracing::warn!(image = file.name(), "was not closed cleanly: {done}");
    }
}

/// Opens what the user said that `above` lies on.
fn open_said(
    above: &Layer,
    (path, format, part): (&Path, Option<Format>, Option<Part>),
    options: &ChainOptions,
    keys: &mut Keys<'_>,
    seen: &mut Seen,
) -> Result<Layer> {
    let named = || format!("{}: backing file", above.path.display());
    let shown = path.display();
    let path = fs::canonicalize(path).context(|| format!("'{shown}'"));
    let path = path.context(named)?;
    once(seen, &path, &path.to_string_lossy()).context(named)?;
    let probe = || -> Result<Format> {
        let file = open_file(&path, options, true, Lock::None)?;
        Ok(image::probe(&*file)?.unwrap_or(Format::Raw))
    };
    let format = format.map_or_else(probe, Ok).context(named)?;
    let mut layer = open_backing(path, Some(format), part, keys, seen).context(named)?;
    open_data_file(&mut layer, options, true, None, seen)?;
    Ok(layer)
}

/// Opens a backing image. Without a format, by its magic: it is not raw then.
fn open_backing(
    path: PathBuf,
    format: Option<Format>,
    part: Option<Part>,
    keys: &mut Keys<'_>,
    seen: &mut Seen,
) -> Result<Layer> {
    let options = keys.options;
    let lock = match options.force_share {
        true => Lock::None,
        false => SHARED,
    };
    let file = open_named(&path, options, true, lock)?;
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

/// Opens the VMDK image at `path`, whose first file is in `files`, and all that its descriptor names, as it was opened
/// itself: for reading only or not, with that lock.
fn open_vmdk(
    path: &Path,
    files: &mut Vec<Arc<File>>,
    (read_only, lock): (bool, Lock),
    keys: &Keys<'_>,
    seen: &mut Seen,
) -> Result<Arc<dyn Image>> {
    let options = keys.options;
    let Some(first) = files.first() else {
        return Err(Error::invalid("an image without a file"));
    };
    if let Some(name) = &options.snapshot {
        return Err(no_snapshot(&**first, name, Format::Vmdk));
    }
    let parts = vmdk::Parts::read(&**first)?;
    for name in &parts.files {
        let named = || format!("{}: extent", path.display());
        let found = resolve(path, name, &options.allow_backing).context(named)?;
        once(seen, &found, name).context(named)?;
        let file = open_named(&found, options, read_only, lock).context(named)?;
        files.push(file);
    }
    let storages: Vec<&dyn Storage> = files.iter().map(|file| &**file as _).collect();
    let open = vmdk::OpenOptions {
        read_only,
        cache_bytes: options.cache_bytes,
    };
    Ok(Arc::new(vmdk::Vmdk::open(parts, &storages, &open)?))
}

fn no_snapshot(file: &dyn Storage, name: &str, format: Format) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!(
            "{}: there is no snapshot '{name}': a {format} image has none",
            file.name()
        ),
    )
}

fn open_image(
    files: &[Arc<File>],
    format: Format,
    read_only: bool,
    snapshot: &Option<String>,
    part: Option<Part>,
    keys: &mut Keys<'_>,
) -> Result<Arc<dyn Image>> {
    let Some(file) = files.first() else {
        return Err(Error::invalid("an image without a file"));
    };
    let storage: &dyn Storage = &**file;
    if let (Some(_), true) = (part, format != Format::Raw) {
        return Err(Error::invalid(format!(
            "{}: offset and size are of raw images only, it is to be {format}",
            storage.name()
        )));
    }
    if let (Some(name), true) = (snapshot, format != Format::Qcow2) {
        return Err(no_snapshot(storage, name, format));
    }
    let image: Arc<dyn Image> = match format {
        Format::Raw => Arc::new(match part {
            Some(part) => Raw::part(storage, part.offset, part.size)?,
            None => Raw::open(storage)?,
        }),
        Format::Qcow2 => {
            let options = qcow2::OpenOptions {
                read_only,
                cache_bytes: keys.options.cache_bytes,
                passphrase: keys.next(),
                snapshot: snapshot.clone(),
                ..qcow2::OpenOptions::default()
            };
            Arc::new(qcow2::Qcow2::open(storage, &options)?)
        }
        Format::Qed => {
            let options = qed::OpenOptions {
                read_only,
                cache_bytes: keys.options.cache_bytes,
                ..qed::OpenOptions::default()
            };
            Arc::new(qed::Qed::open(storage, &options)?)
        }
        Format::Vhd => {
            let options = vhd::OpenOptions {
                read_only,
                cache_bytes: keys.options.cache_bytes,
            };
            Arc::new(vhd::Vhd::open(storage, &options)?)
        }
        Format::Vhdx => {
            let options = vhdx::OpenOptions {
                read_only,
                cache_bytes: keys.options.cache_bytes,
            };
            Arc::new(vhdx::Vhdx::open(storage, &options)?)
        }
        Format::Vdi => {
            let options = vdi::OpenOptions { read_only };
            Arc::new(vdi::Vdi::open(storage, &options)?)
        }
        Format::Luks => {
            let options = luks::OpenOptions {
                read_only,
                passphrase: keys.next(),
            };
            Arc::new(luks::Luks::open(storage, &options)?)
        }
        Format::Parallels => Arc::new(Parallels::open(storage)?),
        Format::Vmdk => return Err(Error::invalid("a vmdk image may have several files")),
        Format::Null => {
            return Err(Error::invalid("null is no format of a file: say null:SIZE"));
        }
    };
    if let Some(encryption) = image.encryption() {
        keys.used += 1;
        if encryption.cipher.is_none() && !keys.options.allow_locked {
            return Err(Error::new(
                ErrorKind::Denied,
                format!(
                    "{}: is encrypted ({}): give its passphrase with --key-file FILE",
                    storage.name(),
                    encryption.name()
                ),
            ));
        }
    }
    Ok(image)
}

/// The passphrases of a chain that is being opened.
struct Keys<'a> {
    options: &'a ChainOptions,
    /// Encrypted images opened so far.
    used: usize,
}

impl<'a> Keys<'a> {
    fn new(options: &'a ChainOptions) -> Self {
        Self { options, used: 0 }
    }

    /// That of the next encrypted image.
    fn next(&self) -> Option<Arc<Passphrase>> {
        let all = &self.options.passphrases;
        all.get(self.used).or(all.last()).cloned()
    }
}

/// The format that the image `above` records for its backing file `name`.
fn recorded(above: &Path, name: &str, format: Option<&str>) -> Result<Format> {
    match format {
        Some(format) => format
            .parse::<Format>()
            .context(|| format!("'{}'", name.escape_default())),
        None => Err(Error::new(
            ErrorKind::Denied,
            format!(
                "the format of '{0}' is not recorded in the image, and is not guessed: record it with \
                 diskplane rebase -u -b '{0}' -F raw|qcow2 '{1}'",
                name.escape_default(),
                above.display()
            ),
        )),
    }
}

/// The first of `names` that means a file, and that. What is wrong with the first of them that leads to a file, or
/// of all, where none may be opened.
fn resolve_any(above: &Path, names: &[String], allowed: &[PathBuf]) -> Result<(String, PathBuf)> {
    let mut failed: Option<Error> = None;
    for name in names {
        match resolve(above, name, allowed) {
            Ok(path) => return Ok((name.clone(), path)),
            Err(error)
                if failed
                    .as_ref()
                    .is_none_or(|f| f.kind() == ErrorKind::NotFound) =>
            {
                failed = Some(error);
            }
            Err(_) => {}
        }
    }
    Err(failed.unwrap_or_else(|| Error::corrupt("the image has no name of it that can be read")))
}

/// Whether `layer` is the parent that the image above it means.
fn verify(parent: &Parent, layer: &Layer) -> Result<()> {
    let shown = layer.path.display();
    let found = layer.image.unique_id();
    if !parent.unique_ids.is_empty() && found.is_none_or(|id| !parent.unique_ids.contains(&id)) {
        let show = |id: [u8; 16]| match layer.format {
            Format::Vhdx => vhdx::Guid(id).to_string(),
            _ => shown_id(&id),
        };
        let meant: Vec<String> = parent.unique_ids.iter().copied().map(show).collect();
        return Err(Error::corrupt(format!(
            "{shown}: its unique id is {}, the image lies over one with {}: it is another file, or was changed since",
            found.map_or("none".to_owned(), show),
            meant.join(" or ")
        )));
    }
    // Copying a file changes its time, and XenServer's tools mark parents as hidden: no reason to refuse it.
    let changed = fs::metadata(&layer.path)
        .ok()
        .and_then(|m| u64::try_from(m.mtime()).ok());
    if changed.is_some() && parent.changed.is_some() && changed != parent.changed {
        tracing::debug!(
            parent = %shown,
            "was changed after the image over it was made, or copied"
        );
    }
    Ok(())
}

/// An [`Image::unique_id`] as people know it.
fn shown_id(id: &[u8; 16]) -> String {
    match vmdk::cid_of(id) {
        Some(cid) => format!("{cid:08x} (CID)"),
        None => vhd::UniqueId(*id).to_string(),
    }
}

/// The file that `name`, stored in the image at `above`, may mean, or why it may not.
fn resolve(above: &Path, name: &str, allowed: &[PathBuf]) -> Result<PathBuf> {
    let shown = name.escape_default();
    if has_protocol(name) {
        return Err(Error::new(
            ErrorKind::Denied,
            format!("'{shown}' has a protocol, only names of files are opened"),
        ));
    }
    // As in QEMU, a relative name starts at the directory of the name by which the image was
    // opened, also where that is a symbolic link.
    let directory = above.parent().unwrap_or(Path::new(""));
    let path = fs::canonicalize(directory.join(name)).context(|| format!("'{shown}'"))?;
    let real = fs::canonicalize(above).context(|| above.display().to_string())?;
    if real.parent().is_some_and(|own| path.starts_with(own)) {
        return Ok(path);
    }
    for directory in allowed {
        let real = fs::canonicalize(directory)
            .context(|| format!("--allow-backing {}", directory.display()))?;
        if path.starts_with(&real) {
            return Ok(path);
        }
    }
    Err(Error::new(
        ErrorKind::Denied,
        format!(
            "'{}' lies outside the image's own directory: if that is intended, say --allow-backing {}",
            path.display(),
            path.parent().unwrap_or(&path).display()
        ),
    ))
}

/// Whether `name` is one of a file, and not of something with a protocol (`nbd://…`), which is never opened.
pub fn is_file_name(name: &str) -> bool {
    !has_protocol(name)
}

/// Whether a name is not a path to QEMU: a colon comes before the first slash.
fn has_protocol(name: &str) -> bool {
    name.find([':', '/'])
        .is_some_and(|at| name.get(at..).is_some_and(|rest| rest.starts_with(':')))
}

/// What makes a file this file, whatever its name.
fn identity(path: &Path) -> Result<(u64, u64)> {
    let metadata = fs::metadata(path).context(|| path.display().to_string())?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::invalid(format!(
            "{}: neither a file nor a block device",
            path.display()
        )));
    }
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn protocols_are_what_qemu_takes_for_them() {
        for (name, protocol) in [
            ("base.qcow2", false),
            ("/images/base:1.qcow2", false),
            ("./base:1.qcow2", false),
            ("base:1.qcow2", true),
            ("nbd://host/disk", true),
            ("json:{\"driver\":\"raw\"}", true),
            ("file:base.qcow2", true),
            ("", false),
        ] {
            assert_eq!(has_protocol(name), protocol, "{name}");
        }
    }

    #[test]
    fn names_lead_below_the_own_or_an_allowed_directory_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        for sub in ["own/deep", "other", "allowed"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        let files = [
            "own/top",
            "own/base",
            "own/deep/base",
            "other/key",
            "allowed/base",
        ];
        for file in files {
            fs::write(root.join(file), "x").unwrap();
        }
        symlink(root.join("other/key"), root.join("own/link")).unwrap();
        symlink(root.join("own/base"), root.join("own/good-link")).unwrap();
        symlink(root.join("own/top"), root.join("other/top-link")).unwrap();
        let allowed = [root.join("allowed")];
        let absolute = root.join("own/base").display().to_string();
        let top = root.join("own/top");
        for (above, name, reached) in [
            (&top, "base", Ok("own/base")),
            (&top, "deep/base", Ok("own/deep/base")),
            (&top, "./deep/../base", Ok("own/base")),
            (&top, &absolute, Ok("own/base")),
            (&top, "good-link", Ok("own/base")),
            (&top, "../allowed/base", Ok("allowed/base")),
            (&top, "../other/key", Err(ErrorKind::Denied)),
            (&top, "link", Err(ErrorKind::Denied)),
            (&top, "/etc/hostname", Err(ErrorKind::Denied)),
            (&top, "nbd:localhost:1", Err(ErrorKind::Denied)),
            (&top, "absent", Err(ErrorKind::NotFound)),
            // The link's directory is where the name starts, but not where the image is.
            (&root.join("other/top-link"), "key", Err(ErrorKind::Denied)),
        ] {
            let found = resolve(above, name, &allowed);
            let found = found.as_ref().map_err(Error::kind);
            let reached = reached.map(|path| root.join(path));
            assert_eq!(found, reached.as_ref().map_err(|kind| *kind), "{name}");
        }
    }

    #[test]
    fn a_format_that_is_not_recorded_is_not_guessed() {
        let top = Path::new("top");
        assert_eq!(recorded(top, "b", Some("raw")).unwrap(), Format::Raw);
        let error = recorded(top, "b", None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.to_string().contains("rebase -u -b 'b'"), "{error}");
        let error = recorded(top, "b", Some("dmg")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
