//! A summary for the terminal: bars of block characters, and verdicts.

use super::{
    failures::reasons,
    model::{Cell, Model},
};
use crate::{
    experiment::{Judged, Verdict, left_out_words, tally},
    metric::{Metric, number},
};
use std::fmt::Write;

/// Characters of a bar.
const WIDTH: usize = 32;
/// Eighths of a character.
const PARTS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// Each cell's first figure as bars, then findings and notes.
pub fn terminal(model: &Model) -> String {
    let mut text = String::new();
    for cell in &model.cells {
        bars(&mut text, model, cell);
    }
    let (goals, published): (Vec<&Judged>, Vec<&Judged>) = model
        .findings
        .iter()
        .filter(|judged| !judged.left_out)
        .partition(|judged| judged.finding.goal);
    // Goals that are reached are many, and all alike.
    let open = goals
        .iter()
        .filter(|goal| goal.verdict != Verdict::Reproduced);
    // Of cells that a run was not asked for, how many there are says enough; why one could not be measured is said.
    let tried = |judged: &&&Judged| {
        let finding = &judged.finding;
        let terms = [Some(&finding.left), finding.right.as_ref()];
        let failed = |cell: &str| model.failures.iter().any(|failure| failure.cell == cell);
        judged.verdict != Verdict::NotMeasured
            || terms.into_iter().flatten().any(|term| failed(&term.cell))
    };
    for judged in published.iter().filter(tried).chain(open) {
        let _ = writeln!(text, "{:<13} {}", judged.word(), judged.finding.says);
        let _ = writeln!(text, "{:<13} {}", "", judged.why);
    }
    for (what, findings) in [
        ("published findings", &published),
        ("goals of diskplane", &goals),
    ] {
        if !findings.is_empty() {
            let _ = writeln!(text, "{what}: {}", tally(findings));
        }
    }
    let left_out = model
        .findings
        .iter()
        .filter(|judged| judged.left_out)
        .count();
    if left_out > 0 {
        let _ = writeln!(text, "· {}", left_out_words(left_out));
    }
    for (what, why) in &model.absent {
        let _ = writeln!(text, "· not here: {what}: {why}");
    }
    for (why, who) in reasons(&model.failures) {
        let _ = writeln!(text, "· not measured: {who}: {why}");
    }
    for note in &model.notes {
        let _ = writeln!(text, "· {note}");
    }
    text
}

fn bars(text: &mut String, model: &Model, cell: &Cell) {
    let has = |metric: &&Metric| cell.sides.iter().any(|s| s.figures.contains_key(metric));
    let Some(metric) = model.figures.iter().find(has).copied() else {
        return;
    };
    let value = |metric| move |side: &super::Side| Some(side.figures.get(&metric)?.figure.median);
    let most = cell
        .sides
        .iter()
        .filter_map(value(metric))
        .fold(0.0, f64::max);
    let name = cell.sides.iter().map(|s| s.name.chars().count()).max();
    let name = name.unwrap_or_default();
    let _ = writeln!(text, "{}: {}", cell.name, metric.title());
    for side in &cell.sides {
        let Some(drawn) = side.figures.get(&metric) else {
            continue;
        };
        let mut line = format!(
            "  {:<name$} {:<WIDTH$} {:>8}",
            side.name,
            bar(drawn.figure.median / most),
            number(metric, drawn.figure.median)
        );
        for (other, unit) in [(Metric::P50Us, "µs"), (Metric::CpuUs, "CPU µs/IO")] {
            if let Some(value) = value(other)(side).filter(|_| other != metric) {
                let _ = write!(line, "  {:>7} {unit}", number(other, value));
            }
        }
        let _ = writeln!(text, "{line}");
    }
    text.push('\n');
}

/// A bar of this part (0 to 1) of the width.
fn bar(part: f64) -> String {
    let part = if part.is_finite() {
        part.clamp(0.0, 1.0)
    } else {
        0.0
    };
    let eighths = (part * (WIDTH * 8) as f64).round() as usize;
    let mut bar = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        bar.push(PARTS[eighths % 8]);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Failure, Run, Sample, Set};

    #[test]
    fn bars_are_as_long_as_their_values() {
        assert_eq!(bar(1.0).chars().count(), WIDTH);
        assert_eq!(bar(0.5), "█".repeat(WIDTH / 2));
        assert_eq!(bar(1.0 / 64.0), "▌");
        for odd in [f64::NAN, -1.0, 0.0, f64::INFINITY] {
            assert_eq!(bar(odd), "");
        }
    }

    #[test]
    fn every_side_has_a_line_and_every_finding_two() {
        let sample = |side: &str, iops| Sample {
            cell: "randwrite".to_owned(),
            side: side.to_owned(),
            metrics: [(Metric::Iops, iops), (Metric::CpuUs, 2.0)].into(),
            axes: vec![("load".to_owned(), "randwrite".to_owned())],
            ..Sample::default()
        };
        let set = Set {
            runs: vec![Run {
                experiment: "E0".to_owned(),
                ..Run::default()
            }],
            samples: vec![sample("qsd F", 2000.0), sample("qsd default", 1000.0)],
            ..Set::default()
        };
        let mut model = Model::of(&set);
        let text = terminal(&model);
        // Besides the bars, and how many stand how.
        let lines = 5 + 2 + model.absent.len();
        assert_eq!(text.lines().count(), lines, "{text}");
        // Why one that was tried is not there is said, twice: with its finding, and of the side.
        let mut failed = model.clone();
        failed.failures.push(Failure {
            cell: "ioping".to_owned(),
            side: "qsd F".to_owned(),
            why: "not installed".to_owned(),
        });
        let said = terminal(&failed);
        assert_eq!(said.lines().count(), lines + 2 + 1, "{said}");
        // In the experiment's order, in which F comes after the default.
        let line = text.lines().nth(2).unwrap();
        assert!(
            line.contains(&"█".repeat(WIDTH)) && line.contains("2.00 CPU µs/IO"),
            "{line}"
        );
        let count = model.findings.len();
        let tallied = format!(
            "published findings: 1 undecided, {} not measured\n",
            count - 1
        );
        assert!(text.contains(&tallied), "{text}");
        // Goals have words of their own, and those that are reached one line in all.
        let goal = |verdict| {
            let mut goal = model.findings[0].clone();
            (goal.finding.goal, goal.verdict) = (true, verdict);
            goal
        };
        let mut with_goals = model.clone();
        let goals = [Verdict::Reproduced, Verdict::Reproduced, Verdict::Reversed].map(goal);
        with_goals.findings.extend(goals);
        let text = terminal(&with_goals);
        assert_eq!(text.lines().count(), lines + 3, "{text}");
        assert!(
            text.contains("goals of diskplane: 2 reached, 1 missed\n"),
            "{text}"
        );
        assert!(text.contains("\nmissed        Random write"), "{text}");
        // What a quick run leaves out has one line in all.
        for judged in &mut model.findings {
            judged.left_out = true;
        }
        let text = terminal(&model);
        assert_eq!(text.lines().count(), 5 + model.absent.len(), "{text}");
        assert!(text.contains("findings are of cells that a quick run leaves out"));
    }
}
