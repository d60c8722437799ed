//! A block device that a user gives to a run: what is on it is lost, so it is looked at before.

use super::mount::{self, LABEL};
use block::{Context, Error, ErrorKind, Result};
use rustix::fs::{Mode, OFlags, open};
use std::{
    fs::{self, File},
    io::{Seek, SeekFrom},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

/// Whether a file is a block device.
pub(crate) fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Bytes of a file or a block device.
pub(crate) fn bytes(path: &Path) -> Result<u64> {
    let named = || path.display().to_string();
    let meta = fs::metadata(path).context(named)?;
    if !meta.file_type().is_block_device() {
        return Ok(meta.len());
    }
    let mut file = File::open(path).context(named)?;
    file.seek(SeekFrom::End(0)).context(named)
}

/// A device that may be written over.
#[derive(Clone, Debug)]
pub(crate) struct Given {
    /// Its node.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

impl Given {
    /// Looks at a device: nobody has it, and nothing is known to be on it, or the user said that it may be `overwritten`. File systems
    /// of an earlier run that was killed are no reason.
    ///
    /// # Errors
    ///
    /// It is no block device, is in use (that is never overwritten), cannot be written, or something is on it: what, and what to do.
    pub(crate) fn look(path: &Path, overwritten: bool) -> Result<Self> {
        let named = || path.display().to_string();
        let path = &fs::canonicalize(path).context(named)?;
        fs::metadata(path).context(named)?;
        if !is_block_device(path) {
            return Err(Error::invalid(format!(
                "--device {}: it is no block device; of a file system on one give --out a folder",
                path.display()
            )));
        }
        // Exclusively: the kernel says who has it, mounted or as a part of something.
        let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
        open(path, flags, Mode::empty()).map_err(|errno| {
            let why = match errno {
                rustix::io::Errno::BUSY => {
                    "it is in use (mounted, swap, or part of a volume group or an array): free it first".to_owned()
                }
                errno => errno.to_string(),
            };
            Error::new(ErrorKind::Locked, format!("--device {}: {why}", path.display()))
        })?;
        if !overwritten && let Some(found) = mount::signature(path)? {
            return Err(Error::invalid(format!(
                "--device {}: it holds {found}, which would be lost: give another device, or --overwrite-device if that is meant",
                path.display()
            )));
        }
        Ok(Self {
            path: path.clone(),
            bytes: bytes(path)?,
        })
    }

    /// Whether there is room for `need` bytes.
    pub(crate) fn has_room(&self, need: u64) -> Result<()> {
        if self.bytes >= need {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "--device {}: it has {}, this needs {}: give a larger one, or a smaller --disk",
                self.path.display(),
                block::size::human(self.bytes),
                block::size::human(need)
            ),
        ))
    }

    /// Leaves no file system of ours on it. What is not ours is left as it is.
    pub(crate) fn clear(&self) -> Result<()> {
        match mount::label(&self.path)?.as_deref() {
            Some(LABEL) => mount::wipe(&self.path),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loop device; detached when dropped. None where there are none.
    struct Loop(PathBuf);

    impl Loop {
        fn of(file: &Path, bytes: u64) -> Option<Self> {
            File::create(file).unwrap().set_len(bytes).unwrap();
            let root = rustix::process::geteuid().is_root();
            root.then(|| mount::attach(file).ok()).flatten().map(Self)
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = mount::detach(&self.0);
        }
    }

    #[test]
    fn only_a_device_that_nothing_is_on_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let Some(device) = Loop::of(&file, 64 << 20) else {
            return;
        };
        let path = &device.0;
        let look = |overwritten| Given::look(path, overwritten);
        let error = |outcome: Result<Given>| outcome.unwrap_err().to_string();
        let given = look(false).unwrap();
        assert_eq!((given.bytes, bytes(&file).unwrap()), (64 << 20, 64 << 20));
        assert!(given.has_room(64 << 20).is_ok() && given.has_room(64 << 21).is_err());
        let said = error(Given::look(&file, true));
        assert!(said.contains("it is no block device"), "{said}");
        let said = error(Given::look(&dir.path().join("none"), true));
        assert!(said.contains("none"), "{said}");
        // A file system of ours may be on it, and goes; any other may not, and stays.
        mount::make(path, "ext4").unwrap();
        look(false).unwrap().clear().unwrap();
        assert_eq!(mount::signature(path).unwrap(), None);
        mount::make(path, "ext4").unwrap();
        mount::tool("tune2fs")
            .args(["-L", "photos"])
            .arg(path)
            .output()
            .unwrap();
        let said = error(look(false));
        assert!(
            said.contains("it holds ext4 'photos'") && said.contains("--overwrite-device"),
            "{said}"
        );
        look(true).unwrap().clear().unwrap();
        assert!(mount::signature(path).unwrap().is_some());
        // What is mounted is not taken, whatever is said.
        let point = dir.path().join("point");
        mount::mount(path, "ext4", &point, true).unwrap();
        let said = error(look(true));
        mount::unmount(&point).unwrap();
        assert!(said.contains("it is in use"), "{said}");
    }
}
