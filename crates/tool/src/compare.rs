//! Whether two disks read the same.
//!
//! What is zeros in both by their maps, and what both have in the same place of the same file (two overlays of one
//! base), is the same without being read. Behind the shorter disk's end there are zeros.
//!
//! Several threads take pieces in the disks' order, by turns at the maps, and read and compare them each for itself. Of what
//! they find the first on the disk counts, as if one had looked from the beginning: all before it was handed out before.

use crate::buffer::Buffer;
use crate::source::{Run, Source};
use crate::work::Work;
use block::{Error, is_zero};
use disk::blocking::{self, Fragment};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

/// Bytes of each disk that are compared at once: those of both stay in a core's own cache between reading and comparing.
/// (Of 64 KiB to 2 MiB 128 KiB took the least CPU here, a quarter less than 1 MiB.)
const PIECE_BYTES: u64 = 128 << 10;
/// The same where bytes may be part of a cluster that has to be unpacked as a whole, which is 2 MiB at most.
const CLUSTER_BYTES: u64 = 2 << 20;
/// Threads at least, so that one reads while another waits for its disk, and at most.
const THREADS: (usize, usize) = (2, 8);
/// What `qemu-img compare` names a difference by.
const SECTOR: u64 = 512;

/// Where two disks differ first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// In strict mode: their sizes.
    Size,
    /// In strict mode: one has at this byte what the other has not, or one says that it is zeros.
    Status {
        /// First byte of the disk.
        at: u64,
    },
    /// Their bytes.
    Content {
        /// First byte of the disk that differs.
        at: u64,
    },
}

impl Difference {
    /// The offset that `qemu-img compare` names: that of the sector.
    pub fn sector(self) -> Option<u64> {
        match self {
            Difference::Size => None,
            Difference::Status { at } => Some(at),
            Difference::Content { at } => Some(at - at % SECTOR),
        }
    }
}

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes of each disk.
    pub sizes: [u64; 2],
    /// `None`: they read the same.
    pub difference: Option<Difference>,
    /// Bytes that had to be read, of both together.
    pub read: u64,
}

/// What failed.
#[derive(Debug)]
pub enum Failure {
    /// Asking what is allocated.
    Map {
        /// Which of the two: 0 or 1.
        image: usize,
        /// Why.
        error: Error,
    },
    /// Reading data.
    Read {
        /// Which of the two: 0 or 1.
        image: usize,
        /// Where what was read at once begins.
        at: u64,
        /// Why.
        error: Error,
    },
    /// The work was stopped.
    Stopped(Error),
}

/// Compares two disks, up to the first difference. With `strict`, their sizes and what they have allocated count too.
///
/// Progress is where the next piece begins; a few before it may still be read.
///
/// # Errors
///
/// What asking, or reading, fails with.
pub fn compare(
    a: Source<'_>,
    b: Source<'_>,
    strict: bool,
    work: &mut Work<'_>,
) -> Result<Outcome, Failure> {
    let sizes = [a.size(), b.size()];
    if strict && sizes[0] != sizes[1] {
        return Ok(Outcome {
            sizes,
            difference: Some(Difference::Size),
            read: 0,
        });
    }
    let end = sizes[0].max(sizes[1]);
    let walk = Mutex::new(Walk {
        a,
        b,
        strict,
        work,
        at: 0,
        end,
        read: 0,
        first: None,
    });
    let (least, most) = THREADS;
    let threads = thread::available_parallelism().map_or(least, |n| n.get().clamp(least, most));
    thread::scope(|scope| {
        for _ in 1..threads {
            let helper = thread::Builder::new().name("compare".into());
            // With fewer than were wished for it takes longer.
            if helper.spawn_scoped(scope, || help(&walk)).is_err() {
                break;
            }
        }
        help(&walk);
    });
    let walk = walk.into_inner().unwrap_or_else(PoisonError::into_inner);
    let difference = match walk.first {
        Some((_, Found::Failure(failure))) => return Err(failure),
        Some((_, Found::Difference(difference))) => Some(difference),
        None => {
            (walk.work.progress)(end);
            None
        }
    };
    Ok(Outcome {
        sizes,
        difference,
        read: walk.read,
    })
}

/// What ends the work.
enum Found {
    Difference(Difference),
    Failure(Failure),
}

/// Both disks, and how far they were handed out.
struct Walk<'a, 'b, 'w, 'p> {
    a: Source<'a>,
    b: Source<'b>,
    strict: bool,
    work: &'w mut Work<'p>,
    at: u64,
    end: u64,
    /// Bytes that had to be read, of both together.
    read: u64,
    /// What was found nearest to the beginning, and where.
    first: Option<(u64, Found)>,
}

impl Walk<'_, '_, '_, '_> {
    /// Makes `piece` the next that has to be read; `false` when there is none, or something was found before it.
    fn next(&mut self, piece: &mut Piece) -> bool {
        while self.first.is_none() && self.at < self.end {
            match self.step(piece) {
                Ok(true) => return true,
                Ok(false) => {}
                Err(found) => self.found(self.at, found),
            }
        }
        false
    }

    /// Goes on to the next piece, or behind what is the same without being read.
    fn step(&mut self, piece: &mut Piece) -> Result<bool, Found> {
        let map = |image| move |error| Found::Failure(Failure::Map { image, error });
        let stopped = |error| Found::Failure(Failure::Stopped(error));
        let at = self.at;
        let read = |image| move |error| Found::Failure(Failure::Read { image, at, error });
        self.work.reached(at).map_err(stopped)?;
        let here = self.a.run(at, self.end - at).map_err(map(0))?;
        let there = self.b.run(at, here.len).map_err(map(1))?;
        let len = here.len.min(there.len);
        if self.strict && status(&here) != status(&there) {
            return Err(Found::Difference(Difference::Status { at }));
        }
        if here.zero && there.zero || same_place(&here, &there) {
            self.at += len;
            return Ok(false);
        }
        piece.at = at;
        let elsewhere = |run: &Run| run.data && run.place.is_none();
        piece.len = len.min(match elsewhere(&here) || elsewhere(&there) {
            true => CLUSTER_BYTES,
            false => PIECE_BYTES,
        });
        self.read += piece
            .a
            .find(&mut self.a, &here, at, piece.len)
            .map_err(read(0))?;
        self.read += piece
            .b
            .find(&mut self.b, &there, at, piece.len)
            .map_err(read(1))?;
        self.work.moved(piece.len).map_err(stopped)?;
        self.at += piece.len;
        Ok(true)
    }

    fn found(&mut self, at: u64, found: Found) {
        if self.first.as_ref().is_none_or(|(first, _)| at < *first) {
            self.first = Some((at, found));
        }
    }
}

/// A disk's part of a piece.
struct Side {
    zero: bool,
    fragments: Vec<Fragment>,
    buffer: Buffer,
}

impl Side {
    fn new() -> Self {
        Self {
            zero: false,
            fragments: Vec::new(),
            buffer: Buffer::new(PIECE_BYTES as usize),
        }
    }

    /// Learns where `len` bytes of `run` at `at` are; returns how many have to be read.
    fn find(&mut self, disk: &mut Source<'_>, run: &Run, at: u64, len: u64) -> Result<u64, Error> {
        self.fragments.clear();
        self.zero = run.zero;
        if run.zero {
            return Ok(0);
        }
        disk.locate(at, len, &mut self.fragments)?;
        Ok(len)
    }

    /// Reads `len` bytes, unless they are known to be zeros.
    fn read(&mut self, len: u64) -> Result<(), Error> {
        if self.zero {
            return Ok(());
        }
        // At most a piece.
        let bytes = self.buffer.first_mut(len as usize);
        blocking::read(&self.fragments, bytes)
    }
}

/// Bytes of both disks that are looked at together.
struct Piece {
    at: u64,
    len: u64,
    a: Side,
    b: Side,
}

impl Piece {
    /// Where in it the disks differ first.
    fn differs(&mut self) -> Result<Option<u64>, Failure> {
        let at = self.at;
        let read = |image| move |error| Failure::Read { image, at, error };
        self.a.read(self.len).map_err(read(0))?;
        self.b.read(self.len).map_err(read(1))?;
        let len = self.len as usize;
        let (a, b) = (self.a.buffer.first(len), self.b.buffer.first(len));
        Ok(match (self.a.zero, self.b.zero) {
            (true, _) => unlike_zeros(b),
            (_, true) => unlike_zeros(a),
            _ if a == b => None,
            _ => position(a.iter().zip(b).map(|(a, b)| a != b)),
        })
    }
}

fn lock<'m, W>(walk: &'m Mutex<W>) -> MutexGuard<'m, W> {
    walk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compares pieces until there are no more.
fn help(walk: &Mutex<Walk<'_, '_, '_, '_>>) {
    let mut piece = Piece {
        at: 0,
        len: 0,
        a: Side::new(),
        b: Side::new(),
    };
    while lock(walk).next(&mut piece) {
        let found = match piece.differs() {
            Ok(None) => continue,
            Ok(Some(nth)) => Found::Difference(Difference::Content { at: piece.at + nth }),
            Err(failure) => Found::Failure(failure),
        };
        lock(walk).found(piece.at, found);
    }
}

/// What counts in strict mode.
fn status(run: &Run) -> (bool, bool, bool) {
    (run.allocated, run.zero, run.data)
}

fn same_place(a: &Run, b: &Run) -> bool {
    match (&a.place, &b.place) {
        (Some(a), Some(b)) => (a.identity, a.offset) == (b.identity, b.offset),
        _ => false,
    }
}

fn unlike_zeros(bytes: &[u8]) -> Option<u64> {
    match is_zero(bytes) {
        true => None,
        false => position(bytes.iter().map(|byte| *byte != 0)),
    }
}

fn position(mut differs: impl Iterator<Item = bool>) -> Option<u64> {
    differs.position(|differs| differs).map(|nth| nth as u64)
}
