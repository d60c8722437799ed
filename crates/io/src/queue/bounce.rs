//! The bounded pool of aligned memory of one engine.

use crate::memory::AlignedBuf;

/// Bytes of one chunk: also the most that one step of a bounced operation moves.
pub(crate) const CHUNK: usize = 256 << 10;
/// Chunks of one engine: 8 MiB. An operation that finds none free waits for one.
const CHUNKS_MAX: usize = 32;
/// No device has larger blocks (see `file::open`).
const ALIGN: usize = 64 << 10;

/// Chunks are made when they are first needed and kept.
#[derive(Default)]
pub(super) struct BouncePool {
    chunks: Vec<AlignedBuf>,
    free: Vec<u32>,
}

impl BouncePool {
    /// A chunk, or `None` while all are in use.
    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(chunk) = self.free.pop() {
            return Some(chunk);
        }
        if self.chunks.len() == CHUNKS_MAX {
            return None;
        }
        if self.chunks.is_empty() {
            self.free.reserve(CHUNKS_MAX);
        }
        self.chunks.push(AlignedBuf::new(CHUNK, ALIGN));
        Some(self.chunks.len() as u32 - 1)
    }

    pub(super) fn give(&mut self, chunk: u32) {
        self.free.push(chunk);
    }

    pub(super) fn at(&self, chunk: u32, offset: usize) -> *mut u8 {
        debug_assert!(offset < CHUNK);
        self.chunks[chunk as usize].as_ptr().wrapping_add(offset)
    }

    pub(super) fn fill_zero(&mut self, chunk: u32, from: usize, to: usize) {
        if from < to {
            self.chunks[chunk as usize][from..to].fill(0);
        }
    }
}
