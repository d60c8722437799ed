//! E3: where the latency goes (document 004).

use super::plan::{
    Cell, Claim, Experiment, Finding, Format, How, Image, QCOW2, RAW, Side, Term, side, term,
};
use crate::{
    load::Pattern,
    metric::Metric,
    versus::cell::{Load, RANDREAD, Server},
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
    use Server::{Diskplane, DiskplaneNbd, QemuNbd, Qsd};
    vec![
        side("bare metal", How::Bare, RAW),
        side("diskplane raw", How::Served(Diskplane), RAW),
        side("diskplane qcow2", How::Served(Diskplane), QCOW2),
        side("diskplane raw, NBD", How::Served(DiskplaneNbd), RAW),
        side("qsd raw", How::Served(Qsd), RAW),
        side("qsd qcow2", How::Served(Qsd), QCOW2),
        side("qemu-nbd raw", How::Served(QemuNbd), RAW),
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
        format: Format::Raw,
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

/// Queues of one disk, on as many I/O threads where the server has them.
fn queues(count: u16) -> Cell {
    let own = |side: Side| Side {
        queues: count,
        io_threads: if side.how == How::Served(Server::Diskplane) {
            count
        } else {
            1
        },
        ..side
    };
    Cell {
        name: format!("queues-{count}"),
        axes: vec![
            ("load".to_owned(), "queues".to_owned()),
            ("queues".to_owned(), count.to_string()),
        ],
        load: RANDREAD,
        files: None,
        sides: vec![
            own(side("bare metal", How::Bare, RAW)),
            own(side("diskplane raw", How::Served(Server::Diskplane), RAW)),
            own(side("qsd raw", How::Served(Server::Qsd), RAW)),
        ],
        quick: false,
    }
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
    cells.extend([1, 2, 4].map(queues));
    let over_bare = |cell: &str, path: &str, metric| Term {
        over: Some("bare metal".to_owned()),
        ..term(cell, path, metric)
    };
    let mut findings = Vec::new();
    for path in ["qsd raw", "diskplane raw"] {
        findings.push(Finding {
            says: format!(
                "The overhead of virtualisation is imperceptible at 1 MiB: 118 MB/s from dom0, 117 MB/s from a VM ({path} beside bare metal)"
            ),
            left: over_bare("read-1m", path, Metric::MbS),
            right: None,
            claim: Claim::Equal(0.05),
            published: Some(117.0 / 118.0),
        });
        findings.push(Finding {
            says: format!(
                "The overhead is the more noticeable the smaller the request: {path} reaches a smaller part of bare metal's throughput at 4 KiB than at 1 MiB"
            ),
            left: over_bare("read-4k", path, Metric::MbS),
            right: Some(over_bare("read-1m", path, Metric::MbS)),
            claim: Claim::Less,
            published: None,
        });
    }
    findings.push(Finding {
        says: "A back end in user space that goes through an extra hop costs latency at small requests: NBD beside vhost-user, 4 KiB".to_owned(),
        left: term("read-4k", "diskplane raw, NBD", Metric::P50Us),
        right: Some(term("read-4k", "diskplane raw", Metric::P50Us)),
        claim: Claim::More,
        published: None,
    });
    findings.push(Finding {
        says: "Latency (time / data) grows less than the request does: 1 MiB takes less than 256 times as long as 4 KiB on bare metal".to_owned(),
        left: term("read-1m", "bare metal", Metric::MbS),
        right: Some(term("read-4k", "bare metal", Metric::MbS)),
        claim: Claim::More,
        published: None,
    });
    Experiment {
        name: "E3",
        title: "Where the latency goes",
        source: "004: Xen and XenServer Storage Performance, low latency virtualisation challenges (2013)",
        meaning: "Throughput and latency over sizes of requests, one at a time, for bare metal and each data path, on \
                  one file; and diskplane's own stages. The document has Xen's paths (blkback, tapdisk, qdisk); here \
                  they are vhost-user-blk and NBD, and the driver is a load generator instead of a guest's kernel. \
                  qemu-storage-daemon and qemu-nbd run with io_uring.",
        cells,
        findings,
        figures: &[Metric::MbS, Metric::P50Us, Metric::CpuUs],
        disk_bytes: (2 << 30, 256 << 20),
    }
}
