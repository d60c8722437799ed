//! Images as QEMU makes them, damage to their metadata, and QEMU's opinion of the result.

pub mod damage;
pub mod kinds;
pub mod reader;

pub use damage::{damage, damage_of};
pub use kinds::{KINDS, Kind, make};

use block::Storage;
use io::{File, OpenOptions};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tool::check::Report;

pub use testkit::Rng;

/// What `qemu-img check` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub status: i32,
    pub corruptions: u64,
    pub leaks: u64,
    pub check_errors: u64,
    pub corruptions_fixed: u64,
    pub leaks_fixed: u64,
    /// Image end, total, allocated, fragmented, compressed clusters.
    pub facts: [u64; 5],
    pub messages: String,
}

/// `qemu-img check`, with `-r WHAT` unless that is empty. `None` when it crashed or did not end.
pub fn qemu_check(image: &Path, repair: &str) -> Option<Verdict> {
    let plain = KINDS.first().expect("there are kinds");
    qemu_check_of(plain, image, repair)
}

/// The same for an image of this kind.
pub fn qemu_check_of(kind: &Kind, image: &Path, repair: &str) -> Option<Verdict> {
    let mut command = Command::new("timeout");
    command.args(["20", "qemu-img", "check", "--output=json"]);
    if !repair.is_empty() {
        command.args(["-r", repair]);
    }
    let named = kinds::named(kind, image);
    let output = command.args(named).output().expect("qemu-img runs");
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    let status = output.status.code().filter(|code| *code < 100)?;
    let json: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let number = |name: &str| json.get(name).and_then(Value::as_u64).unwrap_or(0);
    Some(Verdict {
        status,
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        corruptions_fixed: number("corruptions-fixed"),
        leaks_fixed: number("leaks-fixed"),
        facts: [
            number("image-end-offset"),
            number("total-clusters"),
            number("allocated-clusters"),
            number("fragmented-clusters"),
            number("compressed-clusters"),
        ],
        messages,
    })
}

/// Our report in the same form.
pub fn verdict(report: &Report) -> Verdict {
    Verdict {
        status: match report {
            Report {
                check_errors: 1.., ..
            } => 1,
            Report {
                corruptions: 1.., ..
            } => 2,
            Report { leaks: 1.., .. } => 3,
            _ => 0,
        },
        corruptions: report.corruptions,
        leaks: report.leaks,
        check_errors: report.check_errors,
        corruptions_fixed: report.corruptions_fixed,
        leaks_fixed: report.leaks_fixed,
        facts: [
            report.image_end_offset,
            report.total_clusters,
            report.allocated_clusters,
            report.fragmented_clusters,
            report.compressed_clusters,
        ],
        messages: String::new(),
    }
}

/// An image file, to be written to.
pub fn open(path: &Path) -> Arc<File> {
    File::open(path, &OpenOptions::default()).expect("opens")
}

pub fn check_with(storage: &dyn Storage, repair: tool::check::Repair) -> block::Result<Report> {
    let options = tool::check::CheckOptions {
        repair,
        ..Default::default()
    };
    tool::check::check(storage, &options)
}
