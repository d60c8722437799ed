//! Storms of requests, sensible and not, in any pieces and with any order at the disk.

use super::{
    tests::{SIZE, pattern, request, rig},
    *,
};
use disk::StatusExtent;
use nbd::proto::{SIMPLE_REPLY_MAGIC, Style, chunk, cmd, cmd_flag};
use proptest::prelude::*;
use std::io::{ErrorKind, Write};

/// Takes the replies apart: for each its cookie, whether it is an error, and its data.
fn split_replies(style: Style, mut bytes: &[u8], lens: &[u64]) -> Vec<(u64, bool, Vec<u8>)> {
    let mut list = Vec::new();
    while !bytes.is_empty() {
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        let cookie = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
        if word(0) == SIMPLE_REPLY_MAGIC {
            assert!(style < Style::Extended);
            let error = word(4) != 0;
            let len = if style == Style::Simple && !error {
                lens[cookie as usize] as usize
            } else {
                0
            };
            list.push((cookie, error, bytes[16..16 + len].to_vec()));
            bytes = &bytes[16 + len..];
        } else {
            let (head, len) = if style == Style::Extended {
                assert_eq!(word(24), 0);
                (32, word(28) as usize)
            } else {
                (20, word(16) as usize)
            };
            let kind = u16::from_be_bytes([bytes[6], bytes[7]]);
            let payload = &bytes[head..head + len];
            let data = if kind == chunk::OFFSET_DATA {
                payload[8..].to_vec()
            } else {
                Vec::new()
            };
            list.push((cookie, kind >= 1 << 15, data));
            bytes = &bytes[head + len..];
        }
    }
    list
}

/// One request of a storm: kind, flags, offset and length (in units that make ends and odd bytes likely).
fn any_request() -> impl Strategy<Value = (u16, u16, u64, u64)> {
    let offset = prop_oneof![0..SIZE, Just(SIZE), Just(SIZE - 1), any::<u64>()];
    let len = prop_oneof![0u64..20_000, 0u64..300_000, 0u64..3];
    let flags = prop_oneof![4 => Just(0u16), 1 => 0u16..64];
    (0u16..9, flags, offset, len).prop_filter("no disconnect", |(kind, ..)| *kind != cmd::DISC)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is asked, in whatever pieces, answered by the disk in whatever order: each request has
    /// exactly one reply, and reads have their bytes.
    #[test]
    fn every_request_has_its_reply(
        requests in proptest::collection::vec(any_request(), 1..60),
        pieces in proptest::collection::vec(1usize..100_000, 1..20),
        order in proptest::collection::vec(any::<bool>(), 1..20),
        style in 0usize..3,
        table in 1usize..9,
    ) {
        let style = [Style::Simple, Style::Structured, Style::Extended][style];
        let mut rig = rig(style);
        rig.disk.table = table;
        rig.disk.extents = vec![StatusExtent { len: 1, allocated: true, zero: false }];
        let (mut stream, mut lens) = (Vec::new(), Vec::new());
        for (cookie, (kind, flags, at, len)) in requests.iter().enumerate() {
            let mut flags = *flags;
            // Zeroing would change what reads return.
            let kind = if matches!(*kind, cmd::WRITE_ZEROES) { cmd::READ } else { *kind };
            if style == Style::Extended && kind == cmd::WRITE {
                flags |= cmd_flag::PAYLOAD_LEN;
            }
            stream.extend(request(style, kind, flags, cookie as u64, *at, *len));
            let extended = style == Style::Extended && flags & cmd_flag::PAYLOAD_LEN != 0;
            if kind == cmd::WRITE || extended {
                // The same bytes that are there, so that what reads return is known.
                let range = usize::try_from(*at).ok().and_then(|at| Some(at..at.checked_add(*len as usize)?));
                match range.and_then(|range| pattern().get(range)) {
                    Some(bytes) => stream.extend(bytes),
                    None => stream.resize(stream.len() + *len as usize, 0),
                }
            }
            lens.push(if kind == cmd::READ { *len } else { 0 });
        }
        let mut bytes = Vec::new();
        let mut rest = &stream[..];
        let (mut pieces, mut order) = (pieces.iter().cycle(), order.iter().cycle());
        let mut quiet = 0;
        while quiet < 2 {
            let piece = &rest[..rest.len().min(*pieces.next().unwrap())];
            let sent = match rig.client.write(piece) {
                Ok(sent) => sent,
                Err(error) => {
                    prop_assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    0
                }
            };
            rest = &rest[sent..];
            rig.turn();
            prop_assert!(rig.disk.held.len() <= table);
            if !rig.disk.held.is_empty() {
                rig.disk.answer(*order.next().unwrap());
            }
            let got = rig.take();
            let idle = got.is_empty() && rest.is_empty() && rig.disk.held.is_empty();
            quiet = if idle { quiet + 1 } else { 0 };
            bytes.extend(got);
        }
        let mut replies = split_replies(style, &bytes, &lens);
        replies.sort_by_key(|reply| reply.0);
        let cookies: Vec<u64> = replies.iter().map(|reply| reply.0).collect();
        prop_assert_eq!(cookies, (0..requests.len() as u64).collect::<Vec<_>>());
        for (cookie, error, data) in replies {
            let (at, len) = (requests[cookie as usize].2, lens[cookie as usize]);
            if len > 0 && !error {
                prop_assert_eq!(&data[..], &rig.disk.bytes[at as usize..(at + len) as usize]);
            }
        }
        prop_assert_eq!(rig.connection.free.len(), usize::from(DEPTH));
        prop_assert!(rig.connection.pool.fits(32 << 20));
        prop_assert_eq!(rig.connection.state, State::Open);
    }

    /// Bytes without sense end the connection or wait for more; nothing is held.
    #[test]
    fn any_bytes_are_survived(
        parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..200), 1..20),
        start in 0usize..3,
        style in 0usize..3,
    ) {
        let style = [Style::Simple, Style::Structured, Style::Extended][style];
        let mut rig = rig(style);
        if start > 0 {
            rig.send(cmd::WRITE, 0, 1, 0, if start == 1 { 100 } else { u64::from(u32::MAX) });
        }
        for part in &parts {
            if rig.connection.is_open() {
                rig.client.write_all(part).unwrap();
            }
            rig.turn();
            rig.disk.answer_all();
            rig.take();
        }
        rig.client.shutdown(std::net::Shutdown::Both).unwrap();
        rig.turn();
        rig.disk.answer_all();
        rig.turn();
        prop_assert!(rig.connection.finished());
    }
}
