//! An open image of a format that is all [`Appended`] but for its header: QED, and qcow of version 1.

use super::Appended;
use crate::contract::own_file;
use crate::metadata::Walk;
use crate::{
    Compressed, Description, Encryption, Extent, FlushRun, Foreseen, Image, Load, Plan, Reserve,
    Step, Ticket, ZeroMode, ZeroPlan,
};
use block::{Error, GuestOffset, Result, Storage, Zeroed};
use std::fmt::Debug;

/// What the header of a format says.
pub trait Head: Debug + Send + Sync {
    /// The image, but for what its state adds.
    fn describe(&self) -> Description;

    /// Bytes of the disk.
    fn disk_bytes(&self) -> u64;

    /// Unpacks a cluster, as [`Image::decompress`] says.
    ///
    /// # Errors
    ///
    /// What is no such cluster, or that the format has none.
    fn unpack(&self, input: &[u8], output: &mut [u8]) -> Result<()> {
        let _ = (input, output);
        let format = self.describe().format;
        Err(Error::corrupt(format!(
            "{format} images have no compressed clusters"
        )))
    }
}

/// An open image with the header `H`.
#[derive(Debug)]
pub struct Over<H> {
    pub(crate) name: String,
    pub(crate) header: H,
    /// Why it must not be written, when it must not.
    pub(crate) lacks: Option<String>,
    pub(crate) encryption: Option<Encryption>,
    pub(crate) core: Appended,
}

impl<H> Over<H> {
    /// Its header as it was when the image was opened.
    pub fn header(&self) -> &H {
        &self.header
    }
}

impl<H: Head> Image for Over<H> {
    fn describe(&self) -> Description {
        let mut description = self.header.describe();
        let cache = ("metadata cache", self.core.cache_fact());
        description.facts.push(cache);
        description.read_only_because = self.lacks.clone();
        description
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
        let unpacked = self.header.unpack(input, output);
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
