//! Where the time of single requests goes: the parts of the latency study's protocol, stacked, in groups.

use super::{
    Chart, WIDTH, beside, legend_of,
    svg::{Anchor, Scale, Svg, tick},
};
use crate::report::model::{Broken, Model};
use trace::breakdown::Part;

const ROW: f64 = 22.0;
const RIGHT: f64 = 130.0;

/// The colour of a part: stages have those of series, the ways to the server and back two more.
fn class(part: Part) -> String {
    let stage = Part::ALL.iter().filter(|p| matches!(p, Part::In(_)));
    match stage.into_iter().position(|p| *p == part) {
        Some(n) => format!("f{n}"),
        None if part == Part::Kick => "fkick".to_owned(),
        None => "freturn".to_owned(),
    }
}

/// Every breakdown of a report.
pub fn parts(model: &Model) -> Option<Chart> {
    let first = model.breakdowns.first()?;
    let title = format!(
        "Where the time of a request goes: {} runs of {}, without {} fastest and slowest; mean, and the deviation of the runs",
        first.breakdown.runs, first.breakdown.requests, first.breakdown.dropped
    );
    let mut svg = Svg::default();
    svg.text(0.0, 16.0, Anchor::Start, "head", &title);
    let names: Vec<(String, String)> = Part::ALL.map(|p| (p.to_string(), class(p))).into();
    let mut y = 34.0 + legend_of(&mut svg, &names, (0.0, 38.0));
    let mut groups: Vec<&str> = model.breakdowns.iter().map(|b| b.group.as_str()).collect();
    groups.dedup();
    let left = beside(model.breakdowns.iter().map(|broken| broken.name.as_str()));
    for group in groups {
        let own = model.breakdowns.iter().enumerate();
        let own: Vec<(usize, &Broken)> = own.filter(|(_, b)| b.group == group).collect();
        let ends = |b: &Broken| b.breakdown.total_ns + b.breakdown.total_deviation_ns;
        let most = own.iter().map(|(_, b)| ends(b)).fold(0.0, f64::max) / 1000.0;
        // Large requests take a thousand times as long as small ones.
        let scale = Scale::linear(most, left, WIDTH - RIGHT);
        let bottom = y + 22.0 + ROW * own.len() as f64;
        svg.text(0.0, y + 14.0, Anchor::Start, "head", group);
        for value in scale.ticks() {
            let x = scale.at(value);
            svg.line((x, y + 20.0), (x, bottom), "grid");
            svg.text(
                x,
                bottom + 13.0,
                Anchor::Middle,
                "dim",
                &format!("{} µs", tick(value)),
            );
        }
        y += 22.0;
        for (n, broken) in own {
            row(&mut svg, (&scale, left), y, n, broken);
            y += ROW;
        }
        y = bottom + 26.0;
    }
    Some(Chart {
        name: "breakdown".to_owned(),
        svg: svg.finish(WIDTH, y, &title),
        title,
        cell: None,
    })
}

fn row(svg: &mut Svg, (scale, left): (&Scale, f64), y: f64, n: usize, broken: &Broken) {
    let middle = y + ROW / 2.0;
    svg.text(left - 8.0, middle + 4.0, Anchor::End, "", &broken.name);
    let mut before = 0.0;
    for time in &broken.breakdown.parts {
        let us = time.mean_ns / 1000.0;
        let (from, to) = (scale.at(before), scale.at(before + us));
        let attributes = format!(
            " data-breakdown=\"{n}\" data-part=\"{}\" data-value=\"{}\"",
            time.part.name(),
            time.mean_ns
        );
        let over = format!(
            "{}: {us:.2} µs ± {:.2}, {:.1} %",
            time.part,
            time.deviation_ns / 1000.0,
            time.share * 100.0
        );
        svg.rect(
            [from, y + 4.0, to - from, ROW - 8.0],
            &class(time.part),
            &attributes,
            &over,
        );
        before += us;
    }
    let total = broken.breakdown.total_ns / 1000.0;
    let deviation = broken.breakdown.total_deviation_ns / 1000.0;
    let (low, high) = (
        scale.at((total - deviation).max(0.0)),
        scale.at(total + deviation),
    );
    svg.line((low, middle), (high, middle), "whisker");
    svg.text(
        high + 7.0,
        middle + 4.0,
        Anchor::Start,
        "",
        &format!("{} µs", tick(total)),
    );
}
