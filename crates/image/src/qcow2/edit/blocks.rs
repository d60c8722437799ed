//! Refcount blocks of an edit: as the file has them, and as they will be.
//!
//! A block that changes gets a new place, and the old one stays as it is until the switch. So both views of
//! a refcount can be had at any time: what counts now, and what will.

use crate::qcow2::check::{Block, Layout, block_at, set_refcount};
use crate::qcow2::close::read_short;
use crate::qcow2::entry::refcount_at;
use crate::qcow2::header::{Header, REFCOUNT_TABLE_BYTES_MAX};
use crate::qcow2::read_u64;
use block::{Context, Error, ErrorKind, Result, Storage};
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of refcount blocks that are held at most (and 8 blocks at least).
const HELD_BYTES_MAX: usize = 32 << 20;
const HELD_BLOCKS_MIN: usize = 8;
/// In place of an offset: the block will move, but has no new place yet.
pub(super) const HOMELESS: u64 = u64::MAX;

#[derive(Debug)]
struct Held {
    bytes: Vec<u8>,
    dirty: bool,
    used: bool,
}

/// The refcount table and its blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    layout: Layout,
    /// Offsets of the blocks as the file has them; 0 for none.
    pub(super) old: Vec<u64>,
    /// The same, as they will be.
    pub(super) new: Vec<u64>,
    /// Blocks that have no new place yet.
    pub(super) homeless: Vec<u64>,
    /// What is held, by the block's index.
    held: Vec<Option<Box<Held>>>,
    /// The blocks that are held, in the order in which they are looked at to be dropped.
    queue: VecDeque<u64>,
    held_max: usize,
    /// The block that was last read as the file has it.
    previous: Option<(u64, Vec<u8>)>,
}

impl Blocks {
    pub(super) fn load(storage: &dyn Storage, header: &Header, layout: Layout) -> Result<Self> {
        // At most 8 MiB.
        let bytes = (u64::from(header.refcount_table_clusters) * layout.cluster())
            .min(REFCOUNT_TABLE_BYTES_MAX.max(layout.cluster())) as usize;
        let table = read_short(storage, header.refcount_table_offset, bytes)?;
        let mut old = Vec::with_capacity(bytes / 8);
        for (index, raw) in table.chunks_exact(8).enumerate() {
            let raw = read_u64(raw, 0).unwrap_or(0);
            let what = || {
                Error::corrupt(format!(
                    "refcount table: entry {index} is {raw:#x}, no cluster: run diskplane check"
                ))
            };
            old.push(match block_at(&layout, raw) {
                (Block::None, None) => 0,
                (Block::At(at), None) => at,
                _ => return Err(what()),
            });
        }
        Ok(Self {
            layout,
            new: old.clone(),
            old,
            homeless: Vec::new(),
            held: Vec::new(),
            queue: VecDeque::new(),
            held_max: (HELD_BYTES_MAX >> layout.cluster_bits).max(HELD_BLOCKS_MIN),
            previous: None,
        })
    }

    #[cfg(test)]
    pub(super) fn hold_at_most(&mut self, blocks: usize) {
        self.held_max = blocks;
    }

    pub(super) fn cluster_bits(&self) -> u32 {
        self.layout.cluster_bits
    }

    pub(super) fn index_of(&self, cluster: u64) -> u64 {
        cluster >> self.layout.block_bits()
    }

    fn within(&self, cluster: u64) -> u64 {
        cluster & ((1 << self.layout.block_bits()) - 1)
    }

    fn entry(table: &[u64], block: u64) -> u64 {
        let index = usize::try_from(block).unwrap_or(usize::MAX);
        table.get(index).copied().unwrap_or(0)
    }

    pub(super) fn old_at(&self, block: u64) -> u64 {
        Self::entry(&self.old, block)
    }

    pub(super) fn new_at(&self, block: u64) -> u64 {
        Self::entry(&self.new, block)
    }

    /// Whether the block will have another place than now.
    pub(super) fn moves(&self, block: u64) -> bool {
        self.old_at(block) != self.new_at(block)
    }

    /// Whether anything will be other than it is.
    pub(super) fn changed(&self) -> bool {
        self.old != self.new
    }

    fn read(storage: &dyn Storage, layout: &Layout, at: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; layout.cluster() as usize];
        storage
            .read_at(at, &mut bytes)
            .context(|| format!("refcount block at {at:#x}"))?;
        Ok(bytes)
    }

    fn slot(&mut self, block: u64) -> Option<&mut Option<Box<Held>>> {
        self.held.get_mut(usize::try_from(block).ok()?)
    }

    /// Drops blocks until there is room for one more; dirty ones are written to their new place, where
    /// nothing refers to them yet.
    fn make_room(&mut self, storage: &dyn Storage) -> Result<()> {
        let mut left = self.queue.len() * 2;
        while self.queue.len() >= self.held_max && left > 0 {
            left -= 1;
            let Some(index) = self.queue.pop_front() else {
                break;
            };
            let at = self.new_at(index);
            let Some(Some(held)) = self.slot(index) else {
                continue;
            };
            if std::mem::take(&mut held.used) || at == HOMELESS {
                self.queue.push_back(index);
                continue;
            }
            if held.dirty {
                storage.write_at(at, &held.bytes)?;
            }
            if let Some(slot) = self.slot(index) {
                *slot = None;
            }
        }
        Ok(())
    }

    fn hold(&mut self, storage: &dyn Storage, block: u64) -> Result<&mut Held> {
        if !matches!(self.slot(block), Some(Some(_))) {
            self.make_room(storage)?;
            let bytes = match self.new_at(block) {
                0 | HOMELESS => vec![0; self.layout.cluster() as usize],
                at => Self::read(storage, &self.layout, at)?,
            };
            // As long as the table, which is bounded.
            self.held.resize_with(self.new.len(), || None);
            if let Some(slot) = self.slot(block) {
                *slot = Some(Box::new(Held {
                    bytes,
                    dirty: false,
                    used: true,
                }));
            }
            self.queue.push_back(block);
        }
        let held = self.slot(block).and_then(Option::as_mut);
        let held = held.ok_or_else(|| Error::invalid("a refcount block that is not held"))?;
        held.used = true;
        Ok(held)
    }

    /// What the refcount of `cluster` will be.
    pub(super) fn get(&mut self, storage: &dyn Storage, cluster: u64) -> Result<u64> {
        let (block, index) = (self.index_of(cluster), self.within(cluster));
        if self.new_at(block) == 0 {
            return Ok(0);
        }
        let order = self.layout.refcount_order;
        Ok(value_at(&self.hold(storage, block)?.bytes, index, order))
    }

    /// What the refcount of `cluster` is while the edit has not been committed.
    pub(super) fn get_old(&mut self, storage: &dyn Storage, cluster: u64) -> Result<u64> {
        let (block, index) = (self.index_of(cluster), self.within(cluster));
        let at = self.old_at(block);
        if at == 0 {
            return Ok(0);
        }
        if !self.moves(block) {
            return self.get(storage, cluster);
        }
        if self.previous.as_ref().is_none_or(|p| p.0 != block) {
            self.previous = Some((block, Self::read(storage, &self.layout, at)?));
        }
        let bytes = self.previous.as_ref().map(|p| p.1.as_slice());
        let order = self.layout.refcount_order;
        Ok(value_at(bytes.unwrap_or_default(), index, order))
    }

    /// Sees to it that refcounts of `block` may change: it will get a new place.
    fn touch(&mut self, storage: &dyn Storage, block: u64) -> Result<()> {
        let index = usize::try_from(block).unwrap_or(usize::MAX);
        if index >= self.new.len() {
            let most = REFCOUNT_TABLE_BYTES_MAX.max(self.layout.cluster()) / 8;
            if block >= most {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "the refcount table would pass 8 MiB: the file is as large as it may get",
                ));
            }
            self.new.resize(index + 1, 0);
            self.old.resize(index + 1, 0);
        }
        // One that was to be dropped is needed again.
        if self.moves(block) && self.new_at(block) != 0 {
            return Ok(());
        }
        self.hold(storage, block)?;
        if let Some(at) = self.new.get_mut(index) {
            *at = HOMELESS;
        }
        self.homeless.push(block);
        Ok(())
    }

    /// Makes the refcounts of `clusters`, which one block counts, what `change` makes of each cluster and
    /// its refcount.
    pub(super) fn update(
        &mut self,
        storage: &dyn Storage,
        clusters: Range<u64>,
        mut change: impl FnMut(u64, u64) -> Result<u64>,
    ) -> Result<()> {
        let block = self.index_of(clusters.start);
        self.touch(storage, block)?;
        let first = self.within(clusters.start);
        let layout = self.layout;
        let held = self.hold(storage, block)?;
        held.dirty = true;
        for (cluster, index) in clusters.zip(first..) {
            let old = value_at(&held.bytes, index, layout.refcount_order);
            let new = change(cluster, old)?;
            set_refcount(&layout, &mut held.bytes, index, new);
        }
        Ok(())
    }

    /// The last cluster whose refcount in `block` is not 0.
    pub(super) fn last_used(&mut self, storage: &dyn Storage, block: u64) -> Result<Option<u64>> {
        if self.new_at(block) == 0 {
            return Ok(None);
        }
        let layout = self.layout;
        let bytes = &self.hold(storage, block)?.bytes;
        let words = bytes.chunks_exact(8).rposition(|word| *word != [0; 8]);
        let end = words.map_or(0, |word| (word as u64 + 1) << (6 - layout.refcount_order));
        let used = |index: &u64| value_at(bytes, *index, layout.refcount_order) != 0;
        let index = (0..end).rev().find(used);
        Ok(index.map(|index| (block << layout.block_bits()) + index))
    }

    /// Whether `block`, which lies where it did, counts nothing, but for its own cluster perhaps.
    fn is_idle(&mut self, storage: &dyn Storage, block: u64) -> Result<bool> {
        let (at, layout) = (self.new_at(block), self.layout);
        if matches!(at, 0 | HOMELESS) || self.moves(block) {
            return Ok(false);
        }
        let own = at >> layout.cluster_bits;
        let own = (self.index_of(own) == block).then(|| self.within(own));
        let bytes = &self.hold(storage, block)?.bytes;
        let per_word = 64 >> layout.refcount_order;
        let mut used = bytes
            .chunks_exact(8)
            .enumerate()
            .filter(|(_, word)| **word != [0; 8]);
        // At most one word has something, and of that only the cluster's own.
        let first = used.next().map(|(word, _)| word as u64 * per_word);
        let more = used.next().is_some();
        let mut counted = first.into_iter().flat_map(|first| first..first + per_word);
        let others =
            |index: u64| Some(index) != own && value_at(bytes, index, layout.refcount_order) != 0;
        Ok(!more && !counted.any(others))
    }

    /// Drops a block that counts nothing. Returns where it is.
    pub(super) fn drop_idle(&mut self, storage: &dyn Storage, block: u64) -> Result<Option<u64>> {
        if !self.is_idle(storage, block)? {
            return Ok(None);
        }
        let at = self.new_at(block);
        self.settle(block, 0);
        self.queue.retain(|held| *held != block);
        if let Some(slot) = self.slot(block) {
            *slot = None;
        }
        Ok(Some(at))
    }

    /// Gives the homeless `block` the place `at`.
    pub(super) fn settle(&mut self, block: u64, at: u64) {
        if let Some(entry) = self
            .new
            .get_mut(usize::try_from(block).unwrap_or(usize::MAX))
        {
            *entry = at;
        }
    }

    /// Writes all that is dirty, in the order of the file.
    pub(super) fn write(&mut self, storage: &dyn Storage) -> Result<()> {
        let mut held: Vec<(u64, u64)> = self.queue.iter().map(|b| (self.new_at(*b), *b)).collect();
        held.sort_unstable();
        for (at, block) in held {
            if let Some(Some(held)) = self.slot(block)
                && held.dirty
            {
                storage.write_at(at, &held.bytes)?;
                held.dirty = false;
            }
        }
        Ok(())
    }

    /// What will be is now.
    pub(super) fn switched(&mut self) {
        self.old.clone_from(&self.new);
        self.previous = None;
    }

    /// The places of all blocks as the file has them, sorted.
    pub(super) fn places(&self) -> Vec<u64> {
        let mut places: Vec<u64> = self.old.iter().copied().filter(|at| *at != 0).collect();
        places.sort_unstable();
        places
    }
}

fn value_at(block: &[u8], index: u64, order: u32) -> u64 {
    let (word, shift, mask) = refcount_at(index, order);
    read_u64(block, word.saturating_mul(8)).unwrap_or(0) >> shift & mask
}
