//! `-o key=value,…`: the options of a new image.

use crate::amend::Changes;
use crate::encrypt;
use crate::secret::Keys;
use anyhow::{Result, anyhow, bail};
use block::{Storage, size};
use crypto::{Passphrase, luks::Volume};
use image::{
    Format, Sequential, qcow,
    qcow2::{self, Compression, CreateOptions},
    qed,
    vdi::{self, ImageType},
    vhd::{self, DiskType},
    vhdx,
    vmdk::{self, AdapterType, Subformat},
};
use std::path::Path;
use tool::prealloc::Preallocation;

/// Options of each format, with what they may be.
const QCOW2: [(&str, &str); 11] = [
    ("backing_file", "name of the backing file (as -b)"),
    ("backing_fmt", "its format (as -F)"),
    ("cluster_size", "512 to 2M, a power of two [64K]"),
    (
        "compat",
        "0.10 (version 2) or 1.1 (version 3, also v3) [1.1]",
    ),
    ("compression_type", "zlib or zstd [zlib]"),
    (
        "data_file",
        "new file for the guest's data, relative to the image's directory (QEMU opens relative names from its\n\
         \x20                   working directory: an absolute name suits both)",
    ),
    (
        "data_file_raw",
        "on or off: that file is a raw image of the disk at any time [off]",
    ),
    (
        "extended_l2",
        "on or off: 32 subclusters to a cluster of 16K or more, for cheap small writes;\n\
         \x20                   QEMU knows it from 5.2 on [on with a backing file where it is possible, else off]",
    ),
    ("lazy_refcounts", "on or off [off]"),
    (
        "preallocation",
        "off, metadata, falloc or full; with a backing file only beside extended_l2=on [off]",
    ),
    ("refcount_bits", "1 to 64, a power of two [16]"),
];
const QCOW: [(&str, &str); 2] = [
    ("backing_file", "name of the backing file (as -b)"),
    (
        "backing_fmt",
        "its format (as -F), which the image does not record: it is known by its magic, or raw",
    ),
];
const QED: [(&str, &str); 4] = [
    ("backing_file", "name of the backing file (as -b)"),
    (
        "backing_fmt",
        "its format (as -F); only that it is raw is recorded, others are known by their magic",
    ),
    ("cluster_size", "4K to 64M, a power of two [64K]"),
    (
        "table_size",
        "1 to 16 clusters of an L1 or L2 table, a power of two; QEMU opens no image with 1, and none whose\n\
         \x20                        tables could hold 2^64 bytes [4]",
    ),
];
const VHD: [(&str, &str); 4] = [
    (
        "block_size",
        "4K to 2M, a power of two: bytes that are allocated at once [2M]",
    ),
    (
        "force_size",
        "on or off: exactly SIZE, rather than the next that cylinders, heads and sectors make [off]",
    ),
    (
        "preallocation",
        "off, or with subformat=fixed falloc or full [off]",
    ),
    (
        "subformat",
        "dynamic, or fixed, not on a block device [dynamic]",
    ),
];
const VHDX: [(&str, &str); 5] = [
    (
        "block_size",
        "1M to 256M, a power of two: bytes that are allocated at once; 0 to choose by the size [0]",
    ),
    (
        "block_state_zero",
        "on or off: blocks that are not there are marked as zeros; off, they only read so [on]",
    ),
    (
        "log_size",
        "1M to less than 4G: bytes of the log of changes to the block table [1M]",
    ),
    (
        "preallocation",
        "off, or with subformat=fixed falloc or full [off]",
    ),
    ("subformat", "dynamic or fixed [dynamic]"),
];
const VDI: [(&str, &str); 2] = [
    (
        "preallocation",
        "off; or metadata (as static=on), falloc or full, which make a static image [off]",
    ),
    (
        "static",
        "on or off: all blocks are there from the beginning, not on a block device [off]",
    ),
];
const LUKS: [(&str, &str); 2] = [
    (
        "detached-header",
        "off: the header is in the same file as the data",
    ),
    ("preallocation", "off, falloc or full [off]"),
];
const VMDK: [(&str, &str); 8] = [
    (
        "adapter_type",
        "ide, lsilogic, buslogic or legacyESX: the disk's controller in the machine [ide]",
    ),
    (
        "backing_file",
        "name of the backing file (as -b), which must be vmdk",
    ),
    ("backing_fmt", "its format (as -F): vmdk"),
    ("compat6", "on or off: hardware version 6 [off]"),
    (
        "hwversion",
        "hardware version that the descriptor has, not beside compat6 [4]",
    ),
    (
        "subformat",
        "monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, or streamOptimized\n\
         \x20                        (compressed; convert writes it, once) [monolithicSparse]",
    ),
    (
        "toolsversion",
        "version of VMware's tools that the descriptor has [2147483647]",
    ),
    (
        "zeroed_grain",
        "on or off: zeros need no space over a backing file (version 2) [off]",
    ),
];
const RAW: [(&str, &str); 1] = [("preallocation", "off, falloc or full [off]")];

/// Options of qemu-img that no code here implements yet: refused by name.
const LATER: [&str; 1] = ["extent_size_hint"];

/// What `-o` said, over the format's defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// For qcow2; the size and the backing file are filled in later.
    pub qcow2: CreateOptions,
    /// For qcow, as well.
    pub qcow: qcow::CreateOptions,
    /// For QED, as well.
    pub qed: qed::CreateOptions,
    /// For vhd; the size is filled in later.
    pub vhd: vhd::CreateOptions,
    /// For vhdx, as well.
    pub vhdx: vhdx::CreateOptions,
    /// For vdi, as well.
    pub vdi: vdi::CreateOptions,
    /// The header of a luks image.
    pub luks: Option<Volume>,
    /// For vmdk; the size, the names and the backing file are filled in later.
    pub vmdk: vmdk::CreateOptions,
    /// `backing_file`.
    pub backing_file: Option<String>,
    /// `backing_fmt`.
    pub backing_format: Option<Format>,
    /// `static`, where it was said.
    pub static_said: Option<bool>,
    /// `extended_l2`; where it was not said, [`Options::choose`] decides.
    pub extended_l2: Option<bool>,
    /// `encrypt.…`.
    pub encrypt: encrypt::Options,
    /// What the new disk gets at once.
    pub preallocation: Preallocation,
    /// Write over a file that is there already.
    pub overwrite: bool,
}

impl Options {
    /// Whether all clusters of such an image are compressed.
    pub fn packs_always(&self, format: Format) -> bool {
        format == Format::Vmdk && self.vmdk.subformat.is_compressed()
    }

    /// A new image in `file` that takes compressed clusters, in order.
    ///
    /// # Errors
    ///
    /// For what such an image cannot have; what the host refused.
    pub fn sequential<'a>(
        &self,
        format: Format,
        file: &'a dyn Storage,
    ) -> block::Result<Box<dyn Sequential + 'a>> {
        Ok(match format {
            Format::Vmdk => Box::new(vmdk::StreamWriter::new(file, &self.vmdk)?),
            Format::Qcow => Box::new(qcow::ImageWriter::new(file, &self.qcow)?),
            _ => Box::new(qcow2::ImageWriter::new(file, &self.qcow2)?),
        })
    }

    /// Lays the image `file`, of `format`, over its backing file `name`, of the format `below`.
    ///
    /// # Errors
    ///
    /// For a parent that a vhd or vmdk image cannot lie over.
    pub fn set_backing(
        &mut self,
        format: Format,
        file: &Path,
        name: &str,
        below: Format,
    ) -> Result<()> {
        self.qcow2.backing = Some((name.to_owned(), below.qemu_name().to_owned()));
        self.qcow.backing = Some(name.to_owned());
        self.qed.backing = Some((name.to_owned(), below == Format::Raw));
        if format == Format::Vhd {
            self.set_vhd_parent(crate::create::vhd_parent(file, name, below)?)?;
        }
        if format == Format::Vhdx {
            self.set_vhdx_parent(file, name, below)?;
        }
        if format == Format::Vmdk {
            self.vmdk.parent = Some(crate::create::vmdk_parent(file, name, below)?);
        }
        Ok(())
    }

    /// Makes a vhd image a differencing one.
    ///
    /// # Errors
    ///
    /// For one that was to be fixed.
    fn set_vhd_parent(&mut self, parent: vhd::NewParent) -> Result<()> {
        if self.vhd.disk_type == DiskType::Fixed {
            bail!("-o subformat=fixed: a fixed image has all of its disk, and no backing file");
        }
        self.vhd.disk_type = DiskType::Differencing;
        self.vhd.parent = Some(parent);
        Ok(())
    }

    /// Makes a vhdx image at `file` a differencing one over the parent `name`, with its sectors.
    ///
    /// # Errors
    ///
    /// For one that was to be fixed, for a parent of another format, and for a name that the format cannot hold.
    fn set_vhdx_parent(&mut self, file: &Path, name: &str, below: Format) -> Result<()> {
        if self.vhdx.fixed {
            bail!("-o subformat=fixed: a fixed image has all of its disk, and no backing file");
        }
        let (locator, parent) = crate::create::vhdx_parent(file, name, below)?;
        self.vhdx.parent = Some(locator);
        self.vhdx.logical_sector = parent.metadata.logical_sector;
        self.vhdx.physical_sector = parent.metadata.physical_sector;
        Ok(())
    }

    /// Whether an image of `format` and `bytes` can be made so. Returns the bytes that its disk will have.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn settle(&mut self, format: Format, bytes: u64) -> Result<u64> {
        self.qcow2.size = bytes;
        self.qcow.size = bytes;
        self.qed.size = bytes;
        self.vhd.size = bytes;
        self.vhdx.size = bytes;
        self.vmdk.size = bytes;
        match format {
            Format::Qcow2 => self.qcow2.validate()?,
            Format::Qcow => self.qcow.validate()?,
            Format::Qed => self.qed.validate()?,
            Format::Vhd => {
                self.vhd.validate()?;
                self.only_fixed(format, self.vhd.disk_type == DiskType::Fixed)?;
                return Ok(self.vhd.disk_bytes()?);
            }
            Format::Vhdx => {
                self.vhdx.validate()?;
                self.only_fixed(format, self.vhdx.fixed)?;
                return Ok(self.vhdx.disk_bytes());
            }
            Format::Vdi => {
                self.vdi.size = bytes;
                if self.preallocation != Preallocation::Off {
                    if self.static_said == Some(false) {
                        bail!("-o preallocation and static=off exclude each other");
                    }
                    self.vdi.image_type = ImageType::Static;
                }
                self.vdi.validate()?;
            }
            Format::Luks => drop(image::luks::file_bytes(self.encrypt.len()?, bytes)?),
            Format::Parallels | Format::Bochs | Format::Cloop | Format::Dmg => {
                bail!("{format} images are for reading only: no new ones are made")
            }
            Format::Vmdk => self.vmdk.validate()?,
            Format::Raw | Format::Null => {}
        }
        Ok(block::align_up(bytes, 512))
    }

    /// Refuses preallocation of what is not fixed.
    fn only_fixed(&self, format: Format, fixed: bool) -> Result<()> {
        if self.preallocation != Preallocation::Off && !fixed {
            bail!(
                "-o preallocation: of {format} images only fixed ones have it: -o subformat=fixed"
            );
        }
        Ok(())
    }

    /// Makes the header of an image of `format` that is to be encrypted. Computes for some seconds.
    ///
    /// # Errors
    ///
    /// Without a passphrase.
    pub fn seal(&mut self, format: Format, keys: &Keys) -> Result<()> {
        if !matches!(format, Format::Qcow2 | Format::Luks) {
            return Ok(());
        }
        if let Some(passphrase) = self.encrypt.passphrase(keys)? {
            self.seal_with(format, &passphrase)?;
        }
        if format == Format::Qcow2 {
            self.qcow2.validate()?;
        }
        Ok(())
    }

    /// As [`Options::seal`], with that passphrase.
    pub fn seal_with(&mut self, format: Format, passphrase: &Passphrase) -> Result<()> {
        let volume = Some(self.encrypt.volume(passphrase)?);
        match format {
            Format::Luks => self.luks = volume,
            _ => self.qcow2.encryption = volume,
        }
        Ok(())
    }

    /// Decides what was left open of a qcow2 image whose backing file is known. Returns whether it
    /// chose subclusters: with them a small write to an overlay needs no copy of a cluster of the base.
    pub fn choose(&mut self) -> bool {
        let options = &mut self.qcow2;
        let possible = options.backing.is_some()
            && options.version >= 3
            && options.cluster_size >= 1 << qcow2::EXTENDED_CLUSTER_BITS_MIN;
        options.extended_l2 = self.extended_l2.unwrap_or(possible);
        possible && self.extended_l2.is_none()
    }
}

/// What `amend` can change.
const AMEND: [(&str, &str); 13] = [
    (
        "backing_file",
        "only what it is: diskplane rebase changes it",
    ),
    (
        "backing_fmt",
        "only what it is: diskplane rebase changes it",
    ),
    (
        "compat",
        "0.10 (version 2, also v2) or 1.1 (version 3, also v3)",
    ),
    (
        "data_file",
        "name of the external data file, of an image that has one",
    ),
    ("data_file_raw", "off; on is for create only"),
    (
        "encrypt.iter-time",
        "milliseconds that unlocking the new slot is to take on this machine [2000]",
    ),
    (
        "encrypt.keyslot",
        "0 to 7: key slot to fill or to erase [a free one]",
    ),
    (
        "encrypt.new-secret",
        "ID of the --object secret with the passphrase to add",
    ),
    (
        "encrypt.old-secret",
        "ID of the --object secret with the passphrase to erase",
    ),
    (
        "encrypt.state",
        "active: add a passphrase; inactive: erase one",
    ),
    ("lazy_refcounts", "on or off; on needs compat=1.1"),
    (
        "refcount_bits",
        "1 to 64, a power of two; other than 16 needs compat=1.1",
    ),
    (
        "size",
        "of the disk: 20G, 512M, …; diskplane resize can do more",
    ),
];

/// The options of `amend` for people: what `-o help` prints.
pub fn amend_help() -> String {
    let mut text = "Options that can be amended in qcow2 (in luks those of encrypt, also without that word):\n".to_owned();
    for (name, meaning) in AMEND {
        text.push_str(&format!("  {name:<18} {meaning}\n"));
    }
    text
}

/// Parses all `-o` arguments of `amend`.
pub fn parse_amend(arguments: &[String]) -> Result<Changes> {
    let mut changes = Changes::default();
    for (key, value) in pairs(arguments)? {
        // As the options of a luks image are called.
        let prefixed = format!("encrypt.{key}");
        let bare = AMEND.iter().any(|(name, _)| *name == prefixed);
        let key = if bare { prefixed } else { key };
        changes.bare |= bare;
        let Some((_, meaning)) = AMEND.iter().find(|(name, _)| *name == key) else {
            if table(Format::Qcow2).any(|(name, _)| name == key) || LATER.contains(&key.as_str()) {
                bail!(
                    "-o {key}: an image keeps what it was created with; -o help lists what can be amended"
                );
            }
            let names: Vec<&str> = AMEND.iter().map(|(name, _)| *name).collect();
            bail!(
                "-o {key}: there is no such option to amend; there are {}",
                names.join(", ")
            );
        };
        let wrong = || must_be(&key, &value, meaning);
        let image = &mut changes.image;
        match key.as_str() {
            "backing_file" => image.backing = Some(value),
            "backing_fmt" => image.backing_format = Some(value),
            "compat" => image.version = Some(version(&value).ok_or_else(wrong)?),
            "data_file" => image.data_file = Some(value),
            "data_file_raw" => image.data_file_raw = Some(switch(&value).ok_or_else(wrong)?),
            "lazy_refcounts" => image.lazy_refcounts = Some(switch(&value).ok_or_else(wrong)?),
            "refcount_bits" => image.refcount_bits = Some(value.parse().map_err(|_| wrong())?),
            "size" => {
                let bytes = size::parse(&value).map_err(|_| wrong())?;
                changes.size = Some(block::align_up(bytes, 512));
            }
            _ => changes.encrypt.push((key, value)),
        }
    }
    Ok(changes)
}

/// The version that a value of `compat` means.
fn version(value: &str) -> Option<u32> {
    match value {
        "0.10" | "v2" => Some(2),
        "1.1" | "v3" => Some(3),
        _ => None,
    }
}

/// The options of `format`. Those of the encryption of a qcow2 image begin with `encrypt.`, those of a luks image do not.
fn table(format: Format) -> impl Iterator<Item = (&'static str, &'static str)> {
    let (own, encryption): (&[_], &[_]) = match format {
        Format::Qcow2 => (&QCOW2, &encrypt::OPTIONS),
        Format::Qcow => (&QCOW, &[]),
        Format::Qed => (&QED, &[]),
        Format::Vhd => (&VHD, &[]),
        Format::Vhdx => (&VHDX, &[]),
        Format::Vdi => (&VDI, &[]),
        Format::Luks => (&LUKS, &encrypt::OPTIONS),
        Format::Parallels | Format::Bochs | Format::Cloop | Format::Dmg => (&[], &[]),
        Format::Vmdk => (&VMDK, &[]),
        Format::Raw | Format::Null => (&RAW, &[]),
    };
    let bare = format == Format::Luks;
    let encryption = encryption
        .iter()
        .filter_map(move |(name, meaning)| match bare {
            false => Some((*name, *meaning)),
            true if *name == "encrypt.format" => None,
            true => Some((name.strip_prefix("encrypt.")?, *meaning)),
        });
    own.iter().copied().chain(encryption)
}

/// The options of `format` for people: what `-o help` prints.
pub fn help(format: Format) -> String {
    let mut text = format!("Options of {format}:\n");
    for (name, meaning) in table(format) {
        text.push_str(&format!("  {name:<22} {meaning}\n"));
    }
    text
}

/// Whether `-o` asks what there is.
pub fn wants_help(arguments: &[String]) -> bool {
    arguments.iter().any(|o| o == "help" || o == "?")
}

/// Parses all `-o` arguments for an image of `format`. A comma within a value is written twice, as in QEMU.
pub fn parse(format: Format, arguments: &[String]) -> Result<Options> {
    let mut options = Options::default();
    if format == Format::Luks {
        options.encrypt.want();
    }
    for (key, value) in pairs(arguments)? {
        set(&mut options, format, &key, &value)?;
    }
    Ok(options)
}

/// The keys and values of all `-o` arguments, in order.
fn pairs(arguments: &[String]) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for pair in arguments.iter().flat_map(|argument| split(argument)) {
        let Some((key, value)) = pair.split_once('=') else {
            bail!("-o {pair}: give it as key=value");
        };
        found.push((key.to_owned(), value.to_owned()));
    }
    Ok(found)
}

/// The pieces between single commas; a doubled one stands for itself.
pub fn split(argument: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut chars = argument.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            pieces.push(String::new());
        } else if let Some(piece) = pieces.last_mut() {
            piece.push(c);
        }
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

fn set(options: &mut Options, format: Format, key: &str, value: &str) -> Result<()> {
    if !table(format).any(|(name, _)| name == key) {
        if key == "encryption" {
            bail!("-o encryption: QEMU's first encryption is not safe: say encrypt.format=luks");
        }
        if LATER.contains(&key) {
            bail!("-o {key}: not supported yet");
        }
        let names: Vec<&str> = table(format).map(|(name, _)| name).collect();
        bail!(
            "-o {key}: {format} has no such option; it has {}",
            names.join(", ")
        );
    }
    if key.starts_with("encrypt.") {
        return options.encrypt.set(key, value);
    }
    let bare = format!("encrypt.{key}");
    if format == Format::Luks && encrypt::OPTIONS.iter().any(|(name, _)| *name == bare) {
        return options.encrypt.set(&bare, value);
    }
    let wrong = || {
        let meaning = table(format)
            .find(|(name, _)| *name == key)
            .map_or("something else", |(_, meaning)| meaning);
        must_be(key, value, meaning)
    };
    match key {
        "adapter_type" => {
            options.vmdk.adapter = AdapterType::of_name(value).ok_or_else(wrong)?;
        }
        "compat6" => options.vmdk.compat6 = switch(value).ok_or_else(wrong)?,
        // As QEMU has it.
        "hwversion" => options.vmdk.hw_version = (value != "undefined").then(|| value.to_owned()),
        "toolsversion" => options.vmdk.tools_version = Some(value.to_owned()),
        "zeroed_grain" => options.vmdk.zeroed_grain = switch(value).ok_or_else(wrong)?,
        "subformat" if format == Format::Vmdk => {
            options.vmdk.subformat = Subformat::of_name(value).ok_or_else(wrong)?;
        }
        "backing_file" => options.backing_file = Some(value.to_owned()),
        "backing_fmt" => options.backing_format = Some(value.parse()?),
        "block_size" if format == Format::Vhdx => {
            // As QEMU does: up to whole MiB, and down to the largest.
            let bytes = size::parse(value)
                .map_err(|_| wrong())?
                .min(vhdx::BLOCK_BYTES.end - 1);
            options.vhdx.block_bytes = (bytes > 0).then(|| block::align_up(bytes, vhdx::LOG_BYTES));
        }
        "block_state_zero" => options.vhdx.zero_blocks = switch(value).ok_or_else(wrong)?,
        "log_size" => {
            let bytes = size::parse(value).map_err(|_| wrong())?;
            let bytes = bytes.clamp(1, vhdx::LOG_BYTES_MAX + 1);
            options.vhdx.log_bytes = block::align_up(bytes, vhdx::LOG_BYTES);
        }
        "block_size" => {
            let bytes = size::parse(value).ok().and_then(|b| u32::try_from(b).ok());
            options.vhd.block_bytes = bytes.ok_or_else(wrong)?;
        }
        "cluster_size" if format == Format::Qed => {
            options.qed.cluster_size = size::parse(value).map_err(|_| wrong())?;
        }
        "table_size" => options.qed.table_size = size::parse(value).map_err(|_| wrong())?,
        "cluster_size" => options.qcow2.cluster_size = size::parse(value).map_err(|_| wrong())?,
        "compat" => {
            options.qcow2.version = version(value).ok_or_else(wrong)?;
        }
        "compression_type" => {
            options.qcow2.compression = match value {
                "zlib" => Compression::Zlib,
                "zstd" => Compression::Zstd,
                _ => return Err(wrong()),
            };
        }
        "data_file" => options.qcow2.data_file = Some(value.to_owned()),
        "data_file_raw" => options.qcow2.data_file_raw = switch(value).ok_or_else(wrong)?,
        "extended_l2" => options.extended_l2 = Some(switch(value).ok_or_else(wrong)?),
        "force_size" => options.vhd.force_size = switch(value).ok_or_else(wrong)?,
        "lazy_refcounts" => {
            options.qcow2.lazy_refcounts = switch(value).ok_or_else(wrong)?;
        }
        "preallocation" => {
            options.preallocation = value.parse().map_err(|_| wrong())?;
            let has_metadata = matches!(format, Format::Qcow2 | Format::Vdi);
            if !has_metadata && options.preallocation == Preallocation::Metadata {
                return Err(wrong());
            }
            options.qcow2.preallocated = options.preallocation != Preallocation::Off;
        }
        "subformat" if format == Format::Vhdx => {
            options.vhdx.fixed = match value {
                "dynamic" => false,
                "fixed" => true,
                _ => return Err(wrong()),
            };
        }
        "detached-header" => match switch(value).ok_or_else(wrong)? {
            false => {}
            true => bail!(
                "-o detached-header=on: the data would be in another file than the header, and no image is opened so"
            ),
        },
        "static" => {
            let all = switch(value).ok_or_else(wrong)?;
            options.static_said = Some(all);
            options.vdi.image_type = match all {
                true => ImageType::Static,
                false => ImageType::Dynamic,
            };
        }
        "subformat" => {
            options.vhd.disk_type = match value {
                "dynamic" => DiskType::Dynamic,
                "fixed" => DiskType::Fixed,
                _ => return Err(wrong()),
            };
        }
        _ => options.qcow2.refcount_bits = value.parse().map_err(|_| wrong())?,
    }
    Ok(())
}

/// What `on` and `off` and their other names mean.
fn switch(value: &str) -> Option<bool> {
    match value {
        "on" | "yes" | "true" => Some(true),
        "off" | "no" | "false" => Some(false),
        _ => None,
    }
}

/// What is wrong with an option's value. Of its meaning the first line: the rest is for who reads the list.
fn must_be(key: &str, value: &str, meaning: &str) -> anyhow::Error {
    let meaning = meaning.lines().next().unwrap_or_default();
    anyhow!("-o {key}={value}: it must be {meaning}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2(text: &str) -> Result<Options> {
        parse(Format::Qcow2, &[text.to_owned()])
    }

    #[test]
    fn sets_what_it_says() {
        let options = qcow2("cluster_size=4K,compat=0.10,backing_file=a,,b.raw,backing_fmt=raw");
        let options = options.unwrap();
        assert_eq!(options.qcow2.cluster_size, 4096);
        assert_eq!(options.qcow2.version, 2);
        assert_eq!(options.backing_file.as_deref(), Some("a,b.raw"));
        assert_eq!(options.backing_format, Some(Format::Raw));
        let options = qcow2("refcount_bits=1,lazy_refcounts=on,compression_type=zstd").unwrap();
        assert_eq!(options.qcow2.refcount_bits, 1);
        assert!(options.qcow2.lazy_refcounts);
        assert_eq!(options.qcow2.compression, Compression::Zstd);
    }

    #[test]
    fn overlays_get_subclusters_unless_told_otherwise() {
        for (text, backing, extended, chosen) in [
            ("", true, true, true),
            ("", false, false, false),
            ("extended_l2=on", false, true, false),
            ("extended_l2=off", true, false, false),
            ("extended_l2=on", true, true, false),
            ("cluster_size=16K", true, true, true),
            ("cluster_size=8K", true, false, false),
            ("compat=0.10", true, false, false),
            // What was asked for is refused later, by its name.
            ("cluster_size=8K,extended_l2=on", true, true, false),
        ] {
            let mut options = qcow2(text).unwrap();
            options.qcow2.backing = backing.then(|| ("base".into(), "raw".into()));
            assert_eq!(options.choose(), chosen, "{text} {backing}");
            assert_eq!(options.qcow2.extended_l2, extended, "{text} {backing}");
        }
    }

    #[test]
    fn says_what_there_is_instead() {
        for (text, why) in [
            (
                "colour=red",
                "-o colour: qcow2 has no such option; it has backing_file, backing_fmt",
            ),
            (
                "cluster_size=big",
                "-o cluster_size=big: it must be 512 to 2M",
            ),
            ("compat=2", "-o compat=2: it must be 0.10"),
            ("lazy_refcounts", "-o lazy_refcounts: give it as key=value"),
            (
                "extended_l2=maybe",
                "-o extended_l2=maybe: it must be on or off",
            ),
            (
                "data_file_raw=2",
                "-o data_file_raw=2: it must be on or off",
            ),
            ("encryption=on", "-o encryption: QEMU's first encryption"),
            (
                "preallocation=some",
                "-o preallocation=some: it must be off, metadata",
            ),
        ] {
            let error = qcow2(text).unwrap_err().to_string();
            assert!(error.starts_with(why), "{error}");
        }
        let error = parse(Format::Raw, &["cluster_size=4K".into()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "-o cluster_size: raw has no such option; it has preallocation"
        );
    }
}
