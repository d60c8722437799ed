//! VHDX images through the commands, beside QEMU's.

use crate::common;

use common::{diskplane, good, json, qemu_img, refused};
use serde_json::Value;
use std::fs;
use std::process::{Command, Output};
use testkit::TempDir;

#[test]
fn images_are_converted_checked_and_grown() {
    let dir = TempDir::new();
    let root = dir.root();
    let bytes: Vec<u8> = (0..3u32 << 20).map(|i| (i >> 18) as u8 % 3).collect();
    fs::write(dir.path("in.raw"), bytes).unwrap();
    for (options, kind) in [
        ("block_size=1M,block_state_zero=off", "dynamic"),
        ("subformat=fixed,log_size=1500K", "fixed"),
    ] {
        good(
            root,
            &["convert", "-f", "raw", "-o", options, "in.raw", "a.vhdx"],
        );
        qemu_img(
            root,
            &["compare", "-f", "vhdx", "-F", "raw", "a.vhdx", "in.raw"],
        );
        good(root, &["check", "a.vhdx"]);
        good(root, &["resize", "a.vhdx", "+9M"]);
        let info = good(root, &["info", "--json", "a.vhdx"]);
        assert_eq!(json(&info)["virtual-size"], 12 << 20, "{info}");
        assert_eq!(json(&info)["format-specific"]["type"], kind, "{info}");
        good(root, &["convert", "-O", "raw", "a.vhdx", "out.raw"]);
        qemu_img(
            root,
            &["compare", "-f", "vhdx", "-F", "raw", "a.vhdx", "out.raw"],
        );
        for name in ["a.vhdx", "out.raw"] {
            fs::remove_file(dir.path(name)).unwrap();
        }
    }
    for (options, said) in [
        ("block_size=3M", "power of two"),
        ("log_size=5G", "less than 4 GiB"),
        ("preallocation=full", "only fixed ones"),
        ("subformat=differencing", "dynamic or fixed"),
    ] {
        let line = refused(root, &["create", "-o", options, "b.vhdx", "1M"]);
        assert!(line.contains(said), "{options}: {line}");
    }
    let line = refused(root, &["create", "b.vhdx", "65T"]);
    assert!(line.contains("the most is 64 TiB"), "{line}");
    assert!(!dir.path("b.vhdx").exists());
}

#[test]
fn differencing_images_lie_over_vhdx() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("base.raw"), vec![3; 2 << 20]).unwrap();
    good(root, &["convert", "-f", "raw", "base.raw", "base.vhdx"]);
    good(
        root,
        &["create", "-b", "base.vhdx", "-F", "vhdx", "top.vhdx"],
    );
    let info = good(root, &["info", "--json", "top.vhdx"]);
    assert_eq!(json(&info)["backing-filename"], "./base.vhdx", "{info}");
    good(root, &["convert", "top.vhdx", "-O", "raw", "out.raw"]);
    assert!(fs::read(dir.path("out.raw")).unwrap() == vec![3; 2 << 20]);
    let map = good(root, &["map", "--json", "top.vhdx"]);
    assert_eq!(json(&map)[0]["depth"], 1, "{map}");
    for args in [
        &["rebase", "-b", "base.raw", "-F", "raw", "top.vhdx"][..],
        &["create", "-b", "base.raw", "-F", "raw", "no.vhdx"],
        &["resize", "top.vhdx", "--shrink", "1M"],
    ] {
        refused(root, args);
    }
    good(root, &["check", "top.vhdx"]);
}

/// A log that QEMU did not get to put in place: of a write of an entry that failed.
#[test]
fn what_qemu_left_in_a_log_is_read_and_repaired() {
    let dir = TempDir::new();
    let root = dir.root();
    let create = [
        "create",
        "-q",
        "-f",
        "vhdx",
        "-o",
        "block_size=1M",
        "a.vhdx",
        "3M",
    ];
    qemu_img(root, &create);
    let file = "driver=vhdx,file.driver=blkdebug,file.image.driver=file,file.image.filename=a.vhdx,\
                file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.sector=4096,\
                file.inject-error.0.errno=5";
    let output = Command::new("qemu-io")
        .args(["-t", "unsafe", "--image-opts", file])
        .args(["-c", "write -P 9 1M 64k", "-c", "sigraise 9"])
        .current_dir(root)
        .output()
        .unwrap();
    assert!(!output.status.success(), "it was not killed");
    let before = fs::read(dir.path("a.vhdx")).unwrap();
    let info = good(root, &["info", "a.vhdx"]);
    assert!(info.contains("log entries    1:"), "{info}");
    let checked = diskplane(root, &["check", "a.vhdx"]);
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(
        checked.status.success() && said.starts_with("note: log"),
        "{said}"
    );
    good(root, &["convert", "-O", "raw", "a.vhdx", "out.raw"]);
    let mut want = vec![0; 3 << 20];
    want[1 << 20..(1 << 20) + (64 << 10)].fill(9);
    assert!(fs::read(dir.path("out.raw")).unwrap() == want);
    assert!(fs::read(dir.path("a.vhdx")).unwrap() == before);
    // In place of qemu-img it is what it is there.
    let ours = diskplane(root, &["qemu-img", "check", "a.vhdx"]);
    let theirs = common::run("qemu-img", root, &["check", "a.vhdx"]);
    assert_eq!(ours.status.code(), theirs.status.code());
    let text = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text(&ours), text(&theirs));
    let repair = ["check", "-r", "all", "--output=json", "b.vhdx"];
    let fixed = [
        ["corruptions", "corruptions-fixed"],
        ["leaks", "leaks-fixed"],
    ]
    .concat();
    fs::write(dir.path("b.vhdx"), &before).unwrap();
    let theirs = json(&qemu_img(root, &repair));
    fs::write(dir.path("b.vhdx"), &before).unwrap();
    let ours = json(&good(root, &[&["qemu-img"][..], &repair].concat()));
    for field in fixed {
        assert_eq!(ours[field], theirs[field], "{ours} {theirs}");
    }
    good(root, &["check", "--repair", "leaks", "a.vhdx"]);
    qemu_img(
        root,
        &["compare", "-f", "vhdx", "-F", "raw", "a.vhdx", "out.raw"],
    );
}

#[test]
fn a_disk_of_nothing_can_be_opened_by_qemu() {
    let dir = TempDir::new();
    let root = dir.root();
    good(root, &["create", "a.vhdx", "0"]);
    qemu_img(root, &["info", "-f", "vhdx", "a.vhdx"]);
    good(root, &["check", "a.vhdx"]);
    assert_eq!(
        json(&good(root, &["info", "--json", "a.vhdx"]))["virtual-size"],
        0
    );
}

#[test]
fn a_fixed_image_of_qemu_leaks_nothing() {
    let dir = TempDir::new();
    let root = dir.root();
    // Its entries say that the blocks are zeros, though each has its place.
    qemu_img(
        root,
        &[
            "create",
            "-q",
            "-f",
            "vhdx",
            "-o",
            "subformat=fixed",
            "a.vhdx",
            "20M",
        ],
    );
    let report = json(&good(root, &["check", "--json", "a.vhdx"]));
    assert_eq!(report["leaks"], Value::Null, "{report}");
}
