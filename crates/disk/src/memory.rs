//! The disk layer's only unsafe code: touching request memory and staging
//! operations on it.
//!
//! Everything here rests on one promise, made by the caller of
//! [`DiskQueue::submit`](crate::DiskQueue::submit): the array of pieces and the memory that it describes
//! stay valid until the request's `Done` was taken. A request ends
//! only when none of its engine operations is running (`Slot::pending` is zero), so
//! whatever this module is handed by the request table is still there.

use block::IoVec;
use io::{Engine, Io};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

/// Alignment of our own buffers: a page, so that `O_DIRECT` takes them as they are.
const BUFFER_ALIGN: usize = 4096;

/// Zeros to write from. Read-only for everyone: engines only ever read from it.
#[repr(align(4096))]
struct ZeroPage([u8; ZERO_LEN]);
const ZERO_LEN: usize = 64 << 10;
static ZEROS: ZeroPage = ZeroPage([0; ZERO_LEN]);

/// Appends pieces that hold `len` zeros to write from.
pub(crate) fn push_zeros(mut len: u64, out: &mut Vec<IoVec>) {
    while len > 0 {
        let take = len.min(ZERO_LEN as u64) as usize;
        // Only operations that read from memory (writes) are given these pieces.
        out.push(IoVec::new(ZEROS.0.as_ptr().cast_mut(), take));
        len -= take as u64;
    }
}

/// A page-aligned buffer that a request or a commit owns.
#[derive(Debug)]
pub(crate) struct Buffer {
    base: *mut u8,
    len: usize,
}

// SAFETY: the buffer is exclusively owned memory, like a `Box<[u8]>`.
unsafe impl Send for Buffer {}

impl Buffer {
    /// A buffer of `len` bytes (at least one page), zeroed.
    pub fn new(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(BUFFER_ALIGN);
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: `base` points to `len` writable bytes; zeroed so that slices of it are initialised.
        unsafe { base.write_bytes(0, len) };
        Self { base, len }
    }

    fn layout(len: usize) -> Layout {
        // Cannot fail: the alignment is a power of two and lengths are bounded far below isize::MAX.
        Layout::from_size_align(len, BUFFER_ALIGN).unwrap_or(Layout::new::<[u8; 4096]>())
    }

    /// Bytes it holds.
    pub fn capacity(&self) -> usize {
        self.len
    }

    /// The piece `start..start + len`, for an engine.
    pub fn piece(&self, start: usize, len: usize) -> IoVec {
        assert!(start + len <= self.len);
        IoVec::new(self.base.wrapping_add(start), len)
    }

    /// Its first `len` bytes. Not called while an engine works on the buffer.
    pub fn bytes(&self, len: usize) -> &[u8] {
        assert!(len <= self.len);
        // SAFETY: owned, initialised in `new`, and no operation is running on it (see above).
        unsafe { std::slice::from_raw_parts(self.base, len) }
    }

    /// Its first `len` bytes, to change. Not called while an engine works on the buffer.
    pub fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.len);
        // SAFETY: as in `bytes`, and `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base, len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.base, Self::layout(self.len)) }
    }
}

/// The pieces of a request, as its submitter gave them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces {
    first: *const IoVec,
    count: u32,
}

// SAFETY: an address that is dereferenced under the module's promise only.
unsafe impl Send for Pieces {}

impl Pieces {
    /// No memory.
    pub const NONE: Pieces = Pieces {
        first: std::ptr::null(),
        count: 0,
    };

    /// `count` pieces at `first`.
    pub fn new(first: *const IoVec, count: u32) -> Self {
        Self { first, count }
    }

    /// First of the pieces.
    pub fn first(&self) -> *const IoVec {
        self.first
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The pieces. Called for requests that have not ended only.
    pub fn get(&self) -> &[IoVec] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: the module's promise: the array is valid until the request's end.
        unsafe { std::slice::from_raw_parts(self.first, self.count as usize) }
    }
}

/// Zeroes bytes `skip..skip + len` of the memory described by `iov`.
pub(crate) fn zero(iov: &[IoVec], skip: u64, len: u64) {
    each(iov, skip, len, |base, _, size| {
        // SAFETY: within one piece of a request that has not ended.
        unsafe { base.write_bytes(0, size) };
    });
}

/// Copies `bytes` to the memory described by `iov`, from its byte `skip` on.
pub(crate) fn scatter(iov: &[IoVec], skip: u64, bytes: &[u8]) {
    each(iov, skip, bytes.len() as u64, |base, done, size| {
        // SAFETY: within one piece of a request that has not ended, and within `bytes`:
        // `done + size` never passes the length asked for. A guest may change its memory
        // meanwhile: raw copies make no reference to it.
        unsafe { base.copy_from(bytes.as_ptr().add(done), size) };
    });
}

/// Copies the memory described by `iov` to `out`.
pub(crate) fn gather(iov: &[IoVec], out: &mut [u8]) {
    let len = out.len() as u64;
    let out = out.as_mut_ptr();
    each(iov, 0, len, |base, done, size| {
        // SAFETY: as in `scatter`, with `out` exclusively ours.
        unsafe { out.add(done).copy_from(base, size) };
    });
}

/// Calls `f(base, bytes before, bytes)` for the contiguous parts of `skip..skip + len`.
fn each(iov: &[IoVec], mut skip: u64, len: u64, mut f: impl FnMut(*mut u8, usize, usize)) {
    let mut done = 0u64;
    for v in iov {
        if done == len {
            return;
        }
        let size = v.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let take = (len - done).min(size - skip);
        f(
            v.base().wrapping_add(skip as usize),
            done as usize,
            take as usize,
        );
        done += take;
        skip = 0;
    }
}

/// Hands an operation to the engine.
pub(crate) fn stage(engine: &mut dyn Engine, io: Io) -> bool {
    // SAFETY: the operation's array and memory are a request's (valid until its end by the
    // module's promise) or belong to a `Sub`, a `Fill` or the committer of the same queue, which
    // keep them until the completion; the queue is not dropped with operations in flight
    // (its `Drop` says so), and sub tables are never reallocated.
    unsafe { engine.stage(io) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scatters_gathers_and_zeroes_across_pieces() {
        let mut a = [1u8; 5];
        let mut b = [1u8; 5];
        let iov = [IoVec::from_mut(&mut a), IoVec::from_mut(&mut b)];
        scatter(&iov, 3, &[7, 8, 9]);
        let mut out = [0; 10];
        gather(&iov, &mut out);
        assert_eq!(out, [1, 1, 1, 7, 8, 9, 1, 1, 1, 1]);
        zero(&iov, 4, 2);
        gather(&iov, &mut out);
        assert_eq!(out, [1, 1, 1, 7, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn zeros_come_in_bounded_pieces() {
        let mut out = Vec::new();
        push_zeros(ZERO_LEN as u64 * 2 + 1, &mut out);
        assert_eq!(
            out.iter().map(|v| v.len()).collect::<Vec<_>>(),
            [ZERO_LEN, ZERO_LEN, 1]
        );
    }
}
