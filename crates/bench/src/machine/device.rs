//! What the block device below the images had to do while a sample was taken.

use super::disk::folder_below;
use crate::metric::{Metric, Metrics};
use block::{Context, Result};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long the device is waited for before a sample.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// How fast a small write is stable on a device that has nothing else to do.
const SETTLED: Duration = Duration::from_millis(25);

/// Waits until the device has digested what came before, so that no sample pays for the one before it: until
/// writing a little and making it stable is fast twice in a row, or for [`SETTLE_LIMIT`].
pub(crate) fn settle(folder: &Path) -> Result<()> {
    let path = folder.join("settle");
    let named = || path.display().to_string();
    let file = File::create(&path).context(named)?;
    let began = Instant::now();
    let mut fast = 0;
    while fast < 2 && began.elapsed() < SETTLE_LIMIT {
        let since = Instant::now();
        file.write_all_at(&[1; 4096], 0).context(named)?;
        file.sync_all().context(named)?;
        rustix::fs::syncfs(&file)
            .map_err(std::io::Error::from)
            .context(named)?;
        fast = if since.elapsed() < SETTLED {
            fast + 1
        } else {
            0
        };
    }
    Ok(())
}

/// Counters of one direction (the kernel's Documentation/block/stat.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Direction {
    /// Requests that ended.
    requests: u64,
    /// Requests that were merged into others before.
    merged: u64,
    /// Sectors of 512 bytes.
    sectors: u64,
    /// Milliseconds that requests took, added up.
    ms: u64,
}

impl Direction {
    fn since(self, before: Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(before.requests),
            merged: self.merged.saturating_sub(before.merged),
            sectors: self.sectors.saturating_sub(before.sectors),
            ms: self.ms.saturating_sub(before.ms),
        }
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.merged += other.merged;
        self.sectors += other.sectors;
        self.ms += other.ms;
    }

    /// KiB of a request; `None` without any.
    fn kib(self) -> Option<f64> {
        (self.requests > 0).then(|| self.sectors as f64 / 2.0 / self.requests as f64)
    }
}

/// Counters of a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    reads: Direction,
    writes: Direction,
    /// Milliseconds in which it had something to do.
    busy_ms: u64,
}

impl Work {
    /// What was done since `before`; nothing where counters went back.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            reads: self.reads.since(before.reads),
            writes: self.writes.since(before.writes),
            busy_ms: self.busy_ms.saturating_sub(before.busy_ms),
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.reads.add(other.reads);
        self.writes.add(other.writes);
        self.busy_ms += other.busy_ms;
    }

    /// The figures of what was done in `time`, with `iops` of the load; none where nothing was done.
    pub(crate) fn figures(self, time: Duration, iops: Option<f64>) -> Metrics {
        let mut figures = Metrics::new();
        if self == Self::default() {
            return figures;
        }
        let mut say = |metric, value: Option<f64>| {
            figures.extend(value.map(|value| (metric, value)));
        };
        let requests = (self.reads.requests + self.writes.requests) as f64;
        let merged = (self.reads.merged + self.writes.merged) as f64;
        let some = requests > 0.0;
        let us = (self.reads.ms + self.writes.ms) as f64 * 1000.0 / requests;
        // Little's law.
        say(
            Metric::InDevice,
            iops.filter(|_| some).map(|iops| iops * us / 1e6),
        );
        say(Metric::DeviceReadKib, self.reads.kib());
        say(Metric::DeviceWriteKib, self.writes.kib());
        let share = merged / (requests + merged) * 100.0;
        say(Metric::DeviceMergedPercent, some.then_some(share));
        let ms = time.as_secs_f64() * 1000.0;
        let busy = (self.busy_ms as f64 / ms * 100.0).min(100.0);
        say(Metric::DeviceBusyPercent, (ms > 0.0).then_some(busy));
        figures
    }

    fn parse(stat: &str) -> Option<Self> {
        let fields: Vec<u64> = stat
            .split_whitespace()
            .map_while(|field| field.parse().ok())
            .collect();
        // Of reads, then of writes: requests, merged, sectors, milliseconds; in flight; busy.
        let direction = |from: usize| {
            let [requests, merged, sectors, ms] = *fields.get(from..from + 4)? else {
                return None;
            };
            Some(Direction {
                requests,
                merged,
                sectors,
                ms,
            })
        };
        Some(Self {
            reads: direction(0)?,
            writes: direction(4)?,
            busy_ms: *fields.get(9)?,
        })
    }
}

/// The block device below a folder.
#[derive(Debug)]
pub(crate) struct Device(Option<PathBuf>);

impl Device {
    /// That of `place`'s file system, or itself where it is one; a file system without a block device is never busy.
    pub(crate) fn below(place: &Path) -> Self {
        let meta = fs::metadata(place).ok();
        Self(meta.map(|meta| folder_below(&meta).join("stat")))
    }

    /// Watches it from now on.
    pub(crate) fn watch(self) -> Watched {
        Watched {
            before: self.work(),
            began: Instant::now(),
            device: self,
        }
    }

    /// What it has done so far.
    pub(crate) fn work(&self) -> Work {
        let text = self
            .0
            .as_ref()
            .and_then(|path| fs::read_to_string(path).ok());
        text.and_then(|text| Work::parse(&text)).unwrap_or_default()
    }
}

/// A device and what it had done when somebody began to look.
#[derive(Debug)]
pub(crate) struct Watched {
    device: Device,
    before: Work,
    began: Instant,
}

impl Watched {
    /// Adds what the device did since to the figures of a load; nothing where there is no device.
    pub(crate) fn add_to(&self, metrics: &mut Metrics) {
        let iops = metrics.get(&Metric::Iops).copied();
        let work = self.device.work().since(self.before);
        metrics.extend(work.figures(self.began.elapsed(), iops));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_request_is_that_of_reads_and_writes() {
        let before = Work::parse("  100 5 800 40 50 1 400 60 0 90 100 0 0 0 0 2 3\n").unwrap();
        let after = Work::parse("300 55 2400 140 150 51 1200 360 0 140 100 0 0 0 0 9 9\n").unwrap();
        let figures = after
            .since(before)
            .figures(Duration::from_millis(100), Some(3000.0));
        // 300 requests in 400 ms of their own, 100 more merged into them; reads of 4 KiB, writes of 4 KiB.
        let expected = [
            (Metric::InDevice, 4.0),
            (Metric::DeviceReadKib, 4.0),
            (Metric::DeviceWriteKib, 4.0),
            (Metric::DeviceMergedPercent, 25.0),
            (Metric::DeviceBusyPercent, 50.0),
        ];
        for (metric, value) in expected {
            assert!((figures[&metric] - value).abs() < 1e-9, "{figures:?}");
        }
        let mut twice = after.since(before);
        twice.add(twice);
        let figures = twice.figures(Duration::from_millis(200), Some(3000.0));
        assert!((figures[&Metric::InDevice] - 4.0).abs() < 1e-9);
        let none = after.since(after).figures(Duration::ZERO, Some(1.0));
        assert!(none.is_empty(), "{none:?}");
        assert_eq!(Work::parse("1 2 3"), None);
    }

    #[test]
    fn a_folder_without_a_device_says_nothing() {
        let watched = Device::below(Path::new("/proc")).watch();
        let mut metrics = Metrics::from([(Metric::Iops, 1.0)]);
        watched.add_to(&mut metrics);
        assert_eq!(metrics.len(), 1);
    }
}
