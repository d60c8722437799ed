//! Images that grow: clusters counted ahead, space reserved ahead, flushes asked for ahead.

use super::testing::{Change, Checked, Driver, MemFile, check};
use super::{CreateOptions, OpenOptions};
use crate::{FileId, FlushRun, Foreseen, Image, Need, Plan, Prewrite, Step};
use block::{GuestOffset, Storage};
use std::fs;

const CLUSTER: u64 = 4096;

fn fresh(clusters: u64, backing: bool) -> Driver {
    let options = CreateOptions {
        size: clusters * CLUSTER,
        cluster_size: CLUSTER,
        backing: backing.then(|| ("base".into(), "raw".into())),
        ..CreateOptions::default()
    };
    let mut driver = Driver::create(&options, &OpenOptions::default());
    driver.backing = vec![7; 16 * CLUSTER as usize];
    driver
}

fn checked(file: &MemFile) -> Checked {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.qcow2");
    fs::write(directory.path().join("base"), []).unwrap();
    fs::write(&path, file.bytes()).unwrap();
    check(&path)
}

#[test]
fn a_guest_that_flushes_each_write_needs_one_barrier() {
    let mut driver = fresh(4096, false);
    for i in 0..400 {
        driver.write(i * 3 * CLUSTER, &[1; 512]).unwrap();
        driver.flush().unwrap();
    }
    // The first flush counts its own cluster and table; one finds the reservation used up.
    assert_eq!(driver.barriers, 402);
    let file = driver.file.clone();
    assert_eq!(checked(&file), Checked::Leaks, "what was counted ahead");
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn data_go_first_where_the_guest_read_something_else() {
    // Unwritten clusters read as the backing file's bytes, not as zeros.
    let mut driver = fresh(4096, true);
    for i in 0..20 {
        driver.write(i * CLUSTER, &[1; CLUSTER as usize]).unwrap();
        driver.flush().unwrap();
    }
    assert_eq!(driver.barriers, 40);
    // So do clusters that were a device's before.
    let mut driver = fresh(4096, false);
    driver.zeroed = false;
    for i in 0..20 {
        driver.write(i * CLUSTER, &[1; 512]).unwrap();
        driver.flush().unwrap();
    }
    assert_eq!(driver.barriers, 40);
}

#[test]
fn what_was_counted_ahead_is_counted_once() {
    let mut driver = fresh(4096, false);
    driver.write(0, &[1; 512]).unwrap();
    driver.flush().unwrap();
    // Given back, taken again, and written in the end.
    for round in 0..100 {
        let at = CLUSTER * (1 + round % 3);
        let (_, ticket) = driver.start_write(at, &[2; 512]).unwrap();
        driver.image.abort(ticket.unwrap());
        if round % 10 == 0 {
            driver.flush().unwrap();
        }
    }
    for i in 1..200 {
        driver.write(i * CLUSTER, &[3; 512]).unwrap();
    }
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn counting_ahead_waits_for_a_flush_that_succeeds() {
    let mut driver = fresh(4096, false);
    driver.write(0, &[1; 512]).unwrap();
    // Refcounts, table, barrier, L1 entry, and its barrier fails.
    driver.file.fail_after(Some(4));
    assert!(driver.flush().is_err());
    driver.file.fail_after(None);
    let before = driver.barriers;
    driver.write(CLUSTER, &[1; 512]).unwrap();
    driver.flush().unwrap();
    assert!(
        driver.barriers >= before + 2,
        "nothing is known to be counted"
    );
    driver.write(2 * CLUSTER, &[1; 512]).unwrap();
    let before = driver.barriers;
    driver.flush().unwrap();
    assert_eq!(driver.barriers, before + 1);
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn counting_ahead_waits_for_the_end_of_the_flush() {
    let mut driver = fresh(4096, false);
    driver.write(0, &[1; 512]).unwrap();
    let mut run = FlushRun::default();
    driver.image.flush_begin(&mut run).unwrap();
    // Meanwhile.
    driver.write(CLUSTER, &[1; 512]).unwrap();
    for w in &run.writes {
        let bytes = &run.bytes[w.start..w.start + w.len];
        driver.file.patch(w.offset.0 as usize, bytes);
    }
    driver.image.flush_end(&mut run, true);
    driver.flush().unwrap();
    assert_eq!(
        driver.barriers, 2,
        "it was not counted yet when it was taken"
    );
    driver.write(2 * CLUSTER, &[1; 512]).unwrap();
    driver.flush().unwrap();
    assert_eq!(driver.barriers, 3);
}

/// Has what is foreseen done, but for zeros, which are returned.
fn look_ahead(driver: &mut Driver) -> Option<Prewrite> {
    while let Some(soon) = driver.image.foresee() {
        match soon {
            Foreseen::Prewrite(prewrite) => return Some(prewrite),
            soon => driver.foreseen(soon).unwrap(),
        }
    }
    None
}

/// What the guest wrote lies on no zeros that were written after it. Returns how many of its writes of `len` bytes lie on ones
/// that were written before, and how many do not.
fn on_zeros(file: &MemFile, len: usize) -> (usize, usize) {
    let (mut zeros, mut data) = (Vec::new(), Vec::new());
    let (mut on, mut off) = (0, 0);
    for change in file.journal() {
        let Change::Write(at, bytes) = change else {
            continue;
        };
        let range = at..at + bytes.len() as u64;
        if bytes.iter().all(|b| *b == 0) && bytes.len() as u64 >= CLUSTER {
            let hit = |d: &u64| range.contains(d);
            assert!(!data.iter().any(hit), "zeros over data at {range:?}");
            zeros.push(range);
        } else if bytes.len() == len && bytes.iter().all(|b| *b == 1) {
            data.push(at);
            match zeros.iter().any(|z| z.contains(&at)) {
                true => on += 1,
                false => off += 1,
            }
        }
    }
    (on, off)
}

#[test]
fn where_flushes_are_many_clusters_are_written_before_they_are_taken() {
    let mut driver = fresh(4096, false);
    driver.image.prewrite(true);
    driver.file.record();
    for i in 0..1000 {
        driver.write(i * 3 * CLUSTER, &[1; 512]).unwrap();
        driver.flush().unwrap();
        if let Some(prewrite) = look_ahead(&mut driver) {
            driver.foreseen(Foreseen::Prewrite(prewrite)).unwrap();
        }
    }
    assert_eq!(on_zeros(&driver.file, 512), (999, 1));
    // The first counts its own cluster and table.
    assert_eq!(driver.barriers, 1001);
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn nobody_is_given_a_cluster_while_zeros_are_on_their_way_there() {
    let mut driver = fresh(4096, false);
    driver.image.prewrite(true);
    driver.file.record();
    let mut late = None;
    for i in 0..1000 {
        driver.write(i * 3 * CLUSTER, &[1; 512]).unwrap();
        driver.flush().unwrap();
        // Each takes as long as eighty writes.
        if i % 80 == 79
            && let Some(prewrite) = late.take()
        {
            driver.foreseen(Foreseen::Prewrite(prewrite)).unwrap();
        }
        if late.is_none() {
            late = look_ahead(&mut driver);
        }
    }
    let (on, off) = on_zeros(&driver.file, 512);
    assert!(on > 100 && off > 100, "{on} {off}");
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn zeros_are_not_worth_writing_for_who_flushes_seldom_or_where_they_fail() {
    let mut driver = fresh(1 << 16, false);
    driver.image.prewrite(true);
    let mut at = 0;
    let mut wanted = |driver: &mut Driver, writes: u64| {
        for _ in 0..writes {
            driver.write(at, &[1; 512]).unwrap();
            at += CLUSTER;
        }
        driver.flush().unwrap();
        look_ahead(driver)
    };
    for _ in 0..20 {
        assert_eq!(wanted(&mut driver, 65), None, "more than 256 KiB");
    }
    // The lots that are there are used up first.
    let prewrite = (0..1200).find_map(|_| wanted(&mut driver, 1));
    driver.image.prewritten(&prewrite.unwrap(), false);
    for _ in 0..300 {
        assert_eq!(wanted(&mut driver, 1), None, "after a failure");
    }
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn space_is_reserved_before_it_is_lacking() {
    let mut driver = fresh(1 << 20, false);
    let (mut lacked, mut foreseen) = (0, 0);
    for i in 0..40_000u64 {
        let at = GuestOffset(i * CLUSTER);
        let plan = loop {
            match driver.image.plan_write(at, 512).unwrap() {
                Step::Done(plan) => break plan,
                Step::Need(need) => {
                    lacked += u32::from(matches!(need, Need::Reserve(_)));
                    driver.need(need).unwrap();
                }
                Step::Wait(key) => panic!("waits for {key:?}"),
            }
        };
        let Plan::Allocate(allocation) = plan else {
            panic!("{plan:?}");
        };
        driver.image.commit(allocation.ticket);
        if let Some(need) = driver.image.foresee() {
            foreseen += u32::from(matches!(need, Foreseen::Reserve(_)));
            assert_eq!(driver.image.foresee(), None, "given to one caller");
            driver.foreseen(need).unwrap();
        }
    }
    assert_eq!(lacked, 1, "only the first");
    assert!((3..20).contains(&foreseen), "{foreseen}: in growing steps");
    let file = driver.file.clone();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn a_reservation_ahead_that_fails_is_not_repeated_until_space_is_lacking() {
    let mut driver = fresh(1 << 20, false);
    let mut failed = 0;
    for i in 0..2_000 {
        driver.write(i * CLUSTER, &[1; 512]).unwrap();
        match driver.image.foresee() {
            Some(Foreseen::Reserve(reserve)) => {
                assert_eq!(reserve.file, FileId::IMAGE);
                driver.image.reserve_failed(&reserve);
                failed += 1;
            }
            other => assert_eq!(other, None),
        }
    }
    // Each success, on demand, makes it worth another try.
    assert!((1..=20).contains(&failed), "{failed}");
}

#[test]
fn a_flush_is_asked_for_before_the_cache_is_full() {
    let options = CreateOptions {
        size: 1 << 33,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    };
    let open = OpenOptions {
        cache_bytes: Some(1 << 20),
        ..OpenOptions::default()
    };
    let mut driver = Driver::create(&options, &open);
    let (mut lacked, mut foreseen) = (0, 0);
    for i in 0..3_000u64 {
        let at = GuestOffset(i * (2 << 20));
        let plan = loop {
            match driver.image.plan_write(at, 512).unwrap() {
                Step::Done(plan) => break plan,
                Step::Need(need) => {
                    lacked += u32::from(need == Need::Commit);
                    driver.need(need).unwrap();
                }
                Step::Wait(key) => panic!("waits for {key:?}"),
            }
        };
        if let Plan::Allocate(allocation) = plan {
            driver.image.commit(allocation.ticket);
        }
        if let Some(need) = driver.image.foresee() {
            foreseen += u32::from(need == Foreseen::Commit);
            driver.foreseen(need).unwrap();
        }
    }
    assert_eq!(lacked, 0, "no write has to wait for a flush");
    assert!(foreseen > 3, "{foreseen}");
}

#[test]
fn a_refcount_table_may_move_while_a_flush_carries_its_last_move() {
    // A table of one cluster covers 2 MiB, and each place is not much larger than the one before.
    let options = CreateOptions {
        size: 32 << 20,
        cluster_size: 512,
        refcount_bits: 64,
        ..CreateOptions::default()
    };
    let mut driver = Driver::create(&options, &OpenOptions::default());
    let file = driver.file.clone();
    let write = |driver: &mut Driver, from: u64, to: u64| {
        for at in (from << 20..to << 20).step_by(64 << 10) {
            driver.write(at, &[5; 64 << 10]).unwrap();
        }
    };
    write(&mut driver, 0, 3);
    let mut run = FlushRun::default();
    driver.image.flush_begin(&mut run).unwrap();
    let header = run.writes.iter().filter(|w| w.offset.0 == 0);
    assert_eq!(header.count(), 1, "the flush carries a move");
    write(&mut driver, 3, 16);
    for w in &run.writes {
        let bytes = &run.bytes[w.start..w.start + w.len];
        file.write_at(w.offset.0, bytes).unwrap();
    }
    driver.image.flush_end(&mut run, true);
    let content = driver.read(0, 32 << 20).unwrap();
    driver.close();
    assert_eq!(checked(&file), Checked::Clean);
    let mut again = Driver::open(file, &OpenOptions::default());
    assert!(again.read(0, 32 << 20).unwrap() == content);
}
