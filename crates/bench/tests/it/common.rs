//! Disks of ours, served in this process.

#![allow(missing_docs)]

use bench::load::{Pattern, Spec, Target};
use disk::{Chain, ChainOptions, Disk, DiskOptions};
use export::{
    nbd::{self, Nbd, NbdAddress},
    vhost_user::{self, VhostUser},
    worker::{Worker, WorkerHandle, WorkerOptions},
};
use io::EngineKind;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use testkit::TempDir;
use trace::Operation;

pub const LEN: u64 = 4 << 20;

/// A disk on a vhost-user and an NBD socket, and the file behind it.
pub struct Served {
    pub dir: TempDir,
    pub disk: Arc<Disk>,
    pub worker: WorkerHandle,
    pub vhost: Option<vhost_user::Server>,
    pub nbd: Option<nbd::Server>,
}

/// A disk of zeros.
pub fn serve(read_only: bool) -> Served {
    let dir = TempDir::new();
    std::fs::write(dir.path("disk.raw"), vec![0; LEN as usize]).unwrap();
    serve_in(dir, read_only)
}

/// The disk that is in a folder.
pub fn serve_in(dir: TempDir, read_only: bool) -> Served {
    let path = dir.path("disk.raw");
    let chain = ChainOptions {
        format: Some(image::Format::Raw),
        read_only,
        ..ChainOptions::default()
    };
    let chain = Chain::open(path.to_str().unwrap(), &chain).unwrap();
    let options = DiskOptions {
        read_only,
        ..DiskOptions::default()
    };
    serve_chain(dir, chain, options, EngineKind::Threads)
}

/// Any disk.
pub fn serve_chain(dir: TempDir, chain: Chain, options: DiskOptions, kind: EngineKind) -> Served {
    let disk = Disk::new(chain, options).unwrap();
    let worker = Worker::spawn(WorkerOptions::new(0, kind)).unwrap();
    let workers = [worker];
    let options = vhost_user::Options {
        queues: 2,
        ..vhost_user::Options::default()
    };
    let vhost = VhostUser::serve(&dir.path("vhost"), disk.clone(), &workers, options).unwrap();
    let address = NbdAddress::Unix(dir.path("nbd"));
    let options = nbd::Options::default();
    let nbd = Nbd::serve(&address, disk.clone(), &workers, options).unwrap();
    let [worker] = workers;
    Served {
        dir,
        disk,
        worker,
        vhost: Some(vhost),
        nbd: Some(nbd),
    }
}

impl Served {
    pub fn targets(&self) -> [Target; 2] {
        let nbd = format!("nbd+unix:///?socket={}", self.dir.path("nbd").display());
        [Target::VhostUser(self.dir.path("vhost")), Target::Nbd(nbd)]
    }

    /// Reads, writes and flushes that the disk has ended so far.
    pub fn counts(&self) -> [u64; 3] {
        let statistics = self.disk.statistics();
        ["read", "write", "flush"].map(|name| {
            let mut operations = statistics.operations.iter();
            let found = operations.find(|op| op.operation == name);
            found.map_or(0, |op| op.count)
        })
    }

    /// All requests that the disk has ended: what, where, how many bytes; in their order on each queue.
    pub fn requests(&self) -> Vec<(Operation, u64, u64)> {
        let entries = |queue: &disk::QueueTrace| queue.ring().last(usize::MAX).entries;
        let traces = self.disk.queue_traces();
        let all = traces.iter().flat_map(entries);
        all.map(|e| (e.operation, e.offset, e.bytes)).collect()
    }

    /// Waits until the disk has counted what was asked since `before`: it does so after it has answered.
    #[track_caller]
    pub fn assert_grown(&self, before: [u64; 3], asked: [u64; 3]) {
        let began = Instant::now();
        loop {
            let counts = self.counts();
            let grown = [0, 1, 2].map(|i| counts[i] - before[i]);
            if grown == asked {
                return;
            }
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "{grown:?}, {asked:?} asked"
            );
            std::thread::yield_now();
        }
    }
}

impl Served {
    /// Ends the servers and the disk; the folder stays.
    pub fn end(mut self) -> TempDir {
        drop(self.vhost.take());
        drop(self.nbd.take());
        self.worker.stop();
        self.disk.close().unwrap();
        std::mem::replace(&mut self.dir, TempDir::new())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.vhost.take());
        drop(self.nbd.take());
        self.worker.stop();
    }
}

/// So many requests, however long they take.
pub fn count(target: Target, pattern: Pattern, ios: u64) -> Spec {
    Spec {
        pattern,
        ios_max: Some(ios),
        duration: Duration::ZERO,
        ..Spec::new(target)
    }
}
