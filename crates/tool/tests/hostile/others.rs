//! QED, VHD, VDI and Parallels images, cut off or damaged anywhere: opened, mapped, read, written, checked, repaired and edited. The
//! rules are those of qcow2 (`abuse`), and one more: a write harms nothing that it does not write.

use super::{ALLOCATOR, BYTES_MAX, MEASURING};
use block::{Error, ErrorKind, Result, Storage};
use disk::blocking::{Driver, Member};
use image::vhd::DiskType;
use image::{Format, Image, Parallels, qed, vdi, vhd};
use proptest::prelude::*;
use std::sync::{Arc, PoisonError};
use testkit::memory::{Meddling, Memory};
use testkit::vhd::seal;
use tool::check::{self, CheckOptions, Repair, Report};
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};

/// Bytes of a QED cluster and of a VHD or VDI block.
const CLUSTER: u64 = 4096;
/// Bytes of the disk behind a QED table: of one cluster.
const REACH: u64 = CLUSTER / 8 * CLUSTER;
/// As in `abuse`.
const SPACE: u64 = 48 << 20;
const CALLS_MAX: u64 = 400_000;

/// The images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Qed,
    Vhd(DiskType),
    Vdi,
    Parallels,
}

const KINDS: [Kind; 6] = [
    Kind::Qed,
    Kind::Vhd(DiskType::Dynamic),
    Kind::Vhd(DiskType::Differencing),
    Kind::Vhd(DiskType::Fixed),
    Kind::Vdi,
    Kind::Parallels,
];

fn storage(bytes: &[u8]) -> Arc<Memory> {
    Arc::new(Memory::new(bytes, SPACE, CALLS_MAX))
}

impl Kind {
    fn format(self) -> Format {
        match self {
            Kind::Qed => Format::Qed,
            Kind::Vhd(_) => Format::Vhd,
            Kind::Vdi => Format::Vdi,
            Kind::Parallels => Format::Parallels,
        }
    }

    /// A sound image with data in several of its tables or blocks, and none in others.
    fn sound(self) -> Vec<u8> {
        let file = storage(&[]);
        match self {
            Kind::Parallels => return parallels(),
            Kind::Qed => qed::create(
                &*file,
                &qed::CreateOptions {
                    size: 3 * REACH,
                    cluster_size: CLUSTER,
                    table_size: 1,
                    backing: None,
                },
            ),
            Kind::Vhd(disk_type) => vhd::create(
                &*file,
                &vhd::CreateOptions {
                    size: 75 * CLUSTER,
                    disk_type,
                    force_size: true,
                    block_bytes: CLUSTER as u32,
                    parent: (disk_type == DiskType::Differencing).then(|| vhd::NewParent {
                        name: "base.vhd".into(),
                        absolute: "/base.vhd".into(),
                        unique_id: vhd::UniqueId([7; 16]),
                        timestamp: 0,
                    }),
                },
            ),
            Kind::Vdi => vdi::create(
                &*file,
                &vdi::CreateOptions {
                    size: 75 * CLUSTER,
                    block_bytes: CLUSTER as u32,
                    ..vdi::CreateOptions::default()
                },
            ),
        }
        .expect("a new image");
        let mut driver = self.driver(&file, false).expect("a sound image");
        for at in [0, CLUSTER, 3 * CLUSTER + 512, 7 * CLUSTER, REACH + CLUSTER] {
            if at < driver.size() {
                driver.write(at, &[at as u8 | 1; 3000]).expect("a write");
            }
        }
        driver.close().expect("a close");
        let mut bytes = vec![0; file.len().expect("a length") as usize];
        file.read_at(0, &mut bytes).expect("its bytes");
        bytes
    }

    fn member(self, file: &Arc<Memory>, read_only: bool) -> Result<Member> {
        let image: Arc<dyn Image> = match self {
            Kind::Qed => Arc::new(qed::Qed::open(
                &**file,
                &qed::OpenOptions {
                    read_only,
                    ..qed::OpenOptions::default()
                },
            )?),
            Kind::Vhd(_) => Arc::new(vhd::Vhd::open(
                &**file,
                &vhd::OpenOptions {
                    read_only,
                    ..vhd::OpenOptions::default()
                },
            )?),
            Kind::Parallels => Arc::new(Parallels::open(&**file)?),
            Kind::Vdi => Arc::new(vdi::Vdi::open(&**file, &vdi::OpenOptions { read_only })?),
        };
        if let (false, Some(why)) = (read_only, image.describe().read_only_because) {
            let text = format!("{}: can only be read: {why}", file.name());
            return Err(Error::new(ErrorKind::ReadOnly, text));
        }
        let files = vec![Arc::clone(file) as Arc<dyn Storage>];
        Ok(Member { image, files })
    }

    fn driver(self, file: &Arc<Memory>, read_only: bool) -> Result<Driver> {
        Driver::new(vec![self.member(file, read_only)?], read_only)
    }

    fn check(self, file: &Memory, repair: Repair) -> Result<Report> {
        let options = CheckOptions {
            repair,
            ..CheckOptions::default()
        };
        match self {
            Kind::Qed => check::qed::check(file, &options),
            Kind::Vhd(_) => check::vhd::check(file, &options),
            Kind::Vdi => check::vdi::check(file, &options),
            Kind::Parallels => check::parallels::check(file, &options),
        }
    }

    /// What is done to closed images.
    fn edits(self) -> &'static [Edit] {
        match self {
            Kind::Qed => &[
                grow,
                |_, file| qed::rebase::set_backing(&**file, Some(("below", true))),
                |_, file| qed::rebase::empty(&**file),
                |_, file| check::qed::mend(&**file).map(drop),
            ],
            Kind::Vhd(_) => &[grow, |_, file| vhd::mend(&**file).map(drop)],
            Kind::Vdi => &[grow, |_, file| vdi::mend(&**file).map(drop)],
            Kind::Parallels => &[grow],
        }
    }
}

/// A Parallels image with clusters of the same size, in no order.
fn parallels() -> Vec<u8> {
    let entries: [u32; 20] = std::array::from_fn(|n| match n {
        0 | 1 | 3 => 4 - n as u32,
        _ => 0,
    });
    let head = [2u32, 16, 40, 8, 20, 160, 0, 0x312e_3276, 8, 0, 0, 0];
    let mut bytes = b"WithouFreSpacExt".to_vec();
    bytes.extend(
        head.iter()
            .chain(&entries)
            .flat_map(|word| word.to_le_bytes()),
    );
    bytes.resize(5 * CLUSTER as usize, 0x5a);
    bytes
}

/// Something that is done to an image which nobody has open.
type Edit = fn(Kind, &Arc<Memory>) -> Result<()>;

fn grow(kind: Kind, file: &Arc<Memory>) -> Result<()> {
    let member = kind.member(file, false)?;
    let options = ResizeOptions {
        size: member.image.size().saturating_add(1 << 20) & !511,
        shrink: false,
        preallocation: Preallocation::Off,
    };
    resize(&[member], kind.format(), &options).map(drop)
}

fn is_sound(report: &Result<Report>) -> bool {
    matches!(
        report,
        Ok(Report {
            corruptions: 0,
            check_errors: 0,
            ..
        })
    )
}

/// The clusters that are looked at: where data are, beside them, and the last.
fn clusters(size: u64) -> Vec<u64> {
    let few = (0..9)
        .chain(REACH / CLUSTER..REACH / CLUSTER + 4)
        .chain([2 * REACH / CLUSTER, (size / CLUSTER).saturating_sub(1)]);
    few.map(|cluster| cluster * CLUSTER)
        .filter(|at| size.checked_sub(*at).is_some_and(|left| left >= CLUSTER))
        .collect()
}

fn look(driver: &mut Driver, at: u64) -> Option<Vec<u8>> {
    let mapped = driver.extent_at(at, CLUSTER);
    let mut bytes = vec![0; CLUSTER as usize];
    let read = driver.read(at, &mut bytes);
    (mapped.is_ok() && read.is_ok()).then_some(bytes)
}

/// What is written: within a cluster that has data, beside it, into another one's table, and a last part.
fn writes(size: u64) -> Vec<(u64, u64)> {
    let all = [
        (2 * CLUSTER, CLUSTER),
        (3 * CLUSTER + 700, 900),
        (REACH + 2 * CLUSTER + 512, 512),
        (2 * REACH, 1),
        (5 * CLUSTER + 1024, 2 * CLUSTER - 1024),
    ];
    let fits = |(at, len): &(u64, u64)| size.checked_sub(*at).is_some_and(|left| left >= *len);
    all.into_iter().filter(fits).collect()
}

/// Uses the image for all it is worth. Whether it could be opened.
fn abuse(kind: Kind, bytes: &[u8]) -> bool {
    let reading = storage(bytes);
    let mut before = Vec::new();
    let opened = kind.driver(&reading, true).map(|mut driver| {
        let size = driver.size();
        before.extend(
            clusters(size)
                .into_iter()
                .map(|at| (at, look(&mut driver, at))),
        );
    });
    let report = kind.check(&reading, Repair::No);
    assert_eq!(reading.done().changes, 0, "reading or checking wrote");
    let was_sound = opened.is_ok() && is_sound(&report);
    // QED can have a cluster that belongs to two, which only a check finds.
    let twice = report.as_ref().map_or(true, |report| {
        let mut findings = report.findings.iter();
        findings.any(|found| found.text.contains("in use already"))
    });
    let left_sound = |what: &str, file: &Memory| {
        let after = kind.check(file, Repair::No);
        assert!(
            !was_sound || is_sound(&after),
            "{what} left {after:?}, which was sound"
        );
    };

    let writing = storage(bytes);
    if let Ok(mut driver) = kind.driver(&writing, false) {
        let written = writes(driver.size());
        for (at, len) in &written {
            let done = driver.write(*at, &vec![0xa5; *len as usize]);
            // A block may be larger than the space that there is.
            let full = matches!(&done, Err(error) if error.kind() == ErrorKind::NoSpace);
            assert!(
                !was_sound || full || done.is_ok(),
                "a write failed: {done:?}"
            );
            let _ = driver.flush();
        }
        for (at, before) in &before {
            let hit = |(from, len): &(u64, u64)| *from < at + CLUSTER && *at < from + len;
            if twice || *at + CLUSTER > driver.size() || written.iter().any(hit) {
                continue;
            }
            // What became an error is no harm; what was one must not become another's data.
            if let Some(after) = look(&mut driver, *at) {
                assert!(
                    before.as_ref() == Some(&after),
                    "what was not written at {at:#x} reads otherwise"
                );
            }
        }
        let _ = driver.discard(0, CLUSTER);
        let _ = driver.write_zeroes(CLUSTER, CLUSTER, true);
        let _ = driver.write_zeroes(driver.size() / 2, 3 * CLUSTER, false);
        let _ = driver.close();
        left_sound("writing", &writing);
    }

    for repair in [Repair::Leaks, Repair::All] {
        let repairing = storage(bytes);
        if let Ok(repaired) = kind.check(&repairing, repair) {
            let after = kind.check(&repairing, Repair::No);
            let after = after.expect("what was repaired can be checked");
            let left = |report: &Report| (report.corruptions, report.leaks, report.check_errors);
            assert_eq!(left(&repaired), left(&after), "{repair:?}");
        }
    }
    for (nth, edit) in kind.edits().iter().enumerate() {
        let editing = storage(bytes);
        let done = edit(kind, &editing);
        left_sound(&format!("edit {nth} ({done:?})"), &editing);
    }
    opened.is_ok()
}

/// A change: where (of the places that mean something), what, and its number.
type Change = (u16, u8, u32);

fn change() -> impl Strategy<Value = Change> {
    let place = prop_oneof![3 => 0u16..24, 3 => 24u16..96, 1 => any::<u16>()];
    (place, any::<u8>(), 0u32..1 << 24)
}

/// The bytes with a change: in the header, or in a table.
fn apply(kind: Kind, bytes: &mut [u8], (place, how, number): Change) {
    let (len, place) = (bytes.len() as u64, u64::from(place));
    let number = u64::from(number);
    // The places of a word in what `at` begins, and then in tables.
    let at = match (kind, place) {
        (Kind::Qed, 0..8) => place * 8,
        // The tables: the L1 table, and what follows it.
        (Kind::Qed, 8..24) => CLUSTER + place % 3 * 8,
        (Kind::Qed, 24..96) => (2 + place % 12) * CLUSTER + number % 9 * 8,
        (Kind::Vhd(_), 0..12) => place * 8,
        (Kind::Vhd(_), 12..24) => 512 + (place - 12) * 4,
        (Kind::Vhd(_), 24..80) => 1536 + (place - 24) % 12 * 4,
        // The header's fields, and the map.
        (Kind::Vdi, 0..8) => 0x40 + place * 4,
        (Kind::Vdi, 8..24) => 0x150 + (place - 8) * 4,
        (Kind::Parallels, 0..16) => place * 4,
        (Kind::Parallels, 16..96) => 64 + (place - 16) % 20 * 4,
        (Kind::Vdi, 24..96) => 0x200 + (place - 24) % 16 * 4,
        (Kind::Vhd(_), 80..96) => (len.saturating_sub(512) & !3) + (place - 80) * 8,
        _ => place * 4,
    };
    let value = match how % 10 {
        0 => 0,
        1 => number % 3,
        2 => len.next_multiple_of(CLUSTER) + number % 6 * CLUSTER,
        3 => number % (len / CLUSTER + 6) * CLUSTER,
        4 => number % (len / 512 + 3),
        5 => (len / 512).saturating_sub(number % 10),
        6 => u64::MAX - number % 5 * 4095,
        7 => 1 << (number % 64),
        8 => len.saturating_sub(number % 600),
        _ => number,
    };
    let word: &[u8] = match (kind, place) {
        (Kind::Qed, _) => &value.to_le_bytes(),
        (Kind::Vdi | Kind::Parallels, _) => &(value as u32).to_le_bytes(),
        (Kind::Vhd(_), 12..80) => &(value as u32).to_be_bytes(),
        _ => &value.to_be_bytes(),
    };
    let to = bytes.iter_mut().skip(at as usize);
    to.zip(word).for_each(|(to, from)| *to = *from);
}

/// Puts the checksums right of what still looks as if it had one.
fn sealed(bytes: &mut [u8]) {
    let end = bytes.len().saturating_sub(512);
    let parts: [(usize, usize, usize, &[u8]); 3] = [
        (0, 512, 64, b"conectix"),
        (512, 1024, 36, b"cxsparse"),
        (end, 512, 64, b"conectix"),
    ];
    for (at, len, sum, cookie) in parts {
        if let Some(part) = bytes
            .get_mut(at..at + len)
            .filter(|p| p.starts_with(cookie))
        {
            seal(part, sum);
        }
    }
}

#[test]
fn what_is_not_damaged_is_sound() {
    for kind in KINDS {
        let bytes = kind.sound();
        let report = kind.check(&storage(&bytes), Repair::No).expect("a check");
        assert_eq!(report.findings, [], "{kind:?}");
        assert!(abuse(kind, &bytes), "{kind:?}");
    }
}

#[test]
fn files_of_other_formats_that_end_anywhere() {
    for kind in KINDS {
        let whole = kind.sound();
        let header = (0..600).step_by(29);
        let sectors = (0..whole.len()).step_by(whole.len() / 512 / 40 * 512 + 512);
        for len in header.chain(sectors.flat_map(|at| [at, at + 511])) {
            abuse(kind, &whole[..len.min(whole.len())]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4 * super::sweeps::cases()))]

    /// Words of a sound image replaced, and the file cut off.
    #[test]
    fn damaged_images_of_other_formats_do_no_harm(
        kind in prop_oneof![3 => Just(0usize), 3 => Just(1), 1 => Just(2), 1 => Just(3), 3 => Just(4), 2 => Just(5)],
        changes in proptest::collection::vec(change(), 1..5),
        seal in prop::bool::weighted(0.8),
        cut in prop_oneof![4 => Just(0usize), 1 => 0usize..9000],
    ) {
        let kind = KINDS[kind];
        let mut bytes = kind.sound();
        for change in changes {
            apply(kind, &mut bytes, change);
        }
        if seal && kind != Kind::Qed {
            sealed(&mut bytes);
        }
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        let _one = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, peak) = ALLOCATOR.peak_bytes(|| abuse(kind, &bytes));
        prop_assert!(peak <= BYTES_MAX, "took {peak} bytes of memory");
    }

    /// Another process changes the file, or cuts it, while it is in use.
    #[test]
    fn files_of_other_formats_that_change_do_no_harm(
        kind in 0..KINDS.len(),
        way in 0usize..8,
        call in 2u64..60,
        at in 0u64..40_000,
        word in any::<[u8; 8]>(),
        cut in prop::bool::weighted(0.2),
    ) {
        let kind = KINDS[kind];
        let meddling = match cut {
            true => Meddling::SetLen(at),
            false => Meddling::Write(at & !7, word),
        };
        let file = Memory::new(&kind.sound(), SPACE, CALLS_MAX).meddled(call, meddling);
        let file = Arc::new(file);
        let edits = kind.edits();
        match way {
            0 | 1 => {
                if let Ok(mut driver) = kind.driver(&file, way == 0) {
                    for at in clusters(driver.size()) {
                        look(&mut driver, at);
                    }
                    for (at, len) in writes(driver.size()) {
                        let _ = driver.write(at, &vec![1; len as usize]);
                    }
                    let _ = driver.close();
                }
            }
            2 => drop(kind.check(&file, Repair::No)),
            3 => drop(kind.check(&file, Repair::All)),
            way => drop(edits[way % edits.len()](kind, &file)),
        }
    }
}
