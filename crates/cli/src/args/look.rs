//! Commands that look at an image: `info`, `map` and `check`.

use super::{Form, bytes, format};
use crate::secret::{Keys, Objects};
use clap::{Args, ValueEnum};
use image::Format;
use std::path::PathBuf;

/// What `info` and `map` have in common.
#[derive(Args, Debug)]
pub struct Reading {
    /// Format of the image [default: known by its magic, else raw]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// As of qemu-img: json is --json
    #[arg(long, hide = true, value_name = "human|json", conflicts_with = "json")]
    pub output: Option<Form>,
    /// Read the image even while another process writes it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=raw,file.filename=PATH,offset=1M
    #[arg(long)]
    pub image_opts: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory; an NBD export's name lets images
    /// lie on that export
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
    pub file: PathBuf,
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
    /// As of qemu-img: json is --json
    #[arg(long, hide = true, value_name = "human|json", conflicts_with = "json")]
    pub output: Option<Form>,
    /// Print no result, only what is wrong, on stderr: the exit status says how bad it is
    #[arg(short, long)]
    pub quiet: bool,
    /// Check even while another process writes the image: it may look damaged then
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
    /// Memory for counting clusters; an image that needs more takes longer
    #[arg(long, value_name = "SIZE", default_value = "40M", value_parser = bytes)]
    pub memory: u64,
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=qcow2,file.filename=PATH
    #[arg(long)]
    pub image_opts: bool,
    /// Look also below DIR for a qcow2 image's data file, not only below the image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// A qcow2 image's external data file, whatever name the image has for it
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub objects: Objects,
    /// Image to check
    pub file: PathBuf,
}
