//! Measurements that were asked for: reads of an image's file. Writes are [`super::durable`]'s.

use super::{
    Advise,
    durable::{self, Durable},
    facts::Facts,
};
use anyhow::Result;
use bench::load::{self, Pattern, Report, Spec, Target};
use block::{RangeKind, Storage, size};
use io::OpenOptions;
use serde::Serialize;
use std::{
    fmt, fs,
    ops::Range,
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Bytes that a file must have to be read at random.
const READ_BYTES_MIN: u64 = 1 << 20;
/// Each way is measured so often, all ways in turn, where the time allows it.
const ROUNDS: u32 = 5;
/// Rounds of which each must agree before what was measured is called clear: with fewer, chance is enough.
const ROUNDS_CLEAR: usize = 3;
/// How much more one way must do than another before anybody should care.
const BETTER: f64 = 1.1;
/// Requests at a time where many are.
const DEEP: u32 = 32;

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Measured {
    /// Random reads of 4 KiB (of more where the device wants that).
    pub rates: Vec<Rate>,
    /// With `--write-test`.
    pub write: Option<Durable>,
    /// What could not be measured.
    pub notes: Vec<String>,
}

/// Reads one way.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Rate {
    pub engine: String,
    pub direct: bool,
    /// Requests at a time of each thread.
    pub depth: u32,
    /// Threads that read.
    pub threads: u32,
    /// How often it was measured.
    pub rounds: usize,
    /// Reads per second: the median of the rounds, the slowest and the fastest.
    pub iops: f64,
    pub iops_min: f64,
    pub iops_max: f64,
    /// Median latency of the median round, in microseconds.
    pub p50_us: f64,
}

impl Rate {
    /// Of the rounds of a way: reads per second, and the median latency.
    fn of(way: &Way, direct: bool, mut rounds: Vec<(f64, f64)>) -> Option<Rate> {
        rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (iops, p50_us) = *rounds.get(rounds.len() / 2)?;
        Some(Rate {
            engine: way.engine.to_owned(),
            direct,
            depth: way.depth,
            threads: way.threads,
            rounds: rounds.len(),
            iops,
            iops_min: rounds.first()?.0,
            iops_max: rounds.last()?.0,
            p50_us,
        })
    }

    /// Whether it does more than `other`, and not by chance: in each round more than that one in any, and more than a little.
    pub(super) fn is_clearly_above(&self, other: &Rate) -> bool {
        self.rounds.min(other.rounds) >= ROUNDS_CLEAR
            && self.iops_min > other.iops_max
            && self.iops > other.iops * BETTER
    }

    /// Its rate, and how far the rounds were apart.
    pub(super) fn words(&self) -> String {
        match self.rounds {
            1 => format!("{:.0}", self.iops),
            n => format!(
                "{:.0} ({:.0} to {:.0} in {n} rounds)",
                self.iops, self.iops_min, self.iops_max
            ),
        }
    }
}

/// A way of reading.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Way {
    engine: String,
    depth: u32,
    threads: u32,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.depth * self.threads {
            1 => write!(f, "{}, one read at a time", self.engine),
            n => write!(f, "{}, {n} reads at a time", self.engine),
        }
    }
}

/// Measures what was asked for, until `deadline`.
pub(super) fn of(args: &Advise, facts: &Facts, deadline: Instant) -> Result<Option<Measured>> {
    if !args.measure && args.write_test.is_none() {
        return Ok(None);
    }
    let mut measured = Measured::default();
    if let (true, Some(path)) = (args.measure, &facts.path) {
        // Half of it where writes follow.
        let left = deadline.saturating_duration_since(Instant::now());
        let until = match args.write_test {
            Some(_) => deadline - left / 2,
            None => deadline,
        };
        reads(&mut measured, facts, path, until);
    }
    if let Some(folder) = &args.write_test {
        let folder = folder.clone();
        // The last write may take longer than those before it.
        let left = deadline.saturating_duration_since(Instant::now());
        let until = deadline - left / 5;
        match within(deadline, move || durable::measure(&folder, until)) {
            Some(write) => measured.write = Some(write?),
            None => measured
                .notes
                .push("writes: not measured: they did not end in time".to_owned()),
        }
    }
    Ok(Some(measured))
}

/// Does `work` on a thread of its own and waits until `deadline`. `None` where it has not ended by then: a device that does not
/// answer cannot be told to, so the thread is left to the end of the process.
fn within<T: Send + 'static>(
    deadline: Instant,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (answer, answered) = mpsc::channel();
    thread::spawn(move || {
        // Nobody may wait for it any more.
        let _ = answer.send(work());
    });
    let left = deadline.saturating_duration_since(Instant::now());
    answered.recv_timeout(left).ok()
}

fn reads(measured: &mut Measured, facts: &Facts, path: &Path, deadline: Instant) {
    let mut note = |text: String| {
        let text = format!("{}: {text}", path.display());
        measured.notes.push(text);
    };
    let length = fs::metadata(path).map_or(0, |meta| meta.len());
    if length < READ_BYTES_MIN && facts.size < READ_BYTES_MIN {
        return note("too small to be read at random".to_owned());
    }
    // Reads of holes and of what was never written bring zeros, without the device.
    let part = match largest_data(path) {
        Ok(part) if part.end - part.start >= READ_BYTES_MIN => part,
        Ok(part) => {
            return note(format!(
                "not measured: its largest piece of data has {}, and reads of holes cost no device time: fill it, or give --write-test",
                size::human(part.end - part.start)
            ));
        }
        Err(error) => return note(format!("not measured: {error}")),
    };
    let block = u64::from(facts.alignment).max(4096);
    let start = part.start.next_multiple_of(block);
    if part.end - part.start < length {
        note(format!(
            "read in its largest piece of data, {} at {start}",
            size::human(part.end - part.start)
        ));
    }
    let spec = Spec {
        pattern: Pattern::RandRead,
        block_bytes: block,
        start_bytes: start,
        range_bytes: Some((part.end - start) / block * block),
        ..Spec::new(Target::File {
            path: path.to_owned(),
            engine: String::new(),
            direct: facts.direct,
        })
    };
    let mut load = |way: &Way, seed: u64, each: Duration| {
        let mut spec = Spec {
            depth: way.depth,
            queues: way.threads,
            seed,
            // What answers one at a time needs no time to fill its queue.
            ramp: match way.depth {
                1 => Duration::ZERO,
                _ => each / 5,
            },
            duration: each - each / 5,
            ..spec.clone()
        };
        if let Target::File { engine, .. } = &mut spec.target {
            engine.clone_from(&way.engine);
        }
        within(deadline, move || load::run(&spec))
    };
    rounds(measured, facts, deadline, &mut load);
}

/// The ways that are measured. The first says how long a read takes that is alone.
fn ways(facts: &Facts) -> Vec<Way> {
    let way = |engine: &str, depth, threads| Way {
        engine: engine.to_owned(),
        depth,
        threads,
    };
    let own = facts.engine.as_str();
    let mut ways = vec![way(own, 1, 1), way(own, DEEP, 1)];
    if facts.cores > 1 {
        ways.push(way(own, DEEP, 2));
    }
    for engine in ["io_uring", "native", "threads"] {
        if engine != own && (engine != "native" || facts.direct) {
            ways.push(way(engine, DEEP, 1));
        }
    }
    ways
}

/// Reads one way, with that seed, for so long and until what is in flight has ended; `None` where it does not end.
type Load<'a> = dyn FnMut(&Way, u64, Duration) -> Option<block::Result<Report>> + 'a;

/// All ways in turn, again and again, as often as what is known of the device says that they end before `deadline`.
fn rounds(measured: &mut Measured, facts: &Facts, deadline: Instant, load: &mut Load<'_>) {
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut ways = ways(facts);
    // A little is for opening files and starting threads.
    let each = left().mul_f64(0.9) / (ROUNDS * ways.len() as u32);
    let mut taken: Vec<(Way, Vec<(f64, f64)>)> = Vec::new();
    // How long one read was under way at most, and how long each way took when it was last measured.
    let mut alone = Duration::ZERO;
    let mut lasted: Vec<Duration> = Vec::new();
    let mut seed = 0;
    'all: for _ in 0..ROUNDS {
        let mut at = 0;
        while let Some(way) = ways.get(at) {
            // What is not known yet may be as bad as all reads of it one behind the other.
            let known = lasted.get(at).copied();
            let costs = known.unwrap_or(each + alone * (way.depth * way.threads));
            if at + seed as usize > 0 && costs > left() {
                if known.is_none() {
                    measured.notes.push(format!(
                        "{way}: not measured: one read took {:.0} ms, so they might not end in time: give more --seconds",
                        alone.as_secs_f64() * 1e3
                    ));
                }
                break 'all;
            }
            let began = Instant::now();
            let report = load(way, seed, each);
            seed += 1;
            let failed = match report {
                Some(Ok(report)) if report.errors == 0 => {
                    if way.depth == 1 {
                        alone = Duration::from_secs_f64(report.latency.max_us / 1e6);
                    }
                    let figures = (report.iops, report.latency.p50_us);
                    match taken.iter_mut().find(|(known, _)| known == way) {
                        Some((_, rounds)) => rounds.push(figures),
                        None => taken.push((way.clone(), vec![figures])),
                    }
                    None
                }
                Some(Ok(report)) => Some(format!("{} reads failed", report.errors)),
                Some(Err(error)) => Some(error.to_string()),
                None => {
                    measured
                        .notes
                        .push(format!("{way}: not measured: they did not end in time"));
                    break 'all;
                }
            };
            match failed {
                // It will not be better the next time.
                Some(why) => {
                    measured.notes.push(format!("{}: {why}", way.engine));
                    ways.remove(at);
                    if at < lasted.len() {
                        lasted.remove(at);
                    }
                }
                None => {
                    match lasted.get_mut(at) {
                        Some(last) => *last = began.elapsed(),
                        None => lasted.push(began.elapsed()),
                    }
                    at += 1;
                }
            }
        }
    }
    let rates = taken.into_iter();
    let rates = rates.filter_map(|(way, rounds)| Rate::of(&way, facts.direct, rounds));
    measured.rates = rates.collect();
}

/// Runs of data that are looked at, at most.
const RUNS_MAX: usize = 100_000;

/// The longest run of a file that is data; all of a device. An empty one where there is none.
fn largest_data(path: &Path) -> Result<Range<u64>> {
    let file = io::File::open(path, &OpenOptions::looking())?;
    let length = file.len()?;
    if file.is_fixed() {
        return Ok(0..length);
    }
    let (mut largest, mut at) = (0..0, 0);
    for _ in 0..RUNS_MAX {
        let Some(run) = file.range_at(at)? else { break };
        at = run.offset + run.len;
        if run.kind == RangeKind::Data && run.len > largest.end - largest.start {
            largest = run.offset..at;
        }
    }
    Ok(largest)
}

impl Measured {
    /// The fastest way of one thread with many reads at a time.
    pub(super) fn best(&self) -> Option<&Rate> {
        let deep = self
            .rates
            .iter()
            .filter(|r| r.depth == DEEP && r.threads == 1);
        deep.max_by(|a, b| a.iops.total_cmp(&b.iops))
    }

    /// Many reads at a time by that engine, of so many threads.
    pub(super) fn of(&self, engine: &str, threads: u32) -> Option<&Rate> {
        let is = |r: &&Rate| r.engine == engine && r.depth == DEEP && r.threads == threads;
        self.rates.iter().find(is)
    }

    /// Median microseconds of a read that is alone, past the page cache.
    pub(super) fn median_alone_us(&self) -> Option<f64> {
        let mut alone = self.rates.iter().filter(|r| r.depth == 1 && r.direct);
        alone.next().map(|rate| rate.p50_us)
    }

    /// For people.
    pub(super) fn lines(&self) -> Vec<String> {
        let rates = self.rates.iter().map(|rate| {
            format!(
                "{}{}, depth {}{}: {} random reads/s, median {:.0} µs",
                rate.engine,
                if rate.direct { ", O_DIRECT" } else { "" },
                rate.depth,
                match rate.threads {
                    1 => String::new(),
                    n => format!(" on each of {n} threads"),
                },
                rate.words(),
                rate.p50_us
            )
        });
        let mut lines: Vec<String> = rates.collect();
        lines.extend(self.write.as_ref().map(Durable::line));
        lines.extend(self.notes.iter().cloned());
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FallocateFlags, fallocate};
    use std::{fs::File, os::unix::fs::FileExt};

    /// Reads that took so long at most, so many per second.
    fn report(iops: f64, max_us: f64) -> Option<block::Result<Report>> {
        let mut report = Report {
            iops,
            ..Report::default()
        };
        (report.latency.max_us, report.latency.p50_us) = (max_us, max_us);
        Some(Ok(report))
    }

    /// What `load` makes of a file that io_uring is chosen for, in a minute.
    fn measure(load: &mut Load<'_>) -> Measured {
        let facts = Facts {
            engine: "io_uring".to_owned(),
            direct: true,
            cores: 2,
            ..Facts::default()
        };
        let mut measured = Measured::default();
        let deadline = Instant::now() + Duration::from_secs(60);
        rounds(&mut measured, &facts, deadline, load);
        measured
    }

    #[test]
    fn ways_take_turns_and_the_median_round_counts() {
        let mut order = Vec::new();
        let measured = measure(&mut |way, seed, _| {
            order.push((way.clone(), seed));
            report(f64::from(way.depth) * 100.0 + (seed * 7 % 25) as f64, 50.0)
        });
        assert_eq!(measured.notes, [""; 0]);
        // Five ways, five times, no two with the same places.
        assert_eq!((measured.rates.len(), order.len()), (5, 25));
        for (nth, (way, seed)) in order.iter().enumerate() {
            assert_eq!((way, *seed), (&order[nth % 5].0, nth as u64));
        }
        for (at, rate) in measured.rates.iter().enumerate() {
            let of = |round: u64| {
                f64::from(rate.depth) * 100.0 + ((at as u64 + 5 * round) * 7 % 25) as f64
            };
            let mut all: Vec<f64> = (0..5).map(of).collect();
            all.sort_by(f64::total_cmp);
            assert_eq!((rate.rounds, rate.iops), (5, all[2]));
            assert_eq!((rate.iops_min, rate.iops_max), (all[0], all[4]));
        }
        assert_eq!(measured.median_alone_us(), Some(50.0));
    }

    #[test]
    fn what_would_not_end_in_time_is_not_begun() {
        let mut loads = 0;
        let measured = measure(&mut |_, _, _| {
            loads += 1;
            report(0.5, 2e6)
        });
        // 32 reads one behind the other would take 64 seconds.
        assert_eq!((loads, measured.rates.len()), (1, 1));
        let note = &measured.notes[0];
        assert!(
            note.contains("32 reads at a time: not measured: one read took 2000 ms"),
            "{note}"
        );
        // Reads that never end stop everything; one way that fails only itself.
        let measured = measure(&mut |way, _, _| match (way.depth, way.engine.as_str()) {
            (1, _) => report(1.0, 10.0),
            (_, "io_uring") if way.threads == 1 => {
                Some(Err(block::Error::invalid("no such thing")))
            }
            (_, "threads") => None,
            _ => report(2.0, 10.0),
        });
        let depths: Vec<_> = measured
            .rates
            .iter()
            .map(|r| (r.depth, r.threads, r.rounds))
            .collect();
        assert_eq!(depths, [(1, 1, 1), (32, 2, 1), (32, 1, 1)]);
        assert_eq!(measured.notes[0], "io_uring: no such thing");
        assert!(measured.notes[1].contains("did not end in time"));
    }

    #[test]
    fn who_does_not_answer_is_left() {
        let (release, hold) = mpsc::channel::<()>();
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(within(soon, move || hold.recv().is_ok()), None);
        drop(release);
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(within(later, || 5), Some(5));
    }

    #[test]
    fn the_largest_piece_of_data_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        assert!(largest_data(&path).unwrap().is_empty());
        for (at, bytes) in [(1, 1), (8, 3), (20, 2)] {
            file.write_all_at(&vec![1; bytes << 20], at << 20).unwrap();
        }
        assert_eq!(largest_data(&path).unwrap(), 8 << 20..11 << 20);
        // Allocated is not written.
        fallocate(&file, FallocateFlags::KEEP_SIZE, 32 << 20, 16 << 20).unwrap();
        file.sync_all().unwrap();
        assert_eq!(largest_data(&path).unwrap(), 8 << 20..11 << 20);
    }
}
