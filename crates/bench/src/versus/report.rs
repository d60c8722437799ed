//! Results for people: lines of text as cells end, and a table in Markdown.

use super::{
    cell::{Against, Cell, Limit, Metric},
    judge::{Judgement, Outcome, Verdict},
    statistics::{Figure, Summary},
};
use crate::metric::number;
use std::fmt::Write;

/// What stands in each column.
struct Row {
    figure: String,
    ours: String,
    beside: String,
    ratio: String,
    range: String,
    bar: String,
    verdict: String,
}

/// The head of the text table.
pub fn head() -> String {
    line(
        "cell",
        &Row {
            figure: "figure".into(),
            ours: "diskplane".into(),
            beside: "beside".into(),
            ratio: "ratio (95 %)".into(),
            range: "min–max".into(),
            bar: "bar".into(),
            verdict: "verdict".into(),
        },
    )
}

/// A cell's result as lines of the text table.
pub fn text(outcome: &Outcome) -> String {
    let mut text = String::new();
    if let Some(why) = &outcome.failed {
        let _ = writeln!(text, "{:<20} {why}", outcome.cell);
    }
    for (n, judgement) in outcome.judgements.iter().enumerate() {
        let name = if n == 0 { outcome.cell } else { "" };
        text.push_str(&line(name, &row(judgement)));
    }
    for note in outcome.equal.iter().chain(&outcome.notes) {
        let _ = writeln!(text, "{:<20} · {note}", "");
    }
    text
}

fn line(name: &str, row: &Row) -> String {
    let line = format!(
        "{name:<20} {:<16} {:>9}  {:<28} {:<22} {:<13} {:<7} {}",
        row.figure, row.ours, row.beside, row.ratio, row.range, row.bar, row.verdict
    );
    format!("{}\n", line.trim_end())
}

/// The results as a table in Markdown, with the cells' lines of the issue.
pub fn markdown(cells: &[&Cell], outcomes: &[Outcome]) -> String {
    let mut text = String::from(
        "| cell | figure | diskplane | beside | ratio (95 %) | min–max | bar | verdict |\n|---|---|---|---|---|---|---|---|\n",
    );
    for outcome in outcomes {
        if let Some(why) = &outcome.failed {
            let _ = writeln!(text, "| `{}` | {} | | | | | | |", outcome.cell, escape(why));
        }
        for (n, judgement) in outcome.judgements.iter().enumerate() {
            let name = if n == 0 {
                format!("`{}`", outcome.cell)
            } else {
                String::new()
            };
            let row = row(judgement);
            let _ = writeln!(
                text,
                "| {name} | {} | {} | {} | {} | {} | {} | {} |",
                row.figure,
                row.ours,
                escape(&row.beside),
                row.ratio,
                row.range,
                row.bar,
                emphasis(judgement.verdict, &row.verdict)
            );
        }
    }
    let notes: Vec<String> = outcomes
        .iter()
        .flat_map(|o| {
            o.notes
                .iter()
                .map(move |note| format!("- `{}`: {}\n", o.cell, escape(note)))
        })
        .collect();
    if !notes.is_empty() {
        let _ = write!(text, "\nNotes of the run:\n\n{}", notes.concat());
    }
    let _ = write!(text, "\nWhat the cells are:\n\n{}", meanings(cells));
    text
}

/// What each cell shows.
pub fn meanings(cells: &[&Cell]) -> String {
    let mut text = String::new();
    for cell in cells {
        let _ = writeln!(text, "- `{}`: {}", cell.name, cell.meaning);
    }
    text
}

/// The cells and their bars, for `--list`.
pub fn list(cells: &[&Cell]) -> String {
    let mut text = String::new();
    for cell in cells {
        let _ = writeln!(text, "{:<20} {}", cell.name, cell.meaning);
        for bar in cell.bars {
            let beside = match bar.against {
                Against::Side(name) => format!("of {name}'s"),
                Against::Other(name, metric) => format!("of {name}'s {}", metric.title()),
                Against::Above(name) => format!("above {name}'s"),
                Against::Alone => String::new(),
            };
            let _ = writeln!(
                text,
                "{:<22} {} {} {beside}",
                "",
                bar.metric.title(),
                bar.limit
            );
        }
    }
    text
}

fn emphasis(verdict: Verdict, words: &str) -> String {
    match verdict {
        Verdict::NotReached => format!("**{words}**"),
        _ => escape(words),
    }
}

fn escape(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn row(judgement: &Judgement) -> Row {
    let is_ratio = matches!(judgement.against, Against::Side(_) | Against::Other(..));
    let metric = judgement.metric;
    let theirs = match judgement.against {
        Against::Other(_, metric) => metric,
        _ => metric,
    };
    let show = |metric: Metric, summary: Option<Summary>| {
        summary.map_or_else(|| "–".to_owned(), |s| number(metric, s.median))
    };
    let beside = match (&judgement.beside, judgement.theirs) {
        (Some(name), Some(_)) => format!("{} {name}", show(theirs, judgement.theirs)),
        (Some(name), None) => name.clone(),
        (None, _) => String::new(),
    };
    let (ratio, range) = match judgement.figure {
        Some(Figure {
            median,
            low,
            high,
            min,
            max,
            ..
        }) if is_ratio => (
            format!("{median:.2} × ({low:.2}–{high:.2})"),
            format!("{min:.2}–{max:.2}"),
        ),
        Some(Figure {
            median,
            low,
            high,
            min,
            max,
            ..
        }) => {
            let n = |value| number(metric, value);
            (
                format!("{} ({}–{})", n(median), n(low), n(high)),
                format!("{}–{}", n(min), n(max)),
            )
        }
        None => (judgement.why.clone().unwrap_or_default(), String::new()),
    };
    Row {
        figure: metric.title().to_owned(),
        ours: show(metric, judgement.ours),
        beside,
        ratio,
        range,
        bar: match judgement.limit {
            limit if limit.is_open() => String::new(),
            limit => limit.to_string(),
        },
        verdict: match (judgement.verdict, judgement.limit) {
            (Verdict::Shown, Limit::Unequal(why)) => format!("not judged: {why}"),
            (verdict, _) => verdict.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::versus::{judge::Series, judge::judge, table::CELLS};
    use std::collections::BTreeMap;

    #[test]
    fn a_result_is_one_line_per_bar() {
        let cell = CELLS.iter().find(|cell| cell.name == "null").unwrap();
        let series = |side, iops| Series {
            side,
            engine: "auto",
            rounds: vec![Some(BTreeMap::from([(Metric::Iops, iops), (Metric::CpuUs, 1.0)])); 2],
            ..Series::default()
        };
        let mut outcome = judge(cell, &[series(0, 300_000.0), series(1, 100_000.0)], 2);
        outcome.notes.push("a|b".to_owned());
        let lines = text(&outcome);
        assert_eq!(lines.lines().count(), 3, "{lines}");
        let first = lines.lines().next().unwrap();
        for part in [
            "null ",
            "IOPS",
            "300.0 k",
            "100.0 k qsd",
            "3.00 × (3.00–3.00)",
            "≥ 2.5",
            "reached",
        ] {
            assert!(first.contains(part), "{first}: {part}");
        }
        let table = markdown(&[cell], &[outcome]);
        assert!(
            table.contains("| `null` | IOPS | 300.0 k | 100.0 k qsd | 3.00 ×"),
            "{table}"
        );
        assert!(
            table.contains("**not reached**") && table.contains("a\\|b"),
            "{table}"
        );
        assert!(table.contains("- `null`: A disk of zeros"), "{table}");
        assert!(list(&[cell]).contains("IOPS ≥ 2.5 of qsd's"));
        // Where there is no bar, since they are not equal, the row says why.
        let cell = CELLS.iter().find(|cell| cell.name == "nbdkit-randread");
        let outcome = judge(cell.unwrap(), &[series(0, 3.0), series(1, 1.0)], 2);
        let lines = text(&outcome);
        let why = "not judged: it has no O_DIRECT";
        assert_eq!(lines.matches(why).count(), 2, "{lines}");
        assert_eq!(markdown(&[], &[outcome]).matches(why).count(), 2);
    }
}
