//! What a figure depends on: the machine, the kernel, the file system, the versions.

use serde::{Deserialize, Serialize};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};

/// The surroundings of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Host {
    pub kernel: String,
    pub cpu: String,
    pub cores: usize,
    pub memory_mib: u64,
    /// The file system of the images.
    pub file_system: String,
    /// The block device below it, with its I/O scheduler and write cache where the kernel says.
    pub device: String,
    pub diskplane: String,
    /// First lines of `--version`; absent: not installed.
    pub qemu_storage_daemon: Option<String>,
    pub qemu_nbd: Option<String>,
    pub fio: Option<String>,
    pub spdk: Option<String>,
    pub nbdkit: Option<String>,
    pub tapdisk: Option<String>,
}

impl Host {
    /// Looks around; `dir` is where the images lie.
    pub fn look(dir: &Path) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':'))
                .map_or_else(String::new, |(_, value)| value.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let (file_system, device) = mounted(dir);
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory
                .split_whitespace()
                .next()
                .and_then(|kib| kib.parse::<u64>().ok())
                .map_or(0, |kib| kib / 1024),
            file_system,
            device,
            diskplane: env!("CARGO_PKG_VERSION").to_owned(),
            qemu_storage_daemon: version("qemu-storage-daemon"),
            qemu_nbd: version("qemu-nbd"),
            fio: version("fio"),
            spdk: version("spdk_tgt"),
            nbdkit: version("nbdkit"),
            tapdisk: version("tapdisk"),
        }
    }

    /// In one line each, for people.
    pub fn lines(&self) -> Vec<String> {
        let or_not = |version: &Option<String>| {
            version
                .clone()
                .unwrap_or_else(|| "not installed".to_owned())
        };
        vec![
            format!(
                "{} cores ({}), {} MiB, Linux {}",
                self.cores, self.cpu, self.memory_mib, self.kernel
            ),
            format!("{} on {}", self.file_system, self.device),
            format!(
                "diskplane {}; qemu-storage-daemon {}; qemu-nbd {}; fio {}; nbdkit {}; SPDK {}; tapdisk {}",
                self.diskplane,
                or_not(&self.qemu_storage_daemon),
                or_not(&self.qemu_nbd),
                or_not(&self.fio),
                or_not(&self.nbdkit),
                or_not(&self.spdk),
                or_not(&self.tapdisk)
            ),
        ]
    }
}

/// The version in the first line of `PROGRAM --version`, if the program is there.
fn version(program: &str) -> Option<String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let first = text.lines().next()?;
    let number = first
        .split_whitespace()
        .find_map(|word| {
            let word = word.strip_prefix("fio-").unwrap_or(word);
            let word = word.strip_prefix('v').unwrap_or(word);
            word.starts_with(|c: char| c.is_ascii_digit())
                .then_some(word)
        })
        .unwrap_or(first);
    Some(number.to_owned())
}

/// File system type with its options, and device.
fn mounted(dir: &Path) -> (String, String) {
    let unknown = || {
        (
            "unknown file system".to_owned(),
            "an unknown device".to_owned(),
        )
    };
    let Ok(meta) = fs::metadata(dir) else {
        return unknown();
    };
    let number = format!(
        "{}:{}",
        rustix::fs::major(meta.dev()),
        rustix::fs::minor(meta.dev())
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // ID PARENT MAJOR:MINOR ROOT POINT OPTIONS … - TYPE SOURCE SUPER
    let found = mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        (left.get(2) == Some(&number.as_str())).then(|| {
            (
                format!("{} ({})", right[0], left[5]),
                right.get(1).copied().unwrap_or("").to_owned(),
            )
        })
    });
    let Some((file_system, source)) = found else {
        return unknown();
    };
    let name = source.rsplit('/').next().unwrap_or_default();
    let queue = format!("/sys/dev/block/{number}/queue");
    let of = |file: &str| fs::read_to_string(format!("{queue}/{file}")).unwrap_or_default();
    let scheduler = of("scheduler");
    let scheduler = scheduler
        .split(['[', ']'])
        .nth(1)
        .map(|name| format!(", scheduler {name}"))
        .unwrap_or_default();
    let cache = match of("write_cache").trim() {
        "" => String::new(),
        cache => format!(", {cache}"),
    };
    (file_system, format!("{name}{scheduler}{cache}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::look(dir.path());
        assert!(host.cores > 0 && host.memory_mib > 0, "{host:?}");
        assert!(
            !host.kernel.is_empty() && !host.file_system.is_empty(),
            "{host:?}"
        );
        assert_eq!(host.lines().len(), 3);
        assert_eq!(version("/no/such/program"), None);
    }
}
