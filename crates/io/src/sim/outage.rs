//! What a disk may hold after the power failed.
//!
//! ```text
//!   log     W1 W2 S W3 W4 ── power fails ── W5 (had begun)
//!           └─ S ─┘ covers: there for sure
//!                   W3 W4                  W5: each of their sectors there or not, by itself
//! ```
//!
//! A sector of 512 bytes is written whole or not at all, and holds what was there for sure or what one of the
//! open operations wrote. That is every subset and every order of them, torn or not: whatever the
//! order, one of them was last on a sector, and leaving out those that follow it in the log gives the same.
//! The size is a file system's to journal: a cut of the file is not lost when what made it longer later is there.

use super::content::Content;
use super::disk::{SimDisk, SimOptions};
use super::log::{Change, LogEntry};
use super::rng::Rng;
use std::sync::Arc;

/// What a disk writes whole or not at all, in bytes.
const SECTOR: u64 = 512;

/// How much of an open operation is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// All.
    All,
    /// Of its first 64 sectors those whose bits are set; nothing of those behind.
    Mask(u64),
    /// Each sector or not, drawn from a seed.
    Torn(u64),
}

impl Keep {
    /// Whether something may be there.
    fn any(self) -> bool {
        !matches!(self, Keep::Nothing | Keep::Mask(0))
    }
}

/// A disk at the moment when the power fails: what is there for sure, and what may be.
#[derive(Debug)]
pub struct Outage {
    options: SimOptions,
    /// Sure, and before anything that is open.
    base: Content,
    /// What follows in the log, and whether it is open.
    rest: Vec<(LogEntry, bool)>,
    open: Vec<usize>,
}

impl Outage {
    pub(super) fn new(options: SimOptions, mut base: Content, log: &[LogEntry], at: u64) -> Self {
        let syncs: Vec<&LogEntry> = log
            .iter()
            .filter(|e| e.ended < at && matches!(e.change, Change::Sync | Change::FailedSync))
            .collect();
        let sure = |entry: &LogEntry| {
            let first = syncs.iter().find(|sync| sync.begun > entry.ended);
            first.is_some_and(|sync| sync.change == Change::Sync)
        };
        let mut rest: Vec<(LogEntry, bool)> = Vec::new();
        let changes = log
            .iter()
            .filter(|e| e.begun < at && !matches!(e.change, Change::Sync | Change::FailedSync));
        for entry in changes {
            let open = !sure(entry);
            if open || !rest.is_empty() {
                rest.push((entry.clone(), open));
            } else {
                apply(&mut base, &entry.change);
            }
        }
        let open = (0..rest.len()).filter(|i| rest[*i].1).collect();
        Self {
            options,
            base,
            rest,
            open,
        }
    }

    /// The open operations, in the order in which they ended.
    pub fn open(&self) -> impl ExactSizeIterator<Item = &LogEntry> {
        self.open.iter().map(|i| &self.rest[*i].0)
    }

    /// Sectors that an open operation touches; of a change of the size 1.
    pub fn sectors(entry: &LogEntry) -> u64 {
        match &entry.change {
            Change::Write { offset, data } => sectors(*offset, data.len() as u64),
            Change::Zero { offset, len } => sectors(*offset, *len),
            _ => 1,
        }
    }

    /// The disk with so much of each open operation there as `keep` says, in the order of [`Outage::open`].
    ///
    /// # Panics
    ///
    /// When `keep` does not say it of each.
    pub fn state(&self, keep: &[Keep]) -> Arc<SimDisk> {
        assert_eq!(keep.len(), self.open.len(), "one for each open operation");
        let mut content = self.base.clone();
        let mut said = keep.iter();
        let kept: Vec<Keep> = self
            .rest
            .iter()
            .map(|(_, open)| match open {
                true => said.next().copied().unwrap_or(Keep::Nothing),
                false => Keep::All,
            })
            .collect();
        for (at, (entry, _)) in self.rest.iter().enumerate() {
            match (&entry.change, kept[at]) {
                (Change::Resize { len }, keep) => {
                    let grown = || {
                        let later = self.rest[at + 1..].iter().zip(&kept[at + 1..]);
                        later
                            .into_iter()
                            .any(|((entry, _), keep)| keep.any() && end_of(&entry.change) > *len)
                    };
                    if keep.any() || *len < content.size && grown() {
                        content.resize(*len);
                    }
                }
                (_, Keep::Nothing) => {}
                (change, Keep::All) => apply(&mut content, change),
                (change, Keep::Mask(mask)) => {
                    tear(change, &mut content, |n| n < 64 && mask >> n & 1 == 1);
                }
                (change, Keep::Torn(seed)) => {
                    let mut rng = Rng::new(seed);
                    tear(change, &mut content, |_| rng.below(2) == 0);
                }
            }
        }
        let options = SimOptions {
            label: format!("{} after a crash", self.options.label),
            ..self.options.clone()
        };
        SimDisk::with(options, content)
    }
}

fn sectors(offset: u64, len: u64) -> u64 {
    (offset + len).div_ceil(SECTOR) - offset / SECTOR
}

/// Where the file ends at least after a change.
fn end_of(change: &Change) -> u64 {
    match change {
        Change::Write { offset, data } => offset + data.len() as u64,
        Change::Resize { len } => *len,
        _ => 0,
    }
}

pub(super) fn apply(content: &mut Content, change: &Change) {
    match change {
        Change::Write { offset, data } => content.write(*offset, data),
        Change::Zero { offset, len } => content.zero(*offset, *len),
        Change::Resize { len } => content.resize(*len),
        Change::Sync | Change::FailedSync => {}
    }
}

/// Applies the sectors of a change for which `keep` says so, by their number.
fn tear(change: &Change, content: &mut Content, mut keep: impl FnMut(u64) -> bool) {
    let mut number = 0;
    split(change, |part| {
        if keep(number) {
            apply(content, &part);
        }
        number += 1;
    });
}

/// The sectors of a write or a zeroing, each as a change of its own.
pub(super) fn split(change: &Change, mut each: impl FnMut(Change)) {
    let (start, len) = match change {
        Change::Write { offset, data } => (*offset, data.len() as u64),
        Change::Zero { offset, len } => (*offset, *len),
        _ => return,
    };
    // Large zeroings are torn in larger pieces, so that this ends.
    let unit = if len > 1 << 20 { len / 64 } else { SECTOR };
    let unit = unit / SECTOR * SECTOR;
    let mut at = 0;
    while at < len {
        let n = (unit - (start + at) % SECTOR).min(len - at);
        let offset = start + at;
        each(match change {
            Change::Write { data, .. } => Change::Write {
                offset,
                data: data[at as usize..(at + n) as usize].into(),
            },
            _ => Change::Zero { offset, len: n },
        });
        at += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fault, FaultOp};
    use block::Storage;
    use std::collections::BTreeSet;

    fn disk(size: u64) -> Arc<SimDisk> {
        SimDisk::new(SimOptions {
            size,
            ..SimOptions::default()
        })
    }

    /// All states, as what the first byte of each of the first sectors is.
    fn states(outage: &Outage, sectors: usize) -> BTreeSet<Vec<u8>> {
        let each: Vec<u64> = outage.open().map(Outage::sectors).collect();
        let bits: u64 = each.iter().sum();
        assert!(bits <= 16);
        (0..1u64 << bits)
            .map(|mut mask| {
                let keep: Vec<Keep> = each
                    .iter()
                    .map(|n| {
                        let keep = Keep::Mask(mask & ((1 << n) - 1));
                        mask >>= n;
                        keep
                    })
                    .collect();
                let bytes = outage.state(&keep).bytes();
                assert!(bytes.chunks(512).all(|s| s.iter().all(|b| *b == s[0])));
                (0..sectors).map(|n| bytes[n * 512]).collect()
            })
            .collect()
    }

    #[test]
    fn every_subset_order_and_tear_of_what_is_open() {
        let d = disk(4096);
        d.write_at(0, &[1; 1024]).unwrap();
        d.sync().unwrap();
        d.write_at(0, &[2; 1024]).unwrap();
        d.write_at(512, &[3; 1024]).unwrap();
        d.write_zeroes(1024, 512, true).unwrap();
        let found = states(&d.outage(u64::MAX), 3);
        let mut all = BTreeSet::new();
        for a in [1, 2] {
            for b in [1, 2, 3] {
                for c in [0, 3] {
                    all.insert(vec![a, b, c]);
                }
            }
        }
        assert_eq!(found, all);
        d.sync().unwrap();
        assert_eq!(
            states(&d.outage(u64::MAX), 3),
            BTreeSet::from([vec![2, 3, 0]])
        );
    }

    #[test]
    fn a_sync_covers_what_had_ended_when_it_began() {
        let d = disk(4096);
        let early = d.begin();
        d.write_at(0, &[1; 512]).unwrap();
        let sync = d.begin();
        d.write_at(512, &[2; 512]).unwrap();
        d.sync_data(sync).unwrap();
        let after = d.clock().now() + 1;
        // In flight over the sync, and still when the power fails.
        d.write_all(1024, &[3; 512], early).unwrap();
        d.write_at(1536, &[4; 512]).unwrap();
        let found = states(&d.outage(after), 4);
        let want = [[1, 0, 0, 0], [1, 2, 0, 0], [1, 0, 3, 0], [1, 2, 3, 0]];
        assert_eq!(found, want.map(|s| s.to_vec()).into());
        assert_eq!(states(&d.outage(early), 4), [vec![0; 4]].into());
    }

    #[test]
    fn what_a_failed_sync_lost_may_be_lost_for_good() {
        let d = disk(4096);
        d.write_at(0, &[1; 1024]).unwrap();
        d.inject(Fault {
            count: 1,
            ..Fault::always(FaultOp::Sync, libc::EIO)
        });
        assert!(d.sync().is_err());
        d.write_at(512, &[2; 512]).unwrap();
        d.sync().unwrap();
        let found = states(&d.outage(u64::MAX), 2);
        assert_eq!(found, [vec![0, 2], vec![1, 2]].into());
    }

    #[test]
    fn a_cut_is_not_lost_under_what_made_the_file_longer_again() {
        let d = disk(4096);
        d.write_at(0, &[1; 4096]).unwrap();
        d.sync().unwrap();
        d.set_len(512).unwrap();
        d.set_len(2048).unwrap();
        let outage = d.outage(u64::MAX);
        let found: BTreeSet<(usize, u8)> = (0..4)
            .map(|mask| {
                let keep = [mask & 1, mask >> 1].map(Keep::Mask);
                let bytes = outage.state(&keep).bytes();
                (bytes.len(), bytes.get(512).copied().unwrap_or(9))
            })
            .collect();
        assert_eq!(found, [(4096, 1), (512, 9), (2048, 0)].into());
    }
}
