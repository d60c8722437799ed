//! VDI images through the commands, beside QEMU's.

use crate::common;

use common::{good, json, qemu_img, refused};
use std::fs;
use testkit::TempDir;

#[test]
fn images_are_converted_checked_and_grown() {
    let dir = TempDir::new();
    let root = dir.root();
    let bytes: Vec<u8> = (0..5u32 << 20).map(|i| (i >> 20) as u8 % 3).collect();
    fs::write(dir.path("in.raw"), bytes).unwrap();
    for (options, kind) in [
        ("static=off", "dynamic"),
        ("static=on", "static"),
        ("preallocation=falloc", "static"),
    ] {
        let args = ["convert", "-f", "raw", "-o", options, "in.raw", "a.vdi"];
        good(root, &args);
        qemu_img(
            root,
            &["compare", "-f", "vdi", "-F", "raw", "a.vdi", "in.raw"],
        );
        // Its magic is unmistakable.
        good(root, &["check", "a.vdi"]);
        let ours = good(root, &["map", "--json", "a.vdi"]);
        let theirs = qemu_img(root, &["map", "-f", "vdi", "--output=json", "a.vdi"]);
        if kind == "dynamic" {
            assert_eq!(json(&ours), json(&theirs), "{options}");
        }
        good(root, &["resize", "a.vdi", "+1M"]);
        qemu_img(root, &["check", "-f", "vdi", "a.vdi"]);
        let info = good(root, &["info", "--json", "a.vdi"]);
        assert_eq!(json(&info)["virtual-size"], 6 << 20, "{info}");
        assert_eq!(json(&info)["format"], "vdi");
        assert_eq!(json(&info)["cluster-size"], 1 << 20);
        assert_eq!(json(&info)["format-specific"]["type"], kind);
        good(root, &["convert", "-O", "raw", "a.vdi", "out.raw"]);
        qemu_img(
            root,
            &["compare", "-f", "vdi", "-F", "raw", "a.vdi", "out.raw"],
        );
        for name in ["a.vdi", "out.raw"] {
            fs::remove_file(dir.path(name)).unwrap();
        }
    }
    // It lies below others.
    qemu_img(root, &["create", "-q", "-f", "vdi", "base.vdi", "2M"]);
    good(root, &["create", "-b", "base.vdi", "-F", "vdi", "c.qcow2"]);
    qemu_img(
        root,
        &["compare", "-f", "qcow2", "-F", "vdi", "c.qcow2", "base.vdi"],
    );
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let dir = TempDir::new();
    let root = dir.root();
    good(root, &["create", "-f", "vdi", "a.vdi", "1M"]);
    for (args, said) in [
        (&["create", "b.vdi", "33T"][..], "too large for a vdi image"),
        (
            &["create", "-b", "a.vdi", "-F", "vdi", "b.vdi"],
            "no backing file",
        ),
        (&["snapshot", "-l", "a.vdi"], "no internal snapshots"),
        (&["bitmap", "a.vdi"], "no bitmaps"),
        (&["amend", "-o", "size=2M", "a.vdi"], "no options to amend"),
        (&["resize", "--shrink", "a.vdi", "512K"], "cannot shrink"),
        (
            &["resize", "--preallocation=full", "a.vdi", "2M"],
            "not preallocated",
        ),
        (
            &[
                "create",
                "-o",
                "static=off,preallocation=full",
                "b.vdi",
                "1M",
            ],
            "exclude each other",
        ),
        (&["create", "-o", "static=2", "b.vdi", "1M"], "on or off"),
        (
            &["convert", "-c", "a.vdi", "b.vdi"],
            "no compressed clusters",
        ),
    ] {
        let error = refused(root, args);
        assert!(error.contains(said), "{args:?}: {error}");
    }
}
