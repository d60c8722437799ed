//! A queue's own buffers: kept for reuse, within a bound.

use crate::memory::Buffer;

/// Bytes of idle buffers that are kept.
const KEPT_BYTES_MAX: usize = 4 << 20;

/// Idle buffers, smallest first.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    idle: Vec<Buffer>,
    idle_bytes: usize,
    /// Bytes handed out.
    used_bytes: usize,
}

impl Buffers {
    /// A buffer of at least `len` bytes with any content.
    pub fn take(&mut self, len: usize) -> Buffer {
        let found = self.idle.partition_point(|b| b.capacity() < len);
        let buffer = if found < self.idle.len() {
            let buffer = self.idle.remove(found);
            self.idle_bytes -= buffer.capacity();
            buffer
        } else {
            Buffer::new(len)
        };
        self.used_bytes += buffer.capacity();
        buffer
    }

    /// Takes one back.
    pub fn give(&mut self, buffer: Buffer) {
        let len = buffer.capacity();
        self.used_bytes -= len;
        if self.idle_bytes + len <= KEPT_BYTES_MAX {
            let at = self.idle.partition_point(|b| b.capacity() < len);
            self.idle.insert(at, buffer);
            self.idle_bytes += len;
        }
    }

    /// Bytes handed out.
    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }
}
