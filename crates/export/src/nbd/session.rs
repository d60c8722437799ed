//! A connection on a worker: the socket watched by the engine, the requests on a disk queue of its own.

use super::{
    connection::{Connection, DEPTH},
    lend::AtDisk,
    request::Limits,
    server::Live,
};
use crate::worker::{Cx, Session};
use ::io::Completion;
use block::{Context, Result};
use disk::{Disk, DiskQueue, QueueOptions};
use rustix::event::epoll;
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

/// The socket has something to receive, or is gone.
const READABLE: u32 = 0;
/// The socket takes more.
const WRITABLE: u32 = 1;

/// One connection in its transmission phase.
pub(crate) struct NbdSession {
    connection: Connection,
    /// There until the end.
    queue: Option<DiskQueue>,
    socket: OwnedFd,
    /// An epoll set of the socket alone, readable when the socket is writable. The engine watches sockets for
    /// both or for reading, and reports a state as long as it lasts: a client who
    /// sends on and on and never reads would keep the worker awake.
    writable: OwnedFd,
    /// What the engine watches: the socket, and `writable`.
    watches_read: bool,
    watches_write: bool,
    /// The worker ends: replies that do not fit the socket now are given up.
    hurry: bool,
    /// Counts the session as long as it lives.
    _live: Live,
}

impl NbdSession {
    /// Takes over a socket after the handshake; `early` is what its client sent already.
    pub(crate) fn new(
        cx: &mut Cx,
        disk: &Arc<Disk>,
        limits: Limits,
        socket: OwnedFd,
        early: &[u8],
        live: Live,
    ) -> Result<Self> {
        let options = QueueOptions {
            depth: DEPTH,
            token_base: cx.token_base(),
            waker: cx.waker().clone(),
        };
        let writable = epoll::create(epoll::CreateFlags::CLOEXEC)
            .and_then(|set| {
                let data = epoll::EventData::new_u64(0);
                epoll::add(&set, &socket, data, epoll::EventFlags::OUT).map(|()| set)
            })
            .map_err(io::Error::from)
            .context(|| "watching an NBD connection")?;
        let queue = DiskQueue::attach(disk, cx.engine(), options)?;
        queue.set_name("nbd".into());
        if let Err(error) = cx.watch(socket.as_fd(), READABLE, false) {
            queue.detach(cx.engine());
            return Err(error);
        }
        Ok(Self {
            connection: Connection::new(limits, early),
            queue: Some(queue),
            socket,
            writable,
            watches_read: true,
            watches_write: false,
            hurry: false,
            _live: live,
        })
    }

    /// Takes no more requests; ends when those in flight are answered.
    pub(crate) fn drain(&mut self) {
        self.connection.drain();
    }

    /// Ends when what is at the disk ended; replies go nowhere.
    pub(crate) fn abandon(&mut self) {
        self.connection.abandon();
    }

    /// Has the engine report what can be used.
    fn watch(&mut self, cx: &mut Cx, read: bool, write: bool) {
        let mut result = Ok(());
        for (fd, key, watched, wanted) in [
            (self.socket.as_fd(), READABLE, &mut self.watches_read, read),
            (
                self.writable.as_fd(),
                WRITABLE,
                &mut self.watches_write,
                write,
            ),
        ] {
            if *watched == wanted || result.is_err() {
                continue;
            }
            result = if wanted {
                cx.watch(fd, key, false)
            } else {
                cx.unwatch(fd, key)
            };
            *watched = wanted;
        }
        if let Err(error) = result {
            // Without events the connection would hang.
            tracing::error!(%error, "NBD connection lost");
            self.connection.abandon();
        }
    }

    /// Leaves the disk and the worker once nothing is left to do.
    fn finish(&mut self, cx: &mut Cx) {
        if !self.connection.finished() || self.queue.as_ref().is_none_or(DiskQueue::is_busy) {
            return;
        }
        self.watch(cx, false, false);
        if let Some(queue) = self.queue.take() {
            queue.detach(cx.engine());
        }
        cx.close();
    }
}

impl Session for NbdSession {
    fn ready(&mut self, cx: &mut Cx, key: u32) {
        if key == WRITABLE {
            self.connection.writable();
            return;
        }
        probe::probe!(diskplane, kicked, cx.session());
        self.connection.woken(cx.woken_ns());
        if !self.connection.readable() {
            // There is no room for what it says: look at the socket again when there is.
            self.watch(cx, false, self.watches_write);
        }
    }

    fn completed(&mut self, cx: &mut Cx, completion: &Completion) {
        if let Some(queue) = &mut self.queue {
            queue.completed(cx.engine(), completion);
        }
    }

    fn run(&mut self, cx: &mut Cx) -> bool {
        let Some(queue) = &mut self.queue else {
            return false;
        };
        let fd = self.socket.as_fd();
        let mut at_disk = AtDisk {
            queue,
            engine: cx.engine(),
        };
        let mut worked = self.connection.deliver_first(&mut at_disk, fd);
        at_disk.queue.notified(None);
        worked |= self.connection.receive(&mut at_disk, fd);
        at_disk.queue.advance(at_disk.engine);
        worked |= self.connection.deliver_last(&mut at_disk, fd);
        // What is sent wakes its receiver.
        at_disk.queue.notified(None);
        if self.hurry && self.connection.blocked() {
            self.connection.abandon();
        }
        let read = self.connection.is_open() && (self.watches_read || !self.connection.stalled());
        self.watch(cx, read, self.connection.blocked());
        self.finish(cx);
        worked
    }

    fn idle(&mut self, _cx: &mut Cx) -> bool {
        // A flush that follows a trim at the end of `run` waits for the queue's next step.
        !self.connection.has_work() && !self.queue.as_ref().is_some_and(DiskQueue::must_advance)
    }

    fn stop(&mut self, cx: &mut Cx) {
        self.hurry = true;
        self.connection.drain();
        self.run(cx);
    }
}
