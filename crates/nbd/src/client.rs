//! A disk at a server, for any number of threads: requests split as the server wants them, over as many connections as
//! they need and the server takes.

use crate::connection::{Ask, Connection, Extent, Take};
use crate::handshake::{self, Export};
use crate::proto::{STATE_HOLE, STATE_ZERO, Style, cmd, cmd_flag, transmission_flag as flag};
use crate::socket::Wait;
use crate::uri::Uri;
use block::{Error, ErrorKind, RangeKind, Result, align_down};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
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
/// QEMU's context whose states count the images from the top that must be asked: as it does, more than two are two.
const DEPTH: &str = "qemu:allocation-depth";
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
    /// For how long requests wait for another connection where one breaks, as QEMU's `reconnect-delay` has it: those that had
    /// no answer are put again, and a server that comes back is taken to have kept what it has answered. Zero: of a disk
    /// that was only read, a connection that the server ended is replaced once for each request. Absent: none is replaced,
    /// all that follow fail.
    pub reconnect_for: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cancelled: None,
            silence: Some(SILENCE),
            open_for: Duration::ZERO,
            reconnect_for: None,
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
/// Errors of requests do not name the export: whoever asks for it as for a file says which one, and what was asked.
///
/// What was written is durable when a flush that began afterwards has ended, as in a file; where the server has no
/// flush, but writes that are durable (`FUA`), all are that; where it has neither, it keeps nothing back.
#[derive(Debug)]
pub struct Client {
    uri: Uri,
    name: String,
    options: Options,
    export: Export,
    /// At most [`CONNECTIONS_MAX`]; where those that broke come back, one at least.
    connections: Mutex<Vec<Arc<Connection>>>,
    /// Whoever holds it may open the next one.
    opening: Mutex<Opening>,
    /// What the last answer says of what lies behind the range that was asked for.
    known: Mutex<Known>,
}

/// What of opening connections is known.
#[derive(Debug)]
struct Opening {
    /// The server may give further ones.
    more: bool,
    /// Since when there has been none.
    none_since: Option<Instant>,
}

/// Ranges one behind the other, each with its state.
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
    /// The end of what is at `offset`, and what it is. Neighbours of the same kind are one.
    fn at(&self, offset: u64) -> Option<(u64, RangeKind)> {
        let mut at = self.start;
        let mut found: Option<(u64, RangeKind)> = None;
        for extent in &self.extents {
            let end = at.saturating_add(extent.len);
            let is = kind_of(extent.state);
            match &mut found {
                Some((last, kind)) if *kind == is => *last = end,
                Some(_) => break,
                None if at <= offset && offset < end => found = Some((end, is)),
                None => {}
            }
            at = end;
        }
        found
    }
}

/// What a state of `base:allocation` says. Of other contexts QEMU takes the same bits so: what is clean in a dirty bitmap is
/// shown as data, what is dirty is not.
fn kind_of(state: u64) -> RangeKind {
    let has = |bit: u32| state & u64::from(bit) != 0;
    match (has(STATE_HOLE), has(STATE_ZERO)) {
        (false, false) => RangeKind::Data,
        (false, true) => RangeKind::Zero,
        (true, true) => RangeKind::Hole,
        (true, false) => RangeKind::Absent,
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
            connections: Mutex::new(vec![Arc::new(Connection::new(
                socket,
                export,
                options.wait(),
            ))]),
            export,
            opening: Mutex::new(Opening {
                more: export.has(flag::CAN_MULTI_CONN),
                none_since: None,
            }),
            known: Mutex::default(),
        })
    }

    /// As [`Client::connect`]; where somebody has it open already, the same: many a server takes one client.
    ///
    /// # Errors
    ///
    /// As [`Client::connect`].
    pub fn shared(uri: &Uri, options: &Options) -> Result<Arc<Self>> {
        static OPEN: Mutex<Vec<Weak<Client>>> = Mutex::new(Vec::new());
        let mut open = lock(&OPEN);
        open.retain(|client| client.strong_count() > 0);
        let mut there = open.iter().filter_map(Weak::upgrade);
        if let Some(client) = there.find(|client| client.uri == *uri && !client.is_broken()) {
            return Ok(client);
        }
        let client = Arc::new(Self::connect(uri, options)?);
        open.push(Arc::downgrade(&client));
        Ok(client)
    }

    /// Whether no request can succeed any more.
    fn is_broken(&self) -> bool {
        let connections = lock(&self.connections);
        self.options.reconnect_for.is_none() && connections.iter().all(|open| open.is_broken())
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
    fn connection(&self) -> Option<Arc<Connection>> {
        let (in_flight, connection) = {
            let open = lock(&self.connections);
            let idle = open.iter().map(|c| (c.in_flight(), c));
            let (in_flight, connection) = idle.min_by_key(|(n, _)| *n)?;
            (in_flight, Arc::clone(connection))
        };
        match in_flight < IN_FLIGHT {
            true => Some(connection),
            false => self.another().or(Some(connection)),
        }
    }

    /// A further connection, where the server gives one. One thread tries, the others go on.
    fn another(&self) -> Option<Arc<Connection>> {
        let mut opening = self.opening.try_lock().ok().filter(|o| o.more)?;
        let many = lock(&self.connections).len() >= CONNECTIONS_MAX;
        let opened = match many {
            true => None,
            false => self.open_again(Some(FURTHER_TIME)).ok(),
        };
        opening.more = opened.is_some();
        opened
    }

    /// Opens a connection more, to the same disk.
    fn open_again(&self, time: Option<Duration>) -> Result<Arc<Connection>> {
        let (socket, export) = handshake::open(&self.uri, &self.options.handshake(time))?;
        // Not another disk by that name.
        let same = Export {
            allocation: self.export.allocation,
            ..export
        };
        if same != self.export || export.allocation.is_some() != same.allocation.is_some() {
            return Err(Error::corrupt(
                "the server has another disk, or another server that one, by that name now",
            ));
        }
        let connection = Arc::new(Connection::new(socket, export, self.options.wait()));
        lock(&self.connections).push(Arc::clone(&connection));
        Ok(connection)
    }

    /// Puts a request, on another connection where one breaks.
    fn ask(&self, ask: &Ask<'_>, mut take: Take<'_>) -> Result<()> {
        let mut until = None;
        loop {
            let Some(connection) = self.connection() else {
                let none = Error::new(ErrorKind::Io, "there is no connection to the server");
                self.reconnect(until, none)?;
                continue;
            };
            let error = match connection.ask(ask, take.anew()) {
                Err(error) if connection.is_broken() => error,
                done => return done,
            };
            let delay = match self.options.reconnect_for {
                Some(Duration::ZERO) if lock(&self.known).changes > 0 => None,
                Some(Duration::ZERO) => connection.is_gone().then_some(Duration::ZERO),
                delay => delay,
            };
            let Some(delay) = delay.filter(|_| error.kind() != ErrorKind::Interrupted) else {
                return Err(error);
            };
            lock(&self.connections).retain(|open| !Arc::ptr_eq(open, &connection));
            drop(connection);
            match until {
                Some(until) if Instant::now() >= until => return Err(error),
                _ => {}
            }
            until = until.or(Some(Instant::now() + delay));
            self.reconnect(until, error)?;
        }
    }

    /// Waits for a connection, `until` then at most, and not for longer than that has been waited for; whoever comes later tries
    /// once. `error`: why there is none.
    fn reconnect(&self, until: Option<Instant>, error: Error) -> Result<()> {
        let mut opening = lock(&self.opening);
        if !lock(&self.connections).is_empty() {
            return Ok(());
        }
        let since = *opening.none_since.get_or_insert_with(Instant::now);
        let delay = self.options.reconnect_for.unwrap_or_default();
        let given_up = since + delay;
        let wait = Wait {
            until: Some(until.map_or(given_up, |until| until.min(given_up))),
            ..self.options.wait()
        };
        loop {
            let time = wait
                .until
                .map(|end| end.saturating_duration_since(Instant::now()));
            match self.open_again(time.map(|time| time.max(FURTHER_TIME))) {
                Ok(_) => {
                    *opening = Opening {
                        more: self.export.has(flag::CAN_MULTI_CONN),
                        none_since: None,
                    };
                    return Ok(());
                }
                Err(failed) if !is_passing(&failed) => {
                    return Err(failed.within("connecting again"));
                }
                Err(_) => {}
            }
            match wait.pause() {
                Ok(()) => {}
                Err(stopped) if stopped.kind() == ErrorKind::Interrupted => return Err(stopped),
                Err(_) => {
                    let tried = match delay.is_zero() {
                        true => "connecting again failed".to_owned(),
                        false => format!("connecting again failed for {} s", delay.as_secs_f32()),
                    };
                    return Err(error.within(tried));
                }
            }
        }
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
            self.ask(&ask, Take::Data(piece))?;
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
            })?;
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
        let done = self.ask(ask, Take::Nothing);
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
        self.ask(&ask, Take::Nothing)
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
                told => told,
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

    /// The end of what begins at `offset` and is one kind, at most `len` bytes further, and which. Where the server has no
    /// block status, or does not answer it, all of it is data.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub fn run(&self, offset: u64, len: u64) -> Result<(u64, RangeKind)> {
        let end = offset.saturating_add(len);
        if self.export.allocation.is_none() {
            return Ok((end, RangeKind::Data));
        }
        let cut = |(to, kind): (u64, RangeKind)| (to.min(end), kind);
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
            return Ok((end, RangeKind::Data));
        }
        let mut extents = Vec::new();
        let ask = Ask {
            kind: cmd::BLOCK_STATUS,
            flags: 0,
            offset: start,
            len: asked,
            data: &[],
        };
        match self.ask(&ask, Take::Status(&mut extents)) {
            // It may be said of the disk, and not of a part of it.
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                return Ok(cut((start + asked, RangeKind::Data)));
            }
            done => done?,
        }
        if self.uri.context.as_deref() == Some(DEPTH) {
            let states = extents.iter_mut().map(|extent| &mut extent.state);
            states.for_each(|depth| *depth = (*depth).min(2));
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
        let first = found.at(offset).map_or((end, RangeKind::Data), cut);
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

    fn run(&self, offset: u64, len: u64) -> Result<(u64, RangeKind)> {
        Client::run(self, offset, len)
    }
}
