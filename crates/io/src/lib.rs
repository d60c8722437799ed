//! Files and the engines that move bytes between them and memory.
//!
//! ```text
//!   File      an image file or device: kind, O_DIRECT and what it demands, QEMU's locks;   file, gate
//!             block::Storage for everything that may block; a disk of a server in its place
//!   Engine    stage … turn: one system call for a batch                                    engine
//!     │  queue: slots, merging, bounce memory, short transfers, retries                    queue
//!     │  turn, the same for all                                                            runner
//!     ├─ threads   preadv, pwritev, fdatasync in a bounded pool                            threads, pool
//!     ├─ native    Linux AIO                                                               native
//!     ├─ io_uring                                                                          uring
//!     └─ sim       SimDisk in virtual time                                                 sim
//!   Waker, EventFd    wake the thread of an engine                                         eventfd
//! ```
//!
//! [`choose`] picks an engine for some files and says why, [`open_engine`] makes it. To add an engine,
//! implement `runner::Backend` (how steps reach the kernel, how their end is seen, how the
//! thread sleeps) and add it to [`EngineKind`]; `tests/it/conformance.rs` then runs it beside the others.
//!
//! Memory is lent to an engine through raw pointers ([`Engine::stage`]). Unsafe code is in the modules
//! that pass these on or call the kernel (`sys`, `memory`, `pool`, `native`, `uring`), and where `queue`
//! and `sim` copy bytes between the callers' memory and their own.
//!
//! What the caller sees to: cache modes that make each write stable ([`Cache::writethrough`])
//! need an [`IoOp::Sync`] behind each write; flushes of cache mode `unsafe` are ignored here.

mod choose;
mod engine;
mod eventfd;
mod file;
mod gate;
pub mod memory;
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
pub use file::{
    Alignment, File, FileKind, Lock, OpenOptions, Remote, refuse_as_image, wait_for_lock,
};
pub use sim::{Change, Fault, FaultOp, Keep, LogEntry, Outage, SimClock, SimDisk, SimOptions};
