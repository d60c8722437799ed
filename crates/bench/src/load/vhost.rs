//! Load on a vhost-user-blk server, as a guest's driver makes it.
//!
//! All that a request needs is laid out before the first one:
//!
//! ```text
//!   control, 256 bytes a slot:   header │ status │ … │ table: read │ table: write │ table: flush
//!   data:                        block_bytes a slot, at multiples of 4096 (or misalign_bytes behind them)
//!   descriptors                  indirect: number SLOT is the table's, else 3 from 3 × SLOT on
//! ```
//!
//! so that a request writes its header and status, its entry in the available ring, and the head's descriptor where
//! the slot's last request was of another kind, and its table where that is of another size. In a packed ring, where descriptors have no place of their own, it writes them
//! each time.

use super::{
    By, Report, Spec,
    drive::{Client, Ended},
    fill,
    plan::{Geometry, Kind, Places, Request},
    run::run_queues,
};
use crate::driver::{self, BUFFERS, Chain, Machine, Piece, RAM, Ram, Ring, Setup, feature};
use block::{Context, Error, ErrorKind, Result};
use io::EventFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
};

const CONTROL_BYTES: u64 = 256;
const STATUS: u64 = 16;
/// Tables of a slot: behind the line that both sides write.
const TABLES: u64 = 64;
const TABLE_BYTES: u64 = 48;
/// Descriptors of a chain that is not indirect.
const CHAIN_MAX: u16 = 3;

/// How often a polling driver looks before it sees to other things.
const SPINS: u32 = 1000;

pub(crate) fn run(spec: &Spec, socket: &Path, by: By<'_>) -> Result<Report> {
    let named = || socket.display().to_string();
    let control = (CONTROL_BYTES * u64::from(spec.depth)).next_multiple_of(4096);
    let data = slot_bytes(spec.misalign_bytes, spec.block_bytes);
    let per_queue = control + data * u64::from(spec.depth);
    let mut features = !0;
    if !spec.indirect {
        features &= !feature::INDIRECT;
    }
    if !spec.event_index {
        features &= !feature::EVENT_IDX;
    }
    let ram_bytes = BUFFERS - RAM + per_queue * u64::from(spec.queues);
    let setup = Setup {
        queues: spec.queues,
        size: spec.ring_entries,
        packed: spec.packed,
        ram_bytes: ram_bytes.next_multiple_of(2 << 20),
        features,
    };
    let mut machine = Machine::start(socket, setup).context(named)?;
    let indirect = machine.features & feature::INDIRECT != 0;
    let needed = spec.depth * if indirect { 1 } else { u32::from(CHAIN_MAX) };
    if needed > spec.ring_entries.into() {
        return Err(Error::invalid(format!(
            "--depth {} needs {needed} entries of the ring, which has {}: use --ring {} or a lower --depth",
            spec.depth,
            spec.ring_entries,
            needed.next_power_of_two()
        )));
    }
    let config = machine.frontend.get_config(0, 8).context(named)?;
    let config: [u8; 8] = config.try_into().unwrap_or_default();
    let geometry = Geometry {
        capacity: u64::from_le_bytes(config).saturating_mul(512),
        read_only: machine.features & feature::RO != 0,
        flushes: machine.features & feature::FLUSH != 0,
        block_bytes: 512,
    };
    let places = Places::new(spec, &geometry).context(named)?;

    let fate = AtomicU8::new(ALIVE);
    let mut watch = Watch {
        socket: machine
            .frontend
            .as_fd()
            .try_clone_to_owned()
            .context(named)?,
        calls: Vec::new(),
        errors: Vec::new(),
        done: EventFd::new()?,
    };
    let mut openers = Vec::new();
    for (queue, ring) in machine.queues.drain(..).enumerate() {
        let ring = ring.into_ring();
        watch
            .errors
            .push(ring.err_fd().try_clone_to_owned().context(named)?);
        let call = ring.call_fd().try_clone_to_owned().context(named)?;
        watch.calls.push(EventFd::from_fd(call));
        let at = BUFFERS + per_queue * queue as u64;
        let (ram, fate) = (machine.ram.clone(), &fate);
        let layout = Layout {
            control: at,
            data: at + control + spec.misalign_bytes,
            data_bytes: data,
            indirect,
        };
        openers.push(move || Ok(Vhost::new(spec, ram, ring, layout, fate)));
    }
    thread::scope(|scope| {
        let watcher = scope.spawn(|| watch.run(&fate));
        let report = run_queues(spec, places, openers, by).context(named);
        watch.done.write()?;
        // A watcher that cannot watch would leave a vanished server unnoticed.
        match watcher.join() {
            Ok(watched) => report.and_then(|report| watched.map(|()| report)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Bytes from a slot's data to the next one's.
fn slot_bytes(misalign: u64, block: u64) -> u64 {
    (misalign + block).next_multiple_of(4096)
}

const ALIVE: u8 = 0;
const GONE: u8 = 1;
const BROKEN: u8 = 2;

/// Watches what the queues' threads, asleep on their calls, do not see: the connection and the rings' errors.
struct Watch {
    socket: OwnedFd,
    calls: Vec<EventFd>,
    errors: Vec<OwnedFd>,
    done: EventFd,
}

impl Watch {
    /// Until `done`. Now and then wakes all drivers, to let them see how long they have waited.
    fn run(&self, fate: &AtomicU8) -> Result<()> {
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: 500_000_000,
        };
        let mut fds = vec![
            PollFd::new(&self.done, PollFlags::IN),
            PollFd::new(&self.socket, PollFlags::RDHUP),
        ];
        fds.extend(self.errors.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        loop {
            match poll(&mut fds, Some(&tick)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::os("watching the server", e.into())),
            }
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
            if !fds[1].revents().is_empty() {
                fate.store(GONE, Ordering::Release);
            } else if fds[2..].iter().any(|fd| !fd.revents().is_empty()) {
                fate.store(BROKEN, Ordering::Release);
            }
            for call in &self.calls {
                call.write()?;
            }
            if fate.load(Ordering::Relaxed) != ALIVE {
                // All know. What they still do ends without a server.
                fds.truncate(1);
                fds.push(PollFd::new(&self.done, PollFlags::IN));
            }
        }
    }
}

/// Where a queue's buffers lie.
#[derive(Clone, Copy)]
struct Layout {
    control: u64,
    data: u64,
    data_bytes: u64,
    indirect: bool,
}

impl Layout {
    fn control(&self, slot: usize) -> u64 {
        self.control + CONTROL_BYTES * slot as u64
    }

    fn table(&self, slot: usize, kind: Kind) -> u64 {
        self.control(slot) + TABLES + kind as u64 * TABLE_BYTES
    }

    /// The chain of a request, in the first so many pieces.
    fn pieces(&self, slot: usize, kind: Kind, bytes: u32) -> ([Piece; 3], usize) {
        let header = Piece::read(self.control(slot), 16);
        let status = Piece::write(self.control(slot) + STATUS, 1);
        let data = self.data + self.data_bytes * slot as u64;
        match kind {
            Kind::Read => ([header, Piece::write(data, bytes), status], 3),
            Kind::Write => ([header, Piece::read(data, bytes), status], 3),
            Kind::Flush => ([header, status, status], 2),
        }
    }
}

/// The state of a slot.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    busy: bool,
    /// What the descriptors at the slot's head say; of a chain that is not indirect also of how many bytes.
    described: Option<(Kind, u32)>,
    /// Bytes of the tables of reads, writes and flushes.
    tables: [u32; 3],
}

struct Vhost<'a> {
    ram: Arc<Ram>,
    ring: Ring,
    layout: Layout,
    slots: Vec<Slot>,
    poll: bool,
    fate: &'a AtomicU8,
}

impl<'a> Vhost<'a> {
    fn new(spec: &Spec, ram: Arc<Ram>, mut ring: Ring, layout: Layout, fate: &'a AtomicU8) -> Self {
        let bytes = spec.block_bytes as u32;
        let slot = Slot {
            tables: [bytes, bytes, 0],
            ..Slot::default()
        };
        let slots = vec![slot; spec.depth as usize];
        let mut block = vec![0; spec.block_bytes as usize];
        for slot in 0..slots.len() {
            fill(&mut block, spec.seed, ring.index(), slot);
            ram.write(layout.data + layout.data_bytes * slot as u64, &block);
            for kind in [Kind::Read, Kind::Write, Kind::Flush] {
                let (pieces, count) = layout.pieces(slot, kind, bytes);
                ring.write_table(layout.table(slot, kind), &pieces[..count]);
            }
        }
        if spec.poll {
            ring.refuse_calls();
        }
        Self {
            ram,
            ring,
            layout,
            slots,
            poll: spec.poll,
            fate,
        }
    }

    /// Takes what the device is done with.
    fn take(&mut self, ended: &mut Vec<Ended>) -> Result<()> {
        while let Some((id, _)) = self.ring.pop_used() {
            let step = if self.layout.indirect {
                1
            } else {
                u32::from(CHAIN_MAX)
            };
            let slot = (id / step) as usize;
            let known = self
                .slots
                .get_mut(slot)
                .filter(|slot| slot.busy && id % step == 0);
            let Some(known) = known else {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "the server ended the request at descriptor {id}, which is not in flight"
                    ),
                ));
            };
            known.busy = false;
            let mut status = [0xff];
            let at = self.layout.control(slot) + STATUS;
            self.ram.read_into(at, &mut status);
            ended.push(Ended {
                slot,
                ok: status == [0],
            });
        }
        Ok(())
    }

    fn alive(&self) -> Result<()> {
        let what = match self.fate.load(Ordering::Acquire) {
            ALIVE => return Ok(()),
            BROKEN => "the server reported a broken ring",
            _ => "the server closed the connection",
        };
        Err(Error::new(ErrorKind::Io, what))
    }
}

impl Client for Vhost<'_> {
    fn submit(&mut self, slot: usize, request: Request) -> Result<()> {
        let bytes = request.bytes as u32;
        // The head of an indirect chain says where its table is.
        let describes = (request.kind, if self.layout.indirect { 0 } else { bytes });
        let own = &mut self.slots[slot];
        own.busy = true;
        let described = own.described.replace(describes) == Some(describes);
        let table = &mut own.tables[request.kind as usize];
        let rewrite = std::mem::replace(table, bytes) != bytes;
        let (kind, sector) = match request.kind {
            Kind::Read => (driver::IN, request.offset / 512),
            Kind::Write => (driver::OUT, request.offset / 512),
            Kind::Flush => (driver::FLUSH, 0),
        };
        // Type, priority 0 and sector; behind them the status, which must not be of the last request.
        let mut header = [0xff; STATUS as usize + 1];
        let word = u128::from(kind) | u128::from(sector) << 64;
        header[..16].copy_from_slice(&word.to_le_bytes());
        self.ram.write(self.layout.control(slot), &header);
        let (pieces, count) = self.layout.pieces(slot, request.kind, bytes);
        if self.layout.indirect {
            let table = self.layout.table(slot, request.kind);
            if rewrite {
                self.ring.write_table(table, &pieces[..count]);
            }
            let chain = Chain::Table(table, count as u32);
            self.ring.offer(slot as u16, chain, described);
        } else {
            let chain = Chain::Pieces(&pieces[..count]);
            self.ring.offer(slot as u16 * CHAIN_MAX, chain, described);
        }
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        self.ring.kick().context(|| "kick")
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) -> Result<()> {
        self.take(ended)?;
        if !ended.is_empty() {
            return Ok(());
        }
        if self.poll {
            for _ in 0..SPINS {
                std::hint::spin_loop();
                self.take(ended)?;
                if !ended.is_empty() {
                    return Ok(());
                }
            }
            return self.alive();
        }
        if self.ring.enable_call() {
            self.ring.wait_call().context(|| "wait for a call")?;
        }
        self.take(ended)?;
        if ended.is_empty() {
            self.alive()?;
        }
        Ok(())
    }

    fn put(&mut self, slot: usize, block: &[u8]) {
        let at = self.layout.data + self.layout.data_bytes * slot as u64;
        self.ram.write(at, block);
    }

    fn get(&mut self, slot: usize, block: &mut [u8]) {
        let at = self.layout.data + self.layout.data_bytes * slot as u64;
        self.ram.read_into(at, block);
    }

    fn notifications(&self) -> (u64, u64) {
        (self.ring.kicks, self.ring.calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_lie_where_they_are_asked_to_and_apart() {
        let layout = |misalign: u64, bytes: u64| Layout {
            control: BUFFERS,
            data: BUFFERS + 4096 + misalign,
            data_bytes: slot_bytes(misalign, bytes),
            indirect: true,
        };
        for (misalign, bytes) in [(0, 4096), (2, 4096), (4095, 512), (2, 1 << 20)] {
            let layout = layout(misalign, bytes);
            let mut end = 0;
            for slot in 0..3 {
                let (pieces, count) = layout.pieces(slot, Kind::Read, bytes as u32);
                assert_eq!((count, pieces[1].at % 4096), (3, misalign));
                assert!(pieces[1].at >= end, "{misalign} {bytes}");
                end = pieces[1].at + bytes;
            }
            // And the last one within what all have together, behind which is somebody else's memory.
            let data_end = layout.data - misalign + 3 * layout.data_bytes;
            assert!(end <= data_end, "{misalign} {bytes}");
        }
    }
}
