//! Image locks, byte for byte as QEMU takes them (`block/file-posix.c`).
//!
//! A lock is a set of *permissions* that the holder uses and a set that it lets others use.
//! For each permission bit `i` there are two bytes in the file that nobody reads or writes,
//! only locks, with locks of the open file description (`F_OFD_SETLK`):
//!
//! ```text
//!   100 + i   held (shared lock) by everyone who uses permission i
//!   200 + i   held (shared lock) by everyone who does not let others use permission i
//! ```
//!
//! Who wants to use `i` first takes its own bytes, then tests whether anybody else holds 200 + i; who does
//! not share `i` tests whether anybody else holds 100 + i. Two who come at once may both be refused,
//! never both admitted.
//!
//! | | uses | shares |
//! |---|---|---|
//! | [`Lock::Write`] | consistent read, write, write unchanged, resize | consistent read, write unchanged |
//! | [`Lock::Read`] | consistent read | consistent read, write unchanged |
//! | [`Lock::Read`] with `share_write` | consistent read | all |

use super::File;
use crate::sys::{self, LockKind};
use block::{Context, Error, ErrorKind, Result};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::PoisonError,
    thread,
    time::{Duration, Instant},
};

/// How long an image that is locked is tried again, and how often.
const LOCK_WAIT: Duration = Duration::from_millis(500);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Does `open`, and again for half a second while it fails with [`ErrorKind::Locked`]: the kernel takes the ring
/// of an io_uring process that has ended apart in the background, with its files and their locks, and
/// whoever opens the file next (systemd restarts a killed server at once) would be refused.
///
/// # Errors
///
/// Those of `open`.
pub fn wait_for_lock<T>(mut open: impl FnMut() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    loop {
        match open() {
            Err(error) if error.kind() == ErrorKind::Locked && began.elapsed() < LOCK_WAIT => {
                thread::sleep(LOCK_RETRY);
            }
            opened => return opened,
        }
    }
}

const PERMISSION_BASE: u64 = 100;
const UNSHARED_BASE: u64 = 200;

const CONSISTENT_READ: u8 = 0x1;
const WRITE: u8 = 0x2;
const WRITE_UNCHANGED: u8 = 0x4;
const RESIZE: u8 = 0x8;
const ALL: u8 = 0xf;
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

/// How an image is protected from other processes, QEMU included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Lock {
    /// Not at all (`--force-share`): what is read may be changing.
    None,
    /// Others may read too.
    Read {
        /// Whether others may also write and resize.
        share_write: bool,
    },
    /// Nobody else writes; who reads must accept that it changes.
    #[default]
    Write,
}

impl Lock {
    fn used(self) -> u8 {
        match self {
            Lock::None => 0,
            Lock::Read { .. } => CONSISTENT_READ,
            Lock::Write => CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE,
        }
    }

    fn unshared(self) -> u8 {
        match self {
            Lock::None | Lock::Read { share_write: true } => 0,
            Lock::Read { share_write: false } | Lock::Write => {
                ALL & !(CONSISTENT_READ | WRITE_UNCHANGED)
            }
        }
    }
}

/// Changes the lock on `fd` from `old` to `new`; on failure `old` is in force.
pub(super) fn change(fd: BorrowedFd<'_>, path: &Path, old: Lock, new: Lock) -> Result<()> {
    let undo = |e: Error| {
        // Dropping bytes does not fail but for a broken descriptor, where there is nothing to save.
        let _ = hold(fd, old, ALL, ALL);
        e
    };
    // Take what the new lock adds before letting go of what the old one has.
    hold(
        fd,
        new,
        !(old.used() | new.used()),
        !(old.unshared() | new.unshared()),
    )
    .map_err(|e| match e.raw_os_error() {
        // Someone holds a byte exclusively: not QEMU, but in use all the same.
        Some(libc::EAGAIN | libc::EACCES) => undo(in_use(path, new, "its", None)),
        _ => undo(Error::os(format!("{}: cannot lock", path.display()), e)),
    })?;
    test(fd, path, new).map_err(undo)?;
    hold(fd, new, ALL, ALL).context(|| format!("{}: cannot unlock", path.display()))
}

/// Holds the bytes of `lock`; drops those others that the masks name.
fn hold(fd: BorrowedFd<'_>, lock: Lock, drop_used: u8, drop_unshared: u8) -> io::Result<()> {
    for (base, wanted, dropped) in [
        (PERMISSION_BASE, lock.used(), drop_used),
        (UNSHARED_BASE, lock.unshared(), drop_unshared),
    ] {
        for bit in 0..NAMES.len() as u64 {
            if wanted & (1 << bit) != 0 {
                sys::ofd_lock(fd, base + bit, 1, Some(LockKind::Shared))?;
            } else if dropped & (1 << bit) != 0 {
                sys::ofd_lock(fd, base + bit, 1, None)?;
            }
        }
    }
    Ok(())
}

fn test(fd: BorrowedFd<'_>, path: &Path, lock: Lock) -> Result<()> {
    for (base, bits) in [
        (UNSHARED_BASE, lock.used()),
        (PERMISSION_BASE, lock.unshared()),
    ] {
        for (bit, name) in NAMES.iter().enumerate() {
            if bits & (1 << bit) != 0
                && sys::ofd_lock_test(fd, base + bit as u64, 1, LockKind::Exclusive)
                    .context(|| format!("{}: cannot test locks", path.display()))?
            {
                return Err(in_use(path, lock, name, Some(base)));
            }
        }
    }
    Ok(())
}

fn in_use(path: &Path, wanted: Lock, name: &str, base: Option<u64>) -> Error {
    let why = match base {
        Some(PERMISSION_BASE) => format!("another process uses it ({name})"),
        Some(_) => format!("another process does not share it ({name})"),
        None => "another process holds its lock exclusively".to_owned(),
    };
    Error::new(
        ErrorKind::Locked,
        format!(
            "{}: the image is locked: {why}; stop that process{}",
            path.display(),
            match wanted {
                Lock::Write => "",
                _ => ", or read with --force-share",
            }
        ),
    )
}

impl File {
    /// The lock in force.
    pub fn lock(&self) -> Lock {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the lock. On failure ([`ErrorKind::Locked`]) the old one stays in force.
    pub fn set_lock(&self, new: Lock) -> Result<()> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if self.sim.is_none() && self.at_server().is_none() {
            change(self.as_fd(), &self.path, *lock, new)?;
        }
        *lock = new;
        Ok(())
    }
}

impl Drop for File {
    /// Lets go of the lock at once: an `io_uring` in which the file was registered keeps the open file
    /// description, and with it the locks, for some time after the last descriptor is closed.
    fn drop(&mut self) {
        if self.lock() != Lock::None {
            // A failure leaves it to the kernel.
            let _ = hold(self.as_fd(), Lock::None, ALL, ALL);
        }
    }
}
