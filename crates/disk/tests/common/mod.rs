//! A queue of a disk, driven on the test's own thread.

pub mod model;
pub mod storm;

use block::{GuestError, GuestOffset, IoVec, Op};
use disk::{Chain, ChainOptions, Disk, DiskOptions, DiskQueue, QueueOptions, Request};
use image::Format;
use io::{Cache, Engine, EngineKind, EngineOptions, Events, Wait, Waker};
use std::{
    collections::HashMap,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

/// After so long without an end, a queue counts as hanging.
const HANG: Duration = Duration::from_secs(30);

/// Runs a program that must succeed; returns what it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

/// A directory for images; not in /tmp, which may be a tmpfs: O_DIRECT is wanted.
pub fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Makes a qcow2 image with qemu-img: options as after `-o`, a backing file with its format.
pub fn qemu_create(path: &Path, options: &str, backing: Option<(&Path, &str)>, size: u64) {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    if let Some((backing, format)) = backing {
        args.extend(["-b", arg(backing), "-F", format]);
    }
    args.extend([arg(path), &size]);
    run("qemu-img", &args);
}

/// Opens a disk for a test, through the page cache.
pub fn open(path: &Path, format: Format, options: DiskOptions) -> Arc<Disk> {
    open_cached(path, format, options, Cache::Writeback)
}

/// Opens a disk for a test.
pub fn open_cached(path: &Path, format: Format, options: DiskOptions, cache: Cache) -> Arc<Disk> {
    let chain = ChainOptions {
        cache,
        format: Some(format),
        read_only: options.read_only,
        ..ChainOptions::default()
    };
    let chain = Chain::open(arg(path), &chain).expect("the chain opens");
    Disk::new(chain, options).expect("the disk opens")
}

/// One request of a rig: its memory must outlive it.
struct Running {
    buffer: Vec<u8>,
    _iov: Box<[IoVec]>,
}

/// A queue with an engine of its own.
pub struct Rig {
    pub engine: Box<dyn Engine>,
    pub queue: Option<DiskQueue>,
    pub waker: Arc<Waker>,
    events: Events,
    running: HashMap<u64, Running>,
    next: u64,
}

/// What ended: its tag, how, and the bytes of a read.
pub struct Ended {
    pub tag: u64,
    pub result: Result<(), GuestError>,
    pub buffer: Vec<u8>,
}

impl Rig {
    pub fn new(disk: &Arc<Disk>, kind: EngineKind, depth: u16) -> Self {
        let mut engine = io::open_engine(kind, &EngineOptions::default()).expect("an engine");
        let waker = Arc::new(Waker::new().expect("a waker"));
        engine
            .watch(waker.as_fd(), u64::MAX, false)
            .expect("the waker is watched");
        let options = QueueOptions {
            depth,
            token_base: 7 << 32,
            waker: Arc::clone(&waker),
        };
        let queue = DiskQueue::attach(disk, &mut *engine, options).expect("the queue attaches");
        Self {
            engine,
            queue: Some(queue),
            waker,
            events: Events::default(),
            running: HashMap::new(),
            next: 1,
        }
    }

    pub fn queue(&mut self) -> &mut DiskQueue {
        self.queue.as_mut().expect("attached")
    }

    /// Submits; the data of a write, or the length of anything else. Pieces are cut at `cuts`.
    pub fn submit(
        &mut self,
        op: Op,
        at: u64,
        mut buffer: Vec<u8>,
        len: u64,
        cuts: &[usize],
    ) -> u64 {
        let tag = self.next;
        self.next += 1;
        if op == Op::Read {
            buffer = vec![0xee; len as usize];
        }
        let mut iov = Vec::new();
        if op.has_data() {
            let mut rest = &mut buffer[..];
            for cut in cuts {
                let (head, tail) = rest.split_at_mut((*cut).min(rest.len()));
                iov.push(IoVec::from_mut(head));
                rest = tail;
            }
            iov.push(IoVec::from_mut(rest));
        }
        let iov = iov.into_boxed_slice();
        let request = Request {
            op,
            at: GuestOffset(at),
            len,
            iov: iov.as_ptr(),
            iov_len: iov.len() as u32,
            tag,
            arrived_ns: 0,
            seen_ns: disk::now_ns(),
            parsed_ns: 0,
        };
        self.running.insert(tag, Running { buffer, _iov: iov });
        let queue = self.queue.as_mut().expect("attached");
        // SAFETY: buffer and pieces stay in `running` until the request's `Done` was taken.
        let taken = unsafe { queue.submit(&mut *self.engine, request) };
        assert!(taken.is_ok(), "the rig submits no more than fits");
        tag
    }

    /// One turn of the loop; what ended in it.
    pub fn turn(&mut self, wait: Wait) -> Vec<Ended> {
        let queue = self.queue.as_mut().expect("attached");
        queue.advance(&mut *self.engine);
        let mut ended = self.take();
        let wait = if ended.is_empty() && self.waker.prepare_sleep() {
            wait
        } else {
            Wait::Poll
        };
        self.engine.turn(wait, &mut self.events).expect("a turn");
        self.waker.awake();
        let queue = self.queue.as_mut().expect("attached");
        for completion in self.events.completions.drain(..) {
            queue.completed(&mut *self.engine, &completion);
        }
        self.events.ready.clear();
        queue.advance(&mut *self.engine);
        ended.extend(self.take());
        ended
    }

    /// Turns until something ended. Panics when nothing does for a long time.
    pub fn some(&mut self) -> Vec<Ended> {
        let begin = Instant::now();
        while begin.elapsed() < HANG {
            let ended = self.turn(Wait::For(Duration::from_secs(1)));
            if !ended.is_empty() {
                return ended;
            }
        }
        panic!("the queue hangs: {:#?}", self.queue);
    }

    fn take(&mut self) -> Vec<Ended> {
        let queue = self.queue.as_mut().expect("attached");
        let mut ended = Vec::new();
        queue.notified(None);
        while let Some(done) = queue.done() {
            let running = self.running.remove(&done.tag).expect("ends once");
            ended.push(Ended {
                tag: done.tag,
                result: done.result,
                buffer: running.buffer,
            });
        }
        ended
    }

    /// Turns until nothing is in flight.
    pub fn drain(&mut self) -> Vec<Ended> {
        let mut ended = Vec::new();
        let mut last = Instant::now();
        while self.queue().is_busy() {
            let some = self.turn(Wait::For(Duration::from_secs(1)));
            if !some.is_empty() {
                last = Instant::now();
            }
            assert!(last.elapsed() < HANG, "the queue hangs: {:#?}", self.queue);
            ended.extend(some);
        }
        ended
    }

    /// Submits one request and waits for its end.
    pub fn one(&mut self, op: Op, at: u64, data: Vec<u8>, len: u64) -> Result<Vec<u8>, GuestError> {
        let tag = self.submit(op, at, data, len, &[]);
        let mut ended = self.drain();
        assert_eq!(ended.len(), 1);
        let ended = ended.remove(0);
        assert_eq!(ended.tag, tag);
        ended.result.map(|()| ended.buffer)
    }

    pub fn detach(mut self) {
        self.drain();
        if let Some(queue) = self.queue.take() {
            queue.detach(&mut *self.engine);
        }
    }
}

/// A seeded generator (xorshift64*), so that a failure can be replayed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

/// The image's content as qemu reads it.
pub fn qemu_content(path: &Path, format: &str) -> Vec<u8> {
    let flat: PathBuf = path.with_extension("flat");
    run(
        "qemu-img",
        &["convert", "-f", format, "-O", "raw", arg(path), arg(&flat)],
    );
    let bytes = std::fs::read(&flat).expect("the flat copy");
    std::fs::remove_file(&flat).expect("the flat copy");
    bytes
}

/// Bytes as an image may hold them: a word per sector, some of them zeros.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; len];
    for sector in bytes.chunks_mut(512) {
        if random.below(3) > 0 {
            let word = random.next().to_le_bytes();
            for chunk in sector.chunks_mut(8) {
                chunk.copy_from_slice(&word[..chunk.len()]);
            }
        }
    }
    bytes
}
