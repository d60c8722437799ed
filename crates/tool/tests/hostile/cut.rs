//! Sound images whose file is cut off anywhere: what the disk reads as is what it was, or an error, and never something else; a check
//! that finds nothing is right; and what may be changed may be changed without a loss.

use super::abuse;
use super::kinds::{self, KINDS, Kind};
use super::plain;
use block::Result;
use disk::blocking::Driver;
use std::sync::Arc;
use testkit::memory::Memory;
use testkit::rich;
use tool::check::{CheckOptions, Repair, check, refuse_cut_off};

const SECTOR: u64 = 512;

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
}

fn judge(what: &str, bytes: &[u8], step: usize, uses: &Uses) {
    let file = |len: usize| kinds::storage(&bytes[..len]);
    let whole = sectors((uses.open)(&file(bytes.len()), true).expect("it is sound"));
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
    eprintln!("{what}: read {read}, sound {passed}, changed {changed}");
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
            },
        );
    }
}

#[test]
fn a_disk_of_another_format_whose_file_is_cut_off_never_reads_as_something_else() {
    for kind in KINDS {
        let bytes = kind.sound();
        let step = (bytes.len() as u64 / 200 / SECTOR * SECTOR).max(SECTOR);
        judge(
            &format!("{kind:?}"),
            &bytes,
            step as usize,
            &Uses {
                open: &|file, read_only| kind.driver(file, read_only),
                is_sound: &|file| match kind {
                    // These have no check.
                    Kind::Qcow | Kind::Bochs | Kind::Cloop | Kind::Dmg => None,
                    _ => Some(kinds::is_sound(&kind.check(file, Repair::No))),
                },
                // Tables of the others are looked at when they are used.
                may_change: &|_| matches!(kind, Kind::Vhd(_) | Kind::Vdi | Kind::Vhdx),
            },
        );
    }
}
