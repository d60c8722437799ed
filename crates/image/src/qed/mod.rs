//! QED, QEMU's format of 2010 (source: QEMU's `docs/interop/qed_spec.rst`, called *specification* here).
//!
//! ```text
//!   header │ … clusters: L1 table, L2 tables, data, in the order in which they were needed …
//!
//!   guest cluster ─▶ L1 table ─▶ L2 table ─▶ host cluster
//!                    in memory   slices in frames (see `crate::metadata`)
//! ```
//!
//! There are no refcounts: a cluster is what one entry refers to, and new ones come from the end of the file. So
//! nothing is ever freed; a discard punches its hole in place.
//!
//! **The need-check bit.** QEMU writes entries without waiting for what they refer to, and sets this bit meanwhile: an
//! image found with it is to be checked. Flushes here keep the order instead (see `flush`), at one barrier for
//! writes into clusters that read as zeros and two for others, so that the bit is never needed: whatever a
//! crash leaves has leaked clusters at worst. An image that has the bit is readable, and written to only after a check
//! (`tool::check`) has cleared it.
//!
//! **Entries behind the end of the file.** The file grows over them, and what a guest then writes belongs to two of its
//! clusters, or is a table. So an L2 slice is judged when it is first read from the file: an entry behind the end at open
//! is none of ours then, reads as an error, and ends all changes, wherever the file has grown to meanwhile and whoever
//! was given that place. What remains: the end at open is only known while the image is open. A slice that nobody reads is
//! not judged, and the file stays grown over its bad entry (as it does, judged or not, where the image is given up without a
//! close). To the next one who opens the image that entry is like any other: a check finds it where the cluster is in use
//! twice, and nothing finds it where the cluster leaked. A check beforehand finds all of them.
//!
//! * `header`, `create`, `resize`: the format of a closed image. `open`, `close`.
//! * `map`, `write`, `zero`: the questions. `space`: free clusters. `state`: what the lock guards. `flush`: the order on disk.

mod close;
mod create;
mod flush;
mod header;
mod map;
mod open;
pub mod rebase;
mod resize;
mod space;
mod state;
#[cfg(test)]
mod tests;
mod write;
mod zero;

pub use create::{CreateOptions, create};
pub use header::{
    BACKING_NAME_MAX, CLUSTER_BYTES, F_BACKING_FILE, F_BACKING_FORMAT_NO_PROBE, F_NEED_CHECK,
    HEADER_LEN, Header, MAGIC, TABLE_CLUSTERS, disk_bytes_max,
};
pub use open::OpenOptions;
pub use resize::{clear_need_check, grow, may_grow};

use crate::metadata::tables::Tables;
use crate::metadata::{Layout, Walk};
use crate::raw::not_compressed;
use crate::{
    Description, Extent, FileId, FlushRun, Freed, Image, Load, Need, Plan, Reserve, Step, Ticket,
    ZeroMode, ZeroPlan,
};
use block::{Error, ErrorKind, GuestOffset, Result, Storage, Zeroed, size};
use state::State;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An open QED image.
#[derive(Debug)]
pub struct Qed {
    name: String,
    header: Header,
    layout: Layout,
    /// `Some` when it must not be written: by wish (empty) or for a reason.
    read_only: Option<String>,
    /// The reason, when the image has one.
    lacks: Option<String>,
    tables: Tables,
    /// Where the file ends, in bytes: whole clusters. What refers to a place behind it is not sound.
    end: AtomicU64,
    /// Where it ended when the image was opened: what refers behind it is this process's, or not sound.
    end_at_open: u64,
    state: Mutex<State>,
    /// There may be something to foresee.
    ahead: AtomicBool,
    /// An entry was found that refers behind the end that the file had at open: it comes to refer to whatever the file
    /// gets there, so the image is not changed any more. Set with the lock held.
    damaged: AtomicBool,
}

impl Qed {
    /// Its header as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics with the state half changed; and refusing all
        // further requests would help nobody.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_backing(&self) -> bool {
        self.header.backing.is_some()
    }

    #[inline]
    fn check_writable(&self) -> Result<()> {
        match &self.read_only {
            None if self.damaged.load(Ordering::Acquire) => Err(self.why_damaged()),
            None => Ok(()),
            Some(why) => Err(self.why_read_only(why)),
        }
    }

    #[cold]
    fn why_damaged(&self) -> Error {
        Error::corrupt(format!(
            "{}: has entries that refer to no cluster of the file, and is not written to any more: run diskplane \
             check --repair all",
            self.name
        ))
    }

    #[cold]
    fn why_read_only(&self, why: &str) -> Error {
        let name = &self.name;
        let text = match why {
            "" => format!("{name}: is open for reading only"),
            why => format!("{name}: is open for reading only: {why}"),
        };
        Error::new(ErrorKind::ReadOnly, text)
    }
}

impl Image for Qed {
    fn describe(&self) -> Description {
        let h = &self.header;
        let mut facts = vec![("table size", size::human(h.table_bytes()))];
        if h.needs_check() {
            facts.push(("need check", true.to_string()));
        }
        let cache = self.lock().cache.fact(&self.tables, &self.layout);
        facts.push(("metadata cache", cache));
        Description {
            format: "qed",
            size: h.image_size,
            cluster_size: u64::from(h.cluster_size),
            backing: h.backing.clone(),
            backing_format: h.backing_format().map(str::to_owned),
            data_file: None,
            read_only_because: self.lacks.clone(),
            facts,
        }
    }

    fn size(&self) -> u64 {
        self.layout.size
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        self.map_extent(at, len)
    }

    fn expect(&self, at: GuestOffset) {
        self.expect_at(at);
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        self.check_writable()?;
        self.check_range(at, len)?;
        if let Some(plan) = self.plan_in_place(at, len) {
            return Ok(Step::Done(plan));
        }
        let mut st = self.lock();
        let plan = self.plan_allocating(&mut st, at, len);
        st.step(plan)
    }

    fn foresee(&self) -> Option<Need> {
        if !self.ahead.load(Ordering::Relaxed) {
            return None;
        }
        let mut st = self.lock();
        self.ahead.store(false, Ordering::Relaxed);
        if let Some(reserve) = self.reserve_ahead(&mut st) {
            return Some(Need::Reserve(reserve));
        }
        st.flush_soon().then_some(Need::Commit)
    }

    fn commit(&self, ticket: Ticket) {
        self.end_ticket(&mut self.lock(), ticket, true);
    }

    fn abort(&self, ticket: Ticket) {
        self.end_ticket(&mut self.lock(), ticket, false);
    }

    fn plan_zero(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<Step<ZeroPlan>> {
        self.check_writable()?;
        self.check_range(at, len)?;
        let mut st = self.lock();
        let plan = self.plan_zeroes(&mut st, at, len, mode);
        st.step(plan)
    }

    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        self.end_loading(&mut self.lock(), load, bytes)
    }

    fn load_failed(&self, load: &Load) {
        self.drop_load(&mut self.lock(), load);
    }

    fn reserved(&self, reserve: &Reserve, zeroed: Zeroed) {
        let zeroed = Some(zeroed == Zeroed::Yes);
        self.end_reserve(&mut self.lock(), reserve, zeroed);
    }

    fn reserve_failed(&self, reserve: &Reserve) {
        self.end_reserve(&mut self.lock(), reserve, None);
    }

    fn decompress(&self, _: &[u8], _: &mut [u8]) -> Result<()> {
        Err(not_compressed("qed"))
    }

    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        self.begin_flush(&mut self.lock(), run)
    }

    fn flush_end(&self, run: &mut FlushRun, ok: bool) {
        self.finish_flush(&mut self.lock(), ok);
        run.clear();
    }

    fn is_dirty(&self) -> bool {
        self.lock().is_dirty()
    }

    fn take_freed(&self, _: &mut Vec<Freed>) {}

    fn release(&self, _: &Freed, _: Zeroed) {}

    fn close(&self, files: &[&dyn Storage]) -> Result<()> {
        match files.get(usize::from(FileId::IMAGE.0)) {
            Some(storage) => self.close_blocking(*storage),
            None => Err(Error::invalid(format!(
                "{}: closed without its file",
                self.name
            ))),
        }
    }
}
