//! LUKS volumes through the commands, beside QEMU's.

use crate::common;

use common::{good, json, qemu_img, refused};
use std::fs;
use std::path::Path;
use testkit::TempDir;

/// How QEMU's tools are told of the secrets.
const ONE: &str = "secret,id=one,file=one";
const TWO: &str = "secret,id=two,file=two";

fn opts(image: &str, secret: &str) -> String {
    format!("driver=luks,file.filename={image},key-secret={secret}")
}

/// Whether QEMU reads the volume as the raw file with that secret.
#[track_caller]
fn qemu_compares(root: &Path, image: &str, secret: &str, raw: &str) {
    let (opts, raw) = (
        opts(image, secret),
        format!("driver=raw,file.filename={raw}"),
    );
    let args = [
        "compare",
        "--object",
        ONE,
        "--object",
        TWO,
        "--image-opts",
        &opts,
        &raw,
    ];
    qemu_img(root, &args);
}

fn secrets(dir: &TempDir) {
    fs::write(dir.path("one"), "one sesame").unwrap();
    fs::write(dir.path("two"), "two sesame").unwrap();
}

#[test]
fn volumes_are_converted_grown_and_measured() {
    let dir = TempDir::new();
    let root = dir.root();
    secrets(&dir);
    let bytes: Vec<u8> = (0..3u32 << 20).map(|i| (i >> 19) as u8 % 3).collect();
    fs::write(dir.path("in.raw"), bytes).unwrap();
    let made = "iter-time=10,cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv";
    let key = ["--key-file", "one"];
    let args = [
        "convert", "-f", "raw", "-O", "luks", "-o", made, "in.raw", "a.luks",
    ];
    good(root, &[&args[..], &key].concat());
    qemu_compares(root, "a.luks", "one", "in.raw");
    let measured = good(
        root,
        &[
            "measure", "--json", "-O", "luks", "-o", made, "--size", "3M",
        ],
    );
    let length = fs::metadata(dir.path("a.luks")).unwrap().len();
    assert_eq!(json(&measured)["required"], length);
    // What qemu-img says of it, without a key, and by its magic.
    let ours = json(&good(root, &["info", "--json", "a.luks"]));
    let theirs = json(&qemu_img(root, &["info", "--output=json", "a.luks"]));
    assert_eq!(ours["virtual-size"], theirs["virtual-size"]);
    let (format, data) = (
        &ours["encrypt"]["format"],
        &theirs["format-specific"]["data"],
    );
    assert_eq!(format, "luks");
    for field in [
        "slots",
        "uuid",
        "cipher-alg",
        "ivgen-alg",
        "hash-alg",
        "payload-offset",
        "detached-header",
    ] {
        assert_eq!(ours["encrypt"][field], data[field], "{field}");
    }
    let drop_in = json(&good(
        root,
        &["qemu-img", "info", "--output=json", "a.luks"],
    ));
    assert_eq!(drop_in["format-specific"], theirs["format-specific"]);
    // Back, with qcow2 between.
    let to_qcow2 = ["convert", "-f", "luks", "-O", "qcow2", "a.luks", "b.qcow2"];
    good(root, &[&to_qcow2[..], &key].concat());
    qemu_img(
        root,
        &["compare", "-f", "qcow2", "-F", "raw", "b.qcow2", "in.raw"],
    );
    good(
        root,
        &[&["convert", "-O", "raw", "a.luks", "out.raw"][..], &key].concat(),
    );
    assert!(fs::read(dir.path("out.raw")).unwrap() == fs::read(dir.path("in.raw")).unwrap());
    good(root, &["resize", "--key-file", "one", "a.luks", "4M"]);
    let info = qemu_img(root, &["info", "--output=json", "a.luks"]);
    assert_eq!(json(&info)["virtual-size"], 4 << 20);
    good(
        root,
        &["resize", "--key-file", "one", "--shrink", "a.luks", "3M"],
    );
    qemu_compares(root, "a.luks", "one", "in.raw");
}

#[test]
fn key_slots_are_filled_and_erased() {
    let dir = TempDir::new();
    let root = dir.root();
    secrets(&dir);
    fs::write(dir.path("in.raw"), vec![7; 1 << 20]).unwrap();
    let args = [
        "convert",
        "-f",
        "raw",
        "-O",
        "luks",
        "-o",
        "iter-time=10,preallocation=falloc",
    ];
    good(
        root,
        &[&args[..], &["--key-file", "one", "in.raw", "a.luks"]].concat(),
    );
    let amend = |options: &str| {
        let args = [
            "amend",
            "--object",
            TWO,
            "--key-file",
            "one",
            "-o",
            options,
            "a.luks",
        ];
        good(root, &args)
    };
    let said = amend("state=active,new-secret=two,iter-time=10");
    assert!(said.contains("2 of 8 key slots"), "{said}");
    qemu_compares(root, "a.luks", "two", "in.raw");
    let said = amend("encrypt.state=inactive,encrypt.keyslot=0");
    assert!(said.contains("1 of 8 key slots"), "{said}");
    qemu_compares(root, "a.luks", "two", "in.raw");
    let read = [
        "convert",
        "-O",
        "raw",
        "--key-file",
        "one",
        "a.luks",
        "out.raw",
    ];
    let error = refused(root, &read);
    assert!(error.contains("wrong passphrase"), "{error}");
    let error = refused(root, &["amend", "--force", "-o", "size=2M", "a.luks"]);
    assert!(error.contains("only keys can be amended"), "{error}");
    good(root, &["create", "a.qcow2", "1M"]);
    let error = refused(
        root,
        &["amend", "-o", "state=inactive,keyslot=1", "a.qcow2"],
    );
    assert!(error.contains("begin with encrypt."), "{error}");
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let dir = TempDir::new();
    let root = dir.root();
    secrets(&dir);
    let create = ["create", "-f", "luks", "--key-file", "one", "-o"];
    good(
        root,
        &[&create[..], &["iter-time=10", "a.luks", "1M"]].concat(),
    );
    let mut detached = fs::read(dir.path("a.luks")).unwrap();
    detached[104..108].fill(0);
    fs::write(dir.path("d.luks"), &detached).unwrap();
    fs::write(dir.path("cut.luks"), &detached[..4096]).unwrap();
    let mut cut = detached.clone();
    cut[104..108].copy_from_slice(&0xfff_ffffu32.to_be_bytes());
    fs::write(dir.path("far.luks"), &cut).unwrap();
    let say = |options: &'static str| [&create[..], &[options, "b.luks", "1M"]].concat();
    for (args, said) in [
        (
            vec!["create", "-f", "luks", "b.luks", "1M"],
            "needs a passphrase",
        ),
        (say("detached-header=on"), "in another file"),
        (say("preallocation=metadata"), "off, falloc or full"),
        (say("cipher-alg=cast5-128"), "is not supported"),
        (say("encrypt.format=luks"), "has no such option"),
        (
            vec!["convert", "-O", "raw", "a.luks", "b.raw"],
            "give its passphrase",
        ),
        (vec!["info", "-f", "luks", "d.luks"], "a detached header"),
        (vec!["info", "far.luks"], "end behind the file's end"),
        (vec!["snapshot", "-l", "a.luks"], "no internal snapshots"),
        (
            vec![
                "create",
                "-f",
                "luks",
                "--key-file",
                "one",
                "b.luks",
                "9223372036854775296",
            ],
            "too large",
        ),
    ] {
        let error = refused(root, &args);
        assert!(error.contains(said), "{args:?}: {error}");
    }
}
