//! E1: native or threads (document 001).

use super::plan::{
    Cell, Claim, Experiment, Finding, Format, How, Image, Place, Side, State, System, side, term,
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
    /// In a quick run too: with one virtual machine, and with sixteen.
    quick: (bool, bool),
}

const fn disk(
    name: &'static str,
    format: Format,
    state: State,
    place: Place,
    quick: (bool, bool),
) -> Disk {
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

const YES: (bool, bool) = (true, false);
const NO: (bool, bool) = (false, false);
const EXT4: Place = Place::own(System::Ext4);
const XFS: Place = Place::own(System::Xfs);
const HDD: Place = Place::rotating(System::None);
const HDD_EXT4: Place = Place::rotating(System::Ext4);
const HDD_XFS: Place = Place::rotating(System::Xfs);

const DISKS: [Disk; 19] = [
    disk("raw-here", Format::Raw, State::Full, Place::HERE, NO),
    disk("raw-ext4", Format::Raw, State::Full, EXT4, (true, true)),
    disk("raw-xfs", Format::Raw, State::Full, XFS, YES),
    disk(
        "raw-nfs-ext4",
        Format::Raw,
        State::Full,
        Place::own(System::NfsExt4),
        NO,
    ),
    disk(
        "raw-nfs-xfs",
        Format::Raw,
        State::Full,
        Place::own(System::NfsXfs),
        NO,
    ),
    disk("qcow2-ext4", Format::Qcow2, State::Growing, EXT4, YES),
    disk("qcow2-xfs", Format::Qcow2, State::Growing, XFS, NO),
    disk("qcow2-falloc-ext4", Format::Qcow2, State::Falloc, EXT4, YES),
    disk("qcow2-falloc-xfs", Format::Qcow2, State::Falloc, XFS, NO),
    disk("qcow2-full-ext4", Format::Qcow2, State::Full, EXT4, NO),
    disk("qcow2-full-xfs", Format::Qcow2, State::Full, XFS, NO),
    disk("raw-hdd", Format::Raw, State::Full, HDD, NO),
    disk("raw-hdd-ext4", Format::Raw, State::Full, HDD_EXT4, NO),
    disk("raw-hdd-xfs", Format::Raw, State::Full, HDD_XFS, NO),
    disk(
        "qcow2-hdd-ext4",
        Format::Qcow2,
        State::Growing,
        HDD_EXT4,
        NO,
    ),
    disk("qcow2-hdd-xfs", Format::Qcow2, State::Growing, HDD_XFS, NO),
    disk(
        "qcow2-falloc-hdd-ext4",
        Format::Qcow2,
        State::Falloc,
        HDD_EXT4,
        NO,
    ),
    disk(
        "qcow2-falloc-hdd-xfs",
        Format::Qcow2,
        State::Falloc,
        HDD_XFS,
        NO,
    ),
    disk(
        "qcow2-full-hdd-ext4",
        Format::Qcow2,
        State::Full,
        HDD_EXT4,
        NO,
    ),
];

/// Virtual machines at once in the document's second column.
const SEVERAL: u8 = 16;

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

fn cell(disk: &Disk, name: &str, pattern: Pattern, machines: u8) -> Option<Cell> {
    let reads = matches!(pattern, Pattern::Read | Pattern::RandRead | Pattern::RandRw);
    // What was never written reads as zeros, without the device: there is nothing to measure.
    if disk.image.state == State::Growing && reads {
        return None;
    }
    // A device is one disk.
    if machines > 1 && disk.image.place == HDD {
        return None;
    }
    let image = Image {
        disks: machines,
        ..disk.image
    };
    let mut sides = sides(image);
    for side in &mut sides {
        side.server_each = machines > 1;
    }
    let (one, several) = disk.quick;
    // The rotating disk as it is, once each way.
    let rotating =
        disk.image.place == HDD && matches!(pattern, Pattern::RandRead | Pattern::RandWrite);
    Some(Cell {
        name: match machines {
            1 => format!("{name}-{}", disk.name),
            n => format!("{name}-{}-{n}vms", disk.name),
        },
        axes: vec![
            ("load".to_owned(), name.to_owned()),
            ("disk".to_owned(), disk.name.to_owned()),
            ("machines".to_owned(), machines.to_string()),
        ],
        load: Load {
            pattern,
            ..RANDREAD
        },
        files: None,
        sides,
        quick: match machines {
            1 => one && pattern != Pattern::RandRw || rotating,
            _ => several && pattern == Pattern::RandRead,
        },
    })
}

/// What the document's table says: the test, the disk, who is ahead, and by how much if it says.
const PUBLISHED: [(&str, &str, Ahead, Option<f64>); 24] = [
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
    ("randread", "raw-hdd", Ahead::Native, None),
    ("randwrite", "raw-hdd", Ahead::Native, None),
    ("read", "raw-hdd-ext4", Ahead::Native, None),
    ("randread", "raw-hdd-xfs", Ahead::Native, None),
    ("randwrite", "qcow2-hdd-ext4", Ahead::Native, None),
    // The row lists randread, where threads were 30 % ahead.
    (
        "randread",
        "qcow2-falloc-hdd-ext4",
        Ahead::Threads,
        Some(1.3),
    ),
    ("write", "qcow2-falloc-hdd-xfs", Ahead::Threads, Some(1.3)),
    ("randwrite", "raw-hdd-ext4-16vms", Ahead::Native, None),
    ("randread", "qcow2-full-ext4-16vms", Ahead::Native, None),
    (
        "randread",
        "qcow2-full-hdd-ext4-16vms",
        Ahead::Threads,
        Some(1.15),
    ),
];

/// A row of the document's table in words.
fn where_of(disk: &str) -> String {
    let (disk, machines) = match disk.strip_suffix("-16vms") {
        Some(disk) => (disk, "16 VMs"),
        None => (disk, "one VM"),
    };
    let medium = if disk.contains("hdd") { "HDD" } else { "SSD" };
    format!("{medium}, {disk}, {machines}")
}

#[derive(Clone, Copy)]
enum Ahead {
    Native,
    Threads,
}

pub(super) fn experiment() -> Experiment {
    let cells = [1, SEVERAL].into_iter().flat_map(|machines| {
        DISKS.iter().flat_map(move |disk| {
            PATTERNS
                .iter()
                .filter_map(move |(name, pattern)| cell(disk, name, *pattern, machines))
        })
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
                says: format!("{}, {first} is ahead of {second} at {test}", where_of(disk)),
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
                  on a rotating disk; here a load generator stands for each machine (16 disks share the bytes of one, and each has \
                  a server), the SSD is what the folder lies on, and the rotating disk (7200 turns a minute, NCQ, 1 MiB of write cache) \
                  is simulated (diskplane bench device). Rows on NFS say why they are not here.",
        cells: cells.collect(),
        findings,
        absent: &[],
        figures: &[Metric::Iops, Metric::CpuUs, Metric::P99Us],
        disk_bytes: (1 << 30, 256 << 20),
    }
}
