//! Writing a new image in one go, from its first guest cluster to its last: the only way to compressed clusters.
//!
//! Everything is appended, so that memory does not grow with the image beside L1 and refcount table:
//!
//! ```text
//!   header │ data, compressed data, L2 tables and refcount blocks as they get full … │ L1 │ blocks │ refcount table
//! ```
//!
//! Compressed clusters are packed without gaps, byte by byte, over the borders of clusters that follow one
//! another; each host cluster counts those that touch it. Where a refcount can count no more the
//! next one begins in a cluster of its own.
//!
//! A header that was there before is gone first, and the new one is written last, each behind a barrier: an image that
//! was not finished shows no format.

use super::create::{CreateOptions, encode, forget};
use super::entry::{COPIED, HOST_END_MAX, ZERO, compressed_end, compressed_entry};
use super::{Compression, HOST_OFFSET_END, Header, REFCOUNT_TABLE_BYTES_MAX};
use block::{Context, Error, ErrorKind, Result, Storage, size};
use std::collections::BTreeMap;

/// Bytes that are gathered before they are written.
const BUFFER_BYTES: usize = 4 << 20;

/// Where the next compressed cluster may begin.
#[derive(Clone, Copy, Debug)]
struct Tail {
    /// First free byte; not the first of a cluster.
    offset: u64,
    /// Compressed clusters that touch its host cluster.
    references: u64,
}

/// A new image under way. Memory: 4 MiB, three clusters, L1 table (at most 32 MiB) and refcount table (8 MiB).
#[derive(Debug)]
pub struct ImageWriter<'a> {
    storage: &'a dyn Storage,
    header: Header,
    compression: Compression,
    has_backing: bool,
    /// First cluster that nothing was put into.
    end: u64,
    /// What is not written yet, from host offset `buffer_at` on, up to `end`.
    buffer: Vec<u8>,
    buffer_at: u64,
    tail: Option<Tail>,
    /// Guest cluster that comes next at the earliest.
    next: u64,
    l1: Vec<u64>,
    /// The L2 table being filled, and its L1 index.
    l2: Vec<u8>,
    l2_index: usize,
    l2_used: bool,
    /// Refcount blocks that may still change.
    blocks: BTreeMap<u64, Vec<u8>>,
    table: Vec<u64>,
}

impl<'a> ImageWriter<'a> {
    /// Begins an image in `storage`: a new file, or a device whose contents may be lost.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for options that are refused by [`super::create`] too, for an external data
    /// file, which cannot have compressed clusters, and for encryption; or what the host refused.
    pub fn new(storage: &'a dyn Storage, options: &CreateOptions) -> Result<Self> {
        options.validate()?;
        if options.data_file.is_some() {
            return Err(Error::invalid(
                "an image with an external data file cannot have compressed clusters",
            ));
        }
        if options.encryption.is_some() {
            return Err(Error::invalid(
                "compression and encryption exclude each other",
            ));
        }
        let (header, _) = options.header();
        let cluster = options.cluster_size;
        forget(storage, cluster).context(|| storage.name())?;
        let mut writer = Self {
            storage,
            compression: options.compression,
            has_backing: options.backing.is_some(),
            end: 0,
            buffer: Vec::new(),
            buffer_at: 0,
            tail: None,
            next: 0,
            // At most 4 Mi entries.
            l1: vec![0; header.l1_size as usize],
            l2: vec![0; cluster as usize],
            l2_index: 0,
            l2_used: false,
            blocks: BTreeMap::new(),
            table: Vec::new(),
            header,
        };
        // The header's own cluster.
        writer.append(1)?;
        Ok(writer)
    }

    /// How its clusters are to be compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Whether what is left out reads as a backing file.
    pub fn has_backing(&self) -> bool {
        self.has_backing
    }

    /// Guest clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.header.size.div_ceil(self.cluster_size())
    }

    /// Puts guest cluster `guest` there as it is. Guest clusters come in order; those left out read as the
    /// backing file, or as zeros.
    pub fn put_data(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 != self.cluster_size() {
            return Err(self.wrong(guest, "is not of a cluster's size"));
        }
        self.begin(guest)?;
        let host = self.append(1)?;
        self.store(host, bytes);
        self.set_entry(guest, host | COPIED, u64::from(u32::MAX));
        self.settle()
    }

    /// Puts guest cluster `guest` there as [`super::Compressor::pack`] made it: less than a cluster.
    pub fn put_compressed(&mut self, guest: u64, packed: &[u8]) -> Result<()> {
        let (cluster, len) = (self.cluster_size(), packed.len() as u64);
        if len == 0 || len >= cluster {
            return Err(self.wrong(guest, "is not smaller when packed"));
        }
        self.begin(guest)?;
        let offset = self.place(len)?;
        let cluster_bits = self.header.cluster_bits;
        if offset + len > compressed_end(cluster_bits) {
            return Err(self.full());
        }
        self.store(offset, packed);
        self.set_entry(guest, compressed_entry(cluster_bits, offset, len), 0);
        self.settle()
    }

    /// Makes guest cluster `guest` read as zeros whatever the backing file has.
    pub fn put_zero(&mut self, guest: u64) -> Result<()> {
        if !self.has_backing {
            return self.begin(guest);
        }
        if self.header.version < 3 {
            // There is no flag for it.
            let zeros = vec![0; self.l2.len()];
            return self.put_data(guest, &zeros);
        }
        self.begin(guest)?;
        match self.header.extended_l2() {
            true => self.set_entry(guest, 0, u64::from(u32::MAX) << 32),
            false => self.set_entry(guest, ZERO, 0),
        }
        Ok(())
    }

    /// Writes what is left, then the header. The image is complete and durable afterwards.
    pub fn finish(mut self) -> Result<()> {
        self.end_table()?;
        self.tail = None;
        let cluster = self.cluster_size();
        let l1: Vec<u8> = self.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        if !l1.is_empty() {
            let at = self.append((l1.len() as u64).div_ceil(cluster))?;
            self.store(at, &l1);
            self.header.l1_table_offset = at;
        }
        let clusters = self.table_clusters();
        if clusters * cluster > REFCOUNT_TABLE_BYTES_MAX.max(cluster) {
            return Err(Error::invalid(format!(
                "{}: needs a refcount table of {}: choose larger clusters",
                self.storage.name(),
                size::human(clusters * cluster)
            )));
        }
        let at = self.append(clusters)?;
        // A block's own cluster may need another block.
        while let Some(range) = self.blocks.keys().next().copied() {
            self.end_block(range)?;
        }
        let table: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
        debug_assert!(table.len() as u64 <= clusters * cluster);
        self.store(at, &table);
        self.header.refcount_table_offset = at;
        // At most 8 MiB of clusters.
        self.header.refcount_table_clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        self.write_out(self.end * cluster)?;
        let header = encode(&mut self.header)?;
        let storage = self.storage;
        storage
            .sync()
            .and_then(|()| storage.write_at(0, &header))
            .and_then(|()| storage.sync())
            .context(|| storage.name())
    }

    /// Clusters of the refcount table when it and the blocks that are lacking come next.
    fn table_clusters(&self) -> u64 {
        let (cluster, per_block) = (self.cluster_size(), self.per_block());
        let written = self.table.iter().filter(|e| **e != 0).count() as u64;
        let (mut total, mut table) = (self.end, 0);
        // Each turn adds what the turn before lacked; a block covers at least 64 clusters.
        loop {
            let ranges = total.div_ceil(per_block);
            table = (ranges * 8).div_ceil(cluster).max(table);
            let needed = self.end + table + (ranges - written);
            if needed <= total {
                return table;
            }
            total = needed;
        }
    }

    /// Host clusters that a refcount block counts.
    fn per_block(&self) -> u64 {
        self.cluster_size() * 8 / u64::from(self.header.refcount_bits())
    }

    fn wrong(&self, guest: u64, what: &str) -> Error {
        let at = guest.saturating_mul(self.cluster_size());
        Error::invalid(format!(
            "{}: guest cluster at {at:#x} {what}",
            self.storage.name()
        ))
    }

    fn full(&self) -> Error {
        let name = self.storage.name();
        Error::new(
            ErrorKind::NoSpace,
            format!("{name}: the file passes what an entry can point at"),
        )
    }

    /// Goes on to guest cluster `guest`.
    fn begin(&mut self, guest: u64) -> Result<()> {
        if guest < self.next || guest >= self.clusters() {
            return Err(self.wrong(guest, "is out of order, or behind the disk's end"));
        }
        self.next = guest + 1;
        let entries = self.header.l1_entry_bytes() / self.cluster_size();
        // At most 4 Mi.
        let index = (guest / entries) as usize;
        if index != self.l2_index {
            self.end_table()?;
            self.l2_index = index;
        }
        Ok(())
    }

    fn set_entry(&mut self, guest: u64, raw: u64, bitmap: u64) {
        let entries = self.header.l1_entry_bytes() / self.cluster_size();
        // Within a cluster.
        let index = (guest % entries) as usize;
        let mut put = |word: usize, value: u64| {
            if let Some(bytes) = self.l2.get_mut(word * 8..word * 8 + 8) {
                bytes.copy_from_slice(&value.to_be_bytes());
            }
        };
        match self.header.extended_l2() {
            true => {
                put(2 * index, raw);
                put(2 * index + 1, bitmap);
            }
            false => put(index, raw),
        }
        self.l2_used = true;
    }

    /// Writes the L2 table that was filled.
    fn end_table(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.l2_used) {
            return Ok(());
        }
        let at = self.append(1)?;
        let mut table = std::mem::take(&mut self.l2);
        self.store(at, &table);
        table.fill(0);
        self.l2 = table;
        if let Some(entry) = self.l1.get_mut(self.l2_index) {
            *entry = at | COPIED;
        }
        self.settle()
    }

    /// Takes `count` clusters at the end, each with refcount 1 and zeros. Returns where.
    fn append(&mut self, count: u64) -> Result<u64> {
        let bits = self.header.cluster_bits;
        let at = self.end << bits;
        if self.end + count > (HOST_OFFSET_END.min(HOST_END_MAX)) >> bits {
            return Err(self.full());
        }
        for cluster in self.end..self.end + count {
            self.set_refcount(cluster, 1);
        }
        self.end += count;
        let len = (self.end << bits) - self.buffer_at;
        // A few MiB, and the L1 table at the end.
        self.buffer.resize(len as usize, 0);
        Ok(at)
    }

    /// A place for `len` compressed bytes, with its refcounts.
    fn place(&mut self, len: u64) -> Result<u64> {
        let cluster = self.cluster_size();
        let max = match self.header.refcount_bits() {
            64 => u64::MAX,
            bits => (1 << bits) - 1,
        };
        let mut offset = None;
        if let Some(tail) = self.tail.filter(|tail| tail.references < max) {
            let host = tail.offset / cluster;
            let fits = tail.offset + len <= (host + 1) * cluster;
            if fits || host + 1 == self.end {
                self.set_refcount(host, tail.references + 1);
                if !fits {
                    self.append(1)?;
                }
                offset = Some(tail.offset);
            }
        }
        let (at, before) = match (offset, self.tail) {
            (Some(at), Some(tail)) => (at, tail.references),
            _ => (self.append(1)?, 0),
        };
        let end = at + len;
        let stays = (end - 1) / cluster == at / cluster;
        self.tail = (!end.is_multiple_of(cluster)).then_some(Tail {
            offset: end,
            references: if stays { before + 1 } else { 1 },
        });
        Ok(at)
    }

    /// Puts bytes where they belong; all of it is still in the buffer.
    fn store(&mut self, at: u64, bytes: &[u8]) {
        let from = at.checked_sub(self.buffer_at).map(|from| from as usize);
        let to = from.and_then(|from| self.buffer.get_mut(from..from + bytes.len()));
        debug_assert!(to.is_some(), "written before it was put");
        if let Some(to) = to {
            to.copy_from_slice(bytes);
        }
    }

    fn set_refcount(&mut self, cluster: u64, value: u64) {
        let (per_block, bits) = (self.per_block(), u64::from(self.header.refcount_bits()));
        // At most 2 MiB.
        let len = self.cluster_size() as usize;
        let block = self
            .blocks
            .entry(cluster / per_block)
            .or_insert_with(|| vec![0; len]);
        // Within a cluster.
        let bit = cluster % per_block * bits;
        let at = (bit / 8) as usize;
        if bits >= 8 {
            let width = (bits / 8) as usize;
            let bytes = value.to_be_bytes();
            if let (Some(to), Some(from)) = (block.get_mut(at..at + width), bytes.get(8 - width..))
            {
                to.copy_from_slice(from);
            }
        } else if let Some(byte) = block.get_mut(at) {
            let (shift, mask) = (bit % 8, (1u8 << bits) - 1);
            // It fits the mask.
            *byte = *byte & !(mask << shift) | (value as u8 & mask) << shift;
        }
    }

    /// Appends refcount block `range`, which does not change any more.
    fn end_block(&mut self, range: u64) -> Result<()> {
        let at = self.append(1)?;
        let block = self.blocks.remove(&range).unwrap_or_default();
        self.store(at, &block);
        // At most 8 MiB: checked in the end.
        let index = range as usize;
        if self.table.len() <= index {
            self.table.resize(index + 1, 0);
        }
        if let Some(entry) = self.table.get_mut(index) {
            *entry = at;
        }
        Ok(())
    }

    /// Appends the blocks that are full, and writes what is settled.
    fn settle(&mut self) -> Result<()> {
        let (cluster, per_block) = (self.cluster_size(), self.per_block());
        while let Some(range) = self.blocks.keys().next().copied() {
            if (range + 1) * per_block > self.end {
                break;
            }
            if (self.tail).is_some_and(|tail| tail.offset / cluster / per_block == range) {
                // Its cluster is not counted again.
                self.tail = None;
            }
            self.end_block(range)?;
        }
        if self.buffer.len() >= BUFFER_BYTES {
            let end = self.end * cluster;
            if (self.tail).is_some_and(|tail| tail.offset / cluster + 1 != self.end) {
                // Waiting for something small would keep all that follows in memory.
                self.tail = None;
            }
            let open = self
                .tail
                .map_or(end, |tail| tail.offset / cluster * cluster);
            self.write_out(open)?;
        }
        Ok(())
    }

    /// Writes the buffer up to host offset `until`.
    fn write_out(&mut self, until: u64) -> Result<()> {
        // Within the buffer.
        let len = until.saturating_sub(self.buffer_at) as usize;
        if let Some(bytes) = self.buffer.get(..len).filter(|bytes| !bytes.is_empty()) {
            self.storage
                .write_at(self.buffer_at, bytes)
                .context(|| self.storage.name())?;
            self.buffer.drain(..len);
            self.buffer_at += len as u64;
        }
        Ok(())
    }
}
