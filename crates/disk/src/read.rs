//! Reading through the chain, and asking what it holds.

use crate::{
    memory,
    queue::{DiskQueue, Next},
    request::{Owner, StatusExtent},
    sub::{Place, Purpose},
};
use block::{GuestOffset, Storage};
use image::{Extent, ExtentKind, FileId, Step};
use io::{Engine, IoOp};

/// What the chain holds at a place.
enum Found {
    /// The first image that has something there, by its number, and what.
    Extent(u8, Extent),
    /// Nothing in any image: so many zeros.
    Nothing(u64),
    /// The request cannot go on now.
    Next(Next),
}

impl DiskQueue {
    /// Finds out what the chain holds from `at` on. Needs an operation (`has_sub`).
    fn find(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        at: GuestOffset,
        mut len: u64,
    ) -> Found {
        for layer in 0..self.disk.layers.len() {
            let image = &self.disk.layers[layer].image;
            if layer > 0 {
                // Behind the end of a backing image everything reads as zeros.
                let behind = image.size().saturating_sub(at.0);
                if behind == 0 {
                    break;
                }
                len = len.min(behind);
            }
            let step = image.map(at, len);
            // Layer counts fit: chains are limited to fewer than 256 images.
            let layer = layer as u8;
            match step {
                Ok(Step::Done(extent)) => {
                    len = len.min(extent.len).max(1);
                    if extent.kind != ExtentKind::Unallocated {
                        return Found::Extent(layer, Extent { len, ..extent });
                    }
                }
                Ok(Step::Need(need)) => return Found::Next(self.meet(engine, index, layer, need)),
                Ok(Step::Wait(key)) => return Found::Next(self.wait(index, layer, key)),
                Err(error) => return Found::Next(Next::Fail(self.refuse(layer, &error))),
            }
        }
        Found::Nothing(len)
    }

    /// Reads the next part of a request.
    pub(crate) fn step_read(&mut self, engine: &mut dyn Engine, index: u32) -> Next {
        if !self.has_sub() {
            return self.stall(index);
        }
        let slot = &self.slots[index as usize];
        let (pos, at, left) = (slot.pos, slot.at.plus(slot.pos), slot.len - slot.pos);
        let (layer, extent) = match self.find(engine, index, at, left) {
            Found::Extent(layer, extent) => (layer, extent),
            Found::Nothing(len) => (
                0,
                Extent {
                    len,
                    kind: ExtentKind::Zero { host: None },
                },
            ),
            Found::Next(next) => return next,
        };
        match extent.kind {
            ExtentKind::Data { file, offset } => {
                self.note_data(index);
                if self.is_encrypted(layer) {
                    return self.read_sealed(engine, index, layer, file, offset.0, extent.len);
                }
                self.transfer(
                    engine,
                    index,
                    layer,
                    file,
                    IoOp::Read,
                    offset.0,
                    pos,
                    extent.len,
                );
            }
            ExtentKind::Zero { .. } | ExtentKind::Unallocated => {
                let slot = &self.slots[index as usize];
                if !(slot.all_zero && matches!(slot.owner, Owner::Fill { .. })) {
                    memory::zero(slot.iov.get(), pos, extent.len);
                }
            }
            ExtentKind::Untouched => {}
            ExtentKind::Compressed(cluster) => {
                self.note_data(index);
                let read = self.read_compressed(engine, index, layer, cluster, pos, extent.len);
                if let Err(next) = read {
                    return next;
                }
            }
        }
        self.slots[index as usize].pos += extent.len;
        Next::Continue
    }

    /// A read found something else than zeros. Zeros that come first are not written to a fill's
    /// memory before: all of it may be zeros, and then nobody looks there.
    fn note_data(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if slot.all_zero && slot.pos > 0 && matches!(slot.owner, Owner::Fill { .. }) {
            memory::zero(slot.iov.get(), 0, slot.pos);
        }
        slot.all_zero = false;
    }

    /// Moves bytes `pos..pos + len` of a request between its memory and `offset` of a file.
    /// Needs an operation (`has_sub`).
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn transfer(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        layer: u8,
        file: FileId,
        op: IoOp,
        offset: u64,
        pos: u64,
        len: u64,
    ) {
        let Some(sub) = self.take_sub() else { return };
        let slot = &mut self.slots[index as usize];
        slot.pending += 1;
        // The common case is one operation on the submitter's own pieces.
        let whole = slot.op().is_none_or(|op| op.has_data()) && pos == 0 && len == slot.len;
        let pieces = whole.then_some(slot.iov);
        if !whole {
            self.put_data(index, pos, len, sub);
        }
        let file = self.file(layer, file);
        let purpose = Purpose::Data { slot: index };
        let place = Place { file, offset, len };
        self.issue(engine, sub, purpose, op, place, pieces);
    }

    /// Appends the memory of bytes `pos..pos + len` of a request to an operation's pieces:
    /// zeros for a request that has none of its own.
    pub(crate) fn put_data(&mut self, index: u32, pos: u64, len: u64, sub: u32) {
        let slot = &self.slots[index as usize];
        let out = &mut self.subs[sub as usize].iov;
        if slot.op().is_some_and(|op| op.has_data()) {
            block::clip(slot.iov.get(), pos, len, out);
        } else {
            memory::push_zeros(len, out);
        }
    }

    /// Adds the next run to a status query.
    pub(crate) fn step_status(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        extents_max: usize,
    ) -> Next {
        if !self.has_sub() {
            return self.stall(index);
        }
        let slot = &self.slots[index as usize];
        let (at, left) = (slot.at.plus(slot.pos), slot.len - slot.pos);
        let status = match self.find(engine, index, at, left) {
            Found::Extent(layer, extent) => self.status_of(layer, extent),
            Found::Nothing(len) => StatusExtent {
                len,
                allocated: false,
                zero: true,
            },
            Found::Next(next) => return next,
        };
        let slot = &mut self.slots[index as usize];
        let count = slot.status.len();
        match slot.status.last_mut() {
            Some(last) if (last.allocated, last.zero) == (status.allocated, status.zero) => {
                last.len += status.len;
            }
            _ if count == extents_max => {
                // Enough: the query ends here.
                slot.pos = slot.len;
                return Next::Continue;
            }
            _ => slot.status.push(status),
        }
        slot.pos += status.len;
        Next::Continue
    }

    /// What an extent means to a client. Holes of a raw or data file are asked of the host (`lseek`).
    fn status_of(&self, layer: u8, extent: Extent) -> StatusExtent {
        let (mut allocated, mut zero, mut len) = (true, false, extent.len);
        match extent.kind {
            ExtentKind::Data { file, offset } => {
                let layer = &self.disk.layers[layer as usize];
                if layer.holes_are_zeros(file) {
                    match layer.files[file.0 as usize].range_at(offset.0) {
                        Ok(Some(range)) => {
                            let run = (range.offset + range.len).saturating_sub(offset.0);
                            len = len.min(run.max(1));
                            zero = range.kind.is_zero();
                            allocated = range.kind.is_allocated();
                        }
                        Ok(None) => (allocated, zero) = (false, true),
                        Err(_) => {}
                    }
                }
            }
            ExtentKind::Zero { host } => (allocated, zero) = (host.is_some(), true),
            ExtentKind::Compressed(_) | ExtentKind::Untouched => {}
            ExtentKind::Unallocated => (allocated, zero) = (false, true),
        }
        StatusExtent {
            len,
            allocated,
            zero,
        }
    }
}
