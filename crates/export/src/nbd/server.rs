//! Serving a disk: what the control thread starts, asks and stops.

use super::{
    accept::Acceptor,
    address::{Listener, NbdAddress},
    handshake::{Export, Negotiated},
    request::Limits,
    session::NbdSession,
};
use crate::worker::{SessionId, WorkerHandle};
use block::{Context, Error, Result};
use disk::Disk;
use io::EventFd;
use nbd::proto::STRING_BYTES_MAX;
use std::{
    fmt,
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long clients may take for the replies that wait for them when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Between two warnings about refused connections: clients decide how many there are.
const WARN_PAUSE: Duration = Duration::from_secs(10);

/// How a disk is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// The export's name, at most 4096 bytes. Clients may also leave it empty.
    pub name: String,
    /// Shown to people who list exports, at most 4096 bytes; may be empty.
    pub description: String,
    /// Connections at a time, handshakes included; more are closed at once. Each may hold 32 MiB of
    /// payload and some 160 KiB beside it.
    pub max_connections: usize,
    /// Refuse writes, also where the disk would take them.
    pub read_only: bool,
    /// How long a client may take from connecting to the transmission phase.
    pub handshake_max: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: String::new(),
            description: String::new(),
            max_connections: 16,
            read_only: false,
            handshake_max: Duration::from_secs(10),
        }
    }
}

/// The NBD protocol's side of a disk.
#[derive(Debug)]
pub struct Nbd;

impl Nbd {
    /// Serves `disk` at `address`, with its connections spread over `workers`, until the server is
    /// stopped or dropped. A Unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    ///
    /// When the options are not valid, or the socket cannot be made
    /// ([`block::ErrorKind::Locked`]: another process listens on it).
    pub fn serve(
        address: &NbdAddress,
        disk: Arc<Disk>,
        workers: &[WorkerHandle],
        options: Options,
    ) -> Result<Server> {
        for (what, text) in [
            ("name", &options.name),
            ("description", &options.description),
        ] {
            if text.len() > STRING_BYTES_MAX || text.contains('\0') {
                return Err(Error::invalid(format!(
                    "the export's {what} has {} bytes: at most {STRING_BYTES_MAX} and no NUL",
                    text.len()
                )));
            }
        }
        if workers.is_empty() || options.max_connections == 0 {
            return Err(Error::invalid(
                "an NBD server needs an I/O thread and at least one connection",
            ));
        }
        let listener = Listener::bind(address)?;
        let address = listener.address.clone();
        let shared = Arc::new(Shared {
            export: Export {
                name: options.name,
                description: options.description,
                size: disk.size(),
                read_only: options.read_only || disk.read_only(),
                min_block: disk.write_unit(),
                preferred_block: disk.logical_block_size().max(4096),
            },
            disk,
            workers: workers.into(),
            max_connections: options.max_connections,
            handshake_max: options.handshake_max,
            registry: Mutex::new(Registry {
                by_worker: vec![0; workers.len()],
                sessions: Vec::new(),
            }),
            changed: Condvar::new(),
            address: address.clone(),
            warned: Mutex::new(None),
            stopping: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let acceptor = Acceptor::new(listener, shared.clone());
        let thread = thread::Builder::new()
            .name("nbd".into())
            .spawn(move || acceptor.run())
            .context(|| "start the NBD thread")?;
        Ok(Server {
            shared,
            address,
            thread: Some(thread),
        })
    }
}

/// A running server.
pub struct Server {
    shared: Arc<Shared>,
    address: NbdAddress,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nbd::Server({})", self.address)
    }
}

impl Server {
    /// Where it listens; with the port that it got where port 0 was asked for.
    pub fn local_addr(&self) -> &NbdAddress {
        &self.address
    }

    /// Connections in their transmission phase.
    pub fn connections(&self) -> usize {
        self.shared.live()
    }

    /// Stops taking connections and requests, removes the socket, and returns when what was in flight
    /// ended. Clients have five seconds to take replies that wait for them. Must not be called on a worker's thread.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(error) = self.shared.wake.write() {
            tracing::error!(%error, "cannot stop the NBD thread");
        }
        if thread.join().is_err() {
            tracing::error!("the NBD thread panicked");
        }
        self.shared.each_session(NbdSession::drain);
        let deadline = Instant::now() + STOP_GRACE;
        let mut registry = self.shared.registry();
        while registry.live() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            registry = self
                .shared
                .changed
                .wait_timeout(registry, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        if registry.live() == 0 {
            return;
        }
        drop(registry);
        self.shared.each_session(NbdSession::abandon);
        let mut registry = self.shared.registry();
        while registry.live() > 0 {
            registry = self
                .shared
                .changed
                .wait(registry)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the control thread, the accepting thread and the sessions share. Never locked for a request.
pub(crate) struct Shared {
    pub export: Export,
    pub max_connections: usize,
    pub handshake_max: Duration,
    pub stopping: AtomicBool,
    /// Wakes the accepting thread.
    pub wake: EventFd,
    disk: Arc<Disk>,
    workers: Box<[WorkerHandle]>,
    registry: Mutex<Registry>,
    changed: Condvar,
    address: NbdAddress,
    /// When a warning was last logged.
    warned: Mutex<Option<Instant>>,
}

struct Registry {
    /// Sessions, coming ones included.
    by_worker: Vec<usize>,
    /// Worker and name of those that run.
    sessions: Vec<(usize, SessionId)>,
}

impl Registry {
    fn live(&self) -> usize {
        self.by_worker.iter().sum()
    }
}

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        // Counts are changed in one step each: a panic elsewhere left them whole.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections in their transmission phase.
    pub(crate) fn live(&self) -> usize {
        self.registry().live()
    }

    /// Hands a connection whose handshake is over to the worker with the fewest.
    pub(crate) fn transmit(
        self: &Arc<Self>,
        socket: OwnedFd,
        agreed: Negotiated,
        early: Vec<u8>,
    ) -> Result<()> {
        let worker = {
            let mut registry = self.registry();
            let fewest = registry
                .by_worker
                .iter()
                .enumerate()
                .min_by_key(|(_, n)| **n);
            let worker = fewest.map_or(0, |(worker, _)| worker);
            registry.by_worker[worker] += 1;
            worker
        };
        let mut live = Live {
            shared: self.clone(),
            worker,
            id: 0,
        };
        let limits = Limits {
            size: self.export.size,
            read_only: self.export.read_only,
            trim: self.disk.can_discard(),
            style: agreed.style,
            allocation: agreed.allocation,
        };
        let disk = self.disk.clone();
        let shared = self.clone();
        self.workers[worker].call(Box::new(move |cx| {
            let added = cx.add(|cx| {
                live.started(cx.session());
                NbdSession::new(cx, &disk, limits, socket, &early, live)
            });
            if let Err(error) = added {
                shared.warn(&format!("connection refused: {error}"));
            }
        }))
    }

    /// Logs `what`, unless something was logged shortly before.
    pub(crate) fn warn(&self, what: &str) {
        let now = Instant::now();
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| now >= at + WARN_PAUSE) {
            *warned = Some(now);
            tracing::warn!("NBD server at {}: {what}", self.address);
        }
    }

    /// Has `act` done to every session, each on its worker.
    fn each_session(self: &Arc<Self>, act: fn(&mut NbdSession)) {
        for (worker, handle) in self.workers.iter().enumerate() {
            let shared = self.clone();
            // A worker that ended has dropped its sessions: nothing to do then.
            let _ = handle.call(Box::new(move |cx| {
                // Looked up on the worker, behind the calls that add sessions there.
                let ids: Vec<SessionId> = {
                    let registry = shared.registry();
                    let ours = registry.sessions.iter().filter(|(w, _)| *w == worker);
                    ours.map(|(_, id)| *id).collect()
                };
                for id in ids {
                    cx.with::<NbdSession, _>(id, |session, _| act(session));
                }
            }));
        }
    }
}

/// Counts a session for as long as it lives.
pub(crate) struct Live {
    shared: Arc<Shared>,
    worker: usize,
    id: SessionId,
}

impl Live {
    fn started(&mut self, id: SessionId) {
        self.id = id;
        self.shared.registry().sessions.push((self.worker, id));
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let mut registry = self.shared.registry();
        registry.by_worker[self.worker] -= 1;
        registry
            .sessions
            .retain(|session| *session != (self.worker, self.id));
        drop(registry);
        self.shared.changed.notify_all();
    }
}
