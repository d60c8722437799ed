//! The order of what a flush writes.
//!
//! ```text
//!   1  the header, which counts the blocks     barrier: this, the guest's data and the file's length are durable
//!   2  entries of the map                      barrier
//! ```
//!
//! A crash before the second barrier leaves blocks that the header counts and nothing refers to: they read as before,
//! and both QEMU and VirtualBox put their next block behind as many as the header counts, on none that is in use. `qemu-img
//! check` finds that fewer are there than are counted; the next writer ([`super::mend`]) counts anew.

use super::Vdi;
use super::state::State;
use crate::metadata::extend;
use crate::{FileId, FlushRun};
use block::HostOffset;
use std::sync::atomic::Ordering;

impl Vdi {
    pub(super) fn begin_flush(&self, st: &mut State, run: &mut FlushRun) {
        if !st.is_dirty() {
            run.barrier_only();
            return;
        }
        run.clear();
        if st.count_dirty {
            st.count_dirty = false;
            st.count_flushing = true;
            run.push(FileId::IMAGE, HostOffset(0), &st.header.to_bytes());
        }
        run.seal();
        st.map.take(|sector| {
            let start = run.bytes.len();
            let first = sector * 128;
            for entry in self.map.get(first..first + 128).unwrap_or_default() {
                let entry = entry.load(Ordering::Acquire);
                run.bytes.extend_from_slice(&entry.to_le_bytes());
            }
            extend(
                run,
                FileId::IMAGE,
                self.map_offset + sector as u64 * 512,
                start,
            );
        });
        run.seal();
    }
}

impl State {
    /// What was dirty was written, or is dirty again.
    pub(super) fn end_flush(&mut self, ok: bool) {
        self.map.end(ok);
        self.count_dirty |= std::mem::take(&mut self.count_flushing) && !ok;
    }
}
