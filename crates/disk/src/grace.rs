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
            current: 0,
            count: 0,
            earlier: VecDeque::with_capacity(16),
            published: QUIET,
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
///
/// What it publishes is at most the epoch of its oldest request. It may lag behind when that ended, until
/// [`Member::rest`]: a queue whose requests end one by one would publish for each otherwise.
#[derive(Debug)]
pub(crate) struct Member {
    oldest: Arc<Oldest>,
    /// The epoch of the latest request, and how many of its requests are in flight.
    current: u64,
    count: u64,
    /// Earlier epochs with requests in flight and how many, oldest first.
    earlier: VecDeque<(u64, u64)>,
    /// What `oldest` says.
    published: u64,
}

impl Member {
    /// A request begins; returns its epoch, to be given to `leave`. Called before it maps anything.
    #[inline]
    pub fn enter(&mut self, epochs: &Epochs) -> u64 {
        let now = epochs.now.load(Ordering::Acquire);
        if now == self.current && self.published != QUIET {
            self.count += 1;
        } else {
            self.enter_new(now);
        }
        now
    }

    /// The first request of an epoch, or after a rest.
    fn enter_new(&mut self, now: u64) {
        if self.count > 0 && now != self.current {
            self.earlier.push_back((self.current, self.count));
            self.count = 0;
        }
        self.current = now;
        self.count += 1;
        if self.earlier.is_empty() && self.published != now {
            self.published = now;
            self.oldest.0.store(now, Ordering::SeqCst);
            // Published before the request's first look at any mapping.
            fence(Ordering::SeqCst);
        }
    }

    /// A request of `epoch` ended.
    #[inline]
    pub fn leave(&mut self, epoch: u64) {
        if epoch == self.current {
            self.count -= 1;
        } else {
            self.leave_earlier(epoch);
        }
    }

    fn leave_earlier(&mut self, epoch: u64) {
        if let Some(entry) = self.earlier.iter_mut().find(|(e, _)| *e == epoch) {
            entry.1 -= 1;
        }
        while self.earlier.front().is_some_and(|f| f.1 == 0) {
            self.earlier.pop_front();
        }
        let oldest = self.earlier.front().map_or(self.current, |f| f.0);
        self.publish(oldest);
    }

    fn publish(&mut self, oldest: u64) {
        if self.published != oldest {
            self.published = oldest;
            self.oldest.0.store(oldest, Ordering::Release);
        }
    }

    /// Publishes that there is no request in flight, if so: before its thread may sleep.
    pub fn rest(&mut self) {
        if self.count == 0 && self.earlier.is_empty() {
            self.publish(QUIET);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_never_younger_than_a_request() {
        // Every order of begins, ends, rests and new epochs, against a plain list of what is in flight.
        let mut random = 7u64;
        let epochs = Epochs::default();
        let mut member = epochs.join();
        let mut running: Vec<u64> = Vec::new();
        for step in 0..20_000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
            match random >> 60 {
                0..=5 => running.push(member.enter(&epochs)),
                6..=12 if !running.is_empty() => {
                    let at = (random >> 20) as usize % running.len();
                    member.leave(running.swap_remove(at));
                }
                13 => member.rest(),
                14 => {
                    epochs.end();
                }
                _ => {}
            }
            let oldest = running.iter().min().copied();
            let said = member.oldest.0.load(Ordering::SeqCst);
            match oldest {
                Some(oldest) => assert!(said <= oldest, "step {step}: {said} > {oldest}"),
                None => {
                    member.rest();
                    assert_eq!(member.oldest.0.load(Ordering::SeqCst), QUIET);
                }
            }
        }
    }

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
        a.rest();
        assert!(!epochs.passed(freed));
        b.leave(other);
        assert!(!epochs.passed(freed), "said at the end of a turn");
        b.rest();
        assert!(epochs.passed(freed));
        epochs.leave(&a);
        epochs.leave(&b);
    }
}
