//! What a queue remembers of its requests is what was asked of it.

use crate::common;

use block::{GuestError, Op};
use common::{Rig, open};
use disk::DiskOptions;
use image::Format;
use io::EngineKind;
use trace::{Operation, Stage, Status};

#[test]
fn entries_are_what_was_asked() {
    let dir = common::dir();
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, vec![1; 1 << 20]).unwrap();
    let options = DiskOptions {
        trace_entries: 16,
        ..DiskOptions::default()
    };
    let disk = open(&raw, Format::Raw, options);
    let mut rig = Rig::new(&disk, EngineKind::Threads, 4);
    rig.queue().set_name("one".into());
    let mut asked = Vec::new();
    let before_ns = disk::now_ns();
    for n in 0..40u64 {
        let (op, data, len) = match n % 4 {
            0 => (Op::Write { fua: n % 8 == 0 }, vec![7; 4096], 4096),
            1 => (Op::Read, Vec::new(), 1024),
            2 => (Op::Flush, Vec::new(), 0),
            // Outside the disk.
            _ => (Op::Read, Vec::new(), 512),
        };
        let at = match n % 4 {
            2 => 0,
            3 => 1 << 20,
            _ => n * 4096,
        };
        let result = rig.one(op, at, data, len).map(|_| ());
        let expected = if n % 4 == 3 {
            Err(GuestError::Invalid)
        } else {
            Ok(())
        };
        assert_eq!(result, expected);
        asked.push((Operation::from(op), at, len, Status::from(result)));
    }
    rig.queue().notified(None);
    let after_ns = disk::now_ns();

    let traces = disk.queue_traces();
    assert_eq!(traces.len(), 1);
    assert_eq!((traces[0].number(), traces[0].name()), (0, "one"));
    let read = traces[0].ring().read(0, 100);
    assert_eq!((read.lost, read.next), (24, 40));
    let found: Vec<_> = read
        .entries
        .iter()
        .map(|e| (e.operation, e.offset, e.bytes, e.status))
        .collect();
    assert_eq!(found, asked[24..]);
    let mut last_ns = before_ns;
    for (entry, number) in read.entries.iter().zip(24..) {
        assert_eq!(entry.number, number);
        // One after the other: none began before the one before it had ended.
        assert!(entry.begin_ns >= last_ns, "{entry:?}");
        last_ns = entry.begin_ns + entry.total_ns();
        assert!(last_ns <= after_ns, "{entry:?}");
        let device = entry.stages_ns[Stage::Device];
        let commit = entry.stages_ns[Stage::Commit];
        match entry.operation {
            // The clock is read before a request goes to the device and when it comes back.
            Operation::Read => assert_eq!(device > 0, entry.status == Status::Ok, "{entry:?}"),
            Operation::Write => assert!(device > 0, "{entry:?}"),
            _ => assert!(commit > 0, "{entry:?}"),
        }
    }

    // All were counted, and none of them twice, stage by stage.
    for operation in [Operation::Read, Operation::Write, Operation::Flush] {
        let whole = disk.latencies(operation, None);
        let count = asked.iter().filter(|asked| asked.0 == operation).count();
        assert_eq!(whole.count, count as u64);
        let stages = Stage::ALL.map(|stage| disk.latencies(operation, Some(stage)));
        let sum: u64 = stages.iter().map(|stage| stage.sum_ns).sum();
        assert_eq!(sum, whole.sum_ns);
        for stage in stages {
            let counted: u64 = stage.buckets.count();
            assert_eq!(counted, whole.count);
        }
    }
    let slowest = disk.slowest(100);
    assert_eq!(slowest.len(), trace::SLOWEST_MAX);
    assert!(slowest.is_sorted_by_key(|entry| std::cmp::Reverse(entry.total_ns())));
    rig.detach();
    disk.close().unwrap();
}

#[test]
fn nothing_is_remembered_where_nobody_wants_it() {
    let dir = common::dir();
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, vec![1; 1 << 16]).unwrap();
    let options = DiskOptions {
        trace_entries: 0,
        ..DiskOptions::default()
    };
    let disk = open(&raw, Format::Raw, options);
    let mut rig = Rig::new(&disk, EngineKind::Threads, 4);
    assert!(!rig.queue().traces());
    for _ in 0..3 {
        rig.one(Op::Read, 0, Vec::new(), 512).unwrap();
    }
    rig.queue().notified(None);
    assert_eq!(disk.queue_traces()[0].ring().bytes(), 0);
    assert_eq!(disk.slowest(9), []);
    let statistics = disk.statistics();
    let read = &statistics.operations[0];
    assert_eq!(read.count, 3);
    assert!(read.device_ns > 0 && read.p50_ns > 0, "{read:?}");
    let device = disk.latencies(Operation::Read, Some(Stage::Device));
    assert_eq!(device.buckets.count(), 0);
    rig.detach();
    disk.close().unwrap();
}
