//! Commands whose disk is full: what they leave can be opened, nothing that was there is lost, the message says what to do,
//! and when there is room the same line succeeds.
//!
//! A file system of its own, in memory or on a loop device, has all files of a case; a file takes what is left but for so many
//! bytes. It takes root to make one: without, the tests are skipped and say so.

use crate::common::{self, binary, qemu_img, run};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use testkit::{TempDir, qemu};

const MIB: usize = 1 << 20;

/// File systems, and their MiB: the last has 300 at least.
const KINDS: [(&str, u64); 3] = [("tmpfs", 24), ("ext4", 40), ("xfs", 300)];

/// A small file system.
struct Small(PathBuf);

impl Small {
    /// `None` where it cannot be had.
    fn new(dir: &TempDir, (kind, mib): (&str, u64)) -> Option<Self> {
        let path = dir.path("small");
        fs::create_dir(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", kind]);
        if kind == "tmpfs" {
            mount.args(["-o", &format!("size={mib}m"), "none"]);
        } else {
            let device = dir.path("device");
            let file = fs::File::create(&device).unwrap();
            file.set_len(mib << 20).unwrap();
            let mut make = Command::new(format!("/sbin/mkfs.{kind}"));
            make.arg("-q");
            if kind == "ext4" {
                // Root may take all of it.
                make.args(["-m", "0"]);
            }
            let made = make.arg(&device).output();
            if !made.as_ref().is_ok_and(|made| made.status.success()) {
                eprintln!("skipped: no {kind} here: {made:?}");
                return None;
            }
            mount.args(["-o", "loop"]).arg(device);
        }
        match mount.arg(&path).output() {
            Ok(mounted) if mounted.status.success() => {
                let _ = fs::remove_dir(path.join("lost+found"));
                Some(Self(path))
            }
            failed => {
                eprintln!("skipped: no {kind} of its own here: {failed:?}");
                None
            }
        }
    }

    /// Takes all that is free, but for `left` bytes.
    fn fill(&self, left: usize) {
        let path = self.0.join("filler");
        let mut filler = fs::File::create(&path).unwrap();
        // Most of it without writing it.
        let mut piece = 64 * MIB;
        let mut taken = 0;
        while piece >= MIB {
            let len = piece.to_string();
            let offset = taken.to_string();
            let mut allocate = Command::new("fallocate");
            allocate.args(["--offset", &offset, "--length", &len]);
            match allocate.arg(&path).output() {
                Ok(allocated) if allocated.status.success() => taken += piece,
                _ => piece /= 2,
            }
        }
        filler.set_len(taken as u64).unwrap();
        filler.seek(SeekFrom::End(0)).unwrap();
        while let Ok(bytes @ 1..) = filler.write(&[0x55; 4096]) {
            taken += bytes;
        }
        filler.set_len(taken.saturating_sub(left) as u64).unwrap();
        // Where freed space comes back late.
        filler.sync_all().unwrap();
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }

    fn names(&self) -> BTreeSet<String> {
        let names = fs::read_dir(&self.0).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Bytes that no compressor makes fewer.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// Runs a line of words: of qemu-img's, of qemu-io's (whose commands have `_` for a space), or of ours.
fn line(dir: &Path, line: &str) -> Output {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap();
    let words: Vec<String> = words
        .map(|word| match program {
            "qemu-io" => word.replace('_', " "),
            _ => word.to_owned(),
        })
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match program {
        "diskplane" => run(binary(), dir, &words),
        program => run(program, dir, &words),
    }
}

#[track_caller]
fn done(dir: &Path, text: &str) {
    let output = line(dir, text);
    assert!(output.status.success(), "{text}: {output:?}");
}

/// What a failed line of a drop-in leaves of the file that it was to make.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    /// An image that can be opened, is as large as the source, and whose tables are right.
    Image,
    /// Something else.
    Wreck(String),
}

fn left(dir: &Path, format: &str) -> Left {
    if !dir.join("target").exists() {
        return Left::Nothing;
    }
    let info = line(
        dir,
        &format!("qemu-img info -f {format} --output=json target"),
    );
    if !info.status.success() {
        return Left::Wreck(String::from_utf8_lossy(&info.stderr).into_owned());
    }
    let size = common::json(&String::from_utf8_lossy(&info.stdout))["virtual-size"].clone();
    // VHD images are as large as a geometry is.
    if format != "vpc" && size != (8 * MIB) as u64 {
        return Left::Wreck(format!("{size} bytes"));
    }
    let check = line(dir, &format!("qemu-img check -q -f {format} target"));
    // Leaks are none; raw images and VHD images have nothing to check.
    match check.status.code() {
        Some(0 | 3 | 63) => Left::Image,
        code => Left::Wreck(format!("check: {code:?}")),
    }
}

/// In qemu-img's place a failed copy leaves what qemu-img leaves: an image that can be opened.
#[test]
fn a_copy_that_fails_in_qemu_imgs_place_leaves_an_image() {
    let dir = TempDir::new();
    let content = noise(8 * MIB);
    for (format, options) in [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "-c"),
        ("qcow2", "-c -o compression_type=zstd"),
        ("qcow2", "-o cluster_size=4k"),
        ("qcow2", "-o preallocation=metadata"),
        ("qcow2", "-o preallocation=falloc"),
        ("qcow2", "-o preallocation=full"),
        ("qed", ""),
        ("vdi", ""),
        ("vpc", ""),
        ("vhdx", "-o block_size=1M"),
        ("vhdx", ""),
        ("vmdk", ""),
        ("vmdk", "-o subformat=monolithicFlat"),
        ("vmdk", "-o subformat=streamOptimized"),
    ] {
        let what = format!("-O {format} {options}");
        let outcomes = ["qemu-img", "diskplane qemu-img"].map(|program| {
            let dir = TempDir::new();
            let small = Small::new(&dir, KINDS[0])?;
            let at = small.0.as_path();
            fs::write(at.join("source"), &content).unwrap();
            small.fill(3 * MIB);
            let copy = format!("{program} convert -f raw {what} source target");
            let failed = line(at, &copy);
            let said = String::from_utf8_lossy(&failed.stderr).into_owned();
            assert_eq!(failed.status.code(), Some(1), "{copy}: {said}");
            let left = left(at, format);
            // Of those who write it once QEMU does not say that there is no room.
            let full = said.contains("No space left on device");
            assert!(full || program == "qemu-img", "{copy}: {said}");
            small.free();
            done(at, &copy);
            let compare = format!("qemu-img compare -f raw -F {format} source target");
            done(at, &compare);
            Some(left)
        });
        let [Some(theirs), Some(ours)] = outcomes else {
            return;
        };
        let as_well = ours == Left::Image || ours == theirs;
        assert!(as_well, "{what}: qemu-img leaves {theirs:?}, we {ours:?}");
    }
    drop(dir);
}

/// Wherever the space ends, what a commit leaves of a VHDX base can be opened by whoever comes next: its log is empty, or is put in
/// its place first, by QEMU and by us.
#[test]
fn a_vhdx_base_has_no_log_or_one_that_is_replayed() {
    let dir = TempDir::new();
    let root = dir.root();
    done(root, "qemu-img create -q -f vhdx -o block_size=1M new 64M");
    // A file's holes take space when they are written: the log's too.
    let sparse = ["--sparse=always", "new", "base"];
    assert!(run("cp", root, &sparse).status.success());
    let taken = fs::metadata(dir.path("base")).unwrap().blocks() * 512;
    let (mut failed, mut with_log) = (0, 0);
    // The first entries of the log, and the first block.
    for kib in (taken / 1024..taken / 1024 + 80)
        .step_by(4)
        .chain((1032..1080).step_by(4))
    {
        let dir = TempDir::new();
        let at = dir.path("small");
        fs::create_dir(&at).unwrap();
        let size = format!("size={kib}k");
        let mount = ["-t", "tmpfs", "-o", &size, "none", at.to_str().unwrap()];
        if !run("mount", root, &mount).status.success() {
            eprintln!("skipped: no tmpfs of its own here");
            return;
        }
        let small = Small(at);
        let base = small.0.join("base");
        let copy = ["--sparse=always", "base", base.to_str().unwrap()];
        if !run("cp", root, &copy).status.success() {
            continue;
        }
        let top = dir.path("top");
        done(
            dir.root(),
            "qemu-img create -q -f qcow2 -b small/base -F vhdx top",
        );
        qemu::io("qcow2", &top, &["write -P 7 0 1M"]);
        let commit = run(binary(), dir.root(), &["commit", "top"]);
        failed += usize::from(!commit.status.success());
        let bytes = fs::read(&base).unwrap();
        let guid = |at: usize| bytes[at + 48..at + 64].iter().any(|byte| *byte != 0);
        with_log += usize::from(guid(64 << 10) || guid(128 << 10));
        // Where there is room.
        for name in ["ours", "theirs"] {
            fs::copy(&base, dir.path(name)).unwrap();
        }
        let repair = ["check", "--repair", "all", "ours"];
        assert!(run(binary(), dir.root(), &repair).status.success(), "{kib}");
        let zeros = ["write -z 32M 1M"];
        qemu::io("vhdx", dir.path("theirs"), &zeros);
        for name in ["ours", "theirs"] {
            qemu_img(dir.root(), &["check", "-q", "-f", "vhdx", name]);
        }
        let same = [
            "compare", "-q", "-f", "vhdx", "-F", "vhdx", "ours", "theirs",
        ];
        qemu_img(dir.root(), &same);
        // And the work can be done again.
        let more = ["-o", "remount,size=16m", small.0.to_str().unwrap()];
        assert!(run("mount", root, &more).status.success());
        if !commit.status.success() {
            let again = run(binary(), dir.root(), &["commit", "top"]);
            assert!(again.status.success(), "{kib}: {again:?}");
        }
        qemu::io("vhdx", &base, &["read -P 7 0 1M"]);
    }
    assert!(failed > 10 && with_log > 0, "{failed} {with_log}");
}

/// A command, what it is done to, and what the disk reads as afterwards.
struct Case {
    /// Lines before, in a folder with `noise`, 4 MiB.
    before: &'static [&'static str],
    /// Bytes that are free.
    left: usize,
    line: &'static str,
    /// Images that must be sound, and read as before, where the command failed: with their formats.
    images: &'static [(&'static str, &'static str)],
    /// What the message says, besides that there is no room.
    says: &'static str,
}

const OVERLAY: [&str; 3] = [
    "qemu-img create -q -f qcow2 base 16M",
    "qemu-img create -q -f qcow2 -b base -F qcow2 top",
    "qemu-io -f qcow2 -c write_-q_-P_1_0_4M -c write_-q_-P_2_9M_64k top",
];

const CASES: &[Case] = &[
    Case {
        before: &OVERLAY,
        left: MIB,
        line: "commit top",
        images: &[("top", "qcow2")],
        says: "base",
    },
    Case {
        before: &OVERLAY,
        left: MIB,
        line: "qemu-img commit top",
        images: &[("top", "qcow2")],
        says: "",
    },
    Case {
        before: &[
            "qemu-img create -q -f qcow2 base 16M",
            "qemu-io -f qcow2 -c write_-q_-P_1_0_4M base",
            "qemu-img create -q -f qcow2 other 16M",
            "qemu-img create -q -f qcow2 -b base -F qcow2 top",
        ],
        left: MIB,
        line: "rebase -b other -F qcow2 top",
        images: &[("base", "qcow2"), ("top", "qcow2")],
        says: "top",
    },
    Case {
        before: &["qemu-img create -q -f qcow2 top 4M"],
        left: MIB,
        line: "resize --preallocation full top 12M",
        images: &[("top", "qcow2")],
        says: "top",
    },
    Case {
        before: &["qemu-img create -q -f qcow2 top 4M"],
        left: MIB,
        line: "resize --preallocation falloc top 12M",
        images: &[("top", "qcow2")],
        says: "top",
    },
    Case {
        before: &["qemu-img create -q -f raw top 4M"],
        left: MIB,
        line: "resize -f raw --preallocation full top 12M",
        images: &[("top", "raw")],
        says: "top",
    },
    Case {
        before: &[
            "qemu-img create -q -f qcow2 top 8M",
            "qemu-io -f qcow2 -c write_-q_-P_1_0_1M top",
        ],
        left: 0,
        line: "snapshot -c one top",
        images: &[("top", "qcow2")],
        says: "top",
    },
    Case {
        before: &["qemu-img create -q -f qcow2 top 8M"],
        left: 0,
        line: "bitmap --add top one",
        images: &[("top", "qcow2")],
        says: "top",
    },
    Case {
        before: &[
            "qemu-img create -q -f qcow2 top 8M",
            "qemu-io -f qcow2 -c write_-q_-P_1_0_1M top",
        ],
        left: 0,
        line: "amend -o refcount_bits=64 top",
        images: &[("top", "qcow2")],
        says: "top",
    },
    Case {
        before: &[
            "qemu-img create -q -f qcow2 -b noise -F raw top 4M",
            "qemu-io -f qcow2 -c write_-q_-z_0_2M top",
        ],
        left: 512 << 10,
        line: "amend -o compat=0.10 top",
        images: &[("top", "qcow2")],
        says: "top",
    },
    Case {
        before: &[],
        left: MIB,
        line: "convert -f raw -O qcow2 noise new",
        images: &[],
        says: "new",
    },
    Case {
        before: &[],
        left: MIB,
        line: "convert -c -f raw -O qcow2 noise new",
        images: &[],
        says: "new",
    },
    Case {
        before: &[],
        left: MIB,
        line: "convert -f raw -O vhdx noise new",
        images: &[],
        says: "new",
    },
    Case {
        before: &[],
        left: MIB,
        line: "dd -f raw -O raw if=noise of=new bs=1M count=3",
        images: &[],
        says: "new",
    },
    Case {
        before: &[],
        left: MIB,
        line: "create -q -f qcow2 -o preallocation=full new 4M",
        images: &[],
        says: "new",
    },
    Case {
        before: &[],
        left: MIB,
        line: "create -q -f raw -o preallocation=falloc new 4M",
        images: &[],
        says: "new",
    },
    Case {
        before: &[
            "qemu-img create -q -f qcow2 top 4M",
            "qemu-io -f qcow2 -c write_-q_-P_1_0_64k top",
        ],
        left: MIB,
        line: "convert -n -f raw -O qcow2 noise top",
        // It was to be overwritten.
        images: &[],
        says: "top",
    },
];

#[test]
fn a_command_that_fails_for_want_of_room_has_changed_nothing_and_can_be_done_again() {
    for (kind, case) in KINDS
        .into_iter()
        .flat_map(|k| CASES.iter().map(move |c| (k, c)))
    {
        let dir = TempDir::new();
        let Some(small) = Small::new(&dir, kind) else {
            continue;
        };
        let at = small.0.as_path();
        fs::write(at.join("noise"), noise(4 * MIB)).unwrap();
        case.before.iter().for_each(|text| done(at, text));
        let before: Vec<PathBuf> = (case.images.iter())
            .map(|(name, format)| {
                let copy = dir.path(format!("{name}.before"));
                let copied = copy.to_str().unwrap();
                qemu_img(at, &["convert", "-f", format, "-O", "raw", name, copied]);
                copy
            })
            .collect();
        small.fill(case.left);
        let names = small.names();
        let text = format!("diskplane {}", case.line);
        eprintln!("{}: {text}", kind.0);
        let failed = line(at, &text);
        let said = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert_eq!(failed.status.code(), Some(1), "{text}: {said}");
        assert_eq!(said.lines().count(), 1, "{text}: {said}");
        assert!(said.contains("No space left on device"), "{text}: {said}");
        assert!(said.contains(case.says), "{text}: {said}");
        if !case.line.starts_with("qemu-img") {
            assert!(said.contains("make room there"), "{text}: {said}");
        }
        assert_eq!(small.names(), names, "{text}");
        small.free();
        for ((name, format), before) in case.images.iter().zip(&before) {
            let check = line(at, &format!("qemu-img check -q -f {format} {name}"));
            let code = check.status.code();
            assert!(matches!(code, Some(0 | 3 | 63)), "{text}: {name}: {code:?}");
            let before = before.to_str().unwrap();
            qemu_img(
                at,
                &["compare", "-q", "-f", format, "-F", "raw", name, before],
            );
        }
        done(at, &text);
        if at.join("new").exists() && case.line.contains("-O qcow2") {
            qemu_img(at, &["compare", "-f", "raw", "-F", "qcow2", "noise", "new"]);
        }
    }
}

/// Of what is free all is used before a copy fails: reservations ahead of need are no reason.
#[test]
fn what_fits_is_copied_to_the_last_cluster() {
    let dir = TempDir::new();
    // ext4 keeps the blocks of an allocation that failed, and XFS what it guesses will be written: there it is not exact.
    let Some(small) = Small::new(&dir, KINDS[0]) else {
        return;
    };
    let at = small.0.as_path();
    fs::write(at.join("noise"), noise(4 * MIB)).unwrap();
    // Of a large disk much is reserved ahead.
    let file = fs::File::options().write(true).open(at.join("noise"));
    file.unwrap().set_len(64 * MIB as u64).unwrap();
    for format in ["qcow2", "qed", "vmdk"] {
        // The data, and a few clusters of tables.
        for (left, fits) in [(4 * MIB + (512 << 10), true), (4 * MIB - 4096, false)] {
            small.fill(left);
            let text = format!("diskplane convert -f raw -O {format} noise new");
            let output = line(at, &text);
            assert_eq!(output.status.success(), fits, "{left}: {text}: {output:?}");
            small.free();
            if fits {
                qemu_img(at, &["compare", "-f", "raw", "-F", format, "noise", "new"]);
                fs::remove_file(at.join("new")).unwrap();
            }
            assert_eq!(small.names().len(), 1);
        }
    }
}
