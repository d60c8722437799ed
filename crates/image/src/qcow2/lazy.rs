//! Postponed refcounts (specification: compatible feature bit 0, incompatible feature bit 0).
//!
//! ```text
//!   open, reading ……          refcounts on disk are right              dirty bit clear
//!   first flush with changes  dirty bit ─ barrier ─ tables             from here on they are behind
//!   further flushes           tables                                   (refcounts when memory is short)
//!   close                     all refcounts ─ barrier ─ dirty bit clear
//! ```
//!
//! The refcounts in memory are right all the time, and what is free is known from them, as ever: a freed cluster is
//! given out again only after the flush that made its dereference durable. So whatever tables a crash leaves, no two
//! of their entries share a cluster that their refcounts (counted anew from the tables, by whoever opens the image for
//! writing next) would not allow, and none shows what another cluster's new owner wrote. Guest data still come before
//! the entries that refer to them, unless these showed zeros before and the cluster holds zeros durably (`ahead`).
//!
//! While refcounts stay behind, new refcount blocks and a moved refcount table exist in memory only; the file has
//! the former ones, which nothing overwrites. Dirty refcounts pin their frames: when they have a quarter of the cache, or
//! something waits for a flush, the flush writes them too, in the order of every flush.
//!
//! An image that is closed before any flush had changes to write never gets the bit.

use super::flush::extend;
use super::state::State;
use super::{Qcow2, features};
use crate::{FileId, FlushRun};
use block::{Context, Result, Storage};

/// What the header on disk says of the refcounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum DirtyBit {
    /// They are right.
    #[default]
    Clear,
    /// A flush that sets the bit has begun, and has not succeeded yet.
    Begun,
    /// They may be behind, durably.
    Set,
}

/// Whether refcounts are postponed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lazy {
    /// They may be.
    allowed: bool,
    pub(super) bit: DirtyBit,
    /// Something waits for a flush: it is to write refcounts too.
    pub(super) pressed: bool,
    /// The image is being closed: no flush leaves them out any more.
    pub(super) closing: bool,
}

impl Lazy {
    pub(super) fn new(allowed: bool) -> Self {
        Self {
            allowed,
            ..Self::default()
        }
    }

    /// Incompatible feature bits to set in the header.
    pub(super) fn mark(&self) -> u64 {
        match self.bit {
            DirtyBit::Clear => 0,
            DirtyBit::Begun | DirtyBit::Set => features::DIRTY,
        }
    }
}

impl State {
    /// Whether a flush writes refcounts.
    pub(super) fn writes_refcounts(&self) -> bool {
        let lazy = &self.lazy;
        !lazy.allowed || lazy.closing || lazy.pressed || self.cache.refcounts_crowd()
    }

    /// Notes that something new is referred to, whose refcount must be durable before. In an image that is
    /// marked dirty none need be.
    pub(super) fn order_refcount(&mut self) {
        self.ordered |= self.lazy.bit != DirtyBit::Set;
    }
}

impl Qcow2 {
    /// Begins a run that leaves refcounts behind with the dirty bit, unless that is set. `refcounts`: it writes them.
    pub(super) fn push_dirty_bit(&self, st: &mut State, run: &mut FlushRun, refcounts: bool) {
        let wanted = match st.lazy.bit {
            DirtyBit::Set => false,
            // Perhaps it is there, and the refcounts are behind already.
            DirtyBit::Begun => true,
            DirtyBit::Clear => !refcounts && self.has_changes(st, true),
        };
        if wanted {
            st.lazy.bit = DirtyBit::Begun;
            let start = run.bytes.len();
            let sector = self.header_sector(st, st.refs.known);
            run.bytes.extend_from_slice(&sector);
            extend(run, FileId::IMAGE, 0, start);
            run.seal();
        }
    }

    /// Says in the header that the refcounts are right. All of them are durable.
    pub(super) fn clear_dirty_bit(&self, storage: &dyn Storage) -> Result<()> {
        let mut st = self.lock();
        if st.lazy.bit == DirtyBit::Clear {
            return Ok(());
        }
        st.lazy.bit = DirtyBit::Clear;
        let sector = self.header_sector(&st, st.refs.known);
        storage
            .write_at(0, &sector)
            .and_then(|()| storage.sync())
            .inspect_err(|_| st.lazy.bit = DirtyBit::Set)
            .context(|| format!("{}: clear the dirty bit", self.name))
    }
}
