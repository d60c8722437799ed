//! Requests, and the table in which each one lives from submit to done.

use crate::{memory::Pieces, wait::SlotId};
use block::{GuestError, GuestOffset, IoVec, Op};
use image::Key;
use trace::Stamps;

/// A request to a disk.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// First byte of the disk. Any alignment.
    pub at: GuestOffset,
    /// Bytes; zero for a flush. The sum of the pieces' lengths for reads and writes.
    pub len: u64,
    /// First of the pieces of memory, null when there are none.
    pub iov: *const IoVec,
    /// How many pieces, at most [`block::limits::REQUEST_SEGMENTS_MAX`].
    pub iov_len: u32,
    /// The submitter's name for it, given back in [`Done`].
    pub tag: u64,
    /// When the submitter was woken for it; nanoseconds of [`crate::now_ns`], as the following. 0: it cannot know.
    pub arrived_ns: u64,
    /// When the submitter took it from its ring or socket.
    pub seen_ns: u64,
    /// When the submitter had read and checked it. 0: it did not look.
    pub parsed_ns: u64,
}

/// The end of a request; exactly one for each that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Which one.
    pub tag: u64,
    /// How it ended.
    pub result: Result<(), GuestError>,
}

/// A queue's request table is full: try again after a [`Done`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableFull;

/// A run of a disk as `block_status` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes.
    pub len: u64,
    /// Whether host space is allocated for it somewhere in the chain.
    pub allocated: bool,
    /// Whether it is known to read as zeros.
    pub zero: bool,
}

/// Who is told when a slot's request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The submitter.
    Guest,
    /// A copy-on-write fill: the part of it that is read.
    Fill { fill: u32, part: usize },
}

/// What a slot's request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// A guest's operation.
    Op(Op),
    /// A block status query for at most so many extents.
    Status { extents_max: usize },
}

/// Where a request stands. It is in exactly one of these.
///
/// ```text
///   Free ─▶ Running ─────────────▶ [CommitThenDone] ─▶ Free, its `Done` queued
///            │  ▲
///            ▼  │
///   Loading, Parked, Stalled, CommitThenAsk
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not in use.
    Free,
    /// All of it that can be is at the engine; ends when `pending` is zero.
    Running,
    /// A metadata operation of its own is at the engine; goes on when that ends.
    Loading,
    /// Waits for somebody else's load, reservation or allocation.
    Parked,
    /// Waits for room in the tables of its queue.
    Stalled,
    /// Waits for a commit, and then goes on with its work.
    CommitThenAsk,
    /// Waits for the commit that makes it durable.
    CommitThenDone,
}

/// One request of the table.
#[derive(Debug)]
pub(crate) struct Slot {
    pub state: State,
    pub generation: u32,
    pub owner: Owner,
    pub task: Task,
    pub at: GuestOffset,
    pub len: u64,
    pub iov: Pieces,
    /// For fills: their single piece, which `iov` points to.
    pub own_iov: IoVec,
    pub tag: u64,
    /// Bytes from `at` that are planned and at the engine, or done.
    pub pos: u64,
    /// Up to where a write-zeroes goes down as written zeros.
    pub zeros_until: u64,
    /// Engine operations and allocations under way.
    pub pending: u32,
    pub error: Option<GuestError>,
    /// Make it durable before it ends.
    pub durable: bool,
    /// The key under which it is registered as a waiter.
    pub registered: Option<(u8, Key)>,
    /// Length of the last reservation that failed for want of space.
    pub refused: u64,
    /// Whether all that was read so far is known to be zeros. Fills use it, and their memory
    /// does not hold these.
    pub all_zero: bool,
    pub epoch: u64,
    pub stamps: Stamps,
    pub status: Vec<StatusExtent>,
}

impl Slot {
    /// A free one.
    pub fn new() -> Self {
        Self {
            state: State::Free,
            generation: 0,
            owner: Owner::Guest,
            task: Task::Op(Op::Flush),
            at: GuestOffset(0),
            len: 0,
            iov: Pieces::NONE,
            own_iov: IoVec::new(std::ptr::null_mut(), 0),
            tag: 0,
            pos: 0,
            zeros_until: 0,
            pending: 0,
            error: None,
            durable: false,
            registered: None,
            refused: u64::MAX,
            all_zero: true,
            epoch: 0,
            stamps: Stamps::default(),
            status: Vec::new(),
        }
    }

    /// Its name towards other threads.
    pub fn id(&self, index: u32) -> SlotId {
        SlotId {
            index,
            generation: self.generation,
        }
    }

    /// The operation, where it is one.
    pub fn op(&self) -> Option<Op> {
        match self.task {
            Task::Op(op) => Some(op),
            Task::Status { .. } => None,
        }
    }
}
