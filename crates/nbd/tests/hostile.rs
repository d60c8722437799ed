//! Servers that are not what they should be: each ends with an error that names the server, or with an answer; none with a
//! panic, a hang, or memory that it chose.
//!
//! A server here says all that it has to say at once: a client asks for one thing after the other, so that the cookies of
//! its requests are known beforehand.

use block::Storage as _;
use io::File;
use nbd::proto::{
    ALLOCATION, EXTENDED_REPLY_MAGIC, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REPLY_DONE,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, Style, chunk, handshake_flag, info, opt, rep,
    transmission_flag as flag,
};
use nbd::{Client, Options, Uri};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

const SIZE: u64 = 1 << 20;
const CONTEXT: u32 = 7;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Fields of which each has as many bytes as it says.
fn fields(fields: &[(u64, usize)]) -> Vec<u8> {
    let bytes = |(value, len): &(u64, usize)| value.to_be_bytes()[8 - len..].to_vec();
    fields.iter().flat_map(bytes).collect()
}

fn greeting() -> Vec<u8> {
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    [
        words(&[INIT_MAGIC, OPTION_MAGIC]),
        flags.to_be_bytes().to_vec(),
    ]
    .concat()
}

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let head = [
        (OPTION_REPLY_MAGIC, 8),
        (option.into(), 4),
        (kind.into(), 4),
        (data.len() as u64, 4),
    ];
    [fields(&head), data.to_vec()].concat()
}

fn export(size: u64) -> Vec<u8> {
    let flags = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_TRIM
        | flag::SEND_WRITE_ZEROES
        | flag::SEND_FUA;
    fields(&[(info::EXPORT.into(), 2), (size, 8), (flags.into(), 2)])
}

fn blocks(min: u64, preferred: u64, max: u64) -> Vec<u8> {
    fields(&[
        (info::BLOCK_SIZE.into(), 2),
        (min, 4),
        (preferred, 4),
        (max, 4),
    ])
}

/// What a sound server says up to the transmission.
fn handshake(style: Style) -> Vec<Vec<u8>> {
    handshake_of(style, SIZE)
}

/// The same, of an export of so many bytes.
fn handshake_of(style: Style, size: u64) -> Vec<Vec<u8>> {
    let agree = |option, on| match on {
        true => answer(option, rep::ACK, &[]),
        false => answer(option, rep::ERR_UNSUP, b"no"),
    };
    let mut script = vec![
        greeting(),
        agree(opt::EXTENDED_HEADERS, style == Style::Extended),
    ];
    if style != Style::Extended {
        script.push(agree(opt::STRUCTURED_REPLY, style == Style::Structured));
    }
    if style != Style::Simple {
        let context = [&CONTEXT.to_be_bytes()[..], ALLOCATION.as_bytes()].concat();
        script.push(answer(opt::SET_META_CONTEXT, rep::META_CONTEXT, &context));
        script.push(answer(opt::SET_META_CONTEXT, rep::ACK, &[]));
    }
    script.push(answer(opt::GO, rep::INFO, &export(size)));
    script.push(answer(opt::GO, rep::INFO, &blocks(512, 4096, 65536)));
    script.push(answer(opt::GO, rep::ACK, &[]));
    script
}

/// A reply to the `nth` request, from 1.
fn reply(style: Style, nth: u64, kind: u16, payload: &[u8]) -> Vec<u8> {
    let (cookie, len) = ((nth << 8, 8), payload.len() as u64);
    let flags = (u64::from(REPLY_DONE), 2);
    let head = match style {
        // Errors and data only: the payload follows as it is.
        Style::Simple => vec![(SIMPLE_REPLY_MAGIC.into(), 4), (0, 4), cookie],
        Style::Structured => vec![
            (STRUCTURED_REPLY_MAGIC.into(), 4),
            flags,
            (kind.into(), 2),
            cookie,
            (len, 4),
        ],
        Style::Extended => vec![
            (EXTENDED_REPLY_MAGIC.into(), 4),
            flags,
            (kind.into(), 2),
            cookie,
            (0, 8),
            (len, 8),
        ],
    };
    [fields(&head), payload.to_vec()].concat()
}

/// What a sound server answers to [`use_it`].
fn session(style: Style) -> Vec<u8> {
    let mut script = handshake(style);
    let mut nth = 0;
    let mut next = |kind, payload: &[u8]| {
        nth += 1;
        script.push(reply(style, nth, kind, payload));
    };
    match style {
        Style::Simple => next(0, &[9; 512]),
        _ => next(
            chunk::OFFSET_DATA,
            &[&4096u64.to_be_bytes()[..], &[9; 512]].concat(),
        ),
    }
    match style {
        Style::Simple => {}
        Style::Structured => next(
            chunk::BLOCK_STATUS,
            &fields(&[
                (CONTEXT.into(), 4),
                (4096, 4),
                (3, 4),
                (SIZE - 4096, 4),
                (0, 4),
            ]),
        ),
        Style::Extended => next(
            chunk::BLOCK_STATUS_EXT,
            &fields(&[(CONTEXT.into(), 4), (1, 4), (SIZE, 8), (3, 8)]),
        ),
    }
    // A write, zeros, a discard and a flush.
    (0..4).for_each(|_| next(chunk::NONE, &[]));
    script.concat()
}

/// Does something of everything, one after the other.
fn use_it(disk: &File) -> block::Result<()> {
    let mut buf = [0; 512];
    disk.read_at(4096, &mut buf)?;
    assert_eq!(buf, [9; 512]);
    disk.range_at(0)?;
    disk.write_at(0, &buf)?;
    disk.write_zeroes(0, 4096, true)?;
    disk.discard(4096, 4096)?;
    disk.sync()
}

/// What is at `uri`, in the place of a file.
fn disk(uri: &Uri, options: &Options) -> block::Result<Arc<File>> {
    let client = Arc::new(Client::connect(uri, options)?);
    File::remote(&uri.to_string(), client, &io::OpenOptions::default())
}

/// A listening socket, and a thread that says to whoever connects what it is told next, and then no more.
struct Stage {
    uri: Uri,
    say: mpsc::Sender<Vec<u8>>,
}

impl Stage {
    fn new(dir: &Path) -> Self {
        let path = dir.join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (say, lines) = mpsc::channel::<Vec<u8>>();
        thread::spawn(move || {
            for line in lines {
                let (mut stream, _) = listener.accept().unwrap();
                // The client may have gone: nothing of what it says is waited for.
                if stream.write_all(&line).is_ok() {
                    let _ = stream.shutdown(Shutdown::Write);
                    drain(stream);
                }
            }
        });
        let uri = format!("nbd+unix:///disk?socket={}", path.display());
        let uri = Uri::parse(&uri).unwrap();
        Self { uri, say }
    }

    fn play(&self, script: Vec<u8>) -> block::Result<()> {
        self.say.send(script).unwrap();
        use_it(&*disk(&self.uri, &Options::default())?)
    }

    /// Plays what must fail; returns what is said of it.
    fn fails(&self, what: &str, script: Vec<u8>) -> String {
        let error = self.play(script).expect_err(what).to_string();
        assert_eq!(
            error.matches(&self.uri.to_string()).count(),
            1,
            "{what}: {error}"
        );
        error
    }
}

/// Takes what a client says, so that it need not wait.
fn drain(mut stream: UnixStream) {
    let mut bytes = [0; 4096];
    while stream.read(&mut bytes).is_ok_and(|len| len > 0) {}
}

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

#[test]
fn a_server_that_ends_at_any_byte_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    for style in STYLES {
        let whole = session(style);
        stage.play(whole.clone()).unwrap();
        for end in 0..whole.len() {
            let error = stage.fails(&format!("{style:?} {end}"), whole[..end].to_vec());
            assert!(
                error.contains("closed the connection") || error.contains("broke"),
                "{error}"
            );
        }
    }
}

#[test]
fn any_wrong_byte_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let mut noticed = 0;
    for style in STYLES {
        let whole = session(style);
        for at in 0..whole.len() {
            for change in [0x01, 0x80, 0xff] {
                // Of the payload, one in the middle says it all.
                let data = whole[at.saturating_sub(9)..]
                    .iter()
                    .take(18)
                    .all(|byte| *byte == 9);
                if data {
                    continue;
                }
                let mut wrong = whole.clone();
                wrong[at] ^= change;
                let outcome = std::panic::catch_unwind(|| stage.play(wrong));
                match outcome {
                    Ok(Err(error)) => {
                        noticed += 1;
                        let text = error.to_string();
                        assert_eq!(
                            text.matches(&stage.uri.to_string()).count(),
                            1,
                            "{style:?} {at}: {text}"
                        );
                    }
                    Ok(Ok(())) => {}
                    // The test's own look at what was read.
                    Err(panic) => {
                        let text = panic.downcast_ref::<String>();
                        assert!(
                            text.is_some_and(|text| text.contains("[9, 9, 9")),
                            "{text:?}"
                        );
                    }
                }
            }
        }
    }
    assert!(noticed > 1000, "{noticed}");
}

#[test]
fn what_a_server_says_of_an_export_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let go = |answers: &[Vec<u8>]| {
        let mut script = handshake(Style::Simple);
        script.truncate(3);
        script.extend(answers.iter().map(|data| answer(opt::GO, rep::INFO, data)));
        script.push(answer(opt::GO, rep::ACK, &[]));
        script.concat()
    };
    let huge = |len: u64| {
        let head = [
            (OPTION_REPLY_MAGIC, 8),
            (u64::from(opt::EXTENDED_HEADERS), 4),
            (u64::from(rep::ACK), 4),
            (len, 4),
        ];
        [greeting(), fields(&head)].concat()
    };
    let endless = [
        greeting(),
        answer(opt::EXTENDED_HEADERS, 99, &[]).repeat(200),
    ]
    .concat();
    for (what, script, why) in [
        (
            "no server",
            b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
            "this is no NBD server",
        ),
        (
            "http",
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            "this is no NBD server",
        ),
        (
            "old",
            words(&[INIT_MAGIC, nbd::proto::OLD_STYLE_MAGIC, SIZE]),
            "the old style",
        ),
        (
            "a huge answer",
            huge(u32::MAX.into()),
            "an answer of 4 GiB, more than 64 KiB",
        ),
        ("answers without end", endless, "more than 100 answers"),
        (
            "no size",
            go(&[blocks(1, 4096, 65536)]),
            "how large the export is",
        ),
        (
            "a huge disk",
            go(&[export(u64::MAX)]),
            "more than a disk can have",
        ),
        (
            "half a block",
            go(&[export(513), blocks(512, 4096, 65536)]),
            "no whole blocks",
        ),
        (
            "no block",
            go(&[export(SIZE), blocks(0, 4096, 65536)]),
            "blocks of 0 to",
        ),
        (
            "a crooked block",
            go(&[export(SIZE), blocks(3, 4096, 65536)]),
            "blocks of 3 to",
        ),
        (
            "a huge block",
            go(&[export(SIZE), blocks(1 << 30, 1 << 30, u64::from(u32::MAX))]),
            "blocks of 1073741824",
        ),
        (
            "only small blocks",
            go(&[export(SIZE), blocks(1, 4096, 511)]),
            "to 511 bytes",
        ),
        (
            "max below min",
            go(&[export(SIZE), blocks(4096, 4096, 512)]),
            "blocks of 4096 to 512",
        ),
        (
            "half an export",
            go(&[export(SIZE)[..9].to_vec()]),
            "an information of 9 bytes",
        ),
        (
            "too much of it",
            go(&[[export(SIZE), vec![0]].concat()]),
            "an information of 13 bytes",
        ),
        ("nothing of it", go(&[vec![0]]), "without its type"),
        (
            "TLS",
            [
                greeting(),
                answer(opt::EXTENDED_HEADERS, rep::ERR_TLS_REQD, b""),
                answer(opt::STRUCTURED_REPLY, rep::ERR_TLS_REQD, b""),
                answer(opt::GO, rep::ERR_TLS_REQD, b""),
            ]
            .concat(),
            "wants TLS",
        ),
        (
            "words that steer a terminal",
            {
                let mut script = handshake(Style::Simple);
                script.truncate(3);
                script.push(answer(opt::GO, rep::ERR_POLICY, b"\x1b[2Jgo away"));
                script.concat()
            },
            "go away",
        ),
    ] {
        let error = stage.fails(what, script);
        assert!(error.contains(why), "{what}: {error}");
        assert!(!error.contains('\x1b'), "{what}: {error:?}");
        assert!(error.contains("handshake"), "{what}: {error}");
    }
}

/// A server that answers each request by what `program` says of it: its type, and how many there were.
fn programmed(
    dir: &Path,
    mut program: impl FnMut(u16, u64) -> Option<Vec<u8>> + Send + 'static,
) -> Uri {
    let path = dir.join("p");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(&handshake(Style::Structured).concat())
            .unwrap();
        // The client's flags and options: the greeting's answer, two options without data, two with.
        let (name, context) = ("disk".len(), ALLOCATION.len());
        let mut options = vec![0; 4 + 4 * 16 + 4 + name + 4 + 4 + context + 4 + name + 2 + 2];
        stream.read_exact(&mut options).unwrap();
        let mut nth = 0;
        let mut header = [0; 28];
        while stream.read_exact(&mut header).is_ok() {
            nth += 1;
            let kind = u16::from_be_bytes([header[6], header[7]]);
            if let Some(bytes) = program(kind, nth)
                && stream.write_all(&bytes).is_err()
            {
                return;
            }
        }
    });
    let uri = format!("nbd+unix:///disk?socket={}", path.display());
    Uri::parse(&uri).unwrap()
}

#[test]
fn block_status_byte_by_byte_does_not_go_on_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let (count, counted) = mpsc::channel();
    let uri = programmed(dir.path(), move |kind, nth| {
        assert_eq!(kind, nbd::proto::cmd::BLOCK_STATUS);
        count.send(nth).unwrap();
        let one = fields(&[(CONTEXT.into(), 4), (512, 4), (3, 4)]);
        Some(reply(Style::Structured, nth, chunk::BLOCK_STATUS, &one))
    });
    let client = Client::connect(&uri, &Options::default()).unwrap();
    let (mut at, mut zeros) = (0, 0);
    while at < SIZE {
        let (end, kind) = client.run(at, SIZE - at).unwrap();
        zeros += if kind.is_zero() { end - at } else { 0 };
        at = end;
    }
    drop(client);
    // What was said is believed; of the rest nothing is known, 64 KiB at a time.
    let asked = counted.iter().last().unwrap();
    assert!((1024..1024 + 16).contains(&asked), "{asked}");
    assert_eq!(zeros, asked * 512);
}

#[test]
fn silence_in_the_middle_of_anything_ends() {
    let dir = tempfile::tempdir().unwrap();
    // The header of a reply, and half of what was asked for.
    let uri = programmed(dir.path(), |_, nth| {
        let data = [&0u64.to_be_bytes()[..], &[1; 512]].concat();
        let whole = reply(Style::Structured, nth, chunk::OFFSET_DATA, &data);
        Some(whole[..whole.len() - 100].to_vec())
    });
    let options = Options {
        silence: Some(Duration::from_millis(50)),
        ..Options::default()
    };
    let disk = disk(&uri, &options).unwrap();
    let error = disk.read_at(0, &mut [0; 512]).unwrap_err().to_string();
    assert_eq!(error.matches(&uri.to_string()).count(), 1, "{error}");
    assert!(
        error.contains("reading 512 bytes at byte 0: the server has been silent for 0.05 s"),
        "{error}"
    );
    // It is over: what comes late is not taken for an answer to anything.
    let again = disk.sync().unwrap_err().to_string();
    assert!(again.contains("has been silent"), "{again}");
}

#[test]
fn connecting_is_tried_again_for_as_long_as_was_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late");
    let uri = Uri::parse(&format!("nbd+unix:///disk?socket={}", path.display())).unwrap();
    let error = Client::connect(&uri, &Options::default()).unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::NotFound);
    let options = Options {
        open_for: Duration::from_secs(100),
        ..Options::default()
    };
    thread::scope(|scope| {
        let client = scope.spawn(|| Client::connect(&uri, &options).map(drop));
        // Nobody listens; then one who has no such export; then one who has.
        let listener = UnixListener::bind(&path).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let none = [
            (opt::EXTENDED_HEADERS, rep::ERR_UNSUP),
            (opt::STRUCTURED_REPLY, rep::ERR_UNSUP),
            (opt::GO, rep::ERR_UNKNOWN),
        ];
        let none = none
            .map(|(option, kind)| answer(option, kind, &[]))
            .concat();
        stream.write_all(&[greeting(), none].concat()).unwrap();
        drain(stream);
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(&handshake(Style::Simple).concat())
            .unwrap();
        drain(stream);
        client.join().unwrap().unwrap();
    });
    // A signal ends it.
    let stopped = Options {
        cancelled: Some(|| true),
        ..options
    };
    let nowhere = Uri::parse("nbd+unix:///?socket=nowhere").unwrap();
    let error = Client::connect(&nowhere, &stopped).unwrap_err();
    assert_eq!(error.kind(), block::ErrorKind::Interrupted);
}

/// A server whose connections each end as `scripts` do, one after the other: what it says at once, and then no more. Returns
/// how many have come.
fn scripted(dir: &Path, scripts: Vec<Vec<u8>>) -> (Uri, mpsc::Receiver<()>) {
    let path = dir.join("again");
    let listener = UnixListener::bind(&path).unwrap();
    let (come, came) = mpsc::channel();
    thread::spawn(move || {
        for script in scripts {
            let (mut stream, _) = listener.accept().unwrap();
            come.send(()).unwrap();
            if stream.write_all(&script).is_ok() {
                let _ = stream.shutdown(Shutdown::Write);
                drain(stream);
            }
        }
    });
    let uri = format!("nbd+unix:///disk?socket={}", path.display());
    (Uri::parse(&uri).unwrap(), came)
}

#[test]
fn requests_wait_for_a_connection_that_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let again = Options {
        reconnect_for: Some(Duration::from_secs(100)),
        ..Options::default()
    };
    let style = Style::Structured;
    let hello = || handshake(style).concat();
    let data = [&0u64.to_be_bytes()[..], &[5; 512]].concat();
    // The first ends before it answers, one refuses, one breaks within the payload, and one answers.
    let answered = [hello(), reply(style, 1, chunk::OFFSET_DATA, &data)].concat();
    let half = answered[..answered.len() - 100].to_vec();
    let scripts = vec![hello(), Vec::new(), half, answered.clone()];
    let (uri, came) = scripted(dir.path(), scripts);
    let disk = disk(&uri, &again).unwrap();
    let mut buf = [0; 512];
    disk.read_at(0, &mut buf).unwrap();
    assert_eq!(buf, [5; 512]);
    drop(disk);
    assert_eq!(came.iter().count(), 4);

    // Without a delay a disk that is only read is connected to once more, by each request; after a write it is not.
    let dir = tempfile::tempdir().unwrap();
    let written = [hello(), reply(style, 1, chunk::NONE, &[])].concat();
    let scripts = vec![
        hello(),
        answered.clone(),
        hello(),
        hello(),
        written,
        answered.clone(),
    ];
    let (uri, _came) = scripted(dir.path(), scripts);
    let once = Options {
        reconnect_for: Some(Duration::ZERO),
        ..Options::default()
    };
    let disk = self::disk(&uri, &once).unwrap();
    disk.read_at(0, &mut buf).unwrap();
    // The one that answered has ended; the two that follow answer nothing.
    let error = disk.read_at(0, &mut buf).unwrap_err().to_string();
    assert!(error.contains("closed the connection"), "{error}");
    disk.write_at(0, &buf).unwrap();
    let error = disk.read_at(0, &mut buf).unwrap_err().to_string();
    assert!(error.contains("closed the connection"), "{error}");

    // Another disk by that name is none that is waited for; and nobody waits who did not ask for it.
    for (options, next, says) in [
        (
            again,
            handshake_of(style, SIZE * 2).concat(),
            "another disk",
        ),
        (Options::default(), hello(), "closed the connection"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (uri, _came) = scripted(dir.path(), vec![hello(), next, answered.clone()]);
        let disk = self::disk(&uri, &options).unwrap();
        let error = disk.read_at(0, &mut buf).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    // Each waits as long as was said, and no longer; whoever comes afterwards tries once.
    let dir = tempfile::tempdir().unwrap();
    let (uri, _came) = scripted(dir.path(), vec![hello()]);
    let short = Options {
        reconnect_for: Some(Duration::from_millis(300)),
        ..Options::default()
    };
    let disk = self::disk(&uri, &short).unwrap();
    for _ in 0..2 {
        let error = disk.read_at(0, &mut buf).unwrap_err().to_string();
        assert!(
            error.contains("connecting again failed for 0.3 s"),
            "{error}"
        );
        assert_eq!(error.matches(&uri.to_string()).count(), 1, "{error}");
    }
}
