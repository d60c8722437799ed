//! `diskplane serve`.
//!
//! ```text
//!   block signals · open chain · choose engine · start I/O threads · listen · "ready …"
//!        SIGUSR1: statistics
//!   SIGTERM, SIGINT: stop listening · finish what is in flight · flush · close clean · exit 0
//! ```

use crate::{
    args::{self, Discard},
    print,
    signals::{Signal, Signals},
    systemd,
};
use anyhow::{Context, Result, bail};
use block::{ErrorKind, size};
use disk::{Chain, ChainOptions, Disk, DiskOptions};
use export::{
    nbd::{self, Nbd},
    vhost_user::{self, VhostUser},
    worker::{Worker, WorkerHandle, WorkerOptions},
};
use io::{Aio, EngineKind};
use std::{
    fmt::Write,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Bytes of the serial number that a virtio block device has (virtio 1.2, 5.2.6.1).
const SERIAL_BYTES: usize = 20;

/// How long an image that is locked is tried again, and how often.
const LOCK_WAIT: Duration = Duration::from_millis(500);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// The sockets that listen. Dropping them stops them.
#[derive(Debug)]
struct Exports {
    vhost_user: Option<vhost_user::Server>,
    nbd: Option<nbd::Server>,
}

/// Serves an image until a signal stops it.
pub fn run(args: &args::Serve) -> Result<()> {
    if args.vhost_user.is_some() && args.nbd.is_some() && !args.shared {
        bail!(
            "--vhost-user and --nbd at once: two clients that both cache would damage a file system; \
             say --shared if they know of each other"
        );
    }
    // Before anything starts a thread: all of them inherit the mask.
    let mut signals = Signals::block()?;
    let chain = open(args)?;
    let files: Vec<_> = chain.layers.iter().flat_map(|l| l.files.clone()).collect();
    for note in files.iter().filter_map(|file| file.fallback()) {
        eprintln!("diskplane: note: {note}");
    }
    let engine = io::choose(args.aio, &files)?;
    tracing::info!(engine = %engine.kind, reason = engine.reason, "engine");
    let disk = Disk::new(chain, disk_options(args))?;
    let mut workers = Vec::new();
    let served = start_workers(args.io_threads, engine.kind, &mut workers)
        .and_then(|()| serve(args, &disk, &workers, engine.kind, &mut signals));
    for worker in &workers {
        worker.stop();
    }
    // Also after a failure: what reached the disk until then is to be found in a clean image.
    let closed = disk
        .close()
        .with_context(|| format!("{}: close", args.file));
    if args.stats {
        eprintln!("{}", disk.statistics().table());
    }
    served.and(closed)
}

/// Opens the chain. An image that is locked is tried again for a moment: the kernel takes the ring of an
/// io_uring process that was killed apart in the background, with its files and their locks, and whoever
/// restarts such a server (systemd does at once) would be refused.
fn open(args: &args::Serve) -> Result<Chain> {
    let began = Instant::now();
    loop {
        match Chain::open(&args.file, &chain_options(args)) {
            Err(error) if error.kind() == ErrorKind::Locked && began.elapsed() < LOCK_WAIT => {
                thread::sleep(LOCK_RETRY);
            }
            opened => return Ok(opened?),
        }
    }
}

fn start_workers(count: u16, engine: EngineKind, workers: &mut Vec<WorkerHandle>) -> Result<()> {
    for index in 0..usize::from(count) {
        workers.push(Worker::spawn(WorkerOptions::new(index, engine))?);
    }
    Ok(())
}

/// Listens, says so, and returns when a signal asked to stop and nothing is in flight any more.
fn serve(
    args: &args::Serve,
    disk: &Arc<Disk>,
    workers: &[WorkerHandle],
    engine: EngineKind,
    signals: &mut Signals,
) -> Result<()> {
    let exports = listen(args, disk, workers)?;
    print(&ready_line(args, disk, &exports, engine))?;
    systemd::notify("READY=1")?;
    while signals.wait()? == Signal::Statistics {
        eprintln!("{}", disk.statistics().table());
    }
    // Being ready is over, whether or not somebody can be told.
    if let Err(error) = systemd::notify("STOPPING=1") {
        tracing::warn!(%error, "cannot tell systemd");
    }
    drop(exports);
    Ok(())
}

fn listen(args: &args::Serve, disk: &Arc<Disk>, workers: &[WorkerHandle]) -> Result<Exports> {
    let name = Path::new(&args.file).file_stem().unwrap_or_default();
    let name = name.to_string_lossy();
    let vhost_user = match &args.vhost_user {
        Some(path) => {
            let options = vhost_user::Options {
                queues: args.queues,
                serial: name
                    .chars()
                    .filter(char::is_ascii_graphic)
                    .take(SERIAL_BYTES)
                    .collect(),
                ..vhost_user::Options::default()
            };
            Some(VhostUser::serve(path, disk.clone(), workers, options)?)
        }
        None => None,
    };
    let nbd = match &args.nbd {
        Some(address) => {
            let options = nbd::Options {
                read_only: args.read_only,
                ..nbd::Options::default()
            };
            Some(Nbd::serve(address, disk.clone(), workers, options)?)
        }
        None => None,
    };
    Ok(Exports { vhost_user, nbd })
}

fn chain_options(args: &args::Serve) -> ChainOptions {
    ChainOptions {
        format: args.format,
        read_only: args.read_only,
        cache: args.cache,
        // Who asks for an engine by name wants what it was chosen for, or to be told.
        direct_fallback: args.aio == Aio::Auto,
        allow_backing: args.allow_backing.clone(),
        ..ChainOptions::default()
    }
}

fn disk_options(args: &args::Serve) -> DiskOptions {
    DiskOptions {
        read_only: args.read_only,
        writethrough: args.cache.writethrough(),
        discard: args.discard == Discard::Unmap,
    }
}

/// `ready FILE SIZE engine:NAME [vhost-user:PATH] [nbd:ADDRESS]`.
fn ready_line(args: &args::Serve, disk: &Disk, exports: &Exports, engine: EngineKind) -> String {
    let size = size::human(disk.size());
    let mut line = format!("ready {} {size} engine:{engine}", args.file);
    if let Some(server) = &exports.vhost_user {
        let _ = write!(line, " vhost-user:{}", server.path().display());
    }
    if let Some(server) = &exports.nbd {
        let _ = write!(line, " nbd:{}", server.local_addr());
    }
    line.push('\n');
    line
}
