//! Simulated storage: a disk in memory and the engine that drives it in virtual time.

mod content;
mod disk;
mod engine;
mod fault;
mod log;
mod outage;
mod rng;

pub use disk::{SimDisk, SimOptions};
pub(crate) use engine::Sim;
pub use fault::{Fault, FaultOp};
pub use log::{Change, LogEntry, SimClock};
pub use outage::{Keep, Outage};
