//! Sound images cut off or damaged anywhere.

use super::abuse::{abuse, meddled, open, repaired};
use super::plain;
use proptest::prelude::*;
use testkit::rich::{KINDS, damaged, kind, meddling};

#[test]
fn files_that_end_anywhere() {
    for nth in 0..KINDS {
        let whole = kind(nth).bytes;
        // In the header, then at all sectors or beside them.
        let header = (0..600).step_by(13);
        let sectors = (0..whole.len().min(32 << 10)).step_by(512);
        let beside = sectors.zip([0, 1, 0, 511].into_iter().cycle());
        let cuts = header.chain(beside.map(|(at, more)| at + more));
        // The last kinds have not much that the first have not.
        for len in cuts.step_by(if nth < 4 { 2 } else { 9 }) {
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
pub fn cases() -> u32 {
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
        kind in 0..KINDS as u8,
        changes in proptest::collection::vec(change(), 1..6),
    ) {
        abuse(&damaged(&[&[kind][..], &changes.concat()].concat()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3 * cases()))]

    /// Another process changes the file, or cuts it, while it is in use.
    #[test]
    fn files_that_change_do_no_harm(
        nth in 0..KINDS,
        way: u8,
        call in 2u64..80,
        change in change(),
        cut in prop::bool::weighted(0.2),
    ) {
        meddled(&kind(nth).bytes, way, call, meddling(change, cut));
    }
}

#[test]
fn what_the_sweeps_begin_with_is_sound() {
    for nth in 0..KINDS {
        let checked = abuse(&kind(nth).bytes).check.unwrap();
        assert_eq!(
            (checked.corruptions, checked.leaks),
            (0, 0),
            "{:?}",
            checked.findings
        );
    }
    assert!(abuse(&plain().bytes).open.is_ok());
}

/// What fuzzing found: a snapshot's L1 table on the header, which a repair writes last.
#[test]
fn what_a_repair_reports_is_what_it_leaves() {
    let image = damaged(&[4, 7, 0, 28, 1, 7, 0]);
    repaired(&image, open(&image).is_ok());
}
