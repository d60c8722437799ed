//! Starting servers, ours and the peers': the same files, the same flags, the same queues, and the check that it is so.

use crate::{
    equal::Flushed,
    load::{self, Target},
    machine::{
        given,
        process::{self, Process},
    },
    versus::cell::{Polling, Server},
};
use block::{Context, Error, ErrorKind, Result};
use nbd::handshake;
use serde::{Deserialize, Serialize};
use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

/// `O_DIRECT` in the octal flags of `/proc/PID/fdinfo`.
const O_DIRECT: u32 = libc::O_DIRECT.cast_unsigned();

/// Bytes of a disk without a file.
pub(crate) const NULL: u64 = 64 << 30;

/// The programs of a run.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    /// This executable.
    pub diskplane: PathBuf,
    /// Whether files are opened with `O_DIRECT`: where the file system has it.
    pub direct: bool,
    pub spdk: Option<PathBuf>,
}

impl Programs {
    /// Those of this machine, on files that can be opened with `O_DIRECT` or not.
    pub(crate) fn look(diskplane: PathBuf, direct: bool) -> Self {
        Self {
            diskplane,
            direct,
            spdk: find("spdk_tgt"),
        }
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// How the peer does its I/O. Diskplane picks its own (`--aio auto`).
pub(crate) const ENGINES: [&str; 3] = ["io_uring", "native", "threads"];

/// What is started: a server on disks.
#[derive(Clone, Debug)]
pub(crate) struct Setup<'a> {
    pub server: Server,
    /// The disks' files; none: one disk of zeros.
    pub files: &'a [PathBuf],
    /// Their format.
    pub format: &'a str,
    /// The raw file below qcow2 images that are overlays.
    pub backing: Option<PathBuf>,
    /// How I/O is submitted: `io_uring`, `native`, `threads`, or for diskplane `auto`.
    pub engine: &'a str,
    /// Queues of each disk.
    pub queues: u16,
    /// I/O threads (of diskplane).
    pub io_threads: u16,
    /// How it waits.
    pub polling: Polling,
    /// Files are open with `O_DIRECT`.
    pub direct: bool,
    /// Flushes are acknowledged and not carried out.
    pub drops_flushes: bool,
    /// Each write is made durable before it is acknowledged.
    pub writethrough: bool,
    /// The images are only read.
    pub read_only: bool,
    /// Others have the files open too: QEMU takes no locks then.
    pub shared: bool,
    /// Bytes of the metadata cache at most; by itself where not given.
    pub table_cache: Option<u64>,
    /// Bytes that are loaded into it at a time (peers).
    pub table_entry: Option<u64>,
}

impl Setup<'_> {
    /// Whether QEMU locks its files.
    fn locking(&self) -> &'static str {
        if self.shared { "off" } else { "auto" }
    }

    /// `--cache` in QEMU's and our names.
    fn cache(&self) -> Result<&'static str> {
        let ours = self.server.is_ours();
        if self.writethrough {
            return Ok(match self.direct {
                true => "directsync",
                false => "writethrough",
            });
        }
        Ok(match (self.direct, self.drops_flushes) {
            (true, false) => "none",
            (false, false) => "writeback",
            (false, true) => "unsafe",
            (true, true) if ours => "direct-unsafe",
            (true, true) => {
                return Err(Error::unsupported(
                    "qemu-nbd has no mode with O_DIRECT that ignores flushes",
                ));
            }
        })
    }
}

/// A side at work.
#[derive(Debug)]
pub(crate) struct Running {
    process: Process,
    /// Where each disk's load goes.
    pub targets: Vec<Target>,
    /// How it was started.
    pub command: Vec<String>,
    /// The control socket of a diskplane, which prints its statistics when it is stopped.
    pub control: Option<PathBuf>,
    /// It opens its files when a client comes.
    opens_late: bool,
    /// It is killed at the end: SPDK's target waits for seconds for a session that its client has left.
    killed: bool,
}

/// What both sides of a comparison must have in common, as seen from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The files that the servers have open, without their folder.
    pub files: Vec<String>,
    /// Their sizes in bytes.
    pub bytes: Vec<u64>,
    /// All of them are open with `O_DIRECT`.
    pub direct: bool,
    /// Queues that clients were offered, as asked for.
    pub queues: u16,
    /// Servers that have them open.
    #[serde(default = "one")]
    pub servers: u16,
    /// What a server that is started so does with flushes, where that was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flushes: Option<Flushed>,
}

fn one() -> u16 {
    1
}

/// What two sides are seen to differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// Their files, or how many servers have them.
    Files,
    /// The sizes of these; of what grows it is another each time that it is looked at.
    Bytes,
    /// `O_DIRECT`.
    Direct,
    /// The number of queues.
    Queues,
    /// What becomes of flushes.
    Flushes,
}

impl Seen {
    /// What all servers of a side have open.
    pub(crate) fn all(mut servers: impl Iterator<Item = Self>) -> Option<Self> {
        let first = servers.next()?;
        Some(servers.fold(first, |mut all, one| {
            all.files.extend(one.files);
            all.bytes.extend(one.bytes);
            all.direct &= one.direct;
            all.servers += one.servers;
            all
        }))
    }

    /// In what another differs.
    pub(crate) fn differs(&self, other: &Self) -> Vec<Difference> {
        let flushed = |seen: &Self| seen.flushes.map(|f| (f.all(), f.reached == 0));
        let files = |seen: &Self| (seen.files.clone(), seen.servers);
        let all = [
            (Difference::Files, files(self) != files(other)),
            (Difference::Bytes, self.bytes != other.bytes),
            (Difference::Direct, self.direct != other.direct),
            (Difference::Queues, self.queues != other.queues),
            (Difference::Flushes, flushed(self) != flushed(other)),
        ];
        let those = all.into_iter().filter(|(_, differ)| *differ);
        those.map(|(what, _)| what).collect()
    }

    /// Whether another is equal in all that is to be.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let differs = self.differs(other);
        differs.iter().all(|what| *what == Difference::Bytes)
    }

    /// In words.
    pub(crate) fn words(&self) -> String {
        let queues = match self.queues {
            1 => "1 queue".to_owned(),
            n => format!("{n} queues"),
        };
        let files = match &self.files[..] {
            [] => return format!("no file, {queues}"),
            [file] => file.clone(),
            files => format!("{} files", files.len()),
        };
        let files = match self.servers {
            0 | 1 => files,
            n => format!("{files} in {n} servers"),
        };
        let how = if self.direct { "O_DIRECT" } else { "buffered" };
        let flushes = self
            .flushes
            .map_or_else(|| "flushes not looked at".to_owned(), Flushed::words);
        format!("{files}, {how}, {queues}, {flushes}")
    }
}

impl Running {
    /// Where the load of disk `n` looks for the times of stages: the first one's asks for all disks.
    pub(crate) fn control_of(&self, n: u64) -> Option<PathBuf> {
        self.control.clone().filter(|_| n == 0)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends the server, cleanly where it can; what it said on standard error.
    pub(crate) fn stop(self) -> Result<String> {
        if self.killed {
            self.process.kill()
        } else {
            self.process.stop()
        }
    }

    /// An error of the load, with the server's words where it has some.
    pub(crate) fn failed(&self, error: &Error) -> Error {
        self.process.failed(&format!("({error})"))
    }

    /// Looks at the server's open files: the images among them, and how they are open.
    pub(crate) fn seen(&self, images: &[PathBuf], queues: u16) -> Result<Seen> {
        let pid = self.pid();
        let _client = match &self.targets[..] {
            [Target::Nbd(text), ..] if self.opens_late => {
                let uri = load::nbd::uri(text)?;
                Some(handshake::open(&uri, &handshake::Options::default())?)
            }
            _ => None,
        };
        let mut seen = Seen {
            direct: true,
            queues,
            servers: 1,
            ..Seen::default()
        };
        for image in images {
            let image = fs::canonicalize(image).context(|| image.display().to_string())?;
            let mut open = false;
            let folder = format!("/proc/{pid}/fd");
            for fd in fs::read_dir(&folder).context(|| folder.clone())?.flatten() {
                if fs::read_link(fd.path()).is_ok_and(|path| path == image) {
                    open = true;
                    let number = fd.file_name();
                    let info = format!("/proc/{pid}/fdinfo/{}", number.display());
                    seen.direct &= flags(&fs::read_to_string(info).unwrap_or_default())
                        .is_some_and(|flags| flags & O_DIRECT != 0);
                }
            }
            if !open {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!("{} is not open in the server", image.display()),
                ));
            }
            let name = image.file_name().unwrap_or_default();
            seen.files.push(name.to_string_lossy().into_owned());
            seen.bytes.push(given::bytes(&image).unwrap_or_default());
        }
        Ok(seen)
    }
}

fn flags(fdinfo: &str) -> Option<u32> {
    let line = fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(line.trim(), 8).ok()
}

/// Starts a server; returns when clients can connect. Its sockets and words lie in `work`.
pub(crate) fn start(programs: &Programs, work: &Path, setup: &Setup<'_>) -> Result<Running> {
    let sockets: Vec<PathBuf> = (0..setup.files.len().max(1))
        .map(|n| work.join(format!("s{n}")))
        .collect();
    for socket in &sockets {
        let _ = fs::remove_file(socket);
    }
    let (ready, control) = (work.join("ready.pid"), work.join("control"));
    let _ = fs::remove_file(&ready);
    let _ = fs::remove_file(&control);
    let (name, mut command) = match setup.server {
        Server::Diskplane | Server::DiskplaneUntraced | Server::DiskplaneNbd => {
            ("diskplane", diskplane(programs, setup, &sockets, &control)?)
        }
        Server::Qsd => ("qemu-storage-daemon", qsd(setup, &sockets, &ready)),
        Server::QemuNbd => ("qemu-nbd", qemu_nbd(setup, &sockets, &ready)?),
        Server::Nbdkit => ("nbdkit", nbdkit(setup, &sockets, &ready)?),
        Server::Spdk => ("spdk", spdk(programs, work, &sockets)?),
        Server::Fio | Server::Tool | Server::QemuImg => {
            return Err(Error::invalid("a command is no server"));
        }
    };
    let mut process = Process::start(name, &mut command, work)?;
    process.wait_ready(|process| match setup.server {
        server if server.is_ours() => process.stdout().ends_with('\n'),
        // They write their pid files when everything is set up.
        Server::Qsd | Server::QemuNbd | Server::Nbdkit => {
            fs::read_to_string(&ready).is_ok_and(|text| text.ends_with('\n'))
        }
        _ => UnixStream::connect(&sockets[0]).is_ok(),
    })?;
    let targets = sockets.into_iter().map(|socket| match setup.server {
        Server::DiskplaneNbd | Server::QemuNbd | Server::Nbdkit => {
            Target::Nbd(format!("unix:{}", socket.display()))
        }
        _ => Target::VhostUser(socket),
    });
    Ok(Running {
        targets: targets.collect(),
        command: words(&command),
        control: setup.server.is_ours().then_some(control),
        opens_late: setup.server == Server::Nbdkit,
        killed: setup.server == Server::Spdk,
        process,
    })
}

pub(crate) fn words(command: &Command) -> Vec<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect()
}

/// A path as a value in a list with commas.
pub(crate) fn value(path: &Path) -> OsString {
    path.to_string_lossy().replace(',', ",,").into()
}

pub(crate) fn joined(parts: &[&dyn AsRef<OsStr>]) -> OsString {
    let mut all = OsString::new();
    for part in parts {
        all.push(part.as_ref());
    }
    all
}

fn diskplane(
    programs: &Programs,
    setup: &Setup<'_>,
    sockets: &[PathBuf],
    control: &Path,
) -> Result<Command> {
    let mut command = Command::new(&programs.diskplane);
    command.arg("serve").arg("--stats=json");
    command.arg("--control").arg(control);
    let nbd = setup.server == Server::DiskplaneNbd;
    match (setup.files, sockets) {
        ([_, _, ..], _) => {
            command.args(["-f", setup.format]);
            let export = if nbd { ",nbd=unix:" } else { ",vhost-user=" };
            for (file, socket) in setup.files.iter().zip(sockets) {
                command
                    .arg("--disk")
                    .arg(joined(&[&value(file), &export, &value(socket)]));
            }
        }
        (files, [socket, ..]) => {
            match files {
                [file, ..] => command.args(["-f", setup.format]).arg(file),
                [] => command.arg(format!("null:{NULL}")),
            };
            if nbd {
                command.arg("--nbd").arg(joined(&[&"unix:", &socket]));
            } else {
                command.arg("--vhost-user").arg(socket);
            }
        }
        (_, []) => {}
    }
    command
        .args(["--queues", &setup.queues.to_string()])
        .args(["--io-threads", &setup.io_threads.to_string()])
        .args(["--cache", setup.cache()?]);
    if setup.engine != "auto" {
        command.args(["--aio", setup.engine]);
    }
    if let Some(bytes) = setup.table_cache {
        command.arg("--metadata-cache").arg(bytes.to_string());
    }
    if setup.server == Server::DiskplaneUntraced {
        command.args(["--trace-ring", "0"]);
    }
    if setup.read_only {
        command.arg("--read-only");
    }
    if let Some(folder) = setup.backing.as_deref().and_then(Path::parent) {
        command.arg("--allow-backing").arg(folder);
    }
    match setup.polling {
        Polling::Default | Polling::Adaptive => {}
        Polling::Never => {
            command.args(["--poll-max", "0"]);
        }
        Polling::Busy => {
            command.arg("--poll");
        }
    }
    Ok(command)
}

fn qsd(setup: &Setup<'_>, sockets: &[PathBuf], ready: &Path) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    let poll_ns: Option<u64> = match setup.polling {
        // Without an iothread it never spins.
        Polling::Default | Polling::Never => None,
        // The default of an iothread.
        Polling::Adaptive => Some(32_768),
        Polling::Busy => Some(1_000_000_000),
    };
    let mut thread = "";
    if let Some(ns) = poll_ns {
        command
            .arg("--object")
            .arg(format!("iothread,id=thread,poll-max-ns={ns}"));
        thread = ",iothread=thread";
    }
    let on = |yes| if yes { "on" } else { "off" };
    let cache = format!(
        "cache.direct={},cache.no-flush={}",
        on(setup.direct),
        on(setup.drops_flushes)
    );
    let engine = setup.engine;
    let locking = setup.locking();
    let file_node = |file: &Path, id: &str, rest: &str| {
        let driver = file_driver(file);
        joined(&[
            &format!(
                "driver={driver},node-name={id},{cache},aio={engine},discard=unmap,locking={locking}{rest},filename="
            ),
            &value(file),
        ])
    };
    if setup.files.is_empty() {
        // Its zeros need not even be written: the cheaper half of what diskplane's null disk does.
        command
            .arg("--blockdev")
            .arg(format!("driver=null-co,node-name=d0,size={NULL}"));
    }
    for (n, file) in setup.files.iter().enumerate() {
        let format = setup.format;
        command
            .arg("--blockdev")
            .arg(file_node(file, &format!("f{n}"), ""));
        let mut node = format!("driver={format},node-name=d{n},file=f{n},discard=unmap");
        if setup.drops_flushes {
            // A node that is given by name inherits nothing, and what is not flushed here needs no table written first.
            node.push_str(",cache.no-flush=on");
        }
        if let Some(bytes) = setup.table_cache {
            node.push_str(&format!(",l2-cache-size={bytes}"));
        }
        if let Some(bytes) = setup.table_entry {
            node.push_str(&format!(",l2-cache-entry-size={bytes}"));
        }
        if let Some(base) = &setup.backing {
            command
                .arg("--blockdev")
                .arg(file_node(base, "bf", ",read-only=on"))
                .args(["--blockdev", "driver=raw,node-name=b,file=bf,read-only=on"]);
            node.push_str(",backing=b");
        }
        command.arg("--blockdev").arg(node);
    }
    let writable = on(!setup.read_only);
    for (n, socket) in sockets.iter().enumerate() {
        let queues = setup.queues;
        command.arg("--export").arg(joined(&[
            &format!("type=vhost-user-blk,id=e{n},node-name=d{n},writable={writable},num-queues={queues}{thread},addr.type=unix,addr.path="),
            &value(socket),
        ]));
    }
    command.arg("--pidfile").arg(ready);
    command
}

/// QEMU's driver for what it is.
fn file_driver(path: &Path) -> &'static str {
    match given::is_block_device(path) {
        true => "host_device",
        false => "file",
    }
}

fn qemu_nbd(setup: &Setup<'_>, sockets: &[PathBuf], ready: &Path) -> Result<Command> {
    if setup.files.len() != 1 || sockets.len() != 1 {
        return Err(Error::unsupported("qemu-nbd serves one file"));
    }
    let (format, locking) = (setup.format, setup.locking());
    let node = |file: &PathBuf| {
        let options = format!(
            "driver={format},file.driver={},file.locking={locking},file.filename=",
            file_driver(file)
        );
        joined(&[&options, &value(file)])
    };
    let mut command = Command::new("qemu-nbd");
    command
        .args(["--persistent", "--discard", "unmap"])
        .args(["--shared", &setup.queues.max(1).to_string()])
        .args(["--cache", setup.cache()?])
        .arg("--aio")
        .arg(setup.engine)
        .arg("--pid-file")
        .arg(ready)
        .arg("--socket")
        .args(sockets)
        .arg("--image-opts")
        .args(setup.files.iter().map(node));
    Ok(command)
}

/// nbdkit on a raw file, or a disk of zeros. It has no `O_DIRECT`; the nearest thing is to have it drop what it has read or written from
/// the page cache. How many requests of a connection it does at a time is its own default (16 threads).
fn nbdkit(setup: &Setup<'_>, sockets: &[PathBuf], ready: &Path) -> Result<Command> {
    let cannot = |what: &str| Err(Error::unsupported(format!("nbdkit {what}")));
    if setup.drops_flushes || setup.writethrough {
        return cannot("has no modes that ignore flushes or make each write durable");
    }
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--newstyle"]);
    command.arg("--pidfile").arg(ready);
    command.arg("--unix").args(sockets.first());
    if setup.read_only {
        command.arg("--readonly");
    }
    match setup.files {
        [] => command.args(["null".to_owned(), NULL.to_string()]),
        [file] if setup.format == "raw" => {
            command.args(["file", "cache=none"]);
            command.arg(joined(&[&"file=", file]))
        }
        [_] => return cannot("serves raw files"),
        _ => return cannot("serves one file"),
    };
    Ok(command)
}

/// SPDK's target with a null device: no huge pages, one core, spinning.
fn spdk(programs: &Programs, work: &Path, sockets: &[PathBuf]) -> Result<Command> {
    let Some(program) = &programs.spdk else {
        return Err(process::missing("spdk_tgt"));
    };
    let (Some(socket), config) = (sockets[0].file_name(), work.join("spdk.json")) else {
        return Err(Error::invalid("no socket"));
    };
    let text = serde_json::json!({ "subsystems": [
        { "subsystem": "bdev", "config": [{ "method": "bdev_null_create", "params": {
            "name": "Null0", "num_blocks": NULL / 512, "block_size": 512 } }] },
        { "subsystem": "vhost_blk", "config": [{ "method": "vhost_create_blk_controller", "params": {
            "ctrlr": socket.to_string_lossy(), "dev_name": "Null0", "cpumask": "0x1" } }] },
    ] });
    fs::write(&config, text.to_string()).context(|| config.display().to_string())?;
    let mut command = Command::new(program);
    command
        .args(["-m", "0x1", "--no-huge", "-s", "512", "-S"])
        .arg(work)
        .arg("-r")
        .arg(work.join("spdk.rpc"))
        .arg("-c")
        .arg(config);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_servers_have_open_is_told_of_all() {
        let of = |name: &str, direct| Seen {
            files: vec![name.to_owned()],
            bytes: vec![name.len() as u64],
            direct,
            queues: 2,
            servers: 1,
            flushes: None,
        };
        assert_eq!(Seen::all(std::iter::empty()), None);
        assert_eq!(Seen::all([of("a", true)].into_iter()), Some(of("a", true)));
        // One that is buffered is enough for all not to be.
        for (direct, all) in [([true, true, true], true), ([true, false, true], false)] {
            let names = ["a", "bb", "ccc"].into_iter().zip(direct);
            let seen = Seen::all(names.map(|(name, direct)| of(name, direct))).unwrap();
            let expected = Seen {
                files: ["a", "bb", "ccc"].map(str::to_owned).into(),
                bytes: vec![1, 2, 3],
                direct: all,
                queues: 2,
                servers: 3,
                flushes: None,
            };
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn flags_are_read() {
        assert_eq!(
            flags("pos:\t0\nflags:\t0140002\nmnt_id:\t29\n").map(|f| f & O_DIRECT != 0),
            Some(true)
        );
        assert_eq!(
            flags("pos:\t0\nflags:\t0100002\n").map(|f| f & O_DIRECT != 0),
            Some(false)
        );
        assert_eq!(flags(""), None);
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        assert_eq!(value(Path::new("/a,b/c")), "/a,,b/c");
    }
}
