//! VHD images, driven by the blocking driver and by QEMU in turns: both must read what a model says.

use crate::peer;

use block::ErrorKind;
use image::Format;
use image::vhd::{CreateOptions, DiskType, create, size_of_new};
use io::{File, OpenOptions};
use peer::{Turns, qemu_img};
use std::fs;
use std::os::unix::fs::FileExt;

const DISK: &str = "disk.vhd";

/// One image, changed by us and by QEMU in turns.
fn in_turns(options: &CreateOptions, by_qemu: bool, seed: u64) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    if by_qemu {
        let mut words = format!("subformat={}", options.disk_type);
        if options.force_size {
            words += ",force_size=on";
        }
        let size = options.size.to_string();
        qemu_img(
            dir,
            &["create", "-q", "-f", "vpc", "-o", &words, DISK, &size],
        );
    } else {
        let file = File::create_new(&dir.join(DISK), &OpenOptions::default()).unwrap();
        create(&*file, options).unwrap();
    }
    let turns = Turns {
        dir,
        image: DISK,
        format: Format::Vhd,
        size: options.disk_bytes().unwrap(),
        unit: u64::from(options.block_bytes),
        seed,
    };
    turns.take();
    let footer = fs::read(dir.join(DISK)).unwrap();
    assert!(footer[footer.len() - 512..].starts_with(b"conectix"));
}

#[test]
fn dynamic_images_are_changed_in_turns_with_qemu() {
    for (seed, (block_bytes, size, by_qemu)) in [
        (2 << 20, 5 << 20, true),
        (128 << 10, 1 << 20, false),
        (4096, 300 << 10, false),
    ]
    .into_iter()
    .enumerate()
    {
        let options = CreateOptions {
            size,
            block_bytes,
            force_size: seed % 2 == 1,
            ..CreateOptions::default()
        };
        in_turns(&options, by_qemu, seed as u64);
    }
}

#[test]
fn fixed_images_are_changed_in_turns_with_qemu() {
    for by_qemu in [true, false] {
        let options = CreateOptions {
            size: 1 << 20,
            disk_type: DiskType::Fixed,
            block_bytes: 65536,
            ..CreateOptions::default()
        };
        in_turns(&options, by_qemu, 40);
    }
}

/// New images are QEMU's, byte for byte, but for the time and the unique id with the checksum over them.
#[test]
fn new_images_are_those_of_qemu() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    for (number, (size, disk_type, force_size)) in [
        (10 << 20, DiskType::Dynamic, false),
        ((10 << 20) + 1, DiskType::Dynamic, true),
        (300 << 20, DiskType::Fixed, false),
        (1 << 20, DiskType::Fixed, true),
        (0, DiskType::Dynamic, false),
        (130 << 30, DiskType::Dynamic, false),
        (2040 << 30, DiskType::Dynamic, false),
        (127 << 30, DiskType::Dynamic, false),
        (508 << 20, DiskType::Dynamic, false),
    ]
    .into_iter()
    .enumerate()
    {
        let (ours, theirs) = (format!("{number}.vhd"), format!("{number}.vpc"));
        let file = File::create_new(&dir.join(&ours), &OpenOptions::default()).unwrap();
        let options = CreateOptions {
            size,
            disk_type,
            force_size,
            ..CreateOptions::default()
        };
        create(&*file, &options).unwrap();
        let words = format!(
            "subformat={disk_type},force_size={}",
            if force_size { "on" } else { "off" }
        );
        let size = size.to_string();
        qemu_img(
            dir,
            &["create", "-q", "-f", "vpc", "-o", &words, &theirs, &size],
        );
        let (len, their_len) = (
            file.len().unwrap(),
            fs::metadata(dir.join(&theirs)).unwrap().len(),
        );
        assert_eq!(len, their_len, "{words} {size}");
        let parts = match disk_type {
            DiskType::Fixed => vec![(len - 512, 512)],
            _ => vec![(0, len)],
        };
        for (at, len) in parts {
            let read = |name: &str| {
                let mut bytes = vec![0; len as usize];
                let file = fs::File::open(dir.join(name)).unwrap();
                file.read_exact_at(&mut bytes, at).unwrap();
                for footer in [0, len as usize - 512] {
                    // Time stamp, checksum, unique id.
                    for range in [24..28, 64..84] {
                        bytes[footer..][range].fill(0);
                    }
                }
                bytes
            };
            assert!(read(&ours) == read(&theirs), "{words} {size}");
        }
    }
}

#[test]
fn more_than_2040_gib_are_refused_with_the_reason() {
    let error = size_of_new((2040 << 30) + 1, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(
        error.to_string().contains("the most is 2040 GiB"),
        "{error}"
    );
}
