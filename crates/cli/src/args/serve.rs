//! `serve`.

use super::{bytes, format, name};
use crate::{disks::DiskArgument, secret::Keys};
use block::Result;
use clap::builder::TypedValueParser as _;
use clap::{ArgGroup, Args, ValueEnum};
use export::{nbd::NbdAddress, worker::Polling};
use image::Format;
use io::{Aio, Cache};
use std::path::PathBuf;

/// What becomes of a guest's discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// Give the space back to the host
    Unmap,
    /// Ignore them
    Ignore,
}

/// How statistics are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Stats {
    /// For people
    #[default]
    Table,
    /// One line of JSON per disk: {"disk": FILE, "statistics": {…}}
    Json,
}

/// QEMU's names, and ours for what it has none for.
fn cache(text: &str) -> Result<Cache> {
    match text {
        "direct-unsafe" => Ok(Cache::DirectUnsafe),
        _ => text.parse(),
    }
}

/// `serve`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("socket").args(["vhost_user", "nbd", "disk"]).required(true).multiple(true)))]
pub struct Serve {
    /// Format of the image: needed for raw, known by its magic otherwise
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Image to serve, or null:SIZE
    #[arg(required_unless_present = "disk", value_parser = name())]
    pub file: Option<String>,
    /// Serve it over vhost-user-blk on this Unix socket
    #[arg(long, value_name = "SOCK")]
    pub vhost_user: Option<PathBuf>,
    /// Serve it over NBD at unix:PATH or HOST:PORT
    #[arg(long, value_name = "unix:PATH|HOST:PORT", value_parser = str::parse::<NbdAddress>)]
    pub nbd: Option<NbdAddress>,
    /// Serve this disk too, on the same I/O threads; may be given many times. Keys: vhost-user=SOCK,
    /// nbd=ADDRESS, format=FMT, queues=N, read-only=on|off, data-file=PATH, snapshot=NAME; what it does not say is as for all disks
    #[arg(long, value_name = "FILE,K=V,…", value_parser = name().try_map(|text| text.parse::<DiskArgument>()))]
    pub disk: Vec<DiskArgument>,
    /// Queues that a virtual machine may use
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: u16,
    /// Threads that do the I/O
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub io_threads: u16,
    /// Never sleep while a client is connected: each of these threads takes a core for the lowest latency
    #[arg(long, conflicts_with = "poll_max")]
    pub poll: bool,
    /// Look for so many microseconds at most for a client's next request before sleeping, where that mostly comes sooner, and half
    /// as long for devices; 0: sleep at once
    #[arg(long, value_name = "US", default_value_t = Polling::DEFAULT_US)]
    pub poll_max: u64,
    /// How I/O is submitted: auto, threads, native or io_uring
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = str::parse::<Aio>)]
    pub aio: Aio,
    /// How the host caches: none, writeback, writethrough, directsync or unsafe; or direct-unsafe, which is none
    /// with flushes ignored: a crash of the host loses data
    #[arg(long, value_name = "MODE", default_value = "writeback", value_parser = cache)]
    pub cache: Cache,
    /// Most memory for each image's metadata cache [default: what covers the disk, 64M at most]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub metadata_cache: Option<u64>,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// Serve FILE's internal snapshot of that id, or else name
    #[arg(long, value_name = "NAME", requires_all = ["file", "read_only"])]
    pub snapshot: Option<String>,
    /// Allow --vhost-user and --nbd at the same time
    #[arg(long)]
    pub shared: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// What becomes of discards
    #[arg(long, value_name = "MODE", default_value = "unmap")]
    pub discard: Discard,
    /// Flush only when asked to; otherwise, where a client flushes after its writes again and again, the next flush begins while
    /// the answer to the write is on its way
    #[arg(long)]
    pub no_flush_ahead: bool,
    /// Never write zeros to space of an image before it is used; otherwise, where a client flushes after each few small writes to a
    /// growing qcow2 image (O_DIRECT, ext4 or xfs), the flushes need no commit of the file system's journal then, for one more write of
    /// each cluster in its life
    #[arg(long)]
    pub no_prewrite: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory; an NBD export's name lets images
    /// lie on that export
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// The image's external data file, whatever name the image has for it
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,
    /// Tell whoever may connect to this Unix socket (mode 0600) how the disks do: for `trace`
    #[arg(long, value_name = "SOCK")]
    pub control: Option<PathBuf>,
    /// Requests that each queue remembers with the times of their stages, for `trace`: 64 bytes each, rounded up to a power
    /// of two; 0 for none
    #[arg(long, value_name = "N", default_value_t = ::trace::RING_ENTRIES_DEFAULT, value_parser = clap::value_parser!(u32).range(0..=i64::from(::trace::RING_ENTRIES_MAX)))]
    pub trace_ring: u32,
    /// Print statistics to stderr at the end (and, as always, on SIGUSR1): table, or json for one line per disk
    #[arg(long, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub stats: Option<Stats>,
}
