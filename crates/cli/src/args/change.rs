//! Commands that change what an image is: `snapshot`, `amend` and `resize`.

use super::{format, name};
use crate::resize::NewSize;
use crate::secret::{Keys, Objects};
use clap::{ArgGroup, Args};
use image::Format;
use std::path::PathBuf;
use tool::prealloc::Preallocation;

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
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=qcow2,file.filename=PATH
    #[arg(long)]
    pub image_opts: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub objects: Objects,
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
    #[arg(short, long = "option", value_name = "K=V,…", value_parser = name())]
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
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=qcow2,file.filename=PATH
    #[arg(long)]
    pub image_opts: bool,
    /// Image to change; nobody else may use it
    #[arg(required_unless_present = "options")]
    pub file: Option<PathBuf>,
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
    /// Also open backing files below DIR, not only below each image's own directory; an NBD export's name lets images lie
    /// on that export
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=qcow2,file.filename=PATH
    #[arg(long)]
    pub image_opts: bool,
    /// Image to resize; nobody else may use it
    pub file: PathBuf,
    /// The new size (20G, 512M, …), or by how much it is to change
    #[arg(value_name = "[+|-]SIZE", value_parser = str::parse::<NewSize>, allow_hyphen_values = true)]
    pub size: NewSize,
}
