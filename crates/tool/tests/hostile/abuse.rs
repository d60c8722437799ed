//! Uses an image in every way that there is, whatever it is. The fuzz target of qcow2 does the same.

use block::{Error, ErrorKind, Result, Storage};
use disk::blocking::{Driver, Member};
use image::Image as _;
use image::qcow2::bitmap::{self, Bitmaps};
use image::qcow2::snapshot::{self, NewSnapshot};
use image::qcow2::{OpenOptions, Qcow2};
use std::sync::Arc;
use testkit::memory::Memory;
use tool::check::{CheckOptions, Repair, Report, check};

/// Bytes that a hostile image may have us write on top of its own.
const SPACE: u64 = 48 << 20;
/// Calls of the storage for each way of use. Who takes more is taken to hang.
const CALLS_MAX: u64 = 400_000;
/// Extents that are looked at from each place.
const EXTENTS: usize = 100;
/// Bytes of a read or write.
const PIECE: u64 = 9000;

type Edit = fn(&dyn Storage) -> Result<()>;

/// What is done to images that nobody has open. The ids are those of the forge.
const EDITS: &[(&str, Edit)] = &[
    ("make a snapshot", |storage| {
        let name = "new".into();
        snapshot::create(
            storage,
            &NewSnapshot {
                name,
                ..NewSnapshot::default()
            },
        )
        .map(drop)
    }),
    ("apply a snapshot", |storage| {
        snapshot::apply(storage, "1").map(drop)
    }),
    ("add a bitmap", |storage| {
        bitmaps(storage, |all| all.add(b"new", None))
    }),
    ("remove a bitmap", |storage| {
        bitmaps(storage, |all| all.remove(b"bits"))
    }),
    ("clear a bitmap", |storage| {
        bitmaps(storage, |all| all.clear(b"bits"))
    }),
    ("disable a bitmap", |storage| {
        bitmaps(storage, |all| all.set_enabled(b"bits", false))
    }),
    ("merge bitmaps", |storage| {
        let source = bitmap::load(storage, b"bits")?;
        source.mark_all();
        bitmaps(storage, |all| all.merge(b"bits", &source))
    }),
    ("delete a snapshot", |storage| {
        snapshot::delete(storage, "snap").map(drop)
    }),
];

fn bitmaps(storage: &dyn Storage, edit: impl FnOnce(&mut Bitmaps) -> Result<()>) -> Result<()> {
    let mut all = Bitmaps::open(storage)?;
    edit(&mut all)?;
    all.commit()
}

/// What became of it.
#[derive(Debug)]
#[allow(dead_code, reason = "a fuzz target looks at neither")]
pub struct Outcome {
    /// Opened for writing, then mapped and read at some places: what failed first.
    pub open: Result<()>,
    /// A check without a repair.
    pub check: Result<Report>,
}

/// Uses the image for all it is worth.
///
/// # Panics
///
/// When reading or checking changes the file, when opening for writing changes more than one field of it, when what a repair reports is not what a check finds afterwards, when the
/// storage is called beyond all measure; and of course when the code under test panics.
pub fn abuse(bytes: &[u8]) -> Outcome {
    let opening = storage(bytes);
    let open = driver(&opening, false).map(drop);
    let changes = opening.done().changes;
    assert!(changes <= 1, "opening wrote more than the autoclear bits");
    let reading = storage(bytes);
    let open = open.and(read(&reading));
    let _ = snapshot::list(&*reading);
    let _ = bitmap::list(&*reading);
    let _ = bitmap::load(&*reading, b"bits");
    assert_eq!(reading.done().changes, 0, "reading wrote");

    let checking = storage(bytes);
    let options = |repair| CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let report = check(&*checking, &options(Repair::No));
    assert_eq!(checking.done().changes, 0, "a check wrote");

    let _ = write(&storage(bytes));

    // What an edit leaves, done or refused, is sound if it was before.
    let sound = report
        .as_ref()
        .is_ok_and(|r| (r.corruptions, r.check_errors) == (0, 0));
    for (what, edit) in EDITS {
        let storage = storage(bytes);
        let done = edit(&*storage);
        if sound && storage.done().changes > 0 {
            let after =
                check(&*storage, &options(Repair::No)).expect("an edited image can be checked");
            assert_eq!(
                (after.corruptions, after.check_errors),
                (0, 0),
                "after '{what}' ({done:?}): {:?}",
                after.findings
            );
        }
    }

    for repair in [Repair::Leaks, Repair::All] {
        let storage = storage(bytes);
        if let Ok(repaired) = check(&*storage, &options(repair)) {
            let after =
                check(&*storage, &options(Repair::No)).expect("what was repaired can be checked");
            let left = |report: &Report| (report.corruptions, report.leaks, report.check_errors);
            assert_eq!(
                left(&repaired),
                left(&after),
                "{repair:?} reports what is not so"
            );
            // A repair never costs what could be read before.
            if open.is_ok() {
                driver(&storage, false)
                    .map(drop)
                    .and(read(&storage))
                    .expect("a repaired image is as good as before");
            }
        }
    }
    Outcome {
        open,
        check: report,
    }
}

fn storage(bytes: &[u8]) -> Arc<Memory> {
    Arc::new(Memory::new(bytes, SPACE, CALLS_MAX))
}

fn driver(storage: &Arc<Memory>, read_only: bool) -> Result<Driver> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    let image = Qcow2::open(&**storage, &options)?;
    if let (false, Some(why)) = (read_only, image.describe().read_only_because) {
        let text = format!("{}: can only be read: {why}", storage.name());
        return Err(Error::new(ErrorKind::ReadOnly, text));
    }
    let files = vec![Arc::clone(storage) as Arc<dyn Storage>];
    let image = Arc::new(image);
    Driver::new(vec![Member { image, files }], read_only)
}

/// Places worth a look: the ends, and a few between.
fn places(size: u64) -> impl Iterator<Item = u64> {
    [
        0,
        1,
        4096,
        65536,
        1 << 20,
        1 << 30,
        size / 2,
        size.saturating_sub(PIECE),
        size.saturating_sub(1),
    ]
    .into_iter()
    .filter(move |at| *at < size)
}

fn read(storage: &Arc<Memory>) -> Result<()> {
    let mut driver = driver(storage, true)?;
    let (size, mut first) = (driver.size(), Ok(()));
    let mut buf = [0; PIECE as usize];
    for start in places(size) {
        let mut at = start;
        for _ in 0..EXTENTS {
            if at >= size {
                break;
            }
            match driver.extent_at(at, size - at) {
                Ok(extent) => at += extent.len,
                Err(error) => {
                    first = first.and(Err(error));
                    break;
                }
            }
        }
        let len = (size - start).min(PIECE) as usize;
        let read = driver.read(start, &mut buf[..len]);
        first = first.and(read);
    }
    // All of a small disk, as a guest would.
    let mut at = 0;
    while at < size.min(1 << 20) {
        let len = (size - at).min(PIECE) as usize;
        first = first.and(driver.read(at, &mut buf[..len]));
        at += len as u64;
    }
    first
}

fn write(storage: &Arc<Memory>) -> Result<()> {
    let mut driver = driver(storage, false)?;
    let size = driver.size();
    let mut results = Vec::new();
    for (nth, at) in places(size).enumerate() {
        let len = (size - at).min(PIECE);
        results.push(driver.write(at, &vec![nth as u8; len as usize]));
        results.push(driver.write_zeroes(at, len, nth % 2 == 0));
        results.push(driver.write(at, &[9; 1]));
        results.push(driver.discard(at, len));
        if nth % 3 == 0 {
            results.push(driver.flush());
        }
    }
    results.push(driver.write(0, &[1; 1][..size.min(1) as usize]));
    driver.close()?;
    results.into_iter().collect()
}
