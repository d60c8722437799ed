//! Clusters found through two levels of tables, of which new ones come from the end of the file: what QED images and
//! the sparse extents of VMDK images and qcow images of version 1 share.
//!
//! ```text
//!   header │ tables … │ clusters, in the order in which they were needed …
//!
//!   guest cluster ─▶ L1 table ─▶ L2 table ─▶ host cluster
//!                    in memory   slices in frames (see `crate::metadata`)
//! ```
//!
//! There are no refcounts: a cluster is what one entry refers to. So nothing is ever freed; a discard punches its hole
//! in place, and the bytes of a compressed cluster that is written to (qcow) stay where they are. In memory an entry is the
//! offset of its cluster in bytes, or 1 for zeros, whatever it is in the file ([`Form`]); that of a compressed cluster is as
//! qcow has it.
//!
//! **Entries behind the end of the file.** The file grows over them, and what a guest then writes belongs to two of its
//! clusters, or is a table. So an L2 slice is judged when it is first read from the file: an entry behind the end at open
//! is none of ours then, reads as an error, and ends all changes, wherever the file has grown to meanwhile and whoever
//! was given that place. What remains: the end at open is only known while the image is open. A slice that nobody reads is
//! not judged, and the file stays grown over its bad entry (as it does, judged or not, where the image is given up without a
//! close). To the next one who opens the image that entry is like any other: a check finds it where the cluster is in use
//! twice, and nothing finds it where the cluster leaked. A check beforehand finds all of them.
//!
//! * `form`: entries in the file. `map`, `write`, `zero`: the questions. `space`: free clusters. `state`: what the lock
//!   guards. `flush`: the order on disk. `close`. `over`: an image whose format has no more than this and a header.

mod close;
mod flush;
mod form;
mod map;
mod over;
mod space;
mod state;
mod write;
mod zero;

pub(crate) use form::{Form, words_of};
pub(crate) use over::{Head, Over};
pub(crate) use state::Places;

use crate::metadata::cache::Cache;
use crate::metadata::tables::{FRAMES_MAX, Tables};
use crate::metadata::{
    CACHE_BYTES_DEFAULT, CACHE_BYTES_MAX, FRESH, FRESH_ZEROED, Layout, Sectors, Tickets, Walk,
};
use crate::{FileId, Foreseen, Load, Plan, Reserve, Step, Ticket, ZeroMode, ZeroPlan};
use block::{Error, ErrorKind, GuestOffset, Result, Zeroed};
use map::L1_UNSOUND;
use space::Space;
use state::{Covered, State};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Frames that a cache has at least. Half of them may be pinned by allocations in flight. A slice has 4 KiB as a rule, 4 MiB
/// at most: of QED disks near 2^63 bytes.
const FRAMES_MIN: u64 = 16;

/// Tables and clusters of an open file.
#[derive(Debug)]
pub(crate) struct Appended {
    name: String,
    file: FileId,
    form: Form,
    layout: Layout,
    tables: Tables,
    /// Where the L1 table is.
    l1_offset: u64,
    /// What else is in its first and last sector.
    l1_around: Around,
    /// Its entries in the file.
    l1_entries: usize,
    /// Offsets of the tables' copies that are kept in step, one for each L1 entry; empty where there are none.
    copies: Box<[u64]>,
    /// Clusters of an L2 table that is added.
    table_clusters: u64,
    /// No cluster begins before.
    head_end: u64,
    /// No table begins before.
    tables_from: u64,
    /// What offsets of clusters are multiples of.
    align: u64,
    /// Most bytes of the file.
    file_bytes_max: u64,
    has_backing: bool,
    /// `Some` when it must not be written: by wish (empty) or for a reason.
    read_only: Option<String>,
    /// Where the file ends, in bytes: whole clusters. What refers to a place behind it is not sound.
    end: AtomicU64,
    /// Where it ended when the image was opened: what refers behind it is this process's, or not sound.
    end_at_open: u64,
    /// The file ends within a cluster, and is only read: of that one the sectors that are there are mapped.
    cut_off: bool,
    state: Mutex<State>,
    /// There may be something to foresee.
    ahead: AtomicBool,
    /// An entry was found that refers behind the end that the file had at open: it comes to refer to whatever the file
    /// gets there, so the image is not changed any more. Set with the lock held.
    damaged: AtomicBool,
}

/// The bytes that share the first and the last sector of an L1 table with it: whole entries.
#[derive(Debug, Default)]
pub(crate) struct Around {
    /// Before it.
    pub(crate) before: Vec<u8>,
    /// Behind it.
    pub(crate) behind: Vec<u8>,
}

/// What [`Appended::new`] is told.
#[derive(Debug)]
pub(crate) struct Setup {
    /// The file's name in errors.
    pub(crate) name: String,
    /// Which of the image's files it is.
    pub(crate) file: FileId,
    /// Entries in the file.
    pub(crate) form: Form,
    /// Clusters and tables; its size is that of what the tables map.
    pub(crate) layout: Layout,
    /// The L1 table's entries as [`Form::l1`] has them, as many as the disk needs.
    pub(crate) l1: Vec<u64>,
    /// Where the L1 table is in the file: a multiple of 8.
    pub(crate) l1_offset: u64,
    /// What else is in its first and last sector, where it is to be written.
    pub(crate) l1_around: Around,
    /// See [`Appended::copies`].
    pub(crate) copies: Vec<u64>,
    /// Clusters of an L2 table.
    pub(crate) table_clusters: u64,
    /// Which clusters behind `head_end` hold tables; need not be known for reading only.
    pub(crate) places: Places,
    /// No cluster begins before.
    pub(crate) head_end: u64,
    /// No table begins before.
    pub(crate) tables_from: u64,
    /// Up to where clusters are sound.
    pub(crate) end: u64,
    /// See [`Appended::cut_off`]: then sectors are, up to `end`.
    pub(crate) cut_off: bool,
    /// The first cluster that the file has nothing of.
    pub(crate) free_from: u64,
    /// Most bytes of the file.
    pub(crate) file_bytes_max: u64,
    /// There is an image below.
    pub(crate) has_backing: bool,
    /// See [`Appended::read_only`].
    pub(crate) read_only: Option<String>,
    /// Bytes of the metadata cache; 64 MiB when not given.
    pub(crate) cache_bytes: Option<u64>,
    /// Allocations that may be in flight.
    pub(crate) tickets: usize,
}

impl Appended {
    /// The tables of a file, of which nothing but the L1 table was read yet.
    pub(crate) fn new(setup: Setup) -> Self {
        let layout = setup.layout;
        let budget = setup.cache_bytes.unwrap_or(CACHE_BYTES_DEFAULT);
        let slices = layout.l2_slices();
        let frames = slices.min(budget.min(CACHE_BYTES_MAX) >> layout.slice_bits);
        let frames = frames.clamp(FRAMES_MIN, FRAMES_MAX) as usize;
        let mut l1 = setup.l1;
        let l1_entries = l1.len();
        l1.resize(l1.len().next_multiple_of(64), 0);
        let sectors = (setup.l1_around.before.len() / 8 + l1_entries).div_ceil(64);
        // Bits 0 and 1 are our marks: an entry that has them in the file is made unsound by bit 2 too.
        let marks = FRESH | FRESH_ZEROED;
        let l1 = l1
            .into_iter()
            .map(|raw| {
                if raw & marks != 0 {
                    raw | L1_UNSOUND
                } else {
                    raw
                }
            })
            .map(AtomicU64::new)
            .collect();
        let judged = match setup.read_only {
            // At most 2 MiB.
            None => vec![0; slices.div_ceil(64) as usize],
            Some(_) => Vec::new(),
        };
        Self {
            name: setup.name,
            file: setup.file,
            form: setup.form,
            tables: Tables::new(&layout, l1, frames),
            l1_offset: setup.l1_offset,
            l1_around: setup.l1_around,
            l1_entries,
            copies: setup.copies.into(),
            table_clusters: setup.table_clusters,
            head_end: setup.head_end,
            tables_from: setup.tables_from,
            align: setup.form.align(layout.cluster()),
            file_bytes_max: setup.file_bytes_max,
            has_backing: setup.has_backing,
            read_only: setup.read_only,
            end: AtomicU64::new(setup.end),
            end_at_open: setup.end,
            cut_off: setup.cut_off,
            state: Mutex::new(State {
                cache: Cache::new(frames, &layout),
                space: Space::new(setup.free_from, layout.size),
                tickets: Tickets::with_room(setup.tickets),
                places: setup.places,
                l1_changed: Sectors::new(sectors),
                fresh_tables: Vec::new(),
                ordered: false,
                covered: Covered::default(),
                scratch: Vec::with_capacity(frames),
                words: Vec::with_capacity(layout.slice_words()),
                covers: frames as u64 >= slices,
                judged,
            }),
            ahead: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            layout,
        }
    }

    /// Clusters and tables.
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How large the cache may get, and what it covers.
    pub(crate) fn cache_fact(&self) -> String {
        self.lock().cache.fact(&self.tables, &self.layout)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics with the state half changed; and refusing all
        // further requests would help nobody.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
            "{}: has entries that refer to no cluster of the file, and is not written to any more: {}",
            self.name,
            self.form.advice()
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

    /// See [`crate::Image::plan_write`].
    pub(crate) fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        self.check_writable()?;
        self.check_range(at, len)?;
        if let Some(plan) = self.plan_in_place(at, len) {
            return Ok(Step::Done(plan));
        }
        let mut st = self.lock();
        let plan = self.plan_allocating(&mut st, at, len);
        st.step(plan)
    }

    /// See [`crate::Image::foresee`].
    pub(crate) fn foresee(&self) -> Option<Foreseen> {
        if !self.ahead.load(Ordering::Relaxed) {
            return None;
        }
        let mut st = self.lock();
        self.ahead.store(false, Ordering::Relaxed);
        if let Some(reserve) = self.reserve_ahead(&mut st) {
            return Some(Foreseen::Reserve(reserve));
        }
        st.flush_soon().then_some(Foreseen::Commit)
    }

    /// See [`crate::Image::commit`], and with `false` [`crate::Image::abort`].
    pub(crate) fn end_allocation(&self, ticket: Ticket, commit: bool) {
        self.end_ticket(&mut self.lock(), ticket, commit);
    }

    /// See [`crate::Image::plan_zero`].
    pub(crate) fn plan_zero(
        &self,
        at: GuestOffset,
        len: u64,
        mode: ZeroMode,
    ) -> Result<Step<ZeroPlan>> {
        self.check_writable()?;
        self.check_range(at, len)?;
        let mut st = self.lock();
        let plan = self.plan_zeroes(&mut st, at, len, mode);
        st.step(plan)
    }

    /// See [`crate::Image::loaded`].
    pub(crate) fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        self.end_loading(&mut self.lock(), load, bytes)
    }

    /// See [`crate::Image::load_failed`].
    pub(crate) fn load_failed(&self, load: &Load) {
        self.drop_load(&mut self.lock(), load);
    }

    /// A reservation ended; `None`: it failed.
    pub(crate) fn reserved(&self, reserve: &Reserve, zeroed: Option<Zeroed>) {
        let zeroed = zeroed.map(|zeroed| zeroed == Zeroed::Yes);
        self.end_reserve(&mut self.lock(), reserve, zeroed);
    }

    /// See [`crate::Image::is_dirty`].
    pub(crate) fn is_dirty(&self) -> bool {
        self.lock().is_dirty()
    }

    /// Takes away what is free at the end of the file: where it is to be cut off, in bytes, if anywhere. Nothing is in
    /// flight, and nothing is dirty.
    pub(crate) fn cut_tail(&self) -> Option<u64> {
        if self.read_only.is_some() {
            return None;
        }
        let mut st = self.lock();
        let before = st.space.end;
        let end = st.space.cut_tail();
        if end == before {
            return None;
        }
        let end = end << self.layout.cluster_bits;
        self.end.store(end, Ordering::Release);
        Some(end)
    }
}
