//! VHDX, Hyper-V's format, which QEMU reads and writes too.
//!
//! Source: Microsoft's "[MS-VHDX]: Virtual Hard Disk v2 (VHDX) File Format", called *specification* here, whose section
//! numbers are given; what it leaves open, QEMU decides.
//!
//! ```text
//!   0              1 M                                                      all in units of 1 MiB
//!   identifier,  │ log │ block table │ metadata │ payload block │ payload block │ …
//!   headers,     │         │                      ▲
//!   region tables│         └──────────────────────┘ where each block is, and its state
//! ```
//!
//! * `guid`, `crc`, `header`, `region`, `metadata`, `locator`: the format. `log`: reading and writing it.
//! * `open`, `create`, `resize`, `link`. `bat`: the block table, read without a lock; `state`: what the lock guards.
//! * `map`: the questions; `flush`: the order on disk, and why it is safe.
//!
//! **What a block reads as.** Present: what is there; present in part, in an image over a parent: what the sector bitmap says is
//! there, and else the parent's. Zero, undefined and unmapped: zeros. Not present: the parent's
//! bytes, or zeros where there is none.

mod bat;
mod crc;
mod create;
mod flush;
mod guid;
mod header;
mod link;
mod locator;
mod log;
mod map;
mod metadata;
mod open;
mod partial;
mod region;
mod resize;
mod state;

pub use create::{CreateOptions, LOG_BYTES, LOG_BYTES_MAX, create};
pub use guid::Guid;
pub use header::{HEADERS_AT, Header, Headers, SIGNATURE};
pub use link::{empty, set_parent};
pub use locator::Locator;
pub use metadata::{BLOCK_BYTES, DISK_BYTES_MAX, Metadata};
pub use open::{BlockPlace, Layout, OpenOptions, mend};
pub use region::{Regions, TABLES_AT};
pub use resize::{grow, repair};

use crate::contract::{
    Description, Extent, FlushRun, Foreseen, Image, Load, Parent, Plan, Reserve, Step, Ticket,
    ZeroMode, ZeroPlan, own_file,
};
use crate::metadata::bitmaps::Bitmaps;
use crate::metadata::step;
use bat::Bat;
use block::{Error, ErrorKind, GuestOffset, Result, Storage, Zeroed, size};
use state::State;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Bytes of the longest file: eight times the largest disk.
const FILE_BYTES_MAX: u64 = 1 << 49;

/// An open VHDX image.
#[derive(Debug)]
pub struct Vhdx {
    name: String,
    layout: Layout,
    size: u64,
    /// log2 of the bytes of a block.
    block_bits: u32,
    read_only: bool,
    /// Why it must not be written, when it must not.
    lacks: Option<String>,
    parent: Option<Parent>,
    /// log2 of the bytes of a logical sector.
    sector_bits: u32,
    bat: Bat,
    /// Of a differencing image: which sectors its blocks have that are there in part, by pages of 4 KiB.
    bitmaps: Bitmaps,
    /// The headers say that the file changes, as they must before it does.
    announced: AtomicBool,
    /// There may be something to foresee.
    ahead: AtomicBool,
    state: Mutex<State>,
}

impl Vhdx {
    /// What the file's structures said when it was opened.
    pub fn layout(&self) -> &Layout {
        &self.layout
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
        let Layout {
            headers, metadata, ..
        } = &self.layout;
        let kind = match (&metadata.parent, metadata.fixed) {
            (Some(_), _) => "differencing",
            (None, true) => "fixed",
            (None, false) => "dynamic",
        };
        let used = self.lock().space.blocks;
        let mut facts = vec![
            ("type", kind.to_owned()),
            ("creator", self.layout.creator.clone()),
            ("data write id", headers.current.data_write.to_string()),
            ("page 83 id", metadata.page_83.to_string()),
            (
                "sectors",
                format!(
                    "{} bytes, {} on the medium",
                    metadata.logical_sector, metadata.physical_sector
                ),
            ),
            (
                "blocks",
                format!(
                    "{used} of {} are there, of {} each",
                    metadata.blocks(),
                    size::human(metadata.block_bytes)
                ),
            ),
            ("log", size::human(u64::from(headers.current.log_bytes))),
        ];
        if self.layout.log_entries > 0 {
            facts.push((
                "log entries",
                format!(
                    "{}: it was not closed cleanly, and is read as if they were in place",
                    self.layout.log_entries
                ),
            ));
        }
        facts
    }
}

impl Image for Vhdx {
    fn describe(&self) -> Description {
        Description {
            backing: self
                .parent
                .as_ref()
                .map(|p| p.names.first().cloned().unwrap_or_default()),
            backing_format: self.parent.as_ref().map(|_| "vhdx".to_owned()),
            read_only_because: self.lacks.clone(),
            facts: self.facts(),
            ..Description::new("vhdx", self.size, self.layout.metadata.block_bytes)
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn unique_id(&self) -> Option<[u8; 16]> {
        Some(self.layout.headers.current.data_write.0)
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
        self.foresee_in(&mut self.lock())
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
        self.end_load(&mut self.lock(), load, bytes)
    }

    fn load_failed(&self, load: &Load) {
        // The page is asked for again when somebody needs it.
        let _ = self.lock().uses.loaded(&self.bitmaps, load, None);
    }

    fn reserved(&self, reserve: &Reserve, zeroed: Zeroed) {
        self.end_reserve(&mut self.lock(), reserve, Some(zeroed));
    }

    fn reserve_failed(&self, reserve: &Reserve) {
        self.end_reserve(&mut self.lock(), reserve, None);
    }

    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        self.begin_flush(&mut self.lock(), run);
        Ok(())
    }

    fn flush_end(&self, run: &mut FlushRun, ok: bool) {
        self.finish_flush(&mut self.lock(), ok);
        run.clear();
    }

    fn is_dirty(&self) -> bool {
        self.lock().is_dirty()
    }

    fn close(&self, files: &[&dyn Storage]) -> Result<()> {
        self.close_blocking(own_file(files, &self.name)?)
    }
}
