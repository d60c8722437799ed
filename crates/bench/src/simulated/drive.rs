//! Data sheets of rotating disks.
//!
//! Seeks follow the curve of Lee and Katz ("An Analytic Performance Model of Disk Arrays", SIGMETRICS 1993), which goes
//! through the three figures that a data sheet gives: for the part `x` of all tracks,
//! `t(x) = min + a·√x + b·x` with `a = (−10 min + 15 avg − 5 max) / 3` and `b = (7 min − 15 avg + 8 max) / 3`.

use super::{Nanos, nanos};
use block::{Error, Result};
use std::time::Duration;

/// What a data sheet says of a disk, and how much of it is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drive {
    /// Turns per minute.
    pub rpm: u32,
    /// Seek to the next track, milliseconds.
    pub seek_min_ms: f64,
    /// Seek on average over all pairs of tracks.
    pub seek_avg_ms: f64,
    /// Seek from the first track to the last.
    pub seek_max_ms: f64,
    /// Media rate of the outermost track, MB/s.
    pub outer_mb_s: f64,
    /// Of the innermost.
    pub inner_mb_s: f64,
    /// The part of the tracks, from the outermost on, that the disk's bytes lie on: a virtual machine's disk is a part
    /// of a large drive, and its arm moves less for it.
    pub stroke: f64,
    /// Commands with the drive at a time; 1: no NCQ.
    pub queue: usize,
    /// Bytes of the write cache; 0: off.
    pub write_cache: u64,
}

/// Names and data sheets (rounded; several makers' drives of the class agree to 10 %).
const DRIVES: [(&str, Drive); 4] = [
    ("hdd-5400", drive(5400, 2.0, 12.0, 22.0, 110.0, 55.0)),
    ("hdd-7200", Drive::USUAL),
    ("hdd-10000", drive(10_000, 0.4, 4.2, 8.0, 200.0, 120.0)),
    ("hdd-15000", drive(15_000, 0.3, 3.4, 6.5, 230.0, 150.0)),
];

const fn drive(rpm: u32, min: f64, avg: f64, max: f64, outer: f64, inner: f64) -> Drive {
    Drive {
        rpm,
        seek_min_ms: min,
        seek_avg_ms: avg,
        seek_max_ms: max,
        outer_mb_s: outer,
        inner_mb_s: inner,
        stroke: 0.125,
        queue: 32,
        write_cache: 16 << 20,
    }
}

impl Default for Drive {
    fn default() -> Self {
        Self::USUAL
    }
}

impl Drive {
    /// What most have.
    pub(super) const USUAL: Self = drive(7200, 1.0, 8.5, 16.0, 160.0, 80.0);

    /// The drive of that name.
    pub fn named(name: &str) -> Option<Self> {
        let found = DRIVES.iter().find(|(own, _)| *own == name);
        found.map(|(_, drive)| *drive)
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        DRIVES.iter().map(|(name, _)| *name)
    }

    /// Time of a turn.
    pub(super) fn turn(&self) -> Nanos {
        60_000_000_000 / u64::from(self.rpm.max(1))
    }

    /// Seek over a part of all tracks of the drive.
    pub(super) fn seek(&self, part: f64) -> Nanos {
        let (min, avg, max) = (self.seek_min_ms, self.seek_avg_ms, self.seek_max_ms);
        let a = (-10.0 * min + 15.0 * avg - 5.0 * max) / 3.0;
        let b = (7.0 * min - 15.0 * avg + 8.0 * max) / 3.0;
        let ms = min + a * part.sqrt() + b * part;
        nanos(Duration::from_secs_f64((ms / 1000.0).max(0.0)))
    }

    pub(super) fn check(&self) -> Result<()> {
        let rising = self.seek_min_ms >= 0.0
            && self.seek_min_ms <= self.seek_avg_ms
            && self.seek_avg_ms <= self.seek_max_ms
            // The curve must not fall on its way to the last track.
            && self.seek(0.5) <= self.seek(1.0);
        let wrong = [
            (
                !(60..=100_000).contains(&self.rpm),
                "turns: it must be 60 to 100000 a minute",
            ),
            (
                !rising || self.seek_max_ms > 1000.0,
                "seek times: they must rise from the next track over the average to the last, 1000 ms at most",
            ),
            (
                !(self.inner_mb_s >= 1.0
                    && self.inner_mb_s <= self.outer_mb_s
                    && self.outer_mb_s <= 10_000.0),
                "media rates: they must be 1 MB/s at least, and the outer one not below the inner one",
            ),
            (
                !(self.stroke > 0.0 && self.stroke <= 1.0),
                "part of the tracks: it must be above 0 and 1 at most",
            ),
            (
                !(1..=1024).contains(&self.queue),
                "queue: it must be 1 to 1024 commands",
            ),
        ];
        match wrong.into_iter().find(|(wrong, _)| *wrong) {
            Some((_, what)) => Err(Error::invalid(what)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeks_take_what_the_data_sheet_says() {
        for (name, drive) in DRIVES {
            drive.check().unwrap();
            let ms = |part| drive.seek(part) as f64 / 1e6;
            assert!((ms(1.0) - drive.seek_max_ms).abs() < 0.001, "{name}");
            assert!((ms(0.0) - drive.seek_min_ms).abs() < 0.001, "{name}");
            // Two places at random are x apart with a density of 2 (1 - x).
            let n = 10_000;
            let mean = (0..n).map(|k| {
                let x = (f64::from(k) + 0.5) / f64::from(n);
                ms(x) * 2.0 * (1.0 - x) / f64::from(n)
            });
            let mean: f64 = mean.sum();
            assert!((mean - drive.seek_avg_ms).abs() < 0.01, "{name}: {mean}");
            assert_eq!(Drive::named(name), Some(drive));
        }
    }

    #[test]
    fn what_no_disk_is_is_refused() {
        let base = Drive::default();
        for (drive, says) in [
            (Drive { rpm: 0, ..base }, "turns"),
            (
                Drive {
                    seek_avg_ms: 0.1,
                    ..base
                },
                "seek times",
            ),
            (
                Drive {
                    seek_max_ms: f64::NAN,
                    ..base
                },
                "seek times",
            ),
            (
                Drive {
                    inner_mb_s: 0.0,
                    ..base
                },
                "media rates",
            ),
            (
                Drive {
                    stroke: 0.0,
                    ..base
                },
                "part of the tracks",
            ),
            (Drive { queue: 0, ..base }, "queue"),
        ] {
            let error = drive.check().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
