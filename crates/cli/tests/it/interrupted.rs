//! Commands that a signal ends in the middle: what was there is as it was, nothing half is left under a name that was asked
//! for, and the same line succeeds afterwards.
//!
//! `strace` sends the signal with a call that changes a file: the first one, the second, and so on, until the command ends
//! before there is another.

use crate::common::{binary, qemu_img, run};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use testkit::TempDir;

/// Calls that change a file.
const CALLS: &str = "pwrite64,pwritev,fallocate,ftruncate,fdatasync,copy_file_range,renameat2";
/// Calls of a thread that a signal comes with: so the beginning is looked at closely, and the rest here and there.
const PLACES: [u32; 9] = [1, 2, 3, 4, 6, 9, 14, 22, 40];

/// What is done, and what may not change.
struct Case {
    line: &'static str,
    /// Lines before, of QEMU's programs.
    before: &'static [&'static str],
    /// An image that reads as before where the command did not end, with its format.
    image: Option<(&'static str, &'static str)>,
}

const OVERLAY: &[&str] = &[
    "qemu-img create -q -f qcow2 base 4M",
    "qemu-io -f qcow2 -c write_-q_-P_5_1M_1M base",
    "qemu-img create -q -f qcow2 other 4M",
    "qemu-img create -q -f qcow2 -b base -F qcow2 top",
    "qemu-io -f qcow2 -c write_-q_-P_1_0_1500k -c write_-q_-z_3M_64k top",
];

const CASES: &[Case] = &[
    Case {
        line: "convert -O qcow2 top new",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "convert -c -O qcow2 top new",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "convert -O vhdx top new",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "commit top",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "rebase -b other -F qcow2 top",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "resize --preallocation full top 8M",
        before: OVERLAY,
        image: None,
    },
    Case {
        line: "amend -o compat=0.10 top",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "amend -o refcount_bits=64 top",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "snapshot -c one top",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "bitmap --add top one",
        before: OVERLAY,
        image: Some(("top", "qcow2")),
    },
    Case {
        line: "create -q -f qcow2 -o preallocation=full new 2M",
        before: &[],
        image: None,
    },
];

/// Runs a line of words; in those of qemu-io `_` stands for a space.
fn line(dir: &Path, line: &str) -> Output {
    let (program, words) = line.split_once(' ').unwrap();
    let words = words.split(' ').map(|word| match program {
        "qemu-io" => word.replace('_', " "),
        _ => word.to_owned(),
    });
    let words: Vec<String> = words.collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    run(program, dir, &words)
}

fn names(dir: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "calls").collect()
}

/// Runs diskplane, to which `signal` is sent with the call `when`; `None` where that cannot be had.
fn interrupted(dir: &Path, words: &str, signal: &str, when: u32) -> Option<Output> {
    let output = Command::new("strace")
        .args(["-f", "-qq", "-o", "calls", "-e", &format!("trace={CALLS}")])
        .args(["-e", &format!("inject={CALLS}:signal={signal}:when={when}")])
        .arg(binary())
        .args(words.split(' '))
        .current_dir(dir)
        .env_remove("NOTIFY_SOCKET")
        .output();
    match output {
        Ok(output) if !output.stderr.starts_with(b"strace: ") => Some(output),
        failed => {
            eprintln!("skipped: strace: {failed:?}");
            None
        }
    }
}

#[test]
fn a_command_that_a_signal_ends_leaves_what_was_there() {
    for case in CASES {
        let start = TempDir::new();
        for text in case.before {
            let output = line(start.root(), text);
            assert!(output.status.success(), "{text}: {output:?}");
        }
        let before: Option<PathBuf> = case.image.map(|(name, format)| {
            let raw = start.path("before.raw");
            let args = ["convert", "-f", format, "-O", "raw", name, "before.raw"];
            qemu_img(start.root(), &args);
            raw
        });
        for (signal, number) in [("SIGKILL", 9), ("SIGTERM", 15), ("SIGINT", 2)] {
            let mut ended = 0;
            for when in PLACES {
                let what = format!("{}: {signal} with call {when}", case.line);
                let dir = TempDir::new();
                let dir = dir.root();
                for name in names(start.root()) {
                    fs::copy(start.path(&name), dir.join(&name)).unwrap();
                }
                let there = names(dir);
                let Some(output) = interrupted(dir, case.line, signal, when) else {
                    return;
                };
                if output.status.success() {
                    break;
                }
                ended += 1;
                // strace ends as what it watches ended.
                let by = output.status.signal();
                assert_eq!(by, Some(number), "{what}: {output:?}");
                let mut left = names(dir);
                if signal == "SIGKILL" {
                    // Nobody could take it away; its name says what it is.
                    left.retain(|name| !(name.starts_with('.') && name.ends_with(".part")));
                }
                assert_eq!(left, there, "{what}");
                if let (Some((name, format)), Some(before)) = (case.image, &before) {
                    let check = line(dir, &format!("qemu-img check -q -f {format} {name}"));
                    let code = check.status.code();
                    assert!(matches!(code, Some(0 | 3)), "{what}: {check:?}");
                    let before = before.to_str().unwrap();
                    let args = ["compare", "-q", "-f", format, "-F", "raw", name, before];
                    qemu_img(dir, &args);
                }
                let words: Vec<&str> = case.line.split(' ').collect();
                let again = run(binary(), dir, &words);
                assert!(again.status.success(), "{what}: again: {again:?}");
            }
            assert!(ended > 0 || signal != "SIGKILL", "{}: never", case.line);
        }
    }
}
