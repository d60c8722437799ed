//! A file in memory, as words that outlive a process that is killed. Unsafe code: `mmap`.

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::{
    fs::File,
    io, ptr, slice,
    sync::atomic::{AtomicU32, Ordering},
};

/// The first so many bytes of a file.
#[derive(Debug)]
pub(super) struct Mapped {
    base: *mut u8,
    len: usize,
    /// What was stored, and where, in order.
    #[cfg(test)]
    stores: std::sync::Mutex<Vec<(usize, u32)>>,
}

// SAFETY: an address of shared memory, accessed as atomics.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// The file has to be so long, and to have room for all of it.
    pub(super) fn new(file: &File, len: usize) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0)? };
        Ok(Self {
            base: base.cast(),
            len,
            #[cfg(test)]
            stores: std::sync::Mutex::default(),
        })
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(
            at.is_multiple_of(4) && at + 4 <= self.len,
            "word {at} of {} bytes",
            self.len
        );
        // SAFETY: within the mapping, which begins at a page, and aligned.
        unsafe { AtomicU32::from_ptr(self.base.wrapping_add(at).cast()) }
    }

    /// The little-endian word at byte `at`, a multiple of 4 within the length.
    pub(super) fn load(&self, at: usize) -> u32 {
        u32::from_le(self.word(at).load(Ordering::Acquire))
    }

    /// Sets it, after all that was set before.
    pub(super) fn store(&self, at: usize, value: u32) {
        self.word(at).store(value.to_le(), Ordering::Release);
        #[cfg(test)]
        self.stores.lock().unwrap().push((at, value));
    }

    #[cfg(test)]
    pub(super) fn stores(&self) -> Vec<(usize, u32)> {
        self.stores.lock().unwrap().clone()
    }

    #[cfg(test)]
    pub(super) fn forget_stores(&self) {
        self.stores.lock().unwrap().clear();
    }

    /// Shows `f` all of it. Nobody may store meanwhile.
    pub(super) fn with_bytes<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        // SAFETY: so many bytes are mapped; the file is locked against other loads, and the caller stores nothing.
        f(unsafe { slice::from_raw_parts(self.base, self.len) })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`, of which nothing borrows any more.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
