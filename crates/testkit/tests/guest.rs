//! The guest itself, on a peer's server: what it calls verified is only worth something when it notices
//! what is wrong.

use testkit::{Disk, Guest, Report, TempDir, qemu, server};

/// Runs scenarios on a fresh qcow2 disk that qemu-storage-daemon serves.
fn run_on_peer(guest: Guest) -> Result<Report, testkit::Failure> {
    let dir = TempDir::new();
    let (image, socket) = (dir.path("disk.qcow2"), dir.path("vm.sock"));
    qemu::create("qcow2", &image, "512M");
    let server = server::storage_daemon("qcow2", &image, &socket, 2);
    let report = guest.disk(Disk::vhost_user(&socket).queues(2)).try_run();
    server.stop();
    report
}

#[test]
fn damaged_blocks_fail_the_verify_scenario() {
    let guest = Guest::new("verify")
        .parameter("mb", 8)
        .parameter("sabotage", 1);
    let failure = run_on_peer(guest)
        .map(|report| report.steps)
        .expect_err("the blocks were damaged");
    assert!(failure.contains("failed at verify.libaio"), "{failure}");
    assert!(
        failure.contains("verify: bad"),
        "fio's complaint is part of the log: {failure}"
    );
}

#[test]
fn a_damaged_file_fails_the_file_system_scenario() {
    let guest = Guest::new("fs-ext4").parameter("sabotage", 1);
    let failure = run_on_peer(guest)
        .map(|report| report.steps)
        .expect_err("a file was damaged");
    assert!(failure.contains("failed at fs-ext4.verify"), "{failure}");
    assert!(
        failure.contains("file8: FAILED"),
        "the file is named: {failure}"
    );
}
