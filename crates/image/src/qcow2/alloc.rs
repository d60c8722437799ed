//! Free host clusters: runs that are known to be free, those found by a scan of the refcounts,
//! and space reserved behind the end of the file.
//!
//! Refcounts of free runs stay 0 until a commit uses them (or `ahead` counts a few), so a crash leaks little that was
//! only reserved. The same 0 means that a scan could find such clusters a second time: it leaves
//! out what lies in a run, in an allocation in flight, or in space freed but not yet released.

use super::Qcow2;
use super::cache::KEY_RESERVE;
use super::header::HOST_OFFSET_END;
use super::state::{Ask, Halt, State};
use crate::{FileId, Freed, Key, Need, Reserve};
use block::{Error, ErrorKind, HostOffset};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// Runs that are remembered; more is left for a later scan to find.
const RUNS_MAX: usize = 4096;
/// Pieces of freed and unreleased space that are told apart; more ends scanning.
const QUARANTINE_MAX: usize = 65536;
/// Runs looked at for one that is long enough.
const LOOK: usize = 16;
/// Slices of refcounts scanned before the file is grown instead.
const SCAN_PER_GROWTH: u32 = 8;
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

/// Clusters taken for use. Their refcounts are in `frame`: 0, or 1 where they were counted ahead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) first: u64,
    pub(super) count: u64,
    pub(super) zeroed: bool,
    /// Their refcounts are 1, and these and the zeros are durable.
    pub(super) counted: bool,
    pub(super) frame: u32,
}

#[derive(Debug)]
pub(super) struct Space {
    /// Sorted by place, never touching unless `zeroed` differs.
    runs: Vec<Run>,
    /// The run that was taken from last.
    current: usize,
    /// First cluster behind everything known.
    pub(super) end: u64,
    reserving: Option<Reserve>,
    /// Clusters in `runs`.
    free: u64,
    /// Fewer free clusters than this, and more are reserved before they are lacking. 0 after a
    /// failure, until somebody needs them.
    low: u64,
    /// Bytes to reserve at once.
    grow: u64,
    grow_max: u64,
    /// The host refused a reservation: no more is asked for than is lacking, until it gives that.
    scarce: bool,
    /// Next cluster to scan, and where scanning ends.
    scan: u64,
    scan_end: u64,
    scan_budget: u32,
    /// Scan everything before growing: a block device, which has its free space inside.
    scan_first: bool,
    /// Runs were dropped: another scan would find something.
    dropped: bool,
    quarantine: BTreeMap<u64, u64>,
    no_scan: bool,
    /// Freed durably, not fetched by the disk layer yet.
    freed: Vec<(u64, u64)>,
}

impl Space {
    /// For a file of `end` clusters that holds a disk of `size` bytes. `scan_first`: see the field.
    pub(super) fn new(end: u64, size: u64, scan_first: bool) -> Self {
        let grow_max = (size / 16).clamp(GROW_MIN, GROW_MAX);
        Self {
            runs: Vec::with_capacity(64),
            current: 0,
            end,
            reserving: None,
            free: 0,
            low: 0,
            grow: GROW_START.min(grow_max),
            grow_max,
            scarce: false,
            scan: 0,
            scan_end: end,
            scan_budget: SCAN_PER_GROWTH,
            scan_first,
            dropped: false,
            quarantine: BTreeMap::new(),
            no_scan: false,
            freed: Vec::new(),
        }
    }

    /// Adds free clusters.
    pub(super) fn add(&mut self, run: Run) {
        if run.count == 0 {
            return;
        }
        self.free += run.count;
        let at = self.runs.partition_point(|r| r.first < run.first);
        if let Some(before) = at.checked_sub(1).and_then(|i| self.runs.get_mut(i))
            && before.first + before.count == run.first
            && before.zeroed == run.zeroed
        {
            before.count += run.count;
            let end = before.first + before.count;
            if let Some(after) = self.runs.get(at).copied()
                && after.first == end
                && after.zeroed == run.zeroed
            {
                if let Some(before) = self.runs.get_mut(at - 1) {
                    before.count += after.count;
                }
                self.runs.remove(at);
            }
            return;
        }
        if let Some(after) = self.runs.get_mut(at)
            && run.first + run.count == after.first
            && after.zeroed == run.zeroed
        {
            after.first = run.first;
            after.count += run.count;
            return;
        }
        if self.runs.len() >= RUNS_MAX {
            self.dropped = true;
            self.free -= run.count;
            return;
        }
        self.runs.insert(at, run);
        if at <= self.current && self.runs.len() > 1 {
            self.current += 1;
        }
    }

    /// Index of a run with `want` clusters, or of another one.
    fn pick(&mut self, want: u64) -> Option<usize> {
        let n = self.runs.len();
        if n == 0 {
            return None;
        }
        self.current %= n;
        for i in (0..n.min(LOOK)).map(|i| (self.current + i) % n) {
            if self.runs.get(i).is_some_and(|r| r.count >= want) {
                self.current = i;
                break;
            }
        }
        Some(self.current)
    }

    /// The free runs, by place.
    pub(super) fn runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter()
    }

    /// Takes the first `count` clusters of the run that begins with cluster `first`.
    pub(super) fn take(&mut self, first: u64, count: u64) {
        if let Ok(index) = self.runs.binary_search_by_key(&first, |r| r.first) {
            self.cut(index, count);
        }
    }

    /// Drops the first `count` clusters of run `index`.
    fn cut(&mut self, index: usize, count: u64) {
        if let Some(run) = self.runs.get_mut(index) {
            let count = count.min(run.count);
            self.free -= count;
            run.first += count;
            run.count -= count;
            if run.count == 0 {
                self.runs.remove(index);
            }
        }
    }

    /// Notes that `cluster`'s refcount became 0 durably enough to be handed out by `take_freed`.
    pub(super) fn freed(&mut self, cluster: u64) {
        match self.freed.last_mut() {
            Some((first, count)) if *first + *count == cluster => *count += 1,
            _ => self.freed.push((cluster, 1)),
        }
        match self.quarantine.range_mut(..=cluster).next_back() {
            Some((first, count)) if *first + *count == cluster => *count += 1,
            _ => {
                self.quarantine.insert(cluster, 1);
            }
        }
        if self.quarantine.len() > QUARANTINE_MAX {
            // Without it a scan would hand out space that is still read.
            self.no_scan = true;
            self.quarantine.clear();
        }
    }

    fn leave_quarantine(&mut self, first: u64, count: u64) {
        let end = first + count;
        while let Some((start, len)) = self
            .quarantine
            .range(..end)
            .next_back()
            .map(|(s, l)| (*s, *l))
            .filter(|(start, len)| start + len > first)
        {
            self.quarantine.remove(&start);
            if start < first {
                self.quarantine.insert(start, first - start);
            }
            if start + len > end {
                self.quarantine.insert(end, start + len - end);
            }
        }
    }

    fn scanning(&self) -> bool {
        !self.no_scan && self.scan < self.scan_end
    }

    /// Whether more should be reserved before it is lacking.
    fn is_low(&self) -> bool {
        self.free < self.low && self.reserving.is_none() && !self.scanning()
    }
}

impl Qcow2 {
    /// Takes up to `want` contiguous free clusters, at least one. They lie in one slice of refcounts,
    /// which is in memory. Whoever takes them uses them or gives them back.
    pub(super) fn alloc(&self, st: &mut State, want: u64) -> Ask<Piece> {
        let piece = match self.take_ahead(st, want) {
            Some(piece) => piece,
            None => self.alloc_run(st, want)?,
        };
        st.ahead.allocated(piece.count);
        if st.space.is_low() {
            self.ahead.store(true, Ordering::Relaxed);
        }
        Ok(piece)
    }

    fn alloc_run(&self, st: &mut State, want: u64) -> Ask<Piece> {
        loop {
            let Some(index) = st.space.pick(want) else {
                self.refill(st, want)?;
                continue;
            };
            let Some(run) = st.space.runs.get(index).copied() else {
                continue;
            };
            if !self.table_covers(st, run.first) {
                self.make_table_room(st, run.first)?;
                continue;
            }
            if st.places.holds(run.first) {
                // Only in an image whose refcounts are wrong.
                st.space.cut(index, 1);
                continue;
            }
            if !self.has_block(st, run.first) {
                self.make_block(st, run.first, run.zeroed)?;
                st.space.cut(index, 1);
                continue;
            }
            let frame = self.ref_frame(st, run.first)?;
            let slice_end =
                (self.ref_slice_of(run.first) + 1) << self.geometry.slice_refcount_bits();
            let most = want.min(run.count).min(slice_end - run.first);
            let count = (0..most)
                .take_while(|i| {
                    let cluster = run.first + i;
                    self.refcount(frame, cluster) == 0 && !st.places.holds(cluster)
                })
                .count() as u64;
            if count == 0 {
                st.space.cut(index, 1);
                continue;
            }
            st.space.cut(index, count);
            return Ok(Piece {
                first: run.first,
                count,
                zeroed: run.zeroed,
                counted: false,
                frame,
            });
        }
    }

    /// A free cluster that becomes metadata: its refcount is 1 from here on.
    pub(super) fn alloc_meta(&self, st: &mut State) -> Ask<Piece> {
        let piece = self.alloc(st, 1)?;
        // Neither written whole nor in part: no reason for or against zeros.
        st.ahead.wrote(self.geometry.cluster() / 2);
        if !piece.counted {
            self.set_refcount(st, piece.frame, piece.first, 1);
            st.ordered = true;
        }
        st.places.blocks.insert(piece.first);
        Ok(piece)
    }

    fn make_table_room(&self, st: &mut State, first: u64) -> Ask<()> {
        let plan = self.table_plan(st, first)?;
        let fits = |r: &Run| r.first >= first && r.count >= plan.1;
        let Some(index) = st.space.runs.iter().position(fits) else {
            return self.reserve(st, plan.1, plan.1);
        };
        let Some(run) = st.space.runs.get(index).copied() else {
            return Ok(());
        };
        let plan = self.table_plan(st, run.first)?;
        if run.count < plan.1 {
            return self.reserve(st, plan.1, plan.1);
        }
        let used = self.move_table(st, run.first, plan, run.zeroed)?;
        st.space.cut(index, used);
        Ok(())
    }

    /// Finds or reserves free space.
    fn refill(&self, st: &mut State, want: u64) -> Ask<()> {
        if !st.space.scanning() && st.space.dropped && !st.space.no_scan {
            st.space.dropped = false;
            st.space.scan = 0;
            st.space.scan_end = st.space.end;
        }
        while st.space.scanning() && (st.space.scan_first || st.space.scan_budget > 0) {
            if self.scan_slice(st)? {
                return Ok(());
            }
        }
        self.reserve(st, want, 1)
    }

    /// Scans one slice of refcounts. `true` when it found something.
    fn scan_slice(&self, st: &mut State) -> Ask<bool> {
        let g = &self.geometry;
        let first = st.space.scan;
        let unit = match self.has_block(st, first) {
            true => g.slice_refcount_bits(),
            false => g.block_refcount_bits(),
        };
        let end = (((first >> unit) + 1) << unit).min(st.space.scan_end);
        let frame = match self.has_block(st, first) {
            true => Some(self.ref_frame(st, first)?),
            false => None,
        };
        st.space.scan = end;
        st.space.scan_budget = st.space.scan_budget.saturating_sub(1);
        // What looks free but is not, in order.
        let mut taken: Vec<(u64, u64)> = match g.data_file {
            false => st.tickets.pending().map(|p| (p.host, p.clusters)).collect(),
            true => Vec::new(),
        };
        taken.extend(st.space.quarantine.range(..end).map(|(f, c)| (*f, *c)));
        taken.extend(st.space.runs.iter().map(|r| (r.first, r.count)));
        taken.retain(|(f, c)| *f < end && f + c > first);
        taken.sort_unstable();
        let mut taken = taken.into_iter().peekable();
        let mut found = false;
        let mut run = Run {
            first,
            count: 0,
            zeroed: false,
        };
        for cluster in first..end {
            while taken.next_if(|(f, c)| f + c <= cluster).is_some() {}
            let free = taken.peek().is_none_or(|(f, _)| *f > cluster)
                && frame.is_none_or(|frame| self.refcount(frame, cluster) == 0)
                && !st.places.holds(cluster);
            if free {
                if run.count == 0 {
                    run.first = cluster;
                }
                run.count += 1;
                found = true;
            } else if run.count > 0 {
                st.space.add(run);
                run.count = 0;
            }
        }
        st.space.add(run);
        Ok(found)
    }

    /// Has space behind the end reserved, for `clusters`, of which `least` help too: always halts.
    fn reserve(&self, st: &mut State, clusters: u64, least: u64) -> Ask<()> {
        match &st.space.reserving {
            Some(reserve) => Err(Halt::Wait(reserve.key)),
            None => Err(Halt::Need(Need::Reserve(
                self.start_reserve(st, clusters, least)?,
            ))),
        }
    }

    /// The reservation that should be made ahead of need, if any.
    pub(super) fn reserve_ahead(&self, st: &mut State) -> Option<Reserve> {
        match st.space.is_low() {
            // At the end of what a file can be there is nothing to foresee.
            true => self.start_reserve(st, 0, 1).ok(),
            false => None,
        }
    }

    fn start_reserve(&self, st: &mut State, clusters: u64, least: u64) -> Ask<Reserve> {
        let bits = self.geometry.cluster_bits;
        let count = (st.space.grow >> bits).max(match st.space.scarce {
            true => least,
            // One more for a refcount block, one for an L2 table.
            false => clusters + 2,
        });
        let limit = (HOST_OFFSET_END >> bits).saturating_sub(st.space.end);
        if count > limit {
            return Err(Halt::Fail(Error::new(
                ErrorKind::NoSpace,
                format!("{}: the file would pass 2^56 bytes", self.name),
            )));
        }
        let reserve = Reserve {
            key: Key(KEY_RESERVE),
            file: FileId::IMAGE,
            offset: HostOffset(st.space.end << bits),
            len: count << bits,
        };
        st.space.reserving = Some(reserve);
        st.space.scan_budget = SCAN_PER_GROWTH;
        Ok(reserve)
    }

    /// Ends the reservation under way. `None`: it failed.
    pub(super) fn end_reserve(&self, st: &mut State, reserve: &Reserve, zeroed: Option<bool>) {
        if st.space.reserving.as_ref() != Some(reserve) {
            return;
        }
        st.space.reserving = None;
        let Some(zeroed) = zeroed else {
            st.space.low = 0;
            // Whoever needs it asks for less, down to what is lacking.
            st.space.grow = reserve.len / 2;
            st.space.scarce = true;
            // There may be space inside that no scan has seen yet.
            st.space.scan_first = true;
            return;
        };
        let count = reserve.len >> self.geometry.cluster_bits;
        let first = st.space.end;
        st.space.end += count;
        // Enough for the time that a reservation takes; not so much that small images grow for nothing.
        st.space.low = count / 4;
        st.space.grow = (reserve.len * 2).min(st.space.grow_max);
        st.space.scarce = false;
        st.space.add(Run {
            first,
            count,
            zeroed,
        });
    }

    /// Hands out what was freed since the last call.
    pub(super) fn fetch_freed(&self, st: &mut State, out: &mut Vec<Freed>) {
        let bits = self.geometry.cluster_bits;
        out.extend(st.space.freed.drain(..).map(|(first, count)| Freed {
            file: FileId::IMAGE,
            offset: HostOffset(first << bits),
            len: count << bits,
        }));
    }

    /// Makes freed space free.
    pub(super) fn end_freed(&self, st: &mut State, freed: &Freed, zeroed: bool) {
        let bits = self.geometry.cluster_bits;
        let (first, count) = (freed.offset.0 >> bits, freed.len >> bits);
        st.space.leave_quarantine(first, count);
        st.space.add(Run {
            first,
            count,
            zeroed,
        });
    }

    /// Forgets free runs from cluster `end` on: the file is cut there.
    pub(super) fn forget_behind(&self, st: &mut State, end: u64) {
        st.space.runs.retain_mut(|run| {
            run.count = run.count.min(end.saturating_sub(run.first));
            run.count > 0
        });
        st.space.free = st.space.runs.iter().map(|r| r.count).sum();
        st.space.end = st.space.end.min(end);
    }
}
