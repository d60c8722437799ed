//! Opening images as qemu-img does, and saying as it does why one cannot be opened.
//!
//! qemu-img follows the names within images wherever they lead, and probes what has no format recorded: so does this.

use super::refused::{self, Purpose};
use crate::image_opts::{self, ImageOptions};
use crate::open::{self, Access};
use crate::secret::Objects;
use anyhow::{Error, Result, anyhow};
use block::faults::Faults;
use block::{ErrorKind, Storage};
use crypto::Passphrase;
use disk::blocking::CutOff;
use disk::chain::{Below, Chain, ChainOptions, FileFaults, Layer, Part};
use image::Format;
use image::vhd::SizeFrom;
use io::{Cache, File, Lock, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An image as the command line names it.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a> {
    /// A file's name; with `image_opts`, options.
    pub text: &'a str,
    /// What `-f` says.
    pub format: Option<&'a str>,
    /// `--image-opts`.
    pub image_opts: bool,
}

/// Why an image is not opened for writing while others may write it.
pub const FORCE_SHARE: &str = "force-share=on can only be used with read-only images";

/// How an image is opened.
#[derive(Clone, Debug, Default)]
pub struct How {
    /// For writing too.
    pub write: bool,
    /// `-U`.
    pub force_share: bool,
    /// Nobody may write it meanwhile, even where it is raw.
    pub alone: bool,
    /// How the host caches it.
    pub cache: Cache,
    /// Leave what it lies on closed.
    pub without_backing: bool,
    /// What its name says of what it lies on is refused, as by QEMU where that stays closed.
    pub refuse_backing: bool,
    /// It is enough to know what it is: an encrypted one needs no passphrase.
    pub allow_locked: bool,
    /// Of its internal snapshots, read that one.
    pub snapshot: Option<String>,
    /// Passphrases of an image that was just made with them, where its name names none.
    pub passphrases: Vec<Arc<Passphrase>>,
}

/// The cache mode that an option says.
pub fn cache(said: Option<&str>, what: &str) -> Result<Cache> {
    said.map_or(Ok(Cache::Writeback), |mode| {
        mode.parse()
            .map_err(|_| anyhow!("Invalid {what} option: {mode}"))
    })
}

/// Opens an image and all that it lies on.
pub fn chain(name: &Name<'_>, how: &How, objects: &Objects) -> Result<Chain> {
    chain_and_options(name, how, objects).map(|(chain, _)| chain)
}

/// How images are opened whose names for others are followed wherever they lead.
pub fn trusting() -> ChainOptions {
    ChainOptions {
        allow_backing: vec![PathBuf::from("/")],
        cache_bytes: Some(crate::convert::CACHE_BYTES),
        repair: Some(super::check::MEND),
        probe_backing: true,
        names: Some(below),
        cut_off: CutOff::Zeros,
        ..ChainOptions::default()
    }
}

/// As [`chain`]; and how it was opened, for what opens an image of it once more.
pub fn chain_and_options(
    name: &Name<'_>,
    how: &How,
    objects: &Objects,
) -> Result<(Chain, ChainOptions)> {
    let could_not = |why: Error| anyhow!("Could not open '{}': {why}", name.text);
    let mut named = Named::of(name, objects)?;
    named.force_share |= how.force_share;
    if how.write {
        named.refuse_writing().map_err(could_not)?;
    }
    if !how.allow_locked {
        named.need_secrets().map_err(could_not)?;
    }
    if named.passphrases.is_empty() {
        named.passphrases.clone_from(&how.passphrases);
    }
    let path = &block::name::text(&named.path);
    let failed = |error: block::Error| could_not(explain(path, &error, None, how.write));
    let cache = named.cache.unwrap_or(how.cache);
    let mut opened = None;
    let format = match named.format {
        Some(format) => format,
        None => {
            let found = match crate::open::at_server(&named.path) {
                // Once for all: many a server takes one client, and ends with that.
                Some(export) => {
                    let options = OpenOptions {
                        read_only: !how.write,
                        cache,
                        ..OpenOptions::default()
                    };
                    let file = disk::chain::open_export(export, &options, &named.server);
                    let file = file.and_then(|file| open::faulty(file, named.faults.as_ref()));
                    // It has its faults now.
                    named.faults = None;
                    probe_in(opened.insert(file.map_err(failed)?))
                }
                None => probe(&named.path, named.window),
            };
            let found = found.map_err(failed)?;
            if found == Format::Raw && how.write {
                warn_of_raw(name.text);
            }
            found
        }
    };
    let unsupported = |key: &str| {
        let format = format.qemu_name();
        could_not(anyhow!(
            "Block format '{format}' does not support the option '{key}'"
        ))
    };
    if let Some(key) = named.part_key.filter(|_| format != Format::Raw) {
        return Err(unsupported(key));
    }
    if let Some(key) = named.backing_key.filter(|_| how.refuse_backing) {
        return Err(unsupported(&key));
    }
    let options = ChainOptions {
        format: Some(format),
        opened,
        part: named.part,
        faults: named.faults,
        disk_faults: named.disk_faults,
        window: named.window,
        vhd_size: named.vhd_size,
        below: named.below,
        data_file: named.data_file,
        passphrases: named.passphrases,
        server: named.server,
        read_only: !how.write,
        cache,
        force_share: named.force_share,
        shares_raw: !how.alone,
        snapshot: how.snapshot.clone(),
        without_backing: how.without_backing,
        allow_locked: how.allow_locked,
        ..trusting()
    };
    let header = Some(Header {
        format,
        window: options.window,
    });
    let chain = open::chain(&named.path, &options)
        .map_err(|error| could_not(explain(path, &error, header, how.write)))?;
    Ok((chain, options))
}

/// An image's file, and what its name says besides.
struct Named {
    path: PathBuf,
    format: Option<Format>,
    faults: Option<FileFaults>,
    disk_faults: Option<Arc<Faults>>,
    part: Option<Part>,
    part_key: Option<&'static str>,
    backing_key: Option<String>,
    window: Option<Part>,
    vhd_size: Option<SizeFrom>,
    below: Vec<Below>,
    data_file: Option<PathBuf>,
    passphrases: Vec<Arc<Passphrase>>,
    force_share: bool,
    read_only: bool,
    cache: Option<Cache>,
    server: nbd::Options,
    /// A secret that it names and that nobody has given.
    lacks: Option<String>,
}

impl Named {
    /// Refuses to go on without the secrets that are named: who only looks at the tables needs none.
    fn need_secrets(&self) -> Result<()> {
        match &self.lacks {
            Some(id) => Err(anyhow!("No secret with id '{id}'")),
            None => Ok(()),
        }
    }

    /// Refuses to open for writing what is said to be for reading only, or where others may be writing too.
    fn refuse_writing(&self) -> Result<()> {
        match (self.read_only, self.force_share) {
            (true, _) => Err(anyhow!(image_opts::READ_ONLY)),
            (false, true) => Err(anyhow!(FORCE_SHARE)),
            (false, false) => Ok(()),
        }
    }

    fn of(name: &Name<'_>, objects: &Objects) -> Result<Self> {
        let could_not = |why: Error| anyhow!("Could not open '{}': {why}", name.text);
        if name.image_opts && name.format.is_some() {
            return Err(anyhow!("--image-opts and --format are mutually exclusive"));
        }
        let format = name.format.map(driver).transpose().map_err(could_not)?;
        let debugged = match name.image_opts {
            false => ImageOptions::of_blkdebug(name.text),
            true => None,
        };
        let debugged = debugged.transpose().map_err(could_not)?;
        if !name.image_opts && debugged.is_none() && !image_opts::is_json(name.text) {
            check_protocol(name.text).map_err(could_not)?;
            let null = null_named(name.text);
            if let (Some(_), Some(other)) = (&null, format)
                && !matches!(other, Format::Raw | Format::Null)
            {
                let other = other.qemu_name();
                return Err(could_not(anyhow!("Image is not in {other} format")));
            }
            let path = null.as_deref().unwrap_or(name.text);
            return Ok(Self {
                path: super::create::path(path),
                format: if null.is_some() {
                    Some(Format::Null)
                } else {
                    format
                },
                vhd_size: None,
                faults: None,
                disk_faults: None,
                part: None,
                part_key: None,
                backing_key: None,
                window: None,
                below: Vec::new(),
                data_file: None,
                passphrases: Vec::new(),
                force_share: false,
                read_only: false,
                cache: None,
                server: open::server(),
                lacks: None,
            });
        }
        let said = match debugged {
            Some(said) => said,
            None => ImageOptions::parse(name.text).map_err(could_not)?,
        };
        for note in &said.notes {
            eprintln!(
                "qemu-img: warning: {}",
                note.lines()
                    .map(block::plain)
                    .collect::<Vec<_>>()
                    .join("\n")
            );
        }
        let (mut passphrases, mut lacks) = (Vec::new(), None);
        for id in &said.secrets {
            match objects.find(id) {
                Ok(secret) => passphrases.push(secret),
                Err(_) => lacks = lacks.or_else(|| Some(id.clone())),
            }
        }
        let server = said.server();
        Ok(Self {
            path: said.path,
            format: format.or(said.format),
            faults: said.faults,
            disk_faults: said.disk_faults,
            part: said.part,
            part_key: said.part_key,
            backing_key: said.backing_key,
            window: said.window,
            vhd_size: said.vhd_size,
            below: said.below,
            data_file: said.data_file,
            passphrases,
            force_share: said.force_share,
            read_only: said.read_only,
            cache: said.cache,
            server,
            lacks,
        })
    }
}

/// The disk of nothing that QEMU calls `name`.
pub fn null_named(name: &str) -> Option<String> {
    let is_null = matches!(name, "null-co://" | "null-aio://");
    is_null.then(|| format!("null:{}?read-zeroes=off", image_opts::NULL_BYTES))
}

/// Refuses a name that begins with a protocol which is none of QEMU's for files: a file of that name is `./NAME`.
pub fn check_protocol(name: &str) -> Result<()> {
    for driver in ["null-co", "null-aio"] {
        if name
            .strip_prefix(driver)
            .is_some_and(|rest| rest.starts_with(':'))
        {
            return match null_named(name) {
                Some(_) => Ok(()),
                None => Err(anyhow!(
                    "The only allowed filename for this driver is '{driver}://'"
                )),
            };
        }
    }
    let own = ["file:", "host_device:"]
        .iter()
        .any(|own| name.starts_with(own));
    match own || nbd::is_name(name) || disk::chain::is_file_name(name) {
        true => Ok(()),
        false => {
            let protocol = name.split(':').next().unwrap_or_default();
            Err(anyhow!("Unknown protocol '{protocol}'"))
        }
    }
}

/// Refuses to write the image at `depth` below the one that `name` names, where its file is for reading only.
pub fn refuse_base(name: &Name<'_>, depth: usize) -> Result<()> {
    open::refuse_base(&block::name::path(name.text), name.image_opts, depth)
}

/// What a backing file's name with a protocol means.
fn below(name: &str) -> block::Result<Below> {
    let image = |path: PathBuf, format, part| Below::Image {
        path,
        format,
        part,
        faults: None,
    };
    if let Some(path) = name.strip_prefix("file:") {
        return Ok(image(block::name::path(path), None, None));
    }
    if let Some(null) = null_named(name) {
        return Ok(image(null.into(), Some(Format::Null), None));
    }
    if nbd::is_name(name) {
        return Ok(image(name.into(), None, None));
    }
    if let Some(said) = ImageOptions::of_blkdebug(name) {
        let said = said.map_err(|error| block::Error::invalid(error.to_string()))?;
        return Ok(Below::Image {
            path: said.path,
            format: None,
            part: None,
            faults: said.faults,
        });
    }
    if !image_opts::is_json(name) {
        let protocol = name.split(':').next().unwrap_or_default();
        return Err(block::Error::unsupported(format!(
            "Unknown protocol '{}'",
            block::plain(protocol)
        )));
    }
    let said =
        ImageOptions::parse(name).map_err(|error| block::Error::invalid(error.to_string()))?;
    match said.below.is_empty()
        && said.secrets.is_empty()
        && said.data_file.is_none()
        && said.window.is_none()
        && said.vhd_size.is_none()
        && said.disk_faults.is_none()
    {
        true => Ok(Below::Image {
            path: said.path,
            format: said.format,
            part: said.part,
            faults: said.faults,
        }),
        false => Err(block::Error::unsupported(
            "a backing file's name that names secrets, a data file, another backing file or faults of the disk",
        )),
    }
}

/// The format that QEMU calls `name`; it knows none of our other names (its word for `vhd` is `vpc`).
pub fn format_named(name: &str) -> Option<Format> {
    let format = name.parse::<Format>().ok()?;
    Some(format).filter(|format| format.qemu_name() == name)
}

/// The format that the driver `name` of QEMU is.
pub fn driver(name: &str) -> Result<Format> {
    format_named(name).ok_or_else(|| anyhow!("Unknown driver '{name}'"))
}

/// How a file is opened that is only looked at.
pub fn looking() -> OpenOptions {
    OpenOptions {
        read_only: true,
        lock: Lock::None,
        ..OpenOptions::default()
    }
}

/// The format whose magic a file shows, or else raw: as QEMU probes.
pub fn probe(path: &Path, window: Option<Part>) -> block::Result<Format> {
    let file = File::open(path, &looking())?;
    match window {
        Some(part) => probe_in(&*File::window(file, part.offset, part.size)?),
        None => probe_in(&file),
    }
}

/// As [`probe`], of a file that is open.
fn probe_in(file: &File) -> block::Result<Format> {
    match image::probe(file) {
        // What may be a fixed VHD image is raw to QEMU.
        Err(error) if error.kind() == ErrorKind::Invalid => Ok(Format::Raw),
        found => Ok(found?.unwrap_or(Format::Raw)),
    }
}

fn warn_of_raw(name: &str) {
    eprintln!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         Automatically \
         detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions."
    );
}

/// The active image of a chain: each has one.
pub fn active(chain: &Chain) -> Result<&Layer> {
    chain
        .layers
        .first()
        .ok_or_else(|| anyhow!("a chain without an image"))
}

/// A header that may be the reason why an image cannot be opened.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// What the image is to be.
    pub format: Format,
    /// The part of the file that it is in, where that is not all of it.
    pub window: Option<Part>,
}

/// What QEMU says where a file cannot be opened, for writing or not, as far as it is the same thing. Where
/// it is open as an image, its `header` may be the reason.
pub fn explain(path: &str, error: &block::Error, header: Option<Header>, write: bool) -> Error {
    // Errors show the names of files, which may be no UTF-8.
    let text = match block::name::shown(path) {
        shown if shown == path => error.to_string(),
        shown => error.to_string().replace(&*shown, path),
    };
    let own = text.strip_prefix(&format!("{path}: ")).unwrap_or(&text);
    if let Some(below) = own.strip_prefix("backing file: ") {
        let directory = block::name::path(path);
        let directory = directory.parent().unwrap_or(Path::new(""));
        return anyhow!(
            "Could not open backing file: {}",
            reason(below, error, Some(directory), None, false)
        );
    }
    if own.ends_with("say --data-file PATH") {
        return anyhow!("'data-file' is required for this image");
    }
    if let Some(below) = own.strip_prefix("data file: ") {
        let directory = block::name::path(path);
        let directory = directory.parent().unwrap_or(Path::new(""));
        return anyhow!(
            "Could not open '{path}': {}",
            reason(below, error, Some(directory), None, write)
        );
    }
    anyhow!("{}", reason(&text, error, None, header, write))
}

/// The reason in `text`, which begins with the name of the file that it is about.
fn reason(
    text: &str,
    error: &block::Error,
    directory: Option<&Path>,
    header: Option<Header>,
    write: bool,
) -> String {
    // Another image of the chain has the same trouble one step further down.
    if let Some((above, below)) = text.split_once(": backing file: ") {
        let directory = block::name::path(above);
        let directory = directory.parent().unwrap_or(Path::new(""));
        let below = reason(below, error, Some(directory), None, false);
        return format!("Could not open backing file: {below}");
    }
    let (name, why) = match text
        .strip_prefix('\'')
        .and_then(|rest| rest.split_once("': "))
    {
        Some(found) => found,
        None => text.split_once(": ").unwrap_or(("", text)),
    };
    if let Ok(export) = nbd::Uri::parse(name) {
        return of_server(&export, error, why);
    }
    let name = match directory {
        Some(directory) => block::name::text(directory.join(block::name::path(name))),
        None => name.to_owned(),
    };
    match error.kind() {
        ErrorKind::NotFound if text.contains("there is no snapshot") => without_number(why),
        ErrorKind::NotFound => format!("Could not open '{name}': No such file or directory"),
        ErrorKind::Locked => {
            // Who reads wants that nobody else writes.
            let mode = match write {
                true => "\"write\"",
                false => "shared \"write\"",
            };
            format!("Failed to get {mode} lock\nIs another process using the image [{name}]?")
        }
        ErrorKind::Denied if why.contains("os error") => {
            format!("Could not open '{name}': {}", without_number(why))
        }
        _ if why == "is a directory, neither a file nor a block device" => {
            format!("'file' driver requires '{name}' to be a regular file")
        }
        ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Invalid => {
            // An image below is what it is probed for here.
            let path = block::name::path(&name);
            let below = || {
                let format = directory.and_then(|_| probe(&path, None).ok())?;
                let window = None;
                Some(Header { format, window })
            };
            let purpose = match write {
                true => Purpose::Write,
                false => Purpose::Read,
            };
            let refused = header.or_else(below).and_then(|header| {
                let mut file = File::open(&path, &looking()).ok()?;
                if let Some(part) = header.window {
                    file = File::window(file, part.offset, part.size).ok()?;
                }
                refused::by_header(&*file, header.format, purpose)
            });
            refused.unwrap_or_else(|| in_qemus_words(why))
        }
        _ => in_qemus_words(why),
    }
}

/// As [`reason`], of a disk of a server.
fn of_server(export: &nbd::Uri, error: &block::Error, why: &str) -> String {
    use nbd::uri::Server;
    if error.kind() == ErrorKind::ReadOnly {
        return "Could not open image: Permission denied".to_owned();
    }
    if why.contains("requested x-dirty-bitmap") {
        return "Could not open image: Invalid argument".to_owned();
    }
    let server = match &export.server {
        Server::Unix(path) => block::name::text(path),
        Server::Tcp(host, port) => format!("{host}:{port}"),
    };
    // The address stands between "connecting" and why that failed.
    match why
        .starts_with("connecting")
        .then(|| why.rsplit(": ").next())
    {
        Some(Some(why)) => format!("Failed to connect to '{server}': {}", without_number(why)),
        _ => in_qemus_words(why),
    }
}

/// Features by their names, and the bits of those that have none.
fn unsupported(features: &str) -> String {
    let (mut names, mut bits) = (Vec::new(), 0u64);
    for feature in features.split(", ") {
        let bit = feature.strip_prefix("unknown feature bit ");
        let named = feature
            .strip_prefix('\'')
            .and_then(|name| name.rsplit_once("' (bit "));
        match (bit.map(str::parse::<u32>), named) {
            (Some(Ok(bit)), _) => bits |= 1u64.checked_shl(bit).unwrap_or(0),
            (_, Some((name, _))) => names.push(name.to_owned()),
            _ => names.push(feature.to_owned()),
        }
    }
    if bits != 0 {
        names.push(format!("Unknown incompatible feature: {bits:x}"));
    }
    format!("Unsupported qcow2 feature(s): {}", names.join(", "))
}

/// What is wrong with an image, as QEMU says it where scripts look for that.
fn in_qemus_words(why: &str) -> String {
    let known = [
        ("not a qcow2 image", "Image is not in qcow2 format"),
        ("not a QED image", "Image not in QED format"),
        (
            "it is missing, but crypt_method is 2",
            "Missing CRYPTO header for crypt method 2",
        ),
        (
            "must be multiples of 512 bytes",
            "Specified size is not multiple of 512",
        ),
    ];
    // Those that QEMU only reads, too.
    let only_read = |name| why.contains(&format!("{name} images are for reading only"));
    if ["bochs", "cloop", "dmg"].into_iter().any(only_read) {
        return "Image is read-only".to_owned();
    }
    if let Some(features) = why.strip_prefix("needs a feature that diskplane lacks: ") {
        return unsupported(features);
    }
    if why.starts_with("wrong passphrase: ") {
        return "Invalid password, cannot unlock any keyslot".to_owned();
    }
    if let Some(rest) = why.strip_prefix("offset (")
        && let Some((offset, rest)) = rest.split_once(") must be below the file's size (")
    {
        return format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({rest}"
        );
    }
    if let Some((before, rest)) = why.split_once(" together go beyond the file's size (") {
        return format!(
            "The sum of {before} has to be smaller or equal to the  actual size of the containing file ({rest}"
        );
    }
    // Of a luks volume the option stands alone, else below the image's.
    let key = |prefix| format!("Parameter '{prefix}key-secret' is required for cipher");
    match known.iter().find(|(ours, _)| why.ends_with(ours)) {
        Some((_, words)) => (*words).to_owned(),
        None if !why.contains("give its passphrase") => without_number(why),
        None if why.starts_with("the luks image") => key(""),
        None => key("encrypt."),
    }
}

/// A message of the operating system without the number that Rust puts behind it.
pub fn without_number(text: &str) -> String {
    match text.rfind(" (os error ") {
        Some(at) if text.ends_with(')') => text.get(..at).unwrap_or(text).to_owned(),
        _ => text.to_owned(),
    }
}

/// Why it failed: what the operating system said, where that is the cause.
pub fn os_reason(error: &block::Error) -> String {
    reason_of(error.os_errno(), &error.to_string())
}

/// As [`os_reason`], of an error that said `text`.
pub fn reason_of(errno: Option<i32>, text: &str) -> String {
    match errno {
        Some(errno) => without_number(&std::io::Error::from_raw_os_error(errno).to_string()),
        None => text.to_owned(),
    }
}

/// Opens the file of an image alone, for what works on its tables; `force_share`: `-U` was said.
pub fn shared_file(
    name: &Name<'_>,
    access: Access,
    force_share: bool,
    objects: &Objects,
) -> Result<(Arc<File>, Format)> {
    let could_not = |why: Error| anyhow!("Could not open '{}': {why}", name.text);
    let mut named = Named::of(name, objects)?;
    named.force_share |= force_share;
    named.need_secrets().map_err(could_not)?;
    if access == Access::Write {
        named.refuse_writing().map_err(could_not)?;
    }
    let path = &block::name::text(&named.path);
    let failed =
        |error: &block::Error| could_not(explain(path, error, None, access == Access::Write));
    if named.part.or(named.window).is_some() {
        return Err(could_not(anyhow!(
            "a part of a file has no tables to work on"
        )));
    }
    let access = match (access, named.force_share) {
        (Access::Read, true) => Access::ReadUnlocked,
        (access, _) => access,
    };
    let file = || {
        let file =
            open::file_of(&named.path, access, &named.server).map_err(|error| {
                match error.downcast_ref() {
                    Some(known) => failed(known),
                    None => could_not(error),
                }
            })?;
        open::faulty(file, named.faults.as_ref()).map_err(|error| failed(&error))
    };
    let (file, format) = match named.format {
        Some(format) => (file()?, format),
        None if open::at_server(&named.path).is_some() => {
            let file = file()?;
            let format = probe_in(&file).map_err(|e| failed(&e))?;
            (file, format)
        }
        None => {
            let format = probe(&named.path, None).map_err(|e| failed(&e))?;
            (file()?, format)
        }
    };
    let is_guessed = named.format.is_none() && format == Format::Raw;
    if is_guessed && access == Access::Write {
        warn_of_raw(name.text);
    }
    Ok((file, format))
}

/// Refuses an encrypted image whose key is not given, as QEMU, which opens one with its key or not at all, also where only
/// tables are worked on. `file` is that of the image `name`; it is open already, and locked.
pub fn need_key(
    name: &Name<'_>,
    file: &dyn Storage,
    format: Format,
    objects: &Objects,
) -> Result<()> {
    let encrypted = match format {
        Format::Luks => true,
        // What is wrong with a header is said by others.
        Format::Qcow2 => image::qcow2::Header::read(file).is_ok_and(|h| h.crypt_method != 0),
        Format::Qcow => image::qcow::Header::read(file).is_ok_and(|h| h.encrypted),
        _ => false,
    };
    if encrypted {
        let how = How {
            force_share: true,
            without_backing: true,
            ..How::default()
        };
        chain(name, &how, objects)?;
    }
    Ok(())
}

/// As [`shared_file`], where there is no `-U`.
pub fn file(name: &Name<'_>, access: Access, objects: &Objects) -> Result<(Arc<File>, Format)> {
    shared_file(name, access, false, objects)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_named_as_qemu_names_them() {
        for (ours, theirs) in [
            (
                "unknown feature bit 63",
                "Unknown incompatible feature: 8000000000000000",
            ),
            (
                "'test1' (bit 61), unknown feature bit 62, 'two words' (bit 63)",
                "test1, two words, Unknown incompatible feature: 4000000000000000",
            ),
            ("'unknown' (bit 5)", "unknown"),
        ] {
            let why = format!("needs a feature that diskplane lacks: {ours}");
            assert_eq!(
                in_qemus_words(&why),
                format!("Unsupported qcow2 feature(s): {theirs}")
            );
        }
    }
}
