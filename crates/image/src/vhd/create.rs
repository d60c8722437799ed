//! New images.
//!
//! What QEMU makes with the same options, byte for byte but for the unique id and the time: programs know what to make
//! of it. The header and the table are durable before the footer's copy, without which the file is no image.

use super::footer::{DiskType, EPOCH, FOOTER_BYTES, Footer, UniqueId};
use super::geometry::{Geometry, size_of_new};
use super::header::{BLOCK_BYTES, HEADER_BYTES, Header};
use super::locator::NewParent;
use block::{Context, Error, Result, Storage};
use std::time::SystemTime;

/// Bytes of the smallest block that QEMU reads as others do.
const BLOCK_BYTES_MIN: u32 = 4096;

/// How to make an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to what the image can say: see [`CreateOptions::disk_bytes`].
    pub size: u64,
    /// How it keeps its disk.
    pub disk_type: DiskType,
    /// Exactly `size`, in whole sectors, rather than the next geometry.
    pub force_size: bool,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// What a differencing image lies over.
    pub parent: Option<NewParent>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            disk_type: DiskType::Dynamic,
            force_size: false,
            block_bytes: BLOCK_BYTES,
            parent: None,
        }
    }
}

impl CreateOptions {
    /// Bytes that the disk will have.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Unsupported`] above 2040 GiB.
    pub fn disk_bytes(&self) -> Result<u64> {
        Ok(size_of_new(self.size, self.exact())?.1)
    }

    /// A differencing image has the size of its parent.
    fn exact(&self) -> bool {
        self.force_size || self.disk_type == DiskType::Differencing
    }

    /// Whether an image can be made so.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn validate(&self) -> Result<()> {
        let bytes = self.disk_bytes()?;
        // Below, QEMU sees no bitmap before the data; above, XenServer's tools know none.
        if !self.block_bytes.is_power_of_two()
            || !(BLOCK_BYTES_MIN..=BLOCK_BYTES).contains(&self.block_bytes)
        {
            return Err(Error::invalid(format!(
                "blocks of {} bytes: they must be a power of two from 4 KiB to 2 MiB, which all programs know",
                self.block_bytes
            )));
        }
        if self.parent.is_some() != (self.disk_type == DiskType::Differencing) {
            return Err(Error::invalid(
                "an image over a parent is a differencing one, and no other has one",
            ));
        }
        self.header(bytes)?.check_table(bytes)
    }

    fn header(&self, bytes: u64) -> Result<Header> {
        let blocks = bytes.div_ceil(u64::from(self.block_bytes));
        let blocks = u32::try_from(blocks)
            .map_err(|_| Error::unsupported(format!("{blocks} blocks are too many for a table")))?;
        let table = (FOOTER_BYTES + HEADER_BYTES) as u64;
        Ok(Header::new(table, blocks, self.block_bytes))
    }
}

/// The time as images have it: seconds since 2000.
pub(super) fn now() -> u32 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs()).saturating_sub(EPOCH);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

/// Makes an image in `file`, which is empty.
///
/// # Errors
///
/// As [`CreateOptions::validate`], and what writing fails with: the file holds no image then.
pub fn create(file: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.validate()?;
    let (mut geometry, bytes) = size_of_new(options.size, options.exact())?;
    if options.disk_type == DiskType::Differencing {
        // It says nothing of the size, but programs may show it.
        geometry = Geometry::below(bytes / 512);
    }
    let mut footer = Footer::new(options.disk_type, bytes, geometry, UniqueId::random()?);
    footer.timestamp = now();
    if options.exact() {
        footer.creator = *b"qem2";
    }
    write(file, options, &footer, bytes).context(|| format!("{}: create", file.name()))
}

fn write(file: &dyn Storage, options: &CreateOptions, footer: &Footer, bytes: u64) -> Result<()> {
    match options.disk_type {
        DiskType::Fixed => {
            file.set_len(bytes + FOOTER_BYTES as u64)?;
            file.write_at(bytes, &footer.to_bytes())?;
        }
        DiskType::Dynamic | DiskType::Differencing => {
            let mut header = options.header(bytes)?;
            let table_end = header.table_offset + header.table_bytes();
            let names = match &options.parent {
                Some(parent) => parent.put(&mut header, table_end)?,
                None => Vec::new(),
            };
            // Nothing of an image that was there before may be taken for a part of this one.
            file.write_at(0, &[0; FOOTER_BYTES])?;
            file.write_at(FOOTER_BYTES as u64, &header.to_bytes())?;
            let empty = vec![0xff; 64 << 10];
            let mut at = header.table_offset;
            while at < table_end {
                let len = (table_end - at).min(empty.len() as u64) as usize;
                file.write_at(at, empty.get(..len).unwrap_or_default())?;
                at += len as u64;
            }
            file.write_at(table_end, &names)?;
            let end = table_end + names.len() as u64;
            let end = file.len()?.max(end + FOOTER_BYTES as u64) - FOOTER_BYTES as u64;
            file.write_at(end, &footer.to_bytes())?;
            file.sync()?;
            file.write_at(0, &footer.to_bytes())?;
        }
    }
    file.sync()
}
