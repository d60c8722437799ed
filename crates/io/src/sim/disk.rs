//! A disk in memory that can misbehave and crash.

use crate::Alignment;
use block::{Context, Error, Range, RangeKind, Result, Storage, Zeroed};
use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

const PAGE: u64 = 4096;
/// What a disk writes whole or not at all, in bytes.
const SECTOR: u64 = 512;

/// How a [`SimDisk`] behaves.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// What messages call it.
    pub label: String,
    /// Decides on delays, order and probabilities. A test prints it when it fails.
    pub seed: u64,
    /// Bytes at the beginning.
    pub size: u64,
    /// What it demands of the engine, as under `O_DIRECT`.
    pub alignment: Alignment,
    /// Shortest and longest time of an operation in virtual nanoseconds.
    pub delay_ns: (u64, u64),
    /// Bytes that it can grow to; a write behind fails with `ENOSPC`.
    pub size_max: u64,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            label: "sim".to_owned(),
            seed: 0,
            size: 0,
            alignment: Alignment::NONE,
            delay_ns: (10_000, 1_000_000),
            size_max: 1 << 50,
        }
    }
}

/// Which operations a [`Fault`] hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOp {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Syncs.
    Sync,
    /// Discards, zeroings and allocations.
    Range,
    /// All.
    Any,
}

/// An error to inject.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Operations to hit.
    pub op: FaultOp,
    /// Hit only those that touch these bytes. `0..u64::MAX` for all (and for syncs).
    pub bytes: std::ops::Range<u64>,
    /// What they fail with.
    pub errno: i32,
    /// Matching operations to let pass first.
    pub skip: u64,
    /// Matching operations to fail after that.
    pub count: u64,
    /// Of those, how many in a thousand really fail.
    pub per_mille: u32,
}

impl Fault {
    /// Fails every `op` with `errno`; narrow it with struct update syntax.
    pub fn always(op: FaultOp, errno: i32) -> Self {
        Self {
            op,
            bytes: 0..u64::MAX,
            errno,
            skip: 0,
            count: u64::MAX,
            per_mille: 1000,
        }
    }
}

/// What changed the disk, in the order in which it took effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogEntry {
    /// Bytes were written.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// A range became zeros (zeroing or discard).
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The size changed.
    Resize {
        /// New size in bytes.
        len: u64,
    },
    /// A sync ended: the first `covers` entries of the log survive any crash from here on.
    Sync {
        /// How many entries there were when the sync was submitted.
        covers: usize,
    },
}

#[derive(Clone, Default)]
struct Content {
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
    size: u64,
}

impl Content {
    fn each(offset: u64, len: usize, mut f: impl FnMut(u64, usize, usize, usize)) {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let n = (len - done).min(PAGE as usize - within);
            f(at / PAGE, within, done, n);
            done += n;
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let n = (self.size.saturating_sub(offset)).min(buf.len() as u64) as usize;
        Self::each(offset, n, |page, within, done, n| {
            match self.pages.get(&page) {
                Some(bytes) => buf[done..done + n].copy_from_slice(&bytes[within..within + n]),
                None => buf[done..done + n].fill(0),
            }
        });
        n
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        Self::each(offset, data.len(), |page, within, done, n| {
            let bytes = self
                .pages
                .entry(page)
                .or_insert_with(|| Box::new([0; PAGE as usize]));
            bytes[within..within + n].copy_from_slice(&data[done..done + n]);
        });
        self.size = self.size.max(offset + data.len() as u64);
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let touched: Vec<u64> = self
            .pages
            .range(offset / PAGE..end.div_ceil(PAGE))
            .map(|(page, _)| *page)
            .collect();
        for page in touched {
            let start = page * PAGE;
            if offset <= start && start + PAGE <= end {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                let from = offset.saturating_sub(start) as usize;
                let to = (end - start).min(PAGE) as usize;
                bytes[from..to].fill(0);
            }
        }
    }

    fn resize(&mut self, len: u64) {
        if len < self.size {
            self.zero(len, self.size - len);
        }
        self.size = len;
    }

    fn apply(&mut self, entry: &LogEntry) {
        match entry {
            LogEntry::Write { offset, data } => self.write(*offset, data),
            LogEntry::Zero { offset, len } => self.zero(*offset, *len),
            LogEntry::Resize { len } => self.resize(*len),
            LogEntry::Sync { .. } => {}
        }
    }
}

struct State {
    start: Content,
    now: Content,
    log: Vec<LogEntry>,
    faults: Vec<Fault>,
    rng: Rng,
}

/// A disk in memory for tests: seeded delays and order, injected errors, and crashes that keep, drop,
/// tear and reorder what was not synced.
///
/// Everything that changes it goes to a log ([`SimDisk::log`]). [`SimDisk::crash_at`] makes the disk
/// that a machine could find after losing power when the log had so many entries: all that a
/// finished sync covers, and of the rest any part. A test enumerates all steps, or all
/// steps times some seeds.
///
/// Attach it to the `sim` engine as [`crate::File::sim`]. It is a [`Storage`] too.
pub struct SimDisk {
    options: SimOptions,
    state: Mutex<State>,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimDisk({})", self.options.label)
    }
}

impl SimDisk {
    /// An empty (all zeros) disk.
    pub fn new(options: SimOptions) -> Arc<Self> {
        let content = Content {
            size: options.size,
            ..Content::default()
        };
        Self::with(options, content)
    }

    /// A disk that holds `bytes`; its size is theirs.
    pub fn from_bytes(options: SimOptions, bytes: &[u8]) -> Arc<Self> {
        let mut content = Content::default();
        content.write(0, bytes);
        Self::with(options, content)
    }

    fn with(options: SimOptions, content: Content) -> Arc<Self> {
        let rng = Rng::new(options.seed);
        Arc::new(Self {
            state: Mutex::new(State {
                start: content.clone(),
                now: content,
                log: Vec::new(),
                faults: Vec::new(),
                rng,
            }),
            options,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn label(&self) -> &str {
        &self.options.label
    }

    pub(crate) fn alignment(&self) -> Alignment {
        self.options.alignment
    }

    pub(crate) fn seed(&self) -> u64 {
        self.options.seed
    }

    pub(crate) fn delay_ns(&self) -> (u64, u64) {
        self.options.delay_ns
    }

    /// Injects errors from now on. The first fault that matches an operation decides.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Everything that changed the disk so far.
    pub fn log(&self) -> Vec<LogEntry> {
        self.state().log.clone()
    }

    /// How many entries the log has.
    pub fn log_len(&self) -> usize {
        self.state().log.len()
    }

    /// A disk as found after a crash now; see [`SimDisk::crash_at`].
    pub fn crash(&self, seed: u64) -> Arc<SimDisk> {
        self.crash_at(usize::MAX, seed)
    }

    /// A disk as found after a crash when the log had `position` entries (or all, if it has fewer).
    /// What a finished sync covers is there. Each later entry is kept, dropped or, if it is a write
    /// or zeroing of several sectors of 512 bytes, torn; what is kept took effect in
    /// any order, but a resize is never reordered.
    pub fn crash_at(&self, position: usize, seed: u64) -> Arc<SimDisk> {
        let state = self.state();
        let log = &state.log[..position.min(state.log.len())];
        let durable = log
            .iter()
            .filter_map(|e| match e {
                LogEntry::Sync { covers } => Some(*covers),
                _ => None,
            })
            .max()
            .unwrap_or(0);
        let mut content = state.start.clone();
        for entry in &log[..durable] {
            content.apply(entry);
        }
        let mut rng = Rng::new(seed);
        let mut open: Vec<LogEntry> = Vec::new();
        let mut floating = 0;
        for entry in &log[durable..] {
            match entry {
                LogEntry::Sync { .. } => {}
                LogEntry::Resize { .. } => {
                    if rng.below(4) == 0 {
                        // Lost, and with it nothing else: a write behind the end grows the file itself.
                        continue;
                    }
                    floating = open.len() + 1;
                    open.push(entry.clone());
                }
                _ => {
                    let mut parts = Vec::new();
                    match rng.below(4) {
                        0 => {}
                        1 => tear(entry, &mut rng, &mut parts),
                        _ => parts.push(entry.clone()),
                    }
                    for part in parts {
                        let at = floating + rng.below((open.len() - floating + 1) as u64) as usize;
                        open.insert(at, part);
                    }
                }
            }
        }
        for entry in &open {
            content.apply(entry);
        }
        let options = SimOptions {
            label: format!("{} after a crash (seed {seed})", self.options.label),
            ..self.options.clone()
        };
        drop(state);
        Self::with(options, content)
    }

    fn fault(state: &mut State, op: FaultOp, offset: u64, len: u64) -> io::Result<()> {
        for i in 0..state.faults.len() {
            let fault = &mut state.faults[i];
            let op_matches = fault.op == op || fault.op == FaultOp::Any;
            let touches = op == FaultOp::Sync
                || (offset < fault.bytes.end && offset.saturating_add(len) > fault.bytes.start);
            if !op_matches || !touches {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            if fault.count == 0 {
                continue;
            }
            fault.count -= 1;
            let (per_mille, errno) = (fault.per_mille, fault.errno);
            if state.rng.below(1000) < u64::from(per_mille) {
                return Err(io::Error::from_raw_os_error(errno));
            }
        }
        Ok(())
    }

    fn room(&self, offset: u64, len: u64) -> io::Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= self.options.size_max => Ok(end),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.state().now.size
    }

    pub(crate) fn read_up_to(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state();
        Self::fault(&mut state, FaultOp::Read, offset, buf.len() as u64)?;
        Ok(state.now.read(offset, buf))
    }

    pub(crate) fn write_all(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        Self::fault(&mut state, FaultOp::Write, offset, buf.len() as u64)?;
        self.room(offset, buf.len() as u64)?;
        state.now.write(offset, buf);
        state.log.push(LogEntry::Write {
            offset,
            data: buf.to_vec(),
        });
        Ok(())
    }

    pub(crate) fn sync_data(&self) -> io::Result<()> {
        let covers = self.log_len();
        self.sync_covering(covers)
    }

    /// A sync that was submitted when the log had `covers` entries ends.
    pub(crate) fn sync_covering(&self, covers: usize) -> io::Result<()> {
        let mut state = self.state();
        Self::fault(&mut state, FaultOp::Sync, 0, 0)?;
        state.log.push(LogEntry::Sync { covers });
        Ok(())
    }

    fn grow(state: &mut State, end: u64) {
        if end > state.now.size {
            state.now.resize(end);
            state.log.push(LogEntry::Resize { len: end });
        }
    }

    pub(crate) fn zero_range(&self, offset: u64, len: u64, grow: bool) -> io::Result<()> {
        let mut state = self.state();
        Self::fault(&mut state, FaultOp::Range, offset, len)?;
        let end = self.room(offset, len)?;
        state.now.zero(offset, len);
        state.log.push(LogEntry::Zero { offset, len });
        if grow {
            Self::grow(&mut state, end);
        }
        Ok(())
    }

    pub(crate) fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero_range(offset, len, false)
    }

    pub(crate) fn allocate_range(&self, offset: u64, len: u64) -> io::Result<bool> {
        let mut state = self.state();
        Self::fault(&mut state, FaultOp::Range, offset, len)?;
        let end = self.room(offset, len)?;
        Self::grow(&mut state, end);
        Ok(true)
    }

    pub(crate) fn resize(&self, len: u64) -> io::Result<()> {
        self.room(0, len)?;
        let mut state = self.state();
        state.now.resize(len);
        state.log.push(LogEntry::Resize { len });
        Ok(())
    }

    pub(crate) fn sparse_run(&self, offset: u64, len: u64) -> (u64, bool) {
        let state = self.state();
        let there = |page: u64| state.now.pages.contains_key(&page);
        let first = offset / PAGE;
        let data = there(first);
        let end = if data {
            (first..).find(|p| !there(*p)).unwrap_or(first + 1) * PAGE
        } else {
            state
                .now
                .pages
                .range(first..)
                .next()
                .map_or(len, |(page, _)| page * PAGE)
        };
        (end.min(len), data)
    }
}

/// Some of the sectors of an entry, each as an entry of its own.
fn tear(entry: &LogEntry, rng: &mut Rng, out: &mut Vec<LogEntry>) {
    let (start, len) = match entry {
        LogEntry::Write { offset, data } => (*offset, data.len() as u64),
        LogEntry::Zero { offset, len } => (*offset, *len),
        _ => return,
    };
    let mut at = 0;
    while at < len {
        // Large zeroings are torn in larger pieces, so that this ends.
        let unit = if len > 1 << 20 { len / 64 } else { 1 };
        let n = (SECTOR - (start + at) % SECTOR).max(unit).min(len - at);
        if rng.below(2) == 0 {
            out.push(match entry {
                LogEntry::Write { data, .. } => LogEntry::Write {
                    offset: start + at,
                    data: data[at as usize..(at + n) as usize].to_vec(),
                },
                _ => LogEntry::Zero {
                    offset: start + at,
                    len: n,
                },
            });
        }
        at += n;
    }
}

impl Storage for SimDisk {
    fn name(&self) -> String {
        self.options.label.clone()
    }

    fn len(&self) -> Result<u64> {
        Ok(self.size())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let got = self
            .read_up_to(offset, buf)
            .context(|| format!("{}: reading at byte {offset}", self.options.label))?;
        if got < buf.len() {
            return Err(Error::corrupt(format!(
                "{}: reading {} bytes at byte {offset}: the file ends at byte {}",
                self.options.label,
                buf.len(),
                self.size()
            )));
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_all(offset, buf)
            .context(|| format!("{}: writing at byte {offset}", self.options.label))
    }

    fn sync(&self) -> Result<()> {
        self.sync_data()
            .context(|| format!("{}: syncing", self.options.label))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.resize(len)
            .context(|| format!("{}: resizing", self.options.label))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroed> {
        self.allocate_range(offset, len)
            .context(|| format!("{}: allocating at byte {offset}", self.options.label))?;
        Ok(Zeroed::Yes)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<()> {
        let len = len.min(self.size().saturating_sub(offset));
        self.zero_range(offset, len, false)
            .context(|| format!("{}: zeroing at byte {offset}", self.options.label))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.discard_range(offset, len)
            .context(|| format!("{}: discarding at byte {offset}", self.options.label))
    }

    fn range_at(&self, offset: u64) -> Result<Option<Range>> {
        let len = self.size();
        if offset >= len {
            return Ok(None);
        }
        let (end, data) = self.sparse_run(offset, len);
        Ok(Some(Range {
            offset,
            len: end - offset,
            kind: if data {
                RangeKind::Data
            } else {
                RangeKind::Hole
            },
        }))
    }
}

/// SplitMix64: small, seeded, the same everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n` (at least 1).
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(size: u64) -> Arc<SimDisk> {
        SimDisk::new(SimOptions {
            size,
            ..SimOptions::default()
        })
    }

    fn read(disk: &SimDisk, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xee; len];
        disk.read_at(offset, &mut buf).unwrap();
        buf
    }

    #[test]
    fn reads_what_was_written() {
        let d = disk(10_000);
        d.write_at(4090, &[7; 20]).unwrap();
        assert_eq!(read(&d, 4089, 22)[..2], [0, 7]);
        assert_eq!(d.range_at(0).unwrap().unwrap().kind, RangeKind::Data);
        assert_eq!(
            d.range_at(8192).unwrap().unwrap(),
            Range {
                offset: 8192,
                len: 1808,
                kind: RangeKind::Hole
            }
        );
        d.write_zeroes(4095, 5, true).unwrap();
        assert_eq!(read(&d, 4094, 8), [7, 0, 0, 0, 0, 0, 7, 7]);
        assert!(d.read_at(9999, &mut [0; 2]).is_err());
        d.set_len(4092).unwrap();
        d.set_len(8192).unwrap();
        assert_eq!(read(&d, 4091, 2), [7, 0], "bytes behind the end are gone");
    }

    #[test]
    fn a_crash_keeps_what_was_synced_and_only_that_for_sure() {
        let d = disk(1 << 20);
        d.write_at(0, &[1; 4096]).unwrap();
        d.sync().unwrap();
        d.write_at(0, &[2; 4096]).unwrap();
        d.write_at(8192, &[3; 512]).unwrap();
        let (mut old, mut new, mut torn, mut second_alone) = (0, 0, 0, 0);
        for seed in 0..200 {
            let after = d.crash(seed);
            let bytes = read(&after, 0, 4096);
            assert!(bytes.iter().all(|b| *b == 1 || *b == 2));
            assert!(bytes.chunks(512).all(|s| s.iter().all(|b| *b == s[0])));
            let ones = bytes.iter().filter(|b| **b == 1).count();
            match ones {
                4096 => {
                    old += 1;
                    second_alone += usize::from(read(&after, 8192, 1) == [3]);
                }
                0 => new += 1,
                _ => torn += 1,
            }
        }
        assert!(
            old > 0 && new > 0 && torn > 0 && second_alone > 0,
            "{old} {new} {torn}"
        );
        // Before the sync nothing is certain, not even the first write.
        assert!((0..50).any(|seed| read(&d.crash_at(1, seed), 0, 1) == [0]));
        assert!((0..50).all(|seed| read(&d.crash_at(2, seed), 0, 1) == [1]));
    }

    #[test]
    fn faults_hit_what_they_name() {
        let d = disk(1 << 20);
        d.inject(Fault {
            bytes: 4096..8192,
            skip: 1,
            count: 2,
            ..Fault::always(FaultOp::Write, libc::EIO)
        });
        let outcome = |offset| d.write_at(offset, &[0; 512]).is_ok();
        assert!(outcome(0) && outcome(4096) && !outcome(4096));
        assert!(outcome(8192) && !outcome(8191) && outcome(4096));
        d.inject(Fault::always(FaultOp::Sync, libc::EIO));
        assert!(d.sync().is_err());
        d.heal();
        assert!(d.sync().is_ok());
    }
}
