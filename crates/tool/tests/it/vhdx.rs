//! VHDX images: logs, checks, repairs, resizing, and files that lie.

use block::{ErrorKind, Result, Storage};
use disk::blocking::{Driver, Member};
use image::vhdx::{CreateOptions, Layout, OpenOptions, Vhdx, create, mend};
use image::{Format, Image};
use io::{SimDisk, SimOptions};
use std::sync::Arc;
use testkit::vhdx::{
    BLOCKS, Change, Entry, Forge, HEADERS, ITEMS, LOG, LOG_ID, METADATA, MIB, REGIONS, TABLE,
    header, put, region,
};
use tool::check::{CheckOptions, Repair, Report, vhdx::check};
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};

fn disk(bytes: &[u8]) -> Arc<SimDisk> {
    SimDisk::from_bytes(SimOptions::default(), bytes)
}

fn options(read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        ..OpenOptions::default()
    }
}

fn member(disk: &Arc<SimDisk>, read_only: bool) -> Result<Member> {
    let image: Arc<dyn Image> = Arc::new(Vhdx::open(&**disk, &options(read_only))?);
    let files: Vec<Arc<dyn Storage>> = vec![disk.clone()];
    Ok(Member { image, files })
}

fn open(disk: &Arc<SimDisk>, read_only: bool) -> Result<Driver> {
    Driver::new(vec![member(disk, read_only)?], read_only)
}

fn content(disk: &Arc<SimDisk>) -> Result<Vec<u8>> {
    let mut driver = open(disk, true)?;
    let mut bytes = vec![0xa5; driver.size() as usize];
    driver.read(0, &mut bytes)?;
    Ok(bytes)
}

/// What the first byte of each block is.
fn firsts(disk: &Arc<SimDisk>) -> Result<Vec<u8>> {
    Ok(content(disk)?.chunks(MIB).map(|block| block[0]).collect())
}

fn checked(disk: &Arc<SimDisk>, repair: Repair) -> Result<Report> {
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    check(&**disk, &options)
}

fn forged() -> Forge {
    let mut forge = Forge::new(7 * MIB as u64 + 512);
    forge.blocks = vec![
        (5, 6, 0x15),
        (0, 6, 0x10),
        (1, 1, 0),
        (2, 2, 0),
        (3, 3, 0),
        (4, 5, 0),
    ];
    forge
}

fn forge_with(change: impl Fn(&mut Vec<u8>)) -> Arc<SimDisk> {
    let mut bytes = forged().bytes();
    change(&mut bytes);
    disk(&bytes)
}

#[test]
fn blocks_read_as_their_states_say() {
    let disk = disk(&forged().bytes());
    assert_eq!(firsts(&disk).unwrap(), [0x10, 0, 0, 0, 0, 0x15, 0, 0]);
    let report = checked(&disk, Repair::No).unwrap();
    assert_eq!(report.findings, [], "{report:?}");
    assert_eq!((report.total_clusters, report.allocated_clusters), (8, 2));
    // Each can be written to.
    let mut driver = open(&disk, false).unwrap();
    for block in 0..8u64 {
        driver.write(block << 20, &[block as u8 + 1]).unwrap();
    }
    driver.close().unwrap();
    assert_eq!(firsts(&disk).unwrap(), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(checked(&disk, Repair::No).unwrap().findings, []);
    // Sectors of 4096 bytes make chunks of other sizes.
    let mut forge = Forge::new(40 << 30);
    forge.sector = 4096;
    forge.blocks = vec![(32767, 6, 1), (32768, 6, 2)];
    let mut driver = open(&self::disk(&forge.bytes()), true).unwrap();
    for (at, byte) in [(32767u64, 1), (32768, 2)] {
        let mut read = [0; 1];
        driver.read(at << 20, &mut read).unwrap();
        assert_eq!(read, [byte]);
    }
}

/// What lies is found by the check, and refused where it would do harm; nothing panics, hangs or takes memory without
/// bound.
#[test]
fn files_that_lie_are_refused() {
    type Change = (&'static str, fn(&mut Vec<u8>));
    let small = Forge::new(7 * MIB as u64 + 512).bytes();
    let cases: [(Change, &str); 42] = [
        (("signature", |b| b[3] = 0), "vhdxfile"),
        (("short", |b| b.truncate(MIB - 1)), "too short"),
        (
            ("both headers", |b| HEADERS.iter().for_each(|at| b[*at] = 0)),
            "no header is sound",
        ),
        (
            ("checksums", |b| {
                HEADERS.iter().for_each(|at| b[*at + 4] ^= 1)
            }),
            "checksum",
        ),
        (
            ("same number", |b| {
                header(b, 8, &[7; 8]);
                b[HEADERS[1] + 32] = 9;
                testkit::vhdx::seal(&mut b[HEADERS[1]..][..4096]);
            }),
            "sequence number",
        ),
        (
            ("version", |b| header(b, 66, &[2, 0])),
            "version at byte 66 is 2",
        ),
        (("log version", |b| header(b, 48, &[1; 18])), "log version"),
        (
            ("log at 0", |b| header(b, 72, &[0; 8])),
            "the log at byte 0x0",
        ),
        (
            ("log odd", |b| {
                header(b, 72, &(LOG as u64 + 512).to_le_bytes())
            }),
            "the log at byte",
        ),
        (
            ("log far", |b| {
                header(b, 72, &(!(MIB as u64 - 1)).to_le_bytes())
            }),
            "the log at byte",
        ),
        (
            ("log long", |b| {
                header(b, 68, &(!(MIB as u32 - 1)).to_le_bytes())
            }),
            "the log at byte",
        ),
        (
            ("log on the table", |b| {
                header(b, 72, &(TABLE as u64).to_le_bytes())
            }),
            "lies on the log",
        ),
        (
            ("region tables", |b| {
                REGIONS.iter().for_each(|at| b[*at + 9] ^= 1)
            }),
            "region table",
        ),
        (
            ("regions", |b| region(b, 8, &2048u32.to_le_bytes())),
            "the most is 2047",
        ),
        (
            ("none of them", |b| region(b, 8, &[0; 4])),
            "has no block table",
        ),
        (("no metadata", |b| region(b, 8, &[1])), "has no metadata"),
        (
            ("region unknown", |b| region(b, 48, &[9; 16])),
            "is required, and not known",
        ),
        (
            ("region in the head", |b| region(b, 32, &[0; 8])),
            "multiples of 1 MiB",
        ),
        (
            ("region odd", |b| region(b, 40, &[1])),
            "multiples of 1 MiB",
        ),
        (
            ("region empty", |b| region(b, 40, &[0; 4])),
            "multiples of 1 MiB",
        ),
        (
            ("region far", |b| {
                region(b, 32, &(!(MIB as u64 - 1)).to_le_bytes())
            }),
            "within the file",
        ),
        (
            ("regions overlap", |b| {
                region(b, 64, &(TABLE as u64).to_le_bytes())
            }),
            "lies on the log or another",
        ),
        (
            ("region twice", |b| {
                let id = b[REGIONS[0] + 16..REGIONS[0] + 32].to_vec();
                region(b, 48, &id);
            }),
            "is there twice",
        ),
        (("metadata", |b| b[METADATA] = 0), "do not begin with"),
        (
            ("items", |b| put(b, METADATA + 10, &[0xff, 0xff])),
            "the most is 2047",
        ),
        (
            ("no items", |b| put(b, METADATA + 10, &[0, 0])),
            "is missing",
        ),
        (
            ("item unknown", |b| put(b, METADATA + 32 + 64, &[9; 16])),
            "is required, and not known",
        ),
        (
            ("item in the table", |b| put(b, METADATA + 32 + 16, &[0; 4])),
            "file parameters: has",
        ),
        (
            ("item far", |b| put(b, METADATA + 32 + 16, &[0xff; 4])),
            "file parameters: has",
        ),
        (
            ("item long", |b| put(b, METADATA + 32 + 20, &[0xff; 4])),
            "file parameters: has",
        ),
        (
            ("item short", |b| put(b, METADATA + 32 + 20, &[7])),
            "file parameters: has",
        ),
        (
            ("item twice", |b| {
                let id = b[METADATA + 32..METADATA + 48].to_vec();
                put(b, METADATA + 64, &id);
            }),
            "is there twice",
        ),
        (
            ("block size 0", |b| put(b, ITEMS[0], &[0; 4])),
            "block size is 0",
        ),
        (
            ("block size odd", |b| {
                put(b, ITEMS[0], &(3 * MIB as u32).to_le_bytes())
            }),
            "block size",
        ),
        (
            ("block size huge", |b| {
                put(b, ITEMS[0], &(512 * MIB as u32).to_le_bytes())
            }),
            "block size",
        ),
        (("flags", |b| put(b, ITEMS[0] + 4, &[4])), "flags at byte 4"),
        (
            ("no locator", |b| put(b, ITEMS[0] + 4, &[2])),
            "parent locator: is missing",
        ),
        (
            ("disk size odd", |b| put(b, ITEMS[1], &[1])),
            "virtual disk size",
        ),
        (
            ("disk size huge", |b| {
                put(b, ITEMS[1], &[0, 2, 0, 0, 0, 64, 0, 0])
            }),
            "64 TiB",
        ),
        (
            ("disk larger than the table", |b| {
                put(b, ITEMS[1], &(64u64 << 40).to_le_bytes())
            }),
            "has room for",
        ),
        (
            ("sectors", |b| put(b, ITEMS[3], &520u32.to_le_bytes())),
            "logical sector size",
        ),
        (
            ("physical sectors", |b| put(b, ITEMS[4], &[0; 4])),
            "physical sector size",
        ),
    ];
    for ((name, change), said) in cases {
        let mut bytes = small.clone();
        change(&mut bytes);
        let disk = disk(&bytes);
        for read_only in [true, false] {
            let error = open(&disk, read_only)
                .map(drop)
                .expect_err(name)
                .to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
        let _ = mend(&*disk);
        for repair in [Repair::No, Repair::All] {
            assert!(checked(&disk, repair).is_err(), "{name}");
        }
        assert!(disk.bytes() == bytes, "{name}: it was written to");
    }
}

/// Entries that lie bar the image, and are found.
#[test]
fn entries_that_lie_are_found() {
    let good = forged().bytes();
    let entry = |at: usize| u64::from_le_bytes(good[TABLE + at * 8..][..8].try_into().unwrap());
    for (value, said, repaired) in [
        (entry(0) | 8, "sets reserved bits", false),
        (u64::MAX, "sets reserved bits", false),
        (1 << 50 | 6, "sets reserved bits", false),
        (4, "has state 4", false),
        (entry(0) | 7, "has state 7", false),
        (6, "on the image's tables", false),
        (METADATA as u64 | 6, "on the image's tables", false),
        (1 << 40 | 6, "cut off", false),
        (entry(5), "overlap", false),
    ] {
        let disk = forge_with(|b| put(b, TABLE, &value.to_le_bytes()));
        let error = open(&disk, false).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(said), "{value:#x}: {error}");
        let report = checked(&disk, Repair::All).unwrap();
        assert_eq!(report.corruptions == 0, repaired, "{value:#x}: {report:?}");
        // Blocks that overlap can be read.
        assert_eq!(open(&disk, true).is_ok(), said == "overlap", "{value:#x}");
    }
    // An entry of a sector bitmap block, where there is no parent.
    let mut forge = Forge::new(5 << 30);
    forge.blocks = vec![(4096, 6, 1)];
    let mut bytes = forge.bytes();
    put(
        &mut bytes,
        TABLE + 4096 * 8,
        &(BLOCKS as u64 | 6).to_le_bytes(),
    );
    let report = checked(&disk(&bytes), Repair::No).unwrap();
    assert_eq!(report.corruptions, 1, "{report:?}");
    // Behind the last entry nobody looks, and nothing is written there.
    let disk = forge_with(|b| put(b, TABLE + 400 * 8, &[0xff; 8]));
    let why = Vhdx::open(&*disk, &OpenOptions::default()).unwrap();
    assert!(why.describe().read_only_because.is_some());
}

#[test]
fn damaged_copies_are_repaired_from_the_others() {
    for (at, severe) in [
        (HEADERS[0], false),
        (HEADERS[1], false),
        (REGIONS[0], true),
        (REGIONS[1], true),
    ] {
        let disk = forge_with(|b| b[at + 100] ^= 1);
        assert_eq!(firsts(&disk).unwrap()[0], 0x10);
        let report = checked(&disk, Repair::Leaks).unwrap();
        assert_eq!(report.corruptions, u64::from(severe), "{at:#x} {report:?}");
        assert_eq!(report.leaks_fixed, u64::from(!severe), "{at:#x} {report:?}");
        let report = checked(&disk, Repair::All).unwrap();
        assert_eq!(
            report.corruptions_fixed,
            u64::from(severe),
            "{at:#x} {report:?}"
        );
        let bytes = disk.bytes();
        assert_eq!(bytes[REGIONS[0]..][..65536], bytes[REGIONS[1]..][..65536]);
        assert_eq!(checked(&disk, Repair::No).unwrap().findings, []);
    }
    // What nothing refers to at the end is cut off.
    let disk = forge_with(|b| b.resize(b.len() + 3 * MIB, 0xdb));
    assert_eq!(checked(&disk, Repair::No).unwrap().leaks, 3);
    assert_eq!(checked(&disk, Repair::Leaks).unwrap().leaks_fixed, 3);
    assert_eq!(disk.len().unwrap() as usize, BLOCKS + 2 * MIB);
}

/// The table with block 6 at the place of block 5, and nothing in place of that.
fn moved(bytes: &[u8]) -> Vec<u8> {
    let mut sector = bytes[TABLE..TABLE + 4096].to_vec();
    sector.copy_within(5 * 8..6 * 8, 6 * 8);
    sector[5 * 8..6 * 8].fill(0);
    sector
}

/// Logs of all kinds: what counts of each is read as if it were in place, and put there before the image is written.
#[test]
fn what_counts_of_a_log_is_put_in_place() {
    let plain = [0x10, 0, 0, 0, 0, 0x15, 0, 0];
    let after = [0x10, 0, 0, 0, 0, 0, 0x15, 0];
    let empty = [0; 8];
    let bytes = forged().bytes();
    let (len, table) = (bytes.len(), TABLE as u64);
    let old = || Change::Data(table, bytes[TABLE..TABLE + 4096].to_vec());
    let new = || Change::Data(table, moved(&bytes));
    let none = || Change::Zeros(table, 4096);
    let entry = |at, sequence, change| Entry::new(at, sequence, len, vec![change]);
    let with_tail = |tail, entry: Entry| Entry { tail, ..entry };
    let torn = |file: &mut [u8], at: usize| file[LOG + at * 4096 + 100] ^= 1;
    type Make<'a> = Box<dyn Fn(&mut Vec<u8>) + 'a>;
    let put_all = |entries: Vec<Entry>| -> Make<'_> {
        Box::new(move |file| entries.iter().for_each(|entry| entry.put(file)))
    };
    let cases: Vec<(&str, Make<'_>, [u8; 8])> = vec![
        ("nothing", put_all(vec![]), plain),
        ("one", put_all(vec![entry(0, 9, new())]), after),
        (
            "one round the end",
            put_all(vec![entry(255, 9, new())]),
            after,
        ),
        (
            "one that says nothing",
            put_all(vec![Entry::new(7, 9, len, vec![])]),
            plain,
        ),
        (
            "zeros, then data",
            put_all(vec![Entry::new(0, 1, len, vec![none(), new()])]),
            after,
        ),
        (
            "data, then zeros",
            put_all(vec![Entry::new(0, 1, len, vec![new(), none()])]),
            empty,
        ),
        (
            "a sequence",
            put_all(vec![entry(3, 5, none()), with_tail(3, entry(4, 6, new()))]),
            after,
        ),
        (
            "a sequence round the end",
            put_all(vec![
                entry(254, 5, new()),
                with_tail(254, entry(0, 6, none())),
            ]),
            empty,
        ),
        // What is before the tail is in place, and was changed since.
        (
            "of a sequence the end",
            put_all(vec![entry(3, 5, new()), entry(5, 6, old())]),
            plain,
        ),
        (
            "the newer",
            put_all(vec![entry(3, 8, new()), entry(100, 7, none())]),
            after,
        ),
        (
            "number gap",
            put_all(vec![entry(3, 5, none()), with_tail(3, entry(4, 7, new()))]),
            empty,
        ),
        (
            "the newer torn",
            Box::new(|file| {
                entry(3, 5, new()).put(file);
                entry(90, 6, none()).put(file);
                torn(file, 90);
            }),
            after,
        ),
        (
            "its data torn",
            Box::new(|file| {
                entry(3, 5, new()).put(file);
                torn(file, 4);
            }),
            plain,
        ),
        (
            "another log's",
            Box::new(|file| {
                entry(3, 5, new()).put(file);
                header(file, 48, &[0x78; 16]);
            }),
            plain,
        ),
        (
            "the tail elsewhere",
            put_all(vec![with_tail(50, entry(3, 5, new()))]),
            plain,
        ),
        ("number 0", put_all(vec![entry(3, 0, new())]), plain),
    ];
    for (name, make, want) in cases {
        let mut file = bytes.clone();
        header(&mut file, 48, &LOG_ID);
        make(&mut file);
        let disk = disk(&file);
        assert_eq!(firsts(&disk).unwrap(), want, "{name}");
        assert!(disk.bytes() == file, "{name}: a reader wrote");
        let copy = self::disk(&file);
        // Whoever writes must put it in place before.
        let entries = Layout::read(&*disk).unwrap().log_entries;
        assert_eq!(open(&disk, false).is_ok(), entries == 0, "{name}");
        assert!(mend(&*disk).unwrap().is_some(), "{name}");
        let layout = Layout::read(&*disk).unwrap();
        assert_eq!(
            (layout.log_entries, layout.headers.current.log.0),
            (0, [0; 16]),
            "{name}"
        );
        assert_eq!(firsts(&disk).unwrap(), want, "{name}");
        assert_eq!(mend(&*disk).unwrap(), None, "{name}");
        let mut driver = open(&disk, false).unwrap();
        driver.write(0, &[3]).unwrap();
        driver.close().unwrap();
        assert_eq!(firsts(&disk).unwrap()[1..], want[1..], "{name}");
        let report = checked(&copy, Repair::All).unwrap();
        assert_eq!(report.corruptions + report.leaks, 0, "{name}: {report:?}");
        assert_eq!(firsts(&copy).unwrap(), want, "{name}");
    }
}

/// Entries that are sound and say what must not be; and what looks like an entry and leads round and round.
#[test]
fn logs_that_lie_are_refused() {
    let bytes = forged().bytes();
    let len = bytes.len();
    let data = |at: usize| Change::Data(at as u64, vec![0; 4096]);
    let one = |change: Change| Entry::new(0, 1, len, vec![change]);
    let end = len as u64;
    for (entry, said) in [
        (one(data(HEADERS[0])), "headers"),
        (one(data(0)), "headers"),
        (one(data(LOG + 8192)), "the log itself"),
        (one(data(len)), "behind the file's end"),
        (one(Change::Zeros(TABLE as u64, !4095)), "too many"),
        (
            one(Change::Zeros(TABLE as u64, end)),
            "behind the file's end",
        ),
        (one(Change::Zeros(0, end)), "headers"),
        (
            Entry {
                flushed: end + 1,
                ..one(data(TABLE))
            },
            "it was cut off",
        ),
        (
            Entry {
                last: 1 << 60,
                ..one(data(TABLE))
            },
            "the most is",
        ),
    ] {
        let mut file = bytes.clone();
        header(&mut file, 48, &LOG_ID);
        entry.put(&mut file);
        let disk = disk(&file);
        for read_only in [true, false] {
            let error = open(&disk, read_only).map(drop).unwrap_err().to_string();
            assert!(error.contains(said), "{entry:?}: {error}");
        }
        assert!(mend(&*disk).is_err() && checked(&disk, Repair::All).is_err());
        assert!(disk.bytes() == file, "{entry:?}: it was written to");
    }
    // Data of the disk are not read through the log, but put in place they are.
    let mut file = bytes.clone();
    header(&mut file, 48, &LOG_ID);
    one(data(BLOCKS)).put(&mut file);
    let disk = disk(&file);
    let error = open(&disk, true).map(drop).unwrap_err().to_string();
    assert!(error.contains("check --repair all"), "{error}");
    assert_eq!(checked(&disk, Repair::Leaks).unwrap().corruptions_fixed, 1);
    assert_eq!(firsts(&disk).unwrap(), [0x10, 0, 0, 0, 0, 0, 0, 0]);
    // A file that is to become longer.
    let mut file = bytes.clone();
    header(&mut file, 48, &LOG_ID);
    let longer = Entry {
        last: end + MIB as u64,
        ..one(data(METADATA + 65536 * 2))
    };
    longer.put(&mut file);
    let disk = self::disk(&file);
    assert!(open(&disk, true).is_err());
    assert!(mend(&*disk).unwrap().is_some());
    assert_eq!(firsts(&disk).unwrap()[0], 0x10);
    // Entries everywhere, each as long as the log, with every number; and all fields at random.
    let mut file = bytes.clone();
    header(&mut file, 48, &LOG_ID);
    for sector in 0..256 {
        let mut entry = Entry::new(sector, 1 + sector as u64 % 3, len, vec![]).bytes();
        put(&mut entry, 8, &(MIB as u32).to_le_bytes());
        put(&mut entry, 24, &[sector as u8; 4]);
        put(&mut file, LOG + sector * 4096, &entry);
    }
    assert_eq!(firsts(&self::disk(&file)).unwrap()[0], 0x10);
    let sound = Entry::new(0, 1, len, vec![Change::Data(TABLE as u64, moved(&bytes))]).bytes();
    for at in (8..96).step_by(2) {
        for value in [1, 0xff] {
            let mut file = bytes[..LOG + 8192].to_vec();
            header(&mut file, 48, &LOG_ID);
            let mut entry = sound.clone();
            entry[at] = value;
            testkit::vhdx::seal(&mut entry);
            put(&mut file, LOG, &entry);
            file.extend(&bytes[LOG + 8192..]);
            let _ = Layout::read(&*self::disk(&file));
        }
    }
}

#[test]
fn images_grow() {
    for (fixed, block, size, to) in [
        (false, 1, 3 * MIB as u64 + 512, 9 * MIB as u64),
        (true, 2, 3 * MIB as u64 + 512, 9 * MIB as u64),
        // The table moves.
        (false, 1, 2 << 20, 200 << 30),
    ] {
        let disk = SimDisk::new(SimOptions::default());
        let options = CreateOptions {
            size,
            fixed,
            block_bytes: Some(block * MIB as u64),
            ..CreateOptions::default()
        };
        create(&*disk, &options).unwrap();
        let mut driver = open(&disk, false).unwrap();
        driver.write(size - 700, &[7; 700]).unwrap();
        driver.close().unwrap();
        // What is behind the end is nobody's.
        let at = disk.len().unwrap() - 512;
        if size % MIB as u64 != 0 {
            disk.write_at(at, &[0xdb; 512]).unwrap();
        }
        let ask = |size| {
            let options = ResizeOptions {
                size,
                shrink: true,
                preallocation: Preallocation::Off,
            };
            resize(&[member(&disk, false).unwrap()], Format::Vhdx, &options)
        };
        let before = Layout::read(&*disk).unwrap();
        assert_eq!(ask(to).unwrap(), size);
        let after = Layout::read(&*disk).unwrap();
        assert_ne!(
            after.headers.current.data_write,
            before.headers.current.data_write
        );
        assert_eq!(after.regions.bat != before.regions.bat, to > 9 << 30);
        assert_eq!(checked(&disk, Repair::No).unwrap().corruptions, 0);
        for wrong in [to + 1, to - 512, (64 << 40) + 512] {
            assert!(ask(wrong).is_err(), "{wrong}");
        }
        let mut driver = open(&disk, false).unwrap();
        assert_eq!(driver.size(), to);
        let mut read = vec![1; 2 << 20];
        driver.read(size - 700, &mut read).unwrap();
        assert!(
            read.iter()
                .enumerate()
                .all(|(at, b)| *b == if at < 700 { 7 } else { 0 })
        );
        driver.write(to - 512, &[8; 512]).unwrap();
        driver.close().unwrap();
        assert_eq!(checked(&disk, Repair::No).unwrap().findings, []);
        let blocks = Layout::read(&*disk).unwrap().metadata.blocks();
        let there = checked(&disk, Repair::No).unwrap().allocated_clusters;
        assert_eq!(there == blocks, fixed);
    }
}

/// As a killed process leaves it: what was flushed is in the log or in its place.
#[test]
fn a_killed_writer_leaves_what_it_flushed() {
    let disk = disk(&forged().bytes());
    let mut driver = open(&disk, false).unwrap();
    driver.write(0, &[1]).unwrap();
    for block in [1u64, 2, 3] {
        driver.write(block << 20, &[9; 512]).unwrap();
        driver.flush().unwrap();
    }
    drop(driver);
    let left = self::disk(&disk.bytes());
    assert_eq!(firsts(&left).unwrap(), [1, 9, 9, 9, 0, 0x15, 0, 0]);
    mend(&*left).unwrap().unwrap();
    assert_eq!(firsts(&left).unwrap(), [1, 9, 9, 9, 0, 0x15, 0, 0]);
    assert_eq!(checked(&left, Repair::No).unwrap().findings, []);
}
