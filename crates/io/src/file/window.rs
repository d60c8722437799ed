//! A part of a file, for reading, as a [`File`] of its own: an image that lies in an archive.

use super::{File, FileKind, OpenOptions, Remote};
use block::{Error, RangeKind, Result, Storage};
use std::sync::Arc;

/// The `size` bytes of `file` from `offset` on.
#[derive(Debug)]
struct Window {
    file: Arc<File>,
    offset: u64,
    size: u64,
}

impl File {
    /// The `size` bytes (absent: all) of `file` from `offset` on as a file for reading only, which has the name and the identity of
    /// `file`.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Invalid`] for more than `file` has.
    pub fn window(file: Arc<File>, offset: u64, size: Option<u64>) -> Result<Arc<File>> {
        let len = file.len()?;
        let size = size.unwrap_or_else(|| len.saturating_sub(offset));
        if offset.checked_add(size).is_none_or(|end| end > len) {
            return Err(Error::invalid(format!(
                "{}: the sum of offset ({offset}) and size ({size}) is more than the {len} bytes of the file",
                file.path().display()
            )));
        }
        let options = OpenOptions {
            read_only: true,
            cache: file.cache,
            ..OpenOptions::default()
        };
        let name = file.path().display().to_string();
        let window = Window { file, offset, size };
        File::remote(&name, Arc::new(window), &options)
    }
}

fn read_only<T>() -> Result<T> {
    Err(Error::unsupported(
        "a part of a file that has an image is for reading only",
    ))
}

impl Remote for Window {
    fn size(&self) -> u64 {
        self.size
    }

    fn alignment(&self) -> u32 {
        // What the file demands, it sees to itself.
        1
    }

    fn read_only(&self) -> bool {
        true
    }

    fn part(&self) -> Option<(u64, u64)> {
        Some((self.offset, self.size))
    }

    fn identity(&self) -> (u64, u64) {
        // A file that is gone from under its descriptor is the same as no other.
        let own = Arc::as_ptr(&self.file).addr() as u64;
        self.file.identity().unwrap_or((u64::MAX, own))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_at(self.offset + offset, buf)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        read_only()
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _: u64, _: u64, _: bool, _: bool) -> Result<()> {
        read_only()
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        read_only()
    }

    fn run(&self, offset: u64, len: u64) -> Result<(u64, RangeKind)> {
        let found = self.file.range_at(self.offset + offset)?;
        let (run, kind) = found.map_or((len, RangeKind::Data), |range| (range.len, range.kind));
        // A hole of a file reads as zeros; one of a device need not.
        let kind = match self.file.kind() {
            FileKind::Regular => kind,
            _ => RangeKind::Data,
        };
        Ok((offset + run.clamp(1, len), kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_shows_its_part() {
        let dir = testkit::TempDir::new();
        let path = dir.path("file");
        let bytes: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let file = File::open(&path, &options).unwrap();
        let window = File::window(Arc::clone(&file), 10, Some(4000)).unwrap();
        assert_eq!(window.len().unwrap(), 4000);
        assert_eq!((window.part(), file.part()), (Some((10, 4000)), None));
        assert_eq!(window.identity().unwrap(), file.identity().unwrap());
        let mut read = vec![0; 100];
        window.read_at(3900, &mut read).unwrap();
        assert_eq!(read, bytes[3910..4010]);
        assert!(window.read_at(3901, &mut read).is_err());
        let range = window.range_at(1).unwrap().unwrap();
        assert_eq!((range.len, range.kind), (3999, RangeKind::Data));
        let rest = File::window(Arc::clone(&file), 4990, None).unwrap();
        assert_eq!(rest.len().unwrap(), 10);
        for (offset, size) in [(1, 5000), (u64::MAX, 2), (5001, 0)] {
            let error = File::window(Arc::clone(&file), offset, Some(size)).unwrap_err();
            assert!(error.to_string().contains("the sum of offset"), "{error}");
        }
    }
}
