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
//! * `header`, `create`, `resize`, `rebase`: the format of a closed image. `open`. Everything else:
//!   `crate::appended`, where entries behind the end of the file are judged too.

mod create;
mod header;
mod open;
pub mod rebase;
mod resize;
#[cfg(test)]
mod tests;

pub use create::{CreateOptions, create};
pub use header::{
    BACKING_NAME_MAX, CLUSTER_BYTES, F_BACKING_FILE, F_BACKING_FORMAT_NO_PROBE, F_NEED_CHECK,
    HEADER_LEN, Header, MAGIC, TABLE_CLUSTERS, disk_bytes_max,
};
pub use open::OpenOptions;
pub use resize::{clear_need_check, grow, may_grow};

use crate::appended::Appended;
use crate::contract::own_file;
use crate::metadata::Walk;
use crate::{
    Description, Extent, FlushRun, Foreseen, Image, Load, Plan, Reserve, Step, Ticket, ZeroMode,
    ZeroPlan,
};
use block::{GuestOffset, Result, Storage, Zeroed, size};

/// An open QED image.
#[derive(Debug)]
pub struct Qed {
    name: String,
    header: Header,
    /// Why it must not be written, when it must not.
    lacks: Option<String>,
    core: Appended,
}

impl Qed {
    /// Its header as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Image for Qed {
    fn describe(&self) -> Description {
        let h = &self.header;
        let mut facts = vec![("table size", size::human(h.table_bytes()))];
        if h.needs_check() {
            facts.push(("need check", true.to_string()));
        }
        facts.push(("metadata cache", self.core.cache_fact()));
        Description {
            backing: h.backing.clone(),
            backing_format: h.backing_format().map(str::to_owned),
            read_only_because: self.lacks.clone(),
            facts,
            ..Description::new("qed", h.image_size, u64::from(h.cluster_size))
        }
    }

    fn size(&self) -> u64 {
        self.header.image_size
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        self.core.map_extent(at, len)
    }

    fn expect(&self, at: GuestOffset) {
        self.core.expect_at(at);
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        self.core.plan_write(at, len)
    }

    fn foresee(&self) -> Option<Foreseen> {
        self.core.foresee()
    }

    fn commit(&self, ticket: Ticket) {
        self.core.end_allocation(ticket, true);
    }

    fn abort(&self, ticket: Ticket) {
        self.core.end_allocation(ticket, false);
    }

    fn plan_zero(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<Step<ZeroPlan>> {
        self.core.plan_zero(at, len, mode)
    }

    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        self.core.loaded(load, bytes)
    }

    fn load_failed(&self, load: &Load) {
        self.core.load_failed(load);
    }

    fn reserved(&self, reserve: &Reserve, zeroed: Zeroed) {
        self.core.reserved(reserve, Some(zeroed));
    }

    fn reserve_failed(&self, reserve: &Reserve) {
        self.core.reserved(reserve, None);
    }

    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        self.core.fill_flush(run)
    }

    fn flush_end(&self, run: &mut FlushRun, ok: bool) {
        self.core.end_flush(ok);
        run.clear();
    }

    fn is_dirty(&self) -> bool {
        self.core.is_dirty()
    }

    fn close(&self, files: &[&dyn Storage]) -> Result<()> {
        self.core.close_blocking(own_file(files, &self.name)?)
    }
}
