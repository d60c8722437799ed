//! What a session and a call see of the worker they run on.

use super::Session;
use block::{Error, ErrorKind, Result};
use io::{Engine, Waker};
use std::{any::Any, os::fd::BorrowedFd, sync::Arc};

/// Sessions that one worker carries at most.
const SESSIONS_MAX: usize = 4096;

/// A session's name on its worker; never 0, and not used again soon after the session's end
/// (a late event of a closed session finds nobody).
pub type SessionId = u32;

struct Slot {
    generation: u16,
    /// Taken out while its callback runs, so that the callback may use the whole [`Cx`].
    session: Option<Box<dyn Session>>,
    /// The slot has an owner, even while `session` is taken out.
    used: bool,
    awake: bool,
    closing: bool,
}

/// A worker, as its sessions and calls see it.
pub struct Cx {
    pub(super) engine: Box<dyn Engine>,
    waker: Arc<Waker>,
    slots: Vec<Slot>,
    sessions: usize,
    current: SessionId,
    index: usize,
    /// When the engine last reported a descriptor.
    pub(super) woken_ns: u64,
}

fn slot_of(id: SessionId) -> Option<usize> {
    ((id & 0xffff) as usize).checked_sub(1)
}

impl Cx {
    pub(super) fn new(engine: Box<dyn Engine>, waker: Arc<Waker>, index: usize) -> Self {
        Self {
            engine,
            waker,
            slots: Vec::new(),
            sessions: 0,
            current: 0,
            index,
            woken_ns: 0,
        }
    }

    /// The worker's engine.
    pub fn engine(&mut self) -> &mut dyn Engine {
        &mut *self.engine
    }

    /// Wakes this worker: every session is run then.
    pub fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    /// The worker's number.
    pub fn index(&self) -> usize {
        self.index
    }

    /// In [`Session::ready`]: when the worker learned of it, in nanoseconds of [`disk::now_ns`].
    pub fn woken_ns(&self) -> u64 {
        self.woken_ns
    }

    /// The session whose callback this is; 0 in a call.
    pub fn session(&self) -> SessionId {
        self.current
    }

    /// The upper half of every engine token of the current session.
    pub fn token_base(&self) -> u64 {
        u64::from(self.current) << 32
    }

    /// How many sessions the worker carries.
    pub fn session_count(&self) -> usize {
        self.sessions
    }

    /// Reports `key` to the current session's [`Session::ready`] whenever `fd` is readable
    /// (with `writable`, also when it is writable).
    pub fn watch(&mut self, fd: BorrowedFd<'_>, key: u32, writable: bool) -> Result<()> {
        let key = self.token_base() | u64::from(key);
        self.engine.watch(fd, key, writable)
    }

    /// Ends [`Cx::watch`].
    pub fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u32) -> Result<()> {
        let key = self.token_base() | u64::from(key);
        self.engine.unwatch(fd, key)
    }

    /// Adds the session that `build` makes. Inside `build` the new session is the current
    /// one: [`Cx::token_base`] and [`Cx::watch`] are its own. It starts awake.
    pub fn add<S: Session>(
        &mut self,
        build: impl FnOnce(&mut Cx) -> Result<S>,
    ) -> Result<SessionId> {
        let slot = match self.slots.iter().position(|slot| !slot.used) {
            Some(slot) => slot,
            None if self.slots.len() < SESSIONS_MAX => {
                self.slots.push(Slot {
                    generation: 0,
                    session: None,
                    used: false,
                    awake: false,
                    closing: false,
                });
                self.slots.len() - 1
            }
            None => {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("an I/O thread carries at most {SESSIONS_MAX} sessions"),
                ));
            }
        };
        let entry = &mut self.slots[slot];
        entry.generation = entry.generation.wrapping_add(1);
        entry.used = true;
        entry.awake = true;
        entry.closing = false;
        // `slot < SESSIONS_MAX`, so it fits the low 16 bits.
        let id = u32::from(entry.generation) << 16 | (slot as u32 + 1);
        self.sessions += 1;
        let outer = std::mem::replace(&mut self.current, id);
        let built = build(self);
        self.current = outer;
        match built {
            Ok(session) => {
                self.slots[slot].session = Some(Box::new(session));
                Ok(id)
            }
            Err(error) => {
                self.release(slot);
                Err(error)
            }
        }
    }

    /// Runs `f` with session `id` if it is there and an `S`. The session is current and
    /// is run in the next turn.
    pub fn with<S: Session, R>(
        &mut self,
        id: SessionId,
        f: impl FnOnce(&mut S, &mut Cx) -> R,
    ) -> Option<R> {
        self.visit(id, |session, cx| {
            (session as &mut dyn Any)
                .downcast_mut::<S>()
                .map(|session| f(session, cx))
        })?
    }

    /// Ends the current session when its callback returns. It must have nothing
    /// in flight and nothing watched.
    pub fn close(&mut self) {
        if let Some(slot) = self.lookup(self.current) {
            self.slots[slot].closing = true;
        }
    }

    fn lookup(&self, id: SessionId) -> Option<usize> {
        let slot = slot_of(id)?;
        let entry = self.slots.get(slot)?;
        (entry.used && u32::from(entry.generation) == id >> 16).then_some(slot)
    }

    fn release(&mut self, slot: usize) {
        let entry = &mut self.slots[slot];
        entry.used = false;
        entry.awake = false;
        entry.session = None;
        self.sessions -= 1;
    }

    fn visit<R>(
        &mut self,
        id: SessionId,
        f: impl FnOnce(&mut dyn Session, &mut Cx) -> R,
    ) -> Option<R> {
        let slot = self.lookup(id)?;
        let mut session = self.slots[slot].session.take()?;
        self.slots[slot].awake = true;
        let outer = std::mem::replace(&mut self.current, id);
        let result = f(&mut *session, self);
        self.current = outer;
        if self.slots[slot].closing {
            self.release(slot);
        } else {
            self.slots[slot].session = Some(session);
        }
        Some(result)
    }

    pub(super) fn ready(&mut self, key: u64) {
        self.visit((key >> 32) as u32, |session, cx| {
            session.ready(cx, key as u32);
        });
    }

    pub(super) fn completed(&mut self, completion: &io::Completion) {
        self.visit((completion.token.0 >> 32) as u32, |session, cx| {
            session.completed(cx, completion);
        });
    }

    /// Calls `f` for every session (`all`) or those that are awake.
    fn each(&mut self, all: bool, mut f: impl FnMut(&mut dyn Session, &mut Cx) -> bool) -> bool {
        let mut any = false;
        for slot in 0..self.slots.len() {
            let entry = &self.slots[slot];
            if entry.used && (all || entry.awake) {
                let id = u32::from(entry.generation) << 16 | (slot as u32 + 1);
                any |= self.visit(id, &mut f).unwrap_or(false);
            }
        }
        any
    }

    /// Runs the sessions that are awake; whether one did anything.
    pub(super) fn run(&mut self) -> bool {
        self.each(false, |session, cx| session.run(cx))
    }

    /// Asks the awake sessions to sleep; whether all do.
    pub(super) fn idle(&mut self) -> bool {
        let mut quiet = true;
        for slot in 0..self.slots.len() {
            let entry = &self.slots[slot];
            if entry.used && entry.awake {
                let id = u32::from(entry.generation) << 16 | (slot as u32 + 1);
                let sleeps = self.visit(id, |session, cx| session.idle(cx));
                self.slots[slot].awake = sleeps == Some(false);
                quiet &= sleeps != Some(false);
            }
        }
        quiet
    }

    /// Everybody runs in the next turn: a wake-up does not say whom it is for.
    pub(super) fn wake_all(&mut self) {
        for slot in &mut self.slots {
            slot.awake = slot.used;
        }
    }

    pub(super) fn stop_all(&mut self) {
        self.each(true, |session, cx| {
            session.stop(cx);
            false
        });
    }
}
