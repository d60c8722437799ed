//! `diskplane serve` from outside: readiness, signals, locks, and the bytes that clients see.

#[path = "../../disk/tests/peer/mod.rs"]
mod peer;

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
