//! `diskplane advise` from outside: what it says of images that are made for it, and that it writes only where it is told to.

use crate::common;

use common::{diskplane, good, qemu_img, refused};
use serde_json::Value;
use std::fs;
use testkit::TempDir;

fn topics(answer: &Value) -> Vec<String> {
    let advice = answer["advice"].as_array().unwrap().iter();
    let text = |one: &Value| {
        format!(
            "{}: {}",
            one["topic"].as_str().unwrap(),
            one["do"].as_str().unwrap()
        )
    };
    advice.map(text).collect()
}

#[test]
fn advice_follows_from_what_the_image_is() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    fs::write(dir.join("data"), vec![0x5a; 2 << 20]).unwrap();
    qemu_img(
        &dir,
        &[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "data",
            "packed.qcow2",
        ],
    );
    qemu_img(
        &dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=0.10",
            "base.qcow2",
            "1T",
        ],
    );
    for (top, below) in [("mid.qcow2", "base.qcow2"), ("top.qcow2", "mid.qcow2")] {
        qemu_img(
            &dir,
            &[
                "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", top,
            ],
        );
    }
    qemu_img(&dir, &["create", "-q", "-f", "vmdk", "d.vmdk", "1G"]);
    let args = [
        "advise",
        "--json",
        "packed.qcow2",
        "base.qcow2",
        "top.qcow2",
        "d.vmdk",
    ];
    let answers: Value = serde_json::from_str(&good(&dir, &args)).unwrap();
    let has = |n: usize, text: &str| topics(&answers[n]).iter().any(|line| line.contains(text));
    assert!(has(0, "convert without -c"), "{answers}");
    assert_eq!(answers[0]["facts"]["compressed"], 2 << 20);
    assert!(
        has(1, "compat=1.1") && has(1, "--metadata-cache 128M"),
        "{answers}"
    );
    assert!(
        has(2, "fewer images") && has(2, "extended_l2=on"),
        "{answers}"
    );
    assert_eq!(answers[2]["facts"]["chain"], 3);
    assert!(has(3, "-O qcow2"), "{answers}");
    for n in 0..4 {
        assert!(has(n, "--aio auto") && has(n, "--cache "), "{answers}");
        assert_eq!(answers[n]["measured"], Value::Null);
    }
    let line = refused(&dir, &["advise", "none"]);
    assert!(line.contains("none"), "{line}");
}

#[test]
fn it_measures_only_when_asked_and_leaves_nothing() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    let content = vec![0x5a; 4 << 20];
    fs::write(dir.join("disk.raw"), &content).unwrap();
    fs::create_dir(dir.join("w")).unwrap();
    let args = [
        "advise",
        "-f",
        "raw",
        "--measure",
        "--seconds",
        "8",
        "--write-test",
        "w",
        "--json",
        "disk.raw",
    ];
    let answers: Value = serde_json::from_str(&good(&dir, &args)).unwrap();
    let measured = &answers[0]["measured"];
    let rates = measured["rates"].as_array().unwrap();
    assert!(rates.len() >= 2, "{measured}");
    assert!(rates.iter().all(|rate| rate["iops"].as_f64() > Some(0.0)));
    assert!(
        measured["write"]["hole-us"].as_f64() > Some(0.0),
        "{measured}"
    );
    let based = answers[0]["advice"].as_array().unwrap().iter();
    assert!(based.filter(|one| one["rests-on"] == "measurement").count() >= 1);
    assert!(fs::read(dir.join("disk.raw")).unwrap() == content);
    assert_eq!(fs::read_dir(dir.join("w")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    let text = good(&dir, &["advise", "-f", "raw", "disk.raw"]);
    assert!(
        text.contains("disk.raw: raw of 4 MiB") && text.contains("rests on"),
        "{text}"
    );
}

#[test]
fn one_that_cannot_be_looked_at_keeps_nothing_of_the_others_back() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1G"]);
    // Half of what was written is gone.
    fs::write(dir.join("data"), vec![0x5a; 2 << 20]).unwrap();
    qemu_img(
        &dir,
        &["convert", "-f", "raw", "-O", "qcow2", "data", "cut.qcow2"],
    );
    let whole = good(&dir, &["advise", "--json", "cut.qcow2"]);
    let whole: Value = serde_json::from_str(&whole).unwrap();
    assert_eq!(whole[0]["facts"]["lost"], 0);
    let cut = fs::File::options().write(true).open(dir.join("cut.qcow2"));
    let cut = cut.unwrap();
    let len = cut.metadata().unwrap().len();
    cut.set_len(len - (1 << 20)).unwrap();
    fs::write(dir.join("none.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    let args = [
        "advise",
        "--json",
        "a.qcow2",
        "none.qcow2",
        "missing",
        "cut.qcow2",
    ];
    let output = diskplane(&dir, &args);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(error.lines().count(), 2, "{error}");
    assert!(error.contains("none.qcow2") && error.contains("missing"));
    let answers: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answers.as_array().unwrap().len(), 2);
    assert_eq!(answers[1]["facts"]["lost"], 1 << 20);
    let told = topics(&answers[1]);
    assert!(told.iter().any(|l| l.starts_with("damage: ")), "{told:?}");
    let told = topics(&answers[0]);
    assert!(!told.iter().any(|l| l.starts_with("damage: ")), "{told:?}");
}

#[test]
fn holes_are_not_measured() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    let sparse = fs::File::create(dir.join("sparse.raw")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    let args = [
        "advise",
        "-f",
        "raw",
        "--measure",
        "--seconds",
        "1",
        "--json",
        "sparse.raw",
    ];
    let answer = || -> Value {
        let answers: Value = serde_json::from_str(&good(&dir, &args)).unwrap();
        answers[0]["measured"].clone()
    };
    let measured = answer();
    assert_eq!(measured["rates"], Value::Array(Vec::new()));
    let why = measured["notes"][0].as_str().unwrap();
    assert!(
        why.contains("not measured: its largest piece of data has 0"),
        "{why}"
    );
    std::os::unix::fs::FileExt::write_all_at(&sparse, &vec![1; 3 << 20], 5 << 20).unwrap();
    let measured = answer();
    assert!(
        !measured["rates"].as_array().unwrap().is_empty(),
        "{measured}"
    );
    let where_ = measured["notes"][0].as_str().unwrap();
    assert!(where_.contains("3 MiB at 5242880"), "{where_}");
}

#[test]
fn locked_images_and_devices_get_advice_that_fits_them() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    fs::write(dir.join("key"), "secret").unwrap();
    let words = |line: &'static str| line.split(' ').collect::<Vec<_>>();
    good(&dir, &words("create -q -f luks --key-file key l.luks 1M"));
    fs::write(dir.join("raw"), vec![1; 1 << 20]).unwrap();
    let answer = good(&dir, &words("advise --json l.luks"));
    let answers: Value = serde_json::from_str(&answer).unwrap();
    let told = topics(&answers[0]);
    // That nobody gave its passphrase is no damage.
    assert!(
        !told.iter().any(|line| line.contains("check --repair")),
        "{told:?}"
    );
    // A name is said once.
    let line = refused(&dir, &words("advise /dev/urandom"));
    assert_eq!(line.matches("/dev/urandom").count(), 1, "{line}");
    let attach = std::process::Command::new("losetup")
        .args(["--find", "--show", "raw"])
        .current_dir(&dir)
        .output();
    let Ok(attach) = attach else { return };
    let device = String::from_utf8_lossy(&attach.stdout).trim().to_owned();
    if !attach.status.success() {
        return;
    }
    let answer = good(&dir, &["advise", "-f", "raw", &device]);
    let detach = std::process::Command::new("losetup")
        .args(["-d", &device])
        .status();
    assert!(detach.unwrap().success());
    assert!(
        answer.contains("; a block device") && !answer.contains("devtmpfs"),
        "{answer}"
    );
    // The device below orders its requests.
    assert!(!answer.contains("scheduler"), "{answer}");
}
