//! E2: the performance roadmap of qcow2 and the storage stack of 2010 (documents 002 and 003).

use super::plan::{
    Bus, Cell, Claim, Client, Experiment, Files, Finding, Format, How, Image, RAW, Side, State,
    System, Term, side, term,
};
use crate::{
    ffsb::Scenario,
    metric::Metric,
    versus::cell::{Load, NONE, RANDREAD, RANDWRITE, Server},
};

const OURS: How = How::Mounted(Some(Server::DiskplaneNbd));
const QEMU: How = How::Mounted(Some(Server::QemuNbd));

const THREADS: [usize; 3] = [1, 8, 16];

/// The document's three states of an image.
const STATES: [(&str, State); 3] = [
    ("full", State::Full),
    ("growing", State::Growing),
    ("backing", State::Overlay),
];

/// What is published for 1, 8 and 16 threads, MB/s: QCOW2 of 2010, QED with L2 flush, QED.
const PUBLISHED: [(Scenario, [[f64; 3]; 3]); 8] = [
    (
        Scenario::LargeCreates256k,
        [
            [95.1, 101.0, 121.5],
            [110.0, 95.2, 125.0],
            [89.4, 96.8, 134.5],
        ],
    ),
    (
        Scenario::SequentialReads256k,
        [
            [68.2, 154.0, 149.0],
            [262.0, 849.0, 817.5],
            [276.0, 908.0, 922.0],
        ],
    ),
    (
        Scenario::LargeCreates8k,
        [[11.8, 13.9, 16.3], [18.4, 29.7, 41.0], [17.7, 30.2, 43.3]],
    ),
    (
        Scenario::SequentialReads8k,
        [
            [20.8, 26.3, 22.2],
            [13.8, 136.0, 131.5],
            [13.8, 160.0, 160.0],
        ],
    ),
    (
        Scenario::RandomReads,
        [[3.8, 3.5, 3.6], [13.8, 26.0, 25.7], [13.7, 48.8, 48.4]],
    ),
    (
        Scenario::RandomWrites,
        [
            [22.6, 22.5, 22.6],
            [14.0, 113.1, 112.7],
            [14.0, 125.2, 126.7],
        ],
    ),
    (
        Scenario::MailServer,
        [[7.8, 8.8, 8.3], [10.8, 45.8, 46.4], [11.8, 72.0, 73.2]],
    ),
    (
        Scenario::Mixed,
        [[10.2, 9.5, 8.8], [24.8, 63.5, 62.9], [28.6, 114.1, 111.9]],
    ),
];

/// What document 003 has of 16 threads, MB/s: in a KVM guest (without its proposed solutions) on devices, and on bare metal.
const BESIDE_BARE: [(Scenario, [f64; 2]); 8] = [
    (Scenario::LargeCreates256k, [691.0, 707.0]),
    (Scenario::SequentialReads256k, [824.0, 971.0]),
    (Scenario::LargeCreates8k, [160.0, 256.0]),
    (Scenario::SequentialReads8k, [185.0, 241.0]),
    (Scenario::RandomReads, [48.3, 47.7]),
    (Scenario::RandomWrites, [143.0, 177.0]),
    (Scenario::Mixed, [114.6, 84.2]),
    (Scenario::MailServer, [76.6, 115.5]),
];

fn image(format: Format, state: State) -> Image {
    Image {
        format,
        state,
        ..RAW
    }
}

/// Systems on images of a state.
fn sides(state: State) -> Vec<Side> {
    // Over a backing file there is no raw image: bare metal is the file below.
    let raw = match state {
        State::Overlay => State::Full,
        own => own,
    };
    let mut sides = vec![side(
        "bare metal",
        How::Mounted(None),
        image(Format::Raw, raw),
    )];
    for (server, how) in [("qemu", QEMU), ("diskplane", OURS)] {
        sides.push(side(format!("{server} raw"), how, image(Format::Raw, raw)));
        for format in [Format::Qcow2, Format::Qed] {
            let name = format!("{server} {}", format.name());
            sides.push(side(name, how, image(format, state)));
        }
    }
    if state == State::Growing {
        // QEMU's QED flushes between new data and its L2 entry where there is a backing file: an empty one makes
        // it do so alone.
        sides.push(side(
            "qemu qed, L2 flush",
            QEMU,
            image(Format::Qed, State::Hollow),
        ));
    }
    sides
}

fn name(scenario: Scenario, threads: usize, state: &str) -> String {
    format!("{}-{threads}-{state}", scenario.name())
}

fn cell(scenario: Scenario, threads: usize, state: (&str, State)) -> Cell {
    Cell {
        name: name(scenario, threads, state.0),
        axes: vec![
            ("scenario".to_owned(), scenario.name().to_owned()),
            ("threads".to_owned(), threads.to_string()),
            ("state".to_owned(), state.0.to_owned()),
        ],
        load: NONE,
        files: Some(Files { scenario, threads }),
        sides: sides(state.1),
        quick: threads == 16
            && match state.1 {
                State::Full => matches!(
                    scenario,
                    Scenario::SequentialReads8k | Scenario::RandomReads | Scenario::RandomWrites
                ),
                State::Growing => !scenario.only_reads(),
                _ => scenario == Scenario::RandomWrites,
            },
    }
}

/// Document 003's switches, one at a time, on the same scenario and full qcow2 images.
fn toggles() -> Vec<Cell> {
    let disk = image(Format::Qcow2, State::Full);
    let base = |server: &str, how, what: &str| side(format!("{server} {what}"), how, disk);
    let servers = [("qemu", QEMU), ("diskplane", OURS)];
    let of = |name: &str, scenario, sides| Cell {
        name: format!("toggle-{name}"),
        axes: vec![
            ("toggle".to_owned(), name.to_owned()),
            ("scenario".to_owned(), Scenario::name(scenario).to_owned()),
        ],
        load: NONE,
        files: Some(Files {
            scenario,
            threads: 16,
        }),
        sides,
        quick: false,
    };
    let each = |make: &dyn Fn(&str, How) -> Vec<Side>| -> Vec<Side> {
        servers
            .iter()
            .flat_map(|(server, how)| make(server, *how))
            .collect()
    };
    let cache = each(&|server, how| {
        vec![
            base(server, how, "none"),
            Side {
                direct: false,
                ..base(server, how, "writeback")
            },
            Side {
                direct: false,
                writethrough: true,
                ..base(server, how, "writethrough")
            },
        ]
    });
    let engines = each(&|server, how| {
        ["native", "threads", "io_uring"]
            .into_iter()
            .map(|engine| Side {
                engine,
                ..base(server, how, engine)
            })
            .collect()
    });
    let client = |what: &str, client| {
        each(&|server, how| {
            vec![Side {
                client,
                ..base(server, how, what)
            }]
        })
    };
    // A file system of its own needs an image of its own.
    let systems = [("ext4", System::Ext4), ("xfs", System::Xfs)].map(|(name, system)| {
        let own = Client {
            system,
            ..Client::EXT4
        };
        let mut sides = client(name, own);
        for side in &mut sides {
            side.image.state = State::Growing;
        }
        sides
    });
    let barriers = [("barriers", true), ("no barriers", false)].map(|(name, barriers)| {
        client(
            name,
            Client {
                barriers,
                ..Client::EXT4
            },
        )
    });
    let schedulers = ["none", "mq-deadline", "bfq"].map(|name| {
        client(
            name,
            Client {
                scheduler: Some(name),
                ..Client::EXT4
            },
        )
    });
    vec![
        of("cache", Scenario::RandomWrites, cache),
        of("engine", Scenario::RandomReads, engines),
        of("file-system", Scenario::LargeCreates8k, systems.concat()),
        of("barriers", Scenario::MailServer, barriers.concat()),
        of(
            "barriers-random-writes",
            Scenario::RandomWrites,
            barriers.concat(),
        ),
        of("scheduler", Scenario::RandomReads, schedulers.concat()),
    ]
}

/// Scenarios and threads in a guest.
const IN_GUEST: [(Scenario, usize); 3] = [
    (Scenario::RandomReads, 1),
    (Scenario::RandomReads, 16),
    (Scenario::RandomWrites, 16),
];

/// Document 003's virtio against IDE, in a guest, on one raw disk.
fn in_guest((scenario, threads): (Scenario, usize)) -> Cell {
    let disk = image(Format::Raw, State::Full);
    let of = |name: &str, bus, server| side(name, How::Guest(bus, server), disk);
    Cell {
        name: format!("guest-{}-{threads}", scenario.name()),
        axes: vec![
            ("guest".to_owned(), "Linux".to_owned()),
            ("scenario".to_owned(), scenario.name().to_owned()),
            ("threads".to_owned(), threads.to_string()),
        ],
        load: NONE,
        files: Some(Files { scenario, threads }),
        sides: vec![
            of("virtio, diskplane", Bus::Virtio, Some(Server::Diskplane)),
            of("virtio, qsd", Bus::Virtio, Some(Server::Qsd)),
            of("virtio, qemu", Bus::Virtio, None),
            of("ide, diskplane", Bus::Ide, Some(Server::DiskplaneNbd)),
            of("ide, qemu-nbd", Bus::Ide, Some(Server::QemuNbd)),
            of("ide, qemu", Bus::Ide, None),
        ],
        quick: false,
    }
}

/// The same by fio, on the disk as it is: 32 requests of 4 KiB at a time.
fn fio_in_guest((name, load): (&str, Load)) -> Cell {
    let of_files = in_guest(IN_GUEST[0]);
    Cell {
        name: format!("guest-fio-{name}"),
        axes: vec![
            ("guest".to_owned(), "Linux".to_owned()),
            ("fio".to_owned(), name.to_owned()),
        ],
        load,
        files: None,
        ..of_files
    }
}

/// Why gaps between disks are smaller here than published, or turn.
const IN_COMMON: &str = "qcow2 is that of QEMU 10 and not of 2010; and each disk is a loop device through nbdfuse, whose cost all have in common";

fn mb_s(cell: &str, side: &str) -> Term {
    term(cell, side, Metric::MbS)
}

/// What grows in a load shows what the formats do; what only reads does not grow.
fn published_cell(scenario: Scenario, threads: usize) -> String {
    let state = match scenario.only_reads() {
        true => "full",
        false => "growing",
    };
    name(scenario, threads, state)
}

/// "1 thread", "8 threads".
fn of_threads(threads: usize) -> String {
    match threads {
        1 => "1 thread".to_owned(),
        n => format!("{n} threads"),
    }
}

/// How two published figures stand to each other: equal is what differs by less than their last digits and a run's noise do.
fn claim(of: f64, by: f64) -> (Claim, &'static str) {
    match of / by {
        ratio if ratio > 1.05 => (Claim::More, "is ahead of"),
        ratio if ratio < 0.95 => (Claim::Less, "is behind"),
        _ => (Claim::Equal(0.1), "is equal to"),
    }
}

/// The table of document 002.
fn of_formats() -> Vec<Finding> {
    let mut findings = Vec::new();
    // What a quick run has first.
    for (n, threads) in THREADS.into_iter().enumerate().rev() {
        for (scenario, figures) in PUBLISHED {
            let [qcow2, flush, qed] = figures[n];
            let cell = published_cell(scenario, threads);
            let what = format!("{}, {}", scenario.name(), of_threads(threads));
            let (claim, words) = claim(qed, qcow2);
            let says = format!("{what}: QED {words} qcow2 ({qed} against {qcow2} MB/s)");
            let (left, right) = (mb_s(&cell, "qemu qed"), mb_s(&cell, "qemu qcow2"));
            findings.push(
                Finding::new(says, left, right, claim)
                    .published(qed / qcow2)
                    .otherwise(IN_COMMON),
            );
            if matches!(
                scenario,
                Scenario::LargeCreates256k | Scenario::LargeCreates8k
            ) {
                let says = format!(
                    "{what}: a flush for each L2 update costs QED throughput ({flush} against {qed} MB/s)"
                );
                let (left, right) = (mb_s(&cell, "qemu qed, L2 flush"), mb_s(&cell, "qemu qed"));
                findings.push(
                    Finding::new(says, left, right, Claim::Less)
                        .published(flush / qed)
                        .otherwise(IN_COMMON),
                );
            }
        }
    }
    findings
}

/// The table of document 003.
fn beside_bare_metal() -> Vec<Finding> {
    let of = |(scenario, [kvm, bare]): (Scenario, [f64; 2])| {
        let cell = published_cell(scenario, 16);
        let (claim, words) = claim(kvm, bare);
        let says = format!(
            "{}, 16 threads: a virtual machine's raw disk {words} bare metal ({kvm} against {bare} MB/s)",
            scenario.name()
        );
        Finding::new(says, mb_s(&cell, "qemu raw"), mb_s(&cell, "bare metal"), claim)
            .published(kvm / bare)
            .otherwise("the disk is that of qemu-nbd as a loop device through nbdfuse, and no guest's; bare metal is a loop device on the file")
    };
    BESIDE_BARE.map(of).into()
}

/// The switches of document 003.
fn of_switches() -> Vec<Finding> {
    let reads = |threads: usize| format!("guest-random-reads-{threads}");
    vec![
        Finding::new(
            "Barriers (on by default in ext4) cost the mail server throughput",
            mb_s("toggle-barriers", "qemu barriers"),
            mb_s("toggle-barriers", "qemu no barriers"),
            Claim::Less,
        ),
        Finding::new(
            "Barriers affect the mail server only: random writes are as fast with them as without",
            mb_s("toggle-barriers-random-writes", "qemu barriers"),
            mb_s("toggle-barriers-random-writes", "qemu no barriers"),
            Claim::Equal(0.1),
        ),
        Finding::new(
            "Bypassing the host's cache (none) is better than writethrough",
            mb_s("toggle-cache", "qemu none"),
            mb_s("toggle-cache", "qemu writethrough"),
            Claim::More,
        ),
        Finding::new(
            "Linux AIO is good for many threads: not behind threads",
            mb_s("toggle-engine", "qemu native"),
            mb_s("toggle-engine", "qemu threads"),
            Claim::NotLess(0.05),
        ),
        Finding::new(
            "The deadline scheduler scales better than CFQ, whose place bfq has taken",
            mb_s("toggle-scheduler", "qemu mq-deadline"),
            mb_s("toggle-scheduler", "qemu bfq"),
            Claim::More,
        )
        .otherwise(
            "the scheduler is that of the loop device that the load is on, and not of eight LUNs",
        ),
        Finding::new(
            "IDE emulation does not scale, for it has one request at a time: 16 threads in a guest read no more than one",
            mb_s(&reads(16), "ide, qemu"),
            mb_s(&reads(1), "ide, qemu"),
            Claim::Equal(0.25),
        ),
        Finding::new(
            "virtio is ahead of IDE, 16 threads in a guest",
            mb_s(&reads(16), "virtio, qemu"),
            mb_s(&reads(16), "ide, qemu"),
            Claim::More,
        ),
    ]
}

fn findings() -> Vec<Finding> {
    let mut findings = of_formats();
    let full = name(Scenario::RandomReads, 16, "full");
    findings.push(Finding::new(
        "A fully allocated qcow2 image should perform similar to raw",
        mb_s(&full, "qemu qcow2"),
        mb_s(&full, "qemu raw"),
        Claim::Equal(0.1),
    ));
    findings.extend(beside_bare_metal());
    findings.extend(of_switches());
    // No flush of a table, and none of its loads, is on the way of a write or a read: what QED was made for.
    for (scenario, _) in PUBLISHED {
        let cell = published_cell(scenario, 16);
        for other in ["diskplane qed", "qemu qed"] {
            let says = format!(
                "{}, 16 threads: diskplane's qcow2 is not behind {other}",
                scenario.name()
            );
            let (left, right) = (mb_s(&cell, "diskplane qcow2"), mb_s(&cell, other));
            findings.push(Finding::new(says, left, right, Claim::NotLess(0.05)).goal());
        }
    }
    findings
}

/// What the documents speak of and no path here has.
const ABSENT: [(&str, &str); 4] = [
    (
        "the other hypervisor of document 003",
        "it is not named, and there is none to run beside KVM here",
    ),
    (
        "x2APIC, the lock of virtio-blk's guest driver, ioeventfd",
        "they are the guest's, or KVM's: by now all guests have them",
    ),
    (
        "the CPU of virtual processors per MB/s",
        "only the cells guest-… have a guest, which says what its kernel used, for each MB/s too; all others have the server's CPU, and the host's",
    ),
    (
        "eight LUNs behind LVM",
        "the run's folder, or what it lies on, is the device",
    ),
];

pub(super) fn experiment() -> Experiment {
    let mut cells = Vec::new();
    for state in STATES {
        for (scenario, _) in PUBLISHED {
            for threads in THREADS {
                // An image that nobody writes does not grow.
                if state.1 == State::Growing && scenario.only_reads() {
                    continue;
                }
                cells.push(cell(scenario, threads, state));
            }
        }
    }
    cells.extend(toggles());
    cells.extend(IN_GUEST.map(in_guest));
    let by_fio = [("randread", RANDREAD), ("randwrite", RANDWRITE)];
    cells.extend(by_fio.map(fio_in_guest));
    Experiment {
        name: "E2",
        title: "File systems on virtual disks",
        source: "002: Qcow2/PerformanceRoadmap (2010); 003: KVM / QEMU Storage Stack Performance Discussion (2010)",
        meaning: "FFSB's scenarios on ext4 on raw, qcow2 and QED disks, with O_DIRECT, by 1, 8 and 16 threads; images that are \
                  fully allocated, that grow, and that grow over a backing file. The document's guests had virtio-blk; \
                  here the disk of diskplane's NBD server or of qemu-nbd becomes a loop device through nbdfuse, the same for \
                  both, so that what all have in common costs more than there, and gaps are smaller. Bare metal is a \
                  loop device on the raw file. Growing: a new image for each sample; files that are only written, at random, are \
                  holes at first. The document's qcow2 is that of 2010, and its storage had eight LUNs. virtio \
                  against IDE is measured in a Linux guest (--guest DIR), which runs this program's own scenarios.",
        cells,
        findings: findings(),
        absent: &ABSENT,
        figures: &[
            Metric::MbS,
            Metric::Iops,
            Metric::CpuPercentPerMb,
            Metric::HostPercent,
        ],
        disk_bytes: (8 << 30, 1 << 30),
    }
}
