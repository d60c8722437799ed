//! What an experiment is made of, as data.

use crate::{
    ffsb::Scenario,
    metric::Metric,
    turns,
    versus::cell::{Load, Polling, RANDREAD, Server},
};
use serde::Serialize;

/// A study that one command repeats.
#[derive(Clone, Debug)]
pub struct Experiment {
    /// `E0` …
    pub name: &'static str,
    /// A line.
    pub title: &'static str,
    /// Which document it repeats.
    pub source: &'static str,
    /// What is measured, and how that differs from the document.
    pub meaning: &'static str,
    /// The cells, in the order in which they run.
    pub cells: Vec<Cell>,
    /// What the document found.
    pub findings: Vec<Finding>,
    /// What it speaks of that no path here has: that, and why.
    pub absent: &'static [(&'static str, &'static str)],
    /// What its bars show.
    pub figures: &'static [Metric],
    /// Bytes of a disk in a full run, and in a quick one.
    pub disk_bytes: (u64, u64),
}

impl Experiment {
    /// What tells its cells, their loads and their sides from others of the same name: samples of these are of one series.
    pub fn definition(&self) -> String {
        let text = format!("{:?}", self.cells);
        format!("{:016x}", turns::fnv(text.as_bytes()))
    }
}

/// One load on several sides in turn.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Its name: letters, digits and dashes.
    pub name: String,
    /// Where it stands: names of factors and their values here.
    pub axes: Vec<(String, String)>,
    /// The load, where it is one on disks.
    pub load: Load,
    /// The load, where it is one on a file system.
    pub files: Option<Files>,
    /// Who takes part.
    pub sides: Vec<Side>,
    /// It is part of a quick run.
    pub quick: bool,
}

/// How a side is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The file itself, by one of our engines.
    Bare,
    /// A server.
    Served(Server),
    /// As a file system: the file itself (without a server), or what an NBD server has, on a loop device.
    Mounted(Option<Server>),
    /// As a file system in a Linux guest, on a server's disk or QEMU's own.
    Guest(Bus, Option<Server>),
}

/// What a guest sees its disk as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// IDE, of the PIIX chips.
    Ide,
}

impl Bus {
    /// How the guest names the disk.
    pub(super) fn device(self) -> &'static str {
        match self {
            Self::Virtio => "/dev/vda",
            Self::Ide => "/dev/sda",
        }
    }

    /// QEMU's device on the node `d0`.
    pub(super) fn model(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-blk-pci,drive=d0",
            Self::Ide => "ide-hd,drive=d0,bus=ide.0",
        }
    }
}

/// A load on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Files {
    /// What threads do.
    pub scenario: Scenario,
    /// How many.
    pub threads: usize,
}

/// How a file system is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// Which: ext4 or XFS.
    pub system: System,
    /// The device is flushed where the journal needs it.
    pub barriers: bool,
    /// I/O scheduler of the loop device; the kernel's choice where not given.
    pub scheduler: Option<&'static str>,
}

impl Client {
    /// ext4 as it comes.
    pub const EXT4: Self = Self {
        system: System::Ext4,
        barriers: true,
        scheduler: None,
    };
}

/// How a guest's driver makes its requests (vhost-user).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    /// Packed rings; else split ones.
    pub packed: bool,
    /// A request takes one descriptor of the ring, which leads to a table of them.
    pub indirect: bool,
    /// Bytes by which its buffers lie behind multiples of 4096.
    pub misalign: u32,
    /// Requests in flight on each queue, where not those of the cell's load.
    pub depth: Option<u32>,
}

impl Driver {
    /// As Linux does it with a server of split rings.
    pub const USUAL: Self = Self {
        packed: false,
        indirect: true,
        misalign: 0,
        depth: None,
    };
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// No file: a disk of zeros.
    Null,
    /// The disk as it is.
    Raw,
    /// qcow2 with clusters of 64 KiB.
    Qcow2,
    /// QED.
    Qed,
    /// A dynamic VHD.
    Vhd,
}

impl Format {
    /// As `create -f` and `serve -f` name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qed => "qed",
            Self::Vhd => "vhd",
        }
    }

    /// As QEMU names it.
    pub fn of_qemu(self) -> &'static str {
        match self {
            Self::Vhd => "vpc",
            other => other.name(),
        }
    }
}

/// How much of it is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// All of it, and written.
    Full,
    /// All of it by `fallocate`, and never written before.
    Falloc,
    /// All of it by `fallocate`, and written full then.
    Filled,
    /// All of it as zeros that were written.
    Zeroed,
    /// Nothing: a new file for each sample that writes.
    Growing,
    /// Nothing: a new file for each sample over a raw one that was written full.
    Overlay,
    /// Nothing: a new file for each sample over an empty raw one.
    Hollow,
}

/// What its bytes lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Medium {
    /// What the run's folder lies on.
    Own,
    /// A simulated disk of 7200 turns a minute.
    Rotating,
    /// RAID0 over so many simulated flash drives.
    Striped(u8),
}

/// What is between the medium and the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    /// Nothing: the file is the device; on the run's own medium it is a file in the folder.
    None,
    /// Nothing: a block device, the one that the user gave or a loop device.
    Device,
    /// ext4 on a loop device.
    Ext4,
    /// XFS on a loop device.
    Xfs,
    /// ext4 on a loop device, mounted again over NFS.
    NfsExt4,
    /// XFS on a loop device, mounted again over NFS.
    NfsXfs,
}

/// Where a file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// On what.
    pub medium: Medium,
    /// In what.
    pub system: System,
}

impl Place {
    /// In the run's folder.
    pub const HERE: Self = Self {
        medium: Medium::Own,
        system: System::None,
    };

    /// A medium of ours with a file system.
    pub const fn own(system: System) -> Self {
        Self {
            medium: Medium::Own,
            system,
        }
    }

    /// The rotating disk with a file system, or itself.
    pub const fn rotating(system: System) -> Self {
        Self {
            medium: Medium::Rotating,
            system,
        }
    }

    /// Whether a block device can be given for it.
    pub fn is_on_device(self) -> bool {
        self.medium == Medium::Own && self.system != System::None
    }

    /// How folders and notes name it.
    pub fn name(self) -> String {
        let system = match self.system {
            System::None => "",
            System::Device => "device",
            System::Ext4 => "ext4",
            System::Xfs => "xfs",
            System::NfsExt4 => "nfs-ext4",
            System::NfsXfs => "nfs-xfs",
        };
        let medium = match self.medium {
            Medium::Own => String::new(),
            Medium::Rotating => "hdd".to_owned(),
            Medium::Striped(n) => format!("raid{n}"),
        };
        match (&medium[..], system) {
            ("", system) => system.to_owned(),
            (medium, "") => medium.to_owned(),
            (medium, system) => format!("{medium}-{system}"),
        }
    }
}

/// A file of an experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Image {
    /// What it holds.
    pub format: Format,
    /// How much of it there is.
    pub state: State,
    /// Where.
    pub place: Place,
    /// Disks of this kind that are served at once, each with a part of the bytes.
    pub disks: u8,
}

impl Image {
    /// It is made once for a run, and not anew for each sample.
    pub fn stays(self) -> bool {
        matches!(
            self.state,
            State::Full | State::Falloc | State::Filled | State::Zeroed
        )
    }
}

/// A raw file that was written full.
pub const RAW: Image = Image {
    format: Format::Raw,
    state: State::Full,
    place: Place::HERE,
    disks: 1,
};
/// A disk without a file.
pub const NULL: Image = Image {
    format: Format::Null,
    ..RAW
};
/// A qcow2 image that was written full, in order.
pub const QCOW2: Image = Image {
    format: Format::Qcow2,
    ..RAW
};

/// One of those that are compared.
#[derive(Clone, Debug)]
pub struct Side {
    /// How tables and charts name it.
    pub name: String,
    /// How it is reached.
    pub how: How,
    /// With what.
    pub image: Image,
    /// How I/O is submitted.
    pub engine: &'static str,
    /// Queues or connections.
    pub queues: u16,
    /// I/O threads (of diskplane).
    pub io_threads: u16,
    /// How it waits.
    pub polling: Polling,
    /// Files are open with `O_DIRECT`.
    pub direct: bool,
    /// Flushes are ignored.
    pub drops_flushes: bool,
    /// Each write is made durable before it is acknowledged.
    pub writethrough: bool,
    /// Each disk has a server of its own.
    pub server_each: bool,
    /// How requests are made.
    pub driver: Driver,
    /// The file system, where there is one on the disk.
    pub client: Client,
    /// Bytes of the metadata cache; by itself where not given.
    pub table_cache: Option<u64>,
    /// Bytes of an entry of it (peers).
    pub table_entry: Option<u64>,
}

/// A side with defaults: one queue, `O_DIRECT`, flushes honoured.
pub fn side(name: impl Into<String>, how: How, image: Image) -> Side {
    Side {
        name: name.into(),
        how,
        image,
        engine: match how {
            How::Served(Server::Qsd | Server::QemuNbd)
            | How::Mounted(Some(Server::QemuNbd))
            | How::Guest(_, None | Some(Server::Qsd | Server::QemuNbd)) => "io_uring",
            _ => "auto",
        },
        queues: 1,
        io_threads: 1,
        polling: Polling::Default,
        direct: true,
        drops_flushes: false,
        writethrough: false,
        server_each: false,
        driver: Driver::USUAL,
        client: Client::EXT4,
        table_cache: None,
        table_entry: None,
    }
}

/// One 4 KiB read at a time, at random.
pub const ONE_READ: Load = Load {
    depth: 1,
    ..RANDREAD
};

/// A figure of a side of a cell, or that by the figure of another side of the same cell.
#[derive(Clone, Debug, Serialize)]
pub struct Term {
    /// The cell.
    pub cell: String,
    /// The side.
    pub side: String,
    /// Divided by this side's, where given.
    pub over: Option<String>,
    /// Or this side's, where that does better (by the medians).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub or: Option<String>,
    /// The figure.
    pub metric: Metric,
}

/// What a document says of two terms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Claim {
    /// The first is more than the second.
    More,
    /// The first is less than the second.
    Less,
    /// They differ by this part at most.
    Equal(f64),
    /// The first is not less than the second by more than this part.
    NotLess(f64),
}

/// Something that a document found, or that diskplane is to reach.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// In a sentence.
    pub says: String,
    /// It is no document's: a goal of ours.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub goal: bool,
    /// The first term.
    pub left: Term,
    /// The second; the number 1 where there is none.
    pub right: Option<Term>,
    /// How they stand to each other.
    pub claim: Claim,
    /// The first by the second as published, where figures were.
    pub published: Option<f64>,
    /// What is otherwise here than it was there, and may turn the answer; empty where nothing is known to.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub otherwise: &'static str,
}

impl Finding {
    /// One of two terms, without figures.
    pub fn new(says: impl Into<String>, left: Term, right: Term, claim: Claim) -> Self {
        Self {
            says: says.into(),
            goal: false,
            left,
            right: Some(right),
            claim,
            published: None,
            otherwise: "",
        }
    }

    /// The same of the first term alone: it is a ratio already.
    pub fn of_ratio(says: impl Into<String>, ratio: Term, claim: Claim) -> Self {
        let of_two = Self::new(says, ratio.clone(), ratio, claim);
        Self {
            right: None,
            ..of_two
        }
    }

    /// With the first by the second as published.
    pub fn published(self, ratio: f64) -> Self {
        Self {
            published: Some(ratio),
            ..self
        }
    }

    /// As a goal of ours.
    pub fn goal(self) -> Self {
        Self { goal: true, ..self }
    }

    /// With what is otherwise here.
    pub fn otherwise(self, otherwise: &'static str) -> Self {
        Self { otherwise, ..self }
    }
}

/// The term of a figure.
pub fn term(cell: &str, side: &str, metric: Metric) -> Term {
    Term {
        cell: cell.to_owned(),
        side: side.to_owned(),
        over: None,
        or: None,
        metric,
    }
}

impl Term {
    /// Divided by another side's.
    pub fn over(self, side: &str) -> Self {
        Self {
            over: Some(side.to_owned()),
            ..self
        }
    }

    /// Or another side's, where that does better.
    pub fn or(self, side: &str) -> Self {
        Self {
            or: Some(side.to_owned()),
            ..self
        }
    }
}
