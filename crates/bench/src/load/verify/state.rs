//! What a load knows of the disk, in a file: so that a later one, after a restart of the server, knows what must be there.
//!
//! ```text
//!    0  "dpstate\0"
//!    8  version      2, u32
//!   12  open         1: a load uses it, or was killed while it did, u32
//!   16  run          what the sectors carry, u64
//!   24  block        bytes, u64
//!   32  stride       bytes, u64
//!   40  start        bytes, u64
//!   48  count        of blocks, u64
//!   56  checksum     CRC32C of all but this and what follows until 64, u32; while open: anything
//!   60  durable      while open: the number of the last flush that ended well, u32
//!   64  for each block, u32 each:
//!         sure       the lowest generation that may be there after a crash
//!         acked      while open: flushes that had begun when the last write ended, which a later one covers
//!         low        the lowest generation that may be there
//!         high       the highest one, of writes that have begun
//! ```
//!
//! All numbers are little-endian. The file is mapped, and each change goes there before a write does to the server, and when one has ended:
//! whoever is killed, and whenever, the file says what may be on the disk. (A crash of the machine that the load runs on is another
//! thing: nothing is synced before the end.) Fields of a block are stored in the order above, so that any prefix of a
//! change claims nothing that is not so. Where a load goes on with the file of one that was killed, `acked` is the last of them: it
//! begins anew, and the old `durable` is beyond it.

use super::{
    ledger::{BLOCKS_MAX, Block},
    mapped::Mapped,
};
use crate::load::Spec;
use block::{Context, Error, Result};
use crc32c::{crc32c, crc32c_append};
use rustix::{
    fs::{CWD, FallocateFlags, FlockOperation, RenameFlags, fallocate, flock, renameat_with},
    io::Errno,
};
use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

const MAGIC: &[u8; 8] = b"dpstate\0";
const VERSION: u32 = 2;
const HEAD: usize = 64;
const OPEN: usize = 12;
const CHECKSUM: usize = 56;
const DURABLE: usize = 60;
/// Bytes of a block.
const ENTRY: usize = 16;

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub run: u64,
    /// The load that used it was killed, or failed.
    pub interrupted: bool,
    /// Lowest and highest generation of each block.
    pub generations: Vec<(u32, u32)>,
}

/// A file of states. While it lives no other load can use the file.
#[derive(Debug)]
pub(super) struct State {
    path: PathBuf,
    places: [u64; 3],
    /// There when the file was.
    file: Option<File>,
}

fn lock(file: &File, path: &Path) -> Result<()> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(Error::invalid(format!(
            "{}: another load uses it: give another --state",
            path.display()
        ))),
        Err(e) => Err(Error::os("flock", e.into()).within(path.display())),
    }
}

impl State {
    /// That of a load, and what it knows; `None` where there is none yet.
    ///
    /// # Errors
    ///
    /// It is of another load, damaged, no such file, or another load uses it.
    pub(super) fn open(path: &Path, spec: &Spec) -> Result<(Self, Option<Known>)> {
        let stride = spec.stride_bytes.unwrap_or(spec.block_bytes);
        let mut state = Self {
            path: path.to_owned(),
            places: [spec.block_bytes, stride, spec.start_bytes],
            file: None,
        };
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((state, None)),
            Err(error) => return Err(error).context(|| path.display().to_string()),
        };
        lock(&file, path)?;
        let known = state.read(&file)?;
        state.file = Some(file);
        Ok((state, Some(known)))
    }

    fn read(&self, mut file: &File) -> Result<Known> {
        let named = || self.path.display().to_string();
        let wrong = |what: &str| Err(Error::invalid(format!("{}: {what}", named())));
        let mut bytes = Vec::new();
        let limit = HEAD as u64 + BLOCKS_MAX * ENTRY as u64 + 1;
        Read::by_ref(&mut file)
            .take(limit)
            .read_to_end(&mut bytes)
            .context(named)?;
        if !bytes.starts_with(MAGIC) || bytes.len() < HEAD {
            return wrong("it is no state of bench load --verify: give another --state");
        }
        let long = |at: usize| {
            let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        let word = |at: usize| long(at & !7) >> (8 * (at & 7)) & u64::from(u32::MAX);
        if word(8) != u64::from(VERSION) {
            return wrong(&format!(
                "version {} at offset 8 is not known: give another --state",
                word(8)
            ));
        }
        let interrupted = word(OPEN) != 0;
        let count = long(48);
        if count > BLOCKS_MAX || bytes.len() as u64 != HEAD as u64 + count * ENTRY as u64 {
            return wrong(&format!(
                "{count} blocks at offset 48 do not fit its {} bytes",
                bytes.len()
            ));
        }
        if !interrupted && u64::from(checksum(&bytes)) != word(CHECKSUM) {
            return wrong("the checksum at offset 56 does not fit: it is damaged");
        }
        if [long(24), long(32), long(40)] != self.places {
            return wrong(&format!(
                "it is of --bs {} --stride {} --start {}: give the same",
                long(24),
                long(32),
                long(40)
            ));
        }
        let durable = word(DURABLE);
        let mut generations = Vec::with_capacity(count as usize);
        for (n, entry) in bytes[HEAD..].chunks_exact(ENTRY).enumerate() {
            let of = |at: usize| {
                let bytes = entry[at..].first_chunk();
                bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
            };
            let (sure, acked, low, high) = (of(0), of(4), of(8), of(12));
            if sure > low || low > high {
                return wrong(&format!(
                    "block {n} at offset {}: {sure}, {low} and {high} are not in order: it is damaged",
                    HEAD + n * ENTRY
                ));
            }
            let flushed = !interrupted || u64::from(acked) < durable;
            generations.push((if flushed { low } else { sure }, high));
        }
        Ok(Known {
            run: long(16),
            interrupted,
            generations,
        })
    }

    /// Begins to keep what a load does to `blocks`, which are those of the file if there was one.
    ///
    /// # Errors
    ///
    /// The file cannot be made or mapped.
    pub(super) fn keep(&mut self, run: u64, blocks: &[Block]) -> Result<Journal> {
        let named = || self.path.display().to_string();
        let len = HEAD + blocks.len() * ENTRY;
        let file = match &self.file {
            Some(file) => file.try_clone().context(named)?,
            None => self.create(run, blocks.len()).context(named)?,
        };
        // Room for all of it: a mapping has no other way to say that there is none.
        match fallocate(&file, FallocateFlags::empty(), 0, len as u64) {
            // NFSv3 and some of FUSE cannot promise it; all bytes were written before.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(Error::os("fallocate", e.into()).within(named())),
        }
        let map = Mapped::new(&file, len).context(named)?;
        let journal = Journal {
            file,
            map,
            count: blocks.len(),
        };
        // What is read of a file whose load was killed now is what was read before, or what these blocks say: the same.
        for (n, block) in blocks.iter().enumerate() {
            journal.begin(n, block);
        }
        journal.durable(0);
        journal.map.store(OPEN, 1);
        Ok(journal)
    }

    /// A new file, whole under its name from the beginning.
    fn create(&self, run: u64, count: usize) -> std::io::Result<File> {
        let mut bytes = Vec::with_capacity(HEAD + count * ENTRY);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(run.to_le_bytes());
        for number in self.places {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend((count as u64).to_le_bytes());
        bytes.resize(HEAD + count * ENTRY, 0);
        let mut name = self.path.as_os_str().to_owned();
        name.push(".new");
        let new = PathBuf::from(name);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&new)?;
        // Another load may be about to give it its name.
        lock(&file, &new).map_err(std::io::Error::other)?;
        if !is_ours(&file)? {
            return Err(std::io::Error::other(format!(
                "{} is no state of bench load --verify, and would be overwritten: move it away",
                new.display()
            )));
        }
        file.set_len(0)?;
        file.write_all(&bytes)?;
        self.name(&new).inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })?;
        Ok(file)
    }

    /// Gives a new file its name, unless another load was faster.
    fn name(&self, new: &Path) -> std::io::Result<()> {
        let named = match renameat_with(CWD, new, CWD, &self.path, RenameFlags::NOREPLACE) {
            // The file system cannot rename so: a second name cannot replace anything either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                fs::hard_link(new, &self.path).and_then(|()| fs::remove_file(new))
            }
            named => named.map_err(std::io::Error::from),
        };
        named.map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => {
                std::io::Error::other("another load has made it meanwhile: give another --state")
            }
            _ => error,
        })
    }
}

/// Whether a file is one that a load has begun to make: it is empty, or begins as a state does.
fn is_ours(file: &File) -> std::io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    let mut magic = [0; MAGIC.len()];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == *MAGIC),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// A state that a load is at.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    map: Mapped,
    count: usize,
}

impl Journal {
    /// Block `n` is so from now on.
    pub(super) fn set(&self, n: usize, block: &Block) {
        let at = HEAD + n * ENTRY;
        for (i, word) in [block.sure, block.acked, block.low, block.high]
            .into_iter()
            .enumerate()
        {
            self.map.store(at + 4 * i, word);
        }
    }

    /// A load begins with block `n` so, whatever a load that was killed had stored there.
    fn begin(&self, n: usize, block: &Block) {
        let at = HEAD + n * ENTRY;
        // Its `durable` stands still, and would make all of its `low` sure were `acked` to come before that is replaced.
        for (offset, word) in [
            (0, block.sure),
            (8, block.low),
            (12, block.high),
            (4, block.acked),
        ] {
            self.map.store(at + offset, word);
        }
    }

    /// The flush of that number has ended well.
    pub(super) fn durable(&self, number: u32) {
        self.map.store(DURABLE, number);
    }

    /// The load has come to its end, and all that it wrote is durable.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(super) fn close(&self) -> Result<()> {
        for n in 0..self.count {
            let at = HEAD + n * ENTRY;
            // All flushed: the lowest that may be there is what a crash leaves.
            self.map.store(at, self.map.load(at + 8));
            self.map.store(at + 4, 0);
        }
        self.durable(0);
        // While it is open nobody looks at the checksum: who is killed here leaves one that is open, or one that fits.
        let sum = self.map.with_bytes(checksum_closed);
        self.map.store(CHECKSUM, sum);
        self.map.store(OPEN, 0);
        self.file.sync_all().context(|| "the --state")
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    crc32c_append(crc32c(&bytes[..CHECKSUM]), &bytes[HEAD..])
}

/// The checksum that a file will have when no load is at it any more.
fn checksum_closed(bytes: &[u8]) -> u32 {
    let mut head = [0; CHECKSUM];
    head.copy_from_slice(&bytes[..CHECKSUM]);
    head[OPEN..OPEN + 4].fill(0);
    crc32c_append(crc32c(&head), &bytes[HEAD..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Target;

    fn block(sure: u32, acked: u32, low: u32, high: u32) -> Block {
        Block {
            sure,
            acked,
            low,
            high,
            ..Block::default()
        }
    }

    #[test]
    fn a_state_is_read_back_and_what_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let spec = Spec::new(Target::VhostUser("s".into()));
        let open = || State::open(&path, &spec);
        let (mut state, known) = open().unwrap();
        assert_eq!(known, None);
        let blocks = [block(0, 0, 0, 0), block(1, 3, 1, 1), block(2, 4, 5, 7)];
        let journal = state.keep(5, &blocks).unwrap();
        let error = open().unwrap_err().to_string();
        assert!(error.contains("another load uses it"), "{error}");
        journal.close().unwrap();
        drop((state, journal));
        let known = Known {
            run: 5,
            interrupted: false,
            generations: vec![(0, 0), (1, 1), (5, 7)],
        };
        assert_eq!(open().unwrap().1, Some(known.clone()));
        let good = fs::read(&path).unwrap();
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            fs::write(&path, bytes).unwrap();
            open().unwrap_err().to_string()
        };
        assert!(refused(&|b| b[0] = 0).contains("no state"));
        assert!(refused(&|b| b.truncate(40)).contains("no state"));
        assert!(refused(&|b| b[8] = 9).contains("version 9"));
        assert!(refused(&|b| b[48] = 9).contains("9 blocks at offset 48"));
        assert!(refused(&|b| b[55] = 9).contains("at offset 48"));
        assert!(refused(&|b| b.truncate(80)).contains("at offset 48"));
        assert!(refused(&|b| b[70] ^= 1).contains("checksum"));
        // Of one that is open nothing but its order can be judged.
        let order = refused(&|b| {
            b[12] = 1;
            b[64 + 8] = 1;
        });
        assert!(
            order.contains("block 0 at offset 64: 0, 1 and 0"),
            "{order}"
        );
        fs::write(&path, &good).unwrap();
        let other = Spec {
            block_bytes: 8192,
            ..spec.clone()
        };
        let error = State::open(&path, &other).unwrap_err().to_string();
        assert!(error.contains("--bs 4096"), "{error}");
        // Nothing of that has changed it.
        assert_eq!(open().unwrap().1, Some(known));
    }

    /// A load that is killed after each of its stores leaves what may be there then.
    #[test]
    fn a_killed_load_leaves_what_may_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let spec = Spec::new(Target::VhostUser("s".into()));
        let found = || {
            // As another process finds it, which no lock keeps away from a dead one's.
            let copy = dir.path().join("copy");
            fs::copy(&path, &copy).unwrap();
            let known = State::open(&copy, &spec).unwrap().1.unwrap();
            assert!(known.interrupted);
            known.generations[0]
        };
        let (mut state, _) = State::open(&path, &spec).unwrap();
        let journal = state.keep(5, &[Block::default()]).unwrap();
        assert_eq!(found(), (0, 0));
        for (step, durable, expected) in [
            // A write begins; it ends; the flush that began before it ends; the next one does.
            (block(0, 0, 0, 1), 0, (0, 1)),
            (block(0, 1, 1, 1), 0, (0, 1)),
            (block(0, 1, 1, 1), 1, (0, 1)),
            (block(0, 1, 1, 1), 2, (1, 1)),
            // The second begins, when the first is sure; it ends.
            (block(1, 1, 1, 2), 2, (1, 2)),
            (block(1, 2, 2, 2), 2, (1, 2)),
            // A read has seen it: no later one may see less, but after a crash.
            (block(1, 2, 2, 3), 2, (1, 3)),
        ] {
            journal.durable(durable);
            journal.set(0, &step);
            assert_eq!(found(), expected, "{step:?} {durable}");
        }
        // It goes on: what may be there is what was read, and the flushes are counted anew.
        drop((state, journal));
        let (mut state, known) = State::open(&path, &spec).unwrap();
        let (low, high) = known.unwrap().generations[0];
        let journal = state.keep(5, &[block(low, 0, low, high)]).unwrap();
        assert_eq!(found(), (1, 3));
        journal.durable(1);
        assert_eq!(found(), (1, 3));
        journal.close().unwrap();
        let known = State::open(&path, &spec);
        assert!(known.is_err(), "still in use");
        drop((state, journal));
        let known = State::open(&path, &spec).unwrap().1.unwrap();
        assert_eq!(
            (known.interrupted, known.generations),
            (false, vec![(1, 3)])
        );
    }

    /// What is read after each store that `change` makes to the file of `journal`, in order; its first block.
    fn after_each(
        (path, spec): (&Path, &Spec),
        before: &[u8],
        journal: &Journal,
    ) -> Vec<(bool, (u32, u32))> {
        let mut bytes = before.to_vec();
        let stores = journal.map.stores();
        let found = stores.into_iter().map(|(at, word)| {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            fs::write(path, &bytes).unwrap();
            let known = State::open(path, spec).unwrap().1.unwrap();
            (known.interrupted, known.generations[0])
        });
        found.collect()
    }

    #[test]
    fn who_is_killed_at_the_end_or_the_beginning_leaves_a_state() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("state"), dir.path().join("copy"));
        let spec = Spec::new(Target::VhostUser("s".into()));
        let (mut state, _) = State::open(&path, &spec).unwrap();
        let journal = state.keep(5, &[Block::default()]).unwrap();
        // The third flush has not covered the first write.
        journal.set(0, &block(0, 3, 1, 2));
        journal.durable(3);
        drop((state, journal));
        let killed = fs::read(&path).unwrap();
        let (mut state, known) = State::open(&path, &spec).unwrap();
        assert_eq!(known.unwrap().generations[0], (0, 2));
        let journal = state.keep(5, &[block(0, 0, 0, 2)]).unwrap();
        let found = after_each((&copy, &spec), &killed, &journal);
        assert!(
            found.iter().all(|found| *found == (true, (0, 2))),
            "{found:?}"
        );
        drop((state, journal));
        // All of it is written and flushed now.
        let (mut state, _) = State::open(&path, &spec).unwrap();
        let journal = state.keep(5, &[block(0, 1, 2, 2)]).unwrap();
        let open = fs::read(&path).unwrap();
        journal.map.forget_stores();
        journal.close().unwrap();
        let found = after_each((&copy, &spec), &open, &journal);
        assert_eq!(found.last(), Some(&(false, (2, 2))));
        assert_eq!(fs::read(&copy).unwrap(), fs::read(&path).unwrap());
    }

    #[test]
    fn a_new_state_takes_no_other_files_place() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("state"), dir.path().join("state.new"));
        let spec = Spec::new(Target::VhostUser("s".into()));
        let fresh = || State::open(&path, &spec).unwrap().0;
        let (mut first, mut second) = (fresh(), fresh());
        for theirs in ["thesis", "a much longer thesis"] {
            fs::write(&new, theirs).unwrap();
            let error = first.keep(5, &[Block::default()]).unwrap_err().to_string();
            assert!(error.contains("move it away"), "{error}");
            assert_eq!(fs::read_to_string(&new).unwrap(), theirs);
        }
        // What a load that was killed has left is used.
        fs::write(&new, [&MAGIC[..], &[7; 500]].concat()).unwrap();
        let journal = first.keep(5, &[Block::default()]).unwrap();
        let made = fs::read(&path).unwrap();
        drop(journal);
        let error = second.keep(6, &[Block::default()]).unwrap_err().to_string();
        assert!(error.contains("another load has made it"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), made);
        assert!(!new.exists());
    }
}
