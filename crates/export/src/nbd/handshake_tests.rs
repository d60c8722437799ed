use super::*;
use proptest::prelude::*;

fn export() -> Export {
    Export {
        name: "disk".into(),
        description: "a disk".into(),
        size: 1 << 30,
        read_only: false,
        preferred_block: 4096,
        min_block: 1,
    }
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn named(name: &str, tail: &[u8]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(tail);
    data
}

fn queries(list: &[&str]) -> Vec<u8> {
    let mut data = (list.len() as u32).to_be_bytes().to_vec();
    for query in list {
        data.extend(named(query, &[]));
    }
    data
}

/// A client that said its flags; feeds messages and reads replies.
struct Client {
    handshake: Handshake,
    export: Export,
}

type Replies = Vec<(u32, u32, Vec<u8>)>;

impl Client {
    fn new() -> Self {
        let mut out = Vec::new();
        let mut handshake = Handshake::start(&mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
        let export = export();
        assert_eq!(
            handshake.feed(&export, &3u32.to_be_bytes(), &mut out),
            (4, Step::More)
        );
        Self { handshake, export }
    }

    fn raw(&mut self, message: &[u8]) -> (Vec<u8>, Step) {
        let mut out = Vec::new();
        let (used, step) = self.handshake.feed(&self.export, message, &mut out);
        assert_eq!(used, message.len());
        (out, step)
    }

    fn send(&mut self, kind: u32, data: &[u8]) -> (Replies, Step) {
        let (out, step) = self.raw(&option(kind, data));
        (replies(&out), step)
    }

    /// Types of the replies.
    fn kinds(&mut self, kind: u32, data: &[u8]) -> Vec<u32> {
        self.send(kind, data).0.into_iter().map(|r| r.1).collect()
    }
}

fn replies(bytes: &[u8]) -> Replies {
    let mut fields = Fields(bytes);
    let mut list = Vec::new();
    while !fields.is_empty() {
        assert_eq!(fields.u64(), Some(OPTION_REPLY_MAGIC));
        let (option, kind) = (fields.u32().unwrap(), fields.u32().unwrap());
        let len = fields.u32().unwrap() as usize;
        list.push((option, kind, fields.bytes(len).unwrap().to_vec()));
    }
    list
}

#[test]
fn each_option_has_its_answer() {
    for (kind, data, expected) in [
        (opt::LIST, vec![], vec![rep::SERVER, rep::ACK]),
        (opt::LIST, vec![1], vec![rep::ERR_INVALID]),
        (opt::STARTTLS, vec![], vec![rep::ERR_POLICY]),
        (4, vec![], vec![rep::ERR_UNSUP]),
        (99, vec![0; 1000], vec![rep::ERR_UNSUP]),
        (opt::INFO, named("disk", &[0, 0]), vec![rep::INFO, rep::ACK]),
        (
            opt::INFO,
            named("", &[0, 3, 0, 1, 0, 2, 0, 3]),
            vec![rep::INFO, rep::INFO, rep::INFO, rep::INFO, rep::ACK],
        ),
        (opt::INFO, named("other", &[0, 0]), vec![rep::ERR_UNKNOWN]),
        (opt::GO, named("other", &[0, 0]), vec![rep::ERR_UNKNOWN]),
        (opt::GO, named("disk", &[0, 9]), vec![rep::ERR_INVALID]),
        (opt::STRUCTURED_REPLY, vec![], vec![rep::ACK]),
        (opt::STRUCTURED_REPLY, vec![0], vec![rep::ERR_INVALID]),
        (opt::EXTENDED_HEADERS, vec![], vec![rep::ACK]),
        (
            opt::SET_META_CONTEXT,
            named("", &queries(&["base:allocation"])),
            vec![rep::ERR_INVALID],
        ),
    ] {
        let (got, step) = Client::new().send(kind, &data);
        assert!(got.iter().all(|r| r.0 == kind));
        let kinds: Vec<u32> = got.iter().map(|r| r.1).collect();
        assert_eq!(kinds, expected, "option {kind} {data:?}");
        assert_eq!(step, Step::More);
    }
}

#[test]
fn go_carries_size_flags_and_limits() {
    let mut client = Client::new();
    client.export.read_only = true;
    let (got, step) = client.send(opt::GO, &named("disk", &[0, 1, 0, 3]));
    assert_eq!(step, Step::Transmit(Negotiated::default()));
    let export = &got[0].2;
    assert_eq!(export.len(), 12);
    assert_eq!(export[..10], [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0]);
    let flags = u16::from_be_bytes([export[10], export[11]]);
    use transmission_flag::*;
    assert_eq!(
        flags,
        HAS_FLAGS | READ_ONLY | SEND_FLUSH | SEND_FUA | SEND_CACHE | CAN_MULTI_CONN
    );
    assert_eq!(
        got[1].2,
        [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0],
        "1, 4096, 32 MiB"
    );
}

#[test]
fn df_is_offered_with_structured_replies_only() {
    let flags = |structured: bool| {
        let mut client = Client::new();
        if structured {
            client.send(opt::STRUCTURED_REPLY, &[]);
        }
        let (got, _) = client.send(opt::INFO, &named("", &[0, 0]));
        u16::from_be_bytes([got[0].2[10], got[0].2[11]])
    };
    assert_eq!(flags(false) & transmission_flag::SEND_DF, 0);
    assert_ne!(flags(true) & transmission_flag::SEND_DF, 0);
}

#[test]
fn contexts_are_selected_replaced_and_lost() {
    let mut client = Client::new();
    assert_eq!(client.kinds(opt::STRUCTURED_REPLY, &[]), [rep::ACK]);
    let select = named("disk", &queries(&["x:y", "base:allocation"]));
    assert_eq!(
        client.kinds(opt::SET_META_CONTEXT, &select),
        [rep::META_CONTEXT, rep::ACK]
    );
    assert!(client.handshake.agreed.allocation);
    assert_eq!(
        client.kinds(opt::SET_META_CONTEXT, &named("disk", &queries(&["base:"]))),
        [rep::ACK]
    );
    assert!(!client.handshake.agreed.allocation);
    client.send(opt::SET_META_CONTEXT, &select);
    assert_eq!(
        client.kinds(opt::SET_META_CONTEXT, &[1]),
        [rep::ERR_INVALID]
    );
    assert!(
        !client.handshake.agreed.allocation,
        "a failure selects none"
    );
    for (list, expected) in [
        (&[][..], &[rep::META_CONTEXT, rep::ACK][..]),
        (&["base:"], &[rep::META_CONTEXT, rep::ACK]),
        (&["qemu:"], &[rep::ACK]),
    ] {
        let data = named("", &queries(list));
        assert_eq!(client.kinds(opt::LIST_META_CONTEXT, &data), expected);
    }
}

#[test]
fn extended_headers_take_precedence() {
    let mut client = Client::new();
    assert_eq!(client.kinds(opt::STRUCTURED_REPLY, &[]), [rep::ACK]);
    assert_eq!(client.kinds(opt::STRUCTURED_REPLY, &[]), [rep::ERR_INVALID]);
    assert_eq!(client.kinds(opt::EXTENDED_HEADERS, &[]), [rep::ACK]);
    assert_eq!(
        client.kinds(opt::STRUCTURED_REPLY, &[]),
        [rep::ERR_EXT_HEADER_REQD]
    );
    assert_eq!(client.kinds(opt::EXTENDED_HEADERS, &[]), [rep::ERR_INVALID]);
    assert_eq!(client.send(opt::EXPORT_NAME, b"disk").1, Step::Close);
}

#[test]
fn export_name_ends_in_transmission_or_not_at_all() {
    for (client_flags, name, len) in [
        (3u32, &b"disk"[..], Some(10)),
        (3, b"", Some(10)),
        (1, b"disk", Some(134)),
        (0, b"", Some(134)),
        (3, b"other", None),
        (3, b"\xff", None),
    ] {
        let mut out = Vec::new();
        let mut handshake = Handshake::start(&mut out);
        handshake.feed(&export(), &client_flags.to_be_bytes(), &mut out);
        out.clear();
        let message = option(opt::EXPORT_NAME, name);
        let (_, step) = handshake.feed(&export(), &message, &mut out);
        match len {
            Some(len) => {
                assert_eq!(step, Step::Transmit(Negotiated::default()));
                assert_eq!(out.len(), len);
            }
            None => assert_eq!((step, out.len()), (Step::Close, 0)),
        }
    }
}

#[test]
fn garbage_and_floods_close() {
    let mut out = Vec::new();
    let mut handshake = Handshake::start(&mut out);
    assert_eq!(
        handshake.feed(&export(), &[0, 0, 0, 4], &mut out).1,
        Step::Close,
        "unknown client flag"
    );
    assert_eq!(Client::new().raw(b"GET / HT").1, Step::Close);
    let (got, step) = Client::new().send(opt::ABORT, &[]);
    assert_eq!((got[0].1, step), (rep::ACK, Step::Close));

    let mut client = Client::new();
    for _ in 0..OPTIONS_MAX {
        assert_eq!(client.send(opt::LIST, &[]).1, Step::More);
    }
    assert_eq!(client.send(opt::LIST, &[]).1, Step::Close);
}

#[test]
fn long_options_are_skipped_then_refused() {
    for (kind, answer) in [(opt::INFO, rep::ERR_TOO_BIG), (77, rep::ERR_UNSUP)] {
        let mut client = Client::new();
        let mut header = option(kind, &[]);
        let len = OPTION_BYTES_MAX as u32 + 1;
        header[12..].copy_from_slice(&len.to_be_bytes());
        assert_eq!(client.raw(&header), (vec![], Step::More));
        assert_eq!(client.raw(&[7; OPTION_BYTES_MAX]), (vec![], Step::More));
        let (out, step) = client.raw(&[7]);
        assert_eq!((replies(&out)[0].1, step), (answer, Step::More));
        assert_eq!(client.kinds(opt::LIST, &[]), [rep::SERVER, rep::ACK]);
    }
    let mut header = option(77, &[]);
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(Client::new().raw(&header).1, Step::Close);
}

proptest! {
    /// Whatever comes, in whatever pieces: it ends, uses no more than it was given, and answers little.
    #[test]
    fn any_stream_is_survived(
        messages in proptest::collection::vec(
            (0u32..14, proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
        tail in proptest::collection::vec(any::<u8>(), 0..40),
        flags in 0u32..5,
        piece in 1usize..50,
    ) {
        let mut stream = flags.to_be_bytes().to_vec();
        for (kind, data) in &messages {
            stream.extend(option(*kind, data));
        }
        stream.extend(&tail);
        let mut out = Vec::new();
        let mut handshake = Handshake::start(&mut out);
        let (mut at, mut end) = (0, 0);
        'all: while end < stream.len() {
            end = (end + piece).min(stream.len());
            loop {
                out.clear();
                let (used, step) = handshake.feed(&export(), &stream[at..end], &mut out);
                prop_assert!(used <= end - at && out.len() < 1024);
                at += used;
                if step != Step::More {
                    break 'all;
                }
                if used == 0 {
                    break;
                }
            }
        }
    }

    /// How the bytes are cut does not matter.
    #[test]
    fn pieces_do_not_matter(cut in 0usize..60) {
        let mut stream = 3u32.to_be_bytes().to_vec();
        stream.extend(option(opt::STRUCTURED_REPLY, &[]));
        stream.extend(option(opt::GO, &named("disk", &[0, 0])));
        let mut out = Vec::new();
        let mut handshake = Handshake::start(&mut out);
        let mut at = 0;
        let mut last = Step::More;
        for end in [cut.min(stream.len()), stream.len()] {
            while last == Step::More {
                let (used, step) = handshake.feed(&export(), &stream[at..end], &mut out);
                at += used;
                last = step;
                if used == 0 { break; }
            }
        }
        let agreed = Negotiated { style: Style::Structured, allocation: false };
        prop_assert_eq!(last, Step::Transmit(agreed));
        prop_assert_eq!(at, stream.len());
    }
}
