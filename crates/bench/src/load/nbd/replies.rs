//! The stream of replies, cut into headers and payload as it arrives. Payload is counted and dropped.

use block::Result;
use nbd::{
    proto::Style,
    reply::{Chunk as Found, Kind, broken},
};

/// Bytes that fit: some replies of small reads, or a part of a large one.
const BUFFER_BYTES: usize = 256 << 10;

/// What a slot waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Waiting {
    pub busy: bool,
    /// Bytes that the reply brings in all.
    pub expected: u64,
    arrived: u64,
    failed: bool,
}

impl Waiting {
    pub(super) fn new(expected: u64) -> Self {
        Self {
            busy: true,
            expected,
            ..Self::default()
        }
    }
}

/// A piece of the stream.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    slot: usize,
    done: bool,
    /// Payload that follows and is of no interest.
    payload: u64,
}

#[derive(Debug)]
pub(super) struct Replies {
    style: Style,
    buffer: Box<[u8]>,
    /// The bytes that have arrived and were not looked at: from here…
    from: usize,
    /// … to here.
    to: usize,
    /// The chunk whose payload is being dropped.
    current: Option<Chunk>,
    pub waiting: Vec<Waiting>,
}

impl Replies {
    pub(super) fn new(style: Style, depth: usize) -> Self {
        Self {
            style,
            buffer: vec![0; BUFFER_BYTES].into(),
            from: 0,
            to: 0,
            current: None,
            waiting: vec![Waiting::default(); depth],
        }
    }

    /// Where the next bytes of the stream go; never empty.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.from > 0 {
            // What is left is less than a header.
            self.buffer.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
        }
        &mut self.buffer[self.to..]
    }

    /// Takes `bytes` more, which lie at the front of [`Replies::room`]; hands each slot whose reply is complete to `end`,
    /// with whether it succeeded.
    pub(super) fn arrived(&mut self, bytes: usize, mut end: impl FnMut(usize, bool)) -> Result<()> {
        self.to += bytes;
        loop {
            let chunk = match &mut self.current {
                Some(chunk) => chunk,
                none => {
                    let bytes = &self.buffer[self.from..self.to];
                    let parsed = parse(bytes, self.style, &mut self.waiting)?;
                    let Some((header, chunk)) = parsed else {
                        return Ok(());
                    };
                    self.from += header;
                    none.insert(chunk)
                }
            };
            let there = (self.to - self.from) as u64;
            let taken = chunk.payload.min(there);
            chunk.payload -= taken;
            self.from += taken as usize;
            if chunk.payload > 0 {
                return Ok(());
            }
            let (slot, done) = (chunk.slot, chunk.done);
            self.current = None;
            if done {
                let waiting = &mut self.waiting[slot];
                waiting.busy = false;
                let (expected, arrived) = (waiting.expected, waiting.arrived);
                if !waiting.failed && arrived != expected {
                    return Err(broken(format_args!(
                        "a read of {expected} bytes was answered with {arrived}"
                    )));
                }
                end(slot, !waiting.failed);
            }
        }
    }
}

/// The chunk at the front of `bytes` and the bytes of its header, with what of its payload counts; `None` when that is
/// not all there.
fn parse(bytes: &[u8], style: Style, waiting: &mut [Waiting]) -> Result<Option<(usize, Chunk)>> {
    let Some((found, mut header)) = Found::parse(style, bytes)? else {
        return Ok(None);
    };
    let cookie = found.cookie;
    let slot = usize::try_from(cookie).ok();
    let busy = slot.and_then(|slot| Some((slot, waiting.get_mut(slot).filter(|w| w.busy)?)));
    let Some((slot, own)) = busy else {
        return Err(broken(format_args!(
            "a reply to request {cookie}, which is not in flight"
        )));
    };
    let mut payload = 0;
    match found.kind {
        Kind::Simple if style == Style::Structured && own.expected > 0 => {
            return Err(broken("a simple reply with data"));
        }
        Kind::Simple => {
            own.arrived = own.expected;
            payload = own.expected;
        }
        Kind::SimpleError(_) => own.failed = true,
        Kind::Nothing => {}
        Kind::Data(len) => {
            own.arrived = own.arrived.saturating_add(len);
            payload = len.saturating_add(8);
        }
        Kind::Hole => {
            let Some(len) = bytes.get(header + 8..).and_then(<[u8]>::first_chunk) else {
                return Ok(None);
            };
            own.arrived += u64::from(u32::from_be_bytes(*len));
            header += 12;
        }
        Kind::Error(len) => {
            own.failed = true;
            payload = len;
        }
        Kind::Status { .. } => return Err(broken("block status that nobody asked for")),
    }
    if own.arrived > own.expected {
        let expected = own.expected;
        return Err(broken(format_args!(
            "a read of {expected} bytes was answered with more"
        )));
    }
    let done = found.done;
    Ok(Some((
        header,
        Chunk {
            slot,
            done,
            payload,
        },
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd::proto::{
        EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk as kind,
    };

    /// Chunks as a server would send them: flags, type, cookie, payload.
    fn chunk(style: Style, flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
        let extended = style == Style::Extended;
        let magic = if extended {
            EXTENDED_REPLY_MAGIC
        } else {
            STRUCTURED_REPLY_MAGIC
        };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        if extended {
            bytes.extend([0; 8]);
            bytes.extend((payload.len() as u64).to_be_bytes());
        } else {
            bytes.extend((payload.len() as u32).to_be_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    fn simple(error: u32, cookie: u64, data: usize) -> Vec<u8> {
        let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(vec![1; data]);
        bytes
    }

    /// Feeds `stream` in steps of `step` bytes to slots 0 (a read of 4096 bytes), 1 (a write) and 2 (a read).
    fn feed(style: Style, stream: &[u8], step: usize) -> Result<Vec<(usize, bool)>> {
        let mut replies = Replies::new(style, 3);
        replies.waiting = [4096, 0, 4096].map(Waiting::new).to_vec();
        let mut ended = Vec::new();
        for bytes in stream.chunks(step) {
            replies.room()[..bytes.len()].copy_from_slice(bytes);
            replies.arrived(bytes.len(), |slot, ok| ended.push((slot, ok)))?;
        }
        Ok(ended)
    }

    fn data(bytes: usize) -> Vec<u8> {
        vec![7; 8 + bytes]
    }

    fn hole(bytes: u32) -> Vec<u8> {
        [&[0; 8][..], &bytes.to_be_bytes()].concat()
    }

    #[test]
    fn replies_are_found_however_they_arrive() {
        for style in [Style::Structured, Style::Extended] {
            let chunk =
                |flags, kind, cookie, payload: &[u8]| chunk(style, flags, kind, cookie, payload);
            let stream = [
                chunk(0, kind::OFFSET_DATA, 0, &data(1024)),
                chunk(1, kind::NONE, 1, &[]),
                chunk(0, kind::OFFSET_HOLE, 0, &hole(3072)),
                chunk(1, kind::ERROR, 2, &[0, 0, 0, 5, 0, 0]),
                chunk(1, kind::NONE, 0, &[]),
            ];
            let stream = stream.concat();
            for step in [1, 7, 100, 1 << 16] {
                let ended = feed(style, &stream, step).unwrap();
                assert_eq!(ended, [(1, true), (2, false), (0, true)], "{step}");
            }
        }
        let stream = [simple(0, 0, 4096), simple(5, 2, 0), simple(0, 1, 0)].concat();
        for step in [1, 100, 1 << 16] {
            let ended = feed(Style::Simple, &stream, step).unwrap();
            assert_eq!(ended, [(0, true), (2, false), (1, true)], "{step}");
        }
    }

    #[test]
    fn what_breaks_the_protocol_is_named() {
        let s = Style::Structured;
        let e = Style::Extended;
        for (style, stream, names) in [
            (s, simple(0, 0, 4096), "a simple reply with data"),
            (s, vec![0x55; 20], "begins with 0x55555555"),
            (e, simple(0, 1, 0), "begins with"),
            (s, chunk(e, 1, 0, 1, &[]), "begins with"),
            (
                s,
                chunk(s, 1, 0, 3, &[]),
                "request 3, which is not in flight",
            ),
            (s, chunk(s, 1, 0, u64::MAX, &[]), "not in flight"),
            (
                s,
                [chunk(s, 1, 0, 1, &[]), chunk(s, 1, 0, 1, &[])].concat(),
                "not in flight",
            ),
            (s, chunk(s, 1, 0, 0, &[]), "4096 bytes was answered with 0"),
            (s, chunk(s, 1, 1, 0, &data(4095)), "was answered with 4095"),
            (s, chunk(s, 0, 1, 0, &data(4097)), "with more"),
            (s, chunk(s, 0, 1, 1, &data(1)), "with more"),
            (s, chunk(s, 0, 2, 0, &hole(u32::MAX)), "with more"),
            (e, chunk(e, 0, 1, 0, &[0; 8]), "type 1 with 8 bytes"),
            (e, chunk(e, 0, 9, 0, &[]), "type 9"),
            (e, chunk(e, 1, 0x8001, 0, &[0; 5000]), "type 32769"),
        ] {
            let error = feed(style, &stream, 1 << 16).unwrap_err().to_string();
            assert!(error.contains(names), "{names}: {error}");
        }
    }
}
