//! Copying a disk into another image, with or without compression.
//!
//! ```text
//!   feed (the source's map) ──▶ copier: read · sort · compress ──▶ in turn: a place in the target ──▶ write · done
//!                           ──▶ copier …
//! ```
//!
//! Several copiers work at a time, each on one piece from its reading to its writing, in memory of its own. What is next
//! and where it goes they ask one after the other, which costs no I/O but for tables; bytes are read, compared,
//! compressed, encrypted and written side by side. Zeros are left out; with a base also what the target's
//! backing file shows anyway. Places are given in the disk's order, unless asked otherwise: the target does not
//! depend on the number of copiers. Where bytes lie in a file as they are, they
//! may go from file to file without being read ([`ConvertOptions::offload`]): such a piece has a place, no bytes.
//!
//! # Memory
//!
//! A copier has a piece: at most [`PIECE_BYTES`] or a cluster, once plain, and once packed or once as the base has it. There
//! are never more copiers than fit [`MEMORY_BYTES`].

mod copier;
mod feed;
mod target;

pub use target::Target;

use crate::buffer::Buffer;
use crate::source::{Damage, Place, Source};
use crate::work::Work;
use block::{Error, Result};
use copier::{Crew, Hands};
use disk::Chain;
use disk::blocking::Fragment;
use feed::Feed;
use std::thread;

/// Bytes that are read at once, unless a cluster is larger.
pub const PIECE_BYTES: u64 = 512 << 10;
/// Most workers.
pub const WORKERS_MAX: usize = 64;
/// Bytes of all pieces together; one of the largest always.
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
    /// Pieces that are worked on at a time, 1 to [`WORKERS_MAX`].
    pub workers: usize,
    /// A piece gets its place as soon as it was read: the target may not have the disk's order. Of a target that is
    /// written in its order only it is not asked.
    pub out_of_order: bool,
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
            out_of_order: false,
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
    /// What of the source could not be read, and counts as zeros, and what it could not be found out of what it is made of.
    pub damage: Damage,
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

impl Unit {
    fn packed_bytes(self) -> usize {
        match self {
            Unit::Packed(bytes) => bytes,
            _ => 0,
        }
    }
}

/// A part of the disk on its way.
#[derive(Debug)]
struct Piece {
    nth: u64,
    at: u64,
    /// Bytes of the disk. All of them zeros where there are no units, no bytes and no place.
    len: u64,
    /// It has bytes, in [`Piece::fragments`] at first.
    in_bytes: bool,
    /// Where its bytes are read from, and those of the base.
    fragments: Vec<Fragment>,
    below: Vec<Fragment>,
    /// Whole units.
    buffer: Buffer,
    units: Vec<Unit>,
    packed: Vec<u8>,
    /// Where its bytes are, instead of here.
    place: Option<Place>,
}

impl Piece {
    fn new(unit: u64) -> Self {
        Self {
            nth: 0,
            at: 0,
            len: 0,
            in_bytes: false,
            fragments: Vec::new(),
            below: Vec::new(),
            // At most 2 MiB.
            buffer: Buffer::new(piece_bytes(unit) as usize),
            units: Vec::new(),
            packed: Vec::new(),
            place: None,
        }
    }

    fn reset(&mut self, nth: u64, at: u64) {
        (self.nth, self.at, self.len, self.in_bytes) = (nth, at, 0, false);
        self.fragments.clear();
        self.below.clear();
        self.units.clear();
        self.packed.clear();
        self.place = None;
    }

    fn bytes(&self, len: usize) -> &[u8] {
        self.buffer.first(len)
    }

    fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        self.buffer.first_mut(len)
    }
}

/// Bytes that are read at once: whole units.
fn piece_bytes(unit: u64) -> u64 {
    (PIECE_BYTES / unit).max(1) * unit
}

/// Copies all of `source` to `target`, which is closed afterwards if it is a new image, and else flushed.
///
/// # Errors
///
/// What reading, writing and unpacking failed with; [`block::ErrorKind::Invalid`] for a target that is too
/// small; [`block::ErrorKind::Interrupted`]. A compressed target that was not finished shows no format.
pub fn convert(
    source: Source<'_>,
    target: Target<'_>,
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
    let base = options.base.map(Source::new).transpose()?;
    let double = base.is_some() || target.packs();
    let copiers = copiers(options.workers, unit, double);
    let mut feed = Feed::new(source, base, unit, options.sparse);
    feed.offload = options.offload && target.takes_offload();
    let mut hands = Vec::with_capacity(copiers);
    for _ in 0..copiers {
        hands.push(Hands::new(unit, target.packer()?));
    }
    let crew = Crew::new(feed, target, options, work);
    thread::scope(|scope| {
        let mut hands = hands.into_iter();
        let own = hands.next();
        let crew = &crew;
        let others: Vec<_> = hands
            .map(|hands| scope.spawn(move || crew.work(hands)))
            .collect();
        own.into_iter().for_each(|hands| crew.work(hands));
        for other in others {
            if other.join().is_err() {
                crew.fail(Error::invalid("a thread that copies has died"));
            }
        }
    });
    crew.finish()
}

/// How many copiers there are.
fn copiers(workers: usize, unit: u64, double: bool) -> usize {
    let each = piece_bytes(unit) * if double { 2 } else { 1 };
    // At most 64 MiB / 512 KiB.
    let fit = (MEMORY_BYTES / each) as usize;
    workers.clamp(1, WORKERS_MAX).min(fit.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copiers_fit_the_memory() {
        for (workers, unit, double, want) in [
            (1, 4096, false, 1),
            (0, 4096, false, 1),
            (64, 65536, true, 64),
            (64, 2 << 20, true, 16),
            (1000, 4096, false, 64),
        ] {
            assert_eq!(copiers(workers, unit, double), want, "{workers} {unit}");
        }
    }
}
