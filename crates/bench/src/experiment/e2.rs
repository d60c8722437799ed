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

/// What is published for 16 threads, MB/s: QCOW2 of 2010, QED with L2 flush, QED.
const PUBLISHED: [(Scenario, [f64; 3]); 8] = [
    (Scenario::LargeCreates256k, [89.4, 96.8, 134.5]),
    (Scenario::SequentialReads256k, [276.0, 908.0, 922.0]),
    (Scenario::LargeCreates8k, [17.7, 30.2, 43.3]),
    (Scenario::SequentialReads8k, [13.8, 160.0, 160.0]),
    (Scenario::RandomReads, [13.7, 48.8, 48.4]),
    (Scenario::RandomWrites, [14.0, 125.2, 126.7]),
    (Scenario::MailServer, [11.8, 72.0, 73.2]),
    (Scenario::Mixed, [28.6, 114.1, 111.9]),
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

fn findings() -> Vec<Finding> {
    let mut findings = Vec::new();
    let mb_s = |cell: &str, side: &str| -> Term { term(cell, side, Metric::MbS) };
    for (scenario, [qcow2, flush, qed]) in PUBLISHED {
        // What grows in a load shows what the formats do; what only reads does not grow.
        let state = match scenario.only_reads() {
            true => "full",
            false => "growing",
        };
        let cell = name(scenario, 16, state);
        for server in ["qemu", "diskplane"] {
            let ours = if server == "qemu" { "" } else { "(Ours) " };
            findings.push(Finding {
                says: format!(
                    "{ours}{}, 16 threads: QED is ahead of qcow2 ({qed} against {qcow2} MB/s)",
                    scenario.name()
                ),
                left: mb_s(&cell, &format!("{server} qed")),
                right: Some(mb_s(&cell, &format!("{server} qcow2"))),
                claim: Claim::More,
                published: Some(qed / qcow2),
            });
        }
        if matches!(
            scenario,
            Scenario::LargeCreates256k | Scenario::LargeCreates8k
        ) {
            findings.push(Finding {
                says: format!(
                    "{}, 16 threads: a flush for each L2 update costs QED throughput ({flush} against {qed} MB/s)",
                    scenario.name()
                ),
                left: mb_s(&cell, "qemu qed, L2 flush"),
                right: Some(mb_s(&cell, "qemu qed")),
                claim: Claim::Less,
                published: Some(flush / qed),
            });
        }
    }
    let full = name(Scenario::RandomReads, 16, "full");
    findings.push(Finding {
        says: "A fully allocated qcow2 image should perform similar to raw".to_owned(),
        left: mb_s(&full, "qemu qcow2"),
        right: Some(mb_s(&full, "qemu raw")),
        claim: Claim::Equal(0.1),
        published: None,
    });
    let barriers = |server: &str| Finding {
        says: format!("Barriers cost the mail server throughput ({server})"),
        left: mb_s("toggle-barriers", &format!("{server} barriers")),
        right: Some(mb_s("toggle-barriers", &format!("{server} no barriers"))),
        claim: Claim::Less,
        published: None,
    };
    findings.push(barriers("qemu"));
    findings.push(Finding {
        says: "Bypassing the host's cache (none) is better than writethrough".to_owned(),
        left: mb_s("toggle-cache", "qemu none"),
        right: Some(mb_s("toggle-cache", "qemu writethrough")),
        claim: Claim::More,
        published: None,
    });
    findings.push(Finding {
        says: "Linux AIO is good for many threads: not behind threads".to_owned(),
        left: mb_s("toggle-engine", "qemu native"),
        right: Some(mb_s("toggle-engine", "qemu threads")),
        claim: Claim::NotLess(0.05),
        published: None,
    });
    let reads = |threads: usize| format!("guest-random-reads-{threads}");
    findings.push(Finding {
        says: "IDE emulation does not scale, for it has one request at a time: 16 threads in a guest read no more than one"
            .to_owned(),
        left: mb_s(&reads(16), "ide, qemu"),
        right: Some(mb_s(&reads(1), "ide, qemu")),
        claim: Claim::Equal(0.25),
        published: None,
    });
    findings.push(Finding {
        says: "virtio is ahead of IDE, 16 threads in a guest".to_owned(),
        left: mb_s(&reads(16), "virtio, qemu"),
        right: Some(mb_s(&reads(16), "ide, qemu")),
        claim: Claim::More,
        published: None,
    });
    for scenario in [Scenario::LargeCreates256k, Scenario::RandomWrites] {
        let cell = name(scenario, 16, "growing");
        findings.push(Finding {
            says: format!(
                "(Ours) {}: diskplane's growing qcow2 is not behind QEMU's QED",
                scenario.name()
            ),
            left: mb_s(&cell, "diskplane qcow2"),
            right: Some(mb_s(&cell, "qemu qed")),
            claim: Claim::NotLess(0.05),
            published: None,
        });
    }
    findings
}

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
        absent: &[],
        figures: &[Metric::MbS, Metric::CpuPercentPerMb, Metric::CpuPercent],
        disk_bytes: (8 << 30, 1 << 30),
    }
}
