//! What the commands print, and what they say when something is wrong. Scripts and people rely on both.

use crate::common;

use common::{diskplane, failure, good, json};
use std::{fs, path::Path, process::Command};
use testkit::{TempDir, qemu};

/// Runs a command that must fail with `code`; what it said.
#[track_caller]
fn bad(dir: &Path, args: &[&str], code: i32) -> String {
    let output = diskplane(dir, args);
    let stderr = failure(args, &output, code);
    assert!(output.stdout.is_empty(), "{args:?} printed something");
    stderr
}

#[test]
fn create_says_what_it_made() {
    let dir = TempDir::new();
    let dir = dir.root();
    for (args, line) in [
        (&["a.raw", "10M"][..], "created a.raw: raw, 10 MiB\n"),
        (&["-f", "raw", "b", "1000"], "created b: raw, 1 KiB\n"),
        (
            &["c.qcow2", "20G"],
            "created c.qcow2: qcow2, 20 GiB, clusters of 64 KiB\n",
        ),
        (
            &["-o", "cluster_size=4K,compat=0.10", "d.qcow2", "1.5G"],
            "created d.qcow2: qcow2, 1.5 GiB, clusters of 4 KiB\n",
        ),
        (
            &["-b", "a.raw", "-F", "raw", "e.qcow2"],
            "created e.qcow2: qcow2, 10 MiB, clusters of 64 KiB with subclusters of 2 KiB, on a.raw \
             (raw)\nsubclusters make small writes to an overlay cheap; QEMU reads them from 5.2 on \
             (without them: -o extended_l2=off)\n",
        ),
        (
            &[
                "-o",
                "extended_l2=off",
                "-b",
                "a.raw",
                "-F",
                "raw",
                "plain.qcow2",
            ],
            "created plain.qcow2: qcow2, 10 MiB, clusters of 64 KiB, on a.raw (raw)\n",
        ),
        (
            &["-b", "e.qcow2", "-F", "qcow2", "f.qcow2", "1G"],
            "created f.qcow2: qcow2, 1 GiB, clusters of 64 KiB with subclusters of 2 KiB, on \
             e.qcow2 (qcow2)\nsubclusters make small writes to an overlay cheap; QEMU reads them \
             from 5.2 on (without them: -o extended_l2=off)\n",
        ),
        (
            &["-f", "raw", "-o", "preallocation=falloc", "g", "1M"],
            "created g: raw, 1 MiB\n",
        ),
        (
            &["-f", "raw", "-o", "preallocation=full", "h", "1M"],
            "created h: raw, 1 MiB\n",
        ),
    ] {
        assert_eq!(good(dir, &[&["create"], args].concat()), line);
    }
    for image in ["c.qcow2", "d.qcow2", "e.qcow2", "f.qcow2"] {
        qemu::check("qcow2", dir.join(image));
    }
    use std::os::unix::fs::MetadataExt;
    let blocks = |name: &str| fs::metadata(dir.join(name)).unwrap().blocks();
    assert_eq!(blocks("a.raw"), 0);
    assert!(blocks("g") >= 2048 && blocks("h") >= 2048);
}

#[test]
fn new_images_are_what_qemu_makes_of_the_same_options() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("base"), vec![1; 4096]).unwrap();
    let field = |image: &str| {
        let image = dir.join(image);
        let mut args = Command::new("qemu-img");
        args.args(["info", "--output=json"]).arg(image);
        let info = json(&String::from_utf8(args.output().unwrap().stdout).unwrap());
        let names = [
            "virtual-size",
            "cluster-size",
            "format-specific",
            "backing-filename",
            "backing-filename-format",
            "dirty-flag",
        ];
        names.map(|name| info[name].clone())
    };
    for (index, options) in [
        "cluster_size=65536",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=2M,refcount_bits=1",
        "compat=0.10,cluster_size=1k",
        "lazy_refcounts=on,compression_type=zstd",
        "backing_file=base,backing_fmt=raw,refcount_bits=8,extended_l2=off",
        "backing_file=base,backing_fmt=raw,extended_l2=on",
        "extended_l2=on,cluster_size=16K",
        "extended_l2=on,cluster_size=2M,compression_type=zstd",
        "backing_file=base,backing_fmt=raw,cluster_size=512",
    ]
    .into_iter()
    .enumerate()
    {
        for size in ["0", "1", "513K", "7G"] {
            let (ours, theirs) = (format!("o{index}-{size}"), format!("t{index}-{size}"));
            good(dir, &["create", "-f", "qcow2", "-o", options, &ours, size]);
            let mut qemu = Command::new("qemu-img");
            qemu.args(["create", "-q", "-f", "qcow2", "-o", options, &theirs, size]);
            assert!(qemu.current_dir(dir).status().unwrap().success());
            assert_eq!(field(&ours), field(&theirs), "{options} {size}");
            qemu::check("qcow2", dir.join(&ours));
        }
    }
}

#[test]
fn create_refuses_what_cannot_be_and_leaves_nothing_behind() {
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("there.raw"), b"precious").unwrap();
    for (args, says) in [
        (&["there.raw", "1M"][..], "the file exists already"),
        (&["x.dmg", "1M"], "say -f raw, qcow2, qcow, qed, "),
        (&["x.qcow2"], "say how large the disk is to be"),
        (&["x.qcow2", "8E"], "is too large"),
        (
            &["-o", "cluster_size=512", "x.qcow2", "1T"],
            "is too large for clusters of 512 B",
        ),
        (
            &["-o", "cluster_size=3K", "x.qcow2", "1M"],
            "cluster_size is 3072",
        ),
        (
            &["-o", "colour=red", "x.qcow2", "1M"],
            "-o colour: qcow2 has no such option",
        ),
        (
            &["-o", "extended_l2=on,cluster_size=4K", "x.qcow2", "1M"],
            "extended_l2=on needs a cluster_size of 16 KiB",
        ),
        (
            &["-o", "compat=0.10,refcount_bits=1", "x.qcow2", "1M"],
            "refcount_bits other than 16 need compat=1.1",
        ),
        (&["-b", "absent", "-F", "raw", "x.qcow2"], "absent"),
        (
            &["-b", "there.raw", "-F", "qcow2", "x.qcow2"],
            "not a qcow2 image",
        ),
        (
            &["-b", "there.raw", "-F", "raw", "x.raw"],
            "raw images have no backing file",
        ),
        (&["no/such/dir/x.qcow2", "1M"], "No such file"),
    ] {
        let text = bad(dir, &[&["create"], args].concat(), 1);
        assert!(
            text.starts_with("diskplane: ") && text.contains(says),
            "{args:?}: {text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    assert_eq!(fs::read(dir.join("there.raw")).unwrap(), b"precious");
    let left: Vec<_> = fs::read_dir(dir).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    // Wrong usage is no other exit code: 2 is what `check` says of a damaged image.
    for args in [
        &["create"][..],
        &["create", "x.raw", "big"],
        &["create", "-f", "dmg", "x", "1M"],
        &["create", "-b", "base", "x.qcow2"],
        &["serve", "x"],
        &["serve", "x", "--nbd", "nowhere"],
        &["serve", "x", "--nbd", "unix:/x", "--aio", "posix"],
        &["check", "x.qcow2", "--repair", "some"],
        &["frobnicate"],
    ] {
        bad(dir, args, 1);
    }
}

/// The lines of a table as (name, value).
fn rows(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| line.split_once("  "))
        .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .collect()
}

#[test]
fn info_shows_the_facts() {
    let dir = TempDir::new();
    let dir = dir.root();
    good(dir, &["create", "base.raw", "10M"]);
    good(
        dir,
        &["create", "-b", "base.raw", "-F", "raw", "top.qcow2", "1G"],
    );
    let text = good(dir, &["info", "top.qcow2"]);
    let rows = rows(&text);
    let value = |name: &str| {
        rows.iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    };
    assert_eq!(value("image"), Some("top.qcow2"));
    assert_eq!(value("format"), Some("qcow2"));
    assert_eq!(value("virtual size"), Some("1 GiB (1073741824 bytes)"));
    assert_eq!(value("cluster size"), Some("64 KiB"));
    assert_eq!(value("backing file"), Some("base.raw (raw)"));
    assert_eq!(value("extended l2"), Some("true"));
    assert_eq!(value("subclusters"), Some("2 KiB"));
    assert!(
        value("metadata cache")
            .unwrap()
            .contains("covers 1 GiB of 1 GiB")
    );
    assert!(value("engine").unwrap().contains(": "));
    let info = json(&good(dir, &["info", "--json", "top.qcow2"]));
    assert_eq!(info["virtual-size"], 1 << 30);
    assert_eq!(info["cluster-size"], 65536);
    assert_eq!(info["backing-filename"], "base.raw");
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(info["format-specific"]["version"], "3");
    assert!(info["engine"]["reason"].is_string());
    let chain = json(&good(
        dir,
        &["info", "--json", "--backing-chain", "top.qcow2"],
    ));
    let formats: Vec<_> = chain
        .as_array()
        .unwrap()
        .iter()
        .map(|i| &i["format"])
        .collect();
    assert_eq!(formats, ["qcow2", "raw"]);
    assert_eq!(
        json(&good(dir, &["info", "--json", "null:20G"]))["virtual-size"],
        20u64 << 30
    );
    // A base that is not there matters to those only who ask for it.
    fs::remove_file(dir.join("base.raw")).unwrap();
    good(dir, &["info", "top.qcow2"]);
    let text = bad(dir, &["info", "--backing-chain", "top.qcow2"], 1);
    assert!(
        text.contains("top.qcow2: backing file: 'base.raw': No such file"),
        "{text}"
    );
}

/// A map of an image with a bad entry is what comes before it, and JSON; qemu-img's is cut off there.
#[test]
fn a_map_ends_before_what_cannot_be_known() {
    let dir = TempDir::new();
    let dir = dir.root();
    let image = dir.join("a.qcow2");
    let make = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "a.qcow2",
        "8M",
    ];
    common::qemu_img(dir, &make);
    qemu::io(
        "qcow2",
        &image,
        &["write 0 4k", "write 16k 4k", "write 3M 64k"],
    );
    let mut bytes = fs::read(&image).unwrap();
    let at = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l1 = at(&bytes, 40) as usize;
    let l2 = (at(&bytes, l1 + 8) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2 + 256 * 8 + 7 - 1] = 0x22;
    fs::write(&image, &bytes).unwrap();
    let theirs = common::run("qemu-img", dir, &["map", "--output=json", "a.qcow2"]);
    let whole = format!(
        "{}]",
        String::from_utf8_lossy(&theirs.stdout)
            .trim_end()
            .trim_end_matches(',')
    );
    for args in [
        &["qemu-img", "map", "--output=json", "a.qcow2"][..],
        &["map", "--json", "a.qcow2"],
        &["qemu-img", "map", "-s", "3M", "--output=json", "a.qcow2"],
        &["map", "a.qcow2"],
    ] {
        let output = diskplane(dir, args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let (out, said) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert!(
            said.contains("0x300000") && said.contains("L2"),
            "{args:?}: {said}"
        );
        match args {
            ["map", "a.qcow2"] => assert_eq!(out.lines().count(), 4, "{out}"),
            [.., "3M", _, _] => assert_eq!(json(&out), json("[]"), "{out}"),
            _ => assert_eq!(json(&out), json(&whole), "{args:?}"),
        }
    }
}

#[test]
fn map_is_that_of_qemu() {
    let dir = TempDir::new();
    let dir = dir.root();
    let base = dir.join("base.raw");
    let top = dir.join("top.qcow2");
    good(dir, &["create", "base.raw", "4M"]);
    qemu::io("raw", &base, &["write -P 1 1M 256k"]);
    good(
        dir,
        &["create", "-b", "base.raw", "-F", "raw", "middle.qcow2"],
    );
    for (name, extended) in [("top", "on"), ("plain", "off")] {
        let (option, image) = (format!("extended_l2={extended}"), format!("{name}.qcow2"));
        let on = ["create", "-b", "middle.qcow2", "-F", "qcow2"];
        good(dir, &[&on[..], &["-o", &option, &image, "8M"]].concat());
    }
    qemu::io("qcow2", dir.join("middle.qcow2"), &["write -P 2 2M 100k"]);
    let commands = [
        "write -P 3 0 70k",
        "write -z -u 1088k 64k",
        // Zeros over clusters that stay.
        "write -P 7 3M 256k",
        "write -z 3136k 128k",
        // Parts of clusters: each subcluster has its own state.
        "write -P 5 1154k 4k",
        "write -z 1164k 10k",
        "write -P 6 1164k 512",
        "write -c -P 4 6M 64k",
    ];
    for image in [&top, &dir.join("plain.qcow2")] {
        qemu::io("qcow2", image, &commands);
    }
    for (format, image) in [
        ("raw", "base.raw"),
        ("qcow2", "middle.qcow2"),
        ("qcow2", "top.qcow2"),
        ("qcow2", "plain.qcow2"),
    ] {
        let mut qemu = Command::new("qemu-img");
        qemu.args(["map", "--output=json", "-f", format])
            .arg(dir.join(image));
        let theirs = json(&String::from_utf8(qemu.output().unwrap().stdout).unwrap());
        let ours = json(&good(dir, &["map", "--json", image]));
        assert_eq!(ours, theirs, "{image}");
    }
    let text = good(dir, &["map", "top.qcow2"]);
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[0],
        ["start", "length", "what", "file", "offset", "file"]
    );
    assert_eq!(lines[1][..4], ["0x0", "70", "KiB", "data"]);
    assert!(lines[1][5].ends_with("top.qcow2"));
    assert!(lines.iter().any(|l| l.contains(&"compressed")));
    assert_eq!(lines.last().unwrap()[3], "nothing");
    assert_eq!(
        good(dir, &["map", "--json", "null:1M"]),
        "[{\"start\":0,\"length\":1048576,\"depth\":0,\"present\":true,\"zero\":true,\
         \"data\":false,\"compressed\":false}]\n"
    );
}

#[test]
fn a_damaged_image_is_an_error_of_one_line() {
    let dir = TempDir::new();
    let dir = dir.root();
    good(dir, &["create", "disk.qcow2", "1M"]);
    let mut bytes = fs::read(dir.join("disk.qcow2")).unwrap();
    bytes[39] = 200;
    bytes[36] = 200;
    fs::write(dir.join("disk.qcow2"), &bytes).unwrap();
    for args in [
        &["info", "disk.qcow2"][..],
        &["map", "disk.qcow2"],
        &["serve", "disk.qcow2", "--nbd", "unix:sock"],
    ] {
        let text = bad(dir, args, 1);
        assert!(
            text.starts_with("diskplane: disk.qcow2: header: l1_size at byte 36 is "),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(fs::read(dir.join("disk.qcow2")).unwrap() == bytes);
    }
}

#[test]
fn habits_from_qemu_img_are_understood() {
    let dir = TempDir::new();
    let dir = dir.root();
    // What there is to say does not need a file.
    for args in [
        &["create", "-f", "qcow2", "-o", "help"][..],
        &["convert", "-O", "qcow2", "-o", "help"],
        &["create", "-o", "help", "a.qcow2"],
        &["amend", "-o", "help"],
    ] {
        assert!(good(dir, args).contains("lazy_refcounts "), "{args:?}");
    }
    good(dir, &["create", "-q", "a.qcow2", "1M"]);
    for command in ["info", "map", "check", "measure"] {
        let as_ours = good(dir, &[command, "--json", "a.qcow2"]);
        let as_theirs = good(dir, &[command, "--output=json", "a.qcow2"]);
        assert_eq!(json(&as_theirs), json(&as_ours));
        let human = good(dir, &[command, "--output", "human", "a.qcow2"]);
        assert_eq!(human, good(dir, &[command, "a.qcow2"]));
    }
    // A link that leads nowhere is not followed, and not called a file.
    std::os::unix::fs::symlink("nowhere", dir.join("link")).unwrap();
    for (args, why) in [
        (&["create", "-o", "help"][..], "of which format: -f raw"),
        (&["create", "-o", "compat=1.1"], "which file is to be made"),
        (
            &["amend", "-o", "compat=1.1"],
            "which image is to be changed",
        ),
        (&["convert", "-o", "compat=1.1"], "what to copy, and where"),
        (
            &["create", "-f", "raw", "link", "1M"],
            "is a link to nowhere",
        ),
        (
            &["convert", "-O", "raw", "a.qcow2", "link"],
            "is a link to nowhere",
        ),
    ] {
        let said = bad(dir, args, 1);
        assert!(said.contains(why), "{args:?}: {said}");
    }
    assert!(!dir.join("nowhere").exists());
}

#[test]
fn a_signal_has_progress_told_and_ends_nothing() {
    use std::process::Stdio;
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("a.raw"), vec![7; 4 << 20]).unwrap();
    // Held back long enough to be asked.
    let mut child = Command::new(common::binary())
        .args(["convert", "-r", "8M", "-m", "1", "a.raw", "b.raw"])
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = || {
        let names = fs::read_dir(dir).unwrap();
        names.count() > 1
    };
    while !begun() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it was asked"
        );
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert!(
        said.starts_with("diskplane: ") && said.ends_with(" % done\n"),
        "{said}"
    );
    assert_eq!(
        fs::read(dir.join("a.raw")).unwrap(),
        fs::read(dir.join("b.raw")).unwrap()
    );
}

#[test]
fn sizes_without_a_suffix_and_formats_that_are_not_made_are_told() {
    let dir = TempDir::new();
    let dir = dir.root();
    let output = common::run(common::binary(), dir, &["create", "a.qcow2", "10"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("warning: a disk of 10 bytes, which has 512: ") && said.lines().count() == 1,
        "{said}"
    );
    for quiet in [
        &["create", "-q", "b.qcow2", "10"][..],
        &["create", "c.qcow2", "10M"],
    ] {
        let output = common::run(common::binary(), dir, quiet);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
    }
    for line in [
        ["create", "-f", "foo", "x", "1M"],
        ["convert", "-O", "foo", "a.qcow2", "x"],
        ["dd", "-O", "foo", "if=a.qcow2", "of=x"],
    ] {
        let output = common::run(common::binary(), dir, &line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{said}");
        assert!(
            said.contains("raw, qcow2, qcow, qed, vhd, vhdx, vdi, vmdk or luks"),
            "{said}"
        );
        assert!(!said.contains("luks or parallels"), "{said}");
    }
}
