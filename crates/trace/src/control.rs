//! The control socket of a server: what is asked and answered, and who asks.
//!
//! A Unix socket (`serve --control SOCK`, mode 0600). Both sides send lines of JSON, an object each:
//!
//! ```text
//!   server   {"hello":{"control":1,"diskplane":"0.1.0","pid":4711}}
//!   client   {"command":"entries","disk":0,"queue":0,"since":100}
//!   server   {"entry":{"disk":0,"queue":0,"number":100,"operation":"read",…}}     any number of lines
//!   server   {"end":{"next":101,"lost":0}}                                        or {"error":"…"}
//! ```
//!
//! A client sends its next request when it has the `end` or `error` of the last. A request has at most
//! [`REQUEST_BYTES_MAX`] bytes; whoever sends more, or waits for longer than the server's patience (60 seconds), is
//! disconnected. After an `error` the connection goes on, unless what came was no line. What a
//! client does not know (fields, kinds of lines) it skips: they may grow within a version.

use crate::{
    entry::{Entry, Operation},
    histogram::Snapshot,
    stage::Stage,
    totals::Totals,
};
use block::{Context, Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// The version that this speaks.
pub const VERSION: u32 = 1;
/// Bytes of a request's line at most.
pub const REQUEST_BYTES_MAX: u64 = 4096;
/// Bytes of a line of an answer that a client takes at most: of one that lists all queues, say.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// How long a client waits for the first line, and for others.
const GREETING: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(30);

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "command",
    rename_all = "kebab-case",
    deny_unknown_fields,
    rename_all_fields = "kebab-case"
)]
pub enum Request {
    /// The disks and their queues: [`Line::Disk`] each.
    Disks,
    /// What each disk did so far: [`Line::Statistics`] each.
    Statistics,
    /// Requests of a queue that ended: [`Line::Entry`] each, oldest first.
    Entries {
        /// Which disk, from 0.
        disk: usize,
        /// Which of its queues, by its number.
        queue: u64,
        /// From this number on.
        #[serde(default)]
        since: u64,
        /// So many at most.
        #[serde(default = "all")]
        max: usize,
    },
    /// The slowest requests of each disk since it is served: [`Line::Entry`] each, the slowest first.
    Slowest {
        /// So many of each disk at most; a queue keeps its 32 slowest.
        #[serde(default = "all")]
        max: usize,
    },
    /// Latencies of each disk since it is served, by operation and stage: [`Line::Histogram`] each.
    Histograms,
    /// What requests of each disk spent in each stage since it is served, by operation: [`Line::Totals`] each.
    Totals,
}

fn all() -> usize {
    usize::MAX
}

/// A line of a server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Line {
    Hello(Hello),
    Disk(DiskInfo),
    Statistics(DiskStatistics),
    Entry(Traced),
    Histogram(Latencies),
    Totals(OfOperation),
    End(End),
    /// Why a request was not answered.
    Error(String),
}

/// The first line of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub control: u32,
    /// The server's.
    pub diskplane: String,
    /// The server's process.
    pub pid: u32,
}

/// A disk that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its number, from 0.
    pub disk: usize,
    /// Its image, as it was named.
    pub file: String,
    /// Bytes.
    pub size: u64,
    /// Those that run, and the last four that have left.
    pub queues: Vec<QueueInfo>,
}

/// A queue of a disk: a virtqueue, or an NBD connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueInfo {
    /// Its number among those that the disk ever had.
    pub queue: u64,
    /// What it is: `vhost-user 0`, `nbd`.
    pub name: String,
    /// It still runs.
    pub live: bool,
    /// Requests that it remembers.
    pub entries: usize,
    /// Requests that ended.
    pub recorded: u64,
}

/// What a disk did so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskStatistics {
    /// Its number.
    pub disk: usize,
    /// Its image.
    pub file: String,
    /// When, in nanoseconds of the monotonic clock.
    pub at_ns: u64,
    /// As `serve --stats=json` prints them.
    pub statistics: serde_json::Value,
}

/// A request that ended, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traced {
    /// Its disk.
    pub disk: usize,
    /// Its queue; lacks where that has left and is forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u64>,
    /// The request.
    #[serde(flatten)]
    pub entry: Entry,
}

/// Latencies of a disk's operation: of a stage, or of the whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// Its disk.
    pub disk: usize,
    /// Which operation.
    pub operation: Operation,
    /// Which stage; lacks for the whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// The counts.
    #[serde(flatten)]
    pub latencies: Snapshot,
}

/// The requests of a disk's operation, and the time that they spent in each stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfOperation {
    /// Its disk.
    pub disk: usize,
    /// Which operation.
    pub operation: Operation,
    /// The sums.
    #[serde(flatten)]
    pub totals: Totals,
}

/// The last line of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Of `entries`: where to go on.
    #[serde(default)]
    pub next: u64,
    /// Of `entries`: those asked for that are overwritten.
    #[serde(default)]
    pub lost: u64,
}

/// A client of a control socket.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    hello: Hello,
}

impl Client {
    /// Connects to the server at `path`.
    ///
    /// # Errors
    ///
    /// Nobody listens there, or who does speaks something else.
    pub fn connect(path: &Path) -> Result<Self> {
        let named = || format!("control socket {}", path.display());
        let stream = UnixStream::connect(path).context(named)?;
        // Another kind of server waits for its client to begin.
        stream.set_read_timeout(Some(GREETING)).context(named)?;
        stream.set_write_timeout(Some(PATIENCE)).context(named)?;
        let mut client = Self {
            path: path.to_owned(),
            stream: BufReader::new(stream),
            hello: Hello {
                control: 0,
                diskplane: String::new(),
                pid: 0,
            },
        };
        match client.line().map_err(|e| e.within(named()))? {
            Some(Line::Hello(hello)) if hello.control == VERSION => {
                client.hello = hello;
                let stream = client.stream.get_ref();
                stream.set_read_timeout(Some(PATIENCE)).context(named)?;
            }
            Some(Line::Hello(hello)) => {
                return Err(Error::unsupported(format!(
                    "{}: the server speaks version {}, this program {VERSION}",
                    named(),
                    hello.control
                )));
            }
            Some(Line::Error(why)) => {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!("{}: {}", named(), block::plain(&why)),
                ));
            }
            _ => {
                return Err(Error::invalid(format!(
                    "{}: who listens there is no diskplane",
                    named()
                )));
            }
        }
        Ok(client)
    }

    /// What the server said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Asks, and hands out the lines of the answer until its end.
    ///
    /// # Errors
    ///
    /// The server refuses, is gone, does not answer for half a minute, or breaks the protocol.
    pub fn ask(&mut self, request: &Request, each: &mut dyn FnMut(Line)) -> Result<End> {
        let named = || format!("control socket {}", self.path.display());
        let mut text = serde_json::to_string(request)
            .map_err(|e| Error::invalid(format!("{}: {e}", named())))?;
        text.push('\n');
        self.stream
            .get_mut()
            .write_all(text.as_bytes())
            .context(named)?;
        loop {
            match self.line()? {
                Some(Line::End(end)) => return Ok(end),
                Some(Line::Error(why)) => {
                    return Err(Error::new(
                        ErrorKind::Io,
                        format!(
                            "control socket {}: {}",
                            self.path.display(),
                            block::plain(&why)
                        ),
                    ));
                }
                Some(line) => each(line),
                // A kind of line that is newer than this.
                None => {}
            }
        }
    }

    /// The disks that are served.
    pub fn disks(&mut self) -> Result<Vec<DiskInfo>> {
        let mut disks = Vec::new();
        self.ask(&Request::Disks, &mut |line| {
            if let Line::Disk(disk) = line {
                disks.push(disk);
            }
        })?;
        Ok(disks)
    }

    /// Requests of a queue from number `since` on, `max` at most, and where to go on.
    pub fn entries(
        &mut self,
        disk: usize,
        queue: u64,
        since: u64,
        max: usize,
    ) -> Result<(Vec<Entry>, End)> {
        let mut entries = Vec::new();
        let request = Request::Entries {
            disk,
            queue,
            since,
            max,
        };
        let end = self.ask(&request, &mut |line| {
            if let Line::Entry(traced) = line {
                entries.push(traced.entry);
            }
        })?;
        Ok((entries, end))
    }

    /// What requests of all disks spent in each stage since these are served, by operation; operations that did not occur
    /// are left out.
    pub fn totals(&mut self) -> Result<BTreeMap<Operation, Totals>> {
        let mut totals: BTreeMap<Operation, Totals> = BTreeMap::new();
        self.ask(&Request::Totals, &mut |line| {
            if let Line::Totals(of) = line {
                totals.entry(of.operation).or_default().add(&of.totals);
            }
        })?;
        Ok(totals)
    }

    /// The next line; `None` for one of a kind that is not known.
    fn line(&mut self) -> Result<Option<Line>> {
        let named = || format!("control socket {}", self.path.display());
        let mut bytes = Vec::new();
        let limited = &mut (&mut self.stream).take(LINE_BYTES_MAX);
        limited.read_until(b'\n', &mut bytes).context(named)?;
        if bytes.last() != Some(&b'\n') {
            let why = match bytes.len() as u64 {
                LINE_BYTES_MAX => "a line of more than 4 MiB",
                _ => "the server has gone",
            };
            return Err(Error::new(ErrorKind::Io, format!("{}: {why}", named())));
        }
        match serde_json::from_slice::<Line>(&bytes) {
            Ok(line) => Ok(Some(line)),
            Err(_)
                if serde_json::from_slice::<serde_json::Map<_, _>>(&bytes)
                    .is_ok_and(|m: serde_json::Map<String, serde_json::Value>| m.len() == 1) =>
            {
                Ok(None)
            }
            Err(error) => Err(Error::invalid(format!("{}: {error}", named()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_their_defaults() {
        let read = |text: &str| serde_json::from_str::<Request>(text);
        assert_eq!(read(r#"{"command":"disks"}"#).unwrap(), Request::Disks);
        assert_eq!(
            read(r#"{"command":"entries","disk":1,"queue":2}"#).unwrap(),
            Request::Entries {
                disk: 1,
                queue: 2,
                since: 0,
                max: usize::MAX
            }
        );
        for wrong in [
            "{}",
            "[]",
            r#"{"command":"stop"}"#,
            r#"{"command":"entries"}"#,
            r#"{"command":"entries","disk":-1,"queue":2}"#,
            r#"{"command":"entries","disk":0,"queue":2,"until":7}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
