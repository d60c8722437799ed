//! Images made to harm: each known class of them by name, made here byte by byte.
//!
//! Each is opened, mapped, read, written, checked and repaired: no panic, no endless loop, no change by reading, memory
//! below a bound, and an error that names the field. What only a process can do (names of other files, say) is tested
//! with the command, in crate `cli`.

mod abuse;
mod cut;
mod headers;
mod kinds;
mod luks;
mod others;
mod snapshots_and_bitmaps;
mod sweeps;
mod tables;

use abuse::abuse;
use std::sync::{Mutex, PoisonError};
use testkit::allocations::Counting;
use testkit::forge::{Forge, Shape};

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

/// Memory is counted for the whole process: one at a time.
static MEASURING: Mutex<()> = Mutex::new(());

/// Bytes of memory that using a small image may take, whatever it says. Most take one or two MiB; an edit has a
/// refcount table that is claimed, of 8 MiB at most, as bytes and twice as words.
const BYTES_MAX: u64 = 28 << 20;

/// A way to spoil an image: name, how, and what opening (or reading) and checking say. An empty text: it may be
/// accepted or not; `"ok"`: it must be accepted.
type Case = (&'static str, fn() -> Forge, &'static str, &'static str);

fn plain() -> Forge {
    Forge::new(Shape::default()).data(0, 1).data(700, 2)
}

/// Every image of a table, and what must be said of it.
fn judge(table: &[Case]) {
    let _one = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut wrong = Vec::new();
    for (name, make, open, check) in table {
        eprintln!("{name}");
        let bytes = make().bytes;
        let (outcome, peak) = ALLOCATOR.peak_bytes(|| abuse(&bytes));
        if peak > BYTES_MAX {
            wrong.push(format!("{name}: took {peak} bytes of memory"));
        }
        let opened = match &outcome.open {
            Ok(()) => "ok".into(),
            Err(error) => {
                if !error.to_string().contains("memory") {
                    wrong.push(format!("{name}: the error does not name the file: {error}"));
                }
                error.to_string()
            }
        };
        let checked = match &outcome.check {
            Ok(report) if report.findings.is_empty() => "ok".into(),
            Ok(report) => {
                let texts: Vec<String> = report.findings.iter().map(|f| f.text.clone()).collect();
                texts.join("; ")
            }
            Err(error) => error.to_string(),
        };
        for (what, said, expected) in [("open", opened, open), ("check", checked, check)] {
            let right = match *expected {
                "ok" => said == "ok",
                expected => said.contains(expected),
            };
            if !right {
                wrong.push(format!("{name}: {what} says '{said}', not '{expected}'"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_not_spoilt_is_sound() {
    judge(&[("plain", plain, "ok", "ok")]);
}
