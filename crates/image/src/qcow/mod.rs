//! qcow of version 1, QEMU's copy-on-write format before qcow2 (source: QEMU's `block/qcow.c`, the only description).
//!
//! ```text
//!   header │ backing file's name │ L1 table │ clusters, L2 tables and compressed bytes, in the order in which they were needed …
//!
//!   guest cluster ─▶ L1 table ─▶ L2 table ─▶ host cluster, or compressed bytes
//!                    in memory   slices in frames (see `crate::metadata`)
//! ```
//!
//! There are no refcounts, no zeros but those that are written, and nothing says that an image was closed: what new clusters
//! need, and what a crash leaves of them, is that of QED (`crate::appended`). QEMU writes entries before what they refer to;
//! flushes here keep the order.
//!
//! The L1 table begins where the name ends, so it shares a sector with the header; both are written as one then.
//!
//! Clusters may be compressed (raw deflate with a window of 4 KiB). One that is written to gets a cluster of its own, and its
//! bytes are leaked, as in QEMU.
//!
//! Encrypted images (AES, with the passphrase as the key) are only read, as those of qcow2: that encryption is not safe.
//!
//! * `header`, `create`, `empty`: the format of a closed image. `open`, and `close` here. `stream`: a new image in one go,
//!   compressed.

mod create;
mod empty;
mod header;
mod open;
mod stream;
#[cfg(test)]
mod tests;

pub use create::{CreateOptions, create};
pub use empty::empty;
pub use header::{BACKING_NAME_MAX, HEADER_LEN, Header, L1_ENTRIES_MAX, MAGIC};
pub use open::OpenOptions;
pub use stream::ImageWriter;

use crate::appended::Appended;
use crate::contract::own_file;
use crate::metadata::Walk;
use crate::{
    Compressed, Description, Encryption, Extent, FlushRun, Foreseen, Image, Load, Plan, Reserve,
    Step, Ticket, ZeroMode, ZeroPlan, qcow2,
};
use block::{GuestOffset, Result, Storage, Zeroed, size};

/// An open image.
#[derive(Debug)]
pub struct Qcow {
    name: String,
    header: Header,
    /// Why it must not be written, when it must not.
    lacks: Option<String>,
    encryption: Option<Encryption>,
    core: Appended,
}

impl Qcow {
    /// Its header as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Image for Qcow {
    fn describe(&self) -> Description {
        let h = &self.header;
        Description {
            backing: h.backing.clone(),
            read_only_because: self.lacks.clone(),
            facts: vec![
                ("table size", size::human(h.table_bytes())),
                ("metadata cache", self.core.cache_fact()),
            ],
            ..Description::new("qcow", h.disk_bytes(), h.cluster_size())
        }
    }

    fn size(&self) -> u64 {
        self.header.disk_bytes()
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

    fn decompress(&self, _: &Compressed, input: &[u8], output: &mut [u8]) -> Result<()> {
        let unpacked = qcow2::unpack(qcow2::Compression::Zlib, input, output);
        unpacked.map_err(|error| error.within(&self.name))
    }

    fn encryption(&self) -> Option<&Encryption> {
        self.encryption.as_ref()
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
