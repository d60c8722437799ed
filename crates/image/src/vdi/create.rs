//! New images: what QEMU makes with the same options, but that the blocks begin at a multiple of 4096.
//!
//! The map is durable before the header, without which the file is no image.

use super::header::{BLOCK_BYTES, HEADER_BYTES, Header, ImageType};
use super::open::{CHUNK, FREE_BYTES};
use block::{Context, Result, Storage};
use std::ops::Range;

/// How to make an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to whole sectors.
    pub size: u64,
    /// How it keeps its disk.
    pub image_type: ImageType,
    /// Bytes of a block. QEMU opens only images with blocks of 1 MiB.
    pub block_bytes: u32,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            image_type: ImageType::Dynamic,
            block_bytes: BLOCK_BYTES,
        }
    }
}

impl CreateOptions {
    fn header(&self) -> Result<Header> {
        let bytes = block::align_up(self.size.min(i64::MAX as u64), 512);
        Header::new(self.image_type, bytes, self.block_bytes)
    }

    /// Whether an image can be made so.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Unsupported`] for a disk that is too large.
    pub fn validate(&self) -> Result<()> {
        Header::parse(&self.header()?.to_bytes()).map(drop)
    }

    /// Where the blocks of a static image will be in its file.
    ///
    /// # Errors
    ///
    /// As [`CreateOptions::validate`].
    pub fn data_range(&self) -> Result<Range<u64>> {
        let header = self.header()?;
        Ok(header.block_offset(0)..header.block_offset(u64::from(header.blocks)))
    }
}

/// Makes an image in `file`, which is empty; of a static one the blocks may be there already, as zeros.
///
/// # Errors
///
/// As [`CreateOptions::validate`], and what writing fails with: the file holds no image then.
pub fn create(file: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.validate()?;
    write(file, &options.header()?).context(|| format!("{}: create", file.name()))
}

fn write(file: &dyn Storage, header: &Header) -> Result<()> {
    // Nothing of an image that was there before may be taken for a part of this one.
    file.write_at(0, &[0; HEADER_BYTES])?;
    let end = header.block_offset(u64::from(header.allocated));
    if file.len()? < end {
        file.set_len(end)?;
    }
    let mut bytes = Vec::with_capacity(CHUNK);
    let mut done = 0;
    while done < header.blocks {
        bytes.clear();
        let count = (header.blocks - done).min(CHUNK as u32 / 4);
        for block in done..done + count {
            match header.image_type {
                ImageType::Static => bytes.extend_from_slice(&block.to_le_bytes()),
                ImageType::Dynamic => bytes.extend_from_slice(&FREE_BYTES),
            }
        }
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        file.write_at(u64::from(header.map_offset) + u64::from(done) * 4, &bytes)?;
        done += count;
    }
    file.sync()?;
    file.write_at(0, &header.to_bytes())?;
    file.sync()
}
