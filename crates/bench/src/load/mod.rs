//! A load: what is asked of a disk ([`Spec`]), and what came back ([`Report`]).

mod drive;
pub(crate) mod file;
mod latency;
mod merged;
pub(crate) mod nbd;
mod pace;
mod plan;
pub(crate) mod psync;
mod random;
mod run;
pub mod shape;
mod syscalls;
pub mod timeline;
pub(crate) mod turns;
pub(crate) mod usage;
mod verify;
mod vhost;
mod walk;
mod zipf;

pub use latency::{Latencies, Percentiles};
pub(crate) use random::Random;
pub use shape::Shape;
pub use timeline::Timeline;
pub use verify::{FAULTS_MAX, Fault, Kind as FaultKind, Verified, Verify};

use block::{Result, size};
use plan::Kind;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};
use trace::{Buckets, Totals};
use turns::Turns;
use verify::Ledger;

/// Bytes of a request at most.
pub const BLOCK_BYTES_MAX: u64 = 32 << 20;
/// [`Spec::depth`] at most.
pub const DEPTH_MAX: u32 = 2048;
/// [`Spec::queues`] at most.
pub const QUEUES_MAX: u32 = crate::driver::QUEUES_MAX;
/// Bytes of data of all requests in flight at most.
pub const BUFFER_BYTES_MAX: u64 = 4 << 30;

/// Keeps requests in flight at [`Spec::target`] and reports what came back.
///
/// Writes carry bytes that compress badly and differ from slot to slot, and what reads bring is not looked at, unless
/// [`Spec::verify`] says otherwise.
/// Requests in flight when the time is over are waited for and count.
///
/// # Errors
///
/// [`block::ErrorKind::Invalid`] when the target cannot do what is asked, with what to change; else the target is not there,
/// breaks its protocol, vanishes, or answers nothing for [`Spec::answer_max`]. Requests that fail count as
/// [`Report::errors`] and end nothing.
pub fn run(spec: &Spec) -> Result<Report> {
    spec.check()?;
    run_checked(spec, false)
}

/// [`run`] on files that the caller has locked: loads of one process at the same time would lock each other out.
pub(crate) fn run_locked(spec: &Spec) -> Result<Report> {
    spec.check()?;
    run_checked(spec, true)
}

fn run_checked(spec: &Spec, locked: bool) -> Result<Report> {
    let by = By {
        locked,
        ..By::default()
    };
    match &spec.verify {
        Some(verify) => verify::run(spec, verify, by),
        None => run_on(spec, by),
    }
}

/// What goes with a load besides what is asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct By<'a> {
    /// It runs in turns.
    turns: Option<&'a Turns>,
    /// It verifies.
    against: Against<'a>,
    /// Whoever runs it has its files locked.
    locked: bool,
}

/// What a load verifies.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Against<'a> {
    /// What the disk must hold.
    ledger: Option<&'a Ledger>,
    /// The places to read, by number, one after the other; [`Spec::ios_max`] is how many.
    list: Option<&'a [u64]>,
}

/// [`run`], in turns where there are some; what is in flight at the end of a turn does not count.
pub(crate) fn run_by(spec: &Spec, turns: Option<&Turns>) -> Result<Report> {
    spec.check()?;
    let by = By {
        turns,
        ..By::default()
    };
    run_on(spec, by)
}

fn run_on(spec: &Spec, by: By<'_>) -> Result<Report> {
    match &spec.target {
        Target::VhostUser(socket) => vhost::run(spec, socket, by),
        Target::Nbd(uri) => nbd::run(spec, uri, by),
        Target::File {
            path,
            engine,
            direct,
        } => file::run(spec, path, engine, *direct, by),
    }
}

/// Fills a slot's block with what its writes carry.
fn fill(block: &mut [u8], seed: u64, queue: u32, slot: usize) {
    let mut word =
        seed ^ (u64::from(queue) << 32 | slot as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for bytes in block.chunks_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
    }
}

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// A vhost-user-blk server that listens on this socket.
    VhostUser(PathBuf),
    /// An NBD server: `nbd+unix:///EXPORT?socket=PATH`, `nbd://HOST:PORT/EXPORT` or `unix:PATH`.
    Nbd(String),
    /// A file or block device through one of our engines, without any server.
    File {
        /// The file.
        path: PathBuf,
        /// `auto`, `threads`, `native` or `io_uring`; `psync`: none, but a system call for each request, at a depth of 1.
        engine: String,
        /// With `O_DIRECT`.
        direct: bool,
    },
}

impl Target {
    /// Its path or URI.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::VhostUser(path) | Self::File { path, .. } => path.display().to_string(),
            Self::Nbd(uri) => uri.clone(),
        }
    }
}

/// Which requests, as in fio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Sequential, reads and writes mixed by [`Spec::read_percent`], each in a sequence of its own.
    Rw,
    /// Reads at random.
    RandRead,
    /// Writes at random.
    RandWrite,
    /// At random, reads and writes mixed by [`Spec::read_percent`].
    RandRw,
}

impl Pattern {
    /// Whether there are any writes, where so many percent of a mixed pattern are reads.
    pub fn writes(self, read_percent: u8) -> bool {
        match self {
            Self::Read | Self::RandRead => false,
            Self::Write | Self::RandWrite => true,
            Self::Rw | Self::RandRw => read_percent < 100,
        }
    }

    /// Whether there are any reads.
    pub fn reads(self, read_percent: u8) -> bool {
        match self {
            Self::Read | Self::RandRead => true,
            Self::Write | Self::RandWrite => false,
            Self::Rw | Self::RandRw => read_percent > 0,
        }
    }

    /// Whether places are at random.
    pub fn is_random(self) -> bool {
        matches!(self, Self::RandRead | Self::RandWrite | Self::RandRw)
    }

    /// Its name, as in JSON: fio's.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Read => "read",
            Pattern::Write => "write",
            Pattern::Rw => "rw",
            Pattern::RandRead => "randread",
            Pattern::RandWrite => "randwrite",
            Pattern::RandRw => "randrw",
        }
    }
}

/// When flushes are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flushes {
    /// Never.
    #[default]
    Never,
    /// Each of the [`Spec::depth`] slots sends a write, waits for it, sends a flush, waits for it, and so on.
    AfterEachWrite,
    /// Each slot sends a flush after this many of its writes.
    Every(u32),
}

/// What to ask of a disk. The defaults are fio's habits: 4 KiB at random, depth 32, one queue, five seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Where requests go.
    pub target: Target,
    /// Which requests.
    pub pattern: Pattern,
    /// Percent of reads in the mixed patterns.
    pub read_percent: u8,
    /// Bytes of a request, the most where they differ ([`Shape::reads`]): a multiple of 512.
    pub block_bytes: u64,
    /// Requests in flight on each queue.
    pub depth: u32,
    /// Virtqueues, NBD connections, or threads on a file. Each has a thread of its own.
    pub queues: u32,
    /// When flushes are sent.
    pub flushes: Flushes,
    /// Requests start at multiples of this from the range's start: a sequential pattern takes one after the other,
    /// the others any. `None`: [`Self::block_bytes`].
    pub stride_bytes: Option<u64>,
    /// First byte of the range that is used.
    pub start_bytes: u64,
    /// Length of that range; `None`: to the end of the disk.
    pub range_bytes: Option<u64>,
    /// How long to measure; zero: until [`Self::ios_max`].
    pub duration: Duration,
    /// How long to run before measuring.
    pub ramp: Duration,
    /// Ends the measurement after this many reads and writes (exactly, where there is no ramp), if that is
    /// earlier. Each queue has an equal share.
    pub ios_max: Option<u64>,
    /// Spin for completions instead of sleeping.
    pub poll: bool,
    /// Reads and writes per second of all queues together, at even distances, whatever has ended until then (open loop): a
    /// latency counts from when its request was due, also where it had to wait for one of [`Self::depth`] places. `None`: as
    /// fast as [`Self::depth`] requests at a time go.
    #[serde(default)]
    pub rate: Option<f64>,
    /// How long each of [`Self::depth`] places waits after an answer before it asks again (closed loop).
    #[serde(default)]
    pub think: Duration,
    /// Blocks carry what they are, and reads are compared with what must be there.
    #[serde(default)]
    pub verify: Option<Verify>,
    /// What jobs of fio ask for besides.
    #[serde(default, skip_serializing_if = "is_plain")]
    pub shape: Shape,
    /// Random patterns ask for places by Zipf's law with this exponent. `None`: all alike.
    #[serde(default)]
    pub zipf: Option<f64>,
    /// Entries of a virtqueue: a power of two, unless it is packed.
    pub ring_entries: u16,
    /// Packed virtqueues, which the server must offer (vhost-user).
    #[serde(default)]
    pub packed: bool,
    /// Use indirect descriptors where offered (vhost-user).
    pub indirect: bool,
    /// Use the event index where offered (vhost-user).
    pub event_index: bool,
    /// Bytes, less than 4096, by which buffers lie behind multiples of that (vhost-user): a server that bypasses the page cache
    /// has to copy what does not lie as its device wants it.
    #[serde(default)]
    pub misalign_bytes: u64,
    /// How long the target may leave all requests unanswered; zero: for ever.
    #[serde(default = "a_minute")]
    pub answer_max: Duration,
    /// Seed of offsets and of the mix.
    pub seed: u64,
    /// Processes whose CPU time is the server's.
    pub server_pids: Vec<u32>,
    /// Count the servers' system calls. The kernel takes a longer way through each of them then: what is timed is slower for it.
    #[serde(default)]
    pub count_syscalls: bool,
    /// The control socket of a diskplane server, which is asked for the time that requests spend in its stages.
    #[serde(default)]
    pub control: Option<PathBuf>,
}

fn a_minute() -> Duration {
    Duration::from_secs(60)
}

fn is_plain(shape: &Shape) -> bool {
    *shape == Shape::default()
}

/// A load in a few words.
pub fn title(pattern: Pattern, block_bytes: u64, depth: u32) -> String {
    let block = size::human(block_bytes);
    format!("{} of {block}, depth {depth}", pattern.name())
}

impl Spec {
    /// It in a few words.
    pub fn title(&self) -> String {
        let mut least = self.block_bytes;
        for (kind, sizes) in [
            (Kind::Read, &self.shape.reads),
            (Kind::Write, &self.shape.writes),
        ] {
            if let Some(sizes) = sizes.as_ref().filter(|_| self.has(kind)) {
                least = least.min(sizes.bounds().0);
            }
        }
        let (pattern, depth) = (self.pattern.name(), self.depth);
        match least == self.block_bytes {
            true => title(self.pattern, self.block_bytes, depth),
            false => format!(
                "{pattern} of {} to {}, depth {depth}",
                size::human(least),
                size::human(self.block_bytes)
            ),
        }
    }

    /// The default load on `target`.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            pattern: Pattern::RandRead,
            read_percent: 70,
            block_bytes: 4096,
            depth: 32,
            queues: 1,
            flushes: Flushes::Never,
            stride_bytes: None,
            start_bytes: 0,
            range_bytes: None,
            duration: Duration::from_secs(5),
            ramp: Duration::ZERO,
            ios_max: None,
            poll: false,
            rate: None,
            think: Duration::ZERO,
            verify: None,
            shape: Shape::default(),
            zipf: None,
            ring_entries: 128,
            packed: false,
            indirect: true,
            event_index: true,
            misalign_bytes: 0,
            answer_max: a_minute(),
            seed: 1,
            server_pids: Vec::new(),
            count_syscalls: false,
            control: None,
        }
    }
}

/// What came back while measuring.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Seconds that were measured.
    pub seconds: f64,
    /// Reads that ended.
    pub reads: u64,
    /// Writes that ended.
    pub writes: u64,
    /// Flushes that ended.
    pub flushes: u64,
    /// Trims (discards) that ended: of fio's jobs, our own generators make none.
    #[serde(default)]
    pub trims: u64,
    /// Requests that ended with an error; the load goes on.
    pub errors: u64,
    /// Requests that ended with an error before or after what was measured: in the ramp, or when a turn was over.
    #[serde(default)]
    pub errors_besides: u64,
    /// Requests of a rate that were due while it was measured and never sent, since all of [`Spec::depth`] were in flight to the end. They
    /// are in no other count than those of the latencies, where they have what they waited: that is the least that they would have taken.
    #[serde(default)]
    pub unsent: u64,
    /// Bytes read, written and trimmed.
    pub bytes: u64,
    /// Reads, writes and trims together, per second.
    pub iops: f64,
    /// 10^6 bytes read, written and trimmed per second.
    pub mb_s: f64,
    /// Latency of reads.
    pub read_latency: Percentiles,
    /// Latency of writes.
    pub write_latency: Percentiles,
    /// Latency of flushes.
    pub flush_latency: Percentiles,
    /// Latency of trims.
    #[serde(default)]
    pub trim_latency: Percentiles,
    /// Latency of reads, writes and trims together.
    pub latency: Percentiles,
    /// Notifications to the server (kicks, or `send` calls; on a file system calls that submit) per request.
    pub kicks_per_io: f64,
    /// Notifications from the server (calls, or `recv` calls; on a file system calls that wait) per request.
    pub calls_per_io: f64,
    /// CPU time of [`Spec::server_pids`], user and system, in microseconds per read or write (per flush if there are only
    /// those).
    pub server_cpu_us_per_io: Option<f64>,
    /// Of that the part in user mode; the rest is the kernel's. From the kernel's ticks of 10 ms.
    pub server_user_us_per_io: Option<f64>,
    /// CPU time of this process, the same way.
    pub client_cpu_us_per_io: f64,
    /// Of that the part in user mode.
    pub client_user_us_per_io: f64,
    /// Voluntary and involuntary context switches of the servers per request.
    pub server_switches_per_io: Option<f64>,
    /// System calls of the servers per request, where [`Spec::count_syscalls`] asks for that.
    #[serde(default)]
    pub server_syscalls_per_io: Option<f64>,
    /// Page faults of the servers per request.
    #[serde(default)]
    pub server_faults_per_io: Option<f64>,
    /// Those of them that had to wait for a device.
    #[serde(default)]
    pub server_major_faults_per_io: Option<f64>,
    /// Resident memory of the servers at the end, in bytes.
    pub server_rss_bytes: Option<u64>,
    /// The most that they had resident since they were started, in bytes.
    #[serde(default)]
    pub server_peak_bytes: Option<u64>,
    /// Of their resident memory what is anonymous: the guest's memory is shared, and the program's text is a file's.
    #[serde(default)]
    pub server_anonymous_bytes: Option<u64>,
    /// What requests spent in the server's stages meanwhile, by operation, of all its disks; empty without [`Spec::control`].
    #[serde(default)]
    pub stages: BTreeMap<String, Totals>,
    /// What [`Spec::verify`] has found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<Verified>,
    /// All latencies of reads and writes; in records beside the report, not in it.
    #[serde(skip)]
    pub histogram: Buckets,
    /// Those of reads, of writes and of flushes, likewise.
    #[serde(skip)]
    pub kinds: [Buckets; 3],
    /// When they were how long, likewise.
    #[serde(skip)]
    pub timeline: timeline::Stored,
}

impl Report {
    /// Requests that failed, measured or not.
    pub fn failed(&self) -> u64 {
        self.errors + self.errors_besides
    }

    /// What follows from counts and latencies alone, of `seconds` that are not zero.
    pub(crate) fn counted(
        seconds: f64,
        bytes: u64,
        (reads, read_latency): (u64, &Latencies),
        (writes, write_latency): (u64, &Latencies),
    ) -> Self {
        let mut both = read_latency.clone();
        both.merge(write_latency);
        Self {
            seconds,
            reads,
            writes,
            bytes,
            iops: (reads + writes) as f64 / seconds,
            mb_s: bytes as f64 / seconds / 1e6,
            read_latency: read_latency.percentiles(),
            write_latency: write_latency.percentiles(),
            latency: both.percentiles(),
            histogram: both.histogram(),
            kinds: [
                read_latency.histogram(),
                write_latency.histogram(),
                Buckets::default(),
            ],
            ..Self::default()
        }
    }
}
