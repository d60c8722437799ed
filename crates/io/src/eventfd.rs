//! Waking a thread that sleeps in an engine, with at most one system call and usually none.

use block::{Context, Error, Result};
use rustix::{
    event::{EventfdFlags, eventfd},
    io::{Errno, ReadWriteFlags},
};
use std::{
    io::IoSliceMut,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering, fence},
};

/// A non-blocking `eventfd(2)` counter.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new counter at zero.
    pub fn new() -> Result<Self> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Self)
            .map_err(std::io::Error::from)
            .context(|| "eventfd")
    }

    /// Takes over a descriptor that somebody else made (a vhost-user front-end, say).
    /// [`EventFd::write`] blocks when it is in blocking mode and its counter full.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Adds 1 to the counter. A counter that is full is readable already: not an error.
    pub fn write(&self) -> Result<()> {
        loop {
            match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Error::os("writing an eventfd", e.into())),
            }
        }
    }

    /// Takes the counter's value and sets it to zero; `None` when it was zero. Does not block (before
    /// Linux 5.12: unless whoever made the descriptor put it into blocking mode).
    pub fn read(&self) -> Result<Option<u64>> {
        let mut value = [0u8; 8];
        let mut flags = ReadWriteFlags::NOWAIT;
        loop {
            // The flag, since the mode is shared with the other side, which may change it at any time. The
            // offset -1 is that of descriptors without a position.
            let mut buffers = [IoSliceMut::new(&mut value)];
            match rustix::io::preadv2(&self.0, &mut buffers, u64::MAX, flags) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) if !flags.is_empty() => {
                    flags = ReadWriteFlags::empty();
                }
                Ok(8) => return Ok(Some(u64::from_ne_bytes(value))),
                Ok(_) | Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Error::os("reading an eventfd", e.into())),
            }
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const AWAKE: u32 = 0;
const SLEEPING: u32 = 1;
const NOTIFIED: u32 = 2;

/// Wakes one thread, the owner, from any other.
///
/// ```text
///   any thread                          the owner
///   ----------                          ---------
///   publish the work                    loop {
///   waker.wake()                            look at all sources of work, do it
///     └ write(2) only when the              if waker.prepare_sleep() {
///       owner has said it sleeps                engine.turn(Forever)   // watches as_fd()
///                                               waker.awake()
///                                           } // else: a wake came, look again
///                                       }
/// ```
///
/// No wake is lost: whoever wakes has published its work *before* `wake`, which swaps the state to
/// *notified*. Either that swap comes before the owner's `prepare_sleep`, which then
/// answers `false`; or it finds *sleeping*, and makes the descriptor readable, on which the owner
/// waits. Wakes may be spurious, and several count as one.
#[derive(Debug)]
pub struct Waker {
    state: AtomicU32,
    fd: EventFd,
}

impl Waker {
    /// A waker whose owner is awake.
    pub fn new() -> Result<Self> {
        Ok(Self {
            state: AtomicU32::new(AWAKE),
            fd: EventFd::new()?,
        })
    }

    /// Tells the owner that there is work. Makes one `write(2)` when the owner sleeps and nobody
    /// else has woken it yet, else no system call.
    pub fn wake(&self) {
        // A plain look first keeps the line shared when many threads wake an owner that knows. The
        // fence keeps it behind the caller's publication of its work, as the owner's fences keep its
        // look at the work behind its change of the state: one of the two sees the other.
        fence(Ordering::SeqCst);
        if self.state.load(Ordering::SeqCst) == NOTIFIED {
            return;
        }
        if self.state.swap(NOTIFIED, Ordering::SeqCst) == SLEEPING
            && let Err(e) = self.fd.write()
        {
            tracing::error!("cannot wake an I/O thread: {e}");
        }
    }

    /// The owner is about to sleep on [`Waker::as_fd`]. `false`: a wake came since
    /// the last time and is taken by this call; look at the sources of work again.
    #[must_use]
    pub fn prepare_sleep(&self) -> bool {
        if self
            .state
            .compare_exchange(AWAKE, SLEEPING, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
        {
            return true;
        }
        self.state.store(AWAKE, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        false
    }

    /// The owner does not sleep any more. Whether it was woken. Reads the descriptor empty if so.
    pub fn awake(&self) -> bool {
        let woken = self.state.swap(AWAKE, Ordering::SeqCst) == NOTIFIED;
        // Before the owner looks at the sources of work: see `wake`.
        fence(Ordering::SeqCst);
        if woken && let Err(e) = self.fd.read() {
            tracing::error!("cannot read a waker: {e}");
        }
        woken
    }

    /// Takes a wake without sleeping, for owners that poll; no system call.
    pub fn take(&self) -> bool {
        let taken = self.state.load(Ordering::Relaxed) == NOTIFIED
            && self
                .state
                .compare_exchange(NOTIFIED, AWAKE, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok();
        if taken {
            // Before the owner looks at the sources of work: see `wake`.
            fence(Ordering::SeqCst);
        }
        taken
    }
}

impl AsFd for Waker {
    /// Readable when a sleeping owner was woken.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::{Arc, atomic::AtomicU64},
        time::Duration,
    };

    #[test]
    fn a_descriptor_in_blocking_mode_does_not_block_its_reader() {
        let fd = EventFd::new().unwrap();
        rustix::io::ioctl_fionbio(&fd, false).unwrap();
        // In a thread, so that a hang is a failure.
        let (sender, read) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let empty = fd.read().unwrap();
            fd.write().unwrap();
            let _ = sender.send((empty, fd.read().unwrap(), fd.read().unwrap()));
        });
        let read = read.recv_timeout(Duration::from_secs(20));
        assert_eq!(read, Ok((None, Some(1), None)));
    }

    #[test]
    fn writes_only_to_a_sleeper() {
        let waker = Waker::new().unwrap();
        waker.wake();
        waker.wake();
        assert_eq!(waker.fd.read().unwrap(), None, "the owner is awake");
        assert!(!waker.prepare_sleep(), "a wake is pending");
        assert!(waker.prepare_sleep(), "it was taken");
        waker.wake();
        waker.wake();
        assert_eq!(waker.fd.read().unwrap(), Some(1), "one write for two wakes");
        waker.awake();
        waker.wake();
        assert!(waker.take());
        assert!(!waker.take());
    }

    #[test]
    fn no_wake_is_lost() {
        const ROUNDS: u64 = 20_000;
        let waker = Arc::new(Waker::new().unwrap());
        let posted = Arc::new(AtomicU64::new(0));
        let seen = Arc::new(AtomicU64::new(0));
        let poster = {
            let (waker, posted, seen) = (waker.clone(), posted.clone(), seen.clone());
            std::thread::spawn(move || {
                for round in 1..=ROUNDS {
                    posted.store(round, Ordering::Relaxed);
                    waker.wake();
                    while seen.load(Ordering::Acquire) < round {
                        std::thread::yield_now();
                    }
                }
            })
        };
        while seen.load(Ordering::Relaxed) < ROUNDS {
            seen.store(posted.load(Ordering::Relaxed), Ordering::Release);
            if seen.load(Ordering::Relaxed) == ROUNDS {
                break;
            }
            if waker.prepare_sleep() {
                let mut fds = [rustix::event::PollFd::new(
                    &waker,
                    rustix::event::PollFlags::IN,
                )];
                let limit = rustix::time::Timespec {
                    tv_sec: Duration::from_secs(20).as_secs() as i64,
                    tv_nsec: 0,
                };
                let n = rustix::event::poll(&mut fds, Some(&limit)).unwrap();
                waker.awake();
                assert_eq!(n, 1, "slept through a wake");
            }
        }
        poster.join().unwrap();
    }
}
