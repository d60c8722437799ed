//! Stream-optimised images: grains are compressed, each behind a marker that names its place on the disk (specification:
//! "Stream-Optimized Compressed Sparse Extents"). They are written once, in the order of the disk.
//!
//! ```text
//!   header │ descriptor │ redundant directory, tables │ directory, tables │ marker, grain │ marker, grain │ …
//!                                                                           └ sector (8), bytes (4), zlib stream
//! ```
//!
//! So QEMU writes them; others have tables between the grains, and the directory in a footer, which is read too.

use super::create::{CreateOptions, new_cid, tables_of, write_body};
use super::header::{Header, SECTOR, ZEROED, u32_at};
use block::{Context, Error, ErrorKind, Result, Storage};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Bytes of a marker before its grain.
const MARKER_BYTES: usize = 12;
/// QEMU's level.
const LEVEL: u32 = 6;
/// Bytes that are gathered before they are written.
const BUFFER_BYTES: usize = 4 << 20;

/// Unpacks the grain in `input`, which may go on behind it, into all of `output`.
///
/// # Errors
///
/// [`block::ErrorKind::Corrupt`] for a marker that is not a grain's, and data that are not what they should be.
pub(super) fn unpack(markers: bool, input: &[u8], output: &mut [u8]) -> Result<()> {
    let data = match markers {
        false => input,
        true => {
            // A grain's marker has the bytes of its data where others have 0, and then their kind.
            let len = u32_at(input, 8) as usize;
            let most = input.len().saturating_sub(MARKER_BYTES);
            if len == 0 || len > most {
                return Err(Error::corrupt(format!(
                    "compressed grain: its marker says {len} bytes, there is room for 1 to {most} before the next"
                )));
            }
            input
                .get(MARKER_BYTES..MARKER_BYTES + len)
                .unwrap_or_default()
        }
    };
    let mut stream = Decompress::new(true);
    let status = stream
        .decompress(data, output, FlushDecompress::Finish)
        .map_err(|e| Error::corrupt(format!("compressed grain: {e}")))?;
    // One that goes on behind the disk's end has more than there is room for.
    let _: Status = status;
    match stream.total_out() == output.len() as u64 {
        true => Ok(()),
        false => Err(Error::corrupt(format!(
            "compressed grain: unpacks to {} bytes, not {}",
            stream.total_out(),
            output.len()
        ))),
    }
}

/// Packs grains, one after the other, as QEMU does: a zlib stream each.
#[derive(Debug)]
pub struct Compressor(Compress);

impl Default for Compressor {
    fn default() -> Self {
        Self(Compress::new(Compression::new(LEVEL), true))
    }
}

impl Compressor {
    /// Packs `grain` into `out`, whose contents are lost. `false` where that would take twice the grain, which cannot be.
    pub fn pack(&mut self, grain: &[u8], out: &mut Vec<u8>) -> bool {
        out.clear();
        out.resize(2 * grain.len() - MARKER_BYTES, 0);
        self.0.reset();
        let status = self.0.compress(grain, out, FlushCompress::Finish);
        let done = matches!(status, Ok(Status::StreamEnd));
        // At most what there is room for.
        out.truncate(if done { self.0.total_out() as usize } else { 0 });
        done
    }
}

/// A new stream-optimised image under way. Memory: 4 MiB, a grain and a table.
#[derive(Debug)]
pub struct StreamWriter<'a> {
    storage: &'a dyn Storage,
    header: Header,
    has_backing: bool,
    compressor: Compressor,
    packed: Vec<u8>,
    /// What is not written yet, from byte `buffer_at` of the file on.
    buffer: Vec<u8>,
    buffer_at: u64,
    /// Grain that comes next at the earliest.
    next: u64,
    /// The grain table being filled, which one it is, and whether it has entries.
    table: Vec<u8>,
    table_nth: u64,
    table_used: bool,
}

impl<'a> StreamWriter<'a> {
    /// Begins an image in `storage`: a new file, or a device whose contents may be lost.
    ///
    /// # Errors
    ///
    /// For options that [`CreateOptions::validate`] refuses, or of another subformat; what the host refused.
    pub fn new(storage: &'a dyn Storage, options: &CreateOptions) -> Result<Self> {
        options.validate()?;
        if !options.subformat.is_compressed() {
            return Err(Error::invalid(
                "only streamOptimized images have compressed grains",
            ));
        }
        let header = options.header();
        let text = options.text(new_cid()?);
        write_body(storage, &header, &block::name::bytes(&text)).context(|| storage.name())?;
        Ok(Self {
            storage,
            has_backing: options.parent.is_some(),
            compressor: Compressor::default(),
            packed: Vec::new(),
            buffer: Vec::new(),
            buffer_at: header.overhead * SECTOR,
            next: 0,
            table: vec![0; header.table_entries as usize * 4],
            table_nth: 0,
            table_used: false,
            header,
        })
    }

    /// Bytes of a grain.
    pub fn cluster_size(&self) -> u64 {
        self.header.grain * SECTOR
    }

    /// Whether what is left out reads as a backing file.
    pub fn has_backing(&self) -> bool {
        self.has_backing
    }

    /// Grains of the disk.
    pub fn clusters(&self) -> u64 {
        self.header.capacity.div_ceil(self.header.grain)
    }

    /// Compresses grain `guest` and puts it there. Grains come in order; those left out read as the backing file, or as
    /// zeros.
    pub fn put_data(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 != self.cluster_size() {
            return Err(self.wrong(guest, "is not of a grain's size"));
        }
        let mut packed = std::mem::take(&mut self.packed);
        let done = match self.compressor.pack(bytes, &mut packed) {
            true => self.put_compressed(guest, &packed),
            false => Err(self.wrong(guest, "cannot be compressed")),
        };
        self.packed = packed;
        done
    }

    /// Puts grain `guest` there as [`Compressor::pack`] made it.
    pub fn put_compressed(&mut self, guest: u64, packed: &[u8]) -> Result<()> {
        let len = u32::try_from(packed.len()).unwrap_or(0);
        if len == 0 || packed.len() as u64 + MARKER_BYTES as u64 > 2 * self.cluster_size() {
            return Err(self.wrong(guest, "is too large when packed"));
        }
        let at = self.buffer_at + self.buffer.len() as u64;
        let Ok(sector) = u32::try_from(at / SECTOR) else {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{}: the file would pass 2 TiB, the most that its entries can say",
                    self.storage.name()
                ),
            ));
        };
        self.begin(guest)?;
        let lba = guest * self.header.grain;
        self.buffer.extend_from_slice(&lba.to_le_bytes());
        self.buffer.extend_from_slice(&len.to_le_bytes());
        self.buffer.extend_from_slice(packed);
        let whole = self.buffer.len().next_multiple_of(SECTOR as usize);
        self.buffer.resize(whole, 0);
        self.set_entry(guest, sector);
        match self.buffer.len() < BUFFER_BYTES {
            true => Ok(()),
            false => self.write_out(),
        }
    }

    /// Makes grain `guest` read as zeros whatever the backing file has.
    pub fn put_zero(&mut self, guest: u64) -> Result<()> {
        if !self.has_backing {
            return self.begin(guest);
        }
        if self.header.flags & super::header::F_ZEROED_GRAIN == 0 {
            let zeros = vec![0; self.cluster_size() as usize];
            return self.put_data(guest, &zeros);
        }
        self.begin(guest)?;
        self.set_entry(guest, ZEROED);
        Ok(())
    }

    /// Writes what is left, then the header. The image is complete and durable afterwards.
    pub fn finish(mut self) -> Result<()> {
        self.end_table()?;
        self.write_out()?;
        let storage = self.storage;
        storage
            .sync()
            .and_then(|()| storage.write_at(0, &self.header.to_bytes()))
            .and_then(|()| storage.sync())
            .context(|| storage.name())
    }

    fn wrong(&self, guest: u64, what: &str) -> Error {
        let at = guest.saturating_mul(self.cluster_size());
        Error::invalid(format!("{}: grain at {at:#x} {what}", self.storage.name()))
    }

    /// Goes on to grain `guest`.
    fn begin(&mut self, guest: u64) -> Result<()> {
        if guest < self.next || guest >= self.clusters() {
            return Err(self.wrong(guest, "is out of order, or behind the disk's end"));
        }
        self.next = guest + 1;
        let nth = guest / u64::from(self.header.table_entries);
        if nth != self.table_nth {
            self.end_table()?;
            self.table_nth = nth;
        }
        Ok(())
    }

    fn set_entry(&mut self, guest: u64, entry: u32) {
        let index = (guest % u64::from(self.header.table_entries)) as usize * 4;
        let room = self.table.iter_mut().skip(index);
        room.zip(entry.to_le_bytes())
            .for_each(|(to, from)| *to = from);
        self.table_used = true;
    }

    /// Writes the table being filled, and its copy.
    fn end_table(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.table_used) {
            return Ok(());
        }
        for directory in [self.header.redundant, self.header.directory] {
            let at = tables_of(&self.header, directory) * SECTOR;
            let at = at + self.table_nth * self.table.len() as u64;
            self.storage
                .write_at(at, &self.table)
                .context(|| self.storage.name())?;
        }
        self.table.fill(0);
        Ok(())
    }

    fn write_out(&mut self) -> Result<()> {
        self.storage
            .write_at(self.buffer_at, &self.buffer)
            .context(|| self.storage.name())?;
        self.buffer_at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grains_that_lie_about_their_length_are_refused() {
        let grain: Vec<u8> = (0..4096u32).map(|i| ((i * i) >> 5) as u8).collect();
        let mut packed = Vec::new();
        assert!(Compressor::default().pack(&grain, &mut packed));
        let marked = |len: u32| {
            let mut bytes = vec![0; 8];
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&packed);
            bytes.extend_from_slice(&[0xaa; 100]);
            bytes
        };
        let len = packed.len() as u32;
        let mut out = vec![0; 4096];
        unpack(true, &marked(len), &mut out).unwrap();
        assert_eq!(out, grain);
        unpack(false, &marked(len)[12..], &mut out).unwrap();
        for (said, why) in [
            (0, "says 0 bytes"),
            (len + 101, "there is room for"),
            (u32::MAX, "there is room for"),
            (len / 2, "unpacks to"),
        ] {
            let error = unpack(true, &marked(said), &mut out)
                .unwrap_err()
                .to_string();
            assert!(error.contains(why), "{said}: {error}");
        }
        let mut large = vec![0; 8192];
        let error = unpack(true, &marked(len), &mut large).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("unpacks to 4096 bytes, not 8192"),
            "{error}"
        );
        assert!(unpack(true, &[], &mut out).is_err());
        // The first part of a grain, where the disk ends in it.
        let mut part = vec![0; 512];
        unpack(true, &marked(len), &mut part).unwrap();
        assert_eq!(part, grain[..512]);
    }
}
