//! Blocking access to a file, for everything that is slow, rare or both.

use crate::Result;
use crate::faults::Event;
use std::fmt;
use std::os::fd::BorrowedFd;

/// What a part of a file holds, as far as the host knows without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Possibly anything.
    Data,
    /// A hole: reads as zeros and takes no space.
    Hole,
    /// Reads as zeros, and takes space.
    Zero,
    /// Takes no space, and may read as anything: so a server says of a part that the disk below it has, or, where its dirty
    /// bitmap is asked for, of what is dirty.
    Absent,
}

impl RangeKind {
    /// Whether it reads as zeros.
    pub fn is_zero(self) -> bool {
        matches!(self, RangeKind::Hole | RangeKind::Zero)
    }

    /// Whether it takes space.
    pub fn is_allocated(self) -> bool {
        matches!(self, RangeKind::Data | RangeKind::Zero)
    }
}

/// A run of bytes of one [`RangeKind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What it holds.
    pub kind: RangeKind,
}

/// Whether newly allocated space is known to read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroed {
    /// It reads as zeros until it is written.
    Yes,
    /// It holds whatever the device held before.
    No,
}

/// A file or device, accessed with blocking calls.
///
/// Opening, creating, checking and repairing images use this on threads that
/// may wait; the data path uses an engine of crate `io` instead. Offsets and
/// lengths are bytes with no alignment demanded.
pub trait Storage: Send + Sync + fmt::Debug {
    /// The name that messages give it: a path, or what a test calls it.
    fn name(&self) -> String;

    /// Current size in bytes.
    fn len(&self) -> Result<u64>;

    /// Whether the file is empty.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from `offset`. Fails with [`crate::ErrorKind::Corrupt`] where the file ends
    /// before: a caller that expects a short file asks [`Storage::len`] first.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes all of `buf` at `offset`, growing a file that ends before.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Returns when everything written before survives a crash (`fdatasync`).
    fn sync(&self) -> Result<()>;

    /// Makes the file `len` bytes long; new bytes read as zeros.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Reserves space for the range, growing the file if it ends before. Never
    /// changes what existing bytes read as; says whether space behind the old
    /// end reads as zeros.
    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroed>;

    /// Makes the range read as zeros, giving its space back where the host can
    /// and `unmap` allows it. Does not grow the file.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;

    /// Tells the host that the range is not needed: it may read as anything
    /// afterwards. Not supported is not an error.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// The run of data or hole that starts at `offset`, at most to the file's
    /// end. Storage that cannot tell says `Data` up to its end. `None` at and
    /// behind the end.
    fn range_at(&self, offset: u64) -> Result<Option<Range>>;

    /// Whether it is as long as it is: a device, or a disk of a server. Its length cannot be set to another one.
    fn is_fixed(&self) -> bool {
        false
    }

    /// Work on the image has come to `event`, which faults may be waiting for.
    fn event(&self, _event: Event) {}

    /// The file descriptor, where there is one: for what the kernel does between two files (`copy_file_range`).
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
