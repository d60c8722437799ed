//! The stream of replies, cut into headers and payload as it arrives. Payload is counted and dropped.

use super::proto::*;
use block::{Error, ErrorKind, Result};

/// Bytes that fit: some replies of small reads, or a part of a large one.
const BUFFER_BYTES: usize = 256 << 10;
/// Bytes of an error's message that are believed.
const ERROR_BYTES_MAX: u64 = 4096 + 14;

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
    headers: Headers,
    buffer: Box<[u8]>,
    /// The bytes that have arrived and were not looked at: from here…
    from: usize,
    /// … to here.
    to: usize,
    /// The chunk whose payload is being dropped.
    current: Option<Chunk>,
    pub waiting: Vec<Waiting>,
}

fn nonsense(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("the server broke the protocol: {what}"),
    )
}

impl Replies {
    pub(super) fn new(headers: Headers, depth: usize) -> Self {
        Self {
            headers,
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
                    let parsed = parse(bytes, self.headers, &mut self.waiting)?;
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
                    return Err(nonsense(format_args!(
                        "a read of {expected} bytes was answered with {arrived}"
                    )));
                }
                end(slot, !waiting.failed);
            }
        }
    }
}

/// The chunk at the front of `bytes` and the bytes of its header; `None` when that is not all there.
fn parse(
    bytes: &[u8],
    headers: Headers,
    waiting: &mut [Waiting],
) -> Result<Option<(usize, Chunk)>> {
    if bytes.len() < 16 {
        return Ok(None);
    }
    let magic = be::<4>(bytes, 0) as u32;
    let slot_at = |cookie: u64, waiting: &[Waiting]| {
        let slot = usize::try_from(cookie).ok();
        let slot = slot.filter(|slot| waiting.get(*slot).is_some_and(|waiting| waiting.busy));
        slot.ok_or_else(|| {
            nonsense(format_args!(
                "a reply to request {cookie}, which is not in flight"
            ))
        })
    };
    if magic == SIMPLE_REPLY_MAGIC && headers != Headers::Extended {
        let slot = slot_at(be::<8>(bytes, 8), waiting)?;
        let own = &mut waiting[slot];
        own.failed = be::<4>(bytes, 4) != 0;
        if headers == Headers::Structured && own.expected > 0 && !own.failed {
            return Err(nonsense("a simple reply with data"));
        }
        own.arrived = if own.failed { 0 } else { own.expected };
        let payload = own.arrived;
        let done = true;
        return Ok(Some((
            16,
            Chunk {
                slot,
                done,
                payload,
            },
        )));
    }
    let (len_at, header) = match (magic, headers) {
        (STRUCTURED_REPLY_MAGIC, Headers::Structured) => (16, 20),
        (EXTENDED_REPLY_MAGIC, Headers::Extended) => (24, 32),
        _ => return Err(nonsense(format_args!("a reply begins with {magic:#x}"))),
    };
    if bytes.len() < header {
        return Ok(None);
    }
    let len = if headers == Headers::Extended {
        be::<8>(bytes, len_at)
    } else {
        be::<4>(bytes, len_at)
    };
    let (flags, kind) = (be::<2>(bytes, 4) as u16, be::<2>(bytes, 6) as u16);
    let slot = slot_at(be::<8>(bytes, 8), waiting)?;
    let own = &mut waiting[slot];
    let wrong = || nonsense(format_args!("a chunk of type {kind} with {len} bytes"));
    let mut header = header;
    let mut payload = len;
    match kind {
        REPLY_TYPE_NONE if len == 0 => {}
        REPLY_TYPE_OFFSET_DATA if len > 8 => own.arrived += len - 8,
        REPLY_TYPE_OFFSET_HOLE if len == 12 => {
            if bytes.len() < header + 12 {
                return Ok(None);
            }
            own.arrived += be::<4>(bytes, header + 8);
            header += 12;
            payload = 0;
        }
        kind if kind & REPLY_TYPE_FLAG_ERROR != 0 && len <= ERROR_BYTES_MAX => own.failed = true,
        _ => return Err(wrong()),
    }
    if own.arrived > own.expected {
        return Err(wrong());
    }
    let done = flags & REPLY_FLAG_DONE != 0;
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

    /// Chunks as a server would send them: flags, type, cookie, payload.
    fn chunk(headers: Headers, flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
        let extended = headers == Headers::Extended;
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
    fn feed(headers: Headers, stream: &[u8], step: usize) -> Result<Vec<(usize, bool)>> {
        let mut replies = Replies::new(headers, 3);
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
        for headers in [Headers::Structured, Headers::Extended] {
            let chunk =
                |flags, kind, cookie, payload: &[u8]| chunk(headers, flags, kind, cookie, payload);
            let stream = [
                chunk(0, REPLY_TYPE_OFFSET_DATA, 0, &data(1024)),
                chunk(1, REPLY_TYPE_NONE, 1, &[]),
                chunk(0, REPLY_TYPE_OFFSET_HOLE, 0, &hole(3072)),
                chunk(1, REPLY_TYPE_FLAG_ERROR + 1, 2, &[0, 0, 0, 5, 0, 0]),
                chunk(1, REPLY_TYPE_NONE, 0, &[]),
            ];
            let stream = stream.concat();
            for step in [1, 7, 100, 1 << 16] {
                let ended = feed(headers, &stream, step).unwrap();
                assert_eq!(ended, [(1, true), (2, false), (0, true)], "{step}");
            }
        }
        let stream = [simple(0, 0, 4096), simple(5, 2, 0), simple(0, 1, 0)].concat();
        for step in [1, 100, 1 << 16] {
            let ended = feed(Headers::Simple, &stream, step).unwrap();
            assert_eq!(ended, [(0, true), (2, false), (1, true)], "{step}");
        }
    }

    #[test]
    fn what_breaks_the_protocol_is_named() {
        let s = Headers::Structured;
        let e = Headers::Extended;
        for (headers, stream, names) in [
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
            (s, chunk(s, 0, 1, 0, &data(4097)), "type 1 with 4105 bytes"),
            (s, chunk(s, 0, 1, 1, &data(1)), "type 1 with"),
            (s, chunk(s, 0, 2, 0, &hole(u32::MAX)), "type 2 with"),
            (e, chunk(e, 0, 1, 0, &[0; 8]), "type 1 with 8 bytes"),
            (e, chunk(e, 0, 9, 0, &[]), "type 9"),
            (e, chunk(e, 1, 0x8001, 0, &[0; 5000]), "type 32769"),
        ] {
            let error = feed(headers, &stream, 1 << 16).unwrap_err().to_string();
            assert!(error.contains(names), "{names}: {error}");
        }
    }
}
