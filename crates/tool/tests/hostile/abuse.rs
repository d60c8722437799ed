//! Uses an image in every way that there is, whatever it is. The fuzz targets of qcow2 do the same, each a part of it.

use block::{Error, ErrorKind, Result, Storage};
use crypto::Passphrase;
use crypto::luks::Erase;
use disk::blocking::{Driver, Member};
use image::qcow2::bitmap::{self, Bitmaps};
use image::qcow2::crypt::luks_header;
use image::qcow2::snapshot::{self, NewSnapshot};
use image::qcow2::{self, AmendOptions, Header, OpenOptions, Qcow2};
use image::{Format, Image as _};
use std::sync::Arc;
use testkit::memory::{Meddling, Memory};
use tool::check::{CheckOptions, Repair, Report, check};
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};

/// Bytes that a hostile image may have us write on top of its own.
const SPACE: u64 = 48 << 20;
/// Calls of the storage for each way of use. Who takes more is taken to hang.
const CALLS_MAX: u64 = 400_000;
/// Extents that are looked at from each place.
const EXTENTS: usize = 100;
/// Bytes of a read or write.
const PIECE: u64 = 9000;

/// Bytes of the disk that are read to compare them.
const READ_MAX: u64 = 256 << 10;
/// Iterations of PBKDF2 that are tried: a header may ask for minutes of them.
const ITERATIONS_MAX: u64 = 20_000;

/// A way to use an image.
type Use = fn(&Arc<Memory>) -> Result<()>;

/// Something that is done to images which nobody has open.
pub type Edit = (&'static str, Use);

/// All of them. Ids and names are those of the forge.
pub const EDITS: &[Edit] = &[
    ("make a snapshot", |storage| {
        let new = NewSnapshot {
            name: "new".into(),
            ..NewSnapshot::default()
        };
        snapshot::create(&**storage, &new).map(drop)
    }),
    ("apply a snapshot", |storage| {
        snapshot::apply(&**storage, "1").map(drop)
    }),
    ("delete a snapshot", |storage| {
        snapshot::delete(&**storage, "snap").map(drop)
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
        let source = bitmap::load(&**storage, b"bits")?;
        source.mark_all();
        bitmaps(storage, |all| all.merge(b"bits", &source))
    }),
    ("version 2", |storage| {
        amended(storage, |options| options.version = Some(2))
    }),
    ("version 3", |storage| {
        amended(storage, |options| {
            options.version = Some(3);
            options.lazy_refcounts = Some(true);
        })
    }),
    ("refcounts of 1 bit", |storage| {
        amended(storage, |options| options.refcount_bits = Some(1))
    }),
    ("refcounts of 64 bits", |storage| {
        amended(storage, |options| options.refcount_bits = Some(64))
    }),
    ("grow", |storage| {
        sized(storage, |size| size.next_multiple_of(512) + (3 << 20))
    }),
    ("grow, with metadata", |storage| {
        sized_with(
            storage,
            |size| size.next_multiple_of(512) + (1 << 20),
            Preallocation::Metadata,
        )
    }),
    ("shrink", |storage| sized(storage, |size| (size / 3) & !511)),
    ("shrink to nothing", |storage| sized(storage, |_| 0)),
    ("erase a key", |storage| {
        let header = Header::read(&**storage)?;
        let (at, mut luks) = luks_header(&**storage, &header)?;
        luks.erase_keys(&**storage, at, Erase::Slot(0), true)
            .map(drop)
    }),
];

fn bitmaps(storage: &Arc<Memory>, edit: impl FnOnce(&mut Bitmaps) -> Result<()>) -> Result<()> {
    let mut all = Bitmaps::open(&**storage)?;
    edit(&mut all)?;
    all.commit()
}

fn amended(storage: &Arc<Memory>, set: impl FnOnce(&mut AmendOptions)) -> Result<()> {
    let mut options = AmendOptions::default();
    set(&mut options);
    // As the command does: what can be refused is refused before anything is written.
    options.validate(&Header::read(&**storage)?)?;
    qcow2::amend(&**storage, &storage.name(), &options)
}

fn sized(storage: &Arc<Memory>, new: fn(u64) -> u64) -> Result<()> {
    sized_with(storage, new, Preallocation::Off)
}

fn sized_with(
    storage: &Arc<Memory>,
    new: fn(u64) -> u64,
    preallocation: Preallocation,
) -> Result<()> {
    let member = member(storage, false)?;
    let options = ResizeOptions {
        size: new(member.image.size()),
        shrink: true,
        preallocation,
    };
    resize(&[member], Format::Qcow2, &options).map(drop)
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
/// When reading or checking changes the file, when opening for writing changes more than one field of it, when what a
/// repair reports is not what a check finds afterwards, when the storage is called beyond all measure; and of course
/// when the code under test panics.
#[allow(dead_code, reason = "a fuzz target does a part of it")]
pub fn abuse(bytes: &[u8]) -> Outcome {
    let open = open(bytes);
    let _ = written(bytes);
    let check = checked(bytes);
    for edit in EDITS {
        edited(bytes, edit, check.as_ref().is_ok_and(sound));
    }
    repaired(bytes, open.is_ok());
    Outcome { open, check }
}

/// Opens it, maps and reads.
pub fn open(bytes: &[u8]) -> Result<()> {
    let opening = storage(bytes);
    let open = driver(&opening, false).map(drop);
    let changes = opening.done().changes;
    assert!(changes <= 1, "opening wrote more than the autoclear bits");
    let reading = storage(bytes);
    let open = open.and(read(&reading));
    let _ = snapshot::list(&*reading);
    let _ = bitmap::list(&*reading);
    let _ = bitmap::load(&*reading, b"bits");
    let _ = unlocked(&reading);
    let past = OpenOptions {
        read_only: true,
        snapshot: Some("1".into()),
        ..OpenOptions::default()
    };
    if let Ok(image) = Qcow2::open(&*reading, &past) {
        let _ = driven(&reading, image, true).and_then(read_all);
    }
    assert_eq!(reading.done().changes, 0, "reading wrote");
    open
}

/// Opens an encrypted image with a passphrase.
fn unlocked(storage: &Arc<Memory>) -> Result<()> {
    let header = Header::read(&**storage)?;
    let (_, luks) = luks_header(&**storage, &header)?;
    let slots = luks.slots.iter().filter(|slot| slot.active);
    let iterations: u64 = slots
        .map(|slot| u64::from(slot.iterations) + u64::from(luks.iterations))
        .sum();
    if iterations > ITERATIONS_MAX {
        return Ok(());
    }
    let options = OpenOptions {
        passphrase: Some(Arc::new(Passphrase::new(b"secret".to_vec().into())?)),
        ..OpenOptions::default()
    };
    let image = Qcow2::open(&**storage, &options)?;
    read_all(driven(storage, image, true)?)
}

/// Checks it.
pub fn checked(bytes: &[u8]) -> Result<Report> {
    let checking = storage(bytes);
    let report = check(&*checking, &repairing(Repair::No));
    assert_eq!(checking.done().changes, 0, "a check wrote");
    report
}

/// Whether a check found nothing that could make an edit do harm.
pub fn sound(report: &Report) -> bool {
    (report.corruptions, report.check_errors) == (0, 0)
}

fn repairing(repair: Repair) -> CheckOptions {
    CheckOptions {
        repair,
        ..CheckOptions::default()
    }
}

/// Edits it. What an edit leaves, done or refused, is sound if it was before.
pub fn edited(bytes: &[u8], (what, edit): &Edit, was_sound: bool) {
    let storage = storage(bytes);
    let done = edit(&storage);
    if was_sound && storage.done().changes > 0 {
        let after =
            check(&*storage, &repairing(Repair::No)).expect("an edited image can be checked");
        assert!(
            sound(&after),
            "after '{what}' ({done:?}): {:?}",
            after.findings
        );
        if !["apply a snapshot", "erase a key"].contains(what) {
            let (before, after) = (content(&self::storage(bytes)), content(&storage));
            let len = match (&before, &after) {
                (Ok(before), Ok(after)) => before.len().min(after.len()),
                _ => 0,
            };
            let same = match (&before, &after) {
                (Ok(before), Ok(after)) => before[..len] == after[..len],
                (before, after) => before.is_err() || after.is_ok(),
            };
            assert!(same, "after '{what}' ({done:?}) the disk reads otherwise");
        }
    }
}

/// What the disk reads as, up to a bound.
fn content(storage: &Arc<Memory>) -> Result<Vec<u8>> {
    let mut driver = driver(storage, true)?;
    let mut bytes = vec![0; driver.size().min(READ_MAX) as usize];
    driver.read(0, &mut bytes)?;
    Ok(bytes)
}

/// Repairs it, in both ways. Whether it could be read before is known.
pub fn repaired(bytes: &[u8], readable: bool) {
    for repair in [Repair::Leaks, Repair::All] {
        let storage = storage(bytes);
        if let Ok(repaired) = check(&*storage, &repairing(repair)) {
            let after =
                check(&*storage, &repairing(Repair::No)).expect("what was repaired can be checked");
            let left = |report: &Report| (report.corruptions, report.leaks, report.check_errors);
            assert_eq!(
                left(&repaired),
                left(&after),
                "{repair:?} reports what is not so"
            );
            // A repair never costs what could be read before.
            if readable {
                driver(&storage, false)
                    .map(drop)
                    .and(read(&storage))
                    .expect("a repaired image is as good as before");
            }
        }
    }
}

/// Uses it in one way (which is taken modulo their number) while somebody else changes the file, before the call of
/// that number. It may fail, and may leave anything.
///
/// # Panics
///
/// When the storage is called beyond all measure, or the code under test panics.
pub fn meddled(bytes: &[u8], way: u8, call: u64, meddling: Meddling) {
    let storage = Memory::new(bytes, SPACE, CALLS_MAX).meddled(call, meddling);
    let storage = Arc::new(storage);
    let edits = EDITS.iter().map(|(_, edit)| *edit);
    let others: [Use; 6] = [
        read,
        write,
        unlocked,
        |storage| check(&**storage, &repairing(Repair::No)).map(drop),
        |storage| check(&**storage, &repairing(Repair::Leaks)).map(drop),
        |storage| check(&**storage, &repairing(Repair::All)).map(drop),
    ];
    let ways: Vec<_> = others.into_iter().chain(edits).collect();
    let _ = ways[usize::from(way) % ways.len()](&storage);
}

pub fn storage(bytes: &[u8]) -> Arc<Memory> {
    Arc::new(Memory::new(bytes, SPACE, CALLS_MAX))
}

pub fn driver(storage: &Arc<Memory>, read_only: bool) -> Result<Driver> {
    Driver::new(vec![member(storage, read_only)?], read_only)
}

fn driven(storage: &Arc<Memory>, image: Qcow2, read_only: bool) -> Result<Driver> {
    let files = vec![Arc::clone(storage) as Arc<dyn Storage>];
    let image = Arc::new(image);
    Driver::new(vec![Member { image, files }], read_only)
}

fn member(storage: &Arc<Memory>, read_only: bool) -> Result<Member> {
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
    Ok(Member { image, files })
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
    read_all(driver(storage, true)?)
}

fn read_all(mut driver: Driver) -> Result<()> {
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

/// Opens it, and writes in all ways.
///
/// # Errors
///
/// What failed first.
pub fn written(bytes: &[u8]) -> Result<()> {
    write(&storage(bytes))
}

/// Compresses the cluster at `at` where it is; and gives a place for it up.
fn pack(storage: &Arc<Memory>, driver: &mut Driver, at: u64) -> Result<()> {
    let cluster = Header::read(&**storage)?.cluster_size();
    let at = at / cluster * cluster;
    let mut packed = Vec::new();
    if !driver
        .packer()?
        .pack(&vec![7; cluster as usize], &mut packed)
    {
        return Ok(());
    }
    drop(driver.place_packed(at, packed.len() as u32)?);
    driver.write_packed(at, &packed)
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
        results.push(pack(storage, &mut driver, at));
        results.push(driver.discard(at, len));
        if nth % 3 == 0 {
            results.push(driver.flush());
        }
    }
    results.push(driver.write(0, &[1; 1][..size.min(1) as usize]));
    driver.close()?;
    results.into_iter().collect()
}
