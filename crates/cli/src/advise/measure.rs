//! Measurements that were asked for: reads of an image's file, and writes to a file that is made for them.

use super::{Advise, facts::Facts};
use anyhow::{Context, Result};
use bench::load::{self, Pattern, Spec, Target};
use block::{RangeKind, Storage, size};
use io::OpenOptions;
use rustix::fs::{FallocateFlags, fallocate};
use serde::Serialize;
use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Bytes of the file that is written.
const FILE_BYTES: u64 = 16 << 20;
/// Bytes that a file must have to be read at random.
const READ_BYTES_MIN: u64 = 1 << 20;
/// Writes that are made durable one by one, at most.
const FLUSHES: u32 = 200;

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Measured {
    /// Random reads of 4 KiB (of more where the device wants that).
    pub rates: Vec<Rate>,
    /// With `--write-test`.
    pub write: Option<Write>,
    /// What could not be measured.
    pub notes: Vec<String>,
}

/// Reads one way.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Rate {
    pub engine: String,
    pub direct: bool,
    pub depth: u32,
    pub iops: f64,
    pub p50_us: f64,
}

/// Writes.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Write {
    /// Space can be allocated without writing it.
    pub fallocate: bool,
    /// Holes can be punched.
    pub punch: bool,
    /// Median of a write of 4 KiB and its `fdatasync`.
    pub flush_us: Option<f64>,
}

/// Measures what was asked for in `time`.
pub(super) fn of(args: &Advise, facts: &Facts, time: Duration) -> Result<Option<Measured>> {
    if !args.measure && args.write_test.is_none() {
        return Ok(None);
    }
    let mut measured = Measured::default();
    if let (true, Some(path)) = (args.measure, &facts.path) {
        // Half of it where writes follow.
        let time = if args.write_test.is_some() {
            time / 2
        } else {
            time
        };
        reads(&mut measured, facts, path, time);
    }
    if let Some(folder) = &args.write_test {
        measured.write = Some(writes(folder, time / 2)?);
    }
    Ok(Some(measured))
}

fn reads(measured: &mut Measured, facts: &Facts, path: &Path, time: Duration) {
    let length = fs::metadata(path).map_or(0, |meta| meta.len());
    if length < READ_BYTES_MIN && facts.size < READ_BYTES_MIN {
        let note = format!("{}: too small to be read at random", path.display());
        measured.notes.push(note);
        return;
    }
    // Reads of holes and of what was never written bring zeros, without the device.
    let part = match largest_data(path) {
        Ok(part) if part.end - part.start >= READ_BYTES_MIN => part,
        Ok(part) => {
            measured.notes.push(format!(
                "{}: not measured: its largest piece of data has {}, and reads of holes cost no device time: fill it, or give --write-test",
                path.display(),
                size::human(part.end - part.start)
            ));
            return;
        }
        Err(error) => {
            measured
                .notes
                .push(format!("{}: not measured: {error}", path.display()));
            return;
        }
    };
    let block = u64::from(facts.alignment).max(4096);
    let start = part.start.next_multiple_of(block);
    if part.end - part.start < length {
        measured.notes.push(format!(
            "{}: read in its largest piece of data, {} at {start}",
            path.display(),
            size::human(part.end - part.start)
        ));
    }
    let mut ways = vec![
        (facts.engine.as_str(), facts.direct, 32),
        (facts.engine.as_str(), facts.direct, 1),
    ];
    for engine in ["io_uring", "native", "threads"] {
        if engine != facts.engine && (engine != "native" || facts.direct) {
            ways.push((engine, facts.direct, 32));
        }
    }
    let each = time / ways.len() as u32;
    for (engine, direct, depth) in ways {
        let spec = Spec {
            pattern: Pattern::RandRead,
            block_bytes: block,
            start_bytes: start,
            range_bytes: Some((part.end - start) / block * block),
            depth,
            ramp: each / 5,
            duration: each - each / 5,
            ..Spec::new(Target::File {
                path: path.to_owned(),
                engine: engine.to_owned(),
                direct,
            })
        };
        match load::run(&spec) {
            Ok(report) if report.errors == 0 => measured.rates.push(Rate {
                engine: engine.to_owned(),
                direct,
                depth,
                iops: report.iops,
                p50_us: report.latency.p50_us,
            }),
            Ok(report) => measured
                .notes
                .push(format!("{engine}: {} reads failed", report.errors)),
            Err(error) => measured.notes.push(format!("{engine}: {error}")),
        }
    }
}

/// Runs of data that are looked at, at most.
const RUNS_MAX: usize = 100_000;

/// The longest run of a file that is data; all of a device. An empty one where there is none.
fn largest_data(path: &Path) -> Result<Range<u64>> {
    let file = io::File::open(path, &OpenOptions::looking())?;
    let length = file.len()?;
    if file.is_fixed() {
        return Ok(0..length);
    }
    let (mut largest, mut at) = (0..0, 0);
    for _ in 0..RUNS_MAX {
        let Some(run) = file.range_at(at)? else { break };
        at = run.offset + run.len;
        if run.kind == RangeKind::Data && run.len > largest.end - largest.start {
            largest = run.offset..at;
        }
    }
    Ok(largest)
}

/// A file that goes when this does.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn writes(folder: &Path, time: Duration) -> Result<Write> {
    let name = format!("diskplane-advise-{}", std::process::id());
    let path = Temporary(folder.join(name));
    let named = || path.0.display().to_string();
    let file = File::create_new(&path.0).with_context(named)?;
    let allocated = fallocate(&file, FallocateFlags::empty(), 0, FILE_BYTES).is_ok();
    file.set_len(FILE_BYTES).with_context(named)?;
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punch = fallocate(&file, hole, 0, FILE_BYTES / 2).is_ok();
    let (began, mut times) = (Instant::now(), Vec::new());
    while times.len() < FLUSHES as usize && began.elapsed() < time {
        let since = Instant::now();
        let at = times.len() as u64 * 4096 % FILE_BYTES;
        file.write_all_at(&[0x5a; 4096], at).with_context(named)?;
        file.sync_data().with_context(named)?;
        times.push(since.elapsed());
    }
    times.sort_unstable();
    Ok(Write {
        fallocate: allocated,
        punch,
        flush_us: times
            .get(times.len() / 2)
            .map(|time| time.as_secs_f64() * 1e6),
    })
}

impl Measured {
    /// The fastest way at depth 32.
    pub(super) fn best(&self) -> Option<&Rate> {
        let deep = self.rates.iter().filter(|rate| rate.depth == 32);
        deep.max_by(|a, b| a.iops.total_cmp(&b.iops))
    }

    /// The way by that engine at depth 32.
    pub(super) fn of(&self, engine: &str, direct: bool) -> Option<&Rate> {
        let is = |rate: &&Rate| rate.engine == engine && rate.direct == direct && rate.depth == 32;
        self.rates.iter().find(is)
    }

    /// How many times as many reads there are with 32 at a time.
    pub(super) fn scaling(&self) -> Option<f64> {
        let one = self.rates.iter().find(|rate| rate.depth == 1)?;
        let deep = self.of(&one.engine, one.direct)?;
        (one.iops > 0.0).then(|| deep.iops / one.iops)
    }

    /// Median microseconds of a read that is alone, past the page cache.
    pub(super) fn median_alone_us(&self) -> Option<f64> {
        let mut alone = self
            .rates
            .iter()
            .filter(|rate| rate.depth == 1 && rate.direct);
        alone.next().map(|rate| rate.p50_us)
    }

    /// For people.
    pub(super) fn lines(&self) -> Vec<String> {
        let rates = self.rates.iter().map(|rate| {
            format!(
                "{}{}, depth {}: {:.0} random reads/s, median {:.0} µs",
                rate.engine,
                if rate.direct { ", O_DIRECT" } else { "" },
                rate.depth,
                rate.iops,
                rate.p50_us
            )
        });
        let mut lines: Vec<String> = rates.collect();
        if let Some(write) = &self.write {
            let flush = write.flush_us.map_or_else(String::new, |us| {
                format!(", a write made durable {us:.0} µs")
            });
            lines.push(format!(
                "allocating space {}, punching holes {}{flush}",
                if write.fallocate {
                    "works"
                } else {
                    "does not work"
                },
                if write.punch {
                    "works"
                } else {
                    "does not work"
                }
            ));
        }
        lines.extend(self.notes.iter().cloned());
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_piece_of_data_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        assert!(largest_data(&path).unwrap().is_empty());
        for (at, bytes) in [(1, 1), (8, 3), (20, 2)] {
            file.write_all_at(&vec![1; bytes << 20], at << 20).unwrap();
        }
        assert_eq!(largest_data(&path).unwrap(), 8 << 20..11 << 20);
        // Allocated is not written.
        fallocate(&file, FallocateFlags::KEEP_SIZE, 32 << 20, 16 << 20).unwrap();
        file.sync_all().unwrap();
        assert_eq!(largest_data(&path).unwrap(), 8 << 20..11 << 20);
    }
}
