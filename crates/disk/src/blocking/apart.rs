//! Requests in two steps: first where their bytes are, from the formats, one after the other; then the bytes, by any
//! thread, any number at a time.

use super::members::Members;
use super::{Driver, nobody, usize_of, whole};
use block::faults::{Event, IoType};
use block::{Error, GuestOffset, HostOffset, Result, Storage};
use image::{Compressed, ExtentKind, FileId, Pack, Plan, Ticket};
use std::sync::Arc;

/// A run of a disk's bytes that can be read.
#[derive(Clone, Debug)]
pub struct Fragment {
    members: Members,
    depth: usize,
    at: GuestOffset,
    len: u64,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Data(FileId, HostOffset),
    Zero,
    /// The memory stays as it is.
    Untouched,
    Compressed(Compressed),
}

impl Fragment {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none; none has.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn read(&self, buf: &mut [u8]) -> Result<()> {
        match &self.kind {
            Kind::Data(file, offset) => {
                let event = match self.depth {
                    0 => Event::ReadAio,
                    _ => Event::ReadBackingAio,
                };
                self.members.file(self.depth, *file)?.event(event);
                (self.members).read_data(self.depth, *file, self.at, *offset, buf)
            }
            Kind::Zero => {
                buf.fill(0);
                Ok(())
            }
            Kind::Untouched => Ok(()),
            Kind::Compressed(packed) => self.members.unpack(self.depth, packed, buf),
        }
    }

    /// Takes `next` in where it goes on in the same place.
    fn join(&mut self, next: &Self) -> bool {
        let goes_on = match (self.kind, next.kind) {
            (Kind::Data(file, offset), Kind::Data(other, at)) => {
                self.members.is(&next.members)
                    && self.depth == next.depth
                    && self.at.plus(self.len) == next.at
                    && file == other
                    && offset.0.checked_add(self.len) == Some(at.0)
            }
            (Kind::Zero, Kind::Zero) => true,
            _ => false,
        };
        if goes_on {
            self.len += next.len;
        }
        goes_on
    }
}

/// Reads fragments, one behind the other, into `buf`, which has as many bytes as they.
///
/// # Errors
///
/// What reading, decrypting or unpacking fails with.
pub fn read(fragments: &[Fragment], buf: &mut [u8]) -> Result<()> {
    let mut rest = buf;
    for fragment in fragments {
        let len = usize_of(fragment.len)?;
        let (part, later) = rest
            .split_at_mut_checked(len)
            .ok_or_else(|| Error::invalid("fragments run out of their buffer"))?;
        fragment.read(part)?;
        rest = later;
    }
    Ok(())
}

/// A part of a write that has its place. Dropped before [`Placed::finish`] it is given up: the disk stays as it was,
/// or, in a place that it had before, has some of the bytes.
#[derive(Debug)]
pub struct Placed {
    members: Members,
    at: GuestOffset,
    len: u64,
    /// `None`: the image forgets what is written.
    place: Option<(FileId, HostOffset)>,
    ticket: Option<Ticket>,
    /// Its bytes are a cluster's, packed.
    packed: bool,
}

impl Placed {
    /// Bytes, from where was asked; at least 1.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none; none has.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes `data`, which has [`Placed::len`] bytes, encrypted where the image's data are.
    ///
    /// # Errors
    ///
    /// What the host fails with.
    pub fn write(&self, data: &[u8]) -> Result<()> {
        match self.place {
            Some((file, host)) => {
                let event = match self.packed {
                    true => Event::WriteCompressed,
                    false => Event::WriteAio,
                };
                self.members.file(0, file)?.event(event);
                self.members.write_data(file, self.at, host, data)
            }
            None => Ok(()),
        }
    }

    /// Where its bytes belong as they are, for who puts them there otherwise; `None` where nobody need.
    ///
    /// # Errors
    ///
    /// `Unsupported` for an encrypted image.
    pub fn place(&self) -> Result<Option<(Arc<dyn Storage>, HostOffset)>> {
        if self.members.member(0)?.image.encryption().is_some() {
            return Err(Error::unsupported(
                "an encrypted image's file does not have the guest's bytes as they are",
            ));
        }
        let place = self.place.map(|(file, host)| {
            let file = self.members.file(0, file)?;
            Ok((file, host))
        });
        place.transpose()
    }

    /// Has the host find room for its bytes at once, where the format did not see to that: a file system finds it for a
    /// whole run in less time than for each page of it that is written. A hint: where there is none, writing says so.
    pub fn reserve(&self) {
        if let (None, Some((file, host))) = (self.ticket, self.place)
            && let Ok(storage) = self.members.file(0, file)
        {
            let _ = (self.members).changing(file, || storage.allocate(host.0, self.len));
        }
    }

    /// The bytes are there: they are the disk's now.
    pub fn finish(mut self) {
        if let Some((file, _)) = self.place {
            // Others may have put them there ([`Placed::place`]).
            self.members.unsynced.mark(usize::from(file.0));
        }
        if let (Some(ticket), Some(first)) = (self.ticket.take(), self.members.first()) {
            first.image.commit(ticket);
        }
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let (Some(ticket), Some(first)) = (self.ticket.take(), self.members.first()) {
            first.image.abort(ticket);
        }
    }
}

impl Driver {
    /// Appends to `into` where `len` bytes of the disk at `at` are read from.
    ///
    /// # Errors
    ///
    /// A range outside the disk; what reading tables fails with.
    pub fn locate(&mut self, at: u64, len: u64, into: &mut Vec<Fragment>) -> Result<()> {
        self.check(at, len)?;
        self.fault(IoType::Read, at, len)?;
        self.locate_from(0, at, len, into)
    }

    /// Whether it is known where `len` bytes at `at` are, whatever reading them or asking for their status fails with.
    pub fn is_mapped(&mut self, at: u64, len: u64) -> bool {
        self.locate_from(0, at, len, &mut Vec::new()).is_ok()
    }

    /// As the image at `depth` and those below it have them.
    fn locate_from(
        &mut self,
        depth: usize,
        at: u64,
        len: u64,
        into: &mut Vec<Fragment>,
    ) -> Result<()> {
        let size = self.members.get(depth).map_or(0, |m| m.image.size());
        let inside = size.saturating_sub(at).min(len);
        let mut done = 0;
        while done < inside {
            let (here, asked) = (at + done, inside - done);
            let extent = self.answer(depth, |image| image.map(GuestOffset(here), asked))?;
            let len = whole(extent.len, asked)?;
            let kind = match extent.kind {
                ExtentKind::Data { file, offset } => Kind::Data(file, offset),
                ExtentKind::Zero { .. } => Kind::Zero,
                ExtentKind::Untouched => Kind::Untouched,
                ExtentKind::Compressed(packed) => Kind::Compressed(packed),
                ExtentKind::Unallocated => {
                    self.locate_from(depth + 1, here, len, into)?;
                    done += len;
                    continue;
                }
            };
            self.put(depth, here, len, kind, into);
            done += len;
        }
        if inside < len {
            // Behind the end of a shorter backing image there are zeros.
            self.put(depth, at + inside, len - inside, Kind::Zero, into);
        }
        Ok(())
    }

    fn put(&self, depth: usize, at: u64, len: u64, kind: Kind, into: &mut Vec<Fragment>) {
        let next = Fragment {
            members: self.members.clone(),
            depth,
            at: GuestOffset(at),
            len,
            kind,
        };
        if !into.last_mut().is_some_and(|last| last.join(&next)) {
            into.push(next);
        }
    }

    /// Finds a place for the first of `len` bytes at `at`; how many of them it is for, it says itself. What belongs
    /// around them is written. `None`: it has to wait for a write that was placed before and is not finished.
    ///
    /// Several writes may be placed at a time, if none of them overlap.
    ///
    /// # Errors
    ///
    /// As [`Driver::write`].
    pub fn place(&mut self, at: u64, len: u64) -> Result<Option<Placed>> {
        self.check_write(at, len)?;
        self.fault(IoType::Write, at, len)?;
        let here = GuestOffset(at);
        let plan = self.answer_unless_busy(0, |image| image.plan_write(here, len))?;
        let Some(plan) = plan else { return Ok(None) };
        let mut placed = Placed {
            members: self.members.clone(),
            at: here,
            len: 0,
            place: None,
            ticket: None,
            packed: false,
        };
        placed.len = match plan {
            Plan::Drop { len } => len,
            Plan::InPlace { file, offset, len } => {
                placed.place = Some((file, offset));
                len
            }
            Plan::Allocate(new) => {
                self.event(Event::ClusterAlloc);
                placed.ticket = Some(new.ticket);
                placed.place = Some((new.file, self.fill_around(here, &new)?));
                new.write_len
            }
        };
        whole(placed.len, len)?;
        Ok(Some(placed))
    }

    /// What packs clusters for [`Driver::place_packed`].
    ///
    /// # Errors
    ///
    /// `Unsupported` for a disk that takes none; where there is no memory for it.
    pub fn packer(&self) -> Result<Box<dyn Pack>> {
        self.members.member(0)?.image.packer()
    }

    /// Finds a place for the cluster at `at`, which a packer made `len` bytes of: these, and not the cluster, are to be
    /// written. They share sectors with others: write them before anything else gets its place. `None` as of
    /// [`Driver::place`].
    ///
    /// # Errors
    ///
    /// As [`Driver::write`]; `Unsupported` for a disk that takes no packed clusters.
    pub fn place_packed(&mut self, at: u64, len: u32) -> Result<Option<Placed>> {
        self.check_write(at, 1)?;
        self.fault(IoType::Write, at, 1)?;
        let here = GuestOffset(at);
        let place = self.answer_unless_busy(0, |image| image.plan_packed(here, len))?;
        Ok(place.map(|place| Placed {
            members: self.members.clone(),
            at: here,
            len: u64::from(len),
            place: Some((place.file, place.offset)),
            ticket: Some(place.ticket),
            packed: true,
        }))
    }

    /// Writes the cluster at `at`, which a packer made `packed` of.
    ///
    /// # Errors
    ///
    /// As [`Driver::place_packed`].
    pub fn write_packed(&mut self, at: u64, packed: &[u8]) -> Result<()> {
        // More than a cluster's bytes are refused.
        let len = u32::try_from(packed.len()).unwrap_or(u32::MAX);
        let placed = self.place_packed(at, len)?.ok_or_else(nobody)?;
        placed.write(packed)?;
        placed.finish();
        Ok(())
    }
}
