//! QEMU and diskplane refuse each other's images, as two QEMUs do.

use crate::common;

use block::ErrorKind;
use common::scratch;
use io::{File, Lock, OpenOptions};
use std::{
    io::{BufRead, BufReader, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

const READ: Lock = Lock::Read { share_write: false };
const READ_SHARED: Lock = Lock::Read { share_write: true };

fn open(path: &Path, lock: Lock) -> block::Result<std::sync::Arc<File>> {
    File::open(
        path,
        &OpenOptions {
            read_only: lock != Lock::Write,
            lock,
            ..OpenOptions::default()
        },
    )
}

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("disk.img");
    std::fs::write(&path, vec![0u8; 1 << 20]).unwrap();
    path
}

#[test]
fn our_own_locks_exclude_each_other() {
    let dir = scratch();
    let path = image(dir.path());
    for (first, second, admitted) in [
        (Lock::Write, Lock::Write, false),
        (Lock::Write, READ, false),
        (READ, Lock::Write, false),
        (READ, READ, true),
        (Lock::Write, READ_SHARED, true),
        (READ_SHARED, Lock::Write, true),
        (Lock::Write, Lock::None, true),
        (Lock::None, Lock::Write, true),
    ] {
        let held = open(&path, first).unwrap();
        match open(&path, second) {
            Ok(_) => assert!(admitted, "{second:?} beside {first:?}"),
            Err(e) => {
                assert!(!admitted, "{second:?} beside {first:?}: {e}");
                assert_eq!(e.kind(), ErrorKind::Locked);
                assert!(e.to_string().contains("disk.img"), "{e}");
                // No flag lets two write.
                let hint = e.to_string().contains("--force-share");
                assert_eq!(hint, second != Lock::Write, "{e}");
            }
        }
        drop(held);
        open(&path, Lock::Write).expect("closing releases the lock");
    }
}

/// As the kernel holds a file that was registered with a ring which it takes apart in the background.
#[test]
fn closing_releases_the_lock_of_a_description_that_lives_on() {
    let dir = scratch();
    let path = image(dir.path());
    for lock in [Lock::Write, READ] {
        let file = open(&path, lock).unwrap();
        let other = file.as_fd().try_clone_to_owned().unwrap();
        drop(file);
        open(&path, Lock::Write).expect("closing releases the lock");
        drop(other);
    }
}

#[test]
fn a_lock_that_cannot_be_changed_stays() {
    let dir = scratch();
    let path = image(dir.path());
    let reader = open(&path, READ).unwrap();
    let other = open(&path, READ).unwrap();
    assert!(other.set_lock(Lock::Write).is_err());
    assert_eq!(other.lock(), READ);
    drop(reader);
    assert!(
        open(&path, Lock::Write).is_err(),
        "the old lock is in force"
    );
    other.set_lock(Lock::Write).unwrap();
    assert!(open(&path, READ).is_err());
    other.set_lock(READ).unwrap();
    open(&path, READ).expect("going down lets readers in");
    assert!(open(&path, Lock::Write).is_err());
}

#[test]
fn creating_over_a_locked_image_leaves_it_alone() {
    let dir = scratch();
    let path = image(dir.path());
    let held = open(&path, READ).unwrap();
    assert!(File::create(&path, &OpenOptions::default()).is_err());
    assert_eq!(held.len().unwrap(), 1 << 20);
    drop(held);
    let file = File::create(&path, &OpenOptions::default()).unwrap();
    assert_eq!(file.len().unwrap(), 0);
    assert!(File::create_new(&path, &OpenOptions::default()).is_err());
}

/// An image in a format whose readers, as a guest's disk does, let nobody write. (qemu-io
/// shares everything on a raw image.)
fn qcow2(dir: &Path) -> PathBuf {
    let path = dir.join("disk.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg("1M")
        .status();
    assert!(made.expect("qemu-img").success());
    path
}

/// A qemu-io that holds an image open until it is dropped.
struct Qemu(Child);

impl Qemu {
    fn hold(path: &Path, format: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", format])
            .args(arguments)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io");
        let stdin = child.stdin.as_mut().unwrap();
        stdin.write_all(b"length\n").unwrap();
        // Its answer shows that the image is open.
        let mut stdout = BufReader::new(child.stdout.as_mut().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert!(line.contains("1 MiB"), "qemu-io said: {line}");
        Self(child)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn qemu_opens(path: &Path, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "length"])
        .args(arguments)
        .arg(path)
        .output()
        .expect("qemu-io");
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn has_qemu() -> bool {
    let found = Command::new("qemu-io").arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: qemu-io is not installed (package qemu-utils)");
    }
    found
}

#[test]
fn qemu_keeps_us_out() {
    if !has_qemu() {
        return;
    }
    let dir = scratch();
    for format in ["raw", "qcow2"] {
        let path = match format {
            "raw" => image(dir.path()),
            _ => qcow2(dir.path()),
        };
        let _writer = Qemu::hold(&path, format, &[]);
        for lock in [Lock::Write, READ] {
            let error = open(&path, lock).expect_err("qemu-io writes");
            assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
        }
        open(&path, Lock::None).expect("--force-share reads");
    }
    let path = dir.path().join("disk.qcow2");
    {
        let _reader = Qemu::hold(&path, "qcow2", &["-r"]);
        open(&path, READ).expect("two readers");
        let error = open(&path, Lock::Write).expect_err("qemu-io reads");
        assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    }
    open(&path, Lock::Write).expect("qemu-io is gone");
}

#[test]
fn we_keep_qemu_out() {
    if !has_qemu() {
        return;
    }
    let dir = scratch();
    let path = qcow2(dir.path());
    {
        let _writer = open(&path, Lock::Write).unwrap();
        for arguments in [&[][..], &["-r"]] {
            let error = qemu_opens(&path, arguments).expect_err("we write");
            assert!(error.contains("lock"), "{error}");
        }
        qemu_opens(&path, &["-r", "-U"]).expect("qemu-io -U reads");
    }
    {
        let _reader = open(&path, READ).unwrap();
        qemu_opens(&path, &["-r"]).expect("two readers");
        let error = qemu_opens(&path, &[]).expect_err("we read");
        assert!(error.contains("lock"), "{error}");
    }
    qemu_opens(&path, &[]).expect("we are gone");
}
