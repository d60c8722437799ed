//! Latency over time: a column of the picture is a slice of the measurement, a row a range of latencies, and the darker a
//! field, the more requests fell into it.

use super::{
    Chart, WIDTH, file_name,
    svg::{Anchor, Scale, Svg, tick},
};
use crate::{
    load::timeline::edge_us,
    report::model::{Cell, Side},
};

const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const ROW: f64 = 7.0;

/// The heat map of a side, if it has requests.
pub fn heat(cell: &Cell, side: &Side) -> Option<Chart> {
    let rows = &side.timeline.rows;
    let fields = || rows.iter().flatten();
    let first = fields().map(|(column, _)| *column).min()?;
    let last = fields().map(|(column, _)| *column).max()?;
    let most = fields().map(|(_, count)| *count).max()?;
    let title = format!("{}, {}: latency over time", cell.name, side.name);
    let mut svg = Svg::default();
    svg.text(0.0, 16.0, Anchor::Start, "head", &title);
    svg.text(0.0, 34.0, Anchor::Start, "dim", "µs");
    let top = 40.0;
    let bottom = top + ROW * f64::from(last - first + 1);
    let width = (WIDTH - LEFT - RIGHT) / rows.len() as f64;
    for (slice, fields) in rows.iter().enumerate() {
        for (column, count) in fields {
            // By the root of the count, in eight steps: fields with few requests are what one looks for.
            let part = (f64::from(*count) / f64::from(most)).sqrt();
            let shade = (part * 8.0).ceil().clamp(1.0, 8.0) / 8.0;
            let at = [
                LEFT + width * slice as f64,
                bottom - ROW * f64::from(column - first + 1),
                width + 0.3,
                ROW + 0.3,
            ];
            svg.rect(at, "f0", &format!(" fill-opacity=\"{shade:.2}\""), "");
        }
    }
    let mut marked = bottom + 99.0;
    for column in first..=last {
        let at = bottom - ROW * f64::from(column - first + 1);
        // One label for each doubling, where there is room.
        if column % 4 == 0 && marked - at >= 14.0 {
            svg.line((LEFT, at), (WIDTH - RIGHT, at), "grid");
            svg.text(
                LEFT - 6.0,
                at + 4.0,
                Anchor::End,
                "dim",
                &tick(edge_us(column).round()),
            );
            marked = at;
        }
    }
    let seconds = side.timeline.slice_ms * rows.len() as f64 / 1000.0;
    let x = Scale::linear(seconds, LEFT, WIDTH - RIGHT);
    for value in x.ticks() {
        svg.text(
            x.at(value),
            bottom + 16.0,
            Anchor::Middle,
            "dim",
            &format!("{} s", tick(value)),
        );
    }
    svg.line((LEFT, top), (LEFT, bottom), "axis");
    svg.line((LEFT, bottom), (WIDTH - RIGHT, bottom), "axis");
    Some(Chart {
        name: file_name(&["heat", &cell.name, &side.name]),
        svg: svg.finish(WIDTH, bottom + 26.0, &title),
        title,
        cell: Some(cell.name.clone()),
    })
}
