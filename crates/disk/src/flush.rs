//! Commits that this queue leads, and space that they freed.

use crate::{
    commit::Turn,
    queue::DiskQueue,
    request::State,
    sub::{Place, Purpose},
};
use block::{GuestError, IoVec, Zeroed};
use image::{FlushRun, Freed};
use io::{Engine, IoOp};

/// A run of the format's flush stages under way.
#[derive(Debug)]
pub(crate) struct Committer {
    run: Box<FlushRun>,
    stage: usize,
    /// The next write of the stage to issue.
    next: usize,
    pending: u32,
    /// The stage's writes are down and its barrier is at the engine.
    barrier: bool,
    /// Files of which the barrier was issued, or that need none ([`crate::unsynced`]).
    synced: usize,
    error: Option<GuestError>,
}

impl DiskQueue {
    /// The flush, or the write that must be durable, waits for a commit that covers it; it ends if there was one.
    pub(crate) fn join_commit(&mut self, index: u32) {
        self.slots[index as usize].state = State::CommitThenDone;
        match self.disk.commits.arrive(self.waiter(index)) {
            Turn::Lead => self.leads = true,
            Turn::Follow => {}
            Turn::Join => self.stats.spare(),
            Turn::Covered => {
                self.stats.spare();
                self.finish(index);
            }
        }
    }

    /// The request waits for a commit that begins from now on, and asks the format again then.
    pub(crate) fn commit_then_ask(&mut self, index: u32) {
        self.slots[index as usize].state = State::CommitThenAsk;
        self.leads |= self.disk.commits.arrive_anew(self.waiter(index)) == Turn::Lead;
    }

    /// A commit that no request waits for yet, unless one is under way or about to be. Returns whether it begins.
    pub(crate) fn lead_commit(&mut self) -> bool {
        let leads = self.disk.commits.lead() == Turn::Lead;
        self.leads |= leads;
        leads
    }

    /// A write has ended, and its answer is on its way. Where a flush will follow, its commit begins at the end of the turn.
    pub(crate) fn commit_ahead(&mut self) {
        let alone = self.guest_in_flight() == 0;
        if alone && self.habit.wrote() && self.disk.flush_ahead() && self.lead_commit() {
            self.stats.ahead();
        }
    }

    /// The commit that a request waited for ended.
    pub(crate) fn committed(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        result: Result<(), GuestError>,
    ) {
        let slot = &mut self.slots[index as usize];
        let state = slot.state;
        if let Err(error) = result {
            slot.error.get_or_insert(error);
        }
        match state {
            State::CommitThenDone => self.finish(index),
            State::CommitThenAsk => self.drive(engine, index),
            _ => debug_assert!(false, "a commit ended for a request in {state:?}"),
        }
    }

    /// Begins the commit that this queue leads, once all of the turn's flushes have joined, and
    /// goes on with one that lacked room.
    pub(crate) fn advance_commit(&mut self, engine: &mut dyn Engine) {
        self.pump_commit(engine);
        while self.leads && self.committer.is_none() {
            self.begin_commit(engine);
        }
    }

    /// Whether the commit under way has nothing at the engine since no operation was free for it.
    pub(crate) fn commit_lacks_room(&self) -> bool {
        self.committer.as_ref().is_some_and(|c| c.pending == 0)
    }

    fn begin_commit(&mut self, engine: &mut dyn Engine) {
        self.stats.commit();
        let mut run = self.disk.commits.begin();
        run.clear();
        let result = self.disk.layers[0].image.flush_begin(&mut run);
        if let Err(error) = result {
            let error = self.refuse(0, &error);
            return self.end_commit(run, Some(error));
        }
        self.committer = Some(Committer {
            next: run.stages.first().map_or(0, |s| s.first),
            run,
            stage: 0,
            pending: 0,
            barrier: false,
            synced: 0,
            error: None,
        });
        self.pump_commit(engine);
    }

    /// Issues what can be issued of the commit under way.
    pub(crate) fn pump_commit(&mut self, engine: &mut dyn Engine) {
        loop {
            let Some(c) = &mut self.committer else { return };
            let failed = c.error.is_some();
            let Some(stage) = c.run.stages.get(c.stage).copied().filter(|_| !failed) else {
                if c.pending == 0 {
                    let Some(c) = self.committer.take() else {
                        return;
                    };
                    self.end_commit(c.run, c.error);
                }
                return;
            };
            if !c.barrier && c.next < stage.end {
                let write = c.run.writes[c.next];
                let base = c.run.bytes[write.start..write.start + write.len].as_ptr();
                if self.subs_free.len() <= self.fills_in_use {
                    return;
                }
                c.next += 1;
                c.pending += 1;
                let Some(sub) = self.take_sub() else { return };
                // Only read from: the run's bytes stay as they are until its end.
                let piece = IoVec::new(base.cast_mut(), write.len);
                self.subs[sub as usize].iov.push(piece);
                let file = self.file(0, write.file);
                let (offset, len) = (write.offset.0, write.len as u64);
                let place = Place { file, offset, len };
                self.issue(engine, sub, Purpose::Commit, IoOp::Write, place, None);
            } else if !c.barrier && c.pending > 0 {
                return;
            } else if c.synced < self.files[0].len() {
                // An image may have more files than there are operations: the rest follows as they end.
                if self.subs_free.len() <= self.fills_in_use {
                    return;
                }
                c.barrier = true;
                let nth = c.synced;
                c.synced += 1;
                if !self.disk.unsynced.take(nth) {
                    continue;
                }
                let file = self.files[0][nth];
                c.pending += 1;
                let Some(sub) = self.take_sub() else { return };
                let place = Place {
                    file,
                    offset: 0,
                    len: 0,
                };
                self.stats.barrier();
                self.issue(engine, sub, Purpose::Commit, IoOp::Sync, place, None);
            } else if c.pending > 0 {
                return;
            } else {
                (c.barrier, c.synced) = (false, 0);
                c.stage += 1;
                c.next = c.run.stages.get(c.stage).map_or(0, |s| s.first);
            }
        }
    }

    /// A write or barrier of the commit ended.
    pub(crate) fn commit_part_ended(&mut self, engine: &mut dyn Engine, error: Option<GuestError>) {
        if let Some(c) = &mut self.committer {
            c.pending -= 1;
            if let Some(error) = error {
                c.error.get_or_insert(error);
            }
            self.pump_commit(engine);
        }
    }

    fn end_commit(&mut self, mut run: Box<FlushRun>, error: Option<GuestError>) {
        let image = &self.disk.layers[0].image;
        image.flush_end(&mut run, error.is_none());
        image.take_freed(&mut self.freed);
        if !self.freed.is_empty() {
            let epoch = self.disk.epochs.end();
            self.retired
                .extend(self.freed.drain(..).map(|freed| (epoch, freed)));
        }
        self.leads = self.disk.commits.end(run, error.map_or(Ok(()), Err)) == Turn::Lead;
    }

    /// Gives space back whose last users have ended.
    pub(crate) fn advance_retired(&mut self, engine: &mut dyn Engine) {
        /// Holes being punched at a time: this must not crowd out the guest's requests.
        const PUNCHES_MAX: usize = 4;
        let mut passed = None;
        while let Some((epoch, freed)) = self.retired.front().copied() {
            if self.punches >= PUNCHES_MAX || !self.has_sub() {
                return;
            }
            if passed.is_none_or(|p| p < epoch) {
                if !self.disk.epochs.passed(epoch) {
                    return;
                }
                passed = Some(epoch);
            }
            self.retired.pop_front();
            if !self.disk.can_discard() {
                self.disk.layers[0].image.release(&freed, Zeroed::No);
                continue;
            }
            let Some(sub) = self.take_sub() else { return };
            self.punches += 1;
            let file = self.file(0, freed.file);
            // As zeroing that must be fast: then the format may rely on the zeros.
            let op = IoOp::Zero {
                unmap: true,
                fast: true,
            };
            let (offset, len) = (freed.offset.0, freed.len);
            let place = Place { file, offset, len };
            self.issue(engine, sub, Purpose::Punch { freed }, op, place, None);
        }
    }

    /// A hole was punched, or could not be.
    pub(crate) fn punched(&mut self, freed: &Freed, zeroed: bool) {
        self.punches -= 1;
        let zeroed = if zeroed { Zeroed::Yes } else { Zeroed::No };
        self.disk.layers[0].image.release(freed, zeroed);
    }
}
