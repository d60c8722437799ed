//! `diskplane bench compare` and `diskplane bench csv` from outside.

use serde_json::{Value, json};
use std::{path::Path, process::Command};
use testkit::TempDir;

fn bench(args: &[&str], paths: &[&Path]) -> (bool, String, String) {
    let mut command = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    let output = command
        .arg("bench")
        .args(args)
        .args(paths)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.success(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

fn record(path: &Path, iops: [f64; 4]) {
    let run =
        json!({ "record": "run", "schema": 2, "experiment": "versus", "host": { "kernel": "k" } });
    let mut text = format!("{run}\n");
    for (round, iops) in iops.iter().enumerate() {
        // A name that would clear a terminal.
        let sample = json!({
            "record": "sample", "cell": "null\u{1b}[2J", "side": "diskplane", "engine": "auto", "round": round,
            "metrics": { "iops": iops, "cpu-us": 2.0 }, "seen": null, "detail": {},
        });
        text.push_str(&format!("{sample}\n"));
    }
    std::fs::write(path, text).unwrap();
}

#[test]
fn breakdowns_that_were_measured_for_themselves_are_on_the_page() {
    let dir = TempDir::new();
    let (run, page, told) = (
        dir.path("run.jsonl"),
        dir.path("page.html"),
        dir.path("told.json"),
    );
    record(&run, [100.0, 101.0, 99.0, 100.0]);
    let mut breakdown = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    let short = [
        "--runs", "2", "-n", "20", "--drop", "2", "--json", "null:1M",
    ];
    let output = breakdown
        .args(["trace", "breakdown"])
        .args(short)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    std::fs::write(&told, &output.stdout).unwrap();
    let report = |told: &Path| {
        let of = ["report", "-q", "-o", page.to_str().unwrap(), "--breakdown"];
        bench(&of, &[told, &run])
    };
    let (good, _, words) = report(&told);
    assert!(good, "{words}");
    let text = std::fs::read_to_string(&page).unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    for part in answer["breakdown"]["parts"].as_array().unwrap() {
        let value = part["mean_ns"].as_f64().unwrap();
        let name = part["part"].as_str().unwrap();
        let shown = format!("data-breakdown=\"0\" data-part=\"{name}\" data-value=\"{value}\"");
        assert!(text.contains(&shown), "{shown}");
    }
    let head = "sequential reads of 4 KiB, one at a time over vhost-user";
    assert!(text.contains(head), "{text}");
    if let Some(seen) = testkit::chromium::look(&page) {
        seen.unwrap();
    }
    for (what, says) in [
        ("{}", "it is no answer of trace breakdown --json"),
        (
            &String::from_utf8_lossy(&output.stdout).replacen("mean_ns\": ", "mean_ns\": -", 1),
            "less than 0",
        ),
    ] {
        std::fs::write(&told, what).unwrap();
        let (good, _, words) = report(&told);
        assert!(!good && words.contains(says), "{words}");
    }
}

#[test]
fn runs_are_compared_and_made_tables() {
    let dir = TempDir::new();
    let (a, b) = (dir.path("versus-1.jsonl"), dir.path("b.jsonl"));
    record(&a, [100.0, 101.0, 99.0, 100.0]);
    record(&b, [201.0, 199.0, 200.0, 200.0]);
    let (good, text, _) = bench(&["compare"], &[dir.root(), &b]);
    assert!(good && text.contains("2.00 × ("), "{text}");
    assert!(
        text.contains("2 figures: 1 better, 0 worse, 1 without") && !text.contains('\u{1b}'),
        "{text}"
    );
    let (good, text, _) = bench(&["compare", "--json", "--figure", "iops"], &[&b, &a]);
    let value: Value = serde_json::from_str(&text).unwrap();
    assert!(good && value["lines"].as_array().unwrap().len() == 1);
    assert_eq!(value["lines"][0]["change"], "worse");
    let (good, text, _) = bench(&["csv"], &[&a]);
    assert!(
        good && text.starts_with("cell,side,engine,round,"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 5);

    let (good, _, words) = bench(&["compare", "--figure", "speed"], &[&a, &b]);
    assert!(!good && words.contains("'speed' is no figure"), "{words}");
    std::fs::write(&b, "{}\n{}\n").unwrap();
    let (good, _, words) = bench(&["compare"], &[&a, &b]);
    assert!(!good && words.contains("line 1 is no record"), "{words}");
}
