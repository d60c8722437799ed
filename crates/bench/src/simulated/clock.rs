//! A model against the clock: requests come when they come, and are answered when the model says that they end.

use super::{Array, Done, Nanos, Op, Request};
use crate::load::Latencies;
use block::{Context, Error, Result};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How late a thread may be woken, nanoseconds: the default of 50 µs would be as much as a fast device takes.
const SLACK_NS: u64 = 1;

/// What a request waits for: called once when it ends.
pub(super) type Answer = Box<dyn FnOnce() + Send>;

struct State {
    array: Array,
    answers: HashMap<u64, Answer>,
    next: u64,
    late: Latencies,
    ends: bool,
}

struct Shared {
    began: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn now(&self) -> Nanos {
        super::nanos(self.began.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How well the times of a model were kept.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Kept {
    /// Requests that were answered.
    pub requests: u64,
    /// By how much half of the answers came after their time at most, microseconds.
    pub late_p50_us: f64,
    /// 99 of 100.
    pub late_p99_us: f64,
    /// All.
    pub late_max_us: f64,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} requests; answers came after their time in the model by {:.0} µs (p50), {:.0} µs (p99), {:.0} µs at most",
            self.requests, self.late_p50_us, self.late_p99_us, self.late_max_us
        )
    }
}

/// A model at work. Dropping it drops what waits.
pub(super) struct Clock {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clock").finish_non_exhaustive()
    }
}

impl Clock {
    pub(super) fn start(array: Array) -> Result<Self> {
        let shared = Arc::new(Shared {
            began: Instant::now(),
            state: Mutex::new(State {
                array,
                answers: HashMap::new(),
                next: 0,
                late: Latencies::default(),
                ends: false,
            }),
            changed: Condvar::new(),
        });
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("clock".into())
            .spawn(move || run(&own))
            .context(|| "start a thread".to_owned())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Has `answer` called when the model is through with a request that comes now.
    pub(super) fn submit(&self, op: Op, offset: u64, bytes: u64, answer: Answer) {
        let mut state = self.shared.lock();
        let id = state.next;
        state.next += 1;
        let now = self.shared.now();
        let request = Request {
            id,
            op,
            offset,
            bytes,
        };
        state.array.submit(now, request);
        state.answers.insert(id, answer);
        drop(state);
        self.shared.changed.notify_one();
    }

    pub(super) fn kept(&self) -> Kept {
        let late = self.shared.lock().late.percentiles();
        Kept {
            requests: late.count,
            late_p50_us: late.p50_us,
            late_p99_us: late.p99_us,
            late_max_us: late.max_us,
        }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!(
                "{}",
                Error::invalid("the clock of a simulated device panicked")
            );
        }
    }
}

fn run(shared: &Shared) {
    // Where it cannot be set, answers are later; `Kept` says by how much.
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(SLACK_NS));
    let mut done: Vec<Done> = Vec::new();
    let mut due: Vec<Answer> = Vec::new();
    let mut state = shared.lock();
    while !state.ends {
        let now = shared.now();
        state.array.advance(now, &mut done);
        for one in done.drain(..) {
            if let Some(answer) = state.answers.remove(&one.id) {
                state
                    .late
                    .add(Duration::from_nanos(now.saturating_sub(one.at)));
                due.push(answer);
            }
        }
        if !due.is_empty() {
            drop(state);
            due.drain(..).for_each(|answer| answer());
            state = shared.lock();
            continue;
        }
        let unlocked = match state.array.next() {
            None => shared.changed.wait(state),
            Some(at) => {
                let left = Duration::from_nanos(at.saturating_sub(shared.now()));
                let waited = shared.changed.wait_timeout(state, left);
                waited
                    .map(|(state, _)| state)
                    .map_err(|poisoned| PoisonError::new(poisoned.into_inner().0))
            }
        };
        state = unlocked.unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulated::{Model, Setup};
    use std::sync::mpsc;

    #[test]
    fn nothing_is_answered_before_its_time_and_all_once() {
        let setup = Setup {
            model: Model::Flash {
                read: Duration::from_millis(2),
                write: Duration::from_millis(1),
                channels: 1,
            },
            ..Setup::new(1 << 20)
        };
        let clock = Clock::start(setup.build().unwrap()).unwrap();
        let (say, heard) = mpsc::channel();
        let began = Instant::now();
        for n in 0..20_u64 {
            let say = say.clone();
            let answer = move || say.send((n, began.elapsed())).unwrap();
            clock.submit(Op::Read, n * 4096, 4096, Box::new(answer));
        }
        for n in 0..20 {
            let (which, when) = heard.recv().unwrap();
            assert_eq!(which, n);
            // Its turn, and those before it; the clock began a little before ours.
            let least = Duration::from_micros((n + 1) * 2000 - 1);
            assert!(when >= least, "{n}: {when:?}");
        }
        assert_eq!(clock.kept().requests, 20);
        // What waits when it ends is dropped, not answered.
        let late = say.clone();
        let never = move || late.send((99, Duration::ZERO)).unwrap();
        clock.submit(Op::Read, 0, 4096, Box::new(never));
        drop(say);
        drop(clock);
        assert!(heard.recv().is_err());
    }
}
