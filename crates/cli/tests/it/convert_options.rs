//! The options of `diskplane convert`, beside `qemu-img convert` on the same images; and what is left of a run that
//! was cut off.

use crate::common;

use common::{binary, diskplane, failure, good, json, qemu_img, refused, run};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};
use testkit::{TempDir, qemu};

const MIB: usize = 1 << 20;

/// Bytes that are not zeros, each MiB others.
fn pattern(bytes: usize) -> Vec<u8> {
    let byte = |nth: usize| (nth / MIB + nth % 251 + 1) as u8;
    (0..bytes).map(byte).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn several_sources_make_one_disk() {
    let dir = TempDir::new();
    let dir = dir.root();
    // Sizes that are no multiple of a cluster.
    fs::write(dir.join("a.raw"), pattern(MIB + 512)).unwrap();
    qemu::create("qcow2", dir.join("b"), "1536k");
    qemu::io(
        "qcow2",
        dir.join("b"),
        &["write -P 9 300k 4k", "write -P 8 1535k 1k"],
    );
    fs::write(dir.join("c.raw"), pattern(3000)).unwrap();
    for format in ["raw", "qcow2"] {
        let (ours, theirs) = (format!("ours.{format}"), format!("theirs.{format}"));
        let sources = ["a.raw", "b", "c.raw"];
        let args = [&["convert", "-O", format][..], &sources, &[&ours]].concat();
        let line = good(dir, &args);
        assert!(
            line.starts_with("converted a.raw and b and c.raw to ours"),
            "{line}"
        );
        qemu_img(
            dir,
            &[&["convert", "-O", format][..], &sources, &[&theirs]].concat(),
        );
        qemu::compare(format, dir.join(&ours), format, dir.join(&theirs));
        let info = json(&qemu_img(dir, &["info", "--output=json", &ours]));
        assert_eq!(info["virtual-size"], MIB + 512 + (1536 << 10) + 3072);
    }
    let line = refused(
        dir,
        &["convert", "-B", "a.raw", "-F", "raw", "b", "b", "x.qcow2"],
    );
    assert!(line.contains("of several images makes no sense"), "{line}");
    refused(dir, &["convert", "-l", "s", "b", "b", "x.qcow2"]);
}

#[test]
fn holes_are_as_small_as_asked_for() {
    let dir = TempDir::new();
    let dir = dir.root();
    let mut bytes = pattern(MIB);
    bytes[64 << 10..68 << 10].fill(0);
    bytes[128 << 10..160 << 10].fill(0);
    bytes[256 << 10..(256 << 10) + 512].fill(0);
    fs::write(dir.join("a.raw"), &bytes).unwrap();
    let zero = |size: &str| {
        let _ = fs::remove_file(dir.join("b.raw"));
        let report = json(&good(
            dir,
            &["convert", "-S", size, "--json", "a.raw", "b.raw"],
        ));
        assert!(fs::read(dir.join("b.raw")).unwrap() == bytes);
        (
            report["zero"].as_u64().unwrap(),
            fs::metadata(dir.join("b.raw")).unwrap().blocks() * 512,
        )
    };
    assert_eq!(zero("512").0, 36 * 1024 + 512);
    assert_eq!(zero("4k").0, 36 * 1024);
    assert_eq!(zero("8k").0, 32 * 1024);
    assert_eq!(zero("64k").0, 0);
    assert_eq!(zero("0"), (0, MIB as u64));
    let args = ["convert", "-S", "100", "a.raw", "c.raw"];
    let line = failure(&args, &diskplane(dir, &args), 1);
    assert!(line.contains("a multiple of 512"), "{line}");
    // All of it gets space, holes of the source too.
    fs::File::create(dir.join("empty.raw"))
        .unwrap()
        .set_len(MIB as u64)
        .unwrap();
    for (name, map) in [("full.raw", 1), ("full.qcow2", 1)] {
        good(dir, &["convert", "-S", "0", "empty.raw", name]);
        let found = json(&qemu_img(dir, &["map", "--output=json", name]));
        let data = found
            .as_array()
            .unwrap()
            .iter()
            .filter(|run| run["data"] == true);
        assert_eq!(
            (data.count(), found.as_array().unwrap().len()),
            (map, 1),
            "{name}: {found}"
        );
    }
}

#[test]
fn snapshots_are_named_as_in_qemu_img() {
    let dir = TempDir::new();
    let dir = dir.root();
    qemu::create("qcow2", dir.join("a"), "1M");
    // The second's name is the first's id.
    for (byte, name) in [(1, "first"), (2, "1"), (3, "third")] {
        qemu::io("qcow2", dir.join("a"), &[&format!("write -P {byte} 0 64k")]);
        qemu_img(dir, &["snapshot", "-c", name, "a"]);
    }
    for which in [
        "1",
        "third",
        "snapshot.id=1",
        "snapshot.name=1",
        "snapshot.id=2,snapshot.name=1",
    ] {
        good(dir, &["convert", "-l", which, "a", "ours.raw"]);
        qemu_img(
            dir,
            &["convert", "-l", which, "-O", "raw", "a", "theirs.raw"],
        );
        let both = ["ours.raw", "theirs.raw"].map(|name| fs::read(dir.join(name)).unwrap());
        // QEMU takes a bare name for an id or a name as it comes.
        if which != "1" {
            assert_eq!(both[0][0], both[1][0], "{which}");
        } else {
            assert_eq!(both[0][0], 1);
        }
        fs::remove_file(dir.join("ours.raw")).unwrap();
    }
    for which in [
        "4",
        "snapshot.id=first",
        "snapshot.id=1,snapshot.name=1",
        "snapshot.colour=1",
    ] {
        let line = refused(dir, &["convert", "-l", which, "a", "x.raw"]);
        assert!(line.contains(&format!("no snapshot '{which}'")), "{line}");
    }
}

#[test]
fn bitmaps_come_along() {
    let dir = TempDir::new();
    let dir = dir.root();
    qemu::create("qcow2", dir.join("a"), "8M");
    qemu_img(dir, &["bitmap", "--add", "-g", "128k", "a", "first"]);
    qemu_img(dir, &["bitmap", "--add", "a", "second"]);
    qemu::io("qcow2", dir.join("a"), &["write -P 1 1M 300k"]);
    qemu_img(dir, &["bitmap", "--disable", "a", "second"]);
    for extra in [&[][..], &["-c"]] {
        let _ = fs::remove_file(dir.join("b.qcow2"));
        let args = [
            &["convert", "--bitmaps", "--json"][..],
            extra,
            &["a", "b.qcow2"],
        ]
        .concat();
        let report = json(&good(dir, &args));
        assert_eq!(report["bitmaps"], serde_json::json!(["first", "second"]));
        qemu::check("qcow2", dir.join("b.qcow2"));
        let listed =
            |image: &str| json(&good(dir, &["bitmap", "--json", image]))["bitmaps"].clone();
        assert_eq!(listed("a"), listed("b.qcow2"));
    }
    // Into an image that is there.
    qemu::create("qcow2", dir.join("c.qcow2"), "8M");
    good(dir, &["convert", "-n", "--bitmaps", "a", "c.qcow2"]);
    let line = refused(dir, &["convert", "-n", "--bitmaps", "a", "c.qcow2"]);
    assert!(line.contains("has a bitmap 'first' already"), "{line}");
    qemu::check("qcow2", dir.join("c.qcow2"));
    for (args, says) in [
        (
            &["--bitmaps", "a", "x.raw"][..],
            "raw images have no bitmaps",
        ),
        (
            &["--bitmaps", "-o", "compat=0.10", "a", "x.qcow2"],
            "of version 2",
        ),
        (&["--bitmaps", "c.raw", "x.qcow2"], "SRC has no bitmaps"),
    ] {
        fs::write(dir.join("c.raw"), pattern(512)).unwrap();
        let line = refused(dir, &[&["convert"][..], args].concat());
        assert!(line.contains(says), "{line}");
    }
    // One is marked as in use: its flags are in the last entry of the directory.
    let mut bytes = fs::read(dir.join("a")).unwrap();
    let name = bytes.windows(6).rposition(|at| at == b"second").unwrap();
    bytes[name - 24 + 15] |= 1;
    fs::write(dir.join("a"), bytes).unwrap();
    let line = refused(dir, &["convert", "--bitmaps", "a", "x.qcow2"]);
    assert!(line.contains("bitmap 'second' is inconsistent"), "{line}");
    let skip = [
        "convert",
        "--bitmaps",
        "--skip-broken-bitmaps",
        "--json",
        "a",
        "x.qcow2",
    ];
    let report = json(&good(dir, &skip));
    assert_eq!(report["bitmaps-left-out"], serde_json::json!(["second"]));
    assert_eq!(report["bitmaps"], serde_json::json!(["first"]));
    assert!(!names(dir).iter().any(|name| name.ends_with(".part")));
}

#[test]
fn the_host_copies_what_lies_in_the_file_as_it_is() {
    let dir = TempDir::new();
    let dir = dir.root();
    qemu::create("qcow2", dir.join("a"), "4M");
    qemu::io(
        "qcow2",
        dir.join("a"),
        &["write -P 7 100k 1M", "write -P 8 3M 70k"],
    );
    fs::write(dir.join("pattern.raw"), pattern(2 * MIB + 512)).unwrap();
    qemu_img(dir, &["convert", "-c", "-O", "qcow2", "a", "packed"]);
    for (source, target, wants) in [
        ("a", "1.raw", true),
        ("a", "2.qcow2", true),
        ("pattern.raw", "3.qcow2", true),
        // What is compressed has no place in the file.
        ("packed", "4.raw", false),
    ] {
        let report = json(&good(dir, &["convert", "-C", "--json", source, target]));
        assert_eq!(report["offloaded"].as_u64() > Some(0), wants, "{report}");
        let format = if target.ends_with("raw") {
            "raw"
        } else {
            "qcow2"
        };
        if format == "qcow2" {
            qemu::check("qcow2", dir.join(target));
        }
        let from = if source.ends_with("raw") {
            "raw"
        } else {
            "qcow2"
        };
        qemu::compare(from, dir.join(source), format, dir.join(target));
    }
    for with in [&["-c"][..], &["-S", "4k"], &["--salvage"]] {
        let args = [&["convert", "-C"][..], with, &["a", "x.qcow2"]].concat();
        let line = failure(&args, &diskplane(dir, &args), 1);
        assert!(line.contains("cannot be used with"), "{line}");
    }
}

#[test]
fn what_is_there_already_stays_or_is_written_over() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("base.raw"), pattern(2 * MIB)).unwrap();
    let mut bytes = pattern(2 * MIB);
    bytes[MIB..MIB + 100].fill(0);
    bytes.resize(3 * MIB, 0);
    fs::write(dir.join("a.raw"), &bytes).unwrap();
    good(
        dir,
        &["create", "-b", "base.raw", "-F", "raw", "o.qcow2", "3M"],
    );
    // The overlay has bytes of its own, where source and base are the same too.
    qemu::io(
        "qcow2",
        dir.join("o.qcow2"),
        &["write -P 9 64k 4k", "write -P 9 2560k 64k"],
    );
    good(
        dir,
        &[
            "convert", "-n", "-B", "base.raw", "-F", "raw", "a.raw", "o.qcow2",
        ],
    );
    qemu::compare("raw", dir.join("a.raw"), "qcow2", dir.join("o.qcow2"));
    let args = [
        "convert", "-n", "-B", "a.raw", "-F", "raw", "a.raw", "o.qcow2",
    ];
    let line = refused(dir, &args);
    assert!(
        line.contains("it must be the backing file that DST has"),
        "{line}"
    );
    // Zeros are left to a target that is said to have them, and written to all others.
    for (extra, left) in [(&[][..], 0), (&["--target-is-zero"], 9)] {
        fs::write(dir.join("t.raw"), [9].repeat(3 * MIB)).unwrap();
        let args = [
            &["convert", "-n", "-O", "raw"][..],
            extra,
            &["a.raw", "t.raw"],
        ]
        .concat();
        good(dir, &args);
        let after = fs::read(dir.join("t.raw")).unwrap();
        assert_eq!((after[5], after[5 * MIB / 2]), (bytes[5], left));
    }
    let line = refused(
        dir,
        &["convert", "-n", "--target-is-zero", "a.raw", "o.qcow2"],
    );
    assert!(line.contains("has a backing file"), "{line}");
    let args = ["convert", "--target-is-zero", "a.raw", "x.raw"];
    let line = failure(&args, &diskplane(dir, &args), 1);
    assert!(line.contains("--no-create"), "{line}");
}

#[test]
fn compressed_clusters_go_into_images_that_are_there() {
    let dir = TempDir::new();
    let dir = dir.root();
    let mut bytes = pattern(MIB);
    // What does not get smaller stays as it is.
    let mut word = 1u64;
    for byte in &mut bytes[100 << 10..300 << 10] {
        word = word
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        *byte = (word >> 56) as u8;
    }
    bytes[500 << 10..700 << 10].fill(0);
    bytes.truncate(MIB - 5 * 512);
    fs::write(dir.join("a.raw"), &bytes).unwrap();
    for options in [
        "cluster_size=64k",
        "cluster_size=4k,compat=0.10",
        "cluster_size=32k,extended_l2=on,compression_type=zstd",
        "cluster_size=512,refcount_bits=1",
    ] {
        let name = "t.qcow2";
        qemu_img(
            dir,
            &["create", "-q", "-f", "qcow2", "-o", options, name, "2M"],
        );
        let writes = [
            "write -P 9 90k 400k",
            "write -P 9 600k 10k",
            "write -P 9 900k 1000k",
        ];
        qemu::io("qcow2", dir.join(name), &writes);
        let shared = !options.contains("refcount_bits");
        if shared {
            qemu_img(dir, &["snapshot", "-c", "s", name]);
        }
        // And once more over what is compressed.
        for _ in 0..2 {
            let report = good(dir, &["convert", "--json", "-n", "-c", "a.raw", name]);
            let packed = json(&report)["compressed-clusters"].as_u64();
            assert!(packed > Some(5), "{options}: {report}");
        }
        qemu::check("qcow2", dir.join(name));
        qemu_img(dir, &["convert", "-O", "raw", name, "t.raw"]);
        let found = fs::read(dir.join("t.raw")).unwrap();
        assert!(found[..bytes.len()] == bytes, "{options}");
        // What is behind the source stays, and so does the snapshot.
        let behind = &found[bytes.len()..];
        let left = (1900 << 10) - bytes.len();
        assert!(behind[..left].iter().all(|b| *b == 9), "{options}");
        assert!(behind[left..].iter().all(|b| *b == 0), "{options}");
        if shared {
            qemu_img(dir, &["snapshot", "-a", "s", name]);
            qemu::io(
                "qcow2",
                dir.join(name),
                &["read -P 9 90k 400k", "read -P 0 0 90k"],
            );
        }
        qemu::check("qcow2", dir.join(name));
    }
    qemu_img(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "data_file=d.raw",
            "d.qcow2",
            "1M",
        ],
    );
    good(dir, &["create", "-f", "vmdk", "v.vmdk", "1M"]);
    for (target, why) in [
        ("d.qcow2", "in an external file"),
        ("v.vmdk", "vmdk images that are there"),
    ] {
        let line = refused(dir, &["convert", "-n", "-c", "a.raw", target]);
        assert!(line.contains(why), "{line}");
    }
}

#[test]
fn what_cannot_be_read_is_zeros_with_salvage() {
    let dir = TempDir::new();
    let dir = dir.root();
    good(dir, &["create", "a.qcow2", "4M"]);
    qemu::io("qcow2", dir.join("a.qcow2"), &["write -P 7 0 4M"]);
    // An entry of the L2 table that cannot be.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(dir.join("a.qcow2"))
        .unwrap();
    file.write_all_at(&[0x22], 0x4_0000 + 9 * 8 + 7).unwrap();
    let line = refused(dir, &["convert", "a.qcow2", "b.raw"]);
    assert!(line.contains("L2 entry"), "{line}");
    assert_eq!(names(dir), ["a.qcow2"]);
    for target in ["b.raw", "b.qcow2"] {
        let report = json(&good(
            dir,
            &["convert", "--salvage", "--json", "a.qcow2", target],
        ));
        assert_eq!(report["unreadable-bytes"], 65536);
        assert_eq!(report["unreadable"][0]["offset"], 9 * 65536);
    }
    let bytes = fs::read(dir.join("b.raw")).unwrap();
    let lost = 9 * 65536..10 * 65536;
    for (at, byte) in bytes.iter().enumerate() {
        assert_eq!(*byte, if lost.contains(&at) { 0 } else { 7 }, "{at:#x}");
    }
    qemu::compare("raw", dir.join("b.raw"), "qcow2", dir.join("b.qcow2"));
}

#[test]
fn what_a_cut_off_file_lacks_is_told_with_salvage() {
    let dir = TempDir::new();
    let dir = dir.root();
    good(dir, &["create", "a.qcow2", "4M"]);
    qemu::io("qcow2", dir.join("a.qcow2"), &["write -P 7 0 4M"]);
    let whole = fs::metadata(dir.join("a.qcow2")).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(dir.join("a.qcow2"));
    file.unwrap().set_len(whole - (1 << 20) - 4096).unwrap();
    let lost = (1 << 20) + 4096;
    for target in ["b.raw", "b.qcow2"] {
        let copy = ["convert", "--salvage", "--json", "a.qcow2", target];
        let report = json(&good(dir, &copy));
        assert_eq!(report["unreadable-bytes"], lost);
        let place = &report["unreadable"][0];
        assert_eq!(place["offset"], (4 << 20) - lost);
        assert!(
            place["error"].as_str().unwrap().contains("cut off"),
            "{place}"
        );
    }
    qemu::compare("raw", dir.join("b.raw"), "qcow2", dir.join("b.qcow2"));
    // A raw disk ends within a sector: nothing is lacking.
    fs::write(dir.join("odd.raw"), [7; 1000]).unwrap();
    let copy = [
        "convert",
        "--salvage",
        "--json",
        "-f",
        "raw",
        "odd.raw",
        "odd.qcow2",
    ];
    assert_eq!(json(&good(dir, &copy))["unreadable-bytes"], 0);
    // In qemu-img's place nothing is said, as by qemu-img.
    let line = [
        "qemu-img",
        "convert",
        "--salvage",
        "-O",
        "raw",
        "a.qcow2",
        "c.raw",
    ];
    let output = run(binary(), dir, &line);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}

/// Starts a command that a rate makes last for ever, and returns when it has written something.
fn begin(dir: &Path, args: &[&str], appears: impl Fn(&Path) -> bool) -> Child {
    let mut child = Command::new(binary())
        .args(args)
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !appears(dir) {
        assert!(child.try_wait().unwrap().is_none(), "{args:?} has ended");
        assert!(Instant::now() < until, "{args:?} writes nothing");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Whether a file that is not finished has data.
fn has_data(dir: &Path) -> bool {
    let part = |name: &&String| name.ends_with(".part");
    let names = names(dir);
    let blocks = names
        .iter()
        .find(part)
        .and_then(|name| fs::metadata(dir.join(name)).ok());
    blocks.is_some_and(|found| found.blocks() >= 1024)
}

#[track_caller]
fn stop(mut child: Child, signal: i32) {
    let pid = child.id().to_string();
    run("kill", Path::new("/"), &[&format!("-{signal}"), &pid]);
    assert_eq!(child.wait().unwrap().signal(), Some(signal));
}

#[test]
fn a_signal_leaves_nothing_behind() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("a.raw"), pattern(4 * MIB)).unwrap();
    for (signal, extra) in [
        (2, &["b.raw"][..]),
        (15, &["b.qcow2"]),
        (1, &["-c", "-S", "0", "b.qcow2"]),
    ] {
        let args = [&["convert", "-m", "1", "-r", "1k", "a.raw"][..], extra].concat();
        let appears = |dir: &Path| match extra.len() {
            1 => has_data(dir),
            // It is gathered in memory.
            _ => names(dir).len() > 1,
        };
        stop(begin(dir, &args, appears), signal);
        assert_eq!(names(dir), ["a.raw"], "{extra:?}");
    }
    // `timeout` signals its child, and then the group that it is in.
    for round in 0..4 {
        let args = ["convert", "-m", "1", "-r", "1k", "a.raw", "b.raw"];
        let mut child = begin(dir, &args, has_data);
        let pid = child.id().to_string();
        let both = format!("kill -2 {pid}; kill -15 {pid}");
        run("sh", Path::new("/"), &["-c", &both]);
        let signal = child.wait().unwrap().signal();
        assert!(matches!(signal, Some(2 | 15)), "{signal:?}");
        assert_eq!(names(dir), ["a.raw"], "{round}");
    }
    // A target that was there stays.
    fs::write(dir.join("t.raw"), pattern(4 * MIB)).unwrap();
    let args = [
        "convert", "-n", "-O", "raw", "-m", "1", "-r", "1k", "a.raw", "t.raw",
    ];
    let child = begin(dir, &args, |_| true);
    // Its lock says that it is at it.
    while diskplane(dir, &["resize", "-f", "raw", "t.raw", "4M"])
        .status
        .success()
    {
        thread::sleep(Duration::from_millis(5));
    }
    stop(child, 15);
    assert_eq!(names(dir), ["a.raw", "t.raw"]);
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("a.raw"), pattern(4 * MIB)).unwrap();
    for args in [
        "b.raw",
        "b.qcow2",
        "-S 0 b.raw",
        "-c -o cluster_size=512 b.qcow2",
    ] {
        // Files of 1 MiB at most, and no signal for what would be more.
        let script = format!(
            "trap '' XFSZ; ulimit -f 2048; exec '{}' convert {} a.raw {}",
            binary().display(),
            args.rsplit_once(' ').map_or("", |(options, _)| options),
            args.rsplit_once(' ').map_or(args, |(_, name)| name)
        );
        let line = failure(&[args], &run("sh", dir, &["-c", &script]), 1);
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(line.contains("File too large"), "{line}");
        assert!(line.starts_with("diskplane: b."), "{line}");
        assert!(!line.contains(".part"), "{line}");
        let name = line.split(": ").nth(1).unwrap();
        assert_eq!(line.matches(name).count(), 1, "{line}");
        assert_eq!(names(dir), ["a.raw"], "{args}");
    }
}

#[test]
fn a_copy_goes_on_where_it_was_cut_off() {
    let dir = TempDir::new();
    let dir = dir.root();
    let mut bytes = pattern(8 * MIB);
    bytes[3 * MIB..4 * MIB].fill(0);
    // What a process that is killed had in memory is gone; asked to stop, it writes that.
    for (target, signal) in [("b.raw", 9), ("b.qcow2", 15)] {
        fs::write(dir.join("a.raw"), &bytes).unwrap();
        let part = format!("{target}.part");
        let args = [
            "convert", "--resume", "-m", "1", "-r", "1k", "a.raw", target,
        ];
        stop(begin(dir, &args, has_data), signal);
        assert_eq!(names(dir), ["a.raw", &part]);
        // What was copied has changed since: data, and zeros in its place.
        let mut other = bytes.clone();
        other[1000..2000].fill(9);
        other[131072..196608].fill(0);
        fs::write(dir.join("a.raw"), &other).unwrap();
        let report = json(&good(
            dir,
            &["convert", "--resume", "--json", "a.raw", target],
        ));
        assert!(report["resumed"].as_u64() > Some(0), "{report}");
        assert!(
            report["resumed"].as_u64() < report["written"].as_u64(),
            "{report}"
        );
        assert_eq!(names(dir), ["a.raw", target]);
        let format = target.split_once('.').unwrap().1;
        qemu::compare("raw", dir.join("a.raw"), format, dir.join(target));
        fs::remove_file(dir.join(target)).unwrap();
    }
    let line = refused(dir, &["convert", "--resume", "a.raw", "b.vhd"]);
    assert!(
        line.contains("a vhd image cannot be gone on with"),
        "{line}"
    );
    // Two at a time: the one that came second is told what to wait for.
    for target in ["c.raw", "c.qcow2"] {
        let args = [
            "convert", "--resume", "-m", "1", "-r", "1k", "a.raw", target,
        ];
        let part = dir.join(format!("{target}.part"));
        let begun = |_: &Path| fs::metadata(&part).is_ok_and(|part| part.blocks() > 0);
        let first = begin(dir, &args, begun);
        let line = refused(dir, &["convert", "--resume", "a.raw", target]);
        assert!(
            line.contains(&format!(
                "{target}: another convert --resume is making it: wait"
            )),
            "{line}"
        );
        stop(first, 15);
        fs::remove_file(&part).unwrap();
    }
    // Another copy's part.
    fs::write(dir.join("b.raw.part"), [1; 512]).unwrap();
    let line = refused(dir, &["convert", "--resume", "a.raw", "b.raw"]);
    assert!(
        line.contains("b.raw.part: is no part of this copy"),
        "{line}"
    );
    assert_eq!(fs::read(dir.join("b.raw.part")).unwrap(), [1; 512]);
}

#[test]
fn cache_modes_have_qemus_names() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("a.raw"), pattern(MIB)).unwrap();
    for mode in ["writeback", "writethrough", "unsafe"] {
        let target = format!("{mode}.qcow2");
        good(
            dir,
            &["convert", "-t", mode, "-T", mode, "-W", "a.raw", &target],
        );
        qemu::compare("raw", dir.join("a.raw"), "qcow2", dir.join(target));
    }
    let line = failure(
        &[],
        &diskplane(dir, &["convert", "-t", "some", "a.raw", "x"]),
        1,
    );
    assert!(line.contains("some"), "{line}");
}
