//! qcow images of version 1 through the commands, and in qemu-img's place.

use crate::common;

use common::{diskplane, good, json, qemu_img, refused, run};
use serde_json::Value;
use std::fs;
use testkit::TempDir;

#[test]
fn images_are_made_converted_mapped_and_committed() {
    let dir = TempDir::new();
    let root = dir.root();
    let disk: Vec<u8> = (0..3u32 << 20).map(|n| (n >> 11) as u8 | 1).collect();
    fs::write(dir.path("disk.raw"), &disk).unwrap();
    let said = good(root, &["create", "empty.qcow", "1M"]);
    assert!(said.contains("qcow, 1 MiB, clusters of 4 KiB"), "{said}");
    good(root, &["convert", "disk.raw", "-f", "raw", "a.qcow"]);
    good(
        root,
        &["convert", "-c", "disk.raw", "-f", "raw", "packed.qcow"],
    );
    let len = |name: &str| fs::metadata(dir.path(name)).unwrap().len();
    assert!(len("packed.qcow") < len("a.qcow") / 10);
    for name in ["a.qcow", "packed.qcow"] {
        qemu_img(
            root,
            &["convert", "-f", "qcow", "-O", "raw", name, "theirs.raw"],
        );
        assert!(fs::read(dir.path("theirs.raw")).unwrap() == disk, "{name}");
        let ours = json(&good(root, &["map", "--json", name]));
        let theirs = json(&qemu_img(
            root,
            &["map", "-f", "qcow", "--output=json", name],
        ));
        let runs = |map: &Value| -> Vec<Vec<Value>> {
            let fields = [
                "start",
                "length",
                "data",
                "zero",
                "depth",
                "compressed",
                "offset",
            ];
            let all = map.as_array().expect("runs").iter();
            all.map(|run| fields.map(|field| run[field].clone()).to_vec())
                .collect()
        };
        assert_eq!(runs(&ours), runs(&theirs), "{name}");
    }
    let info = json(&good(root, &["info", "--json", "packed.qcow"]));
    assert_eq!(info["format"], "qcow");
    // An overlay, of which the image does not say what it lies over.
    good(root, &["create", "-b", "a.qcow", "-F", "qcow", "top.qcow"]);
    assert!(
        run(
            "qemu-io",
            root,
            &["-f", "qcow", "-c", "write -P 9 1M 64k", "top.qcow"]
        )
        .status
        .success()
    );
    good(root, &["commit", "--allow-backing", ".", "top.qcow"]);
    let mut model = disk;
    model[1 << 20..(1 << 20) + (64 << 10)].fill(9);
    qemu_img(
        root,
        &["convert", "-f", "qcow", "-O", "raw", "a.qcow", "theirs.raw"],
    );
    assert!(fs::read(dir.path("theirs.raw")).unwrap() == model);
    assert!(len("top.qcow") < 1024);
    for (args, said) in [
        (&["resize", "a.qcow", "8M"][..], "cannot be resized"),
        (
            &["rebase", "-u", "-b", "x", "-F", "raw", "top.qcow"],
            "cannot get another backing file",
        ),
        (&["create", "-f", "qcow", "x", "17T"], "the most is 16 TiB"),
        (&["create", "-f", "qcow", "x", "0"], "1 sector"),
        (
            &["create", "-f", "qcow", "-o", "encryption=on", "x", "1M"],
            "not safe",
        ),
    ] {
        let error = refused(root, args);
        assert!(error.contains(said), "{args:?}: {error}");
    }
    let check = diskplane(root, &["check", "a.qcow"]);
    assert_eq!(check.status.code(), Some(63));
}

#[test]
fn in_qemu_imgs_place_they_are_as_by_it() {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lines = [
        "qemu-img create -f qcow a 4M",
        "qemu-img create -f qcow b 1000000",
        "qemu-img create -f qcow c 0",
        "qemu-img create -f qcow -o help",
        "qemu-img create -f qcow -b a -F qcow over",
        "qemu-io -f qcow -c write_-P_7_1M_64k a",
        "qemu-img info --output=json over",
        "qemu-img map --output=json a",
        "qemu-img check a",
        "qemu-img resize a 8M",
        "qemu-img amend -f qcow -o size=8M a",
        "qemu-img measure -O qcow a",
        "qemu-img rebase -u -b x -F raw over",
        "qemu-img convert -O qcow -f raw a d",
        "qemu-img convert -f qcow -O raw over raw",
        "qemu-io -f qcow -c write_-P_5_64k_1k over",
        "qemu-img commit over",
        "qemu-img map --output=json over",
        "qemu-img convert -f qcow -O raw a raw2",
    ];
    crate::beside::same_in(theirs.path(), ours.path(), &lines);
    for name in ["b", "raw", "raw2"] {
        let read = |dir: &std::path::Path| fs::read(dir.join(name)).unwrap();
        assert!(read(theirs.path()) == read(ours.path()), "{name}");
    }
}

/// QEMU's first encryption: nobody writes it any more, but what is there can be read and converted.
#[test]
fn encrypted_images_are_read() {
    let dir = TempDir::new();
    let root = dir.root();
    let secret = "secret,id=s,data=12345678";
    fs::write(dir.path("key"), "12345678").unwrap();
    for format in ["qcow", "qcow2"] {
        let options = "encrypt.format=aes,encrypt.key-secret=s";
        qemu_img(
            root,
            &[
                "create", "-q", "--object", secret, "-f", format, "-o", options, "a", "1M",
            ],
        );
        let image = format!("driver={format},encrypt.key-secret=s,file.filename=a");
        let io = [
            "--object",
            secret,
            "--image-opts",
            "-c",
            "write -P 7 100k 20k",
            &image,
        ];
        assert!(run("qemu-io", root, &io).status.success());
        good(
            root,
            &["convert", "--key-file", "key", "a", "b.raw", "-f", format],
        );
        let mut disk = vec![0; 1 << 20];
        disk[100 << 10..120 << 10].fill(7);
        assert!(fs::read(dir.path("b.raw")).unwrap() == disk, "{format}");
        fs::remove_file(dir.path("b.raw")).unwrap();
        let error = refused(root, &["convert", "a", "b.raw", "-f", format]);
        assert!(error.contains("is encrypted (AES)"), "{error}");
        let error = refused(
            root,
            &[
                "serve",
                "--key-file",
                "key",
                "a",
                "-f",
                format,
                "--nbd",
                "unix:s",
            ],
        );
        assert!(error.contains("nobody writes it any more"), "{error}");
    }
}
