//! Headers that are damaged, and what `diskplane qemu-img` says of them beside the installed qemu-img.

use crate::beside::same_in;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A field: where it is, and its bytes.
type Field = (usize, Vec<u8>);

fn be<const N: usize>(at: usize, value: u64) -> Field {
    (at, value.to_be_bytes()[8 - N..].to_vec())
}

fn le<const N: usize>(at: usize, value: u64) -> Field {
    (at, value.to_le_bytes()[..N].to_vec())
}

fn text(at: usize, value: &str) -> Field {
    (at, value.as_bytes().to_vec())
}

/// An image of `format` by the installed qemu-img.
fn image(dir: &Path, format: &str) -> Vec<u8> {
    let mut args = vec!["create", "-q", "-f", format];
    if format == "luks" {
        let secret = ["--object", "secret,id=s,data=abc"];
        args.extend(secret);
        args.extend(["-o", "key-secret=s,iter-time=1"]);
    }
    let made = Command::new("qemu-img")
        .args(args)
        .args(["whole", "8M"])
        .current_dir(dir)
        .status();
    assert!(made.unwrap().success());
    fs::read(dir.join("whole")).unwrap()
}

/// Damages an image of `format` by each of `fields` alone, and has both look at it.
#[track_caller]
fn same_of(format: &str, commands: &[&str], fields: &[Field]) {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let whole = image(theirs.path(), format);
    let mut lines = Vec::new();
    for (nth, (at, bytes)) in fields.iter().enumerate() {
        let mut damaged = whole.clone();
        damaged[*at..at + bytes.len()].copy_from_slice(bytes);
        for dir in [&theirs, &ours] {
            fs::write(dir.path().join(format!("{nth}")), &damaged).unwrap();
        }
        for command in commands {
            lines.push(format!("qemu-img {command} -f {format} {nth}"));
        }
    }
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    same_in(theirs.path(), ours.path(), &lines);
}

#[test]
fn of_qcow2_images() {
    let fields = [
        text(0, "QFIX"),
        be::<4>(4, 1),
        be::<4>(4, 4),
        be::<4>(20, 8),
        be::<4>(20, 22),
        be::<8>(24, 1 << 63),
        be::<4>(32, 5),
        be::<4>(32, 2),
        be::<4>(36, 0),
        be::<4>(36, 1 << 30),
        be::<8>(40, 123),
        be::<8>(72, 16 | 8),
        be::<8>(72, 1 << 40),
        be::<4>(96, 9),
        be::<4>(100, 16),
        be::<4>(100, 1 << 20),
        be::<8>(8, 1 << 40),
        be::<1>(104, 7),
        be::<1>(104, 1),
    ];
    same_of("qcow2", &["info", "map", "check"], &fields);
    // Of these a check tells more.
    let counts = [
        be::<8>(48, 7),
        be::<4>(56, 0),
        be::<4>(56, 1 << 30),
        be::<4>(60, 1 << 20),
    ];
    same_of("qcow2", &["info", "map"], &counts);
    same_of("qcow2", &["check"], &[be::<8>(48, 7), be::<4>(56, 1 << 30)]);
}

#[test]
fn of_images_with_two_tables() {
    let qcow = [
        text(0, "QFIX"),
        be::<4>(4, 2),
        be::<4>(4, 9),
        be::<8>(24, 0),
        be::<8>(24, 1 << 62),
        be::<1>(32, 48),
        be::<1>(33, 3),
        be::<1>(33, 32),
        be::<4>(36, 3),
    ];
    same_of("qcow", &["info", "map", "check"], &qcow);
    let qed = [
        text(0, "QEDX"),
        le::<4>(4, 3),
        le::<4>(8, 3),
        le::<4>(8, 1 << 30),
        le::<4>(12, 3),
        le::<4>(12, 64),
        le::<8>(16, 1 << 40),
        le::<8>(40, 5),
        le::<8>(48, 1 << 62),
        le::<8>(48, 3),
    ];
    same_of("qed", &["info", "map", "check"], &qed);
}

#[test]
fn of_others() {
    let vdi = [
        text(0x40, "1234"),
        le::<4>(0x44, 0x10002),
        le::<4>(0x154, 0x201),
        le::<4>(0x158, 0x401),
        le::<4>(0x168, 4096),
        le::<8>(0x170, 1 << 50),
        le::<4>(0x178, 512),
        le::<4>(0x178, 1_048_575),
        le::<4>(0x180, 3),
        le::<4>(0x180, 1 << 29),
        le::<4>(0x1a8, 1),
        le::<4>(0x1b8, 1),
    ];
    same_of("vdi", &["info", "map", "check"], &vdi);
    let vpc = [
        text(512, "xxsparse"),
        be::<8>(512 + 16, 1 << 62),
        be::<8>(512 + 16, u64::MAX - 7),
        be::<4>(512 + 28, 1),
        be::<4>(512 + 28, 0xffff_ffff),
        be::<4>(512 + 32, 0),
        be::<4>(512 + 32, 768),
    ];
    same_of("vpc", &["info", "map", "check"], &vpc);
    same_of("vhdx", &["info", "map", "check"], &[text(0, "vhdxfilx")]);
    let vmdk = [
        text(0, "XXXX"),
        le::<4>(4, 9),
        le::<8>(20, 0),
        le::<8>(20, 1 << 40),
        le::<4>(44, 1 << 20),
        le::<8>(64, 1 << 20),
    ];
    same_of("vmdk", &["info", "map", "check"], &vmdk);
    let parallels = [
        text(0, "XithoutFreeSpace"),
        le::<4>(16, 3),
        le::<4>(28, 0),
        le::<4>(28, 0x7fff_ffff),
        le::<4>(32, 1 << 30),
    ];
    same_of("parallels", &["info", "map", "check"], &parallels);
    let luks = [
        text(0, "LUKX"),
        be::<2>(6, 2),
        text(8, "xxx"),
        text(40, "foo"),
        text(72, "foo"),
        be::<4>(104, 1),
        be::<4>(108, 7),
        be::<4>(164, 0),
        be::<4>(208, 5),
        be::<4>(208 + 40, 1),
        be::<4>(208 + 44, 1),
    ];
    same_of("luks", &["info"], &luks);
}

#[test]
fn of_what_is_no_image() {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let formats = [
        "qcow2",
        "qcow",
        "qed",
        "vdi",
        "vpc",
        "vmdk",
        "parallels",
        "luks",
    ];
    let mut lines = Vec::new();
    for dir in [&theirs, &ours] {
        fs::write(dir.path().join("noise"), [0x55; 4096]).unwrap();
    }
    for format in formats {
        lines.push(format!("qemu-img info -f {format} noise"));
    }
    lines.push("qemu-img create -q -f qcow2 -u -b noise -F qcow2 over 1M".to_owned());
    lines.push("qemu-img map over".to_owned());
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    same_in(theirs.path(), ours.path(), &lines);
}
