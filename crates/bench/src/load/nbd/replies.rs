//! The stream of replies, cut into headers and payload as it arrives. Payload is counted, and kept only
//! by a load that verifies.

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
    /// Where the request begins on the disk.
    offset: u64,
    arrived: u64,
    failed: bool,
}

impl Waiting {
    pub(super) fn new(expected: u64, offset: u64) -> Self {
        Self {
            busy: true,
            expected,
            offset,
            ..Self::default()
        }
    }
}

/// A piece of the stream.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    slot: usize,
    done: bool,
    /// Its header says that a range reads as zeros.
    hole: bool,
    /// Payload that follows.
    payload: u64,
    content: Content,
}

/// What a payload is.
#[derive(Clone, Copy, Debug)]
enum Content {
    /// Nothing that anybody keeps.
    Other,
    /// The data's offset on the disk, of which so many bytes are there, and then data.
    Offset([u8; 8], usize),
    /// Data, for here in the slot's block.
    Data(u64),
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
    /// Bytes of a slot's block, and all of these, where reads are looked at.
    keep: Option<(usize, Vec<u8>)>,
}

impl Replies {
    /// For so many slots; with `keep` the data of reads of so many bytes are kept.
    pub(super) fn new(style: Style, depth: usize, keep: Option<usize>) -> Self {
        Self {
            style,
            buffer: vec![0; BUFFER_BYTES].into(),
            from: 0,
            to: 0,
            current: None,
            waiting: vec![Waiting::default(); depth],
            keep: keep.map(|block| (block, vec![0; block * depth])),
        }
    }

    /// A slot's block, where reads are looked at.
    pub(super) fn kept(&mut self, slot: usize) -> Option<&mut [u8]> {
        let (block, all) = self.keep.as_mut()?;
        all.get_mut(slot * *block..(slot + 1) * *block)
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
                    if let Some((block, all)) = &mut self.keep {
                        let own = &mut all[chunk.slot * *block..(chunk.slot + 1) * *block];
                        hole(&bytes[..header], &chunk, &self.waiting, own);
                    }
                    self.from += header;
                    none.insert(chunk)
                }
            };
            let there = (self.to - self.from) as u64;
            let taken = chunk.payload.min(there);
            chunk.payload -= taken;
            if let Some((block, all)) = &mut self.keep {
                let bytes = &self.buffer[self.from..self.from + taken as usize];
                let own = &mut all[chunk.slot * *block..(chunk.slot + 1) * *block];
                let offset = self.waiting[chunk.slot].offset;
                chunk.content.take(bytes, offset, own);
            }
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

impl Content {
    /// Takes the next bytes of a payload, for the `block` of a request that begins at `offset`.
    fn take(&mut self, mut bytes: &[u8], offset: u64, block: &mut [u8]) {
        if let Self::Offset(word, there) = self {
            let taken = (word.len() - *there).min(bytes.len());
            word[*there..*there + taken].copy_from_slice(&bytes[..taken]);
            *there += taken;
            bytes = &bytes[taken..];
            if *there == word.len() {
                *self = Self::Data(u64::from_be_bytes(*word).wrapping_sub(offset));
            }
        }
        if let Self::Data(at) = self {
            // Data for elsewhere are left out: what they should have replaced shows.
            let to = usize::try_from(*at).ok();
            let to = to.and_then(|at| block.get_mut(at..)?.get_mut(..bytes.len()));
            if let Some(to) = to {
                to.copy_from_slice(bytes);
            }
            *at = at.wrapping_add(bytes.len() as u64);
        }
    }
}

/// Zeroes what a chunk says is a hole, by the end of its header: offset and length.
fn hole(header: &[u8], chunk: &Chunk, waiting: &[Waiting], block: &mut [u8]) {
    let (true, Some(tail)) = (chunk.hole, header.last_chunk::<12>()) else {
        return;
    };
    let word = |from: usize, to: usize| {
        let bytes = tail[from..to].iter();
        bytes.fold(0_u64, |all, byte| all << 8 | u64::from(*byte))
    };
    let at = word(0, 8).wrapping_sub(waiting[chunk.slot].offset);
    let to = usize::try_from(at)
        .ok()
        .zip(usize::try_from(word(8, 12)).ok());
    if let Some(to) = to.and_then(|(at, len)| block.get_mut(at..)?.get_mut(..len)) {
        to.fill(0);
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
    let (mut payload, mut content, mut hole) = (0, Content::Other, false);
    match found.kind {
        Kind::Simple if style == Style::Structured && own.expected > 0 => {
            return Err(broken("a simple reply with data"));
        }
        Kind::Simple => {
            own.arrived = own.expected;
            payload = own.expected;
            content = Content::Data(0);
        }
        Kind::SimpleError(_) => own.failed = true,
        Kind::Nothing => {}
        Kind::Data(len) => {
            own.arrived = own.arrived.saturating_add(len);
            payload = len.saturating_add(8);
            content = Content::Offset([0; 8], 0);
        }
        Kind::Hole => {
            let Some(len) = bytes.get(header + 8..).and_then(<[u8]>::first_chunk) else {
                return Ok(None);
            };
            own.arrived += u64::from(u32::from_be_bytes(*len));
            header += 12;
            hole = true;
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
            hole,
            payload,
            content,
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
        let mut replies = Replies::new(style, 3, None);
        replies.waiting = [4096, 0, 4096].map(|bytes| Waiting::new(bytes, 0)).to_vec();
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

    #[test]
    fn data_are_kept_where_they_belong_however_they_arrive() {
        let style = Style::Structured;
        let data: Vec<u8> = (0..4096_u32).map(|n| (n % 251) as u8 + 1).collect();
        let at = |offset: u64| offset.to_be_bytes().to_vec();
        // The second half first, a hole in the first, the rest behind it, and something for elsewhere.
        let hole = [at(8192), 1024_u32.to_be_bytes().to_vec()].concat();
        let stream = [
            chunk(
                style,
                0,
                kind::OFFSET_DATA,
                1,
                &[at(8192 + 2048), data[2048..].to_vec()].concat(),
            ),
            chunk(style, 0, kind::OFFSET_HOLE, 1, &hole),
            chunk(
                style,
                1,
                kind::OFFSET_DATA,
                1,
                &[at(8192 + 1024), data[1024..2048].to_vec()].concat(),
            ),
        ]
        .concat();
        let expected = [&[0; 1024], &data[1024..]].concat();
        for step in [1, 7, 4096] {
            let mut replies = Replies::new(style, 2, Some(4096));
            replies.kept(1).unwrap().fill(0xa5);
            replies.waiting[1] = Waiting::new(4096, 8192);
            let mut ended = Vec::new();
            for piece in stream.chunks(step) {
                replies.room()[..piece.len()].copy_from_slice(piece);
                let end = |slot, ok| ended.push((slot, ok));
                replies.arrived(piece.len(), end).unwrap();
            }
            assert_eq!(ended, [(1, true)]);
            assert!(replies.kept(1).unwrap() == expected, "{step}");
            assert!(replies.kept(0).unwrap().iter().all(|byte| *byte == 0));
        }
        // Data for elsewhere change nothing.
        let mut replies = Replies::new(style, 1, Some(512));
        replies.waiting[0] = Waiting::new(512, 8192);
        let stray = [at(0), vec![7; 512]].concat();
        let stray = chunk(style, 1, kind::OFFSET_DATA, 0, &stray);
        replies.room()[..stray.len()].copy_from_slice(&stray);
        replies.arrived(stray.len(), |_, _| {}).unwrap();
        assert!(replies.kept(0).unwrap().iter().all(|byte| *byte == 0));
    }
}
