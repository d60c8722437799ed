//! `check` beside `qemu-img check`: exit status, figures, words.

use crate::common;

use common::run;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use testkit::forge::{Forge, Shape};
use testkit::{TempDir, qemu};

fn diskplane(dir: &Path, args: &[&str]) -> Output {
    common::diskplane(dir, &[&["check"], args].concat())
}

fn qemu_img(dir: &Path, args: &[&str]) -> Output {
    run("qemu-img", dir, &[&["check"], args].concat())
}

/// Exit status, stdout, stderr.
fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    (output.status.code(), stdout, stderr)
}

/// Images with clusters of 4 KiB: a header, a refcount table and block, an L1 table, L2 tables, data.
fn plain() -> Forge {
    Forge::new(Shape::default()).data(0, 1).data(1, 2)
}

/// What is said of images, and what QEMU says.
#[test]
fn figures_and_status_are_those_of_qemu() {
    let dir = TempDir::new();
    let leak = |image: &mut Forge| {
        let at = image.allocate(2) / image.cluster();
        (at..at + 2).for_each(|cluster| image.set_refcount(cluster, 1));
    };
    let sound = plain();
    let mut leaking = plain();
    leak(&mut leaking);
    let mut corrupt = plain();
    corrupt.set_refcount(0, 3);
    corrupt.set_refcount(1, 0);
    let mut both = corrupt.clone();
    leak(&mut both);
    for (name, image, status, after) in [
        ("sound", &sound, [0, 0, 0], 0),
        ("leaking", &leaking, [3, 0, 0], 0),
        ("corrupt", &corrupt, [2, 1, 0], 0),
        ("both", &both, [2, 1, 0], 0),
    ] {
        for (nth, repair) in ["", "leaks", "all"].into_iter().enumerate() {
            let write = |name: &str| fs::write(dir.path(name), &image.bytes).unwrap();
            write("a.qcow2");
            let args = |json| match repair {
                "" => vec![json, "a.qcow2"],
                repair => vec![json, "-r", repair, "a.qcow2"],
            };
            let ours = diskplane(dir.root(), &args("--json"));
            write("a.qcow2");
            let theirs = qemu_img(dir.root(), &args("--output=json"));
            let what = format!("{name}, repair '{repair}'");
            assert_eq!(ours.status.code(), Some(status[nth]), "{what}");
            assert_eq!(ours.status.code(), theirs.status.code(), "{what}");
            if theirs.status.code() != Some(1) {
                let mut ours: Value = serde_json::from_slice(&ours.stdout).unwrap();
                let theirs: Value = serde_json::from_slice(&theirs.stdout).unwrap();
                let fields = ours.as_object_mut().unwrap();
                // Ours alone.
                fields.retain(|name, _| !["findings", "overlaps"].contains(&name.as_str()));
                // A rebuild puts the refcounts behind the file's end.
                if repair == "all" && status[0] == 2 {
                    fields.insert(
                        "image-end-offset".into(),
                        theirs["image-end-offset"].clone(),
                    );
                }
                assert_eq!(ours, theirs, "{what}");
            }
        }
        // What is left of the last, by QEMU.
        fs::write(dir.path("a.qcow2"), &image.bytes).unwrap();
        diskplane(dir.root(), &["--repair", "all", "a.qcow2"]);
        let left = qemu_img(dir.root(), &["a.qcow2"]);
        assert_eq!(left.status.code(), Some(after), "{name}");
    }
}

#[test]
fn it_says_what_is_wrong_in_words() {
    let dir = TempDir::new();
    let mut image = plain();
    image.set_refcount(0, 0);
    let leaked = image.allocate(1) / image.cluster();
    image.set_refcount(leaked, 1);
    fs::write(dir.path("a.qcow2"), &image.bytes).unwrap();
    let at = leaked * image.cluster();
    let end = at + image.cluster();
    let errors = format!(
        "error: cluster at 0x0 has refcount 0, but 1 references\n\
         leak: cluster at {at:#x} has refcount 1, but 0 references\n"
    );
    let words = format!(
        "1 errors are in the image: data may be wrong, and writing to it may destroy more.\n\
         1 clusters are leaked: they waste space, and harm nothing.\n\
         2/1024 = 0.20% allocated, 0.00% fragmented, 0.00% compressed clusters\n\
         Image end offset: {end}\n"
    );
    let checked = said(&diskplane(dir.root(), &["a.qcow2"]));
    assert_eq!(checked, (Some(2), words, errors.clone()));
    let quiet = said(&diskplane(dir.root(), &["-q", "a.qcow2"]));
    assert_eq!(quiet, (Some(2), String::new(), errors.clone()));
    let repaired = diskplane(dir.root(), &["-r", "all", "a.qcow2"]);
    let (status, words, told) = said(&repaired);
    assert_eq!((status, told), (Some(0), errors));
    assert!(
        words.starts_with(
            "1 leaked clusters were given back.\n1 errors were repaired.\n\
             No errors were found on the image.\n2/1024 = 0.20% allocated"
        ),
        "{words}"
    );
}

#[test]
fn what_cannot_be_checked_is_1_and_what_has_nothing_to_check_63() {
    let dir = TempDir::new();
    fs::write(dir.path("a.raw"), vec![7; 4096]).unwrap();
    fs::write(dir.path("cut.qcow2"), &plain().bytes[..60]).unwrap();
    for (args, status) in [
        (&["a.raw"][..], 63),
        (&["-f", "raw", "a.raw"], 63),
        (&["-f", "qcow2", "a.raw"], 1),
        (&["lacking"], 1),
        (&["-f", "qcow2", "cut.qcow2"], 1),
    ] {
        let theirs = qemu_img(dir.root(), args);
        assert_eq!(theirs.status.code(), Some(status), "qemu-img {args:?}");
        let (code, stdout, stderr) = said(&diskplane(dir.root(), args));
        assert_eq!(
            (code, stdout.as_str()),
            (Some(status), ""),
            "{args:?}: {stderr}"
        );
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.contains(args[args.len() - 1]), "{args:?}: {stderr}");
    }
}

#[test]
fn an_image_in_use_is_checked_only_if_that_is_said() {
    let dir = TempDir::new();
    let image = dir.path("a.qcow2");
    qemu::create("qcow2", &image, "1M");
    let mut user = Command::new("qemu-io")
        .arg(&image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = user.stdin.take().unwrap();
    writeln!(input, "length").unwrap();
    let mut answer = String::new();
    let mut output = BufReader::new(user.stdout.take().unwrap());
    output.read_line(&mut answer).unwrap();
    for args in [&["a.qcow2"][..], &["-r", "all", "a.qcow2"]] {
        let (status, _, stderr) = said(&diskplane(dir.root(), args));
        assert_eq!(status, Some(1), "{stderr}");
        assert!(stderr.contains("lock"), "{stderr}");
    }
    for args in [&["-U", "a.qcow2"][..], &["--force-share", "a.qcow2"]] {
        let (status, _, stderr) = said(&diskplane(dir.root(), args));
        assert_eq!(status, Some(0), "{stderr}");
    }
    // With its input ends qemu-io.
    drop(input);
    assert!(user.wait().unwrap().success(), "{answer}");
}
