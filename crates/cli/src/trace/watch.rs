//! `trace watch`: what each disk did since the last look.

use super::{Watch, us};
use crate::{print_on, table};
use ::trace::{
    Operation, Snapshot, Stage,
    control::{Client, Line, Request},
};
use anyhow::Result;
use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    thread,
    time::{Duration, Instant},
};

/// What a disk has done until a moment.
#[derive(Clone, Debug, Default)]
struct Look {
    file: String,
    at_ns: u64,
    /// Bytes read and written.
    bytes: [u64; 2],
    /// By operation and stage (`None`: the whole).
    latencies: BTreeMap<(Operation, Option<Stage>), Snapshot>,
}

/// `trace watch`.
pub fn run(args: &Watch) -> Result<()> {
    let mut client = args.server.connect()?;
    args.server.disks(&mut client)?;
    let terminal = std::io::stdout().is_terminal();
    let mut last = look(&mut client)?;
    let mut left = args.count;
    let interval = Duration::from_secs_f64(args.interval);
    let mut next = Instant::now() + interval;
    while left != Some(0) {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next += interval;
        let now = look(&mut client)?;
        let header = [
            "disk", "image", "read/s", "write/s", "other/s", "MB/s in", "MB/s out", "mean", "p99",
            "ring", "parse", "map", "submit", "device", "commit", "complete", "notify",
        ];
        let mut table = table::headed(&header, 2);
        for (disk, now) in now.iter().filter(|(disk, _)| args.server.is_asked(**disk)) {
            let before = last.get(disk).cloned().unwrap_or_default();
            table.add_row(row(*disk, now, &before));
        }
        let text = table::indented(&table);
        let reads = print_on(&match terminal {
            // To the top, and nothing of the last look behind it.
            true => format!(
                "\x1b[H\x1b[J{text}latencies in µs, of reads and writes since the last look\n"
            ),
            false => text,
        })?;
        if !reads {
            break;
        }
        last = now;
        left = left.map(|left| left - 1);
    }
    Ok(())
}

/// Asks the server.
fn look(client: &mut Client) -> Result<BTreeMap<usize, Look>> {
    let mut looks: BTreeMap<usize, Look> = BTreeMap::new();
    client.ask(&Request::Statistics, &mut |line| {
        if let Line::Statistics(of) = line {
            let look = looks.entry(of.disk).or_default();
            let bytes = |name: &str| {
                let operations = of.statistics["operations"].as_array();
                let mut operations = operations.into_iter().flatten();
                let found = operations.find(|o| o["operation"] == name);
                found.and_then(|o| o["bytes"].as_u64()).unwrap_or(0)
            };
            look.bytes = [bytes("read"), bytes("write")];
            look.file = of.file;
            look.at_ns = of.at_ns;
        }
    })?;
    client.ask(&Request::Histograms, &mut |line| {
        if let Line::Histogram(of) = line {
            let look = looks.entry(of.disk).or_default();
            look.latencies
                .insert((of.operation, of.stage), of.latencies);
        }
    })?;
    Ok(looks)
}

fn row(disk: usize, now: &Look, before: &Look) -> Vec<String> {
    let seconds = now.at_ns.saturating_sub(before.at_ns).max(1) as f64 / 1e9;
    let since = |operation: Operation, stage: Option<Stage>| {
        let key = (operation, stage);
        let later = now.latencies.get(&key).cloned().unwrap_or_default();
        match before.latencies.get(&key) {
            Some(earlier) => later.since(earlier),
            None => later,
        }
    };
    let rate = |operations: &[Operation]| {
        let count: u64 = operations.iter().map(|o| since(*o, None).count).sum();
        format!("{:.0}", count as f64 / seconds)
    };
    let megabytes = |which: usize| {
        let bytes = now.bytes[which].saturating_sub(before.bytes[which]);
        format!("{:.1}", bytes as f64 / 1e6 / seconds)
    };
    let data = |stage| {
        let mut both = since(Operation::Read, stage);
        both.merge(&since(Operation::Write, stage));
        both
    };
    let whole = data(None);
    let mut row = vec![
        disk.to_string(),
        block::plain(&now.file),
        rate(&[Operation::Read]),
        rate(&[Operation::Write]),
        rate(&[Operation::Flush, Operation::Discard, Operation::WriteZeroes]),
        megabytes(0),
        megabytes(1),
        us(whole.mean_ns() as f64),
        us(whole.quantile_ns(0.99) as f64),
    ];
    row.extend(Stage::ALL.map(|stage| us(data(Some(stage)).mean_ns() as f64)));
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_what_came_since() {
        let of = |count: u64, ns: u64| Snapshot {
            count,
            sum_ns: count * ns,
            buckets: [(ns, count)].into_iter().collect(),
        };
        let look = |at_ns, bytes, reads| Look {
            file: "vm.qcow2\n".into(),
            at_ns,
            bytes: [bytes, 0],
            latencies: [
                ((Operation::Read, None), of(reads, 5000)),
                ((Operation::Read, Some(Stage::Device)), of(reads, 4000)),
                ((Operation::Flush, None), of(reads / 10, 1)),
            ]
            .into(),
        };
        let row = row(
            3,
            &look(3_000_000_000, 9_000_000, 1100),
            &look(1_000_000_000, 1_000_000, 100),
        );
        assert_eq!(
            row[..10],
            [
                "3",
                "vm.qcow2?",
                "500",
                "0",
                "50",
                "4.0",
                "0.0",
                "5.0",
                "5.0",
                "0.0"
            ]
        );
        assert_eq!((row.len(), row[13].as_str()), (17, "4.0"));
    }
}
