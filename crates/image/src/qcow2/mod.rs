//! qcow2, versions 2 and 3 (source: QEMU's `docs/interop/qcow2.rst`, called *specification* here).
//!
//! ```text
//!   guest cluster ─▶ L1 table ─▶ L2 table ─▶ host cluster ─▶ refcount table ─▶ refcount block
//!                    in memory   slices in                   in memory         slices in
//!                                frames                                        frames
//! ```
//!
//! * `crate::metadata`: the cache of slices, and the tables that are read without a lock.
//! * `state`: what the lock guards: the cache, allocations in flight, `refcount`, `alloc` and `ahead`.
//! * `map`, `write`, `zero`: the questions; `shared`: tables that snapshots share.
//! * `flush`: the order on disk, and why it is safe; `lazy`: refcounts that are postponed.
//! * `edit`: changes of a closed image's metadata, all at once; `snapshot`: internal snapshots.
//! * `compress_image`: a new image in one go, with compressed clusters; `compressed`: such clusters in an open one.
//! * `damaged`: corruption found while the image is written to.
//! * `data`: images whose guest data are in a file of their own.
//! * `header`, `extensions`, `features`, `entry`: the format. `open`, `close`, `compress`.
//!
//! Internal functions answer with `state::Ask`: a value, or why there is none now (`?` passes it up).

mod ahead;
mod alloc;
mod amend;
pub mod bitmap;
pub mod check;
mod close;
mod compress;
mod compress_image;
mod compressed;
#[cfg(test)]
mod corners;
mod create;
pub mod crypt;
mod damaged;
mod data;
mod downgrade;
pub mod edit;

mod entry;
pub mod extensions;
pub mod features;
mod flush;
#[cfg(test)]
mod growing;
mod header;
#[cfg(test)]
mod hostile;
mod lazy;
#[cfg(test)]
mod lazy_tests;
mod map;
mod open;
mod pending;
pub mod rebase;
mod refcount;
pub mod resize;
mod rewidth;
#[cfg(test)]
mod scale;
mod shared;
#[cfg(test)]
mod shared_tests;
pub mod snapshot;
mod state;
mod subcluster;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod threads;
mod write;
mod zero;

pub use amend::{AmendOptions, amend};
pub use compress::Compressor;
pub(crate) use compress::unpack;
pub use compress_image::ImageWriter;
pub use create::{CreateOptions, create};
pub use downgrade::downgrade;
pub use header::{
    Compression, EXTENDED_CLUSTER_BITS_MIN, HOST_OFFSET_END, Header, L1_BYTES_MAX, MAGIC,
    REFCOUNT_TABLE_BYTES_MAX, SNAPSHOTS_MAX, V2_LEN, V3_LEN,
};
pub use open::{CACHE_BYTES_DEFAULT, CACHE_BYTES_MAX, OpenOptions};

use crate::contract::own_file;
use crate::metadata::{Walk, cache, tables};
use crate::words::{read_u32, read_u64};
use crate::{
    Compressed, DataFile, Description, Encryption, Extent, FlushRun, Foreseen, Freed, Image, Load,
    Need, Pack, PackedPlace, Plan, Prewrite, Reserve, Step, Ticket, ZeroMode, ZeroPlan,
};
use block::{Error, ErrorKind, GuestOffset, Result, Storage, Zeroed, size};
use cache::Owner;
use entry::{Entry, Geometry, OVERLAP};
use state::{Places, State};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tables::Tables;

/// An open qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    name: String,
    header: Header,
    data_file: Option<DataFile>,
    encryption: Option<Encryption>,
    geometry: Geometry,
    compression: Compression,
    /// `Some` when it must not be written: by wish (empty) or for a reason.
    read_only: Option<String>,
    /// The reason, when the image has one.
    lacks: Option<String>,
    first_sector: [u8; 512],
    opened_len: u64,
    tables: Tables,
    state: Mutex<State>,
    /// The enabled bitmaps of an image that may be written.
    bitmaps: Option<Box<bitmap::Tracker>>,
    /// There may be something to foresee.
    ahead: AtomicBool,
    /// Whether changes are refused, and why: see `damaged`.
    barred: AtomicU8,
}

impl Qcow2 {
    /// Its header as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics with the state half changed; and refusing all
        // further requests would help nobody.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a change may be planned now. The enabled bitmaps are marked on disk before the first one.
    #[inline]
    fn bitmaps_ready(&self) -> Result<bool> {
        match self.bitmaps.as_ref().map(|bitmaps| bitmaps.ready()) {
            None | Some(bitmap::Ready::Yes) => Ok(true),
            Some(bitmap::Ready::Flush) => Ok(false),
            Some(bitmap::Ready::Closed) => Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{}: is closed", self.name),
            )),
        }
    }

    /// Notes a change of `len` bytes at `at` in the enabled bitmaps.
    #[inline]
    fn note_change(&self, at: GuestOffset, len: u64) {
        if let Some(bitmaps) = &self.bitmaps {
            bitmaps.mark(at.0, len);
        }
    }

    /// Takes the bytes of loaded slices in.
    fn end_loading(&self, st: &mut State, load: &Load, bytes: &[u8]) -> Result<()> {
        if let Some(l1) = shared::copy_of_key(load.key) {
            return self.end_copy(st, l1, bytes);
        }
        let unknown = || Error::invalid(format!("{}: a load nobody asked for", self.name));
        let g = &self.geometry;
        let decode = |words: &mut Vec<u64>, bytes: Option<&[u8]>| {
            words.clear();
            words.extend(bytes.unwrap_or_default().chunks(8).map(open::word_of));
        };
        let known = match Owner::of_key(load.key).ok_or_else(unknown)? {
            Owner::Ref(slice) => {
                decode(&mut st.words, Some(bytes));
                st.cache
                    .end_load(&self.tables, slice, load.offset.0, Some(&st.words))
            }
            Owner::L2(span) => {
                let places = &st.places;
                let take = |words: &mut Vec<u64>, slice: u64, host: u64, at: usize, len: usize| {
                    decode(words, bytes.get(at..at + len));
                    // Of extended entries, the first word of two.
                    let entries = words.iter_mut().step_by(1 << g.entry_word_bits());
                    if g.data_file {
                        let first = slice << g.slice_entry_bits();
                        for (raw, cluster) in entries.zip(first..) {
                            *raw = g.judge_outside(*raw, cluster);
                        }
                    } else if self.read_only.is_none() {
                        for raw in entries {
                            *raw = self.judge(places, *raw);
                        }
                    }
                    // A copy of the table may have taken its place meanwhile.
                    self.home_of(slice, host, words)
                };
                let whence = (span, load.offset.0);
                st.cache
                    .end_load_span(&self.tables, g, whence, &mut st.words, take)
            }
        };
        known.then_some(()).ok_or_else(unknown)
    }

    /// Marks an L2 entry that points at metadata: a write through it would destroy the image.
    fn judge(&self, places: &Places, raw: u64) -> u64 {
        let host = match self.geometry.decode(raw) {
            Ok(Entry::Data { host, .. }) => host,
            Ok(Entry::Zero {
                host: Some(host), ..
            }) => host,
            _ => return raw,
        };
        match places.holds(host >> self.geometry.cluster_bits) {
            true => raw | OVERLAP,
            false => raw,
        }
    }
}

impl Image for Qcow2 {
    fn describe(&self) -> Description {
        let h = &self.header;
        let st = self.lock();
        let mut facts = vec![
            ("version", h.version.to_string()),
            ("refcount bits", h.refcount_bits().to_string()),
        ];
        if h.version >= 3 {
            let compression = match self.compression {
                Compression::Zlib => "zlib",
                Compression::Zstd => "zstd",
            };
            let lazy = h.compatible & features::LAZY_REFCOUNTS != 0;
            facts.push(("compression", compression.to_owned()));
            facts.push(("lazy refcounts", lazy.to_string()));
            facts.push(("extended l2", h.extended_l2().to_string()));
            for (bit, name) in [(features::DIRTY, "dirty"), (features::CORRUPT, "corrupt")] {
                if h.incompatible & bit != 0 {
                    facts.push((name, true.to_string()));
                }
            }
        }
        if h.extended_l2() {
            let unit = size::human(self.geometry.unit());
            facts.push(("subclusters", unit));
        }
        let data_file = self.data_file.clone();
        if let Some(data) = &data_file {
            let name = data.name.clone();
            let none = || "no name recorded: say --data-file".to_owned();
            facts.push(("data file", name.unwrap_or_else(none)));
            facts.push(("data file raw", data.raw.to_string()));
        }
        if let Some(encryption) = &self.encryption {
            let (name, suite) = (encryption.name(), encryption.suite());
            facts.push(("encryption", format!("{name}, {suite}")));
        }
        let cache = st.cache.fact(&self.tables, &self.geometry);
        facts.push(("metadata cache", cache));
        Description {
            backing: h.backing.clone(),
            backing_format: h.backing_format(),
            data_file,
            read_only_because: self.lacks.clone(),
            facts,
            ..Description::new("qcow2", h.size, h.cluster_size())
        }
    }

    fn size(&self) -> u64 {
        self.geometry.size
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        self.map_extent(at, len)
    }

    fn expect(&self, at: GuestOffset) {
        self.expect_at(at);
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        self.check_writable()?;
        if !self.bitmaps_ready()? {
            return Ok(Step::Need(Need::Commit));
        }
        let planned = self.plan_in_place(at, len).and_then(|found| match found {
            Some(plan) => Ok(Step::Done(plan)),
            None => {
                let mut st = self.lock();
                let plan = self.plan_allocating(&mut st, at, len);
                st.step(plan)
            }
        });
        let step = planned.inspect_err(|error| self.note_failure(error))?;
        match &step {
            Step::Done(Plan::InPlace { len, .. } | Plan::Drop { len }) => {
                self.note_change(at, *len);
            }
            Step::Done(Plan::Allocate(allocation)) => self.note_change(at, allocation.write_len),
            _ => {}
        }
        Ok(step)
    }

    fn joined(&self, at: GuestOffset, len: u64) {
        self.note_change(at, len);
    }

    fn foresee(&self) -> Option<Foreseen> {
        if !self.ahead.load(Ordering::Relaxed) {
            return None;
        }
        let mut st = self.lock();
        self.ahead.store(false, Ordering::Relaxed);
        if let Some(reserve) = self.reserve_ahead(&mut st) {
            self.ahead.store(st.ahead.wants_zeros(), Ordering::Relaxed);
            return Some(Foreseen::Reserve(reserve));
        }
        if st.flush_soon() || self.mark_soon(&st) {
            // What else there is, is asked for after it.
            self.ahead.store(st.ahead.wants_zeros(), Ordering::Relaxed);
            return Some(Foreseen::Commit);
        }
        self.next_prewrite(&mut st).map(Foreseen::Prewrite)
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
        if !self.bitmaps_ready()? {
            return Ok(Step::Need(Need::Commit));
        }
        let step = {
            let mut st = self.lock();
            let plan = self.plan_zeroes(&mut st, at, len, mode);
            let step = st
                .step(plan)
                .inspect_err(|error| self.note_failure(error))?;
            self.plan_encrypted_zeroes(step)
        };
        match &step {
            Step::Done(
                ZeroPlan::Done { len } | ZeroPlan::Skip { len } | ZeroPlan::Host { len, .. },
            ) => self.note_change(at, *len),
            // Its writes are planned one by one.
            Step::Done(ZeroPlan::Write { .. }) | Step::Need(_) | Step::Wait(_) => {}
        }
        Ok(step)
    }

    fn packer(&self) -> Result<Box<dyn Pack>> {
        self.new_packer()
    }

    fn plan_packed(&self, at: GuestOffset, len: u32) -> Result<Step<PackedPlace>> {
        self.check_writable()?;
        let bytes = (self.geometry.size.saturating_sub(at.0)).min(self.geometry.cluster());
        self.check_range(at, bytes)?;
        if !self.bitmaps_ready()? {
            return Ok(Step::Need(Need::Commit));
        }
        let step = {
            let mut st = self.lock();
            let plan = self.plan_compressed(&mut st, at, u64::from(len));
            st.step(plan)
                .inspect_err(|error| self.note_failure(error))?
        };
        if let Step::Done(_) = &step {
            self.note_change(at, bytes);
        }
        Ok(step)
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

    fn prewrite(&self, on: bool) {
        self.lock().ahead.prewrite(on);
    }

    fn prewritten(&self, prewrite: &Prewrite, ok: bool) {
        self.end_prewrite(&mut self.lock(), prewrite, ok);
    }

    fn decompress(&self, _: &Compressed, input: &[u8], output: &mut [u8]) -> Result<()> {
        compress::unpack(self.compression, input, output).map_err(|e| e.within(&self.name))
    }

    fn encryption(&self) -> Option<&Encryption> {
        self.encryption.as_ref()
    }

    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        self.begin_flush(&mut self.lock(), run)
    }

    fn flush_end(&self, run: &mut FlushRun, ok: bool) {
        self.finish_flush(&mut self.lock(), ok);
        run.clear();
    }

    fn is_dirty(&self) -> bool {
        self.has_dirty(&self.lock())
    }

    fn take_freed(&self, out: &mut Vec<Freed>) {
        self.fetch_freed(&mut self.lock(), out);
    }

    fn release(&self, freed: &Freed, zeroed: Zeroed) {
        self.end_freed(&mut self.lock(), freed, zeroed == Zeroed::Yes);
    }

    fn close(&self, files: &[&dyn Storage]) -> Result<()> {
        self.close_blocking(own_file(files, &self.name)?)
    }
}
