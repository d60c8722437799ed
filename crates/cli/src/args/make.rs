//! Commands about images that do not exist yet: `create` and `measure`.

use super::{Form, bytes, format, name, new_format};
use crate::secret::Keys;
use clap::Args;
use image::Format;
use std::path::PathBuf;

/// `create`.
#[derive(Args, Debug)]
pub struct Create {
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// Format of the new image: raw, qcow2, qcow, qed, vhd, vhdx, vdi, vmdk or luks [default: by FILE's extension, .qcow2, .qcow, .qed, .vhd, .vpc, .vhdx, .vdi, .vmdk, .luks, .raw or .img]
    #[arg(short, long, value_name = "FMT", value_parser = new_format)]
    pub format: Option<Format>,
    /// Options of the format, as key=value,…: `-o help` lists them
    #[arg(short, long = "option", value_name = "K=V,…", value_parser = name())]
    pub options: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keys: Keys,
    /// The new image shows what BASE holds wherever it was not written. It gets subclusters, which
    /// make small writes cheap, unless -o extended_l2=off says otherwise
    #[arg(short, long, value_name = "BASE", requires = "backing_format", value_parser = name())]
    pub backing: Option<String>,
    /// Format of BASE
    #[arg(short = 'F', long, value_name = "FMT", value_parser = format, requires = "backing")]
    pub backing_format: Option<Format>,
    /// File to create; it must not exist yet
    #[arg(required_unless_present = "options")]
    pub file: Option<PathBuf>,
    /// Size of the disk (20G, 512M, …) [default: the size of BASE]
    #[arg(value_parser = bytes)]
    pub size: Option<u64>,
}

/// `measure`.
#[derive(Args, Debug)]
pub struct Measure {
    /// Format of the new image
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw", value_parser = format)]
    pub target_format: Format,
    /// Its options, as key=value,…, as of `create`
    #[arg(short, long = "option", value_name = "K=V,…", value_parser = name())]
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
    /// As of qemu-img: json is --json
    #[arg(long, hide = true, value_name = "human|json", conflicts_with = "json")]
    pub output: Option<Form>,
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=raw,file.filename=PATH,offset=1M
    #[arg(long)]
    pub image_opts: bool,
    /// Also open backing and data files below DIR, not only below each image's own directory; an NBD export's name lets images
    /// lie on that export
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Image that is to be converted; this or --size
    pub file: Option<PathBuf>,
}
