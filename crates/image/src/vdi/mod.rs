//! VDI, VirtualBox's format, as VirtualBox and QEMU make it.
//!
//! Sources: there is no specification; VirtualBox's and QEMU's behaviour and the descriptions of both decide.
//!
//! ```text
//!   header │ map ······· │ block │ block │ block │ …
//!           └▶ for each block of the disk: its number in the file, or none
//! ```
//!
//! * `header`: the format. `open`, `create`, `resize`, `repair`.
//! * `pages`: the map in memory. `holes`: numbers that no block has.
//! * `state`: what the lock guards; `map`: the questions; `flush`: the order on disk, and why it is safe.
//!
//! An entry is 0xffffffff for a block that was never written and 0xfffffffe for one that was discarded; both read as
//! zeros. A new block takes the number that comes behind all others. It lies in space that reads as zeros, and is the
//! guest's at once, as in `image::vhd`. A discard punches its hole in place.
//!
//! Images with parents (VirtualBox's snapshots) are refused, as by QEMU. QEMU opens only images with blocks of 1 MiB,
//! VirtualBox all powers of two, and so do we.

mod create;
mod flush;
mod header;
mod holes;
mod map;
mod open;
mod pages;
mod repair;
mod resize;
mod state;

pub use create::{CreateOptions, create};
pub use header::{BLOCK_BYTES, BLOCKS_MAX, HEADER_BYTES, Header, ImageType, MAGIC, MAGIC_AT, Uuid};
pub use open::{Layout, OpenOptions, mend};
pub use repair::repair;
pub use resize::grow;

use crate::contract::{
    Description, Extent, FlushRun, Foreseen, Image, Load, Plan, Reserve, Step, Ticket, ZeroMode,
    ZeroPlan, own_file,
};
use crate::metadata::bitmaps::Bitmaps;
use crate::metadata::step;
use block::{Error, ErrorKind, GuestOffset, Result, Storage, Zeroed, size};
use state::State;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The entry of a block that was never written.
pub const FREE: u32 = u32::MAX;
/// The entry of a block that was discarded. Entries below it are numbers of blocks.
pub const ZERO: u32 = u32::MAX - 1;

/// An open VDI image.
#[derive(Debug)]
pub struct Vdi {
    name: String,
    /// As it was when the image was opened.
    header: Header,
    size: u64,
    block_bits: u32,
    data_offset: u64,
    map_offset: u64,
    /// Where the last whole sector of the file ends, for reading only; else no block is behind the file's end.
    readable_end: u64,
    read_only: bool,
    /// The map, by pages. Entries change from none to some only, and after what they stand for is there.
    pages: Bitmaps,
    state: Mutex<State>,
    /// There may be something to foresee.
    ahead: AtomicBool,
}

impl Vdi {
    /// The header as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics with the state half changed; and refusing all
        // further requests would help nobody.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn block_bytes(&self) -> u64 {
        1 << self.block_bits
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
        let used = self.lock().space.blocks;
        let mut facts = vec![
            ("type", self.header.image_type.to_string()),
            ("uuid", self.header.uuid.to_string()),
            (
                "blocks",
                format!(
                    "{used} of {} are there, of {} each",
                    self.header.blocks,
                    size::human(self.block_bytes())
                ),
            ),
        ];
        if !self.header.comment.is_empty() {
            facts.push(("comment", self.header.comment.clone()));
        }
        facts
    }
}

impl Image for Vdi {
    fn describe(&self) -> Description {
        Description {
            facts: self.facts(),
            ..Description::new("vdi", self.size, self.block_bytes())
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        step(self.map_at(None, at, len))
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
        // Nobody asked for it: nothing to give up.
        let _ = self.end_load(&mut self.lock(), load, None);
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
