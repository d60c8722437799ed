//! An experiment's cells in a guest, as a user runs them. Six guests a cell boot one after the other, which takes minutes under
//! emulation: `make soak ARGS=guest` runs it, and `make test` does not. It needs `make setup`.

use serde_json::Value;
use std::process::Command;
use testkit::{TempDir, command};

/// An experiment's cells in a guest: what the guest says of its load and its kernel is in the records, beside what servers and
/// QEMU used.
#[test]
fn an_experiment_runs_in_a_guest() {
    runs("guest-random-reads-16");
}

/// The same by fio, on the disk as it is.
#[test]
fn fio_runs_in_a_guest() {
    for sample in runs("guest-fio-randread") {
        let report = &sample["detail"]["reports"][0];
        assert!(
            report["reads"].as_u64() > Some(0) && report["writes"] == 0,
            "{sample}"
        );
        let spec = &sample["detail"]["specs"][0];
        assert_eq!(
            (&spec["depth"], &spec["block_bytes"]),
            (&32.into(), &4096.into())
        );
        // Boot is not part of it.
        let seconds = report["seconds"].as_f64().unwrap();
        assert!((0.9..3.0).contains(&seconds), "{sample}");
    }
}

/// Runs a cell, and looks at what all of them have; its samples.
fn runs(cell: &str) -> Vec<Value> {
    let dir = TempDir::new();
    let out = dir.path("run");
    let mut bench = Command::new(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")));
    bench.args(["bench", "run", "E2", "--cells", cell]);
    bench.args(["--samples", "1", "--seconds", "1", "--disk", "128M"]);
    bench
        .arg("--guest")
        .arg(testkit::guest_folder())
        .arg("--out")
        .arg(&out);
    command::run(&mut bench);
    let text = std::fs::read_to_string(out.join("records.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let records: Vec<Value> = records.collect();
    let of = |kind: &str| -> Vec<Value> {
        let own = records.iter().filter(|r| r["record"] == kind);
        own.cloned().collect()
    };
    assert_eq!(of("failure"), [] as [Value; 0]);
    let samples = of("sample");
    assert_eq!(samples.len(), 6);
    for sample in &samples {
        let side = sample["side"].as_str().unwrap();
        let figure = |name: &str| sample["metrics"][name].as_f64();
        for name in [
            "iops",
            "guest-percent",
            "emulator-percent",
            "guest-interrupts",
        ] {
            assert!(figure(name) > Some(0.0), "{name}: {sample}");
        }
        // The disk's own line in the guest, and the machine's beside it.
        let source = if side.starts_with("ide") {
            "ata_piix"
        } else {
            "virtio"
        };
        let inside = sample["guest_interrupts"].as_object().unwrap();
        assert!(inside.keys().any(|name| name.contains(source)), "{sample}");
        assert!(
            !sample["interrupts"].as_object().unwrap().is_empty(),
            "{sample}"
        );
        // Ours says where the time went; a server has CPU of its own.
        assert_eq!(
            sample["stages"]["read"].is_object(),
            side.ends_with("diskplane"),
            "{sample}"
        );
        assert_eq!(
            figure("cpu-us").is_some(),
            !side.ends_with("qemu"),
            "{sample}"
        );
        assert!(
            !sample["latency"].as_array().unwrap().is_empty(),
            "{sample}"
        );
    }
    assert!(!out.join("work").exists());
    samples
}
