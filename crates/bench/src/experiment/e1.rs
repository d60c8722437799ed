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
    format: Format,
    /// What is written to: new, but for what was preallocated.
    new: State,
    /// What is read, as a guest that wrote all of it left it.
    written: State,
    place: Place,
    /// In a quick run too: with one virtual machine, and with sixteen.
    quick: (bool, bool),
}

/// A raw file or device, which was written full.
const fn raw(name: &'static str, place: Place, quick: (bool, bool)) -> Disk {
    Disk {
        name,
        format: Format::Raw,
        new: State::Full,
        written: State::Full,
        place,
        quick,
    }
}

/// qcow2, preallocated so.
const fn qcow2(
    name: &'static str,
    (new, written): (State, State),
    place: Place,
    quick: (bool, bool),
) -> Disk {
    Disk {
        name,
        format: Format::Qcow2,
        new,
        written,
        place,
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

/// `preallocation=off`, `falloc` and `full`.
const OFF: (State, State) = (State::Growing, State::Full);
const FALLOC: (State, State) = (State::Falloc, State::Filled);
const FULL: (State, State) = (State::Zeroed, State::Zeroed);

/// Those of one place stand together: a given device holds one at a time.
const DISKS: [Disk; 23] = [
    raw("raw-here", Place::HERE, NO),
    raw("raw-device", Place::own(System::Device), NO),
    raw("raw-ext4", EXT4, (true, true)),
    qcow2("qcow2-ext4", OFF, EXT4, YES),
    qcow2("qcow2-falloc-ext4", FALLOC, EXT4, YES),
    qcow2("qcow2-full-ext4", FULL, EXT4, NO),
    raw("raw-xfs", XFS, YES),
    qcow2("qcow2-xfs", OFF, XFS, NO),
    qcow2("qcow2-falloc-xfs", FALLOC, XFS, NO),
    qcow2("qcow2-full-xfs", FULL, XFS, NO),
    raw("raw-nfs-ext4", Place::own(System::NfsExt4), NO),
    raw("raw-nfs-xfs", Place::own(System::NfsXfs), NO),
    raw("raw-hdd", HDD, NO),
    raw("raw-hdd-ext4", HDD_EXT4, NO),
    qcow2("qcow2-hdd-ext4", OFF, HDD_EXT4, NO),
    qcow2("qcow2-falloc-hdd-ext4", FALLOC, HDD_EXT4, NO),
    qcow2("qcow2-full-hdd-ext4", FULL, HDD_EXT4, NO),
    raw("raw-hdd-xfs", HDD_XFS, NO),
    qcow2("qcow2-hdd-xfs", OFF, HDD_XFS, NO),
    qcow2("qcow2-falloc-hdd-xfs", FALLOC, HDD_XFS, NO),
    qcow2("qcow2-full-hdd-xfs", FULL, HDD_XFS, NO),
    // Not in the document, which has the SSD over NFS alone.
    raw("raw-hdd-nfs-ext4", Place::rotating(System::NfsExt4), NO),
    raw("raw-hdd-nfs-xfs", Place::rotating(System::NfsXfs), NO),
];

/// Virtual machines at once in the document's second column.
const SEVERAL: u8 = 16;

/// A test of the document, or of those that its tool has by default.
struct Test {
    name: &'static str,
    pattern: Pattern,
    block: u64,
}

const fn test(name: &'static str, pattern: Pattern, kib: u64) -> Test {
    Test {
        name,
        pattern,
        block: kib << 10,
    }
}

/// The document's five at 4 KiB, and pbench's default: reads, in order and at random, up to 64 KiB.
const TESTS: [Test; 13] = [
    test("read", Pattern::Read, 4),
    test("randread", Pattern::RandRead, 4),
    test("write", Pattern::Write, 4),
    test("randwrite", Pattern::RandWrite, 4),
    test("randrw", Pattern::RandRw, 4),
    test("read-8k", Pattern::Read, 8),
    test("read-16k", Pattern::Read, 16),
    test("read-32k", Pattern::Read, 32),
    test("read-64k", Pattern::Read, 64),
    test("randread-8k", Pattern::RandRead, 8),
    test("randread-16k", Pattern::RandRead, 16),
    test("randread-32k", Pattern::RandRead, 32),
    test("randread-64k", Pattern::RandRead, 64),
];

impl Test {
    /// It is one of the larger sizes.
    fn is_large(&self) -> bool {
        self.block > 4 << 10
    }
}

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

fn cell(disk: &Disk, test: &Test, machines: u8) -> Option<Cell> {
    // The sizes are of one machine.
    if machines > 1 && test.is_large() {
        return None;
    }
    let reads = test.pattern.reads(RANDREAD.reads);
    let image = Image {
        format: disk.format,
        // What was never written reads as zeros, without the device.
        state: if reads { disk.written } else { disk.new },
        place: disk.place,
        disks: machines,
    };
    let mut sides = sides(image);
    for side in &mut sides {
        side.server_each = machines > 1;
    }
    let (one, several) = disk.quick;
    // The rotating disk as it is, once each way.
    let once = matches!(test.pattern, Pattern::RandRead | Pattern::RandWrite);
    let rotating = disk.place == HDD && once;
    let mut axes = vec![
        ("load".to_owned(), test.name.to_owned()),
        ("disk".to_owned(), disk.name.to_owned()),
        ("machines".to_owned(), machines.to_string()),
    ];
    if test.is_large() {
        // A curve over the sizes for each disk.
        axes[0].1 = format!("{}, {}", test.pattern.name(), disk.name);
        axes.push(("block".to_owned(), test.block.to_string()));
    }
    Some(Cell {
        name: match machines {
            1 => format!("{}-{}", test.name, disk.name),
            n => format!("{}-{}-{n}vms", test.name, disk.name),
        },
        axes,
        load: Load {
            pattern: test.pattern,
            block: test.block,
            ..RANDREAD
        },
        files: None,
        sides,
        quick: match machines {
            _ if test.is_large() => false,
            1 => one && test.pattern != Pattern::RandRw || rotating,
            _ => several && test.pattern == Pattern::RandRead,
        },
    })
}

/// What the document's table says: the test, the disk, who is ahead, and by how much if it says. Of "all tests" and "most cases" one or
/// two stand here.
const PUBLISHED: &[(&str, &str, Ahead, Option<f64>)] = &[
    ("read", "raw-device", Ahead::Threads, Some(1.125)),
    ("randread", "raw-device", Ahead::Threads, Some(1.125)),
    ("write", "raw-device", Ahead::Threads, Some(1.26)),
    ("randread", "raw-device-16vms", Ahead::Neither, None),
    ("randwrite", "raw-device-16vms", Ahead::Neither, None),
    ("read", "raw-ext4", Ahead::Threads, Some(1.125)),
    ("randread", "raw-ext4", Ahead::Threads, Some(1.08)),
    ("write", "raw-ext4", Ahead::Native, None),
    ("randwrite", "raw-ext4", Ahead::Native, None),
    ("randrw", "raw-ext4", Ahead::Native, None),
    ("read", "raw-ext4-16vms", Ahead::Threads, Some(1.01)),
    ("randread", "raw-ext4-16vms", Ahead::Neither, None),
    ("randwrite", "raw-ext4-16vms", Ahead::Neither, None),
    ("read", "raw-xfs", Ahead::Threads, None),
    ("randread", "raw-xfs", Ahead::Threads, None),
    ("write", "raw-xfs", Ahead::Threads, None),
    ("randwrite", "raw-xfs", Ahead::Threads, None),
    ("randrw", "raw-xfs", Ahead::Threads, None),
    ("randread", "raw-xfs-16vms", Ahead::Neither, None),
    ("write", "raw-xfs-16vms", Ahead::Threads, None),
    ("write", "raw-nfs-ext4", Ahead::Native, None),
    ("randwrite", "raw-nfs-ext4", Ahead::Native, None),
    ("read", "raw-nfs-ext4", Ahead::Threads, Some(1.12)),
    ("randread", "raw-nfs-ext4", Ahead::Threads, Some(1.12)),
    ("read-16k", "raw-nfs-ext4", Ahead::Threads, Some(1.12)),
    ("randread-16k", "raw-nfs-ext4", Ahead::Threads, Some(1.12)),
    ("randread", "raw-nfs-ext4-16vms", Ahead::Neither, None),
    ("randwrite", "raw-nfs-xfs", Ahead::Native, None),
    ("read", "raw-nfs-xfs", Ahead::Threads, None),
    ("randread", "raw-nfs-xfs", Ahead::Threads, None),
    ("randwrite", "raw-nfs-xfs-16vms", Ahead::Native, None),
    ("write", "qcow2-ext4", Ahead::Native, None),
    ("randwrite", "qcow2-ext4", Ahead::Native, None),
    ("read", "qcow2-ext4", Ahead::Threads, None),
    ("randread", "qcow2-ext4", Ahead::Threads, None),
    ("read", "qcow2-ext4-16vms", Ahead::Native, Some(1.125)),
    ("randwrite", "qcow2-xfs", Ahead::Native, None),
    ("read", "qcow2-xfs", Ahead::Threads, Some(1.06)),
    ("write", "qcow2-xfs-16vms", Ahead::Threads, Some(1.08)),
    ("write", "qcow2-falloc-ext4", Ahead::Native, None),
    ("randwrite", "qcow2-falloc-ext4", Ahead::Native, None),
    ("read", "qcow2-falloc-ext4", Ahead::Threads, None),
    ("randwrite", "qcow2-falloc-ext4-16vms", Ahead::Native, None),
    ("randread", "qcow2-falloc-ext4-16vms", Ahead::Threads, None),
    ("write", "qcow2-falloc-xfs", Ahead::Native, None),
    ("read", "qcow2-falloc-xfs", Ahead::Threads, None),
    ("randread", "qcow2-falloc-xfs", Ahead::Threads, None),
    ("write", "qcow2-falloc-xfs-16vms", Ahead::Threads, None),
    ("write", "qcow2-full-ext4", Ahead::Native, None),
    ("read", "qcow2-full-ext4", Ahead::Threads, Some(1.12)),
    ("randread", "qcow2-full-ext4", Ahead::Threads, Some(1.12)),
    ("read-16k", "qcow2-full-ext4", Ahead::Threads, Some(1.12)),
    (
        "randread-16k",
        "qcow2-full-ext4",
        Ahead::Threads,
        Some(1.12),
    ),
    ("randread", "qcow2-full-ext4-16vms", Ahead::Native, None),
    ("randread", "qcow2-full-xfs", Ahead::Native, None),
    ("read", "qcow2-full-xfs", Ahead::Threads, None),
    ("randread", "qcow2-full-xfs-16vms", Ahead::Threads, None),
    ("write", "qcow2-full-xfs-16vms", Ahead::Threads, None),
    ("randread", "raw-hdd", Ahead::Native, None),
    ("randwrite", "raw-hdd", Ahead::Native, None),
    ("randread", "raw-hdd-16vms", Ahead::Native, None),
    ("randwrite", "raw-hdd-16vms", Ahead::Native, None),
    ("read", "raw-hdd-ext4", Ahead::Native, None),
    ("randwrite", "raw-hdd-ext4-16vms", Ahead::Native, None),
    ("randread", "raw-hdd-xfs", Ahead::Native, None),
    ("randread", "raw-hdd-xfs-16vms", Ahead::NotThreads, None),
    ("randwrite", "qcow2-hdd-ext4", Ahead::NotThreads, None),
    // Rows with one exception list it as randread or seq write, where threads were 30 % ahead.
    ("randread", "qcow2-hdd-ext4", Ahead::Threads, Some(1.3)),
    ("read", "qcow2-hdd-ext4-16vms", Ahead::Threads, None),
    ("write", "qcow2-hdd-xfs", Ahead::Threads, Some(1.3)),
    ("read", "qcow2-hdd-xfs-16vms", Ahead::Threads, None),
    (
        "randread",
        "qcow2-falloc-hdd-ext4",
        Ahead::Threads,
        Some(1.3),
    ),
    ("read", "qcow2-falloc-hdd-ext4-16vms", Ahead::Threads, None),
    ("write", "qcow2-falloc-hdd-xfs", Ahead::Threads, Some(1.3)),
    (
        "randread",
        "qcow2-falloc-hdd-xfs-16vms",
        Ahead::Threads,
        None,
    ),
    ("randwrite", "qcow2-full-hdd-ext4", Ahead::NotThreads, None),
    (
        "randread",
        "qcow2-full-hdd-ext4-16vms",
        Ahead::Threads,
        Some(1.15),
    ),
    ("write", "qcow2-full-hdd-xfs", Ahead::Threads, Some(1.3)),
    (
        "randread",
        "qcow2-full-hdd-xfs-16vms",
        Ahead::Threads,
        Some(1.3),
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
    /// "Native outperforms threads."
    Native,
    /// "Threads has better performance."
    Threads,
    /// "Native is optimal or equal."
    NotThreads,
    /// "Native and threads perform equally."
    Neither,
}

/// A row of the document as a finding.
fn row((test, disk, ahead, ratio): &(&str, &str, Ahead, Option<f64>)) -> Finding {
    let (claim, first, second, words) = match ahead {
        Ahead::Native => (Claim::More, "native", "threads", "is ahead of"),
        Ahead::Threads => (Claim::More, "threads", "native", "is ahead of"),
        Ahead::NotThreads => (Claim::NotLess(0.05), "native", "threads", "is not behind"),
        Ahead::Neither => (Claim::Equal(0.1), "native", "threads", "is equal to"),
    };
    let of = |engine: &str| {
        term(
            &format!("{test}-{disk}"),
            &format!("qsd {engine}"),
            Metric::Iops,
        )
    };
    let says = format!("{}, {first} {words} {second} at {test}", where_of(disk));
    Finding {
        published: *ratio,
        otherwise: "QEMU 10's export on vhost-user-blk under a load generator, for QEMU 2.3's virtio-blk under a KVM guest's fio; and another device",
        ..Finding::new(says, of(first), of(second), claim)
    }
}

/// What it says besides.
fn conclusions() -> Vec<Finding> {
    let tail = |disk: &str| {
        let cell = format!("randwrite-{disk}");
        term(&cell, "qsd native", Metric::P99Us).over("qsd threads")
    };
    vec![
        Finding::new(
            "Threads take more CPU than native for a request",
            term("randread-raw-ext4", "qsd threads", Metric::CpuUs),
            term("randread-raw-ext4", "qsd native", Metric::CpuUs),
            Claim::More,
        ),
        Finding::new(
            "QEMU merges writes: those of a sequence reach the device in larger requests than reads do",
            term("write-raw-ext4", "qsd native", Metric::DeviceWriteKib),
            term("read-raw-ext4", "qsd native", Metric::DeviceReadKib),
            Claim::More,
        )
        .otherwise("QEMU's merging is virtio-blk's in its emulator; the vhost-user-blk export of qemu-storage-daemon has none"),
        Finding::new(
            "Native can block the virtual machine where the file is not fully allocated: beside threads, its slow writes (p99) are slower on a \
             qcow2 image that grows than on a file that is full",
            tail("qcow2-ext4"),
            tail("raw-ext4"),
            Claim::More,
        )
        .otherwise("the requests of an image that grows wait for its tables first, whatever the engine"),
    ]
}

/// The goal for `auto`, which none of the document's engines was: never below the better of the two, in any cell.
fn goal(cell: &Cell) -> Finding {
    let of = |engine: &str| term(&cell.name, &format!("diskplane {engine}"), Metric::Iops);
    let says = format!(
        "auto is not behind the better of native and threads: {}",
        cell.name
    );
    let better = of("native").or("diskplane threads");
    Finding::new(says, of("auto"), better, Claim::NotLess(0.05)).goal()
}

pub(super) fn experiment() -> Experiment {
    let cells = [1, SEVERAL].into_iter().flat_map(|machines| {
        DISKS.iter().flat_map(move |disk| {
            TESTS
                .iter()
                .filter_map(move |test| cell(disk, test, machines))
        })
    });
    let cells: Vec<Cell> = cells.collect();
    let mut findings: Vec<Finding> = PUBLISHED.iter().map(row).collect();
    findings.extend(conclusions());
    findings.extend(cells.iter().map(goal));
    Experiment {
        name: "E1",
        title: "Native or threads",
        source: "001: QEMU Disk IO, which performs better: native or threads? (2016)",
        meaning: "IOPS and CPU of each I/O engine, 32 in flight, at 4 KiB (and reads of pbench's default, up to 64 KiB), on raw and \
                  qcow2 files of different preallocation on ext4 and XFS, made on loop devices (with direct I/O) below the run's \
                  folder, or on the device that --device gives. A growing image is new for each sample that writes; what is read was \
                  written before, in order. The document ran fio in one and in 16 virtual machines on an SSD and on a rotating disk; \
                  here a load generator stands for each machine (16 disks share the bytes of one, and each has a server; of a bare device \
                  each has a sixteenth, as a loop device), \"with fallocate\" is preallocation=full, the SSD is what the folder lies on, or the given device, and the rotating disk \
                  (7200 turns a minute, NCQ, 1 MiB of write cache) is simulated (diskplane bench device). Rows on NFS say why they are \
                  not here.",
        cells,
        findings,
        absent: &[],
        figures: &[Metric::Iops, Metric::CpuUs, Metric::P99Us],
        disk_bytes: (1 << 30, 256 << 20),
    }
}
