//! Clean close of an image of one file: what a closed image has over a crashed one.

use super::Appended;
use crate::FlushRun;
use crate::metadata::carry_out;
use block::{Error, ErrorKind, Result, Storage};

/// Flushes that a close may need: one is enough.
const FLUSHES_MAX: u32 = 4;

impl Appended {
    /// See [`crate::Image::close`].
    pub(crate) fn close_blocking(&self, storage: &dyn Storage) -> Result<()> {
        let mut run = FlushRun::default();
        for _ in 0..FLUSHES_MAX {
            if !self.is_dirty() {
                // Space that was reserved and not used.
                let Some(end) = self.cut_tail() else {
                    return Ok(());
                };
                storage.set_len(end)?;
                return storage.sync();
            }
            self.fill_flush(&mut run)?;
            let written = carry_out(&[storage], &run);
            self.end_flush(written.is_ok());
            written?;
        }
        let text = format!("{}: metadata stays dirty", self.name);
        Err(Error::new(ErrorKind::Io, text))
    }

    /// See [`crate::Image::flush_begin`]: all stages of it.
    pub(crate) fn fill_flush(&self, run: &mut FlushRun) -> Result<()> {
        run.clear();
        let ordered = self.begin_flush(run)?;
        run.seal_ordered(ordered);
        Ok(())
    }
}
