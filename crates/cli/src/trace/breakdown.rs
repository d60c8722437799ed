//! `trace breakdown`: in which stages the time of requests goes.

use super::{Asked, Breakdown as Args, Over, Server, us};
use crate::{bench_versus::end_on_signals, print, signals::Signals, table};
use ::trace::{Breakdown, Entry, Operation, RING_ENTRIES_DEFAULT, breakdown::Sample};
use anyhow::{Context, Result, bail, ensure};
use bench::{
    breakdown::{Answer, Protocol, measure},
    load::Target,
    machine::process::Folder,
};
use block::{Error, ErrorKind};
use disk::{Chain, ChainOptions, Disk, DiskOptions};
use export::{
    nbd::{self, Nbd, NbdAddress},
    vhost_user::{self, VhostUser},
    worker::{Polling, Worker, WorkerOptions},
};
use io::Aio;
use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// How often a server is asked whether enough requests have ended.
const LOOK: Duration = Duration::from_millis(50);
/// How long the server may take to note what it has answered.
const NOTED: Duration = Duration::from_secs(5);
/// Cells of the widest bar.
const BAR: f64 = 30.0;

/// `trace breakdown`.
pub fn run(args: &Args) -> Result<()> {
    let answer = match (&args.control, &args.file) {
        (Some(control), _) => of_server(args, control)?,
        (None, Some(file)) => of_image(args, file)?,
        (None, None) => bail!("give an image, or --control SOCK"),
    };
    if args.json {
        return print(&crate::json(&answer)?);
    }
    print(&text(&answer))
}

fn operation(asked: Asked) -> (Operation, bool) {
    match asked {
        Asked::Read => (Operation::Read, false),
        Asked::RandRead => (Operation::Read, true),
        Asked::Write => (Operation::Write, false),
        Asked::RandWrite => (Operation::Write, true),
        Asked::Flush => (Operation::Flush, false),
    }
}

/// Of the next requests of a server that runs.
fn of_server(args: &Args, control: &Path) -> Result<Answer> {
    let server = Server {
        control: control.to_owned(),
        disk: args.disk,
    };
    let wanted = match args.rw.map(operation) {
        None => None,
        Some((operation, false)) => Some(operation),
        Some((_, true)) => {
            bail!("--rw: whether requests are random is not looked at: give read, write or flush")
        }
    };
    ensure!(args.number > 0, "--number 0: nothing would be looked at");
    let mut client = server.connect()?;
    // Where each queue stood at first. One that is new since then counts from its beginning on.
    let mut next: Vec<((usize, u64), u64)> = Vec::new();
    for disk in server.disks(&mut client)? {
        for queue in &disk.queues {
            ensure!(
                queue.entries > 0,
                "{}: the server keeps no records (serve --trace-ring)",
                block::plain(&disk.file)
            );
            next.push(((disk.disk, queue.queue), queue.recorded));
        }
    }
    let deadline = Instant::now() + Duration::from_secs_f64(args.wait);
    let (mut found, mut lost): (Vec<Entry>, u64) = (Vec::new(), 0);
    loop {
        for disk in server.disks(&mut client)? {
            for queue in disk.queues.iter().filter(|queue| queue.live) {
                let key = (disk.disk, queue.queue);
                let at = match next.iter().position(|(known, _)| *known == key) {
                    Some(at) => at,
                    None => {
                        next.push((key, 0));
                        next.len() - 1
                    }
                };
                if next[at].1 == queue.recorded {
                    continue;
                }
                let (entries, end) = client.entries(key.0, key.1, next[at].1, usize::MAX)?;
                next[at].1 = end.next;
                lost += end.lost;
                let counts = |entry: &Entry| wanted.is_none_or(|o| o == entry.operation);
                found.extend(entries.into_iter().filter(counts));
            }
        }
        if found.len() >= args.number {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "{} of {} requests ended within {} s: give a longer --wait or a lower --number",
            found.len(),
            args.number,
            args.wait
        );
        thread::sleep(LOOK);
    }
    if lost > 0 {
        eprintln!(
            "diskplane: note: {lost} requests more ended than the server could remember in between (serve --trace-ring)"
        );
    }
    found.sort_by_key(|entry| entry.begin_ns);
    found.truncate(args.number);
    let samples: Vec<Sample> = found.iter().map(Sample::of).collect();
    let breakdown =
        Breakdown::new(&[samples], args.drop.unwrap_or(0)).context("--drop leaves no request")?;
    Ok(Answer {
        subject: control.display().to_string(),
        over: None,
        engine: None,
        operation: wanted.map_or("requests", Operation::name).into(),
        block_bytes: None,
        breakdown,
    })
}

/// By the study's protocol, of an image that is served for it.
fn of_image(args: &Args, file: &str) -> Result<Answer> {
    let is_socket = fs::metadata(file).is_ok_and(|meta| meta.file_type().is_socket());
    ensure!(
        !is_socket,
        "{file} is a socket, not an image: a running server is asked with --control {file}"
    );
    // Before anything starts a thread, so that all of them leave these signals to the one that waits for them.
    end_on_signals(Signals::block()?, |stopped| {
        let mut text = "\ndiskplane: stopped by a signal\n".to_owned();
        for (folder, why) in stopped.remove() {
            text.push_str(&format!(
                "diskplane: {}: cannot be removed: {why}\n",
                folder.display()
            ));
        }
        text
    })?;
    let (operation, random) = operation(args.rw.unwrap_or(Asked::Read));
    let protocol = Protocol {
        operation,
        random,
        block_bytes: args.bs,
        requests: args.number,
        dropped: args.drop.unwrap_or(10),
        runs: args.runs,
        warm_up: args.number.min(100),
    };
    let read_only = operation == Operation::Read;
    let options = ChainOptions {
        format: args.format,
        read_only,
        cache: args.cache,
        direct_fallback: args.aio == Aio::Auto,
        allow_backing: args.allow_backing.clone(),
        repair: Some(crate::check::MEND),
        ..ChainOptions::default()
    };
    let chain = Chain::open(file, &options)?;
    let files: Vec<_> = chain.layers.iter().flat_map(|l| l.files.clone()).collect();
    for note in files.iter().filter_map(|file| file.fallback()) {
        eprintln!("diskplane: note: {}", block::plain(note));
    }
    let engine = io::choose(args.aio, &files)?.kind;
    let options = DiskOptions {
        read_only,
        writethrough: args.cache.writethrough(),
        // A run is read when it has ended; before a flush something is read and written.
        trace_entries: u32::try_from(args.number)?
            .saturating_mul(3)
            .max(RING_ENTRIES_DEFAULT),
        ..DiskOptions::default()
    };
    let disk = Disk::new(chain, options)?;
    let worker = Worker::spawn(WorkerOptions {
        polling: match args.poll {
            true => Polling::Always,
            false => Polling::default(),
        },
        ..WorkerOptions::new(0, engine)
    })?;
    let measured = serve_and_measure(args, &disk, &worker, &protocol);
    worker.stop();
    let closed = disk.close().with_context(|| format!("{file}: close"));
    let breakdown = measured?;
    closed?;
    let pattern = match (operation, random) {
        (Operation::Flush, _) => "flushes".into(),
        (operation, true) => format!("random {operation}s"),
        (operation, false) => format!("sequential {operation}s"),
    };
    Ok(Answer {
        subject: file.into(),
        over: Some(match args.over {
            Over::VhostUser => "vhost-user".into(),
            Over::Nbd => "nbd".into(),
        }),
        engine: Some(engine.to_string()),
        operation: pattern,
        block_bytes: Some(args.bs),
        breakdown,
    })
}

fn serve_and_measure(
    args: &Args,
    disk: &Arc<Disk>,
    worker: &export::worker::WorkerHandle,
    protocol: &Protocol,
) -> Result<Breakdown> {
    let folder = Folder::temporary("diskplane-trace")?;
    let socket = folder.path().join("socket");
    let workers = std::slice::from_ref(worker);
    let (mut next, mut queue) = (0, None);
    let mut entries = |count: usize| -> block::Result<Vec<Entry>> {
        // A request is noted after its client was told.
        let deadline = Instant::now() + NOTED;
        loop {
            let traces = disk.queue_traces();
            let trace = match queue {
                Some(number) => traces.iter().find(|trace| trace.number() == number),
                // The connection may have come by way of others, on which nothing was asked.
                None => traces.iter().find(|trace| trace.ring().written() > 0),
            };
            if let Some(trace) = trace
                && (trace.ring().written() >= next + count as u64 || Instant::now() >= deadline)
            {
                queue = Some(trace.number());
                let read = trace.ring().read(next, count);
                next = read.next;
                return Ok(read.entries);
            }
            if Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::Io, "the server noted no request"));
            }
            thread::yield_now();
        }
    };
    Ok(match args.over {
        Over::VhostUser => {
            let _server = VhostUser::serve(
                &socket,
                disk.clone(),
                workers,
                vhost_user::Options::default(),
            )?;
            measure(&Target::VhostUser(socket), protocol, &mut entries)?
        }
        Over::Nbd => {
            let address = NbdAddress::Unix(socket.clone());
            let _server = Nbd::serve(&address, disk.clone(), workers, nbd::Options::default())?;
            let uri = format!("unix:{}", socket.display());
            measure(&Target::Nbd(uri), protocol, &mut entries)?
        }
    })
}

fn text(answer: &Answer) -> String {
    let breakdown = &answer.breakdown;
    let mut head = block::plain(&answer.subject);
    head.push_str(": ");
    head.push_str(&block::plain(&answer.title()));
    head.push_str(&format!(
        "; {} run{} of {}, without {} fastest and {} slowest each\n",
        breakdown.runs,
        if breakdown.runs == 1 { "" } else { "s" },
        breakdown.requests,
        breakdown.dropped,
        breakdown.dropped
    ));
    let mut table = table::headed(&["part", "mean µs", "±", "share", ""], 1);
    if let Some(column) = table.column_mut(4) {
        column.set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    for time in &breakdown.parts {
        // Shares are 0 to 1.
        let cells = (time.share * BAR).round() as usize;
        table.add_row([
            time.part.to_string(),
            us(time.mean_ns),
            us(time.deviation_ns),
            format!("{:.1} %", time.share * 100.0),
            "█".repeat(cells),
        ]);
    }
    table.add_row([
        "total".into(),
        us(breakdown.total_ns),
        us(breakdown.total_deviation_ns),
        String::new(),
        String::new(),
    ]);
    head + &table::indented(&table)
}
