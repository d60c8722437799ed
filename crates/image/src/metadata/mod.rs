//! What formats with tables of clusters share: the metadata cache, what is read without a lock, allocations in
//! flight, and the small change of flushing.
//!
//! ```text
//!   guest cluster ─▶ L1 table ─▶ L2 table ─▶ host cluster
//!                    in memory   slices in
//!                                frames
//! ```
//!
//! An L2 entry is a 64-bit word: 0 for unallocated, [`ZERO`] for zeros, an offset with or without [`COPIED`] for a cluster.
//! Words that are none of these are kept as they are.

pub(crate) mod bitmaps;
mod blocking;
pub(crate) mod cache;
mod growing;
mod layout;
pub(crate) mod packed;
pub(crate) mod pages;
mod reading;
mod space;
pub(crate) mod tables;
mod tickets;
mod walk;

pub(crate) use blocking::{carry_out, extend, open_stage, read_short};
pub(crate) use cache::FRAMES_MIN;
pub use cache::{CACHE_BYTES_DEFAULT, CACHE_BYTES_MAX};
pub(crate) use growing::{Growing, STEPS_MAX};
pub(crate) use layout::{COPIED, FRESH, FRESH_ZEROED, Layout, OFFSET_MASK, ZERO};
pub(crate) use reading::Reading;
pub(crate) use space::{Space, Strides};
pub(crate) use tickets::{Span, TICKETS_MAX, Tickets, key_of};
pub(crate) use walk::{Place, Walk};

use crate::{Key, Need, Step};
use block::{Error, Result};

/// Why a question has no answer now.
#[derive(Debug)]
pub(crate) enum Halt {
    /// This must be done first, by whoever asked.
    Need(Need),
    /// Somebody else is at it.
    Wait(Key),
    /// Every frame is pinned by writes in flight: any of them ends that.
    Busy,
    /// It never will have.
    Fail(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Halt::Fail(error)
    }
}

/// An answer, or why there is none.
pub(crate) type Ask<T> = Result<T, Halt>;

/// An answer as the contract has it, of formats that pin nothing.
pub(crate) fn step<T>(answer: Ask<T>) -> Result<Step<T>> {
    match answer {
        Ok(answer) => Ok(Step::Done(answer)),
        Err(Halt::Need(need)) => Ok(Step::Need(need)),
        Err(Halt::Wait(key)) => Ok(Step::Wait(key)),
        Err(Halt::Fail(error)) => Err(error),
        Err(Halt::Busy) => Err(Error::corrupt("busy with nothing")),
    }
}

/// Which sectors of an in-memory table changed since they were last written.
#[derive(Debug)]
pub(crate) struct Sectors {
    dirty: Vec<u64>,
    flight: Vec<u64>,
    any: bool,
}

impl Sectors {
    /// For a table of `count` sectors.
    pub(crate) fn new(count: usize) -> Self {
        Self {
            dirty: vec![0; count.div_ceil(64)],
            flight: vec![0; count.div_ceil(64)],
            any: false,
        }
    }

    /// Notes a change of the table's 64-bit entry `index`.
    pub(crate) fn mark_entry(&mut self, index: usize) {
        let sector = index / 64;
        if let Some(word) = self.dirty.get_mut(sector / 64) {
            *word |= 1 << (sector % 64);
            self.any = true;
        }
    }

    pub(crate) fn any(&self) -> bool {
        self.any
    }

    /// Moves what is dirty into flight, telling `each` sector's number in order.
    pub(crate) fn take(&mut self, mut each: impl FnMut(usize)) {
        if !std::mem::take(&mut self.any) {
            return;
        }
        for (at, (dirty, flight)) in self.dirty.iter_mut().zip(&mut self.flight).enumerate() {
            *flight |= std::mem::take(dirty);
            let mut left = *flight;
            while left != 0 {
                each(at * 64 + left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
    }

    /// What was in flight is durable, or dirty again.
    pub(crate) fn end(&mut self, ok: bool) {
        for (dirty, flight) in self.dirty.iter_mut().zip(&mut self.flight) {
            let flight = std::mem::take(flight);
            if !ok && flight != 0 {
                *dirty |= flight;
                self.any = true;
            }
        }
    }
}
