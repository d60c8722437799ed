//! Keeps read-modify-writes of a file apart from the writes around them.
//!
//! Under `O_DIRECT` a write that does not fit the device's blocks reads the blocks at its ends,
//! puts its bytes in and writes them back. A write to the other bytes of such a block in
//! between, from any thread, would be lost. So while the file demands alignment, each write (zeroing,
//! discard, allocation) enters the gate: *exclusively* when it is misaligned and may read, modify and
//! write, else *shared*; for the regions that it touches.
//!
//! Regions (64 KiB) hash to stripes; a stripe is a counter of writers in it and one bit of the
//! exclusive owner (or owner-to-be, who waits until the counter is zero; new writers wait behind it,
//! so it is not starved). Exclusive claims are made in ascending order of stripes and kept while waiting;
//! shared entries are all or nothing: there is no cycle, thus no deadlock. (A thread that owns an engine
//! must not itself change the file with blocking calls while its engine has misaligned changes in
//! flight there: it would wait for a turn that it does not make.)

use crate::eventfd::Waker;
use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

const STRIPES: usize = 256;
const REGION_SHIFT: u32 = 16;
const EXCLUSIVE: u32 = 1 << 31;

/// The stripes that a byte range touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stripes([u64; STRIPES / 64]);

impl Stripes {
    /// Of `len` bytes (at least 1) at `offset`.
    pub(crate) fn of(offset: u64, len: u64) -> Self {
        let first = offset >> REGION_SHIFT;
        let last = offset.saturating_add(len.saturating_sub(1)) >> REGION_SHIFT;
        if last - first >= STRIPES as u64 {
            return Self([u64::MAX; STRIPES / 64]);
        }
        let mut mask = [0u64; STRIPES / 64];
        for region in first..=last {
            let stripe = (region % STRIPES as u64) as usize;
            mask[stripe / 64] |= 1 << (stripe % 64);
        }
        Self(mask)
    }

    fn next(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        if word >= self.0.len() {
            return None;
        }
        let mut bits = self.0[word] & (u64::MAX << (from % 64));
        loop {
            if bits != 0 {
                return Some(word * 64 + bits.trailing_zeros() as usize);
            }
            word += 1;
            if word == self.0.len() {
                return None;
            }
            bits = self.0[word];
        }
    }

    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(self.next(0), |i| self.next(i + 1))
    }
}

/// How far an exclusive claim has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Stripes below this one are owned.
    next: usize,
    /// The bit of stripe `next` is set by this claim; its writers have still to leave.
    pending: bool,
}

/// See the module's documentation.
pub(crate) struct Gate {
    stripes: [AtomicU32; STRIPES],
    waiting: AtomicBool,
    waiters: Mutex<Vec<Weak<Waker>>>,
    freed: Condvar,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            stripes: [const { AtomicU32::new(0) }; STRIPES],
            waiting: AtomicBool::new(false),
            waiters: Mutex::new(Vec::new()),
            freed: Condvar::new(),
        }
    }

    /// Enters as an ordinary writer, or answers `false` when a read-modify-write is in the way.
    pub(crate) fn try_shared(&self, set: &Stripes) -> bool {
        // A look first: an entry that must be undone disturbs the one who waits for the count.
        if set
            .iter()
            .any(|s| self.stripes[s].load(Ordering::SeqCst) & EXCLUSIVE != 0)
        {
            return false;
        }
        for stripe in set.iter() {
            if self.stripes[stripe].fetch_add(1, Ordering::SeqCst) & EXCLUSIVE != 0 {
                for entered in set.iter().take_while(|s| *s <= stripe) {
                    self.stripes[entered].fetch_sub(1, Ordering::SeqCst);
                }
                self.notify();
                return false;
            }
        }
        true
    }

    pub(crate) fn leave_shared(&self, set: &Stripes) {
        for stripe in set.iter() {
            self.stripes[stripe].fetch_sub(1, Ordering::SeqCst);
        }
        self.notify();
    }

    /// Goes on with an exclusive claim; `true` when all stripes are owned. What was claimed stays
    /// claimed: call again later, or give up with [`Gate::leave_exclusive`].
    pub(crate) fn try_exclusive(&self, set: &Stripes, claim: &mut Claim) -> bool {
        while let Some(stripe) = set.next(claim.next) {
            let cell = &self.stripes[stripe];
            if !claim.pending {
                if cell.fetch_or(EXCLUSIVE, Ordering::SeqCst) & EXCLUSIVE != 0 {
                    return false;
                }
                claim.pending = true;
            }
            if cell.load(Ordering::SeqCst) != EXCLUSIVE {
                return false;
            }
            *claim = Claim {
                next: stripe + 1,
                pending: false,
            };
        }
        true
    }

    /// Gives up everything that the claim holds, complete or not.
    pub(crate) fn leave_exclusive(&self, set: &Stripes, claim: &Claim) {
        for stripe in set.iter() {
            let pending = claim.pending && set.next(claim.next) == Some(stripe);
            if stripe < claim.next || pending {
                self.stripes[stripe].fetch_and(!EXCLUSIVE, Ordering::SeqCst);
            }
        }
        self.notify();
    }

    /// Has `waker` woken when somebody leaves. The caller tries once more after
    /// this and before it sleeps.
    pub(crate) fn wait_with(&self, waker: &Arc<Waker>) {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiters
            .iter()
            .any(|w| std::ptr::eq(w.as_ptr(), Arc::as_ptr(waker)))
        {
            waiters.push(Arc::downgrade(waker));
        }
        self.waiting.store(true, Ordering::SeqCst);
    }

    fn notify(&self) {
        if self.waiting.load(Ordering::SeqCst) {
            self.notify_waiters();
        }
    }

    #[cold]
    fn notify_waiters(&self) {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.store(false, Ordering::SeqCst);
        for waker in waiters.drain(..).filter_map(|w| w.upgrade()) {
            waker.wake();
        }
        drop(waiters);
        self.freed.notify_all();
    }

    /// Blocks the thread until `attempt` succeeds.
    fn block_until(&self, mut attempt: impl FnMut() -> bool) {
        if attempt() {
            return;
        }
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            self.waiting.store(true, Ordering::SeqCst);
            // The attempt may itself notify (a shared entry undone), which takes the lock.
            drop(waiters);
            if attempt() {
                return;
            }
            waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
            if self.waiting.load(Ordering::SeqCst) {
                waiters = self
                    .freed
                    .wait(waiters)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Enters as an ordinary writer, waiting as long as it takes.
    pub(crate) fn shared(&self, offset: u64, len: u64) -> SharedGuard<'_> {
        let set = Stripes::of(offset, len);
        self.block_until(|| self.try_shared(&set));
        SharedGuard { gate: self, set }
    }

    /// Enters exclusively, waiting as long as it takes.
    pub(crate) fn exclusive(&self, offset: u64, len: u64) -> ExclusiveGuard<'_> {
        let set = Stripes::of(offset, len);
        let mut claim = Claim::default();
        self.block_until(|| self.try_exclusive(&set, &mut claim));
        ExclusiveGuard {
            gate: self,
            set,
            claim,
        }
    }
}

/// Leaves when dropped.
pub(crate) struct SharedGuard<'a> {
    gate: &'a Gate,
    set: Stripes,
}

impl Drop for SharedGuard<'_> {
    fn drop(&mut self) {
        self.gate.leave_shared(&self.set);
    }
}

/// Leaves when dropped.
pub(crate) struct ExclusiveGuard<'a> {
    gate: &'a Gate,
    set: Stripes,
    claim: Claim,
}

impl Drop for ExclusiveGuard<'_> {
    fn drop(&mut self) {
        self.gate.leave_exclusive(&self.set, &self.claim);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_of_ranges() {
        let count = |offset, len| Stripes::of(offset, len).iter().count();
        assert_eq!(count(0, 1), 1);
        assert_eq!(count(65535, 2), 2);
        assert_eq!(count(0, 255 << 16), 255);
        assert_eq!(count(4096, 1 << 40), 256);
        assert_eq!(count(u64::MAX - 10, 100), 1);
    }

    #[test]
    fn exclusive_waits_for_shared_and_blocks_newcomers() {
        let gate = Gate::new();
        let near = Stripes::of(100, 200_000);
        let far = Stripes::of(10 << 20, 1);
        assert!(gate.try_shared(&near));
        let mut claim = Claim::default();
        assert!(!gate.try_exclusive(&near, &mut claim));
        assert!(!gate.try_shared(&near), "the owner-to-be goes first");
        assert!(gate.try_shared(&far));
        gate.leave_shared(&near);
        assert!(gate.try_exclusive(&near, &mut claim));
        let mut other = Claim::default();
        assert!(!gate.try_exclusive(&near, &mut other));
        gate.leave_exclusive(&near, &other);
        assert!(
            !gate.try_shared(&near),
            "giving up a claim frees only its own stripes"
        );
        gate.leave_exclusive(&near, &claim);
        assert!(gate.try_shared(&near));
        gate.leave_shared(&near);
        gate.leave_shared(&far);
        assert!(gate.stripes.iter().all(|s| s.load(Ordering::SeqCst) == 0));
    }

    #[test]
    fn waiters_are_woken() {
        let gate = Gate::new();
        let set = Stripes::of(0, 1);
        let waker = Arc::new(Waker::new().unwrap());
        assert!(gate.try_shared(&set));
        gate.wait_with(&waker);
        assert!(!waker.take());
        gate.leave_shared(&set);
        assert!(waker.take());
    }

    #[test]
    fn threads_take_turns() {
        let gate = Gate::new();
        // Not atomic on purpose: the gate alone keeps increments from being lost.
        let value = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (gate, value) = (&gate, &value);
                scope.spawn(move || {
                    for round in 0..2000u64 {
                        if (round + thread) % 3 == 0 {
                            let _guard = gate.exclusive(0, 200_000);
                            let old = value.load(Ordering::Relaxed);
                            std::hint::spin_loop();
                            value.store(old + 1, Ordering::Relaxed);
                        } else {
                            let before = {
                                let _guard = gate.shared(70_000, 10);
                                value.load(Ordering::Relaxed)
                            };
                            assert!(before <= value.load(Ordering::Relaxed));
                        }
                    }
                });
            }
        });
        let expected: u32 = (0..4u64)
            .map(|t| (0..2000u64).filter(|r| (r + t) % 3 == 0).count() as u32)
            .sum();
        assert_eq!(value.load(Ordering::Relaxed), expected);
    }
}
