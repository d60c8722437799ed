//! A connection against servers that a script plays.

use super::*;
use crate::proto::{
    EXTENDED_REPLY_MAGIC, REPLY_DONE, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};
use proptest::prelude::*;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;

const CONTEXT: u32 = 9;

fn connection(style: Style) -> (Connection, UnixStream) {
    let (socket, server) = Socket::pair();
    let export = Export {
        size: 1 << 20,
        flags: 0,
        style,
        block_min: 1,
        block_max: 1 << 20,
        allocation: Some(CONTEXT),
    };
    (Connection::new(socket, export, Wait::default()), server)
}

fn read(connection: &Connection, offset: u64, buf: &mut [u8]) -> Result<()> {
    let ask = Ask {
        kind: cmd::READ,
        flags: 0,
        offset,
        len: buf.len() as u64,
        data: &[],
    };
    connection.ask(&ask, Take::Data(buf))
}

fn reply(style: Style, flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = match style {
        Style::Extended => EXTENDED_REPLY_MAGIC,
        _ => STRUCTURED_REPLY_MAGIC,
    }
    .to_be_bytes()
    .to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    match style {
        Style::Extended => {
            bytes.extend([0; 8]);
            bytes.extend((payload.len() as u64).to_be_bytes());
        }
        _ => bytes.extend((payload.len() as u32).to_be_bytes()),
    }
    bytes.extend(payload);
    bytes
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], bytes].concat()
}

fn hole(offset: u64, len: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

fn status(id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    for (len, state) in extents {
        bytes.extend(len.to_be_bytes());
        bytes.extend(state.to_be_bytes());
    }
    bytes
}

fn request(server: &mut UnixStream, style: Style) -> Header {
    let mut bytes = [0; HEADER_BYTES_MAX];
    let size = Header::size(style);
    server.read_exact(&mut bytes[..size]).unwrap();
    Header::parse(style, &bytes).unwrap().unwrap()
}

/// Twelve threads ask on one connection; all requests are there before the first answer, which come in the wrong order,
/// in parts that are mixed with each other, some with zeros.
#[test]
fn many_threads_get_what_is_theirs() {
    const READERS: u64 = 12;
    for style in [Style::Structured, Style::Extended, Style::Simple] {
        let (connection, mut server) = connection(style);
        let server = thread::spawn(move || {
            for _ in 0..4 {
                let mut asked: Vec<Header> =
                    (0..READERS).map(|_| request(&mut server, style)).collect();
                asked.sort_by_key(|header| header.offset.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                let mut stream = Vec::new();
                for (half, flags) in [(0, 0), (256, REPLY_DONE)] {
                    for ask in &asked {
                        assert_eq!((ask.kind, ask.len), (cmd::READ, 512));
                        let byte = (ask.offset / 512) as u8;
                        let at = ask.offset + half;
                        if style != Style::Simple {
                            let (kind, part) = match byte % 3 {
                                0 => (chunk::OFFSET_HOLE, hole(at, 256)),
                                _ => (chunk::OFFSET_DATA, data(at, &[byte; 256])),
                            };
                            stream.extend(reply(style, flags, kind, ask.cookie, &part));
                        } else if half == 0 {
                            stream.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
                            stream.extend(0u32.to_be_bytes());
                            stream.extend(ask.cookie.to_be_bytes());
                            stream.extend([if byte.is_multiple_of(3) { 0 } else { byte }; 512]);
                        }
                    }
                }
                server.write_all(&stream).unwrap();
            }
            // The goodbye, and then nothing.
            assert_eq!(request(&mut server, style).kind, cmd::DISC);
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
        });
        thread::scope(|scope| {
            for nth in 0..READERS {
                let connection = &connection;
                scope.spawn(move || {
                    for round in 0..4 {
                        let byte = (round * READERS + nth) as u8;
                        let mut buf = [0xff; 512];
                        read(connection, u64::from(byte) * 512, &mut buf).unwrap();
                        let expected = if byte.is_multiple_of(3) { 0 } else { byte };
                        assert_eq!(buf, [expected; 512]);
                    }
                });
            }
        });
        assert_eq!(connection.in_flight(), 0);
        drop(connection);
        server.join().unwrap();
    }
}

/// What a server answers a read of 8 bytes at byte 4096 with.
fn answered(style: Style, answer: impl FnOnce(u64) -> Vec<u8> + Send + 'static) -> Result<[u8; 8]> {
    let (connection, mut server) = connection(style);
    let server = thread::spawn(move || {
        let cookie = request(&mut server, style).cookie;
        // Who breaks the protocol is cut off. That was all: nobody waits for more.
        let _ = server.write_all(&answer(cookie));
    });
    let mut buf = [0xff; 8];
    let outcome = read(&connection, 4096, &mut buf);
    server.join().unwrap();
    if let Err(error) = &outcome
        && !error.to_string().contains("the server answers")
    {
        // It is over for all.
        let again = read(&connection, 0, &mut [0; 8]).unwrap_err();
        assert_eq!(again.to_string(), error.to_string());
    }
    outcome.map(|()| buf)
}

#[test]
fn what_breaks_the_protocol_ends_the_connection() {
    use chunk::{ERROR, NONE, OFFSET_DATA, OFFSET_HOLE};
    let style = Style::Structured;
    let one = move |kind: u16, payload: Vec<u8>| {
        move |cookie| reply(style, REPLY_DONE, kind, cookie, &payload)
    };
    type Answer = Box<dyn FnOnce(u64) -> Vec<u8> + Send>;
    let cases: Vec<(Answer, &str)> = vec![
        (Box::new(|_| vec![0x55; 20]), "begins with 0x55555555"),
        (
            Box::new(move |cookie| reply(style, 1, NONE, cookie + 256, &[])),
            "which is not in flight",
        ),
        (
            Box::new(move |cookie| reply(style, 1, NONE, cookie + 1, &[])),
            "which is not in flight",
        ),
        (Box::new(one(NONE, vec![])), "8 bytes was answered with 0"),
        (
            Box::new(one(OFFSET_DATA, data(4096, &[1; 7]))),
            "answered with 7",
        ),
        (
            Box::new(one(OFFSET_DATA, data(4096, &[1; 9]))),
            "9 bytes at byte 4096 in",
        ),
        (
            Box::new(one(OFFSET_DATA, data(4095, &[1; 8]))),
            "at byte 4095 in answer",
        ),
        (
            Box::new(one(OFFSET_DATA, data(u64::MAX, &[1; 8]))),
            "in answer to a read",
        ),
        (
            Box::new(one(OFFSET_HOLE, hole(4096, 0))),
            "0 bytes at byte 4096",
        ),
        (
            Box::new(one(OFFSET_HOLE, hole(4096, u32::MAX))),
            "in answer to a read",
        ),
        (
            Box::new(move |cookie| {
                let first = reply(style, 0, OFFSET_DATA, cookie, &data(4096, &[1; 4]));
                let again = reply(style, 1, OFFSET_DATA, cookie, &data(4096, &[2; 4]));
                [first, again].concat()
            }),
            "4 bytes at byte 4096 in answer",
        ),
        (Box::new(one(ERROR, vec![0; 6])), "an error that is none"),
        (
            Box::new(one(chunk::BLOCK_STATUS, status(CONTEXT, &[(8, 0)]))),
            "status that nobody asked for",
        ),
        (
            Box::new(move |cookie| {
                let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
                bytes.extend([0; 4]);
                bytes.extend(cookie.to_be_bytes());
                bytes
            }),
            "a simple reply where data belong",
        ),
        (
            Box::new(move |cookie| reply(style, 0, NONE, cookie, &[]).repeat(CHUNKS_MAX + 1)),
            "more than 65536 chunks",
        ),
        (Box::new(|_| vec![]), "the server closed the connection"),
        (
            Box::new(move |cookie| {
                reply(style, 1, OFFSET_DATA, cookie, &data(4096, &[1; 8]))[..30].to_vec()
            }),
            "the server closed the connection",
        ),
    ];
    for (answer, what) in cases {
        let error = answered(style, answer).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
}

#[test]
fn answers_in_parts_are_put_together() {
    use chunk::{ERROR_OFFSET, OFFSET_DATA, OFFSET_HOLE};
    for style in [Style::Structured, Style::Extended] {
        // The end, the beginning, a hole between them.
        let found = answered(style, move |cookie| {
            let end = reply(style, 0, OFFSET_DATA, cookie, &data(4101, b"end"));
            let begin = reply(style, 0, OFFSET_DATA, cookie, &data(4096, b"ab"));
            let hole = reply(style, 1, OFFSET_HOLE, cookie, &hole(4098, 3));
            [end, begin, hole].concat()
        });
        assert_eq!(&found.unwrap(), b"ab\0\0\0end");
        let error = answered(style, move |cookie| {
            let mut why = 28u32.to_be_bytes().to_vec();
            why.extend([0, 4]);
            why.extend(b"full");
            why.extend([0; 8]);
            reply(style, 1, ERROR_OFFSET, cookie, &why)
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(
            error.to_string().contains("answers 'full': No space"),
            "{error}"
        );
    }
}

#[test]
fn block_status_is_what_was_asked_for() {
    let ask = |answer: Vec<u8>| {
        let (connection, mut server) = connection(Style::Structured);
        let server = thread::spawn(move || {
            let cookie = request(&mut server, Style::Structured).cookie;
            let kind = chunk::BLOCK_STATUS;
            let _ = server.write_all(&reply(Style::Structured, 1, kind, cookie, &answer));
            server
        });
        let mut extents = Vec::new();
        let ask = Ask {
            kind: cmd::BLOCK_STATUS,
            flags: 0,
            offset: 0,
            len: 4096,
            data: &[],
        };
        let outcome = connection.ask(&ask, Take::Status(&mut extents));
        drop(server.join().unwrap());
        outcome.map(|()| extents)
    };
    let many: Vec<(u32, u32)> = (0..EXTENTS_MAX as u32 + 500)
        .map(|n| (n + 1, n % 4))
        .collect();
    let found = ask(status(CONTEXT, &many)).unwrap();
    assert_eq!(found.len(), EXTENTS_MAX);
    let last = found.last().unwrap();
    assert_eq!((last.len, last.state), (EXTENTS_MAX as u64, 3));
    for (answer, what) in [
        (status(CONTEXT + 1, &[(4096, 0)]), "of context 10"),
        (status(CONTEXT, &[(0, 0)]), "of no bytes"),
    ] {
        let error = ask(answer).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
}

#[test]
fn a_server_that_is_silent_can_be_given_up() {
    let (socket, server) = Socket::pair();
    let (mut connection, _) = connection(Style::Simple);
    connection.socket = socket;
    connection.wait.cancelled = Some(|| true);
    // Both who reads for all and who sleeps meanwhile.
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let error = read(&connection, 0, &mut [0; 8]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Interrupted);
            });
        }
    });
    drop(server);
}

/// Those who wait are told when the server says nothing, and what it says afterwards is not heard.
#[test]
fn a_server_that_is_silent_for_too_long_is_given_up() {
    let (mut connection, server) = connection(Style::Simple);
    connection.wait.silence = Some(Duration::from_millis(50));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let error = read(&connection, 0, &mut [0; 8]).unwrap_err().to_string();
                assert!(error.contains("silent for 0.05 s"), "{error}");
            });
        }
    });
    let late = connection
        .socket
        .write(&mut [IoSlice::new(&[0])], &connection.wait);
    assert!(late.is_err());
    drop(server);
}

#[test]
fn a_request_that_a_busy_server_forgets_is_found() {
    let (connection, _server) = connection(Style::Simple);
    let (limit, began) = (Duration::from_secs(60), Instant::now());
    let mut table = lock(&connection.table);
    table.mark = (0, began);
    table.count = 1;
    table.slots[3] = Slot::Asleep(1 << 8 | 3);
    let mut answers = |after: u64, silence| {
        table.count += LOOK_EVERY;
        let now = began + Duration::from_secs(after);
        let found = (0..LOOK_EVERY).filter(|_| table.forgets(now, silence));
        found.count()
    };
    assert_eq!(answers(59, Some(limit)), 0);
    // It is not known yet that the request was there at the mark.
    assert_eq!(answers(60, Some(limit)), 0);
    assert_eq!(answers(119, Some(limit)), 0);
    assert_eq!(answers(600, None), 0);
    assert_eq!(answers(120, Some(limit)), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_answers_are_survived(
        style in 0usize..3,
        chunks in proptest::collection::vec(
            (0u16..2, 0usize..8, 0u64..3, proptest::collection::vec(any::<u8>(), 0..24), any::<bool>()), 0..8)
    ) {
        let style = [Style::Simple, Style::Structured, Style::Extended][style];
        let kinds = [chunk::NONE, chunk::OFFSET_DATA, chunk::OFFSET_HOLE, chunk::BLOCK_STATUS,
            chunk::BLOCK_STATUS_EXT, chunk::ERROR, chunk::ERROR_OFFSET, 77];
        let _ = answered(style, move |cookie| {
            let mut stream = Vec::new();
            for (flags, kind, wrong, payload, placed) in chunks {
                let payload = match placed {
                    true => [&4096u64.to_be_bytes()[..], &payload].concat(),
                    false => payload,
                };
                stream.extend(reply(style, flags, kinds[kind], cookie + wrong / 2, &payload));
            }
            stream
        });
    }
}
