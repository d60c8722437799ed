//! Images that are named by options rather than by a file: `--image-opts driver=qcow2,file.filename=a.qcow2,…`, and
//! `json:{…}` with the same.
//!
//! ```text
//!   driver=qcow2                   the image's format
//!   file.driver=file               what its file is on
//!   file.filename=top.qcow2        its name
//!   encrypt.key-secret=ID          the passphrase, of an --object
//!   backing.driver=raw             what it lies on, in place of what it records: again a driver, a file, …
//!   backing.file.filename=base     …
//! ```
//!
//! `driver=blkdebug` over an image or its file has accesses fail on purpose (`blkdebug`).
//!
//! A raw image has `offset` and `size`: it is that part of its file. What only tunes QEMU (caches, `lazy-refcounts`
//! while it is open, names of nodes) must be what QEMU takes, and changes nothing; what is not known is refused by its
//! name.

mod blkdebug;
mod json;
mod nbd;
mod node;

use anyhow::{Result, anyhow, bail};
use block::faults::Faults;
use block::limits;
use disk::chain::{Below, FileFaults, Part};
use image::Format;
use image::vhd::SizeFrom;
use io::Cache;
pub use node::NULL_BYTES;
use node::{Node, switch};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Options that an image may be named by, at most.
const OPTIONS_MAX: usize = 4096;

/// Why an image whose options say `read-only=on` is not opened for writing, in QEMU's words.
pub const READ_ONLY: &str = "Block node is read-only";

/// An image, and how it is opened.
#[derive(Clone, Debug, Default)]
pub struct ImageOptions {
    /// Its file.
    pub path: PathBuf,
    /// Its format; absent: to be found out.
    pub format: Option<Format>,
    /// The file itself is the disk: a driver of files or exports was named, and none of a format.
    pub is_protocol: bool,
    /// Accesses to its file that are to fail.
    pub faults: Option<FileFaults>,
    /// Accesses to the disk that are to fail.
    pub disk_faults: Option<Arc<Faults>>,
    /// Of a raw one, the part of its file.
    pub part: Option<Part>,
    /// The option that says which part, where its format is to be found out: only a raw one has it.
    pub part_key: Option<&'static str>,
    /// The first option that says what it lies on.
    pub backing_key: Option<String>,
    /// The part of its file that the image is in: `file.driver=raw` with an offset or size.
    pub window: Option<Part>,
    /// Secrets that are passphrases, from the top.
    pub secrets: Vec<String>,
    /// Its external data file.
    pub data_file: Option<PathBuf>,
    /// What it and those below it lie on.
    pub below: Vec<Below>,
    /// Of a VHD image, which field is the disk's size.
    pub vhd_size: Option<SizeFrom>,
    /// Whether others may write meanwhile.
    pub force_share: bool,
    /// Whether it is for reading only: then it is not to be opened for writing.
    pub read_only: bool,
    /// How the host caches it, where that is said.
    pub cache: Option<Cache>,
    /// Of the first image, what makes it another one than its file: keys and values as they were said.
    pub strong: Vec<(String, String)>,
    /// Of those below, how deep those are whose file is for reading only: nothing is committed into them.
    pub read_only_below: Vec<usize>,
    /// What QEMU warns of.
    pub notes: Vec<String>,
    /// For how long connecting to NBD servers is tried again: `open-timeout`, the longest that is said.
    pub open_for: Duration,
    /// For how long requests wait for a connection to come back: `reconnect-delay`, the longest that is said.
    pub reconnect_for: Duration,
}

/// Whether `text` names an image by JSON.
pub fn is_json(text: &str) -> bool {
    text.starts_with("json:")
}

impl ImageOptions {
    /// How the NBD servers among its files are waited for.
    pub fn server(&self) -> ::nbd::Options {
        ::nbd::Options {
            open_for: self.open_for,
            reconnect_for: Some(self.reconnect_for),
            ..crate::open::server()
        }
    }

    /// Parses `key=value,…`, or `json:{…}`.
    ///
    /// # Errors
    ///
    /// In QEMU's words, for an option that nobody knows, and what is lacking.
    pub fn parse(text: &str) -> Result<Self> {
        let mut options = BTreeMap::new();
        let mut notes = Vec::new();
        match text.strip_prefix("json:") {
            Some(text) => json::parse(text, &mut options)?,
            None => {
                for (nth, piece) in crate::options::split(text).into_iter().enumerate() {
                    let (key, value) = match piece.split_once('=') {
                        Some((key, value)) => (key.to_owned(), value.to_owned()),
                        // The first may be the file alone.
                        None if nth == 0 => ("file".to_owned(), piece),
                        None => {
                            notes.push(format!(
                                "short-form boolean option '{piece}' deprecated\nPlease use {piece}=on instead"
                            ));
                            (piece, "on".to_owned())
                        }
                    };
                    options.insert(key, value);
                }
            }
        }
        if options.len() > OPTIONS_MAX {
            bail!("an image is named by {OPTIONS_MAX} options at most");
        }
        let is_file = |key: &String| key == "file" || key.starts_with("file.");
        if !options.contains_key("driver") && !options.keys().any(is_file) {
            bail!("Must specify either driver or file");
        }
        let mut image = Self {
            notes,
            ..Self::default()
        };
        let mut node = Node(options);
        if let Some(value) = node.take("force-share") {
            image.force_share = switch("force-share", &value)?;
        }
        for key in ["read-only", "file.read-only", "data-file.read-only"] {
            image.read_only |= node.is_on(key)?;
        }
        for (key, value) in &node.0 {
            let longest = match key.rsplit('.').next() {
                Some("open-timeout") => &mut image.open_for,
                Some("reconnect-delay") => &mut image.reconnect_for,
                _ => continue,
            };
            *longest = node::seconds(key, value)?.max(*longest);
        }
        for key in ["offset", "size", "encrypt.key-secret", "key-secret"] {
            let value = node.0.get(key).map(|value| (key.to_owned(), value.clone()));
            image.strong.extend(value);
        }
        if node.is_on("cache.direct")? {
            image.cache = Some(Cache::None);
        }
        if node.is_on("cache.no-flush")? {
            image.cache = Some(Cache::Unsafe);
        }
        let is_backing = |key: &&String| *key == "backing" || key.starts_with("backing.");
        image.backing_key = node
            .0
            .iter()
            .find(|(key, value)| is_backing(key) && !value.is_empty())
            .map(|(key, _)| key.clone());
        if node.0.get("backing").is_some_and(String::is_empty) {
            image.notes.push(
                "Use of \"backing\": \"\" is deprecated; use \"backing\": null instead".to_owned(),
            );
        }
        if node
            .0
            .get("driver")
            .is_some_and(|driver| driver == "blkdebug")
        {
            node = image.take_faults(node)?;
        }
        let mut below = Some(node);
        while let Some(node) = below.take() {
            if image.below.len() > limits::CHAIN_LENGTH_MAX {
                bail!(
                    "the chain is longer than {} images",
                    limits::CHAIN_LENGTH_MAX
                );
            }
            below = image.take(node)?;
        }
        Ok(image)
    }

    /// Parses `blkdebug:RULES:FILE`, where `name` is one.
    pub fn of_blkdebug(name: &str) -> Option<Result<Self>> {
        let named = blkdebug::split_name(name)?;
        Some(named.and_then(|(config, path)| {
            Ok(Self {
                path: block::name::path(path),
                faults: Some(blkdebug::of_config(config)?),
                ..Self::default()
            })
        }))
    }

    /// Takes the faults of a disk away; returns what says which disk that is.
    fn take_faults(&mut self, mut node: Node) -> Result<Node> {
        node.take("driver");
        self.disk_faults = Some(node.blkdebug()?.rules);
        if let Some(node) = node.take("image") {
            bail!("Cannot find device='{node}' nor node-name='{node}'");
        }
        let mut image = node.child("image");
        node.finish("Block protocol 'blkdebug' doesn't support the option")?;
        if image.0.is_empty() {
            bail!("A block device must be specified for \"image\"");
        }
        // Nothing is probed for it.
        image
            .0
            .entry("driver".to_owned())
            .or_insert_with(|| "file".to_owned());
        Ok(image)
    }

    /// Takes what says of the next image of the chain what it is; returns what says so of the one below.
    fn take(&mut self, mut node: Node) -> Result<Option<Node>> {
        let first = self.path.as_os_str().is_empty();
        let driver = node.take("driver");
        let (mut window, mut faults) = (None, None);
        let mut file = |node: &mut Node| {
            let (place, part) = node.file()?;
            (window, faults) = (part, place.faults);
            anyhow::Ok(place.name)
        };
        let (path, format) = match driver.as_deref() {
            // The file itself: its bytes are the disk.
            Some(protocol @ ("file" | "host_device")) => {
                let Some(name) = node.take("filename") else {
                    bail!("The '{protocol}' block driver requires a file name");
                };
                node.look_at_file()?;
                node.finish(&format!(
                    "Block protocol '{protocol}' doesn't support the option"
                ))?;
                node::check_kind(protocol, &name)?;
                self.is_protocol |= first;
                (name, Some(Format::Raw))
            }
            Some("nbd") => {
                self.is_protocol |= first;
                (node.nbd()?, Some(Format::Raw))
            }
            Some(null @ ("null-co" | "null-aio")) => (node.null(null)?, Some(Format::Null)),
            Some(name) => {
                let format = name.parse::<Format>();
                let format = format.map_err(|_| anyhow!("Unknown driver '{name}'"))?;
                (file(&mut node)?, Some(format))
            }
            None => (file(&mut node)?, None),
        };
        if window.is_some() && !first {
            bail!("only the first image of a chain can be in a part of a file");
        }
        let keys = ["offset", "size"];
        let part_key = keys.into_iter().find(|key| node.0.contains_key(*key));
        let part = match format {
            Some(Format::Raw) => node.part()?,
            // If it is found to be raw.
            None if first => {
                self.part_key = part_key;
                node.part()?
            }
            _ => None,
        };
        if format == Some(Format::Vhd) {
            let said = node.vhd_size()?;
            if said.is_some() && !first {
                bail!(
                    "force_size_calc of a backing file: only the first image of a chain can be given one"
                );
            }
            self.vhd_size = said;
        }
        node.take("encrypt.format");
        for key in ["encrypt.key-secret", "key-secret"] {
            self.secrets.extend(node.take(key));
        }
        let data = node.child("data-file");
        let data_file = match data.0.is_empty() {
            true => None,
            false => {
                let place = data.protocol("data-file")?;
                if place.faults.is_some() {
                    bail!("data-file.driver=blkdebug: only the image's own file can have faults");
                }
                Some(block::name::path(&place.name))
            }
        };
        if data_file.is_some() && !first {
            bail!("data-file of a backing file: only the first image of a chain can be given one");
        }
        let nothing = match node.take("backing").as_deref() {
            None => false,
            Some("") => true,
            Some(node) => bail!("Cannot find device='{node}' nor node-name='{node}'"),
        };
        let below = node.child("backing");
        let shown = format.map_or("?", Format::qemu_name);
        node.look_at_rest(format)?;
        node.finish(&format!(
            "Block format '{shown}' does not support the option"
        ))?;
        match first {
            true => {
                (self.path, self.format, self.part) = (block::name::path(&path), format, part);
                (self.data_file, self.window) = (data_file, window);
                self.faults = faults;
            }
            false => {
                let path = block::name::path(&path);
                self.below.push(Below::Image {
                    path,
                    format,
                    part,
                    faults,
                });
            }
        }
        match (nothing, below.0.is_empty()) {
            (true, _) => {
                self.below.push(Below::Nothing);
                Ok(None)
            }
            (false, true) => Ok(None),
            (false, false) => {
                if below.is_on("file.read-only")? {
                    self.read_only_below.push(self.below.len() + 1);
                }
                Ok(Some(below))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_what_its_options_say() {
        let all = "driver=qcow2,file.driver=file,file.filename=a,,b,encrypt.key-secret=s,lazy-refcounts=on,\
                   backing.driver=raw,backing.file.filename=base,backing.offset=1M,backing.size=512,force-share=on,\
                   cache.direct=on,node-name=n,file.read-only=on";
        let json = "json:{'driver':'qcow2','file':{'driver':'file','filename':'a,b'},'read-only':true,'encrypt':{'key-secret':\"s\"},\
                    'lazy-refcounts':true,'backing':{'driver':'raw','file':{'filename':'base'},'offset':1048576,\
                    'size':512},'force-share':true,'cache':{'direct':true},'node-name':'n'}";
        for text in [all, json] {
            let image = ImageOptions::parse(text).unwrap();
            assert_eq!(image.path, PathBuf::from("a,b"));
            assert_eq!(image.format, Some(Format::Qcow2));
            assert_eq!(image.secrets, ["s"]);
            assert!(image.force_share && image.read_only && image.cache == Some(Cache::None));
            let [
                Below::Image {
                    path, format, part, ..
                },
            ] = image.below.as_slice()
            else {
                panic!("{image:?}");
            };
            assert_eq!((path, *format), (&PathBuf::from("base"), Some(Format::Raw)));
            let (offset, size) = (1 << 20, Some(512));
            assert_eq!(*part, Some(Part { offset, size }));
        }
        let image = ImageOptions::parse("driver=qcow2,backing=,file.filename=a").unwrap();
        assert!(matches!(image.below.as_slice(), [Below::Nothing]));
    }

    #[test]
    fn what_is_not_known_is_refused_by_its_name() {
        for (text, why) in [
            (
                "driver=raw,file.filename=a,foo=1",
                "Block format 'raw' does not support the option 'foo'",
            ),
            (
                "driver=raw,file.filename=a,file.foo=1",
                "Block protocol 'file' doesn't support the option 'foo'",
            ),
            ("driver=foo,file.filename=a", "Unknown driver 'foo'"),
            (
                "driver=raw",
                "A block device must be specified for \"file\"",
            ),
            (
                "driver=raw,file.driver=ssh,file.path=a",
                "file.driver=ssh: only files, devices and exports of NBD servers are opened",
            ),
            ("a.raw", "Cannot find device='a.raw' nor node-name='a.raw'"),
            (
                "driver=qcow2,file.filename=a,offset=1",
                "Block format 'qcow2' does not support the option 'offset'",
            ),
            (
                "driver=raw,file.filename=a,force-share=1",
                "Parameter 'force-share' expects 'on' or 'off'",
            ),
            (
                "json:{'driver':['raw']}",
                "Must specify either driver or file",
            ),
        ] {
            assert_eq!(
                ImageOptions::parse(text).unwrap_err().to_string(),
                why,
                "{text}"
            );
        }
        let deep = format!("json:{}1{}", "{'a':".repeat(9999), "}".repeat(9999));
        assert!(ImageOptions::parse(&deep).is_err());
        let chain = |images: usize| {
            let one = |depth| {
                let prefix = "backing.".repeat(depth);
                format!("{prefix}driver=raw,{prefix}file.filename=a")
            };
            let all: Vec<String> = (0..images).map(one).collect();
            ImageOptions::parse(&all.join(","))
        };
        assert_eq!(chain(3).unwrap().below.len(), 2);
        let error = chain(limits::CHAIN_LENGTH_MAX + 3).unwrap_err().to_string();
        assert!(error.starts_with("the chain is longer than"), "{error}");
    }
}
