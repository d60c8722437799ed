//! `diskplane bench ffsb`: load on a file system.
//!
//! With `--json` an array of objects, one for each scenario and number of threads: `spec` and `outcome`, whole.

use crate::{
    args::bytes,
    at_work,
    bench_load::seconds as seconds_or_none,
    bench_versus::{end_on_signals, seconds, stayed},
    print,
    signals::Signals,
    table,
};
use anyhow::{Context, Result};
use bench::{
    ffsb::{self, Outcome, Scenario, Spec},
    machine::Host,
    metric::Metric,
    record::{self, Record, Sample},
};
use block::size;
use clap::Args;
use serde::Serialize;
use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    time::Duration,
};

/// `bench ffsb`.
#[derive(Args, Debug)]
#[command(
    after_help = "Scenarios: large-creates-256k, seq-reads-256k, large-creates-8k, seq-reads-8k, random-reads, \
                  random-writes, mail-server (60 % reads of whole files, 16 % writes of a block, 12 % creates, 12 % deletes \
                  of files of 1 KiB to 1 MiB in 100 directories) and mixed (70 % reads). Files lie in DIR/ffsb; those \
                  that are read and written stay there for the next time, unless --clean is given."
)]
pub struct FfsbArgs {
    /// A directory of the file system
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Which scenario; may be given many times [default: all]
    #[arg(long, value_name = "NAME", value_parser = str::parse::<Scenario>)]
    pub scenario: Vec<Scenario>,
    /// How many threads; may be given many times
    #[arg(long, value_name = "N", default_values_t = [1, 8, 16])]
    pub threads: Vec<usize>,
    /// Bytes of all files together, about
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = bytes)]
    pub size: u64,
    /// Files of the set [default: 16; a mail server has up to 100000, as many as --size has room for]
    #[arg(long, value_name = "N")]
    pub files: Option<usize>,
    /// Bytes of a block [default: the scenario's]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub bs: Option<u64>,
    /// Through the page cache, and with --fsync unless --no-fsync is given
    #[arg(long)]
    pub buffered: bool,
    /// Make what was written durable before a file is closed
    #[arg(long, conflicts_with = "no_fsync")]
    pub fsync: bool,
    /// With --buffered: do not
    #[arg(long)]
    pub no_fsync: bool,
    /// How long to measure
    #[arg(long, value_name = "S", default_value = "5", value_parser = seconds)]
    pub seconds: Duration,
    /// How long to run before
    #[arg(long, value_name = "S", default_value = "0.5", value_parser = seconds_or_none)]
    pub ramp: Duration,
    /// End each after so many blocks
    #[arg(long, value_name = "N")]
    pub ios: Option<u64>,
    /// Seed of what is picked
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Report the CPU time of this server process; may be given many times
    #[arg(long, value_name = "PID")]
    pub pid: Vec<u32>,
    /// Also append records to this file (for bench report, compare and csv)
    #[arg(long, value_name = "FILE")]
    pub records: Option<PathBuf>,
    /// Remove DIR/ffsb afterwards
    #[arg(long)]
    pub clean: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Answer {
    spec: Spec,
    outcome: Outcome,
}

/// Runs the scenarios, one after the other. What was measured before one fails is told, and recorded, all the same.
pub fn run(args: &FfsbArgs) -> Result<()> {
    // Before anything starts a thread, so that all of them leave these signals to the one that waits for them.
    let (dir, clean) = (args.dir.clone(), args.clean);
    end_on_signals(Signals::block()?, move |stopped| {
        let mut left = stayed(stopped.remove());
        // Where nothing was made there is nothing to clean.
        if clean && dir.join("ffsb").exists() {
            left.extend(ffsb::clean(&dir).err().map(|why| why.to_string()));
        }
        let mut text = "\ndiskplane: stopped\n".to_owned();
        for why in left {
            let _ = writeln!(text, "diskplane: {why}");
        }
        text
    })?;
    let mut answers = Vec::new();
    let measured = measure(args, &mut answers);
    let cleaned = match args.clean && args.dir.join("ffsb").exists() {
        true => ffsb::clean(&args.dir),
        false => Ok(()),
    };
    if measured.is_ok() || !answers.is_empty() {
        match args.json {
            true => print(&crate::json(&answers)?)?,
            false => print(&text(&answers))?,
        }
    }
    measured.and(cleaned.map_err(Into::into))
}

fn measure(args: &FfsbArgs, answers: &mut Vec<Answer>) -> Result<()> {
    let all = match &args.scenario[..] {
        [] => &Scenario::ALL[..],
        some => some,
    };
    let records = args.records.as_ref();
    let records = records.map(|path| open_records(args, path)).transpose()?;
    let count = all.len() * args.threads.len();
    let line = at_work::line("");
    for scenario in all {
        for threads in &args.threads {
            let last = answers.last().map(|Answer { spec, outcome }| {
                let number = bench::metric::number;
                let name = named(spec.scenario, spec.threads);
                format!(
                    " · {name}: {} MB/s",
                    number(Metric::MbS, outcome.report.mb_s)
                )
            });
            line.set_message(format!(
                "{}, {}/{count}{}",
                named(*scenario, *threads),
                answers.len() + 1,
                last.unwrap_or_default()
            ));
            let spec = spec(args, *scenario, *threads);
            let outcome = ffsb::run(&spec).with_context(|| scenario.name())?;
            let answer = Answer { spec, outcome };
            if let Some(file) = &records {
                write_record(file, &answer)?;
            }
            answers.push(answer);
        }
    }
    Ok(())
}

fn named(scenario: Scenario, threads: usize) -> String {
    let plural = if threads == 1 { "" } else { "s" };
    format!("{}, {threads} thread{plural}", scenario.name())
}

fn spec(args: &FfsbArgs, scenario: Scenario, threads: usize) -> Spec {
    let base = Spec::new(args.dir.clone(), scenario, threads, args.size);
    Spec {
        files: args.files.unwrap_or(base.files),
        block_bytes: args.bs.unwrap_or(base.block_bytes),
        direct: !args.buffered,
        fsync: args.fsync || args.buffered && !args.no_fsync,
        duration: args.seconds,
        ramp: args.ramp,
        ios_max: args.ios,
        seed: args.seed,
        server_pids: args.pid.clone(),
        ..base
    }
}

/// The file of records, with what is said of this run.
fn open_records(args: &FfsbArgs, path: &Path) -> Result<File> {
    let named = || path.display().to_string();
    let mut options = OpenOptions::new();
    let file = options.create(true).append(true).open(path);
    let file = file.with_context(named)?;
    let header = record::Run {
        schema: record::SCHEMA,
        experiment: "ffsb".to_owned(),
        seconds: record::now(),
        command: "diskplane bench ffsb".to_owned(),
        host: Host::look(&args.dir),
        samples: 1,
        ramp_s: args.ramp.as_secs_f64(),
        duration_s: args.seconds.as_secs_f64(),
        ..record::Run::default()
    };
    record::append(&file, &Record::Run(Box::new(header)))?;
    Ok(file)
}

fn write_record(file: &File, Answer { spec, outcome }: &Answer) -> Result<()> {
    let sample = Sample {
        side: "file system".to_owned(),
        seconds: record::now(),
        ..outcome.sample(spec)?
    };
    Ok(record::append(file, &Record::Sample(Box::new(sample)))?)
}

/// A row for each.
fn text(answers: &[Answer]) -> String {
    let header = [
        "scenario",
        "threads",
        "block",
        "IOPS",
        "MB/s",
        "p50 µs",
        "p99 µs",
        "opened",
        "created",
        "deleted",
        "fsyncs",
        "CPU µs/IO",
    ];
    let mut table = table::headed(&header, 1);
    for Answer { spec, outcome } in answers {
        let (report, counts) = (&outcome.report, &outcome.counts);
        let number = bench::metric::number;
        table.add_row([
            spec.scenario.name().to_owned(),
            spec.threads.to_string(),
            size::human(spec.block_bytes),
            number(Metric::Iops, report.iops),
            number(Metric::MbS, report.mb_s),
            number(Metric::P50Us, report.latency.p50_us),
            number(Metric::P99Us, report.latency.p99_us),
            counts.opened.to_string(),
            counts.created.to_string(),
            counts.deleted.to_string(),
            report.flushes.to_string(),
            number(Metric::CpuUs, report.client_cpu_us_per_io),
        ]);
    }
    table::text(&table)
}
