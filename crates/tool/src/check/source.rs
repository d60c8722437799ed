//! Where a check reads metadata from.

use block::{RangeKind, Result, Storage};
use std::fmt;

/// Metadata to check: a file that nobody writes, or (later) one that is being served, as its owner
/// knows it.
pub trait Source: Sync + fmt::Debug {
    /// What messages call it.
    fn name(&self) -> String;

    /// Bytes of the file.
    fn len(&self) -> u64;

    /// Whether the file is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the image's external data file, where that is known.
    fn data_file_len(&self) -> Option<u64> {
        None
    }

    /// Fills `buf` from `offset`. Bytes behind the end read as zeros.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Whether the range is known to read as zeros.
    fn is_hole(&self, offset: u64, len: u64) -> bool;
}

/// A file as it is.
#[derive(Debug)]
pub struct FileSource<'a> {
    storage: &'a dyn Storage,
    len: u64,
    data_file_len: Option<u64>,
}

impl<'a> FileSource<'a> {
    /// The file in `storage`, with the length that it has now.
    pub fn new(storage: &'a dyn Storage) -> Result<Self> {
        Ok(Self {
            storage,
            len: storage.len()?,
            data_file_len: None,
        })
    }

    /// The same, with an external data file of so many bytes.
    #[must_use]
    pub fn with_data_file(mut self, len: Option<u64>) -> Self {
        self.data_file_len = len;
        self
    }
}

impl Source for FileSource<'_> {
    fn name(&self) -> String {
        self.storage.name()
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn data_file_len(&self) -> Option<u64> {
        self.data_file_len
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let there = self.len.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (there, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        match there.is_empty() {
            true => Ok(()),
            false => self.storage.read_at(offset, there),
        }
    }

    fn is_hole(&self, offset: u64, len: u64) -> bool {
        match self.storage.range_at(offset) {
            Ok(Some(range)) => range.kind == RangeKind::Hole && range.len >= len,
            Ok(None) => true,
            // Then it is read.
            Err(_) => false,
        }
    }
}
