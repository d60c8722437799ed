//! `diskplane commit` and `rebase` beside those of qemu-img, on chains of all kinds; and what is left of a run that was
//! cut off.

use crate::common;

use common::{binary, failure, good, json, qemu_img, refused, run};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};
use testkit::{TempDir, qemu};

/// An image, how it is made, and what is written to it.
type Step<'a> = (&'a str, &'a [&'a str], &'a [&'a str]);

/// Makes the images of a chain.
fn make(dir: &Path, steps: &[Step<'_>]) {
    for (name, create, writes) in steps {
        let args = [&["create", "-q"][..], create].concat();
        let at = args.len() - 1;
        // The size, or nothing, comes behind the name.
        let (options, size) = match args[at].ends_with(['M', 'k']) {
            true => (&args[..at], &args[at..]),
            false => (&args[..], &args[..0]),
        };
        qemu_img(dir, &[options, &[name], size].concat());
        let format = if create.contains(&"raw") && create[1] == "raw" {
            "raw"
        } else {
            "qcow2"
        };
        if !writes.is_empty() {
            qemu::io(format, dir.join(name), writes);
        }
    }
}

const RAW_BASE: Step<'_> = (
    "base",
    &["-f", "raw", "2M"],
    &["write -P 1 0 1M", "write -P 2 1536k 64k"],
);
const SHORT_BASE: Step<'_> = (
    "base",
    &["-f", "qcow2", "-o", "cluster_size=16k", "1200k"],
    &["write -P 1 0 600k", "write -P 2 1100k 100k"],
);

/// Bytes of the disk of an image, as QEMU reads them.
fn content(dir: &Path, image: &str) -> Vec<u8> {
    let _ = fs::remove_file(dir.join("content"));
    qemu_img(dir, &["convert", "-O", "raw", image, "content"]);
    fs::read(dir.join("content")).unwrap()
}

/// Overlays of a base of that format, each with something else about it.
fn overlays(format: &str) -> Vec<(&'static str, Vec<&'static str>)> {
    match format {
        "raw" => vec![
            ("plain", vec![]),
            ("old", vec!["-o", "compat=0.10"]),
            ("lazy", vec!["-o", "lazy_refcounts=on"]),
        ],
        _ => vec![
            ("small", vec!["-o", "cluster_size=4k"]),
            ("parts", vec!["-o", "extended_l2=on"]),
        ],
    }
}

const WRITES: [&str; 4] = [
    "write -P 7 100k 30k",
    "write -z 512k 256k",
    "write -P 8 1150k 1k",
    "write -P 9 1900k 64k",
];

#[test]
fn a_commit_does_what_qemu_imgs_does() {
    for (base, format) in [(RAW_BASE, "raw"), (SHORT_BASE, "qcow2")] {
        for (name, options) in overlays(format) {
            let dir = TempDir::new();
            let dir = dir.root();
            let create = [
                &["-f", "qcow2", "-b", "base", "-F", format][..],
                &options,
                &["2M"],
            ]
            .concat();
            make(dir, &[base, ("top", &create, &WRITES)]);
            // Bitmaps stay where they are, and hold the file's end; version 2 has none.
            if name != "old" {
                qemu_img(dir, &["bitmap", "--add", "top", "marks"]);
            }
            let before = content(dir, "top");
            let size = || {
                let found = fs::metadata(dir.join("top")).unwrap();
                if name == "old" {
                    found.len()
                } else {
                    found.blocks()
                }
            };
            let size_before = size();
            let line = good(dir, &["commit", "top"]);
            assert!(line.starts_with("committed top into "), "{line}");
            assert_eq!(
                line.contains("it grew from 1.17 MiB to 2 MiB"),
                format == "qcow2",
                "{line}"
            );
            assert!(content(dir, "top") == before, "{name} on {format}");
            assert!(content(dir, "base") == before, "{name} on {format}");
            qemu::check("qcow2", dir.join("top"));
            if format == "qcow2" {
                qemu::check("qcow2", dir.join("base"));
            }
            let map = json(&qemu_img(dir, &["map", "--output=json", "top"]));
            assert!(
                map.as_array().unwrap().iter().all(|run| run["depth"] != 0),
                "{map}"
            );
            assert!(size() < size_before, "{name} on {format}");
            if name != "old" {
                let listed = json(&good(dir, &["bitmap", "--json", "top"]));
                assert_eq!(listed["bitmaps"][0]["name"], "marks");
            }
            // What is written to it now goes where it belongs.
            qemu::io(
                "qcow2",
                dir.join("top"),
                &["write -P 3 90k 30k", "read -P 1 0 90k"],
            );
            qemu::check("qcow2", dir.join("top"));
        }
    }
}

#[test]
fn a_commit_may_go_deeper_and_leave_the_overlay() {
    let dir = TempDir::new();
    let dir = dir.root();
    let overlay = |on: &'static str| {
        [
            "-f",
            "qcow2",
            "-b",
            on,
            "-F",
            if on == "base" { "raw" } else { "qcow2" },
        ]
    };
    // The one between is short: the overlay reads as zeros where it ends, whatever the base has there.
    let (mid, top) = (overlay("base"), overlay("mid"));
    make(
        dir,
        &[
            RAW_BASE,
            (
                "mid",
                &[&mid[..], &["1M"]].concat(),
                &["write -P 5 64k 64k"],
            ),
            (
                "top",
                &[&top[..], &["2M"]].concat(),
                &["write -P 6 256k 4k"],
            ),
        ],
    );
    let before = content(dir, "top");
    let bytes = fs::read(dir.join("top")).unwrap();
    let report = json(&good(dir, &["commit", "--json", "-b", "base", "top"]));
    assert_eq!(report["emptied"], false);
    assert!(content(dir, "base") == before);
    assert!(content(dir, "top") == before);
    assert!(fs::read(dir.join("top")).unwrap() == bytes);
    qemu::io("qcow2", dir.join("top"), &["write -P 9 0 64k"]);
    let kept = fs::read(dir.join("top")).unwrap();
    assert_eq!(good(dir, &["commit", "-q", "-d", "top"]), "");
    assert!(fs::read(dir.join("top")).unwrap() == kept);
    assert_eq!(content(dir, "mid")[0], 9);
    let line = refused(dir, &["commit", "-b", "other", "top"]);
    assert!(
        line.contains("-b other: is not in the chain of top"),
        "{line}"
    );
    good(dir, &["create", "alone.qcow2", "1M"]);
    let line = refused(dir, &["commit", "alone.qcow2"]);
    assert!(
        line.contains("has no backing file to commit into"),
        "{line}"
    );
}

#[test]
fn a_rebase_keeps_what_the_guest_reads() {
    let other: Step<'_> = (
        "other",
        &["-f", "qcow2", "1500k"],
        &[
            "write -P 1 0 512k",
            "write -P 4 700k 500k",
            "write -P 5 1480k 20k",
        ],
    );
    for (base, format) in [(RAW_BASE, "raw"), (SHORT_BASE, "qcow2")] {
        for (name, options) in overlays(format) {
            let dir = TempDir::new();
            let dir = dir.root();
            let create = [
                &["-f", "qcow2", "-b", "base", "-F", format][..],
                &options,
                &["2M"],
            ]
            .concat();
            make(dir, &[base, other, ("ours", &create, &WRITES)]);
            fs::copy(dir.join("ours"), dir.join("theirs")).unwrap();
            let before = content(dir, "ours");
            let report = json(&good(
                dir,
                &["rebase", "--json", "-b", "other", "-F", "qcow2", "ours"],
            ));
            assert!(report["copied"].as_u64() > Some(0), "{report}");
            qemu_img(dir, &["rebase", "-b", "other", "-F", "qcow2", "theirs"]);
            assert!(content(dir, "ours") == before, "{name} on {format}");
            assert!(content(dir, "theirs") == before);
            qemu::check("qcow2", dir.join("ours"));
            let info = |image: &str| json(&qemu_img(dir, &["info", "--output=json", image]));
            assert_eq!(info("ours")["backing-filename"], "other");
            assert_eq!(info("ours")["backing-filename-format"], "qcow2");
            // No more than QEMU copies.
            let [ours, theirs] = ["ours", "theirs"].map(|image| {
                let map = json(&qemu_img(dir, &["map", "--output=json", image]));
                let own = map
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|run| run["depth"] == 0 && run["data"] == true);
                own.map(|run| run["length"].as_u64().unwrap()).sum::<u64>()
            });
            assert!(ours <= theirs, "{name} on {format}: {ours}, {theirs}");
            // And onto nothing, compressed where that can be.
            let line = good(dir, &["rebase", "-c", "-b", "", "ours"]);
            assert!(line.contains("compressed to"), "{line}");
            assert!(line.starts_with("rebased ours onto nothing: "), "{line}");
            assert!(content(dir, "ours") == before, "{name} on {format}");
            qemu::check("qcow2", dir.join("ours"));
            assert!(info("ours").get("backing-filename").is_none());
        }
    }
}

#[test]
fn only_the_name_changes_in_unsafe_mode() {
    let dir = TempDir::new();
    let dir = dir.root();
    make(
        dir,
        &[
            RAW_BASE,
            (
                "top",
                &["-f", "qcow2", "-b", "base", "-F", "raw"],
                &["write -P 7 0 4k"],
            ),
        ],
    );
    let before = content(dir, "top");
    fs::rename(dir.join("base"), dir.join("moved")).unwrap();
    let mut long = "x".repeat(900);
    for name in ["moved", &long, "./moved"] {
        good(dir, &["rebase", "-u", "-b", name, "-F", "raw", "top"]);
        let args = ["info", "--output=json", "top"];
        let info = json(&qemu_img(dir, &args));
        assert_eq!(info["backing-filename"], name);
        good(dir, &["check", "top"]);
    }
    assert!(content(dir, "top") == before);
    // What lies on the overlay cannot be below it, and what differs is not taken for the same.
    good(dir, &["create", "-b", "top", "-F", "qcow2", "upper.qcow2"]);
    let line = refused(dir, &["rebase", "-b", "upper.qcow2", "-F", "qcow2", "top"]);
    assert!(line.contains("the chain would be a loop"), "{line}");
    long.push_str(&long.clone());
    for (args, says) in [
        (&["-u", "-b", &long, "-F", "raw"][..], "it has 1 to 1023"),
        (&["-b", "moved"], "say its format with -F"),
        (&["-b", "ssh://x", "-F", "raw"], "protocol"),
        (&["-b", "absent", "-F", "raw"], "absent"),
        (&["-b", "", "-F", "raw"], "there is no format"),
    ] {
        let line = refused(dir, &[&["rebase"][..], args, &["top"]].concat());
        assert!(line.contains(says), "{line}");
    }
    let line = refused(
        dir,
        &[
            "rebase", "-f", "raw", "-u", "-b", "moved", "-F", "raw", "moved",
        ],
    );
    assert!(
        line.contains("a raw image cannot get another backing file"),
        "{line}"
    );
    assert!(content(dir, "top") == before);
}

/// Starts a command, waits until `begun`, and ends it by a signal.
#[track_caller]
fn cut_off(dir: &Path, args: &[&str], signal: i32, begun: impl Fn() -> bool) {
    let mut child = Command::new(binary())
        .args(args)
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !begun() {
        assert!(child.try_wait().unwrap().is_none(), "{args:?} has ended");
        if Instant::now() >= until {
            let _ = child.kill();
            panic!("{args:?} writes nothing");
        }
        thread::sleep(Duration::from_millis(5));
    }
    let pid = child.id().to_string();
    run("kill", Path::new("/"), &[&format!("-{signal}"), &pid]);
    assert_eq!(child.wait().unwrap().signal(), Some(signal));
}

#[test]
fn what_is_cut_off_leaves_a_chain_that_reads_as_before() {
    let base: Step<'_> = ("base", &["-f", "raw", "8M"], &["write -P 1 0 8M"]);
    let other: Step<'_> = ("other", &["-f", "raw", "8M"], &["write -P 2 0 8M"]);
    for signal in [15, 9] {
        let dir = TempDir::new();
        let dir = dir.root();
        let create = ["-f", "qcow2", "-b", "base", "-F", "raw"];
        make(dir, &[base, other, ("top", &create, &["write -P 7 1M 4M"])]);
        let before = content(dir, "top");
        let old = fs::read(dir.join("base")).unwrap();
        let changed = || fs::read(dir.join("base")).unwrap() != old;
        cut_off(dir, &["commit", "-r", "1k", "top"], signal, changed);
        assert!(content(dir, "top") == before);
        good(dir, &["check", "top"]);
        good(dir, &["commit", "top"]);
        assert!(content(dir, "top") == before && content(dir, "base") == before);
        let old = fs::read(dir.join("top")).unwrap();
        let grown = || fs::read(dir.join("top")).unwrap() != old;
        let rebase = ["rebase", "-r", "1k", "-b", "other", "-F", "raw", "top"];
        cut_off(dir, &rebase, signal, grown);
        assert!(content(dir, "top") == before);
        assert_eq!(
            json(&good(dir, &["info", "--json", "top"]))["backing-filename"],
            "base"
        );
        // A process that is killed leaves clusters that nobody uses, at worst.
        testkit::qemu::check_allowing_leaks("qcow2", dir.join("top"));
        good(dir, &["rebase", "-b", "other", "-F", "raw", "top"]);
        assert!(content(dir, "top") == before);
    }
}

#[test]
fn a_full_disk_leaves_a_chain_that_reads_as_before() {
    let base: Step<'_> = ("base", &["-f", "qcow2", "8M"], &["write -P 1 0 64k"]);
    let other: Step<'_> = ("other", &["-f", "raw", "8M"], &["write -P 2 0 8M"]);
    let dir = TempDir::new();
    let dir = dir.root();
    let create = ["-f", "qcow2", "-b", "base", "-F", "qcow2"];
    make(dir, &[base, other, ("top", &create, &["write -P 7 1M 4M"])]);
    let before = content(dir, "top");
    for (command, limit) in [("commit top", 4096), ("rebase -b other -F raw top", 8900)] {
        // No file may grow beyond so many sectors, and there is no signal for that.
        let script = format!(
            "trap '' XFSZ; ulimit -f {limit}; exec '{}' {command}",
            binary().display()
        );
        let line = failure(&[command], &run("sh", dir, &["-c", &script]), 1);
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(line.contains("File too large"), "{line}");
        assert!(content(dir, "top") == before, "{command}");
        qemu::check("qcow2", dir.join("base"));
        qemu::check("qcow2", dir.join("top"));
    }
    good(dir, &["commit", "top"]);
    assert!(content(dir, "base") == before);
}

#[test]
fn a_part_of_a_map_is_as_qemu_imgs() {
    let dir = TempDir::new();
    let dir = dir.root();
    let create = ["-f", "qcow2", "-b", "base", "-F", "raw"];
    make(dir, &[RAW_BASE, ("top", &create, &WRITES)]);
    for (start, len) in [
        ("0", "64k"),
        ("120k", "900k"),
        ("100", "1000"),
        ("1500k", "1G"),
    ] {
        let part = ["--start-offset", start, "--max-length", len, "top"];
        let ours = json(&good(dir, &[&["map", "--json"][..], &part].concat()));
        let theirs = json(&qemu_img(
            dir,
            &[&["map", "--output=json"][..], &part].concat(),
        ));
        assert_eq!(ours, theirs, "{start} {len}");
    }
    assert_eq!(
        good(dir, &["map", "--json", "-U", "--start-offset", "1T", "top"]),
        "[]\n"
    );
}

#[test]
fn nothing_is_said_where_that_is_asked_for() {
    let dir = TempDir::new();
    let dir = dir.root();
    for args in [
        &["create", "-q", "a.qcow2", "1M"][..],
        &["resize", "-q", "a.qcow2", "+1M"],
        &["amend", "-q", "-o", "lazy_refcounts=on", "a.qcow2"],
        &["snapshot", "-q", "-c", "s", "a.qcow2"],
        &["convert", "-q", "a.qcow2", "b.qcow2"],
        &["dd", "-q", "if=a.qcow2", "of=c.raw"],
        &["rebase", "-q", "-u", "-b", "c.raw", "-F", "raw", "b.qcow2"],
        &["commit", "-q", "b.qcow2"],
        &["compare", "-q", "a.qcow2", "b.qcow2"],
    ] {
        assert_eq!(good(dir, args), "", "{args:?}");
    }
}

#[test]
fn qed_overlays_are_committed_and_rebased_too() {
    let dir = TempDir::new();
    let dir = dir.root();
    let other: Step<'_> = ("other", &["-f", "raw", "1500k"], &["write -P 4 0 1400k"]);
    make(dir, &[RAW_BASE, other]);
    qemu_img(
        dir,
        &[
            "create", "-q", "-f", "qed", "-b", "base", "-F", "raw", "top",
        ],
    );
    qemu::io("qed", dir.join("top"), &WRITES);
    let before = content(dir, "top");
    for (name, format) in [
        ("other", "raw"),
        ("base", "raw"),
        ("./other", "raw"),
        ("", ""),
    ] {
        fs::copy(dir.join("top"), dir.join("kept")).unwrap();
        let format = if name.is_empty() {
            &[][..]
        } else {
            &["-F", format]
        };
        good(
            dir,
            &[&["rebase", "-b", name][..], format, &["top"]].concat(),
        );
        assert!(content(dir, "top") == before, "{name}");
        qemu::check("qed", dir.join("top"));
        let info = json(&qemu_img(dir, &["info", "--output=json", "top"]));
        let found = info.get("backing-filename").and_then(|name| name.as_str());
        assert_eq!(found.unwrap_or(""), name);
    }
    // The last step was onto nothing: the one before lies on a file.
    fs::copy(dir.join("kept"), dir.join("top")).unwrap();
    let line = good(dir, &["commit", "top"]);
    assert!(line.contains("it grew from 1.46 MiB to 2 MiB"), "{line}");
    assert!(content(dir, "top") == before && content(dir, "other") == before);
    qemu::check("qed", dir.join("top"));
    // Header, L1 table.
    assert_eq!(fs::metadata(dir.join("top")).unwrap().len(), 5 * 65536);
    qemu::io("qed", dir.join("top"), &["write -P 3 90k 30k"]);
    good(dir, &["rebase", "-u", "-b", "base", "-F", "raw", "top"]);
    assert_eq!(content(dir, "top")[100 << 10], 3);
    assert_eq!(content(dir, "top")[0], 1);
}
