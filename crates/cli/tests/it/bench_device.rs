//! `diskplane bench device` from outside: what programs see, and what is left of it.

use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};
use testkit::TempDir;

/// A device; killed when dropped.
struct Device(Child, PathBuf);

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    command.args(["bench", "device", "--size", "8M"]).args(args);
    command
        .arg(dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Starts one; `None` on a machine without FUSE.
fn start(dir: &Path, args: &[&str]) -> Option<Device> {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return None;
    }
    let mut child = command(dir, args).spawn().unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let path = line.split_once(": ").map(|(path, _)| path.into());
    Some(Device(child, path.unwrap_or_else(|| panic!("{line}"))))
}

fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.contains(dir.to_str().unwrap())
}

#[test]
fn bytes_lie_where_raid0_has_them_and_stay_in_files_of_the_user() {
    let dir = TempDir::new();
    let (run, a, b) = (dir.path("run"), dir.path("a"), dir.path("b"));
    let files = ["--file", a.to_str().unwrap(), "--file", b.to_str().unwrap()];
    let args = [
        &["--model", "flash", "--members", "2", "--chunk", "4K"],
        &files[..],
    ]
    .concat();
    let Some(mut device) = start(&run, &args) else {
        return;
    };
    let disk = File::options()
        .read(true)
        .write(true)
        .open(&device.1)
        .unwrap();
    assert_eq!(disk.metadata().unwrap().len(), 8 << 20);
    let data: Vec<u8> = (0..5 * 4096_u32).map(|n| (n / 4096 + 1) as u8).collect();
    disk.write_all_at(&data, 4096).unwrap();
    disk.sync_all().unwrap();
    // Chunk 1 is the second file's first, chunk 2 the first one's second.
    let byte = |path: &Path, at| {
        let mut byte = [0];
        File::open(path)
            .unwrap()
            .read_exact_at(&mut byte, at)
            .unwrap();
        byte[0]
    };
    let seen = [
        byte(&b, 0),
        byte(&a, 4096),
        byte(&b, 4096),
        byte(&a, 8192),
        byte(&b, 8192),
    ];
    assert_eq!(seen, [1, 2, 3, 4, 5]);
    assert_eq!((byte(&a, 0), byte(&a, 4 * 4096)), (0, 0));
    let mut back = vec![0; data.len()];
    disk.read_exact_at(&mut back, 4096).unwrap();
    assert!(back == data);
    // It is as large as it is.
    assert!(disk.write_all_at(&[1], 8 << 20).is_err() && disk.set_len(1 << 20).is_err());
    drop(disk);
    kill_process(Pid::from_child(&device.0), Signal::TERM).unwrap();
    assert!(device.0.wait().unwrap().success());
    let mut words = String::new();
    device
        .0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut words)
        .unwrap();
    assert!(words.contains("requests; answers came after"), "{words}");
    assert!(!is_mounted(&run) && !run.join("device").exists());
    assert_eq!(fs::metadata(&a).unwrap().len(), 4 << 20);
}

#[test]
fn what_a_killed_device_left_is_undone_by_the_next() {
    let dir = TempDir::new();
    let run = dir.path("a run");
    let Some(mut device) = start(&run, &[]) else {
        return;
    };
    // The same place is taken while it lives.
    let output = command(&run, &[]).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("another run is at work"), "{words}");
    device.0.kill().unwrap();
    device.0.wait().unwrap();
    assert!(run.join("device").exists());
    let next = start(&run, &[]).unwrap();
    let data = fs::read(&next.1).unwrap();
    assert!(data.len() == 8 << 20 && data.iter().all(|byte| *byte == 0));
    // Who unmounts it ends it.
    let point = next.1.parent().unwrap();
    assert!(
        Command::new("umount")
            .arg(point)
            .status()
            .unwrap()
            .success()
    );
    let mut next = next;
    assert!(next.0.wait().unwrap().success());
    assert!(!run.join("device").exists());
}

#[test]
fn what_is_no_device_is_refused() {
    let dir = TempDir::new();
    let run = dir.path("run");
    let small = dir.path("small");
    let theirs = dir.path("home/device/letter");
    fs::create_dir_all(theirs.parent().unwrap()).unwrap();
    fs::write(&theirs, "dear").unwrap();
    let output = command(&dir.path("home"), &[]).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        words.contains("device: no run of diskplane made it"),
        "{words}"
    );
    assert_eq!(fs::read(&theirs).unwrap(), b"dear");
    fs::write(&small, [0; 100]).unwrap();
    let small = small.to_str().unwrap();
    for (args, says) in [
        (&["--members", "3"][..], "multiple of 196608"),
        (&["--stroke", "0"], "part of the tracks"),
        (
            &["--members", "2", "--file", small],
            "1 files for 2 devices",
        ),
        (&["--file", small], "it has 100 bytes"),
        (&["--model", "floppy"], "hdd-7200"),
    ] {
        let output = command(&run, args).output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && words.contains(says), "{words}");
        assert!(!run.join("device").exists());
    }
}
