//! Disks of NBD servers as source and target, beside qemu-img: of qemu-nbd, qemu-storage-daemon and ours.

#[allow(dead_code)]
mod common;

use common::{binary, diskplane, failure, good, json, qemu_img, refused, run};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use testkit::{Serve, Server, TempDir, qemu};

const LEN: usize = 8 << 20;

/// A server of QEMU's, which is killed in the end.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Who serves.
enum Served {
    Peer(#[allow(dead_code)] Peer),
    Ours(Server),
}

/// Starts a server of the raw disk `image` as export `disk`; returns it with the export's name. It listens then.
fn serve(kind: &str, dir: &Path, image: &str) -> (Served, String) {
    let socket: PathBuf = dir.join(format!("{image}.{kind}"));
    let path = socket.display().to_string();
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={path}");
    if kind == "ours" {
        let server = Serve::new(binary(), dir.join(image))
            .format("raw")
            .nbd_unix(&socket)
            .stats()
            .start();
        return (Served::Ours(server), uri(""));
    }
    let mut command = Command::new(kind);
    command.current_dir(dir);
    match kind {
        "qemu-nbd" => command.args([
            "-t", "-e", "4", "-f", "raw", "-x", "disk", "-k", &path, image,
        ]),
        _ => command.args([
            "--blockdev",
            &format!("driver=file,filename={image},node-name=f,discard=unmap"),
            "--blockdev",
            "driver=raw,file=f,node-name=n,discard=unmap",
            "--nbd-server",
            &format!("addr.type=unix,addr.path={path}"),
            "--export",
            "nbd,id=e,node-name=n,name=disk,writable=on",
        ]),
    };
    let peer = Peer(command.spawn().unwrap());
    let began = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(began.elapsed() < Duration::from_secs(30), "{kind}");
        std::thread::sleep(Duration::from_millis(5));
    }
    (Served::Peer(peer), uri("disk"))
}

/// A disk with data, zeros that are written and holes.
fn raw(dir: &Path, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    for (nth, byte) in bytes[1 << 20..2 << 20].iter_mut().enumerate() {
        *byte = (nth % 251) as u8;
    }
    bytes[LEN - 512..].fill(7);
    let path = dir.join(name);
    fs::File::create(&path)
        .unwrap()
        .set_len(LEN as u64)
        .unwrap();
    qemu::io("raw", &path, &["write -P 0 3M 64k"]);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    use std::os::unix::fs::FileExt as _;
    file.write_all_at(&bytes[1 << 20..2 << 20], 1 << 20)
        .unwrap();
    file.write_all_at(&[7; 512], LEN as u64 - 512).unwrap();
    bytes
}

const SERVERS: [&str; 3] = ["qemu-nbd", "qemu-storage-daemon", "ours"];

#[test]
fn every_server_is_read_and_written() {
    let temp = TempDir::new();
    let dir = temp.root();
    let bytes = raw(dir, "a.raw");
    for kind in SERVERS {
        for name in ["out.qcow2", "out.raw", "part.raw"] {
            let _ = fs::remove_file(dir.join(name));
        }
        fs::copy(dir.join("a.raw"), dir.join("b.raw")).unwrap();
        let (server, uri) = serve(kind, dir, "b.raw");
        let uri = uri.as_str();
        // What it is, and where its data are, as qemu-img has it.
        for args in [
            &["info", uri][..],
            &["info", "--output=json", "-f", "raw", uri],
            &["map", "--output=json", "-f", "raw", uri],
            &["measure", "-O", "qcow2", "-f", "raw", "--output=json", uri],
            &["check", "-f", "raw", uri],
        ] {
            let ours = diskplane(dir, &[&["qemu-img"][..], args].concat());
            let theirs = run("qemu-img", dir, args);
            let codes = (ours.status.code(), theirs.status.code());
            assert_eq!(codes.0, codes.1, "{kind} {args:?}: {theirs:?}");
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{kind} {args:?}");
        }
        assert_eq!(
            json(&good(dir, &["info", "--json", uri]))["virtual-size"],
            LEN
        );
        // As a source.
        let out = json(&good(
            dir,
            &["convert", "--json", "-f", "raw", uri, "out.qcow2"],
        ));
        assert!(out["written"].as_u64().unwrap() < 2 << 20, "{kind}: {out}");
        qemu::check("qcow2", dir.join("out.qcow2"));
        qemu::compare("qcow2", dir.join("out.qcow2"), "raw", dir.join("a.raw"));
        good(dir, &["compare", "-f", "raw", uri, "out.qcow2"]);
        let options = match uri.split_once("?socket=") {
            Some((name, path)) => format!(
                "driver=nbd,server.type=unix,server.path={path},export={}",
                name.trim_start_matches("nbd+unix:///")
            ),
            None => unreachable!(),
        };
        good(
            dir,
            &[
                "qemu-img",
                "convert",
                "--image-opts",
                "-O",
                "raw",
                &options,
                "out.raw",
            ],
        );
        assert!(fs::read(dir.join("out.raw")).unwrap() == bytes, "{kind}");
        let old = uri.split_once("?socket=").unwrap();
        let old = match old.0.trim_start_matches("nbd+unix:///") {
            "" => format!("nbd:unix:{}", old.1),
            name => format!("nbd:unix:{}:exportname={name}", old.1),
        };
        good(
            dir,
            &[
                "dd",
                "-f",
                "raw",
                &format!("if={old}"),
                "of=part.raw",
                "bs=1M",
                "count=2",
                "skip=1",
            ],
        );
        assert!(
            fs::read(dir.join("part.raw")).unwrap() == bytes[1 << 20..2 << 20],
            "{kind}"
        );
        // As a target, as it is: with what was there, and what is to be holes.
        fs::write(dir.join("c.raw"), vec![9; LEN / 2]).unwrap();
        let file = fs::OpenOptions::new()
            .write(true)
            .open(dir.join("c.raw"))
            .unwrap();
        file.set_len(LEN as u64).unwrap();
        good(
            dir,
            &[
                "convert", "-q", "-n", "-f", "raw", "-O", "raw", "c.raw", uri,
            ],
        );
        qemu_img(dir, &["compare", "-f", "raw", "-F", "raw", "c.raw", uri]);
        good(
            dir,
            &[
                "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "a.raw", uri,
            ],
        );
        qemu_img(dir, &["compare", "-f", "raw", "-F", "raw", "a.raw", uri]);
        good(
            dir,
            &[
                "bench",
                "image",
                "-f",
                "raw",
                "-w",
                "--pattern",
                "5",
                "-c",
                "64",
                "-s",
                "4K",
                uri,
            ],
        );
        qemu_img(
            dir,
            &["compare", "-f", "raw", "-F", "raw", "c.raw", uri]
                .map(|a| if a == "c.raw" { uri } else { a }),
        );
        // Another format there.
        good(dir, &["convert", "-q", "-O", "qcow2", "out.qcow2", uri]);
        qemu_img(dir, &["check", "-q", "-f", "qcow2", uri]);
        qemu_img(dir, &["compare", "-f", "raw", "-F", "qcow2", "a.raw", uri]);
        good(dir, &["check", uri]);
        let text = refused(
            dir,
            &["convert", "-q", "-n", "-f", "raw", "-O", "raw", uri, uri],
        );
        assert!(text.contains("is read from, too"), "{kind}: {text}");
        if let Served::Ours(server) = server {
            server.stop();
        }
    }
}

/// What is a hole at the server is neither read nor written through the socket: by the server's own count.
#[test]
fn holes_stay_off_the_wire() {
    let temp = TempDir::new();
    let dir = temp.root();
    raw(dir, "a.raw");
    let (Served::Ours(server), uri) = serve("ours", dir, "a.raw") else {
        panic!("another server")
    };
    good(dir, &["convert", "-q", "-f", "raw", &uri, "out.raw"]);
    let text = server.stop().stderr;
    let row = text
        .lines()
        .find(|line| line.trim_start().starts_with("read"));
    let row = row.unwrap_or_else(|| panic!("no reads: {text}"));
    // A MiB of data, 64 KiB of zeros that are stored, a block.
    assert!(row.contains(" 1.0") && row.contains(" MiB"), "{text}");
    qemu::compare("raw", dir.join("out.raw"), "raw", dir.join("a.raw"));
}

#[test]
fn names_that_lead_nowhere_are_told() {
    let temp = TempDir::new();
    let dir = temp.root();
    raw(dir, "a.raw");
    let (server, uri) = serve("qemu-nbd", dir, "a.raw");
    let wrong = uri.replace("disk?", "other?");
    for (name, what) in [
        (wrong.as_str(), "export 'other'"),
        ("nbd+unix:///?socket=nowhere", "No such file"),
        ("nbds://localhost/x", "TLS"),
        ("nbd://localhost:x/", "a port is"),
    ] {
        let text = refused(dir, &["info", name]);
        assert!(text.contains(what), "{name}: {text}");
        let args = ["qemu-img", "info", name];
        failure(&args, &diskplane(dir, &args), 1);
    }
    raw(dir, "b.raw");
    let text = refused(dir, &["convert", "b.raw", &uri]);
    assert!(text.contains("say -O raw"), "{text}");
    // Raw is not guessed for writing.
    let text = refused(dir, &["convert", "-n", "-f", "raw", "b.raw", &uri]);
    assert!(text.contains("say -f raw"), "{text}");
    // An image does not lead to a server, unless to one that was allowed.
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        uri.as_str(),
        "over.qcow2",
    ];
    qemu_img(dir, &create);
    let text = refused(dir, &["map", "over.qcow2"]);
    assert!(text.contains("has a protocol"), "{text}");
    let text = refused(dir, &["map", "--allow-backing", &wrong, "over.qcow2"]);
    assert!(text.contains("has a protocol"), "{text}");
    let args = [
        "convert",
        "-q",
        "--allow-backing",
        uri.as_str(),
        "over.qcow2",
        "out.raw",
    ];
    good(dir, &args);
    qemu::compare("raw", dir.join("out.raw"), "raw", dir.join("b.raw"));
    drop(server);
}
