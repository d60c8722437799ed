//! The accepting thread: new connections and their handshakes, all with one `poll`.
//!
//! Handshakes are rare and slow, so they stay off the workers. Every one has a deadline, and
//! a bound on what it may send; a client that dawdles holds its own connection and nothing else.

use super::{
    address::{Listener, NbdAddress},
    handshake::{Handshake, Negotiated, OPTION_BYTES_MAX, Step},
    server::Shared,
    wire::{self, Transfer},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{SocketFlags, accept_with, sockopt},
};
use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// How long to leave the listener alone after `accept` failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections taken in one go.
const ACCEPTS_MAX: usize = 16;
/// Reads of one handshake in one go, so that a client who sends fast does not hold up the others.
const READS_MAX: usize = 16;
/// Bytes of one read.
const READ_BYTES: usize = 16 << 10;
/// Asked for as the send buffer of Unix sockets, so that a large reply leaves in few pieces; TCP
/// finds its own size.
const SEND_BUFFER_BYTES: usize = 4 << 20;

/// A connection before its transmission phase.
struct Pending {
    socket: OwnedFd,
    handshake: Handshake,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    deadline: Instant,
    /// Nothing more is negotiated: once `output` is sent, go on with this, or close.
    outcome: Option<Option<Negotiated>>,
}

enum Progress {
    Waits,
    Closed,
    Agreed(Negotiated),
}

impl Pending {
    fn new(socket: OwnedFd, deadline: Instant) -> Self {
        let mut output = Vec::new();
        Self {
            socket,
            handshake: Handshake::start(&mut output),
            input: Vec::new(),
            output,
            sent: 0,
            deadline,
            outcome: None,
        }
    }

    fn wants(&self) -> PollFlags {
        if self.sent < self.output.len() {
            PollFlags::OUT
        } else {
            PollFlags::IN
        }
    }

    /// Sends, takes options, receives, as far as it goes without waiting.
    fn step(&mut self, shared: &Shared) -> Progress {
        let mut reads = 0;
        loop {
            // The next option is looked at when the answer to the last is out: bounds the output.
            while self.sent < self.output.len() {
                let rest = IoSlice::new(&self.output[self.sent..]);
                match wire::send(self.socket.as_fd(), &[rest]) {
                    Transfer::Bytes(bytes) => self.sent += bytes,
                    Transfer::WouldBlock => return Progress::Waits,
                    Transfer::End | Transfer::Gone => return Progress::Closed,
                }
            }
            self.output.clear();
            self.sent = 0;
            match self.outcome {
                Some(Some(agreed)) => return Progress::Agreed(agreed),
                Some(None) => return Progress::Closed,
                None => {}
            }
            let (used, step) = self
                .handshake
                .feed(&shared.export, &self.input, &mut self.output);
            self.input.drain(..used);
            match step {
                Step::More if used > 0 => {}
                Step::More => {
                    if reads == READS_MAX {
                        return Progress::Waits;
                    }
                    reads += 1;
                    match self.receive() {
                        Transfer::Bytes(_) => {}
                        Transfer::WouldBlock => return Progress::Waits,
                        Transfer::End | Transfer::Gone => return Progress::Closed,
                    }
                }
                Step::Transmit(agreed) => self.outcome = Some(Some(agreed)),
                Step::Close => self.outcome = Some(None),
            }
        }
    }

    fn receive(&mut self) -> Transfer {
        let old = self.input.len();
        // An incomplete option is never longer than this.
        debug_assert!(old < OPTION_BYTES_MAX + 16);
        self.input.resize(old + READ_BYTES, 0);
        let space = IoSliceMut::new(&mut self.input[old..]);
        let got = wire::receive(self.socket.as_fd(), &mut [space]);
        let bytes = if let Transfer::Bytes(bytes) = got {
            bytes
        } else {
            0
        };
        self.input.truncate(old + bytes);
        got
    }
}

/// The accepting thread's state.
pub(crate) struct Acceptor {
    listener: Listener,
    shared: Arc<Shared>,
    pending: Vec<Pending>,
    /// The listener is left alone until then.
    paused_until: Option<Instant>,
}

impl Acceptor {
    pub(crate) fn new(listener: Listener, shared: Arc<Shared>) -> Self {
        Self {
            listener,
            shared,
            pending: Vec::new(),
            paused_until: None,
        }
    }

    /// Runs until the server stops.
    pub(crate) fn run(mut self) {
        while !self.shared.stopping.load(Ordering::Acquire) {
            let Some((accepts, ready)) = self.wait() else {
                tracing::error!("the NBD server cannot wait for clients any more");
                return;
            };
            // From the end, so that those that leave do not move those that come.
            for index in (0..ready.len()).rev() {
                if ready[index] {
                    self.step(index);
                }
            }
            if accepts {
                self.accept();
            }
            let now = Instant::now();
            self.pending.retain(|pending| pending.deadline > now);
        }
    }

    /// Waits; whether there are connections to take, and which handshakes go on.
    fn wait(&mut self) -> Option<(bool, Vec<bool>)> {
        let now = Instant::now();
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
        }
        let deadlines = self.pending.iter().map(|pending| pending.deadline);
        let wait = deadlines
            .chain(self.paused_until)
            .min()
            .map(|deadline| deadline.saturating_duration_since(now));
        // Rounded up, so that the deadline has passed when `poll` returns.
        let timeout = wait.map(|wait| Timespec {
            tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        });
        let listens = if self.paused_until.is_none() {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![
            PollFd::new(&self.shared.wake, PollFlags::IN),
            PollFd::new(&self.listener, listens),
        ];
        fds.extend(
            self.pending
                .iter()
                .map(|pending| PollFd::new(&pending.socket, pending.wants())),
        );
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "poll");
                return None;
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).skip(1);
        let accepts = ready.next().unwrap_or(false);
        Some((accepts, ready.collect()))
    }

    /// Goes on with one handshake.
    fn step(&mut self, index: usize) {
        match self.pending[index].step(&self.shared) {
            Progress::Waits => {}
            Progress::Closed => drop(self.pending.swap_remove(index)),
            Progress::Agreed(agreed) => {
                let Pending { socket, input, .. } = self.pending.swap_remove(index);
                if let Err(error) = self.shared.transmit(socket, agreed, input) {
                    self.shared.warn(&format!("connection refused: {error}"));
                }
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_MAX {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return,
                // Clients that were gone before they were taken.
                Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => continue,
                Err(error) => {
                    self.shared
                        .warn(&format!("cannot take connections: {error}"));
                    self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            };
            if self.shared.live() + self.pending.len() >= self.shared.max_connections {
                self.shared.warn("too many connections, more are closed");
                continue;
            }
            if let Err(error) = self.tune(&socket) {
                self.shared.warn(&format!("socket option: {error}"));
            }
            let deadline = Instant::now() + self.shared.handshake_max;
            self.pending.push(Pending::new(socket, deadline));
            self.step(self.pending.len() - 1);
        }
    }

    fn tune(&self, socket: &OwnedFd) -> Result<(), Errno> {
        match self.listener.address {
            NbdAddress::Unix(_) => sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER_BYTES),
            NbdAddress::Tcp(..) => {
                sockopt::set_tcp_nodelay(socket, true)?;
                // A client whose machine is gone is noticed after two minutes.
                sockopt::set_socket_keepalive(socket, true)?;
                sockopt::set_tcp_keepidle(socket, Duration::from_secs(60))?;
                sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10))?;
                sockopt::set_tcp_keepcnt(socket, 6)
            }
        }
    }
}
