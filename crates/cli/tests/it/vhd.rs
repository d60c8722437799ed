//! VHD images through the commands, beside QEMU's.

use crate::common;

use common::{good, json, qemu_img, refused};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use testkit::TempDir;

#[test]
fn images_are_converted_checked_and_grown() {
    let dir = TempDir::new();
    let root = dir.root();
    let bytes: Vec<u8> = (0..5u32 << 20).map(|i| (i >> 18) as u8 % 3).collect();
    fs::write(dir.path("in.raw"), bytes).unwrap();
    for options in [
        "force_size=on",
        "subformat=fixed,force_size=on",
        "block_size=64K,force_size=on",
    ] {
        good(
            root,
            &["convert", "-f", "raw", "-o", options, "in.raw", "a.vhd"],
        );
        qemu_img(
            root,
            &["compare", "-f", "vpc", "-F", "raw", "a.vhd", "in.raw"],
        );
        let said = ["-f", "vpc"];
        good(root, &[&["check"][..], &said, &["a.vhd"]].concat());
        good(root, &[&["resize"][..], &said, &["a.vhd", "+1M"]].concat());
        let info = good(root, &[&["info", "--json"][..], &said, &["a.vhd"]].concat());
        assert_eq!(json(&info)["virtual-size"], 6 << 20, "{info}");
        assert_eq!(json(&info)["format"], "vhd");
        good(
            root,
            &[&["convert"][..], &said, &["-O", "raw", "a.vhd", "out.raw"]].concat(),
        );
        qemu_img(
            root,
            &["compare", "-f", "vpc", "-F", "raw", "a.vhd", "out.raw"],
        );
        for name in ["a.vhd", "out.raw"] {
            fs::remove_file(dir.path(name)).unwrap();
        }
    }
}

#[test]
fn differencing_images_lie_over_vhd_and_raw() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("base.raw"), vec![3; 3 << 20]).unwrap();
    good(
        root,
        &[
            "convert",
            "-f",
            "raw",
            "-o",
            "force_size=on",
            "base.raw",
            "base.vhd",
        ],
    );
    for (name, base, format) in [("a.vhd", "base.vhd", "vpc"), ("b.vhd", "base.raw", "raw")] {
        let made = good(root, &["create", "-b", base, "-F", format, name]);
        assert!(made.contains("differencing"), "{made}");
        good(root, &["check", name]);
        good(root, &["convert", "-O", "raw", name, "out.raw"]);
        assert!(fs::read(dir.path("out.raw")).unwrap() == fs::read(dir.path("base.raw")).unwrap());
        fs::remove_file(dir.path("out.raw")).unwrap();
    }
    // A qcow2 overlay names it as QEMU does.
    good(root, &["create", "-b", "base.vhd", "-F", "vhd", "c.qcow2"]);
    qemu_img(
        root,
        &["compare", "-f", "qcow2", "-F", "vpc", "c.qcow2", "base.vhd"],
    );
    let error = refused(
        root,
        &[
            "create",
            "-b",
            "base.vhd",
            "-F",
            "vhd",
            "-o",
            "subformat=fixed",
            "d.vhd",
        ],
    );
    assert!(error.contains("fixed"), "{error}");
    let error = refused(root, &["create", "-b", "c.qcow2", "-F", "qcow2", "d.vhd"]);
    assert!(error.contains("over vhd or raw"), "{error}");
}

#[test]
fn maps_are_those_of_qemu() {
    let dir = TempDir::new();
    let root = dir.root();
    good(root, &["create", "a.vhd", "8M"]);
    let map = ["map", "-f", "vpc", "--output=json", "a.vhd"];
    let ours = good(root, &[&["qemu-img"][..], &map].concat());
    assert_eq!(ours, qemu_img(root, &map));
}

/// Of a block of which little was written, QEMU leaves the rest a hole.
#[test]
fn sparse_disks_stay_sparse() {
    let dir = TempDir::new();
    let root = dir.root();
    let raw = fs::File::create(dir.path("in.raw")).unwrap();
    raw.set_len(64 << 20).unwrap();
    for block in 0..32 {
        raw.write_all_at(&[7; 4096], (block << 21) + 8192).unwrap();
    }
    good(root, &["convert", "-f", "raw", "in.raw", "a.vhd"]);
    let theirs = ["convert", "-f", "raw", "-O", "vpc", "in.raw", "b.vhd"];
    qemu_img(root, &theirs);
    let space = |name: &str| fs::metadata(dir.path(name)).unwrap().blocks() * 512;
    let (ours, theirs) = (space("a.vhd"), space("b.vhd"));
    assert!(
        // A convert writes 64 KiB at least.
        ours <= theirs + (32 << 16),
        "{ours} bytes on the host, QEMU's {theirs}"
    );
    qemu_img(
        root,
        &["compare", "-f", "vpc", "-F", "vpc", "a.vhd", "b.vhd"],
    );
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let dir = TempDir::new();
    let root = dir.root();
    good(root, &["create", "-f", "vpc", "a.vhd", "1M"]);
    good(root, &["create", "-o", "subformat=fixed", "f.vhd", "1M"]);
    for (args, said) in [
        (&["create", "b.vhd", "2041G"][..], "2040 GiB"),
        (&["info", "f.vhd"], "say -f vhd or -f raw"),
        (&["snapshot", "-l", "a.vhd"], "no internal snapshots"),
        (&["bitmap", "a.vhd"], "no bitmaps"),
        (&["amend", "-o", "size=2M", "a.vhd"], "no options to amend"),
        (&["resize", "--shrink", "a.vhd", "512K"], "cannot shrink"),
        (
            &["create", "-o", "preallocation=full", "b.vhd", "1M"],
            "only fixed ones",
        ),
        (
            &["create", "-o", "block_size=3000", "b.vhd", "1M"],
            "power of two",
        ),
    ] {
        let error = refused(root, args);
        assert!(error.contains(said), "{args:?}: {error}");
    }
}
