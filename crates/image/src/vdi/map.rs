//! What a range is made of, and how it is written or zeroed.

use super::Vdi;
use super::open::is_there;
use super::state::State;
use crate::metadata::{Ask, Growing, Halt, STEPS_MAX};
use crate::{Extent, ExtentKind, FileId, Plan, ZeroMode, ZeroPlan};
use block::{Error, GuestOffset, HostOffset};

impl Vdi {
    /// Where the data of a block with that entry are; `None` for one that is not there.
    #[inline]
    fn place(&self, entry: u32) -> Option<u64> {
        is_there(entry).then(|| self.data_offset + (u64::from(entry) << self.block_bits))
    }

    /// What the range begins with: as far as the map is in memory, whose first page is asked for where it is not. Of a
    /// block that is not wholly in the file the sectors that are there are mapped. With `st` under the lock.
    pub(super) fn map_at(
        &self,
        mut st: Option<&mut State>,
        at: GuestOffset,
        len: u64,
    ) -> Ask<Extent> {
        let mut run = Growing::new(at.0, len);
        for _ in 0..STEPS_MAX {
            let within = run.next() & (self.block_bytes() - 1);
            let mut room = (self.block_bytes() - within).min(run.left());
            let block = run.next() >> self.block_bits;
            let entry = match self.entry(block) {
                Some(entry) => entry,
                None if run.len() > 0 => break,
                None => self.load_entry(st.as_deref_mut(), block)?,
            };
            let kind = match self.place(entry) {
                Some(host) => {
                    let there = self.readable_end.saturating_sub(host + within);
                    match there {
                        0 if run.len() > 0 => break,
                        0 => return Err(Halt::Fail(self.behind_the_file(block, host))),
                        there => room = room.min(there),
                    }
                    ExtentKind::Data {
                        file: FileId::IMAGE,
                        offset: HostOffset(host + within),
                    }
                }
                None => ExtentKind::Zero { host: None },
            };
            if !run.feed(kind, room) || run.left() == 0 {
                break;
            }
        }
        Ok(run.extent())
    }

    #[cold]
    fn behind_the_file(&self, block: u64, host: u64) -> Error {
        Error::corrupt(format!(
            "{}: block {block}: its entry at byte {:#x} leads to byte {host:#x}, and the file ends at byte {:#x}",
            self.name,
            self.header.entry_offset(block),
            self.readable_end
        ))
    }

    /// The plan of a write to blocks that are there.
    #[inline]
    fn plan_here(&self, st: Option<&mut State>, at: GuestOffset, len: u64) -> Ask<Option<Plan>> {
        let extent = self.map_at(st, at, len)?;
        Ok(match extent.kind {
            ExtentKind::Data { file, offset } => Some(Plan::InPlace {
                file,
                offset,
                len: extent.len,
            }),
            _ => None,
        })
    }

    pub(super) fn plan_at(&self, at: GuestOffset, len: u64) -> Ask<Plan> {
        if let Some(plan) = self.plan_here(None, at, len)? {
            return Ok(plan);
        }
        let st = &mut *self.lock();
        if let Some(plan) = self.plan_here(Some(st), at, len)? {
            return Ok(plan);
        }
        let within = at.0 & (self.block_bytes() - 1);
        let len = len.min(self.block_bytes() - within);
        self.bear(st, at.0 >> self.block_bits, within, len)
    }

    /// Nothing lies below, so that a block which is not there stays so; another's place is zeroed where it is.
    pub(super) fn zero_at(&self, at: GuestOffset, len: u64, _: ZeroMode) -> Ask<ZeroPlan> {
        let extent = self.map_at(None, at, len)?;
        Ok(match extent.kind {
            ExtentKind::Data { file, offset } => ZeroPlan::Host {
                file,
                offset,
                len: extent.len,
            },
            _ => ZeroPlan::Skip { len: extent.len },
        })
    }
}
