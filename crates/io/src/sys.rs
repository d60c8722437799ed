//! System calls that no safe wrapper offers.
//!
//! The only place (with `memory`, `aio` and `uring`) where this crate calls the kernel through
//! raw pointers. Every function returns the errno of a failure as an [`std::io::Error`].

use block::IoVec;
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

/// Most pieces that one vectored call takes (`UIO_MAXIOV`).
pub(crate) const IOV_MAX: usize = 1024;

fn check(ret: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// `preadv(2)`; `EINTR` is retried.
///
/// # Safety
///
/// `iov` points to `count` pieces whose memory is valid, writable and not borrowed by anyone.
pub(crate) unsafe fn preadv(
    fd: RawFd,
    iov: *const IoVec,
    count: u32,
    offset: u64,
) -> io::Result<usize> {
    let count = count.min(IOV_MAX as u32) as libc::c_int;
    loop {
        // SAFETY: the caller vouches for the memory; `IoVec` is laid out as `struct iovec`.
        let ret = unsafe { libc::preadv(fd, iov.cast(), count, offset as libc::off_t) };
        match check(ret) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// `pwritev(2)`; `EINTR` is retried.
///
/// # Safety
///
/// `iov` points to `count` pieces whose memory is valid.
pub(crate) unsafe fn pwritev(
    fd: RawFd,
    iov: *const IoVec,
    count: u32,
    offset: u64,
) -> io::Result<usize> {
    let count = count.min(IOV_MAX as u32) as libc::c_int;
    loop {
        // SAFETY: the caller vouches for the memory; `IoVec` is laid out as `struct iovec`.
        let ret = unsafe { libc::pwritev(fd, iov.cast(), count, offset as libc::off_t) };
        match check(ret) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// `pread(2)` into a buffer.
pub(crate) fn pread(fd: RawFd, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let iov = IoVec::from_mut(buf);
    // SAFETY: `buf` is borrowed mutably for the whole call.
    unsafe { preadv(fd, &iov, 1, offset) }
}

/// `pwrite(2)` from a buffer.
pub(crate) fn pwrite(fd: RawFd, buf: &[u8], offset: u64) -> io::Result<usize> {
    // The kernel only reads through this piece.
    let iov = IoVec::new(buf.as_ptr().cast_mut(), buf.len());
    // SAFETY: `buf` is borrowed for the whole call.
    unsafe { pwritev(fd, &iov, 1, offset) }
}

/// `ioctl(BLKDISCARD)` on a block device; offset and length multiples of its logical block.
pub(crate) fn block_discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    // _IO(0x12, 119): the generic encoding, the same on x86-64, aarch64, riscv64 and s390x.
    const BLKDISCARD: libc::Ioctl = 0x1277;
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 from the address.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    check(ret as libc::ssize_t).map(drop)
}

/// `ioctl(BLKSSZGET)`: a block device's logical block size in bytes.
pub(crate) fn block_size(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the address.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::BLKSSZGET, &raw mut size) } as libc::ssize_t)?;
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Takes (or drops, with `None`) a lock of the open file description on `len` bytes at
/// `start`, without waiting.
pub(crate) fn ofd_lock(
    fd: BorrowedFd<'_>,
    start: u64,
    len: u64,
    lock: Option<LockKind>,
) -> io::Result<()> {
    let mut flock = flock(start, len, lock);
    // SAFETY: F_OFD_SETLK reads a `struct flock` from the address.
    let ret = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw mut flock) };
    check(ret as libc::ssize_t).map(drop)
}

/// Whether someone else's lock would keep this description from taking `lock` on the bytes.
pub(crate) fn ofd_lock_test(
    fd: BorrowedFd<'_>,
    start: u64,
    len: u64,
    lock: LockKind,
) -> io::Result<bool> {
    let mut flock = flock(start, len, Some(lock));
    // SAFETY: F_OFD_GETLK reads and writes a `struct flock` at the address.
    let ret = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut flock) };
    check(ret as libc::ssize_t)?;
    Ok(libc::c_int::from(flock.l_type) != libc::F_UNLCK)
}

/// Shared or exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockKind {
    /// Any number of holders.
    Shared,
    /// One holder.
    Exclusive,
}

fn flock(start: u64, len: u64, lock: Option<LockKind>) -> libc::flock {
    let kind = match lock {
        None => libc::F_UNLCK,
        Some(LockKind::Shared) => libc::F_RDLCK,
        Some(LockKind::Exclusive) => libc::F_WRLCK,
    };
    // SAFETY: all zeros is a valid `struct flock`; l_pid must be zero for OFD locks.
    let mut flock: libc::flock = unsafe { std::mem::zeroed() };
    flock.l_type = kind as libc::c_short;
    flock.l_whence = libc::SEEK_SET as libc::c_short;
    flock.l_start = start as libc::off_t;
    flock.l_len = len as libc::off_t;
    flock
}

/// `epoll_pwait2(2)`, to the nanosecond; before Linux 5.11 `epoll_wait(2)`, rounded up to milliseconds.
pub(crate) fn epoll_wait(
    epoll: BorrowedFd<'_>,
    events: &mut [libc::epoll_event],
    timeout: Option<std::time::Duration>,
) -> io::Result<usize> {
    use std::sync::atomic::{AtomicBool, Ordering};
    static OLD: AtomicBool = AtomicBool::new(false);
    let max = events.len() as libc::c_int;
    if !OLD.load(Ordering::Relaxed) {
        let spec = timeout.map(|t| libc::timespec {
            tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(t.subsec_nanos() as i32),
        });
        let spec = spec
            .as_ref()
            .map_or(std::ptr::null(), |s| s as *const libc::timespec);
        // SAFETY: `events` has room for `max`, `spec` is null or a timespec that lives on, and there is
        // no signal mask.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                epoll.as_raw_fd(),
                events.as_mut_ptr(),
                max,
                spec,
                std::ptr::null::<libc::sigset_t>(),
                0usize,
            )
        };
        match check(ret as libc::ssize_t) {
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => OLD.store(true, Ordering::Relaxed),
            result => return result,
        }
    }
    let millis = timeout.map_or(-1, |t| {
        t.as_nanos()
            .div_ceil(1_000_000)
            .min(libc::c_int::MAX as u128) as libc::c_int
    });
    // SAFETY: `events` has room for `max`.
    let ret = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), max, millis) };
    check(ret as libc::ssize_t)
}
