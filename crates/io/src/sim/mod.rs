//! Simulated storage: a disk in memory and the engine that drives it in virtual time.

mod disk;
mod engine;

pub use disk::{Fault, FaultOp, LogEntry, SimDisk, SimOptions};
pub(crate) use engine::Sim;
