//! A disk served over NBD in a directory of its own, and a client that says what it is told to.

#![allow(dead_code)]

use disk::{Chain, ChainOptions, Disk, DiskOptions};
use export::{
    nbd::{Nbd, NbdAddress, Options, Server},
    worker::{Worker, WorkerHandle, WorkerOptions},
};
use image::Format;
use io::{Cache, EngineKind};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

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

/// What is served.
pub struct What {
    pub format: Format,
    pub len: u64,
    pub workers: usize,
    pub engine: EngineKind,
    pub disk: DiskOptions,
    pub options: Options,
    pub tcp: bool,
}

impl Default for What {
    fn default() -> Self {
        Self {
            format: Format::Raw,
            len: 16 << 20,
            workers: 1,
            engine: EngineKind::Threads,
            disk: DiskOptions::default(),
            options: Options::default(),
            tcp: false,
        }
    }
}

pub struct Served {
    pub dir: tempfile::TempDir,
    /// There until [`Served::stop`].
    pub disk: Option<Arc<Disk>>,
    pub workers: Vec<WorkerHandle>,
    pub server: Option<Server>,
}

/// Serves a new image of `what.len` bytes.
pub fn serve(what: What) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    if what.format == Format::Raw {
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(what.len).unwrap();
    } else {
        let (path, len) = (path.to_str().unwrap(), what.len.to_string());
        run("qemu-img", &["create", "-q", "-f", "qcow2", path, &len]);
    }
    let path = path.to_str().unwrap().to_owned();
    serve_image(what, dir, &path)
}

/// Serves an image that is there.
pub fn serve_image(what: What, dir: tempfile::TempDir, spec: &str) -> Served {
    let chain = ChainOptions {
        format: (!spec.starts_with("null:")).then_some(what.format),
        read_only: what.disk.read_only,
        // What each engine is for: Linux AIO is asynchronous on O_DIRECT files only.
        cache: match what.engine {
            EngineKind::Threads => Cache::Writeback,
            _ => Cache::None,
        },
        ..ChainOptions::default()
    };
    let chain = Chain::open(spec, &chain).unwrap();
    let disk = Disk::new(chain, what.disk).unwrap();
    let workers: Vec<WorkerHandle> = (0..what.workers)
        .map(|index| Worker::spawn(WorkerOptions::new(index, what.engine)).unwrap())
        .collect();
    let address = if what.tcp {
        NbdAddress::Tcp("127.0.0.1".into(), 0)
    } else {
        NbdAddress::Unix(dir.path().join("nbd.sock"))
    };
    let server = Nbd::serve(&address, disk.clone(), &workers, what.options).unwrap();
    Served {
        dir,
        disk: Some(disk),
        workers,
        server: Some(server),
    }
}

impl Served {
    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// The URI of the default export.
    pub fn uri(&self) -> String {
        match self.server().local_addr() {
            NbdAddress::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
            tcp @ NbdAddress::Tcp(..) => format!("nbd://{tcp}"),
        }
    }

    pub fn connect(&self) -> Client {
        Client::new(&self.socket())
    }

    /// Waits until so many connections are served.
    pub fn wait_for_connections(&self, count: usize) {
        let start = std::time::Instant::now();
        while self.server().connections() != count {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{} connections instead of {count}",
                self.server().connections()
            );
            std::thread::yield_now();
        }
    }

    /// Stops everything and closes the image clean.
    pub fn stop(&mut self) {
        drop(self.server.take());
        for worker in &self.workers {
            worker.stop();
        }
        self.workers.clear();
        // The last reference: the image's lock goes with it.
        let disk = self.disk.take().unwrap();
        disk.close().unwrap();
        assert_eq!(Arc::strong_count(&disk), 1);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.server.take());
        for worker in &self.workers {
            worker.stop();
        }
    }
}

pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
}

/// A blocking client with simple replies. A read that takes 20 seconds fails the test.
pub struct Client(pub UnixStream);

impl Client {
    /// Connects and says nothing.
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        let limit = Some(Duration::from_secs(20));
        socket.set_read_timeout(limit).unwrap();
        socket.set_write_timeout(limit).unwrap();
        Self(socket)
    }

    /// Connects and enters the transmission phase.
    pub fn new(path: &Path) -> Self {
        let mut client = Self::connect(path);
        assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&3u32.to_be_bytes());
        client.send(b"IHAVEOPT\0\0\0\x01\0\0\0\0");
        client.take(10);
        client
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Everything up to the server's end of the connection.
    pub fn take_all(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.0.read_to_end(&mut bytes) {
            Ok(_) => bytes,
            // The server closed with bytes of ours unread.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => bytes,
            Err(error) => panic!("the server did not close: {error}"),
        }
    }

    pub fn request(&mut self, kind: u16, flags: u16, cookie: u64, at: u64, len: u32) {
        self.send(&header(kind, flags, cookie, at, len));
    }

    /// The next reply's error and cookie.
    pub fn reply(&mut self) -> (u32, u64) {
        let bytes = self.take(16);
        assert_eq!(bytes[..4], [0x67, 0x44, 0x66, 0x98]);
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(bytes[8..].try_into().unwrap()))
    }

    pub fn read(&mut self, at: u64, len: u32) -> Vec<u8> {
        self.request(cmd::READ, 0, 77, at, len);
        assert_eq!(self.reply(), (0, 77));
        self.take(len as usize)
    }

    pub fn write(&mut self, at: u64, data: &[u8]) -> u32 {
        self.request(cmd::WRITE, 0, 78, at, data.len() as u32);
        self.send(data);
        self.reply().0
    }

    /// A request without data; its error.
    pub fn ask(&mut self, kind: u16, flags: u16, at: u64, len: u32) -> u32 {
        self.request(kind, flags, 79, at, len);
        self.reply().0
    }
}

pub fn header(kind: u16, flags: u16, cookie: u64, at: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&at.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}
