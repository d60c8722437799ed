//! A file system of one file, `disk`, whose answers take as long as a model says.

use super::{
    Pieces, Setup,
    clock::{Answer, Clock, Kept},
};
use crate::simulated::Op;
use block::{Context, Result};
use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags,
    PollNotifier, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

/// The file's name.
pub(super) const DISK: &str = "disk";
const DISK_INO: INodeNo = INodeNo(2);
/// Nothing changes behind the kernel's back.
const TTL: Duration = Duration::from_secs(3600);
/// Bytes of a request at most; the kernel cuts larger ones.
const REQUEST_MAX: u32 = 1 << 20;
/// Requests of asynchronous I/O in flight at most: more than any load's depth.
const FLIGHT_MAX: u16 = 1024;
/// Statfs counts in these.
const BLOCK: u32 = 4096;

#[derive(Debug)]
pub(super) struct FileSystem {
    clock: Arc<Clock>,
    files: Vec<File>,
    setup: Setup,
    /// Bytes of the disk.
    len: AtomicU64,
    made: SystemTime,
    /// Flushes that programs asked for.
    flushes: Arc<AtomicU64>,
}

impl FileSystem {
    pub(super) fn new(setup: Setup, files: Vec<File>) -> Result<Self> {
        let len = match files.first().filter(|_| setup.grows) {
            Some(file) => file
                .metadata()
                .context(|| "what it lies in".to_owned())?
                .len(),
            None => setup.bytes,
        };
        Ok(Self {
            clock: Arc::new(Clock::start(setup.build()?)?),
            files,
            setup,
            len: AtomicU64::new(len),
            made: SystemTime::now(),
            flushes: Arc::default(),
        })
    }

    /// Something that tells how it does, also when the file system is mounted.
    pub(super) fn kept(&self) -> impl Fn() -> Kept + Send + 'static {
        let clock = Arc::clone(&self.clock);
        move || clock.kept()
    }

    /// How many flushes programs asked for, counted on.
    pub(super) fn flushes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.flushes)
    }

    /// Bytes of the disk.
    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Has it be so long. The kernel asks for one change at a time, and for no write meanwhile.
    fn set_len(&self, len: u64) -> std::result::Result<(), Errno> {
        if len == self.len() {
            return Ok(());
        }
        if !self.setup.grows {
            // A device has the size that it has; who opens it with O_TRUNC means no harm.
            return if len == 0 { Ok(()) } else { Err(Errno::EINVAL) };
        }
        if len > self.setup.bytes {
            return Err(Errno::EFBIG);
        }
        for file in &self.files {
            file.set_len(len).map_err(|error| errno(&error))?;
        }
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn attr(&self, ino: INodeNo) -> FileAttr {
        let is_disk = ino == DISK_INO;
        let size = if is_disk { self.len() } else { 0 };
        FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: self.made,
            mtime: self.made,
            ctime: self.made,
            crtime: self.made,
            kind: match is_disk {
                true => FileType::RegularFile,
                false => FileType::Directory,
            },
            perm: if is_disk { 0o600 } else { 0o700 },
            nlink: if is_disk { 1 } else { 2 },
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }

    /// Calls `io` for each part of a range with its file, the place there and where in the range it begins.
    fn each(
        &self,
        offset: u64,
        bytes: usize,
        mut io: impl FnMut(&File, u64, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut at = 0;
        let pieces = Pieces::new(self.setup.chunk, self.files.len(), offset, bytes as u64);
        for piece in pieces {
            let length = usize::try_from(piece.bytes).unwrap_or(usize::MAX);
            io(&self.files[piece.device], piece.offset, at..at + length)?;
            at += length;
        }
        Ok(())
    }

    fn submit(&self, op: Op, offset: u64, bytes: usize, answer: Answer) {
        self.clock.submit(op, offset, bytes as u64, answer);
    }
}

/// As the kernel numbers it.
fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Filesystem for FileSystem {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is the kernel's to grant: what it does not have, it does not need.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_ASYNC_READ);
        let _ = config.set_max_write(REQUEST_MAX);
        let _ = config.set_max_background(FLIGHT_MAX);
        let _ = config.set_congestion_threshold(FLIGHT_MAX);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match parent == INodeNo::ROOT && name == DISK {
            true => reply.entry(&TTL, &self.attr(DISK_INO), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match size.map_or(Ok(()), |size| self.set_len(size)) {
            Ok(()) => reply.attr(&TTL, &self.attr(ino)),
            Err(errno) => reply.error(errno),
        }
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        // Who wants the page cache has it, as on a block device.
        let how = match flags.0 & libc::O_DIRECT != 0 {
            true => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            false => FopenFlags::FOPEN_KEEP_CACHE,
        };
        reply.opened(FileHandle(0), how);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = self.len().saturating_sub(offset);
        let bytes = usize::try_from(left.min(u64::from(size))).unwrap_or(0);
        let mut data = vec![0; bytes];
        let read = self.each(offset, bytes, |file, at, part| {
            file.read_exact_at(&mut data[part], at)
        });
        match read {
            Err(error) => reply.error(errno(&error)),
            Ok(()) if bytes == 0 => reply.data(&[]),
            Ok(()) => self.submit(Op::Read, offset, bytes, Box::new(move || reply.data(&data))),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let left = self.setup.bytes.saturating_sub(offset);
        if left < data.len() as u64 {
            return reply.error(Errno::ENOSPC);
        }
        let wrote = self.each(offset, data.len(), |file, at, part| {
            file.write_all_at(&data[part], at)
        });
        let bytes = data.len();
        match wrote {
            Err(error) => reply.error(errno(&error)),
            Ok(()) => {
                if self.setup.grows {
                    let end = offset + bytes as u64;
                    self.len.fetch_max(end, Ordering::AcqRel);
                }
                let count = u32::try_from(bytes).unwrap_or(u32::MAX);
                self.submit(
                    Op::Write,
                    offset,
                    bytes,
                    Box::new(move || reply.written(count)),
                );
            }
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // A close, not a flush of the device.
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.submit(Op::Flush, 0, 0, Box::new(move || reply.ok()));
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (DISK_INO, FileType::RegularFile, DISK),
        ];
        for (next, (ino, kind, name)) in (1..).zip(entries) {
            if next > offset && reply.add(ino, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = self.setup.bytes / u64::from(BLOCK);
        reply.statfs(blocks, 0, 0, 1, 0, BLOCK, 255, BLOCK);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        // Disks of this kind know no discard.
        reply.error(Errno::EOPNOTSUPP);
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // All of it is data.
        let size = i64::try_from(self.len()).unwrap_or(i64::MAX);
        match whence {
            _ if !(0..size).contains(&offset) => reply.error(Errno::ENXIO),
            libc::SEEK_DATA => reply.offset(offset),
            libc::SEEK_HOLE => reply.offset(size),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        // As a file of a disk's: always ready, says the kernel then.
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::EOPNOTSUPP);
    }
}
