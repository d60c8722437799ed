//! Load on an NBD server: one connection per queue, as many requests in flight on each as the depth says.
//!
//! A batch of requests is one `sendmsg`, headers of adjacent reads as one piece; replies are taken with one large
//! `recv`, and read data stay in its buffer.

mod replies;

use super::{
    By, Report, Spec,
    drive::{Client, Ended},
    fill,
    plan::{Geometry, Kind, Places, Request},
    run::run_queues,
};
use block::{Context, Error, ErrorKind, Result, size};
use nbd::{
    Uri,
    handshake::{self, Export},
    proto::{Style, cmd, cmd_flag, transmission_flag},
    request::{HEADER_BYTES_MAX, Header},
    socket::Socket,
    uri::Server,
};
use replies::{Replies, Waiting};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg},
};
use std::{io::IoSlice, time::Duration};

/// How long a thread sleeps for replies before it looks around.
const TICK: Duration = Duration::from_millis(500);
/// How long a handshake may take, where requests may take longer.
const HANDSHAKE_MAX: Duration = Duration::from_secs(20);
/// Pieces of one `sendmsg`.
const PIECES_MAX: usize = 128;
/// How often a polling client looks before it sees to other things.
const SPINS: u32 = 100;

pub(crate) fn run(spec: &Spec, text: &str, by: By<'_>) -> Result<Report> {
    let uri = uri(text)?;
    let mut connections = Vec::new();
    for number in 1..=spec.queues {
        let named = || format!("{text}: connection {number} of {}", spec.queues);
        let options = handshake::Options {
            time: (!spec.answer_max.is_zero()).then(|| spec.answer_max.min(HANDSHAKE_MAX)),
            ..handshake::Options::default()
        };
        let (socket, export) = handshake::open(&uri, &options).context(named)?;
        // Before there is a second one: such a server may take no more, and leave it waiting.
        if spec.verify.is_some()
            && spec.queues > 1
            && !export.has(transmission_flag::CAN_MULTI_CONN)
        {
            return Err(Error::invalid(format!(
                "{text}: --verify with --queues {}: the server does not say that connections see each other's writes and flushes \
                 (NBD_FLAG_CAN_MULTI_CONN), so what must be there is not known: give --queues 1",
                spec.queues
            )));
        }
        connections.push((socket, export));
    }
    let mut places = None;
    for (_, export) in &connections {
        let geometry = Geometry {
            capacity: export.size,
            read_only: export.has(transmission_flag::READ_ONLY),
            flushes: export.has(transmission_flag::SEND_FLUSH),
            block_bytes: export.block_min.into(),
        };
        if spec.block_bytes > export.block_max.into() {
            return Err(Error::invalid(format!(
                "{text}: --bs {}: the server takes {} at most",
                size::human(spec.block_bytes),
                size::human(export.block_max.into())
            )));
        }
        places = Some(Places::new(spec, &geometry).context(|| text.to_owned())?);
    }
    let places = places.ok_or_else(|| Error::invalid("--queues 0"))?;
    let openers = (0..).zip(connections).map(|(queue, (socket, export))| {
        move || {
            socket.blocking(TICK).context(|| "connection")?;
            Ok(Nbd::new(spec, socket, export, queue))
        }
    });
    run_queues(spec, places, openers.collect(), by).context(|| text.to_owned())
}

/// The export that `text` names: a URI, or the socket alone.
pub(crate) fn uri(text: &str) -> Result<Uri> {
    match text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
        Some(path) => Ok(Uri {
            server: Server::Unix(path.into()),
            export: String::new(),
            context: None,
        }),
        None => Uri::parse(text),
    }
}

/// Adjacent bytes of the stream of requests.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// End of its headers in `Nbd::out`; they begin where the last part's end.
    headers_end: usize,
    /// The slot whose data follow, and how many bytes.
    data: Option<(usize, usize)>,
}

struct Nbd {
    socket: Socket,
    style: Style,
    replies: Replies,
    block: usize,
    data: Vec<u8>,
    /// Requests of this batch, and of the last where the socket did not take them all.
    out: Vec<u8>,
    parts: Vec<Part>,
    /// Parts that were sent, and bytes of the next one.
    sent: (usize, usize),
    poll: bool,
    sends: u64,
    receives: u64,
}

impl Nbd {
    fn new(spec: &Spec, socket: Socket, export: Export, queue: u32) -> Self {
        let (depth, block) = (spec.depth as usize, spec.block_bytes as usize);
        let mut data = Vec::new();
        if spec.writes() || spec.verify.is_some() {
            data.resize(block * depth, 0);
            for (slot, block) in data.chunks_mut(block).enumerate() {
                fill(block, spec.seed, queue, slot);
            }
        }
        Self {
            socket,
            style: export.style,
            replies: Replies::new(export.style, depth, spec.verify.as_ref().map(|_| block)),
            block,
            data,
            out: Vec::with_capacity(depth * 32),
            parts: Vec::with_capacity(depth),
            sent: (0, 0),
            poll: spec.poll,
            sends: 0,
            receives: 0,
        }
    }

    /// Stages a request's header; its length is at most 32 MiB.
    fn put(&mut self, kind: u16, cookie: u64, (offset, len): (u64, u64)) {
        let carries = self.style == Style::Extended && kind == cmd::WRITE;
        let header = Header {
            flags: if carries { cmd_flag::PAYLOAD_LEN } else { 0 },
            kind,
            cookie,
            offset,
            len,
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        let size = header.put(self.style, &mut bytes);
        self.out.extend_from_slice(&bytes[..size]);
    }

    /// Sends what the socket takes of what is staged.
    fn flush_out(&mut self) -> Result<()> {
        while self.sent.0 < self.parts.len() {
            let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
            let mut count = 0;
            let (first, mut skip) = self.sent;
            let mut start = match first.checked_sub(1) {
                Some(before) => self.parts[before].headers_end,
                None => 0,
            };
            for part in &self.parts[first..] {
                if count + 2 > PIECES_MAX {
                    break;
                }
                let data = part.data.map_or(&[][..], |(slot, bytes)| {
                    &self.data[slot * self.block..][..bytes]
                });
                for piece in [&self.out[start..part.headers_end], data] {
                    let cut = skip.min(piece.len());
                    skip -= cut;
                    if cut < piece.len() {
                        pieces[count] = IoSlice::new(&piece[cut..]);
                        count += 1;
                    }
                }
                start = part.headers_end;
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let mut none = SendAncillaryBuffer::default();
            self.sends += 1;
            match sendmsg(&self.socket, &pieces[..count], &mut none, flags) {
                Ok(bytes) => self.advance(bytes),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.forget_sent();
                    return Ok(());
                }
                Err(e) => return Err(gone(e)),
            }
        }
        self.out.clear();
        self.parts.clear();
        self.sent = (0, 0);
        Ok(())
    }

    /// Drops the parts that were sent: where the socket is always full, the rest never ends.
    fn forget_sent(&mut self) {
        if let Some(last) = self.sent.0.checked_sub(1) {
            let bytes = self.parts[last].headers_end;
            self.parts.drain(..=last);
            self.out.drain(..bytes);
            for part in &mut self.parts {
                part.headers_end -= bytes;
            }
            self.sent.0 = 0;
        }
    }

    /// Notes that `bytes` more were sent.
    fn advance(&mut self, bytes: usize) {
        let mut left = self.sent.1 + bytes;
        while let Some(part) = self.parts.get(self.sent.0) {
            let start = match self.sent.0.checked_sub(1) {
                Some(before) => self.parts[before].headers_end,
                None => 0,
            };
            let data = part.data.map_or(0, |(_, bytes)| bytes);
            let len = part.headers_end - start + data;
            if left < len {
                break;
            }
            left -= len;
            self.sent.0 += 1;
        }
        self.sent.1 = left;
    }

    /// Receives once; whether there was anything.
    fn receive(&mut self, flags: RecvFlags, ended: &mut Vec<Ended>) -> Result<bool> {
        self.receives += 1;
        match recv(&self.socket, self.replies.room(), flags) {
            Ok((_, 0)) => Err(Error::new(
                ErrorKind::Io,
                "the server closed the connection with requests in flight",
            )),
            Ok((_, bytes)) => {
                let end = |slot, ok| ended.push(Ended { slot, ok });
                self.replies.arrived(bytes, end)?;
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(e) => Err(gone(e)),
        }
    }
}

fn gone(error: Errno) -> Error {
    Error::os("the connection to the server broke", error.into())
}

impl Client for Nbd {
    fn submit(&mut self, slot: usize, request: Request) -> Result<()> {
        let (command, offset, expected) = match request.kind {
            Kind::Read => (cmd::READ, request.offset, request.bytes),
            Kind::Write => (cmd::WRITE, request.offset, 0),
            Kind::Flush => (cmd::FLUSH, 0, 0),
        };
        self.replies.waiting[slot] = Waiting::new(expected, offset);
        self.put(command, slot as u64, (offset, request.bytes));
        let part = Part {
            headers_end: self.out.len(),
            data: (request.kind == Kind::Write).then_some((slot, request.bytes as usize)),
        };
        match self.parts.last_mut() {
            // Never one that is under way.
            Some(last) if last.data.is_none() && self.sent == (0, 0) => *last = part,
            _ => self.parts.push(part),
        }
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        self.flush_out()
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) -> Result<()> {
        if !self.parts.is_empty() {
            // The socket is full: the server may wait for us to take its replies.
            let events = PollFlags::IN | PollFlags::OUT;
            let mut fds = [PollFd::new(&self.socket, events)];
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(TICK.subsec_nanos()),
            };
            match poll(&mut fds, Some(&tick)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(gone(e)),
            }
            self.receive(RecvFlags::DONTWAIT, ended)?;
            return self.flush_out();
        }
        if !self.poll {
            self.receive(RecvFlags::empty(), ended)?;
            return Ok(());
        }
        for _ in 0..SPINS {
            self.receive(RecvFlags::DONTWAIT, ended)?;
            if !ended.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn put(&mut self, slot: usize, block: &[u8]) {
        self.data[slot * self.block..][..block.len()].copy_from_slice(block);
        if let Some(kept) = self.replies.kept(slot) {
            kept.copy_from_slice(block);
        }
    }

    fn get(&mut self, slot: usize, block: &mut [u8]) {
        if let Some(kept) = self.replies.kept(slot) {
            block.copy_from_slice(kept);
        }
    }

    fn notifications(&self) -> (u64, u64) {
        (self.sends, self.receives)
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        if self.parts.is_empty() {
            self.out.clear();
            self.put(cmd::DISC, 0, (0, 0));
            let bye = [IoSlice::new(&self.out)];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            // A server that does not take it sees the end of the connection.
            let _ = sendmsg(
                &self.socket,
                &bye,
                &mut SendAncillaryBuffer::default(),
                flags,
            );
        }
    }
}
