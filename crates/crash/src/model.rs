//! What a guest may find, at any moment of a run.
//!
//! Every write fills its sectors with a stamp of its own, the write's number and the sector's, so that a
//! sector says who wrote it and where it belongs. A sector may hold what any write put there that had begun,
//! but for those that a write behind them has *settled*: one that began after they had ended, and that was
//! itself covered by a completed flush.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// What a write puts into its sectors.
#[derive(Clone, Debug)]
pub enum Value {
    /// Its stamps.
    Stamps,
    /// Zeros.
    Zeros,
    /// What was there at some other time: a stamp for each sector, 0 for zeros.
    Former(Arc<[u64]>),
}

/// Something that changes sectors.
#[derive(Clone, Debug)]
pub struct Write {
    /// The first sector.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// What they hold then.
    pub value: Value,
    /// When it was submitted, by the clock of the disks.
    pub begun: u64,
    /// When its end was reported.
    pub ended: Option<u64>,
    /// It took effect. Otherwise each of its sectors may hold its value or not: it failed, or it is a discard.
    pub sure: bool,
    /// It is covered as soon as it has ended.
    pub durable: bool,
}

impl Write {
    fn covers(&self, sector: u64) -> bool {
        (self.first..self.first + self.count).contains(&sector)
    }
}

/// The history of a guest's disk.
#[derive(Clone, Debug)]
pub struct Model {
    writes: Vec<Write>,
    /// When each flush was submitted, and when its success was reported.
    flushes: Vec<(u64, u64)>,
    /// Begin and end of each change of the size, and the size. One that failed never ends.
    sizes: Vec<(u64, u64, u64)>,
    /// What the disk held when something was made of it: a stamp for each sector.
    saved: BTreeMap<String, Vec<u64>>,
    /// When the image was damaged on purpose, and when a repair had mended it.
    damaged: Vec<(u64, Option<u64>)>,
    /// When the image was begun anew, and when that was complete.
    absent: Vec<(u64, Option<u64>)>,
}

/// Whether `at` is in one of the spans, which end where the second is known.
fn spans(all: &[(u64, Option<u64>)], at: u64) -> bool {
    let mut all = all.iter();
    all.any(|(from, until)| *from < at && until.is_none_or(|until| until >= at))
}

/// `all`, when what happened from `at` on never did.
fn cut(all: &mut Vec<(u64, Option<u64>)>, at: u64) {
    all.retain(|(from, _)| *from < at);
    for span in all {
        span.1 = span.1.filter(|until| *until < at);
    }
}

/// When to judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// After a crash at this event.
    Crash(u64),
    /// While the disk is served: all that has ended is there.
    Served,
    /// While the disk is served, for a read that began at this event: all that had ended then is there.
    Read(u64),
}

/// What may be on a disk at some moment.
#[derive(Clone, Debug)]
pub struct Allowed {
    at: u64,
    /// Errors that a repair mends.
    pub damaged: bool,
    /// There may be no image.
    pub absent: bool,
    /// By sector: the latest beginning of what has settled there.
    settled: Vec<u64>,
    zeros: Vec<bool>,
    /// Bytes that the disk may have.
    sizes: Vec<u64>,
}

impl Model {
    /// A disk that holds `stamps`, one for each sector, 0 for zeros. They are those of writes 1 to `layers`, which
    /// filled the images of the chain before anything else happened.
    pub fn new(stamps: &[u64], layers: usize) -> Self {
        let write = |count: u64, value| Write {
            first: 0,
            count,
            value,
            begun: 0,
            ended: Some(0),
            sure: true,
            durable: true,
        };
        let mut writes = vec![write(stamps.len() as u64, Value::Former(stamps.into()))];
        writes.extend((0..layers).map(|_| write(0, Value::Stamps)));
        Self {
            writes,
            flushes: Vec::new(),
            sizes: vec![(0, 0, stamps.len() as u64 * SECTOR)],
            saved: BTreeMap::new(),
            damaged: Vec::new(),
            absent: Vec::new(),
        }
    }

    /// What a stamp of write `id` is on `sector`.
    pub fn stamp(id: usize, sector: u64) -> u64 {
        (id as u64) << 32 | sector
    }

    /// The bytes of a write.
    pub fn bytes(id: usize, first: u64, count: u64) -> Vec<u8> {
        let sectors = first..first + count;
        let stamps = sectors.flat_map(|s| [Self::stamp(id, s); SECTOR as usize / 8]);
        stamps.flat_map(u64::to_le_bytes).collect()
    }

    /// Keeps what the disk holds under a name that nothing else gets.
    pub fn save(&mut self, name: &str, stamps: Vec<u64>) {
        self.saved.insert(name.to_owned(), stamps);
    }

    /// What the disk held when something of that name was made.
    pub fn saved(&self, name: &str) -> Option<&[u64]> {
        self.saved.get(name).map(Vec::as_slice)
    }

    /// Bytes of the disk by now.
    pub fn size(&self) -> u64 {
        let sure = self.sizes.iter().rfind(|s| s.1 < u64::MAX);
        sure.map_or(0, |s| s.2)
    }

    /// A write begins; returns its number.
    pub fn begin(&mut self, write: Write) -> usize {
        self.writes.push(write);
        self.writes.len() - 1
    }

    /// A write ended at `at`, and took effect if it is `sure`.
    pub fn end(&mut self, id: usize, at: u64, sure: bool) {
        let write = &mut self.writes[id];
        write.ended = Some(at);
        write.sure = sure;
    }

    /// The process ended at `at` without closing: what no flush had covered may be lost.
    pub fn killed(&mut self, at: u64) {
        let flushed = self.flushed_by(at);
        let open: Vec<usize> = (0..self.writes.len())
            .filter(|id| !self.settles(&self.writes[*id], When::Crash(at), flushed))
            .collect();
        for id in open {
            self.writes[id].sure = false;
        }
    }

    /// The machine lost power at `at`, and the disk holds `stamps` by `now`, durably. What began after `at` never
    /// happened.
    pub fn crashed(&mut self, at: u64, now: u64, stamps: &[u64]) {
        self.killed(at);
        for write in &mut self.writes {
            if write.begun > at {
                write.count = 0;
            } else if write.ended.is_none_or(|ended| ended > at) {
                // Nothing that follows a crash can be older than it.
                write.ended = Some(at);
            }
        }
        self.flushes.retain(|(_, ended)| *ended < at);
        cut(&mut self.damaged, at);
        cut(&mut self.absent, at);
        let size = stamps.len() as u64 * SECTOR;
        self.sizes.retain(|(_, ended, _)| *ended < at);
        if self.size() != size {
            self.sizes.push((now, now, size));
        }
        self.writes.push(Write {
            first: 0,
            count: stamps.len() as u64,
            value: Value::Former(stamps.into()),
            begun: now,
            ended: Some(now),
            sure: true,
            durable: true,
        });
    }

    /// The image is damaged on purpose from `at` on, until it is [`Model::mended`].
    pub fn damaged(&mut self, at: u64) {
        self.damaged.push((at, None));
    }

    /// A repair has mended the image.
    pub fn mended(&mut self, at: u64) {
        for damage in &mut self.damaged {
            damage.1.get_or_insert(at);
        }
    }

    /// Whether the image may have errors that a repair has to mend.
    pub fn is_damaged(&self, at: u64) -> bool {
        spans(&self.damaged, at)
    }

    /// The image is begun anew: there may be none from `at` on, until it is [`Model::present`].
    pub fn absent(&mut self, at: u64) {
        self.absent.push((at, None));
    }

    /// The image is there.
    pub fn present(&mut self, at: u64) {
        for absent in &mut self.absent {
            absent.1.get_or_insert(at);
        }
    }

    /// Whether there may be no image.
    pub fn is_absent(&self, at: u64) -> bool {
        spans(&self.absent, at)
    }

    /// When the latest flush was submitted whose success was reported before `at`.
    fn flushed_by(&self, at: u64) -> u64 {
        let flushes = self.flushes.iter().filter(|(_, ended)| *ended < at);
        flushes.map(|(begun, _)| *begun).max().unwrap_or(0)
    }

    /// A flush that was submitted at `begun` succeeded.
    pub fn flushed(&mut self, begun: u64, ended: u64) {
        self.flushes.push((begun, ended));
    }

    /// The disk gets another size, durably. What is added reads as zeros; what is cut off is gone.
    pub fn resized(&mut self, begun: u64, ended: u64, size: u64, sure: bool) {
        let old = self.size();
        let (from, to) = (old.min(size), old.max(size));
        self.writes.push(Write {
            first: from.div_ceil(SECTOR),
            count: (to - from) / SECTOR,
            value: Value::Zeros,
            begun,
            ended: Some(ended),
            sure: sure && size > old,
            durable: true,
        });
        let ended = if sure { ended } else { u64::MAX };
        self.sizes.push((begun, ended, size));
    }

    /// Whether a write has settled what was on its sectors before, by `when`.
    fn settles(&self, write: &Write, when: When, flushed: u64) -> bool {
        match (write.ended, when) {
            (Some(_), When::Served) => write.sure,
            (Some(ended), When::Read(begun)) => write.sure && ended < begun,
            (Some(ended), When::Crash(at)) => {
                write.sure && ended < at && (write.durable || ended < flushed)
            }
            (None, _) => false,
        }
    }

    /// What may be there at some moment.
    pub fn allowed(&self, when: When) -> Allowed {
        let at = match when {
            When::Crash(at) => at,
            When::Served | When::Read(_) => u64::MAX,
        };
        let flushed = self.flushed_by(at);
        let ends = self.writes.iter().map(|w| w.first + w.count);
        let mut settled = vec![0; ends.max().unwrap_or(0) as usize];
        for write in &self.writes {
            if self.settles(write, when, flushed) {
                for sector in write.first..write.first + write.count {
                    let settled = &mut settled[sector as usize];
                    *settled = write.begun.max(*settled);
                }
            }
        }
        let mut zeros = vec![false; settled.len()];
        for write in self.writes.iter().filter(|w| w.begun < at) {
            for sector in write.first..write.first + write.count {
                let i = sector as usize;
                let zero = match &write.value {
                    Value::Zeros => true,
                    Value::Former(stamps) => stamps[(sector - write.first) as usize] == 0,
                    Value::Stamps => false,
                };
                zeros[i] |= zero && write.ended.is_none_or(|ended| ended >= settled[i]);
            }
        }
        let sizes: Vec<_> = self.sizes.iter().filter(|s| s.0 < at).collect();
        let last = sizes.iter().rposition(|s| s.1 < at).unwrap_or(0);
        Allowed {
            at,
            damaged: self.is_damaged(at),
            absent: self.is_absent(at),
            settled,
            zeros,
            sizes: sizes.iter().skip(last).map(|s| s.2).collect(),
        }
    }

    /// What is wrong with `bytes`, read from the beginning of the disk.
    pub fn judge(&self, allowed: &Allowed, bytes: &[u8]) -> Result<(), String> {
        if !allowed.sizes.contains(&(bytes.len() as u64)) {
            let len = bytes.len();
            return Err(format!("the disk has {len} bytes, not {:?}", allowed.sizes));
        }
        self.judge_part(allowed, 0, bytes)
    }

    /// What is wrong with `bytes`, read from sector `first` on.
    pub fn judge_part(&self, allowed: &Allowed, first: u64, bytes: &[u8]) -> Result<(), String> {
        for (sector, part) in (first..).zip(bytes.chunks(SECTOR as usize)) {
            if let Some(what) = self.judge_sector(allowed, sector, part) {
                let byte = sector * SECTOR;
                return Err(format!("sector {sector} (guest byte {byte:#x}) {what}"));
            }
        }
        Ok(())
    }

    fn judge_sector(&self, allowed: &Allowed, sector: u64, part: &[u8]) -> Option<String> {
        let value = part.first_chunk().map_or(0, |w| u64::from_le_bytes(*w));
        // A sector against itself, one word on: all its words are the same.
        if part.len() > 8 && part[8..] != part[..part.len() - 8] {
            return Some("is torn: it holds more than one value".to_owned());
        }
        let i = sector as usize;
        let settled = allowed.settled[i];
        let valid = |write: &Write| {
            write.begun < allowed.at
                && write.covers(sector)
                && write.ended.is_none_or(|ended| ended >= settled)
        };
        if value == 0 {
            return (!allowed.zeros[i]).then(|| {
                format!(
                    "is zeros, but {} is settled there",
                    self.name(sector, settled)
                )
            });
        }
        let (id, place) = ((value >> 32) as usize, value & 0xffff_ffff);
        let Some(writer) = self.writes.get(id) else {
            return Some(format!("holds {value:#x}, which nobody wrote"));
        };
        let restored = || {
            self.writes.iter().any(|write| {
                matches!(&write.value, Value::Former(stamps)
                    if valid(write) && stamps[(sector - write.first) as usize] == value)
            })
        };
        if place != sector {
            return Some(format!(
                "holds what write {id} put on sector {place}: another cluster's content"
            ));
        }
        if matches!(writer.value, Value::Stamps) && valid(writer) || restored() {
            return None;
        }
        Some(format!(
            "holds what write {id} put there, but {} is settled there",
            self.name(sector, settled)
        ))
    }

    /// The write on a sector that began then.
    fn name(&self, sector: u64, begun: u64) -> String {
        let mut writes = self.writes.iter().enumerate();
        let found = writes.rfind(|(_, w)| w.begun == begun && w.covers(sector));
        match found {
            Some((id, write)) => {
                let what = match write.value {
                    Value::Stamps => "stamps",
                    Value::Zeros => "zeros",
                    Value::Former(_) => "former content",
                };
                format!("write {id} ({what}, event {begun})")
            }
            None => format!("event {begun}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(first: u64, count: u64, begun: u64) -> Write {
        Write {
            first,
            count,
            value: Value::Stamps,
            begun,
            ended: None,
            sure: false,
            durable: false,
        }
    }

    /// Which of these may be on sector 0: zeros, then the writes from 2 on.
    fn found(model: &Model, when: When) -> Vec<usize> {
        let allowed = model.allowed(when);
        let ids = (0..model.writes.len()).filter(|id| *id != 1);
        ids.filter(|id| {
            let mut bytes = vec![0; 1024];
            if *id > 0 {
                bytes[..512].copy_from_slice(&Model::bytes(*id, 0, 1));
            }
            model.judge(&allowed, &bytes).is_ok()
        })
        .collect()
    }

    #[test]
    fn a_sector_holds_what_was_written_since_the_last_flush_or_what_that_covered() {
        let mut model = Model::new(&[0, 0], 1);
        let a = model.begin(write(0, 1, 10));
        assert_eq!(found(&model, When::Crash(10)), [0]);
        assert_eq!(found(&model, When::Crash(11)), [0, a]);
        model.end(a, 12, true);
        assert_eq!(found(&model, When::Crash(20)), [0, a]);
        assert_eq!(found(&model, When::Served), [a]);
        // Submitted before the write ended: does not cover it.
        model.flushed(11, 13);
        assert_eq!(found(&model, When::Crash(20)), [0, a]);
        model.flushed(21, 23);
        assert_eq!(found(&model, When::Crash(22)), [0, a]);
        assert_eq!(found(&model, When::Crash(24)), [a]);
        // Two at once: either, whatever was flushed.
        let b = model.begin(write(0, 1, 30));
        let c = model.begin(write(0, 1, 31));
        model.end(b, 33, true);
        model.end(c, 34, true);
        assert_eq!(found(&model, When::Crash(40)), [a, b, c]);
        model.flushed(41, 42);
        assert_eq!(found(&model, When::Crash(50)), [b, c]);
        // A failed write settles nothing, but may be there.
        let d = model.begin(write(0, 1, 60));
        model.end(d, 61, false);
        model.flushed(62, 63);
        assert_eq!(found(&model, When::Crash(70)), [b, c, d]);
    }

    #[test]
    fn wrong_bytes_are_named() {
        let mut model = Model::new(&[0, 0], 1);
        let a = model.begin(write(0, 2, 10));
        model.end(a, 11, true);
        let allowed = model.allowed(When::Crash(20));
        let judge = |bytes: &[u8]| model.judge(&allowed, bytes).unwrap_err();
        let good = Model::bytes(a, 0, 2);
        model.judge(&allowed, &good).unwrap();
        let mut swapped = good.clone();
        swapped.rotate_left(512);
        assert!(judge(&swapped).contains("another cluster's"));
        let mut torn = good.clone();
        torn[8] ^= 1;
        assert!(judge(&torn).contains("torn"));
        assert!(judge(&Model::bytes(9, 0, 2)).contains("nobody wrote"));
        assert!(judge(&good[..512]).contains("bytes"));
    }

    #[test]
    fn a_size_is_the_old_one_or_the_new_one() {
        let mut model = Model::new(&[0, 0], 1);
        model.resized(10, 20, 2048, true);
        let sizes = |at| model.allowed(When::Crash(at)).sizes;
        assert_eq!(sizes(5), [1024]);
        assert_eq!(sizes(15), [1024, 2048]);
        assert_eq!(sizes(25), [2048]);
    }
}
