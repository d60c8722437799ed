//! A disk served on a socket in a directory of its own.

#![allow(dead_code)]

use disk::{Chain, ChainOptions, Disk, DiskOptions};
use export::{
    vhost_user::{Options, Server, VhostUser},
    worker::{Polling, Worker, WorkerHandle, WorkerOptions},
};
use image::Format;
use io::{Cache, EngineKind};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub struct Served {
    pub dir: tempfile::TempDir,
    pub disk: Arc<Disk>,
    pub workers: Vec<WorkerHandle>,
    pub server: Option<Server>,
    pub options: Options,
}

/// What [`serve`] serves.
pub struct What<'a> {
    /// `null:SIZE`, or nothing for a raw file of `len` bytes.
    pub spec: Option<&'a str>,
    pub len: u64,
    pub workers: usize,
    pub engine: EngineKind,
    pub cache: Cache,
    pub polling: Polling,
    pub disk: DiskOptions,
    pub options: Options,
}

impl Default for What<'_> {
    fn default() -> Self {
        Self {
            spec: None,
            len: 16 << 20,
            workers: 1,
            engine: EngineKind::Threads,
            cache: Cache::Writeback,
            polling: Polling::OFF,
            disk: DiskOptions::default(),
            options: Options {
                serial: "test".into(),
                ..Options::default()
            },
        }
    }
}

pub fn serve(what: What<'_>) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let spec = match what.spec {
        Some(spec) => spec.to_owned(),
        None => {
            let path = dir.path().join("disk.raw");
            let file = std::fs::File::create(&path).unwrap();
            file.set_len(what.len).unwrap();
            path.to_str().unwrap().to_owned()
        }
    };
    let chain = ChainOptions {
        format: what.spec.is_none().then_some(Format::Raw),
        read_only: what.disk.read_only,
        cache: what.cache,
        direct_fallback: true,
        ..ChainOptions::default()
    };
    let chain = Chain::open(&spec, &chain).unwrap();
    let disk = Disk::new(chain, what.disk).unwrap();
    let workers = (0..what.workers)
        .map(|index| {
            Worker::spawn(WorkerOptions {
                polling: what.polling,
                ..WorkerOptions::new(index, what.engine)
            })
            .unwrap()
        })
        .collect();
    let mut served = Served {
        dir,
        disk,
        workers,
        server: None,
        options: what.options,
    };
    served.start();
    served
}

impl Served {
    pub fn start(&mut self) {
        let server = VhostUser::serve(
            &self.socket(),
            self.disk.clone(),
            &self.workers,
            self.options.clone(),
        );
        self.server = Some(server.unwrap());
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost.sock")
    }

    pub fn file(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("disk.raw")).unwrap()
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
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
