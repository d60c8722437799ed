//! Reports: one page of HTML that needs nothing else, single charts, and a summary for the terminal.

pub mod chart;
mod failures;
mod html;
mod model;
mod terminal;

pub use html::html;
pub use model::{Cell, Drawn, Model, Side};
pub use terminal::terminal;
