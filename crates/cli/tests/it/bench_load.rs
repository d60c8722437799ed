//! `bench load` from outside: verify mode over a restart, job files, fio in our place, what is refused.

use crate::common;

use common::{binary, diskplane, failure, good, refused};
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};
use testkit::TempDir;

/// A server, killed when the test is over.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(dir: &Path) -> Server {
    let mut command = Command::new(binary());
    command
        .current_dir(dir)
        .args(["serve", "-f", "qcow2", "d.qcow2", "--vhost-user", "s"])
        .args(["--control", "c", "--cache", "writeback"])
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut ready = String::new();
    let out = child.stdout.take().unwrap();
    BufReader::new(out).read_line(&mut ready).unwrap();
    assert!(ready.starts_with("ready"), "{ready}");
    Server(child)
}

/// A server that is killed may lose what no flush has covered, and nothing else.
#[test]
fn a_restart_after_a_kill_is_verified() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    good(&dir, &["create", "-q", "-f", "qcow2", "d.qcow2", "8M"]);
    let load = |rw: &str, more: &[&str]| {
        let args = [
            "bench",
            "load",
            "--vhost-user",
            "s",
            "--verify",
            "--state",
            "st",
            "--rw",
            rw,
        ];
        let args = [&args[..], &["--range", "2M", "--depth", "8"], more].concat();
        diskplane(&dir, &args)
    };
    let server = serve(&dir);
    let first = load(
        "randwrite",
        &["--ios", "1000", "--flush", "7", "--control", "c"],
    );
    assert!(first.status.success(), "{first:?}");
    let text = String::from_utf8(first.stdout).unwrap();
    assert!(text.contains("verified: 1000 blocks written"), "{text}");
    assert!(text.contains("0 wrong, 0 stale, 0 torn"), "{text}");
    // All stages of the server's trace.
    assert!(
        text.contains("server's stages in µs") && text.contains("commit"),
        "{text}"
    );
    // SIGKILL.
    drop(server);
    let server = serve(&dir);
    let again = load("randread", &["--ios", "100", "--json"]);
    assert!(again.status.success(), "{again:?}");
    let answer: Value = serde_json::from_slice(&again.stdout).unwrap();
    let verify = &answer["report"]["verify"];
    assert!(verify["checked"].as_u64() > Some(100), "{verify}");
    assert_eq!(verify["faults"].as_array().map(Vec::len), Some(0));
    drop(server);
    // Somebody else's bytes on the disk.
    let lie = loop {
        let lie = Command::new("qemu-io")
            .current_dir(&dir)
            .args(["-f", "qcow2", "-c", "write -P 7 0 2M", "d.qcow2"])
            .output()
            .unwrap();
        // The kernel gives up what a killed io_uring held, its locks among it, when it gets to it.
        if !String::from_utf8_lossy(&lie.stderr).contains("Failed to get") {
            break lie;
        }
    };
    assert!(lie.status.success(), "{lie:?}");
    let _server = serve(&dir);
    let output = load("randread", &["--ios", "10"]);
    let error = failure(&["load"], &output, 1);
    assert!(error.contains("are not as they must be"), "{error}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("  wrong: at ") && text.contains("bytes that no load wrote is there"),
        "{text}"
    );
    assert!(text.contains("  and "), "{text}");
}

/// Sum of the generations that writes had begun, of the state at `path`: how many writes there were in all.
fn writes_begun(path: &Path) -> u64 {
    // Blocks begin at 64; of each 16 bytes the last 4 are its highest generation.
    let bytes = fs::read(path).unwrap_or_default();
    let blocks = bytes.get(64..).unwrap_or_default().chunks_exact(16);
    blocks
        .map(|block| {
            u64::from(u32::from_le_bytes([
                block[12], block[13], block[14], block[15],
            ]))
        })
        .sum()
}

/// `kill -9` of the load, of the server, and of both, with writes in flight: what is there afterwards is known to be right, and what
/// is changed behind their backs is not.
#[test]
fn a_killed_load_leaves_a_state_that_verifies() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    good(&dir, &["create", "-q", "-f", "qcow2", "d.qcow2", "8M"]);
    let state = dir.join("st");
    let common = ["bench", "load", "--vhost-user", "s", "--range", "2M"];
    let verify = ["--verify", "--state", "st", "--depth", "8"];
    let mut server = Some(serve(&dir));
    for (kill_load, kill_server, packed) in [
        (true, false, false),
        (true, true, false),
        (false, true, true),
        (true, false, true),
        (true, true, true),
    ] {
        let case = format!("load {kill_load}, server {kill_server}, packed {packed}");
        let packed: &[&str] = if packed { &["--packed"] } else { &[] };
        let mut load = Command::new(binary());
        load.current_dir(&dir)
            .args(common)
            .args(verify)
            .args(packed);
        load.args(["--rw", "randrw", "--flush", "5", "--seconds", "600"]);
        load.stdout(Stdio::null()).stderr(Stdio::null());
        let before = writes_begun(&state);
        let mut load = load.spawn().unwrap();
        while writes_begun(&state) < before + 300 {
            assert_eq!(load.try_wait().unwrap(), None, "{case}: it ended early");
            std::thread::yield_now();
        }
        if kill_load {
            load.kill().unwrap();
        }
        if kill_server {
            // SIGKILL.
            drop(server.take());
        }
        let status = load.wait().unwrap();
        assert!(!status.success(), "{case}: {status}");
        let _ = server.get_or_insert_with(|| serve(&dir));
        let args = [
            &common[..],
            &verify,
            packed,
            &["--rw", "randread", "--ios", "50", "--json"],
        ];
        let again = diskplane(&dir, &args.concat());
        assert!(again.status.success(), "{case}: {again:?}");
        let answer: Value = serde_json::from_slice(&again.stdout).unwrap();
        let found = &answer["report"]["verify"];
        let bad = ["wrong", "stale", "torn", "unread"].map(|kind| found[kind].as_u64());
        assert_eq!(bad, [Some(0); 4], "{case}");
        // All that had been written, and what the load itself read.
        assert!(found["checked"].as_u64() > Some(150), "{case}: {found}");
    }
    // Somebody else writes over all of it.
    let over = [
        &common[..],
        &["--rw", "write", "--bs", "64K", "--ios", "32"],
    ];
    good(&dir, &over.concat());
    let args = [&common[..], &verify, &["--rw", "randread", "--ios", "50"]];
    let changed = diskplane(&dir, &args.concat());
    assert!(!changed.status.success(), "{changed:?}");
    let text = String::from_utf8_lossy(&changed.stdout).into_owned();
    assert!(text.contains("  wrong: at "), "{text}");
}

#[test]
fn a_job_file_is_run_by_us_and_by_fio() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    fs::write(dir.join("disk"), vec![1; 1 << 20]).unwrap();
    let jobs = "[global]\nfilename=disk\nsize=512k\nbs=4k\nnorandommap\n[fill]\nrw=write\nfsync=8\n[check]\nstonewall\nrw=read\nnumjobs=2\n";
    fs::write(dir.join("jobs.fio"), jobs).unwrap();
    let counts = |text: &str| {
        let jobs: Value = serde_json::from_str(text).unwrap();
        let short = |job: &Value| {
            let of = |field: &str| job["report"][field].as_u64().unwrap();
            (
                job["name"].as_str().unwrap().to_owned(),
                of("reads"),
                of("writes"),
            )
        };
        jobs.as_array()
            .unwrap()
            .iter()
            .map(short)
            .collect::<Vec<_>>()
    };
    let ours = counts(&good(
        &dir,
        &["bench", "load", "--fio", "jobs.fio", "--json"],
    ));
    let expected = [("fill", 0, 128), ("check", 128, 0), ("check", 128, 0)];
    assert_eq!(
        ours,
        expected.map(|(name, reads, writes)| (name.to_owned(), reads, writes))
    );
    if Command::new("fio").arg("--version").output().is_ok() {
        let theirs = good(
            &dir,
            &[
                "bench", "load", "--fio", "jobs.fio", "--engine", "fio", "--json",
            ],
        );
        assert_eq!(counts(&theirs), ours);
        let args = [
            "bench",
            "load",
            "--file",
            "disk",
            "--engine",
            "fio",
            "--ios",
            "50",
            "--depth",
            "1",
            "--buffered",
        ];
        let text = good(&dir, &args);
        assert!(text.contains("reads") && text.contains("50"), "{text}");
    }
    let text = good(&dir, &["bench", "load", "--fio", "jobs.fio"]);
    assert!(
        text.contains("fill: write of 4 KiB") && text.contains("all jobs: 384 requests"),
        "{text}"
    );
    fs::write(dir.join("jobs.fio"), format!("{jobs}zonemode=zbd\n")).unwrap();
    let line = refused(&dir, &["bench", "load", "--fio", "jobs.fio"]);
    assert!(
        line.contains("jobs.fio, line 13: option 'zonemode' is not supported"),
        "{line}"
    );
    let args = ["bench", "load", "--fio", "jobs.fio", "--ignore-unknown"];
    let output = diskplane(&dir, &args);
    assert!(output.status.success(), "{output:?}");
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("was left out")
    );
}

#[test]
fn what_does_not_go_together_is_refused() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    fs::write(dir.join("disk"), vec![1; 1 << 20]).unwrap();
    for (args, says) in [
        (
            &["--file", "disk", "--think", "5"][..],
            "give --poll, or --depth 1",
        ),
        (&["--nbd", "unix:x", "--engine", "threads"], "give --file"),
        (&["--file", "disk", "--nbd", "unix:x"], "give one of"),
        (
            &[
                "--file",
                "disk",
                "--engine",
                "fio",
                "--verify",
                "--buffered",
            ],
            "of our own generators",
        ),
    ] {
        let line = refused(&dir, &[&["bench", "load"], args].concat());
        assert!(line.contains(says), "{line}");
    }
    let args = [
        "bench", "load", "--file", "disk", "--fio", "x", "--bs", "8K",
    ];
    failure(&args, &diskplane(&dir, &args), 1);
    // A slot that thinks for 2 ms makes no more than 500 requests a second.
    let args = [
        "bench",
        "load",
        "--file",
        "disk",
        "--buffered",
        "--depth",
        "1",
        "--ios",
        "40",
        "--think",
        "2000",
        "--json",
    ];
    let answer: Value = serde_json::from_str(&good(&dir, &args)).unwrap();
    assert_eq!(answer["report"]["reads"], 40);
    assert!(answer["report"]["iops"].as_f64() < Some(530.0), "{answer}");
}

#[test]
fn servers_that_say_nothing_are_waited_for_as_long_as_is_said() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    let load = |socket: &str| {
        let uri = format!("nbd+unix:///?socket={socket}");
        let args = [
            "--nbd-timeout",
            "1",
            "bench",
            "load",
            "--nbd",
            &uri,
            "--seconds",
            "0.1",
        ];
        refused(&dir, &args)
    };
    // One that takes connections, and one that takes requests too.
    let _mute = std::os::unix::net::UnixListener::bind(dir.join("mute")).unwrap();
    let words = load("mute");
    assert!(
        words.contains("connection 1 of 1: handshake: greeting: the server does not answer"),
        "{words}"
    );
    let mut nbdkit = Command::new("nbdkit");
    nbdkit
        .current_dir(&dir)
        .args(["--foreground", "--unix", "slow", "--pidfile", "pid"]);
    nbdkit.args(["--filter=delay", "null", "1M", "rdelay=1000"]);
    let Ok(child) = nbdkit.stdout(Stdio::null()).spawn() else {
        return eprintln!("not tested: nbdkit is not installed");
    };
    let _slow = Server(child);
    while !fs::read_to_string(dir.join("pid")).is_ok_and(|pid| pid.ends_with('\n')) {
        std::thread::yield_now();
    }
    let words = load("slow");
    let says =
        "none of 32 requests was answered for 1 s: a longer wait is allowed by --nbd-timeout";
    assert!(words.contains(says), "{words}");
}

#[test]
fn what_means_nothing_there_is_refused_and_what_failed_altogether_is_no_success() {
    let dir = TempDir::new();
    let dir = dir.path("").to_owned();
    fs::write(dir.join("f"), vec![0; 1 << 20]).unwrap();
    let file = ["bench", "load", "--file", "f", "--buffered", "--ios", "4"];
    for option in [
        &["--ring", "256"][..],
        &["--no-indirect"],
        &["--no-event-index"],
        &["--misalign", "2"],
        &["--packed"],
    ] {
        let args = [&file[..], option].concat();
        let words = failure(&args, &diskplane(&dir, &args), 1);
        assert!(words.contains("--vhost-user <SOCK>"), "{option:?}: {words}");
    }
    // A folder that is not there is not made.
    let words = refused(
        &dir,
        &[
            "bench",
            "ffsb",
            "--seconds",
            "0.1",
            "--size",
            "1M",
            "nowhere",
        ],
    );
    assert!(
        words.contains("nowhere: there is no such folder"),
        "{words}"
    );
    assert!(!dir.join("nowhere").exists());
    // Requests of it fail: all, or some.
    let nbdkit = Command::new("nbdkit").arg("--version").output();
    if nbdkit.is_err() {
        return eprintln!("not tested: nbdkit is not installed");
    }
    for (rate, ios, says) in [
        ("100%", "8", "8 of 8 requests failed"),
        ("50%", "64", " of 64 requests failed"),
    ] {
        let mut run = Command::new("nbdkit");
        let socket = format!("bad-{ios}");
        run.current_dir(&dir).args(["--unix", &socket]);
        run.args(["--filter=error", "null", "1M"]);
        run.arg(format!("error-rate={rate}"));
        let load = format!("bench load --nbd unix:{socket} --ios {ios} --depth 1");
        run.arg("--run")
            .arg(format!("{} {load}", binary().display()));
        let output = run.output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{output:?}");
        assert!(words.contains(says), "{words}");
        // What there is to say is said nevertheless.
        let report = String::from_utf8_lossy(&output.stdout);
        assert!(report.contains("requests FAILED"), "{report}");
    }
}
