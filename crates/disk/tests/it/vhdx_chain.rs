//! Differencing VHDX images: chains made from the specification, and those that we make.

use crate::peer;

use block::{ErrorKind, Storage};
use disk::{Chain, ChainOptions, blocking::Driver};
use image::vhdx::{CreateOptions, Guid, Layout, Locator, create, mend};
use io::{File, OpenOptions};
use peer::{Model, Op, Random, random_op};
use std::fs;
use std::path::Path;
use testkit::vhdx::{Forge, MIB, sectors};

fn options(read_only: bool) -> ChainOptions {
    ChainOptions {
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

/// A disk of four blocks and a bit.
const SIZE: usize = 4 * MIB + 72 * 512;

fn base(sector: u32) -> Forge {
    let mut forge = Forge::new(SIZE as u64);
    forge.sector = sector;
    forge.blocks = vec![(0, 6, 0x20), (1, 6, 0x21), (2, 6, 0x22), (4, 6, 0x24)];
    forge
}

fn leaf(sector: u32) -> Forge {
    let mut forge = base(sector);
    let id = Guid([0x11; 16]);
    forge.data_id = [0x12; 16];
    forge.parent = vec![
        ("parent_linkage".into(), format!("{{{}}}", Guid([9; 16]))),
        ("parent_linkage2".into(), format!("{{{id}}}").to_uppercase()),
        (
            "absolute_win32_path".into(),
            r"\\?\c:\nowhere\base.vhdx".into(),
        ),
        ("relative_path".into(), r".\base.vhdx".into()),
    ];
    forge.blocks = vec![(0, 7, 0x30), (1, 2, 0), (3, 7, 0x33), (4, 0, 0)];
    let all = MIB / sector as usize;
    // Bits of a block that is not there in part do not count.
    forge.bits = vec![
        (0, vec![0, 1, 7, 8, 130, all - 1]),
        (3, (5..all).collect()),
        (2, vec![3, 4]),
    ];
    forge
}

/// What the disk of `images`, the top one first, reads as.
fn seen(images: &[Vec<Option<Vec<u8>>>], sector: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for index in 0..images[0].len() {
        let found = images.iter().find_map(|image| image[index].clone());
        all.extend(found.unwrap_or_else(|| vec![0; sector]));
    }
    all
}

#[test]
fn a_chain_of_the_specification_is_read_and_written() {
    for sector in [512, 4096] {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        fs::write(dir.join("base.vhdx"), base(sector).bytes()).unwrap();
        fs::write(dir.join("leaf.vhdx"), leaf(sector).bytes()).unwrap();
        let bytes = |name: &str| fs::read(dir.join(name)).unwrap();
        let below = bytes("base.vhdx");
        let path = dir.join("leaf.vhdx");
        let both = || {
            seen(
                &[sectors(&bytes("leaf.vhdx")), sectors(&below)],
                sector as usize,
            )
        };
        let mut model = Model::of(both());
        let mut random = Random::new(7);
        for round in 0..2 {
            let mut driver = open(&path, false);
            let mut all = vec![0; SIZE];
            driver.read(0, &mut all).unwrap();
            model.check(0, &all).unwrap();
            for _ in 0..40 {
                let op = random_op(&mut random, SIZE as u64, 64 << 10, 512);
                match op {
                    Op::Write { at, len, pattern } => {
                        driver.write(at, &vec![pattern; len as usize])
                    }
                    Op::Zero { at, len, unmap } => driver.write_zeroes(at, len, unmap),
                    Op::Discard { at, len } => driver.discard(at, len),
                    Op::Read { .. } | Op::Flush => driver.flush(),
                }
                .unwrap();
                model.apply(op);
            }
            // Less than a sector, of which the parent has the rest; and all of a block, bit by bit.
            let at = 2 * MIB as u64 + 5000;
            let mut write = |at, len: u64| {
                driver.write(at, &vec![9; len as usize]).unwrap();
                model.apply(Op::Write {
                    at,
                    len,
                    pattern: 9,
                });
            };
            write(at, 300);
            if round == 1 {
                for part in 0..8 {
                    write(part * MIB as u64 / 8, MIB as u64 / 8);
                }
            }
            driver.close().unwrap();
            model.check(0, &both()).unwrap();
        }
        assert!(bytes("base.vhdx") == below);
        // The first block has become whole.
        let file = bytes("leaf.vhdx");
        assert_eq!(file[testkit::vhdx::TABLE] & 7, 6);
        let mut all = vec![0; SIZE];
        open(&path, true).read(0, &mut all).unwrap();
        model.check(0, &all).unwrap();
    }
}

fn make(dir: &Path, name: &str, below: Option<&str>) {
    let file = File::create_new(&dir.join(name), &OpenOptions::default()).unwrap();
    let parent = below.map(|below| {
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let parent = Layout::read(&*File::open(&dir.join(below), &read_only).unwrap()).unwrap();
        let absolute = dir.join(below);
        Locator::new(
            parent.headers.current.data_write,
            below,
            absolute.to_str().unwrap(),
        )
        .unwrap()
    });
    let options = CreateOptions {
        size: SIZE as u64,
        parent,
        ..CreateOptions::default()
    };
    create(&*file, &options).unwrap();
}

#[test]
fn chains_that_we_make_are_found_and_verified() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    make(dir, "base.vhdx", None);
    let mut driver = open(&dir.join("base.vhdx"), false);
    driver.write(1000, &[1; 5000]).unwrap();
    driver.close().unwrap();
    make(dir, "mid.vhdx", Some("base.vhdx"));
    let mut driver = open(&dir.join("mid.vhdx"), false);
    driver.write(3000, &[2; 1000]).unwrap();
    // What zeros hide stays hidden.
    driver.write(MIB as u64 * 2, &[3; 512]).unwrap();
    driver.close().unwrap();
    make(dir, "top.vhdx", Some("mid.vhdx"));
    let top = dir.join("top.vhdx");
    let mut driver = open(&top, false);
    driver
        .write_zeroes(MIB as u64 * 2, 2 * MIB as u64, true)
        .unwrap();
    driver.discard(0, 8192).unwrap();
    let mut read = vec![0; 8192];
    driver.read(0, &mut read).unwrap();
    let want: Vec<u8> = (0..8192)
        .map(|at| match at {
            3000..4000 => 2,
            1000..6000 => 1,
            _ => 0,
        })
        .collect();
    assert!(read == want);
    driver.read(MIB as u64 * 2, &mut read).unwrap();
    assert!(read == vec![0; 8192]);
    driver.close().unwrap();
    let layout = |name: &str| {
        let chain = Chain::open(dir.join(name).to_str().unwrap(), &options(true)).unwrap();
        let file: &dyn Storage = &*chain.layers[0].files[0];
        Layout::read(file).unwrap()
    };
    // A block of zeros takes no space.
    assert_eq!(layout("top.vhdx").file_bytes, 4 * MIB as u64);
    // Elsewhere the relative name leads to the moved parent.
    let moved = dir.join("moved");
    fs::create_dir(&moved).unwrap();
    for name in ["base.vhdx", "mid.vhdx", "top.vhdx"] {
        fs::rename(dir.join(name), moved.join(name)).unwrap();
    }
    assert_eq!(
        peer::open_chain(&moved.join("top.vhdx"), &options(true))
            .unwrap()
            .layers
            .len(),
        3
    );
    // A parent that changed is another file; one of another directory is not opened.
    let mut driver = open(&moved.join("base.vhdx"), false);
    driver.write(0, &[1]).unwrap();
    driver.close().unwrap();
    let error = refusal(&moved.join("mid.vhdx"), &options(true));
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("was changed since"), "{error}");
    fs::rename(moved.join("base.vhdx"), dir.join("base.vhdx")).unwrap();
    let error = refusal(&moved.join("mid.vhdx"), &options(true));
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
}

/// A process that is killed leaves bits in the log, which who only reads sees too.
#[test]
fn a_killed_writer_leaves_bits_in_the_log() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    fs::write(dir.join("base.vhdx"), base(512).bytes()).unwrap();
    make(dir, "leaf.vhdx", Some("base.vhdx"));
    let path = dir.join("leaf.vhdx");
    let mut driver = open(&path, false);
    let mut all = vec![0; SIZE];
    driver.read(0, &mut all).unwrap();
    let mut model = Model::of(all.clone());
    for (round, at) in [5u64, 700, 2100, 2101, 4097].into_iter().enumerate() {
        let (at, pattern) = (at * 512, 0x40 + round as u8);
        driver.write(at, &[pattern; 512]).unwrap();
        driver.flush().unwrap();
        model.apply(Op::Write {
            at,
            len: 512,
            pattern,
        });
    }
    drop(driver);
    open(&path, true).read(0, &mut all).unwrap();
    model.check(0, &all).unwrap();
    let file = peer::patiently(
        |e: &block::Error| e.kind() == ErrorKind::Locked,
        || File::open(&path, &OpenOptions::default()),
    )
    .unwrap();
    mend(&*file).unwrap().unwrap();
    drop(file);
    open(&path, true).read(0, &mut all).unwrap();
    model.check(0, &all).unwrap();
}
