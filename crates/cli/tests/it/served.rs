//! `diskplane serve` from outside: readiness, signals, locks, and the bytes that clients see.

use crate::peer;

use peer::{Model, Random, as_qemu_io, qemu_img, qemu_io, qemu_reads, random_op};
use std::{
    fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use testkit::{Serve, TempDir, qemu};

fn binary() -> PathBuf {
    testkit::diskplane(env!("CARGO_BIN_EXE_diskplane"))
}

fn nbd(socket: &Path) -> String {
    format!("nbd:unix:{}", socket.display())
}

/// Random operations through a served disk, served again in between; at the end QEMU reads the
/// image itself.
fn differential(format: &str, engine: &str, cache: &str, options: &str, overlay: bool, seed: u64) {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk"), dir.path("sock"));
    let size = (5 << 20) + 4096;
    let mut random = Random::new(seed);
    let mut model = Model::new(size);
    let mut args = vec!["create", "-q", "-f", format];
    if overlay {
        let mut base = Model::new(size / 2);
        qemu_img(
            dir.root(),
            &["create", "-q", "-f", "raw", "base", &(size / 2).to_string()],
        );
        let mut script = String::new();
        for _ in 0..20 {
            as_qemu_io(
                random_op(&mut random, size / 2, 65536, 512),
                &mut base,
                &mut script,
            );
        }
        qemu_io(dir.root(), "raw", "base", &script);
        qemu_reads(dir.root(), "raw", "base", &mut base);
        model = Model::over(&base, size);
        args.extend(["-b", "base", "-F", "raw"]);
    }
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    let bytes = size.to_string();
    args.extend(["disk", &bytes]);
    qemu_img(dir.root(), &args);
    for _ in 0..2 {
        let server = Serve::new(binary(), &image)
            .format(format)
            .aio(engine)
            .cache(cache)
            .io_threads(2)
            .nbd_unix(&socket)
            .stats()
            .start();
        let mut script = String::new();
        for _ in 0..60 {
            as_qemu_io(
                random_op(&mut random, size, 65536, 512),
                &mut model,
                &mut script,
            );
        }
        qemu_io(dir.root(), "raw", &nbd(&socket), &script);
        let output = server.stop();
        assert!(format!("{output:?}").contains("write-zeroes"), "{output:?}");
        if format == "qcow2" {
            qemu::check("qcow2", &image);
        }
        qemu_reads(dir.root(), format, "disk", &mut model);
    }
}

#[test]
fn raw_on_threads() {
    differential("raw", "threads", "writeback", "", false, 1);
}

#[test]
fn raw_on_native_with_o_direct() {
    differential("raw", "native", "none", "", false, 2);
}

#[test]
fn raw_on_io_uring() {
    differential("raw", "io_uring", "writethrough", "", false, 3);
}

#[test]
fn qcow2_on_threads() {
    differential(
        "qcow2",
        "threads",
        "writeback",
        "cluster_size=4096",
        false,
        4,
    );
}

#[test]
fn qcow2_on_native_with_o_direct() {
    differential(
        "qcow2",
        "native",
        "directsync",
        "cluster_size=512",
        false,
        5,
    );
}

#[test]
fn qcow2_on_io_uring() {
    differential("qcow2", "io_uring", "none", "refcount_bits=1", false, 6);
}

#[test]
fn overlay_on_io_uring() {
    differential("qcow2", "io_uring", "writeback", "cluster_size=2M", true, 7);
}

#[test]
fn overlay_version_2_on_threads() {
    differential("qcow2", "threads", "unsafe", "compat=0.10", true, 8);
}

#[test]
fn says_ready_and_tells_systemd() {
    let dir = TempDir::new();
    let (notify, socket) = (dir.path("notify"), dir.path("sock"));
    let listener = UnixDatagram::bind(&notify).unwrap();
    listener
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut server = Command::new(binary())
        .args(["serve", "null:1G", "--shared", "--vhost-user"])
        .arg(dir.path("vm.sock"))
        .arg("--nbd")
        .arg(format!("unix:{}", socket.display()))
        .env("NOTIFY_SOCKET", &notify)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut message = [0; 64];
    let len = listener.recv(&mut message).unwrap();
    assert_eq!(&message[..len], b"READY=1");
    assert!(socket.exists() && dir.path("vm.sock").exists());
    qemu_io(dir.root(), "raw", &nbd(&socket), "read -q -P 0 512M 64k\n");
    let pid = rustix::process::Pid::from_child(&server);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let len = listener.recv(&mut message).unwrap();
    assert_eq!(&message[..len], b"STOPPING=1");
    assert!(server.wait().unwrap().success());
    let mut line = String::new();
    std::io::Read::read_to_string(&mut server.stdout.take().unwrap(), &mut line).unwrap();
    assert!(line.starts_with("ready null:1G 1 GiB engine:"), "{line}");
    assert!(
        line.contains(" vhost-user:") && line.contains(" nbd:unix:"),
        "{line}"
    );
    assert_eq!(line.lines().count(), 1);
    assert!(!socket.exists() && !dir.path("vm.sock").exists());
}

#[test]
fn a_terminal_that_is_closed_stops_a_server_unless_it_ignores_that() {
    let dir = TempDir::new();
    let image = dir.path("disk.qcow2");
    qemu::create("qcow2", &image, "16M");
    for (start, ends) in [("", true), ("trap '' HUP; ", false)] {
        let socket = dir.path("sock");
        let line = format!(
            "{start}exec {} serve {} --nbd unix:{}",
            binary().display(),
            image.display(),
            socket.display()
        );
        let mut server = Command::new("sh")
            .args(["-c", &line])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        let stdout = server.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut ready).unwrap();
        assert!(ready.starts_with("ready "), "{ready}");
        let pid = rustix::process::Pid::from_child(&server);
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
        if !ends {
            // It serves on, and stops in good order when it is told to.
            qemu_io(dir.root(), "raw", &nbd(&socket), "read -q -P 0 0 64k\n");
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        }
        assert!(server.wait().unwrap().success());
        assert!(!socket.exists());
    }
}

#[test]
fn statistics_come_on_demand_while_it_serves() {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk.qcow2"), dir.path("sock"));
    qemu::create("qcow2", &image, "16M");
    let server = Serve::new(binary(), &image).nbd_unix(&socket).start();
    qemu_io(
        dir.root(),
        "raw",
        &nbd(&socket),
        "write -q -P 3 0 1M\nflush\n",
    );
    server.signal(rustix::process::Signal::USR1);
    // The signal is handled when it is: ask until the answer is there.
    let mut tries = 0;
    while !server.stderr_so_far().contains("operation") {
        tries += 1;
        assert!(tries < 1000, "no statistics: {}", server.stderr_so_far());
        std::thread::sleep(Duration::from_millis(10));
    }
    // And it still serves.
    qemu_io(dir.root(), "raw", &nbd(&socket), "read -q -P 3 0 1M\n");
    server.stop();
    qemu::check("qcow2", &image);
}

#[test]
fn one_process_serves_several_disks() {
    let dir = TempDir::new();
    let images = ["a.qcow2", "b,b.qcow2", "c.qcow2"].map(|name| dir.path(name));
    let sockets = ["a.sock", "b.sock", "c.sock"].map(|name| dir.path(name));
    let mut serve = Serve::new(binary(), "null:1M").nbd_unix(dir.path("first"));
    for (image, socket) in images.iter().zip(&sockets) {
        // qemu-img reads a comma in a name as it is.
        qemu::create("qcow2", image, "16M");
        let file = image.display().to_string().replace(',', ",,");
        serve = serve
            .arg("--disk")
            .arg(format!("{file},nbd=unix:{}", socket.display()));
    }
    let server = serve.arg("--stats=json").start();
    for (n, socket) in sockets.iter().enumerate() {
        let script = format!("write -q -P {} 0 1M\nflush\n", n + 1);
        qemu_io(dir.root(), "raw", &nbd(socket), &script);
    }
    for (n, socket) in sockets.iter().enumerate() {
        let script = format!("read -q -P {} 0 1M\n", n + 1);
        qemu_io(dir.root(), "raw", &nbd(socket), &script);
    }
    assert_eq!(server.stdout_so_far().lines().count(), 4);
    let output = server.stop();
    let lines: Vec<serde_json::Value> = output
        .stderr
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    assert_eq!(lines.len(), 4, "{}", output.stderr);
    for (image, line) in images.iter().zip(&lines[1..]) {
        assert_eq!(line["disk"], image.display().to_string());
        let statistics = &line["statistics"];
        assert!(statistics["commits"].as_u64() >= Some(1), "{line}");
        assert!(statistics["barriers"].as_u64() >= Some(1), "{line}");
        qemu::check("qcow2", image);
    }
    assert!(sockets.iter().all(|socket| !socket.exists()));
}

#[test]
fn refuses_what_is_in_use_or_cannot_be_written() {
    let dir = TempDir::new();
    let image = dir.path("disk.qcow2");
    qemu::create("qcow2", &image, "16M");
    let first = Serve::new(binary(), &image).nbd_unix(dir.path("a")).start();
    let refused = |serve: Serve, says: &str| {
        let failure = match serve.try_start() {
            Ok(_) => panic!("started, but should have said: {says}"),
            Err(failure) => failure,
        };
        assert!(failure.contains(says), "{failure}");
    };
    let second = Serve::new(binary(), &image).nbd_unix(dir.path("b"));
    refused(second.clone(), "is locked");
    refused(second.read_only(), "is locked");
    // QEMU is kept out as well, and diskplane by QEMU's rules may look all the same.
    assert!(qemu::try_io("qcow2", &image, &["read 0 512"]).is_err());
    let info = |arg: &str| {
        let mut info = Command::new(binary());
        info.args(["info", arg]).arg(&image);
        info.output().unwrap().status.success()
    };
    assert!(!info("--json"));
    assert!(info("--force-share"));
    first.stop();
    fs::write(dir.path("disk.raw"), vec![0; 1 << 20]).unwrap();
    let raw = Serve::new(binary(), dir.path("disk.raw")).nbd_unix(dir.path("c"));
    refused(raw.clone(), "say -f raw");
    refused(
        raw.clone().format("raw").vhost_user(dir.path("d")),
        "say --shared",
    );
    raw.format("raw").start().stop();
}

#[test]
fn a_killed_server_loses_nothing_that_was_flushed() {
    const HALF: u64 = 8 << 20;
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk"), dir.path("sock"));
    let mut random = Random::new(99);
    let mut survived = 0;
    for round in 0..3 {
        let _ = fs::remove_file(&image);
        let options = "cluster_size=4096";
        qemu_img(
            dir.root(),
            &["create", "-q", "-f", "qcow2", "-o", options, "disk", "16M"],
        );
        let server = Serve::new(binary(), &image).nbd_unix(&socket).start();
        let mut model = Model::new(HALF);
        let mut script = String::new();
        for _ in 0..40 {
            as_qemu_io(
                random_op(&mut random, HALF, 4096, 512),
                &mut model,
                &mut script,
            );
        }
        script.push_str("flush\n");
        qemu_io(dir.root(), "raw", &nbd(&socket), &script);
        // A storm on the other half, flushes included, and a kill in the midst of it.
        let mut storm = Command::new("qemu-io")
            .args(["-f", "raw", &nbd(&socket)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut commands = String::new();
        for index in 0..2000 {
            let at = HALF + random.below(HALF / 512) * 512;
            let len = (1 + random.below(40) * 512).min(2 * HALF - at) & !511;
            commands.push_str(&format!("write -q -P 7 {at} {}\n", len.max(512)));
            if index % 20 == 0 {
                commands.push_str("flush\n");
            }
        }
        let mut stdin = storm.stdin.take().unwrap();
        let feeder = std::thread::spawn(move || {
            // Ends when the storm does.
            let _ = std::io::Write::write_all(&mut stdin, commands.as_bytes());
        });
        let before = fs::metadata(&image).unwrap().len();
        let grown = (round + 1) * (1 << 20);
        while fs::metadata(&image).unwrap().len() < before + grown {
            assert!(
                storm.try_wait().unwrap().is_none(),
                "the storm ended too soon"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        let pid = i32::try_from(server.pid()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        drop(server);
        let _ = storm.kill();
        storm.wait().unwrap();
        feeder.join().unwrap();
        peer::check_allowing_leaks(dir.root(), "disk");
        qemu_img(
            dir.root(),
            &["convert", "-f", "qcow2", "-O", "raw", "disk", "left.raw"],
        );
        let left = fs::read(dir.path("left.raw")).unwrap();
        let (settled, stormy) = left.split_at(HALF as usize);
        model
            .check(0, settled)
            .unwrap_or_else(|e| panic!("{round}: {e}"));
        assert!(
            stormy.iter().all(|b| *b == 0 || *b == 7),
            "{round}: foreign bytes"
        );
        survived += usize::from(stormy.contains(&7));
        // And it goes on where it was; the socket that the dead one left is replaced.
        let server = Serve::new(binary(), &image).nbd_unix(&socket).start();
        qemu_io(dir.root(), "raw", &nbd(&socket), "write -q -P 8 0 8M\n");
        server.stop();
        peer::check_allowing_leaks(dir.root(), "disk");
    }
    assert!(survived > 0, "the storms never came");
}
