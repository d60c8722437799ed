//! Sound images whose file is cut off anywhere: what the disk reads as is what it was, or an error, and never something else; a check
//! that finds nothing is right; and what may be changed may be changed without a loss.

use super::abuse;
use super::kinds::{self, KINDS, Kind};
use super::plain;
use block::{Result, Storage};
use disk::blocking::Driver;
use std::sync::Arc;
use testkit::forge::{Forge, Shape, field};
use testkit::memory::Memory;
use testkit::rich;
use tool::check::{CheckOptions, Repair, check, mend_dirty, refuse_cut_off};

const SECTOR: u64 = 512;
/// Which rich image is encrypted.
const ENCRYPTED: usize = rich::KINDS - 4;

/// Of each sector that is looked at its bytes, or that they cannot be read.
type Sectors = Vec<(u64, Option<Vec<u8>>)>;

/// The sectors of a driver's disk: of a small one all, of a large one those of clusters with data and of some without.
fn sectors(mut driver: Driver) -> Sectors {
    let size = driver.size();
    let few = kinds::clusters(size).into_iter();
    let from = few.chain((0..size.min(256 << 10)).step_by(kinds::CLUSTER as usize));
    let at = from.flat_map(|at| (at..at + kinds::CLUSTER).step_by(SECTOR as usize));
    let read = |at: u64| {
        let mut bytes = vec![0; SECTOR.min(size - at) as usize];
        (at, driver.read(at, &mut bytes).ok().map(|()| bytes))
    };
    at.filter(|at| *at < size).map(read).collect()
}

/// The first sector that reads as something that it was not.
fn wrong<'a>(whole: &'a Sectors, cut: &'a Sectors) -> Option<&'a u64> {
    let mut pairs = whole.iter().zip(cut);
    pairs.find_map(|((at, was), (_, is))| (is.is_some() && is != was).then_some(at))
}

/// How a kind of image is used: opened (for reading only), checked (whether all is well), and asked whether it may be changed.
struct Uses<'a> {
    open: &'a dyn Fn(&Arc<Memory>, bool) -> Result<Driver>,
    is_sound: &'a dyn Fn(&Arc<Memory>) -> Option<bool>,
    may_change: &'a dyn Fn(&Arc<Memory>) -> bool,
    /// Its data are encrypted, and there is no passphrase.
    locked: bool,
    /// How many lengths pass a check, and may be changed, at least.
    least: (u32, u32),
}

fn judge(what: &str, bytes: &[u8], step: usize, uses: &Uses) {
    let file = |len: usize| kinds::storage(&bytes[..len]);
    let whole = sectors((uses.open)(&file(bytes.len()), true).expect("it is sound"));
    let readable = whole.iter().filter(|(_, bytes)| bytes.is_some()).count();
    assert!(readable > whole.len() / 2 || uses.locked, "{what}");
    let (mut read, mut changed, mut passed) = (0, 0, 0);
    for len in (0..=bytes.len()).rev().step_by(step) {
        let what = format!("{what}: {len} of {} bytes", bytes.len());
        for read_only in [true, false] {
            let Ok(driver) = (uses.open)(&file(len), read_only) else {
                continue;
            };
            let cut = sectors(driver);
            assert_eq!(wrong(&whole, &cut), None, "{what}, read only: {read_only}");
            read += 1;
            if read_only && (uses.is_sound)(&file(len)) == Some(true) {
                assert_eq!(cut, whole, "{what}: a check found nothing");
                passed += 1;
            }
        }
        let changing = file(len);
        if let (true, Ok(mut driver)) =
            ((uses.may_change)(&changing), (uses.open)(&changing, false))
        {
            // The file becomes longer.
            let size = driver.size();
            let places: Vec<u64> = (0..size).step_by((size / 7) as usize & !511).collect();
            for at in &places {
                let _ = driver.write(*at, &[0xa5; SECTOR as usize]);
            }
            let _ = driver.close();
            let mut after = sectors((uses.open)(&changing, true).expect("it was open"));
            // What was written, or begun to be.
            after.retain(|(at, _)| !places.contains(at));
            let mut whole = whole.clone();
            whole.retain(|(at, _)| !places.contains(at));
            assert_eq!(wrong(&whole, &after), None, "{what}: after a change");
            changed += 1;
        }
    }
    // The whole one at least.
    eprintln!("{what}: read {read}, sound {passed}, changed {changed}");
    assert!(
        read > 0 && passed >= uses.least.0 && changed >= uses.least.1,
        "{what}"
    );
}

#[test]
fn a_qcow2_disk_whose_file_is_cut_off_never_reads_as_something_else() {
    let images = (0..rich::KINDS).map(rich::kind).chain([plain()]);
    for (nth, image) in images.enumerate() {
        judge(
            &format!("qcow2 {nth}"),
            &image.bytes,
            SECTOR as usize,
            &Uses {
                open: &abuse::driver,
                is_sound: &|file| {
                    let report = check(&**file, &CheckOptions::default()).ok()?;
                    Some(abuse::sound(&report) && report.cut_off == 0)
                },
                may_change: &|file| refuse_cut_off(&**file).is_ok(),
                locked: nth == ENCRYPTED,
                // Those before it have snapshots that share what QEMU gives each of them.
                least: (1, u32::from(nth == rich::KINDS)),
            },
        );
    }
}

#[test]
fn a_disk_of_another_format_whose_file_is_cut_off_never_reads_as_something_else() {
    for kind in KINDS {
        let bytes = kind.sound();
        let checks = !matches!(kind, Kind::Qcow | Kind::Bochs | Kind::Cloop | Kind::Dmg);
        // Tables of the others are looked at when they are used.
        let changes = matches!(kind, Kind::Vhd(_) | Kind::Vdi | Kind::Vhdx);
        let step = (bytes.len() as u64 / 200 / SECTOR * SECTOR).max(SECTOR);
        judge(
            &format!("{kind:?}"),
            &bytes,
            step as usize,
            &Uses {
                open: &|file, read_only| kind.driver(file, read_only),
                is_sound: &|file| checks.then(|| kinds::is_sound(&kind.check(file, Repair::No))),
                may_change: &|_| changes,
                locked: false,
                least: (u32::from(checks), u32::from(changes)),
            },
        );
    }
}

/// The last entries of a table, in a sector of which the file has a part; and the same with refcounts that were postponed.
#[test]
fn not_even_the_end_of_a_tables_last_sector_may_be_lost() {
    let shape = Shape::default();
    let cluster = 1 << shape.cluster_bits;
    let last = cluster / 8 - 1;
    let shape = Shape {
        size: cluster * cluster / 8,
        ..shape
    };
    let mut image = Forge::new(shape).data(last, 7);
    let word = |at: u64| u64::from_be_bytes(image.bytes[at as usize..][..8].try_into().unwrap());
    let table = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    for dirty in [false, true] {
        if dirty {
            image = image.put_u64(field::INCOMPATIBLE, 1);
        }
        for lost in [1, 8, 64, 511, 512, 520, cluster] {
            let cut = || kinds::storage(&image.bytes[..(table + cluster - lost) as usize]);
            let mut bytes = [0; 512];
            let read = abuse::driver(&cut(), true)
                .and_then(|mut driver| driver.read(last * cluster, &mut bytes));
            assert!(read.is_err(), "{lost}");
            assert!(abuse::driver(&cut(), false).is_err(), "{lost}");
            assert!(refuse_cut_off(&*cut()).is_err(), "{lost}");
            assert!(
                check(&*cut(), &CheckOptions::default()).unwrap().tables_cut,
                "{lost}"
            );
            let (repaired, before) = (cut(), cut());
            let sparing = CheckOptions {
                repair: Repair::All,
                spare_cut_off: true,
                ..CheckOptions::default()
            };
            let error = check(&*repaired, &sparing).unwrap_err().to_string();
            assert!(error.contains("not repaired"), "{lost}: {error}");
            assert_eq!(repaired.done().changes, 0, "{lost}");
            let mended = cut();
            assert_eq!(mend_dirty(&*mended).is_err(), dirty, "{lost}");
            assert_eq!(mended.len().unwrap(), before.len().unwrap(), "{lost}");
        }
    }
}

/// Pages of a table are read that the file ends within, behind the table.
#[test]
fn a_small_file_is_whole() {
    let disk: Vec<u8> = (0..1024u32).map(|n| n as u8).collect();
    let bytes = testkit::cloop::image(512, &disk, testkit::cloop::stored);
    assert!(bytes.len() < 4096);
    let mut read = vec![0; disk.len()];
    let mut driver = Kind::Cloop.driver(&kinds::storage(&bytes), true).unwrap();
    driver.read(0, &mut read).unwrap();
    assert!(read == disk);
}
