//! Loads that run in turns of some milliseconds, so that what drifts (a device, the machine) drifts for all of them.

use block::{Error, ErrorKind, Result};
use std::{
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

/// One turn of a load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// How long it runs without being counted.
    pub ramp: Duration,
    /// How long it is counted then; not at all where this is zero.
    pub measure: Duration,
}

/// The load's end.
#[derive(Debug)]
pub(crate) struct Turns {
    orders: Receiver<Turn>,
    over: Sender<()>,
}

impl Turns {
    /// The next turn; `None` when there are no more.
    pub(crate) fn next(&self) -> Option<Turn> {
        self.orders.recv().ok()
    }

    /// The turn is over, and nothing is in flight.
    pub(crate) fn over(&self) {
        // Nobody who waits for it needs to be told.
        let _ = self.over.send(());
    }
}

/// The end of those who say whose turn it is. Dropping it ends the load.
#[derive(Debug)]
pub(crate) struct Caller {
    orders: Sender<Turn>,
    over: Receiver<()>,
}

impl Caller {
    /// Lets the load go; [`Self::wait`] is to follow.
    ///
    /// # Errors
    ///
    /// The load has ended: it says why.
    pub(crate) fn go(&self, turn: Turn) -> Result<()> {
        self.orders.send(turn).map_err(|_| ended())
    }

    /// Waits until its turn is over.
    ///
    /// # Errors
    ///
    /// As above.
    pub(crate) fn wait(&self) -> Result<()> {
        self.over.recv().map_err(|_| ended())
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Io, "the load has ended")
}

/// Both ends.
pub(crate) fn turns() -> (Caller, Turns) {
    let (orders, taken) = channel();
    let (over, seen) = channel();
    (
        Caller { orders, over: seen },
        Turns {
            orders: taken,
            over,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Report, Spec, Target, run_by};
    use std::thread;

    /// Reads of a file in `count` turns after one that is not counted.
    fn reads(count: u32) -> Report {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let spec = Spec {
            queues: 2,
            depth: 4,
            ..Spec::new(Target::File {
                path: file.path().to_owned(),
                engine: "threads".to_owned(),
                direct: false,
            })
        };
        let (caller, turns) = turns();
        let turn = |ms| Turn {
            ramp: Duration::from_millis(1),
            measure: Duration::from_millis(ms),
        };
        thread::scope(|scope| {
            let load = scope.spawn({
                let spec = &spec;
                move || run_by(spec, Some(&turns))
            });
            for n in 0..=count {
                caller.go(turn(if n == 0 { 0 } else { 10 })).unwrap();
                caller.wait().unwrap();
            }
            drop(caller);
            load.join().unwrap().unwrap()
        })
    }

    #[test]
    fn only_turns_count() {
        assert_eq!(reads(0).reads, 0);
        let report = reads(3);
        assert!(report.reads > 0 && report.errors == 0);
        // The time between turns is not part of it; the host may make each longer, but not shorter.
        assert!(report.seconds >= 0.03, "{}", report.seconds);
        // What was in flight at the end of a turn is noted, and no I/O of the turn.
        let noted = report.latency.count - report.reads;
        assert!(noted <= 3 * 8, "{noted}");
    }

    /// What a server uses cannot be asked for while the load runs well: that is an error, and the load ends.
    #[test]
    fn a_load_whose_server_cannot_be_asked_ends() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let target = Target::File {
            path: file.path().to_owned(),
            engine: "threads".to_owned(),
            direct: false,
        };
        let spec = Spec {
            control: Some("/no/such/socket".into()),
            ..Spec::new(target)
        };
        let (caller, turns) = turns();
        thread::scope(|scope| {
            let load = scope.spawn(move || run_by(&spec, Some(&turns)));
            let turn = Turn {
                ramp: Duration::ZERO,
                measure: Duration::from_millis(1),
            };
            caller.go(turn).unwrap();
            let error = load.join().unwrap().unwrap_err().to_string();
            assert!(error.contains("/no/such/socket"), "{error}");
        });
    }

    #[test]
    fn who_calls_learns_that_the_load_has_ended() {
        let (caller, turns) = turns();
        drop(turns);
        let turn = Turn {
            ramp: Duration::ZERO,
            measure: Duration::ZERO,
        };
        assert!(caller.go(turn).is_err() && caller.wait().is_err());
    }
}
