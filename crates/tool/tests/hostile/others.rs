//! Images of all formats but qcow2, cut off or damaged anywhere (`kinds`).

use super::kinds::{self, Change, KINDS, Kind, abuse, damaged, storage};
use super::{ALLOCATOR, BYTES_MAX, MEASURING};
use image::vhd::DiskType;
use proptest::prelude::*;
use proptest::strategy::Union;
use std::sync::PoisonError;
use testkit::memory::Meddling;
use tool::check::Repair;

fn change() -> impl Strategy<Value = Change> {
    let place = prop_oneof![3 => 0u16..24, 3 => 24u16..96, 1 => any::<u16>()];
    (place, any::<u8>(), 0u32..1 << 24)
}

/// Those with more tables more often.
fn kind() -> impl Strategy<Value = Kind> {
    let weighted = |kind| match kind {
        Kind::Vhd(_) | Kind::Bochs | Kind::VmdkParts => 1,
        Kind::Parallels | Kind::Cloop | Kind::VmdkStream => 2,
        Kind::Qcow | Kind::Qed | Kind::Vdi | Kind::Dmg | Kind::Vhdx | Kind::VmdkSparse => 3,
    };
    Union::new_weighted(KINDS.map(|kind| (weighted(kind), Just(kind))).to_vec())
}

#[test]
fn what_is_not_damaged_is_sound() {
    for kind in KINDS {
        let bytes = kind.sound();
        let report = kind.check(&storage(&bytes), Repair::No).expect("a check");
        assert_eq!(report.findings, [], "{kind:?}");
        assert!(abuse(kind, &bytes), "{kind:?}");
    }
}

#[test]
fn files_of_other_formats_that_end_anywhere() {
    for kind in KINDS {
        let whole = kind.sound();
        let header = (0..600).step_by(29);
        let sectors = (0..whole.len()).step_by(whole.len() / 512 / 40 * 512 + 512);
        for len in header.chain(sectors.flat_map(|at| [at, at + 511])) {
            abuse(kind, &whole[..len.min(whole.len())]);
        }
    }
}

/// Another process cuts the file between any two of the calls that look at it first: all that was asked before may be too long.
#[test]
fn files_of_other_formats_that_are_cut_while_they_are_opened() {
    for kind in KINDS {
        let len = kind.sound().len() as u64;
        for call in 1..24 {
            for left in [
                0,
                1,
                511,
                512,
                4096,
                len / 2,
                len.saturating_sub(513),
                len - 1,
            ] {
                for way in [1, 2] {
                    kinds::meddled(kind, way, call, Meddling::SetLen(left));
                }
            }
        }
    }
}

/// Each word of the head in each way, by itself.
#[test]
fn words_of_other_formats_that_say_too_much() {
    for kind in KINDS {
        for (place, how) in (0..16).flat_map(|place| (0..10).map(move |how| (place, how))) {
            eprintln!("{kind:?}: place {place}, way {how}");
            let changes = [(place, how, u32::from(place))];
            abuse(kind, &damaged(kind, &changes, true));
        }
    }
}

/// What the tests below have found: a capacity that overflows, a redundant table on the descriptor that a repair wrote there,
/// grains before the place that the header gives them, entries behind the end of the disk that lead out of the file; redundant
/// tables of a compressed image on its descriptor, data that look like what is written, a block on the name of a
/// VHD's parent, something behind the end of that in the header.
#[test]
fn what_was_found_does_no_harm_again() {
    let found = [
        (Kind::VmdkSparse, (2, 216, 0), 0),
        (Kind::VmdkSparse, (18, 91, 16_353_022), 0),
        (Kind::VmdkSparse, (9, 214, 1_147_026), 0),
        (Kind::VmdkSparse, (14, 64, 11_366_394), 8192),
        (Kind::VmdkStream, (157, 16, 122_688), 0),
        (Kind::VmdkStream, (16, 247, 15_827_904), 0),
        (Kind::VmdkSparse, (20480, 155, 14_540_633), 512),
        (Kind::Vhd(DiskType::Differencing), (36, 64, 10_343_552), 0),
        (Kind::Vhd(DiskType::Dynamic), (255, 1, 403_246), 0),
    ];
    for (kind, change, cut) in found {
        let bytes = damaged(kind, &[change], matches!(kind, Kind::Vhd(_)));
        abuse(kind, &bytes[..bytes.len() - cut]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4 * super::sweeps::cases()))]

    /// Words of a sound image replaced, and the file cut off.
    #[test]
    fn damaged_images_of_other_formats_do_no_harm(
        kind in kind(),
        changes in proptest::collection::vec(change(), 1..5),
        seal in prop::bool::weighted(0.8),
        cut in prop_oneof![4 => Just(0usize), 1 => 0usize..9000],
    ) {
        let mut bytes = damaged(kind, &changes, seal);
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        let _one = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, peak) = ALLOCATOR.peak_bytes(|| abuse(kind, &bytes));
        let most = BYTES_MAX + kind.unpacked_max();
        prop_assert!(peak <= most, "{kind:?} took {peak} bytes of memory");
    }

    /// Another process changes the file, or cuts it, while it is in use.
    #[test]
    fn files_of_other_formats_that_change_do_no_harm(
        kind in kind(),
        way in 0usize..8,
        call in 2u64..60,
        at in prop_oneof![2 => 0u64..40_000, 1 => 0u64..4 << 20],
        word in any::<[u8; 8]>(),
        cut in prop::bool::weighted(0.2),
    ) {
        let meddling = match cut {
            true => Meddling::SetLen(at),
            false => Meddling::Write(at & !7, word),
        };
        kinds::meddled(kind, way, call, meddling);
    }
}
