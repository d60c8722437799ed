//! Checks and sizes of QED images beside QEMU's, on images that it made and that were damaged then.

use crate::common;

use block::{ErrorKind, Storage};
use common::{Rng, Verdict, open, verdict};
use image::qed::{F_NEED_CHECK, Header};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use testkit::{TempDir, qemu};
use tool::check::{CheckOptions, Repair, Report, qed};

const CLUSTER: u64 = 4096;

/// An image with tables of `table` clusters, written to here and there by QEMU, over several L2 tables.
fn written(path: &Path, table: u64) {
    let options = format!("cluster_size={CLUSTER},table_size={table}");
    let reach = (table * CLUSTER / 8) * CLUSTER;
    qemu::create_with("qed", path, &(3 * reach).to_string(), &options);
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qed"]);
    for at in [
        0,
        20_000,
        reach - 4096,
        reach + 65536,
        2 * reach + 1_000_000,
    ] {
        command.args(["-c", &format!("write -P 9 {} 12k", at / 512 * 512)]);
    }
    assert!(
        command
            .arg(path)
            .output()
            .expect("qemu-io")
            .status
            .success()
    );
}

fn check(path: &Path, repair: Repair) -> block::Result<Report> {
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    qed::check(&*open(path), &options)
}

/// What QEMU says; `None` where it cannot open the image.
fn theirs(path: &Path, repair: &[&str]) -> Option<Verdict> {
    let mut command = Command::new("qemu-img");
    command.args(["check", "-f", "qed", "--output=json"]);
    let output = command.args(repair).arg(path).output().expect("qemu-img");
    let json: Value = serde_json::from_slice(&output.stdout).ok()?;
    let number = |name: &str| json.get(name).and_then(Value::as_u64).unwrap_or(0);
    Some(Verdict {
        status: output.status.code()?,
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        corruptions_fixed: number("corruptions-fixed"),
        leaks_fixed: number("leaks-fixed"),
        facts: [
            0,
            number("total-clusters"),
            number("allocated-clusters"),
            number("fragmented-clusters"),
            0,
        ],
        messages: String::new(),
    })
}

/// Ours, as far as QEMU says it.
fn ours(report: &Report) -> Verdict {
    let mut verdict = verdict(report);
    verdict.facts[0] = 0;
    verdict
}

/// Where entries that are in use lie in the file.
fn entries(bytes: &[u8], header: &Header) -> (Vec<usize>, Vec<usize>) {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let used = |table: u64| {
        let end = table + header.table_bytes();
        let all = (table as usize..end as usize).step_by(8);
        all.filter(|at| word(*at) != 0).collect::<Vec<_>>()
    };
    let l1 = used(header.l1_table_offset);
    let l2 = l1.iter().flat_map(|at| used(word(*at))).collect();
    (l1, l2)
}

/// Sound images and damaged ones: the same numbers and the same exit status, and after a repair too.
#[test]
fn numbers_are_those_of_qemu() {
    let dir = TempDir::new();
    let (path, mine) = (dir.path("a.qed"), dir.path("mine.qed"));
    let mut rng = Rng::new(3);
    let mut seen = [0; 4];
    for table in [2, 8] {
        written(&path, table);
        let sound = fs::read(&path).unwrap();
        let header = Header::read(&*open(&path)).unwrap();
        let (l1, l2) = entries(&sound, &header);
        assert_eq!((l1.len(), l2.len() > 12), (3, true));
        let len = sound.len() as u64;
        for round in 0..14 {
            let mut bytes = sound.clone();
            // The first is sound, the second leaks.
            if round == 1 {
                bytes.resize(sound.len() + 3 * CLUSTER as usize, 7);
            }
            for _ in 0..round / 2 {
                let table_entry = rng.below(8) == 0;
                let among = if table_entry { &l1 } else { &l2 };
                let at = among[rng.below(among.len() as u64) as usize];
                let other = l2[rng.below(l2.len() as u64) as usize];
                let twin = u64::from_le_bytes(sound[other..other + 8].try_into().unwrap());
                let value = match rng.below(8) {
                    0 => 0,
                    1 if !table_entry => 1,
                    2 => len + CLUSTER * rng.below(3),
                    3 => CLUSTER * rng.below(4),
                    4 => twin + 512,
                    5 => u64::MAX - rng.below(5000),
                    6 if !table_entry => header.l1_table_offset,
                    _ if table_entry => len - CLUSTER,
                    _ => twin,
                };
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            fs::write(&path, &bytes).unwrap();
            let report = check(&path, Repair::No).unwrap();
            assert!(fs::read(&path).unwrap() == bytes, "a check writes nothing");
            let said = theirs(&path, &[]).expect("QEMU opens it");
            let what = format!("table {table}, round {round}: {:?}", report.findings);
            assert_eq!(ours(&report), said, "{what}");
            seen[said.status as usize] += 1;
            // A repair.
            fs::write(&mine, &bytes).unwrap();
            let repaired = check(&mine, Repair::All).unwrap();
            let said = theirs(&path, &["-r", "all"]).expect("QEMU opens it");
            assert_eq!(repaired.corruptions_fixed, said.corruptions_fixed, "{what}");
            assert_eq!(repaired.corruptions, said.corruptions, "{what}");
            assert_eq!(repaired.leaks + repaired.leaks_fixed, said.leaks, "{what}");
            let (a, b) = (fs::read(&mine).unwrap(), fs::read(&path).unwrap());
            assert!(
                b.starts_with(&a),
                "but for the tail, they wrote the same: {what}"
            );
            let again = check(&mine, Repair::No).unwrap();
            assert_eq!(again.corruptions, repaired.corruptions, "{what}");
            assert_eq!(again.leaks, repaired.leaks, "{what}");
        }
    }
    assert!(seen[0] > 1 && seen[2] > 5 && seen[3] > 1, "{seen:?}");
}

/// The need-check bit goes when nothing is wrong, and stays when something is.
#[test]
fn the_need_check_bit_is_cleared_by_a_repair_only() {
    let dir = TempDir::new();
    let path = dir.path("a.qed");
    written(&path, 2);
    let bit = |path: &Path| Header::read(&*open(path)).unwrap().needs_check();
    let set = |path: &Path| {
        open(path)
            .write_at(16, &F_NEED_CHECK.to_le_bytes())
            .unwrap()
    };
    assert!(qed::mend(&*open(&path)).unwrap().is_none());
    set(&path);
    check(&path, Repair::No).unwrap();
    assert!(bit(&path));
    check(&path, Repair::Leaks).unwrap();
    assert!(bit(&path));
    assert!(qed::mend(&*open(&path)).unwrap().is_some());
    assert!(!bit(&path));
    qemu::check("qed", &path);
    // Two entries for one cluster: nobody can tell whose it is.
    let bytes = fs::read(&path).unwrap();
    let (_, l2) = entries(&bytes, &Header::read(&*open(&path)).unwrap());
    open(&path)
        .write_at(l2[1] as u64, &bytes[l2[0]..l2[0] + 8])
        .unwrap();
    set(&path);
    let error = qed::mend(&*open(&path)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(bit(&path));
    // Entries that lead nowhere are emptied, as QEMU does before it writes.
    open(&path).write_at(l2[1] as u64, &[0xff; 8]).unwrap();
    let report = qed::mend(&*open(&path)).unwrap().unwrap();
    assert_eq!(report.corruptions_fixed, 1);
    assert!(!bit(&path));
}

/// More clusters than the budget has bits for: refused with what to do.
#[test]
fn memory_is_bounded_by_the_budget() {
    let dir = TempDir::new();
    let path = dir.path("a.qed");
    qemu::create_with("qed", &path, "512M", "cluster_size=4096,table_size=16");
    let header = Header::read(&*open(&path)).unwrap();
    // Three clusters, each far from the others, in a file of holes.
    let l2 = open(&path).len().unwrap();
    open(&path).set_len(1 << 31).unwrap();
    open(&path)
        .write_at(header.l1_table_offset, &l2.to_le_bytes())
        .unwrap();
    for n in 1..4u64 {
        let entry = (n << 29) - 4096;
        open(&path)
            .write_at(l2 + n * 8, &entry.to_le_bytes())
            .unwrap();
    }
    let options = CheckOptions {
        budget_bytes: 0,
        ..CheckOptions::default()
    };
    let error = qed::check(&*open(&path), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("more memory"), "{error}");
    let report = check(&path, Repair::No).unwrap();
    assert_eq!((report.corruptions, report.allocated_clusters), (0, 3));
    let used = 3 + 1 + 2 * 16;
    assert_eq!(report.leaks, (1 << 31) / 4096 - used);
}
