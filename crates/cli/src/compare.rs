//! `diskplane compare`.
//!
//! What it says, and its exit codes, are those of `qemu-img compare`. With `--json` an object:
//!
//! | field | |
//! |---|---|
//! | `filename1`, `filename2` | as given |
//! | `virtual-size1`, `virtual-size2` | bytes of the disks |
//! | `identical` | whether they are the same |
//! | `difference` | `size` or `status` (with `--strict` only) or `content`; absent where they are the same |
//! | `offset` | byte of the disk where it begins; absent where they are the same, and for `size` |
//! | `read` | bytes that had to be read |

use crate::convert::{CACHE_BYTES, progress_bar, show};
use crate::{args, open, print, signals};
use anyhow::{Error, Result};
use disk::chain::ChainOptions;
use image::Format;
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;
use tool::compare::{Difference, Failure, Outcome, compare};
use tool::source::Source;
use tool::work::Work;

/// They differ.
const DIFFERENT: u8 = 1;
/// An image cannot be opened.
const OPENING: u8 = 2;
/// What is allocated cannot be found out.
const MAPPING: u8 = 3;
/// Data cannot be read.
const READING: u8 = 4;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    filename1: String,
    filename2: String,
    virtual_size1: u64,
    virtual_size2: u64,
    identical: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    read: u64,
}

/// An error, and the exit code that says where it came up.
type Failed = (u8, Error);

/// Compares two images.
pub fn run(args: &args::Compare) -> Result<ExitCode> {
    match outcome(args) {
        Ok(outcome) => {
            tell(args, &outcome)?;
            Ok(match outcome.difference {
                Some(_) => ExitCode::from(DIFFERENT),
                None => ExitCode::SUCCESS,
            })
        }
        Err((_, error)) if crate::was_stopped(&error) => Err(error),
        Err((code, error)) => {
            crate::complain(&error);
            Ok(ExitCode::from(code))
        }
    }
}

fn outcome(args: &args::Compare) -> Result<Outcome, Failed> {
    let opening = |error: Error| (OPENING, error);
    let stop = signals::stop_on_signals().map_err(opening)?;
    let keys = args.keys.read().map_err(opening)?;
    // The images have chains of their own, and each its share of the passphrases.
    let chain = |name: &Path, format: Option<Format>| {
        let options = ChainOptions {
            format,
            read_only: true,
            cache: args.source_cache,
            force_share: args.force_share,
            allow_backing: args.allow_backing.clone(),
            cache_bytes: Some(CACHE_BYTES),
            passphrases: keys.clone(),
            ..ChainOptions::default()
        };
        open::named(name, args.image_opts, &args.keys.objects, options).map_err(opening)
    };
    let first = chain(&args.file1, args.format)?;
    let second = chain(&args.file2, args.second_format)?;
    let source = |chain| Source::new(chain).map_err(|error| opening(error.into()));
    let (a, b) = (source(&first)?, source(&second)?);
    let bar = progress_bar(a.size().max(b.size()), args.progress);
    let mut progress = |done| show(&bar, done);
    let mut work = Work::new(stop, &mut progress);
    let found = compare(a, b, args.strict, &mut work);
    bar.finish_and_clear();
    found.map_err(|failure| match failure {
        Failure::Map { error, .. } => (MAPPING, error.into()),
        Failure::Read { error, .. } | Failure::Stopped(error) => (READING, error.into()),
    })
}

fn tell(args: &args::Compare, outcome: &Outcome) -> Result<()> {
    let [first, second] = outcome.sizes;
    if args.json {
        let (what, offset) = match outcome.difference {
            None => (None, None),
            Some(Difference::Size) => (Some("size"), None),
            Some(Difference::Status { at }) => (Some("status"), Some(at)),
            Some(Difference::Content { at }) => (Some("content"), Some(at)),
        };
        return print(&crate::json(&Json {
            filename1: args.file1.display().to_string(),
            filename2: args.file2.display().to_string(),
            virtual_size1: first,
            virtual_size2: second,
            identical: what.is_none(),
            difference: what,
            offset,
            read: outcome.read,
        })?);
    }
    if args.quiet {
        return Ok(());
    }
    print(&text(outcome, args.strict))
}

/// What people are told of it, as qemu-img says it.
pub fn text(outcome: &Outcome, strict: bool) -> String {
    let [first, second] = outcome.sizes;
    let mut text = String::new();
    let common = first.min(second);
    let before = |at: u64| at < common;
    let at = outcome.difference.and_then(Difference::sector);
    if first != second && !strict && !at.is_some_and(before) {
        text.push_str("Warning: Image size mismatch!\n");
    }
    let at = at.unwrap_or_default();
    text.push_str(&match outcome.difference {
        None => "Images are identical.\n".to_owned(),
        Some(Difference::Size) => "Strict mode: Image size mismatch!\n".to_owned(),
        Some(Difference::Status { .. }) => {
            format!("Strict mode: Offset {at} block status mismatch!\n")
        }
        Some(Difference::Content { .. }) => format!("Content mismatch at offset {at}!\n"),
    });
    text
}
