//! QED images through the commands, beside QEMU's.

use crate::common;

use block::Storage;
use common::{diskplane, failure, good, json, qemu_img, refused, run};
use io::{File, OpenOptions};
use std::fs;
use testkit::TempDir;

/// Cluster and table sizes that both know: an image of ours that QEMU writes to, and the other way round.
#[test]
fn images_are_exchanged_with_qemu() {
    let dir = TempDir::new();
    let root = dir.root();
    let image = |k: &str| format!("{k}.qed");
    for (cluster, table) in [("4k", 2), ("4k", 16), ("64k", 4), ("1M", 4)] {
        let options = format!("cluster_size={cluster},table_size={table}");
        let bytes: Vec<u8> = (0..3u32 << 19).map(|i| (i >> 12) as u8 % 7).collect();
        fs::write(dir.path("in.raw"), bytes).unwrap();
        let args = [
            "convert", "-f", "raw", "-O", "qed", "-o", &options, "in.raw",
        ];
        let (ours, theirs) = (image("ours"), image("theirs"));
        good(root, &[&args[..], &[&ours]].concat());
        qemu_img(root, &[&args[..], &[&theirs]].concat());
        for name in [&ours, &theirs] {
            qemu_img(root, &["check", "-f", "qed", name]);
            good(root, &["check", name]);
            qemu_img(root, &["compare", "-f", "qed", "-F", "raw", name, "in.raw"]);
            let io = run(
                "qemu-io",
                root,
                &["-f", "qed", "-c", "write -P 5 1000k 70k", name],
            );
            assert!(io.status.success());
            good(root, &["convert", "-O", "raw", name, "out.raw"]);
            qemu_img(
                root,
                &["compare", "-f", "qed", "-F", "raw", name, "out.raw"],
            );
            for file in [name.as_str(), "out.raw"] {
                fs::remove_file(dir.path(file)).unwrap();
            }
        }
    }
}

/// Overlays on raw, qcow2 and QED images; the base may be QED under a qcow2 overlay too.
#[test]
fn overlays_read_their_bases() {
    let dir = TempDir::new();
    let root = dir.root();
    let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i >> 9) as u8).collect();
    fs::write(dir.path("base.raw"), bytes).unwrap();
    for format in ["qcow2", "qed"] {
        let base = format!("base.{format}");
        qemu_img(
            root,
            &["convert", "-f", "raw", "-O", format, "base.raw", &base],
        );
    }
    for (top, format) in [
        ("qed", "raw"),
        ("qed", "qcow2"),
        ("qed", "qed"),
        ("qcow2", "qed"),
    ] {
        let (name, base) = (format!("top-{format}.{top}"), format!("base.{format}"));
        good(
            root,
            &["create", "-f", top, "-b", &base, "-F", format, &name, "2M"],
        );
        // QEMU has the same bytes, and the same idea of the base.
        let info = json(&qemu_img(root, &["info", "--output=json", &name]));
        assert_eq!(info["backing-filename"], base.as_str());
        assert_eq!(info["format"], top);
        let io = run(
            "qemu-io",
            root,
            &[
                "-f",
                top,
                "-c",
                "write -z 64k 64k",
                "-c",
                "write 200k 3k",
                &name,
            ],
        );
        assert!(io.status.success());
        good(root, &["convert", "-O", "raw", &name, "out.raw"]);
        qemu_img(root, &["compare", "-f", top, "-F", "raw", &name, "out.raw"]);
        fs::remove_file(dir.path("out.raw")).unwrap();
        let chain = json(&good(root, &["info", "--json", "--backing-chain", &name]));
        assert_eq!(chain.as_array().map(Vec::len), Some(2), "{chain}");
    }
    // An overlay that does not say that its base is raw: what shows no format is not opened.
    good(
        root,
        &[
            "create",
            "-f",
            "qed",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "x.qed",
        ],
    );
    fs::write(dir.path("base.qcow2"), vec![7; 1 << 20]).unwrap();
    let line = refused(root, &["convert", "-O", "raw", "x.qed", "x.raw"]);
    assert!(line.contains("no known format"), "{line}");
}

/// A discard keeps the cluster and punches a hole in it: what is a hole of the file is zeros.
#[test]
fn holes_are_known_to_be_zeros() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("in.raw"), vec![7; 4 << 20]).unwrap();
    good(root, &["convert", "-f", "raw", "in.raw", "a.qed"]);
    let map = || json(&good(root, &["map", "--json", "a.qed"]));
    let entry = map()[0].clone();
    assert_eq!(
        (&entry["length"], &entry["zero"]),
        (&(4 << 20).into(), &false.into())
    );
    let offset = entry["offset"].as_u64().unwrap();
    let file = File::open(&dir.path("a.qed"), &OpenOptions::default()).unwrap();
    file.write_zeroes(offset + (1 << 20), 1 << 20, true)
        .unwrap();
    drop(file);
    let zeros: Vec<bool> = map()
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["zero"].as_bool().unwrap())
        .collect();
    assert_eq!(zeros, [false, true, false]);
    good(root, &["convert", "-O", "raw", "a.qed", "out.raw"]);
    qemu_img(
        root,
        &["compare", "-f", "qed", "-F", "raw", "a.qed", "out.raw"],
    );
}

#[test]
fn a_larger_disk_hides_what_the_base_has_there() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("base.raw"), vec![7; 2 << 20]).unwrap();
    good(
        root,
        &["create", "-b", "base.raw", "-F", "raw", "a.qed", "1M"],
    );
    good(root, &["resize", "a.qed", "3M"]);
    qemu_img(root, &["check", "a.qed"]);
    good(root, &["convert", "-O", "raw", "a.qed", "a.raw"]);
    let bytes = fs::read(dir.path("a.raw")).unwrap();
    assert_eq!(bytes.len(), 3 << 20);
    assert!(bytes[..1 << 20].iter().all(|b| *b == 7));
    assert!(bytes[1 << 20..].iter().all(|b| *b == 0));
    qemu_img(
        root,
        &["compare", "-f", "qed", "-F", "raw", "a.qed", "a.raw"],
    );
    for (args, said) in [
        (&["resize", "--shrink", "a.qed", "1M"][..], "cannot shrink"),
        (&["resize", "a.qed", "100P"], "too large"),
        (
            &["resize", "--preallocation", "falloc", "a.qed", "4M"],
            "no preallocation",
        ),
        (&["snapshot", "a.qed"], "no internal snapshots"),
        (&["bitmap", "a.qed"], "no bitmaps"),
        (&["amend", "-o", "size=8M", "a.qed"], "no options to amend"),
        (
            &[
                "create",
                "-f",
                "qed",
                "-o",
                "cluster_size=3k",
                "b.qed",
                "1M",
            ],
            "cluster_size",
        ),
        (
            &["create", "-f", "qed", "-o", "table_size=32", "b.qed", "1M"],
            "table_size",
        ),
        (
            &["create", "-f", "qed", "-o", "compat=1.1", "b.qed", "1M"],
            "no such option",
        ),
        (
            &[
                "create",
                "-f",
                "qed",
                "-o",
                "cluster_size=4k,table_size=1",
                "b.qed",
                "2G",
            ],
            "too large",
        ),
        (
            &["convert", "-c", "-O", "qed", "a.raw", "-f", "raw", "b.qed"],
            "no compressed",
        ),
    ] {
        let line = refused(root, args);
        assert!(line.contains(said), "{args:?}: {line}");
        assert!(!dir.path("b.qed").exists(), "{args:?}");
    }
}

/// An image whose writer was killed: readers leave it alone, the next writer checks it first.
#[test]
fn the_need_check_bit_is_cleared_by_the_next_writer() {
    let dir = TempDir::new();
    let root = dir.root();
    qemu_img(root, &["create", "-q", "-f", "qed", "a.qed", "1M"]);
    let killed = "write 0 64k";
    // QEMU has set the bit by now, and does not come to clear it.
    run(
        "qemu-io",
        root,
        &["-f", "qed", "-c", killed, "-c", "sigraise 9", "a.qed"],
    );
    let before = fs::read(dir.path("a.qed")).unwrap();
    assert_eq!(before[16], 2);
    assert!(good(root, &["info", "a.qed"]).contains("need check"));
    good(root, &["convert", "-O", "raw", "a.qed", "a.raw"]);
    good(root, &["check", "a.qed"]);
    assert!(fs::read(dir.path("a.qed")).unwrap() == before);
    good(root, &["resize", "a.qed", "2M"]);
    assert_eq!(fs::read(dir.path("a.qed")).unwrap()[16], 0);
    qemu_img(root, &["check", "a.qed"]);
    // One that cannot be brought in order is not written to: two entries for one cluster.
    let mut bytes = fs::read(dir.path("a.qed")).unwrap();
    let l2 = u64::from_le_bytes(bytes[65536..65544].try_into().unwrap()) as usize;
    bytes.copy_within(l2..l2 + 8, l2 + 8);
    bytes[16] = 2;
    fs::write(dir.path("a.qed"), bytes).unwrap();
    let line = refused(root, &["resize", "a.qed", "3M"]);
    assert!(line.contains("could not be repaired"), "{line}");
    let args = ["check", "a.qed"];
    failure(&args, &diskplane(root, &args), 2);
}

#[test]
fn of_a_cut_off_cluster_is_salvaged_what_is_there() {
    let dir = TempDir::new();
    let root = dir.root();
    qemu_img(root, &["create", "-q", "-f", "qed", "a.qed", "1M"]);
    run(
        "qemu-io",
        root,
        &[
            "-f",
            "qed",
            "-c",
            "write -P 7 0 64k",
            "-c",
            "write -P 7 64k 960k",
            "a.qed",
        ],
    );
    let lost = 65536 + 5 * 512;
    let file = fs::OpenOptions::new()
        .write(true)
        .open(dir.path("a.qed"))
        .unwrap();
    file.set_len(file.metadata().unwrap().len() - lost).unwrap();
    let error = refused(root, &["convert", "-O", "raw", "a.qed", "a.raw"]);
    assert!(error.contains("behind the end of the file"), "{error}");
    for target in ["a.raw", "a.qcow2"] {
        let report = good(root, &["convert", "--salvage", "--json", "a.qed", target]);
        assert_eq!(json(&report)["unreadable-bytes"], lost, "{report}");
    }
    let bytes = fs::read(dir.path("a.raw")).unwrap();
    let there = (1 << 20) - lost as usize;
    assert!(bytes[..there].iter().all(|byte| *byte == 7));
    assert!(bytes[there..].iter().all(|byte| *byte == 0));
    qemu_img(
        root,
        &["compare", "-f", "raw", "-F", "qcow2", "a.raw", "a.qcow2"],
    );
}
