//! The thread that reads the source.

use super::{OFFLOAD_BYTES, PIECE_BYTES, Piece, Pieces, Report, Unit};
use crate::source::Source;
use crate::work::Stop;
use block::{Result, is_zero};
use std::sync::mpsc::Receiver;

pub(super) struct Reader<'a> {
    pub source: Source<'a>,
    pub base: Option<Source<'a>>,
    /// Bytes that are one thing: data, zeros, as in the base.
    pub unit: u64,
    pub sparse: u64,
    pub offload: bool,
    /// What the base has there.
    pub below: Vec<u8>,
    /// Bytes read as data so far.
    pub read: u64,
    pub stop: Stop,
}

impl Reader<'_> {
    pub fn run(mut self, empty: &Receiver<Piece>, full: &impl Pieces) -> Result<Report> {
        let (mut at, mut nth) = (0, 0);
        let size = self.source.size();
        while at < size {
            // Whoever writes has failed where there are none: its error counts.
            let Ok(mut piece) = empty.recv() else { break };
            self.stop.check()?;
            (piece.nth, piece.at) = (nth, at);
            self.fill(&mut piece)?;
            at += piece.len;
            nth += 1;
            if !full.put(piece) {
                break;
            }
        }
        let read = self.read;
        let (unreadable, unreadable_bytes) = self.source.unreadable();
        Ok(Report {
            size,
            read,
            unreadable,
            unreadable_bytes,
            ..Report::default()
        })
    }

    /// Puts what comes next into `piece`.
    fn fill(&mut self, piece: &mut Piece) -> Result<()> {
        piece.units.clear();
        piece.packed.clear();
        piece.place = None;
        if self.sparse > 0 && (self.leave_out(piece)? || self.refer(piece)?) {
            return Ok(());
        }
        self.read(piece)
    }

    /// Zeros that need not be read, as far as they go.
    fn leave_out(&mut self, piece: &mut Piece) -> Result<bool> {
        let (at, size) = (piece.at, self.source.size());
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
        // The buffer has been around: without bytes they are zeros.
        piece.bytes.clear();
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

    fn read(&mut self, piece: &mut Piece) -> Result<()> {
        let (at, unit) = (piece.at, self.unit);
        piece.len = PIECE_BYTES.max(unit).min(self.source.size() - at);
        let bytes = piece.len.next_multiple_of(unit);
        // At most 2 MiB.
        piece.bytes.resize(bytes as usize, 0);
        self.source.read(at, &mut piece.bytes)?;
        self.read += piece.len;
        let mut below = [].as_slice();
        if let Some(base) = &mut self.base {
            self.below.resize(bytes as usize, 0);
            base.read(at, &mut self.below)?;
            below = &self.below;
        }
        let mut below = below.chunks(unit as usize);
        for bytes in piece.bytes.chunks(unit as usize) {
            let same = below.next().is_some_and(|below| below == bytes);
            piece.units.push(match same {
                true => Unit::Same,
                false if self.sparse > 0 && is_zero(bytes) => Unit::Zero,
                false => Unit::Plain,
            });
        }
        fill_gaps(&mut piece.units, self.sparse.div_ceil(unit));
        Ok(())
    }
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
