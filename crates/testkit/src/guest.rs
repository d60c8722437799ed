//! A real Linux guest on served disks.
//!
//! The crate `guest` boots it. Guests take the machine for themselves one at a time, whichever test runner starts the tests.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::command::Failure;
use crate::process::{POLL, Process};
use crate::report::Report;
use crate::{Server, TempDir};

/// How long a guest may run if the test says nothing else: ten times what it takes under emulation, since the
/// machine may be busy with other things.
const TIMEOUT: Duration = Duration::from_secs(360);
/// How long guests of other tests, one after the other, may be waited for.
const TURN_LIMIT: Duration = Duration::from_secs(3600);

/// How many lines of the console a failure shows.
const CONSOLE_LINES_MAX: usize = 60;

/// A disk of the guest: the client side of a server's socket. Disks are `/dev/vda`, `/dev/vdb`, … in the
/// order in which they are given.
#[derive(Debug, Clone)]
pub struct Disk {
    socket: PathBuf,
    queues: usize,
    reconnect: bool,
    packed: bool,
}

impl Disk {
    /// A vhost-user-blk disk with one queue.
    pub fn vhost_user(socket: impl AsRef<Path>) -> Self {
        Self {
            socket: socket.as_ref().to_owned(),
            queues: 1,
            reconnect: false,
            packed: false,
        }
    }

    /// The number of virtqueues that the guest is offered; it uses at most one for each of its CPUs.
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    /// Whether QEMU connects again when the server goes away. Without it the guest's requests hang.
    pub fn reconnect(mut self) -> Self {
        self.reconnect = true;
        self
    }

    /// Packed virtqueues, if the server offers them.
    pub fn packed(mut self) -> Self {
        self.packed = true;
        self
    }

    fn arguments(&self, index: usize) -> [String; 4] {
        let reconnect = if self.reconnect {
            ",reconnect-ms=200"
        } else {
            ""
        };
        [
            "-chardev".to_owned(),
            format!(
                "socket,id=c{index},path={}{reconnect}",
                self.socket.display()
            ),
            "-device".to_owned(),
            format!(
                "vhost-user-blk-pci,chardev=c{index},num-queues={},packed={}",
                self.queues,
                if self.packed { "on" } else { "off" }
            ),
        ]
    }
}

/// A guest to be booted.
#[derive(Debug, Clone)]
pub struct Guest {
    append: String,
    disks: Vec<Disk>,
    cpus: usize,
    memory_mb: usize,
    timeout: Duration,
}

impl Guest {
    /// A guest with two CPUs that runs these scenarios: `NAME[:DEVICE]`, separated by commas.
    pub fn new(scenarios: &str) -> Self {
        Self {
            append: format!("dp.run={scenarios}"),
            disks: Vec::new(),
            cpus: 2,
            memory_mb: 1024,
            timeout: TIMEOUT,
        }
    }

    /// One more disk.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// A parameter of `guest/init`: `dp.NAME=VALUE`.
    pub fn parameter(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.append = format!("{} dp.{name}={value}", self.append);
        self
    }

    /// The number of CPUs.
    pub fn cpus(mut self, cpus: usize) -> Self {
        self.cpus = cpus;
        self
    }

    /// How long it may run, boot included.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Boots the guest on the disk that `server` serves, and waits for its result, which must be `ok`.
    #[track_caller]
    pub fn run_on(&self, server: &Server) -> Report {
        match self.boot() {
            Ok(guest) => guest.finish_on(server),
            Err(failure) => panic!("{failure}"),
        }
    }

    /// Boots the guest and waits for its result, which must be `ok`.
    pub fn try_run(&self) -> Result<Report, Failure> {
        self.boot()?.finish()
    }

    /// Boots the guest, to meddle with the server while it runs.
    pub fn boot(&self) -> Result<Running, Failure> {
        let failed = |error: block::Error| Failure::new(error.to_string());
        let guest = guest::Guest::at(&guest_folder()).map_err(failed)?;
        let turn = guest.take_turn(TURN_LIMIT).map_err(failed)?;
        let dir = TempDir::new();
        let mut command = guest.command(&guest::Boot {
            machine: "q35",
            cpus: Some(self.cpus),
            memory_mib: self.memory_mb,
            initramfs: None,
            console: &dir.path("console.log"),
            results: &dir.path("results.log"),
            parameters: &self.append,
        });
        for (index, disk) in self.disks.iter().enumerate() {
            command.args(disk.arguments(index));
        }
        let process = Process::start(&mut command)?;
        Ok(Running {
            process,
            dir,
            started: Instant::now(),
            timeout: self.timeout,
            _turn: turn,
        })
    }
}

/// A guest that is running. Dropping it ends it as a power cut would.
pub struct Running {
    process: Process,
    dir: TempDir,
    started: Instant,
    timeout: Duration,
    _turn: File,
}

impl Running {
    /// Waits until the guest has reported a line that contains `text`, and returns the line.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        loop {
            // Only whole lines: the end of the file may be one that is still being written.
            let results = self.read("results.log");
            let whole = results.rfind('\n').map_or("", |end| &results[..end]);
            if let Some(line) = whole.lines().find(|line| line.contains(text)) {
                return line.to_owned();
            }
            if let Err(failure) = self.check_running(text) {
                panic!("{failure}");
            }
            std::thread::sleep(POLL);
        }
    }

    /// Cuts the guest's power, and returns all the lines that it had reported.
    pub fn cut_power(mut self) -> Vec<String> {
        self.process.kill();
        let results = self.read("results.log");
        let whole = results.rfind('\n').map_or("", |end| &results[..end]);
        whole.lines().map(str::to_owned).collect()
    }

    fn check_running(&mut self, awaited: &str) -> Result<(), Failure> {
        if self.process.has_ended().is_some() {
            return Err(self.failure(&format!("the guest ended before it reported '{awaited}'")));
        }
        if self.started.elapsed() > self.timeout {
            return Err(self.failure(&format!("the guest did not report '{awaited}' in time")));
        }
        Ok(())
    }

    /// Waits for the guest, whose disk `server` serves, to power off; its result must be `ok`.
    #[track_caller]
    pub fn finish_on(mut self, server: &Server) -> Report {
        match self.result() {
            Ok(report) => report,
            Err(failure) => panic!("{failure}\n{}", server.describe("its guest failed")),
        }
    }

    /// Waits for the guest to power off; its result must be `ok`.
    pub fn finish(mut self) -> Result<Report, Failure> {
        self.result()
    }

    fn result(&mut self) -> Result<Report, Failure> {
        let left = self.timeout.saturating_sub(self.started.elapsed());
        match self.process.wait(left) {
            Err(_) => {
                let problem = format!(
                    "the guest was not through after {} s",
                    self.timeout.as_secs()
                );
                return Err(self.failure(&problem));
            }
            Ok(status) if !status.success() => {
                return Err(self.failure(&format!("QEMU ended with {status}")));
            }
            Ok(_) => {}
        }
        let mut report = Report::parse(&self.read("results.log"));
        report.wall = self.started.elapsed();
        match report.values.get("result").map(String::as_str) {
            Some("ok") => Ok(report),
            Some(_) => {
                let step = report.values.get("failed_step").map_or("", String::as_str);
                Err(self.failure(&format!("the guest failed at {step}")))
            }
            None => Err(self.failure("the guest ended without a result")),
        }
    }

    /// What a serial port has received; nothing while QEMU has not made the file.
    fn read(&self, port: &str) -> String {
        let bytes = std::fs::read(self.dir.path(port)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    fn failure(&mut self, problem: &str) -> Failure {
        let console = self.read("console.log");
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(CONSOLE_LINES_MAX)..].join("\n    ");
        self.process
            .describe(&format!("{problem}\n  console:\n    {tail}"))
    }
}

/// Where the guest is: `DISKPLANE_GUEST_DIR`, or `target/guest` in the repository.
pub fn guest_folder() -> PathBuf {
    std::env::var_os("DISKPLANE_GUEST_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest"),
        PathBuf::from,
    )
}
