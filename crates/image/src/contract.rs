//! The contract between an image format and the disk layer.
//!
//! ```text
//!            map / plan_write / plan_zero
//!   disk  ───────────────────────────────────▶  format
//!         ◀── Done: an extent, a plan
//!         ◀── Need: load this block, reserve that space, commit first
//!         ◀── Wait: somebody else is at it; ask again when its key is woken
//! ```
//!
//! A format answers from memory and at once. What it lacks it names as a
//! [`Need`]; the disk layer does the I/O through its engine, tells the format
//! ([`Image::loaded`], [`Image::reserved`]) and asks again, like a page fault.
//!
//! **Each busy thing has a [`Key`].** The call that finds a block absent gets the
//! one `Need` for it and with it the duty to satisfy or fail it; every other call
//! gets `Wait(key)` until then. The disk layer registers as a waiter of the key and asks
//! once more before it parks (so no wake-up is lost), and wakes all waiters of a
//! key after the call that ended the busy state has returned: `loaded`, `load_failed`,
//! `reserved`, `reserve_failed`, `commit`, `abort`. Spurious wake-ups are harmless.
//!
//! **Threads.** All methods take `&self` and may be called from any thread at any
//! time. [`Image::map`] on a hit, and `plan_write` on a cluster that is already
//! allocated, take no lock. Everything else may take a short internal lock,
//! never across I/O, since there is none here.
//!
//! **Freed space.** A cluster that a commit or a discard dereferenced may still be read or
//! written by requests that mapped it before. It comes out of
//! [`Image::take_freed`] only after a flush has made the dereference durable, and the
//! disk layer hands it back ([`Image::release`]) only when all requests that were in flight
//! by then have ended and the hole is punched. Only then is it allocated again.

use crate::{Encryption, Pack};
use block::{Error, ErrorKind, GuestOffset, HostOffset, Result, Storage, Zeroed};
use std::fmt::Debug;

/// Which of an image's files: 0 is the image file itself, 1 an external data file; or those that a descriptor names, from
/// 1 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct FileId(pub u16);

impl FileId {
    /// The image file itself.
    pub const IMAGE: FileId = FileId(0);
    /// The external data file.
    pub const DATA: FileId = FileId(1);
}

/// Names something busy inside one image: a block being loaded, clusters being
/// allocated, space being reserved. Opaque to the disk layer; equal keys are the same thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(pub u64);

/// A format's answer to a question that memory may not be able to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<T> {
    /// The answer.
    Done(T),
    /// Do this, tell the format, ask again. Given to exactly one caller (but for [`Need::Commit`]).
    Need(Need),
    /// Someone else was given the need (or allocates the same cluster).
    Wait(Key),
}

/// What a format lacks to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// A metadata block must be read.
    Load(Load),
    /// Space at the end of the file must be reserved.
    Reserve(Reserve),
    /// Too much metadata waits to be written: run a flush (stages and all), then ask again.
    Commit,
}

/// What will be lacking soon ([`Image::foresee`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreseen {
    /// Space at the end of the file.
    Reserve(Reserve),
    /// Too much metadata waits to be written: run a flush.
    Commit,
    /// Written zeros; only after [`Image::prewrite`].
    Prewrite(Prewrite),
}

/// A metadata block to read and hand to [`Image::loaded`], or to give up with [`Image::load_failed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Woken when the load ended.
    pub key: Key,
    /// File to read.
    pub file: FileId,
    /// First byte; aligned to `len`'s lowest power-of-two factor that is at most 4096.
    pub offset: HostOffset,
    /// Bytes to read; a part behind the end of the file reads as zeros.
    pub len: u32,
}

/// Space to allocate (see [`Storage::allocate`]) and report through [`Image::reserved`] or
/// [`Image::reserve_failed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserve {
    /// Woken when the reservation ended.
    pub key: Key,
    /// File to grow.
    pub file: FileId,
    /// First byte.
    pub offset: HostOffset,
    /// Bytes.
    pub len: u64,
}

/// Free space that reads as zeros, and to which zeros are to be written so that the file system has nothing to note any more when data
/// are. Reported through [`Image::prewritten`]; until then nobody is given a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prewrite {
    /// File to write.
    pub file: FileId,
    /// First byte; aligned as clusters are.
    pub offset: HostOffset,
    /// Bytes, a multiple of the cluster size.
    pub len: u64,
}

/// What a guest range is made of: one run, `len` bytes from where was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes of the run, at least 1, at most what was asked.
    pub len: u64,
    /// Where they are.
    pub kind: ExtentKind,
}

/// Where the bytes of an [`Extent`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// As they are at `offset` of `file`; the run is contiguous there.
    Data {
        /// Which file.
        file: FileId,
        /// Where the run's first byte is.
        offset: HostOffset,
    },
    /// All zeros.
    Zero {
        /// Where host space is allocated under them (shown by `map`); the run is contiguous there.
        host: Option<(FileId, HostOffset)>,
    },
    /// Inside one compressed cluster.
    Compressed(Compressed),
    /// Not in this image: the backing image has them, or they are zeros where there is none.
    Unallocated,
    /// Nothing: a read leaves its memory as it is. Only of `null:SIZE?read-zeroes=off`.
    Untouched,
}

/// A compressed cluster, and where in it a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Which file.
    pub file: FileId,
    /// First byte of the compressed data, any alignment.
    pub offset: HostOffset,
    /// Bytes to read: at least the compressed data. Less may be there at the end of the file.
    pub len: u32,
    /// Bytes that [`Image::decompress`] gives: the cluster size.
    pub unpacked_len: u32,
    /// Where the extent's first byte lies in the unpacked cluster.
    pub skip: u32,
    /// How it is packed, in formats that have several ways: the format's own note.
    pub packing: u32,
    /// What lies there never changes while the image is open: what was unpacked once may be kept.
    pub lasting: bool,
}

impl Compressed {
    /// Whether the two are parts of the same cluster.
    pub fn is_of(&self, other: &Self) -> bool {
        Self { skip: 0, ..*self } == Self { skip: 0, ..*other }
    }
}

/// Names an [`Allocation`] until it is committed or aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// How a write to a part of the disk is carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Write `len` bytes at `offset`; nothing to commit.
    InPlace {
        /// Which file.
        file: FileId,
        /// Where.
        offset: HostOffset,
        /// Bytes, from where was asked; at least 1.
        len: u64,
    },
    /// Write into clusters that become the guest's when the allocation is committed.
    Allocate(Allocation),
    /// The image forgets what is written (`null`).
    Drop {
        /// Bytes.
        len: u64,
    },
}

/// Clusters reserved for a write. Whoever got it calls [`Image::commit`] when all its
/// bytes (data and fill) are written, or [`Image::abort`] when that failed.
///
/// ```text
///   start            at                at+write_len     start+len
///     │◀── head ──────▶│◀── guest's data ──▶│◀── tail ──────▶│
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Names it towards the format.
    pub ticket: Ticket,
    /// Woken after commit or abort.
    pub key: Key,
    /// Which file.
    pub file: FileId,
    /// Where guest byte `start` will be; all `len` bytes are contiguous there.
    pub host: HostOffset,
    /// First guest byte that the allocation covers.
    pub start: GuestOffset,
    /// Guest bytes that the allocation covers.
    pub len: u64,
    /// How many of the caller's bytes (from where it asked) it covers; at least 1.
    pub write_len: u64,
    /// Whether the host range reads as zeros now, so that zeros need not be written.
    pub zeroed: bool,
    /// What belongs into head and tail.
    pub fill: Fill,
}

/// A place for the packed bytes of one cluster, which is the guest's when the allocation is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedPlace {
    /// Names it towards the format.
    pub ticket: Ticket,
    /// Woken after commit or abort.
    pub key: Key,
    /// Which file.
    pub file: FileId,
    /// Where, at any alignment: other clusters' bytes may be in the same sector.
    pub offset: HostOffset,
}

/// What the parts of an allocation that the guest did not write must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// What the guest reads there now, through the whole chain (copy-on-write).
    /// Bytes behind the end of the virtual disk: zeros.
    Existing,
    /// Zeros.
    Zero,
    /// They hold the right bytes already.
    Nothing,
}

/// What [`Image::plan_zero`] is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Free the space; may do nothing. Must never make a backing file's bytes visible again.
    Discard,
    /// Must read as zeros.
    Zero {
        /// Give the space back.
        unmap: bool,
    },
}

/// How a discard or write-zeroes of a part of the disk is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPlan {
    /// Metadata in memory now says so; a flush makes it durable.
    Done {
        /// Bytes, from where was asked.
        len: u64,
    },
    /// Have the engine discard or zero this range of the file.
    Host {
        /// Which file.
        file: FileId,
        /// Where.
        offset: HostOffset,
        /// Bytes.
        len: u64,
    },
    /// Write zeros as data, through [`Image::plan_write`].
    Write {
        /// Bytes.
        len: u64,
    },
    /// Nothing to do for so many bytes (already zero, or a discard of less than a cluster).
    Skip {
        /// Bytes.
        len: u64,
    },
}

/// One write of metadata in a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaWrite {
    /// Which file.
    pub file: FileId,
    /// Where; a multiple of 512.
    pub offset: HostOffset,
    /// Where its bytes begin in [`FlushRun::bytes`].
    pub start: usize,
    /// Bytes; a multiple of 512.
    pub len: usize,
}

/// Writes that may go in any order, then a barrier (`fdatasync` of every file written since the last).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stage {
    /// Its writes: `FlushRun::writes[first..end]`. None: the barrier alone.
    pub first: usize,
    /// End of its writes.
    pub end: usize,
}

/// A flush under way: metadata as it was when [`Image::flush_begin`] filled this, in stages.
/// Its buffers are kept for the next run, so that a steady state allocates nothing.
#[derive(Debug, Default)]
pub struct FlushRun {
    /// Carried out in order, a barrier after each. Never empty after `flush_begin`:
    /// the first stage's barrier covers the guest's data.
    pub stages: Vec<Stage>,
    /// The writes of all stages.
    pub writes: Vec<MetaWrite>,
    /// Their bytes. The disk layer may read it only.
    pub bytes: Vec<u8>,
    /// The format's own note of what this run covers.
    pub cookie: u64,
}

impl FlushRun {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.stages.clear();
        self.writes.clear();
        self.bytes.clear();
        self.cookie = 0;
    }

    /// Appends a write of `bytes` to the stage being built; `seal` ends that.
    pub fn push(&mut self, file: FileId, offset: HostOffset, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.writes.push(MetaWrite {
            file,
            offset,
            start,
            len: bytes.len(),
        });
    }

    /// Ends the only stage. `ordered`: a barrier comes before it, for what must be durable first; else it may be empty, and
    /// is the barrier alone.
    pub(crate) fn seal_ordered(&mut self, ordered: bool) {
        if ordered {
            self.stages.push(Stage { first: 0, end: 0 });
        }
        if !ordered || !self.writes.is_empty() {
            self.seal();
        }
    }

    /// All that a format has to write is the guest's data: a barrier behind them.
    pub(crate) fn barrier_only(&mut self) {
        self.clear();
        self.stages.push(Stage { first: 0, end: 0 });
    }

    /// Ends a stage: everything pushed since the last call, then a barrier.
    pub fn seal(&mut self) {
        let first = self.stages.last().map_or(0, |s| s.end);
        self.stages.push(Stage {
            first,
            end: self.writes.len(),
        });
    }
}

/// Space that nothing refers to any more, durably. See [`Image::take_freed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// Which file.
    pub file: FileId,
    /// Where.
    pub offset: HostOffset,
    /// Bytes.
    pub len: u64,
}

/// The external data file of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name as the image stores it; `None` when it stores none and the user must say it.
    pub name: Option<String>,
    /// The file is the disk's raw image too, after each flush.
    pub raw: bool,
}

/// What an image knows of its backing file besides a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its names, the best first.
    pub names: Vec<String>,
    /// Its [`Image::unique_id`] must be one of these, where there are any.
    pub unique_ids: Vec<[u8; 16]>,
    /// When it was changed last, seconds since 1970, in formats that note it.
    pub changed: Option<u64>,
}

/// What an image is, for `info` and for the exports' limits.
#[derive(Clone, Debug)]
pub struct Description {
    /// The format's name, as after `-f`.
    pub format: &'static str,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Allocation unit in bytes; 1 when there is none (raw).
    pub cluster_size: u64,
    /// The backing file's name as the image stores it.
    pub backing: Option<String>,
    /// The backing file's format as the image stores it.
    pub backing_format: Option<String>,
    /// The external data file that has the guest's bytes ([`FileId::DATA`]), when there is one.
    pub data_file: Option<DataFile>,
    /// Why the image may not be written, when it may not: the feature's name.
    pub read_only_because: Option<String>,
    /// Further facts, in the order in which `info` shows them.
    pub facts: Vec<(&'static str, String)>,
}

impl Description {
    /// A disk of `size` bytes in clusters of `cluster_size`, with nothing to say besides.
    pub fn new(format: &'static str, size: u64, cluster_size: u64) -> Self {
        Self {
            format,
            size,
            cluster_size,
            backing: None,
            backing_format: None,
            data_file: None,
            read_only_because: None,
            facts: Vec::new(),
        }
    }
}

/// The image file among those of a clean close ([`Image::close`]).
pub(crate) fn own_file<'a>(files: &[&'a dyn Storage], name: &str) -> Result<&'a dyn Storage> {
    let file = files.first().copied();
    file.ok_or_else(|| Error::invalid(format!("{name}: closed without its file")))
}

/// Why images of `format` are not written: diskplane has no writer for it.
pub(crate) fn why_reading_only(format: &str) -> String {
    format!("{format} images are for reading only: convert it into another format")
}

/// What writing to such an image fails with.
pub(crate) fn reading_only(name: &str, format: &str) -> Error {
    let text = format!("{name}: {}", why_reading_only(format));
    Error::new(ErrorKind::ReadOnly, text)
}

/// An open image of some format. See the module's documentation for the rules.
///
/// Guest ranges handed in lie within the virtual disk and are not empty: the
/// disk layer has checked that once, at its edge.
///
/// What a method does that a format leaves out is right for one without metadata that change: allocations, loads and
/// reservations end only in formats that ask for them, a flush is one barrier behind the guest's data, nothing is
/// ever freed, and a closed image is what a crash leaves.
pub trait Image: Send + Sync + Debug {
    /// What it is.
    fn describe(&self) -> Description;

    /// Bytes of the virtual disk.
    fn size(&self) -> u64;

    /// What names the image to those above it, in formats that have it.
    fn unique_id(&self) -> Option<[u8; 16]> {
        None
    }

    /// Its backing file, in formats that know more of it than [`Description`] says.
    fn parent(&self) -> Option<Parent> {
        None
    }

    /// What the guest range is made of, from `at` on. Lock-free on a hit.
    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>>;

    /// Where [`map`](Self::map) fails at `at`: how many bytes from there on it fails for, at least 1, for a reason that only
    /// another file would change. `None` where that is not known.
    fn unreadable(&self, _at: GuestOffset) -> Option<u64> {
        None
    }

    /// A request at `at` will come in a moment, or not: a hint to have the processor fetch what [`map`](Self::map) will
    /// look at. Takes no lock and must cost next to nothing.
    fn expect(&self, at: GuestOffset) {
        let _ = at;
    }

    /// How to write `len` bytes at `at`: an answer for the first part of them.
    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>>;

    /// What packs clusters for [`Image::plan_packed`]; any number of them may share the work.
    ///
    /// # Errors
    ///
    /// `Unsupported` for an image that takes no compressed clusters; where there is no memory for it.
    fn packer(&self) -> Result<Box<dyn Pack>> {
        Err(Error::unsupported(format!(
            "{} images take no compressed clusters when they are there already",
            self.describe().format
        )))
    }

    /// Where the `len` bytes belong that a packer made of the cluster that begins at `at`, with zeros behind the disk's end.
    /// What the cluster was before does not matter. The caller writes them there one after the other, since they share
    /// sectors, and calls [`Image::commit`] or [`Image::abort`].
    ///
    /// # Errors
    ///
    /// As [`Image::packer`] and [`Image::plan_write`]; `Invalid` for what is not less than a whole cluster.
    fn plan_packed(&self, at: GuestOffset, len: u32) -> Result<Step<PackedPlace>> {
        let _ = (at, len);
        self.packer()
            .and(Err(Error::unsupported("compressed clusters")))
    }

    /// What will be lacking soon; space and zeros are given to one caller, as by `plan_write`. The disk layer asks once a turn and
    /// has it done while requests go on, so that none comes to wait for it. No lock while there is nothing.
    fn foresee(&self) -> Option<Foreseen> {
        None
    }

    /// Another write, of `len` bytes at `at`, joins an allocation that is under way, without asking
    /// [`Image::plan_write`].
    fn joined(&self, at: GuestOffset, len: u64) {
        let _ = (at, len);
    }

    /// Makes the clusters of an allocation the guest's, in memory.
    fn commit(&self, ticket: Ticket) {
        let _ = ticket;
    }

    /// Gives the clusters of an allocation back.
    fn abort(&self, ticket: Ticket) {
        let _ = ticket;
    }

    /// How to discard or zero `len` bytes at `at`: an answer for the first part of them.
    fn plan_zero(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<Step<ZeroPlan>>;

    /// The bytes of a block that was needed. An error says that they contradict the
    /// format; the load counts as failed then.
    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        let _ = (load, bytes);
        Ok(())
    }

    /// The block could not be read.
    fn load_failed(&self, load: &Load) {
        let _ = load;
    }

    /// The space is there; `zeroed` says whether it reads as zeros.
    fn reserved(&self, reserve: &Reserve, zeroed: Zeroed) {
        let _ = (reserve, zeroed);
    }

    /// The space could not be had.
    fn reserve_failed(&self, reserve: &Reserve) {
        let _ = reserve;
    }

    /// Whether [`Foreseen::Prewrite`] may be asked for: the file's space is reserved without being written, and whoever is first to
    /// write there costs the next flush a journal's commit.
    fn prewrite(&self, on: bool) {
        let _ = on;
    }

    /// The zeros are written (`ok`), or could not be.
    fn prewritten(&self, prewrite: &Prewrite, ok: bool) {
        let _ = (prewrite, ok);
    }

    /// Unpacks `cluster`, which came out of [`Image::map`]: `input` are its [`Compressed::len`] bytes (fewer at the end of
    /// the file), `output` [`Compressed::unpacked_len`].
    fn decompress(&self, cluster: &Compressed, input: &[u8], output: &mut [u8]) -> Result<()> {
        let _ = (cluster, input, output);
        Err(Error::corrupt(format!(
            "{} images have no compressed clusters",
            self.describe().format
        )))
    }

    /// How its data are encrypted, where they are. Of what lies at an [`ExtentKind::Data`] or is written
    /// by a [`Plan`], whole sectors are encrypted; nothing else is. No [`Allocation`] is zeroed then.
    fn encryption(&self) -> Option<&Encryption> {
        None
    }

    /// Fills `run` with everything that was committed so far and is not durable yet, as
    /// stages. One run at a time: the disk layer calls `flush_end` before the next begin.
    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        run.barrier_only();
        Ok(())
    }

    /// The run was carried out (`ok`), or stopped at a failure: what it covered is dirty again.
    fn flush_end(&self, run: &mut FlushRun, ok: bool) {
        let _ = (run, ok);
    }

    /// Whether there is metadata that a flush would write.
    fn is_dirty(&self) -> bool {
        false
    }

    /// Appends space that became free durably since the last call. See the module's documentation.
    fn take_freed(&self, out: &mut Vec<Freed>) {
        let _ = out;
    }

    /// Space from `take_freed` that no request uses any more may be allocated again.
    fn release(&self, freed: &Freed, zeroed: Zeroed) {
        let _ = (freed, zeroed);
    }

    /// Clean close, with blocking I/O: nothing is in flight, the last flush has ended and all
    /// freed space was released. Writes what must differ between a closed image and a
    /// crashed one (flags, refcounts of freed space, the file's length). `files` by [`FileId`].
    fn close(&self, files: &[&dyn Storage]) -> Result<()> {
        let _ = files;
        Ok(())
    }
}
