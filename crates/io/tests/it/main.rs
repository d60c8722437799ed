//! All engines: the same promises, counted calls, files and locks.
//!
//! One program: the linker takes longer than most of the tests.

#[path = "../common/mod.rs"]
mod common;

mod conformance;
mod counters;
mod files;
mod locks;
