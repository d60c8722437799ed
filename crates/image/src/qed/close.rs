//! Clean close: what a closed image has over a crashed one.

use super::Qed;
use crate::FlushRun;
use crate::metadata::carry_out;
use block::{Error, ErrorKind, Result, Storage};

/// Flushes that a close may need: one is enough.
const FLUSHES_MAX: u32 = 4;

impl Qed {
    pub(super) fn close_blocking(&self, storage: &dyn Storage) -> Result<()> {
        if self.read_only.is_some() {
            return Ok(());
        }
        self.flush_blocking(storage)?;
        let mut st = self.lock();
        let before = st.space.end;
        let end = st.space.cut_tail();
        if end == before {
            return Ok(());
        }
        // Space that was reserved and not used.
        storage.set_len(end << self.layout.cluster_bits)?;
        self.end.store(
            end << self.layout.cluster_bits,
            std::sync::atomic::Ordering::Release,
        );
        storage.sync()
    }

    /// Flushes until nothing is dirty.
    fn flush_blocking(&self, storage: &dyn Storage) -> Result<()> {
        let mut run = FlushRun::default();
        for _ in 0..FLUSHES_MAX {
            let mut st = self.lock();
            if !st.is_dirty() {
                return Ok(());
            }
            self.begin_flush(&mut st, &mut run)?;
            drop(st);
            let written = carry_out(storage, &run);
            self.finish_flush(&mut self.lock(), written.is_ok());
            written?;
        }
        let text = format!("{}: metadata stays dirty", self.name);
        Err(Error::new(ErrorKind::Io, text))
    }
}
