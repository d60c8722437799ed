//! One connection, with requests of many threads in flight.
//!
//! A thread sends its request and waits for the answer. There is no thread that reads for all: of those who wait, one has
//! the *turn*. It reads headers; a header of its own it follows with the payload, straight into its memory; with the
//! header of another's it hands the turn on to that one. Who has its answer gives the turn to somebody who sleeps.
//! So no payload is copied, and none waits where nobody wants it.
//!
//! ```text
//!   slot:  free ─▶ sending ─▶ asleep ─▶ has the turn, with a header ─▶ … ─▶ free
//! ```
//!
//! Whoever finds the connection broken, or is told to stop, ends it for all.

use crate::handshake::Export;
use crate::proto::{Fields, Style, cmd, cmd_flag, errno_of};
use crate::reply::{self, Chunk, ERROR_BYTES_MAX, Kind, broken};
use crate::request::{HEADER_BYTES_MAX, Header};
use crate::socket::{Socket, Wait};
use block::{Context as _, Error, ErrorKind, Result};
use std::io::IoSlice;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Requests in flight: as many as a server takes at a time without a word (QEMU: 16; ours: 128).
const SLOTS: usize = 16;
/// Chunks of one reply: a read of 32 MiB in sectors.
const CHUNKS_MAX: usize = 1 << 16;
/// Parts of one read that have arrived and do not touch.
const PARTS_MAX: usize = 1024;
/// Extents of one reply that are kept.
const EXTENTS_MAX: usize = 4096;
/// Answers between two looks whether a request was forgotten.
const LOOK_EVERY: u64 = 256;

/// A request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    pub kind: u16,
    pub flags: u16,
    pub offset: u64,
    pub len: u64,
    /// The payload of a write.
    pub data: &'a [u8],
}

/// What the answer is to bring.
#[derive(Debug)]
pub(crate) enum Take<'a> {
    Nothing,
    Data(&'a mut [u8]),
    Status(&'a mut Vec<Extent>),
}

impl Take<'_> {
    /// The same, for one of several attempts: what one before brought is gone.
    pub(crate) fn anew(&mut self) -> Take<'_> {
        match self {
            Take::Nothing => Take::Nothing,
            Take::Data(buf) => Take::Data(buf),
            Take::Status(extents) => {
                extents.clear();
                Take::Status(extents)
            }
        }
    }
}

/// A part of the export, as the server describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Bytes, at least 1.
    pub len: u64,
    /// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`.
    pub state: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    /// On its way; nobody sleeps for it yet.
    Sending(u64),
    Asleep(u64),
    /// Its header was read: whoever wakes goes on behind it.
    Turn(u64, Chunk),
}

impl Slot {
    /// The cookie of the request, which no other one of the connection has.
    fn cookie(self) -> Option<u64> {
        match self {
            Slot::Free => None,
            Slot::Sending(cookie) | Slot::Asleep(cookie) | Slot::Turn(cookie, _) => Some(cookie),
        }
    }
}

#[derive(Debug)]
struct Table {
    slots: [Slot; SLOTS],
    /// Requests so far.
    count: u64,
    /// Answers so far.
    answers: u64,
    /// How many requests there had been, and when that was.
    mark: (u64, Instant),
    /// Somebody has the turn.
    reading: bool,
    /// Why the connection is of no use any more.
    broken: Option<(ErrorKind, String)>,
    /// The server ended it.
    gone: bool,
}

impl Table {
    /// An answer came, `now`: whether another request waits for longer than a server may be silent, while it answers.
    fn forgets(&mut self, now: Instant, silence: Option<Duration>) -> bool {
        self.answers += 1;
        let (count, since) = self.mark;
        let Some(silence) = silence.filter(|_| self.answers.is_multiple_of(LOOK_EVERY)) else {
            return false;
        };
        if now.saturating_duration_since(since) < silence {
            return false;
        }
        self.mark = (self.count, now);
        let mut cookies = self.slots.iter().filter_map(|slot| slot.cookie());
        cookies.any(|cookie| cookie >> 8 <= count)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Socket,
    export: Export,
    wait: Wait,
    send: Mutex<()>,
    table: Mutex<Table>,
    /// Those who sleep for their turn, by slot.
    turns: [Condvar; SLOTS],
    /// Those who have no slot.
    free: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they guard changes in single steps.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sleep<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition
        .wait(guard)
        .unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// A connection whose handshake is over, and how long to wait for answers.
    pub(crate) fn new(socket: Socket, export: Export, wait: Wait) -> Self {
        Self {
            socket,
            export,
            wait,
            send: Mutex::new(()),
            table: Mutex::new(Table {
                slots: [Slot::Free; SLOTS],
                count: 0,
                answers: 0,
                mark: (0, Instant::now()),
                reading: false,
                broken: None,
                gone: false,
            }),
            turns: [const { Condvar::new() }; SLOTS],
            free: Condvar::new(),
        }
    }

    /// Requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        let table = lock(&self.table);
        table.slots.iter().filter(|s| **s != Slot::Free).count()
    }

    /// Whether it is of no use any more.
    pub(crate) fn is_broken(&self) -> bool {
        lock(&self.table).broken.is_some()
    }

    /// Whether the server ended it.
    pub(crate) fn is_gone(&self) -> bool {
        lock(&self.table).gone
    }

    /// Sends a request and waits for the answer.
    pub(crate) fn ask(&self, ask: &Ask<'_>, take: Take<'_>) -> Result<()> {
        let (slot, cookie) = self.enter()?;
        if let Err(error) = self.send(ask, cookie) {
            return Err(self.fail(error));
        }
        let mut answer = Answer {
            ask,
            take,
            parts: Vec::new(),
            refused: None,
            described: false,
        };
        let mut mine = None;
        for _ in 0..CHUNKS_MAX {
            let chunk = match mine.take() {
                // The turn is ours already.
                Some(()) => self.read_until(slot, cookie),
                None => self.turn(slot, cookie),
            };
            // The turn is ours, unless another has taken it over.
            let Some(chunk) = chunk? else { continue };
            if let Err(error) = self.payload(&chunk, &mut answer) {
                return Err(self.fail(error));
            }
            if chunk.done {
                let outcome = answer.finish();
                return match outcome {
                    Ok(refused) => {
                        self.leave(slot)?;
                        refused.map_or(Ok(()), Err)
                    }
                    Err(error) => Err(self.fail(error)),
                };
            }
            mine = Some(());
        }
        Err(self.fail(broken(format_args!(
            "an answer of more than {CHUNKS_MAX} chunks"
        ))))
    }

    /// A slot, and a cookie for the request in it.
    fn enter(&self) -> Result<(usize, u64)> {
        let mut table = lock(&self.table);
        loop {
            if let Some((kind, why)) = &table.broken {
                return Err(Error::new(*kind, why.clone()));
            }
            if let Some(nth) = table.slots.iter().position(|slot| *slot == Slot::Free) {
                table.count += 1;
                // A slot's number is below 16.
                let cookie = table.count << 8 | nth as u64;
                if let Some(slot) = table.slots.get_mut(nth) {
                    *slot = Slot::Sending(cookie);
                }
                return Ok((nth, cookie));
            }
            table = sleep(&self.free, table);
        }
    }

    fn send(&self, ask: &Ask<'_>, cookie: u64) -> Result<()> {
        let style = self.export.style;
        let carries = style == Style::Extended && ask.kind == cmd::WRITE;
        let header = Header {
            flags: ask.flags | if carries { cmd_flag::PAYLOAD_LEN } else { 0 },
            kind: ask.kind,
            cookie,
            offset: ask.offset,
            len: ask.len,
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        let size = header.put(style, &mut bytes);
        let head = bytes.get(..size).unwrap_or_default();
        let _one_at_a_time = lock(&self.send);
        if let Some((kind, why)) = &lock(&self.table).broken {
            return Err(Error::new(*kind, why.clone()));
        }
        self.socket.write(
            &mut [IoSlice::new(head), IoSlice::new(ask.data)],
            &self.wait,
        )
    }

    /// Sleeps until the request in `slot` has the turn, or nobody has: then reads for all. `None`: it handed the turn on.
    fn turn(&self, slot: usize, cookie: u64) -> Result<Option<Chunk>> {
        let mut table = lock(&self.table);
        loop {
            if let Some((kind, why)) = &table.broken {
                return Err(Error::new(*kind, why.clone()));
            }
            match table.slots.get(slot) {
                Some(Slot::Turn(_, chunk)) => {
                    let chunk = *chunk;
                    set(&mut table, slot, Slot::Sending(cookie));
                    return Ok(Some(chunk));
                }
                _ if !table.reading => {
                    table.reading = true;
                    set(&mut table, slot, Slot::Sending(cookie));
                    break;
                }
                _ => {}
            }
            set(&mut table, slot, Slot::Asleep(cookie));
            let Some(turn) = self.turns.get(slot) else {
                return Err(Error::invalid("a request without a slot"));
            };
            table = sleep(turn, table);
        }
        drop(table);
        self.read_until(slot, cookie)
    }

    /// Reads the next header, with the turn: it belongs to the request in `slot`, or the turn goes on.
    fn read_until(&self, slot: usize, cookie: u64) -> Result<Option<Chunk>> {
        let chunk = self.header().map_err(|error| self.fail(error))?;
        if chunk.cookie == cookie {
            return Ok(Some(chunk));
        }
        let mut table = lock(&self.table);
        let of = |slot: &Slot| slot.cookie() == Some(chunk.cookie);
        let Some(other) = table.slots.iter().position(of) else {
            drop(table);
            let cookie = chunk.cookie;
            return Err(self.fail(broken(format_args!(
                "a reply to request {cookie:#x}, which is not in flight"
            ))));
        };
        set(&mut table, other, Slot::Turn(chunk.cookie, chunk));
        set(&mut table, slot, Slot::Asleep(cookie));
        if let Some(turn) = self.turns.get(other) {
            turn.notify_one();
        }
        Ok(None)
    }

    fn header(&self) -> Result<Chunk> {
        let mut bytes = [0; reply::HEADER_BYTES_MAX];
        let (magic, rest) = bytes.split_at_mut(4);
        self.socket.read(magic, &self.wait)?;
        let word = Fields(magic).u32().unwrap_or(0);
        let size = reply::header_bytes(self.export.style, word)?;
        let rest = rest.get_mut(..size - 4).unwrap_or_default();
        self.socket.read(rest, &self.wait)?;
        match Chunk::parse(self.export.style, &bytes)? {
            Some((chunk, _)) => Ok(chunk),
            None => Err(broken("a header that ends early")),
        }
    }

    fn fields<const N: usize>(&self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.socket.read(&mut bytes, &self.wait)?;
        Ok(bytes)
    }

    /// Reads what follows a header.
    fn payload(&self, chunk: &Chunk, answer: &mut Answer<'_>) -> Result<()> {
        match chunk.kind {
            Kind::Nothing => Ok(()),
            Kind::Simple => match &mut answer.take {
                Take::Nothing => Ok(()),
                Take::Data(buf) if self.export.style == Style::Simple => {
                    self.socket.read(buf, &self.wait)?;
                    answer.arrived(answer.ask.offset, answer.ask.len).map(drop)
                }
                _ => Err(broken("a simple reply where data belong")),
            },
            Kind::SimpleError(value) => answer.refuse(value, ""),
            Kind::Error(len) => {
                let mut bytes = vec![0; usize::try_from(len.min(ERROR_BYTES_MAX)).unwrap_or(0)];
                self.socket.read(&mut bytes, &self.wait)?;
                let (value, message) = reply::error(&bytes);
                answer.refuse(value, &message)
            }
            Kind::Data(len) => {
                let offset = u64::from_be_bytes(self.fields()?);
                let buf = answer.arrived(offset, len)?;
                self.socket.read(buf, &self.wait)
            }
            Kind::Hole => {
                let bytes = self.fields::<12>()?;
                let mut fields = Fields(&bytes);
                let (offset, len) = (fields.u64(), fields.u32());
                let (offset, len) = (offset.unwrap_or(0), len.unwrap_or(0));
                answer.arrived(offset, len.into())?.fill(0);
                Ok(())
            }
            Kind::Status { count, wide } => {
                let id = u32::from_be_bytes(self.fields()?);
                if wide && u64::from(u32::from_be_bytes(self.fields()?)) != count {
                    return Err(broken("block status with two numbers of descriptors"));
                }
                if Some(id) != self.export.allocation || answer.described {
                    return Err(broken(format_args!(
                        "block status of context {id}, which is not asked for"
                    )));
                }
                answer.described = true;
                let Take::Status(extents) = &mut answer.take else {
                    return Err(broken("block status that nobody asked for"));
                };
                let each = if wide { 16 } else { 8 };
                let mut bytes = [0; 1024];
                // At most 2 MiB.
                let mut left = count * each;
                while left > 0 {
                    let part = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    let part = bytes.get_mut(..part).unwrap_or_default();
                    self.socket.read(part, &self.wait)?;
                    left -= part.len() as u64;
                    for descriptor in part.chunks_exact(each as usize) {
                        let mut fields = Fields(descriptor);
                        let (len, state) = match wide {
                            true => (fields.u64(), fields.u64()),
                            false => (fields.u32().map(u64::from), fields.u32().map(u64::from)),
                        };
                        let (Some(len @ 1..), Some(state)) = (len, state) else {
                            return Err(broken("block status of no bytes"));
                        };
                        if extents.len() < EXTENTS_MAX {
                            extents.push(Extent { len, state });
                        }
                    }
                }
                Ok(())
            }
        }
    }

    /// The request in `slot` has its answer: gives the turn away.
    fn leave(&self, slot: usize) -> Result<()> {
        let mut table = lock(&self.table);
        set(&mut table, slot, Slot::Free);
        table.reading = false;
        if table.forgets(Instant::now(), self.wait.silence) {
            drop(table);
            return Err(self.fail(Error::new(
                ErrorKind::Io,
                format!(
                    "the server answers others but not a request that waits for more than {} s: a longer wait is allowed \
                     by --nbd-timeout",
                    self.wait.silence.unwrap_or_default().as_secs_f32()
                ),
            )));
        }
        let asleep = |slot: &Slot| matches!(slot, Slot::Asleep(_));
        let next = table.slots.iter().position(asleep);
        drop(table);
        if let Some(turn) = next.and_then(|next| self.turns.get(next)) {
            turn.notify_one();
        }
        self.free.notify_one();
        Ok(())
    }

    /// Ends the connection for all: returns what the first to find out has to say.
    fn fail(&self, error: Error) -> Error {
        let mut table = lock(&self.table);
        if table.broken.is_none() {
            table.broken = Some((error.kind(), error.to_string()));
            table.gone = self.socket.is_gone();
        }
        drop(table);
        self.socket.shutdown();
        self.turns.iter().for_each(Condvar::notify_all);
        self.free.notify_all();
        error
    }
}

fn set(table: &mut Table, nth: usize, state: Slot) {
    if let Some(slot) = table.slots.get_mut(nth) {
        *slot = state;
    }
}

impl Drop for Connection {
    /// Says goodbye: a server that is not told takes it for a client that vanished.
    fn drop(&mut self) {
        if lock(&self.table).broken.is_some() {
            return;
        }
        let bye = Ask {
            kind: cmd::DISC,
            flags: 0,
            offset: 0,
            len: 0,
            data: &[],
        };
        // One that does not take it sees the end of the connection; nobody waits for that.
        self.wait.until = Some(Instant::now());
        let _ = self.send(&bye, 0).context(|| "disconnect");
    }
}

/// What came of an answer.
#[derive(Debug)]
struct Answer<'a> {
    ask: &'a Ask<'a>,
    take: Take<'a>,
    /// Ranges of the export whose data are there, in order, none of which touch.
    parts: Vec<(u64, u64)>,
    refused: Option<Error>,
    described: bool,
}

impl Answer<'_> {
    /// Where the data of a range belong, which must not have come before.
    fn arrived(&mut self, offset: u64, len: u64) -> Result<&mut [u8]> {
        let (ask, parts) = (self.ask, &mut self.parts);
        let Take::Data(buf) = &mut self.take else {
            return Err(broken("data that nobody asked for"));
        };
        let wrong = || {
            broken(format_args!(
                "{len} bytes at byte {offset} in answer to a read of {} at byte {}",
                ask.len, ask.offset
            ))
        };
        let skip = offset.checked_sub(ask.offset).ok_or_else(wrong)?;
        let end = offset.checked_add(len).ok_or_else(wrong)?;
        let range = usize::try_from(skip).ok().zip(usize::try_from(len).ok());
        let room = range.and_then(|(skip, len)| buf.get_mut(skip..)?.get_mut(..len));
        let room = room.filter(|room| !room.is_empty()).ok_or_else(wrong)?;
        // The first part that does not end before, and the one behind it.
        let nth = parts.partition_point(|(_, before)| *before < offset);
        let (here, next) = (parts.get(nth).copied(), parts.get(nth + 1).copied());
        let (replaced, part) = match (here, next) {
            (Some((start, before)), next) if before == offset => match next {
                Some((next, _)) if next < end => return Err(wrong()),
                Some((next, last)) if next == end => (2, (start, last)),
                _ => (1, (start, end)),
            },
            (Some((start, _)), _) if start < end => return Err(wrong()),
            (Some((start, last)), _) if start == end => (1, (offset, last)),
            _ if parts.len() >= PARTS_MAX => {
                return Err(broken(format_args!(
                    "a read in more than {PARTS_MAX} parts that do not touch"
                )));
            }
            _ => (0, (offset, end)),
        };
        parts.splice(nth..nth + replaced, [part]);
        Ok(room)
    }

    fn refuse(&mut self, value: u32, message: &str) -> Result<()> {
        if value == 0 {
            return Err(broken("an error that is none"));
        }
        let what = match message.is_empty() {
            true => "the server answers".to_owned(),
            false => format!("the server answers '{}'", block::plain(message)),
        };
        let error = std::io::Error::from_raw_os_error(errno_of(value));
        // The first says why; others may come of it.
        self.refused.get_or_insert(Error::os(what, error));
        Ok(())
    }

    /// The answer is complete: how it ended, or what it lacks.
    fn finish(self) -> Result<Option<Error>> {
        if self.refused.is_some() {
            return Ok(self.refused);
        }
        let (first, len) = (self.ask.offset, self.ask.len);
        match self.take {
            Take::Data(_) if self.parts != [(first, first + len)] => {
                let there: u64 = self.parts.iter().map(|(start, end)| end - start).sum();
                Err(broken(format_args!(
                    "a read of {len} bytes was answered with {there}"
                )))
            }
            Take::Status(_) if !self.described => Err(broken("block status without any")),
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
