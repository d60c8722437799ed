//! Writing a new, empty image: what QEMU makes, byte for byte.
//!
//! ```text
//!   header │ backing file's name, up to a multiple of 8 │ L1 table, all zeros, in pieces of 512 bytes
//! ```
//!
//! Over a backing file clusters have 512 bytes, so that nothing has to be copied, else 4 KiB. The header's sector is written
//! last, behind a barrier: until then the file shows no format.

use super::header::{BACKING_NAME_MAX, HEADER_LEN, Header, L1_ENTRIES_MAX};
use block::{Context, Error, Result, Storage, align_up, size};

/// log2 of the bytes of a cluster and of the entries of an L2 table, without and with a backing file.
const ALONE: (u32, u32) = (12, 9);
const OVERLAY: (u32, u32) = (9, 12);
const SECTOR: u64 = 512;

/// What a new image is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the virtual disk, rounded up to whole sectors of 512.
    pub size: u64,
    /// Name of the backing file as it is to be stored. The image records no format of it.
    pub backing: Option<String>,
}

impl CreateOptions {
    /// Checks the rules of the format.
    ///
    /// # Errors
    ///
    /// `Invalid`, with what it may be.
    pub fn validate(&self) -> Result<()> {
        if self.size == 0 {
            return Err(Error::invalid(
                "a qcow image has a disk of 1 sector at least",
            ));
        }
        let most = L1_ENTRIES_MAX << (ALONE.0 + ALONE.1);
        if self.size > most {
            return Err(Error::invalid(format!(
                "a disk of {} is too large for a qcow image: the most is {}",
                size::human(self.size),
                size::human(most)
            )));
        }
        if let Some(name) = &self.backing
            && !block::name::fits(name, BACKING_NAME_MAX as usize)
        {
            return Err(Error::invalid(format!(
                "the backing file's name has {} bytes: 1 to {BACKING_NAME_MAX} without a zero byte are possible",
                block::name::len(name)
            )));
        }
        Ok(())
    }

    /// Bytes of a cluster: 512 over a backing file, else 4096.
    pub fn cluster_size(&self) -> u64 {
        self.header().cluster_size()
    }

    /// The header, of options that were checked.
    pub(super) fn header(&self) -> Header {
        let name_len = self.backing.as_deref().map_or(0, block::name::len) as u64;
        let (cluster_bits, l2_bits) = match self.backing {
            Some(_) => OVERLAY,
            None => ALONE,
        };
        let name_at = HEADER_LEN as u64;
        Header {
            backing_file_offset: if name_len > 0 { name_at } else { 0 },
            // At most 1023.
            backing_file_size: name_len as u32,
            mtime: 0,
            size: align_up(self.size, SECTOR),
            cluster_bits,
            l2_bits,
            encrypted: false,
            l1_table_offset: align_up(name_at + name_len, 8),
            backing: self.backing.clone(),
        }
    }
}

/// Makes an image of what `storage` holds, which is lost.
///
/// # Errors
///
/// `Invalid` where the options are not possible, and what writing failed with.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.validate()?;
    let header = options.header();
    let made = begin(storage, &header).and_then(|()| seal(storage, &header));
    made.context(|| storage.name())
}

/// Empties `storage`, and gives it the length of an empty image: it shows no format.
pub(super) fn begin(storage: &dyn Storage, header: &Header) -> Result<()> {
    // What is behind the new end reads as zeros.
    storage.set_len(0)?;
    let l1 = align_up(header.l1_entries() * 8, SECTOR);
    storage.set_len(header.l1_table_offset + l1)?;
    storage.sync()
}

/// Writes name and header, which makes an image of `storage`. All else is there.
pub(super) fn seal(storage: &dyn Storage, header: &Header) -> Result<()> {
    if let Some(name) = &header.backing {
        storage.write_at(header.backing_file_offset, &block::name::bytes(name))?;
    }
    storage.sync()?;
    storage.write_at(0, &header.to_bytes())?;
    storage.sync()
}
