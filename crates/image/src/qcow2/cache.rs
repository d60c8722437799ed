//! The metadata cache: which slice is in which frame, what is dirty, what may leave.
//!
//! A slice is absent, loading, or present; a present one is clean, dirty (changed since the last
//! flush began) or in flight (being written by the flush under way), and perhaps pinned. Only clean
//! and unpinned ones leave, by the clock: the hand passes over a frame that was used since its last visit.
//! All of this happens under the image's lock.

use super::entry::Geometry;
use super::state::{Ask, Halt};
use super::tables::Tables;
use crate::{Key, Need};
use std::collections::HashMap;
use std::sync::atomic::Ordering;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    /// A slice of an L2 table: number of the slice in the disk.
    L2(u64),
    /// A slice of a refcount block: number of the slice, counted from host offset 0.
    Ref(u64),
}

const KEY_KIND: u32 = 60;
const KEY_L2: u64 = 1;
const KEY_REF: u64 = 2;
pub(super) const KEY_TICKET: u64 = 3 << KEY_KIND;
pub(super) const KEY_RESERVE: u64 = 4 << KEY_KIND;

impl Owner {
    pub(super) fn key(self) -> Key {
        Key(match self {
            Owner::L2(slice) => KEY_L2 << KEY_KIND | slice,
            Owner::Ref(slice) => KEY_REF << KEY_KIND | slice,
        })
    }

    pub(super) fn of_key(key: Key) -> Option<Self> {
        let slice = key.0 & ((1 << KEY_KIND) - 1);
        match key.0 >> KEY_KIND {
            KEY_L2 => Some(Owner::L2(slice)),
            KEY_REF => Some(Owner::Ref(slice)),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Meta {
    owner: Option<Owner>,
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

/// The part of the cache that the lock guards.
#[derive(Debug)]
pub(super) struct Cache {
    meta: Box<[Meta]>,
    /// Frames that were ever used: the first so many.
    grown: usize,
    /// Frames given back, to be used before any is evicted.
    free: Vec<u32>,
    hand: usize,
    /// Refcount slices that are present or loading. L2 slices that are loading.
    index: HashMap<Owner, u32>,
    /// Frames with dirty or in-flight granules.
    changed: Vec<u32>,
    pinned: usize,
    loading: usize,
    pub(super) misses: u64,
}

/// What a flush takes from one frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Changed {
    pub(super) frame: u32,
    pub(super) owner: Owner,
    pub(super) host: u64,
    pub(super) granules: u64,
}

impl Cache {
    pub(super) fn new(frames: usize) -> Self {
        Self {
            meta: vec![Meta::default(); frames].into(),
            grown: 0,
            free: Vec::with_capacity(frames),
            hand: 0,
            index: HashMap::with_capacity(frames),
            changed: Vec::with_capacity(frames),
            pinned: 0,
            loading: 0,
            misses: 0,
        }
    }

    fn meta(&mut self, frame: u32) -> Option<&mut Meta> {
        self.meta.get_mut(frame as usize)
    }

    /// The frame of a slice that is present.
    pub(super) fn find(&self, tables: &Tables, owner: Owner) -> Option<u32> {
        match owner {
            Owner::L2(slice) => tables.slot(slice),
            Owner::Ref(_) => {
                let frame = *self.index.get(&owner)?;
                (!self.meta.get(frame as usize)?.loading).then_some(frame)
            }
        }
    }

    /// Whether `owner`'s slice is being loaded.
    pub(super) fn is_loading(&self, owner: Owner) -> bool {
        let frame = self.index.get(&owner);
        frame
            .and_then(|f| self.meta.get(*f as usize))
            .is_some_and(|m| m.loading)
    }

    /// Whether so much is dirty or pinned that a flush must come first.
    pub(super) fn crowded(&self) -> bool {
        self.changed.len() > self.meta.len() / 2 || self.pinned > self.meta.len() / 2
    }

    /// Whether pins alone crowd it.
    pub(super) fn pins_crowd(&self) -> bool {
        self.pinned > self.meta.len() / 2
    }

    fn evictable(meta: &Meta) -> bool {
        meta.pins == 0 && meta.dirty | meta.flight == 0 && !meta.loading
    }

    /// How many frames could be taken now.
    pub(super) fn available(&self) -> usize {
        let grown = self.meta.iter().take(self.grown);
        self.meta.len() - self.grown + grown.filter(|m| Self::evictable(m)).count()
    }

    /// A frame for `owner`, closed to readers. Its words are stale.
    fn take(&mut self, tables: &Tables, geometry: &Geometry, owner: Owner, host: u64) -> Ask<u32> {
        let frame = if let Some(frame) = self.free.pop() {
            frame
        } else if self.grown < self.meta.len() {
            self.grown += 1;
            (self.grown - 1) as u32
        } else {
            self.evict(tables)?
        };
        if let Some(f) = tables.frames.get(frame as usize) {
            f.make(geometry.slice_words());
            f.close();
        }
        if let Some(meta) = self.meta(frame) {
            *meta = Meta {
                owner: Some(owner),
                host,
                ..Meta::default()
            };
        }
        Ok(frame)
    }

    fn evict(&mut self, tables: &Tables) -> Ask<u32> {
        // Two rounds: the first may only clear the marks of use.
        for _ in 0..2 * self.meta.len() {
            let at = self.hand;
            self.hand = (at + 1) % self.meta.len().max(1);
            let (Some(meta), Some(frame)) = (self.meta.get_mut(at), tables.frames.get(at)) else {
                continue;
            };
            if !Self::evictable(meta) || frame.used.swap(false, Ordering::Relaxed) {
                continue;
            }
            match meta.owner.take() {
                Some(Owner::L2(slice)) => tables.hide(slice),
                Some(owner) => drop(self.index.remove(&owner)),
                None => continue,
            }
            return Ok(at as u32);
        }
        // Everything is dirty, pinned or loading: one of these ends soon.
        if !self.changed.is_empty() {
            return Err(Halt::Need(Need::Commit));
        }
        let loading = self.meta.iter().find(|m| m.loading).and_then(|m| m.owner);
        Err(loading.map_or(Halt::Busy, |owner| Halt::Wait(owner.key())))
    }

    /// A frame of zeros for a slice of a block that was never written.
    pub(super) fn add_zeros(
        &mut self,
        tables: &Tables,
        geometry: &Geometry,
        owner: Owner,
        host: u64,
    ) -> Ask<u32> {
        let frame = self.take(tables, geometry, owner, host)?;
        for word in tables.words(frame) {
            word.store(0, Ordering::Relaxed);
        }
        self.show(tables, owner, frame);
        Ok(frame)
    }

    fn show(&mut self, tables: &Tables, owner: Owner, frame: u32) {
        match owner {
            Owner::L2(slice) => {
                self.index.remove(&owner);
                tables.publish(slice, frame);
            }
            Owner::Ref(_) => drop(self.index.insert(owner, frame)),
        }
    }

    /// Starts the load of an absent slice at `host`.
    pub(super) fn start_load(
        &mut self,
        tables: &Tables,
        geometry: &Geometry,
        owner: Owner,
        host: u64,
    ) -> Ask<()> {
        let frame = self.take(tables, geometry, owner, host)?;
        if let Some(meta) = self.meta(frame) {
            meta.loading = true;
        }
        self.index.insert(owner, frame);
        self.loading += 1;
        self.misses += 1;
        Ok(())
    }

    /// Ends a load that `start_load` began. With `words`, the slice is present from here on.
    /// `false` when there is no such load.
    pub(super) fn end_load(
        &mut self,
        tables: &Tables,
        owner: Owner,
        host: u64,
        words: Option<impl Iterator<Item = u64>>,
    ) -> bool {
        let Some(&frame) = self.index.get(&owner) else {
            return false;
        };
        let Some(meta) = self.meta(frame) else {
            return false;
        };
        if !meta.loading || meta.host != host {
            return false;
        }
        meta.loading = false;
        self.loading -= 1;
        match words {
            Some(mut words) => {
                for word in tables.words(frame) {
                    word.store(words.next().unwrap_or(0), Ordering::Relaxed);
                }
                self.show(tables, owner, frame);
            }
            None => {
                self.index.remove(&owner);
                if let Some(meta) = self.meta(frame) {
                    meta.owner = None;
                }
                self.free.push(frame);
            }
        }
        true
    }

    /// Ends a load that failed.
    pub(super) fn cancel_load(&mut self, tables: &Tables, owner: Owner, host: u64) {
        self.end_load(tables, owner, host, None::<std::iter::Empty<u64>>);
    }

    pub(super) fn pin(&mut self, frame: u32) {
        if let Some(meta) = self.meta(frame) {
            meta.pins += 1;
            if meta.pins == 1 {
                self.pinned += 1;
            }
        }
    }

    pub(super) fn unpin(&mut self, frame: u32) {
        if let Some(meta) = self.meta(frame) {
            debug_assert!(meta.pins > 0);
            meta.pins = meta.pins.saturating_sub(1);
            if meta.pins == 0 {
                self.pinned -= 1;
            }
        }
    }

    /// Changes word `at` of a present slice.
    pub(super) fn set(
        &mut self,
        tables: &Tables,
        geometry: &Geometry,
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
    pub(super) fn set_pair(
        &mut self,
        tables: &Tables,
        geometry: &Geometry,
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
    fn mark(&mut self, geometry: &Geometry, frame: u32, at: usize) {
        let granule = (at as u64 * 8) >> geometry.granule_bits();
        if let Some(meta) = self.meta.get_mut(frame as usize) {
            meta.dirty |= 1 << (granule & 63);
            if !meta.listed {
                meta.listed = true;
                self.changed.push(frame);
            }
        }
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Moves all dirty granules into flight and tells `each` of them, in no order.
    pub(super) fn take_changed(&mut self, mut each: impl FnMut(Changed)) {
        for &frame in &self.changed {
            let Some(meta) = self.meta.get_mut(frame as usize) else {
                continue;
            };
            debug_assert_eq!(meta.flight, 0, "two flushes at once");
            meta.flight |= std::mem::take(&mut meta.dirty);
            if let Some(owner) = meta.owner {
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
    pub(super) fn end_flush(&mut self, ok: bool) {
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
