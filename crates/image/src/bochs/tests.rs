//! Beside the installed QEMU, and what is damaged.

use super::Bochs;
use crate::Image;
use crate::qcow2::testing::{Driver, MemFile, Rng, by_qemu};
use block::ErrorKind;
use testkit::bochs::image;

/// A disk with sectors and extents of zeros.
fn disk(extent: usize, sectors: usize) -> Vec<u8> {
    let mut rng = Rng(7);
    let mut disk = vec![0; sectors * 512];
    for (nth, sector) in disk.chunks_mut(512).enumerate() {
        let absent = nth * 512 / extent % 3 == 1 || rng.below(4) == 0;
        if !absent {
            sector.fill(rng.below(255) as u8 + 1);
        }
    }
    disk
}

#[test]
fn images_read_as_by_qemu() {
    for (version_1, extent, sectors) in [
        (false, 4096, 700),
        (true, 4096, 11),
        (false, 512, 130),
        (true, 65536, 900),
        (false, 8 << 20, 3000),
    ] {
        let disk = disk(extent, sectors);
        let bytes = image(version_1, extent, &disk);
        let file = MemFile::of(bytes.clone());
        let mut driver = Driver::of(file.clone(), Bochs::open(&file).unwrap());
        assert_eq!(driver.image.size(), disk.len() as u64);
        assert!(
            driver.read(0, disk.len() as u64).unwrap() == disk,
            "{extent}"
        );
        for (at, len) in [(512, 1), (1000, 3000), (disk.len() - 700, 700)] {
            let read = driver.read(at as u64, len as u64).unwrap();
            assert!(read == disk[at..at + len], "{extent} {at}");
        }
        assert!(by_qemu("bochs", &bytes) == disk, "{extent}");
        assert!(driver.write(0, &[1; 512]).is_err());
    }
}

#[test]
fn wrong_headers_are_refused_by_field() {
    let sound = image(false, 4096, &disk(4096, 100));
    for (at, bytes, what) in [
        (0, &b"bochs"[..], "not that of"),
        (48, b"Undoable", "not that of"),
        (64, &0x30000u32.to_le_bytes(), "not that of"),
        (68, &511u32.to_le_bytes(), "bytes of the header"),
        (68, &[0xff; 4], "cut off"),
        (72, &((1u32 << 20) + 1).to_le_bytes(), "the most is 1048576"),
        (72, &(1u32 << 20).to_le_bytes(), "cut off"),
        (72, &12u32.to_le_bytes(), "too few"),
        (76, &[0; 4], "bytes of a bitmap"),
        (80, &[0; 4], "power of two"),
        (80, &256u32.to_le_bytes(), "power of two"),
        (80, &4095u32.to_le_bytes(), "power of two"),
        (80, &(16u32 << 20).to_le_bytes(), "power of two"),
        (88, &[0xff; 8], "bytes of the disk"),
        (88, &(1u64 << 40).to_le_bytes(), "too few"),
    ] {
        let file = MemFile::of(sound.clone());
        file.patch(at, bytes);
        let error = Bochs::open(&file).unwrap_err().to_string();
        assert!(error.contains(what), "{at} {bytes:x?}: {error}");
    }
    for len in [0, 72, 511, 512, 600] {
        let file = MemFile::of(sound[..len].to_vec());
        assert!(Bochs::open(&file).is_err(), "{len}");
    }
}

#[test]
fn extents_that_the_file_does_not_have_are_errors() {
    let disk = disk(4096, 100);
    let sound = image(false, 4096, &disk);
    for entry in [1000, u32::MAX - 1] {
        let file = MemFile::of(sound.clone());
        file.patch(512, &u32::to_le_bytes(entry));
        let mut driver = Driver::of(file.clone(), Bochs::open(&file).unwrap());
        let error = driver.read(0, 512).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(
            error.to_string().contains("entry at byte 0x200 is"),
            "{error}"
        );
        assert!(driver.read(8192, 512).unwrap() == disk[8192..8704]);
    }
    // The first extent is the last one of the file.
    let file = MemFile::of(sound[..sound.len() - 4096].to_vec());
    let mut driver = Driver::of(file.clone(), Bochs::open(&file).unwrap());
    assert!(driver.read(0, 4096).is_err());
    assert!(driver.read(8192, 4096).unwrap() == disk[8192..12288]);
}

/// Bitmaps that begin between sectors, and those that are a power of two of these, are loaded as `Load` says.
#[test]
fn loads_are_aligned_wherever_bitmaps_are() {
    for (extent, more) in [(4096, 0), (4096, 3), (8 << 20, 0), (8 << 20, 100)] {
        let disk = disk(extent, 40_000);
        let mut bytes = image(false, extent, &disk);
        bytes.splice(512..512, vec![0; more]);
        bytes[68..72].copy_from_slice(&(512 + more as u32).to_le_bytes());
        let file = MemFile::of(bytes.clone());
        let bochs = Bochs::open(&file).unwrap();
        let mut loads = 0;
        for at in (0..disk.len() as u64).step_by(extent) {
            if let Ok(crate::Step::Need(crate::Need::Load(load))) =
                bochs.map(block::GuestOffset(at), 512)
            {
                loads += 1;
                let align = (1u64 << load.len.trailing_zeros()).min(4096);
                assert_eq!(load.offset.0 % align, 0, "{extent} {more}: {load:?}");
                bochs.load_failed(&load);
            }
        }
        assert!(loads > 1, "{extent} {more}");
        let mut driver = Driver::of(file, Bochs::open(&MemFile::of(bytes.clone())).unwrap());
        assert!(driver.read(0, disk.len() as u64).unwrap() == disk);
        assert!(by_qemu("bochs", &bytes) == disk, "{extent} {more}");
    }
}
