//! A disk at a server, for any number of threads: requests split as the server wants them, over as many connections as
//! they need and the server takes.

use crate::connection::{Ask, Connection, Extent, Take};
use crate::handshake::{self, Export};
use crate::proto::{STATE_ZERO, Style, cmd, cmd_flag, transmission_flag as flag};
use crate::socket::Wait;
use crate::uri::Uri;
use block::{Context as _, Error, ErrorKind, Result, align_down};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Connections to a server that takes several for one disk.
const CONNECTIONS_MAX: usize = 4;
/// Requests in flight on each before there is another.
const IN_FLIGHT: usize = 4;
/// How long a server may take for a further connection: one that has none to give does not answer.
const FURTHER_TIME: Duration = Duration::from_secs(2);
/// Bytes that are zeroed, given back or asked about at once.
const RANGE_BYTES_MAX: u64 = 1 << 30;
/// How long a server may be silent where nothing else is said: a flush of a slow one takes a while.
const SILENCE: Duration = Duration::from_secs(120);
/// An answer about fewer bytes is a small one.
const STATUS_BYTES: u64 = 64 << 10;
/// Small answers one after the other that are believed: who goes on so is not asked byte by byte through a disk.
const SMALL_ANSWERS_MAX: u32 = 1024;

/// How to connect, and how long to wait.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether somebody asked for the end: looked at while a server is waited for.
    pub cancelled: Option<fn() -> bool>,
    /// How long a server may be silent while it is waited for (see [`Wait::silence`]): 120 seconds. Absent: for ever.
    pub silence: Option<Duration>,
    /// For how long connecting is tried again where it fails: not at all.
    pub open_for: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cancelled: None,
            silence: Some(SILENCE),
            open_for: Duration::ZERO,
        }
    }
}

impl Options {
    /// How the handshake is to go.
    fn handshake(&self, time: Option<Duration>) -> handshake::Options {
        handshake::Options {
            allocation: true,
            time,
            cancelled: self.cancelled,
        }
    }

    /// How long to wait for answers.
    fn wait(&self) -> Wait {
        Wait {
            until: None,
            silence: self.silence,
            cancelled: self.cancelled,
        }
    }
}

/// An export of a server, open.
///
/// What was written is durable when a flush that began afterwards has ended, as in a file; where the server has no
/// flush, but writes that are durable (`FUA`), all are that; where it has neither, it keeps nothing back.
#[derive(Debug)]
pub struct Client {
    uri: Uri,
    name: String,
    options: Options,
    export: Export,
    first: Connection,
    further: [OnceLock<Connection>; CONNECTIONS_MAX - 1],
    /// Whoever holds it may open the next one; false: there are no more.
    opening: Mutex<bool>,
    /// What the last answer says of what lies behind the range that was asked for.
    known: Mutex<Known>,
}

/// Ranges one behind the other, each with whether it reads as zeros.
#[derive(Debug, Default)]
struct Known {
    start: u64,
    extents: Vec<Extent>,
    /// Changes of the disk by us, so far.
    changes: u64,
    /// Small answers, one after the other.
    small: u32,
}

impl Known {
    /// The end of what is at `offset`, and whether it is zeros. Neighbours of the same kind are one.
    fn at(&self, offset: u64) -> Option<(u64, bool)> {
        let mut at = self.start;
        let mut found: Option<(u64, bool)> = None;
        for extent in &self.extents {
            let end = at.saturating_add(extent.len);
            let zero = extent.state & u64::from(STATE_ZERO) != 0;
            match &mut found {
                Some((last, kind)) if *kind == zero => *last = end,
                Some(_) => break,
                None if at <= offset && offset < end => found = Some((end, zero)),
                None => {}
            }
            at = end;
        }
        found
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    /// Connects to the export that `uri` names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] where there is no such server or export, [`ErrorKind::Unsupported`] for one that wants TLS,
    /// and whatever is wrong with what it says.
    pub fn connect(uri: &Uri, options: &Options) -> Result<Self> {
        let name = uri.to_string();
        let wait = Wait {
            until: Some(Instant::now() + options.open_for),
            ..options.wait()
        };
        let (socket, export) = loop {
            let failed = match handshake::open(uri, &options.handshake(None)) {
                Ok(opened) => break opened,
                Err(error) => error,
            };
            let failed = match is_passing(&failed).then(|| wait.pause()) {
                Some(Ok(())) => continue,
                Some(Err(stopped)) if stopped.kind() == ErrorKind::Interrupted => stopped,
                _ => failed,
            };
            return Err(failed.within(name));
        };
        Ok(Self {
            uri: uri.clone(),
            name,
            options: *options,
            first: Connection::new(socket, export, options.wait()),
            export,
            further: [const { OnceLock::new() }; CONNECTIONS_MAX - 1],
            opening: Mutex::new(export.has(flag::CAN_MULTI_CONN)),
            known: Mutex::default(),
        })
    }

    /// The export's name, as a URI.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the server said of it.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// The connection with the fewest requests; another one where all have many.
    fn connection(&self) -> &Connection {
        let further = self.further.iter().map_while(OnceLock::get);
        let open = std::iter::once(&self.first).chain(further);
        let idle = open.map(|c| (c.in_flight(), c)).min_by_key(|(n, _)| *n);
        let (in_flight, connection) = idle.unwrap_or((0, &self.first));
        if in_flight < IN_FLIGHT {
            return connection;
        }
        self.another().unwrap_or(connection)
    }

    /// A further connection, where the server gives one. One thread tries, the others go on.
    fn another(&self) -> Option<&Connection> {
        let mut more = self.opening.try_lock().ok().filter(|more| **more)?;
        let next = self.further.iter().find(|slot| slot.get().is_none());
        let opened = next.and_then(|slot| {
            let (socket, export) =
                handshake::open(&self.uri, &self.options.handshake(Some(FURTHER_TIME))).ok()?;
            // Not another disk by that name.
            let same = Export {
                allocation: self.export.allocation,
                ..export
            };
            if same != self.export || export.allocation.is_some() != same.allocation.is_some() {
                return None;
            }
            slot.set(Connection::new(socket, export, self.options.wait()))
                .ok()?;
            slot.get()
        });
        *more = opened.is_some();
        opened
    }

    fn at(&self, what: &str, offset: u64, len: u64) -> String {
        format!("{}: {what} {len} bytes at byte {offset}", self.name)
    }

    /// Bytes of a read or write at most.
    fn piece(&self) -> u64 {
        let (min, max) = (self.export.block_min, self.export.block_max);
        align_down(max.min(crate::proto::PAYLOAD_BYTES_MAX).into(), min.into())
    }

    /// Bytes of another request at most.
    fn range(&self) -> u64 {
        match self.export.style {
            Style::Extended => RANGE_BYTES_MAX,
            _ => RANGE_BYTES_MAX.min(u32::MAX.into()),
        }
    }

    /// Fills `buf`, which has whole blocks and lies within the export.
    ///
    /// # Errors
    ///
    /// What the server answers with, or that it does not.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut at = offset;
        // At most 32 MiB.
        for piece in buf.chunks_mut(self.piece() as usize) {
            let len = piece.len() as u64;
            let ask = Ask {
                kind: cmd::READ,
                flags: 0,
                offset: at,
                len,
                data: &[],
            };
            (self.connection().ask(&ask, Take::Data(piece)))
                .context(|| self.at("reading", at, len))?;
            at += len;
        }
        Ok(())
    }

    /// Writes `data`, which has whole blocks and lies within the export.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut at = offset;
        for piece in data.chunks(self.piece() as usize) {
            let len = piece.len() as u64;
            self.change(&Ask {
                kind: cmd::WRITE,
                flags: self.durable(),
                offset: at,
                len,
                data: piece,
            })
            .context(|| self.at("writing", at, len))?;
            at += len;
        }
        Ok(())
    }

    /// The flags of a change.
    fn durable(&self) -> u16 {
        match !self.export.has(flag::SEND_FLUSH) && self.export.has(flag::SEND_FUA) {
            true => cmd_flag::FUA,
            false => 0,
        }
    }

    fn change(&self, ask: &Ask<'_>) -> Result<()> {
        let done = self.connection().ask(ask, Take::Nothing);
        // What was said of it before is not so any more; what is said meanwhile may not be.
        let mut known = lock(&self.known);
        known.changes += 1;
        known.extents.clear();
        done
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub fn flush(&self) -> Result<()> {
        if !self.export.has(flag::SEND_FLUSH) {
            return Ok(());
        }
        let ask = Ask {
            kind: cmd::FLUSH,
            flags: 0,
            offset: 0,
            len: 0,
            data: &[],
        };
        // Of a server with several connections it covers all of them.
        (self.first.ask(&ask, Take::Nothing)).context(|| format!("{}: flushing", self.name))
    }

    /// Has the server make a range zeros: whole blocks within the export. `unmap`: it may give back its space. `fast`: if
    /// that is faster than writing them.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] where it cannot, or not faster; else as [`Client::read`].
    pub fn zero(&self, offset: u64, len: u64, unmap: bool, fast: bool) -> Result<()> {
        let lacks = !self.export.has(flag::SEND_WRITE_ZEROES)
            || fast && !self.export.has(flag::SEND_FAST_ZERO);
        if lacks {
            return Err(Error::unsupported(format!(
                "{}: the server does not zero{}",
                self.name,
                if fast { " fast" } else { "" }
            )));
        }
        let mut flags = self.durable();
        flags |= if unmap { 0 } else { cmd_flag::NO_HOLE };
        flags |= if fast { cmd_flag::FAST_ZERO } else { 0 };
        self.each(offset, len, |offset, len| {
            self.change(&Ask {
                kind: cmd::WRITE_ZEROES,
                flags,
                offset,
                len,
                data: &[],
            })
            .context(|| self.at("zeroing", offset, len))
        })
    }

    /// Tells the server that a range is not needed: whole blocks within the export. One that takes no such hints is not
    /// told.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        if !self.export.has(flag::SEND_TRIM) {
            return Ok(());
        }
        self.each(offset, len, |offset, len| {
            let told = self.change(&Ask {
                kind: cmd::TRIM,
                flags: self.durable(),
                offset,
                len,
                data: &[],
            });
            match told {
                Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
                told => told.context(|| self.at("discarding", offset, len)),
            }
        })
    }

    fn each(&self, offset: u64, len: u64, each: impl Fn(u64, u64) -> Result<()>) -> Result<()> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(self.range());
            each(offset + done, part)?;
            done += part;
        }
        Ok(())
    }

    /// The end of what begins at `offset` and is one kind, at most `len` bytes further, and whether it is known to read as
    /// zeros. Where the server has no block status, or does not answer it, nothing is known of all of it.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub fn run(&self, offset: u64, len: u64) -> Result<(u64, bool)> {
        let end = offset.saturating_add(len);
        if self.export.allocation.is_none() {
            return Ok((end, false));
        }
        let cut = |(to, zero): (u64, bool)| (to.min(end), zero);
        let (changes, small) = {
            let known = lock(&self.known);
            if let Some(found) = known.at(offset) {
                return Ok(cut(found));
            }
            (known.changes, known.small)
        };
        let start = align_down(offset, self.export.block_min.into());
        let asked = self.range().min(self.export.size.saturating_sub(start));
        if asked == 0 {
            return Ok((end, false));
        }
        let mut extents = Vec::new();
        let ask = Ask {
            kind: cmd::BLOCK_STATUS,
            flags: 0,
            offset: start,
            len: asked,
            data: &[],
        };
        match self.connection().ask(&ask, Take::Status(&mut extents)) {
            // It may be said of the disk, and not of a part of it.
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                return Ok(cut((start + asked, false)));
            }
            done => done.context(|| self.at("asking for the state of", start, asked))?,
        }
        let said = extents.iter().map(|extent| extent.len);
        let said = said.fold(0, u64::saturating_add);
        let small = match said < STATUS_BYTES.min(asked) {
            true => small.saturating_add(1),
            false => 0,
        };
        if small > SMALL_ANSWERS_MAX {
            // So that a disk is not asked about byte by byte: of the rest nothing is known.
            let state = 0;
            let len = STATUS_BYTES.min(asked) - said;
            extents.push(Extent { len, state });
        }
        let found = Known {
            start,
            extents,
            changes,
            small,
        };
        // The first is longer than what was cut off to align: a server counts in its blocks.
        let first = found.at(offset).map_or((end, false), cut);
        let mut known = lock(&self.known);
        if known.changes == changes {
            *known = found;
        }
        Ok(first)
    }
}

/// Whether what connecting fails with may be over soon: nobody listens yet, an export is not there yet.
fn is_passing(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Io | ErrorKind::NotFound | ErrorKind::Denied
    )
}

impl io::Remote for Client {
    fn size(&self) -> u64 {
        self.export.size
    }

    fn alignment(&self) -> u32 {
        self.export.block_min
    }

    fn read_only(&self) -> bool {
        self.export.has(flag::READ_ONLY)
    }

    fn identity(&self) -> (u64, u64) {
        self.uri.identity()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        Client::read(self, offset, buf)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        Client::write(self, offset, data)
    }

    fn flush(&self) -> Result<()> {
        Client::flush(self)
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool, fast: bool) -> Result<()> {
        Client::zero(self, offset, len, unmap, fast)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        Client::discard(self, offset, len)
    }

    fn run(&self, offset: u64, len: u64) -> Result<(u64, bool)> {
        Client::run(self, offset, len)
    }
}
