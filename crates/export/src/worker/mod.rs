//! I/O threads: each owns an engine and the sessions of the exports that run on it.
//!
//! One turn of a thread's loop:
//!
//! ```text
//!   calls     closures that control threads handed over (WorkerHandle::call)
//!   run       every session that is awake takes requests, advances its disk queue, delivers what is done
//!   idle      when nothing happened for the polling budget: each session asks its client to notify it again
//!   turn      engine: submit everything staged and wait, one system call
//!   dispatch  completions and ready descriptors to the sessions they belong to, which wakes them
//! ```
//!
//! A session is *awake* from an event of its own until [`Session::idle`] agreed to sleep; an
//! awake session is run in each turn, so a client need not notify it. A thread whose
//! sessions all sleep waits in the engine and burns nothing. In the steady state the loop
//! allocates nothing and takes no lock: the mailbox is looked at only when its flag is up.

mod cx;
mod handle;
mod poll;

pub use cx::{Cx, SessionId};
pub use handle::{Polling, Worker, WorkerHandle, WorkerOptions};

use io::Completion;
use std::any::Any;

/// What an export runs on a worker: one virtqueue, one NBD connection.
///
/// Callbacks must not block. They are all made on the worker's thread.
pub trait Session: Any {
    /// The descriptor watched under `key` is readable, writable or hung up.
    /// Reading it to `EAGAIN` is the session's business.
    fn ready(&mut self, cx: &mut Cx, key: u32);

    /// An engine operation whose token carries this session's [`Cx::token_base`] ended.
    fn completed(&mut self, cx: &mut Cx, completion: &Completion);

    /// One step: take new requests, advance the disk queue, deliver what is done,
    /// notify once. Says whether it did anything: the worker polls on while sessions do.
    fn run(&mut self, cx: &mut Cx) -> bool;

    /// The worker would like to sleep. A session that told its client not to notify it takes that
    /// back here and looks once more; `false` means that there is work, run again.
    fn idle(&mut self, _cx: &mut Cx) -> bool {
        true
    }

    /// The worker ends: finish what is in flight, then [`Cx::close`].
    fn stop(&mut self, cx: &mut Cx) {
        cx.close();
    }
}

#[cfg(test)]
mod tests;
