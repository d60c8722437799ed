//! A real Linux guest on `diskplane serve --vhost-user`: file systems, verified random I/O, discards and
//! zeroes through the kernel's virtio-blk driver, and QEMU's opinion of the image that is left.
//!
//! Each test boots a guest once (5–10 s under emulation) and runs several scenarios in it; `guest/init`
//! says what they do. They need `make setup`.

use std::path::Path;
use std::process::Command;

use testkit::{Disk, Guest, Output, Report, Serve, TempDir, command, qemu};

/// `diskplane serve IMAGE`.
fn serve(image: &Path) -> Serve {
    Serve::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")), image)
}

/// What diskplane serves of a closed image must be what QEMU reads in it.
fn assert_served_as_qemu_reads(dir: &TempDir, format: &str, image: &Path) {
    let socket = dir.path("nbd.sock");
    let server = serve(image)
        .format(format)
        .read_only()
        .nbd_unix(&socket)
        .start();
    qemu::compare(format, image, "raw", qemu::nbd_unix_uri(&socket));
    server.stop();
}

/// The ext4 file system that the scenario `fs-ext4` left on the disk, as QEMU reads the image: sound, and
/// its files as their checksums say. This is what has survived the server's end.
fn assert_ext4_is_sound(dir: &TempDir, format: &str, image: &Path) {
    let flat = dir.path("flat.raw");
    qemu::convert(format, image, "raw", &flat);
    command::run(tool("e2fsck").arg("-fn").arg(&flat));
    let files = dir.path("files");
    std::fs::create_dir(&files).expect("a folder for the guest's files");
    command::run(
        tool("debugfs")
            .arg("-R")
            .arg(format!("rdump /again {}", files.display()))
            .arg(&flat),
    );
    command::run(
        Command::new("sha256sum")
            .args(["--quiet", "-c", "SHA256SUMS"])
            .current_dir(files.join("again")),
    );
}

/// The same for the scenario `fs-xfs`.
fn assert_xfs_is_sound(dir: &TempDir, format: &str, image: &Path) {
    let flat = dir.path("flat.raw");
    qemu::convert(format, image, "raw", &flat);
    command::run(tool("xfs_repair").arg("-n").arg("-f").arg(&flat));
}

/// A tool that is in a folder which a user's PATH on Debian has not.
fn tool(name: &str) -> Command {
    let folders = ["/usr/sbin", "/sbin", "/usr/bin"];
    let found = folders
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.exists());
    Command::new(found.unwrap_or_else(|| name.into()))
}

/// What every guest must have been offered and has used, by its own count and by the server's: the kernel
/// sends no flush to a disk that calls itself write-through, and then a test of flushes tests nothing.
fn assert_offered_and_used(report: &Report, server: &Output, queues: u64) {
    assert_eq!(report.value("vda.write_cache"), "write back");
    assert_eq!(report.number("vda.nr_queues"), queues);
    assert_eq!(report.number("vda.read_only"), 0);
    assert!(
        report.number("vda.discard_max_bytes") > 0,
        "discard is offered"
    );
    assert!(
        report.number("vda.write_zeroes_max_bytes") > 0,
        "write zeroes is offered"
    );
    assert!(
        report.number("vda.discard_ios") > 0,
        "the guest has sent discards"
    );
    let sent = report.number("vda.flush_ios");
    let received = requests(server, "flush");
    assert!(sent > 0, "the guest has sent flushes");
    assert!(
        received >= sent,
        "the guest has sent {sent} flushes, the server has seen {received}"
    );
}

/// How many requests of a kind the table of `--stats` counts: its second column.
fn requests(server: &Output, operation: &str) -> u64 {
    let mut lines = server
        .stderr
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = lines
        .find(|words| words.first() == Some(&operation))
        .unwrap_or_default();
    let count = row.get(1).and_then(|count| count.parse().ok());
    count.unwrap_or_else(|| {
        panic!(
            "no count of '{operation}' in the statistics:\n{}",
            server.stderr
        )
    })
}

#[test]
fn raw_with_one_queue() {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk.raw"), dir.path("vm.sock"));
    qemu::create("raw", &image, "1G");
    let server = serve(&image)
        .format("raw")
        .vhost_user(&socket)
        .stats()
        .start();
    let report = Guest::new("discard,verify,fs-ext4")
        .parameter("mb", 32)
        .disk(Disk::vhost_user(&socket))
        .run_on(&server);
    let output = server.stop();
    assert_ext4_is_sound(&dir, "raw", &image);
    assert_served_as_qemu_reads(&dir, "raw", &image);
    assert_offered_and_used(&report, &output, 1);
}

#[test]
fn qcow2_with_two_queues_on_two_threads() {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk.qcow2"), dir.path("vm.sock"));
    qemu::create("qcow2", &image, "1G");
    let server = serve(&image)
        .format("qcow2")
        .vhost_user(&socket)
        .queues(2)
        .io_threads(2)
        .stats()
        .start();
    let report = Guest::new("discard,verify,fs-xfs")
        .parameter("mb", 32)
        .disk(Disk::vhost_user(&socket).queues(2))
        .run_on(&server);
    let output = server.stop();
    qemu::check("qcow2", &image);
    assert_xfs_is_sound(&dir, "qcow2", &image);
    assert_served_as_qemu_reads(&dir, "qcow2", &image);
    assert_offered_and_used(&report, &output, 2);
}

/// A raw base that already holds a file system, an overlay in which QEMU has changed some of it, and on top
/// the overlay that is served: the guest's files come from all three.
#[test]
fn an_overlay_of_three_layers() {
    let dir = TempDir::new();
    let (base, middle, top) = (
        dir.path("base.raw"),
        dir.path("middle.qcow2"),
        dir.path("top.qcow2"),
    );
    let tree = dir.path("tree");
    std::fs::create_dir_all(tree.join("base")).expect("a folder for the files of the base image");
    let mut sums = Command::new("sh");
    let make_files = "for n in 1 2 3 4; do head -c $((n * 700000 + n)) /dev/urandom >file$n; done; \
                      sha256sum file* >SHA256SUMS";
    command::run(
        sums.args(["-e", "-c", make_files])
            .current_dir(tree.join("base")),
    );
    qemu::create("raw", &base, "256M");
    command::run(tool("mkfs.ext4").arg("-q").arg("-d").arg(&tree).arg(&base));

    // What the middle layer holds is the same file system, read from the base and written again in part.
    qemu::create_overlay(&middle, &base, "raw");
    let piece = dir.path("piece.raw");
    command::run(
        Command::new("dd")
            .args(["bs=1M", "count=24", "status=none"])
            .arg(file("if", &base))
            .arg(file("of", &piece)),
    );
    qemu::io(
        "qcow2",
        &middle,
        &[&format!("write -s {} 0 24M", piece.display())],
    );
    qemu::create_overlay(&top, &middle, "qcow2");
    let before = (checksum(&base), checksum(&middle));

    let socket = dir.path("vm.sock");
    let server = serve(&top)
        .format("qcow2")
        .vhost_user(&socket)
        .queues(2)
        .io_threads(2)
        .stats()
        .start();
    let guest = Guest::new("demo")
        .parameter("mb", 32)
        .parameter("seconds", 2);
    let report = guest
        .disk(Disk::vhost_user(&socket).queues(2))
        .run_on(&server);
    let output = server.stop();

    assert!(
        before == (checksum(&base), checksum(&middle)),
        "a write went to a layer below the top"
    );
    qemu::check("qcow2", &top);
    let flat = dir.path("flat.raw");
    qemu::convert("qcow2", &top, "raw", &flat);
    command::run(tool("e2fsck").arg("-fn").arg(&flat));
    assert_served_as_qemu_reads(&dir, "qcow2", &top);
    assert_offered_and_used(&report, &output, 2);
}

#[test]
fn a_read_only_disk_is_read_only_in_the_guest() {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk.qcow2"), dir.path("vm.sock"));
    qemu::create("qcow2", &image, "64M");
    let before = checksum(&image);
    let server = serve(&image).read_only().vhost_user(&socket).start();
    let report = Guest::new("probe")
        .disk(Disk::vhost_user(&socket))
        .run_on(&server);
    server.stop();
    assert_eq!(report.number("vda.read_only"), 1);
    assert!(
        before == checksum(&image),
        "a read-only image was written to"
    );
}

/// The server and the guest are gone at once, as in a power cut of the host's processes. Every file whose
/// sync had come back must be in the image: a completed flush covers data and metadata.
fn keeps_what_was_flushed(format: &str) {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk"), dir.path("vm.sock"));
    qemu::create(format, &image, "512M");
    let server = serve(&image)
        .format(format)
        .vhost_user(&socket)
        .queues(2)
        .io_threads(2)
        .start();
    let disk = Disk::vhost_user(&socket).queues(2);
    let guest = Guest::new("crash").disk(disk).boot();
    let mut guest = guest.expect("the guest starts");
    guest.wait_for("durable=12 ");
    server.kill();
    let durable: Vec<String> = (guest.cut_power().iter())
        .filter_map(|line| line.strip_prefix("DP durable=").map(str::to_owned))
        .collect();

    let flat = dir.path("flat.raw");
    qemu::convert(format, &image, "raw", &flat);
    if format == "qcow2" {
        qemu::check_allowing_leaks(format, &image);
    }
    // The journal is replayed, which e2fsck tells with status 1; after that nothing may be wrong.
    let _ = command::try_run(tool("e2fsck").arg("-p").arg(&flat));
    command::run(tool("e2fsck").arg("-fn").arg(&flat));
    for line in &durable {
        let (index, sum) = line.split_once(" sum=").expect("a durable file has a sum");
        let got = dir.path("got");
        let dump = format!("dump /file{index} {}", got.display());
        command::run(tool("debugfs").arg("-R").arg(dump).arg(&flat));
        let found = checksum(&got);
        assert!(
            found.starts_with(sum),
            "file {index} of {} was synced, its sum is {sum}, found is {found}",
            durable.len()
        );
    }
}

#[test]
fn a_crash_on_raw_keeps_what_was_flushed() {
    keeps_what_was_flushed("raw");
}

#[test]
fn a_crash_on_qcow2_keeps_what_was_flushed() {
    keeps_what_was_flushed("qcow2");
}

/// `kill -9` of the server in the middle of verified writes, twice; the guest goes on when the next one is
/// there, and everything that it was told is written is there.
fn survives_kills(packed: bool) {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk"), dir.path("vm.sock"));
    qemu::create("raw", &image, "1G");
    let serve = serve(&image)
        .format("raw")
        .vhost_user(&socket)
        .queues(2)
        .io_threads(2);
    let mut server = serve.start();
    let mut disk = Disk::vhost_user(&socket).queues(2).reconnect();
    if packed {
        disk = disk.packed();
    }
    let guest = Guest::new("reconnect")
        .parameter("mb", 24)
        .parameter("seconds", 10)
        .disk(disk);
    let mut guest = guest.boot().expect("the guest starts");
    for progress in ["progress=2 ", "progress=5 "] {
        guest.wait_for(progress);
        server.kill();
        server = serve.start();
    }
    let report = guest.finish_on(&server);
    server.stop();
    assert!(report.passed("reconnect.verify_whole"));
    assert_served_as_qemu_reads(&dir, "raw", &image);
}

#[test]
fn a_guest_on_raw_survives_kills_of_the_server() {
    survives_kills(false);
}

#[test]
fn a_guest_with_packed_rings_survives_kills_of_the_server() {
    survives_kills(true);
}

/// The checksum of a whole file.
fn checksum(path: &Path) -> String {
    command::run(Command::new("sha256sum").arg(path)).stdout
}

/// An argument of dd.
fn file(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}
