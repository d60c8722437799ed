//! Sound images of every format but qcow2, ways to damage them, and all that can be done to an image: it is opened, mapped,
//! read, written, checked, repaired and edited. The rules are those of qcow2 (`abuse`), and one more: a write harms nothing that
//! it does not write. The fuzz target `other_images` does the same.

use block::{Error, ErrorKind, Result, Storage};
use disk::blocking::{Driver, Member};
use image::vhd::DiskType;
use image::vmdk::Parts;
use image::{Bochs, Cloop, Dmg, Format, Image, Parallels, qcow, qed, vdi, vhd, vhdx, vmdk};
use made::{part, sparse_image};
use std::sync::{Arc, OnceLock};
use testkit::memory::{Meddling, Memory};
use testkit::vhd::seal;
use tool::check::{self, CheckOptions, Repair, Report};
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};

#[path = "made.rs"]
mod made;

/// Bytes of a QED cluster, of a VHD or VDI block and of a VMDK grain.
pub const CLUSTER: u64 = 4096;
/// Bytes of the disk behind a QED table: of one cluster.
const REACH: u64 = CLUSTER / 8 * CLUSTER;
/// As in `abuse`.
const SPACE: u64 = 48 << 20;
const CALLS_MAX: u64 = 400_000;

/// The images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Version 1.
    Qcow,
    /// With tables of one cluster.
    Qed,
    /// Of each type.
    Vhd(DiskType),
    /// Dynamic.
    Vdi,
    /// Made here, since nothing makes any.
    Parallels,
    /// Made there too.
    Bochs,
    /// Likewise.
    Cloop,
    /// Likewise.
    Dmg,
    /// Dynamic.
    Vhdx,
    /// A sparse file, with redundant grain tables.
    VmdkSparse,
    /// Compressed grains.
    VmdkStream,
    /// A descriptor, which is what is damaged, with files that are sound.
    VmdkParts,
}

/// All of them.
pub const KINDS: [Kind; 14] = [
    Kind::Qcow,
    Kind::Qed,
    Kind::Vhd(DiskType::Dynamic),
    Kind::Vhd(DiskType::Differencing),
    Kind::Vhd(DiskType::Fixed),
    Kind::Vdi,
    Kind::Parallels,
    Kind::Bochs,
    Kind::Cloop,
    Kind::Dmg,
    Kind::Vhdx,
    Kind::VmdkSparse,
    Kind::VmdkStream,
    Kind::VmdkParts,
];

/// The file of an image.
pub fn storage(bytes: &[u8]) -> Arc<Memory> {
    Arc::new(Memory::new(bytes, SPACE, CALLS_MAX))
}

fn bytes_of(file: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; file.len().expect("a length") as usize];
    file.read_at(0, &mut bytes).expect("its bytes");
    bytes
}

impl Kind {
    /// The image's descriptor, and its files, the first of which is `file`.
    fn parts(file: &Arc<Memory>) -> Result<(Parts, Vec<Arc<dyn Storage>>)> {
        let parts = Parts::read(&**file)?;
        let mut files = vec![Arc::clone(file) as Arc<dyn Storage>];
        files.extend(parts.files.iter().map(|name| Arc::new(part(name)) as _));
        Ok((parts, files))
    }

    /// Bytes that unpacking takes at most: these formats allow clusters of 64 MiB. One is unpacked while the last one is kept, from
    /// bytes that may be as many.
    pub fn unpacked_max(self) -> u64 {
        match self {
            Kind::Cloop | Kind::Dmg => 3 * (64 << 20),
            _ => 0,
        }
    }

    fn format(self) -> Format {
        match self {
            Kind::Qcow => Format::Qcow,
            Kind::Qed => Format::Qed,
            Kind::Vhd(_) => Format::Vhd,
            Kind::Vdi => Format::Vdi,
            Kind::Parallels => Format::Parallels,
            Kind::Bochs => Format::Bochs,
            Kind::Cloop => Format::Cloop,
            Kind::Dmg => Format::Dmg,
            Kind::Vhdx => Format::Vhdx,
            Kind::VmdkSparse | Kind::VmdkStream | Kind::VmdkParts => Format::Vmdk,
        }
    }

    /// As [`make`](Self::make), made once.
    pub fn sound(self) -> Vec<u8> {
        static MADE: [OnceLock<Vec<u8>>; KINDS.len()] = [const { OnceLock::new() }; KINDS.len()];
        let nth = KINDS.iter().position(|kind| *kind == self);
        MADE[nth.expect("one of all")]
            .get_or_init(|| self.make())
            .clone()
    }

    /// A sound image with data in several of its tables or blocks, and none in others.
    fn make(self) -> Vec<u8> {
        let file = storage(&[]);
        match self {
            Kind::Parallels => return made::parallels(),
            Kind::Bochs => return made::bochs(),
            Kind::Cloop => return made::cloop(),
            Kind::Dmg => return made::dmg(),
            Kind::VmdkParts => return made::descriptor(),
            Kind::VmdkStream => return made::stream(&file),
            Kind::VmdkSparse => sparse_image(&file),
            Kind::Vhdx => vhdx::create(
                &*file,
                &vhdx::CreateOptions {
                    size: 3 * REACH,
                    block_bytes: Some(1 << 20),
                    ..vhdx::CreateOptions::default()
                },
            ),
            Kind::Qcow => qcow::create(
                &*file,
                &qcow::CreateOptions {
                    size: 3 * REACH,
                    backing: None,
                },
            ),
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
        bytes_of(&file)
    }

    fn member(self, file: &Arc<Memory>, read_only: bool) -> Result<Member> {
        let mut files = vec![Arc::clone(file) as Arc<dyn Storage>];
        let image: Arc<dyn Image> = match self {
            Kind::Qcow => Arc::new(qcow::Qcow::open(
                &**file,
                &qcow::OpenOptions {
                    read_only,
                    ..qcow::OpenOptions::default()
                },
            )?),
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
            Kind::Bochs => Arc::new(Bochs::open(&**file)?),
            Kind::Cloop => Arc::new(Cloop::open(&**file)?),
            Kind::Dmg => Arc::new(Dmg::open(&**file)?),
            Kind::Vdi => Arc::new(vdi::Vdi::open(
                &**file,
                &vdi::OpenOptions {
                    read_only,
                    cache_bytes: Some(0),
                },
            )?),
            Kind::Vhdx => Arc::new(vhdx::Vhdx::open(
                &**file,
                &vhdx::OpenOptions {
                    read_only,
                    cache_bytes: Some(0),
                    keeps_id: false,
                },
            )?),
            Kind::VmdkSparse | Kind::VmdkStream | Kind::VmdkParts => {
                let (parts, all) = Self::parts(file)?;
                let storages: Vec<&dyn Storage> = all.iter().map(|file| &**file).collect();
                let options = vmdk::OpenOptions {
                    read_only,
                    cache_bytes: Some(0),
                    keeps_id: false,
                };
                let image = vmdk::Vmdk::open(parts, &storages, &options)?;
                files = all;
                Arc::new(image)
            }
        };
        if let (false, Some(why)) = (read_only, image.describe().read_only_because) {
            let text = format!("{}: can only be read: {why}", file.name());
            return Err(Error::new(ErrorKind::ReadOnly, text));
        }
        Ok(Member { image, files })
    }

    pub fn driver(self, file: &Arc<Memory>, read_only: bool) -> Result<Driver> {
        Driver::new(vec![self.member(file, read_only)?], read_only)
    }

    /// Checks the image in `file`.
    pub fn check(self, file: &Arc<Memory>, repair: Repair) -> Result<Report> {
        let options = CheckOptions {
            repair,
            ..CheckOptions::default()
        };
        match self {
            Kind::Qcow => tables_of_qcow(file),
            Kind::Qed => check::qed::check(&**file, &options),
            Kind::Vhd(_) => check::vhd::check(&**file, &options),
            Kind::Vdi => check::vdi::check(&**file, &options),
            Kind::Parallels => check::parallels::check(&**file, &options),
            // There is none but what opening looks at.
            Kind::Bochs | Kind::Cloop | Kind::Dmg => {
                self.member(file, true).map(|_| Report::default())
            }
            Kind::Vhdx => check::vhdx::check(&**file, &options),
            Kind::VmdkSparse | Kind::VmdkStream | Kind::VmdkParts => {
                let (parts, files) = Self::parts(file)?;
                let files: Vec<&dyn Storage> = files.iter().map(|file| &**file).collect();
                check::vmdk::check(&parts, &files, &options)
            }
        }
    }

    /// What is done to closed images.
    fn edits(self) -> &'static [Edit] {
        match self {
            Kind::Qcow => &[grow, |_, file| qcow::empty(&**file)],
            Kind::Qed => &[
                grow,
                |_, file| qed::rebase::set_backing(&**file, Some(("below", true))),
                |_, file| qed::rebase::empty(&**file),
                |_, file| check::qed::mend(&**file).map(drop),
            ],
            Kind::Vhd(_) => &[
                grow,
                |_, file| vhd::mend(&**file).map(drop),
                |_, file| {
                    let parent = vhd::NewParent {
                        name: "below".into(),
                        absolute: "/below".into(),
                        unique_id: vhd::UniqueId([7; 16]),
                        timestamp: 1,
                    };
                    vhd::set_parent(&**file, Some(&parent))
                },
                |_, file| vhd::empty(&**file),
                |_, file| vhd::set_parent(&**file, None),
            ],
            Kind::Vdi => &[grow, |_, file| vdi::mend(&**file).map(drop)],
            Kind::Vhdx => &[
                grow,
                |_, file| vhdx::mend(&**file).map(drop),
                |_, file| {
                    let parent = vhdx::Locator::new(vhdx::Guid([7; 16]), "below", "/below")?;
                    vhdx::set_parent(&**file, Some(&parent))
                },
                |_, file| vhdx::empty(&**file),
                |_, file| vhdx::set_parent(&**file, None),
            ],
            Kind::VmdkSparse | Kind::VmdkStream | Kind::VmdkParts => &[
                grow,
                |_, file| vmdk::set_parent(&**file, Some(("below", 7))),
                |_, file| {
                    let (parts, files) = Self::parts(file)?;
                    let files: Vec<&dyn Storage> = files.iter().map(|file| &**file).collect();
                    vmdk::empty(&parts, &files)
                },
                |_, file| vmdk::set_parent(&**file, None),
            ],
            Kind::Parallels | Kind::Bochs | Kind::Cloop | Kind::Dmg => &[grow],
        }
    }
}

/// What would be found by a check, which there is none of.
fn tables_of_qcow(file: &Arc<Memory>) -> Result<Report> {
    // Somebody may cut it just now.
    let mut bytes = vec![0; file.len()? as usize];
    file.read_at(0, &mut bytes)?;
    let found = testkit::qcow::check(&bytes);
    let found = found.ok_or_else(|| Error::corrupt("no qcow header"))?;
    Ok(Report {
        corruptions: found.wrong + found.twice,
        overlaps: found.twice,
        ..Report::default()
    })
}

/// Something that is done to an image which nobody has open.
pub type Edit = fn(Kind, &Arc<Memory>) -> Result<()>;

fn grow(kind: Kind, file: &Arc<Memory>) -> Result<()> {
    let member = kind.member(file, false)?;
    let options = ResizeOptions {
        size: member.image.size().saturating_add(1 << 20) & !511,
        shrink: false,
        preallocation: Preallocation::Off,
    };
    resize(&[member], kind.format(), &options).map(drop)
}

pub fn is_sound(report: &Result<Report>) -> bool {
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
pub fn clusters(size: u64) -> Vec<u64> {
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
pub fn abuse(kind: Kind, bytes: &[u8]) -> bool {
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
    // QED and VMDK can have a cluster that belongs to two, which only a check finds.
    let twice = report.as_ref().map_or(true, |report| {
        let mut findings = report.findings.iter();
        report.overlaps > 0 || findings.any(|found| found.text.contains("in use already"))
    });
    let left_sound = |what: &str, file: &Arc<Memory>| {
        let after = kind.check(file, Repair::No);
        assert!(
            !was_sound || is_sound(&after),
            "{what} left {after:?}, which was sound"
        );
    };

    let writing = storage(bytes);
    // A byte that is nowhere yet, so that it is known again.
    let new = (1..=0xa5).rev().find(|byte| !bytes.contains(byte));
    let new = new.unwrap_or(0xa5);
    if let Ok(mut driver) = kind.driver(&writing, false) {
        let written = writes(driver.size());
        for (at, len) in &written {
            let done = driver.write(*at, &vec![new; *len as usize]);
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
                // What the file was too short for cannot be read until it has grown over it: then the rest of it is zeros.
                let grown = before.is_none() && !after.contains(&new);
                assert!(
                    grown || before.as_ref() == Some(&after),
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
pub type Change = (u16, u8, u32);

/// The bytes with a change: in the header, or in a table.
fn apply(kind: Kind, bytes: &mut Vec<u8>, (place, how, number): Change) {
    if kind == Kind::VmdkParts || kind.format() == Format::Vmdk && (24..40).contains(&place) {
        return rewrite(kind, bytes, (place, how, number));
    }
    let (len, place) = (bytes.len() as u64, u64::from(place));
    let number = u64::from(number);
    // The places of a word in what `at` begins, and then in tables.
    let at = match (kind, place) {
        (Kind::Qed | Kind::Qcow, 0..8) => place * 8,
        // The first three entries of the L1 table, and the two tables.
        (Kind::Qcow, 8..24) => 48 + place % 3 * 8,
        (Kind::Qcow, 24..96) => (1 + place % 9) * CLUSTER + number % 9 * 8,
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
        // Of Bochs the header's fields, the catalog, and the first bitmaps; of cloop the header and its offsets; of Apple's the
        // trailer, and the first table with its chunks.
        (Kind::Bochs, 0..8) => 64 + place * 4,
        (Kind::Bochs, 8..60) => 512 + (place - 8) % 40 * 4,
        (Kind::Bochs, 60..96) => 1024 + number % 9 * (CLUSTER + 512) + place % 2 * 4,
        (Kind::Cloop, 0..96) => 128 + place * 4,
        (Kind::Dmg, 0..40) => len.saturating_sub(512) + DMG_FIELDS[place as usize % 7],
        (Kind::Dmg, 40..96) => len.saturating_sub(512 + DMG_FORK) + number % DMG_FORK / 4 * 4,
        (Kind::Parallels, 16..96) => 64 + (place - 16) % 20 * 4,
        (Kind::Vdi, 24..96) => 0x200 + (place - 24) % 16 * 4,
        // The headers, the region table, the metadata and its items, the log, the block table.
        (Kind::Vhdx, 0..8) => [64 << 10, 128 << 10][place as usize % 2] + 8 + number % 9 * 8,
        (Kind::Vhdx, 8..16) => [192 << 10, 256 << 10][place as usize % 2] + 8 + number % 9 * 8,
        (Kind::Vhdx, 16..24) => VHDX_METADATA + number % 24 * 8,
        (Kind::Vhdx, 24..40) => VHDX_METADATA + (64 << 10) + (place - 24) * 4,
        (Kind::Vhdx, 40..56) => (1 << 20) + number % 9 * 8,
        (Kind::Vhdx, 56..96) => VHDX_TABLE + (place - 56) % 10 * 8,
        // The header's fields, the directories, and the tables; of compressed ones the markers too.
        (Kind::VmdkSparse | Kind::VmdkStream, 0..16) => VMDK_FIELDS[place as usize % 12],
        (Kind::VmdkSparse | Kind::VmdkStream, 16..24) => {
            sector_at(bytes, [48, 56][place as usize % 2]) + number % 12 * 4
        }
        (Kind::VmdkStream, 70..96) => (len.saturating_sub(1 << 12) & !511) + (place - 70) * 4,
        (Kind::VmdkSparse | Kind::VmdkStream, 40..96) => {
            // A directory of so few has one sector.
            sector_at(bytes, [56, 48, 56, 56][place as usize % 4])
                + 512 * (1 + number % 13)
                + place % 8 * 4
        }
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
        (Kind::Qed | Kind::Vhdx, _) => &value.to_le_bytes(),
        (Kind::VmdkSparse | Kind::VmdkStream, 0..16) if place != 0 => &value.to_le_bytes(),
        // Sectors, mostly.
        (Kind::VmdkSparse | Kind::VmdkStream, _) if how % 10 == 2 || how % 10 == 3 => {
            &((value / 512) as u32).to_le_bytes()
        }
        (Kind::VmdkSparse | Kind::VmdkStream, _) => &(value as u32).to_le_bytes(),
        (Kind::Vdi | Kind::Parallels | Kind::Bochs, _) => &(value as u32).to_le_bytes(),
        (Kind::Vhd(_), 12..80) => &(value as u32).to_be_bytes(),
        _ => &value.to_be_bytes(),
    };
    let to = bytes.iter_mut().skip(at as usize);
    to.zip(word).for_each(|(to, from)| *to = *from);
}

/// Where our new VHDX images have metadata and block table.
const VHDX_METADATA: u64 = 3 << 20;
const VHDX_TABLE: u64 = 2 << 20;

/// Bytes of the resource fork before the trailer of an Apple disk image.
const DMG_FORK: u64 = 16 + 2 * (4 + 204) + (2 * 75 + 2) * 40;
/// Where the fields of that are.
const DMG_FIELDS: [u64; 7] = [0, 0x18, 0x28, 0x30, 0xd8, 0xe0, 0x1ec];

/// Where the fields of a VMDK header begin.
const VMDK_FIELDS: [u64; 12] = [4, 8, 12, 20, 28, 36, 44, 48, 56, 64, 72, 77];

/// The byte that a VMDK header names by its sector at `at`; somewhere in the file.
fn sector_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    let sector = field.map_or(0, u64::from_le_bytes);
    sector % (bytes.len() as u64 / 512 + 1) * 512
}

/// Puts other words into a descriptor: over what there is, or in place of it.
fn rewrite(kind: Kind, bytes: &mut Vec<u8>, (place, how, number): Change) {
    const WORDS: [&[u8]; 20] = [
        b"0",
        b"1",
        b"4294967296",
        b"18446744073709551616",
        b"\"",
        b"\n",
        b"=",
        b"\0",
        b"RW",
        b"RDONLY",
        b"NOACCESS",
        b"SPARSE",
        b"FLAT",
        b"ZERO",
        b"VMFS",
        b"SESPARSE",
        b"RW 900 FLAT \"flat\" 100\n",
        b"CID=0\n",
        b"parentFileNameHint=\"x\"\n",
        b"\xff",
    ];
    let text = match kind {
        Kind::VmdkParts => 0..bytes.len(),
        _ => 512.min(bytes.len())..bytes.len().min(512 * 3),
    };
    let ends = |b: u8| b" \n\"=".contains(&b);
    let mut starts: Vec<usize> = text
        .clone()
        .filter(|at| {
            at.checked_sub(1)
                .and_then(|before| bytes.get(before))
                .is_none_or(|b| ends(*b))
        })
        .collect();
    starts.push(text.end);
    let at = starts[usize::from(place) % starts.len()];
    let words = WORDS[usize::from(how) % WORDS.len()];
    let old = bytes[at..text.end]
        .iter()
        .position(|b| ends(*b))
        .unwrap_or(0);
    match (kind, number % 3) {
        (Kind::VmdkParts, 0) => drop(bytes.splice(at..at, words.iter().copied())),
        (Kind::VmdkParts, 1) => drop(bytes.splice(at..at + old, words.iter().copied())),
        _ => {
            let to = bytes.iter_mut().skip(at);
            to.zip(words).for_each(|(to, from)| *to = *from);
        }
    }
}

/// Somebody else changes the image before a call, while it is used in one of several ways.
pub fn meddled(kind: Kind, way: usize, call: u64, meddling: Meddling) {
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

/// A sound image with changes, its checksums put right or not.
pub fn damaged(kind: Kind, changes: &[Change], seal: bool) -> Vec<u8> {
    let mut bytes = kind.sound();
    for change in changes {
        apply(kind, &mut bytes, *change);
    }
    if seal {
        sealed(kind, &mut bytes);
    }
    bytes
}

/// Puts the checksums right of what still looks as if it had one.
fn sealed(kind: Kind, bytes: &mut [u8]) {
    if kind == Kind::Vhdx {
        for (at, len, cookie) in [
            (64 << 10, 4096, b"head"),
            (128 << 10, 4096, b"head"),
            (192 << 10, 64 << 10, b"regi"),
            (256 << 10, 64 << 10, b"regi"),
        ] {
            let part = bytes.get_mut(at..at + len);
            if let Some(part) = part.filter(|part| part.starts_with(cookie)) {
                testkit::vhdx::seal(part);
            }
        }
    }
    if !matches!(kind, Kind::Vhd(_)) {
        return;
    }
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
