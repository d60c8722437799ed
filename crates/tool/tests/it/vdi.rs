//! VDI images: checks, repairs, resizing, and files that lie.

use block::{Result, Storage};
use disk::blocking::{Driver, Member};
use image::vdi::{CreateOptions, FREE, ImageType, OpenOptions, Vdi, ZERO, create, grow, mend};
use image::{ExtentKind, Format, Image};
use io::{SimDisk, SimOptions};
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use testkit::TempDir;
use testkit::command::run;
use tool::check::{CheckOptions, Repair, Report, vdi::check};
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};

const BLOCK: usize = 1 << 20;

fn disk(bytes: &[u8]) -> Arc<SimDisk> {
    SimDisk::from_bytes(SimOptions::default(), bytes)
}

fn member(disk: &Arc<SimDisk>, read_only: bool) -> Result<Member> {
    let image: Arc<dyn Image> = Arc::new(Vdi::open(
        &**disk,
        &OpenOptions {
            read_only,
            ..OpenOptions::default()
        },
    )?);
    let files: Vec<Arc<dyn Storage>> = vec![disk.clone()];
    Ok(Member { image, files })
}

fn open(disk: &Arc<SimDisk>, read_only: bool) -> Result<Driver> {
    Driver::new(vec![member(disk, read_only)?], read_only)
}

fn content(disk: &Arc<SimDisk>) -> Vec<u8> {
    let mut driver = open(disk, true).unwrap();
    let mut bytes = vec![0; driver.size() as usize];
    let mut at = 0;
    while at < driver.size() {
        let extent = driver.extent_at(at, driver.size() - at).unwrap();
        if matches!(extent.kind, ExtentKind::Data { .. }) {
            let part = &mut bytes[at as usize..][..extent.len as usize];
            driver.read(at, part).unwrap();
        }
        at += extent.len;
    }
    bytes
}

fn checked(disk: &Arc<SimDisk>, repair: Repair) -> Result<Report> {
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    check(&**disk, &options)
}

/// An image as VirtualBox or QEMU lay it out: a block for each entry that names one, filled with `0x10 + number`.
struct Forge {
    size: u64,
    block: usize,
    map_offset: usize,
    data_offset: usize,
    map: Vec<u32>,
    counted: u32,
    /// Blocks of the file.
    blocks: u32,
}

impl Forge {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.data_offset];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let word = |value: usize| (value as u32).to_le_bytes();
        put(0, b"<<< Oracle VM VirtualBox Disk Image >>>\n");
        put(0x40, &0xbeda_107fu32.to_le_bytes());
        put(0x44, &0x0001_0001u32.to_le_bytes());
        put(0x48, &word(0x190));
        put(0x4c, &word(1));
        put(0x54, b"a comment");
        put(0x154, &word(self.map_offset));
        put(0x158, &word(self.data_offset));
        put(0x168, &word(512));
        put(0x170, &self.size.to_le_bytes());
        put(0x178, &word(self.block));
        put(0x180, &word(self.map.len()));
        put(0x184, &self.counted.to_le_bytes());
        put(0x188, &[5; 16]);
        put(0x198, &[6; 16]);
        for (number, entry) in self.map.iter().enumerate() {
            put(self.map_offset + number * 4, &entry.to_le_bytes());
        }
        for number in 0..self.blocks {
            bytes.resize(bytes.len() + self.block, 0x10 + number as u8);
        }
        bytes
    }

    /// What the disk reads as.
    fn content(&self) -> Vec<u8> {
        let blocks = self.map.iter().flat_map(|entry| {
            let byte = match *entry {
                FREE | ZERO => 0,
                number => 0x10 + number as u8,
            };
            vec![byte; self.block]
        });
        let mut bytes: Vec<u8> = blocks.collect();
        bytes.truncate(self.size as usize);
        bytes
    }
}

/// As VirtualBox makes them: map and blocks begin at multiples of 1 MiB.
fn forged() -> Forge {
    Forge {
        size: (4 << 20) + 512,
        block: BLOCK,
        map_offset: 1 << 20,
        data_offset: 2 << 20,
        map: vec![2, FREE, 0, ZERO, 1],
        counted: 3,
        blocks: 3,
    }
}

/// Smaller blocks, which QEMU does not open.
fn small() -> Forge {
    Forge {
        size: 6 * 4096 - 512,
        block: 4096,
        map_offset: 512,
        data_offset: 1024,
        map: vec![2, FREE, 0, ZERO, 1, 3],
        counted: 4,
        blocks: 4,
    }
}

#[test]
fn sound_images_have_no_findings_and_read_as_they_should() {
    let mut all = forged();
    all.map[4] = FREE;
    all.map[1] = 1;
    for forge in [all, small()] {
        let disk = disk(&forge.bytes());
        let report = checked(&disk, Repair::No).unwrap();
        assert_eq!(report.findings, [], "{report:?}");
        assert!(content(&disk) == forge.content());
        let before = disk.bytes();
        assert_eq!(mend(&*disk).unwrap(), None);
        open(&disk, false).unwrap().close().unwrap();
        assert!(disk.bytes() == before, "opening for writing wrote");
    }
}

#[test]
fn files_that_lie_are_refused() {
    type Change = fn(&mut Vec<u8>);
    fn put(bytes: &mut [u8], at: usize, value: u32) {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    let cases: [(Change, &str); 22] = [
        (|b| b.truncate(300), "too short"),
        (|b| b.truncate(520), "it is cut off"),
        (|b| put(b, 0x40, 7), "signature at byte 0x40"),
        (|b| put(b, 0x44, 0x0002_0000), "version at byte 0x44 is 2.0"),
        (|b| put(b, 0x44, 2), "only 1.1"),
        (|b| put(b, 0x48, 0x100), "bytes of the header"),
        (|b| put(b, 0x4c, 3), "undo image"),
        (|b| put(b, 0x4c, 4), "differencing image"),
        (|b| put(b, 0x4c, 9), "type at byte 0x4c is 9"),
        (|b| put(b, 0x1a8, 1), "UUID of the parent at byte 0x1a8"),
        (|b| put(b, 0x1b8, 1), "parent's last change"),
        (|b| put(b, 0x154, 0), "offset of the map"),
        (|b| put(b, 0x154, 513), "offset of the map"),
        (|b| put(b, 0x154, !511), "reaches into"),
        (|b| put(b, 0x158, 512), "reaches into"),
        (|b| put(b, 0x158, 1025), "offset of the blocks"),
        (|b| put(b, 0x168, 4096), "bytes of a sector"),
        (|b| put(b, 0x174, u32::MAX), "that is no size"),
        (|b| put(b, 0x174, 1), "the map at byte 0x180 has 6 blocks"),
        (|b| put(b, 0x178, 3000), "a power of two"),
        (|b| put(b, 0x17c, 512), "QEMU and VirtualBox differ"),
        (
            |b| put(b, 0x180, u32::MAX),
            "at most 33554432 are supported",
        ),
    ];
    for (change, said) in cases {
        let mut bytes = small().bytes();
        change(&mut bytes);
        let disk = disk(&bytes);
        for read_only in [true, false] {
            let error = open(&disk, read_only).map(drop).unwrap_err().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
        for repair in [Repair::No, Repair::All] {
            let report = checked(&disk, repair);
            assert!(report.is_err(), "{said}: {report:?}");
        }
        assert!(disk.bytes() == bytes, "{said}");
    }
}

/// What is wrong, what the check counts, whether it may be written to, and what a repair leaves.
#[test]
fn damage_is_found_and_repaired_without_a_change_of_the_disk() {
    type Change = fn(&mut Forge);
    // Corruptions, leaks, overlaps; whether a writer may open it.
    let cases: [(Change, [u64; 3], bool, &str); 9] = [
        (|f| f.counted = 6, [0, 2, 0], true, "counts 6, there are 4"),
        (|f| f.counted = 3, [1, 0, 0], true, "would lie on another"),
        (|f| f.map[0] = FREE, [0, 1, 0], true, "are no block's"),
        (
            |f| f.map[5] = FREE,
            [0, 1, 0],
            true,
            "counts 4, there are 3",
        ),
        (
            |f| f.map[1] = 2,
            [1, 0, 1],
            false,
            "another block has it too",
        ),
        (
            |f| {
                (f.map[2], f.map[4]) = (3, 2);
            },
            [2, 2, 2],
            false,
            "another block has it too",
        ),
        (
            |f| {
                (f.blocks, f.counted, f.map[0]) = (8, 8, 7);
            },
            [0, 5, 0],
            true,
            "a resize was cut off",
        ),
        // Nobody has counted it.
        (
            |f| {
                (f.blocks, f.counted, f.map[0]) = (8, 7, 7);
            },
            [2, 4, 0],
            false,
            "too large",
        ),
        (
            |f| {
                (f.blocks, f.counted) = (9, 4);
            },
            [0, 1, 0],
            true,
            "behind the last block",
        ),
    ];
    for (change, counts, writable, said) in cases {
        let mut forge = small();
        change(&mut forge);
        let damaged = disk(&forge.bytes());
        let report = checked(&damaged, Repair::No).unwrap();
        let texts: Vec<&str> = report.findings.iter().map(|f| f.text.as_str()).collect();
        assert!(
            texts.iter().any(|text| text.contains(said)),
            "{said}: {texts:?}"
        );
        let found = [report.corruptions, report.leaks, report.overlaps];
        assert_eq!(found, counts, "{said}: {texts:?}");
        assert!(content(&damaged) == forge.content(), "{said}");
        let mended = damaged.copy();
        assert_eq!(mend(&*mended).is_ok(), writable, "{said}");
        assert_eq!(open(&mended, false).is_ok(), writable, "{said}");
        assert!(content(&mended) == forge.content(), "{said}");
        for repair in [Repair::Leaks, Repair::All] {
            let disk = damaged.copy();
            let report = checked(&disk, repair).unwrap();
            let left = report.corruptions + report.leaks;
            let wanted = repair == Repair::All || counts[0] == 0;
            assert_eq!(left == 0, wanted, "{said}, {repair:?}: {report:?}");
            assert!(content(&disk) == forge.content(), "{said}, {repair:?}");
            assert!(!wanted || open(&disk, false).is_ok(), "{said}, {repair:?}");
        }
    }
}

/// A block that is not in the file, or only in part, takes nothing from the others; but nobody writes then, or repairs.
#[test]
fn what_the_file_lacks_bars_writing_only() {
    let sound = small().bytes();
    // Of the last block 1000 bytes are left: one sector.
    let cut = sound[..1024 + 3 * 4096 + 1000].to_vec();
    let mut wrong = sound.clone();
    wrong[512 + 5 * 4..][..4].copy_from_slice(&0xffffu32.to_le_bytes());
    for (bytes, there, counts) in [(cut, 512, [1, 0]), (wrong, 0, [2, 1])] {
        let disk = disk(&bytes);
        let (mut driver, from) = (open(&disk, true).unwrap(), 5 * 4096);
        let mut read = vec![0; from + there];
        driver.read(0, &mut read).unwrap();
        assert!(read == small().content()[..read.len()]);
        let lost = (from + there) as u64;
        for error in [
            driver.read(lost, &mut [0; 512]).unwrap_err(),
            driver.extent_at(lost, 512).map(drop).unwrap_err(),
        ] {
            let error = error.to_string();
            assert!(
                error.contains("block 5: its entry at byte 0x214"),
                "{error}"
            );
        }
        let write = open(&disk, false).map(drop).unwrap_err().to_string();
        let grow = grow(&*disk, 8 * 4096).unwrap_err().to_string();
        for error in [write, grow, mend(&*disk).unwrap_err().to_string()] {
            assert!(error.contains("convert --salvage"), "{error}");
        }
        let report = checked(&disk, Repair::All).unwrap();
        assert_eq!([report.corruptions, report.leaks], counts, "{report:?}");
        assert!(disk.bytes() == bytes);
    }
}

/// Numbers that a crash left out are given to new blocks, whose rest reads as zeros whatever the file has there.
#[test]
fn holes_are_used_again() {
    let mut forge = small();
    (forge.map[0], forge.map[2]) = (FREE, FREE);
    let disk = disk(&forge.bytes());
    let mut model = forge.content();
    let mut driver = open(&disk, false).unwrap();
    for (at, len) in [(0, 700), (4096 * 3 + 1000, 96), (4096 + 4000, 5000)] {
        driver.write(at, &vec![0xee; len]).unwrap();
        model[at as usize..][..len].fill(0xee);
    }
    driver.close().unwrap();
    assert!(content(&disk) == model);
    let report = checked(&disk, Repair::No).unwrap();
    assert_eq!((report.findings, report.allocated_clusters), (vec![], 6));
    assert_eq!(disk.bytes().len(), 1024 + 6 * 4096);
}

/// The disk grows where the map has room and where it has to move; QEMU reads what we do, and finds nothing wrong.
#[test]
fn disks_grow() {
    let dir = TempDir::new();
    let path = dir.path("disk.vdi");
    let mut packed = forged();
    (packed.map_offset, packed.data_offset) = (512, 1024);
    let mut still = packed.bytes();
    still[0x4c] = 2;
    still[512..532].copy_from_slice(&[2u32, 4, 0, 3, 1].map(u32::to_le_bytes).concat());
    still[0x184] = 5;
    still.resize(1024 + 5 * BLOCK, 0x77);
    let mut few = packed.bytes();
    few[512..532].copy_from_slice(&[FREE, 0, FREE, FREE, FREE].map(u32::to_le_bytes).concat());
    few[0x184] = 1;
    few.truncate(1024 + BLOCK);
    for (what, bytes, sizes) in [
        (
            "with room",
            forged().bytes(),
            &[5 << 20, (9 << 20) + 512][..],
        ),
        ("without", packed.bytes(), &[129 << 20, 130 << 20]),
        ("few blocks", few, &[129 << 20]),
        ("static", still, &[(5 << 20) + 512, 9 << 20]),
    ] {
        let disk = disk(&bytes);
        let mut model = content(&disk);
        for size in sizes {
            let options = ResizeOptions {
                size: *size,
                shrink: false,
                preallocation: Preallocation::Off,
            };
            resize(&[member(&disk, false).unwrap()], Format::Vdi, &options).unwrap();
            model.resize(*size as usize, 0);
            assert!(content(&disk) == model, "{what} {size}");
            let report = checked(&disk, Repair::No).unwrap();
            assert_eq!(report.findings, [], "{what} {size}");
            let mut driver = open(&disk, false).unwrap();
            let at = size - (1 << 20) - 700;
            driver.write(at, &[0xcd; 900]).unwrap();
            driver.close().unwrap();
            model[at as usize..][..900].fill(0xcd);
        }
        fs::write(&path, disk.bytes()).unwrap();
        run(Command::new("qemu-img")
            .args(["check", "-q", "-f", "vdi"])
            .arg(&path));
        // Mostly a hole.
        let raw = fs::File::create(dir.path("disk.raw")).unwrap();
        raw.set_len(model.len() as u64).unwrap();
        let zeros = vec![0; 64 << 10];
        for (at, part) in (0..).step_by(zeros.len()).zip(model.chunks(zeros.len())) {
            if *part != zeros[..part.len()] {
                raw.write_all_at(part, at).unwrap();
            }
        }
        let compare = ["compare", "-q", "-f", "vdi", "-F", "raw"];
        let raw = dir.path("disk.raw");
        run(Command::new("qemu-img").args(compare).arg(&path).arg(&raw));
    }
}

#[test]
fn what_cannot_grow_is_refused_before_anything_is_written() {
    let mut over = small();
    over.size = 5 * 4096;
    for (forge, size, said) in [
        (small(), 4096, "cannot shrink"),
        (small(), 32 << 30, "too large for a vdi image"),
        (over, 7 * 4096, "behind the disk's end"),
        (
            Forge {
                data_offset: 1024,
                counted: 9,
                ..small()
            },
            (1 << 20) + 1,
            "a multiple of 512",
        ),
    ] {
        let disk = disk(&forge.bytes());
        let before = disk.bytes();
        let options = ResizeOptions {
            size,
            shrink: true,
            preallocation: Preallocation::Off,
        };
        if said == "too large for a vdi image" {
            let most = u64::from(image::vdi::BLOCKS_MAX) * 4096 + 512;
            let options = ResizeOptions {
                size: most,
                ..options
            };
            let done = resize(&[member(&disk, false).unwrap()], Format::Vdi, &options);
            let error = done.unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
            continue;
        }
        let done = resize(&[member(&disk, false).unwrap()], Format::Vdi, &options);
        let error = done.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert!(disk.bytes() == before, "{said}");
    }
}

/// Of blocks that are larger than what is filled at once, holes are left.
#[test]
fn large_blocks_are_added_behind_all_others() {
    let disk = SimDisk::new(SimOptions::default());
    let options = CreateOptions {
        size: 16 << 20,
        image_type: ImageType::Dynamic,
        block_bytes: 4 << 20,
    };
    create(&*disk, &options).unwrap();
    let mut driver = open(&disk, false).unwrap();
    for block in [2, 0] {
        driver.write((block << 22) + 5, b"abc").unwrap();
    }
    driver.close().unwrap();
    // The first one is lost.
    disk.write_at(512 + 8, &FREE.to_le_bytes()).unwrap();
    let mut driver = open(&disk, false).unwrap();
    driver.write(3 << 22, b"abc").unwrap();
    driver.close().unwrap();
    let report = checked(&disk, Repair::No).unwrap();
    assert_eq!((report.leaks, report.corruptions), (1, 0), "{report:?}");
    let report = checked(&disk, Repair::Leaks).unwrap();
    assert_eq!((report.leaks, report.leaks_fixed), (0, 1), "{report:?}");
    let bytes = content(&disk);
    assert_eq!(
        (&bytes[3 << 22..][..3], &bytes[5..8]),
        (&b"abc"[..], &b"abc"[..])
    );
}
