//! Load on a file system: the scenarios of FFSB (the Flexible File System Benchmark) that studies of virtual disks measure.
//!
//! ```text
//!   DIR/ffsb/.diskplane-bench      says that all of it is ours: without it nothing is removed
//!   DIR/ffsb/set.json      what files there are: who finds the same set uses it again
//!   DIR/ffsb/data/f0 …     files of one size, written in full, that are read and written   (set)
//!   DIR/ffsb/mail/00/0 …   a mail server's: many, of many sizes, in directories
//!   DIR/ffsb/new/T-N       files that the threads create, gone at the end, with their folder
//! ```
//!
//! Each thread works as a program would: it picks a file, opens it, does its share, closes it ([`Scenario`] says which share),
//! and times every read and write of a block. One `read` or `write` call is in flight for each thread.

mod run;
mod set;
mod work;

pub use run::{Prepared, clean, prepare, run};

use crate::{load::Report, record::Sample, sampling};
use block::{Error, Result, size};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{path::PathBuf, str::FromStr, time::Duration};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Threads at most.
pub const THREADS_MAX: usize = 1024;
/// Files of a set at most.
pub const FILES_MAX: usize = 10_000_000;
/// What files and blocks are multiples of with `O_DIRECT`.
const GRAIN: u64 = 4 * KIB;

/// What threads do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Create a file, write it in order, close it, and so on; blocks of 256 KiB.
    #[serde(rename = "large-creates-256k")]
    LargeCreates256k,
    /// Read a whole file in order, then another; blocks of 256 KiB.
    #[serde(rename = "seq-reads-256k")]
    SequentialReads256k,
    /// As the first, in blocks of 8 KiB.
    #[serde(rename = "large-creates-8k")]
    LargeCreates8k,
    /// As the second, in blocks of 8 KiB.
    #[serde(rename = "seq-reads-8k")]
    SequentialReads8k,
    /// Open a file, read 5 MiB of it in blocks of 8 KiB at random, close it.
    RandomReads,
    /// Open a file, write 5 MiB of it in blocks of 8 KiB at random, close it.
    RandomWrites,
    /// Among files of many sizes in directories: read one (60 %), write a block of one (16 %), create one (12 %), delete one (12 %).
    MailServer,
    /// As random reads and random writes in turn, 70 % of the blocks are read.
    Mixed,
}

impl Scenario {
    /// All of them, in the order of the studies.
    pub const ALL: [Self; 8] = [
        Self::LargeCreates256k,
        Self::SequentialReads256k,
        Self::LargeCreates8k,
        Self::SequentialReads8k,
        Self::RandomReads,
        Self::RandomWrites,
        Self::MailServer,
        Self::Mixed,
    ];

    /// As records and the command line name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LargeCreates256k => "large-creates-256k",
            Self::SequentialReads256k => "seq-reads-256k",
            Self::LargeCreates8k => "large-creates-8k",
            Self::SequentialReads8k => "seq-reads-8k",
            Self::RandomReads => "random-reads",
            Self::RandomWrites => "random-writes",
            Self::MailServer => "mail-server",
            Self::Mixed => "mixed",
        }
    }

    /// Bytes of a block.
    pub fn block(self) -> u64 {
        match self {
            Self::LargeCreates256k | Self::SequentialReads256k => 256 * KIB,
            _ => 8 * KIB,
        }
    }

    /// It creates its files itself.
    pub fn creates(self) -> bool {
        matches!(self, Self::LargeCreates256k | Self::LargeCreates8k)
    }

    /// It changes nothing.
    pub fn only_reads(self) -> bool {
        matches!(
            self,
            Self::SequentialReads256k | Self::SequentialReads8k | Self::RandomReads
        )
    }
}

impl FromStr for Scenario {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|own| own.name() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::invalid(format!("there is no scenario '{text}'; there are {names}"))
        })
    }
}

/// A load on a directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Where; what is made lies in `ffsb` below.
    pub dir: PathBuf,
    /// What threads do.
    pub scenario: Scenario,
    /// How many.
    pub threads: usize,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Files of the set.
    pub files: usize,
    /// Bytes of each, also of those that are created; of a mail server's the largest.
    pub file_bytes: u64,
    /// Directories of a mail server.
    pub directories: usize,
    /// Bytes that created files take at most, together: then a thread deletes its oldest.
    pub space_bytes: u64,
    /// With `O_DIRECT`; sizes are multiples of 4 KiB then.
    pub direct: bool,
    /// What was written is made durable before a file is closed.
    pub fsync: bool,
    /// How long to measure.
    pub duration: Duration,
    /// How long to run before.
    pub ramp: Duration,
    /// End after so many blocks.
    pub ios_max: Option<u64>,
    /// Files of the set are holes: what is written takes new blocks of the file system.
    pub sparse: bool,
    /// A set that is there is as it was made, also a mail server's: an overlay over a disk that has it.
    pub pristine: bool,
    /// Seed of what is picked.
    pub seed: u64,
    /// Processes whose CPU time counts as the server's.
    pub server_pids: Vec<u32>,
    /// The control socket of the diskplane below, which is asked for the time that requests spend in its stages.
    #[serde(default)]
    pub control: Option<PathBuf>,
}

impl Spec {
    /// The scenario with `O_DIRECT`, on so many bytes: 16 files and a mail server's 100,000 of 1 KiB to 1 MiB in 100 directories where
    /// there is room, fewer and smaller ones where not.
    pub fn new(dir: PathBuf, scenario: Scenario, threads: usize, bytes: u64) -> Self {
        let mail = scenario == Scenario::MailServer;
        // On average a mail is an eighth of the largest.
        let files = match mail {
            true => usize::try_from(bytes / (MIB / 7))
                .unwrap_or(usize::MAX)
                .clamp(100, 100_000),
            false => 16,
        };
        let each = (bytes / 16).clamp(MIB, 1 << 30) / MIB * MIB;
        Self {
            dir,
            scenario,
            threads,
            block_bytes: scenario.block(),
            files,
            file_bytes: if mail { MIB } else { each },
            directories: 100,
            space_bytes: bytes,
            direct: true,
            fsync: false,
            duration: Duration::from_secs(5),
            ramp: Duration::ZERO,
            ios_max: None,
            sparse: false,
            pristine: false,
            seed: 1,
            server_pids: Vec::new(),
            control: None,
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = [
            (
                !(1..=THREADS_MAX).contains(&self.threads),
                format!("{} threads: it must be 1 to {THREADS_MAX}", self.threads),
            ),
            (
                self.block_bytes == 0 || self.block_bytes > 32 * MIB,
                "blocks: they must have 1 byte to 32 MiB".to_owned(),
            ),
            (
                self.direct && !self.block_bytes.is_multiple_of(GRAIN),
                format!(
                    "blocks of {}: with O_DIRECT they must be a multiple of 4 KiB (or give --buffered)",
                    size::human(self.block_bytes)
                ),
            ),
            (
                self.file_bytes < self.block_bytes.max(GRAIN),
                format!(
                    "files of {}: they must have a block of {}, and 4 KiB",
                    size::human(self.file_bytes),
                    size::human(self.block_bytes)
                ),
            ),
            (
                !(1..=FILES_MAX).contains(&self.files),
                format!("{} files: it must be 1 to {FILES_MAX}", self.files),
            ),
            (
                !(1..=100_000).contains(&self.directories),
                format!("{} directories: it must be 1 to 100000", self.directories),
            ),
            (
                self.duration.is_zero() && self.ios_max.is_none(),
                "no time and no number of blocks: it would never end".to_owned(),
            ),
        ];
        match wrong.into_iter().find(|(wrong, _)| *wrong) {
            Some((_, what)) => Err(Error::invalid(what)),
            None => Ok(()),
        }
    }
}

/// What files a load did things to, besides their blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Files that were opened.
    pub opened: u64,
    /// Files that were created.
    pub created: u64,
    /// Files that were deleted.
    pub deleted: u64,
    /// Files that were gone when they were to be opened: another thread had deleted them.
    pub missed: u64,
}

/// What came back.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Blocks, their latencies, CPU; its flushes are the `fsync` calls.
    pub report: Report,
    /// Files.
    pub counts: Counts,
}

impl Outcome {
    /// As a sample of a cell that is named after the scenario and its threads; its side is left to say.
    ///
    /// # Errors
    ///
    /// No block was read or written.
    pub fn sample(&self, spec: &Spec) -> Result<Sample> {
        let measured = sampling::figures(std::slice::from_ref(&self.report), &[])?;
        Ok(Sample {
            cell: format!("{}-{}", spec.scenario.name(), spec.threads),
            engine: "threads".to_owned(),
            seed: spec.seed,
            axes: vec![
                ("scenario".to_owned(), spec.scenario.name().to_owned()),
                ("threads".to_owned(), spec.threads.to_string()),
            ],
            metrics: measured.metrics,
            latency: measured.latency,
            timeline: measured.timeline,
            detail: json!({ "specs": [spec], "reports": measured.reports, "files": self.counts }),
            ..Sample::default()
        })
    }
}
