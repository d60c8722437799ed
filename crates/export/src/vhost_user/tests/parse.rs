//! Chains that make sense become requests, however they are cut.

use super::*;
use crate::vhost_user::{
    chain::{Chain, Fault},
    request::{Limits, SEGMENTS_MAX, Segment, Task, parse},
    spec::{DESC_F_INDIRECT, Status, feature, request},
};
use block::{GuestOffset, Op};

pub const DISK_BYTES: u64 = 1 << 30;

pub fn limits() -> Limits {
    Limits {
        features: feature::DISCARD | feature::WRITE_ZEROES,
        disk_bytes: DISK_BYTES,
        discard_segments: 4,
        discard_sectors: 1 << 16,
        zeroes_segments: 2,
        zeroes_sectors: 1 << 10,
        id: *b"a serial of 20 bytes",
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// Walks and parses the chain at descriptor 0.
fn request_of(guest: &Guest, limits: &Limits) -> (Result<Task, Fault>, Chain, Vec<Segment>) {
    let ring = guest.ring(true);
    let mut chain = Chain::new();
    chain.walk_split(&ring, 0, true).unwrap();
    let mut segments = [Segment::default(); SEGMENTS_MAX];
    let task = parse(&mut chain, limits, &mut segments);
    (task, chain, segments.to_vec())
}

/// The guest addresses of the pieces of a task, merged where they touch.
fn memory_of(guest: &Guest, chain: &Chain, task: &Task) -> Vec<(u64, usize)> {
    let Task::Single { iov, .. } = task else {
        panic!("{task:?}")
    };
    let base = guest.memory.range(GUEST, 1).unwrap();
    let mut out: Vec<(u64, usize)> = Vec::new();
    for piece in &chain.iov[iov.clone()] {
        assert!(piece.len() > 0);
        let at = GUEST + (piece.base().addr() - base.addr()) as u64;
        match out.last_mut() {
            Some(last) if last.0 + last.1 as u64 == at => last.1 += piece.len(),
            _ => out.push((at, piece.len())),
        }
    }
    out
}

const OK: Task = Task::Answer {
    status: Status::Ok,
    written: 0,
};
const IOERR: Task = Task::Answer {
    status: Status::IoErr,
    written: 0,
};
const UNSUPP: Task = Task::Answer {
    status: Status::Unsupp,
    written: 0,
};

#[test]
fn a_request_may_be_cut_anywhere() {
    let guest = Guest::new(64);
    // Header, data and status lie one after the other; descriptors cut them at all pairs of places.
    guest.put(BUFFERS, &header(request::OUT, 3));
    for first in 1..=16 + 1024u32 {
        for second in [1, 7, 16, 512] {
            let mut pieces = vec![(BUFFERS, first, false)];
            let mut at = first;
            while at < 16 + 1024 && pieces.len() < 60 {
                let len = if pieces.len() == 59 { u32::MAX } else { second };
                let len = len.min(16 + 1024 - at);
                pieces.push((BUFFERS + u64::from(at), len, false));
                at += len;
            }
            pieces.push((BUFFERS + 0x8000, 1, true));
            guest.chain(&pieces);
            let (task, chain, _) = request_of(&guest, &limits());
            let task = task.unwrap();
            let Task::Single { op, at, len, .. } = task else {
                panic!("{first} {second}: {task:?}")
            };
            assert_eq!(
                (op, at, len),
                (Op::Write { fua: false }, GuestOffset(1536), 1024)
            );
            assert_eq!(memory_of(&guest, &chain, &task), [(BUFFERS + 16, 1024)]);
        }
    }
}

#[test]
fn the_status_is_the_last_writable_byte() {
    let guest = Guest::new(16);
    guest.put(BUFFERS, &header(request::IN, 8));
    let data = BUFFERS + 0x1000;
    for cuts in [
        &[(data, 513u32)][..],
        &[(data, 512), (data + 512, 1)],
        &[(data, 511), (data + 511, 2)],
        &[(data, 1), (data + 1, 511), (data + 512, 1)],
    ] {
        let mut pieces = vec![(BUFFERS, 16, false)];
        pieces.extend(cuts.iter().map(|(at, len)| (*at, *len, true)));
        guest.chain(&pieces);
        let (task, chain, _) = request_of(&guest, &limits());
        let task = task.unwrap();
        assert!(
            matches!(
                task,
                Task::Single {
                    op: Op::Read,
                    at: GuestOffset(4096),
                    len: 512,
                    ..
                }
            ),
            "{task:?}"
        );
        assert_eq!(memory_of(&guest, &chain, &task), [(data, 512)]);
        assert_eq!(chain.status, guest.memory.range(data + 512, 1).unwrap());
    }
}

#[test]
fn simple_requests_are_judged() {
    let data = BUFFERS + 0x1000;
    let status = BUFFERS + 0x8000;
    for (what, kind, sector, out_len, in_len, expected) in [
        ("read of half a sector", request::IN, 0, 0, 256, IOERR),
        ("write of half a sector", request::OUT, 0, 256, 0, IOERR),
        (
            "sector times 512 does not fit",
            request::IN,
            u64::MAX / 512 + 1,
            0,
            512,
            IOERR,
        ),
        ("empty read", request::IN, 0, 0, 0, OK),
        ("unknown", 77, 0, 0, 0, UNSUPP),
        ("SCSI command", 2, 0, 0, 512, UNSUPP),
        ("lifetime", 10, 0, 0, 512, UNSUPP),
        ("secure erase", 14, 0, 16, 0, UNSUPP),
        ("barrier flag of old", 0x8000_0000, 0, 0, 512, UNSUPP),
        ("discard of no segment", request::DISCARD, 0, 0, 0, IOERR),
        (
            "discard of half a segment",
            request::DISCARD,
            0,
            24,
            0,
            IOERR,
        ),
        ("discard of too many", request::DISCARD, 0, 80, 0, IOERR),
        ("zeroes of too many", request::WRITE_ZEROES, 0, 48, 0, IOERR),
    ] {
        let guest = Guest::new(16);
        guest.put(BUFFERS, &header(kind, sector));
        let mut pieces = vec![(BUFFERS, 16, false)];
        if out_len > 0 {
            pieces.push((data, out_len, false));
        }
        if in_len > 0 {
            pieces.push((data, in_len, true));
        }
        pieces.push((status, 1, true));
        guest.chain(&pieces);
        assert_eq!(request_of(&guest, &limits()).0, Ok(expected), "{what}");
    }
}

#[test]
fn flush_has_no_range() {
    let guest = Guest::new(16);
    guest.put(BUFFERS, &header(request::FLUSH, 12345));
    guest.chain(&[(BUFFERS, 16, false), (BUFFERS + 64, 1, true)]);
    let (task, ..) = request_of(&guest, &limits());
    let expected = Task::Single {
        op: Op::Flush,
        at: GuestOffset(0),
        len: 0,
        iov: 0..0,
    };
    assert_eq!(task, Ok(expected));
}

#[test]
fn the_serial_number_fills_what_there_is() {
    let guest = Guest::new(16);
    guest.put(BUFFERS, &header(request::GET_ID, 0));
    let data = BUFFERS + 0x1000;
    for (len, written) in [(20, 20), (8, 8), (64, 20)] {
        guest.put(data, &[0xee; 64]);
        guest.chain(&[
            (BUFFERS, 16, false),
            (data, 3, true),
            (data + 3, len - 3, true),
            (BUFFERS + 64, 1, true),
        ]);
        let (task, ..) = request_of(&guest, &limits());
        let status = Status::Ok;
        assert_eq!(task, Ok(Task::Answer { status, written }));
        let got: [u8; 64] = guest.get(data);
        let count = written as usize;
        assert_eq!(got[..count], b"a serial of 20 bytes"[..count]);
        assert!(got[count..].iter().all(|b| *b == 0xee));
    }
}

#[test]
fn segments_are_judged_before_any_is_used() {
    let sectors = DISK_BYTES / 512;
    let good = segment(8, 8, 0);
    for (what, kind, list, expected) in [
        ("one", request::DISCARD, vec![good], None),
        ("four", request::DISCARD, vec![good; 4], None),
        (
            "nothing at the end",
            request::DISCARD,
            vec![segment(sectors, 0, 0)],
            None,
        ),
        (
            "up to the end",
            request::DISCARD,
            vec![segment(sectors - 8, 8, 0)],
            None,
        ),
        (
            "over the end",
            request::DISCARD,
            vec![good, segment(sectors - 7, 8, 0)],
            Some(IOERR),
        ),
        (
            "far away",
            request::DISCARD,
            vec![segment(u64::MAX, 8, 0)],
            Some(IOERR),
        ),
        (
            "wraps",
            request::DISCARD,
            vec![segment(u64::MAX / 512, 0xffff, 0)],
            Some(IOERR),
        ),
        (
            "too long",
            request::DISCARD,
            vec![segment(0, (1 << 16) + 1, 0)],
            Some(IOERR),
        ),
        (
            "discard and unmap",
            request::DISCARD,
            vec![segment(0, 8, 1)],
            Some(UNSUPP),
        ),
        (
            "discard and unknown",
            request::DISCARD,
            vec![segment(0, 8, 2)],
            Some(UNSUPP),
        ),
        (
            "zeroes",
            request::WRITE_ZEROES,
            vec![segment(0, 8, 0), segment(8, 8, 1)],
            None,
        ),
        (
            "zeroes and unknown",
            request::WRITE_ZEROES,
            vec![segment(0, 8, 3)],
            Some(UNSUPP),
        ),
        (
            "zeroes, too long",
            request::WRITE_ZEROES,
            vec![segment(0, 1025, 0)],
            Some(IOERR),
        ),
    ] {
        let guest = Guest::new(16);
        guest.put(BUFFERS, &header(kind, 0));
        let bytes = list.concat();
        guest.put(BUFFERS + 16, &bytes);
        let len = bytes.len() as u32;
        // The cut goes through the first segment.
        guest.chain(&[
            (BUFFERS, 16 + 5, false),
            (BUFFERS + 21, len - 5, false),
            (BUFFERS + 0x8000, 1, true),
        ]);
        let (task, _, segments) = request_of(&guest, &limits());
        let discard = kind == request::DISCARD;
        let count = list.len();
        assert_eq!(
            task,
            Ok(expected
                .clone()
                .unwrap_or(Task::Segments { discard, count })),
            "{what}"
        );
        if expected.is_none() && what == "zeroes" {
            let expected = [(0, 4096, false), (4096, 4096, true)].map(|(at, len, unmap)| Segment {
                at,
                len,
                unmap,
            });
            assert_eq!(segments[..2], expected);
        }
    }
}

#[test]
fn commands_that_were_not_negotiated_are_unsupported() {
    let guest = Guest::new(16);
    guest.put(BUFFERS, &header(request::DISCARD, 0));
    guest.put(BUFFERS + 16, &segment(0, 8, 0));
    guest.chain(&[(BUFFERS, 32, false), (BUFFERS + 64, 1, true)]);
    let without = Limits {
        features: feature::WRITE_ZEROES,
        ..limits()
    };
    assert_eq!(request_of(&guest, &without).0, Ok(UNSUPP));
}

#[test]
fn what_can_be_answered_is_answered_and_the_rest_is_not() {
    let status = (BUFFERS + 0x8000, 1, true);
    let gone = GUEST - 0x1000;
    for (what, pieces, expected) in [
        ("no header", vec![status], Ok(IOERR)),
        (
            "short header",
            vec![(BUFFERS, 15, false), status],
            Ok(IOERR),
        ),
        (
            "empty buffer",
            vec![(BUFFERS, 16, false), (BUFFERS, 0, true), status],
            Ok(IOERR),
        ),
        (
            "header in no memory",
            vec![(gone, 16, false), status],
            Ok(IOERR),
        ),
        (
            "data in no memory",
            vec![(BUFFERS, 16, false), (gone, 512, true), status],
            Ok(IOERR),
        ),
        (
            "data partly in no memory",
            vec![(BUFFERS, 16, false), (gone + 0xe00, 1024, true), status],
            Ok(IOERR),
        ),
        (
            "wrong order",
            vec![(BUFFERS, 16, false), status, (BUFFERS, 512, false)],
            Ok(IOERR),
        ),
        (
            "nothing writable",
            vec![(BUFFERS, 16, false)],
            Err(Fault::Status),
        ),
        (
            "status in no memory",
            vec![(BUFFERS, 16, false), (gone, 1, true)],
            Err(Fault::Status),
        ),
        (
            "an empty writable buffer only",
            vec![(BUFFERS, 16, false), (BUFFERS, 0, true)],
            Err(Fault::Status),
        ),
    ] {
        let guest = Guest::new(16);
        guest.put(BUFFERS, &header(request::IN, 0));
        guest.chain(&pieces);
        assert_eq!(request_of(&guest, &limits()).0, expected, "{what}");
    }
}

#[test]
fn buffers_may_span_regions() {
    let guest = Guest::new(16);
    guest.put(BUFFERS, &header(request::IN, 0));
    let data = GUEST + GUEST_LEN - 4096;
    guest.chain(&[
        (BUFFERS, 16, false),
        (data, 8192, true),
        (BUFFERS + 64, 1, true),
    ]);
    let (task, chain, _) = request_of(&guest, &limits());
    let Ok(Task::Single { iov, len: 8192, .. }) = task else {
        panic!("{task:?}")
    };
    let lens: Vec<_> = chain.iov[iov].iter().map(|v| v.len()).collect();
    assert_eq!(lens, [4096, 4096]);
}

#[test]
fn faults_in_the_shape_break_the_queue() {
    let table = BUFFERS + 0x4000;
    let next = DESC_F_NEXT;
    let indirect = DESC_F_INDIRECT;
    let gone = GUEST - 0x1000;
    for (what, direct, nested, head, expected) in [
        ("head beyond the table", vec![], vec![], 8, Fault::Index(8)),
        (
            "next beyond the table",
            vec![(BUFFERS, 16, next, 8)],
            vec![],
            0,
            Fault::Index(8),
        ),
        (
            "loop on itself",
            vec![(BUFFERS, 16, next, 0)],
            vec![],
            0,
            Fault::Endless,
        ),
        (
            "loop of two",
            vec![(BUFFERS, 16, next, 1), (BUFFERS, 16, next, 0)],
            vec![],
            1,
            Fault::Endless,
        ),
        (
            "empty table",
            vec![(table, 0, indirect, 0)],
            vec![],
            0,
            Fault::Indirect,
        ),
        (
            "odd table",
            vec![(table, 24, indirect, 0)],
            vec![],
            0,
            Fault::Indirect,
        ),
        (
            "table in no memory",
            vec![(gone, 16, indirect, 0)],
            vec![],
            0,
            Fault::Indirect,
        ),
        (
            "huge table",
            vec![(table, 0xffff_fff0, indirect, 0)],
            vec![],
            0,
            Fault::Indirect,
        ),
        (
            "table with next",
            vec![
                (table, 32, indirect | next, 1),
                (BUFFERS, 1, DESC_F_WRITE, 0),
            ],
            vec![(BUFFERS, 16, 0, 0)],
            0,
            Fault::Indirect,
        ),
        (
            "table in a table",
            vec![(table, 32, indirect, 0)],
            vec![(table, 32, indirect, 0)],
            0,
            Fault::Indirect,
        ),
        (
            "next beyond the indirect table",
            vec![(table, 32, indirect, 0)],
            vec![(BUFFERS, 16, next, 2)],
            0,
            Fault::Index(2),
        ),
        (
            "loop in the indirect table",
            vec![(table, 32, indirect, 0)],
            vec![(BUFFERS, 16, next, 1), (BUFFERS, 16, next, 0)],
            0,
            Fault::Endless,
        ),
    ] {
        let guest = Guest::new(8);
        guest.table(DESCRIPTORS, &direct);
        guest.table(table, &nested);
        let mut chain = Chain::new();
        assert_eq!(
            chain.walk_split(&guest.ring(true), head, true),
            Err(expected),
            "{what}"
        );
    }
}

#[test]
fn indirect_tables_are_followed_when_negotiated() {
    let table = BUFFERS + 0x4001; // of any alignment
    let guest = Guest::new(8);
    guest.put(BUFFERS, &header(request::IN, 0));
    guest.table(
        DESCRIPTORS,
        &[
            (BUFFERS, 16, DESC_F_NEXT, 1),
            (table, 48, DESC_F_INDIRECT, 0),
        ],
    );
    guest.table(
        table,
        &[
            (BUFFERS + 0x1000, 512, DESC_F_WRITE | DESC_F_NEXT, 2),
            (0, 0, 0, 0),
            (BUFFERS + 0x2000, 1, DESC_F_WRITE, 0),
        ],
    );
    let ring = guest.ring(true);
    let mut chain = Chain::new();
    chain.walk_split(&ring, 0, true).unwrap();
    assert_eq!((chain.readable_len, chain.writable_len), (16, 513));
    assert!(!chain.malformed);
    assert_eq!(chain.walk_split(&ring, 0, false), Err(Fault::Indirect));
}
