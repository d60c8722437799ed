//! VHD images: checks, repairs, resizing, and files that lie.

use block::{ErrorKind, Result, Storage};
use disk::blocking::{Driver, Member};
use image::vhd::{CreateOptions, DiskType, OpenOptions, UniqueId, Vhd, create, mend};
use image::{Format, Image};
use io::{Keep, SimDisk, SimOptions};
use std::fs;
use std::process::Command;
use std::sync::Arc;
use testkit::TempDir;
use testkit::command::run;
use testkit::vhd::{BLOCK, Forge, ForgedParent, seal};
use tool::check::{CheckOptions, Repair, Report, vhd::check};
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};

const SIZE: usize = 3 * BLOCK + 512;

fn disk(bytes: &[u8]) -> Arc<SimDisk> {
    SimDisk::from_bytes(SimOptions::default(), bytes)
}

fn open(disk: &Arc<SimDisk>, read_only: bool) -> Result<Driver> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    let image: Arc<dyn Image> = Arc::new(Vhd::open(&**disk, &options)?);
    let files: Vec<Arc<dyn Storage>> = vec![disk.clone()];
    Driver::new(vec![Member { image, files }], read_only)
}

fn checked(disk: &Arc<SimDisk>, repair: Repair) -> Result<Report> {
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    check(&**disk, &options)
}

fn forged() -> Forge {
    Forge {
        size: SIZE as u64,
        id: [1; 16],
        parent: None,
        blocks: vec![
            (1, (0..BLOCK / 512).collect(), 0x11),
            (0, (4..9).collect(), 0x10),
            (3, vec![0], 0x13),
        ],
    }
}

/// Changes bytes of a forged image, and the checksums after them.
fn forge_with(change: impl Fn(&mut Vec<u8>)) -> Arc<SimDisk> {
    changed(&forged(), change)
}

fn changed(forge: &Forge, change: impl Fn(&mut Vec<u8>)) -> Arc<SimDisk> {
    let mut bytes = forge.bytes();
    change(&mut bytes);
    disk(&bytes)
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// A field of the header.
fn header(bytes: &mut [u8], at: usize, field: &[u8]) {
    put(bytes, 512 + at, field);
    seal(&mut bytes[512..1536], 36);
}

/// A field of both footers.
fn footers(bytes: &mut [u8], at: usize, field: &[u8]) {
    let end = bytes.len() - 512;
    for footer in [0, end] {
        put(bytes, footer + at, field);
        seal(&mut bytes[footer..footer + 512], 64);
    }
}

const TABLE: usize = 1536;

#[test]
fn sound_images_have_no_findings() {
    let mut diff = forged();
    diff.parent = Some(ForgedParent {
        id: [9; 16],
        name: "./base.vhd".into(),
    });
    for forge in [forged(), diff] {
        let report = checked(&disk(&forge.bytes()), Repair::No).unwrap();
        assert_eq!(report.findings, [], "{report:?}");
        assert_eq!((report.total_clusters, report.allocated_clusters), (4, 3));
    }
}

/// What lies is found by the check, and refused where it would do harm; nothing panics, hangs or takes memory without
/// bound.
#[test]
fn files_that_lie_are_refused() {
    type Change = (&'static str, fn(&mut Vec<u8>));
    // What the change is, and what is said of it when the image is opened for writing.
    let cases: [(Change, &str); 18] = [
        (
            ("footers gone", |b| {
                let end = b.len() - 512;
                put(b, 0, b"x");
                put(b, end, b"x");
            }),
            "does not begin with",
        ),
        (("short", |b| b.truncate(100)), "too short"),
        (
            ("other image at the end", |b| {
                let end = b.len() - 512;
                b[end + 68] = 7;
                seal(&mut b[end..], 64);
            }),
            "two footers",
        ),
        (
            ("type", |b| footers(b, 60, &9u32.to_be_bytes())),
            "disk type",
        ),
        (("version", |b| footers(b, 12, &[0, 2, 0, 0])), "version"),
        (("poison", |b| footers(b, 0, b"v_poison")), "not to be used"),
        (
            ("too large", |b| footers(b, 48, &u64::MAX.to_be_bytes())),
            "2040 GiB",
        ),
        (
            ("header far away", |b| {
                footers(b, 16, &(u64::MAX - 511).to_be_bytes())
            }),
            "offset of the header",
        ),
        (
            ("header's checksum", |b| b[512 + 700] = 1),
            "checksum at byte 36",
        ),
        (
            ("header's cookie", |b| header(b, 0, b"cxsparsf")),
            "cxsparse",
        ),
        (("block size 0", |b| header(b, 32, &[0; 4])), "block size"),
        (
            ("block size odd", |b| header(b, 32, &3000u32.to_be_bytes())),
            "block size",
        ),
        (
            ("block size tiny", |b| header(b, 32, &512u32.to_be_bytes())),
            "the disk has",
        ),
        (
            ("table huge", |b| header(b, 28, &u32::MAX.to_be_bytes())),
            "at most",
        ),
        (
            ("table small", |b| header(b, 28, &2u32.to_be_bytes())),
            "the disk has 4 blocks",
        ),
        (
            ("table outside", |b| header(b, 16, &(!511u64).to_be_bytes())),
            "the file ends",
        ),
        (
            ("table on the header", |b| {
                header(b, 16, &512u64.to_be_bytes())
            }),
            "overlap",
        ),
        (
            ("table between sectors", |b| {
                header(b, 16, &1537u64.to_be_bytes())
            }),
            "no multiple of 512",
        ),
    ];
    for ((name, change), said) in cases {
        // Without blocks, it is small.
        let disk = changed(
            &Forge {
                blocks: Vec::new(),
                ..forged()
            },
            change,
        );
        for read_only in [true, false] {
            let error = open(&disk, read_only).map(drop).unwrap_err().to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
        let before = disk.bytes();
        for repair in [Repair::No, Repair::All] {
            match checked(&disk, repair) {
                Err(_) => {}
                Ok(report) => assert!(report.corruptions > 0, "{name}: {report:?}"),
            }
        }
        let _ = mend(&*disk);
        assert!(disk.bytes() == before, "{name}: it was written to");
    }
}

/// Entries that lie bar writing, and reading where they lead nowhere.
#[test]
fn entries_that_lie_are_found() {
    let entry = |bytes: &[u8], block: usize| -> u32 {
        u32::from_be_bytes(bytes[TABLE + block * 4..][..4].try_into().unwrap())
    };
    let second = entry(&forged().bytes(), 1);
    for (value, said) in [
        (0, "tables"),
        (4, "tables"),
        (second, "overlap"),
        (second + 1, "overlap"),
    ] {
        let disk = forge_with(|b| put(b, TABLE, &value.to_be_bytes()));
        let error = open(&disk, false).map(drop).unwrap_err().to_string();
        assert!(error.contains(said), "{value}: {error}");
        let report = checked(&disk, Repair::All).unwrap();
        let found = report.corruptions > 0 && report.overlaps > 0;
        assert!(found, "{value}: {report:?}");
        let mut read = [0; 512];
        let read = open(&disk, true)
            .unwrap()
            .read(0, &mut read)
            .map_err(|e| e.kind());
        // Where tables are, nothing is read; a block of another is no danger.
        assert_eq!(read.is_err(), said == "tables", "{value}");
    }
    let disk = forge_with(|b| put(b, TABLE, &0xffff_fff0u32.to_be_bytes()));
    let error = open(&disk, true).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("cut off"), "{error}");
    assert_eq!(checked(&disk, Repair::No).unwrap().corruptions, 1);
}

#[test]
fn a_batmap_that_lies_is_found_and_one_that_is_damaged_not_believed() {
    let map = TABLE + 1024;
    let disk = forge_with(|b| b[map] |= 0x80);
    assert_eq!(checked(&disk, Repair::No).unwrap().corruptions, 1);
    let mut read = [1; 512];
    open(&disk, true).unwrap().read(0, &mut read).unwrap();
    assert_eq!(read, [0; 512], "its checksum is wrong");
    let lies = forge_with(|b| {
        b[map] |= 0x80;
        let sum = !b[map..map + 512]
            .iter()
            .map(|byte| u32::from(*byte))
            .sum::<u32>();
        put(b, TABLE + 512 + 24, &sum.to_be_bytes());
    });
    let report = checked(&lies, Repair::No).unwrap();
    assert!(
        report.findings[0]
            .text
            .contains("batmap says that it is whole"),
        "{report:?}"
    );
}

/// A footer that is missing or damaged is written from the other one; what was reserved is cut off.
#[test]
fn footers_are_repaired() {
    let whole = forged().bytes();
    type Damage = (&'static str, fn(&mut Vec<u8>), Repair);
    let damage: [Damage; 3] = [
        (
            "no footer at the end",
            |b| {
                let end = b.len() - 512;
                b.truncate(end);
                b.resize(end + 70_000, 0);
            },
            Repair::Leaks,
        ),
        (
            "a damaged one",
            |b| {
                let end = b.len() - 512;
                b[end + 100] = 1;
            },
            Repair::Leaks,
        ),
        ("a damaged copy", |b| b[100] = 1, Repair::All),
    ];
    for (name, change, repair) in damage {
        let disk = forge_with(change);
        let found = checked(&disk, Repair::No).unwrap();
        assert_eq!(found.leaks + found.corruptions, 1, "{name}");
        // It can be read all the same.
        let mut read = [0; 512];
        open(&disk, true)
            .unwrap()
            .read(BLOCK as u64, &mut read)
            .unwrap();
        assert_eq!(read, [0x11; 512]);
        let report = checked(&disk, repair).unwrap();
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{name}");
        assert_eq!(report.leaks_fixed + report.corruptions_fixed, 1, "{name}");
        assert!(disk.bytes() == whole, "{name}: it is not as it was");
    }
}

/// A writer that was killed leaves an image that QEMU reads, and the next writer brings it in order.
#[test]
fn what_a_killed_writer_leaves_is_mended() {
    let dir = TempDir::new();
    let disk = SimDisk::new(SimOptions::default());
    let size = 4 * BLOCK as u64;
    create(
        &*disk,
        &CreateOptions {
            size,
            force_size: true,
            ..CreateOptions::default()
        },
    )
    .unwrap();
    let mut driver = open(&disk, false).unwrap();
    driver.write(BLOCK as u64 + 512, &[5; 1024]).unwrap();
    driver.flush().unwrap();
    drop(driver);
    let path = dir.path("killed.vhd");
    fs::write(&path, disk.bytes()).unwrap();
    run(Command::new("qemu-io")
        .args([
            "-f",
            "vpc",
            "-c",
            "read -P 5 2097664 1024",
            "-c",
            "read -P 0 2098688 512",
        ])
        .arg(&path));
    assert_eq!(checked(&disk, Repair::No).unwrap().leaks, 1);
    assert!(mend(&*disk).unwrap().is_some());
    assert!(mend(&*disk).unwrap().is_none());
    let bytes = disk.bytes();
    assert!(
        bytes[bytes.len() - 512..] == bytes[..512],
        "the footers differ"
    );
    assert_eq!(checked(&disk, Repair::No).unwrap().findings, []);
}

/// A fixed image whose file is some bytes longer than disk and footer: the footer's new place may touch the old one,
/// and what lay between does not become the disk's. A crash leaves the old size or the new.
#[test]
fn fixed_images_grow_over_footers_anywhere() {
    const OLD: u64 = 64 << 10;
    for slack in [0, 8, 511, 512, 1000, 1024, 5000] {
        for more in [512, 1024, 4096] {
            let options = CreateOptions {
                size: OLD,
                disk_type: DiskType::Fixed,
                force_size: true,
                ..CreateOptions::default()
            };
            let made = SimDisk::new(SimOptions::default());
            create(&*made, &options).unwrap();
            let mut bytes = made.bytes();
            bytes[..OLD as usize].fill(7);
            let footer = bytes.split_off(OLD as usize);
            bytes.resize(OLD as usize + slack, 0xee);
            bytes.extend(footer);
            let (disk, new) = (disk(&bytes), OLD + more);
            image::vhd::grow(&*disk, new).unwrap_or_else(|e| panic!("{slack} {more}: {e}"));
            let look = |disk: &Arc<SimDisk>| {
                let mut driver = open(disk, true).unwrap();
                let mut all = vec![1; driver.size() as usize];
                driver.read(0, &mut all).unwrap();
                let (old, rest) = all.split_at(OLD as usize);
                assert!(old.iter().all(|b| *b == 7), "{slack} {more}");
                rest.to_vec()
            };
            assert!(look(&disk) == vec![0; more as usize], "{slack} {more}");
            assert_eq!(checked(&disk, Repair::No).unwrap().findings, []);
            let len = disk.len().unwrap();
            assert_eq!(len, (new + 512).max(bytes.len() as u64), "{slack} {more}");
            let events = disk.log().iter().map(|e| e.ended + 1).max().unwrap();
            for at in 0..=events {
                let outage = disk.outage(at);
                for keep in [
                    Keep::Nothing,
                    Keep::All,
                    Keep::Mask(1),
                    Keep::Mask(2),
                    Keep::Torn(at),
                ] {
                    let keep = vec![keep; outage.open().len()];
                    let left = look(&outage.state(&keep)).len() as u64;
                    assert!(left == 0 || left == more, "{slack} {more} {at}: {left}");
                }
            }
        }
    }
}

fn resized(disk: &Arc<SimDisk>, size: u64) -> Result<u64> {
    let image: Arc<dyn Image> = Arc::new(Vhd::open(&**disk, &OpenOptions::default())?);
    let files: Vec<Arc<dyn Storage>> = vec![disk.clone()];
    let options = ResizeOptions {
        size,
        shrink: false,
        preallocation: Preallocation::Off,
    };
    resize(&[Member { image, files }], Format::Vhd, &options)
}

/// What was there stays, what is new is zeros, and QEMU agrees; with room in the table and without.
#[test]
fn disks_grow() {
    let dir = TempDir::new();
    for (disk_type, force_size) in [
        (DiskType::Dynamic, true),
        (DiskType::Dynamic, false),
        (DiskType::Fixed, true),
        (DiskType::Fixed, false),
    ] {
        let disk = SimDisk::new(SimOptions::default());
        // Within a block; the next size takes a second sector of the table, or a larger table.
        let options = CreateOptions {
            size: 300 << 10,
            disk_type,
            force_size,
            block_bytes: 4096,
            ..CreateOptions::default()
        };
        create(&*disk, &options).unwrap();
        let old = options.disk_bytes().unwrap();
        let mut driver = open(&disk, false).unwrap();
        driver.write(old - 1024, &[6; 1024]).unwrap();
        driver.write(0, &[7; 5000]).unwrap();
        driver.close().unwrap();
        let mut size = old;
        for more in [512, 4096, 700 << 10] {
            size += more;
            assert_eq!(resized(&disk, size).unwrap(), size - more);
            let mut driver = open(&disk, false).unwrap();
            let mut all = vec![1; size as usize];
            driver.read(0, &mut all).unwrap();
            assert!(all[..5000].iter().all(|b| *b == 7));
            assert!(
                all[old as usize - 1024..old as usize]
                    .iter()
                    .all(|b| *b == 6)
            );
            assert!(
                all[old as usize..].iter().all(|b| *b == 0),
                "{options:?} {size}"
            );
            driver.close().unwrap();
            assert_eq!(
                checked(&disk, Repair::No).unwrap().findings,
                [],
                "{options:?} {size}"
            );
            let (path, raw) = (dir.path("grown.vhd"), dir.path("grown.raw"));
            fs::write(&path, disk.bytes()).unwrap();
            run(Command::new("qemu-img")
                .args(["convert", "-f", "vpc", "-O", "raw"])
                .arg(&path)
                .arg(&raw));
            assert!(
                fs::read(&raw).unwrap() == all,
                "{options:?} {size}: QEMU reads something else"
            );
        }
        // The larger table is used.
        let mut driver = open(&disk, false).unwrap();
        driver.write(size - 512, &[8; 512]).unwrap();
        driver.close().unwrap();
        let mut read = [0; 512];
        open(&disk, true)
            .unwrap()
            .read(size - 512, &mut read)
            .unwrap();
        assert_eq!(read, [8; 512]);
        for (wish, kind) in [
            (512, ErrorKind::Unsupported),
            ((2040 << 30) + 512, ErrorKind::Unsupported),
        ] {
            assert_eq!(resized(&disk, wish).unwrap_err().kind(), kind);
        }
    }
}

#[test]
fn ids_are_shown_as_others_show_them() {
    let id = UniqueId([0xab; 16]);
    assert_eq!(id.to_string(), "abababab-abab-abab-abab-abababababab");
}
