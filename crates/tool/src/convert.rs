//! Copying a disk into another image, with or without compression.
//!
//! ```text
//!   reader ──pieces──▶ workers (compress) ──▶ writer, in the disk's order
//!      ◀────────────── empty pieces ───────────────┘
//! ```
//!
//! One thread reads the source through its chain and leaves out what is zeros; with a base also what the target's
//! backing file shows anyway. Any number of workers compress. The calling thread writes, always in the
//! same order: the target does not depend on the number of workers. Pieces go round, so memory is bounded by
//! their number, `2 × workers + 2`, each with at most [`PIECE_BYTES`] or a cluster, once plain and once packed.

use block::{Error, RangeKind, Result, Storage};
use disk::{Chain, blocking::Driver};
use image::ExtentKind;
use image::qcow2::{Compression, Compressor, ImageWriter};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Bytes that are read at once, unless a cluster is larger.
pub const PIECE_BYTES: u64 = 512 << 10;
/// Most workers.
pub const WORKERS_MAX: usize = 64;
/// What is looked at for zeros in a target without clusters.
const RAW_UNIT: u64 = 4096;

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
    },
    /// A new image, with compressed clusters where that makes them smaller.
    Compressed {
        /// It, with nothing put into it.
        writer: Box<ImageWriter<'a>>,
        /// How.
        compression: Compression,
    },
}

/// How to copy.
#[derive(Debug)]
pub struct ConvertOptions<'a> {
    /// What the target's backing file reads as: what is the same there is left out.
    pub base: Option<&'a Chain>,
    /// Threads that compress, 1 to [`WORKERS_MAX`]; without compression, pieces that are read ahead.
    pub workers: usize,
}

/// What was done. Bytes of the guest's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The disk's size.
    pub size: u64,
    /// Bytes that were read as data.
    pub read: u64,
    /// Bytes that are zeros.
    pub zero: u64,
    /// Bytes left out since the target's backing file has them.
    pub same: u64,
    /// Bytes written as data.
    pub written: u64,
    /// Clusters that were compressed, and bytes that they take in the file.
    pub compressed_clusters: u64,
    /// See above.
    pub compressed_bytes: u64,
}

/// What becomes of one unit: a cluster, or 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Same,
    Zero,
    Plain,
    /// So many bytes, behind those of the units before.
    Packed(usize),
}

/// A part of the disk on its way.
#[derive(Debug, Default)]
struct Piece {
    nth: u64,
    at: u64,
    /// Bytes of the disk. All of them zeros where there are no units.
    len: u64,
    /// Whole units.
    bytes: Vec<u8>,
    units: Vec<Unit>,
    packed: Vec<u8>,
}

/// A chain that is read from its beginning to its end.
struct Source<'a> {
    chain: &'a Chain,
    driver: Driver,
}

impl<'a> Source<'a> {
    fn new(chain: &'a Chain) -> Result<Self> {
        Ok(Self {
            chain,
            driver: chain.driver()?,
        })
    }

    /// How long what is at `at` goes on, and whether it is known to be zeros. Behind the end there are zeros.
    fn run(&mut self, at: u64, most: u64) -> Result<(u64, bool)> {
        let left = self.driver.size().saturating_sub(at);
        if left == 0 {
            return Ok((most, true));
        }
        let found = self.driver.extent_at(at, most.min(left))?;
        let (file, offset) = match found.kind {
            ExtentKind::Zero { .. } | ExtentKind::Unallocated => return Ok((found.len, true)),
            ExtentKind::Data { file, offset } => (file, offset),
            _ => return Ok((found.len, false)),
        };
        let Some(layer) = self.chain.layers.get(found.depth) else {
            return Ok((found.len, false));
        };
        let tells = layer.holes_are_zeros(file);
        let Some(storage) = layer.files.get(usize::from(file.0)).filter(|_| tells) else {
            return Ok((found.len, false));
        };
        Ok(match storage.range_at(offset.0)? {
            None => (found.len, true),
            Some(range) => (
                found.len.min(range.len.max(1)),
                range.kind == RangeKind::Hole,
            ),
        })
    }

    /// How many of `most` bytes from `at` on are known to be zeros.
    fn zeros(&mut self, at: u64, most: u64) -> Result<u64> {
        let mut done = 0;
        while done < most {
            match self.run(at + done, most - done)? {
                (len, true) => done += len,
                (_, false) => break,
            }
        }
        Ok(done)
    }

    /// Fills `buf`; behind the end with zeros.
    fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        let inside = self.driver.size().saturating_sub(at);
        let inside = usize::try_from(inside).unwrap_or(buf.len()).min(buf.len());
        let (there, behind) = buf.split_at_mut(inside);
        behind.fill(0);
        if there.is_empty() {
            return Ok(());
        }
        self.driver.read(at, there)
    }
}

/// Copies all of `source` to `target`, which is closed afterwards if it is a new image, and else flushed.
/// `progress` is told how many of the disk's bytes are done, now and then.
///
/// # Errors
///
/// What reading, writing and unpacking failed with; [`block::ErrorKind::Invalid`] for a target that is too
/// small. A compressed target that was not finished shows no format.
pub fn convert(
    source: &Chain,
    mut target: Target<'_>,
    options: &ConvertOptions<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Report> {
    let mut reader = Reader {
        source: Source::new(source)?,
        base: options.base.map(Source::new).transpose()?,
        unit: target.unit(),
        report: Report::default(),
    };
    let size = reader.source.driver.size();
    reader.report.size = size;
    if target.size() < size {
        return Err(Error::invalid(format!(
            "the target has {} bytes, less than the source's {size}",
            target.size()
        )));
    }
    let workers = options.workers.clamp(1, WORKERS_MAX);
    let compressors = match &target {
        Target::Image { .. } => Vec::new(),
        Target::Compressed { compression, .. } => (0..workers)
            .map(|_| Compressor::new(*compression))
            .collect::<Result<_>>()?,
    };
    let pieces = 2 * workers + 2;
    let (empty_to, empty) = sync_channel(pieces);
    for _ in 0..pieces {
        // It has room for all of them.
        let _ = empty_to.send(Piece::default());
    }
    let mut report = thread::scope(|scope| {
        let (done_to, done) = channel();
        if compressors.is_empty() {
            let reading = scope.spawn(move || reader.run(&empty, &done_to));
            let written = target.write_all(&done, &empty_to, progress);
            drop((done, empty_to));
            return finish(reading.join(), written);
        }
        let (full_to, full) = sync_channel(pieces);
        let full = Arc::new(Mutex::new(full));
        for compressor in compressors {
            let (full, done_to) = (Arc::clone(&full), done_to.clone());
            let unit = target.unit();
            scope.spawn(move || compress(compressor, unit, &full, &done_to));
        }
        drop((full, done_to));
        let reading = scope.spawn(move || reader.run(&empty, &full_to));
        let written = target.write_all(&done, &empty_to, progress);
        drop((done, empty_to));
        finish(reading.join(), written)
    })?;
    target.close()?;
    report.zero = size - report.same - report.written;
    progress(size);
    Ok(report)
}

/// The report of both sides; of two errors the reader's, which came first.
fn finish(read: thread::Result<Result<Report>>, written: Result<Report>) -> Result<Report> {
    let read = read.unwrap_or_else(|_| Err(Error::invalid("the thread that reads has died")))?;
    let written = written?;
    Ok(Report {
        size: read.size,
        read: read.read,
        ..written
    })
}

/// Where full pieces go.
trait Pieces {
    /// `false` when nobody takes them any more.
    fn put(&self, piece: Piece) -> bool;
}

impl Pieces for Sender<Piece> {
    fn put(&self, piece: Piece) -> bool {
        self.send(piece).is_ok()
    }
}

impl Pieces for SyncSender<Piece> {
    fn put(&self, piece: Piece) -> bool {
        self.send(piece).is_ok()
    }
}

struct Reader<'a> {
    source: Source<'a>,
    base: Option<Source<'a>>,
    unit: u64,
    report: Report,
}

impl Reader<'_> {
    fn run(mut self, empty: &Receiver<Piece>, full: &impl Pieces) -> Result<Report> {
        let (mut at, mut nth) = (0, 0);
        while at < self.report.size {
            // Whoever writes has failed where there are none: its error counts.
            let Ok(mut piece) = empty.recv() else { break };
            (piece.nth, piece.at) = (nth, at);
            self.fill(&mut piece)?;
            at += piece.len;
            nth += 1;
            if !full.put(piece) {
                break;
            }
        }
        Ok(self.report)
    }

    /// Reads what comes next.
    fn fill(&mut self, piece: &mut Piece) -> Result<()> {
        let (at, size, unit) = (piece.at, self.report.size, self.unit);
        piece.units.clear();
        piece.packed.clear();
        let mut zeros = self.source.zeros(at, size - at)?;
        let mut same = false;
        if let Some(base) = self.base.as_mut().filter(|_| zeros > 0) {
            // What is zeros in both is the same.
            zeros = base.zeros(at, zeros)?;
            same = true;
        }
        if at + zeros < size {
            zeros -= zeros % unit;
        }
        if zeros > 0 {
            piece.len = zeros;
            if same {
                piece.units.push(Unit::Same);
            }
            return Ok(());
        }
        let most = PIECE_BYTES.max(unit);
        piece.len = most.min(size - at);
        let bytes = piece.len.next_multiple_of(unit);
        // At most 2 MiB.
        piece.bytes.resize(bytes as usize, 0);
        self.source.read(at, &mut piece.bytes)?;
        self.report.read += piece.len;
        let mut below = Vec::new();
        if let Some(base) = &mut self.base {
            below.resize(bytes as usize, 0);
            base.read(at, &mut below)?;
        }
        let mut below = below.chunks(unit as usize);
        for bytes in piece.bytes.chunks(unit as usize) {
            let same = below.next().is_some_and(|below| below == bytes);
            piece.units.push(match same {
                true => Unit::Same,
                false if is_zero(bytes) => Unit::Zero,
                false => Unit::Plain,
            });
        }
        Ok(())
    }
}

/// Compresses pieces until there are no more.
fn compress(
    mut compressor: Compressor,
    unit: u64,
    full: &Mutex<Receiver<Piece>>,
    done: &Sender<Piece>,
) {
    let mut packed = Vec::new();
    loop {
        let next = full.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut piece) = next else { return };
        let clusters = piece.bytes.chunks(unit as usize);
        for (kind, bytes) in piece.units.iter_mut().zip(clusters) {
            if *kind == Unit::Plain && compressor.pack(bytes, &mut packed) {
                *kind = Unit::Packed(packed.len());
                piece.packed.extend_from_slice(&packed);
            }
        }
        if done.send(piece).is_err() {
            return;
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|w| w.iter().fold(0, |a, b| a | b) == 0) && rest.iter().all(|b| *b == 0)
}

impl Target<'_> {
    fn unit(&self) -> u64 {
        match self {
            Target::Image { cluster_size, .. } => (*cluster_size).max(RAW_UNIT),
            Target::Compressed { writer, .. } => writer.cluster_size(),
        }
    }

    fn size(&self) -> u64 {
        match self {
            Target::Image { driver, .. } => driver.size(),
            Target::Compressed { writer, .. } => writer.clusters() * writer.cluster_size(),
        }
    }

    /// Writes pieces in their order until there are no more.
    fn write_all(
        &mut self,
        done: &Receiver<Piece>,
        empty: &SyncSender<Piece>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Report> {
        let mut report = Report::default();
        // As many as there are pieces.
        let mut waiting = BTreeMap::new();
        let mut next = 0;
        while let Ok(piece) = done.recv() {
            waiting.insert(piece.nth, piece);
            while let Some(piece) = waiting.remove(&next) {
                self.write(&piece, &mut report)?;
                progress(piece.at + piece.len);
                next += 1;
                // The reader has gone where nobody takes it.
                let _ = empty.send(piece);
            }
        }
        Ok(report)
    }

    fn write(&mut self, piece: &Piece, report: &mut Report) -> Result<()> {
        match piece.units.as_slice() {
            [] => return self.zero(piece.at, piece.len),
            [Unit::Same] if piece.len > self.unit() => {
                report.same += piece.len;
                return Ok(());
            }
            _ => {}
        }
        let unit = self.unit();
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
                Unit::Same => report.same += len,
                Unit::Zero => self.zero(at, len)?,
                Unit::Plain => {
                    report.written += len;
                    let bytes = piece.bytes.get(first as usize..).unwrap_or_default();
                    self.plain(at, len, bytes)?;
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

    fn has_base(&self) -> bool {
        match self {
            Target::Image { driver, .. } => driver.has_backing(),
            Target::Compressed { writer, .. } => writer.has_backing(),
        }
    }

    /// Writes data of whole units; `bytes` begins with them.
    fn plain(&mut self, at: u64, len: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Target::Image { driver, .. } => {
                driver.write(at, bytes.get(..len as usize).unwrap_or_default())
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

    fn close(self) -> Result<()> {
        match self {
            Target::Image { driver, .. } => driver.flush(),
            Target::Compressed { writer, .. } => writer.finish(),
        }
    }
}
