//! What a range is made of, and how it is written or zeroed.

use super::Vdi;
use super::open::is_there;
use crate::metadata::{Ask, Growing, STEPS_MAX};
use crate::{Extent, ExtentKind, FileId, Plan, ZeroMode, ZeroPlan};
use block::{GuestOffset, HostOffset, Result};
use std::sync::atomic::Ordering;

impl Vdi {
    /// Where the data of a block are; `None` for one that is not there.
    #[inline]
    fn place(&self, block: u64) -> Option<u64> {
        let entry = self.map.get(block as usize)?.load(Ordering::Acquire);
        is_there(entry).then(|| self.data_offset + (u64::from(entry) << self.block_bits))
    }

    pub(super) fn map_at(&self, at: GuestOffset, len: u64) -> Extent {
        let mut run = Growing::new(at.0, len);
        for _ in 0..STEPS_MAX {
            let within = run.next() & (self.block_bytes() - 1);
            let room = (self.block_bytes() - within).min(run.left());
            let kind = match self.place(run.next() >> self.block_bits) {
                Some(host) => ExtentKind::Data {
                    file: FileId::IMAGE,
                    offset: HostOffset(host + within),
                },
                None => ExtentKind::Zero { host: None },
            };
            if !run.feed(kind, room) || run.left() == 0 {
                break;
            }
        }
        run.extent()
    }

    /// The plan of a write to blocks that are there. Takes no lock.
    #[inline]
    fn plan_here(&self, at: GuestOffset, len: u64) -> Option<Plan> {
        let extent = self.map_at(at, len);
        match extent.kind {
            ExtentKind::Data { file, offset } => Some(Plan::InPlace {
                file,
                offset,
                len: extent.len,
            }),
            _ => None,
        }
    }

    pub(super) fn plan_at(&self, at: GuestOffset, len: u64) -> Ask<Plan> {
        if let Some(plan) = self.plan_here(at, len) {
            return Ok(plan);
        }
        let st = &mut *self.lock();
        if let Some(plan) = self.plan_here(at, len) {
            return Ok(plan);
        }
        let within = at.0 & (self.block_bytes() - 1);
        let len = len.min(self.block_bytes() - within);
        self.bear(st, at.0 >> self.block_bits, within, len)
    }

    /// Nothing lies below, so that a block which is not there stays so; another's place is zeroed where it is.
    pub(super) fn zero_at(&self, at: GuestOffset, len: u64, _: ZeroMode) -> Result<ZeroPlan> {
        let extent = self.map_at(at, len);
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
