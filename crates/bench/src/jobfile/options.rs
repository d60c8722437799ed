//! What options say: each line for itself. What they mean together is [`super::make`].

use super::{
    lines::Given,
    numbers::{each, range, size, split, time},
};
use crate::load::{
    Pattern,
    shape::{Service, Sizes},
};
use block::{Error, Result};
use std::{path::PathBuf, time::Duration};

/// Options that change nothing here, or say what is so anyway.
const OF_NO_MEANING: [&str; 31] = [
    "name",
    "description",
    "thread",
    "random_generator",
    "refill_buffers",
    "scramble_buffers",
    "randrepeat",
    "allrandrepeat",
    "invalidate",
    "clocksource",
    "gtod_reduce",
    "disable_lat",
    "disable_clat",
    "disable_slat",
    "disable_bw_measurement",
    "clat_percentiles",
    "lat_percentiles",
    "slat_percentiles",
    "percentile_list",
    "significant_figures",
    "gtod_cpu",
    // The order of places needs no memory here, and requests are made with registered files, and vectors, as the engine can.
    "softrandommap",
    "registerfiles",
    "fixedbufs",
    "nonvectored",
    "userspace_reap",
    "new_group",
    "openfiles",
    // Who has a rate does not wait for answers, as with `offload`.
    "io_submit_mode",
    "create_serialize",
    "create_fsync",
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

/// Files of a job at most.
const FILES_MAX: u64 = crate::load::shape::FILES_MAX as u64;

/// A number of bytes, or a part of the file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Size {
    Bytes(u64),
    Percent(u64),
}

/// Values of reads and writes.
type Each<T> = [Option<T>; 2];

/// What the lines of a job say; later ones replace earlier ones.
#[derive(Clone, Debug)]
pub(super) struct Raw {
    pub filename: Option<String>,
    pub format: Option<String>,
    pub directory: Option<PathBuf>,
    pub files: Option<u64>,
    pub file_size: Option<u64>,
    pub service: Service,
    pub may_create: bool,
    pub allocates: bool,
    pub overwrite: bool,
    pub unlink: bool,
    pub uri: Option<String>,
    pub engine: Option<String>,
    pub direct: bool,
    pub pattern: Option<Pattern>,
    /// What follows the pattern: bytes, or a number of requests.
    pub behind: Option<(bool, u64)>,
    /// `rw_sequencer=identical`.
    pub identical: bool,
    pub read_percent: Option<u8>,
    pub block: Each<u64>,
    pub ranges: Each<Sizes>,
    pub splits: Each<Sizes>,
    pub align: Option<u64>,
    pub random_percent: Option<u8>,
    pub size: Option<Size>,
    pub io_size: Option<Size>,
    pub offset: Option<Size>,
    pub offset_increment: Option<Size>,
    pub loops: u64,
    pub ios: Option<u64>,
    pub depth: Option<u32>,
    pub copies: u64,
    pub runtime: Option<Duration>,
    pub time_based: bool,
    pub start_delay: Option<(Duration, Duration)>,
    pub ramp: Option<Duration>,
    pub rate_iops: Each<u64>,
    pub rate_bytes: Each<u64>,
    pub poisson: bool,
    pub think: Option<Duration>,
    pub think_spin: Duration,
    pub think_blocks: u64,
    pub think_when_sent: bool,
    pub zipf: Option<f64>,
    pub seed: Option<u64>,
    pub flush: Option<u32>,
    pub flush_at_end: bool,
    pub verify: bool,
    /// `stonewall`.
    pub waits: bool,
    pub waits_for: Option<String>,
    /// `group_reporting`.
    pub together: bool,
    pub random_map: bool,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            filename: None,
            format: None,
            directory: None,
            files: None,
            file_size: None,
            service: Service::default(),
            may_create: true,
            allocates: true,
            overwrite: false,
            unlink: false,
            uri: None,
            engine: None,
            direct: false,
            pattern: None,
            behind: None,
            identical: false,
            read_percent: None,
            block: [None; 2],
            ranges: [None, None],
            splits: [None, None],
            align: None,
            random_percent: None,
            size: None,
            io_size: None,
            offset: None,
            offset_increment: None,
            loops: 1,
            ios: None,
            depth: None,
            copies: 1,
            runtime: None,
            time_based: false,
            start_delay: None,
            ramp: None,
            rate_iops: [None; 2],
            rate_bytes: [None; 2],
            poisson: false,
            think: None,
            think_spin: Duration::ZERO,
            think_blocks: 1,
            think_when_sent: false,
            zipf: None,
            seed: None,
            flush: None,
            flush_at_end: false,
            verify: false,
            waits: false,
            waits_for: None,
            together: false,
            random_map: true,
        }
    }
}

/// A line's value, and what is wrong with it.
struct Value<'a> {
    option: &'a Given,
}

impl<'a> Value<'a> {
    fn wrong(&self, why: &str) -> Error {
        let (name, value) = (&self.option.name, self.option.value.as_deref());
        let value = value.unwrap_or_default();
        self.option.at.wrong(format!("{name}={value}: {why}"))
    }

    fn text(&self) -> Result<&'a str> {
        let value = self.option.value.as_deref().filter(|v| !v.is_empty());
        value.ok_or_else(|| self.wrong("a value is missing"))
    }

    fn number(&self, least: u64, most: u64) -> Result<u64> {
        let known = self.text()?.parse().ok();
        known
            .filter(|n| (least..=most).contains(n))
            .ok_or_else(|| match least {
                0 => self.wrong(&format!("it is a number up to {most}")),
                least => self.wrong(&format!("it is a number from {least} to {most}")),
            })
    }

    /// A flag alone says yes.
    fn flag(&self) -> Result<bool> {
        match self.option.value.as_deref() {
            None | Some("1") => Ok(true),
            Some("0") => Ok(false),
            Some(_) => Err(self.wrong("it is 0 or 1")),
        }
    }

    fn bytes(&self) -> Result<u64> {
        size(self.text()?).ok_or_else(|| self.wrong("it is a number of bytes, as 4k, 1m or 2g"))
    }

    fn each<T: Clone>(&self, parse: impl Fn(&str) -> Option<T>, is: &str) -> Result<Each<T>> {
        each(self.text()?, parse).ok_or_else(|| {
            self.wrong(&format!(
                "it is {is}, for reads and writes, or one for each parted by a comma"
            ))
        })
    }

    fn place(&self) -> Result<Size> {
        match self.text()?.strip_suffix('%') {
            Some(percent) => {
                let known = percent.parse().ok().filter(|p| *p <= 100);
                known
                    .map(Size::Percent)
                    .ok_or_else(|| self.wrong("it is 0 to 100 %"))
            }
            None => self.bytes().map(Size::Bytes),
        }
    }

    fn time(&self, unit: &str) -> Result<Duration> {
        let known = time(self.text()?, unit);
        known.ok_or_else(|| self.wrong("it is a time, as 500us, 20ms, 5s or 1m"))
    }

    /// One of these.
    fn word<T: Copy>(&self, words: &[(&str, T)]) -> Result<T> {
        let text = self.text()?;
        let known = words.iter().find(|(word, _)| *word == text);
        known.map(|(_, value)| *value).ok_or_else(|| {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.wrong(&format!("there are {}", words.join(", ")))
        })
    }
}

impl Raw {
    /// Takes a line; whether the option is known.
    pub(super) fn take(&mut self, option: &Given) -> Result<bool> {
        let of = Value { option };
        match option.name.as_str() {
            "filename" => self.filename = Some(of.text()?.to_owned()),
            "filename_format" => self.format = Some(of.text()?.to_owned()),
            "directory" => self.directory = Some(of.text()?.into()),
            "nrfiles" | "nr_files" => self.files = Some(of.number(1, FILES_MAX)?),
            "filesize" => self.file_size = Some(of.bytes()?),
            "file_service_type" => self.service = service(&of)?,
            "allow_file_create" => self.may_create = of.flag()?,
            "fallocate" => {
                let ways = [
                    ("native", true),
                    ("posix", true),
                    ("keep", true),
                    ("1", true),
                ];
                let none = [("none", false), ("truncate", false), ("0", false)];
                self.allocates = of.word(&[&ways[..], &none].concat())?;
            }
            "overwrite" => self.overwrite = of.flag()?,
            "unlink" => self.unlink = of.flag()?,
            "uri" => self.uri = Some(of.text()?.to_owned()),
            "ioengine" => {
                let known = [
                    "io_uring", "libaio", "psync", "sync", "vsync", "pvsync", "pvsync2",
                    "posixaio", "nbd",
                ];
                self.engine = Some(of.word(&known.map(|name| (name, name)))?.to_owned());
            }
            "rw" | "readwrite" => self.pattern(&of)?,
            "rw_sequencer" => {
                self.identical = of.word(&[("sequential", false), ("identical", true)])?;
            }
            "rwmixread" => self.read_percent = Some(of.number(0, 100)? as u8),
            "rwmixwrite" => self.read_percent = Some(100 - of.number(0, 100)? as u8),
            "bs" | "blocksize" => {
                self.block = of.each(size, "a number of bytes")?;
                (self.ranges, self.splits) = Default::default();
            }
            "bsrange" | "blocksize_range" => {
                self.ranges = of.each(range, "two numbers of bytes, as 4k-64k")?;
                self.splits = Default::default();
            }
            "bssplit" => {
                self.splits = of.each(
                    split,
                    "a list of sizes and percentages of 100, as 4k/60:64k/40",
                )?
            }
            "blockalign" | "ba" => self.align = Some(of.bytes()?),
            "percentage_random" => {
                let percent = |text: &str| text.parse::<u8>().ok().filter(|n| *n <= 100);
                let [reads, writes] = of.each(percent, "0 to 100")?;
                if reads != writes {
                    return Err(of.wrong("only the same for reads and writes is supported"));
                }
                self.random_percent = reads;
            }
            "size" => self.size = Some(of.place()?),
            "io_size" | "io_limit" => self.io_size = Some(of.place()?),
            "offset" => self.offset = Some(of.place()?),
            "offset_increment" => self.offset_increment = Some(of.place()?),
            "loops" => self.loops = of.number(1, 1_000_000)?,
            "number_ios" => self.ios = Some(of.number(1, u64::MAX)?),
            "iodepth" => {
                self.depth = Some(of.number(1, u64::from(crate::load::DEPTH_MAX))? as u32);
            }
            "numjobs" => self.copies = of.number(1, super::JOBS_MAX as u64)?,
            "direct" => self.direct = of.flag()?,
            "buffered" => self.direct = !of.flag()?,
            "runtime" | "timeout" => self.runtime = Some(of.time("s")?),
            "time_based" => self.time_based = of.flag()?,
            "startdelay" => {
                let text = of.text()?;
                let (from, to) = text.split_once('-').unwrap_or((text, text));
                let known = time(from, "s").zip(time(to, "s")).filter(|(a, b)| a <= b);
                self.start_delay =
                    Some(known.ok_or_else(|| of.wrong("it is a time, as 5s, or two, as 1-5s"))?);
            }
            "ramp_time" => self.ramp = Some(of.time("s")?),
            "rate_iops" => self.rate_iops = of.each(size, "requests a second")?,
            "rate" => self.rate_bytes = of.each(size, "bytes a second")?,
            "rate_process" => self.poisson = of.word(&[("linear", false), ("poisson", true)])?,
            "thinktime" => self.think = Some(of.time("us")?),
            "thinktime_spin" => self.think_spin = of.time("us")?,
            "thinktime_blocks" => self.think_blocks = of.number(1, u64::MAX)?,
            "thinktime_blocks_type" => {
                self.think_when_sent = of.word(&[("complete", false), ("issue", true)])?;
            }
            "random_distribution" => {
                self.zipf = match of.text()?.split_once(':') {
                    None if of.text()? == "random" => None,
                    Some(("zipf", theta)) => Some(
                        theta
                            .parse()
                            .map_err(|_| of.wrong("zipf:THETA is supported, without a centre"))?,
                    ),
                    _ => return Err(of.wrong("there are random and zipf:THETA")),
                };
            }
            "randseed" => self.seed = Some(of.number(0, u64::MAX)?),
            "norandommap" => self.random_map = !of.flag()?,
            "fsync" | "fdatasync" => {
                let writes = of.number(0, u64::from(u32::MAX) - 1)? as u32;
                self.flush = Some(writes).filter(|writes| *writes > 0);
            }
            "end_fsync" | "fsync_on_close" => self.flush_at_end = of.flag()?,
            "verify" => {
                self.verify = match of.text()? {
                    "0" | "null" => false,
                    name if VERIFIES.contains(&name) => true,
                    _ => {
                        let known = VERIFIES.join(", ");
                        return Err(of.wrong(&format!(
                            "there are 0, null and {known}, for all of which ours is CRC32C"
                        )));
                    }
                };
            }
            "do_verify" if of.flag()? => {}
            "stonewall" | "wait_for_previous" => self.waits = of.flag()?,
            "wait_for" => self.waits_for = Some(of.text()?.to_owned()),
            "group_reporting" => self.together = of.flag()?,
            "kb_base" if of.number(0, 1024)? == 1024 => {}
            name if OF_NO_MEANING.contains(&name) => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `randread`, `read:8k` (bytes between requests), `randread:8` (requests of a run).
    fn pattern(&mut self, of: &Value<'_>) -> Result<()> {
        let text = of.text()?;
        let (name, behind) = match text.split_once(':') {
            Some((name, behind)) => (name, Some(behind)),
            None => (text, None),
        };
        let pattern = match name {
            "read" => Pattern::Read,
            "write" => Pattern::Write,
            "rw" | "readwrite" => Pattern::Rw,
            "randread" => Pattern::RandRead,
            "randwrite" => Pattern::RandWrite,
            "randrw" => Pattern::RandRw,
            _ => {
                return Err(of.wrong("there are read, write, rw, randread, randwrite and randrw"));
            }
        };
        self.behind = match behind {
            None => None,
            Some(number) if pattern.is_random() => {
                let count = number.parse().ok().filter(|n| *n > 0);
                Some((
                    false,
                    count.ok_or_else(|| of.wrong("behind the colon is a number of requests"))?,
                ))
            }
            Some(number) => {
                let (back, number) = match number.strip_prefix('-') {
                    Some(number) => (true, number),
                    None => (false, number),
                };
                let bytes = size(number).filter(|n| *n < 1 << 60);
                Some((
                    back,
                    bytes.ok_or_else(|| of.wrong("behind the colon is a number of bytes"))?,
                ))
            }
        };
        self.pattern = Some(pattern);
        Ok(())
    }
}

fn service(of: &Value<'_>) -> Result<Service> {
    let text = of.text()?;
    let (name, turn) = text.split_once(':').unwrap_or((text, "1"));
    let turn = turn.parse().ok().filter(|turn: &u64| *turn > 0);
    let turn = turn.ok_or_else(|| of.wrong("behind the colon is a number of requests"))?;
    match name {
        "roundrobin" => Ok(Service::RoundRobin(turn)),
        "random" => Ok(Service::Random(turn)),
        "sequential" => Ok(Service::Sequential),
        _ => Err(of.wrong("there are roundrobin, random and sequential")),
    }
}
