//! The socket, its control thread, and one client after another.

use super::{Options, device::Device};
use crate::{socket::Socket, worker::WorkerHandle};
use block::{Context, Result};
use disk::Disk;
use io::EventFd;
use rustix::event::{PollFd, PollFlags, poll};
use std::{
    io as std_io,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};
use vhost::vhost_user::{BackendReqHandler, Error as MessageError};

/// Where the next device's first queue goes, so that disks of one queue use all workers.
static NEXT_WORKER: AtomicUsize = AtomicUsize::new(0);

struct Shared {
    stopping: AtomicBool,
    /// Ends the control thread's wait.
    stop: EventFd,
    /// The client's socket, to end a wait in the middle of a message.
    client: Mutex<Option<UnixStream>>,
}

impl Shared {
    fn client(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk that is served on a socket. Dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Server({})", self.path.display())
    }
}

impl Server {
    pub(super) fn start(
        path: &Path,
        disk: Arc<Disk>,
        workers: &[WorkerHandle],
        options: Options,
    ) -> Result<Self> {
        let named = || format!("vhost-user socket {}", path.display());
        let socket = Socket::bind(path, None).context(named)?;
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            stop: EventFd::new()?,
            client: Mutex::new(None),
        });
        let queues = usize::from(options.queues);
        let first = NEXT_WORKER.fetch_add(queues, Ordering::Relaxed);
        let control = Control {
            shared: shared.clone(),
            socket,
            disk,
            options,
            workers: (0..queues)
                .map(|i| workers[first.wrapping_add(i) % workers.len()].clone())
                .collect(),
        };
        let thread = thread::Builder::new()
            .name("vhost-user".into())
            .spawn(move || control.main())
            .context(|| "start the vhost-user control thread")?;
        Ok(Self {
            shared,
            thread: Some(thread),
            path: path.to_owned(),
        })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes no more requests, finishes what is in flight, ends the connection and removes the
    /// socket. Returns when all that is done.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(error) = self.shared.stop.write() {
            tracing::warn!(%error, "cannot wake the vhost-user control thread");
        }
        if let Some(client) = &*self.shared.client() {
            let _ = client.shutdown(Shutdown::Both);
        }
        if thread.join().is_err() {
            tracing::error!("the vhost-user control thread panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

struct Control {
    shared: Arc<Shared>,
    socket: Socket,
    disk: Arc<Disk>,
    options: Options,
    workers: Vec<WorkerHandle>,
}

impl Control {
    fn main(self) {
        while self.wait(self.socket.listener.as_fd()) {
            match self.socket.listener.accept() {
                Ok((stream, _)) => self.serve(stream),
                Err(e)
                    if matches!(
                        e.kind(),
                        std_io::ErrorKind::WouldBlock
                            | std_io::ErrorKind::Interrupted
                            | std_io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(e) => {
                    // Out of descriptors, most likely: they may come back, spinning does not help.
                    tracing::warn!("accept on {}: {e}", self.socket.path().display());
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Waits until `fd` is readable or hung up; `false` when the server stops.
    fn wait(&self, fd: BorrowedFd<'_>) -> bool {
        loop {
            if self.shared.stopping.load(Ordering::Acquire) {
                return false;
            }
            let mut fds = [
                PollFd::from_borrowed_fd(fd, PollFlags::IN),
                PollFd::from_borrowed_fd(self.shared.stop.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) if !fds[0].revents().is_empty() => {
                    return !self.shared.stopping.load(Ordering::Acquire);
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    tracing::warn!("poll: {e}");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// One client, from its connection to its end.
    fn serve(&self, stream: UnixStream) {
        let kept = stream
            .set_nonblocking(false)
            .and_then(|()| Ok((stream.try_clone()?, stream.try_clone()?)));
        let (watched, to_shut) = match kept {
            Ok(kept) => kept,
            Err(e) => {
                tracing::warn!("vhost-user client: {e}");
                return;
            }
        };
        *self.shared.client() = Some(to_shut);
        tracing::debug!(
            "vhost-user client on {} connected",
            self.socket.path().display()
        );
        let device = Device::new(
            self.disk.clone(),
            self.options.clone(),
            self.workers.clone(),
        );
        let device = Arc::new(Mutex::new(device));
        let mut handler = BackendReqHandler::from_stream(stream, device.clone());
        while self.wait(watched.as_fd()) {
            match handler.handle_request() {
                Ok(()) => {}
                Err(MessageError::SocketRetry(_)) => {}
                Err(MessageError::Disconnected) => break,
                Err(error) => {
                    if !self.shared.stopping.load(Ordering::Acquire) {
                        tracing::warn!(
                            "vhost-user client on {} is disconnected: {error}",
                            self.socket.path().display()
                        );
                    }
                    break;
                }
            }
        }
        // Before the connection closes: a client that sees the end may take everything back.
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .reset();
        *self.shared.client() = None;
    }
}
