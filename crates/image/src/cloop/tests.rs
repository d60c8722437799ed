//! Beside the installed QEMU, and what is damaged.

use super::Cloop;
use crate::Image;
use crate::qcow2::testing::{Driver, MemFile, Rng, by_qemu};
use block::ErrorKind;
use flate2::{Compress, Compression, FlushCompress};
use testkit::cloop::{image, stored};

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 1024);
    let mut stream = Compress::new(Compression::new(9), true);
    stream
        .compress_vec(bytes, &mut out, FlushCompress::Finish)
        .unwrap();
    out
}

fn disk(len: usize) -> Vec<u8> {
    let mut rng = Rng(3);
    (0..len)
        .map(|at| {
            if at / 5000 % 2 == 0 {
                rng.next() as u8
            } else {
                (at >> 9) as u8
            }
        })
        .collect()
}

fn open(bytes: &[u8]) -> Driver<Cloop> {
    let file = MemFile::of(bytes.to_vec());
    Driver::of(file.clone(), Cloop::open(&file).unwrap())
}

#[test]
fn images_read_as_by_qemu() {
    // More blocks than a page of offsets has; and a large one.
    for (block, len) in [(512, 600 * 512), (65536, 300_000), (3 << 20, 4 << 20)] {
        for pack in [deflated, stored] {
            let mut disk = disk(len);
            let bytes = image(block, &disk, pack);
            disk.resize(len.next_multiple_of(block), 0);
            let mut driver = open(&bytes);
            assert!(
                driver.read(0, disk.len() as u64).unwrap() == disk,
                "{block}"
            );
            let at = block - 100;
            assert!(driver.read(at as u64, 200).unwrap() == disk[at..at + 200]);
            assert!(by_qemu("cloop", &bytes) == disk, "{block}");
            assert!(driver.write(0, &[1; 512]).is_err());
        }
    }
}

#[test]
fn an_empty_image_opens() {
    let driver = open(&image(512, &[], stored));
    assert_eq!(driver.image.size(), 0);
}

#[test]
fn wrong_headers_and_offsets_are_refused() {
    let sound = image(512, &disk(2048), stored);
    for (at, bytes, what) in [
        (128, &[0; 4][..], "block size at byte 128 is 0"),
        (128, &513u32.to_be_bytes(), "multiple of 512"),
        (128, &(128u32 << 20).to_be_bytes(), "the most is 67108864"),
        (132, &[0xff; 4], "blocks at byte 132"),
        (132, &(1u32 << 25).to_be_bytes(), "cut off"),
        (144, &[0; 8], "offset at byte 0x90 is 0x0"),
        (144, &(1u64 << 40).to_be_bytes(), "the most is 134217728"),
        (168, &[0xff; 8], "the most is 134217728"),
    ] {
        let file = MemFile::of(sound.clone());
        file.patch(at, bytes);
        let error = Cloop::open(&file).unwrap_err().to_string();
        assert!(error.contains(what), "{at} {bytes:x?}: {error}");
    }
    for len in [0, 128, 135, 136, 175] {
        let file = MemFile::of(sound[..len].to_vec());
        assert!(Cloop::open(&file).is_err(), "{len}");
    }
}

#[test]
fn damaged_blocks_are_errors_and_others_are_read() {
    let disk = disk(2048);
    let sound = image(512, &disk, deflated);
    let offset = |nth: usize| crate::words::read_u64(&sound, 136 + nth * 8).unwrap() as usize;
    let broken = |change: &dyn Fn(&mut Vec<u8>), what: &str| {
        let mut bytes = sound.clone();
        change(&mut bytes);
        let mut driver = open(&bytes);
        let error = driver.read(1024, 512).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(what), "{error}");
        assert!(driver.read(0, 512).unwrap() == disk[..512]);
    };
    broken(&|bytes| bytes[offset(2)] ^= 0xff, "zlib stream");
    // Its checksum.
    broken(&|bytes| bytes[offset(3) - 1] ^= 1, "zlib stream");
    broken(&|bytes| bytes.truncate(offset(3) - 2), "of a file of");
    let empty = (offset(2) as u64).to_be_bytes();
    broken(
        &|bytes| bytes[160..168].copy_from_slice(&empty),
        "block 2 is from",
    );
    let short = deflated(&[1; 100]);
    broken(
        &|bytes| bytes[offset(2)..offset(2) + short.len()].copy_from_slice(&short),
        "unpacks to 100 bytes",
    );
    let long = deflated(&[1; 600]);
    broken(
        &|bytes| bytes[offset(2)..offset(2) + long.len()].copy_from_slice(&long),
        "more than 512",
    );
}
