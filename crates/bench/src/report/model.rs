//! What a report says, as data: it is embedded in the page, and every number on the page is one of these.

use crate::{
    breakdown::Answer,
    equal,
    experiment::{self, Experiment, Judged},
    load::timeline,
    metric::Metric,
    peer::Seen,
    record::{Failure, NOISY, Run, Sample, Set, noise, restless},
    statistics::{Figure, Summary},
};
use serde::Serialize;
use std::collections::BTreeMap;
use trace::{Breakdown, Buckets, Totals};

/// A report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Model {
    /// The experiment's name, or `versus`.
    pub name: String,
    /// A line.
    pub title: String,
    /// Which document it repeats; empty without one.
    pub source: String,
    /// What is measured.
    pub meaning: String,
    /// The run, and each time that it went on.
    pub runs: Vec<Run>,
    /// Cells, as they ran.
    pub cells: Vec<Cell>,
    /// Where the time of single requests went.
    pub breakdowns: Vec<Broken>,
    /// What was published beside what was found.
    pub findings: Vec<Judged>,
    /// What the document speaks of and no path here has: that, and why.
    pub absent: Vec<(String, String)>,
    /// What could not be measured.
    pub failures: Vec<Failure>,
    /// What the reader has to know: noise, other work of the machine, sides that are not what was asked for.
    pub notes: Vec<String>,
    /// Figures that are drawn as bars.
    #[serde(skip)]
    pub figures: Vec<Metric>,
}

/// A breakdown by the protocol of the latency study.
#[derive(Clone, Debug, Serialize)]
pub struct Broken {
    /// What it stands with: a cell, or what was asked for.
    pub group: String,
    /// Of what it is: a side, or an image.
    pub name: String,
    /// The means.
    pub breakdown: Breakdown,
}

/// A cell.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cell {
    /// Its name.
    pub name: String,
    /// Its factors.
    pub axes: Vec<(String, String)>,
    /// Who was seen to be equal, and in what.
    pub equal: Vec<String>,
    /// Its sides, as they ran.
    pub sides: Vec<Side>,
}

/// One side of a cell.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Side {
    /// Its name, with its engine where it has several.
    pub name: String,
    /// Every figure.
    pub figures: BTreeMap<Metric, Drawn>,
    /// Latencies of all rounds.
    pub latency: Buckets,
    /// Latency over time in the round whose IOPS are the middle ones.
    pub timeline: timeline::Stored,
    /// A flame graph of the server, by its name beside the page.
    pub flamegraph: Option<String>,
    /// What requests spent in diskplane's stages, by operation, in all rounds.
    pub stages: BTreeMap<String, Totals>,
    /// Interrupts a second by source, mean of the rounds: of the machine, and after `guest: ` of a guest.
    pub interrupts: BTreeMap<String, f64>,
}

/// A figure: of the rounds, the interval of their median, and the usual.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Drawn {
    /// Rounds, their median, its 95 % interval, the lowest and the highest.
    #[serde(flatten)]
    pub figure: Figure,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation.
    pub deviation: f64,
}

impl Model {
    /// Of the records of a run.
    pub fn of(set: &Set) -> Self {
        let first = set.runs.first();
        let name = first.map_or_else(String::new, |run| run.experiment.clone());
        let known: Option<Experiment> = experiment::find(&name).ok();
        let order = known.as_ref().map(Order::of);
        let mut model = Self {
            title: match &known {
                Some(known) => known.title.to_owned(),
                None => "Comparison with peers".to_owned(),
            },
            source: known
                .as_ref()
                .map_or_else(String::new, |e| e.source.to_owned()),
            meaning: known
                .as_ref()
                .map_or_else(String::new, |e| e.meaning.to_owned()),
            figures: match &known {
                Some(known) => known.figures.to_vec(),
                None => vec![Metric::Iops, Metric::CpuUs, Metric::P50Us, Metric::Runs],
            },
            absent: known.as_ref().map_or_else(Vec::new, |e| {
                let absent = e.absent.iter();
                absent
                    .map(|(what, why)| ((*what).to_owned(), (*why).to_owned()))
                    .collect()
            }),
            findings: known.map_or_else(Vec::new, |e| experiment::judge(&e, set)),
            runs: set.runs.clone(),
            cells: cells(set),
            name,
            ..Self::default()
        };
        if let Some(order) = order {
            order.sort(&mut model.cells);
        }
        // What failed once may have been measured later.
        for failure in &set.failures {
            let measured = set
                .samples
                .iter()
                .any(|s| s.cell == failure.cell && s.side == failure.side);
            if !measured && !model.failures.contains(failure) {
                model.failures.push(failure.clone());
            }
        }
        model.notes = notes(set, &model.cells);
        model.breakdowns = set.samples.iter().filter_map(broken).collect();
        // A run that went on may have taken one of a cell that others were of before: those of a cell stand together.
        let place = |broken: &Broken| model.cells.iter().position(|c| c.name == broken.group);
        model.breakdowns.sort_by_key(place);
        model
    }

    /// With breakdowns that were measured for themselves.
    pub fn with(mut self, answers: Vec<Answer>) -> Self {
        let all = answers.into_iter().map(|answer| Broken {
            group: answer.title(),
            name: answer.subject,
            breakdown: answer.breakdown,
        });
        self.breakdowns.extend(all);
        self
    }

    /// The metrics of all sides that have values.
    pub fn has(&self, metric: Metric) -> bool {
        let mut sides = self.cells.iter().flat_map(|cell| &cell.sides);
        sides.any(|side| side.figures.contains_key(&metric))
    }
}

/// Places of cells and their sides in an experiment. A run that went on, with other cells or after failures, took its samples in another
/// order.
struct Order(BTreeMap<String, (usize, BTreeMap<String, usize>)>);

impl Order {
    fn of(experiment: &Experiment) -> Self {
        let place = |(n, cell): (usize, &experiment::Cell)| {
            let sides = cell.sides.iter().enumerate();
            let sides = sides.map(|(n, side)| (side.name.clone(), n));
            (cell.name.clone(), (n, sides.collect()))
        };
        Self(experiment.cells.iter().enumerate().map(place).collect())
    }

    /// Those that it does not know come last, as they came.
    fn sort(&self, cells: &mut [Cell]) {
        for cell in &mut *cells {
            let Some((_, sides)) = self.0.get(&cell.name) else {
                continue;
            };
            let place = |side: &Side| sides.get(&side.name).copied();
            cell.sides
                .sort_by_key(|side| place(side).unwrap_or(usize::MAX));
        }
        let place = |cell: &Cell| self.0.get(&cell.name).map(|(n, _)| *n);
        cells.sort_by_key(|cell| place(cell).unwrap_or(usize::MAX));
    }
}

fn broken(sample: &Sample) -> Option<Broken> {
    Some(Broken {
        group: sample.cell.clone(),
        name: label(sample),
        breakdown: sample.breakdown.clone()?,
    })
}

/// Noisy sides that are named one by one.
const NOISY_MAX: usize = 6;

fn notes(set: &Set, cells: &[Cell]) -> Vec<String> {
    let mut notes = restless(set.samples.iter().map(|s| &s.metrics));
    let mut noisy = Vec::new();
    let sides: usize = cells.iter().map(|cell| cell.sides.len()).sum();
    for cell in cells {
        for side in &cell.sides {
            let values: Vec<f64> = set
                .samples
                .iter()
                .filter(|s| s.cell == cell.name && label(s) == side.name)
                .filter_map(|s| s.metric(Metric::Iops))
                .collect();
            let name = format!("{}, {}", cell.name, side.name);
            noisy.extend(noise(&name, Metric::Iops, &values));
        }
    }
    match noisy.len() {
        0..=NOISY_MAX => notes.extend(noisy),
        many => notes.push(format!(
            "noisy: in {many} of {sides} places the IOPS of the rounds lie more than {:.0} % of their median apart",
            NOISY * 100.0
        )),
    }
    // What is so in several cells is said once.
    let mut said: Vec<(&str, Vec<&str>)> = Vec::new();
    for cell in &set.cells {
        let name = cell["cell"].as_str().unwrap_or_default();
        for note in cell["notes"].as_array().into_iter().flatten() {
            let note = note.as_str().unwrap_or_default();
            match said.iter_mut().find(|(other, _)| *other == note) {
                Some((_, cells)) if cells.contains(&name) => {}
                Some((_, cells)) => cells.push(name),
                None => said.push((note, vec![name])),
            }
        }
    }
    let line = |(note, cells): (&str, Vec<&str>)| format!("{}: {note}", cells.join(", "));
    notes.extend(said.into_iter().map(line));
    notes
}

fn label(sample: &Sample) -> String {
    // Experiments have a side for each engine; comparisons tell them apart by it.
    match sample.engine.as_str() {
        "auto" | "" => sample.side.clone(),
        _ if !sample.axes.is_empty() => sample.side.clone(),
        engine => format!("{} ({engine})", sample.side),
    }
}

/// Whether a name of a record is of a picture that a run made there, and leads nowhere else.
fn is_beside(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.strip_prefix("flame/")
        .is_some_and(|name| name.ends_with(".svg") && name.chars().all(plain))
}

/// Who is equal in a cell: in an experiment, which may have been interrupted before it said so, by what was seen of each side last;
/// in a comparison as it says, since what must be equal there depends on the cell.
fn equal(set: &Set, cell: &str) -> Vec<String> {
    let own = set.cells.iter().filter(|record| record["cell"] == cell);
    let mut said = own.filter_map(|record| record["equal"].as_str());
    if let Some(line) = said.next_back() {
        return vec![line.to_owned()];
    }
    if set
        .runs
        .first()
        .is_some_and(|run| run.experiment == "versus")
    {
        return Vec::new();
    }
    let mut seen: Vec<(&str, &Seen)> = Vec::new();
    for sample in set.samples.iter().filter(|sample| sample.cell == cell) {
        let Some(own) = &sample.seen else { continue };
        match seen.iter_mut().find(|(side, _)| *side == sample.side) {
            Some((_, last)) => *last = own,
            None => seen.push((&sample.side, own)),
        }
    }
    equal::lines(&seen)
}

fn cells(set: &Set) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    let mut samples: BTreeMap<(usize, usize), Vec<&Sample>> = BTreeMap::new();
    for sample in &set.samples {
        let at = cells.iter().position(|cell| cell.name == sample.cell);
        let at = at.unwrap_or_else(|| {
            cells.push(Cell {
                name: sample.cell.clone(),
                axes: sample.axes.clone(),
                equal: equal(set, &sample.cell),
                sides: Vec::new(),
            });
            cells.len() - 1
        });
        let name = label(sample);
        let sides = &mut cells[at].sides;
        let side = sides.iter().position(|side| side.name == name);
        let side = side.unwrap_or_else(|| {
            sides.push(Side {
                name,
                ..Side::default()
            });
            sides.len() - 1
        });
        samples.entry((at, side)).or_default().push(sample);
    }
    for ((cell, side), samples) in samples {
        let side = &mut cells[cell].sides[side];
        let mut values: BTreeMap<Metric, Vec<f64>> = BTreeMap::new();
        for sample in &samples {
            for (metric, value) in &sample.metrics {
                values.entry(*metric).or_default().push(*value);
            }
            side.latency.merge(&sample.latency);
            if let Some(name) = sample.flamegraph.as_ref().filter(|name| is_beside(name)) {
                side.flamegraph = Some(name.clone());
            }
            let own = sample.interrupts.iter().map(|(s, n)| (s.clone(), n));
            let of_guest = sample.guest_interrupts.iter();
            let of_guest = of_guest.map(|(source, n)| (format!("guest: {source}"), n));
            for (source, n) in own.chain(of_guest) {
                *side.interrupts.entry(source).or_default() += n / samples.len() as f64;
            }
            for (operation, stages) in &sample.stages {
                side.stages
                    .entry(operation.clone())
                    .or_default()
                    .add(stages);
            }
        }
        side.figures = values
            .into_iter()
            .filter_map(|(metric, values)| {
                let summary = Summary::of(&values)?;
                let figure = Figure::of(&values)?;
                Some((
                    metric,
                    Drawn {
                        figure,
                        mean: summary.mean,
                        deviation: summary.deviation,
                    },
                ))
            })
            .collect();
        let mut order: Vec<&&Sample> = samples.iter().collect();
        let iops = |sample: &Sample| sample.metric(Metric::Iops).unwrap_or_default();
        order.sort_by(|a, b| iops(a).total_cmp(&iops(b)));
        let middle = order.get(order.len() / 2);
        side.timeline = middle.map_or_else(timeline::Stored::default, |s| s.timeline.clone());
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_the_order_of_its_experiment_however_often_the_run_went_on() {
        let sample = |cell: &str, side: &str| Sample {
            cell: cell.to_owned(),
            side: side.to_owned(),
            axes: vec![("load".to_owned(), "read".to_owned())],
            metrics: [(Metric::Iops, 1.0)].into(),
            ..Sample::default()
        };
        let set = Set {
            runs: vec![Run {
                experiment: "E3".to_owned(),
                ..Run::default()
            }],
            samples: vec![
                sample("of another build", "b"),
                sample("queues", "diskplane, 1 queue"),
                sample("read-64k", "qsd raw"),
                sample("read-4k", "a side of another build"),
                sample("read-4k", "qsd raw"),
                sample("read-64k", "bare metal"),
                sample("read-4k", "diskplane raw"),
                sample("read-4k", "bare metal"),
            ],
            ..Set::default()
        };
        let model = Model::of(&set);
        let shown = model.cells.iter().map(|cell| {
            let sides: Vec<&str> = cell.sides.iter().map(|side| &side.name[..]).collect();
            (&cell.name[..], sides)
        });
        let expected = [
            (
                "read-4k",
                vec![
                    "bare metal",
                    "diskplane raw",
                    "qsd raw",
                    "a side of another build",
                ],
            ),
            ("read-64k", vec!["bare metal", "qsd raw"]),
            ("queues", vec!["diskplane, 1 queue"]),
            ("of another build", vec!["b"]),
        ];
        assert_eq!(shown.collect::<Vec<_>>(), expected);
    }
}
