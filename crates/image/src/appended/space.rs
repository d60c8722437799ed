//! Free host clusters. The formats have no place to note them, so there are only those that were reserved behind
//! the end of the file since the image was opened, and not used.
//!
//! What a crash leaves of them is leaked: a clean close cuts it off.

use super::Appended;
use super::state::State;
use crate::metadata::{Ask, Halt, cache::KEY_RESERVE};
use crate::{Key, Need, Reserve};
use block::{Error, ErrorKind, HostOffset, size};
use std::sync::atomic::Ordering;

/// Runs looked at for one that is long enough.
const LOOK: usize = 16;
const GROW_START: u64 = 1 << 20;
const GROW_MAX: u64 = 256 << 20;
const GROW_MIN: u64 = 64 << 10;

/// Free host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
    /// They read as zeros.
    pub(super) zeroed: bool,
}

#[derive(Debug)]
pub(super) struct Space {
    /// Sorted by place. Never more than one, and one for each allocation that was given up.
    runs: Vec<Run>,
    /// First cluster behind the end of the file.
    pub(super) end: u64,
    /// First cluster of which nobody knows that the file has it durably.
    pub(super) durable: u64,
    reserving: Option<Reserve>,
    /// Clusters in `runs`.
    free: u64,
    /// Fewer free clusters than this, and more are reserved before they are lacking. 0 after a failure,
    /// until somebody needs them.
    low: u64,
    /// Bytes to reserve at once.
    grow: u64,
    grow_max: u64,
    /// The host refused a reservation: no more is asked for than is lacking, until it gives that.
    scarce: bool,
    /// New space does not read as zeros: there is no place for tables in it.
    unfit: bool,
}

impl Space {
    /// For a file of `end` clusters that holds a disk of `size` bytes.
    pub(super) fn new(end: u64, size: u64) -> Self {
        let grow_max = (size / 16).clamp(GROW_MIN, GROW_MAX);
        Self {
            runs: Vec::with_capacity(64),
            end,
            durable: end,
            reserving: None,
            free: 0,
            low: 0,
            grow: GROW_START.min(grow_max),
            grow_max,
            scarce: false,
            unfit: false,
        }
    }

    /// Adds free clusters.
    pub(super) fn add(&mut self, run: Run) {
        self.free += run.count;
        let at = self.runs.partition_point(|r| r.first < run.first);
        let touches = |a: &Run, b: &Run| a.first + a.count == b.first && a.zeroed == b.zeroed;
        let mut run = run;
        if let Some(after) = self.runs.get(at).copied()
            && touches(&run, &after)
        {
            run.count += after.count;
            self.runs.remove(at);
        }
        match at.checked_sub(1).and_then(|i| self.runs.get_mut(i)) {
            Some(before) if touches(before, &run) => before.count += run.count,
            _ => self.runs.insert(at, run),
        }
    }

    /// Takes the first `count` clusters of run `index`.
    fn cut(&mut self, index: usize, count: u64) -> Option<Run> {
        let run = self.runs.get_mut(index)?;
        let taken = Run { count, ..*run };
        run.first += count;
        run.count -= count;
        if run.count == 0 {
            self.runs.remove(index);
        }
        self.free -= count;
        Some(taken)
    }

    /// Up to `want` clusters, of the first run that has so many, or of the first.
    fn take(&mut self, want: u64) -> Option<Run> {
        let enough = self.runs.iter().take(LOOK).position(|r| r.count >= want);
        let index = enough.unwrap_or(0);
        let count = self.runs.get(index)?.count.min(want);
        self.cut(index, count)
    }

    /// Just `count` clusters that read as zeros.
    fn take_zeros(&mut self, count: u64) -> Option<Run> {
        let fits = |r: &Run| r.zeroed && r.count >= count;
        // The last run is the largest as a rule.
        let index = self.runs.iter().rposition(fits)?;
        self.cut(index, count)
    }

    /// Takes what is free at the end of the file away, and tells where the file ends then, in clusters.
    pub(super) fn cut_tail(&mut self) -> u64 {
        while let Some(last) = self.runs.pop_if(|r| r.first + r.count == self.end) {
            self.end = last.first;
            self.free -= last.count;
        }
        self.durable = self.durable.min(self.end);
        self.low = 0;
        self.end
    }

    fn is_low(&self) -> bool {
        self.free < self.low && self.reserving.is_none()
    }
}

impl Appended {
    /// Takes up to `want` free clusters that follow one another, at least one.
    pub(super) fn alloc(&self, st: &mut State, want: u64) -> Ask<Run> {
        let Some(run) = st.space.take(want) else {
            return Err(self.reserve(st, want, 1));
        };
        if st.space.is_low() {
            self.ahead.store(true, Ordering::Relaxed);
        }
        Ok(run)
    }

    /// Takes the place of a table, which reads as zeros.
    pub(super) fn alloc_table(&self, st: &mut State) -> Ask<Run> {
        let count = self.table_clusters;
        match st.space.take_zeros(count) {
            Some(run) => Ok(run),
            None if st.space.unfit => Err(Halt::Fail(Error::unsupported(format!(
                "{}: has no place for a table: new space of its file does not read as zeros",
                self.name
            )))),
            None => Err(self.reserve(st, count, count)),
        }
    }

    /// Has space behind the end reserved, for `clusters`, of which `least` help too.
    fn reserve(&self, st: &mut State, clusters: u64, least: u64) -> Halt {
        match &st.space.reserving {
            Some(reserve) => Halt::Wait(reserve.key),
            None => match self.start_reserve(st, clusters, least) {
                Ok(reserve) => Halt::Need(Need::Reserve(reserve)),
                Err(halt) => halt,
            },
        }
    }

    /// The reservation that should be made ahead of need, if any.
    pub(super) fn reserve_ahead(&self, st: &mut State) -> Option<Reserve> {
        match st.space.is_low() {
            // At the end of what a file can be there is nothing to foresee.
            true => self.start_reserve(st, 1, 1).ok(),
            false => None,
        }
    }

    fn start_reserve(&self, st: &mut State, clusters: u64, least: u64) -> Ask<Reserve> {
        let bits = self.layout.cluster_bits;
        let wanted = if st.space.scarce { least } else { clusters };
        let count = (st.space.grow >> bits).max(wanted);
        let room = (self.file_bytes_max >> bits).saturating_sub(st.space.end);
        if least > room {
            let most = size::human(self.file_bytes_max);
            return Err(Halt::Fail(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{}: the file would pass {most}, the most that its entries can say",
                    self.name
                ),
            )));
        }
        let count = count.min(room);
        let reserve = Reserve {
            key: Key(KEY_RESERVE),
            file: self.file,
            offset: HostOffset(st.space.end << bits),
            len: count << bits,
        };
        st.space.reserving = Some(reserve);
        Ok(reserve)
    }

    /// Ends the reservation under way. `None`: it failed.
    pub(super) fn end_reserve(&self, st: &mut State, reserve: &Reserve, zeroed: Option<bool>) {
        if st.space.reserving.as_ref() != Some(reserve) {
            return;
        }
        st.space.reserving = None;
        // Nobody may allocate any more, and the file's end is to stay where it is.
        let damaged = self.damaged.load(Ordering::Acquire);
        let Some(zeroed) = zeroed.filter(|_| !damaged) else {
            st.space.low = 0;
            // Whoever needs it asks for less, down to what is lacking.
            st.space.grow = reserve.len / 2;
            st.space.scarce = true;
            return;
        };
        let count = reserve.len >> self.layout.cluster_bits;
        let first = st.space.end;
        st.space.end += count;
        // Readers take what lies before it for sound: no entry refers there yet but those that never were sound.
        self.end
            .store(st.space.end << self.layout.cluster_bits, Ordering::Release);
        // Enough for the time that a reservation takes; not so much that small images grow for nothing.
        st.space.low = count / 4;
        st.space.grow = (reserve.len * 2).min(st.space.grow_max);
        st.space.scarce = false;
        st.space.unfit |= !zeroed;
        st.space.add(Run {
            first,
            count,
            zeroed,
        });
    }
}
