//! Published findings beside ours.

use super::plan::{Claim, Experiment, Finding, Term};
use crate::{
    record::{Sample, Set},
    statistics::{Figure, ratio_of_medians},
};
use serde::Serialize;
use std::collections::BTreeMap;

/// How a finding stands here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The whole interval is on the document's side.
    Reproduced,
    /// The whole interval is on the other side.
    Reversed,
    /// The interval is on both, or there are too few samples.
    Undecided,
    /// It was not measured here.
    NotMeasured,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Reproduced => "reproduced",
            Self::Reversed => "reversed",
            Self::Undecided => "undecided",
            Self::NotMeasured => "not measured",
        })
    }
}

/// Two terms that differ by no more than this part, and of which one is said to be ahead, are the same here.
const SAME: f64 = 0.02;

/// Rounds below which nothing is decided.
const ROUNDS_MIN: usize = 3;

/// A finding, judged.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    /// What was published.
    #[serde(flatten)]
    pub finding: Finding,
    /// The first term by the second here.
    pub ours: Option<Figure>,
    /// What that says.
    pub verdict: Verdict,
    /// Why.
    pub why: String,
    /// It is of a cell that a quick run leaves out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub left_out: bool,
}

impl Judged {
    /// Whether more rounds may decide it: it is undecided, and not since both sides are the same.
    pub fn may_be_decided(&self) -> bool {
        let same = |ours: Figure| ours.low > 1.0 - SAME && ours.high < 1.0 + SAME;
        self.verdict == Verdict::Undecided && !self.ours.is_some_and(same)
    }
}

/// How many findings are of cells that a quick run leaves out, in words.
pub fn left_out_words(count: usize) -> String {
    match count {
        1 => "1 finding is of a cell that a quick run leaves out (--full, or --cells)".to_owned(),
        n => format!("{n} findings are of cells that a quick run leaves out (--full, or --cells)"),
    }
}

/// Judges an experiment's findings by the samples of a run.
pub fn judge(experiment: &Experiment, set: &Set) -> Vec<Judged> {
    let with_hint = |finding: &Finding| {
        let mut judged = one(finding, set);
        if let Some(cell) = left_out(experiment, finding, set) {
            judged.left_out = true;
            judged.why += &format!(": it is one of --full, or --cells {cell}");
        }
        judged
    };
    experiment.findings.iter().map(with_hint).collect()
}

/// The cell that no run measured, since it was a quick one.
fn left_out<'a>(experiment: &Experiment, finding: &'a Finding, set: &Set) -> Option<&'a str> {
    let terms = [Some(&finding.left), finding.right.as_ref()];
    let quick = set.runs.iter().all(|run| run.quick);
    let lacking = terms.into_iter().flatten().find(|term| {
        let mut cells = experiment.cells.iter();
        let of_full = cells.any(|cell| cell.name == term.cell && !cell.quick);
        quick && of_full && !set.samples.iter().any(|s| s.cell == term.cell)
    });
    lacking.map(|term| term.cell.as_str())
}

fn one(finding: &Finding, set: &Set) -> Judged {
    let left = values(&finding.left, set);
    let right = finding.right.as_ref().map(|term| values(term, set));
    let missing = |term: &Term| match failure(set, term) {
        Some(why) => format!("{} of {}: {why}", term.side, term.cell),
        None => format!(
            "{} of {} was not measured in this run",
            term.side, term.cell
        ),
    };
    let judged = |ours, verdict, why: String| Judged {
        finding: finding.clone(),
        ours,
        verdict,
        why,
        left_out: false,
    };
    if left.is_empty() {
        return judged(None, Verdict::NotMeasured, missing(&finding.left));
    }
    let (ours, paired) = match (&finding.right, &right) {
        (Some(term), Some(right)) if right.is_empty() => {
            return judged(None, Verdict::NotMeasured, missing(term));
        }
        (Some(term), Some(right)) if term.cell == finding.left.cell => {
            let rounds: Vec<f64> = left
                .iter()
                .filter_map(|(round, value)| {
                    let by = right.get(round).filter(|by| **by > 0.0)?;
                    Some(value / by)
                })
                .collect();
            (Figure::of(&rounds), true)
        }
        (_, Some(right)) => {
            let of = |values: &BTreeMap<usize, f64>| values.values().copied().collect::<Vec<_>>();
            (ratio_of_medians(&of(&left), &of(right)), false)
        }
        _ => {
            let rounds: Vec<f64> = left.values().copied().collect();
            (Figure::of(&rounds), true)
        }
    };
    let Some(figure) = ours else {
        let why = "no round has both".to_owned();
        return judged(None, Verdict::NotMeasured, why);
    };
    let (holds, fails) = match finding.claim {
        Claim::More => (figure.low > 1.0, figure.high < 1.0),
        Claim::Less => (figure.high < 1.0, figure.low > 1.0),
        Claim::NotLess(part) => (figure.low >= 1.0 - part, figure.high < 1.0 - part),
        Claim::Equal(part) => {
            let (least, most) = (1.0 - part, 1.0 + part);
            (
                figure.low >= least && figure.high <= most,
                figure.high < least || figure.low > most,
            )
        }
    };
    let interval = format!(
        "{:.2} × the {} ({}–{}) in {} round{}{}",
        figure.median,
        finding.left.metric.title(),
        bound(figure.low),
        bound(figure.high),
        figure.rounds,
        if figure.rounds == 1 { "" } else { "s" },
        if paired {
            ""
        } else {
            ", of cells that were not taken in turn"
        }
    );
    let (verdict, why) = match (holds, fails) {
        _ if figure.rounds < ROUNDS_MIN => (
            Verdict::Undecided,
            format!(
                "{interval}: {ROUNDS_MIN} are needed to decide, which --full, or --cells of these alone, has time for"
            ),
        ),
        (true, _) => (Verdict::Reproduced, interval),
        (_, true) => (Verdict::Reversed, interval),
        _ if figure.low > 1.0 - SAME && figure.high < 1.0 + SAME => (
            Verdict::Undecided,
            format!("{interval}: here they are the same"),
        ),
        _ => (
            Verdict::Undecided,
            format!("{interval}: the interval has both answers in it"),
        ),
    };
    judged(Some(figure), verdict, why)
}

/// An end of an interval: with as many digits as show on which side of 1 it is.
fn bound(ratio: f64) -> String {
    let digits = (2..=6).find(|digits| {
        let shown = format!("{ratio:.digits$}").parse::<f64>();
        ratio == 1.0 || shown.is_ok_and(|shown| shown != 1.0)
    });
    format!("{ratio:.*}", digits.unwrap_or(6))
}

/// The term's value of each round that has it.
fn values(term: &Term, set: &Set) -> BTreeMap<usize, f64> {
    let of = |side: &str| -> BTreeMap<usize, f64> {
        let own = |sample: &&Sample| sample.cell == term.cell && sample.side == side;
        let samples = set.samples.iter().filter(own);
        samples
            .filter_map(|s| Some((s.round, s.metric(term.metric)?)))
            .collect()
    };
    let values = of(&term.side);
    let Some(over) = &term.over else {
        return values;
    };
    let over = of(over);
    let divided = values.into_iter().filter_map(|(round, value)| {
        let by = over.get(&round).filter(|by| **by > 0.0)?;
        Some((round, value / by))
    });
    divided.collect()
}

fn failure(set: &Set, term: &Term) -> Option<String> {
    let of = |side: &str| {
        let mut failures = set.failures.iter().rev();
        failures
            .find(|f| f.cell == term.cell && f.side == side)
            .map(|f| f.why.clone())
    };
    of(&term.side).or_else(|| of(term.over.as_deref()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        experiment::plan::term,
        metric::Metric,
        record::{Failure, Sample},
    };

    fn set(cells: &[(&str, &str, &[f64])]) -> Set {
        let mut set = Set::default();
        for (cell, side, values) in cells {
            for (round, value) in values.iter().enumerate() {
                set.samples.push(Sample {
                    cell: (*cell).to_owned(),
                    side: (*side).to_owned(),
                    round,
                    metrics: [(Metric::Iops, *value)].into(),
                    ..Sample::default()
                });
            }
        }
        set
    }

    fn finding(claim: Claim, left: Term, right: Option<Term>) -> Finding {
        Finding {
            says: "x".to_owned(),
            left,
            right,
            claim,
            published: None,
        }
    }

    #[test]
    fn orders_are_reproduced_reversed_or_undecided() {
        let set = set(&[
            ("c", "a", &[20.0, 40.0, 10.0]),
            ("c", "b", &[10.0, 20.0, 5.0]),
            ("c", "noisy", &[5.0, 100.0, 10.0]),
            ("c", "two", &[1.0, 1.0]),
        ]);
        let iops = |side| term("c", side, Metric::Iops);
        let cases = [
            (Claim::More, "a", "b", Verdict::Reproduced),
            (Claim::Less, "a", "b", Verdict::Reversed),
            (Claim::More, "b", "a", Verdict::Reversed),
            (Claim::More, "a", "noisy", Verdict::Undecided),
            (Claim::More, "a", "two", Verdict::Undecided),
            (Claim::Equal(0.1), "a", "b", Verdict::Reversed),
            (Claim::Equal(0.1), "a", "a", Verdict::Reproduced),
            (Claim::Equal(1.5), "a", "b", Verdict::Reproduced),
            (Claim::NotLess(0.05), "a", "a", Verdict::Reproduced),
            (Claim::NotLess(0.05), "b", "a", Verdict::Reversed),
            (Claim::More, "a", "none", Verdict::NotMeasured),
            (Claim::More, "none", "a", Verdict::NotMeasured),
        ];
        for (claim, left, right, expected) in cases {
            let finding = finding(claim, iops(left), Some(iops(right)));
            let judged = one(&finding, &set);
            assert_eq!(
                judged.verdict, expected,
                "{claim:?} {left} {right}: {judged:?}"
            );
            assert!(!judged.why.is_empty());
            assert_eq!(judged.may_be_decided(), expected == Verdict::Undecided);
        }
        let same = one(&finding(Claim::More, iops("a"), Some(iops("a"))), &set);
        assert_eq!(same.verdict, Verdict::Undecided);
        assert!(
            same.why.ends_with("in 3 rounds: here they are the same"),
            "{same:?}"
        );
        assert!(!same.may_be_decided());
    }

    #[test]
    fn an_interval_shows_why_it_decides() {
        let shown = [0.5, 0.994, 0.996, 0.9996, 1.0, 1.004, 1.2, f64::INFINITY].map(bound);
        let expected = [
            "0.50", "0.99", "0.996", "0.9996", "1.00", "1.004", "1.20", "inf",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_a_quick_run_leaves_out_is_said() {
        let e2 = crate::experiment::find("E2").unwrap();
        let why = |quick: bool| {
            let run = crate::record::Run {
                quick,
                ..Default::default()
            };
            let set = Set {
                runs: vec![run],
                ..Set::default()
            };
            let judged = judge(&e2, &set).into_iter();
            let whys = judged.map(|judged| judged.why);
            whys.filter(|why| why.contains("it is one of --full"))
                .collect::<Vec<_>>()
        };
        assert_eq!(why(false), [] as [String; 0]);
        let said = why(true);
        assert!(
            said.iter().any(|why| why.ends_with("--cells toggle-cache")),
            "{said:?}"
        );
        assert!(
            !said.iter().any(|why| why.contains("random-reads-16-full")),
            "{said:?}"
        );
    }

    #[test]
    fn ratios_of_ratios_and_of_other_cells() {
        let mut set = set(&[
            ("small", "path", &[10.0, 20.0, 10.0]),
            ("small", "bare", &[20.0, 40.0, 20.0]),
            ("large", "path", &[90.0, 95.0, 90.0]),
            ("large", "bare", &[90.0, 100.0, 95.0]),
        ]);
        let over = |cell| Term {
            over: Some("bare".to_owned()),
            ..term(cell, "path", Metric::Iops)
        };
        let less = finding(Claim::Less, over("small"), Some(over("large")));
        let judged = one(&less, &set);
        assert_eq!(judged.verdict, Verdict::Reproduced);
        assert!(judged.why.contains("not taken in turn"), "{judged:?}");
        let half = finding(Claim::Less, over("small"), None);
        assert_eq!(one(&half, &set).ours.unwrap().median, 0.5);
        set.failures.push(Failure {
            cell: "tiny".to_owned(),
            side: "path".to_owned(),
            why: "takes multiples of 4096".to_owned(),
        });
        let tiny = one(&finding(Claim::Less, over("tiny"), None), &set);
        assert!(tiny.why.contains("multiples of 4096"), "{tiny:?}");
    }
}
