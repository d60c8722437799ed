//! The breakdown of the latency study ([`trace::breakdown`]): requests one after the other at a server, each timed here
//! and, stage by stage, by the server; both read the same clock of the machine.

use crate::{load::Target, single};
use block::{Context, Error, ErrorKind, Result, size};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use trace::{Breakdown, Entry, Operation, RING_ENTRIES_MAX, breakdown::Sample};

/// Bytes of a request at most.
pub const BLOCK_BYTES_MAX: u64 = 4 << 20;

/// How long a server may take to note what it has answered.
const NOTED: Duration = Duration::from_secs(5);

/// What is done.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// [`Operation::Read`], [`Operation::Write`] or [`Operation::Flush`].
    pub operation: Operation,
    /// At random offsets; otherwise one behind the other.
    pub random: bool,
    /// Bytes of a request, a multiple of 512 and [`BLOCK_BYTES_MAX`] at most.
    pub block_bytes: u64,
    /// Requests of a run, at most as many as a server can remember ([`RING_ENTRIES_MAX`]).
    pub requests: usize,
    /// Fastest, and slowest, requests of a run that are left out.
    pub dropped: usize,
    /// Runs that are averaged.
    pub runs: usize,
    /// Requests before the first run, which do not count: the study found that there is a time of warming up.
    pub warm_up: usize,
}

impl Default for Protocol {
    /// The study's, of 4 KiB.
    fn default() -> Self {
        Self {
            operation: Operation::Read,
            random: false,
            block_bytes: 4096,
            requests: 100,
            dropped: 10,
            runs: 10,
            warm_up: 100,
        }
    }
}

impl Protocol {
    /// Requests of a run at most: a server remembers them all, of a flush the read and the write before it too.
    fn requests_max(&self) -> usize {
        match self.operation {
            Operation::Flush => RING_ENTRIES_MAX as usize / 3,
            _ => RING_ENTRIES_MAX as usize,
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::invalid(what));
        if !matches!(
            self.operation,
            Operation::Read | Operation::Write | Operation::Flush
        ) {
            return wrong(format!("{} cannot be asked for here", self.operation));
        }
        if self.block_bytes == 0
            || !self.block_bytes.is_multiple_of(512)
            || self.block_bytes > BLOCK_BYTES_MAX
        {
            return wrong(format!(
                "requests of {} bytes: multiples of 512 up to {} are possible",
                self.block_bytes,
                size::human(BLOCK_BYTES_MAX)
            ));
        }
        if self.runs == 0
            || self.requests == 0
            || self.requests.max(self.warm_up) > self.requests_max()
        {
            return wrong(format!(
                "{} runs of {} requests: at least one of each, and {} requests at most",
                self.runs,
                self.requests,
                self.requests_max()
            ));
        }
        if self.dropped.saturating_mul(2) >= self.requests {
            return wrong(format!(
                "without the {} fastest and the {} slowest of {} requests none is left",
                self.dropped, self.dropped, self.requests
            ));
        }
        Ok(())
    }
}

/// A breakdown, and of what: the answer of `trace breakdown`, as it prints it with `--json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// What was measured: the image, or the control socket.
    pub subject: String,
    /// `vhost-user` or `nbd`; lacks for a running server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<String>,
    /// The engine; lacks for a running server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// Which requests.
    pub operation: String,
    /// Bytes of each; lacks for a running server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_bytes: Option<u64>,
    /// Where their time went.
    pub breakdown: Breakdown,
}

/// Bytes of such an answer at most.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

impl Answer {
    /// Reads one that `trace breakdown --json` printed.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is none.
    pub fn read(path: &Path) -> Result<Self> {
        let named = || path.display().to_string();
        let mut text = String::new();
        let file = File::open(path).context(named)?;
        file.take(ANSWER_BYTES_MAX)
            .read_to_string(&mut text)
            .context(named)?;
        let answer: Self = serde_json::from_str(&text).map_err(|error| {
            Error::invalid(format!(
                "{}: it is no answer of trace breakdown --json: {error}",
                named()
            ))
        })?;
        let parts = answer.breakdown.parts.iter();
        let all = parts.flat_map(|time| [time.mean_ns, time.deviation_ns]);
        let sound = |ns: f64| ns.is_finite() && ns >= 0.0;
        match all.chain([answer.breakdown.total_ns]).all(sound) {
            true => Ok(answer),
            false => Err(Error::invalid(format!(
                "{}: a time is less than 0",
                named()
            ))),
        }
    }

    /// It in a few words, without the subject.
    pub fn title(&self) -> String {
        let mut title = self.operation.clone();
        if let Some(bytes) = self.block_bytes.filter(|_| self.operation != "flushes") {
            title.push_str(&format!(" of {}", size::human(bytes)));
        }
        if let (Some(over), Some(engine)) = (&self.over, &self.engine) {
            title.push_str(&format!(", one at a time over {over}, {engine}"));
        }
        title
    }
}

/// [`measure`] at a running server with that control socket, at which nobody else is.
///
/// # Errors
///
/// Those of [`measure`]; the control socket cannot be asked, or the server keeps no records.
pub fn of_server(target: &Target, control: &Path, protocol: &Protocol) -> Result<Breakdown> {
    let mut client = trace::control::Client::connect(control)?;
    let queues = |client: &mut trace::control::Client| -> Result<Vec<((usize, u64), u64)>> {
        let disks = client.disks()?.into_iter();
        let of = |disk: trace::control::DiskInfo| {
            let queues = disk.queues.into_iter();
            queues.map(move |queue| ((disk.disk, queue.queue), queue.recorded))
        };
        Ok(disks.flat_map(of).collect())
    };
    let before: BTreeMap<(usize, u64), u64> = queues(&mut client)?.into_iter().collect();
    // The queue that we came to, and the number of its next request.
    let mut own: Option<((usize, u64), u64)> = None;
    let mut entries = |count: usize| -> Result<Vec<Entry>> {
        // A request is noted after its client was told.
        let deadline = Instant::now() + NOTED;
        loop {
            for (key, recorded) in queues(&mut client)? {
                let next = match own {
                    Some((known, next)) if known == key => next,
                    Some(_) => continue,
                    None => before.get(&key).copied().unwrap_or(0),
                };
                if recorded >= next + count as u64 {
                    let (entries, end) = client.entries(key.0, key.1, next, count)?;
                    own = Some((key, end.next));
                    return Ok(entries);
                }
            }
            if Instant::now() >= deadline {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "{}: the server noted fewer than {count} requests",
                        control.display()
                    ),
                ));
            }
            thread::yield_now();
        }
    };
    measure(target, protocol, &mut entries)
}

/// Does what `protocol` says at the server `target`, over one queue or connection, and averages. `entries(n)` gives the next `n`
/// requests of that queue, as the server noted them: since the last call, or at first since it was begun.
///
/// # Errors
///
/// The protocol or the target cannot be done; a request fails or takes a minute; what the server noted is not what was asked.
pub fn measure(
    target: &Target,
    protocol: &Protocol,
    entries: &mut dyn FnMut(usize) -> Result<Vec<Entry>>,
) -> Result<Breakdown> {
    protocol.check()?;
    let mut client = single::connect(target, protocol.block_bytes)?;
    if protocol.operation == Operation::Write && !client.writes() {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{}: the disk is read-only", target.name()),
        ));
    }
    let places = client.capacity() / protocol.block_bytes;
    if places == 0 && protocol.operation != Operation::Flush {
        return Err(Error::invalid(format!(
            "the disk has {} bytes, less than a request",
            client.capacity()
        )));
    }
    let mut place = Places {
        count: places.max(1),
        next: 0,
        random: protocol.random.then_some(0x9e37_79b9_7f4a_7c15),
    };
    let mut runs = Vec::with_capacity(protocol.runs);
    let warm_up = (protocol.warm_up > 0).then_some(protocol.warm_up);
    // A flush that nothing came before has nothing to do.
    let touches = protocol.operation == Operation::Flush && places > 0 && client.writes();
    let each = if touches { 3 } else { 1 };
    let lengths = std::iter::repeat_n(protocol.requests, protocol.runs);
    for (number, requests) in warm_up.into_iter().chain(lengths).enumerate() {
        let mut timings = Vec::with_capacity(requests);
        for _ in 0..requests {
            let at = match protocol.operation {
                Operation::Flush => 0,
                _ => place.take() * protocol.block_bytes,
            };
            if touches {
                let at = place.take() * protocol.block_bytes;
                client.request(Operation::Read, at)?;
                client.request(Operation::Write, at)?;
            }
            timings.push((at, client.request(protocol.operation, at)?));
        }
        let mut noted = entries(requests * each)?;
        if touches {
            noted.retain(|entry| entry.operation == Operation::Flush);
        }
        if noted.len() != requests {
            return Err(Error::new(
                ErrorKind::Io,
                format!("the server noted {} of {requests} requests", noted.len()),
            ));
        }
        let mut samples = Vec::with_capacity(requests);
        for (entry, (at, (began, ended))) in noted.iter().zip(timings) {
            if (entry.operation, entry.offset) != (protocol.operation, at) {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "a {} at {at} was asked for, and the server noted a {} at {}: is somebody else at it?",
                        protocol.operation, entry.operation, entry.offset
                    ),
                ));
            }
            samples.push(Sample::with_client(entry, began, ended));
        }
        if warm_up.is_none() || number > 0 {
            runs.push(samples);
        }
    }
    Breakdown::new(&runs, protocol.dropped).ok_or_else(|| Error::invalid("no request is left"))
}

/// Where requests go, in blocks.
struct Places {
    count: u64,
    next: u64,
    /// State of a generator (xorshift64).
    random: Option<u64>,
}

impl Places {
    fn take(&mut self) -> u64 {
        match &mut self.random {
            None => {
                let place = self.next % self.count;
                self.next += 1;
                place
            }
            Some(state) => {
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                *state % self.count
            }
        }
    }
}
