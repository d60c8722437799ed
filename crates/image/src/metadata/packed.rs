//! Slices of L2 tables in a compact form: runs instead of entries.
//!
//! A run is a stretch of entries that one number tells: all unallocated, all plain zeros, or clusters
//! that follow one another on the host. A slice whose entries are all unallocated takes no
//! memory at all ([`Shape::Empty`]); one that is a single run takes three words instead of 512;
//! one with 32 scattered clusters some 200 bytes; one in perfect disorder two thirds of its size or less.
//!
//! ```text
//!   word 0       width of a field │ mode │ flags │ words        slice number in the upper half
//!   word 1       base
//!   directory    runs that begin before each 64 entries, 16 bits each    ┐ not with
//!   starts       one bit per entry: a run begins here                    ┘ a single run
//!   fields       one per run, of `width` bits
//! ```
//!
//! | mode | field | entry `i` of the run |
//! |---|---|---|
//! | `PLAIN` | 0, 1 | unallocated, plain zero |
//! | | `f` | cluster `base + (f - 2) + i`, with the block's flags |
//! | `FLAGGED` | `f` | cluster `base + (f - 2 >> 2) + i`, with flags from the two low bits |
//! | `RAW` | `f` | the entry `base + f`, rotated so that what differs is low (compressed clusters, damage) |
//!
//! Extended entries are packed as two such planes, one behind the other: the entries, and the bitmaps of their
//! subclusters.
//!
//! Cluster numbers are stored less the entry's index, so that a field does not depend on where its run
//! begins: an entry is found by counting bits, and a scattered slice needs no more than a bitmap.
//! Readers may look at a block while it is overwritten (see `tables`): whatever they see must
//! neither panic nor loop; the answer is thrown away.

use super::layout::{COPIED, Layout, OFFSET_MASK, ZERO};
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries of slices that can be packed: whole words of start bits, and counts that fit the directory.
const ENTRIES: std::ops::RangeInclusive<usize> = 64..=4096;
const WIDTH_MASK: u64 = 0x7f;
const MODE_SHIFT: u32 = 8;
const PLAIN: u64 = 0;
const FLAGGED: u64 = 1;
const RAW: u64 = 2;
/// Header bit: one run, no directory and no start bits.
const SINGLE: u64 = 1 << 10;
/// Header bits: the flags of all clusters in mode `PLAIN`, as in [`flags_of`].
const FLAGS_SHIFT: u32 = 11;
/// Header bits, 16: words of the first of two planes.
const LEN_SHIFT: u32 = 16;
/// Header bits from here on: the slice's number.
const SLICE_SHIFT: u32 = 32;
/// Tags of runs that are no clusters, beside the four values of [`flags_of`].
const TAG_UNALLOCATED: u8 = 4;
const TAG_ZERO: u8 = 5;

/// What a slice is in its compact form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape<'a> {
    /// All entries are unallocated.
    Empty,
    /// These words.
    Block(&'a [u64]),
    /// It would not get smaller than what was allowed.
    Large,
}

fn flags_of(raw: u64) -> u64 {
    raw >> 63 | (raw & ZERO) << 1
}

fn with_flags(flags: u64) -> u64 {
    (flags & 1) << 63 | (flags >> 1) & ZERO
}

/// Packs slices. Keeps its memory.
#[derive(Debug, Default)]
pub(crate) struct Packer {
    /// First entry, value and tag of each run.
    runs: Vec<(u16, u64, u8)>,
    out: Vec<u64>,
}

impl Packer {
    /// Packs slice `slice`, of `words` words that `word` gives, into at most `most` words. With
    /// `extended` entries there are two planes, one behind the other: entries and bitmaps.
    pub(crate) fn pack(
        &mut self,
        slice: u64,
        geometry: &Layout,
        most: usize,
        word: impl Fn(usize) -> u64,
    ) -> Shape<'_> {
        let count = geometry.slice_entries();
        if !ENTRIES.contains(&count) || !count.is_multiple_of(64) {
            return Shape::Large;
        }
        let bits = geometry.cluster_bits;
        self.out.clear();
        let first = |at: usize| word(at << geometry.entry_word_bits());
        let mut empty = self.append(slice, count, bits, most, first);
        if geometry.extended() && empty.is_some() {
            let len = self.out.len() as u64;
            if let Some(header) = self.out.first_mut() {
                *header |= len << LEN_SHIFT;
            }
            let second = self.append(slice, count, bits, most, |at| word(2 * at + 1));
            empty = second.map(|second| second && empty == Some(true));
        }
        match empty {
            None => Shape::Large,
            Some(true) => Shape::Empty,
            Some(false) => Shape::Block(&self.out),
        }
    }

    /// Appends a plane of `count` words; tells whether it is all unallocated. `None` when it does not fit.
    fn append(
        &mut self,
        slice: u64,
        count: usize,
        cluster_bits: u32,
        most: usize,
        word: impl Fn(usize) -> u64,
    ) -> Option<bool> {
        let (mode, base, shift, flags) = match self.find_runs(count, cluster_bits, &word) {
            Some((base, None)) => (FLAGGED, base, 2, 0),
            Some((base, Some(flags))) => (PLAIN, base, 0, flags),
            None => (RAW, self.find_raw_runs(count, cluster_bits, &word), 0, 0),
        };
        let empty = matches!(self.runs.as_slice(), [(_, _, TAG_UNALLOCATED)]);
        let field = |value: u64, tag: u8| match tag {
            _ if mode == RAW => value.wrapping_sub(base),
            TAG_UNALLOCATED => 0,
            TAG_ZERO => 1,
            _ if mode == PLAIN => value.wrapping_sub(base) + 2,
            tag => (value.wrapping_sub(base) << shift | u64::from(tag)) + 2,
        };
        let max = self.runs.iter().map(|(_, v, t)| field(*v, *t)).max();
        let width = 64 - max.unwrap_or(0).leading_zeros() as usize;
        let single = self.runs.len() == 1;
        let head = 2 + if single { 0 } else { index_words(count) };
        let len = head + (self.runs.len() * width).div_ceil(64);
        let begin = self.out.len();
        if begin + len > most {
            return None;
        }
        self.out.resize(begin + len, 0);
        let out = self.out.get_mut(begin..)?;
        let header = width as u64 | mode << MODE_SHIFT | flags << FLAGS_SHIFT;
        let header = header | if single { SINGLE } else { 0 } | slice << SLICE_SHIFT;
        for (to, from) in out.iter_mut().zip([header, base]) {
            *to = from;
        }
        let mut put = |at: usize, bits: u64| {
            if let Some(word) = out.get_mut(at) {
                *word |= bits;
            }
        };
        let starts = 2 + count.div_ceil(256);
        for (run, (first, value, tag)) in self.runs.iter().enumerate() {
            let first = usize::from(*first);
            if !single {
                put(starts + first / 64, 1 << (first % 64));
            }
            let bit = run * width;
            let value = field(*value, *tag);
            put(head + bit / 64, value << (bit % 64));
            if bit % 64 + width > 64 {
                put(head + bit / 64 + 1, value >> (64 - bit % 64));
            }
        }
        if !single {
            let mut before = 0;
            for group in 0..count / 64 {
                let here = out.get(starts + group).map_or(0, |w| w.count_ones());
                if let Some(word) = out.get_mut(2 + group / 4) {
                    *word |= before << (group % 4 * 16);
                }
                before += u64::from(here);
            }
        }
        Some(empty)
    }

    /// Finds the runs, the smallest value of a cluster, and the flags that all clusters have
    /// (`None` when they differ). `None` when there is an entry that is no cluster by itself.
    fn find_runs(
        &mut self,
        count: usize,
        cluster_bits: u32,
        word: &impl Fn(usize) -> u64,
    ) -> Option<(u64, Option<u64>)> {
        self.runs.clear();
        let (mut min, mut same, mut flags) = (i64::MAX, true, None);
        let mut last = None;
        for at in 0..count {
            let raw = word(at);
            let host = raw & OFFSET_MASK;
            let (value, tag) = match raw {
                0 => (0, TAG_UNALLOCATED),
                ZERO => (0, TAG_ZERO),
                _ if raw & !(COPIED | ZERO | OFFSET_MASK) != 0
                    || host == 0
                    || host & ((1 << cluster_bits) - 1) != 0 =>
                {
                    return None;
                }
                _ => (
                    (host >> cluster_bits).wrapping_sub(at as u64),
                    flags_of(raw) as u8,
                ),
            };
            if last == Some((value, tag)) {
                continue;
            }
            last = Some((value, tag));
            if tag < TAG_UNALLOCATED {
                // Host offsets end at 2^56: less an index it is a small negative number at worst.
                min = min.min(value as i64);
                same &= *flags.get_or_insert(tag) == tag;
            }
            self.runs.push((at as u16, value, tag));
        }
        let base = if min == i64::MAX { 0 } else { min as u64 };
        let flags = u64::from(flags.unwrap_or(0));
        Some((base, same.then_some(flags)))
    }

    /// Finds runs of equal entries, and the smallest of them, rotated.
    fn find_raw_runs(
        &mut self,
        count: usize,
        cluster_bits: u32,
        word: &impl Fn(usize) -> u64,
    ) -> u64 {
        self.runs.clear();
        let (mut min, mut last) = (u64::MAX, None);
        for at in 0..count {
            let value = word(at).rotate_left(raw_rotate(cluster_bits));
            if last != Some(value) {
                last = Some(value);
                min = min.min(value);
                self.runs.push((at as u16, value, 0));
            }
        }
        min
    }
}

/// Words of directory and start bits.
fn index_words(count: usize) -> usize {
    count.div_ceil(256) + count / 64
}

/// So far entries are rotated left in mode `RAW`: what precedes the offset of a compressed cluster.
fn raw_rotate(cluster_bits: u32) -> u32 {
    cluster_bits.saturating_sub(6)
}

/// Which slice a block is of.
pub(crate) fn slice_of(header: u64) -> u64 {
    header >> SLICE_SHIFT
}

/// A block to look entries up in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block<'a> {
    pub(crate) words: &'a [AtomicU64],
    /// Entries of the slice.
    pub(crate) count: usize,
    pub(crate) cluster_bits: u32,
}

impl Block<'_> {
    #[inline]
    fn word(&self, at: usize) -> u64 {
        self.words.get(at).map_or(0, |w| w.load(Ordering::Relaxed))
    }

    /// Entry `at`, and how many entries its run goes on for: at least 1, and counted up to `most`.
    #[inline]
    pub(crate) fn run(&self, at: usize, most: usize) -> (u64, usize) {
        let (header, base) = (self.word(0), self.word(1));
        let (mut run, mut head, mut len) = (0, 2, self.count.saturating_sub(at));
        if header & SINGLE == 0 {
            let group = at / 64;
            let starts = 2 + self.count.div_ceil(256);
            head = starts + self.count / 64;
            let before = self.word(2 + group / 4) >> (group % 4 * 16) & 0xffff;
            let bits = self.word(starts + group);
            let here = (bits & (u64::MAX >> (63 - at % 64))).count_ones();
            run = (before as usize + here as usize).saturating_sub(1);
            len = 1;
            if most > 1 {
                len = self.run_len(starts, at, bits, most);
            }
        }
        let width = (header & WIDTH_MASK).min(64) as usize;
        let field = self.field(head, run, width);
        let raw = self.entry(header, base, field, at);
        // Runs of mode `RAW` are equal entries, which follow one another only where there is no cluster.
        if header >> MODE_SHIFT & 3 == RAW && raw & !ZERO != 0 {
            len = 1;
        }
        (raw, len.clamp(1, most.max(1)))
    }

    /// The two words of extended entry `at`.
    #[inline]
    pub(crate) fn pair(&self, at: usize) -> (u64, u64) {
        let len = (self.word(0) >> LEN_SHIFT & 0xffff) as usize;
        let second = Block {
            words: self.words.get(len..).unwrap_or_default(),
            ..*self
        };
        (self.run(at, 1).0, second.run(at, 1).0)
    }

    /// Entries from `at` to the next start of a run; looks no further than `most` need.
    fn run_len(&self, starts: usize, at: usize, bits: u64, most: usize) -> usize {
        // Starts behind `at` in its own group.
        let mut bits = bits & (u64::MAX << (at % 64)) & !(1 << (at % 64));
        let mut group = at / 64;
        while bits == 0 {
            group += 1;
            if group * 64 >= self.count {
                return self.count.saturating_sub(at);
            }
            if group * 64 - at >= most {
                return most;
            }
            bits = self.word(starts + group);
        }
        group * 64 + bits.trailing_zeros() as usize - at
    }

    #[inline]
    fn field(&self, head: usize, run: usize, width: usize) -> u64 {
        if width == 0 {
            return 0;
        }
        let bit = run * width;
        let shift = bit % 64;
        let mut field = self.word(head + bit / 64) >> shift;
        if shift + width > 64 {
            field |= self.word(head + bit / 64 + 1) << (64 - shift);
        }
        field & (u64::MAX >> (64 - width))
    }

    #[inline]
    fn entry(&self, header: u64, base: u64, field: u64, at: usize) -> u64 {
        let cluster = |value: u64, flags: u64| {
            let index = base.wrapping_add(value).wrapping_add(at as u64);
            (index << self.cluster_bits & OFFSET_MASK) | with_flags(flags)
        };
        match (header >> MODE_SHIFT & 3, field) {
            (RAW, _) => base
                .wrapping_add(field)
                .rotate_right(raw_rotate(self.cluster_bits)),
            (_, 0) => 0,
            (_, 1) => ZERO,
            (PLAIN, f) => cluster(f - 2, header >> FLAGS_SHIFT & 3),
            (_, f) => cluster((f - 2) >> 2, f - 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::Rng;

    const BITS: u32 = 16;

    fn geometry(entries: usize, extended: bool) -> Layout {
        let mut layout = Layout::new(1 << 40, BITS, BITS, extended);
        layout.slice_bits = entries.trailing_zeros() + 3 + u32::from(extended);
        layout
    }

    /// Packs, checks every entry and every run's length against the entries, and tells the words.
    fn round(entries: &[u64], most: usize) -> Option<usize> {
        let mut packer = Packer::default();
        let words: Vec<AtomicU64> =
            match packer.pack(77, &geometry(entries.len(), false), most, |at| entries[at]) {
                Shape::Large => return None,
                Shape::Empty => {
                    assert!(entries.iter().all(|e| *e == 0));
                    return Some(0);
                }
                Shape::Block(words) => words.iter().map(|w| AtomicU64::new(*w)).collect(),
            };
        assert!(words.len() <= most);
        assert_eq!(slice_of(words[0].load(Ordering::Relaxed)), 77);
        let block = Block {
            words: &words,
            count: entries.len(),
            cluster_bits: BITS,
        };
        for (at, raw) in entries.iter().enumerate() {
            assert_eq!(block.run(at, 1), (*raw, 1), "entry {at}");
            for most in [2, 63, 64, 65, 10_000] {
                let (first, len) = block.run(at, most);
                assert!(first == *raw && (1..=most).contains(&len));
                let step =
                    if first & !(COPIED | ZERO | OFFSET_MASK) == 0 && first & OFFSET_MASK != 0 {
                        1 << BITS
                    } else {
                        0
                    };
                for (i, raw) in entries[at..at + len].iter().enumerate() {
                    assert_eq!(*raw, first + i as u64 * step, "entry {at} + {i}");
                }
                let raw = words[0].load(Ordering::Relaxed) >> MODE_SHIFT & 3 == RAW;
                if most == 10_000 && !raw {
                    // A run in full.
                    let next = entries.get(at + len);
                    assert_ne!(next, Some(&(first + len as u64 * step)), "entry {at}");
                }
            }
        }
        Some(words.len())
    }

    fn data(cluster: u64) -> u64 {
        COPIED | cluster << BITS
    }

    #[test]
    fn sizes_are_what_the_format_promises() {
        let fill = |f: &dyn Fn(u64) -> u64| (0..512).map(f).collect::<Vec<u64>>();
        for (what, entries, words) in [
            ("nothing", fill(&|_| 0), 0),
            ("zeros", fill(&|_| ZERO), 3),
            ("in order", fill(&|i| data(1000 + i)), 3),
            (
                "not to be written in place",
                fill(&|i| (1000 + i) << BITS),
                3,
            ),
            ("one break", fill(&|i| data(1000 + i + i / 300)), 13),
            (
                "every 16th",
                fill(&|i| {
                    if i % 16 == 5 {
                        data((1 << 20) + i * 7919 % 512)
                    } else {
                        0
                    }
                }),
                24,
            ),
            (
                "disorder",
                fill(&|i| data(1 + i * 7919 % 512 * 32768)),
                12 + 512 * 24 / 64,
            ),
        ] {
            let got = round(&entries, 512);
            assert!(
                got.is_some_and(|got| got <= words),
                "{what}: {got:?}, not {words}"
            );
        }
    }

    #[test]
    fn every_entry_reads_back() {
        let mut rng = Rng(1);
        let mut packed = 0;
        for case in 0..150u64 {
            let count = [64, 128, 256, 512, 4096][case as usize % 5];
            let kinds = 1 + rng.below(6);
            let span = 1 << rng.below(40);
            let mut entries = Vec::new();
            while entries.len() < count {
                let first = rng.below(span) + 1;
                let compressed = 1 << 62 | rng.below(256) << 54 | rng.below(span) << 9;
                let flags = [COPIED, COPIED | ZERO, 0, ZERO][rng.below(kinds.min(4)) as usize];
                let run = 1 + if rng.below(2) == 0 { 0 } else { rng.below(100) };
                match rng.below(kinds) {
                    0 => entries
                        .extend((0..run).map(|i| ((first + i) << BITS & OFFSET_MASK) | flags)),
                    1 => entries.extend((0..run).map(|_| 0)),
                    2 => entries.extend((0..run).map(|_| ZERO)),
                    3 => entries.push(((first << BITS) & OFFSET_MASK) | flags),
                    4 => entries.push(compressed),
                    // Damage.
                    _ if kinds == 6 => entries.push(rng.next()),
                    _ => entries.push(1 << 63),
                }
            }
            entries.truncate(count);
            packed += u32::from(round(&entries, 5000).is_some());
        }
        assert_eq!(packed, 150);
    }

    #[test]
    fn what_does_not_fit_is_not_packed() {
        let entries: Vec<u64> = (0..512).map(|i| data(1 + i * 7919 % 512 * 32768)).collect();
        let len = round(&entries, 512).expect("it has 24 bits an entry");
        assert_eq!(round(&entries, len), Some(len));
        assert_eq!(round(&entries, len - 1), None);
        // Odd sizes, as very small clusters or very large disks have them.
        assert_eq!(round(&entries[..32], 512), None);
    }

    #[test]
    fn extended_entries_read_back() {
        let mut rng = Rng(5);
        let geometry = geometry(256, true);
        let mut packer = Packer::default();
        for case in 0..100u64 {
            let kinds = case % 4;
            let words: Vec<u64> = (0..256)
                .flat_map(|i| match rng.below(4).min(kinds) {
                    0 => [0, 0],
                    1 => [data(1000 + i), 0xffff_ffff],
                    2 => [0, 0xffff_ffff << 32],
                    _ => [data(rng.below(1 << 30) + 1), rng.next()],
                })
                .collect();
            let packed: Vec<AtomicU64> = match packer.pack(9, &geometry, 1000, |at| words[at]) {
                Shape::Empty => {
                    assert_eq!(kinds, 0);
                    continue;
                }
                Shape::Large => panic!("there is room for anything"),
                Shape::Block(words) => words.iter().map(|w| AtomicU64::new(*w)).collect(),
            };
            let block = Block {
                words: &packed,
                count: 256,
                cluster_bits: BITS,
            };
            for (at, pair) in words.chunks_exact(2).enumerate() {
                assert_eq!(block.pair(at), (pair[0], pair[1]), "case {case} entry {at}");
            }
        }
    }

    /// What a reader may see of a block while it is overwritten.
    #[test]
    fn garbage_neither_panics_nor_loops() {
        let mut rng = Rng(3);
        for _ in 0..20_000 {
            let words: Vec<AtomicU64> = (0..rng.below(40))
                .map(|_| AtomicU64::new(rng.next()))
                .collect();
            let block = Block {
                words: &words,
                count: 512,
                cluster_bits: 9 + rng.below(13) as u32,
            };
            let most = 1 + rng.below(600) as usize;
            let (_, len) = block.run(rng.below(600) as usize, most);
            assert!((1..=most).contains(&len));
        }
    }
}
