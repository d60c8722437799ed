//! Arbitrary bytes in the place of descriptors: no panic, no address outside, a bounded walk.

use super::{parse::limits, *};
use crate::vhost_user::{
    chain::{Chain, DESCRIPTORS_MAX},
    memory::REGIONS_MAX,
    request::{SEGMENTS_MAX, Segment, Task, parse},
    spec::{DESC_F_INDIRECT, request},
};
use proptest::prelude::*;

/// Addresses near every edge there is.
pub fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0u64..0x8000).prop_map(|at| BUFFERS + at),
        2 => (0u64..0x200).prop_map(|at| GUEST + GUEST_LEN - 0x100 + at),
        1 => (0u64..0x200).prop_map(|at| GUEST + GUEST_LEN + 0x10000 - 0x100 + at),
        1 => (0u64..0x200).prop_map(|at| GUEST - 0x100 + at),
        1 => any::<u64>(),
        1 => (0u64..0x200).prop_map(|at| u64::MAX - at),
    ]
}

pub fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0u32),
        Just(1),
        Just(16),
        Just(512),
        Just(513),
        (1u32..64).prop_map(|n| n * 16),
        any::<u32>(),
    ]
}

fn descriptor(size: u16) -> impl Strategy<Value = Raw> {
    let flags = prop_oneof![
        4 => Just(DESC_F_NEXT),
        3 => Just(DESC_F_NEXT | DESC_F_WRITE),
        2 => Just(DESC_F_WRITE),
        1 => Just(DESC_F_INDIRECT),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![8 => 0..size, 1 => any::<u16>()];
    (address(), length(), flags, next)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nothing_escapes(
        size_log in 0u32..7,
        table in prop::collection::vec(descriptor(16), 64),
        nested in prop::collection::vec(descriptor(16), 32),
        kind in prop_oneof![
            Just(request::IN), Just(request::OUT), Just(request::DISCARD),
            Just(request::WRITE_ZEROES), Just(request::GET_ID), any::<u32>(),
        ],
        noise in prop::collection::vec(any::<u8>(), 256),
        head in 0u16..80,
        indirect: bool,
    ) {
        let guest = Guest::new(1 << size_log);
        // Tables may well point to other tables, headers and noise.
        for at in (0..0x8000).step_by(256) {
            guest.put(BUFFERS + at, &noise);
            guest.put(BUFFERS + at, &kind.to_le_bytes());
        }
        guest.table(BUFFERS + 0x100, &nested);
        guest.table(DESCRIPTORS, &table);
        let ring = guest.ring(true);
        let mut chain = Chain::new();
        let walked = chain.walk_split(&ring, head, indirect);
        let inside = |at: *mut u8, len: usize| {
            [(GUEST, GUEST_LEN), (GUEST + GUEST_LEN, 0x10000)].iter().any(|(start, size)| {
                let base = guest.memory.range(*start, *size).unwrap().addr();
                at.addr() >= base && at.addr() + len <= base + *size as usize
            })
        };
        prop_assert!(chain.iov.len() <= DESCRIPTORS_MAX + REGIONS_MAX);
        prop_assert!(chain.iov.iter().all(|v| inside(v.base(), v.len()) && v.len() > 0));
        if walked.is_err() {
            return Ok(());
        }
        let mut segments = [Segment::default(); SEGMENTS_MAX];
        let task = parse(&mut chain, &limits(), &mut segments);
        if !chain.status.is_null() {
            prop_assert!(inside(chain.status, 1));
        }
        match task {
            Ok(Task::Single { len, iov, op, .. }) => {
                let pieces = &chain.iov[iov];
                prop_assert_eq!(block::total_len(pieces), len);
                prop_assert!(len % 512 == 0);
                prop_assert!(op.has_data() || len == 0);
                prop_assert!(pieces.iter().all(|v| inside(v.base(), v.len())));
                prop_assert!(pieces.len() <= block::limits::REQUEST_SEGMENTS_MAX);
            }
            Ok(Task::Segments { count, .. }) => {
                prop_assert!(count <= 4);
                for segment in &segments[..count] {
                    prop_assert!(segment.at + segment.len <= super::parse::DISK_BYTES);
                }
            }
            Ok(Task::Answer { written, .. }) => prop_assert!(written <= 20),
            Err(_) => prop_assert!(chain.status.is_null()),
        }
    }
}
