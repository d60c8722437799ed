//! A block device that a user gives to a run: what is on it is lost, so it is looked at before.

use super::{disk, mount};
use block::{Context, Error, ErrorKind, Result};
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open},
    io::Errno,
};
use std::{
    fs::{self, File},
    io::{Seek, SeekFrom},
    os::{fd::OwnedFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// How long a tool may be at work at a device that nobody has: udev looks at each that was written and closed, and locks it meanwhile.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
/// How long another run, which is ending, may be at it.
const ENDING_LIMIT: Duration = Duration::from_secs(10);
/// How long a file system that was unmounted may take to be gone: what had files open there may be ending, and what was written goes to
/// a disk that may be slow. Nobody who can be named is waited for.
const FREE_LIMIT: Duration = Duration::from_secs(60);
/// After so long it is said that something is waited for.
const SILENT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

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

/// A device that may be written over, and that nobody else takes meanwhile:
///
/// ```text
///   from the first look to the end    a lock of the whole disk's node (flock), as udev and tools that make partitions take it: no other
///                                     run of ours is at a part of it, and udev looks at none of them
///   while no file system is on it     open, exclusively: it cannot be mounted, nor become part of something
///   while mkfs runs, and mounted      the same, by these
/// ```
#[derive(Debug)]
pub(crate) struct Given {
    /// Its node.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// What may be on it does not matter: the user said so, or it is ours.
    overwritten: bool,
    /// Open exclusively.
    held: Option<OwnedFd>,
    /// The lock.
    _node: File,
}

impl Given {
    /// Looks at a device: nobody has it, and nothing is known to be on it, or the user said that it may be `overwritten`. File systems
    /// of an earlier run that was killed are no reason.
    ///
    /// # Errors
    ///
    /// It is no block device, is in use (that is never overwritten), cannot be written, or something is on it: what, and what to do.
    pub(crate) fn look(path: &Path, overwritten: bool) -> Result<Self> {
        let given = Self::take(path, LOCK_LIMIT, Duration::ZERO)?;
        given.is_free(overwritten)?;
        Ok(Self {
            overwritten,
            ..given
        })
    }

    /// Takes a device, whatever is on it; one that somebody has locked, or that is in use, is waited for until the limit of that is over.
    fn take(path: &Path, locked: Duration, in_use: Duration) -> Result<Self> {
        let path = &fs::canonicalize(path).context(|| path.display().to_string())?;
        if !is_block_device(path) {
            return Err(disk::not_a_device(path));
        }
        let disk = disk::whole(path);
        let node = File::open(&disk);
        let node = node.context(|| format!("--device {}: {}", path.display(), disk.display()))?;
        let began = Instant::now();
        while let Err(errno) = flock(&node, FlockOperation::NonBlockingLockExclusive) {
            if errno != Errno::WOULDBLOCK || began.elapsed() >= locked {
                return Err(Error::new(
                    ErrorKind::Locked,
                    format!(
                        "--device {}: another run, or a tool that makes file systems or partitions, is at work at {} ({errno})",
                        path.display(),
                        disk.display()
                    ),
                ));
            }
            thread::sleep(PAUSE);
        }
        let mut given = Self {
            path: path.clone(),
            bytes: bytes(path)?,
            overwritten: false,
            held: None,
            _node: node,
        };
        given.hold(in_use)?;
        Ok(given)
    }

    /// Opens it exclusively: the kernel says whether anybody has it, mounted or as a part of something.
    fn hold(&mut self, limit: Duration) -> Result<()> {
        let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
        let began = Instant::now();
        let mut silent = true;
        let why = loop {
            match open(&self.path, flags, Mode::empty()) {
                Ok(held) => {
                    self.held = Some(held);
                    return Ok(());
                }
                Err(Errno::BUSY) => {}
                Err(errno) => break errno.to_string(),
            }
            let user = disk::user(&self.path);
            if user.is_some() || began.elapsed() >= limit {
                let user = user.unwrap_or_else(|| {
                    "by a process, or a file system that is not gone yet".to_owned()
                });
                break format!("it is in use ({user}): free it first");
            }
            if silent && began.elapsed() >= SILENT {
                silent = false;
                tracing::warn!(
                    "{}: waiting until it is free, {} s at most",
                    self.path.display(),
                    limit.as_secs()
                );
            }
            thread::sleep(PAUSE);
        };
        Err(Error::new(
            ErrorKind::Locked,
            format!("--device {}: {why}", self.path.display()),
        ))
    }

    fn is_free(&self, overwritten: bool) -> Result<()> {
        if !overwritten && let Some(found) = mount::signature(&self.path)? {
            return Err(Error::invalid(format!(
                "--device {}: it holds {found}, which would be lost: give another device, or --overwrite-device if that is meant",
                self.path.display()
            )));
        }
        Ok(())
    }

    /// To be called right before something is written to it: looks again, for it may be long ago that it was looked at.
    ///
    /// # Errors
    ///
    /// Somebody wrote something to it since.
    pub(crate) fn is_written(&mut self) -> Result<()> {
        self.is_free(self.overwritten)?;
        self.overwritten = true;
        Ok(())
    }

    /// Lets others have it exclusively: who makes a file system on it, and then the file system.
    pub(crate) fn lend(&mut self) {
        self.held = None;
    }

    /// Has it back, and leaves no file system of ours on it. What is not ours is left as it is.
    ///
    /// # Errors
    ///
    /// It is in use still, or cannot be written.
    pub(crate) fn take_back(&mut self) -> Result<bool> {
        if self.held.is_none() {
            self.hold(FREE_LIMIT)?;
        }
        mount::wipe_ours(&self.path)
    }

    /// Leaves no file system of ours on a device, where a run was killed or stopped: whether there was any.
    ///
    /// # Errors
    ///
    /// It is in use still, or cannot be written.
    pub(crate) fn clear(path: &Path) -> Result<bool> {
        Self::take(path, ENDING_LIMIT, FREE_LIMIT)?.take_back()
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::fs::FileExt, process::Command};

    /// A loop device; detached when dropped.
    struct Loop(PathBuf);

    impl Loop {
        /// None where there are none, which is said.
        fn of(file: &Path, bytes: u64) -> Option<Self> {
            File::create(file).unwrap().set_len(bytes).unwrap();
            match mount::attach(file) {
                Ok(device) => Some(Self(device)),
                Err(error) if rustix::process::geteuid().is_root() => {
                    // A container without loop devices.
                    assert!(!Path::new("/dev/loop-control").exists(), "{error}");
                    eprintln!("NOT TESTED: {error}");
                    None
                }
                Err(error) => {
                    eprintln!("NOT TESTED: {error}");
                    None
                }
            }
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = mount::detach(&self.0);
        }
    }

    fn said<T>(outcome: Result<T>) -> String {
        outcome.err().expect("an error").to_string()
    }

    fn tool(name: &str, arguments: &[&str], device: &Path) {
        let mut command = mount::tool(name);
        let output = command.args(arguments).arg(device).output().unwrap();
        assert!(output.status.success(), "{output:?}");
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
        let given = look(false).unwrap();
        assert_eq!((given.bytes, bytes(&file).unwrap()), (64 << 20, 64 << 20));
        assert!(given.has_room(64 << 20).is_ok() && given.has_room(64 << 21).is_err());
        drop(given);
        let words = said(Given::look(&file, true));
        assert!(words.contains("it is no block device"), "{words}");
        let words = said(Given::look(&dir.path().join("none"), true));
        assert!(words.contains("none"), "{words}");
        // A file system of ours may be on it, and goes; any other may not, and stays.
        for kind in ["ext4", "xfs"] {
            // mkfs.xfs wants 300 MiB.
            File::options()
                .write(true)
                .open(&file)
                .unwrap()
                .set_len(320 << 20)
                .unwrap();
            tool("losetup", &["--set-capacity"], path);
            mount::make(path, kind).unwrap();
            assert!(look(false).unwrap().take_back().unwrap());
            assert_eq!(mount::signature(path).unwrap(), None);
            assert!(!Given::clear(path).unwrap());
        }
        mount::make(path, "ext4").unwrap();
        tool("tune2fs", &["-L", "photos"], path);
        let words = said(look(false));
        assert!(
            words.contains("it holds ext4 'photos'") && words.contains("--overwrite-device"),
            "{words}"
        );
        assert!(!look(true).unwrap().take_back().unwrap());
        assert!(mount::signature(path).unwrap().is_some());
        // What is mounted is not taken, whatever is said.
        let point = dir.path().join("point");
        mount::mount(path, "ext4", &point, true).unwrap();
        let words = said(look(true));
        mount::unmount(&point).unwrap();
        let point = fs::canonicalize(&point).unwrap();
        let where_ = format!("it is in use (mounted at {})", point.display());
        assert!(words.contains(&where_), "{words}");
        // An image is something too, of which libblkid knows nothing.
        tool("wipefs", &["--all", "--quiet"], path);
        let node = File::options().write(true).open(path).unwrap();
        node.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
        drop(node);
        let words = said(look(false));
        assert!(words.contains("it holds a qcow2 image"), "{words}");
        // So is one that only its end shows.
        let node = File::options().write(true).open(path).unwrap();
        node.write_all_at(&[0; 4096], 0).unwrap();
        assert!(look(false).is_ok());
        let end = bytes(path).unwrap();
        node.write_all_at(b"koly\0\0\0\x04\0\0\x02\0", end - 512)
            .unwrap();
        drop(node);
        let words = said(look(false));
        assert!(
            words.contains("it holds what ends as a disk image"),
            "{words}"
        );
    }

    #[test]
    fn nobody_takes_a_device_while_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let Some(device) = Loop::of(&dir.path().join("file"), 64 << 20) else {
            return;
        };
        let path = &device.0;
        let mut given = Given::look(path, false).unwrap();
        // No other run of ours, and no file system of somebody's.
        let words = said(Given::look(path, true));
        assert!(words.contains("another run"), "{words}");
        let mut mkfs = mount::tool("mkfs.ext4");
        let output = mkfs.args(["-q", "-F"]).arg(path).output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && words.contains("in use"),
            "{words}"
        );
        // Somebody writes to it nevertheless, after it was looked at: that is seen before it is lost.
        let node = File::options().write(true).open(path).unwrap();
        node.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
        let words = said(given.is_written());
        assert!(words.contains("it holds a qcow2 image"), "{words}");
        node.write_all_at(&[0; 8], 0).unwrap();
        given.is_written().unwrap();
        // From then on what is on it is ours.
        node.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
        given.is_written().unwrap();
        given.lend();
        mount::make(path, "ext4").unwrap();
        let point = dir.path().join("point");
        mount::mount(path, "ext4", &point, true).unwrap();
        mount::unmount(&point).unwrap();
        assert!(given.take_back().unwrap());
        assert!(
            Command::new("flock")
                .args(["--nonblock", "--conflict-exit-code", "7"])
                .arg(path)
                .arg("true")
                .status()
                .is_ok_and(|status| status.code() == Some(7))
        );
    }
}
