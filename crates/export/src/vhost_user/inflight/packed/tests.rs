use super::*;
use crate::vhost_user::memory::tests::region;
use proptest::prelude::*;
use std::{collections::VecDeque, ptr};

const SIZE: u16 = 8;

fn file() -> Arc<Region> {
    region(0, 0, 0x1000)
}

fn part(region: &Arc<Region>, index: usize) -> Result<Packed> {
    Packed::new(File {
        region: region.clone(),
        index,
        size: SIZE,
    })
}

fn at(index: u16, wrap: bool) -> Position {
    Position { index, wrap }
}

fn chain(id: u16, count: u16) -> Vec<PackedDescriptor> {
    let descriptor = |nth: u16| PackedDescriptor {
        buffer: Buffer {
            addr: u64::from(id) << 16 | u64::from(nth),
            len: u32::from(nth) + 1,
            flags: u16::from(nth + 1 < count),
        },
        id,
    };
    (0..count).map(descriptor).collect()
}

/// A copy of the file as a server that died now leaves it.
fn copy(of: &Arc<Region>) -> Arc<Region> {
    let to = file();
    let (from, into) = (of.range(0, 0x1000), to.range(0, 0x1000));
    // SAFETY: both are mapped, and so long.
    unsafe { ptr::copy_nonoverlapping(from.unwrap(), into.unwrap(), 0x1000) };
    to
}

/// What a next server finds: position, and the number of each chain.
fn found(file: &Arc<Region>, shown: bool) -> (Position, Vec<u16>) {
    let mut next = part(file, 0).unwrap();
    let found = next.recover(SIZE, at(7, false), |_| shown).unwrap();
    let mut descriptors = Vec::new();
    let chains = found.chains.iter().map(|(entry, count)| {
        next.read(*entry, *count, &mut descriptors);
        let id = descriptors[0].id;
        assert_eq!(descriptors, chain(id, *count));
        id
    });
    let chains = chains.collect();
    (found.used.expect("not a new file"), chains)
}

#[test]
fn a_new_file_has_nothing() {
    let file = file();
    let mut first = part(&file, 1).unwrap();
    let recovered = first.recover(SIZE, at(3, false), |_| true).unwrap();
    assert_eq!(
        recovered,
        Recovered {
            used: None,
            chains: Vec::new()
        }
    );
    let head = first.take(&chain(5, 2));
    assert_eq!(head, 0);
    let mut second = part(&file, 1).unwrap();
    let recovered = second.recover(SIZE, at(0, true), |_| false).unwrap();
    assert_eq!(recovered.used, Some(at(3, false)), "where the ring stood");
    assert_eq!(recovered.chains, [(0, 2)]);
    let mut other = part(&file, 0).unwrap();
    let recovered = other.recover(SIZE, at(0, true), |_| true).unwrap();
    assert!(
        recovered.chains.is_empty() && recovered.used.is_none(),
        "queue 0 is not queue 1"
    );
}

#[test]
fn the_layout_is_that_of_the_specification() {
    let file = file();
    let mut notes = part(&file, 0).unwrap();
    notes.recover(SIZE, at(2, true), |_| true).unwrap();
    notes.take(&chain(9, 1));
    notes.take(&chain(3, 2));
    notes.done(0);
    notes.publishing(at(3, true));
    let bytes = |at: usize| {
        let from = file.range(at as u64, 8).unwrap();
        // SAFETY: mapped, as `range` says.
        u64::from_le_bytes(unsafe { ptr::read(from.cast::<[u8; 8]>()) })
    };
    // Version 1, 8 entries, free_head 0 as the first is done, old_free_head 3.
    assert_eq!(bytes(8), 1 | 8 << 16 | 3 << 48);
    // used_idx 3, old 2, both counters 1.
    assert_eq!(bytes(16), 3 | 2 << 16 | 1 << 32 | 1 << 40);
    // Entry 1: in flight, next 2, last 2, num 2; counter 1; number 3, flags NEXT, length 1; address.
    assert_eq!(bytes(64), 1 | 2 << 16 | 2 << 32 | 2 << 48);
    assert_eq!(bytes(72), 1);
    assert_eq!(bytes(80), 3 | 1 << 16 | 1 << 32);
    assert_eq!(bytes(88), 3 << 16);
    assert_eq!(bytes(96 + 24), 3 << 16 | 1, "the second descriptor's");
    assert_eq!(bytes(32) as u8, 1, "still in flight");
    assert_eq!((bytes(32) >> 16) as u16, 3, "and the head of the free list");
    notes.published(at(3, true));
    assert_eq!(bytes(32) as u8, 0);
    assert_eq!(bytes(8), 1 | 8 << 16);
    assert_eq!(bytes(16), 3 | 3 << 16 | 1 << 32 | 1 << 40);
    // DPDK's sizes, whose header has 29 bytes.
    for size in [1u16, 2, 5, 128, 256, 1024] {
        assert_eq!(
            queue_bytes(size),
            (29 + 32 * u64::from(size)).next_multiple_of(64),
            "{size}"
        );
    }
}

#[test]
fn a_lap_in_one_batch_is_a_change() {
    let file = file();
    let mut notes = part(&file, 0).unwrap();
    notes.recover(SIZE, at(5, true), |_| true).unwrap();
    let heads: Vec<u16> = (0..4).map(|id| notes.take(&chain(id, 2))).collect();
    heads.iter().for_each(|head| notes.done(*head));
    notes.publishing(at(5, false));
    assert_eq!(found(&copy(&file), true), (at(5, false), vec![]));
    assert_eq!(found(&copy(&file), false), (at(5, true), vec![0, 1, 2, 3]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whenever the server dies, the next finds what was taken and not shown, in order.
    #[test]
    fn what_was_not_shown_comes_back(steps in prop::collection::vec((0u8..3, any::<u16>()), 1..60)) {
        let file = file();
        let mut notes = part(&file, 0).unwrap();
        let mut used = at(6, true);
        notes.recover(SIZE, used, |_| true).unwrap();
        // Number, entry, descriptors.
        let mut taken: VecDeque<(u16, u16, u16)> = VecDeque::new();
        let mut next_id = 0;
        for (step, number) in steps {
            let room = SIZE - taken.iter().map(|(_, _, count)| count).sum::<u16>();
            let ids = |taken: &VecDeque<(u16, u16, u16)>| {
                taken.iter().map(|(id, ..)| *id).collect::<Vec<_>>()
            };
            match step {
                0 | 1 if room > 0 => {
                    let count = 1 + number % room.min(3);
                    let entry = notes.take(&chain(next_id, count));
                    taken.push_back((next_id, entry, count));
                    next_id += 1;
                }
                _ => {
                    let before = (used, ids(&taken));
                    for _ in 0..usize::from(number) % (taken.len() + 1) {
                        let one = taken.remove(usize::from(number) % taken.len());
                        let (_, entry, count) = one.expect("within");
                        notes.done(entry);
                        used = used.plus(count, SIZE);
                        prop_assert_eq!(found(&copy(&file), false), before.clone());
                    }
                    let after = (used, ids(&taken));
                    notes.publishing(used);
                    prop_assert_eq!(found(&copy(&file), false), before);
                    prop_assert_eq!(found(&copy(&file), true), after.clone());
                    notes.published(used);
                    prop_assert_eq!(found(&copy(&file), true), after);
                }
            }
            prop_assert_eq!(found(&copy(&file), true), (used, ids(&taken)));
        }
    }

    /// Arbitrary bytes: no panic, no entry or descriptor twice, no more than the ring has.
    #[test]
    fn garbage_is_bounded(
        words in prop::collection::vec(prop_oneof![0u16..12, any::<u16>()], 160),
        ring_size in 1u16..=SIZE,
        shown: bool,
        good: bool,
    ) {
        let file = file();
        let base = file.range(0, 512).unwrap();
        for (i, word) in words.iter().enumerate() {
            // SAFETY: 320 of the 512 bytes.
            unsafe { ptr::write(base.wrapping_add(2 * i).cast(), *word) };
        }
        let mut notes = part(&file, 0).unwrap();
        if good {
            notes.word(VERSION_AT).store(VERSION, Ordering::Relaxed);
            notes.word(COUNT_AT).store(SIZE, Ordering::Relaxed);
        }
        let Ok(found) = notes.recover(ring_size, at(0, true), |_| shown) else {
            return Ok(());
        };
        let total: u16 = found.chains.iter().map(|(_, count)| count).sum();
        prop_assert!(total <= ring_size);
        let mut out = Vec::new();
        for (entry, count) in &found.chains {
            notes.read(*entry, *count, &mut out);
            prop_assert_eq!(out.len(), usize::from(*count));
        }
        // It works from then on: all that is left can be taken.
        while notes.free_head < SIZE {
            let entry = notes.take(&chain(1, 1));
            notes.done(entry);
            notes.publishing(at(0, true));
            notes.published(at(0, true));
            let mut left = (total..SIZE).map(|_| notes.take(&chain(2, 1))).collect::<Vec<_>>();
            left.sort_unstable();
            left.dedup();
            prop_assert_eq!(left.len(), usize::from(SIZE - total));
            // The file may change below us.
            notes.word(FREE_HEAD_AT).store(77, Ordering::Relaxed);
            prop_assert_eq!(notes.take(&chain(3, 1)), SIZE);
            notes.done(SIZE);
        }
    }
}

#[test]
fn a_file_without_room_is_refused() {
    let file = file();
    assert!(part(&file, 11).is_ok());
    assert!(part(&file, 13).is_err());
    assert!(part(&file, usize::MAX).is_err());
}
