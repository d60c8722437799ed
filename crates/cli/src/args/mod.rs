//! The command line. Stable: scripts rely on it.

mod change;
mod copy;
mod look;
mod make;
mod serve;

pub use change::*;
pub use copy::*;
pub use look::*;
pub use make::*;
pub use serve::*;

use crate::{
    advise::Advise,
    bench_clear::Clear,
    bench_compare::{Compare as CompareRuns, Csv},
    bench_device::DeviceArgs,
    bench_ffsb::FfsbArgs,
    bench_image,
    bench_load::Load,
    bench_report::ReportArgs,
    bench_run::RunArgs,
    bench_versus::Versus,
    bitmap::Bitmap,
    trace::Trace,
};
use anyhow::anyhow;
use block::{Result, size};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use image::Format;

/// Opens virtual disk images, looks after them and serves them to virtual machines.
#[derive(Debug, Parser)]
#[command(name = "diskplane", version, max_term_width = 100)]
pub struct Cli {
    /// End when an NBD server that is waited for has been silent for so many seconds; 0: wait for ever
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 120)]
    pub nbd_timeout: u32,
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
    /// Show where the time of requests goes
    Trace(Trace),
    /// Say how to keep and serve images here, and why
    Advise(Advise),
    /// Do what qemu-img does, with its command line, output and exit codes (also under that name)
    #[command(name = "qemu-img", disable_help_flag = true)]
    QemuImg(QemuImg),
}

/// What `--output` takes, which qemu-img's users are used to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// For people
    Human,
    /// As --json
    Json,
}

impl Command {
    /// Makes `--output=json` what it means.
    pub fn settle(&mut self) {
        let (json, output) = match self {
            Command::Info(args) => (&mut args.reading.json, args.reading.output),
            Command::Map(args) => (&mut args.reading.json, args.reading.output),
            Command::Check(args) => (&mut args.json, args.output),
            Command::Measure(args) => (&mut args.json, args.output),
            _ => return,
        };
        *json |= output == Some(Form::Json);
    }
}

/// `qemu-img`.
#[derive(Args, Debug)]
pub struct QemuImg {
    /// As qemu-img 10 takes them: `diskplane qemu-img --help` lists its commands
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENTS"
    )]
    pub arguments: Vec<std::ffi::OsString>,
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
    /// Put requests to an image, without a server
    Image(bench_image::Image),
    /// Put load on a server or a file, and report what came back
    Load(Load),
    /// Put load on a file system, as the studies of virtual disks did (FFSB's scenarios)
    Ffsb(FfsbArgs),
    /// Mount a device that is a model: a rotating disk, flash, RAID0 over several
    Device(DeviceArgs),
    /// Compare diskplane with its peers and with bare metal, cell by cell
    Versus(Versus),
    /// Repeat one of the studies that diskplane carries, beside what it found
    Run(RunArgs),
    /// Remove what a run left that was killed: mounts, loop devices, images
    Clear(Clear),
    /// Make a page, charts and a summary of a run's records
    Report(ReportArgs),
    /// Say what got faster or slower from one run to another, and how sure that is
    Compare(CompareRuns),
    /// Print the samples of a run as a table (CSV)
    Csv(Csv),
}

/// Takes a file's name, or what has one in it (`key=value`), whatever its bytes: see [`block::name`].
pub(crate) fn name() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().map(block::name::text)
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

/// The format of a new image. What is read only is refused later, by its name.
fn new_format(text: &str) -> anyhow::Result<Format> {
    text.parse().map_err(|_| {
        anyhow!(
            "format '{}' is not supported: {}",
            block::plain(text),
            crate::create::NEW_NAMES
        )
    })
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
        for mode in ["none", "unsafe", "direct-unsafe"] {
            assert!(parse(&["disk", "--vhost-user", "/run/s", "--cache", mode]).is_ok());
        }
        assert!(parse(&["disk", "--vhost-user", "/run/s", "--cache", "off"]).is_err());
    }
}
