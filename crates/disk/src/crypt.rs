//! Encrypted images: reads are decrypted behind the device, writes encrypted before it.
//!
//! ```text
//!   read:   device ─▶ buffer ─ decrypt in place ─▶ the guest's memory
//!   write:  the guest's memory ─▶ buffer ─ encrypt in place ─▶ device
//! ```
//!
//! Everything goes through buffers of ours. A guest's memory never holds ciphertext: who looks at it
//! while a read is under way, or changes it while a write is, must not learn or choose what
//! goes through the cipher twice. The buffers are bounded and kept for reuse.
//!
//! Sectors are encrypted whole. Reads of parts of one are cut out here; writes of parts of one are refused
//! at the edge (`DiskQueue::submit`), as the exports tell their clients: what is left of the sector would
//! have to be read, and kept from all other writers meanwhile.

use crate::{
    memory,
    queue::{DiskQueue, Next},
    sub::{Place, Purpose},
};
use block::{GuestError, GuestOffset, HostOffset, align_down, align_up};
use image::FileId;
use io::{Engine, IoOp};

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = crypto::SECTOR as u64;
/// Bytes of a request that go through a buffer at a time.
const PIECE_MAX: u64 = 1 << 20;
/// Bytes of such buffers under way above which no further one is taken.
const BYTES_MAX: u64 = 16 << 20;
/// Bytes of idle buffers that a queue keeps beyond those that all have, for these.
pub(crate) const KEPT_BYTES: usize = BYTES_MAX as usize;

/// Where an operation's ciphertext begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sealed {
    /// Which image's cipher.
    layer: u8,
    /// The number of the first sector in the buffer.
    sector: u64,
    /// Bytes of whole sectors in the buffer.
    bytes: u64,
    /// Where in the buffer the request's bytes begin.
    skip: u64,
    /// Where in the request they begin.
    to: u64,
    /// How many.
    len: u64,
}

impl DiskQueue {
    /// Whether an image's data are encrypted.
    pub(crate) fn is_encrypted(&self, layer: u8) -> bool {
        self.encrypted[layer as usize]
    }

    /// The number of the sector of guest byte `guest`, stored at `host`.
    fn sector_number(&self, layer: u8, guest: GuestOffset, host: u64) -> u64 {
        let encryption = self.disk.layers[layer as usize].image.encryption();
        encryption.map_or(0, |e| e.sector(guest, HostOffset(host)))
    }

    /// Encrypts whole sectors, or decrypts them; `false` where there is no key.
    fn run_cipher(&self, layer: u8, sector: u64, bytes: &mut [u8], encrypt: bool) -> bool {
        let encryption = self.disk.layers[layer as usize].image.encryption();
        let Some(cipher) = encryption.and_then(|e| e.cipher.as_ref()) else {
            debug_assert!(false, "a disk without its keys does not open");
            return false;
        };
        match encrypt {
            true => cipher.encrypt(sector, bytes),
            false => cipher.decrypt(sector, bytes),
        }
        true
    }

    /// Reads up to `len` bytes of a request, from its `pos` on, which are at `offset` of a file. Needs an
    /// operation (`has_sub`).
    pub(crate) fn read_sealed(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        layer: u8,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Next {
        let len = len.min(PIECE_MAX);
        if self.crypt_bytes > BYTES_MAX {
            return self.stall(index);
        }
        let Some(sub) = self.take_sub() else {
            return self.stall(index);
        };
        let slot = &mut self.slots[index as usize];
        let skip = offset % SECTOR;
        let guest = GuestOffset(slot.at.0 + slot.pos);
        let sealed = Sealed {
            layer,
            sector: self.sector_number(layer, guest, offset),
            bytes: align_up(skip + len, SECTOR),
            skip,
            to: self.slots[index as usize].pos,
            len,
        };
        let slot = &mut self.slots[index as usize];
        slot.pending += 1;
        slot.pos += len;
        self.crypt_bytes += sealed.bytes;
        self.put_buffer(sub, sealed.bytes);
        let place = Place {
            file: self.file(layer, file),
            offset: align_down(offset, SECTOR),
            len: sealed.bytes,
        };
        let purpose = Purpose::Unseal {
            slot: index,
            sealed,
        };
        self.issue(engine, sub, purpose, IoOp::Read, place, None);
        Next::Continue
    }

    /// A read of ciphertext ended well: its plain bytes go to the request's memory.
    pub(crate) fn unseal(&mut self, sub: u32, slot: u32, sealed: &Sealed) -> Option<GuestError> {
        let mut buffer = self.subs[sub as usize].buffer.take()?;
        let bytes = &mut buffer[..sealed.bytes as usize];
        let done = self.run_cipher(sealed.layer, sealed.sector, bytes, false);
        let plain = &bytes[sealed.skip as usize..(sealed.skip + sealed.len) as usize];
        if done {
            memory::scatter(self.slots[slot as usize].iov.get(), sealed.to, plain);
        }
        self.subs[sub as usize].buffer = Some(buffer);
        (!done).then_some(GuestError::Io)
    }

    /// Writes up to `len` bytes of a request, from its `pos` on, to `offset` of the active image's file. How
    /// many, or `None` when there is no room now. Needs an operation (`has_sub`).
    pub(crate) fn write_sealed(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        file: FileId,
        offset: u64,
        len: u64,
    ) -> Option<u64> {
        const ACTIVE: u8 = 0;
        let len = len.min(PIECE_MAX);
        if self.crypt_bytes > BYTES_MAX {
            return None;
        }
        let sub = self.take_sub()?;
        let slot = &mut self.slots[index as usize];
        slot.pending += 1;
        let (pos, guest) = (slot.pos, GuestOffset(slot.at.0 + slot.pos));
        self.put_data(index, pos, len, sub);
        self.crypt_bytes += len;
        let sealed = self.seal(sub, ACTIVE, guest, offset, len);
        let place = Place {
            file: self.file(ACTIVE, file),
            offset,
            len,
        };
        let purpose = Purpose::Sealed {
            slot: index,
            bytes: len,
        };
        match sealed {
            true => self.issue(engine, sub, purpose, IoOp::Write, place, None),
            false => {
                self.crypt_bytes -= len;
                self.free_sub(sub);
                self.part_ended(index, Some(GuestError::Io));
            }
        }
        Some(len)
    }

    /// Puts what an operation's pieces hold into a buffer, encrypted: `len` bytes of guest offset
    /// `guest` that go to `host`.
    pub(crate) fn seal(
        &mut self,
        sub: u32,
        layer: u8,
        guest: GuestOffset,
        host: u64,
        len: u64,
    ) -> bool {
        debug_assert!((host | len).is_multiple_of(SECTOR), "whole sectors only");
        self.gather(sub, len);
        let sector = self.sector_number(layer, guest, host);
        let Some(mut buffer) = self.subs[sub as usize].buffer.take() else {
            return false;
        };
        let done = self.run_cipher(layer, sector, &mut buffer[..len as usize], true);
        self.subs[sub as usize].buffer = Some(buffer);
        done
    }

    /// Gives an operation a buffer as its memory.
    fn put_buffer(&mut self, sub: u32, len: u64) {
        let buffer = self.buffers.take(len as usize);
        let piece = buffer.piece(0, len as usize);
        let sub = &mut self.subs[sub as usize];
        sub.iov.push(piece);
        sub.buffer = Some(buffer);
    }

    /// An operation on ciphertext ended: others have its room.
    pub(crate) fn sealed_ended(&mut self, bytes: u64) {
        self.crypt_bytes -= bytes;
    }
}

impl Sealed {
    /// Bytes of its buffer.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}
