//! `kill -9` of `diskplane serve` under load: what a flush covered is there afterwards, all else is old or new.
//!
//! Each test kills one server after the other on the same image, at a random moment of a random load. After each kill
//! `diskplane check` and `qemu-img check` may find leaks and nothing else, and every sector of the disk is read and
//! judged by the record that the client kept.
//!
//! `DISKPLANE_KILL_ROUNDS` says how many kills (5 unless set), `DISKPLANE_KILL_SEED` which (1 unless set).

mod client;
mod nbd;
mod record;
mod vhost;

#[path = "../../../disk/tests/peer/mod.rs"]
mod peer;

use client::{Client, Kind, Request};
use disk::ChainOptions;
use peer::Random;
use record::{Content, Record, SECTOR, decode, fill};
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::{Serve, Server, TempDir, command, qemu};

/// Bytes of the disk: more than a refcount block covers with clusters of 4 KiB, and of eight L2 tables.
const DISK_BYTES: u64 = 16 << 20;
/// Requests in flight.
const DEPTH: usize = 24;
/// Completions before the kill, at most.
const COMPLETIONS_MAX: u64 = 1500;
/// The version of what lies in a backing file.
const BASE_VERSION: u32 = 1;

fn binary() -> PathBuf {
    testkit::diskplane(env!("CARGO_BIN_EXE_diskplane"))
}

/// Which engine in which round, and its cache mode.
const ENGINES: [(&str, &str); 5] = [
    ("io_uring", "writeback"),
    ("threads", "writeback"),
    ("native", "none"),
    ("io_uring", "none"),
    ("threads", "writethrough"),
];

/// A number from the environment.
fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text}"))
    })
}

/// What is served.
#[derive(Clone, Copy)]
enum Image {
    Raw,
    /// `-o` of `qemu-img create`; DATA is a file for data.
    Qcow2(&'static str),
    /// Over a raw base that is half as long and half full.
    Overlay(&'static str),
    /// A quarter full of compressed clusters.
    Compressed(&'static str),
    /// A quarter full, with an internal snapshot of that and an enabled bitmap.
    Snapshot(&'static str),
}

impl Image {
    fn format(self) -> &'static str {
        match self {
            Image::Raw => "raw",
            _ => "qcow2",
        }
    }

    /// Makes it, and says what it reads as.
    fn create(self, dir: &TempDir) -> Vec<Content> {
        let (image, size) = (dir.path("disk"), DISK_BYTES.to_string());
        let mut content = vec![Content::Zero; DISK_BYTES as usize / SECTOR];
        match self {
            Image::Raw => qemu::create("raw", &image, &size),
            Image::Qcow2(options) => {
                let data = dir.path("data").display().to_string();
                let options = options.replace("DATA", &data);
                qemu::create_with("qcow2", &image, &size, &options);
            }
            Image::Overlay(options) => {
                let full = DISK_BYTES as usize / 4;
                let mut bytes = vec![0; 2 * full];
                fill(&mut bytes[..full], 0, BASE_VERSION);
                std::fs::write(dir.path("base"), bytes).unwrap();
                let options = format!("backing_file=base,backing_fmt=raw,{options}");
                qemu::create_with("qcow2", &image, &size, &options);
                content[..full / SECTOR].fill(Content::Version(BASE_VERSION));
            }
            Image::Compressed(options) | Image::Snapshot(options) => {
                let full = DISK_BYTES as usize / 4;
                let mut bytes = vec![0; DISK_BYTES as usize];
                fill(&mut bytes[..full], 0, BASE_VERSION);
                std::fs::write(dir.path("plain"), bytes).unwrap();
                let compress = matches!(self, Image::Compressed(_));
                let mut convert = Command::new("qemu-img");
                convert.arg("convert").args(compress.then_some("-c"));
                convert.args(["-f", "raw", "-O", "qcow2", "-o", options]);
                command::run(convert.arg(dir.path("plain")).arg(&image));
                if compress {
                    let checked = qemu::check_allowing_leaks("qcow2", &image);
                    assert!(!checked.contains(" 0.00% compressed"), "{checked}");
                } else {
                    for args in [["snapshot", "-c", "before"], ["bitmap", "--add", "-g64k"]] {
                        let mut command = Command::new("qemu-img");
                        command.args(args).arg(&image);
                        command::run(command.args((args[0] == "bitmap").then_some("bits")));
                    }
                }
                content[..full / SECTOR].fill(Content::Version(BASE_VERSION));
            }
        }
        content
    }
}

#[derive(Clone, Copy)]
enum Door {
    VhostUser,
    Nbd,
}

/// One load until the kill, and the answers that had left the server by then.
fn load(client: &mut dyn Client, record: &mut Record, random: &mut Random, server: Server) {
    let mut slots: Vec<Option<Request>> = (0..DEPTH).map(|_| None).collect();
    let mut server = Some(server);
    let kill_after = 1 + random.below(COMPLETIONS_MAX);
    let (mut completions, mut data) = (0, Vec::new());
    // Where half of the requests go: what is written again and again.
    let hot = random.below(record.sectors() - 2048);
    loop {
        while let Some(slot) = slots
            .iter()
            .position(Option::is_none)
            .filter(|_| server.is_some())
        {
            let request = choose(record, random, hot);
            data.clear();
            match request.kind {
                Kind::Flush => record.flush(request.number),
                Kind::Read => record.hold(request.first, request.sectors, true),
                kind => {
                    let content = match kind {
                        Kind::Write => Some(Content::Version(request.number)),
                        Kind::Zero => Some(Content::Zero),
                        _ => None,
                    };
                    record.begin(request.number, request.first, request.sectors, content);
                }
            }
            if request.kind == Kind::Write {
                data.resize(request.sectors as usize * SECTOR, 0);
                fill(&mut data, request.first, request.number);
            }
            client.submit(slot, &request, &data);
            slots[slot] = Some(request);
        }
        if server.is_some() {
            client.send();
        }
        // A server that was killed: what it had said by then, and no waiting for more.
        let Some((slot, ok)) = client.next(server.is_some(), &mut data) else {
            assert!(server.is_none(), "the server closed the connection");
            return;
        };
        let request = slots[slot]
            .take()
            .expect("an answer to a request in flight");
        assert!(ok, "{request:?} failed");
        match request.kind {
            Kind::Flush => record.flushed(request.number),
            Kind::Read => {
                record.hold(request.first, request.sectors, false);
                assert_eq!(data.len(), request.sectors as usize * SECTOR);
                for (sector, bytes) in (request.first..).zip(data.chunks(SECTOR)) {
                    let found = decode(bytes, sector);
                    let right = found.is_some_and(|found| record.reads_as(sector, found));
                    assert!(right, "while served, sector {sector} reads as {found:?}");
                }
            }
            _ => record.end(request.number),
        }
        completions += 1;
        if completions == kill_after {
            server.take().unwrap().kill();
        }
    }
}

fn choose(record: &mut Record, random: &mut Random, hot: u64) -> Request {
    let number = record.number();
    let kind = match random.below(100) {
        0..60 => Kind::Write,
        60..66 => Kind::Flush,
        66..76 => Kind::Zero,
        76..82 => Kind::Discard,
        _ => Kind::Read,
    };
    if kind == Kind::Flush {
        return Request {
            kind,
            number,
            first: 0,
            sectors: 0,
        };
    }
    loop {
        let sectors = match random.below(8) {
            0 => 1 + random.below(128),
            1 => 1 + random.below(8),
            2 => 64,
            _ => 8,
        };
        let first = match random.below(2) {
            0 => hot + random.below(2048 - sectors),
            _ => random.below(record.sectors() - sectors),
        };
        // Most requests are aligned, as those of a file system.
        let first = if random.below(4) > 0 {
            first / 8 * 8
        } else {
            first
        };
        if record.free(first, sectors) {
            return Request {
                kind,
                number,
                first,
                sectors,
            };
        }
    }
}

/// Kills, checks and reads, round after round.
fn rounds(image: Image, door: Door, what: &str) {
    let seed = from_environment("DISKPLANE_KILL_SEED", 1);
    let rounds = from_environment("DISKPLANE_KILL_ROUNDS", 5);
    let dir = TempDir::new();
    let mut record = Record::new(image.create(&dir), BASE_VERSION);
    let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9) ^ u64::from(what.as_bytes()[0]));
    for round in 0..rounds {
        let context = || {
            format!(
                "{what}: round {round} of DISKPLANE_KILL_SEED={seed} DISKPLANE_KILL_ROUNDS={rounds}"
            )
        };
        let (path, socket) = (dir.path("disk"), dir.path("sock"));
        let serve = Serve::new(binary(), &path).format(image.format());
        let (engine, cache) = ENGINES[round as usize % ENGINES.len()];
        let serve = serve.aio(engine).cache(cache);
        let queues = 1 + round as usize % 2;
        let serve = serve.io_threads(queues);
        let (server, mut client): (Server, Box<dyn Client>) = match door {
            Door::VhostUser => {
                let server = serve.queues(queues).vhost_user(&socket).start();
                (
                    server,
                    Box::new(vhost::Vhost::connect(&socket, queues, DEPTH)),
                )
            }
            Door::Nbd => {
                let server = serve.nbd_unix(&socket).start();
                (server, Box::new(nbd::Nbd::connect(&socket, DEPTH)))
            }
        };
        eprintln!("{}", context());
        load(&mut *client, &mut record, &mut random, server);
        let found =
            judge(&dir, image, &record).unwrap_or_else(|loss| panic!("{}: {loss}", context()));
        record.restart(found);
        if image.format() == "qcow2" {
            let postponed =
                matches!(image, Image::Qcow2(options) if options.contains("lazy_refcounts"));
            check(&path, round % 2 == 1, postponed);
        }
        if round + 1 == rounds {
            let flat = dir.path("flat");
            qemu::convert(image.format(), &path, "raw", &flat);
            let bytes = std::fs::read(&flat).unwrap();
            record
                .judge(0, &bytes)
                .unwrap_or_else(|loss| panic!("{}: to QEMU {loss}", context()));
        }
    }
    if let Image::Snapshot(_) = image {
        // The snapshot is what it was.
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-l", "before", "-O", "raw"]);
        command::run(convert.arg(dir.path("disk")).arg(dir.path("then")));
        let (then, plain) = (dir.path("then"), dir.path("plain"));
        assert!(std::fs::read(then).unwrap() == std::fs::read(plain).unwrap());
    }
    assert!(
        record.covered > 10 * rounds,
        "flushes covered {} requests only",
        record.covered
    );
}

/// Reads the whole disk and judges it.
fn judge(dir: &TempDir, image: Image, record: &Record) -> Result<Vec<Content>, record::Loss> {
    let options = ChainOptions {
        format: Some(image.format().parse().unwrap()),
        read_only: true,
        ..ChainOptions::default()
    };
    // The files of a killed process stay locked until its last request has ended.
    let chain = peer::open_chain(&dir.path("disk"), &options).unwrap();
    let mut driver = chain.driver().unwrap();
    let (mut found, mut bytes) = (Vec::new(), vec![0; 1 << 20]);
    for at in (0..DISK_BYTES).step_by(bytes.len()) {
        driver.read(at, &mut bytes).unwrap();
        found.extend(record.judge(at / SECTOR as u64, &bytes)?);
    }
    Ok(found)
}

/// Leaks and nothing else, to us and to QEMU; every other time they are repaired.
fn check(image: &Path, repair: bool, postponed: bool) {
    if postponed && is_dirty(image) {
        // Refcounts are behind, as the image says: QEMU repairs it, or the next server does.
        if repair {
            let mut check = Command::new("qemu-img");
            command::run(check.args(["check", "-q", "-r", "all"]).arg(image));
            assert!(!is_dirty(image));
        }
        return;
    }
    let status = Command::new(binary())
        .arg("check")
        .arg(image)
        .output()
        .unwrap();
    assert!(matches!(status.status.code(), Some(0 | 3)), "{status:?}");
    qemu::check_allowing_leaks("qcow2", image);
    if repair {
        command::run(
            Command::new(binary())
                .args(["check", "--repair", "leaks"])
                .arg(image),
        );
        qemu::check("qcow2", image);
    }
}

fn is_dirty(image: &Path) -> bool {
    std::fs::read(image).unwrap()[79] & 1 == 1
}

#[test]
fn raw_behind_vhost_user() {
    rounds(Image::Raw, Door::VhostUser, "raw_behind_vhost_user");
}

#[test]
fn raw_behind_nbd() {
    rounds(Image::Raw, Door::Nbd, "raw_behind_nbd");
}

#[test]
fn growing_qcow2_behind_vhost_user() {
    let image = Image::Qcow2("cluster_size=4096");
    rounds(image, Door::VhostUser, "growing_qcow2_behind_vhost_user");
}

#[test]
fn growing_qcow2_behind_nbd() {
    let image = Image::Qcow2("cluster_size=512");
    rounds(image, Door::Nbd, "growing_qcow2_behind_nbd");
}

#[test]
fn overlay_with_subclusters_behind_vhost_user() {
    let image = Image::Overlay("extended_l2=on,cluster_size=64k");
    rounds(
        image,
        Door::VhostUser,
        "overlay_with_subclusters_behind_vhost_user",
    );
}

#[test]
fn overlay_with_subclusters_behind_nbd() {
    let image = Image::Overlay("extended_l2=on,cluster_size=16k");
    rounds(image, Door::Nbd, "overlay_with_subclusters_behind_nbd");
}

#[test]
fn compressed_behind_vhost_user() {
    let image = Image::Compressed("cluster_size=16k");
    rounds(image, Door::VhostUser, "compressed_behind_vhost_user");
}

#[test]
fn snapshot_and_bitmap_behind_vhost_user() {
    let image = Image::Snapshot("cluster_size=4096");
    rounds(
        image,
        Door::VhostUser,
        "snapshot_and_bitmap_behind_vhost_user",
    );
}

#[test]
fn external_data_behind_nbd() {
    let image = Image::Qcow2("cluster_size=4096,data_file=DATA");
    rounds(image, Door::Nbd, "external_data_behind_nbd");
}

#[test]
fn lazy_refcounts_behind_vhost_user() {
    let image = Image::Qcow2("cluster_size=4096,lazy_refcounts=on");
    rounds(image, Door::VhostUser, "lazy_refcounts_behind_vhost_user");
}

#[test]
fn lazy_refcounts_behind_nbd() {
    let image = Image::Qcow2("cluster_size=512,lazy_refcounts=on");
    rounds(image, Door::Nbd, "lazy_refcounts_behind_nbd");
}

#[test]
fn overlay_behind_nbd() {
    rounds(
        Image::Overlay("cluster_size=64k"),
        Door::Nbd,
        "overlay_behind_nbd",
    );
}
