//! Sound images with something of everything, and damage to them.

use crate::forge::{Bitmap, COPIED, Forge, Shape, Snapshot, extension, field, luks};
use crate::memory::Meddling;
use std::borrow::Cow;

/// How many kinds of images there are.
pub const KINDS: usize = SHAPES.len() + 4;

/// A sound image, as small as can be: 0 to [`KINDS`] - 1 are of each shape with something of everything, then
/// encrypted, with clusters compressed by zstd, with an external data file, and not closed cleanly.
pub fn kind(nth: usize) -> Forge {
    let shape = Shape {
        size: 128 << 10,
        ..Shape::default()
    };
    let plain = Forge::new(shape).data(0, 1).data(9, 2);
    match nth.checked_sub(SHAPES.len()) {
        None => rich(SHAPES[nth]),
        Some(0) => encrypted(plain),
        Some(1) => plain
            .put_u64(field::INCOMPATIBLE, 8)
            .put(field::COMPRESSION_TYPE, &[1])
            // A frame that says its length, 4096, and one block of one byte repeated so often.
            .compressed(3, b"\x28\xb5\x2f\xfd\x60\0\x0f\x03\x80\0\x42"),
        Some(2) => Forge::new(shape)
            .put_u64(field::INCOMPATIBLE, 4)
            .extension(extension::DATA_FILE, b"data")
            .map(3, 3 << 12 | COPIED)
            .map(5, 5 << 12 | COPIED | 1),
        Some(_) => plain
            .put_u64(field::INCOMPATIBLE, 1)
            .put_u64(field::COMPATIBLE, 1)
            .map(4, 1),
    }
}

/// The same with a LUKS header, of the shortest keys: a slot is active, and no passphrase is known.
fn encrypted(plain: Forge) -> Forge {
    const SLOT_SECTORS: u32 = 128;
    let mut luks = luks();
    let mut put = |at: usize, field: &[u8]| luks[at..at + field.len()].copy_from_slice(field);
    put(40, b"cbc-plain64");
    put(104, &(8 + 8 * SLOT_SECTORS).to_be_bytes());
    put(108, &16u32.to_be_bytes());
    for slot in 0..8 {
        put(
            248 + 48 * slot as usize,
            &(8 + SLOT_SECTORS * slot).to_be_bytes(),
        );
    }
    put(208, &0x00ac_71f3u32.to_be_bytes());
    // The fewest: it is tried often.
    put(164, &1u32.to_be_bytes());
    put(212, &1u32.to_be_bytes());
    let len = u64::from(8 + 8 * SLOT_SECTORS) * 512;
    let mut image = plain.put_u32(field::CRYPT_METHOD, 2);
    let at = image.allocate(len.div_ceil(image.cluster()));
    image.put(at, &luks).extension(
        extension::CRYPTO_HEADER,
        &[at.to_be_bytes(), len.to_be_bytes()].concat(),
    )
}

/// An image with something of everything that its shape can have.
fn rich(shape: Shape) -> Forge {
    let mut image = Forge::new(shape);
    if shape.version >= 3 {
        image = image.extension(0x1234_5678, b"unknown");
    }
    let image = image
        .data(0, 1)
        .data(1, 2)
        .compressed(3, &[3, 0])
        .map(4, u64::from(shape.version == 3 && !shape.extended_l2));
    let mut image = image
        .data(40, 3)
        .data(shape.size / (1 << shape.cluster_bits) - 1, 4);
    let l1_size = shape
        .size
        .div_ceil(1 << (2 * shape.cluster_bits - 3 - u32::from(shape.extended_l2)))
        as u32;
    let l1_offset = image.allocate((u64::from(l1_size) * 8).div_ceil(image.cluster()));
    // The second of the same table.
    for cluster in 0..(u64::from(l1_size) * 8).div_ceil(image.cluster()) {
        image.set_refcount(l1_offset / image.cluster() + cluster, 2);
    }
    let snapshot = Snapshot {
        l1_offset,
        l1_size,
        ..Snapshot::default()
    };
    let mut image = image.snapshots(&[snapshot.clone(), snapshot]);
    if shape.version == 2 {
        return image.backing(b"base", "");
    }
    let table = image.allocate(1);
    let data = image.allocate(1);
    let bitmap = Bitmap {
        table,
        ..Bitmap::default()
    };
    let image = image.put_u64(table, data).bitmaps(&[bitmap]);
    image.backing(b"base.qcow2", "qcow2")
}

/// Kinds of images with small tables, so that damage meets something.
const SHAPES: [Shape; 4] = [
    Shape {
        version: 3,
        cluster_bits: 9,
        refcount_order: 4,
        extended_l2: false,
        size: 128 << 10,
        header_length: 112,
    },
    Shape {
        version: 2,
        cluster_bits: 9,
        refcount_order: 4,
        extended_l2: false,
        size: 128 << 10,
        header_length: 72,
    },
    Shape {
        version: 3,
        cluster_bits: 12,
        refcount_order: 1,
        extended_l2: false,
        size: 4 << 20,
        header_length: 104,
    },
    Shape {
        version: 3,
        cluster_bits: 14,
        refcount_order: 6,
        extended_l2: true,
        size: 4 << 20,
        header_length: 112,
    },
];

/// The image that a fuzzer's input stands for: as it is, or as a program of [`damaged`].
pub fn image(input: &[u8]) -> Cow<'_, [u8]> {
    match input.starts_with(b"QFI\xfb") {
        true => Cow::Borrowed(input),
        false => Cow::Owned(damaged(input)),
    }
}

/// What somebody else does to a file that is in use, of a change as [`damaged`] takes it: a word, or the file's end.
pub fn meddling([lo, hi, how, a, b, c]: [u8; 6], cut: bool) -> Meddling {
    let at = 8 * u64::from(u16::from_le_bytes([lo, hi]));
    let number = u64::from_le_bytes([a, b, c, 0, 0, 0, 0, 0]);
    match cut {
        true => Meddling::SetLen(at + u64::from(how)),
        false => Meddling::Write(at, number.rotate_left(u32::from(how & 63)).to_be_bytes()),
    }
}

/// A sound image with the damage that a program describes: its first byte says which image, each six more bytes a word
/// (of 8 bytes) and what becomes of it.
pub fn damaged(program: &[u8]) -> Vec<u8> {
    let (first, rest) = program.split_first().unwrap_or((&0, &[]));
    let mut bytes = kind(usize::from(*first) % KINDS).bytes;
    for change in rest.as_chunks::<6>().0.iter().take(16) {
        let [lo, hi, how, a, b, c] = *change;
        let at = 8 * usize::from(u16::from_le_bytes([lo, hi]));
        let number = u64::from_le_bytes([a, b, c, 0, 0, 0, 0, 0]);
        let Some(word) = bytes.get(at..at + 8) else {
            // Where there is no word the file ends.
            bytes.truncate(8 * number as usize);
            continue;
        };
        let old = u64::from_be_bytes(word.try_into().expect("8 bytes"));
        // A small number at any place in the word, over it or instead of it, or a run of ones.
        let shifted = number.rotate_left(u32::from(how & 63));
        let new = match how >> 6 {
            0 => shifted,
            1 => old ^ shifted,
            2 => old.wrapping_add(shifted),
            _ => old | (1u64 << (a & 63)).wrapping_sub(1) << (how & 63),
        };
        bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
    }
    bytes
}
