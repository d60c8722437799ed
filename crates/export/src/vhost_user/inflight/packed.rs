//! The region of a packed ring. Unsafe code: shared memory.
//!
//! ```text
//!   features u64, version u16, desc_num u16, free_head u16, old_free_head u16, used_idx u16, old_used_idx u16,
//!   used_wrap_counter u8, old_used_wrap_counter u8, pad[10]
//!   desc_num × { inflight u8, pad, next u16, last u16, num u16, counter u64, id u16, flags u16, len u32, addr u64 }
//! ```
//!
//! Descriptors are copied, since used ones overwrite them in the ring. Entries that are not in use are linked from `free_head`.
//! What is in the middle of a change shows: `free_head` and `used_idx` move before it, their old values after it.
//!
//! ```text
//!   take      flag, descriptors │ free_head, old_free_head
//!   publish   entries go to the free list, free_head, used_idx │ the ring │ flags cleared, old_*
//! ```
//!
//! So all that is reachable from the old head is not in flight, whatever its flag says: either it never was, or the
//! ring shows that its batch was published, and the new head is the one that counts.
//!
//! While the server lives it follows links of its own, never those in the file.

use super::{File, VERSION, region_bytes};
use crate::vhost_user::{
    memory::Region,
    ring::{Buffer, PackedDescriptor, Position},
};
use block::{Error, Result};
use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering},
};

const HEADER_BYTES: u64 = 32;
const ENTRY_BYTES: u64 = 32;

const VERSION_AT: usize = 8;
const COUNT_AT: usize = 10;
const FREE_HEAD_AT: usize = 12;
/// The used index and all that belongs to it: 8 bytes.
const USED_IDX_AT: usize = 16;

/// Within an entry.
const NEXT_AT: usize = 2;
const LAST_AT: usize = 4;
const NUM_AT: usize = 6;
const COUNTER_AT: usize = 8;
const ID_AT: usize = 16;
const FLAGS_AT: usize = 18;
const LEN_AT: usize = 20;
const ADDR_AT: usize = 24;

/// Bytes of the region of one queue of `size` entries.
pub(super) fn queue_bytes(size: u16) -> u64 {
    region_bytes(HEADER_BYTES, ENTRY_BYTES, size)
}

/// What the last server left.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::vhost_user) struct Recovered {
    /// Where the ring's next used descriptor goes; `None` when the file is new.
    pub used: Option<Position>,
    /// The chains that were taken and not answered, oldest first: the entry that names each here, and how many descriptors
    /// of the ring it has.
    pub chains: Vec<(u16, u16)>,
}

/// The part of the file that belongs to one queue.
pub(in crate::vhost_user) struct Packed {
    /// Keeps the mapping.
    _region: Arc<Region>,
    base: *mut u8,
    size: u16,
    counter: u64,
    free_head: u16,
    /// By entry: the one behind it, in its chain or in the free list. `size` ends the free list.
    next: Box<[u16]>,
    /// By first entry: the last of its chain.
    last: Box<[u16]>,
    /// First entries of what was answered since the last publication. As long as the region at most.
    batch: Vec<u16>,
}

// SAFETY: `base` points into shared memory that `_region` keeps mapped; only atomics go there.
unsafe impl Send for Packed {}

impl Packed {
    /// The part of the file that it says.
    ///
    /// # Errors
    ///
    /// When the file is too small for that queue.
    pub(in crate::vhost_user) fn new(file: File) -> Result<Self> {
        let base = file.part(queue_bytes(file.size))?;
        let entries = || vec![0; usize::from(file.size)].into_boxed_slice();
        Ok(Self {
            _region: file.region.clone(),
            base,
            size: file.size,
            counter: 0,
            free_head: 0,
            next: entries(),
            last: entries(),
            batch: Vec::with_capacity(usize::from(file.size)),
        })
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        // SAFETY: `new` checked that header and entries are mapped and aligned to 64 bytes; callers pass offsets of
        // fields within. The mapping lives as long as `self`.
        unsafe { AtomicU8::from_ptr(self.base.wrapping_add(at)) }
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as in `byte`; fields lie at multiples of their size.
        unsafe { AtomicU16::from_ptr(self.base.wrapping_add(at).cast()) }
    }

    fn long(&self, at: usize) -> &AtomicU32 {
        // SAFETY: as in `word`.
        unsafe { AtomicU32::from_ptr(self.base.wrapping_add(at).cast()) }
    }

    fn quad(&self, at: usize) -> &AtomicU64 {
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.base.wrapping_add(at).cast()) }
    }

    /// Where entry `entry`, below the size, lies.
    fn entry(&self, entry: u16) -> usize {
        debug_assert!(entry < self.size);
        HEADER_BYTES as usize + usize::from(entry) * ENTRY_BYTES as usize
    }

    fn link(&mut self, from: u16, to: u16) {
        self.next[usize::from(from)] = to;
        self.word(self.entry(from) + NEXT_AT)
            .store(to, Ordering::Release);
    }

    /// The head of the free list, now and before what is under way. One store: a crash leaves both or none.
    fn set_heads(&self, head: u16, old: u16) {
        let both = u32::from(head.to_le()) | u32::from(old.to_le()) << 16;
        self.long(FREE_HEAD_AT).store(both, Ordering::Release);
    }

    fn heads(&self) -> (u16, u16) {
        let both = self.long(FREE_HEAD_AT).load(Ordering::Relaxed);
        (both as u16, (both >> 16) as u16)
    }

    /// Where the next used descriptor goes, now and before what is under way. One store, as above.
    fn set_used(&self, used: Position, old: Position) {
        let word = u64::from(used.index)
            | u64::from(old.index) << 16
            | u64::from(used.wrap) << 32
            | u64::from(old.wrap) << 40;
        self.quad(USED_IDX_AT).store(word, Ordering::Release);
    }

    fn used(&self) -> (Position, Position) {
        let word = self.quad(USED_IDX_AT).load(Ordering::Relaxed);
        let position = |index: u32, wrap: u32| Position {
            index: (word >> index) as u16,
            wrap: (word >> wrap) as u8 != 0,
        };
        (position(0, 32), position(16, 40))
    }

    /// What the last server left, of a ring of `ring_size` entries, which stands at `at` where the file is new. `was_shown` tells
    /// whether the ring has a used descriptor at a position.
    ///
    /// # Errors
    ///
    /// When the file says that the ring stands where it has no entry.
    pub(in crate::vhost_user) fn recover(
        &mut self,
        ring_size: u16,
        at: Position,
        was_shown: impl FnOnce(Position) -> bool,
    ) -> Result<Recovered> {
        let fresh = self.word(VERSION_AT).load(Ordering::Relaxed) != VERSION
            || self.word(COUNT_AT).load(Ordering::Relaxed) != self.size;
        if fresh {
            for entry in 0..self.size {
                self.byte(self.entry(entry)).store(0, Ordering::Relaxed);
            }
        }
        let (used, head) = if fresh {
            (at, self.size)
        } else {
            let (new, old) = self.used();
            let (head, old_head) = self.heads();
            if old.index >= ring_size || new.index >= ring_size {
                return Err(Error::invalid(format!(
                    "the inflight file has the used index at {} and {}, of a ring of {ring_size} entries",
                    old.index, new.index
                )));
            }
            // A whole lap of the ring may be one batch: then the wrap counters alone differ.
            if old != new && was_shown(old) {
                (new, head)
            } else {
                (old, old_head)
            }
        };
        let mut free = head;
        for _ in 0..self.size {
            if free >= self.size {
                break;
            }
            let at = self.entry(free);
            self.byte(at).store(0, Ordering::Relaxed);
            free = self.word(at + NEXT_AT).load(Ordering::Relaxed);
        }
        let chains = self.chains(ring_size);
        self.link_free(&chains);
        self.set_used(used, used);
        self.word(COUNT_AT).store(self.size, Ordering::Relaxed);
        self.word(VERSION_AT).store(VERSION, Ordering::Release);
        Ok(Recovered {
            used: (!fresh).then_some(used),
            chains,
        })
    }

    /// The chains whose flags are set, oldest first. One that could not have been noted is not: it leaves the ring, or shares
    /// entries with an older one.
    fn chains(&mut self, ring_size: u16) -> Vec<(u16, u16)> {
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|entry| self.byte(self.entry(*entry)).load(Ordering::Relaxed) == 1)
            .map(|entry| {
                let counter = self.quad(self.entry(entry) + COUNTER_AT);
                (counter.load(Ordering::Relaxed), entry)
            })
            .collect();
        heads.sort_unstable();
        self.counter = heads
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        let mut owned = vec![false; usize::from(self.size)];
        let mut room = ring_size;
        let mut chains = Vec::with_capacity(heads.len());
        let mut lost = 0;
        for (_, head) in heads {
            let num = self.word(self.entry(head) + NUM_AT).load(Ordering::Relaxed);
            let mut entries = Vec::new();
            let mut entry = head;
            while entries.len() < usize::from(num.min(room))
                && entry < self.size
                && !owned[usize::from(entry)]
            {
                owned[usize::from(entry)] = true;
                entries.push(entry);
                entry = self
                    .word(self.entry(entry) + NEXT_AT)
                    .load(Ordering::Relaxed);
            }
            if entries.is_empty() || entries.len() != usize::from(num) {
                lost += 1;
                entries.iter().for_each(|e| owned[usize::from(*e)] = false);
                self.byte(self.entry(head)).store(0, Ordering::Relaxed);
                continue;
            }
            for pair in entries.windows(2) {
                self.next[usize::from(pair[0])] = pair[1];
            }
            self.last[usize::from(head)] = entries[entries.len() - 1];
            room -= num;
            chains.push((head, num));
        }
        if lost > 0 {
            tracing::warn!("the inflight file has {lost} requests whose descriptors are not there");
        }
        chains
    }

    /// Links all entries that no chain has. Only those change, so that a crash in the middle leaves nothing worse.
    fn link_free(&mut self, chains: &[(u16, u16)]) {
        let mut owned = vec![false; usize::from(self.size)];
        for (head, num) in chains {
            let mut entry = *head;
            for _ in 0..*num {
                owned[usize::from(entry)] = true;
                entry = self.next[usize::from(entry)];
            }
        }
        let mut behind = self.size;
        for entry in (0..self.size).rev() {
            if !owned[usize::from(entry)] {
                self.link(entry, behind);
                behind = entry;
            }
        }
        self.free_head = behind;
        self.set_heads(behind, behind);
    }

    /// The descriptors of the chain that entry `head` names, into `out`.
    pub(in crate::vhost_user) fn read(&self, head: u16, num: u16, out: &mut Vec<PackedDescriptor>) {
        out.clear();
        let mut entry = head;
        for _ in 0..num {
            let at = self.entry(entry);
            out.push(PackedDescriptor {
                buffer: Buffer {
                    addr: self.quad(at + ADDR_AT).load(Ordering::Relaxed),
                    len: self.long(at + LEN_AT).load(Ordering::Relaxed),
                    flags: self.word(at + FLAGS_AT).load(Ordering::Relaxed),
                },
                id: self.word(at + ID_AT).load(Ordering::Relaxed),
            });
            entry = self.next[usize::from(entry)];
        }
    }

    /// A chain was taken from the ring; the entry that names it from now on. Nothing may be answered and not published then.
    /// The ring bounds what is in flight, so that there is room.
    pub(in crate::vhost_user) fn take(&mut self, chain: &[PackedDescriptor]) -> u16 {
        debug_assert!(self.batch.is_empty());
        let head = self.free_head;
        let Some(count) = u16::try_from(chain.len()).ok().filter(|_| head < self.size) else {
            return head;
        };
        let first = self.entry(head);
        self.word(first + NUM_AT).store(count, Ordering::Relaxed);
        self.quad(first + COUNTER_AT)
            .store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        let mut last = head;
        for descriptor in chain {
            last = self.free_head;
            if last >= self.size {
                break;
            }
            let at = self.entry(last);
            self.quad(at + ADDR_AT)
                .store(descriptor.buffer.addr, Ordering::Relaxed);
            self.long(at + LEN_AT)
                .store(descriptor.buffer.len, Ordering::Relaxed);
            self.word(at + FLAGS_AT)
                .store(descriptor.buffer.flags, Ordering::Relaxed);
            self.word(at + ID_AT)
                .store(descriptor.id, Ordering::Relaxed);
            self.free_head = self.next[usize::from(last)];
        }
        self.last[usize::from(head)] = last;
        self.word(first + LAST_AT).store(last, Ordering::Relaxed);
        // While the old head still leads to the entry, a next server takes it for free whatever its flag says.
        self.byte(first).store(1, Ordering::Release);
        self.set_heads(self.free_head, self.free_head);
        head
    }

    /// The chain that entry `head` names is answered, and not published yet.
    pub(in crate::vhost_user) fn done(&mut self, head: u16) {
        if head < self.size && self.batch.len() < usize::from(self.size) {
            self.batch.push(head);
        }
    }

    /// What is answered will be published next; the ring's next used descriptor goes to `used` then.
    pub(in crate::vhost_user) fn publishing(&mut self, used: Position) {
        let (old_head, old_used) = (self.heads().1, self.used().1);
        for i in 0..self.batch.len() {
            let head = self.batch[i];
            self.link(self.last[usize::from(head)], self.free_head);
            self.free_head = head;
        }
        self.set_heads(self.free_head, old_head);
        self.set_used(used, old_used);
    }

    /// It is published.
    pub(in crate::vhost_user) fn published(&mut self, used: Position) {
        while let Some(head) = self.batch.pop() {
            self.byte(self.entry(head)).store(0, Ordering::Release);
        }
        self.set_heads(self.free_head, self.free_head);
        self.set_used(used, used);
    }
}

#[cfg(test)]
mod tests;
