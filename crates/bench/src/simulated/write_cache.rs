//! What a disk has acknowledged and not written yet: ranges of bytes, none of which overlap.
//!
//! A flush covers what is there when it comes, so each range knows how many flushes came before it (its epoch): ranges grow
//! together only within an epoch, and what is written again stays as urgent as it was.

use std::collections::BTreeMap;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct WriteCache {
    /// From the first byte of a range to the one after its last, and its epoch.
    ranges: BTreeMap<u64, (u64, u64)>,
    bytes: u64,
    epoch: u64,
}

/// Ranges on each side of a place that [`WriteCache::near`] looks at.
const NEAR: usize = 64;

impl WriteCache {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Keeps a range.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        let mut at = start;
        while at < end {
            match self.around(at) {
                Some((_, there, _)) => at = there,
                None => {
                    let next = self.ranges.range(at..end).next().map(|(start, _)| *start);
                    let to = next.unwrap_or(end);
                    self.insert(at, to);
                    at = to;
                }
            }
        }
    }

    /// The range that `at` lies in.
    fn around(&self, at: u64) -> Option<(u64, u64, u64)> {
        let (start, (end, epoch)) = self.ranges.range(..=at).next_back()?;
        (at < *end).then_some((*start, *end, *epoch))
    }

    /// Puts a range where there is none, and joins it with neighbours of its epoch.
    fn insert(&mut self, mut start: u64, mut end: u64) {
        self.bytes += end - start;
        if let Some((before, (to, epoch))) = self.ranges.range(..start).next_back()
            && *to == start
            && *epoch == self.epoch
        {
            start = *before;
        }
        if let Some((to, epoch)) = self.ranges.get(&end).copied()
            && epoch == self.epoch
        {
            self.ranges.remove(&end);
            end = to;
        }
        self.ranges.insert(start, (end, self.epoch));
    }

    /// Whether all of a range is here.
    pub(super) fn covers(&self, start: u64, end: u64) -> bool {
        let mut at = start;
        while at < end {
            match self.around(at) {
                Some((_, there, _)) => at = there,
                None => return false,
            }
        }
        true
    }

    /// Takes `most` bytes from the start of the range that begins at `start`; where they end.
    pub(super) fn take(&mut self, start: u64, most: u64) -> u64 {
        let Some((end, epoch)) = self.ranges.remove(&start) else {
            return start;
        };
        let to = end.min(start.saturating_add(most));
        if to < end {
            self.ranges.insert(to, (end, epoch));
        }
        self.bytes -= to - start;
        to
    }

    /// A flush came: what it has to wait for is everything up to the epoch that this gives.
    pub(super) fn flush(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch - 1
    }

    /// Whether nothing of this epoch or an earlier one is left.
    pub(super) fn is_flushed(&self, epoch: u64) -> bool {
        self.ranges.values().all(|(_, of)| *of > epoch)
    }

    /// The starts of some ranges around a place, only of epochs up to `epoch` where given; of those, if there are none
    /// around it, any.
    pub(super) fn near(&self, at: u64, epoch: Option<u64>) -> impl Iterator<Item = u64> + '_ {
        let wanted = move |(_, (_, of)): &(&u64, &(u64, u64))| epoch.is_none_or(|most| *of <= most);
        let after = self.ranges.range(at..).filter(wanted).take(NEAR);
        let before = self.ranges.range(..at).rev().filter(wanted).take(NEAR);
        after.chain(before).map(|(start, _)| *start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_flush_waits_for_what_was_there() {
        let mut cache = WriteCache::default();
        cache.add(0, 10);
        cache.add(10, 20);
        assert_eq!(cache.ranges.len(), 1);
        let epoch = cache.flush();
        // More at its end, and the same again: the first stays as it was.
        cache.add(15, 30);
        assert_eq!((cache.bytes(), cache.ranges.len()), (30, 2));
        assert!(!cache.is_flushed(epoch));
        assert_eq!(cache.near(25, Some(epoch)).collect::<Vec<_>>(), [0]);
        assert_eq!(cache.take(0, 15), 15);
        assert!(!cache.is_flushed(epoch));
        assert_eq!(cache.take(15, 100), 20);
        assert!(cache.is_flushed(epoch) && cache.covers(20, 30));
        assert_eq!(cache.near(0, Some(epoch)).next(), None);
        assert_eq!(cache.near(0, None).next(), Some(20));
    }

    proptest! {
        #[test]
        fn ranges_are_the_bytes(steps in prop::collection::vec((0_u64..60, 1_u64..20, 0_u8..6), 1..60)) {
            let mut cache = WriteCache::default();
            let mut model = [false; 100];
            for (start, bytes, what) in steps {
                match what {
                    0 => {
                        let first = cache.near(start, None).next();
                        if let Some(start) = first {
                            let end = cache.take(start, bytes);
                            prop_assert!(end > start && end - start <= bytes);
                            model[start as usize..end as usize].fill(false);
                        }
                    }
                    1 => drop(cache.flush()),
                    _ => {
                        cache.add(start, start + bytes);
                        model[start as usize..(start + bytes) as usize].fill(true);
                    }
                }
                prop_assert_eq!(cache.bytes(), model.iter().filter(|b| **b).count() as u64);
                for at in 0..99 {
                    prop_assert_eq!(cache.covers(at, at + 2), model[at as usize] && model[at as usize + 1]);
                }
            }
        }
    }
}
