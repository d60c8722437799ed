//! Commands on closed images: started, waited for, and what they used.
//!
//! What they read has been read before, so that it comes from the page cache on both sides (unless a side reads with
//! `O_DIRECT`); the device has digested what came before; what they write is a new file, and gone afterwards.

use super::{
    cell::{Image, Job, Metric, Server, Side},
    image::{Images, SPARE},
    judge::Metrics,
    process::{Process, remove_file},
};
use crate::{
    load::usage,
    machine::others::Watch,
    peer::{Programs, words},
    record::Sample,
};
use block::{Context, Error, ErrorKind, RangeKind, Result, Storage, size};
use io::OpenOptions;
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(600);

/// The options of `qemu-img` that are tried; those with which it is fastest count.
pub(super) fn variants(job: Job) -> &'static [&'static str] {
    match job {
        // Out of order and compressed exclude each other.
        Job::Convert {
            packed: Some(_), ..
        } => &["defaults", "-m 16"],
        Job::Convert { durable: false, .. } => &["defaults", "-m 16 -W"],
        Job::Convert { durable: true, .. } => &[
            "-t writeback",
            "-m 16 -W -t writeback",
            "-m 16 -W -t none",
            "-m 16 -W -t none -T none",
        ],
        _ => &["defaults"],
    }
}

/// Runs the side's job once.
pub(super) fn take(
    programs: &Programs,
    images: &Images,
    side: &Side,
    job: Job,
    options: &str,
    files: &[PathBuf],
) -> Result<Sample> {
    let target = images.work().join("target");
    let taken = run(programs, images, side, job, options, files, &target);
    match remove_file(&target) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(|| target.display().to_string())
        }
        _ => taken,
    }
}

fn run(
    programs: &Programs,
    images: &Images,
    side: &Side,
    job: Job,
    options: &str,
    files: &[PathBuf],
    target: &Path,
) -> Result<Sample> {
    let [file] = files else {
        return Err(Error::invalid("a command takes one image"));
    };
    if matches!(job, Job::Convert { .. }) {
        room(images)?;
    }
    let mut command = match side.server {
        Server::Tool => Command::new(&programs.diskplane),
        _ => Command::new("qemu-img"),
    };
    arguments(&mut command, side, job, options, images, file, target);
    for file in sources(job, images, file) {
        warm(&file)?;
    }
    let watch = Watch::begin(&[]);
    let began = Instant::now();
    let mut process = Process::start("command", &mut command, images.work())?;
    let mut peak = 0.0_f64;
    process.linger(LIMIT, |pid| {
        peak = peak.max(peak_mib(pid).unwrap_or_default());
    })?;
    let elapsed = began.elapsed().as_secs_f64();
    let cpu = usage::cpu(process.pid())?.as_secs_f64();
    let others = watch.since().others_percent() - cpu / elapsed * 100.0;
    let status = process.wait(LIMIT)?;
    if !status.success() {
        return Err(process.failed(&format!("failed ({status})")));
    }
    let written = fs::metadata(target).map_or(0, |meta| meta.len());
    Ok(Sample {
        metrics: Metrics::from([
            (Metric::Runs, 1.0 / elapsed),
            (Metric::ElapsedS, elapsed),
            (Metric::CpuS, cpu),
            (Metric::PeakMib, peak),
            (Metric::OthersPercent, others.max(0.0)),
        ]),
        detail: json!({ "command": words(&command), "target-bytes": written }),
        ..Sample::default()
    })
}

fn arguments(
    command: &mut Command,
    side: &Side,
    job: Job,
    options: &str,
    images: &Images,
    file: &Path,
    target: &Path,
) {
    let ours = side.server == Server::Tool;
    let said = options
        .split(' ')
        .filter(|_| !ours && options != "defaults");
    let format = side.image.format();
    let json: &[&str] = match ours {
        true => &["--json"],
        false => &["--output=json"],
    };
    match job {
        Job::Convert {
            to,
            packed,
            durable,
        } => {
            command.args(["convert", "-f", format, "-O", to]).args(said);
            if let Some(method) = packed {
                let method = format!("compression_type={method}");
                command.args(["-c", "-o", &method]);
            }
            if ours && !durable {
                command.args(["-t", "unsafe"]);
            }
            command.arg(file).arg(target);
        }
        Job::Check => {
            command.args(["check", "-f", format]).args(json).arg(file);
        }
        Job::Map => {
            command.args(["map", "-f", format]).args(json).arg(file);
        }
        Job::Measure => {
            command.args(["measure", "-f", format, "-O", "qcow2"]);
            command.args(json).arg(file);
        }
        Job::Compare => {
            let raw = images.paths(Image::HalfRaw);
            command.args(["compare", "-f", format, "-F", "raw"]);
            command.arg(file).args(raw);
        }
    }
}

/// What the command reads.
fn sources(job: Job, images: &Images, file: &Path) -> Vec<PathBuf> {
    let mut sources = vec![file.to_owned()];
    if job == Job::Compare {
        sources.extend(images.paths(Image::HalfRaw));
    }
    sources
}

/// Has the host read a file's data, without its holes.
fn warm(path: &Path) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let file = io::File::open(path, &OpenOptions::looking())?;
    let mut piece = vec![0; PIECE as usize];
    let mut at = 0;
    while let Some(run) = file.range_at(at)? {
        let end = run.offset + run.len;
        while run.kind == RangeKind::Data && at < end {
            let len = (end - at).min(PIECE);
            file.read_at(at, &mut piece[..len as usize])?;
            at += len;
        }
        at = end;
    }
    Ok(())
}

/// Says so where the target may not fit.
fn room(images: &Images) -> Result<()> {
    let need = Image::HalfQcow2.host_bytes(images.sizes()) + SPARE;
    let free = images.free()?;
    if free < need {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "{} is free for the target, it needs {}",
                size::human(free),
                size::human(need)
            ),
        ));
    }
    Ok(())
}

fn peak_mib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).context(|| path.clone())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.map(|kib| kib / 1024.0)
        .ok_or_else(|| Error::new(ErrorKind::Io, format!("{path}: no VmHWM")))
}
