//! Running an experiment: its records, cell by cell ([`Runner`]).
//!
//! ```text
//!   read DIR/records.jsonl      what an interrupted run has is not taken again                   (schedule)
//!   for each cell
//!     for each round            A B A B …: fewer where the time would not do for all             (runner)
//!       for each side           image · server · look at it · load · stop · append the sample    (measure, mounted, guest)
//!     or all of them in turns of a tenth of a second, where their files allow it                 (crate::turns)
//!     append what is said of the cell: noise, sides that are not what was asked for
//!   the same once more for cells with undecided findings, where a quick run has time left: so many rounds more as it has time for,
//!   before anybody looks at the findings again (who looked after each round would decide by chance before long)
//! ```

use super::{
    finding,
    lab::Lab,
    plan::{Cell, Experiment, How, Image},
    runner::Runner,
    schedule::Schedule,
};
use crate::{
    equal::Probe,
    machine::{Host, disk::Identity, given::Given, process},
    metric::{Metric, number},
    peer::{Programs, Seen},
    record::{self, Failure, Record, Sample, Set},
    versus::cell::Server,
};
use block::{Context, Error, Result};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `diskplane` that is measured.
    pub diskplane: PathBuf,
    /// Where images, records and the report go.
    pub dir: PathBuf,
    /// Only cells whose name this pattern (`*` for anything) matches.
    pub cells: Option<String>,
    /// Rounds of each cell.
    pub samples: usize,
    /// Rounds of cells whose findings are undecided after these, where there is time for more; no fewer than `samples`.
    pub samples_more: usize,
    /// Seconds of a measurement.
    pub duration: Duration,
    /// Seconds of load before.
    pub ramp: Duration,
    /// Only the cells of a quick run.
    pub quick: bool,
    /// All of it takes so long at most; fewer rounds, then fewer cells, are run to keep that.
    pub limit: Option<Duration>,
    /// The folder of a guest (`scripts/guest-build.sh`), for cells that want one.
    pub guest: Option<PathBuf>,
    /// Draw a flame graph of each server.
    pub flamegraphs: bool,
    /// Bytes of a disk.
    pub disk_bytes: u64,
    /// A block device for what lies on one: all of it is lost.
    pub device: Option<PathBuf>,
    /// Also where something is known to be on it.
    pub overwrite: bool,
    /// The command line, for the record.
    pub command: String,
}

/// What happens, for those who watch.
#[derive(Debug)]
pub enum Event<'a> {
    /// What is being done.
    Progress(Progress<'a>),
    /// A measurement ended.
    Sample(&'a Sample),
    /// One failed.
    Failure(&'a Failure),
    /// Something to know.
    Note(&'a str),
}

/// How far a run is.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    /// The cell.
    pub cell: &'a str,
    /// What is done: a side that is measured, or an image that is made.
    pub what: &'a str,
    /// Samples that are there.
    pub done: usize,
    /// Samples in all.
    pub total: usize,
    /// How long the rest takes, by what samples took so far.
    pub left: Duration,
    /// The last result.
    pub last: Option<&'a str>,
}

/// The cells that a run with these options has.
///
/// # Errors
///
/// The pattern matches none.
pub fn cells<'a>(
    experiment: &'a Experiment,
    quick: bool,
    pattern: Option<&str>,
) -> Result<Vec<&'a Cell>> {
    let pattern = pattern.unwrap_or("*");
    let of_run = experiment.cells.iter().filter(|cell| cell.quick || !quick);
    // Who names a cell wants it, also one that a quick run leaves out.
    let named = pattern != "*";
    let all = experiment.cells.iter().filter(|_| named);
    let chosen: Vec<&Cell> = match named {
        true => all.filter(|cell| matches(pattern, &cell.name)).collect(),
        false => of_run.collect(),
    };
    if chosen.is_empty() {
        let names: Vec<&str> = experiment.cells.iter().map(|c| c.name.as_str()).collect();
        return Err(Error::invalid(format!(
            "no cell of {} is called '{pattern}'; there are {}",
            experiment.name,
            names.join(", ")
        )));
    }
    Ok(chosen)
}

/// Whether `name` is what `pattern` says; `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => {
            let Some(tail) = name.strip_prefix(start) else {
                return false;
            };
            let ends = tail.char_indices().map(|(at, _)| at).chain([tail.len()]);
            ends.into_iter().any(|at| matches(rest, &tail[at..]))
        }
    }
}

/// Runs an experiment, or what is left of it; all records of its folder.
///
/// # Errors
///
/// What concerns the run as a whole: a folder that cannot be written, has another run's records, or is used by another run.
/// What goes wrong with a side is a [`Failure`] in the records.
pub fn run(
    experiment: &Experiment,
    options: &Options,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<Set> {
    let began = Instant::now();
    let cells = cells(experiment, options.quick, options.cells.as_deref())?;
    if options.device.is_some()
        && !experiment
            .cells
            .iter()
            .any(|cell| images(cell).any(|i| i.place.is_on_device()))
    {
        return Err(Error::invalid(format!(
            "--device: {} has no cell of a device; its files are in --out: make a file system on the device, and give a folder there",
            experiment.name
        )));
    }
    fs::create_dir_all(&options.dir).context(|| options.dir.display().to_string())?;
    let dir = fs::canonicalize(&options.dir).context(|| options.dir.display().to_string())?;
    let _lock = process::lock(&dir)?;
    let path = dir.join("records.jsonl");
    let device = options.device.as_deref().map(Identity::of).transpose()?;
    let header = header(experiment, options, device.as_ref(), &dir);
    let (file, set) = open(&path, &header, device.as_ref())?;
    let images: Vec<BTreeSet<Image>> = cells.iter().map(|cell| images(cell).collect()).collect();
    let growth = options.disk_bytes.min(1 << 30);
    let programs = Programs::look(options.diskplane.clone(), process::has_o_direct(&dir));
    // A device is in use while a file system of a run that was killed is mounted there.
    process::Folder::clear_and_say(&dir.join("work"))?;
    let given = options.device.as_deref();
    let given = given.map(|path| Given::look(path, options.overwrite));
    let sizes = (options.disk_bytes, growth);
    let lab = Lab::new(&programs, &dir, sizes, &images, given.transpose()?)?;
    let load = options.ramp + options.duration;
    let mut schedule = Schedule::new(&cells, options.samples, load, options.limit, began);
    for sample in &set.samples {
        schedule.has(&sample.cell, &sample.side, sample.round);
    }
    schedule.go_on();
    let again: Vec<&Cell>;
    let mut bench = Runner {
        options,
        probe: Probe::new(lab.work()),
        lab,
        file,
        watch,
        schedule,
        last: None,
        equal: Vec::new(),
        seen: seen(&set),
    };
    record::append(&bench.file, &Record::Run(Box::new(header)))?;
    if !set.samples.is_empty() {
        let text = format!(
            "resumed: {} samples of {} are there",
            set.samples.len(),
            path.display()
        );
        (bench.watch)(Event::Note(&text));
    }
    let left_out = bench.cells(&cells)?;
    if left_out > 0 {
        let text = format!(
            "{left_out} of {} cells were left out, the time is over: --out with the same folder goes on with them",
            cells.len()
        );
        (bench.watch)(Event::Note(&text));
    } else if options.samples_more > options.samples {
        again = undecided(experiment, &record::read(&path)?, &cells);
        if !again.is_empty() {
            let text = format!(
                "{} of {} cells leave findings undecided: they get more rounds in the time that is left",
                again.len(),
                cells.len()
            );
            (bench.watch)(Event::Note(&text));
            bench.schedule.again(&again, options.samples_more);
            bench.cells(&again)?;
        }
    }
    drop(bench);
    record::read(&path)
}

/// Those of `cells` of which more rounds may decide a finding.
fn undecided<'a>(experiment: &Experiment, set: &Set, cells: &[&'a Cell]) -> Vec<&'a Cell> {
    let judged = finding::judge(experiment, set);
    let open = judged.iter().filter(|judged| judged.may_be_decided());
    let terms = open.flat_map(|judged| {
        let finding = &judged.finding;
        [Some(&finding.left), finding.right.as_ref()]
    });
    let names: BTreeSet<&str> = terms.flatten().map(|term| term.cell.as_str()).collect();
    let own = cells.iter().filter(|cell| names.contains(&cell.name[..]));
    own.copied().collect()
}

/// What was seen of each side, last.
fn seen(set: &Set) -> BTreeMap<(String, String), Seen> {
    let samples = set.samples.iter().filter_map(|sample| {
        let key = (sample.cell.clone(), sample.side.clone());
        Some((key, sample.seen.clone()?))
    });
    samples.collect()
}

/// What came of [`clear`].
#[derive(Debug, Default)]
pub struct Cleared {
    /// There was something.
    pub any: bool,
    /// What could not be done: the folder is somebody's, or cannot be removed; the device is in use. Each says which.
    pub failed: Vec<Error>,
}

/// Removes what a run in `dir` left that was killed or stopped: servers' sockets, images, file systems, loop devices, and a file system
/// of ours on the block device that it was given. What it measured stays.
///
/// # Errors
///
/// There is no such folder, or a run is at work there.
pub fn clear(dir: &Path, device: Option<&Path>) -> Result<Cleared> {
    let dir = fs::canonicalize(dir).context(|| dir.display().to_string())?;
    // A run makes it first of all: where it is not there, none was.
    let _lock = match dir.join("lock").exists() {
        true => Some(process::lock(&dir)?),
        false => None,
    };
    // The folder first: what is mounted in it has the device. But what is left of that is no reason to leave the device.
    let there = process::Folder::clear(&dir.join("work"));
    let wiped = device.map_or(Ok(false), Given::clear);
    let mut cleared = Cleared::default();
    for outcome in [there, wiped] {
        match outcome {
            Ok(any) => cleared.any |= any,
            Err(error) => cleared.failed.push(error),
        }
    }
    Ok(cleared)
}

pub(super) fn images(cell: &Cell) -> impl Iterator<Item = Image> {
    cell.sides
        .iter()
        .filter(|side| !matches!(side.how, How::Served(Server::Spdk)))
        .map(|side| side.image)
}

fn header(
    experiment: &Experiment,
    options: &Options,
    device: Option<&Identity>,
    dir: &Path,
) -> record::Run {
    record::Run {
        schema: record::SCHEMA,
        experiment: experiment.name.to_owned(),
        seconds: record::now(),
        command: options.command.clone(),
        host: Host::look(dir),
        samples: options.samples,
        ramp_s: options.ramp.as_secs_f64(),
        duration_s: options.duration.as_secs_f64(),
        quick: options.quick,
        definition: experiment.definition(),
        sizes: match device {
            Some(device) => json!({ "disk": options.disk_bytes, "device": device }),
            None => json!({ "disk": options.disk_bytes }),
        },
    }
}

/// Opens the records for more of them; those of another run are refused, a torn line is cut off.
fn open(path: &Path, header: &record::Run, device: Option<&Identity>) -> Result<(File, Set)> {
    let named = || path.display().to_string();
    let set = match path.exists() {
        true => record::read(path)?,
        false => Set::default(),
    };
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .context(named)?;
    if let Some(torn) = set.torn {
        file.set_len(torn).context(named)?;
    }
    let of = |run: &record::Run, what: &str| run.sizes.get(what).cloned();
    if let Some(first) = set.runs.first() {
        let differs = [
            ("experiment", first.experiment != header.experiment),
            ("--seconds", first.duration_s != header.duration_s),
            ("size of the disks", of(first, "disk") != of(header, "disk")),
            (
                "--device",
                match (of(first, "device"), device) {
                    (Some(was), Some(is)) => !is.is_recorded(&was),
                    (was, is) => was.is_some() != is.is_some(),
                },
            ),
            ("kernel", first.host.kernel != header.host.kernel),
            (
                "definition of its cells (another build of diskplane)",
                first.definition != header.definition,
            ),
            (
                "version of diskplane",
                first.host.diskplane != header.host.diskplane,
            ),
        ];
        if let Some((what, _)) = differs.into_iter().find(|(_, differs)| *differs) {
            return Err(Error::invalid(format!(
                "{}: it has records of a run with another {what}: give another --out, or the same options to go on with it",
                named()
            )));
        }
    }
    Ok((file, set))
}

/// A sample for the display.
pub(super) fn in_a_line(sample: &Sample) -> String {
    let show = |metric: Metric| sample.metric(metric).map(|v| number(metric, v));
    format!(
        "{}, {}: {} IOPS, {} MB/s, p50 {} µs",
        sample.cell,
        sample.side,
        show(Metric::Iops).unwrap_or_default(),
        show(Metric::MbS).unwrap_or_default(),
        show(Metric::P50Us).unwrap_or_default()
    )
}

/// The cells as a list, for `--list`.
pub fn list(experiment: &Experiment) -> String {
    use std::fmt::Write;
    let mut text = format!(
        "{} · {}\n{}\n\n",
        experiment.name, experiment.title, experiment.meaning
    );
    for (what, why) in experiment.absent {
        let _ = writeln!(text, "not here: {what}: {why}");
    }
    if !experiment.absent.is_empty() {
        text.push('\n');
    }
    for cell in &experiment.cells {
        let quick = if cell.quick { "" } else { " (--full)" };
        let _ = writeln!(
            text,
            "{:<24} {}{quick}",
            cell.name,
            match cell.files {
                Some(files) => format!("{}, {} threads", files.scenario.name(), files.threads),
                None => cell.load.title(),
            }
        );
        for side in &cell.sides {
            let _ = writeln!(text, "{:<26} {}", "", side.name);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names() {
        for (pattern, name, expected) in [
            ("*", "seqread-4k", true),
            ("seqread-*", "seqread-4k", true),
            ("*-4k", "seqread-4k", true),
            ("s*d-*k", "seqread-4k", true),
            ("seqread", "seqread-4k", false),
            ("*-5k", "seqread-4k", false),
            ("**", "", true),
            ("a*b", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn cells_of_undecided_findings_get_more_rounds() {
        let e0 = crate::experiment::find("E0").unwrap();
        let of_run = cells(&e0, true, None).unwrap();
        let sample = |side: &str, round, iops| Sample {
            cell: "randwrite".to_owned(),
            side: side.to_owned(),
            round,
            metrics: [(Metric::Iops, iops)].into(),
            ..Sample::default()
        };
        let mut set = Set::default();
        let names = |set: &Set| {
            let cells = undecided(&e0, set, &of_run);
            cells
                .into_iter()
                .map(|cell| cell.name.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&set), [] as [&str; 0]);
        for round in 0..5 {
            set.samples.push(sample("qsd F", round, 100.0));
            set.samples.push(sample("qsd default", round, 10.0));
        }
        assert_eq!(names(&set), [] as [&str; 0]);
        set.samples[1] = sample("qsd default", 0, 1000.0);
        set.samples[3] = sample("qsd default", 1, 1000.0);
        assert_eq!(names(&set), ["randwrite"]);
    }

    #[test]
    fn records_of_another_run_are_refused_and_torn_ones_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records.jsonl");
        let header = record::Run {
            experiment: "E3".to_owned(),
            duration_s: 0.5,
            ..record::Run::default()
        };
        let (file, _) = open(&path, &header, None).unwrap();
        record::append(&file, &Record::Run(Box::new(header.clone()))).unwrap();
        let whole = file.metadata().unwrap().len();
        std::io::Write::write_all(&mut &file, b"{\"record\":\"sa").unwrap();
        let (file, set) = open(&path, &header, None).unwrap();
        assert_eq!((file.metadata().unwrap().len(), set.runs.len()), (whole, 1));
        let other = record::Run {
            duration_s: 2.0,
            ..header.clone()
        };
        let error = open(&path, &other, None).unwrap_err().to_string();
        assert!(error.contains("another --seconds"), "{error}");
        // A side that has another name, or does another thing under the same one, would be a series with what it was before.
        let mut e3 = crate::experiment::find("E3").unwrap();
        let before = e3.definition();
        assert_eq!(before, crate::experiment::find("E3").unwrap().definition());
        e3.cells[0].sides[0].queues += 1;
        assert_ne!(e3.definition(), before);
        let other = record::Run {
            definition: before,
            ..header
        };
        let error = open(&path, &other, None).unwrap_err().to_string();
        assert!(error.contains("another definition of its cells"), "{error}");
    }
}
