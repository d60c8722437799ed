//! How long to look for work before sleeping.
//!
//! Sleeping costs a wake-up (some microseconds of CPU, and up to some tens until the thread runs: a virtual machine's idle
//! processor is started by its hypervisor) and looking costs a core meanwhile. What is waited for decides how long that pays:
//!
//! - **Devices**, while requests are in flight: [`Growing`], short, so that a disk which answers in 100 µs is not looked for.
//! - **Clients**, while none is: [`Proven`], longer. A client that was called wakes up first, and so would we when it has told
//!   us; where both do, a short batch goes to and fro between two sleepers and most of its time is waking.

use super::Polling;

/// Smallest budget worth the two clock readings that it costs.
const POLL_NS_MIN: u64 = 2_000;

/// A budget that follows the gaps between events: after a sleep that turned out no longer than the maximum it grows, after a
/// longer one it halves, down to nothing.
#[derive(Debug)]
struct Growing {
    max_ns: u64,
    budget_ns: u64,
}

impl Growing {
    fn slept(&mut self, gap_ns: u64) {
        if gap_ns <= self.max_ns {
            self.budget_ns = (self.budget_ns * 2).max(POLL_NS_MIN).min(self.max_ns);
        } else {
            self.budget_ns /= 2;
            if self.budget_ns < POLL_NS_MIN {
                self.budget_ns = 0;
            }
        }
    }
}

/// Misses that a [`Proven`] budget makes good again by so many hits each.
const MISS: u32 = 8;
/// Hits that it remembers.
const SCORE_MAX: u32 = 4 * MISS;
/// Sleeps between two tries, at first and at most.
const PAUSE_MIN: u32 = 8;
const PAUSE_MAX: u32 = 1024;
/// A sleep tells more than the gap: both sides' waking. It is worth a try when it was no longer than so many maxima.
const REACH: u64 = 4;

/// A budget that is the maximum or nothing. It is kept while eight of nine looks find something, and tried now and then after
/// sleeps that say it might: how long a client that is told at once would have taken cannot be seen from one that was not.
#[derive(Debug)]
struct Proven {
    max_ns: u64,
    score: u32,
    pause: u32,
    until_try: u32,
}

impl Proven {
    fn budget_ns(&self) -> u64 {
        if self.score > 0 { self.max_ns } else { 0 }
    }

    fn found(&mut self) {
        self.score = (self.score + 1).min(SCORE_MAX);
        self.pause = PAUSE_MIN;
    }

    fn slept(&mut self, gap_ns: u64) {
        if self.score > 0 {
            self.score = self.score.saturating_sub(MISS);
            if self.score == 0 {
                self.until_try = self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
            }
        } else if gap_ns <= self.max_ns.saturating_mul(REACH) {
            self.until_try = self.until_try.saturating_sub(1);
            if self.until_try == 0 {
                self.score = 1;
            }
        }
    }
}

/// What a thread that has nothing to do waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum For {
    /// Operations in flight.
    Device,
    /// Clients alone.
    Client,
}

/// How the last wait went on.
#[derive(Clone, Copy, Debug)]
enum Waited {
    Not,
    Looking(For),
    Asleep(For),
}

/// Decides between looking and sleeping, from how long waits were.
#[derive(Debug)]
pub(super) struct Poll {
    always: bool,
    device: Growing,
    client: Proven,
    /// When the thread last had something to do.
    active_ns: u64,
    waited: Waited,
}

impl Poll {
    /// Nothing learned yet.
    pub(super) fn new(polling: Polling) -> Self {
        let (device_ns, client_ns, always) = match polling {
            Polling::Adaptive {
                device_ns,
                client_ns,
            } => (device_ns, client_ns, false),
            Polling::Always => (0, 0, true),
        };
        Self {
            always,
            device: Growing {
                max_ns: device_ns,
                budget_ns: 0,
            },
            client: Proven {
                max_ns: client_ns,
                score: 0,
                pause: PAUSE_MIN,
                until_try: PAUSE_MIN,
            },
            active_ns: 0,
            waited: Waited::Not,
        }
    }

    /// Whether to poll where that does not depend on events, so that no clock need be read.
    pub(super) fn fixed(&self) -> Option<bool> {
        (self.device.max_ns == 0 && self.client.max_ns == 0).then_some(self.always)
    }

    /// Something happened at `now_ns`.
    pub(super) fn active(&mut self, now_ns: u64) {
        match std::mem::replace(&mut self.waited, Waited::Not) {
            Waited::Not | Waited::Looking(For::Device) => {}
            Waited::Looking(For::Client) => self.client.found(),
            Waited::Asleep(what) => {
                let gap_ns = now_ns.saturating_sub(self.active_ns);
                match what {
                    For::Device => self.device.slept(gap_ns),
                    For::Client => self.client.slept(gap_ns),
                }
            }
        }
        self.active_ns = now_ns;
    }

    /// Whether to look again at `now_ns` for `what` rather than to sleep.
    pub(super) fn goes_on(&mut self, now_ns: u64, what: For) -> bool {
        let budget_ns = match what {
            For::Device => self.device.budget_ns,
            For::Client => self.client.budget_ns(),
        };
        let looks = now_ns.saturating_sub(self.active_ns) < budget_ns;
        if looks {
            self.waited = Waited::Looking(what);
        }
        looks
    }

    /// The thread is about to sleep for `what`.
    pub(super) fn sleeps(&mut self, what: For) {
        self.waited = Waited::Asleep(what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADAPTIVE: Polling = Polling::Adaptive {
        device_ns: 16_000,
        client_ns: 64_000,
    };

    /// Waits for `count` events, each `gap_ns` after the last (`asleep_ns` for who sleeps when it comes); returns the nanoseconds
    /// looked for all of them, and how many came to a sleeper.
    fn play(poll: &mut Poll, now: &mut u64, what: For, gap_ns: u64, asleep_ns: u64) -> (u64, u32) {
        let (mut looked, mut sleeps) = (0, 0);
        for _ in 0..2000 {
            poll.active(*now);
            let start = *now;
            while *now < start + gap_ns && poll.goes_on(*now, what) {
                *now += 100;
            }
            looked += *now - start;
            if *now < start + gap_ns {
                poll.sleeps(what);
                sleeps += 1;
                *now = start + asleep_ns;
            }
        }
        poll.active(*now);
        (looked, sleeps)
    }

    #[test]
    fn learns_that_looking_for_a_device_pays_and_that_it_does_not() {
        let mut poll = Poll::new(ADAPTIVE);
        let mut now = 1_000_000;
        let mut device = |gap| play(&mut poll, &mut now, For::Device, gap, gap);
        // Events every 5 µs: after a few sleeps it looks for each.
        assert!(device(5_000).1 < 5);
        // Events every 100 µs: looking ends after a few, and costs nothing then.
        let (looked, sleeps) = device(100_000);
        assert!(looked < 32_000 && sleeps == 2000, "{looked}");
        // And comes back.
        assert!(device(5_000).1 < 5);
    }

    #[test]
    fn a_client_that_is_looked_for_is_there_before_one_that_must_wake_us() {
        let mut poll = Poll::new(ADAPTIVE);
        let mut now = 1_000_000;
        let mut client = |gap, asleep| play(&mut poll, &mut now, For::Client, gap, asleep);
        // 40 µs when it wakes alone, 90 when we must wake as well: longer than would ever be looked for.
        assert_eq!(client(40_000, 90_000).1, PAUSE_MIN);
        assert_eq!(client(40_000, 90_000).1, 0);
        // One that thinks for 100 µs is given up, and tried for ever more rarely.
        let (looked, sleeps) = client(100_000, 150_000);
        assert_eq!(sleeps, 2000);
        assert!(looked < 2000 * 1_500, "{looked}");
        // One that rests is not tried at all.
        assert!(client(1_000_000, 1_000_000).0 <= 64_000);
        assert_eq!(client(1_000_000, 1_000_000).0, 0);
        // A busy one is found again.
        assert!(client(40_000, 90_000).1 <= PAUSE_MAX);
        assert_eq!(client(40_000, 90_000).1, 0);
    }

    #[test]
    fn what_was_learned_of_clients_says_nothing_of_devices() {
        let mut poll = Poll::new(ADAPTIVE);
        let mut now = 1_000_000;
        play(&mut poll, &mut now, For::Client, 2_000, 50_000);
        assert_eq!(
            play(&mut poll, &mut now, For::Device, 100_000, 100_000),
            (0, 2000)
        );
        assert_eq!(play(&mut poll, &mut now, For::Client, 2_000, 50_000).1, 0);
    }

    #[test]
    fn one_miss_in_nine_is_borne() {
        let mut poll = Poll::new(ADAPTIVE);
        let mut now = 1_000_000;
        play(&mut poll, &mut now, For::Client, 2_000, 50_000);
        let mut sleeps = 0;
        for turn in 0..9_000 {
            poll.active(now);
            let gap = if turn % 9 == 0 { 500_000 } else { 20_000 };
            let there = now + gap;
            while now < there && poll.goes_on(now, For::Client) {
                now += 100;
            }
            if now < there {
                poll.sleeps(For::Client);
                sleeps += 1;
                now = there;
            }
        }
        assert_eq!(sleeps, 1000, "only those that were missed");
    }

    #[test]
    fn polls_never_when_off() {
        let mut poll = Poll::new(Polling::OFF);
        let mut now = 0;
        assert_eq!(poll.fixed(), Some(false));
        assert_eq!(Poll::new(Polling::Always).fixed(), Some(true));
        assert_eq!(Poll::new(Polling::default()).fixed(), None);
        for what in [For::Device, For::Client] {
            assert_eq!(play(&mut poll, &mut now, what, 1_000, 1_000), (0, 2000));
        }
    }
}
