//! Refcounts: the table in memory, blocks in slices through the cache
//! (specification: "Host cluster management").

use super::Qcow2;
use super::cache::Owner;
use super::entry::{FRESH, FRESH_ZEROED, OFFSET_MASK, refcount_at};
use super::header::REFCOUNT_TABLE_BYTES_MAX;
use super::state::{Ask, Deref, Halt, Sectors, State};
use crate::{FileId, Load, Need};
use block::{Error, ErrorKind, HostOffset};
use std::sync::atomic::Ordering;

/// The refcount table.
#[derive(Debug)]
pub(super) struct RefTable {
    /// Offsets of the blocks, with the marks of fresh ones; as many as the table can hold.
    pub(super) entries: Vec<u64>,
    /// Where the table is, in clusters of the file.
    pub(super) first: u64,
    pub(super) clusters: u64,
    pub(super) changed: Sectors,
    /// Blocks that no flush has written yet.
    pub(super) fresh: Vec<u32>,
    /// The table got a new place, which no flush has taken on yet.
    pub(super) moved: bool,
    /// First cluster and clusters of the place that the header says.
    pub(super) known: (u64, u64),
    /// Former places of the table, given back on close.
    pub(super) former: Vec<Deref>,
}

impl RefTable {
    pub(super) fn new(entries: Vec<u64>, first: u64, clusters: u64) -> Self {
        let sectors = entries.len().div_ceil(64);
        Self {
            entries,
            first,
            clusters,
            changed: Sectors::new(sectors),
            fresh: Vec::new(),
            moved: false,
            known: (first, clusters),
            former: Vec::new(),
        }
    }

    fn entry(&self, block: u64) -> u64 {
        let index = usize::try_from(block).unwrap_or(usize::MAX);
        self.entries.get(index).copied().unwrap_or(0)
    }
}

impl Qcow2 {
    fn block_of(&self, cluster: u64) -> u64 {
        cluster >> self.geometry.block_refcount_bits()
    }

    /// The slice of refcounts that holds `cluster`'s.
    pub(super) fn ref_slice_of(&self, cluster: u64) -> u64 {
        cluster >> self.geometry.slice_refcount_bits()
    }

    /// Whether there is a refcount block for `cluster`.
    pub(super) fn has_block(&self, st: &State, cluster: u64) -> bool {
        st.refs.entry(self.block_of(cluster)) != 0
    }

    /// The frame with the refcount of `cluster`, whose block must exist.
    pub(super) fn ref_frame(&self, st: &mut State, cluster: u64) -> Ask<u32> {
        let slice = self.ref_slice_of(cluster);
        let owner = Owner::Ref(slice);
        if let Some(frame) = st.cache.find(&self.tables, owner) {
            if let Some(f) = self.tables.frames.get(frame as usize) {
                f.used.store(true, Ordering::Relaxed);
            }
            return Ok(frame);
        }
        if st.cache.is_loading(owner) {
            return Err(Halt::Wait(owner.key()));
        }
        let g = &self.geometry;
        let per_block = g.slices_per_table_bits();
        let entry = st.refs.entry(slice >> per_block);
        if entry == 0 {
            return Err(Halt::Fail(Error::corrupt(format!(
                "{}: host cluster {cluster:#x} is in use, but has no refcount block",
                self.name
            ))));
        }
        let within = slice & ((1 << per_block) - 1);
        let host = (entry & OFFSET_MASK) + (within << g.slice_bits);
        if entry & FRESH != 0 {
            return st.cache.add_zeros(&self.tables, g, slice, host);
        }
        st.cache.start_load(&self.tables, g, slice, host)?;
        Err(Halt::Need(Need::Load(self.load(owner, host, 1))))
    }

    pub(super) fn load(&self, owner: Owner, host: u64, slices: u32) -> Load {
        Load {
            key: owner.key(),
            file: FileId::IMAGE,
            offset: HostOffset(host),
            // At most a cluster of 2 MiB.
            len: self.geometry.slice() as u32 * slices,
        }
    }

    fn refcount_place(&self, cluster: u64) -> (usize, u32, u64) {
        let index = cluster & ((1 << self.geometry.slice_refcount_bits()) - 1);
        refcount_at(index, self.geometry.refcount_order)
    }

    /// The refcount of `cluster`, which is in `frame`.
    pub(super) fn refcount(&self, frame: u32, cluster: u64) -> u64 {
        let (word, shift, mask) = self.refcount_place(cluster);
        let words = self.tables.words(frame);
        words.get(word).map_or(0, |w| w.load(Ordering::Relaxed)) >> shift & mask
    }

    pub(super) fn set_refcount(&self, st: &mut State, frame: u32, cluster: u64, count: u64) {
        let (word, shift, mask) = self.refcount_place(cluster);
        let words = self.tables.words(frame);
        let old = words.get(word).map_or(0, |w| w.load(Ordering::Relaxed));
        let new = old & !(mask << shift) | (count & mask) << shift;
        st.cache.set(&self.tables, &self.geometry, frame, word, new);
    }

    /// The refcount of any host cluster; 0 where there is no block for it.
    pub(super) fn refcount_of(&self, st: &mut State, cluster: u64) -> Ask<u64> {
        if !self.has_block(st, cluster) {
            return Ok(0);
        }
        let frame = self.ref_frame(st, cluster)?;
        Ok(self.refcount(frame, cluster))
    }

    /// Pins the refcounts of clusters that are about to be dereferenced, and
    /// checks that they may be.
    pub(super) fn pin_old(&self, st: &mut State, old: Deref) -> Ask<()> {
        for cluster in old.first..old.first + old.count {
            let pinned = match self.refcount_of(st, cluster) {
                Ok(count) if count > 0 && !st.places.holds(cluster) => self.ref_frame(st, cluster),
                Ok(count) => Err(Halt::Fail(Error::corrupt(format!(
                    "{}: host cluster at {:#x} is the guest's, but {}: run diskplane check",
                    self.name,
                    cluster << self.geometry.cluster_bits,
                    if count == 0 {
                        "its refcount is 0"
                    } else {
                        "holds metadata"
                    },
                )))),
                Err(halt) => Err(halt),
            };
            match pinned {
                Ok(frame) => st.cache.pin(frame),
                Err(halt) => {
                    let done = Deref {
                        first: old.first,
                        count: cluster - old.first,
                    };
                    self.unpin_old(st, done);
                    return Err(halt);
                }
            }
        }
        Ok(())
    }

    /// Undoes `pin_old`.
    pub(super) fn unpin_old(&self, st: &mut State, old: Deref) {
        for cluster in old.first..old.first + old.count {
            let owner = Owner::Ref(self.ref_slice_of(cluster));
            if let Some(frame) = st.cache.find(&self.tables, owner) {
                st.cache.unpin(frame);
            }
        }
    }

    /// Notes that clusters pinned by `pin_old` are not referred to any more.
    pub(super) fn dereference(&self, st: &mut State, old: Deref) {
        let covered = st.covered.derefs;
        let len = st.derefs.len();
        if let Some(last) = st.derefs.last_mut()
            && len > covered
            && last.first + last.count == old.first
        {
            last.count += old.count;
            return;
        }
        st.derefs.push(old);
    }

    /// Lowers the refcounts of the first `count` dereferences, whose changes are durable now.
    pub(super) fn apply_derefs(&self, st: &mut State, count: usize) {
        let mut derefs = std::mem::take(&mut st.derefs);
        for old in derefs.drain(..count.min(derefs.len())) {
            for cluster in old.first..old.first + old.count {
                let owner = Owner::Ref(self.ref_slice_of(cluster));
                let Some(frame) = st.cache.find(&self.tables, owner) else {
                    debug_assert!(false, "refcounts of a dereference were not pinned");
                    continue;
                };
                match self.refcount(frame, cluster) {
                    // Two entries of a corrupt image shared it: the first dereference freed it.
                    0 => tracing::warn!(
                        image = self.name,
                        cluster,
                        "a cluster was referred to more often than its refcount says"
                    ),
                    refcount => {
                        self.set_refcount(st, frame, cluster, refcount - 1);
                        if refcount == 1 {
                            st.space.freed(cluster);
                            self.forget_tail(st, cluster);
                        }
                    }
                }
                st.cache.unpin(frame);
            }
        }
        st.derefs = derefs;
    }

    /// Makes `cluster`, which is free, the refcount block of the range that it lies in.
    pub(super) fn make_block(&self, st: &mut State, cluster: u64, zeroed: bool) -> Ask<()> {
        let block = self.block_of(cluster);
        let slice = self.ref_slice_of(cluster);
        let base = cluster << self.geometry.cluster_bits;
        let within = slice & ((1 << self.geometry.slices_per_table_bits()) - 1);
        let host = base + (within << self.geometry.slice_bits);
        let frame = st
            .cache
            .add_zeros(&self.tables, &self.geometry, slice, host)?;
        self.put_block(st, block, base, zeroed);
        self.set_refcount(st, frame, cluster, 1);
        Ok(())
    }

    fn put_block(&self, st: &mut State, block: u64, base: u64, zeroed: bool) {
        let marks = if zeroed { FRESH | FRESH_ZEROED } else { FRESH };
        // The caller has made the table large enough: at most a million entries.
        let index = block as usize;
        if let Some(entry) = st.refs.entries.get_mut(index) {
            *entry = base | marks;
            st.refs.changed.mark_entry(index);
            st.refs.fresh.push(index as u32);
            st.places.blocks.insert(base >> self.geometry.cluster_bits);
            st.order_refcount();
        }
    }

    /// Whether the table has room for an entry for `cluster`'s block.
    pub(super) fn table_covers(&self, st: &State, cluster: u64) -> bool {
        self.block_of(cluster) < st.refs.entries.len() as u64
    }

    /// Clusters that [`Qcow2::move_table`] needs in one piece so that the table covers `first` and
    /// them: `(clusters of the table, all)`.
    pub(super) fn table_plan(&self, st: &State, first: u64) -> Ask<(u64, u64)> {
        let g = &self.geometry;
        let per_cluster_bits = g.cluster_bits - 3;
        let mut clusters = st.refs.clusters + st.refs.clusters / 2 + 1;
        loop {
            // Blocks for the table and themselves, generously.
            let blocks = (clusters >> g.block_refcount_bits()) + 3;
            let end = first + clusters + blocks;
            let needed = (self.block_of(end) + 2).div_ceil(1 << per_cluster_bits);
            if needed <= clusters {
                let table_bytes = clusters << g.cluster_bits;
                if table_bytes > REFCOUNT_TABLE_BYTES_MAX.max(g.cluster()) {
                    return Err(Halt::Fail(Error::new(
                        ErrorKind::NoSpace,
                        format!("{}: its refcount table would pass 8 MiB", self.name),
                    )));
                }
                return Ok((clusters, clusters + blocks));
            }
            clusters = needed;
        }
    }

    /// Moves the refcount table to host clusters from `first` on: the first few become
    /// the refcount blocks of the new place where there are none, then the table follows.
    /// Returns how many of the `total` clusters it used.
    pub(super) fn move_table(
        &self,
        st: &mut State,
        first: u64,
        (clusters, total): (u64, u64),
        zeroed: bool,
    ) -> Ask<u64> {
        let g = self.geometry;
        let last_block = self.block_of(first + total - 1);
        let missing: Vec<u64> = (self.block_of(first)..=last_block)
            .filter(|block| st.refs.entry(*block) == 0)
            .collect();
        let used = missing.len() as u64 + clusters;
        // All or nothing: first everything that may halt.
        let mut pinned = Vec::new();
        let ready = self.ready_for_table(st, first..first + used, &mut pinned);
        if ready.is_ok() {
            let capacity = (clusters as usize) << (g.cluster_bits - 3);
            st.refs.entries.resize(capacity, 0);
            st.refs.changed = Sectors::new(capacity.div_ceil(64));
            for (block, i) in missing.iter().zip(0..) {
                self.put_block(st, *block, (first + i) << g.cluster_bits, zeroed);
            }
            for cluster in first..first + used {
                let frame = self.ref_frame(st, cluster)?;
                self.set_refcount(st, frame, cluster, 1);
            }
        }
        for frame in pinned {
            st.cache.unpin(frame);
        }
        ready?;
        st.refs.former.push(Deref {
            first: st.refs.first,
            count: st.refs.clusters,
        });
        st.refs.first = first + missing.len() as u64;
        st.refs.clusters = clusters;
        let table = st.refs.first..st.refs.first + clusters;
        st.places.fixed.push(table);
        st.refs.moved = true;
        st.order_refcount();
        Ok(used)
    }

    /// Loads and pins the refcounts of `range` that exist, and checks that the clusters are free and
    /// that there are frames for the refcounts that do not exist.
    fn ready_for_table(
        &self,
        st: &mut State,
        range: std::ops::Range<u64>,
        pinned: &mut Vec<u32>,
    ) -> Ask<()> {
        let mut absent = 0;
        let mut last = None;
        for cluster in range {
            let slice = self.ref_slice_of(cluster);
            let exists = self.has_block(st, cluster);
            if last != Some(slice) {
                last = Some(slice);
                if exists {
                    let frame = self.ref_frame(st, cluster)?;
                    st.cache.pin(frame);
                    pinned.push(frame);
                } else {
                    absent += 1;
                }
            }
            if exists && self.refcount_of(st, cluster)? != 0 || st.places.holds(cluster) {
                return Err(Halt::Fail(Error::corrupt(format!(
                    "{}: host cluster {cluster:#x} behind the end of the file is in use",
                    self.name
                ))));
            }
        }
        if st.cache.available() < absent {
            return Err(Halt::Need(Need::Commit));
        }
        Ok(())
    }
}
