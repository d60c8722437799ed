//! An initramfs with more in it: archives that follow each other are unpacked one over the other (the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! ```text
//!   as it is │ 0 … to 4 bytes │ header of 110 characters │ name, 0 … to 4 │ bytes, 0 … to 4 │ … │ TRAILER!!!
//! ```

use block::{Context, Error, Result};
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

/// What ends an archive.
const TRAILER: &str = "TRAILER!!!";
/// `S_IFREG` with `rwxr-xr-x`, and `S_IFDIR` with the same.
const PROGRAM: u32 = 0o100_755;
const FOLDER: u32 = 0o040_755;

/// Writes `base` to a new file `out`, and behind it an archive with files: each goes into `folder` (of the guest's root, and
/// without a slash in front), under the name that is given.
///
/// # Errors
///
/// What reading and writing fail with; a file of 4 GiB or more, for whose size there is no room.
pub(crate) fn with_files(
    base: &Path,
    out: &Path,
    folder: &str,
    files: &[(&str, &Path)],
) -> Result<()> {
    let named = || out.display().to_string();
    let base = fs::read(base).context(|| base.display().to_string())?;
    let mut file = File::create(out).context(named)?;
    let mut archive = vec![0; padded(base.len()) - base.len()];
    entry(&mut archive, folder, FOLDER, &[])?;
    for (name, path) in files {
        let bytes = fs::read(path).context(|| path.display().to_string())?;
        entry(&mut archive, &format!("{folder}/{name}"), PROGRAM, &bytes)?;
    }
    entry(&mut archive, TRAILER, 0, &[])?;
    file.write_all(&base).context(named)?;
    file.write_all(&archive).context(named)
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let size = u32::try_from(bytes.len())
        .map_err(|_| Error::invalid(format!("{name}: too large for an initramfs")))?;
    // Inode, mode, user, group, links, time, size, device (major, minor), its own (major, minor), name, check.
    let fields = [
        0,
        mode,
        0,
        0,
        1,
        0,
        size,
        0,
        0,
        0,
        0,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08X}").bytes());
    }
    // Name and bytes end at a multiple of 4 of the archive, which begins at one.
    let header = 6 + 8 * fields.len();
    archive.extend(name.bytes());
    archive.resize(
        archive.len() + padded(header + name.len() + 1) - header - name.len(),
        0,
    );
    archive.extend(bytes);
    archive.resize(archive.len() + padded(bytes.len()) - bytes.len(), 0);
    Ok(())
}

fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn what_is_added_is_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let (base, out, tree) = (
            dir.path().join("base"),
            dir.path().join("out"),
            dir.path().join("tree"),
        );
        // As long as any file, and no archive.
        fs::write(&base, "not a multiple of 4, x").unwrap();
        fs::write(dir.path().join("one"), "1").unwrap();
        let path = dir.path().join("one");
        with_files(
            &base,
            &out,
            "dp",
            &[("a", &path), ("longer", &base), ("b", &path)],
        )
        .unwrap();
        let all = fs::read(&out).unwrap();
        assert!(all.starts_with(&fs::read(&base).unwrap()));
        let ours = &all[24..];
        assert!(ours.starts_with(b"070701") && ours.len().is_multiple_of(4));
        // What cpio itself says of it, where it is installed.
        fs::write(&out, ours).unwrap();
        fs::create_dir(&tree).unwrap();
        let unpack = Command::new("cpio")
            .args(["--quiet", "-id"])
            .current_dir(&tree)
            .stdin(Stdio::from(File::open(&out).unwrap()))
            .status();
        let Ok(status) = unpack else { return };
        assert!(status.success());
        assert_eq!(fs::read(tree.join("dp/a")).unwrap(), b"1");
        assert_eq!(
            fs::read(tree.join("dp/longer")).unwrap(),
            fs::read(&base).unwrap()
        );
        assert_eq!(fs::read(tree.join("dp/b")).unwrap(), b"1");
    }
}
