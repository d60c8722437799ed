//! What was published beside what was found: ratios around 1, ours with their interval, published ones as diamonds.

use super::{
    Chart, WIDTH, file_name,
    svg::{Anchor, Scale, Svg, tick},
};
use crate::{experiment::Verdict, report::model::Model};

const ROW: f64 = 40.0;
const RIGHT: f64 = 110.0;

/// All findings that were measured.
pub fn verdicts(model: &Model) -> Option<Chart> {
    let measured: Vec<_> = model
        .findings
        .iter()
        .enumerate()
        .filter_map(|(n, finding)| Some((n, finding, finding.ours?)))
        .collect();
    let ends = measured.iter().flat_map(|(_, f, ours)| {
        [
            Some(ours.low),
            Some(ours.high),
            f.finding.published,
            Some(1.0),
        ]
    });
    let ends: Vec<f64> = ends.flatten().filter(|end| *end > 0.0).collect();
    let (least, most) = (
        ends.iter().copied().reduce(f64::min)?,
        ends.iter().copied().reduce(f64::max)?,
    );
    if measured.is_empty() {
        return None;
    }
    let title = "Findings: the first by the second, here (dot and 95 % interval) and as published (diamond)".to_owned();
    let mut svg = Svg::default();
    svg.text(0.0, 16.0, Anchor::Start, "head", &title);
    let x = Scale::log(least / 1.1, most * 1.1, 10.0, WIDTH - RIGHT);
    let mut y = 30.0;
    let bottom = y + ROW * measured.len() as f64;
    for value in x.ticks() {
        svg.text(
            x.at(value),
            bottom + 14.0,
            Anchor::Middle,
            "dim",
            &tick(value),
        );
    }
    for (n, judged, ours) in measured {
        let says: String = match judged.finding.says.char_indices().nth(104) {
            Some((end, _)) => format!("{}…", &judged.finding.says[..end]),
            None => judged.finding.says.clone(),
        };
        svg.text(10.0, y + 14.0, Anchor::Start, "", &says);
        let middle = y + 27.0;
        // Beside the words, which nothing crosses.
        let row = |value: f64| {
            let at = x.at(value);
            ((at, middle - 8.0), (at, middle + 9.0))
        };
        for value in x.ticks() {
            let (from, to) = row(value);
            svg.line(from, to, "grid");
        }
        let (from, to) = row(1.0);
        svg.line(from, to, "one");
        svg.line(
            (x.at(ours.low), middle),
            (x.at(ours.high), middle),
            "whisker",
        );
        for end in [ours.low, ours.high] {
            svg.line(
                (x.at(end), middle - 4.0),
                (x.at(end), middle + 4.0),
                "whisker",
            );
        }
        let colour = match judged.verdict {
            Verdict::Reproduced => "f2",
            Verdict::Reversed => "f1",
            _ => "f7",
        };
        let attributes = format!(" data-finding=\"{n}\" data-value=\"{}\"", ours.median);
        svg.dot(
            (x.at(ours.median), middle),
            colour,
            &attributes,
            &judged.why,
        );
        if let Some(published) = judged.finding.published {
            svg.diamond(
                (x.at(published), middle),
                &format!("published: {published:.2}"),
            );
        }
        svg.text(
            WIDTH - RIGHT + 8.0,
            middle + 4.0,
            Anchor::Start,
            "",
            judged.word(),
        );
        y += ROW;
    }
    Some(Chart {
        name: file_name(&["findings"]),
        svg: svg.finish(WIDTH, bottom + 24.0, &title),
        title,
        cell: None,
    })
}
