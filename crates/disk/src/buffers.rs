//! A queue's own buffers: kept for reuse, within a bound.

use io::memory::AlignedBuf;

/// Alignment of buffers, and what their lengths are multiples of: a page, so that `O_DIRECT` takes
/// them as they are.
const PAGE: usize = 4096;

/// Bytes of idle buffers that are kept.
const KEPT_BYTES_MAX: usize = 4 << 20;

/// Idle buffers, smallest first.
#[derive(Debug)]
pub(crate) struct Buffers {
    idle: Vec<AlignedBuf>,
    idle_bytes: usize,
    kept_bytes_max: usize,
}

impl Buffers {
    /// None yet; `more` bytes of idle ones are kept beyond what every queue does.
    pub fn new(more: usize) -> Self {
        Self {
            idle: Vec::new(),
            idle_bytes: 0,
            kept_bytes_max: KEPT_BYTES_MAX + more,
        }
    }

    /// A buffer of at least `len` bytes with any content.
    pub fn take(&mut self, len: usize) -> AlignedBuf {
        let found = self.idle.partition_point(|b| b.len() < len);
        if found < self.idle.len() {
            let buffer = self.idle.remove(found);
            self.idle_bytes -= buffer.len();
            buffer
        } else {
            AlignedBuf::new(len.max(1).next_multiple_of(PAGE), PAGE)
        }
    }

    /// Takes one back.
    pub fn give(&mut self, buffer: AlignedBuf) {
        let len = buffer.len();
        if self.idle_bytes + len <= self.kept_bytes_max {
            let at = self.idle.partition_point(|b| b.len() < len);
            self.idle.insert(at, buffer);
            self.idle_bytes += len;
        }
    }
}
