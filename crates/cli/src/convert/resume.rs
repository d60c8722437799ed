//! A part of a copy that a run before left (`--resume`).

use super::Copying;
use crate::{open, options};
use anyhow::{Context, Error, Result, bail};
use block::{ErrorKind, Storage};
use image::{Format, qcow2};
use std::os::unix::fs::MetadataExt;
use std::{fs, path::Path};
use tool::bitmap;

impl Copying<'_> {
    /// Whether `path` is there to go on with. What a run that was killed left before there was a disk is removed, and
    /// so are bitmaps, which come last.
    pub(super) fn goes_on(
        &self,
        path: &Path,
        format: Format,
        options: &options::Options,
    ) -> Result<bool> {
        let Ok(there) = fs::symlink_metadata(path) else {
            return Ok(false);
        };
        let foreign = || {
            format!(
                "{}: is not a regular file, so no part of a copy: remove it",
                path.display()
            )
        };
        if !there.is_file() {
            bail!(foreign());
        }
        // What a raw disk holds may look like anything.
        let said = (format == Format::Raw).then_some(format);
        let opened = open::image(path, said, open::Access::Write);
        let (file, found) = opened.map_err(|error| self.name_other(error))?;
        // Whoever may write to the directory could put a link in the way, to a file that only we may write to.
        if file.identity()? != (there.dev(), there.ino()) {
            bail!(foreign());
        }
        // A run before may have failed to write what the host still has in memory.
        if let Err(error) = file.read_anew() {
            fs::remove_file(path)?;
            return Err(error).context("the host failed to write it, so it is removed: copy again");
        }
        let differ = match (format, found) {
            (Format::Qcow2, Format::Qcow2) => differences(&qcow2::Header::read(&*file)?, options),
            // Its header is written last, and a raw disk gets its size first.
            (Format::Qcow2, Format::Raw) if !has_begun(&*file)? => {
                fs::remove_file(path)?;
                return Ok(false);
            }
            (Format::Raw, _) => match (file.len()?, block::align_up(options.qcow2.size, 512)) {
                (there, wanted) if there == wanted => Vec::new(),
                (0, _) => {
                    fs::remove_file(path)?;
                    return Ok(false);
                }
                _ => vec!["size"],
            },
            _ => vec!["format"],
        };
        if !differ.is_empty() {
            bail!(
                "{}: is no part of this copy, it has another {}: remove it, or say what it was begun with",
                path.display(),
                differ.join(", ")
            );
        }
        if format == Format::Qcow2 {
            bitmap::remove_all(&*file)?;
        }
        Ok(true)
    }
}

impl Copying<'_> {
    /// Says of `error`, where that is so, that another `--resume` is making the same target.
    pub(super) fn name_other(&self, error: Error) -> Error {
        let own = error.downcast_ref::<block::Error>();
        let is_locked = own.is_some_and(|error| error.kind() == ErrorKind::Locked);
        match is_locked && self.args.resume {
            true => error.context(format!(
                "{}: another convert --resume is making it: wait until that one is done",
                self.target.display()
            )),
            false => error,
        }
    }
}

/// Whether the file shows a header, of whatever it is.
fn has_begun(file: &dyn Storage) -> Result<bool> {
    let mut start = [0; 512];
    let len = file.len()?.min(start.len() as u64) as usize;
    if let Some(there) = start.get_mut(..len).filter(|there| !there.is_empty()) {
        file.read_at(0, there)?;
    }
    Ok(start.iter().any(|byte| *byte != 0))
}

/// In what an image with `header` is not as `options` have it.
fn differences(header: &qcow2::Header, options: &options::Options) -> Vec<&'static str> {
    let wanted = &options.qcow2;
    let (name, format) = wanted.backing.clone().unzip();
    let packs = u8::from(wanted.compression == qcow2::Compression::Zstd);
    let lazy = header.compatible & qcow2::features::LAZY_REFCOUNTS != 0;
    [
        ("size", header.size == block::align_up(wanted.size, 512)),
        ("cluster_size", header.cluster_size() == wanted.cluster_size),
        ("compat", header.version == wanted.version),
        (
            "refcount_bits",
            1 << header.refcount_order == wanted.refcount_bits,
        ),
        ("lazy_refcounts", lazy == wanted.lazy_refcounts),
        ("extended_l2", header.extended_l2() == wanted.extended_l2),
        ("compression_type", header.compression_type == packs),
        ("backing file (-B)", header.backing == name),
        (
            "format of the backing file (-F)",
            header.backing_format() == format,
        ),
        (
            "encrypt.format",
            (header.crypt_method != 0) == options.encrypt.is_wanted(),
        ),
    ]
    .into_iter()
    .filter_map(|(what, same)| (!same).then_some(what))
    .collect()
}
