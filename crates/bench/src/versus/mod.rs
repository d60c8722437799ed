//! Comparisons with peers, with bare metal and with ourselves.
//!
//! ```text
//!   for each cell        make its images, unless they are there           (image)
//!     for each round     A B A B …: each side, and each engine of a peer
//!       sample           start the server · look at it · load · stop      (server, sample, fio)
//!     judge              the rounds' ratios, their interval, the bars     (statistics, judge)
//!   print, store                                                          (report)
//! ```
//!
//! Which cells there are and what they must reach is data ([`table`]). A side that cannot be started ends its own
//! part, a cell that cannot be run ends itself, and the run goes on.
//!
//! # Results
//!
//! `DIR/versus-SECONDS.jsonl` holds the [records](crate::record) of the run; its `cell` lines are [`Outcome`]s with every
//! figure, interval and verdict.

pub mod cell;
mod command;
mod commands;
pub(crate) mod fio;
mod half;
mod idle;
mod image;
mod in_turns;
mod judge;
pub mod report;
mod sample;
pub mod scattered;
mod sides;
pub mod table;

pub use cell::{Cell, Metric};
pub use image::Sizes;
pub use judge::{Judgement, Outcome, Series, Verdict};

use crate::{
    equal::{Flushed, Probe},
    machine::{Host, device, process},
    peer::{self, Difference, Programs},
    record::{self, Record},
    statistics, turns,
};
use block::{Context, Error, ErrorKind, Result};
use cell::{Image, Server};
use image::Images;
use sample::Times;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write,
    path::PathBuf,
    time::Duration,
};
use table::all;

/// An engine of a peer that is this much slower than its best one, in parts, is not measured again: after one round,
/// which may have been a bad one, and after more.
const SET_ASIDE_AT_ONCE: f64 = 0.5;
const SET_ASIDE: f64 = 0.8;

/// What to compare, and how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `diskplane` that is judged.
    pub diskplane: PathBuf,
    /// Where images and results go.
    pub dir: PathBuf,
    /// Names of cells; all where empty.
    pub cells: Vec<String>,
    /// Samples of each side.
    pub samples: usize,
    /// How long a sample measures.
    pub duration: Duration,
    /// How long it runs before.
    pub ramp: Duration,
    /// How large images are.
    pub sizes: Sizes,
    /// Keep the full images for the next run.
    pub keep: bool,
    /// The command line, for the record.
    pub command: String,
}

/// What happens, for those who watch.
#[derive(Debug)]
pub enum Event<'a> {
    /// What is being done: a line to be replaced by the next.
    Status(&'a str),
    /// A line of the results file.
    Record(&'a Value),
    /// A cell ended.
    Cell(&'a Cell, &'a Outcome),
}

/// A finished run.
#[derive(Debug)]
pub struct Run {
    /// The surroundings.
    pub host: Host,
    /// A result per cell, in their order.
    pub outcomes: Vec<Outcome>,
    /// The file with all samples.
    pub results: PathBuf,
}

/// The cells with these names, in the table's order; all for none.
///
/// # Errors
///
/// A name that no cell has.
pub fn select(names: &[String]) -> Result<Vec<&'static Cell>> {
    let known: BTreeSet<&str> = all().map(|cell| cell.name).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(name.as_str())) {
        return Err(Error::invalid(format!(
            "there is no cell '{name}'; there are {}",
            known.into_iter().collect::<Vec<_>>().join(", ")
        )));
    }
    let chosen =
        all().filter(|cell| names.is_empty() || names.iter().any(|name| name == cell.name));
    Ok(chosen.collect())
}

/// Compares.
///
/// # Errors
///
/// Only what concerns the run as a whole: an unknown cell, a folder that cannot be written, another run in
/// the same folder. What goes wrong within a cell is its [`Outcome`].
pub fn run(options: &Options, watch: &mut dyn FnMut(Event<'_>)) -> Result<Run> {
    let cells = select(&options.cells)?;
    let dir = &options.dir;
    fs::create_dir_all(dir).context(|| dir.display().to_string())?;
    let dir = &fs::canonicalize(dir).context(|| dir.display().to_string())?;
    let _lock = process::lock(dir)?;
    let images = Images::new(&options.diskplane, dir, options.keep, options.sizes)?;
    let direct = process::has_o_direct(images.work());
    let programs = Programs::look(options.diskplane.clone(), direct);
    let host = Host::look(dir);
    let seconds = record::now();
    let results = dir.join(format!("versus-{seconds}.jsonl"));
    let mut file = File::create(&results).context(|| results.display().to_string())?;
    let mut bench = Bench {
        options,
        programs,
        probe: Probe::new(images.work()),
        images,
        cores: host.cores,
        record: &mut |record, watch| {
            let value = serde_json::to_value(record).unwrap_or_default();
            watch(Event::Record(&value));
            writeln!(file, "{value}").context(|| results.display().to_string())
        },
        watch,
    };
    let head = Record::Run(Box::new(record::Run {
        schema: record::SCHEMA,
        experiment: "versus".to_owned(),
        seconds,
        command: options.command.clone(),
        host: host.clone(),
        samples: options.samples,
        ramp_s: options.ramp.as_secs_f64(),
        duration_s: options.duration.as_secs_f64(),
        quick: false,
        sizes: serde_json::to_value(options.sizes).unwrap_or_default(),
        definition: String::new(),
    }));
    (bench.record)(head, bench.watch)?;
    let mut outcomes = Vec::with_capacity(cells.len());
    for (n, cell) in cells.iter().enumerate() {
        let outcome = bench.cell(cell)?;
        let value = serde_json::to_value(&outcome).unwrap_or_default();
        (bench.record)(Record::Cell(value), bench.watch)?;
        (bench.watch)(Event::Cell(cell, &outcome));
        outcomes.push(outcome);
        // Images that no later cell needs make room.
        let later: BTreeSet<Image> = cells[n + 1..].iter().flat_map(|c| needs(c)).collect();
        for image in needs(cell).difference(&later) {
            bench.images.remove(*image);
        }
    }
    drop(bench);
    Ok(Run {
        host,
        outcomes,
        results,
    })
}

fn needs(cell: &Cell) -> BTreeSet<Image> {
    cell.sides
        .iter()
        .flat_map(|side| side.image.needs())
        .collect()
}

type Writer<'a> = dyn FnMut(Record, &mut dyn FnMut(Event<'_>)) -> Result<()> + 'a;

struct Bench<'a> {
    options: &'a Options,
    programs: Programs,
    images: Images,
    probe: Probe,
    cores: usize,
    /// Writes a line of the results file.
    record: &'a mut Writer<'a>,
    watch: &'a mut dyn FnMut(Event<'_>),
}

impl Bench<'_> {
    /// Runs a cell; an error only where its results cannot be stored.
    fn cell(&mut self, cell: &'static Cell) -> Result<Outcome> {
        let needs: Vec<Image> = needs(cell).into_iter().collect();
        let watch = &mut *self.watch;
        let prepared = self.images.prepare(&needs, |what| {
            watch(Event::Status(&format!("{}: {what}", cell.name)))
        });
        if let Err(error) = prepared {
            process::goes_on();
            return Ok(failed(cell, "skipped", &error));
        }
        let mut series: Vec<Series> = Vec::new();
        for (side, of) in cell.sides.iter().enumerate() {
            series.extend(sides::variants(of).iter().map(|engine| Series {
                side,
                engine,
                ..Series::default()
            }));
        }
        let mut equal: Vec<Option<peer::Seen>> = vec![None; cell.sides.len()];
        let mut unseen = BTreeSet::new();
        let mut unlike = BTreeSet::new();
        let together = in_turns::possible(cell);
        for round in 0..self.options.samples {
            let times = Times {
                ramp: self.options.ramp,
                duration: self.options.duration,
            };
            let seed = 1 + round as u64 * 1000;
            let of = format!(
                "{}: round {} of {}",
                cell.name,
                round + 1,
                self.options.samples
            );
            let mut taken = Vec::new().into_iter();
            if together {
                (self.watch)(Event::Status(&format!("{of}, all in turns")));
                let goes_on = series.iter().filter(|one| one.goes_on());
                let players: Vec<_> = goes_on.map(|s| (&cell.sides[s.side], s.engine)).collect();
                let round =
                    in_turns::round(&self.programs, &self.images, cell, &players, times, seed);
                taken = match round {
                    Ok(taken) => taken.into_iter(),
                    Err(error) => {
                        process::goes_on();
                        return Ok(failed(cell, "failed", &error));
                    }
                };
            }
            for one in &mut series {
                if !one.goes_on() {
                    one.rounds.push(None);
                    continue;
                }
                let side = &cell.sides[one.side];
                let seed = turns::own_seed(seed, side.name);
                let sample = taken.next().unwrap_or_else(|| {
                    let who = format!("{of}, {} {}", side.name, one.engine);
                    (self.watch)(Event::Status(&who));
                    let (programs, images) = (&self.programs, &self.images);
                    sample::take(programs, images, cell, side, one.engine, times, seed)
                });
                match sample {
                    Ok(mut sample) => {
                        if let Some(seen) = &mut sample.seen {
                            let files: Vec<PathBuf> =
                                seen.files.iter().map(PathBuf::from).collect();
                            let (programs, images) = (&self.programs, &self.images);
                            let setup =
                                sides::setup(programs, images, side, one.engine, &files, false);
                            match self.probe.look(programs, &setup) {
                                Ok(flushes) => seen.flushes = flushes,
                                Err(why) => {
                                    unseen.insert(format!(
                                        "what {} does with flushes was not seen: {why}",
                                        side.name
                                    ));
                                }
                            }
                        }
                        let (metrics, seen) = (sample.metrics.clone(), sample.seen.clone());
                        let record = Record::Sample(Box::new(record::Sample {
                            cell: cell.name.to_owned(),
                            side: side.name.to_owned(),
                            engine: one.engine.to_owned(),
                            round,
                            seconds: record::now(),
                            seed,
                            in_turns: together,
                            ..sample
                        }));
                        (self.record)(record, self.watch)?;
                        one.rounds.push(Some(metrics));
                        if let (Some(first), Some(seen)) = (&equal[one.side], &seen) {
                            unlike.extend(engines(side.name, one.engine, first, seen));
                        }
                        equal[one.side] = equal[one.side].take().or(seen);
                    }
                    Err(error) if one.side == 0 => {
                        process::goes_on();
                        let what = match error.kind() {
                            ErrorKind::Unsupported => "not supported",
                            _ => "failed",
                        };
                        return Ok(failed(cell, what, &error));
                    }
                    Err(error) => {
                        process::goes_on();
                        one.rounds.push(None);
                        one.failed = Some(match process::is_missing(&error) {
                            true => "not installed".to_owned(),
                            false => error.to_string(),
                        });
                    }
                }
            }
            set_aside(cell, &mut series);
        }
        let mut outcome = judge::judge(cell, &series, self.cores);
        compare(cell, &equal, &mut outcome);
        outcome.notes.extend(unlike);
        outcome.notes.extend(unseen);
        Ok(outcome)
    }
}

fn failed(cell: &Cell, what: &str, error: &Error) -> Outcome {
    Outcome {
        cell: cell.name,
        failed: Some(format!("{what}: {error}")),
        ..Outcome::default()
    }
}

/// Leaves out engines of a peer that are far behind its best one.
fn set_aside(cell: &Cell, series: &mut [Series]) {
    for side in 0..cell.sides.len() {
        let metric = judge::primary(cell, side);
        let of = |s: &Series| statistics::median(&s.values(metric));
        let Some(best) = judge::best(cell, series, side).and_then(of) else {
            continue;
        };
        for one in series.iter_mut().filter(|s| s.side == side && s.goes_on()) {
            let bound = if one.rounds.len() > 1 {
                SET_ASIDE
            } else {
                SET_ASIDE_AT_ONCE
            };
            let behind = of(one).is_some_and(|value| {
                if metric.more_is_better() {
                    value < best * bound
                } else {
                    value * bound > best
                }
            });
            one.set_aside = behind;
        }
    }
}

/// Which difference it is, in words.
fn words(what: Difference, seen: &peer::Seen) -> String {
    match what {
        Difference::Files => format!("{:?}", seen.files),
        Difference::Bytes => format!("{:?} {:?}", seen.files, seen.bytes),
        Difference::Direct => format!("O_DIRECT {}", if seen.direct { "on" } else { "off" }),
        Difference::Queues => format!("{} queues", seen.queues),
        Difference::Flushes => seen.flushes.map(Flushed::words).unwrap_or_default(),
    }
}

/// Whether a side's `engine` does what its first one does: what is said where it does not.
fn engines(side: &str, engine: &str, first: &peer::Seen, seen: &peer::Seen) -> Vec<String> {
    let mut differs = first.differs(seen);
    differs.retain(|what| match what {
        Difference::Direct => true,
        Difference::Flushes => first.flushes.is_some() && seen.flushes.is_some(),
        Difference::Files | Difference::Bytes | Difference::Queues => false,
    });
    let text = |what| {
        format!(
            "not equal: {} at {side} with {engine}; {} with its first engine",
            words(what, seen),
            words(what, first)
        )
    };
    differs.into_iter().map(text).collect()
}

/// Says whether what ought to be equal is.
fn compare(cell: &Cell, seen: &[Option<peer::Seen>], outcome: &mut Outcome) {
    let (Some(ours), Some(first)) = (&seen[0], cell.sides.first()) else {
        return;
    };
    let mut equal = Vec::new();
    for (side, theirs) in cell.sides.iter().zip(seen).skip(1) {
        let Some(theirs) = theirs else { continue };
        let peer = matches!(
            side.server,
            Server::Qsd | Server::QemuNbd | Server::Nbdkit | Server::Spdk
        );
        let same_files = peer && side.image == first.image;
        let mut differs = ours.differs(theirs);
        differs.retain(|what| match what {
            Difference::Files => same_files,
            // What grows has another size each time that it is looked at.
            Difference::Bytes => same_files && !first.image.fresh(),
            Difference::Queues => side.queues == first.queues,
            Difference::Direct => true,
            // Where one was not looked at, that is said.
            Difference::Flushes => ours.flushes.is_some() && theirs.flushes.is_some(),
        });
        for what in &differs {
            let text = format!(
                "not equal: {} here; {} at {}",
                words(*what, ours),
                words(*what, theirs),
                side.name
            );
            outcome.notes.push(text);
        }
        if differs.is_empty() && same_files && ours.flushes.is_some() == theirs.flushes.is_some() {
            equal.push(side.name);
        }
    }
    if !equal.is_empty() && !ours.files.is_empty() {
        outcome.equal = Some(format!("same as {}: {}", equal.join(" and "), ours.words()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_chosen_by_name_in_the_tables_order() {
        let names = |chosen: &[&Cell]| chosen.iter().map(|c| c.name).collect::<Vec<_>>();
        assert_eq!(select(&[]).unwrap().len(), all().count());
        let two = ["grow-random".to_owned(), "null".to_owned()];
        assert_eq!(names(&select(&two).unwrap()), ["null", "grow-random"]);
        let error = select(&["nul".to_owned()]).unwrap_err().to_string();
        assert!(
            error.contains("'nul'") && error.contains("grow-random, "),
            "{error}"
        );
    }

    #[test]
    fn engines_that_are_far_behind_are_set_aside() {
        let cell = all().find(|c| c.name == "raw-randread").unwrap();
        let series = |side, engine, iops| Series {
            side,
            engine,
            rounds: vec![Some([(Metric::Iops, iops)].into())],
            ..Series::default()
        };
        let mut all = [
            series(0, "auto", 10.0),
            series(1, "io_uring", 100.0),
            series(1, "native", 70.0),
            series(1, "threads", 40.0),
        ];
        set_aside(cell, &mut all);
        let aside = |all: &[Series]| all.iter().map(|s| s.set_aside).collect::<Vec<_>>();
        assert_eq!(aside(&all), [false, false, false, true]);
        // What one bad round may be, two are not.
        for one in &mut all {
            one.rounds.push(one.rounds[0].clone());
        }
        set_aside(cell, &mut all);
        assert_eq!(aside(&all), [false, false, true, true]);
        // By latency, less is better.
        let cell = table::all().find(|c| c.name == "latency-sleeping").unwrap();
        let series = |engine, us| Series {
            side: 1,
            engine,
            rounds: vec![Some([(Metric::P50Us, us)].into())],
            ..Series::default()
        };
        let mut all = [series("io_uring", 100.0), series("native", 230.0)];
        set_aside(cell, &mut all);
        assert_eq!(all.each_ref().map(|s| s.set_aside), [false, true]);
    }

    #[test]
    fn sides_that_differ_are_told() {
        let cell = all().find(|c| c.name == "raw-randread").unwrap();
        let seen = |direct, bytes| {
            Some(peer::Seen {
                files: vec!["full.raw".to_owned()],
                bytes: vec![bytes],
                direct,
                queues: 1,
                servers: 1,
                flushes: None,
            })
        };
        let mut outcome = Outcome::default();
        compare(cell, &[seen(true, 5), seen(true, 5), None], &mut outcome);
        assert!(outcome.notes.is_empty());
        assert_eq!(
            outcome.equal.as_deref(),
            Some("same as qsd: full.raw, O_DIRECT, 1 queue, flushes not looked at")
        );
        let flushed = |reached| {
            let seen = seen(true, 5).unwrap();
            let flushes = Some(Flushed { asked: 16, reached });
            Some(peer::Seen { flushes, ..seen })
        };
        let mut outcome = Outcome::default();
        compare(cell, &[flushed(16), flushed(0), None], &mut outcome);
        assert_eq!(
            outcome.notes,
            [
                "not equal: flushes reach the file here; flushes are dropped (none of 16 reached the file) at qsd"
            ]
        );
        let mut outcome = Outcome::default();
        compare(cell, &[flushed(16), flushed(16), None], &mut outcome);
        assert!(outcome.notes.is_empty(), "{outcome:?}");
        for other in [seen(false, 5), seen(true, 6)] {
            let mut outcome = Outcome::default();
            compare(cell, &[seen(true, 5), other, None], &mut outcome);
            assert_eq!(outcome.notes.len(), 1, "{outcome:?}");
        }
    }
}
