//! What a guest can ask of a disk.

/// A guest's operation on a range of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read the range into the request's memory.
    Read,
    /// Write the request's memory to the range. With `fua`, complete only when
    /// the data survives a crash.
    Write {
        /// Force unit access: the write is stable when it completes.
        fua: bool,
    },
    /// Everything that completed before this was submitted survives a crash
    /// once it completes. Carries no range.
    Flush,
    /// The guest no longer needs the range. A hint: reads afterwards give the
    /// old bytes or zeros.
    Discard,
    /// The range reads as zeros from now on.
    WriteZeroes {
        /// Space may be given back to the host.
        unmap: bool,
        /// Fail with [`crate::GuestError::Unsupported`] rather than write zeros as data.
        fast: bool,
        /// Stable when it completes.
        fua: bool,
    },
}

impl Op {
    /// Whether the operation may change what the disk reads as.
    pub fn is_write(self) -> bool {
        !matches!(self, Op::Read | Op::Flush)
    }

    /// Whether the request carries data in memory.
    pub fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write { .. })
    }

    /// The operation's name in statistics and messages.
    pub fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write { .. } => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes { .. } => "write-zeroes",
        }
    }
}
