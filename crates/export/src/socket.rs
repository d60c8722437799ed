//! Unix sockets that servers listen on.

use block::{Context, Error, ErrorKind, Result};
use rustix::{
    fs::Mode,
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use std::{
    fs,
    io::ErrorKind as IoKind,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

/// Connections that wait to be accepted at most.
const BACKLOG: i32 = 4096;

/// A socket that listens, non-blocking; its file goes with it.
#[derive(Debug)]
pub(crate) struct Socket {
    pub listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: Option<(u64, u64)>,
}

impl Socket {
    /// Listens at `path`, for whom `mode` allows from the first moment on (`None`: what the umask leaves). A file
    /// that a past process left, and nobody listens on, is replaced.
    ///
    /// # Errors
    ///
    /// Another process listens there ([`ErrorKind::Locked`]), or there is a file that is not a socket.
    pub fn bind(path: &Path, mode: Option<Mode>) -> Result<Socket> {
        let first = match listen(path, mode) {
            Err(error) if error == Errno::EXIST || error == Errno::ADDRINUSE => error,
            listener => return Self::new(path, listener),
        };
        if identity(path).is_none() {
            return Err(Error::os(
                "listen: a file that is not a socket is there",
                first.into(),
            ));
        }
        match UnixStream::connect(path) {
            Ok(_) => Err(Error::new(
                ErrorKind::Locked,
                "another process serves on it",
            )),
            Err(error) if error.kind() == IoKind::ConnectionRefused => {
                fs::remove_file(path).context(|| "remove the socket that a past process left")?;
                Self::new(path, listen(path, mode))
            }
            Err(error) => Err(Error::os("the socket is in use", error)),
        }
    }

    fn new(path: &Path, listener: rustix::io::Result<OwnedFd>) -> Result<Socket> {
        let listener = listener.map_err(|e| Error::os("listen", e.into()))?;
        Ok(Socket {
            listener: listener.into(),
            path: path.to_owned(),
            file: identity(path),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Only the file that is ours: somebody may have put another in its place.
        if self.file.is_some()
            && identity(&self.path) == self.file
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(%error, "cannot remove {}", self.path.display());
        }
    }
}

fn listen(path: &Path, mode: Option<Mode>) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    if let Some(mode) = mode {
        // The file gets the mode that the socket has when it is bound (and no more than the umask leaves).
        rustix::fs::fchmod(&socket, mode)?;
    }
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let data = fs::symlink_metadata(path).ok()?;
    data.file_type()
        .is_socket()
        .then(|| (data.dev(), data.ino()))
}
