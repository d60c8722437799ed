//! E3: where the latency goes (document 004).

use super::plan::{
    Cell, Claim, Driver, Experiment, Finding, How, Image, NULL, QCOW2, RAW, Side, side, term,
};
use crate::{
    load::Pattern,
    metric::Metric,
    versus::cell::{Load, Polling, RANDREAD, Server},
};
use block::size;

const ONE_AT_A_TIME: Load = Load {
    pattern: Pattern::Read,
    depth: 1,
    ..RANDREAD
};

/// Sizes of requests in a quick run; a full one has every power of two from 512 bytes to 4 MiB.
const QUICK: [u64; 6] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// What is between the load and the file.
fn paths() -> Vec<Side> {
    use Server::{Diskplane, DiskplaneNbd, Nbdkit, QemuNbd, Qsd};
    vec![
        side("bare metal", How::Bare, RAW),
        side("diskplane raw", How::Served(Diskplane), RAW),
        side("diskplane qcow2", How::Served(Diskplane), QCOW2),
        side("diskplane raw, NBD", How::Served(DiskplaneNbd), RAW),
        side("qsd raw", How::Served(Qsd), RAW),
        side("qsd qcow2", How::Served(Qsd), QCOW2),
        side("qemu-nbd raw", How::Served(QemuNbd), RAW),
        // It has no `O_DIRECT`: its name says so in every chart.
        side("nbdkit raw, page cache", How::Served(Nbdkit), RAW),
    ]
}

fn short(bytes: u64) -> String {
    size::human(bytes)
        .to_lowercase()
        .replace(" ", "")
        .replace("ib", "")
}

fn cell(kind: &str, bytes: u64, pattern: Pattern, quick: bool) -> Cell {
    Cell {
        name: format!("{kind}-{}", short(bytes)),
        axes: vec![
            ("load".to_owned(), kind.to_owned()),
            ("block".to_owned(), bytes.to_string()),
        ],
        load: Load {
            pattern,
            block: bytes,
            ..ONE_AT_A_TIME
        },
        files: None,
        sides: paths(),
        quick,
    }
}

/// Disks at once, each read one request at a time.
fn disks(count: u8) -> Cell {
    let image = Image {
        disks: count,
        ..RAW
    };
    Cell {
        name: format!("disks-{count}"),
        axes: vec![
            ("load".to_owned(), "disks".to_owned()),
            ("disks".to_owned(), count.to_string()),
        ],
        load: Load {
            pattern: Pattern::RandRead,
            ..ONE_AT_A_TIME
        },
        files: None,
        sides: vec![
            side("bare metal", How::Bare, image),
            side("diskplane raw", How::Served(Server::Diskplane), image),
            side("qsd raw", How::Served(Server::Qsd), image),
        ],
        quick: count == 4,
    }
}

/// Virtual machines at once, a disk each: with a server each, or one for all.
fn machines(count: u8) -> Cell {
    let image = Image {
        disks: count,
        ..RAW
    };
    let of = |name: &str, server, server_each| Side {
        server_each,
        ..side(name, How::Served(server), image)
    };
    Cell {
        name: format!("vms-{count}"),
        axes: vec![
            ("load".to_owned(), "vms".to_owned()),
            ("vms".to_owned(), count.to_string()),
        ],
        load: Load {
            pattern: Pattern::RandRead,
            ..ONE_AT_A_TIME
        },
        files: None,
        sides: vec![
            of("diskplane, a server each", Server::Diskplane, true),
            of("diskplane, one server", Server::Diskplane, false),
            of("qsd, a server each", Server::Qsd, true),
            of("qsd, one server", Server::Qsd, false),
        ],
        quick: count == 4,
    }
}

/// Queues of one disk.
fn with_queues(side: Side, count: u16) -> Side {
    Side {
        queues: count,
        ..side
    }
}

/// The servers of a disk with so many queues: an export of qemu-storage-daemon has one I/O thread for all of them, ours has as many as it
/// is told; so it is told both.
///
/// Each with its name, and what is said of its threads.
fn servers_of_queues(count: u16) -> Vec<(&'static str, &'static str, Side)> {
    let of = |how, threads| Side {
        io_threads: threads,
        ..with_queues(side("", How::Served(how), RAW), count)
    };
    let (ours, qsd) = (of(Server::Diskplane, 1), of(Server::Qsd, 1));
    match count {
        1 => vec![("diskplane", "", ours), ("qsd", "", qsd)],
        _ => vec![
            ("diskplane", ", a thread each", of(Server::Diskplane, count)),
            ("diskplane", ", one thread", ours),
            ("qsd", ", one thread", qsd),
        ],
    }
}

fn queues(count: u16) -> Cell {
    let mut sides = vec![with_queues(side("bare metal", How::Bare, RAW), count)];
    let servers = servers_of_queues(count).into_iter();
    sides.extend(servers.map(|(server, threads, side)| Side {
        name: format!("{server} raw{threads}"),
        ..side
    }));
    Cell {
        name: format!("queues-{count}"),
        axes: vec![
            ("load".to_owned(), "queues".to_owned()),
            ("queues".to_owned(), count.to_string()),
        ],
        load: RANDREAD,
        files: None,
        sides,
        quick: false,
    }
}

/// Requests in flight in all where numbers of queues are compared.
const QUEUED: u32 = 32;

/// The same requests in flight over more queues: a disk of zeros, which is no bottleneck.
fn queues_beside_each_other() -> Cell {
    let of = |count: u16| {
        let ending = if count == 1 { "" } else { "s" };
        let servers = servers_of_queues(count).into_iter();
        servers.map(move |(server, threads, side)| Side {
            name: format!("{server}, {count} queue{ending}{threads}"),
            image: NULL,
            driver: Driver {
                depth: Some(QUEUED / u32::from(count)),
                ..Driver::USUAL
            },
            ..side
        })
    };
    // Those of a server side by side.
    let mut sides: Vec<Side> = [1, 2, 4].into_iter().flat_map(of).collect();
    sides.sort_by_key(|side| side.how == How::Served(Server::Qsd));
    factor("queues", "multiple queues", RANDREAD, sides, true)
}

/// A cell of a factor that its sides differ in.
fn factor(name: &str, factor: &str, load: Load, sides: Vec<Side>, quick: bool) -> Cell {
    Cell {
        name: name.to_owned(),
        axes: vec![("factor".to_owned(), factor.to_owned())],
        load,
        files: None,
        sides,
        quick,
    }
}

/// Bytes behind a page at which guests' buffers begin where they have to be copied: no device takes them there.
const MISALIGNED: u32 = 2;

/// The data path maps the guest's memory once and has devices read and write there; what is not aligned as `O_DIRECT` wants it is
/// copied by the server, and what goes through a socket by the kernel.
fn copies(bytes: u64, quick: bool) -> Cell {
    let of = |name: &str, server, misalign| Side {
        driver: Driver {
            misalign,
            ..Driver::USUAL
        },
        ..side(name, How::Served(server), RAW)
    };
    let sides = vec![
        of("diskplane maps", Server::Diskplane, 0),
        of("diskplane copies", Server::Diskplane, MISALIGNED),
        of(
            "diskplane, NBD (the kernel copies)",
            Server::DiskplaneNbd,
            0,
        ),
        of("qsd maps", Server::Qsd, 0),
        of("qsd copies", Server::Qsd, MISALIGNED),
    ];
    let load = Load {
        block: bytes,
        depth: 8,
        ..RANDREAD
    };
    let name = format!("copy-{}", short(bytes));
    factor(&name, "copy or map", load, sides, quick)
}

/// The same of sixteen virtual machines at once.
fn copies_of_many() -> Cell {
    let image = Image { disks: 16, ..RAW };
    let of = |name: &str, misalign| Side {
        server_each: true,
        driver: Driver {
            misalign,
            ..Driver::USUAL
        },
        ..side(name, How::Served(Server::Diskplane), image)
    };
    let sides = vec![of("diskplane maps", 0), of("diskplane copies", MISALIGNED)];
    let load = Load {
        depth: 8,
        ..RANDREAD
    };
    factor("copy-16vms", "copy or map", load, sides, false)
}

/// Every kind of ring.
fn rings(name: &str, image: Image, quick: bool) -> Cell {
    let of = |name: &str, server, packed, indirect| Side {
        driver: Driver {
            packed,
            indirect,
            ..Driver::USUAL
        },
        ..side(name, How::Served(server), image)
    };
    let (ours, qsd) = (Server::Diskplane, Server::Qsd);
    let sides = vec![
        of("diskplane split", ours, false, true),
        of("diskplane split, no indirect", ours, false, false),
        of("diskplane packed", ours, true, true),
        of("diskplane packed, no indirect", ours, true, false),
        of("qsd split", qsd, false, true),
        of("qsd split, no indirect", qsd, false, false),
    ];
    factor(name, "rings", RANDREAD, sides, quick)
}

/// What the paths cost by themselves: a disk of zeros, and servers that spin (SPDK's does nothing else).
fn bare_paths() -> Cell {
    let of = |name: &str, server| side(name, How::Served(server), NULL);
    let spinning = |name: &str, server| Side {
        polling: Polling::Busy,
        ..of(name, server)
    };
    let sides = vec![
        of("diskplane", Server::Diskplane),
        of("qsd", Server::Qsd),
        of("diskplane, NBD", Server::DiskplaneNbd),
        of("nbdkit", Server::Nbdkit),
        spinning("diskplane, spinning", Server::Diskplane),
        spinning("qsd, spinning", Server::Qsd),
        spinning("spdk, spinning", Server::Spdk),
    ];
    factor("null", "path", RANDREAD, sides, true)
}

/// Entries of a ring, and descriptors of a request that is not indirect: header, data and status.
const RING: u32 = 128;
const CHAIN: u32 = 3;

/// As many requests in flight as a ring holds.
fn full_rings() -> Cell {
    let of = |name: &str, server, indirect| Side {
        driver: Driver {
            indirect,
            depth: Some(if indirect { RING } else { RING / CHAIN }),
            ..Driver::USUAL
        },
        ..side(name, How::Served(server), RAW)
    };
    let sides = vec![
        of("diskplane, indirect", Server::Diskplane, true),
        of("diskplane, no indirect", Server::Diskplane, false),
        of("qsd, indirect", Server::Qsd, true),
        of("qsd, no indirect", Server::Qsd, false),
    ];
    factor("rings-full", "rings", RANDREAD, sides, true)
}

/// Proposals of the document that no path here has a switch for.
const ABSENT: [(&str, &str); 5] = [
    (
        "persistent grants",
        "a vhost-user driver shares its memory once, for as long as it runs; nothing is granted for a request, so there is nothing to keep",
    ),
    (
        "request and response rings apart",
        "Xen's ring has both; a split virtqueue has had one for each from the beginning, and a packed one is what the proposal would do away with (compared in the cells rings-…)",
    ),
    (
        "TLB flushes avoided where pages were not accessed",
        "nothing is unmapped while a driver runs, so nothing is flushed",
    ),
    (
        "mapping in the fault handler, only on access",
        "memory is mapped once, and its pages appear when they are first touched; no request maps anything",
    ),
    (
        "blkback, tapdisk, qemu-qdisk and numbers of dom0's vCPUs",
        "there is no Xen here; tapdisk is looked for (see the versions of the run), but is attached by blktap or Xen",
    ),
];

/// What the document says of the factors, of cells whose sides differ in them.
fn of_factors() -> Vec<Finding> {
    let beside = |says: &str, cell: &str, (left, right): (&str, &str), metric, claim| {
        Finding::new(
            says,
            term(cell, left, metric),
            term(cell, right, metric),
            claim,
        )
    };
    let copying = ("diskplane copies", "diskplane maps");
    let indirect = ("diskplane, indirect", "diskplane, no indirect");
    let (iops, cpu) = (Metric::Iops, Metric::CpuUs);
    const CORES: &str = "the load and the server share the machine's cores; a queue needs one for itself on either side";
    vec![
        beside(
            "The penalty of copying can be worth taking: copying is not behind mapping at 4 KiB",
            "copy-4k",
            copying,
            iops,
            Claim::NotLess(0.05),
        )
        .otherwise("mapping costs nothing for a request: the guest's memory is mapped once, for as long as it runs"),
        beside(
            "Copying is not behind mapping where many virtual machines do I/O at once (contention on grant tables)",
            "copy-16vms",
            copying,
            iops,
            Claim::NotLess(0.05),
        )
        .otherwise("there are no grant tables to contend for"),
        beside(
            "Copying has its price: 1 MiB takes more CPU of the server than where it is mapped",
            "copy-1m",
            copying,
            cpu,
            Claim::More,
        ),
        beside(
            "Indirect I/O: a ring whose requests lead to tables of segments holds more of them, and more is done",
            "rings-full",
            indirect,
            iops,
            Claim::More,
        ),
        beside(
            "A ring that both sides write to makes inefficient use of CPU caches: a packed one takes more CPU than a split one",
            "rings-null",
            ("diskplane packed", "diskplane split"),
            cpu,
            Claim::More,
        )
        .otherwise("a packed ring is one that both sides write to, but has fewer cache lines than a split one's three parts"),
        beside(
            "A queue for each core scales: two do more than one (diskplane)",
            "queues",
            ("diskplane, 2 queues, a thread each", "diskplane, 1 queue"),
            iops,
            Claim::More,
        )
        .otherwise(CORES),
        beside(
            "A queue for each core scales: four do more than one (diskplane)",
            "queues",
            ("diskplane, 4 queues, a thread each", "diskplane, 1 queue"),
            iops,
            Claim::More,
        )
        .otherwise(CORES),
    ]
}

pub(super) fn experiment() -> Experiment {
    let mut cells: Vec<Cell> = Vec::new();
    for shift in 9..=22 {
        let bytes = 1_u64 << shift;
        cells.push(cell("read", bytes, Pattern::Read, QUICK.contains(&bytes)));
    }
    for shift in [12, 16, 20] {
        cells.push(cell("randread", 1 << shift, Pattern::RandRead, false));
        cells.push(cell("write", 1 << shift, Pattern::Write, false));
    }
    cells.extend([1, 4, 16].map(disks));
    cells.extend([1, 4, 16].map(machines));
    cells.extend([1, 2, 4].map(queues));
    cells.push(bare_paths());
    cells.push(queues_beside_each_other());
    cells.push(rings("rings-null", NULL, true));
    cells.push(rings("rings-raw", RAW, false));
    cells.push(full_rings());
    cells.extend([(4 << 10, true), (64 << 10, false), (1 << 20, true)].map(|(b, q)| copies(b, q)));
    cells.push(copies_of_many());
    let over_bare = |cell: &str, path: &str| term(cell, path, Metric::MbS).over("bare metal");
    let mut findings = Vec::new();
    for path in ["qsd raw", "diskplane raw"] {
        let says = format!(
            "The overhead of virtualisation is imperceptible at 1 MiB: 118 MB/s from dom0, 117 MB/s from a VM ({path} beside bare metal)"
        );
        findings.push(
            Finding::of_ratio(says, over_bare("read-1m", path), Claim::Equal(0.05))
                .published(117.0 / 118.0),
        );
        let says = format!(
            "The overhead is the more noticeable the smaller the request: {path} reaches a smaller part of bare metal's throughput at 4 KiB than at 1 MiB"
        );
        let (small, large) = (over_bare("read-4k", path), over_bare("read-1m", path));
        findings.push(Finding::new(says, small, large, Claim::Less));
    }
    findings.push(Finding::new(
        "A back end in user space that goes through an extra hop costs latency at small requests: NBD beside vhost-user, 4 KiB",
        term("read-4k", "diskplane raw, NBD", Metric::P50Us),
        term("read-4k", "diskplane raw", Metric::P50Us),
        Claim::More,
    ));
    findings.push(Finding::new(
        "Latency (time / data) grows less than the request does: 1 MiB takes less than 256 times as long as 4 KiB on bare metal",
        term("read-1m", "bare metal", Metric::MbS),
        term("read-4k", "bare metal", Metric::MbS),
        Claim::More,
    ));
    findings.extend(of_factors());
    Experiment {
        name: "E3",
        title: "Where the latency goes",
        source: "004: Xen and XenServer Storage Performance, low latency virtualisation challenges (2013)",
        meaning: "Throughput and latency over sizes of requests, one at a time, for bare metal and each data path, on \
                  one file; and diskplane's own stages. The document has Xen's paths (blkback, tapdisk, qdisk); here \
                  they are vhost-user-blk and NBD, and the driver is a load generator instead of a guest's kernel. \
                  qemu-storage-daemon and qemu-nbd run with io_uring. Factors have cells of their own, whose sides differ in \
                  nothing else: copy or map (a guest's buffers where the device can take them, or two bytes behind, where the \
                  server has to copy, and a socket, where the kernel does), kinds of rings, queues (an export of qemu-storage-daemon has one \
                  I/O thread for all of them, diskplane one thread for all or one for each), disks and virtual machines.",
        cells,
        findings,
        absent: &ABSENT,
        figures: &[Metric::MbS, Metric::P50Us, Metric::CpuUs],
        disk_bytes: (2 << 30, 256 << 20),
    }
}
