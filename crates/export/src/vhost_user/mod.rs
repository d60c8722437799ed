//! vhost-user-blk: a disk for a virtual machine, over shared memory.
//!
//! ```text
//!   VMM ── Unix socket ──▶ server   one control thread for each socket
//!                            └ device    features, memory, rings: what messages set up
//!   guest ── shared memory ──▶ queue     one session on a worker for each virtqueue (the data path)
//!                            ├ ring      split or packed virtqueue: indices, descriptors, notifications
//!                            ├ chain     descriptors to pieces of memory
//!                            ├ request   header and segments to disk operations
//!                            └ inflight  what a killed server leaves to the next
//!              memory, guard   mapped regions, and what happens when one is truncated
//! ```
//!
//! Messages are parsed by crate `vhost`; rings and requests are our own. Followed are virtio 1.2
//! (§2.7 split and §2.8 packed virtqueues, §5.2 block device) and QEMU's `docs/interop/vhost-user.rst`.
//!
//! Everything from the client is hostile. What it can break is its own: a request that makes
//! no sense fails; a ring that makes no sense stops (its error descriptor is signalled, and
//! the client may set it up anew); a message that makes no sense closes the connection.

mod chain;
mod config;
mod device;
mod guard;
mod inflight;
mod lookahead;
mod memory;
mod queue;
mod request;
mod ring;
mod server;
mod spec;

pub use server::Server;

use crate::worker::WorkerHandle;
use block::{Error, Result, limits::QUEUE_DEPTH_MAX};
use disk::Disk;
use std::{path::Path, sync::Arc};

/// Queues that one device can have: more than any guest has processors that need their own.
pub const QUEUES_MAX: u16 = 256;

/// How a disk is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Request queues, at most [`QUEUES_MAX`].
    pub queues: u16,
    /// Entries of a ring at most: a power of two up to [`QUEUE_DEPTH_MAX`].
    pub queue_size_max: u16,
    /// Segments of a request that the driver is told to stay below; the ring of a driver without
    /// indirect descriptors must hold them and two more.
    pub seg_max: u16,
    /// Answer to get-id (`/sys/block/vdX/serial`); the first 20 bytes count.
    pub serial: String,
}

impl Default for Options {
    /// One queue of up to 1024 entries. 126 segments fit QEMU's default ring of 128.
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size_max: QUEUE_DEPTH_MAX,
            seg_max: 126,
            serial: String::new(),
        }
    }
}

/// The vhost-user-blk export.
#[derive(Debug)]
pub struct VhostUser;

impl VhostUser {
    /// Listens on a Unix socket at `path` and serves `disk` to one client after another. The queues
    /// run on `workers` in turn. Returns when clients can connect.
    ///
    /// A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    ///
    /// When the options are impossible or the socket cannot be made.
    pub fn serve(
        path: &Path,
        disk: Arc<Disk>,
        workers: &[WorkerHandle],
        options: Options,
    ) -> Result<Server> {
        if workers.is_empty() {
            return Err(Error::invalid("no I/O thread to serve on"));
        }
        if options.queues == 0 || options.queues > QUEUES_MAX {
            return Err(Error::invalid(format!(
                "{} queues: 1 to {QUEUES_MAX} are possible",
                options.queues
            )));
        }
        let size = options.queue_size_max;
        if !size.is_power_of_two() || size > QUEUE_DEPTH_MAX {
            return Err(Error::invalid(format!(
                "rings of {size} entries: a power of two up to {QUEUE_DEPTH_MAX} is possible"
            )));
        }
        let seg_limit = block::limits::REQUEST_SEGMENTS_MAX;
        if options.seg_max == 0 || usize::from(options.seg_max) > seg_limit {
            return Err(Error::invalid(format!(
                "{} segments: 1 to {seg_limit} are possible",
                options.seg_max
            )));
        }
        Server::start(path, disk, workers, options)
    }
}

#[cfg(test)]
mod tests;
