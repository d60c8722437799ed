//! Memory of a check, of two large images and of large bitmaps: bounded; and what it costs when there is little.

#[allow(dead_code, unused_imports)]
mod common;

use block::Storage;
use common::{Rng, damage_of, open, qemu_check};
use disk::blocking::Driver;
use disk::{Chain, ChainOptions};
use image::{Format, qcow2};
use std::fs;
use testkit::{TempDir, qemu};
use tool::bitmap::{Action, Broken, apply, copy, list, to_copy};
use tool::check::{CheckOptions, Repair, Report, check};
use tool::compare::compare;
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};
use tool::source::Source;
use tool::work::{Stop, Work};

/// The header's extension that says where the directory of bitmaps is (specification: "Header extensions").
const BITMAPS_EXTENSION: u32 = 0x2385_2875;

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
        ..CheckOptions::default()
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

/// A bitmap of 128 MiB with bits of both kinds everywhere: all entries of its table name the same data, which only a change of
/// it would mind.
#[test]
fn a_mixed_bitmap_takes_a_piece_of_it_at_a_time() {
    let dir = TempDir::new();
    let (from, to) = (dir.path("a.qcow2"), dir.path("b.qcow2"));
    for path in [&from, &to] {
        qemu::create("qcow2", path, "512G");
    }
    let file = changed(&from);
    let add = Action::Add {
        granularity: Some(512),
    };
    apply(&*file, b"b", std::slice::from_ref(&add), None).expect("adds");
    let end = file.len().expect("a length");
    file.write_at(end, &[0x55; 64 << 10]).expect("writes");
    // The table, of 2048 entries: the directory's first word says where. That is behind two words of the header's extension.
    let header = qcow2::Header::read(&*file).expect("a header");
    let extension = header.extension(BITMAPS_EXTENSION).expect("bitmaps");
    let word = extension.get(16..24).and_then(|word| word.try_into().ok());
    let directory = word.map(u64::from_be_bytes).expect("an offset");
    let mut table = [0; 8];
    file.read_at(directory, &mut table).expect("reads");
    let entries: Vec<u8> = (0..2048).flat_map(|_| end.to_be_bytes()).collect();
    file.write_at(u64::from_be_bytes(table), &entries)
        .expect("writes");
    let half = Some(256 << 30);
    let listed = list(&*file).expect("lists");
    assert_eq!(listed[0].dirty_bytes, half);

    let (entries, _) = to_copy(&*file, Broken::Refuse).expect("sound");
    let target = changed(&to);
    copy(&*file, &entries, &*target).expect("copies");
    apply(&*target, b"again", &[add], None).expect("adds");
    let merge = Action::Merge {
        source: b"b".to_vec(),
    };
    apply(&*target, b"again", &[merge], None).expect("merges");
    drop(target);
    // A disk that is written, and one that grows.
    let options = ChainOptions {
        format: Some(Format::Qcow2),
        ..ChainOptions::default()
    };
    let name = to.to_str().expect("UTF-8");
    let opened = || io::wait_for_lock(|| Chain::open(name, &options)).expect("opens");
    let mut driver = Driver::new(opened().members(), false).expect("a driver");
    driver.write(512, &[1; 512]).expect("writes");
    driver.close().expect("closes");
    let grow = ResizeOptions {
        size: 600 << 30,
        shrink: false,
        preallocation: Preallocation::Off,
    };
    resize(&opened().members(), Format::Qcow2, &grow).expect("grows");
    let target = changed(&to);
    let listed = list(&*target).expect("lists");
    let dirty: Vec<_> = listed.iter().map(|bitmap| bitmap.dirty_bytes).collect();
    // The sector at 512 has no bit in 0x55.
    assert_eq!(dirty, [half.map(|bytes| bytes + 512); 2]);
    let peak = peak_kib();
    assert!(peak < 64 << 10, "{peak} KiB");
}
