//! Charts: from the model to SVG. Each says in its title what is shown, and over each shape its number.

mod bars;
mod heat;
mod lines;
mod parts;
mod stack;
pub mod svg;
mod verdicts;

pub use bars::bars;
pub use heat::heat;
pub use lines::{over_blocks, percentiles};
pub use parts::parts;
pub use stack::stack;
pub use verdicts::verdicts;

use super::model::{Model, Side};
use crate::metric::Metric;
use std::collections::BTreeMap;
use svg::{Anchor, COLOURS, Svg};

/// Pixels of a chart.
const WIDTH: f64 = 760.0;

/// A chart of a report.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Its name as a file, without extension.
    pub name: String,
    /// What it shows.
    pub title: String,
    /// The cell that it is about, if it is about one.
    pub cell: Option<String>,
    /// The `svg` element.
    pub svg: String,
}

/// Every chart of a report, in its order.
pub fn charts(model: &Model) -> Vec<Chart> {
    let mut charts = Vec::new();
    charts.extend(verdicts(model));
    let mut figures = model.figures.clone();
    for metric in [Metric::CpuPercentPerMb] {
        if !figures.contains(&metric) {
            figures.push(metric);
        }
    }
    for metric in figures {
        charts.extend(over_blocks(model, metric));
        charts.extend(bars(model, metric));
    }
    charts.extend(parts(model));
    charts.extend(stack(model));
    for (n, cell) in model.cells.iter().enumerate() {
        charts.extend(percentiles(cell));
        // They are large; one side of each kind tells most.
        if n < HEAT_CELLS {
            charts.extend(
                cell.sides
                    .iter()
                    .take(HEAT_SIDES)
                    .filter_map(|side| heat(cell, side)),
            );
        }
    }
    charts
}

/// Cells that have heat maps, and sides of each.
const HEAT_CELLS: usize = 8;
const HEAT_SIDES: usize = 4;

/// A name for files.
pub(crate) fn file_name(parts: &[&str]) -> String {
    let text = parts.join("-").to_lowercase();
    let keep = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let mut name: String = text.chars().map(keep).collect();
    while name.contains("--") {
        name = name.replace("--", "-");
    }
    name.trim_matches('-').to_owned()
}

/// Colours by the server: the first word of a side's name.
fn colours<'a>(sides: impl Iterator<Item = &'a Side>) -> BTreeMap<String, usize> {
    let mut colours = BTreeMap::new();
    for side in sides {
        let next = colours.len() % COLOURS;
        colours.entry(server(&side.name).to_owned()).or_insert(next);
    }
    colours
}

fn server(name: &str) -> &str {
    name.split([' ', ',']).next().unwrap_or(name)
}

/// Where bars begin, so that the longest of the names beside them has room.
fn beside<'a>(names: impl Iterator<Item = &'a str>) -> f64 {
    let longest = names.map(|name| name.chars().count()).max();
    (longest.unwrap_or_default() as f64 * 6.6 + 12.0).clamp(190.0, WIDTH / 2.0)
}

/// Names of series with their colours, from left to right in as many lines as that takes; how high it is.
fn legend(svg: &mut Svg, names: &[String], at: (f64, f64)) -> f64 {
    let coloured = |(n, name): (usize, &String)| (name.clone(), format!("f{}", n % COLOURS));
    let names: Vec<(String, String)> = names.iter().enumerate().map(coloured).collect();
    legend_of(svg, &names, at)
}

/// The same of names with their classes.
fn legend_of(svg: &mut Svg, names: &[(String, String)], (left, top): (f64, f64)) -> f64 {
    let (mut x, mut y) = (left, top);
    for (name, class) in names {
        let width = 34.0 + name.chars().count() as f64 * 6.8;
        if x + width > WIDTH && x > left {
            x = left;
            y += 18.0;
        }
        svg.rect([x, y - 9.0, 10.0, 10.0], class, "", "");
        svg.text(x + 15.0, y, Anchor::Start, "", name);
        x += width;
    }
    y - top + 18.0
}
