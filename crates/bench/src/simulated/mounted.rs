//! A simulated device that programs can open.

use super::{Setup, clock::Kept, fuse};
use crate::machine::process::{Folder, lock};
use block::{Context, Error, ErrorKind, Result};
use fuser::{Config, MountOption, Session, SessionUnmounter};
use std::{
    fmt,
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
};

/// Threads that take requests from the kernel: moving bytes of one does not keep the next waiting.
const THREADS: usize = 2;

/// A device under `DIR/device/mount/disk`, which goes with everything in `DIR/device` when this is dropped, or by
/// [`crate::machine::process::abort`].
pub struct Mounted {
    path: PathBuf,
    kept: Box<dyn Fn() -> Kept + Send>,
    flushes: Arc<AtomicU64>,
    /// Says when it is not mounted any more.
    gone: Option<Receiver<()>>,
    unmounter: SessionUnmounter,
    folder: Option<Folder>,
    /// One at a time in `DIR`.
    _lock: File,
}

impl fmt::Debug for Mounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mounted")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Mounted {
    /// Mounts a device in `dir`, whose bytes lie in `files` (which stay), or where there are none in new ones that go with it.
    /// What a killed run left in `dir` is undone first.
    ///
    /// # Errors
    ///
    /// The setup does not go together; another device is in `dir`; a file is too small; this machine has no FUSE.
    pub fn start(dir: &Path, setup: Setup, files: &[PathBuf]) -> Result<Self> {
        setup.build()?;
        if !files.is_empty() && files.len() != setup.members {
            return Err(Error::invalid(format!(
                "{} files for {} devices: give one for each, or none",
                files.len(),
                setup.members
            )));
        }
        fs::create_dir_all(dir).context(|| dir.display().to_string())?;
        let dir = fs::canonicalize(dir).context(|| dir.display().to_string())?;
        let lock = lock(&dir)?;
        let folder = Folder::create(dir.join("device"))?;
        let own: Vec<PathBuf> = (0..setup.members)
            .map(|n| folder.path().join(format!("member-{n}")))
            .collect();
        let files = if files.is_empty() { &own } else { files };
        let open: Result<Vec<File>> = files
            .iter()
            .map(|path| match setup.grows {
                true => open(path, 0),
                false => open(path, setup.member_bytes()),
            })
            .collect();
        let system = fuse::FileSystem::new(setup, open?)?;
        let (kept, flushes) = (Box::new(system.kept()), system.flushes());
        let point = folder.path().join("mount");
        fs::create_dir(&point).context(|| point.display().to_string())?;
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("diskplane".to_owned()),
            MountOption::Subtype("diskplane".to_owned()),
        ];
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let mut session = Session::new(system, &point, &config).map_err(|error| {
            let root = rustix::process::geteuid().is_root();
            let hint = if root { "" } else { " or root" };
            Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: cannot be mounted: {error} (a simulated device needs FUSE, /dev/fuse and fusermount3{hint})",
                    point.display()
                ),
            )
        })?;
        let unmounter = session.unmount_callable();
        let (say, gone) = mpsc::channel();
        thread::Builder::new()
            .name("device".into())
            .spawn(move || {
                if let Err(error) = session.run() {
                    tracing::warn!("the simulated device: {error}");
                }
                let _ = say.send(());
            })
            .context(|| "start a thread".to_owned())?;
        Ok(Self {
            path: point.join(fuse::DISK),
            kept,
            flushes,
            gone: Some(gone),
            unmounter,
            folder: Some(folder),
            _lock: lock,
        })
    }

    /// The file that stands for the device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How well the model's times were kept.
    pub fn kept(&self) -> Kept {
        (self.kept)()
    }

    /// Flushes (`fsync`, `fdatasync`) that programs asked for since it was mounted.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Something that waits until somebody unmounts it; `None` if that was asked for before.
    pub fn gone(&mut self) -> Option<Receiver<()>> {
        self.gone.take()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Where files there are still open, it goes with the folder.
        let _ = self.unmounter.unmount();
        // Before the lock is given back.
        drop(self.folder.take());
    }
}

/// Opens, or makes, the file of a device.
fn open(path: &Path, bytes: u64) -> Result<File> {
    let named = || path.display().to_string();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .context(named)?;
    let meta = file.metadata().context(named)?;
    match meta.len() {
        0 if meta.is_file() => file.set_len(bytes).context(named)?,
        has if meta.is_file() && has < bytes => {
            return Err(Error::invalid(format!(
                "{}: it has {has} bytes, the device needs {bytes} of it: give a larger file, one that is empty or not there, or a smaller --size",
                named()
            )));
        }
        _ => {}
    }
    Ok(file)
}
