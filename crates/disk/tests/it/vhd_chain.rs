//! Differencing VHD images: chains as XenServer's tools lay them out, and those that we make.

use crate::peer;

use block::ErrorKind;
use disk::{Chain, ChainOptions, blocking::Driver};
use image::Format;
use image::vhd::{CreateOptions, DiskType, NewParent, UniqueId, create};
use io::{File, OpenOptions};
use peer::{Model, Op, Random, random_op};
use std::fs;
use std::path::Path;
use testkit::vhd::{BLOCK, Forge, ForgedParent, sectors};

const SECTOR: usize = 512;

fn options(read_only: bool) -> ChainOptions {
    ChainOptions {
        format: Some(Format::Vhd),
        read_only,
        cache: io::Cache::Unsafe,
        cache_bytes: Some(0),
        ..ChainOptions::default()
    }
}

fn open(path: &Path, read_only: bool) -> Driver {
    let chain = peer::open_chain(path, &options(read_only)).unwrap_or_else(|e| panic!("{e}"));
    chain.driver().unwrap()
}

fn refusal(path: &Path, options: &ChainOptions) -> block::Error {
    peer::open_chain(path, options).map(drop).unwrap_err()
}

/// A disk of five blocks and a bit.
const SIZE: usize = 5 * BLOCK + 70 * SECTOR;

fn base() -> Forge {
    Forge {
        size: SIZE as u64,
        id: [1; 16],
        parent: None,
        blocks: vec![
            (2, (0..BLOCK / SECTOR).collect(), 0x22),
            (0, (10..300).collect(), 0x20),
            (5, (0..70).step_by(2).collect(), 0x25),
        ],
    }
}

fn leaf() -> Forge {
    Forge {
        size: SIZE as u64,
        id: [2; 16],
        parent: Some(ForgedParent {
            id: [1; 16],
            name: "./base.vhd".into(),
        }),
        blocks: vec![
            (0, (0..64).chain(299..301).collect(), 0x30),
            (2, vec![1, 63, 64, 4095], 0x32),
            (3, vec![], 0x33),
            (4, (0..BLOCK / SECTOR).collect(), 0x34),
        ],
    }
}

/// What the disk of `images`, the top one first, reads as.
fn seen(images: &[Vec<Option<Vec<u8>>>]) -> Vec<u8> {
    let mut all = Vec::new();
    for sector in 0..images[0].len() {
        let found = images.iter().find_map(|image| image[sector].clone());
        all.extend(found.unwrap_or_else(|| vec![0; SECTOR]));
    }
    all
}

fn forge(dir: &Path, name: &str, forge: &Forge) {
    fs::write(dir.join(name), forge.bytes()).unwrap();
}

#[test]
fn a_chain_of_xenserver_is_read_and_written() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    forge(dir, "base.vhd", &base());
    forge(dir, "leaf.vhd", &leaf());
    let bytes = |name: &str| fs::read(dir.join(name)).unwrap();
    let below = bytes("base.vhd");
    let path = dir.join("leaf.vhd");
    let mut model = Model::of(seen(&[sectors(&bytes("leaf.vhd")), sectors(&below)]));
    assert_eq!(model.bytes.len(), SIZE);
    let mut random = Random::new(7);
    for _ in 0..2 {
        let mut driver = open(&path, false);
        let mut all = vec![0; SIZE];
        driver.read(0, &mut all).unwrap();
        model.check(0, &all).unwrap();
        for _ in 0..60 {
            let op = random_op(&mut random, SIZE as u64, 64 << 10, 512);
            match op {
                Op::Write { at, len, pattern } => driver.write(at, &vec![pattern; len as usize]),
                Op::Zero { at, len, unmap } => driver.write_zeroes(at, len, unmap),
                Op::Discard { at, len } => driver.discard(at, len),
                Op::Read { .. } | Op::Flush => driver.flush(),
            }
            .unwrap();
            model.apply(op);
        }
        // Less than a sector, of which the parent has the rest.
        let odd = Op::Write {
            at: 2 * BLOCK as u64 + 5000,
            len: 300,
            pattern: 9,
        };
        driver.write(2 * BLOCK as u64 + 5000, &[9; 300]).unwrap();
        model.apply(odd);
        driver.close().unwrap();
        let read = seen(&[sectors(&bytes("leaf.vhd")), sectors(&below)]);
        model
            .check(0, &read)
            .unwrap_or_else(|e| panic!("as the specification reads it: {e}"));
    }
    assert_eq!(bytes("base.vhd"), below, "the parent was changed");
}

#[test]
fn zeros_hide_the_parent() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    forge(dir, "base.vhd", &base());
    forge(
        dir,
        "leaf.vhd",
        &Forge {
            blocks: vec![],
            ..leaf()
        },
    );
    let mut driver = open(&dir.join("leaf.vhd"), false);
    driver.write_zeroes(0, 3 * BLOCK as u64, true).unwrap();
    driver.discard(5 * BLOCK as u64, 512).unwrap();
    driver.close().unwrap();
    let leaf = sectors(&fs::read(dir.join("leaf.vhd")).unwrap());
    assert!(
        leaf[2 * BLOCK / SECTOR + 5]
            .as_ref()
            .is_some_and(|s| s.iter().all(|b| *b == 0))
    );
    assert_eq!(
        leaf[5 * BLOCK / SECTOR],
        None,
        "a discard hid what the parent has"
    );
    let mut all = vec![1; 3 * BLOCK];
    open(&dir.join("leaf.vhd"), true).read(0, &mut all).unwrap();
    assert!(all.iter().all(|b| *b == 0));
}

#[test]
fn the_parent_must_be_the_one_that_is_meant() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    fs::create_dir(dir.join("sub")).unwrap();
    forge(dir, "leaf.vhd", &leaf());
    let path = dir.join("leaf.vhd");
    assert_eq!(refusal(&path, &options(true)).kind(), ErrorKind::NotFound);
    forge(
        dir,
        "base.vhd",
        &Forge {
            id: [3; 16],
            ..base()
        },
    );
    let error = refusal(&path, &options(true)).to_string();
    assert!(error.contains("it is another file"), "{error}");
    forge(dir, "base.vhd", &base());
    open(&path, true);
    // Outside the image's own directory only where it is allowed.
    let mut outside = leaf();
    outside.parent = Some(ForgedParent {
        id: [1; 16],
        name: "./../base.vhd".into(),
    });
    forge(dir, "sub/leaf.vhd", &outside);
    let path = dir.join("sub/leaf.vhd");
    assert_eq!(refusal(&path, &options(true)).kind(), ErrorKind::Denied);
    let allowed = ChainOptions {
        allow_backing: vec![dir.to_owned()],
        ..options(true)
    };
    peer::open_chain(&path, &allowed).unwrap();
    // It lies over itself.
    let mut own = leaf();
    own.parent = Some(ForgedParent {
        id: [2; 16],
        name: "./leaf.vhd".into(),
    });
    forge(dir, "sub/leaf.vhd", &own);
    let error = refusal(&path, &options(true)).to_string();
    assert!(error.contains("loop"), "{error}");
}

#[test]
fn a_raw_parent_has_no_id() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    fs::write(dir.join("base.raw"), vec![0x44; SIZE]).unwrap();
    let mut over = leaf();
    over.parent = Some(ForgedParent {
        id: [0; 16],
        name: "./base.raw".into(),
    });
    forge(dir, "leaf.vhd", &over);
    let mut read = vec![0; 1024];
    open(&dir.join("leaf.vhd"), true)
        .read(BLOCK as u64, &mut read)
        .unwrap();
    assert_eq!(read, [0x44; 1024]);
}

/// New differencing images are found right by the reader that knows only the specification, from wherever.
#[test]
fn differencing_images_are_made() {
    let temp = tempfile::tempdir().unwrap();
    let dir = fs::canonicalize(temp.path()).unwrap();
    forge(&dir, "base.vhd", &base());
    let options = CreateOptions {
        size: SIZE as u64,
        disk_type: DiskType::Differencing,
        parent: Some(NewParent {
            name: "base.vhd".into(),
            absolute: dir.join("base.vhd").to_str().unwrap().to_owned(),
            unique_id: UniqueId([1; 16]),
            timestamp: 5,
        }),
        ..CreateOptions::default()
    };
    let file = File::create_new(&dir.join("new.vhd"), &OpenOptions::default()).unwrap();
    create(&*file, &options).unwrap();
    drop(file);
    let path = dir.join("new.vhd");
    let mut driver = open(&path, false);
    assert_eq!(driver.size(), SIZE as u64);
    driver.write(10 * 512, &[8; 512]).unwrap();
    driver.close().unwrap();
    let (new, below) = (
        fs::read(&path).unwrap(),
        fs::read(dir.join("base.vhd")).unwrap(),
    );
    let read = seen(&[sectors(&new), sectors(&below)]);
    assert_eq!(read[10 * 512..11 * 512], [8; 512]);
    assert_eq!(read[11 * 512..12 * 512], [0x20; 512]);
    assert_eq!(new[3 * 512 + 512..][..19], *b"file://./base.vhd\0\0");
    // Moved without the parent, the absolute name leads there.
    fs::create_dir(dir.join("sub")).unwrap();
    fs::rename(&path, dir.join("sub/new.vhd")).unwrap();
    let allowed = ChainOptions {
        allow_backing: vec![dir.clone()],
        ..self::options(true)
    };
    let chain: Chain = peer::open_chain(&dir.join("sub/new.vhd"), &allowed).unwrap();
    assert_eq!(chain.layers[1].path, dir.join("base.vhd"));
}
