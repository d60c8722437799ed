//! `amend` and `resize` beside `qemu-img`: both read what both change.

use crate::common;

use common::{diskplane, good, json, qemu_img, refused as bad};
use std::fs;
use std::path::Path;
use std::process::Command;
use testkit::{TempDir, qemu};

/// Sound to QEMU, and the same bytes as the file `raw`.
#[track_caller]
fn same(dir: &Path, image: &str, raw: &str) {
    qemu::check("qcow2", dir.join(image));
    qemu_img(dir, &["compare", "-f", "qcow2", "-F", "raw", image, raw]);
}

fn cut(dir: &Path, raw: &str, bytes: u64) {
    let file = fs::File::options().write(true).open(dir.join(raw)).unwrap();
    file.set_len(bytes).unwrap();
}

#[test]
fn versions_and_refcounts_change_both_ways() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("base"), vec![7; 5 << 20]).unwrap();
    for backed in [false, true] {
        let backing: &[&str] = if backed {
            &["-b", "base", "-F", "raw"]
        } else {
            &[]
        };
        let create = ["create", "-q", "-f", "qcow2", "-o", "compat=0.10"];
        qemu_img(dir, &[&create, backing, &["a.qcow2", "8M"]].concat());
        let image = dir.join("a.qcow2");
        qemu::io("qcow2", &image, &["write -P 3 0 1M", "write -P 4 6M 100k"]);
        // Entries of a version 2 snapshot table lack what version 3 wants.
        qemu_img(dir, &["snapshot", "-c", "s", "a.qcow2"]);
        qemu::io("qcow2", &image, &["write -P 9 0 64k"]);
        qemu_img(dir, &["convert", "-O", "raw", "a.qcow2", "a.raw"]);
        let told = json(&good(
            dir,
            &[
                "amend",
                "-o",
                "compat=1.1,lazy_refcounts=on",
                "--json",
                "a.qcow2",
            ],
        ));
        assert_eq!(told["compat"], "1.1");
        assert_eq!(told["lazy-refcounts"], true);
        same(dir, "a.qcow2", "a.raw");
        let info = json(&qemu_img(dir, &["info", "--output=json", "a.qcow2"]));
        let data = &info["format-specific"]["data"];
        assert_eq!(data["compat"], "1.1");
        assert_eq!(data["lazy-refcounts"], true);
        for bits in ["64", "2", "8", "16"] {
            let option = format!("refcount_bits={bits}");
            good(dir, &["amend", "-o", &option, "a.qcow2"]);
            same(dir, "a.qcow2", "a.raw");
            let info = good(dir, &["info", "--json", "a.qcow2"]);
            assert_eq!(json(&info)["format-specific"]["refcount bits"], bits);
        }
        let text = bad(dir, &["amend", "-o", "refcount_bits=1", "a.qcow2"]);
        assert!(text.contains("is referred to 2 times"), "{text}");
        // Zero clusters of each kind, some that the snapshot has as data.
        qemu::io(
            "qcow2",
            &image,
            &["write -z 0 128k", "write -z 3M 64k", "write -z -u 6M 64k"],
        );
        qemu_img(dir, &["snapshot", "-c", "t", "a.qcow2"]);
        qemu::io("qcow2", &image, &["write -P 5 64k 4k", "write -z 1M 64k"]);
        qemu_img(dir, &["convert", "-O", "raw", "a.qcow2", "a.raw"]);
        good(dir, &["amend", "-o", "compat=0.10", "a.qcow2"]);
        same(dir, "a.qcow2", "a.raw");
        let info = json(&qemu_img(dir, &["info", "--output=json", "a.qcow2"]));
        assert_eq!(info["format-specific"]["data"]["compat"], "0.10");
        for (snapshot, first) in [("t", "read -P 0 0 128k"), ("s", "read -P 3 0 1M")] {
            qemu_img(dir, &["snapshot", "-a", snapshot, "a.qcow2"]);
            qemu::check("qcow2", &image);
            qemu::io("qcow2", &image, &[first]);
        }
        qemu_img(dir, &["amend", "-o", "compat=1.1", "a.qcow2"]);
        qemu::check("qcow2", &image);
    }
}

#[test]
fn amend_refuses_what_qemu_refuses() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("base"), vec![7; 1 << 20]).unwrap();
    for (options, make, says) in [
        ("compat=0.10", "extended_l2=on", "extended L2 entries"),
        (
            "compat=0.10",
            "refcount_bits=1",
            "refcount_bits=1, and needs 16",
        ),
        ("compat=0.10,lazy_refcounts=on", "", "needs compat=1.1"),
        ("refcount_bits=32", "compat=0.10", "need compat=1.1"),
        ("refcount_bits=3", "", "a power of two"),
        ("backing_file=other", "", "use diskplane rebase"),
        ("data_file=x", "", "have an external data file"),
        ("data_file_raw=on", "", "when an image is created"),
        ("size=1M", "", "resize --shrink"),
        ("cluster_size=4k", "", "keeps what it was created with"),
        ("colour=red", "", "no such option"),
        ("encrypt.state=active", "", "encrypt"),
    ] {
        let image = dir.join("a.qcow2");
        let _ = fs::remove_file(&image);
        qemu::create_with("qcow2", &image, "8M", make);
        let before = fs::read(&image).unwrap();
        let text = bad(dir, &["amend", "-o", options, "a.qcow2"]);
        assert!(text.contains(says), "{options}: {text}");
        assert!(fs::read(&image).unwrap() == before, "{options}");
    }
    // In qemu-img's place a downgrade removes bitmaps, but none that fails.
    for (options, make) in [
        ("compat=0.10", "refcount_bits=8"),
        ("compat=0.10", "extended_l2=on"),
        ("compat=0.10,lazy_refcounts=on", ""),
    ] {
        let image = dir.join("b.qcow2");
        let _ = fs::remove_file(&image);
        qemu::create_with("qcow2", &image, "8M", make);
        qemu_img(dir, &["bitmap", "--add", "b.qcow2", "kept"]);
        let before = fs::read(&image).unwrap();
        bad(dir, &["qemu-img", "amend", "-o", options, "b.qcow2"]);
        assert!(fs::read(&image).unwrap() == before, "{options}, {make}");
    }
    assert!(bad(dir, &["amend", "-o", "compat=1.1", "base"]).contains("raw image has no options"));
    let help = good(dir, &["amend", "-o", "help", "base"]);
    assert!(help.contains("refcount_bits") && help.contains("compat"));
    good(dir, &["amend", "-o", "size=9M", "a.qcow2"]);
    let info = json(&qemu_img(dir, &["info", "--output=json", "a.qcow2"]));
    assert_eq!(info["virtual-size"], 9 << 20);
}

#[test]
fn sizes_change_both_ways() {
    const OLD: u64 = (2 << 20) + 512;
    let dir = TempDir::new();
    let dir = dir.root();
    // The base is longer than the image: what it has there must not show.
    fs::write(dir.join("base"), vec![7; 5 << 20]).unwrap();
    for (options, backed) in [
        ("compat=1.1", true),
        ("compat=0.10", true),
        ("cluster_size=512", false),
        ("cluster_size=512", true),
        ("extended_l2=on,cluster_size=16k", true),
        ("cluster_size=2M,refcount_bits=1", true),
    ] {
        let backing: &[&str] = if backed {
            &["-b", "base", "-F", "raw"]
        } else {
            &[]
        };
        let size = OLD.to_string();
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu_img(dir, &[&create, backing, &["o.qcow2", &size]].concat());
        let writes = ["write -P 1 1M 512k", "write -P 2 2M 512"];
        qemu::io("qcow2", dir.join("o.qcow2"), &writes);
        qemu_img(dir, &["convert", "-O", "raw", "o.qcow2", "o.raw"]);
        let modes = ["off", "metadata", "falloc", "full"];
        let few = options.contains("512") && !backed || options.contains("0.10");
        for mode in modes.into_iter().take(if few { 1 } else { 4 }) {
            fs::copy(dir.join("o.qcow2"), dir.join("p.qcow2")).unwrap();
            fs::copy(dir.join("o.raw"), dir.join("p.raw")).unwrap();
            good(dir, &["resize", "--preallocation", mode, "p.qcow2", "9M"]);
            cut(dir, "p.raw", 9 << 20);
            same(dir, "p.qcow2", "p.raw");
            let took = fs::metadata(dir.join("p.qcow2")).unwrap().len();
            let all = took > 7 << 20;
            assert!(mode == "off" || all, "{options} {mode}: {took}");
            if mode == "off" || options.contains("l2") {
                good(dir, &["resize", "--shrink", "p.qcow2", "1537K"]);
                cut(dir, "p.raw", 1537 << 10);
                same(dir, "p.qcow2", "p.raw");
                let took = fs::metadata(dir.join("p.qcow2")).unwrap().len();
                let small = took < 6 << 20 || mode != "off" || options.contains("2M");
                assert!(small, "{options} {mode}: {took}");
                good(dir, &["resize", "p.qcow2", "+3M"]);
                cut(dir, "p.raw", (1537 << 10) + (3 << 20));
                same(dir, "p.qcow2", "p.raw");
            }
        }
    }
}

#[test]
fn resize_refuses_what_would_lose_data() {
    let dir = TempDir::new();
    let dir = dir.root();
    qemu::create("qcow2", dir.join("a.qcow2"), "8M");
    qemu::create_with("qcow2", dir.join("v2.qcow2"), "8M", "compat=0.10");
    qemu_img(dir, &["snapshot", "-c", "s", "v2.qcow2"]);
    fs::write(dir.join("r.raw"), vec![1; 4096]).unwrap();
    for (args, says) in [
        (&["a.qcow2", "4M"][..], "say --shrink"),
        (&["a.qcow2", "-4M"], "say --shrink"),
        (&["a.qcow2", "-9M"], "the new size must be"),
        (
            &["--shrink", "--preallocation=full", "a.qcow2", "4M"],
            "cannot be combined with --shrink",
        ),
        (&["a.qcow2", "1E"], "is too large for clusters"),
        (&["v2.qcow2", "9M"], "snapshots"),
        (&["r.raw", "9M"], "say -f raw"),
        (
            &["-f", "raw", "--preallocation=metadata", "r.raw", "9M"],
            "raw has no metadata",
        ),
        (&["null:1M", "9M"], "an image without a file"),
    ] {
        let text = bad(dir, &[&["resize"], args].concat());
        assert!(text.contains(says), "{args:?}: {text}");
    }
    // Raw files know no clusters.
    good(dir, &["resize", "-f", "raw", "r.raw", "+4096"]);
    good(
        dir,
        &["resize", "-f", "raw", "--preallocation=full", "r.raw", "1M"],
    );
    let bytes = fs::read(dir.join("r.raw")).unwrap();
    assert!(
        bytes.len() == 1 << 20
            && bytes[..4096] == [1; 4096]
            && bytes[4096..].iter().all(|b| *b == 0)
    );
    let told = json(&good(
        dir,
        &["resize", "-f", "raw", "--shrink", "--json", "r.raw", "1K"],
    ));
    assert_eq!(
        (&told["old-virtual-size"], &told["virtual-size"]),
        (&(1 << 20).into(), &1024.into())
    );
    // QEMU and we keep each other out.
    let held = Command::new("qemu-nbd")
        // It returns when it has the image.
        .args(["--fork", "--pid-file=pid", "-t", "-f", "qcow2", "-k"])
        .arg(dir.join("nbd.sock"))
        .arg("a.qcow2")
        .current_dir(dir)
        .status();
    assert!(held.unwrap().success());
    let pid = fs::read_to_string(dir.join("pid")).unwrap();
    let resized = diskplane(dir, &["resize", "a.qcow2", "9M"]);
    let amended = diskplane(dir, &["amend", "-o", "lazy_refcounts=on", "a.qcow2"]);
    let killed = Command::new("kill").arg(pid.trim()).status();
    assert!(killed.unwrap().success());
    for output in [resized, amended] {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("is locked"), "{text}");
    }
}

/// A shrink that was cut off leaves the file longer than the disk.
#[test]
fn a_disk_that_grows_does_not_show_what_its_data_file_held_behind_its_end() {
    let dir = TempDir::new();
    let dir = dir.path("").as_path().to_owned();
    for (nth, options) in ["", ",data_file_raw=on"].into_iter().enumerate() {
        let (image, data) = (format!("{nth}.qcow2"), format!("{nth}.data"));
        let options = format!("data_file={data}{options}");
        good(&dir, &["create", "-o", &options, &image, "1M"]);
        let mut held = vec![0; 1 << 20];
        held.resize(3 << 20, 0x5a);
        fs::write(dir.join(&data), &held).unwrap();
        good(&dir, &["resize", &image, "2M"]);
        let zeros = vec![0; 2 << 20];
        assert!(fs::read(dir.join(&data)).unwrap() == zeros, "{options}");
        fs::write(dir.join("raw"), &zeros).unwrap();
        // To QEMU the data file's name is relative to where it runs.
        qemu_img(&dir, &["check", "-q", &image]);
        qemu_img(&dir, &["compare", "-F", "raw", &image, "raw"]);
    }
}

#[test]
fn create_preallocates_as_qemu_does() {
    use std::os::unix::fs::MetadataExt;
    const SIZE: u64 = (3 << 20) + 512;
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("base"), vec![7; 2 << 20]).unwrap();
    fs::write(dir.join("zeros"), vec![0; SIZE as usize]).unwrap();
    let size = SIZE.to_string();
    for options in [
        "",
        "cluster_size=512",
        "cluster_size=2M,refcount_bits=1",
        "compat=0.10,cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "backing_file=base,backing_fmt=raw,extended_l2=on",
        "data_file=data",
        "data_file=data,data_file_raw=on",
    ] {
        // QEMU opens a relative name from where it runs.
        let outside = format!("data_file={}", dir.join("data").display());
        let options = &*options.replace("data_file=data", &outside);
        for mode in ["metadata", "falloc", "full"] {
            let option = match options {
                "" => format!("preallocation={mode}"),
                _ => format!("preallocation={mode},{options}"),
            };
            for image in ["o.qcow2", "q.qcow2", "data"] {
                let _ = fs::remove_file(dir.join(image));
            }
            qemu_img(
                dir,
                &[
                    "create", "-q", "-f", "qcow2", "-o", &option, "q.qcow2", &size,
                ],
            );
            let _ = fs::remove_file(dir.join("data"));
            good(dir, &["create", "-o", &option, "o.qcow2", &size]);
            let image = dir.join("o.qcow2");
            qemu::check("qcow2", &image);
            let backed = options.contains("backing");
            if backed {
                qemu::io("qcow2", &image, &["read -P 7 0 2M", "read -P 0 2M 1M"]);
            } else {
                let compare = ["compare", "-f", "qcow2", "-F", "raw", "o.qcow2", "zeros"];
                qemu_img(dir, &compare);
            }
            let mapped = |image: &str| {
                let map = json(&qemu_img(dir, &["map", "--output=json", image]));
                let there = |e: &&serde_json::Value| e["depth"] == 0 && e["offset"].is_u64();
                let parts = map.as_array().unwrap().iter().filter(there);
                parts.map(|e| e["length"].as_u64().unwrap()).sum::<u64>()
            };
            assert_eq!(mapped("o.qcow2"), mapped("q.qcow2"), "{option}");
            let data = if options.contains("data") {
                "data"
            } else {
                "o.qcow2"
            };
            let blocks = fs::metadata(dir.join(data)).unwrap().blocks() * 512;
            assert_eq!(blocks >= SIZE, mode != "metadata", "{option}: {blocks}");
            // A writer finds its way.
            qemu::io("qcow2", &image, &["write -P 9 1M 70k"]);
            qemu::check("qcow2", &image);
        }
    }
    let backed = "preallocation=full,backing_file=base,backing_fmt=raw,extended_l2=off";
    let text = bad(dir, &["create", "-o", backed, "x.qcow2"]);
    assert!(text.contains("unless extended_l2=on"), "{text}");
    assert!(!dir.join("x.qcow2").exists());
}
