//! Images in formats that QEMU reads and diskplane does not: told, and never taken as raw disks without a word.

use crate::common;

use common::{diskplane, failure, good, qemu_img, refused};
use std::fs;
use testkit::TempDir;

#[test]
fn an_image_that_only_qemu_reads_is_refused_with_its_format() {
    let dir = TempDir::new();
    let root = dir.root();
    qemu_img(root, &["create", "-q", "-f", "qcow", "old", "10M"]);
    let overlay = [
        "create", "-q", "-f", "qcow2", "-b", "old", "-F", "qcow", "above",
    ];
    qemu_img(root, &overlay);
    for (args, code) in [
        (&["convert", "old", "new.qcow2"][..], 1),
        (&["info", "old"], 1),
        (&["info", "--backing-chain", "above"], 1),
        (&["serve", "old", "--read-only", "--nbd", "unix:sock"], 1),
        (&["compare", "old", "old"], 2),
        (&["qemu-img", "convert", "old", "new.qcow2"], 1),
        (&["qemu-img", "info", "old"], 1),
        (&["qemu-img", "check", "old"], 1),
        (&["qemu-img", "dd", "if=old", "of=new.qcow2"], 1),
    ] {
        let said = failure(args, &diskplane(root, args), code);
        let named =
            said.contains("format qcow version 1") || said.contains("'qcow' is not supported");
        assert!(named, "{args:?}: {said}");
        assert!(!dir.path("new.qcow2").exists(), "{args:?}");
    }
    // Who says that its bytes are a disk gets them.
    good(root, &["convert", "-f", "raw", "-O", "raw", "old", "same"]);
    let [old, same] = ["old", "same"].map(|name| fs::read(dir.path(name)).unwrap());
    // Up to whole sectors.
    assert!(same.starts_with(&old) && same.len() == old.len().next_multiple_of(512));
    // As large as a disk, and at its end what an Apple disk image has there.
    let mut bytes = vec![0; 4096];
    bytes[3584..3596].copy_from_slice(b"koly\0\0\0\x04\0\0\x02\0");
    fs::write(dir.path("apple"), bytes).unwrap();
    let said = refused(root, &["convert", "apple", "new.qcow2"]);
    assert!(said.contains("format dmg, "), "{said}");
}
