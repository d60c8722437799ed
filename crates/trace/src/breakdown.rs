//! Where time goes in a run, as the latency study of Xen and XenServer does it ("Xen and XenServer Storage
//! Performance", F. Franciosi, 2013): 100 reads one after the other, one at a time; the 10 fastest and the 10 slowest are
//! left out; the whole is done 10 times, and the means are averaged.
//!
//! Where the client's own clock is known ([`Sample`]), two more parts tell what happened outside the server: from the
//! client's kick to the server's awakening, and from the server's call to the client's. All parts add up to what
//! the client waited.

use crate::{
    entry::Entry,
    stage::{STAGES, Stage, Times},
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A part of a request's time: a stage in the server, or one of the two ways to it and back. Stored as its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "&'static str", try_from = "String")]
pub enum Part {
    /// From the client's request to the server's awakening.
    Kick,
    /// In the server.
    In(Stage),
    /// From the server's notification to the client that has its answer.
    Return,
}

impl Part {
    /// All, in order.
    pub const ALL: [Part; STAGES + 2] = {
        let mut all = [Part::Kick; STAGES + 2];
        let mut nth = 0;
        while nth < STAGES {
            all[nth + 1] = Part::In(Stage::ALL[nth]);
            nth += 1;
        }
        all[STAGES + 1] = Part::Return;
        all
    };

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Part::Kick => "kick",
            Part::In(stage) => stage.name(),
            Part::Return => "return",
        }
    }

    fn is_outside(self) -> bool {
        matches!(self, Part::Kick | Part::Return)
    }
}

impl From<Part> for &'static str {
    fn from(part: Part) -> Self {
        part.name()
    }
}

impl TryFrom<String> for Part {
    type Error = block::Error;

    fn try_from(name: String) -> block::Result<Self> {
        match name.as_str() {
            "kick" => Ok(Part::Kick),
            "return" => Ok(Part::Return),
            stage => stage.parse().map(Part::In),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One request's parts, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// In the server.
    pub stages: Times,
    /// Before it and behind it, where the client's clock is known.
    pub outside: Option<(u64, u64)>,
}

impl Sample {
    /// What the server knows alone.
    pub fn of(entry: &Entry) -> Self {
        Self {
            stages: entry.stages_ns,
            outside: None,
        }
    }

    /// With the client's `began_ns` and `ended_ns`, of the same clock. Whatever the server's notification took
    /// beyond the moment at which the client had its answer is left out, so that the parts add up to the client's time.
    pub fn with_client(entry: &Entry, began_ns: u64, ended_ns: u64) -> Self {
        let ended_ns = ended_ns.max(began_ns);
        let mut stages = entry.stages_ns;
        let before = entry.begin_ns.saturating_sub(began_ns);
        let whole = ended_ns - began_ns;
        // A server that looked at its ring already may have arrived before the client had kicked it, and a client that
        // looks at its own may be gone before the server has called it.
        let early = began_ns.saturating_sub(entry.begin_ns);
        let early = early.min(stages[Stage::Ring]);
        stages[Stage::Ring] -= early;
        let mut over = (before + stages.total()).saturating_sub(whole);
        for stage in Stage::ALL.into_iter().rev() {
            let cut = over.min(stages[stage]);
            stages[stage] -= cut;
            over -= cut;
        }
        let before = before - over;
        Self {
            stages,
            outside: Some((before, whole - before - stages.total())),
        }
    }

    /// Nanoseconds of `part`.
    pub fn part_ns(&self, part: Part) -> u64 {
        match part {
            Part::Kick => self.outside.map_or(0, |(before, _)| before),
            Part::Return => self.outside.map_or(0, |(_, behind)| behind),
            Part::In(stage) => self.stages[stage],
        }
    }

    /// Nanoseconds of all parts.
    pub fn total_ns(&self) -> u64 {
        let (before, behind) = self.outside.unwrap_or_default();
        self.stages
            .total()
            .saturating_add(before)
            .saturating_add(behind)
    }
}

/// Mean time of a part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartTime {
    /// Which.
    pub part: Part,
    /// Mean over the runs of each one's mean, in nanoseconds.
    pub mean_ns: f64,
    /// Standard deviation of the runs' means; 0 for one run.
    pub deviation_ns: f64,
    /// Share of the whole, 0 to 1.
    pub share: f64,
}

/// Where time went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Breakdown {
    /// Runs of which it is the average.
    pub runs: usize,
    /// Requests of each run, those left out included.
    pub requests: usize,
    /// Fastest requests that were left out of each run, and as many of the slowest.
    pub dropped: usize,
    /// The parts, in order. [`Part::Kick`] and [`Part::Return`] are there only where the client's times are known.
    pub parts: Vec<PartTime>,
    /// All parts together: mean nanoseconds.
    pub total_ns: f64,
    /// Standard deviation of the runs' means of the whole.
    pub total_deviation_ns: f64,
}

impl Breakdown {
    /// Averages `runs`, each without its `drop` fastest and `drop` slowest requests. `None` where no request is left in
    /// one of them, or there are none.
    pub fn new(runs: &[Vec<Sample>], drop: usize) -> Option<Breakdown> {
        let mut means: Vec<[f64; Part::ALL.len()]> = Vec::with_capacity(runs.len());
        for run in runs {
            let mut run = run.clone();
            run.sort_by_key(Sample::total_ns);
            let end = run.len().checked_sub(drop)?;
            let kept = run.get(drop..end).filter(|kept| !kept.is_empty())?;
            means.push(Part::ALL.map(|part| {
                // Below 2^53 for any run that ends.
                let sum: u64 = kept.iter().map(|sample| sample.part_ns(part)).sum();
                sum as f64 / kept.len() as f64
            }));
        }
        let totals: Vec<f64> = means.iter().map(|run| run.iter().sum()).collect();
        let (total_ns, total_deviation_ns) = mean_and_deviation(&totals)?;
        let knows_client = runs.iter().flatten().all(|sample| sample.outside.is_some());
        let mut parts = Vec::with_capacity(Part::ALL.len());
        for (index, part) in Part::ALL.into_iter().enumerate() {
            if part.is_outside() && !knows_client {
                continue;
            }
            let of_runs: Vec<f64> = means.iter().map(|run| run[index]).collect();
            let (mean_ns, deviation_ns) = mean_and_deviation(&of_runs)?;
            let share = if total_ns > 0.0 {
                mean_ns / total_ns
            } else {
                0.0
            };
            parts.push(PartTime {
                part,
                mean_ns,
                deviation_ns,
                share,
            });
        }
        Some(Breakdown {
            runs: runs.len(),
            requests: runs.iter().map(Vec::len).max()?,
            dropped: drop,
            parts,
            total_ns,
            total_deviation_ns,
        })
    }

    /// Mean nanoseconds of a part; 0 for one that is not there.
    pub fn part_ns(&self, part: Part) -> f64 {
        let found = self.parts.iter().find(|time| time.part == part);
        found.map_or(0.0, |time| time.mean_ns)
    }
}

/// Mean, and the deviation of a sample.
fn mean_and_deviation(values: &[f64]) -> Option<(f64, f64)> {
    if values.is_empty() {
        return None;
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = match values.len() {
        1 => 0.0,
        n => (squares / (n - 1) as f64).sqrt(),
    };
    Some((mean, deviation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Operation, Status};

    fn entry(begin_ns: u64, stages: [u64; 8]) -> Entry {
        Entry {
            number: 0,
            operation: Operation::Read,
            offset: 0,
            bytes: 4096,
            status: Status::Ok,
            begin_ns,
            stages_ns: Times(stages),
        }
    }

    #[test]
    fn the_fastest_and_slowest_are_left_out() {
        let run = |device: &[u64]| -> Vec<Sample> {
            let samples = device.iter().map(|device| {
                let stages = [10, 20, 30, 40, *device, 0, 50, 60];
                Sample::of(&entry(1, stages))
            });
            samples.collect()
        };
        let runs = [run(&[9999, 100, 300, 1]), run(&[700, 0, 100_000, 500])];
        let breakdown = Breakdown::new(&runs, 1).unwrap();
        assert_eq!(
            breakdown.part_ns(Part::In(Stage::Device)),
            (200.0 + 600.0) / 2.0
        );
        assert_eq!(breakdown.part_ns(Part::In(Stage::Parse)), 20.0);
        assert_eq!(breakdown.total_ns, 210.0 + 400.0);
        assert_eq!((breakdown.runs, breakdown.requests), (2, 4));
        let deviation = (2.0f64 * 200.0 * 200.0).sqrt();
        assert!((breakdown.total_deviation_ns - deviation).abs() < 1e-9);
        let shares: f64 = breakdown.parts.iter().map(|part| part.share).sum();
        assert!((shares - 1.0).abs() < 1e-9);
        // Who knows nothing of the client says nothing of it.
        assert_eq!(breakdown.parts.len(), 8);
        assert_eq!(Breakdown::new(&runs, 2), None);
        assert_eq!(Breakdown::new(&runs, 3), None);
        assert_eq!(Breakdown::new(&[], 0), None);
    }

    #[test]
    fn parts_are_stored_as_their_names() {
        let text = serde_json::to_string(&Part::ALL.to_vec()).unwrap();
        assert_eq!(
            text,
            "[\"kick\",\"ring\",\"parse\",\"map\",\"submit\",\"device\",\"commit\",\"complete\",\"notify\",\"return\"]"
        );
        assert_eq!(serde_json::from_str::<Vec<Part>>(&text).unwrap(), Part::ALL);
        assert!(serde_json::from_str::<Part>("\"lunch\"").is_err());
    }

    #[test]
    fn parts_add_up_to_what_the_client_waited() {
        let stages = [5, 5, 10, 10, 100, 0, 10, 60];
        let plain = Sample::with_client(&entry(1030, stages), 1000, 1300);
        assert_eq!(plain.outside, Some((30, 70)));
        assert_eq!(plain.total_ns(), 300);
        // The client had its answer while the server still wrote to its eventfd.
        let early = Sample::with_client(&entry(1030, stages), 1000, 1200);
        assert_eq!(early.outside, Some((30, 0)));
        assert_eq!(early.stages[Stage::Notify], 30);
        assert_eq!(early.total_ns(), 200);
        // The server was looking at the ring before the client had begun.
        let looking = Sample::with_client(&entry(997, stages), 1000, 1300);
        assert_eq!(looking.stages[Stage::Ring], 2);
        assert_eq!(looking.outside, Some((0, 103)));
        assert_eq!(looking.total_ns(), 300);
        // Clocks that do not fit at all.
        let odd = Sample::with_client(&entry(5000, stages), 1000, 1300);
        assert_eq!((odd.outside, odd.total_ns()), (Some((300, 0)), 300));
        let odd = Sample::with_client(&entry(1, stages), 1300, 1000);
        assert_eq!(odd.total_ns(), 0);
    }

    #[test]
    fn breakdowns_are_read_back() {
        let runs = [vec![Sample::with_client(
            &entry(10, [1, 2, 3, 4, 5, 6, 7, 8]),
            8,
            72,
        )]];
        let breakdown = Breakdown::new(&runs, 0).unwrap();
        assert_eq!(breakdown.parts.len(), 10);
        let json = serde_json::to_string(&breakdown).unwrap();
        assert_eq!(serde_json::from_str::<Breakdown>(&json).unwrap(), breakdown);
        for time in &breakdown.parts {
            assert_eq!(serde_json::to_value(time.part).unwrap(), time.part.name());
        }
    }
}
