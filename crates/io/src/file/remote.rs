//! A disk that is no file of this host, as a [`File`]: a server has it.

use super::{Alignment, File, FileKind, OpenOptions};
use block::{Error, ErrorKind, RangeKind, Result};
use std::{fmt, path::PathBuf, sync::Arc};

/// A disk of a fixed size that is reached by calls, which block. Any number of threads may make them at a time. Offsets and
/// lengths are multiples of [`Remote::alignment`], and within the disk.
pub trait Remote: Send + Sync + fmt::Debug {
    /// Bytes.
    fn size(&self) -> u64;

    /// What offsets and lengths must be multiples of, in bytes: a power of two.
    fn alignment(&self) -> u32;

    /// Whether it cannot be written.
    fn read_only(&self) -> bool;

    /// The first byte and the bytes of the part of a file of this host that it is.
    fn part(&self) -> Option<(u64, u64)> {
        None
    }

    /// Two numbers that no other disk has, and no file.
    fn identity(&self) -> (u64, u64);

    /// Fills `buf`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes `data`.
    fn write(&self, offset: u64, data: &[u8]) -> Result<()>;

    /// Returns when what was written before is durable.
    fn flush(&self) -> Result<()>;

    /// Makes the range zeros, giving back its space if it may (`unmap`); [`ErrorKind::Unsupported`] where it cannot, or,
    /// with `fast`, where that is no faster than writing them.
    fn zero(&self, offset: u64, len: u64, unmap: bool, fast: bool) -> Result<()>;

    /// The range is not needed.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// The end of what begins at `offset` and is one kind, at most `len` bytes further, and which.
    fn run(&self, offset: u64, len: u64) -> Result<(u64, RangeKind)>;
}

impl File {
    /// A disk of a server under the name `name`. Nobody locks it: who may use it at a time, its server says.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`] where it cannot be written and is to be.
    pub fn remote(name: &str, remote: Arc<dyn Remote>, options: &OpenOptions) -> Result<Arc<File>> {
        if remote.read_only() && !options.read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{name}: the server has it for reading only"),
            ));
        }
        let alignment = Alignment {
            offset: remote.alignment(),
            memory: 1,
        };
        let mut file = File::elsewhere(PathBuf::from(name), FileKind::Remote, alignment)?;
        (file.cache, file.read_only) = (options.cache, options.read_only);
        file.remote = Some(remote);
        Ok(Arc::new(file))
    }
}
