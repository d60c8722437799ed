//! What a thread does: a share of work after the other, until it is told to stop.

use super::{
    Counts, GRAIN, Scenario, Spec,
    set::{Entry, Set, mail_bytes, open},
};
use crate::load::{Latencies, Random, Timeline};
use block::{Context, Error, Result};
use io::memory::AlignedBuf;
use rustix::fs::OFlags;
use std::{
    collections::VecDeque,
    fs::{self, File},
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU8, AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Bytes of a file that a thread touches at random before it closes it (FFSB's `read_size` and `write_size`).
const SHARE: u64 = 5 << 20;
/// Percent of the blocks that are read, where both are done.
const READS: u64 = 70;

/// Nothing counts yet.
pub(super) const RAMP: u8 = 0;
/// What ends counts.
pub(super) const MEASURE: u8 = 1;
/// Threads end.
pub(super) const STOP: u8 = 2;

/// What all threads share.
#[derive(Debug)]
pub(super) struct Shared<'a> {
    pub spec: &'a Spec,
    pub set: Set,
    pub phase: AtomicU8,
    /// Blocks that may still be counted.
    pub left: AtomicU64,
    /// Bytes that created files take.
    pub space: AtomicU64,
}

/// What a thread did while it counted.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub reads: u64,
    pub writes: u64,
    pub bytes: u64,
    pub counts: Counts,
    pub read_latency: Latencies,
    pub write_latency: Latencies,
    pub fsync_latency: Latencies,
    pub timeline: Timeline,
    began: Option<Instant>,
    /// When the last that counts ended.
    pub last: Option<Instant>,
}

/// A thread of a load.
pub(super) struct Worker<'a> {
    shared: &'a Shared<'a>,
    thread: usize,
    random: Random,
    data: AlignedBuf,
    pub tally: Tally,
    created: VecDeque<(u64, u64)>,
    next: u64,
}

impl<'a> Worker<'a> {
    pub(super) fn new(shared: &'a Shared<'a>, thread: usize) -> Self {
        let spec = shared.spec;
        let mut random =
            Random::new(spec.seed ^ (thread as u64 + 1).wrapping_mul(0xa076_1d64_78bd_642f));
        let mut data = AlignedBuf::new(spec.block_bytes as usize, GRAIN as usize);
        random.fill(&mut data);
        Self {
            shared,
            thread,
            random,
            data,
            tally: Tally::default(),
            created: VecDeque::new(),
            next: 0,
        }
    }

    /// Works until the phase says that it ends.
    pub(super) fn run(&mut self) -> Result<()> {
        while !self.stops() {
            match self.shared.spec.scenario {
                Scenario::LargeCreates256k | Scenario::LargeCreates8k => self.create()?,
                Scenario::SequentialReads256k | Scenario::SequentialReads8k => {
                    let (file, entry) = self.data_file(false)?;
                    self.whole(&file, entry.bytes)?;
                }
                Scenario::RandomReads => self.at_random(100)?,
                Scenario::RandomWrites => self.at_random(0)?,
                Scenario::Mixed => self.at_random(READS)?,
                Scenario::MailServer => self.mail()?,
            }
        }
        Ok(())
    }

    fn stops(&self) -> bool {
        self.shared.phase.load(Ordering::Relaxed) == STOP
            || self.shared.left.load(Ordering::Relaxed) == 0
    }

    fn counts(&mut self) -> bool {
        let counts = self.shared.phase.load(Ordering::Relaxed) == MEASURE;
        if counts && self.tally.began.is_none() {
            self.tally.began = Some(Instant::now());
        }
        counts
    }

    /// Does something to a file system, in how long, and whether that counts: what was at work when the time was over does, so that no
    /// end of a load hides a file system that stalls.
    fn timed(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<(Duration, bool)> {
        let counted = self.counts();
        let began = Instant::now();
        work(self)?;
        let ended = Instant::now();
        let counts = counted || self.counts();
        if counts {
            self.tally.last = Some(ended);
        }
        Ok((ended - began, counts))
    }

    /// Counts something done to a file.
    fn count(&mut self, which: fn(&mut Counts) -> &mut u64) {
        if self.counts() {
            *which(&mut self.tally.counts) += 1;
        }
    }

    /// Reads or writes a block.
    fn block(&mut self, file: &File, at: u64, bytes: u64, read: bool) -> Result<()> {
        let piece = usize::try_from(bytes).unwrap_or(0).min(self.data.len());
        let (took, counts) = self.timed(|own| {
            let done = match read {
                true => file.read_exact_at(&mut own.data[..piece], at),
                false => file.write_all_at(&own.data[..piece], at),
            };
            done.context(|| format!("{} at offset {at}", if read { "read" } else { "write" }))
        })?;
        if !counts {
            return Ok(());
        }
        // The last one is counted once by one thread.
        let left = &self.shared.left;
        let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        if taken.is_err() {
            return Ok(());
        }
        let (count, latency) = match read {
            true => (&mut self.tally.reads, &mut self.tally.read_latency),
            false => (&mut self.tally.writes, &mut self.tally.write_latency),
        };
        *count += 1;
        latency.add(took);
        self.tally.bytes += bytes;
        if let Some(since) = self.tally.began {
            self.tally.timeline.add(since.elapsed(), took);
        }
        Ok(())
    }

    /// Makes durable what was written, where that is asked for.
    fn sync(&mut self, file: &File) -> Result<()> {
        if !self.shared.spec.fsync {
            return Ok(());
        }
        let (took, counts) = self.timed(|_| file.sync_all().context(|| "fsync".to_owned()))?;
        if counts {
            self.tally.fsync_latency.add(took);
        }
        Ok(())
    }

    fn open(&mut self, path: &std::path::Path, flags: OFlags, direct: bool) -> Result<File> {
        let file = open(path, flags, direct)?;
        self.count(|counts| &mut counts.opened);
        Ok(file)
    }

    /// One of the set's files.
    fn data_file(&mut self, writes: bool) -> Result<(File, Entry)> {
        let files = self.shared.set.directory(0).len() as u64;
        let n = self.random.below(files) as usize;
        let entry = self.shared.set.directory(0).get(n).copied();
        let entry = entry.ok_or_else(|| Error::invalid("a set without files"))?;
        let flags = if writes { OFlags::RDWR } else { OFlags::RDONLY };
        let path = self.shared.set.path(entry.id, 0);
        Ok((self.open(&path, flags, self.shared.spec.direct)?, entry))
    }

    /// Reads a file in order.
    fn whole(&mut self, file: &File, bytes: u64) -> Result<()> {
        let block = self.shared.spec.block_bytes;
        let mut at = 0;
        while at < bytes && !self.stops() {
            let piece = block.min(bytes - at);
            self.block(file, at, piece, true)?;
            at += piece;
        }
        Ok(())
    }

    /// Touches a file at random, so many percent of the blocks by reading.
    fn at_random(&mut self, reads: u64) -> Result<()> {
        let (file, entry) = self.data_file(reads < 100)?;
        let block = self.shared.spec.block_bytes;
        let blocks = (entry.bytes / block).max(1);
        for _ in 0..(SHARE / block).max(1) {
            if self.stops() {
                break;
            }
            let read = self.random.below(100) < reads;
            let at = self.random.below(blocks) * block;
            self.block(&file, at, block, read)?;
        }
        match reads {
            100 => Ok(()),
            _ => self.sync(&file),
        }
    }

    /// Creates a file and writes it; first deletes old ones of this thread while all take too much.
    fn create(&mut self) -> Result<()> {
        let spec = self.shared.spec;
        let space = &self.shared.space;
        while space.load(Ordering::Relaxed) + spec.file_bytes > spec.space_bytes
            && let Some((n, bytes)) = self.created.pop_front()
        {
            let path = self.shared.set.created(self.thread, n);
            fs::remove_file(&path).context(|| path.display().to_string())?;
            space.fetch_sub(bytes, Ordering::Relaxed);
            self.count(|counts| &mut counts.deleted);
        }
        let n = self.next;
        self.next += 1;
        let path = self.shared.set.created(self.thread, n);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
        let file = self.open(&path, flags, spec.direct)?;
        self.count(|counts| &mut counts.created);
        space.fetch_add(spec.file_bytes, Ordering::Relaxed);
        self.created.push_back((n, spec.file_bytes));
        let mut at = 0;
        while at + spec.block_bytes <= spec.file_bytes && !self.stops() {
            self.block(&file, at, spec.block_bytes, false)
                .context(|| path.display().to_string())?;
            at += spec.block_bytes;
        }
        self.sync(&file)
    }

    /// One thing that a mail server does.
    fn mail(&mut self) -> Result<()> {
        let set = &self.shared.set;
        let directory = self.random.below(set.directories() as u64) as usize;
        match self.random.below(100) {
            0..60 => self.of_mail(directory, true),
            60..76 => self.of_mail(directory, false),
            76..88 => self.new_mail(directory),
            _ => {
                let mut entries = set.directory(directory);
                if entries.is_empty() {
                    return Ok(());
                }
                let n = self.random.below(entries.len() as u64) as usize;
                let entry = entries.swap_remove(n);
                drop(entries);
                let path = set.path(entry.id, directory);
                fs::remove_file(&path).context(|| path.display().to_string())?;
                self.count(|counts| &mut counts.deleted);
                Ok(())
            }
        }
    }

    /// Reads a mail, or writes a block of it.
    fn of_mail(&mut self, directory: usize, reads: bool) -> Result<()> {
        let spec = self.shared.spec;
        let entries = self.shared.set.directory(directory);
        let n = self.random.below(entries.len() as u64) as usize;
        let Some(entry) = entries.get(n).copied() else {
            return Ok(());
        };
        drop(entries);
        let path = self.shared.set.path(entry.id, directory);
        let flags = if reads { OFlags::RDONLY } else { OFlags::RDWR };
        let direct = spec.direct && entry.bytes.is_multiple_of(GRAIN);
        let file = match self.open(&path, flags, direct) {
            // Another thread deleted it.
            Err(error) if error.kind() == block::ErrorKind::NotFound => {
                self.count(|counts| &mut counts.missed);
                return Ok(());
            }
            file => file?,
        };
        if reads {
            return self.whole(&file, entry.bytes);
        }
        let block = spec.block_bytes.min(entry.bytes);
        let at = self.random.below((entry.bytes / block).max(1)) * block;
        self.block(&file, at, block, false)?;
        self.sync(&file)
    }

    /// A new mail.
    fn new_mail(&mut self, directory: usize) -> Result<()> {
        let spec = self.shared.spec;
        let bytes = mail_bytes(spec.file_bytes, spec.direct, self.random.part());
        let id = self.shared.set.new_id();
        let path = self.shared.set.path(id, directory);
        let direct = spec.direct && bytes.is_multiple_of(GRAIN);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
        let file = self.open(&path, flags, direct)?;
        self.count(|counts| &mut counts.created);
        let mut at = 0;
        while at < bytes {
            let piece = spec.block_bytes.min(bytes - at);
            match self.block(&file, at, piece, false) {
                // Deletes make room sooner or later.
                Err(error) if error.kind() == block::ErrorKind::NoSpace => {
                    return fs::remove_file(&path).context(|| path.display().to_string());
                }
                done => done?,
            }
            at += piece;
        }
        self.sync(&file)?;
        self.shared
            .set
            .directory(directory)
            .push(Entry { id, bytes });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, thread};

    /// A load of which the time is over while a thread is at work.
    fn tally(ends: u8) -> Tally {
        let dir = tempfile::tempdir().unwrap();
        let spec = Spec {
            direct: false,
            files: 1,
            ..Spec::new(dir.path().to_owned(), Scenario::RandomReads, 1, 1 << 20)
        };
        let shared = Shared {
            spec: &spec,
            set: Set::ready(&spec).unwrap(),
            phase: AtomicU8::new(MEASURE),
            left: AtomicU64::new(u64::MAX),
            space: AtomicU64::new(0),
        };
        let (say, heard) = mpsc::channel();
        thread::scope(|scope| {
            let shared = &shared;
            let worker = scope.spawn(move || {
                let mut worker = Worker::new(shared, 0);
                let done = worker.timed(|_| {
                    say.send(()).unwrap();
                    thread::sleep(Duration::from_millis(20));
                    Ok(())
                });
                let (took, counts) = done.unwrap();
                assert!(counts && took >= Duration::from_millis(20), "{took:?}");
                // What begins then counts no more.
                assert!(!worker.timed(|_| Ok(())).unwrap().1);
                worker.tally
            });
            heard.recv().unwrap();
            shared.phase.store(ends, Ordering::Relaxed);
            worker.join().unwrap()
        })
    }

    #[test]
    fn what_is_at_work_when_the_time_is_over_counts() {
        assert!(tally(STOP).last.is_some());
    }
}
