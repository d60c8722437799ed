//! Several threads on one image: each owns every n-th piece of the disk and checks what it reads, while all
//! of them fight for the smallest cache there is. A piece is a cluster, or a subcluster: then the
//! threads also fight for the clusters.

use super::testing::{Checked, Driver, MemFile, Rng, check};
use super::{Compression, CreateOptions, OpenOptions, Qcow2};
use crate::{ExtentKind, Fill, FlushRun, Image, Need, Plan, Step, ZeroMode, ZeroPlan};
use block::{GuestOffset, Storage, Zeroed};
use std::fs;
use std::sync::{Barrier, Mutex};
use std::thread;

const CLUSTER: u64 = 512;
const THREADS: u64 = 4;
/// Clusters of each thread.
const OWN: u64 = 8_000;

/// What the threads share: the image, its file, and one flush at a time.
struct Shared {
    file: MemFile,
    image: Qcow2,
    flush: Mutex<FlushRun>,
}

impl Shared {
    fn flush(&self) {
        let mut run = self.flush.lock().unwrap();
        self.image.flush_begin(&mut run).unwrap();
        for stage in &run.stages {
            for w in &run.writes[stage.first..stage.end] {
                let bytes = &run.bytes[w.start..w.start + w.len];
                self.file.write_at(w.offset.0, bytes).unwrap();
            }
        }
        self.image.flush_end(&mut run, true);
        let mut freed = Vec::new();
        self.image.take_freed(&mut freed);
        // Nobody reads or writes another thread's clusters, nor its own while it frees
        // them, so there is nothing to wait for.
        for f in freed {
            self.file.discard(f.offset.0, f.len).unwrap();
            self.image.release(&f, Zeroed::Yes);
        }
    }

    fn ask<T>(&self, ask: impl Fn(&Qcow2) -> block::Result<Step<T>>) -> T {
        // Far more turns than any wait takes: a hang must fail, not hang.
        for _ in 0..50_000_000u64 {
            match ask(&self.image).unwrap() {
                Step::Done(answer) => return answer,
                Step::Wait(_) => thread::yield_now(),
                Step::Need(Need::Commit) => self.flush(),
                Step::Need(Need::Load(load)) => {
                    let bytes =
                        super::close::read_short(&self.file, load.offset.0, load.len as usize);
                    self.image.loaded(&load, &bytes.unwrap()).unwrap();
                }
                Step::Need(Need::Reserve(r)) => {
                    let zeroed = self.file.allocate(r.offset.0, r.len).unwrap();
                    self.image.reserved(&r, zeroed);
                }
            }
        }
        panic!("waits without an end");
    }

    fn read(&self, cluster: u64) -> u64 {
        let at = GuestOffset(cluster * CLUSTER);
        let extent = self.ask(|i| i.map(at, CLUSTER));
        assert_eq!(extent.len, CLUSTER);
        match extent.kind {
            ExtentKind::Data { offset, .. } => {
                let mut bytes = [0; CLUSTER as usize];
                self.file.read_at(offset.0, &mut bytes).unwrap();
                let value = super::open::word_of(&bytes);
                let tail = super::open::word_of(&bytes[CLUSTER as usize - 8..]);
                assert_eq!(value, tail, "cluster {cluster}");
                value
            }
            ExtentKind::Compressed(_) => panic!("nobody compressed"),
            _ => 0,
        }
    }

    fn write(&self, cluster: u64, value: u64) {
        let at = GuestOffset(cluster * CLUSTER);
        let bytes = value.to_be_bytes().repeat(CLUSTER as usize / 8);
        match self.ask(|i| i.plan_write(at, CLUSTER)) {
            Plan::InPlace { offset, len, .. } => {
                assert_eq!(len, CLUSTER);
                self.file.write_at(offset.0, &bytes).unwrap();
            }
            Plan::Allocate(a) => {
                assert_eq!((a.len, a.fill), (CLUSTER, Fill::Nothing));
                if value.is_multiple_of(16) {
                    return self.image.abort(a.ticket);
                }
                self.file.write_at(a.host.0, &bytes).unwrap();
                self.image.commit(a.ticket);
            }
            Plan::Drop { .. } => unreachable!("qcow2 keeps what is written"),
        }
    }

    fn zero(&self, cluster: u64, mode: ZeroMode) {
        let at = GuestOffset(cluster * CLUSTER);
        match self.ask(|i| i.plan_zero(at, CLUSTER, mode)) {
            ZeroPlan::Done { len } | ZeroPlan::Skip { len } => assert_eq!(len, CLUSTER),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn threads_do_not_disturb_each_other() {
    let misses = threads_meet(false);
    assert!(
        misses > 5_000,
        "slices are meant to come and go: {misses} misses"
    );
}

#[test]
fn threads_share_clusters_of_subclusters() {
    threads_meet(true);
}

/// Returns how often the cache missed.
fn threads_meet(extended_l2: bool) -> u64 {
    // 32 pieces to a cluster.
    let cluster_size = if extended_l2 { 32 * CLUSTER } else { CLUSTER };
    let options = CreateOptions {
        size: THREADS * OWN * CLUSTER,
        version: 3,
        cluster_size,
        refcount_bits: 16,
        lazy_refcounts: false,
        backing: None,
        compression: Compression::Zlib,
        extended_l2,
        ..CreateOptions::default()
    };
    let open = OpenOptions {
        cache_bytes: Some(0),
        ..OpenOptions::default()
    };
    let driver = Driver::create(&options, &open);
    let shared = Shared {
        file: driver.file,
        image: driver.image,
        flush: Mutex::default(),
    };
    let start = Barrier::new(THREADS as usize);
    let models: Vec<Vec<u64>> = thread::scope(|scope| {
        let run = |id: u64| {
            let (shared, start) = (&shared, &start);
            move || {
                let mut rng = Rng(id);
                let mut model = vec![0u64; OWN as usize];
                start.wait();
                for step in 1..15_000u64 {
                    let own = rng.below(OWN);
                    let cluster = own * THREADS + id;
                    let value = id << 32 | step;
                    let seen = &mut model[own as usize];
                    match rng.below(16) {
                        0..6 => {
                            let new = *seen == 0;
                            shared.write(cluster, value);
                            // Some allocations are given up.
                            if !(new && value.is_multiple_of(16)) {
                                *seen = value;
                            } else {
                                *seen = shared.read(cluster);
                                assert!([0, value].contains(seen));
                            }
                        }
                        // Less than a cluster is not discarded.
                        6 if !extended_l2 => {
                            shared.zero(cluster, ZeroMode::Discard);
                            *seen = 0;
                        }
                        6 | 7 => {
                            let unmap = rng.below(2) == 0;
                            shared.zero(cluster, ZeroMode::Zero { unmap });
                            *seen = 0;
                        }
                        8 if rng.below(50) == 0 => shared.flush(),
                        _ => assert_eq!(shared.read(cluster), *seen, "cluster {cluster}"),
                    }
                }
                for (own, value) in (0..).zip(&model) {
                    assert_eq!(shared.read(own * THREADS + id), *value);
                }
                model
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|id| scope.spawn(run(id))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let misses = shared.image.lock().cache.misses;
    shared.flush();
    shared.image.close(&[&shared.file]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    fs::write(&path, shared.file.bytes()).unwrap();
    assert_eq!(check(&path), Checked::Clean);
    // And again from the file.
    let mut driver = Driver::open(shared.file.clone(), &OpenOptions::default());
    for (id, model) in (0..).zip(&models) {
        for (own, value) in (0u64..).zip(model).step_by(7) {
            let at = (own * THREADS + id) * CLUSTER;
            let bytes = driver.read(at, 8).unwrap();
            assert_eq!(super::open::word_of(&bytes), *value);
        }
    }
    misses
}
