//! What a job's options mean together: loads, files and when they begin.

use super::{
    Job,
    files::{FORMAT, Layout, made_up, names},
    lines::Given,
    options::{Raw, Size},
};
use crate::load::{
    Flushes, Pattern, Random, Shape, Spec, Target, Verify, psync,
    shape::{Pause, Rate, Rates, Runs, Sizes},
};
use block::Error;
use std::{
    collections::BTreeSet,
    fs::File,
    io::{Seek, SeekFrom},
    path::{Path, PathBuf},
    time::Duration,
};

/// Why there is no job.
#[derive(Debug)]
pub(super) enum Wrong {
    /// A line of it.
    At(Error),
    /// What its lines say together.
    Job(String),
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Self {
        Self::At(error)
    }
}

fn wrong<T>(why: &str) -> Result<T, Wrong> {
    Err(Wrong::Job(why.to_owned()))
}

/// What goes for all jobs of a file.
pub(super) struct Setting<'a> {
    /// Where all go instead of to their files.
    pub target: Option<&'a Target>,
    pub ignore_unknown: bool,
}

/// The jobs of a section, one for each of its copies, and whether they wait for those before them.
pub(super) fn jobs<'a>(
    name: &str,
    given: impl Iterator<Item = &'a Given>,
    setting: &Setting<'_>,
    notes: &mut BTreeSet<String>,
) -> Result<(Vec<Job>, bool), Wrong> {
    let mut raw = Raw::default();
    for option in given {
        if raw.take(option)? {
            continue;
        }
        let (at, unknown) = (&option.at, &option.name);
        if !setting.ignore_unknown {
            let text =
                format!("option '{unknown}' is not supported (--ignore-unknown leaves such out)");
            return Err(at.wrong(text).into());
        }
        notes.insert(format!(
            "{}, line {}: option '{unknown}' is not supported, and was left out",
            at.file, at.line
        ));
    }
    let copies = (0..raw.copies).map(|copy| raw.job(name, copy, setting, notes));
    Ok((copies.collect::<Result<_, _>>()?, raw.waits))
}

impl Raw {
    fn engine(&self) -> &str {
        self.engine.as_deref().unwrap_or("psync")
    }

    /// The files of a copy.
    fn paths(&self, name: &str, copy: u64) -> Vec<PathBuf> {
        let folder = self.directory.clone().unwrap_or_default();
        let own = match &self.filename {
            Some(given) => names(given),
            None => {
                let format = self.format.as_deref().unwrap_or(FORMAT);
                let count = self.files.unwrap_or(1) as usize;
                (0..count).map(|n| made_up(format, name, copy, n)).collect()
            }
        };
        own.iter().map(|name| folder.join(name)).collect()
    }

    fn job(
        &self,
        name: &str,
        copy: u64,
        setting: &Setting<'_>,
        notes: &mut BTreeSet<String>,
    ) -> Result<Job, Wrong> {
        let engine = self.engine();
        let mut paths = Vec::new();
        let target = match (setting.target, &self.uri) {
            (Some(target), _) => target.clone(),
            (None, Some(uri)) if engine == "nbd" => Target::Nbd(uri.clone()),
            (None, None) if engine == "nbd" => return wrong("ioengine=nbd takes uri=…"),
            _ => {
                paths = self.paths(name, copy);
                let Some(first) = paths.first() else {
                    return wrong("its filename names no file");
                };
                Target::File {
                    path: first.clone(),
                    engine: match engine {
                        "io_uring" => "io_uring",
                        "libaio" if self.direct => "native",
                        "posixaio" => "threads",
                        _ => psync::NAME,
                    }
                    .to_owned(),
                    direct: self.direct,
                }
            }
        };
        if setting.target.is_none() && engine == "libaio" && !self.direct {
            notes.insert(
                "ioengine=libaio without direct=1: the kernel makes such requests one by one while they are submitted, so they \
                 are made one at a time, as by psync, whatever iodepth says"
                    .to_owned(),
            );
        }
        let count = paths.len().max(1) as u64;
        let bytes = |size: Option<Size>, of: &str| bytes_of(size, paths.first(), of);
        let increment = bytes(self.offset_increment, "offset_increment")?.unwrap_or(0);
        let start = bytes(self.offset, "offset")?.unwrap_or(0);
        let Some(start) = increment
            .checked_mul(copy)
            .and_then(|n| n.checked_add(start))
        else {
            return wrong("its offset and offset_increment are too much");
        };
        // Of all files together; percent are of each.
        let whole = match (self.size, self.file_size) {
            (Some(Size::Percent(_)), _) => {
                let each = paths
                    .iter()
                    .map(|path| bytes_of(self.size, Some(path), "size"));
                let each = match paths.is_empty() {
                    true => bytes(self.size, "size")?,
                    false => each
                        .collect::<Result<Vec<_>, _>>()?
                        .into_iter()
                        .flatten()
                        .min(),
                };
                each.and_then(|each| each.checked_mul(count))
            }
            (Some(size), _) => bytes(Some(size), "size")?,
            (None, each) => each.and_then(|each| each.checked_mul(count)),
        };
        let range = whole.map(|whole| whole / count);
        let range = match (range, self.file_size) {
            (Some(range), Some(each)) => Some(range.min(each.saturating_sub(start))),
            (range, _) => range,
        };
        let pattern = self.pattern.unwrap_or(Pattern::Read);
        let sizes = self.sizes(pattern);
        let (most, flushes) = (
            sizes.most,
            self.flush.map_or(Flushes::Never, Flushes::Every),
        );
        let there = || {
            paths
                .iter()
                .chain(file_of(&target))
                .filter_map(|p| length(p))
                .min()
        };
        let region = range.or_else(|| Some(there()?.saturating_sub(start)));
        let once = region.map(|region| region / sizes.least.max(1) * sizes.least * count);
        let end = self.end(bytes(self.io_size, "io_size")?, once)?;
        let mut spec = Spec {
            pattern,
            read_percent: self.read_percent.unwrap_or(50),
            block_bytes: most,
            depth: self.depth(&target),
            flushes,
            start_bytes: start,
            range_bytes: range,
            duration: self.runtime.unwrap_or_default(),
            ramp: self.ramp.unwrap_or_default(),
            verify: self.verify.then(Verify::default),
            zipf: self.zipf.filter(|_| pattern.is_random()),
            seed: self.seed.unwrap_or(1).wrapping_add(copy),
            ..Spec::new(target)
        };
        spec.shape = self.shape(&spec, sizes, paths.get(1..).unwrap_or_default(), notes)?;
        // What is due is to be sent in time.
        spec.poll = spec.shape.rates != Rates::default();
        (spec.ios_max, spec.shape.bytes_max) = match end {
            End::Never => (None, None),
            End::Requests(ios) => (Some(ios), None),
            // With one size the number says it exactly.
            End::Bytes(all) if !spec.sizes_differ() => (Some(all / most.max(1)), None),
            End::Bytes(all) => (None, Some(all)),
            End::Both(ios, all) if !spec.sizes_differ() => (Some(ios.min(all / most.max(1))), None),
            End::Both(ios, all) => (Some(ios), Some(all)),
        };
        if let Err(error) = spec.check() {
            return wrong(&error.to_string());
        }
        let layout = Layout {
            bytes: self
                .file_size
                .or(range.and_then(|range| range.checked_add(start))),
            written: spec.has_reads() || self.overwrite,
            allocated: self.allocates,
            may_create: self.may_create,
            unlink: self.unlink,
            paths,
        };
        Ok(Job {
            name: name.to_owned(),
            group: 0,
            together: self.together,
            delay: self.delay(spec.seed),
            waits_for: self.waits_for.clone(),
            layout,
            spec,
        })
    }

    /// Requests at a time: one where there are no more, whatever the depth.
    fn depth(&self, target: &Target) -> u32 {
        let one = matches!(target, Target::File { engine, .. } if engine == psync::NAME);
        match self.engine() {
            "psync" | "sync" | "vsync" | "pvsync" | "pvsync2" => 1,
            _ if one => 1,
            _ => self.depth.unwrap_or(1),
        }
    }

    fn delay(&self, seed: u64) -> Duration {
        let Some((from, to)) = self.start_delay else {
            return Duration::ZERO;
        };
        let span = (to - from).as_micros() as u64;
        from + Duration::from_micros(Random::new(seed ^ 0xde1a).below(span + 1))
    }

    /// When a job ends besides its runtime; `once` are the bytes of its files.
    fn end(&self, io_size: Option<u64>, once: Option<u64>) -> Result<End, Wrong> {
        if self.time_based && self.runtime.is_none() {
            return wrong("time_based needs runtime");
        }
        let all = io_size.or(once).map(|all| all.saturating_mul(self.loops));
        match (self.ios, all) {
            (Some(ios), None) => Ok(End::Requests(ios)),
            (Some(ios), Some(_)) if self.time_based => Ok(End::Requests(ios)),
            (Some(ios), Some(all)) => Ok(End::Both(ios, all)),
            (None, _) if self.time_based => Ok(End::Never),
            (None, Some(all)) => Ok(End::Bytes(all)),
            (None, None) => wrong(
                "it has no end: give size, number_ios, or runtime with time_based (how large its file or disk is is not known)",
            ),
        }
    }

    fn sizes(&self, pattern: Pattern) -> Bytes {
        let read_percent = self.read_percent.unwrap_or(50);
        let of = |kind: usize| -> Sizes {
            let differ = self.splits[kind].clone().or(self.ranges[kind].clone());
            let one = self.block[kind].unwrap_or(4096);
            differ.unwrap_or(Sizes::Split(vec![(one, 100)]))
        };
        let reads = of(0);
        let writes = of(1);
        // Of a kind that there is none of nothing is asked.
        let (reads, writes) = match (pattern.reads(read_percent), pattern.writes(read_percent)) {
            (true, false) => (reads.clone(), reads),
            (false, true) => (writes.clone(), writes),
            _ => (reads, writes),
        };
        let bounds = [reads.bounds(), writes.bounds()];
        let least = bounds[0].0.min(bounds[1].0);
        let most = bounds[0].1.max(bounds[1].1);
        let differ = least != most;
        Bytes {
            least,
            most,
            reads: differ.then_some(reads),
            writes: differ.then_some(writes),
        }
    }

    fn shape(
        &self,
        spec: &Spec,
        sizes: Bytes,
        more_files: &[PathBuf],
        notes: &mut BTreeSet<String>,
    ) -> Result<Shape, Wrong> {
        let random = spec.pattern.is_random();
        let plain = sizes.reads.is_none() && self.align.is_none() && self.behind.is_none();
        let once = random && self.random_map && self.zipf.is_none();
        let percent = self
            .random_percent
            .filter(|percent| random && *percent < 100);
        let can_once = plain && percent.is_none() && !self.verify;
        if once && !can_once {
            notes.insert(
                "random places are drawn anew each time, as with norandommap, in jobs that have bssplit, bsrange, blockalign, \
                 percentage_random, verify or a number behind rw: some come twice, some never"
                    .into(),
            );
        }
        let rate = |kind: usize| match (self.rate_iops[kind], self.rate_bytes[kind]) {
            (Some(_), Some(_)) => wrong("it has rate and rate_iops: give one of them"),
            (Some(requests), _) => Ok(Some(Rate::Requests(requests as f64))),
            (_, bytes) => Ok(bytes.map(|bytes| Rate::Bytes(bytes as f64))),
        };
        let (reads, writes) = (rate(0)?, rate(1)?);
        let runs = self
            .behind
            .filter(|_| random)
            .map(|(_, count)| match self.identical {
                true => Runs::Identical(count),
                false => Runs::Sequential(count),
            });
        let skip = self.behind.filter(|_| !random).map_or(0, |(back, bytes)| {
            let bytes = bytes as i64;
            if back { -bytes } else { bytes }
        });
        let pause = self
            .think
            .filter(|think| !think.is_zero())
            .map(|time| Pause {
                time,
                spin: self.think_spin.min(time),
                requests: self.think_blocks,
                when_sent: self.think_when_sent,
            });
        Ok(Shape {
            once: once && can_once,
            reads: sizes.reads,
            writes: sizes.writes,
            align_bytes: self.align,
            bytes_max: None,
            random_percent: percent,
            runs,
            skip_bytes: skip,
            more_files: more_files.to_vec(),
            service: self.service,
            rates: Rates {
                reads: reads.filter(|_| spec.has_reads()),
                writes: writes.filter(|_| spec.pattern.writes(spec.read_percent)),
                poisson: self.poisson && (reads.is_some() || writes.is_some()),
            },
            pause,
            flush_by_queue: self.flush.is_some(),
            flush_at_end: self.flush_at_end,
        })
    }
}

/// Sizes of requests.
struct Bytes {
    least: u64,
    most: u64,
    /// Where they are not all the same.
    reads: Option<Sizes>,
    writes: Option<Sizes>,
}

/// When a job ends.
enum End {
    Never,
    Requests(u64),
    Bytes(u64),
    Both(u64, u64),
}

fn file_of(target: &Target) -> Option<&PathBuf> {
    match target {
        Target::File { path, .. } => Some(path),
        _ => None,
    }
}

/// Bytes of a file or device that is there.
fn length(path: &Path) -> Option<u64> {
    File::open(path).ok()?.seek(SeekFrom::End(0)).ok()
}

/// A size in bytes, where it is in percent of the file.
fn bytes_of(size: Option<Size>, file: Option<&PathBuf>, of: &str) -> Result<Option<u64>, Wrong> {
    Ok(match size {
        None => None,
        Some(Size::Bytes(bytes)) => Some(bytes),
        Some(Size::Percent(percent)) => match file.and_then(|path| length(path)) {
            Some(whole) => Some((u128::from(whole) * u128::from(percent) / 100) as u64 / 512 * 512),
            None => {
                return wrong(&format!(
                    "{of} in percent: how large the disk is is not known yet"
                ));
            }
        },
    })
}
