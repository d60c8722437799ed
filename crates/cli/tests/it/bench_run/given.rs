//! Devices that a user gives to a run: used, and left clear.

use super::{Running, assert_gone, bench, can_mount, records};
use rustix::{
    fs::{Mode, OFlags, open},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;
use std::{
    fs,
    io::Read,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use testkit::TempDir;

/// A loop device as a device that a user gives; detached when dropped.
struct Given(String);

impl Given {
    fn of(file: &Path, bytes: u64) -> Self {
        fs::File::create(file).unwrap().set_len(bytes).unwrap();
        let mut losetup = Command::new("losetup");
        let output = losetup.args(["--find", "--show"]).arg(file).output();
        let name = String::from_utf8(output.unwrap().stdout).unwrap();
        assert!(name.starts_with("/dev/loop"), "{name}");
        Self(name.trim().to_owned())
    }

    /// What blkid knows of it.
    fn signature(&self) -> String {
        let output = Command::new("/sbin/blkid").args(["-p", &self.0]).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    }

    /// A run on it, of a cell of a file system, whose samples take long.
    fn run(&self, dir: &Path) -> Running {
        let long = ["--seconds", "100", "--samples", "1"];
        let cell = ["E1", "--cells", "randread-raw-ext4"];
        let mut command = bench(dir, &[&cell[..], &long].concat());
        command.args(["--device", &self.0]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Running(command.spawn().unwrap())
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_given_device_is_used_and_left_clear_and_somebodys_is_not_taken() {
    if !can_mount() {
        return;
    }
    let dir = TempDir::new();
    let given = Given::of(&dir.path("backing"), 900 << 20);
    let on_device = |run: &str, args: &[&str]| {
        let short = ["--seconds", "0.1", "--samples", "1"];
        let mut command = bench(&dir.path(run), args);
        command.args(short).args(["--device", &given.0]);
        command.output().unwrap()
    };
    // As it is, and with a file system on it.
    for (n, name) in ["randread-raw-device", "randwrite-qcow2-ext4"]
        .iter()
        .enumerate()
    {
        let run = n.to_string();
        let output = on_device(&run, &["E1", "--cells", name]);
        assert!(output.status.success(), "{output:?}");
        let run = dir.path(&run);
        assert_gone(&run);
        assert_eq!(records(&run, "failure"), [] as [Value; 0], "{name}");
        let samples = records(&run, "sample");
        assert_eq!(samples.len(), 7, "{name}");
        for sample in &samples {
            let busy = sample["metrics"]["device-busy-percent"].as_f64();
            assert!(busy > Some(0.0), "{sample}");
            assert_eq!(sample["seen"]["direct"], true, "{sample}");
            if n == 0 {
                assert_eq!(
                    given.0,
                    format!("/dev/{}", sample["seen"]["files"][0].as_str().unwrap())
                );
                assert_eq!(sample["seen"]["bytes"][0], 900 << 20);
                assert_eq!(sample["detail"]["specs"][0]["range_bytes"], 16 << 20);
            }
        }
        assert_eq!(given.signature(), "", "{name}");
    }
    // What is somebody's stays so.
    let made = Command::new("/sbin/mkfs.ext4")
        .args(["-q", "-L", "photos", &given.0])
        .status();
    assert!(made.unwrap().success());
    let words = |output: std::process::Output| {
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let said = words(on_device("2", &["E1", "--cells", "randread-raw-device"]));
    assert!(
        said.contains("it holds ext4 'photos', which would be lost"),
        "{said}"
    );
    assert!(given.signature().contains("photos"));
    assert!(!dir.path("2").join("work").exists());
    let said = words(on_device("3", &["E3"]));
    assert!(said.contains("E3 has no cell of a device"), "{said}");
    let output = on_device(
        "4",
        &["E1", "--cells", "randread-raw-device", "--overwrite-device"],
    );
    assert!(output.status.success(), "{output:?}");
}

/// Waits until something is so, while a run is at work.
#[track_caller]
fn wait_for(run: &mut Running, what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(run.0.try_wait().unwrap().is_none(), "{what}: it ended");
        assert!(Instant::now() < deadline, "{what}: not in time");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Stops a run by ^C; what it said.
#[track_caller]
fn interrupt(mut run: Running) -> String {
    kill_process(Pid::from_child(&run.0), Signal::INT).unwrap();
    assert_eq!(run.0.wait().unwrap().code(), Some(130));
    let mut words = String::new();
    let mut err = run.0.stderr.take().unwrap();
    err.read_to_string(&mut words).unwrap();
    words
}

/// Whether any process has a file below a folder open.
fn is_open(folder: &Path) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let fds = processes.flat_map(|process| fs::read_dir(process.path().join("fd")));
    let mut fds = fds.flatten().flatten();
    fds.any(|fd| fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(folder)))
}

#[test]
fn a_given_device_is_left_clear_whatever_ends_the_run() {
    if !can_mount() {
        return;
    }
    let dir = TempDir::new();
    let given = Given::of(&dir.path("backing"), 900 << 20);
    // While servers have files open on its file system, which is not gone before they are.
    let run = dir.path("stopped");
    let mut running = given.run(&run);
    let images = run.join("work/ext4");
    wait_for(&mut running, "a server", || is_open(&images));
    assert!(given.signature().contains("LABEL=\"dp-bench\""));
    let said = interrupt(running);
    assert!(
        said.contains("stopped; servers and images of the run are gone"),
        "{said}"
    );
    assert_gone(&run);
    assert_eq!(given.signature(), "");
    // After a kill something is left, which a command takes away, and the next run would.
    let run = dir.path("killed");
    let mut running = given.run(&run);
    let images = run.join("work/ext4");
    wait_for(&mut running, "a server", || is_open(&images));
    let clear = || {
        let mut command = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
        command.args(["bench", "clear"]).arg(&run);
        command.args(["--device", &given.0]).output().unwrap()
    };
    let words = clear();
    let said = String::from_utf8_lossy(&words.stderr);
    assert!(said.contains("another run is at work"), "{said}");
    running.0.kill().unwrap();
    running.0.wait().unwrap();
    assert!(given.signature().contains("dp-bench"));
    for says in ["what a run had left is gone\n", "nothing was left\n"] {
        let words = clear();
        assert!(words.status.success(), "{words:?}");
        assert_eq!(String::from_utf8_lossy(&words.stdout), says);
        assert_gone(&run);
        assert_eq!(given.signature(), "");
    }
    assert!(run.join("records.jsonl").exists());
}

/// On a disk on which mkfs takes seconds.
#[test]
fn mkfs_ends_with_the_run_that_started_it() {
    if !can_mount() {
        return;
    }
    let dir = TempDir::new();
    let slow = dir.path("slow");
    let mut device = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    device.args(["bench", "device", "--size", "900M", "--write-cache", "0"]);
    let device = device.arg(&slow).stdout(Stdio::null()).spawn().unwrap();
    let mut device = Running(device);
    let file = slow.join("device/mount/disk");
    wait_for(&mut device, "a disk", || file.exists());
    let mut losetup = Command::new("losetup");
    losetup
        .args(["--find", "--show", "--direct-io=on"])
        .arg(&file);
    let name = String::from_utf8(losetup.output().unwrap().stdout).unwrap();
    let given = Given(name.trim().to_owned());
    let run = dir.path("run");
    let mut running = given.run(&run);
    // Who has it open exclusively, by name.
    let makers = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let ours = processes.filter(|process| {
            let of = |name: &str| fs::read(process.path().join(name)).unwrap_or_default();
            let line = String::from_utf8_lossy(&of("cmdline")).replace('\0', " ");
            of("comm").starts_with(b"mkfs.ext4") && line.ends_with(&format!("{} ", given.0))
        });
        ours.count()
    };
    wait_for(&mut running, "mkfs", || makers() == 1);
    let said = interrupt(running);
    assert_eq!(makers(), 0, "{said}");
    // It was killed, not waited for: it ends with the copies of the superblock, of which the first lies in the second group.
    let mut magic = [0; 2];
    let disk = fs::File::open(&given.0).unwrap();
    disk.read_exact_at(&mut magic, (128 << 20) + 0x38).unwrap();
    assert_ne!(magic, [0x53, 0xef], "{said}");
    assert!(said.contains("images of the run are gone"), "{said}");
    assert_gone(&run);
    assert_eq!(given.signature(), "");
    drop(given);
    kill_process(Pid::from_child(&device.0), Signal::INT).unwrap();
    device.0.wait().unwrap();
}

/// Who is stopped twice has waited enough, and is told what to do.
#[test]
fn a_second_signal_ends_what_clears_up_behind_the_first() {
    if !can_mount() {
        return;
    }
    let dir = TempDir::new();
    let given = Given::of(&dir.path("backing"), 64 << 20);
    // In use by somebody whom the kernel does not name: it is waited for.
    let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    let held = open(&given.0, flags, Mode::empty()).unwrap();
    let run = dir.path("run");
    fs::create_dir(&run).unwrap();
    let mut command = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    command
        .args(["bench", "clear", "--stopped", "--device", &given.0])
        .arg(&run);
    let mut running = Running(command.stderr(Stdio::piped()).spawn().unwrap());
    // The first ones may be of those that stopped the run.
    for _ in 0..30 {
        thread::sleep(Duration::from_millis(100));
        if running.0.try_wait().unwrap().is_some() {
            break;
        }
        let _ = kill_process(Pid::from_child(&running.0), Signal::INT);
    }
    assert_eq!(running.0.wait().unwrap().code(), Some(130));
    let mut words = String::new();
    running
        .0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut words)
        .unwrap();
    let again = format!(
        "diskplane bench clear --device {} {}",
        given.0,
        run.display()
    );
    assert!(
        words.contains("stopped again") && words.contains(&again),
        "{words}"
    );
    drop(held);
    // What fails is laid to what it is of.
    fs::create_dir_all(run.join("work/thesis")).unwrap();
    let mut command = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    command
        .args(["bench", "clear", "--stopped", "--device", "/dev/null"])
        .arg(&run);
    let output = command.output().unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(
        words.contains("work: no run of diskplane made it"),
        "{words}"
    );
    assert!(
        words.contains("--device /dev/null: it is no block device"),
        "{words}"
    );
}
