//! From a load on a server to the figures of a sample: what comparisons and experiments have in common.

use crate::{
    load::{self, Histogram, Pattern, Report, Spec, Target, timeline},
    metric::{Metric, Metrics},
    peer::{Running, Seen},
    record::{Sample, Stages},
};
use block::{Context, Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

/// How long filling a file may take before it is called stuck.
const FILL_LIMIT: Duration = Duration::from_secs(900);

/// What loads that ran at the same time say together.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub metrics: Metrics,
    pub latency: Histogram,
    pub timeline: timeline::Stored,
    /// The reports, for the record.
    pub reports: Value,
}

/// Writes the whole of a target once, in order.
pub(crate) fn fill(target: &Target, bytes: u64) -> Result<()> {
    const BLOCK: u64 = 256 << 10;
    let spec = Spec {
        pattern: Pattern::Write,
        block_bytes: BLOCK,
        depth: 8,
        ios_max: Some(bytes / BLOCK),
        duration: FILL_LIMIT,
        ..Spec::new(target.clone())
    };
    let report = load::run(&spec)?;
    if report.errors > 0 || report.bytes < bytes / BLOCK * BLOCK {
        return Err(Error::new(
            ErrorKind::Io,
            format!(
                "filling wrote {} of {bytes} bytes, {} requests failed",
                report.bytes, report.errors
            ),
        ));
    }
    Ok(())
}

/// Runs loads at the same time.
pub(crate) fn run_all(specs: &[Spec]) -> Result<Vec<Report>> {
    if let [spec] = specs {
        return Ok(vec![load::run(spec)?]);
    }
    thread::scope(|scope| {
        join(
            specs
                .iter()
                .map(|spec| scope.spawn(|| load::run(spec)))
                .collect(),
        )
    })
}

/// Waits for all loads; what they reported, or the first error.
pub(crate) fn join(loads: Vec<ScopedJoinHandle<'_, Result<Report>>>) -> Result<Vec<Report>> {
    let ended = |load: ScopedJoinHandle<'_, Result<Report>>| {
        let panicked = || Err(Error::new(ErrorKind::Io, "a load panicked"));
        load.join().unwrap_or_else(|_| panicked())
    };
    let reports: Vec<Result<Report>> = loads.into_iter().map(ended).collect();
    reports.into_iter().collect()
}

/// Stops a server after its load, and takes together what was measured and what the server says of itself.
///
/// # Errors
///
/// Those of the load, with the server's words; it did not end well.
pub(crate) fn finish(running: Running, seen: Seen, measured: Result<Measured>) -> Result<Sample> {
    let mut measured = match measured {
        Ok(measured) => measured,
        Err(error) => return Err(running.failed(&error)),
    };
    let detail = json!({ "command": running.command, "reports": measured.reports });
    let has_statistics = running.has_statistics;
    let words = running.stop()?;
    let mut stages = BTreeMap::new();
    if has_statistics {
        let ratio = barriers_per_flush(&words).map(|ratio| (Metric::BarriersPerFlush, ratio));
        measured.metrics.extend(ratio);
        stages = self::stages(&words);
    }
    Ok(Sample {
        metrics: measured.metrics,
        seen: Some(seen),
        latency: measured.latency,
        timeline: measured.timeline,
        stages,
        detail,
        ..Sample::default()
    })
}

/// The figures of loads that ran at the same time, against one server, against one each, or without any.
///
/// # Errors
///
/// Requests failed, none ended, the server is gone.
pub(crate) fn figures(reports: &[Report], pids: &[u32]) -> Result<Measured> {
    let errors: u64 = reports.iter().map(|r| r.errors).sum();
    if errors > 0 {
        return Err(Error::new(
            ErrorKind::Io,
            format!("{errors} requests failed"),
        ));
    }
    let iops: f64 = reports.iter().map(|r| r.iops).sum();
    if iops <= 0.0 {
        return Err(Error::new(ErrorKind::Io, "no request ended"));
    }
    let mean = |of: fn(&Report) -> f64| reports.iter().map(of).sum::<f64>() / reports.len() as f64;
    let mut metrics = Metrics::from([
        (Metric::Iops, iops),
        (Metric::P50Us, mean(|r| r.latency.p50_us)),
        (Metric::P90Us, mean(|r| r.latency.p90_us)),
        (Metric::P99Us, mean(|r| r.latency.p99_us)),
        (Metric::P999Us, mean(|r| r.latency.p99_9_us)),
        (Metric::P9999Us, mean(|r| r.latency.p99_99_us)),
        (Metric::MeanUs, mean(|r| r.latency.mean_us)),
        (Metric::MaxUs, mean(|r| r.latency.max_us)),
        (Metric::MbS, reports.iter().map(|r| r.mb_s).sum()),
    ]);
    if !pids.is_empty() {
        let all: Result<Vec<f64>> = pids.iter().map(|pid| anonymous_mib(*pid)).collect();
        metrics.insert(Metric::MemoryMib, all?.iter().sum());
    }
    // Each report divides its process's time by its own requests: all the same one's, or each another one's.
    let processes = pids.len().max(1) as f64;
    let shared = |of: fn(&Report) -> Option<f64>| {
        let rates: Vec<f64> = reports
            .iter()
            .filter_map(|r| Some(of(r)? * r.iops))
            .collect();
        let us_per_second = rates.iter().sum::<f64>() / rates.len() as f64 * processes;
        (!rates.is_empty()).then_some(us_per_second / iops)
    };
    let cpu = [
        (Metric::CpuUs, shared(|r| r.server_cpu_us_per_io)),
        (Metric::CpuUserUs, shared(|r| r.server_user_us_per_io)),
        (Metric::Switches, shared(|r| r.server_switches_per_io)),
        (
            Metric::ClientCpuUs,
            shared(|r| Some(r.client_cpu_us_per_io)).map(|us| us / processes),
        ),
    ];
    metrics.extend(cpu.into_iter().filter_map(|(m, v)| Some((m, v?))));
    derive(&mut metrics);
    let mut latency = Histogram::default();
    for report in reports {
        latency.merge(&report.histogram);
    }
    Ok(Measured {
        metrics,
        latency,
        timeline: reports
            .first()
            .map(|r| r.timeline.clone())
            .unwrap_or_default(),
        reports: serde_json::to_value(reports).unwrap_or_default(),
    })
}

/// Adds the figures that follow from others.
pub(crate) fn derive(metrics: &mut Metrics) {
    let of = |metric: Metric| metrics.get(&metric).copied();
    let percent = of(Metric::CpuUs)
        .zip(of(Metric::Iops))
        .map(|(us, iops)| us * iops / 1e4);
    let system = of(Metric::CpuUs)
        .zip(of(Metric::CpuUserUs))
        .map(|(all, user)| (all - user).max(0.0));
    let mb_s = of(Metric::MbS).filter(|mb_s| *mb_s > 0.0);
    let per_mb = percent.zip(mb_s).map(|(percent, mb_s)| percent / mb_s);
    let derived = [
        (Metric::CpuPercent, percent),
        (Metric::CpuSystemUs, system),
        (Metric::CpuPercentPerMb, per_mb),
    ];
    metrics.extend(derived.into_iter().filter_map(|(m, v)| Some((m, v?))));
}

/// Anonymous memory of a process: the guest's memory is shared and the program's text is a file's, so neither counts.
pub(crate) fn anonymous_mib(pid: u32) -> Result<f64> {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let status = fs::read_to_string(&path).context(|| path.display().to_string())?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
    kib.map(|kib| kib / 1024.0)
        .ok_or_else(|| Error::new(ErrorKind::Io, format!("{}: no RssAnon", path.display())))
}

/// The statistics that `serve --stats=json` ends with, a disk each.
fn statistics(words: &str) -> impl Iterator<Item = Value> {
    let lines = words
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter_map(|mut line| Some(line.get_mut("statistics")?.take()))
}

/// Barriers for each flush, from a server's last words.
fn barriers_per_flush(words: &str) -> Option<f64> {
    let statistics = statistics(words).last()?;
    let operations = statistics["operations"].as_array()?;
    let flush = operations.iter().find(|o| o["operation"] == "flush")?;
    let flushes = flush["count"].as_f64().filter(|n| *n > 0.0)?;
    Some(statistics["barriers"].as_f64()? / flushes)
}

/// Mean times of the stages of each operation, from a server's last words: over all disks and the server's whole life,
/// what ran before the measurement included.
fn stages(words: &str) -> BTreeMap<String, Stages> {
    let mut all: BTreeMap<String, Stages> = BTreeMap::new();
    for statistics in statistics(words) {
        for operation in statistics["operations"].as_array().into_iter().flatten() {
            let us = |field: &str| operation[field].as_f64().unwrap_or_default() / 1000.0;
            let (Some(name), Some(count)) = (
                operation["operation"].as_str(),
                operation["count"].as_u64().filter(|count| *count > 0),
            ) else {
                continue;
            };
            all.entry(name.to_owned()).or_default().add(&Stages {
                count,
                map_us: us("map_ns"),
                submit_us: us("submit_ns"),
                device_us: us("device_ns"),
                complete_us: us("complete_ns"),
                notify_us: us("notify_ns"),
            });
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_at_the_same_time_share_the_servers_time() {
        // Two loads of 1000 and 3000 I/Os a second; the server used 0.1 s of CPU a second.
        let report = |iops: f64| Report {
            iops,
            server_cpu_us_per_io: Some(100_000.0 / iops),
            ..Report::default()
        };
        let pid = std::process::id();
        let metrics = figures(&[report(1000.0), report(3000.0)], &[pid])
            .unwrap()
            .metrics;
        assert_eq!(metrics[&Metric::Iops], 4000.0);
        assert!((metrics[&Metric::CpuUs] - 25.0).abs() < 1e-9);
        assert!(metrics[&Metric::MemoryMib] > 0.0);
        let failed = Report {
            errors: 1,
            ..report(1.0)
        };
        assert!((metrics[&Metric::CpuPercent] - 10.0).abs() < 1e-9);
        // Each with a server of its own, of which each used as much.
        let own = figures(&[report(1000.0), report(3000.0)], &[pid, pid]).unwrap();
        assert!((own.metrics[&Metric::CpuUs] - 50.0).abs() < 1e-9);
        assert!(figures(&[failed], &[pid]).is_err());
        assert!(figures(&[Report::default()], &[]).is_err());
    }

    #[test]
    fn barriers_are_counted_from_the_statistics() {
        let words = "diskplane: note: something\n\
            {\"disk\":\"x\",\"statistics\":{\"operations\":[{\"operation\":\"write\",\"count\":9},\
            {\"operation\":\"flush\",\"count\":8}],\"commits\":2,\"barriers\":4}}\n";
        assert_eq!(barriers_per_flush(words), Some(0.5));
        assert_eq!(barriers_per_flush("nothing"), None);
        assert_eq!(stages(words)["write"].count, 9);
    }

    #[test]
    fn stages_of_several_disks_are_weighed_by_their_requests() {
        let line = |count: u64, ns: u64| {
            format!(
                "{{\"disk\":\"x\",\"statistics\":{{\"operations\":[{{\"operation\":\"read\",\
                 \"count\":{count},\"map_ns\":1000,\"device_ns\":{ns}}}]}}}}\n"
            )
        };
        let all = stages(&[line(1, 100_000), line(3, 20_000), line(0, 1)].concat());
        let read = &all["read"];
        assert_eq!((read.count, read.map_us, read.device_us), (4, 1.0, 40.0));
        assert_eq!(read.total_us(), 41.0);
        assert!(stages("{\"statistics\": 7}\n").is_empty());
    }
}
