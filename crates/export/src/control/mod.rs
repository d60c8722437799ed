//! The control socket: tells whoever may connect to it how the disks do. The protocol is [`trace::control`]'s.
//!
//! A thread takes connections, and each has a thread of its own, so that one who dawdles keeps nobody from being
//! answered. What a client may do is bounded: [`CLIENTS_MAX`] at a time, a request of 4 KiB, a minute of
//! silence, ten seconds in which nothing is taken of an answer. Nothing that it asks stops an I/O thread: all of it is
//! read from what those leave in memory. The socket is its owner's alone (mode 0600).

mod client;

use crate::socket::Socket;
use block::{Context, Result};
use disk::Disk;
use io::EventFd;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::Mode,
};
use std::{
    io::ErrorKind,
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Clients at a time.
pub const CLIENTS_MAX: usize = 16;
/// How long a client may say nothing.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a client may take nothing of its answer.
const DAWDLE: Duration = Duration::from_secs(10);

/// A disk that is told of.
#[derive(Clone, Debug)]
pub struct Told {
    /// Its image, as it was named.
    pub file: String,
    /// The disk.
    pub disk: Arc<Disk>,
}

struct Shared {
    stopping: AtomicBool,
    wake: EventFd,
}

/// A control socket that listens. Dropping it ends it.
pub struct Server {
    shared: Arc<Shared>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "control::Server({})", self.path.display())
    }
}

impl Server {
    /// Listens at `path`. A socket there that nobody listens on is replaced.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made ([`block::ErrorKind::Locked`]: another process listens on it).
    pub fn start(path: &Path, disks: Vec<Told>) -> Result<Self> {
        let named = || format!("control socket {}", path.display());
        let socket = Socket::bind(path, Some(Mode::RUSR | Mode::WUSR)).context(named)?;
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let acceptor = Acceptor {
            shared: shared.clone(),
            socket,
            disks: disks.into(),
            clients: Vec::new(),
        };
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || acceptor.main())
            .context(|| "start the control thread")?;
        Ok(Self {
            shared,
            path: path.to_owned(),
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(error) = self.shared.wake.write() {
            tracing::warn!(%error, "cannot wake the control thread");
        }
        if thread.join().is_err() {
            tracing::error!("the control thread panicked");
        }
    }
}

/// A client's thread, and its socket to end it.
struct Client {
    thread: JoinHandle<()>,
    stream: UnixStream,
}

struct Acceptor {
    shared: Arc<Shared>,
    socket: Socket,
    disks: Arc<[Told]>,
    clients: Vec<Client>,
}

impl Acceptor {
    fn main(mut self) {
        let mut pause = None;
        while !self.shared.stopping.load(Ordering::Acquire) {
            let listens = match pause {
                None => PollFlags::IN,
                Some(_) => PollFlags::empty(),
            };
            let mut fds = [
                PollFd::new(&self.shared.wake, PollFlags::IN),
                PollFd::from_borrowed_fd(self.socket.listener.as_fd(), listens),
            ];
            match poll(&mut fds, pause.take().as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the control socket cannot be waited on");
                    break;
                }
            }
            if fds[1].revents().is_empty() {
                continue;
            }
            match self.socket.listener.accept() {
                Ok((stream, _)) => self.take(stream),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock
                            | ErrorKind::Interrupted
                            | ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    // Out of descriptors, most likely: they may come back, spinning does not help.
                    tracing::warn!(%error, "accept on {}", self.socket.path().display());
                    pause = Some(Timespec {
                        tv_sec: 0,
                        tv_nsec: 100_000_000,
                    });
                }
            }
        }
        for client in &self.clients {
            let _ = client.stream.shutdown(Shutdown::Both);
        }
        for client in self.clients.drain(..) {
            end(client);
        }
    }

    fn take(&mut self, stream: UnixStream) {
        for index in (0..self.clients.len()).rev() {
            if self.clients[index].thread.is_finished() {
                end(self.clients.swap_remove(index));
            }
        }
        let started = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(SILENCE)))
            .and_then(|()| stream.set_write_timeout(Some(DAWDLE)))
            .and_then(|()| {
                if self.clients.len() >= CLIENTS_MAX {
                    client::refuse(&stream);
                    return Ok(());
                }
                let (own, disks) = (stream.try_clone()?, self.disks.clone());
                let thread = thread::Builder::new()
                    .name("control-client".into())
                    .spawn(move || client::serve(&own, &disks))?;
                self.clients.push(Client { thread, stream });
                Ok(())
            });
        if let Err(error) = started {
            tracing::warn!(%error, "a client of the control socket");
        }
    }
}

fn end(client: Client) {
    if client.thread.join().is_err() {
        tracing::error!("a thread of the control socket panicked");
    }
}
