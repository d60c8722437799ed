//! Fixed newstyle negotiation as a state machine without I/O: bytes of the
//! client in, bytes for the client out (`doc/proto.md`, "Newstyle negotiation").
//!
//! ```text
//!   greeting →  ← client flags
//!   ← option ┐
//!   reply  → ┘ … → EXPORT_NAME or GO: transmission; ABORT, garbage or a limit: close
//! ```

use super::option::{InfoRequest, MetaRequest};
use nbd::proto::{
    ALLOCATION, ALLOCATION_ID, Fields, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    PAYLOAD_BYTES_MAX, STRING_BYTES_MAX, Style, handshake_flag, info, opt, rep, transmission_flag,
};

/// Options of one client: qemu and libnbd send about five; `nbdinfo --list` a few per export.
const OPTIONS_MAX: u32 = 256;
/// Bytes of an option that is looked at; longer ones are skipped and answered with an error.
pub(crate) const OPTION_BYTES_MAX: usize = 64 << 10;
/// Bytes of an option that is skipped; behind it lies no client that means well.
const SKIP_BYTES_MAX: u32 = 32 << 20;

const CLIENT_FLAGS: u32 = (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES) as u32;

/// What the server says of its one export.
#[derive(Clone, Debug)]
pub(crate) struct Export {
    /// Its name; the empty name means it too.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    /// Preferred block size in bytes, a power of two from 512.
    pub preferred_block: u32,
    /// What requests should be multiples of, in bytes.
    pub min_block: u32,
}

impl Export {
    fn answers_to(&self, name: &str) -> bool {
        name.is_empty() || name == self.name
    }

    fn transmission_flags(&self, structured: bool) -> u16 {
        use transmission_flag::*;
        // A flush covers what any connection wrote: all of them share one disk.
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_CACHE | CAN_MULTI_CONN;
        if self.read_only {
            flags |= READ_ONLY;
        } else {
            flags |= SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO;
        }
        if structured {
            flags |= SEND_DF;
        }
        flags
    }
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Negotiated {
    pub style: Style,
    /// `base:allocation` was selected.
    pub allocation: bool,
}

/// What follows a call of [`Handshake::feed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send what is in the output, then give more input.
    More,
    /// Send what is in the output; then transmission starts with the rest of the input.
    Transmit(Negotiated),
    /// Send what is in the output, then close the connection.
    Close,
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    Option,
    /// Bytes of an option that is too long, and how it will be answered.
    Skip {
        left: u32,
        option: u32,
        answer: u32,
    },
}

/// One client's negotiation.
#[derive(Debug)]
pub(crate) struct Handshake {
    state: State,
    no_zeroes: bool,
    options: u32,
    agreed: Negotiated,
}

impl Handshake {
    /// Starts with the server's greeting in `out`.
    pub(crate) fn start(out: &mut Vec<u8>) -> Self {
        out.extend(INIT_MAGIC.to_be_bytes());
        out.extend(OPTION_MAGIC.to_be_bytes());
        out.extend((handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
        Self {
            state: State::ClientFlags,
            no_zeroes: false,
            options: 0,
            agreed: Negotiated::default(),
        }
    }

    /// Takes one message of the client off `input`: returns how many bytes it used (zero: the
    /// message is not complete, which never needs more than [`OPTION_BYTES_MAX`] + 16) and what follows.
    /// Appends to `out` at most three strings' worth of reply.
    pub(crate) fn feed(
        &mut self,
        export: &Export,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> (usize, Step) {
        let mut fields = Fields(input);
        match self.state {
            State::ClientFlags => {
                let Some(flags) = fields.u32() else {
                    return (0, Step::More);
                };
                if flags & !CLIENT_FLAGS != 0 {
                    return (4, Step::Close);
                }
                self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
                self.state = State::Option;
                (4, Step::More)
            }
            State::Skip {
                left,
                option,
                answer,
            } => {
                let used = input.len().min(left as usize);
                let left = left - used as u32;
                if left == 0 {
                    self.state = State::Option;
                    reply(out, option, answer, b"option is too long");
                } else {
                    self.state = State::Skip {
                        left,
                        option,
                        answer,
                    };
                }
                (used, Step::More)
            }
            State::Option => {
                let Some(magic) = fields.u64() else {
                    return (0, Step::More);
                };
                if magic != OPTION_MAGIC {
                    return (8, Step::Close);
                }
                let (Some(option), Some(len)) = (fields.u32(), fields.u32()) else {
                    return (0, Step::More);
                };
                if len as usize > OPTION_BYTES_MAX {
                    return (16, self.skip(option, len));
                }
                let Some(data) = fields.bytes(len as usize) else {
                    return (0, Step::More);
                };
                self.options += 1;
                let step = if self.options > OPTIONS_MAX {
                    Step::Close
                } else {
                    self.option(export, option, data, out)
                };
                (16 + data.len(), step)
            }
        }
    }

    fn skip(&mut self, option: u32, len: u32) -> Step {
        self.options += 1;
        if len > SKIP_BYTES_MAX || option == opt::EXPORT_NAME || self.options > OPTIONS_MAX {
            return Step::Close;
        }
        let known = (opt::EXPORT_NAME..=opt::EXTENDED_HEADERS).contains(&option);
        self.state = State::Skip {
            left: len,
            option,
            answer: if known {
                rep::ERR_TOO_BIG
            } else {
                rep::ERR_UNSUP
            },
        };
        Step::More
    }

    fn option(&mut self, export: &Export, option: u32, data: &[u8], out: &mut Vec<u8>) -> Step {
        let structured = self.agreed.style >= Style::Structured;
        match option {
            opt::EXPORT_NAME => return self.export_name(export, data, out),
            opt::ABORT => {
                reply(out, option, rep::ACK, &[]);
                return Step::Close;
            }
            opt::INFO | opt::GO => return self.info(export, option, data, out),
            opt::STARTTLS => reply(out, option, rep::ERR_POLICY, b"TLS is not offered"),
            opt::LIST | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS if !data.is_empty() => {
                reply(out, option, rep::ERR_INVALID, b"option takes no data");
            }
            opt::LIST => {
                let name = export.name.as_bytes();
                let len = (name.len() as u32).to_be_bytes();
                reply_parts(
                    out,
                    option,
                    rep::SERVER,
                    &[&len, name, export.description.as_bytes()],
                );
                reply(out, option, rep::ACK, &[]);
            }
            opt::STRUCTURED_REPLY if self.agreed.style == Style::Extended => reply(
                out,
                option,
                rep::ERR_EXT_HEADER_REQD,
                b"extended headers are already negotiated",
            ),
            opt::STRUCTURED_REPLY if structured => reply(
                out,
                option,
                rep::ERR_INVALID,
                b"structured replies are already negotiated",
            ),
            opt::STRUCTURED_REPLY => {
                self.agreed.style = Style::Structured;
                reply(out, option, rep::ACK, &[]);
            }
            opt::EXTENDED_HEADERS if self.agreed.style == Style::Extended => reply(
                out,
                option,
                rep::ERR_INVALID,
                b"extended headers are already negotiated",
            ),
            opt::EXTENDED_HEADERS => {
                self.agreed.style = Style::Extended;
                reply(out, option, rep::ACK, &[]);
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => {
                self.meta_context(export, option, data, structured, out);
            }
            _ => reply(out, option, rep::ERR_UNSUP, b"unknown option"),
        }
        Step::More
    }

    fn export_name(&self, export: &Export, data: &[u8], out: &mut Vec<u8>) -> Step {
        // This option cannot be answered with an error.
        let known = std::str::from_utf8(data).is_ok_and(|name| export.answers_to(name));
        if !known || data.len() > STRING_BYTES_MAX || self.agreed.style == Style::Extended {
            return Step::Close;
        }
        let structured = self.agreed.style >= Style::Structured;
        out.extend(export.size.to_be_bytes());
        out.extend(export.transmission_flags(structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Step::Transmit(self.agreed)
    }

    fn info(&self, export: &Export, option: u32, data: &[u8], out: &mut Vec<u8>) -> Step {
        let Some(request) = InfoRequest::parse(data) else {
            reply(out, option, rep::ERR_INVALID, b"malformed request");
            return Step::More;
        };
        if !export.answers_to(request.name) {
            reply(out, option, rep::ERR_UNKNOWN, b"no such export");
            return Step::More;
        }
        let flags = export.transmission_flags(self.agreed.style >= Style::Structured);
        let mut item = |kind: u16, parts: [&[u8]; 3]| {
            let [a, b, c] = parts;
            reply_parts(out, option, rep::INFO, &[&kind.to_be_bytes(), a, b, c]);
        };
        item(
            info::EXPORT,
            [&export.size.to_be_bytes(), &flags.to_be_bytes(), &[]],
        );
        if request.wants_name {
            item(info::NAME, [export.name.as_bytes(), &[], &[]]);
        }
        if request.wants_description && !export.description.is_empty() {
            item(info::DESCRIPTION, [export.description.as_bytes(), &[], &[]]);
        }
        if request.wants_block_size {
            item(
                info::BLOCK_SIZE,
                [
                    &export.min_block.to_be_bytes(),
                    &export.preferred_block.to_be_bytes(),
                    &PAYLOAD_BYTES_MAX.to_be_bytes(),
                ],
            );
        }
        reply(out, option, rep::ACK, &[]);
        if option == opt::GO {
            Step::Transmit(self.agreed)
        } else {
            Step::More
        }
    }

    fn meta_context(
        &mut self,
        export: &Export,
        option: u32,
        data: &[u8],
        structured: bool,
        out: &mut Vec<u8>,
    ) {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            // Also an option that fails replaces what was selected.
            self.agreed.allocation = false;
        }
        let Some(request) = MetaRequest::parse(data) else {
            return reply(out, option, rep::ERR_INVALID, b"malformed request");
        };
        if !structured {
            let why = b"structured replies must be negotiated first";
            return reply(out, option, rep::ERR_INVALID, why);
        }
        if !export.answers_to(request.name) {
            return reply(out, option, rep::ERR_UNKNOWN, b"no such export");
        }
        let answer = |out: &mut Vec<u8>, id: u32| {
            reply_parts(
                out,
                option,
                rep::META_CONTEXT,
                &[&id.to_be_bytes(), ALLOCATION.as_bytes()],
            );
        };
        if set && request.allocation {
            self.agreed.allocation = true;
            answer(out, ALLOCATION_ID);
        } else if !set && request.lists_allocation() {
            answer(out, 0);
        }
        reply(out, option, rep::ACK, &[]);
    }
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    reply_parts(out, option, kind, &[data]);
}

fn reply_parts(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    // Parts are our own strings, of a few KiB at most.
    let len: usize = parts.iter().map(|part| part.len()).sum();
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((len as u32).to_be_bytes());
    for part in parts {
        out.extend(*part);
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
