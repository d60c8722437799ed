//! One thread's entrance to a disk: the request table and its turn.
//!
//! ```text
//!   submit ─▶ drive: ask the format ─▶ engine operations (sub.rs)
//!                     │ Need: load or reserve, then ask again
//!                     │ Wait: park until the key's owner wakes us (wait.rs)
//!   completed ─▶ count down ─▶ durable? join a commit (flush.rs) ─▶ done
//! ```
//!
//! All state is in tables made at attach; in the steady state nothing is allocated, and no lock
//! is taken but for what other queues really share: allocations, misses and commits.

use crate::{
    buffers::Buffers,
    chain::Layer,
    clock::now_ns,
    crypt,
    disk::Disk,
    fill::FillOp,
    flush::Committer,
    grace::Member,
    habit::Habit,
    memory::Pieces,
    packed::Kept,
    request::{Done, Owner, Request, Slot, State, StatusExtent, TableFull, Task},
    stats::{Ended, QueueStats},
    sub::{Purpose, Sub},
    wait::{Mailbox, Message, SlotId},
};
use block::{Error, GuestError, GuestOffset, Op, Result, limits};
use image::Freed;
use io::{Engine, FileSlot, Io, Waker};
use probe::probe;
use std::{collections::VecDeque, sync::Arc};
use trace::{Operation, Stamps};

/// How a queue is made.
#[derive(Clone, Debug)]
pub struct QueueOptions {
    /// Requests that it takes at a time, 1 to [`limits::QUEUE_DEPTH_MAX`].
    pub depth: u16,
    /// Upper 32 bits of its operations' tokens, so that their completions find it.
    pub token_base: u64,
    /// Wakes the thread that owns it.
    pub waker: Arc<Waker>,
}

/// Copy-on-write fills and other allocations that a queue has under way at most.
const FILLS_MAX: usize = 64;

/// What asking the format led to.
pub(crate) enum Next {
    /// Progress: ask for the rest.
    Continue,
    /// The slot's state says what it waits for.
    Blocked,
    /// It failed.
    Fail(GuestError),
}

/// A disk as one thread sees it. Never used by two threads; its `Disk` is.
#[derive(Debug)]
pub struct DiskQueue {
    pub(crate) disk: Arc<Disk>,
    pub(crate) token_base: u64,
    /// The engine's names for the files, by layer and file.
    pub(crate) files: Vec<Vec<FileSlot>>,
    pub(crate) slots: Box<[Slot]>,
    guest_free: Vec<u32>,
    /// Slots of fills: two for each fill, taken with it.
    pub(crate) inner_free: Vec<u32>,
    pub(crate) subs: Box<[Sub]>,
    pub(crate) subs_free: Vec<u32>,
    pub(crate) unstaged: VecDeque<u32>,
    pub(crate) fills: Box<[FillOp]>,
    pub(crate) fills_free: Vec<u32>,
    pub(crate) fills_in_use: usize,
    /// Bytes of the allocations under way.
    pub(crate) fill_bytes: u64,
    /// Fills begun since the last advance.
    pub(crate) fills_new: Vec<u32>,
    /// Allocations to come that are left open to the end of their turn.
    pub(crate) patience: u32,
    /// Fills that requests may join, oldest first.
    pub(crate) fills_open: Vec<u32>,
    /// Fills whose gaps have been read and that must be written.
    pub(crate) fills_read: VecDeque<u32>,
    pub(crate) buffers: Buffers,
    /// Which images' data are encrypted, by layer.
    pub(crate) encrypted: Box<[bool]>,
    /// Bytes of ciphertext in buffers of in-place reads and writes.
    pub(crate) crypt_bytes: u64,
    /// Bytes of compressed clusters that are being read.
    pub(crate) packed_bytes: u64,
    /// The compressed cluster that was unpacked last.
    pub(crate) kept: Option<Kept>,
    pub(crate) stalled: VecDeque<u32>,
    done: VecDeque<Done>,
    status_done: Vec<(u64, Vec<StatusExtent>)>,
    pub(crate) mailbox: Arc<Mailbox>,
    messages: Vec<Message>,
    /// Guest requests in flight.
    in_flight: usize,
    pub(crate) leads: bool,
    pub(crate) habit: Habit,
    pub(crate) committer: Option<Committer>,
    /// Freed space that waits for its epoch to pass, oldest first.
    pub(crate) retired: VecDeque<(u64, Freed)>,
    pub(crate) freed: Vec<Freed>,
    pub(crate) punches: usize,
    /// Reservations and writes of zeros under way, for which no request waits.
    pub(crate) unasked: usize,
    /// A request was submitted since it was asked what will be needed soon.
    pub(crate) came: bool,
    epochs: Member,
    pub(crate) stats: Arc<QueueStats>,
    /// Requests submitted since the last advance: they go to the engine with the next turn.
    batch: Vec<SlotId>,
    /// Requests that ended since the submitter's clients were last told.
    ended: Vec<Ended>,
    /// The clock as last read, and whether it must be read again.
    clock_ns: u64,
    clock_stale: bool,
    /// When the last request was mapped that did not end at once.
    mapped_ns: u64,
    errors_logged: u32,
}

impl DiskQueue {
    /// Joins `disk` on the thread that owns `engine`.
    pub fn attach(
        disk: &Arc<Disk>,
        engine: &mut dyn Engine,
        options: QueueOptions,
    ) -> Result<DiskQueue> {
        let depth = usize::from(options.depth);
        if depth == 0 || options.depth > limits::QUEUE_DEPTH_MAX {
            return Err(Error::invalid(format!(
                "a queue of {depth} requests: 1 to {} are possible",
                limits::QUEUE_DEPTH_MAX
            )));
        }
        let mut files: Vec<Vec<FileSlot>> = Vec::with_capacity(disk.layers.len());
        for layer in &disk.layers {
            let mut slots = Vec::with_capacity(layer.files.len());
            for file in &layer.files {
                match engine.attach(file) {
                    Ok(slot) => slots.push(slot),
                    Err(error) => {
                        for slot in files.iter().flatten().chain(&slots) {
                            engine.detach(*slot);
                        }
                        return Err(error);
                    }
                }
            }
            files.push(slots);
        }
        let is_encrypted = |layer: &Layer| layer.image.encryption().is_some();
        let encrypted: Box<[bool]> = disk.layers.iter().map(is_encrypted).collect();
        let inner = FILLS_MAX * 2;
        let slots = depth + inner;
        let subs = depth * 2 + 64 + FILLS_MAX;
        Ok(DiskQueue {
            token_base: options.token_base,
            files,
            slots: (0..slots).map(|_| Slot::new()).collect(),
            guest_free: (0..depth as u32).rev().collect(),
            inner_free: (depth as u32..slots as u32).rev().collect(),
            subs: (0..subs).map(|_| Sub::new()).collect(),
            subs_free: (0..subs as u32).rev().collect(),
            unstaged: VecDeque::with_capacity(subs),
            fills: (0..FILLS_MAX).map(|_| FillOp::new()).collect(),
            fills_free: (0..FILLS_MAX as u32).rev().collect(),
            fills_in_use: 0,
            fill_bytes: 0,
            fills_new: Vec::with_capacity(FILLS_MAX),
            patience: 0,
            fills_open: Vec::with_capacity(FILLS_MAX),
            fills_read: VecDeque::with_capacity(FILLS_MAX),
            buffers: Buffers::new(match encrypted.contains(&true) {
                false => 0,
                true => crypt::KEPT_BYTES,
            }),
            encrypted,
            crypt_bytes: 0,
            packed_bytes: 0,
            kept: None,
            stalled: VecDeque::with_capacity(slots),
            done: VecDeque::with_capacity(depth),
            status_done: Vec::new(),
            mailbox: Arc::new(Mailbox::new(options.waker, slots * 2)),
            messages: Vec::with_capacity(slots * 2),
            in_flight: 0,
            leads: false,
            habit: Habit::default(),
            committer: None,
            retired: disk
                .orphans
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .drain(..)
                .collect(),
            freed: Vec::new(),
            punches: 0,
            unasked: 0,
            came: false,
            epochs: disk.epochs.join(),
            stats: disk.new_stats(),
            batch: Vec::with_capacity(depth),
            ended: Vec::with_capacity(depth),
            clock_ns: 0,
            clock_stale: true,
            mapped_ns: 0,
            errors_logged: 0,
            disk: disk.clone(),
        })
    }

    /// The disk that it belongs to.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Guest requests that were accepted and whose `Done` was not taken yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Guest requests that have not ended.
    pub(crate) fn guest_in_flight(&self) -> usize {
        self.slots.len() - FILLS_MAX * 2 - self.guest_free.len()
    }

    /// Whether the queue has work of its own (commits, space being returned) at the
    /// engine: it must not be detached before that ended.
    pub fn is_busy(&self) -> bool {
        self.in_flight > 0
            || self.leads
            || self.committer.is_some()
            || self.punches + self.unasked > 0
    }

    /// Whether a commit or a fill waits for the next [`Self::advance`]: to be called before the thread
    /// sleeps.
    pub fn must_advance(&self) -> bool {
        self.leads && self.committer.is_none() || self.fills_wait()
    }

    /// Leaves the disk.
    ///
    /// # Panics
    ///
    /// When the queue [is busy](Self::is_busy): operations of it would then complete to nobody.
    pub fn detach(mut self, engine: &mut dyn Engine) {
        assert!(!self.is_busy(), "a busy queue is not detached");
        self.notified(None);
        for slot in std::mem::take(&mut self.files).into_iter().flatten() {
            engine.detach(slot);
        }
        self.disk.epochs.leave(&self.epochs);
        self.disk.end_stats(&self.stats);
        self.disk
            .orphans
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .extend(self.retired.drain(..));
    }

    /// Takes a request. What cannot be done at all (a range outside the disk, a write to a read-only
    /// one) is accepted and ends with its error. `Err` gives it back when the table is
    /// full: submit it again after a `Done`.
    ///
    /// # Safety
    ///
    /// The array of pieces and the memory that they describe must stay valid until the request's
    /// [`Done`] was taken; for reads nobody else may borrow that memory meanwhile.
    pub unsafe fn submit(
        &mut self,
        engine: &mut dyn Engine,
        request: Request,
    ) -> Result<(), Request> {
        let Some(index) = self.take_slot(Task::Op(request.op), request.at, request.len) else {
            return Err(request);
        };
        self.habit.came(request.op == Op::Flush);
        self.came = true;
        let checked = self.check(&request);
        let durable = match request.op {
            Op::Write { fua } | Op::WriteZeroes { fua, .. } => fua || !self.disk.writeback(),
            _ => false,
        };
        let slot = &mut self.slots[index as usize];
        slot.tag = request.tag;
        slot.iov = Pieces::new(request.iov, request.iov_len);
        slot.durable = durable;
        slot.stamps = Stamps {
            arrived: request.arrived_ns,
            taken: request.seen_ns,
            parsed: request.parsed_ns,
            ..Stamps::default()
        };
        slot.error = checked.err();
        let key = self.stats.key();
        probe!(diskplane, taken, key, request.tag, request.seen_ns);
        let operation = Operation::from(request.op) as u64;
        probe!(
            diskplane,
            parsed,
            key,
            request.tag,
            operation,
            request.at.0,
            request.len
        );
        let id = slot.id(index);
        self.start(engine, index);
        let slot = &mut self.slots[index as usize];
        // What ended at once was mapped when it ended, and needs no look at the clock.
        if slot.generation == id.generation {
            // Read anew for each: mapping is what differs between requests of a batch.
            self.mapped_ns = now_ns();
            slot.stamps.mapped = self.mapped_ns;
            probe!(diskplane, mapped, key, slot.tag);
            self.batch.push(id);
        }
        self.start_early(engine);
        Ok(())
    }

    /// A request at `at`, any number, will be submitted in a moment, or not: a hint to have the processor fetch what it will
    /// be mapped with.
    #[inline]
    pub fn expect(&self, at: GuestOffset) {
        if let Some(active) = self.disk.layers.first() {
            active.image.expect(at);
        }
    }

    /// Asks what the range holds: at most `extents_max` runs from `at` on. Ends with a `Done`
    /// of `tag`; then [`Self::take_status`] has the answer. `Err` when the table is full.
    pub fn block_status(
        &mut self,
        engine: &mut dyn Engine,
        at: GuestOffset,
        len: u64,
        extents_max: usize,
        tag: u64,
    ) -> Result<(), TableFull> {
        let task = Task::Status { extents_max };
        let index = self.take_slot(task, at, len).ok_or(TableFull)?;
        let inside = at
            .checked_add(len)
            .is_some_and(|end| end.0 <= self.disk.size());
        let slot = &mut self.slots[index as usize];
        slot.tag = tag;
        slot.iov = Pieces::NONE;
        slot.durable = false;
        slot.stamps = Stamps::default();
        slot.error = (!inside || extents_max == 0).then_some(GuestError::Invalid);
        self.start(engine, index);
        Ok(())
    }

    /// The answer to the status query of `tag`, after its `Done`.
    pub fn take_status(&mut self, tag: u64) -> Vec<StatusExtent> {
        match self.status_done.iter().position(|(t, _)| *t == tag) {
            Some(index) => self.status_done.swap_remove(index).1,
            None => Vec::new(),
        }
    }

    fn take_slot(&mut self, task: Task, at: GuestOffset, len: u64) -> Option<u32> {
        let index = self.guest_free.pop()?;
        self.in_flight += 1;
        self.begin(index, Owner::Guest, task, at, len);
        Some(index)
    }

    /// Starts a slot's new life.
    pub(crate) fn begin(
        &mut self,
        index: u32,
        owner: Owner,
        task: Task,
        at: GuestOffset,
        len: u64,
    ) {
        let epoch = self.epochs.enter(&self.disk.epochs);
        let slot = &mut self.slots[index as usize];
        slot.state = State::Running;
        slot.owner = owner;
        slot.task = task;
        slot.at = at;
        slot.len = len;
        slot.pos = 0;
        slot.zeros_until = 0;
        slot.pending = 0;
        slot.error = None;
        slot.durable = false;
        slot.registered = None;
        slot.refused = u64::MAX;
        slot.all_zero = true;
        slot.epoch = epoch;
    }

    fn check(&self, request: &Request) -> Result<(), GuestError> {
        if request.op.is_write() && self.disk.read_only() {
            return Err(GuestError::ReadOnly);
        }
        let end = request.at.checked_add(request.len);
        if end.is_none_or(|end| end.0 > self.disk.size()) {
            return Err(GuestError::Invalid);
        }
        if matches!(request.op, Op::Write { .. } | Op::WriteZeroes { .. })
            && self.is_encrypted(0)
            && !(request.at.0 | request.len).is_multiple_of(crypt::SECTOR)
        {
            return Err(GuestError::Invalid);
        }
        if request.op.has_data() {
            let pieces = Pieces::new(request.iov, request.iov_len);
            if request.len > limits::REQUEST_BYTES_MAX
                || pieces.get().len() > limits::REQUEST_SEGMENTS_MAX
                || block::total_len(pieces.get()) != request.len
            {
                return Err(GuestError::Invalid);
            }
        }
        Ok(())
    }

    /// The end of a request, if one is there. Its slot and memory are the submitter's again.
    pub fn done(&mut self) -> Option<Done> {
        let done = self.done.pop_front()?;
        self.in_flight -= 1;
        Some(done)
    }

    /// The rest of a turn: messages from other threads, requests that waited for room, the commit
    /// that this queue leads. Call once after all submits and completions of a turn.
    pub fn advance(&mut self, engine: &mut dyn Engine) {
        self.clock_stale = true;
        if self.ended.len() >= self.slots.len() {
            // A submitter that does not say when it tells its clients.
            self.notified(None);
        }
        if !self.unstaged.is_empty() {
            self.restage(engine);
        }
        // A commit that ends at once (nothing to write, no file to sync) leaves messages to
        // ourselves, and what they wake may lead the next commit.
        const ROUNDS_MAX: usize = 64;
        self.look_ahead(engine);
        for round in 0.. {
            self.read_mail(engine);
            self.advance_fills(engine);
            // The commit first: requests after requests would leave no room for it.
            self.pump_commit(engine);
            for _ in 0..self.stalled.len() {
                if !self.has_sub() || self.commit_lacks_room() {
                    break;
                }
                if let Some(index) = self.stalled.pop_front() {
                    self.drive(engine, index);
                }
            }
            self.advance_commit(engine);
            // A stalled request may have begun a fill, or a stalled read of one ended at once.
            if !self.mailbox.is_filled() && !self.must_advance() {
                break;
            }
            if round == ROUNDS_MAX {
                self.mailbox.wake_owner();
                break;
            }
        }
        self.epochs.rest();
        self.advance_retired(engine);
        if !self.batch.is_empty() {
            let (now, key) = (self.now(), self.stats.key());
            for id in self.batch.drain(..) {
                let slot = &mut self.slots[id.index as usize];
                if slot.generation == id.generation {
                    slot.stamps.submitted = now;
                    probe!(diskplane, submitted, key, slot.tag);
                }
            }
        }
        // What ends next ends after the engine's turn.
        self.clock_stale = true;
    }

    /// Names the queue for those who look at its requests: said once, by its export.
    pub fn set_name(&self, name: String) {
        self.stats.set_name(name);
    }

    /// Whether stages of requests are noted one by one: a submitter that has to ask the clock for them need not
    /// otherwise.
    pub fn traces(&self) -> bool {
        self.stats.traces()
    }

    /// When the last request that did not end at once had been mapped; nanoseconds of [`crate::now_ns`]. What comes after
    /// it in its batch waited in the ring until then.
    pub fn mapped_ns(&self) -> u64 {
        self.mapped_ns
    }

    /// Whether requests ended since the last [`Self::notified`].
    pub fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// The submitter has told its clients of every `Done` that it took: the answers were where they look for them at
    /// `told_ns` (nanoseconds of [`crate::now_ns`]; `None`: now), and whoever had to be woken is.
    pub fn notified(&mut self, told_ns: Option<u64>) {
        if self.ended.is_empty() {
            return;
        }
        let now = now_ns();
        let told = told_ns.unwrap_or(now);
        for ended in self.ended.drain(..) {
            self.stats.ended(&ended, told, now);
        }
    }

    fn read_mail(&mut self, engine: &mut dyn Engine) {
        if !self.mailbox.is_filled() {
            return;
        }
        let mut messages = std::mem::take(&mut self.messages);
        self.mailbox.take(&mut messages);
        for message in messages.drain(..) {
            match message {
                Message::Ask(id) => {
                    if self.is_current(id) {
                        let slot = &mut self.slots[id.index as usize];
                        // Also where it found other work meanwhile: it is on nobody's list now.
                        slot.registered = None;
                        if slot.state == State::Parked {
                            self.drive(engine, id.index);
                        }
                    }
                }
                Message::Committed(id, result) => {
                    if self.is_current(id) {
                        self.committed(engine, id.index, result);
                    }
                }
            }
        }
        self.messages = messages;
    }

    fn is_current(&self, id: SlotId) -> bool {
        let slot = &self.slots[id.index as usize];
        slot.generation == id.generation && slot.state != State::Free
    }

    /// Begins the work on a guest's request, behind those that wait for room already.
    fn start(&mut self, engine: &mut dyn Engine, index: u32) {
        let slot = &self.slots[index as usize];
        let waits = !self.stalled.is_empty() || self.commit_lacks_room();
        if waits && slot.len > 0 && slot.error.is_none() {
            self.stall(index);
        } else {
            self.drive(engine, index);
        }
    }

    /// Works on a request until nothing more can be done for it now.
    pub(crate) fn drive(&mut self, engine: &mut dyn Engine, index: u32) {
        self.slots[index as usize].state = State::Running;
        loop {
            let slot = &self.slots[index as usize];
            if slot.error.is_some() || slot.pos >= slot.len {
                break;
            }
            let next = match slot.task {
                Task::Op(Op::Read) => self.step_read(engine, index),
                Task::Op(Op::Write { .. }) => self.step_write(engine, index),
                Task::Op(Op::Discard | Op::WriteZeroes { .. }) => self.step_zero(engine, index),
                Task::Op(Op::Flush) => break,
                Task::Status { extents_max } => self.step_status(engine, index, extents_max),
            };
            match next {
                Next::Continue => {}
                Next::Blocked => return,
                Next::Fail(error) => {
                    self.slots[index as usize].error.get_or_insert(error);
                    break;
                }
            }
        }
        self.settle(index);
    }

    /// An operation or allocation of a request ended.
    pub(crate) fn part_ended(&mut self, index: u32, error: Option<GuestError>) {
        let now = self.now();
        let slot = &mut self.slots[index as usize];
        slot.pending -= 1;
        slot.stamps.device_done = now;
        if let Some(error) = error {
            slot.error.get_or_insert(error);
        }
        if slot.state == State::Running && slot.pending == 0 {
            probe!(diskplane, device_done, self.stats.key(), slot.tag);
            self.settle(index);
        }
    }

    /// A load or reservation that a request waited for ended.
    pub(crate) fn metadata_ended(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        error: Option<GuestError>,
    ) {
        if let Some(error) = error {
            self.slots[index as usize].error.get_or_insert(error);
        }
        self.drive(engine, index);
    }

    /// Ends a request on which nothing is under way any more, after a commit where it must be durable.
    fn settle(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        debug_assert_eq!(slot.state, State::Running);
        if slot.pending > 0 {
            return;
        }
        if slot.op().is_some_and(Op::is_write) {
            self.disk.commits.changed();
        }
        let flush = slot.durable || slot.op() == Some(Op::Flush);
        if flush && slot.error.is_none() && !self.disk.read_only() {
            self.join_commit(index);
        } else {
            self.finish(index);
        }
    }

    /// Ends a request.
    pub(crate) fn finish(&mut self, index: u32) {
        let now = self.now();
        let slot = &mut self.slots[index as usize];
        self.epochs.leave(slot.epoch);
        if let Some((layer, key)) = slot.registered.take() {
            let id = slot.id(index);
            self.disk.waits.unregister(layer, key, id, &self.mailbox);
        }
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        let result = slot.error.map_or(Ok(()), Err);
        match slot.owner {
            Owner::Guest => {
                slot.state = State::Free;
                let tag = slot.tag;
                match slot.task {
                    Task::Op(op) => {
                        slot.stamps.completed = now;
                        let status = trace::Status::from(result) as u64;
                        probe!(diskplane, completed, self.stats.key(), tag, status);
                        self.ended.push(Ended {
                            op,
                            at: slot.at.0,
                            bytes: slot.len,
                            result,
                            stamps: slot.stamps,
                        });
                    }
                    Task::Status { .. } => {
                        let status = std::mem::take(&mut slot.status);
                        self.status_done.push((tag, status));
                    }
                }
                let wrote = matches!(slot.task, Task::Op(op) if op.is_write());
                let wrote = wrote && !slot.durable && result.is_ok();
                self.guest_free.push(index);
                self.done.push_back(Done { tag, result });
                if wrote {
                    self.commit_ahead();
                }
            }
            Owner::Fill { fill, part } => {
                let all_zero = slot.all_zero;
                slot.state = State::Free;
                self.inner_free.push(index);
                self.fill_read(fill, part, all_zero, result.err());
            }
        }
    }

    /// The clock, read at most once per batch.
    fn now(&mut self) -> u64 {
        if self.clock_stale {
            self.clock_ns = now_ns();
            self.clock_stale = false;
        }
        self.clock_ns
    }

    /// What a guest is told of a format's error; logs it.
    pub(crate) fn refuse(&mut self, layer: u8, error: &Error) -> GuestError {
        if self.may_log() {
            let path = self.disk.layers[layer as usize].path.display();
            tracing::error!("{path}: {error}");
        }
        error.for_guest()
    }

    /// Logs the failure of an operation: which file, what, where.
    pub(crate) fn log_error(&mut self, io: &Io, purpose: &Purpose, errno: i32) {
        if let Purpose::Reserve { .. } = purpose
            && GuestError::of_errno(errno) == GuestError::NoSpace
        {
            // Asked for less then; a request that fails for it says so (see `meet`).
            return;
        }
        if let Purpose::Prewrite { .. } = purpose {
            // Nobody lacks it; what needs the space says so.
            return;
        }
        if self.may_log() {
            let layer = self.files.iter().position(|files| files.contains(&io.file));
            let path = self.disk.layers[layer.unwrap_or(0)].path.display();
            let os = std::io::Error::from_raw_os_error(errno);
            let (op, at, len) = (io.op, io.offset, io.len);
            tracing::error!("{path}: {op:?} of {len} bytes at {at:#x}: {os}");
        }
    }

    /// Logs that a request fails since the image cannot grow.
    pub(crate) fn log_full(&mut self, at: u64, len: u64) {
        if self.may_log() {
            let path = self.disk.layers[0].path.display();
            tracing::error!("{path}: no space left to grow by {len} bytes at {at:#x}");
        }
    }

    /// At most so many messages per queue: a failing device must not fill the log.
    fn may_log(&mut self) -> bool {
        const LOGGED_MAX: u32 = 100;
        self.errors_logged = self.errors_logged.saturating_add(1);
        if self.errors_logged == LOGGED_MAX {
            tracing::error!("further errors of this queue are not logged");
        }
        self.errors_logged < LOGGED_MAX
    }
}

impl Drop for DiskQueue {
    /// Whoever drops a queue with operations at the engine (a panic, most likely) loses their
    /// memory, rather than the kernel writing into what is somebody else's by then.
    fn drop(&mut self) {
        if self.subs_free.len() < self.subs.len() {
            tracing::error!("a queue was dropped with operations under way: their memory is lost");
            std::mem::forget(std::mem::take(&mut self.subs));
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(std::mem::take(&mut self.fills));
            std::mem::forget(self.committer.take());
        }
    }
}
