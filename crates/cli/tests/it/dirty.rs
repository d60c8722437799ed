//! Images whose writer was killed while refcounts were postponed: whoever writes next brings them in order,
//! whoever reads leaves them alone. The writer is `qemu-io`, which ends itself.

use crate::common;

use common::{binary, diskplane, good, qemu_img};
use std::fs;
use std::path::Path;
use std::process::Command;
use testkit::{Serve, TempDir, qemu};

/// Bytes of the disk.
const SIZE: u64 = 8 << 20;

/// The incompatible feature bits 0 to 7.
fn features(path: &Path) -> u8 {
    fs::read(path).unwrap()[79]
}

/// Makes `dirty.qcow2` with what `options` say, which `qemu-io` left dirty, and `as.raw` with what it reads as.
fn make(dir: &Path, options: &str) {
    let image = dir.join("dirty.qcow2");
    let options = format!("lazy_refcounts=on,{options}");
    qemu::create_with("qcow2", &image, &SIZE.to_string(), &options);
    let bitmap = ["bitmap", "--add", "--disable", "dirty.qcow2", "old"];
    qemu_img(dir, &bitmap);
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2"]);
    for one in [
        "write -P 1 0 1M",
        "write -P 2 3M 100k",
        "discard 128k 256k",
        "write -z 512k 64k",
        "flush",
        "write -P 3 200k 64k",
        "abort",
    ] {
        command.args(["-c", one]);
    }
    let ended = command.arg(&image).output().unwrap();
    assert!(!ended.status.success(), "qemu-io ended itself");
    assert_eq!(features(&image) & 1, 1, "the dirty bit");
    let convert = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "dirty.qcow2",
        "as.raw",
    ];
    qemu_img(dir, &convert);
}

#[test]
fn readers_leave_a_dirty_image_as_it_is() {
    let dir = TempDir::new();
    let dir = dir.root();
    make(dir, "cluster_size=4096");
    let image = dir.join("dirty.qcow2");
    let before = fs::read(&image).unwrap();
    good(dir, &["convert", "-O", "raw", "dirty.qcow2", "ours.raw"]);
    assert!(fs::read(dir.join("ours.raw")).unwrap() == fs::read(dir.join("as.raw")).unwrap());
    let info = good(dir, &["info", "dirty.qcow2"]);
    assert!(info.contains("its dirty bit is set"), "{info}");
    let info = good(dir, &["info", "--json", "dirty.qcow2"]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["format-specific"]["dirty"], "true");
    assert!(info["format-specific"]["corrupt"].is_null());
    good(dir, &["map", "dirty.qcow2"]);
    good(dir, &["snapshot", "-l", "dirty.qcow2"]);
    good(dir, &["bitmap", "dirty.qcow2"]);
    let socket = dir.join("sock");
    let serve = Serve::new(binary(), &image);
    let server = serve.nbd_unix(&socket).read_only().start();
    let uri = qemu::nbd_unix_uri(&socket);
    qemu::compare("raw", &uri, "raw", dir.join("as.raw"));
    server.stop();
    let checked = diskplane(dir, &["check", "dirty.qcow2"]);
    assert_eq!(checked.status.code(), Some(2));
    // As a backing file it is only read, too.
    let overlay = [
        "create",
        "-q",
        "-b",
        "dirty.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ];
    good(dir, &[&overlay[..1], &overlay[2..]].concat());
    let top = dir.join("top.qcow2");
    let serve = Serve::new(binary(), &top);
    let server = serve.nbd_unix(&socket).start();
    qemu::io("raw", &uri, &["write -P 9 0 64k", "read -P 2 3M 100k"]);
    server.stop();
    assert!(fs::read(&image).unwrap() == before);
}

/// Each command that writes, on an image of its own.
#[test]
fn writers_bring_a_dirty_image_in_order_first() {
    let options = [
        "cluster_size=4096",
        "extended_l2=on",
        "cluster_size=512,refcount_bits=1",
    ];
    let commands: [&[&str]; 7] = [
        &["snapshot", "-c", "now", "dirty.qcow2"],
        &["bitmap", "--add", "dirty.qcow2", "new"],
        &["bitmap", "--remove", "dirty.qcow2", "old"],
        &["amend", "-o", "lazy_refcounts=off", "dirty.qcow2"],
        &["resize", "dirty.qcow2", "+1M"],
        &["check", "--repair", "all", "dirty.qcow2"],
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "as.raw",
            "dirty.qcow2",
        ],
    ];
    for (nth, command) in commands.iter().enumerate() {
        let dir = TempDir::new();
        let dir = dir.root();
        make(dir, options[nth % options.len()]);
        let output = diskplane(dir, command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {said}");
        let told = command[0] == "check" || said.contains("was not closed cleanly: its refcounts");
        assert!(told, "{command:?}: {said}");
        let image = dir.join("dirty.qcow2");
        assert_eq!(features(&image) & 3, 0, "{command:?}");
        qemu::check("qcow2", &image);
        if command[0] == "resize" {
            let raw = fs::File::options().write(true).open(dir.join("as.raw"));
            raw.unwrap().set_len(SIZE + (1 << 20)).unwrap();
        }
        qemu::compare("qcow2", &image, "raw", dir.join("as.raw"));
    }
}

#[test]
fn a_server_brings_a_dirty_image_in_order_and_leaves_it_clean() {
    let dir = TempDir::new();
    let dir = dir.root();
    make(dir, "cluster_size=4096");
    let image = dir.join("dirty.qcow2");
    let (socket, program) = (dir.join("sock"), binary());
    let uri = qemu::nbd_unix_uri(&socket);
    let serve = Serve::new(&program, &image).nbd_unix(&socket);
    let server = serve.start();
    assert_eq!(features(&image) & 1, 0, "mended, and nothing written yet");
    qemu::compare("raw", &uri, "raw", dir.join("as.raw"));
    qemu::io("raw", &uri, &["write -P 5 5M 300k", "flush"]);
    assert_eq!(features(&image) & 1, 1, "a flush sets the bit");
    server.kill();
    // Now QEMU finds our dirty image, and repairs it as it opens it for writing.
    let commands = [
        "read -P 5 5M 300k",
        "read -P 3 200k 64k",
        "write -P 6 6M 64k",
    ];
    qemu::io("qcow2", &image, &commands);
    assert_eq!(features(&image) & 1, 0);
    qemu::check("qcow2", &image);
    let server = serve.start();
    qemu::io(
        "raw",
        &uri,
        &["read -P 6 6M 64k", "write -P 7 7M 64k", "flush"],
    );
    assert_eq!(features(&image) & 1, 1);
    server.stop();
    assert_eq!(features(&image) & 1, 0, "a clean end clears it");
    qemu::check("qcow2", &image);
    qemu::io("qcow2", &image, &["read -P 7 7M 64k"]);
}

#[test]
fn what_is_corrupt_as_well_waits_for_a_decision() {
    let dir = TempDir::new();
    let dir = dir.root();
    make(dir, "cluster_size=4096");
    let image = dir.join("dirty.qcow2");
    let mut bytes = fs::read(&image).unwrap();
    bytes[79] |= 2;
    fs::write(&image, &bytes).unwrap();
    for command in [
        &["snapshot", "-c", "now", "dirty.qcow2"][..],
        &["bitmap", "--add", "dirty.qcow2", "new"],
        &["amend", "-o", "lazy_refcounts=off", "dirty.qcow2"],
        &["resize", "dirty.qcow2", "+1M"],
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "as.raw",
            "dirty.qcow2",
        ],
        &["serve", "dirty.qcow2", "--nbd", "unix:sock"],
    ] {
        let output = diskplane(dir, command);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{command:?}: {stderr}");
        assert!(stderr.contains("corrupt"), "{stderr}");
        assert!(stderr.contains("diskplane check --repair all"), "{stderr}");
        assert!(fs::read(&image).unwrap() == bytes, "{command:?}");
    }
    good(dir, &["check", "--repair", "all", "dirty.qcow2"]);
    assert_eq!(features(&image) & 3, 0);
    qemu::check("qcow2", &image);
    qemu::compare("qcow2", &image, "raw", dir.join("as.raw"));
}

#[test]
fn a_server_that_meets_corruption_marks_the_image() {
    let dir = TempDir::new();
    let dir = dir.root();
    let image = dir.join("a.qcow2");
    for lazy in ["off", "on"] {
        let options = format!("cluster_size=4096,lazy_refcounts={lazy}");
        qemu::create_with("qcow2", &image, &SIZE.to_string(), &options);
        qemu::io("qcow2", &image, &["write -P 1 0 64k"]);
        // The second cluster's entry points at the L1 table.
        let mut bytes = fs::read(&image).unwrap();
        let word = |bytes: &[u8], at: usize| {
            u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & !(1 << 63)
        };
        let l1 = word(&bytes, 40);
        let l2 = word(&bytes, l1 as usize) as usize;
        let sound = bytes[l2 + 8..l2 + 16].to_vec();
        bytes[l2 + 8..l2 + 16].copy_from_slice(&(l1 | 1 << 63).to_be_bytes());
        fs::write(&image, &bytes).unwrap();
        let (socket, program) = (dir.join("sock"), binary());
        let uri = qemu::nbd_unix_uri(&socket);
        let server = Serve::new(&program, &image).nbd_unix(&socket).start();
        qemu::io("raw", &uri, &["write -P 2 1M 64k", "flush"]);
        let failed = qemu::try_io("raw", &uri, &["write -P 3 4k 4k"]).unwrap_err();
        assert!(failed.contains("Input/output error"), "{failed}");
        // Nothing else is written any more, and what was is there.
        assert!(qemu::try_io("raw", &uri, &["write -P 3 2M 4k"]).is_err());
        qemu::io(
            "raw",
            &uri,
            &["flush", "read -P 2 1M 64k", "read -P 1 8k 56k"],
        );
        assert_eq!(features(&image) & 2, 2, "marked while it is served");
        server.stop();
        assert_eq!(features(&image) & 3, 2, "corrupt, and not dirty");
        assert_eq!(word(&fs::read(&image).unwrap(), l1 as usize), l2 as u64);
        let info = good(dir, &["info", "a.qcow2"]);
        assert!(info.contains("marked corrupt"), "{info}");
        // QEMU reads it, and refuses to write.
        let refused = qemu::try_io("qcow2", &image, &["write 0 4k"]).unwrap_err();
        assert!(refused.contains("corrupt"), "{refused}");
        let mut read = Command::new("qemu-io");
        let read = read
            .args(["-r", "-f", "qcow2", "-c", "read -P 2 1M 64k"])
            .arg(&image);
        let read = read.output().unwrap();
        assert!(read.status.success());
        // With the entry mended, a repair takes the mark away.
        let mut bytes = fs::read(&image).unwrap();
        bytes[l2 + 8..l2 + 16].copy_from_slice(&sound);
        fs::write(&image, &bytes).unwrap();
        good(dir, &["check", "--repair", "all", "a.qcow2"]);
        assert_eq!(features(&image) & 3, 0);
        qemu::io(
            "qcow2",
            &image,
            &["read -P 1 0 64k", "read -P 2 1M 64k", "write 0 4k"],
        );
        qemu::check("qcow2", &image);
        fs::remove_file(&image).unwrap();
    }
}
