//! Numbers of the protocol by the names of its specification (NetworkBlockDevice/nbd, `doc/proto.md`).

pub(super) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub(super) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 1 << 1;

/// Transmission flags.
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;

/// Options.
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_EXTENDED_HEADERS: u32 = 11;

/// Replies to options.
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_FLAG_ERROR: u32 = 1 << 31;

/// Information.
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Commands.
pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
/// On extended requests that carry data.
pub(super) const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Chunks of structured and extended replies.
pub(super) const REPLY_FLAG_DONE: u16 = 1;
pub(super) const REPLY_TYPE_NONE: u16 = 0;
pub(super) const REPLY_TYPE_OFFSET_DATA: u16 = 1;
pub(super) const REPLY_TYPE_OFFSET_HOLE: u16 = 2;
pub(super) const REPLY_TYPE_FLAG_ERROR: u16 = 1 << 15;

/// How requests and replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Headers {
    Simple,
    Structured,
    Extended,
}

impl Headers {
    /// Bytes of a request.
    pub(super) fn request_bytes(self) -> usize {
        if self == Headers::Extended { 32 } else { 28 }
    }
}

/// Writes a request, of [`Headers::request_bytes`], to the front of `to`.
pub(super) fn put_request(
    to: &mut [u8],
    headers: Headers,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u64,
) {
    let extended = headers == Headers::Extended;
    let (magic, flags) = match (extended, command) {
        (true, CMD_WRITE) => (EXTENDED_REQUEST_MAGIC, CMD_FLAG_PAYLOAD_LEN),
        (true, _) => (EXTENDED_REQUEST_MAGIC, 0),
        (false, _) => (REQUEST_MAGIC, 0),
    };
    to[..4].copy_from_slice(&magic.to_be_bytes());
    to[4..6].copy_from_slice(&flags.to_be_bytes());
    to[6..8].copy_from_slice(&command.to_be_bytes());
    to[8..16].copy_from_slice(&cookie.to_be_bytes());
    to[16..24].copy_from_slice(&offset.to_be_bytes());
    if extended {
        to[24..32].copy_from_slice(&len.to_be_bytes());
    } else {
        // Requests of a load are at most 32 MiB.
        to[24..28].copy_from_slice(&(len as u32).to_be_bytes());
    }
}

/// The big-endian number of the `N` bytes at `at`, which the caller knows to be there.
pub(super) fn be<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N]
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}
