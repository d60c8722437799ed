//! Signals as a descriptor that can be read, instead of handlers that may run anywhere.
//!
//! The only module of this crate with unsafe code: `signalfd` has no safe wrapper in the libraries at hand.

use anyhow::{Context, Result};
use std::{
    fs::File,
    io::{self, Read},
    mem::{MaybeUninit, size_of},
    os::fd::FromRawFd,
    ptr,
};

/// What a signal asks of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM or SIGINT: stop.
    Stop,
    /// SIGUSR1: print statistics.
    Statistics,
}

/// The signals that a server listens to.
#[derive(Debug)]
pub struct Signals(File);

impl Signals {
    /// Blocks the signals for this thread and those that it starts from now on, so that they wait
    /// to be read here. To be called before any thread is started.
    pub fn block() -> Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set that it is given, and the others only read
        // or change an initialised one.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            set.assume_init()
        };
        // SAFETY: `set` is initialised, and a null pointer for the old mask is allowed.
        let code = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) };
        if code != 0 {
            return Err(io::Error::from_raw_os_error(code)).context("block signals");
        }
        // SAFETY: -1 asks for a new descriptor; `set` is initialised.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("signalfd");
        }
        // SAFETY: `fd` was just opened, and nobody else knows it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Sleeps until a signal comes.
    pub fn wait(&mut self) -> Result<Signal> {
        // The signal's number is the first field of `signalfd_siginfo`.
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).context("read signals")?;
        let number = info.first_chunk().map(|n| u32::from_ne_bytes(*n));
        Ok(match number.and_then(|n| i32::try_from(n).ok()) {
            Some(libc::SIGUSR1) => Signal::Statistics,
            _ => Signal::Stop,
        })
    }
}
