//! What an engine does: the contract between it and the disk layer.
//!
//! One engine belongs to one thread. A turn of that thread's loop is
//!
//! ```text
//!   stage, stage, stage …    what the queues found; nothing reaches the kernel yet
//!   turn(wait, &mut events)  merge neighbours, submit all with one system call, wait for
//!                            completions and watched descriptors (the same call with io_uring)
//!   … hand out events.completions and events.ready
//! ```

use crate::File;
use block::{Error, IoVec, Result};
use std::{fmt, os::fd::BorrowedFd, str::FromStr, sync::Arc, time::Duration};

/// Which engine a user asked for (`--aio`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Aio {
    /// The best one that the files and the kernel can do.
    #[default]
    Auto,
    /// This one or none.
    Only(EngineKind),
}

/// The engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// A pool of threads that make blocking calls.
    Threads,
    /// Linux AIO (`io_submit`).
    Native,
    /// `io_uring`.
    IoUring,
    /// In memory, seeded: for tests.
    Sim,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineKind::Threads => "threads",
            EngineKind::Native => "native",
            EngineKind::IoUring => "io_uring",
            EngineKind::Sim => "sim",
        })
    }
}

impl FromStr for Aio {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "auto" => Aio::Auto,
            "threads" => Aio::Only(EngineKind::Threads),
            "native" => Aio::Only(EngineKind::Native),
            "io_uring" => Aio::Only(EngineKind::IoUring),
            _ => {
                return Err(Error::invalid(format!(
                    "'{text}' is not an engine: auto, threads, native or io_uring"
                )));
            }
        })
    }
}

/// Cache modes with QEMU's names and meaning (qemu-img(1), `-t`).
///
/// | mode | O_DIRECT | every write durable | flushes reach the disk |
/// |---|---|---|---|
/// | `none` | yes | no | yes |
/// | `writeback` | no | no | yes |
/// | `writethrough` | no | yes | yes |
/// | `directsync` | yes | yes | yes |
/// | `unsafe` | no | no | no |
/// | `direct-unsafe` | yes | no | no |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Cache {
    /// Bypass the host's page cache.
    None,
    /// Through the host's page cache.
    #[default]
    Writeback,
    /// Page cache for reads; a write completes when it is stable.
    Writethrough,
    /// Bypass the page cache; a write completes when it is stable.
    Directsync,
    /// Flushes are ignored: a crash of the host loses data.
    Unsafe,
    /// The same, bypassing the page cache: for measuring what flushes cost. QEMU has no name for it
    /// (`cache.direct=on,cache.no-flush=on`), so it is not among those that are parsed.
    DirectUnsafe,
}

impl Cache {
    /// Whether files are opened with `O_DIRECT`.
    pub fn direct(self) -> bool {
        matches!(self, Cache::None | Cache::Directsync | Cache::DirectUnsafe)
    }

    /// Whether each write is made stable before it completes.
    pub fn writethrough(self) -> bool {
        matches!(self, Cache::Writethrough | Cache::Directsync)
    }

    /// Whether flushes are ignored.
    pub fn ignores_flush(self) -> bool {
        matches!(self, Cache::Unsafe | Cache::DirectUnsafe)
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cache::None => "none",
            Cache::Writeback => "writeback",
            Cache::Writethrough => "writethrough",
            Cache::Directsync => "directsync",
            Cache::Unsafe => "unsafe",
            Cache::DirectUnsafe => "direct-unsafe",
        })
    }
}

impl FromStr for Cache {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "none" => Cache::None,
            "writeback" => Cache::Writeback,
            "writethrough" => Cache::Writethrough,
            "directsync" => Cache::Directsync,
            "unsafe" => Cache::Unsafe,
            _ => {
                return Err(Error::invalid(format!(
                    "'{text}' is not a cache mode: none, writeback, writethrough, directsync or unsafe"
                )));
            }
        })
    }
}

/// A file as one engine knows it, from [`Engine::attach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileSlot(pub u16);

/// The caller's name for an operation, given back with its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// What to do with a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Read into the memory; bytes behind the end of the file read as zeros.
    Read,
    /// Write from the memory.
    Write,
    /// `fdatasync`. Carries no range.
    Sync,
    /// The range is not needed any more (punch hole, `BLKDISCARD`). Where the host
    /// cannot, it succeeds without doing anything.
    Discard,
    /// Make the range read as zeros: `fallocate` zero range (punch hole with `unmap`), `BLKZEROOUT`,
    /// else by writing zeros (unless `fast`, which fails with `EOPNOTSUPP` then). Grows a
    /// file that ends before the range does.
    Zero {
        /// Give the space back.
        unmap: bool,
        /// Fail rather than write zeros.
        fast: bool,
    },
    /// Reserve space (`fallocate` mode 0), growing the file. Falls back to growing it sparsely.
    /// [`Completion::zeroed`] says whether the new space reads as zeros.
    Allocate,
}

/// One operation to stage.
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// File to work on.
    pub file: FileSlot,
    /// What to do.
    pub op: IoOp,
    /// First byte in the file; any alignment.
    pub offset: u64,
    /// Bytes. For reads and writes the sum of the lengths in `iov`.
    pub len: u64,
    /// First of the pieces of memory of a read or write. The array itself must stay where it is
    /// until the completion.
    pub iov: *const IoVec,
    /// How many pieces there are.
    pub iov_len: u32,
    /// Given back with the completion.
    pub token: Token,
}

/// The end of an operation: exactly one for each that was staged.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// Which one.
    pub token: Token,
    /// Zero, or the (positive) errno. Short transfers are continued by the engine
    /// and never seen: success means all bytes.
    pub errno: i32,
    /// For [`IoOp::Allocate`]: whether the space reads as zeros.
    pub zeroed: bool,
}

/// What a turn brought. Kept and reused by the caller; `turn` appends.
#[derive(Debug, Default)]
pub struct Events {
    /// Operations that ended.
    pub completions: Vec<Completion>,
    /// Keys of watched descriptors that became readable (or writable, or hung up).
    pub ready: Vec<u64>,
}

/// How long a turn may sleep when it has nothing to hand out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all. Makes a system call only when there is something to submit or the
    /// engine cannot see completions otherwise.
    Poll,
    /// Until something happens, at most so long.
    For(Duration),
    /// Until something happens.
    Forever,
}

/// What an engine did so far; for tests and statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Operations staged.
    pub staged: u64,
    /// Operations that the kernel (or a worker) was given: fewer where neighbours merged.
    pub issued: u64,
    /// System calls that submitted (`io_submit`, `io_uring_enter`, or one wake-up of the pool for a batch).
    pub submit_calls: u64,
    /// System calls made only to wait or reap (`epoll_wait`, `io_getevents`).
    pub wait_calls: u64,
    /// Operations that went through a bounce buffer.
    pub bounced: u64,
    /// `Sync` operations.
    pub syncs: u64,
}

/// An engine, owned by one thread.
pub trait Engine {
    /// Which one it is.
    fn kind(&self) -> EngineKind;

    /// Makes `file` known; the slot is valid until `detach`.
    fn attach(&mut self, file: &Arc<File>) -> Result<FileSlot>;

    /// Forgets a file that no staged or running operation uses.
    fn detach(&mut self, slot: FileSlot);

    /// Accepts an operation for the next turn. `false` when the engine is full: nothing
    /// was taken, try again after a turn (at least [`Engine::capacity`] operations fit).
    ///
    /// # Safety
    ///
    /// The array of pieces and the memory that they describe must stay valid, and for reads must
    /// not be borrowed by anyone, until the operation's completion was returned or the engine was dropped
    /// (dropping waits for what is in flight).
    unsafe fn stage(&mut self, io: Io) -> bool;

    /// How many operations may be in flight.
    fn capacity(&self) -> usize;

    /// Operations staged or running.
    fn in_flight(&self) -> usize;

    /// Reports `key` in [`Events::ready`] whenever `fd` becomes readable, until `unwatch`.
    /// Edge or level is the engine's choice: the caller reads until `EAGAIN`
    /// (or reads the eventfd) each time. With `writable`, also when it becomes writable.
    fn watch(&mut self, fd: BorrowedFd<'_>, key: u64, writable: bool) -> Result<()>;

    /// Stops watching. Keys that are already in an `Events` may still be there.
    fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u64) -> Result<()>;

    /// In the middle of a long batch: submits what was staged so far, so that the device starts on it, where the engine
    /// does that without losing much. Nothing is collected. The next turn reports what may be wrong.
    fn push(&mut self);

    /// Submits what was staged and collects what happened, sleeping at most `wait` while there is nothing.
    fn turn(&mut self, wait: Wait, events: &mut Events) -> Result<()>;

    /// What was done so far.
    fn counters(&self) -> Counters;
}
