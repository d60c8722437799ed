//! Servers as children, and the folder in which everything temporary lies. Nothing of either outlives the run:
//! not a normal end, not an error (drop), not ^C ([`stop`]), and servers not even SIGKILL.

use super::{mount, pre_exec};
use block::{Context, Error, ErrorKind, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FallocateFlags, FlockOperation, Mode, OFlags, fallocate, flock, open},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid},
};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How long a server may take until it listens.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to finish, flush and close.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// How long a folder is tried to be removed after ^C, and how long each time waits.
const ABORT_LIMIT: Duration = Duration::from_secs(5);
const ABORT_PAUSE: Duration = Duration::from_millis(50);
const POLL: Duration = Duration::from_millis(2);
/// How often a command at work is looked at.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};
/// Bytes of a server's words that an error repeats.
const WORDS_MAX: usize = 600;

/// What has to go when this process ends early.
#[derive(Debug, Default)]
struct Leftovers {
    pids: Vec<u32>,
    folders: Vec<PathBuf>,
}

/// How an error of [`Process::start`] begins.
const CANNOT_START: &str = "cannot start ";

static LEFTOVERS: Mutex<Leftovers> = Mutex::new(Leftovers {
    pids: Vec::new(),
    folders: Vec::new(),
});

fn leftovers() -> MutexGuard<'static, Leftovers> {
    LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills all servers, and the tools that set something up, and keeps the run from another step: the lock that all steps need is never
/// given back. For a thread that noticed ^C and ends the process next, by [`Stopped::remove`] and an exit or by another program in its
/// place, which finds what is left by the run's folder.
pub fn stop() -> Stopped {
    let mut left = leftovers();
    for pid in left.pids.drain(..) {
        // Not waited for yet (that takes it out of the list first), so the number is still the child's.
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
            // So that the files below are really free, and no half-dead server is left behind.
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        }
    }
    let folders = left.folders.drain(..).collect();
    std::mem::forget(left);
    Stopped(folders)
}

/// A run of this process that goes no further.
#[derive(Debug)]
pub struct Stopped(Vec<PathBuf>);

impl Stopped {
    /// Removes all temporary files. Returns the folders that could not be removed, and why.
    pub fn remove(self) -> Vec<(PathBuf, io::Error)> {
        let stay = self.0.into_iter().filter_map(|folder| {
            let why = remove_at_last(&folder).err()?;
            Some((folder, why))
        });
        stay.collect()
    }
}

/// Removes a folder at which the run, which is stopped, may be at work still: it unmounts and detaches there too, and who comes second
/// fails.
fn remove_at_last(folder: &Path) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match remove_folder(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(_) if began.elapsed() < ABORT_LIMIT => thread::sleep(ABORT_PAUSE),
            outcome => return outcome,
        }
    }
}

/// Runs a tool to its end, as [`Command::output`] does; [`stop`] ends it, and so does the end of this thread.
///
/// # Errors
///
/// It cannot be started.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    let name = command.get_program().display().to_string();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    pre_exec::tie(command);
    let mut child = {
        let mut left = leftovers();
        let child = command.spawn().context(|| name.clone())?;
        left.pids.push(child.id());
        child
    };
    let read = |pipe: Option<&mut dyn io::Read>| {
        let mut bytes = Vec::new();
        // What was read until it failed is what there is.
        let _ = pipe.map(|pipe| pipe.read_to_end(&mut bytes));
        bytes
    };
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = thread::scope(|scope| {
        let err = scope.spawn(|| read(err.as_mut().map(|pipe| pipe as _)));
        let out = read(out.as_mut().map(|pipe| pipe as _));
        (out, err.join().unwrap_or_default())
    });
    // Without the lock until it has ended, and with it when its number becomes free.
    let id = WaitId::Pid(Pid::from_child(&child));
    while let Err(Errno::INTR) = waitid(id.clone(), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
    }
    let mut left = leftovers();
    left.pids.retain(|pid| *pid != child.id());
    let status = child.wait().context(|| name)?;
    Ok(Output {
        status,
        stdout,
        stderr,
    })
}

/// Comes back unless [`stop`] was called: then what just failed did so because of that, and nobody is to hear of it.
pub(crate) fn goes_on() {
    drop(leftovers());
}

/// Whether the program that could not be started is not there: of other files that are missing this is not said.
pub(crate) fn is_missing(error: &Error) -> bool {
    error.kind() == ErrorKind::NotFound && error.to_string().contains(CANNOT_START)
}

/// The program is not there.
pub(crate) fn missing(program: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("{CANNOT_START}{program}"))
}

/// Removes a file. What it holds is first made unwritten space: where a file system discards freed space at once,
/// each of ten thousand written extents costs a discard of its own, half a minute in all; so they are one.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    if let Ok(file) = File::options().write(true).open(path)
        && let Ok(meta) = file.metadata()
        // Filling the holes of a sparse file would not make it simpler.
        && meta.is_file() && meta.blocks().saturating_mul(512) >= meta.len() / 2
    {
        // A hint.
        let all = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let _ = fallocate(
            &file,
            all,
            0,
            meta.len().max(meta.blocks().saturating_mul(512)),
        );
    }
    fs::remove_file(path)
}

/// What says of a folder that a run of ours made it, and all in it: only such a one is removed.
pub(crate) const MARK: &str = ".diskplane-bench";

/// Removes a folder of ours. The mark goes last, so that what an end in the middle leaves is still known.
pub(crate) fn remove_folder(folder: &Path) -> io::Result<()> {
    if let Err(error) = mount::release(folder) {
        return Err(io::Error::other(error.to_string()));
    }
    for entry in fs::read_dir(folder)?.flatten() {
        let (path, kind) = (entry.path(), entry.file_type()?);
        let removed = match kind.is_dir() {
            true => fs::remove_dir_all(path),
            false if entry.file_name() == MARK => Ok(()),
            false if kind.is_file() => remove_file(&path),
            false => fs::remove_file(path),
        };
        // A run that is stopped may be removing it too.
        removed.or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
    }
    fs::remove_dir_all(folder)
}

/// Whether `path` is what a run of ours left when it was killed; false where nothing is there, or an empty folder, which may be used and
/// is nobody's to remove. An error where it is somebody's own.
pub(crate) fn is_left_over(path: &Path) -> Result<bool> {
    let named = || path.display().to_string();
    let kind = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        meta => meta.context(named)?.file_type(),
    };
    if kind.is_dir() && path.join(MARK).is_file() {
        return Ok(true);
    }
    match kind.is_dir() && fs::read_dir(path).context(named)?.next().is_none() {
        true => Ok(false),
        false => Err(Error::invalid(format!(
            "{}: no run of diskplane made it (it has no {MARK}), and it would be removed: move it away, or give another folder",
            path.display()
        ))),
    }
}

/// Says of a folder that it is ours.
pub(crate) fn mark(folder: &Path) -> Result<()> {
    let mark = folder.join(MARK);
    let made = File::create(&mark).context(|| mark.display().to_string());
    made.map(drop)
}

/// One run in a folder at a time: they would remove each other's images.
pub(crate) fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    // It may be somebody's: what it says stays.
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).open(&path);
    let file = file.context(|| path.display().to_string())?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Error::new(
            ErrorKind::Locked,
            format!(
                "{}: another run is at work there; give another folder (--dir, --out)",
                dir.display()
            ),
        )
    })?;
    Ok(file)
}

/// Whether files in `dir` can be opened with `O_DIRECT`.
pub(crate) fn has_o_direct(dir: &Path) -> bool {
    // A new one: the folder may be a user's, and so may any name in it.
    let new = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let make = |n: u32| {
        let path = dir.join(format!(".diskplane-{}-{n}", std::process::id()));
        match open(&path, new, Mode::from_raw_mode(0o600)) {
            Err(rustix::io::Errno::EXIST) => None,
            made => Some(made.map(|_| path)),
        }
    };
    let Some(Ok(path)) = (0..100).find_map(make) else {
        return false;
    };
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let can = open(&path, flags, Mode::empty()).is_ok();
    let _ = fs::remove_file(path);
    can
}

/// A folder that is removed with everything in it, also with what is mounted there.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// A new one among the system's temporary files, for this user alone.
    ///
    /// # Errors
    ///
    /// It cannot be made, or another is there.
    pub fn temporary(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        let mut left = leftovers();
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.context(|| path.display().to_string())?;
        left.folders.push(path.clone());
        Ok(Self(path))
    }

    /// Makes `path`; what a run left there that was killed is removed.
    ///
    /// # Errors
    ///
    /// What is there is not of such a run.
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        Self::clear_and_say(&path)?;
        let mut left = leftovers();
        fs::create_dir_all(&path).context(|| format!("{}: create", path.display()))?;
        // Before there is anything else: who is killed now leaves an empty folder.
        mark(&path)?;
        left.folders.push(path.clone());
        Ok(Self(path))
    }

    /// Removes what a run left at `path` that was killed, with what is mounted there.
    ///
    /// # Errors
    ///
    /// What is there is not of such a run.
    pub(crate) fn clear_and_say(path: &Path) -> Result<()> {
        if Self::clear(path)? {
            tracing::warn!(
                "{}: a run that was killed had left something: it is gone",
                path.display()
            );
        }
        Ok(())
    }

    /// The same without a word: whether there was anything.
    ///
    /// # Errors
    ///
    /// Likewise.
    pub(crate) fn clear(path: &Path) -> Result<bool> {
        let _left = leftovers();
        let there = is_left_over(path)?;
        if there {
            remove_folder(path).context(|| format!("{}: remove", path.display()))?;
        }
        Ok(there)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Kept until the folder is gone: `stop` must not come in between.
        let mut left = leftovers();
        left.folders.retain(|folder| *folder != self.0);
        if let Err(error) = remove_folder(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{}: cannot be removed: {error}", self.0.display());
        }
    }
}

/// A child process. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    out: PathBuf,
    err: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; what it prints goes to files `NAME.out` and `NAME.err` in `folder`.
    pub(crate) fn start(name: &str, command: &mut Command, folder: &Path) -> Result<Self> {
        let (out, err) = (
            folder.join(format!("{name}.out")),
            folder.join(format!("{name}.err")),
        );
        let create = |path: &Path| File::create(path).context(|| path.display().to_string());
        command
            .stdin(Stdio::null())
            .stdout(create(&out)?)
            .stderr(create(&err)?);
        pre_exec::tie(command);
        let mut left = leftovers();
        let child = command
            .spawn()
            .context(|| format!("{CANNOT_START}{}", command.get_program().display()))?;
        left.pids.push(child.id());
        Ok(Self {
            name: name.to_owned(),
            child,
            out,
            err,
            ended: None,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed on standard error so far.
    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.err).unwrap_or_default()).into_owned()
    }

    /// What it printed on standard output so far.
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    /// Waits until `ready` says so; an error with the server's words when it ends before.
    pub(crate) fn wait_ready(&mut self, mut ready: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + READY_LIMIT;
        while !ready(self) {
            if let Some(status) = self.try_wait()? {
                return Err(self.failed(&format!("did not start ({status})")));
            }
            if Instant::now() >= deadline {
                return Err(self.failed("was not ready in time"));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until it has ended, at most `limit`, and leaves it to be waited for: what the kernel knows of it is
    /// still there. `look` is called now and then.
    pub(crate) fn linger(&self, limit: Duration, mut look: impl FnMut(u32)) -> Result<()> {
        let named = || format!("wait for {}", self.name);
        let lost = |error: Errno| io::Error::from(error);
        let pid = Pid::from_child(&self.child);
        let fd = pidfd_open(pid, PidfdFlags::empty());
        let fd = fd.map_err(lost).context(named)?;
        let deadline = Instant::now() + limit;
        loop {
            let mut ended = [PollFd::new(&fd, PollFlags::IN)];
            match poll(&mut ended, Some(&LOOK)) {
                Ok(0) => look(self.pid()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(lost(error)).context(named),
            }
            if Instant::now() >= deadline {
                return Err(self.failed("did not end in time"));
            }
        }
    }

    /// Waits for its end, at most `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(self.failed("did not end in time"));
            }
            thread::sleep(POLL);
        }
    }

    /// SIGKILL; an error when it had ended before.
    pub(crate) fn kill(mut self) -> Result<String> {
        self.still_runs()?;
        let words = self.stderr();
        drop(self);
        Ok(words)
    }

    /// Whether it has not ended.
    pub(crate) fn runs(&mut self) -> Result<bool> {
        Ok(self.try_wait()?.is_none())
    }

    /// Sends it `signal`, unless it has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        // Not waited for: the number is the child's.
        if self.ended.is_none() {
            let _ = kill_process(Pid::from_child(&self.child), signal);
        }
    }

    pub(crate) fn still_runs(&mut self) -> Result<()> {
        match self.try_wait()? {
            Some(status) => Err(self.failed(&format!("ended by itself ({status})"))),
            None => Ok(()),
        }
    }

    /// SIGTERM, and then a good end in time.
    pub(crate) fn stop(mut self) -> Result<String> {
        self.still_runs()?;
        self.signal(Signal::TERM);
        let status = self.wait(STOP_LIMIT)?;
        if !status.success() {
            return Err(self.failed(&format!("ended badly ({status})")));
        }
        Ok(self.stderr())
    }

    fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            // Under the lock, so that `stop` never kills a number that was given to another.
            let mut left = leftovers();
            self.ended = self
                .child
                .try_wait()
                .context(|| format!("wait for {}", self.name))?;
            if self.ended.is_some() {
                left.pids.retain(|pid| *pid != self.child.id());
            }
        }
        Ok(self.ended)
    }

    /// An error with the last words of the process.
    pub(crate) fn failed(&self, what: &str) -> Error {
        let words = self.stderr();
        let words = words.trim();
        let start = words.ceil_char_boundary(words.len().saturating_sub(WORDS_MAX));
        let words = words[start..].lines().collect::<Vec<_>>().join("; ");
        let message = if words.is_empty() {
            format!("{} {what}", self.name)
        } else {
            format!("{} {what}: {words}", self.name)
        };
        Error::new(ErrorKind::Io, message)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.is_some() {
            return;
        }
        let mut left = leftovers();
        let _ = self.child.kill();
        let _ = self.child.wait();
        left.pids.retain(|pid| *pid != self.child.id());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn alive(pid: u32) -> bool {
        Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn a_server_is_ready_stops_and_says_why_not() {
        let dir = tempfile::tempdir().unwrap();
        let listens = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done";
        let mut server = Process::start("good", &mut shell(listens), dir.path()).unwrap();
        server.wait_ready(|p| p.stdout().contains("ready")).unwrap();
        let pid = server.pid();
        server.stop().unwrap();
        assert!(!alive(pid));

        let mut server = Process::start(
            "bad",
            &mut shell("echo no such disk >&2; exit 3"),
            dir.path(),
        )
        .unwrap();
        let error = server.wait_ready(|_| false).unwrap_err().to_string();
        assert!(
            error.contains("bad did not start") && error.contains("no such disk"),
            "{error}"
        );

        let mut missing = Command::new("/no/such/program");
        let error = Process::start("none", &mut missing, dir.path()).unwrap_err();
        assert!(is_missing(&error), "{error}");
        // What went away in the middle is no program that was never there.
        let mut there = shell("true");
        let error = Process::start("none", &mut there, &dir.path().join("gone")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(!is_missing(&error), "{error}");
    }

    #[test]
    fn nothing_fails_for_being_aborted() {
        let aborted = leftovers();
        let (say, heard) = std::sync::mpsc::channel();
        let run = thread::spawn(move || {
            goes_on();
            say.send(()).unwrap();
        });
        assert!(heard.recv_timeout(Duration::from_millis(50)).is_err());
        drop(aborted);
        run.join().unwrap();
        heard.recv().unwrap();
    }

    #[test]
    fn a_dropped_server_and_a_dropped_folder_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::create(dir.path().join("work")).unwrap();
        fs::write(folder.path().join("image"), vec![1; 1 << 20]).unwrap();
        let path = folder.path().to_owned();
        let server = Process::start("sleeps", &mut shell("sleep 1000"), folder.path()).unwrap();
        let pid = server.pid();
        assert!(alive(pid));
        drop(server);
        assert!(!alive(pid));
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn only_what_a_run_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("work");
        let folder = Folder::create(path.clone()).unwrap();
        fs::create_dir(path.join("old")).unwrap();
        fs::write(path.join("old/image"), "x").unwrap();
        std::os::unix::fs::symlink("/nowhere", path.join("link")).unwrap();
        std::mem::forget(folder);
        let folder = Folder::create(path.clone()).unwrap();
        assert!(!path.join("old").exists() && fs::read_dir(&path).unwrap().count() == 1);
        drop(folder);
        assert!(!path.exists());
        // An empty one is used, but nobody's leftover.
        fs::create_dir(&path).unwrap();
        assert!(!Folder::clear(&path).unwrap() && path.exists());
        drop(Folder::create(path.clone()).unwrap());
        assert!(!path.exists());
        // Somebody's.
        fs::create_dir(&path).unwrap();
        fs::write(path.join("thesis"), "x").unwrap();
        let theirs = [path.join("thesis"), path, dir.path().join("link")];
        std::os::unix::fs::symlink(dir.path(), &theirs[2]).unwrap();
        for path in &theirs {
            let error = Folder::create(path.clone()).unwrap_err();
            assert!(error.to_string().contains("move it away"), "{error}");
        }
        assert!(theirs[0].exists());
    }

    #[test]
    fn looking_for_o_direct_touches_nothing_of_a_user() {
        let dir = tempfile::tempdir().unwrap();
        let first = format!(".diskplane-{}-0", std::process::id());
        // Any name may be taken, also the one that is tried first.
        for name in ["direct", &first] {
            fs::write(dir.path().join(name), "a thesis").unwrap();
        }
        let can = has_o_direct(dir.path());
        let names = fs::read_dir(dir.path()).unwrap().flatten();
        let mut names: Vec<_> = names.map(|entry| entry.file_name()).collect();
        names.sort();
        assert_eq!(names, [first.as_str(), "direct"]);
        for name in ["direct", &first] {
            let kept = fs::read_to_string(dir.path().join(name)).unwrap();
            assert_eq!(kept, "a thesis");
        }
        // And that it has tried others is seen where it cannot.
        assert!(!has_o_direct(Path::new("/proc")));
        fs::remove_file(dir.path().join(&first)).unwrap();
        assert_eq!(has_o_direct(dir.path()), can);
    }

    #[test]
    fn two_runs_do_not_share_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        // A file of that name is not emptied.
        fs::write(dir.path().join("lock"), "of a door").unwrap();
        let first = lock(dir.path()).unwrap();
        assert_eq!(lock(dir.path()).unwrap_err().kind(), ErrorKind::Locked);
        drop(first);
        lock(dir.path()).unwrap();
        let kept = fs::read_to_string(dir.path().join("lock")).unwrap();
        assert_eq!(kept, "of a door");
    }
}
