//! Requests that wait for one another: who waits for which key, and how the
//! queue that they belong to hears of its end.

use block::GuestError;
use image::Key;
use io::Waker;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering, fence},
    },
};

/// A slot of a queue's request table, at one of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotId {
    pub index: u32,
    pub generation: u32,
}

/// What other threads tell a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Message {
    /// What the slot waited for may have ended: ask the format again.
    Ask(SlotId),
    /// The commit that the slot waited for ended.
    Committed(SlotId, Result<(), GuestError>),
}

/// Where other threads leave messages for a queue.
#[derive(Debug)]
pub(crate) struct Mailbox {
    filled: AtomicBool,
    messages: Mutex<Vec<Message>>,
    waker: Arc<Waker>,
}

impl Mailbox {
    /// An empty mailbox of a queue that `waker` wakes; room for `slots` messages is set aside.
    pub fn new(waker: Arc<Waker>, slots: usize) -> Self {
        Self {
            filled: AtomicBool::new(false),
            messages: Mutex::new(Vec::with_capacity(slots)),
            waker,
        }
    }

    /// Leaves a message and wakes the owner if it sleeps.
    pub fn post(&self, message: Message) {
        self.messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(message);
        self.filled.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Makes the owner take another turn before it sleeps.
    pub fn wake_owner(&self) {
        self.waker.wake();
    }

    /// Whether there is something to take; no lock.
    pub fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Swaps all messages into `out`, which is empty.
    pub fn take(&self, out: &mut Vec<Message>) {
        if self.filled.swap(false, Ordering::Acquire) {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut *messages, out);
        }
    }
}

/// A request that waits, and where to tell its queue.
#[derive(Clone, Debug)]
pub(crate) struct Waiter {
    pub mailbox: Arc<Mailbox>,
    pub slot: SlotId,
}

/// Who waits for which key of which layer.
///
/// Protocol against lost wake-ups: a waiter registers, then asks the format once more; a waker
/// changes the format's state, then looks here. Whichever comes second sees the other.
#[derive(Debug, Default)]
pub(crate) struct WaitTable {
    count: AtomicUsize,
    waiters: Mutex<HashMap<(u8, Key), Vec<Waiter>>>,
}

impl WaitTable {
    /// Registers; the caller asks the format again before it parks.
    pub fn register(&self, layer: u8, key: Key, waiter: Waiter) {
        let mut map = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        self.count.fetch_add(1, Ordering::SeqCst);
        map.entry((layer, key)).or_default().push(waiter);
        drop(map);
        fence(Ordering::SeqCst);
    }

    /// Takes back a registration that may not have been woken.
    pub fn unregister(&self, layer: u8, key: Key, slot: SlotId, mailbox: &Arc<Mailbox>) {
        let mut map = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(waiters) = map.get_mut(&(layer, key)) else {
            return;
        };
        let before = waiters.len();
        waiters.retain(|w| w.slot != slot || !Arc::ptr_eq(&w.mailbox, mailbox));
        self.count
            .fetch_sub(before - waiters.len(), Ordering::SeqCst);
        if waiters.is_empty() {
            map.remove(&(layer, key));
        }
    }

    /// Wakes all who wait for the key. No lock while nobody waits for anything.
    pub fn wake(&self, layer: u8, key: Key) {
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        let woken = {
            let mut map = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
            let woken = map.remove(&(layer, key)).unwrap_or_default();
            self.count.fetch_sub(woken.len(), Ordering::SeqCst);
            woken
        };
        for waiter in woken {
            waiter.mailbox.post(Message::Ask(waiter.slot));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_registered_is_woken() {
        let table = WaitTable::default();
        let waker = Arc::new(Waker::new().unwrap());
        let mailbox = Arc::new(Mailbox::new(waker, 4));
        let slot = |index| SlotId {
            index,
            generation: 1,
        };
        for index in 0..3 {
            let waiter = Waiter {
                mailbox: Arc::clone(&mailbox),
                slot: slot(index),
            };
            table.register(0, Key(7), waiter);
        }
        table.unregister(0, Key(7), slot(1), &mailbox);
        table.unregister(0, Key(8), slot(0), &mailbox);
        table.wake(0, Key(8));
        assert!(!mailbox.is_filled());
        table.wake(0, Key(7));
        let mut messages = Vec::new();
        mailbox.take(&mut messages);
        let asked: Vec<u32> = messages
            .iter()
            .filter_map(|m| match m {
                Message::Ask(id) => Some(id.index),
                Message::Committed(..) => None,
            })
            .collect();
        assert_eq!(asked, [0, 2]);
        assert_eq!(table.count.load(Ordering::SeqCst), 0);
    }
}
