//! A server's client that has one request at a time: what is asked when each answer is to be looked at for itself.

use crate::{
    breakdown::BLOCK_BYTES_MAX,
    driver::{BUFFERS, Chain, FLUSH, IN, Machine, OUT, Piece, RAM, Ring, Setup, feature},
    load::{self, Target},
};
use block::{Context, Error, ErrorKind, Result};
use disk::now_ns;
use nbd::{Client, Options, proto::transmission_flag};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{os::fd::AsFd, path::Path};
use trace::Operation;

/// How long a request may take.
const PATIENCE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};

/// Connects to a server, for requests of `block_bytes` ([`BLOCK_BYTES_MAX`] at most).
///
/// # Errors
///
/// It is no server, cannot be reached, or is none of its protocol.
pub(crate) fn connect(target: &Target, block_bytes: u64) -> Result<Box<dyn Single>> {
    debug_assert!(block_bytes <= BLOCK_BYTES_MAX);
    Ok(match target {
        Target::VhostUser(socket) => Box::new(Vhost::connect(socket, block_bytes)?),
        Target::Nbd(uri) => Box::new(NbdClient::connect(uri, block_bytes)?),
        Target::File { path, .. } => {
            return Err(Error::invalid(format!(
                "{}: it is no server",
                path.display()
            )));
        }
    })
}

/// A client with one request at a time.
pub(crate) trait Single {
    /// Bytes of the disk.
    fn capacity(&self) -> u64;

    /// Whether the disk can be written.
    fn writes(&self) -> bool;

    /// Makes a request at `at` and waits for its end: when it began and ended, in nanoseconds of [`now_ns`]. A write is of what the
    /// read before has brought.
    fn request(&mut self, operation: Operation, at: u64) -> Result<(u64, u64)>;
}

struct Vhost {
    machine: Machine,
    ring: Ring,
    capacity: u64,
    bytes: u32,
    name: String,
}

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 64;
const DATA: u64 = BUFFERS + 4096;

impl Vhost {
    fn connect(socket: &Path, block_bytes: u64) -> Result<Self> {
        let name = socket.display().to_string();
        let named = || name.clone();
        let ram_bytes = (DATA - RAM + block_bytes).next_multiple_of(2 << 20);
        let setup = Setup {
            ram_bytes,
            ..Setup::default()
        };
        let mut machine = Machine::start(socket, setup).context(named)?;
        let config = machine.frontend.get_config(0, 8).context(named)?;
        let config: [u8; 8] = config.try_into().unwrap_or_default();
        let ring = machine.queues.pop().map(|queue| queue.into_ring());
        let ring = ring.ok_or_else(|| Error::invalid("no queue"))?;
        // At most 4 MiB.
        let bytes = block_bytes as u32;
        Ok(Self {
            machine,
            ring,
            capacity: u64::from_le_bytes(config).saturating_mul(512),
            bytes,
            name,
        })
    }

    /// Sleeps until the device calls.
    fn wait(&mut self) -> Result<()> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.ring.call_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.ring.err_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.machine.frontend.as_fd(), PollFlags::RDHUP),
        ];
        let why = match poll(&mut fds, Some(&PATIENCE)) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(Error::os(&self.name, e.into())),
            Ok(_) if !fds[0].revents().is_empty() => {
                return self.ring.wait_call().context(|| self.name.clone());
            }
            Ok(0) => "the server did not answer for a minute",
            Ok(_) if !fds[1].revents().is_empty() => "the server found the ring broken",
            Ok(_) => "the server has gone",
        };
        Err(Error::new(ErrorKind::Io, format!("{}: {why}", self.name)))
    }
}

impl Single for Vhost {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn writes(&self) -> bool {
        self.machine.features & feature::RO == 0
    }

    fn request(&mut self, operation: Operation, at: u64) -> Result<(u64, u64)> {
        let kind = match operation {
            Operation::Write => OUT,
            Operation::Flush => FLUSH,
            _ => IN,
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(at / 512).to_le_bytes());
        self.machine.ram.write(HEADER, &header);
        self.machine.ram.write(STATUS, &[0xff]);
        let data = Piece {
            at: DATA,
            len: self.bytes,
            device_writes: kind == IN,
        };
        let all = [Piece::read(HEADER, 16), data, Piece::write(STATUS, 1)];
        let flush = [all[0], all[2]];
        let pieces: &[Piece] = if kind == FLUSH { &flush } else { &all };
        let began = now_ns();
        // Three descriptors at most.
        self.ring.offer(0, Chain::Pieces(pieces), false);
        self.ring.kick().context(|| self.name.clone())?;
        while self.ring.pop_used().is_none() {
            if self.ring.enable_call() {
                self.wait()?;
            }
        }
        let ended = now_ns();
        let mut status = [0xff];
        self.machine.ram.read_into(STATUS, &mut status);
        if status != [0] {
            return Err(Error::new(
                ErrorKind::Io,
                format!(
                    "{}: the request at {at} ended with status {}",
                    self.name, status[0]
                ),
            ));
        }
        Ok((began, ended))
    }
}

struct NbdClient {
    client: Client,
    buffer: Vec<u8>,
}

impl NbdClient {
    fn connect(uri: &str, block_bytes: u64) -> Result<Self> {
        let uri = load::nbd::uri(uri)?;
        // At most 4 MiB.
        let buffer = vec![0x5a; block_bytes as usize];
        Ok(Self {
            client: Client::connect(&uri, &Options::default())?,
            buffer,
        })
    }
}

impl Single for NbdClient {
    fn capacity(&self) -> u64 {
        self.client.export().size
    }

    fn writes(&self) -> bool {
        !self.client.export().has(transmission_flag::READ_ONLY)
    }

    fn request(&mut self, operation: Operation, at: u64) -> Result<(u64, u64)> {
        let began = now_ns();
        match operation {
            Operation::Write => self.client.write(at, &self.buffer)?,
            Operation::Flush => self.client.flush()?,
            _ => self.client.read(at, &mut self.buffer)?,
        }
        Ok((began, now_ns()))
    }
}
