//! The breakdown of requests to a disk whose times are known: the simulated engine takes them by the clock.

use crate::common;

use bench::breakdown::{Protocol, measure};
use common::{LEN, Served, serve_chain};
use disk::{Chain, DiskOptions, Layer};
use image::{
    Format,
    qcow2::{self, CreateOptions, Qcow2},
};
use io::{EngineKind, File, SimDisk, SimOptions};
use std::sync::Arc;
use testkit::TempDir;
use trace::{Breakdown, Entry, Operation, Stage, breakdown::Part};

const DELAY_NS: u64 = 2_000_000;

/// A qcow2 image on a device of which each operation takes [`DELAY_NS`].
fn slow() -> Served {
    let sim = SimDisk::new(SimOptions {
        delay_ns: (DELAY_NS, DELAY_NS),
        real_time: true,
        ..SimOptions::default()
    });
    let file = File::sim(Arc::clone(&sim)).unwrap();
    let create = CreateOptions {
        size: LEN,
        ..CreateOptions::default()
    };
    qcow2::create(&*file, &create).unwrap();
    let image = Qcow2::open(&*file, &qcow2::OpenOptions::default()).unwrap();
    let chain = Chain::new(
        vec![Layer {
            image: Arc::new(image),
            files: vec![file],
            path: "sim".into(),
            format: Format::Qcow2,
            part: None,
        }],
        false,
    );
    serve_chain(
        TempDir::new(),
        chain,
        // A flush's commit is its own.
        DiskOptions {
            flush_ahead: false,
            ..DiskOptions::default()
        },
        EngineKind::Sim,
    )
}

/// What the disk's newest queue noted of its last `count` requests, when it has noted as many as were asked of it.
fn noted(served: &Served, asked: u64, count: usize) -> Vec<Entry> {
    loop {
        let traces = served.disk.queue_traces();
        let live = traces.iter().filter(|trace| trace.is_live());
        let ring = live.max_by_key(|trace| trace.number()).unwrap().ring();
        if ring.written() >= asked {
            return ring.last(count).entries;
        }
        std::thread::yield_now();
    }
}

fn breakdown(served: &Served, target: usize, operation: Operation) -> Breakdown {
    let protocol = Protocol {
        operation,
        requests: 12,
        dropped: 2,
        runs: 2,
        warm_up: 0,
        ..Protocol::default()
    };
    let mut asked = 0;
    // Of a flush: what comes before it too.
    let mut entries = |count: usize| {
        asked += count as u64;
        Ok(noted(served, asked, count))
    };
    measure(&served.targets()[target], &protocol, &mut entries).unwrap()
}

#[test]
fn known_delays_come_out_at_their_stage() {
    for target in [0, 1] {
        let served = slow();
        let device = Part::In(Stage::Device);
        let commit = Part::In(Stage::Commit);
        // Written first: reads of what is not there do nothing.
        let writes = breakdown(&served, target, Operation::Write);
        let reads = breakdown(&served, target, Operation::Read);
        let flushes = breakdown(&served, target, Operation::Flush);
        let delay = DELAY_NS as f64;
        for (what, breakdown, at) in [
            ("writes", &writes, device),
            ("reads", &reads, device),
            ("flushes", &flushes, commit),
        ] {
            let own = breakdown.part_ns(at);
            assert!(own >= delay, "{what}, {target}: {at} of {own} ns");
            // Whatever else there is, is not the device's.
            for part in Part::ALL.into_iter().filter(|part| *part != at) {
                let other = breakdown.part_ns(part);
                assert!(
                    other < own,
                    "{what}, {target}: {part} {other} ns, {at} {own} ns"
                );
            }
        }
    }
}
