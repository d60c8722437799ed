//! E0: the cache study of SMAPIv3 and qemu-dp (document 000).

use super::plan::{
    Cell, Claim, Experiment, Finding, Format, How, Image, Medium, ONE_READ, Place, QCOW2, RAW,
    Side, State, System, side, term,
};
use crate::{
    load::Pattern,
    metric::Metric,
    versus::cell::{Load, RANDREAD, RANDWRITE, Server},
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A row of the document's table: bytes of the cache and of an entry (blank: as it comes), `O_DIRECT`, flushes honoured.
struct Row {
    name: &'static str,
    cache: Option<u64>,
    entry: Option<u64>,
    direct: bool,
    flushes: bool,
}

const fn row(
    name: &'static str,
    cache: Option<u64>,
    entry: Option<u64>,
    direct: bool,
    flushes: bool,
) -> Row {
    Row {
        name,
        cache,
        entry,
        direct,
        flushes,
    }
}

/// The document's defaults (512 KiB in entries of 32 KiB) are those of a QEMU of its time; this one sizes its cache
/// itself, so they are given by hand, and its own defaults are the row `auto`.
const DEFAULT: (Option<u64>, Option<u64>) = (Some(512 * KIB), Some(32 * KIB));

const ROWS: [Row; 12] = [
    row("default", DEFAULT.0, DEFAULT.1, true, false),
    row("buffer/flush", DEFAULT.0, DEFAULT.1, false, true),
    row("A", Some(3 * MIB), DEFAULT.1, true, false),
    // 6.25 MiB.
    row("B", Some(6400 * KIB), DEFAULT.1, true, false),
    row("C", DEFAULT.0, Some(8 * KIB), true, false),
    row("D", DEFAULT.0, Some(64 * KIB), false, true),
    row("E", Some(8 * MIB), Some(8 * KIB), false, true),
    row("F", Some(8 * MIB), Some(8 * KIB), false, false),
    row("G", Some(8 * MIB), Some(8 * KIB), true, false),
    row("H", Some(8 * MIB), Some(16 * KIB), false, false),
    row("I", Some(16 * MIB), Some(8 * KIB), false, false),
    row("auto", None, None, true, true),
];

const DISK: Image = Image {
    state: State::Falloc,
    ..QCOW2
};
const VHD: Image = Image {
    format: Format::Vhd,
    state: State::Growing,
    ..RAW
};
const BARE: Image = Image {
    state: State::Falloc,
    ..RAW
};

/// Those of a cell whose load writes; an empty VHD has nothing to read.
fn sides(writes: bool) -> Vec<Side> {
    let mut sides = Vec::new();
    let of = |row: &Row, server: &str, how| Side {
        direct: row.direct,
        drops_flushes: !row.flushes,
        table_cache: row.cache,
        table_entry: row.entry,
        ..side(format!("{server} {}", row.name), how, DISK)
    };
    for row in &ROWS {
        sides.push(of(row, "qsd", How::Served(Server::Qsd)));
    }
    // Entries are no knob of diskplane: its cache has a size only.
    for row in &ROWS {
        if matches!(row.name, "default" | "buffer/flush" | "F" | "G" | "auto") {
            let own = of(row, "diskplane", How::Served(Server::Diskplane));
            sides.push(Side {
                table_entry: None,
                ..own
            });
        }
    }
    if writes {
        sides.push(side("VHD, O_DIRECT", How::Served(Server::Diskplane), VHD));
        sides.push(Side {
            direct: false,
            ..side("VHD, buffered", How::Served(Server::Diskplane), VHD)
        });
    }
    sides.push(side("bare metal", How::Bare, BARE));
    sides
}

fn cell(name: &str, load: Load, quick: bool) -> Cell {
    Cell {
        name: name.to_owned(),
        axes: vec![("load".to_owned(), name.to_owned())],
        load,
        files: None,
        sides: sides(load.writes()),
        quick,
    }
}

/// RAID0 of so many flash drives, with a file system, as the document's had it.
fn striped(members: u8) -> Cell {
    let place = Place {
        medium: Medium::Striped(members),
        system: System::Ext4,
    };
    let on = |image: Image| Image { place, ..image };
    Cell {
        name: format!("randwrite-raid{members}"),
        axes: vec![
            ("load".to_owned(), "randwrite".to_owned()),
            ("disks".to_owned(), members.to_string()),
        ],
        load: RANDWRITE,
        files: None,
        sides: vec![
            Side {
                drops_flushes: true,
                table_cache: DEFAULT.0,
                table_entry: DEFAULT.1,
                ..side("qsd default", How::Served(Server::Qsd), on(DISK))
            },
            side("diskplane auto", How::Served(Server::Diskplane), on(DISK)),
            side("VHD, O_DIRECT", How::Served(Server::Diskplane), on(VHD)),
            side("bare metal", How::Bare, on(BARE)),
        ],
        quick: true,
    }
}

pub(super) fn experiment() -> Experiment {
    let writes = |side: &str| term("randwrite", side, Metric::Iops);
    let more = |says: &str, left: &str, right: &str, claim| {
        Finding::new(says, writes(left), writes(right), claim)
    };
    let raid =
        |members: u8, side: &str| term(&format!("randwrite-raid{members}"), side, Metric::Iops);
    let scales = |says: &str, members: u8, side: &str, claim| {
        Finding::new(says, raid(members, side), raid(1, side), claim)
    };
    let mut findings = vec![
        more(
            "Random write is better with F (8 MiB in entries of 8 KiB, buffered, flushes dropped) than with the default",
            "qsd F",
            "qsd default",
            Claim::More,
        ),
        more(
            "F is not sufficient compared to tapdisk: buffered VHD writes faster",
            "VHD, buffered",
            "qsd F",
            Claim::More,
        ),
        more(
            "qemu-dp with its default loses to tapdisk (VHD, O_DIRECT) on random write",
            "VHD, O_DIRECT",
            "qsd default",
            Claim::More,
        ),
        Finding::new(
            "The latency of a single request (ioping) is not so bad with F: no worse than with the default",
            term("ioping", "qsd default", Metric::P50Us),
            term("ioping", "qsd F", Metric::P50Us),
            Claim::NotLess(0.2),
        ),
    ];
    for members in [2, 4] {
        findings.push(scales(
            &format!("qemu-dp scales well with RAID0 of {members} disks"),
            members,
            "qsd default",
            Claim::More,
        ));
        let says = format!(
            "With RAID0 of {members} disks, qemu-dp makes as good use of them as dom0 (bare metal) does"
        );
        let (own, bare) = (raid(members, "qsd default"), raid(members, "bare metal"));
        findings.push(Finding::new(says, own, bare, Claim::Equal(0.2)).otherwise(
            "one qemu-storage-daemon has one disk, whose tables do not fit into 512 KiB of cache; there a virtual machine had \
             several disks, and each a qemu-dp",
        ));
        let says =
            format!("RAID0 of {members} disks does not improve the throughput of tapdisk (VHD)");
        findings.push(scales(&says, members, "VHD, O_DIRECT", Claim::Equal(0.15)).otherwise(
            "our server on a VHD has all 32 requests at the disks at a time, and no ring of Xen's before it",
        ));
    }
    // What the last row is for.
    findings.push(
        more(
            "With O_DIRECT and flushes honoured, diskplane's cache, which sizes itself, is not behind that of a QEMU that does so too",
            "diskplane auto",
            "qsd auto",
            Claim::NotLess(0.05),
        )
        .goal(),
    );
    findings.push(
        scales(
            "diskplane scales with RAID0 of 4 disks",
            4,
            "diskplane auto",
            Claim::More,
        )
        .goal(),
    );
    Experiment {
        name: "E0",
        title: "The metadata cache of qcow2",
        source: "000: Dev diaries #1, Analyzing storage perf (SMAPIv3)",
        meaning: "Random writes and reads of 4 KiB and single requests on a preallocated qcow2 image, with the \
                  document's sizes of the L2 cache and of its entries, O_DIRECT, and flushes dropped or honoured. qsd \
                  stands for qemu-dp, diskplane's VHD, new for each sample and so only written, for tapdisk. The data are preallocated and unwritten at first: \
                  reading them costs the device nothing, so that what is seen is the tables. The document's device was \
                  an Optane. Its RAID0 of 2 and 4 disks is over simulated flash (diskplane bench device) that does one request at a time in \
                  500 µs, with ext4 on it, beside one such disk.",
        cells: vec![
            cell("randwrite", RANDWRITE, true),
            cell("ioping", ONE_READ, true),
            cell("randread", RANDREAD, true),
            cell(
                "ioping-write",
                Load {
                    pattern: Pattern::RandWrite,
                    ..ONE_READ
                },
                false,
            ),
            striped(1),
            striped(2),
            striped(4),
        ],
        findings,
        absent: &[
            (
                "tapdisk itself",
                "it is looked for (see the versions of the run), but is attached by blktap's kernel module or Xen: our server on a VHD stands for it",
            ),
            (
                "tapdisk's timeout",
                "the document does not say what becomes of a request that runs into it; here none is given up",
            ),
        ],
        figures: &[Metric::Iops, Metric::P50Us, Metric::CpuUs],
        disk_bytes: (16 << 30, 8 << 30),
    }
}
