//! `diskplane bench device`: a device that is a model, for any program that opens files.

use crate::{
    args::bytes,
    print,
    signals::{Signal, Signals},
};
use anyhow::{Context, Result, bail};
use bench::simulated::{Drive, Model, Mounted, Setup};
use block::size;
use clap::{Args, builder::PossibleValuesParser};
use std::{path::PathBuf, sync::mpsc, thread, time::Duration};

/// The flash drive among the models.
const FLASH: &str = "flash";

/// `bench device`.
#[derive(Args, Debug)]
#[command(
    after_help = "Prints where the device is and stays until ^C, SIGTERM or umount; then it says how well the model's times \
                  were kept. Any program may use the file, with O_DIRECT or not: \
                  fio --filename=DIR/device/mount/disk --direct=1 …, \
                  losetup --direct-io=on --find --show DIR/device/mount/disk. \
                  What a killed run left in DIR is undone by the next. Bytes are as durable as the host's page cache.\n\n\
                  The rotating disks have a seek curve through the data sheet's three seek times, a rotation, zones, \
                  reading ahead, and a queue from which the head takes what it reaches first; --stroke says how much \
                  of the drive the disk lies on."
)]
pub struct DeviceArgs {
    /// Where it is mounted (in DIR/device, which is gone afterwards)
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Bytes of the device
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub size: u64,
    /// Which: a rotating disk, or flash with --read-us and --write-us
    #[arg(long, value_name = "MODEL", default_value = "hdd-7200",
          value_parser = PossibleValuesParser::new(Drive::names().chain([FLASH])))]
    pub model: String,
    /// RAID0 over so many of them
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub members: usize,
    /// Bytes of a RAID0 chunk
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = bytes)]
    pub chunk: u64,
    /// A file for the bytes of each member, kept [default: new ones in DIR, gone afterwards]
    #[arg(long, value_name = "PATH")]
    pub file: Vec<PathBuf>,
    /// Rotating: bytes of its write cache, 0 for none; a flush waits for what is in it
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = bytes)]
    pub write_cache: u64,
    /// Rotating: commands with the drive at a time; 1 for no NCQ
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub queue: usize,
    /// Rotating: the part of its tracks, from the outermost, that the disk lies on
    #[arg(long, value_name = "PART", default_value_t = 0.125)]
    pub stroke: f64,
    /// Flash: microseconds of a 4 KiB read
    #[arg(long, value_name = "N", default_value_t = 80)]
    pub read_us: u32,
    /// Flash: microseconds of a 4 KiB write
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub write_us: u32,
    /// Flash: requests at a time
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub channels: usize,
}

/// Mounts the device, and stays.
pub fn run(args: &DeviceArgs) -> Result<()> {
    // Before anything starts a thread.
    let mut signals = Signals::block()?;
    let mut mounted = Mounted::start(&args.dir, setup(args)?, &args.file)?;
    print(&format!(
        "{}: {}, {}{}\n",
        mounted.path().display(),
        size::human(args.size),
        args.model,
        match args.members {
            1 => String::new(),
            n => format!(", RAID0 over {n} in chunks of {}", size::human(args.chunk)),
        }
    ))?;
    let (say, heard) = mpsc::channel();
    if let Some(gone) = mounted.gone() {
        let say = say.clone();
        let watch = move || {
            let _ = gone.recv();
            let _ = say.send(());
        };
        thread::Builder::new()
            .spawn(watch)
            .context("start a thread")?;
    }
    thread::Builder::new()
        .spawn(move || {
            while matches!(signals.wait(), Ok(Signal::Statistics)) {}
            let _ = say.send(());
        })
        .context("start a thread for signals")?;
    let _ = heard.recv();
    crate::say(&format!("{}\n", mounted.kept()));
    Ok(())
}

fn setup(args: &DeviceArgs) -> Result<Setup> {
    let us = |us: u32| Duration::from_micros(us.into());
    let model = match Drive::named(&args.model) {
        Some(drive) => Model::Spindle(Drive {
            write_cache: args.write_cache,
            queue: args.queue,
            stroke: args.stroke,
            ..drive
        }),
        None if args.model == FLASH => Model::Flash {
            read: us(args.read_us),
            write: us(args.write_us),
            channels: args.channels,
        },
        None => bail!("there is no model '{}'", args.model),
    };
    Ok(Setup {
        model,
        members: args.members,
        chunk: args.chunk,
        bytes: args.size,
        grows: false,
    })
}
