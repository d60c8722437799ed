//! VDI images, driven by the blocking driver and by QEMU in turns: both must read what a model says.

use crate::peer;

use image::Format;
use image::vdi::{CreateOptions, ImageType, Layout, create};
use io::{File, OpenOptions};
use peer::{Turns, qemu_img};
use std::fs;

const DISK: &str = "disk.vdi";

#[test]
fn images_are_changed_in_turns_with_qemu() {
    for (seed, (image_type, size, by_qemu)) in [
        (ImageType::Dynamic, (5 << 20) + 512 * 3, true),
        (ImageType::Dynamic, 4 << 20, false),
        (ImageType::Static, (2 << 20) + 512, false),
    ]
    .into_iter()
    .enumerate()
    {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        if by_qemu {
            let size = size.to_string();
            qemu_img(dir, &["create", "-q", "-f", "vdi", DISK, &size]);
        } else {
            let file = File::create_new(&dir.join(DISK), &OpenOptions::default()).unwrap();
            let options = CreateOptions {
                size,
                image_type,
                ..CreateOptions::default()
            };
            create(&*file, &options).unwrap();
        }
        let turns = Turns {
            dir,
            image: DISK,
            format: Format::Vdi,
            size,
            unit: 1 << 20,
            seed: seed as u64 + 50,
        };
        turns.take();
        qemu_img(dir, &["check", "-q", "-f", "vdi", DISK]);
    }
}

/// New images are QEMU's, byte for byte, but for the UUIDs and where the blocks begin.
#[test]
fn new_images_are_those_of_qemu() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    for (number, (size, image_type)) in [
        (10 << 20, ImageType::Dynamic),
        ((10 << 20) + 1, ImageType::Dynamic),
        (3 << 20, ImageType::Static),
        (0, ImageType::Dynamic),
        (200 << 30, ImageType::Dynamic),
    ]
    .into_iter()
    .enumerate()
    {
        let (ours, theirs) = (format!("{number}.ours"), format!("{number}.theirs"));
        let file = File::create_new(&dir.join(&ours), &OpenOptions::default()).unwrap();
        let options = CreateOptions {
            size,
            image_type,
            ..CreateOptions::default()
        };
        create(&*file, &options).unwrap();
        let words = match image_type {
            ImageType::Static => "static=on",
            ImageType::Dynamic => "static=off",
        };
        let size = size.to_string();
        let args = ["create", "-q", "-f", "vdi", "-o", words, &theirs, &size];
        qemu_img(dir, &args);
        let layout = Layout::read(&*file).unwrap();
        let read = |name: &str| {
            let mut bytes = fs::read(dir.join(name)).unwrap();
            bytes[0x158..0x15c].fill(0);
            bytes[0x188..0x1a8].fill(0);
            bytes.truncate(512 + layout.header.map_bytes() as usize);
            bytes
        };
        assert!(read(&ours) == read(&theirs), "{words} {size}");
    }
}
