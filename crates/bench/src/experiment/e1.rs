//! E1: native or threads (document 001).

use super::plan::{
    Cell, Claim, Experiment, Finding, Format, How, Image, Place, Side, State, side, term,
};
use crate::{
    load::Pattern,
    metric::Metric,
    versus::cell::{Load, RANDREAD, Server},
};

/// A configuration of the document's table.
struct Disk {
    name: &'static str,
    image: Image,
    quick: bool,
}

const fn disk(name: &'static str, format: Format, state: State, place: Place, quick: bool) -> Disk {
    Disk {
        name,
        image: Image {
            format,
            state,
            place,
            disks: 1,
        },
        quick,
    }
}

const DISKS: [Disk; 8] = [
    disk("raw-here", Format::Raw, State::Full, Place::Here, false),
    disk("raw-ext4", Format::Raw, State::Full, Place::Ext4, true),
    disk("raw-xfs", Format::Raw, State::Full, Place::Xfs, true),
    disk(
        "qcow2-ext4",
        Format::Qcow2,
        State::Growing,
        Place::Ext4,
        true,
    ),
    disk(
        "qcow2-xfs",
        Format::Qcow2,
        State::Growing,
        Place::Xfs,
        false,
    ),
    disk(
        "qcow2-falloc-ext4",
        Format::Qcow2,
        State::Falloc,
        Place::Ext4,
        true,
    ),
    disk(
        "qcow2-falloc-xfs",
        Format::Qcow2,
        State::Falloc,
        Place::Xfs,
        false,
    ),
    disk(
        "qcow2-full-ext4",
        Format::Qcow2,
        State::Full,
        Place::Ext4,
        false,
    ),
];

const PATTERNS: [(&str, Pattern); 5] = [
    ("read", Pattern::Read),
    ("randread", Pattern::RandRead),
    ("write", Pattern::Write),
    ("randwrite", Pattern::RandWrite),
    ("randrw", Pattern::RandRw),
];

fn sides(image: Image) -> Vec<Side> {
    let of = |server: &str, how, engine| Side {
        engine,
        ..side(format!("{server} {engine}"), how, image)
    };
    let (ours, qsd) = (How::Served(Server::Diskplane), How::Served(Server::Qsd));
    vec![
        of("qsd", qsd, "native"),
        of("qsd", qsd, "threads"),
        of("qsd", qsd, "io_uring"),
        of("diskplane", ours, "native"),
        of("diskplane", ours, "threads"),
        of("diskplane", ours, "io_uring"),
        of("diskplane", ours, "auto"),
    ]
}

fn cell(disk: &Disk, name: &str, pattern: Pattern) -> Option<Cell> {
    let reads = matches!(pattern, Pattern::Read | Pattern::RandRead | Pattern::RandRw);
    // What was never written reads as zeros, without the device: there is nothing to measure.
    if disk.image.state == State::Growing && reads {
        return None;
    }
    Some(Cell {
        name: format!("{name}-{}", disk.name),
        axes: vec![
            ("load".to_owned(), name.to_owned()),
            ("disk".to_owned(), disk.name.to_owned()),
        ],
        load: Load {
            pattern,
            ..RANDREAD
        },
        sides: sides(disk.image),
        quick: disk.quick && pattern != Pattern::RandRw,
    })
}

/// What the document's table says of one VM on an SSD: the test, the disk, who is ahead, and by how much if it says.
const PUBLISHED: [(&str, &str, Ahead, Option<f64>); 14] = [
    ("read", "raw-ext4", Ahead::Threads, Some(1.125)),
    ("randread", "raw-ext4", Ahead::Threads, Some(1.08)),
    ("write", "raw-ext4", Ahead::Native, None),
    ("randwrite", "raw-ext4", Ahead::Native, None),
    ("randrw", "raw-ext4", Ahead::Native, None),
    ("read", "raw-xfs", Ahead::Threads, None),
    ("randread", "raw-xfs", Ahead::Threads, None),
    ("write", "raw-xfs", Ahead::Threads, None),
    ("randwrite", "raw-xfs", Ahead::Threads, None),
    ("write", "qcow2-ext4", Ahead::Native, None),
    ("randwrite", "qcow2-ext4", Ahead::Native, None),
    ("write", "qcow2-falloc-ext4", Ahead::Native, None),
    ("randwrite", "qcow2-falloc-ext4", Ahead::Native, None),
    ("randwrite", "qcow2-xfs", Ahead::Native, None),
];

#[derive(Clone, Copy)]
enum Ahead {
    Native,
    Threads,
}

pub(super) fn experiment() -> Experiment {
    let cells = DISKS.iter().flat_map(|disk| {
        PATTERNS
            .iter()
            .filter_map(|(name, pattern)| cell(disk, name, *pattern))
    });
    let mut findings: Vec<Finding> = PUBLISHED
        .iter()
        .map(|(test, disk, ahead, ratio)| {
            let cell = format!("{test}-{disk}");
            let (first, second) = match ahead {
                Ahead::Native => ("native", "threads"),
                Ahead::Threads => ("threads", "native"),
            };
            Finding {
                says: format!("SSD, {disk}, one VM: {first} is ahead of {second} at {test}"),
                left: term(&cell, &format!("qsd {first}"), Metric::Iops),
                right: Some(term(&cell, &format!("qsd {second}"), Metric::Iops)),
                claim: Claim::More,
                published: *ratio,
            }
        })
        .collect();
    findings.push(Finding {
        says: "Threads take more CPU than native for a request".to_owned(),
        left: term("randread-raw-ext4", "qsd threads", Metric::CpuUs),
        right: Some(term("randread-raw-ext4", "qsd native", Metric::CpuUs)),
        claim: Claim::More,
        published: None,
    });
    findings.push(Finding {
        says: "QEMU merges writes: those of a sequence reach the device in larger requests than reads do".to_owned(),
        left: term("write-raw-ext4", "qsd native", Metric::DeviceWriteKib),
        right: Some(term("read-raw-ext4", "qsd native", Metric::DeviceReadKib)),
        claim: Claim::More,
        published: None,
    });
    // The goal for `auto`, which none of the document's engines was.
    for test in ["randread", "randwrite"] {
        for engine in ["native", "threads"] {
            let cell = format!("{test}-raw-ext4");
            findings.push(Finding {
                says: format!("(Ours: auto is not behind {engine} at {test})"),
                left: term(&cell, "diskplane auto", Metric::Iops),
                right: Some(term(&cell, &format!("diskplane {engine}"), Metric::Iops)),
                claim: Claim::NotLess(0.05),
                published: None,
            });
        }
    }
    Experiment {
        name: "E1",
        title: "Native or threads",
        source: "001: QEMU Disk IO, which performs better: native or threads? (2016)",
        meaning: "IOPS and CPU of each I/O engine, 4 KiB, 32 in flight, on raw and qcow2 files of different \
                  preallocation on ext4 and XFS, made on loop devices (with direct I/O) below the run's folder. A growing \
                  image is new for each sample, and only written. The document ran fio in one and in 16 virtual machines on an SSD and \
                  on a rotating disk; here a load generator stands for one machine, and the SSD is what the folder lies \
                  on. NFS and the rotating disk are not repeated.",
        cells: cells.collect(),
        findings,
        figures: &[Metric::Iops, Metric::CpuUs, Metric::P99Us],
        disk_bytes: (1 << 30, 256 << 20),
    }
}
