//! The command line. Stable: scripts rely on it.

use crate::{
    bench_load::Load, bench_versus::Versus, bitmap::Bitmap, disks::DiskArgument, resize::NewSize,
    secret::Keys,
};
use block::{Result, size};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use export::nbd::NbdAddress;
use image::Format;
use io::{Aio, Cache};
use std::path::{Path, PathBuf};
use tool::prealloc::Preallocation;

/// Opens virtual disk images, looks after them and serves them to virtual machines.
#[derive(Debug, Parser)]
#[command(name = "diskplane", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create an image
    Create(Create),
    /// Show what an image is
    Info(Info),
    /// Show what an image's ranges are made of
    Map(Map),
    /// Find what is wrong with an image, and repair it
    Check(Check),
    /// Copy a disk into a new image, of another format or compressed
    Convert(Convert),
    /// Copy a part of a disk into a new image
    Dd(Dd),
    /// Find out whether two images have the same content
    Compare(Compare),
    /// Put what an overlay has into its backing file
    Commit(Commit),
    /// Give an image another backing file
    Rebase(Rebase),
    /// Say how large the file of a new image will be
    Measure(Measure),
    /// List, make, apply or delete snapshots inside a qcow2 image
    Snapshot(Snapshot),
    /// Show and change an image's persistent bitmaps
    Bitmap(Bitmap),
    /// Change what a qcow2 image was created with
    Amend(Amend),
    /// Make a disk larger or smaller
    Resize(Resize),
    /// Serve images to virtual machines and NBD clients
    Serve(Serve),
    /// Measure disks and servers
    Bench(Bench),
}

/// `bench`.
#[derive(Args, Debug)]
pub struct Bench {
    /// What to measure.
    #[command(subcommand)]
    pub what: BenchCommand,
}

/// The commands of `bench`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Put load on a server or a file, and report what came back
    Load(Load),
    /// Compare diskplane with its peers and with bare metal, cell by cell
    Versus(Versus),
}

/// `create`.
#[derive(Args, Debug)]
pub struct Create {
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// Format of the new image: raw, qcow2, qed or vhd [default: by FILE's extension, .qcow2, .qed, .vhd, .raw or .img]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Options of the format, as key=value,…: `-o help` lists them
    #[arg(short, long = "option", value_name = "K=V,…")]
    pub options: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// The new image shows what BASE holds wherever it was not written. It gets subclusters, which
    /// make small writes cheap, unless -o extended_l2=off says otherwise
    #[arg(short, long, value_name = "BASE", requires = "backing_format")]
    pub backing: Option<String>,
    /// Format of BASE
    #[arg(short = 'F', long, value_name = "FMT", value_parser = format, requires = "backing")]
    pub backing_format: Option<Format>,
    /// File to create; it must not exist yet
    pub file: PathBuf,
    /// Size of the disk (20G, 512M, …) [default: the size of BASE]
    #[arg(value_parser = bytes)]
    pub size: Option<u64>,
}

/// `convert`.
#[derive(Args, Debug)]
#[command(
    after_help = "DST gets its name when it is complete: an error, a full disk, SIGINT or SIGTERM leave nothing under \
                  it (but devices, and what -n writes into). Several SRC make one disk, one behind the other. \
                  Memory: below 256 MiB, whatever the images are. -c and -n exclude each other: compressed \
                  clusters are written to new images only."
)]
pub struct Convert {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// Passphrase of DST, with -n, or of the encrypted image below it, with -B, by the ID of an --object; for a new
    /// DST itself say -o encrypt.key-secret=ID
    #[arg(long, value_name = "ID")]
    pub target_key_secret: Vec<String>,
    /// Compress (qcow2): every cluster that gets smaller; -o compression_type says how
    #[arg(short = 'c', long, conflicts_with = "no_create")]
    pub compress: bool,
    /// Have the host copy from file to file (reflink, where the file system can) what lies in SRC's file as it is;
    /// that is not searched for zeros
    #[arg(short = 'C', long, conflicts_with_all = ["compress", "sparse", "resume", "salvage"])]
    pub copy_range: bool,
    /// Format of SRC [default: known by its magic, else raw]
    #[arg(short = 'f', long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Format of DST: raw, qcow2, qed or vhd [default: by DST's extension, .qcow2, .qed, .vhd, .raw or .img]
    #[arg(short = 'O', long, value_name = "FMT", value_parser = format)]
    pub target_format: Option<Format>,
    /// Options of DST's format, as key=value,…: `diskplane create -f FMT -o help FILE` lists them
    #[arg(
        short,
        long = "option",
        value_name = "K=V,…",
        conflicts_with = "no_create"
    )]
    pub options: Vec<String>,
    /// Make DST an overlay of BASE: what reads the same there is left out
    #[arg(
        short = 'B',
        short_alias = 'b',
        long,
        value_name = "BASE",
        requires = "backing_format"
    )]
    pub backing: Option<String>,
    /// Format of BASE
    #[arg(short = 'F', long, value_name = "FMT", value_parser = format, requires = "backing")]
    pub backing_format: Option<Format>,
    /// Write into DST, which exists and is large enough; what is behind SRC's size stays
    #[arg(short = 'n', long)]
    pub no_create: bool,
    /// DST, with -n, reads as zeros everywhere: zeros need not be written
    #[arg(long, requires = "no_create", conflicts_with = "backing")]
    pub target_is_zero: bool,
    /// Make a hole where at least so many bytes are zeros; 0: look for none, and give all of DST space. Images with
    /// clusters have holes of whole clusters
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4K", value_parser = sparse)]
    pub sparse: u64,
    /// Copy SRC's internal snapshot of that id, or else name; snapshot.id=ID and snapshot.name=NAME say which
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Copy SRC's persistent bitmaps too (qcow2)
    #[arg(long)]
    pub bitmaps: bool,
    /// Leave out bitmaps that are inconsistent, instead of failing
    #[arg(long, requires = "bitmaps")]
    pub skip_broken_bitmaps: bool,
    /// Take what cannot be read of SRC for zeros, and say where that was
    #[arg(long)]
    pub salvage: bool,
    /// Keep what is done in DST.part where it is cut off, and go on there the next time. What is there is read and
    /// compared with SRC, and written only where it differs: never a byte of an older SRC. Not kept where the host
    /// failed to make it durable
    #[arg(long, conflicts_with_all = ["compress", "no_create"])]
    pub resume: bool,
    /// Write at most so many bytes of data in a second
    #[arg(short = 'r', long, value_name = "SIZE", value_parser = rate)]
    pub rate: Option<u64>,
    /// How the host caches DST: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub cache: Cache,
    /// How the host caches SRC
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub source_cache: Cache,
    /// Threads that compress; without -c, pieces of 512 KiB that are read ahead [default: a thread per core]
    #[arg(short = 'm', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: Option<u16>,
    /// As in qemu-img, where it allows writing in any order; here DST is always written in order
    #[arg(short = 'W', long, conflicts_with = "compress")]
    pub out_of_order: bool,
    /// Show progress also where stderr is no terminal
    #[arg(short, long)]
    pub progress: bool,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Read SRC even while another process writes it: what is copied may never have been on it at once
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// SRC's external data file, whatever name SRC has for it
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,
    /// Images to copy, or null:SIZE; and last the image to make, which must not exist yet, unless -n is given
    #[arg(required = true, num_args = 1.., value_names = ["SRC", "DST"])]
    pub files: Vec<String>,
}

impl Convert {
    /// A copy of one image to another, with the defaults of the command line.
    pub fn of(source: &str, target: &str) -> Self {
        Self {
            keys: Keys::default(),
            target_key_secret: Vec::new(),
            compress: false,
            copy_range: false,
            format: None,
            target_format: None,
            options: Vec::new(),
            backing: None,
            backing_format: None,
            no_create: false,
            target_is_zero: false,
            sparse: tool::convert::SPARSE_BYTES,
            snapshot: None,
            bitmaps: false,
            skip_broken_bitmaps: false,
            salvage: false,
            resume: false,
            rate: None,
            cache: Cache::Writeback,
            source_cache: Cache::Writeback,
            workers: None,
            out_of_order: false,
            progress: false,
            quiet: false,
            json: false,
            force_share: false,
            allow_backing: Vec::new(),
            data_file: None,
            files: vec![source.to_owned(), target.to_owned()],
        }
    }

    /// The images to copy, at least one, and the one to make.
    pub fn files(&self) -> anyhow::Result<(&[String], &Path)> {
        match self.files.split_last() {
            Some((target, sources)) if !sources.is_empty() => Ok((sources, Path::new(target))),
            _ => anyhow::bail!("say what to copy, and where: diskplane convert SRC… DST"),
        }
    }
}

/// `dd`.
#[derive(Args, Debug)]
#[command(
    after_help = "Operands: if=FILE of=FILE, and bs=SIZE (of a block, 512 where not given), count=N, skip=N. As in \
                  qemu-img, count ends what is copied N blocks behind the disk's beginning, and skip leaves the \
                  first N out. Sizes as everywhere: 64K, 1M, …"
)]
pub struct Dd {
    /// Format of the image to copy [default: known by its magic, else raw]
    #[arg(short = 'f', long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Format of the new image [default: raw]
    #[arg(short = 'O', long, value_name = "FMT", value_parser = format)]
    pub target_format: Option<Format>,
    /// Read the image even while another process writes it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Show progress also where stderr is no terminal
    #[arg(short, long)]
    pub progress: bool,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// if=FILE of=FILE bs=SIZE count=N skip=N
    #[arg(required = true, num_args = 1.., value_name = "KEY=VALUE")]
    pub operands: Vec<String>,
}

/// `compare`.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 the same, 1 different, 2 an image cannot be opened, 3 what is allocated cannot be \
                  found out, 4 data cannot be read"
)]
pub struct Compare {
    /// Format of the first image [default: known by its magic, else raw]
    #[arg(short = 'f', long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Format of the second image
    #[arg(short = 'F', long = "second-format", value_name = "FMT", value_parser = format)]
    pub second_format: Option<Format>,
    /// Sizes must be the same too, and what is allocated
    #[arg(short, long)]
    pub strict: bool,
    /// Read the images even while another process writes them
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// How the host caches the images
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub source_cache: Cache,
    /// Show progress also where stderr is no terminal
    #[arg(short, long)]
    pub progress: bool,
    /// Print nothing: the exit status says it
    #[arg(short, long)]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// First image
    pub file1: String,
    /// Second image
    pub file2: String,
}

/// `commit`.
#[derive(Args, Debug)]
#[command(
    after_help = "The base grows where it is smaller. Whatever cuts the work off, the overlay reads as before, and the \
                  work can be done again: it is emptied when all of its data are durable in the base."
)]
pub struct Commit {
    /// Format of the overlay [default: known by its magic]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// The image of the chain that gets the data [default: the backing file]. Images between it and the overlay read
    /// as garbage afterwards; the overlay stays as it is (-d)
    #[arg(short, long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Leave the overlay as it is, instead of emptying it
    #[arg(short, long)]
    pub drop: bool,
    /// Copy at most so many bytes of data in a second
    #[arg(short, long, value_name = "SIZE", value_parser = rate)]
    pub rate: Option<u64>,
    /// How the host caches the images
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub cache: Cache,
    /// Show progress also where stderr is no terminal
    #[arg(short, long)]
    pub progress: bool,
    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Overlay; nobody else may use it, and nobody may use the base
    pub file: PathBuf,
}

/// `rebase`.
#[derive(Args, Debug)]
#[command(
    after_help = "Where the new backing file differs from the old one, the image gets what it shows now. Whatever cuts \
                  the work off, the image is one on its old backing file that reads as before: the new name is \
                  written last, in one sector."
)]
pub struct Rebase {
    /// Format of the image [default: known by its magic]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// The new backing file; a relative name starts at the image's directory. '': none
    #[arg(short, long, value_name = "BASE")]
    pub backing: String,
    /// Its format
    #[arg(short = 'F', long, value_name = "FMT", value_parser = format)]
    pub backing_format: Option<Format>,
    /// Only change the name and format in the image: the old and the new backing file are not opened, and it is
    /// yours to know that both read the same
    #[arg(short = 'u', long = "unsafe")]
    pub unsafe_mode: bool,
    /// Copy at most so many bytes of data in a second
    #[arg(short, long, value_name = "SIZE", value_parser = rate)]
    pub rate: Option<u64>,
    /// How the host caches the image
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub cache: Cache,
    /// How the host caches the new backing file
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub source_cache: Cache,
    /// Show progress also where stderr is no terminal
    #[arg(short, long)]
    pub progress: bool,
    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Image; nobody else may use it
    pub file: PathBuf,
}

/// `measure`.
#[derive(Args, Debug)]
pub struct Measure {
    /// Format of the new image
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw", value_parser = format)]
    pub target_format: Format,
    /// Its options, as key=value,…, as of `create`
    #[arg(short, long = "option", value_name = "K=V,…")]
    pub options: Vec<String>,
    /// Measure a new image of a disk of that size
    #[arg(short, long, value_name = "SIZE", value_parser = bytes, conflicts_with = "file")]
    pub size: Option<u64>,
    /// Format of FILE [default: known by its magic, else raw]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Measure FILE's internal snapshot of that id, or else name; as convert -l
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Read FILE even while another process writes it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Image that is to be converted
    #[arg(required_unless_present = "size")]
    pub file: Option<String>,
}

/// What `info` and `map` have in common.
#[derive(Args, Debug)]
pub struct Reading {
    /// Format of the image [default: known by its magic, else raw]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Read the image even while another process writes it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// The image's external data file, whatever name the image has for it
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,
    /// Read the internal snapshot of that id, or else name, instead of the disk
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// Image to read, or null:SIZE
    pub file: String,
}

/// `info`.
#[derive(Args, Debug)]
pub struct Info {
    /// Show the images below it too
    #[arg(long)]
    pub backing_chain: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub reading: Reading,
}

/// `map`.
#[derive(Args, Debug)]
pub struct Map {
    /// Begin at this byte of the disk
    #[arg(short, long, value_name = "OFFSET", value_parser = bytes, default_value = "0", hide_default_value = true)]
    pub start_offset: u64,
    /// Show at most so many bytes of the disk
    #[arg(short, long, value_name = "SIZE", value_parser = bytes)]
    pub max_length: Option<u64>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub reading: Reading,
}

/// What `check` repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Repair {
    /// Space that nothing uses
    Leaks,
    /// Everything that can be
    All,
}

/// `check`.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 sound, 1 could not be checked, 2 corrupt, 3 leaks only, \
                        63 the format has no checks"
)]
pub struct Check {
    /// Format of the image [default: known by its magic]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Repair what is found; nobody else may use the image
    #[arg(short, long, value_name = "WHAT")]
    pub repair: Option<Repair>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print no result, only what is wrong, on stderr: the exit status says how bad it is
    #[arg(short, long)]
    pub quiet: bool,
    /// Check even while another process writes the image: it may look damaged then
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
    /// Memory for counting clusters; an image that needs more takes longer
    #[arg(long, value_name = "SIZE", default_value = "40M", value_parser = bytes)]
    pub memory: u64,
    /// Image to check
    pub file: PathBuf,
}

/// `snapshot`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("operation").args(["list", "create", "apply", "delete"])))]
pub struct Snapshot {
    /// Format of the image [default: known by its magic]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// List the snapshots (what is done if nothing else is said)
    #[arg(short, long)]
    pub list: bool,
    /// Make a snapshot of the disk as it is
    #[arg(short, long, value_name = "NAME")]
    pub create: Option<String>,
    /// Make the disk what it was then; what was written since is lost. An id counts before a name
    #[arg(short, long, value_name = "NAME")]
    pub apply: Option<String>,
    /// Delete a snapshot. A name counts before an id
    #[arg(short, long, value_name = "NAME")]
    pub delete: Option<String>,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// List even while another process writes the image
    #[arg(short = 'U', long, conflicts_with_all = ["create", "apply", "delete"])]
    pub force_share: bool,
    /// Image; nobody else may use it while it is changed
    pub file: PathBuf,
}

/// `amend`.
#[derive(Args, Debug)]
pub struct Amend {
    /// Format of the image [default: known by its magic]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// What to change, as key=value,…: `-o help` lists it
    #[arg(short, long = "option", value_name = "K=V,…")]
    pub options: Vec<String>,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// Erase the last key slot too: the guest's data are lost then
    #[arg(long)]
    pub force: bool,
    /// For -o size: also open backing files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Image to change; nobody else may use it
    pub file: PathBuf,
}

/// `resize`.
#[derive(Args, Debug)]
pub struct Resize {
    /// Format of the image: needed for raw, known by its magic otherwise
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Let the disk become smaller: what lies behind its new end is lost
    #[arg(long)]
    pub shrink: bool,
    /// What the new part gets at once: off, metadata (its place in the file), falloc (besides, space reserved by
    /// the file system) or full (besides, zeros written to it)
    #[arg(long, value_name = "MODE", default_value = "off", value_parser = str::parse::<Preallocation>)]
    pub preallocation: Preallocation,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Also open backing files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Image to resize; nobody else may use it
    pub file: PathBuf,
    /// The new size (20G, 512M, …), or by how much it is to change
    #[arg(value_name = "[+|-]SIZE", value_parser = str::parse::<NewSize>, allow_hyphen_values = true)]
    pub size: NewSize,
}

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

/// `serve`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("socket").args(["vhost_user", "nbd", "disk"]).required(true).multiple(true)))]
pub struct Serve {
    /// Format of the image: needed for raw, known by its magic otherwise
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Image to serve, or null:SIZE
    #[arg(required_unless_present = "disk")]
    pub file: Option<String>,
    /// Serve it over vhost-user-blk on this Unix socket
    #[arg(long, value_name = "SOCK")]
    pub vhost_user: Option<PathBuf>,
    /// Serve it over NBD at unix:PATH or HOST:PORT
    #[arg(long, value_name = "unix:PATH|HOST:PORT", value_parser = str::parse::<NbdAddress>)]
    pub nbd: Option<NbdAddress>,
    /// Serve this disk too, on the same I/O threads; may be given many times. Keys: vhost-user=SOCK,
    /// nbd=ADDRESS, format=FMT, queues=N, read-only=on|off, data-file=PATH, snapshot=NAME; what it does not say is as for all disks
    #[arg(long, value_name = "FILE,K=V,…", value_parser = str::parse::<DiskArgument>)]
    pub disk: Vec<DiskArgument>,
    /// Queues that a virtual machine may use
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: u16,
    /// Threads that do the I/O
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub io_threads: u16,
    /// Never sleep while a client is connected: each of these threads takes a core for the lowest latency
    #[arg(long)]
    pub poll: bool,
    /// How I/O is submitted: auto, threads, native or io_uring
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = str::parse::<Aio>)]
    pub aio: Aio,
    /// How the host caches: none, writeback, writethrough, directsync or unsafe
    #[arg(long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub cache: Cache,
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
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// The image's external data file, whatever name the image has for it
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,
    /// Print statistics to stderr at the end (and, as always, on SIGUSR1): table, or json for one line per disk
    #[arg(long, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub stats: Option<Stats>,
}

pub(crate) fn bytes(text: &str) -> Result<u64> {
    size::parse(text)
}

/// What `-S` takes: whole sectors, as in qemu-img.
fn sparse(text: &str) -> Result<u64> {
    let bytes = size::parse(text)?;
    match bytes.is_multiple_of(512) {
        true => Ok(bytes),
        false => Err(block::Error::invalid("it must be a multiple of 512")),
    }
}

/// A number of bytes in a second.
fn rate(text: &str) -> Result<u64> {
    match size::parse(text)? {
        0 => Err(block::Error::invalid("nothing at all would be done")),
        bytes => Ok(bytes),
    }
}

pub(crate) fn format(text: &str) -> Result<Format> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_needs_a_socket() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["diskplane", "serve"], args].concat());
        assert!(parse(&["disk"]).is_err());
        assert!(parse(&["disk", "--nbd", "unix:/run/s"]).is_ok());
        assert!(parse(&["disk", "--vhost-user", "/run/s", "--queues", "0"]).is_err());
        assert!(parse(&["disk", "--vhost-user", "/run/s", "--aio", "posix"]).is_err());
    }
}
