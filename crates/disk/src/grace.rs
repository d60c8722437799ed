//! When space that was freed may be used again.
//!
//! A request maps its range and then does I/O on what it was told. If the clusters are
//! freed meanwhile (a discard on another queue), the I/O must not hit their next owner.
//! So each request notes the epoch in which it began; freeing ends the epoch; and the
//! space is handed back when no queue has a request of that epoch or an older one.
//! Costs a request two unshared stores at most.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering, fence},
    },
};

/// No request in flight.
const QUIET: u64 = u64::MAX;

/// The epochs of one disk.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    now: AtomicU64,
    queues: Mutex<Vec<Arc<Oldest>>>,
}

/// The oldest epoch of a queue's requests in flight, or [`QUIET`]; on its own cache line.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Oldest(AtomicU64);

impl Epochs {
    /// A queue that takes part.
    pub fn join(&self) -> Member {
        let oldest = Arc::new(Oldest(AtomicU64::new(QUIET)));
        self.queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(oldest.clone());
        Member {
            oldest,
            running: VecDeque::with_capacity(16),
        }
    }

    /// A queue that is quiet leaves.
    pub fn leave(&self, member: &Member) {
        self.queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|o| !Arc::ptr_eq(o, &member.oldest));
    }

    /// Ends the current epoch and returns it: what was unlinked before may be in use by
    /// requests of that epoch and older ones.
    pub fn end(&self) -> u64 {
        self.now.fetch_add(1, Ordering::SeqCst)
    }

    /// Whether all requests of `epoch` and before have ended.
    pub fn passed(&self, epoch: u64) -> bool {
        fence(Ordering::SeqCst);
        self.queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .all(|o| o.0.load(Ordering::SeqCst) > epoch)
    }
}

/// One queue's part; owned by its thread.
#[derive(Debug)]
pub(crate) struct Member {
    oldest: Arc<Oldest>,
    /// Epochs with requests in flight and how many, oldest first.
    running: VecDeque<(u64, u32)>,
}

impl Member {
    /// A request begins; returns its epoch, to be given to `leave`. Called before it maps anything.
    pub fn enter(&mut self, epochs: &Epochs) -> u64 {
        let now = epochs.now.load(Ordering::Acquire);
        match self.running.back_mut() {
            Some((epoch, count)) if *epoch == now => *count += 1,
            Some(_) => self.running.push_back((now, 1)),
            None => {
                self.running.push_back((now, 1));
                self.oldest.0.store(now, Ordering::SeqCst);
                // Published before the request's first look at any mapping.
                fence(Ordering::SeqCst);
            }
        }
        now
    }

    /// A request of `epoch` ended.
    pub fn leave(&mut self, epoch: u64) {
        if let Some(entry) = self.running.iter_mut().find(|(e, _)| *e == epoch) {
            entry.1 -= 1;
        }
        let before = self.running.front().map(|f| f.0);
        while self.running.front().is_some_and(|f| f.1 == 0) {
            self.running.pop_front();
        }
        let after = self.running.front().map(|f| f.0);
        if before != after {
            self.oldest
                .0
                .store(after.unwrap_or(QUIET), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_passes_when_its_requests_ended() {
        let epochs = Epochs::default();
        let mut a = epochs.join();
        let mut b = epochs.join();
        let first = a.enter(&epochs);
        let freed = epochs.end();
        assert!(!epochs.passed(freed));
        let second = a.enter(&epochs);
        let other = b.enter(&epochs);
        assert!(second > freed && other > freed);
        assert!(!epochs.passed(freed), "the first request still runs");
        a.leave(first);
        assert!(epochs.passed(freed), "later requests do not hold it up");
        let freed = epochs.end();
        a.leave(second);
        assert!(!epochs.passed(freed));
        b.leave(other);
        assert!(epochs.passed(freed));
        epochs.leave(&a);
        epochs.leave(&b);
    }
}
