//! One client of the control socket.

use super::{CLIENTS_MAX, Told};
use disk::now_ns;
use std::{
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    os::unix::net::UnixStream,
};
use trace::{
    Operation, Stage, Totals,
    control::{
        DiskInfo, DiskStatistics, End, Hello, Latencies, Line, OfOperation, QueueInfo,
        REQUEST_BYTES_MAX, Request, Traced, VERSION,
    },
};

/// Entries that are read from a ring at once: 100 KiB.
const CHUNK: usize = 1024;

/// Tells a client that there are too many.
pub(super) fn refuse(stream: &UnixStream) {
    let why = format!("{CLIENTS_MAX} clients are connected already: try again");
    // It may not listen at all.
    let _ = put(&mut BufWriter::new(stream), &Line::Error(why));
}

/// Answers until the client goes, is silent for too long, or sends what is no request.
pub(super) fn serve(stream: &UnixStream, disks: &[Told]) {
    // Its end is its own business, whatever it was.
    if let Err(error) = answer_all(stream, disks) {
        tracing::debug!(%error, "a client of the control socket is gone");
    }
    // Another handle of the socket is kept to end it by.
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

fn answer_all(stream: &UnixStream, disks: &[Told]) -> io::Result<()> {
    let mut input = BufReader::new(stream);
    let mut output = BufWriter::new(stream);
    let hello = Hello {
        control: VERSION,
        diskplane: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
    };
    put(&mut output, &Line::Hello(hello))?;
    output.flush()?;
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = REQUEST_BYTES_MAX + 1;
        (&mut input).take(limit).read_until(b'\n', &mut line)?;
        match line.last() {
            None => return Ok(()),
            Some(b'\n') => {}
            Some(_) => {
                let why = match line.len() as u64 {
                    bytes if bytes >= limit => {
                        format!("a request has at most {REQUEST_BYTES_MAX} bytes")
                    }
                    _ => "a request ends with a newline".into(),
                };
                put(&mut output, &Line::Error(why))?;
                return output.flush();
            }
        }
        let end = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => answer(&request, disks, &mut output)?,
            Err(error) => Line::Error(format!("no request: {error}")),
        };
        put(&mut output, &end)?;
        output.flush()?;
    }
}

/// Puts the lines of an answer; its last one.
fn answer(request: &Request, disks: &[Told], output: &mut impl Write) -> io::Result<Line> {
    match *request {
        Request::Disks => {
            for (number, told) in disks.iter().enumerate() {
                put(output, &Line::Disk(info(number, told)))?;
            }
        }
        Request::Statistics => {
            for (disk, told) in disks.iter().enumerate() {
                let statistics = serde_json::to_value(told.disk.statistics())?;
                let line = DiskStatistics {
                    disk,
                    file: told.file.clone(),
                    at_ns: now_ns(),
                    statistics,
                };
                put(output, &Line::Statistics(line))?;
            }
        }
        Request::Entries {
            disk,
            queue,
            since,
            max,
        } => {
            let Some(told) = disks.get(disk) else {
                return Ok(Line::Error(format!(
                    "there is no disk {disk}: there are {}",
                    disks.len()
                )));
            };
            let traces = told.disk.queue_traces();
            let Some(trace) = traces.iter().find(|trace| trace.number() == queue) else {
                return Ok(Line::Error(format!(
                    "disk {disk} has no queue {queue} (any more)"
                )));
            };
            // What comes while this is sent is not asked for: the answer ends, however slowly it is taken.
            let until = trace.ring().written();
            let mut end = End {
                next: since.min(until),
                lost: 0,
            };
            let mut left = (max as u64).min(until - end.next);
            while left > 0 {
                let chunk = left.min(CHUNK as u64) as usize;
                let read = trace.ring().read(end.next, chunk);
                let passed = read.next - end.next;
                if passed == 0 {
                    break;
                }
                // Entries that were overwritten count as asked for.
                left = left.saturating_sub(passed);
                (end.next, end.lost) = (read.next, end.lost + read.lost);
                for entry in read.entries {
                    let queue = Some(queue);
                    put(output, &Line::Entry(Traced { disk, queue, entry }))?;
                }
            }
            return Ok(Line::End(end));
        }
        Request::Slowest { max } => {
            for (disk, told) in disks.iter().enumerate() {
                let traces = told.disk.queue_traces();
                for entry in told.disk.slowest(max) {
                    // A queue that is known still has it under its number.
                    let of = |trace: &&disk::QueueTrace| trace.slowest().contains(&entry);
                    let queue = traces.iter().find(of).map(disk::QueueTrace::number);
                    put(output, &Line::Entry(Traced { disk, queue, entry }))?;
                }
            }
        }
        Request::Histograms => {
            for (disk, told) in disks.iter().enumerate() {
                for operation in Operation::ALL {
                    let stages = Stage::ALL.into_iter().map(Some);
                    for stage in stages.chain([None]) {
                        let latencies = told.disk.latencies(operation, stage);
                        if latencies.count == 0 {
                            continue;
                        }
                        let line = Latencies {
                            disk,
                            operation,
                            stage,
                            latencies,
                        };
                        put(output, &Line::Histogram(line))?;
                    }
                }
            }
        }
        Request::Totals => {
            for (disk, told) in disks.iter().enumerate() {
                for operation in Operation::ALL {
                    let mut totals = Totals::default();
                    for stage in Stage::ALL {
                        totals.note(stage, &told.disk.latencies(operation, Some(stage)));
                    }
                    if totals.count > 0 {
                        let of = OfOperation {
                            disk,
                            operation,
                            totals,
                        };
                        put(output, &Line::Totals(of))?;
                    }
                }
            }
        }
    }
    Ok(Line::End(End::default()))
}

fn info(number: usize, told: &Told) -> DiskInfo {
    let traces = told.disk.queue_traces();
    let queues = traces.iter().map(|trace| QueueInfo {
        queue: trace.number(),
        name: trace.name().into(),
        live: trace.is_live(),
        entries: trace.ring().capacity(),
        recorded: trace.ring().written(),
    });
    DiskInfo {
        disk: number,
        file: told.file.clone(),
        size: told.disk.size(),
        queues: queues.collect(),
    }
}

fn put(output: &mut impl Write, line: &Line) -> io::Result<()> {
    serde_json::to_writer(&mut *output, line)?;
    output.write_all(b"\n")
}
