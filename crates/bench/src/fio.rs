//! fio instead of our generators, where it is installed: the same loads, and its figures in the same reports.
//!
//! Latencies are fio's `lat`: from when a request is made to when its end is seen, submission included, which is what ours
//! are. (Its `clat` begins when the request was submitted.)

use crate::{
    load::{Flushes, Latencies, Percentiles, Report, Spec, Target, psync},
    machine::{pre_exec, process},
};
use block::{Context, Error, ErrorKind, Result};
use serde_json::Value;
use std::{
    ffi::OsString,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// What it is told always: threads instead of processes, numbers of the seed that is given, and files as they are.
pub(crate) const HABITS: [&str; 5] = [
    // Of the whole request, as ours: `clat` begins when it was submitted.
    "--lat_percentiles=1",
    "--thread",
    "--randrepeat=0",
    "--allow_file_create=0",
    "--fallocate=none",
];

/// Characters of fio's words that an error repeats.
const WORDS_MAX: usize = 600;

/// What one of fio's jobs said.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its name.
    pub name: String,
    /// Its figures. What fio does not tell (notifications, the server's) is 0 or absent.
    pub report: Report,
}

/// Has fio run a load.
///
/// # Errors
///
/// fio cannot do what is asked, is not installed, or failed.
pub fn run(spec: &Spec) -> Result<Report> {
    let mut command = Command::new("fio");
    command.args(arguments(spec)?);
    let mut jobs = jobs(&mut command)?;
    match (jobs.pop(), jobs.is_empty()) {
        (Some(job), true) => Ok(job.report),
        _ => Err(Error::new(
            ErrorKind::Io,
            "fio reported other jobs than were asked for",
        )),
    }
}

/// Has fio run a job file.
///
/// # Errors
///
/// fio is not installed, or failed.
pub fn run_file(path: &Path) -> Result<Vec<Job>> {
    // A name that begins with '-' is a file's all the same.
    let path = match path.is_absolute() {
        true => path.to_owned(),
        false => Path::new(".").join(path),
    };
    let mut command = Command::new("fio");
    // Before the file: what goes for its jobs.
    command.arg(HABITS[0]).arg(path);
    jobs(&mut command)
}

/// fio's command line for a load.
pub(crate) fn arguments(spec: &Spec) -> Result<Vec<OsString>> {
    spec.check()?;
    let cannot = |what: &str| Err(Error::unsupported(format!("--engine fio: {what}")));
    if spec.verify.is_some() || spec.poll || spec.stride_bytes.is_some() {
        return cannot("--verify, --poll and --stride are of our own generators");
    }
    if !spec.server_pids.is_empty() || spec.control.is_some() {
        return cannot("--pid and --control are looked at by our own generators");
    }
    if !spec.think.is_zero() && spec.depth > 1 {
        return cannot("its thinktime holds all requests: give --depth 1");
    }
    let mut all: Vec<OsString> = Vec::new();
    let mut give = |name: &str, value: &dyn std::fmt::Display| {
        all.push(format!("--{name}={value}").into());
    };
    give("name", &"load");
    give("rw", &spec.pattern.name());
    give("rwmixread", &spec.read_percent);
    give("bs", &spec.block_bytes);
    give("iodepth", &spec.depth);
    give("numjobs", &spec.queues);
    give("randseed", &spec.seed);
    give("offset", &spec.start_bytes);
    if let Some(range) = spec.range_bytes {
        give("size", &range);
    }
    if let Some(ios) = spec.ios_max {
        if !ios.is_multiple_of(spec.queues.into()) {
            return cannot("--ios must be a multiple of --queues");
        }
        give("number_ios", &(ios / u64::from(spec.queues)));
    }
    if !spec.duration.is_zero() {
        give("runtime", &format!("{}us", spec.duration.as_micros()));
    }
    if spec.ios_max.is_none() {
        give("time_based", &1);
    } else {
        // It ends after its size otherwise, though more is asked for.
        give(
            "io_size",
            &(spec
                .ios_max
                .unwrap_or_default()
                .saturating_mul(spec.block_bytes)),
        );
    }
    if !spec.ramp.is_zero() {
        give("ramp_time", &format!("{}us", spec.ramp.as_micros()));
    }
    if let Some(rate) = spec.rate {
        give("rate_iops", &(rate / f64::from(spec.queues)).ceil());
    }
    if !spec.think.is_zero() {
        give("thinktime", &format!("{}us", spec.think.as_micros()));
    }
    if let Some(theta) = spec.zipf {
        give("random_distribution", &format!("zipf:{theta}"));
    }
    match spec.flushes {
        Flushes::Never => {}
        Flushes::AfterEachWrite => give("fdatasync", &1),
        Flushes::Every(writes) => give("fdatasync", &writes),
    }
    all.extend(["--norandommap", "--group_reporting"].map(OsString::from));
    all.extend(HABITS.map(OsString::from));
    match &spec.target {
        Target::File {
            path,
            engine,
            direct,
        } => {
            let engine = match (engine.as_str(), spec.depth) {
                ("native", _) => "libaio",
                ("threads", 1) | (psync::NAME, _) => "psync",
                ("threads", _) => "posixaio",
                _ => "io_uring",
            };
            all.push(format!("--ioengine={engine}").into());
            all.push(format!("--direct={}", u8::from(*direct)).into());
            all.push(file_name(path).into());
        }
        Target::Nbd(uri) => {
            let uri = match uri.strip_prefix("unix:") {
                Some(socket) => format!("nbd+unix:///?socket={socket}"),
                None => uri.clone(),
            };
            all.push("--ioengine=nbd".into());
            all.push(format!("--uri={uri}").into());
        }
        Target::VhostUser(_) => {
            return cannot("fio has no driver of vhost-user-blk: give --file or --nbd");
        }
    }
    Ok(all)
}

/// Which file it is to work on.
pub(crate) fn file_name(path: &Path) -> String {
    // A colon would begin another file.
    let name = path.to_string_lossy().replace(':', "\\:");
    format!("--filename={name}")
}

/// Its report as JSON, which notes may precede.
pub(crate) fn json(text: &str) -> Option<Value> {
    serde_json::from_str(&text[text.find('{')?..]).ok()
}

fn jobs(command: &mut Command) -> Result<Vec<Job>> {
    command
        .arg("--output-format=json+")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    pre_exec::tie(command);
    let output = match command.output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(process::missing("fio"));
        }
        output => output.context(|| "run fio")?,
    };
    let words = String::from_utf8_lossy(&output.stderr);
    let failed = |what: &str| {
        let words = words.trim();
        let start = words.ceil_char_boundary(words.len().saturating_sub(WORDS_MAX));
        let words: Vec<&str> = words[start..].lines().collect();
        Error::new(ErrorKind::Io, format!("fio {what}: {}", words.join("; ")))
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let jobs = parse(&text);
    if !output.status.success() {
        return Err(failed(&format!("ended with {}", output.status)));
    }
    jobs.ok_or_else(|| failed("said nothing that can be read"))
}

/// The jobs in fio's report.
pub(crate) fn parse(text: &str) -> Option<Vec<Job>> {
    let all = json(text)?;
    let jobs = all["jobs"].as_array()?.iter();
    jobs.map(job).collect()
}

fn job(job: &Value) -> Option<Job> {
    let direction = |name: &str| {
        let of = &job[name];
        let mut latencies = Latencies::default();
        // The whole latency (`lat`); where a job's own options leave that out, from submission on (`clat`).
        let bins = ["lat_ns", "clat_ns"].map(|kind| of[kind]["bins"].as_object());
        for (ns, count) in bins.into_iter().flatten().next().into_iter().flatten() {
            let ns = Duration::from_nanos(ns.parse().unwrap_or(0));
            latencies.add_many(ns, count.as_u64().unwrap_or(0));
        }
        (of, latencies)
    };
    let (read, mut all) = direction("read");
    let (write, write_latency) = direction("write");
    // Not in reports of old versions.
    let (trim, trim_latency) = direction("trim");
    let (read_latency, read_histogram) = (all.percentiles(), all.histogram());
    all.merge(&write_latency);
    all.merge(&trim_latency);
    let count = |of: &Value| of["total_ios"].as_u64();
    let of_trims = |field: &str| trim[field].as_f64().unwrap_or(0.0);
    let sum = |field: &str| Some(read[field].as_f64()? + write[field].as_f64()? + of_trims(field));
    let (reads, writes) = (count(read)?, count(write)?);
    let trims = count(trim).unwrap_or(0);
    let ios = (reads + writes + trims).max(1) as f64;
    let runtime = |of: &Value| of["runtime"].as_f64().unwrap_or(0.0) / 1000.0;
    let seconds = [read, write, trim]
        .map(runtime)
        .into_iter()
        .fold(0.0, f64::max);
    // Of a core, over the job's whole time; of all copies together the mean.
    let cpu = |field: &str| job[field].as_f64().unwrap_or(0.0) / 100.0 * seconds * 1e6 / ios;
    let sync = &job["sync"]["lat_ns"];
    let us = |value: &Value| value.as_f64().unwrap_or(0.0) / 1000.0;
    // Its `total_ios` counts those of an asynchronous engine alone.
    let flushes = sync["N"].as_u64().unwrap_or(0);
    Some(Job {
        name: job["jobname"].as_str()?.to_owned(),
        report: Report {
            seconds,
            reads,
            writes,
            flushes,
            errors: u64::from(job["error"].as_i64()? != 0),
            trims,
            bytes: read["io_bytes"].as_u64()?
                + write["io_bytes"].as_u64()?
                + trim["io_bytes"].as_u64().unwrap_or(0),
            iops: sum("iops")?,
            mb_s: sum("bw_bytes")? / 1e6,
            read_latency,
            write_latency: write_latency.percentiles(),
            flush_latency: Percentiles {
                count: flushes,
                min_us: us(&sync["min"]),
                mean_us: us(&sync["mean"]),
                max_us: us(&sync["max"]),
                ..Percentiles::default()
            },
            trim_latency: trim_latency.percentiles(),
            latency: all.percentiles(),
            client_cpu_us_per_io: cpu("usr_cpu") + cpu("sys_cpu"),
            client_user_us_per_io: cpu("usr_cpu"),
            histogram: all.histogram(),
            kinds: [
                read_histogram,
                write_latency.histogram(),
                trace::Buckets::default(),
            ],
            ..Report::default()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        jobfile,
        load::{self, Pattern},
    };

    fn spec(path: &Path) -> Spec {
        Spec {
            pattern: Pattern::RandRw,
            depth: 1,
            duration: Duration::ZERO,
            ios_max: Some(400),
            ..Spec::new(Target::File {
                path: path.to_owned(),
                engine: "threads".into(),
                direct: false,
            })
        }
    }

    #[test]
    fn fio_and_we_do_as_much() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a:file");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let spec = spec(&path);
        let ours = load::run(&spec).unwrap();
        let theirs = match run(&spec) {
            Err(error) if process::is_missing(&error) => return eprintln!("not tested: {error}"),
            report => report.unwrap(),
        };
        for report in [&ours, &theirs] {
            assert_eq!(
                (report.reads + report.writes, report.bytes),
                (400, 400 * 4096)
            );
            assert_eq!((report.errors, report.latency.count), (0, 400));
            assert!((230..330).contains(&report.reads), "{}", report.reads);
        }
        let flushing = Spec {
            pattern: Pattern::Write,
            flushes: Flushes::Every(4),
            ..spec
        };
        let theirs = run(&flushing).unwrap();
        let ours = load::run(&flushing).unwrap();
        // It may end with its last write.
        assert!(theirs.writes == 400 && (99..=100).contains(&theirs.flushes));
        assert_eq!((ours.writes, ours.flushes), (400, 100));
    }

    #[test]
    fn a_job_file_is_the_same_to_both() {
        let dir = tempfile::tempdir().unwrap();
        let (file, path) = (dir.path().join("disk"), dir.path().join("jobs.fio"));
        std::fs::write(&file, vec![1; 1 << 20]).unwrap();
        let text = format!(
            "[global]\nfilename={}\nsize=512k\nbs=4k\nnorandommap\n[fill]\nrw=write\nfdatasync=16\n\
             [both]\nstonewall\nrw=randrw\nrwmixread=100\nnumjobs=2\n[part]\nstonewall\nrw=read\noffset=4096\nnumber_ios=9\n",
            file.display()
        );
        std::fs::write(&path, text).unwrap();
        let jobs = jobfile::read(&path, None, false).unwrap();
        assert_eq!(jobs.notes, Vec::<String>::new());
        let ours = jobs.run(|_| {}).unwrap();
        let theirs = match run_file(&path) {
            Err(error) if process::is_missing(&error) => return eprintln!("not tested: {error}"),
            jobs => jobs.unwrap(),
        };
        let names =
            |n: &[(&str, u64, u64, u64)]| n.iter().map(|n| n.0.to_owned()).collect::<Vec<_>>();
        let short = |name: &str, r: &Report| (name.to_owned(), r.reads, r.writes, r.bytes);
        let ours: Vec<_> = jobs
            .jobs
            .iter()
            .zip(&ours)
            .map(|(j, r)| short(&j.name, r))
            .collect();
        let theirs: Vec<_> = theirs.iter().map(|j| short(&j.name, &j.report)).collect();
        assert_eq!(ours, theirs);
        let expected = [
            ("fill", 0, 128, 512 << 10),
            ("both", 128, 0, 512 << 10),
            ("both", 128, 0, 512 << 10),
            ("part", 9, 0, 9 * 4096),
        ];
        assert_eq!(
            names(&expected),
            ours.iter().map(|o| o.0.clone()).collect::<Vec<_>>()
        );
        assert_eq!(
            expected.map(|e| (e.1, e.2, e.3)).to_vec(),
            ours.iter().map(|o| (o.1, o.2, o.3)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn trims_are_requests_too() {
        let text = r#"{"jobs": [{"jobname": "x", "error": 0, "usr_cpu": 1.0, "sys_cpu": 1.0, "sync": {},
            "read": {"total_ios": 0, "io_bytes": 0, "iops": 0.0, "bw_bytes": 0, "runtime": 0},
            "write": {"total_ios": 0, "io_bytes": 0, "iops": 0.0, "bw_bytes": 0, "runtime": 0},
            "trim": {"total_ios": 3, "io_bytes": 12288, "iops": 1.5, "bw_bytes": 6144, "runtime": 2000,
                     "lat_ns": {"bins": {"9000": 3}}}}]}"#;
        let report = parse(text).unwrap().remove(0).report;
        assert_eq!((report.trims, report.reads, report.bytes), (3, 0, 12288));
        assert_eq!((report.iops, report.seconds), (1.5, 2.0));
        assert_eq!((report.trim_latency.count, report.latency.count), (3, 3));
    }

    #[test]
    fn the_whole_latency_is_taken() {
        let text = r#"{"jobs": [{"jobname": "x", "error": 0, "usr_cpu": 1.0, "sys_cpu": 1.0, "sync": {},
            "read": {"total_ios": 4, "io_bytes": 16384, "iops": 4.0, "bw_bytes": 16384, "runtime": 1000,
                     "clat_ns": {"bins": {"5000": 4}}, "lat_ns": {"bins": {"9000": 4}}},
            "write": {"total_ios": 2, "io_bytes": 0, "iops": 0.0, "bw_bytes": 0, "runtime": 0,
                      "clat_ns": {"bins": {"7000": 2}}, "lat_ns": {"mean": 1.0}}}]}"#;
        let report = parse(text).unwrap().remove(0).report;
        let median = |p: Percentiles| p.p50_us.round();
        assert_eq!(median(report.read_latency), 9.0);
        assert_eq!(median(report.write_latency), 7.0);
        assert_eq!(report.latency.count, 6);
    }

    #[test]
    fn what_fio_cannot_do_is_said() {
        let vhost = Spec::new(Target::VhostUser("s".into()));
        let error = arguments(&vhost).unwrap_err().to_string();
        assert!(error.contains("no driver of vhost-user-blk"), "{error}");
        let polling = Spec {
            poll: true,
            ..spec(Path::new("x"))
        };
        assert!(arguments(&polling).is_err());
        let three = Spec {
            queues: 3,
            ..spec(Path::new("x"))
        };
        assert!(
            arguments(&three)
                .unwrap_err()
                .to_string()
                .contains("multiple of --queues")
        );
        assert!(parse("fio: broken").is_none());
    }
}
