//! From a load on a server to the figures of a sample: what comparisons and experiments have in common.

use crate::{
    flame,
    load::{self, Pattern, Percentiles, Report, Spec, Target, timeline},
    machine::others::{Activity, Watch},
    metric::{Metric, Metrics},
    peer::{Running, Seen},
    record::Sample,
};
use block::{Context, Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    thread::{self, ScopedJoinHandle},
    time::Duration,
};
use trace::{Buckets, Totals};

/// How long system calls are counted.
const COUNTED: Duration = Duration::from_millis(150);

/// How long a server is looked at for a flame graph.
const DRAWN: Duration = Duration::from_secs(1);

/// How long filling a file may take before it is called stuck.
const FILL_LIMIT: Duration = Duration::from_secs(900);

/// What loads that ran at the same time say together.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub metrics: Metrics,
    pub latency: Buckets,
    pub timeline: timeline::Stored,
    /// What requests spent in the server's stages, by operation.
    pub stages: BTreeMap<String, Totals>,
    /// Interrupts of the machine a second, by source.
    pub interrupts: BTreeMap<String, f64>,
    /// The reports, for the record.
    pub reports: Value,
}

impl Measured {
    /// With what the machine did while it was measured.
    pub(crate) fn meanwhile(&mut self, activity: &Activity) {
        activity.add_to(&mut self.metrics);
        self.interrupts = activity.interrupts();
    }

    /// There is no server: what the requests cost is ours, generator and all.
    pub(crate) fn is_of_the_client(&mut self) {
        if let Some(us) = self.metrics.get(&Metric::ClientCpuUs).copied() {
            self.metrics.insert(Metric::CpuUs, us);
            derive(&mut self.metrics);
        }
    }
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
    if report.failed() > 0 || report.bytes < bytes / BLOCK * BLOCK {
        return Err(Error::new(
            ErrorKind::Io,
            format!(
                "filling wrote {} of {bytes} bytes, {} requests failed",
                report.bytes,
                report.failed()
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

/// Who is under load: servers, and what is asked of them; without servers a file itself.
#[derive(Debug)]
pub(crate) struct Subject {
    pub specs: Vec<Spec>,
    pub servers: Vec<(Running, Seen)>,
}

impl Subject {
    /// The servers' processes.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let pids = self.servers.iter().map(|(running, _)| running.pid());
        pids.collect()
    }

    /// Runs the load from its beginning to its end; what was measured, with what the machine did meanwhile.
    pub(crate) fn measure(&self) -> Result<Measured> {
        let pids = self.pids();
        let watch = Watch::begin(&pids);
        let mut measured = figures(&run_all(&self.specs)?, &pids)?;
        measured.meanwhile(&watch.since());
        Ok(measured)
    }

    /// Stops the servers after the load, and takes together what was measured and what they say of themselves.
    ///
    /// # Errors
    ///
    /// Those of the load, with a server's words; one did not end well.
    pub(crate) fn finish(self, measured: Result<Measured>) -> Result<Sample> {
        let mut measured = match measured {
            Ok(measured) => measured,
            Err(error) => {
                return Err(match self.servers.first() {
                    Some((running, _)) => running.failed(&error),
                    None => error,
                });
            }
        };
        let mut detail = json!({ "reports": measured.reports });
        let mut outcome = Ok(());
        let mut all = Vec::new();
        for (running, seen) in self.servers {
            let command = running.command.clone();
            let has_statistics = running.control.is_some();
            let words = match running.stop() {
                Ok(words) => words,
                Err(error) => {
                    outcome = Err(error);
                    continue;
                }
            };
            // What the others are started with and say is the same; what they are seen to have open may not be.
            if all.is_empty() {
                detail["command"] = json!(command);
                let ratio = barriers_per_flush(&words).filter(|_| has_statistics);
                let ratio = ratio.map(|ratio| (Metric::BarriersPerFlush, ratio));
                measured.metrics.extend(ratio);
            }
            all.push(seen);
        }
        outcome?;
        Ok(Sample {
            metrics: measured.metrics,
            seen: Seen::all(all.into_iter()),
            latency: measured.latency,
            timeline: measured.timeline,
            stages: measured.stages,
            interrupts: measured.interrupts,
            detail,
            ..Sample::default()
        })
    }
}

/// The figures of loads that ran at the same time, against one server, against one each, or without any.
///
/// # Errors
///
/// Requests failed, or none ended.
pub(crate) fn figures(reports: &[Report], pids: &[u32]) -> Result<Measured> {
    let errors: u64 = reports.iter().map(Report::failed).sum();
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
    let mut latency = Buckets::default();
    let mut timeline = timeline::Stored::default();
    let mut stages: BTreeMap<String, Totals> = BTreeMap::new();
    for report in reports {
        latency.merge(&report.histogram);
        timeline.merge(&report.timeline);
        for (operation, totals) in &report.stages {
            stages.entry(operation.clone()).or_default().add(totals);
        }
    }
    let all = match reports {
        [one] => one.latency,
        _ => Percentiles::merged(reports.iter().map(|r| &r.latency), &latency),
    };
    let mut metrics = Metrics::from([
        (Metric::Iops, iops),
        (Metric::P50Us, all.p50_us),
        (Metric::P90Us, all.p90_us),
        (Metric::P99Us, all.p99_us),
        (Metric::P999Us, all.p99_9_us),
        (Metric::P9999Us, all.p99_99_us),
        (Metric::MeanUs, all.mean_us),
        (Metric::MaxUs, all.max_us),
        (Metric::MbS, reports.iter().map(|r| r.mb_s).sum()),
    ]);
    // Each report divides its process's time by its own requests: all the same one's, or each another one's.
    let processes = pids.len().max(1);
    let memory = |of: fn(&Report) -> Option<u64>| {
        let each: Vec<u64> = reports.iter().filter_map(of).take(processes).collect();
        (!each.is_empty()).then(|| mib(each.iter().sum()))
    };
    let memory = [
        (Metric::MemoryMib, memory(|r| r.server_anonymous_bytes)),
        (Metric::PeakMib, memory(|r| r.server_peak_bytes)),
    ];
    metrics.extend(memory.into_iter().filter_map(|(m, v)| Some((m, v?))));
    let processes = processes as f64;
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
        (Metric::PageFaults, shared(|r| r.server_faults_per_io)),
        (
            Metric::MajorFaults,
            shared(|r| r.server_major_faults_per_io),
        ),
        (
            Metric::ClientCpuUs,
            shared(|r| Some(r.client_cpu_us_per_io)).map(|us| us / processes),
        ),
        (
            Metric::ClientUserUs,
            shared(|r| Some(r.client_user_us_per_io)).map(|us| us / processes),
        ),
    ];
    metrics.extend(cpu.into_iter().filter_map(|(m, v)| Some((m, v?))));
    derive(&mut metrics);
    Ok(Measured {
        metrics,
        latency,
        stages,
        interrupts: BTreeMap::new(),
        timeline,
        reports: serde_json::to_value(reports).unwrap_or_default(),
    })
}

/// Bytes as MiB.
pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Adds the figures that follow from others.
fn derive(metrics: &mut Metrics) {
    let of = |metric: Metric| metrics.get(&metric).copied();
    let percent = of(Metric::CpuUs)
        .zip(of(Metric::Iops))
        .map(|(us, iops)| us * iops / 1e4);
    let rest = |all: Metric, user: Metric| Some((of(all)? - of(user)?).max(0.0));
    let system = rest(Metric::CpuUs, Metric::CpuUserUs);
    let client = rest(Metric::ClientCpuUs, Metric::ClientUserUs);
    let mb_s = of(Metric::MbS).filter(|mb_s| *mb_s > 0.0);
    let per_mb = percent.zip(mb_s).map(|(percent, mb_s)| percent / mb_s);
    let derived = [
        (Metric::CpuPercent, percent),
        (Metric::CpuSystemUs, system),
        (Metric::ClientSystemUs, client),
        (Metric::CpuPercentPerMb, per_mb),
    ];
    metrics.extend(derived.into_iter().filter_map(|(m, v)| Some((m, v?))));
}

/// System calls of a server per request, from short loads like `specs`; nothing where the kernel does not let them be counted,
/// or where loads change what they find.
///
/// # Errors
///
/// Those of the load.
pub(crate) fn syscalls(specs: &[Spec]) -> Result<Option<(Metric, f64)>> {
    if specs.iter().any(|spec| spec.ios_max.is_some()) {
        return Ok(None);
    }
    // Of those that have the same server one counts.
    let first = |n: usize, pids: &[u32]| specs[..n].iter().all(|spec| spec.server_pids != pids);
    let counting = specs.iter().cloned().enumerate().map(|(n, spec)| Spec {
        count_syscalls: first(n, &spec.server_pids),
        control: None,
        ramp: Duration::from_millis(20),
        duration: COUNTED,
        ..spec
    });
    let reports = match run_all(&counting.collect::<Vec<_>>()) {
        Ok(reports) => reports,
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            tracing::debug!("{error}");
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let requests = |r: &Report| (r.reads + r.writes + r.flushes) as f64;
    let all: f64 = reports.iter().map(requests).sum();
    let calls = reports
        .iter()
        .filter_map(|r| Some(r.server_syscalls_per_io? * requests(r)));
    let calls = calls.reduce(|a, b| a + b).filter(|_| all > 0.0);
    Ok(calls.map(|calls| (Metric::Syscalls, calls / all)))
}

/// Draws where the servers `pids` spend its CPU under short loads like `specs`, into `out`; false where loads change what they find.
///
/// # Errors
///
/// Those of the load, and of [`flame`].
pub(crate) fn flame(specs: &[Spec], pids: &[u32], out: &Path, title: &str) -> Result<bool> {
    if specs.iter().any(|spec| spec.ios_max.is_some()) {
        return Ok(false);
    }
    let drawn = specs.iter().cloned().map(|spec| Spec {
        control: None,
        ramp: DRAWN / 5,
        duration: DRAWN,
        ..spec
    });
    let drawn: Vec<Spec> = drawn.collect();
    if let Some(folder) = out.parent() {
        fs::create_dir_all(folder).context(|| folder.display().to_string())?;
    }
    flame::around(pids, out, title, || run_all(&drawn).map(drop))?;
    Ok(true)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_at_the_same_time_share_the_servers_time() {
        // Two loads of 1000 and 3000 I/Os a second; the server used 0.1 s of CPU a second.
        let report = |iops: f64| Report {
            iops,
            server_cpu_us_per_io: Some(100_000.0 / iops),
            server_anonymous_bytes: Some(3 << 20),
            stages: [(
                "read".to_owned(),
                Totals {
                    count: 5,
                    ..Totals::default()
                },
            )]
            .into(),
            ..Report::default()
        };
        let pid = std::process::id();
        let measured = figures(&[report(1000.0), report(3000.0)], &[pid]).unwrap();
        let metrics = measured.metrics;
        assert_eq!(metrics[&Metric::Iops], 4000.0);
        assert!((metrics[&Metric::CpuUs] - 25.0).abs() < 1e-9);
        assert_eq!(metrics[&Metric::MemoryMib], 3.0);
        assert_eq!(measured.stages["read"].count, 10);
        let failed = Report {
            errors: 1,
            ..report(1.0)
        };
        assert!((metrics[&Metric::CpuPercent] - 10.0).abs() < 1e-9);
        // Each with a server of its own, of which each used as much.
        let own = figures(&[report(1000.0), report(3000.0)], &[pid, pid]).unwrap();
        assert!((own.metrics[&Metric::CpuUs] - 50.0).abs() < 1e-9);
        assert_eq!(own.metrics[&Metric::MemoryMib], 6.0);
        assert!(figures(&[failed], &[pid]).is_err());
        assert!(figures(&[Report::default()], &[]).is_err());
    }

    #[test]
    fn latencies_of_loads_at_the_same_time_are_those_of_all_requests() {
        // One load of 99 fast requests, one of a slow one: half of all are not at the mean of the two medians.
        let report = |ns: u64, count: u64| {
            let us = ns as f64 / 1000.0;
            Report {
                iops: 1.0,
                latency: Percentiles {
                    count,
                    min_us: us,
                    mean_us: us,
                    p50_us: us,
                    max_us: us,
                    ..Percentiles::default()
                },
                histogram: [(ns, count)].into_iter().collect(),
                timeline: timeline::Stored {
                    slice_ms: 10.0,
                    rows: vec![vec![(3, count as u32)]],
                },
                ..Report::default()
            }
        };
        let measured = figures(&[report(100_000, 99), report(9_000_000, 1)], &[]).unwrap();
        let of = |metric: Metric| measured.metrics[&metric];
        assert_eq!((of(Metric::P50Us), of(Metric::P99Us)), (100.0, 100.0));
        assert_eq!((of(Metric::P999Us), of(Metric::MaxUs)), (9000.0, 9000.0));
        assert_eq!(of(Metric::MeanUs), 189.0);
        assert_eq!(measured.timeline.rows, [[(3, 100)]]);
    }

    #[test]
    fn barriers_are_counted_from_the_statistics() {
        let words = "diskplane: note: something\n\
            {\"disk\":\"x\",\"statistics\":{\"operations\":[{\"operation\":\"write\",\"count\":9},\
            {\"operation\":\"flush\",\"count\":8}],\"commits\":2,\"barriers\":4}}\n";
        assert_eq!(barriers_per_flush(words), Some(0.5));
        assert_eq!(barriers_per_flush("nothing"), None);
    }
}
