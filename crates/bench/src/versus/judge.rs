//! From the samples of a cell to its verdicts.

use super::{
    cell::{Against, Bar, Cell, Limit, Metric, Server},
    statistics::{Figure, Summary, median, ratios},
};
use crate::record;
use serde::Serialize;

pub use crate::metric::Metrics;

/// The samples of one side with one engine, a place per round.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Series {
    /// Index of the side in its cell.
    pub side: usize,
    /// Its I/O engine; `auto` where there is no choice.
    pub engine: &'static str,
    /// What each round said; none where it was not measured.
    pub rounds: Vec<Option<Metrics>>,
    /// It was so much slower than another engine of its side that later rounds left it out.
    pub set_aside: bool,
    /// Why it could not be measured.
    pub failed: Option<String>,
}

impl Series {
    /// The values of one figure, of the rounds that have it.
    pub fn values(&self, metric: Metric) -> Vec<f64> {
        let rounds = self.rounds.iter().flatten();
        rounds.filter_map(|m| m.get(&metric).copied()).collect()
    }

    /// Whether later rounds measure it.
    pub fn goes_on(&self) -> bool {
        !self.set_aside && self.failed.is_none()
    }
}

/// How a figure stands to its bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The whole interval keeps the bar.
    Reached,
    /// The whole interval misses it.
    NotReached,
    /// The interval lies on both sides of it.
    Undecided,
    /// There is nothing to compare with.
    PeerMissing,
    /// The host has too few cores for the bar to mean anything.
    HostTooSmall,
    /// There is no bar.
    Shown,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Reached => "reached",
            Self::NotReached => "not reached",
            Self::Undecided => "undecided",
            Self::PeerMissing => "peer missing",
            Self::HostTooSmall => "too few cores",
            Self::Shown => "",
        })
    }
}

/// One line of a cell's result.
#[derive(Clone, Debug, Serialize)]
pub struct Judgement {
    /// The figure.
    pub metric: Metric,
    /// What it is held against.
    pub against: Against,
    /// Name and engine of the other side, if there is one.
    pub beside: Option<String>,
    /// The bound.
    pub limit: Limit,
    /// The first side's samples.
    pub ours: Option<Summary>,
    /// The other side's.
    pub theirs: Option<Summary>,
    /// The ratio, the difference or the figure itself, that the bar is about.
    pub figure: Option<Figure>,
    /// How that stands to the bar.
    pub verdict: Verdict,
    /// Why there is no figure.
    pub why: Option<String>,
}

/// The result of a cell.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Its name.
    pub cell: &'static str,
    /// Line for line.
    pub judgements: Vec<Judgement>,
    /// Why there are none.
    pub failed: Option<String>,
    /// What the reader has to know: differences between the sides, noise, engines that failed.
    pub notes: Vec<String>,
    /// Whether the sides were seen to be equal: same files, `O_DIRECT` on both.
    pub equal: Option<String>,
}

/// The figure that says which engine of a side is the best.
pub fn primary(cell: &Cell, side: usize) -> Metric {
    let name = cell.sides[side].name;
    let of_side = cell.bars.iter().find_map(|bar| match bar.against {
        Against::Side(other) if other == name => Some(bar.metric),
        Against::Other(other, metric) if other == name => Some(metric),
        _ => None,
    });
    // A peer is at its best where it is fastest; CPU is then compared with that engine's.
    match of_side {
        Some(Metric::P50Us | Metric::P99Us) => Metric::P50Us,
        Some(metric @ (Metric::Pairs | Metric::Runs)) => metric,
        _ => Metric::Iops,
    }
}

/// Which of a side's engines is the best so far; none where no one was measured.
pub fn best<'a>(cell: &Cell, series: &'a [Series], side: usize) -> Option<&'a Series> {
    let metric = primary(cell, side);
    let own = series.iter().filter(|s| s.side == side && !s.set_aside);
    let measured: Vec<_> = own
        .filter(|s| s.failed.is_none())
        .filter_map(|s| Some((s, median(&s.values(metric)).or(any_figure(s))?)))
        .collect();
    let better = |a: &f64, b: &f64| {
        if metric.more_is_better() {
            a.total_cmp(b)
        } else {
            b.total_cmp(a)
        }
    };
    let best = measured.into_iter().max_by(|a, b| better(&a.1, &b.1));
    best.map(|(series, _)| series)
}

/// A side without the primary figure (one that rests) has others.
fn any_figure(series: &Series) -> Option<f64> {
    series.rounds.iter().flatten().next().map(|_| 0.0)
}

/// Judges all bars of a cell. `cores` is what the host has.
pub fn judge(cell: &Cell, series: &[Series], cores: usize) -> Outcome {
    let mut outcome = Outcome {
        cell: cell.name,
        ..Outcome::default()
    };
    for bar in cell.bars {
        outcome.judgements.push(judge_bar(cell, series, bar, cores));
    }
    for one in series {
        let name = label(cell, one);
        if let Some(why) = &one.failed {
            outcome.notes.push(format!("{name}: {why}"));
        }
        let metric = primary(cell, one.side);
        if !one.set_aside {
            let noise = record::noise(&name, metric, &one.values(metric));
            outcome.notes.extend(noise);
        }
    }
    let samples = series.iter().flat_map(|s| s.rounds.iter().flatten());
    outcome.notes.extend(record::restless(samples));
    outcome
}

/// `qsd (io_uring)`, or just the side's name.
pub fn label(cell: &Cell, series: &Series) -> String {
    let side = &cell.sides[series.side];
    match side.server {
        Server::Qsd | Server::QemuNbd | Server::QemuImg if series.engine != "auto" => {
            format!("{} ({})", side.name, series.engine)
        }
        _ => side.name.to_owned(),
    }
}

fn judge_bar(cell: &Cell, series: &[Series], bar: &Bar, cores: usize) -> Judgement {
    let mut judgement = Judgement {
        metric: bar.metric,
        against: bar.against,
        beside: None,
        limit: bar.limit,
        ours: None,
        theirs: None,
        figure: None,
        verdict: Verdict::PeerMissing,
        why: None,
    };
    let Some(first) = best(cell, series, 0) else {
        judgement.why = Some("not measured".to_owned());
        return judgement;
    };
    judgement.ours = Summary::of(&first.values(bar.metric));
    let (name, metric) = match bar.against {
        Against::Side(name) | Against::Above(name) => (name, bar.metric),
        Against::Other(name, metric) => (name, metric),
        Against::Alone => {
            judgement.figure = Figure::of(&first.values(bar.metric));
            judgement.verdict = verdict(bar.limit, judgement.figure, cell.cores > cores);
            return judgement;
        }
    };
    let side = cell.sides.iter().position(|side| side.name == name);
    let Some(other) = side.and_then(|side| best(cell, series, side)) else {
        let failed = series
            .iter()
            .filter(|s| Some(s.side) == side)
            .find_map(|s| s.failed.clone());
        judgement.beside = Some(name.to_owned());
        judgement.why = failed;
        return judgement;
    };
    judgement.beside = Some(label(cell, other));
    judgement.theirs = Summary::of(&other.values(metric));
    // Round by round, of the rounds that have both.
    let pairs = first.rounds.iter().zip(&other.rounds);
    let (ours, theirs): (Vec<f64>, Vec<f64>) = pairs
        .filter_map(|(a, b)| Some((*a.as_ref()?.get(&bar.metric)?, *b.as_ref()?.get(&metric)?)))
        .unzip();
    let rounds = match bar.against {
        Against::Above(_) => ours.iter().zip(&theirs).map(|(a, b)| a - b).collect(),
        _ => ratios(&ours, &theirs),
    };
    judgement.figure = Figure::of(&rounds);
    judgement.verdict = verdict(bar.limit, judgement.figure, cell.cores > cores);
    judgement
}

fn verdict(limit: Limit, figure: Option<Figure>, host_too_small: bool) -> Verdict {
    let Some(Figure {
        rounds, low, high, ..
    }) = figure
    else {
        return Verdict::PeerMissing;
    };
    let (kept, missed) = match limit {
        Limit::AtLeast(bound) => (low >= bound, high < bound),
        Limit::AtMost(bound) => (high <= bound, low > bound),
        Limit::Below(bound) => (high < bound, low >= bound),
        Limit::Shown | Limit::Unequal(_) => return Verdict::Shown,
    };
    // One round has no interval.
    let (kept, missed) = (kept && rounds > 1, missed && rounds > 1);
    match (kept, missed) {
        (true, _) => Verdict::Reached,
        _ if host_too_small => Verdict::HostTooSmall,
        (_, true) => Verdict::NotReached,
        _ => Verdict::Undecided,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::versus::cell::{Image, RANDREAD, Side, at_least, at_most, side};

    const SIDES: &[Side] = &[
        side("diskplane", Server::Diskplane, Image::Raw),
        side("qsd", Server::Qsd, Image::Raw),
    ];
    const CELL: Cell = Cell {
        name: "test",
        line: "",
        meaning: "",
        load: RANDREAD,
        sides: SIDES,
        bars: &[
            at_least(Metric::Iops, "qsd", 1.2),
            at_most(Metric::CpuUs, "qsd", 0.65),
        ],
        cores: 2,
    };

    fn series(side: usize, engine: &'static str, iops: &[f64], cpu: f64) -> Series {
        Series {
            side,
            engine,
            rounds: iops
                .iter()
                .map(|iops| Some(Metrics::from([(Metric::Iops, *iops), (Metric::CpuUs, cpu)])))
                .collect(),
            ..Series::default()
        }
    }

    #[test]
    fn the_best_engine_of_a_peer_counts() {
        let all = [
            series(0, "auto", &[130.0, 135.0, 128.0, 131.0, 129.0, 132.0], 5.0),
            series(
                1,
                "io_uring",
                &[100.0, 102.0, 99.0, 101.0, 99.0, 100.0],
                10.0,
            ),
            series(1, "native", &[80.0, 81.0, 79.0, 80.0, 80.0, 80.0], 2.0),
        ];
        let outcome = judge(&CELL, &all, 2);
        let [iops, cpu] = &outcome.judgements[..] else {
            panic!()
        };
        assert_eq!(iops.beside.as_deref(), Some("qsd (io_uring)"));
        assert_eq!(iops.verdict, Verdict::Reached);
        // Its CPU is that of the engine that is fastest, not that of the cheapest.
        assert_eq!(cpu.figure.unwrap().median, 0.5);
        assert!(outcome.notes.is_empty(), "{outcome:?}");
        // One that was set aside counts no more, one that failed is told.
        let mut other = all.clone();
        other[1].set_aside = true;
        other[2].failed = Some("no AIO".to_owned());
        let outcome = judge(&CELL, &other, 2);
        assert_eq!(outcome.judgements[0].verdict, Verdict::PeerMissing);
        assert_eq!(outcome.notes, ["qsd (native): no AIO"]);
    }

    #[test]
    fn verdicts() {
        let figure = |low, high| {
            Some(Figure {
                rounds: 5,
                median: (low + high) / 2.0,
                low,
                high,
                min: low,
                max: high,
            })
        };
        use Limit::{AtLeast, AtMost, Below, Shown};
        for (limit, low, high, expected) in [
            (AtLeast(1.2), 1.2, 1.5, Verdict::Reached),
            (AtLeast(1.2), 1.0, 1.19, Verdict::NotReached),
            (AtLeast(1.2), 1.1, 1.3, Verdict::Undecided),
            (AtMost(0.65), 0.5, 0.65, Verdict::Reached),
            (AtMost(0.65), 0.66, 0.7, Verdict::NotReached),
            (AtMost(0.65), 0.6, 0.7, Verdict::Undecided),
            (Below(0.5), 0.4, 0.5, Verdict::Undecided),
            (Below(0.5), 0.5, 0.6, Verdict::NotReached),
            (Below(0.5), 0.1, 0.49, Verdict::Reached),
            (Shown, 0.1, 9.0, Verdict::Shown),
        ] {
            assert_eq!(
                verdict(limit, figure(low, high), false),
                expected,
                "{limit:?} {low} {high}"
            );
        }
        assert_eq!(verdict(AtLeast(1.0), None, false), Verdict::PeerMissing);
        assert_eq!(
            verdict(AtLeast(1.6), figure(1.0, 1.1), true),
            Verdict::HostTooSmall
        );
        assert_eq!(
            verdict(AtLeast(1.6), figure(1.7, 1.8), true),
            Verdict::Reached
        );
    }

    #[test]
    fn noise_and_differences_are_told() {
        let all = [
            series(0, "auto", &[100.0, 150.0, 60.0], 5.0),
            series(1, "native", &[100.0, 100.0, 100.0], 10.0),
        ];
        let outcome = judge(&CELL, &all, 2);
        assert_eq!(outcome.notes.len(), 1, "{outcome:?}");
        assert!(outcome.notes[0].starts_with("noisy: the IOPS of diskplane"));
        assert_eq!(outcome.judgements[0].verdict, Verdict::Undecided);
        let mut busy = [series(0, "auto", &[100.0], 5.0)];
        if let Some(Some(metrics)) = busy[0].rounds.first_mut() {
            metrics.insert(Metric::OthersPercent, 80.0);
        }
        let outcome = judge(&CELL, &busy, 2);
        assert!(outcome.notes[0].contains("up to 80 % of a core during 1 samples"));
    }

    #[test]
    fn memory_is_a_difference() {
        const MEMORY: Cell = Cell {
            bars: &[Bar {
                metric: Metric::MemoryMib,
                against: Against::Above("qsd"),
                limit: Limit::AtMost(64.0),
            }],
            ..CELL
        };
        // One round has no interval, and decides nothing.
        for (rounds, verdict) in [(2, Verdict::Reached), (1, Verdict::Undecided)] {
            let mib = |side, mib: f64| Series {
                side,
                engine: "auto",
                rounds: vec![Some(Metrics::from([(Metric::MemoryMib, mib)])); rounds],
                ..Series::default()
            };
            let outcome = judge(&MEMORY, &[mib(0, 70.0), mib(1, 10.0)], 2);
            assert_eq!(outcome.judgements[0].figure.unwrap().median, 60.0);
            assert_eq!(outcome.judgements[0].verdict, verdict);
        }
    }
}
