//! What `diskplane convert` must not do where it goes on with a copy, writes into an image or onto a device.

use crate::common;

use common::{binary, failure, good, json, qemu_img, refused};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use testkit::{TempDir, qemu};

const MIB: usize = 1 << 20;

/// An empty file of so many bytes.
fn hole(path: &Path, bytes: usize) {
    fs::File::create(path)
        .unwrap()
        .set_len(bytes as u64)
        .unwrap();
}

/// Makes of what was copied what a run that was killed before the end leaves.
fn unfinish(dir: &Path, name: &str) {
    fs::rename(dir.join(name), dir.join(format!("{name}.part"))).unwrap();
}

/// Zeros that source and base share are zeros in the target too, of whatever went through the buffers before.
#[test]
fn zeros_over_clusters_of_their_own_stay_zeros() {
    let dir = TempDir::new();
    let dir = dir.root();
    for tail in [64 << 10, 512] {
        let bytes = 4 * MIB + tail;
        hole(&dir.join("base.raw"), bytes);
        qemu::create("qcow2", dir.join("src.qcow2"), &bytes.to_string());
        qemu::io("qcow2", dir.join("src.qcow2"), &["write -P 0xab 0 4M"]);
        let make = ["create", "-q", "-b", "base.raw", "-F", "raw", "dst.qcow2"];
        good(dir, &make);
        let write = format!("write -P 0x11 4M {tail}");
        qemu::io("qcow2", dir.join("dst.qcow2"), &[&write]);
        let args = [
            "convert",
            "-n",
            "-m",
            "1",
            "-B",
            "base.raw",
            "-F",
            "raw",
            "src.qcow2",
            "dst.qcow2",
        ];
        good(dir, &args);
        qemu::compare(
            "qcow2",
            dir.join("src.qcow2"),
            "qcow2",
            dir.join("dst.qcow2"),
        );
        for name in ["base.raw", "src.qcow2", "dst.qcow2"] {
            fs::remove_file(dir.join(name)).unwrap();
        }
    }
}

#[test]
fn a_base_in_another_format_is_another_base() {
    let dir = TempDir::new();
    let dir = dir.root();
    qemu::create("qcow2", dir.join("base"), "2M");
    qemu::io("qcow2", dir.join("base"), &["write -P 5 0 1M"]);
    qemu_img(dir, &["convert", "-O", "raw", "base", "a.raw"]);
    good(
        dir,
        &["create", "-q", "-b", "base", "-F", "qcow2", "b.qcow2"],
    );
    let line = refused(
        dir,
        &[
            "convert", "-n", "-B", "base", "-F", "raw", "a.raw", "b.qcow2",
        ],
    );
    assert!(line.contains("DST has its backing file as qcow2"), "{line}");
    let with = |format| {
        [
            "convert", "--resume", "-B", "base", "-F", format, "a.raw", "c.qcow2",
        ]
    };
    good(dir, &with("qcow2"));
    unfinish(dir, "c.qcow2");
    let line = refused(dir, &with("raw"));
    assert!(
        line.contains("another format of the backing file"),
        "{line}"
    );
    assert!(line.contains("no part of this copy"), "{line}");
    good(dir, &with("qcow2"));
    let names = [dir.join("a.raw"), dir.join("c.qcow2")];
    qemu::compare("raw", &names[0], "qcow2", &names[1]);
}

#[test]
fn a_copy_with_other_options_is_another_copy() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("a.raw"), vec![7; MIB]).unwrap();
    let with = |option| ["convert", "--resume", "-o", option, "a.raw", "b.qcow2"];
    good(dir, &with("compat=1.1"));
    unfinish(dir, "b.qcow2");
    for option in [
        "refcount_bits=8",
        "lazy_refcounts=on",
        "extended_l2=on",
        "compression_type=zstd",
        "cluster_size=4K",
        "compat=0.10",
    ] {
        let line = refused(dir, &with(option));
        let name = option.split('=').next().unwrap();
        assert!(line.contains(&format!("it has another {name}: ")), "{line}");
    }
    let report = json(&good(
        dir,
        &["convert", "--resume", "--json", "a.raw", "b.qcow2"],
    ));
    assert_eq!(report["resumed"], MIB);
}

/// Killed at its very beginning, and at its very end.
#[test]
fn a_copy_goes_on_from_its_ends() {
    let dir = TempDir::new();
    let dir = dir.root();
    // It has no size yet. What a raw disk holds may look like an image.
    qemu::create("qcow2", dir.join("a.raw"), "1M");
    let args = ["convert", "-f", "raw", "--resume", "a.raw", "b.raw"];
    fs::write(dir.join("b.raw.part"), []).unwrap();
    good(dir, &args);
    qemu::compare("raw", dir.join("a.raw"), "raw", dir.join("b.raw"));
    unfinish(dir, "b.raw");
    good(dir, &args);
    // Another's file is not removed for having no header.
    let args = ["convert", "-f", "raw", "--resume", "a.raw", "c.qcow2"];
    fs::write(dir.join("c.qcow2.part"), [1; 600]).unwrap();
    let line = refused(dir, &args);
    assert!(line.contains("it has another format"), "{line}");
    fs::write(dir.join("c.qcow2.part"), [0; 600]).unwrap();
    good(dir, &args);
    // Its bitmaps are there, its name is not.
    qemu::create("qcow2", dir.join("d"), "8M");
    qemu_img(dir, &["bitmap", "--add", "d", "bm"]);
    qemu_img(
        dir,
        &["bitmap", "--add", "--disable", "-g", "128k", "d", "off"],
    );
    qemu::io("qcow2", dir.join("d"), &["write -P 1 1M 300k"]);
    let with = ["convert", "--resume", "--bitmaps", "d", "e.qcow2"];
    let without = ["convert", "--resume", "d", "e.qcow2"];
    let listed = |name: &str| json(&good(dir, &["bitmap", "--json", name]))["bitmaps"].clone();
    good(dir, &with);
    unfinish(dir, "e.qcow2");
    good(dir, &with);
    assert_eq!(listed("e.qcow2"), listed("d"));
    qemu::check("qcow2", dir.join("e.qcow2"));
    unfinish(dir, "e.qcow2");
    good(dir, &without);
    assert_eq!(listed("e.qcow2"), serde_json::json!([]));
    qemu::check("qcow2", dir.join("e.qcow2"));
    qemu::compare("qcow2", dir.join("d"), "qcow2", dir.join("e.qcow2"));
}

/// Runs diskplane with system calls that fail; `None` where that cannot be had.
fn failing(dir: &Path, inject: &str, args: &[&str]) -> Option<Output> {
    let output = Command::new("strace")
        .args(["-f", "-qq", "-o", "calls"])
        .args(["-e", "trace=fdatasync,fadvise64", "-e", inject])
        .arg(binary())
        .args(args)
        .current_dir(dir)
        .output();
    match output {
        Ok(output) if output.stderr.starts_with(b"strace: ") => {
            eprintln!("skipped: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("skipped: strace: {error}");
            None
        }
    }
}

/// After a failed sync the host's memory has what the disk has not, and says that it is clean.
#[test]
fn what_the_host_failed_to_write_is_not_gone_on_with() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("a.raw"), vec![7; MIB]).unwrap();
    let args = ["convert", "--resume", "a.raw", "b.raw"];
    // The first belongs to the file without data.
    for (inject, is_there) in [
        ("inject=fdatasync:error=EIO:when=2+", false),
        ("inject=fdatasync:error=ENOSPC:when=2+", false),
        ("inject=fdatasync:error=EIO:when=1+", true),
    ] {
        if is_there {
            fs::write(dir.join("b.raw.part"), vec![7; MIB]).unwrap();
        }
        let Some(output) = failing(dir, inject, &args) else {
            return;
        };
        let said = failure(&args, &output, 1);
        assert!(said.contains("removed"), "{said}");
        assert!(!dir.join("b.raw").exists(), "{said}");
        assert!(!dir.join("b.raw.part").exists(), "{said}");
    }
    // What is there is read from the disk.
    fs::write(dir.join("b.raw.part"), vec![7; MIB]).unwrap();
    let none = "inject=fdatasync:error=EIO:when=1000+";
    let output = failing(dir, none, &args).unwrap();
    assert!(output.status.success(), "{output:?}");
    let calls = fs::read_to_string(dir.join("calls")).unwrap();
    assert!(calls.contains("POSIX_FADV_DONTNEED"), "{calls}");
}

/// A loop device, detached when dropped.
struct Loop(String);

impl Loop {
    fn new(path: &Path) -> Option<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(path)
            .output();
        match made {
            Ok(made) if made.status.success() => {
                Some(Self(String::from_utf8_lossy(&made.stdout).trim().into()))
            }
            made => {
                eprintln!("skipped: no loop device here: {made:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_fixed_vhd_image_is_not_put_on_a_device() {
    let dir = TempDir::new();
    let dir = dir.root();
    // What the device has would show where the source has zeros.
    fs::write(dir.join("device"), vec![0x99; MIB + 512]).unwrap();
    hole(&dir.join("a.raw"), MIB);
    let Some(device) = Loop::new(&dir.join("device")) else {
        return;
    };
    for args in [
        &[
            "convert",
            "-O",
            "vhd",
            "-o",
            "subformat=fixed,force_size=on",
        ][..],
        &["create", "-f", "vhd", "-o", "subformat=fixed,force_size=on"],
    ] {
        let files: [&str; 2] = match args[0] {
            "convert" => ["a.raw", &device.0],
            _ => [&device.0, "1M"],
        };
        let line = refused(dir, &[args, &files].concat());
        assert!(line.contains("a fixed vhd image on a device"), "{line}");
    }
    drop(device);
    assert!(fs::read(dir.join("device")).unwrap() == vec![0x99; MIB + 512]);
}

/// Neither through a link that leads to it, nor as its own source where no lock keeps it safe.
#[test]
fn nobody_elses_file_is_written_over() {
    let dir = TempDir::new();
    let dir = dir.root();
    let content = vec![7; MIB];
    fs::write(dir.join("a.raw"), vec![1; MIB]).unwrap();
    fs::write(dir.join("precious"), &content).unwrap();
    std::os::unix::fs::symlink("precious", dir.join("b.raw.part")).unwrap();
    let goes_on = ["convert", "-f", "raw", "--resume", "a.raw", "b.raw"];
    let text = refused(dir, &goes_on);
    assert!(text.contains("b.raw.part: is not a regular file"), "{text}");
    let over_itself = [
        "convert", "-n", "-U", "-f", "raw", "-O", "raw", "precious", "precious",
    ];
    let text = refused(dir, &over_itself);
    assert!(text.contains("is read from, too"), "{text}");
    qemu::create_overlay(dir.join("over.qcow2"), "precious", "raw");
    let over_its_base = ["convert", "-n", "-U", "-O", "raw", "over.qcow2", "precious"];
    let text = refused(dir, &over_its_base);
    assert!(text.contains("is read from, too"), "{text}");
    assert!(fs::read(dir.join("precious")).unwrap() == content);
    let text = refused(dir, &["convert", "ssh://localhost/disk", "c.raw"]);
    assert!(text.contains("has a protocol"), "{text}");
}
