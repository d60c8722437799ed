//! Where a server listens.

use crate::socket::Socket;
use block::{Context, Error, Result};
use std::{
    fmt,
    net::TcpListener,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    str::FromStr,
};

/// An address of NBD servers: `unix:PATH` or `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A host's name or address, and a TCP port; port 0 takes any that is free.
    Tcp(String, u16),
}

impl FromStr for NbdAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(Error::invalid("unix: needs a path (unix:/run/disk.sock)"))
            } else {
                Ok(NbdAddress::Unix(path.into()))
            };
        }
        let wrong = || {
            Error::invalid(format!(
                "'{text}' is not an NBD address: give unix:PATH or HOST:PORT (localhost:10809)"
            ))
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) => v6,
            None if host.contains([':', '/', '[', ']']) => return Err(wrong()),
            None => host,
        };
        if host.is_empty() {
            return Err(wrong());
        }
        Ok(NbdAddress::Tcp(host.into(), port))
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            NbdAddress::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            NbdAddress::Tcp(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// A listening socket, non-blocking; removes its file, if it has one, at the end.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Bound,
    /// Where it really listens.
    pub address: NbdAddress,
}

#[derive(Debug)]
enum Bound {
    Unix(Socket),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens. A Unix socket's file that nobody listens on is replaced.
    pub(crate) fn bind(address: &NbdAddress) -> Result<Listener> {
        match address {
            NbdAddress::Unix(path) => {
                let socket = Socket::bind(path, None).map_err(|e| e.within(address))?;
                Ok(Listener {
                    socket: Bound::Unix(socket),
                    address: address.clone(),
                })
            }
            NbdAddress::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port))
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                    .context(|| format!("listen on {address}"))?;
                let at = listener.local_addr().context(|| address.to_string())?;
                Ok(Listener {
                    socket: Bound::Tcp(listener),
                    address: NbdAddress::Tcp(host.clone(), at.port()),
                })
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Bound::Unix(socket) => socket.listener.as_fd(),
            Bound::Tcp(listener) => listener.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::ErrorKind;
    use std::{
        fs,
        os::unix::net::{UnixListener, UnixStream},
    };

    #[test]
    fn addresses_are_read_and_written() {
        for text in [
            "unix:/run/disk.sock",
            "unix:relative:with:colons",
            "localhost:10809",
            "127.0.0.1:0",
            "[::1]:10809",
        ] {
            let address: NbdAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "/run/x",
            "localhost",
            ":10809",
            "host:",
            "host:70000",
            "host:-1",
            "::1:10809",
            "[::1:10809",
            "nbd://host:1",
        ] {
            let error = text.parse::<NbdAddress>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = NbdAddress::Unix(path.clone());
        // A process that was killed leaves the file and no listener.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let first = Listener::bind(&address).unwrap();
        let second = Listener::bind(&address).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::Locked, "{second}");
        UnixStream::connect(&path).unwrap();
        drop(first);
        assert!(!path.exists());

        fs::write(&path, "a user's file").unwrap();
        Listener::bind(&address).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"a user's file");
    }

    #[test]
    fn what_took_the_place_of_our_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let ours = Listener::bind(&NbdAddress::Unix(path.clone())).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }
}
