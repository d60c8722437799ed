//! Writing a new image in one go, from its first guest cluster to its last: the only way to compressed clusters.
//!
//! ```text
//!   header │ name │ L1 │ data, compressed bytes, and each L2 table when it is full …
//! ```
//!
//! Compressed bytes follow one another without gaps; clusters as they are and tables begin at multiples of a cluster. L1
//! table and header come last, each behind a barrier: an image that was not finished shows no format.

use super::create::{CreateOptions, begin, seal};
use super::header::Header;
use crate::qcow2::{Compression, Compressor};
use block::{Context, Error, Result, Storage, align_up};

/// Bytes that are gathered before they are written.
const BUFFER_BYTES: usize = 4 << 20;
const SECTOR: usize = 512;
/// In an entry: compressed bytes.
const COMPRESSED: u64 = 1 << 63;

/// A new image under way. Memory: 4 MiB, a cluster, a table, and the L1 table (at most 64 MiB).
#[derive(Debug)]
pub struct ImageWriter<'a> {
    storage: &'a dyn Storage,
    header: Header,
    /// What is not written yet, from byte `buffer_at` of the file on.
    buffer: Vec<u8>,
    buffer_at: u64,
    /// Guest cluster that comes next at the earliest.
    next: u64,
    l1: Vec<u8>,
    /// The L2 table being filled, and its L1 index.
    l2: Vec<u8>,
    l2_index: usize,
    l2_used: bool,
    /// The entry of a cluster of zeros: where one is packed, others lead to it.
    zeros: Option<u64>,
}

impl<'a> ImageWriter<'a> {
    /// Begins an image in `storage`, whose contents are lost.
    ///
    /// # Errors
    ///
    /// `Invalid` for options that [`super::create`] refuses too; what the host refused.
    pub fn new(storage: &'a dyn Storage, options: &CreateOptions) -> Result<Self> {
        options.validate()?;
        let header = options.header();
        begin(storage, &header).context(|| storage.name())?;
        Ok(Self {
            storage,
            buffer: Vec::new(),
            buffer_at: align_up(header.l1_end(), header.cluster_size()),
            next: 0,
            // At most 64 MiB, and 64 KiB.
            l1: vec![0; header.l1_entries() as usize * 8],
            l2: vec![0; header.table_bytes() as usize],
            l2_index: 0,
            l2_used: false,
            zeros: None,
            header,
        })
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Whether what is left out reads as a backing file.
    pub fn has_backing(&self) -> bool {
        self.header.backing.is_some()
    }

    /// Guest clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.header.disk_bytes().div_ceil(self.cluster_size())
    }

    /// Puts guest cluster `guest` there as it is. Guest clusters come in order; those left out read as the
    /// backing file, or as zeros.
    ///
    /// # Errors
    ///
    /// For clusters that are out of order, or of another size; what writing fails with.
    pub fn put_data(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 != self.cluster_size() {
            return Err(self.wrong(guest, "is not of a cluster's size"));
        }
        self.begin(guest)?;
        let at = self.align();
        self.put(guest, at, bytes)
    }

    /// Puts guest cluster `guest` there as [`Compressor::pack`] made it: less than a cluster.
    ///
    /// # Errors
    ///
    /// As [`ImageWriter::put_data`].
    pub fn put_compressed(&mut self, guest: u64, packed: &[u8]) -> Result<()> {
        let len = packed.len() as u64;
        if len == 0 || len >= self.cluster_size() {
            return Err(self.wrong(guest, "is not smaller when packed"));
        }
        self.begin(guest)?;
        let shift = 63 - self.header.cluster_bits;
        let at = self.end();
        if (at + len) >> shift != 0 {
            return Err(self.wrong(guest, "would lie behind what an entry can say"));
        }
        self.put(guest, COMPRESSED | len << shift | at, packed)
    }

    /// Makes guest cluster `guest` read as zeros whatever the backing file has.
    ///
    /// # Errors
    ///
    /// As [`ImageWriter::put_data`].
    pub fn put_zero(&mut self, guest: u64) -> Result<()> {
        if !self.has_backing() {
            return self.begin(guest);
        }
        if let Some(entry) = self.zeros {
            self.begin(guest)?;
            return self.put(guest, entry, &[]);
        }
        let zeros = vec![0; self.cluster_size() as usize];
        let mut packed = Vec::new();
        if !Compressor::new(Compression::Zlib)?.pack(&zeros, &mut packed) {
            return self.put_data(guest, &zeros);
        }
        self.put_compressed(guest, &packed)?;
        let at = guest as usize % (self.l2.len() / 8) * 8;
        self.zeros = crate::words::read_u64(&self.l2, at);
        Ok(())
    }

    /// Writes what is left, then the L1 table, then the header. The image is complete and durable afterwards.
    ///
    /// # Errors
    ///
    /// What writing fails with.
    pub fn finish(mut self) -> Result<()> {
        self.end_table()?;
        self.write_out()?;
        let storage = self.storage;
        storage
            .write_at(self.buffer_at, &self.buffer)
            .and_then(|()| storage.write_at(self.header.l1_table_offset, &self.l1))
            .and_then(|()| seal(storage, &self.header))
            .context(|| storage.name())
    }

    fn wrong(&self, guest: u64, what: &str) -> Error {
        let at = guest.saturating_mul(self.cluster_size());
        Error::invalid(format!(
            "{}: cluster at {at:#x} {what}",
            self.storage.name()
        ))
    }

    /// Where the next byte goes.
    fn end(&self) -> u64 {
        self.buffer_at + self.buffer.len() as u64
    }

    /// Goes on to the next multiple of a cluster, which it returns.
    fn align(&mut self) -> u64 {
        let end = align_up(self.end(), self.cluster_size());
        // Less than 64 KiB more.
        self.buffer.resize((end - self.buffer_at) as usize, 0);
        end
    }

    /// Goes on to guest cluster `guest`.
    fn begin(&mut self, guest: u64) -> Result<()> {
        if guest < self.next || guest >= self.clusters() {
            return Err(self.wrong(guest, "is out of order, or behind the disk's end"));
        }
        self.next = guest + 1;
        let index = (guest >> self.header.l2_bits) as usize;
        if index != self.l2_index {
            self.end_table()?;
            self.l2_index = index;
        }
        Ok(())
    }

    /// Appends `bytes`, which `entry` leads to.
    fn put(&mut self, guest: u64, entry: u64, bytes: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        let at = guest as usize % (self.l2.len() / 8) * 8;
        store(&mut self.l2, at, entry);
        self.l2_used = true;
        match self.buffer.len() < BUFFER_BYTES {
            true => Ok(()),
            false => self.write_out(),
        }
    }

    /// Appends the table being filled.
    fn end_table(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.l2_used) {
            return Ok(());
        }
        let at = self.align();
        self.buffer.extend_from_slice(&self.l2);
        store(&mut self.l1, self.l2_index * 8, at);
        self.l2.fill(0);
        self.write_out()
    }

    /// Writes what was gathered, but for a sector that is not full.
    fn write_out(&mut self) -> Result<()> {
        let whole = self.buffer.len() / SECTOR * SECTOR;
        let part = self.buffer.get(..whole).unwrap_or_default();
        self.storage
            .write_at(self.buffer_at, part)
            .context(|| self.storage.name())?;
        self.buffer.drain(..whole);
        self.buffer_at += whole as u64;
        Ok(())
    }
}

/// Stores the entry at byte `at` of a table.
fn store(table: &mut [u8], at: usize, entry: u64) {
    for (to, from) in table.iter_mut().skip(at).zip(entry.to_be_bytes()) {
        *to = from;
    }
}
