//! Opening an image of each format in files that are open.

use super::names::{Seen, once, resolve};
use super::{ChainOptions, Part, open_named};
use block::{Context, Error, ErrorKind, Result, Storage};
use crypto::Passphrase;
use image::{
    Bochs, Cloop, Dmg, Format, Image, Parallels, Raw, luks, qcow, qcow2, qed, vdi, vhd, vhdx, vmdk,
};
use io::{File, Lock};
use std::{path::Path, sync::Arc};

/// Opens the VMDK image at `path`, whose first file is in `files`, and all that its descriptor names, as it was opened
/// itself: for reading only or not, with that lock.
pub(super) fn open_vmdk(
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
        keeps_id: options.keeps_id,
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

pub(super) fn open_image(
    files: &[Arc<File>],
    format: Format,
    read_only: bool,
    snapshot: &Option<String>,
    part: Option<Part>,
    keys: &mut Keys<'_>,
) -> Result<Arc<dyn Image>> {
    let vhd_size = keys.vhd_size.take();
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
        Format::Qcow => {
            let options = qcow::OpenOptions {
                read_only,
                cache_bytes: keys.options.cache_bytes,
                passphrase: keys.next(),
            };
            Arc::new(qcow::Qcow::open(storage, &options)?)
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
                size_from: vhd_size,
            };
            Arc::new(vhd::Vhd::open(storage, &options)?)
        }
        Format::Vhdx => {
            let options = vhdx::OpenOptions {
                read_only,
                cache_bytes: keys.options.cache_bytes,
                keeps_id: keys.options.keeps_id,
            };
            Arc::new(vhdx::Vhdx::open(storage, &options)?)
        }
        Format::Vdi => {
            let options = vdi::OpenOptions {
                read_only,
                cache_bytes: keys.options.cache_bytes,
            };
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
        Format::Bochs => Arc::new(Bochs::open(storage)?),
        Format::Cloop => Arc::new(Cloop::open(storage)?),
        Format::Dmg => Arc::new(Dmg::open(storage)?),
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
                    "{}: the {format} image is encrypted ({}): give its passphrase with --key-file FILE",
                    storage.name(),
                    encryption.name()
                ),
            ));
        }
    }
    Ok(image)
}

/// The passphrases of a chain that is being opened.
pub(super) struct Keys<'a> {
    pub(super) options: &'a ChainOptions,
    /// Encrypted images opened so far.
    used: usize,
    /// What was said of the first image's size, until it is opened.
    vhd_size: Option<vhd::SizeFrom>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(options: &'a ChainOptions) -> Self {
        Self {
            options,
            used: 0,
            vhd_size: options.vhd_size,
        }
    }

    /// That of the next encrypted image.
    fn next(&self) -> Option<Arc<Passphrase>> {
        let all = &self.options.passphrases;
        all.get(self.used).or(all.last()).cloned()
    }
}
