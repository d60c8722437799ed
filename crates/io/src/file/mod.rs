//! Image files and block devices, open for positioned I/O.
//!
//! ```text
//!   open      flags, O_DIRECT, kind, alignment            open.rs
//!   lock      QEMU's image locks                          lock.rs
//!   blocking  reads, writes, zeroes, … of any alignment   blocking.rs
//!   Remote    disks of servers in the place of files          remote.rs
//!   Storage   the same behind `block::Storage`            storage.rs
//! ```
//!
//! The engines use the descriptor, the alignment and the gate of a [`File`]; everything that is
//! slow or rare uses its [`block::Storage`].

mod blocking;
mod lock;
mod open;
mod remote;
mod storage;
mod window;

pub(crate) use blocking::GateHeld;
pub use lock::{Lock, wait_for_lock};
pub use open::{OpenOptions, refuse_as_image};
pub use remote::Remote;

use crate::{Cache, gate::Gate, sim::SimDisk};
use block::faults::{Faults, IoType};
use block::{Context, Result};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    },
};

/// What is short is done before anybody who waits would be woken.
const TURN_BYTES: usize = 128 << 10;

/// What a [`File`] is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device; cannot grow.
    BlockDevice,
    /// A disk of a server ([`Remote`]); cannot grow.
    Remote,
    /// A [`SimDisk`].
    Simulated,
}

/// What unbuffered I/O demands, in bytes. Both are powers of two; 1 means nothing is demanded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of offsets and lengths.
    pub offset: u32,
    /// Of addresses of memory.
    pub memory: u32,
}

impl Alignment {
    /// No demands.
    pub const NONE: Alignment = Alignment {
        offset: 1,
        memory: 1,
    };
}

/// An open image file or device. Shared as `Arc<File>`; closing it releases its locks.
#[derive(Debug)]
pub struct File {
    fd: OwnedFd,
    path: PathBuf,
    kind: FileKind,
    cache: Cache,
    read_only: bool,
    direct: bool,
    fallback: Option<String>,
    alignment: Alignment,
    optimal: u64,
    lock: Mutex<Lock>,
    /// Errno of the first `fdatasync` that failed on a buffered file, else 0.
    sync_failed: AtomicI32,
    /// What the host turned out not to support; asked only once.
    lacks: Lacks,
    /// Cached size of a block device, which seldom changes; `u64::MAX` when not known.
    device_len: AtomicU64,
    gate: Gate,
    /// Held by who writes much through the page cache.
    turn: Mutex<()>,
    sim: Option<Arc<SimDisk>>,
    remote: Option<Arc<dyn Remote>>,
    /// Accesses that are to fail.
    faults: Option<Arc<Faults>>,
}

#[derive(Debug, Default)]
struct Lacks {
    zero_range: AtomicBool,
    punch_hole: AtomicBool,
    fallocate: AtomicBool,
    discard: AtomicBool,
}

/// The largest alignment, in bytes, that a file with faults may ask for: a part of what buffers for other accesses have.
const FAULTS_ALIGNMENT_MAX: u32 = 64 << 10;

impl File {
    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode: the same for whoever opened this file, by whatever name.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn identity(&self) -> Result<(u64, u64)> {
        if let Some(sim) = &self.sim {
            // No device has that number.
            return Ok((u64::MAX, Arc::as_ptr(sim).addr() as u64));
        }
        if let Some(remote) = &self.remote {
            return Ok(remote.identity());
        }
        let stat = rustix::fs::fstat(&self.fd)
            .map_err(io::Error::from)
            .context(|| self.path.display().to_string())?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether `O_DIRECT` is in effect.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Why `O_DIRECT` is not in effect although the cache mode asks for it, when
    /// [`OpenOptions::direct_fallback`] allowed that.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// The cache mode that it was opened with.
    pub fn cache(&self) -> Cache {
        self.cache
    }

    /// What direct I/O on it demands ([`Alignment::NONE`] when it is buffered).
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// What it is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Whether the first write to space that was only reserved changes the file system's own records, for which an `fdatasync` then
    /// waits: a regular file with `O_DIRECT` on ext4 or XFS. (Others have no such extents, or write elsewhere every time.)
    pub fn has_unwritten_extents(&self) -> bool {
        /// `f_type` of statfs(2).
        const EXT4: i64 = 0xef53;
        const XFS: i64 = 0x5846_5342;
        let kind = || rustix::fs::fstatfs(&self.fd).map(|found| found.f_type);
        self.kind == FileKind::Regular
            && self.direct
            && !self.cache.ignores_flush()
            && matches!(kind(), Ok(EXT4 | XFS))
    }

    /// The transfer size in bytes that the host recommends (`st_blksize`), at least 512.
    pub fn optimal_block_size(&self) -> u64 {
        self.optimal
    }

    /// Current size in bytes.
    pub fn len(&self) -> Result<u64> {
        self.size().context(|| self.path.display().to_string())
    }

    /// Whether the size is zero.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The simulated disk behind it, if there is one.
    pub fn simulated(&self) -> Option<&Arc<SimDisk>> {
        self.sim.as_ref()
    }

    /// A simulated disk as a file, for the `sim` engine.
    pub fn sim(disk: Arc<SimDisk>) -> Result<Arc<File>> {
        let (path, alignment) = (PathBuf::from(disk.label()), disk.alignment());
        let mut file = File::elsewhere(path, FileKind::Simulated, alignment)?;
        file.cache = Cache::None;
        file.direct = alignment.offset > 1;
        file.sim = Some(disk);
        Ok(Arc::new(file))
    }

    /// What is no file of the host, to be filled in: writable, buffered and without a lock.
    fn elsewhere(path: PathBuf, kind: FileKind, alignment: Alignment) -> Result<File> {
        // A descriptor that nothing reads.
        let fd: OwnedFd = std::fs::File::open("/dev/null")
            .context(|| "/dev/null")?
            .into();
        Ok(File {
            fd,
            path,
            kind,
            cache: Cache::default(),
            read_only: false,
            direct: false,
            fallback: None,
            alignment,
            optimal: 4096,
            lock: Mutex::new(Lock::None),
            sync_failed: AtomicI32::new(0),
            lacks: Lacks::default(),
            device_len: AtomicU64::new(u64::MAX),
            gate: Gate::new(),
            turn: Mutex::new(()),
            sim: None,
            remote: None,
            faults: None,
        })
    }

    /// The server's disk behind it, if there is one.
    pub(crate) fn at_server(&self) -> Option<&dyn Remote> {
        self.remote.as_deref()
    }

    /// The file with `faults`, its accesses aligned to `align` bytes at least, a power of two: for who has just opened it.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Invalid`] where it is shared already, or the alignment is more than any device has (64 KiB).
    pub fn with_faults(file: Arc<File>, faults: Arc<Faults>, align: u32) -> Result<Arc<File>> {
        // Buffers for what is not aligned are a few times as large, and no larger.
        if align > FAULTS_ALIGNMENT_MAX {
            return Err(block::Error::invalid(format!(
                "accesses aligned to {align} bytes: at most {FAULTS_ALIGNMENT_MAX} are possible"
            )));
        }
        let mut file = Arc::try_unwrap(file).map_err(|file| {
            let path = file.path.display();
            block::Error::invalid(format!("{path}: faults of a file that is in use"))
        })?;
        file.faults = Some(faults);
        file.alignment.offset = file.alignment.offset.max(align);
        Ok(Arc::new(file))
    }

    /// The accesses that are to fail.
    pub fn faults(&self) -> Option<&Arc<Faults>> {
        self.faults.as_ref()
    }

    /// Fails an access that is to fail.
    #[inline]
    pub(crate) fn fault(&self, io: IoType, offset: u64, len: u64) -> io::Result<()> {
        match &self.faults {
            Some(faults) => faults.check(io, offset, len),
            None => Ok(()),
        }
    }

    /// Whether only calls of this process reach it: no kernel knows of a server's disk, or of faults.
    pub fn needs_threads(&self) -> bool {
        self.kind == FileKind::Remote || self.faults.is_some()
    }

    /// The first byte and the bytes of the part of a file that it is, where it is a [`File::window`].
    pub fn part(&self) -> Option<(u64, u64)> {
        self.at_server().and_then(Remote::part)
    }

    /// Whether it is as long as it is: a device, or a disk of a server.
    pub fn is_fixed(&self) -> bool {
        matches!(self.kind, FileKind::BlockDevice | FileKind::Remote)
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        use std::os::fd::AsRawFd;
        self.fd.as_raw_fd()
    }

    /// The gate of writes, while the file demands alignment.
    pub(crate) fn gate(&self) -> Option<&Gate> {
        (self.alignment.offset > 1).then_some(&self.gate)
    }

    pub(crate) fn size(&self) -> io::Result<u64> {
        if let Some(sim) = &self.sim {
            return Ok(sim.size());
        }
        if let Some(remote) = &self.remote {
            return Ok(remote.size());
        }
        if self.kind == FileKind::BlockDevice {
            let cached = self.device_len.load(Ordering::Relaxed);
            if cached != u64::MAX {
                return Ok(cached);
            }
            let len = rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::End(0))?;
            self.device_len.store(len, Ordering::Relaxed);
            return Ok(len);
        }
        let stat = rustix::fs::fstat(&self.fd)?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// The errno that every `Sync` gets, once a buffered one has failed: the page cache may have
    /// dropped the data, and a later success would promise what is lost.
    pub fn sync_failure(&self) -> Option<i32> {
        match self.sync_failed.load(Ordering::Acquire) {
            0 => None,
            errno => Some(errno),
        }
    }

    /// Makes durable what was written, by whomever, and has what is read from now on come from the disk, as far as the
    /// host can: pages that it could not write back look like written ones in its memory.
    ///
    /// # Errors
    ///
    /// As [`block::Storage::sync`].
    pub fn read_anew(&self) -> Result<()> {
        block::Storage::sync(self)?;
        if self.sim.is_none() && self.remote.is_none() {
            // Advice: not every file system takes it.
            let _ = rustix::fs::fadvise(&self.fd, 0, None, rustix::fs::Advice::DontNeed);
        }
        Ok(())
    }

    /// The turn to write `len` bytes, where those who write at once had better go one after the other: the kernel lets
    /// one of them at a time into the page cache of a file (the inode's lock), and the others burn their processor until
    /// then instead of reading what they write next.
    fn turn(&self, len: usize) -> Option<MutexGuard<'_, ()>> {
        let takes = !self.direct && self.kind == FileKind::Regular && len >= TURN_BYTES;
        takes.then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn note_sync_failure(&self, errno: i32) {
        if !self.direct {
            let _ =
                self.sync_failed
                    .compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::Storage;

    #[test]
    fn who_writes_much_through_the_page_cache_waits_for_its_turn() {
        let dir = testkit::TempDir::new();
        let path = dir.path("file");
        std::fs::write(&path, "").unwrap();
        let options = |cache| OpenOptions {
            cache,
            ..OpenOptions::default()
        };
        let file = File::open(&path, &options(Cache::Writeback)).unwrap();
        let turn = file.turn(TURN_BYTES).expect("a turn");
        assert!(file.turn.try_lock().is_err());
        // What is short waits for nobody.
        file.write_at(0, &[1; TURN_BYTES - 1]).unwrap();
        drop(turn);
        file.write_at(0, &[2; TURN_BYTES]).unwrap();
        assert!(file.turn.try_lock().is_ok());
        let direct = OpenOptions {
            direct_fallback: true,
            lock: Lock::None,
            ..options(Cache::None)
        };
        let direct = File::open(&path, &direct).unwrap();
        assert_eq!(direct.turn(TURN_BYTES).is_some(), !direct.direct());
    }
}
