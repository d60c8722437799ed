//! What a block device is: the disk that it belongs to, who has it, and by what it is known again.

use super::mount::unescaped;
use block::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

/// Where the kernel says by what a disk is known, in the disk's folder: a name that is the disk's alone, or its serial number.
const NAMES: [&str; 6] = [
    "wwid",
    "device/wwid",
    "serial",
    "device/serial",
    "dm/uuid",
    "loop/backing_file",
];

/// Major and minor number of a block device; `None` of anything else.
fn number(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    let number = meta.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    meta.file_type()
        .is_block_device()
        .then(|| format!("{major}:{minor}"))
}

/// The folder in sysfs of a block device, or of the one that a file lies on; a file system without one has a number that is none there.
pub fn folder_below(meta: &fs::Metadata) -> PathBuf {
    let number = match meta.file_type().is_block_device() {
        true => meta.rdev(),
        false => meta.dev(),
    };
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// Its folder in sysfs.
fn folder(number: &str) -> Option<PathBuf> {
    fs::canonicalize(Path::new("/sys/dev/block").join(number)).ok()
}

/// What a file of sysfs says.
fn said(folder: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(name)).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The folder of the whole disk, where a folder in sysfs is a partition's.
fn disk_of(folder: &Path) -> Option<&Path> {
    folder
        .join("partition")
        .exists()
        .then(|| folder.parent())
        .flatten()
}

/// The node of the disk that a partition belongs to; of anything else its own. It is what udev and tools that make partitions lock, never a
/// partition's (systemd's "Locking Block Device Access").
pub(super) fn whole(path: &Path) -> PathBuf {
    let folder = number(path).and_then(|number| folder(&number));
    let disk = folder.as_deref().and_then(disk_of);
    // A slash in a device's name is an exclamation mark in sysfs.
    let name = disk.and_then(|disk| Some(disk.file_name()?.to_str()?.replace('!', "/")));
    let node = name.map(|name| Path::new("/dev").join(name));
    node.filter(|node| node.exists())
        .unwrap_or_else(|| path.to_owned())
}

/// Who has a block device or a part of it, in words, as far as the kernel tells.
pub(super) fn user(path: &Path) -> Option<String> {
    let own = number(path)?;
    let folder = folder(&own)?;
    let parts = fs::read_dir(&folder).into_iter().flatten().flatten();
    let parts = parts.filter(|entry| entry.path().join("partition").exists());
    let mut numbers: BTreeSet<String> =
        parts.filter_map(|part| said(&part.path(), "dev")).collect();
    numbers.insert(own);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(point) = mounts.lines().find_map(|line| mounted(line, &numbers)) {
        return Some(format!("mounted at {}", point.display()));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut swaps = swaps
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    if swaps.any(|swap| number(&unescaped(swap)).is_some_and(|number| numbers.contains(&number))) {
        return Some("swap".to_owned());
    }
    let mut holders = numbers.iter().flat_map(|number| {
        let holders = fs::read_dir(Path::new("/sys/dev/block").join(number).join("holders"));
        holders.into_iter().flatten().flatten()
    });
    let holder = holders.next()?.file_name();
    Some(format!("part of {}", holder.display()))
}

/// Of a line of `/proc/self/mountinfo`: where it is mounted, if it is of one of these devices. Btrfs has a number of its own; its source
/// is named.
fn mounted(line: &str, numbers: &BTreeSet<String>) -> Option<PathBuf> {
    let fields: Vec<&str> = line.split(' ').collect();
    let source = line.split(" - ").nth(1)?.split(' ').nth(1)?;
    let is = numbers.contains(*fields.get(2)?)
        || number(&unescaped(source)).is_some_and(|number| numbers.contains(&number));
    is.then(|| fields.get(4).map(|point| unescaped(point)))
        .flatten()
}

/// By what a device is known again, when a run goes on: its path may be another disk's after a restart of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    path: PathBuf,
    /// Major and minor number.
    number: String,
    bytes: u64,
    /// World wide name, serial number or the like, where it has one; of a loop device its file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

impl Identity {
    /// Of a device.
    ///
    /// # Errors
    ///
    /// It is not there, or no block device.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let path = fs::canonicalize(path).context(|| format!("--device {}", path.display()))?;
        let Some(number) = number(&path) else {
            return Err(not_a_device(&path));
        };
        Ok(Self {
            bytes: super::given::bytes(&path)?,
            id: folder(&number).and_then(|folder| id(&folder)),
            path,
            number,
        })
    }

    /// Whether both are one device.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let same = match (&self.id, &other.id) {
            (Some(own), Some(others)) => own == others,
            _ => self.number == other.number,
        };
        same && self.bytes == other.bytes
    }

    /// The same of what records say, where those of older runs have the path alone.
    pub(crate) fn is_recorded(&self, recorded: &serde_json::Value) -> bool {
        match Self::deserialize(recorded) {
            Ok(other) => self.is(&other),
            Err(_) => recorded.as_str() == self.path.to_str(),
        }
    }
}

/// By what the device of a folder in sysfs is known.
fn id(folder: &Path) -> Option<String> {
    let disk = disk_of(folder).unwrap_or(folder);
    let name = NAMES.iter().find_map(|name| said(disk, name))?;
    Some(match said(folder, "partition") {
        Some(part) => format!("{name}, partition {part}"),
        None => name,
    })
}

/// What is said of a path that is none.
pub(super) fn not_a_device(path: &Path) -> Error {
    Error::invalid(format!(
        "--device {}: it is no block device; of a file system on one give --out a folder",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Folders as sysfs has them.
    fn sysfs(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn a_partition_is_its_disks() {
        let dir = sysfs(&[
            ("nvme0n1/wwid", "eui.0025\n"),
            ("nvme0n1/device/serial", "S1\n"),
            ("nvme0n1/nvme0n1p2/partition", "2\n"),
            ("sda/size", "8\n"),
            ("vda/serial", "\n"),
        ]);
        let at = |name: &str| dir.path().join(name);
        assert_eq!(
            disk_of(&at("nvme0n1/nvme0n1p2")),
            Some(at("nvme0n1").as_path())
        );
        assert_eq!(disk_of(&at("nvme0n1")), None);
        assert_eq!(id(&at("nvme0n1")).unwrap(), "eui.0025");
        assert_eq!(
            id(&at("nvme0n1/nvme0n1p2")).unwrap(),
            "eui.0025, partition 2"
        );
        // No name, or an empty one.
        assert_eq!(id(&at("sda")), None);
        assert_eq!(id(&at("vda")), None);
        // What is no device is itself.
        assert_eq!(whole(dir.path()), dir.path());
        assert_eq!(user(dir.path()), None);
        let words = Identity::of(dir.path()).unwrap_err().to_string();
        assert!(words.contains("it is no block device"), "{words}");
    }

    #[test]
    fn a_device_is_known_by_its_name_and_else_by_its_number() {
        let sda = Identity {
            path: "/dev/sda".into(),
            number: "8:0".into(),
            bytes: 1 << 30,
            id: Some("naa.5000".into()),
        };
        type Change = fn(&mut Identity);
        let cases: [(Change, bool); 6] = [
            (|_| (), true),
            // Found in another order.
            (
                |i| (i.path, i.number) = ("/dev/sdb".into(), "8:16".into()),
                true,
            ),
            (|i| i.id = Some("naa.6000".into()), false),
            (|i| i.bytes += 512, false),
            // Where one of them has no name.
            (|i| i.id = None, true),
            (|i| (i.id, i.number) = (None, "8:16".into()), false),
        ];
        for (n, (change, same)) in cases.into_iter().enumerate() {
            let mut other = sda.clone();
            change(&mut other);
            assert_eq!(sda.is(&other), same, "{n}");
            let recorded = serde_json::to_value(&other).unwrap();
            assert_eq!(sda.is_recorded(&recorded), same, "{n}");
        }
        // Of older runs.
        assert!(sda.is_recorded(&"/dev/sda".into()) && !sda.is_recorded(&"/dev/sdb".into()));
    }

    #[test]
    fn where_a_device_is_mounted_is_read() {
        let numbers = BTreeSet::from(["8:1".to_owned()]);
        let line = |number: &str, point: &str| {
            format!("61 29 {number} / {point} rw,noatime shared:3 - ext4 /dev/none rw")
        };
        assert_eq!(
            mounted(&line("8:1", "/a\\040b"), &numbers),
            Some("/a b".into())
        );
        assert_eq!(mounted(&line("8:2", "/a"), &numbers), None);
        assert_eq!(mounted("61 29 8:1", &numbers), None);
    }
}
