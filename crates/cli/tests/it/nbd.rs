//! Disks of NBD servers as source and target, beside qemu-img: of qemu-nbd, qemu-storage-daemon and ours.

use crate::beside;
use crate::common;

use common::{binary, diskplane, failure, good, json, qemu_img, refused, run};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
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
    (Served::Peer(peer(&mut command, &socket)), uri("disk"))
}

/// Starts a server of QEMU's, and waits until it listens.
fn peer(command: &mut Command, socket: &Path) -> Peer {
    let peer = Peer(command.spawn().unwrap());
    let began = Instant::now();
    while UnixStream::connect(socket).is_err() {
        assert!(began.elapsed() < Duration::from_secs(30), "{command:?}");
        thread::sleep(Duration::from_millis(5));
    }
    peer
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

/// Whatever changes images, on a disk of a server, below an image and above one; and names by options and JSON.
#[test]
fn images_at_a_server_are_changed_as_qemu_img_changes_them() {
    let folders = [TempDir::new(), TempDir::new()];
    let mut servers = Vec::new();
    for dir in &folders {
        raw(dir.root(), "base.raw");
        fs::copy(dir.path("base.raw"), dir.path("other.raw")).unwrap();
        qemu::create("raw", dir.path("t.raw"), "8M");
        // The second time for reading only.
        for (image, name) in [("base.raw", "b"), ("t.raw", "t")] {
            fs::hard_link(dir.path(image), dir.path(name)).unwrap();
            servers.push(serve("qemu-nbd", dir.root(), name));
        }
        fs::copy(dir.path("base.raw"), dir.path("r")).unwrap();
        let socket = dir.path("r.qemu-nbd");
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-e", "4", "-r", "-f", "raw", "-x", "disk", "-k"]);
        let server = peer(command.arg(&socket).arg(dir.path("r")), &socket);
        servers.push((Served::Peer(server), String::new()));
    }
    let uri = |name: &str| format!("nbd+unix:///disk?socket=DIR/{name}.qemu-nbd");
    let options =
        |name: &str| format!("server.type=unix,server.path=DIR/{name}.qemu-nbd,export=disk");
    let (b, t, r) = (uri("b"), uri("t"), uri("r"));
    let json = r#"json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"unix","path":"DIR/t.qemu-nbd"},"export":"disk","open-timeout":1,"reconnect-delay":1}}"#;
    let lines = [
        // A server's disk is as long as it is.
        format!("qemu-img resize -f raw {b} 16M"),
        format!("qemu-img resize -f raw {b} 8M"),
        format!("qemu-img resize -f raw --shrink {b} 4M"),
        // Below an image.
        format!("qemu-img create -q -f qcow2 -F raw -b {b} over.qcow2"),
        "qemu-io -f qcow2 -c write_-P_7_2M_64k over.qcow2".to_owned(),
        format!("qemu-img compare -f raw -F qcow2 {b} over.qcow2"),
        "qemu-img commit over.qcow2".to_owned(),
        format!("qemu-img compare -f raw -F qcow2 {b} over.qcow2"),
        format!("qemu-img compare -f raw -F raw {b} other.raw"),
        "qemu-img map over.qcow2 --output=json".to_owned(),
        "qemu-img rebase -f qcow2 -F raw -b other.raw over.qcow2".to_owned(),
        format!("qemu-img rebase -f qcow2 -F raw -b {b} over.qcow2"),
        format!("qemu-img compare -f raw -F qcow2 {b} over.qcow2"),
        "qemu-img info over.qcow2".to_owned(),
        format!("qemu-img create -q -f qcow2 -b {b} over.qcow2"),
        // Copies.
        format!("qemu-img convert --salvage -f raw -O raw {b} o1.raw"),
        format!("qemu-img convert -S 64k -f raw -O raw {b} o2.raw"),
        format!("qemu-img convert -S 0 -f raw -O raw {b} o3.raw"),
        format!("qemu-img convert -n --target-is-zero -f raw -O raw other.raw {t}"),
        format!("qemu-img compare -f raw -F raw {t} other.raw"),
        format!("qemu-img convert -n -f raw -O raw o1.raw {json}"),
        format!(
            "qemu-img convert -n -f raw --target-image-opts o2.raw driver=raw,file.driver=nbd,{}",
            options("t")
                .split(',')
                .map(|word| format!("file.{word}"))
                .collect::<Vec<_>>()
                .join(",")
        ),
        format!("qemu-img compare -f raw -F raw {t} o3.raw"),
        format!("qemu-img info {json}"),
        format!(
            "qemu-img info --image-opts driver=nbd,{},open-timeout=x",
            options("t")
        ),
        format!(
            "qemu-img info --image-opts driver=nbd,{},reconnect-delay=1k",
            options("t")
        ),
        format!("qemu-img convert -n -f raw -O raw other.raw {r}"),
        format!(
            "qemu-img convert -n -f raw -O raw other.raw {}",
            uri("nowhere")
        ),
        // Another format in it.
        format!("qemu-img create -f qcow2 {t} 400M"),
        format!("qemu-img create -f qcow2 {t} 4M"),
        format!("qemu-img snapshot -c a {t}"),
        format!("qemu-img snapshot -l {t}"),
        format!("qemu-img bitmap --add -f qcow2 {t} b"),
        format!("qemu-img amend -f qcow2 -o lazy_refcounts=on {t}"),
        format!("qemu-img resize -f qcow2 {t} 5M"),
        format!("qemu-img info {t}"),
    ];
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    beside::same_in(folders[0].root(), folders[1].root(), &lines);
    let ours = &folders[1];
    for copy in ["o1.raw", "o2.raw", "o3.raw"] {
        qemu::compare("raw", ours.path(copy), "raw", ours.path("base.raw"));
    }
    // Ours says the same in its own words.
    let text = refused(ours.root(), &["resize", "-f", "raw", &servers[3].1, "16M"]);
    assert!(
        text.contains("is as long as it is, 8388608 bytes"),
        "{text}"
    );
    let text = refused(
        ours.root(),
        &["resize", "-f", "raw", "--shrink", &servers[3].1, "4M"],
    );
    assert!(text.contains("is as long as it is"), "{text}");
}

/// A port that nobody listens on.
fn port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn tcp_works_both_ways() {
    let temp = TempDir::new();
    let dir = temp.root();
    let bytes = raw(dir, "a.raw");
    fs::copy(dir.join("a.raw"), dir.join("same.raw")).unwrap();
    // Theirs.
    let theirs = port().to_string();
    let mut command = Command::new("qemu-nbd");
    command.args([
        "-t",
        "-e",
        "8",
        "-f",
        "raw",
        "-x",
        "disk",
        "-b",
        "127.0.0.1",
        "-p",
        &theirs,
    ]);
    let _server = {
        let server = Peer(command.arg("a.raw").current_dir(dir).spawn().unwrap());
        let began = Instant::now();
        while std::net::TcpStream::connect(format!("127.0.0.1:{theirs}")).is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "no port {theirs}"
            );
            thread::sleep(Duration::from_millis(5));
        }
        server
    };
    for name in [
        format!("nbd://localhost:{theirs}/disk"),
        format!("nbd://127.0.0.1:{theirs}/disk"),
        format!("nbd:127.0.0.1:{theirs}:exportname=disk"),
    ] {
        good(
            dir,
            &["compare", "-f", "raw", "-F", "raw", &name, "same.raw"],
        );
    }
    // Ours.
    fs::copy(dir.join("a.raw"), dir.join("b.raw")).unwrap();
    let ours = port();
    let server = Serve::new(binary(), dir.join("b.raw"))
        .format("raw")
        .arg("--nbd")
        .arg(format!("127.0.0.1:{ours}"))
        .start();
    let name = format!("nbd://localhost:{ours}");
    qemu_img(
        dir,
        &["convert", "-f", "raw", "-O", "raw", &name, "out.raw"],
    );
    assert!(fs::read(dir.join("out.raw")).unwrap() == bytes);
    good(dir, &["convert", "-q", "-f", "raw", &name, "out.qcow2"]);
    qemu::compare("qcow2", dir.join("out.qcow2"), "raw", dir.join("same.raw"));
    server.stop();
    let text = refused(dir, &["info", &name]);
    assert!(
        text.contains(&format!("connecting to 127.0.0.1:{ours}")) || text.contains("[::1]"),
        "{text}"
    );
    assert!(text.contains("Connection refused"), "{text}");
}

/// A disk that takes whole blocks of 4 KiB only, and 64 KiB at most at once.
#[test]
fn the_sizes_of_a_servers_blocks_are_kept() {
    let temp = TempDir::new();
    let dir = temp.root();
    let bytes = raw(dir, "a.raw");
    fs::write(dir.join("b.raw"), vec![5; LEN]).unwrap();
    let socket = dir.join("s");
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-e", "4", "-x", "disk", "-k"]);
    command.arg(&socket).arg("--image-opts");
    command.arg(
        "driver=blkdebug,align=4096,max-transfer=65536,image.driver=file,image.filename=b.raw",
    );
    let server = peer(command.current_dir(dir), &socket);
    let uri = "nbd+unix:///disk?socket=s";
    good(
        dir,
        &[
            "convert", "-q", "-n", "-f", "raw", "-O", "raw", "a.raw", uri,
        ],
    );
    assert!(fs::read(dir.join("b.raw")).unwrap() == bytes);
    good(
        dir,
        &[
            "dd",
            "-q",
            "-f",
            "raw",
            &format!("if={uri}"),
            "of=part.raw",
            "bs=512",
            "skip=2049",
            "count=2349",
        ],
    );
    let part = 2049 * 512..2349 * 512;
    assert!(fs::read(dir.join("part.raw")).unwrap() == bytes[part]);
    // Tables of an image, which are written as they come.
    good(dir, &["convert", "-q", "-O", "qcow2", "a.raw", uri]);
    good(dir, &["snapshot", "-q", "-c", "s", uri]);
    drop(server);
    qemu::check("qcow2", dir.join("b.raw"));
    qemu::compare("qcow2", dir.join("b.raw"), "raw", dir.join("a.raw"));
}

/// Stands before a server and lets so many bytes of its answers through on each connection; then it closes, or says
/// nothing more. Tells when it does.
fn before(server: &Path, at: &Path, bytes: usize, closes: bool) -> mpsc::Receiver<()> {
    let listener = UnixListener::bind(at).unwrap();
    let (stopped, told) = mpsc::channel();
    let server = server.to_owned();
    thread::spawn(move || {
        let mut held = Vec::new();
        while let Ok((mut client, _)) = listener.accept() {
            let mut behind = UnixStream::connect(&server).unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), behind.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut from, &mut to));
            let mut some = (&mut behind).take(bytes as u64);
            let _ = std::io::copy(&mut some, &mut client);
            let _ = stopped.send(());
            match closes {
                true => client.shutdown(std::net::Shutdown::Both).unwrap_or(()),
                false => held.push((client, behind)),
            }
        }
    });
    told
}

#[test]
fn a_server_that_goes_or_hangs_leaves_nothing_half_done() {
    let temp = TempDir::new();
    let dir = temp.root();
    raw(dir, "a.raw");
    let (_server, _) = serve("qemu-nbd", dir, "a.raw");
    let server = dir.join("a.raw.qemu-nbd");
    let nothing = || {
        let names = fs::read_dir(dir).unwrap();
        let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.find(|name| name.contains("out"))
    };
    let uri = |name: &str| format!("nbd+unix:///disk?socket={name}");
    for bytes in [0, 17, 200, 350, 50_000] {
        let name = format!("closes{bytes}");
        before(&server, &dir.join(&name), bytes, true);
        let text = refused(
            dir,
            &["convert", "-q", "-f", "raw", &uri(&name), "out.qcow2"],
        );
        assert!(
            text.contains(&uri(&name)) && text.contains("connection"),
            "{text}"
        );
        assert_eq!(nothing(), None);
    }
    // SIGINT, while it is waited for: in the handshake, and in the middle of data.
    for bytes in [100, 50_000] {
        let name = format!("hangs{bytes}");
        let told = before(&server, &dir.join(&name), bytes, false);
        let child = Command::new(binary())
            .args(["convert", "-q", "-f", "raw", &uri(&name), "out.qcow2"])
            .current_dir(dir)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        told.recv_timeout(Duration::from_secs(60)).unwrap();
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.signal(), Some(2), "{text}");
        assert_eq!(text, "diskplane: stopped by a signal\n");
        assert_eq!(nothing(), None);
    }
    before(&server, &dir.join("silent"), 50_000, false);
    let silent = uri("silent");
    let args = [
        "--nbd-timeout",
        "1",
        "convert",
        "-q",
        "-f",
        "raw",
        &silent,
        "out.qcow2",
    ];
    let text = refused(dir, &args);
    assert!(
        text.contains("the server has been silent for 1 s"),
        "{text}"
    );
    assert_eq!(nothing(), None);
}

/// Starts qemu-nbd for what `args` name, as export `disk`.
fn qemu_nbd(dir: &Path, name: &str, args: &[&str]) -> Served {
    let socket = dir.join(format!("{name}.qemu-nbd"));
    let mut command = Command::new("qemu-nbd");
    command.current_dir(dir);
    command.args(["-t", "-e", "4", "-x", "disk", "-k"]);
    Served::Peer(peer(command.arg(&socket).args(args), &socket))
}

/// Other contexts in the place of `base:allocation`: bits are taken as QEMU takes them.
#[test]
fn a_dirty_bitmap_of_a_server_is_shown_as_qemu_img_shows_it() {
    let folders = [TempDir::new(), TempDir::new()];
    let mut servers = Vec::new();
    for dir in &folders {
        qemu::create("qcow2", dir.path("base"), "4M");
        qemu::io("qcow2", dir.path("base"), &["write -P 1 0 2M"]);
        qemu::create_overlay(dir.path("top"), "base", "qcow2");
        qemu_img(dir.root(), &["bitmap", "--add", "top", "b0"]);
        qemu::io("qcow2", dir.path("top"), &["write -P 2 1M 2M"]);
        let args = ["-r", "-A", "-f", "qcow2", "-B", "b0", "top"];
        servers.push(qemu_nbd(dir.root(), "top", &args));
    }
    let node = "server.type=unix,server.path=DIR/top.qemu-nbd,export=disk";
    let below = node.replace("server.", "file.server.");
    let below = below.replace("export", "file.export");
    let with = |context: &str| {
        let json = "qemu-img map --output=json --image-opts";
        [
            format!("{json} driver=nbd,{node},x-dirty-bitmap={context}"),
            format!("qemu-img map --image-opts driver=nbd,{node},x-dirty-bitmap={context}"),
            format!("{json} driver=raw,file.driver=nbd,{below},file.x-dirty-bitmap={context}"),
        ]
    };
    let contexts = [
        "qemu:dirty-bitmap:b0",
        "qemu:allocation-depth",
        "base:allocation",
        "qemu:dirty-bitmap:other",
    ];
    let mut lines: Vec<String> = contexts.into_iter().flat_map(with).collect();
    lines.push(format!(
        "qemu-img map --output=json --image-opts driver=nbd,{node}"
    ));
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    beside::same_in(folders[0].root(), folders[1].root(), &lines);
}

/// What a server cannot read is zeros, is told, and ends a copy that is not to salvage. (qemu-nbd ends the connection where it
/// cannot read: qemu-img takes much more for lost then.)
#[test]
fn what_a_server_cannot_read_is_salvaged() {
    let dir = TempDir::new();
    let mut lost = raw(dir.root(), "base.raw");
    qemu_img(
        dir.root(),
        &["convert", "-O", "qcow2", "base.raw", "a.qcow2"],
    );
    // Of the image, a sector within its first cluster of data.
    let mut servers = Vec::new();
    for (name, sectors) in [("base.raw", [2053, 4000]), ("a.qcow2", [641, 641])] {
        let errors = sectors.map(|sector| format!("event=none,iotype=read,sector={sector}"));
        let errors = errors.iter().enumerate().flat_map(|(n, error)| {
            let options = error.split(',');
            options.map(move |option| format!("inject-error.{n}.{option}"))
        });
        let errors: Vec<String> = errors.collect();
        let errors = errors.join(",");
        let node = format!("driver=blkdebug,image.driver=file,image.filename={name},{errors}");
        let args = ["-r", "--image-opts", &node];
        servers.push(qemu_nbd(dir.root(), name, &args));
    }
    let name = |image: &str| {
        let socket = dir.path(format!("{image}.qemu-nbd"));
        qemu::nbd_unix_uri(socket).replace(":///", ":///disk")
    };
    let base = name("base.raw");
    let text = refused(
        dir.root(),
        &["convert", "-f", "raw", "-O", "raw", &base, "x"],
    );
    assert_eq!(text.matches("base.raw.qemu-nbd").count(), 1, "{text}");
    assert!(!dir.path("x").exists());
    let salvage = [
        "convert",
        "-m",
        "1",
        "--salvage",
        "--json",
        "-O",
        "raw",
        "-f",
    ];
    let told = good(dir.root(), &[&salvage[..], &["raw", &base, "x"]].concat());
    assert_eq!(json(&told)["unreadable-bytes"], 1024, "{told}");
    let told = good(
        dir.root(),
        &[&salvage[..], &["qcow2", &name("a.qcow2"), "y"]].concat(),
    );
    assert_eq!(json(&told)["unreadable-bytes"], 512, "{told}");
    let whole = lost.clone();
    for sector in [2053, 4000] {
        lost[sector * 512..][..512].fill(0);
    }
    assert!(fs::read(dir.path("x")).unwrap() == lost);
    let differ = fs::read(dir.path("y")).unwrap();
    let differ = differ.chunks(512).zip(whole.chunks(512));
    assert_eq!(differ.filter(|(a, b)| a != b).count(), 1);
}

/// A server that ends and is there again is waited for, by those who asked for that.
#[test]
fn a_copy_goes_on_when_its_server_is_back() {
    let dir = TempDir::new();
    qemu::create("raw", dir.path("base.raw"), "16M");
    qemu::io("raw", dir.path("base.raw"), &["write -P 9 0 16M"]);
    let args = ["-f", "raw", "base.raw"];
    let server = qemu_nbd(dir.root(), "s", &args);
    let node = "driver=nbd,server.type=unix,server.path=s.qemu-nbd,export=disk,reconnect-delay=100";
    let mut copy = Command::new(binary());
    copy.current_dir(dir.root())
        .args(["convert", "-q", "-m", "1", "-r", "8M", "--image-opts"]);
    let mut copy = copy.args([node, "-O", "raw", "copy"]).spawn().unwrap();
    // Something has been copied: it is in the middle.
    let part = dir.path(format!(".copy.{}.part", copy.id()));
    while fs::metadata(&part).map_or(0, |part| std::os::unix::fs::MetadataExt::blocks(&part)) == 0 {
        assert!(copy.try_wait().unwrap().is_none(), "it has ended already");
        thread::sleep(Duration::from_millis(5));
    }
    drop(server);
    fs::remove_file(dir.path("s.qemu-nbd")).unwrap();
    let _server = qemu_nbd(dir.root(), "s", &args);
    assert!(copy.wait().unwrap().success());
    qemu::compare("raw", dir.path("base.raw"), "raw", dir.path("copy"));
}

/// Many a server takes one client: an export that is named twice is opened once.
#[test]
fn an_overlay_is_rebased_onto_the_export_below_it() {
    let dir = TempDir::new();
    raw(dir.root(), "base.raw");
    let socket = dir.path("one");
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-e", "1", "-f", "raw", "-x", "disk", "-k"]);
    let _server = peer(command.arg(&socket).arg(dir.path("base.raw")), &socket);
    let name = qemu::nbd_unix_uri(&socket).replace(":///", ":///disk");
    good(
        dir.root(),
        &[
            "create", "-q", "-f", "qcow2", "-b", &name, "-F", "raw", "top",
        ],
    );
    let drop_in = ["qemu-img", "rebase", "-b", &name, "-F", "raw", "top"];
    good(dir.root(), &drop_in);
    let own = [
        "rebase",
        "-q",
        "--allow-backing",
        &name,
        "-b",
        &name,
        "-F",
        "raw",
        "top",
    ];
    good(dir.root(), &own);
}
