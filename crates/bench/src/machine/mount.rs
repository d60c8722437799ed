//! File systems on loop devices, and their end.
//!
//! What is attached and mounted below a folder of ours is known from the kernel, not from a list of ours: so a run that was
//! killed in between leaves nothing that the next one would not find.

use super::process;
use block::{Context, Error, ErrorKind, Result};
use io::{Lock, OpenOptions};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// Where `sbin` is not in a user's path.
const SBIN: [&str; 2] = ["/usr/sbin", "/sbin"];

/// What file systems of ours are called.
pub(crate) const LABEL: &str = "dp-bench";

/// Attaches a file to a free loop device that bypasses the page cache.
///
/// # Errors
///
/// Not root, no loop devices, or what `losetup` said.
pub(crate) fn attach(file: &Path) -> Result<PathBuf> {
    attach_part(file, None)
}

/// The same of a part of a file: from an offset so many bytes.
///
/// # Errors
///
/// Those of [`attach`].
pub(crate) fn attach_part(file: &Path, part: Option<(u64, u64)>) -> Result<PathBuf> {
    let mut command = tool("losetup");
    command.args(["--find", "--show", "--direct-io=on"]);
    if let Some((offset, bytes)) = part {
        command.args(["--offset", &offset.to_string()]);
        command.args(["--sizelimit", &bytes.to_string()]);
    }
    command.arg(file);
    let device = run(command)?;
    let device = device.trim();
    if !device.starts_with("/dev/") {
        return Err(Error::new(
            ErrorKind::Io,
            format!("losetup named no device: '{device}'"),
        ));
    }
    Ok(device.into())
}

/// Makes a file system of that kind (`ext4` or `xfs`) on a device.
///
/// # Errors
///
/// Not root, the tool is not installed, or what it said.
pub(crate) fn make(device: &Path, kind: &str) -> Result<()> {
    let mut make = tool(&format!("mkfs.{kind}"));
    match kind {
        // All of it now, not in the background while something is measured; and what is preallocated below stays so.
        "ext4" => make.args([
            "-q",
            "-F",
            "-E",
            "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
        ]),
        _ => make.args(["-q", "-f", "-K"]),
    };
    make.args(["-L", LABEL]).arg(device);
    run(make).map(drop)
}

/// A signature on a device.
#[derive(Debug, Deserialize)]
struct Signature {
    /// Of what, as libblkid calls it.
    #[serde(rename = "type")]
    kind: String,
    label: Option<String>,
    usage: Option<String>,
}

/// All signatures on a device. By `wipefs`, which names each of several, and of which there is one implementation: `blkid` is
/// BusyBox's in places, which takes no options, says nothing of a device and calls that a success.
///
/// # Errors
///
/// The tool is not there, failed, or does not answer as util-linux's does.
fn signatures(device: &Path) -> Result<Vec<Signature>> {
    #[derive(Deserialize)]
    struct Answer {
        signatures: Vec<Signature>,
    }
    let mut command = tool("wipefs");
    command
        .args(["--no-act", "--json", "--output", "TYPE,USAGE,LABEL"])
        .arg(device);
    let text = run(command)?;
    let answer: Answer = serde_json::from_str(&text).map_err(|error| {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: what is on it is not known: wipefs does not answer as that of util-linux 2.33 or later: {error}",
                device.display()
            ),
        )
    })?;
    Ok(answer.signatures)
}

/// What is on a device in words, where that is known and not of our making: file systems, partitions, parts of arrays and volume
/// groups, and disk images.
///
/// # Errors
///
/// `wipefs` is not there, or failed; the device cannot be read.
pub(crate) fn signature(device: &Path) -> Result<Option<String>> {
    let found = signatures(device)?;
    let theirs = |own: &&Signature| own.label.as_deref() != Some(LABEL);
    if let Some(first) = found.iter().find(theirs) {
        let kind = match first.usage.as_deref() {
            Some("partition-table") => format!("partitions ({})", first.kind),
            _ => first.kind.clone(),
        };
        return Ok(Some(match &first.label {
            Some(label) => format!("{kind} '{label}'"),
            None => kind,
        }));
    }
    // Whoever calls this may have it, and has looked whether others do.
    let options = OpenOptions {
        lock: Lock::None,
        ..OpenOptions::reading()
    };
    let file = io::File::open(device, &options)?;
    match image::probe(&*file) {
        Ok(found) => Ok(found.map(|format| format!("a {format} image"))),
        // Of fixed VHD and Apple's images only the last sector says so, which a raw disk may have too.
        Err(error) if error.kind() == ErrorKind::Invalid => Ok(Some(
            "what ends as a disk image (a fixed VHD, or an Apple disk image)".to_owned(),
        )),
        Err(error) => Err(error),
    }
}

/// Removes the signatures of file systems of ours, and only these, from a device that nobody else has: whether there were any.
///
/// # Errors
///
/// What `wipefs` said.
pub(crate) fn wipe_ours(device: &Path) -> Result<bool> {
    let found = signatures(device)?;
    let ours = found
        .iter()
        .filter(|one| one.label.as_deref() == Some(LABEL));
    let kinds: BTreeSet<&str> = ours.map(|one| one.kind.as_str()).collect();
    if kinds.is_empty() {
        return Ok(false);
    }
    let mut command = tool("wipefs");
    // Whoever calls this has the device, exclusively, so the tool cannot.
    command
        .args(["--all", "--quiet", "--force", "--types"])
        .arg(kinds.into_iter().collect::<Vec<_>>().join(","))
        .arg(device);
    run(command).map(|_| true)
}

/// Mounts a device's file system; without `barriers` its journal does not flush the device.
///
/// # Errors
///
/// Not root, or what the tool said; XFS cannot be without barriers.
pub(crate) fn mount(device: &Path, kind: &str, point: &Path, barriers: bool) -> Result<()> {
    let options = match (barriers, kind) {
        (true, _) => "noatime",
        (false, "ext4") => "noatime,nobarrier",
        (false, _) => {
            return Err(Error::unsupported(format!(
                "{kind} has no option to be without barriers (since Linux 4.19)"
            )));
        }
    };
    fs::create_dir_all(point).context(|| point.display().to_string())?;
    let mut mount = tool("mount");
    mount
        .args(["-t", kind, "-o", options])
        .arg(device)
        .arg(point);
    run(mount).map(drop)
}

/// Chooses a block device's I/O scheduler.
///
/// # Errors
///
/// The kernel does not have it: which it has.
pub(crate) fn schedule(device: &Path, scheduler: &str) -> Result<()> {
    let name = device.file_name().unwrap_or_default();
    let path = Path::new("/sys/block").join(name).join("queue/scheduler");
    let named = || path.display().to_string();
    let has = fs::read_to_string(&path).context(named)?;
    if !has
        .split_whitespace()
        .any(|own| own.trim_matches(['[', ']']) == scheduler)
    {
        return Err(Error::unsupported(format!(
            "not here: this kernel has no I/O scheduler {scheduler}, but {}",
            has.trim()
        )));
    }
    fs::write(&path, scheduler).context(named)
}

/// Unmounts a file system; where files are open there, it goes when they do.
///
/// # Errors
///
/// What the tool said.
pub(crate) fn unmount(point: &Path) -> Result<()> {
    let how = |how: &[&str]| {
        let mut command = tool("umount");
        command.args(how).arg(point);
        undo(command)
    };
    // Files there may still be open in this process, which is about to end: then it goes with them.
    how(&[]).or_else(|_| how(&["--lazy"]))
}

/// Frees a loop device.
///
/// # Errors
///
/// What the tool said.
pub(crate) fn detach(device: &Path) -> Result<()> {
    let mut command = tool("losetup");
    command.arg("--detach").arg(device);
    undo(command)
}

/// Unmounts what is mounted below a folder, the deepest first, and detaches loop devices whose file lies there. What is
/// mounted from a loop device goes before that, and that before the FUSE file system that may have its file.
///
/// # Errors
///
/// Something could not be undone: the last reason. All else was.
pub(crate) fn release(folder: &Path) -> Result<()> {
    let Ok(folder) = fs::canonicalize(folder) else {
        return Ok(());
    };
    let mut outcome = Ok(());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<(bool, PathBuf)> = mounts
        .lines()
        .filter_map(mounted)
        .filter(|(_, point)| point.starts_with(&folder))
        .collect();
    points.sort_by_key(|(_, point)| std::cmp::Reverse(point.as_os_str().len()));
    let (fuse, others): (Vec<_>, Vec<_>) = points.into_iter().partition(|(is_fuse, _)| *is_fuse);
    for (_, point) in others {
        outcome = unmount(&point).and(outcome);
    }
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(file) = fs::read(entry.path().join("loop/backing_file")) else {
            continue;
        };
        if Path::new(OsStr::from_bytes(&file)).starts_with(&folder) {
            outcome = detach(&Path::new("/dev").join(entry.file_name())).and(outcome);
        }
    }
    for (_, point) in fuse {
        outcome = unmount(&point).and(outcome);
    }
    outcome
}

/// Of a line of `/proc/self/mountinfo`: whether it is FUSE, and where.
fn mounted(line: &str) -> Option<(bool, PathBuf)> {
    let point = unescaped(line.split(' ').nth(4)?);
    // Optional fields end with a dash, the kind follows.
    let kind = line.split(" - ").nth(1)?.split(' ').next()?;
    Some((kind == "fuse" || kind.starts_with("fuse."), point))
}

/// A path of `/proc/self/mountinfo` or `/proc/swaps`: blanks and backslashes are octal there.
pub(super) fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsStr::from_bytes(&bytes).into()
}

/// An administrator's program.
pub(super) fn tool(name: &str) -> Command {
    let found = SBIN.iter().map(|folder| Path::new(folder).join(name));
    let path = found.into_iter().find(|path| path.is_file());
    let mut command = Command::new(path.unwrap_or_else(|| name.into()));
    command.stdin(Stdio::null());
    command
}

/// Runs a tool that sets something up, which ^C ends; what it printed.
fn run(mut command: Command) -> Result<String> {
    let output = process::output(&mut command)?;
    judged(&command, &output)
}

/// Runs a tool that takes something down, after ^C too.
fn undo(mut command: Command) -> Result<()> {
    let output = command
        .output()
        .context(|| command.get_program().display().to_string())?;
    judged(&command, &output).map(drop)
}

/// What a tool printed, where it succeeded.
fn judged(command: &Command, output: &Output) -> Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let name = command.get_program().display();
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.trim().replace('\n', "; ");
    let root = rustix::process::geteuid().is_root();
    let hint = if root { "" } else { " (this needs root)" };
    Err(Error::new(
        match root {
            true => ErrorKind::Io,
            false => ErrorKind::Unsupported,
        },
        format!("{name} failed ({}){hint}: {words}", output.status),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_mounts_are_read() {
        assert_eq!(unescaped("/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescaped("/a\\04"), Path::new("/a\\04"));
        assert_eq!(unescaped("/a\\999"), Path::new("/a\\999"));
        let line = "61 29 0:52 / /w/a\\040b rw,nosuid shared:3 - fuse.diskplane diskplane rw";
        assert_eq!(mounted(line), Some((true, "/w/a b".into())));
        let line = "61 29 7:0 / /w rw - ext4 /dev/loop0 rw";
        assert_eq!(mounted(line), Some((false, "/w".into())));
        assert_eq!(mounted("61 29"), None);
    }

    #[test]
    fn what_is_mounted_below_a_folder_is_found_and_undone() {
        let dir = tempfile::tempdir().unwrap();
        // Nothing is there: nothing happens.
        release(dir.path()).unwrap();
        release(&dir.path().join("none")).unwrap();
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let file = dir.path().join("a file.img");
        fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
        // A machine without loop devices says so.
        let Ok(device) = attach(&file) else { return };
        let point = dir.path().join("mount point");
        make(&device, "ext4").unwrap();
        mount(&device, "ext4", &point, false).unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = mounts.lines().find(|line| line.contains("mount\\040point"));
        assert!(ours.unwrap().contains("nobarrier"), "{ours:?}");
        let error = schedule(&device, "elevator").unwrap_err().to_string();
        assert!(
            error.contains("no I/O scheduler elevator") && error.contains("none"),
            "{error}"
        );
        schedule(&device, "none").unwrap();
        fs::write(point.join("x"), "y").unwrap();
        release(dir.path()).unwrap();
        assert!(!point.join("x").exists());
        let name = device.file_name().unwrap();
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        let still = fs::read_to_string(backing).unwrap_or_default();
        assert!(!still.contains("a file.img"), "{still}");
    }
}
