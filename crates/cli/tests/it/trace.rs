//! `diskplane trace` on a running server, and by its own protocol.

use bench::driver::{IN, Machine, OUT, Setup};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use testkit::{Serve, TempDir};

fn binary() -> PathBuf {
    testkit::diskplane(env!("CARGO_BIN_EXE_diskplane"))
}

/// What a command of `trace` prints; it must succeed.
#[track_caller]
fn trace(args: &[&str]) -> String {
    let output = Command::new(binary())
        .arg("trace")
        .args(args)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn refused(args: &[&str]) -> String {
    let output = Command::new(binary())
        .arg("trace")
        .args(args)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_running_server_is_looked_at() {
    let dir = TempDir::new();
    let (image, socket, control) = (dir.path("disk.raw"), dir.path("vhost"), dir.path("control"));
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let server = Serve::new(binary(), &image)
        .format("raw")
        .vhost_user(&socket)
        .arg("--control")
        .arg(&control)
        .start();
    let mut vm = Machine::start(&socket, Setup::default()).unwrap();
    for n in 0..30 {
        let (kind, out, wanted) = match n % 3 {
            0 => (OUT, vec![3; 512], 0),
            _ => (IN, Vec::new(), 1024),
        };
        assert_eq!(vm.request(0, kind, n, &out, wanted).0, 0);
    }
    let control = path(&control);
    let on = |what: &'static str| {
        move |rest: &[&str]| trace(&[&[what, "--control", control], rest].concat())
    };
    // The last one is noted after it was answered.
    let dump = on("dump");
    let lines: Vec<Value> = loop {
        let text = dump(&["--disk", "0", "--queue", "0"]);
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        if lines.len() == 30 {
            break lines;
        }
    };
    for (n, line) in lines.iter().enumerate() {
        assert_eq!(
            (line["number"].as_u64(), line["disk"].as_u64()),
            (Some(n as u64), Some(0))
        );
        assert_eq!(line["offset"], n as u64 * 512);
        assert_eq!(line["operation"], if n % 3 == 0 { "write" } else { "read" });
        assert_eq!(line["status"], "ok");
        assert!(line["stages_ns"]["device"].as_u64().unwrap() > 0, "{line}");
    }
    assert_eq!(dump(&["-n", "4"]).lines().count(), 4);
    let slowest = on("slowest");
    let all: Value = serde_json::from_str(&slowest(&["-n", "5", "--json"])).unwrap();
    let recent: Value = serde_json::from_str(&slowest(&["-n", "5", "--json", "--recent"])).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 5);
    assert_eq!(all, recent);
    let table = slowest(&["-n", "2"]);
    assert_eq!(table.lines().count(), 1 + 2 + 1, "{table}");
    let histogram = on("histogram");
    let all: Value = serde_json::from_str(&histogram(&["--json"])).unwrap();
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 2 * 9);
    let sum = |operation: &str, whole: bool| -> u64 {
        let of = all
            .iter()
            .filter(|one| one["operation"] == operation && one["stage"].is_null() == whole);
        of.map(|one| one["sum_ns"].as_u64().unwrap()).sum()
    };
    assert_eq!(sum("read", true), sum("read", false));
    assert!(histogram(&[]).contains("read × 20"));

    let file = dir.path("trace.json");
    on("perfetto")(&[path(&file)]);
    let document: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let events = document["traceEvents"].as_array().unwrap();
    let requests = events.iter().filter(|event| event["cat"] == "request");
    assert_eq!(requests.count(), 30);
    refused(&["perfetto", "--control", control, path(&file)]);

    let watch = on("watch")(&["--interval", "0.01", "--count", "2"]);
    assert_eq!(watch.lines().count(), 4, "{watch}");
    // Requests to come: none do.
    let none = ["breakdown", "--control", control, "--wait", "0.01"];
    assert!(refused(&none).contains("0 of 100 requests"));
    let asker = std::thread::spawn({
        let control = control.to_owned();
        move || {
            let args = [
                "breakdown",
                "--control",
                &control,
                "-n",
                "10",
                "--drop",
                "1",
                "--rw",
                "read",
                "--json",
            ];
            trace(&args)
        }
    });
    while !asker.is_finished() {
        vm.request(0, IN, 7, &[], 512);
    }
    let answer: Value = serde_json::from_str(&asker.join().unwrap()).unwrap();
    assert_eq!(answer["breakdown"]["requests"], 10);
    assert_eq!(answer["breakdown"]["parts"].as_array().unwrap().len(), 8);

    // Who goes on as long as somebody reads ends when nobody does (`… | head -1`).
    for endless in [&["dump", "--follow"][..], &["watch", "--interval", "0.01"]] {
        let mut command = Command::new(binary());
        command.arg("trace").args(endless);
        command.args(["--control", control]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(!line.is_empty(), "{endless:?}");
        let status = loop {
            vm.request(0, IN, 7, &[], 512);
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
        };
        assert!(status.success(), "{endless:?}: {status}");
    }

    for wrong in [
        &["dump", "--control", control, "--disk", "1"][..],
        &["dump", "--control", control, "--disk", "0", "--queue", "9"],
        &["dump", "--control", path(&image)],
        &["watch", "--control", control, "--interval", "0"],
    ] {
        refused(wrong);
    }
    drop(vm);
    server.stop();
    assert!(!Path::new(control).exists());
}

#[test]
fn an_image_is_broken_down() {
    let dir = TempDir::new();
    let image = dir.path("disk.raw");
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    for (over, rw) in [
        ("vhost-user", "read"),
        ("vhost-user", "flush"),
        ("nbd", "randwrite"),
    ] {
        let args = [
            "breakdown",
            "-f",
            "raw",
            "--over",
            over,
            "--rw",
            rw,
            "--runs",
            "2",
            "-n",
            "20",
            "--drop",
            "2",
            "--cache",
            "writeback",
            "--json",
            path(&image),
        ];
        let answer: Value = serde_json::from_str(&trace(&args)).unwrap();
        let breakdown = &answer["breakdown"];
        assert_eq!(
            (&breakdown["runs"], &breakdown["requests"]),
            (&2.into(), &20.into())
        );
        let parts = breakdown["parts"].as_array().unwrap();
        let names: Vec<&str> = parts
            .iter()
            .map(|part| part["part"].as_str().unwrap())
            .collect();
        let all = [
            "kick", "ring", "parse", "map", "submit", "device", "commit", "complete", "notify",
            "return",
        ];
        assert_eq!(names, all);
        // The parts are all of the client's time.
        let sum: f64 = parts
            .iter()
            .map(|part| part["mean_ns"].as_f64().unwrap())
            .sum();
        let total = breakdown["total_ns"].as_f64().unwrap();
        assert!((sum - total).abs() < 1.0 && total > 0.0, "{answer}");
        let busy = if rw == "flush" { "commit" } else { "device" };
        let of = parts.iter().find(|part| part["part"] == busy).unwrap();
        assert!(of["mean_ns"].as_f64().unwrap() > 0.0, "{answer}");
    }
    let table = trace(&[
        "breakdown",
        "--runs",
        "1",
        "-n",
        "5",
        "--drop",
        "0",
        "null:1M",
    ]);
    assert!(
        table.starts_with("null:1M: sequential reads of 4 KiB"),
        "{table}"
    );
    assert_eq!(table.lines().count(), 1 + 1 + 10 + 1, "{table}");
    for wrong in [
        &["-n", "20", "null:1M"][..],
        &["--bs", "100", "null:1M"],
        &["--bs", "2M", "null:1M"],
        &["nowhere"],
        &[],
    ] {
        refused(&[&["breakdown"], wrong].concat());
    }
}

#[test]
fn who_is_stopped_leaves_no_folder() {
    let dir = TempDir::new();
    let temporary = dir.path("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let there = || std::fs::read_dir(&temporary).unwrap().flatten().next();
    for signal in [Signal::INT, Signal::TERM] {
        let mut command = Command::new(binary());
        command.args(["trace", "breakdown", "--runs", "1000000", "null:1M"]);
        command.env("TMPDIR", &temporary);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        while there().is_none() {
            assert!(child.try_wait().unwrap().is_none(), "it ended");
            std::thread::yield_now();
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains("stopped by a signal"), "{words}");
        assert!(there().is_none(), "{:?}", there());
    }
}

/// The tracepoints are in the program, as the linker left them.
#[test]
fn probes_are_there() {
    let output = Command::new("readelf").arg("-n").arg(binary()).output();
    let output = output.expect("readelf, of binutils");
    let text = String::from_utf8_lossy(&output.stdout);
    // A name is followed by its places and its arguments, each with its size.
    let mut found: Vec<(&str, usize)> = Vec::new();
    let mut lines = text.lines().map(str::trim);
    while lines.by_ref().any(|line| line == "Provider: diskplane") {
        let mut of = |what| lines.by_ref().find_map(|line| line.strip_prefix(what));
        let name = of("Name: ").unwrap();
        let arguments = of("Arguments: ").unwrap();
        found.push((name, arguments.split("@").count() - 1));
    }
    found.sort_unstable();
    found.dedup();
    // As the documentation of the crate `trace` has them.
    let all = [
        ("completed", 3),
        ("device_done", 2),
        ("kicked", 1),
        ("mapped", 2),
        ("notified", 5),
        ("parsed", 5),
        ("submitted", 2),
        ("taken", 3),
    ];
    assert_eq!(found, all);
}

#[test]
fn who_names_a_socket_as_an_image_is_told_how_to_ask_it() {
    let dir = TempDir::new();
    let _listener = std::os::unix::net::UnixListener::bind(dir.path("s")).unwrap();
    let line = crate::common::refused(&dir.path(""), &["trace", "breakdown", "s"]);
    assert!(line.contains("--control s"), "{line}");
}
