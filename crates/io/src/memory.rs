//! Raw memory: aligned buffers, and copies between them and the pieces of requests.

use block::IoVec;
use std::{
    alloc::{self, Layout},
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

/// Zeroed memory at an address that `O_DIRECT` takes.
///
/// Allocated with room to align it: asking the allocator for the alignment would have it
/// write all the zeros, where large memory fresh from the kernel is zero already.
pub struct AlignedBuf {
    allocation: NonNull<u8>,
    layout: Layout,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory, like a `Box<[u8]>`.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zeroed bytes (at least 1) at a multiple of `align`, a power of two.
    pub fn new(len: usize, align: usize) -> Self {
        let (len, align) = (len.max(1), align.max(1).next_power_of_two());
        let layout = len
            .checked_add(align - 1)
            .and_then(|size| Layout::from_size_align(size, 1).ok())
            .unwrap_or_else(|| panic!("buffer of {len} bytes at a multiple of {align}"));
        // SAFETY: the layout's size is not zero.
        let allocation = unsafe { alloc::alloc_zeroed(layout) };
        let Some(allocation) = NonNull::new(allocation) else {
            alloc::handle_alloc_error(layout)
        };
        let skip = allocation.addr().get().wrapping_neg() & (align - 1);
        Self {
            allocation,
            layout,
            // SAFETY: `skip < align`, and the allocation is `align - 1` longer than `len`.
            base: unsafe { allocation.add(skip) },
            len,
        }
    }

    /// The address, for the kernel to read from or write to.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The piece `start..start + len`, for an operation. While one runs on it, the
    /// buffer is neither read nor written through its slices.
    ///
    /// # Panics
    ///
    /// When the piece does not lie within the buffer.
    pub fn piece(&self, start: usize, len: usize) -> IoVec {
        assert!(start <= self.len && len <= self.len - start);
        IoVec::new(self.base.as_ptr().wrapping_add(start), len)
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { alloc::dealloc(self.allocation.as_ptr(), self.layout) }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation has this size and was zeroed.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

/// The pieces that a staged operation named.
///
/// # Safety
///
/// `iov` points to `len` pieces that stay where they are while the result is used.
pub(crate) unsafe fn pieces<'a>(iov: *const IoVec, len: u32) -> &'a [IoVec] {
    if len == 0 || iov.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(iov, len as usize) }
}

/// Copies `len` bytes from `src` into the pieces, from their byte `skip` on; returns how many fitted.
///
/// # Safety
///
/// The pieces' memory is valid and writable and nobody borrows it; `src` is valid for `len` bytes
/// and apart from the pieces.
pub unsafe fn scatter(iov: &[IoVec], skip: u64, src: *const u8, len: usize) -> usize {
    walk(iov, skip, len, |piece, done, n| {
        // SAFETY: `done + n <= len`, and `piece..piece+n` lies within one piece.
        unsafe { std::ptr::copy_nonoverlapping(src.add(done), piece, n) }
    })
}

/// Copies `len` bytes out of the pieces, from their byte `skip` on, to `dst`.
///
/// # Safety
///
/// As for [`scatter`], with the roles exchanged.
pub unsafe fn gather(iov: &[IoVec], skip: u64, dst: *mut u8, len: usize) -> usize {
    walk(iov, skip, len, |piece, done, n| {
        // SAFETY: `done + n <= len`, and `piece..piece+n` lies within one piece.
        unsafe { std::ptr::copy_nonoverlapping(piece, dst.add(done), n) }
    })
}

/// Zeroes `len` bytes of the pieces, from their byte `skip` on.
///
/// # Safety
///
/// The pieces' memory is valid and writable and nobody borrows it.
pub unsafe fn zero(iov: &[IoVec], skip: u64, len: usize) -> usize {
    walk(iov, skip, len, |piece, _, n| {
        // SAFETY: `piece..piece+n` lies within one piece.
        unsafe { std::ptr::write_bytes(piece, 0, n) }
    })
}

fn walk(
    iov: &[IoVec],
    mut skip: u64,
    len: usize,
    mut each: impl FnMut(*mut u8, usize, usize),
) -> usize {
    let mut done = 0;
    for v in iov {
        if done == len {
            break;
        }
        let size = v.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let n = (len - done).min((size - skip) as usize);
        each(v.base().wrapping_add(skip as usize), done, n);
        done += n;
        skip = 0;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zero() {
        for align in [1, 512, 4096] {
            let buf = AlignedBuf::new(1000, align);
            assert_eq!(buf.as_ptr() as usize % align, 0);
            assert!(buf.len() == 1000 && buf.iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn scatters_and_gathers_across_pieces() {
        let (mut a, mut b) = ([0u8; 3], [0u8; 5]);
        let iov = [IoVec::from_mut(&mut a), IoVec::from_mut(&mut b)];
        let src = [1, 2, 3, 4];
        let mut back = [0u8; 4];
        // SAFETY: all memory is local and apart.
        unsafe {
            assert_eq!(scatter(&iov, 2, src.as_ptr(), 4), 4);
            assert_eq!(gather(&iov, 2, back.as_mut_ptr(), 4), 4);
            assert_eq!(back, src);
            assert_eq!(zero(&iov, 7, 9), 1);
            assert_eq!(zero(&iov, 3, 1), 1);
        }
        assert_eq!(a, [0, 0, 1]);
        assert_eq!(b, [0, 3, 4, 0, 0]);
    }
}
