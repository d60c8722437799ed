//! Sound images cut off or damaged anywhere.

use super::abuse::abuse;
use super::plain;
use proptest::prelude::*;
use testkit::rich::{SHAPES, damaged, rich};

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

/// A change, as [`damaged`] reads it: mostly in what is metadata, to something that means something.
fn change() -> impl Strategy<Value = [u8; 6]> {
    let place =
        prop_oneof![4 => 0u16..28, 4 => 0u16..1 << 9, 4 => 0u16..1 << 11, 1 => any::<u16>()];
    (place, any::<u8>(), 0u32..1 << 24).prop_map(|(place, how, number)| {
        let ([lo, hi], [a, b, c, _]) = (place.to_le_bytes(), number.to_le_bytes());
        [lo, hi, how, a, b, c]
    })
}

/// How many images; more with `PROPTEST_CASES`.
fn cases() -> u32 {
    let text = std::env::var("PROPTEST_CASES").ok();
    text.map_or(100, |text| {
        text.parse().expect("PROPTEST_CASES is a number")
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Words of a sound image replaced, and the file cut off.
    #[test]
    fn damaged_images_do_no_harm(
        shape in 0..SHAPES.len() as u8,
        changes in proptest::collection::vec(change(), 1..6),
    ) {
        abuse(&damaged(&[&[shape][..], &changes.concat()].concat()));
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
