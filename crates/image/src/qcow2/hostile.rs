//! Damaged and hostile images: errors are welcome, panics and endless loops are not.

use super::testing::{Driver, MemFile, Rng};
use super::{Compression, CreateOptions, Header, OpenOptions, Qcow2};
use crate::{Image, ZeroMode};
use block::Storage;
use proptest::prelude::*;

/// An image with data, zero clusters, free space and a backing file's name, and its metadata's offsets.
fn sound(cluster_bits: u32, order: u32, extended_l2: bool) -> (Vec<u8>, Vec<u64>) {
    let size = 200 << cluster_bits;
    let options = CreateOptions {
        size,
        version: 3,
        cluster_size: 1 << cluster_bits,
        refcount_bits: 1 << order,
        lazy_refcounts: true,
        backing: (order == 4).then(|| ("base".into(), "raw".into())),
        compression: Compression::Zlib,
        extended_l2,
        ..CreateOptions::default()
    };
    let mut driver = Driver::create(&options, &OpenOptions::default());
    let mut rng = Rng(5);
    for _ in 0..20 {
        let at = rng.below(size - 4096);
        let len = 1 + rng.below(4096);
        driver.write(at, &vec![1; len as usize]).unwrap();
        let at = rng.below(size - 4096);
        let len = len.min(2 << cluster_bits);
        driver
            .zero(
                at,
                len,
                ZeroMode::Zero {
                    unmap: at.is_multiple_of(2),
                },
            )
            .unwrap();
    }
    let header = driver.image.header().clone();
    let file = driver.file.clone();
    driver.close();
    let mut places = vec![0, header.l1_table_offset, header.refcount_table_offset];
    for at in [header.l1_table_offset, header.refcount_table_offset] {
        places.push(file.word(at) & 0x00ff_ffff_ffff_fe00);
    }
    (file.bytes(), places)
}

/// Opens what may be anything, and uses it.
fn abuse(bytes: Vec<u8>, rng: &mut Rng) {
    let file = MemFile::of(bytes);
    let open = OpenOptions {
        read_only: rng.below(4) == 0,
        cache_bytes: Some(0),
        ..OpenOptions::default()
    };
    let Ok(image) = Qcow2::open(&file, &open) else {
        return;
    };
    let size = image.size();
    drop(image);
    let mut driver = Driver::open(file.clone(), &open);
    if size == 0 {
        return;
    }
    for _ in 0..40 {
        let at = rng.below(size.min(1 << 22));
        let len = (1 + rng.below(10_000)).min(size - at);
        // A hostile image may have the file grow; not without a bound.
        if file.len().unwrap() > 64 << 20 {
            break;
        }
        let _ = match rng.below(5) {
            0 => driver.read(at, len).map(drop),
            1 => driver.write(at, &vec![7; len as usize]),
            2 => driver.zero(at, len, ZeroMode::Discard),
            3 => driver.zero(
                at,
                len,
                ZeroMode::Zero {
                    unmap: at.is_multiple_of(2),
                },
            ),
            _ => driver.flush(),
        };
    }
    let _ = driver.flush();
    let _ = driver.image.close(&[&file]);
}

#[test]
fn flipped_bits_in_metadata_do_no_harm_to_us() {
    for (cluster_bits, order, extended) in [
        (9, 6, false),
        (12, 4, false),
        (16, 0, false),
        (16, 4, false),
        (14, 4, true),
        (16, 5, true),
    ] {
        let (bytes, places) = sound(cluster_bits, order, extended);
        let mut rng = Rng(u64::from(cluster_bits));
        for _ in 0..100 {
            let mut bytes = bytes.clone();
            for _ in 0..1 + rng.below(4) {
                let place = places[rng.below(places.len() as u64) as usize] as usize;
                let at = place + rng.below(128) as usize;
                if let Some(byte) = bytes.get_mut(at) {
                    match rng.below(3) {
                        0 => *byte ^= 1 << rng.below(8),
                        1 => *byte = rng.next() as u8,
                        _ => *byte = 0,
                    }
                }
            }
            if rng.below(8) == 0 {
                bytes.truncate(rng.below(bytes.len() as u64) as usize);
            }
            abuse(bytes, &mut rng);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is accepted says the same when it is written and read again.
    #[test]
    fn headers_read_back(
        changes in prop::collection::vec((0usize..1200, any::<u8>()), 0..12),
        backing in any::<bool>(),
        len in 0usize..4096,
    ) {
        let (mut bytes, _) = sound(12, if backing { 4 } else { 3 }, false);
        bytes.truncate(4096);
        for (at, value) in changes {
            bytes[at] = value;
        }
        let _ = Header::parse(&bytes[..len]);
        if let Ok(header) = Header::parse(&bytes) {
            let again = header.encode().and_then(|bytes| Header::parse(&bytes));
            match again {
                Ok(again) => prop_assert_eq!(again, header),
                // Written one after the other they may take more than a cluster.
                Err(error) => prop_assert!(error.to_string().contains("more than a cluster")),
            }
        }
    }

    #[test]
    fn garbage_is_no_header(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut bytes = bytes;
        let _ = Header::parse(&bytes);
        for (to, from) in bytes.iter_mut().zip(*b"QFI\xfb\0\0\0\x03") {
            *to = from;
        }
        let _ = Header::parse(&bytes);
    }
}
