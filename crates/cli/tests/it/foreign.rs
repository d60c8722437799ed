//! Images of formats that are only read, through the commands and in qemu-img's place.

use crate::common;

use common::{good, json, qemu_img, refused};
use std::fs;
use std::path::Path;
use testkit::TempDir;
use testkit::dmg::{IGNORED, RAW, Tables, ZERO, ZLIB};

/// Images with their formats, as files in `root`, and what all of them read as.
fn images(root: &Path) -> ([(&'static str, &'static str); 4], Vec<u8>) {
    let mut disk: Vec<u8> = (0..1u32 << 20).map(|at| (at >> 9) as u8 | 1).collect();
    disk[300 << 10..500 << 10].fill(0);
    let stored = testkit::cloop::stored;
    let part = |from: usize, sectors: u64| disk[from << 9..(from + sectors as usize) << 9].to_vec();
    let chunks = [
        (ZLIB, 512, stored(&part(0, 512))),
        (RAW, 88, part(512, 88)),
        (ZERO, 300, Vec::new()),
        (IGNORED, 100, Vec::new()),
        (RAW, 48, part(1000, 48)),
        (ZLIB, 1000, stored(&part(1048, 1000))),
    ];
    let write = |name: &str, bytes: Vec<u8>| fs::write(root.join(name), bytes).unwrap();
    write("a.bochs", testkit::bochs::image(false, 4096, &disk));
    write("a.cloop", testkit::cloop::image(65536, &disk, stored));
    write("a.dmg", testkit::dmg::image(&chunks, Tables::List));
    write("fork.dmg", testkit::dmg::image(&chunks, Tables::Fork));
    let names = [
        ("a.bochs", "bochs"),
        ("a.cloop", "cloop"),
        ("a.dmg", "dmg"),
        ("fork.dmg", "dmg"),
    ];
    (names, disk)
}

#[test]
fn images_are_known_converted_and_never_written() {
    let dir = TempDir::new();
    let root = dir.root();
    let (images, disk) = images(root);
    for (name, format) in images {
        let before = fs::read(dir.path(name)).unwrap();
        let info = json(&good(root, &["info", "--json", name]));
        assert_eq!(
            (&info["format"], &info["virtual-size"]),
            (&format.into(), &disk.len().into())
        );
        good(root, &["convert", name, "out.raw"]);
        assert!(fs::read(dir.path("out.raw")).unwrap() == disk, "{name}");
        fs::remove_file(dir.path("out.raw")).unwrap();
        let map = json(&good(root, &["map", "--json", name]));
        assert!(map.as_array().is_some_and(|runs| !runs.is_empty()), "{map}");
        for (args, said) in [
            (&["serve", name, "--nbd", "unix:s"][..], "for reading only"),
            (&["resize", name, "2M"], "for reading only"),
            (&["convert", "-O", format, name, "x"], "for reading only"),
            (&["create", "-f", format, "x", "1M"], "for reading only"),
            (&["check", name], "no metadata to check"),
        ] {
            let output = common::diskplane(root, args);
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(
                !output.status.success() && error.contains(said),
                "{args:?}: {error}"
            );
        }
        assert!(fs::read(dir.path(name)).unwrap() == before, "{name}");
    }
    // A guest may have written such an end; and what is damaged is not taken as raw.
    fs::rename(dir.path("a.dmg"), dir.path("apple")).unwrap();
    let error = refused(root, &["convert", "apple", "x.raw"]);
    assert!(error.contains("say -f dmg or -f raw"), "{error}");
    good(root, &["convert", "-f", "dmg", "apple", "x.raw"]);
    assert!(fs::read(dir.path("x.raw")).unwrap() == disk);
}

#[test]
fn in_qemu_imgs_place_they_are_as_by_it() {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut lines = Vec::new();
    let (names, _) = images(theirs.path());
    images(ours.path());
    for (name, format) in names {
        lines.extend([
            format!("qemu-img info {name}"),
            format!("qemu-img info --output=json -f {format} {name}"),
            format!("qemu-img check -f {format} {name}"),
            format!("qemu-img resize -f {format} {name} 2M"),
            format!("qemu-img convert -O raw {name} {name}.raw"),
            format!("qemu-img convert -O {format} {name} x"),
            format!("qemu-img create -f {format} x 1M"),
            format!("qemu-img amend -f {format} -o help"),
            format!("qemu-img map --output=json -f raw {name}.raw"),
            format!("qemu-img compare -f {format} {name} -F raw {name}.raw"),
        ]);
    }
    // By its name, whatever is in it; and by nothing else.
    lines.extend(
        [
            "cp a.dmg b",
            "qemu-img info b",
            "cp a.bochs c.dmg",
            "qemu-img info c.dmg",
        ]
        .map(str::to_owned),
    );
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    crate::beside::same_in(theirs.path(), ours.path(), &lines);
    let raw = fs::read(ours.path().join("a.dmg.raw")).unwrap();
    assert!(raw == fs::read(theirs.path().join("a.dmg.raw")).unwrap());
}

#[test]
fn an_overlay_may_lie_over_them() {
    let dir = TempDir::new();
    let root = dir.root();
    let (images, disk) = images(root);
    for (name, format) in images {
        qemu_img(
            root,
            &[
                "create", "-q", "-f", "qcow2", "-b", name, "-F", format, "top",
            ],
        );
        good(root, &["convert", "--allow-backing", ".", "top", "out.raw"]);
        assert!(fs::read(dir.path("out.raw")).unwrap() == disk, "{name}");
        fs::remove_file(dir.path("out.raw")).unwrap();
    }
}
