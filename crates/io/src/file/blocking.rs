//! Blocking access at any alignment: what [`block::Storage`] and the engines' helper threads use.

use super::{File, FileKind, Lacks};
use crate::{gate::ExclusiveGuard, gate::SharedGuard, memory::AlignedBuf, sys};
use block::faults::IoType;
use block::{Error, ErrorKind, RangeKind, align_down, align_up};
use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::Errno,
};
use std::{
    io,
    os::fd::AsFd,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// Bytes of the bounce buffer of one blocking call, and of the shared buffer of zeros.
const CHUNK: u64 = 256 << 10;

/// Whether an errno says that the host lacks the operation, as QEMU reads it.
fn lacking(e: Errno) -> bool {
    matches!(
        e,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::NOTTY
    )
}

fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn zeros() -> &'static [u8] {
    static ZEROS: OnceLock<AlignedBuf> = OnceLock::new();
    ZEROS.get_or_init(|| AlignedBuf::new(CHUNK as usize, 4096))
}

/// Whether the caller of a blocking change holds the gate for its range already. An engine's job
/// does: would its thread wait at the gate, it could wait for a job whose step waits for a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GateHeld {
    No,
    Yes,
}

/// Holds the gate for one blocking change.
enum Hold<'a> {
    None,
    Shared(#[allow(dead_code)] SharedGuard<'a>),
    Exclusive(#[allow(dead_code)] ExclusiveGuard<'a>),
}

impl File {
    fn fits(&self, offset: u64, buf: &[u8]) -> bool {
        let a = self.alignment;
        (offset | buf.len() as u64) & (u64::from(a.offset) - 1) == 0
            && buf.as_ptr() as usize & (a.memory as usize - 1) == 0
    }

    fn bounce(&self) -> AlignedBuf {
        let a = self.alignment;
        AlignedBuf::new(CHUNK as usize, a.memory.max(a.offset) as usize)
    }

    /// Enters the gate for a change of the range.
    fn enter(&self, offset: u64, len: u64, gate: GateHeld) -> Hold<'_> {
        let Some(gate) = self.gate().filter(|_| gate == GateHeld::No) else {
            return Hold::None;
        };
        if (offset | len) & (u64::from(self.alignment.offset) - 1) == 0 {
            Hold::Shared(gate.shared(offset, len))
        } else {
            let (start, end) = self.blocks(offset, offset + len);
            Hold::Exclusive(gate.exclusive(start, end - start))
        }
    }

    /// The blocks around a range.
    fn blocks(&self, start: u64, end: u64) -> (u64, u64) {
        let align = u64::from(self.alignment.offset);
        (align_down(start, align), align_up(end, align))
    }

    /// Reads from `offset` on; how many bytes there were before the end of the file.
    pub(crate) fn read_up_to(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.fault(IoType::Read, offset, buf.len() as u64)?;
        if let Some(sim) = &self.sim {
            return sim.read_up_to(offset, buf);
        }
        if self.fits(offset, buf) {
            return self.read_aligned(offset, buf);
        }
        let mut bounce = self.bounce();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (start, end) = self.blocks(at, offset + buf.len() as u64);
            let window = (end - start).min(CHUNK) as usize;
            let got = self.read_aligned(start, &mut bounce[..window])?;
            let skip = (at - start) as usize;
            let n = got.saturating_sub(skip).min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&bounce[skip..skip + n]);
            done += n;
            if got < window {
                break;
            }
        }
        Ok(done)
    }

    fn read_aligned(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(remote) = self.at_server() {
            let there = remote.size().saturating_sub(offset);
            let there = usize::try_from(there).unwrap_or(usize::MAX).min(buf.len());
            if there > 0 {
                remote.read(offset, &mut buf[..there])?;
            }
            return Ok(there);
        }
        let mut done = 0;
        while done < buf.len() {
            let n = sys::pread(self.raw_fd(), &mut buf[done..], offset + done as u64)?;
            done += n;
            // Direct reads stop inside a block only at the end of the file.
            if n == 0 || n as u64 & (u64::from(self.alignment.offset) - 1) != 0 {
                break;
            }
        }
        Ok(done)
    }

    /// Writes all of `buf`. Under `O_DIRECT` a file that ends inside the last block grows to the
    /// end of that block.
    pub(crate) fn write_all(&self, offset: u64, buf: &[u8], gate: GateHeld) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        check_range(offset, buf.len() as u64)?;
        if self.read_only {
            return Err(os(libc::EROFS));
        }
        if let Some(sim) = &self.sim {
            return sim.write_all(offset, buf, sim.begin());
        }
        self.fault(IoType::Write, offset, buf.len() as u64)?;
        let _hold = self.enter(offset, buf.len() as u64, gate);
        if self.fits(offset, buf) {
            return self.write_aligned(offset, buf);
        }
        let align = u64::from(self.alignment.offset);
        let mut bounce = self.bounce();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (start, end) = self.blocks(at, offset + buf.len() as u64);
            let window = (end - start).min(CHUNK);
            let n = ((window - (at - start)) as usize).min(buf.len() - done);
            let first = &mut bounce[..align as usize];
            if start != at {
                let got = self.read_aligned(start, first)?;
                first[got..].fill(0);
            }
            if at + (n as u64) < start + window && (window > align || start == at) {
                let last = &mut bounce[(window - align) as usize..window as usize];
                let got = self.read_aligned(start + window - align, last)?;
                last[got..].fill(0);
            }
            let skip = (at - start) as usize;
            bounce[skip..skip + n].copy_from_slice(&buf[done..done + n]);
            self.write_aligned(start, &bounce[..window as usize])?;
            done += n;
        }
        Ok(())
    }

    fn write_aligned(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if let Some(remote) = self.at_server() {
            return match offset + buf.len() as u64 > remote.size() {
                true => Err(os(libc::ENOSPC)),
                false => Ok(remote.write(offset, buf)?),
            };
        }
        let mut done = 0;
        while done < buf.len() {
            let n = sys::pwrite(self.raw_fd(), &buf[done..], offset + done as u64)?;
            if n == 0 || n as u64 & (u64::from(self.alignment.offset) - 1) != 0 {
                return Err(os(libc::EIO));
            }
            done += n;
        }
        Ok(())
    }

    /// `fdatasync`, remembering a failure; nothing at all in cache mode `unsafe`.
    pub(crate) fn sync_data(&self) -> io::Result<()> {
        if self.cache.ignores_flush() {
            return Ok(());
        }
        if let Some(errno) = self.sync_failure() {
            return Err(os(errno));
        }
        self.fault(IoType::Flush, 0, 0)?;
        if let Some(sim) = &self.sim {
            return sim.sync_data(sim.begin()).inspect_err(|error| {
                self.note_sync_failure(error.raw_os_error().unwrap_or(libc::EIO));
            });
        }
        if let Some(remote) = self.at_server() {
            return remote.flush().map_err(|error| {
                self.note_sync_failure(error.kind().errno());
                error.into()
            });
        }
        loop {
            match rustix::fs::fdatasync(&self.fd) {
                Err(Errno::INTR) => {}
                Ok(()) => return Ok(()),
                Err(e) => {
                    self.note_sync_failure(e.raw_os_error());
                    return Err(e.into());
                }
            }
        }
    }

    fn fallocate(
        &self,
        lacks: impl Fn(&Lacks) -> &AtomicBool,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        if lacks(&self.lacks).load(Ordering::Relaxed) {
            return Err(Errno::OPNOTSUPP);
        }
        loop {
            match rustix::fs::fallocate(&self.fd, mode, offset, len) {
                Err(Errno::INTR) => {}
                Err(e) if lacking(e) => {
                    lacks(&self.lacks).store(true, Ordering::Relaxed);
                    return Err(Errno::OPNOTSUPP);
                }
                result => return result,
            }
        }
    }

    fn punch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate(|l| &l.punch_hole, mode, offset, len)
    }

    /// Makes the range read as zeros; see [`crate::IoOp::Zero`]. Grows a file that ends before the
    /// range does only with `grow`.
    pub(crate) fn zero_range(
        &self,
        offset: u64,
        len: u64,
        unmap: bool,
        fast: bool,
        grow: bool,
        gate: GateHeld,
    ) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let end = check_range(offset, len)?;
        if self.read_only {
            return Err(os(libc::EROFS));
        }
        if let Some(sim) = &self.sim {
            return sim.zero_range(offset, len, grow, sim.begin());
        }
        self.fault(IoType::WriteZeroes, offset, len)?;
        // Once, for everything that follows, fallbacks included.
        let _hold = self.enter(offset, len, gate);
        match self.kind {
            FileKind::BlockDevice => self.zero_device(offset, end, unmap, fast),
            FileKind::Remote => self.zero_remote(offset, end, unmap, fast),
            _ => self.zero_file(offset, end, unmap, fast, grow),
        }
    }

    fn zero_file(
        &self,
        offset: u64,
        end: u64,
        unmap: bool,
        fast: bool,
        grow: bool,
    ) -> io::Result<()> {
        let len = end - offset;
        let punched = |reserve: bool| -> Result<(), Errno> {
            self.punch(offset, len)?;
            if reserve {
                let mode = if grow {
                    FallocateFlags::empty()
                } else {
                    FallocateFlags::KEEP_SIZE
                };
                self.fallocate(|l| &l.fallocate, mode, offset, len)?;
            }
            Ok(())
        };
        let mut result = if unmap {
            punched(false)
        } else {
            Err(Errno::OPNOTSUPP)
        };
        if result == Err(Errno::OPNOTSUPP) {
            let mut mode = FallocateFlags::ZERO_RANGE;
            mode.set(FallocateFlags::KEEP_SIZE, !grow);
            result = self.fallocate(|l| &l.zero_range, mode, offset, len);
        }
        if result == Err(Errno::OPNOTSUPP) && !unmap {
            result = punched(true);
        }
        match result {
            Ok(()) if grow => return self.extend_to(end),
            Ok(()) => return Ok(()),
            // Some file systems say EINVAL for a mode that they lack.
            Err(Errno::OPNOTSUPP | Errno::INVAL) => {}
            Err(e) => return Err(e.into()),
        }
        if fast {
            return Err(os(libc::EOPNOTSUPP));
        }
        let end = if grow { end } else { end.min(self.size()?) };
        self.write_zeros(offset, end)
    }

    fn zero_device(&self, offset: u64, end: u64, unmap: bool, fast: bool) -> io::Result<()> {
        if end > self.size()? {
            return Err(os(libc::ENOSPC));
        }
        let block = u64::from(sys::block_size(self.as_fd())?).max(512);
        let (start, stop) = (align_up(offset, block), align_down(end, block));
        if start < stop {
            let len = stop - start;
            // The kernel writes zeros for ZERO_RANGE where the device cannot; not for PUNCH_HOLE.
            let mut result = if unmap || fast {
                self.punch(start, len)
            } else {
                Err(Errno::OPNOTSUPP)
            };
            if result == Err(Errno::OPNOTSUPP) && !fast {
                let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                result = self.fallocate(|l| &l.zero_range, mode, start, len);
            }
            match result {
                Ok(()) => {
                    self.write_zeros(offset, start)?;
                    return self.write_zeros(stop, end);
                }
                Err(Errno::OPNOTSUPP | Errno::INVAL) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if fast {
            return Err(os(libc::EOPNOTSUPP));
        }
        self.write_zeros(offset, end)
    }

    fn zero_remote(&self, offset: u64, end: u64, unmap: bool, fast: bool) -> io::Result<()> {
        if end > self.size()? {
            return Err(os(libc::ENOSPC));
        }
        let align = u64::from(self.alignment.offset);
        let (start, stop) = (align_up(offset, align), align_down(end, align));
        let zeroed = match self.at_server().filter(|_| start < stop) {
            Some(remote) => remote.zero(start, stop - start, unmap, fast),
            None => Err(Error::unsupported("less than a block")),
        };
        match zeroed {
            Ok(()) => {
                self.write_zeros(offset, start)?;
                self.write_zeros(stop, end)
            }
            Err(error) if error.kind() != ErrorKind::Unsupported => Err(error.into()),
            Err(_) if fast => Err(os(libc::EOPNOTSUPP)),
            Err(_) => self.write_zeros(offset, end),
        }
    }

    /// The caller holds the gate.
    fn write_zeros(&self, mut offset: u64, end: u64) -> io::Result<()> {
        while offset < end {
            // Up to a chunk boundary, so that only the first and the last write can be misaligned.
            let n = (CHUNK - offset % CHUNK).min(end - offset);
            self.write_all(offset, &zeros()[..n as usize], GateHeld::Yes)?;
            offset += n;
        }
        Ok(())
    }

    /// Lets a regular file be at least `end` bytes long. Never shrinks it, whoever else writes. The caller
    /// holds the gate.
    fn extend_to(&self, end: u64) -> io::Result<()> {
        if self.size()? >= end {
            return Ok(());
        }
        // ftruncate could cut off what someone appends at this moment; these cannot.
        match self.fallocate(|l| &l.fallocate, FallocateFlags::empty(), end - 1, 1) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP) => self.write_all(end - 1, &[0], GateHeld::Yes),
            Err(e) => Err(e.into()),
        }
    }

    /// Tells the host that the range is not needed; fine when it cannot be told.
    pub(crate) fn discard_range(&self, offset: u64, len: u64, gate: GateHeld) -> io::Result<()> {
        if len == 0 || self.lacks.discard.load(Ordering::Relaxed) {
            return Ok(());
        }
        let end = check_range(offset, len)?;
        if self.read_only {
            return Err(os(libc::EROFS));
        }
        if let Some(sim) = &self.sim {
            return sim.discard_range(offset, len, sim.begin());
        }
        self.fault(IoType::Discard, offset, len)?;
        let _hold = self.enter(offset, len, gate);
        if let Some(remote) = self.at_server() {
            let align = u64::from(self.alignment.offset);
            let end = end.min(remote.size());
            let (start, stop) = (align_up(offset, align), align_down(end, align));
            return match start < stop {
                true => Ok(remote.discard(start, stop - start)?),
                false => Ok(()),
            };
        }
        let result = match self.kind {
            FileKind::BlockDevice => {
                let block = u64::from(sys::block_size(self.as_fd())?).max(512);
                let (start, stop) = (align_up(offset, block), align_down(end, block));
                if start >= stop {
                    return Ok(());
                }
                sys::block_discard(self.as_fd(), start, stop - start)
                    .map_err(|e| Errno::from_raw_os_error(e.raw_os_error().unwrap_or(libc::EIO)))
            }
            _ => self.punch(offset, len),
        };
        match result {
            Err(e) if lacking(e) => {
                self.lacks.discard.store(true, Ordering::Relaxed);
                Ok(())
            }
            result => Ok(result?),
        }
    }

    /// Reserves the range; whether new space in it reads as zeros.
    pub(crate) fn allocate_range(&self, offset: u64, len: u64, gate: GateHeld) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let end = check_range(offset, len)?;
        if self.read_only {
            return Err(os(libc::EROFS));
        }
        if let Some(sim) = &self.sim {
            return sim.allocate_range(offset, len, sim.begin());
        }
        if self.is_fixed() {
            return if end > self.size()? {
                Err(os(libc::ENOSPC))
            } else {
                Ok(false)
            };
        }
        let _hold = self.enter(offset, len, gate);
        match self.fallocate(|l| &l.fallocate, FallocateFlags::empty(), offset, len) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP) => {
                self.extend_to(end)?;
                Ok(true)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// End of the data or hole that begins at `offset` (less than `len`), and which it is.
    pub(crate) fn sparse_run(&self, offset: u64, len: u64) -> io::Result<(u64, RangeKind)> {
        self.fault(IoType::BlockStatus, offset, len - offset)?;
        if let Some(remote) = self.at_server() {
            return Ok(remote.run(offset, len - offset)?);
        }
        let (end, data) = match &self.sim {
            Some(sim) => sim.sparse_run(offset, len),
            None => self.seek_run(offset, len)?,
        };
        let kind = match data {
            true => RangeKind::Data,
            false => RangeKind::Hole,
        };
        Ok((end, kind))
    }

    /// The same of a file of the host, and whether it is data.
    fn seek_run(&self, offset: u64, len: u64) -> io::Result<(u64, bool)> {
        match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => return Ok((data.min(len), false)),
            Ok(_) => {}
            Err(Errno::NXIO) => return Ok((len, false)),
            // The file system or device cannot tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((len, true)),
            Err(e) => return Err(e.into()),
        }
        match rustix::fs::seek(&self.fd, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => Ok((hole.min(len), true)),
            // The file changed between the two calls.
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok((len, true)),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes the file `len` bytes long.
    pub(crate) fn resize(&self, len: u64) -> io::Result<()> {
        check_range(0, len)?;
        if self.read_only {
            return Err(os(libc::EROFS));
        }
        if let Some(sim) = &self.sim {
            return sim.resize(len, sim.begin());
        }
        if self.is_fixed() {
            // As QEMU: a device is as long as it is; less than all of it may be used.
            return if len > self.size()? {
                Err(os(libc::ENOSPC))
            } else {
                Ok(())
            };
        }
        Ok(rustix::fs::ftruncate(&self.fd, len)?)
    }
}

/// End of a range, which must be addressable by the kernel.
fn check_range(offset: u64, len: u64) -> io::Result<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(end),
        _ => Err(os(libc::EFBIG)),
    }
}
