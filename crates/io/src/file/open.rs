//! Opening and creating.

use super::{Alignment, File, FileKind, Lacks, Lock, lock};
use crate::{Cache, gate::Gate, memory::AlignedBuf, sys};
use block::{Context, Error, ErrorKind, Result};
use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};
use std::{
    fs::Metadata,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI32, AtomicU64},
    },
};

/// The largest alignment that is believed; what probing assumes when it cannot tell.
const ALIGNMENT_MAX: u32 = 4096;

/// How to open a file. The default: for writing, exclusively, through the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// Open for reading only.
    pub read_only: bool,
    /// Cache mode; decides on `O_DIRECT` and on flushes.
    pub cache: Cache,
    /// Where the file system refuses `O_DIRECT`, go through the page cache and note it
    /// ([`File::fallback`]) rather than fail.
    pub direct_fallback: bool,
    /// What other processes may do meanwhile.
    pub lock: Lock,
}

impl OpenOptions {
    /// To read, while others may read too.
    pub fn reading() -> Self {
        Self {
            read_only: true,
            lock: Lock::Read { share_write: false },
            ..Self::default()
        }
    }

    /// To look at it, whatever others do with it meanwhile.
    pub fn looking() -> Self {
        Self {
            lock: Lock::None,
            ..Self::reading()
        }
    }
}

impl File {
    /// Opens an existing regular file or block device.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Locked`] when another process uses the image, [`ErrorKind::Unsupported`]
    /// when `O_DIRECT` is wanted and refused, [`ErrorKind::Invalid`] for directories, pipes and the
    /// like, else what the system says.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<File>> {
        Self::build(path, options, OFlags::empty())
    }

    /// Creates a regular file that must not exist yet. `read_only` is ignored.
    pub fn create_new(path: &Path, options: &OpenOptions) -> Result<Arc<File>> {
        let options = OpenOptions {
            read_only: false,
            ..*options
        };
        Self::build(path, &options, OFlags::CREATE | OFlags::EXCL)
    }

    /// Creates a regular file, or opens an existing one and, once its lock is had, empties it.
    /// A block device is left as it is. `read_only` is ignored.
    pub fn create(path: &Path, options: &OpenOptions) -> Result<Arc<File>> {
        let options = OpenOptions {
            read_only: false,
            ..*options
        };
        let file = Self::build(path, &options, OFlags::CREATE)?;
        if file.kind == FileKind::Regular {
            rustix::fs::ftruncate(&file.fd, 0)
                .map_err(io::Error::from)
                .context(|| path.display().to_string())?;
        }
        Ok(file)
    }

    fn build(path: &Path, options: &OpenOptions, create: OFlags) -> Result<Arc<File>> {
        let name = || path.display().to_string();
        let access = if options.read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        // O_NONBLOCK: a FIFO must not make the open hang. It is cleared below, since
        // io_uring would take it as a wish for EAGAIN.
        let flags = access | create | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, 0o644.into())
            .map_err(io::Error::from)
            .context(name)?;
        let stat = rustix::fs::fstat(&fd)
            .map_err(io::Error::from)
            .context(name)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => FileKind::Regular,
            FileType::BlockDevice => FileKind::BlockDevice,
            FileType::CharacterDevice if options.read_only && is_empty(stat.st_rdev) => {
                FileKind::BlockDevice
            }
            other => {
                let path = path.display();
                return Err(Error::invalid(format!("{path}: {}", no_place(other))));
            }
        };
        let wanted = options.cache.direct();
        let refused = set_flags(&fd, wanted)
            .and_then(|()| {
                if wanted {
                    alignment(fd.as_fd(), kind).map(Some)
                } else {
                    Ok(None)
                }
            })
            .map_or_else(Refusal::of, Ok);
        let (alignment, fallback) = match refused {
            Ok(Some(alignment)) => (alignment, None),
            Ok(None) => (Alignment::NONE, None),
            Err(Refusal::Direct) if options.direct_fallback => {
                set_flags(&fd, false).context(name)?;
                let note = "the file system refuses O_DIRECT: goes through the page cache";
                (Alignment::NONE, Some(note.to_owned()))
            }
            Err(Refusal::Direct) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "{}: the file system refuses O_DIRECT, which cache mode '{}' needs; use --cache writeback",
                        path.display(),
                        options.cache
                    ),
                ));
            }
            Err(Refusal::Other(e)) => return Err(e).context(name),
        };
        lock::change(fd.as_fd(), path, Lock::None, options.lock)?;
        Ok(Arc::new(File {
            path: path.to_owned(),
            kind,
            cache: options.cache,
            read_only: options.read_only,
            direct: wanted && fallback.is_none(),
            fallback,
            alignment,
            optimal: u64::try_from(stat.st_blksize).unwrap_or(0).max(512),
            lock: Mutex::new(options.lock),
            sync_failed: AtomicI32::new(0),
            lacks: Lacks::default(),
            device_len: AtomicU64::new(u64::MAX),
            gate: Gate::new(),
            turn: Mutex::new(()),
            sim: None,
            remote: None,
            faults: None,
            fd,
        }))
    }
}

/// Whether an image may be in what this describes: a regular file, a block device, or, for reading only, one of the
/// kernel's devices that end where they begin (`/dev/null`, `/dev/zero`, `/dev/full`), which QEMU takes for empty disks.
/// Else why not.
pub fn refuse_as_image(metadata: &Metadata) -> Option<String> {
    let kind = metadata.file_type();
    let may = kind.is_file()
        || kind.is_block_device()
        || kind.is_char_device() && is_empty(metadata.rdev());
    (!may).then(|| no_place(FileType::from_raw_mode(metadata.mode())))
}

fn no_place(kind: FileType) -> String {
    format!(
        "is a {}, neither a file nor a block device",
        type_name(kind)
    )
}

/// Whether a character device is one of those. Of others nobody knows what opening and reading does.
fn is_empty(device: u64) -> bool {
    /// The driver of memory, and its devices `null`, `zero` and `full` (Linux, `admin-guide/devices.txt`).
    const MEMORY: u32 = 1;
    rustix::fs::major(device) == MEMORY && matches!(rustix::fs::minor(device), 3 | 5 | 7)
}

enum Refusal {
    Direct,
    Other(io::Error),
}

impl Refusal {
    fn of<T>(error: io::Error) -> Result<T, Refusal> {
        Err(match error.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => Refusal::Direct,
            _ => Refusal::Other(error),
        })
    }
}

/// Clears `O_NONBLOCK`, sets or clears `O_DIRECT`.
fn set_flags(fd: &OwnedFd, direct: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(fd)?;
    flags.remove(OFlags::NONBLOCK);
    flags.set(OFlags::DIRECT, direct);
    Ok(rustix::fs::fcntl_setfl(fd, flags)?)
}

fn type_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "directory",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        _ => "file of an unknown type",
    }
}

/// What direct I/O on `fd` demands. `EINVAL` when the kernel says that it cannot do any.
fn alignment(fd: BorrowedFd<'_>, kind: FileKind) -> io::Result<Alignment> {
    let told = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(told) = told
        && told.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        let (offset, memory) = (told.stx_dio_offset_align, told.stx_dio_mem_align);
        if offset == 0 || memory == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if offset.is_power_of_two() && memory.is_power_of_two() && offset <= 1 << 16 {
            return Ok(Alignment { offset, memory });
        }
    }
    if kind == FileKind::BlockDevice {
        let size = sys::block_size(fd)?;
        if size.is_power_of_two() && size <= 1 << 16 {
            return Ok(Alignment {
                offset: size,
                memory: size.max(512),
            });
        }
    }
    Ok(probe(fd))
}

/// The smallest alignment at which a direct read works; the largest when nothing can be read.
fn probe(fd: BorrowedFd<'_>) -> Alignment {
    let mut buf = AlignedBuf::new(2 * ALIGNMENT_MAX as usize, ALIGNMENT_MAX as usize);
    let works = |size: u32| {
        let buf = &mut buf[..size as usize];
        // A file that ends before has answered nothing about alignment.
        matches!(sys::pread(fd.as_raw_fd(), buf, u64::from(size)), Ok(n) if n > 0)
    };
    let offset = [512, 1024, 2048]
        .into_iter()
        .find({
            let mut works = works;
            move |size| works(*size)
        })
        .unwrap_or(ALIGNMENT_MAX);
    Alignment {
        offset,
        memory: offset.max(512),
    }
}
