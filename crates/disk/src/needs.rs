//! What keeps a request from going on: a block or space that its format lacks, somebody else
//! who is at it, or a table that is full.

use crate::{
    memory,
    queue::{DiskQueue, Next},
    request::State,
    sub::{Place, Purpose},
    wait::Waiter,
};
use block::GuestError;
use image::{Foreseen, Key, Need};
use io::{Engine, FileSlot, IoOp};

impl DiskQueue {
    /// Parks the request until `key` of `layer` is woken; `Continue` asks once more first.
    pub(crate) fn wait(&mut self, index: u32, layer: u8, key: Key) -> Next {
        let slot = &mut self.slots[index as usize];
        if slot.registered == Some((layer, key)) {
            slot.state = State::Parked;
            self.stats.wait();
            return Next::Blocked;
        }
        // It went on before the key that it registered for last was woken.
        let last = slot.registered.replace((layer, key));
        let waiter = self.waiter(index);
        if let Some((layer, key)) = last {
            let waits = &self.disk.waits;
            waits.unregister(layer, key, waiter.slot, &self.mailbox);
        }
        self.disk.waits.register(layer, key, waiter);
        Next::Continue
    }

    /// How other threads reach the request.
    pub(crate) fn waiter(&self, index: u32) -> Waiter {
        Waiter {
            mailbox: self.mailbox.clone(),
            slot: self.slots[index as usize].id(index),
        }
    }

    /// Leaves the request until there is room.
    pub(crate) fn stall(&mut self, index: u32) -> Next {
        self.stats.stall();
        self.slots[index as usize].state = State::Stalled;
        self.stalled.push_back(index);
        Next::Blocked
    }

    /// Does what a format needs; the request goes on when that ended. Needs an operation (`has_sub`).
    pub(crate) fn meet(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        layer: u8,
        need: Need,
    ) -> Next {
        match need {
            Need::Load(load) => {
                let Some(sub) = self.take_sub() else {
                    self.disk.layers[layer as usize].image.load_failed(&load);
                    self.disk.waits.wake(layer, load.key);
                    return self.stall(index);
                };
                self.stats.load();
                let buffer = self.buffers.take(load.len as usize);
                let piece = buffer.piece(0, load.len as usize);
                self.subs[sub as usize].buffer = Some(buffer);
                self.subs[sub as usize].iov.push(piece);
                self.slots[index as usize].state = State::Loading;
                let purpose = Purpose::Load {
                    slot: index,
                    layer,
                    load,
                };
                let file = self.file(layer, load.file);
                let (offset, len) = (load.offset.0, u64::from(load.len));
                let place = Place { file, offset, len };
                self.issue(engine, sub, purpose, IoOp::Read, place, None);
                Next::Blocked
            }
            Need::Reserve(reserve) => {
                let refused = self.slots[index as usize].refused;
                let sub = if reserve.len < refused {
                    self.take_sub()
                } else {
                    None
                };
                let Some(sub) = sub else {
                    self.disk.layers[layer as usize]
                        .image
                        .reserve_failed(&reserve);
                    self.disk.waits.wake(layer, reserve.key);
                    self.log_full(reserve.offset.0, reserve.len);
                    return Next::Fail(GuestError::NoSpace);
                };
                self.slots[index as usize].state = State::Loading;
                let purpose = Purpose::Reserve {
                    slot: Some(index),
                    reserve,
                };
                let file = self.file(layer, reserve.file);
                let (offset, len) = (reserve.offset.0, reserve.len);
                let place = Place { file, offset, len };
                self.issue(engine, sub, purpose, IoOp::Allocate, place, None);
                Next::Blocked
            }
            Need::Commit => {
                self.commit_then_ask(index);
                Next::Blocked
            }
        }
    }

    /// Begins what the active image will need soon, so that no request comes to wait for it. Only in turns that brought
    /// requests: a queue that is emptied comes to its end.
    pub(crate) fn look_ahead(&mut self, engine: &mut dyn Engine) {
        if self.commit_lacks_room() || !self.has_sub() || !std::mem::take(&mut self.came) {
            return;
        }
        match self.disk.layers[0].image.foresee() {
            None => {}
            Some(Foreseen::Reserve(reserve)) => {
                let Some(sub) = self.take_sub() else { return };
                self.unasked += 1;
                let purpose = Purpose::Reserve {
                    slot: None,
                    reserve,
                };
                let file = self.file(0, reserve.file);
                let (offset, len) = (reserve.offset.0, reserve.len);
                let place = Place { file, offset, len };
                self.issue(engine, sub, purpose, IoOp::Allocate, place, None);
            }
            Some(Foreseen::Commit) => {
                self.lead_commit();
            }
            Some(Foreseen::Prewrite(prewrite)) => {
                let Some(sub) = self.take_sub() else { return };
                self.unasked += 1;
                memory::push_zeros(prewrite.len, &mut self.subs[sub as usize].iov);
                let file = self.file(0, prewrite.file);
                let (offset, len) = (prewrite.offset.0, prewrite.len);
                let place = Place { file, offset, len };
                let purpose = Purpose::Prewrite { prewrite };
                self.issue(engine, sub, purpose, IoOp::Write, place, None);
            }
        }
    }

    /// The engine's name for a layer's file.
    pub(crate) fn file(&self, layer: u8, file: image::FileId) -> FileSlot {
        self.files[layer as usize][file.0 as usize]
    }
}
