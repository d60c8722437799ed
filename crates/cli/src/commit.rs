//! `diskplane commit`.
//!
//! With `--json` an object: `filename` and `base`, the overlay and the image that has its data now; `virtual-size`,
//! `copied` and `zeroed` in bytes of the disk; `base-grown-from`, the base's size before, absent where it did
//! not grow; `emptied`, whether the overlay is empty now.

use crate::convert::{CACHE_BYTES, progress_bar, show};
use crate::{args, check, open, print, signals};
use anyhow::{Context as _, Result, bail};
use block::size;
use disk::chain::{Chain, ChainOptions, Layer};
use serde::Serialize;
use std::path::{Path, PathBuf};
use tool::commit::{self, Report};
use tool::work::Work;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    filename: String,
    base: String,
    virtual_size: u64,
    copied: u64,
    zeroed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_grown_from: Option<u64>,
    emptied: bool,
}

/// Puts what an overlay has into an image below it.
pub fn run(args: &args::Commit) -> Result<()> {
    let stop = signals::stop_on_signals()?;
    // With an image between, the overlay stays what it is: those would read as garbage without it.
    let empties = !args.drop && args.base.is_none();
    let options = ChainOptions {
        format: args.format,
        read_only: !empties,
        cache: args.moving.cache.unwrap_or_default(),
        allow_backing: args.moving.allow_backing.clone(),
        cache_bytes: Some(CACHE_BYTES),
        passphrases: args.moving.keys.read()?,
        repair: Some(check::PREPARE),
        ..ChainOptions::default()
    };
    let objects = &args.moving.keys.objects;
    let (path, options) = open::resolve(&args.file, args.image_opts, objects, options)?;
    let chain = open::chain(&path, &options)?;
    let shown = args.file.display();
    if chain.layers.len() < 2 {
        bail!("{shown}: has no backing file to commit into");
    }
    let depth = match &args.base {
        Some(base) => depth_of(&path, base, &chain.layers)?,
        None => 1,
    };
    open::refuse_base(&args.file, args.image_opts, depth)?;
    if let (true, Some(overlay)) = (empties, chain.layers.first())
        && !commit::can_empty(overlay.format)
    {
        bail!(
            "{shown}: a {} image cannot be emptied: say -d to leave it as it is",
            overlay.format
        );
    }
    let size = chain.layers.first().map_or(0, |layer| layer.image.size());
    let bar = progress_bar(size, args.moving.progress);
    let mut progress = |done| show(&bar, done);
    let mut work = Work::new(stop, &mut progress);
    work.rate = args.moving.rate;
    let done = into(chain, depth, empties, &options, &mut work);
    bar.finish_and_clear();
    let (path, report) = done?;
    if args.moving.quiet {
        return Ok(());
    }
    let json = Json {
        filename: args.file.display().to_string(),
        base: path.display().to_string(),
        virtual_size: report.size,
        copied: report.copied,
        zeroed: report.zeroed,
        base_grown_from: report.grown_from,
        emptied: empties,
    };
    if args.moving.json {
        return print(&crate::json(&json)?);
    }
    let mut line = format!(
        "committed {shown} into {}: {} of data, {} of zeros",
        json.base,
        size::human(report.copied),
        size::human(report.zeroed)
    );
    if let Some(old) = report.grown_from {
        line.push_str(&format!(
            "; it grew from {} to {}",
            size::human(old),
            size::human(report.size)
        ));
    }
    print(&(line + "\n"))
}

/// Puts what the chain has above its image at `depth` into that, and empties the overlay if it `empties`. Both are
/// opened as `options` say. Returns where the data are now, and what was done.
pub fn into(
    mut chain: Chain,
    depth: usize,
    empties: bool,
    options: &ChainOptions,
    work: &mut Work<'_>,
) -> Result<(PathBuf, Report)> {
    // The base is locked for reading with the chain, and is to be written.
    let below = chain.layers.split_off(depth);
    let Some(base) = below.first() else {
        bail!("there is no image {depth} below the first");
    };
    let (path, format, part) = (base.path.clone(), base.format, base.part);
    let faults = base.file_faults();
    let is_encrypted = |layer: &&Layer| layer.image.encryption().is_some();
    // A passphrase for each encrypted image, from the top; the last holds for all further ones.
    let used = chain.layers.iter().filter(is_encrypted).count();
    let last = options.passphrases.len().saturating_sub(1);
    let left = options.passphrases.get(used.min(last)..);
    drop(below);
    let options = ChainOptions {
        format: Some(format),
        read_only: false,
        passphrases: left.unwrap_or_default().to_vec(),
        part,
        faults,
        disk_faults: None,
        // They say of the overlay what they say.
        below: options.below.get(depth..).unwrap_or_default().to_vec(),
        data_file: None,
        keeps_id: commit::keeps_id(&chain.layers),
        ..options.clone()
    };
    let open_base = || open::chain(&path, &options);
    let report = commit::commit(&chain.layers, &open_base, work)?;
    if let (true, Some(overlay)) = (empties, chain.layers.first()) {
        commit::empty(overlay)
            .with_context(|| format!("{}: has all of it now, but", path.display()))?;
    }
    Ok((path, report))
}

/// Which image of the chain `base` is: a path, or the name that the image above has for it.
pub fn depth_of(file: &Path, base: &Path, layers: &[Layer]) -> Result<usize> {
    let wanted = std::fs::canonicalize(base).ok();
    let named = |nth: usize| {
        let above = nth.checked_sub(1).and_then(|above| layers.get(above));
        above.and_then(|layer| layer.image.describe().backing)
    };
    let found = layers.iter().enumerate().skip(1).find(|(nth, layer)| {
        let path = std::fs::canonicalize(&layer.path).ok();
        (wanted.is_some() && path == wanted)
            || named(*nth).is_some_and(|name| Path::new(&name) == base)
    });
    match found {
        Some((depth, _)) => Ok(depth),
        None => bail!(
            "-b {}: is not in the chain of {}",
            base.display(),
            file.display()
        ),
    }
}
