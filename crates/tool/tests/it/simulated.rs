//! Repairs that are cut off by a crash or an error, at every step.

use crate::common;

use common::{KINDS, Rng, check_with, damage_of, make, qemu_check};
use crash::Random;
use crash::states::{Bounds, Moment, StateId, moments};
use io::{Fault, FaultOp, SimDisk, SimOptions};
use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use testkit::forge::{Forge, Shape, Snapshot, field};
use testkit::{TempDir, qemu};
use tool::check::{Repair, Severity};

fn simulated(bytes: &[u8], seed: u64) -> Arc<SimDisk> {
    let options = SimOptions {
        seed,
        ..SimOptions::default()
    };
    SimDisk::from_bytes(options, bytes)
}

/// Damaged images that a repair makes sound, in the kinds of metadata that it writes.
const CASES: [(&str, &str); 6] = [
    ("4k", "refcount block"),
    ("4k", "refcount table"),
    ("512", "refcount block"),
    ("refcounts of 1 bit", "refcount table"),
    ("subclusters", "refcount block"),
    ("version 2", "refcount table"),
];

/// An image whose snapshot table has to be written anew, and its refcounts too: one is 0, one too high.
/// Its guest's data go on behind the end of the file.
fn without_sizes() -> Forge {
    let mut image = Forge::new(Shape::default()).data(0, 1).data(3, 2);
    let l1_offset = image.allocate(1);
    let cluster = image.cluster();
    let l1_size = image.word(field::L1_SIZE - 4) as u32;
    let snapshots = [b"one", b"two"].map(|name| Snapshot {
        l1_offset,
        l1_size,
        extra: Vec::new(),
        name: name.to_vec(),
        ..Snapshot::default()
    });
    let mut image = image.snapshots(&snapshots);
    image.set_refcount(l1_offset / cluster, 0);
    image.set_refcount(0, 3);
    image
}

/// Runs `each` on every damaged image with what its guest must read.
fn cases(mut each: impl FnMut(&TempDir, &str, &[u8], &[u8])) {
    let dir = TempDir::new();
    for (nth, (name, place)) in CASES.into_iter().enumerate() {
        let kind = KINDS.iter().find(|k| k.name == name).expect("a kind");
        let image = make(&dir, kind, 11);
        let raw = dir.path("guest.raw");
        qemu::convert("qcow2", &image, "raw", &raw);
        let guest = fs::read(&raw).expect("reads");
        let sound = fs::read(&image).expect("reads");
        for seed in 0..3 {
            let mut bytes = sound.clone();
            let how = damage_of(&mut bytes, &mut Rng::new(nth as u64 * 100 + seed), place);
            each(&dir, &format!("{name}, seed {seed}: {how}"), &bytes, &guest);
        }
    }
}

/// The same on images whose snapshot table is rebuilt too.
fn forged(mut each: impl FnMut(&TempDir, &str, &[u8], &[u8])) {
    let dir = TempDir::new();
    let image = without_sizes();
    let cluster = image.cluster() as usize;
    let mut guest = vec![0; Shape::default().size as usize];
    guest[..cluster].fill(1);
    guest[3 * cluster..4 * cluster].fill(2);
    each(&dir, "snapshots without sizes", &image.bytes, &guest);
    // An entry for which there is nothing any more: zeros once the file is that long.
    let mut dangling = without_sizes();
    let end = (dangling.bytes.len() / cluster + 1) as u64;
    let table = dangling.word(dangling.word(field::L1_TABLE_OFFSET)) & !(1 << 63);
    dangling = dangling.put_u64(table + 5 * 8, (1 << 63) | (end * cluster as u64));
    each(
        &dir,
        "an entry behind the file's end",
        &dangling.bytes,
        &guest,
    );
}

/// After a second repair the image is sound, to QEMU too, and the guest's data are all there.
fn recovers(dir: &TempDir, what: &str, crashed: &Arc<SimDisk>, guest: &[u8], ask_qemu: bool) {
    let report = check_with(&**crashed, Repair::All);
    let report = report.unwrap_or_else(|error| panic!("{what}: {error}"));
    let left = (report.corruptions, report.leaks, report.check_errors);
    assert_eq!(left, (0, 0, 0), "{what}: {:?}", report.findings);
    if !ask_qemu {
        return;
    }
    let (image, raw) = (dir.path("crashed.qcow2"), dir.path("crashed.raw"));
    fs::write(&image, crashed.bytes()).expect("writes");
    let verdict = qemu_check(&image, "").expect("qemu-img ends");
    assert_eq!(verdict.status, 0, "{what}: {}", verdict.messages);
    qemu::convert("qcow2", &image, "raw", &raw);
    assert!(
        fs::read(&raw).expect("reads") == guest,
        "{what}: guest data"
    );
}

/// Whether an error is an old one seen anew: what was behind the file's end is in it once it is longer.
fn is_old(now: &str, before: &BTreeSet<String>) -> bool {
    let at = now.split(' ').nth(2).unwrap_or_default();
    let beyond = before
        .iter()
        .filter(|text| text.contains("behind the file's end"));
    now.starts_with("cluster at") && beyond.into_iter().any(|text| text.contains(at))
}

/// The errors of an image, but for flags that are behind the refcounts: none may be new after a crash.
fn dangers(sim: &Arc<SimDisk>, what: &str) -> BTreeSet<String> {
    let report = check_with(&**sim, Repair::No).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(report.findings_left_out, 0, "{what}");
    let findings = report.findings.into_iter();
    findings
        .filter(|f| f.severity == Severity::Corruption && !f.text.contains("COPIED flag"))
        .map(|finding| finding.text)
        .collect()
}

/// The states that crashes may leave of what was done to a disk.
fn each_crash(sim: &Arc<SimDisk>, mut each: impl FnMut(usize, StateId, &Arc<SimDisk>)) {
    let disks = [Arc::clone(sim)];
    let mut nth = 0;
    for (number, at) in moments(&disks).into_iter().enumerate() {
        let moment = Moment::new(&disks, at);
        let mut random = Random::new(1, number as u64);
        let states = moment.states(&Bounds::FAST, &mut random);
        for (state, keep) in states.iter().enumerate() {
            let id = StateId {
                moment: number,
                state,
            };
            each(nth, id, &moment.disks(keep)[0]);
            nth += 1;
        }
    }
}

#[test]
fn a_repair_cut_off_by_a_crash_can_be_repeated() {
    cases(cut_off);
}

#[test]
fn a_rebuild_cut_off_by_a_crash_can_be_repeated() {
    forged(cut_off);
}

fn cut_off(dir: &TempDir, what: &str, bytes: &[u8], guest: &[u8]) {
    let sim = simulated(bytes, 1);
    let before = dangers(&sim, what);
    check_with(&*sim, Repair::All).expect("repairs");
    each_crash(&sim, |nth, state, crashed| {
        let what = format!("{what}: crash state {state}");
        let now = dangers(crashed, &what);
        let new = now.difference(&before);
        let new: Vec<_> = new.filter(|text| !is_old(text, &before)).collect();
        assert!(new.is_empty(), "{what}: {new:#?}");
        recovers(dir, &what, crashed, guest, nth % 12 == 0);
    });
}

#[test]
fn a_repair_that_fails_can_be_repeated() {
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;
    cases(|dir, what, bytes, guest| {
        for (op, errno) in [
            (FaultOp::Write, EIO),
            (FaultOp::Sync, EIO),
            (FaultOp::Range, ENOSPC),
        ] {
            for skip in 0..40 {
                let sim = simulated(bytes, skip);
                sim.inject(Fault {
                    skip,
                    count: 1,
                    ..Fault::always(op, errno)
                });
                let done = check_with(&*sim, Repair::All);
                sim.heal();
                let sound = done
                    .as_ref()
                    .is_ok_and(|r| (r.corruptions, r.leaks) == (0, 0));
                let what = format!("{what}: {op:?} {skip} fails");
                recovers(dir, &what, &sim, guest, skip < 4);
                if sound && skip > 0 {
                    // There are no more operations to fail (a failed reservation is no failure).
                    break;
                }
            }
        }
    });
}
