//! Drives a chain of images with blocking calls, one request at a time.
//!
//! Where the bytes of a request go to or come from can be asked for apart from moving them ([`Driver::place`],
//! [`Driver::locate`]): any thread may do that then, and several at a time.
//!
//! Whole-image tools use it, and tests: it is the contract of [`image::Image`] carried out in the
//! most obvious order, and so the reference for the served disk, which does the same
//! with many requests in flight.
//!
//! ```text
//!   write: plan ─┬─ in place: write
//!                └─ allocate: head (from the chain) · data · tail ─ commit
//!   flush: stage 1 writes · sync · stage 2 writes · sync … · free space punched, released
//! ```

mod apart;
mod cut_off;
mod members;
#[cfg(test)]
mod tests;

pub use apart::{Fragment, Placed, read};
pub use cut_off::CutOff;

use block::faults::{Event, Faults, IoType};
use block::{Context, Error, ErrorKind, GuestOffset, HostOffset, Result, Storage, Zeroed};
use image::{
    Allocation, ExtentKind, FileId, Fill, FlushRun, Freed, Image, Need, Plan, Reserve, Step,
    ZeroMode, ZeroPlan,
};
use members::Members;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes that are copied or zeroed at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// Questions that a format may leave open in a row for one range before it counts as broken: each
/// needs a block or space that the one before did not bring.
const NEEDS_MAX: usize = 4096;

/// One image of a chain with the files that it is made of, by [`FileId`].
#[derive(Clone, Debug)]
pub struct Member {
    /// The format's state.
    pub image: Arc<dyn Image>,
    /// Its files.
    pub files: Vec<Arc<dyn Storage>>,
}

/// What a guest range is made of, seen through the whole chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainExtent {
    /// Bytes from where was asked.
    pub len: u64,
    /// Which image answers, 0 is the active one.
    pub depth: usize,
    /// Where its bytes are. `Unallocated`: neither this image, the last that is long enough, nor any
    /// above has the range; it is zeros.
    pub kind: ExtentKind,
}

/// A chain of images driven with blocking calls.
///
/// Dropping it without [`Driver::close`] is what a crash of the process does to the image.
#[derive(Debug)]
pub struct Driver {
    members: Members,
    read_only: bool,
    run: FlushRun,
    faults: Option<Arc<Faults>>,
    /// Where files of the images ended when that was asked last.
    ends: HashMap<(usize, FileId), u64>,
}

impl Driver {
    /// Drives `members`, of which the first is the active one. With `read_only`, nothing is ever written.
    pub fn new(members: Vec<Member>, read_only: bool) -> Result<Self> {
        if members.is_empty() {
            return Err(Error::invalid("a chain without an image"));
        }
        Ok(Self {
            members: Members::new(members),
            read_only,
            run: FlushRun::default(),
            faults: None,
            ends: HashMap::new(),
        })
    }

    /// The same disk, of whose accesses some fail: of the guest's, not of the files'.
    #[must_use]
    pub fn with_faults(self, faults: Option<Arc<Faults>>) -> Self {
        Self { faults, ..self }
    }

    /// The same disk, of which bytes that a file is too short for become what `cut_off` says.
    #[must_use]
    pub fn with_cut_off(mut self, cut_off: CutOff) -> Self {
        self.members.cut_off = cut_off;
        self
    }

    /// How many of `len` bytes of the disk at `offset` of a file of the image at `depth` can be read, or read as zeros by
    /// [`CutOff::Zeros`]: all of them, unless the file is cut off.
    ///
    /// # Errors
    ///
    /// No such image or file; what asking the host fails with.
    pub fn readable(
        &mut self,
        depth: usize,
        file: FileId,
        offset: HostOffset,
        len: u64,
    ) -> Result<u64> {
        if self.members.cut_off == CutOff::Zeros {
            return Ok(len);
        }
        let end = self.ends.entry((depth, file)).or_default();
        if offset.0.saturating_add(len) > *end {
            // It may have grown.
            *end = self.members.file(depth, file)?.len()?;
        }
        Ok(cut_off::there(*end, offset, len))
    }

    /// Fails an access of the guest that is to fail.
    fn fault(&self, io: IoType, at: u64, len: u64) -> Result<()> {
        match &self.faults {
            Some(faults) => {
                (faults.check(io, at, len)).context(|| format!("{io} of the disk at byte {at}"))
            }
            None => Ok(()),
        }
    }

    /// Tells the active image's file where work on it has come to.
    fn event(&self, event: Event) {
        if let Some(file) = self.members.first().and_then(|first| first.files.first()) {
            file.event(event);
        }
    }

    /// Bytes of the virtual disk.
    pub fn size(&self) -> u64 {
        self.members.first().map_or(0, |m| m.image.size())
    }

    /// Whether there is an image below the active one.
    pub fn has_backing(&self) -> bool {
        self.members.len() > 1
    }

    /// Fills `buf` with the guest's bytes from `at` on.
    pub fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut fragments = Vec::new();
        self.locate(at, buf.len() as u64, &mut fragments)?;
        apart::read(&fragments, buf)
    }

    /// Writes the guest's bytes `data` at `at`.
    pub fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        self.check_write(at, data.len() as u64)?;
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let (here, len) = (at + done as u64, rest.len() as u64);
            let placed = self.place(here, len)?.ok_or_else(nobody)?;
            let part = prefix(rest, placed.len())?;
            placed.write(part)?;
            placed.finish();
            done += part.len();
        }
        Ok(())
    }

    /// Whether the active image's data are encrypted: its files do not have the guest's bytes as they are.
    pub fn is_encrypted(&self) -> bool {
        let first = self.members.first();
        first.is_some_and(|member| member.image.encryption().is_some())
    }

    /// Writes what belongs around `new.write_len` bytes at `at` into an allocation. Returns where these go.
    fn fill_around(&mut self, at: GuestOffset, new: &Allocation) -> Result<HostOffset> {
        let to = at.plus(new.write_len);
        let end = new.start.plus(new.len);
        if at < new.start || to > end {
            return Err(Error::corrupt(format!(
                "{new:?} does not cover {} bytes at {at}",
                new.write_len
            )));
        }
        self.fill(new, new.start, at)?;
        self.fill(new, to, end)?;
        Ok(new.host.plus(at.since(new.start)))
    }

    /// Makes a range read as zeros, giving its space back with `unmap`.
    pub fn write_zeroes(&mut self, at: u64, len: u64, unmap: bool) -> Result<()> {
        self.zero(at, len, ZeroMode::Zero { unmap })
    }

    /// Gives up a range: it reads as before or as zeros.
    pub fn discard(&mut self, at: u64, len: u64) -> Result<()> {
        self.zero(at, len, ZeroMode::Discard)
    }

    /// Gives a range that reads as zeros clusters of its own in the active image's file; `each` is told
    /// which bytes of which file the range has then, piece by piece, and may put zeros there.
    ///
    /// Zeros in the file are not zeros to the guest where its data are encrypted. The range is marked as zeros
    /// then, and gets encrypted ones where it cannot be marked: in part of a cluster, and in version 2.
    pub fn preallocate(
        &mut self,
        at: u64,
        len: u64,
        mut each: impl FnMut(&dyn Storage, HostOffset, u64) -> Result<()>,
    ) -> Result<()> {
        self.check_write(at, len)?;
        let (mut at, mut left) = (at, len);
        while left > 0 {
            let plan = self.answer(0, |image| image.plan_write(GuestOffset(at), left))?;
            let len = match plan {
                Plan::Drop { len } => len,
                Plan::InPlace { file, offset, len } => {
                    let storage = self.members.file(0, file)?;
                    (self.members).changing(file, || each(&*storage, offset, len))?;
                    len
                }
                Plan::Allocate(new) => {
                    let done = self
                        .fill_with_zeros(GuestOffset(at), &new)
                        .and_then(|host| {
                            let storage = self.members.file(0, new.file)?;
                            (self.members)
                                .changing(new.file, || each(&*storage, host, new.write_len))
                        });
                    let image = &self.members.member(0)?.image;
                    match done {
                        Ok(()) => image.commit(new.ticket),
                        Err(error) => {
                            image.abort(new.ticket);
                            return Err(error);
                        }
                    }
                    new.write_len
                }
            };
            let len = whole(len, left)?;
            if self.members.member(0)?.image.encryption().is_some() {
                self.write_zeroes(at, len, false)?;
            }
            at += len;
            left -= len;
        }
        Ok(())
    }

    /// Writes all that belongs into an allocation for a write of zeros at `at`. Returns where that is.
    fn fill_with_zeros(&mut self, at: GuestOffset, new: &Allocation) -> Result<HostOffset> {
        let from = self.fill_around(at, new)?;
        // What is encrypted is zeroed when it is the guest's.
        if !new.zeroed && !self.is_encrypted() {
            let file = self.members.file(0, new.file)?;
            let zero = || file.write_zeroes(from.0, new.write_len, false);
            self.members.changing(new.file, zero)?;
        }
        Ok(from)
    }

    /// Makes everything written before survive a crash.
    pub fn flush(&mut self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.fault(IoType::Flush, 0, 0)?;
        self.event(Event::FlushToOs);
        let image = Arc::clone(&self.members.member(0)?.image);
        let mut run = std::mem::take(&mut self.run);
        let carried_out = image
            .flush_begin(&mut run)
            .and_then(|()| {
                let done = self.carry_out(&run);
                image.flush_end(&mut run, done.is_ok());
                done
            })
            .and_then(|()| self.release_freed(image.as_ref()));
        self.run = run;
        carried_out
    }

    /// Flushes, and leaves the image as one that was closed cleanly.
    pub fn close(mut self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.flush()?;
        let member = self.members.member(0)?;
        let files: Vec<&dyn Storage> = member.files.iter().map(AsRef::as_ref).collect();
        member.image.close(&files)
    }

    /// What the range is made of: one run from `at` on, at most `len` bytes.
    pub fn extent_at(&mut self, at: u64, len: u64) -> Result<ChainExtent> {
        self.check(at, len)?;
        self.fault(IoType::BlockStatus, at, len)?;
        let (mut len, mut depth) = (len, 0);
        loop {
            let left = self.members.member(depth)?.image.size().saturating_sub(at);
            let asked = len.min(left);
            let extent = self.answer(depth, |image| image.map(GuestOffset(at), asked))?;
            len = whole(extent.len, asked)?;
            let below = self.members.get(depth + 1).map_or(0, |m| m.image.size());
            // An image that ends before reads as zeros there, and so do all below it.
            if extent.kind != ExtentKind::Unallocated || below <= at {
                let kind = extent.kind;
                return Ok(ChainExtent { len, depth, kind });
            }
            depth += 1;
        }
    }

    fn check(&self, at: u64, len: u64) -> Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(Error::invalid(format!(
                "{len} bytes at {at:#x} lie outside the disk of {} bytes",
                self.size()
            ))),
        }
    }

    fn check_write(&self, at: u64, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        self.check(at, len)
    }

    /// Asks the image at `depth` until it has an answer, doing what it needs in between.
    fn answer<T>(
        &mut self,
        depth: usize,
        ask: impl FnMut(&dyn Image) -> Result<Step<T>>,
    ) -> Result<T> {
        // One request at a time, each need met before the next question: there is nobody to wait for.
        self.answer_unless_busy(depth, ask)?.ok_or_else(nobody)
    }

    /// The same; `None` where the answer has to wait for a write that was placed and is under way.
    fn answer_unless_busy<T>(
        &mut self,
        depth: usize,
        mut ask: impl FnMut(&dyn Image) -> Result<Step<T>>,
    ) -> Result<Option<T>> {
        let mut refused = None;
        for _ in 0..NEEDS_MAX {
            let image = Arc::clone(&self.members.member(depth)?.image);
            match ask(image.as_ref())? {
                Step::Done(answer) => return Ok(Some(answer)),
                Step::Need(need) => self.satisfy(depth, image.as_ref(), need, &mut refused)?,
                Step::Wait(_) => return Ok(None),
            }
        }
        Err(Error::corrupt(format!(
            "image {depth} of the chain: no answer after {NEEDS_MAX} metadata blocks"
        )))
    }

    fn satisfy(
        &mut self,
        depth: usize,
        image: &dyn Image,
        need: Need,
        refused: &mut Option<u64>,
    ) -> Result<()> {
        match need {
            Need::Load(load) => {
                let fixed = self.read_only || depth > 0;
                let bytes = self.members.load(depth, &load, fixed).inspect_err(|_| {
                    image.load_failed(&load);
                })?;
                image.loaded(&load, &bytes)
            }
            Need::Reserve(reserve) => self.reserve(depth, image, &reserve, refused),
            Need::Commit if depth == 0 => self.flush(),
            Need::Commit => Err(Error::corrupt(format!(
                "image {depth} of the chain is read only, but wants to be flushed"
            ))),
        }
    }

    /// Reserves space. Where the host has not that much, less may do: the format is asked again, unless it asks for as
    /// much as `refused`, the bytes that the host refused before.
    fn reserve(
        &self,
        depth: usize,
        image: &dyn Image,
        reserve: &Reserve,
        refused: &mut Option<u64>,
    ) -> Result<()> {
        let file = self.members.file(depth, reserve.file);
        let allocate = |f: Arc<dyn Storage>| f.allocate(reserve.offset.0, reserve.len);
        let allocated = file.and_then(|f| self.members.changing(reserve.file, || allocate(f)));
        match allocated {
            Ok(zeroed) => {
                image.reserved(reserve, zeroed);
                *refused = None;
                Ok(())
            }
            Err(error) => {
                image.reserve_failed(reserve);
                let less = refused.is_none_or(|refused| reserve.len < refused);
                *refused = Some(reserve.len);
                match error.kind() {
                    ErrorKind::NoSpace if less => Ok(()),
                    _ => Err(error),
                }
            }
        }
    }

    /// Writes the guest range `from..to` of an allocation, which the guest did not.
    fn fill(&mut self, new: &Allocation, from: GuestOffset, to: GuestOffset) -> Result<()> {
        match new.fill {
            Fill::Nothing => return Ok(()),
            Fill::Zero if new.zeroed => return Ok(()),
            Fill::Zero | Fill::Existing => {}
        }
        let size = self.size();
        let mut piece = vec![0; usize_of(to.since(from).min(PIECE_BYTES))?];
        let mut at = from;
        while at < to {
            let len = usize_of(to.since(at))?.min(piece.len());
            let part = prefix_mut(&mut piece, len)?;
            part.fill(0);
            if new.fill == Fill::Existing {
                let inside = usize_of(size.saturating_sub(at.0))?.min(len);
                if inside > 0 {
                    self.event(Event::CowRead);
                    self.read(at.0, prefix_mut(part, inside)?)?;
                }
            }
            self.event(Event::CowWrite);
            self.members
                .write_data(new.file, at, new.host.plus(at.since(new.start)), part)?;
            at = at.plus(len as u64);
        }
        Ok(())
    }

    fn zero(&mut self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_write(at, len)?;
        let io = match mode {
            ZeroMode::Zero { .. } => IoType::WriteZeroes,
            ZeroMode::Discard => IoType::Discard,
        };
        self.fault(io, at, len)?;
        let (mut at, mut left) = (at, len);
        while left > 0 {
            let plan = self.answer(0, |image| image.plan_zero(GuestOffset(at), left, mode))?;
            let len = match plan {
                ZeroPlan::Done { len } | ZeroPlan::Skip { len } => len,
                ZeroPlan::Host { file, offset, len } => {
                    let storage = self.members.file(0, file)?;
                    self.members.changing(file, || match mode {
                        ZeroMode::Discard => storage.discard(offset.0, len),
                        ZeroMode::Zero { unmap } => storage.write_zeroes(offset.0, len, unmap),
                    })?;
                    len
                }
                ZeroPlan::Write { len } => {
                    let zeros = vec![0; usize_of(len.min(PIECE_BYTES))?];
                    let mut done = 0;
                    while done < len {
                        let part = prefix(&zeros, (len - done).min(PIECE_BYTES))?;
                        self.write(at + done, part)?;
                        done += part.len() as u64;
                    }
                    len
                }
            };
            let len = whole(len, left)?;
            at += len;
            left -= len;
        }
        Ok(())
    }

    /// Writes the stages of a flush with a barrier after each.
    fn carry_out(&self, run: &FlushRun) -> Result<()> {
        let member = self.members.member(0)?;
        for stage in &run.stages {
            for write in run.writes.get(stage.first..stage.end).unwrap_or_default() {
                let bytes = run.bytes.get(write.start..write.start + write.len);
                let bytes = bytes.ok_or_else(|| {
                    Error::corrupt(format!("{write:?} lies outside the flush's bytes"))
                })?;
                let file = self.members.file(0, write.file)?;
                (self.members).changing(write.file, || file.write_at(write.offset.0, bytes))?;
            }
            for (nth, file) in member.files.iter().enumerate() {
                if self.members.unsynced.take(nth) {
                    file.event(Event::FlushToDisk);
                    file.sync()
                        .inspect_err(|_| self.members.unsynced.mark(nth))?;
                }
            }
        }
        Ok(())
    }

    /// Gives space that became free back to the host, then to the format: nothing else is in flight.
    fn release_freed(&self, image: &dyn Image) -> Result<()> {
        let mut freed: Vec<Freed> = Vec::new();
        image.take_freed(&mut freed);
        for space in &freed {
            let file = self.members.file(0, space.file)?;
            file.event(Event::ClusterFree);
            // The hole is a courtesy: where it fails the space is still free.
            let hole = || file.write_zeroes(space.offset.0, space.len, true);
            let zeroed = match self.members.changing(space.file, hole) {
                Ok(()) => Zeroed::Yes,
                Err(_) => Zeroed::No,
            };
            image.release(space, zeroed);
        }
        Ok(())
    }
}

/// The error where an image waits and nothing is under way.
fn nobody() -> Error {
    Error::new(
        ErrorKind::Io,
        "an image of the chain waits for what nobody does",
    )
}

/// `len`, when a format may answer so to a question about `asked` bytes.
fn whole(len: u64, asked: u64) -> Result<u64> {
    if len == 0 || len > asked {
        return Err(Error::corrupt(format!(
            "a format answered with {len} bytes to a question about {asked}"
        )));
    }
    Ok(len)
}

fn prefix(data: &[u8], len: u64) -> Result<&[u8]> {
    whole(len, data.len() as u64)?;
    data.get(..usize_of(len)?)
        .ok_or_else(|| Error::invalid("a range runs out of its buffer"))
}

fn prefix_mut(data: &mut [u8], len: usize) -> Result<&mut [u8]> {
    data.get_mut(..len)
        .ok_or_else(|| Error::invalid("a range runs out of its buffer"))
}

fn usize_of(bytes: u64) -> Result<usize> {
    usize::try_from(bytes)
        .map_err(|_| Error::invalid(format!("{bytes} bytes do not fit this machine's memory")))
}
