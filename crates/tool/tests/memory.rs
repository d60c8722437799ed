//! Memory of a check, of two large images and of large bitmaps: bounded; and what it costs when there is little.

#[allow(dead_code, unused_imports)]
mod common;

use common::{Rng, damage_of, open, qemu_check};
use disk::{Chain, ChainOptions};
use image::Format;
use std::fs;
use testkit::{TempDir, qemu};
use tool::bitmap::{Action, Broken, apply, copy, list, to_copy};
use tool::check::{CheckOptions, Repair, Report, check};
use tool::compare::compare;
use tool::source::Source;
use tool::work::{Stop, Work};

/// The most memory that this process had, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("reads");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.and_then(|n| n.parse().ok()).expect("a number")
}

fn with_budget(path: &std::path::Path, repair: Repair, budget_bytes: u64) -> Report {
    let options = CheckOptions {
        repair,
        budget_bytes,
    };
    check(&*open(path), &options).expect("checks")
}

#[test]
fn little_memory_costs_walks_and_nothing_else() {
    let dir = TempDir::new();
    let image = dir.path("a.qcow2");
    // 16 MiB in clusters of 512 bytes: 9 pages of 4096 clusters.
    qemu::create_with("qcow2", &image, "32M", "cluster_size=512");
    qemu::io("qcow2", &image, &["write -P 3 0 16M"]);
    let sound = fs::read(&image).expect("reads");
    for (seed, place) in [
        (1, "refcount block"),
        (2, "refcount table"),
        (3, "L2 table"),
    ] {
        let mut bytes = sound.clone();
        let how = damage_of(&mut bytes, &mut Rng::new(seed), place);
        fs::write(&image, &bytes).expect("writes");
        let rich = with_budget(&image, Repair::No, 1 << 20);
        let poor = with_budget(&image, Repair::No, 0);
        assert_eq!(rich.walks, 1);
        assert!(poor.walks > 8, "{} walks", poor.walks);
        let numbers = |report: &Report| Report {
            walks: 0,
            findings: Vec::new(),
            ..report.clone()
        };
        assert_eq!(numbers(&poor), numbers(&rich), "{how}");
        assert_eq!(poor.findings.len(), rich.findings.len(), "{how}");
        let repaired = with_budget(&image, Repair::All, 0);
        let theirs = qemu_check(&image, "").expect("qemu-img ends");
        let left = (repaired.corruptions, repaired.leaks);
        assert_eq!(left, (theirs.corruptions, theirs.leaks), "{how}");
    }
}

#[test]
fn a_sparse_disk_of_16_tib_takes_less_than_64_mib() {
    let dir = TempDir::new();
    let image = dir.path("a.qcow2");
    qemu::create("qcow2", &image, "16T");
    let writes: Vec<String> = (0..512u64)
        .map(|nth| format!("write -P 5 {} 64k", nth * (32 << 30)))
        .collect();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    qemu::io("qcow2", &image, &writes);
    let report = with_budget(&image, Repair::No, tool::check::BUDGET_DEFAULT);
    assert_eq!((report.corruptions, report.leaks, report.walks), (0, 0, 1));
    assert_eq!(report.allocated_clusters, 512);
    // All of the process: test, libraries and check.
    let peak = peak_kib();
    assert!(peak < 64 << 10, "{peak} KiB");
}

#[test]
fn two_vdi_images_of_32_tib_are_compared_in_less_than_64_mib() {
    let dir = TempDir::new();
    let open = |name: &str| {
        let path = dir.path(name);
        qemu::create("vdi", &path, "32T");
        let options = ChainOptions {
            format: Some(Format::Vdi),
            read_only: true,
            ..ChainOptions::default()
        };
        let path = path.to_str().expect("UTF-8");
        io::wait_for_lock(|| Chain::open(path, &options)).expect("opens")
    };
    // Of each the map alone has 128 MiB.
    let (one, other) = (open("a.vdi"), open("b.vdi"));
    let source = |chain| Source::new(chain).expect("a source");
    let mut progress = |_| {};
    let mut work = Work::new(Stop::default(), &mut progress);
    let outcome = compare(source(&one), source(&other), false, &mut work).expect("compares");
    assert_eq!(outcome.difference, None);
    assert_eq!(outcome.sizes, [32 << 40; 2]);
    let peak = peak_kib();
    assert!(peak < 64 << 10, "{peak} KiB");
}

/// A qcow2 image that is open for changes of its bitmaps.
fn changed(path: &std::path::Path) -> std::sync::Arc<io::File> {
    let options = io::OpenOptions::default();
    io::wait_for_lock(|| io::File::open(path, &options)).expect("opens")
}

#[test]
fn bitmaps_of_512_mib_are_merged_and_copied_in_less_than_64_mib() {
    let dir = TempDir::new();
    let (from, to) = (dir.path("a.qcow2"), dir.path("b.qcow2"));
    for path in [&from, &to] {
        qemu::create("qcow2", path, "2T");
    }
    {
        let file = changed(&from);
        let add = |granularity| Action::Add {
            granularity: Some(granularity),
        };
        apply(&*file, b"fine", &[add(512)], None).expect("adds");
        apply(&*file, b"coarse", &[add(64 << 10)], None).expect("adds");
    }
    // Pages of one kind, and of both.
    qemu::io(
        "qcow2",
        &from,
        &[
            "write -P 1 512 64M",
            "write -z 512G 1G",
            "write -P 1 2047G 64k",
        ],
    );
    let file = changed(&from);
    let merge = Action::Merge {
        source: b"fine".to_vec(),
    };
    apply(&*file, b"coarse", &[merge], None).expect("merges");
    let listed = list(&*file).expect("lists");
    let dirty: Vec<_> = listed.iter().map(|bitmap| bitmap.dirty_bytes).collect();
    let fine = (64 << 20) + (1 << 30) + (64 << 10);
    assert_eq!(dirty, [Some(fine), Some(fine + (64 << 10))]);
    let (entries, _) = to_copy(&*file, Broken::Refuse).expect("sound");
    let target = changed(&to);
    copy(&*file, &entries, &*target).expect("copies");
    let listed = list(&*target).expect("lists");
    let copied: Vec<_> = listed.iter().map(|bitmap| bitmap.dirty_bytes).collect();
    assert_eq!(copied, dirty);
    let peak = peak_kib();
    assert!(peak < 64 << 10, "{peak} KiB");
}
