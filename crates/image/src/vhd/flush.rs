//! The order of what a flush writes.
//!
//! ```text
//!   1  bitmaps of new blocks     barrier: these, the guests' data and the file's length are durable
//!   2  entries of the table,     barrier
//!      bitmaps of other blocks
//! ```
//!
//! A crash before the second barrier leaves blocks that nothing refers to, and sectors whose bits are not set: they read
//! as before. Nothing refers to a block that is not wholly within the file, which QEMU would refuse.
//!
//! The footer at the end of the file is not kept there while blocks are added. The one in the first sector serves after
//! a crash, to us as to QEMU and XenServer's tools; the close, or the next writer ([`super::mend`]), writes the other.

use super::Vhd;
use super::state::State;
use crate::metadata::extend;
use crate::{FileId, FlushRun};
use block::Result;

impl Vhd {
    pub(super) fn begin_flush(&self, st: &mut State, run: &mut FlushRun) -> Result<()> {
        if !st.is_dirty() {
            run.barrier_only();
            return Ok(());
        }
        run.clear();
        let bitmap_len = self.bitmap_bytes as usize;
        for block in &st.births {
            let offset = self.bitmap_offset(*block)?;
            let frame = self.tables.bitmaps.slot(*block);
            push(run, offset, |out| match frame {
                Some(frame) => self.tables.bitmaps.put(frame, bitmap_len, out),
                None => out.resize(out.len() + bitmap_len, 0xff),
            });
        }
        run.seal();
        for frame in st.uses.dirty() {
            let Some((block, false)) = st.uses.holds(*frame) else {
                continue;
            };
            let offset = self.bitmap_offset(block)?;
            let bitmaps = &self.tables.bitmaps;
            push(run, offset, |out| bitmaps.put(*frame, bitmap_len, out));
        }
        st.table.take(|sector| {
            let first = sector as u64 * 128;
            let offset = self.table_offset + first * 4;
            push(run, offset, |out| self.tables.put_sector(first, out));
        });
        run.seal();
        st.begin_flush();
        Ok(())
    }
}

/// Appends a write whose bytes `put` appends; it goes on with the last one where they touch.
fn push(run: &mut FlushRun, offset: u64, put: impl FnOnce(&mut Vec<u8>)) {
    let start = run.bytes.len();
    put(&mut run.bytes);
    extend(run, FileId::IMAGE, offset, start);
}

impl State {
    /// What is dirty is being written.
    fn begin_flush(&mut self) {
        std::mem::swap(&mut self.births, &mut self.births_flushing);
        self.uses.begin_flush();
    }

    /// It was written, or is dirty again.
    pub(super) fn end_flush(&mut self, ok: bool) {
        self.uses.end_flush(ok);
        self.table.end(ok);
        if !ok {
            self.births.append(&mut self.births_flushing);
        }
        // Its memory is kept.
        self.births_flushing.clear();
    }
}
