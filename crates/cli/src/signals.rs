//! Signals as a descriptor that can be read, instead of handlers that may run anywhere.
//!
//! The only module of this crate with unsafe code: `signalfd` has no safe wrapper in the libraries at hand.

use crate::partial;
use anyhow::{Context, Result};
use std::{
    fs::File,
    io::{self, Read},
    mem::{MaybeUninit, size_of},
    os::fd::FromRawFd,
    ptr,
    sync::atomic::{AtomicBool, AtomicI32, Ordering},
    thread,
};
use tool::work::Stop;

/// What a signal asks of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM, SIGINT or SIGHUP: stop.
    Stop,
    /// SIGUSR1: print statistics.
    Statistics,
}

/// The signals that a server listens to.
#[derive(Debug)]
pub struct Signals(File);

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set that it is given, and the others only read
    // or change an initialised one.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// Blocks `signals` for this thread and those that it starts from now on.
fn hold(signals: &[i32]) -> Result<libc::sigset_t> {
    let set = set_of(signals);
    // SAFETY: `set` is initialised, and a null pointer for the old mask is allowed.
    let code = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) };
    if code != 0 {
        return Err(io::Error::from_raw_os_error(code)).context("block signals");
    }
    Ok(set)
}

impl Signals {
    /// Blocks the signals of a server, SIGTERM, SIGINT, SIGUSR1 and, where this process does not ignore it, SIGHUP, for this thread
    /// and those that it starts from now on, so that they wait to be read here. To be called before any thread is started.
    pub fn block() -> Result<Self> {
        let mut signals = vec![libc::SIGTERM, libc::SIGINT, libc::SIGUSR1];
        // Of a terminal that is closed; `nohup` has it ignored.
        signals.extend((!is_ignored(libc::SIGHUP)).then_some(libc::SIGHUP));
        Self::block_these(&signals)
    }

    fn block_these(signals: &[i32]) -> Result<Self> {
        let set = hold(signals)?;
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
        Ok(match self.wait_number()? {
            libc::SIGUSR1 => Signal::Statistics,
            _ => Signal::Stop,
        })
    }

    fn wait_number(&mut self) -> Result<i32> {
        // The signal's number is the first field of `signalfd_siginfo`.
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).context("read signals")?;
        let number = info.first_chunk().map(|n| u32::from_ne_bytes(*n));
        let number = number.and_then(|n| i32::try_from(n).ok());
        number.context("a signal without a number")
    }
}

/// The signal that ended the work of [`stop_on_signals`]; 0: none.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// Whether SIGUSR1 came.
static PROGRESS: AtomicBool = AtomicBool::new(false);

/// Whether somebody asked by SIGUSR1, since this was called last, how far the work of [`stop_on_signals`] is.
pub fn progress_wanted() -> bool {
    // Most often nobody did, and it is asked for each piece.
    PROGRESS.load(Ordering::Relaxed) && PROGRESS.swap(false, Ordering::Relaxed)
}

/// From now on SIGUSR1 ends nothing: it waits for [`stop_on_signals`]. To be called first of all: whoever starts a command
/// may ask how far it is before that has begun.
pub fn hold_progress() {
    // A mask that cannot be set leaves the signal what it was.
    let _ = hold(&[libc::SIGUSR1]);
}

/// From now on SIGINT, SIGTERM and SIGHUP, where this process does not ignore them, ask for the end of the work: it
/// clears up behind itself then. The second of them ends the process at once, and takes away only what was not finished:
/// `timeout` and others signal a process and its group, which makes two. SIGUSR1 asks how far the work is
/// ([`progress_wanted`]). To be called before any thread is started.
pub fn stop_on_signals() -> Result<Stop> {
    let signals: Vec<i32> = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1]
        .into_iter()
        .filter(|signal| !is_ignored(*signal))
        .collect();
    let mut signals = Signals::block_these(&signals)?;
    let stop = Stop::default();
    let asked = stop.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while let Ok(number) = signals.wait_number() {
                if number == libc::SIGUSR1 {
                    PROGRESS.store(true, Ordering::Relaxed);
                    continue;
                }
                if CAUGHT.swap(number, Ordering::Relaxed) != 0 {
                    let _held = partial::abandon();
                    die_of(number);
                }
                asked.request();
            }
        })
        .context("start a thread")?;
    Ok(stop)
}

/// Whether a signal has asked for the end of the work.
pub fn are_caught() -> bool {
    CAUGHT.load(Ordering::Relaxed) != 0
}

/// Ends the process as the signal that stopped its work would have, where one did: a shell that runs a script
/// wants to see that, and shows 128 and the signal's number.
pub fn die_if_stopped() {
    match CAUGHT.load(Ordering::Relaxed) {
        0 => {}
        number => die_of(number),
    }
}

/// Whether the process was started with the signal ignored, as `nohup` and `&` in a script do it.
fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null pointer asks for the present action, which is written where the second one points. All
    // zeros are a valid `sigaction`.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Ends the process by `signal`, whose action was never changed.
fn die_of(signal: i32) {
    let set = set_of(&[signal]);
    // SAFETY: `set` is initialised, and a null pointer for the old mask is allowed.
    unsafe {
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
        libc::raise(signal);
    }
}
