//! A program that runs beside the test: its output is collected, and it never outlives the test.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::command::{Failure, cannot_start, display, ended};

/// How often a state that cannot be waited for is looked at.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// How long the locks of a killed program are waited for, at most: somebody else may have some on the same files.
const UNLOCK_LIMIT: Duration = Duration::from_secs(5);

/// How long the threads of a program that fails are watched.
const LOOK: Duration = Duration::from_millis(500);

/// What arrives on a stream, collected by a thread of its own so that the program never blocks on it.
struct Collector {
    text: Arc<Mutex<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    /// Collects a stream; `each_line` sees every line as it comes, without its end.
    fn new(
        stream: impl Read + Send + 'static,
        mut each_line: impl FnMut(&str) + Send + 'static,
    ) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&text);
        let thread = std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(n) if n > 0) {
                let read = String::from_utf8_lossy(&line).into_owned();
                into.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&read);
                each_line(read.trim_end());
                line.clear();
            }
        });
        Self {
            text,
            thread: Some(thread),
        }
    }

    fn so_far(&self) -> String {
        self.text
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// All of it; to be called when the program has ended.
    fn finish(&mut self) -> String {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a collector does not panic");
        }
        self.so_far()
    }
}

/// A running program. Dropping it kills it.
pub(crate) struct Process {
    what: String,
    child: Child,
    stdout: Collector,
    stderr: Collector,
    lines: Receiver<String>,
}

impl Process {
    /// Starts the command.
    pub(crate) fn start(command: &mut Command) -> Result<Self, Failure> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| cannot_start(command, &e))?;
        let (sender, lines) = channel();
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        // Nobody may be listening any more; then the line is in the collected text all the same.
        let stdout = Collector::new(stdout, move |line| drop(sender.send(line.to_owned())));
        Ok(Self {
            what: display(command),
            child,
            stdout,
            stderr: Collector::new(stderr, |_| ()),
            lines,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn stdout_so_far(&self) -> String {
        self.stdout.so_far()
    }

    pub(crate) fn stderr_so_far(&self) -> String {
        self.stderr.so_far()
    }

    /// Waits for a line on standard output that begins with `prefix`. A failure when the program ends or
    /// the time is up before it came.
    pub(crate) fn wait_for_line(
        &mut self,
        prefix: &str,
        limit: Duration,
    ) -> Result<String, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            match self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) if line.starts_with(prefix) => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(
                        self.describe(&format!("no line '{prefix}…' within {} s", limit.as_secs()))
                    );
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.wait(limit)?;
                    return Err(
                        self.ended_wrongly(&format!("ended before a line '{prefix}…'"), status)
                    );
                }
            }
        }
    }

    /// Whether it has ended, and how.
    pub(crate) fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .unwrap_or_else(|e| panic!("cannot wait for {}: {e}", self.what))
    }

    /// Waits for the end.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<ExitStatus, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.has_ended() {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(self.describe(&format!("did not end within {} s", limit.as_secs())));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Sends a signal. That the program is gone already is no error: it shows when its status is looked at.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        // A child that was not waited for keeps its number, so that no stranger can be hit.
        let _ = kill_process(pid, signal);
    }

    /// Kills it (SIGKILL) and waits until it is gone, and with it the locks on its files: the kernel takes the
    /// `io_uring` of a killed process apart in the background, and its files stay open until then.
    pub(crate) fn kill(&mut self) {
        // One that was waited for has no number any more.
        if self.child.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        let files = open_files(self.pid());
        let _ = self.child.kill();
        let _ = self.child.wait();
        let killed = Instant::now();
        while locks(&files) > 0 && killed.elapsed() < UNLOCK_LIMIT {
            std::thread::sleep(POLL);
        }
    }

    /// The collected output after the end.
    pub(crate) fn output(&mut self) -> (String, String) {
        (self.stdout.finish(), self.stderr.finish())
    }

    /// A failure of a program that still runs: what it has printed, and what each of its threads does.
    pub(crate) fn describe(&self, problem: &str) -> Failure {
        let threads = self.threads();
        let (stdout, stderr) = (self.stdout_so_far(), self.stderr_so_far());
        Failure::new(format!(
            "{}: {problem}\n  stdout: {}\n  stderr: {}\n  threads:\n{threads}",
            self.what,
            stdout.trim_end(),
            stderr.trim_end()
        ))
    }

    /// A line for each thread: its state, where it is, and the processor time that it has taken and takes: one that
    /// waits for nothing and gets no processor looks otherwise than one that hangs.
    fn threads(&self) -> String {
        let before = threads(self.pid());
        std::thread::sleep(LOOK);
        let lines = threads(self.pid()).into_iter().map(|(id, now)| {
            let then = before.iter().find(|(known, _)| *known == id);
            let more = now.ticks - then.map_or(0, |(_, then)| then.ticks);
            format!(
                "    {} {} in {}, call {}: {} ticks, {more} of them in the last {} ms\n",
                now.name,
                now.state,
                now.place,
                now.call,
                now.ticks,
                LOOK.as_millis()
            )
        });
        lines.collect()
    }

    /// A failure of a program that has ended.
    pub(crate) fn ended_wrongly(&mut self, problem: &str, status: ExitStatus) -> Failure {
        let (stdout, stderr) = self.output();
        ended(
            &format!("{}: {problem}", self.what),
            status,
            &stdout,
            &stderr,
        )
    }
}

/// The inode numbers of the files that a process has open; none when it is gone.
fn open_files(process: u32) -> Vec<u64> {
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd"));
    let descriptors = descriptors.into_iter().flatten().flatten();
    let files = descriptors.filter_map(|one| std::fs::metadata(one.path()).ok());
    let files = files.filter(|file| file.is_file() || file.file_type().is_block_device());
    files.map(|file| file.ino()).collect()
}

/// How many locks there are on files with these inode numbers, whoever has them. A line of `/proc/locks` names the
/// file as `major:minor:inode`, with a device that is not that of `stat` everywhere.
fn locks(files: &[u64]) -> usize {
    let lines = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let inode = |line: &str| {
        let file = line
            .split_whitespace()
            .find(|word| word.contains(':') && !word.ends_with(':'));
        file.and_then(|file| file.rsplit(':').next()?.parse::<u64>().ok())
    };
    let locked = lines.lines().filter_map(inode);
    locked.filter(|inode| files.contains(inode)).count()
}

/// What the kernel tells of a thread.
struct Thread {
    name: String,
    state: String,
    /// The kernel's function in which it sleeps.
    place: String,
    /// The system call with its arguments.
    call: String,
    /// Processor time, in ticks.
    ticks: u64,
}

/// The threads of a process by their numbers; none when it is gone.
fn threads(process: u32) -> Vec<(OsString, Thread)> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let threads = tasks.map(|task| {
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        // Behind the name, which may have spaces in it: the state; the times are the fields 14 and 15 of the line.
        let fields: Vec<_> = (stat.rsplit(')').next().unwrap_or_default())
            .split_whitespace()
            .collect();
        let ticks = [11, 12].map(|n| fields.get(n).and_then(|field| field.parse().ok()));
        let thread = Thread {
            name: read("comm").trim().to_owned(),
            state: fields.first().copied().unwrap_or_default().to_owned(),
            place: read("wchan"),
            call: read("syscall").trim().to_owned(),
            ticks: ticks.iter().flatten().sum::<u64>(),
        };
        (task.file_name(), thread)
    });
    threads.collect()
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TempDir;
    use std::fs::File;

    #[test]
    fn locks_are_found_by_the_file() {
        let dir = TempDir::new();
        let file = File::create(dir.path("file")).unwrap();
        let inode = file.metadata().unwrap().ino();
        assert!(open_files(std::process::id()).contains(&inode));
        assert_eq!(locks(&[inode]), 0);
        file.lock().unwrap();
        assert_eq!(locks(&[inode]), 1);
        drop(file);
        assert_eq!(locks(&[inode]), 0);
        assert!(!open_files(std::process::id()).contains(&inode));
    }
}
