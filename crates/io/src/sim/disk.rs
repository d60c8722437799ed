//! A disk in memory that can misbehave and crash.

use super::content::Content;
use super::fault::{Fault, FaultOp};
use super::log::{Change, LogEntry, SimClock};
use super::outage::{self, Outage};
use super::rng::Rng;
use crate::Alignment;
use block::{Context, Error, Range, RangeKind, Result, Storage, Zeroed};
use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

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
    /// Operations take that time by the clock, too: at least.
    pub real_time: bool,
    /// Bytes that it can grow to; a write behind fails with `ENOSPC`.
    pub size_max: u64,
    /// Numbers its events; shared by the disks of one machine.
    pub clock: SimClock,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            label: "sim".to_owned(),
            seed: 0,
            size: 0,
            alignment: Alignment::NONE,
            delay_ns: (10_000, 1_000_000),
            real_time: false,
            size_max: 1 << 50,
            clock: SimClock::default(),
        }
    }
}

struct State {
    start: Content,
    now: Content,
    log: Vec<LogEntry>,
    faults: Vec<Fault>,
    faulted: bool,
    rng: Rng,
}

/// A disk in memory for tests: seeded delays and order, injected errors, and crashes that keep, drop,
/// tear and reorder what was not synced.
///
/// Everything that changes it goes to a log ([`SimDisk::log`]). [`SimDisk::outage`] says what a
/// machine could find after losing power at any moment of it.
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
        let mut content = Content::default();
        content.resize(options.size);
        Self::with(options, content)
    }

    /// A disk that holds `bytes`; its size is theirs.
    pub fn from_bytes(options: SimOptions, bytes: &[u8]) -> Arc<Self> {
        let mut content = Content::default();
        content.write(0, bytes);
        Self::with(options, content)
    }

    pub(super) fn with(options: SimOptions, content: Content) -> Arc<Self> {
        let rng = Rng::new(options.seed);
        Arc::new(Self {
            state: Mutex::new(State {
                start: content.clone(),
                now: content,
                log: Vec::new(),
                faults: Vec::new(),
                faulted: false,
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

    pub(crate) fn real_time(&self) -> bool {
        self.options.real_time
    }

    pub(crate) fn delay_ns(&self) -> (u64, u64) {
        self.options.delay_ns
    }

    /// Injects errors from now on. The first fault that matches an operation decides.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Whether a fault has hit an operation.
    pub fn faulted(&self) -> bool {
        self.state().faulted
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

    /// Numbers its events.
    pub fn clock(&self) -> &SimClock {
        &self.options.clock
    }

    /// The disk at event `at` of its clock, when the power fails: what had ended before the last sync that
    /// ended before `at` is there, of all else that had begun before, any part.
    pub fn outage(&self, at: u64) -> Outage {
        let state = self.state();
        Outage::new(self.options.clone(), state.start.clone(), &state.log, at)
    }

    /// The disk as it is now, as one that nothing has happened to.
    pub fn copy(&self) -> Arc<SimDisk> {
        Self::with(self.options.clone(), self.state().now.clone())
    }

    /// All its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let state = self.state();
        let mut bytes = vec![0; state.now.size as usize];
        state.now.read(0, &mut bytes);
        bytes
    }

    /// An error for an operation, if one is due; of a torn one some sectors take effect. Otherwise whether
    /// to carry it out.
    fn fault(
        &self,
        state: &mut State,
        op: FaultOp,
        (offset, len): (u64, u64),
        change: impl FnOnce() -> Option<Change>,
        begun: u64,
    ) -> io::Result<bool> {
        for i in 0..state.faults.len() {
            let fault = &mut state.faults[i];
            let op_matches = fault.op == op
                || fault.op == FaultOp::Any
                || fault.op == FaultOp::Change && op != FaultOp::Read;
            let everywhere = matches!(op, FaultOp::Sync | FaultOp::Resize);
            let touches = everywhere
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
            let Fault {
                per_mille,
                errno,
                torn,
                lie,
                ..
            } = *fault;
            if state.rng.below(1000) >= u64::from(per_mille) {
                continue;
            }
            state.faulted = true;
            if lie {
                return Ok(false);
            }
            if let Some(change) = change().filter(|_| torn) {
                let State { now, log, rng, .. } = state;
                let mut parts = Vec::new();
                outage::split(&change, |part| {
                    if rng.below(2) == 0 {
                        parts.push(part);
                    }
                });
                for change in parts {
                    outage::apply(now, &change);
                    log.push(self.entry(begun, change));
                }
            }
            return Err(io::Error::from_raw_os_error(errno));
        }
        Ok(true)
    }

    fn entry(&self, begun: u64, change: Change) -> LogEntry {
        LogEntry {
            begun,
            ended: self.options.clock.tick(),
            change,
        }
    }

    /// Makes a change.
    fn change(&self, state: &mut State, begun: u64, change: Change) {
        outage::apply(&mut state.now, &change);
        let entry = self.entry(begun, change);
        state.log.push(entry);
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
        let place = (offset, buf.len() as u64);
        self.fault(&mut state, FaultOp::Read, place, || None, 0)?;
        Ok(state.now.read(offset, buf))
    }

    // What changes the disk takes the event at which it began.

    pub(crate) fn write_all(&self, offset: u64, buf: &[u8], begun: u64) -> io::Result<()> {
        let mut state = self.state();
        let change = || Change::Write {
            offset,
            data: buf.into(),
        };
        let place = (offset, buf.len() as u64);
        if !self.fault(&mut state, FaultOp::Write, place, || Some(change()), begun)? {
            return Ok(());
        }
        self.room(offset, buf.len() as u64)?;
        self.change(&mut state, begun, change());
        Ok(())
    }

    /// A sync that began at `begun` ends.
    pub(crate) fn sync_data(&self, begun: u64) -> io::Result<()> {
        let mut state = self.state();
        let done = self.fault(&mut state, FaultOp::Sync, (0, 0), || None, begun);
        let change = match &done {
            Ok(true) => Change::Sync,
            Ok(false) => return Ok(()),
            Err(_) => Change::FailedSync,
        };
        self.change(&mut state, begun, change);
        done.map(|_| ())
    }

    fn grow(&self, state: &mut State, end: u64, begun: u64) {
        if end > state.now.size {
            self.change(state, begun, Change::Resize { len: end });
        }
    }

    pub(crate) fn zero_range(
        &self,
        offset: u64,
        len: u64,
        grow: bool,
        begun: u64,
    ) -> io::Result<()> {
        let mut state = self.state();
        let change = || Change::Zero { offset, len };
        let place = (offset, len);
        if !self.fault(&mut state, FaultOp::Range, place, || Some(change()), begun)? {
            return Ok(());
        }
        let end = self.room(offset, len)?;
        self.change(&mut state, begun, change());
        if grow {
            self.grow(&mut state, end, begun);
        }
        Ok(())
    }

    pub(crate) fn discard_range(&self, offset: u64, len: u64, begun: u64) -> io::Result<()> {
        self.zero_range(offset, len, false, begun)
    }

    pub(crate) fn allocate_range(&self, offset: u64, len: u64, begun: u64) -> io::Result<bool> {
        let mut state = self.state();
        if !self.fault(&mut state, FaultOp::Range, (offset, len), || None, begun)? {
            return Ok(true);
        }
        let end = self.room(offset, len)?;
        self.grow(&mut state, end, begun);
        Ok(true)
    }

    pub(crate) fn resize(&self, len: u64, begun: u64) -> io::Result<()> {
        let mut state = self.state();
        if !self.fault(&mut state, FaultOp::Resize, (0, len), || None, begun)? {
            return Ok(());
        }
        self.room(0, len)?;
        self.change(&mut state, begun, Change::Resize { len });
        Ok(())
    }

    pub(crate) fn sparse_run(&self, offset: u64, len: u64) -> (u64, bool) {
        self.state().now.sparse_run(offset, len)
    }

    pub(crate) fn begin(&self) -> u64 {
        self.options.clock.tick()
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
        self.write_all(offset, buf, self.begin())
            .context(|| format!("{}: writing at byte {offset}", self.options.label))
    }

    fn sync(&self) -> Result<()> {
        self.sync_data(self.begin())
            .context(|| format!("{}: syncing", self.options.label))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.resize(len, self.begin())
            .context(|| format!("{}: resizing", self.options.label))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroed> {
        self.allocate_range(offset, len, self.begin())
            .context(|| format!("{}: allocating at byte {offset}", self.options.label))?;
        Ok(Zeroed::Yes)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<()> {
        let len = len.min(self.size().saturating_sub(offset));
        self.zero_range(offset, len, false, self.begin())
            .context(|| format!("{}: zeroing at byte {offset}", self.options.label))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.discard_range(offset, len, self.begin())
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

    #[test]
    fn a_torn_fault_leaves_some_sectors_that_no_sync_vouches_for_when_it_fails() {
        let d = disk(1 << 20);
        d.inject(Fault {
            torn: true,
            count: 1,
            ..Fault::always(FaultOp::Change, libc::EIO)
        });
        assert!(d.write_at(0, &[1; 1 << 15]).is_err());
        let bytes = read(&d, 0, 1 << 15);
        let ones = bytes.iter().filter(|b| **b == 1).count();
        assert!(ones > 0 && ones < 1 << 15 && ones % 512 == 0, "{ones}");
        d.write_at(1 << 16, &[2; 512]).unwrap();
        d.inject(Fault {
            count: 1,
            ..Fault::always(FaultOp::Sync, libc::EIO)
        });
        assert!(d.sync().is_err() && d.sync().is_ok());
        let outage = d.outage(u64::MAX);
        // Every sector of the first write, and the second write: lost for good perhaps.
        assert_eq!(outage.open().len(), ones / 512 + 1);
    }
}
