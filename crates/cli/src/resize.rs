//! `diskplane resize`.
//!
//! With `--json` an object: `filename` and `format` as given or known; `old-virtual-size` and `virtual-size` in
//! bytes; `preallocation`, the mode that the new part got.

use crate::{args, open, print};
use anyhow::{Result, anyhow, bail};
use block::{limits, size};
use disk::chain::ChainOptions;
use image::Format;
use serde::Serialize;
use std::path::Path;
use std::str::FromStr;
use tool::{prealloc::Preallocation, resize};

/// What the size is to be: so much, or more or less by so much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    To(u64),
    /// So many bytes more.
    More(u64),
    /// So many bytes less.
    Less(u64),
}

impl FromStr for NewSize {
    type Err = block::Error;

    fn from_str(text: &str) -> block::Result<Self> {
        if let Some(more) = text.strip_prefix('+') {
            return size::parse(more).map(NewSize::More);
        }
        match text.strip_prefix('-') {
            Some(less) => size::parse(less).map(NewSize::Less),
            None => size::parse(text).map(NewSize::To),
        }
    }
}

impl NewSize {
    /// Bytes, from `old` on; whole sectors as everywhere.
    fn of(self, old: u64) -> Result<u64> {
        let bytes = match self {
            NewSize::To(bytes) => Some(bytes),
            NewSize::More(bytes) => old.checked_add(bytes),
            NewSize::Less(bytes) => old.checked_sub(bytes),
        };
        bytes
            .filter(|bytes| *bytes <= limits::DISK_BYTES_MAX)
            .map(|bytes| block::align_up(bytes, 512))
            .ok_or_else(|| {
                anyhow!(
                    "the disk has {}: the new size must be from 0 to {} bytes",
                    size::human(old),
                    limits::DISK_BYTES_MAX
                )
            })
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    filename: String,
    format: &'static str,
    old_virtual_size: u64,
    virtual_size: u64,
    preallocation: &'a str,
}

/// What is done to an image.
pub struct Wish {
    /// Its new size.
    pub size: NewSize,
    /// It may become smaller.
    pub shrink: bool,
    /// What the new part gets.
    pub preallocation: Preallocation,
}

/// An image's size before and after.
pub struct Resized {
    /// What it is.
    pub format: Format,
    /// Bytes.
    pub old: u64,
    /// Bytes.
    pub new: u64,
}

/// Resizes the image at `path`, which is opened as `options` say, locked against all others meanwhile.
pub fn resize(path: &Path, options: &ChainOptions, wish: &Wish) -> Result<Resized> {
    let options = ChainOptions {
        repair: Some(crate::check::PREPARE),
        ..options.clone()
    };
    let chain = open::chain(path, &options)?;
    let active = chain.layers.first();
    let format = active.map_or(Format::Null, |layer| layer.format);
    let old = active.map_or(0, |layer| layer.image.size());
    let new = wish
        .size
        .of(old)
        .map_err(|e| anyhow!("{}: {e}", path.display()))?;
    let options = resize::ResizeOptions {
        size: new,
        shrink: wish.shrink,
        preallocation: wish.preallocation,
    };
    let old = resize::resize(&chain.members(), format, &options)?;
    Ok(Resized { format, old, new })
}

/// Resizes an image, and says so.
pub fn run(args: &args::Resize) -> Result<()> {
    let wish = Wish {
        size: args.size,
        shrink: args.shrink,
        preallocation: args.preallocation,
    };
    let options = ChainOptions {
        format: args.format,
        allow_backing: args.allow_backing.clone(),
        passphrases: args.keys.read()?,
        ..ChainOptions::default()
    };
    let (path, options) = open::resolve(&args.file, args.image_opts, &args.keys.objects, options)?;
    if options.part.or(options.window).is_some() {
        bail!(
            "{}: a part of a file cannot be resized: offset and size say where it is",
            args.file.display()
        );
    }
    let resized = resize(&path, &options, &wish)?;
    if args.quiet {
        return Ok(());
    }
    if args.json {
        let json = Json {
            filename: args.file.display().to_string(),
            format: resized.format.name(),
            old_virtual_size: resized.old,
            virtual_size: resized.new,
            preallocation: args.preallocation.name(),
        };
        return print(&crate::json(&json)?);
    }
    print(&match resized.old == resized.new {
        true => format!(
            "{}: has {} already\n",
            args.file.display(),
            size::human(resized.new)
        ),
        false => format!(
            "resized {} from {} to {}\n",
            args.file.display(),
            size::human(resized.old),
            size::human(resized.new)
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative() {
        for (text, old, new) in [
            ("1M", 5 << 20, Some(1 << 20)),
            ("+1M", 5 << 20, Some(6 << 20)),
            ("-1M", 5 << 20, Some(4 << 20)),
            ("-6M", 5 << 20, None),
            ("+1", 512, Some(1024)),
            ("+8191P", 1 << 60, None),
        ] {
            let size: NewSize = text.parse().unwrap();
            assert_eq!(size.of(old).ok(), new, "{text}");
        }
        assert!("+".parse::<NewSize>().is_err());
        assert!("--1".parse::<NewSize>().is_err());
    }
}
