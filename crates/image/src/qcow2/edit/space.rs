//! Free clusters of an edit, and the refcounts of those it takes.

use super::blocks::Blocks;
use super::{Editor, FREED_MAX};
use crate::qcow2::check::Layout;
use crate::qcow2::header::{HOST_OFFSET_END, Header};
use block::{Error, ErrorKind, Result, Storage, align_up};
use std::ops::Range;

/// Bytes of refcount blocks at the file's end that are searched for free clusters before the file grows.
const SEARCHED_BYTES: u64 = 4 << 20;
/// The file grows by at least so many bytes at once; what is left over is given back.
const GROWTH_BYTES: u64 = 1 << 20;

/// Where there is room.
#[derive(Debug)]
pub(super) struct Space {
    /// Behind the last cluster in use; what is free below may be taken.
    end: u64,
    /// Bytes of the file when the edit began (or was last committed).
    file_len: u64,
    /// Bytes that the host has given.
    reserved: u64,
    /// Single clusters are searched from here.
    cursor: u64,
    /// Runs of clusters are searched from here.
    run_cursor: u64,
    /// The whole file has been searched, because it could not grow.
    whole: bool,
    cluster_bits: u32,
    /// Clusters of header, L1, refcount and snapshot table: never free, whatever the refcounts say.
    fixed: Vec<Range<u64>>,
    /// Offsets of refcount blocks: the same.
    blocks: Vec<u64>,
}

impl Space {
    pub(super) fn survey(
        storage: &dyn Storage,
        header: &Header,
        layout: Layout,
        blocks: &mut Blocks,
    ) -> Result<Self> {
        let bits = layout.cluster_bits;
        let file_len = storage.len()?;
        let mut space = Self {
            end: Self::end_of(storage, blocks)?,
            file_len,
            reserved: file_len,
            cursor: 0,
            run_cursor: 0,
            whole: false,
            cluster_bits: bits,
            fixed: Vec::new(),
            blocks: Vec::new(),
        };
        space.fix(header, blocks);
        // Refcounts lie close together: so many clusters are looked at.
        let searched = (SEARCHED_BYTES * 8) >> layout.refcount_order;
        space.cursor = space.end.saturating_sub(searched);
        space.run_cursor = space.cursor;
        Ok(space)
    }

    /// Notes where the header's tables are.
    pub(super) fn fix(&mut self, header: &Header, blocks: &Blocks) {
        let bits = self.cluster_bits;
        let range =
            |at: u64, bytes: u64| at >> bits..align_up(at.saturating_add(bytes), 1 << bits) >> bits;
        let snapshots = match header.nb_snapshots {
            0 => 0..0,
            _ => range(header.snapshots_offset, 1),
        };
        self.fixed = vec![
            0..1,
            range(header.l1_table_offset, u64::from(header.l1_size) * 8),
            range(
                header.refcount_table_offset,
                u64::from(header.refcount_table_clusters) << bits,
            ),
            snapshots,
        ];
        self.blocks = blocks.places();
    }

    /// The cluster behind the last one that has a refcount.
    pub(super) fn end_of(storage: &dyn Storage, blocks: &mut Blocks) -> Result<u64> {
        for block in (0..blocks.old.len() as u64).rev() {
            if let Some(cluster) = blocks.last_used(storage, block)? {
                // A refcount block may say that clusters are in use which no offset reaches.
                return Ok((cluster + 1).min(HOST_OFFSET_END >> blocks.cluster_bits()));
            }
        }
        // The header's, whatever the refcounts say.
        Ok(1)
    }

    /// Whether the header or a table of the image as it is lies there.
    pub(super) fn is_fixed(&self, cluster: u64) -> bool {
        self.fixed.iter().any(|range| range.contains(&cluster))
            || self
                .blocks
                .binary_search(&(cluster << self.cluster_bits))
                .is_ok()
    }

    /// Has the host give the file room up to cluster `end`.
    fn reserve(&mut self, storage: &dyn Storage, end: u64) -> Result<()> {
        let bytes = end << self.cluster_bits;
        if bytes > self.reserved {
            let growth = (bytes - self.reserved).max(GROWTH_BYTES);
            let more = align_up(self.reserved.saturating_add(growth), 1 << self.cluster_bits);
            // A device may have less than that, and yet enough.
            self.reserved = match storage.allocate(self.reserved, more - self.reserved) {
                Ok(_) => more,
                Err(_) => storage
                    .allocate(self.reserved, bytes - self.reserved)
                    .map(|_| bytes)?,
            };
        }
        Ok(())
    }

    /// Takes back what the file has grown by: nothing refers to it.
    pub(super) fn cut(&self, storage: &dyn Storage) -> Result<()> {
        match storage.len()? > self.file_len {
            true => storage.set_len(self.file_len),
            false => Ok(()),
        }
    }

    /// What was written is in force: only what lies behind is left over.
    pub(super) fn switched(&mut self, storage: &dyn Storage) -> Result<()> {
        self.file_len = self.file_len.max(self.end << self.cluster_bits);
        self.cut(storage)?;
        self.reserved = self.file_len;
        Ok(())
    }
}

impl Editor<'_> {
    /// Finds `clusters` free clusters in one piece: the first of them.
    pub(super) fn find(&mut self, clusters: u64) -> Result<u64> {
        if clusters == 0 || clusters > HOST_OFFSET_END >> self.layout.cluster_bits {
            return Err(Error::invalid(format!("{clusters} clusters in one piece")));
        }
        let from = match clusters {
            1 => self.space.cursor,
            _ => self.space.run_cursor,
        };
        let (run_at, free) = self.search(from, clusters)?;
        let first = match free == clusters {
            true => run_at,
            false => self.grow(run_at, clusters)?,
        };
        match clusters {
            1 => self.space.cursor = first + 1,
            _ => self.space.run_cursor = first + clusters,
        }
        Ok(first)
    }

    /// The first run of `clusters` free clusters from `from` on, or the free ones that the file ends with.
    fn search(&mut self, from: u64, clusters: u64) -> Result<(u64, u64)> {
        let mut run = (from, 0);
        let mut cluster = from;
        while cluster < self.space.end && run.1 < clusters {
            match self.is_free(cluster)? {
                true => run.1 += 1,
                false => run = (cluster + 1, 0),
            }
            cluster += 1;
        }
        Ok(run)
    }

    /// Takes room behind the end, from `run_at` on, where the free clusters at the end begin.
    fn grow(&mut self, run_at: u64, clusters: u64) -> Result<u64> {
        let end = run_at + clusters;
        if end > HOST_OFFSET_END >> self.layout.cluster_bits {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the file would pass 2^56 bytes",
            ));
        }
        let Err(error) = self.space.reserve(self.storage, end) else {
            self.space.end = end;
            return Ok(run_at);
        };
        // There may be gaps before the part that was searched.
        if !self.space.whole || clusters > 1 {
            self.space.whole = true;
            let (first, free) = self.search(0, clusters)?;
            if free == clusters {
                return Ok(first);
            }
        }
        Err(error)
    }

    /// Whether the cluster is free now and will be.
    fn is_free(&mut self, cluster: u64) -> Result<bool> {
        Ok(self.blocks.get(self.storage, cluster)? == 0
            && self.blocks.get_old(self.storage, cluster)? == 0
            && !self.space.is_fixed(cluster))
    }

    /// Changes refcounts. Blocks that change for the first time have no place afterwards: see `house`.
    pub(super) fn count(&mut self, first: u64, clusters: u64, delta: i64) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let end = first.checked_add(clusters);
        let Some(end) = end.filter(|end| *end <= HOST_OFFSET_END >> bits) else {
            return Err(Error::corrupt(format!(
                "{clusters} clusters from {first:#x} on end behind 2^56 bytes: run diskplane check"
            )));
        };
        let layout = self.layout;
        let most = layout.refcount_max();
        let freed = &mut self.freed;
        let mut change = |cluster: u64, old: u64| {
            let at = cluster << bits;
            let new = old.checked_add_signed(delta).ok_or_else(|| {
                Error::corrupt(format!(
                    "the refcount of the cluster at {at:#x} is {old}, too low to lower it by {}: \
                     run diskplane check",
                    delta.unsigned_abs()
                ))
            })?;
            if new > most {
                return Err(Error::unsupported(format!(
                    "the cluster at {at:#x} would be referred to {new} times, but refcount_bits \
                     of {} hold {most} at most",
                    1u32 << layout.refcount_order
                )));
            }
            if new == 0 && old != 0 {
                note_freed(freed, at, layout.cluster());
            }
            Ok(new)
        };
        let mut from = first;
        while from < end {
            // As far as one block counts.
            let until = end.min(((from >> layout.block_bits()) + 1) << layout.block_bits());
            self.blocks.update(self.storage, from..until, &mut change)?;
            from = until;
        }
        Ok(())
    }

    /// Drops the refcount blocks that count nothing: what they counted is gone. `true`: there is something to commit.
    ///
    /// # Errors
    ///
    /// What reading refcount blocks fails with.
    pub(in crate::qcow2) fn drop_idle_blocks(&mut self) -> Result<bool> {
        self.attempt(|editor| {
            let bits = editor.layout.cluster_bits;
            for block in 0..editor.blocks.old.len() as u64 {
                let Some(at) = editor.blocks.drop_idle(editor.storage, block)? else {
                    continue;
                };
                if editor.blocks.index_of(at >> bits) == block {
                    // Its own refcount is gone with it.
                    note_freed(&mut editor.freed, at, 1 << bits);
                } else {
                    editor.count(at >> bits, 1, -1)?;
                    editor.house()?;
                }
            }
            Ok(editor.blocks.changed())
        })
    }

    /// Finds new places for the blocks that change. A place has a refcount itself, perhaps in one
    /// more block; but a block counts far more clusters than one, so this ends.
    pub(super) fn house(&mut self) -> Result<()> {
        while let Some(block) = self.blocks.homeless.pop() {
            let home = self.find(1)?;
            self.blocks.settle(block, home << self.layout.cluster_bits);
            self.count(home, 1, 1)?;
            let old = self.blocks.old_at(block);
            if old != 0 {
                self.count(old >> self.layout.cluster_bits, 1, -1)?;
            }
        }
        Ok(())
    }
}

/// Notes that the cluster at `at` is free, to give it back to the host.
fn note_freed(freed: &mut Vec<(u64, u64)>, at: u64, cluster: u64) {
    let room = freed.len() < FREED_MAX;
    match freed.last_mut() {
        Some((start, len)) if *start + *len == at => *len += cluster,
        _ if room => freed.push((at, cluster)),
        _ => {}
    }
}
