//! What is compared, as data: cells, their sides and their bars.

use crate::load::{self, Flushes, Pattern, Spec, Target};
use serde::{Deserialize, Serialize};

pub use crate::metric::Metric;

/// One comparison: a load on several sides in turn, and what the first side must reach.
#[derive(Clone, Debug)]
pub struct Cell {
    /// How it is named on the command line.
    pub name: &'static str,
    /// The line of the table in issue 4 ("Ahead of every peer on the data path"), of issue 5 ("Speed") or of issue 6 ("Where latency
    /// goes"), that it stands for.
    pub line: &'static str,
    /// What it shows, in a sentence or two.
    pub meaning: &'static str,
    /// The load; a side may have its own.
    pub load: Load,
    /// Who takes part; the first one is judged.
    pub sides: &'static [Side],
    /// What it must reach.
    pub bars: &'static [Bar],
    /// Cores that the host must have for the bars to mean anything.
    pub cores: usize,
}

/// A load, without where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Which requests.
    pub pattern: Pattern,
    /// Percent of reads in the mixed patterns.
    pub reads: u8,
    /// Bytes of a request.
    pub block: u64,
    /// Requests in flight per queue.
    pub depth: u32,
    /// When flushes are sent.
    pub flushes: Flushes,
    /// The driver spins instead of sleeping.
    pub poll: bool,
    /// Distance between requests; for random ones the grid that they lie on.
    pub stride: Option<u64>,
    /// Bytes by which the host's files grow with each request at most: ends a sample before the disk is full.
    pub grows: u64,
    /// Seconds before measuring, on top of what every sample has.
    pub warm: f64,
    /// No requests at all: clients connect and rest.
    pub idle: bool,
}

impl Load {
    /// Whether it changes what it finds.
    pub(crate) fn writes(&self) -> bool {
        self.pattern.writes(self.reads)
    }

    /// In a few words.
    pub(crate) fn title(&self) -> String {
        load::title(self.pattern, self.block, self.depth)
    }

    /// It on `target`, through `queues` queues; how long, where and with which seed is left to say.
    pub(crate) fn spec(&self, target: Target, queues: u16) -> Spec {
        Spec {
            pattern: self.pattern,
            read_percent: self.reads,
            block_bytes: self.block,
            depth: self.depth,
            queues: u32::from(queues),
            flushes: self.flushes,
            stride_bytes: self.stride,
            poll: self.poll,
            ..Spec::new(target)
        }
    }
}

/// No load: the sides are commands.
pub const NONE: Load = Load {
    idle: true,
    ..RANDREAD
};

/// 4 KiB reads at random, 32 in flight.
pub const RANDREAD: Load = Load {
    pattern: Pattern::RandRead,
    reads: 70,
    block: 4 << 10,
    depth: 32,
    flushes: Flushes::Never,
    poll: false,
    stride: None,
    grows: 0,
    warm: 0.0,
    idle: false,
};

/// 4 KiB writes at random, 32 in flight.
pub const RANDWRITE: Load = Load {
    pattern: Pattern::RandWrite,
    ..RANDREAD
};

/// Who answers requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Server {
    /// `diskplane serve --vhost-user`.
    Diskplane,
    /// The same without records of its requests (`--trace-ring 0`).
    DiskplaneUntraced,
    /// `diskplane serve --nbd`.
    DiskplaneNbd,
    /// `qemu-storage-daemon` over vhost-user-blk, with each of its engines.
    Qsd,
    /// `qemu-nbd`, with each of its engines.
    QemuNbd,
    /// `nbdkit` with its file plugin, which reads and writes by threads of its own and has no `O_DIRECT`.
    Nbdkit,
    /// SPDK's vhost target.
    Spdk,
    /// fio on the file itself: bare metal.
    Fio,
    /// A `diskplane` command on closed images; the side's [`Job`] says which.
    Tool,
    /// The same by `qemu-img`, with each set of options that a knowing user may give it.
    QemuImg,
}

impl Server {
    /// Whether it is `diskplane serve`.
    pub fn is_ours(self) -> bool {
        matches!(
            self,
            Self::Diskplane | Self::DiskplaneUntraced | Self::DiskplaneNbd
        )
    }
}

/// What a command does with closed images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// `convert` of the side's image; `durable`: what was written is on the disk when it ends (diskplane's default;
    /// qemu-img's is not to wait for it: `-t unsafe`).
    Convert {
        /// Format of the target.
        to: &'static str,
        /// It is compressed, by this method.
        packed: Option<&'static str>,
        /// See above.
        durable: bool,
    },
    /// `check`.
    Check,
    /// `map`, as JSON.
    Map,
    /// `measure` for a qcow2 image.
    Measure,
    /// `compare` of the raw and the qcow2 image with the same disk.
    Compare,
}

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Image {
    /// Zeros, without a file.
    Null,
    /// A raw file, written full.
    Raw,
    /// A qcow2 image of the same size, written full in order.
    Qcow2,
    /// An empty qcow2 image, new for each sample.
    Growing,
    /// A raw file, preallocated and never written, new for each sample.
    Unwritten,
    /// An empty overlay with 64 KiB clusters and without subclusters over a raw base full of data, new for each sample.
    Overlay,
    /// The same with subclusters.
    Subclusters,
    /// qcow2 of 1 TiB with 64 GiB of scattered clusters.
    Scattered,
    /// The host file of [`Image::Scattered`], as a raw disk.
    ScatteredFile,
    /// The raw base of overlays.
    Base,
    /// A raw disk of which half is data in runs of 1 MiB and more, half of that compressible; the rest are holes.
    HalfRaw,
    /// A smaller one of the same kind: compressing takes long.
    PackRaw,
    /// The disk of [`Image::HalfRaw`] as qcow2.
    HalfQcow2,
    /// qcow2 of 1 TiB with 2^18 scattered clusters; of less in a quick run.
    Sparse,
    /// This many raw files, each written full, served by one process.
    Several(u8),
    /// This many small raw files, served by one process.
    Many(u8),
}

/// Whether a server spins for requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Polling {
    /// As it comes.
    Default,
    /// It sleeps whenever there is nothing to do.
    Never,
    /// It spins for a bounded time, then sleeps.
    Adaptive,
    /// It spins always.
    Busy,
}

/// One of those that are compared.
#[derive(Clone, Debug)]
pub struct Side {
    /// How tables name it.
    pub name: &'static str,
    /// Who answers.
    pub server: Server,
    /// With what.
    pub image: Image,
    /// Virtqueues or connections.
    pub queues: u16,
    /// I/O threads (of diskplane).
    pub io_threads: u16,
    /// How it waits.
    pub polling: Polling,
    /// Its own load.
    pub load: Option<Load>,
    /// What it does, where it is a command.
    pub job: Option<Job>,
}

/// A side with one queue and defaults.
pub const fn side(name: &'static str, server: Server, image: Image) -> Side {
    Side {
        name,
        server,
        image,
        queues: 1,
        io_threads: 1,
        polling: Polling::Default,
        load: None,
        job: None,
    }
}

impl Side {
    /// With `queues` queues or connections.
    pub const fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// With `threads` I/O threads.
    pub const fn io_threads(mut self, threads: u16) -> Self {
        self.io_threads = threads;
        self
    }

    /// Waiting as `polling` says.
    pub const fn polling(mut self, polling: Polling) -> Self {
        self.polling = polling;
        self
    }

    /// Under another load than the cell's.
    pub const fn load(mut self, load: Load) -> Self {
        self.load = Some(load);
        self
    }

    /// Doing `job`.
    pub const fn job(mut self, job: Job) -> Self {
        self.job = Some(job);
        self
    }
}

/// What a figure is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Against {
    /// The ratio to the same figure of the side with this name; of several engines to the best.
    Side(&'static str),
    /// The ratio to another figure of the side with this name.
    Other(&'static str, Metric),
    /// What it has more than the side with this name.
    Above(&'static str),
    /// The figure itself.
    Alone,
}

/// The bound.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// ≥
    AtLeast(f64),
    /// ≤
    AtMost(f64),
    /// <
    Below(f64),
    /// No bound; shown beside the others.
    Shown,
    /// No bound, since who is beside is not equal: why.
    Unequal(&'static str),
}

/// One thing that the first side of a cell must reach.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// The figure.
    pub metric: Metric,
    /// Beside what.
    pub against: Against,
    /// The bound.
    pub limit: Limit,
}

/// At least `times` the side's figure.
pub const fn at_least(metric: Metric, side: &'static str, times: f64) -> Bar {
    Bar {
        metric,
        against: Against::Side(side),
        limit: Limit::AtLeast(times),
    }
}

/// At most `times` the side's figure.
pub const fn at_most(metric: Metric, side: &'static str, times: f64) -> Bar {
    Bar {
        metric,
        against: Against::Side(side),
        limit: Limit::AtMost(times),
    }
}

/// Shown beside a side's figure, without a bound.
pub const fn shown(metric: Metric, side: &'static str) -> Bar {
    Bar {
        metric,
        against: Against::Side(side),
        limit: Limit::Shown,
    }
}

/// Shown beside the figure of a side that is not equal, and why it is not.
pub const fn unequal(metric: Metric, side: &'static str, why: &'static str) -> Bar {
    Bar {
        metric,
        against: Against::Side(side),
        limit: Limit::Unequal(why),
    }
}

impl Limit {
    /// Nothing is reached or missed.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Shown | Self::Unequal(_))
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
            Self::Below(bound) => write!(f, "< {bound}"),
            Self::Shown | Self::Unequal(_) => f.write_str("–"),
        }
    }
}
