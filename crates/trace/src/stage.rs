//! The stages of a request, and how long each took.

use serde::{Deserialize, Serialize};
use std::{
    fmt,
    ops::{Index, IndexMut},
    str::FromStr,
};

/// A stage of a request's way through a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// In the guest's ring or the client's socket: from the awakening that it caused to being taken. Waiting behind
    /// others that came with it counts. What came while the server was looking anyway arrived, as far as it can know,
    /// when it looked.
    Ring,
    /// Reading it from there and checking it. Only where that costs next to nothing the clock is read for it: for the
    /// first request of a batch of a virtqueue that comes 4 microseconds or more after the one before it. For others this
    /// counts as [`Stage::Map`].
    Parse,
    /// Asking the formats where its bytes are or go.
    Map,
    /// Waiting for the rest of its batch, to be submitted with it.
    Submit,
    /// At the device: the call that submits, the operations themselves, metadata that had to be read first, and waking up.
    Device,
    /// Waiting for the commit that makes it durable.
    Commit,
    /// Its answer into the ring or socket.
    Complete,
    /// Telling the guest (`call`); where batches come faster, as above, it counts as [`Stage::Complete`].
    Notify,
}

/// How many there are.
pub const STAGES: usize = 8;

impl Stage {
    /// All, in the order in which a request goes through them.
    pub const ALL: [Stage; STAGES] = [
        Stage::Ring,
        Stage::Parse,
        Stage::Map,
        Stage::Submit,
        Stage::Device,
        Stage::Commit,
        Stage::Complete,
        Stage::Notify,
    ];

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Ring => "ring",
            Stage::Parse => "parse",
            Stage::Map => "map",
            Stage::Submit => "submit",
            Stage::Device => "device",
            Stage::Commit => "commit",
            Stage::Complete => "complete",
            Stage::Notify => "notify",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Stage {
    type Err = block::Error;

    fn from_str(name: &str) -> block::Result<Self> {
        let found = Stage::ALL.into_iter().find(|stage| stage.name() == name);
        found.ok_or_else(|| {
            let names = Stage::ALL.map(Stage::name).join(", ");
            block::Error::invalid(format!("there is no stage '{name}'; there are {names}"))
        })
    }
}

/// When a request reached the end of each stage; nanoseconds of the monotonic clock. 0: it did not go through that one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamps {
    /// The server woke for it.
    pub arrived: u64,
    /// Taken from the ring.
    pub taken: u64,
    /// Read and checked.
    pub parsed: u64,
    /// All of it that needs no waiting is staged at the engine.
    pub mapped: u64,
    /// Handed in with its batch.
    pub submitted: u64,
    /// The last of its operations ended.
    pub device_done: u64,
    /// Durable where it must be.
    pub completed: u64,
    /// The answer is where the client finds it.
    pub told: u64,
    /// The client was woken.
    pub notified: u64,
}

impl Stamps {
    /// How long each stage took. One that the request did not go through, or whose end was seen before its
    /// beginning, took no time: the sum is always the time from the first stamp to the last.
    #[inline]
    pub fn times(&self) -> Times {
        let ends = [
            self.taken,
            self.parsed,
            self.mapped,
            self.submitted,
            self.device_done,
            self.completed,
            self.told,
            self.notified,
        ];
        let mut times = Times::default();
        let mut last = self.begin();
        // By index, which is unrolled: every request that ends comes by here.
        #[allow(clippy::needless_range_loop)]
        for stage in 0..STAGES {
            times.0[stage] = ends[stage].saturating_sub(last);
            last = last.max(ends[stage]);
        }
        times
    }

    /// The first stamp.
    #[inline]
    pub fn begin(&self) -> u64 {
        // Who cannot say when a request arrived saw it when it was taken.
        match self.arrived {
            0 => self.taken,
            arrived => arrived,
        }
    }
}

/// Nanoseconds per stage. As JSON an object with each stage's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Named", into = "Named")]
pub struct Times(pub [u64; STAGES]);

impl Times {
    /// All stages together.
    #[inline]
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, ns| sum.saturating_add(*ns))
    }
}

impl Index<Stage> for Times {
    type Output = u64;

    fn index(&self, stage: Stage) -> &u64 {
        &self.0[stage as usize]
    }
}

impl IndexMut<Stage> for Times {
    fn index_mut(&mut self, stage: Stage) -> &mut u64 {
        &mut self.0[stage as usize]
    }
}

#[derive(Serialize, Deserialize)]
struct Named {
    ring: u64,
    parse: u64,
    map: u64,
    submit: u64,
    device: u64,
    commit: u64,
    complete: u64,
    notify: u64,
}

impl From<Named> for Times {
    fn from(n: Named) -> Self {
        Times([
            n.ring, n.parse, n.map, n.submit, n.device, n.commit, n.complete, n.notify,
        ])
    }
}

impl From<Times> for Named {
    fn from(times: Times) -> Self {
        let [ring, parse, map, submit, device, commit, complete, notify] = times.0;
        Named {
            ring,
            parse,
            map,
            submit,
            device,
            commit,
            complete,
            notify,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_add_up_whatever_is_missing() {
        let whole = Stamps {
            arrived: 100,
            taken: 110,
            parsed: 130,
            mapped: 160,
            submitted: 200,
            device_done: 1000,
            completed: 1500,
            told: 1507,
            notified: 1600,
        };
        let times = whole.times();
        assert_eq!(times.0, [10, 20, 30, 40, 800, 500, 7, 93]);
        assert_eq!(times.total(), 1500);
        // Ended in memory: no operation at all.
        let hit = Stamps {
            mapped: 0,
            submitted: 0,
            device_done: 0,
            ..whole
        };
        assert_eq!(hit.times().0, [10, 20, 0, 0, 0, 1370, 7, 93]);
        assert_eq!(hit.times().total(), 1500);
        // A stamp that is older than the one before it.
        let odd = Stamps {
            device_done: 150,
            ..whole
        };
        assert_eq!(odd.times().0, [10, 20, 30, 40, 0, 1300, 7, 93]);
        // Nobody knows when it arrived.
        let polled = Stamps {
            arrived: 0,
            ..whole
        };
        assert_eq!(polled.times()[Stage::Ring], 0);
        assert_eq!(polled.times().total(), 1490);
    }

    #[test]
    fn times_are_named_in_json() {
        let times = Times([1, 2, 3, 4, 5, 6, 7, 8]);
        let text = serde_json::to_string(&times).unwrap();
        assert!(text.starts_with(r#"{"ring":1,"parse":2,"#), "{text}");
        assert_eq!(serde_json::from_str::<Times>(&text).unwrap(), times);
        for stage in Stage::ALL {
            assert_eq!(stage.name().parse::<Stage>().unwrap(), stage);
            assert_eq!(times[stage], stage as u64 + 1);
            let json = serde_json::to_value(stage).unwrap();
            assert_eq!(json, stage.name());
        }
        assert!("devices".parse::<Stage>().is_err());
    }
}
