//! `diskplane bench versus` from outside: what it prints and stores, and what it leaves behind.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};
use testkit::TempDir;

fn versus(dir: &Path, args: &[&str]) -> Command {
    let binary: PathBuf = testkit::diskplane(env!("CARGO_BIN_EXE_diskplane"));
    let mut command = Command::new(binary);
    command
        .args(["bench", "versus", "--quick", "--dir"])
        .arg(dir)
        .args(args);
    command
}

fn records(output: &Output, kind: &str) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect(line));
    lines.filter(|record| record["record"] == kind).collect()
}

/// What is left in the folder besides results and the lock.
fn leftovers(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().flatten().map(|e| e.path());
    let expected =
        |path: &PathBuf| path.extension().is_some_and(|e| e == "jsonl") || path.ends_with("lock");
    entries.filter(|path| !expected(path)).collect()
}

#[test]
fn a_small_run_has_every_sample_and_a_verdict() {
    let dir = TempDir::new();
    let args = [
        "--cell",
        "null",
        "--samples",
        "1",
        "--seconds",
        "0.2",
        "--json",
    ];
    let output = versus(dir.root(), &args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let run = records(&output, "run");
    assert_eq!((run.len(), &run[0]["schema"]), (1, &Value::from(3)));
    assert!(run[0]["host"]["kernel"].is_string() && run[0]["samples"] == 1);
    let samples = records(&output, "sample");
    let sides: Vec<_> = samples
        .iter()
        .map(|s| s["side"].as_str().unwrap())
        .collect();
    assert_eq!(sides, ["diskplane", "qsd"]);
    for sample in &samples {
        let report = &sample["detail"]["reports"][0];
        assert!(report["reads"].as_u64() > Some(0), "{sample}");
        assert_eq!(
            (&report["errors"], &report["writes"]),
            (&0.into(), &0.into())
        );
        assert!(sample["metrics"]["cpu-us"].as_f64() > Some(0.0), "{sample}");
        // All requests are in the histogram, and in the heat map.
        let latency = sample["latency"].as_array().unwrap();
        let in_all: u64 = latency.iter().filter_map(|bucket| bucket[1].as_u64()).sum();
        assert_eq!(Some(in_all), report["reads"].as_u64());
        let rows = sample["timeline"]["rows"].as_array().unwrap();
        let cells = rows.iter().flat_map(|row| row.as_array().unwrap());
        let in_time: u64 = cells.filter_map(|cell| cell[1].as_u64()).sum();
        assert_eq!(in_time, in_all);
    }
    let cells = records(&output, "cell");
    assert_eq!(cells.len(), 1);
    let judgements = cells[0]["judgements"].as_array().unwrap();
    assert_eq!(judgements.len(), 2);
    assert!(
        judgements
            .iter()
            .all(|j| j["figure"]["median"].as_f64() > Some(0.0))
    );
    assert_eq!(leftovers(dir.root()), [] as [PathBuf; 0]);
    // What was printed is what was stored.
    let results = fs::read_dir(dir.root())
        .unwrap()
        .flatten()
        .map(|e| e.path());
    let stored = results.filter(|p| p.extension().is_some_and(|e| e == "jsonl"));
    let stored: Vec<_> = stored.map(|path| fs::read(path).unwrap()).collect();
    assert_eq!(stored, [output.stdout]);
}

#[test]
fn commands_are_measured_beside_qemu_img() {
    let dir = TempDir::new();
    let args = ["--cell", "measure", "--samples", "1", "--json"];
    let output = versus(dir.root(), &args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let samples = records(&output, "sample");
    let sides: Vec<_> = samples
        .iter()
        .map(|s| s["side"].as_str().unwrap())
        .collect();
    assert_eq!(sides, ["diskplane", "qemu-img"]);
    for sample in &samples {
        let figure = |name: &str| sample["metrics"][name].as_f64().unwrap();
        assert!((figure("runs") * figure("elapsed-s") - 1.0).abs() < 1e-9);
        assert!(
            figure("cpu-s") > 0.0 && figure("peak-mib") > 1.0,
            "{sample}"
        );
        let command = sample["detail"]["command"].as_array().unwrap();
        assert_eq!(command[1], "measure");
    }
    let judgements = records(&output, "cell")[0]["judgements"].clone();
    let metrics: Vec<_> = judgements
        .as_array()
        .unwrap()
        .iter()
        .map(|j| j["metric"].clone())
        .collect();
    assert_eq!(metrics, ["runs", "cpu-s", "elapsed-s", "peak-mib"]);
    assert_eq!(leftovers(dir.root()), [] as [PathBuf; 0]);
}

#[test]
fn without_peers_it_says_so_and_goes_on() {
    let dir = TempDir::new();
    let page = dir.path("page.md");
    let args = [
        "--cell",
        "null",
        "--samples",
        "1",
        "--seconds",
        "0.1",
        "--markdown",
    ];
    let output = versus(dir.root(), &args)
        .arg(&page)
        .env("PATH", "")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("peer missing") && text.contains("qsd: not installed"),
        "{text}"
    );
    let page = fs::read_to_string(page).unwrap();
    assert!(
        page.contains("| `null` | IOPS |") && page.contains("peer missing"),
        "{page}"
    );
}

#[test]
fn what_there_is_can_be_listed_and_nothing_else_run() {
    let dir = TempDir::new();
    let output = versus(dir.root(), &["--list"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("grow-random") && text.contains("IOPS ≥ 5 of qsd's"),
        "{text}"
    );
    let output = versus(dir.root(), &["--cell", "nul"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        words.contains("there is no cell 'nul'; there are "),
        "{words}"
    );
    assert_eq!(leftovers(dir.root()), [] as [PathBuf; 0]);
}

/// Processes whose parent is `pid`.
fn children(pid: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let numbers = all.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|child| {
            // PID (NAME) STATE PARENT …; the name may hold anything.
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            rest.split(' ').nth(1) == Some(&pid.to_string())
        })
        .collect()
}

/// A run under way; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a run that takes long, and returns when a server of it serves an image.
fn started(dir: &Path) -> (Running, Vec<u32>) {
    // A flush after each write keeps the image small for longer than this test takes.
    let args = ["--cell", "flush-1", "--samples", "1", "--seconds", "100"];
    let run = Running(versus(dir, &args).stdout(Stdio::null()).spawn().unwrap());
    let image = dir.join("work").join("growing.qcow2");
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let servers = children(run.0.id());
        if image.exists() && dir.join("work").join("s0").exists() && !servers.is_empty() {
            return (run, servers);
        }
        assert!(Instant::now() < deadline, "no server");
        thread::sleep(Duration::from_millis(5));
    }
}

fn gone(pids: &[u32]) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while pids
        .iter()
        .any(|pid| Path::new(&format!("/proc/{pid}")).exists())
    {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

#[test]
fn stopping_leaves_no_process_and_no_file() {
    for signal in [Signal::INT, Signal::TERM] {
        let dir = TempDir::new();
        let (mut run, servers) = started(dir.root());
        kill_process(Pid::from_child(&run.0), signal).unwrap();
        assert_eq!(run.0.wait().unwrap().code(), Some(130));
        // They were waited for, so there is nothing to wait for here.
        for pid in &servers {
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} lives");
        }
        assert_eq!(leftovers(dir.root()), [] as [PathBuf; 0]);
    }
}

#[test]
fn a_killed_run_leaves_no_process_and_the_next_one_removes_its_files() {
    let dir = TempDir::new();
    let (mut run, servers) = started(dir.root());
    run.0.kill().unwrap();
    run.0.wait().unwrap();
    assert!(gone(&servers));
    assert!(!leftovers(dir.root()).is_empty());
    let args = ["--cell", "null", "--samples", "1", "--seconds", "0.1"];
    let output = versus(dir.root(), &args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(leftovers(dir.root()), [] as [PathBuf; 0]);
}
