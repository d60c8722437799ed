//! fio on the file itself: what the device gives without anybody between.

use super::{
    cell::{Load, Metric},
    judge::Metrics,
    process::Process,
    sample::Times,
};
use crate::{
    fio,
    load::{Flushes, turns::Turn, usage},
    peer,
};
use block::{Context, Error, ErrorKind, Result};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// How long it may take besides what it measures.
const EXTRA: Duration = Duration::from_secs(60);
/// How long the device gets for what a stopped fio has in flight.
const DRAIN: Duration = Duration::from_millis(5);

/// Runs `load` on `file` with fio's io_uring engine; its figures, and all that it reported.
pub(super) fn run(job: &Job<'_>, times: Times, folder: &Path) -> Result<(Metrics, Value)> {
    let mut command = job.command();
    command
        .arg(format!("--ramp_time={}ms", times.ramp.as_millis()))
        .arg(format!("--runtime={}ms", times.duration.as_millis()));
    match job.load.stride {
        // Once from end to end, and no longer: a second write finds what the first has made.
        Some(stride) if job.load.grows > 0 => {
            let named = || job.file.display().to_string();
            let places = job.file.metadata().context(named)?.len() / stride;
            command.arg(format!("--io_size={}", places * job.load.block));
        }
        _ => {
            command.args(["--norandommap", "--time_based"]);
        }
    }
    let mut process = Process::start("fio", &mut command, folder)?;
    let status = process.wait(times.ramp + times.duration + EXTRA)?;
    if !status.success() {
        return Err(process.failed(&format!("failed ({status})")));
    }
    let text = process.stdout();
    parse(&text).ok_or_else(|| process.failed("said nothing that can be read"))
}

/// What fio is to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job<'a> {
    pub load: &'a Load,
    pub file: &'a Path,
    /// With `O_DIRECT`.
    pub direct: bool,
    /// First byte, and how many; to the file's end where that is not said.
    pub range: (u64, Option<u64>),
}

impl Job<'_> {
    fn command(&self) -> Command {
        let rw = self.load.pattern.name();
        let block = self.load.block;
        let mut command = Command::new("fio");
        command
            .args(["--name=versus", "--ioengine=io_uring"])
            .args(fio::HABITS)
            .arg("--output-format=json")
            .arg(format!("--rwmixread={}", self.load.reads))
            .arg(fio::file_name(self.file))
            .arg(format!("--direct={}", u8::from(self.direct)))
            .arg(match self.load.stride {
                Some(stride) => format!("--rw={rw}:{}", stride.saturating_sub(block)),
                None => format!("--rw={rw}"),
            })
            .arg(format!("--bs={block}"))
            .arg(format!("--iodepth={}", self.load.depth))
            .arg(format!("--offset={}", self.range.0));
        if let Some(bytes) = self.range.1 {
            command.arg(format!("--size={bytes}"));
        }
        // After so many writes, and it waits for it: as one slot of our generator does, and so the same at depth 1.
        match self.load.flushes {
            Flushes::Never => {}
            Flushes::AfterEachWrite => {
                command.arg("--fdatasync=1");
            }
            Flushes::Every(writes) => {
                command.arg(format!("--fdatasync={writes}"));
            }
        }
        command
    }
}

/// A fio that runs in turns: it is stopped (SIGSTOP) in between, and what it does in a turn is seen from outside, in
/// the kernel's counts of what it asked for.
#[derive(Debug)]
pub(crate) struct InTurns {
    process: Process,
    words: Vec<String>,
    block: u64,
    bytes: u64,
    measured: Duration,
    cpu: Duration,
}

impl InTurns {
    /// Starts it; it rests then.
    pub(super) fn start(job: &Job<'_>, folder: &Path) -> Result<Self> {
        let mut command = job.command();
        command.args(["--norandommap", "--time_based", "--runtime=1d"]);
        let mut process = Process::start("fio", &mut command, folder)?;
        process.wait_ready(|process| transferred(process.pid()).is_ok_and(|bytes| bytes > 0))?;
        let fio = Self {
            process,
            words: peer::words(&command),
            block: job.load.block,
            bytes: 0,
            measured: Duration::ZERO,
            cpu: Duration::ZERO,
        };
        fio.rest();
        Ok(fio)
    }

    fn rest(&self) {
        self.process.signal(Signal::STOP);
        // What is in flight ends without it.
        thread::sleep(DRAIN);
    }

    /// Runs for a turn.
    pub(crate) fn turn(&mut self, turn: Turn) -> Result<()> {
        let pid = self.process.pid();
        self.process.signal(Signal::CONT);
        thread::sleep(turn.ramp);
        if !turn.measure.is_zero() {
            let (began, bytes, cpu) = (Instant::now(), transferred(pid)?, usage::cpu(pid)?);
            thread::sleep(turn.measure);
            self.measured += began.elapsed();
            self.bytes += transferred(pid)?.saturating_sub(bytes);
            self.cpu += usage::cpu(pid)?.saturating_sub(cpu);
        }
        self.rest();
        if !self.process.runs()? {
            return Err(self.process.failed("ended by itself"));
        }
        Ok(())
    }

    /// Ends it; the figures of its turns, and the record.
    pub(crate) fn end(self) -> Result<(Metrics, Value)> {
        let ios = self.bytes as f64 / self.block as f64;
        let seconds = self.measured.as_secs_f64();
        if ios <= 0.0 || seconds <= 0.0 {
            return Err(self.process.failed("did nothing"));
        }
        let metrics = Metrics::from([
            (Metric::Iops, ios / seconds),
            (Metric::Pairs, ios / seconds / 2.0),
            (Metric::CpuUs, self.cpu.as_secs_f64() * 1e6 / ios),
        ]);
        let detail = json!({ "command": self.words, "bytes": self.bytes, "seconds": seconds });
        Ok((metrics, detail))
    }
}

/// Bytes that a process has asked devices for so far, read and written (`/proc/PID/io`).
fn transferred(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/io");
    let text = fs::read_to_string(&path).context(|| path.clone())?;
    let of = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    of("read_bytes:")
        .zip(of("write_bytes:"))
        .map(|(read, written)| read + written)
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("{path}: no counts of bytes"),
            )
        })
}

/// The figures in fio's report.
fn parse(text: &str) -> Option<(Metrics, Value)> {
    let report = fio::json(text)?;
    let job = report["jobs"].get(0)?;
    if job["error"].as_i64() != Some(0) {
        return None;
    }
    let of = |field: &str| -> Option<f64> {
        Some(job["read"][field].as_f64()? + job["write"][field].as_f64()?)
    };
    let iops = of("iops")?;
    let seconds = ["read", "write"]
        .iter()
        .filter_map(|rw| job[rw]["runtime"].as_f64())
        .fold(0.0, f64::max)
        / 1000.0;
    let percent = job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?;
    let p50 = ["read", "write"]
        .iter()
        // The whole request's, as ours.
        .filter_map(|rw| job[rw]["lat_ns"]["percentile"]["50.000000"].as_f64())
        .reduce(f64::max);
    if iops <= 0.0 || seconds <= 0.0 {
        return None;
    }
    let mut metrics = Metrics::from([
        (Metric::Iops, iops),
        (Metric::Pairs, iops / 2.0),
        (Metric::CpuUs, percent / 100.0 / iops * 1e6),
    ]);
    metrics.extend(p50.map(|ns| (Metric::P50Us, ns / 1000.0)));
    let short = json!({
        "fio": report["fio version"], "options": job["job options"],
        "read_iops": job["read"]["iops"], "write_iops": job["write"]["iops"],
        "usr_cpu": job["usr_cpu"], "sys_cpu": job["sys_cpu"],
    });
    Some((metrics, short))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_json() {
        let text = r#"note: something
            {"fio version": "fio-3.33", "jobs": [{"error": 0, "usr_cpu": 10.0, "sys_cpu": 20.0,
              "read": {"iops": 3000.0, "runtime": 2000, "lat_ns": {"percentile": {"50.000000": 90000}}},
              "write": {"iops": 1000.0, "runtime": 2000, "lat_ns": {"percentile": {"50.000000": 80000}}}}]}"#;
        let (metrics, _) = parse(text).unwrap();
        assert_eq!(metrics[&Metric::Iops], 4000.0);
        assert_eq!(metrics[&Metric::Pairs], 2000.0);
        assert_eq!(metrics[&Metric::CpuUs], 75.0);
        assert_eq!(metrics[&Metric::P50Us], 90.0);
        // What it does not say is not 0.
        let (metrics, _) = parse(&text.replace("lat_ns", "clat_ns")).unwrap();
        assert_eq!(metrics.get(&Metric::P50Us), None);
        assert!(parse(&text.replace("\"error\": 0", "\"error\": 5")).is_none());
        assert!(parse("fio: broken").is_none());
    }
}
