//! VHDX images, driven by the blocking driver and by QEMU in turns: both must read what a model says.

use crate::peer;

use disk::{ChainOptions, blocking::Driver};
use image::Format;
use image::vhdx::{CreateOptions, Headers, Layout, create};
use io::{File, OpenOptions};
use peer::{Model, Random, our_turn, qemu_img, qemu_reads, their_turn};
use std::path::Path;

const DISK: &str = "disk.vhdx";
const MIB: u64 = 1 << 20;

fn open(dir: &Path, read_only: bool) -> Driver {
    let options = ChainOptions {
        read_only,
        // Nothing crashes here: syncs only cost time.
        cache: io::Cache::Unsafe,
        ..ChainOptions::default()
    };
    let chain = peer::open_chain(&dir.join(DISK), &options).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(chain.layers[0].format, Format::Vhdx);
    chain.driver().unwrap()
}

fn layout(dir: &Path) -> Layout {
    let options = OpenOptions {
        read_only: true,
        lock: io::Lock::None,
        ..OpenOptions::default()
    };
    Layout::read(&*File::open(&dir.join(DISK), &options).unwrap()).unwrap()
}

/// One image, changed by us and by QEMU in turns.
fn in_turns(options: &CreateOptions, by_qemu: Option<&str>, rounds: u64) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let size = options.size.to_string();
    match by_qemu {
        Some(words) => {
            qemu_img(
                dir,
                &["create", "-q", "-f", "vhdx", "-o", words, DISK, &size],
            );
        }
        None => {
            let file = File::create_new(&dir.join(DISK), &OpenOptions::default()).unwrap();
            create(&*file, options).unwrap();
        }
    }
    let size = options.disk_bytes();
    let mut model = Model::new(size);
    let mut random = Random::new(rounds);
    for _ in 0..rounds {
        let before = layout(dir);
        let mut driver = open(dir, false);
        assert_eq!(driver.size(), size);
        our_turn(&mut driver, &mut model, &mut random, 20, MIB);
        driver.close().unwrap();
        let after = layout(dir);
        let (old, new) = (&before.headers.current, &after.headers.current);
        assert!(new.file_write != old.file_write && new.data_write != old.data_write);
        assert_eq!((new.log, after.log_entries), Default::default());
        qemu_img(dir, &["check", "-f", "vhdx", DISK]);
        qemu_reads(dir, "vhdx", DISK, &mut model);
        their_turn((dir, "vhdx", DISK), &mut model, &mut random, 10, MIB);
    }
    let mut all = vec![0; size as usize];
    open(dir, true).read(0, &mut all).unwrap();
    model.check(0, &all).unwrap();
}

#[test]
fn dynamic_images_are_changed_in_turns_with_qemu() {
    let options = CreateOptions {
        size: 3 * MIB + 1536,
        block_bytes: Some(MIB),
        ..CreateOptions::default()
    };
    in_turns(&options, None, 2);
    // A block that the disk does not fill.
    in_turns(&options, Some("block_state_zero=off"), 1);
}

#[test]
fn fixed_images_are_changed_in_turns_with_qemu() {
    let options = CreateOptions {
        size: 3 * MIB + 512,
        block_bytes: Some(2 * MIB),
        fixed: true,
        ..CreateOptions::default()
    };
    in_turns(&options, None, 1);
    // Whose last block ends behind the file; and whose blocks are zeros.
    in_turns(
        &options,
        Some("subformat=fixed,block_size=2M,block_state_zero=off"),
        1,
    );
    in_turns(&options, Some("subformat=fixed,block_size=2M"), 1);
}

/// What nobody writes to is not changed; and the data's GUID changes with the data, not with an open.
#[test]
fn guids_change_with_what_they_stand_for() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let file = File::create_new(&dir.join(DISK), &OpenOptions::default()).unwrap();
    let options = CreateOptions {
        size: MIB,
        ..CreateOptions::default()
    };
    create(&*file, &options).unwrap();
    drop(file);
    let bytes = || std::fs::read(dir.join(DISK)).unwrap();
    let new = bytes();
    let mut driver = open(dir, false);
    driver.read(0, &mut [0; 512]).unwrap();
    driver.discard(0, MIB).unwrap();
    driver.flush().unwrap();
    driver.close().unwrap();
    assert!(bytes() == new);
    let headers = |dir: &Path| -> Headers { layout(dir).headers };
    let first = headers(dir);
    let mut driver = open(dir, false);
    driver.write(0, &[1; 512]).unwrap();
    // Before the write, and once.
    let second = headers(dir);
    assert_eq!(second.index, first.index ^ 1);
    assert_eq!(second.current.sequence, first.current.sequence + 1);
    assert_ne!(second.current.data_write, first.current.data_write);
    assert_ne!(second.current.log, first.current.log);
    driver.flush().unwrap();
    driver.write(512, &[1; 512]).unwrap();
    driver.flush().unwrap();
    let third = headers(dir);
    assert_eq!(third.current.data_write, second.current.data_write);
    assert_eq!(third.current.log, second.current.log);
    assert_eq!(layout(dir).log_entries, 1);
}
