//! VHD, as Virtual PC, Hyper-V, XenServer's tools and QEMU ("vpc") make it.
//!
//! Sources: Microsoft's "Virtual Hard Disk Image Format Specification" 1.0, called *specification* here; what it leaves
//! open, QEMU and XenServer's tools decide.
//!
//! ```text
//!   fixed      disk ······································· │ footer
//!   dynamic,   footer's copy │ header │ table │ block │ block │ … │ footer
//!   differencing                          │       bitmap │ data
//!                                         └▶ first sector of each block
//! ```
//!
//! * `footer`, `header`, `geometry`, `locator`, `batmap`: the format. `open`, `create`, `resize`, `link`.
//! * `tables`: what is read without a lock; `state`: what the lock guards.
//! * `map`: the questions; `flush`: the order on disk, and why it is safe.
//!
//! Of a block only the sectors whose bits are set in its bitmap are the image's; others read as zeros, or as the parent has
//! them. In dynamic images QEMU looks at no bits, which is the same where a file follows the specification: what has no bit is
//! zeros on disk.

mod batmap;
mod create;
mod flush;
mod footer;
mod geometry;
mod header;
mod link;
mod locator;
mod map;
mod open;
mod resize;
mod state;
mod tables;

pub use batmap::Batmap;
pub use create::{CreateOptions, create};
pub use footer::{COOKIE, DiskType, EPOCH, FOOTER_BYTES, Footer, SizeFrom, UniqueId};
pub use geometry::{Geometry, MAX_SECTORS, size_of_new};
pub use header::{BLOCK_BYTES, BLOCKS_MAX, HEADER_BYTES, Header, LOCATORS, Locator};
pub use link::{empty, set_parent};
pub use locator::{NAME_BYTES_MAX, NewParent};
pub use open::{Layout, OpenOptions, fixed_footer, mend};
pub use resize::grow;

use crate::contract::{
    Description, Extent, FlushRun, Foreseen, Image, Load, Parent, Plan, Reserve, Step, Ticket,
    ZeroMode, ZeroPlan, own_file,
};
use crate::metadata::step;
use block::{Error, ErrorKind, GuestOffset, Result, Storage, Zeroed, size};
use state::State;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tables::Tables;

/// An open VHD image.
#[derive(Debug)]
pub struct Vhd {
    name: String,
    footer: Footer,
    header: Option<Header>,
    disk_type: DiskType,
    size: u64,
    /// Bytes of a block, 2 to the power of `block_bits`; of a fixed image 1.
    block_bytes: u64,
    block_bits: u32,
    bitmap_bytes: u64,
    table_offset: u64,
    /// What the tables take: no block may lie there.
    taken: [Range<u64>; 2],
    read_only: bool,
    /// Why it must not be written, when it must not.
    lacks: Option<String>,
    parent: Option<Parent>,
    tables: Tables,
    state: Mutex<State>,
    /// There may be something to foresee.
    ahead: AtomicBool,
}

impl Vhd {
    /// The footer as it was when the image was opened.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The header, of all but fixed images.
    pub fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics with the state half changed; and refusing all
        // further requests would help nobody.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_writable(&self) -> Result<()> {
        match self.read_only {
            false => Ok(()),
            true => Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{}: is open for reading only", self.name),
            )),
        }
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = vec![
            ("type", self.disk_type.to_string()),
            ("creator", self.footer.creator_name()),
            ("unique id", self.footer.unique_id.to_string()),
        ];
        let Geometry {
            cylinders,
            heads,
            sectors_per_track,
        } = self.footer.geometry;
        let counts = match self.footer.size_is_current() {
            true => "the footer's current size counts",
            false => "counts as the size",
        };
        facts.push((
            "geometry",
            format!("{cylinders} × {heads} × {sectors_per_track} ({counts})"),
        ));
        if self.header.is_some() {
            facts.push(("blocks", self.block_fact()));
        }
        if self.footer.saved_state {
            facts.push((
                "saved state",
                "belongs to a machine that was saved".to_owned(),
            ));
        }
        if self.footer.hidden {
            facts.push(("hidden", "yes (XenServer: others lie over it)".to_owned()));
        }
        facts
    }

    fn block_fact(&self) -> String {
        let used = self.lock().space.blocks;
        format!(
            "{used} of {} are there, of {} each",
            self.size.div_ceil(self.block_bytes),
            size::human(self.block_bytes)
        )
    }
}

impl Image for Vhd {
    fn describe(&self) -> Description {
        Description {
            backing: self
                .parent
                .as_ref()
                .map(|p| p.names.first().cloned().unwrap_or_default()),
            backing_format: self.parent.as_ref().map(|parent| {
                let raw = parent.unique_ids.is_empty();
                if raw { "raw" } else { "vhd" }.to_owned()
            }),
            read_only_because: self.lacks.clone(),
            facts: self.facts(),
            ..Description::new("vhd", self.size, self.block_bytes)
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn unique_id(&self) -> Option<[u8; 16]> {
        Some(self.footer.unique_id.0)
    }

    fn parent(&self) -> Option<Parent> {
        self.parent.clone()
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        step(self.map_at(at, len))
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        self.check_writable()?;
        step(self.plan_at(at, len))
    }

    fn foresee(&self) -> Option<Foreseen> {
        if !self.ahead.load(Ordering::Relaxed) {
            return None;
        }
        self.ahead.store(false, Ordering::Relaxed);
        self.reserve_ahead(&mut self.lock())
    }

    fn commit(&self, ticket: Ticket) {
        self.end_ticket(&mut self.lock(), ticket, true);
    }

    fn abort(&self, ticket: Ticket) {
        self.end_ticket(&mut self.lock(), ticket, false);
    }

    fn plan_zero(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<Step<ZeroPlan>> {
        self.check_writable()?;
        step(self.zero_at(at, len, mode))
    }

    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        self.end_load(&mut self.lock(), load, Some(bytes))
    }

    fn load_failed(&self, load: &Load) {
        // The block is asked for again when somebody needs it.
        let _ = self.end_load(&mut self.lock(), load, None);
    }

    fn reserved(&self, reserve: &Reserve, zeroed: Zeroed) {
        self.end_reserve(&mut self.lock(), reserve, Some(zeroed));
    }

    fn reserve_failed(&self, reserve: &Reserve) {
        self.end_reserve(&mut self.lock(), reserve, None);
    }

    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        self.begin_flush(&mut self.lock(), run)
    }

    fn flush_end(&self, run: &mut FlushRun, ok: bool) {
        self.lock().end_flush(ok);
        run.clear();
    }

    fn is_dirty(&self) -> bool {
        self.lock().is_dirty()
    }

    fn close(&self, files: &[&dyn Storage]) -> Result<()> {
        self.close_blocking(own_file(files, &self.name)?)
    }
}
