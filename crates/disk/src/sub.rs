//! Engine operations of requests: the table of those under way, how they are
//! issued and what their ends mean.

use crate::{crypt::Sealed, memory, queue::DiskQueue};
use block::{GuestError, IoVec};
use image::{Compressed, Freed, Load, Prewrite, Reserve};
use io::{Completion, Engine, FileSlot, Io, IoOp, Token, memory::AlignedBuf};

/// What an operation is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// In no use.
    None,
    /// Part of a request's own work; nothing follows but counting it.
    Data { slot: u32 },
    /// A compressed cluster; unpacked into the request's memory from `to` on, `len` bytes.
    Unpack {
        slot: u32,
        layer: u8,
        cluster: Compressed,
        to: u64,
        len: u64,
    },
    /// Ciphertext; its plain bytes go to the request's memory.
    Unseal { slot: u32, sealed: Sealed },
    /// Part of a request's own work in so many bytes of a buffer.
    Sealed { slot: u32, bytes: u64 },
    /// A metadata block that a request waits for.
    Load { slot: u32, layer: u8, load: Load },
    /// Space that a request waits for, or (without one) that will be needed soon.
    Reserve { slot: Option<u32>, reserve: Reserve },
    /// Zeros in space that will be needed soon.
    Prewrite { prewrite: Prewrite },
    /// The one write of an allocation.
    Fill { fill: u32 },
    /// A metadata write or barrier of the commit that this queue leads.
    Commit,
    /// Freed space being given back.
    Punch { freed: Freed },
}

/// Where an operation works: a range of a file; for a barrier the file alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub file: FileSlot,
    pub offset: u64,
    pub len: u64,
}

/// An operation at the engine, with the memory that it needs.
#[derive(Debug)]
pub(crate) struct Sub {
    pub purpose: Purpose,
    /// Its pieces where they are not simply the request's. Keeps its capacity.
    pub iov: Vec<IoVec>,
    /// A buffer that goes back to the pool at its end.
    pub buffer: Option<AlignedBuf>,
    io: Io,
}

impl Sub {
    pub fn new() -> Self {
        Self {
            purpose: Purpose::None,
            iov: Vec::with_capacity(8),
            buffer: None,
            io: Io {
                file: FileSlot(0),
                op: IoOp::Sync,
                offset: 0,
                len: 0,
                iov: std::ptr::null(),
                iov_len: 0,
                token: Token(0),
            },
        }
    }
}

impl DiskQueue {
    /// Whether another operation can be issued. Each fill under way has one set aside.
    pub(crate) fn has_sub(&self) -> bool {
        self.subs_free.len() > self.fills_in_use
    }

    /// Issues an operation. With `pieces`, on that memory; otherwise on what was put
    /// into `subs[index].iov` for the `index` that `take_sub` gave.
    pub(crate) fn issue(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        purpose: Purpose,
        op: IoOp,
        place: Place,
        pieces: Option<memory::Pieces>,
    ) {
        let sub = &mut self.subs[index as usize];
        let (iov, iov_len) = match pieces {
            Some(pieces) => (pieces.first(), pieces.count()),
            None => (sub.iov.as_ptr(), sub.iov.len() as u32),
        };
        sub.purpose = purpose;
        sub.io = Io {
            file: place.file,
            op,
            offset: place.offset,
            len: place.len,
            iov,
            iov_len,
            token: Token(self.token_base | u64::from(index)),
        };
        // Order among operations does not matter, so one that finds the engine full does
        // not hold up the others.
        if !memory::stage(engine, sub.io) {
            self.unstaged.push_back(index);
        }
    }

    /// A free operation, with an empty list of pieces. Only after `has_sub` (or for a fill's own).
    pub(crate) fn take_sub(&mut self) -> Option<u32> {
        let index = self.subs_free.pop()?;
        self.subs[index as usize].iov.clear();
        Some(index)
    }

    /// Gives an operation back.
    pub(crate) fn free_sub(&mut self, index: u32) {
        let sub = &mut self.subs[index as usize];
        sub.purpose = Purpose::None;
        if let Some(buffer) = sub.buffer.take() {
            self.buffers.give(buffer);
        }
        self.subs_free.push(index);
    }

    /// Hands operations that found the engine full in again.
    pub(crate) fn restage(&mut self, engine: &mut dyn Engine) {
        while let Some(&index) = self.unstaged.front() {
            if !memory::stage(engine, self.subs[index as usize].io) {
                return;
            }
            self.unstaged.pop_front();
        }
    }

    /// An operation of this queue ended: `completion.token` carries the queue's token base.
    pub fn completed(&mut self, engine: &mut dyn Engine, completion: &Completion) {
        let index = (completion.token.0 & 0xffff_ffff) as u32;
        let Some(sub) = self.subs.get_mut(index as usize) else {
            debug_assert!(false, "completion of an unknown operation");
            return;
        };
        let purpose = std::mem::replace(&mut sub.purpose, Purpose::None);
        let io = sub.io;
        let error = (completion.errno != 0).then(|| GuestError::of_errno(completion.errno));
        if self.disk.unsynced.is_kept() {
            self.note_unsynced(&io, completion.errno);
        }
        if completion.errno != 0 {
            self.log_error(&io, &purpose, completion.errno);
        }
        match purpose {
            Purpose::None => debug_assert!(false, "completion of an operation that ended"),
            Purpose::Data { slot } => {
                self.free_sub(index);
                self.part_ended(slot, error);
            }
            Purpose::Unpack {
                slot,
                layer,
                cluster,
                to,
                len,
            } => {
                let error = error.or_else(|| self.unpack(index, slot, layer, &cluster, to, len));
                self.packed_bytes -= u64::from(cluster.len);
                self.free_sub(index);
                self.part_ended(slot, error);
            }
            Purpose::Unseal { slot, sealed } => {
                let error = error.or_else(|| self.unseal(index, slot, &sealed));
                self.sealed_ended(sealed.bytes());
                self.free_sub(index);
                self.part_ended(slot, error);
            }
            Purpose::Sealed { slot, bytes } => {
                self.sealed_ended(bytes);
                self.free_sub(index);
                self.part_ended(slot, error);
            }
            Purpose::Load { slot, layer, load } => {
                let image = &self.disk.layers[layer as usize].image;
                let error = match error {
                    Some(error) => {
                        image.load_failed(&load);
                        Some(error)
                    }
                    None => {
                        let sub = &self.subs[index as usize];
                        let bytes = sub.buffer.as_ref().map(|b| &b[..load.len as usize]);
                        match image.loaded(&load, bytes.unwrap_or_default()) {
                            Ok(()) => None,
                            Err(error) => Some(self.refuse(layer, &error)),
                        }
                    }
                };
                self.free_sub(index);
                self.disk.waits.wake(layer, load.key);
                self.metadata_ended(engine, slot, error);
            }
            Purpose::Reserve { slot, reserve } => {
                let image = &self.disk.layers[0].image;
                let mut error = error;
                if error.is_some() {
                    image.reserve_failed(&reserve);
                    // The format may ask for less next time; `meet` sees to it that this ends.
                    if let (Some(slot), Some(GuestError::NoSpace)) = (slot, error) {
                        self.slots[slot as usize].refused = reserve.len;
                        error = None;
                    }
                } else {
                    image.reserved(
                        &reserve,
                        if completion.zeroed {
                            block::Zeroed::Yes
                        } else {
                            block::Zeroed::No
                        },
                    );
                }
                self.free_sub(index);
                self.disk.waits.wake(0, reserve.key);
                match slot {
                    Some(slot) => self.metadata_ended(engine, slot, error),
                    None => self.unasked -= 1,
                }
            }
            Purpose::Prewrite { prewrite } => {
                let image = &self.disk.layers[0].image;
                image.prewritten(&prewrite, error.is_none());
                if error.is_none() {
                    self.stats.prewrite(prewrite.len);
                }
                self.free_sub(index);
                self.unasked -= 1;
            }
            Purpose::Fill { fill } => {
                self.free_sub(index);
                self.fill_written(fill, error);
            }
            Purpose::Commit => {
                self.free_sub(index);
                self.commit_part_ended(engine, error);
            }
            Purpose::Punch { freed } => {
                self.free_sub(index);
                self.punched(&freed, error.is_none());
            }
        }
    }

    /// Notes that an operation left a file in want of a sync. A change that failed may have done a part.
    fn note_unsynced(&self, io: &Io, errno: i32) {
        let changed = match io.op {
            IoOp::Read => false,
            IoOp::Sync => errno != 0,
            IoOp::Write | IoOp::Discard | IoOp::Zero { .. } | IoOp::Allocate => true,
        };
        // Only the active image's files are ever changed: few, or an image's extents.
        let files = self.files.first().filter(|_| changed);
        if let Some(file) = files.and_then(|files| files.iter().position(|f| *f == io.file)) {
            self.disk.unsynced.mark(file);
        }
    }
}
