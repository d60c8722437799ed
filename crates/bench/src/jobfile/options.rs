//! What options mean.

use super::lines::{Given, Place};
use crate::load::{Flushes, Pattern, Spec, Target, Verify};
use block::{Error, Result};
use std::{
    collections::BTreeSet,
    fs::File,
    io::{Seek, SeekFrom},
    path::PathBuf,
    time::Duration,
};

/// Options that change nothing here, or say what is so anyway.
const OF_NO_MEANING: [&str; 17] = [
    "name",
    "description",
    "thread",
    "norandommap",
    "random_generator",
    "refill_buffers",
    "randrepeat",
    "allrandrepeat",
    "invalidate",
    "fallocate",
    "allow_file_create",
    "clocksource",
    "gtod_reduce",
    "new_group",
    "exitall",
    "file_service_type",
    "disable_slat",
];

/// Checksums that `verify` takes.
const VERIFIES: [&str; 16] = [
    "1",
    "md5",
    "crc64",
    "crc32c",
    "crc32c-intel",
    "crc32",
    "crc16",
    "crc7",
    "xxhash",
    "sha512",
    "sha256",
    "sha1",
    "sha3-224",
    "sha3-256",
    "sha3-384",
    "sha3-512",
];

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

/// A job, before it is copied.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub spec: Spec,
    pub copies: usize,
    pub waits: bool,
    pub together: bool,
}

/// A number of bytes, or a part of the file.
#[derive(Clone, Copy, Debug)]
enum Size {
    Bytes(u64),
    Percent(u64),
}

#[derive(Debug, Default)]
struct Raw {
    target: Option<(Place, String)>,
    uri: Option<String>,
    engine: Option<String>,
    direct: bool,
    pattern: Option<Pattern>,
    read_percent: Option<u8>,
    block: Option<u64>,
    size: Option<Size>,
    io_size: Option<Size>,
    offset: Option<Size>,
    ios: Option<u64>,
    depth: Option<u32>,
    copies: Option<u64>,
    runtime: Option<Duration>,
    time_based: bool,
    ramp: Option<Duration>,
    rate_iops: Option<f64>,
    rate_bytes: Option<f64>,
    think: Option<Duration>,
    zipf: Option<f64>,
    seed: Option<u64>,
    flush: Option<u32>,
    verify: bool,
    waits: bool,
    together: bool,
    random_map: bool,
}

/// The job that options make; later ones replace earlier ones.
pub(super) fn job<'a>(
    given: impl Iterator<Item = &'a Given>,
    target: Option<&Target>,
    ignore_unknown: bool,
    notes: &mut BTreeSet<String>,
) -> Result<Made, Wrong> {
    let mut raw = Raw {
        random_map: true,
        ..Raw::default()
    };
    for option in given {
        match raw.take(option)? {
            true => {}
            false if ignore_unknown => {
                let at = &option.at;
                notes.insert(format!(
                    "{}, line {}: option '{}' is not supported, and was left out",
                    at.file, at.line, option.name
                ));
            }
            false => {
                let name = &option.name;
                let text =
                    format!("option '{name}' is not supported (--ignore-unknown leaves such out)");
                return Err(option.at.wrong(text).into());
            }
        }
    }
    raw.make(target, notes)
}

impl Raw {
    /// Whether the option is known.
    fn take(&mut self, option: &Given) -> Result<bool> {
        let value = option.value.as_deref();
        let wrong = |why: &str| {
            let value = value.unwrap_or_default();
            option.at.wrong(format!("{}={value}: {why}", option.name))
        };
        let text = || {
            value
                .filter(|v| !v.is_empty())
                .ok_or_else(|| wrong("a value is missing"))
        };
        let number = |most: u64| -> Result<u64> {
            let parsed = text()?.parse().ok().filter(|n| *n <= most);
            parsed.ok_or_else(|| wrong(&format!("it is a number up to {most}")))
        };
        // A flag alone says yes.
        let flag = || match value {
            None | Some("1") => Ok(true),
            Some("0") => Ok(false),
            Some(_) => Err(wrong("it is 0 or 1")),
        };
        // For reads, writes and trims; one value stands for all.
        let alike = || -> Result<&str> {
            let text = text()?;
            let mut parts = text.split([',', ':']);
            let first = parts.next().unwrap_or_default();
            match parts.all(|part| part == first || part.is_empty()) {
                true => Ok(first),
                false => Err(wrong("only the same for reads and writes is supported")),
            }
        };
        let bytes = |text: &str| {
            size(text).ok_or_else(|| wrong("it is a number of bytes, as 4k, 1m or 2g"))
        };
        let place = || -> Result<Size> {
            let text = text()?;
            match text.strip_suffix('%') {
                Some(percent) => percent
                    .parse()
                    .ok()
                    .filter(|p| *p <= 100)
                    .map(Size::Percent)
                    .ok_or_else(|| wrong("it is 0 to 100 %")),
                None => bytes(text).map(Size::Bytes),
            }
        };
        let time = |unit: &str| -> Result<Duration> {
            time(text()?, unit).ok_or_else(|| wrong("it is a time, as 500us, 20ms, 5s or 1m"))
        };
        match option.name.as_str() {
            "filename" => {
                let name = text()?;
                let plain = name.replace("\\:", "\0");
                if plain.contains(':') {
                    return Err(wrong(
                        "a job has one file here; '\\:' is a colon in its name",
                    ));
                }
                self.target = Some((option.at.clone(), plain.replace('\0', ":")));
            }
            "uri" => self.uri = Some(text()?.to_owned()),
            "ioengine" => {
                let known = [
                    "io_uring", "libaio", "psync", "sync", "vsync", "pvsync", "pvsync2",
                    "posixaio", "nbd",
                ];
                let name = text()?;
                if !known.contains(&name) {
                    return Err(wrong(&format!("there are {}", known.join(", "))));
                }
                self.engine = Some(name.to_owned());
            }
            "rw" | "readwrite" => {
                self.pattern = Some(match text()? {
                    "read" => Pattern::Read,
                    "write" => Pattern::Write,
                    "rw" | "readwrite" => Pattern::Rw,
                    "randread" => Pattern::RandRead,
                    "randwrite" => Pattern::RandWrite,
                    "randrw" => Pattern::RandRw,
                    _ => {
                        return Err(wrong(
                            "there are read, write, rw, randread, randwrite and randrw",
                        ));
                    }
                });
            }
            "rwmixread" => self.read_percent = Some(number(100)? as u8),
            "rwmixwrite" => self.read_percent = Some(100 - number(100)? as u8),
            "bs" | "blocksize" => self.block = Some(bytes(alike()?)?),
            "size" => self.size = Some(place()?),
            "io_size" | "io_limit" => self.io_size = Some(place()?),
            "offset" => self.offset = Some(place()?),
            "number_ios" => self.ios = Some(number(u64::MAX)?),
            "iodepth" => self.depth = Some(number(u64::from(crate::load::DEPTH_MAX))? as u32),
            "numjobs" => self.copies = Some(number(super::JOBS_MAX as u64)?),
            "direct" => self.direct = flag()?,
            "buffered" => self.direct = !flag()?,
            "runtime" | "timeout" => self.runtime = Some(time("s")?),
            "time_based" => self.time_based = flag()?,
            "ramp_time" => self.ramp = Some(time("s")?),
            "rate_iops" => self.rate_iops = Some(bytes(alike()?)? as f64),
            "rate" => self.rate_bytes = Some(bytes(alike()?)? as f64),
            "thinktime" => self.think = Some(time("us")?),
            "random_distribution" => {
                self.zipf = match text()?.split_once(':') {
                    None if value == Some("random") => None,
                    Some(("zipf", theta)) => Some(
                        theta
                            .parse()
                            .map_err(|_| wrong("zipf:THETA is supported, without a centre"))?,
                    ),
                    _ => return Err(wrong("there are random and zipf:THETA")),
                };
            }
            "randseed" => self.seed = Some(number(u64::MAX)?),
            "fsync" | "fdatasync" => {
                self.flush = Some(number(u64::from(u32::MAX))? as u32).filter(|writes| *writes > 0);
            }
            "verify" => {
                self.verify = match text()? {
                    "0" | "null" => false,
                    name if VERIFIES.contains(&name) => true,
                    _ => {
                        return Err(wrong(
                            "it is a checksum that fio has (ours is CRC32C for all of them)",
                        ));
                    }
                };
            }
            "stonewall" | "wait_for_previous" => self.waits = flag()?,
            "group_reporting" => self.together = flag()?,
            "loops" if number(1)? == 1 => {}
            "kb_base" if number(1024)? == 1024 => {}
            name if OF_NO_MEANING.contains(&name) => {
                if name == "norandommap" {
                    self.random_map = !flag()?;
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn make(self, target: Option<&Target>, notes: &mut BTreeSet<String>) -> Result<Made, Wrong> {
        let job = |why: &str| Err(Wrong::Job(why.to_owned()));
        let engine = self.engine.as_deref().unwrap_or("psync");
        // One request at a time, whatever the depth.
        let one_at_a_time = matches!(engine, "psync" | "sync" | "vsync" | "pvsync" | "pvsync2");
        let target = match (target, &self.uri, &self.target) {
            (Some(target), ..) => target.clone(),
            (None, Some(uri), _) if engine == "nbd" => Target::Nbd(uri.clone()),
            (None, _, Some(_)) if engine == "nbd" => {
                return job("ioengine=nbd takes uri=…, no filename");
            }
            (None, _, Some((_, name))) => Target::File {
                path: PathBuf::from(name),
                engine: match engine {
                    "io_uring" => "io_uring",
                    "libaio" => "native",
                    _ => "threads",
                }
                .to_owned(),
                direct: self.direct,
            },
            (None, ..) => {
                return job("it has no filename: give one, or --file, --vhost-user or --nbd");
            }
        };
        let block = self.block.unwrap_or(4096);
        let whole = || length(&target);
        let bytes = |size: Option<Size>, of: &str| -> Result<Option<u64>, Wrong> {
            Ok(match size {
                None => None,
                Some(Size::Bytes(bytes)) => Some(bytes),
                Some(Size::Percent(percent)) => match whole() {
                    Some(whole) => {
                        Some((u128::from(whole) * u128::from(percent) / 100) as u64 / 512 * 512)
                    }
                    None => {
                        return Err(Wrong::Job(format!(
                            "{of} in percent: how large the disk is is not known yet"
                        )));
                    }
                },
            })
        };
        let start = bytes(self.offset, "offset")?.unwrap_or(0);
        let range = bytes(self.size, "size")?;
        let io_size = bytes(self.io_size, "io_size")?;
        let pattern = self.pattern.unwrap_or(Pattern::Read);
        let depth = if one_at_a_time {
            1
        } else {
            self.depth.unwrap_or(1)
        };
        let mixed = matches!(pattern, Pattern::Rw | Pattern::RandRw);
        if mixed && (self.rate_iops.is_some() || self.rate_bytes.is_some()) {
            return job(
                "rate_iops and rate hold reads and writes each for itself, which a mixed load here cannot",
            );
        }
        if self.think.is_some_and(|think| !think.is_zero()) && depth > 1 {
            return job(
                "thinktime holds the whole job, whatever it has in flight; here that needs iodepth=1",
            );
        }
        let rate = self
            .rate_iops
            .or(self.rate_bytes.map(|rate| rate / block.max(1) as f64));
        let ios = match self.ios {
            Some(ios) => Some(ios),
            None if self.time_based => None,
            None => {
                let all = io_size
                    .or(range)
                    .or_else(|| Some(whole()?.saturating_sub(start)));
                let Some(all) = all else {
                    return job("without size, runtime and time_based it has no end");
                };
                Some(all / block.max(1))
            }
        };
        if self.time_based && self.runtime.is_none() {
            return job("time_based needs runtime");
        }
        let random = matches!(
            pattern,
            Pattern::RandRead | Pattern::RandWrite | Pattern::RandRw
        );
        if random && self.random_map && self.zipf.is_none() {
            notes.insert("random places are drawn anew each time, as with norandommap: some come twice, some never".into());
        }
        let spec = Spec {
            pattern,
            read_percent: self.read_percent.unwrap_or(50),
            block_bytes: block,
            depth,
            flushes: self.flush.map_or(Flushes::Never, Flushes::Every),
            start_bytes: start,
            range_bytes: range,
            duration: self.runtime.unwrap_or_default(),
            ramp: self.ramp.unwrap_or_default(),
            ios_max: ios,
            // What is due is to be sent in time.
            poll: rate.is_some(),
            rate,
            think: self.think.unwrap_or_default(),
            verify: self.verify.then(Verify::default),
            zipf: self.zipf.filter(|_| random),
            seed: self.seed.unwrap_or(1),
            ..Spec::new(target)
        };
        if let Err(error) = spec.check() {
            return job(&error.to_string());
        }
        Ok(Made {
            spec,
            copies: self.copies.unwrap_or(1).max(1) as usize,
            waits: self.waits,
            together: self.together,
        })
    }
}

/// Bytes of a file or device that is there.
fn length(target: &Target) -> Option<u64> {
    let Target::File { path, .. } = target else {
        return None;
    };
    File::open(path).ok()?.seek(SeekFrom::End(0)).ok()
}

/// A number with fio's suffixes where `kb_base` is 1024, its default: `k`, `ki` and `kb` are 1024, `kib` is 1000, as fio 3.33
/// takes them.
fn size(text: &str) -> Option<u64> {
    let text = text.to_ascii_lowercase();
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok();
    }
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let (letter, rest) = match suffix.chars().next() {
        None | Some('b') if suffix.len() <= 1 => return Some(number),
        Some(letter) => (letter, &suffix[letter.len_utf8()..]),
        None => return None,
    };
    let power = "kmgtp".find(letter)? as u32 + 1;
    let base: u64 = match rest {
        "" | "b" | "i" => 1024,
        "ib" => 1000,
        _ => return None,
    };
    number.checked_mul(base.checked_pow(power)?)
}

/// A time with fio's suffixes, of `unit` without one.
fn time(text: &str, unit: &str) -> Option<Duration> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let us: u64 = match if suffix.is_empty() { unit } else { suffix } {
        "us" | "usec" => 1,
        "ms" | "msec" => 1000,
        "s" | "sec" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return None,
    };
    // A year is for ever.
    let us = number.checked_mul(us)?;
    (us <= 365 * 86_400_000_000).then(|| Duration::from_micros(us))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `fio --size=… --bs=8` wrote them.
    #[test]
    fn numbers_are_fios() {
        for (text, bytes) in [
            ("4k", Some(4096)),
            ("4ki", Some(4096)),
            ("4KB", Some(4096)),
            ("4kib", Some(4000)),
            ("1m", Some(1 << 20)),
            ("0x1000", Some(4096)),
            ("4096b", Some(4096)),
            ("512", Some(512)),
            ("4x", None),
            ("", None),
            ("k", None),
            ("99999999999p", None),
        ] {
            assert_eq!(size(text), bytes, "{text}");
        }
        for (text, unit, us) in [
            ("5", "s", Some(5_000_000)),
            ("5", "us", Some(5)),
            ("20ms", "s", Some(20_000)),
            ("1m", "us", Some(60_000_000)),
            ("1w", "s", None),
            ("99999999d", "s", None),
        ] {
            assert_eq!(time(text, unit), us.map(Duration::from_micros), "{text}");
        }
    }
}
