//! Those who copy: each takes a piece, and carries it from the source to the target.

use super::feed::{Feed, sort};
use super::target::{Job, Target, copy};
use super::{ConvertOptions, Piece, Report, Unit};
use crate::buffer::Buffer;
use crate::work::{Stop, Work};
use block::{Error, Result};
use disk::blocking;
use image::Pack;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What a copier has of its own.
pub(super) struct Hands {
    piece: Piece,
    /// What the base has there.
    below: Buffer,
    compressor: Option<Box<dyn Pack>>,
    packed: Vec<u8>,
    jobs: Vec<Job>,
}

impl Hands {
    pub fn new(unit: u64, compressor: Option<Box<dyn Pack>>) -> Self {
        Self {
            piece: Piece::new(unit),
            below: Buffer::new(0),
            compressor,
            packed: Vec::new(),
            jobs: Vec::new(),
        }
    }
}

/// The target, and whose turn it is.
struct Sink<'a> {
    target: Target<'a>,
    next: u64,
    /// Writes that have a place and are not finished, of all copiers.
    open: usize,
}

/// What is done.
struct Ledger<'a, 'w> {
    work: &'a mut Work<'w>,
    report: Report,
    /// Ends of pieces that are done while one before is not: fewer than there are copiers.
    ends: BTreeMap<u64, u64>,
    next: u64,
    /// All before is done.
    end: u64,
    /// Bytes written when the target was flushed last.
    durable: u64,
}

/// All that copiers share. Of the locks, a copier takes one at a time; with the ledger's it may take the sink's.
pub(super) struct Crew<'a, 'w> {
    feed: Mutex<Feed<'a>>,
    sink: Mutex<Sink<'a>>,
    /// A turn ended, a write was finished, or all is over.
    changed: Condvar,
    ledger: Mutex<Ledger<'a, 'w>>,
    over: AtomicBool,
    error: Mutex<Option<Error>>,
    stop: Stop,
    size: u64,
    unit: u64,
    sparse: u64,
    salvages: bool,
    in_order: bool,
    /// The source's last cluster may be packed though it is not whole: nothing of the target is behind it.
    packs_rest: bool,
    checkpoint: Option<u64>,
    /// See [`Target::reserves`].
    reserves: Option<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a, 'w> Crew<'a, 'w> {
    pub fn new(
        feed: Feed<'a>,
        target: Target<'a>,
        options: &ConvertOptions<'_>,
        work: &'a mut Work<'w>,
    ) -> Self {
        Self {
            stop: work.stop.clone(),
            size: feed.source.size(),
            unit: feed.unit,
            sparse: feed.sparse,
            salvages: feed.source.salvages(),
            in_order: !options.out_of_order || target.is_sequential(),
            packs_rest: target.is_sequential() || target.size() == feed.source.size(),
            checkpoint: options.checkpoint.filter(|_| !target.is_sequential()),
            reserves: target.reserves(),
            feed: Mutex::new(feed),
            sink: Mutex::new(Sink {
                target,
                next: 0,
                open: 0,
            }),
            changed: Condvar::new(),
            ledger: Mutex::new(Ledger {
                work,
                report: Report::default(),
                ends: BTreeMap::new(),
                next: 0,
                end: 0,
                durable: 0,
            }),
            over: AtomicBool::new(false),
            error: Mutex::new(None),
        }
    }

    /// Copies pieces until there are no more, or one could not be copied.
    pub fn work(&self, mut hands: Hands) {
        // A copier that dies must not be waited for.
        let watch = Watch(self);
        let done = loop {
            match self.one(&mut hands) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        // What has a place and was not written is given up.
        hands.jobs.clear();
        std::mem::forget(watch);
        if let Err(error) = done {
            self.fail(error);
        }
    }

    /// Nobody is to go on: of several errors the first counts.
    pub fn fail(&self, error: Error) {
        lock(&self.error).get_or_insert(error);
        self.end();
    }

    /// Nobody is to go on.
    fn end(&self) {
        self.over.store(true, Ordering::Release);
        // Whoever is about to wait has looked before, or looks afterwards.
        drop(lock(&self.sink));
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Copies the next piece; `false` when there is none, or nobody is to go on.
    fn one(&self, hands: &mut Hands) -> Result<bool> {
        let piece = &mut hands.piece;
        {
            let mut feed = lock(&self.feed);
            if self.is_over() {
                return Ok(false);
            }
            self.stop.check()?;
            if !feed.next(piece)? {
                return Ok(false);
            }
        }
        if piece.in_bytes {
            self.read(piece, &mut hands.below)?;
            if let Some(compressor) = &mut hands.compressor {
                let rest = self.packs_rest;
                pack(piece, self.unit, rest, &mut **compressor, &mut hands.packed);
            }
        }
        let mut report = Report::default();
        if !self.give_places(hands, &mut report)? {
            return Ok(false);
        }
        self.write(hands, &mut report)?;
        self.note(&hands.piece, report)?;
        Ok(true)
    }

    fn read(&self, piece: &mut Piece, below: &mut Buffer) -> Result<()> {
        let len = piece.len as usize;
        let padded = piece.len.next_multiple_of(self.unit) as usize;
        let fragments = std::mem::take(&mut piece.fragments);
        let there: u64 = fragments.iter().map(blocking::Fragment::len).sum();
        let found = match there == piece.len {
            true => blocking::read(&fragments, piece.bytes_mut(len)),
            false => Err(Error::corrupt("the source's tables cannot be read")),
        };
        piece.fragments = fragments;
        match found {
            Err(_) if self.salvages => lock(&self.feed).salvage(piece)?,
            found => found?,
        }
        piece
            .bytes_mut(padded)
            .get_mut(len..)
            .unwrap_or_default()
            .fill(0);
        let has_base = !piece.below.is_empty();
        if has_base {
            // At most a piece.
            let bytes = below.first_mut(padded);
            let there: u64 = piece.below.iter().map(blocking::Fragment::len).sum();
            let (part, behind) = bytes.split_at_mut(padded.min(there as usize));
            blocking::read(&piece.below, part)?;
            behind.fill(0);
        }
        let below = has_base.then(|| below.first(padded));
        sort(piece, self.unit, self.sparse, below);
        Ok(())
    }

    /// Waits for the piece's turn, and has the target say where it goes; `false` when all is over.
    fn give_places(&self, hands: &mut Hands, report: &mut Report) -> Result<bool> {
        let mut sink = lock(&self.sink);
        while self.in_order && sink.next != hands.piece.nth && !self.is_over() {
            sink = self.wait(sink);
        }
        if self.is_over() {
            return Ok(false);
        }
        let mut at = 0;
        loop {
            let before = hands.jobs.len();
            let progress = (&mut at, sink.open == 0);
            let (piece, jobs) = (&hands.piece, &mut hands.jobs);
            let busy = (sink.target).place(piece, self.unit, progress, jobs, report)?;
            sink.open += hands.jobs.len() - before;
            if !busy {
                break;
            }
            // What it waits for may be its own, or another's.
            if !hands.jobs.is_empty() {
                let written = hands.jobs.len();
                drop(sink);
                self.write_jobs(hands, report)?;
                sink = lock(&self.sink);
                sink.open -= written;
            } else if sink.open > 0 {
                sink = self.wait(sink);
            } else {
                return Err(Error::new(
                    block::ErrorKind::Io,
                    "the target waits for what nobody does",
                ));
            }
            if self.is_over() {
                return Ok(false);
            }
        }
        sink.next += 1;
        drop(sink);
        self.changed.notify_all();
        Ok(true)
    }

    fn wait<'s>(&self, sink: MutexGuard<'s, Sink<'a>>) -> MutexGuard<'s, Sink<'a>> {
        let waited = self.changed.wait(sink);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, hands: &mut Hands, report: &mut Report) -> Result<()> {
        if hands.jobs.is_empty() {
            return Ok(());
        }
        let written = hands.jobs.len();
        self.write_jobs(hands, report)?;
        lock(&self.sink).open -= written;
        self.changed.notify_all();
        Ok(())
    }

    /// Carries out what has its place.
    fn write_jobs(&self, hands: &mut Hands, report: &mut Report) -> Result<()> {
        let piece = &hands.piece;
        for job in hands.jobs.drain(..) {
            let len = job.placed.len();
            match &piece.place {
                Some(place) => {
                    if let Some((file, host)) = job.placed.place()? {
                        let from = place.offset + job.at;
                        report.offloaded += copy(&*place.file, from, &*file, host, len)?;
                    }
                }
                None => {
                    let bytes = piece.bytes(piece.len as usize).get(job.at as usize..);
                    let bytes = bytes.and_then(|bytes| bytes.get(..len as usize));
                    let bytes = bytes.ok_or_else(|| Error::invalid("a place is too long"))?;
                    if self.reserves.is_some_and(|least| len >= least) {
                        job.placed.reserve();
                    }
                    job.placed.write(bytes)?;
                }
            }
            job.placed.finish();
        }
        Ok(())
    }

    /// Notes that a piece is done, at the rate that is allowed.
    fn note(&self, piece: &Piece, report: Report) -> Result<()> {
        let mut guard = lock(&self.ledger);
        let ledger = &mut *guard;
        let sum = &mut ledger.report;
        sum.same += report.same;
        sum.written += report.written;
        sum.offloaded += report.offloaded;
        sum.resumed += report.resumed;
        sum.compressed_clusters += report.compressed_clusters;
        sum.compressed_bytes += report.compressed_bytes;
        ledger.ends.insert(piece.nth, piece.at + piece.len);
        while let Some(end) = ledger.ends.remove(&ledger.next) {
            (ledger.end, ledger.next) = (end, ledger.next + 1);
        }
        ledger.work.reached(ledger.end)?;
        ledger.work.moved(report.written)?;
        if (self.checkpoint).is_some_and(|bytes| ledger.report.written - ledger.durable >= bytes) {
            lock(&self.sink).target.flush()?;
            ledger.durable = ledger.report.written;
        }
        Ok(())
    }

    /// Closes the target, where all of the disk was copied.
    pub fn finish(self) -> Result<Report> {
        let error = self.error.into_inner();
        if let Some(error) = error.unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let ledger = self.ledger.into_inner();
        let ledger = ledger.unwrap_or_else(PoisonError::into_inner);
        complete(ledger.end, self.size, &self.stop)?;
        let sink = self.sink.into_inner();
        sink.unwrap_or_else(PoisonError::into_inner)
            .target
            .close()?;
        let feed = self.feed.into_inner();
        let feed = feed.unwrap_or_else(PoisonError::into_inner);
        let read = feed.read;
        let damage = feed.damage();
        (ledger.work.progress)(self.size);
        Ok(Report {
            size: self.size,
            read,
            zero: self.size - ledger.report.same - ledger.report.written,
            damage,
            ..ledger.report
        })
    }
}

/// A target that lacks its end must not be closed, whatever became of whoever was to write it.
fn complete(end: u64, size: u64, stop: &Stop) -> Result<()> {
    if end < size {
        stop.check()?;
        return Err(Error::invalid(format!(
            "the copy ended at byte {end} of {size}, without an error: nothing is made of it; this is a defect of \
             diskplane, please report it"
        )));
    }
    Ok(())
}

/// Ends all where a copier dies.
struct Watch<'c, 'a, 'w>(&'c Crew<'a, 'w>);

impl Drop for Watch<'_, '_, '_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Compresses what is data.
fn pack(piece: &mut Piece, unit: u64, rest: bool, compressor: &mut dyn Pack, packed: &mut Vec<u8>) {
    // What is behind a disk's end may be another disk's part of the cluster.
    let whole = match rest {
        true => usize::MAX,
        false => (piece.len / unit) as usize,
    };
    let mut units = std::mem::take(&mut piece.units);
    let len = piece.len.next_multiple_of(unit) as usize;
    let mut all = std::mem::take(&mut piece.packed);
    let clusters = piece.bytes(len).chunks(unit as usize);
    for (kind, bytes) in units.iter_mut().take(whole).zip(clusters) {
        if *kind == Unit::Plain && compressor.pack(bytes, packed) {
            *kind = Unit::Packed(packed.len());
            all.extend_from_slice(packed);
        }
    }
    (piece.units, piece.packed) = (units, all);
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::ErrorKind;

    /// What a copier that died looked like: nobody had an error.
    #[test]
    fn a_copy_that_lacks_its_end_is_no_copy() {
        let stop = Stop::default();
        assert!(complete(1 << 20, 1 << 20, &stop).is_ok());
        let error = complete(1 << 19, 1 << 20, &stop).unwrap_err();
        assert!(
            error.to_string().contains("at byte 524288 of 1048576"),
            "{error}"
        );
        stop.request();
        let error = complete(1 << 19, 1 << 20, &stop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        // All of it was there before.
        assert!(complete(1 << 20, 1 << 20, &stop).is_ok());
    }
}
