//! A connection's socket. Nothing here waits longer than its [`Wait`] allows.

use crate::uri::Server;
use block::{Context as _, Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recv, sendmsg, socket_with, sockopt,
};
use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a thread sleeps before it looks whether it is to give up.
const TICK: Duration = Duration::from_millis(100);
/// Bytes that count as a word of a server: fewer, which do not end what is waited for, are silence.
const WORD_BYTES: usize = 64 << 10;

/// How long to wait for a server.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wait {
    /// Until then; absent: for ever.
    pub until: Option<Instant>,
    /// How long it may neither send nor take anything (less than 64 KiB, that is) of what is waited for; absent: for ever.
    pub silence: Option<Duration>,
    /// Whether somebody asked for the end: looked at several times a second.
    pub cancelled: Option<fn() -> bool>,
}

impl Wait {
    /// Nobody is waited for.
    fn check(&self) -> Result<()> {
        if self.cancelled.is_some_and(|cancelled| cancelled()) {
            return Err(Error::new(ErrorKind::Interrupted, "stopped"));
        }
        match self.until {
            Some(until) if until <= Instant::now() => Err(Error::new(
                ErrorKind::Io,
                "the server does not answer: does it take so many connections (qemu-nbd --shared)?",
            )),
            _ => Ok(()),
        }
    }

    /// Sleeps a moment, unless it is over.
    pub(crate) fn pause(&self) -> Result<()> {
        self.check()?;
        thread::sleep(TICK);
        Ok(())
    }

    /// Its part for one of `places` that are tried one after the other.
    fn share(&self, places: usize) -> Self {
        let now = Instant::now();
        let share = |until: Instant| {
            let parts = u32::try_from(places).unwrap_or(u32::MAX).max(1);
            now + until.saturating_duration_since(now) / parts
        };
        Self {
            until: self.until.map(share),
            ..*self
        }
    }

    /// Sleeps until `fd` is as `events` say, or a moment.
    fn sleep(&self, fd: BorrowedFd<'_>, events: PollFlags) -> Result<()> {
        self.check()?;
        let left = self
            .until
            .map(|until| until.saturating_duration_since(Instant::now()));
        let time = left.map_or(TICK, |left| left.min(TICK));
        let time = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(time.subsec_nanos()),
        };
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&time)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(gone(error)),
        }
    }
}

/// How long nothing has come or gone.
#[derive(Debug, Default)]
struct Silence {
    since: Option<Instant>,
    bytes: usize,
}

impl Silence {
    /// So many bytes came, or went.
    fn broken(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes >= WORD_BYTES {
            *self = Self::default();
        }
    }

    /// As [`Wait::sleep`], unless it is too long already.
    fn sleep(&mut self, wait: &Wait, fd: BorrowedFd<'_>, events: PollFlags) -> Result<()> {
        let since = *self.since.get_or_insert_with(Instant::now);
        match wait.silence {
            Some(limit) if since.elapsed() >= limit => Err(Error::new(
                ErrorKind::Io,
                format!(
                    "the server has been silent for {} s: a longer wait is allowed by --nbd-timeout",
                    limit.as_secs_f32()
                ),
            )),
            _ => wait.sleep(fd, events),
        }
    }
}

/// Calls `look_up`, which blocks and cannot be told to stop, on a thread that is left alone where that takes too long.
fn look_up(
    host: &str,
    wait: &Wait,
    look_up: impl FnOnce() -> std::io::Result<Vec<SocketAddr>> + Send + 'static,
) -> Result<Vec<SocketAddr>> {
    let failed = |error| Error::os(format!("looking up '{}'", block::plain(host)), error);
    let (found, answer) = mpsc::sync_channel(1);
    let looking = move || {
        // Nobody wants it any more.
        let _ = found.send(look_up());
    };
    let thread = thread::Builder::new().name("nbd-look-up".into());
    thread.spawn(looking).map_err(failed)?;
    loop {
        match answer.recv_timeout(TICK) {
            Ok(found) => return found.map_err(failed),
            Err(RecvTimeoutError::Timeout) => wait
                .check()
                .context(|| format!("looking up '{}'", block::plain(host)))?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(failed(std::io::Error::other("the thread for it ended")));
            }
        }
    }
}

fn gone(error: Errno) -> Error {
    Error::os("the connection to the server broke", error.into())
}

/// A connection.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An address of a server.
#[derive(Debug)]
enum Address {
    Unix(SocketAddrUnix),
    Tcp(SocketAddr),
}

impl Socket {
    /// Connects to the first address of `server` that answers.
    ///
    /// # Errors
    ///
    /// There is no such host, nobody listens, or not in time.
    pub fn connect(server: &Server, wait: &Wait) -> Result<Self> {
        let addresses: Vec<Address> = match server {
            Server::Unix(path) => {
                let address = SocketAddrUnix::new(path.as_path()).map_err(|error| {
                    let path = path.display();
                    match error {
                        Errno::NAMETOOLONG => Error::invalid(format!(
                            "{path}: the name of a socket has 107 bytes at most"
                        )),
                        _ => Error::os(path.to_string(), error.into()),
                    }
                })?;
                vec![Address::Unix(address)]
            }
            Server::Tcp(host, port) => {
                let name = (host.clone(), *port);
                let found = match host.parse::<IpAddr>() {
                    Ok(address) => vec![SocketAddr::new(address, *port)],
                    Err(_) => look_up(host, wait, move || Ok(name.to_socket_addrs()?.collect()))?,
                };
                found.into_iter().map(Address::Tcp).collect()
            }
        };
        let mut failed = None;
        for (nth, address) in addresses.iter().enumerate() {
            // One that does not answer leaves time for the others.
            let wait = wait.share(addresses.len() - nth);
            match Self::connect_to(address, &wait) {
                Err(error) if error.kind() != ErrorKind::Interrupted => failed = Some(error),
                connected => return connected,
            }
        }
        Err(failed.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "the host has no address")))
    }

    fn connect_to(address: &Address, wait: &Wait) -> Result<Self> {
        let what = || match address {
            Address::Unix(_) => "connecting".to_owned(),
            Address::Tcp(address) => format!("connecting to {address}"),
        };
        let failed = |error: Errno| Error::os(what(), error.into());
        let family = match address {
            Address::Unix(_) => AddressFamily::UNIX,
            Address::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
            Address::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = socket_with(family, SocketType::STREAM, flags, None).map_err(failed)?;
        loop {
            let connected = match address {
                Address::Unix(address) => connect(&fd, address),
                Address::Tcp(address) => connect(&fd, address),
            };
            match connected {
                Ok(()) => break,
                // More clients wait than the server lets wait.
                Err(Errno::AGAIN) => {
                    wait.sleep(fd.as_fd(), PollFlags::empty()).context(what)?;
                }
                Err(Errno::INPROGRESS | Errno::ALREADY | Errno::INTR) => {
                    wait.sleep(fd.as_fd(), PollFlags::OUT).context(what)?;
                    match sockopt::socket_error(&fd).map_err(failed)? {
                        Ok(()) => {}
                        Err(error) => return Err(failed(error)),
                    }
                }
                Err(Errno::ISCONN) => break,
                Err(error) => return Err(failed(error)),
            }
        }
        if let Address::Tcp(_) = address {
            sockopt::set_tcp_nodelay(&fd, true).map_err(failed)?;
            // A host that vanished is noticed some time.
            sockopt::set_socket_keepalive(&fd, true).map_err(failed)?;
        }
        Ok(Self(fd))
    }

    /// Has calls of others that wait at the socket do so, for at most `time`; what is here never waits in them.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn blocking(&self, time: Duration) -> std::io::Result<()> {
        let mut flags = rustix::fs::fcntl_getfl(&self.0)?;
        flags.remove(rustix::fs::OFlags::NONBLOCK);
        rustix::fs::fcntl_setfl(&self.0, flags)?;
        Ok(sockopt::set_socket_timeout(
            &self.0,
            sockopt::Timeout::Recv,
            Some(time),
        )?)
    }

    /// Fills `buf`.
    ///
    /// # Errors
    ///
    /// The connection ended, or nothing came in time.
    pub fn read(&self, mut buf: &mut [u8], wait: &Wait) -> Result<()> {
        let mut silence = Silence::default();
        while !buf.is_empty() {
            match recv(&self.0, &mut *buf, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => {
                    return Err(Error::new(
                        ErrorKind::Io,
                        "the server closed the connection",
                    ));
                }
                Ok((_, bytes)) => {
                    buf = buf.get_mut(bytes..).unwrap_or_default();
                    silence.broken(bytes);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => silence.sleep(wait, self.as_fd(), PollFlags::IN)?,
                Err(error) => return Err(gone(error)),
            }
        }
        Ok(())
    }

    /// Sends all of `pieces`.
    ///
    /// # Errors
    ///
    /// The connection ended, or the server did not take it in time.
    pub fn write(&self, mut pieces: &mut [IoSlice<'_>], wait: &Wait) -> Result<()> {
        // The empty ones are left out, or nothing sent would mean nothing.
        IoSlice::advance_slices(&mut pieces, 0);
        let mut silence = Silence::default();
        while !pieces.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.0, pieces, &mut SendAncillaryBuffer::default(), flags) {
                Ok(bytes) => {
                    IoSlice::advance_slices(&mut pieces, bytes);
                    silence.broken(bytes);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => silence.sleep(wait, self.as_fd(), PollFlags::OUT)?,
                Err(error) => return Err(gone(error)),
            }
        }
        Ok(())
    }

    /// Whether the other end has ended the connection, and all that it said before was read.
    pub fn is_gone(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        match recv(&self.0, &mut [0; 1], flags) {
            Ok((_, bytes)) => bytes == 0,
            Err(Errno::AGAIN | Errno::INTR) => false,
            Err(_) => true,
        }
    }

    /// Ends the connection for whoever waits at it, too.
    pub fn shutdown(&self) {
        // One that is gone is shut.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

#[cfg(test)]
impl Socket {
    /// A pair, of which nobody else has the other end.
    pub(crate) fn pair() -> (Self, std::os::unix::net::UnixStream) {
        let (own, other) = std::os::unix::net::UnixStream::pair().unwrap();
        (Self(own.into()), other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_look_up_can_be_given_up() {
        // A resolver that never answers.
        let (_held, never) = mpsc::channel::<()>();
        let resolver = move || {
            let _ = never.recv();
            Ok(Vec::new())
        };
        let wait = Wait {
            cancelled: Some(|| true),
            ..Wait::default()
        };
        let error = look_up("h", &wait, resolver).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        let (_held, never) = mpsc::channel::<()>();
        let resolver = move || {
            let _ = never.recv();
            Ok(Vec::new())
        };
        let wait = Wait {
            until: Some(Instant::now()),
            ..Wait::default()
        };
        let error = look_up("h", &wait, resolver).unwrap_err().to_string();
        assert!(error.contains("looking up 'h'"), "{error}");
        assert!(error.contains("does not answer"), "{error}");
    }

    #[test]
    fn a_connection_can_be_given_up_and_leaves_time_for_the_next_address() {
        // Nobody accepts, and no more clients may wait: of TCP, the first packet is dropped then.
        let full = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&full, 0).unwrap();
        let address = full.local_addr().unwrap();
        let _waiting = std::net::TcpStream::connect(address).unwrap();
        let address = Address::Tcp(address);
        let wait = Wait {
            cancelled: Some(|| true),
            ..Wait::default()
        };
        let error = Socket::connect_to(&address, &wait).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        let wait = Wait {
            until: Some(Instant::now() + 6 * TICK),
            ..Wait::default()
        };
        let error = Socket::connect_to(&address, &wait.share(2)).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("connecting to 127.0.0.1:"), "{error}");
        // The other half is left.
        assert!(wait.check().is_ok());
    }

    #[test]
    fn silence_ends_the_wait_both_ways() {
        let (socket, other) = Socket::pair();
        let wait = Wait {
            silence: Some(TICK),
            ..Wait::default()
        };
        let error = socket.read(&mut [0; 4], &wait).unwrap_err().to_string();
        assert!(error.contains("has been silent for 0.1 s"), "{error}");
        let much = vec![0; 16 << 20];
        let error = socket.write(&mut [IoSlice::new(&much)], &wait);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("has been silent"), "{error}");
        drop(other);
        // Single bytes are no words; 64 KiB are.
        let mut silence = Silence {
            since: Some(Instant::now()),
            bytes: 0,
        };
        silence.broken(WORD_BYTES - 1);
        assert!(silence.since.is_some());
        silence.broken(1);
        assert!(silence.since.is_none());
    }
}
