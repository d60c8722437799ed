//! A new file that gets its name when it is complete.
//!
//! It is made under another name in the same directory, and renamed in the end. Whatever comes in between, an
//! error, a signal, a full disk, takes it away: nobody ever finds half a file under the name that was asked for.

use crate::create;
use anyhow::{Context as _, Error, Result, anyhow, bail};
use block::ErrorKind;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{fs, process};

/// Bytes of the longest name of a file.
const NAME_BYTES_MAX: usize = 255;

/// Files in the making that are to be gone when the process ends before they are finished.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes away what is in the making, for a process that ends at once: nothing comes to be, and nothing gets its name,
/// while the guard is held.
pub fn abandon() -> MutexGuard<'static, Vec<PathBuf>> {
    let mut paths = unfinished();
    for path in paths.drain(..) {
        // There is nobody left to tell.
        let _ = fs::remove_file(path);
    }
    paths
}

/// Writes a file of text, which replaces one that is there when it is whole.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let part = Partial::new(path);
    fs::write(part.path(), text).with_context(|| path.display().to_string())?;
    part.replace()
}

/// A file in the making. Dropped before [`Partial::finish`], it is removed, unless it is to be kept.
#[derive(Debug)]
pub struct Partial {
    target: PathBuf,
    path: PathBuf,
    /// Files that were made beside it.
    beside: Vec<PathBuf>,
    keep: bool,
}

impl Partial {
    /// A file that shall be called `target`, under a name of this process.
    pub fn new(target: &Path) -> Self {
        let suffix = format!(".{}.part", process::id());
        let name = target.file_name().unwrap_or_default().as_encoded_bytes();
        let most = NAME_BYTES_MAX - 1 - suffix.len();
        let mut hidden = OsString::from(".");
        // What is cut off within a character is shown with a mark in its place.
        let short = name.get(..name.len().min(most)).unwrap_or_default();
        hidden.push(match name.len() <= most {
            true => target.file_name().unwrap_or_default().to_owned(),
            false => String::from_utf8_lossy(short)
                .replace('\u{fffd}', "_")
                .into(),
        });
        hidden.push(suffix);
        let path = target.with_file_name(hidden);
        unfinished().push(path.clone());
        Self {
            target: target.to_owned(),
            path,
            beside: Vec::new(),
            keep: false,
        }
    }

    /// A file that shall be called `target`, under a name that a later call finds again: it stays where it is not
    /// finished.
    pub fn lasting(target: &Path) -> Self {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        Self {
            target: target.to_owned(),
            path: target.with_file_name(name),
            beside: Vec::new(),
            keep: true,
        }
    }

    /// What it is called for now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes `path` away too where the file is not finished, if it does not exist yet.
    pub fn add(&mut self, path: PathBuf) {
        if fs::symlink_metadata(&path).is_err() {
            if !self.keep {
                unfinished().push(path.clone());
            }
            self.beside.push(path);
        }
    }

    /// Has it removed in any case where it is not finished.
    pub fn forget(&mut self) {
        if self.keep {
            self.keep = false;
            let mut paths = unfinished();
            paths.push(self.path.clone());
            paths.extend_from_slice(&self.beside);
        }
    }

    /// Has [`abandon`] leave the files alone.
    fn settle(&self, paths: &mut Vec<PathBuf>) {
        paths.retain(|path| *path != self.path && !self.beside.contains(path));
    }

    /// What `error` says, with the name that was asked for in place of one that is gone with the file.
    pub fn name(&self, error: Error) -> Error {
        let interrupted = |error: &block::Error| error.kind() == ErrorKind::Interrupted;
        let (hidden, asked) = (self.path.to_string_lossy(), self.target.to_string_lossy());
        let text = format!("{error:#}");
        match error.downcast_ref().is_some_and(interrupted) || !text.contains(&*hidden) {
            true => error,
            false => anyhow!(text.replace(&*hidden, &asked)),
        }
    }

    /// Gives the file its name, in place of what has it: of what can be made again, and need not be durable.
    pub fn replace(mut self) -> Result<()> {
        // As in `finish`.
        let mut paths = unfinished();
        fs::rename(&self.path, &self.target).with_context(|| self.target.display().to_string())?;
        self.settle(&mut paths);
        self.keep = true;
        Ok(())
    }

    /// Gives the file its name, durably. A file that came there meanwhile is not replaced.
    pub fn finish(mut self) -> Result<()> {
        // A signal that ends the process comes before the renaming or after it.
        let mut paths = unfinished();
        let renamed = renameat_with(CWD, &self.path, CWD, &self.target, RenameFlags::NOREPLACE);
        let renamed = match renamed {
            // The file system cannot rename so: a second name cannot replace anything either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                fs::hard_link(&self.path, &self.target).and_then(|()| fs::remove_file(&self.path))
            }
            renamed => renamed.map_err(std::io::Error::from),
        };
        if renamed.is_ok() {
            self.settle(&mut paths);
        }
        drop(paths);
        match renamed {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                bail!(create::exists(&self.target))
            }
            renamed => renamed.with_context(|| {
                format!(
                    "{}: renaming to {}",
                    self.path.display(),
                    self.target.display()
                )
            })?,
        }
        self.beside.clear();
        self.keep = true;
        create::sync_directory(&self.target)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // What matters is why it was not finished.
        let _ = fs::remove_file(&self.path);
        for path in &self.beside {
            let _ = fs::remove_file(path);
        }
        self.settle(&mut unfinished());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gets_its_name_in_the_end_and_replaces_none() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let partial = Partial::new(&target);
        fs::write(partial.path(), "1").unwrap();
        assert!(!target.exists());
        partial.finish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"1");
        let mut second = Partial::new(&target);
        fs::write(second.path(), "2").unwrap();
        second.add(dir.path().join("beside"));
        fs::write(dir.path().join("beside"), "3").unwrap();
        let error = second.finish().unwrap_err().to_string();
        assert!(error.contains("exists already"), "{error}");
        assert_eq!(fs::read(&target).unwrap(), b"1");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let third = Partial::new(&target);
        fs::write(third.path(), "3").unwrap();
        third.replace().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"3");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_longest_name_has_room() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a".repeat(255), "é".repeat(127)] {
            let partial = Partial::new(&dir.path().join(&name));
            fs::write(partial.path(), "1").unwrap();
            partial.finish().unwrap();
            assert!(dir.path().join(&name).exists());
        }
    }
}
