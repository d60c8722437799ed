//! The cells: the table of issue 4, "Ahead of every peer on the data path"; commands have their own ([`COMMANDS`]).
//!
//! In the order in which they run: those that share a large image stand together.

use super::cell::{
    Against, Bar, Cell, Image, Limit, Load, Metric, Polling, RANDREAD, RANDWRITE, Server, Side,
    at_least, at_most, shown, side, unequal,
};
use super::commands::COMMANDS;
use crate::load::{Flushes, Pattern};
use Metric::{
    BarriersPerFlush, CpuUs, IdlePercent, InDevice, Iops, MemoryMib, P50Us, P99Us, Pairs,
};
use Server::{Diskplane, DiskplaneNbd, DiskplaneUntraced, Fio, Nbdkit, QemuNbd, Qsd, Spdk};

/// Bytes of a cluster.
const CLUSTER: u64 = 64 << 10;

/// Guest clusters from one allocated cluster of the scattered image to the next.
pub const SCATTER: u64 = 16;
/// The same of the image whose tables commands read: 2^18 of 2^24 clusters.
pub const SPARSE_SCATTER: u64 = 64;

const SEQREAD: Load = Load {
    pattern: Pattern::Read,
    block: 256 << 10,
    depth: 8,
    ..RANDREAD
};
const SEQWRITE: Load = Load {
    pattern: Pattern::Write,
    ..SEQREAD
};
const GROW: Load = Load {
    grows: CLUSTER,
    ..RANDWRITE
};
/// What that is to the host's file: clusters are taken one behind the other.
const OPENS: Load = Load {
    pattern: Pattern::Write,
    stride: Some(CLUSTER),
    ..GROW
};
const GROW_SEQ_4K: Load = Load {
    pattern: Pattern::Write,
    grows: 4 << 10,
    ..RANDWRITE
};
const GROW_SEQ_256K: Load = Load {
    block: 256 << 10,
    grows: 256 << 10,
    ..GROW_SEQ_4K
};
/// What that is to the host's file: it is preallocated, and unwritten.
const OPENS_SEQ_256K: Load = Load {
    stride: Some(256 << 10),
    ..GROW_SEQ_256K
};
const FLUSH_1: Load = Load {
    depth: 1,
    flushes: Flushes::AfterEachWrite,
    ..GROW
};
/// The same from fio.
const OPENS_FLUSH_1: Load = Load {
    flushes: Flushes::AfterEachWrite,
    depth: 1,
    ..OPENS
};
const FLUSH_16: Load = Load {
    depth: 16,
    ..FLUSH_1
};
const NULL_POLL: Load = Load {
    poll: true,
    ..RANDREAD
};
const DEPTH_1: Load = Load {
    depth: 1,
    ..RANDREAD
};
const MIXED: Load = Load {
    pattern: Pattern::RandRw,
    depth: 8,
    ..RANDREAD
};
const MIXED_128: Load = Load {
    depth: 128,
    ..MIXED
};
const COPIES: Load = Load {
    pattern: Pattern::RandRw,
    reads: 50,
    block: CLUSTER,
    ..RANDREAD
};
/// The first block of allocated clusters only.
const SCATTERED: Load = Load {
    stride: Some(SCATTER * CLUSTER),
    warm: 2.5,
    ..RANDREAD
};
const SCATTERED_FILE: Load = Load {
    stride: Some(CLUSTER),
    warm: 0.0,
    ..SCATTERED
};
const IDLE: Load = Load {
    idle: true,
    ..RANDREAD
};

/// Every cell there is.
pub fn all() -> impl Iterator<Item = &'static Cell> {
    CELLS.iter().chain(COMMANDS)
}

/// Records are always on: they may cost 2 % of what is there without them.
const TRACE_BARS: &[Bar] = &[at_least(Iops, "untraced", 0.98), shown(CpuUs, "untraced")];

/// Every cell with servers.
pub const CELLS: &[Cell] = &[
    Cell {
        name: "null",
        line: "`null` (path alone), sleeping driver",
        meaning: "A disk of zeros without a file: what the path from ring to ring costs by itself, with a driver that sleeps until it is called.",
        load: RANDREAD,
        sides: &[
            side("diskplane", Diskplane, Image::Null),
            side("qsd", Qsd, Image::Null),
        ],
        bars: &[at_least(Iops, "qsd", 2.5), at_most(CpuUs, "qsd", 0.35)],
        cores: 2,
    },
    Cell {
        name: "null-poll",
        line: "`null`, `--poll` on both sides",
        meaning: "The same with a driver and servers that spin: qemu-storage-daemon in an iothread that polls for a second, SPDK as it always does.",
        load: NULL_POLL,
        sides: &[
            side("diskplane", Diskplane, Image::Null).polling(Polling::Busy),
            side("qsd", Qsd, Image::Null).polling(Polling::Busy),
            side("spdk", Spdk, Image::Null),
        ],
        bars: &[at_least(Iops, "qsd", 2.5), at_least(Iops, "spdk", 0.9)],
        cores: 2,
    },
    Cell {
        name: "trace-null",
        line: "rings of stage timestamps",
        meaning: "What it costs to note the stages of each request, where nothing else costs anything: a disk of zeros, beside the same server with --trace-ring 0.",
        load: RANDREAD,
        sides: &[
            side("diskplane", Diskplane, Image::Null),
            side("untraced", DiskplaneUntraced, Image::Null),
        ],
        bars: TRACE_BARS,
        cores: 2,
    },
    Cell {
        name: "trace-raw",
        line: "rings of stage timestamps",
        meaning: "The same with a raw file that was written full.",
        load: RANDREAD,
        sides: &[
            side("diskplane", Diskplane, Image::Raw),
            side("untraced", DiskplaneUntraced, Image::Raw),
        ],
        bars: TRACE_BARS,
        cores: 2,
    },
    Cell {
        name: "raw-randread",
        line: "raw preallocated, random read / write",
        meaning: "4 KiB reads at random of a raw file that was written full, beside qemu-storage-daemon and fio (io_uring) on the same file.",
        load: RANDREAD,
        sides: RAW,
        bars: RAW_BARS,
        cores: 2,
    },
    Cell {
        name: "raw-randwrite",
        line: "raw preallocated, random read / write",
        meaning: "The same with writes.",
        load: RANDWRITE,
        sides: RAW,
        bars: RAW_BARS,
        cores: 2,
    },
    Cell {
        name: "latency-sleeping",
        line: "depth 1 read latency, sleeping and adaptive",
        meaning: "One 4 KiB read at a time of the raw file; servers that never spin: qemu-storage-daemon without an iothread, diskplane with --poll-max 0. IOPS are what the mean latency leaves; fio's on the same file are the device's own.",
        load: DEPTH_1,
        sides: &[
            side("diskplane", Diskplane, Image::Raw).polling(Polling::Never),
            side("qsd", Qsd, Image::Raw).polling(Polling::Never),
            side("fio", Fio, Image::Raw),
        ],
        bars: LATENCY_BARS,
        cores: 2,
    },
    Cell {
        name: "latency-adaptive",
        line: "depth 1 read latency, sleeping and adaptive",
        meaning: "The same with servers that spin for a bounded time before they sleep (qemu-storage-daemon: an iothread, poll-max-ns=32768).",
        load: DEPTH_1,
        sides: &[
            side("diskplane", Diskplane, Image::Raw).polling(Polling::Adaptive),
            side("qsd", Qsd, Image::Raw).polling(Polling::Adaptive),
            side("fio", Fio, Image::Raw),
        ],
        bars: LATENCY_BARS,
        cores: 2,
    },
    Cell {
        name: "seq-read",
        line: "sequential read/write 256 KiB, depth 8",
        meaning: "256 KiB sequential reads of the raw file, 8 in flight.",
        load: SEQREAD,
        sides: RAW,
        bars: SEQ_BARS,
        cores: 2,
    },
    Cell {
        name: "seq-write",
        line: "sequential read/write 256 KiB, depth 8",
        meaning: "The same with writes.",
        load: SEQWRITE,
        sides: RAW,
        bars: SEQ_BARS,
        cores: 2,
    },
    Cell {
        name: "memory-raw",
        line: "Memory",
        meaning: "Anonymous memory of a server of one raw disk after random reads 32 deep.",
        load: RANDREAD,
        sides: &[side("diskplane", Diskplane, Image::Raw)],
        bars: MEMORY_BARS,
        cores: 1,
    },
    Cell {
        name: "nbd-randread-1",
        line: "NBD (Unix socket)",
        meaning: "4 KiB random reads over NBD on a Unix socket, one connection, beside qemu-nbd (--cache none).",
        load: RANDREAD,
        sides: NBD_1,
        bars: NBD_BARS,
        cores: 2,
    },
    Cell {
        name: "nbd-randread-4",
        line: "NBD (Unix socket)",
        meaning: "The same over four connections, each 32 deep.",
        load: RANDREAD,
        sides: NBD_4,
        bars: NBD_BARS,
        cores: 2,
    },
    Cell {
        name: "nbd-randwrite-1",
        line: "NBD (Unix socket)",
        meaning: "4 KiB random writes over one connection.",
        load: RANDWRITE,
        sides: NBD_1,
        bars: NBD_BARS,
        cores: 2,
    },
    Cell {
        name: "nbd-randwrite-4",
        line: "NBD (Unix socket)",
        meaning: "4 KiB random writes over four connections.",
        load: RANDWRITE,
        sides: NBD_4,
        bars: NBD_BARS,
        cores: 2,
    },
    Cell {
        name: "nbd-seq-read",
        line: "NBD (Unix socket)",
        meaning: "256 KiB sequential reads over one connection, 8 in flight; fio on the same file says what the device has to give.",
        load: SEQREAD,
        sides: NBD_SEQ,
        bars: NBD_SEQ_BARS,
        cores: 2,
    },
    Cell {
        name: "nbd-seq-write",
        line: "NBD (Unix socket)",
        meaning: "256 KiB sequential writes over one connection, 8 in flight; fio on the same file says what the device has to give.",
        load: SEQWRITE,
        sides: NBD_SEQ,
        bars: NBD_SEQ_BARS,
        cores: 2,
    },
    Cell {
        name: "nbdkit-randread",
        line: "NBD (Unix socket)",
        meaning: "4 KiB random reads over one connection, beside nbdkit's file plugin: it has no O_DIRECT, and drops from the page cache what it has read (cache=none).",
        load: RANDREAD,
        sides: NBDKIT,
        bars: NBDKIT_BARS,
        cores: 2,
    },
    Cell {
        name: "nbdkit-randwrite",
        line: "NBD (Unix socket)",
        meaning: "The same with writes.",
        load: RANDWRITE,
        sides: NBDKIT,
        bars: NBDKIT_BARS,
        cores: 2,
    },
    Cell {
        name: "nbdkit-seq-read",
        line: "NBD (Unix socket)",
        meaning: "256 KiB sequential reads over one connection, 8 in flight, beside nbdkit.",
        load: SEQREAD,
        sides: NBDKIT,
        bars: NBDKIT_BARS,
        cores: 2,
    },
    Cell {
        name: "grow-seq-4k",
        line: "qcow2 growing, sequential write",
        meaning: "4 KiB sequential writes into a new qcow2 image.",
        load: GROW_SEQ_4K,
        sides: &[
            side("diskplane", Diskplane, Image::Growing),
            side("qsd", Qsd, Image::Growing),
        ],
        bars: &[at_least(Iops, "qsd", 1.2), at_most(CpuUs, "qsd", 0.7)],
        cores: 2,
    },
    Cell {
        name: "grow-seq-256k",
        line: "qcow2 growing, sequential write",
        meaning: "256 KiB sequential writes into a new qcow2 image, also beside diskplane's own raw file and fio's 256 KiB sequential writes to it, and (device) fio's to a file that is preallocated but unwritten: what file system and device have to give where blocks are written for the first time.",
        load: GROW_SEQ_256K,
        sides: &[
            side("diskplane", Diskplane, Image::Growing),
            side("qsd", Qsd, Image::Growing),
            side("raw", Diskplane, Image::Raw),
            side("fio", Fio, Image::Raw),
            side("device", Fio, Image::Unwritten).load(OPENS_SEQ_256K),
        ],
        bars: &[
            at_least(Iops, "qsd", 1.2),
            at_most(CpuUs, "qsd", 0.7),
            at_least(Iops, "raw", 0.95),
            shown(Iops, "fio"),
            shown(Iops, "device"),
        ],
        cores: 2,
    },
    Cell {
        name: "qcow2-randread",
        line: "qcow2 fully allocated, random read / write",
        meaning: "4 KiB random reads of a full qcow2 image, beside diskplane's own raw file of the same size.",
        load: RANDREAD,
        sides: FULL,
        bars: FULL_BARS,
        cores: 2,
    },
    Cell {
        name: "qcow2-randwrite",
        line: "qcow2 fully allocated, random read / write",
        meaning: "The same with writes.",
        load: RANDWRITE,
        sides: FULL,
        bars: FULL_BARS,
        cores: 2,
    },
    Cell {
        name: "memory-qcow2",
        line: "Memory",
        meaning: "As memory-raw with the full qcow2 image; its metadata cache (8 bytes per cluster of the disk) is included.",
        load: RANDREAD,
        sides: &[side("diskplane", Diskplane, Image::Qcow2)],
        bars: MEMORY_BARS,
        cores: 1,
    },
    Cell {
        name: "queues-2-full",
        line: "2 queues on 2 I/O threads",
        meaning: "Random reads of the full qcow2 image: two queues on two I/O threads against one on one.",
        load: RANDREAD,
        sides: &[
            side("diskplane", Diskplane, Image::Qcow2)
                .queues(2)
                .io_threads(2),
            side("one", Diskplane, Image::Qcow2),
        ],
        bars: SCALE_BARS,
        cores: 4,
    },
    Cell {
        name: "queues-2-growing",
        line: "2 queues on 2 I/O threads",
        meaning: "Random writes into a new qcow2 image: two queues on two I/O threads against one on one.",
        load: GROW,
        sides: &[
            side("diskplane", Diskplane, Image::Growing)
                .queues(2)
                .io_threads(2),
            side("one", Diskplane, Image::Growing),
        ],
        bars: SCALE_BARS,
        cores: 4,
    },
    Cell {
        name: "grow-random",
        line: "qcow2 growing, no backing file, random 4 KiB writes",
        meaning: "4 KiB random writes into a new image of 64 GiB virtual size: nearly each opens a new cluster. Beside them, random writes to the full image, and fio's (4 KiB at the start of each 64 KiB) to a file that is preallocated but unwritten: what the file system has to give where each write opens an extent.",
        load: GROW,
        sides: &[
            side("diskplane", Diskplane, Image::Growing),
            side("qsd", Qsd, Image::Growing),
            side("full", Diskplane, Image::Qcow2),
            side("device", Fio, Image::Unwritten).load(OPENS),
        ],
        bars: &[
            at_least(Iops, "qsd", 5.0),
            at_most(CpuUs, "qsd", 0.3),
            at_least(Iops, "full", 0.9),
            shown(Iops, "device"),
        ],
        cores: 2,
    },
    Cell {
        name: "flush-1",
        line: "write, flush, write, flush",
        meaning: "A random 4 KiB write into a new image, a flush, a write …: one at a time. IOPS counts the writes. Beside them fio's (4 KiB at the start of each 64 KiB, fdatasync) to the raw file that was written full: neither an image's metadata nor the file system's journal to write.",
        load: FLUSH_1,
        sides: &[
            side("diskplane", Diskplane, Image::Growing),
            side("qsd", Qsd, Image::Growing),
            side("device", Fio, Image::Raw).load(OPENS_FLUSH_1),
        ],
        bars: &[
            at_least(Iops, "qsd", 1.3),
            shown(Iops, "device"),
            alone(BarriersPerFlush, Limit::AtMost(2.0)),
        ],
        cores: 2,
    },
    Cell {
        name: "flush-16",
        line: "write, flush, write, flush",
        meaning: "The same from 16 that do so at once: flushes that wait together can share their barriers.",
        load: FLUSH_16,
        sides: FLUSH,
        bars: &[
            at_least(Iops, "qsd", 4.0),
            alone(BarriersPerFlush, Limit::Below(0.5)),
        ],
        cores: 2,
    },
    Cell {
        name: "overlay",
        line: "qcow2 overlay, random 4 KiB write into unallocated clusters",
        meaning: "Random 4 KiB writes into an empty overlay over a raw base full of data: each reads a cluster of 64 KiB and writes it. fio's 64 KiB random reads and writes (32 in flight, on the base) say what the device has to give.",
        load: GROW,
        sides: &[
            side("diskplane", Diskplane, Image::Overlay),
            side("qsd", Qsd, Image::Overlay),
            side("device", Fio, Image::Base).load(COPIES),
        ],
        bars: &[
            at_least(Iops, "qsd", 1.3),
            at_most(CpuUs, "qsd", 0.5),
            Bar {
                metric: Iops,
                against: Against::Other("device", Pairs),
                limit: Limit::Shown,
            },
        ],
        cores: 2,
    },
    Cell {
        name: "overlay-subclusters",
        line: "the same with subclusters",
        meaning: "The same in an overlay with subclusters (extended_l2), which qemu-storage-daemon has too; also beside diskplane's own growing image.",
        load: GROW,
        sides: &[
            side("diskplane", Diskplane, Image::Subclusters),
            side("qsd", Qsd, Image::Subclusters),
            side("growing", Diskplane, Image::Growing),
        ],
        bars: &[
            at_least(Iops, "qsd", 3.0),
            at_most(CpuUs, "qsd", 0.4),
            at_least(Iops, "growing", 0.8),
        ],
        cores: 2,
    },
    Cell {
        name: "disks-16",
        line: "16 disks, one process",
        meaning: "16 raw disks of one process on one I/O thread, random 70 % reads 8 deep on each, beside 16 exports of one qemu-storage-daemon. fio's requests of that kind on one file, 128 in flight, say what the device has to give.",
        load: MIXED,
        sides: &[
            side("diskplane", Diskplane, Image::Several(16)),
            side("qsd", Qsd, Image::Several(16)),
            side("device", Fio, Image::Raw).load(MIXED_128),
        ],
        bars: &[
            at_least(Iops, "qsd", 1.3),
            at_most(CpuUs, "qsd", 0.7),
            shown(Iops, "device"),
        ],
        cores: 2,
    },
    Cell {
        name: "scattered-1t",
        line: "1 TiB virtual qcow2",
        meaning: "Random reads of the 2^20 allocated clusters of a 1 TiB image (every 16th cluster; in the host's file they are holes in random order, so that reading them costs no device time), beside the host's file served raw.",
        load: SCATTERED,
        sides: &[
            side("diskplane", Diskplane, Image::Scattered),
            side("qsd", Qsd, Image::Scattered),
            side("raw", Diskplane, Image::ScatteredFile).load(SCATTERED_FILE),
        ],
        bars: &[
            at_least(Iops, "qsd", 1.5),
            at_least(Iops, "raw", 0.9),
            Bar {
                metric: MemoryMib,
                against: Against::Above("raw"),
                limit: Limit::AtMost(64.0),
            },
            shown(MemoryMib, "qsd"),
        ],
        cores: 2,
    },
    Cell {
        name: "idle-100",
        line: "Idle",
        meaning: "100 disks of one process, each with a driver that is connected and rests.",
        load: IDLE,
        sides: &[
            side("diskplane", Diskplane, Image::Many(100)),
            side("qsd", Qsd, Image::Many(100)),
        ],
        bars: &[
            alone(IdlePercent, Limit::Below(0.5)),
            shown(MemoryMib, "qsd"),
        ],
        cores: 1,
    },
];

const RAW: &[Side] = &[
    side("diskplane", Diskplane, Image::Raw),
    side("qsd", Qsd, Image::Raw),
    side("fio", Fio, Image::Raw),
];
const RAW_BARS: &[Bar] = &[
    at_least(Iops, "qsd", 1.2),
    at_least(Iops, "fio", 0.95),
    at_most(CpuUs, "qsd", 0.65),
    shown(InDevice, "fio"),
];
const SEQ_BARS: &[Bar] = &[
    at_least(Iops, "fio", 0.97),
    at_most(CpuUs, "qsd", 0.8),
    shown(Iops, "qsd"),
    shown(InDevice, "fio"),
];
const LATENCY_BARS: &[Bar] = &[
    at_most(P50Us, "qsd", 0.9),
    shown(P99Us, "qsd"),
    shown(Iops, "qsd"),
    shown(Iops, "fio"),
];
const FULL: &[Side] = &[
    side("diskplane", Diskplane, Image::Qcow2),
    side("raw", Diskplane, Image::Raw),
];
const FULL_BARS: &[Bar] = &[
    at_least(Iops, "raw", 0.97),
    at_most(CpuUs, "raw", 1.1),
    shown(InDevice, "raw"),
];
const FLUSH: &[Side] = &[
    side("diskplane", Diskplane, Image::Growing),
    side("qsd", Qsd, Image::Growing),
];
const NBD_1: &[Side] = &[
    side("diskplane", DiskplaneNbd, Image::Raw),
    side("qemu-nbd", QemuNbd, Image::Raw),
];
const NBD_SEQ: &[Side] = &[
    side("diskplane", DiskplaneNbd, Image::Raw),
    side("qemu-nbd", QemuNbd, Image::Raw),
    side("fio", Fio, Image::Raw),
];
const NBD_4: &[Side] = &[
    side("diskplane", DiskplaneNbd, Image::Raw).queues(4),
    side("qemu-nbd", QemuNbd, Image::Raw).queues(4),
];
const NBDKIT: &[Side] = &[
    side("diskplane", DiskplaneNbd, Image::Raw),
    side("nbdkit", Nbdkit, Image::Raw),
];
/// Not equal in `O_DIRECT`: neither what it does nor what a request costs there, which may not come to the device, says which is ahead.
const NBDKIT_BARS: &[Bar] = &[
    unequal(Iops, "nbdkit", BUFFERED),
    unequal(CpuUs, "nbdkit", BUFFERED),
];
const BUFFERED: &str = "it has no O_DIRECT";
const NBD_BARS: &[Bar] = &[
    at_least(Iops, "qemu-nbd", 1.3),
    at_most(CpuUs, "qemu-nbd", 0.75),
];
const NBD_SEQ_BARS: &[Bar] = &[
    at_least(Iops, "qemu-nbd", 1.3),
    at_most(CpuUs, "qemu-nbd", 0.75),
    shown(Iops, "fio"),
];
const SCALE_BARS: &[Bar] = &[at_least(Iops, "one", 1.6)];
const MEMORY_BARS: &[Bar] = &[alone(MemoryMib, Limit::Below(8.0))];

const fn alone(metric: Metric, limit: Limit) -> Bar {
    Bar {
        metric,
        against: Against::Alone,
        limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The beginnings of the lines of the issue's table, and of the two requirements below it; then those of issue 5, and one of issue 6.
    const LINES: [&str; 22] = [
        "`null` (path alone), sleeping driver",
        "`null`, `--poll` on both sides",
        "raw preallocated, random read / write",
        "qcow2 fully allocated, random read / write",
        "qcow2 growing, no backing file, random 4 KiB writes",
        "qcow2 growing, sequential write",
        "qcow2 overlay, random 4 KiB write into unallocated clusters",
        "the same with subclusters",
        "write, flush, write, flush",
        "depth 1 read latency, sleeping and adaptive",
        "sequential read/write 256 KiB, depth 8",
        "16 disks, one process",
        "1 TiB virtual qcow2",
        "NBD (Unix socket)",
        "2 queues on 2 I/O threads",
        "Idle",
        "Memory",
        "convert raw→qcow2 and qcow2→raw",
        "compressed zstd/zlib",
        "`check` of a 1 TiB-virtual qcow2",
        "`map`/`measure`/`compare`",
        "rings of stage timestamps",
    ];

    #[test]
    fn every_line_of_the_issue_has_cells_and_no_cell_is_without_a_line() {
        let covered: BTreeSet<&str> = all().map(|cell| cell.line).collect();
        assert_eq!(covered, BTreeSet::from(LINES));
    }

    #[test]
    fn cells_are_sound() {
        let mut names = BTreeSet::new();
        for cell in all() {
            assert!(names.insert(cell.name), "{} twice", cell.name);
            assert!(
                cell.name
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            );
            let first = &cell.sides[0];
            assert_eq!(first.name, "diskplane", "{}", cell.name);
            assert!(matches!(
                first.server,
                Diskplane | DiskplaneNbd | Server::Tool
            ));
            let sides: BTreeSet<_> = cell.sides.iter().map(|side| side.name).collect();
            assert_eq!(sides.len(), cell.sides.len(), "{}", cell.name);
            let mut judged = false;
            for bar in cell.bars {
                match bar.against {
                    Against::Side(side) | Against::Other(side, _) | Against::Above(side) => {
                        assert!(
                            sides.contains(side) && side != "diskplane",
                            "{}: {side}",
                            cell.name
                        );
                    }
                    Against::Alone => {}
                }
                judged |= !bar.limit.is_open();
            }
            // nbdkit has no O_DIRECT: beside it nothing is judged.
            let alike = cell.sides.iter().all(|side| side.server != Nbdkit);
            assert_eq!(judged, alike, "bars of {}", cell.name);
            // A command has something to do, a server has not.
            for side in cell.sides {
                let command = matches!(side.server, Server::Tool | Server::QemuImg);
                assert_eq!(command, side.job.is_some(), "{}", cell.name);
            }
            // A write into an image that grows has to end before the host's disk is full.
            for side in cell.sides {
                let load = side.load.unwrap_or(cell.load);
                let grows = matches!(
                    side.image,
                    Image::Growing | Image::Overlay | Image::Subclusters
                );
                assert!(!grows || load.grows > 0, "{}", cell.name);
            }
        }
    }

    #[test]
    fn bars_are_those_of_the_issue() {
        let bars = |name: &str| -> Vec<String> {
            let cell = all().find(|cell| cell.name == name).unwrap();
            let judged = cell.bars.iter().filter(|bar| !bar.limit.is_open());
            judged
                .map(|bar| format!("{:?} {}", bar.metric, bar.limit))
                .collect()
        };
        for (name, expected) in [
            ("null", &["Iops ≥ 2.5", "CpuUs ≤ 0.35"][..]),
            ("null-poll", &["Iops ≥ 2.5", "Iops ≥ 0.9"]),
            ("trace-null", &["Iops ≥ 0.98"]),
            (
                "raw-randwrite",
                &["Iops ≥ 1.2", "Iops ≥ 0.95", "CpuUs ≤ 0.65"],
            ),
            ("qcow2-randread", &["Iops ≥ 0.97", "CpuUs ≤ 1.1"]),
            ("grow-random", &["Iops ≥ 5", "CpuUs ≤ 0.3", "Iops ≥ 0.9"]),
            ("grow-seq-4k", &["Iops ≥ 1.2", "CpuUs ≤ 0.7"]),
            (
                "grow-seq-256k",
                &["Iops ≥ 1.2", "CpuUs ≤ 0.7", "Iops ≥ 0.95"],
            ),
            ("overlay", &["Iops ≥ 1.3", "CpuUs ≤ 0.5"]),
            (
                "overlay-subclusters",
                &["Iops ≥ 3", "CpuUs ≤ 0.4", "Iops ≥ 0.8"],
            ),
            ("flush-1", &["Iops ≥ 1.3", "BarriersPerFlush ≤ 2"]),
            ("flush-16", &["Iops ≥ 4", "BarriersPerFlush < 0.5"]),
            ("latency-sleeping", &["P50Us ≤ 0.9"]),
            ("latency-adaptive", &["P50Us ≤ 0.9"]),
            ("seq-read", &["Iops ≥ 0.97", "CpuUs ≤ 0.8"]),
            ("disks-16", &["Iops ≥ 1.3", "CpuUs ≤ 0.7"]),
            (
                "scattered-1t",
                &["Iops ≥ 1.5", "Iops ≥ 0.9", "MemoryMib ≤ 64"],
            ),
            ("nbd-randread-4", &["Iops ≥ 1.3", "CpuUs ≤ 0.75"]),
            ("queues-2-growing", &["Iops ≥ 1.6"]),
            ("idle-100", &["IdlePercent < 0.5"]),
            ("memory-qcow2", &["MemoryMib < 8"]),
            (
                "convert-raw-qcow2",
                &["Runs ≥ 1.5", "CpuS ≤ 1", "PeakMib < 256"],
            ),
            (
                "convert-qcow2-raw-sync",
                &["Runs ≥ 1.5", "CpuS ≤ 1", "PeakMib < 256"],
            ),
            ("convert-zstd", &["Runs ≥ 1.3", "PeakMib < 256"]),
            ("check", &["Runs ≥ 2", "PeakMib < 256"]),
            ("map", &["Runs ≥ 1", "PeakMib < 256"]),
            ("measure", &["Runs ≥ 1", "PeakMib < 256"]),
            ("compare", &["Runs ≥ 1", "PeakMib < 256"]),
        ] {
            assert_eq!(bars(name), expected, "{name}");
        }
    }
}
