//! Tables for people: columns without lines between them.

use comfy_table::{CellAlignment, Table, presets};
use std::fmt::Write as _;

/// An empty one without a head.
pub fn bare() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

/// An empty one with this head; columns behind the first `left` are aligned right.
pub fn headed(header: &[&str], left: usize) -> Table {
    let mut table = bare();
    table.set_header(header.iter().copied());
    for column in table.column_iter_mut().skip(left) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Its lines, each from its first character on.
pub fn text(table: &Table) -> String {
    each(table, |line| line.trim())
}

/// Its lines, where first cells may be empty.
pub fn indented(table: &Table) -> String {
    each(table, |line| line.trim_end())
}

fn each(table: &Table, cut: impl Fn(&str) -> &str) -> String {
    let mut text = String::new();
    for line in table.lines() {
        let _ = writeln!(text, "{}", cut(&line));
    }
    text
}
