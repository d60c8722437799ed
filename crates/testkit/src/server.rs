//! A server under test: `diskplane serve`, or a peer in its place.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::command::{Failure, Output};
use crate::process::{POLL, Process};

/// How long a server may take until its sockets listen.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// How long a server may take to finish what is in flight, flush and close.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How long one that is asked how it does may take to answer.
const DESCRIBE_LIMIT: Duration = Duration::from_secs(5);

/// The command line of a `diskplane serve`, built up option by option.
#[derive(Debug, Clone)]
pub struct Serve {
    program: PathBuf,
    args: Vec<OsString>,
}

impl Serve {
    /// `PROGRAM serve IMAGE`; the program is what [`crate::diskplane`] returns.
    pub fn new(program: impl AsRef<Path>, image: impl AsRef<Path>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: vec!["serve".into(), image.as_ref().as_os_str().to_owned()],
        }
    }

    /// One more argument, as it is.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// `-f FORMAT`.
    pub fn format(self, format: &str) -> Self {
        self.arg("-f").arg(format)
    }

    /// `--vhost-user SOCKET`.
    pub fn vhost_user(self, socket: impl AsRef<Path>) -> Self {
        self.arg("--vhost-user").arg(socket.as_ref())
    }

    /// `--nbd unix:SOCKET`.
    pub fn nbd_unix(self, socket: impl AsRef<Path>) -> Self {
        self.arg("--nbd")
            .arg(format!("unix:{}", socket.as_ref().display()))
    }

    /// `--queues N`.
    pub fn queues(self, queues: usize) -> Self {
        self.arg("--queues").arg(queues.to_string())
    }

    /// `--io-threads N`.
    pub fn io_threads(self, threads: usize) -> Self {
        self.arg("--io-threads").arg(threads.to_string())
    }

    /// `--aio ENGINE`.
    pub fn aio(self, engine: &str) -> Self {
        self.arg("--aio").arg(engine)
    }

    /// `--cache MODE`.
    pub fn cache(self, mode: &str) -> Self {
        self.arg("--cache").arg(mode)
    }

    /// `--read-only`.
    pub fn read_only(self) -> Self {
        self.arg("--read-only")
    }

    /// `--stats`: the statistics are in the output of [`Server::stop`].
    pub fn stats(self) -> Self {
        self.arg("--stats")
    }

    /// Starts the server and waits until it says that every socket listens.
    #[track_caller]
    pub fn start(&self) -> Server {
        match self.try_start() {
            Ok(server) => server,
            Err(failure) => panic!("{failure}"),
        }
    }

    /// As [`Self::start`], with the failure returned: how a refused image is tested.
    pub fn try_start(&self) -> Result<Server, Failure> {
        let mut process = Process::start(Command::new(&self.program).args(&self.args))?;
        let ready = process.wait_for_line("ready", READY_LIMIT)?;
        Ok(Server { process, ready })
    }
}

/// `qemu-storage-daemon` serving one image over vhost-user-blk: the peer to hold guests and figures against.
#[track_caller]
pub fn storage_daemon(
    format: &str,
    image: impl AsRef<Path>,
    socket: impl AsRef<Path>,
    queues: usize,
) -> Server {
    let pid_file = socket.as_ref().with_extension("pid");
    let _ = std::fs::remove_file(&pid_file);
    let (image, path) = (image.as_ref().display(), socket.as_ref().display());
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!(
        "driver=file,node-name=file,filename={image},discard=unmap"
    ));
    command.arg("--blockdev").arg(format!(
        "driver={format},node-name=disk,file=file,discard=unmap"
    ));
    command.arg("--export").arg(format!(
        "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={path},writable=on,num-queues={queues}"
    ));
    command.arg("--pidfile").arg(&pid_file);
    let start = || -> Result<Server, Failure> {
        let mut process = Process::start(&mut command)?;
        // It writes its pid file when all that the command line asks for is set up.
        let deadline = Instant::now() + READY_LIMIT;
        while !pid_file.exists() {
            if let Some(status) = process.has_ended() {
                return Err(process.ended_wrongly("ended before it was ready", status));
            }
            if Instant::now() >= deadline {
                return Err(process.describe("was not ready in time"));
            }
            std::thread::sleep(POLL);
        }
        Ok(Server {
            process,
            ready: String::new(),
        })
    };
    let mut start = start;
    match start() {
        Ok(server) => server,
        Err(failure) => panic!("{failure}"),
    }
}

/// A running server. Dropping it kills it; a test that cares for the image calls [`Server::stop`].
pub struct Server {
    process: Process,
    ready: String,
}

impl Server {
    /// The line that said it was ready.
    pub fn ready_line(&self) -> &str {
        &self.ready
    }

    /// Its process id, for `/proc`.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has printed on standard error until now.
    pub fn stderr_so_far(&self) -> String {
        self.process.stderr_so_far()
    }

    /// What it has printed on standard output until now.
    pub fn stdout_so_far(&self) -> String {
        self.process.stdout_so_far()
    }

    /// Sends a signal (`SIGUSR1` asks for statistics).
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// What there is to know of a server whose client complains: all that it has printed, with the statistics that it is
    /// asked for, and what its threads do.
    pub fn describe(&self, problem: &str) -> Failure {
        self.signal(Signal::USR1);
        let asked = Instant::now();
        while !self.stderr_so_far().contains("operation") && asked.elapsed() < DESCRIBE_LIMIT {
            std::thread::sleep(POLL);
        }
        self.process.describe(problem)
    }

    /// SIGTERM, and then exit status 0 in time. Returns all that it has printed.
    #[track_caller]
    pub fn stop(self) -> Output {
        match self.try_stop() {
            Ok(output) => output,
            Err(failure) => panic!("{failure}"),
        }
    }

    /// As [`Self::stop`], with the failure returned.
    pub fn try_stop(mut self) -> Result<Output, Failure> {
        // One that has ended on its own did not wait to be stopped: that is a crash, whatever its status.
        if let Some(status) = self.process.has_ended() {
            return Err(self
                .process
                .ended_wrongly("ended before it was stopped", status));
        }
        self.process.signal(Signal::TERM);
        let status = self.process.wait(STOP_LIMIT)?;
        if !status.success() {
            return Err(self
                .process
                .ended_wrongly("did not stop cleanly at SIGTERM", status));
        }
        let (stdout, stderr) = self.process.output();
        Ok(Output { stdout, stderr })
    }

    /// `kill -9`: nothing is flushed, nothing is closed.
    pub fn kill(mut self) {
        self.process.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TempDir, qemu};

    /// A stand-in for the server: a shell script with the same manners.
    fn script(body: &str) -> Serve {
        Serve {
            program: "sh".into(),
            args: vec!["-c".into(), body.into()],
        }
    }

    #[test]
    fn a_server_is_ready_when_it_says_so_and_stops_clean() {
        let server = script(
            "trap 'echo bye >&2; exit 0' TERM; echo ready one; while :; do sleep 0.05; done",
        )
        .start();
        assert_eq!(server.ready_line(), "ready one");
        assert_eq!(server.stop().stderr, "bye\n");
    }

    #[test]
    fn a_server_that_ends_before_it_is_ready_is_a_failure_with_its_output() {
        let failure = script("echo the image is damaged >&2; exit 1")
            .try_start()
            .map(|_| ())
            .unwrap_err();
        assert!(failure.contains("the image is damaged"), "{failure}");
        assert!(failure.contains("exit status: 1"), "{failure}");
    }

    #[test]
    fn a_server_that_fails_at_the_end_is_a_failure() {
        let server = script("trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done").start();
        let failure = server.try_stop().unwrap_err();
        assert!(failure.contains("exit status: 5"), "{failure}");
    }

    #[test]
    fn a_server_is_described_with_its_threads_and_statistics() {
        let server = script(
            "trap 'echo operation reads >&2' USR1; echo ready; while :; do sleep 0.05; done",
        )
        .start();
        let failure = server.describe("the client gave up");
        for part in ["the client gave up", "operation reads", " ticks, "] {
            assert!(failure.contains(part), "{part:?} is not in: {failure}");
        }
    }

    #[test]
    fn the_storage_daemon_serves() {
        let dir = TempDir::new();
        let image = dir.path("a.qcow2");
        qemu::create("qcow2", &image, "1M");
        let server = storage_daemon("qcow2", &image, dir.path("a.sock"), 1);
        assert!(dir.path("a.sock").exists());
        server.stop();
    }
}
