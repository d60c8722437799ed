//! What was copied, for people and as JSON.
//!
//! With `--json` an object; bytes are the disk's:
//!
//! | field | |
//! |---|---|
//! | `filename`, `format` | of the target |
//! | `virtual-size` | bytes of the disk |
//! | `written`, `zero`, `same` | bytes written as data, bytes that are zeros, bytes that BASE has |
//! | `offloaded`, `resumed` | of `written`: bytes that the host copied (`-C`), that were there already (`--resume`) |
//! | `compressed-clusters`, `compressed-bytes` | how many clusters were compressed, and what they take in the file |
//! | `unreadable-bytes`, `unreadable` | with `--salvage`: how many, and array of objects with `offset`, `length`, `error` of the first 100 places |
//! | `unmapped` | with `--salvage`: the same of what it could not be found out of what it is made of; it was read instead |
//! | `bitmaps`, `bitmaps-left-out` | with `--bitmaps`: arrays of names, copied and inconsistent |
//! | `file-size`, `actual-size` | bytes of the target's file, and bytes that it takes on the host |

use super::Copied;
use crate::args::Convert as Arguments;
use crate::open;
use anyhow::Result;
use block::{plain, size};
use serde::Serialize;
use std::fs;
use std::os::unix::fs::MetadataExt;
use tool::source::Unreadable;

/// Places of unreadable bytes that people get to see; with `--json` there are more.
const SHOWN_MAX: usize = 20;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    filename: String,
    format: &'a str,
    virtual_size: u64,
    written: u64,
    zero: u64,
    same: u64,
    offloaded: u64,
    resumed: u64,
    compressed_clusters: u64,
    compressed_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<Vec<Hole<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unmapped: Option<Vec<Hole<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps_left_out: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Hole<'a> {
    offset: u64,
    length: u64,
    error: &'a str,
}

impl<'a> Hole<'a> {
    fn of(found: &'a Unreadable) -> Self {
        Self {
            offset: found.at,
            length: found.len,
            error: &found.error,
        }
    }
}

/// Says what was copied.
pub(super) fn print<'a>(args: &Arguments, copied: &'a Copied) -> Result<()> {
    let Copied { format, report, .. } = copied;
    let damage = &report.damage;
    let (names, target) = args.files()?;
    let metadata = match open::at_server(target) {
        Some(_) => None,
        None => Some(fs::metadata(target)?),
    };
    let actual = |there: &fs::Metadata| there.blocks().saturating_mul(512);
    let actual_size = metadata.as_ref().map(actual);
    let file_size = metadata.map(|there| there.len());
    if args.moving.json {
        let places =
            |places: &'a [Unreadable]| args.salvage.then(|| places.iter().map(Hole::of).collect());
        let json = Json {
            filename: target.display().to_string(),
            format: format.name(),
            virtual_size: report.size,
            written: report.written,
            zero: report.zero,
            same: report.same,
            offloaded: report.offloaded,
            resumed: report.resumed,
            compressed_clusters: report.compressed_clusters,
            compressed_bytes: report.compressed_bytes,
            unreadable_bytes: args.salvage.then_some(damage.unreadable_bytes),
            unreadable: places(&damage.unreadable),
            unmapped: places(&damage.unmapped),
            bitmaps: args.bitmaps.then_some(&copied.bitmaps),
            bitmaps_left_out: args.bitmaps.then_some(&copied.bitmaps_left_out),
            file_size,
            actual_size,
        };
        return crate::print(&crate::json(&json)?);
    }
    for found in damage.unmapped.iter().take(SHOWN_MAX) {
        eprintln!(
            "diskplane: note: it could not be found out what {} bytes at {:#x} are made of, they were read instead: {}",
            found.len,
            found.at,
            plain(&found.error)
        );
    }
    for found in damage.unreadable.iter().take(SHOWN_MAX) {
        eprintln!(
            "diskplane: note: {} bytes at {:#x} are zeros now: {}",
            found.len,
            found.at,
            plain(&found.error)
        );
    }
    let mut line = format!(
        "converted {} to {}: {format}, {}; {} of data",
        names
            .iter()
            .map(|name| name.display().to_string())
            .collect::<Vec<_>>()
            .join(" and "),
        target.display(),
        size::human(report.size),
        size::human(report.written)
    );
    let mut add = |bytes: u64, what: &str| {
        if bytes > 0 {
            line.push_str(&format!(", {} {what}", size::human(bytes)));
        }
    };
    let base = args.backing.as_deref().unwrap_or_default();
    add(report.same, &format!("as in {base}"));
    add(report.offloaded, "copied by the host");
    add(report.resumed, "there already");
    add(damage.unreadable_bytes, "unreadable");
    if report.compressed_clusters > 0 {
        let packed = size::human(report.compressed_bytes);
        line.push_str(&format!(
            ", {} clusters compressed to {packed}",
            report.compressed_clusters
        ));
    }
    match copied.bitmaps.len() {
        0 => {}
        1 => line.push_str(", 1 bitmap"),
        count => line.push_str(&format!(", {count} bitmaps")),
    }
    match args.moving.quiet {
        true => Ok(()),
        false => crate::print(&(line + "\n")),
    }
}
