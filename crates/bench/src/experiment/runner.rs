//! A run at work: a cell's rounds, in turns or one side after the other, and what is said meanwhile.

use super::{
    lab::Lab,
    plan::{Cell, How, Side},
    run::{self, Event, Options, Progress, in_a_line},
    schedule::Schedule,
};
use crate::{
    equal::{self, Probe},
    machine::{
        device::{self, Device},
        process,
    },
    peer::Seen,
    record::{self, Failure, Record, Sample},
    turns::{self, Entrant, What},
};
use block::{Error, ErrorKind, Result};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::PathBuf,
    time::{Duration, Instant},
};

/// Samples of a side of a cell that may fail before it is left out of further rounds.
const FAILURES_MAX: usize = 2;

pub(super) struct Runner<'a> {
    pub options: &'a Options,
    pub lab: Lab,
    pub file: File,
    pub watch: &'a mut dyn FnMut(Event<'_>),
    pub schedule: Schedule<'a>,
    /// The last result, in a line.
    pub last: Option<String>,
    pub probe: Probe,
    /// What was said last of who is equal.
    pub equal: Vec<String>,
    /// What was seen of sides (with their cells) before this run went on.
    pub seen: BTreeMap<(String, String), Seen>,
}

/// A cell at work.
struct Work<'a> {
    cell: &'a Cell,
    /// How often sides failed.
    failed: BTreeMap<&'a str, usize>,
    notes: BTreeSet<String>,
    /// What was seen of sides, by this run last.
    seen: BTreeMap<&'a str, Seen>,
}

impl Runner<'_> {
    /// Runs cells, one after the other; how many there was no time for.
    pub fn cells(&mut self, cells: &[&Cell]) -> Result<usize> {
        for (n, cell) in cells.iter().enumerate() {
            if !self.cell(cell)? {
                return Ok(cells.len() - n);
            }
            let later = cells[n + 1..].iter().flat_map(|cell| run::images(cell));
            self.lab.keep_only(&later.collect());
        }
        Ok(0)
    }

    /// Runs a cell; false where there is no time for it.
    fn cell(&mut self, cell: &Cell) -> Result<bool> {
        let lacks = |schedule: &Schedule<'_>, round: usize| {
            let mut sides = cell.sides.iter();
            sides.any(|side| schedule.lacks(&cell.name, &side.name, round))
        };
        let in_turns = Self::can_take_turns(cell);
        let mut work = Work {
            cell,
            failed: BTreeMap::new(),
            notes: BTreeSet::new(),
            seen: self.seen_before(cell),
        };
        let mut rounds = 0;
        while rounds < self.schedule.wanted() {
            if lacks(&self.schedule, rounds) {
                // The machine may be slower than it was: it is asked again before each.
                if rounds >= self.schedule.rounds() {
                    break;
                }
                let complete = match in_turns {
                    true => self.in_turns(&mut work, rounds)?,
                    false => self.one_by_one(&mut work, rounds)?,
                };
                if !complete {
                    break;
                }
            }
            rounds += 1;
        }
        if rounds == 0 && lacks(&self.schedule, 0) && !self.has_some(cell) {
            return Ok(false);
        }
        if rounds < self.options.samples {
            let text = format!(
                "{}: {rounds} of {} rounds, for there is no time for more",
                cell.name, self.options.samples
            );
            (self.watch)(Event::Note(&text));
        }
        self.schedule.ended();
        let notes: Vec<String> = work.notes.into_iter().collect();
        let sides = cell.sides.iter();
        let seen = sides.filter_map(|side| Some((&side.name[..], work.seen.get(&side.name[..])?)));
        let equal = equal::lines(&seen.collect::<Vec<_>>());
        if !equal.is_empty() && equal != self.equal {
            let text = format!("{}: equal are {}", cell.name, equal.join("; "));
            (self.watch)(Event::Note(&text));
        }
        record::append(
            &self.file,
            &Record::Cell(
                json!({ "cell": cell.name, "rounds": rounds, "notes": notes, "equal": equal }),
            ),
        )?;
        self.equal = equal;
        Ok(true)
    }

    /// What was seen of a cell's sides before this run.
    fn seen_before<'a>(&self, cell: &'a Cell) -> BTreeMap<&'a str, Seen> {
        let sides = cell.sides.iter().map(|side| side.name.as_str());
        let seen = sides.filter_map(|side| {
            let key = (cell.name.clone(), side.to_owned());
            Some((side, self.seen.get(&key)?.clone()))
        });
        seen.collect()
    }

    /// Whether there is any sample of a cell.
    fn has_some(&self, cell: &Cell) -> bool {
        let there = |side: &Side| !self.schedule.lacks(&cell.name, &side.name, 0);
        cell.sides.iter().any(there)
    }

    /// A round of one sample after the other; false when the time was over before its end.
    fn one_by_one<'a>(&mut self, work: &mut Work<'a>, round: usize) -> Result<bool> {
        for side in &work.cell.sides {
            if !self.schedule.lacks(&work.cell.name, &side.name, round) {
                continue;
            }
            if self.schedule.is_over() {
                return Ok(false);
            }
            let files = self.files(work.cell, side);
            let began = Instant::now();
            let sample = files.and_then(|files| self.sample(work, side, &files, round));
            self.schedule.spent(1, began.elapsed());
            self.keep(work, side, round, sample)?;
        }
        Ok(true)
    }

    /// A round in which all sides are up.
    fn in_turns<'a>(&mut self, work: &mut Work<'a>, round: usize) -> Result<bool> {
        let cell = work.cell;
        self.say(
            &cell.name,
            &format!("round {}, all sides in turns", round + 1),
        );
        let lacking = |side: &&'a Side| self.schedule.lacks(&cell.name, &side.name, round);
        let sides: Vec<&Side> = cell.sides.iter().filter(lacking).collect();
        let files: Vec<Result<Vec<PathBuf>>> =
            sides.iter().map(|side| self.files(cell, side)).collect();
        let began = Instant::now();
        if let Err(error) = device::settle(self.lab.work()) {
            // As where they come one by one, it is the sides that fail, and others may not: it ends no run.
            for side in sides {
                let error = Error::new(error.kind(), error.to_string());
                self.keep(work, side, round, Err(error))?;
            }
            return Ok(true);
        }
        let begin = |(side, files): (&&Side, Result<Vec<PathBuf>>), folder: PathBuf| {
            let seed = seed(cell, side, round);
            let subject = self.begin(cell, side, &files?, seed, &folder, &mut work.notes)?;
            Ok(Entrant {
                what: What::Subject(subject),
                device: Device::below(&self.lab.device_below(side.image)),
            })
        };
        let players = sides.iter().zip(files);
        let entrants = turns::entrants(self.lab.work(), players, begin);
        let ended = turns::round(entrants, self.options.ramp, self.options.duration);
        let samples = sides.iter().zip(ended).map(|(side, ended)| {
            turns::sample(ended, |subject, measured| {
                self.complete(cell, side, subject, measured, round, &mut work.notes)
            })
        });
        let samples: Vec<Result<Sample>> = samples.collect();
        self.schedule.spent(sides.len(), began.elapsed());
        // Where a run goes on in the middle of a round, or others failed, there may be one that ran alone.
        let several = samples.iter().filter(|sample| sample.is_ok()).count() > 1;
        for (side, sample) in sides.into_iter().zip(samples) {
            let sample = sample.map(|sample| Sample {
                in_turns: several,
                ..sample
            });
            self.keep(work, side, round, sample)?;
        }
        Ok(true)
    }

    /// Writes down what came of a sample.
    fn keep<'a>(
        &mut self,
        work: &mut Work<'a>,
        side: &'a Side,
        round: usize,
        sample: Result<Sample>,
    ) -> Result<()> {
        let cell = work.cell;
        match sample {
            Ok(mut sample) => {
                self.look(work, side, &mut sample);
                let sample = Sample {
                    cell: cell.name.clone(),
                    side: side.name.clone(),
                    engine: side.engine.to_owned(),
                    round,
                    seconds: record::now(),
                    seed: seed(cell, side, round),
                    axes: cell.axes.clone(),
                    ..sample
                };
                self.last = Some(in_a_line(&sample));
                self.schedule.has(&cell.name, &side.name, round);
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
                (self.watch)(Event::Failure(&failure));
                record::append(&self.file, &Record::Failure(failure))?;
                let failed = work.failed.entry(&side.name).or_default();
                *failed += match error.kind() {
                    // It may have been the moment.
                    ErrorKind::Io => 1,
                    _ => FAILURES_MAX,
                };
                if *failed >= FAILURES_MAX {
                    self.schedule.give_up(&cell.name, &side.name);
                }
            }
        }
        Ok(())
    }

    /// Adds to what was seen of a side's server what it does with flushes, and says where that is not what was asked for.
    fn look<'a>(&mut self, work: &mut Work<'a>, side: &'a Side, sample: &mut Sample) {
        let server = match side.how {
            How::Served(server) | How::Mounted(Some(server)) | How::Guest(_, Some(server)) => {
                server
            }
            How::Bare | How::Mounted(None) | How::Guest(_, None) => return,
        };
        let Some(seen) = &mut sample.seen else { return };
        let files: Vec<PathBuf> = seen.files.iter().map(PathBuf::from).collect();
        let setup = self.setup(side, server, &files);
        let began = Instant::now();
        let looked = self.probe.look(self.lab.programs(), &setup);
        // It is once for each way to start a server, but part of what the run takes.
        self.schedule.spent(0, began.elapsed());
        match looked {
            Ok(flushes) => seen.flushes = flushes,
            Err(why) => {
                let text = format!("what {} does with flushes was not seen: {why}", side.name);
                work.notes.insert(text);
            }
        }
        work.notes
            .extend(equal::differs(&side.name, side.drops_flushes, seen.flushes));
        work.seen.insert(&side.name, seen.clone());
    }

    fn say(&mut self, cell: &str, what: &str) {
        let rounds = self.schedule.rounds().max(1);
        let done = self.schedule.done();
        (self.watch)(Event::Progress(Progress {
            cell,
            what,
            done,
            total: done + self.schedule.left(rounds),
            left: self.schedule.time_for(rounds),
            last: self.last.as_deref(),
        }));
    }

    /// The files of a side, which are made where they are not there.
    fn files(&mut self, cell: &Cell, side: &Side) -> Result<Vec<PathBuf>> {
        let (done, last) = (self.schedule.done(), self.last.clone());
        let watch = &mut *self.watch;
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
        let (began, had) = (Instant::now(), self.lab.has(side.image));
        let files = self.lab.files(side.image, &mut making);
        match (side.image.stays(), had) {
            (true, false) => self.schedule.made(side.image, began.elapsed()),
            (true, true) => {}
            // Part of what each sample takes.
            (false, _) => self.schedule.spent(0, began.elapsed()),
        }
        files
    }

    /// Takes a sample while no other side is up.
    fn sample(
        &mut self,
        work: &mut Work<'_>,
        side: &Side,
        files: &[PathBuf],
        round: usize,
    ) -> Result<Sample> {
        let cell = work.cell;
        let seed = seed(cell, side, round);
        self.say(&cell.name, &format!("round {}, {}", round + 1, side.name));
        device::settle(self.lab.work())?;
        match side.how {
            How::Mounted(server) => {
                return self.mounted(cell, side, server, files, seed, &mut work.notes);
            }
            How::Guest(bus, server) => {
                let on = (bus, server);
                return self.guest(cell, side, on, files, seed, &mut work.notes);
            }
            How::Bare | How::Served(_) => {}
        }
        let folder = self.lab.work().to_owned();
        let subject = self.begin(cell, side, files, seed, &folder, &mut work.notes)?;
        let device = Device::below(&self.lab.device_below(side.image)).watch();
        let mut measured = subject.measure();
        if let Ok(measured) = &mut measured {
            device.add_to(&mut measured.metrics);
        }
        self.complete(cell, side, subject, measured, round, &mut work.notes)
    }
}

/// Of a side's loads in a round; those on several disks at once count on from it. On a file system, which each side has to itself,
/// all do the same.
fn seed(cell: &Cell, side: &Side, round: usize) -> u64 {
    let seed = 1 + round as u64 * 1000;
    match cell.files {
        Some(_) => seed,
        None => turns::own_seed(seed, &side.name),
    }
}
