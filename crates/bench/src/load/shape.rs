//! What a load may ask for besides one size, one sequence and one file: [`Shape`], as fio's jobs do.

use super::{Kind, Random, Spec};
use block::{Error, Result, size};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, time::Duration};

/// Parts of a [`Sizes::Split`] at most, as in fio.
pub const SPLIT_MAX: usize = 64;
/// [`Shape::more_files`] at most.
pub const FILES_MAX: usize = 1024;

/// How many bytes requests of a kind have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sizes {
    /// Multiples of the first up to the second, all alike.
    Range(u64, u64),
    /// Sizes and their parts in percent, 100 together.
    Split(Vec<(u64, u8)>),
}

impl Sizes {
    /// The smallest and the largest.
    pub fn bounds(&self) -> (u64, u64) {
        match self {
            Self::Range(least, most) => (*least, *most),
            Self::Split(parts) => {
                let asked = || parts.iter().filter(|part| part.1 > 0).map(|part| part.0);
                (asked().min().unwrap_or(0), asked().max().unwrap_or(0))
            }
        }
    }

    /// One of them.
    pub(super) fn draw(&self, random: &mut Random) -> u64 {
        match self {
            Self::Range(least, most) => least * (1 + random.below(most / least)),
            Self::Split(parts) => {
                let mut left = random.below(100);
                for (bytes, percent) in parts {
                    match left.checked_sub(u64::from(*percent)) {
                        Some(rest) => left = rest,
                        None => return *bytes,
                    }
                }
                self.bounds().1
            }
        }
    }

    fn check(&self) -> Result<()> {
        let (least, most) = self.bounds();
        let parts: &[(u64, u8)] = match self {
            Self::Range(..) => &[],
            Self::Split(parts) => parts,
        };
        let sum: u32 = parts.iter().map(|part| u32::from(part.1)).sum();
        let wrong = |text: String| Err(Error::invalid(text));
        if matches!(self, Self::Split(_)) && (sum != 100 || parts.len() > SPLIT_MAX) {
            return wrong(format!(
                "sizes of requests: {} parts of {sum} % together; there may be {SPLIT_MAX}, of 100 %",
                parts.len()
            ));
        }
        let all = parts.iter().map(|part| part.0).chain([least, most]);
        for bytes in all {
            if bytes == 0 || !bytes.is_multiple_of(512) || bytes > super::BLOCK_BYTES_MAX {
                return wrong(format!(
                    "a request of {bytes} bytes: it must be a multiple of 512, and {} at most",
                    size::human(super::BLOCK_BYTES_MAX)
                ));
            }
        }
        match least <= most {
            true => Ok(()),
            false => wrong(format!("sizes of requests from {least} to {most} bytes")),
        }
    }
}

/// How requests go on from each other where they are not all at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Runs {
    /// So many requests follow each other from a random place on.
    Sequential(u64),
    /// So many requests are for the same place.
    Identical(u64),
}

/// Which of several files the next request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// One after the other, so many requests each.
    RoundRobin(u64),
    /// Any, for so many requests.
    Random(u64),
    /// The first until its range was asked for once, then the next.
    Sequential,
}

impl Default for Service {
    fn default() -> Self {
        Self::RoundRobin(1)
    }
}

/// What a rate counts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rate {
    /// Requests per second.
    Requests(f64),
    /// Bytes per second.
    Bytes(f64),
}

impl Rate {
    /// The time that a request of so many bytes takes up.
    pub(super) fn time(self, bytes: u64) -> Duration {
        let seconds = match self {
            Self::Requests(rate) => 1.0 / rate,
            Self::Bytes(rate) => bytes as f64 / rate,
        };
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

/// Rates that reads and writes keep each for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Of reads.
    pub reads: Option<Rate>,
    /// Of writes.
    pub writes: Option<Rate>,
    /// Distances are those of chance (Poisson), and even otherwise.
    pub poisson: bool,
}

/// A rest of the whole queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// How long, from when nothing is in flight.
    pub time: Duration,
    /// The first part of it, which is spent awake.
    pub spin: Duration,
    /// After so many requests.
    pub requests: u64,
    /// Requests count when they are sent, and when they end otherwise.
    pub when_sent: bool,
}

/// See the module. The default asks for nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shape {
    /// Bytes of reads; [`Spec::block_bytes`] is the most of reads and writes. `None`: as many.
    pub reads: Option<Sizes>,
    /// Bytes of writes.
    pub writes: Option<Sizes>,
    /// Random requests begin at multiples of this. `None`: of their smallest size.
    pub align_bytes: Option<u64>,
    /// Ends the measurement after so many bytes were asked for.
    pub bytes_max: Option<u64>,
    /// No random place comes twice before all have come (fio's random map).
    pub once: bool,
    /// So many percent of random requests are at random, others follow the last of their kind. `None`: all.
    pub random_percent: Option<u8>,
    /// Random requests come in runs.
    pub runs: Option<Runs>,
    /// Bytes between a sequential request's end and the start of the next; with less than 0 they go backwards.
    pub skip_bytes: i64,
    /// Further files, of which each has the range of [`Spec::target`]'s.
    pub more_files: Vec<PathBuf>,
    /// Which of the files is next.
    pub service: Service,
    /// Reads and writes have rates of their own, instead of [`Spec::rate`].
    pub rates: Rates,
    /// The whole queue rests now and then; [`Spec::think`] is a rest of each place.
    pub pause: Option<Pause>,
    /// What [`Spec::flushes`] counts are a queue's writes when they are sent, and not those of each place: a flush waits for none
    /// of them.
    pub flush_by_queue: bool,
    /// A queue that has written flushes all files at its end; that flush does not count.
    pub flush_at_end: bool,
}

impl Shape {
    /// The sizes of a kind of request, where they differ.
    pub(super) fn sizes(&self, kind: Kind) -> Option<&Sizes> {
        match kind {
            Kind::Read => self.reads.as_ref(),
            _ => self.writes.as_ref(),
        }
    }

    /// Numbers of bytes that a disk of larger blocks must be asked for in multiples of its own, with what they are.
    pub(super) fn units(&self, spec: &Spec) -> impl Iterator<Item = (&'static str, u64)> {
        let of = |name, sizes: Option<&Sizes>| {
            let units = match sizes {
                Some(Sizes::Range(least, _)) => vec![*least],
                Some(Sizes::Split(parts)) => {
                    parts.iter().filter(|p| p.1 > 0).map(|p| p.0).collect()
                }
                None => Vec::new(),
            };
            units.into_iter().map(move |unit| (name, unit))
        };
        let reads = self.reads.as_ref().filter(|_| spec.has(Kind::Read));
        let writes = self.writes.as_ref().filter(|_| spec.has(Kind::Write));
        let places = [
            ("blockalign", self.align_bytes.unwrap_or(0)),
            ("bytes between requests", self.skip_bytes.unsigned_abs()),
        ];
        of("a read of", reads)
            .chain(of("a write of", writes))
            .chain(places)
    }

    /// What can be said of it before the target is known.
    pub(super) fn check(&self, spec: &Spec) -> Result<()> {
        let wrong = |text: String| Err(Error::invalid(text));
        for sizes in [&self.reads, &self.writes].into_iter().flatten() {
            sizes.check()?;
            if sizes.bounds().1 > spec.block_bytes {
                return wrong(format!(
                    "a request of {} bytes is more than the most, {}",
                    sizes.bounds().1,
                    spec.block_bytes
                ));
            }
        }
        if self
            .align_bytes
            .is_some_and(|align| align == 0 || !align.is_multiple_of(512))
        {
            return wrong("places of requests must be at multiples of 512".into());
        }
        if self.skip_bytes % 512 != 0 {
            return wrong(format!(
                "{} bytes between requests: it must be a multiple of 512",
                self.skip_bytes
            ));
        }
        if self.more_files.len() >= FILES_MAX {
            return wrong(format!(
                "{} files: there may be {FILES_MAX}",
                self.more_files.len() + 1
            ));
        }
        let counts = [
            matches!(self.runs, Some(Runs::Sequential(0) | Runs::Identical(0))),
            matches!(self.service, Service::RoundRobin(0) | Service::Random(0)),
            self.pause.is_some_and(|pause| pause.requests == 0),
            self.bytes_max == Some(0),
        ];
        if counts.contains(&true) {
            return wrong("after 0 requests or bytes: it must be one at least".into());
        }
        for rate in [self.rates.reads, self.rates.writes].into_iter().flatten() {
            let (Rate::Requests(rate) | Rate::Bytes(rate)) = rate;
            if !(0.001..=1e12).contains(&rate) {
                return wrong(format!("a rate of {rate} a second: it is 0.001 to 10^12"));
            }
        }
        let rates = self.rates.reads.is_some() || self.rates.writes.is_some();
        if rates && !spec.poll {
            return wrong(
                "a thread that sleeps until something ends is late for its rate: it must poll"
                    .into(),
            );
        }
        if rates && spec.rate.is_some() || self.pause.is_some() && !spec.think.is_zero() {
            return wrong("a rate or a rest is given twice".into());
        }
        let unpaced = |kind, rate: Option<Rate>| rate.is_none() && spec.has(kind);
        if rates
            && (unpaced(Kind::Read, self.rates.reads) || unpaced(Kind::Write, self.rates.writes))
        {
            return wrong("reads or writes have a rate, and the others none: give both".into());
        }
        if spec.verify.is_some() {
            let differ =
                self.reads.is_some() || self.writes.is_some() || self.align_bytes.is_some();
            if differ || !self.more_files.is_empty() || self.skip_bytes != 0 {
                return wrong(
                    "verify: blocks must be of one size, at its multiples, in one file".into(),
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{
        Pattern, Target, Verify,
        plan::{DISK, Geometry, Places},
    };

    #[test]
    fn disks_of_larger_blocks_take_multiples_of_them() {
        type Change = fn(&mut Shape);
        let cases: [(Change, Option<&str>); 7] = [
            (|_| (), None),
            (
                |s| s.reads = Some(Sizes::Range(512, 4096)),
                Some("a read of 512"),
            ),
            (
                |s| s.reads = Some(Sizes::Split(vec![(4096, 90), (512, 10)])),
                Some("a read of 512"),
            ),
            (
                |s| s.reads = Some(Sizes::Split(vec![(4096, 100), (512, 0)])),
                None,
            ),
            // There are none.
            (|s| s.writes = Some(Sizes::Range(512, 4096)), None),
            (|s| s.align_bytes = Some(1024), Some("blockalign 1024")),
            (
                |s| s.skip_bytes = -2048,
                Some("bytes between requests 2048"),
            ),
        ];
        for (change, says) in cases {
            let mut spec = Spec {
                pattern: Pattern::RandRead,
                ..Spec::new(Target::Nbd("x".into()))
            };
            change(&mut spec.shape);
            spec.check().unwrap();
            Places::new(&spec, &DISK).unwrap();
            let large = Geometry {
                block_bytes: 4096,
                ..DISK
            };
            let said = Places::new(&spec, &large)
                .map(drop)
                .map_err(|e| e.to_string());
            match says {
                None => assert_eq!(said, Ok(())),
                Some(says) => {
                    let said = said.unwrap_err();
                    assert!(
                        said.contains(&format!("{says}: the disk takes multiples of 4096")),
                        "{said}"
                    );
                }
            }
        }
    }

    #[test]
    fn sizes_are_drawn_by_their_parts() {
        let mut random = Random::new(7);
        let split = Sizes::Split(vec![(4096, 70), (65536, 25), (512, 5), (8192, 0)]);
        assert_eq!(split.bounds(), (512, 65536));
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..10_000 {
            *counts.entry(split.draw(&mut random)).or_insert(0) += 1;
        }
        assert_eq!(
            counts.keys().copied().collect::<Vec<_>>(),
            [512, 4096, 65536]
        );
        assert!((400..600).contains(&counts[&512]), "{counts:?}");
        assert!((6800..7200).contains(&counts[&4096]), "{counts:?}");
        let range = Sizes::Range(4096, 16384 + 512);
        let drawn: std::collections::BTreeSet<u64> =
            (0..1000).map(|_| range.draw(&mut random)).collect();
        assert_eq!(
            drawn.into_iter().collect::<Vec<_>>(),
            [4096, 8192, 12288, 16384]
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        type Change = fn(&mut Spec);
        let cases: [(Change, &str); 13] = [
            (
                |s| s.shape.reads = Some(Sizes::Split(vec![(4096, 99)])),
                "of 99 %",
            ),
            (
                |s| s.shape.reads = Some(Sizes::Split(vec![(4096, 100), (0, 0)])),
                "0 bytes",
            ),
            (|s| s.shape.writes = Some(Sizes::Range(0, 4096)), "0 bytes"),
            (
                |s| s.shape.writes = Some(Sizes::Range(4096, 8192)),
                "more than the most, 4096",
            ),
            (|s| s.shape.align_bytes = Some(100), "multiples of 512"),
            (|s| s.shape.skip_bytes = -100, "-100 bytes"),
            (
                |s| s.shape.more_files = vec!["x".into(); FILES_MAX],
                "1025 files",
            ),
            (|s| s.shape.runs = Some(Runs::Identical(0)), "one at least"),
            (|s| s.shape.service = Service::Random(0), "one at least"),
            (|s| s.shape.rates.reads = Some(Rate::Bytes(f64::NAN)), "NaN"),
            (
                |s| s.shape.rates.reads = Some(Rate::Bytes(5.0)),
                "must poll",
            ),
            (
                |s| {
                    s.shape.rates.writes = Some(Rate::Requests(5.0));
                    (s.poll, s.rate) = (true, Some(5.0));
                },
                "given twice",
            ),
            (
                |s| {
                    s.verify = Some(Verify::default());
                    s.shape.more_files = vec!["x".into()];
                },
                "in one file",
            ),
        ];
        for (change, says) in cases {
            let mut spec = Spec::new(Target::Nbd("x".into()));
            change(&mut spec);
            let error = spec.check().unwrap_err().to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
    }
}
