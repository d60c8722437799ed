//! Sound images cut off or damaged anywhere.

use super::abuse::abuse;
use super::plain;
use proptest::prelude::*;
use testkit::forge::{Bitmap, COMPRESSED, COPIED, Forge, Shape, Snapshot};

/// An image with something of everything.
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

/// Shapes with small tables, so that damage meets something.
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

#[test]
fn files_that_end_anywhere() {
    for shape in SHAPES {
        let whole = rich(shape).bytes;
        // In the header, then at all sectors or beside them.
        let header = (0..600).step_by(13);
        let sectors = (0..whole.len().min(32 << 10)).step_by(512);
        let beside = sectors.zip([0, 1, 0, 511].into_iter().cycle());
        for len in header.chain(beside.map(|(at, more)| at + more)) {
            abuse(&whole[..len.min(whole.len())]);
        }
    }
}

/// A change of a word: to something that means something.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0u64..64, any::<bool>()).prop_map(|(cluster, copied)| cluster << 9 | u64::from(copied) << 63),
        3 => (0u64..64, any::<bool>()).prop_map(|(cluster, copied)| cluster << 12 | u64::from(copied) << 63),
        2 => (0u64..16, 0u32..64).prop_map(|(low, shift)| low << shift),
        1 => (0u32..64).prop_map(|shift| (1u64 << shift).wrapping_sub(1)),
        1 => (0u64..1 << 18).prop_map(|at| COMPRESSED | at),
        1 => Just(COPIED),
        1 => any::<u64>(),
    ]
}

/// Where: mostly in what is metadata.
fn place() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0usize..28,
        4 => 0usize..1 << 9,
        4 => 0usize..1 << 11,
        2 => 0usize..1 << 13,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Words of a sound image replaced.
    #[test]
    fn damaged_images_do_no_harm(
        shape in 0..SHAPES.len(),
        changes in proptest::collection::vec((place(), value(), any::<bool>()), 1..6),
        cut in proptest::option::weighted(0.1, any::<proptest::sample::Index>()),
    ) {
        let mut bytes = rich(SHAPES[shape]).bytes;
        for (word, value, half) in changes {
            // Fields of 32 bits lie beside each other.
            let value = if half { value.rotate_right(32) } else { value };
            let word = word * 8;
            if let Some(place) = bytes.get_mut(word..word + 8) {
                place.copy_from_slice(&value.to_be_bytes());
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        abuse(&bytes);
    }
}

#[test]
fn what_the_sweeps_begin_with_is_sound() {
    for shape in SHAPES {
        let checked = abuse(&rich(shape).bytes).check.unwrap();
        assert_eq!(
            (checked.corruptions, checked.leaks),
            (0, 0),
            "{:?}",
            checked.findings
        );
    }
    assert!(abuse(&plain().bytes).open.is_ok());
}
