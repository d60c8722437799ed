//! A packed ring against a driver that writes it by hand, chains and their faults included.

use super::*;
use crate::vhost_user::{
    chain::{Chain, DESCRIPTORS_MAX, Fault},
    inflight::{File, file_bytes},
    memory::REGIONS_MAX,
    ring::{Overrun, Packed},
    spec::{DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_USED},
};
use proptest::prelude::*;

const DRIVER_EVENT: u64 = AVAILABLE;
const DEVICE_EVENT: u64 = USED;
const OWN: u16 = DESC_F_AVAIL | DESC_F_USED;

/// A driver's side: where it adds, with which wrap counter.
struct Driver<'a> {
    guest: &'a Guest,
    next: u16,
    wrap: bool,
}

impl<'a> Driver<'a> {
    fn new(guest: &'a Guest) -> Self {
        Self {
            guest,
            next: 0,
            wrap: true,
        }
    }

    fn available(&self) -> u16 {
        if self.wrap { DESC_F_AVAIL } else { DESC_F_USED }
    }

    fn put(&self, index: u16, (addr, len, flags): (u64, u32, u16), id: u16) {
        let at = DESCRIPTORS + 16 * u64::from(index);
        self.guest.put(at, &addr.to_le_bytes());
        self.guest.put(at + 8, &len.to_le_bytes());
        self.guest.put(at + 12, &id.to_le_bytes());
        self.guest.put(at + 14, &flags.to_le_bytes());
    }

    /// One descriptor, available.
    fn one(&mut self, buffer: (u64, u32, u16), id: u16) {
        let (addr, len, flags) = buffer;
        self.put(self.next, (addr, len, flags | self.available()), id);
        self.next += 1;
        if self.next == self.guest.size {
            self.next = 0;
            self.wrap = !self.wrap;
        }
    }

    /// A chain of `count` descriptors.
    fn chain(&mut self, id: u16, count: u16) {
        for nth in 0..count {
            let next = if nth + 1 < count { DESC_F_NEXT } else { 0 };
            let buffer = (BUFFERS + u64::from(nth) * 512, 512, next | DESC_F_WRITE);
            self.one(buffer, if next == 0 { id } else { 0xdead });
        }
    }
}

fn ring(guest: &Guest, event_idx: bool) -> Packed {
    Packed::new(guest.place(event_idx, None)).unwrap()
}

/// Takes the next chain; number and descriptors.
fn take(ring: &mut Packed) -> Option<<Packed as Ring>::Head> {
    let entry = ring.pop().unwrap()?;
    Some(ring.walk(entry, &mut Chain::new(), true).unwrap())
}

fn flags(guest: &Guest, index: u16) -> u16 {
    guest.u16(DESCRIPTORS + 16 * u64::from(index) + 14)
}

#[test]
fn chains_are_taken_once_and_across_the_wrap() {
    // Sizes that are no powers of two are legal.
    for size in [1u16, 3, 4, 7] {
        let guest = Guest::new(size);
        let (mut driver, mut ring) = (Driver::new(&guest), ring(&guest, true));
        assert_eq!(take(&mut ring), None);
        for id in 0..40u16 {
            let count = 1 + id % size.min(3);
            driver.chain(id, count);
            let head = take(&mut ring).unwrap();
            assert_eq!((head.id, head.count), (id, count), "{size}");
            assert_eq!(take(&mut ring), None);
            ring.push(head, 512);
            assert!(ring.publish());
            assert!(!ring.publish(), "nothing new: no notification");
        }
    }
}

#[test]
fn used_descriptors_are_shown_when_published() {
    let guest = Guest::new(8);
    let (mut driver, mut ring) = (Driver::new(&guest), ring(&guest, false));
    for (id, count) in [(10, 2), (11, 1), (12, 3)] {
        driver.chain(id, count);
    }
    let heads: Vec<_> = (0..3).map(|_| take(&mut ring).unwrap()).collect();
    // Out of order, in one batch: each where the last one's descriptors end.
    ring.push(heads[1], 513);
    ring.push(heads[2], 7);
    ring.push(heads[0], 0);
    assert_eq!(flags(&guest, 0) & OWN, DESC_F_AVAIL, "not yet");
    assert!(ring.publish());
    let second_half = |index: u64| guest.get::<8>(DESCRIPTORS + 16 * index + 8);
    assert_eq!(second_half(0), [1, 2, 0, 0, 11, 0, 0x82, 0x80]);
    assert_eq!(second_half(1), [7, 0, 0, 0, 12, 0, 0x82, 0x80]);
    assert_eq!(
        second_half(4),
        [0, 0, 0, 0, 10, 0, 0x80, 0x80],
        "nothing was written"
    );
    assert_eq!(ring.base(), 0x8006_8006);
    // The next lap: both flags are the other way.
    driver.chain(13, 3);
    let head = take(&mut ring).unwrap();
    ring.push(head, 1);
    ring.publish();
    driver.chain(14, 1);
    assert_eq!(ring.base(), 0x0001_0001);
    let head = take(&mut ring).unwrap();
    ring.push(head, 1);
    ring.publish();
    assert_eq!(second_half(1), [1, 0, 0, 0, 14, 0, 2, 0]);
}

#[test]
fn the_driver_says_of_which_descriptor_it_wants_to_know() {
    // (descriptors used before, then shown in one batch, event, its counter, notify?), in a ring of 4.
    for (before, count, event, wrap, notify) in [
        (0u16, 1u16, 0u16, true, true),
        (0, 1, 1, true, false),
        (0, 3, 2, true, true),
        (0, 3, 3, true, false),
        (2, 2, 1, true, false),
        (2, 2, 2, true, true),
        (2, 2, 3, true, true),
        (2, 2, 0, false, false),
        (3, 2, 3, true, true),
        (3, 2, 0, false, true),
        (3, 2, 1, false, false),
        (3, 2, 2, true, false),
        (0, 4, 3, true, true),
        (0, 4, 0, false, false),
    ] {
        let guest = Guest::new(4);
        let (mut driver, mut ring) = (Driver::new(&guest), ring(&guest, true));
        for (nth, batch) in [before, count].into_iter().enumerate() {
            guest.put(DRIVER_EVENT, &(event | u16::from(wrap) << 15).to_le_bytes());
            guest.put(DRIVER_EVENT + 2, &2u16.to_le_bytes());
            for id in 0..batch {
                driver.chain(id, 1);
                let head = take(&mut ring).unwrap();
                ring.push(head, 1);
            }
            let told = ring.publish();
            if nth == 1 {
                assert_eq!(told, notify, "{before}+{count} past {event} {wrap}");
            }
        }
    }
}

#[test]
fn flags_turn_notifications_off() {
    let guest = Guest::new(4);
    let (mut driver, mut ring) = (Driver::new(&guest), ring(&guest, false));
    let mut round = |flags: u16| {
        guest.put(DRIVER_EVENT + 2, &flags.to_le_bytes());
        driver.chain(1, 1);
        let head = take(&mut ring).unwrap();
        ring.push(head, 1);
        ring.publish()
    };
    assert!(round(0));
    assert!(!round(1), "the driver polls");
    // Without the event index, and where they mean nothing: rather once too often.
    assert!(round(2));
    assert!(round(3));
    assert!(!round(0xfffd), "the other bits are reserved");
    let told = || guest.u16(DEVICE_EVENT + 2);
    assert_eq!(told(), 0);
    ring.disable_notify();
    assert_eq!(told(), 1);
    assert!(ring.enable_notify());
    assert_eq!(told(), 0);
    driver.chain(2, 1);
    assert!(!ring.enable_notify(), "one came meanwhile");
}

#[test]
fn the_device_says_of_which_descriptor_it_wants_to_know() {
    let guest = Guest::new(4);
    let (mut driver, mut ring) = (Driver::new(&guest), ring(&guest, true));
    let told = || (guest.u16(DEVICE_EVENT), guest.u16(DEVICE_EVENT + 2));
    assert_eq!(told(), (0, 0), "at first of all");
    assert!(ring.enable_notify());
    assert_eq!(told(), (1 << 15, 2));
    for lap in 0..2 {
        for _ in 0..4 {
            driver.chain(1, 1);
            assert!(!ring.enable_notify());
            let head = take(&mut ring).unwrap();
            ring.push(head, 1);
            ring.publish();
        }
        ring.disable_notify();
        assert_eq!(told().1, 1);
        assert!(ring.enable_notify());
        assert_eq!(told(), (u16::from(lap == 1) << 15, 2));
    }
}

#[test]
fn more_than_the_ring_holds_is_an_overrun() {
    let guest = Guest::new(2);
    let (mut driver, mut ring) = (Driver::new(&guest), ring(&guest, true));
    driver.chain(0, 1);
    driver.chain(1, 1);
    assert!(take(&mut ring).is_some() && take(&mut ring).is_some());
    assert_eq!(ring.pop(), Ok(None), "a full ring is legal");
    assert!(ring.enable_notify());
    // The driver takes back what is in flight.
    driver.chain(2, 1);
    assert_eq!(ring.pop(), Err(Overrun::Descriptor(0)));
    // A chain that goes on where others are in flight.
    let guest = Guest::new(4);
    let (mut driver, mut ring) = (Driver::new(&guest), self::ring(&guest, true));
    driver.chain(0, 3);
    assert_eq!(take(&mut ring).unwrap().count, 3);
    driver.one((BUFFERS, 512, DESC_F_NEXT), 1);
    let entry = ring.pop().unwrap().unwrap();
    let walked = ring.walk(entry, &mut Chain::new(), true);
    assert_eq!(walked, Err(Fault::Endless));
}

#[test]
fn indirect_tables_are_read_in_sequence() {
    let guest = Guest::new(4);
    let table = BUFFERS + 0x1000;
    let mut driver = Driver::new(&guest);
    let put_table = |descriptors: &[(u64, u32, u16)]| {
        for (i, (addr, len, flags)) in descriptors.iter().enumerate() {
            let at = table + 16 * i as u64;
            guest.put(at, &addr.to_le_bytes());
            guest.put(at + 8, &len.to_le_bytes());
            // The number means nothing here.
            guest.put(at + 12, &0xffffu16.to_le_bytes());
            guest.put(at + 14, &flags.to_le_bytes());
        }
    };
    // Flags but WRITE mean nothing either (§2.8.7).
    put_table(&[
        (BUFFERS, 16, DESC_F_INDIRECT | OWN),
        (BUFFERS + 0x2000, 1024, DESC_F_WRITE | DESC_F_NEXT),
        (BUFFERS + 0x3000, 1, DESC_F_WRITE | DESC_F_INDIRECT),
    ]);
    let mut ring = ring(&guest, true);
    let mut chain = Chain::new();
    let mut walk = |buffer: (u64, u32, u16), indirect: bool| {
        driver.one(buffer, 7);
        let entry = ring.pop().unwrap().unwrap();
        let walked = ring.walk(entry, &mut chain, indirect);
        (
            walked.map(|head| (head.id, head.count)),
            chain.readable_len,
            chain.writable_len,
            chain.malformed,
        )
    };
    let ok = Ok((7, 1));
    assert_eq!(
        walk((table, 48, DESC_F_INDIRECT), true),
        (ok, 16, 1025, false)
    );
    // WRITE is reserved beside INDIRECT and ignored.
    let write = DESC_F_INDIRECT | DESC_F_WRITE;
    assert_eq!(walk((table, 48, write), true), (ok, 16, 1025, false));
    for (what, buffer, indirect) in [
        ("not agreed on", (table, 48, DESC_F_INDIRECT), false),
        ("goes on", (table, 48, DESC_F_INDIRECT | DESC_F_NEXT), true),
        ("empty", (table, 0, DESC_F_INDIRECT), true),
        ("odd length", (table, 47, DESC_F_INDIRECT), true),
        ("nowhere", (GUEST - 16, 48, DESC_F_INDIRECT), true),
    ] {
        let guest = Guest::new(4);
        let mut ring = self::ring(&guest, true);
        Driver::new(&guest).one(buffer, 1);
        let entry = ring.pop().unwrap().unwrap();
        let walked = ring.walk(entry, &mut Chain::new(), indirect);
        assert_eq!(walked, Err(Fault::Indirect), "{what}");
    }
    let guest = Guest::new(4);
    let mut ring = self::ring(&guest, true);
    let long = (DESCRIPTORS_MAX as u32 + 1) * 16;
    Driver::new(&guest).one((GUEST, long, DESC_F_INDIRECT), 1);
    let entry = ring.pop().unwrap().unwrap();
    let walked = ring.walk(entry, &mut Chain::new(), true);
    assert_eq!(walked, Err(Fault::Endless));
}

#[test]
fn a_ring_goes_on_where_its_base_says() {
    let guest = Guest::new(4);
    // (base, where it goes on, or that it cannot)
    for (base, expected) in [
        (None, Some(0x8000_8000)),
        (Some(0x8000_8000), Some(0x8000_8000)),
        (Some(0x0003_0003), Some(0x0003_0003)),
        // From a front-end that keeps 16 bits.
        (Some(0x0000_8002), Some(0x8002_8002)),
        // Something is in flight that we do not know of.
        (Some(0x8001_8003), Some(0x8001_8003)),
        (Some(0x8003_0001), Some(0x8003_0001)),
        (Some(0x8002_0002), Some(0x8002_0002)),
        // More than the ring holds.
        (Some(0x8002_0003), None),
        (Some(0x8003_8002), None),
        // Beyond it.
        (Some(0x8000_8004), None),
        (Some(0x8004_8000), None),
        (Some(u32::MAX), None),
    ] {
        let made = Packed::new(guest.place(true, base));
        assert_eq!(made.ok().map(|ring| ring.base()), expected, "{base:x?}");
    }
    for (size, fits) in [
        (0, false),
        (1, true),
        (5, true),
        (0x8000, true),
        (0x8001, false),
    ] {
        let place = Place {
            size,
            ..guest.place(true, None)
        };
        let made = Packed::new(place);
        assert_eq!(made.is_ok(), fits, "{size}");
    }
    let good = guest.place(true, None).at;
    for at in [
        RingAddresses {
            descriptors: good.descriptors + 8,
            ..good
        },
        RingAddresses {
            available: good.available + 2,
            ..good
        },
        RingAddresses {
            used: good.used + 1,
            ..good
        },
        RingAddresses {
            used: good.descriptors + GUEST_LEN - 2,
            ..good
        },
    ] {
        let place = Place {
            at,
            ..guest.place(true, None)
        };
        assert!(Packed::new(place).is_err(), "{at:x?}");
    }
}

/// A server dies with two chains in flight, one of them pushed and not shown behind another.
#[test]
fn what_a_dead_server_left_is_done_again() {
    // A front-end knows where the ring stood long ago, or when a queue was stopped with requests in flight.
    for base in [0x8000_8000, 0x8001_8006] {
        a_dead_server_leaves_work(base);
    }
}

fn a_dead_server_leaves_work(base: u32) {
    let guest = Guest::new(8);
    let mut driver = Driver::new(&guest);
    let file = crate::vhost_user::memory::tests::region(0, 0, file_bytes(true, 1, 8).max(4096));
    let place = || Place {
        inflight: Some(File {
            region: file.clone(),
            index: 0,
            size: 8,
        }),
        // Long ago.
        ..guest.place(true, Some(0x8000_8000))
    };
    let mut first = Packed::new(place()).unwrap();
    for (id, count) in [(20, 2), (21, 1), (22, 2), (23, 1)] {
        driver.chain(id, count);
    }
    let heads: Vec<_> = (0..4).map(|_| take(&mut first).unwrap()).collect();
    first.push(heads[1], 1);
    first.publish();
    // Of these the second is in the ring already, hidden by the first.
    first.push(heads[3], 1);
    first.push(heads[0], 1);
    assert_eq!(flags(&guest, 1) & OWN, DESC_F_AVAIL);
    assert_eq!(flags(&guest, 2) & OWN, OWN);
    drop(first);

    let mut second = Packed::new(Place {
        base: Some(base),
        ..place()
    })
    .unwrap();
    assert_eq!(flags(&guest, 2) & OWN, DESC_F_AVAIL, "no longer used");
    assert_eq!(second.base(), 0x8001_8006, "all that was taken stays taken");
    // The ring's descriptors were overwritten: what they said is in the file.
    let mut chain = Chain::new();
    let mut again = Vec::new();
    for (id, count) in [(20, 2), (22, 2), (23, 1)] {
        let entry = second.pop().unwrap().unwrap();
        let head = second.walk(entry, &mut chain, true).unwrap();
        assert_eq!((head.id, head.count), (id, count));
        assert_eq!(chain.writable_len, 512 * u64::from(count));
        again.push(head);
    }
    driver.chain(24, 1);
    again.push(take(&mut second).unwrap());
    assert_eq!(again[3].id, 24);
    again
        .into_iter()
        .rev()
        .for_each(|head| second.push(head, 1));
    assert!(second.publish());
    assert_eq!(second.base(), 0x8007_8007);
    let used: Vec<u16> = [1, 2, 3, 5]
        .map(|at| guest.u16(DESCRIPTORS + 16 * at + 12))
        .to_vec();
    assert_eq!(used, [24, 23, 22, 20]);
    let mut third = Packed::new(place()).unwrap();
    assert_eq!(third.base(), 0x8007_8007);
    assert_eq!(third.pop(), Ok(None));
}

/// What a server may find in a file of requests in flight that somebody made up.
#[derive(Clone, Debug)]
struct Notes {
    /// `free_head`, `used_idx` and `used_wrap_counter`.
    header: (u16, u16, bool),
    /// Of each entry `inflight`, `next` and `num`.
    entries: Vec<(bool, u16, u16)>,
}

fn notes() -> impl Strategy<Value = Notes> {
    let entry = (any::<bool>(), 0u16..41, 0u16..41);
    let parts = (
        (0u16..41, 0u16..40, any::<bool>()),
        prop::collection::vec(entry, 40),
    );
    parts.prop_map(|(header, entries)| Notes { header, entries })
}

impl Notes {
    fn file(&self, size: u16) -> File {
        let len = file_bytes(true, 1, size).max(4096);
        let region = crate::vhost_user::memory::tests::region(0, 0, len);
        let mut bytes = vec![0; 32 + 32 * usize::from(size)];
        let (head, used, wrap) = self.header;
        let wrap = u16::from_le_bytes([wrap.into(); 2]);
        for (at, word) in [1, size, head, head, used, used, wrap].iter().enumerate() {
            bytes[8 + 2 * at..][..2].copy_from_slice(&word.to_le_bytes());
        }
        for (bytes, (inflight, next, num)) in bytes[32..].chunks_mut(32).zip(&self.entries) {
            bytes[0] = (*inflight).into();
            bytes[2..4].copy_from_slice(&next.to_le_bytes());
            bytes[6..8].copy_from_slice(&num.to_le_bytes());
        }
        let into = region.range(0, bytes.len() as u64).unwrap();
        // SAFETY: mapped, and so long.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into, bytes.len()) };
        File {
            region,
            index: 0,
            size,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Arbitrary descriptors, flags and notes: no panic, no address outside, a bounded walk, never more in flight than the ring has.
    #[test]
    fn nothing_escapes(
        size in 1u16..40,
        base in prop_oneof![Just(None), any::<u32>().prop_map(Some)],
        words in prop::collection::vec((super::hostile::address(), super::hostile::length(), any::<u16>()), 40),
        steps in prop::collection::vec((0u8..8, any::<u16>()), 1..60),
        indirect: bool,
        notes in prop::option::of(notes()),
    ) {
        let guest = Guest::new(size);
        let driver = Driver::new(&guest);
        for (i, (addr, len, flags)) in words.iter().enumerate() {
            driver.put(i as u16, (*addr, *len, *flags), *flags);
            let at = BUFFERS + 16 * i as u64;
            guest.put(at, &addr.to_le_bytes());
            guest.put(at + 8, &len.to_le_bytes());
        }
        let noted = notes.is_some();
        let place = Place {
            inflight: notes.map(|notes| notes.file(size)),
            ..guest.place(true, base)
        };
        let Ok(mut ring) = Packed::new(place) else {
            return Ok(());
        };
        let inside = |at: *mut u8, len: usize| {
            [(GUEST, GUEST_LEN), (GUEST + GUEST_LEN, 0x10000)].iter().any(|(start, size)| {
                let base = guest.memory.range(*start, *size).unwrap().addr();
                at.addr() >= base && at.addr() + len <= base + *size as usize
            })
        };
        let mut heads = Vec::new();
        let mut chain = Chain::new();
        for (step, number) in steps {
            match step {
                0..=3 => {
                    let Ok(entry) = ring.pop() else { return Ok(()) };
                    let Some(entry) = entry else { continue };
                    if noted {
                        // Nothing is noted while an answer waits to be shown.
                        ring.publish();
                    }
                    let Ok(head) = ring.walk(entry, &mut chain, indirect) else { return Ok(()) };
                    prop_assert!(chain.iov.len() <= DESCRIPTORS_MAX + REGIONS_MAX);
                    prop_assert!(chain.iov.iter().all(|v| inside(v.base(), v.len()) && v.len() > 0));
                    prop_assert!(chain.status.is_null() || inside(chain.status, 1));
                    heads.push(head);
                    let total: u16 = heads.iter().map(|head| head.count).sum();
                    prop_assert!(total <= size);
                }
                4 => if !heads.is_empty() {
                    let head = heads.swap_remove(usize::from(number) % heads.len());
                    ring.push(head, 1);
                },
                // A published chain's place is the driver's; until then it counts.
                5 => { ring.publish(); },
                6 => {
                    let index = number % size;
                    guest.put(DESCRIPTORS + 16 * u64::from(index) + 14, &words[usize::from(index)].2.rotate_left(u32::from(number % 16)).to_le_bytes());
                }
                _ => {
                    guest.put(DRIVER_EVENT, &[number as u8; 4]);
                    ring.disable_notify();
                    ring.enable_notify();
                }
            }
        }
    }
}
