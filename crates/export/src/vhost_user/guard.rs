//! A front-end that truncates the memory it shares: its own loss. Unsafe code: a signal handler.
//!
//! Access to a mapped page whose file has become shorter raises SIGBUS, which would end the
//! process and with it every other guest's disk. The handler here looks up the faulting address among
//! the mappings of guest memory; if it is one, the whole mapping is replaced by anonymous
//! zeros in place, and the access goes on. That guest sees a ring of zeros and gets
//! nowhere; the others notice nothing. Any other SIGBUS goes to whoever handled it before.
//!
//! (The kernel's own access for a read or write answers `EFAULT`, an I/O error of that request.)
//!
//! The handler may interrupt any thread at any point, so it only reads a table of atomics and makes
//! system calls.

use std::{
    mem::MaybeUninit,
    ptr,
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Mappings that can be guarded at once, over all guests.
const MAPPINGS_MAX: usize = 4096;

/// Start and length of each mapping; a length of zero is a free entry.
static TABLE: [(AtomicUsize, AtomicUsize); MAPPINGS_MAX] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; MAPPINGS_MAX];
/// One changes the table at a time.
static CHANGE: Mutex<()> = Mutex::new(());
/// What handled SIGBUS before; written once, before the handler is there.
static PREVIOUS: Previous = Previous(std::cell::UnsafeCell::new(MaybeUninit::uninit()));
static INSTALL: Once = Once::new();

struct Previous(std::cell::UnsafeCell<MaybeUninit<libc::sigaction>>);
// SAFETY: written once under `INSTALL` before the only reader, the handler, exists.
unsafe impl Sync for Previous {}

/// Guards the mapping; `false` when the table is full.
pub(super) fn add(start: usize, len: usize) -> bool {
    INSTALL.call_once(install);
    let _changing = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    for (entry_start, entry_len) in &TABLE {
        if entry_len.load(Ordering::Relaxed) == 0 {
            entry_start.store(start, Ordering::Relaxed);
            entry_len.store(len, Ordering::Release);
            return true;
        }
    }
    false
}

/// Ends the guard of the mapping at `start`, before it is unmapped.
pub(super) fn remove(start: usize) {
    let _changing = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    for (entry_start, entry_len) in &TABLE {
        if entry_start.load(Ordering::Relaxed) == start && entry_len.load(Ordering::Relaxed) != 0 {
            entry_len.store(0, Ordering::Release);
            return;
        }
    }
}

fn install() {
    // SAFETY: `sigaction` structures are valid when zeroed; the handler has the signature
    // that SA_SIGINFO asks for and is async-signal-safe; PREVIOUS is written only here, once.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, ptr::null(), (*PREVIOUS.0.get()).as_mut_ptr());
        if libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) != 0 {
            tracing::warn!(
                "a client that truncates its memory can end this process: no SIGBUS handler"
            );
        }
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for SIGBUS, whose address field is set.
    let at = unsafe { (*info).si_addr() } as usize;
    for (start, len) in &TABLE {
        let len = len.load(Ordering::Acquire);
        let start = start.load(Ordering::Relaxed);
        if len != 0 && at >= start && at - start < len {
            // SAFETY: the range is a mapping of guest memory, which nothing but raw pointers
            // refers to; replacing it keeps all of them valid. `errno` is put back, since the
            // interrupted code may be about to read its own.
            unsafe {
                let errno = *libc::__errno_location();
                let map = libc::mmap(
                    start as *mut libc::c_void,
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                );
                *libc::__errno_location() = errno;
                if map != libc::MAP_FAILED {
                    return;
                }
            }
        }
    }
    // SAFETY: PREVIOUS was written before this handler was installed. Its handler, if it is
    // one, expects what we were given; otherwise the default action is restored and the
    // faulting access, made again on return, takes it.
    unsafe {
        let previous = (*PREVIOUS.0.get()).assume_init_ref();
        match previous.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                libc::signal(signal, libc::SIG_DFL);
            }
            handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{GuestMemory, Region, RegionSpec, read, tests::memfd};
    use std::sync::Arc;

    #[test]
    fn a_truncated_region_reads_as_zeros() {
        let file = memfd(0x10000);
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 0x10000], 0).unwrap();
        let spec = RegionSpec {
            guest: 0,
            user: 0,
            len: 0x10000,
            offset: 0,
        };
        let memory = GuestMemory::new(vec![Arc::new(Region::map(spec, &file).unwrap())]).unwrap();
        let at = memory.range(0x8000, 4).unwrap();
        let mut out = [0; 4];
        // SAFETY: `range` vouches for the bytes.
        unsafe { read(at, &mut out) };
        assert_eq!(out, [7; 4]);
        file.set_len(0).unwrap();
        // SAFETY: as above; this access faults and is made good.
        unsafe { read(at, &mut out) };
        assert_eq!(out, [0; 4]);
    }
}
