//! Encrypted images and their keys on the command line, beside QEMU's tools.

use crate::common;

use common::{binary, diskplane, failure, good};
use std::{fs, path::Path, process::Command};
use testkit::TempDir;

#[track_caller]
fn bad(dir: &Path, args: &[&str], why: &str) {
    let stderr = failure(args, &diskplane(dir, args), 1);
    assert!(stderr.contains(why), "{stderr}");
    assert!(!stderr.contains("sesame"), "{stderr}");
}

/// Whether QEMU opens the image with what is in `file`.
fn qemu_opens(dir: &Path, file: &str) -> bool {
    let output = Command::new("qemu-io")
        .args([
            "--object",
            &format!("secret,id=k,file={file}"),
            "--image-opts",
        ])
        .arg("driver=qcow2,encrypt.key-secret=k,file.filename=disk.qcow2")
        .args(["-c", "read -P 0 0 64k"])
        .current_dir(dir)
        .output()
        .unwrap();
    output.status.success()
}

#[test]
fn keys_are_those_that_qemu_opens() {
    let temp = TempDir::new();
    let dir = temp.root();
    for name in ["one", "two", "three"] {
        fs::write(dir.join(name), format!("{name} sesame")).unwrap();
    }
    let create = "create -o encrypt.format=luks,encrypt.iter-time=1 --key-file one disk.qcow2 1M";
    let args: Vec<&str> = create.split(' ').collect();
    assert!(good(dir, &args).contains("encrypted with aes-256 xts-plain64"));
    assert!(qemu_opens(dir, "one") && !qemu_opens(dir, "two"));

    // The same to both, whatever the order of the fields.
    let ours: serde_json::Value =
        serde_json::from_str(&good(dir, &["info", "--json", "disk.qcow2"])).unwrap();
    let theirs = Command::new("qemu-img")
        .args(["info", "--output=json", "disk.qcow2"])
        .current_dir(dir)
        .output()
        .unwrap();
    let theirs: serde_json::Value = serde_json::from_slice(&theirs.stdout).unwrap();
    assert_eq!(
        ours["encrypt"],
        theirs["format-specific"]["data"]["encrypt"]
    );
    assert_eq!(ours["encrypted"], true);

    let amend = |options: &str, more: &[&str]| -> Vec<String> {
        let args = ["amend", "-o", options, "--object", "secret,id=n,file=two"];
        let args = args.iter().chain(more).chain(&["disk.qcow2"]);
        args.map(|arg| (*arg).to_owned()).collect()
    };
    let run = |args: Vec<String>| good(dir, &args.iter().map(String::as_str).collect::<Vec<_>>());
    let refused = |args: Vec<String>, why| {
        bad(
            dir,
            &args.iter().map(String::as_str).collect::<Vec<_>>(),
            why,
        );
    };
    let add = "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1";
    refused(amend(add, &[]), "--key-file");
    refused(amend(add, &["--key-file", "three"]), "wrong passphrase");
    run(amend(add, &["--key-file", "one"]));
    assert!(qemu_opens(dir, "one") && qemu_opens(dir, "two"));
    run(amend("encrypt.state=inactive,encrypt.keyslot=0", &[]));
    assert!(!qemu_opens(dir, "one") && qemu_opens(dir, "two"));
    let last = "encrypt.state=inactive,encrypt.old-secret=n";
    refused(amend(last, &[]), "--force");
    assert!(qemu_opens(dir, "two"));
    run(amend(last, &["--force"]));
    assert!(!qemu_opens(dir, "two"));
    bad(
        dir,
        &[
            "serve",
            "disk.qcow2",
            "--nbd",
            "unix:s",
            "--key-file",
            "two",
        ],
        "its key is lost",
    );
}

/// `qemu-img` with the secret `k` that `file` has.
#[track_caller]
fn qemu_img(dir: &Path, file: &str, args: &[&str]) -> String {
    let secret = format!("secret,id=k,file={file}");
    let output = Command::new("qemu-img")
        .args(&args[..1])
        .args(["--object", &secret])
        .args(&args[1..])
        .current_dir(dir)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// How QEMU is told of an encrypted image.
fn opts(image: &str) -> String {
    format!("driver=qcow2,encrypt.key-secret=k,file.filename={image}")
}

/// What QEMU reads of the whole image.
#[track_caller]
fn qemu_reads(dir: &Path, file: &str, image: &str) -> Vec<u8> {
    let args = ["convert", "-O", "raw", "--image-opts", &opts(image), "flat"];
    qemu_img(dir, file, &args);
    fs::read(dir.join("flat")).unwrap()
}

fn keys(dir: &Path) {
    for name in ["one", "two"] {
        fs::write(dir.join(name), format!("{name} sesame")).unwrap();
    }
}

#[test]
fn encrypted_disks_grow_with_and_without_space_set_aside() {
    let temp = TempDir::new();
    let dir = temp.root();
    keys(dir);
    let old = (1 << 20) + 512;
    for (options, mode) in [
        ("", "off"),
        ("", "metadata"),
        ("extended_l2=on", "falloc"),
        ("compat=0.10", "full"),
        ("cluster_size=4096", "full"),
        ("data_file=data", "metadata"),
    ] {
        let options = format!("encrypt.format=luks,encrypt.iter-time=1,{options}");
        let size = old.to_string();
        let create = ["create", "-o", &options, "--key-file", "one", "disk.qcow2"];
        good(dir, &[&create[..], &[&size]].concat());
        let secret = ["--object", "secret,id=k,file=one", "--image-opts"];
        let write = Command::new("qemu-io")
            .args(secret)
            .args([&opts("disk.qcow2"), "-c", &format!("write -q -P 7 0 {old}")])
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(write.status.success(), "{write:?}");
        let resize = ["resize", "--preallocation", mode, "--key-file", "one"];
        good(dir, &[&resize[..], &["disk.qcow2", "3M"]].concat());
        let mut want = vec![7; old];
        want.resize(3 << 20, 0);
        assert!(
            qemu_reads(dir, "one", "disk.qcow2") == want,
            "{options} {mode}"
        );
        let args = [
            "check",
            "--output=json",
            "--image-opts",
            &opts("disk.qcow2"),
        ];
        let check = qemu_img(dir, "one", &args);
        let check: serde_json::Value = serde_json::from_str(&check).unwrap();
        let all = mode == "off" || check["allocated-clusters"] == check["total-clusters"];
        assert!(all, "{options} {mode}: {check}");
        good(dir, &["check", "disk.qcow2"]);
        for file in ["disk.qcow2", "data"] {
            let _ = fs::remove_file(dir.join(file));
        }
    }
}

#[test]
fn disks_are_converted_from_one_passphrase_to_another() {
    let temp = TempDir::new();
    let dir = temp.root();
    keys(dir);
    let bytes: Vec<u8> = (0..3u32 << 18).flat_map(|n| n.to_le_bytes()).collect();
    fs::write(dir.join("a.raw"), &bytes).unwrap();
    let luks = "encrypt.format=luks,encrypt.iter-time=1";
    good(
        dir,
        &[
            "convert",
            "-o",
            luks,
            "--key-file",
            "one",
            "a.raw",
            "a.qcow2",
        ],
    );
    assert!(qemu_reads(dir, "one", "a.qcow2") == bytes);
    let file = fs::read(dir.join("a.qcow2")).unwrap();
    assert!(!file.windows(64).step_by(512).any(|w| *w == bytes[..64]));

    let other =
        format!("{luks},encrypt.key-secret=n,encrypt.cipher-mode=cbc,preallocation=metadata");
    let secret = ["--object", "secret,id=n,file=two"];
    let from = ["--key-file", "one", "a.qcow2"];
    good(
        dir,
        &[&["convert", "-o", &other], &secret[..], &from, &["b.qcow2"]].concat(),
    );
    assert!(qemu_reads(dir, "two", "b.qcow2") == bytes);
    good(dir, &["convert", "--key-file", "two", "b.qcow2", "b.raw"]);
    assert!(fs::read(dir.join("b.raw")).unwrap() == bytes);

    // Which passphrase is the new one must be said; what is compressed would not be encrypted.
    let same = [&["convert", "-o", luks], &from[..], &["c.qcow2"]].concat();
    bad(dir, &same, "encrypt.key-secret=ID");
    let packed = [
        "convert",
        "-c",
        "-o",
        luks,
        "--key-file",
        "one",
        "a.raw",
        "c.qcow2",
    ];
    bad(dir, &packed, "would not be encrypted");
    assert!(!dir.join("c.qcow2").exists());

    // Into an image that is there, and onto a base; both with passphrases of their own.
    let into = [
        "convert",
        "-n",
        "--target-key-secret",
        "n",
        "null:3M",
        "b.qcow2",
    ];
    good(dir, &[&into[..3], &into[3..], &secret].concat());
    assert!(qemu_reads(dir, "two", "b.qcow2") == vec![0; 3 << 20]);
    good(
        dir,
        &[
            &[
                "convert",
                "-n",
                "a.raw",
                "b.qcow2",
                "--target-key-secret",
                "n",
            ],
            &secret[..],
        ]
        .concat(),
    );
    bad(dir, &["convert", "-n", "a.raw", "b.qcow2"], "is encrypted");
    let mut changed = bytes.clone();
    changed[100_000..200_000].fill(1);
    fs::write(dir.join("a.raw"), &changed).unwrap();
    let luks = format!("{luks},encrypt.key-secret=o");
    let onto = [
        "convert",
        "-B",
        "b.qcow2",
        "-F",
        "qcow2",
        "--target-key-secret",
        "n",
        "-o",
        &luks,
    ];
    let objects = ["--object", "secret,id=o,file=one"];
    good(
        dir,
        &[&onto[..], &secret, &objects, &["a.raw", "top.qcow2"]].concat(),
    );
    let flat = [
        "--key-file",
        "one",
        "--key-file",
        "two",
        "top.qcow2",
        "top.raw",
    ];
    good(dir, &[&["convert"], &flat[..]].concat());
    assert!(fs::read(dir.join("top.raw")).unwrap() == changed);
    // Its key slots take 2 MiB.
    assert!(fs::metadata(dir.join("top.qcow2")).unwrap().len() < 4 << 20);
}

/// A hole of an encrypted data file is not zeros to the guest: QEMU makes such when it preallocates.
#[test]
fn holes_of_encrypted_data_files_are_no_zeros() {
    let temp = TempDir::new();
    let dir = temp.root();
    keys(dir);
    let options = "encrypt.format=luks,encrypt.iter-time=1,data_file=data,preallocation=full";
    let create = ["create", "-o", options, "--key-file", "one"];
    good(dir, &[&create[..], &["disk.qcow2", "1M"]].concat());
    let secret = ["--object", "secret,id=k,file=one", "--image-opts"];
    let mut qemu_io = Command::new("qemu-io");
    qemu_io
        .args(secret)
        .args([&opts("disk.qcow2"), "-c", "write -q -P 7 0 1M"]);
    assert!(qemu_io.current_dir(dir).status().unwrap().success());
    fs::write(dir.join("data"), []).unwrap();
    let data = fs::File::options().write(true).open(dir.join("data"));
    data.unwrap().set_len(1 << 20).unwrap();
    let noise = qemu_reads(dir, "one", "disk.qcow2");
    assert!(noise.iter().any(|byte| *byte != 0));
    good(
        dir,
        &["convert", "--key-file", "one", "disk.qcow2", "ours.raw"],
    );
    assert!(fs::read(dir.join("ours.raw")).unwrap() == noise);
    let map = good(dir, &["map", "--json", "disk.qcow2"]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    assert_eq!(
        (&map[0]["zero"], &map[0]["data"]),
        (&false.into(), &true.into())
    );
    assert!(map[0].get("offset").is_none(), "{map}");
    // A client skips what it is told to be zeros.
    let socket = temp.path("sock");
    let server = testkit::Serve::new(binary(), temp.path("disk.qcow2"));
    let server = server.arg("--key-file").arg(temp.path("one"));
    let server = server.nbd_unix(&socket).start();
    let uri = testkit::qemu::nbd_unix_uri(&socket);
    testkit::qemu::convert("raw", uri, "raw", temp.path("served.raw"));
    server.stop();
    assert!(fs::read(dir.join("served.raw")).unwrap() == noise);
}

/// Zeros in the file are noise to an encrypted disk, so version 2 has no clusters that read as zeros over a base.
#[test]
fn zeros_of_encrypted_disks_outlive_a_downgrade() {
    let temp = TempDir::new();
    let dir = temp.root();
    keys(dir);
    let options = "encrypt.format=luks,encrypt.iter-time=1";
    let prealloc = format!("{options},preallocation=metadata");
    let create = ["create", "--key-file", "one", "-o"];
    good(dir, &[&create[..], &[&prealloc, "a.qcow2", "4M"]].concat());
    let downgrade = ["amend", "--key-file", "one", "-o", "compat=0.10"];
    good(dir, &[&downgrade[..], &["a.qcow2"]].concat());
    assert!(qemu_reads(dir, "one", "a.qcow2").iter().all(|b| *b == 0));

    fs::write(dir.join("base"), vec![7; 1 << 20]).unwrap();
    let overlay = ["-b", "base", "-F", "raw", "b.qcow2"];
    let plain = format!("{options},extended_l2=off");
    good(dir, &[&create[..], &[&plain], &overlay[..]].concat());
    let secret = ["--object", "secret,id=k,file=one", "--image-opts"];
    let mut qemu_io = Command::new("qemu-io");
    qemu_io
        .args(secret)
        .args([&opts("b.qcow2"), "-c", "write -q -z 0 64k"]);
    assert!(qemu_io.current_dir(dir).status().unwrap().success());
    let before = fs::read(dir.join("b.qcow2")).unwrap();
    bad(
        dir,
        &[&downgrade[..], &["b.qcow2"]].concat(),
        "zeros over a backing file",
    );
    assert!(fs::read(dir.join("b.qcow2")).unwrap() == before);
}
