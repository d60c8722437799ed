//! The answer to a question for the map, as it grows entry by entry.

use crate::{Extent, ExtentKind};

/// L1 entries and slices that one answer looks at: a bound on the time of one call.
pub(crate) const STEPS_MAX: u32 = 4096;

/// A run of guest bytes of one kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Growing {
    at: u64,
    want: u64,
    len: u64,
    kind: ExtentKind,
}

impl Growing {
    /// Nothing yet of `want` guest bytes from `at` on.
    #[inline]
    pub(crate) fn new(at: u64, want: u64) -> Self {
        Self {
            at,
            want,
            len: 0,
            kind: ExtentKind::Unallocated,
        }
    }

    /// The guest byte that comes next.
    #[inline]
    pub(crate) fn next(&self) -> u64 {
        self.at + self.len
    }

    /// Bytes so far.
    #[inline]
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes that are asked for beyond.
    #[inline]
    pub(crate) fn left(&self) -> u64 {
        self.want - self.len
    }

    /// What there is.
    #[inline]
    pub(crate) fn extent(&self) -> Extent {
        Extent {
            len: self.len,
            kind: self.kind,
        }
    }

    /// Appends `room` bytes of `kind`. `false` when the run ends before them.
    #[inline]
    pub(crate) fn feed(&mut self, kind: ExtentKind, room: u64) -> bool {
        if self.len > 0 {
            let continues = match (self.kind, kind) {
                (ExtentKind::Data { offset: a, .. }, ExtentKind::Data { offset: b, .. }) => {
                    a.0 + self.len == b.0
                }
                (
                    ExtentKind::Zero { host: Some((_, a)) },
                    ExtentKind::Zero { host: Some((_, b)) },
                ) => a.0 + self.len == b.0,
                (ExtentKind::Compressed(_), _) => false,
                (a, b) => a == b,
            };
            if !continues {
                return false;
            }
        } else {
            self.kind = kind;
        }
        self.len += room;
        true
    }
}
