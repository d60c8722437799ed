//! What the crate `virtio-driver` leaves to a machine: what is negotiated, memory that the server shares, and waiting for it. Unsafe code.

use memmap2::MmapMut;
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{MemfdFlags, memfd_create},
};
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};
use virtio_driver::{VirtioBlkFeatureFlags, VirtioFeatureFlags};

/// Features to ask for. For a driver that could not ask for a flush a server would make every write durable.
pub fn features() -> u64 {
    let ring = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    ring.bits() | VirtioBlkFeatureFlags::FLUSH.bits()
}

/// So many bytes of zeros, and their file, to hand to the server.
///
/// # Errors
///
/// The system has no memory for it.
pub fn memory(bytes: usize) -> io::Result<(File, MmapMut)> {
    let file: File = memfd_create("guest", MemfdFlags::CLOEXEC)?.into();
    file.set_len(bytes as u64)?;
    // SAFETY: nobody makes the file shorter, and nobody looks at bytes that the server is writing to.
    let map = unsafe { MmapMut::map_mut(&file) }?;
    Ok((file, map))
}

/// Waits until the server calls. It may have made the event non-blocking, as QEMU's does.
///
/// # Errors
///
/// Waiting failed.
pub fn wait(call: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: `call` keeps it open.
    let call = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
    poll(&mut [PollFd::from_borrowed_fd(call, PollFlags::IN)], None)?;
    Ok(())
}
