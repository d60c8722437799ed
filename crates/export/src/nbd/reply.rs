//! Replies: their heads, encoded into a small fixed buffer; payloads follow from
//! where they lie (`doc/proto.md`, "Simple reply message", "Structured reply chunk message").

use super::request::Refusal;
use block::GuestError;
use disk::StatusExtent;
use nbd::proto::{
    ALLOCATION_ID, EXTENDED_REPLY_MAGIC, Errno, REPLY_DONE, SIMPLE_REPLY_MAGIC, STATE_HOLE,
    STATE_ZERO, STRUCTURED_REPLY_MAGIC, Style, chunk,
};

/// Bytes of the longest head: an extended chunk header with an error, its message and an offset.
const HEAD_BYTES_MAX: usize = 128;
/// Bytes of a message in an error.
pub(crate) const MESSAGE_BYTES_MAX: usize = HEAD_BYTES_MAX - 32 - 6 - 8;

/// What every reply repeats of its request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Subject {
    pub cookie: u64,
    pub offset: u64,
}

/// The encoded head of a reply.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    len: usize,
}

impl Head {
    pub(crate) const EMPTY: Head = Head {
        bytes: [0; HEAD_BYTES_MAX],
        len: 0,
    };

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        let end = self.len + bytes.len();
        self.bytes[self.len..end].copy_from_slice(bytes);
        self.len = end;
        self
    }

    fn simple(&mut self, errno: u32, subject: Subject) {
        self.len = 0;
        self.put(&SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(&errno.to_be_bytes())
            .put(&subject.cookie.to_be_bytes());
    }

    /// The header of a last chunk of `len` bytes of payload.
    fn chunk(&mut self, style: Style, kind: u16, subject: Subject, len: usize) {
        self.len = 0;
        let extended = style == Style::Extended;
        let magic = if extended {
            EXTENDED_REPLY_MAGIC
        } else {
            STRUCTURED_REPLY_MAGIC
        };
        self.put(&magic.to_be_bytes())
            .put(&REPLY_DONE.to_be_bytes())
            .put(&kind.to_be_bytes())
            .put(&subject.cookie.to_be_bytes());
        if extended {
            self.put(&subject.offset.to_be_bytes())
                .put(&(len as u64).to_be_bytes());
        } else {
            // Payloads are at most 32 MiB and a few bytes.
            self.put(&(len as u32).to_be_bytes());
        }
    }

    /// Success without data. `read`: of an (empty) read, whose reply must be structured.
    pub(crate) fn ok(&mut self, style: Style, subject: Subject, read: bool) {
        if style == Style::Extended || (read && style == Style::Structured) {
            self.chunk(style, chunk::NONE, subject, 0);
        } else {
            self.simple(0, subject);
        }
    }

    /// Success of a read; `len` bytes of data follow.
    pub(crate) fn data(&mut self, style: Style, subject: Subject, len: usize) {
        if style == Style::Simple {
            self.simple(0, subject);
        } else {
            self.chunk(style, chunk::OFFSET_DATA, subject, 8 + len);
            self.put(&subject.offset.to_be_bytes());
        }
    }

    /// Success of a read of zeros. Not for simple replies.
    pub(crate) fn hole(&mut self, style: Style, subject: Subject, len: u32) {
        self.chunk(style, chunk::OFFSET_HOLE, subject, 12);
        self.put(&subject.offset.to_be_bytes())
            .put(&len.to_be_bytes());
    }

    /// Block status; `descriptors` of [`put_descriptors`] follow.
    pub(crate) fn status(&mut self, style: Style, subject: Subject, descriptors: usize) {
        if style == Style::Extended {
            self.chunk(
                style,
                chunk::BLOCK_STATUS_EXT,
                subject,
                8 + descriptors * 16,
            );
            self.put(&ALLOCATION_ID.to_be_bytes())
                .put(&(descriptors as u32).to_be_bytes());
        } else {
            self.chunk(style, chunk::BLOCK_STATUS, subject, 4 + descriptors * 8);
            self.put(&ALLOCATION_ID.to_be_bytes());
        }
    }

    /// Failure.
    pub(crate) fn error(&mut self, style: Style, subject: Subject, refusal: &Refusal) {
        let errno = refusal.errno as u32;
        if style == Style::Simple {
            return self.simple(errno, subject);
        }
        let message = &refusal.message.as_bytes()[..refusal.message.len().min(MESSAGE_BYTES_MAX)];
        let (kind, tail) = match refusal.offset {
            Some(_) => (chunk::ERROR_OFFSET, 8),
            None => (chunk::ERROR, 0),
        };
        self.chunk(style, kind, subject, 6 + message.len() + tail);
        self.put(&errno.to_be_bytes())
            .put(&(message.len() as u16).to_be_bytes())
            .put(message);
        if let Some(offset) = refusal.offset {
            self.put(&offset.to_be_bytes());
        }
    }
}

/// What a client is told of a failure of the disk.
pub(crate) fn refusal_of(error: GuestError, fast_zero: bool) -> Refusal {
    let (errno, message) = match error {
        GuestError::Io => (Errno::Io, "the server could not read or write"),
        GuestError::NoSpace => (Errno::NoSpace, "the server has no space left"),
        // Only a fast zero may be told so.
        GuestError::Unsupported if fast_zero => (Errno::NotSup, "zeroing would not be fast"),
        GuestError::Unsupported => (Errno::Io, "the server cannot do this here"),
        GuestError::ReadOnly => (Errno::Perm, "the disk is read-only"),
        GuestError::Invalid => (Errno::Inval, "range is not valid"),
    };
    Refusal {
        errno,
        message,
        offset: None,
    }
}

/// Bytes of a descriptor in a block status reply.
pub(crate) fn descriptor_bytes(style: Style) -> usize {
    if style == Style::Extended { 16 } else { 8 }
}

/// Encodes extents of a query of `len` bytes into `out`, merging equal neighbours; returns how
/// many descriptors there are. With `one`, or when `out` is full, the rest is left out:
/// the client asks again.
pub(crate) fn put_descriptors(
    style: Style,
    extents: &[StatusExtent],
    mut len: u64,
    one: bool,
    out: &mut [u8],
) -> usize {
    let size = descriptor_bytes(style);
    let mut run: Option<(u64, u32)> = None;
    let mut count = 0;
    let mut slots = out.chunks_exact_mut(size);
    let mut put = |(len, flags): (u64, u32)| {
        let Some(slot) = slots.next() else {
            return false;
        };
        if style == Style::Extended {
            slot[..8].copy_from_slice(&len.to_be_bytes());
            slot[8..].copy_from_slice(&u64::from(flags).to_be_bytes());
        } else {
            // `len` is at most that of a compact request, which has 32 bits.
            slot[..4].copy_from_slice(&(len as u32).to_be_bytes());
            slot[4..].copy_from_slice(&flags.to_be_bytes());
        }
        count += 1;
        !one
    };
    for extent in extents {
        let take = extent.len.min(len);
        len -= take;
        if take == 0 {
            continue;
        }
        // A hole that does not read as zeros would mean "contents undefined"; an
        // extent of ours always has contents.
        let flags = match (extent.allocated, extent.zero) {
            (_, false) => 0,
            (true, true) => STATE_ZERO,
            (false, true) => STATE_HOLE | STATE_ZERO,
        };
        run = match run {
            Some((len, same)) if same == flags => Some((len + take, flags)),
            Some(full) => {
                if !put(full) {
                    return count;
                }
                Some((take, flags))
            }
            None => Some((take, flags)),
        };
    }
    if let Some(last) = run {
        put(last);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBJECT: Subject = Subject {
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1000,
    };

    fn hex(build: impl FnOnce(&mut Head)) -> String {
        let mut head = Head::EMPTY;
        build(&mut head);
        head.bytes().iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn heads_look_as_specified() {
        use Style::*;
        let refusal = Refusal {
            errno: Errno::NoSpace,
            message: "hi",
            offset: None,
        };
        let at = Refusal {
            offset: Some(0x1001),
            ..refusal
        };
        for (got, expected) in [
            (
                hex(|h| h.ok(Simple, SUBJECT, true)),
                "67446698 00000000 0102030405060708",
            ),
            (
                hex(|h| h.ok(Structured, SUBJECT, false)),
                "67446698 00000000 0102030405060708",
            ),
            (
                hex(|h| h.ok(Structured, SUBJECT, true)),
                "668e33ef 0001 0000 0102030405060708 00000000",
            ),
            (
                hex(|h| h.ok(Extended, SUBJECT, false)),
                "6e8a278c 0001 0000 0102030405060708 0000000000001000 0000000000000000",
            ),
            (
                hex(|h| h.data(Simple, SUBJECT, 512)),
                "67446698 00000000 0102030405060708",
            ),
            (
                hex(|h| h.data(Structured, SUBJECT, 512)),
                "668e33ef 0001 0001 0102030405060708 00000208 0000000000001000",
            ),
            (
                hex(|h| h.hole(Structured, SUBJECT, 512)),
                "668e33ef 0001 0002 0102030405060708 0000000c 0000000000001000 00000200",
            ),
            (
                hex(|h| h.status(Structured, SUBJECT, 2)),
                "668e33ef 0001 0005 0102030405060708 00000014 00000001",
            ),
            (
                hex(|h| h.status(Extended, SUBJECT, 2)),
                "6e8a278c 0001 0006 0102030405060708 0000000000001000 0000000000000028 \
                 00000001 00000002",
            ),
            (
                hex(|h| h.error(Simple, SUBJECT, &refusal)),
                "67446698 0000001c 0102030405060708",
            ),
            (
                hex(|h| h.error(Structured, SUBJECT, &refusal)),
                "668e33ef 0001 8001 0102030405060708 00000008 0000001c 0002 6869",
            ),
            (
                hex(|h| h.error(Structured, SUBJECT, &at)),
                "668e33ef 0001 8002 0102030405060708 00000010 0000001c 0002 6869 0000000000001001",
            ),
        ] {
            assert_eq!(got, expected.replace(' ', ""));
        }
    }

    #[test]
    fn the_longest_message_fits() {
        let message: &'static str = "m".repeat(200).leak();
        let mut head = Head::EMPTY;
        head.error(
            Style::Extended,
            SUBJECT,
            &Refusal {
                errno: Errno::Io,
                message,
                offset: Some(1),
            },
        );
        assert_eq!(head.bytes().len(), HEAD_BYTES_MAX);
        for error in [
            GuestError::Io,
            GuestError::NoSpace,
            GuestError::Unsupported,
            GuestError::ReadOnly,
            GuestError::Invalid,
        ] {
            assert!(refusal_of(error, true).message.len() <= MESSAGE_BYTES_MAX);
        }
    }

    fn extent(len: u64, allocated: bool, zero: bool) -> StatusExtent {
        StatusExtent {
            len,
            allocated,
            zero,
        }
    }

    #[test]
    fn extents_become_descriptors() {
        let extents = [
            extent(10, true, false),
            extent(5, false, false),
            extent(0, false, true),
            extent(7, false, true),
            extent(8, true, true),
            extent(9, true, false),
        ];
        let decode = |len, one, room: usize| {
            let mut out = vec![0; room * 8];
            let n = put_descriptors(Style::Structured, &extents, len, one, &mut out);
            let word = |b: &[u8]| u32::from_be_bytes(b.try_into().unwrap());
            out.chunks(8)
                .take(n)
                .map(|d| (word(&d[..4]), word(&d[4..])))
                .collect::<Vec<_>>()
        };
        assert_eq!(decode(39, false, 9), [(15, 0), (7, 3), (8, 2), (9, 0)]);
        assert_eq!(decode(39, true, 9), [(15, 0)]);
        assert_eq!(decode(12, false, 9), [(12, 0)]);
        assert_eq!(decode(16, false, 9), [(15, 0), (1, 3)]);
        assert_eq!(decode(39, false, 2), [(15, 0), (7, 3)]);
        let mut out = [0; 16];
        let large = [extent(1 << 40, false, true)];
        assert_eq!(
            put_descriptors(Style::Extended, &large, 1 << 40, false, &mut out),
            1
        );
        assert_eq!(out, [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    }
}
