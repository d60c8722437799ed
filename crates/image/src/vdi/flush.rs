//! The order of what a flush writes.
//!
//! ```text
//!   1  the header, which counts the blocks     barrier: this, the guest's data and the file's length are durable
//!   2  pages of the map                        barrier
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
        for frame in st.uses.dirty() {
            let Some((page, _)) = st.uses.holds(*frame) else {
                continue;
            };
            let start = run.bytes.len();
            let len = self.page_bytes(page) as usize;
            self.pages.put(*frame, len, &mut run.bytes);
            extend(run, FileId::IMAGE, self.page_offset(page), start);
        }
        st.uses.begin_flush();
        run.seal();
    }
}

impl State {
    /// What was dirty was written, or is dirty again.
    pub(super) fn end_flush(&mut self, ok: bool) {
        self.uses.end_flush(ok);
        self.count_dirty |= std::mem::take(&mut self.count_flushing) && !ok;
    }
}
