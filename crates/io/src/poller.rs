//! Watched descriptors for engines that sleep in `epoll_wait`.

use crate::{Counters, sys};
use block::{Context, Error, Result};
use rustix::event::epoll;
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::Duration,
};

/// Descriptors that one engine watches at most.
pub(crate) const WATCHES_MAX: usize = 4096;

/// Events of one call.
const BATCH: usize = 64;

/// What an engine itself watches: never reported.
pub(crate) const INTERNAL: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Watch {
    fd: RawFd,
    key: u64,
}

/// An epoll set with keys.
pub(crate) struct Poller {
    epoll: OwnedFd,
    watches: Vec<Option<Watch>>,
    events: [libc::epoll_event; BATCH],
    /// Grows with each turn that did not look; see [`Poller::glance`].
    unseen: u32,
}

impl Poller {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)
                .map_err(io::Error::from)
                .context(|| "epoll_create")?,
            watches: Vec::new(),
            events: [libc::epoll_event { events: 0, u64: 0 }; BATCH],
            unseen: 0,
        })
    }

    /// Watches `fd`; with `edge`, reports each signal once without anybody reading it away.
    pub(crate) fn add(
        &mut self,
        fd: BorrowedFd<'_>,
        key: u64,
        writable: bool,
        edge: bool,
    ) -> Result<()> {
        let index = match self.watches.iter().position(Option::is_none) {
            Some(index) => index,
            None if self.watches.len() < WATCHES_MAX => {
                self.watches.push(None);
                self.watches.len() - 1
            }
            None => {
                return Err(Error::invalid(format!(
                    "an engine watches at most {WATCHES_MAX} descriptors"
                )));
            }
        };
        let mut flags = epoll::EventFlags::IN;
        flags.set(epoll::EventFlags::OUT, writable);
        flags.set(epoll::EventFlags::ET, edge);
        epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(index as u64),
            flags,
        )
        .map_err(io::Error::from)
        .context(|| "watching a descriptor")?;
        self.watches[index] = Some(Watch {
            fd: fd.as_raw_fd(),
            key,
        });
        Ok(())
    }

    pub(crate) fn remove(&mut self, fd: BorrowedFd<'_>, key: u64) -> Result<()> {
        let raw = fd.as_raw_fd();
        for watch in &mut self.watches {
            if watch.is_some_and(|w| w.fd == raw && w.key == key) {
                *watch = None;
                return epoll::delete(&self.epoll, fd)
                    .map_err(io::Error::from)
                    .context(|| "unwatching a descriptor");
            }
        }
        Err(Error::invalid("this descriptor is not watched"))
    }

    pub(crate) fn has_watches(&self) -> bool {
        self.watches
            .iter()
            .flatten()
            .any(|watch| watch.key != INTERNAL)
    }

    /// Sleeps until a watched descriptor is ready, at most `timeout` (`None`: no limit).
    pub(crate) fn wait(
        &mut self,
        timeout: Option<Duration>,
        ready: &mut Vec<u64>,
        counters: &mut Counters,
    ) -> Result<()> {
        self.unseen = 0;
        counters.wait_calls += 1;
        let n = match sys::epoll_wait(self.epoll.as_fd(), &mut self.events, timeout) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e).context(|| "epoll_wait"),
        };
        for event in &self.events[..n] {
            let index = usize::try_from(event.u64).unwrap_or(usize::MAX);
            if let Some(Some(watch)) = self.watches.get(index)
                && watch.key != INTERNAL
            {
                ready.push(watch.key);
            }
        }
        Ok(())
    }

    /// A turn that does not sleep. Looks at the descriptors now and then, so that they are not
    /// starved by a thread that always has I/O to do: every 16th turn that submitted, or 1024th at all.
    pub(crate) fn glance(
        &mut self,
        submitted: bool,
        ready: &mut Vec<u64>,
        counters: &mut Counters,
    ) -> Result<()> {
        self.unseen += if submitted { 64 } else { 1 };
        if self.unseen < 1024 {
            return Ok(());
        }
        if !self.has_watches() {
            self.unseen = 0;
            return Ok(());
        }
        self.wait(Some(Duration::ZERO), ready, counters)
    }
}
