//! `diskplane compare`, `measure` and `dd` beside those of qemu-img, on images of all kinds.

use crate::common;

use common::{diskplane, failure, good, json, qemu_img, refused, run};
use std::fs;
use std::path::Path;
use testkit::{TempDir, qemu};

/// Exit code and what was printed.
fn both(dir: &Path, args: &[&str]) -> [(Option<i32>, String); 2] {
    [diskplane(dir, args), run("qemu-img", dir, args)].map(|output| {
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text)
    })
}

/// Images that read the same and that do not, of all kinds.
fn images(dir: &Path) -> Vec<&'static str> {
    let mut bytes: Vec<u8> = (0..1 << 20).map(|nth: usize| (nth % 251) as u8).collect();
    bytes[256 << 10..512 << 10].fill(0);
    fs::write(dir.join("a.raw"), &bytes).unwrap();
    for (name, options) in [
        ("same", &[][..]),
        ("packed", &["-c"]),
        ("small", &["-o", "cluster_size=4k"]),
        ("v2", &["-o", "compat=0.10"]),
        ("parts", &["-o", "extended_l2=on"]),
        ("full", &["-S", "0"]),
    ] {
        let args = [&["convert", "-O", "qcow2"][..], options, &["a.raw", name]].concat();
        qemu_img(dir, &args);
    }
    let overlay = |name: &str, base: &str, format: &str, writes: &[&str]| {
        qemu_img(
            dir,
            &[
                "create", "-q", "-f", "qcow2", "-b", base, "-F", format, name,
            ],
        );
        qemu::io("qcow2", dir.join(name), writes);
    };
    overlay("over", "same", "qcow2", &["write -z 300k 64k"]);
    overlay("other", "same", "qcow2", &["write -P 1 700k 1k"]);
    overlay("first", "a.raw", "raw", &["write -P 5 0 512"]);
    // Longer: with nothing behind the end, zeros, data.
    for (name, writes) in [
        ("longer", &["discard 0 64k"][..]),
        ("zeros", &["write -P 0 1088k 64k"]),
        ("tail", &["write -P 7 1536k 512"]),
    ] {
        qemu_img(dir, &["convert", "-O", "qcow2", "a.raw", name]);
        qemu_img(dir, &["resize", "-q", name, "2M"]);
        qemu::io(
            "qcow2",
            dir.join(name),
            if name == "longer" { &[] } else { writes },
        );
    }
    vec![
        "a.raw", "same", "packed", "small", "v2", "parts", "full", "over", "other", "first",
        "longer", "zeros", "tail",
    ]
}

#[test]
fn images_are_the_same_to_us_where_they_are_to_qemu() {
    let dir = TempDir::new();
    let dir = dir.root();
    let images = images(dir);
    let format = |name: &str| if name == "a.raw" { "raw" } else { "qcow2" };
    let mut codes = [0; 2];
    for (nth, a) in ["a.raw", "same", "tail"].iter().enumerate() {
        // In one of both orders.
        for b in &images {
            let (a, b) = if nth % 2 == 0 { (a, b) } else { (b, a) };
            let args = ["compare", "-f", format(a), "-F", format(b), a, b];
            let [ours, theirs] = both(dir, &args);
            assert_eq!(ours, theirs, "{a} {b}");
            codes[ours.0.unwrap() as usize] += 1;
        }
    }
    assert!(codes.iter().all(|count| *count > 10), "{codes:?}");
    for (a, b) in [("same", "v2"), ("same", "longer"), ("over", "same")] {
        let [ours, theirs] = both(dir, &["compare", "-s", a, b]);
        assert_eq!(ours, theirs, "-s {a} {b}");
    }
    // QEMU names the beginning of the run where what follows that differs, too.
    let [ours, theirs] = both(dir, &["compare", "-s", "same", "full"]);
    assert_eq!((ours.0, theirs.0), (Some(1), Some(1)));
    let says = "Strict mode: Offset 262144 block status mismatch!\n";
    assert_eq!(ours.1, says);
    // Overlays of one base: only what they have themselves is read.
    let report = json(&good(dir, &["compare", "--json", "same", "over"]));
    assert_eq!(
        (&report["identical"], &report["read"]),
        (&true.into(), &0.into())
    );
    let output = diskplane(dir, &["compare", "--json", "other", "same"]);
    let report = json(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(report["difference"], "content");
    assert_eq!(report["offset"], 700 << 10);
    assert_eq!(
        both(dir, &["compare", "-q", "-U", "same", "tail"])[0],
        (Some(1), String::new())
    );
}

#[test]
fn exit_codes_say_where_a_comparison_failed() {
    let dir = TempDir::new();
    let dir = dir.root();
    for name in ["a", "b"] {
        good(dir, &["create", "-f", "qcow2", name, "4M"]);
        qemu::io("qcow2", dir.join(name), &["write -P 7 0 4M"]);
    }
    let says = |args: &[&str], code: i32, text: &str| {
        let line = failure(args, &diskplane(dir, args), code);
        assert!(line.contains(text) && line.lines().count() == 1, "{line}");
    };
    says(&["compare", "a", "absent"], 2, "absent");
    says(
        &["compare", "-f", "qcow2", "-F", "qcow2", "a", "/dev/null"],
        2,
        "/dev/null",
    );
    let mut bytes = fs::read(dir.join("b")).unwrap();
    bytes[0x4_0000 + 9 * 8 + 7] = 0x22;
    fs::write(dir.join("b"), bytes).unwrap();
    says(&["compare", "a", "b"], 3, "L2 entry");
    // A compressed cluster that is none.
    qemu_img(dir, &["convert", "-c", "-O", "qcow2", "a", "c"]);
    let map = json(&good(dir, &["map", "--json", "c"]));
    assert_eq!(map[0]["compressed"], true);
    let mut bytes = fs::read(dir.join("c")).unwrap();
    let packed = bytes.len() - 200;
    bytes[0x5_0000.min(packed)..].fill(0xff);
    fs::write(dir.join("c"), bytes).unwrap();
    let output = diskplane(dir, &["compare", "a", "c"]);
    assert!(matches!(output.status.code(), Some(3 | 4)), "{output:?}");
}

#[test]
fn sizes_are_those_that_qemu_img_measures() {
    let dir = TempDir::new();
    let dir = dir.root();
    images(dir);
    let measured = |args: &[&str]| {
        let ours = json(&good(dir, &[&["measure", "--json"][..], args].concat()));
        let theirs = json(&qemu_img(
            dir,
            &[&["measure", "--output=json"][..], args].concat(),
        ));
        assert_eq!(ours, theirs, "{args:?}");
    };
    for size in ["0", "64T"] {
        for options in [
            "cluster_size=64k",
            "cluster_size=2M,refcount_bits=64",
            "refcount_bits=1,extended_l2=on",
            "preallocation=metadata",
            "preallocation=full,compat=0.10",
            "lazy_refcounts=on",
        ] {
            measured(&["-O", "qcow2", "-o", options, "--size", size]);
        }
        measured(&["-O", "raw", "--size", size]);
    }
    for size in ["1M", "100M"] {
        measured(&["-O", "qcow2", "-o", "cluster_size=512", "--size", size]);
    }
    qemu_img(dir, &["bitmap", "--add", "-g", "512", "same", "one"]);
    qemu_img(dir, &["bitmap", "--add", "same", "another"]);
    qemu_img(dir, &["snapshot", "-c", "snap", "same"]);
    qemu::io("qcow2", dir.join("same"), &["write -z 0 512k"]);
    for image in ["a.raw", "packed", "full", "over", "tail"] {
        for options in ["cluster_size=4k", "preallocation=falloc"] {
            measured(&["-O", "qcow2", "-o", options, image]);
        }
    }
    measured(&["-O", "raw", "tail"]);
    measured(&["-O", "qcow2", "-o", "compat=0.10", "same"]);
    measured(&["-O", "qcow2", "-l", "snap", "same"]);
    // With a key of QEMU's, which is not needed for it.
    let secret = "secret,id=s,data=abc";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let args = ["-O", "qcow2", "-o", options, "--size", "1G"];
    let theirs = ["measure", "--output=json", "--object", secret];
    let theirs = json(&qemu_img(dir, &[&theirs[..], &args].concat()));
    let ours = json(&good(dir, &[&["measure", "--json"][..], &args].concat()));
    assert_eq!(ours, theirs);
    let text = [&["measure"][..], &["-O", "qcow2", "same"]].concat();
    let [ours, theirs] = both(dir, &text);
    assert_eq!(ours, theirs);
    failure(&["measure"], &diskplane(dir, &["measure"]), 1);
    let line = refused(dir, &["measure", "-O", "qcow2", "--size", "8191P"]);
    assert!(line.contains("too large"), "{line}");
}

#[test]
fn dd_copies_the_same_part() {
    let dir = TempDir::new();
    let dir = dir.root();
    images(dir);
    for (nth, operands) in [
        &[][..],
        &["bs=1000", "count=7"],
        &["bs=100k", "count=5", "skip=2"],
        &["bs=1M", "count=9"],
    ]
    .iter()
    .enumerate()
    {
        for (source, format) in [("other", "raw"), ("tail", "qcow2")] {
            let outputs = [
                format!("ours-{nth}-{source}"),
                format!("theirs-{nth}-{source}"),
            ];
            let args = outputs.each_ref().map(|name| format!("of={name}"));
            let input = format!("if={source}");
            let with = |of| [&["dd", "-O", format][..], operands, &[&input, of]].concat();
            good(dir, &with(&args[0]));
            qemu_img(dir, &with(&args[1]));
            let [ours, theirs] = outputs.each_ref().map(|name| dir.join(name));
            let size = |image: &Path| {
                let args = [
                    "info",
                    "--output=json",
                    "-f",
                    format,
                    image.to_str().unwrap(),
                ];
                json(&qemu_img(dir, &args))["virtual-size"].clone()
            };
            // QEMU leaves a size that is no multiple of a sector as it is.
            let rounded = size(&theirs).as_u64().unwrap().next_multiple_of(512);
            assert_eq!(size(&ours), rounded, "{operands:?}");
            qemu::compare(format, &ours, format, &theirs);
        }
    }
    let line = refused(dir, &["dd", "if=same", "of=over"]);
    assert!(line.contains("over: the file exists already"), "{line}");
    refused(dir, &["dd", "if=same"]);
    refused(dir, &["dd", "if=same", "of=x", "conv=sync"]);
}

#[test]
fn images_may_have_names_that_are_no_text() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::process::Command;

    let dir = TempDir::new();
    let dir = dir.root();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    qemu::io("qcow2", dir.join("a.qcow2"), &["write -P 7 64k 64k"]);
    let (name, copy) = (
        OsStr::from_bytes(b"a\xff"),
        OsStr::from_bytes(b"b\xfe.qcow2"),
    );
    std::fs::rename(dir.join("a.qcow2"), dir.join(name)).unwrap();
    let words = |text: &'static str| text.split(' ').map(OsStr::new);
    for args in [
        words("convert -f qcow2")
            .chain([name, copy])
            .collect::<Vec<_>>(),
        words("compare").chain([name, copy]).collect(),
        words("info").chain([copy]).collect(),
        words("map").chain([copy]).collect(),
        words("measure").chain([copy]).collect(),
        words("check").chain([copy]).collect(),
        words("resize").chain([copy, OsStr::new("2M")]).collect(),
    ] {
        let output = Command::new(crate::common::binary())
            .args(&args)
            .current_dir(dir)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
    }
}
