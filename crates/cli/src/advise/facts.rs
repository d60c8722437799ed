//! What is known of an image without writing anything: of itself, its file system, its device and the kernel.

use super::Advise;
use crate::map;
use anyhow::{Context as _, Result, bail};
use bench::machine::{Host, folder_below};
use block::size;
use disk::chain::{Chain, ChainOptions};
use image::Format;
use io::{Aio, Cache, File, FileKind, Lock, OpenOptions};
use serde::Serialize;
use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long, and over how many runs, an image is walked.
const WALK: Duration = Duration::from_secs(5);
const RUNS_MAX: u64 = 1_000_000;

/// Of an image.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Facts {
    pub format: String,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster; 0 for formats without.
    pub cluster_size: u64,
    /// Images that it is made of, itself included.
    pub chain: usize,
    /// qcow2: its clusters have subclusters.
    pub subclusters: bool,
    /// qcow2: of the first version, without what came later.
    pub version_2: bool,
    pub encrypted: bool,
    /// Why it cannot be written.
    pub read_only_because: Option<String>,
    /// Bytes of the disk that are data in this image, data in those below, compressed in any, zeros, and nothing.
    pub data: u64,
    pub data_below: u64,
    pub compressed: u64,
    pub zeros: u64,
    pub unallocated: u64,
    /// Bytes of data that would lie behind the end of their file: it was cut off.
    pub lost: u64,
    /// Pieces that lie one behind the other in their files.
    pub runs: u64,
    /// The walk ended early: the figures are of what it saw.
    pub incomplete: bool,
    /// Bytes of tables that map the whole disk; 0 where they are few or always in memory.
    pub tables: u64,
    /// The engine that is chosen, and why.
    pub engine: String,
    pub engine_because: String,
    /// Whether its files can be opened with O_DIRECT; if not, why.
    pub direct: bool,
    pub direct_because: Option<String>,
    /// What O_DIRECT wants offsets to be multiples of.
    pub alignment: u32,
    pub file_system: String,
    /// Whether the file system can allocate space without writing it; unknown for most.
    pub fallocate: Option<bool>,
    pub device: String,
    /// Whether the device has an arm. Unknown where a virtual machine's disk is said to have one: most are, whatever is below them.
    pub rotational: Option<bool>,
    pub scheduler: Option<String>,
    pub cores: usize,
    /// Where the guest's data lie, for measurements; nothing where that is no local file.
    #[serde(skip)]
    pub path: Option<PathBuf>,
}

/// The walk has seen enough.
#[derive(Debug)]
struct Enough;

impl std::fmt::Display for Enough {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("enough was seen")
    }
}

impl std::error::Error for Enough {}

/// Looks at an image.
pub(super) fn of(args: &Advise, name: &str) -> Result<Facts> {
    let options = ChainOptions {
        format: args.format,
        read_only: true,
        force_share: true,
        allow_backing: args.allow_backing.clone(),
        allow_locked: true,
        ..ChainOptions::default()
    };
    let chain = Chain::open(name, &options)?;
    let Some(active) = chain.layers.first() else {
        bail!("there is no image");
    };
    let about = active.image.describe();
    let fact = |name: &str| {
        let mut facts = about.facts.iter();
        facts
            .find(|(n, _)| *n == name)
            .map(|(_, value)| value.clone())
    };
    let subclusters = fact("extended l2").as_deref() == Some("true");
    let clusters = about.cluster_size > 1;
    let encryption = active.image.encryption();
    let locked = encryption.is_some_and(|encryption| encryption.cipher.is_none());
    let mut facts = Facts {
        format: about.format.to_owned(),
        size: about.size,
        cluster_size: if clusters { about.cluster_size } else { 0 },
        chain: chain.layers.len(),
        subclusters,
        version_2: about.format == "qcow2" && fact("version").as_deref() == Some("2"),
        encrypted: encryption.is_some(),
        // Not asking for its passphrase is our doing.
        read_only_because: about.read_only_because.clone().filter(|_| !locked),
        tables: match about.format {
            "qcow2" if clusters => {
                about.size.div_ceil(about.cluster_size) * if subclusters { 16 } else { 8 }
            }
            "qed" if clusters => about.size.div_ceil(about.cluster_size) * 8,
            _ => 0,
        },
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        ..Facts::default()
    };
    walk(&chain, &mut facts)?;
    // The guest's data of this image: of several files the last.
    if let Some(file) = active
        .files
        .last()
        .filter(|file| file.kind() != FileKind::Remote)
    {
        of_host(&mut facts, file.path())?;
    }
    Ok(facts)
}

fn walk(chain: &Chain, facts: &mut Facts) -> Result<()> {
    let began = Instant::now();
    let walked = map::walk(chain, 0..u64::MAX, map::Holes::of, |entry| {
        let bytes = match (entry.compressed, entry.data, entry.zero, entry.depth) {
            (true, ..) => &mut facts.compressed,
            (_, true, _, 0) => &mut facts.data,
            (_, true, ..) => &mut facts.data_below,
            (_, _, true, _) if entry.present => &mut facts.zeros,
            _ => &mut facts.unallocated,
        };
        *bytes += entry.length;
        facts.lost += behind_end(chain, &entry)?;
        facts.runs += u64::from(entry.data || entry.compressed);
        match facts.runs >= RUNS_MAX || began.elapsed() >= WALK {
            true => Err(Enough.into()),
            false => Ok(()),
        }
    });
    match walked {
        Err(error) if error.is::<Enough>() => facts.incomplete = true,
        walked => walked?,
    }
    Ok(())
}

/// Bytes of a run of data that its file is too short for.
fn behind_end(chain: &Chain, entry: &map::Entry) -> Result<u64> {
    let layer = chain.layers.get(entry.depth);
    // What a raw disk's file is too short for are zeros.
    let layer = layer.filter(|layer| entry.data && layer.format != Format::Raw);
    let file = layer.and_then(|layer| layer.files.get(usize::from(entry.file.0)));
    let (Some(file), Some(offset)) = (file, entry.offset) else {
        return Ok(0);
    };
    let end = offset.saturating_add(entry.length);
    Ok(end.saturating_sub(file.len()?).min(entry.length))
}

/// Whether the device whose folder of sysfs this is has an arm.
fn rotational(device: &Path) -> Option<bool> {
    let mut device = device.to_owned();
    // A loop device is what its file lies on; that may be on a loop device again.
    for _ in 0..8 {
        let Ok(file) = fs::read_to_string(device.join("loop/backing_file")) else {
            break;
        };
        device = folder_below(&fs::metadata(file.trim_end()).ok()?);
    }
    let says = queue(&device, "rotational")? == "1";
    let full = fs::canonicalize(&device).unwrap_or_default();
    let names = full.to_string_lossy().into_owned();
    // virtio-blk and Xen's disks.
    let is_virtual = names.contains("/virtio") || names.contains("/vbd-");
    (!says || !is_virtual).then_some(says)
}

/// An attribute of the queue of a device. A partition has its queue one above.
fn queue(device: &Path, name: &str) -> Option<String> {
    let own = fs::read_to_string(device.join("queue").join(name));
    let above = || fs::read_to_string(device.join("../queue").join(name));
    let text = own.or_else(|_| above()).ok()?;
    Some(text.trim().to_owned())
}

/// What file and device can do.
fn of_host(facts: &mut Facts, path: &Path) -> Result<()> {
    let options = OpenOptions {
        cache: Cache::None,
        direct_fallback: true,
        lock: Lock::None,
        ..OpenOptions::reading()
    };
    let file = File::open(path, &options)?;
    facts.direct = file.direct();
    facts.direct_because = file.fallback().map(str::to_owned);
    facts.alignment = file.alignment().offset;
    let choice = io::choose(Aio::Auto, std::slice::from_ref(&file))?;
    (facts.engine, facts.engine_because) = (choice.kind.to_string(), choice.reason);
    let meta = fs::metadata(path).with_context(|| path.display().to_string())?;
    if !meta.file_type().is_block_device() {
        let host = Host::look(path);
        (facts.file_system, facts.device) = (host.file_system, host.device);
    }
    let device = folder_below(&meta);
    facts.rotational = rotational(&device);
    // What stands on other devices leaves the order of requests to them.
    let stacked = ["loop", "dm", "md"]
        .iter()
        .any(|kind| device.join(kind).exists());
    facts.scheduler = queue(&device, "scheduler")
        .filter(|_| !stacked)
        .and_then(|text| Some(text.split(['[', ']']).nth(1)?.to_owned()));
    let kind = facts.file_system.split(' ').next().unwrap_or_default();
    facts.fallocate = match kind {
        "ext4" | "xfs" | "btrfs" | "tmpfs" | "f2fs" | "bcachefs" => Some(true),
        "ext2" | "ext3" | "vfat" | "msdos" | "9p" => Some(false),
        _ => None,
    };
    facts.path = Some(path.to_owned());
    Ok(())
}

impl Facts {
    /// In a line, for people.
    pub(super) fn line(&self) -> String {
        let human = size::human;
        let mut line = format!("{} of {}", self.format, human(self.size));
        if self.cluster_size > 0 {
            line.push_str(&format!(", clusters of {}", human(self.cluster_size)));
        }
        if self.chain > 1 {
            line.push_str(&format!(", a chain of {}", self.chain));
        }
        line.push_str(&format!(
            "; {} data, {} below, {} compressed{}",
            human(self.data),
            human(self.data_below),
            human(self.compressed),
            if self.incomplete {
                " as far as it was looked at"
            } else {
                ""
            }
        ));
        if self.file_system.is_empty() && self.path.is_some() {
            line.push_str("; a block device");
        }
        if !self.file_system.is_empty() {
            line.push_str(&format!("; on {}, {}", self.file_system, self.device));
        }
        line
    }
}
