//! The other side of a vhost-user-blk server: a front-end and a virtio driver, for load and for tests.
//!
//! ```text
//!   Frontend      messages on the socket                       messages
//!   Ram           the guest's memory, shared with the server   ram
//!   Ring          a virtqueue's rings and notifications        ring
//!   DriverQueue   chains of any shape on a ring, for tests     queue
//!   Machine       all of it, set up as a VMM does
//! ```
//!
//! Written from the standards and not from the server's code, and able to do wrong on purpose.

mod messages;
mod queue;
mod ram;
mod ring;

pub use messages::{Frontend, RegionSpec, code};
pub use queue::DriverQueue;
pub use ram::Ram;
pub use ring::{Chain, Piece, RING_BYTES, RING_ENTRIES_MAX, Ring};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{io, os::fd::BorrowedFd, path::Path, sync::Arc};

/// Feature bits of virtio-blk and of vhost-user.
#[allow(missing_docs)]
pub mod feature {
    pub const RO: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const PACKED: u64 = 1 << 34;
}

/// `VIRTIO_BLK_T_IN`: reads.
pub const IN: u32 = 0;
/// `VIRTIO_BLK_T_OUT`: writes.
pub const OUT: u32 = 1;
/// `VIRTIO_BLK_T_FLUSH`.
pub const FLUSH: u32 = 4;
/// `VIRTIO_BLK_T_GET_ID`.
pub const GET_ID: u32 = 8;
/// `VIRTIO_BLK_T_DISCARD`.
pub const DISCARD: u32 = 11;
/// `VIRTIO_BLK_T_WRITE_ZEROES`.
pub const WRITE_ZEROES: u32 = 13;

/// Guest address of a machine's memory: unlike any address of the process.
pub const RAM: u64 = 0x1_0000_0000;
/// Rings lie below; buffers are the caller's from here on.
pub const BUFFERS: u64 = RAM + (QUEUES_MAX as u64) * RING_BYTES;
/// Queues of a machine at most.
pub const QUEUES_MAX: u32 = 16;

/// A machine with one disk: connection, memory and started queues.
#[derive(Debug)]
pub struct Machine {
    /// The connection.
    pub frontend: Frontend,
    /// The memory.
    pub ram: Arc<Ram>,
    /// Started queues.
    pub queues: Vec<DriverQueue>,
    /// What was agreed on.
    pub features: u64,
}

/// How a [`Machine`] is made.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Virtqueues, up to [`QUEUES_MAX`].
    pub queues: u32,
    /// Entries of each.
    pub size: u16,
    /// Packed rings, which the server must offer; else split ones.
    pub packed: bool,
    /// Memory: [`BUFFERS`] minus [`RAM`] for the rings, and what the caller needs.
    pub ram_bytes: u64,
    /// Features to accept, if offered; which rings there are says `packed` alone.
    pub features: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            queues: 1,
            size: 128,
            packed: false,
            ram_bytes: 16 << 20,
            features: !0,
        }
    }
}

impl Machine {
    /// Connects and does what a VMM does up to running queues.
    ///
    /// # Errors
    ///
    /// Nobody listens, the server refuses something, or it breaks the protocol.
    pub fn start(socket: &Path, setup: Setup) -> io::Result<Self> {
        if setup.queues > QUEUES_MAX {
            return Err(io::Error::other(format!("more than {QUEUES_MAX} queues")));
        }
        let mut frontend = Frontend::connect(socket)?;
        let wanted = match setup.packed {
            true => setup.features | feature::PACKED,
            false => setup.features & !feature::PACKED,
        };
        let features = frontend.negotiate(wanted)?;
        if setup.packed && features & feature::PACKED == 0 {
            return Err(io::Error::other("the server offers no packed rings"));
        }
        if setup.queues > 1 && features & feature::PROTOCOL != 0 {
            let offered = frontend.get_queue_num()?;
            if offered < u64::from(setup.queues) {
                return Err(io::Error::other(format!(
                    "the server has {offered} queues, {} are asked for",
                    setup.queues
                )));
            }
        }
        let ram = Arc::new(Ram::new(RAM, setup.ram_bytes)?);
        frontend.set_mem_table(&[ram.region()], &[ram.fd()])?;
        let mut queues = Vec::new();
        for index in 0..setup.queues {
            let at = RAM + u64::from(index) * RING_BYTES;
            let queue = DriverQueue::new(ram.clone(), at, index, setup.size, features)?;
            frontend.start_queue(&queue, queue.base())?;
            queues.push(queue);
        }
        // An answer means that all before it is done.
        frontend.get_features()?;
        Ok(Self {
            frontend,
            ram,
            queues,
            features,
        })
    }

    /// Makes one request on queue `queue` and waits for its end: status, and what was read.
    ///
    /// # Panics
    ///
    /// When it does not end, or another does.
    pub fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        out: &[u8],
        in_len: u32,
    ) -> (u8, Vec<u8>) {
        let header = BUFFERS;
        let status = BUFFERS + 64;
        let data = BUFFERS + 4096;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.ram.write(header, &bytes);
        self.ram.write(status, &[0xff]);
        self.ram.write(data, out);
        let mut pieces = vec![Piece::read(header, 16)];
        if !out.is_empty() {
            pieces.push(Piece::read(data, out.len() as u32));
        }
        if in_len > 0 {
            pieces.push(Piece::write(data, in_len));
        }
        pieces.push(Piece::write(status, 1));
        let head = self.queues[queue].add(&pieces).expect("a free descriptor");
        self.queues[queue].kick();
        let (used, _) = self.queues[queue].wait();
        assert_eq!(used, head);
        (
            self.ram.read(status, 1)[0],
            self.ram.read(data, in_len as usize),
        )
    }
}

/// A segment of discard and write zeroes.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Whether `fd` becomes readable within a time that only a failure needs.
pub fn wait_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    loop {
        match poll(&mut fds, Some(&limit)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
