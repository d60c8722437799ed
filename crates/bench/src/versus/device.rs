//! What the block device below the images had to do while a sample was taken.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Counters of a block device (the kernel's Documentation/block/stat.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Reads and writes that ended.
    requests: u64,
    /// Milliseconds that they took, added up.
    busy_ms: u64,
}

impl Work {
    /// Microseconds of a request since `before`, on average; `None` where there was none.
    pub(super) fn us_since(self, before: Self) -> Option<f64> {
        let requests = self.requests.checked_sub(before.requests)?;
        let ms = self.busy_ms.checked_sub(before.busy_ms)?;
        (requests > 0).then(|| ms as f64 * 1000.0 / requests as f64)
    }

    fn parse(stat: &str) -> Option<Self> {
        let fields: Vec<u64> = stat
            .split_whitespace()
            .map_while(|field| field.parse().ok())
            .collect();
        // Of reads, then of writes: requests, merged, sectors, milliseconds.
        Some(Self {
            requests: fields.first()? + fields.get(4)?,
            busy_ms: fields.get(3)? + fields.get(7)?,
        })
    }
}

/// The block device below a folder.
#[derive(Debug)]
pub(super) struct Device(Option<PathBuf>);

impl Device {
    /// That of `dir`'s file system; one without a block device is never busy.
    pub(super) fn below(dir: &Path) -> Self {
        Self(fs::metadata(dir).ok().map(|meta| {
            let (major, minor) = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
            PathBuf::from(format!("/sys/dev/block/{major}:{minor}/stat"))
        }))
    }

    /// What it has done so far.
    pub(super) fn work(&self) -> Work {
        let text = self
            .0
            .as_ref()
            .and_then(|path| fs::read_to_string(path).ok());
        text.and_then(|text| Work::parse(&text)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_request_is_that_of_reads_and_writes() {
        let before = Work::parse("  100 5 800 40 50 1 400 60 0 90 100 0 0 0 0 2 3\n").unwrap();
        let after = Work::parse("300 5 800 140 150 1 400 360 0 90 100 0 0 0 0 9 9\n").unwrap();
        assert_eq!(before.requests, 150);
        // 300 requests in 400 ms of their own.
        assert_eq!(after.us_since(before), Some(400_000.0 / 300.0));
        assert_eq!(after.us_since(after), None);
        assert_eq!(before.us_since(after), None);
        assert_eq!(Work::parse("1 2 3"), None);
    }
}
