//! `diskplane bench load`.
//!
//! With `--json` one object: `spec`, the whole [`Spec`] with its defaults, and `report`, the whole [`Report`].

use crate::{args::bytes, at_work, print, table};
use ::trace::Stage;
use anyhow::{Context as _, Result, bail, ensure};
use bench::load::{self, Flushes, Pattern, Percentiles, Report, Spec, Target, Verified, Verify};
use bench::{
    flame,
    jobfile::{self, Told},
};
use block::size;
use clap::{ArgGroup, Args, ValueEnum};
use io::Aio;
use serde::Serialize;
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

/// `bench load`.
#[derive(Args, Debug)]
#[command(
    group(ArgGroup::new("target").args(["vhost_user", "nbd", "file", "fio"]).required(true).multiple(true)),
    after_help = "Exit status: 0, or 1 if the load could not be run, if nothing ended while it was measured, if a request failed, or if \
                  --verify found a block that is not as it must be. The report is printed in all but the first case."
)]
pub struct Load {
    /// A vhost-user-blk server that listens on this socket
    #[arg(long, value_name = "SOCK")]
    pub vhost_user: Option<PathBuf>,
    /// An NBD server: nbd+unix:///EXPORT?socket=PATH, nbd://HOST:PORT/EXPORT or unix:PATH
    #[arg(long, value_name = "URI")]
    pub nbd: Option<String>,
    /// A file or block device, without a server. Writes destroy what is in it
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Which requests
    #[arg(long, value_name = "PATTERN", default_value = "randread")]
    pub rw: Asked,
    /// Percent of reads for rw and randrw
    #[arg(long, value_name = "N", default_value_t = 70, value_parser = clap::value_parser!(u8).range(..=100))]
    pub read_percent: u8,
    /// Bytes of a request
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = bytes)]
    pub bs: u64,
    /// Requests in flight on each queue
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub depth: u32,
    /// Virtqueues, NBD connections, or threads on a file
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub queues: u32,
    /// How long to measure [default: 5, or until --ios]
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub seconds: Option<Duration>,
    /// How long to run before
    #[arg(long, value_name = "S", default_value = "0", value_parser = seconds)]
    pub ramp: Duration,
    /// End after so many reads and writes
    #[arg(long, value_name = "N")]
    pub ios: Option<u64>,
    /// Spin for completions instead of sleeping
    #[arg(long)]
    pub poll: bool,
    /// Reads and writes per second, at even distances, whatever has ended until then (open loop; needs --poll): a
    /// latency counts from when its request was due, so that a server which falls behind is seen to
    #[arg(long, value_name = "N")]
    pub rate: Option<f64>,
    /// Each of the requests in flight waits for so many microseconds after its answer before it asks again (closed loop; needs
    /// --poll or --depth 1)
    #[arg(long, value_name = "US", default_value_t = 0.0)]
    pub think: f64,
    /// Blocks carry where they belong and when they were written; whatever is read is compared with that, and at the end all that
    /// was written is read. What is wrong, stale or torn is told, and fails the command. Writes destroy what is on the disk
    #[arg(long)]
    pub verify: bool,
    /// With --verify: keep what is known of the disk in FILE, which a later load reads and compares first (after a restart or a
    /// crash of the server)
    #[arg(long, value_name = "FILE", requires = "verify")]
    pub state: Option<PathBuf>,
    /// Random requests are for some places more often than for others: for the k-th most wanted one in proportion to 1/k^THETA
    #[arg(long, value_name = "THETA")]
    pub zipf: Option<f64>,
    /// When each of the requests in flight is a flush: never, each (after each of its writes), or after N of them
    #[arg(long, value_name = "never|each|N", default_value = "never", value_parser = flushes)]
    pub flush: Flushes,
    /// Requests start at multiples of SIZE [default: --bs]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub stride: Option<u64>,
    /// First byte to use
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    pub start: u64,
    /// How much from there on [default: to the end of the disk]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub range: Option<u64>,
    /// Seed of offsets and of the mix
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Report the CPU time of this server process; may be given many times
    #[arg(long, value_name = "PID")]
    pub pid: Vec<u32>,
    /// Count the system calls of --pid's processes; each takes longer for it (needs perf_event_open and tracefs)
    #[arg(long, requires = "pid")]
    pub syscalls: bool,
    /// The server's control socket (diskplane serve --control): report the time that requests spend in its stages
    #[arg(long, value_name = "SOCK", conflicts_with = "file")]
    pub control: Option<PathBuf>,
    /// With --file: auto, threads, native or io_uring; or psync, a system call for each request (--depth 1). With --file, --nbd or
    /// --fio: fio, which has fio itself make the requests
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = str::parse::<Engine>)]
    pub engine: Engine,
    /// Draw where --pid's processes, or with --file this one, spend CPU meanwhile, into FILE.svg (needs perf, which slows them a little)
    #[arg(long, value_name = "FILE", conflicts_with = "fio")]
    pub flamegraph: Option<PathBuf>,
    /// Run the jobs of a fio job file: at their filename, or where --vhost-user, --nbd or --file says. Options of ordinary block
    /// jobs are known; others are refused with their line
    #[arg(long, value_name = "JOBFILE", conflicts_with_all = JOBS_SAY)]
    pub fio: Option<PathBuf>,
    /// With --fio: leave out options that are not supported
    #[arg(long, requires = "fio")]
    pub ignore_unknown: bool,
    /// With --file: bypass the host's page cache (the default)
    #[arg(long, requires = "file", conflicts_with = "buffered")]
    pub direct: bool,
    /// With --file: through the host's page cache
    #[arg(long, requires = "file")]
    pub buffered: bool,
    /// With --vhost-user: entries of a virtqueue
    #[arg(long, value_name = "N", default_value_t = 128, requires = "vhost_user", value_parser = clap::value_parser!(u16).range(1..))]
    pub ring: u16,
    /// With --vhost-user: packed virtqueues; else split ones
    #[arg(long, requires = "vhost_user")]
    pub packed: bool,
    /// With --vhost-user: no indirect descriptors
    #[arg(long, requires = "vhost_user")]
    pub no_indirect: bool,
    /// With --vhost-user: no event index
    #[arg(long, requires = "vhost_user")]
    pub no_event_index: bool,
    /// With --vhost-user: buffers begin so many bytes (less than 4096) behind a page: a server that bypasses the page cache has to
    /// copy them
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 0,
        requires = "vhost_user"
    )]
    pub misalign: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What a job file says, and so no option.
const JOBS_SAY: [&str; 18] = [
    "rw",
    "read_percent",
    "bs",
    "depth",
    "queues",
    "seconds",
    "ramp",
    "ios",
    "rate",
    "think",
    "verify",
    "zipf",
    "flush",
    "stride",
    "start",
    "range",
    "seed",
    "poll",
];

/// Who makes the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// We do; to a file by this engine.
    Ours(Aio),
    /// We do, by a system call for each.
    Psync,
    /// fio does.
    Fio,
}

impl std::str::FromStr for Engine {
    type Err = block::Error;

    fn from_str(name: &str) -> block::Result<Self> {
        match name {
            "fio" => Ok(Self::Fio),
            "psync" => Ok(Self::Psync),
            name => name.parse().map(Self::Ours),
        }
    }
}

/// [`Pattern`] by fio's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
#[allow(missing_docs)]
pub enum Asked {
    Read,
    Write,
    Rw,
    RandRead,
    RandWrite,
    RandRw,
}

pub(crate) fn seconds(text: &str) -> Result<Duration> {
    let seconds: f64 = text.parse()?;
    if !(0.0..=1e6).contains(&seconds) {
        bail!("it must be 0 to 1000000");
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn flushes(text: &str) -> Result<Flushes> {
    Ok(match text {
        "never" => Flushes::Never,
        "each" => Flushes::AfterEachWrite,
        number => match number.parse() {
            Ok(writes) if writes > 0 => Flushes::Every(writes),
            _ => bail!("give never, each, or after how many writes"),
        },
    })
}

/// Runs the load and prints the report.
pub fn run(args: &Load) -> Result<()> {
    if let Some(path) = &args.fio {
        return jobs(args, path);
    }
    let spec = spec(args)?;
    let line = at_work::line(spec.title());
    let report = match args.engine {
        Engine::Fio => bench::fio::run(&spec)?,
        Engine::Ours(_) | Engine::Psync => match &args.flamegraph {
            Some(out) => flamegraph(args, &spec, out)?,
            None => load::run(&spec)?,
        },
    };
    line.finish_and_clear();
    if args.json {
        #[derive(Serialize)]
        struct Answer<'a> {
            spec: &'a Spec,
            report: &'a Report,
        }
        let answer = Answer {
            spec: &spec,
            report: &report,
        };
        print(&crate::json(&answer)?)?;
    } else {
        print(&text(&spec, &report))?;
    }
    is_sound(std::iter::once(&report))
}

/// Runs the load while perf looks at who serves it.
fn flamegraph(args: &Load, spec: &Spec, out: &Path) -> Result<Report> {
    let own = std::process::id();
    let pids = match (args.pid.as_slice(), &args.file) {
        ([], Some(_)) => std::slice::from_ref(&own),
        ([], None) => bail!("--flamegraph: give the server's --pid"),
        (pids, _) => pids,
    };
    Ok(flame::around(pids, out, &spec.title(), || load::run(spec))?)
}

/// Whether anything was measured, nothing failed, and all that was verified is as it must be.
fn is_sound<'a>(reports: impl Iterator<Item = &'a Report> + Clone) -> Result<()> {
    let (mut failed, mut besides, mut all) = (0, 0, 0);
    for report in reports.clone() {
        let ended = report.reads + report.writes + report.flushes + report.trims;
        ensure!(
            ended > 0,
            "no request ended while it was measured: give more --seconds"
        );
        failed += report.errors;
        besides += report.errors_besides;
        all += ended;
    }
    let verified = reports.filter_map(|report| report.verify.as_ref());
    let bad: u64 = verified.map(Verified::bad).sum();
    ensure!(
        bad == 0,
        "verify: {bad} blocks are not as they must be, or could not be read to see"
    );
    ensure!(
        failed == 0,
        "{failed} of {all} requests failed: figures of what failed say nothing of the disk"
    );
    ensure!(
        besides == 0,
        "{besides} requests failed before what was measured (in --ramp) or after it: what the disk does then is not to be relied on"
    );
    Ok(())
}

/// A job, and what came of it, as `--json` prints them.
#[derive(Serialize)]
struct JobAnswer<'a> {
    name: &'a str,
    /// Lacks where fio read the file itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    spec: Option<&'a Spec>,
    report: &'a Report,
    /// How many jobs that is the report of, where they are reported together (`group_reporting`).
    #[serde(skip_serializing_if = "Option::is_none")]
    jobs: Option<usize>,
}

impl<'a> JobAnswer<'a> {
    fn of(told: &'a Told<'_>) -> Option<Self> {
        let first = told.jobs.first()?;
        Some(Self {
            name: &first.name,
            spec: Some(&first.spec),
            report: &told.report,
            jobs: (told.jobs.len() > 1).then_some(told.jobs.len()),
        })
    }
}

/// Runs the jobs of a job file.
fn jobs(args: &Load, path: &Path) -> Result<()> {
    let target = target(args)?;
    if args.engine == Engine::Fio {
        ensure!(
            target.is_none(),
            "--engine fio runs the jobs where their filename says: leave out --vhost-user, --nbd and --file"
        );
        let jobs = bench::fio::run_file(path)?;
        let answers: Vec<JobAnswer<'_>> = jobs
            .iter()
            .map(|job| JobAnswer {
                name: &job.name,
                spec: None,
                report: &job.report,
                jobs: None,
            })
            .collect();
        say_jobs(args, &answers)?;
        return is_sound(jobs.iter().map(|job| &job.report));
    }
    let mut jobs = jobfile::read(path, target.as_ref(), args.ignore_unknown)?;
    for job in &mut jobs.jobs {
        job.spec.answer_max = patience(&job.spec);
    }
    for note in &jobs.notes {
        eprintln!("diskplane: note: {}", block::plain(note));
    }
    let line = at_work::line("making files");
    let reports = jobs.run(|group| {
        let names: Vec<&str> = group.iter().map(|job| job.name.as_str()).collect();
        let names = names.join(", ");
        line.set_message(block::plain(&names));
        tracing::info!("running {names}");
    })?;
    line.finish_and_clear();
    let told = jobs.told(&reports);
    let answers: Vec<JobAnswer<'_>> = told.iter().filter_map(JobAnswer::of).collect();
    say_jobs(args, &answers)?;
    is_sound(reports.iter())
}

fn say_jobs(args: &Load, answers: &[JobAnswer<'_>]) -> Result<()> {
    if args.json {
        return print(&crate::json(&answers)?);
    }
    let mut text = String::new();
    for answer in answers {
        let _ = write!(text, "{}: ", block::plain(answer.name));
        if let Some(jobs) = answer.jobs {
            let _ = write!(text, "{jobs} jobs together: ");
        }
        match answer.spec {
            Some(spec) => text.push_str(&self::text(spec, answer.report)),
            None => {
                let _ = write!(
                    text,
                    "by fio: {:.0} IOPS, {:.1} MB/s in {:.2} s\n{}",
                    answer.report.iops,
                    answer.report.mb_s,
                    answer.report.seconds,
                    latencies(answer.report)
                );
            }
        }
        text.push('\n');
    }
    let sum = |of: fn(&Report) -> f64| answers.iter().map(|a| of(a.report)).sum::<f64>();
    if answers.len() > 1 {
        let ios = sum(|r| (r.reads + r.writes) as f64);
        let _ = writeln!(
            text,
            "all jobs: {ios:.0} requests, {:.1} MB",
            sum(|r| r.bytes as f64) / 1e6
        );
    }
    print(&text)
}

/// Where requests go, as far as the command line says.
fn target(args: &Load) -> Result<Option<Target>> {
    let of_files = matches!(args.engine, Engine::Ours(Aio::Only(_)) | Engine::Psync);
    ensure!(
        args.file.is_some() || !of_files,
        "--engine: threads, native, io_uring and psync are ways to a file: give --file"
    );
    Ok(Some(match (&args.vhost_user, &args.nbd, &args.file) {
        (Some(socket), None, None) => Target::VhostUser(socket.clone()),
        (None, Some(uri), None) => Target::Nbd(uri.clone()),
        (None, None, Some(path)) => Target::File {
            path: path.clone(),
            engine: match args.engine {
                Engine::Ours(Aio::Only(kind)) => kind.to_string(),
                Engine::Psync => "psync".into(),
                Engine::Ours(Aio::Auto) | Engine::Fio => "auto".into(),
            },
            direct: !args.buffered,
        },
        (None, None, None) => return Ok(None),
        _ => bail!("give one of --vhost-user, --nbd and --file"),
    }))
}

fn spec(args: &Load) -> Result<Spec> {
    let target = target(args)?;
    let target = target.context("give one of --vhost-user, --nbd, --file and --fio")?;
    let base = Spec::new(target);
    ensure!(
        (0.0..=1e9).contains(&args.think),
        "--think {}: it is 0 to 1000000000",
        args.think
    );
    Ok(Spec {
        pattern: match args.rw {
            Asked::Read => Pattern::Read,
            Asked::Write => Pattern::Write,
            Asked::Rw => Pattern::Rw,
            Asked::RandRead => Pattern::RandRead,
            Asked::RandWrite => Pattern::RandWrite,
            Asked::RandRw => Pattern::RandRw,
        },
        read_percent: args.read_percent,
        block_bytes: args.bs,
        depth: args.depth,
        queues: args.queues,
        flushes: args.flush,
        stride_bytes: args.stride,
        start_bytes: args.start,
        range_bytes: args.range,
        duration: match (args.seconds, args.ios) {
            (Some(duration), _) => duration,
            (None, Some(_)) => Duration::ZERO,
            (None, None) => base.duration,
        },
        ramp: args.ramp,
        ios_max: args.ios,
        poll: args.poll,
        rate: args.rate,
        think: Duration::from_secs_f64(args.think / 1e6),
        verify: args.verify.then(|| Verify {
            state: args.state.clone(),
        }),
        zipf: args.zipf,
        ring_entries: args.ring,
        packed: args.packed,
        indirect: !args.no_indirect,
        event_index: !args.no_event_index,
        misalign_bytes: args.misalign,
        answer_max: patience(&base),
        seed: args.seed,
        server_pids: args.pid.clone(),
        count_syscalls: args.syscalls,
        control: args.control.clone(),
        ..base
    })
}

/// How long the target of a load may be silent.
fn patience(spec: &Spec) -> Duration {
    match spec.target {
        // Zero is for ever.
        Target::Nbd(_) => crate::open::nbd_silence().unwrap_or_default(),
        _ => spec.answer_max,
    }
}

/// The report for people.
fn text(spec: &Spec, report: &Report) -> String {
    let mut text = format!(
        "{}, {} queue{}: {:.0} IOPS, {:.1} MB/s in {:.2} s\n",
        spec.title(),
        spec.queues,
        if spec.queues == 1 { "" } else { "s" },
        report.iops,
        report.mb_s,
        report.seconds
    );
    if report.errors > 0 {
        let _ = writeln!(text, "{} requests FAILED", report.errors);
    }
    if report.errors_besides > 0 {
        let _ = writeln!(
            text,
            "{} requests FAILED before or after what was measured",
            report.errors_besides
        );
    }
    if report.unsent > 0 {
        let _ = writeln!(
            text,
            "{} more requests were due and never sent, since --depth were in flight to the end: latencies count what these waited",
            report.unsent
        );
    }
    text.push_str(&latencies(report));
    let _ = writeln!(
        text,
        "per request: {:.3} notifications to the server, {:.3} back",
        report.kicks_per_io, report.calls_per_io
    );
    let _ = write!(
        text,
        "CPU per I/O: client {:.2} µs",
        report.client_cpu_us_per_io
    );
    if let Some(cpu) = report.server_cpu_us_per_io {
        let _ = write!(text, ", server {cpu:.2} µs");
    }
    text.push('\n');
    let per_request = [
        ("system calls", report.server_syscalls_per_io),
        ("context switches", report.server_switches_per_io),
        ("page faults", report.server_faults_per_io),
    ];
    let per_request = per_request
        .into_iter()
        .filter_map(|(name, count)| Some(format!("{:.3} {name}", count?)));
    let per_request: Vec<String> = per_request.collect();
    if !per_request.is_empty() {
        let _ = writeln!(text, "server, per request: {}", per_request.join(", "));
    }
    if let (Some(rss), Some(peak)) = (report.server_rss_bytes, report.server_peak_bytes) {
        let _ = writeln!(
            text,
            "server's memory: {} resident, {} at most",
            size::human(rss),
            size::human(peak)
        );
    }
    text.push_str(&stages(report));
    if let Some(verified) = &report.verify {
        text.push_str(&found(verified));
    }
    text
}

/// What verifying has found.
fn found(verified: &Verified) -> String {
    let mut text = format!(
        "verified: {} blocks written, {} compared ({} of which nothing was known): {} wrong, {} stale, {} torn",
        verified.written,
        verified.checked,
        verified.unknown,
        verified.wrong,
        verified.stale,
        verified.torn
    );
    if verified.unread > 0 {
        let _ = write!(text, ", {} unreadable", verified.unread);
    }
    text.push('\n');
    for fault in &verified.faults {
        let _ = writeln!(text, "  {fault}");
    }
    let untold = (verified.wrong + verified.stale + verified.torn)
        .saturating_sub(verified.faults.len() as u64);
    if untold > 0 {
        let _ = writeln!(text, "  and {untold} more");
    }
    text
}

/// The server's stages, where it was asked for them.
fn stages(report: &Report) -> String {
    if report.stages.is_empty() {
        return String::new();
    }
    let mut header = vec!["server's stages in µs", "count"];
    header.extend(Stage::ALL.map(Stage::name));
    header.push("total");
    let mut table = table::headed(&header, 1);
    for (operation, totals) in &report.stages {
        let mut row = vec![operation.clone(), totals.count.to_string()];
        row.extend(Stage::ALL.map(|stage| format!("{:.1}", totals.mean_us(stage))));
        row.push(format!("{:.1}", totals.total_us()));
        table.add_row(row);
    }
    table::text(&table)
}

/// The table of latencies.
fn latencies(report: &Report) -> String {
    let header = [
        "latency in µs",
        "count",
        "min",
        "mean",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "p99.99",
        "max",
    ];
    let mut table = table::headed(&header, 1);
    for (name, latency) in [
        ("reads", &report.read_latency),
        ("writes", &report.write_latency),
        ("flushes", &report.flush_latency),
        ("trims", &report.trim_latency),
    ] {
        if latency.count > 0 {
            table.add_row(row(name, latency));
        }
    }
    table::text(&table)
}

fn row(name: &str, p: &Percentiles) -> Vec<String> {
    let figures = [
        p.min_us,
        p.mean_us,
        p.p50_us,
        p.p90_us,
        p.p99_us,
        p.p99_9_us,
        p.p99_99_us,
        p.max_us,
    ];
    let mut row = vec![name.to_owned(), p.count.to_string()];
    row.extend(figures.map(|us| format!("{us:.1}")));
    row
}
