//! VMDK, as VMware's programs, VirtualBox and QEMU make it.
//!
//! Sources: VMware's "Virtual Disk Format" 1.1 and 5.0, called *specification* here; what it leaves open, QEMU decides.
//!
//! ```text
//!   descriptor (text) ─┬─ extent: FLAT       its part of the disk as it is
//!                      ├─ extent: SPARSE     header │ tables │ grains
//!                      └─ …                             └─▶ see `crate::appended`
//!
//!   monolithicSparse   header │ descriptor │ redundant directory, tables │ directory, tables │ grains …
//!   streamOptimized    the same with compressed grains, or:
//!                      header │ descriptor │ grain, grain … table │ … │ directory │ footer │ end
//! ```
//!
//! * `descriptor`, `header`: the format. `open`, `create`, `link`, `stream` (compressed images, written in order).
//!
//! **The CID** names a disk's contents towards the images above it, which have it as their parentCID. It changes with the
//! first change of an open image: that waits for a flush that writes the new one, so that no change is ever durable
//! without. Only its digits are replaced, by as many.
//!
//! **Order on disk** is that of `crate::appended`: grains, then entries of grain tables and of the redundant ones. The file
//! gets no new tables: an image that lacks some is read only, as are compressed ones, ESX's, and those of version 3.

mod create;
mod descriptor;
mod header;
mod link;
mod open;
mod stream;

pub use create::{AdapterType, CreateOptions, NewFile, Subformat};
pub use descriptor::{
    Access, DESCRIPTOR_BYTES_MAX, Descriptor, EXTENTS_MAX, ExtentLine, ExtentType, NO_PARENT,
};
pub use header::{COWD_MAGIC, GD_AT_END, Header, MAGIC};
pub use link::{empty, set_parent};
pub use open::{OpenOptions, Parts, Tables};
pub use stream::{Compressor, StreamWriter};

use crate::appended::Appended;
use crate::contract::{
    Compressed, Description, Extent as Run, ExtentKind, FileId, FlushRun, Foreseen, Image, Key,
    Load, MetaWrite, Need, Parent, Plan, Reserve, Step, Ticket, ZeroMode, ZeroPlan,
};
use crate::metadata::{Walk, carry_out, read_short};
use block::{Error, ErrorKind, GuestOffset, HostOffset, Result, Storage, Zeroed, align_up, size};
use header::SECTOR;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

/// Keys and tickets have the number of their extent from this bit on.
const TAG_SHIFT: u32 = 48;
/// The bits of an extent's number.
const TAG_MASK: u64 = 0x3ff << TAG_SHIFT;
/// Flushes that a close may need: one is enough.
const FLUSHES_MAX: u32 = 4;

/// A part of the disk.
#[derive(Debug)]
struct Extent {
    /// Where it begins, in bytes.
    start: u64,
    bytes: u64,
    file: FileId,
    line: ExtentLine,
    kind: Kind,
}

/// Where an extent has its bytes.
#[derive(Debug)]
enum Kind {
    /// From this byte of its file on.
    Flat(u64),
    /// Nowhere.
    Zero,
    /// In grains.
    Sparse(Box<Appended>),
    /// In compressed grains, for reading.
    Compressed(Box<Appended>),
}

/// The change of the CID in the descriptor.
#[derive(Debug)]
struct Cid {
    state: AtomicU8,
    /// Where its sectors are in the image's first file, and what they will be.
    at: u64,
    sectors: Vec<u8>,
}

/// Nobody has changed the disk yet; somebody wants to; it is on disk.
const CID_KEPT: u8 = 0;
const CID_WANTED: u8 = 1;
const CID_CHANGED: u8 = 2;

impl Cid {
    /// Does not change.
    fn kept() -> Self {
        Self {
            state: AtomicU8::new(CID_CHANGED),
            at: 0,
            sectors: Vec::new(),
        }
    }

    /// Chooses another one, of as many digits.
    fn new(parts: &Parts, files: &[&dyn Storage]) -> Result<Self> {
        let file = files.first();
        let file = file.ok_or_else(|| Error::invalid("an image without a file"))?;
        let digits = &parts.descriptor.cid_at;
        let place = parts.text.start + digits.start as u64..parts.text.start + digits.end as u64;
        let at = place.start / SECTOR * SECTOR;
        // Two sectors at most.
        let len = align_up(place.end, SECTOR) - at;
        let mut sectors = read_short(*file, at, len as usize)?;
        // A file of text goes on with blank lines to the end of its sector.
        let there = file.len()?.saturating_sub(at).min(len) as usize;
        sectors.iter_mut().skip(there).for_each(|b| *b = b'\n');
        let width = digits.len();
        let most = u64::MAX >> (64 - 4 * width.clamp(1, 8));
        let new = loop {
            let mut random = [0; 4];
            crypto::random(&mut random)?;
            // ffffffff says that there is no parent; fffffffe is what new images of VMware have.
            let new = u32::from_le_bytes(random) & most as u32;
            if new != parts.descriptor.cid && new < NO_PARENT - 1 {
                break new;
            }
        };
        let text = format!("{new:0width$x}");
        let into = sectors.iter_mut().skip((place.start - at) as usize);
        into.zip(text.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self {
            state: AtomicU8::new(CID_KEPT),
            at,
            sectors,
        })
    }
}

/// An open VMDK image.
#[derive(Debug)]
pub struct Vmdk {
    name: String,
    descriptor: Descriptor,
    create_type: String,
    size: u64,
    /// In the order of the disk, without gaps; at least one.
    extents: Vec<Extent>,
    /// Compressed grains have markers.
    markers: bool,
    read_only: bool,
    /// Why it must not be written, when it must not.
    lacks: Option<String>,
    /// `None` when it is not written.
    cid: Option<Cid>,
    /// The extent that was last given a grain: the one to foresee for.
    recent: AtomicUsize,
}

/// Gives a key of extent `nth` its number.
fn tag(key: Key, nth: usize) -> Key {
    Key(key.0 | (nth as u64) << TAG_SHIFT)
}

/// Gives the keys in an answer of extent `nth` its number.
fn tagged<T>(step: Step<T>, nth: usize) -> Step<T> {
    let tag = |key| tag(key, nth);
    match step {
        Step::Done(done) => Step::Done(done),
        Step::Wait(key) => Step::Wait(tag(key)),
        Step::Need(need) => Step::Need(match need {
            Need::Load(load) => Need::Load(Load {
                key: tag(load.key),
                ..load
            }),
            Need::Reserve(reserve) => Need::Reserve(Reserve {
                key: tag(reserve.key),
                ..reserve
            }),
            Need::Commit => Need::Commit,
        }),
    }
}

/// The number of the extent that a key or ticket is of, and what it calls it.
fn untag(raw: u64) -> (usize, u64) {
    // At most 1023.
    (((raw & TAG_MASK) >> TAG_SHIFT) as usize, raw & !TAG_MASK)
}

impl Vmdk {
    /// The descriptor as it was when the image was opened.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The extent that has the guest's byte `at`, and its number.
    #[inline]
    fn extent(&self, at: u64) -> Option<(usize, &Extent)> {
        let nth = self.extents.partition_point(|e| e.start <= at);
        let nth = nth.checked_sub(1)?;
        let extent = self.extents.get(nth)?;
        (at - extent.start < extent.bytes).then_some((nth, extent))
    }

    /// As [`extent`](Self::extent), with the place in the extent, and how many of `len` bytes are in it.
    #[inline]
    fn within(&self, at: GuestOffset, len: u64) -> Result<(usize, &Extent, GuestOffset, u64)> {
        let found = self.extent(at.0).filter(|_| len > 0);
        let (nth, extent) = found.ok_or_else(|| {
            Error::invalid(format!(
                "{}: {len} bytes at {at} are not within the disk",
                self.name
            ))
        })?;
        let within = at.0 - extent.start;
        Ok((
            nth,
            extent,
            GuestOffset(within),
            len.min(extent.bytes - within),
        ))
    }

    fn core(&self, nth: usize) -> Option<&Appended> {
        match &self.extents.get(nth)?.kind {
            Kind::Sparse(core) | Kind::Compressed(core) => Some(core),
            Kind::Flat(_) | Kind::Zero => None,
        }
    }

    fn cores(&self) -> impl Iterator<Item = &Appended> + '_ {
        (0..self.extents.len()).filter_map(|nth| self.core(nth))
    }

    /// Whether the disk may be changed now; what must be done first.
    #[inline]
    fn may_change(&self) -> Result<Option<Need>> {
        match &self.cid {
            Some(cid) if cid.state.load(Ordering::Acquire) == CID_CHANGED => Ok(None),
            Some(cid) => {
                let wanted = (Ordering::AcqRel, Ordering::Acquire);
                let _ = cid
                    .state
                    .compare_exchange(CID_KEPT, CID_WANTED, wanted.0, wanted.1);
                Ok(Some(Need::Commit))
            }
            None => Err(self.why_read_only()),
        }
    }

    #[cold]
    fn why_read_only(&self) -> Error {
        let name = &self.name;
        let text = match &self.lacks {
            None => format!("{name}: is open for reading only"),
            Some(why) => format!("{name}: is open for reading only: {why}"),
        };
        Error::new(ErrorKind::ReadOnly, text)
    }

    /// The compressed grain that has byte `at` of an extent, where there is one.
    fn map_compressed(&self, core: &Appended, at: GuestOffset, len: u64) -> Result<Step<Run>> {
        let grain = core.layout().cluster();
        let size = core.layout().size;
        let start = at.0 & !(grain - 1);
        let skip = at.0 - start;
        let run = match core.map_extent(at, len.min(grain - skip))? {
            Step::Done(run) => run,
            other => return Ok(other),
        };
        let ExtentKind::Data { file, offset } = run.kind else {
            return Ok(Step::Done(run));
        };
        let from = offset.0.saturating_sub(skip);
        // As much as QEMU reads; less where the next grain begins before.
        let mut most = 2 * grain;
        let next = start + grain;
        if next < size {
            match core.map_extent(GuestOffset(next), 1) {
                Ok(Step::Done(Run {
                    kind: ExtentKind::Data { offset, .. },
                    ..
                })) if offset.0 > from => most = most.min(offset.0 - from),
                Ok(Step::Done(_)) | Err(_) => {}
                Ok(other) => return Ok(other),
            }
        }
        let unpacked = grain.min(size - start);
        let fits =
            |bytes: u64| u32::try_from(bytes).map_err(|_| Error::invalid("a grain too large"));
        Ok(Step::Done(Run {
            len: run.len,
            kind: ExtentKind::Compressed(Compressed {
                file,
                offset: HostOffset(from),
                len: fits(most)?,
                unpacked_len: fits(unpacked)?,
                skip: fits(skip)?,
                packing: 0,
                lasting: true,
            }),
        }))
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = vec![
            ("create type", self.create_type.clone()),
            ("cid", format!("{:08x}", self.descriptor.cid)),
            ("parent cid", format!("{:08x}", self.descriptor.parent_cid)),
        ];
        if let Some(adapter) = self.descriptor.value("ddb.adapterType") {
            facts.push(("adapter type", adapter.to_owned()));
        }
        let shown = self.extents.iter().map(|extent| {
            let name = match extent.line.file.as_str() {
                "" => "in this file".to_owned(),
                name => format!("'{name}'"),
            };
            let grains = match &extent.kind {
                Kind::Sparse(core) => {
                    format!(", grains of {}", size::human(core.layout().cluster()))
                }
                Kind::Compressed(core) => {
                    format!(
                        ", compressed grains of {}",
                        size::human(core.layout().cluster())
                    )
                }
                Kind::Flat(0) | Kind::Zero => String::new(),
                Kind::Flat(at) => format!(", from byte {at:#x} on"),
            };
            format!(
                "{} {} {name}{grains}",
                extent.line.kind,
                size::human(extent.bytes)
            )
        });
        const SHOWN_MAX: usize = 8;
        let mut list: Vec<String> = shown.take(SHOWN_MAX).collect();
        if self.extents.len() > SHOWN_MAX {
            list.push(format!("and {} more", self.extents.len() - SHOWN_MAX));
        }
        facts.push(("extents", list.join("; ")));
        if let (1, Some(core)) = (self.extents.len(), self.core(0)) {
            facts.push(("metadata cache", core.cache_fact()));
        }
        facts
    }
}

impl Image for Vmdk {
    fn describe(&self) -> Description {
        let grains = self.cores().map(|core| core.layout().cluster());
        Description {
            backing: self.descriptor.parent.clone(),
            backing_format: self.descriptor.parent.as_ref().map(|_| "vmdk".to_owned()),
            read_only_because: self.lacks.clone(),
            facts: self.facts(),
            ..Description::new("vmdk", self.size, grains.max().unwrap_or(1))
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn unique_id(&self) -> Option<[u8; 16]> {
        Some(id_of(self.descriptor.cid))
    }

    fn parent(&self) -> Option<Parent> {
        let name = self.descriptor.parent.clone()?;
        Some(Parent {
            names: vec![name],
            unique_ids: vec![id_of(self.descriptor.parent_cid)],
            changed: None,
        })
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Run>> {
        let (nth, extent, at, len) = self.within(at, len)?;
        let kind = match &extent.kind {
            Kind::Flat(from) => ExtentKind::Data {
                file: extent.file,
                offset: HostOffset(from + at.0),
            },
            Kind::Zero => ExtentKind::Zero { host: None },
            Kind::Sparse(core) => return Ok(tagged(core.map_extent(at, len)?, nth)),
            Kind::Compressed(core) => {
                return Ok(tagged(self.map_compressed(core, at, len)?, nth));
            }
        };
        Ok(Step::Done(Run { len, kind }))
    }

    fn expect(&self, at: GuestOffset) {
        if let Some((_, extent)) = self.extent(at.0)
            && let Kind::Sparse(core) | Kind::Compressed(core) = &extent.kind
        {
            core.expect_at(GuestOffset(at.0 - extent.start));
        }
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        if let Some(need) = self.may_change()? {
            return Ok(Step::Need(need));
        }
        let (nth, extent, at, len) = self.within(at, len)?;
        match &extent.kind {
            Kind::Flat(from) => Ok(Step::Done(Plan::InPlace {
                file: extent.file,
                offset: HostOffset(from + at.0),
                len,
            })),
            Kind::Sparse(core) => {
                let mut step = tagged(core.plan_write(at, len)?, nth);
                if let Step::Done(Plan::Allocate(new)) = &mut step {
                    let tag = (nth as u64) << TAG_SHIFT;
                    new.ticket = Ticket(new.ticket.0 | tag);
                    new.key = Key(new.key.0 | tag);
                    new.start = new.start.plus(extent.start);
                    if nth + 1 < self.extents.len() {
                        // What follows is another extent's.
                        let end = extent.start + extent.bytes;
                        new.len = new.len.min(end.saturating_sub(new.start.0));
                    }
                    self.recent.store(nth, Ordering::Relaxed);
                }
                Ok(step)
            }
            Kind::Zero | Kind::Compressed(_) => Err(self.why_read_only()),
        }
    }

    fn foresee(&self) -> Option<Foreseen> {
        let nth = self.recent.load(Ordering::Relaxed);
        Some(match self.core(nth)?.foresee()? {
            Foreseen::Reserve(reserve) => Foreseen::Reserve(Reserve {
                key: tag(reserve.key, nth),
                ..reserve
            }),
            other => other,
        })
    }

    fn commit(&self, ticket: Ticket) {
        let (nth, own) = untag(ticket.0);
        if let Some(core) = self.core(nth) {
            core.end_allocation(Ticket(own), true);
        }
    }

    fn abort(&self, ticket: Ticket) {
        let (nth, own) = untag(ticket.0);
        if let Some(core) = self.core(nth) {
            core.end_allocation(Ticket(own), false);
        }
    }

    fn plan_zero(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<Step<ZeroPlan>> {
        if let Some(need) = self.may_change()? {
            return Ok(Step::Need(need));
        }
        let (nth, extent, at, len) = self.within(at, len)?;
        match &extent.kind {
            Kind::Flat(from) => Ok(Step::Done(ZeroPlan::Host {
                file: extent.file,
                offset: HostOffset(from + at.0),
                len,
            })),
            Kind::Sparse(core) => Ok(tagged(core.plan_zero(at, len, mode)?, nth)),
            Kind::Zero | Kind::Compressed(_) => Err(self.why_read_only()),
        }
    }

    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        let (nth, key) = untag(load.key.0);
        let own = Load {
            key: Key(key),
            ..*load
        };
        match self.core(nth) {
            Some(core) => core.loaded(&own, bytes),
            None => Err(Error::invalid(format!(
                "{}: a load nobody asked for",
                self.name
            ))),
        }
    }

    fn load_failed(&self, load: &Load) {
        let (nth, key) = untag(load.key.0);
        if let Some(core) = self.core(nth) {
            core.load_failed(&Load {
                key: Key(key),
                ..*load
            });
        }
    }

    fn reserved(&self, reserve: &Reserve, zeroed: Zeroed) {
        self.end_reserve(reserve, Some(zeroed));
    }

    fn reserve_failed(&self, reserve: &Reserve) {
        self.end_reserve(reserve, None);
    }

    fn decompress(&self, _: &Compressed, input: &[u8], output: &mut [u8]) -> Result<()> {
        let compressed = self
            .extents
            .iter()
            .any(|e| matches!(e.kind, Kind::Compressed(_)));
        if !compressed {
            return Err(Error::corrupt(
                "these vmdk images have no compressed clusters",
            ));
        }
        stream::unpack(self.markers, input, output)
    }

    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        run.clear();
        if let Some(cid) = &self.cid
            && cid.state.load(Ordering::Acquire) == CID_WANTED
        {
            run.bytes.extend_from_slice(&cid.sectors);
            run.writes.push(MetaWrite {
                file: FileId::IMAGE,
                offset: HostOffset(cid.at),
                start: 0,
                len: cid.sectors.len(),
            });
            run.cookie = 1;
        }
        let mut ordered = false;
        for core in self.cores().filter(|_| !self.read_only) {
            match core.begin_flush(run) {
                Ok(first) => ordered |= first,
                Err(error) => {
                    // Not of those before.
                    self.cores()
                        .take_while(|c| !std::ptr::eq(*c, core))
                        .for_each(|c| c.end_flush(false));
                    return Err(error);
                }
            }
        }
        run.seal_ordered(ordered);
        Ok(())
    }

    fn flush_end(&self, run: &mut FlushRun, ok: bool) {
        self.cores().for_each(|core| core.end_flush(ok));
        if let (Some(cid), 1, true) = (&self.cid, run.cookie, ok) {
            cid.state.store(CID_CHANGED, Ordering::Release);
        }
        run.clear();
    }

    fn is_dirty(&self) -> bool {
        let wanted = |cid: &Cid| cid.state.load(Ordering::Acquire) == CID_WANTED;
        self.cid.as_ref().is_some_and(wanted) || self.cores().any(Appended::is_dirty)
    }

    fn close(&self, files: &[&dyn Storage]) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let mut run = FlushRun::default();
        for _ in 0..FLUSHES_MAX {
            if !self.is_dirty() {
                return self.cut_tails(files);
            }
            self.flush_begin(&mut run)?;
            let written = carry_out(files, &run);
            self.flush_end(&mut run, written.is_ok());
            written?;
        }
        let text = format!("{}: metadata stays dirty", self.name);
        Err(Error::new(ErrorKind::Io, text))
    }
}

impl Vmdk {
    fn end_reserve(&self, reserve: &Reserve, zeroed: Option<Zeroed>) {
        let (nth, key) = untag(reserve.key.0);
        if let Some(core) = self.core(nth) {
            let own = Reserve {
                key: Key(key),
                ..*reserve
            };
            core.reserved(&own, zeroed);
        }
    }

    /// Cuts off space that was reserved and not used.
    fn cut_tails(&self, files: &[&dyn Storage]) -> Result<()> {
        for (nth, extent) in self.extents.iter().enumerate() {
            let Some(end) = self.core(nth).and_then(Appended::cut_tail) else {
                continue;
            };
            let file = files.get(usize::from(extent.file.0));
            let file = file.ok_or_else(|| {
                Error::invalid(format!("{}: closed without all of its files", self.name))
            })?;
            file.set_len(end)?;
            file.sync()?;
        }
        Ok(())
    }
}

/// A CID as [`Image::unique_id`] has it.
fn id_of(cid: u32) -> [u8; 16] {
    let mut id = *b"vmdk CID\0\0\0\0\0\0\0\0";
    let bytes = cid.to_be_bytes();
    id.iter_mut()
        .skip(12)
        .zip(bytes)
        .for_each(|(to, from)| *to = from);
    id
}

/// The CID in what [`Image::unique_id`] says, where it is one.
pub fn cid_of(id: &[u8; 16]) -> Option<u32> {
    match id {
        [
            b'v',
            b'm',
            b'd',
            b'k',
            b' ',
            b'C',
            b'I',
            b'D',
            0,
            0,
            0,
            0,
            cid @ ..,
        ] => Some(u32::from_be_bytes(*cid)),
        _ => None,
    }
}
