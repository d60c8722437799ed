//! `diskplane serve`.
//!
//! ```text
//!   block signals · open chains · choose engine · start I/O threads · listen · "ready …"
//!        SIGUSR1: statistics
//!   SIGTERM, SIGINT: stop listening · finish what is in flight · flush · close clean · exit 0
//! ```

use crate::{
    args::{self, Discard, Stats},
    disks::{self, DiskSpec},
    print, say,
    signals::{Signal, Signals},
    systemd,
};
use anyhow::{Context, Result};
use block::{name, size};
use disk::{Chain, ChainOptions, Disk, DiskOptions};
use export::{
    control::{self, Told},
    nbd::{self, Nbd},
    vhost_user::{self, VhostUser},
    worker::{Polling, Worker, WorkerHandle, WorkerOptions},
};
use io::{Aio, EngineKind};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::{fmt::Write, path::Path, sync::Arc};

/// Bytes of the serial number that a virtio block device has (virtio 1.2, 5.2.6.1).
const SERIAL_BYTES: usize = 20;

/// A disk, and what it was asked for as.
#[derive(Debug)]
struct Served {
    spec: DiskSpec,
    disk: Arc<Disk>,
}

/// The sockets of a disk that listen. Dropping them stops them.
#[derive(Debug)]
struct Exports {
    vhost_user: Option<vhost_user::Server>,
    nbd: Option<nbd::Server>,
}

/// Serves disks until a signal stops it.
pub fn run(args: &args::Serve) -> Result<()> {
    let specs = disks::specs(args)?;
    // Before anything starts a thread: all of them inherit the mask.
    let mut signals = Signals::block()?;
    allow_descriptors();
    let chains = specs
        .iter()
        .map(|spec| open(args, spec))
        .collect::<Result<Vec<_>>>()?;
    let layers = chains.iter().flat_map(|chain| &chain.layers);
    let files: Vec<_> = layers.flat_map(|layer| layer.files.clone()).collect();
    for note in files.iter().filter_map(|file| file.fallback()) {
        eprintln!("diskplane: note: {}", block::plain(note));
    }
    // The disks share the I/O threads, so one engine has to do for all.
    let engine = io::choose(args.aio, &files)?;
    tracing::info!(engine = %engine.kind, reason = engine.reason, "engine");
    let mut served = Vec::with_capacity(specs.len());
    for (spec, chain) in specs.into_iter().zip(chains) {
        let disk = Disk::new(chain, disk_options(args, &spec))?;
        served.push(Served { spec, disk });
    }
    let mut workers = Vec::new();
    let mut outcome = start_workers(args, engine.kind, &mut workers)
        .and_then(|()| serve(args, &served, &workers, engine.kind, &mut signals));
    for worker in &workers {
        worker.stop();
    }
    // Also after a failure: what reached the disks until then is to be found in clean images.
    for Served { spec, disk } in &served {
        let closed = disk
            .close()
            .with_context(|| format!("{}: close", spec.file));
        // One failure ends the command; no other one may go unsaid.
        match (&outcome, closed) {
            (_, Ok(())) => {}
            (Ok(()), closed) => outcome = closed,
            (Err(_), Err(error)) => tracing::error!("{error:#}"),
        }
    }
    if let Some(form) = args.stats {
        print_statistics(form, &served);
    }
    outcome
}

/// Raises the limit of open descriptors to the hard one: a disk with its sockets takes about ten, and the soft
/// limit is 1024 by custom (for `select`, which nothing here uses).
fn allow_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Opens the chain, waiting a moment for a process before that has just ended.
fn open(args: &args::Serve, spec: &DiskSpec) -> Result<Chain> {
    let options = chain_options(args, spec)?;
    Ok(io::wait_for_lock(|| {
        Chain::open(name::path(&spec.file), &options)
    })?)
}

fn start_workers(
    args: &args::Serve,
    engine: EngineKind,
    workers: &mut Vec<WorkerHandle>,
) -> Result<()> {
    let polling = if args.poll {
        Polling::Always
    } else {
        Polling::up_to(args.poll_max)
    };
    for index in 0..usize::from(args.io_threads) {
        workers.push(Worker::spawn(WorkerOptions {
            polling,
            ..WorkerOptions::new(index, engine)
        })?);
    }
    Ok(())
}

/// Listens, says so, and returns when a signal asked to stop and nothing is in flight any more.
fn serve(
    args: &args::Serve,
    served: &[Served],
    workers: &[WorkerHandle],
    engine: EngineKind,
    signals: &mut Signals,
) -> Result<()> {
    let mut exports = Vec::with_capacity(served.len());
    let mut ready = String::new();
    for one in served {
        let listening = listen(one, workers)?;
        ready.push_str(&ready_line(one, &listening, engine));
        exports.push(listening);
    }
    let told = served.iter().map(|one| Told {
        file: name::shown(&one.spec.file).into_owned(),
        disk: one.disk.clone(),
    });
    let control = match &args.control {
        Some(path) => Some(control::Server::start(path, told.collect())?),
        None => None,
    };
    // Only when all listen: who sees the first line may connect to any.
    print(&ready)?;
    systemd::notify("READY=1")?;
    while signals.wait()? == Signal::Statistics {
        print_statistics(args.stats.unwrap_or_default(), served);
    }
    // Being ready is over, whether or not somebody can be told.
    if let Err(error) = systemd::notify("STOPPING=1") {
        tracing::warn!(%error, "cannot tell systemd");
    }
    drop(exports);
    drop(control);
    Ok(())
}

fn print_statistics(form: Stats, served: &[Served]) {
    let mut text = String::new();
    for Served { spec, disk } in served {
        let statistics = disk.statistics();
        match form {
            Stats::Table => {
                if served.len() > 1 {
                    let _ = writeln!(text, "{}:", spec.file);
                }
                let _ = writeln!(text, "{}", statistics.table());
            }
            Stats::Json => {
                let line = serde_json::json!({ "disk": name::shown(&spec.file), "statistics": statistics });
                let _ = writeln!(text, "{line}");
            }
        }
    }
    say(&text);
}

fn listen(served: &Served, workers: &[WorkerHandle]) -> Result<Exports> {
    let Served { spec, disk } = served;
    let name = Path::new(&spec.file).file_stem().unwrap_or_default();
    // Of a name in any bytes what a serial number can have is left.
    let name = name.to_string_lossy();
    let vhost_user = match &spec.vhost_user {
        Some(path) => {
            let options = vhost_user::Options {
                queues: spec.queues,
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
    let nbd = match &spec.nbd {
        Some(address) => {
            let options = nbd::Options {
                read_only: spec.read_only,
                ..nbd::Options::default()
            };
            Some(Nbd::serve(address, disk.clone(), workers, options)?)
        }
        None => None,
    };
    Ok(Exports { vhost_user, nbd })
}

fn chain_options(args: &args::Serve, spec: &DiskSpec) -> Result<ChainOptions> {
    Ok(ChainOptions {
        passphrases: spec.keys(args)?,
        format: spec.format,
        read_only: spec.read_only,
        cache: args.cache,
        cache_bytes: args.metadata_cache,
        // Who asks for an engine by name wants what it was chosen for, or to be told.
        direct_fallback: args.aio == Aio::Auto,
        allow_backing: args.allow_backing.clone(),
        data_file: spec.data_file.clone(),
        snapshot: spec.snapshot.clone(),
        repair: Some(crate::check::MEND),
        ..ChainOptions::default()
    })
}

fn disk_options(args: &args::Serve, spec: &DiskSpec) -> DiskOptions {
    DiskOptions {
        read_only: spec.read_only,
        writethrough: args.cache.writethrough(),
        discard: args.discard == Discard::Unmap,
        flush_ahead: !args.no_flush_ahead,
        prewrite: !args.no_prewrite,
        trace_entries: args.trace_ring,
    }
}

/// `ready FILE SIZE engine:NAME [vhost-user:PATH] [nbd:ADDRESS]`.
fn ready_line(served: &Served, exports: &Exports, engine: EngineKind) -> String {
    let size = size::human(served.disk.size());
    let mut line = format!("ready {} {size} engine:{engine}", served.spec.file);
    if let Some(server) = &exports.vhost_user {
        let _ = write!(line, " vhost-user:{}", server.path().display());
    }
    if let Some(server) = &exports.nbd {
        let _ = write!(line, " nbd:{}", server.local_addr());
    }
    line.push('\n');
    line
}
