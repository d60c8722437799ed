//! `diskplane trace`: where the time of requests goes.

mod breakdown;
mod show;
mod watch;

use crate::args::{bytes, format};
use anyhow::Result;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use image::Format;
use io::{Aio, Cache};
use std::path::PathBuf;

/// `trace`.
#[derive(Args, Debug)]
pub struct Trace {
    /// What to show.
    #[command(subcommand)]
    pub what: What,
}

/// The commands of `trace`.
#[derive(Debug, Subcommand)]
pub enum What {
    /// Print the last requests of a running server, a line of JSON each
    Dump(Dump),
    /// Say in which stages time goes: of a running server's next requests, or of an image by a protocol of its own
    Breakdown(Breakdown),
    /// Write the last requests of a running server to a file that Perfetto and Chrome open
    #[command(visible_alias = "chrome")]
    Perfetto(Perfetto),
    /// Show the slowest requests of a running server with their stages
    Slowest(Slowest),
    /// Show the latencies of a running server, stage by stage
    Histogram(Histogram),
    /// Show what a running server does, again and again
    Watch(Watch),
}

/// Which server.
#[derive(Args, Debug)]
pub struct Server {
    /// The server's control socket (serve --control)
    #[arg(long, value_name = "SOCK")]
    pub control: PathBuf,
    /// Only this disk: its number, from 0
    #[arg(long, value_name = "N")]
    pub disk: Option<usize>,
}

/// `trace dump`.
#[derive(Args, Debug)]
pub struct Dump {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub server: Server,
    /// Only this queue: its number
    #[arg(long, value_name = "N", requires = "disk")]
    pub queue: Option<u64>,
    /// So many of each queue's last requests at most [default: all that it remembers]
    #[arg(short = 'n', long, value_name = "N")]
    pub number: Option<u64>,
    /// Go on with those that end, until interrupted
    #[arg(long)]
    pub follow: bool,
}

/// `trace perfetto`.
#[derive(Args, Debug)]
pub struct Perfetto {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub server: Server,
    /// So many of each queue's last requests at most [default: all that it remembers]
    #[arg(short = 'n', long, value_name = "N")]
    pub number: Option<u64>,
    /// The file to write: it must not be there
    pub file: PathBuf,
}

/// `trace slowest`.
#[derive(Args, Debug)]
pub struct Slowest {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub server: Server,
    /// So many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
    pub number: usize,
    /// Of the requests that each queue remembers, not of all since the disk is served (of which a queue keeps 32)
    #[arg(long)]
    pub recent: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `trace histogram`.
#[derive(Args, Debug)]
pub struct Histogram {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub server: Server,
    /// Print JSON, with all buckets
    #[arg(long)]
    pub json: bool,
}

/// `trace watch`.
#[derive(Args, Debug)]
pub struct Watch {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub server: Server,
    /// Seconds between looks
    #[arg(long, value_name = "S", default_value = "1", value_parser = interval)]
    pub interval: f64,
    /// End after so many
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
}

/// Which requests a breakdown makes or looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
#[allow(missing_docs)]
pub enum Asked {
    Read,
    RandRead,
    Write,
    RandWrite,
    Flush,
}

/// How a breakdown reaches its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Over {
    VhostUser,
    Nbd,
}

/// `trace breakdown`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("subject").args(["file", "control"]).required(true)))]
pub struct Breakdown {
    /// A running server's control socket: wait for its next requests, and say where their time went
    #[arg(long, value_name = "SOCK")]
    pub control: Option<PathBuf>,
    /// With --control: only this disk
    #[arg(long, value_name = "N", requires = "control")]
    pub disk: Option<usize>,
    /// With --control: give up after so many seconds
    #[arg(long, value_name = "S", default_value = "60", value_parser = interval, requires = "control")]
    pub wait: f64,
    /// Format of the image: needed for raw, known by its magic otherwise
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// How FILE is served
    #[arg(
        long,
        value_name = "EXPORT",
        default_value = "vhost-user",
        conflicts_with = "control"
    )]
    pub over: Over,
    /// Which requests to make of FILE; writes destroy what is in it, and before each flush a block is read and written again. With --control: which ones count [default: read; all]
    #[arg(long, value_name = "PATTERN")]
    pub rw: Option<Asked>,
    /// Bytes of a request
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = bytes, conflicts_with = "control")]
    pub bs: u64,
    /// Requests of a run
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    pub number: usize,
    /// Requests of each run that are left out: so many of the fastest and of the slowest [default: 10; with --control 0]
    #[arg(long, value_name = "N")]
    pub drop: Option<usize>,
    /// Runs that are averaged
    #[arg(
        long,
        value_name = "N",
        default_value_t = 10,
        conflicts_with = "control"
    )]
    pub runs: usize,
    /// How I/O is submitted: auto, threads, native or io_uring
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = str::parse::<Aio>, conflicts_with = "control")]
    pub aio: Aio,
    /// How the host caches: none, writeback, writethrough, directsync or unsafe
    #[arg(long, value_name = "MODE", default_value = "none", value_parser = str::parse::<Cache>, conflicts_with = "control")]
    pub cache: Cache,
    /// Never sleep while the client is connected, as serve --poll
    #[arg(long, conflicts_with = "control")]
    pub poll: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Image to serve and to ask, or null:SIZE
    pub file: Option<String>,
}

fn interval(text: &str) -> Result<f64> {
    let seconds: f64 = text.parse()?;
    anyhow::ensure!(
        (0.01..=86400.0).contains(&seconds),
        "it must be 0.01 to 86400"
    );
    Ok(seconds)
}

/// Runs a command of `trace`.
pub fn run(args: &Trace) -> Result<()> {
    match &args.what {
        What::Dump(args) => show::dump(args),
        What::Breakdown(args) => breakdown::run(args),
        What::Perfetto(args) => show::perfetto(args),
        What::Slowest(args) => show::slowest(args),
        What::Histogram(args) => show::histogram(args),
        What::Watch(args) => watch::run(args),
    }
}

/// Nanoseconds as microseconds.
fn us(ns: f64) -> String {
    format!("{:.1}", ns / 1000.0)
}
