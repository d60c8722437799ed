//! The bits of one bitmap, in memory: pages, of which those with no bit set or with all take none.

use crate::qcow2::check::BITMAP_BYTES_MAX;
use block::{Error, Result};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bits of a word.
const WORD: u64 = 64;
/// Words of a page: 4 KiB.
const PAGE_WORDS: usize = 512;
/// Bits of a page.
const PAGE: u64 = PAGE_WORDS as u64 * WORD;
/// Bits of a [piece](Bits::piece), 4 MiB of them: at least two clusters of a bitmap's data.
pub(super) const PIECE: u64 = 1 << 25;

/// A bit for each `2^granularity_bits` bytes of a disk, or of a part of it, the first at its start.
///
/// Bits are set from any thread and without ordering anything else: who reads them has met all who set them before.
/// Only the first bit of a page takes a lock. Memory: 4 KiB for each page that has bits of both kinds, and 32 bytes for
/// each page (at most 4 MiB).
#[derive(Debug)]
pub struct Bits {
    granularity_bits: u32,
    /// Bytes of the disk. They begin where a page of the whole disk's does.
    range: Range<u64>,
    pages: Vec<Page>,
}

/// A page's bits.
#[derive(Debug, Default)]
struct Page {
    /// Each bit that the disk has is set, whatever `words` say.
    full: AtomicBool,
    /// Absent where none was set one by one. Bits that the disk does not have are never set.
    words: OnceLock<Box<[AtomicU64; PAGE_WORDS]>>,
}

/// What is known of a page without a look at its bits.
enum Seen<'p> {
    Zeros,
    Ones,
    Words(&'p [AtomicU64; PAGE_WORDS]),
}

impl Page {
    fn seen(&self) -> Seen<'_> {
        match self.words.get() {
            _ if self.full.load(Ordering::Relaxed) => Seen::Ones,
            Some(words) => Seen::Words(words),
            None => Seen::Zeros,
        }
    }

    /// Sets the bits of `mask` in word `at`.
    #[inline]
    fn set(&self, at: usize, mask: u64) {
        if self.full.load(Ordering::Relaxed) {
            return;
        }
        let none = || Box::new([const { AtomicU64::new(0) }; PAGE_WORDS]);
        // Most writes go where others went before: no need to take the line from other cores.
        if let Some(word) = self.words.get_or_init(none).get(at)
            && word.load(Ordering::Relaxed) & mask != mask
        {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    fn set_all(&self) {
        self.full.store(true, Ordering::Relaxed);
    }
}

/// What a cluster of a bitmap's data holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Zeros,
    /// All bits of the cluster are set (bits that the disk does not have must be zeros).
    Ones,
    Mixed,
}

impl Bits {
    /// No bit set, for a disk of `size` bytes.
    ///
    /// # Errors
    ///
    /// `Invalid` where the bits would take more than 512 MiB.
    pub fn new(size: u64, granularity_bits: u32) -> Result<Self> {
        check_bytes(bytes_needed(size, granularity_bits))?;
        Ok(Self::of(0..size, granularity_bits))
    }

    /// Piece `nth` of those of a disk of `size` bytes, no bit set: [`PIECE`] bits, or what is left of them.
    pub(super) fn piece(nth: u64, size: u64, granularity_bits: u32) -> Self {
        let bytes = PIECE << granularity_bits;
        let start = nth.saturating_mul(bytes).min(size);
        Self::of(
            start..start.saturating_add(bytes).min(size),
            granularity_bits,
        )
    }

    /// At most 128 Ki pages.
    fn of(range: Range<u64>, granularity_bits: u32) -> Self {
        let bytes = bytes_needed(range.end - range.start, granularity_bits);
        let pages = bytes.div_ceil(PAGE / 8) as usize;
        Self {
            granularity_bits,
            range,
            pages: std::iter::repeat_with(Page::default).take(pages).collect(),
        }
    }

    /// log2 of the bytes of the disk that a bit stands for.
    pub fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    /// Bytes of the disk that there are bits for.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// How many bits there are.
    fn count(&self) -> u64 {
        (self.range.end - self.range.start).div_ceil(1 << self.granularity_bits)
    }

    /// Sets the bits of all that `len` bytes at `at` touch; what there are no bits for is left out.
    #[inline]
    pub fn mark(&self, at: u64, len: u64) {
        let end = at.saturating_add(len).min(self.range.end);
        let at = at.max(self.range.start);
        if at >= end {
            return;
        }
        let first = (at - self.range.start) >> self.granularity_bits;
        let last = (end - 1 - self.range.start) >> self.granularity_bits;
        self.set(first, last);
    }

    /// Sets bits `first..=last`, which the disk has.
    fn set(&self, first: u64, last: u64) {
        // Both are pages of a vector.
        let (from, to) = ((first / PAGE) as usize, (last / PAGE) as usize);
        for (index, page) in (from..).zip(self.pages.get(from..=to).unwrap_or_default()) {
            let there = self.bits_of(index);
            if first <= there.start && last + 1 >= there.end {
                page.set_all();
                continue;
            }
            // Bits of the page.
            let first = first.max(there.start) - there.start;
            let last = last.min(there.end - 1) - there.start;
            for at in first / WORD..=last / WORD {
                let mut mask = u64::MAX;
                if at == first / WORD {
                    mask &= u64::MAX << (first % WORD);
                }
                if at == last / WORD {
                    mask &= u64::MAX >> (WORD - 1 - last % WORD);
                }
                page.set(at as usize, mask);
            }
        }
    }

    /// The bits that the disk has in page `index`.
    fn bits_of(&self, index: usize) -> Range<u64> {
        let start = index as u64 * PAGE;
        start..(start + PAGE).min(self.count())
    }

    /// Sets all bits.
    pub fn mark_all(&self) {
        self.mark(self.range.start, self.range.end - self.range.start);
    }

    /// The first run of bytes at or behind `at` whose bits are set, as start and end;
    /// neither passes the end of the disk.
    pub fn next_dirty(&self, at: u64) -> Option<(u64, u64)> {
        let Range { start, end } = self.range;
        // Within the last bit, and behind the disk, there is nothing left.
        if at >= end {
            return None;
        }
        let first = self.find(at.saturating_sub(start) >> self.granularity_bits, true)?;
        let behind = self.find(first, false).unwrap_or(self.count());
        let byte = |bit: u64| start + (bit << self.granularity_bits);
        Some((byte(first).max(at), byte(behind).min(end)))
    }

    /// The first bit at or behind `bit` that is set, or clear.
    fn find(&self, bit: u64, set: bool) -> Option<u64> {
        let mut bit = bit;
        while let Some(page) = usize::try_from(bit / PAGE)
            .ok()
            .and_then(|index| self.pages.get(index))
        {
            match page.seen() {
                Seen::Ones if set => break,
                Seen::Zeros if !set => break,
                Seen::Words(words) => {
                    if let Some(found) = find_in(words, bit % PAGE, set) {
                        bit = bit - bit % PAGE + found;
                        break;
                    }
                }
                _ => {}
            }
            bit = (bit / PAGE + 1) * PAGE;
        }
        Some(bit).filter(|bit| *bit < self.count())
    }

    /// Bytes of the disk whose bits are set.
    pub fn dirty_bytes(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        let pages = self.pages.iter().enumerate();
        let set: u64 = pages
            .map(|(index, page)| match page.seen() {
                Seen::Zeros => 0,
                Seen::Ones => {
                    let there = self.bits_of(index);
                    there.end - there.start
                }
                Seen::Words(words) => words.iter().map(ones).sum(),
            })
            .sum();
        let bytes = set << self.granularity_bits;
        // The last bit may stand for less.
        let last = self.count().saturating_sub(1);
        match self.find(last, true) {
            Some(_) => {
                let all = self.range.end - self.range.start;
                bytes - ((self.count() << self.granularity_bits) - all)
            }
            None => bytes,
        }
    }

    /// Sets the bits of all that has a bit in `other`, whatever granularity and part of the disk that has.
    pub fn merge(&self, other: &Bits) {
        if self.granularity_bits != other.granularity_bits {
            return self.merge_runs(other, self.range());
        }
        // Those of the same granularity have pages that begin at the same places.
        let page_bytes = PAGE << self.granularity_bits;
        let start = self.range.start.max(other.range.start);
        let end = self.range.end.min(other.range.end);
        for at in (start..end.max(start)).step_by(page_bytes as usize) {
            let page = |bits: &Bits| ((at - bits.range.start) / page_bytes) as usize;
            let (to, from) = (page(self), page(other));
            let bits = |range: Range<u64>| range.end - range.start;
            let there = bits(other.bits_of(from));
            let words = match other.pages.get(from).map(Page::seen) {
                None | Some(Seen::Zeros) => continue,
                Some(Seen::Ones) => {
                    self.mark(at, there << self.granularity_bits);
                    continue;
                }
                Some(Seen::Words(words)) => words,
            };
            // Where this disk ends before, it has no place for all of them.
            if bits(self.bits_of(to)) < there {
                self.merge_runs(other, at..at + page_bytes);
                continue;
            }
            let Some(to) = self.pages.get(to) else {
                continue;
            };
            for (at, word) in words.iter().enumerate() {
                match word.load(Ordering::Relaxed) {
                    0 => {}
                    word => to.set(at, word),
                }
            }
        }
    }

    /// The same, run by run, of what `other` has in `range`.
    fn merge_runs(&self, other: &Bits, range: Range<u64>) {
        let mut at = range.start;
        while let Some((start, end)) = other.next_dirty(at).filter(|run| run.0 < range.end) {
            self.mark(start, end.min(range.end) - start);
            at = end;
        }
    }

    /// The bits that the disk has in cluster `index`, counted from their beginning, of the bitmap's data.
    fn part(&self, index: u64, cluster: u64) -> Range<u64> {
        let bits = cluster * 8;
        let start = index.saturating_mul(bits).min(self.count());
        start..start.saturating_add(bits).min(self.count())
    }

    /// Sets the bits that cluster `index` of the data has in `bytes`, a cluster. Bits that the disk does
    /// not have are dropped.
    pub(super) fn take_in(&self, index: u64, bytes: &[u8]) {
        let there = self.part(index, bytes.len() as u64);
        // A cluster's are whole words. Those in a row that are all ones come as one range, so that pages of them take
        // no memory.
        let mut ones: Option<Range<u64>> = None;
        for (bit, raw) in there.clone().step_by(64).zip(bytes.as_chunks().0) {
            let end = (bit + WORD).min(there.end);
            let mask = u64::MAX >> (WORD - (end - bit));
            let word = u64::from_le_bytes(*raw) & mask;
            if word == mask {
                ones.get_or_insert(bit..end).end = end;
                continue;
            }
            if let Some(ones) = ones.take() {
                self.set(ones.start, ones.end - 1);
            }
            if word != 0
                && let Some(page) = self.pages.get((bit / PAGE) as usize)
            {
                page.set((bit % PAGE / WORD) as usize, word);
            }
        }
        if let Some(ones) = ones {
            self.set(ones.start, ones.end - 1);
        }
    }

    /// Sets all bits of cluster `index` of the data.
    pub(super) fn fill(&self, index: u64, cluster: u64) {
        let there = self.part(index, cluster);
        if !there.is_empty() {
            self.set(there.start, there.end - 1);
        }
    }

    /// Cluster `index` of the data, `out.len()` bytes.
    pub(super) fn put_out(&self, index: u64, out: &mut [u8]) -> Content {
        let cluster = out.len() as u64;
        out.fill(0);
        let there = self.part(index, cluster);
        let mut ones = 0;
        for (bit, raw) in there.clone().step_by(64).zip(out.as_chunks_mut().0) {
            let page = self.pages.get((bit / PAGE) as usize).map(Page::seen);
            let word = match page {
                None | Some(Seen::Zeros) => continue,
                Some(Seen::Ones) => u64::MAX >> (WORD - (there.end - bit).min(WORD)),
                Some(Seen::Words(words)) => words
                    .get((bit % PAGE / WORD) as usize)
                    .map_or(0, |word| word.load(Ordering::Relaxed)),
            };
            ones += u64::from(word.count_ones());
            *raw = word.to_le_bytes();
        }
        match ones {
            0 => Content::Zeros,
            ones if ones == cluster * 8 => Content::Ones,
            _ => Content::Mixed,
        }
    }
}

/// The first bit of a page at or behind `bit` that is set, or clear.
fn find_in(words: &[AtomicU64; PAGE_WORDS], bit: u64, set: bool) -> Option<u64> {
    let first = (bit / WORD) as usize;
    let mut mask = u64::MAX << (bit % WORD);
    for (index, word) in words.iter().enumerate().skip(first) {
        let word = word.load(Ordering::Relaxed);
        let word = if set { word } else { !word } & mask;
        if word != 0 {
            return Some(index as u64 * WORD + u64::from(word.trailing_zeros()));
        }
        mask = u64::MAX;
    }
    None
}

/// Fails where a bitmap would have more than 512 MiB.
pub(super) fn check_bytes(bytes: u64) -> Result<()> {
    match bytes > BITMAP_BYTES_MAX {
        true => Err(Error::invalid(format!(
            "a bitmap of {bytes} bytes, the limit is {BITMAP_BYTES_MAX}: take a coarser granularity"
        ))),
        false => Ok(()),
    }
}

/// Bytes of the bits of a disk of `size` bytes.
pub(super) fn bytes_needed(size: u64, granularity_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The plainest bitmap: a byte of memory for each bit.
    fn model(size: u64, bits: u32, marks: &[(u64, u64)]) -> Vec<bool> {
        let mut model = vec![false; size.div_ceil(1 << bits) as usize];
        for (at, len) in marks {
            for byte in (*at..(at + len).min(size))
                .step_by(1 << 9)
                .chain((*len > 0 && *at < size).then(|| (at + len).min(size) - 1))
            {
                model[(byte >> bits) as usize] = true;
            }
        }
        model
    }

    fn seen(bits: &Bits) -> Vec<bool> {
        let mut seen = vec![false; bits.count() as usize];
        let mut at = 0;
        while let Some((start, end)) = bits.next_dirty(at) {
            assert!(
                start >= at && end > start && end <= bits.range.end,
                "{start} {end}"
            );
            for byte in (start..end).step_by(1 << bits.granularity_bits) {
                seen[(byte >> bits.granularity_bits) as usize] = true;
            }
            at = end;
        }
        seen
    }

    fn made(size: u64, granularity_bits: u32, marks: &[(u64, u64)]) -> Bits {
        let bits = Bits::new(size, granularity_bits).unwrap();
        for (at, len) in marks {
            bits.mark(*at, *len);
        }
        bits
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn bits_are_those_of_a_plain_model(
            size in 1u64..600_000,
            (a, b) in (9u32..17, 9u32..17),
            marks in prop::collection::vec((0u64..620_000, 0u64..200_000), 0..12),
            more in prop::collection::vec((0u64..620_000, 0u64..90_000), 0..6),
            cluster_bits in 9u32..12,
        ) {
            let bits = made(size, a, &marks);
            let plain = model(size, a, &marks);
            prop_assert_eq!(seen(&bits), plain.clone());
            let dirty: u64 = plain.iter().enumerate().filter(|(_, set)| **set).map(|(n, _)| {
                (((n as u64) + 1) << a).min(size) - ((n as u64) << a)
            }).sum();
            prop_assert_eq!(bits.dirty_bytes(), dirty);

            // Through clusters of data, and back.
            let again = Bits::new(size, a).unwrap();
            let mut cluster = vec![0; 1 << cluster_bits];
            for index in 0..bytes_needed(size, a).div_ceil(1 << cluster_bits) {
                match bits.put_out(index, &mut cluster) {
                    Content::Zeros => prop_assert!(cluster.iter().all(|b| *b == 0)),
                    Content::Ones => again.fill(index, 1 << cluster_bits),
                    Content::Mixed => again.take_in(index, &cluster),
                }
                for (n, byte) in cluster.iter().enumerate() {
                    for bit in 0..8 {
                        let number = (index as usize * cluster.len() + n) * 8 + bit;
                        let want = plain.get(number).copied().unwrap_or(false);
                        prop_assert_eq!(byte >> bit & 1 == 1, want);
                    }
                }
            }
            prop_assert_eq!(seen(&again), plain);

            // What another one has, whatever a bit of that stands for.
            let other = made(size, b, &more);
            bits.merge(&other);
            let mut want = model(size, a, &marks);
            let coarse = model(size, b, &more);
            for (n, set) in coarse.iter().enumerate().filter(|(_, set)| **set) {
                assert!(*set);
                let start = (n as u64) << b;
                let end = (start + (1 << b)).min(size);
                for bit in start >> a..=(end - 1) >> a {
                    want[bit as usize] = true;
                }
            }
            prop_assert_eq!(seen(&bits), want);
        }
    }

    #[test]
    fn too_many_bits_are_refused() {
        let error = Bits::new(1 << 42, 9).unwrap_err();
        assert!(error.to_string().contains("512") || error.to_string().contains("536870912"));
        // A disk without bytes has no bits, and that harms nobody.
        let none = Bits::new(0, 16).unwrap();
        none.mark_all();
        none.fill(0, 512);
        assert_eq!((none.dirty_bytes(), none.next_dirty(0)), (0, None));
    }

    #[test]
    fn pages_of_one_kind_take_no_memory() {
        let held = |bits: &Bits| {
            let words = bits.pages.iter().filter(|page| page.words.get().is_some());
            words.count()
        };
        // 8 pages, and some.
        let size = (8 * PAGE + 100) << 9;
        let all = made(size, 9, &[(0, size)]);
        assert_eq!((held(&all), all.dirty_bytes()), (0, size));
        let some = made(size, 9, &[(PAGE << 9, (PAGE << 9) + 1)]);
        assert_eq!((held(&some), some.dirty_bytes()), (1, (PAGE + 1) << 9));
        // Through clusters of data of two pages and a half each, and from bitmap to bitmap.
        let (read, merged) = (made(size, 9, &[]), made(size, 9, &[]));
        let mut cluster = vec![0; 5 * (PAGE as usize / 8) / 2];
        for index in 0..4 {
            all.put_out(index, &mut cluster);
            read.take_in(index, &cluster);
        }
        merged.merge(&all);
        merged.merge(&some);
        for bits in [&read, &merged] {
            assert_eq!(bits.dirty_bytes(), size);
        }
        // Where clusters meet within a page its bits come by halves.
        assert_eq!((held(&read), held(&merged)), (2, 0));
    }

    #[test]
    fn bits_behind_the_disk_are_dropped() {
        let bits = Bits::new(100 << 9, 9).unwrap();
        bits.take_in(0, &[0xff; 512]);
        assert_eq!(bits.dirty_bytes(), 100 << 9);
        assert_eq!(bits.next_dirty(0), Some((0, 100 << 9)));
    }

    /// What a piece takes of a whole disk's bits, and gives to another one's, that has another end perhaps.
    #[test]
    fn pieces_are_parts_of_the_whole() {
        let piece = PIECE << 9;
        let size = 2 * piece + (PAGE << 9) + 5000;
        let marks = [
            (0, 700),
            (piece - 512, 1024),
            (piece + ((3 * PAGE) << 9), (2 * PAGE) << 9),
            (size - 9000, 9000),
        ];
        let whole = made(size, 9, &marks);
        for (granularity_bits, end) in [(9, size), (9, size - 6000), (9, size + 6000), (12, size)] {
            let got = made(end, granularity_bits, &[]);
            let mut dirty = 0;
            for nth in 0..3 {
                let part = Bits::piece(nth, size, 9);
                part.merge(&whole);
                dirty += part.dirty_bytes();
                assert!(part.next_dirty(0).unwrap().0 >= nth * piece);
                got.merge(&part);
            }
            assert_eq!(dirty, whole.dirty_bytes());
            let want = made(end, granularity_bits, &marks);
            assert_eq!(seen(&got), seen(&want), "{granularity_bits} {end}");
        }
        assert_eq!(Bits::piece(3, size, 9).next_dirty(0), None);
    }
}
