//! What a child does between fork and exec: the only unsafe code of the comparison.

use rustix::process::{Signal, set_parent_process_death_signal};
use std::{io, mem::MaybeUninit, os::unix::process::CommandExt, process::Command, ptr};

/// Makes `command` start with no signal blocked (this process may have blocked some to read them, and a mask is
/// inherited: a server would not hear SIGTERM) and be killed when the thread that started it ends, however it ends.
pub(crate) fn tie(command: &mut Command) {
    let in_child = || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set, which `pthread_sigmask` only reads; a null pointer for
        // the old mask is allowed.
        let code = unsafe {
            libc::sigemptyset(none.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut())
        };
        match code {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    };
    // SAFETY: the closure makes system calls only; it neither allocates nor locks, so it may run in the
    // forked child of a process with several threads.
    unsafe { command.pre_exec(in_child) };
}
