//! Requests of the transmission phase: from untrusted bytes to a checked plan
//! (`doc/proto.md`, "Request message", "Request types", "Error values").

use nbd::proto::{Errno, PAYLOAD_BYTES_MAX, Style, cmd, cmd_flag};
use nbd::request::Header;

/// What a connection may do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes of the export.
    pub size: u64,
    pub read_only: bool,
    /// Trims are passed on; otherwise they succeed without doing anything.
    pub trim: bool,
    pub style: Style,
    /// `base:allocation` was negotiated.
    pub allocation: bool,
}

/// Why a request is refused: what the client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub errno: Errno,
    /// For people; structured replies carry it. At most [`super::reply::MESSAGE_BYTES_MAX`].
    pub message: &'static str,
    /// The first byte of the range that is wrong, where there is one.
    pub offset: Option<u64>,
}

const fn refuse(errno: Errno, message: &'static str) -> Refusal {
    Refusal {
        errno,
        message,
        offset: None,
    }
}

/// Work for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Never empty, at most [`PAYLOAD_BYTES_MAX`].
    Read {
        /// In one chunk.
        whole: bool,
    },
    /// Never empty, at most [`PAYLOAD_BYTES_MAX`], with as many bytes of payload.
    Write {
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    Zero {
        unmap: bool,
        fast: bool,
        fua: bool,
    },
    Status {
        one: bool,
    },
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Give it to the disk.
    Work(Work),
    /// Skip so many bytes of payload, then answer.
    Answer {
        skip: u64,
        result: Result<(), Refusal>,
    },
    /// Answer, take no more requests, close when everything is answered.
    Fatal(Refusal),
    /// Take no more requests, close when everything is answered.
    Disconnect,
}

/// Checks `header` against what the connection may do.
pub(crate) fn plan(header: &Header, limits: &Limits) -> Plan {
    if header.kind == cmd::DISC {
        return Plan::Disconnect;
    }
    let extended = limits.style == Style::Extended;
    // Writes carry a payload in both styles; in the extended style the flag should say so, and may say it of
    // any command. QEMU up to 10 at least leaves the flag out of its writes, and sends the payload.
    let payload = header.kind == cmd::WRITE || (extended && header.has(cmd_flag::PAYLOAD_LEN));
    if payload && header.len > u64::from(PAYLOAD_BYTES_MAX) {
        return Plan::Fatal(refuse(Errno::Inval, "payload is larger than 32 MiB"));
    }
    let skip = if payload { header.len } else { 0 };
    let answer = |result| Plan::Answer { skip, result };
    match check(header, limits) {
        Err(refusal) => answer(Err(refusal)),
        Ok(None) => answer(Ok(())),
        Ok(Some(work)) => Plan::Work(work),
    }
}

/// `None` when there is nothing to do.
fn check(header: &Header, limits: &Limits) -> Result<Option<Work>, Refusal> {
    let structured = limits.style >= Style::Structured;
    // FUA is accepted on every command.
    let allowed = cmd_flag::FUA
        | match header.kind {
            cmd::READ if structured => cmd_flag::DF,
            cmd::WRITE if limits.style == Style::Extended => cmd_flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        };
    if header.flags & !allowed != 0 {
        return Err(refuse(Errno::Inval, "flag is not valid for this command"));
    }
    let writes = match header.kind {
        cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES => true,
        cmd::READ | cmd::FLUSH | cmd::CACHE | cmd::BLOCK_STATUS => false,
        _ => return Err(refuse(Errno::Inval, "unknown command")),
    };
    if writes && limits.read_only {
        return Err(refuse(Errno::Perm, "export is read-only"));
    }
    if header.kind == cmd::FLUSH {
        return Ok(Some(Work::Flush));
    }
    let end = header.offset.checked_add(header.len);
    if end.is_none_or(|end| end > limits.size) {
        let errno = match header.kind {
            cmd::WRITE | cmd::WRITE_ZEROES => Errno::NoSpace,
            _ => Errno::Inval,
        };
        let first_wrong =
            (header.kind == cmd::READ && header.offset < limits.size).then_some(limits.size);
        return Err(Refusal {
            errno,
            message: "range ends behind the export",
            offset: first_wrong,
        });
    }
    let fua = header.has(cmd_flag::FUA);
    let work = match header.kind {
        cmd::BLOCK_STATUS if !limits.allocation => {
            return Err(refuse(Errno::Inval, "no metadata context was negotiated"));
        }
        cmd::BLOCK_STATUS if header.len == 0 => {
            return Err(refuse(Errno::Inval, "status of an empty range"));
        }
        cmd::READ if header.len > u64::from(PAYLOAD_BYTES_MAX) => {
            let errno = if structured {
                Errno::Overflow
            } else {
                Errno::Inval
            };
            return Err(refuse(errno, "reads are limited to 32 MiB"));
        }
        _ if header.len == 0 => return Ok(None),
        // A hint; reading ahead is the host's page cache's business.
        cmd::CACHE => return Ok(None),
        cmd::READ => Work::Read {
            whole: !structured || header.has(cmd_flag::DF),
        },
        cmd::WRITE => Work::Write { fua },
        cmd::TRIM if !limits.trim => return Ok(None),
        cmd::TRIM => Work::Trim { fua },
        cmd::WRITE_ZEROES => Work::Zero {
            unmap: !header.has(cmd_flag::NO_HOLE),
            fast: header.has(cmd_flag::FAST_ZERO),
            fua,
        },
        _ => Work::Status {
            one: header.has(cmd_flag::REQ_ONE),
        },
    };
    Ok(Some(work))
}

#[cfg(test)]
mod tests {
    use super::{super::reply::MESSAGE_BYTES_MAX, *};
    use nbd::proto::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};
    use nbd::request::BadMagic;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 20;

    fn limits(style: Style) -> Limits {
        Limits {
            size: SIZE,
            read_only: false,
            trim: true,
            style,
            allocation: style > Style::Simple,
        }
    }

    fn header(kind: u16, flags: u16, offset: u64, len: u64) -> Header {
        Header {
            flags,
            kind,
            cookie: 7,
            offset,
            len,
        }
    }

    fn errno(plan: Plan) -> (u64, Errno) {
        match plan {
            Plan::Answer {
                skip,
                result: Err(refusal),
            } => (skip, refusal.errno),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn refusals_have_the_errno_of_the_specification() {
        use Errno::*;
        use cmd_flag::*;
        let style = Style::Structured;
        for (kind, flags, offset, len, expected) in [
            (cmd::READ, 0, SIZE, 1, (0, Inval)),
            (cmd::READ, 0, SIZE - 1, 2, (0, Inval)),
            (cmd::READ, 0, u64::MAX, 1, (0, Inval)),
            (cmd::READ, NO_HOLE, 0, 1, (0, Inval)),
            (cmd::READ, REQ_ONE, 0, 1, (0, Inval)),
            (cmd::WRITE, 0, SIZE - 1, 2, (2, NoSpace)),
            (cmd::WRITE, DF, 0, 2, (2, Inval)),
            (cmd::WRITE, PAYLOAD_LEN, 0, 2, (2, Inval)),
            (cmd::WRITE_ZEROES, 0, 0, SIZE + 1, (0, NoSpace)),
            (cmd::WRITE_ZEROES, 0x100, 0, 1, (0, Inval)),
            (cmd::TRIM, 0, 0, SIZE + 1, (0, Inval)),
            (cmd::TRIM, FAST_ZERO, 0, 1, (0, Inval)),
            (cmd::CACHE, 0, SIZE, 1, (0, Inval)),
            (cmd::CACHE, DF, 0, 1, (0, Inval)),
            (cmd::BLOCK_STATUS, 0, 0, 0, (0, Inval)),
            (cmd::BLOCK_STATUS, 0, 1, SIZE, (0, Inval)),
            (cmd::FLUSH, DF, 0, 0, (0, Inval)),
            (8, 0, 0, 0, (0, Inval)),
            (0xffff, 0, 0, 5, (0, Inval)),
        ] {
            let header = header(kind, flags, offset, len);
            assert_eq!(errno(plan(&header, &limits(style))), expected, "{header:?}");
        }
        let mut ro = limits(style);
        ro.read_only = true;
        for (kind, skip) in [(cmd::WRITE, 9), (cmd::TRIM, 0), (cmd::WRITE_ZEROES, 0)] {
            assert_eq!(errno(plan(&header(kind, 0, 0, 9), &ro)), (skip, Perm));
        }
        let mut bare = limits(Style::Simple);
        bare.size = u64::MAX;
        let large = header(cmd::READ, 0, 0, (32 << 20) + 1);
        assert_eq!(errno(plan(&large, &bare)), (0, Inval));
        bare.style = style;
        assert_eq!(errno(plan(&large, &bare)), (0, Overflow));
        let status = header(cmd::BLOCK_STATUS, 0, 0, 1);
        assert_eq!(errno(plan(&status, &bare)), (0, Inval), "not negotiated");
        let df = header(cmd::READ, DF, 0, 1);
        assert_eq!(errno(plan(&df, &limits(Style::Simple))), (0, Inval));
    }

    #[test]
    fn work_carries_its_flags() {
        use cmd_flag::*;
        let limits = limits(Style::Structured);
        for (kind, flags, len, expected) in [
            (cmd::READ, 0, 1, Work::Read { whole: false }),
            (cmd::READ, DF | FUA, SIZE, Work::Read { whole: true }),
            (cmd::WRITE, FUA, 1, Work::Write { fua: true }),
            (cmd::FLUSH, FUA, 0, Work::Flush),
            (cmd::TRIM, FUA, 1, Work::Trim { fua: true }),
            (
                cmd::WRITE_ZEROES,
                NO_HOLE | FAST_ZERO,
                1,
                Work::Zero {
                    unmap: false,
                    fast: true,
                    fua: false,
                },
            ),
            (cmd::BLOCK_STATUS, REQ_ONE, 1, Work::Status { one: true }),
        ] {
            let header = header(kind, flags, 0, len);
            assert_eq!(plan(&header, &limits), Plan::Work(expected), "{header:?}");
        }
        for kind in [
            cmd::READ,
            cmd::WRITE,
            cmd::TRIM,
            cmd::WRITE_ZEROES,
            cmd::CACHE,
        ] {
            let empty = Plan::Answer {
                skip: 0,
                result: Ok(()),
            };
            assert_eq!(plan(&header(kind, 0, SIZE, 0), &limits), empty);
        }
        let crossing = plan(&header(cmd::READ, 0, SIZE - 1, 2), &limits);
        assert!(matches!(
            crossing,
            Plan::Answer {
                result: Err(Refusal {
                    offset: Some(SIZE),
                    ..
                }),
                ..
            }
        ));
    }

    #[test]
    fn payloads_that_cannot_be_skipped_end_the_connection() {
        let (simple, extended) = (limits(Style::Simple), limits(Style::Extended));
        let large = header(cmd::WRITE, 0, 0, (32 << 20) + 1);
        assert!(matches!(plan(&large, &simple), Plan::Fatal(_)));
        let unflagged = header(cmd::WRITE, 0, 0, 1);
        assert_eq!(
            plan(&unflagged, &extended),
            Plan::Work(Work::Write { fua: false }),
            "as QEMU does"
        );
        let flagged = header(cmd::READ, cmd_flag::PAYLOAD_LEN, 0, 5);
        assert_eq!(errno(plan(&flagged, &extended)), (5, Errno::Inval));
        let huge = header(99, cmd_flag::PAYLOAD_LEN, 0, u64::MAX);
        assert!(matches!(plan(&huge, &extended), Plan::Fatal(_)));
        let write = header(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 0, 5);
        assert_eq!(
            plan(&write, &extended),
            Plan::Work(Work::Write { fua: false })
        );
        assert_eq!(
            plan(&header(cmd::DISC, 0xffff, 1, 2), &simple),
            Plan::Disconnect
        );
    }

    proptest! {
        /// Whatever the header says, the plan stays within the limits.
        #[test]
        fn plans_stay_within_limits(
            bytes in proptest::array::uniform32(any::<u8>()),
            kind in 0u16..9, flags in 0u16..64, offset in 0..2 * SIZE, len in 0..2 * SIZE,
            mangled in any::<bool>(), style in 0usize..3, read_only in any::<bool>(),
        ) {
            let style = [Style::Simple, Style::Structured, Style::Extended][style];
            let mut limits = limits(style);
            limits.read_only = read_only;
            let mut header = header(kind, flags, offset, len);
            if mangled {
                let mut bytes = bytes;
                let magic = if style == Style::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
                bytes[..4].copy_from_slice(&magic.to_be_bytes());
                header = Header::parse(style, &bytes).unwrap().unwrap();
            }
            match plan(&header, &limits) {
                Plan::Work(work) => {
                    prop_assert!(header.offset + header.len <= SIZE || work == Work::Flush);
                    let writes = !matches!(work, Work::Read { .. } | Work::Flush | Work::Status { .. });
                    prop_assert!(!(writes && read_only));
                }
                Plan::Answer { skip, result } => {
                    prop_assert!(skip <= u64::from(PAYLOAD_BYTES_MAX));
                    if let Err(refusal) = result {
                        prop_assert!(refusal.message.len() <= MESSAGE_BYTES_MAX);
                    }
                }
                Plan::Fatal(_) | Plan::Disconnect => {}
            }
        }

        #[test]
        fn short_headers_wait(len in 0usize..28) {
            let bytes = [&REQUEST_MAGIC.to_be_bytes()[..], &[0; 24]].concat();
            prop_assert_eq!(Header::parse(Style::Simple, &bytes[..len]), None);
            prop_assert!(Header::parse(Style::Simple, &bytes).unwrap().is_ok());
        }
    }

    #[test]
    fn wrong_magic_is_seen_at_once() {
        assert_eq!(Header::parse(Style::Simple, b"GET "), Some(Err(BadMagic)));
        assert_eq!(
            Header::parse(Style::Extended, &REQUEST_MAGIC.to_be_bytes()),
            Some(Err(BadMagic))
        );
    }
}
