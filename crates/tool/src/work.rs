//! What long work has in common: it can be stopped, held to a rate, and tells how far it is.

use block::{Error, ErrorKind, Result};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A wish that work ends soon, which any thread may have. Work then gives up with [`ErrorKind::Interrupted`], and
/// leaves what an error leaves.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    wanted: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    fn wanted(&self) -> MutexGuard<'_, bool> {
        self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the end.
    pub fn request(&self) {
        *self.wanted() = true;
        self.0.changed.notify_all();
    }

    /// Fails once the end was asked for.
    ///
    /// # Errors
    ///
    /// `Interrupted`.
    pub fn check(&self) -> Result<()> {
        self.wait(Duration::ZERO)
    }

    /// Sleeps for `time`, or until the end is asked for.
    ///
    /// # Errors
    ///
    /// `Interrupted`.
    pub fn wait(&self, time: Duration) -> Result<()> {
        let mut wanted = self.wanted();
        if !*wanted && !time.is_zero() {
            let waited = self
                .0
                .changed
                .wait_timeout_while(wanted, time, |wanted| !*wanted);
            wanted = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        match *wanted {
            true => Err(Error::new(ErrorKind::Interrupted, "stopped")),
            false => Ok(()),
        }
    }
}

/// How work is done, and who is told of it.
pub struct Work<'a> {
    /// Ends it early.
    pub stop: Stop,
    /// Bytes of data that it may move in a second; `None`: as many as it can.
    pub rate: Option<u64>,
    /// Told how many of the disk's bytes are done, now and then; never less than before.
    pub progress: &'a mut (dyn FnMut(u64) + Send),
    began: Option<Instant>,
    moved: u64,
}

impl fmt::Debug for Work<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work")
            .field("stop", &self.stop)
            .field("rate", &self.rate)
            .field("moved", &self.moved)
            .finish_non_exhaustive()
    }
}

impl<'a> Work<'a> {
    /// Work that `progress` is told of, with no rate.
    pub fn new(stop: Stop, progress: &'a mut (dyn FnMut(u64) + Send)) -> Self {
        Self {
            stop,
            rate: None,
            progress,
            began: None,
            moved: 0,
        }
    }

    /// All before `at` is done.
    ///
    /// # Errors
    ///
    /// `Interrupted` once the end was asked for.
    pub fn reached(&mut self, at: u64) -> Result<()> {
        (self.progress)(at);
        self.stop.check()
    }

    /// `bytes` were moved: waits until the rate allows more.
    ///
    /// # Errors
    ///
    /// `Interrupted` once the end was asked for.
    pub fn moved(&mut self, bytes: u64) -> Result<()> {
        let Some(rate) = self.rate else {
            return Ok(());
        };
        let began = *self.began.get_or_insert_with(Instant::now);
        self.moved = self.moved.saturating_add(bytes);
        self.stop.wait(pause(rate, self.moved, began.elapsed()))
    }
}

/// How long to wait when `moved` bytes took `elapsed`, at a rate of `rate` bytes in a second.
fn pause(rate: u64, moved: u64, elapsed: Duration) -> Duration {
    let micros = u128::from(moved) * 1_000_000 / u128::from(rate.max(1));
    let due = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
    due.saturating_sub(elapsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_asks_for_the_time_that_is_lacking() {
        let second = Duration::from_secs(1);
        assert_eq!(pause(1 << 20, 1 << 20, Duration::ZERO), second);
        assert_eq!(pause(1 << 20, 3 << 20, second), 2 * second);
        assert_eq!(pause(1 << 20, 1 << 20, 2 * second), Duration::ZERO);
        assert!(pause(1, u64::MAX, Duration::ZERO) > 1000 * second);
    }

    #[test]
    fn whoever_waits_is_woken_by_the_wish_to_stop() {
        let stop = Stop::default();
        assert!(stop.check().is_ok());
        let other = stop.clone();
        // Without the wish this would take hours.
        let waiting = std::thread::spawn(move || other.wait(Duration::from_secs(1 << 15)));
        stop.request();
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        assert!(stop.check().is_err());
    }
}
