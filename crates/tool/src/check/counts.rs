//! Refcounts of a window of an image's clusters: as the file has them, and as its tables make them.
//!
//! One byte per cluster, in pages that exist where something was counted:
//!
//! ```text
//!   7 6   what the first reference was    5 4 3   refcount in the file    2 1 0   references
//! ```
//!
//! Counts of 7 and more are in a map beside.

use std::collections::HashMap;
use std::ops::Range;

/// log2 of the clusters of a page.
pub const PAGE_BITS: u32 = 12;
const PAGE: usize = 1 << PAGE_BITS;
/// A count that says: look into the map.
const LARGE: u8 = 7;
const FILE_SHIFT: u32 = 3;
const ROLE_SHIFT: u32 = 6;
/// What an entry of a map is taken to cost in bytes.
const LARGE_BYTES: u64 = 64;

/// What refers to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Guest data, compressed or not.
    Data = 0,
    /// An L1 entry: the cluster is an L2 table, which snapshots may share.
    Table = 1,
    /// Something that has its clusters for itself.
    Own = 2,
    /// A refcount structure that is about to be replaced: in use, but not counted.
    Old = 3,
}

/// A cluster whose counts differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which.
    pub cluster: u64,
    /// Its refcount in the file.
    pub file: u64,
    /// How many references there are.
    pub references: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Counts {
    from: u64,
    until: u64,
    pages: Vec<Option<Box<[u8; PAGE]>>>,
    used: usize,
    references: HashMap<u64, u64>,
    file: HashMap<u64, u64>,
    budget: u64,
    full: bool,
}

impl Counts {
    /// Counts of clusters `from..until` in about `budget` bytes. `from` lies on a page's start.
    pub fn new(from: u64, until: u64, budget: u64) -> Self {
        let pages = until.saturating_sub(from).div_ceil(PAGE as u64) as usize;
        Self {
            from,
            until,
            pages: vec![None; pages],
            used: 0,
            references: HashMap::new(),
            file: HashMap::new(),
            budget: budget.saturating_sub(pages as u64 * 8),
            full: false,
        }
    }

    /// Whether `cluster` is counted here.
    #[inline]
    pub fn holds(&self, cluster: u64) -> bool {
        (self.from..self.until).contains(&cluster)
    }

    /// Whether the budget did not suffice: then the counts are worthless, and a narrower window
    /// has to be tried.
    pub fn full(&self) -> bool {
        self.full
    }

    /// The end of a window from the same start that fits the budget with room to spare.
    pub fn narrower(&self) -> u64 {
        let keep = (self.used * 3 / 4).max(1);
        let present = self.pages.iter().enumerate().filter(|(_, p)| p.is_some());
        let last = present.map(|(index, _)| index).nth(keep - 1).unwrap_or(0);
        self.from + ((last as u64 + 1) << PAGE_BITS)
    }

    #[inline]
    fn slot(&mut self, cluster: u64) -> Option<&mut u8> {
        if !self.holds(cluster) {
            return None;
        }
        let at = cluster - self.from;
        let page = self.pages.get_mut((at >> PAGE_BITS) as usize)?;
        if page.is_none() {
            let cost = (self.used as u64 + 1) * PAGE as u64
                + (self.references.len() + self.file.len()) as u64 * LARGE_BYTES;
            if cost > self.budget {
                self.full = true;
                return None;
            }
            self.used += 1;
        }
        let page = page.get_or_insert_with(|| Box::new([0; PAGE]));
        page.get_mut(at as usize % PAGE)
    }

    #[inline]
    fn peek(&self, cluster: u64) -> u8 {
        if !self.holds(cluster) {
            return 0;
        }
        let at = cluster - self.from;
        let page = self.pages.get((at >> PAGE_BITS) as usize);
        let page = page.and_then(Option::as_deref);
        page.and_then(|p| p.get(at as usize % PAGE))
            .copied()
            .unwrap_or(0)
    }

    /// Counts `weight` references to `cluster`. True when that is a clash: two kinds of thing in one
    /// cluster, or two that must have it for themselves.
    #[inline]
    pub fn refer(&mut self, cluster: u64, role: Role, weight: u64) -> bool {
        let Some(slot) = self.slot(cluster) else {
            return false;
        };
        let byte = *slot;
        let (count, before) = (byte & LARGE, byte >> ROLE_SHIFT);
        let next = u64::from(count) + weight;
        let both = before.max(role as u8) << ROLE_SHIFT;
        let rest = byte & !(LARGE | 3 << ROLE_SHIFT) | both;
        if count < LARGE && next < u64::from(LARGE) {
            *slot = rest | next as u8;
        } else {
            *slot = rest | LARGE;
            let large = self.references.entry(cluster).or_insert(u64::from(count));
            *large = large.saturating_add(weight);
            self.judge_maps();
        }
        match count {
            0 => role == Role::Own && weight > 1,
            _ => before != role as u8 || role == Role::Own,
        }
    }

    /// Marks `cluster` as used by what is about to be replaced.
    pub fn keep(&mut self, cluster: u64) {
        if let Some(slot) = self.slot(cluster) {
            *slot |= (Role::Old as u8) << ROLE_SHIFT;
        }
    }

    /// Notes the refcount that the file has for `cluster`.
    #[inline]
    pub fn note(&mut self, cluster: u64, refcount: u64) {
        let Some(slot) = self.slot(cluster) else {
            return;
        };
        let small = refcount.min(u64::from(LARGE)) as u8;
        *slot = *slot & !(LARGE << FILE_SHIFT) | small << FILE_SHIFT;
        if small == LARGE {
            self.file.insert(cluster, refcount);
            self.judge_maps();
        }
    }

    fn judge_maps(&mut self) {
        let maps = (self.references.len() + self.file.len()) as u64 * LARGE_BYTES;
        self.full |= maps + (self.used * PAGE) as u64 > self.budget.max(PAGE as u64);
    }

    /// The refcount that the file has for `cluster`.
    #[inline]
    pub fn in_file(&self, cluster: u64) -> u64 {
        match self.peek(cluster) >> FILE_SHIFT & LARGE {
            LARGE => self.file.get(&cluster).copied().unwrap_or(0),
            small => u64::from(small),
        }
    }

    /// The references to `cluster`.
    #[inline]
    pub fn references(&self, cluster: u64) -> u64 {
        match self.peek(cluster) & LARGE {
            LARGE => self.references.get(&cluster).copied().unwrap_or(0),
            small => u64::from(small),
        }
    }

    /// Whether nothing is in `cluster`, nor was before a repair.
    pub fn is_free(&self, cluster: u64) -> bool {
        let byte = self.peek(cluster);
        byte & LARGE == 0 && byte >> ROLE_SHIFT != Role::Old as u8
    }

    /// The highest cluster with a refcount or reference.
    pub fn last(&self) -> Option<u64> {
        let counts = LARGE | LARGE << FILE_SHIFT;
        let pages = self.pages.iter().enumerate().rev();
        for (index, page) in pages.filter_map(|(i, p)| Some((i, p.as_ref()?))) {
            if let Some(at) = page.iter().rposition(|byte| byte & counts != 0) {
                return Some(self.from + ((index as u64) << PAGE_BITS) + at as u64);
            }
        }
        None
    }

    /// All clusters whose two counts differ, in order.
    pub fn differences(&self) -> impl Iterator<Item = Difference> {
        self.clusters(|byte| byte & LARGE != byte >> FILE_SHIFT & LARGE || byte & LARGE == LARGE)
            .filter(|d| d.file != d.references)
    }

    /// All clusters with references, in order.
    pub fn referred(&self) -> impl Iterator<Item = Difference> {
        self.clusters(|byte| byte & LARGE != 0)
    }

    /// All clusters with a refcount or references, in order.
    pub fn used(&self) -> impl Iterator<Item = u64> {
        self.clusters(|byte| byte & (LARGE | LARGE << FILE_SHIFT) != 0)
            .map(|found| found.cluster)
    }

    /// Those of `clusters` with references, in order.
    pub fn referred_in(&self, clusters: Range<u64>) -> impl Iterator<Item = Difference> {
        let held = clusters.start.max(self.from)..clusters.end.min(self.until);
        held.filter_map(|cluster| {
            let references = self.references(cluster);
            (references > 0).then(|| Difference {
                cluster,
                file: self.in_file(cluster),
                references,
            })
        })
    }

    fn clusters(&self, wanted: fn(u8) -> bool) -> impl Iterator<Item = Difference> {
        let pages = self.pages.iter().enumerate();
        let pages = pages.filter_map(|(index, page)| Some((index, page.as_ref()?)));
        pages.flat_map(move |(index, page)| {
            let first = self.from + ((index as u64) << PAGE_BITS);
            let found = page.iter().enumerate().filter(move |(_, b)| wanted(**b));
            found.map(move |(at, _)| {
                let cluster = first + at as u64;
                Difference {
                    cluster,
                    file: self.in_file(cluster),
                    references: self.references(cluster),
                }
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn counts_small_and_large() {
        let mut counts = Counts::new(PAGE as u64, 10 * PAGE as u64, MIB);
        let at = 3 * PAGE as u64 + 5;
        for nth in 0..10 {
            assert_eq!(counts.references(at), nth);
            assert!(!counts.refer(at, Role::Data, 1));
        }
        counts.refer(at + 1, Role::Data, 100);
        counts.note(at + 1, 100);
        counts.note(at + 2, 6);
        counts.note(at + 3, 7);
        counts.note(at + 4, u64::MAX);
        counts.note(at + 5, 1);
        counts.refer(at + 5, Role::Own, 1);
        // Outside the window nothing is counted.
        counts.refer(0, Role::Data, 1);
        counts.note(10 * PAGE as u64, 1);
        let found: Vec<_> = counts.differences().collect();
        let want = [(0, 0, 10), (2, 6, 0), (3, 7, 0), (4, u64::MAX, 0)];
        let want = want.map(|(n, file, references)| Difference {
            cluster: at + n,
            file,
            references,
        });
        assert_eq!(found, want);
        assert_eq!(counts.last(), Some(at + 5));
        assert_eq!(counts.referred().count(), 3);
        assert!(!counts.full());
    }

    #[test]
    fn clashes_are_seen() {
        use Role::*;
        for (first, second, clash) in [
            (Data, Data, false),
            (Table, Table, false),
            (Data, Table, true),
            (Table, Data, true),
            (Own, Data, true),
            (Data, Own, true),
            (Own, Own, true),
        ] {
            for weight in [1, 9] {
                let mut counts = Counts::new(0, 100, MIB);
                assert_eq!(counts.refer(7, first, weight), first == Own && weight > 1);
                assert_eq!(counts.refer(7, second, 1), clash, "{first:?} {second:?}");
            }
        }
    }

    #[test]
    fn what_is_kept_is_not_free() {
        let mut counts = Counts::new(0, 100, MIB);
        counts.keep(3);
        counts.refer(4, Role::Data, 1);
        counts.note(5, 1);
        let free: Vec<u64> = (2..7).filter(|c| counts.is_free(*c)).collect();
        assert_eq!(free, [2, 5, 6]);
        assert_eq!(counts.references(3), 0);
    }

    #[test]
    fn a_window_that_does_not_fit_says_what_does() {
        let pages = 64u64;
        let mut counts = Counts::new(0, pages * PAGE as u64, 8 * PAGE as u64 + pages * 8);
        for page in (0..pages).step_by(2) {
            counts.refer(page * PAGE as u64, Role::Data, 1);
        }
        assert!(counts.full());
        let until = counts.narrower();
        assert_eq!(until, 11 * PAGE as u64);
        let mut counts = Counts::new(0, until, 8 * PAGE as u64 + pages * 8);
        for page in (0..pages).step_by(2) {
            counts.refer(page * PAGE as u64, Role::Data, 1);
        }
        assert!(!counts.full());
        // Large counts take space too.
        for cluster in 0..512 {
            counts.refer(cluster, Role::Data, 1000);
        }
        assert!(counts.full());
    }
}
