//! Indices and notifications of a ring.

use super::*;
use crate::vhost_user::ring::{DriverIndex, Overrun};

#[test]
fn entries_are_taken_once_and_across_the_wrap() {
    for start in [0u16, 5, u16::MAX - 2] {
        let guest = Guest::new(4);
        guest.put(AVAILABLE + 2, &start.to_le_bytes());
        let mut ring = guest.ring_at(true, start);
        assert_eq!(ring.pop(), Ok(None));
        for i in 0..9u16 {
            let entry = start.wrapping_add(i);
            guest.make_available(entry, i);
            assert_eq!(ring.pop(), Ok(Some(i)));
            assert_eq!(ring.pop(), Ok(None));
        }
        assert_eq!(ring.base(), u32::from(start.wrapping_add(9)));
    }
}

#[test]
fn an_index_too_far_ahead_is_an_overrun() {
    let guest = Guest::new(4);
    let mut ring = guest.ring(true);
    guest.put(AVAILABLE + 2, &4u16.to_le_bytes());
    assert!(matches!(ring.pop(), Ok(Some(_))), "a full ring is legal");
    let mut ring = guest.ring(true);
    for idx in [5u16, 0x8000, u16::MAX] {
        guest.put(AVAILABLE + 2, &idx.to_le_bytes());
        assert_eq!(
            ring.pop(),
            Err(Overrun::Index(DriverIndex { idx, next: 0 }))
        );
    }
}

#[test]
fn used_entries_are_shown_when_published() {
    let guest = Guest::new(4);
    let mut ring = guest.ring(false);
    ring.push(3, 513);
    assert_eq!(guest.u16(USED + 2), 0);
    assert!(ring.publish());
    assert_eq!(guest.u16(USED + 2), 1);
    assert_eq!(guest.get::<8>(USED + 4), [3, 0, 0, 0, 1, 2, 0, 0]);
    assert!(!ring.publish(), "nothing new: no notification");
    for i in 0..4 {
        ring.push(i, 1);
    }
    ring.publish();
    assert_eq!(guest.u16(USED + 2), 5);
    assert_eq!(
        guest.get::<4>(USED + 4),
        [3, 0, 0, 0],
        "entry 4 is in place 0"
    );
}

#[test]
fn a_ring_goes_on_where_the_used_index_stands() {
    let guest = Guest::new(4);
    guest.put(USED + 2, &7u16.to_le_bytes());
    let mut ring = guest.ring_at(true, 7);
    ring.push(1, 1);
    ring.publish();
    assert_eq!(guest.u16(USED + 2), 8);
    assert_eq!(guest.get::<4>(USED + 4 + 8 * 3), [1, 0, 0, 0]);
}

#[test]
fn the_event_index_asks_for_one_notification() {
    // (used index before, entries pushed, used_event, notify?)
    for (before, count, event, notify) in [
        (0u16, 1u16, 0u16, true),
        (0, 1, 1, false),
        (0, 3, 2, true),
        (0, 3, 3, false),
        (5, 2, 4, false),
        (5, 2, 5, true),
        (5, 2, 6, true),
        (5, 2, 7, false),
        (u16::MAX, 2, u16::MAX, true),
        (u16::MAX, 2, 0, true),
        (u16::MAX, 2, 1, false),
        (u16::MAX, 2, u16::MAX - 1, false),
    ] {
        let guest = Guest::new(4);
        guest.put(USED + 2, &before.to_le_bytes());
        let mut ring = guest.ring_at(true, before);
        guest.put(AVAILABLE + 4 + 2 * 4, &event.to_le_bytes());
        for _ in 0..count {
            ring.push(0, 1);
        }
        assert_eq!(ring.publish(), notify, "{before}+{count} past {event}");
    }
}

#[test]
fn flags_do_what_the_event_index_does_without_it() {
    let guest = Guest::new(4);
    let mut ring = guest.ring(false);
    guest.put(AVAILABLE, &1u16.to_le_bytes());
    ring.push(0, 1);
    assert!(!ring.publish(), "the driver polls");
    ring.disable_notify();
    assert_eq!(guest.u16(USED), 1);
    assert!(ring.enable_notify());
    assert_eq!(guest.u16(USED), 0);
    guest.make_available(0, 2);
    assert!(!ring.enable_notify(), "one came meanwhile");
}

#[test]
fn the_avail_event_follows_what_was_taken() {
    let guest = Guest::new(4);
    let mut ring = guest.ring(true);
    let event = || guest.u16(USED + 4 + 8 * 4);
    guest.make_available(0, 0);
    assert!(!ring.enable_notify());
    assert_eq!(ring.pop(), Ok(Some(0)));
    ring.disable_notify();
    assert_eq!(event(), 0);
    assert!(ring.enable_notify());
    assert_eq!(event(), 1);
    ring.disable_notify();
    // Behind what was taken: an index that the driver's next entries do not pass.
    assert_eq!(event(), 0);
    guest.make_available(1, 1);
    assert_eq!(ring.pop(), Ok(Some(1)));
    assert_eq!(
        event(),
        0,
        "and that is not touched while the queue is awake"
    );
}

#[test]
fn refuses_rings_that_are_not_there() {
    let guest = Guest::new(4);
    let good = RingAddresses {
        descriptors: USER,
        available: USER + 0x8000,
        used: USER + 0xa000,
    };
    let end = USER + GUEST_LEN;
    for (what, at, size) in [
        ("no power of two", good, 3),
        ("no entries", good, 0),
        (
            "unaligned table",
            RingAddresses {
                descriptors: USER + 8,
                ..good
            },
            4,
        ),
        (
            "unaligned available ring",
            RingAddresses {
                available: USER + 1,
                ..good
            },
            4,
        ),
        (
            "unaligned used ring",
            RingAddresses {
                used: USER + 2,
                ..good
            },
            4,
        ),
        (
            "table over the end",
            RingAddresses {
                descriptors: end - 48,
                ..good
            },
            4,
        ),
        (
            "available ring over the end",
            RingAddresses {
                available: end - 12,
                ..good
            },
            4,
        ),
        (
            "used ring over the end",
            RingAddresses {
                used: end - 36,
                ..good
            },
            4,
        ),
        (
            "guest addresses",
            RingAddresses {
                descriptors: GUEST,
                ..good
            },
            4,
        ),
        (
            "nowhere",
            RingAddresses {
                used: u64::MAX - 3,
                ..good
            },
            4,
        ),
    ] {
        let place = Place {
            at,
            size,
            ..guest.place(true, None)
        };
        assert!(Split::new(place).is_err(), "{what}");
    }
    let exact = RingAddresses {
        descriptors: end - 64,
        available: end - 64 - 14,
        used: (end - 64 - 14 - 38 - 0x10) & !3,
    };
    let place = |base| Place {
        at: exact,
        ..guest.place(true, base)
    };
    assert!(Split::new(place(None)).is_ok());
    assert!(Split::new(place(Some(0xffff))).is_ok());
    assert!(Split::new(place(Some(0x10000))).is_err());
}
