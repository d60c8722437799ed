//! Whether two disks read the same.
//!
//! What is zeros in both by their maps, and what both have in the same place of the same file (two overlays of one
//! base), is the same without being read. Behind the shorter disk's end there are zeros.

use crate::source::{Run, Source};
use crate::work::Work;
use block::{Error, is_zero};

/// Bytes that are read of each disk at once.
const PIECE_BYTES: u64 = 1 << 20;
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
    Map(Error),
    /// Reading, or the work was stopped.
    Read(Error),
}

/// Compares two disks, up to the first difference. With `strict`, their sizes and what they have allocated count too.
///
/// # Errors
///
/// What asking, or reading, fails with.
pub fn compare(
    mut a: Source<'_>,
    mut b: Source<'_>,
    strict: bool,
    work: &mut Work<'_>,
) -> Result<Outcome, Failure> {
    let mut outcome = Outcome {
        sizes: [a.size(), b.size()],
        ..Outcome::default()
    };
    let [size_a, size_b] = outcome.sizes;
    if strict && size_a != size_b {
        outcome.difference = Some(Difference::Size);
        return Ok(outcome);
    }
    let end = size_a.max(size_b);
    let mut pair = Pair {
        a: Vec::new(),
        b: Vec::new(),
    };
    let mut at = 0;
    while at < end {
        work.reached(at).map_err(Failure::Read)?;
        let here = a.run(at, end - at).map_err(Failure::Map)?;
        let there = b.run(at, here.len).map_err(Failure::Map)?;
        let mut len = here.len.min(there.len);
        if strict && status(&here) != status(&there) {
            outcome.difference = Some(Difference::Status { at });
            return Ok(outcome);
        }
        let same = here.zero && there.zero || same_place(&here, &there);
        if !same {
            len = len.min(PIECE_BYTES);
            let differs = match (here.zero, there.zero) {
                (true, _) => pair.against_zeros(&mut b, at, len),
                (_, true) => pair.against_zeros(&mut a, at, len),
                _ => pair.against(&mut a, &mut b, at, len),
            };
            outcome.read += len * (u64::from(!here.zero) + u64::from(!there.zero));
            if let Some(nth) = differs.map_err(Failure::Read)? {
                outcome.difference = Some(Difference::Content { at: at + nth });
                return Ok(outcome);
            }
            work.moved(len).map_err(Failure::Read)?;
        }
        at += len;
    }
    (work.progress)(end);
    Ok(outcome)
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

/// Bytes of both disks.
struct Pair {
    a: Vec<u8>,
    b: Vec<u8>,
}

impl Pair {
    fn against_zeros(
        &mut self,
        disk: &mut Source<'_>,
        at: u64,
        len: u64,
    ) -> Result<Option<u64>, Error> {
        // At most 1 MiB.
        self.a.resize(len as usize, 0);
        disk.read(at, &mut self.a)?;
        Ok(match is_zero(&self.a) {
            true => None,
            false => position(self.a.iter().map(|byte| *byte != 0)),
        })
    }

    fn against(
        &mut self,
        a: &mut Source<'_>,
        b: &mut Source<'_>,
        at: u64,
        len: u64,
    ) -> Result<Option<u64>, Error> {
        // At most 1 MiB.
        self.a.resize(len as usize, 0);
        self.b.resize(len as usize, 0);
        a.read(at, &mut self.a)?;
        b.read(at, &mut self.b)?;
        Ok(match self.a == self.b {
            true => None,
            false => position(self.a.iter().zip(&self.b).map(|(a, b)| a != b)),
        })
    }
}

fn position(mut differs: impl Iterator<Item = bool>) -> Option<u64> {
    differs.position(|differs| differs).map(|nth| nth as u64)
}
