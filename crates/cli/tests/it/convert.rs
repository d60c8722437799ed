//! `diskplane convert`, and external data files on the command line.

use crate::common;

use common::{diskplane, good};
use std::{fs, path::Path};
use testkit::{TempDir, qemu};

#[track_caller]
fn bad(dir: &Path, args: &[&str], says: &str) {
    let output = diskplane(dir, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{args:?}");
    assert!(stderr.contains(says), "{args:?}: {stderr}");
}

#[test]
fn copies_between_formats() {
    let dir = TempDir::new();
    let dir = dir.root();
    let text: String = (0..100_000).map(|n| format!("{n}\n")).collect();
    let mut bytes = text.into_bytes();
    bytes.resize(4 << 20, 0);
    fs::write(dir.join("a.raw"), &bytes).unwrap();
    let line = good(dir, &["convert", "-c", "a.raw", "b.qcow2"]);
    assert!(
        line.starts_with(
            "converted a.raw to b.qcow2: qcow2, 4 MiB; 576 KiB of data, 9 clusters compressed to"
        ),
        "{line}"
    );
    qemu::check("qcow2", dir.join("b.qcow2"));
    qemu::compare("raw", dir.join("a.raw"), "qcow2", dir.join("b.qcow2"));
    let json = good(
        dir,
        &[
            "convert",
            "-c",
            "-m",
            "3",
            "-o",
            "compression_type=zstd,cluster_size=4K",
            "--json",
            "b.qcow2",
            "c.qcow2",
        ],
    );
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["virtual-size"], 4 << 20);
    assert!(json["compressed-clusters"].as_u64() > Some(100));
    good(dir, &["convert", "c.qcow2", "d.raw"]);
    assert!(fs::read(dir.join("d.raw")).unwrap() == bytes);
    // Into an image that is there, whose bytes are others.
    good(dir, &["create", "e.qcow2", "5M"]);
    qemu::io("qcow2", dir.join("e.qcow2"), &["write -P 9 0 5M"]);
    good(dir, &["convert", "-n", "b.qcow2", "e.qcow2"]);
    qemu::io(
        "qcow2",
        dir.join("e.qcow2"),
        &["read -P 9 4M 1M", "read -P 0 3M 1M"],
    );
    // An overlay of what is nearly the same.
    bytes[1 << 20] = 1;
    fs::write(dir.join("f.raw"), &bytes).unwrap();
    let line = good(
        dir,
        &["convert", "-B", "a.raw", "-F", "raw", "f.raw", "g.qcow2"],
    );
    assert!(
        line.contains("64 KiB of data, 3.94 MiB as in a.raw"),
        "{line}"
    );
    qemu::compare("raw", dir.join("f.raw"), "qcow2", dir.join("g.qcow2"));
    bad(dir, &["convert", "a.raw", "b.qcow2"], "exists already");
    bad(
        dir,
        &["convert", "-c", "a.raw", "h.raw"],
        "no compressed clusters",
    );
    bad(dir, &["convert", "-n", "a.raw", "h.qcow2"], "h.qcow2");
    good(dir, &["create", "small.qcow2", "1M"]);
    bad(
        dir,
        &["convert", "-n", "a.raw", "small.qcow2"],
        "less than the source's",
    );
    let compressed = ["convert", "-c", "-o", "data_file=data", "a.raw", "i.qcow2"];
    bad(dir, &compressed, "cannot have compressed clusters");
    assert!(!dir.join("i.qcow2").exists() && !dir.join("data").exists());
}

#[test]
fn data_files_are_made_shown_and_kept() {
    let dir = TempDir::new();
    let dir = dir.root();
    // QEMU looks for a relative name in its own working directory.
    let name = dir.join("a.data").display().to_string();
    let option = format!("data_file={name},data_file_raw=on");
    let line = good(dir, &["create", "-o", &option, "a.qcow2", "8M"]);
    let made = "created a.qcow2: qcow2, 8 MiB, clusters of 64 KiB, data in";
    assert_eq!(line, format!("{made} {name} (raw)\n"));
    qemu::check("qcow2", dir.join("a.qcow2"));
    qemu::io("qcow2", dir.join("a.qcow2"), &["write -P 5 1M 64k"]);
    let info: serde_json::Value =
        serde_json::from_str(&good(dir, &["info", "--json", "a.qcow2"])).unwrap();
    assert_eq!(info["data-filename"], name.as_str());
    let map: serde_json::Value =
        serde_json::from_str(&good(dir, &["map", "--json", "a.qcow2"])).unwrap();
    let data = map.as_array().unwrap().iter().find(|e| e["data"] == true);
    assert_eq!(data.unwrap()["offset"], 1 << 20);
    let raw = fs::read(dir.join("a.data")).unwrap();
    assert_eq!((raw.len(), raw[1 << 20]), (8 << 20, 5));
    good(
        dir,
        &["convert", "-o", "data_file=b.data", "a.qcow2", "b.qcow2"],
    );
    // A relative name of ours begins at the image's directory.
    good(dir, &["convert", "-O", "raw", "b.qcow2", "copy"]);
    qemu::compare("raw", dir.join("a.data"), "raw", dir.join("copy"));
    // What is there is never taken for a new image's data, nor removed.
    bad(
        dir,
        &["create", "-o", "data_file=a.data", "c.qcow2", "1M"],
        "exists already",
    );
    bad(
        dir,
        &["convert", "-o", "data_file=a.data", "b.qcow2", "c.qcow2"],
        "exists already",
    );
    assert_eq!(fs::read(dir.join("a.data")).unwrap().len(), 8 << 20);
    assert!(!dir.join("c.qcow2").exists());
    bad(
        dir,
        &["create", "-o", "data_file=nbd://x", "c.qcow2", "1M"],
        "protocol",
    );
    // Moved, it can still be said.
    fs::create_dir(dir.join("other")).unwrap();
    fs::rename(dir.join("a.data"), dir.join("other/a")).unwrap();
    bad(dir, &["map", "a.qcow2"], "a.data");
    good(dir, &["map", "--data-file", "other/a", "a.qcow2"]);
    good(dir, &["check", "a.qcow2"]);
}
