//! A connection over a socket pair, and a disk in memory that answers when it is told to.

use super::*;
use block::{GuestError, GuestOffset, IoVec, Op};
use disk::{Done, Request, StatusExtent};
use nbd::proto::{
    EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, Style,
    chunk, cmd, cmd_flag,
};
use std::{
    io::{ErrorKind, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::OnceLock,
};

pub(super) const SIZE: u64 = 34 << 20;

/// Bytes of a disk, and what happened to it.
#[derive(Default)]
pub(super) struct Fake {
    pub(super) bytes: Vec<u8>,
    /// Requests that are not answered yet, oldest first.
    pub(super) held: VecDeque<(u64, Held)>,
    pub(super) done: VecDeque<Done>,
    pub(super) status: Vec<(u64, Vec<StatusExtent>)>,
    /// What status queries are told.
    pub(super) extents: Vec<StatusExtent>,
    pub(super) ops: Vec<Op>,
    pub(super) fail: Option<GuestError>,
    /// Requests that are held at most; more are refused.
    pub(super) table: usize,
    /// What was asked of block status: first byte, length.
    asked: Vec<(u64, u64)>,
    /// At each push, how many requests were held.
    pushed: Vec<usize>,
}

/// Each sector is full of its number, modulo 251, plus one.
pub(super) fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let part: Vec<u8> = (1..=251u8).flat_map(|value| [value; 512]).collect();
        let mut bytes = part.repeat(SIZE as usize / part.len() + 1);
        bytes.truncate(SIZE as usize);
        bytes
    })
}

pub(super) enum Held {
    Io(Op, u64, u64, IoVec),
    Status(usize),
}

impl Fake {
    fn new() -> Self {
        Self {
            bytes: pattern().to_vec(),
            table: usize::MAX,
            ..Self::default()
        }
    }

    /// Answers the newest (or oldest) request.
    pub(super) fn answer(&mut self, newest: bool) {
        let next = if newest {
            self.held.pop_back()
        } else {
            self.held.pop_front()
        };
        let (tag, held) = next.expect("a request is held");
        let result = self.fail.map_or(Ok(()), Err);
        match held {
            Held::Status(max) => {
                let extents = self.extents.iter().copied().take(max).collect();
                self.status.push((tag, extents));
            }
            Held::Io(op, at, len, piece) if result.is_ok() => {
                let range = at as usize..(at + len) as usize;
                match op {
                    // SAFETY: the connection lends the memory until `done` is taken.
                    Op::Read => unsafe {
                        let from = self.bytes[range].as_ptr();
                        std::ptr::copy_nonoverlapping(from, piece.base(), piece.len());
                    },
                    // SAFETY: as above.
                    Op::Write { .. } => unsafe {
                        let to = self.bytes[range].as_mut_ptr();
                        std::ptr::copy_nonoverlapping(piece.base(), to, piece.len());
                    },
                    Op::WriteZeroes { .. } => self.bytes[range].fill(0),
                    Op::Flush | Op::Discard => {}
                }
            }
            Held::Io(..) => {}
        }
        self.done.push_back(Done { tag, result });
    }

    pub(super) fn answer_all(&mut self) {
        while !self.held.is_empty() {
            self.answer(false);
        }
    }
}

impl Backend for Fake {
    unsafe fn submit(&mut self, request: Request) -> Result<(), Request> {
        if self.held.len() >= self.table {
            return Err(request);
        }
        let piece = if request.iov_len == 1 {
            // SAFETY: one piece, valid until the request's end.
            unsafe { *request.iov }
        } else {
            IoVec::new(std::ptr::null_mut(), 0)
        };
        self.ops.push(request.op);
        let io = Held::Io(request.op, request.at.0, request.len, piece);
        self.held.push_back((request.tag, io));
        Ok(())
    }

    fn block_status(&mut self, at: GuestOffset, len: u64, max: usize, tag: u64) -> bool {
        if self.held.len() >= self.table {
            return false;
        }
        assert!(len > 0 && at.0 + len <= SIZE);
        self.asked.push((at.0, len));
        self.held.push_back((tag, Held::Status(max)));
        true
    }

    fn done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    fn take_status(&mut self, tag: u64) -> Vec<StatusExtent> {
        let index = self.status.iter().position(|(t, _)| *t == tag);
        self.status.swap_remove(index.expect("an answer")).1
    }

    fn push(&mut self) {
        self.pushed.push(self.held.len());
    }
}

pub(super) struct Rig {
    pub(super) connection: Connection,
    pub(super) disk: Fake,
    pub(super) server: UnixStream,
    pub(super) client: UnixStream,
    pub(super) style: Style,
}

pub(super) fn rig(style: Style) -> Rig {
    rig_after(style, &[])
}

fn rig_after(style: Style, early: &[u8]) -> Rig {
    let (server, client) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    client.set_nonblocking(true).unwrap();
    let limits = Limits {
        size: SIZE,
        read_only: false,
        trim: true,
        style,
        allocation: style > Style::Simple,
    };
    Rig {
        connection: Connection::new(limits, early),
        disk: Fake::new(),
        server,
        client,
        style,
    }
}

pub(super) fn request(
    style: Style,
    kind: u16,
    flags: u16,
    cookie: u64,
    at: u64,
    len: u64,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let extended = style == Style::Extended;
    let magic = if extended {
        EXTENDED_REQUEST_MAGIC
    } else {
        REQUEST_MAGIC
    };
    bytes.extend(magic.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(at.to_be_bytes());
    if extended {
        bytes.extend(len.to_be_bytes());
    } else {
        bytes.extend((len as u32).to_be_bytes());
    }
    bytes
}

impl Rig {
    /// One turn of a worker, with the events that the socket would have reported.
    pub(super) fn turn(&mut self) {
        self.connection.readable();
        self.connection.writable();
        loop {
            let fd = self.server.as_fd();
            self.connection.deliver_first(&mut self.disk, fd);
            self.connection.receive(&mut self.disk, fd);
            self.connection.deliver_last(&mut self.disk, fd);
            if !self.connection.has_work() {
                break;
            }
        }
    }

    pub(super) fn send(&mut self, kind: u16, flags: u16, cookie: u64, at: u64, len: u64) {
        let bytes = request(self.style, kind, flags, cookie, at, len);
        self.client.write_all(&bytes).unwrap();
    }

    /// Sends all of `bytes`, with turns of the server in between.
    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.client.write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            self.turn();
        }
    }

    /// All that the server sent by now.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut part = vec![0; 1 << 20];
        loop {
            self.turn();
            match self.client.read(&mut part) {
                Ok(0) => return all,
                Ok(len) => all.extend(&part[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return all,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn answer_and_take(&mut self) -> Vec<u8> {
        self.turn();
        self.disk.answer_all();
        self.take()
    }
}

fn simple(errno: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(errno.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

/// Type and payload of a structured reply with one chunk.
fn chunk_of(bytes: &[u8], cookie: u64) -> (u16, &[u8]) {
    assert_eq!(bytes[..4], STRUCTURED_REPLY_MAGIC.to_be_bytes());
    assert_eq!(bytes[4..6], [0, 1], "done");
    assert_eq!(bytes[8..16], cookie.to_be_bytes());
    let len = u32::from_be_bytes(bytes[16..20].try_into().unwrap());
    assert_eq!(bytes.len(), 20 + len as usize);
    (u16::from_be_bytes([bytes[6], bytes[7]]), &bytes[20..])
}

#[test]
fn reads_and_writes_in_order_of_completion() {
    let mut rig = rig(Style::Simple);
    rig.send(cmd::READ, 0, 1, 512, 1024);
    let mut write = request(Style::Simple, cmd::WRITE, 0, 2, 5, 3);
    write.extend(b"abc");
    rig.push(&write);
    rig.turn();
    assert_eq!(rig.disk.held.len(), 2);
    rig.disk.answer(true);
    assert_eq!(rig.take(), simple(0, 2));
    assert_eq!(rig.disk.bytes[4..9], *b"\x01abc\x01");
    rig.disk.answer(true);
    let reply = rig.take();
    assert_eq!(reply[..16], simple(0, 1));
    assert_eq!(reply[16..], rig.disk.bytes[512..1536]);
}

#[test]
fn requests_in_any_pieces_are_the_same() {
    let mut stream = request(Style::Simple, cmd::WRITE, 0, 1, 0, 5000);
    stream.extend([7; 5000]);
    stream.extend(request(Style::Simple, cmd::WRITE, 0, 2, SIZE, 100));
    stream.extend([8; 100]);
    // The shortest payload that is skipped.
    stream.extend(request(Style::Simple, cmd::WRITE, 0, 4, SIZE, 1));
    stream.push(8);
    stream.extend(request(Style::Simple, cmd::FLUSH, 0, 3, 0, 0));
    for piece in [1, 7, 28, 29, 4096, 10_000] {
        // The first piece arrives with the handshake.
        let (early, rest) = stream.split_at(piece.min(stream.len()));
        let mut rig = rig_after(Style::Simple, early);
        for part in rest.chunks(piece) {
            rig.push(part);
        }
        let replies = rig.answer_and_take();
        let expected = [simple(28, 2), simple(28, 4), simple(0, 1), simple(0, 3)].concat();
        assert_eq!(replies, expected, "pieces of {piece}");
        assert_eq!(
            rig.disk.bytes[4990..5001],
            [[7; 10].as_slice(), &[10]].concat()
        );
    }
}

#[test]
fn large_payloads_go_both_ways() {
    for (style, flags) in [(Style::Simple, 0), (Style::Extended, cmd_flag::PAYLOAD_LEN)] {
        let mut rig = rig(style);
        let len: usize = 32 << 20;
        let data = [&pattern()[512..len], &[9; 512]].concat();
        for cookie in [1, 2] {
            rig.push(&request(
                style,
                cmd::WRITE,
                flags,
                cookie,
                1 << 20,
                len as u64,
            ));
            rig.push(&data);
            rig.disk.answer_all();
            rig.turn();
        }
        assert!(!rig.take().is_empty());
        assert_eq!(rig.disk.bytes[1 << 20..][..len], data);
        rig.send(
            cmd::READ,
            cmd_flag::DF * u16::from(style > Style::Simple),
            3,
            1 << 20,
            len as u64,
        );
        let reply = rig.answer_and_take();
        assert_eq!(reply[reply.len() - len..], data);
    }
}

#[test]
fn errors_reach_their_request_only() {
    let mut rig = rig(Style::Structured);
    rig.send(cmd::READ, 0, 1, SIZE - 1, 2);
    let reply = rig.take();
    let (kind, payload) = chunk_of(&reply, 1);
    assert_eq!(kind, chunk::ERROR_OFFSET);
    assert_eq!(payload[..4], [0, 0, 0, 22]);
    assert_eq!(payload[payload.len() - 8..], SIZE.to_be_bytes());

    rig.disk.fail = Some(GuestError::NoSpace);
    let mut write = request(Style::Structured, cmd::WRITE, 0, 2, 0, 4);
    write.extend([0; 4]);
    rig.push(&write);
    let reply = rig.answer_and_take();
    let (kind, payload) = chunk_of(&reply, 2);
    assert_eq!((kind, &payload[..4]), (chunk::ERROR, &[0, 0, 0, 28][..]));

    rig.disk.fail = None;
    rig.send(cmd::READ, 0, 3, 0, 512);
    let reply = rig.answer_and_take();
    assert_eq!(chunk_of(&reply, 3).0, chunk::OFFSET_DATA);
}

#[test]
fn a_fast_zero_that_is_not_fast_is_not_supported() {
    let mut rig = rig(Style::Simple);
    rig.disk.fail = Some(GuestError::Unsupported);
    rig.send(cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 1, 0, 4096);
    assert_eq!(rig.answer_and_take(), simple(95, 1));
    rig.send(cmd::WRITE_ZEROES, 0, 2, 0, 4096);
    assert_eq!(
        rig.answer_and_take(),
        simple(5, 2),
        "never without the flag"
    );
}

#[test]
fn a_trim_with_fua_is_flushed() {
    let mut rig = rig(Style::Simple);
    rig.send(cmd::TRIM, cmd_flag::FUA, 1, 0, 4096);
    rig.turn();
    rig.disk.answer(false);
    assert_eq!(rig.take(), [0u8; 0], "not before the flush");
    rig.disk.answer(false);
    assert_eq!(rig.take(), simple(0, 1));
    assert_eq!(rig.disk.ops, [Op::Discard, Op::Flush]);
}

#[test]
fn reads_of_data_that_is_known_ask_nothing() {
    let mut rig = rig(Style::Structured);
    let data = |blocks| StatusExtent {
        len: blocks * PROBE_BYTES,
        allocated: true,
        zero: false,
    };
    let mut read = |block: u64, known| {
        rig.disk.extents = vec![data(known)];
        rig.send(cmd::READ, 0, 1, block * PROBE_BYTES, PROBE_BYTES);
        rig.turn();
        if rig
            .disk
            .held
            .iter()
            .any(|(_, held)| matches!(held, Held::Status(_)))
        {
            rig.disk.answer(false);
        }
        let reply = rig.answer_and_take();
        assert_eq!(chunk_of(&reply, 1).0, chunk::OFFSET_DATA);
        let from = (block * PROBE_BYTES) as usize;
        assert_eq!(
            chunk_of(&reply, 1).1[8..],
            rig.disk.bytes[from..][..PROBE_BYTES as usize]
        );
        std::mem::take(&mut rig.disk.asked)
    };
    // What follows known data asks for more, what lies in it for nothing, what lies elsewhere for itself.
    let all = SIZE - PROBE_BYTES;
    assert_eq!(read(0, 1), [(0, PROBE_BYTES)]);
    assert_eq!(read(1, 2), [(PROBE_BYTES, all.min(PROBE_AHEAD))]);
    assert_eq!(read(2, 1), []);
    assert_eq!(read(1, 1), []);
    assert_eq!(read(5, 1), [(5 * PROBE_BYTES, PROBE_BYTES)]);
    // There may be a hole now.
    rig.send(cmd::TRIM, 0, 2, 0, 4096);
    rig.answer_and_take();
    rig.disk.extents = vec![StatusExtent {
        zero: true,
        allocated: false,
        ..data(1)
    }];
    rig.send(cmd::READ, 0, 3, 5 * PROBE_BYTES, PROBE_BYTES);
    rig.turn();
    rig.disk.answer(false);
    assert_eq!(chunk_of(&rig.take(), 3).0, chunk::OFFSET_HOLE);
}

#[test]
fn the_device_works_while_long_replies_are_copied() {
    let mut rig = rig(Style::Simple);
    rustix::net::sockopt::set_socket_send_buffer_size(&rig.server, 4 << 20).unwrap();
    let long = LONG_BYTES as u64;
    for cookie in 1..=6 {
        rig.send(cmd::READ, 0, cookie, 0, long);
    }
    rig.turn();
    rig.disk.answer_all();
    rig.send(cmd::READ, 0, 7, 0, 4096);
    let fd = rig.server.as_fd();
    rig.connection.readable();
    assert!(rig.connection.deliver_first(&mut rig.disk, fd));
    assert_eq!(rig.connection.replies.len(), 6, "nothing was sent yet");
    assert!(rig.connection.receive(&mut rig.disk, fd));
    rig.connection.deliver_last(&mut rig.disk, fd);
    assert_eq!(rig.disk.pushed, [1], "the new request went before");
    // And not all of them at once: what the device ends meanwhile has its turn.
    assert_eq!(rig.connection.replies.len(), 6 - SEND_BYTES / LONG_BYTES);
    assert!(rig.connection.has_work());
    rig.disk.answer_all();
    let mut sent = rig.take();
    for _ in 0..5 {
        sent.extend(rig.take());
    }
    assert_eq!(sent.len() as u64, 6 * (long + 16) + 4096 + 16);
    // Short ones are sent at once, and nothing is pushed for them.
    rig.disk.pushed.clear();
    rig.send(cmd::READ, 0, 8, 0, 4096);
    assert_eq!(rig.answer_and_take().len(), 4096 + 16);
    assert!(rig.disk.pushed.is_empty());
}

#[test]
fn a_read_of_zeros_is_a_hole() {
    let hole = StatusExtent {
        len: PROBE_BYTES,
        allocated: false,
        zero: true,
    };
    for (extents, flags, expected) in [
        (vec![hole], 0, chunk::OFFSET_HOLE),
        (vec![hole], cmd_flag::DF, chunk::OFFSET_DATA),
        (
            vec![StatusExtent { len: 512, ..hole }],
            0,
            chunk::OFFSET_DATA,
        ),
        (
            vec![StatusExtent {
                zero: false,
                ..hole
            }],
            0,
            chunk::OFFSET_DATA,
        ),
        (vec![], 0, chunk::OFFSET_DATA),
    ] {
        let mut rig = rig(Style::Structured);
        rig.disk.extents = extents;
        rig.send(cmd::READ, flags, 1, 4096, PROBE_BYTES);
        rig.turn();
        rig.disk.answer(false);
        let reply = rig.answer_and_take();
        let (kind, payload) = chunk_of(&reply, 1);
        assert_eq!(kind, expected);
        assert_eq!(payload[..8], 4096u64.to_be_bytes());
        if kind == chunk::OFFSET_HOLE {
            assert_eq!(payload[8..], (PROBE_BYTES as u32).to_be_bytes());
        } else {
            assert_eq!(payload[8..], rig.disk.bytes[4096..][..PROBE_BYTES as usize]);
        }
        assert_eq!(
            rig.connection.pool.take(32 << 20).map(|_| ()),
            Some(()),
            "no memory is lost"
        );
    }
}

#[test]
fn block_status_is_answered() {
    let mut rig = rig(Style::Structured);
    rig.disk.extents = vec![
        StatusExtent {
            len: 512,
            allocated: true,
            zero: false,
        },
        StatusExtent {
            len: 1 << 30,
            allocated: false,
            zero: true,
        },
    ];
    for (flags, expected) in [
        (0, &[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0xe, 0, 0, 0, 0, 3][..]),
        (cmd_flag::REQ_ONE, &[0, 0, 2, 0, 0, 0, 0, 0]),
    ] {
        rig.send(cmd::BLOCK_STATUS, flags, 1, 0, 4096);
        let reply = rig.answer_and_take();
        let (kind, payload) = chunk_of(&reply, 1);
        assert_eq!(kind, chunk::BLOCK_STATUS);
        assert_eq!(payload[..4], [0, 0, 0, 1]);
        assert_eq!(&payload[4..], expected);
    }
    rig.disk.fail = Some(GuestError::Io);
    rig.send(cmd::BLOCK_STATUS, 0, 2, 0, 4096);
    let reply = rig.answer_and_take();
    assert_eq!(chunk_of(&reply, 2).0, chunk::ERROR);
    assert!(
        rig.disk.status.is_empty(),
        "answers are taken after errors too"
    );
}

#[test]
fn garbage_ends_the_connection_after_what_came_before() {
    let mut rig = rig(Style::Simple);
    rig.send(cmd::READ, 0, 1, 0, 512);
    rig.client.write_all(&[0xee; 200]).unwrap();
    rig.turn();
    assert!(!rig.connection.finished(), "a request is at the disk");
    let reply = rig.answer_and_take();
    assert_eq!(reply.len(), 16 + 512);
    assert!(rig.connection.finished());
}

#[test]
fn an_oversized_write_is_answered_then_ends_the_connection() {
    let mut rig = rig(Style::Simple);
    rig.send(cmd::WRITE, 0, 1, 0, (32 << 20) + 1);
    rig.client.write_all(&[0; 100]).unwrap();
    assert_eq!(rig.take(), simple(22, 1));
    assert!(rig.connection.finished());
}

#[test]
fn disconnect_answers_what_is_in_flight() {
    let mut rig = rig(Style::Simple);
    rig.send(cmd::FLUSH, 0, 1, 0, 0);
    rig.send(cmd::DISC, 0, 2, 0, 0);
    rig.turn();
    assert!(!rig.connection.finished());
    assert_eq!(rig.answer_and_take(), simple(0, 1));
    assert!(rig.connection.finished());
}

#[test]
fn a_client_that_vanishes_leaves_when_the_disk_is_done() {
    for shut_first in [false, true] {
        let mut rig = rig(Style::Simple);
        rig.send(cmd::READ, 0, 1, 0, 4096);
        rig.send(cmd::READ, 0, 2, 0, 4096);
        let mut write = request(Style::Simple, cmd::WRITE, 0, 3, 0, 1 << 20);
        write.extend([0; 1000]);
        rig.push(&write);
        if shut_first {
            rig.client.shutdown(std::net::Shutdown::Write).unwrap();
            rig.turn();
        }
        drop(std::mem::replace(
            &mut rig.client,
            UnixStream::pair().unwrap().0,
        ));
        rig.turn();
        assert!(!rig.connection.finished(), "the disk uses its memory");
        rig.disk.answer(false);
        rig.turn();
        assert!(!rig.connection.finished());
        rig.disk.answer(false);
        rig.turn();
        assert!(rig.connection.finished());
        assert_eq!(rig.disk.ops, [Op::Read; 2], "half a write is none");
        assert_eq!(rig.connection.free.len(), usize::from(DEPTH));
        assert!(rig.connection.pool.fits(32 << 20));
    }
}

#[test]
fn a_client_that_never_reads_holds_a_bounded_part() {
    let mut rig = rig(Style::Simple);
    let mut requests = 0u64;
    // Asks for 256 KiB again and again until the server takes no more.
    loop {
        let bytes = request(Style::Simple, cmd::READ, 0, requests, 0, 256 << 10);
        match rig.client.write(&bytes) {
            Ok(len) => assert_eq!(len, bytes.len()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                rig.turn();
                rig.disk.answer_all();
                rig.turn();
                let pool = &rig.connection.pool;
                assert!(!pool.fits(1 << 20) || rig.connection.free.is_empty());
                if rig.connection.blocked() && rig.client.write(&bytes).is_err() {
                    break;
                }
            }
        }
        requests += 1;
        assert!(requests < 1_000_000, "the server never stops reading");
    }
    assert!(
        !rig.connection.has_work(),
        "it sleeps until the client reads"
    );
    assert!(rig.connection.stalled());
    // Later it reads, and gets everything.
    let mut got = 0;
    loop {
        let part = rig.answer_and_take().len();
        if part == 0 && rig.disk.held.is_empty() {
            break;
        }
        got += part as u64;
    }
    assert_eq!(got % (16 + (256 << 10)), 0);
    assert!(got / (16 + (256 << 10)) >= requests - 1);
}

#[test]
fn a_full_table_is_tried_again() {
    let mut rig = rig(Style::Structured);
    rig.disk.table = 2;
    rig.disk.extents = vec![StatusExtent {
        len: 512,
        allocated: true,
        zero: false,
    }];
    for cookie in 0..6 {
        rig.send(cmd::READ, 0, cookie, 0, 512);
        rig.send(cmd::BLOCK_STATUS, 0, 100 + cookie, 0, 512);
    }
    let mut bytes = 0;
    for _ in 0..6 {
        assert_eq!(rig.disk.held.len().max(2), 2);
        bytes += rig.answer_and_take().len();
    }
    assert_eq!(bytes, 6 * (28 + 512) + 6 * (24 + 8));
}

#[test]
fn more_requests_than_slots_are_taken_as_slots_come_free() {
    let mut rig = rig(Style::Simple);
    let depth = u64::from(DEPTH);
    let stream: Vec<u8> = (0..depth * 3)
        .flat_map(|cookie| request(Style::Simple, cmd::READ, 0, cookie, 0, 512))
        .collect();
    rig.client.write_all(&stream).unwrap();
    let mut replies = 0;
    while replies < depth * 3 {
        rig.turn();
        assert!(rig.disk.held.len() <= usize::from(DEPTH) && !rig.disk.held.is_empty());
        let half = rig.disk.held.len().div_ceil(2);
        for _ in 0..half {
            rig.disk.answer(false);
        }
        replies += rig.take().len() as u64 / 528;
    }
}

#[test]
fn level_triggered_events_of_a_stalled_connection_are_told_apart() {
    let mut rig = rig(Style::Simple);
    for cookie in 0..=u64::from(DEPTH) {
        rig.send(cmd::FLUSH, 0, cookie, 0, 0);
    }
    assert!(rig.connection.readable());
    rig.connection.receive(&mut rig.disk, rig.server.as_fd());
    assert!(rig.connection.stalled());
    assert!(!rig.connection.readable(), "nothing can be done with it");
    rig.disk.answer_all();
    rig.connection
        .deliver_first(&mut rig.disk, rig.server.as_fd());
    assert!(rig.connection.has_work());
}

#[test]
fn memory_at_the_disk_is_not_freed_with_the_connection() {
    let mut rig = rig(Style::Simple);
    rig.send(cmd::READ, 0, 1, 0, 4096);
    rig.turn();
    let Rig {
        connection,
        mut disk,
        ..
    } = rig;
    drop(connection);
    // Would write to freed memory (an error under a sanitizer) if the buffer were not leaked.
    disk.answer(false);
}
