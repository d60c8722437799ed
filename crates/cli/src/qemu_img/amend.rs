//! `qemu-img amend`.

use super::create_options;
use super::line::{self, usage};
use super::open::{self, Name};
use crate::open::Access;
use crate::options;
use crate::print;
use crate::secret::{Keys, Objects};
use anyhow::{Result, anyhow, bail};
use clap::Args;
use disk::chain::ChainOptions;
use image::Format;
use std::path::{Path, PathBuf};

/// `amend`.
#[derive(Args, Debug)]
pub struct Amend {
    /// quiet operation
    #[arg(short, long)]
    quiet: bool,
    /// show progress
    #[arg(short, long)]
    progress: bool,
    /// specify FILENAME format explicitly
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// indicates that FILENAME is a complete image specification instead of a file name
    #[arg(long)]
    image_opts: bool,
    /// cache mode for FILENAME (writeback)
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// what to change
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// allow certain unsafe operations
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    objects: Objects,
    /// image file name (or specification with --image-opts)
    #[arg(value_name = "FILENAME")]
    files: Vec<String>,
}

/// Changes the options of an image.
pub fn run(args: &Amend) -> Result<u8> {
    if args.options.is_empty() {
        return Err(usage("Must specify options (-o)"));
    }
    let list = line::joined(&args.options)?;
    let unsupported =
        |format: &str| anyhow!("Format driver '{format}' does not support option amendment");
    if let (true, Some(format)) = (line::wants_help(&list), args.format.as_deref()) {
        return help(format).ok_or_else(|| unsupported(format))?;
    }
    let [file] = args.files.as_slice() else {
        bail!("Expecting one image file name");
    };
    let cache = open::cache(args.cache.as_deref(), "cache")?;
    let name = Name {
        text: file,
        format: args.format.as_deref(),
        image_opts: args.image_opts,
    };
    let (storage, format) = open::file(&name, Access::Write, &args.objects)?;
    let path = PathBuf::from(storage.path());
    drop(storage);
    if format != Format::Qcow2 {
        return Err(unsupported(format.qemu_name()));
    }
    if line::wants_help(&list) {
        return help(format.qemu_name()).ok_or_else(|| unsupported(format.qemu_name()))?;
    }
    let mut said = Vec::new();
    for piece in options::split(&list) {
        let (name, value) = piece.split_once('=').unwrap_or((&piece, "on"));
        if !create_options::can_amend(name) {
            let known = create_options::Said::parse("qcow2", "")?.has(name);
            bail!(match known {
                true => format!("Cannot amend option '{name}'"),
                false => format!("Invalid parameter '{name}'"),
            });
        }
        said.push(format!("{name}={}", value.replace(',', ",,")));
    }
    let changes = options::parse_amend(&said)?;
    let keys = Keys {
        objects: args.objects.clone(),
        ..Keys::default()
    };
    let chain_options = ChainOptions {
        format: Some(format),
        cache,
        ..open::trusting()
    };
    let failed = |error: anyhow::Error| {
        let text = format!("{error:#}");
        let own = text.strip_prefix(&format!("{file}: ")).unwrap_or(&text);
        match own {
            _ if own.contains("the backing file cannot be amended") => {
                anyhow!("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")
            }
            _ => anyhow!("{own}"),
        }
    };
    crate::amend::apply(
        Path::new(&path),
        &changes,
        &keys,
        args.force,
        &chain_options,
    )
    .map_err(failed)?;
    Ok(0)
}

/// Prints the options of a format that can be amended.
fn help(format: &str) -> Option<Result<u8>> {
    (format == "qcow2").then(|| print(&create_options::amend_help()).map(|()| 0))
}
