//! Compressed clusters of an open disk: read as they are, and unpacked to the request's memory.
//!
//! A cluster may have 64 MiB, and twice as much when it is packed (`cloop`), so what a queue reads of them at a time is
//! bounded. Where what is there never changes, the last one is kept unpacked: who reads a disk in order asks for the
//! next sectors of it. Each queue keeps its last one; of large ones the disk does, for all queues, so that these take no more memory
//! the more queues there are.

use crate::{
    memory,
    queue::{DiskQueue, Next},
    sub::{Place, Purpose},
};
use block::GuestError;
use image::Compressed;
use io::{Engine, IoOp, memory::AlignedBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Packed bytes under way above which no further ones are read.
const BYTES_MAX: u64 = 16 << 20;
/// Bytes of the largest cluster that a queue keeps unpacked.
const KEPT_MAX: u32 = 2 << 20;
/// Bytes of the largest one that a disk keeps: no format has larger ones.
const LARGE_MAX: u32 = 64 << 20;

/// A cluster as it is unpacked.
#[derive(Debug)]
pub(crate) struct Kept {
    layer: u8,
    cluster: Compressed,
    buffer: AlignedBuf,
}

/// The last one of a disk that is too large for its queues.
#[derive(Debug, Default)]
pub(crate) struct Large(Mutex<Option<Arc<Kept>>>);

impl Large {
    /// Its bytes, if it is `cluster` of that image.
    fn get(&self, layer: u8, cluster: &Compressed) -> Option<Arc<Kept>> {
        let is_large = (KEPT_MAX + 1..=LARGE_MAX).contains(&cluster.unpacked_len);
        if !cluster.lasting || !is_large {
            return None;
        }
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone().filter(|kept| kept.is(layer, cluster))
    }

    fn put(&self, kept: Kept) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(Arc::new(kept));
    }
}

impl DiskQueue {
    /// Reads `len` bytes of a compressed cluster to those of a request from `to` on. Needs an operation (`has_sub`).
    pub(crate) fn read_compressed(
        &mut self,
        engine: &mut dyn Engine,
        index: u32,
        layer: u8,
        cluster: Compressed,
        to: u64,
        len: u64,
    ) -> Result<(), Next> {
        let inside = u64::from(cluster.skip) + len <= u64::from(cluster.unpacked_len);
        debug_assert!(inside, "a compressed extent lies within its cluster");
        if !inside {
            return Err(Next::Fail(GuestError::Io));
        }
        if let Some(kept) = self.kept.take_if(|kept| kept.is(layer, &cluster)) {
            self.hand_out(index, &kept.buffer, &cluster, to, len);
            self.kept = Some(kept);
            return Ok(());
        }
        if let Some(large) = self.disk.large.get(layer, &cluster) {
            self.hand_out(index, &large.buffer, &cluster, to, len);
            return Ok(());
        }
        if self.packed_bytes > BYTES_MAX {
            return Err(self.stall(index));
        }
        let Some(sub) = self.take_sub() else {
            return Err(self.stall(index));
        };
        let buffer = self.buffers.take(cluster.len as usize);
        let piece = buffer.piece(0, cluster.len as usize);
        self.subs[sub as usize].buffer = Some(buffer);
        self.subs[sub as usize].iov.push(piece);
        self.slots[index as usize].pending += 1;
        self.packed_bytes += u64::from(cluster.len);
        let purpose = Purpose::Unpack {
            slot: index,
            layer,
            cluster,
            to,
            len,
        };
        let file = self.file(layer, cluster.file);
        let (offset, bytes) = (cluster.offset.0, u64::from(cluster.len));
        let place = Place {
            file,
            offset,
            len: bytes,
        };
        self.issue(engine, sub, purpose, IoOp::Read, place, None);
        Ok(())
    }

    /// Unpacks the compressed cluster in the operation's buffer to the request's memory.
    pub(crate) fn unpack(
        &mut self,
        index: u32,
        slot: u32,
        layer: u8,
        cluster: &Compressed,
        to: u64,
        len: u64,
    ) -> Option<GuestError> {
        // Somebody may have unpacked it since it was asked for.
        if let Some(large) = self.disk.large.get(layer, cluster) {
            self.hand_out(slot, &large.buffer, cluster, to, len);
            return None;
        }
        let buffer = self.subs[index as usize].buffer.as_ref()?;
        let mut unpacked = self.buffers.take(cluster.unpacked_len as usize);
        let result = self.disk.layers[layer as usize].image.decompress(
            cluster,
            &buffer[..cluster.len as usize],
            &mut unpacked[..cluster.unpacked_len as usize],
        );
        if let Err(error) = result {
            self.buffers.give(unpacked);
            return Some(self.refuse(layer, &error));
        }
        self.hand_out(slot, &unpacked, cluster, to, len);
        if !cluster.lasting || cluster.unpacked_len > LARGE_MAX {
            self.buffers.give(unpacked);
            return None;
        }
        let kept = Kept {
            layer,
            cluster: *cluster,
            buffer: unpacked,
        };
        if cluster.unpacked_len > KEPT_MAX {
            self.disk.large.put(kept);
        } else if let Some(old) = self.kept.replace(kept) {
            self.buffers.give(old.buffer);
        }
        None
    }

    /// Copies `len` bytes of an unpacked cluster to a request's memory.
    fn hand_out(&self, slot: u32, unpacked: &[u8], cluster: &Compressed, to: u64, len: u64) {
        let skip = cluster.skip as usize;
        memory::scatter(
            self.slots[slot as usize].iov.get(),
            to,
            &unpacked[skip..skip + len as usize],
        );
    }
}

impl Kept {
    /// Whether it is `cluster` of that image.
    fn is(&self, layer: u8, cluster: &Compressed) -> bool {
        self.layer == layer && self.cluster.is_of(cluster)
    }
}
