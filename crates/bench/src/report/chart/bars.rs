//! Bars with the interval of their median, in groups: a group is a cell, a bar one of its sides.

use super::{
    Chart, WIDTH, beside, colours, file_name, server,
    svg::{Anchor, Scale, Svg, escape, tick},
};
use crate::{
    metric::{Metric, number},
    report::model::{Cell, Model},
};

const ROW: f64 = 19.0;
const RIGHT: f64 = 130.0;

/// Bars of a figure for all cells that are not drawn over sizes of requests.
pub fn bars(model: &Model, metric: Metric) -> Option<Chart> {
    let cells: Vec<&Cell> = model
        .cells
        .iter()
        .filter(|cell| super::lines::block(cell).is_none())
        .filter(|cell| cell.sides.iter().any(|s| s.figures.contains_key(&metric)))
        .collect();
    if cells.is_empty() {
        return None;
    }
    let colours = colours(model.cells.iter().flat_map(|cell| &cell.sides));
    let title = format!(
        "{} ({}), median and 95 % interval",
        metric.title(),
        metric.better()
    );
    let mut svg = Svg::default();
    svg.text(0.0, 16.0, Anchor::Start, "head", &title);
    let names = cells.iter().flat_map(|cell| &cell.sides);
    let left = beside(names.map(|side| side.name.as_str()));
    let mut y = 30.0;
    for cell in cells {
        let drawn: Vec<_> = cell
            .sides
            .iter()
            .filter_map(|side| Some((side, side.figures.get(&metric)?)))
            .collect();
        let most = drawn.iter().map(|(_, d)| d.figure.high).fold(0.0, f64::max);
        // Each group has its own scale: cells differ by orders of magnitude.
        let scale = Scale::linear(most, left, WIDTH - RIGHT);
        let bottom = y + 22.0 + ROW * drawn.len() as f64;
        svg.text(0.0, y + 14.0, Anchor::Start, "head", &cell.name);
        for value in scale.ticks() {
            let x = scale.at(value);
            svg.line((x, y + 20.0), (x, bottom), "grid");
            svg.text(x, bottom + 13.0, Anchor::Middle, "dim", &tick(value));
        }
        y += 22.0;
        for (side, drawn) in drawn {
            let figure = drawn.figure;
            let middle = y + ROW / 2.0;
            svg.text(left - 8.0, middle + 4.0, Anchor::End, "", &side.name);
            let attributes = format!(
                " data-cell=\"{}\" data-side=\"{}\" data-metric=\"{}\" data-value=\"{}\"",
                escape(&cell.name),
                escape(&side.name),
                metric.name(),
                figure.median
            );
            let over = format!(
                "{}: {} ({}–{}), {} rounds, mean {} ± {}",
                side.name,
                number(metric, figure.median),
                number(metric, figure.low),
                number(metric, figure.high),
                figure.rounds,
                number(metric, drawn.mean),
                number(metric, drawn.deviation)
            );
            let colour = colours.get(server(&side.name)).copied().unwrap_or_default();
            svg.rect(
                [left, y + 3.0, scale.at(figure.median) - left, ROW - 6.0],
                &format!("f{colour}"),
                &attributes,
                &over,
            );
            let (low, high) = (scale.at(figure.low), scale.at(figure.high));
            svg.line((low, middle), (high, middle), "whisker");
            for x in [low, high] {
                svg.line((x, middle - 3.5), (x, middle + 3.5), "whisker");
            }
            let label = number(metric, figure.median);
            let x = high.max(scale.at(figure.median)) + 7.0;
            svg.text(x, middle + 4.0, Anchor::Start, "", &label);
            y += ROW;
        }
        svg.line((left, bottom), (WIDTH - RIGHT, bottom), "axis");
        y = bottom + 26.0;
    }
    Some(Chart {
        name: file_name(&["bars", &metric.name()]),
        svg: svg.finish(WIDTH, y, &title),
        title,
        cell: None,
    })
}
