//! Errors to inject.

/// Which operations a [`Fault`] hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOp {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Syncs.
    Sync,
    /// Discards, zeroings and allocations.
    Range,
    /// Changes of the size.
    Resize,
    /// All that changes the disk: writes, syncs, ranges and resizes.
    Change,
    /// All.
    Any,
}

/// An error to inject.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Operations to hit.
    pub op: FaultOp,
    /// Hit only those that touch these bytes. `0..u64::MAX` for all (and for syncs).
    pub bytes: std::ops::Range<u64>,
    /// What they fail with.
    pub errno: i32,
    /// Matching operations to let pass first.
    pub skip: u64,
    /// Matching operations to fail after that.
    pub count: u64,
    /// Of those, how many in a thousand really fail.
    pub per_mille: u32,
    /// A write that fails leaves some of its sectors written, and so does a zeroing.
    pub torn: bool,
    /// It does not fail: it is reported as done, and nothing is done. A sync like that is a barrier left out.
    pub lie: bool,
}

impl Fault {
    /// Fails every `op` with `errno`; narrow it with struct update syntax.
    pub fn always(op: FaultOp, errno: i32) -> Self {
        Self {
            op,
            bytes: 0..u64::MAX,
            errno,
            skip: 0,
            count: u64::MAX,
            per_mille: 1000,
            torn: false,
            lie: false,
        }
    }
}
