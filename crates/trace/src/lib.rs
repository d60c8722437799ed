//! Where the time of requests goes.
//!
//! Each queue of a disk notes, for every request that ends, when it reached each stage of its way:
//!
//! ```text
//!   arrived ─ring─▶ taken ─parse─▶ parsed ─map─▶ mapped ─submit─▶ submitted ─device─▶ device done
//!           ─commit─▶ completed ─complete─▶ told ─notify─▶ notified
//! ```
//!
//! - [`Stage`], [`Stamps`], [`Entry`]: the words. The stages of an entry add up to its whole time, exactly.
//! - [`Ring`]: the last so many entries of a queue, written by its thread with plain stores and read by anybody at any time.
//! - [`Slowest`]: the slowest requests since the queue began.
//! - [`Histograms`]: counts per operation and stage.
//! - [`Breakdown`]: where time went in a run, as the study in [`breakdown`] does it.

#![forbid(unsafe_code)]

pub mod breakdown;
mod cell;
mod entry;
mod histogram;
mod ring;
mod slowest;
mod stage;

pub use breakdown::Breakdown;
pub use entry::{Entry, Operation, Status};
pub use histogram::{Counter, Histograms, Snapshot};
pub use ring::{RING_ENTRIES_DEFAULT, RING_ENTRIES_MAX, Read, Ring};
pub use slowest::{SLOWEST_MAX, Slowest};
pub use stage::{STAGES, Stage, Stamps, Times};
