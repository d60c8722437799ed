//! Which requests are in flight, in memory that outlives the server.
//!
//! A server that is killed leaves requests behind that it took and did not answer. The rings alone
//! do not tell which, since requests end in any order. So the front-end keeps a file in which
//! the server notes each (QEMU `docs/interop/vhost-user.rst`, "Inflight I/O tracking"), and
//! hands it to the next server, which does them again. Each queue has a region of the file, whose layout is that
//! of its ring: split or packed.
//!
//! The file comes from the client, so its contents are as hostile as a ring's. They can
//! only make a server do the client's own requests again.

mod packed;
mod split;

pub(super) use packed::Packed;
pub(super) use split::Split;

use super::memory::Region;
use block::{Error, Result};
use std::sync::Arc;

/// Keeps queues apart in the cache.
const ALIGN: u64 = 64;
/// Version of both layouts; in a file that nobody has used yet there is 0.
const VERSION: u16 = 1;

/// A file for requests in flight, and which part of it is meant.
#[derive(Clone)]
pub struct File {
    /// The file, mapped.
    pub(super) region: Arc<Region>,
    /// Which queue.
    pub(super) index: usize,
    /// For how many entries the file was made.
    pub(super) size: u16,
}

impl File {
    /// The bytes of the queue, each of whose regions has so many.
    fn part(&self, queue_bytes: u64) -> Result<*mut u8> {
        let start = queue_bytes.checked_mul(self.index as u64);
        start
            .and_then(|start| self.region.range(start, queue_bytes))
            .filter(|base| base.addr().is_multiple_of(ALIGN as usize))
            .ok_or_else(|| {
                Error::invalid(format!(
                    "the inflight file has no room for queue {}",
                    self.index
                ))
            })
    }
}

/// Bytes of a region with so many entries.
fn region_bytes(header: u64, entry: u64, size: u16) -> u64 {
    block::align_up(header + u64::from(size) * entry, ALIGN)
}

/// Bytes of the file for `queues` queues of `size` entries.
pub(super) fn file_bytes(packed: bool, queues: u16, size: u16) -> u64 {
    let queue = if packed {
        packed::queue_bytes(size)
    } else {
        split::queue_bytes(size)
    };
    queue * u64::from(queues)
}
