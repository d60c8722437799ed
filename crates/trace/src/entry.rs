//! A request that ended, in a cache line.

use crate::stage::{STAGES, Times};
use block::{GuestError, Op};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a request asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Operation {
    /// All, in the order of their numbers.
    pub const ALL: [Operation; 5] = [
        Operation::Read,
        Operation::Write,
        Operation::Flush,
        Operation::Discard,
        Operation::WriteZeroes,
    ];

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes => "write-zeroes",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl From<Op> for Operation {
    #[inline]
    fn from(op: Op) -> Self {
        match op {
            Op::Read => Operation::Read,
            Op::Write { .. } => Operation::Write,
            Op::Flush => Operation::Flush,
            Op::Discard => Operation::Discard,
            Op::WriteZeroes { .. } => Operation::WriteZeroes,
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Status {
    Ok,
    Io,
    NoSpace,
    Unsupported,
    ReadOnly,
    Invalid,
}

impl Status {
    const ALL: [Status; 6] = [
        Status::Ok,
        Status::Io,
        Status::NoSpace,
        Status::Unsupported,
        Status::ReadOnly,
        Status::Invalid,
    ];

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Io => "io",
            Status::NoSpace => "no-space",
            Status::Unsupported => "unsupported",
            Status::ReadOnly => "read-only",
            Status::Invalid => "invalid",
        }
    }
}

impl From<Result<(), GuestError>> for Status {
    #[inline]
    fn from(result: Result<(), GuestError>) -> Self {
        match result {
            Ok(()) => Status::Ok,
            Err(GuestError::Io) => Status::Io,
            Err(GuestError::NoSpace) => Status::NoSpace,
            Err(GuestError::Unsupported) => Status::Unsupported,
            Err(GuestError::ReadOnly) => Status::ReadOnly,
            Err(GuestError::Invalid) => Status::Invalid,
        }
    }
}

/// A request that ended. The JSON of `diskplane trace dump` has these fields, and `disk` and `queue` before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its number among those of its queue that ended, from 0.
    pub number: u64,
    /// What it asked for.
    pub operation: Operation,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes asked for, to 2^44 - 1 (16 TiB); more is told as that.
    pub bytes: u64,
    /// How it ended.
    pub status: Status,
    /// When it arrived; nanoseconds of the monotonic clock of the machine.
    pub begin_ns: u64,
    /// How long it was in each stage. What is over 2 seconds is a multiple of 1.024 microseconds, and at most 36 minutes.
    pub stages_ns: Times,
}

/// Words of an entry in memory, the one with its sequence number not counted.
pub(crate) const WORDS: usize = 7;

const BYTES_BITS: u32 = 44;
const OPERATION_BITS: u32 = 4;

impl Entry {
    /// From arrival to the client told, in nanoseconds.
    pub fn total_ns(&self) -> u64 {
        self.stages_ns.total()
    }

    /// Its words, without the number:
    ///
    /// ```text
    ///   0  first byte          1  time of arrival       2  bytes: 44 bits │ operation: 4 │ status: 16
    ///   3…6  stages, two to a word: nanoseconds in 31 bits, or with bit 31 set 1024 nanoseconds
    /// ```
    #[inline]
    pub(crate) fn pack(&self) -> [u64; WORDS] {
        let bytes = self.bytes.min((1 << BYTES_BITS) - 1);
        let operation = self.operation as u64;
        let status = self.status as u64;
        // Without loops: every request that ends comes by here.
        let ns = &self.stages_ns.0;
        let pair = |i: usize| u64::from(short(ns[i])) | u64::from(short(ns[i + 1])) << 32;
        [
            self.offset,
            self.begin_ns,
            bytes | operation << BYTES_BITS | status << (BYTES_BITS + OPERATION_BITS),
            pair(0),
            pair(2),
            pair(4),
            pair(6),
        ]
    }

    /// The other way round. `None` for words that no entry has.
    pub(crate) fn unpack(number: u64, words: [u64; WORDS]) -> Option<Self> {
        let what = words[2];
        let operation = (what >> BYTES_BITS) & ((1 << OPERATION_BITS) - 1);
        let status = what >> (BYTES_BITS + OPERATION_BITS);
        let mut times = [0; STAGES];
        for (pair, word) in times.chunks_exact_mut(2).zip(&words[3..]) {
            pair[0] = long((word & 0xffff_ffff) as u32);
            pair[1] = long((word >> 32) as u32);
        }
        Some(Entry {
            number,
            operation: *Operation::ALL.get(usize::try_from(operation).ok()?)?,
            offset: words[0],
            bytes: what & ((1 << BYTES_BITS) - 1),
            status: *Status::ALL.get(usize::try_from(status).ok()?)?,
            begin_ns: words[1],
            stages_ns: Times(times),
        })
    }
}

/// Bit that says that the others count 1024 ns.
const COARSE: u32 = 1 << 31;

#[inline]
fn short(ns: u64) -> u32 {
    match u32::try_from(ns) {
        Ok(ns) if ns < COARSE => ns,
        _ => COARSE | (ns >> 10).min(u64::from(COARSE - 1)) as u32,
    }
}

fn long(short: u32) -> u64 {
    match short & COARSE {
        0 => u64::from(short),
        _ => u64::from(short & !COARSE) << 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_out() {
        for (operation, status) in Operation::ALL.into_iter().zip(Status::ALL) {
            let entry = Entry {
                number: 7,
                operation,
                offset: u64::MAX,
                bytes: 1 << 43 | 512,
                status,
                begin_ns: u64::MAX - 1,
                stages_ns: Times([0, 1, 2, 3, 0x7fff_ffff, 5, 6, 7]),
            };
            assert_eq!(Entry::unpack(7, entry.pack()), Some(entry));
            let json = serde_json::to_value(entry).unwrap();
            assert_eq!(json["operation"], operation.name());
            assert_eq!(json["status"], status.name());
            assert_eq!(serde_json::from_value::<Entry>(json).unwrap(), entry);
        }
        assert_eq!(Entry::unpack(0, [0, 0, 15 << 44, 0, 0, 0, 0]), None);
        assert_eq!(Entry::unpack(0, [0, 0, 6 << 48, 0, 0, 0, 0]), None);
    }

    #[test]
    fn long_stages_lose_less_than_two_microseconds() {
        for ns in [1u64 << 31, 3_000_000_000, 60_000_000_001, 2_000_000_000_999] {
            let back = long(short(ns));
            assert!(back <= ns && ns - back < 1024, "{ns} {back}");
        }
        let most = long(short(u64::MAX));
        assert_eq!(most / 1_000_000_000 / 60, 36);
    }
}
