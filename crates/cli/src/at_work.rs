//! What a measurement is at, and since when: a line on a terminal, and nothing anywhere else.

use indicatif::{ProgressBar, ProgressStyle};
use std::{io::IsTerminal as _, time::Duration};

/// How often the line is drawn: seldom enough to take nothing from what is measured.
const TICK: Duration = Duration::from_millis(500);

/// A line that says so until it is dropped.
pub(crate) fn line(what: impl Into<String>) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner().with_message(block::plain(&what.into()));
    // The template is a constant that the library accepts.
    if let Ok(style) = ProgressStyle::with_template("{msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(TICK);
    bar
}
