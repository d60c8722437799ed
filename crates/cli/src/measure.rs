//! `diskplane measure`.
//!
//! Figures are those of `qemu-img measure`. With `--json` an object as `qemu-img measure --output=json` prints it:
//! `required` and `fully-allocated`, bytes of the file; `bitmaps`, bytes that the source's bitmaps take besides,
//! absent where source or target cannot have any.

use crate::convert::CACHE_BYTES;
use crate::options::{self, Options};
use crate::secret::Objects;
use crate::{args, open, print, signals};
use anyhow::{Result, bail};
use block::{limits, size};
use disk::chain::{Chain, ChainOptions};
use image::Format;
use serde::Serialize;
use std::path::Path;
use tool::measure::{self, Layout, Measured};
use tool::prealloc::Preallocation;
use tool::source::Source;
use tool::work::Work;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    required: u64,
    fully_allocated: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
}

/// Says how large an image will be.
pub fn run(args: &args::Measure) -> Result<()> {
    let stop = signals::stop_on_signals()?;
    let mut options = options::parse(args.target_format, &args.options)?;
    let chain = args.file.as_deref().map(|name| open(args, name));
    let chain = chain.transpose()?;
    let mut source = chain.as_ref().map(Source::new).transpose()?;
    let bytes = match (&source, args.size) {
        (Some(source), None) => source.size(),
        (None, Some(bytes)) => block::align_up(bytes, 512),
        _ => bail!("say one of the two: an image, or --size SIZE"),
    };
    if bytes > limits::DISK_BYTES_MAX {
        bail!(
            "a disk of {} is too large: the most is {} bytes",
            size::human(bytes),
            limits::DISK_BYTES_MAX
        );
    }
    let mut progress = |_| {};
    let mut work = Work::new(stop, &mut progress);
    let format = args.target_format;
    let measured = of(
        format,
        &mut options,
        bytes,
        chain.as_ref(),
        source.as_mut(),
        &mut work,
    )?;
    let Some(measured) = measured else {
        bail!("-O {format}: the size of such an image cannot be measured");
    };
    print(&match args.json {
        true => crate::json(&Json {
            required: measured.required,
            fully_allocated: measured.fully_allocated,
            bitmaps: measured.bitmaps,
        })?,
        false => {
            let mut text = format!(
                "required size: {}\nfully allocated size: {}\n",
                measured.required, measured.fully_allocated
            );
            if let Some(bytes) = measured.bitmaps {
                text.push_str(&format!("bitmaps size: {bytes}\n"));
            }
            text
        }
    })
}

/// Measures a new image of `format`, for a disk of `bytes` bytes: that of `source`, in `chain`, where there is one.
/// `None` where such images cannot be measured.
pub fn of(
    format: Format,
    options: &mut Options,
    bytes: u64,
    chain: Option<&Chain>,
    source: Option<&mut Source<'_>>,
    work: &mut Work<'_>,
) -> Result<Option<Measured>> {
    Ok(match format {
        Format::Raw => Some(measure::raw(bytes)),
        Format::Qcow2 => {
            options.qcow2.size = bytes;
            options.qcow2.extended_l2 = options.extended_l2.unwrap_or(false);
            options.qcow2.validate()?;
            let layout = layout(options)?;
            let found = measure::qcow2(&layout, bytes, source, work)?;
            Some(Measured {
                bitmaps: bitmaps(chain, options)?,
                ..found
            })
        }
        Format::Luks => {
            let whole = image::luks::file_bytes(options.encrypt.len()?, bytes)?;
            Some(Measured {
                required: whole,
                fully_allocated: whole,
                bitmaps: None,
            })
        }
        _ => None,
    })
}

fn open(args: &args::Measure, name: &Path) -> Result<Chain> {
    let options = ChainOptions {
        format: args.format,
        read_only: true,
        force_share: args.force_share,
        allow_backing: args.allow_backing.clone(),
        snapshot: args.snapshot.clone(),
        cache_bytes: Some(CACHE_BYTES),
        // Nothing of its data is read.
        allow_locked: true,
        ..ChainOptions::default()
    };
    open::named(name, args.image_opts, &Objects::default(), options)
}

fn layout(options: &Options) -> Result<Layout> {
    let allocated = matches!(
        options.preallocation,
        Preallocation::Falloc | Preallocation::Full
    );
    Ok(Layout {
        cluster_size: options.qcow2.cluster_size,
        refcount_bits: options.qcow2.refcount_bits,
        extended_l2: options.qcow2.extended_l2,
        encryption_len: options.encrypt.len()?,
        allocated,
        backed: options.backing_file.is_some(),
    })
}

/// What the source's bitmaps take, where both can have some.
fn bitmaps(chain: Option<&Chain>, options: &Options) -> Result<Option<u64>> {
    let active = chain.and_then(|chain| chain.layers.first());
    match active {
        Some(layer) if layer.format == Format::Qcow2 && options.qcow2.version >= 3 => {
            let Some(file) = layer.files.first() else {
                return Ok(None);
            };
            let header = image::qcow2::Header::read(&**file)?;
            if header.version < 3 {
                return Ok(None);
            }
            // A snapshot's disk may have had another size, its bitmaps are the image's.
            let bytes = header.size;
            let cluster = options.qcow2.cluster_size;
            Ok(Some(measure::bitmaps(&**file, bytes, cluster)?))
        }
        _ => Ok(None),
    }
}
