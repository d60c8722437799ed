//! How long to look for work before sleeping.

use super::Polling;

/// Smallest budget worth the two clock readings that it costs.
const POLL_NS_MIN: u64 = 2_000;

/// An adaptive polling budget.
///
/// Sleeping costs a wake-up (some microseconds and a context switch) and polling costs a core.
/// Polling pays when the next event mostly comes sooner than `max`: after a sleep that
/// turned out so short, the budget grows; after a long one it halves, down to nothing. So a
/// disk that answers in 100 µs, or an idle guest, is never polled for.
#[derive(Debug)]
pub(super) struct Poll {
    max_ns: u64,
    always: bool,
    budget_ns: u64,
    /// When the thread last had something to do.
    active_ns: u64,
    slept: bool,
}

impl Poll {
    /// Nothing learned yet.
    pub(super) fn new(polling: Polling) -> Self {
        let (max_ns, always) = match polling {
            Polling::Adaptive { max_ns } => (max_ns, false),
            Polling::Always => (0, true),
        };
        Self {
            max_ns,
            always,
            budget_ns: 0,
            active_ns: 0,
            slept: false,
        }
    }

    /// Whether to poll where that does not depend on events, so that no clock need be read.
    pub(super) fn fixed(&self) -> Option<bool> {
        (self.max_ns == 0).then_some(self.always)
    }

    /// Something happened at `now_ns`.
    pub(super) fn active(&mut self, now_ns: u64) {
        if self.slept {
            self.slept = false;
            if now_ns.saturating_sub(self.active_ns) <= self.max_ns {
                self.budget_ns = (self.budget_ns * 2).max(POLL_NS_MIN).min(self.max_ns);
            } else {
                self.budget_ns /= 2;
                if self.budget_ns < POLL_NS_MIN {
                    self.budget_ns = 0;
                }
            }
        }
        self.active_ns = now_ns;
    }

    /// Whether to look again at `now_ns` rather than to sleep.
    pub(super) fn goes_on(&self, now_ns: u64) -> bool {
        self.budget_ns > 0 && now_ns.saturating_sub(self.active_ns) < self.budget_ns
    }

    /// The thread is about to sleep.
    pub(super) fn sleeps(&mut self) {
        self.slept = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays events that come `gap_ns` after one another; returns the nanoseconds polled for
    /// the last of `count` events, and whether the thread had to sleep for it.
    fn play(poll: &mut Poll, now: &mut u64, gap_ns: u64, count: u32) -> (u64, bool) {
        let mut last = (0, false);
        for _ in 0..count {
            poll.active(*now);
            let next = *now + gap_ns;
            let start = *now;
            while *now < next && poll.goes_on(*now) {
                *now += 100;
            }
            last = (*now - start, *now < next);
            if last.1 {
                poll.sleeps();
                *now = next;
            }
        }
        poll.active(*now);
        last
    }

    #[test]
    fn learns_that_polling_pays_and_that_it_does_not() {
        let mut poll = Poll::new(Polling::Adaptive { max_ns: 16_000 });
        let mut now = 1_000_000;
        // Events every 5 µs: after a few sleeps it polls for each.
        assert!(!play(&mut poll, &mut now, 5_000, 20).1);
        // Events every 100 µs: polling ends, and costs nothing then.
        assert_eq!(play(&mut poll, &mut now, 100_000, 20), (0, true));
        // And comes back.
        assert!(!play(&mut poll, &mut now, 5_000, 20).1);
    }

    #[test]
    fn polls_never_when_off() {
        let mut poll = Poll::new(Polling::Adaptive { max_ns: 0 });
        let mut now = 0;
        assert_eq!(poll.fixed(), Some(false));
        assert_eq!(Poll::new(Polling::Always).fixed(), Some(true));
        assert_eq!(Poll::new(Polling::default()).fixed(), None);
        assert_eq!(play(&mut poll, &mut now, 1_000, 50), (0, true));
    }
}
