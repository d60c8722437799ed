//! The disk layer's only unsafe code: touching request memory and staging
//! operations on it.
//!
//! Everything here rests on one promise, made by the caller of
//! [`DiskQueue::submit`](crate::DiskQueue::submit): the array of pieces and the memory that it describes
//! stay valid until the request's `Done` was taken. A request ends
//! only when none of its engine operations is running (`Slot::pending` is zero), so
//! whatever this module is handed by the request table is still there.

use block::IoVec;
use io::{Engine, Io, memory};

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
    // SAFETY: the memory of a request that has not ended: valid, and for a read nobody borrows it.
    unsafe { memory::zero(iov, skip, len as usize) };
}

/// Copies `bytes` to the memory described by `iov`, from its byte `skip` on.
pub(crate) fn scatter(iov: &[IoVec], skip: u64, bytes: &[u8]) {
    // SAFETY: as in `zero`; `bytes` is a buffer of ours, apart from any request's memory.
    unsafe { memory::scatter(iov, skip, bytes.as_ptr(), bytes.len()) };
}

/// Copies the memory described by `iov`, from its byte `skip` on, to `out`.
pub(crate) fn gather(iov: &[IoVec], skip: u64, out: &mut [u8]) {
    // SAFETY: as in `scatter`. A guest that changes its memory meanwhile gets a mixture written,
    // as from any device: raw copies make no reference to it.
    unsafe { memory::gather(iov, skip, out.as_mut_ptr(), out.len()) };
}

/// Appends a piece, as a part of the last one where it follows that.
pub(crate) fn push(piece: IoVec, out: &mut Vec<IoVec>) {
    match out.last_mut() {
        Some(last) if last.base().wrapping_add(last.len()) == piece.base() => {
            *last = IoVec::new(last.base(), last.len() + piece.len());
        }
        _ => out.push(piece),
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
        gather(&iov, 0, &mut out);
        assert_eq!(out, [1, 1, 1, 7, 8, 9, 1, 1, 1, 1]);
        let mut part = [0; 4];
        gather(&iov, 3, &mut part);
        assert_eq!(part, [7, 8, 9, 1]);
        zero(&iov, 4, 2);
        gather(&iov, 0, &mut out);
        assert_eq!(out, [1, 1, 1, 7, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn neighbours_are_one_piece() {
        let mut a = [0u8; 8];
        let piece = |a: &mut [u8; 8], from: usize, len| IoVec::from_mut(&mut a[from..from + len]);
        let mut out = Vec::new();
        for (from, len) in [(0, 3), (3, 2), (6, 1), (7, 1)] {
            push(piece(&mut a, from, len), &mut out);
        }
        assert_eq!(out.iter().map(|v| v.len()).collect::<Vec<_>>(), [5, 2]);
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
