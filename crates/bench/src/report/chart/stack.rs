//! Where diskplane's time goes: the mean times of a request's stages, one behind the other.

use super::{
    Chart, WIDTH, beside, file_name, legend,
    svg::{Anchor, Scale, Svg, tick},
};
use crate::report::model::Model;
use trace::Stage;

const ROW: f64 = 22.0;
const RIGHT: f64 = 80.0;

/// The stages of the operation that each side did most.
pub fn stack(model: &Model) -> Option<Chart> {
    let mut rows = Vec::new();
    for cell in &model.cells {
        for side in &cell.sides {
            let most = side.stages.iter().max_by_key(|(_, stages)| stages.count);
            if let Some((operation, stages)) = most.filter(|(_, s)| s.total_us() > 0.0) {
                rows.push((format!("{}, {}: {operation}", cell.name, side.name), stages));
            }
        }
    }
    if rows.is_empty() {
        return None;
    }
    let names = Stage::ALL.map(|stage| stage.name().to_owned());
    let title = "Where the time goes in diskplane: stages of a request, mean".to_owned();
    let mut svg = Svg::default();
    svg.text(0.0, 16.0, Anchor::Start, "head", &title);
    let mut y = 34.0 + legend(&mut svg, &names, (0.0, 38.0));
    let left = beside(rows.iter().map(|(name, _)| name.as_str()));
    // Large requests take a thousand times as long as small ones: parts of each, and the time beside them.
    let scale = Scale::linear(100.0, left, WIDTH - RIGHT);
    let bottom = y + ROW * rows.len() as f64;
    for value in scale.ticks() {
        let x = scale.at(value);
        svg.line((x, y), (x, bottom), "grid");
        svg.text(
            x,
            bottom + 14.0,
            Anchor::Middle,
            "dim",
            &format!("{value} %"),
        );
    }
    for (name, stages) in rows {
        svg.text(left - 8.0, y + ROW / 2.0 + 4.0, Anchor::End, "", &name);
        let total = stages.total_us();
        let mut before = 0.0;
        for (n, stage) in Stage::ALL.into_iter().enumerate() {
            let us = stages.mean_us(stage);
            let (from, to) = (
                scale.at(before / total * 100.0),
                scale.at((before + us) / total * 100.0),
            );
            let over = format!("{stage}: {us:.2} µs, {:.1} %", us / total * 100.0);
            svg.rect(
                [from, y + 4.0, to - from, ROW - 8.0],
                &format!("f{n}"),
                "",
                &over,
            );
            before += us;
        }
        let label = format!("{} µs", tick(total));
        svg.text(
            WIDTH - RIGHT + 6.0,
            y + ROW / 2.0 + 4.0,
            Anchor::Start,
            "",
            &label,
        );
        y += ROW;
    }
    Some(Chart {
        name: file_name(&["stages"]),
        svg: svg.finish(WIDTH, bottom + 24.0, &title),
        title,
        cell: None,
    })
}
