//! Persistent bitmaps across diskplane and QEMU: what one tracks the other continues.

use crate::common;

use common::{binary, json};
use serde_json::Value;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};
use testkit::command::run;
use testkit::{Serve, TempDir, qemu};

/// `diskplane bitmap` that ends well; its JSON.
#[track_caller]
fn bitmap(image: &Path, args: &[&str]) -> Value {
    let mut command = Command::new(binary());
    command.args(["bitmap", "--json"]);
    let (options, name) = match args.split_last() {
        Some((name, options)) => (options, Some(name)),
        None => (args, None),
    };
    command.args(options).arg(image).args(name);
    json(&run(&mut command).stdout)
}

/// `diskplane bitmap` that must fail; what it said.
#[track_caller]
fn refused(image: &Path, args: &[&str], name: &str) -> String {
    let mut command = Command::new(binary());
    let output = command
        .arg("bitmap")
        .args(args)
        .arg(image)
        .arg(name)
        .output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[track_caller]
fn qemu_img(args: &[&str], image: &Path, name: &[&str]) -> String {
    run(Command::new("qemu-img").args(args).arg(image).args(name)).stdout
}

/// A server that ends with the test, however that ends.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The dirty ranges of a bitmap, as QEMU shows them to NBD clients.
#[track_caller]
fn qemu_dirty(dir: &TempDir, image: &Path, name: &str) -> Vec<(u64, u64)> {
    let socket = dir.path("qemu.sock");
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("qemu-nbd");
    command
        .args(["-r", "-f", "qcow2", "-t", "-B", name, "-k"])
        .arg(&socket);
    let server = Ended(command.arg(image).spawn().expect("qemu-nbd starts"));
    let began = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(began.elapsed().as_secs() < 20, "qemu-nbd does not listen");
        thread::sleep(Duration::from_millis(5));
    }
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        socket.display()
    );
    let map =
        run(Command::new("qemu-img").args(["map", "--output=json", "--image-opts", &options]));
    drop(server);
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for extent in json(&map.stdout).as_array().unwrap() {
        // qemu-img takes the context's flag "dirty" for "hole".
        if extent["data"] == Value::Bool(true) {
            continue;
        }
        let start = extent["start"].as_u64().unwrap();
        let end = start + extent["length"].as_u64().unwrap();
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

fn total(ranges: &[(u64, u64)]) -> u64 {
    ranges.iter().map(|(start, end)| end - start).sum()
}

fn serve(image: &Path, socket: &Path, commands: &[&str]) -> testkit::Server {
    let server = Serve::new(binary(), image).nbd_unix(socket).start();
    qemu::io("raw", qemu::nbd_unix_uri(socket), commands);
    server
}

#[test]
fn what_qemu_tracks_we_continue_and_the_other_way_round() {
    for options in [
        "",
        "cluster_size=4096,refcount_bits=64",
        "extended_l2=on",
        "lazy_refcounts=on",
    ] {
        let dir = TempDir::new();
        let (image, socket) = (dir.path("disk.qcow2"), dir.path("sock"));
        qemu::create_with("qcow2", &image, "64M", options);
        qemu_img(&["bitmap", "--add", "-g", "512"], &image, &["fine"]);
        qemu_img(&["bitmap", "--add", "-g", "64k"], &image, &["off"]);
        qemu_img(&["bitmap", "--disable"], &image, &["off"]);
        qemu::io("qcow2", &image, &["write -P 1 0 4k"]);
        bitmap(&image, &["--add", "-g", "64k", "ours"]);
        let server = serve(
            &image,
            &socket,
            &[
                "write -P 2 1M 512",
                "write -P 3 3145216 1k",
                "write -z 8M 1M",
                "discard 16M 64k",
                "flush",
                "write -P 4 67108352 512",
            ],
        );
        server.stop();
        qemu::check("qcow2", &image);
        // Again, without a change.
        serve(&image, &socket, &["read -P 2 1M 512", "flush"]).stop();
        qemu::check("qcow2", &image);
        qemu::io(
            "qcow2",
            &image,
            &["write -P 5 32M 512", "read -P 3 3145216 1k"],
        );
        let m = 1 << 20;
        let fine = [
            (0, 4096),
            (m, m + 512),
            (3145216, 3145216 + 1024),
            (8 * m, 9 * m),
            (16 * m, 16 * m + 65536),
            (32 * m, 32 * m + 512),
            (64 * m - 512, 64 * m),
        ];
        let ours = [
            (m, m + 65536),
            (3 * m - 65536, 3 * m + 65536),
            (8 * m, 9 * m),
            (16 * m, 16 * m + 65536),
            (32 * m, 32 * m + 65536),
            (64 * m - 65536, 64 * m),
        ];
        assert_eq!(qemu_dirty(&dir, &image, "fine"), fine, "{options}");
        assert_eq!(qemu_dirty(&dir, &image, "ours"), ours, "{options}");
        let list = bitmap(&image, &[]);
        let facts = |nth: usize| {
            let b = &list["bitmaps"][nth];
            (
                b["name"].clone(),
                b["granularity"].clone(),
                b["flags"].clone(),
                b["count"].clone(),
            )
        };
        let auto = || json("[\"auto\"]");
        assert_eq!(
            facts(0),
            ("fine".into(), 512.into(), auto(), total(&fine).into())
        );
        assert_eq!(facts(1), ("off".into(), 65536.into(), json("[]"), 0.into()));
        assert_eq!(
            facts(2),
            ("ours".into(), 65536.into(), auto(), total(&ours).into())
        );

        // Merged by us, shown by QEMU; and the list of both.
        bitmap(&image, &["--enable", "--merge", "fine", "off"]);
        let mut merged = ours.to_vec();
        merged.insert(0, (0, 65536));
        assert_eq!(qemu_dirty(&dir, &image, "off"), merged);
        qemu_img(&["bitmap", "--merge", "off"], &image, &["fine"]);
        assert_eq!(bitmap(&image, &[])["bitmaps"][0]["count"], total(&merged));
        let theirs = json(&qemu_img(&["info", "--output=json"], &image, &[]));
        let mine = json(&run(Command::new(binary()).args(["info", "--json"]).arg(&image)).stdout);
        assert_eq!(
            theirs["format-specific"]["data"]["bitmaps"],
            mine["bitmaps"]
        );
        bitmap(&image, &["--remove", "off"]);
        bitmap(&image, &["--remove", "fine"]);
        bitmap(&image, &["--remove", "ours"]);
        let theirs = qemu_img(&["info"], &image, &[]);
        assert!(!theirs.contains("bitmaps"), "{theirs}");
        qemu::check("qcow2", &image);
    }
}

#[test]
fn a_killed_server_leaves_inconsistent_bitmaps() {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk.qcow2"), dir.path("sock"));
    qemu::create("qcow2", &image, "64M");
    bitmap(&image, &["--add", "b"]);
    bitmap(&image, &["--add", "--disabled", "off"]);
    // Nothing written, nothing lost.
    serve(&image, &socket, &["read 0 4k"]).kill();
    assert_eq!(
        bitmap(&image, &[])["bitmaps"][0]["flags"],
        json("[\"auto\"]")
    );
    serve(&image, &socket, &["write 0 4k", "flush"]).kill();
    let list = bitmap(&image, &[]);
    assert_eq!(list["bitmaps"][0]["flags"], json("[\"in-use\", \"auto\"]"));
    assert_eq!(list["bitmaps"][0].get("count"), None);
    assert_eq!(list["bitmaps"][1]["flags"], json("[]"));
    let theirs = qemu_img(&["info"], &image, &[]);
    assert!(theirs.contains("in-use"), "{theirs}");
    qemu::check_allowing_leaks("qcow2", &image);
    for action in ["--clear", "--enable", "--disable"] {
        let said = refused(&image, &[action], "b");
        assert!(said.contains("'b' is inconsistent"), "{said}");
    }
    let said = refused(&image, &["--merge", "b"], "off");
    assert!(said.contains("'b' is inconsistent"), "{said}");
    bitmap(&image, &["--remove", "b"]);
    serve(&image, &socket, &["write 4k 4k"]).stop();
    assert_eq!(bitmap(&image, &[])["bitmaps"].as_array().unwrap().len(), 1);
}

#[test]
fn a_disk_of_another_size_keeps_its_bitmaps() {
    let dir = TempDir::new();
    let (ours, theirs) = (dir.path("ours.qcow2"), dir.path("theirs.qcow2"));
    for (size, option) in [("100M", "--preallocation=off"), ("40000K", "--shrink")] {
        for image in [&ours, &theirs] {
            let _ = std::fs::remove_file(image);
            qemu::create("qcow2", image, "64M");
            qemu_img(&["bitmap", "--add", "-g", "512"], image, &["fine"]);
            qemu_img(&["bitmap", "--add", "-g", "16M"], image, &["coarse"]);
            qemu::io(
                "qcow2",
                image,
                &["write 1M 5k", "write 39M 4M", "write 65535K 1K"],
            );
        }
        let mut resize = Command::new(binary());
        run(resize.args(["resize", option]).arg(&ours).arg(size));
        qemu_img(&["resize", "-q", option], &theirs, &[size]);
        qemu::check("qcow2", &ours);
        for name in ["fine", "coarse"] {
            let dirty = qemu_dirty(&dir, &ours, name);
            assert_eq!(dirty, qemu_dirty(&dir, &theirs, name), "{size} {name}");
            assert!(!dirty.is_empty());
        }
        assert_eq!(
            bitmap(&ours, &[])["bitmaps"],
            bitmap(&theirs, &[])["bitmaps"]
        );
    }
}

#[test]
fn bitmaps_of_another_image_are_merged() {
    let dir = TempDir::new();
    let (image, other) = (dir.path("a.qcow2"), dir.path("b.qcow2"));
    qemu::create("qcow2", &image, "16M");
    qemu::create("qcow2", &other, "16M");
    bitmap(&other, &["--add", "-g", "4k", "from"]);
    qemu::io("qcow2", &other, &["write 5M 4k"]);
    let from = other.display().to_string();
    let args = ["--add", "--merge", "from", "-b", &from, "-F", "qcow2", "to"];
    let list = bitmap(&image, &args);
    assert_eq!(list["bitmaps"][0]["count"], 65536);
    assert_eq!(
        qemu_dirty(&dir, &image, "to"),
        [(5 << 20, (5 << 20) + 65536)]
    );

    let smaller = dir.path("c.qcow2");
    qemu::create("qcow2", &smaller, "8M");
    bitmap(&smaller, &["--add", "from"]);
    let smaller = smaller.display().to_string();
    // All or nothing: the clearing before it has not happened.
    let said = refused(
        &image,
        &["--clear", "--merge", "from", "-b", &smaller],
        "to",
    );
    assert!(said.contains("16777216 and of 8388608 bytes"), "{said}");
    assert_eq!(bitmap(&image, &[])["bitmaps"][0]["count"], 65536);
    let raw = dir.path("d.raw");
    qemu::create("raw", &raw, "1M");
    let said = refused(&raw, &["--add"], "b");
    assert!(said.contains("a raw image has no bitmaps"), "{said}");
    let said = refused(&image, &["--add", "-g", "3k"], "b");
    assert!(
        said.contains("power of two from 512 bytes to 2 GiB"),
        "{said}"
    );
    let said = refused(&image, &["--add", "--disabled"], "to");
    assert!(said.contains("has a bitmap 'to' already"), "{said}");
    let said = refused(&image, &["--clear"], "no");
    assert!(said.contains("has no bitmap 'no'"), "{said}");
}
