//! `diskplane map`.
//!
//! With `--json` an array with the fields of `qemu-img map --output=json`:
//!
//! | field | |
//! |---|---|
//! | `start`, `length` | guest bytes |
//! | `depth` | which image of the chain answers, 0 is the active one |
//! | `present` | whether that image has the range (zeros included) |
//! | `zero` | whether it is known to read as zeros |
//! | `data` | whether data are stored for it |
//! | `compressed` | whether they are compressed |
//! | `offset` | where they are in that image's file, or its external data file; absent where there are none, and
//! where they are encrypted |

use crate::{args, open};
use anyhow::{Context as _, Result};
use block::{RangeKind, Storage, size};
use disk::{
    blocking::{ChainExtent, CutOff, Driver},
    chain::{Chain, ChainOptions, Layer},
};
use image::{ExtentKind, FileId, Format};
use serde::Serialize;
use std::io::{self, BufWriter, Write};
use std::ops::Range;

/// A run of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Its first byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Which image of the chain answers; 0 is the active one.
    pub depth: usize,
    /// Whether that image has it.
    pub present: bool,
    /// Whether it reads as zeros.
    pub zero: bool,
    /// Whether data are stored for it.
    pub data: bool,
    /// Whether they are compressed.
    pub compressed: bool,
    /// Where they are in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Which of the image's files they are in.
    #[serde(skip)]
    pub file: FileId,
}

/// What holes in a file say of the disk whose bytes are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// The disk has zeros, which take no space.
    Zeros,
    /// The disk has zeros, which count as data: the image has given them a place.
    ZeroData,
    /// Nothing: they are not looked for.
    Unseen,
}

impl Holes {
    /// What they say of the images of `layer`, where it is as a user would have it.
    pub fn of(layer: &Layer, file: FileId) -> Self {
        match layer.holes_are_zeros(file) {
            true => Holes::Zeros,
            false => Holes::Unseen,
        }
    }
}

impl Entry {
    /// Whether `next`, which follows, is the same run going on.
    fn joins(&self, next: &Entry) -> bool {
        let like = Entry {
            start: next.start,
            length: next.length,
            offset: next.offset,
            ..*self
        };
        let offset = self.offset.map(|at| at.saturating_add(self.length));
        like == *next && offset == next.offset
    }
}

/// Shows what an image's ranges are made of.
pub fn run(args: &args::Map) -> Result<()> {
    let reading = &args.reading;
    let chain = open::named(
        &reading.file,
        reading.image_opts,
        &reading.keys.objects,
        ChainOptions {
            format: reading.format,
            read_only: true,
            force_share: reading.force_share,
            allow_backing: reading.allow_backing.clone(),
            data_file: reading.data_file.clone(),
            snapshot: reading.snapshot.clone(),
            passphrases: reading.keys.read()?,
            allow_locked: true,
            ..ChainOptions::default()
        },
    )?;
    let end = args.max_length.unwrap_or(u64::MAX);
    let range = args.start_offset..args.start_offset.saturating_add(end);
    // A map may have millions of lines: none of them is kept.
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match reading.json {
        true => json(&chain, range, &mut out),
        false => table(&chain, range, &mut out),
    };
    finish(written, out)
}

/// Prints what is left of a map, if there is somebody who reads it.
pub fn finish(written: Result<()>, mut out: BufWriter<impl Write>) -> Result<()> {
    match written.and_then(|()| Ok(out.flush()?)) {
        // Who reads has seen enough (`diskplane map … | head`).
        Err(error) if is_broken_pipe(&error) => {
            // What is left in the buffer has no reader either.
            let _ = out.into_parts();
            Ok(())
        }
        done => done,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn json(chain: &Chain, range: Range<u64>, out: &mut impl Write) -> Result<()> {
    let mut lead = "[";
    let walked = walk(chain, range, Holes::of, |entry| {
        write!(out, "{lead}{}", serde_json::to_string(&entry)?)?;
        lead = ",\n";
        Ok(())
    });
    // What is printed is JSON also where a part of the disk cannot be known.
    let ended = writeln!(out, "{}", if lead == "[" { "[]" } else { "]" });
    walked?;
    Ok(ended?)
}

fn table(chain: &Chain, range: Range<u64>, out: &mut impl Write) -> Result<()> {
    let mut line = |start: &str, length: &str, what: &str, offset: &str, file: &str| {
        let line = format!("{start:>18}  {length:>9}  {what:<10}  {offset:>18}  {file}");
        Ok(writeln!(out, "{}", line.trim_end())?)
    };
    line("start", "length", "what", "file offset", "file")?;
    walk(chain, range, Holes::of, |entry| {
        let offset = entry.offset.filter(|_| entry.data);
        let layer = chain.layers.get(entry.depth).filter(|_| entry.present);
        let file = layer.map(|layer| match entry.file {
            FileId::IMAGE => layer.path.display().to_string(),
            other => (layer.files.get(usize::from(other.0)))
                .map_or_else(String::new, |f| f.path().display().to_string()),
        });
        line(
            &format!("{:#x}", entry.start),
            &size::human(entry.length),
            what(&entry),
            &offset.map_or_else(String::new, |at| format!("{at:#x}")),
            &file.unwrap_or_default(),
        )
    })
}

fn what(entry: &Entry) -> &'static str {
    match entry {
        Entry {
            compressed: true, ..
        } => "compressed",
        Entry { data: true, .. } => "data",
        Entry { present: true, .. } => "zero",
        _ => "nothing",
    }
}

/// Hands the runs of the disk that are in `range` to `out`, in order, each as long as it goes. Where that cannot be known the
/// run before is not handed out, as in qemu-img: how long it goes is not known either. `holes` says what those in the files of
/// an image say.
pub fn walk(
    chain: &Chain,
    range: Range<u64>,
    holes: impl Fn(&Layer, FileId) -> Holes,
    mut out: impl FnMut(Entry) -> Result<()>,
) -> Result<()> {
    let mut driver = chain.driver()?;
    let (end, mut at) = (driver.size().min(range.end), range.start);
    let mut run: Option<Entry> = None;
    while at < end {
        let next = one(chain, &mut driver, at, end - at, &holes)
            .with_context(|| format!("what byte {at:#x} of the disk is made of"))?;
        at += next.length;
        run = Some(match run {
            Some(mut before) if before.joins(&next) => {
                before.length += next.length;
                before
            }
            Some(before) => {
                out(before)?;
                next
            }
            None => next,
        });
    }
    run.map_or(Ok(()), out)
}

fn one(
    chain: &Chain,
    driver: &mut Driver,
    start: u64,
    len: u64,
    holes: &impl Fn(&Layer, FileId) -> Holes,
) -> Result<Entry> {
    let ChainExtent { len, depth, kind } = driver.extent_at(start, len)?;
    let mut entry = Entry {
        start,
        length: len,
        depth,
        present: true,
        zero: false,
        data: true,
        compressed: false,
        offset: None,
        file: FileId::IMAGE,
    };
    match kind {
        ExtentKind::Data {
            file: file_id,
            offset,
        } => {
            let layer = chain.layers.get(depth);
            // Where ciphertext is says nothing of what the guest reads.
            let plain = layer.is_some_and(|l| l.image.encryption().is_none());
            entry.offset = plain.then_some(offset.0);
            entry.file = file_id;
            let say = layer.map_or(Holes::Unseen, |l| holes(l, file_id));
            let tells = layer.filter(|_| say != Holes::Unseen);
            // Only there holes say something about the disk.
            if let Some(file) = tells.and_then(|l| l.files.get(usize::from(file_id.0))) {
                match file.range_at(offset.0)? {
                    Some(range) => {
                        entry.length = len.min(range.len);
                        entry.zero = range.kind.is_zero();
                        entry.data = range.kind.is_allocated() || say == Holes::ZeroData;
                        if range.kind == RangeKind::Absent {
                            (entry.present, entry.offset) = (false, None);
                        }
                    }
                    // Behind the end of a raw disk's file are zeros; of another's something is missing.
                    None if tells.is_some_and(|l| l.format == Format::Raw)
                        || chain.cut_off == CutOff::Zeros =>
                    {
                        (entry.data, entry.zero) = (say == Holes::ZeroData, true);
                    }
                    None => {}
                }
            }
        }
        ExtentKind::Compressed(_) => entry.compressed = true,
        // Nothing that anybody could know.
        ExtentKind::Untouched => (entry.present, entry.data) = (false, false),
        ExtentKind::Zero { host } => {
            (entry.zero, entry.data) = (true, false);
            entry.offset = host.map(|(_, offset)| offset.0);
        }
        ExtentKind::Unallocated => {
            (entry.present, entry.zero, entry.data) = (false, true, false);
        }
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_only_where_the_file_goes_on() {
        let a = Entry {
            start: 0,
            length: 512,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: Some(4096),
            file: FileId::IMAGE,
        };
        let next = |offset, depth| Entry {
            start: 512,
            offset,
            depth,
            ..a
        };
        assert!(a.joins(&next(Some(4608), 0)));
        assert!(!a.joins(&next(Some(4608), 1)));
        assert!(!a.joins(&next(Some(5120), 0)));
        assert!(!a.joins(&next(None, 0)));
    }
}
