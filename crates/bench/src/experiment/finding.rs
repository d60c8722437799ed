//! Published findings beside ours.

use super::plan::{Claim, Experiment, Finding, Term};
use crate::{
    metric::number,
    record::{Sample, Set},
    statistics::{Figure, median, ratio_of_medians},
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

impl Verdict {
    /// As a finding has it, or a goal.
    pub fn word(self, goal: bool) -> &'static str {
        match (self, goal) {
            (Self::Reproduced, false) => "reproduced",
            (Self::Reproduced, true) => "reached",
            (Self::Reversed, false) => "reversed",
            (Self::Reversed, true) => "missed",
            (Self::Undecided, _) => "undecided",
            (Self::NotMeasured, _) => "not measured",
        }
    }
}

/// Two terms that differ by no more than this part, and of which one is said to be ahead, are the same here.
const SAME: f64 = 0.02;

fn are_same(ratio: &Figure) -> bool {
    ratio.low > 1.0 - SAME && ratio.high < 1.0 + SAME
}

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
        self.verdict == Verdict::Undecided && !self.ours.as_ref().is_some_and(are_same)
    }

    /// The verdict in a word.
    pub fn word(&self) -> &'static str {
        self.verdict.word(self.finding.goal)
    }
}

/// How many findings stand how, in words: "7 reproduced, 1 reversed"; of goals, "3 reached, 1 missed".
pub fn tally(findings: &[&Judged]) -> String {
    let of = |verdict: Verdict, goal: bool, word: &str| {
        let own = findings
            .iter()
            .filter(|judged| (judged.verdict, judged.finding.goal) == (verdict, goal));
        match own.count() {
            0 => None,
            n => Some(format!("{n} {word}")),
        }
    };
    let kinds = [
        Verdict::Reproduced,
        Verdict::Reversed,
        Verdict::Undecided,
        Verdict::NotMeasured,
    ];
    let each = [false, true].into_iter().flat_map(|goal| {
        let of = &of;
        kinds
            .into_iter()
            .filter_map(move |verdict| of(verdict, goal, verdict.word(goal)))
    });
    each.collect::<Vec<_>>().join(", ")
}

/// How many findings are of cells that a quick run leaves out, in words.
pub fn left_out_words(count: usize) -> String {
    match count {
        1 => "1 finding is of a cell that a quick run leaves out (--full, or --cells)".to_owned(),
        n => format!("{n} findings are of cells that a quick run leaves out (--full, or --cells)"),
    }
}

/// Judges an experiment's findings by the samples of a run. Goals are those of cells that were measured: there is one for each of
/// hundreds.
pub fn judge(experiment: &Experiment, set: &Set) -> Vec<Judged> {
    let with_hint = |finding: &Finding| {
        let mut judged = one(finding, set);
        if let Some(cell) = left_out(experiment, finding, set) {
            judged.left_out = true;
            judged.why += &format!(": it is one of --full, or --cells {cell}");
        }
        judged
    };
    let judged = experiment.findings.iter().map(with_hint);
    judged
        .filter(|judged| !judged.finding.goal || judged.ours.is_some())
        .collect()
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
    let (left, right) = (&finding.left, finding.right.as_ref());
    let judged = |ours, verdict, why: String| Judged {
        finding: finding.clone(),
        ours,
        verdict,
        why,
        left_out: false,
    };
    let (left, right) = (Of::term(left, set), right.map(|term| Of::term(term, set)));
    for of in [Some(&left), right.as_ref()].into_iter().flatten() {
        if of.values.is_empty() {
            return judged(None, Verdict::NotMeasured, of.missing(set));
        }
    }
    let (ours, in_turn) = match &right {
        Some(right) if right.term.cell == left.term.cell => {
            let rounds: Vec<f64> = left
                .values
                .iter()
                .filter_map(|(round, value)| {
                    let by = right.values.get(round).filter(|by| **by > 0.0)?;
                    Some(value / by)
                })
                .collect();
            (Figure::of(&rounds), true)
        }
        Some(right) => (ratio_of_medians(&left.all(), &right.all()), false),
        None => (Figure::of(&left.all()), true),
    };
    let Some(figure) = ours else {
        let why = "no round has both".to_owned();
        return judged(None, Verdict::NotMeasured, why);
    };
    let measured = in_words(&left, right.as_ref(), &figure, in_turn);
    let (verdict, so) = weigh(finding, &figure);
    let otherwise = match (verdict, finding.otherwise) {
        (Verdict::Reproduced, _) | (_, "") => String::new(),
        (_, otherwise) => format!(". Otherwise here: {otherwise}"),
    };
    judged(Some(figure), verdict, format!("{measured}{so}{otherwise}"))
}

/// What a figure says of a finding, and how that follows.
fn weigh(finding: &Finding, figure: &Figure) -> (Verdict, String) {
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
    let percent = |part: f64| format!("{:.0} %", part * 100.0);
    if figure.rounds < ROUNDS_MIN {
        let so = format!(
            ": {ROUNDS_MIN} rounds are needed to decide, which --full, or --cells of these alone, has time for"
        );
        return (Verdict::Undecided, so);
    }
    match (holds, fails) {
        (true, _) => (Verdict::Reproduced, String::new()),
        (_, true) => {
            let so = match finding.claim {
                Claim::More | Claim::Less => "the other way round".to_owned(),
                Claim::NotLess(part) => format!("less by more than {}", percent(part)),
                Claim::Equal(part) => format!("they differ by more than {}", percent(part)),
            };
            (Verdict::Reversed, format!(": {so}"))
        }
        _ if are_same(figure) => (Verdict::Undecided, ": here they are the same".to_owned()),
        _ => {
            let over = match finding.claim {
                Claim::More | Claim::Less => "on both sides of 1".to_owned(),
                Claim::NotLess(part) => format!("on both sides of {:.2}", 1.0 - part),
                Claim::Equal(part) => format!("within 1 ± {part:.2} and beyond"),
            };
            let so = format!(": the interval lies {over}, more rounds (--samples) may tell");
            (Verdict::Undecided, so)
        }
    }
}

/// Who has how much of what, beside whom: with the figures themselves.
fn in_words(left: &Of<'_>, right: Option<&Of<'_>>, figure: &Figure, in_turn: bool) -> String {
    let metric = left.term.metric;
    let interval = format!(
        "(95 % interval {}–{}, {} round{}{})",
        bound(figure.low),
        bound(figure.high),
        figure.rounds,
        if figure.rounds == 1 { "" } else { "s" },
        if in_turn {
            ""
        } else {
            ", of cells that were not taken in turn"
        }
    );
    let times = format!("{:.2} × the {}", figure.median, metric.title());
    let shown = |values: &[f64]| median(values).map_or_else(String::new, |v| number(metric, v));
    match (right, left.term.over.as_deref()) {
        (None, None) => format!("{}: {times} {interval}", left.side),
        (None, Some(over)) => {
            let (of, by) = (shown(&left.own), shown(&left.below));
            format!(
                "{} has {times} of {over} {interval}: {of} beside {by}",
                left.side
            )
        }
        (Some(right), None) => {
            let (of, by) = (shown(&left.all()), shown(&right.all()));
            let elsewhere = right.term.cell != left.term.cell;
            let (name, beside) = match elsewhere {
                true => (
                    format!("{} in {}", left.side, left.term.cell),
                    format!("{} in {}", right.side, right.term.cell),
                ),
                false => (left.side.to_owned(), right.side.to_owned()),
            };
            format!("{name} has {times} of {beside} {interval}: {of} beside {by}")
        }
        (Some(right), Some(over)) => {
            let ratio = |of: &Of<'_>| median(&of.all()).unwrap_or_default();
            format!(
                "{} by {over} is {:.2} in the {} of {}, and {:.2} in {}: {:.2} × as much {interval}",
                left.side,
                ratio(left),
                metric.title(),
                left.term.cell,
                ratio(right),
                right.term.cell,
                figure.median
            )
        }
    }
}

/// An end of an interval: with as many digits as show on which side of 1 it is.
fn bound(ratio: f64) -> String {
    let digits = (2..=6).find(|digits| {
        let shown = format!("{ratio:.digits$}").parse::<f64>();
        ratio == 1.0 || shown.is_ok_and(|shown| shown != 1.0)
    });
    format!("{ratio:.*}", digits.unwrap_or(6))
}

/// What was measured of a term.
struct Of<'a> {
    term: &'a Term,
    /// The side that it is of: the term's, or its other one.
    side: &'a str,
    /// Its value of each round that has it.
    values: BTreeMap<usize, f64>,
    /// Of these rounds, the dividends and the divisors where it is a ratio.
    own: Vec<f64>,
    below: Vec<f64>,
}

impl<'a> Of<'a> {
    fn term(term: &'a Term, set: &Set) -> Self {
        let of = |side: &str| -> BTreeMap<usize, f64> {
            let own = |sample: &&Sample| sample.cell == term.cell && sample.side == side;
            let samples = set.samples.iter().filter(own);
            samples
                .filter_map(|s| Some((s.round, s.metric(term.metric)?)))
                .collect()
        };
        let middle = |values: &BTreeMap<usize, f64>| {
            median(&values.values().copied().collect::<Vec<_>>()).unwrap_or_default()
        };
        let (mut side, mut values) = (term.side.as_str(), of(&term.side));
        if let Some(or) = &term.or {
            let others = of(or);
            let more = middle(&others) > middle(&values);
            // Of one that was not measured nothing is better.
            if values.is_empty() || !others.is_empty() && more == term.metric.more_is_better() {
                (side, values) = (or, others);
            }
        }
        let (mut own, mut below) = (Vec::new(), Vec::new());
        if let Some(over) = &term.over {
            let over = of(over);
            values.retain(|round, value| {
                let Some(by) = over.get(round).filter(|by| **by > 0.0) else {
                    return false;
                };
                own.push(*value);
                below.push(*by);
                *value /= by;
                true
            });
        }
        Self {
            term,
            side,
            values,
            own,
            below,
        }
    }

    fn all(&self) -> Vec<f64> {
        self.values.values().copied().collect()
    }

    /// Why nothing was measured.
    fn missing(&self, set: &Set) -> String {
        let Term { cell, side, .. } = self.term;
        match failure(set, self.term) {
            Some(why) => format!("{side} of {cell}: {why}"),
            None => format!("{side} of {cell} was not measured in this run"),
        }
    }
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
        match right {
            Some(right) => Finding::new("x", left, right, claim),
            None => Finding::of_ratio("x", left, claim),
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
            same.why
                .ends_with("3 rounds): 20 beside 20: here they are the same"),
            "{same:?}"
        );
        assert!(!same.may_be_decided());
    }

    #[test]
    fn five_rounds_on_one_side_decide() {
        // Of a quick run of E3: all of them are well above 1.
        let set = set(&[
            ("c", "a", &[1.22, 1.11, 1.17, 1.13, 1.21]),
            ("c", "one", &[1.0; 5]),
        ]);
        let iops = |side| term("c", side, Metric::Iops);
        let judged = one(
            &Finding::new("x", iops("a"), iops("one"), Claim::More),
            &set,
        );
        assert_eq!(judged.verdict, Verdict::Reproduced, "{judged:?}");
    }

    #[test]
    fn the_reason_says_who_has_how_much_beside_whom() {
        let set = set(&[
            ("c", "a", &[20_000.0, 40_000.0, 10_000.0]),
            ("c", "b", &[10_000.0, 20_000.0, 5_000.0]),
            ("c", "c", &[11_000.0, 19_000.0, 5_000.0]),
            ("d", "a", &[20_000.0, 20_000.0, 20_000.0]),
        ]);
        let iops = |cell, side| term(cell, side, Metric::Iops);
        let (a, b) = (iops("c", "a"), iops("c", "b"));
        let why = |finding: Finding| one(&finding, &set).why;
        let new = |left: &Term, right: &Term, claim| {
            Finding::new("x", left.clone(), right.clone(), claim).otherwise("it rains")
        };
        let says =
            "a has 2.00 × the IOPS of b (95 % interval 2.00–2.00, 3 rounds): 20.0 k beside 10.0 k";
        assert_eq!(why(new(&a, &b, Claim::More)), says);
        for (claim, so) in [
            (Claim::Less, "the other way round"),
            (Claim::Equal(0.1), "they differ by more than 10 %"),
        ] {
            assert_eq!(
                why(new(&a, &b, claim)),
                format!("{says}: {so}. Otherwise here: it rains")
            );
        }
        let less = why(new(&b, &a, Claim::NotLess(0.05)));
        assert!(less.contains(": less by more than 5 %."), "{less}");
        let apart = why(new(&a, &iops("d", "a"), Claim::More));
        assert!(
            apart.starts_with("a in c has 1.00 × the IOPS of a in d (95 % interval")
                && apart.contains("3 rounds, of cells that were not taken in turn): 20.0 k beside 20.0 k: the interval lies on both sides of 1, more rounds"),
            "{apart}"
        );
        let over = why(Finding::of_ratio("x", a.clone().over("b"), Claim::More));
        assert!(
            over.starts_with("a has 2.00 × the IOPS of b (")
                && over.ends_with("20.0 k beside 10.0 k"),
            "{over}"
        );
        let ratios = why(Finding::new(
            "x",
            a.over("b"),
            iops("d", "a").over("a"),
            Claim::More,
        ));
        assert!(
            ratios.contains("a by b is 2.00 in the IOPS of c, and 1.00 in d: 2.00 × as much"),
            "{ratios}"
        );
    }

    #[test]
    fn a_goal_is_beside_the_better_one_and_of_what_was_measured() {
        let mut set = set(&[
            ("randread-raw-ext4", "diskplane auto", &[90.0, 90.0, 90.0]),
            ("randread-raw-ext4", "diskplane native", &[50.0, 50.0, 50.0]),
            (
                "randread-raw-ext4",
                "diskplane threads",
                &[100.0, 100.0, 100.0],
            ),
        ]);
        let e1 = crate::experiment::find("E1").unwrap();
        let goals = |set: &Set| -> Vec<Judged> {
            let judged = judge(&e1, set).into_iter();
            judged.filter(|judged| judged.finding.goal).collect()
        };
        let missed = &goals(&set)[..];
        let [goal] = missed else { panic!("{missed:?}") };
        assert_eq!((goal.verdict, goal.word()), (Verdict::Reversed, "missed"));
        assert!(
            goal.why
                .starts_with("diskplane auto has 0.90 × the IOPS of diskplane threads ("),
            "{goal:?}"
        );
        // The better one is not the first in the other order either, and of one that was not measured nothing is better.
        for sample in &mut set.samples {
            sample.side = match &sample.side[..] {
                "diskplane native" => "diskplane threads".to_owned(),
                "diskplane threads" => "diskplane native".to_owned(),
                other => other.to_owned(),
            };
        }
        assert_eq!(goals(&set)[0].ours.unwrap().median, 0.9);
        set.samples
            .retain(|sample| sample.side != "diskplane native");
        assert_eq!(goals(&set)[0].ours.unwrap().median, 1.8);
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
        let over = |cell| term(cell, "path", Metric::Iops).over("bare");
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
