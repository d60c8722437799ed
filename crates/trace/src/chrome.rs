//! Requests as a file that Perfetto (ui.perfetto.dev) and `chrome://tracing` open: the "JSON Array Format" of the Trace Event
//! Format document, of which complete events (`X`) and metadata (`M`) are used.
//!
//! ```text
//!   process  a disk
//!     thread   a queue: one request's slice, and its stages' slices within
//!     thread   the same queue, for requests that overlap those of the first; and so on
//! ```
//!
//! Threads have small numbers of their own: readers keep them in 32 bits, and queues of a long-lived server are many.
//!
//! Slices of a thread must nest, so each request is put on the first thread of its queue that is free when it begins.
//! Times are microseconds with fractions of a nanosecond's size, from the first request on.

use crate::{
    control::{DiskInfo, Traced},
    stage::Stage,
};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The file, for requests of these disks.
pub fn document(disks: &[DiskInfo], requests: &[Traced]) -> Value {
    let mut requests: Vec<&Traced> = requests.iter().collect();
    requests.sort_by_key(|traced| (traced.entry.begin_ns, traced.entry.number));
    let origin = requests.first().map_or(0, |traced| traced.entry.begin_ns);
    let mut events = Vec::new();
    for disk in disks {
        events.push(metadata("process_name", disk.disk, 0, &disk.file));
    }
    // The threads of each queue, and when they are free again.
    let mut free: BTreeMap<(usize, u64), Vec<(u64, u64)>> = BTreeMap::new();
    let mut threads = 0;
    for traced in requests {
        let queue = traced.queue.unwrap_or(u64::MAX);
        let (entry, total) = (&traced.entry, traced.entry.total_ns());
        let lanes = free.entry((traced.disk, queue)).or_default();
        let found = lanes.iter().position(|(_, free)| *free <= entry.begin_ns);
        let lane = found.unwrap_or(lanes.len());
        if lane == lanes.len() {
            let name = disks
                .iter()
                .find(|disk| disk.disk == traced.disk)
                .and_then(|disk| disk.queues.iter().find(|q| q.queue == queue))
                .map_or_else(|| "queue".into(), |q| format!("queue {queue}: {}", q.name));
            let name = match lane {
                0 => name,
                lane => format!("{name}, {} at a time", lane + 1),
            };
            threads += 1;
            events.push(metadata("thread_name", traced.disk, threads, &name));
            lanes.push((threads, 0));
        }
        let thread = lanes[lane].0;
        lanes[lane].1 = entry.begin_ns.saturating_add(total);
        let begin = entry.begin_ns - origin;
        let slice = |name: &str, category: &'static str, at: u64, ns: u64, args: Option<Value>| {
            let event = Slice {
                name: name.into(),
                cat: category,
                ph: "X",
                ts: at as f64 / 1000.0,
                dur: ns as f64 / 1000.0,
                pid: traced.disk,
                tid: thread,
                args,
            };
            serde_json::to_value(event).unwrap_or_default()
        };
        let args = json!({
            "number": entry.number, "offset": entry.offset, "bytes": entry.bytes, "status": entry.status,
        });
        let name = entry.operation.name();
        events.push(slice(name, "request", begin, total, Some(args)));
        let mut at = begin;
        for stage in Stage::ALL {
            let ns = entry.stages_ns[stage];
            if ns > 0 {
                events.push(slice(stage.name(), "stage", at, ns, None));
            }
            at += ns;
        }
    }
    json!({ "displayTimeUnit": "ns", "traceEvents": events })
}

#[derive(Serialize)]
struct Slice {
    name: String,
    cat: &'static str,
    ph: &'static str,
    ts: f64,
    dur: f64,
    pid: usize,
    tid: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<Value>,
}

fn metadata(what: &str, process: usize, thread: u64, name: &str) -> Value {
    json!({ "name": what, "ph": "M", "pid": process, "tid": thread, "args": { "name": name } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Entry, Operation, Status, Times, control::QueueInfo};

    fn traced(disk: usize, queue: u64, number: u64, begin_ns: u64, stages: [u64; 8]) -> Traced {
        let entry = Entry {
            number,
            operation: Operation::Read,
            offset: 512 * number,
            bytes: 512,
            status: Status::Ok,
            begin_ns,
            stages_ns: Times(stages),
        };
        Traced {
            disk,
            queue: Some(queue),
            entry,
        }
    }

    /// What Perfetto asks of such a file: known phases, numbers where numbers belong, and slices of a thread that nest.
    fn check(document: &Value) -> usize {
        let mut open: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        let mut slices = 0;
        let ns = |value: &Value| (value.as_f64().unwrap() * 1000.0).round() as u64;
        for event in document["traceEvents"].as_array().unwrap() {
            let track = (
                event["pid"].as_u64().unwrap(),
                event["tid"].as_u64().unwrap(),
            );
            match event["ph"].as_str().unwrap() {
                "M" => {
                    assert!(event["args"]["name"].is_string(), "{event}");
                    let what = event["name"].as_str().unwrap();
                    assert!(matches!(what, "process_name" | "thread_name"), "{what}");
                }
                "X" => {
                    slices += 1;
                    assert!(event["name"].is_string() && event["cat"].is_string());
                    let (begin, dur) = (ns(&event["ts"]), ns(&event["dur"]));
                    let stack = open.entry(track).or_default();
                    while stack.last().is_some_and(|(_, end)| *end <= begin) {
                        stack.pop();
                    }
                    if let Some((outer, end)) = stack.last() {
                        assert!(*outer <= begin && begin + dur <= *end, "{event}");
                    }
                    stack.push((begin, begin + dur));
                }
                other => panic!("phase {other}"),
            }
        }
        slices
    }

    #[test]
    fn slices_nest_on_tracks_of_their_own() {
        let disks = [DiskInfo {
            disk: 0,
            file: "vm.qcow2".into(),
            size: 1 << 30,
            queues: vec![QueueInfo {
                queue: 3,
                name: "vhost-user 0".into(),
                live: true,
                entries: 1024,
                recorded: 4,
            }],
        }];
        let requests = [
            traced(0, 3, 1, 2_000, [1, 2, 3, 4, 1000, 0, 5, 6]),
            // Overlaps the first; then both are free again.
            traced(0, 3, 0, 2_500, [0, 0, 3, 4, 3000, 0, 5, 6]),
            traced(0, 3, 2, 9_000, [1, 1, 1, 1, 1, 1, 1, 1]),
            traced(1, 1 << 40, 0, 2_100, [0, 0, 0, 0, 0, 0, 0, 0]),
        ];
        let document = document(&disks, &requests);
        assert_eq!(document["displayTimeUnit"], "ns");
        // A slice for each request, and for each of its stages that took time.
        assert_eq!(check(&document), 4 + 7 + 5 + 8);
        let events = document["traceEvents"].as_array().unwrap();
        let names: Vec<&str> = events
            .iter()
            .filter(|event| event["ph"] == "M")
            .map(|event| event["args"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(
            names,
            [
                "vm.qcow2",
                "queue 3: vhost-user 0",
                "queue",
                "queue 3: vhost-user 0, 2 at a time"
            ]
        );
        let mut threads: Vec<u64> = events.iter().filter_map(|e| e["tid"].as_u64()).collect();
        threads.sort_unstable();
        threads.dedup();
        assert_eq!(threads, [0, 1, 2, 3], "0 is the processes' names");
        let device = events
            .iter()
            .find(|event| event["name"] == "device")
            .unwrap();
        assert_eq!((&device["ts"], &device["dur"]), (&json!(0.01), &json!(1.0)));
        // Through text and back: what the file has.
        let text = document.to_string();
        assert_eq!(check(&serde_json::from_str(&text).unwrap()), 24);
        assert_eq!(check(&super::document(&[], &[])), 0);
    }
}
