//! Files and the engines that move bytes between them and memory.
//!
//! [`Engine`] is the contract; [`File`] is what it works on.

mod choose;
mod engine;
mod eventfd;
mod file;
mod gate;
mod memory;
mod native;
mod poller;
mod pool;
mod queue;
mod runner;
mod sim;
mod sys;
mod threads;
mod uring;

pub use choose::{Choice, EngineOptions, choose, open_engine};
pub use engine::{
    Aio, Cache, Completion, Counters, Engine, EngineKind, Events, FileSlot, Io, IoOp, Token, Wait,
};
pub use eventfd::{EventFd, Waker};
pub use file::{Alignment, File, FileKind, Lock, OpenOptions};
pub use sim::{Fault, FaultOp, LogEntry, SimDisk, SimOptions};
