//! What options say of one image, and which there are: `BlockdevOptions` of QEMU's QAPI, section "block-core".
//!
//! What only tunes QEMU is looked at as QEMU does, and changes nothing here.

use anyhow::{Result, anyhow, bail};
use disk::chain::{FileFaults, Part};
use image::Format;
use image::vhd::SizeFrom;
use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt as _;
use std::time::Duration;

/// What the options say of one image.
pub struct Node(pub BTreeMap<String, String>);

/// A file as options name it.
#[derive(Debug)]
pub struct Place {
    /// Its name.
    pub name: String,
    /// Accesses to it that are to fail.
    pub faults: Option<FileFaults>,
}

impl From<String> for Place {
    fn from(name: String) -> Self {
        let faults = None;
        Self { name, faults }
    }
}

/// What an option's value must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Switch,
    Size,
    Number,
    /// One of these words, or this is said, with `{}` for the word.
    Word(&'static [&'static str], &'static str),
    /// The name of a node.
    Name,
}

use Kind::{Name, Number, Size, Switch, Text, Word};

type Option_ = (&'static str, Kind);

const NO_VALUE: &str = "invalid parameter value: {}";
const OVERLAPS: Kind = Word(
    &["none", "constant", "cached", "all"],
    "Unsupported value '{}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, \
     all",
);

/// What every node has. (That one below the first is for reading only, it is anyway.)
const ALL: [Option_; 9] = [
    ("auto-read-only", Switch),
    ("cache.direct", Switch),
    ("cache.no-flush", Switch),
    ("cache.writeback", Switch),
    ("detect-zeroes", Word(&["off", "on", "unmap"], NO_VALUE)),
    (
        "discard",
        Word(&["ignore", "off", "unmap", "on"], "Invalid discard option"),
    ),
    ("force-share", Switch),
    ("node-name", Name),
    ("read-only", Switch),
];
/// What files have besides.
const FILE: [Option_; 5] = [
    ("aio", Word(&["threads", "native", "io_uring"], NO_VALUE)),
    ("aio-max-batch", Number),
    ("drop-cache", Switch),
    ("locking", Word(&["auto", "on", "off"], NO_VALUE)),
    ("x-check-cache-dropped", Switch),
];
/// Bytes of a null disk whose size is not said.
pub const NULL_BYTES: u64 = 1 << 30;

const QCOW2: [Option_; 20] = [
    ("cache-clean-interval", Number),
    ("cache-size", Size),
    ("discard-no-unref", Switch),
    ("l2-cache-entry-size", Size),
    ("l2-cache-size", Size),
    ("lazy-refcounts", Switch),
    ("overlap-check", OVERLAPS),
    ("overlap-check.active-l1", Switch),
    ("overlap-check.active-l2", Switch),
    ("overlap-check.bitmap-directory", Switch),
    ("overlap-check.inactive-l1", Switch),
    ("overlap-check.inactive-l2", Switch),
    ("overlap-check.main-header", Switch),
    ("overlap-check.refcount-block", Switch),
    ("overlap-check.refcount-table", Switch),
    ("overlap-check.snapshot-table", Switch),
    ("overlap-check.template", OVERLAPS),
    ("pass-discard-other", Switch),
    ("pass-discard-request", Switch),
    ("pass-discard-snapshot", Switch),
];
const QCOW2_REFCOUNTS: [Option_; 1] = [("refcount-cache-size", Size)];
const PARALLELS: [Option_; 2] = [("prealloc-mode", Text), ("prealloc-size", Size)];

/// What images of `format` have besides.
fn of_format(format: Option<Format>) -> &'static [&'static [Option_]] {
    match format {
        // Found out later: of what may be a qcow2 image what that has is taken.
        Some(Format::Qcow2) | None => &[&QCOW2, &QCOW2_REFCOUNTS],
        Some(Format::Parallels) => &[&PARALLELS],
        _ => &[],
    }
}

fn look(key: &str, kind: Kind, value: &str) -> Result<()> {
    match kind {
        Text => {}
        Switch => {
            switch(key, value)?;
        }
        Size => {
            size(key, value)?;
        }
        Number if value.parse::<u64>().is_ok() => {}
        Number => bail!("Parameter '{key}' expects a number"),
        Word(words, _) if words.contains(&value) => {}
        Word(_, why) => bail!("{}", why.replace("{}", value)),
        Name => {
            let letter = value.starts_with(|c: char| c.is_ascii_alphabetic());
            let rest = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            if !letter || !value.chars().all(rest) || value.len() > 31 {
                bail!("Invalid node-name: '{value}'");
            }
        }
    }
    Ok(())
}

impl Node {
    /// Takes the value of `key` away.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    /// Whether `key` is said to be on; it stays, to be looked at with the others.
    pub fn is_on(&self, key: &str) -> Result<bool> {
        self.0
            .get(key)
            .map_or(Ok(false), |value| switch(key, value))
    }

    /// As [`Node::is_on`], and takes it away.
    pub fn take_switch(&mut self, key: &str) -> Result<bool> {
        let on = self.is_on(key);
        self.take(key);
        on
    }

    /// Takes a number of bytes away.
    pub fn number(&mut self, key: &str) -> Result<Option<u64>> {
        self.take(key).map(|text| size(key, &text)).transpose()
    }

    /// Takes away what says which part of its file a raw image is.
    pub fn part(&mut self) -> Result<Option<Part>> {
        let (offset, size) = (self.number("offset")?, self.number("size")?);
        Ok((offset.is_some() || size.is_some()).then_some(Part {
            offset: offset.unwrap_or(0),
            size,
        }))
    }

    /// Takes away what begins with `name.`, without that.
    pub fn child(&mut self, name: &str) -> Node {
        let prefix = format!("{name}.");
        let keys: Vec<String> = self
            .0
            .keys()
            .filter(|key| key.starts_with(&prefix))
            .cloned()
            .collect();
        let child = keys.into_iter().filter_map(|key| {
            let value = self.0.remove(&key)?;
            Some((key.strip_prefix(&prefix)?.to_owned(), value))
        });
        Node(child.collect())
    }

    /// The image's file, and the part of it that the image is in, where it is not all of it.
    pub fn file(&mut self) -> Result<(Place, Option<Part>)> {
        if let Some(node) = self.take("file") {
            bail!("Cannot find device='{node}' nor node-name='{node}'");
        }
        let mut file = self.child("file");
        if file.0.is_empty() {
            bail!("A block device must be specified for \"file\"");
        }
        let is_raw = file.0.get("driver").is_some_and(|driver| driver == "raw");
        let part = if is_raw { file.part()? } else { None };
        Ok((file.protocol("file")?, part))
    }

    /// A file that is named by what is said of its protocol; `what` it is to the image.
    pub fn protocol(mut self, what: &str) -> Result<Place> {
        let mut said = self.take("driver");
        let mut driver = said.clone().unwrap_or_else(|| "file".to_owned());
        // Bytes as they are, of what is below.
        while driver == "raw" {
            self.look(&ALL, &[])?;
            let mut below = self.child("file");
            self.finish(&format!(
                "{what}.driver=raw: only the file of the first image is a part of one, and only once; no"
            ))?;
            said = below.take("driver");
            driver = said.clone().unwrap_or_else(|| "file".to_owned());
            self = below;
        }
        match driver.as_str() {
            "nbd" => return self.nbd().map(Place::from),
            "null-co" | "null-aio" => return self.null(&driver).map(Place::from),
            "blkdebug" => {
                let faults = self.blkdebug()?;
                let below = self.child("image");
                self.finish("Block protocol 'blkdebug' doesn't support the option")?;
                let place = below.protocol("image")?;
                if place.faults.is_some() {
                    bail!("{what}: blkdebug over blkdebug: put the rules of both into one");
                }
                let faults = Some(faults);
                return Ok(Place { faults, ..place });
            }
            "file" | "host_device" => {}
            // What QEMU knows is not called unknown.
            "ssh" | "https" | "http" | "iscsi" | "rbd" | "nfs" | "throttle" => {
                bail!(
                    "{what}.driver={driver}: only files, devices and exports of NBD servers are opened"
                )
            }
            _ => bail!("Unknown driver '{driver}'"),
        }
        let Some(name) = self.take("filename").filter(|name| !name.is_empty()) else {
            bail!("The '{driver}' block driver requires a file name");
        };
        if let Some(driver) = &said {
            check_kind(driver, &name)?;
        }
        self.look_at_file()?;
        self.finish(&format!(
            "Block protocol '{driver}' doesn't support the option"
        ))?;
        Ok(name.into())
    }

    /// The name of a disk of nothing, which `driver` says it is.
    pub fn null(&mut self, driver: &str) -> Result<String> {
        let size = self.number("size")?.unwrap_or(NULL_BYTES);
        let zeros = match self.take_switch("read-zeroes")? {
            true => "",
            false => "?read-zeroes=off",
        };
        self.number("latency-ns")?;
        self.look_at_file()?;
        self.finish(&format!(
            "Block protocol '{driver}' doesn't support the option"
        ))?;
        Ok(format!("null:{size}{zeros}"))
    }

    /// Which field of a VHD image's footer is the disk's size.
    pub fn vhd_size(&mut self) -> Result<Option<SizeFrom>> {
        Ok(match self.take("force_size_calc").as_deref() {
            None => None,
            Some("current_size") => Some(SizeFrom::CurrentSize),
            Some("chs") => Some(SizeFrom::Geometry),
            Some(mode) => bail!("Invalid size calculation mode: '{mode}'"),
        })
    }

    /// Looks at what changes nothing of a file, and takes it away.
    pub fn look_at_file(&mut self) -> Result<()> {
        self.look(&ALL, &[&FILE])
    }

    /// Looks at what changes nothing of any node, and takes it away.
    pub fn look_at_all(&mut self) -> Result<()> {
        self.look(&ALL, &[])
    }

    /// Looks at what changes nothing of an image of `format`, and takes it away.
    pub fn look_at_rest(&mut self, format: Option<Format>) -> Result<()> {
        let bytes = |key: &str| {
            let value = self.0.get(key).map(|text| size(key, text));
            value.transpose()
        };
        if matches!(format, Some(Format::Qcow2)) {
            let all = bytes("cache-size")?;
            let (tables, counts) = (bytes("l2-cache-size")?, bytes("refcount-cache-size")?);
            if all.is_some() && tables.is_some() && counts.is_some() {
                bail!(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
                );
            }
            for (part, of_it) in [("l2-cache-size", tables), ("refcount-cache-size", counts)] {
                if all.is_some() && of_it > all {
                    bail!("{part} may not exceed cache-size");
                }
            }
        }
        self.look(&ALL, of_format(format))
    }

    fn look(&mut self, all: &[Option_], own: &[&[Option_]]) -> Result<()> {
        let zeroes = self
            .0
            .get("detect-zeroes")
            .is_some_and(|word| word == "unmap");
        let unmaps = |word: &String| matches!(word.as_str(), "unmap" | "on");
        let unmaps = self.0.get("discard").is_some_and(unmaps);
        for (key, kind) in all.iter().chain(own.iter().copied().flatten()) {
            if let Some(value) = self.take(key) {
                look(key, *kind, &value)?;
            }
        }
        if zeroes && !unmaps {
            bail!(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
            );
        }
        Ok(())
    }

    /// Refuses what is left.
    pub fn finish(&self, why: &str) -> Result<()> {
        match self.0.keys().next() {
            Some(key) => Err(anyhow!("{why} '{key}'")),
            None => Ok(()),
        }
    }
}

/// Refuses the file `name` where it is none that the protocol `driver`, which was said, is for.
pub fn check_kind(driver: &str, name: &str) -> Result<()> {
    // One that is not there is told when it is opened.
    let Ok(there) = std::fs::metadata(block::name::path(name)) else {
        return Ok(());
    };
    let kind = there.file_type();
    let is_device = kind.is_block_device() || kind.is_char_device();
    match driver {
        "host_device" if !is_device => {
            bail!("'host_device' driver requires '{name}' to be either a character or block device")
        }
        "file" if !kind.is_file() => {
            bail!("'file' driver requires '{name}' to be a regular file")
        }
        _ => Ok(()),
    }
}

/// What a switch says.
pub fn switch(key: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => bail!("Parameter '{key}' expects 'on' or 'off'"),
    }
}

/// A time in seconds, as QEMU counts those of its driver `nbd`.
pub fn seconds(key: &str, text: &str) -> Result<Duration> {
    let name = key.rsplit('.').next().unwrap_or(key);
    match text.parse::<u64>() {
        // A century is for ever.
        Ok(seconds) => Ok(Duration::from_secs(seconds.min(u32::MAX.into()))),
        Err(_) => bail!("Parameter '{name}' expects a number"),
    }
}

/// A number of bytes.
pub fn size(key: &str, text: &str) -> Result<u64> {
    block::size::parse(text).map_err(|_| {
        anyhow!(
            "Parameter '{key}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, \
             mega-, giga-, tera-, peta-\nand exabytes, respectively."
        )
    })
}
