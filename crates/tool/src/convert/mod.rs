//! Copying a disk into another image, with or without compression.
//!
//! ```text
//!   reader ──pieces──▶ workers (compress) ──▶ writer, in the disk's order
//!      ◀────────────── empty pieces ───────────────┘
//! ```
//!
//! One thread reads the source through its chain and leaves out what is zeros; with a base also what the target's
//! backing file shows anyway. Any number of workers compress. The calling thread writes, always in the
//! same order: the target does not depend on the number of workers. Where bytes lie in a file as they are, they
//! may go from file to file without being read ([`ConvertOptions::offload`]): such a piece has a place, no bytes.
//!
//! # Memory
//!
//! Pieces go round, so that memory is bounded by their number: `2 × workers + 2`, and never more than fit
//! [`MEMORY_BYTES`]. Each has at most [`PIECE_BYTES`] or a cluster, once plain and once packed.

mod reader;
mod target;

pub use target::Target;

use crate::source::{Place, Source, Unreadable};
use crate::work::{Stop, Work};
use block::{Error, Result};
use disk::Chain;
use image::qcow2::Compressor;
use reader::Reader;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Bytes that are read at once, unless a cluster is larger.
pub const PIECE_BYTES: u64 = 512 << 10;
/// Most workers.
pub const WORKERS_MAX: usize = 64;
/// Bytes of all pieces together; two of the largest always.
pub const MEMORY_BYTES: u64 = 64 << 20;
/// What becomes a hole at least, where nothing else is said.
pub const SPARSE_BYTES: u64 = 4096;
/// Bytes that are copied from file to file between two looks at the wish to stop.
const OFFLOAD_BYTES: u64 = 16 << 20;

/// How to copy.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions<'a> {
    /// What the target's backing file reads as: what is the same there is left out.
    pub base: Option<&'a Chain>,
    /// Threads that compress, 1 to [`WORKERS_MAX`]; without compression, pieces that are read ahead.
    pub workers: usize,
    /// Zeros become a hole where at least so many bytes follow each other. 0: nothing is looked at, and all of
    /// the target gets space. A compressed target, and one with clusters, has no smaller holes than those.
    pub sparse: u64,
    /// Have the host copy from file to file where bytes lie in the source's file as they are. What is copied so is
    /// not searched for zeros.
    pub offload: bool,
    /// Make durable what is copied each time so many bytes were written: a later run can go on from there.
    pub checkpoint: Option<u64>,
}

impl Default for ConvertOptions<'_> {
    fn default() -> Self {
        Self {
            base: None,
            workers: 1,
            sparse: SPARSE_BYTES,
            offload: false,
            checkpoint: None,
        }
    }
}

/// What was done. Bytes of the guest's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// Bytes of `written` that the host copied from file to file.
    pub offloaded: u64,
    /// Bytes of `written` that the target had already ([`Target::Image`] with `resume`).
    pub resumed: u64,
    /// Clusters that were compressed, and bytes that they take in the file.
    pub compressed_clusters: u64,
    /// See above.
    pub compressed_bytes: u64,
    /// Bytes that could not be read, and count as zeros.
    pub unreadable_bytes: u64,
    /// Where they are; the first [`crate::source::UNREADABLE_MAX`] places.
    pub unreadable: Vec<Unreadable>,
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
    /// Bytes of the disk. All of them zeros where there are no units and no place.
    len: u64,
    /// Whole units.
    bytes: Vec<u8>,
    units: Vec<Unit>,
    packed: Vec<u8>,
    /// Where its bytes are, instead of here.
    place: Option<Place>,
}

/// Copies all of `source` to `target`, which is closed afterwards if it is a new image, and else flushed.
///
/// # Errors
///
/// What reading, writing and unpacking failed with; [`block::ErrorKind::Invalid`] for a target that is too
/// small; [`block::ErrorKind::Interrupted`]. A compressed target that was not finished shows no format.
pub fn convert(
    source: Source<'_>,
    mut target: Target<'_>,
    options: &ConvertOptions<'_>,
    work: &mut Work<'_>,
) -> Result<Report> {
    let size = source.size();
    if target.size() < size {
        return Err(Error::invalid(format!(
            "the target has {} bytes, less than the source's {size}",
            target.size()
        )));
    }
    let unit = target.unit(options.sparse);
    let reader = Reader {
        source,
        base: options.base.map(Source::new).transpose()?,
        unit,
        sparse: options.sparse,
        offload: options.offload && target.takes_offload(),
        below: Vec::new(),
        read: 0,
        stop: work.stop.clone(),
    };
    let workers = options.workers.clamp(1, WORKERS_MAX);
    let compressors = match &target {
        Target::Image { .. } => Vec::new(),
        Target::Compressed { compression, .. } => (0..workers)
            .map(|_| Compressor::new(*compression))
            .collect::<Result<_>>()?,
    };
    let pieces = pieces(workers, unit, !compressors.is_empty());
    let (empty_to, empty) = sync_channel(pieces);
    for _ in 0..pieces {
        // It has room for all of them.
        let _ = empty_to.send(Piece::default());
    }
    let stop = work.stop.clone();
    let mut report = thread::scope(|scope| {
        let (done_to, done) = channel();
        if compressors.is_empty() {
            let reading = scope.spawn(move || reader.run(&empty, &done_to));
            let written = target.write_all(unit, options.checkpoint, &done, &empty_to, work);
            drop((done, empty_to));
            return finish(reading.join(), written, &stop);
        }
        let (full_to, full) = sync_channel(pieces);
        let full = Arc::new(Mutex::new(full));
        for compressor in compressors {
            let (full, done_to) = (Arc::clone(&full), done_to.clone());
            scope.spawn(move || compress(compressor, unit, &full, &done_to));
        }
        drop((full, done_to));
        let reading = scope.spawn(move || reader.run(&empty, &full_to));
        let written = target.write_all(unit, None, &done, &empty_to, work);
        drop((done, empty_to));
        finish(reading.join(), written, &stop)
    })?;
    target.close()?;
    report.zero = size - report.same - report.written;
    (work.progress)(size);
    Ok(report)
}

/// How many pieces go round.
fn pieces(workers: usize, unit: u64, packs: bool) -> usize {
    let each = PIECE_BYTES.max(unit) * if packs { 2 } else { 1 };
    // At most 64 MiB / 512 KiB.
    let fit = (MEMORY_BYTES / each) as usize;
    (2 * workers + 2).min(fit).max(2)
}

/// The report of both sides; of two errors the reader's, which came first. `written` also says where the last piece
/// ended: one side may take an end of the other for the end of all, and a target that lacks its end must not be closed.
fn finish(
    read: thread::Result<Result<Report>>,
    written: Result<(Report, u64)>,
    stop: &Stop,
) -> Result<Report> {
    let read = read.unwrap_or_else(|_| Err(Error::invalid("the thread that reads has died")))?;
    let (written, end) = written?;
    if end < read.size {
        stop.check()?;
        return Err(Error::invalid(format!(
            "the copy ended at byte {end} of {}, without an error: nothing is made of it; this is a defect of \
             diskplane, please report it",
            read.size
        )));
    }
    Ok(Report {
        size: read.size,
        read: read.read,
        unreadable: read.unreadable,
        unreadable_bytes: read.unreadable_bytes,
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

/// Compresses pieces until there are no more, or nobody takes them. The wish to stop is for those who can say so: the
/// reader and the writer.
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

#[cfg(test)]
mod tests {
    use super::*;
    use block::ErrorKind;

    /// What a thread that ended too early looked like: neither side had an error.
    #[test]
    fn a_copy_that_lacks_its_end_is_no_copy() {
        let read = || {
            Ok(Ok(Report {
                size: 1 << 20,
                ..Report::default()
            }))
        };
        let written = |end| Ok((Report::default(), end));
        let stop = Stop::default();
        assert!(finish(read(), written(1 << 20), &stop).is_ok());
        let error = finish(read(), written(1 << 19), &stop).unwrap_err();
        assert!(
            error.to_string().contains("at byte 524288 of 1048576"),
            "{error}"
        );
        stop.request();
        let error = finish(read(), written(1 << 19), &stop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        // All of it was there before.
        assert!(finish(read(), written(1 << 20), &stop).is_ok());
    }

    #[test]
    fn pieces_fit_the_memory() {
        for (workers, unit, packs, want) in [
            (1, 4096, false, 4),
            (64, 65536, true, 64),
            (64, 2 << 20, true, 16),
            (64, 4096, false, 128),
            (1, 2 << 20, true, 4),
        ] {
            assert_eq!(pieces(workers, unit, packs), want, "{workers} {unit}");
        }
    }
}
