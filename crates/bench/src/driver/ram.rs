//! A guest's memory: a memfd, mapped here and in the server. Unsafe code.

use super::RegionSpec;
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicU16, Ordering},
};

/// Memory of a machine, shared with the server.
///
/// Addresses are the guest's.
///
/// # Panics
///
/// All accessors do when a range lies outside the memory, as an index outside a slice does: addresses
/// are the caller's own and never a server's.
#[derive(Debug)]
pub struct Ram {
    fd: OwnedFd,
    base: *mut u8,
    guest: u64,
    len: usize,
}

// SAFETY: addresses of shared memory, accessed through raw pointers only.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// `len` bytes of zeros at guest address `guest`.
    ///
    /// # Errors
    ///
    /// The system has no memory or no address space for it.
    pub fn new(guest: u64, len: u64) -> io::Result<Self> {
        let size = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if guest.checked_add(len).is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )?
        };
        Ok(Self {
            fd,
            base: base.cast(),
            guest,
            len: size,
        })
    }

    /// The file to hand to the server.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// All of it, as a memory region of the protocol.
    pub fn region(&self) -> RegionSpec {
        RegionSpec {
            guest: self.guest,
            len: self.len as u64,
            user: self.user(self.guest),
            offset: 0,
        }
    }

    /// This process's address of guest address `at`.
    pub fn user(&self, at: u64) -> u64 {
        self.host(at, 0) as u64
    }

    #[inline]
    fn host(&self, at: u64, len: usize) -> *mut u8 {
        let skip = at.wrapping_sub(self.guest) as usize;
        assert!(
            at >= self.guest && skip <= self.len && len <= self.len - skip,
            "{len} bytes at guest address {at:#x} lie outside the memory"
        );
        self.base.wrapping_add(skip)
    }

    /// Copies `bytes` to guest address `at`.
    #[inline]
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let to = self.host(at, bytes.len());
        // SAFETY: `host` checked that the range is mapped.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Fills `out` from guest address `at`.
    #[inline]
    pub fn read_into(&self, at: u64, out: &mut [u8]) {
        let from = self.host(at, out.len());
        // SAFETY: `host` checked that the range is mapped.
        unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
    }

    /// `len` bytes from guest address `at`.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read_into(at, &mut out);
        out
    }

    /// A little-endian field of a ring; `at` is even.
    #[inline]
    pub fn load(&self, at: u64, order: Ordering) -> u16 {
        let field = self.host(at, 2).cast();
        debug_assert!(at.is_multiple_of(2));
        // SAFETY: mapped (checked by `host`), and ring fields are aligned.
        u16::from_le(unsafe { AtomicU16::from_ptr(field) }.load(order))
    }

    /// Sets a little-endian field of a ring; `at` is even.
    #[inline]
    pub fn store(&self, at: u64, value: u16, order: Ordering) {
        let field = self.host(at, 2).cast();
        debug_assert!(at.is_multiple_of(2));
        // SAFETY: as in `load`.
        unsafe { AtomicU16::from_ptr(field) }.store(value.to_le(), order);
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
