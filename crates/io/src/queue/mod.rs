//! From staged operations to steps for the kernel and back: the part that all engines share.
//!
//! ```text
//!   stage ──▶ slots ──group──▶ jobs ──start──▶ ready ──step──▶ the backend ──complete──┐
//!              (one per      (one per merged       ▲                                    │
//!               operation)    run of neighbours)   ├── waits for bounce memory          │
//!                                                  ├── waits at the file's gate         │
//!                                                  └── next step (short transfer, ◀─────┤
//!                                                      next window, retry)              ▼
//!                                                                                   finished
//! ```
//!
//! A *job* is one operation, or several neighbours that became one vectored read or write. It goes to
//! the kernel step by step: one step mostly, more after a short transfer, and under
//! `O_DIRECT`, where memory or range do not fit, window by window through a chunk of bounce
//! memory, reading the blocks at the ends of a misaligned write first (see [`crate::gate`]).
//!
//! All tables are made once, for `capacity` operations; a steady state allocates nothing.
//!
//! When a job of several operations fails, each is tried once more alone, so that an
//! error reaches only the request that it belongs to.

mod bounce;
mod group;
mod job;

use crate::{
    Completion, Counters, File, FileSlot, Io, IoOp, eventfd::Waker, gate::Stripes, memory,
};
use block::{Error, IoVec, Result};
use bounce::BouncePool;
use job::{Held, Job};
use std::{collections::VecDeque, sync::Arc};

/// Files that one engine knows at most.
pub(crate) const FILES_MAX: usize = 1024;

const NONE: u32 = u32::MAX;

/// What a step asks of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepKind {
    Read,
    Write,
    Sync,
    /// `fallocate` and the like: always made by the pool of threads.
    Range(IoOp),
}

/// One system call to make for a job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) kind: StepKind,
    pub(crate) file: u16,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Pieces of memory: they stay in place until the step's completion.
    pub(crate) iov: *const IoVec,
    pub(crate) iov_len: u32,
}

struct OpSlot {
    io: Io,
    /// The next operation of the same job.
    next: u32,
}

/// A file that is attached.
pub(crate) struct Attached {
    pub(crate) file: Arc<File>,
    align: u64,
    memory: usize,
}

/// See the module's documentation.
pub(crate) struct Queue {
    files: Vec<Option<Attached>>,
    slots: Vec<OpSlot>,
    free_slots: Vec<u32>,
    staged: Vec<u32>,
    sort: Vec<group::Key>,
    jobs: Vec<Job>,
    free_jobs: Vec<u32>,
    /// Arrays of pieces that no job uses, kept for the next that merges.
    spare_iovs: Vec<Vec<IoVec>>,
    /// Jobs whose next step is for the engine's own backend.
    pub(crate) ready: VecDeque<u32>,
    /// Jobs whose next step is for the pool of threads.
    pub(crate) ready_ranges: VecDeque<u32>,
    wait_memory: VecDeque<u32>,
    wait_gate: VecDeque<u32>,
    bounce: BouncePool,
    finished: Vec<Completion>,
    /// Steps that the kernel or the pool has.
    pub(crate) running: usize,
    /// Set when the engine is dropped: nothing new starts.
    closing: bool,
    capacity: usize,
    pub(crate) counters: Counters,
}

impl Queue {
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(1, 1 << 16);
        let all = || (0..capacity as u32).rev().collect::<Vec<_>>();
        let empty = Io {
            file: FileSlot(0),
            op: IoOp::Sync,
            offset: 0,
            len: 0,
            iov: std::ptr::null(),
            iov_len: 0,
            token: crate::Token(0),
        };
        Self {
            files: Vec::new(),
            slots: (0..capacity)
                .map(|_| OpSlot {
                    io: empty,
                    next: NONE,
                })
                .collect(),
            free_slots: all(),
            staged: Vec::with_capacity(capacity),
            sort: Vec::with_capacity(capacity),
            jobs: (0..capacity).map(|_| Job::default()).collect(),
            free_jobs: all(),
            spare_iovs: Vec::with_capacity(capacity),
            ready: VecDeque::with_capacity(capacity),
            ready_ranges: VecDeque::with_capacity(capacity),
            wait_memory: VecDeque::with_capacity(capacity),
            wait_gate: VecDeque::with_capacity(capacity),
            bounce: BouncePool::default(),
            finished: Vec::with_capacity(capacity),
            running: 0,
            closing: false,
            capacity,
            counters: Counters::default(),
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Operations staged or running. Those in `finished` are counted until they are handed out.
    pub(crate) fn in_flight(&self) -> usize {
        self.capacity - self.free_slots.len() + self.finished.len()
    }

    pub(crate) fn attach(&mut self, file: &Arc<File>) -> Result<u16> {
        let index = match self.files.iter().position(Option::is_none) {
            Some(index) => index,
            None if self.files.len() < FILES_MAX => {
                self.files.push(None);
                self.files.len() - 1
            }
            None => {
                return Err(Error::invalid(format!(
                    "{}: an engine takes at most {FILES_MAX} files",
                    file.path().display()
                )));
            }
        };
        self.files[index] = Some(Attached {
            file: file.clone(),
            align: u64::from(file.alignment().offset),
            memory: file.alignment().memory as usize,
        });
        Ok(index as u16)
    }

    pub(crate) fn detach(&mut self, slot: u16) {
        if let Some(entry) = self.files.get_mut(usize::from(slot)) {
            *entry = None;
        }
    }

    /// The file in a slot that a staged operation names.
    pub(crate) fn file(&self, slot: u16) -> &Attached {
        self.files
            .get(usize::from(slot))
            .and_then(Option::as_ref)
            .expect("an operation names an attached file")
    }

    /// Takes an operation; `false` when all slots are in use.
    pub(crate) fn stage(&mut self, io: Io) -> bool {
        let Some(slot) = self.free_slots.pop() else {
            return false;
        };
        self.slots[slot as usize] = OpSlot { io, next: NONE };
        self.staged.push(slot);
        self.counters.staged += 1;
        true
    }

    /// Makes jobs of what was staged, and tries again what waits for memory or at a gate.
    pub(crate) fn begin(&mut self) {
        if !self.staged.is_empty() {
            self.group();
        }
        // The first gets memory first; when there is none for it there is none for the others.
        while let Some(job) = self.wait_memory.pop_front() {
            if !self.start(job) && self.wait_memory.back() == Some(&job) {
                self.wait_memory.pop_back();
                self.wait_memory.push_front(job);
                break;
            }
        }
        for _ in 0..self.wait_gate.len() {
            if let Some(job) = self.wait_gate.pop_front() {
                self.start(job);
            }
        }
    }

    /// Before sleeping: has `waker` woken when a gate opens. `true` when nothing could be
    /// started after that, so that sleeping is right.
    pub(crate) fn arm_gates(&mut self, waker: &Arc<Waker>) -> bool {
        if self.wait_gate.is_empty() {
            return true;
        }
        for job in &self.wait_gate {
            let file = self.jobs[*job as usize].file;
            if let Some(gate) = self.file(file).file.gate() {
                gate.wait_with(waker);
            }
        }
        let before = self.wait_gate.len();
        self.begin();
        self.wait_gate.len() == before
    }

    /// Whether completions wait to be handed out.
    pub(crate) fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Hands out completions.
    pub(crate) fn drain(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.finished);
    }

    /// Nothing new starts from now on; gates are left by all that is not in the kernel.
    pub(crate) fn close(&mut self) {
        self.closing = true;
        self.staged.clear();
        for list in [
            std::mem::take(&mut self.ready),
            std::mem::take(&mut self.ready_ranges),
            std::mem::take(&mut self.wait_memory),
            std::mem::take(&mut self.wait_gate),
        ] {
            for job in list {
                self.release(job);
            }
        }
    }

    /// Ends an operation that never became a job.
    fn finish_slot(&mut self, slot: u32, errno: i32, zeroed: bool) {
        self.finished.push(Completion {
            token: self.slots[slot as usize].io.token,
            errno,
            zeroed,
        });
        self.free_slots.push(slot);
    }

    /// Lets go of a job's bounce memory and gate.
    fn release(&mut self, index: u32) {
        let job = &mut self.jobs[index as usize];
        if job.chunk != NONE {
            self.bounce.give(job.chunk);
            job.chunk = NONE;
        }
        let held = std::mem::replace(&mut job.held, Held::None);
        if matches!(held, Held::None) {
            return;
        }
        let (file, set) = (job.file, job.stripes);
        if let Some(gate) = self.file(file).file.gate() {
            match held {
                Held::None => {}
                Held::Shared => gate.leave_shared(&set),
                Held::Claim(claim) => gate.leave_exclusive(&set, &claim),
            }
        }
    }
}

/// The pieces of an operation's memory.
fn op_pieces(io: &Io) -> &[IoVec] {
    // SAFETY: `Engine::stage` makes the caller keep the array until the completion, and the slot's
    // operation is looked at only before that.
    unsafe { memory::pieces(io.iov, io.iov_len) }
}

fn stripes_of_blocks(offset: u64, len: u64, align: u64) -> Stripes {
    let start = block::align_down(offset, align);
    let end = block::align_up(offset + len, align);
    Stripes::of(start, end - start)
}
