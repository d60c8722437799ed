//! Running an experiment: cell by cell, in each the rounds, in each round every side in turn.
//!
//! ```text
//!   read DIR/records.jsonl      what an interrupted run has is not taken again
//!   for each cell
//!     for each round            A B A B …: fewer where the time would not do for all
//!       for each side           image · server · look at it · load · stop · append the sample
//!     append what is said of the cell: noise, sides that are not what was asked for
//! ```

use super::{
    lab::Lab,
    plan::{Cell, Experiment, Format, How, Image, Side, State},
};
use crate::{
    load::{Pattern, Spec, Target},
    machine::{
        Host,
        device::{self, Device},
        others::Watch,
        process,
    },
    metric::{Metric, number},
    peer::{self, Programs, Running, Seen, Setup},
    record::{self, Failure, Record, Sample, Set},
    report::chart::file_name,
    sampling,
    versus::cell::Server,
};
use block::{Context, Error, ErrorKind, Result, size};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What a sample costs besides its load, before the first was seen.
const AROUND: Duration = Duration::from_millis(450);

/// Samples of a side of a cell that may fail before it is left out of further rounds.
const FAILURES_MAX: usize = 2;

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
    /// Seconds of a measurement.
    pub duration: Duration,
    /// Seconds of load before.
    pub ramp: Duration,
    /// Only the cells of a quick run.
    pub quick: bool,
    /// All of it takes so long at most; fewer rounds, then fewer cells, are run to keep that.
    pub limit: Option<Duration>,
    /// Draw a flame graph of each server.
    pub flamegraphs: bool,
    /// Bytes of a disk.
    pub disk_bytes: u64,
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
    fs::create_dir_all(&options.dir).context(|| options.dir.display().to_string())?;
    let dir = fs::canonicalize(&options.dir).context(|| options.dir.display().to_string())?;
    let _lock = process::lock(&dir)?;
    let path = dir.join("records.jsonl");
    let header = header(experiment, options, &dir);
    let (file, set) = open(&path, &header)?;
    let images: BTreeSet<Image> = cells.iter().flat_map(|cell| images(cell)).collect();
    let growth = options.disk_bytes.min(1 << 30);
    let mut programs = Programs {
        diskplane: options.diskplane.clone(),
        direct: true,
        spdk: None,
    };
    let lab = Lab::new(&programs, &dir, options.disk_bytes, growth, &images)?;
    programs.direct = process::has_o_direct(lab.work());
    let mut taken: BTreeSet<(String, String, usize)> = BTreeSet::new();
    for sample in &set.samples {
        taken.insert((sample.cell.clone(), sample.side.clone(), sample.round));
    }
    let all = |cell: &&Cell| cell.sides.len() * options.samples;
    let mut bench = Runner {
        options,
        lab,
        file,
        watch,
        began,
        taken,
        left: cells.iter().map(all).sum(),
        done: 0,
        costs: (0, Duration::ZERO),
        last: None,
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
    for (n, cell) in cells.iter().enumerate() {
        if !bench.cell(cell)? {
            let text = format!(
                "{} of {} cells were left out, the time is over: --out with the same folder goes on with them",
                cells.len() - n,
                cells.len()
            );
            (bench.watch)(Event::Note(&text));
            break;
        }
        let later = cells[n + 1..].iter().flat_map(|cell| self::images(cell));
        bench.lab.keep_only(&later.collect());
    }
    drop(bench);
    record::read(&path)
}

fn images(cell: &Cell) -> impl Iterator<Item = Image> {
    cell.sides
        .iter()
        .filter(|side| !matches!(side.how, How::Served(Server::Spdk)))
        .map(|side| side.image)
}

fn header(experiment: &Experiment, options: &Options, dir: &Path) -> record::Run {
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
        sizes: json!({ "disk": options.disk_bytes }),
    }
}

/// Opens the records for more of them; those of another run are refused, a torn line is cut off.
fn open(path: &Path, header: &record::Run) -> Result<(File, Set)> {
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
    if let Some(first) = set.runs.first() {
        let differs = [
            ("experiment", first.experiment != header.experiment),
            ("--seconds", first.duration_s != header.duration_s),
            ("size of the disks", first.sizes != header.sizes),
            ("kernel", first.host.kernel != header.host.kernel),
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

pub(super) struct Runner<'a> {
    pub(super) options: &'a Options,
    pub(super) lab: Lab,
    file: File,
    watch: &'a mut dyn FnMut(Event<'_>),
    began: Instant,
    taken: BTreeSet<(String, String, usize)>,
    /// Samples that the cells from this one on would have.
    left: usize,
    /// Samples that are there, of this run and of those before.
    done: usize,
    /// Samples that this run took, and how long they and the images for them took.
    costs: (u32, Duration),
    last: Option<String>,
}

impl Runner<'_> {
    /// How long a sample takes.
    fn cost(&self) -> Duration {
        match self.costs {
            (0, _) => self.options.ramp + self.options.duration + AROUND,
            (samples, time) => time / samples,
        }
    }

    /// How many rounds there is time for, if all cells from here on get as many.
    fn rounds(&self) -> usize {
        let Some(limit) = self.options.limit else {
            return self.options.samples;
        };
        let time = limit.saturating_sub(self.began.elapsed());
        rounds_in(time, self.left, self.options.samples, self.cost())
    }

    /// Runs a cell; false where there is no time for it.
    fn cell(&mut self, cell: &Cell) -> Result<bool> {
        let rounds = self.rounds();
        let own = cell.sides.len() * self.options.samples;
        let is_taken = |round: usize, side: &Side| {
            self.taken
                .contains(&(cell.name.clone(), side.name.clone(), round))
        };
        let complete = (0..rounds).all(|round| cell.sides.iter().all(|s| is_taken(round, s)));
        if rounds == 0 && !complete {
            return Ok(false);
        }
        if rounds < self.options.samples {
            let text = format!(
                "{}: {rounds} of {} rounds, for there is no time for more",
                cell.name, self.options.samples
            );
            (self.watch)(Event::Note(&text));
        }
        let mut failed: BTreeMap<&str, usize> = BTreeMap::new();
        let mut notes: BTreeSet<String> = BTreeSet::new();
        for round in 0..rounds {
            for side in &cell.sides {
                let key = (cell.name.clone(), side.name.clone(), round);
                if self.taken.contains(&key) || failed.get(&side.name[..]) >= Some(&FAILURES_MAX) {
                    self.done += 1;
                    continue;
                }
                let began = Instant::now();
                match self.side(cell, side, round, &mut notes) {
                    Ok(sample) => {
                        self.last = Some(in_a_line(&sample));
                        record::append(&self.file, &Record::Sample(Box::new(sample.clone())))?;
                        (self.watch)(Event::Sample(&sample));
                    }
                    Err(error) => {
                        process::goes_on();
                        let failure = Failure {
                            cell: cell.name.clone(),
                            side: side.name.clone(),
                            why: error.to_string(),
                        };
                        let text = format!("{}, {}: {error}", cell.name, side.name);
                        (self.watch)(Event::Note(&text));
                        record::append(&self.file, &Record::Failure(failure))?;
                        *failed.entry(&side.name).or_default() += match error.kind() {
                            // It may have been the moment.
                            ErrorKind::Io => 1,
                            _ => FAILURES_MAX,
                        };
                    }
                }
                self.done += 1;
                self.costs.0 += 1;
                self.costs.1 += began.elapsed();
            }
        }
        self.left -= own;
        let notes: Vec<String> = notes.into_iter().collect();
        record::append(
            &self.file,
            &Record::Cell(json!({ "cell": cell.name, "rounds": rounds, "notes": notes })),
        )?;
        Ok(true)
    }

    fn say(&mut self, cell: &str, what: &str) {
        let rounds = self.rounds().max(1);
        let rest = self.left / self.options.samples.max(1) * rounds;
        let rest = u32::try_from(rest).unwrap_or(u32::MAX);
        let left = self.cost().saturating_mul(rest);
        (self.watch)(Event::Progress(Progress {
            cell,
            what,
            done: self.done,
            total: self.done + rest as usize,
            left,
            last: self.last.as_deref(),
        }));
    }

    /// Takes a sample.
    fn side(
        &mut self,
        cell: &Cell,
        side: &Side,
        round: usize,
        notes: &mut BTreeSet<String>,
    ) -> Result<Sample> {
        self.say(&cell.name, &format!("round {}, {}", round + 1, side.name));
        let watch = &mut *self.watch;
        let (done, last) = (self.done, self.last.clone());
        let mut making = |what: &str| {
            watch(Event::Progress(Progress {
                cell: &cell.name,
                what,
                done,
                total: done,
                left: Duration::ZERO,
                last: last.as_deref(),
            }));
        };
        let files = self.lab.files(side.image, &mut making)?;
        device::settle(self.lab.work())?;
        let seed = 1 + round as u64 * 1000;
        let folder = self.lab.folder(side.image.place);
        let device = Device::below(&folder).watch();
        let mut sample = match side.how {
            How::Bare => self.bare(cell, side, &files, (round, seed))?,
            How::Served(server) => self.served(cell, side, server, &files, (round, seed), notes)?,
            // It has its own, from when its files are there.
            How::Mounted(server) => self.mounted(cell, side, server, &files, seed, notes)?,
        };
        if !matches!(side.how, How::Mounted(_)) {
            device.add_to(&mut sample.metrics);
        }
        Ok(Sample {
            cell: cell.name.clone(),
            side: side.name.clone(),
            engine: side.engine.to_owned(),
            round,
            seconds: record::now(),
            seed,
            axes: cell.axes.clone(),
            ..sample
        })
    }

    fn spec(&self, cell: &Cell, side: &Side, target: Target, seed: u64) -> Spec {
        let load = &cell.load;
        let grows = match side.image.state {
            State::Growing | State::Overlay | State::Hollow if side.image.format != Format::Vhd => {
                load.block.max(64 << 10)
            }
            _ => 0,
        };
        Spec {
            duration: self.options.duration,
            ramp: self.options.ramp + Duration::from_secs_f64(load.warm),
            ios_max: (grows > 0).then(|| self.lab.growth / grows),
            seed,
            ..load.spec(target, side.queues)
        }
    }

    fn bare(
        &self,
        cell: &Cell,
        side: &Side,
        files: &[PathBuf],
        (round, seed): (usize, u64),
    ) -> Result<Sample> {
        let specs: Vec<Spec> = (0..)
            .zip(files)
            .map(|(n, path)| {
                let target = Target::File {
                    path: path.clone(),
                    engine: side.engine.to_owned(),
                    direct: side.direct && self.lab.programs().direct,
                };
                self.spec(cell, side, target, seed + n)
            })
            .collect();
        let watch = Watch::begin(&[]);
        let reports = sampling::run_all(&specs)?;
        let mut measured = sampling::figures(&reports, &[])?;
        // There is no server: what the requests cost is ours, generator and all.
        if let Some(us) = measured.metrics.get(&Metric::ClientCpuUs).copied() {
            measured.metrics.insert(Metric::CpuUs, us);
            sampling::derive(&mut measured.metrics);
        }
        watch.add_to(&mut measured.metrics);
        if round == 0 {
            let own = specs.iter().cloned().map(|spec| Spec {
                server_pids: vec![std::process::id()],
                ..spec
            });
            let own: Vec<Spec> = own.collect();
            measured.metrics.extend(sampling::syscalls(&own)?);
        }
        Ok(Sample {
            metrics: measured.metrics,
            latency: measured.latency,
            timeline: measured.timeline,
            detail: json!({ "specs": specs, "reports": measured.reports }),
            ..Sample::default()
        })
    }

    fn served(
        &self,
        cell: &Cell,
        side: &Side,
        server: Server,
        files: &[PathBuf],
        (round, seed): (usize, u64),
        notes: &mut BTreeSet<String>,
    ) -> Result<Sample> {
        let writes = !matches!(cell.load.pattern, Pattern::Read | Pattern::RandRead);
        // Sixteen virtual machines have a server each, or one has sixteen disks.
        let groups: Vec<&[PathBuf]> = match side.server_each {
            true => files.chunks(1).collect(),
            false => vec![files],
        };
        let mut servers = Vec::new();
        for (n, files) in groups.into_iter().enumerate() {
            let work = match n {
                0 => self.lab.work().to_owned(),
                n => self.lab.work().join(format!("server-{n}")),
            };
            fs::create_dir_all(&work).context(|| work.display().to_string())?;
            servers.push(self.start(side, server, files, writes, &work, notes)?);
        }
        let targets = servers.iter().flat_map(|(running, _)| {
            let targets = (0..).zip(&running.targets);
            targets.map(move |(n, target)| (running.pid(), running.control_of(n), target))
        });
        let specs: Vec<Spec> = (0..)
            .zip(targets)
            .map(|(n, (pid, control, target))| Spec {
                server_pids: vec![pid],
                control,
                ..self.spec(cell, side, target.clone(), seed + n)
            })
            .collect();
        let pids: Vec<u32> = servers.iter().map(|(running, _)| running.pid()).collect();
        let watch = Watch::begin(&pids);
        let mut measured =
            sampling::run_all(&specs).and_then(|reports| sampling::figures(&reports, &pids));
        if let Ok(measured) = &mut measured {
            watch.add_to(&mut measured.metrics);
            if round == 0 {
                measured.metrics.extend(sampling::syscalls(&specs)?);
            }
        }
        let drawn = match round == 0 && measured.is_ok() {
            true => self.flame(cell, side, &specs, &pids, notes),
            false => None,
        };
        let mut sample = Err(Error::invalid("no server"));
        for (running, seen) in servers {
            // What is measured belongs to all of them, and goes with the first.
            let own = std::mem::replace(&mut measured, Ok(sampling::Measured::default()));
            let finished = sampling::finish(running, seen, own);
            sample = match sample {
                Ok(first) => finished.map(|_| first),
                Err(_) => finished,
            };
        }
        let mut sample = sample?;
        sample.detail["specs"] = json!(specs);
        sample.flamegraph = drawn;
        Ok(sample)
    }

    /// Draws where a side's servers spend CPU, where that is asked for; the picture's name in the run's folder.
    fn flame(
        &self,
        cell: &Cell,
        side: &Side,
        specs: &[Spec],
        pids: &[u32],
        notes: &mut BTreeSet<String>,
    ) -> Option<String> {
        if !self.options.flamegraphs {
            return None;
        }
        let name = format!("flame/{}.svg", file_name(&[&cell.name, &side.name]));
        let title = format!("{}, {}", cell.name, side.name);
        match sampling::flame(specs, pids, &self.options.dir.join(&name), &title) {
            Ok(drawn) => drawn.then_some(name),
            Err(error) => {
                process::goes_on();
                notes.insert(format!("{}: no flame graph: {error}", side.name));
                None
            }
        }
    }

    /// Starts a side's server on files, and looks at it.
    pub(super) fn start(
        &self,
        side: &Side,
        server: Server,
        files: &[PathBuf],
        writes: bool,
        work: &Path,
        notes: &mut BTreeSet<String>,
    ) -> Result<(Running, Seen)> {
        let of_qemu = matches!(server, Server::Qsd | Server::QemuNbd);
        let direct = side.direct && self.lab.programs().direct;
        let setup = Setup {
            server,
            files,
            format: match of_qemu {
                true => side.image.format.of_qemu(),
                false => side.image.format.name(),
            },
            // QEMU finds it by the image; we open only what is allowed.
            backing: match of_qemu {
                true => None,
                false => self.lab.base(side.image),
            },
            engine: side.engine,
            queues: side.queues,
            io_threads: side.io_threads,
            polling: side.polling,
            direct,
            drops_flushes: side.drops_flushes,
            writethrough: side.writethrough,
            read_only: !writes,
            shared: false,
            table_cache: side.table_cache,
            table_entry: side.table_entry,
        };
        let running = peer::start(self.lab.programs(), work, &setup)?;
        let seen = running.seen(files, side.queues)?;
        if seen.direct != direct {
            notes.insert(format!(
                "not as asked for: {} has O_DIRECT {}",
                side.name,
                if seen.direct { "on" } else { "off" }
            ));
        }
        Ok((running, seen))
    }
}

/// Rounds of `samples` at most that there is `time` for, where all of them together would be `left` samples of `cost`
/// each: one as long as there is any time.
fn rounds_in(time: Duration, left: usize, samples: usize, cost: Duration) -> usize {
    let round = left as f64 / samples.max(1) as f64;
    let rounds = time.as_secs_f64() / (round * cost.as_secs_f64()).max(1e-9);
    (rounds as usize).clamp(usize::from(!time.is_zero()), samples.max(1))
}

/// A sample for the display.
fn in_a_line(sample: &Sample) -> String {
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
    for cell in &experiment.cells {
        let quick = if cell.quick { "" } else { " (--full)" };
        let _ = writeln!(
            text,
            "{:<24} {}{quick}",
            cell.name,
            match cell.files {
                Some(files) => format!("{}, {} threads", files.scenario.name(), files.threads),
                None => format!(
                    "{} of {}, depth {}",
                    cell.load.pattern.name(),
                    size::human(cell.load.block),
                    cell.load.depth
                ),
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
    fn rounds_are_as_many_as_there_is_time_for() {
        let s = Duration::from_secs;
        // 20 samples a round.
        for (time, left, expected) in [
            (1000, 100, 5),
            (100, 100, 5),
            (99, 100, 4),
            (40, 100, 2),
            (1, 100, 1),
            (0, 100, 0),
            (60, 0, 5),
        ] {
            assert_eq!(rounds_in(s(time), left, 5, s(1)), expected, "{time} {left}");
        }
        assert_eq!(rounds_in(s(9), 0, 0, s(0)), 1);
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
        let (file, _) = open(&path, &header).unwrap();
        record::append(&file, &Record::Run(Box::new(header.clone()))).unwrap();
        let whole = file.metadata().unwrap().len();
        std::io::Write::write_all(&mut &file, b"{\"record\":\"sa").unwrap();
        let (file, set) = open(&path, &header).unwrap();
        assert_eq!((file.metadata().unwrap().len(), set.runs.len()), (whole, 1));
        let other = record::Run {
            duration_s: 2.0,
            ..header
        };
        let error = open(&path, &other).unwrap_err().to_string();
        assert!(error.contains("another --seconds"), "{error}");
    }
}
