//! Temporary folders.

use std::path::{Path, PathBuf};

/// A folder for one test, removed with all that is in it when this is dropped.
///
/// It lies in the system's temporary folder (`TMPDIR`), whose path is short enough for the names of Unix
/// sockets (107 bytes). With `TESTKIT_KEEP` set the folder of a failing test stays and its name is printed.
#[derive(Debug)]
pub struct TempDir {
    dir: Option<tempfile::TempDir>,
}

impl TempDir {
    /// Makes a new folder.
    #[track_caller]
    #[expect(
        clippy::new_without_default,
        reason = "making a folder is not a default value"
    )]
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("diskplane-").tempdir();
        Self {
            dir: Some(dir.unwrap_or_else(|e| panic!("cannot make a temporary folder: {e}"))),
        }
    }

    /// The path of something in the folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root().join(name)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        self.dir
            .as_ref()
            .expect("the folder is there until drop")
            .path()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let keep = std::thread::panicking() && std::env::var_os("TESTKIT_KEEP").is_some();
        if let Some(dir) = self.dir.take().filter(|_| keep) {
            eprintln!("testkit: kept {}", dir.keep().display());
        }
    }
}
