//! Memory for payloads: page-aligned buffers, reused, within one connection's budget.
//!
//! Each connection has a budget of its own, so that clients who hold all of theirs (by
//! never reading their replies, say) take nothing from the others; the server's total is the budget
//! times its connections.

use io::memory::AlignedBuf;
use nbd::proto::PAYLOAD_BYTES_MAX;

/// Alignment of buffers: enough for O_DIRECT on every device, so that nothing bounces.
const ALIGN: usize = 4096;
/// The smallest class.
const CLASS_BYTES_MIN: usize = ALIGN;
/// Classes are powers of two from 4 KiB to the largest payload.
const CLASSES: usize = (PAYLOAD_BYTES_MAX.ilog2() - (CLASS_BYTES_MIN as u32).ilog2()) as usize + 1;
/// Bytes of payload that one connection may hold: one request of the largest size,
/// or what a client with 64 requests of 512 KiB in flight needs.
pub(crate) const CONNECTION_BYTES_MAX: usize = PAYLOAD_BYTES_MAX as usize;
/// Bytes that a connection with nothing in flight keeps for its next requests.
const IDLE_BYTES_MAX: usize = 8 << 20;

/// Page-aligned memory of a class's size.
pub(crate) type Buffer = AlignedBuf;

/// The class of a buffer for `len` bytes, and that class's size in bytes.
fn class_of(len: usize) -> Option<(usize, usize)> {
    let size = len.max(CLASS_BYTES_MIN).checked_next_power_of_two()?;
    let class = (size.ilog2() - CLASS_BYTES_MIN.ilog2()) as usize;
    (class < CLASSES).then_some((class, size))
}

/// A connection's buffers.
#[derive(Debug)]
pub(crate) struct Pool {
    free: [Vec<Buffer>; CLASSES],
    /// Bytes in `free`.
    free_bytes: usize,
    /// Bytes handed out.
    used_bytes: usize,
}

impl Pool {
    pub(crate) fn new() -> Self {
        Self {
            free: std::array::from_fn(|_| Vec::new()),
            free_bytes: 0,
            used_bytes: 0,
        }
    }

    /// Whether [`Pool::take`] would give `len` bytes now.
    pub(crate) fn fits(&self, len: usize) -> bool {
        class_of(len).is_some_and(|(_, size)| self.used_bytes + size <= CONNECTION_BYTES_MAX)
    }

    /// A buffer of at least `len` bytes with any content; `None` while the budget is used, or
    /// when `len` is above the largest class.
    pub(crate) fn take(&mut self, len: usize) -> Option<Buffer> {
        if !self.fits(len) {
            return None;
        }
        let (class, size) = class_of(len)?;
        self.used_bytes += size;
        if let Some(buffer) = self.free[class].pop() {
            self.free_bytes -= size;
            return Some(buffer);
        }
        // What is kept counts too: make room from other classes, the largest first.
        self.trim(CONNECTION_BYTES_MAX - self.used_bytes);
        Some(AlignedBuf::new(size, ALIGN))
    }

    /// Takes a buffer back.
    pub(crate) fn give(&mut self, buffer: Buffer) {
        self.used_bytes -= buffer.len();
        self.free_bytes += buffer.len();
        if let Some((class, _)) = class_of(buffer.len()) {
            self.free[class].push(buffer);
        }
        if self.used_bytes == 0 {
            self.trim(IDLE_BYTES_MAX);
        }
    }

    fn trim(&mut self, keep_bytes: usize) {
        for class in self.free.iter_mut().rev() {
            while self.free_bytes > keep_bytes
                && let Some(buffer) = class.pop()
            {
                self.free_bytes -= buffer.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buffers_are_aligned_and_large_enough() {
        let mut pool = Pool::new();
        for len in [0, 1, 4096, 4097, 100_000, 32 << 20] {
            let buffer = pool.take(len).unwrap();
            assert_eq!(buffer.as_ptr().addr() % ALIGN, 0);
            assert!(buffer.len() >= len);
            pool.give(buffer);
        }
        assert!(pool.take((32 << 20) + 1).is_none());
        assert!(pool.take(usize::MAX).is_none());
    }

    #[test]
    fn a_buffer_is_used_again() {
        let mut pool = Pool::new();
        let buffer = pool.take(5000).unwrap();
        let address = buffer.as_ptr();
        pool.give(buffer);
        assert_eq!(pool.take(8000).unwrap().as_ptr(), address);
    }

    #[test]
    fn an_idle_connection_keeps_little() {
        let mut pool = Pool::new();
        let buffer = pool.take(32 << 20).unwrap();
        pool.give(buffer);
        assert_eq!(pool.free_bytes, 0);
        let buffers: Vec<_> = (0..64).map(|_| pool.take(256 << 10).unwrap()).collect();
        for buffer in buffers {
            pool.give(buffer);
        }
        assert_eq!(pool.free_bytes, IDLE_BYTES_MAX);
    }

    proptest! {
        /// Used and kept bytes never exceed the budget, and all can be given back.
        #[test]
        fn the_budget_holds(steps in proptest::collection::vec((any::<bool>(), 0usize..(40 << 20)), 0..60)) {
            let mut pool = Pool::new();
            let mut out = Vec::new();
            for (take, len) in steps {
                if take {
                    let fits = pool.fits(len);
                    let got = pool.take(len);
                    prop_assert_eq!(got.is_some(), fits);
                    out.extend(got);
                } else if !out.is_empty() {
                    let at = len % out.len();
                    pool.give(out.swap_remove(at));
                }
                let used: usize = out.iter().map(|b: &Buffer| b.len()).sum();
                let kept: usize = pool.free.iter().flatten().map(|b| b.len()).sum();
                prop_assert_eq!(used, pool.used_bytes);
                prop_assert_eq!(kept, pool.free_bytes);
                prop_assert!(used + kept <= CONNECTION_BYTES_MAX);
            }
        }
    }
}
