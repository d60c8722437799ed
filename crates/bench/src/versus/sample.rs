//! One sample: server started, load run, figures taken, server stopped.
//!
//! The load runs in threads of this process, not in a child: nothing else runs here meanwhile, its CPU time is
//! accounted for by thread, and a child would only add its start to each of hundreds of short samples.

use super::{
    cell::{Cell, Image, Load, Metric, Server, Side},
    command,
    device::{Device, Work},
    fio,
    image::Images,
    judge::Metrics,
    others::Watch,
    server::{self, Programs, Running, Seen},
};
use crate::load::{self, Report, Spec};
use block::{Context, Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::{fs, path::PathBuf, thread, time::Duration};

/// How long to run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub ramp: Duration,
    pub duration: Duration,
}

/// What a sample brought.
#[derive(Debug)]
pub(super) struct Sample {
    pub metrics: Metrics,
    pub seen: Option<Seen>,
    /// For the record: the command and everything that was reported.
    pub detail: Value,
}

/// Takes one.
pub(super) fn take(
    programs: &Programs,
    images: &Images,
    cell: &Cell,
    side: &Side,
    engine: &str,
    times: Times,
    seed: u64,
) -> Result<Sample> {
    let load = side.load.unwrap_or(cell.load);
    let files = images.files(side.image)?;
    if side.image != Image::Null {
        images.settle()?;
    }
    if let Some(job) = side.job {
        return command::take(programs, images, side, job, engine, &files);
    }
    let times = Times {
        ramp: times.ramp + Duration::from_secs_f64(load.warm),
        ..times
    };
    let device = Device::below(images.work());
    let before = device.work();
    if side.server == Server::Fio {
        let job = fio_job(programs, images, side, &load, &files)?;
        let (mut metrics, detail) = fio::run(&job, times, images.work())?;
        in_device(&mut metrics, device.work().since(before));
        if side.image.fresh() {
            images.remove(side.image);
        }
        return Ok(Sample {
            metrics,
            seen: None,
            detail,
        });
    }
    let work = images.work();
    let running = server::start(programs, images, side, engine, &files, work, false)?;
    let seen = running.seen(&files, side.queues)?;
    let watch = Watch::begin(running.pid());
    let measured = if load.idle {
        super::idle::rest(&running, times.duration)
    } else {
        let specs = specs(&load, side, images, &running, times, seed);
        run_all(&specs).and_then(|reports| figures(&reports, running.pid()))
    };
    let others = watch.others_percent();
    let sample = finish(running, seen, measured, others, device.work().since(before));
    if side.image.fresh() {
        images.remove(side.image);
    }
    sample
}

/// Stops a server after its load, and takes the figures together. `others` is CPU, `work` the device's.
pub(super) fn finish(
    running: Running,
    seen: Seen,
    measured: Result<(Metrics, Value)>,
    others: f64,
    work: Work,
) -> Result<Sample> {
    let (mut metrics, reports) = match measured {
        Ok(measured) => measured,
        Err(error) => return Err(running.failed(&error)),
    };
    metrics.insert(Metric::OthersPercent, others);
    in_device(&mut metrics, work);
    let detail = json!({ "command": running.command, "reports": reports });
    let has_statistics = running.has_statistics;
    let words = running.stop()?;
    if has_statistics && let Some(ratio) = barriers_per_flush(&words) {
        metrics.insert(Metric::BarriersPerFlush, ratio);
    }
    Ok(Sample {
        metrics,
        seen: Some(seen),
        detail,
    })
}

pub(super) fn in_device(metrics: &mut Metrics, work: Work) {
    let iops = metrics.get(&Metric::Iops);
    if let Some(requests) = iops.and_then(|iops| work.at_a_time(*iops)) {
        metrics.insert(Metric::InDevice, requests);
    }
}

/// What fio is to do as `side`.
pub(super) fn fio_job<'a>(
    programs: &Programs,
    images: &Images,
    side: &Side,
    load: &'a Load,
    files: &'a [PathBuf],
) -> Result<fio::Job<'a>> {
    let [file] = files else {
        return Err(Error::invalid("fio takes one file"));
    };
    Ok(fio::Job {
        load,
        file,
        direct: programs.direct,
        range: side.image.range(images.sizes()),
    })
}

/// The load on each disk of a server.
pub(super) fn specs(
    load: &Load,
    side: &Side,
    images: &Images,
    running: &Running,
    times: Times,
    seed: u64,
) -> Vec<Spec> {
    let (start, len) = side.image.range(images.sizes());
    let of_target = |(n, target): (u64, &load::Target)| Spec {
        pattern: load.pattern,
        read_percent: load.reads,
        block_bytes: load.block,
        depth: load.depth,
        queues: u32::from(side.queues),
        flushes: load.flushes,
        stride_bytes: load.stride,
        start_bytes: start,
        range_bytes: len,
        duration: times.duration,
        ramp: times.ramp,
        ios_max: (load.grows > 0).then(|| images.sizes().growth / load.grows),
        poll: load.poll,
        seed: seed + n,
        server_pids: vec![running.pid()],
        ..Spec::new(target.clone())
    };
    (0..).zip(&running.targets).map(of_target).collect()
}

/// Runs loads at the same time.
fn run_all(specs: &[Spec]) -> Result<Vec<Report>> {
    if let [spec] = specs {
        return Ok(vec![load::run(spec)?]);
    }
    thread::scope(|scope| {
        let threads: Vec<_> = specs
            .iter()
            .map(|spec| scope.spawn(|| load::run(spec)))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<Report>>| {
            let panicked = || Err(Error::new(ErrorKind::Io, "a load panicked"));
            thread.join().unwrap_or_else(|_| panicked())
        };
        threads.into_iter().map(join).collect()
    })
}

/// The figures of loads that ran at the same time against one server.
pub(super) fn figures(reports: &[Report], pid: u32) -> Result<(Metrics, Value)> {
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
        (Metric::P99Us, mean(|r| r.latency.p99_us)),
        (Metric::MemoryMib, anonymous_mib(pid)?),
    ]);
    // Each report divides the same server's time by its own requests.
    let rates: Vec<f64> = reports
        .iter()
        .filter_map(|r| Some(r.server_cpu_us_per_io? * r.iops))
        .collect();
    if !rates.is_empty() {
        let us_per_second = rates.iter().sum::<f64>() / rates.len() as f64;
        metrics.insert(Metric::CpuUs, us_per_second / iops);
    }
    let reports = serde_json::to_value(reports).unwrap_or_default();
    Ok((metrics, reports))
}

/// Anonymous memory of a process: the guest's memory is shared and the program's text is a file's, so neither counts.
pub(super) fn anonymous_mib(pid: u32) -> Result<f64> {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let status = fs::read_to_string(&path).context(|| path.display().to_string())?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
    kib.map(|kib| kib / 1024.0)
        .ok_or_else(|| Error::new(ErrorKind::Io, format!("{}: no RssAnon", path.display())))
}

/// From the statistics that `serve --stats=json` ends with.
fn barriers_per_flush(words: &str) -> Option<f64> {
    let lines = words
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let statistics = lines
        .filter_map(|mut line| Some(line.get_mut("statistics")?.take()))
        .next_back()?;
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
            ..Report::default()
        };
        let (metrics, _) = figures(&[report(1000.0), report(3000.0)], std::process::id()).unwrap();
        assert_eq!(metrics[&Metric::Iops], 4000.0);
        assert!((metrics[&Metric::CpuUs] - 25.0).abs() < 1e-9);
        assert!(metrics[&Metric::MemoryMib] > 0.0);
        let failed = Report {
            errors: 1,
            ..report(1.0)
        };
        assert!(figures(&[failed], std::process::id()).is_err());
        assert!(figures(&[Report::default()], std::process::id()).is_err());
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
