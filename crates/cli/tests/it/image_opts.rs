//! `--image-opts` of the commands that change images.

use crate::common;

use common::{good, json, qemu_img, refused};
use std::path::Path;
use testkit::{TempDir, qemu};

/// Runs a command on `file`, which is named by options, as JSON; what it said.
#[track_caller]
fn on(dir: &Path, command: &[&str], file: &str, rest: &[&str]) -> serde_json::Value {
    let name = format!("driver=qcow2,file.driver=file,file.filename={file}");
    let args = [command, &["--json", "--image-opts", &name], rest].concat();
    json(&good(dir, &args))
}

#[test]
fn every_command_takes_an_image_by_its_options() {
    let dir = TempDir::new();
    let dir = dir.root();
    let overlay = [
        "create",
        "-q",
        "-b",
        "a,b.qcow2",
        "-F",
        "qcow2",
        "-o",
        "extended_l2=off",
    ];
    good(dir, &["create", "-q", "a,b.qcow2", "1M"]);
    good(dir, &[&overlay[..], &["o.qcow2"]].concat());
    qemu::io("qcow2", dir.join("o.qcow2"), &["write -P 7 64k 64k"]);
    // A comma in a name is written twice.
    let (base, top) = ("a,,b.qcow2", "o.qcow2");
    let checked = on(dir, &["check"], top, &[]);
    assert_eq!(checked["allocated-clusters"], 1);
    on(dir, &["snapshot", "-c", "s"], top, &[]);
    assert_eq!(on(dir, &["snapshot", "-l"], top, &[])[0]["name"], "s");
    on(dir, &["snapshot", "-d", "s"], top, &[]);
    let bitmaps = on(dir, &["bitmap", "--add"], top, &["b"]);
    assert_eq!(bitmaps["bitmaps"][0]["name"], "b");
    on(dir, &["bitmap", "--remove"], top, &["b"]);
    assert_eq!(
        on(dir, &["amend", "-o", "lazy_refcounts=on"], top, &[])["lazy-refcounts"],
        true
    );
    assert_eq!(on(dir, &["resize"], top, &["2M"])["virtual-size"], 2 << 20);
    // The new backing file is looked for where the image is, whatever the options are called.
    let onto = on(dir, &["rebase", "-b", "a,b.qcow2", "-F", "qcow2"], top, &[]);
    assert_eq!(onto["backing-filename"], "a,b.qcow2");
    on(
        dir,
        &["rebase", "-u", "-b", "a,b.qcow2", "-F", "qcow2"],
        top,
        &[],
    );
    let copied = on(dir, &["commit"], top, &[]);
    assert_eq!(
        (&copied["copied"], &copied["base-grown-from"]),
        (&(64 << 10).into(), &(1 << 20).into())
    );
    assert_eq!(on(dir, &["check"], base, &[])["allocated-clusters"], 1);
    qemu_img(dir, &["compare", "a,b.qcow2", "o.qcow2"]);
    // As JSON without being asked to look for that.
    let name = "json:{'driver':'qcow2','file':{'filename':'o.qcow2'}}";
    good(dir, &["check", name]);
}

#[test]
fn what_is_for_reading_only_is_not_changed() {
    let dir = TempDir::new();
    let dir = dir.root();
    good(dir, &["create", "-q", "a.qcow2", "1M"]);
    good(
        dir,
        &["create", "-q", "-b", "a.qcow2", "-F", "qcow2", "o.qcow2"],
    );
    let before = ["a.qcow2", "o.qcow2"].map(|name| std::fs::read(dir.join(name)).unwrap());
    let fixed = "driver=qcow2,read-only=on,file.filename=o.qcow2";
    let below = "driver=qcow2,file.filename=o.qcow2,backing.driver=qcow2,backing.file.filename=a.qcow2,\
                 backing.file.read-only=on";
    let shared = "driver=qcow2,force-share=on,file.filename=o.qcow2";
    let part = "driver=raw,offset=512,file.filename=o.qcow2";
    for (args, why) in [
        (
            &["check", "-r", "all", "--image-opts", fixed][..],
            "read-only",
        ),
        (&["snapshot", "-c", "s", "--image-opts", fixed], "read-only"),
        (
            &["bitmap", "--add", "--image-opts", fixed, "b"],
            "read-only",
        ),
        (
            &["amend", "-o", "compat=0.10", "--image-opts", fixed],
            "read-only",
        ),
        (&["resize", "--image-opts", fixed, "2M"], "read-only"),
        (
            &["rebase", "-u", "-b", "", "--image-opts", fixed],
            "read-only",
        ),
        (&["commit", "--image-opts", below], "read-only"),
        (
            &["snapshot", "-c", "s", "--image-opts", shared],
            "for reading only",
        ),
        (&["check", "--image-opts", part], "a part of a file"),
        (&["resize", "--image-opts", part, "2M"], "a part of a file"),
        (&["check", "--image-opts", "o.qcow2"], "o.qcow2"),
        (
            &[
                "check",
                "-f",
                "raw",
                "--image-opts",
                "driver=qcow2,file.filename=o.qcow2",
            ],
            "contradict",
        ),
    ] {
        let error = refused(dir, args);
        assert!(error.contains(why), "{args:?}: {error}");
    }
    let after = ["a.qcow2", "o.qcow2"].map(|name| std::fs::read(dir.join(name)).unwrap());
    assert!(before == after);
}
