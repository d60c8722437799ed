//! The metadata cache: which slice is in which frame, what is dirty, what may leave.
//!
//! A slice is absent, loading, or present; a present one is clean, dirty (changed since the last
//! flush began) or in flight (being written by the flush under way), and perhaps pinned. Only clean
//! and unpinned ones leave, by the clock: the hand passes over a frame that was used since its last visit.
//! All of this happens under the image's lock.
//!
//! ```text
//!              load                       a change
//!   absent ───────────▶ packed in a page ──────────▶ frame of its own ─┐ a change, a flush
//!      ▲                    │       ▲                    │       ▲─────┘
//!      └──── evicted ◀──────┘       └──── clean, unused ─┘
//! ```
//!
//! L2 slices are packed as they are loaded and read in that form (`packed`, `pages`); what would not get
//! small enough keeps a frame. So the budget covers many times what it would as plain tables, and
//! while there is room a miss brings in the whole L2 table, or 64 KiB of it, in one read. Refcounts
//! are only looked at to be changed, and always have frames.

mod loads;

use super::layout::Layout;
use super::packed::{Packer, Shape};
use super::pages::{Page, Pages};
use super::tables::{Slot, Tables};
use super::{Ask, Halt};
use crate::{Key, Need};
use block::size;
use std::collections::HashMap;
use std::sync::atomic::Ordering;

/// Most memory of the metadata cache when the user says nothing: as plain tables 512 GiB with 64 KiB clusters;
/// packed, 1 TiB in perfect disorder and many times that in some order. It is taken as it is needed.
pub const CACHE_BYTES_DEFAULT: u64 = 64 << 20;
/// Largest metadata cache.
pub const CACHE_BYTES_MAX: u64 = 4 << 30;
/// Frames that a cache has at least: a plan pins up to five, on top of the half that
/// may be pinned already. Tests use so few that slices come and go all the time.
pub(crate) const FRAMES_MIN: u64 = if cfg!(test) { 16 } else { 64 };

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// A slice of an L2 table: number of the slice in the disk. As a key of loads the first slice of a
    /// span, see [`Layout::span_slices`].
    L2(u64),
    /// A slice of a refcount block: number of the slice, counted from host offset 0.
    Ref(u64),
}

const KEY_KIND: u32 = 60;
const KEY_L2: u64 = 1;
const KEY_REF: u64 = 2;
pub(crate) const KEY_TICKET: u64 = 3 << KEY_KIND;
pub(crate) const KEY_RESERVE: u64 = 4 << KEY_KIND;
pub(crate) const KEY_COPY: u64 = 5 << KEY_KIND;

impl Owner {
    pub(crate) fn key(self) -> Key {
        Key(match self {
            Owner::L2(slice) => KEY_L2 << KEY_KIND | slice,
            Owner::Ref(slice) => KEY_REF << KEY_KIND | slice,
        })
    }

    pub(crate) fn of_key(key: Key) -> Option<Self> {
        let slice = key.0 & ((1 << KEY_KIND) - 1);
        match key.0 >> KEY_KIND {
            KEY_L2 => Some(Owner::L2(slice)),
            KEY_REF => Some(Owner::Ref(slice)),
            _ => None,
        }
    }
}

/// What a frame is for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Holds {
    /// Nothing: it is in `free`.
    #[default]
    Nothing,
    /// One slice, or a load to come.
    Slice(Owner),
    /// Packed slices.
    Page(Page),
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Meta {
    pub(crate) holds: Holds,
    /// Host offset of the slice.
    host: u64,
    loading: bool,
    pins: u32,
    /// Granules changed since the last flush began.
    dirty: u64,
    /// Granules in the flush under way.
    flight: u64,
    /// Whether it is in `changed`.
    listed: bool,
}

impl Meta {
    fn holds_refcounts(&self) -> bool {
        matches!(self.holds, Holds::Slice(Owner::Ref(_)))
    }
}

/// A load of L2 slices under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpanLoad {
    /// First slice that is read, and how many.
    pub(crate) first: u64,
    pub(crate) count: u32,
    /// The one that was asked for.
    pub(crate) wanted: u64,
    /// Host offset of the first.
    pub(crate) host: u64,
    /// Which of them were absent when the load began, bit by bit. Only these are taken from what was
    /// read: the others may have been changed and written since.
    pub(crate) absent: u64,
    /// A frame set aside, so that the one that was asked for has a place.
    pub(crate) frame: u32,
}

/// The part of the cache that the lock guards.
#[derive(Debug)]
pub(crate) struct Cache {
    /// Of the frames that were ever used: the first so many.
    pub(crate) meta: Vec<Meta>,
    /// Frames that there may be.
    capacity: usize,
    /// Frames given back, to be used before any is evicted.
    pub(crate) free: Vec<u32>,
    hand: usize,
    /// Refcount slices that are present or loading.
    index: HashMap<Owner, u32>,
    /// Loads of L2 slices under way, by the first slice of the span.
    spans: HashMap<u64, SpanLoad>,
    /// Frames with dirty or in-flight granules.
    changed: Vec<u32>,
    pinned: usize,
    loading: usize,
    pub(crate) misses: u64,
    /// Steps of the clock's hand.
    pub(crate) steps: u64,
    /// L2 slices that are present.
    pub(crate) present: u64,
    pub(crate) pages: Pages,
    packer: Packer,
    /// A slice's words, on their way from one form to another.
    words: Vec<u64>,
}

/// What a flush takes from one frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Changed {
    pub(crate) frame: u32,
    pub(crate) owner: Owner,
    pub(crate) host: u64,
    pub(crate) granules: u64,
}

impl Cache {
    pub(crate) fn new(frames: usize, geometry: &Layout) -> Self {
        Self {
            meta: Vec::with_capacity(frames),
            capacity: frames,
            free: Vec::with_capacity(frames),
            hand: 0,
            index: HashMap::with_capacity(frames.min(1024)),
            spans: HashMap::with_capacity(64),
            changed: Vec::with_capacity(frames),
            pinned: 0,
            loading: 0,
            misses: 0,
            steps: 0,
            present: 0,
            pages: Pages::new(geometry.slice_words()),
            packer: Packer::default(),
            words: Vec::with_capacity(geometry.slice_words()),
        }
    }

    fn meta(&mut self, frame: u32) -> Option<&mut Meta> {
        self.meta.get_mut(frame as usize)
    }

    /// The frame of a slice that is present in a frame of its own.
    pub(crate) fn find(&self, tables: &Tables, owner: Owner) -> Option<u32> {
        match owner {
            Owner::L2(slice) => match tables.slot(slice) {
                Slot::Frame(frame) => Some(frame),
                _ => None,
            },
            Owner::Ref(_) => {
                let frame = *self.index.get(&owner)?;
                (!self.meta.get(frame as usize)?.loading).then_some(frame)
            }
        }
    }

    /// Whether `owner`'s slice is being loaded; for L2 its span.
    pub(crate) fn is_loading(&self, owner: Owner) -> bool {
        match owner {
            Owner::L2(span) => self.spans.contains_key(&span),
            Owner::Ref(_) => {
                let frame = self.index.get(&owner);
                frame
                    .and_then(|f| self.meta.get(*f as usize))
                    .is_some_and(|m| m.loading)
            }
        }
    }

    /// Whether so much is dirty or pinned that a flush must come first.
    pub(crate) fn crowded(&self) -> bool {
        let frames = self.capacity;
        self.changed.len() > frames - frames / 16 || self.pinned > frames / 2
    }

    /// Whether so much is dirty that a flush should begin, so that nobody has to wait for it.
    pub(crate) fn filling(&self) -> bool {
        self.changed.len() > self.capacity / 2
    }

    /// Whether pins alone crowd it.
    pub(crate) fn pins_crowd(&self) -> bool {
        self.pinned > self.capacity / 2
    }

    fn evictable(meta: &Meta) -> bool {
        meta.pins == 0 && meta.dirty | meta.flight == 0 && !meta.loading
    }

    /// How many frames could be taken now.
    pub(crate) fn available(&self) -> usize {
        self.vacant() + self.meta.iter().filter(|m| Self::evictable(m)).count() - self.free.len()
    }

    /// How many frames could be taken without anything leaving.
    pub(crate) fn vacant(&self) -> usize {
        self.capacity - self.meta.len() + self.free.len()
    }

    /// Frames that were ever used.
    pub(crate) fn frames_used(&self) -> usize {
        self.meta.len()
    }

    /// Says where L2 slice `slice` is.
    pub(crate) fn move_slot(&mut self, tables: &Tables, slice: u64, to: Slot) {
        self.present += u64::from(to != Slot::Absent);
        self.present -= u64::from(tables.slot(slice) != Slot::Absent);
        tables.set_slot(slice, to);
    }

    /// A frame that nothing is in.
    fn take_vacant(&mut self) -> Option<u32> {
        if let Some(frame) = self.free.pop() {
            return Some(frame);
        }
        if self.meta.len() == self.capacity {
            return None;
        }
        self.meta.push(Meta::default());
        Some((self.meta.len() - 1) as u32)
    }

    /// A frame for `owner`, closed to readers. Its words are stale.
    fn take(&mut self, tables: &Tables, geometry: &Layout, owner: Owner, host: u64) -> Ask<u32> {
        let frame = match self.take_vacant() {
            Some(frame) => frame,
            None => self.evict(tables, geometry)?,
        };
        self.dedicate(tables, geometry, frame, owner, host);
        Ok(frame)
    }

    /// Gives `frame`, which is nobody's, to `owner`, closed to readers.
    fn dedicate(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        frame: u32,
        owner: Owner,
        host: u64,
    ) {
        if let Some(f) = tables.frames.get(frame as usize) {
            f.make(geometry.slice_words());
            f.close();
        }
        if let Some(meta) = self.meta(frame) {
            *meta = Meta {
                holds: Holds::Slice(owner),
                host,
                ..Meta::default()
            };
        }
    }

    /// Makes a frame vacant.
    pub(crate) fn give_back(&mut self, frame: u32) {
        if let Some(meta) = self.meta(frame) {
            *meta = Meta::default();
        }
        self.free.push(frame);
    }

    fn evict(&mut self, tables: &Tables, geometry: &Layout) -> Ask<u32> {
        // Two rounds: the first may only clear the marks of use, or pack what was not used.
        for _ in 0..2 * self.meta.len() {
            let at = self.hand;
            self.steps += 1;
            self.hand = (at + 1) % self.meta.len().max(1);
            let (Some(meta), Some(frame)) = (self.meta.get(at), tables.frames.get(at)) else {
                continue;
            };
            if !Self::evictable(meta) || frame.used.swap(false, Ordering::Relaxed) {
                continue;
            }
            // At most 2^25 frames.
            let at = at as u32;
            match meta.holds {
                Holds::Nothing => continue,
                Holds::Page(page) => self.drop_page(tables, at, page),
                Holds::Slice(Owner::L2(slice)) => {
                    if !self.compact(tables, geometry, slice, at) {
                        continue;
                    }
                }
                Holds::Slice(owner) => drop(self.index.remove(&owner)),
            }
            return Ok(at);
        }
        // Everything is dirty, pinned or loading: one of these ends soon.
        if !self.changed.is_empty() {
            return Err(Halt::Need(Need::Commit));
        }
        let loading = self.meta.iter().find(|m| m.loading).map(|m| m.holds);
        match loading {
            Some(Holds::Slice(owner)) => Err(Halt::Wait(owner.key())),
            _ => Err(Halt::Busy),
        }
    }

    /// Packs the clean slice in `frame`, or lets it go. `false` when the frame became a page for it.
    fn compact(&mut self, tables: &Tables, geometry: &Layout, slice: u64, frame: u32) -> bool {
        let words = tables.words(frame);
        let word = |at: usize| words.get(at).map_or(0, |w| w.load(Ordering::Relaxed));
        let mut packer = std::mem::take(&mut self.packer);
        let mut spare = Some(frame);
        match self.pack(&mut packer, geometry, slice, word) {
            Shape::Empty => self.move_slot(tables, slice, Slot::Empty),
            Shape::Block(block) => {
                let placed = self.place(tables, geometry, slice, block, &mut spare);
                debug_assert!(placed, "there is a frame to spare");
            }
            Shape::Large => self.move_slot(tables, slice, Slot::Absent),
        }
        self.packer = packer;
        spare.is_some()
    }

    fn pack<'a>(
        &self,
        packer: &'a mut Packer,
        geometry: &Layout,
        slice: u64,
        word: impl Fn(usize) -> u64,
    ) -> Shape<'a> {
        packer.pack(slice, geometry, self.pages.block_words_max(), word)
    }

    /// A frame of zeros for a slice of refcounts of a block that was never written.
    pub(crate) fn add_zeros(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        slice: u64,
        host: u64,
    ) -> Ask<u32> {
        let owner = Owner::Ref(slice);
        let frame = self.take(tables, geometry, owner, host)?;
        for word in tables.words(frame) {
            word.store(0, Ordering::Relaxed);
        }
        self.index.insert(owner, frame);
        Ok(frame)
    }

    /// A frame of its own for an L2 slice that is present in another form.
    pub(crate) fn unpack(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        slice: u64,
        host: u64,
    ) -> Ask<u32> {
        let mut words = std::mem::take(&mut self.words);
        words.clear();
        if let Some(entries) = tables.entries(slice) {
            match geometry.extended() {
                false => words.extend((0..geometry.slice_entries()).map(|at| entries.run(at, 1).0)),
                true => words.extend((0..geometry.slice_entries()).flat_map(|at| {
                    let (raw, bitmap) = entries.pair(at);
                    [raw, bitmap]
                })),
            }
        }
        // Whatever leaves for the frame, even the page of this very slice, its words are here.
        let taken = self.take(tables, geometry, Owner::L2(slice), host);
        if let Ok(frame) = taken {
            self.fill(tables, frame, &words);
            let was = tables.slot(slice);
            self.move_slot(tables, slice, Slot::Frame(frame));
            tables.publish(slice, frame);
            if let Slot::Packed { page, block } = was {
                self.free_block(page, block);
            }
        }
        self.words = words;
        taken
    }

    /// How large the cache may get and what of the disk it covers then at least, how large it is, what
    /// it covers now, and how often it lacked something.
    pub(crate) fn fact(&self, tables: &Tables, geometry: &Layout) -> String {
        let most = tables.frames.len() as u64 * geometry.slice();
        let covers = |slices: u64| {
            let bytes =
                slices.saturating_mul((geometry.slice_entries() as u64) << geometry.cluster_bits);
            size::human(bytes.min(geometry.size))
        };
        format!(
            "{} at most, covers {} of {} at least; {} for {} now, {} misses",
            size::human(most),
            covers(tables.frames.len() as u64),
            size::human(geometry.size),
            size::human(self.frames_used() as u64 * geometry.slice()),
            covers(self.present),
            self.misses
        )
    }

    pub(crate) fn pin(&mut self, frame: u32) {
        if let Some(meta) = self.meta(frame) {
            meta.pins += 1;
            if meta.pins == 1 {
                self.pinned += 1;
            }
        }
    }

    pub(crate) fn unpin(&mut self, frame: u32) {
        if let Some(meta) = self.meta(frame) {
            debug_assert!(meta.pins > 0);
            meta.pins = meta.pins.saturating_sub(1);
            if meta.pins == 0 {
                self.pinned -= 1;
            }
        }
    }

    /// Changes word `at` of a present slice.
    pub(crate) fn set(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        frame: u32,
        at: usize,
        value: u64,
    ) {
        if let Some(word) = tables.words(frame).get(at) {
            // Release: a reader who sees the entry sees what was done before.
            word.store(value, Ordering::Release);
        }
        self.mark(geometry, frame, at);
    }

    /// Changes words `at` and `at + 1` of a present slice at once, as readers see it.
    pub(crate) fn set_pair(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        frame: u32,
        at: usize,
        values: [u64; 2],
    ) {
        if let Some(f) = tables.frames.get(frame as usize) {
            f.change(|words| {
                for (word, value) in words.iter().skip(at).zip(values) {
                    word.store(value, Ordering::Release);
                }
            });
        }
        // An entry does not cross a sector.
        self.mark(geometry, frame, at);
    }

    /// Notes that word `at` of a present slice changed.
    fn mark(&mut self, geometry: &Layout, frame: u32, at: usize) {
        let granule = (at as u64 * 8) >> geometry.granule_bits();
        if let Some(meta) = self.meta.get_mut(frame as usize) {
            meta.dirty |= 1 << (granule & 63);
            if !meta.listed {
                meta.listed = true;
                self.changed.push(frame);
            }
        }
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Frames with refcounts that changed.
    fn changed_refcounts(&self) -> usize {
        let metas = self
            .changed
            .iter()
            .filter_map(|f| self.meta.get(*f as usize));
        metas.filter(|meta| meta.holds_refcounts()).count()
    }

    /// Whether anything but refcounts changed.
    pub(crate) fn tables_dirty(&self) -> bool {
        self.changed_refcounts() < self.changed.len()
    }

    /// Whether refcounts that were not written take much of the cache.
    pub(crate) fn refcounts_crowd(&self) -> bool {
        self.changed_refcounts() > self.capacity / 4
    }

    /// Moves all dirty granules (those of refcounts where wanted) into flight and tells `each` of them, in no order.
    pub(crate) fn take_changed(&mut self, refcounts: bool, mut each: impl FnMut(Changed)) {
        for &frame in &self.changed {
            let Some(meta) = self.meta.get_mut(frame as usize) else {
                continue;
            };
            if !refcounts && meta.holds_refcounts() {
                continue;
            }
            debug_assert_eq!(meta.flight, 0, "two flushes at once");
            meta.flight |= std::mem::take(&mut meta.dirty);
            if let Holds::Slice(owner) = meta.holds {
                each(Changed {
                    frame,
                    owner,
                    host: meta.host,
                    granules: meta.flight,
                });
            }
        }
    }

    /// Ends the flush: what was in flight is durable, or dirty again.
    pub(crate) fn end_flush(&mut self, ok: bool) {
        let meta = &mut self.meta;
        self.changed.retain(|frame| {
            let Some(meta) = meta.get_mut(*frame as usize) else {
                return false;
            };
            let flight = std::mem::take(&mut meta.flight);
            if !ok {
                meta.dirty |= flight;
            }
            meta.listed = meta.dirty != 0;
            meta.listed
        });
    }
}
