//! What each block of the disk must hold, and who is at it: one for all queues of a load.
//!
//! A block's sectors may read as any generation from `low` to `high`; both are the same unless a write failed, or the server
//! went away in between. What a crash must leave is at least what a flush has made durable:
//!
//! ```text
//!   write begins      high + 1
//!   write ends        low = high; it is covered by the flushes that begin from now on
//!   read ends         low = what it has seen, where that is more: the same
//!   before each       if a flush has covered low, it becomes `sure`
//!   flush ends        covers all writes that had ended when it began
//! ```

use super::stamp::{self, Found, SECTOR, Stamp};
use super::{Fault, Kind, state};
use crate::load::plan::Places;
use block::{Error, Result, size};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks at most: 20 bytes of memory each.
pub(super) const BLOCKS_MAX: u64 = 1 << 24;

/// What is known of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Block {
    /// Lowest generation that a read may find; 0: anything may be there.
    pub low: u32,
    /// Highest one, which is also the last that was given out.
    pub high: u32,
    /// Lowest one that may be there after a crash.
    pub sure: u32,
    /// Flushes that had begun when `low` was acknowledged: a later one covers it.
    pub acked: u32,
    /// A request is at it.
    pub busy: bool,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub blocks: Vec<Block>,
    places: Option<Places>,
    /// Where it is kept, and since the places are known, being kept.
    state: Option<state::State>,
    journal: Option<state::Journal>,
    /// Flushes that have begun, and the last one of those that ended well.
    begun: u32,
    durable: u32,
    /// There were writes.
    pub written: u64,
    pub checked: u64,
    pub unknown: u64,
    /// Wrong, stale and torn blocks.
    pub counts: [u64; 3],
    pub faults: Vec<Fault>,
}

/// The blocks of a disk.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// What tells this load's sectors from others'.
    run: u64,
    block: u64,
    inner: Mutex<Inner>,
}

impl Block {
    /// A flush has covered the lowest generation, the last of them being `durable`: it is known from now on whatever follows it.
    fn settle(&mut self, durable: u32) {
        if self.acked < durable {
            self.sure = self.low;
        }
    }

    /// No read may find less than `low` any more; flushes after number `begun` cover it.
    fn raise(&mut self, low: u32, begun: u32, durable: u32) {
        self.settle(durable);
        self.low = low;
        self.acked = begun;
    }
}

impl Inner {
    /// Block `n` has changed.
    fn keep(&self, n: u64) {
        if let Some(journal) = &self.journal {
            journal.set(n as usize, &self.blocks[n as usize]);
        }
    }
}

impl Ledger {
    /// Of blocks of `block` bytes; nothing is known of them, or what an earlier load has written down.
    pub(super) fn new(run: u64, block: u64) -> Self {
        Self {
            run,
            block,
            inner: Mutex::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what `state` says.
    pub(super) fn restore(&self, known: &state::Known) {
        let of = |(low, high): &(u32, u32)| Block {
            low: *low,
            high: *high,
            sure: *low,
            ..Block::default()
        };
        self.lock().blocks = known.generations.iter().map(of).collect();
    }

    /// Makes it that of a disk's places, once these are known.
    ///
    /// # Errors
    ///
    /// They are too many, fewer than there are requests at a time, or others than those of the state.
    pub(crate) fn prepare(&self, places: &Places, at_a_time: u64) -> Result<()> {
        let (count, mut inner) = (places.count(), self.lock());
        if count > BLOCKS_MAX {
            return Err(Error::invalid(format!(
                "--verify: {count} blocks of {} are too many to know, {BLOCKS_MAX} are allowed: lower --range or raise --bs",
                size::human(self.block)
            )));
        }
        if at_a_time > count {
            return Err(Error::invalid(format!(
                "--verify: there are {count} blocks for {at_a_time} requests at a time, of which no two may be at the same: \
                 lower --depth or --queues"
            )));
        }
        match inner.blocks.len() as u64 {
            0 => inner.blocks = vec![Block::default(); count as usize],
            known if known == count => {}
            known => {
                return Err(Error::invalid(format!(
                    "--state: it knows {known} blocks, the load has {count}: give the same --start, --range, --stride and --bs, \
                     and the same disk"
                )));
            }
        }
        inner.places = Some(*places);
        let inner = &mut *inner;
        if let (Some(state), None) = (&mut inner.state, &inner.journal) {
            inner.journal = Some(state.keep(self.run, &inner.blocks)?);
        }
        Ok(())
    }

    /// The blocks of which something is known.
    pub(super) fn known(&self) -> Vec<u64> {
        let inner = self.lock();
        let known = inner.blocks.iter().zip(0..);
        known
            .filter(|(block, _)| block.high > 0)
            .map(|(_, n)| n)
            .collect()
    }

    /// Lets nobody else have the block at `offset`, or the next one that nobody has: its number and offset, and the generation
    /// that a write gives it.
    pub(crate) fn take(&self, offset: u64, write: bool) -> Result<(u64, u64, u32)> {
        let mut inner = self.lock();
        let lost = || Error::invalid("--verify: a request outside of the places");
        let places = inner.places.ok_or_else(lost)?;
        let (wanted, durable) = (places.index_of(offset), inner.durable);
        let count = inner.blocks.len() as u64;
        let mut order = (0..count).map(|n| (wanted + n) % count);
        let free = order
            .find(|n| !inner.blocks[*n as usize].busy)
            .ok_or_else(lost)?;
        let block = &mut inner.blocks[free as usize];
        block.busy = true;
        if write {
            block.settle(durable);
            block.high = block.high.checked_add(1).ok_or_else(|| {
                Error::invalid("--verify: a block was written 2^32 times: begin with a new --state")
            })?;
        }
        let generation = block.high;
        if write {
            // Before the server can hear of it.
            inner.keep(free);
        }
        inner.written += u64::from(write);
        Ok((free, places.at(free), generation))
    }

    /// What a write of that generation carries.
    pub(crate) fn stamp(&self, offset: u64, generation: u32, block: &mut [u8]) {
        for (sector, at) in block.chunks_mut(SECTOR).zip((offset..).step_by(SECTOR)) {
            let stamp = Stamp {
                run: self.run,
                offset: at,
                generation,
            };
            stamp.put(sector);
        }
    }

    /// A write ended.
    pub(crate) fn wrote(&self, index: u64, ok: bool) {
        let mut inner = self.lock();
        let (begun, durable) = (inner.begun, inner.durable);
        let block = &mut inner.blocks[index as usize];
        block.busy = false;
        if ok {
            // A flush may have ended since the write began.
            block.raise(block.high, begun, durable);
            inner.keep(index);
        }
    }

    /// A read ended without data.
    pub(crate) fn let_go(&self, index: u64) {
        self.lock().blocks[index as usize].busy = false;
    }

    /// A flush begins; its number.
    pub(crate) fn flush(&self) -> u32 {
        let mut inner = self.lock();
        inner.begun += 1;
        inner.begun
    }

    /// It ended well.
    pub(crate) fn flushed(&self, number: u32) {
        let mut inner = self.lock();
        inner.durable = inner.durable.max(number);
        if let Some(journal) = &inner.journal {
            journal.durable(inner.durable);
        }
    }

    /// A read brought `data` of the block at `offset`.
    pub(crate) fn check(&self, index: u64, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        let (begun, durable) = (inner.begun, inner.durable);
        let block = &mut inner.blocks[index as usize];
        block.busy = false;
        let (verdict, oldest) = judge(self.run, *block, offset, data);
        if verdict.is_none() && oldest > block.low {
            // Nothing older may come back; but no flush that has begun is known to cover a write that nobody has answered.
            block.raise(oldest, begun, durable);
        }
        let unknown = block.high == 0;
        inner.keep(index);
        inner.checked += 1;
        inner.unknown += u64::from(unknown);
        if let Some(fault) = verdict {
            inner.counts[fault.kind as usize] += 1;
            if inner.faults.len() < super::FAULTS_MAX {
                inner.faults.push(fault);
            }
        }
    }

    /// Keeps what becomes of the blocks in a file, from when the places are known.
    pub(super) fn keep_in(&self, state: state::State) {
        self.lock().state = Some(state);
    }

    /// The load has come to its end, and has flushed what it wrote.
    ///
    /// # Errors
    ///
    /// The state cannot be written.
    pub(super) fn close(&self) -> Result<()> {
        self.lock()
            .journal
            .as_ref()
            .map_or(Ok(()), state::Journal::close)
    }
}

/// What is wrong with a block, and the oldest generation in it.
fn judge(run: u64, block: Block, offset: u64, data: &[u8]) -> (Option<Fault>, u32) {
    let (mut good, mut bad) = (0_u32, 0_u32);
    let mut first: Option<(bool, u64, Found)> = None;
    let mut oldest = u32::MAX;
    for (sector, at) in data.chunks(SECTOR).zip((offset..).step_by(SECTOR)) {
        let found = stamp::read(sector);
        let ours = match found {
            Found::Stamp(stamp) if stamp.run == run => Some(stamp),
            _ => None,
        };
        // Where nothing was written, all is right but what was written somewhere else.
        let fits = match ours {
            Some(stamp) => {
                oldest = oldest.min(stamp.generation);
                stamp.offset == at && (block.low.max(1)..=block.high).contains(&stamp.generation)
            }
            None => block.low == 0,
        };
        if ours.is_none() {
            oldest = 0;
        }
        if fits {
            good += 1;
            continue;
        }
        bad += 1;
        // From before: of an earlier generation, of an earlier load, or from when there was none.
        let old = match found {
            Found::Stamp(stamp) => {
                stamp.offset == at && (stamp.run != run || stamp.generation < block.low)
            }
            Found::Zeros => true,
            Found::Broken | Found::Other => false,
        };
        // What is wrong is told rather than what is old.
        if first.is_none_or(|(is_old, ..)| is_old && !old) {
            first = Some((old, at, found));
        }
    }
    let fault = first.map(|(old, at, found)| Fault {
        offset,
        sector: at,
        kind: match (old, good) {
            (false, _) => Kind::Wrong,
            (true, 0) => Kind::Stale,
            (true, _) => Kind::Torn,
        },
        sectors: bad,
        of: good + bad,
        expected: match (block.low, block.high) {
            (_, 0) => "nothing of this load".to_owned(),
            (low, high) if low == high => format!("generation {low}"),
            (0, high) => format!("generation {high} or older"),
            (low, high) => format!("generation {low} to {high}"),
        },
        found: match found {
            Found::Zeros => "zeros".to_owned(),
            Found::Broken => "a sector whose checksum does not fit".to_owned(),
            Found::Other => "bytes that no load wrote".to_owned(),
            Found::Stamp(stamp) if stamp.run != run => {
                format!(
                    "generation {} of another load, for offset {}",
                    stamp.generation, stamp.offset
                )
            }
            Found::Stamp(stamp) if stamp.offset != at => {
                format!("generation {} of offset {}", stamp.generation, stamp.offset)
            }
            Found::Stamp(stamp) => format!("generation {}", stamp.generation),
        },
    });
    (fault, if oldest == u32::MAX { 0 } else { oldest })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Spec, Target};

    const BLOCK: usize = 2 * SECTOR;

    fn ledger() -> Ledger {
        let ledger = Ledger::new(9, BLOCK as u64);
        let places = Places::of(0, BLOCK as u64, 4);
        ledger.prepare(&places, 4).unwrap();
        ledger
    }

    fn write(ledger: &Ledger, index: u64) -> Vec<u8> {
        let (taken, offset, generation) = ledger.take(index * BLOCK as u64, true).unwrap();
        assert_eq!(taken, index);
        let mut data = vec![0; BLOCK];
        ledger.stamp(offset, generation, &mut data);
        ledger.wrote(index, true);
        data
    }

    fn kind(ledger: &Ledger, index: u64, data: &[u8]) -> Option<(Kind, String)> {
        ledger.lock().faults.clear();
        ledger.check(index, index * BLOCK as u64, data);
        let inner = ledger.lock();
        inner
            .faults
            .first()
            .map(|fault| (fault.kind, fault.found.clone()))
    }

    #[test]
    fn what_is_not_as_written_is_told_apart() {
        let ledger = ledger();
        let zeros = vec![0; BLOCK];
        // Nothing is known of it.
        assert_eq!(kind(&ledger, 0, &zeros), None);
        assert_eq!(kind(&ledger, 0, &[7; BLOCK]), None);
        let first = write(&ledger, 0);
        assert_eq!(kind(&ledger, 0, &first), None);
        let second = write(&ledger, 0);
        let other = write(&ledger, 1);
        assert_eq!(kind(&ledger, 0, &second), None);
        let found = |data: &[u8]| kind(&ledger, 0, data).unwrap();
        assert_eq!(found(&first), (Kind::Stale, "generation 1".to_owned()));
        assert_eq!(found(&zeros), (Kind::Stale, "zeros".to_owned()));
        assert_eq!(
            found(&other),
            (Kind::Wrong, format!("generation 1 of offset {BLOCK}"))
        );
        let torn = [&second[..SECTOR], &first[SECTOR..]].concat();
        assert_eq!(found(&torn).0, Kind::Torn);
        let mut broken = second.clone();
        broken[600] ^= 1;
        assert_eq!(found(&broken).0, Kind::Wrong);
        assert_eq!(found(&[3; BLOCK]).0, Kind::Wrong);
        // Data of this load where it wrote nothing.
        assert_eq!(kind(&ledger, 3, &second).unwrap().0, Kind::Wrong);
        assert_eq!(ledger.lock().counts, [4, 2, 1]);
    }

    #[test]
    fn no_two_requests_are_at_a_block() {
        let ledger = ledger();
        let places: Vec<u64> = (0..4).map(|_| ledger.take(0, false).unwrap().0).collect();
        assert_eq!(places, [0, 1, 2, 3]);
        assert!(ledger.take(0, false).is_err());
        ledger.let_go(2);
        assert_eq!(ledger.take(0, true).unwrap().0, 2);
        let few = Places::of(0, BLOCK as u64, 2);
        let error = Ledger::new(1, 1024)
            .prepare(&few, 3)
            .unwrap_err()
            .to_string();
        assert!(error.contains("lower --depth"), "{error}");
        let many = Places::of(0, BLOCK as u64, BLOCKS_MAX + 1);
        assert!(Ledger::new(1, 1024).prepare(&many, 3).is_err());
    }

    #[test]
    fn after_a_crash_what_was_flushed_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let spec = Spec::new(Target::VhostUser("s".into()));
        let kept = |block: u64| Spec {
            block_bytes: block,
            ..spec.clone()
        };
        let ledger = Ledger::new(9, BLOCK as u64);
        let (state, _) = state::State::open(&path, &kept(BLOCK as u64)).unwrap();
        ledger.keep_in(state);
        ledger.prepare(&Places::of(0, BLOCK as u64, 4), 1).unwrap();
        // What is found of the first two blocks when the load is killed now.
        let killed = || {
            let copy = dir.path().join("copy");
            std::fs::copy(&path, &copy).unwrap();
            state::State::open(&copy, &kept(BLOCK as u64))
                .unwrap()
                .1
                .unwrap()
        };
        let first = write(&ledger, 0);
        // Begun before the second write ended: it covers the first one alone.
        let flush = ledger.flush();
        let second = write(&ledger, 0);
        write(&ledger, 1);
        assert_eq!(killed().generations[..2], [(0, 2), (0, 1)]);
        ledger.flushed(flush);
        assert_eq!(killed().generations[..2], [(0, 2), (0, 1)]);
        let flush = ledger.flush();
        ledger.flushed(flush);
        assert_eq!(killed().generations[..2], [(2, 2), (1, 1)]);
        // Of a write that has begun nothing is sure.
        let (_, _, third) = ledger.take(0, true).unwrap();
        assert_eq!((third, killed().generations[0]), (3, (2, 3)));
        ledger.wrote(0, true);
        assert_eq!(killed().generations[0], (2, 3));
        // A load that goes on with that takes either, sector by sector, and then nothing older than it saw.
        let after = Ledger::new(9, BLOCK as u64);
        after.restore(&killed());
        after.prepare(&Places::of(0, BLOCK as u64, 4), 1).unwrap();
        assert_eq!(kind(&after, 0, &first).unwrap().0, Kind::Stale);
        assert_eq!(kind(&after, 0, &second), None);
        let third = {
            let mut data = vec![0; BLOCK];
            ledger.stamp(0, 3, &mut data);
            data
        };
        let mixed = [&third[..SECTOR], &second[SECTOR..]].concat();
        assert_eq!(kind(&after, 0, &mixed), None);
        assert_eq!(kind(&after, 0, &third), None);
        assert_eq!(kind(&after, 0, &second).unwrap().0, Kind::Stale);
        assert_eq!(after.known(), [0, 1]);
        ledger.close().unwrap();
        assert_eq!(killed().generations[..2], [(3, 3), (1, 1)]);
    }

    /// A ledger of four blocks that is kept in a file, and what a load finds of its first block when that one is killed now.
    fn kept(dir: &std::path::Path) -> (Ledger, impl Fn() -> (u32, u32)) {
        let (path, copy) = (dir.join("state"), dir.join("copy"));
        let spec = Spec {
            block_bytes: BLOCK as u64,
            ..Spec::new(Target::VhostUser("s".into()))
        };
        let ledger = Ledger::new(9, BLOCK as u64);
        ledger.keep_in(state::State::open(&path, &spec).unwrap().0);
        ledger.prepare(&Places::of(0, BLOCK as u64, 4), 1).unwrap();
        let killed = move || {
            std::fs::copy(&path, &copy).unwrap();
            let (_, known) = state::State::open(&copy, &spec).unwrap();
            known.unwrap().generations[0]
        };
        (ledger, killed)
    }

    #[test]
    fn a_flush_that_ends_while_a_write_is_under_way_is_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, killed) = kept(dir.path());
        write(&ledger, 0);
        let flush = ledger.flush();
        ledger.take(0, true).unwrap();
        assert_eq!(killed(), (0, 2));
        ledger.flushed(flush);
        assert_eq!(killed(), (1, 2));
        ledger.wrote(0, true);
        assert_eq!(killed(), (1, 2));
    }

    #[test]
    fn what_a_read_saw_of_a_failed_write_is_sure_after_the_next_flush() {
        let dir = tempfile::tempdir().unwrap();
        let (ledger, killed) = kept(dir.path());
        write(&ledger, 0);
        let flush = ledger.flush();
        ledger.flushed(flush);
        let (_, offset, generation) = ledger.take(0, true).unwrap();
        ledger.wrote(0, false);
        let mut second = vec![0; BLOCK];
        ledger.stamp(offset, generation, &mut second);
        assert_eq!(kind(&ledger, 0, &second), None);
        assert_eq!(killed(), (1, 2));
        let flush = ledger.flush();
        ledger.flushed(flush);
        assert_eq!(killed(), (2, 2));
    }
}
