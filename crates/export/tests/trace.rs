//! What the server remembers of requests agrees with what the driver saw of them.

mod vhost_common;

use bench::driver::{BUFFERS, FLUSH, IN, Machine, OUT, Piece, Setup};
use disk::now_ns;
use std::{thread, time::Instant};
use trace::{Operation, Stage, breakdown::Sample};
use vhost_common::{What, serve};

/// The entries of the only queue, when there are `count`: the server notes a request after it has told of it.
fn entries(served: &vhost_common::Served, count: u64) -> Vec<trace::Entry> {
    let began = Instant::now();
    loop {
        let traces = served.disk.queue_traces();
        assert_eq!(traces.len(), 1);
        assert_eq!(traces[0].name(), "vhost-user 0");
        let read = traces[0].ring().read(0, 1000);
        if read.next == count {
            assert_eq!(read.lost, 0);
            return read.entries;
        }
        assert!(read.next < count && began.elapsed().as_secs() < 20);
        thread::yield_now();
    }
}

#[test]
fn entries_agree_with_the_driver() {
    let served = serve(What::default());
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    let mut seen = Vec::new();
    for n in 0..60u64 {
        let (kind, operation) = match n % 3 {
            0 => (OUT, Operation::Write),
            1 => (IN, Operation::Read),
            _ => (FLUSH, Operation::Flush),
        };
        let out = vec![5; if kind == OUT { 1024 } else { 0 }];
        let wanted = if kind == IN { 512 } else { 0 };
        let sector = if kind == FLUSH { 0 } else { n * 8 };
        let began = now_ns();
        let (status, _) = vm.request(0, kind, sector, &out, wanted);
        let ended = now_ns();
        assert_eq!(status, 0);
        let bytes = out.len() as u64 + u64::from(wanted);
        seen.push((operation, sector * 512, bytes, began, ended));
    }
    let found = entries(&served, 60);
    for (entry, (operation, offset, bytes, began, ended)) in found.iter().zip(seen) {
        assert_eq!(
            (entry.operation, entry.offset, entry.bytes),
            (operation, offset, bytes)
        );
        // It came after it was made, and the answer was there before the driver saw it.
        assert!(entry.begin_ns >= began, "{entry:?} {began}");
        let told = entry.begin_ns + entry.total_ns() - entry.stages_ns[Stage::Notify];
        assert!(told <= ended, "{entry:?} {ended}");
        let sample = Sample::with_client(entry, began, ended);
        assert_eq!(sample.total_ns(), ended - began);
        assert!(entry.stages_ns[Stage::Parse] > 0, "{entry:?}");
    }
    // Who is found awake is not kicked, and who is found waiting need not be called.
    for stage in [Stage::Ring, Stage::Notify] {
        assert!(
            found.iter().any(|entry| entry.stages_ns[stage] > 0),
            "{stage}"
        );
    }

    // A batch: all of them are there, and taken one after the other.
    let queue = &mut vm.queues[0];
    for i in 0..32u64 {
        let at = BUFFERS + i * 0x2000;
        let mut header = [0; 16];
        header[8] = i as u8;
        vm.ram.write(at, &header);
        let data = Piece::write(at + 0x1000, 512);
        let pieces = [Piece::read(at, 16), data, Piece::write(at + 16, 1)];
        queue.add(&pieces).expect("room for 32");
    }
    queue.kick();
    for _ in 0..32 {
        queue.wait();
    }
    let mut batch = entries(&served, 92).split_off(60);
    batch.sort_by_key(|entry| entry.offset);
    let mut taken = 0;
    for (i, entry) in batch.iter().enumerate() {
        assert_eq!((entry.offset, entry.bytes), (i as u64 * 512, 512));
        let at = entry.begin_ns + entry.stages_ns[Stage::Ring];
        assert!(at >= taken, "{entry:?}");
        taken = at;
    }
}
