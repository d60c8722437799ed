//! What a measurement leaves: one schema for comparisons and experiments, JSON lines, told apart by `record`.
//!
//! - `run` ([`Run`]): when, with what command, on what machine; first in the file, and again when a run is resumed;
//! - `sample` ([`Sample`]): one side of a cell once: every [`Metric`] by its name, all latencies as a histogram and over
//!   time, times of stages, what the server had open, its command line and whole reports;
//! - `cell`: a comparison's [`Outcome`](crate::versus::Outcome), or what an experiment says of a cell ([`crate::experiment`]);
//! - `failure` ([`Failure`]): a side of a cell that could not be measured, and why;
//! - other kinds are ignored by those who do not know them.
//!
//! Readers of a schema read earlier ones, and refuse later ones. [`csv()`] makes a table of the samples, with
//! their configuration and the run's surroundings.

mod csv;
mod noise;
mod older;
mod store;

pub use csv::csv;
pub use noise::{NOISY, noise, restless};
pub use store::{Set, append, read};

use crate::{
    load::timeline,
    machine::Host,
    metric::{Metric, Metrics},
    peer::Seen,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};
use trace::{Breakdown, Buckets, Totals};

/// [`Run::schema`] of what is written. 2 added `experiment`, `seconds`, `axes`, `latency`, `timeline` and `stages`. 3 made
/// `stages` the totals of all eight: those of 2 had the means of five, which are read as totals too; it added `flamegraph`,
/// and later `interrupts`, `guest_interrupts`, `breakdown` and `definition`.
pub const SCHEMA: u32 = 3;

/// A line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// The surroundings of what follows.
    Run(Box<Run>),
    /// A measurement.
    Sample(Box<Sample>),
    /// What is said of a cell.
    Cell(Value),
    /// A side of a cell could not be measured.
    Failure(Failure),
    /// Something else.
    #[serde(other)]
    Other,
}

/// The surroundings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Run {
    /// [`SCHEMA`] of the writer.
    pub schema: u32,
    /// `versus`, or the experiment's name.
    pub experiment: String,
    /// When it began, seconds since 1970.
    pub seconds: u64,
    /// The command line, without where things lie on the machine.
    pub command: String,
    /// The machine.
    pub host: Host,
    /// Samples of each side that were asked for.
    pub samples: usize,
    /// Seconds of load before each measurement.
    pub ramp_s: f64,
    /// Seconds of each measurement.
    pub duration_s: f64,
    /// Fewer cells, shorter samples.
    pub quick: bool,
    /// Sizes of the images in bytes, by name; and of an experiment on a device what that is (`device`).
    pub sizes: Value,
    /// What tells the experiment's cells and sides from those of another build of diskplane; empty of a comparison.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub definition: String,
}

/// One side of a cell, measured once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// The cell's name.
    pub cell: String,
    /// The side's.
    pub side: String,
    /// Its I/O engine; `auto` where there is no choice or it chose itself.
    pub engine: String,
    /// From 0. Samples of a round were taken one after the other, and are compared with each other.
    pub round: usize,
    /// All sides were up at the same time and had turns of a tenth of a second, instead of a sample one after the other.
    pub in_turns: bool,
    /// When it ended, seconds since 1970.
    pub seconds: u64,
    /// Seed of the load.
    pub seed: u64,
    /// Where the cell stands in its experiment: names of its factors and their values here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub axes: Vec<(String, String)>,
    /// The figures.
    pub metrics: Metrics,
    /// The server's files, their sizes, whether all are open with `O_DIRECT`, its queues.
    pub seen: Option<Seen>,
    /// All latencies of reads and writes.
    pub latency: Buckets,
    /// When they were how long; of several disks the first one's.
    pub timeline: timeline::Stored,
    /// What requests spent in diskplane's stages while it was measured, by operation, of all disks: from its control socket.
    #[serde(
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "older::stages"
    )]
    pub stages: BTreeMap<String, Totals>,
    /// Interrupts of the machine a second while it was measured, by source (`/proc/interrupts`: a device by its name, the
    /// architecture's by their label).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub interrupts: BTreeMap<String, f64>,
    /// Those in the guest.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub guest_interrupts: BTreeMap<String, f64>,
    /// Where the time of single requests went, by the protocol of the latency study ([`crate::breakdown`]); of the first round of cells
    /// with one request at a time, at our servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub breakdown: Option<Breakdown>,
    /// A flame graph of the server under such a load, by its name beside the records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flamegraph: Option<String>,
    /// The server's command line and the whole [`crate::load::Report`] of each disk with its load, or what fio said.
    pub detail: Value,
}

/// A side that could not be measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The cell's name.
    pub cell: String,
    /// The side's.
    pub side: String,
    /// The reason.
    pub why: String,
}

impl Sample {
    /// A figure of it.
    pub fn metric(&self, metric: Metric) -> Option<f64> {
        self.metrics.get(&metric).copied()
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
