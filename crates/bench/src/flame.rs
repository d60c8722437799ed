//! Flame graphs of where processes spend CPU: perf samples their stacks, we fold them and draw them.
//!
//! ```text
//!   perf record -e cpu-clock -F 199 --call-graph dwarf -p PID,…      while a load runs
//!   perf script                                                     a stack of each sample, the innermost frame first
//!   a tree of frames, the outermost first                           how many samples lie in each
//!   an SVG that needs nothing else                                  a frame as wide as its samples, its callees above it
//! ```
//!
//! Stacks are unwound from copies of the stack memory (`dwarf`), for programs have no frame pointers. That and the samples slow
//! what is looked at by a little.

use crate::{
    machine::process::{self, Folder, Process},
    report::chart::svg::{Anchor, Svg, standalone},
};
use block::{Context, Error, ErrorKind, Result};
use rustix::process::Signal;
use std::{
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Samples in a second of CPU: no divisor of what happens at round times.
const HERTZ: u32 = 199;
/// Bytes of stack that each sample copies.
const STACK_BYTES: u32 = 16 << 10;
/// How long perf is waited for until it looks.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);
/// How long perf may take to write what it has.
const END_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of stacks that are read at most.
const TEXT_BYTES_MAX: u64 = 256 << 20;
/// Frames of a stack at most, and frames of all.
const DEPTH_MAX: usize = 128;
const FRAMES_MAX: usize = 200_000;

const WIDTH: f64 = 1200.0;
const ROW: f64 = 17.0;
/// Frames that are narrower are left out.
const NARROW: f64 = 0.4;
/// Pixels of a letter.
const LETTER: f64 = 6.6;

/// perf at work.
#[derive(Debug)]
pub struct Recording {
    process: Process,
    data: PathBuf,
}

impl Recording {
    /// Begins to sample `pids`; perf's files lie in `folder`.
    ///
    /// # Errors
    ///
    /// perf is not installed, or cannot be started.
    pub fn begin(pids: &[u32], folder: &Path) -> Result<Self> {
        let data = folder.join("perf.data");
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        let mut command = Command::new("perf");
        command
            .args(["record", "--quiet", "-e", "cpu-clock", "-F"])
            .arg(HERTZ.to_string())
            .arg("--call-graph")
            .arg(format!("dwarf,{STACK_BYTES}"))
            .args(["-p", &pids.join(",")])
            .arg("-o")
            .arg(&data);
        let process = Process::start("perf", &mut command, folder);
        let process = process.map_err(|error| match process::is_missing(&error) {
            true => Error::new(
                ErrorKind::NotFound,
                "--flamegraph: perf is not installed (linux-perf, linux-tools)",
            ),
            false => error,
        });
        let mut process = process?;
        wait_until_it_looks(&mut process);
        Ok(Self { process, data })
    }

    /// Ends sampling; the picture, an SVG.
    ///
    /// # Errors
    ///
    /// perf was not allowed to look, or saw nothing.
    pub fn end(mut self, title: &str) -> Result<String> {
        self.process.signal(Signal::INT);
        self.process.wait(END_LIMIT)?;
        let mut command = Command::new("perf");
        command
            .args(["script", "--no-inline", "-F", "comm,ip,sym", "-i"])
            .arg(&self.data)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut script = command.spawn().context(|| "perf script")?;
        let mut bytes = Vec::new();
        let read = match script.stdout.take() {
            Some(out) => out.take(TEXT_BYTES_MAX).read_to_end(&mut bytes),
            None => Ok(0),
        };
        // It is of no use any more where there was too much.
        let _ = script.kill();
        let _ = script.wait();
        read.context(|| "perf script")?;
        let root = fold(&String::from_utf8_lossy(&bytes));
        if root.samples == 0 {
            return Err(self.process.failed(
                "saw nothing of the server (be root, or lower /proc/sys/kernel/perf_event_paranoid)",
            ));
        }
        Ok(draw(&root, title))
    }
}

/// perf takes a while to begin, and what it is to see may be over by then: until it has its events open, or has ended (of which
/// [`Recording::end`] tells).
fn wait_until_it_looks(process: &mut Process) {
    let folder = format!("/proc/{}/fd", process.pid());
    let until = Instant::now() + BEGIN_LIMIT;
    while Instant::now() < until {
        let fds = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        if links.any(|link| link.as_os_str() == "anon_inode:[perf_event]") {
            break;
        }
        if process.still_runs().is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Does `work` while `pids` are sampled, and writes the picture to `out`.
///
/// # Errors
///
/// Those of `work`, and of [`Recording`]; the picture cannot be written.
pub fn around<T>(
    pids: &[u32],
    out: &Path,
    title: &str,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let mut folder = out.as_os_str().to_owned();
    folder.push(".perf");
    let folder = Folder::create(folder.into())?;
    let recording = Recording::begin(pids, folder.path())?;
    let done = work()?;
    let svg = recording.end(title)?;
    std::fs::write(out, svg).context(|| out.display().to_string())?;
    Ok(done)
}

/// A frame, in the place where it was called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Frame {
    samples: u64,
    kernel: bool,
    callees: BTreeMap<String, Frame>,
}

/// The tree of all stacks in what `perf script` prints: a line that begins at the margin for each sample, and its frames below.
fn fold(text: &str) -> Frame {
    let mut root = Frame::default();
    let mut frames = 0;
    let mut stack: Vec<(&str, bool)> = Vec::new();
    let mut name = "";
    for line in text.lines().chain([""]) {
        if line.starts_with([' ', '\t']) && !line.trim().is_empty() {
            let (address, symbol) = line
                .trim()
                .split_once(' ')
                .unwrap_or((line.trim(), "[unknown]"));
            // The upper half of the addresses is the kernel's.
            let kernel = address.len() == 16 && address.starts_with('f');
            if stack.len() < DEPTH_MAX {
                stack.push((symbol, kernel));
            }
            continue;
        }
        if !stack.is_empty() {
            root.samples += 1;
            let mut at = &mut root;
            let outer = stack.drain(..).rev();
            for (symbol, kernel) in [(name, false)].into_iter().chain(outer) {
                if !at.callees.contains_key(symbol) {
                    frames += 1;
                    if frames > FRAMES_MAX {
                        break;
                    }
                }
                at = at.callees.entry(symbol.to_owned()).or_default();
                at.samples += 1;
                at.kernel = kernel;
            }
        }
        if !line.is_empty() {
            name = line.trim();
        }
    }
    root
}

/// Whether a symbol is of diskplane.
fn is_ours(symbol: &str) -> bool {
    const CRATES: [&str; 11] = [
        "bench",
        "block",
        "crypto",
        "diskplane",
        "disk",
        "export",
        "image",
        "io",
        "nbd",
        "tool",
        "trace",
    ];
    let symbol = symbol.trim_start_matches(['<', '&']);
    CRATES.iter().any(|name| {
        symbol
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with("::"))
    })
}

fn depth(frame: &Frame) -> usize {
    1 + frame.callees.values().map(depth).max().unwrap_or(0)
}

fn draw(root: &Frame, title: &str) -> String {
    let mut svg = Svg::default();
    let height = 48.0 + ROW * depth(root) as f64;
    svg.text(0.0, 16.0, Anchor::Start, "head", title);
    let says = format!(
        "{} samples of CPU time, {HERTZ} a second; blue: diskplane, orange: the kernel, grey: others. The whole name is over each frame.",
        root.samples
    );
    svg.text(0.0, 34.0, Anchor::Start, "dim", &says);
    let scale = WIDTH / root.samples as f64;
    put(
        &mut svg,
        "all",
        root,
        (0.0, height - ROW),
        scale,
        root.samples,
    );
    standalone(&svg.finish(WIDTH, height, title))
}

/// Draws a frame, and its callees above it.
fn put(svg: &mut Svg, name: &str, frame: &Frame, (x, y): (f64, f64), scale: f64, all: u64) {
    let width = frame.samples as f64 * scale;
    if width < NARROW {
        return;
    }
    let class = match (frame.kernel, is_ours(name)) {
        (true, _) => "f4",
        (false, true) => "f5",
        (false, false) => "f7",
    };
    let share = frame.samples as f64 / all as f64 * 100.0;
    let over = format!("{name}: {} samples, {share:.1} %", frame.samples);
    svg.rect([x, y, (width - 0.5).max(0.3), ROW - 1.0], class, "", &over);
    let letters = (width / LETTER) as usize;
    if letters > 3 {
        let short = match name.char_indices().nth(letters - 1) {
            Some((end, _)) => format!("{}…", &name[..end]),
            None => name.to_owned(),
        };
        svg.text(x + 2.0, y + 12.0, Anchor::Start, "", &short);
    }
    let mut at = x;
    for (name, callee) in &frame.callees {
        put(svg, name, callee, (at, y - ROW), scale, all);
        at += callee.samples as f64 * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;

    const TEXT: &str = "io-0 \n\tffffffff81b4d7cb io_read\n\t  101829 syscall\n\t  99 <io::uring::Uring as io::Engine>::turn\n\n\
                        io-0 \n\t  101829 syscall\n\t  99 <io::uring::Uring as io::Engine>::turn\n\n\
                        other \n\t  7 [unknown]\n\nempty \n\n";

    #[test]
    fn stacks_are_folded_from_the_outside_in() {
        let root = fold(TEXT);
        assert_eq!(root.samples, 3);
        let names: Vec<&String> = root.callees.keys().collect();
        assert_eq!(names, ["io-0", "other"]);
        let turn = &root.callees["io-0"].callees["<io::uring::Uring as io::Engine>::turn"];
        let syscall = &turn.callees["syscall"];
        assert_eq!(
            (turn.samples, syscall.samples, syscall.kernel),
            (2, 2, false)
        );
        let read = &syscall.callees["io_read"];
        assert_eq!((read.samples, read.kernel, depth(&root)), (1, true, 5));
        let deep = format!("x \n{}\n", "\t 1 f\n".repeat(1000));
        assert_eq!(depth(&fold(&deep)), DEPTH_MAX + 2);
        assert_eq!(fold("nonsense"), Frame::default());
        assert!(is_ours("<io::a as b>::c") && is_ours("disk::x") && !is_ours("io_uring::x"));
    }

    #[test]
    fn frames_are_as_wide_as_their_samples() {
        let svg = draw(&fold(TEXT), "a <title>");
        for says in [
            "io_read: 1 samples, 33.3 %",
            "width=\"799.5\" height=\"16.0\" class=\"f5\"><title>&lt;io::uring::Uring as io::Engine&gt;::turn: 2 samples, 66.7 %",
            "a &lt;title&gt;",
        ] {
            assert!(svg.contains(says), "{says}: {svg}");
        }
        assert!(svg.contains("<style>") && !svg.contains("href"));
    }

    #[test]
    fn a_browser_shows_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flame.svg");
        // A frame's name may be anything.
        let text = TEXT.replace("io_read", "a<b>&\"c\"]]>");
        std::fs::write(&path, draw(&fold(&text), "a <title> & \"more\"")).unwrap();
        let Some(seen) = testkit::chromium::look(&path) else {
            return;
        };
        // Six frames, and the one of all.
        let seen = seen.unwrap();
        assert!(seen.contains("flame.svg: 7 shapes"), "{seen}");
        std::fs::write(
            &path,
            "<svg xmlns=\"http://www.w3.org/2000/svg\"><rect </svg>",
        )
        .unwrap();
        let wrong = testkit::chromium::look(&path).unwrap().unwrap_err();
        assert!(wrong.contains("broken"), "{wrong}");
    }

    #[test]
    fn a_process_at_work_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let spec = load::Spec {
            duration: Duration::from_millis(500),
            ..load::Spec::new(load::Target::File {
                path,
                engine: "threads".into(),
                direct: false,
            })
        };
        let recording = match Recording::begin(&[std::process::id()], dir.path()) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return eprintln!("not tested: {error}");
            }
            recording => recording.unwrap(),
        };
        load::run(&spec).unwrap();
        match recording.end("a load") {
            Ok(svg) => assert!(
                svg.contains("a load") && svg.contains(" samples, "),
                "{svg}"
            ),
            Err(error) => assert!(error.to_string().contains("perf_event_paranoid"), "{error}"),
        }
    }
}
