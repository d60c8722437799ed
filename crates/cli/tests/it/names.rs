//! Files whose names are not UTF-8, wherever a command takes one, and within images.

use crate::beside::same;
use crate::common::{binary, json};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::{Command, Output};
use testkit::TempDir;
use testkit::server::Serve;

fn run(dir: &Path, args: &[&[u8]]) -> Output {
    let args = args.iter().map(|arg| OsStr::from_bytes(arg));
    let mut command = Command::new(binary());
    command.args(args).current_dir(dir).output().unwrap()
}

#[track_caller]
fn good(dir: &Path, args: &[&[u8]]) -> Vec<u8> {
    let output = run(dir, args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {said}");
    output.stdout
}

fn names(dir: &Path) -> Vec<OsString> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<OsString> = entries.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

#[test]
fn every_command_takes_any_name() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("seed"), [7; 65536]).unwrap();
    let name = |bytes: &[u8]| dir.join(OsStr::from_bytes(bytes));
    good(
        dir,
        &[b"convert", b"-f", b"raw", b"seed", b"base\xff.qcow2"],
    );
    good(
        dir,
        &[
            b"create",
            b"-b",
            b"base\xff.qcow2",
            b"-F",
            b"qcow2",
            b"\xfetop.qcow2",
        ],
    );
    // What the image has for its base leads there, in each format that has one.
    let info = good(dir, &[b"info", b"--backing-chain", b"\xfetop.qcow2"]);
    let shows = |text: &[u8], part: &[u8]| text.windows(part.len()).any(|found| found == part);
    assert!(shows(&info, b"base\xff.qcow2"), "{}", info.escape_ascii());
    let info = good(dir, &[b"info", b"--json", b"\xfetop.qcow2"]);
    // JSON is text.
    let info = json(&String::from_utf8(info).unwrap());
    assert_eq!(info["backing-filename"], "base\u{fffd}.qcow2", "{info}");
    for (format, base) in [
        (&b"qed"[..], &b"base\xff.qcow2"[..]),
        (b"vhd", b"b\xfd.vhd"),
        (b"vmdk", b"b\xfd.vmdk"),
    ] {
        let below: &[u8] = if format == b"qed" { b"qcow2" } else { format };
        if format != b"qed" {
            good(dir, &[b"convert", b"-O", format, b"base\xff.qcow2", base]);
        }
        let over = [b"over\xf0.", format].concat();
        good(
            dir,
            &[b"create", b"-f", format, b"-b", base, b"-F", below, &over],
        );
        good(dir, &[b"compare", &over, base]);
    }
    // VHDX knows names by UTF-16 only.
    good(
        dir,
        &[
            b"convert",
            b"-O",
            b"vhdx",
            b"seed",
            b"b\xfd.vhdx",
            b"-f",
            b"raw",
        ],
    );
    let args: [&[u8]; 8] = [
        b"create",
        b"-f",
        b"vhdx",
        b"-b",
        b"b\xfd.vhdx",
        b"-F",
        b"vhdx",
        b"o.vhdx",
    ];
    let output = run(dir, &args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("not UTF-8"),
        "{said}"
    );
    assert!(!dir.join("o.vhdx").exists());

    good(
        dir,
        &[
            b"dd",
            b"if=\xfetop.qcow2",
            b"of=copy\xff",
            b"bs=4k",
            b"count=2",
        ],
    );
    assert_eq!(fs::read(name(b"copy\xff")).unwrap(), [7; 8192]);
    let options = b"driver=qcow2,file.filename=\xfetop.qcow2";
    good(
        dir,
        &[
            b"compare",
            b"--image-opts",
            options,
            b"file.filename=base\xff.qcow2",
        ],
    );
    good(dir, &[b"bench", b"image", b"-c", b"10", b"\xfetop.qcow2"]);
    good(
        dir,
        &[
            b"rebase",
            b"-b",
            b"b\xfd.vhdx",
            b"-F",
            b"vhdx",
            b"\xfetop.qcow2",
        ],
    );
    good(dir, &[b"compare", b"\xfetop.qcow2", b"base\xff.qcow2"]);
    good(
        dir,
        &[
            b"rebase",
            b"-b",
            b"base\xff.qcow2",
            b"-F",
            b"qcow2",
            b"\xfetop.qcow2",
        ],
    );
    good(dir, &[b"commit", b"\xfetop.qcow2"]);
    good(
        dir,
        &[
            b"create",
            b"-f",
            b"qcow2",
            b"-o",
            b"data_file=data\xff",
            b"d\xff.qcow2",
            b"1M",
        ],
    );
    good(dir, &[b"convert", b"-n", b"\xfetop.qcow2", b"d\xff.qcow2"]);
    assert!(fs::metadata(name(b"data\xff")).unwrap().len() >= 65536);
    let socket = dir.join("sock");
    let server = Serve::new(binary(), name(b"\xfetop.qcow2"))
        .nbd_unix(&socket)
        .start();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    good(
        dir,
        &[
            b"convert",
            b"-f",
            b"raw",
            b"-O",
            b"raw",
            uri.as_bytes(),
            b"served",
        ],
    );
    assert_eq!(fs::read(dir.join("served")).unwrap(), [7; 65536]);
    server.stop();
    let disk = [b"\xfetop.qcow2,nbd=unix:", socket.as_os_str().as_bytes()].concat();
    let mut child = Command::new(binary())
        .arg("serve")
        .arg("--disk")
        .arg(OsStr::from_bytes(&disk))
        .current_dir(dir)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = Vec::new();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_until(&mut lines, b'\n', &mut ready).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        ready.starts_with(b"ready \xfetop.qcow2 64 KiB "),
        "{}",
        ready.escape_ascii()
    );
    // Nothing got a name that only looks like the one that was said.
    for name in names(dir) {
        assert!(
            !name
                .to_string_lossy()
                .contains(['\u{10ffff}', '\u{10fffe}']),
            "{name:?}"
        );
        assert!(
            !name.to_str().is_some_and(|text| text.contains('\u{fffd}')),
            "{name:?}"
        );
    }
}

#[test]
fn as_qemu_img_too() {
    same(&[
        r"qemu-img create -f qcow2 b\xff 1M",
        r"qemu-img create -f qcow2 -b b\xff -F qcow2 t\xe4p",
        r"qemu-img create -f qed -b b\xff -F qcow2 q\xff",
        r"qemu-img create -f qcow2 -o backing_file=b\xff,backing_fmt=qcow2 u\xff",
        r"qemu-img create -f qcow2 -o data_file=data\xff d\xff 1M",
        r"qemu-img create -f vmdk -o subformat=monolithicFlat v\xff.vmdk 1M",
        r"qemu-io -c write_-P_7_64k_64k t\xe4p",
        r"qemu-img info t\xe4p",
        r"qemu-img info --output=json t\xe4p",
        r"qemu-img info --backing-chain t\xe4p",
        r"qemu-img info q\xff",
        r"qemu-img info d\xff",
        r"qemu-img info v\xff.vmdk",
        r"qemu-img map t\xe4p",
        r"qemu-img check t\xe4p",
        r"qemu-img convert -O raw t\xe4p c\xff",
        r"qemu-img compare t\xe4p c\xff",
        r"qemu-img compare --image-opts driver=qcow2,file.filename=t\xe4p file.filename=b\xff",
        r"qemu-img dd if=t\xe4p of=e\xff bs=64k count=2",
        r"qemu-img compare -f raw c\xff e\xff",
        r"qemu-img rebase -u -b q\xff -F qed t\xe4p",
        r"qemu-img info t\xe4p",
        r"qemu-img rebase -b b\xff -F qcow2 t\xe4p",
        r"qemu-img commit t\xe4p",
        r"qemu-img commit -b b\xff u\xff",
        r"qemu-img snapshot -c one t\xe4p",
        r"qemu-img resize t\xe4p 2M",
        r"qemu-img measure -O qcow2 t\xe4p",
        r"qemu-img bench -c 1 t\xe4p",
        r"qemu-img info nix\xff",
        r"qemu-img create -f qcow2 -b nix\xff -F raw x",
        r"qemu-img create -f raw no\xff/where 1M",
        r"qemu-img convert nix\xff x",
        r"qemu-img compare nix\xff t\xe4p",
        r"qemu-img info file:t\xe4p",
        "qemu-img info gr\u{fc}n",
        r"qemu-img create -f qcow2 \xc3\xbc\xff 1M",
        r"qemu-img info --output=json \xc3\xbc\xff",
    ]);
}
