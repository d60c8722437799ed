//! Merging of neighbours in a batch.

use super::{NONE, Queue, job::Held, job::Job, job::Phase, op_pieces};
use crate::{FileKind, IoOp, sys::IOV_MAX};

/// Bytes of a merged operation at most: what fits well into one request of a device. More would
/// trade parallelism for nothing.
const MERGE_BYTES_MAX: u64 = 1 << 20;

/// The bit of a class that says that direct I/O does not take the operation as it is.
const MISALIGNED: u32 = 1;

/// How operations are sorted: neighbours of one kind on one file come together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// File, then read or write, then whether it fits the file's alignment.
    class: u32,
    offset: u64,
    /// Position in the batch: equal offsets keep their order.
    position: u32,
    slot: u32,
}

impl Queue {
    /// Makes jobs of the staged operations.
    pub(super) fn group(&mut self) {
        let mut staged = std::mem::take(&mut self.staged);
        let mut sort = std::mem::take(&mut self.sort);
        for (position, slot) in staged.drain(..).enumerate() {
            if let Some(class) = self.admit(slot) {
                sort.push(Key {
                    class,
                    offset: self.slots[slot as usize].io.offset,
                    position: position as u32,
                    slot,
                });
            }
        }
        if sort.len() > 1 {
            sort.sort_unstable();
        }
        let mut at = 0;
        while at < sort.len() {
            let first = &self.slots[sort[at].slot as usize].io;
            let (mut end, mut bytes) = (first.offset + first.len, first.len);
            let mut pieces = first.iov_len as usize;
            let mut next = at + 1;
            while let Some(key) = sort.get(next) {
                let io = &self.slots[key.slot as usize].io;
                let fits = key.class == sort[at].class
                    && io.offset == end
                    && bytes + io.len <= MERGE_BYTES_MAX
                    && pieces + io.iov_len as usize <= IOV_MAX;
                if !fits {
                    break;
                }
                (end, bytes) = (end + io.len, bytes + io.len);
                pieces += io.iov_len as usize;
                next += 1;
            }
            let bounce = sort[at].class & MISALIGNED != 0;
            self.create(sort[at..next].iter().map(|k| k.slot), bounce);
            at = next;
        }
        sort.clear();
        (self.staged, self.sort) = (staged, sort);
    }

    /// Checks an operation. Reads and writes get a class to be sorted by; what needs
    /// no kernel ends here; everything else becomes a job of its own.
    fn admit(&mut self, slot: u32) -> Option<u32> {
        let io = self.slots[slot as usize].io;
        let entry = self.file(io.file.0);
        let file = &entry.file;
        let writes = !matches!(io.op, IoOp::Read | IoOp::Sync);
        let errno = if writes && file.read_only() {
            Some(libc::EROFS)
        } else if io.op == IoOp::Sync {
            if file.cache().ignores_flush() {
                Some(0)
            } else {
                file.sync_failure()
            }
        } else {
            match io.offset.checked_add(io.len) {
                Some(end) if end <= i64::MAX as u64 => (io.len == 0).then_some(0),
                _ => Some(libc::EFBIG),
            }
        };
        let class = match io.op {
            IoOp::Read | IoOp::Write => {
                let fits = entry.align == 1 || fits(entry.align, entry.memory, &io);
                Some(
                    u32::from(io.file.0) << 2
                        | u32::from(io.op == IoOp::Write) << 1
                        | if fits { 0 } else { MISALIGNED },
                )
            }
            _ => None,
        };
        if io.op == IoOp::Sync {
            self.counters.syncs += 1;
        }
        if let Some(errno) = errno {
            self.finish_slot(slot, errno, io.op == IoOp::Allocate);
            return None;
        }
        if class.is_none() {
            self.create(std::iter::once(slot), false);
        }
        class
    }

    /// Makes a job of these operations (one at least), which are neighbours in this order, and starts
    /// it. `bounce`: reads and writes go through bounce memory.
    pub(super) fn create(&mut self, slots: impl Iterator<Item = u32>, bounce: bool) {
        // There are as many jobs as slots, and each job has a slot at least.
        let index = self.free_jobs.pop().expect("a job for each slot");
        let (mut first, mut last, mut len, mut count) = (NONE, NONE, 0, 0);
        for slot in slots {
            match last {
                NONE => first = slot,
                last => self.slots[last as usize].next = slot,
            }
            self.slots[slot as usize].next = NONE;
            len += self.slots[slot as usize].io.len;
            last = slot;
            count += 1;
        }
        let io = self.slots[first as usize].io;
        let entry = self.file(io.file.0);
        let simulated = entry.file.kind() == FileKind::Simulated;
        let data = matches!(io.op, IoOp::Read | IoOp::Write);
        if bounce {
            self.counters.bounced += u64::from(count);
        }
        self.jobs[index as usize] = Job {
            file: io.file.0,
            op: io.op,
            offset: io.offset,
            len,
            done: 0,
            first,
            count,
            bounce,
            phase: Phase::Whole,
            held: Held::None,
            chunk: NONE,
            range_step: !data && io.op != IoOp::Sync && !simulated,
            ..Job::default()
        };
        let long = io.iov_len as usize > IOV_MAX;
        if data && !bounce && (count > 1 || long) {
            self.rebuild_iov(index);
        }
        self.start(index);
    }
}

/// Whether direct I/O takes the operation as it is.
fn fits(align: u64, memory: usize, io: &crate::Io) -> bool {
    (io.offset | io.len) & (align - 1) == 0
        && op_pieces(io).iter().all(|v| {
            v.len() == 0
                || (v.base() as usize & (memory - 1) == 0 && v.len() as u64 & (align - 1) == 0)
        })
}
