//! Two runs side by side: what got faster or slower, and how sure that is.
//!
//! The runs were taken at different times, so nothing pairs their samples: the figure is the ratio of the medians, and its
//! interval draws both series again. A change is *sure* where the whole 95 % interval lies on one side of 1 and there are
//! enough samples for an interval to mean anything; the machine's drift between the runs is in no interval, which is why
//! a cell's sides that nobody changed (peers, bare metal) belong into both runs: what they drifted stands beside the rest.

use crate::{
    metric::{Metric, number},
    record::{Set, noise, restless},
    statistics::{Figure, Summary, ratio_of_medians},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

/// Samples of each run below which no change is sure.
const SAMPLES_MIN: usize = 3;

/// What became of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// The whole interval is on the better side.
    Better,
    /// The whole interval is on the worse side.
    Worse,
    /// The interval has both sides.
    NotShown,
    /// A run has too few samples to say.
    TooFewSamples,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::NotShown => "no change shown",
            Self::TooFewSamples => "too few samples",
        })
    }
}

/// One figure of one side of a cell in both runs.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// The cell's name.
    pub cell: String,
    /// The side's, with its engine where it has several.
    pub side: String,
    /// The figure.
    pub metric: Metric,
    /// Its samples in the first run.
    pub before: Summary,
    /// Its samples in the second.
    pub after: Summary,
    /// Second to first.
    pub ratio: Figure,
    /// What that says.
    pub change: Change,
}

/// Two runs compared.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Comparison {
    /// In the order of the first run.
    pub lines: Vec<Line>,
    /// What only one of them has.
    pub missing: Vec<String>,
    /// Why figures may differ besides: other machines, noise.
    pub notes: Vec<String>,
}

type Key = (String, String, String);

/// Compares `metrics` (all that judge, where empty) of the sides that both runs have.
pub fn compare(before: &Set, after: &Set, metrics: &[Metric]) -> Comparison {
    let mut comparison = Comparison {
        notes: surroundings(before, after),
        ..Comparison::default()
    };
    let (first, second) = (series(before), series(after));
    for (name, of, other) in [("A", &first, &second), ("B", &second, &first)] {
        let there: BTreeSet<&Key> = other.iter().map(|(key, _)| key).collect();
        for (key, _) in of.iter().filter(|(key, _)| !there.contains(key)) {
            let (cell, side, engine) = key;
            let text = format!("only {name} has {cell}, {side} ({engine})");
            comparison.missing.push(text);
        }
    }
    let second: BTreeMap<Key, Values> = second.into_iter().collect();
    for (key, values) in first {
        let Some(others) = second.get(&key) else {
            continue;
        };
        let (cell, side, engine) = key;
        let side = match engine.as_str() {
            "auto" | "" => side,
            engine => format!("{side} ({engine})"),
        };
        for (metric, of) in values {
            let wanted = match metrics {
                [] => metric.judges(),
                some => some.contains(&metric),
            };
            let Some(to) = others.get(&metric).filter(|_| wanted) else {
                continue;
            };
            for (run, values) in [("A", &of), ("B", to)] {
                if metric == Metric::Iops {
                    let name = format!("{cell}, {side} in {run}");
                    comparison.notes.extend(noise(&name, metric, values));
                }
            }
            let (Some(before), Some(after), Some(ratio)) =
                (Summary::of(&of), Summary::of(to), ratio_of_medians(to, &of))
            else {
                continue;
            };
            comparison.lines.push(Line {
                cell: cell.clone(),
                side: side.clone(),
                metric,
                before,
                after,
                ratio,
                change: change(metric, &ratio),
            });
        }
    }
    comparison
}

fn change(metric: Metric, ratio: &Figure) -> Change {
    let (better, worse) = match metric.more_is_better() {
        true => (ratio.low > 1.0, ratio.high < 1.0),
        false => (ratio.high < 1.0, ratio.low > 1.0),
    };
    match (better, worse) {
        _ if ratio.rounds < SAMPLES_MIN => Change::TooFewSamples,
        (true, _) => Change::Better,
        (_, true) => Change::Worse,
        _ => Change::NotShown,
    }
}

type Values = BTreeMap<Metric, Vec<f64>>;

/// The values of each figure, by side, in the order in which sides first came.
fn series(set: &Set) -> Vec<(Key, Values)> {
    let mut order: Vec<(Key, Values)> = Vec::new();
    let mut places: BTreeMap<Key, usize> = BTreeMap::new();
    for sample in &set.samples {
        let key = (
            sample.cell.clone(),
            sample.side.clone(),
            sample.engine.clone(),
        );
        let place = *places.entry(key).or_insert_with_key(|key| {
            order.push((key.clone(), Values::new()));
            order.len() - 1
        });
        for (metric, value) in &sample.metrics {
            let values = &mut order[place].1;
            values.entry(*metric).or_default().push(*value);
        }
    }
    order
}

/// What differs around the runs.
fn surroundings(before: &Set, after: &Set) -> Vec<String> {
    let mut notes = Vec::new();
    let (Some(a), Some(b)) = (before.runs.first(), after.runs.first()) else {
        notes.push("a run does not say where it was made".to_owned());
        return notes;
    };
    let or = |version: &Option<String>| version.clone().unwrap_or_else(|| "none".to_owned());
    let pairs = [
        ("kernel", a.host.kernel.clone(), b.host.kernel.clone()),
        ("CPU", a.host.cpu.clone(), b.host.cpu.clone()),
        ("cores", a.host.cores.to_string(), b.host.cores.to_string()),
        (
            "file system",
            a.host.file_system.clone(),
            b.host.file_system.clone(),
        ),
        ("device", a.host.device.clone(), b.host.device.clone()),
        (
            "diskplane",
            a.host.diskplane.clone(),
            b.host.diskplane.clone(),
        ),
        (
            "qemu-storage-daemon",
            or(&a.host.qemu_storage_daemon),
            or(&b.host.qemu_storage_daemon),
        ),
        ("fio", or(&a.host.fio), or(&b.host.fio)),
        (
            "seconds of a sample",
            a.duration_s.to_string(),
            b.duration_s.to_string(),
        ),
        ("sizes", a.sizes.to_string(), b.sizes.to_string()),
    ];
    for (what, a, b) in pairs.into_iter().filter(|(_, a, b)| a != b) {
        notes.push(format!("another {what}: {a} in A, {b} in B"));
    }
    for (run, set) in [("A", before), ("B", after)] {
        let busy = restless(set.samples.iter().map(|s| &s.metrics));
        notes.extend(busy.into_iter().map(|note| format!("in {run}, {note}")));
    }
    notes
}

/// For people: changes, the sure ones alone unless `all`, and what else there is to know.
pub fn text(comparison: &Comparison, all: bool) -> String {
    let sure = |line: &&Line| matches!(line.change, Change::Better | Change::Worse);
    let shown: Vec<&Line> = comparison
        .lines
        .iter()
        .filter(|line| all || sure(line))
        .collect();
    let mut text = String::new();
    if !shown.is_empty() {
        let _ = writeln!(
            text,
            "{:<28} {:<24} {:<18} {:>9} {:>9}  {:<24} change",
            "cell", "side", "figure", "A", "B", "B to A (95 %)"
        );
    }
    for line in &shown {
        let Figure {
            median, low, high, ..
        } = line.ratio;
        let ratio = format!("{median:.2} × ({low:.2}–{high:.2})");
        let _ = writeln!(
            text,
            "{:<28} {:<24} {:<18} {:>9} {:>9}  {ratio:<24} {}",
            line.cell,
            line.side,
            line.metric.title(),
            number(line.metric, line.before.median),
            number(line.metric, line.after.median),
            line.change
        );
    }
    let count = |change: Change| {
        comparison
            .lines
            .iter()
            .filter(|l| l.change == change)
            .count()
    };
    let _ = writeln!(
        text,
        "{} figures: {} better, {} worse, {} without a change that shows, {} with too few samples",
        comparison.lines.len(),
        count(Change::Better),
        count(Change::Worse),
        count(Change::NotShown),
        count(Change::TooFewSamples)
    );
    for note in comparison.missing.iter().chain(&comparison.notes) {
        let _ = writeln!(text, "· {note}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Run, Sample};

    fn set(kernel: &str, sides: &[(&str, &[f64], f64)]) -> Set {
        let mut set = Set {
            runs: vec![Run::default()],
            ..Set::default()
        };
        set.runs[0].host.kernel = kernel.to_owned();
        for (side, iops, us) in sides {
            for (round, iops) in iops.iter().enumerate() {
                set.samples.push(Sample {
                    cell: "c".to_owned(),
                    side: (*side).to_owned(),
                    engine: "auto".to_owned(),
                    round,
                    metrics: [
                        (Metric::Iops, *iops),
                        (Metric::P50Us, *us),
                        (Metric::OthersPercent, 1.0),
                    ]
                    .into(),
                    ..Sample::default()
                });
            }
        }
        set
    }

    #[test]
    fn what_changed_is_told_and_what_did_not_is_not() {
        let before = set(
            "6.1",
            &[
                ("ours", &[100.0, 101.0, 99.0, 100.0], 10.0),
                ("peer", &[50.0, 51.0, 49.0, 50.0], 20.0),
                ("gone", &[1.0], 1.0),
            ],
        );
        let after = set(
            "6.2",
            &[
                ("ours", &[150.0, 152.0, 149.0, 150.0], 12.0),
                ("peer", &[50.0, 49.5, 51.0, 50.5], 20.0),
            ],
        );
        let comparison = compare(&before, &after, &[]);
        let told: Vec<_> = comparison
            .lines
            .iter()
            .map(|l| (&l.side[..], l.metric, l.change))
            .collect();
        assert_eq!(
            told,
            [
                ("ours", Metric::Iops, Change::Better),
                // More microseconds are worse.
                ("ours", Metric::P50Us, Change::Worse),
                ("peer", Metric::Iops, Change::NotShown),
                ("peer", Metric::P50Us, Change::NotShown),
            ]
        );
        assert_eq!(comparison.lines[0].ratio.median, 1.5);
        assert_eq!(comparison.missing, ["only A has c, gone (auto)"]);
        assert_eq!(comparison.notes, ["another kernel: 6.1 in A, 6.2 in B"]);
        let short = text(&comparison, false);
        assert_eq!(short.lines().count(), 1 + 2 + 1 + 2, "{short}");
        assert!(short.contains("1.50 × (1."), "{short}");
        assert_eq!(text(&comparison, true).lines().count(), 1 + 4 + 1 + 2);
        let one = compare(&before, &after, &[Metric::P50Us]);
        assert_eq!(one.lines.len(), 2);
    }

    #[test]
    fn two_samples_are_no_proof() {
        let before = set("k", &[("s", &[100.0, 100.0], 1.0)]);
        let after = set("k", &[("s", &[900.0, 900.0], 1.0)]);
        let comparison = compare(&before, &after, &[Metric::Iops]);
        assert_eq!(comparison.lines[0].change, Change::TooFewSamples);
    }
}
