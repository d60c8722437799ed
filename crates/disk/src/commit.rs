//! Group commit: flushes that arrive together share one run of the format's
//! flush stages.
//!
//! A flush must be covered by a run that *began* after all that was acknowledged before it arrived had ended. So flushes
//! that arrive while a run is under way wait for the next one, which one queue then leads for all of them; unless no write has
//! ended since the run began: then it covers them too, under way or over.

use crate::wait::{Message, Waiter};
use block::GuestError;
use image::FlushRun;
use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering::SeqCst},
};

/// What happens after a flush or a run's end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The asking queue leads the next run: call [`GroupCommit::begin`] at the end of its batch.
    Lead,
    /// Another queue is at it.
    Follow,
    /// The run under way covers the flush.
    Join,
    /// Nothing has changed since the last run began, which was a success.
    Covered,
}

#[derive(Debug, Default)]
struct State {
    /// A run is under way, or a queue has been told to lead one.
    led: bool,
    /// A run is under way.
    runs: bool,
    /// Waiters that the run under way covers.
    current: Vec<Waiter>,
    /// Waiters of the next run.
    next: Vec<Waiter>,
    /// How a run failed of which nobody waited to hear: what it did not make durable may be gone, whatever later runs do.
    owed: Option<GuestError>,
    /// The run's buffers between runs.
    run: Option<Box<FlushRun>>,
}

/// The flushes of one disk.
#[derive(Debug, Default)]
pub(crate) struct GroupCommit {
    state: Mutex<State>,
    /// No write has ended since the last run began, and that did not fail.
    covers: AtomicBool,
}

impl GroupCommit {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write ended at the device: a run that began before does not cover it. To be called before anybody is told.
    ///
    /// Either this sees that a run has begun (which is then known not to cover everything), or the run begins, to the processors,
    /// after this look, and so after the write's end and what was noted of it ([`crate::unsynced`]): all are `SeqCst` for that.
    #[inline]
    pub fn changed(&self) {
        if self.covers.load(SeqCst) {
            self.covers.store(false, SeqCst);
        }
    }

    /// A flush arrived: unless it is covered, its waiter hears [`Message::Committed`] when a run that covers it ended.
    pub fn arrive(&self, waiter: Waiter) -> Turn {
        let mut state = self.state();
        if self.covers.load(SeqCst) {
            if !state.runs {
                return Turn::Covered;
            }
            state.current.push(waiter);
            return Turn::Join;
        }
        Self::wait(&mut state, waiter)
    }

    /// The waiter needs a run that begins from now on.
    pub fn arrive_anew(&self, waiter: Waiter) -> Turn {
        Self::wait(&mut self.state(), waiter)
    }

    fn wait(state: &mut State, waiter: Waiter) -> Turn {
        state.next.push(waiter);
        if state.led {
            Turn::Follow
        } else {
            state.led = true;
            Turn::Lead
        }
    }

    /// Nobody waits, but a run should be made: `Lead` unless one is under way.
    pub fn lead(&self) -> Turn {
        let mut state = self.state();
        if state.led {
            return Turn::Follow;
        }
        state.led = true;
        Turn::Lead
    }

    /// How a run failed that nobody has heard of.
    pub fn owed(&self) -> Option<GuestError> {
        self.state().owed
    }

    /// The leader begins: everyone who arrived until now is covered. Returns the run's buffers.
    pub fn begin(&self) -> Box<FlushRun> {
        let mut state = self.state();
        let State { current, next, .. } = &mut *state;
        std::mem::swap(current, next);
        state.runs = true;
        self.covers.store(true, SeqCst);
        state.run.take().unwrap_or_default()
    }

    /// The leader's run ended with `result`: tells everyone covered. `Lead` when more
    /// flushes arrived meanwhile, for which the same queue goes on leading.
    pub fn end(&self, run: Box<FlushRun>, result: Result<(), GuestError>) -> Turn {
        let mut state = self.state();
        state.run = Some(run);
        state.runs = false;
        if result.is_err() {
            self.covers.store(false, SeqCst);
        }
        let result = match (result, state.current.is_empty()) {
            (Err(error), true) => Err(*state.owed.get_or_insert(error)),
            (Ok(()), true) => Ok(()),
            (result, false) => result.and(state.owed.take().map_or(Ok(()), Err)),
        };
        // Posted under the lock: the mailboxes' locks are leaves, and `current` keeps its memory.
        for waiter in state.current.drain(..) {
            waiter.mailbox.post(Message::Committed(waiter.slot, result));
        }
        if state.next.is_empty() {
            state.led = false;
            Turn::Follow
        } else {
            Turn::Lead
        }
    }
}
