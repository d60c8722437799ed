//! Boots the guest that `scripts/guest-build.sh` makes: a Debian kernel and an initramfs whose init (`guest/init`, which documents
//! scenarios, parameters and the lines that it reports) does what the kernel's command line says, and powers off.
//!
//! ```text
//!   serial port 0   its console           a file
//!   serial port 1   what it reports       a file
//!   memory          a memfd that vhost-user servers map
//!   disks           are added to the command by who boots it
//! ```
//!
//! Tests and experiments boot it; who waits for it, and for how long, is theirs.

use block::{Context, Error, ErrorKind, Result};
use std::{
    ffi::OsString,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// How often who waits for a turn looks.
const TURN_LOOK: Duration = Duration::from_millis(50);

/// What the folder of a guest has.
const PARTS: [&str; 3] = ["vmlinuz", "initramfs.img", "accel"];

/// A guest that is built.
#[derive(Clone, Debug)]
pub struct Guest {
    folder: PathBuf,
}

/// How it is booted.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    /// QEMU's machine: `q35`, or `pc`, which has an IDE bus too.
    pub machine: &'a str,
    /// Its processors; where not given, as many as its loads bear ([`Guest::command`]).
    pub cpus: Option<usize>,
    /// MiB of memory.
    pub memory_mib: usize,
    /// The initramfs, where it is not the guest's own.
    pub initramfs: Option<&'a Path>,
    /// The file of its console.
    pub console: &'a Path,
    /// The file of what it reports.
    pub results: &'a Path,
    /// Parameters of its init: `dp.run=… dp.NAME=VALUE …`.
    pub parameters: &'a str,
}

impl Guest {
    /// That in a folder.
    ///
    /// # Errors
    ///
    /// It is not built: what lacks, and how to build it.
    pub fn at(folder: &Path) -> Result<Self> {
        for path in PARTS.map(|part| folder.join(part)) {
            if !path.exists() {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "the guest is not built: {} is not there (run scripts/guest-build.sh)",
                        path.display()
                    ),
                ));
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// Its initramfs.
    pub fn initramfs(&self) -> PathBuf {
        self.folder.join("initramfs.img")
    }

    /// Waits until no other guest runs, `limit` at most: two emulated ones on two cores only wait for each other. The turn goes with the
    /// file, also when its process is killed.
    ///
    /// # Errors
    ///
    /// The folder cannot be written; another guest had its turn all the time.
    pub fn take_turn(&self, limit: Duration) -> Result<File> {
        let path = self.folder.join("turn");
        let named = || path.display().to_string();
        let file = File::create(&path).context(named)?;
        let began = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(error).context(named),
                Err(TryLockError::WouldBlock) if began.elapsed() >= limit => {
                    return Err(Error::new(
                        ErrorKind::Locked,
                        format!(
                            "{}: another guest is at work, and did not end within {} s: wait for it, or end its qemu-system-x86_64",
                            named(),
                            limit.as_secs()
                        ),
                    ));
                }
                Err(TryLockError::WouldBlock) => thread::sleep(TURN_LOOK),
            }
        }
    }

    /// Whether KVM runs it, as whoever built it found out; should it be gone since then, emulation still works.
    fn has_kvm(&self) -> bool {
        let found = fs::read_to_string(self.folder.join("accel")).unwrap_or_default();
        let open = || File::options().read(true).write(true).open("/dev/kvm");
        found.trim() == "kvm" && open().is_ok()
    }

    /// QEMU with this guest, without disks. Where the number of processors is open it gets two under KVM and one under emulation: an emulated
    /// second one of the machine `pc` loses its timer now and then ("Possible timer handling issue"), and all stands still.
    pub fn command(&self, boot: &Boot<'_>) -> Command {
        let kvm = self.has_kvm();
        let mut command = Command::new("qemu-system-x86_64");
        let machine = format!("{},memory-backend=mem", boot.machine);
        command.args(["-machine", &machine]);
        match kvm {
            true => command.args(["-accel", "kvm", "-cpu", "host"]),
            false => command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]),
        };
        let cpus = boot.cpus.unwrap_or(if kvm { 2 } else { 1 });
        let memory = format!("{}M", boot.memory_mib);
        command.args(["-smp", &cpus.to_string(), "-m", &memory]);
        // A vhost-user server maps the guest's memory, so it has to be a file that can be shared.
        let backend = format!("memory-backend-memfd,id=mem,size={memory},share=on");
        command.args(["-object", &backend]);
        command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        for port in [boot.console, boot.results] {
            // Of this form all is the name.
            let mut file = OsString::from("file:");
            file.push(port);
            command.arg("-serial").arg(file);
        }
        let own = self.initramfs();
        command.arg("-kernel").arg(self.folder.join("vmlinuz"));
        command.arg("-initrd").arg(boot.initramfs.unwrap_or(&own));
        // The guest is trusted: mitigations only make an emulated processor slower.
        command.arg("-append").arg(format!(
            "console=ttyS0 panic=-1 quiet mitigations=off {}",
            boot.parameters
        ));
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacks_is_named_and_a_command_has_what_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        for part in PARTS {
            let error = Guest::at(dir.path()).unwrap_err().to_string();
            assert!(
                error.contains(part) && error.contains("guest-build.sh"),
                "{error}"
            );
            fs::write(dir.path().join(part), "tcg\n").unwrap();
        }
        let guest = Guest::at(dir.path()).unwrap();
        let boot = Boot {
            machine: "pc",
            cpus: None,
            memory_mib: 512,
            initramfs: None,
            console: Path::new("/a,b/console"),
            results: Path::new("results"),
            parameters: "dp.run=x",
        };
        let words = |boot: &Boot<'_>| {
            let command = guest.command(boot);
            let words = command
                .get_args()
                .map(|word| word.to_string_lossy().into_owned());
            words.collect::<Vec<_>>().join(" ")
        };
        let line = words(&boot);
        for part in [
            "-machine pc,memory-backend=mem",
            "-accel tcg,thread=multi",
            "-smp 1 -m 512M",
            "size=512M,share=on",
            "-serial file:/a,b/console -serial file:results",
            "mitigations=off dp.run=x",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
        let other = Path::new("other.img");
        let line = words(&Boot {
            cpus: Some(3),
            initramfs: Some(other),
            ..boot
        });
        assert!(
            line.contains("-smp 3") && line.contains("-initrd other.img"),
            "{line}"
        );
        // One at a time.
        let turn = guest.take_turn(Duration::ZERO).unwrap();
        let error = guest.take_turn(Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(
            error.to_string().contains("another guest is at work"),
            "{error}"
        );
        let waits = thread::spawn(move || guest.take_turn(Duration::from_secs(60)).map(drop));
        drop(turn);
        waits.join().unwrap().unwrap();
    }
}
