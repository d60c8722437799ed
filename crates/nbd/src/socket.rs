//! A connection's socket. Nothing here waits longer than its [`Wait`] allows.

use crate::uri::Server;
use block::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recv, sendmsg, socket_with, sockopt,
};
use std::io::IoSlice;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long a thread sleeps before it looks whether it is to give up.
const TICK: Duration = Duration::from_millis(100);

/// How long to wait for a server.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wait {
    /// Until then; absent: for ever.
    pub until: Option<Instant>,
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

    /// Sleeps until `fd` is as `events` say, or a moment.
    fn sleep(&self, fd: BorrowedFd<'_>, events: PollFlags) -> Result<()> {
        self.check()?;
        let time = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(TICK.subsec_nanos()),
        };
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&time)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(gone(error)),
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
            Server::Tcp(host, port) => (host.as_str(), *port)
                .to_socket_addrs()
                .map_err(|error| Error::os(host.clone(), error))?
                .map(Address::Tcp)
                .collect(),
        };
        let mut failed = None;
        for address in &addresses {
            match Self::connect_to(address, wait) {
                Err(error) if error.kind() != ErrorKind::Interrupted => failed = Some(error),
                connected => return connected,
            }
        }
        Err(failed.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "the host has no address")))
    }

    fn connect_to(address: &Address, wait: &Wait) -> Result<Self> {
        let failed = |error: Errno| Error::os("connect", error.into());
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
                Err(Errno::AGAIN) => wait.sleep(fd.as_fd(), PollFlags::empty())?,
                Err(Errno::INPROGRESS | Errno::ALREADY | Errno::INTR) => {
                    wait.sleep(fd.as_fd(), PollFlags::OUT)?;
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
        while !buf.is_empty() {
            match recv(&self.0, &mut *buf, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => {
                    return Err(Error::new(
                        ErrorKind::Io,
                        "the server closed the connection",
                    ));
                }
                Ok((_, bytes)) => buf = buf.get_mut(bytes..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait.sleep(self.as_fd(), PollFlags::IN)?,
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
        while !pieces.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.0, pieces, &mut SendAncillaryBuffer::default(), flags) {
                Ok(bytes) => IoSlice::advance_slices(&mut pieces, bytes),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait.sleep(self.as_fd(), PollFlags::OUT)?,
                Err(error) => return Err(gone(error)),
            }
        }
        Ok(())
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
