//! Starting the servers: the same files, `O_DIRECT`, the same queues, and the check that it is so.

use super::{
    cell::{Image, Polling, Server, Side},
    command,
    image::{Images, NULL},
    process::{self, Process},
};
use crate::load::Target;
use block::{Context, Error, ErrorKind, Result};
use serde::Serialize;
use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

/// `O_DIRECT` in the octal flags of `/proc/PID/fdinfo`.
const O_DIRECT: u32 = libc::O_DIRECT.cast_unsigned();

/// The programs of a run.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    /// This executable.
    pub diskplane: PathBuf,
    /// `--cache` of the servers: `none`, or `writeback` where the file system has no `O_DIRECT`.
    pub direct: bool,
    pub spdk: Option<PathBuf>,
}

/// How the peer does its I/O. Diskplane picks its own (`--aio auto`).
pub(super) const ENGINES: [&str; 3] = ["io_uring", "native", "threads"];

/// The variants of a side that are tried; the best one counts.
pub(super) fn variants(side: &Side) -> &'static [&'static str] {
    match side.server {
        // A disk that rests or has no file needs no engine.
        Server::Qsd | Server::QemuNbd if !matches!(side.image, Image::Null | Image::Many(_)) => {
            &ENGINES
        }
        Server::Qsd if side.image != Image::Null => &ENGINES[..1],
        Server::QemuImg => side.job.map_or(&[], command::variants),
        _ => &["auto"],
    }
}

/// A side at work.
#[derive(Debug)]
pub(super) struct Running {
    process: Process,
    /// Where each disk's load goes.
    pub targets: Vec<Target>,
    /// How it was started.
    pub command: Vec<String>,
    /// The statistics that a stopped diskplane prints.
    pub has_statistics: bool,
    /// It is killed at the end: SPDK's target waits for seconds for a session that its client has left.
    killed: bool,
}

/// What both sides of a comparison must have in common, as seen from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// The files that the server has open, without their folder.
    pub files: Vec<String>,
    /// Their sizes in bytes.
    pub bytes: Vec<u64>,
    /// All of them are open with `O_DIRECT`.
    pub direct: bool,
    /// Queues that clients were offered, as asked for.
    pub queues: u16,
}

impl Running {
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends the server, cleanly where it can; what it said on standard error.
    pub(super) fn stop(self) -> Result<String> {
        if self.killed {
            self.process.kill()
        } else {
            self.process.stop()
        }
    }

    /// An error of the load, with the server's words where it has some.
    pub(super) fn failed(&self, error: &Error) -> Error {
        self.process.failed(&format!("({error})"))
    }

    /// Looks at the server's open files: the images among them, and how they are open.
    pub(super) fn seen(&self, images: &[PathBuf], queues: u16) -> Result<Seen> {
        let pid = self.pid();
        let mut seen = Seen {
            direct: true,
            queues,
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
            seen.bytes
                .push(fs::metadata(&image).map_or(0, |meta| meta.len()));
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

/// Starts a side's server on the files that are there; returns when clients can connect. Its sockets and words go to
/// `work`. Of those that others have open too, QEMU takes no locks then (`shared`).
pub(super) fn start(
    programs: &Programs,
    images: &Images,
    side: &Side,
    engine: &str,
    files: &[PathBuf],
    work: &Path,
    shared: bool,
) -> Result<Running> {
    let sockets: Vec<PathBuf> = (0..side.image.disks())
        .map(|n| work.join(format!("s{n}")))
        .collect();
    for socket in &sockets {
        let _ = fs::remove_file(socket);
    }
    let ready = work.join("ready.pid");
    let _ = fs::remove_file(&ready);
    let mut command = match side.server {
        Server::Diskplane | Server::DiskplaneUntraced | Server::DiskplaneNbd => {
            diskplane(programs, images, side, files, &sockets)
        }
        Server::Qsd | Server::QemuNbd => {
            let qemu = Qemu {
                programs,
                side,
                engine,
                files,
                sockets: &sockets,
                ready: &ready,
                locking: if shared { "off" } else { "auto" },
            };
            match side.server {
                Server::Qsd => qemu.storage_daemon(images),
                _ => qemu.nbd(),
            }
        }
        Server::Spdk => spdk(programs, work, &sockets)?,
        Server::Fio | Server::Tool | Server::QemuImg => {
            return Err(Error::invalid("a command is no server"));
        }
    };
    let name = match side.server {
        Server::Diskplane | Server::DiskplaneUntraced | Server::DiskplaneNbd => "diskplane",
        Server::Qsd => "qemu-storage-daemon",
        Server::QemuNbd => "qemu-nbd",
        _ => "spdk",
    };
    let mut process = Process::start(name, &mut command, work)?;
    process.wait_ready(|process| match side.server {
        Server::Diskplane | Server::DiskplaneUntraced | Server::DiskplaneNbd => {
            process.stdout().ends_with('\n')
        }
        // They write their pid files when everything is set up.
        Server::Qsd | Server::QemuNbd => {
            fs::read_to_string(&ready).is_ok_and(|text| text.ends_with('\n'))
        }
        _ => UnixStream::connect(&sockets[0]).is_ok(),
    })?;
    let targets = sockets.into_iter().map(|socket| match side.server {
        Server::DiskplaneNbd | Server::QemuNbd => Target::Nbd(format!("unix:{}", socket.display())),
        _ => Target::VhostUser(socket),
    });
    Ok(Running {
        targets: targets.collect(),
        command: words(&command),
        has_statistics: matches!(
            side.server,
            Server::Diskplane | Server::DiskplaneUntraced | Server::DiskplaneNbd
        ),
        killed: side.server == Server::Spdk,
        process,
    })
}

pub(super) fn words(command: &Command) -> Vec<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect()
}

/// A path as a value in a list with commas.
fn value(path: &Path) -> OsString {
    path.to_string_lossy().replace(',', ",,").into()
}

fn joined(parts: &[&dyn AsRef<OsStr>]) -> OsString {
    let mut all = OsString::new();
    for part in parts {
        all.push(part.as_ref());
    }
    all
}

fn diskplane(
    programs: &Programs,
    images: &Images,
    side: &Side,
    files: &[PathBuf],
    sockets: &[PathBuf],
) -> Command {
    let mut command = Command::new(&programs.diskplane);
    command.arg("serve").arg("--stats=json");
    let nbd = side.server == Server::DiskplaneNbd;
    match (files, sockets) {
        ([_, _, ..], _) => {
            command.args(["-f", side.image.format()]);
            for (file, socket) in files.iter().zip(sockets) {
                command
                    .arg("--disk")
                    .arg(joined(&[&value(file), &",vhost-user=", &value(socket)]));
            }
        }
        (files, [socket, ..]) => {
            match files {
                [file, ..] => command.args(["-f", side.image.format()]).arg(file),
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
        .args(["--queues", &side.queues.to_string()])
        .args(["--io-threads", &side.io_threads.to_string()])
        .args([
            "--cache",
            if programs.direct { "none" } else { "writeback" },
        ]);
    if side.server == Server::DiskplaneUntraced {
        command.args(["--trace-ring", "0"]);
    }
    if side.image == Image::ScatteredFile {
        command.arg("--read-only");
    }
    if matches!(side.image, Image::Overlay | Image::Subclusters)
        && let Some(folder) = images.base().parent()
    {
        command.arg("--allow-backing").arg(folder);
    }
    if side.polling == Polling::Busy {
        command.arg("--poll");
    }
    command
}

fn cache(programs: &Programs) -> &'static str {
    if programs.direct { "on" } else { "off" }
}

/// A server of QEMU's, to be.
struct Qemu<'a> {
    programs: &'a Programs,
    side: &'a Side,
    engine: &'a str,
    files: &'a [PathBuf],
    sockets: &'a [PathBuf],
    ready: &'a Path,
    /// Whether it locks its files: `auto` or `off`.
    locking: &'a str,
}

impl Qemu<'_> {
    fn storage_daemon(&self, images: &Images) -> Command {
        let Self {
            programs,
            side,
            engine,
            files,
            sockets,
            ready,
            locking,
        } = *self;
        let mut command = Command::new("qemu-storage-daemon");
        let poll_ns: Option<u64> = match side.polling {
            Polling::Default => None,
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
        let direct = cache(programs);
        let file_node = |file: &Path, id: &str, rest: &str| {
            joined(&[
                &format!(
                    "driver=file,node-name={id},cache.direct={direct},aio={engine},discard=unmap,locking={locking}{rest},filename="
                ),
                &value(file),
            ])
        };
        if files.is_empty() {
            // Its zeros need not even be written: the cheaper half of what diskplane's null disk does.
            command
                .arg("--blockdev")
                .arg(format!("driver=null-co,node-name=d0,size={NULL}"));
        }
        for (n, file) in files.iter().enumerate() {
            let format = side.image.format();
            command
                .arg("--blockdev")
                .arg(file_node(file, &format!("f{n}"), ""));
            let mut node = format!("driver={format},node-name=d{n},file=f{n},discard=unmap");
            if matches!(side.image, Image::Overlay | Image::Subclusters) {
                command
                    .arg("--blockdev")
                    .arg(file_node(&images.base(), "bf", ",read-only=on"))
                    .args(["--blockdev", "driver=raw,node-name=b,file=bf,read-only=on"]);
                node.push_str(",backing=b");
            }
            command.arg("--blockdev").arg(node);
        }
        for (n, socket) in sockets.iter().enumerate() {
            let queues = side.queues;
            command.arg("--export").arg(joined(&[
            &format!("type=vhost-user-blk,id=e{n},node-name=d{n},writable=on,num-queues={queues}{thread},addr.type=unix,addr.path="),
            &value(socket),
        ]));
        }
        command.arg("--pidfile").arg(ready);
        command
    }

    fn nbd(&self) -> Command {
        let Self {
            programs,
            side,
            engine,
            files,
            sockets,
            ready,
            locking,
        } = *self;
        let format = side.image.format();
        let node = |file: &PathBuf| {
            let options =
                format!("driver={format},file.driver=file,file.locking={locking},file.filename=");
            joined(&[&options, &value(file)])
        };
        let mut command = Command::new("qemu-nbd");
        command
            .args(["--persistent", "--discard", "unmap"])
            .args(["--shared", &side.queues.max(1).to_string()])
            .args([
                "--cache",
                if programs.direct { "none" } else { "writeback" },
            ])
            .arg("--aio")
            .arg(engine)
            .arg("--pid-file")
            .arg(ready)
            .arg("--socket")
            .args(sockets)
            .arg("--image-opts")
            .args(files.iter().map(node));
        command
    }
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
