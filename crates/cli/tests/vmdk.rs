//! VMDK images through the commands, beside QEMU's.

#[allow(dead_code)]
mod common;

use common::{diskplane, failure, good, json, qemu_img, refused};
use std::fs;
use std::os::unix::fs::FileExt;
use testkit::TempDir;

#[test]
fn images_are_converted_and_checked() {
    let dir = TempDir::new();
    let root = dir.root();
    let mut state = 1u32;
    let bytes: Vec<u8> = (0..(3u32 << 20) + 512 * 7)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Zeros, something that packs well, and something that does not.
            match (i >> 18) % 3 {
                0 => 0,
                1 => (i >> 12) as u8,
                _ => (state >> 24) as u8,
            }
        })
        .collect();
    fs::write(dir.path("in.raw"), &bytes).unwrap();
    for (subformat, options, files) in [
        ("monolithicSparse", "", 1),
        ("monolithicSparse", ",zeroed_grain=on", 1),
        ("monolithicFlat", "", 2),
        ("twoGbMaxExtentSparse", ",adapter_type=lsilogic", 2),
        ("twoGbMaxExtentFlat", "", 2),
        ("streamOptimized", "", 1),
    ] {
        let options = format!("subformat={subformat}{options}");
        good(
            root,
            &["convert", "-f", "raw", "-o", &options, "in.raw", "a.vmdk"],
        );
        let compare = ["compare", "-f", "vmdk", "-F", "raw", "a.vmdk", "in.raw"];
        qemu_img(root, &compare);
        qemu_img(root, &["check", "-q", "a.vmdk"]);
        assert!(good(root, &["check", "a.vmdk"]).contains("No errors"));
        let info = json(&good(root, &["info", "--json", "a.vmdk"]));
        assert_eq!(info["virtual-size"], bytes.len());
        assert_eq!(info["format"], "vmdk");
        assert_eq!(info["format-specific"]["create type"], subformat);
        let theirs = json(&qemu_img(root, &["info", "--output=json", "a.vmdk"]));
        let cid = theirs["format-specific"]["data"]["cid"].as_u64().unwrap();
        assert_eq!(info["format-specific"]["cid"], format!("{cid:08x}"));
        good(root, &compare);
        qemu_img(
            root,
            &[
                "convert", "-f", "raw", "-O", "vmdk", "-o", &options, "in.raw", "q.vmdk",
            ],
        );
        good(
            root,
            &["compare", "-f", "vmdk", "-F", "raw", "q.vmdk", "in.raw"],
        );
        assert!(good(root, &["check", "q.vmdk"]).contains("No errors"));
        if subformat == "streamOptimized" {
            let line = refused(
                root,
                &[
                    "convert", "-n", "-f", "raw", "-O", "vmdk", "in.raw", "q.vmdk",
                ],
            );
            assert!(line.contains("streamOptimized"), "{line}");
            let map = json(&good(root, &["map", "--json", "q.vmdk"]));
            assert!(
                map.as_array()
                    .unwrap()
                    .iter()
                    .any(|e| e["compressed"] == true)
            );
        }
        let mut made = 0;
        for entry in fs::read_dir(root).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            made += u32::from(name.starts_with('a'));
            if name.ends_with(".vmdk") {
                fs::remove_file(path).unwrap();
            }
        }
        assert_eq!(made, files, "{options}");
    }
}

/// Nothing is left of an image of several files that was not finished, and nothing is taken that was there.
#[test]
fn extents_that_are_there_already_stay() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("a-flat.vmdk"), "mine").unwrap();
    let flat = ["-o", "subformat=monolithicFlat", "a.vmdk"];
    let line = refused(root, &[&["create"][..], &flat, &["1M"]].concat());
    assert!(line.contains("a-flat.vmdk"), "{line}");
    fs::write(dir.path("in.raw"), [1; 4096]).unwrap();
    let line = refused(
        root,
        &[
            "convert",
            "-f",
            "raw",
            "-o",
            "subformat=monolithicFlat",
            "in.raw",
            "a.vmdk",
        ],
    );
    assert!(line.contains("a-flat.vmdk"), "{line}");
    assert_eq!(fs::read(dir.path("a-flat.vmdk")).unwrap(), b"mine");
    assert!(!dir.path("a.vmdk").exists());
    assert_eq!(fs::read_dir(root).unwrap().count(), 2);
}

/// What `check` finds: each kind of damage, and the one that is repaired.
#[test]
fn checks_say_what_is_wrong() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("in.raw"), vec![7; 1 << 20]).unwrap();
    good(root, &["convert", "-f", "raw", "in.raw", "good.vmdk"]);
    let sound = fs::read(dir.path("good.vmdk")).unwrap();
    let word = |at: usize| u32::from_le_bytes(sound[at..at + 4].try_into().unwrap());
    // Redundant directory at sector 21, then its table; the other directory, and its table.
    let redundant = word(21 * 512) as usize * 512;
    let table = word(26 * 512) as usize * 512;
    assert_eq!(sound[redundant..redundant + 64], sound[table..table + 64]);
    for (at, entry, code, says) in [
        (table, 0x00ff_0000, 2, "behind the end of the file"),
        (table, 3, 2, "where header, descriptor and tables are"),
        (table, word(table + 4), 2, "overlap"),
        (table, 30, 2, "where header, descriptor and tables are"),
        (26 * 512, 0x00ff_0000, 2, "is not in the file"),
        (redundant, 0, 3, "differs from the other in 1 entries"),
    ] {
        fs::write(dir.path("bad.vmdk"), &sound).unwrap();
        let file = fs::OpenOptions::new()
            .write(true)
            .open(dir.path("bad.vmdk"))
            .unwrap();
        file.write_all_at(&u32::to_le_bytes(entry), at as u64)
            .unwrap();
        let args = ["check", "bad.vmdk"];
        let text = failure(&args, &diskplane(root, &args), code);
        assert!(text.contains(says), "{entry:#x}: {text}");
        if code == 3 {
            good(root, &["check", "--repair", "leaks", "bad.vmdk"]);
            assert!(fs::read(dir.path("bad.vmdk")).unwrap() == sound);
        }
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let dir = TempDir::new();
    let root = dir.root();
    good(root, &["create", "a.vmdk", "1M"]);
    good(root, &["create", "-b", "a.vmdk", "-F", "vmdk", "o.vmdk"]);
    good(root, &["create", "-f", "qcow2", "q.qcow2", "1M"]);
    let over = json(&qemu_img(root, &["info", "--output=json", "o.vmdk"]));
    assert_eq!(over["backing-filename"], "a.vmdk");
    for (args, said) in [
        (&["snapshot", "-l", "a.vmdk"][..], "no internal snapshots"),
        (&["bitmap", "a.vmdk"], "no bitmaps"),
        (&["amend", "-o", "size=2M", "a.vmdk"], "no options to amend"),
        (&["resize", "a.vmdk", "2M"], "cannot be resized"),
        (
            &["measure", "-O", "vmdk", "--size", "1M"],
            "cannot be measured",
        ),
        (
            &["rebase", "-u", "-b", "q.qcow2", "-F", "qcow2", "o.vmdk"],
            "lies over vmdk",
        ),
        (
            &[
                "create",
                "-o",
                "subformat=monolithicFlat",
                "-b",
                "a.vmdk",
                "-F",
                "vmdk",
                "b.vmdk",
            ],
            "Flat image can't have backing file",
        ),
        (
            &[
                "create",
                "-o",
                "subformat=monolithicFlat,zeroed_grain=on",
                "b.vmdk",
                "1M",
            ],
            "Flat image can't enable zeroed grain",
        ),
        (
            &["create", "-o", "compat6=on,hwversion=7", "b.vmdk", "1M"],
            "compat6 cannot be enabled with hwversion set",
        ),
        (
            &["create", "-b", "q.qcow2", "-F", "qcow2", "b.vmdk"],
            "lies over vmdk",
        ),
        (
            &["create", "-o", "subformat=flat", "b.vmdk", "1M"],
            "monolithicFlat",
        ),
        (&["create", "b.vmdk", "0"], "1 to"),
        (
            &[
                "create",
                "-o",
                "subformat=twoGbMaxExtentFlat",
                "b.vmdk",
                "3T",
            ],
            "the most is 1024",
        ),
        (
            &[
                "convert", "-c", "-f", "vmdk", "-O", "vmdk", "a.vmdk", "b.vmdk",
            ],
            "subformat=streamOptimized",
        ),
    ] {
        let error = refused(root, args);
        assert!(error.contains(said), "{args:?}: {error}");
    }
    assert!(!dir.path("b.vmdk").exists());
}
