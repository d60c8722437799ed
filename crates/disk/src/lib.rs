//! A served disk: requests in, engine operations out.
//!
//! A [`Disk`] is a chain of images and what the threads that serve it share; a [`DiskQueue`] is one
//! thread's entrance to it. A request's way:
//!
//! ```text
//!   submit ─▶ check ─▶ ask the format ─▶ issue at the engine ─▶ completed ─▶ [commit] ─▶ done
//!             queue.rs   read.rs write.rs    sub.rs                           flush.rs
//!                        fill.rs (new clusters, copy-on-write), needs.rs (what must come first)
//! ```
//!
//! Requests of different queues meet only in what they share: an allocation or a metadata block under
//! way ([`wait`]), a commit ([`commit`]), space that was freed ([`grace`]). Who flushes after each write finds the commit begun
//! ([`habit`]).

#![deny(unsafe_op_in_unsafe_fn)]

pub mod blocking;
mod buffers;
pub mod chain;
mod clock;
mod commit;
mod cover;
mod crypt;
mod disk;
mod fill;
mod flush;
mod grace;
mod habit;
mod memory;
mod needs;
mod packed;
mod queue;
mod read;
mod request;
mod stats;
mod sub;
mod unsynced;
mod wait;
mod write;

pub use chain::{Chain, ChainOptions, Layer};
pub use clock::now_ns;
pub use disk::{Disk, DiskOptions};
pub use queue::{DiskQueue, QueueOptions};
pub use request::{Done, Request, StatusExtent, TableFull};
pub use stats::{OpStatistics, QueueTrace, Statistics};
