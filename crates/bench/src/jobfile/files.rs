//! The files of a job: their names, and what is there before it begins.

use crate::load::Random;
use block::{Context, Error, Result};
use std::{
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

/// Bytes of a write while a file is made.
const PIECE: usize = 1 << 20;

/// What `filename_format` is where it is not given.
pub(super) const FORMAT: &str = "$jobname.$jobnum.$filenum";

/// Names as `filename` has them: parted by colons, where none of them has a backslash before it.
pub(super) fn names(text: &str) -> Vec<String> {
    let plain = text.replace("\\:", "\0");
    let names = plain.split(':').filter(|name| !name.is_empty());
    names.map(|name| name.replace('\0', ":")).collect()
}

/// A name that is made up.
pub(super) fn made_up(format: &str, job: &str, copy: u64, number: usize) -> String {
    let parts = [
        ("$jobname", job.to_owned()),
        ("$jobnum", copy.to_string()),
        ("$filenum", number.to_string()),
    ];
    parts.iter().fold(format.to_owned(), |name, (key, value)| {
        name.replace(key, value)
    })
}

/// Files that are to be there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// All that the job uses.
    pub paths: Vec<PathBuf>,
    /// Bytes that each must have, where that is said.
    pub bytes: Option<u64>,
    /// What is missing is written and not only made room for: the job reads it.
    pub written: bool,
    /// Room is made with `fallocate`, where the file system knows that.
    pub allocated: bool,
    /// They may be made (`allow_file_create`).
    pub may_create: bool,
    /// They are removed when the job is over.
    pub unlink: bool,
}

impl Layout {
    /// Makes what is missing of the files, as fio does before it begins: regular files get the length that the job needs.
    ///
    /// # Errors
    ///
    /// A file is not there and may not be made, or how long it is to be is not said; the file system refuses.
    pub(super) fn prepare(&self, seed: u64) -> Result<()> {
        for path in &self.paths {
            self.one(path, seed)
                .context(|| path.display().to_string())?;
        }
        Ok(())
    }

    fn one(&self, path: &Path, seed: u64) -> Result<()> {
        let there = match fs::metadata(path) {
            Ok(known) if !known.is_file() => {
                let kind = known.file_type();
                return match kind.is_block_device() || kind.is_char_device() {
                    true => Ok(()),
                    false => Err(Error::invalid("it is neither a file nor a device")),
                };
            }
            Ok(known) => known.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if path.starts_with("/dev") || !self.may_create {
                    return Err(Error::os("open", error));
                }
                0
            }
            Err(error) => return Err(Error::os("open", error)),
        };
        let Some(bytes) = self.bytes else {
            return match there {
                0 => Err(Error::invalid(
                    "it is empty or not there, and no size says how long it is to be",
                )),
                _ => Ok(()),
            };
        };
        if there >= bytes {
            return Ok(());
        }
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(path);
        let mut file = file.context(|| "create")?;
        if self.written {
            return write(&mut file, there, bytes, seed);
        }
        let made = match self.allocated {
            true => rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes),
            false => Err(rustix::io::Errno::OPNOTSUPP),
        };
        match made {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes).context(|| "extend"),
            Err(error) => Err(Error::os("allocate", error.into())),
        }
    }

    /// Removes them, where that is asked for. One that is not there any more is no error: jobs may share them.
    pub(super) fn end(&self) -> Result<()> {
        for path in self.paths.iter().filter(|_| self.unlink) {
            match fs::symlink_metadata(path) {
                Ok(known) if known.is_file() => {
                    fs::remove_file(path).context(|| path.display().to_string())?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Writes what compresses badly from `from` to `to`, and waits for the device.
fn write(file: &mut File, from: u64, to: u64, seed: u64) -> Result<()> {
    let mut random = Random::new(seed ^ 0x1a0u64);
    let mut piece = vec![0; PIECE];
    file.seek(SeekFrom::Start(from)).context(|| "seek")?;
    let mut left = to - from;
    while left > 0 {
        let now = left.min(PIECE as u64);
        random.fill(&mut piece);
        file.write_all(&piece[..now as usize]).context(|| "write")?;
        left -= now;
    }
    file.sync_data().context(|| "flush")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_fios() {
        assert_eq!(names("a:b\\:c::d"), ["a", "b:c", "d"]);
        assert_eq!(made_up(FORMAT, "job", 2, 7), "job.2.7");
        assert_eq!(made_up("x.$filenum", "job", 2, 7), "x.7");
    }

    #[test]
    fn files_are_made_as_long_as_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let layout = |name: &str, written| Layout {
            paths: vec![path(name)],
            bytes: Some(3 << 20),
            written,
            allocated: true,
            may_create: true,
            unlink: true,
        };
        fs::write(path("old"), b"abc").unwrap();
        layout("old", true).prepare(1).unwrap();
        let old = fs::read(path("old")).unwrap();
        assert_eq!((old.len(), &old[..3]), (3 << 20, &b"abc"[..]));
        assert!(
            old[3..]
                .chunks(4096)
                .all(|block| block.iter().any(|byte| *byte != 0))
        );
        // Longer ones stay.
        Layout {
            bytes: Some(5),
            ..layout("old", true)
        }
        .prepare(1)
        .unwrap();
        assert_eq!(fs::metadata(path("old")).unwrap().len(), 3 << 20);
        layout("new", false).prepare(1).unwrap();
        assert!(fs::read(path("new")).unwrap() == vec![0; 3 << 20]);
        for (layout, says) in [
            (
                Layout {
                    may_create: false,
                    ..layout("none", false)
                },
                "none",
            ),
            (
                Layout {
                    bytes: None,
                    ..layout("none", false)
                },
                "no size says",
            ),
            (
                Layout {
                    paths: vec!["/dev/diskplane-none".into()],
                    ..layout("", false)
                },
                "/dev/",
            ),
            (
                Layout {
                    paths: vec![dir.path().into()],
                    ..layout("", false)
                },
                "neither a file",
            ),
        ] {
            let error = layout.prepare(1).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        layout("old", false).end().unwrap();
        layout("old", false).end().unwrap();
        assert!(!path("old").exists() && path("new").exists());
    }
}
