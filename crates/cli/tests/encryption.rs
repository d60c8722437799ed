//! Encrypted images and their keys on the command line, beside QEMU's tools.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};
use testkit::TempDir;

fn diskplane(dir: &Path, args: &[&str]) -> Output {
    Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")))
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap()
}

#[track_caller]
fn good(dir: &Path, args: &[&str]) -> String {
    let output = diskplane(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn bad(dir: &Path, args: &[&str], why: &str) {
    let output = diskplane(dir, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
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
