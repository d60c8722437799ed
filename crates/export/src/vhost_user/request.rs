//! Block requests (virtio 1.2 §5.2.6): from a chain to what the disk is asked, or an answer.
//!
//! ```text
//!   device reads    type u32, reserved u32, sector u64 │ data to write, or segments
//!   device writes   data read, or the serial number    │ status u8
//! ```
//!
//! Where descriptors begin and end within this carries no meaning (§5.2.6.4, §2.7.4: any layout).

use super::{
    chain::{Chain, Fault},
    memory,
    spec::{
        HEADER_BYTES, ID_BYTES, SECTOR_BYTES, SEGMENT_BYTES, SEGMENT_F_UNMAP, Status, feature,
        request,
    },
};
use block::{GuestOffset, IoVec, Op, limits::REQUEST_BYTES_MAX};
use std::ops::Range;

/// What the disk and the negotiation allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Feature bits that the driver accepted.
    pub features: u64,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Segments of one discard.
    pub discard_segments: u32,
    /// Sectors of one segment of a discard.
    pub discard_sectors: u32,
    /// Segments of one write zeroes.
    pub zeroes_segments: u32,
    /// Sectors of one segment of a write zeroes.
    pub zeroes_sectors: u32,
    /// Answer to get-id, padded with zeros.
    pub id: [u8; ID_BYTES],
}

/// Segments that a request may have; [`Limits`] stay below.
pub const SEGMENTS_MAX: usize = 64;

/// A range of a discard or write zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Write zeroes: give the space back.
    pub unmap: bool,
}

/// What to do for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// It ends at once. `written` bytes went to the guest, the status not counted.
    Answer {
        /// How it ended.
        status: Status,
        /// Bytes written besides the status.
        written: u32,
    },
    /// One operation of the disk.
    Single {
        /// What to do.
        op: Op,
        /// First byte of the disk.
        at: GuestOffset,
        /// Bytes.
        len: u64,
        /// Which pieces of the chain's `iov` are its memory.
        iov: Range<usize>,
    },
    /// One discard or write zeroes for each segment, in order.
    Segments {
        /// Whether they are discards.
        discard: bool,
        /// How many.
        count: usize,
    },
}

const fn answer(status: Status) -> Task {
    Task::Answer { status, written: 0 }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Cuts `bytes` off the front of the pieces from `start` on; returns the first piece left.
/// There must be so many.
fn skip(iov: &mut [IoVec], mut start: usize, mut bytes: usize) -> usize {
    while bytes > 0 && start < iov.len() {
        let piece = iov[start];
        if piece.len() > bytes {
            iov[start] = IoVec::new(piece.base().wrapping_add(bytes), piece.len() - bytes);
            break;
        }
        bytes -= piece.len();
        start += 1;
    }
    start
}

/// Cuts the last byte off: the status, which [`Chain::status`] points to.
fn drop_last_byte(iov: &mut Vec<IoVec>) {
    if let Some(piece) = iov.pop()
        && piece.len() > 1
    {
        iov.push(IoVec::new(piece.base(), piece.len() - 1));
    }
}

/// Reads the request in `chain`, whose pieces are cut to its data. The segments of a
/// discard or write zeroes are put into `segments`.
///
/// # Errors
///
/// [`Fault::Status`] when it cannot be answered at all.
pub fn parse(
    chain: &mut Chain,
    limits: &Limits,
    segments: &mut [Segment; SEGMENTS_MAX],
) -> Result<Task, Fault> {
    chain.answerable()?;
    if chain.malformed || chain.readable_len < HEADER_BYTES as u64 {
        return Ok(answer(Status::IoErr));
    }
    drop_last_byte(&mut chain.iov);
    let mut header = [0; HEADER_BYTES];
    // SAFETY: the pieces of a chain that is not malformed are mapped guest memory.
    unsafe { memory::gather(&chain.iov[..chain.readable], &mut header) };
    let data = skip(&mut chain.iov[..chain.readable], 0, HEADER_BYTES);
    let out_len = chain.readable_len - HEADER_BYTES as u64;
    let in_len = chain.writable_len - 1;

    let sector = u64_at(&header, 8);
    Ok(match u32_at(&header, 0) {
        request::IN => transfer(Op::Read, sector, in_len, chain.readable..chain.iov.len()),
        request::OUT => {
            let op = Op::Write { fua: false };
            transfer(op, sector, out_len, data..chain.readable)
        }
        request::FLUSH => Task::Single {
            op: Op::Flush,
            at: GuestOffset(0),
            len: 0,
            iov: 0..0,
        },
        request::GET_ID => {
            // SAFETY: as above.
            let written = unsafe { memory::scatter(&limits.id, &chain.iov[chain.readable..]) };
            Task::Answer {
                status: Status::Ok,
                // At most 20.
                written: written as u32,
            }
        }
        kind @ (request::DISCARD | request::WRITE_ZEROES) => {
            let discard = kind == request::DISCARD;
            let iov = &chain.iov[data..chain.readable];
            match ranges(discard, iov, out_len, limits, segments) {
                Ok(count) => Task::Segments { discard, count },
                Err(status) => answer(status),
            }
        }
        _ => answer(Status::Unsupp),
    })
}

fn transfer(op: Op, sector: u64, len: u64, iov: Range<usize>) -> Task {
    let Some(at) = sector.checked_mul(SECTOR_BYTES) else {
        return answer(Status::IoErr);
    };
    if !len.is_multiple_of(SECTOR_BYTES)
        || len > REQUEST_BYTES_MAX
        || iov.len() > block::limits::REQUEST_SEGMENTS_MAX
    {
        return answer(Status::IoErr);
    }
    if len == 0 {
        // Nothing to move; what it would be moved to or from is still checked by nobody.
        return answer(Status::Ok);
    }
    Task::Single {
        op,
        at: GuestOffset(at),
        len,
        iov,
    }
}

/// Reads and judges all segments before any is acted upon (§5.2.6.2).
fn ranges(
    discard: bool,
    iov: &[IoVec],
    len: u64,
    limits: &Limits,
    segments: &mut [Segment; SEGMENTS_MAX],
) -> Result<usize, Status> {
    let (offered, count_max, sectors_max) = if discard {
        (
            feature::DISCARD,
            limits.discard_segments,
            limits.discard_sectors,
        )
    } else {
        (
            feature::WRITE_ZEROES,
            limits.zeroes_segments,
            limits.zeroes_sectors,
        )
    };
    if limits.features & offered == 0 {
        return Err(Status::Unsupp);
    }
    let count = len / SEGMENT_BYTES as u64;
    if len == 0
        || !len.is_multiple_of(SEGMENT_BYTES as u64)
        || count > u64::from(count_max).min(SEGMENTS_MAX as u64)
    {
        return Err(Status::IoErr);
    }
    // At most SEGMENTS_MAX.
    let count = count as usize;
    let mut bytes = [0; SEGMENT_BYTES * SEGMENTS_MAX];
    let bytes = &mut bytes[..count * SEGMENT_BYTES];
    // SAFETY: the pieces of a chain that is not malformed are mapped guest memory.
    unsafe { memory::gather(iov, bytes) };
    for (raw, segment) in bytes.chunks_exact(SEGMENT_BYTES).zip(segments.iter_mut()) {
        let sectors = u32_at(raw, 8);
        let flags = u32_at(raw, 12);
        // §5.2.6.2: unknown flags, and unmap for a discard, are not supported.
        if flags & !SEGMENT_F_UNMAP != 0 || discard && flags != 0 {
            return Err(Status::Unsupp);
        }
        let at = u64_at(raw, 0).checked_mul(SECTOR_BYTES);
        let len = u64::from(sectors) * SECTOR_BYTES;
        let at = at.filter(|at| {
            at.checked_add(len)
                .is_some_and(|end| end <= limits.disk_bytes)
        });
        let (Some(at), true) = (at, sectors <= sectors_max) else {
            return Err(Status::IoErr);
        };
        *segment = Segment {
            at,
            len,
            unmap: flags & SEGMENT_F_UNMAP != 0,
        };
    }
    Ok(count)
}
