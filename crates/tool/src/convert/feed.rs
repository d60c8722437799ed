//! What is copied next: the source's map, walked once from its beginning to its end.

use super::{OFFLOAD_BYTES, Piece, Unit, piece_bytes};
use crate::source::{Damage, Source};
use block::{Result, is_zero};

pub(super) struct Feed<'a> {
    pub source: Source<'a>,
    pub base: Option<Source<'a>>,
    /// Bytes that are one thing: data, zeros, as in the base.
    pub unit: u64,
    pub sparse: u64,
    pub offload: bool,
    pub at: u64,
    pub nth: u64,
    /// Up to here the source is known to have data.
    pub data_end: u64,
    /// Bytes read as data so far.
    pub read: u64,
}

impl<'a> Feed<'a> {
    pub fn new(source: Source<'a>, base: Option<Source<'a>>, unit: u64, sparse: u64) -> Self {
        Self {
            source,
            base,
            unit,
            sparse,
            offload: false,
            at: 0,
            nth: 0,
            data_end: 0,
            read: 0,
        }
    }

    /// Makes `piece` the next one; `false` at the end. Its bytes are not read yet, but where they are is known.
    pub fn next(&mut self, piece: &mut Piece) -> Result<bool> {
        if self.at >= self.source.size() {
            return Ok(false);
        }
        piece.reset(self.nth, self.at);
        if self.sparse == 0 || !(self.leave_out(piece)? || self.refer(piece)?) {
            self.look_up(piece)?;
        }
        self.at += piece.len;
        self.nth += 1;
        Ok(true)
    }

    /// Zeros that need not be read, as far as they go.
    fn leave_out(&mut self, piece: &mut Piece) -> Result<bool> {
        let (at, size) = (piece.at, self.source.size());
        if at < self.data_end {
            return Ok(false);
        }
        let mut zeros = self.source.zeros(at, size - at)?;
        let mut same = false;
        if let Some(base) = self.base.as_mut().filter(|_| zeros > 0) {
            // What is zeros in both is the same.
            zeros = base.zeros(at, zeros)?;
            same = true;
        }
        if at + zeros < size {
            zeros -= zeros % self.unit;
        }
        if zeros == 0 {
            return Ok(false);
        }
        piece.len = zeros;
        if same {
            piece.units.push(Unit::Same);
        }
        Ok(true)
    }

    /// Says where the bytes are, for the host to copy them.
    fn refer(&mut self, piece: &mut Piece) -> Result<bool> {
        if !self.offload || self.base.is_some() {
            return Ok(false);
        }
        let (at, size) = (piece.at, self.source.size());
        let most = OFFLOAD_BYTES.max(self.unit).min(size - at);
        let run = self.source.run(at, most)?;
        let mut len = run.len;
        if at + len < size {
            len -= len % self.unit;
        }
        if len == 0 || run.place.is_none() {
            return Ok(false);
        }
        (piece.len, piece.place) = (len, run.place);
        Ok(true)
    }

    fn look_up(&mut self, piece: &mut Piece) -> Result<()> {
        let at = piece.at;
        let most = piece_bytes(self.unit).min(self.source.size() - at);
        piece.len = match self.sparse {
            0 => most,
            _ => self.data(at, most)?,
        };
        piece.in_bytes = true;
        self.read += piece.len;
        let found = self.source.locate(at, piece.len, &mut piece.fragments);
        match found {
            // Whoever reads it finds out, and notes it.
            Err(_) if self.source.salvages() => piece.fragments.clear(),
            found => found?,
        }
        if let Some(base) = &mut self.base {
            // The overlay's disk may be larger.
            let there = base.size().saturating_sub(at).min(piece.len);
            base.locate(at, there, &mut piece.below)?;
        }
        Ok(())
    }

    /// How many of `most` bytes at `at` are read at once: up to zeros of more than a unit.
    fn data(&mut self, at: u64, most: u64) -> Result<u64> {
        let (mut here, end, size) = (at, at + most, self.source.size());
        while here < end {
            if here >= self.data_end {
                let run = self.source.run(here, size - here)?;
                match run.zero {
                    // The first unit has something else, or the base has.
                    true if run.len >= self.sparse.max(2 * self.unit) && here >= at + self.unit => {
                        break;
                    }
                    true => here += run.len,
                    false => self.data_end = here + run.len,
                }
            }
            here = here.max(self.data_end);
        }
        let len = (here - at).next_multiple_of(self.unit);
        Ok(len.min(most))
    }

    /// Reads a piece again that could not be read, and notes what is lost.
    pub fn salvage(&mut self, piece: &mut Piece) -> Result<()> {
        let (at, len) = (piece.at, piece.len as usize);
        self.source.read(at, piece.bytes_mut(len))
    }

    pub fn damage(self) -> Damage {
        self.source.damage()
    }
}

/// Says of each unit of `piece`, whose bytes are there, what becomes of it. `below` are the base's bytes, where there
/// is one.
pub(super) fn sort(piece: &mut Piece, unit: u64, sparse: u64, below: Option<&[u8]>) {
    let mut below = below.unwrap_or_default().chunks(unit as usize);
    let len = piece.len.next_multiple_of(unit) as usize;
    let mut units = std::mem::take(&mut piece.units);
    for bytes in piece.bytes(len).chunks(unit as usize) {
        let same = below.next().is_some_and(|below| below == bytes);
        units.push(match same {
            true => Unit::Same,
            false if sparse > 0 && is_zero(bytes) => Unit::Zero,
            false => Unit::Plain,
        });
    }
    fill_gaps(&mut units, sparse.div_ceil(unit));
    piece.units = units;
}

/// Makes runs of fewer than `least` zero units data.
fn fill_gaps(units: &mut [Unit], least: u64) {
    for run in units.chunk_by_mut(|a, b| a == b) {
        if run.first() == Some(&Unit::Zero) && (run.len() as u64) < least {
            run.fill(Unit::Plain);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_runs_of_zeros_stay() {
        use Unit::{Plain as P, Same as S, Zero as Z};
        for (least, units, want) in [
            (1, vec![Z, P, Z], vec![Z, P, Z]),
            (2, vec![Z, P, Z, Z, S, Z], vec![P, P, Z, Z, S, P]),
            (3, vec![Z, Z, P, Z, Z, Z], vec![P, P, P, Z, Z, Z]),
        ] {
            let mut units = units;
            fill_gaps(&mut units, least);
            assert_eq!(units, want, "{least}");
        }
    }
}
