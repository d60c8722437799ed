//! Which bytes of an allocation requests write, and which are left to be filled.
//!
//! ```text
//!   0                                                     len
//!   ├── gap ──┼── given ──┼── given ──┼── gap ──┼─ given ─┤
//! ```

use std::ops::Range;

/// Bytes that one request writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    /// The request.
    pub slot: u32,
    /// Where in the request they begin.
    pub pos: u64,
    /// Where in the allocation they begin.
    pub from: u64,
    /// How many.
    pub len: u64,
}

impl Given {
    /// Where in the allocation they end.
    pub fn end(&self) -> u64 {
        self.from + self.len
    }
}

/// The bytes of one allocation.
#[derive(Debug, Default)]
pub(crate) struct Cover {
    len: u64,
    /// Sorted; they do not overlap.
    given: Vec<Given>,
}

impl Cover {
    /// Begins anew with an allocation of `len` bytes; keeps its memory.
    pub fn reset(&mut self, len: u64) {
        self.len = len;
        self.given.clear();
    }

    /// Bytes of the allocation.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// What is given, in order.
    pub fn given(&self) -> &[Given] {
        &self.given
    }

    /// From the first given byte to behind the last.
    pub fn span(&self) -> Range<u64> {
        match (self.given.first(), self.given.last()) {
            (Some(first), Some(last)) => first.from..last.end(),
            _ => 0..0,
        }
    }

    /// How many bytes from `from` on nobody gave; none when that byte is given or outside.
    pub fn room(&self, from: u64) -> u64 {
        match self.gap(from) {
            Some(gap) if gap.start == from => gap.end - from,
            _ => 0,
        }
    }

    /// Whether `range` touches something given, so that both are one run.
    pub fn touches(&self, range: &Range<u64>) -> bool {
        let at = self.after(range.start);
        let before = at.checked_sub(1).and_then(|i| self.given.get(i));
        before.is_some_and(|g| g.end() == range.start)
            || self.given.get(at).is_some_and(|g| g.from == range.end)
    }

    /// Adds bytes for which there is [room](Self::room).
    pub fn give(&mut self, given: Given) {
        debug_assert!(given.len <= self.room(given.from));
        self.given.insert(self.after(given.from), given);
    }

    fn after(&self, from: u64) -> usize {
        self.given.partition_point(|g| g.from < from)
    }

    /// The first gap that ends behind `at`, without what is before `at`.
    pub fn gap(&self, at: u64) -> Option<Range<u64>> {
        let mut start = at;
        let first = self.given.partition_point(|g| g.end() <= at);
        for given in self.given.get(first..).unwrap_or_default() {
            if given.from > start {
                return Some(start..given.from);
            }
            start = given.end();
        }
        (start < self.len).then_some(start..self.len)
    }

    /// The gaps as two ranges at most, each to be read at once: with the given bytes between its gaps, where
    /// these are no more than `through`. The second range is empty when one is enough.
    pub fn reads(&self, through: u64) -> [Range<u64>; 2] {
        let Some(first) = self.gap(0) else {
            return [0..0, 0..0];
        };
        let (mut end, mut widest, mut split) = (first.end, through, None);
        while let Some(gap) = self.gap(end) {
            if gap.start - end > widest {
                widest = gap.start - end;
                split = Some(end..gap.start);
            }
            end = gap.end;
        }
        match split {
            Some(split) => [first.start..split.start, split.end..end],
            None => [first.start..end, 0..0],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cover(len: u64, given: &[(u64, u64)]) -> Cover {
        let mut cover = Cover::default();
        cover.reset(len);
        for (from, end) in given {
            cover.give(Given {
                slot: 0,
                pos: 0,
                from: *from,
                len: end - from,
            });
        }
        cover
    }

    fn gaps(cover: &Cover) -> Vec<Range<u64>> {
        let mut gaps: Vec<Range<u64>> = Vec::new();
        while let Some(gap) = cover.gap(gaps.last().map_or(0, |g| g.end)) {
            gaps.push(gap);
        }
        gaps
    }

    #[test]
    fn gaps_are_what_is_not_given() {
        for (given, want) in [
            (vec![(0, 64)], vec![]),
            (vec![(4, 8)], vec![0..4, 8..64]),
            (vec![(4, 8), (8, 12)], vec![0..4, 12..64]),
            (vec![(60, 64), (0, 4), (8, 12)], vec![4..8, 12..60]),
            (
                vec![(32, 36), (8, 12), (12, 16)],
                vec![0..8, 16..32, 36..64],
            ),
        ] {
            let cover = cover(64, &given);
            assert_eq!(gaps(&cover), want, "{given:?}");
            let first = given.iter().map(|g| g.0).min().unwrap();
            let last = given.iter().map(|g| g.1).max().unwrap();
            assert_eq!(cover.span(), first..last);
        }
    }

    #[test]
    fn there_is_room_where_nothing_is_given() {
        let cover = cover(64, &[(8, 16), (32, 40)]);
        for (from, room) in [
            (0, 8),
            (7, 1),
            (8, 0),
            (15, 0),
            (16, 16),
            (31, 1),
            (40, 24),
            (64, 0),
        ] {
            assert_eq!(cover.room(from), room, "{from}");
        }
        for (range, touches) in [
            (0..8, true),
            (16..20, true),
            (20..32, true),
            (20..24, false),
            (40..64, true),
            (41..64, false),
            (0..4, false),
        ] {
            assert_eq!(cover.touches(&range), touches, "{range:?}");
        }
    }

    #[test]
    fn gaps_are_read_together_unless_much_lies_between() {
        for (given, want) in [
            (vec![(0, 64)], [0..0, 0..0]),
            (vec![(4, 8)], [0..64, 0..0]),
            (vec![(4, 12)], [0..64, 0..0]),
            (vec![(4, 13)], [0..4, 13..64]),
            (vec![(0, 16)], [16..64, 0..0]),
            (vec![(48, 64)], [0..48, 0..0]),
            (vec![(4, 14), (20, 40)], [0..20, 40..64]),
            (vec![(4, 24), (30, 40)], [0..4, 24..64]),
            (vec![(0, 20), (30, 40), (44, 64)], [20..30, 40..44]),
            (vec![(0, 20), (30, 34), (44, 64)], [20..44, 0..0]),
        ] {
            assert_eq!(cover(64, &given).reads(8), want, "{given:?}");
        }
    }
}
