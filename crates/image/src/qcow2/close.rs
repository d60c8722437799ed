//! Clean close: what a closed image has over a crashed one.

use super::Qcow2;
use super::cache::Owner;
use super::shared::copy_of_key;
use super::state::{Ask, Halt, State};
use crate::metadata::carry_out;
pub(super) use crate::metadata::read_short;
use crate::{FlushRun, Need};
use block::{Error, Result, Storage, align_up};

/// Flushes that a close may need: one for what is dirty, one for the refcounts that the
/// first set free, and as many for the former places of the refcount table.
const FLUSHES_MAX: u32 = 8;

impl Qcow2 {
    pub(super) fn close_blocking(&self, storage: &dyn Storage) -> Result<()> {
        if self.read_only.is_some() || self.bitmaps.as_ref().is_some_and(|b| b.is_saved()) {
            return Ok(());
        }
        {
            let mut st = self.lock();
            st.lazy.closing = true;
            self.end_ahead(&mut st);
        }
        self.flush_blocking(storage)?;
        let mut st = self.lock();
        let former = std::mem::take(&mut st.refs.former);
        for old in former {
            for cluster in old.first..old.first + old.count {
                let frame =
                    self.ask_blocking(&mut st, storage, |st| self.ref_frame(st, cluster))?;
                match self.refcount(frame, cluster) {
                    0 => {}
                    count => self.set_refcount(&mut st, frame, cluster, count - 1),
                }
            }
        }
        drop(st);
        self.flush_blocking(storage)?;
        self.cut_tail(storage)?;
        storage.sync()?;
        self.clear_dirty_bit(storage)?;
        match &self.bitmaps {
            // Last: it takes clusters that this state knows nothing of.
            Some(bitmaps) => bitmaps.save(storage),
            None => Ok(()),
        }
    }

    /// Flushes until nothing is dirty.
    fn flush_blocking(&self, storage: &dyn Storage) -> Result<()> {
        let mut run = FlushRun::default();
        for _ in 0..FLUSHES_MAX {
            let mut st = self.lock();
            if !self.has_dirty(&st) {
                return Ok(());
            }
            self.begin_flush(&mut st, &mut run)?;
            drop(st);
            let written = carry_out(&[storage], &run);
            self.finish_flush(&mut self.lock(), written.is_ok());
            written?;
        }
        Err(Error::new(
            block::ErrorKind::Io,
            format!("{}: metadata stays dirty", self.name),
        ))
    }

    /// Asks until there is an answer, doing what it needs.
    fn ask_blocking<T>(
        &self,
        st: &mut State,
        storage: &dyn Storage,
        mut ask: impl FnMut(&mut State) -> Ask<T>,
    ) -> Result<T> {
        loop {
            match ask(st) {
                Ok(answer) => return Ok(answer),
                Err(Halt::Fail(error)) => return Err(error),
                Err(Halt::Need(Need::Load(load))) => {
                    let loaded = read_short(storage, load.offset.0, load.len as usize)
                        .and_then(|bytes| self.end_loading(st, &load, &bytes));
                    if let Err(error) = loaded {
                        self.drop_load(st, &load);
                        return Err(error);
                    }
                }
                Err(Halt::Need(Need::Commit)) => {
                    let mut run = FlushRun::default();
                    self.begin_flush(st, &mut run)?;
                    let written = carry_out(&[storage], &run);
                    self.finish_flush(st, written.is_ok());
                    written?;
                }
                Err(_) => {
                    return Err(Error::new(
                        block::ErrorKind::Io,
                        format!("{}: closed while requests were in flight", self.name),
                    ));
                }
            }
        }
    }

    /// Gives reserved space that was not used back.
    fn cut_tail(&self, storage: &dyn Storage) -> Result<()> {
        let mut st = self.lock();
        let bits = self.geometry.cluster_bits;
        let opened_end = align_up(self.opened_len, self.geometry.cluster()) >> bits;
        if st.space.end <= opened_end {
            return Ok(());
        }
        let mut end = st.space.end;
        while end > opened_end {
            let cluster = end - 1;
            let used = self.ask_blocking(&mut st, storage, |st| self.refcount_of(st, cluster))?;
            if used != 0 {
                break;
            }
            end -= 1;
            // A block's worth of clusters that has no refcounts is passed in one step.
            if !self.has_block(&st, cluster) {
                let block = self.geometry.block_refcount_bits();
                end = ((cluster >> block) << block).max(opened_end);
            }
        }
        // Never below whole clusters: the last one may have been completed in place.
        storage.set_len(end << bits)?;
        self.forget_behind(&mut st, end);
        Ok(())
    }

    /// Gives up a load that nobody will carry out.
    pub(super) fn drop_load(&self, st: &mut State, load: &crate::Load) {
        if let Some(l1) = copy_of_key(load.key) {
            self.cancel_copy(st, l1);
        } else if let Some(owner) = Owner::of_key(load.key) {
            st.cache.cancel_load(&self.tables, owner, load.offset.0);
        }
    }
}
