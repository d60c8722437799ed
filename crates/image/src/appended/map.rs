//! Reading the map: where a guest range's bytes are; and loading what is lacking of it.

use super::Appended;
use super::state::{Places, State};
use crate::metadata::cache::Owner;
use crate::metadata::tables::{Entries, Slot, Tables};
use crate::metadata::{
    Ask, FRESH, FRESH_ZEROED, Growing, Halt, Layout, Place, STEPS_MAX, Walk, ZERO,
};
use crate::{Compressed, Extent, ExtentKind, Load, Need, Plan, Step};
use block::{Error, GuestOffset, HostOffset, Result};
use std::sync::atomic::Ordering;

/// In memory only, in L2 entries: the cluster holds a table, or lies behind the end that the file had at open and is not
/// this entry's. No sound entry has this bit: those of clusters are multiples of sectors.
pub(super) const OVERLAP: u64 = 4;
/// In memory only, in L2 entries: compressed bytes that the file does not have.
const STRAY: u64 = 1 << 62 | OVERLAP;
/// In L2 entries of formats that have compressed clusters.
const COMPRESSED: u64 = 1 << 63;
/// In memory only, in L1 entries: low bits are set in the file. (Bits 0 and 1 are our marks.)
pub(crate) const L1_UNSOUND: u64 = 4;

/// What an L2 entry says (specification: "Data cluster offsets").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Unallocated,
    Zero,
    /// A cluster of data at this offset of the file.
    Data(u64),
    /// `len` compressed bytes at this offset of the file, at any alignment.
    Compressed {
        offset: u64,
        len: u64,
    },
}

/// Why an entry is not sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    Misaligned,
    Outside,
    Overlap,
    /// Compressed bytes, but none.
    Nothing,
}

impl Bad {
    fn text(self) -> &'static str {
        match self {
            Bad::Misaligned => "points between clusters",
            Bad::Outside => "points into the header or the tables, or behind the end of the file",
            Bad::Overlap => "points at a cluster that holds a table",
            Bad::Nothing => "is of a compressed cluster of 0 bytes",
        }
    }
}

impl Walk for Appended {
    type Bad = Bad;

    fn name(&self) -> &str {
        &self.name
    }

    #[inline]
    fn layout(&self) -> &Layout {
        &self.layout
    }

    #[inline]
    fn tables(&self) -> &Tables {
        &self.tables
    }

    #[inline]
    fn decode_l1(&self, raw: u64) -> Result<u64, Bad> {
        let offset = raw & !(FRESH | FRESH_ZEROED);
        if offset == 0 {
            return Ok(0);
        }
        if offset & (self.form.table_align(self.layout.cluster()) - 1) != 0 {
            return Err(Bad::Misaligned);
        }
        let end = offset.checked_add(self.table_bytes());
        let file_end = self.end.load(Ordering::Acquire);
        if offset < self.tables_from || end.is_none_or(|end| end > file_end) {
            return Err(Bad::Outside);
        }
        Ok(offset)
    }

    #[inline]
    fn feed_slice(&self, run: &mut Growing, entries: Entries<'_>) -> Result<bool, Bad> {
        let g = &self.layout;
        let mut at = (run.next() >> g.cluster_bits) as usize & (g.slice_entries() - 1);
        while at < g.slice_entries() {
            let skip = run.next() & (g.cluster() - 1);
            let left = run.left();
            // Clusters that the rest touches, one at least.
            let most = ((skip + left - 1) >> g.cluster_bits) + 1;
            let most = most.min(g.slice_entries() as u64) as usize;
            let (entry, count) = self.run_at(&entries, at, most);
            if count == 0 {
                return Ok(false);
            }
            let mut room = (((count as u64) << g.cluster_bits) - skip).min(left);
            let kind = match entry {
                Ok(Entry::Unallocated) => ExtentKind::Unallocated,
                Ok(Entry::Zero) => ExtentKind::Zero { host: None },
                Ok(Entry::Data(host)) => {
                    if self.cut_off {
                        room = room.min(self.there(host + skip));
                    }
                    match room {
                        0 if run.len() == 0 => return Err(Bad::Outside),
                        0 => return Ok(false),
                        _ => ExtentKind::Data {
                            file: self.file,
                            offset: HostOffset(host + skip),
                        },
                    }
                }
                Ok(Entry::Compressed { offset, len }) => ExtentKind::Compressed(Compressed {
                    file: self.file,
                    offset: HostOffset(offset),
                    // All are less than a cluster, or that.
                    len: len as u32,
                    unpacked_len: g.cluster() as u32,
                    skip: skip as u32,
                    packing: 0,
                    lasting: true,
                }),
                Err(bad) if run.len() == 0 => return Err(bad),
                Err(_) => return Ok(false),
            };
            if !run.feed(kind, room) || run.left() == 0 {
                return Ok(false);
            }
            at += count;
        }
        Ok(true)
    }

    fn feed_locked(&self, run: &mut Growing, place: &Place) -> Result<Step<Result<bool, Bad>>> {
        let mut st = self.lock();
        let seen = self
            .l2_entries(&mut st, place)
            .map(|entries| self.feed_slice(run, entries));
        st.step(seen)
    }

    #[cold]
    fn bad_l1(&self, index: usize, bad: Bad) -> Error {
        let at = self.l1_offset + ((index as u64 * 8) >> self.form.shift());
        let (entry, _) = self.form.names();
        Error::corrupt(format!(
            "{}: {entry} {index} at {at:#x} {}",
            self.name,
            bad.text()
        ))
    }

    #[cold]
    fn bad_l2(&self, cluster: u64, bad: Bad) -> Error {
        let g = &self.layout;
        let table = self.place(cluster).raw & !(FRESH | FRESH_ZEROED);
        let within = (cluster & ((1 << g.l2_bits()) - 1)) * 8;
        let at = table.wrapping_add(within >> self.form.shift());
        let (_, entry) = self.form.names();
        Error::corrupt(format!(
            "{}: {entry} at {at:#x} (guest offset {:#x}) {}",
            self.name,
            cluster << g.cluster_bits,
            bad.text()
        ))
    }
}

impl Appended {
    /// Bytes of an L2 table in the file.
    pub(super) fn table_bytes(&self) -> u64 {
        (1 << self.layout.table_bits) >> self.form.shift()
    }

    /// What L2 entry `raw` says.
    #[inline]
    pub(super) fn decode(&self, raw: u64) -> Result<Entry, Bad> {
        match raw {
            0 => return Ok(Entry::Unallocated),
            ZERO => return Ok(Entry::Zero),
            _ => {}
        }
        if raw & COMPRESSED != 0 && self.form.has_compressed() {
            return self.decode_compressed(raw);
        }
        match raw & (self.align - 1) {
            0 => {}
            _ if !self.is_marked(raw) => return Err(Bad::Misaligned),
            _ if raw - OVERLAP < self.end_at_open => return Err(Bad::Overlap),
            _ => return Err(Bad::Outside),
        }
        let end = self.end.load(Ordering::Acquire);
        let outside = raw < self.head_end || raw >= end;
        if outside || end - raw < self.layout.cluster() && !self.cut_off {
            return Err(Bad::Outside);
        }
        Ok(Entry::Data(raw))
    }

    /// Whether L2 entry `raw` is that of a cluster with the mark [`OVERLAP`].
    pub(super) fn is_marked(&self, raw: u64) -> bool {
        let compressed = raw & COMPRESSED != 0 && self.form.has_compressed();
        !compressed && raw & (self.align - 1) == OVERLAP
    }

    /// The same of a compressed cluster: below bit 63 the length in as many bits as a cluster's size has, and the offset.
    fn decode_compressed(&self, raw: u64) -> Result<Entry, Bad> {
        let shift = 63 - self.layout.cluster_bits;
        let offset = raw & ((1 << shift) - 1);
        let len = (raw & !COMPRESSED) >> shift;
        if len == 0 {
            return Err(Bad::Nothing);
        }
        if offset < self.head_end || offset + len > self.end.load(Ordering::Acquire) {
            return Err(Bad::Outside);
        }
        Ok(Entry::Compressed { offset, len })
    }

    /// How many bytes the file has from `host` on.
    fn there(&self, host: u64) -> u64 {
        self.end.load(Ordering::Acquire).saturating_sub(host)
    }

    /// Entry `at`, and for how many it goes on: at least 1, counted up to `most`. 0 behind the slice's end.
    #[inline]
    fn run_at(&self, entries: &Entries<'_>, at: usize, most: usize) -> (Result<Entry, Bad>, usize) {
        let (raw, count) = entries.run(at, most);
        let entry = self.decode(raw);
        let count = match entry {
            // Clusters that follow one another may go on behind the end of the file.
            Ok(Entry::Data(host)) => {
                let left = match self.cut_off {
                    true => self.there(host).div_ceil(self.layout.cluster()),
                    false => self.there(host) >> self.layout.cluster_bits,
                };
                count.min(usize::try_from(left).unwrap_or(count))
            }
            // Each has bytes of its own.
            Ok(Entry::Compressed { .. }) => count.min(1),
            _ => count,
        };
        (entry, count)
    }

    /// The entries of an L2 slice whose table exists.
    fn l2_entries(&self, st: &mut State, place: &Place) -> Ask<Entries<'_>> {
        if let Some(entries) = self.tables.entries(place.slice) {
            return Ok(entries);
        }
        let g = &self.layout;
        let span = place.slice & !(g.span_slices() - 1);
        let owner = Owner::L2(span);
        if st.cache.is_loading(owner) {
            return Err(Halt::Wait(owner.key()));
        }
        // All of the span while nothing has to leave for it.
        let (first, count) = match st.cache.vacant() as u64 > g.span_slices() {
            // At most 64.
            true => (span, g.span_slices() as u32),
            false => (place.slice, 1),
        };
        let (host, raw) = self.l2_host(first, place)?;
        if raw & FRESH != 0 {
            // What is not in the cache was never written.
            st.cache.move_slot(&self.tables, place.slice, Slot::Empty);
            return self.tables.entries(place.slice).ok_or(Halt::Busy);
        }
        st.cache
            .start_span(&self.tables, g, span, place.slice, (first, count), host)?;
        Err(Halt::Need(Need::Load(Load {
            key: owner.key(),
            file: self.file,
            offset: HostOffset(host),
            // 64 KiB of memory, or one slice.
            len: (count << g.slice_bits) >> self.form.shift(),
        })))
    }

    /// Where a slice of the table of `place` is in the file, and its table's L1 entry. Under the
    /// lock: a flush may have ended since `place` was made.
    fn l2_host(&self, slice: u64, place: &Place) -> Ask<(u64, u64)> {
        let g = &self.layout;
        let raw = self.place(slice << g.slice_entry_bits()).raw;
        let table = self
            .decode_l1(raw)
            .map_err(|bad| self.bad_l1(place.l1, bad))?;
        let within = slice & ((1 << g.slices_per_table_bits()) - 1);
        let within = (within << g.slice_bits) >> self.form.shift();
        Ok((table + within, raw))
    }

    /// The frame of an L2 slice whose table exists, to change it there.
    pub(super) fn l2_frame(&self, st: &mut State, place: &Place) -> Ask<u32> {
        if let Some(frame) = st.cache.find(&self.tables, Owner::L2(place.slice)) {
            return Ok(frame);
        }
        self.l2_entries(st, place)?;
        if let Some(frame) = st.cache.find(&self.tables, Owner::L2(place.slice)) {
            return Ok(frame);
        }
        let (host, _) = self.l2_host(place.slice, place)?;
        st.cache
            .unpack(&self.tables, &self.layout, place.slice, host)
    }

    /// Takes the bytes of loaded slices in.
    pub(super) fn end_loading(&self, st: &mut State, load: &Load, bytes: &[u8]) -> Result<()> {
        let unknown = || Error::invalid(format!("{}: a load nobody asked for", self.name));
        let Some(Owner::L2(span)) = Owner::of_key(load.key) else {
            return Err(unknown());
        };
        let (cache, places, judged) = (&mut st.cache, &st.places, &mut st.judged);
        let guard = self.read_only.is_none();
        let form = self.form;
        let known = cache.end_load_span(
            &self.tables,
            &self.layout,
            (span, load.offset.0),
            &mut st.words,
            |words, slice, _, at, len| {
                words.clear();
                let (at, len) = (at >> form.shift(), len >> form.shift());
                form.decode(bytes.get(at..at + len).unwrap_or_default(), words);
                let host = load.offset.0 + at as u64;
                if guard {
                    self.judge_slice(words, (slice, host), places, judged);
                }
                host
            },
        );
        known.then_some(()).ok_or_else(unknown)
    }

    /// Marks what is not sound among the entries of the slice `which` (its number and where it is in the file).
    fn judge_slice(
        &self,
        words: &mut [u64],
        which: (u64, u64),
        places: &Places,
        judged: &mut [u64],
    ) {
        let (slice, host) = which;
        let bit = 1u64 << (slice % 64);
        let word = judged.get_mut((slice / 64) as usize);
        // A table behind the old end is one that we made, of zeros.
        let ours = host >= self.end_at_open || word.as_ref().is_some_and(|w| **w & bit != 0);
        let mut sound = true;
        for raw in words {
            let (judgement, stray) = self.judge(places, *raw, ours);
            *raw = judgement;
            sound &= !stray;
        }
        if sound {
            if let Some(word) = word {
                *word |= bit;
            }
        } else if !self.damaged.swap(true, Ordering::AcqRel) {
            tracing::error!(
                image = self.name,
                "the image is damaged: no more changes to it"
            );
        }
    }

    /// An L2 entry as it was read, with a mark where a write through it would destroy the image; and whether it points
    /// nowhere, which ends all changes. Only in a slice of `ours` may it point behind the end at open: wherever the file
    /// ends now, nobody else was given a place there.
    fn judge(&self, places: &Places, raw: u64, ours: bool) -> (u64, bool) {
        let behind = raw.saturating_add(self.layout.cluster()) > self.end_at_open && !self.cut_off;
        match self.decode(raw) {
            Ok(Entry::Data(_)) if behind && !ours => (raw | OVERLAP, true),
            Ok(Entry::Data(host)) if self.touches_table(places, host) => (raw | OVERLAP, false),
            // Nothing is written through it; but whatever the file gets there would be read as its bytes.
            Ok(Entry::Compressed { offset, len }) if !ours && offset + len > self.end_at_open => {
                (STRAY, true)
            }
            Err(Bad::Outside) if raw & COMPRESSED != 0 && self.form.has_compressed() => {
                (STRAY, true)
            }
            // Marked, lest the file grows over it.
            Err(Bad::Outside) if behind => (raw | OVERLAP, true),
            // The file's own bit, which a flush would take for ours.
            Err(Bad::Outside | Bad::Overlap) => (raw, true),
            _ => (raw, false),
        }
    }

    /// Whether the cluster at `host`, which need not begin where others do, shares bytes with a table.
    fn touches_table(&self, places: &Places, host: u64) -> bool {
        let bits = self.layout.cluster_bits;
        let last = (host + self.layout.cluster() - 1) >> bits;
        places.holds(host >> bits) || places.holds(last)
    }

    /// Gives up a load that nobody will carry out.
    pub(super) fn drop_load(&self, st: &mut State, load: &Load) {
        if let Some(owner) = Owner::of_key(load.key) {
            st.cache.cancel_load(&self.tables, owner, load.offset.0);
        }
    }

    /// The plan for a write into clusters that are there already. `None` when the first is not, or not in
    /// memory.
    #[inline]
    pub(super) fn plan_in_place(&self, at: GuestOffset, len: u64) -> Option<Plan> {
        let g = &self.layout;
        let mut run = Growing::new(at.0, len);
        for _ in 0..STEPS_MAX {
            let place = self.place(run.next() >> g.cluster_bits);
            if !matches!(self.decode_l1(place.raw), Ok(1..)) {
                break;
            }
            let start = run;
            let seen = self.tables.read(place.slice, |entries| {
                run = start;
                self.feed_data(&mut run, entries)
            });
            match seen {
                Some(true) => {}
                Some(false) => break,
                None => {
                    run = start;
                    break;
                }
            }
        }
        match run.extent() {
            Extent {
                len: len @ 1..,
                kind: ExtentKind::Data { file, offset },
            } => Some(Plan::InPlace { file, offset, len }),
            _ => None,
        }
    }

    /// As [`feed_slice`](Self::feed_slice), of clusters of data only.
    #[inline]
    fn feed_data(&self, run: &mut Growing, entries: Entries<'_>) -> bool {
        let more = self.feed_slice(run, entries);
        matches!(more, Ok(true)) && matches!(run.extent().kind, ExtentKind::Data { .. })
    }
}
