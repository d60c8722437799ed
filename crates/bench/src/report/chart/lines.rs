//! Curves: a figure over sizes of requests, and latency over percentiles.

use super::{
    Chart, WIDTH, file_name, legend,
    svg::{Anchor, COLOURS, Scale, Svg, escape, tick},
};
use crate::{
    metric::{Metric, number},
    report::model::{Cell, Model, Side},
};
use block::size;

const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const HEIGHT: f64 = 300.0;
/// Pixels between the points of curves at the same size of requests.
const DODGE: f64 = 3.0;
/// Points that make a curve.
const POINTS_MIN: usize = 3;
/// Sides of a cell whose percentiles are drawn: more cannot be told apart.
const CURVES_MAX: usize = COLOURS;

/// The latency in microseconds that this part of a side's requests (0 to 1) did not exceed.
fn quantile_us(side: &Side, part: f64) -> Option<f64> {
    side.latency.quantile_ns(part).map(|ns| ns as f64 / 1000.0)
}

/// The size of the requests of a cell that is one of several that differ in it.
pub(super) fn block(cell: &Cell) -> Option<u64> {
    let axis = cell.axes.iter().find(|(name, _)| name == "block")?;
    axis.1.parse().ok()
}

/// Cells that have this figure over the sizes of their requests, by their load.
pub fn over_blocks(model: &Model, metric: Metric) -> Vec<Chart> {
    let mut loads: Vec<&str> = Vec::new();
    let load = |cell: &'_ Cell| -> Option<String> {
        block(cell)?;
        Some(cell.axes.first()?.1.clone())
    };
    let all: Vec<String> = model.cells.iter().filter_map(load).collect();
    for name in &all {
        if !loads.contains(&name.as_str()) {
            loads.push(name);
        }
    }
    let charts = loads.into_iter().map(|name| {
        let own = |cell: &&Cell| load(cell).as_deref() == Some(name);
        let cells: Vec<&Cell> = model.cells.iter().filter(own).collect();
        over(&cells, name, metric)
    });
    charts.flatten().collect()
}

fn over(cells: &[&Cell], load: &str, metric: Metric) -> Option<Chart> {
    let mut names: Vec<String> = Vec::new();
    for side in cells.iter().flat_map(|cell| &cell.sides) {
        if side.figures.contains_key(&metric) && !names.contains(&side.name) {
            names.push(side.name.clone());
        }
    }
    let blocks: Vec<f64> = cells
        .iter()
        .filter_map(|cell| Some(block(cell)? as f64))
        .collect();
    let values = cells.iter().flat_map(|cell| &cell.sides);
    let values: Vec<f64> = values
        .filter_map(|side| Some(side.figures.get(&metric)?.figure.median))
        .filter(|value| *value > 0.0)
        .collect();
    if names.is_empty() || values.is_empty() {
        return None;
    }
    let fold = |values: &[f64], by: fn(f64, f64) -> f64| values.iter().copied().reduce(by);
    let (least, most) = (fold(&values, f64::min)?, fold(&values, f64::max)?);
    let title = format!(
        "{} of {load} over the size of requests ({})",
        metric.title(),
        metric.better()
    );
    let mut svg = Svg::default();
    svg.text(0.0, 16.0, Anchor::Start, "head", &title);
    let top = 46.0 + legend(&mut svg, &names, (LEFT, 38.0));
    let bottom = top + HEIGHT;
    let x = Scale::log(
        fold(&blocks, f64::min)?,
        fold(&blocks, f64::max)?,
        LEFT + 12.0,
        WIDTH - RIGHT - 12.0,
    );
    let y = Scale::log(least * 0.8, most * 1.25, bottom, top);
    frame(&mut svg, &y, (top, bottom), metric.title());
    for bytes in &blocks {
        let at = x.at(*bytes);
        svg.line((at, top), (at, bottom), "grid");
        svg.text(
            at,
            bottom + 16.0,
            Anchor::Middle,
            "dim",
            &size::human(*bytes as u64),
        );
    }
    for (n, name) in names.iter().enumerate() {
        let mut points = Vec::new();
        let class = format!("s{}", n % COLOURS);
        for cell in cells {
            let side = cell.sides.iter().find(|side| side.name == *name);
            let drawn = side.and_then(|side| side.figures.get(&metric));
            let (Some(drawn), Some(bytes)) = (drawn, block(cell)) else {
                continue;
            };
            let figure = drawn.figure;
            // Side by side, so that no interval hides another.
            let beside = (n as f64 - (names.len() - 1) as f64 / 2.0) * DODGE;
            let at = (x.at(bytes as f64) + beside, y.at(figure.median));
            points.push(at);
            svg.line(
                (at.0, y.at(figure.low)),
                (at.0, y.at(figure.high)),
                &format!("curve {class}"),
            );
            let attributes = format!(
                " data-cell=\"{}\" data-side=\"{}\" data-metric=\"{}\" data-value=\"{}\"",
                escape(&cell.name),
                escape(name),
                metric.name(),
                figure.median
            );
            let over = format!(
                "{name}, {}: {} ({}–{})",
                size::human(bytes),
                number(metric, figure.median),
                number(metric, figure.low),
                number(metric, figure.high)
            );
            svg.dot(at, &format!("f{}", n % COLOURS), &attributes, &over);
        }
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        svg.curve(&points, &class, name);
    }
    Some(Chart {
        name: file_name(&["over-blocks", load, &metric.name()]),
        svg: svg.finish(WIDTH, bottom + 26.0, &title),
        title,
        cell: None,
    })
}

fn frame(svg: &mut Svg, y: &Scale, (top, bottom): (f64, f64), unit: &str) {
    for value in y.ticks() {
        let at = y.at(value);
        svg.line((LEFT, at), (WIDTH - RIGHT, at), "grid");
        svg.text(LEFT - 6.0, at + 4.0, Anchor::End, "dim", &tick(value));
    }
    svg.line((LEFT, top), (LEFT, bottom), "axis");
    svg.line((LEFT, bottom), (WIDTH - RIGHT, bottom), "axis");
    svg.text(0.0, top - 4.0, Anchor::Start, "dim", unit);
}

/// Latency over percentiles, from the median to the slowest of 10,000.
pub fn percentiles(cell: &Cell) -> Option<Chart> {
    const PARTS: [(f64, &str); 6] = [
        (0.5, "50 %"),
        (0.9, "90 %"),
        (0.99, "99 %"),
        (0.999, "99.9 %"),
        (0.9999, "99.99 %"),
        (0.99999, ""),
    ];
    let sides: Vec<_> = cell
        .sides
        .iter()
        .filter(|side| side.latency.count() as usize >= POINTS_MIN)
        .take(CURVES_MAX)
        .collect();
    let least = sides
        .iter()
        .filter_map(|s| quantile_us(s, 0.5))
        .reduce(f64::min)?;
    let most = sides
        .iter()
        .filter_map(|s| quantile_us(s, 0.9999))
        .reduce(f64::max)?;
    let left_out = cell.sides.len() - sides.len();
    let title = format!(
        "{}: latency of the slowest requests{}",
        cell.name,
        match left_out {
            0 => String::new(),
            n => format!(" ({n} more sides in the table)"),
        }
    );
    let mut svg = Svg::default();
    svg.text(0.0, 16.0, Anchor::Start, "head", &title);
    let names: Vec<String> = sides.iter().map(|side| side.name.clone()).collect();
    let top = 46.0 + legend(&mut svg, &names, (LEFT, 38.0));
    let bottom = top + HEIGHT;
    // Each nine takes as much room as the one before.
    let place = |part: f64| 1.0 / (1.0 - part);
    let x = Scale::log(place(0.5), place(0.99995), LEFT, WIDTH - RIGHT);
    let y = Scale::log(least * 0.8, most * 1.25, bottom, top);
    frame(&mut svg, &y, (top, bottom), "µs");
    for (part, label) in PARTS {
        let at = x.at(place(part));
        if !label.is_empty() {
            svg.line((at, top), (at, bottom), "grid");
            svg.text(at, bottom + 16.0, Anchor::Middle, "dim", label);
        }
    }
    for (n, side) in sides.iter().enumerate() {
        let count = side.latency.count() as f64;
        let steps = (0..=64).map(|n| 1.0 - 0.5 * 0.0001_f64.powf(f64::from(n) / 64.0));
        // What fewer than one request in so many would show is not known.
        let known = steps.filter(|part| count * (1.0 - part) >= 1.0);
        let points: Vec<(f64, f64)> = known
            .filter_map(|part| Some((x.at(place(part)), y.at(quantile_us(side, part)?))))
            .collect();
        let over = format!(
            "{}: {} requests, half within {:.1} µs",
            side.name,
            side.latency.count(),
            quantile_us(side, 0.5).unwrap_or_default()
        );
        svg.curve(&points, &format!("s{}", n % COLOURS), &over);
    }
    Some(Chart {
        name: file_name(&["percentiles", &cell.name]),
        svg: svg.finish(WIDTH, bottom + 26.0, &title),
        title,
        cell: Some(cell.name.clone()),
    })
}
