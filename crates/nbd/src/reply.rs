//! Headers of replies as a client takes them apart (`doc/proto.md`, "Simple reply message", "Structured reply chunk
//! message", "Extended reply chunk message"). Bytes in, a checked value out: what follows the header is bounded, and what
//! cannot be an answer is an error.

use crate::proto::{
    EXTENDED_REPLY_MAGIC, Fields, REPLY_DONE, SIMPLE_REPLY_MAGIC, STRING_BYTES_MAX,
    STRUCTURED_REPLY_MAGIC, Style, chunk,
};
use block::{Error, ErrorKind, Result};

/// Bytes of the longest header.
pub const HEADER_BYTES_MAX: usize = 32;
/// Bytes of an error's chunk: its number, its message with a length, an offset.
pub const ERROR_BYTES_MAX: u64 = 4 + 2 + STRING_BYTES_MAX as u64 + 8;
/// Bytes of a chunk of block status: as many extents as any server is known to send at once, of 8 bytes, or of 16.
pub const STATUS_BYTES_MAX: u64 = 2 << 20;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The request that is answered.
    pub cookie: u64,
    /// No more follows for that request.
    pub done: bool,
    /// What follows.
    pub kind: Kind,
}

/// What follows a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of a simple reply that is no error: the data of a read, all of them, and nothing for any other request.
    Simple,
    /// Of a simple reply: nothing, this is the error. Never 0.
    SimpleError(u32),
    /// Nothing.
    Nothing,
    /// Eight bytes of offset, and so many of data; at least one.
    Data(u64),
    /// Eight bytes of offset, and a number of zeros in four.
    Hole,
    /// Four bytes of context, and so many descriptors; at least one. With 64 bits, another four bytes before them.
    Status {
        /// Descriptors.
        count: u64,
        /// Of 16 bytes rather than 8.
        wide: bool,
    },
    /// An error in so many bytes, at least 6 and at most [`ERROR_BYTES_MAX`].
    Error(u64),
}

/// An error: the server does not keep to the protocol.
#[cold]
pub fn broken(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("the server broke the protocol: {what}"),
    )
}

/// Bytes of a header of that style, of which the first four are `magic`.
///
/// # Errors
///
/// No reply of that style begins so.
pub fn header_bytes(style: Style, magic: u32) -> Result<usize> {
    match (magic, style) {
        (SIMPLE_REPLY_MAGIC, Style::Simple | Style::Structured) => Ok(16),
        (STRUCTURED_REPLY_MAGIC, Style::Structured) => Ok(20),
        (EXTENDED_REPLY_MAGIC, Style::Extended) => Ok(32),
        _ => Err(broken(format_args!("a reply begins with {magic:#x}"))),
    }
}

impl Chunk {
    /// Takes a header off the front of `input`, and says how many bytes it has; `None` when it is not all there.
    ///
    /// # Errors
    ///
    /// What no reply of that style looks like.
    pub fn parse(style: Style, input: &[u8]) -> Result<Option<(Chunk, usize)>> {
        let Some(magic) = Fields(input).u32() else {
            return Ok(None);
        };
        let size = header_bytes(style, magic)?;
        let Some(header) = input.get(4..size) else {
            return Ok(None);
        };
        let short = || broken("a header that ends early");
        let mut fields = Fields(header);
        if magic == SIMPLE_REPLY_MAGIC {
            let error = fields.u32().ok_or_else(short)?;
            let chunk = Chunk {
                cookie: fields.u64().ok_or_else(short)?,
                done: true,
                kind: match error {
                    0 => Kind::Simple,
                    error => Kind::SimpleError(error),
                },
            };
            return Ok(Some((chunk, size)));
        }
        let flags = fields.u16().ok_or_else(short)?;
        let kind = fields.u16().ok_or_else(short)?;
        let cookie = fields.u64().ok_or_else(short)?;
        let len = match style {
            Style::Extended => fields.u64().and_then(|_| fields.u64()),
            _ => fields.u32().map(u64::from),
        };
        let len = len.ok_or_else(short)?;
        let status = |head: u64, each: u64| {
            let wide = each == 16;
            let descriptors = len.checked_sub(head).filter(|bytes| bytes % each == 0);
            let count = descriptors.map(|bytes| bytes / each);
            let count = count.filter(|count| *count > 0 && len <= STATUS_BYTES_MAX);
            count.map(|count| Kind::Status { count, wide })
        };
        let found = match kind {
            chunk::NONE if len == 0 => Some(Kind::Nothing),
            chunk::OFFSET_DATA if len > 8 => Some(Kind::Data(len - 8)),
            chunk::OFFSET_HOLE if len == 12 => Some(Kind::Hole),
            chunk::BLOCK_STATUS => status(4, 8),
            chunk::BLOCK_STATUS_EXT => status(8, 16),
            kind if kind & chunk::FLAG_ERROR != 0 && (6..=ERROR_BYTES_MAX).contains(&len) => {
                Some(Kind::Error(len))
            }
            _ => None,
        };
        let kind =
            found.ok_or_else(|| broken(format_args!("a chunk of type {kind} with {len} bytes")))?;
        let done = flags & REPLY_DONE != 0;
        Ok(Some((Chunk { cookie, done, kind }, size)))
    }
}

/// The errno in the payload of an error's chunk, and the message; the offset, where there is one, is left out.
pub fn error(payload: &[u8]) -> (u32, String) {
    let mut fields = Fields(payload);
    let value = fields.u32().unwrap_or(0);
    let len = fields.u16().map_or(0, usize::from);
    let message = fields.bytes(len).unwrap_or_default();
    (value, String::from_utf8_lossy(message).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(style: Style, kind: u16, len: u64) -> Vec<u8> {
        let mut bytes = match style {
            Style::Extended => EXTENDED_REPLY_MAGIC,
            _ => STRUCTURED_REPLY_MAGIC,
        }
        .to_be_bytes()
        .to_vec();
        bytes.extend(REPLY_DONE.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(7u64.to_be_bytes());
        match style {
            Style::Extended => {
                bytes.extend([9; 8]);
                bytes.extend(len.to_be_bytes());
            }
            _ => bytes.extend((len as u32).to_be_bytes()),
        }
        bytes
    }

    #[test]
    fn payloads_have_the_lengths_that_they_can_have() {
        let narrow = |count| Kind::Status { count, wide: false };
        let wide = |count| Kind::Status { count, wide: true };
        for (kind, len, found) in [
            (chunk::NONE, 0, Some(Kind::Nothing)),
            (chunk::NONE, 1, None),
            (chunk::OFFSET_DATA, 8, None),
            (chunk::OFFSET_DATA, 9, Some(Kind::Data(1))),
            (chunk::OFFSET_HOLE, 12, Some(Kind::Hole)),
            (chunk::OFFSET_HOLE, 13, None),
            (chunk::BLOCK_STATUS, 4, None),
            (chunk::BLOCK_STATUS, 12, Some(narrow(1))),
            (chunk::BLOCK_STATUS, 13, None),
            (chunk::BLOCK_STATUS, STATUS_BYTES_MAX + 4, None),
            (chunk::BLOCK_STATUS_EXT, 8, None),
            (chunk::BLOCK_STATUS_EXT, 40, Some(wide(2))),
            (chunk::ERROR, 5, None),
            (chunk::ERROR, 6, Some(Kind::Error(6))),
            (
                chunk::ERROR_OFFSET,
                ERROR_BYTES_MAX,
                Some(Kind::Error(ERROR_BYTES_MAX)),
            ),
            (chunk::ERROR_OFFSET, ERROR_BYTES_MAX + 1, None),
            (9, 0, None),
        ] {
            for style in [Style::Structured, Style::Extended] {
                let bytes = header(style, kind, len);
                let parsed = Chunk::parse(style, &bytes);
                match found {
                    Some(kind) => {
                        let (chunk, size) = parsed.unwrap().unwrap();
                        let expected = Chunk {
                            cookie: 7,
                            done: true,
                            kind,
                        };
                        assert_eq!((chunk, size), (expected, bytes.len()));
                        let cut = Chunk::parse(style, &bytes[..size - 1]);
                        assert_eq!(cut.unwrap(), None);
                    }
                    None => {
                        let error = parsed.unwrap_err().to_string();
                        assert!(error.contains(&format!("type {kind}")), "{error}");
                    }
                }
            }
        }
    }

    #[test]
    fn replies_begin_as_was_agreed_on() {
        let structured = header(Style::Structured, 0, 0);
        let extended = header(Style::Extended, 0, 0);
        assert!(Chunk::parse(Style::Simple, &structured).is_err());
        assert!(Chunk::parse(Style::Extended, &structured).is_err());
        assert!(Chunk::parse(Style::Structured, &extended).is_err());
        let mut simple = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        simple.extend(5u32.to_be_bytes());
        simple.extend(3u64.to_be_bytes());
        let expected = Chunk {
            cookie: 3,
            done: true,
            kind: Kind::SimpleError(5),
        };
        let found = Chunk::parse(Style::Structured, &simple).unwrap();
        assert_eq!(found, Some((expected, 16)));
        assert!(Chunk::parse(Style::Extended, &simple).is_err());
    }

    #[test]
    fn errors_have_their_message() {
        let payload = [&5u32.to_be_bytes()[..], &[0, 2], b"hi", &[0; 8]].concat();
        assert_eq!(error(&payload), (5, "hi".to_owned()));
        assert_eq!(error(&payload[..7]), (5, String::new()));
        assert_eq!(error(&[]), (0, String::new()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(style in 0usize..3, mut bytes in proptest::collection::vec(any::<u8>(), 0..40), right in any::<bool>()) {
            let style = [Style::Simple, Style::Structured, Style::Extended][style];
            if right && bytes.len() >= 4 {
                let magic = [SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, EXTENDED_REPLY_MAGIC];
                let magic = magic[style as usize];
                bytes[..4].copy_from_slice(&magic.to_be_bytes());
            }
            if let Ok(Some((_, size))) = Chunk::parse(style, &bytes) {
                prop_assert!(size <= bytes.len());
            }
            let _ = error(&bytes);
        }
    }
}
