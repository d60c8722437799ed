//! Commands that move disks' content: `convert`, `dd`, `commit` and `rebase`; and `compare`.

use super::{format, name, new_format, rate, sparse};
use crate::secret::Keys;
use clap::Args;
use image::Format;
use io::Cache;
use std::path::{Path, PathBuf};

/// What the commands have in common that move a disk's content.
#[derive(Args, Debug, Default)]
pub struct Moving {
    /// Copy at most so many bytes of data in a second
    #[arg(short, long, value_name = "SIZE", value_parser = rate)]
    pub rate: Option<u64>,
    /// How the host caches what is written: none, writeback, writethrough, directsync or unsafe [default: writeback; only
    /// convert does without the cache, where the file system can, but with --resume]
    #[arg(short = 't', long, value_name = "MODE", value_parser = str::parse::<Cache>)]
    pub cache: Option<Cache>,
    /// Show progress also where stderr is no terminal
    #[arg(short, long)]
    pub progress: bool,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// Also open backing and data files below DIR, not only below each image's own directory; an NBD export's name lets images
    /// lie on that export
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
}

/// `convert`.
#[derive(Args, Debug)]
#[command(
    after_help = "DST gets its name when it is complete: an error, a full disk, SIGINT or SIGTERM leave nothing under \
                  it (but devices, and what -n writes into). Several SRC make one disk, one behind the other. \
                  Memory: below 256 MiB; the map of each VDI or Parallels image comes on top, 4 bytes \
                  for each block: 128 MiB at most."
)]
pub struct Convert {
    /// Passphrase of DST, with -n, or of the encrypted image below it, with -B, by the ID of an --object; for a new
    /// DST itself say -o encrypt.key-secret=ID
    #[arg(long, value_name = "ID")]
    pub target_key_secret: Vec<String>,
    /// Compress (qcow2): every cluster that gets smaller; -o compression_type says how, or with -n the image itself
    #[arg(short = 'c', long)]
    pub compress: bool,
    /// Have the host copy from file to file (reflink, where the file system can) what lies in SRC's file as it is;
    /// that is not searched for zeros
    #[arg(short = 'C', long, conflicts_with_all = ["compress", "sparse", "resume", "salvage"])]
    pub copy_range: bool,
    /// Format of SRC [default: known by its magic, else raw]
    #[arg(short = 'f', long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Format of DST: raw, qcow2, qcow, qed, vhd, vhdx, vdi, vmdk or luks [default: by DST's extension, .qcow2, .qcow, .qed, .vhd, .vpc, .vhdx, .vdi, .vmdk, .luks, .raw or .img]
    #[arg(short = 'O', long, value_name = "FMT", value_parser = new_format)]
    pub target_format: Option<Format>,
    /// Options of DST's format, as key=value,…: `diskplane create -f FMT -o help FILE` lists them
    #[arg(
        short,
        long = "option",
        value_name = "K=V,…",
        conflicts_with = "no_create",
        value_parser = name()
    )]
    pub options: Vec<String>,
    /// Make DST an overlay of BASE: what reads the same there is left out
    #[arg(
        short = 'B',
        short_alias = 'b',
        long,
        value_name = "BASE",
        requires = "backing_format",
        value_parser = name()
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
    /// failed to make it durable. Only for raw and qcow2 images that are no device; not with -c or -n
    #[arg(long, conflicts_with_all = ["compress", "no_create"])]
    pub resume: bool,
    /// How the host caches SRC
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub source_cache: Cache,
    /// Pieces of 512 KiB that are copied at a time, each by a thread [default: one per core; past the page cache (-t none)
    /// at least 8]
    #[arg(short = 'm', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: Option<u16>,
    /// Let what comes first lie first in DST, whatever the order of the disk (no difference for raw)
    #[arg(short = 'W', long, conflicts_with = "compress")]
    pub out_of_order: bool,
    /// Each SRC is key=value,…, as in qemu-img, rather than a file's name
    #[arg(long)]
    pub image_opts: bool,
    /// Read SRC even while another process writes it: what is copied may never have been on it at once
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// SRC's external data file, whatever name SRC has for it
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moving: Moving,
    /// Images to copy, or null:SIZE; and last the image to make, which must not exist yet, unless -n is given
    #[arg(required_unless_present = "options", num_args = 1.., value_names = ["SRC", "DST"])]
    pub files: Vec<PathBuf>,
}

impl Convert {
    /// A copy of one image to another, with the defaults of the command line.
    pub fn of(source: &str, target: &str) -> Self {
        Self {
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
            source_cache: Cache::Writeback,
            workers: None,
            out_of_order: false,
            moving: Moving::default(),
            image_opts: false,
            force_share: false,
            data_file: None,
            files: vec![block::name::path(source), block::name::path(target)],
        }
    }

    /// The images to copy, at least one, and the one to make.
    pub fn files(&self) -> anyhow::Result<(&[PathBuf], &Path)> {
        match self.files.split_last() {
            Some((target, sources)) if !sources.is_empty() => Ok((sources, target)),
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
    #[arg(short = 'O', long, value_name = "FMT", value_parser = new_format)]
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
    /// Also open backing and data files below DIR, not only below each image's own directory; an NBD export's name lets images
    /// lie on that export
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// if=FILE of=FILE bs=SIZE count=N skip=N
    #[arg(required = true, num_args = 1.., value_name = "KEY=VALUE", value_parser = name())]
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
    /// The images are key=value,…, as in qemu-img, rather than names of files: driver=raw,file.filename=PATH,offset=1M
    #[arg(long)]
    pub image_opts: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory; an NBD export's name lets images
    /// lie on that export
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// First image
    pub file1: PathBuf,
    /// Second image
    pub file2: PathBuf,
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
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moving: Moving,
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=qcow2,file.filename=PATH
    #[arg(long)]
    pub image_opts: bool,
    /// Overlay; nobody else may use it, and nobody may use the base
    pub file: PathBuf,
}

/// `rebase`.
#[derive(Args, Debug)]
#[command(
    after_help = "Where the new backing file differs from the old one, the image gets what it shows now. Whatever cuts \
                  the work off, the image is one on its old backing file that reads as before: the new name is \
                  written last, all at once."
)]
pub struct Rebase {
    /// Format of the image [default: known by its magic]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// The new backing file; a relative name starts at the image's directory. '': none
    #[arg(short, long, value_name = "BASE", value_parser = name())]
    pub backing: String,
    /// Its format
    #[arg(short = 'F', long, value_name = "FMT", value_parser = format)]
    pub backing_format: Option<Format>,
    /// Compress what the image gets (qcow2): every whole cluster that gets smaller
    #[arg(short = 'c', long, conflicts_with = "unsafe_mode")]
    pub compress: bool,
    /// Only change the name and format in the image: what the old and the new backing file have is not looked at, and it
    /// is yours to know that both read the same (a vhd, vhdx or vmdk one must be there: the image records what marks it)
    #[arg(short = 'u', long = "unsafe")]
    pub unsafe_mode: bool,
    /// How the host caches the new backing file
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback", value_parser = str::parse::<Cache>)]
    pub source_cache: Cache,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub moving: Moving,
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=qcow2,file.filename=PATH
    #[arg(long)]
    pub image_opts: bool,
    /// Image; nobody else may use it
    pub file: PathBuf,
}
