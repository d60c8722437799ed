//! The options that QEMU's formats have for `create`, `convert` and `measure`, in QEMU's order and with its defaults
//! (`*_create_opts` in its `block/`): for the line `Formatting …`, for `-o help`, and to say which option is wrong.
//!
//! The table may know formats that diskplane cannot make (yet): whether it can is up to [`image::Format`].

use anyhow::{Result, anyhow, bail};
use image::{Format, vmdk};
use std::collections::BTreeMap;

/// What an option's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Size,
    Number,
    Flag,
}

use Kind::{Flag, Number, Size, Text};

/// An option: name, what its value is, its default and what it means.
type Known = (&'static str, Kind, Option<&'static str>, &'static str);

const DISK_SIZE: Known = ("size", Size, None, "Virtual disk size");
const BACKING_FILE: Known = ("backing_file", Text, None, "File name of a base image");
const BACKING_FMT: Known = ("backing_fmt", Text, None, "Image format of the base image");

/// What files have beside their format's options.
const FILE: [Known; 4] = [
    DISK_SIZE,
    (
        "nocow",
        Flag,
        None,
        "Turn off copy-on-write (valid only on btrfs)",
    ),
    (
        "preallocation",
        Text,
        None,
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
    (
        "extent_size_hint",
        Size,
        None,
        "Extent size hint for the image file, 0 to disable",
    ),
];

const ENCRYPTION: Known = (
    "encryption",
    Flag,
    None,
    "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
);
const QCOW: &[Known] = &[
    DISK_SIZE,
    BACKING_FILE,
    (BACKING_FMT.0, Text, None, "Format of the backing image"),
    ENCRYPTION,
    (
        "encrypt.format",
        Text,
        None,
        "Encrypt the image, format choices: 'aes'",
    ),
    (
        "encrypt.key-secret",
        Text,
        None,
        "ID of the secret that provides the AES encryption key",
    ),
];
const QCOW2: &[Known] = &[
    ENCRYPTION,
    (
        "encrypt.format",
        Text,
        None,
        "Encrypt the image, format choices: 'aes', 'luks'",
    ),
    (
        "encrypt.key-secret",
        Text,
        None,
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    (
        "encrypt.cipher-alg",
        Text,
        None,
        "Name of encryption cipher algorithm",
    ),
    (
        "encrypt.cipher-mode",
        Text,
        None,
        "Name of encryption cipher mode",
    ),
    (
        "encrypt.ivgen-alg",
        Text,
        None,
        "Name of IV generator algorithm",
    ),
    (
        "encrypt.ivgen-hash-alg",
        Text,
        None,
        "Name of IV generator hash algorithm",
    ),
    (
        "encrypt.hash-alg",
        Text,
        None,
        "Name of encryption hash algorithm",
    ),
    (
        "encrypt.iter-time",
        Number,
        None,
        "Time to spend in PBKDF in milliseconds",
    ),
    ("cluster_size", Size, Some("65536"), "qcow2 cluster size"),
    ("extended_l2", Flag, Some("off"), "Extended L2 tables"),
    (
        "preallocation",
        Text,
        None,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    (
        "compression_type",
        Text,
        Some("zlib"),
        "Compression method used for image cluster compression",
    ),
    DISK_SIZE,
    (
        "compat",
        Text,
        None,
        "Compatibility level (v2 [0.10] or v3 [1.1])",
    ),
    BACKING_FILE,
    BACKING_FMT,
    (
        "data_file",
        Text,
        None,
        "File name of an external data file",
    ),
    (
        "data_file_raw",
        Flag,
        None,
        "The external data file must stay valid as a raw image",
    ),
    (
        "lazy_refcounts",
        Flag,
        Some("off"),
        "Postpone refcount updates",
    ),
    (
        "refcount_bits",
        Number,
        Some("16"),
        "Width of a reference count entry in bits",
    ),
];
const QED: &[Known] = &[
    DISK_SIZE,
    BACKING_FILE,
    BACKING_FMT,
    (
        "cluster_size",
        Size,
        Some("65536"),
        "Cluster size (in bytes)",
    ),
    ("table_size", Size, None, "L1/L2 table size (in clusters)"),
];
const VPC: &[Known] = &[
    DISK_SIZE,
    (
        "subformat",
        Text,
        None,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    (
        "force_size",
        Flag,
        None,
        "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based \
         calculation",
    ),
];
const VDI: &[Known] = &[
    DISK_SIZE,
    (
        "static",
        Flag,
        Some("off"),
        "VDI static (pre-allocated) image",
    ),
];
const VHDX: &[Known] = &[
    ("size", Size, None, "Virtual disk size; max of 64TB."),
    ("log_size", Size, Some("1048576"), "Log size; min 1MB."),
    (
        "block_size",
        Size,
        Some("0"),
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
    ),
    (
        "subformat",
        Text,
        None,
        "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
    ),
    (
        "block_state_zero",
        Flag,
        None,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using \
         'qemu-img convert' with subformat=dynamic.",
    ),
];
const VMDK: &[Known] = &[
    DISK_SIZE,
    (
        "adapter_type",
        Text,
        None,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    BACKING_FILE,
    ("backing_fmt", Text, None, "Must be 'vmdk' if present"),
    ("compat6", Flag, Some("off"), "VMDK version 6 image"),
    (
        "hwversion",
        Text,
        Some("undefined"),
        "VMDK hardware version",
    ),
    ("toolsversion", Text, None, "VMware guest tools version"),
    (
        "subformat",
        Text,
        None,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | \
         twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    ),
    (
        "zeroed_grain",
        Flag,
        None,
        "Enable efficient zero writes using the zeroed-grain GTE feature",
    ),
];
const LUKS: &[Known] = &[
    DISK_SIZE,
    (
        "key-secret",
        Text,
        None,
        "ID of the secret that provides the keyslot passphrase",
    ),
    (
        "cipher-alg",
        Text,
        None,
        "Name of encryption cipher algorithm",
    ),
    ("cipher-mode", Text, None, "Name of encryption cipher mode"),
    ("ivgen-alg", Text, None, "Name of IV generator algorithm"),
    (
        "ivgen-hash-alg",
        Text,
        None,
        "Name of IV generator hash algorithm",
    ),
    ("hash-alg", Text, None, "Name of encryption hash algorithm"),
    (
        "iter-time",
        Number,
        None,
        "Time to spend in PBKDF in milliseconds",
    ),
    (
        "detached-header",
        Flag,
        None,
        "Create a detached LUKS header",
    ),
];
const PARALLELS: &[Known] = &[
    DISK_SIZE,
    (
        "cluster_size",
        Size,
        Some("1048576"),
        "Parallels image cluster size",
    ),
];

/// The options of the format that QEMU calls `name`.
fn of_format(name: &str) -> &'static [Known] {
    match name {
        "qcow2" => QCOW2,
        "qcow" => QCOW,
        "qed" => QED,
        "vpc" => VPC,
        "vdi" => VDI,
        "vhdx" => VHDX,
        "vmdk" => VMDK,
        "luks" => LUKS,
        "parallels" => PARALLELS,
        _ => &[DISK_SIZE],
    }
}

/// A format's options, and behind them those of files that it does not have itself.
fn known(name: &str) -> Vec<Known> {
    let own = of_format(name);
    let has = |option: &&Known| !own.iter().any(|known| known.0 == option.0);
    own.iter().chain(FILE.iter().filter(has)).copied().collect()
}

/// The format that QEMU calls `name`, of which images can be made.
///
/// # Errors
///
/// In QEMU's words.
pub fn of_new(name: &str) -> Result<Format> {
    match super::open::format_named(name) {
        None => bail!("Unknown file format '{name}'"),
        Some(Format::Bochs | Format::Cloop | Format::Dmg) => {
            bail!("Format driver '{name}' does not support image creation")
        }
        Some(format) => Ok(format),
    }
}

/// What `-o help` prints; with a file's name what files have too.
pub fn help(format: &str, with_file: bool) -> String {
    let mut options = match with_file {
        true => known(format),
        false => of_format(format).to_vec(),
    };
    listed(
        &match with_file {
            true => "Supported options:".to_owned(),
            false => format!("Supported {format} options:"),
        },
        &mut options,
    ) + match with_file {
        true => "",
        false => {
            "\nThe protocol level may support further options.\nSpecify the target filename to include those \
             options.\n"
        }
    }
}

/// Options by name, below `title`.
fn listed(title: &str, options: &mut [Known]) -> String {
    options.sort_by_key(|(name, ..)| *name);
    let mut text = format!("{title}\n");
    for (name, kind, _, meaning) in options {
        let kind = match kind {
            Text => "str",
            Size => "size",
            Number => "num",
            Flag => "bool (on/off)",
        };
        let shown = format!("{name}=<{kind}>");
        text.push_str(&format!("  {shown:<22} - {meaning}\n"));
    }
    text
}

/// What `amend` changes of what `create` has.
const AMENDED: [&str; 9] = [
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "encrypt.iter-time",
    "lazy_refcounts",
    "refcount_bits",
    "size",
];
/// What only `amend` has; of a luks image without `encrypt.`.
const AMEND: [Known; 4] = [
    (
        "encrypt.keyslot",
        Number,
        None,
        "Select a single keyslot to modify explicitly",
    ),
    (
        "encrypt.new-secret",
        Text,
        None,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    (
        "encrypt.old-secret",
        Text,
        None,
        "Select all keyslots that match this password",
    ),
    (
        "encrypt.state",
        Text,
        None,
        "Select new state of affected keyslots (active/inactive)",
    ),
];

/// What `amend` changes of an image of `format`; nothing of others.
fn amended(format: Format) -> Vec<Known> {
    let of_create = QCOW2.iter().filter(|(name, ..)| AMENDED.contains(name));
    let all = of_create.chain(&AMEND).copied();
    match format {
        Format::Qcow2 => all.collect(),
        Format::Luks => all
            .filter_map(|(name, kind, default, meaning)| {
                Some((name.strip_prefix("encrypt.")?, kind, default, meaning))
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// What `amend -o help` prints for `format`; `None` where nothing can be amended.
pub fn amend_help(format: Format) -> Option<String> {
    let mut options = amended(format);
    let title = format!("Amend options for '{}':", format.qemu_name());
    (!options.is_empty()).then(|| listed(&title, &mut options))
}

/// What `list` asks `amend` for, of an image of `format`: names and values, in their order.
///
/// # Errors
///
/// In QEMU's words, for an option that cannot be amended, and a value that is none.
pub fn to_amend(format: Format, list: &str) -> Result<Vec<(&'static str, String)>> {
    let known = amended(format);
    let mut said = Vec::new();
    for piece in crate::options::split(list) {
        let (name, value) = pair(&known, &piece);
        let Some((name, kind, ..)) = known.iter().find(|known| known.0 == name) else {
            match of_format(format.qemu_name())
                .iter()
                .any(|known| known.0 == name)
            {
                true => bail!(
                    "Invalid parameter '{name}'\nThis option is only supported for image creation"
                ),
                false => bail!("Invalid parameter '{name}'"),
            }
        };
        said.push((*name, value_of(*kind, name, value)?));
    }
    Ok(said)
}

/// The name and the value in `piece` of a list, of the options that are `known`.
fn pair<'a>(known: &[Known], piece: &'a str) -> (&'a str, &'a str) {
    match piece.split_once('=') {
        Some(pair) => pair,
        None => match piece.strip_prefix("no") {
            Some(name) if known.iter().any(|k| k.0 == name) => (name, "off"),
            _ => (piece, "on"),
        },
    }
}

/// The value of the option `name` as it is kept.
fn value_of(kind: Kind, name: &str, value: &str) -> Result<String> {
    Ok(match kind {
        Text => value.to_owned(),
        Flag => match value {
            "on" | "yes" | "true" | "y" => "on".to_owned(),
            "off" | "no" | "false" | "n" => "off".to_owned(),
            _ => bail!("Parameter '{name}' expects 'on' or 'off'"),
        },
        Number => value
            .parse::<u64>()
            .map_err(|_| anyhow!("Parameter '{name}' expects a number"))?
            .to_string(),
        Size => super::line::size_of(value)
            .ok_or_else(|| {
                anyhow!(
                    "Parameter '{name}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E \
                     means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
                )
            })?
            .to_string(),
    })
}

/// What was said of a format's options.
#[derive(Clone, Debug, Default)]
pub struct Said {
    format: String,
    values: BTreeMap<&'static str, String>,
    /// Switches as they were said: they are shown so.
    words: BTreeMap<&'static str, String>,
}

impl Said {
    /// Takes `list`, as after `-o`, for the format that QEMU calls `format`.
    ///
    /// # Errors
    ///
    /// For an option that it does not have, and a value that is none.
    pub fn parse(format: &str, list: &str) -> Result<Self> {
        let mut said = Self {
            format: format.to_owned(),
            ..Self::default()
        };
        for piece in crate::options::split(list) {
            let (name, value) = pair(&known(format), &piece);
            said.set(name, value)?;
        }
        Ok(said)
    }

    /// Says what the option `name` is to be.
    ///
    /// # Errors
    ///
    /// As [`Said::parse`].
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let known = known(&self.format);
        let Some((name, kind, ..)) = known.iter().find(|known| known.0 == name) else {
            bail!("Invalid parameter '{name}'");
        };
        let meant = value_of(*kind, name, value)?;
        if *kind == Flag {
            self.words.insert(name, value.to_owned());
        }
        self.values.insert(name, meant);
        Ok(())
    }

    /// Refuses words that an option has not.
    ///
    /// # Errors
    ///
    /// In QEMU's words, with its name for the option.
    pub fn check_choices(&self) -> Result<()> {
        let choices: [(&str, &str, &[&str]); 4] = [
            ("encrypt.format", "format", &["aes", "luks"]),
            (
                "preallocation",
                "preallocation",
                &["off", "metadata", "falloc", "full"],
            ),
            ("compat", "version", &["0.10", "v2", "1.1", "v3"]),
            ("compression_type", "compression-type", &["zlib", "zstd"]),
        ];
        for (name, shown, words) in choices {
            match self.get(name) {
                Some(value) if !words.contains(&value) => {
                    bail!("Parameter '{shown}' does not accept value '{value}'")
                }
                _ => {}
            }
        }
        let Some(value) = self.get("subformat") else {
            return Ok(());
        };
        match self.format.as_str() {
            "vmdk" if vmdk::Subformat::of_name(value).is_none() => {
                bail!("invalid parameter value: {value}")
            }
            "vpc" | "vhdx" if !matches!(value, "dynamic" | "fixed") => {
                bail!("Parameter 'subformat' does not accept value '{value}'")
            }
            _ => Ok(()),
        }
    }

    /// Whether the format has the option `name`.
    pub fn has(&self, name: &str) -> bool {
        of_format(&self.format).iter().any(|known| known.0 == name)
    }

    /// What was said of the option `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// The disk's size, where it was said.
    pub fn size(&self) -> Option<u64> {
        self.get("size").and_then(|size| size.parse().ok())
    }

    /// As QEMU prints all of them, defaults included, behind `fmt=…`.
    pub fn line(&self) -> String {
        let mut text = String::new();
        for (name, _, default, _) in known(&self.format) {
            let word = self.words.get(name).map(String::as_str);
            if let Some(value) = word.or(self.get(name)).or(default) {
                text.push_str(&format!(" {name}={}", value.replace(',', ",,")));
            }
        }
        text
    }

    /// As diskplane's own `-o` takes them: what is said otherwise there (the size) or means nothing here is left out.
    pub fn own(&self) -> Vec<String> {
        let kept = self.values.iter().filter(|(name, _)| {
            !matches!(
                **name,
                "size" | "nocow" | "extent_size_hint" | "backing_file" | "backing_fmt"
            )
        });
        let own = kept.map(|(name, value)| format!("{name}={}", value.replace(',', ",,")));
        own.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_qemus() {
        let mut said =
            Said::parse("qcow2", "lazy_refcounts,data_file=a,,b,cluster_size=4k").unwrap();
        said.set("size", "1M").unwrap();
        assert_eq!(
            said.line(),
            " cluster_size=4096 extended_l2=off compression_type=zlib size=1048576 data_file=a,,b lazy_refcounts=on \
             refcount_bits=16"
        );
        assert_eq!(
            said.own(),
            ["cluster_size=4096", "data_file=a,,b", "lazy_refcounts=on"]
        );
        for (list, why) in [
            ("foo=1", "Invalid parameter 'foo'"),
            (
                "lazy_refcounts=1",
                "Parameter 'lazy_refcounts' expects 'on' or 'off'",
            ),
            (
                "refcount_bits=x",
                "Parameter 'refcount_bits' expects a number",
            ),
        ] {
            assert_eq!(Said::parse("qcow2", list).unwrap_err().to_string(), why);
        }
        assert!(Said::parse("raw", "cluster_size=1").is_err());
    }
}
