//! `qemu-img create`.

use super::create_options::{self, Said};
use super::line::{self, usage};
use super::open::{self, How, Name};
use crate::open::Access;
use crate::options::{self, Options};
use crate::secret::{Keys, Objects};
use crate::{create, print};
use anyhow::{Result, anyhow, bail};
use block::{Storage as _, limits};
use clap::Args;
use crypto::Passphrase;
use image::{Format, parallels};
use io::FileKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tool::work::Stop;

/// `create`.
#[derive(Args, Debug)]
pub struct Create {
    /// quiet operations
    #[arg(short, long)]
    quiet: bool,
    /// format of the new image, default is raw
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// format-specific options ('-o help' for a list)
    #[arg(short, long, value_name = "FMT_OPTS")]
    options: Vec<String>,
    /// stack new image on top of BACKING_FILENAME
    #[arg(short, long, value_name = "BACKING_FILENAME")]
    backing: Option<String>,
    /// format of BACKING_FILENAME
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// do not fail if BACKING_FILENAME can not be read
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    #[command(flatten)]
    pub(super) objects: Objects,
    /// FILENAME [SIZE]: it is written over where it exists
    #[arg(value_name = "FILENAME [SIZE]")]
    operands: Vec<String>,
}

/// Creates an image.
pub fn run(args: &Create) -> Result<u8> {
    let list = line::joined(&args.options)?;
    let mut operands = args.operands.iter();
    let file = operands.next();
    if line::wants_help(&list) {
        return help(&args.format, file.is_some());
    }
    let Some(file) = file else {
        return Err(usage("Expecting image file name"));
    };
    let size = operands.next();
    let size = size
        .map(|text| line::bytes("image size", text))
        .transpose()?;
    if let Some(more) = operands.next() {
        return Err(usage(format!("Unexpected argument: {more}")));
    }
    let new = New {
        file,
        format: &args.format,
        list: &list,
        backing: args.backing.as_deref(),
        backing_format: args.backing_format.as_deref(),
        size,
        without_backing: args.backing_unsafe,
        quiet: args.quiet,
    };
    let within = |error: anyhow::Error| anyhow!("{file}: {error}");
    let (said, format) = new.settle(&args.objects).map_err(within)?;
    match format {
        // Ours makes none: it could not write to them.
        Format::Parallels => empty_parallels(file, &said).map_err(within)?,
        _ => drop(make(file, format, &said, &args.objects).map_err(within)?),
    }
    Ok(0)
}

fn help(format: &str, with_file: bool) -> Result<u8> {
    create_options::of_new(format)?;
    print(&create_options::help(format, with_file))?;
    Ok(0)
}

/// An image that is to be made.
struct New<'a> {
    file: &'a str,
    format: &'a str,
    list: &'a str,
    backing: Option<&'a str>,
    backing_format: Option<&'a str>,
    size: Option<u64>,
    without_backing: bool,
    quiet: bool,
}

impl New<'_> {
    /// Decides what the image is to be, and says so.
    fn settle(&self, objects: &Objects) -> Result<(Said, Format)> {
        let format = create_options::of_new(self.format)?;
        open::check_protocol(self.file)?;
        let mut said = Said::parse(self.format, self.list)?;
        match (said.size(), self.size) {
            (Some(_), Some(_)) => bail!("The image size must be specified only once"),
            (None, Some(size)) => said.set("size", &size.to_string())?,
            _ => {}
        }
        if let Some(name) = self.backing {
            if !said.has("backing_file") {
                bail!(
                    "Backing file not supported for file format '{}'",
                    self.format
                );
            }
            said.set("backing_file", name)?;
        }
        if let Some(name) = self.backing_format {
            if !said.has("backing_fmt") {
                bail!(
                    "Backing file format not supported for file format '{}'",
                    self.format
                );
            }
            said.set("backing_fmt", name)?;
        }
        if let Some(backing) = said.get("backing_file").map(str::to_owned) {
            self.look_below(&mut said, &backing, objects)?;
        }
        let Some(size) = said.size() else {
            bail!("Image creation needs a size parameter");
        };
        if !self.quiet {
            print(&format!(
                "Formatting '{}', fmt={}{}\n",
                self.file,
                self.format,
                said.line()
            ))?;
        }
        if size > limits::DISK_BYTES_MAX {
            bail!(
                "The image size is too large for file format '{}'",
                self.format
            );
        }
        Ok((said, format))
    }

    /// Opens what the image is to lie on, unless that was forbidden.
    fn look_below(&self, said: &mut Said, backing: &str, objects: &Objects) -> Result<()> {
        if backing == self.file {
            bail!("Error: Trying to create an image with the same filename as the backing file");
        }
        if backing.is_empty() {
            bail!("Expected backing file name, got empty string");
        }
        let format = said.get("backing_fmt").map(str::to_owned);
        if self.without_backing {
            return match format {
                Some(_) => Ok(()),
                None => bail!("Backing file specified without backing format"),
            };
        }
        let path = below(&path(self.file), backing);
        let name = Name {
            text: &path,
            format: format.as_deref(),
            image_opts: false,
        };
        let how = How {
            force_share: true,
            allow_locked: true,
            ..How::default()
        };
        let chain = open::chain(&name, &how, objects).map_err(|error| {
            anyhow!(
                "{}\nCould not open backing image.",
                once(&path, &error.to_string())
            )
        })?;
        let layer = open::active(&chain)?;
        if format.is_none() {
            bail!(
                "Backing file specified without backing format\nDetected format of {}.",
                layer.format.qemu_name()
            );
        }
        if said.size().is_none() {
            said.set("size", &layer.image.size().to_string())?;
        }
        Ok(())
    }
}

/// Why the image `name` cannot be opened, of `Could not open 'name': why`.
pub fn once<'a>(name: &str, text: &'a str) -> &'a str {
    text.strip_prefix(&format!("Could not open '{name}': "))
        .unwrap_or(text)
}

/// The path that a name means.
pub fn path(name: &str) -> PathBuf {
    let own = name.strip_prefix("file:");
    block::name::path(own.or(name.strip_prefix("host_device:")).unwrap_or(name))
}

/// Where the backing file `name` of the image `file` is.
pub fn below(file: &Path, name: &str) -> String {
    if !disk::chain::is_file_name(name) {
        return name.to_owned();
    }
    let directory = file.parent().unwrap_or(Path::new(""));
    block::name::text(directory.join(block::name::path(name)))
}

/// Makes the image at `file`, in place of what is there. Returns how.
pub fn make(file: &str, format: Format, said: &Said, objects: &Objects) -> Result<Options> {
    let options = options_of(format, said, objects, file)?;
    write(file, format, &options)?;
    Ok(options)
}

/// Makes an image for others to write.
fn empty_parallels(file: &str, said: &Said) -> Result<()> {
    said.check_choices()?;
    // QEMU rounds both up.
    let sectors = |bytes| block::align_up(bytes, 512);
    let mut options = parallels::CreateOptions {
        size: sectors(said.size().unwrap_or(0)),
        ..parallels::CreateOptions::default()
    };
    if let Some(text) = said.get("cluster_size") {
        options.cluster_bytes = sectors(block::size::parse(text)?);
    }
    let checked = options.check().map_err(Into::into);
    checked
        .and_then(|()| create::emptied(&path(file), io::Cache::default()))
        .and_then(|storage| Ok(parallels::create(&*storage, &options)?))
        .map_err(|error| could_not_create(file, &error))
}

/// Makes the image that `options` describe.
pub fn write(file: &str, format: Format, options: &Options) -> Result<()> {
    create::write_all(&path(file), format, options, &Stop::default())
        .and_then(|()| match format {
            Format::Raw => give_first_block(&path(file)),
            _ => Ok(()),
        })
        .map_err(|error| could_not_create(file, &error))
}

/// As QEMU does, gives the beginning of a new raw file its space: who opens it past the page cache finds out there what
/// the host wants. Maps show it.
fn give_first_block(path: &Path) -> Result<()> {
    let file = crate::open::file(path, Access::Write)?;
    let bytes = match file.len()? {
        _ if file.kind() != FileKind::Regular => 0,
        0..512 => 0,
        512..4096 => 512,
        _ => 4096,
    };
    if bytes > 0 {
        file.write_at(0, &vec![0; bytes])?;
    }
    Ok(())
}

fn could_not_create(file: &str, error: &anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    let own = text.strip_prefix(&format!("{file}: ")).unwrap_or(&text);
    if path(file).is_dir() {
        return anyhow!("Could not create '{file}': Is a directory");
    }
    match error.downcast_ref::<block::Error>() {
        Some(error) if own.contains("os error") || error.kind() == block::ErrorKind::Locked => {
            let why = open::explain(file, error, None, true).to_string();
            let why = why.strip_prefix(&format!("Could not open '{file}': "));
            match (error.kind(), why) {
                (_, Some(why)) => anyhow!("Could not create '{file}': {why}"),
                (block::ErrorKind::Locked, None) => {
                    anyhow!("{}", open::explain(file, error, None, true))
                }
                _ => anyhow!("Could not create '{file}': {}", open::without_number(own)),
            }
        }
        _ => anyhow!("{own}"),
    }
}

/// What diskplane's own code makes of the options.
pub fn options_of(format: Format, said: &Said, objects: &Objects, file: &str) -> Result<Options> {
    said.check_choices()?;
    if format == Format::Vdi && said.get("preallocation") == Some("metadata") {
        bail!("Unsupported preallocation mode: metadata");
    }
    check_backing_format(format, said)?;
    let mut options = options::parse(format, &said.own())?;
    options.overwrite = true;
    options.extended_l2.get_or_insert(false);
    let size = said.size().unwrap_or(0);
    if let Some(name) = said.get("backing_file") {
        let below = said
            .get("backing_fmt")
            .map(str::parse::<Format>)
            .transpose()?;
        options.set_backing(format, &path(file), name, below.unwrap_or(Format::Raw))?;
    }
    options.qcow2.size = size;
    if format == Format::Vmdk {
        options.vmdk.name = crate::create::file_name(&path(file))?;
    }
    if format == Format::Qcow2 {
        options.choose();
    }
    options
        .settle(format, size)
        .map_err(|error| own_words(format, error))?;
    name_key(format, said, objects)?;
    options.seal(format, &keys(objects))?;
    Ok(options)
}

/// Refuses a backing format that the image cannot have.
fn check_backing_format(format: Format, said: &Said) -> Result<()> {
    let Some(name) = said.get("backing_fmt") else {
        return Ok(());
    };
    match format {
        Format::Vmdk if name != "vmdk" => bail!("backing_file must be a vmdk image"),
        Format::Vmdk => Ok(()),
        _ if open::format_named(name).is_none() => {
            bail!("Parameter 'backing-fmt' does not accept value '{name}'")
        }
        Format::Qcow2 if said.get("backing_file").is_none() => {
            bail!("Backing format cannot be used without backing file")
        }
        _ => Ok(()),
    }
}

/// Refuses an encrypted image whose passphrase is not given, before anything is touched.
pub fn name_key(format: Format, said: &Said, objects: &Objects) -> Result<()> {
    let name = match format {
        Format::Luks => "key-secret",
        Format::Qcow2 if said.get("encrypt.format") == Some("luks") => "encrypt.key-secret",
        _ => return Ok(()),
    };
    match said.get(name) {
        None => bail!("Parameter '{name}' is required for cipher"),
        Some(id) if !objects.has(id)? => bail!("No secret with id '{id}'"),
        Some(_) => Ok(()),
    }
}

/// Passphrases are named by `--object` alone here.
fn keys(objects: &Objects) -> Keys {
    Keys {
        objects: objects.clone(),
        ..Keys::default()
    }
}

/// What opens an image that was made with these options.
pub fn passphrases(options: &Options, objects: &Objects) -> Result<Vec<Arc<Passphrase>>> {
    let found = options.encrypt.passphrase(&keys(objects))?;
    Ok(found.into_iter().collect())
}

/// What is wrong with the options of an image, as QEMU says it.
pub fn own_words(format: Format, error: anyhow::Error) -> anyhow::Error {
    let text = error.to_string();
    if text.starts_with("a disk of") && text.contains("is too large") {
        let hint = match format {
            Format::Qcow2 => " (try using a larger cluster size)",
            _ => "",
        };
        return anyhow!(
            "The image size is too large for file format '{}'{hint}",
            format.qemu_name()
        );
    }
    if format == Format::Qed {
        if text.starts_with("cluster_size is") {
            return anyhow!(
                "QED cluster size must be within range [4096, 67108864] and power of 2"
            );
        }
        if text.starts_with("table_size is") {
            return anyhow!("QED table size must be within range [1, 16] and power of 2");
        }
    }
    if format == Format::Qcow && text.contains("1 sector at least") {
        return anyhow!("Image size is too small, cannot be zero length");
    }
    if format == Format::Vhdx && text.starts_with("blocks of ") {
        return anyhow!("Block size must be a power of two");
    }
    let known = [
        (
            "cluster_size is",
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            "refcount_bits is",
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            "refcount_bits other",
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or \
             greater)",
        ),
        (
            "lazy_refcounts=on needs",
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            "compression_type=zstd needs",
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or \
             greater)",
        ),
        (
            "extended_l2=on needs compat",
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or \
             greater)",
        ),
        (
            "extended_l2=on needs a cluster",
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        ("data_file_raw=on needs", "data-file-raw requires data-file"),
        (
            "data_file needs",
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or \
             greater)",
        ),
    ];
    match known.iter().find(|(name, _)| text.starts_with(name)) {
        Some((_, words)) => anyhow!("{words}"),
        None => error,
    }
}
