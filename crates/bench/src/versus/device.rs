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
    /// What was done since `before`; nothing where counters went back.
    pub(super) fn since(self, before: Self) -> Self {
        let since = |now: u64, then: u64| now.checked_sub(then);
        let of = || {
            Some(Self {
                requests: since(self.requests, before.requests)?,
                busy_ms: since(self.busy_ms, before.busy_ms)?,
            })
        };
        of().unwrap_or_default()
    }

    pub(super) fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.busy_ms += other.busy_ms;
    }

    /// Requests that the device had at a time, on average, where `iops` of them ended in a second; `None` where there
    /// was none.
    pub(super) fn at_a_time(self, iops: f64) -> Option<f64> {
        let us = self.busy_ms as f64 * 1000.0 / self.requests as f64;
        (self.requests > 0).then_some(iops * us / 1e6)
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
        let mut work = after.since(before);
        assert_eq!(work.requests, 300);
        assert_eq!(work.at_a_time(300.0), Some(0.4));
        work.add(work);
        assert_eq!(work.at_a_time(300.0), Some(0.4));
        assert_eq!(after.since(after).at_a_time(1.0), None);
        assert_eq!(before.since(after).at_a_time(1.0), None);
        assert_eq!(Work::parse("1 2 3"), None);
    }
}
