//! fio on the file itself: what the device gives without anybody between.

use super::{
    cell::{Load, Metric},
    process::Process,
};
use crate::load::Pattern;
use block::{Context, Error, ErrorKind, Result};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path, process::Command, time::Duration};

/// How long it may take besides what it measures.
const EXTRA: Duration = Duration::from_secs(60);

/// Runs `load` on `file` with fio's io_uring engine; its figures, and all that it reported.
pub(super) fn run(
    load: &Load,
    file: &Path,
    direct: bool,
    range: (u64, Option<u64>),
    ramp: Duration,
    duration: Duration,
    folder: &Path,
) -> Result<(BTreeMap<Metric, f64>, Value)> {
    let rw = match load.pattern {
        Pattern::Read => "read",
        Pattern::Write => "write",
        Pattern::Rw => "rw",
        Pattern::RandRead => "randread",
        Pattern::RandWrite => "randwrite",
        Pattern::RandRw => "randrw",
    };
    let mut command = Command::new("fio");
    command
        .args(["--name=versus", "--ioengine=io_uring", "--thread"])
        .args(["--allow_file_create=0", "--fallocate=none"])
        .args(["--randrepeat=0"])
        .args(["--output-format=json", "--rwmixread=50"])
        .arg(format!(
            "--filename={}",
            file.to_string_lossy().replace(':', "\\:")
        ))
        .arg(format!("--direct={}", u8::from(direct)))
        .arg(match load.stride {
            Some(stride) => format!("--rw={rw}:{}", stride.saturating_sub(load.block)),
            None => format!("--rw={rw}"),
        })
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--offset={}", range.0))
        .arg(format!("--ramp_time={}ms", ramp.as_millis()))
        .arg(format!("--runtime={}ms", duration.as_millis()));
    match load.stride {
        // Once from end to end, and no longer: a second write finds what the first has made.
        Some(stride) if load.grows > 0 => {
            let places = file
                .metadata()
                .context(|| file.display().to_string())?
                .len()
                / stride;
            command.arg(format!("--io_size={}", places * load.block));
        }
        _ => {
            command.args(["--norandommap", "--time_based"]);
        }
    }
    if let Some(bytes) = range.1 {
        command.arg(format!("--size={bytes}"));
    }
    let mut process = Process::start("fio", &mut command, folder)?;
    let status = process.wait(ramp + duration + EXTRA)?;
    if !status.success() {
        return Err(process.failed(&format!("failed ({status})")));
    }
    let text = process.stdout();
    parse(&text).ok_or_else(|| process.failed("said nothing that can be read"))
}

/// The figures in fio's JSON. It may print notes before.
fn parse(text: &str) -> Option<(BTreeMap<Metric, f64>, Value)> {
    let report: Value = serde_json::from_str(&text[text.find('{')?..]).ok()?;
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
        .filter_map(|rw| job[rw]["clat_ns"]["percentile"]["50.000000"].as_f64())
        .fold(0.0, f64::max);
    if iops <= 0.0 || seconds <= 0.0 {
        return None;
    }
    let metrics = BTreeMap::from([
        (Metric::Iops, iops),
        (Metric::Pairs, iops / 2.0),
        (Metric::CpuUs, percent / 100.0 / iops * 1e6),
        (Metric::P50Us, p50 / 1000.0),
    ]);
    let short = serde_json::json!({
        "fio": report["fio version"], "options": job["job options"],
        "read_iops": job["read"]["iops"], "write_iops": job["write"]["iops"],
        "usr_cpu": job["usr_cpu"], "sys_cpu": job["sys_cpu"],
    });
    Some((metrics, short))
}

/// Whether fio is there.
pub(super) fn missing(error: &Error) -> bool {
    error.kind() == ErrorKind::NotFound
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_json() {
        let text = r#"note: something
            {"fio version": "fio-3.33", "jobs": [{"error": 0, "usr_cpu": 10.0, "sys_cpu": 20.0,
              "read": {"iops": 3000.0, "runtime": 2000, "clat_ns": {"percentile": {"50.000000": 90000}}},
              "write": {"iops": 1000.0, "runtime": 2000, "clat_ns": {"percentile": {"50.000000": 80000}}}}]}"#;
        let (metrics, _) = parse(text).unwrap();
        assert_eq!(metrics[&Metric::Iops], 4000.0);
        assert_eq!(metrics[&Metric::Pairs], 2000.0);
        assert_eq!(metrics[&Metric::CpuUs], 75.0);
        assert_eq!(metrics[&Metric::P50Us], 90.0);
        assert!(parse(&text.replace("\"error\": 0", "\"error\": 5")).is_none());
        assert!(parse("fio: broken").is_none());
    }
}
