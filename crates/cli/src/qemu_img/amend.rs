//! `qemu-img amend`.

use super::create_options;
use super::line::{self, usage};
use super::open::{self, How};
use super::progress::Progress;
use super::spec::{Image, Shown};
use crate::open::Access;
use crate::options;
use crate::print;
use crate::secret::Objects;
use anyhow::{Error, Result, anyhow, bail};
use clap::Args;
use disk::chain::ChainOptions;
use image::Format;
use std::path::PathBuf;

/// `amend`.
#[derive(Args, Debug)]
pub struct Amend {
    #[command(flatten)]
    shown: Shown,
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
    pub(super) image: Image,
}

/// Changes the options of an image.
pub fn run(args: &Amend) -> Result<u8> {
    if args.options.is_empty() {
        return Err(usage("Must specify options (-o)"));
    }
    let list = line::joined(&args.options)?;
    let objects = &args.image.spec.objects;
    if let (true, Some(format)) = (line::wants_help(&list), args.image.spec.format.as_deref()) {
        return help(format);
    }
    let [file] = args.image.files.as_slice() else {
        bail!("Expecting one image file name");
    };
    let cache = open::cache(args.cache.as_deref(), "cache")?;
    let name = args.image.spec.name(file);
    let (storage, format) = open::file(&name, Access::Write, objects)?;
    let path = PathBuf::from(storage.path());
    drop(storage);
    if !matches!(format, Format::Qcow2 | Format::Luks) || line::wants_help(&list) {
        return help(format.qemu_name());
    }
    // An encrypted image has to be opened, by what its name names.
    let how = How {
        cache,
        without_backing: true,
        ..How::default()
    };
    let (_, opened) = open::chain_and_options(&name, &how, objects)?;
    let mut said = create_options::to_amend(format, &list)?;
    if format == Format::Luks {
        for (name, _) in &mut said {
            *name = of_luks(name);
        }
    }
    refuse(&said, objects)?;
    let pairs: Vec<String> = said
        .iter()
        .map(|(name, value)| format!("{name}={}", value.replace(',', ",,")))
        .collect();
    let mut changes = options::parse_amend(&pairs).map_err(|error| in_qemus_words(error, None))?;
    // As qemu-img does, without being asked for it.
    changes.shrink = true;
    changes.drop_bitmaps = true;
    let opened = ChainOptions {
        format: Some(format),
        read_only: false,
        without_backing: false,
        ..opened
    };
    let slot = said.iter().find(|(name, _)| *name == "encrypt.keyslot");
    let slot = slot.map(|(_, slot)| slot.as_str());
    let progress = Progress::new(1, args.shown.progress());
    let amended = crate::amend::apply(&path, &changes, objects, args.force, &opened);
    amended.map_err(|error| {
        let text = format!("{error:#}");
        let own = text.strip_prefix(&format!("{}: ", path.display()));
        in_qemus_words(anyhow!("{}", own.unwrap_or(&text)), slot)
    })?;
    progress.end();
    Ok(0)
}

/// The name of a qcow2 image's option that is what `name` is of a luks image.
fn of_luks(name: &'static str) -> &'static str {
    match name {
        "iter-time" => "encrypt.iter-time",
        "keyslot" => "encrypt.keyslot",
        "new-secret" => "encrypt.new-secret",
        "old-secret" => "encrypt.old-secret",
        "state" => "encrypt.state",
        other => other,
    }
}

/// Refuses what makes no sense together of keys, and secrets that are not there, as QEMU does.
fn refuse(said: &[(&str, String)], objects: &Objects) -> Result<()> {
    let get = |name: &str| {
        let found = said.iter().rev().find(|(key, _)| *key == name);
        found.map(|(_, value)| value.as_str())
    };
    if !said.iter().any(|(name, _)| name.starts_with("encrypt.")) {
        return Ok(());
    }
    let slot = get("encrypt.keyslot");
    let (new, old) = (get("encrypt.new-secret"), get("encrypt.old-secret"));
    match get("encrypt.state") {
        None => bail!("Parameter 'state' is missing"),
        Some("active") if new.is_none() => bail!("'new-secret' is required to activate a keyslot"),
        Some("active") if old.is_some() => {
            bail!("'old-secret' must not be given when activating keyslots")
        }
        Some("active") => {}
        Some("inactive") if new.is_some() => {
            bail!("'new-secret' must not be given when erasing keyslots")
        }
        Some("inactive") if get("encrypt.iter-time").is_some() => {
            bail!("'iter-time' must not be given when erasing keyslots")
        }
        Some("inactive") if slot.is_none() && old.is_none() => bail!(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given"
        ),
        Some("inactive") => {}
        Some(other) => bail!("Parameter 'state' does not accept value '{other}'"),
    }
    for id in [new, old].into_iter().flatten() {
        if !objects.has(id)? {
            bail!("No secret with id '{id}'");
        }
    }
    match slot.map(str::parse::<u64>) {
        Some(Ok(slot)) if slot > 7 => {
            bail!("Invalid keyslot {slot} specified, must be between 0 and 7")
        }
        _ => Ok(()),
    }
}

/// What an image cannot become, as QEMU says it; `slot` is to be erased, where it was named.
fn in_qemus_words(error: Error, slot: Option<&str>) -> Error {
    let text = error.to_string();
    let own = text
        .split_once(": it must be ")
        .map_or(text.as_str(), |(own, _)| own);
    if let Some(version) = own.strip_prefix("-o compat=") {
        return anyhow!("Unknown compatibility level {version}");
    }
    if let Some((slot, _)) = text
        .strip_prefix("key slot ")
        .and_then(|rest| rest.split_once(" is active: "))
    {
        return anyhow!("Refusing to overwrite active keyslot {slot} - please erase it first");
    }
    if let Some(slot) = text
        .strip_prefix("key slot ")
        .and_then(|rest| rest.strip_suffix(" is not active"))
    {
        return anyhow!("Given keyslot {slot} is already erased (inactive) ");
    }
    if text.starts_with("no key slot would be left (") {
        let what = match slot {
            Some(slot) => format!("Attempt to erase the only active keyslot {slot} which"),
            None => {
                "All the active keyslots match the (old) password that was given and erasing them"
                    .to_owned()
            }
        };
        return anyhow!(
            "{what} will erase all the data in the image irreversibly - refusing operation"
        );
    }
    let known = [
        (
            "lazy_refcounts=on needs",
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        ),
        (
            "refcount_bits is",
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            "refcount_bits other",
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
        ),
        (
            "cannot become compat=0.10: it has refcount_bits",
            "compat=0.10 requires refcount_bits=16",
        ),
        (
            "cannot become compat=0.10: snapshot ",
            "Internal snapshots prevent downgrade of image",
        ),
        (
            "cannot become compat=0.10: external data file",
            "Cannot downgrade an image with a data file",
        ),
        (
            "cannot become compat=0.10: extended L2 entries",
            "Cannot downgrade an image with incompatible features 0x10 set",
        ),
        (
            "data_file can only be set",
            "data-file can only be set for images that use an external data file",
        ),
        (
            "data_file_raw=on can only",
            "data-file-raw cannot be set on existing images",
        ),
        (
            "is not encrypted",
            "Can't amend encryption options - encryption not present",
        ),
        (
            "the old passphrase opens no key slot",
            "No keyslots match given (old) password for erase operation",
        ),
        (
            "all 8 key slots are active",
            "Can't add a keyslot - all keyslots are in use",
        ),
        (
            "the backing file cannot be amended",
            "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
        ),
    ];
    match known.iter().find(|(ours, _)| text.starts_with(ours)) {
        Some((_, words)) => anyhow!("{words}"),
        None => error,
    }
}

/// Prints the options of a format that can be amended.
fn help(format: &str) -> Result<u8> {
    let Some(known) = open::format_named(format) else {
        bail!("Unknown file format '{format}'");
    };
    match create_options::amend_help(known) {
        Some(text) => print(&text).map(|()| 0),
        None => bail!("Format driver '{format}' does not support option amendment"),
    }
}
