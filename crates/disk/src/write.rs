//! Writing, discarding and zeroing.

use crate::{
    fill::FILL_BYTES_MAX,
    queue::{DiskQueue, Next},
    sub::{Place, Purpose},
};
use block::{GuestError, Op};
use image::{Plan, Step, ZeroMode, ZeroPlan};
use io::{Engine, IoOp};

/// Bytes that a write-zeroes plans as written zeros at a time, so that the pieces
/// of one operation stay few.
const ZEROS_AT_ONCE: u64 = 2 << 20;

/// Writes go to the active image.
const ACTIVE: u8 = 0;

impl DiskQueue {
    /// Writes the next part of a request.
    pub(crate) fn step_write(&mut self, engine: &mut dyn Engine, index: u32) -> Next {
        let slot = &self.slots[index as usize];
        let end = if slot.zeros_until > 0 {
            slot.zeros_until.min(slot.pos + ZEROS_AT_ONCE)
        } else {
            slot.len
        };
        let (pos, at, left) = (slot.pos, slot.at.plus(slot.pos), end - slot.pos);
        // Who writes on and on meets the clusters that it has just begun.
        let joined = self.join_fill(index, left, false);
        if joined > 0 {
            self.slots[index as usize].pos += joined;
            return Next::Continue;
        }
        // Whoever gets an allocation must be able to carry it out.
        if !self.has_sub() || self.fills_free.is_empty() || self.fill_bytes > FILL_BYTES_MAX {
            return self.stall(index);
        }
        let step = self.disk.layers[0].image.plan_write(at, left);
        let len = match step {
            Ok(Step::Done(Plan::InPlace { file, offset, len })) => {
                let len = len.min(left);
                if self.is_encrypted(ACTIVE) {
                    match self.write_sealed(engine, index, file, offset.0, len) {
                        Some(len) => len,
                        None => return self.stall(index),
                    }
                } else {
                    self.transfer(engine, index, ACTIVE, file, IoOp::Write, offset.0, pos, len);
                    len
                }
            }
            Ok(Step::Done(Plan::Allocate(allocation))) => {
                let len = allocation.write_len.min(left);
                self.begin_fill(index, &allocation);
                len
            }
            Ok(Step::Done(Plan::Drop { len })) => len.min(left),
            Ok(Step::Need(need)) => return self.meet(engine, index, ACTIVE, need),
            Ok(Step::Wait(key)) => match self.join_fill(index, left, true) {
                0 => {
                    self.came_late(key);
                    return self.wait(index, ACTIVE, key);
                }
                joined => joined,
            },
            Err(error) => return Next::Fail(self.refuse(ACTIVE, &error)),
        };
        self.slots[index as usize].pos += len;
        Next::Continue
    }

    /// Discards or zeroes the next part of a request.
    pub(crate) fn step_zero(&mut self, engine: &mut dyn Engine, index: u32) -> Next {
        let slot = &self.slots[index as usize];
        if slot.zeros_until > slot.pos {
            return self.step_write(engine, index);
        }
        let (mode, fast) = match slot.op() {
            Some(Op::WriteZeroes { unmap, fast, .. }) => (
                ZeroMode::Zero {
                    unmap: unmap && self.disk.can_discard(),
                },
                fast,
            ),
            _ if !self.disk.can_discard() => {
                // `--discard ignore`: a hint that is not taken.
                let slot = &mut self.slots[index as usize];
                slot.pos = slot.len;
                return Next::Continue;
            }
            _ => (ZeroMode::Discard, false),
        };
        if !self.has_sub() {
            return self.stall(index);
        }
        let slot = &self.slots[index as usize];
        let (at, left) = (slot.at.plus(slot.pos), slot.len - slot.pos);
        let step = self.disk.layers[0].image.plan_zero(at, left, mode);
        let len = match step {
            Ok(Step::Done(ZeroPlan::Done { len } | ZeroPlan::Skip { len })) => len,
            Ok(Step::Done(ZeroPlan::Host { file, offset, len })) => {
                let op = match mode {
                    ZeroMode::Discard => IoOp::Discard,
                    ZeroMode::Zero { unmap } => IoOp::Zero { unmap, fast },
                };
                let len = len.min(left);
                self.host_zero(engine, index, file, op, offset.0, len);
                len
            }
            Ok(Step::Done(ZeroPlan::Write { len })) => {
                if fast {
                    return Next::Fail(GuestError::Unsupported);
                }
                let slot = &mut self.slots[index as usize];
                slot.zeros_until = slot.pos + len.min(left);
                return Next::Continue;
            }
            Ok(Step::Need(need)) => return self.meet(engine, index, ACTIVE, need),
            Ok(Step::Wait(key)) => return self.wait(index, ACTIVE, key),
            Err(error) => return Next::Fail(self.refuse(ACTIVE, &error)),
        };
        self.slots[index as usize].pos += len.clamp(1, left);
        Next::Continue
    }

    /// Has the engine discard or zero a range of the active image's file.
    #[allow(clippy::too_many_arguments)]
    fn host_zero(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        file: image::FileId,
        op: IoOp,
        offset: u64,
        len: u64,
    ) {
        let Some(sub) = self.take_sub() else { return };
        self.slots[index as usize].pending += 1;
        let file = self.file(ACTIVE, file);
        let purpose = Purpose::Data { slot: index };
        let place = Place { file, offset, len };
        self.issue(engine, sub, purpose, op, place, None);
    }
}
