//! What a server remembers: its last requests, its slowest, and the latencies of all.

use super::{Dump, Histogram, Perfetto, Server, Slowest, us};
use crate::{print, print_on, table};
use ::trace::{
    Stage,
    control::{Client, DiskInfo, Latencies, Line, Request, Traced},
};
use anyhow::{Context, Result, ensure};
use std::{fmt::Write as _, fs::File, io::Write as _, thread, time::Duration};

/// How often a dump that follows looks.
const FOLLOW: Duration = Duration::from_millis(200);
/// Requests asked for at once.
const CHUNK: usize = 4096;

impl Server {
    pub(super) fn connect(&self) -> Result<Client> {
        Ok(Client::connect(&self.control)?)
    }

    pub(super) fn is_asked(&self, disk: usize) -> bool {
        self.disk.is_none_or(|asked| asked == disk)
    }

    /// The disks that were asked for.
    pub(super) fn disks(&self, client: &mut Client) -> Result<Vec<DiskInfo>> {
        let mut disks = client.disks()?;
        let count = disks.len();
        disks.retain(|disk| self.is_asked(disk.disk));
        ensure!(
            !disks.is_empty(),
            "--disk {}: the server has {count}, numbered from 0",
            self.disk.unwrap_or(0)
        );
        Ok(disks)
    }
}

/// A queue's requests from `since` on, however many.
fn entries(
    client: &mut Client,
    disk: usize,
    queue: u64,
    since: u64,
    each: &mut dyn FnMut(Traced) -> Result<()>,
) -> Result<(u64, u64)> {
    let (mut next, mut lost) = (since, 0);
    loop {
        let (entries, end) = client.entries(disk, queue, next, CHUNK)?;
        let got = entries.len();
        for entry in entries {
            let queue = Some(queue);
            each(Traced { disk, queue, entry })?;
        }
        (next, lost) = (end.next, lost + end.lost);
        if got + (end.lost as usize) < CHUNK {
            return Ok((next, lost));
        }
    }
}

/// Where the last `number` requests of a queue begin.
fn begin(recorded: u64, remembered: usize, number: Option<u64>) -> u64 {
    let kept = remembered as u64;
    recorded.saturating_sub(number.map_or(kept, |number| number.min(kept)))
}

/// `trace dump`.
pub fn dump(args: &Dump) -> Result<()> {
    let mut client = args.server.connect()?;
    // Where to go on, by disk and queue.
    let mut known: Vec<(usize, u64, u64)> = Vec::new();
    let mut first = true;
    loop {
        let disks = args.server.disks(&mut client)?;
        for disk in &disks {
            for queue in &disk.queues {
                if args.queue.is_some_and(|asked| asked != queue.queue) {
                    continue;
                }
                let here = |k: &&mut (usize, u64, u64)| (k.0, k.1) == (disk.disk, queue.queue);
                let since = match known.iter_mut().find(here) {
                    Some(k) => k.2,
                    // One that came after the first look is shown from its beginning on.
                    None if first => begin(queue.recorded, queue.entries, args.number),
                    None => 0,
                };
                if since == queue.recorded && !first {
                    continue;
                }
                let mut text = String::new();
                let (next, lost) =
                    entries(&mut client, disk.disk, queue.queue, since, &mut |traced| {
                        text.push_str(&serde_json::to_string(&traced)?);
                        text.push('\n');
                        Ok(())
                    })?;
                if !print_on(&text)? {
                    return Ok(());
                }
                if lost > 0 && !first {
                    eprintln!(
                        "diskplane: disk {}, queue {}: {lost} requests were overwritten before they were read",
                        disk.disk, queue.queue
                    );
                }
                known.retain(|k| (k.0, k.1) != (disk.disk, queue.queue));
                known.push((disk.disk, queue.queue, next));
            }
        }
        if !args.follow {
            ensure!(
                args.queue.is_none() || !known.is_empty(),
                "the disk has no such queue"
            );
            return Ok(());
        }
        first = false;
        thread::sleep(FOLLOW);
    }
}

/// All requests that the server remembers.
fn collect(
    server: &Server,
    client: &mut Client,
    number: Option<u64>,
) -> Result<(Vec<DiskInfo>, Vec<Traced>)> {
    let disks = server.disks(client)?;
    let mut all = Vec::new();
    for disk in &disks {
        for queue in &disk.queues {
            let since = begin(queue.recorded, queue.entries, number);
            entries(client, disk.disk, queue.queue, since, &mut |traced| {
                all.push(traced);
                Ok(())
            })?;
        }
    }
    Ok((disks, all))
}

/// `trace perfetto`.
pub fn perfetto(args: &Perfetto) -> Result<()> {
    let mut client = args.server.connect()?;
    let (disks, requests) = collect(&args.server, &mut client, args.number)?;
    ensure!(
        !requests.is_empty(),
        "the server remembers no request (serve --trace-ring)"
    );
    let document = ::trace::chrome::document(&disks, &requests);
    let named = || args.file.display().to_string();
    let mut file = File::create_new(&args.file).with_context(named)?;
    let written = serde_json::to_vec(&document)
        .map_err(anyhow::Error::from)
        .and_then(|bytes| Ok(file.write_all(&bytes)?));
    if written.is_err() {
        // A part of it opens nowhere.
        let _ = std::fs::remove_file(&args.file);
    }
    written.with_context(named)?;
    print(&format!(
        "{} requests in {}: open it at ui.perfetto.dev or chrome://tracing\n",
        requests.len(),
        block::plain(&named())
    ))
}

/// `trace slowest`.
pub fn slowest(args: &Slowest) -> Result<()> {
    let mut client = args.server.connect()?;
    let mut all = if args.recent {
        collect(&args.server, &mut client, None)?.1
    } else {
        args.server.disks(&mut client)?;
        let mut all = Vec::new();
        let request = Request::Slowest { max: args.number };
        client.ask(&request, &mut |line| {
            if let Line::Entry(traced) = line {
                all.push(traced);
            }
        })?;
        all
    };
    all.retain(|traced| args.server.is_asked(traced.disk));
    all.sort_by_key(|traced| std::cmp::Reverse(traced.entry.total_ns()));
    all.truncate(args.number);
    if args.json {
        return print(&crate::json(&all)?);
    }
    let mut header = vec![
        "disk",
        "queue",
        "request",
        "operation",
        "offset",
        "bytes",
        "status",
    ];
    header.extend(Stage::ALL.map(Stage::name));
    header.push("total");
    let mut table = table::headed(&header, 7);
    for Traced { disk, queue, entry } in &all {
        let mut row = vec![
            disk.to_string(),
            queue.map_or_else(|| "-".into(), |queue| queue.to_string()),
            entry.number.to_string(),
            entry.operation.to_string(),
            entry.offset.to_string(),
            entry.bytes.to_string(),
            entry.status.name().into(),
        ];
        row.extend(entry.stages_ns.0.map(|ns| us(ns as f64)));
        row.push(us(entry.total_ns() as f64));
        table.add_row(row);
    }
    print(&format!("{}stages in µs\n", table::indented(&table)))
}

/// `trace histogram`.
pub fn histogram(args: &Histogram) -> Result<()> {
    let mut client = args.server.connect()?;
    let disks = args.server.disks(&mut client)?;
    let mut all: Vec<Latencies> = Vec::new();
    client.ask(&Request::Histograms, &mut |line| {
        if let Line::Histogram(latencies) = line {
            all.push(latencies);
        }
    })?;
    all.retain(|latencies| args.server.is_asked(latencies.disk));
    if args.json {
        return print(&crate::json(&all)?);
    }
    let mut text = String::new();
    for disk in &disks {
        let mut operation = None;
        let _ = writeln!(text, "{}:", block::plain(&disk.file));
        let header = [
            "operation",
            "stage",
            "mean",
            "p50",
            "p90",
            "p99",
            "p99.9",
            "p99.99",
            "max",
        ];
        let mut table = table::headed(&header, 2);
        for one in all.iter().filter(|one| one.disk == disk.disk) {
            let new = operation.replace(one.operation) != Some(one.operation);
            let mut row = vec![
                match new {
                    true => format!("{} × {}", one.operation, one.latencies.count),
                    false => String::new(),
                },
                one.stage.map_or("whole", Stage::name).into(),
                us(one.latencies.mean_ns() as f64),
            ];
            let quantiles = [0.5, 0.9, 0.99, 0.999, 0.9999, 1.0];
            row.extend(
                quantiles.map(|q| match one.latencies.buckets.as_slice().is_empty() {
                    // A server without records counts no stages.
                    true => "-".into(),
                    false => us(one.latencies.quantile_ns(q) as f64),
                }),
            );
            table.add_row(row);
        }
        text.push_str(&table::indented(&table));
    }
    text.push_str(
        "µs since the disk is served; percentiles are upper edges of buckets of an eighth\n",
    );
    print(&text)
}
