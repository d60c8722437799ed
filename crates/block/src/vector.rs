//! Memory that requests read into and write from.

use std::fmt;

/// One piece of memory of a request: layout-compatible with `struct iovec`.
///
/// A plain address and length: it borrows nothing, since the memory (a
/// guest's, or a buffer that a request owns) outlives the request by
/// construction and not by lifetime. Whoever reads or writes through it is in a
/// module named for unsafe code and says why the memory is still there.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVec(libc::iovec);

// SAFETY: an `IoVec` is only an address and a length; the code that
// dereferences it vouches for the memory (see the type's documentation).
unsafe impl Send for IoVec {}
// SAFETY: as above; sharing an address is harmless.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// `len` bytes at `base`.
    #[inline]
    pub fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    /// The bytes of `buffer`, to be written to or read from by an engine.
    pub fn from_mut(buffer: &mut [u8]) -> Self {
        Self::new(buffer.as_mut_ptr(), buffer.len())
    }

    /// The first byte's address.
    #[inline]
    pub fn base(self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> usize {
        self.0.iov_len
    }
}

impl fmt::Debug for IoVec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.base(), self.len())
    }
}

/// Sum of the lengths in `iov`, in bytes.
#[inline]
pub fn total_len(iov: &[IoVec]) -> u64 {
    iov.iter().map(|v| v.len() as u64).sum()
}

/// Appends to `out` the pieces of `iov` that hold bytes `skip..skip + len`,
/// fewer when `iov` ends before. Empty pieces are left out.
pub fn clip(iov: &[IoVec], skip: u64, len: u64, out: &mut Vec<IoVec>) {
    let (mut skip, mut left) = (skip, len);
    for v in iov {
        if left == 0 {
            break;
        }
        let size = v.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let take = left.min(size - skip);
        // `skip < size` and `take <= size`, and `size` came from a usize.
        out.push(IoVec::new(
            v.base().wrapping_add(skip as usize),
            take as usize,
        ));
        left -= take;
        skip = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clips_across_pieces() {
        let mut a = [0u8; 10];
        let mut b = [0u8; 20];
        let iov = [
            IoVec::from_mut(&mut a),
            IoVec::new(std::ptr::null_mut(), 0),
            IoVec::from_mut(&mut b),
        ];
        let shape = |skip, len| {
            let mut out = Vec::new();
            clip(&iov, skip, len, &mut out);
            out.iter().map(|v| v.len()).collect::<Vec<_>>()
        };
        assert_eq!(shape(0, 30), [10, 20]);
        assert_eq!(shape(3, 4), [4]);
        assert_eq!(shape(9, 2), [1, 1]);
        assert_eq!(shape(10, 50), [20]);
        assert_eq!(shape(30, 1), [0usize; 0]);
        assert_eq!(shape(5, 0), [0usize; 0]);
        assert_eq!(total_len(&iov), 30);
    }
}
