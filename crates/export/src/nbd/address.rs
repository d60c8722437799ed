//! Where a server listens.

use block::{Context, Error, ErrorKind, Result};
use std::{
    fmt, fs,
    io::ErrorKind as IoKind,
    net::TcpListener,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
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
    pub socket: OwnedFd,
    /// Where it really listens.
    pub address: NbdAddress,
    /// Device and inode of the socket's file.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listens. A Unix socket's file that nobody listens on is replaced.
    pub(crate) fn bind(address: &NbdAddress) -> Result<Listener> {
        match address {
            NbdAddress::Unix(path) => {
                let listener = bind_unix(path).map_err(|e| e.within(address))?;
                listener
                    .set_nonblocking(true)
                    .context(|| address.to_string())?;
                Ok(Listener {
                    socket: listener.into(),
                    address: address.clone(),
                    file: identity(path),
                })
            }
            NbdAddress::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port))
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                    .context(|| format!("listen on {address}"))?;
                let at = listener.local_addr().context(|| address.to_string())?;
                Ok(Listener {
                    socket: listener.into(),
                    address: NbdAddress::Tcp(host.clone(), at.port()),
                    file: None,
                })
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Only the file that is ours: somebody may have put another in its place.
        if let NbdAddress::Unix(path) = &self.address
            && self.file.is_some()
            && identity(path) == self.file
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(%error, "cannot remove {}", path.display());
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let data = fs::symlink_metadata(path).ok()?;
    data.file_type()
        .is_socket()
        .then(|| (data.dev(), data.ino()))
}

fn bind_unix(path: &Path) -> Result<UnixListener> {
    let first = match UnixListener::bind(path) {
        Err(error) if error.kind() == IoKind::AddrInUse => error,
        other => return other.context(|| "listen"),
    };
    if identity(path).is_none() {
        return Err(Error::os(
            "listen: there is a file that is no socket",
            first,
        ));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::new(
            ErrorKind::Locked,
            "another process listens on this socket",
        )),
        Err(error) if error.kind() == IoKind::ConnectionRefused => {
            fs::remove_file(path).context(|| "remove the socket that a past process left")?;
            UnixListener::bind(path).context(|| "listen")
        }
        Err(error) => Err(Error::os("the socket is in use", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
