//! Postponed refcounts: what is written when, and what a process that ends without a close leaves.

use super::testing::{Change, Checked, Driver, MemFile, Rng, check, run};
use super::{CreateOptions, Header, OpenOptions, Qcow2, features};
use crate::{Image, ZeroMode};
use std::fs;
use std::ops::Range;

const CLUSTER: u64 = 4096;

fn options(clusters: u64) -> CreateOptions {
    CreateOptions {
        size: clusters * CLUSTER,
        cluster_size: CLUSTER,
        lazy_refcounts: true,
        ..CreateOptions::default()
    }
}

fn fresh(clusters: u64) -> Driver {
    Driver::create(&options(clusters), &OpenOptions::default())
}

fn is_dirty(file: &MemFile) -> bool {
    file.word(72) & features::DIRTY != 0
}

/// Where refcount table and refcount blocks are in the file.
fn refcount_places(file: &MemFile) -> Vec<Range<u64>> {
    let header = Header::read(file).unwrap();
    let table = header.refcount_table_offset;
    let len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    let blocks = (table..table + len).step_by(8).map(|at| file.word(at));
    let blocks = blocks.filter(|at| *at != 0);
    let mut places: Vec<_> = blocks.map(|at| at..at + header.cluster_size()).collect();
    places.push(table..table + len);
    places
}

/// Writes of the journal that changed refcounts on disk.
fn refcount_writes(journal: &[Change], places: &[Range<u64>]) -> usize {
    let hits = |change: &&Change| match change {
        Change::Write(at, data) => places
            .iter()
            .any(|p| *at < p.end && p.start < at + data.len() as u64),
        _ => false,
    };
    journal.iter().filter(hits).count()
}

/// What `qemu-img check -r all` makes of the file, which must become sound.
fn mended_by_peer(file: &MemFile) -> MemFile {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dirty.qcow2");
    fs::write(directory.path().join("base"), []).unwrap();
    fs::write(&path, file.bytes()).unwrap();
    let shown = path.to_str().unwrap();
    run("qemu-img", &["check", "-f", "qcow2", "-r", "all", shown]);
    assert_eq!(check(&path), Checked::Clean);
    MemFile::of(fs::read(&path).unwrap())
}

fn checked(file: &MemFile) -> Checked {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.qcow2");
    fs::write(&path, file.bytes()).unwrap();
    check(&path)
}

#[test]
fn the_bit_comes_before_all_else_and_goes_after_all_else() {
    let mut driver = fresh(4096);
    let file = driver.file.clone();
    let places = refcount_places(&file);
    file.record();
    driver.flush().unwrap();
    assert_eq!(file.word(72), 0, "nothing has changed");
    for i in 0..300 {
        driver.write(i * 3 * CLUSTER, &[1; 512]).unwrap();
        if i % 3 == 0 {
            driver.flush().unwrap();
        }
        if i > 100 && i % 10 == 0 {
            let at = (i - 100) * 3 * CLUSTER;
            driver.zero(at, CLUSTER, ZeroMode::Discard).unwrap();
        }
    }
    driver.flush().unwrap();
    let before_close = file.journal().len();
    let journal = file.journal();
    assert_eq!(refcount_writes(&journal, &places), 0);
    assert!(is_dirty(&file));
    assert!(matches!(checked(&file), Checked::Errors(_)));
    let content = driver.read(0, 4096 * CLUSTER).unwrap();
    driver.close();

    let journal = file.journal();
    let headers: Vec<usize> = (0..journal.len())
        .filter(|i| matches!(journal[*i], Change::Write(0, _)))
        .collect();
    let [first, last] = headers[..] else {
        panic!("{} writes of the header", headers.len());
    };
    // What came before the bit is data in clusters that nothing refers to; and a barrier follows.
    let l2 = file.word(Header::read(&file).unwrap().l1_table_offset) & !(1 << 63);
    for change in &journal[..first] {
        if let Change::Write(at, _) = change {
            assert!(*at > CLUSTER * 3 && *at & !(CLUSTER - 1) != l2, "{at:#x}");
        }
    }
    assert!(matches!(journal[first + 1], Change::Sync));
    assert!(matches!(journal[last - 1], Change::Sync));
    assert!(matches!(journal[last + 1..], [Change::Sync]));
    assert!(refcount_writes(&journal[before_close..], &places) > 0);
    assert!(!is_dirty(&file));
    assert_eq!(checked(&file), Checked::Clean);
    let mut again = Driver::open(file, &OpenOptions::default());
    assert!(again.read(0, 4096 * CLUSTER).unwrap() == content);
}

#[test]
fn a_flush_of_new_clusters_is_one_barrier_and_no_refcounts() {
    let mut driver = fresh(4096);
    for i in 0..40 {
        driver.write(i * 3 * CLUSTER, &[1; 512]).unwrap();
        driver.flush().unwrap();
    }
    let barriers = driver.barriers;
    let file = driver.file.clone();
    file.record();
    for i in 40..240 {
        driver.write(i * 3 * CLUSTER, &[1; 512]).unwrap();
        driver.flush().unwrap();
    }
    // Now and then a table goes before the entry that refers to it.
    assert!(driver.barriers - barriers <= 202);
    assert_eq!(refcount_writes(&file.journal(), &refcount_places(&file)), 0);
}

#[test]
fn an_image_that_is_only_looked_at_or_overwritten_stays_clean() {
    let mut driver = fresh(64);
    driver.write(0, &[1; 4 * CLUSTER as usize]).unwrap();
    let file = driver.file.clone();
    driver.close();
    let before = file.bytes();
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    driver.read(0, 64 * CLUSTER).unwrap();
    driver.write(CLUSTER, &[1; 512]).unwrap();
    driver.flush().unwrap();
    assert!(!is_dirty(&file));
    driver.close();
    assert!(file.bytes() == before);
    // Changes that no flush saw before the close: no need for the bit.
    let image = Driver::open(file.clone(), &OpenOptions::default());
    let mut driver = image;
    file.record();
    driver.write(9 * CLUSTER, &[1; 512]).unwrap();
    driver.image.close(&[&file]).unwrap();
    let headers = file.journal();
    let headers = headers.iter().filter(|c| matches!(c, Change::Write(0, _)));
    assert_eq!(headers.count(), 0);
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn a_dirty_image_opens_for_reading_and_is_mended_by_the_peer() {
    for (cluster_size, refcount_bits, extended_l2) in
        [(512, 64, false), (4096, 1, false), (65536, 16, true)]
    {
        let options = CreateOptions {
            cluster_size,
            refcount_bits,
            extended_l2,
            size: 2 << 20,
            ..options(0)
        };
        let mut driver = Driver::create(&options, &OpenOptions::default());
        let mut rng = Rng(cluster_size);
        for n in 0..120 {
            let at = rng.below(4000) * 512;
            let len = (1 + rng.below(90)) * 512;
            let len = len.min((2 << 20) - at);
            match rng.below(6) {
                0 => driver.zero(at, len, ZeroMode::Discard).unwrap(),
                1 => driver.flush().unwrap(),
                _ => driver.write(at, &vec![n; len as usize]).unwrap(),
            }
        }
        driver.flush().unwrap();
        let content = driver.read(0, 2 << 20).unwrap();
        let file = driver.file.clone();
        drop(driver);
        assert!(is_dirty(&file));
        let image = Qcow2::open(&file, &OpenOptions::default()).unwrap();
        let why = image.describe().read_only_because.unwrap();
        assert!(why.contains("dirty bit"), "{why}");
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let mut reader = Driver::open(file.clone(), &read_only);
        assert!(reader.read(0, 2 << 20).unwrap() == content);
        let mended = mended_by_peer(&file);
        let mut driver = Driver::open(mended, &OpenOptions::default());
        assert!(driver.read(0, 2 << 20).unwrap() == content);
    }
}

#[test]
fn refcounts_that_crowd_the_cache_are_written() {
    // 64 refcounts of 64 bits in a slice, and few frames: far more slices than a quarter of them.
    let options = CreateOptions {
        cluster_size: 512,
        refcount_bits: 64,
        size: 16 << 20,
        ..options(0)
    };
    let open = OpenOptions {
        cache_bytes: Some(16 << 10),
        ..OpenOptions::default()
    };
    let mut driver = Driver::create(&options, &open);
    let file = driver.file.clone();
    file.record();
    let data = vec![7; 64 << 10];
    for i in 0..96 {
        driver.write(i * (64 << 10), &data).unwrap();
        if i % 8 == 0 {
            driver.flush().unwrap();
        }
    }
    driver.flush().unwrap();
    assert!(is_dirty(&file));
    let at = file.journal().len();
    assert!(refcount_writes(&file.journal(), &refcount_places(&file)) > 0);
    let table = Header::read(&file).unwrap().refcount_table_offset;
    drop(mended_by_peer(&file));
    driver.close();
    assert!(file.journal().len() > at && !is_dirty(&file));
    assert_eq!(checked(&file), Checked::Clean);
    // It outgrew its place, more than once, and the header told so before the bit went.
    assert!(table > 4 * 512);
}

#[test]
fn a_table_that_moves_in_memory_stays_in_the_file() {
    // The table of one cluster covers 2 MiB; the cache is large enough to keep all refcounts.
    let options = CreateOptions {
        cluster_size: 512,
        refcount_bits: 64,
        size: 8 << 20,
        ..options(0)
    };
    let mut driver = Driver::create(&options, &OpenOptions::default());
    let file = driver.file.clone();
    let before = Header::read(&file).unwrap().refcount_table_offset;
    let places = refcount_places(&file);
    file.record();
    for i in 0..48 {
        driver.write(i * (64 << 10), &[i as u8; 64 << 10]).unwrap();
        driver.flush().unwrap();
        if refcount_writes(&file.journal(), &places) > 0 {
            break;
        }
    }
    let content = driver.read(0, 8 << 20).unwrap();
    assert!(is_dirty(&file));
    let mended = mended_by_peer(&file);
    let mut again = Driver::open(mended, &OpenOptions::default());
    assert!(again.read(0, 8 << 20).unwrap() == content);
    driver.close();
    assert_ne!(Header::read(&file).unwrap().refcount_table_offset, before);
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn an_error_anywhere_leaves_an_image_that_is_sound_or_says_it_is_not() {
    let mut failed = 0;
    for writes in 0..60 {
        let mut driver = fresh(256);
        let file = driver.file.clone();
        driver.write(0, &[9; 2 * CLUSTER as usize]).unwrap();
        driver.flush().unwrap();
        file.fail_after(Some(writes));
        let mut go = || {
            for i in 2..12 {
                driver.write(i * 5 * CLUSTER, &[i as u8; 512])?;
                driver.flush()?;
            }
            driver.zero(0, CLUSTER, ZeroMode::Discard)?;
            driver.flush()?;
            driver.image.close(&[&driver.file])
        };
        let gone = go().is_err();
        failed += u32::from(gone);
        file.fail_after(None);
        match is_dirty(&file) {
            true if writes % 6 == 0 => drop(mended_by_peer(&file)),
            true => {}
            // The very last barrier may have failed: all else is durable then.
            false => assert_eq!(checked(&file), Checked::Clean, "{writes}"),
        }
    }
    assert!((20..60).contains(&failed), "{failed}");
}

#[test]
fn a_bit_that_was_perhaps_set_is_set_again() {
    let mut driver = fresh(256);
    let file = driver.file.clone();
    driver.write(0, &[9; 512]).unwrap();
    file.record();
    // The header is written, and the barrier behind it fails.
    file.fail_after(Some(1));
    driver.flush().unwrap_err();
    file.fail_after(None);
    assert!(is_dirty(&file));
    driver.flush().unwrap();
    driver.flush().unwrap();
    let journal = file.journal();
    let headers = journal.iter().filter(|c| matches!(c, Change::Write(0, _)));
    assert_eq!(headers.count(), 2);
    driver.close();
    assert!(!is_dirty(&file));
    assert_eq!(checked(&file), Checked::Clean);
}

#[test]
fn a_header_written_meanwhile_keeps_the_table_that_the_file_has() {
    let options = CreateOptions {
        cluster_size: 512,
        refcount_bits: 64,
        size: 8 << 20,
        ..options(0)
    };
    let mut driver = Driver::create(&options, &OpenOptions::default());
    driver.write((8 << 20) - 512, &[1; 512]).unwrap();
    let file = driver.file.clone();
    driver.close();
    // The disk's last cluster is said to lie where the L1 table does.
    let header = Header::read(&file).unwrap();
    let last = header.l1_table_offset + (u64::from(header.l1_size) - 1) * 8;
    let l2 = file.word(last) & !(1 << 63);
    file.patch(
        l2 as usize + 504,
        &(header.l1_table_offset | 1 << 63).to_be_bytes(),
    );
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    for i in 0..48 {
        driver.write(i * (64 << 10), &[3; 64 << 10]).unwrap();
        driver.flush().unwrap();
    }
    let offset = |file: &MemFile| Header::read(file).unwrap().refcount_table_offset;
    assert_eq!(offset(&file), header.refcount_table_offset);
    assert!(driver.write((8 << 20) - 512, &[1; 512]).is_err());
    driver.flush().unwrap();
    assert_eq!(file.word(72), features::DIRTY | features::CORRUPT);
    assert_eq!(offset(&file), header.refcount_table_offset);
    let content = driver.read(0, 3 << 20).unwrap();
    assert!(content == vec![3; 3 << 20]);
    driver.close();
    assert_eq!(file.word(72), features::CORRUPT);
    assert_ne!(offset(&file), header.refcount_table_offset);
}

#[test]
fn a_change_that_needs_no_order_waits_for_the_bit_too() {
    let mut driver = fresh(64);
    driver.write(0, &[1; 4 * CLUSTER as usize]).unwrap();
    let file = driver.file.clone();
    driver.close();
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    driver.zero(0, CLUSTER, ZeroMode::Discard).unwrap();
    file.record();
    driver.flush().unwrap();
    let journal = file.journal();
    assert!(matches!(
        journal[..4],
        [
            Change::Write(0, _),
            Change::Sync,
            Change::Write(..),
            Change::Sync
        ]
    ));
}
