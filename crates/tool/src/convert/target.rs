//! What a disk is copied to.

use super::{Piece, Report, SPARSE_BYTES, Unit};
use block::{Context, Error, HostOffset, Result, Storage};
use disk::blocking::{Driver, Placed};
use image::{ExtentKind, Pack, Sequential};
use rustix::io::Errno;

/// Smallest unit of a target without clusters.
const SECTOR: u64 = 512;
/// Runs of at least so many bytes get their room in one go. On ext4 a MiB that is written through the page cache takes two
/// thirds of the processor's time then, and its blocks need not be found while it is written back.
const RESERVE_BYTES: u64 = 64 << 10;
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
        /// Clusters that get smaller so are compressed: the image takes such.
        packs: bool,
    },
    /// A new image, with compressed clusters where that makes them smaller.
    Compressed {
        /// It, with nothing put into it.
        writer: Box<dyn Sequential + 'a>,
    },
}

/// A write that has its place.
#[derive(Debug)]
pub(super) struct Job {
    pub placed: Placed,
    /// Where in the piece its bytes begin.
    pub at: u64,
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
            Target::Image {
                cluster_size,
                packs: true,
                ..
            } => *cluster_size,
            Target::Image { cluster_size, .. } => (*cluster_size).max(smallest),
            Target::Compressed { writer } => writer.cluster_size(),
        }
    }

    pub(super) fn size(&self) -> u64 {
        match self {
            Target::Image { driver, .. } => driver.size(),
            Target::Compressed { writer } => writer.clusters() * writer.cluster_size(),
        }
    }

    /// Whether the host can copy into it: its file has the guest's bytes as they are, and they need not be compared.
    pub(super) fn takes_offload(&self) -> bool {
        match self {
            Target::Image {
                driver,
                resume,
                packs,
                ..
            } => !resume && !packs && !driver.is_encrypted(),
            Target::Compressed { .. } => false,
        }
    }

    /// Whether runs of so many bytes want room before they are written: of a new image without clusters, which is a hole.
    pub(super) fn reserves(&self) -> Option<u64> {
        let is_hole = matches!(
            self,
            Target::Image {
                blank: true,
                cluster_size: ..=1,
                ..
            }
        );
        is_hole.then_some(RESERVE_BYTES)
    }

    /// Whether it takes what belongs into it in its order only.
    pub(super) fn is_sequential(&self) -> bool {
        matches!(self, Target::Compressed { .. })
    }

    /// Whether its clusters are compressed.
    pub(super) fn packs(&self) -> bool {
        matches!(
            self,
            Target::Compressed { .. } | Target::Image { packs: true, .. }
        )
    }

    /// What packs its clusters, if they are compressed.
    pub(super) fn packer(&self) -> Result<Option<Box<dyn Pack>>> {
        match self {
            Target::Image { packs: false, .. } => Ok(None),
            Target::Image { driver, .. } => driver.packer().map(Some),
            Target::Compressed { writer } => writer.packer().map(Some),
        }
    }

    /// Finds places for what `piece` has from its byte `at` on, and moves that on; what has none, zeros and what is
    /// packed, is done with. `true`: it went so far only, what is under way must be finished first. With `quiet` nothing
    /// is under way but `jobs`.
    pub(super) fn place(
        &mut self,
        piece: &Piece,
        unit: u64,
        (at, quiet): (&mut u64, bool),
        jobs: &mut Vec<Job>,
        report: &mut Report,
    ) -> Result<bool> {
        if piece.place.is_some() {
            return self.place_bytes(piece, piece.len, at, jobs, report);
        }
        let quiet = |jobs: &[Job]| quiet && jobs.is_empty();
        if !piece.in_bytes {
            if self.needs_quiet() && !quiet(jobs) {
                return Ok(true);
            }
            *at = piece.len;
            if piece.units.is_empty() {
                return self.zero(piece.at, piece.len).map(|()| false);
            }
            report.same += piece.len;
            return self.same(piece.at, piece.len, &[]).map(|()| false);
        }
        let bytes = piece.bytes(piece.len.next_multiple_of(unit) as usize);
        // Of those before nothing is left to do.
        let before = piece.units.iter().take((*at / unit) as usize);
        let before: usize = before.map(|u| u.packed_bytes()).sum();
        let mut packed = piece.packed.get(before..).unwrap_or_default();
        while *at < piece.len {
            let mut units = piece.units.iter().skip((*at / unit) as usize);
            let Some(kind) = units.next().copied() else {
                return Err(Error::invalid("a piece has fewer units than bytes"));
            };
            let count = match kind {
                Unit::Packed(_) => 1,
                _ => 1 + units.take_while(|u| **u == kind).count() as u64,
            };
            // A busy target may have taken a part of the first.
            let end = (*at - *at % unit + count * unit).min(piece.len);
            let (guest, len) = (piece.at + *at, end - *at);
            let here = bytes.get(*at as usize..).unwrap_or_default();
            match kind {
                Unit::Same | Unit::Zero if self.needs_quiet() && !quiet(jobs) => return Ok(true),
                Unit::Same => {
                    report.same += len;
                    self.same(guest, len, here)?;
                }
                Unit::Zero => self.zero(guest, len)?,
                Unit::Plain => match self {
                    Target::Compressed { .. } => {
                        report.written += len;
                        self.put_plain(guest, len, here)?;
                    }
                    Target::Image { .. } => {
                        if self.has_already(guest, len, here) {
                            report.written += len;
                            report.resumed += len;
                        } else if self.place_bytes(piece, end, at, jobs, report)? {
                            return Ok(true);
                        }
                    }
                },
                Unit::Packed(size) => {
                    let (this, rest) = packed.split_at(size.min(packed.len()));
                    match self {
                        Target::Compressed { writer } => {
                            writer.put_compressed(guest / unit, this)?;
                        }
                        Target::Image { driver, .. } => {
                            // At most a cluster's.
                            let Some(placed) = driver.place_packed(guest, size as u32)? else {
                                return Ok(true);
                            };
                            placed.write(this)?;
                            placed.finish();
                        }
                    }
                    packed = rest;
                    report.written += len;
                    report.compressed_clusters += 1;
                    report.compressed_bytes += size as u64;
                }
            }
            *at = end;
        }
        Ok(false)
    }

    /// Finds places for the bytes of `piece` from `at` to `end`; `true` where it waits for what is under way.
    fn place_bytes(
        &mut self,
        piece: &Piece,
        end: u64,
        at: &mut u64,
        jobs: &mut Vec<Job>,
        report: &mut Report,
    ) -> Result<bool> {
        let Target::Image { driver, .. } = self else {
            return Err(Error::invalid(
                "a compressed image takes no bytes as they are",
            ));
        };
        while *at < end {
            let Some(placed) = driver.place(piece.at + *at, end - *at)? else {
                return Ok(true);
            };
            let len = placed.len();
            jobs.push(Job { placed, at: *at });
            report.written += len;
            *at += len;
        }
        Ok(false)
    }

    /// Whether zeros, and what is as in the backing file, change the target while nothing else may.
    fn needs_quiet(&self) -> bool {
        match self {
            Target::Image { driver, blank, .. } => !blank || driver.has_backing(),
            Target::Compressed { .. } => false,
        }
    }

    /// Whether a run before has written these bytes.
    fn has_already(&mut self, at: u64, len: u64, bytes: &[u8]) -> bool {
        let Target::Image {
            driver,
            resume: true,
            ..
        } = self
        else {
            return false;
        };
        // At most a piece.
        let mut there = vec![0; len as usize];
        // What cannot be read is not there.
        driver.read(at, &mut there).is_ok() && bytes.get(..there.len()) == Some(&there)
    }

    fn put_plain(&mut self, at: u64, len: u64, bytes: &[u8]) -> Result<()> {
        let Target::Compressed { writer } = self else {
            return Ok(());
        };
        let cluster = writer.cluster_size();
        let clusters = bytes.chunks(cluster as usize);
        for (guest, bytes) in (at / cluster..(at + len).div_ceil(cluster)).zip(clusters) {
            writer.put_data(guest, bytes)?;
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
            Target::Compressed { writer } => {
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
            Target::Compressed { writer } => writer.has_backing(),
        }
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        match self {
            Target::Image { driver, .. } => driver.flush(),
            Target::Compressed { .. } => Ok(()),
        }
    }

    pub(super) fn close(self) -> Result<()> {
        match self {
            Target::Image { driver, .. } => driver.flush(),
            Target::Compressed { writer } => writer.finish(),
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
pub(super) fn copy(
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
