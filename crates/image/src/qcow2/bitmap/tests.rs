//! Bitmaps of whole images: operations, use, crashes, damage; and QEMU's opinion of what is left.

use super::super::edit::Editor;
use super::super::testing::{Change, Checked, Driver, MemFile, Rng, apply, check, crashes, run};
use super::super::{CreateOptions, Header, OpenOptions, Qcow2, create, features};
use super::{Bitmaps, Bits, list, load, resize};
use crate::{FlushRun, Image, Need, Step, ZeroMode};
use block::{ErrorKind, GuestOffset, Storage};
use std::fs;

const SIZE: u64 = 4 << 20;

fn image(cluster_size: u64, refcount_bits: u32) -> MemFile {
    let file = MemFile::default();
    let options = CreateOptions {
        size: SIZE,
        cluster_size,
        refcount_bits,
        ..CreateOptions::default()
    };
    create(&file, &options).unwrap();
    file
}

fn edit(file: &MemFile, change: impl FnOnce(&mut Bitmaps<'_>)) {
    let mut bitmaps = Bitmaps::open(file).unwrap();
    change(&mut bitmaps);
    bitmaps.commit().unwrap();
}

fn marked(granularity_bits: u32, ranges: &[(u64, u64)]) -> Bits {
    let bits = Bits::new(SIZE, granularity_bits).unwrap();
    for (at, len) in ranges {
        bits.mark(*at, *len);
    }
    bits
}

fn runs(bits: &Bits) -> Vec<(u64, u64)> {
    let mut at = 0;
    let next = || {
        let run = bits.next_dirty(at)?;
        at = run.1;
        Some(run)
    };
    std::iter::from_fn(next).collect()
}

fn opinion(bytes: &[u8]) -> Checked {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    check(file.path())
}

fn entry(file: &dyn Storage, name: &str) -> super::Entry {
    let found = list(file).unwrap().into_iter().find(|e| e.name() == name);
    found.unwrap()
}

#[test]
fn operations_are_those_of_a_plain_model() {
    for (cluster, refcount_bits) in [(512, 16), (512, 1), (4096, 64), (65536, 16)] {
        let file = image(cluster, refcount_bits);
        let mut rng = Rng(cluster + u64::from(refcount_bits));
        // Name, granularity, enabled, bits.
        let mut model: Vec<(String, u32, bool, Bits)> = Vec::new();
        for round in 0..24 {
            let name = format!("bitmap {}", rng.below(6));
            let other = format!("bitmap {}", rng.below(6));
            let at = model.iter().position(|m| m.0 == name);
            let from = model.iter().position(|m| m.0 == other);
            let before = list(&file).unwrap();
            let mut bitmaps = Bitmaps::open(&file).unwrap();
            let bytes = name.as_bytes();
            match (rng.below(7), at) {
                (0, Some(_)) => assert!(bitmaps.add(bytes, None).is_err()),
                (_, None) => {
                    let bits = 9 + rng.below(5) as u32;
                    bitmaps.add(bytes, Some(1 << bits)).unwrap();
                    model.push((name.clone(), bits, true, marked(bits, &[])));
                }
                (1, Some(at)) => {
                    bitmaps.remove(bytes).unwrap();
                    model.remove(at);
                }
                (2, Some(at)) => {
                    bitmaps.clear(bytes).unwrap();
                    model[at].3 = marked(model[at].1, &[]);
                }
                (3, Some(at)) => {
                    model[at].2 = rng.below(2) == 0;
                    bitmaps.set_enabled(bytes, model[at].2).unwrap();
                }
                (4, Some(at)) if from.is_some() => {
                    let mut bits = bitmaps.stored(other.as_bytes()).unwrap();
                    bitmaps.merge(bytes, &mut bits).unwrap();
                    let source = runs(&model[from.unwrap()].3);
                    let source: Vec<_> = source.iter().map(|(a, b)| (*a, b - a)).collect();
                    let bits = marked(model[at].1, &source);
                    model[at].3.merge(&bits);
                }
                (_, Some(at)) => {
                    let all = rng.below(8) == 0;
                    let (start, len) = match all {
                        true => (0, SIZE),
                        false => (rng.below(SIZE), rng.below(300_000)),
                    };
                    let bits = marked(9, &[(start, len)]);
                    bitmaps.merge(bytes, &bits).unwrap();
                    model[at].3.merge(&bits);
                }
            }
            if rng.below(5) == 0 {
                // Dropped: nothing has happened.
                drop(bitmaps);
                let now = list(&file).unwrap();
                assert_eq!(now, before);
                model.clear();
                for entry in now {
                    let bits = load(&file, entry.raw_name()).unwrap();
                    model.push((entry.name(), bits.granularity_bits(), entry.auto(), bits));
                }
                continue;
            }
            bitmaps.commit().unwrap();
            let now = list(&file).unwrap();
            assert_eq!(now.len(), model.len(), "round {round}");
            for (entry, (name, bits, enabled, want)) in now.iter().zip(&model) {
                assert_eq!((&entry.name(), entry.granularity()), (name, 1 << bits));
                assert_eq!((entry.auto(), entry.in_use()), (*enabled, false));
                let got = load(&file, name.as_bytes()).unwrap();
                assert_eq!(runs(&got), runs(want), "round {round}: {name}");
            }
            if round % 12 == 11 {
                assert_eq!(opinion(&file.bytes()), Checked::Clean, "round {round}");
            }
        }
        assert_eq!(opinion(&file.bytes()), Checked::Clean);
    }
}

#[test]
fn a_crash_leaves_all_of_an_operation_or_nothing() {
    for (cluster, refcount_bits) in [(512, 16), (4096, 1)] {
        let file = image(cluster, refcount_bits);
        edit(&file, |b| {
            b.add(b"old", Some(512)).unwrap();
            b.merge(b"old", &marked(9, &[(0, 5000), (1 << 20, 70_000)]))
                .unwrap();
        });
        let before = file.bytes();
        let old = runs(&load(&file, b"old").unwrap());
        file.record();
        edit(&file, |b| {
            b.add(b"new", Some(4096)).unwrap();
            b.merge(b"new", &marked(9, &[(100, 1)])).unwrap();
            b.merge(b"old", &marked(9, &[(3 << 20, 100_000)])).unwrap();
        });
        let new = runs(&load(&file, b"old").unwrap());
        let (mut olds, mut news) = (0, 0);
        crashes(&before, &file.journal(), |bytes| {
            let file = MemFile::of(bytes.to_vec());
            let found = runs(&load(&file, b"old").unwrap());
            match list(&file).unwrap().len() {
                1 => {
                    olds += 1;
                    assert_eq!(found, old);
                }
                _ => {
                    news += 1;
                    assert_eq!(found, new);
                    assert_eq!(runs(&load(&file, b"new").unwrap()), [(0, 4096)]);
                }
            }
            let opinion = opinion(bytes);
            assert!(!matches!(opinion, Checked::Errors(_)), "{opinion:?}");
        });
        assert!(olds > 2 && news > 0, "{olds} {news}");
    }
}

#[test]
fn enabled_bitmaps_note_what_a_guest_does() {
    for (cluster_size, extended_l2) in [(512, false), (65536, false), (65536, true)] {
        let file = MemFile::default();
        let options = CreateOptions {
            size: SIZE,
            cluster_size,
            extended_l2,
            ..CreateOptions::default()
        };
        create(&file, &options).unwrap();
        edit(&file, |b| {
            b.add(b"fine", Some(512)).unwrap();
            b.add(b"coarse", Some(1 << 18)).unwrap();
            b.add(b"off", Some(512)).unwrap();
            b.set_enabled(b"off", false).unwrap();
        });
        let mut rng = Rng(7);
        let (fine, coarse) = (marked(9, &[]), marked(18, &[]));
        for _ in 0..3 {
            let mut driver = Driver::open(file.clone(), &OpenOptions::default());
            for _ in 0..25 {
                let at = rng.below(SIZE / 512) * 512;
                let len = (1 + rng.below(200)) * 512;
                let len = len.min(SIZE - at);
                match rng.below(4) {
                    0 => driver.zero(at, len, ZeroMode::Discard).unwrap(),
                    1 => driver
                        .zero(at, len, ZeroMode::Zero { unmap: true })
                        .unwrap(),
                    _ => driver.write(at, &vec![7; len as usize]).unwrap(),
                }
                fine.mark(at, len);
                coarse.mark(at, len);
                assert!(entry(&file, "fine").in_use() && entry(&file, "coarse").in_use());
                assert!(!entry(&file, "off").in_use());
                if rng.below(8) == 0 {
                    driver.flush().unwrap();
                }
            }
            let bytes = driver.close();
            assert_eq!(opinion(&bytes), Checked::Clean);
            assert!(list(&file).unwrap().iter().all(|e| !e.in_use()));
            assert_eq!(runs(&load(&file, b"fine").unwrap()), runs(&fine));
            assert_eq!(runs(&load(&file, b"coarse").unwrap()), runs(&coarse));
            assert_eq!(runs(&load(&file, b"off").unwrap()), []);
        }
    }
}

#[test]
fn who_only_reads_changes_nothing() {
    let file = image(65536, 16);
    edit(&file, |b| b.add(b"b", None).unwrap());
    let before = file.bytes();
    for read_only in [true, false] {
        let options = OpenOptions {
            read_only,
            ..OpenOptions::default()
        };
        let mut driver = Driver::open(file.clone(), &options);
        driver.read(0, 4096).unwrap();
        driver.flush().unwrap();
        assert!(driver.close() == before, "read_only {read_only}");
    }
}

#[test]
fn nothing_is_written_for_a_guest_before_the_marks_are_durable() {
    let file = image(512, 16);
    edit(&file, |b| {
        for n in 0..40 {
            b.add(format!("bitmap {n}").as_bytes(), None).unwrap();
        }
    });
    let before = file.bytes();
    file.record();
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    for at in [0, 1 << 20, 100] {
        driver.write(at, &[9; 700]).unwrap();
    }
    driver.zero(1 << 20, 512, ZeroMode::Discard).unwrap();
    let after = driver.close();
    let (mut states, mut clean, mut marked, mut saved) = (0, 0, 0, 0);
    let mut judge = |bytes: &[u8]| {
        let file = MemFile::of(bytes.to_vec());
        let bitmaps = list(&file).unwrap();
        assert_eq!(bitmaps.len(), 40);
        states += 1;
        if states % 5 == 1 {
            let opinion = opinion(bytes);
            assert!(!matches!(opinion, Checked::Errors(_)), "{opinion:?}");
        }
        let dirty = |name: &[u8]| runs(&load(&file, name).unwrap());
        let in_use = bitmaps.iter().filter(|e| e.in_use()).count();
        let done = Header::parse(bytes).unwrap() == Header::parse(&after).unwrap();
        match in_use {
            40 => marked += 1,
            0 if done => {
                saved += 1;
                assert_eq!(dirty(b"bitmap 7"), [(0, 4096), (1 << 20, (1 << 20) + 4096)]);
            }
            _ => {
                // Those without a mark are right, since the guest has changed nothing.
                clean += 1;
                let usable = bitmaps.iter().filter(|e| !e.in_use());
                assert!(usable.into_iter().all(|e| dirty(e.raw_name()).is_empty()));
                let options = OpenOptions {
                    read_only: true,
                    ..OpenOptions::default()
                };
                let mut driver = Driver::open(file.clone(), &options);
                for at in [0, 1 << 20] {
                    assert_eq!(driver.read(at, 1024).unwrap(), [0; 1024]);
                }
            }
        }
    };
    let journal = file.journal();
    crashes(&before, &journal, &mut judge);
    // The marks, which are the first write, with only one sector of them on disk.
    let Change::Write(at, marks) = &journal[0] else {
        panic!("{:?}", journal[0]);
    };
    assert!(marks.len() > 1024 && matches!(journal[1], Change::Sync));
    for (nth, sector) in marks.chunks(512).enumerate() {
        let mut bytes = before.clone();
        let part = Change::Write(at + nth as u64 * 512, sector.to_vec());
        apply(&mut bytes, &part);
        judge(&bytes);
    }
    assert!(
        clean > 1 && marked > 5 && saved > 0,
        "{clean} {marked} {saved}"
    );
}

#[test]
fn every_change_waits_for_the_marks() {
    let file = image(65536, 16);
    edit(&file, |b| b.add(b"b", None).unwrap());
    let image = Qcow2::open(&file, &OpenOptions::default()).unwrap();
    assert!(!image.is_dirty());
    let waits = || {
        let write = image.plan_write(GuestOffset(0), 512).unwrap();
        let zero = image.plan_zero(GuestOffset(0), SIZE, ZeroMode::Discard);
        let zero = zero.unwrap();
        let (write, zero) = (
            write == Step::Need(Need::Commit),
            zero == Step::Need(Need::Commit),
        );
        assert_eq!(write, zero);
        write
    };
    // The first one asks for the marks; who comes before they are durable waits too.
    assert!(waits() && waits() && image.is_dirty());
    let mut run = FlushRun::default();
    for ok in [false, true] {
        image.flush_begin(&mut run).unwrap();
        assert_eq!(run.writes.len(), 1);
        assert_eq!(run.writes[0].offset.0, directory_at(&file) as u64);
        assert!(waits(), "the run is under way");
        image.flush_end(&mut run, ok);
        assert_eq!(waits(), !ok);
    }
    image.flush_begin(&mut run).unwrap();
    assert!(run.writes.is_empty(), "once is enough");
    image.flush_end(&mut run, true);
}

#[test]
fn what_was_not_saved_can_only_be_removed() {
    let file = image(65536, 16);
    edit(&file, |b| {
        b.add(b"b", None).unwrap();
        b.add(b"c", None).unwrap();
        b.set_enabled(b"c", false).unwrap();
    });
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    driver.write(0, &[1; 512]).unwrap();
    driver.flush().unwrap();
    drop(driver);
    assert!(entry(&file, "b").in_use());
    let inconsistent = |result: block::Result<()>| {
        let error = result.unwrap_err();
        assert!(error.to_string().contains("'b' is inconsistent"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    };
    inconsistent(load(&file, b"b").map(drop));
    let attempt = |change: &dyn Fn(&mut Bitmaps<'_>) -> block::Result<()>| {
        change(&mut Bitmaps::open(&file).unwrap())
    };
    inconsistent(attempt(&|b| b.clear(b"b")));
    inconsistent(attempt(&|b| b.set_enabled(b"b", true)));
    inconsistent(attempt(&|b| b.merge(b"b", &marked(9, &[]))));
    inconsistent(attempt(&|b| b.stored(b"b").map(drop)));
    // It stays as it is while the image is used, and the image can be used.
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    driver.write(4096, &[1; 512]).unwrap();
    driver.close();
    assert!(entry(&file, "b").in_use());
    assert_eq!(runs(&load(&file, b"c").unwrap()), []);
    edit(&file, |b| b.remove(b"b").unwrap());
    assert_eq!(list(&file).unwrap().len(), 1);
    edit(&file, |b| b.remove(b"c").unwrap());
    let header = Header::read(&file).unwrap();
    assert_eq!(header.autoclear & features::BITMAPS, 0);
    assert!(
        header
            .extension(super::super::extensions::BITMAPS)
            .is_none()
    );
    // The first, killed use may have left clusters behind; nothing else.
    assert!(!matches!(opinion(&file.bytes()), Checked::Errors(_)));
}

#[test]
fn a_failing_disk_never_makes_a_wrong_bitmap() {
    let file = image(4096, 16);
    edit(&file, |b| b.add(b"b", Some(4096)).unwrap());
    let before = file.bytes();
    let mut failed = 0;
    for writes in 0..40 {
        let file = MemFile::of(before.clone());
        let mut driver = Driver::open(file.clone(), &OpenOptions::default());
        file.fail_after(Some(writes));
        let written = driver.write(8192, &[3; 4096]);
        let closed = driver.image.close(&[&file]);
        file.fail_after(None);
        if closed.is_ok() {
            // Closed is closed.
            assert!(driver.write(0, &[1; 512]).is_err());
        }
        let found = entry(&file, "b");
        assert!(!matches!(opinion(&file.bytes()), Checked::Errors(_)));
        match (found.in_use(), written.is_ok() && closed.is_ok()) {
            (true, done) => {
                assert!(!done);
                failed += 1;
            }
            (false, true) => {
                let bits = load(&file, b"b").unwrap();
                assert_eq!(runs(&bits), [(8192, 12288)]);
                assert!(failed > 3, "{failed}");
                return;
            }
            (false, false) => {}
        }
    }
    panic!("never enough writes");
}

#[test]
fn a_stale_extension_is_ignored_and_replaced() {
    let file = image(65536, 16);
    edit(&file, |b| b.add(b"b", None).unwrap());
    // As a program does that does not know bitmaps.
    file.patch(95, &[0]);
    assert_eq!(list(&file).unwrap(), []);
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    driver.write(0, &[1; 512]).unwrap();
    driver.close();
    assert_eq!(list(&file).unwrap(), []);
    edit(&file, |b| b.add(b"b", None).unwrap());
    assert_eq!(list(&file).unwrap().len(), 1);
    assert_eq!(opinion(&file.bytes()), Checked::Leaks);
}

/// Where the directory is.
fn directory_at(file: &MemFile) -> usize {
    let header = Header::read(file).unwrap();
    let extension = header.extension(super::super::extensions::BITMAPS).unwrap();
    u64::from_be_bytes(extension[16..24].try_into().unwrap()) as usize
}

#[test]
fn hostile_directories_are_refused_with_the_reason() {
    let sound = image(65536, 16);
    edit(&sound, |b| {
        b.add(b"one", None).unwrap();
        b.add(b"two", None).unwrap();
    });
    let at = directory_at(&sound);
    let cases: &[(usize, &[u8], &str)] = &[
        (0, &[0xff; 8], "at a cluster"),
        (8, &[0xff; 4], "too many entries"),
        (8, &[0; 4], "no or too many entries"),
        (8, &[0, 0, 0, 2], "the disk's size needs 1"),
        (12, &[0, 0, 0, 8], "reserved flags"),
        (16, &[2], "unknown type"),
        (17, &[8], "granularity"),
        (17, &[63], "granularity"),
        (18, &[0xff, 0xff], "too long a name"),
        (18, &[3, 0xe8], "ends behind the directory"),
        (20, &[0xff; 4], "ends behind the directory"),
        (32 + 24, b"one", "has the name of another one, 'one'"),
        (
            0,
            &[0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
            "behind the file's end",
        ),
        (0, &[0, 0, 0, 0, 0, 0, 0, 0], "at a cluster"),
    ];
    for (offset, bytes, text) in cases {
        let file = MemFile::of(sound.bytes());
        file.patch(at + offset, bytes);
        let image = Qcow2::open(&file, &OpenOptions::default()).unwrap();
        let why = image.describe().read_only_because.expect(text);
        assert!(why.contains(text), "{text}: {why}");
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        Driver::open(file.clone(), &options).read(0, 512).unwrap();
    }
    // The extension itself.
    let header = sound.bytes();
    let extension = header[..512]
        .windows(4)
        .position(|w| w == 0x2385_2875u32.to_be_bytes())
        .unwrap();
    for (offset, bytes, text) in [
        (0, &[0, 0, 0, 3][..], "ends behind the directory"),
        (0, &[0, 0, 0, 1], "have 32 bytes, not 64"),
        (0, &[0xff; 4], "65535"),
        (4, &[1], "reserved"),
        (8, &[0xff; 8], "too many bytes"),
        (8, &[0, 0, 0, 0, 3, 0xff, 0, 0], "behind the file's end"),
        (16, &[0, 0, 0, 1, 0, 0, 0, 0], "behind the file's end"),
        (16, &[0; 8], "points between clusters"),
    ] {
        let file = MemFile::of(sound.bytes());
        file.patch(extension + 8 + offset, bytes);
        let image = Qcow2::open(&file, &OpenOptions::default()).unwrap();
        let why = image.describe().read_only_because.expect(text);
        assert!(why.contains(text), "{text}: {why}");
    }
    // Over the header's own tables.
    let file = MemFile::of(sound.bytes());
    let header = Header::read(&file).unwrap();
    let l1 = header.l1_table_offset as usize;
    let directory = sound.bytes()[at..at + 64].to_vec();
    file.patch(l1, &directory);
    file.patch(extension + 24, &header.l1_table_offset.to_be_bytes());
    let image = Qcow2::open(&file, &OpenOptions::default()).unwrap();
    assert!(image.describe().read_only_because.is_some());
}

#[test]
fn too_much_memory_is_refused() {
    // A terabyte in sectors: 256 MiB of bits each, of which nothing is on disk.
    let file = MemFile::default();
    let options = CreateOptions {
        size: 1 << 40,
        ..CreateOptions::default()
    };
    create(&file, &options).unwrap();
    edit(&file, |b| {
        for name in [b"a", b"b", b"c"] {
            b.add(name, Some(512)).unwrap();
            b.set_enabled(name, false).unwrap();
        }
        let error = b.add(b"d", Some(1 << 32)).unwrap_err();
        assert!(error.to_string().contains("512 bytes to 2 GiB"), "{error}");
    });
    // Not through `set_enabled` of all, whose bits this test would have to read.
    let at = directory_at(&file);
    for nth in 0..3 {
        file.patch(at + nth * 32 + 15, &[2]);
    }
    let image = Qcow2::open(&file, &OpenOptions::default()).unwrap();
    let why = image.describe().read_only_because.unwrap();
    assert!(
        why.contains("768 MiB of memory, more than 512 MiB"),
        "{why}"
    );
}

#[test]
fn extra_data_is_kept_and_says_whether_the_bitmap_is_used() {
    // By hand: an entry with 8 bytes of extra data before its name, in the place of one without.
    let make = |flags: u8| {
        let file = image(65536, 16);
        edit(&file, |b| b.add(b"b-of-9-by", Some(4096)).unwrap());
        let at = directory_at(&file);
        let mut entry = file.bytes()[at..at + 40].to_vec();
        entry[15] = flags;
        entry[19] = 1;
        entry[23] = 8;
        entry[24..32].copy_from_slice(b"what is?");
        entry[32..40].copy_from_slice(b"b\0\0\0\0\0\0\0");
        file.patch(at, &entry);
        file
    };
    // Compatible, and enabled.
    let file = make(4 | 2);
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    driver.write(4096, &[1; 512]).unwrap();
    driver.close();
    assert_eq!(runs(&load(&file, b"b").unwrap()), [(4096, 8192)]);
    assert_eq!(entry(&file, "b").extra, b"what is?");
    assert_eq!(entry(&file, "b").flags, 4 | 2);
    // Enabled, but not to be used: then the disk must not change.
    let file = make(2);
    let image = Qcow2::open(&file, &OpenOptions::default()).unwrap();
    let why = image.describe().read_only_because.unwrap();
    assert!(why.contains("extra data"), "{why}");
    assert!(load(&file, b"b").is_err());
    // Disabled: it is in nobody's way.
    let file = make(0);
    let mut driver = Driver::open(file.clone(), &OpenOptions::default());
    driver.write(4096, &[1; 512]).unwrap();
    driver.close();
    edit(&file, |b| {
        assert!(b.clear(b"b").is_err());
    });
    let mut bitmaps = Bitmaps::open(&file).unwrap();
    bitmaps.add(b"more", None).unwrap();
    bitmaps.commit().unwrap();
    assert_eq!(entry(&file, "b").extra, b"what is?");
    edit(&file, |b| b.remove(b"b").unwrap());
}

#[test]
fn bitmaps_are_fitted_to_a_disk_of_another_size_as_qemu_does_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    for new in [SIZE + (1 << 20), SIZE - 512, 1 << 20, 64 << 20] {
        let file = image(512, 16);
        edit(&file, |b| {
            for (name, granularity) in [(&b"fine"[..], 512), (b"coarse", 1 << 20)] {
                b.add(name, Some(granularity)).unwrap();
                b.merge(name, &marked(9, &[(5000, 99_000), (SIZE - 9000, 9000)]))
                    .unwrap();
            }
        });
        fs::write(&path, file.bytes()).unwrap();
        let size = new.to_string();
        run("qemu-img", &["resize", "-q", "--shrink", name, &size]);
        let theirs = MemFile::of(fs::read(&path).unwrap());

        // The size alone, without what a resize does to the tables of the disk.
        let mut editor = Editor::open(&file, "t").unwrap();
        let mut header = editor.header().clone();
        resize(&mut editor, &mut header, new).unwrap();
        header.size = new;
        if header.l1_entries_needed() > u64::from(header.l1_size) {
            let entries = header.l1_entries_needed();
            let l1 = editor.allocate((entries * 8).div_ceil(512)).unwrap();
            editor.write(l1, &vec![0; entries as usize * 8]).unwrap();
            let old = u64::from(header.l1_size) * 8;
            editor
                .free(header.l1_table_offset, old.div_ceil(512))
                .unwrap();
            (header.l1_table_offset, header.l1_size) = (l1, entries as u32);
        }
        editor.set_header(header).unwrap();
        editor.commit().unwrap();
        drop(editor);
        for name in [&b"fine"[..], b"coarse"] {
            let (ours, theirs) = (load(&file, name).unwrap(), load(&theirs, name).unwrap());
            assert_eq!(ours.range(), 0..new);
            assert_eq!(runs(&ours), runs(&theirs), "{new}");
        }
        assert_eq!(opinion(&file.bytes()), Checked::Clean);
        let mut editor = Editor::open(&file, "t").unwrap();
        let mut header = editor.header().clone();
        assert!(resize(&mut editor, &mut header, 0).is_err());
    }
}

#[test]
fn qemu_lists_what_we_made_and_we_use_what_it_made() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    let file = image(65536, 16);
    edit(&file, |b| {
        b.add(b"ours", Some(1 << 20)).unwrap();
        b.set_enabled(b"ours", false).unwrap();
        b.merge(b"ours", &marked(9, &[(0, SIZE)])).unwrap();
    });
    fs::write(&path, file.bytes()).unwrap();
    run(
        "qemu-img",
        &["bitmap", "--add", "-g", "512", name, "theirs"],
    );
    run("qemu-img", &["bitmap", "--merge", "ours", name, "theirs"]);
    let info = run("qemu-img", &["info", "--output=json", name]);
    for text in ["\"ours\"", "\"theirs\"", "1048576", "512", "auto"] {
        assert!(info.contains(text), "{text}: {info}");
    }
    let file = MemFile::of(fs::read(&path).unwrap());
    assert_eq!(runs(&load(&file, b"theirs").unwrap()), [(0, SIZE)]);
    assert!(entry(&file, "theirs").auto() && !entry(&file, "ours").auto());
    assert_eq!(entry(&file, "theirs").granularity(), 512);
    let writes = file
        .journal()
        .iter()
        .filter(|c| matches!(c, Change::Write(..)))
        .count();
    assert_eq!(writes, 0);
}
