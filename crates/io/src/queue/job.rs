//! The life of a job: start, steps, completion.

use super::{NONE, Queue, Step, StepKind, bounce::CHUNK, op_pieces, stripes_of_blocks};
use crate::{
    IoOp,
    gate::{Claim, Stripes},
    memory,
    sys::IOV_MAX,
};
use block::{IoVec, align_down, align_up, clip};

/// Room in a new array of pieces.
const IOV_SPARE: usize = 128;

/// How often in a row a step may end with `EAGAIN` or `EINTR` before that counts as a failure.
const RETRIES_MAX: u32 = 10_000;

/// Which step a job is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// Everything at once, with the caller's memory (or none).
    #[default]
    Whole,
    /// A window into the chunk.
    BounceRead,
    /// The block that a misaligned write begins in, into the chunk.
    BounceHead,
    /// The block that it ends in.
    BounceTail,
    /// A window out of the chunk.
    BounceWrite,
}

/// A job's stay in the gate of its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Held {
    #[default]
    None,
    Shared,
    /// Exclusive, or on the way to it.
    Claim(Claim),
}

/// See the module's documentation.
pub(super) struct Job {
    pub(super) file: u16,
    pub(super) op: IoOp,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Bytes transferred, from `offset` on.
    pub(super) done: u64,
    /// The first of its operations; the others follow through `next`.
    pub(super) first: u32,
    pub(super) count: u32,
    /// Goes through a chunk.
    pub(super) bounce: bool,
    /// Its step is for the pool of threads.
    pub(super) range_step: bool,
    pub(super) phase: Phase,
    pub(super) held: Held,
    pub(super) stripes: Stripes,
    pub(super) chunk: u32,
    pub(super) retries: u32,
    /// Pieces, when they are not simply those of the one operation.
    pub(super) iov: Vec<IoVec>,
    pub(super) own_iov: bool,
    /// The piece of the chunk that a bounce step uses. The table of jobs never moves.
    pub(super) piece: IoVec,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            file: 0,
            op: IoOp::Sync,
            offset: 0,
            len: 0,
            done: 0,
            first: NONE,
            count: 0,
            bounce: false,
            range_step: false,
            phase: Phase::Whole,
            held: Held::None,
            stripes: Stripes::of(0, 1),
            chunk: NONE,
            retries: 0,
            iov: Vec::new(),
            own_iov: false,
            piece: IoVec::new(std::ptr::null_mut(), 0),
        }
    }
}

impl Job {
    /// The window at the job's position: its first byte and its length, in whole blocks.
    fn window(&self, align: u64) -> (u64, usize) {
        let start = align_down(self.offset + self.done, align);
        let end = align_up(self.offset + self.len, align);
        (start, (end - start).min(CHUNK as u64) as usize)
    }
}

impl Queue {
    /// Gets a job what it needs and makes it ready. `false` when it waits for that.
    pub(super) fn start(&mut self, index: u32) -> bool {
        if self.closing {
            return true;
        }
        let job = &self.jobs[index as usize];
        let (file, op, bounce) = (job.file, job.op, job.bounce);
        let align = self.file(file).align;
        // Memory before the gate: who holds the gate never waits for those who hold memory.
        if bounce && self.jobs[index as usize].chunk == NONE {
            match self.bounce.take() {
                Some(chunk) => self.jobs[index as usize].chunk = chunk,
                None => {
                    self.wait_memory.push_back(index);
                    return false;
                }
            }
        }
        let changes = !matches!(op, IoOp::Read | IoOp::Sync);
        if changes && align > 1 && !self.enter_gate(index, align) {
            self.wait_gate.push_back(index);
            return false;
        }
        let job = &mut self.jobs[index as usize];
        if bounce {
            self.open_window(index, align);
        } else if job.range_step {
            self.ready_ranges.push_back(index);
        } else {
            self.ready.push_back(index);
        }
        true
    }

    fn enter_gate(&mut self, index: u32, align: u64) -> bool {
        let job = &self.jobs[index as usize];
        let (mut held, mut set) = (job.held, job.stripes);
        let Some(gate) = self.file(job.file).file.gate() else {
            return true;
        };
        if held == Held::None {
            set = stripes_of_blocks(job.offset, job.len, align);
        }
        let misaligned = (job.offset | job.len) & (align - 1) != 0;
        let entered = if misaligned {
            let mut claim = match held {
                Held::Claim(claim) => claim,
                _ => Claim::default(),
            };
            let entered = gate.try_exclusive(&set, &mut claim);
            held = Held::Claim(claim);
            entered
        } else if held == Held::None && gate.try_shared(&set) {
            held = Held::Shared;
            true
        } else {
            held == Held::Shared
        };
        let job = &mut self.jobs[index as usize];
        (job.held, job.stripes) = (held, set);
        entered
    }

    /// Makes the first step of the next window of a bounced job ready.
    fn open_window(&mut self, index: u32, align: u64) {
        let job = &self.jobs[index as usize];
        let (start, window) = job.window(align);
        let at = job.offset + job.done;
        let end = job.offset + job.len;
        let phase = match job.op {
            IoOp::Read => Phase::BounceRead,
            _ if at != start => Phase::BounceHead,
            _ if end < start + window as u64 => Phase::BounceTail,
            _ => Phase::BounceWrite,
        };
        self.enter_phase(index, phase, align);
    }

    fn enter_phase(&mut self, index: u32, phase: Phase, align: u64) {
        if phase == Phase::BounceWrite {
            self.fill_window(index, align);
        }
        let job = &self.jobs[index as usize];
        let (_, window) = job.window(align);
        let (from, len) = match phase {
            Phase::BounceHead => (0, align as usize),
            Phase::BounceTail => (window - align as usize, align as usize),
            _ => (0, window),
        };
        let base = self.bounce.at(job.chunk, from);
        let job = &mut self.jobs[index as usize];
        job.phase = phase;
        job.piece = IoVec::new(base, len);
        self.ready.push_back(index);
    }

    /// Copies the operations' bytes into the window in the chunk.
    fn fill_window(&mut self, index: u32, align: u64) {
        let job = &self.jobs[index as usize];
        let (start, window) = job.window(align);
        let skip = (job.offset + job.done - start) as usize;
        let len = ((window - skip) as u64).min(job.len - job.done) as usize;
        let base = self.bounce.at(job.chunk, skip);
        self.each_part(index, len as u64, |io, from, len, done| {
            // SAFETY: the operation's memory is valid until its completion; the chunk is ours and
            // has room for the window.
            unsafe {
                memory::gather(op_pieces(io), from, base.wrapping_add(done), len);
            }
        });
    }

    /// Calls `f(operation, its first byte, bytes, bytes before)` for the next `len` bytes of the job.
    fn each_part(&self, index: u32, len: u64, mut f: impl FnMut(&crate::Io, u64, usize, usize)) {
        let job = &self.jobs[index as usize];
        let (mut skip, mut left, mut done) = (job.done, len, 0u64);
        let mut slot = job.first;
        while slot != NONE && left > 0 {
            let op = &self.slots[slot as usize];
            if skip < op.io.len {
                let n = left.min(op.io.len - skip);
                f(&op.io, skip, n as usize, done as usize);
                (left, done, skip) = (left - n, done + n, 0);
            } else {
                skip -= op.io.len;
            }
            slot = op.next;
        }
    }

    /// Makes the job's own array of pieces, of what is still to be transferred.
    pub(super) fn rebuild_iov(&mut self, index: u32) {
        let mut iov = std::mem::take(&mut self.jobs[index as usize].iov);
        if iov.capacity() == 0 {
            iov = self
                .spare_iovs
                .pop()
                .unwrap_or_else(|| Vec::with_capacity(IOV_SPARE));
        }
        iov.clear();
        let left = self.jobs[index as usize].len - self.jobs[index as usize].done;
        self.each_part(index, left, |io, from, len, _| {
            clip(op_pieces(io), from, len as u64, &mut iov);
        });
        let job = &mut self.jobs[index as usize];
        job.iov = iov;
        job.own_iov = true;
    }

    /// What to ask of the kernel for a job that is ready.
    pub(crate) fn step(&self, index: u32) -> Step {
        let job = &self.jobs[index as usize];
        let align = self.file(job.file).align;
        let (kind, offset, len, iov, iov_len) = match job.phase {
            Phase::Whole => {
                let kind = match job.op {
                    IoOp::Read => StepKind::Read,
                    IoOp::Write => StepKind::Write,
                    IoOp::Sync => StepKind::Sync,
                    op => StepKind::Range(op),
                };
                let (iov, n) = if job.own_iov {
                    (job.iov.as_ptr(), job.iov.len() as u32)
                } else {
                    let io = &self.slots[job.first as usize].io;
                    (io.iov, io.iov_len)
                };
                (
                    kind,
                    job.offset + job.done,
                    job.len - job.done,
                    iov,
                    n.min(IOV_MAX as u32),
                )
            }
            phase => {
                let (start, window) = job.window(align);
                let offset = match phase {
                    Phase::BounceTail => start + window as u64 - align,
                    _ => start,
                };
                let kind = if phase == Phase::BounceWrite {
                    StepKind::Write
                } else {
                    StepKind::Read
                };
                (
                    kind,
                    offset,
                    job.piece.len() as u64,
                    &raw const job.piece,
                    1,
                )
            }
        };
        Step {
            kind,
            file: job.file,
            offset,
            len,
            iov,
            iov_len,
        }
    }

    /// A job's step was given to the kernel or the pool.
    pub(crate) fn issued(&mut self) {
        self.running += 1;
        self.counters.issued += 1;
    }

    /// A step that was issued ended: bytes transferred, or minus the errno.
    pub(crate) fn complete(&mut self, index: u32, result: i32, zeroed: bool) {
        self.running -= 1;
        if self.closing {
            self.release(index);
            return;
        }
        if result < 0 {
            return self.failed(index, -result);
        }
        let job = &mut self.jobs[index as usize];
        job.retries = 0;
        let n = result as u64;
        let align = self.file(self.jobs[index as usize].file).align;
        match self.jobs[index as usize].phase {
            Phase::Whole => self.whole_done(index, n, zeroed, align),
            Phase::BounceRead => self.read_done(index, n, align),
            Phase::BounceHead => {
                let job = &self.jobs[index as usize];
                let (start, window) = job.window(align);
                // One block that is both ends is read once.
                let tail = job.offset + job.len < start + window as u64 && window as u64 > align;
                let chunk = job.chunk;
                self.bounce.fill_zero(chunk, n as usize, align as usize);
                let next = if tail {
                    Phase::BounceTail
                } else {
                    Phase::BounceWrite
                };
                self.enter_phase(index, next, align);
            }
            Phase::BounceTail => {
                let job = &self.jobs[index as usize];
                let (_, window) = job.window(align);
                let from = window - align as usize + n as usize;
                let chunk = job.chunk;
                self.bounce.fill_zero(chunk, from, window);
                self.enter_phase(index, Phase::BounceWrite, align);
            }
            Phase::BounceWrite => {
                if n == 0 || n & (align - 1) != 0 {
                    return self.finish(index, libc::EIO, false);
                }
                self.advance(index, n, align);
            }
        }
    }

    fn failed(&mut self, index: u32, errno: i32) {
        let job = &mut self.jobs[index as usize];
        if matches!(errno, libc::EAGAIN | libc::EINTR) && job.retries < RETRIES_MAX {
            job.retries += 1;
            if job.range_step {
                self.ready_ranges.push_back(index);
            } else {
                self.ready.push_back(index);
            }
            return;
        }
        if job.op == IoOp::Sync {
            let file = job.file;
            self.file(file).file.note_sync_failure(errno);
        }
        self.finish(index, errno, false);
    }

    fn whole_done(&mut self, index: u32, n: u64, zeroed: bool, align: u64) {
        let job = &mut self.jobs[index as usize];
        if !matches!(job.op, IoOp::Read | IoOp::Write) {
            return self.finish(index, 0, zeroed);
        }
        job.done = (job.done + n).min(job.len);
        if job.done == job.len {
            return self.finish(index, 0, false);
        }
        let stuck = n == 0 || job.done & (align - 1) != 0;
        match job.op {
            IoOp::Read if stuck => {
                self.zero_rest(index);
                self.finish(index, 0, false);
            }
            // A direct write that stops inside a block cannot be continued; it does not
            // happen but on a device that breaks.
            _ if stuck => self.finish(index, libc::EIO, false),
            _ => {
                self.rebuild_iov(index);
                self.ready.push_back(index);
            }
        }
    }

    fn read_done(&mut self, index: u32, n: u64, align: u64) {
        let job = &self.jobs[index as usize];
        let (start, window) = job.window(align);
        let skip = job.offset + job.done - start;
        let there = n
            .min(window as u64)
            .saturating_sub(skip)
            .min(job.len - job.done);
        let base = self.bounce.at(job.chunk, skip as usize);
        self.each_part(index, there, |io, from, len, done| {
            // SAFETY: the operation's memory is valid and lent to us until its completion; the
            // chunk is ours and holds `n` bytes.
            unsafe {
                memory::scatter(op_pieces(io), from, base.wrapping_add(done), len);
            }
        });
        if n == 0 || n & (align - 1) != 0 {
            self.jobs[index as usize].done += there;
            self.zero_rest(index);
            return self.finish(index, 0, false);
        }
        self.advance(index, n, align);
    }

    /// `n` bytes of the window are done.
    fn advance(&mut self, index: u32, n: u64, align: u64) {
        let job = &mut self.jobs[index as usize];
        let (start, _) = job.window(align);
        job.done = (start + n).min(job.offset + job.len) - job.offset;
        if job.done == job.len {
            self.finish(index, 0, false);
        } else {
            self.open_window(index, align);
        }
    }

    /// The file ends: the rest of a read is zeros.
    fn zero_rest(&mut self, index: u32) {
        let left = self.jobs[index as usize].len - self.jobs[index as usize].done;
        self.each_part(index, left, |io, from, len, _| {
            // SAFETY: the operation's memory is valid and lent to us until its completion.
            unsafe {
                memory::zero(op_pieces(io), from, len);
            }
        });
    }

    fn finish(&mut self, index: u32, errno: i32, zeroed: bool) {
        self.release(index);
        self.free_jobs.push(index);
        let iov = std::mem::take(&mut self.jobs[index as usize].iov);
        if iov.capacity() > 0 {
            self.spare_iovs.push(iov);
        }
        let (mut slot, count, bounce) = {
            let job = &self.jobs[index as usize];
            (job.first, job.count, job.bounce)
        };
        while slot != NONE {
            let next = self.slots[slot as usize].next;
            if errno != 0 && count > 1 {
                // Each alone: see the module's documentation.
                self.create(std::iter::once(slot), bounce);
            } else {
                self.finish_slot(slot, errno, zeroed);
            }
            slot = next;
        }
    }
}
