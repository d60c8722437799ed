//! Parallels images, as QEMU makes them and older ones, read through the commands.

use crate::common;

use common::{diskplane, good, json, qemu_img, refused, run};
use std::fs;
use testkit::TempDir;

/// Puts a 32-bit number into a file's bytes.
fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn images_are_read_as_by_qemu() {
    let dir = TempDir::new();
    let root = dir.root();
    for (size, cluster, old) in [
        ("10M", 1 << 20, false),
        ("10M", 1 << 20, true),
        ("1000000", 63 * 512, false),
        ("3000K", 64 << 10, true),
    ] {
        let options = format!("cluster_size={cluster}");
        let create = [
            "create",
            "-q",
            "-f",
            "parallels",
            "-o",
            &options,
            "a.hds",
            size,
        ];
        qemu_img(root, &create);
        let script = [
            "write -P 1 600k 100k",
            "write -P 2 0 1k",
            "write -P 3 900k 20k",
        ];
        let mut args = vec!["-f", "parallels", "a.hds"];
        args.extend(script.iter().flat_map(|line| ["-c", line]));
        assert!(run("qemu-io", root, &args).status.success());
        if old {
            // Entries are of sectors there, and the data begin where they are said to.
            let mut bytes = fs::read(dir.path("a.hds")).unwrap();
            bytes[..16].copy_from_slice(b"WithoutFreeSpace");
            let count = u32::from_le_bytes(bytes[32..36].try_into().unwrap()) as usize;
            for at in (0..count).map(|n| 64 + n * 4) {
                let entry = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                put(&mut bytes, at, entry * (cluster / 512) as u32);
            }
            // The upper half of the sectors is no part of the field.
            put(&mut bytes, 40, 7);
            fs::write(dir.path("a.hds"), bytes).unwrap();
        }
        let what = format!("{size} {options} {old}");
        let ours = json(&good(root, &["map", "--json", "a.hds"]));
        let theirs = json(&qemu_img(
            root,
            &["map", "-f", "parallels", "--output=json", "a.hds"],
        ));
        assert_eq!(ours, theirs, "{what}");
        let ours = json(&good(root, &["check", "--json", "a.hds"]));
        let theirs = json(&qemu_img(
            root,
            &["check", "-f", "parallels", "--output=json", "a.hds"],
        ));
        for field in [
            "total-clusters",
            "allocated-clusters",
            "fragmented-clusters",
            "image-end-offset",
        ] {
            assert_eq!(ours[field], theirs[field], "{what}: {field}");
        }
        good(root, &["convert", "-O", "raw", "a.hds", "out.raw"]);
        qemu_img(
            root,
            &[
                "compare",
                "-f",
                "parallels",
                "-F",
                "raw",
                "a.hds",
                "out.raw",
            ],
        );
        let info = json(&good(root, &["info", "--json", "a.hds"]));
        assert_eq!(info["format"], "parallels");
        assert_eq!(info["cluster-size"], cluster);
        for name in ["a.hds", "out.raw"] {
            fs::remove_file(dir.path(name)).unwrap();
        }
    }
}

#[test]
fn damage_is_found_and_writing_is_refused() {
    let dir = TempDir::new();
    let root = dir.root();
    qemu_img(root, &["create", "-q", "-f", "parallels", "a.hds", "4M"]);
    let args = [
        "-f",
        "parallels",
        "-c",
        "write 0 1k",
        "-c",
        "write 2M 1k",
        "a.hds",
    ];
    assert!(run("qemu-io", root, &args).status.success());
    let sound = fs::read(dir.path("a.hds")).unwrap();
    type Change = fn(&mut Vec<u8>);
    // What the check finds and exits with, and what a read of all says.
    let cases: [(Change, &str, i32, Option<&str>); 7] = [
        (|b| put(b, 44, 0x746f_6e59), "not closed correctly", 2, None),
        (|b| put(b, 48, 3), "where the data begin", 2, None),
        (
            |b| put(b, 64, 9),
            "outside the image",
            2,
            Some("it ends behind the file"),
        ),
        (
            |b| put(b, 64, u32::MAX),
            "outside the image",
            2,
            Some("cluster 0: its entry at byte 0x40"),
        ),
        (|b| put(b, 72, 1), "duplicate offset", 2, None),
        (|b| b.resize(5 << 20, 1), "space leaked at the end", 3, None),
        (
            |b| b.truncate(2_500_000),
            "outside the image",
            2,
            Some("it ends behind the file"),
        ),
    ];
    for (change, finding, code, read) in cases {
        let mut bytes = sound.clone();
        change(&mut bytes);
        fs::write(dir.path("b.hds"), &bytes).unwrap();
        let output = diskplane(root, &["check", "b.hds"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(finding), "{finding}: {said}");
        assert_eq!(output.status.code(), Some(code), "{said}");
        let convert = ["convert", "-O", "raw", "b.hds", "out.raw"];
        match read {
            None => {
                good(root, &convert);
                fs::remove_file(dir.path("out.raw")).unwrap();
            }
            Some(why) => {
                let error = refused(root, &convert);
                assert!(error.contains(why), "{finding}: {error}");
            }
        }
    }
    let lies: [(Change, &str); 7] = [
        (|b| b.truncate(66), "it is cut off"),
        (|b| put(b, 16, 3), "version at byte 16 is 3"),
        (|b| put(b, 28, 0), "sectors of a cluster at byte 28 are 0"),
        (|b| put(b, 28, u32::MAX), "sectors of a cluster"),
        (|b| put(b, 32, u32::MAX), "at most 33554432 are supported"),
        (|b| put(b, 40, u32::MAX), "sectors of the disk at byte 36"),
        (|b| b.truncate(40), "too short"),
    ];
    for (change, said) in lies {
        let mut bytes = sound.clone();
        change(&mut bytes);
        fs::write(dir.path("b.hds"), &bytes).unwrap();
        for command in ["info", "check"] {
            let error = refused(root, &[command, "-f", "parallels", "b.hds"]);
            assert!(error.contains(said), "{said}: {error}");
        }
    }
    // One that was not closed; there is nothing to repair of the other.
    let mut bytes = sound.clone();
    put(&mut bytes, 44, 0x746f_6e59);
    fs::write(dir.path("b.hds"), &bytes).unwrap();
    good(root, &["check", "--repair", "all", "a.hds"]);
    for (args, said) in [
        (
            &["serve", "a.hds", "--nbd", "unix:s"][..],
            "for reading only",
        ),
        (&["resize", "a.hds", "5M"], "for reading only"),
        (&["check", "--repair", "all", "b.hds"], "for reading only"),
        (
            &["create", "-f", "parallels", "b.hdd", "1M"],
            "for reading only",
        ),
        (
            &["convert", "-O", "parallels", "a.hds", "b.hdd"],
            "for reading only",
        ),
    ] {
        let error = refused(root, args);
        assert!(error.contains(said), "{args:?}: {error}");
    }
    assert!(fs::read(dir.path("a.hds")).unwrap() == sound);
}

#[test]
fn empty_images_are_made_in_qemu_imgs_place_as_by_it() {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lines = [
        "qemu-img create -f parallels a 4M",
        "qemu-img create -f parallels b 0",
        "qemu-img create -f parallels -o cluster_size=3k c 5000448",
        "qemu-img create -f parallels -o cluster_size=2M d 3T",
        "qemu-img create -f parallels -o cluster_size=1000 e 4M",
        "qemu-img create -f parallels -b a -F raw e 4M",
        "qemu-io -f parallels -c write_-P_7_1M_64k a",
        "qemu-img check -f parallels a",
        "qemu-img convert -f parallels -O raw a raw",
        "qemu-img map --output=json -f raw raw",
    ];
    crate::beside::same_in(theirs.path(), ours.path(), &lines);
    for name in ["a", "b", "c", "d", "raw"] {
        let read = |dir: &std::path::Path| fs::read(dir.join(name)).unwrap();
        assert!(read(theirs.path()) == read(ours.path()), "{name}");
    }
    // What could not be filled is not made.
    let error = crate::beside::outcome(
        &[env!("CARGO_BIN_EXE_diskplane"), "qemu-img"],
        ours.path(),
        "qemu-img convert -f raw -O parallels raw f",
    );
    assert!(
        error.contains("for reading only") && !ours.path().join("f").exists(),
        "{error}"
    );
}
