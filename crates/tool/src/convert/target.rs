//! What a disk is copied to.

use super::{Piece, Report, SPARSE_BYTES, Unit};
use crate::source::Place;
use crate::work::Work;
use block::{Context, Error, HostOffset, Result, Storage};
use disk::blocking::Driver;
use image::ExtentKind;
use image::qcow2::{Compression, ImageWriter};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender};

/// Smallest unit of a target without clusters.
const SECTOR: u64 = 512;
/// Bytes that go through memory at a time where the host does not copy.
const COPY_BYTES: u64 = 1 << 20;

/// Where a disk is copied to.
#[derive(Debug)]
pub enum Target<'a> {
    /// An open image, of at least the source's size.
    Image {
        /// It, open for writing.
        driver: &'a mut Driver,
        /// It reads as zeros (or as its backing file) everywhere: zeros need not be written.
        blank: bool,
        /// Bytes of its clusters; 1 when it has none.
        cluster_size: u64,
        /// It may have some of the data already: what is there is read, and written only where it differs.
        resume: bool,
    },
    /// A new image, with compressed clusters where that makes them smaller.
    Compressed {
        /// It, with nothing put into it.
        writer: Box<ImageWriter<'a>>,
        /// How.
        compression: Compression,
    },
}

impl Target<'_> {
    /// Bytes that are one thing.
    pub(super) fn unit(&self, sparse: u64) -> u64 {
        let smallest = match sparse {
            0 => SPARSE_BYTES,
            // The largest power of two that is not more.
            _ => (1 << sparse.ilog2()).clamp(SECTOR, SPARSE_BYTES),
        };
        match self {
            Target::Image { cluster_size, .. } => (*cluster_size).max(smallest),
            Target::Compressed { writer, .. } => writer.cluster_size(),
        }
    }

    pub(super) fn size(&self) -> u64 {
        match self {
            Target::Image { driver, .. } => driver.size(),
            Target::Compressed { writer, .. } => writer.clusters() * writer.cluster_size(),
        }
    }

    /// Whether the host can copy into it: its file has the guest's bytes as they are, and they need not be compared.
    pub(super) fn takes_offload(&self) -> bool {
        match self {
            Target::Image { driver, resume, .. } => !resume && !driver.is_encrypted(),
            Target::Compressed { .. } => false,
        }
    }

    /// Writes pieces in their order until there are no more. Returns where the last one ended, too.
    pub(super) fn write_all(
        &mut self,
        unit: u64,
        checkpoint: Option<u64>,
        done: &Receiver<Piece>,
        empty: &SyncSender<Piece>,
        work: &mut Work<'_>,
    ) -> Result<(Report, u64)> {
        let mut report = Report::default();
        let mut end = 0;
        // As many as there are pieces.
        let mut waiting = BTreeMap::new();
        let mut next = 0;
        let mut durable = 0;
        while let Ok(piece) = done.recv() {
            waiting.insert(piece.nth, piece);
            while let Some(piece) = waiting.remove(&next) {
                let before = report.written;
                self.write(&piece, unit, &mut report)?;
                end = piece.at + piece.len;
                work.reached(end)?;
                work.moved(report.written - before)?;
                if checkpoint.is_some_and(|bytes| report.written - durable >= bytes) {
                    self.flush()?;
                    durable = report.written;
                }
                next += 1;
                // The reader has gone where nobody takes it.
                let _ = empty.send(piece);
            }
        }
        Ok((report, end))
    }

    fn write(&mut self, piece: &Piece, unit: u64, report: &mut Report) -> Result<()> {
        if let Some(place) = &piece.place {
            return self.offload(piece, place, report);
        }
        match piece.units.as_slice() {
            [] => return self.zero(piece.at, piece.len),
            [Unit::Same] if piece.len > unit => {
                report.same += piece.len;
                return self.same(piece.at, piece.len, &[]);
            }
            _ => {}
        }
        let mut packed = piece.packed.as_slice();
        let end = piece.at + piece.len;
        let mut nth = 0;
        while let Some(kind) = piece.units.get(nth).copied() {
            let alike = piece.units.iter().skip(nth).take_while(|u| **u == kind);
            let count = match kind {
                Unit::Packed(_) => 1,
                _ => alike.count(),
            };
            let first = nth as u64 * unit;
            let at = piece.at + first;
            let len = (count as u64 * unit).min(end - at);
            match kind {
                Unit::Same => {
                    report.same += len;
                    let bytes = piece.bytes.get(first as usize..).unwrap_or_default();
                    self.same(at, len, bytes)?;
                }
                Unit::Zero => self.zero(at, len)?,
                Unit::Plain => {
                    report.written += len;
                    let bytes = piece.bytes.get(first as usize..).unwrap_or_default();
                    self.plain(at, len, bytes, report)?;
                }
                Unit::Packed(size) => {
                    report.written += len;
                    report.compressed_clusters += 1;
                    report.compressed_bytes += size as u64;
                    let (this, rest) = packed.split_at(size.min(packed.len()));
                    packed = rest;
                    if let Target::Compressed { writer, .. } = self {
                        writer.put_compressed(at / unit, this)?;
                    }
                }
            }
            nth += count;
        }
        Ok(())
    }

    /// Makes a range zeros that are not the backing file's.
    fn zero(&mut self, at: u64, len: u64) -> Result<()> {
        match self {
            Target::Image { blank: true, .. } if !self.has_base() => Ok(()),
            Target::Image {
                driver,
                resume: true,
                ..
            } if !driver.has_backing() => clear(driver, at, len),
            Target::Image { driver, .. } => driver.write_zeroes(at, len, true),
            Target::Compressed { writer, .. } => {
                if !writer.has_backing() {
                    return Ok(());
                }
                let cluster = writer.cluster_size();
                for guest in at / cluster..(at + len).div_ceil(cluster) {
                    writer.put_zero(guest)?;
                }
                Ok(())
            }
        }
    }

    /// Lets the range read as the backing file, which has what the source has: `bytes`, or zeros where there are none.
    fn same(&mut self, at: u64, len: u64, bytes: &[u8]) -> Result<()> {
        let Target::Image {
            driver,
            blank: false,
            ..
        } = self
        else {
            return Ok(());
        };
        // It may have something of its own there.
        let mut done = 0;
        while done < len {
            let found = driver.extent_at(at + done, len - done)?;
            if found.depth == 0 && found.kind != ExtentKind::Unallocated {
                // At most a piece, where there are bytes.
                let part = bytes
                    .get(done as usize..)
                    .and_then(|b| b.get(..found.len as usize));
                match part {
                    Some(part) => driver.write(at + done, part)?,
                    None => driver.write_zeroes(at + done, found.len, true)?,
                }
            }
            done += found.len;
        }
        Ok(())
    }

    fn has_base(&self) -> bool {
        match self {
            Target::Image { driver, .. } => driver.has_backing(),
            Target::Compressed { writer, .. } => writer.has_backing(),
        }
    }

    /// Writes data of whole units; `bytes` begins with them.
    fn plain(&mut self, at: u64, len: u64, bytes: &[u8], report: &mut Report) -> Result<()> {
        match self {
            Target::Image { driver, resume, .. } => {
                // At most a piece.
                let bytes = bytes.get(..len as usize).unwrap_or_default();
                if *resume {
                    let mut there = vec![0; bytes.len()];
                    // What cannot be read is not there.
                    if driver.read(at, &mut there).is_ok() && there == bytes {
                        report.resumed += len;
                        return Ok(());
                    }
                }
                driver.write(at, bytes)
            }
            Target::Compressed { writer, .. } => {
                let cluster = writer.cluster_size();
                let clusters = bytes.chunks(cluster as usize);
                for (guest, bytes) in (at / cluster..(at + len).div_ceil(cluster)).zip(clusters) {
                    writer.put_data(guest, bytes)?;
                }
                Ok(())
            }
        }
    }

    /// Has the host copy what `piece` has at `place`.
    fn offload(&mut self, piece: &Piece, place: &Place, report: &mut Report) -> Result<()> {
        let Target::Image { driver, .. } = self else {
            return Err(Error::invalid(
                "a compressed image takes no bytes as they are",
            ));
        };
        let mut offloaded = 0;
        driver.write_with(piece.at, piece.len, |file, host, done, len| {
            let from = place.offset + done;
            offloaded += copy(&*place.file, from, file, host, len)?;
            Ok(())
        })?;
        report.written += piece.len;
        report.offloaded += offloaded;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        match self {
            Target::Image { driver, .. } => driver.flush(),
            Target::Compressed { .. } => Ok(()),
        }
    }

    pub(super) fn close(self) -> Result<()> {
        match self {
            Target::Image { driver, .. } => driver.flush(),
            Target::Compressed { writer, .. } => writer.finish(),
        }
    }
}

/// Makes what is not zeros in the range zeros.
fn clear(driver: &mut Driver, at: u64, len: u64) -> Result<()> {
    let mut done = 0;
    while done < len {
        let found = driver.extent_at(at + done, len - done)?;
        match found.kind {
            ExtentKind::Unallocated | ExtentKind::Zero { .. } => {}
            _ => driver.write_zeroes(at + done, found.len, true)?,
        }
        done += found.len;
    }
    Ok(())
}

/// Copies `len` bytes from file to file: by the host where it can, through memory where not. Returns how many the
/// host copied.
fn copy(
    source: &dyn Storage,
    from: u64,
    target: &dyn Storage,
    to: HostOffset,
    len: u64,
) -> Result<u64> {
    let mut done = 0;
    if let (Some(source_fd), Some(target_fd)) = (source.descriptor(), target.descriptor()) {
        while done < len {
            let (mut read, mut write) = (from + done, to.0 + done);
            let most = usize::try_from(len - done).unwrap_or(usize::MAX);
            let copied = rustix::fs::copy_file_range(
                source_fd,
                Some(&mut read),
                target_fd,
                Some(&mut write),
                most,
            );
            match copied {
                // Behind the end of the source there are zeros.
                Ok(0) => break,
                Ok(copied) => done += copied as u64,
                Err(Errno::INTR) => {}
                Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO) if done == 0 => {
                    let error = copied.err().map(std::io::Error::from);
                    let error = error.unwrap_or_else(|| std::io::ErrorKind::Other.into());
                    return Err(error).context(|| {
                        format!("{}: copying {len} bytes to byte {}", target.name(), to.0)
                    });
                }
                // Another file system, or one that cannot.
                Err(_) => break,
            }
        }
    }
    let offloaded = done;
    let mut buffer = Vec::new();
    while done < len {
        let part = (len - done).min(COPY_BYTES);
        buffer.clear();
        buffer.resize(part as usize, 0);
        let there = source.len()?.saturating_sub(from + done).min(part);
        if let Some(bytes) = buffer.get_mut(..there as usize).filter(|b| !b.is_empty()) {
            source.read_at(from + done, bytes)?;
        }
        target.write_at(to.0 + done, &buffer)?;
        done += part;
    }
    Ok(offloaded)
}
