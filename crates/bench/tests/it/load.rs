//! The load generators against servers of ours in this process, against qemu-nbd, and against what vanishes.

use crate::common;

use bench::load::{self, Flushes, Pattern, Report, Spec, Target};
use common::{LEN, count, serve};
use export::control;
use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    process::{Child, Command},
    time::{Duration, Instant},
};
use testkit::TempDir;

#[track_caller]
fn assert_counts(report: &Report, reads_and_writes: u64, flushes: u64) {
    assert_eq!(report.reads + report.writes, reads_and_writes);
    assert_eq!(report.flushes, flushes);
    assert_eq!(report.errors, 0);
    assert_eq!(report.bytes, reads_and_writes * 4096);
    assert_eq!(report.latency.count, reads_and_writes);
    assert_eq!(report.read_latency.count, report.reads);
    assert_eq!(report.write_latency.count, report.writes);
    assert_eq!(report.flush_latency.count, flushes);
}

/// Asked for is served: by the client's count and by the disk's.
#[test]
fn each_request_is_made_once() {
    let served = serve(false);
    for target in served.targets() {
        for (flushes, queues, poll, plain) in [
            (Flushes::Never, 1, false, false),
            (Flushes::AfterEachWrite, 2, false, true),
            (Flushes::Every(1), 2, true, false),
        ] {
            let spec = Spec {
                flushes,
                queues,
                poll,
                indirect: !plain,
                event_index: !plain,
                ..count(target.clone(), Pattern::RandRw, 1001)
            };
            let before = served.counts();
            let report = load::run(&spec).unwrap();
            let flushes = if flushes == Flushes::Never {
                0
            } else {
                report.writes
            };
            assert_counts(&report, 1001, flushes);
            assert!((600..800).contains(&report.reads), "{}", report.reads);
            served.assert_grown(before, [report.reads, report.writes, flushes]);
        }
    }
}

/// Buffers that no device would take: what is written and read through them is what must be there, to the last byte.
#[test]
fn buffers_may_lie_anywhere() {
    let served = serve(false);
    let [vhost, nbd] = served.targets();
    for (misalign_bytes, packed, block_bytes) in [(2, false, 4096), (4095, true, 8192)] {
        let spec = Spec {
            misalign_bytes,
            packed,
            block_bytes,
            queues: 2,
            verify: Some(load::Verify::default()),
            ..count(vhost.clone(), Pattern::RandRw, 500)
        };
        let report = load::run(&spec).unwrap();
        let verified = report.verify.unwrap();
        assert_eq!((report.errors, verified.bad()), (0, 0), "{verified:?}");
        assert!(verified.checked > 0 && verified.written > 0);
    }
    for (target, misalign_bytes) in [(vhost, 4096), (nbd, 2)] {
        let spec = Spec {
            misalign_bytes,
            ..Spec::new(target)
        };
        let error = load::run(&spec).unwrap_err().to_string();
        assert!(
            error.contains("less than 4096, and of --vhost-user"),
            "{error}"
        );
    }
}

/// A sequence over the whole disk leaves no block as it was, and no two slots wrote the same.
#[test]
fn writes_carry_data_to_where_they_belong() {
    let check = |bytes: &[u8]| {
        let mut blocks: Vec<&[u8]> = bytes.chunks(4096).collect();
        let written = |block: &&[u8]| block.iter().any(|byte| *byte != 0);
        assert!(blocks.iter().all(written));
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 32, "one for each slot");
    };
    for which in 0..2 {
        let served = serve(false);
        let target = served.targets()[which].clone();
        load::run(&count(target, Pattern::Write, LEN / 4096)).unwrap();
        check(&std::fs::read(served.dir.path("disk.raw")).unwrap());
    }
    for engine in ["threads", "io_uring"] {
        let dir = TempDir::new();
        let path = dir.path("file");
        std::fs::write(&path, vec![0; LEN as usize]).unwrap();
        let target = Target::File {
            path: path.clone(),
            engine: engine.into(),
            direct: false,
        };
        let spec = Spec {
            flushes: Flushes::AfterEachWrite,
            ..count(target, Pattern::Write, LEN / 4096)
        };
        match load::run(&spec) {
            Ok(report) => {
                assert_counts(&report, 1024, 1024);
                check(&std::fs::read(&path).unwrap());
            }
            Err(error) if engine == "io_uring" => eprintln!("not tested: {error}"),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn time_ends_a_load_and_a_ramp_does_not_count() {
    let served = serve(false);
    for target in served.targets() {
        let spec = Spec {
            duration: Duration::from_millis(100),
            ramp: Duration::from_millis(100),
            server_pids: vec![std::process::id()],
            ..Spec::new(target)
        };
        let before = served.counts()[0];
        let report = load::run(&spec).unwrap();
        let all = served.counts()[0] - before;
        let counted = report.reads;
        assert!(counted > 0 && counted < all, "{counted} of {all}");
        assert!(report.server_cpu_us_per_io.unwrap() > 0.0);
        assert!(report.server_rss_bytes.unwrap() > 0);
    }
}

/// What the server says of its stages is of the requests that were measured, and of no others.
#[test]
fn stages_are_those_of_the_measurement() {
    let served = serve(false);
    let told = control::Told {
        file: "disk.raw".into(),
        disk: served.disk.clone(),
    };
    let socket = served.dir.path("control");
    let _control = control::Server::start(&socket, vec![told]).unwrap();
    for target in served.targets() {
        // Before it.
        let before = served.counts();
        load::run(&count(target.clone(), Pattern::RandWrite, 50)).unwrap();
        served.assert_grown(before, [0, 50, 0]);
        let spec = Spec {
            control: Some(socket.clone()),
            server_pids: vec![std::process::id()],
            ..count(target, Pattern::RandRead, 500)
        };
        let before = served.counts();
        let report = load::run(&spec).unwrap();
        served.assert_grown(before, [500, 0, 0]);
        // The last of them is counted after it was answered.
        let read = report.stages["read"];
        assert!((469..=500).contains(&read.count), "{read:?}");
        assert!(read.sum_ns[trace::Stage::Device] > 0, "{read:?}");
        assert!(!report.stages.contains_key("write"));
        assert!(report.server_peak_bytes >= report.server_anonymous_bytes);
        assert_eq!(report.server_syscalls_per_io, None);
    }
    let spec = Spec {
        control: Some(served.dir.path("vhost")),
        ..count(served.targets()[0].clone(), Pattern::RandRead, 5)
    };
    let error = load::run(&spec).unwrap_err().to_string();
    assert!(error.contains("control socket"), "{error}");
}

#[test]
fn what_the_target_cannot_do_is_refused() {
    let served = serve(true);
    for target in served.targets() {
        type Change = fn(&mut Spec);
        let changes: [(Change, &str); 3] = [
            (
                |spec| spec.pattern = Pattern::RandWrite,
                "the disk is read-only",
            ),
            (
                |spec| spec.range_bytes = Some(LEN + 512),
                "lower --start or --range",
            ),
            (|spec| spec.server_pids = vec![0], "--pid 0"),
        ];
        for (change, names) in changes {
            let mut spec = count(target.clone(), Pattern::RandRead, 10);
            change(&mut spec);
            let error = load::run(&spec).unwrap_err().to_string();
            assert!(error.contains(names), "{error}");
        }
        let report = load::run(&count(target, Pattern::Read, 10)).unwrap();
        assert_counts(&report, 10, 0);
    }
    let [vhost, _] = served.targets();
    for (depth, indirect, names) in [(64, false, "--ring 256"), (200, true, "--ring 256")] {
        let spec = Spec {
            depth,
            indirect,
            ..count(vhost.clone(), Pattern::Read, 10)
        };
        let error = load::run(&spec).unwrap_err().to_string();
        assert!(error.contains(names), "{error}");
    }
    let spec = Spec {
        queues: 3,
        ..count(vhost, Pattern::Read, 10)
    };
    let error = load::run(&spec).unwrap_err().to_string();
    assert!(error.contains("the server has 2 queues"), "{error}");
}

/// A server that stops while a load without end runs ends it, and is named.
#[test]
fn a_server_that_vanishes_ends_the_load() {
    for which in 0..2 {
        for poll in [false, true] {
            let mut served = serve(false);
            let target = served.targets()[which].clone();
            let spec = Spec {
                poll,
                ..count(target, Pattern::RandRead, u64::MAX)
            };
            let load = std::thread::spawn(move || load::run(&spec));
            while served.counts()[0] < 100 {
                std::thread::yield_now();
            }
            if which == 0 {
                drop(served.vhost.take());
            } else {
                drop(served.nbd.take());
            }
            let error = load.join().unwrap().unwrap_err().to_string();
            let name = ["vhost", "nbd"][which];
            assert!(
                error.contains(name) && error.contains("connection"),
                "{error}"
            );
        }
    }
}

/// Servers that answer nonsense, or with silence and an end.
#[test]
fn an_nbd_server_that_makes_no_sense_is_an_error() {
    let confused = [&b"NBDMAGICIHAVEOPT\0\x03"[..], &[0xff; 20]].concat();
    for (answer, names) in [
        (&b""[..], "closed the connection"),
        (b"NBDMAGIC", "closed the connection"),
        (&[0x55; 64], "no NBD server"),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53", "old style"),
        (b"NBDMAGICIHAVEOPT\0\0", "does not negotiate"),
        (&confused, "no answer"),
    ] {
        let dir = TempDir::new();
        let listener = UnixListener::bind(dir.path("s")).unwrap();
        let target = Target::Nbd(format!("unix:{}", dir.path("s").display()));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(answer).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let _ = stream.read_to_end(&mut Vec::new());
            });
            let error = load::run(&Spec::new(target)).unwrap_err().to_string();
            assert!(error.contains(names), "{names}: {error}");
        });
    }
}

/// Ended when the test is.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_nbd_is_driven_too() {
    let dir = TempDir::new();
    let (path, socket) = (dir.path("disk.raw"), dir.path("s"));
    std::fs::write(&path, vec![0; LEN as usize]).unwrap();
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-f", "raw", "-e", "4", "-k"]);
    command.arg(&socket).arg(&path);
    let _server = Running(command.spawn().expect("qemu-nbd is installed"));
    let began = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        let waited = began.elapsed();
        assert!(waited < Duration::from_secs(20), "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    let target = Target::Nbd(format!("unix:{}", socket.display()));
    let spec = Spec {
        queues: 2,
        flushes: Flushes::AfterEachWrite,
        ..count(target.clone(), Pattern::RandRw, 501)
    };
    let report = load::run(&spec).unwrap();
    assert_counts(&report, 501, report.writes);
    // More than the socket holds.
    let spec = Spec {
        block_bytes: 1 << 20,
        ..count(target, Pattern::Rw, 200)
    };
    let report = load::run(&spec).unwrap();
    assert_eq!((report.reads + report.writes, report.errors), (200, 0));
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes.iter().any(|byte| *byte != 0));
}
