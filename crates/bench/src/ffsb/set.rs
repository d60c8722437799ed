//! The files that are there before a load begins.

use super::{GRAIN, KIB, Scenario, Spec};
use crate::{
    load::Random,
    machine::process::{self, Folder},
};
use block::{Context, Error, ErrorKind, Result};
use io::memory::AlignedBuf;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// The same mails for every load.
const MAIL_SEED: u64 = 1;
/// Bytes of a write when files are made.
const PIECE: u64 = 1 << 20;

/// A file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub id: u64,
    pub bytes: u64,
}

/// What a set is made of: who finds the same may use it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    mail: bool,
    files: usize,
    file_bytes: u64,
    directories: usize,
    sparse: bool,
    seed: u64,
}

/// The files of a load, by directory.
#[derive(Debug)]
pub(super) struct Set {
    root: PathBuf,
    mail: bool,
    directories: Vec<Mutex<Vec<Entry>>>,
    next: AtomicU64,
    direct: bool,
}

impl Set {
    /// Finds the set of a load, or makes it.
    ///
    /// # Errors
    ///
    /// What the file system said, with the file; it is too small.
    pub(super) fn ready(spec: &Spec) -> Result<Self> {
        if !spec.dir.is_dir() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "{}: there is no such folder: make it, or mount there what is to be loaded",
                    spec.dir.display()
                ),
            ));
        }
        let root = spec.dir.join("ffsb");
        // What loads left before there was a mark has a note.
        if !root.join("set.json").is_file() {
            process::is_left_over(&root)?;
        }
        fs::create_dir_all(&root).context(|| root.display().to_string())?;
        process::mark(&root)?;
        let mail = spec.scenario == Scenario::MailServer;
        let mut set = Self {
            root,
            mail,
            directories: Vec::new(),
            next: AtomicU64::new(spec.files as u64),
            direct: spec.direct,
        };
        set.sweep()?;
        if spec.scenario.creates() {
            return Ok(set);
        }
        let made = Made {
            mail,
            files: spec.files,
            file_bytes: spec.file_bytes,
            directories: if mail { spec.directories } else { 1 },
            sparse: spec.sparse,
            seed: if mail { MAIL_SEED } else { 0 },
        };
        let note = set.root.join("set.json");
        // A mail server leaves another set than it found.
        let has = fs::read_to_string(&note).ok();
        let has: Option<Made> = has.and_then(|text| serde_json::from_str(&text).ok());
        let keeps = has == Some(made) && (!mail || spec.pristine);
        let mut random = Random::new(made.seed);
        let sizes: Vec<u64> = (0..spec.files)
            .map(|_| match mail {
                true => mail_bytes(spec.file_bytes, spec.direct, random.part()),
                false => spec.file_bytes,
            })
            .collect();
        if !keeps {
            set.make(&sizes, made)?;
            let text = serde_json::to_string(&made).unwrap_or_default();
            fs::write(&note, text).context(|| note.display().to_string())?;
        }
        let mut directories = vec![Vec::new(); made.directories];
        for (id, bytes) in (0..).zip(sizes) {
            directories[place(id, made.directories)].push(Entry { id, bytes });
        }
        set.directories = directories.into_iter().map(Mutex::new).collect();
        Ok(set)
    }

    /// Removes what threads of an earlier load created that was killed: there is room for the set before that is made.
    fn sweep(&self) -> Result<()> {
        let new = self.root.join("new");
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            done => done.context(|| new.display().to_string()),
        }
    }

    /// Where threads create files, which goes with them, also on ^C.
    pub(super) fn new_files(&self) -> Result<Folder> {
        Folder::create(self.root.join("new"))
    }

    fn make(&self, sizes: &[u64], made: Made) -> Result<()> {
        let Made {
            directories,
            sparse,
            ..
        } = made;
        let kind = self.root.join(self.kind());
        let _ = fs::remove_file(self.root.join("set.json"));
        for old in ["data", "mail"] {
            let old = self.root.join(old);
            if old.exists() {
                fs::remove_dir_all(&old).context(|| old.display().to_string())?;
            }
        }
        let total = sizes
            .iter()
            .fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
        let stat = rustix::fs::statvfs(&self.root).map_err(std::io::Error::from);
        let stat = stat.context(|| self.root.display().to_string())?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if total > free && !sparse {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{}: {} files of {} bytes together do not fit into its {free} free bytes: give fewer or smaller ones",
                    self.root.display(),
                    sizes.len(),
                    total
                ),
            ));
        }
        for n in 0..directories {
            let path = match self.mail {
                true => kind.join(format!("{n:02}")),
                false => kind.clone(),
            };
            fs::create_dir_all(&path).context(|| path.display().to_string())?;
        }
        let mut data = AlignedBuf::new(PIECE as usize, GRAIN as usize);
        Random::new(7).fill(&mut data);
        for (id, bytes) in (0..).zip(sizes) {
            let path = self.path(id, place(id, directories));
            let named = || path.display().to_string();
            // What ends within a block goes through the page cache.
            let direct = self.direct && bytes.is_multiple_of(GRAIN);
            let file = open(&path, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC, direct)?;
            if sparse {
                file.set_len(*bytes).context(named)?;
                continue;
            }
            let mut at = 0;
            while at < *bytes {
                let piece = (*bytes - at).min(PIECE);
                file.write_all_at(&data[..piece as usize], at)
                    .context(named)?;
                at += piece;
            }
        }
        let root = File::open(&self.root).context(|| self.root.display().to_string())?;
        rustix::fs::syncfs(root)
            .map_err(std::io::Error::from)
            .context(|| self.root.display().to_string())
    }

    fn kind(&self) -> &'static str {
        if self.mail { "mail" } else { "data" }
    }

    /// Where a file of a directory lies.
    pub(super) fn path(&self, id: u64, directory: usize) -> PathBuf {
        let kind = self.root.join(self.kind());
        match self.mail {
            true => kind.join(format!("{directory:02}/{id}")),
            false => kind.join(format!("f{id}")),
        }
    }

    /// Where the `n`-th file that a thread creates lies.
    pub(super) fn created(&self, thread: usize, n: u64) -> PathBuf {
        self.root.join(format!("new/{thread}-{n}"))
    }

    /// Directories of the set.
    pub(super) fn directories(&self) -> usize {
        self.directories.len()
    }

    /// The files of a directory.
    pub(super) fn directory(&self, n: usize) -> MutexGuard<'_, Vec<Entry>> {
        self.directories[n]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that no file had.
    pub(super) fn new_id(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

fn place(id: u64, directories: usize) -> usize {
    usize::try_from(id % directories.max(1) as u64).unwrap_or(0)
}

/// The size of a mail: from 1 KiB to `most`, as many between 1 and 2 KiB as between 512 KiB and 1 MiB; `part` is from 0 to 1.
pub(super) fn mail_bytes(most: u64, direct: bool, part: f64) -> u64 {
    let octaves = (most as f64 / KIB as f64).max(1.0).log2();
    let bytes = (KIB as f64 * (octaves * part).exp2()) as u64;
    let bytes = bytes.clamp(KIB, most);
    match direct {
        true => bytes.next_multiple_of(GRAIN).min(most / GRAIN * GRAIN),
        false => bytes,
    }
}

/// Opens a file of a load.
pub(super) fn open(path: &Path, flags: OFlags, direct: bool) -> Result<File> {
    let own = if direct {
        OFlags::DIRECT
    } else {
        OFlags::empty()
    };
    let flags = flags | own | OFlags::CLOEXEC;
    fs::OpenOptions::new()
        .read(true)
        .write(flags.contains(OFlags::RDWR))
        .create(flags.contains(OFlags::CREATE))
        .truncate(flags.contains(OFlags::TRUNC))
        .custom_flags((flags & OFlags::DIRECT).bits().cast_signed())
        .open(path)
        .context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mails_have_the_sizes_of_the_study() {
        for (direct, part, expected) in [
            (false, 0.0, 1024),
            (false, 0.5, 32 * 1024),
            (false, 1.0, 1 << 20),
            (true, 0.0, 4096),
            (true, 0.55, 49152),
            (true, 1.0, 1 << 20),
        ] {
            assert_eq!(mail_bytes(1 << 20, direct, part), expected, "{part}");
        }
    }
}
