//! `diskplane bench run` from outside: its records, going on after an interruption, and what it leaves behind.

mod given;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use testkit::TempDir;

/// The shortest run that does something.
const ONE_CELL: &[&str] = &[
    "E3",
    "--cells",
    "read-1m",
    "--seconds",
    "0.02",
    "--samples",
    "1",
];

fn bench(dir: &Path, args: &[&str]) -> Command {
    on_disks_of("16M", dir, args)
}

fn on_disks_of(disk: &str, dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    command.args(["bench", "run"]).args(args);
    command.args(["--disk", disk, "--out"]).arg(dir);
    command
}

/// One short sample of each side of a cell; its samples, and nothing is left. Without any, it was no success.
fn cell(dir: &Path, experiment: &str, cell: &str, disk: &str) -> Vec<Value> {
    let args = ["--seconds", "0.1", "--samples", "1", "--cells", cell];
    let mut command = on_disks_of(disk, dir, &[&[experiment], &args[..]].concat());
    let output = command.output().unwrap();
    let samples = records(dir, "sample");
    assert_eq!(output.status.success(), !samples.is_empty(), "{output:?}");
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        words.contains("nothing could be measured: "),
        samples.is_empty(),
        "{words}"
    );
    assert_gone(dir);
    samples
}

/// Whether this machine lets us attach, mount and simulate; where not, that is said.
fn can_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    let lacks = |path: &&&str| !Path::new(path).exists();
    let nodes = ["/dev/loop-control", "/dev/fuse"];
    let missing = nodes.iter().find(lacks);
    if !root || missing.is_some() {
        eprintln!("NOT TESTED: this needs root, and {nodes:?}");
    }
    root && missing.is_none()
}

fn records(dir: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("records.jsonl")).unwrap_or_default();
    let lines = text.lines().filter(|line| line.ends_with('}'));
    let records = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter(|record| record["record"] == kind).collect()
}

fn sides(dir: &Path) -> Vec<String> {
    let samples = records(dir, "sample");
    let name = |sample: &Value| sample["side"].as_str().unwrap().to_owned();
    samples.iter().map(name).collect()
}

/// Nothing of a run is mounted or attached, no image is left.
#[track_caller]
fn assert_gone(dir: &Path) {
    assert!(!dir.join("work").exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()), "{mounts}");
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        assert!(!file.contains(dir.to_str().unwrap()), "{file}");
    }
}

const PATHS: [&str; 8] = [
    "bare metal",
    "diskplane raw",
    "diskplane qcow2",
    "diskplane raw, NBD",
    "qsd raw",
    "qsd qcow2",
    "qemu-nbd raw",
    "nbdkit raw, page cache",
];

#[test]
fn every_path_is_measured_in_turn_and_what_is_there_is_not_taken_again() {
    let dir = TempDir::new();
    let dir = dir.path("e3 out");
    let args = ["e3", "--cells", "read-64k", "--seconds", "0.05"];
    let run = |samples: &str| {
        let mut command = bench(&dir, &args);
        command.args(["--samples", samples]).output().unwrap()
    };
    // The first round, and one that a killed run had not finished writing.
    let output = run("1");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(sides(&dir), PATHS);
    let text = String::from_utf8_lossy(&output.stdout);
    // The summary counts findings of cells that nobody asked for, the page has them.
    assert!(
        text.contains("published findings: 12 not measured") && !text.contains("117 MB/s"),
        "{text}"
    );
    let page = fs::read_to_string(dir.join("report.html")).unwrap();
    assert!(page.contains("117 MB/s"));
    let path = dir.join("records.jsonl");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, [&whole[..], b"{\"record\":\"sample\",\"ce"].concat()).unwrap();

    let output = run("2");
    assert!(output.status.success(), "{output:?}");
    assert!(fs::read(&path).unwrap().starts_with(&whole));
    assert_eq!(sides(&dir), [PATHS, PATHS].concat());
    let samples = records(&dir, "sample");
    let rounds: Vec<_> = samples
        .iter()
        .map(|s| s["round"].as_u64().unwrap())
        .collect();
    assert_eq!(rounds, [[0; 8], [1; 8]].concat());
    for sample in &samples {
        let figure = |name: &str| sample["metrics"][name].as_f64().unwrap();
        let mb_s = figure("iops") * 65536.0 / 1e6;
        assert!((figure("mb-s") - mb_s).abs() < mb_s * 1e-3, "{sample}");
        assert!(figure("cpu-us") > 0.0 && figure("p9999-us") >= figure("p50-us"));
        let count: u64 = sample["latency"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|b| b[1].as_u64())
            .sum();
        // What ended behind a turn has a latency, and is not counted.
        let reads = sample["detail"]["reports"][0]["reads"].as_u64().unwrap();
        assert!((reads..=reads + 1).contains(&count), "{count} {reads}");
        let ours = sample["side"].as_str().unwrap().starts_with("diskplane");
        assert_eq!(
            sample["stages"]["read"]["sum_ns"]["device"].as_u64() > Some(0),
            ours,
            "{sample}"
        );
        assert_eq!(sample["axes"][1][1], "65536");
        // By the study's protocol, once.
        let broken = &sample["breakdown"];
        assert_eq!(broken.is_object(), ours && sample["round"] == 0, "{sample}");
        if broken.is_object() {
            let counts = ["runs", "requests", "dropped"].map(|name| broken[name].as_u64().unwrap());
            assert_eq!(counts, [10, 100, 10]);
            let parts = broken["parts"].as_array().unwrap();
            let sum: f64 = parts.iter().map(|p| p["mean_ns"].as_f64().unwrap()).sum();
            let total = broken["total_ns"].as_f64().unwrap();
            assert!(
                parts.len() == 10 && (sum - total).abs() < total * 1e-6,
                "{broken}"
            );
        }
    }
    assert_eq!(records(&dir, "run").len(), 2);
    let page = fs::read_to_string(dir.join("report.html")).unwrap();
    assert!(page.contains("data-side=\"diskplane qcow2\"") && page.ends_with("</html>\n"));
    // The same page of the same records, and its charts.
    let again = dir.join("again.html");
    let mut report = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    report
        .args(["bench", "report", "-q", "-o"])
        .arg(&again)
        .arg("--svg")
        .arg(dir.join("svg"));
    let output = report.arg(&dir).output().unwrap();
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{output:?}"
    );
    assert_eq!(fs::read_to_string(again).unwrap(), page);
    let chart = fs::read_to_string(dir.join("svg/percentiles-read-64k.svg")).unwrap();
    assert!(
        chart.starts_with("<svg ") && chart.contains("<style>"),
        "{chart}"
    );
    assert_gone(&dir);

    // Other options make other figures: they do not belong into the same file.
    let output = bench(&dir, &["E3", "--seconds", "0.06"]).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        words.contains("another --seconds: give another --out"),
        "{words}"
    );
    let output = bench(&dir, &["E3", "--cells", "nil"]).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("no cell of E3 is called 'nil'"), "{words}");
}

#[test]
fn factors_are_what_their_sides_say() {
    let dir = TempDir::new();
    // In flight on each queue, queues, packed, indirect, bytes behind a page.
    type Asked = (u64, u64, bool, bool, u64);
    let usual = |depth, queues| (depth, queues, false, true, 0);
    let cells: [(&str, &[(&str, Asked)]); 5] = [
        (
            "rings-null",
            &[
                ("diskplane split", usual(32, 1)),
                ("diskplane packed", (32, 1, true, true, 0)),
                ("diskplane packed, no indirect", (32, 1, true, false, 0)),
                ("qsd split, no indirect", (32, 1, false, false, 0)),
            ],
        ),
        (
            "rings-full",
            &[
                ("qsd, indirect", usual(128, 1)),
                ("diskplane, no indirect", (42, 1, false, false, 0)),
            ],
        ),
        (
            "queues",
            &[
                ("diskplane, 1 queue", usual(32, 1)),
                ("diskplane, 4 queues, a thread each", usual(8, 4)),
                ("qsd, 2 queues, one thread", usual(16, 2)),
            ],
        ),
        (
            "copy-4k",
            &[
                ("diskplane maps", usual(8, 1)),
                ("diskplane copies", (8, 1, false, true, 2)),
                ("diskplane, NBD (the kernel copies)", usual(8, 1)),
                ("qsd copies", (8, 1, false, true, 2)),
            ],
        ),
        (
            "vms-4",
            &[
                ("diskplane, a server each", usual(1, 1)),
                ("qsd, one server", usual(1, 1)),
            ],
        ),
    ];
    for (name, sides) in cells {
        let run = dir.path(name);
        let samples = cell(&run, "E3", name, "64M");
        assert_eq!(records(&run, "failure"), [] as [Value; 0], "{name}");
        for (side, asked) in sides {
            let sample = samples.iter().find(|s| s["side"] == *side);
            let sample = sample.unwrap_or_else(|| panic!("{name}: {side}"));
            let spec = &sample["detail"]["specs"][0];
            let of = |what: &str| spec[what].as_u64().unwrap();
            let is = |what: &str| spec[what] == true;
            let seen = (
                of("depth"),
                of("queues"),
                is("packed"),
                is("indirect"),
                of("misalign_bytes"),
            );
            assert_eq!(seen, *asked, "{name}: {side}");
            assert!(sample["metrics"]["iops"].as_f64() > Some(0.0), "{sample}");
        }
        if name == "vms-4" {
            let servers = |side: &str| {
                let sample = samples.iter().find(|s| s["side"] == side).unwrap();
                let specs = sample["detail"]["specs"].as_array().unwrap();
                let pids = specs.iter().map(|s| s["server_pids"][0].as_u64());
                let pids: std::collections::BTreeSet<_> = pids.collect();
                (specs.len(), pids.len())
            };
            assert_eq!(servers("diskplane, a server each"), (4, 4));
            assert_eq!(servers("diskplane, one server"), (4, 1));
        }
    }
    // A peer that is not there is named; all others are measured.
    let run = dir.path("null");
    let sides: Vec<_> = cell(&run, "E3", "null", "64M");
    let failed = records(&run, "failure");
    let spdk = failed.iter().all(|f| f["side"] == "spdk, spinning");
    assert!(spdk && sides.len() + failed.len() == 7, "{failed:?}");
    for side in ["nbdkit", "qsd, spinning", "diskplane, NBD"] {
        assert!(sides.iter().any(|s| s["side"] == side), "{side}");
    }
    // What the document proposes and nothing here has is said, with why.
    let page = fs::read_to_string(dir.path("copy-4k").join("report.html")).unwrap();
    assert!(page.contains("not here: persistent grants: "), "{page}");
}

#[test]
fn a_metadata_cache_is_bounded_as_its_row_says() {
    let dir = TempDir::new();
    let dir = dir.path("e0");
    let args = [
        "E0",
        "--cells",
        "ioping-write",
        "--seconds",
        "0.3",
        "--samples",
        "1",
    ];
    let output = bench(&dir, &args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(records(&dir, "failure"), [] as [Value; 0]);
    let samples = records(&dir, "sample");
    let command = |side: &str| {
        let sample = samples.iter().find(|s| s["side"] == side).unwrap();
        sample["detail"]["command"].to_string()
    };
    let f = command("qsd F");
    for part in [
        "l2-cache-size=8388608,l2-cache-entry-size=8192",
        "cache.direct=off,cache.no-flush=on",
    ] {
        assert!(f.contains(part), "{f}");
    }
    let g = command("diskplane G");
    assert!(g.contains("direct-unsafe") && g.contains("8388608"), "{g}");
    let auto = command("diskplane auto");
    assert!(!auto.contains("--metadata-cache"), "{auto}");
    // Servers that are told to drop flushes do; others do not. It is said.
    if can_mount() {
        let reached = |side: &str| {
            let sample = samples.iter().find(|s| s["side"] == side).unwrap();
            let flushes = &sample["seen"]["flushes"];
            assert_eq!(flushes["asked"], 16, "{sample}");
            flushes["reached"].as_u64().unwrap()
        };
        for side in ["diskplane F", "diskplane G", "qsd F", "qsd default"] {
            assert_eq!(reached(side), 0, "{side}");
        }
        for side in ["diskplane auto", "qsd auto", "diskplane buffer/flush"] {
            assert!(reached(side) >= 16, "{side}: {}", reached(side));
        }
        let words = String::from_utf8_lossy(&output.stderr);
        for says in [
            "ioping-write: equal are ",
            "flushes are dropped (none of 16 reached the file)",
            "qsd auto = diskplane auto: qcow2-falloc-1-0.img, O_DIRECT, 1 queue, flushes reach the file",
        ] {
            assert!(words.contains(says), "{says}: {words}");
        }
        let page = fs::read_to_string(dir.join("report.html")).unwrap();
        assert!(page.contains("flushes are dropped"));
    }
    // What was asked for is what was seen.
    for cell in records(&dir, "cell") {
        let notes = cell["notes"].as_array().unwrap();
        let says = |note: &&Value| {
            !note
                .as_str()
                .unwrap()
                .contains("a VHD image ends with its file")
        };
        assert_eq!(notes.iter().filter(says).count(), 0, "{cell}");
    }
    assert_gone(&dir);
}

#[test]
fn a_simulated_disk_is_a_device_and_nfs_says_why_it_is_not_there() {
    if !can_mount() {
        return;
    }
    let dir = TempDir::new();
    let (bare, system) = (dir.path("bare"), dir.path("system"));
    let samples = cell(&bare, "E1", "randread-raw-hdd", "16M");
    assert_eq!(records(&bare, "failure"), [] as [Value; 0]);
    assert_eq!(samples.len(), 7);
    for sample in &samples {
        assert_eq!(sample["seen"]["files"][0], "disk", "{sample}");
        assert_eq!(sample["seen"]["bytes"][0], 16 << 20, "{sample}");
        assert_eq!(sample["seen"]["direct"], true, "{sample}");
    }
    // With a file system, and sixteen machines with a server each.
    let samples = cell(&system, "E1", "randwrite-raw-hdd-ext4-16vms", "256M");
    assert_eq!(records(&system, "failure"), [] as [Value; 0]);
    assert_eq!(samples.len(), 7);
    for sample in &samples {
        let reports = sample["detail"]["reports"].as_array().unwrap();
        assert_eq!(reports.len(), 16, "{sample}");
        let specs = sample["detail"]["specs"].as_array().unwrap();
        let pids: std::collections::BTreeSet<_> = specs
            .iter()
            .map(|spec| spec["server_pids"][0].as_u64())
            .collect();
        assert_eq!(pids.len(), 16, "{sample}");
    }
    let nfs = dir.path("nfs");
    assert_eq!(cell(&nfs, "E1", "read-raw-nfs-xfs", "16M").len(), 0);
    let failures = records(&nfs, "failure");
    assert_eq!(failures.len(), 7);
    let why = failures[0]["why"].as_str().unwrap();
    assert!(why.starts_with("not here: "), "{why}");
}

#[test]
fn file_systems_on_disks_are_loaded() {
    let nbdfuse = Command::new("nbdfuse").arg("--version").output();
    if !can_mount() || nbdfuse.is_err() {
        return;
    }
    let dir = TempDir::new();
    for (n, (name, sides)) in [
        ("random-writes-1-growing", 8),
        ("mail-server-8-backing", 7),
        ("seq-reads-256k-1-full", 7),
        ("toggle-barriers", 4),
    ]
    .into_iter()
    .enumerate()
    {
        let run = dir.path(n.to_string());
        let samples = cell(&run, "E2", name, "128M");
        assert_eq!(records(&run, "failure"), [] as [Value; 0], "{name}");
        assert_eq!(samples.len(), sides, "{name}");
        for sample in &samples {
            assert!(sample["metrics"]["mb-s"].as_f64() > Some(0.0), "{sample}");
            assert!(sample["detail"]["files"].is_object(), "{sample}");
            let spec = &sample["detail"]["specs"][0];
            let of_state = (name.contains("growing"), name.contains("backing"));
            let seen = (spec["sparse"] == true, spec["pristine"] == true);
            // Raw disks have no overlays.
            let seen = match sample["side"].as_str() {
                Some("bare metal" | "qemu raw" | "diskplane raw") => (seen.0, of_state.1),
                _ => seen,
            };
            assert_eq!(seen, of_state, "{sample}");
            // What requests of our server spend in its stages.
            let ours = sample["side"].as_str().unwrap().starts_with("diskplane");
            assert_eq!(sample["stages"].is_object(), ours, "{sample}");
            // Bare metal has no server.
            let served = sample["side"] != "bare metal";
            assert_eq!(
                sample["seen"]["direct"].as_bool(),
                served.then_some(true),
                "{sample}"
            );
        }
    }
}

/// A run under way; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a run that has a file system on a loop device, and returns when a server of it serves an image there.
fn started(dir: &Path) -> Running {
    let args = [
        "E1",
        "--cells",
        "write-qcow2-ext4",
        "--seconds",
        "100",
        "--samples",
        "1",
    ];
    let mut command = bench(dir, &args);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut run = Running(command.spawn().unwrap());
    let deadline = Instant::now() + Duration::from_secs(120);
    let served = || {
        let ready = fs::read_to_string(dir.join("work/ready.pid")).unwrap_or_default();
        ready.ends_with('\n') && dir.join("work/ext4/lost+found").exists()
    };
    while !served() {
        assert!(run.0.try_wait().unwrap().is_none(), "it ended");
        assert!(Instant::now() < deadline, "no server");
        thread::sleep(Duration::from_millis(5));
    }
    run
}

#[test]
fn what_a_run_did_not_make_is_not_removed() {
    let dir = TempDir::new();
    let run = dir.path("run");
    let thesis = run.join("work/thesis");
    fs::create_dir_all(thesis.parent().unwrap()).unwrap();
    fs::write(&thesis, "42").unwrap();
    let output = bench(&run, ONE_CELL).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{output:?}");
    assert!(
        words.contains("work: no run of diskplane made it"),
        "{words}"
    );
    assert_eq!(fs::read_to_string(&thesis).unwrap(), "42");
}

/// What a run that goes on lacks fails again, whole: it says so, and that there is more than that.
#[test]
fn a_run_that_measures_nothing_of_what_lacked_has_failed() {
    let dir = TempDir::new();
    let run = dir.path("run");
    let args = [
        "E3",
        "--cells",
        "null",
        "--samples",
        "1",
        "--seconds",
        "0.1",
    ];
    let go = |path: &str| bench(&run, &args).env("PATH", path).output().unwrap();
    let path = std::env::var("PATH").unwrap();
    // Of all servers ours alone are there.
    let first = go("/nonexistent");
    assert!(first.status.success(), "{first:?}");
    let before = records(&run, "sample").len();
    assert_eq!(before, 3, "{first:?}");
    let second = go("/nonexistent");
    let words = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{words}");
    assert!(
        words.contains("nothing could be measured of what lacked: null, "),
        "{words}"
    );
    // Where one of them is there by then, that is no failure.
    let third = go(&path);
    let words = String::from_utf8_lossy(&third.stderr);
    let more = records(&run, "sample").len() > before;
    assert_eq!(third.status.success(), more, "{words}");
    assert_gone(&run);
}

/// A cell that takes turns and one that does not, stopped and killed in between: every sample is there once.
#[test]
fn what_was_interrupted_goes_on_and_has_every_sample_once() {
    let dir = TempDir::new();
    let run = dir.path("run");
    let args = [
        "E3",
        "--cells",
        "*r*-4k",
        "--seconds",
        "0.2",
        "--samples",
        "2",
    ];
    let key = |sample: &Value| {
        let of = |name: &str| sample[name].to_string();
        [of("cell"), of("side"), of("round")]
    };
    for (signal, at_least) in [(Signal::INT, 2), (Signal::KILL, 9), (Signal::KILL, 16)] {
        let mut command = bench(&run, &args);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut running = Running(command.spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(120);
        while records(&run, "sample").len() < at_least {
            assert!(running.0.try_wait().unwrap().is_none(), "it ended");
            assert!(Instant::now() < deadline, "no samples");
            thread::sleep(Duration::from_millis(5));
        }
        kill_process(Pid::from_child(&running.0), signal).unwrap();
        running.0.wait().unwrap();
    }
    // Reads, reads at random, writes: eight sides, twice. What a busy machine made fail is tried again by the next run.
    let all = 3 * 8 * 2;
    for n in 0..3 {
        let output = bench(&run, &args).output().unwrap();
        // One that takes no sample of those that are lacking has failed.
        let whole = records(&run, "sample").len() >= all;
        assert!(output.status.success() || !whole, "{output:?}");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains("resumed: "), "{words}");
        assert_eq!(
            words.contains("run that was killed had left"),
            n == 0,
            "{words}"
        );
        if whole {
            break;
        }
    }
    let samples = records(&run, "sample");
    let once: std::collections::BTreeSet<_> = samples.iter().map(key).collect();
    let failures = records(&run, "failure");
    assert_eq!((samples.len(), once.len()), (all, all), "{failures:?}");
    for sample in &samples {
        let reads = sample["cell"].as_str().unwrap().contains("read");
        assert_eq!(sample["in_turns"] == true, reads, "{sample}");
        assert!(
            sample["interrupts"].as_object().unwrap().len() > 1,
            "{sample}"
        );
    }
    assert_gone(&run);
}

#[test]
fn stopped_or_killed_nothing_stays_mounted() {
    if !can_mount() {
        return;
    }
    let dir = TempDir::new();
    let stopped = dir.path("stopped");
    let mut run = started(&stopped);
    kill_process(Pid::from_child(&run.0), Signal::INT).unwrap();
    assert_eq!(run.0.wait().unwrap().code(), Some(130));
    assert_gone(&stopped);

    let killed = dir.path("killed");
    let mut run = started(&killed);
    run.0.kill().unwrap();
    run.0.wait().unwrap();
    assert!(killed.join("work/ext4/lost+found").exists());
    // The next run finds it, does its own, and leaves nothing.
    let output = bench(&killed, ONE_CELL).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("another experiment"), "{words}");
    fs::remove_file(killed.join("records.jsonl")).unwrap();
    let output = bench(&killed, ONE_CELL).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_gone(&killed);
}
