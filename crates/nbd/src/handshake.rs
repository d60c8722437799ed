//! From a connected socket to an export that takes requests: fixed newstyle negotiation (`doc/proto.md`, "Newstyle
//! negotiation"), from the client's side.
//!
//! ```text
//!   greeting · EXTENDED_HEADERS, else STRUCTURED_REPLY · [SET_META_CONTEXT base:allocation] · GO, else EXPORT_NAME
//! ```

use crate::proto::{
    ALLOCATION, Fields, INIT_MAGIC, OLD_STYLE_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    PAYLOAD_BYTES_MAX, Style, handshake_flag, info, opt, rep, transmission_flag,
};
use crate::socket::{Socket, Wait};
use crate::uri::Uri;
use block::{Context, Error, ErrorKind, Result, limits, size};
use std::io::IoSlice;
use std::time::{Duration, Instant};

/// How long a server may take until an export takes requests.
const HANDSHAKE_MAX: Duration = Duration::from_secs(20);
/// Bytes of an answer to an option that are believed.
const REPLY_BYTES_MAX: u32 = 64 << 10;
/// Answers to one option that are believed.
const REPLIES_MAX: usize = 100;
/// Bytes that a server may ask all requests to be multiples of, at most ("size constraints").
const BLOCK_MIN_MAX: u32 = 64 << 10;
/// Bytes of a request that a server must take, at least: of those that it prefers ("size constraints").
const BLOCK_MAX_MIN: u32 = 512;
/// Zeros behind an answer to `EXPORT_NAME` of a server that does not leave them out.
const EXPORT_ZEROES: usize = 124;

/// What the server said of the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// How requests and replies look.
    pub style: Style,
    /// What requests must be multiples of, in bytes: a power of two.
    pub block_min: u32,
    /// Bytes of a read or write at most, at least `block_min`.
    pub block_max: u32,
    /// The id of `base:allocation`, or of the context in its place, where it was asked for and is there.
    pub allocation: Option<u32>,
}

impl Export {
    /// Whether the server set that transmission flag.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// How to negotiate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Ask for block status (`base:allocation`, or [`Uri::context`]).
    pub allocation: bool,
    /// How long the handshake may take; absent: 20 seconds.
    pub time: Option<Duration>,
    /// See [`Wait::cancelled`].
    pub cancelled: Option<fn() -> bool>,
}

fn nonsense(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Io, what)
}

/// Connects and negotiates.
///
/// # Errors
///
/// Nobody listens, the server has no such export, it wants TLS, it breaks the protocol or takes too long.
pub fn open(uri: &Uri, options: &Options) -> Result<(Socket, Export)> {
    let mut wait = Wait {
        until: Some(Instant::now() + options.time.unwrap_or(HANDSHAKE_MAX)),
        cancelled: options.cancelled,
        ..Wait::default()
    };
    let socket = Socket::connect(&uri.server, &wait)?;
    let context = uri.context.as_deref().unwrap_or(ALLOCATION);
    let context = options.allocation.then_some(context);
    let agreed = negotiate(&socket, &uri.export, context, &wait);
    let agreed = agreed.and_then(|export| match (&uri.context, export.allocation) {
        (Some(context), None) if options.allocation => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "requested x-dirty-bitmap {} not found",
                block::plain(context)
            ),
        )),
        _ => Ok(export),
    });
    match agreed {
        Ok(export) => Ok((socket, export)),
        Err(error) => {
            // As it is proper; nobody waits for a server that does not take it.
            wait.until = Some(Instant::now());
            let (socket, wait) = (&socket, &wait);
            let _ = Dialogue { socket, wait }.send_option(opt::ABORT, &[]);
            Err(error.within("handshake"))
        }
    }
}

/// Why an option was not acknowledged.
#[derive(Debug)]
struct Refused {
    kind: u32,
    text: String,
}

impl Refused {
    fn error(self, what: &str) -> Error {
        let (kind, why) = match (self.kind, self.text.is_empty()) {
            (rep::ERR_TLS_REQD, _) => (
                ErrorKind::Unsupported,
                "the server wants TLS, which this client lacks".to_owned(),
            ),
            (rep::ERR_UNKNOWN, true) => (ErrorKind::NotFound, "there is no such export".to_owned()),
            (rep::ERR_UNKNOWN, false) => (ErrorKind::NotFound, self.text),
            (rep::ERR_POLICY, true) => (ErrorKind::Denied, "the server does not allow it".into()),
            (rep::ERR_POLICY, false) => (ErrorKind::Denied, self.text),
            (kind, true) => (
                ErrorKind::Io,
                format!("refused (error {})", kind & !rep::FLAG_ERROR),
            ),
            (_, false) => (ErrorKind::Io, format!("refused: {}", self.text)),
        };
        Error::new(kind, format!("{what}: {why}"))
    }
}

/// The dialogue about options.
struct Dialogue<'a> {
    socket: &'a Socket,
    wait: &'a Wait,
}

/// `context`: what block status is asked for.
fn negotiate(socket: &Socket, name: &str, context: Option<&str>, wait: &Wait) -> Result<Export> {
    let dialogue = Dialogue { socket, wait };
    let no_zeroes = dialogue.greet().context(|| "greeting")?;
    let style = if dialogue.agree(opt::EXTENDED_HEADERS)? {
        Style::Extended
    } else if dialogue.agree(opt::STRUCTURED_REPLY)? {
        Style::Structured
    } else {
        Style::Simple
    };
    let mut export = Export {
        size: 0,
        flags: 0,
        style,
        // What a client may take for granted of a server that does not say ("size constraints").
        block_min: 1,
        block_max: PAYLOAD_BYTES_MAX,
        allocation: None,
    };
    if let Some(context) = context.filter(|_| style != Style::Simple) {
        export.allocation = dialogue.set_meta_context(name, context)?;
    }
    dialogue.go(name, no_zeroes, &mut export)?;
    let (min, max) = (export.block_min, export.block_max);
    if !min.is_power_of_two() || min > BLOCK_MIN_MAX || max < min.max(BLOCK_MAX_MIN) {
        return Err(nonsense(format!(
            "the server takes blocks of {min} to {max} bytes; the smallest is a power of two of at most {BLOCK_MIN_MAX}, \
             the largest not below that and {BLOCK_MAX_MIN}"
        )));
    }
    if export.size > limits::DISK_BYTES_MAX {
        return Err(nonsense(format!(
            "the export has {} bytes, more than a disk can have: {}",
            export.size,
            limits::DISK_BYTES_MAX
        )));
    }
    if !export.size.is_multiple_of(min.into()) {
        return Err(nonsense(format!(
            "the export has {} bytes, which are no whole blocks of the {min} bytes that the server asks for",
            export.size
        )));
    }
    Ok(export)
}

impl Dialogue<'_> {
    fn read<const N: usize>(&self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.socket.read(&mut bytes, self.wait)?;
        Ok(bytes)
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        self.socket.write(&mut [IoSlice::new(bytes)], self.wait)
    }

    /// Whether the server leaves out zeros.
    fn greet(&self) -> Result<bool> {
        if u64::from_be_bytes(self.read()?) != INIT_MAGIC {
            return Err(nonsense("this is no NBD server"));
        }
        match u64::from_be_bytes(self.read()?) {
            OPTION_MAGIC => {}
            OLD_STYLE_MAGIC => {
                return Err(nonsense(
                    "the server speaks the old style of NBD only, which negotiates nothing",
                ));
            }
            _ => return Err(nonsense("the greeting is of no known style")),
        }
        let flags = u16::from_be_bytes(self.read()?);
        if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
            return Err(nonsense("the server does not negotiate options"));
        }
        let no_zeroes = flags & handshake_flag::NO_ZEROES;
        let own = u32::from(handshake_flag::FIXED_NEWSTYLE | no_zeroes);
        self.send(&own.to_be_bytes())?;
        Ok(no_zeroes != 0)
    }

    /// Whether the server agrees to an option without data.
    fn agree(&self, option: u32) -> Result<bool> {
        Ok(self.ask(option, &[], |_, _| Ok(()))?.is_ok())
    }

    /// The id of `context`, where the server has it.
    fn set_meta_context(&self, name: &str, context: &str) -> Result<Option<u32>> {
        let mut data = Vec::new();
        put_string(&mut data, name)?;
        data.extend(1u32.to_be_bytes());
        put_string(&mut data, context)?;
        let mut id = None;
        let answer = self.ask(opt::SET_META_CONTEXT, &data, |kind, bytes| {
            let mut fields = Fields(bytes);
            match (kind, fields.u32()) {
                (rep::META_CONTEXT, Some(number)) if fields.0 == context.as_bytes() => {
                    id = Some(number);
                    Ok(())
                }
                (rep::META_CONTEXT, _) => Err(nonsense("a context that nobody asked for")),
                _ => Ok(()),
            }
        })?;
        // A server without contexts, or without this export: what it says to GO counts.
        Ok(id.filter(|_| answer.is_ok()))
    }

    fn go(&self, name: &str, no_zeroes: bool, export: &mut Export) -> Result<()> {
        let mut data = Vec::new();
        put_string(&mut data, name)?;
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        let mut known = false;
        let answer = self.ask(opt::GO, &data, |kind, bytes| {
            if kind != rep::INFO {
                return Ok(());
            }
            let mut fields = Fields(bytes);
            let Some(kind) = fields.u16() else {
                return Err(nonsense("an information without its type"));
            };
            let wrong = || nonsense(format!("an information of {} bytes", bytes.len()));
            match kind {
                info::EXPORT => {
                    export.size = fields.u64().ok_or_else(wrong)?;
                    export.flags = fields.u16().ok_or_else(wrong)?;
                    known = true;
                }
                info::BLOCK_SIZE => {
                    export.block_min = fields.u32().ok_or_else(wrong)?;
                    fields.u32().ok_or_else(wrong)?;
                    export.block_max = fields.u32().ok_or_else(wrong)?;
                }
                _ => return Ok(()),
            }
            match fields.is_empty() {
                true => Ok(()),
                false => Err(wrong()),
            }
        })?;
        match answer {
            Ok(()) if known => {}
            Ok(()) => return Err(nonsense("the server does not say how large the export is")),
            // Servers that are older than the option: qemu's up to 2.9.
            Err(refused) if refused.kind == rep::ERR_UNSUP => {
                self.export_name(name, no_zeroes, export)?;
            }
            Err(refused) => return Err(refused.error(&format!("export '{}'", block::plain(name)))),
        }
        if !export.has(transmission_flag::HAS_FLAGS) {
            export.flags = 0;
        }
        Ok(())
    }

    fn export_name(&self, name: &str, no_zeroes: bool, export: &mut Export) -> Result<()> {
        self.send_option(opt::EXPORT_NAME, name.as_bytes())?;
        let named = || {
            let name = block::plain(name);
            format!("export '{name}' (the server closes the connection where there is none)")
        };
        export.size = u64::from_be_bytes(self.read().context(named)?);
        export.flags = u16::from_be_bytes(self.read().context(named)?);
        if !no_zeroes {
            self.read::<EXPORT_ZEROES>().context(named)?;
        }
        Ok(())
    }

    fn send_option(&self, option: u32, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len()).map_err(|_| Error::invalid("an option is too long"))?;
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend(len.to_be_bytes());
        message.extend(data);
        self.send(&message)
    }

    /// Sends an option, hands each answer to `each`, with its type, and returns the end: acknowledged, or why not.
    fn ask(
        &self,
        option: u32,
        data: &[u8],
        mut each: impl FnMut(u32, &[u8]) -> Result<()>,
    ) -> Result<Result<(), Refused>> {
        let named = || format!("option {option}");
        self.send_option(option, data).context(named)?;
        for _ in 0..REPLIES_MAX {
            let header = self.read::<20>().context(named)?;
            let mut fields = Fields(&header);
            let (magic, about) = (fields.u64(), fields.u32());
            let (Some(kind), Some(len)) = (fields.u32(), fields.u32()) else {
                return Err(nonsense("an answer without a header").within(named()));
            };
            if magic != Some(OPTION_REPLY_MAGIC) || about != Some(option) {
                return Err(nonsense("this is no answer").within(named()));
            }
            if len > REPLY_BYTES_MAX {
                let (len, most) = (size::human(len.into()), size::human(REPLY_BYTES_MAX.into()));
                return Err(
                    nonsense(format!("an answer of {len}, more than {most}")).within(named())
                );
            }
            let mut reply = vec![0; len as usize];
            self.socket.read(&mut reply, self.wait).context(named)?;
            match kind {
                rep::ACK => return Ok(Ok(())),
                kind if kind & rep::FLAG_ERROR != 0 => {
                    return Ok(Err(Refused {
                        kind,
                        text: block::plain(&String::from_utf8_lossy(&reply)),
                    }));
                }
                kind => each(kind, &reply).context(named)?,
            }
        }
        Err(nonsense(format!("more than {REPLIES_MAX} answers")).within(named()))
    }
}

fn put_string(to: &mut Vec<u8>, text: &str) -> Result<()> {
    let len = u32::try_from(text.len()).map_err(|_| Error::invalid("a name is too long"))?;
    to.extend(len.to_be_bytes());
    to.extend(text.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read as _, Write as _};

    const FIXED: u16 = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;

    fn greeting(flags: u16) -> Vec<u8> {
        let words = [INIT_MAGIC, OPTION_MAGIC];
        let mut bytes = words.map(u64::to_be_bytes).concat();
        bytes.extend(flags.to_be_bytes());
        bytes
    }

    fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn size_info(size: u64) -> Vec<u8> {
        let flags = transmission_flag::HAS_FLAGS | transmission_flag::SEND_FLUSH;
        [
            &info::EXPORT.to_be_bytes()[..],
            &size.to_be_bytes(),
            &flags.to_be_bytes(),
        ]
        .concat()
    }

    fn blocks(min: u32, max: u32) -> Vec<u8> {
        let mut bytes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        [min, 4096, max]
            .iter()
            .for_each(|n| bytes.extend(n.to_be_bytes()));
        bytes
    }

    /// Negotiates with a server that says all of `script` at once, and then no more.
    fn with(script: &[Vec<u8>]) -> (Result<Export>, Vec<u8>) {
        let (socket, mut server) = Socket::pair();
        server.write_all(&script.concat()).unwrap();
        server.shutdown(std::net::Shutdown::Write).unwrap();
        let found = negotiate(&socket, "disk", Some(ALLOCATION), &Wait::default());
        drop(socket);
        let mut said = Vec::new();
        // Where the client left something unread, the end is an error.
        let _ = server.read_to_end(&mut said);
        (found, said)
    }

    #[test]
    fn what_the_server_has_is_agreed_on() {
        let no = |option| answer(option, rep::ERR_UNSUP, b"");
        let yes = |option| answer(option, rep::ACK, b"");
        let context = [&7u32.to_be_bytes()[..], ALLOCATION.as_bytes()].concat();
        let go = [
            answer(opt::GO, rep::INFO, &size_info(1 << 20)),
            answer(opt::GO, rep::INFO, &[0, 99, 1]),
            answer(opt::GO, rep::INFO, &blocks(512, 1 << 20)),
            yes(opt::GO),
        ]
        .concat();
        let full = Export {
            size: 1 << 20,
            flags: transmission_flag::HAS_FLAGS | transmission_flag::SEND_FLUSH,
            style: Style::Structured,
            block_min: 512,
            block_max: 1 << 20,
            allocation: Some(7),
        };
        let (found, said) = with(&[
            greeting(FIXED),
            no(opt::EXTENDED_HEADERS),
            yes(opt::STRUCTURED_REPLY),
            answer(opt::SET_META_CONTEXT, rep::META_CONTEXT, &context),
            yes(opt::SET_META_CONTEXT),
            go.clone(),
        ]);
        assert_eq!(found.unwrap(), full);
        // Flags, and four options with nothing, nothing, a name and a query, a name and an information.
        let lens = [0, 0, 4 + 4 + 4 + 4 + ALLOCATION.len(), 4 + 4 + 2 + 2];
        assert_eq!(said.len(), 4 + 4 * 16 + lens.iter().sum::<usize>());
        let (found, _) = with(&[
            greeting(FIXED),
            yes(opt::EXTENDED_HEADERS),
            no(opt::SET_META_CONTEXT),
            go,
        ]);
        let expected = Export {
            style: Style::Extended,
            allocation: None,
            ..full
        };
        assert_eq!(found.unwrap(), expected);
        // A server from before `GO`: simple replies, and zeros behind its answer.
        let (found, said) = with(&[
            greeting(handshake_flag::FIXED_NEWSTYLE),
            no(opt::EXTENDED_HEADERS),
            no(opt::STRUCTURED_REPLY),
            no(opt::GO),
            4096u64.to_be_bytes().to_vec(),
            vec![0; 2 + EXPORT_ZEROES],
        ]);
        let found = found.unwrap();
        assert_eq!((found.size, found.flags, found.block_min), (4096, 0, 1));
        assert_eq!(found.block_max, PAYLOAD_BYTES_MAX);
        assert!(said.ends_with(b"disk"));
    }

    #[test]
    fn what_is_no_server_for_us_is_refused_with_the_reason() {
        let simple = || {
            [
                greeting(FIXED),
                answer(opt::EXTENDED_HEADERS, rep::ERR_UNSUP, b""),
                answer(opt::STRUCTURED_REPLY, rep::ERR_UNSUP, b""),
            ]
            .concat()
        };
        let go = |info: &[u8]| {
            let size = answer(opt::GO, rep::INFO, &size_info(1000));
            let info = answer(opt::GO, rep::INFO, info);
            [simple(), size, info, answer(opt::GO, rep::ACK, b"")].concat()
        };
        let refused = |kind, text: &[u8]| [simple(), answer(opt::GO, kind, text)].concat();
        let mut old = INIT_MAGIC.to_be_bytes().to_vec();
        old.extend(OLD_STYLE_MAGIC.to_be_bytes());
        let endless = answer(opt::EXTENDED_HEADERS, rep::INFO, b"");
        let mut long = answer(opt::EXTENDED_HEADERS, rep::INFO, b"");
        long[16..].copy_from_slice(&u32::MAX.to_be_bytes());
        for (script, kind, what) in [
            (b"HTTP/1.1 400 ".to_vec(), ErrorKind::Io, "no NBD server"),
            (old, ErrorKind::Io, "old style of NBD"),
            (vec![], ErrorKind::Io, "closed the connection"),
            (greeting(0), ErrorKind::Io, "does not negotiate"),
            (
                greeting(FIXED),
                ErrorKind::Io,
                "option 11: the server closed",
            ),
            (
                [greeting(FIXED), answer(1, rep::ACK, b"")].concat(),
                ErrorKind::Io,
                "this is no answer",
            ),
            (
                [greeting(FIXED), endless.repeat(REPLIES_MAX)].concat(),
                ErrorKind::Io,
                "more than 100 answers",
            ),
            (
                [greeting(FIXED), long].concat(),
                ErrorKind::Io,
                "more than 64 KiB",
            ),
            (
                refused(rep::ERR_TLS_REQD, b""),
                ErrorKind::Unsupported,
                "wants TLS",
            ),
            (
                refused(rep::ERR_UNKNOWN, b""),
                ErrorKind::NotFound,
                "export 'disk': there is no such export",
            ),
            (
                refused(rep::ERR_POLICY, b"not you\x1b[2J"),
                ErrorKind::Denied,
                "not you",
            ),
            (refused(rep::ERR_INVALID, b""), ErrorKind::Io, "(error 3)"),
            (
                refused(rep::ACK, b""),
                ErrorKind::Io,
                "how large the export is",
            ),
            (go(&[0]), ErrorKind::Io, "without its type"),
            (go(&blocks(512, 4096)[..13]), ErrorKind::Io, "of 13 bytes"),
            (go(&blocks(0, 4096)), ErrorKind::Io, "blocks of 0 to 4096"),
            (go(&blocks(3, 4096)), ErrorKind::Io, "blocks of 3 to 4096"),
            (
                go(&blocks(1 << 17, 1 << 20)),
                ErrorKind::Io,
                "blocks of 131072",
            ),
            (go(&blocks(512, 256)), ErrorKind::Io, "512 to 256"),
            (go(&blocks(512, 4096)), ErrorKind::Io, "no whole blocks"),
            (
                go(&size_info(u64::MAX)),
                ErrorKind::Io,
                "more than a disk can have",
            ),
        ] {
            let error = with(&[script]).0.unwrap_err();
            let text = error.to_string();
            assert!(text.contains(what), "{what}: {text}");
            assert_eq!(error.kind(), kind, "{text}");
            assert!(!text.contains('\x1b'), "{text:?}");
        }
    }

    #[test]
    fn nobody_waits_longer_than_allowed() {
        let (socket, _server) = Socket::pair();
        let wait = Wait {
            until: Some(Instant::now()),
            cancelled: None,
            ..Wait::default()
        };
        let error = negotiate(&socket, "", None, &wait).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        let wait = Wait {
            until: None,
            cancelled: Some(|| true),
            ..Wait::default()
        };
        let error = negotiate(&socket, "", None, &wait).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_answers_are_survived(
            answers in proptest::collection::vec(
                (0u32..13, 0usize..6, proptest::collection::vec(any::<u8>(), 0..20)), 0..8),
            flags in any::<u16>()
        ) {
            let kinds = [rep::ACK, rep::INFO, rep::META_CONTEXT, rep::ERR_UNSUP, rep::ERR_POLICY, 9];
            let mut script = vec![greeting(flags)];
            script.extend(answers.iter().map(|(option, kind, data)| answer(*option, kinds[*kind], data)));
            let _ = with(&script);
        }
    }
}
