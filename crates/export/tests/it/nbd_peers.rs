//! The NBD server and the clients of others: libnbd's tools, QEMU's, fio.

use crate::nbd_common;

use disk::DiskOptions;
use export::nbd::Options;
use image::Format;
use io::EngineKind;
use nbd_common::{Served, What, run, serve};
use std::{fs, path::Path};

const ENGINES: [EngineKind; 3] = [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring];

fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Data, holes and zeros that are data, with an odd tail; `len` bytes.
fn sparse_source(path: &Path, len: u64) {
    fs::File::create(path).unwrap().set_len(len).unwrap();
    for (at, size, value) in [
        (0, 70_000, 1),
        (1 << 20, 3 << 20, 0),
        (5 << 20, 4097, 2),
        (9 << 20, 2 << 20, 3),
        (len - 1000, 1000, 4),
    ] {
        let write = format!("write -q -P {value} {at} {size}");
        run("qemu-io", &["-f", "raw", "-c", &write, arg(path)]);
    }
}

fn check(served: &mut Served, format: Format) {
    served.stop();
    if format != Format::Raw {
        run("qemu-img", &["check", "-q", arg(&served.image())]);
    }
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    for (tcp, read_only) in [(false, false), (true, true)] {
        let served = serve(What {
            tcp,
            disk: DiskOptions {
                read_only,
                ..DiskOptions::default()
            },
            options: Options {
                name: "system disk".into(),
                description: "boots a machine".into(),
                ..Options::default()
            },
            ..What::default()
        });
        let text = run("nbdinfo", &["--json", &served.uri()]);
        let has = |what: &str| {
            assert!(text.contains(what), "{what} in {text}");
        };
        has("\"protocol\": \"newstyle-fixed\"");
        has("\"structured\": true");
        has("\"export-size\": 16777216");
        has("\"base:allocation\"");
        has("\"can_multi_conn\": true");
        has("\"can_cache\": true");
        has("\"can_df\": true");
        has("\"can_flush\": true");
        has("\"can_fua\": true");
        has(&format!("\"is_read_only\": {read_only}"));
        has(&format!("\"can_trim\": {}", !read_only));
        has(&format!("\"can_zero\": {}", !read_only));
        has(&format!("\"can_fast_zero\": {}", !read_only));
        has("\"block_size_minimum\": 1");
        has("\"block_size_preferred\": 4096");
        has("\"block_size_maximum\": 33554432");
        let list = run("nbdinfo", &["--list", &served.uri()]);
        assert!(list.contains("export=\"system disk\""), "{list}");
        assert!(list.contains("description: boots a machine"), "{list}");
        let uri = if tcp {
            format!("{}/system%20disk", served.uri())
        } else {
            served.uri().replace("///?", "///system%20disk?")
        };
        assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "16777216");
    }
}

#[test]
fn nbdinfo_maps_holes_and_data() {
    let served = serve(What {
        format: Format::Qcow2,
        ..What::default()
    });
    let uri = served.uri();
    let write = ["-f", "raw", "-c", "write 1M 64k", "-c", "flush", &uri];
    run("qemu-io", &write);
    let map = run("nbdinfo", &["--map", &uri]);
    let rows: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().take(3).collect())
        .collect();
    let expected = [
        ["0", "1048576", "3"],
        ["1048576", "65536", "0"],
        ["1114112", "15663104", "3"],
    ];
    assert_eq!(rows, expected, "{map}");
}

#[test]
fn nbdcopy_there_and_back() {
    for (format, engine) in [
        (Format::Raw, EngineKind::Threads),
        (Format::Qcow2, EngineKind::Native),
        (Format::Qcow2, EngineKind::IoUring),
    ] {
        let len = (12 << 20) + 1536;
        let mut served = serve(What {
            format,
            engine,
            len,
            workers: 2,
            ..What::default()
        });
        let (source, copy) = (
            served.dir.path().join("source"),
            served.dir.path().join("copy"),
        );
        sparse_source(&source, len);
        let uri = served.uri();
        run("nbdcopy", &["--flush", arg(&source), &uri]);
        run("nbdcopy", &[&uri, arg(&copy)]);
        run("cmp", &[arg(&source), arg(&copy)]);
        // Synchronous, one connection, odd request size.
        fs::remove_file(&copy).unwrap();
        let args = ["--synchronous", "--request-size=65536", &uri, arg(&copy)];
        run("nbdcopy", &args);
        run("cmp", &[arg(&source), arg(&copy)]);
        check(&mut served, format);
    }
}

#[test]
fn qemu_img_converts_and_compares() {
    for (format, engine, tcp) in [
        (Format::Raw, EngineKind::Native, false),
        (Format::Raw, EngineKind::IoUring, true),
        (Format::Qcow2, EngineKind::Threads, false),
        (Format::Qcow2, EngineKind::IoUring, true),
    ] {
        let len = 12 << 20;
        let mut served = serve(What {
            format,
            engine,
            len,
            tcp,
            ..What::default()
        });
        let dir = served.dir.path();
        let (source, copy) = (dir.join("source"), dir.join("copy.qcow2"));
        sparse_source(&source, len);
        let uri = served.uri();
        let into = ["convert", "-n", "-W", "-f", "raw", "-O", "raw"];
        run("qemu-img", &[&into[..], &[arg(&source), &uri]].concat());
        let equal = ["compare", "-f", "raw", "-F", "raw", arg(&source), &uri];
        run("qemu-img", &equal);
        let out = ["convert", "-f", "raw", "-O", "qcow2", &uri, arg(&copy)];
        run("qemu-img", &out);
        let equal = ["compare", "-f", "qcow2", "-F", "raw", arg(&copy), &uri];
        run("qemu-img", &equal);
        let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
        assert!(map.contains("\"zero\": true"), "{map}");
        check(&mut served, format);
    }
}

#[test]
fn qemu_io_reads_and_writes_at_any_alignment() {
    for engine in ENGINES {
        let mut served = serve(What {
            format: Format::Qcow2,
            engine,
            ..What::default()
        });
        let uri = served.uri();
        let commands = [
            "write -P 1 0 1M",
            "write -P 2 4097 3001",
            "write -f -P 3 2000001 5",
            "write -z 512k 64k",
            "write -z -u 640k 64k",
            "aio_write -P 4 3M 2M",
            "aio_write -P 5 5M 2M",
            "aio_flush",
            "discard 256k 64k",
            "flush",
            "read -P 1 0 4097",
            "read -P 2 4097 3001",
            "read -P 1 7098 1000",
            "read -P 3 2000001 5",
            "read -P 0 512k 64k",
            "read -P 0 640k 64k",
            "read -P 4 3M 2M",
            "read -P 5 5M 2M",
            "read -P 0 8M 8M",
        ];
        let mut args = vec!["-f", "raw"];
        for command in &commands {
            args.extend(["-c", command]);
        }
        args.push(&uri);
        let text = run("qemu-io", &args);
        assert!(!text.contains("failed") && !text.contains("rror"), "{text}");
        check(&mut served, Format::Qcow2);
    }
}

#[test]
fn fio_verifies() {
    for (format, engine) in [
        (Format::Raw, EngineKind::Native),
        (Format::Qcow2, EngineKind::Threads),
        (Format::Qcow2, EngineKind::IoUring),
    ] {
        let mut served = serve(What {
            format,
            engine,
            len: 32 << 20,
            workers: 2,
            ..What::default()
        });
        let uri = format!("--uri={}", served.uri());
        let args = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=512-256k",
            "--bs_unaligned=0",
            "--iodepth=64",
            "--size=32m",
            "--io_size=32m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--randseed=7",
            "--fsync=100",
        ];
        run("fio", &args);
        check(&mut served, format);
    }
}
