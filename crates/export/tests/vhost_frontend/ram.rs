//! A guest's memory: a memfd, mapped here and in the server. Unsafe code.

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

use super::RegionSpec;

pub struct Ram {
    fd: OwnedFd,
    base: *mut u8,
    guest: u64,
    len: u64,
}

// SAFETY: addresses of shared memory, accessed through raw pointers only.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    pub fn new(guest: u64, len: u64) -> io::Result<Self> {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len as usize,
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
            len,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn region(&self) -> RegionSpec {
        RegionSpec {
            guest: self.guest,
            len: self.len,
            user: self.user(self.guest),
            offset: 0,
        }
    }

    /// This process's address of guest address `at`.
    pub fn user(&self, at: u64) -> u64 {
        self.host(at, 0) as u64
    }

    fn host(&self, at: u64, len: usize) -> *mut u8 {
        let skip = at.checked_sub(self.guest).expect("below the memory");
        assert!(skip + len as u64 <= self.len, "behind the memory");
        self.base.wrapping_add(skip as usize)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        let to = self.host(at, bytes.len());
        // SAFETY: `host` checked that the range is mapped.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    pub fn read_into(&self, at: u64, out: &mut [u8]) {
        let from = self.host(at, out.len());
        // SAFETY: `host` checked that the range is mapped.
        unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read_into(at, &mut out);
        out
    }

    pub fn load(&self, at: u64, order: Ordering) -> u16 {
        let field = self.host(at, 2).cast();
        // SAFETY: mapped (checked by `host`), and ring fields are aligned.
        u16::from_le(unsafe { AtomicU16::from_ptr(field) }.load(order))
    }

    pub fn store(&self, at: u64, value: u16, order: Ordering) {
        let field = self.host(at, 2).cast();
        // SAFETY: as in `load`.
        unsafe { AtomicU16::from_ptr(field) }.store(value.to_le(), order);
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`.
        let _ = unsafe { munmap(self.base.cast(), self.len as usize) };
    }
}
