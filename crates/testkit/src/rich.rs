//! Sound images with something of everything, and damage to them.

use crate::forge::{Bitmap, Forge, Shape, Snapshot};

/// An image with something of everything.
pub fn rich(shape: Shape) -> Forge {
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
pub const SHAPES: [Shape; 4] = [
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

/// A sound image with the damage that a program describes: its first byte says which image, each six more bytes a word
/// (of 8 bytes) and what becomes of it.
pub fn damaged(program: &[u8]) -> Vec<u8> {
    let (first, rest) = program.split_first().unwrap_or((&0, &[]));
    let mut bytes = rich(SHAPES[usize::from(*first) % SHAPES.len()]).bytes;
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
