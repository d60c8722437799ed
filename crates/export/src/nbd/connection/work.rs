//! At the disk: starting work, and making replies of what ended.

use super::{Connection, EXTENTS_MAX, PROBE_AHEAD, PROBE_BYTES, Phase, STATUS_BYTES_MAX, State};
use crate::nbd::{
    lend::{Backend, Seen},
    reply,
    request::{Refusal, Work},
};
use block::{GuestError, GuestOffset, Op};
use disk::{Done, StatusExtent};

impl Connection {
    pub(super) fn begin(&mut self, backend: &mut impl Backend, slot: usize, work: Work) {
        let entry = &mut self.slots[slot];
        let seen = entry.seen;
        let (at, len) = (entry.subject.offset, entry.len);
        let known = self.data.start <= at && at.saturating_add(len) <= self.data.end;
        let probe = matches!(work, Work::Read { whole: false }) && len >= PROBE_BYTES && !known;
        if matches!(work, Work::Trim { .. } | Work::Zero { .. }) {
            self.data = 0..0;
        }
        let op = match work {
            _ if probe => None,
            Work::Status { .. } => None,
            Work::Read { .. } => Some(Op::Read),
            Work::Write { fua } => Some(Op::Write { fua }),
            Work::Flush => Some(Op::Flush),
            Work::Trim { .. } => Some(Op::Discard),
            Work::Zero { unmap, fast, fua } => Some(Op::WriteZeroes { unmap, fast, fua }),
        };
        let taken = match op {
            Some(Op::Flush) => self.loans.submit(slot, backend, Op::Flush, 0, 0, seen),
            Some(op) => self.loans.submit(slot, backend, op, at, len, seen),
            None => {
                let extents_max = match work {
                    Work::Status { one: false } => EXTENTS_MAX,
                    _ => 1,
                };
                let follows = probe && self.data.contains(&at.saturating_sub(1));
                let len = if follows { len.max(PROBE_AHEAD) } else { len };
                let len = len.min(STATUS_BYTES_MAX).min(self.limits.size - at);
                backend.block_status(GuestOffset(at), len, extents_max, slot as u64)
            }
        };
        entry.phase = match (taken, probe) {
            (true, true) => Phase::Probing,
            (true, false) => Phase::AtDisk(work),
            (false, _) => Phase::Waiting(work),
        };
        if taken {
            self.at_disk += 1;
        } else {
            self.waiting.push_back(slot);
        }
    }

    pub(super) fn reap(&mut self, backend: &mut impl Backend) -> bool {
        let mut worked = false;
        while let Some(done) = backend.done() {
            self.ended(backend, done);
            worked = true;
        }
        // The table has room again; those that waited go first, once each.
        for _ in 0..self.waiting.len() {
            let Some(slot) = self.waiting.pop_front() else {
                break;
            };
            if let Phase::Waiting(work) = self.slots[slot].phase {
                self.begin(backend, slot, work);
                worked = true;
            }
        }
        worked
    }

    pub(super) fn ended(&mut self, backend: &mut impl Backend, done: Done) {
        let slot = done.tag as usize;
        let Some(entry) = self.slots.get(slot) else {
            debug_assert!(false, "no slot {slot}");
            return;
        };
        let phase = entry.phase;
        let len = entry.len;
        self.at_disk -= 1;
        self.loans.settle(slot);
        let asked = matches!(phase, Phase::Probing | Phase::AtDisk(Work::Status { .. }));
        let extents = if asked {
            // Also after an error: the disk keeps the answer until it is taken.
            backend.take_status(done.tag)
        } else {
            Vec::new()
        };
        if self.state == State::Dead {
            return self.release(slot);
        }
        match (phase, done.result) {
            (Phase::Probing, result) => {
                let at = self.slots[slot].subject.offset;
                let zero =
                    result.is_ok() && matches!(&extents[..], [e, ..] if e.zero && e.len >= len);
                if let [first, ..] = &extents[..]
                    && !first.zero
                {
                    self.data = at..at.saturating_add(first.len);
                }
                match u32::try_from(len) {
                    Ok(hole) if zero => {
                        let entry = &mut self.slots[slot];
                        entry.head.hole(self.limits.style, entry.subject, hole);
                        self.replied(slot, 0);
                    }
                    // Also when the probe failed: the read will tell the error.
                    _ => self.begin(backend, slot, Work::Read { whole: true }),
                }
            }
            (Phase::AtDisk(Work::Read { .. }), Ok(())) => {
                let entry = &mut self.slots[slot];
                let payload = len as usize;
                entry.head.data(self.limits.style, entry.subject, payload);
                self.replied(slot, payload);
            }
            (Phase::AtDisk(Work::Status { one }), Ok(())) => {
                self.status(slot, &extents, one);
            }
            (Phase::AtDisk(Work::Trim { fua: true }), Ok(())) => {
                // A request of its own to the disk, which counts both.
                self.slots[slot].seen = Seen {
                    arrived_ns: 0,
                    taken_ns: disk::now_ns(),
                };
                self.begin(backend, slot, Work::Flush);
            }
            (phase, result) => {
                let fast = matches!(phase, Phase::AtDisk(Work::Zero { fast: true, .. }));
                let result = result.map_err(|error| reply::refusal_of(error, fast));
                self.answer(slot, result, false);
                self.replied(slot, 0);
            }
        }
    }

    pub(super) fn status(&mut self, slot: usize, extents: &[StatusExtent], one: bool) {
        let style = self.limits.style;
        let size = reply::descriptor_bytes(style);
        let entry = &mut self.slots[slot];
        let room = &mut self.loans.bytes_mut(slot)[..EXTENTS_MAX * size];
        let count = reply::put_descriptors(style, extents, entry.len, one, room);
        if count == 0 {
            // A disk that has nothing to say of a range that it has.
            let refusal = reply::refusal_of(GuestError::Io, false);
            entry.head.error(style, entry.subject, &refusal);
        } else {
            entry.head.status(style, entry.subject, count);
        }
        self.replied(slot, count * size);
    }

    /// Encodes an answer without data.
    pub(super) fn answer(&mut self, slot: usize, result: Result<(), Refusal>, read: bool) {
        let entry = &mut self.slots[slot];
        entry.phase = Phase::Replied;
        entry.payload = 0;
        let style = self.limits.style;
        match result {
            Ok(()) => entry.head.ok(style, entry.subject, read),
            Err(refusal) => entry.head.error(style, entry.subject, &refusal),
        }
    }

    /// Queues the reply of `slot`, whose head is encoded, with so many bytes of its memory behind the head.
    pub(super) fn replied(&mut self, slot: usize, payload: usize) {
        let entry = &mut self.slots[slot];
        entry.phase = Phase::Replied;
        entry.payload = payload;
        if payload == 0
            && let Some(buffer) = self.loans.take(slot)
        {
            self.pool.give(buffer);
        }
        self.replies.push_back(slot);
    }

    pub(super) fn release(&mut self, slot: usize) {
        self.slots[slot].phase = Phase::Free;
        if let Some(buffer) = self.loans.take(slot) {
            self.pool.give(buffer);
        }
        self.free.push(slot);
    }
}
