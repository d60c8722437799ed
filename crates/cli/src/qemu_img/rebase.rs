//! `qemu-img rebase`.

use super::create;
use super::line::usage;
use super::open::{self, How, Name};
use super::progress::Progress;
use super::spec::{Image, Shown};
use crate::create::link;
use crate::open::Access;
use crate::signals;
use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use disk::chain::Chain;
use image::Format;
use std::path::Path;
use std::sync::Arc;
use tool::rebase::{can_rebase, copy_differences, set_backing};
use tool::work::Work;

/// `rebase`.
#[derive(Args, Debug)]
pub struct Rebase {
    #[command(flatten)]
    shown: Shown,
    /// cache mode for FILENAME (writeback)
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// rebase onto this file (or no backing file)
    #[arg(short, long, value_name = "BACKING_FILENAME")]
    backing: Option<String>,
    /// specify format for BACKING_FILENAME
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// BACKING_FILENAME cache mode (writeback)
    #[arg(short = 'T', long, value_name = "CACHE")]
    backing_cache: Option<String>,
    /// do not fail if BACKING_FILENAME can not be read
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// compress image (when image supports this)
    #[arg(short, long)]
    compress: bool,
    /// open image in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    pub(super) image: Image,
}

/// Gives an image another backing file.
pub fn run(args: &Rebase) -> Result<u8> {
    let file = args.image.file()?;
    if args.backing.is_none() && !args.backing_unsafe {
        return Err(usage(
            "Must specify backing file (-b) or use unsafe mode (-u)",
        ));
    }
    let cache = open::cache(args.cache.as_deref(), "cache")?;
    let source_cache = open::cache(args.backing_cache.as_deref(), "source cache")?;
    let name = args.image.spec.name(file);
    let said = args.backing_format.as_deref();
    if let Some(format) = said
        && open::format_named(format).is_none()
        && !Format::recorded(format).is_ok_and(|recorded| recorded == Format::Raw)
    {
        bail!("Invalid format name: '{format}'");
    }
    // Without a name there is none.
    let backing = args.backing.as_deref().filter(|name| !name.is_empty());
    let change = |file: &io::File, format: Format| -> Result<()> {
        let failed = |why: String| {
            let name = backing.unwrap_or_default();
            anyhow!("Could not change the backing file to '{name}': {why}")
        };
        let link = match (backing, said) {
            (Some(name), Some(below)) => {
                let recorded = below;
                let below = Format::recorded(below)?;
                // QEMU's own word for what a format cannot lie on.
                if format == Format::Vmdk && below != Format::Vmdk {
                    return Err(failed("Operation not supported".to_owned()));
                }
                if format == Format::Qcow2 {
                    // The name is kept as it was said.
                    let changed = image::qcow2::rebase::set_backing(file, Some((name, recorded)));
                    return changed.map_err(|error| failed(error.to_string()));
                }
                let link = link(file.path(), format, name, below);
                Some(link.map_err(|error| failed(format!("{error:#}")))?)
            }
            (Some(_), None) => return Err(failed("backing format must be specified".to_owned())),
            (None, _) => None,
        };
        set_backing(file, format, link.as_ref()).map_err(|error| failed(error.to_string()))
    };
    if args.backing_unsafe {
        let (storage, format) = open::file(&name, Access::Write, &args.image.spec.objects)?;
        open::need_key(&name, &*storage, format, &args.image.spec.objects)?;
        refuse(args, format)?;
        super::check::mend(&*storage, format)?;
        change(&storage, format)?;
        return Ok(0);
    }
    let how = How {
        write: true,
        cache,
        ..How::default()
    };
    let overlay = open::chain(&name, &how, &args.image.spec.objects)?;
    let active = open::active(&overlay)?;
    let format = active.format;
    refuse(args, format)?;
    let base = backing.map(|below| base(args, &active.path, below, source_cache));
    let base = base.transpose()?;
    let mut progress = Progress::new(active.image.size(), args.shown.progress());
    let mut tell = |done| progress.set(done);
    let mut work = Work::new(signals::stop_on_signals()?, &mut tell);
    copy_differences(&overlay, base.as_ref(), args.compress, &mut work)?;
    progress.end();
    // From here on nothing of the image is in memory; its lock is still held.
    let storage = active.files.first().map(Arc::clone);
    drop(overlay);
    change(&*storage.context("an image without a file")?, format)?;
    Ok(0)
}

fn refuse(args: &Rebase, format: Format) -> Result<()> {
    if args.compress && format != Format::Qcow2 {
        bail!("Compression not supported for this file format");
    }
    match can_rebase(format) {
        true => Ok(()),
        false => bail!(
            "Could not change the backing file to '{}': Operation not supported",
            args.backing.as_deref().unwrap_or_default()
        ),
    }
}

/// The new backing file.
fn base(args: &Rebase, file: &Path, name: &str, cache: io::Cache) -> Result<Chain> {
    let path = create::below(file, name);
    let base = Name {
        text: &path,
        format: args.backing_format.as_deref(),
        image_opts: false,
    };
    let how = How {
        cache,
        force_share: args.force_share,
        // The old one may be it, and is open already.
        ..How::default()
    };
    let chain = open::chain(&base, &how, &args.image.spec.objects).map_err(|error| {
        anyhow!(
            "Could not open new backing file '{name}': {}",
            create::once(&path, &error.to_string())
        )
    })?;
    let overlay = std::fs::canonicalize(file)?;
    let is_overlay = |path: &Path| std::fs::canonicalize(path).is_ok_and(|path| path == overlay);
    if chain.layers.iter().any(|layer| is_overlay(&layer.path)) {
        bail!(
            "Could not open new backing file '{name}': it lies on '{}' itself",
            file.display()
        );
    }
    Ok(chain)
}
