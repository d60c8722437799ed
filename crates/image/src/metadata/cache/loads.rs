//! Slices on their way into memory.

use super::*;

impl Cache {
    pub(super) fn fill(&self, tables: &Tables, frame: u32, words: &[u64]) {
        let mut words = words.iter();
        for word in tables.words(frame) {
            word.store(words.next().copied().unwrap_or(0), Ordering::Relaxed);
        }
    }

    /// Starts the load of an absent slice of refcounts at `host`.
    pub(crate) fn start_load(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        slice: u64,
        host: u64,
    ) -> Ask<()> {
        let owner = Owner::Ref(slice);
        let frame = self.take(tables, geometry, owner, host)?;
        self.index.insert(owner, frame);
        self.began(frame);
        Ok(())
    }

    /// Starts the load of `count` L2 slices from `first` on at `host`, within the span that begins with
    /// slice `span`; `wanted` is one of them.
    pub(crate) fn start_span(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        span: u64,
        wanted: u64,
        (first, count): (u64, u32),
        host: u64,
    ) -> Ask<()> {
        let frame = self.take(tables, geometry, Owner::L2(span), host)?;
        let absent = (0..u64::from(count))
            .filter(|n| first + n < geometry.l2_slices())
            .filter(|n| tables.slot(first + n) == Slot::Absent)
            .fold(0, |mask, n| mask | 1 << n);
        let load = SpanLoad {
            first,
            count,
            wanted,
            host,
            absent,
            frame,
        };
        self.spans.insert(span, load);
        self.began(frame);
        Ok(())
    }

    fn began(&mut self, frame: u32) {
        if let Some(meta) = self.meta(frame) {
            meta.loading = true;
        }
        self.loading += 1;
        self.misses += 1;
    }

    /// Ends a load of refcounts that `start_load` began. With `words`, the slice is present from here on.
    /// `false` when there is no such load.
    pub(crate) fn end_load(
        &mut self,
        tables: &Tables,
        slice: u64,
        host: u64,
        words: Option<&[u64]>,
    ) -> bool {
        let owner = Owner::Ref(slice);
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
            Some(words) => self.fill(tables, frame, words),
            None => {
                self.index.remove(&owner);
                self.give_back(frame);
            }
        }
        true
    }

    /// Ends a load that `start_span` began at `host`. What was read is to be handed to `take_in` then, slice
    /// by slice, and at last to `end_span`. `None` when there is no such load.
    pub(crate) fn span_loaded(&mut self, span: u64, host: u64) -> Option<SpanLoad> {
        let load = *self.spans.get(&span)?;
        if load.host != host {
            return None;
        }
        self.spans.remove(&span);
        self.loading -= 1;
        if let Some(meta) = self.meta(load.frame) {
            meta.loading = false;
        }
        Some(load)
    }

    /// Ends a load of the span `whence` (its first slice, and where it is in the file). Each slice that was absent when it
    /// began is taken in: `take` puts its words into the given vector (from so many bytes at that place of what was read),
    /// and tells where it is in the file. `false` when there is no such load.
    pub(crate) fn end_load_span(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        whence: (u64, u64),
        words: &mut Vec<u64>,
        mut take: impl FnMut(&mut Vec<u64>, u64, u64, usize, usize) -> u64,
    ) -> bool {
        let (span, host) = whence;
        let Some(load) = self.span_loaded(span, host) else {
            return false;
        };
        let slice_len = geometry.slice() as usize;
        let mut spare = Some(load.frame);
        // The one that was asked for first: the frame set aside is for that.
        let wanted = load.wanted - load.first;
        let others = (0..u64::from(load.count)).filter(|n| *n != wanted);
        for n in std::iter::once(wanted).chain(others) {
            if load.absent >> n & 1 == 0 {
                continue;
            }
            let at = n as usize * slice_len;
            let slice = load.first + n;
            let host = take(words, slice, load.host + at as u64, at, slice_len);
            self.take_in(tables, geometry, slice, host, words, &mut spare);
        }
        self.end_span(spare);
        true
    }

    /// Takes back the frame that was set aside for a load, where it was not needed.
    pub(crate) fn end_span(&mut self, spare: Option<u32>) {
        if let Some(frame) = spare {
            self.give_back(frame);
        }
    }

    /// Ends a load that failed.
    pub(crate) fn cancel_load(&mut self, tables: &Tables, owner: Owner, host: u64) {
        match owner {
            Owner::L2(span) => {
                if let Some(load) = self.span_loaded(span, host) {
                    self.end_span(Some(load.frame));
                }
            }
            Owner::Ref(slice) => drop(self.end_load(tables, slice, host, None)),
        }
    }

    /// Makes an absent L2 slice present: packed, or in a frame where it would not get small. Uses `spare`
    /// where there is no room in a page, or a vacant frame; without either the slice stays absent.
    pub(crate) fn take_in(
        &mut self,
        tables: &Tables,
        geometry: &Layout,
        slice: u64,
        host: u64,
        words: &[u64],
        spare: &mut Option<u32>,
    ) {
        let word = |at: usize| words.get(at).copied().unwrap_or(0);
        let mut packer = std::mem::take(&mut self.packer);
        match self.pack(&mut packer, geometry, slice, word) {
            Shape::Empty => self.move_slot(tables, slice, Slot::Empty),
            Shape::Block(block) => {
                if !self.place(tables, geometry, slice, block, spare) {
                    let mut vacant = self.take_vacant();
                    self.place(tables, geometry, slice, block, &mut vacant);
                    debug_assert!(vacant.is_none(), "a page was made of it");
                }
            }
            Shape::Large => {
                if let Some(frame) = spare.take().or_else(|| self.take_vacant()) {
                    self.dedicate(tables, geometry, frame, Owner::L2(slice), host);
                    self.fill(tables, frame, words);
                    self.move_slot(tables, slice, Slot::Frame(frame));
                    tables.publish(slice, frame);
                }
            }
        }
        self.packer = packer;
    }

    /// Notes that the clean L2 slice `slice` lies at `host` now. With `forget` it is to be read again instead.
    pub(crate) fn rehome(&mut self, tables: &Tables, slice: u64, host: u64, forget: bool) {
        match tables.slot(slice) {
            Slot::Frame(frame) => {
                let Some(meta) = self.meta(frame) else { return };
                debug_assert_eq!(meta.dirty | meta.flight, 0, "a shared table was changed");
                meta.host = host;
                if forget && Self::evictable(meta) {
                    self.move_slot(tables, slice, Slot::Absent);
                    self.give_back(frame);
                }
            }
            Slot::Packed { page, block } if forget => {
                self.move_slot(tables, slice, Slot::Absent);
                self.free_block(page, block);
            }
            _ => {}
        }
    }
}
