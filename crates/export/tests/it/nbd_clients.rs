//! The NBD server and clients that are hostile, slow, gone, or several.

use crate::nbd_common;

use disk::DiskOptions;
use export::{
    nbd::{Nbd, Options},
    worker::{Worker, WorkerOptions},
};
use image::Format;
use io::EngineKind;
use nbd_common::{Client, What, cmd, header, run, serve};
use std::{
    fs,
    io::{ErrorKind, Write},
    net::Shutdown,
    time::{Duration, Instant},
};

const ENGINES: [EngineKind; 3] = [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring];

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed)
        .collect()
}

#[test]
fn all_operations_on_every_engine() {
    for engine in ENGINES {
        let served = serve(What {
            engine,
            ..What::default()
        });
        let mut client = served.connect();
        let data = pattern(1, 100_001);
        assert_eq!(client.write(4095, &data), 0);
        assert_eq!(client.read(4095, 100_001), data, "{engine}");
        assert_eq!(client.read(4000, 1), [0]);
        assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0), 0);
        assert_eq!(client.ask(cmd::WRITE_ZEROES, 0, 8192, 8192), 0);
        assert_eq!(client.read(8192, 8192), [0; 8192]);
        assert_eq!(client.read(8191, 1), data[4096..4097]);
        assert_eq!(client.ask(cmd::TRIM, 1, 0, 65536), 0, "with FUA");
        assert_eq!(client.ask(cmd::CACHE, 0, 0, 65536), 0);
        assert_eq!(client.ask(cmd::READ, 0, 16 << 20, 1), 22);
        assert_eq!(client.ask(99, 0, 0, 0), 22);
        assert_eq!(client.write(16 << 20, &[0; 3]), 28);
        let last = pattern(2, 512);
        assert_eq!(client.write((16 << 20) - 512, &last), 0);
        assert_eq!(client.read((16 << 20) - 512, 512), last);
        client.request(cmd::DISC, 0, 0, 0, 0);
        assert_eq!(client.take_all(), b"");
        served.wait_for_connections(0);
    }
}

#[test]
fn many_requests_in_flight_are_all_answered_once() {
    for engine in ENGINES {
        let served = serve(What {
            engine,
            format: Format::Qcow2,
            ..What::default()
        });
        let mut client = served.connect();
        let mut stream = Vec::new();
        for i in 0..500u64 {
            stream.extend(header(cmd::WRITE, 0, i, i * 8192, 8192));
            stream.extend(pattern(i as u8, 8192));
        }
        let mut seen = vec![0; 500];
        let mut sender = client.0.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || sender.write_all(&stream).unwrap());
            for _ in 0..500 {
                let (error, cookie) = client.reply();
                assert_eq!(error, 0);
                seen[cookie as usize] += 1;
            }
        });
        assert_eq!(seen, [1; 500]);
        for i in 0..500u64 {
            let got = client.read(i * 8192, 8192);
            assert!(got == pattern(i as u8, 8192), "{engine}: block {i}");
        }
    }
}

#[test]
fn a_durable_trim_that_needs_no_device_is_answered() {
    // The trim ends where it began; only the flush behind it takes time.
    let served = serve(What {
        format: Format::Qcow2,
        ..What::default()
    });
    let mut client = served.connect();
    for at in 0..16 {
        assert_eq!(client.write(at << 16, &[5; 65536]), 0);
        assert_eq!(client.ask(cmd::TRIM, 1, at << 16, 65536), 0);
    }
}

#[test]
fn the_largest_requests_are_served() {
    let served = serve(What {
        len: 40 << 20,
        ..What::default()
    });
    let mut client = served.connect();
    let data = pattern(3, 32 << 20);
    assert_eq!(client.write(4096, &data), 0);
    assert!(client.read(4096, 32 << 20) == data);
    assert_eq!(client.ask(cmd::READ, 0, 0, (32 << 20) + 1), 22);
    client.request(cmd::WRITE, 0, 5, 0, (32 << 20) + 1);
    assert_eq!(client.reply(), (22, 5));
    assert_eq!(client.take_all(), b"", "its payload cannot be skipped");
}

#[test]
fn garbage_closes_its_connection_only() {
    let served = serve(What::default());
    let mut witness = served.connect();
    assert_eq!(witness.write(0, &pattern(4, 4096)), 0);

    let mut client = Client::connect(&served.socket());
    client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(client.take_all(), b"NBDMAGICIHAVEOPT\0\x03");

    let mut client = Client::connect(&served.socket());
    client.send(&3u32.to_be_bytes());
    client.send(&[0x55; 100]);
    client.take_all();

    let mut client = served.connect();
    client.request(cmd::READ, 0, 1, 0, 512);
    client.send(&[0x99; 5000]);
    let replies = client.take_all();
    assert_eq!(replies.len(), 16 + 512, "what came before is answered");

    served.wait_for_connections(1);
    assert_eq!(witness.read(0, 4096), pattern(4, 4096));
}

#[test]
fn a_client_that_dawdles_is_closed_and_others_are_served_meanwhile() {
    let served = serve(What {
        options: Options {
            handshake_max: Duration::from_millis(300),
            ..Options::default()
        },
        ..What::default()
    });
    let start = Instant::now();
    let mut silent = Client::connect(&served.socket());
    let mut slow = Client::connect(&served.socket());
    slow.send(&3u32.to_be_bytes());
    slow.send(b"IHAVEOPT\0\0");
    served.connect().read(0, 512);
    silent.take_all();
    slow.take_all();
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn connections_are_limited() {
    let served = serve(What {
        options: Options {
            max_connections: 2,
            ..Options::default()
        },
        ..What::default()
    });
    let mut first = served.connect();
    let second = served.connect();
    served.wait_for_connections(2);
    assert_eq!(Client::connect(&served.socket()).take_all(), b"");
    drop(second);
    served.wait_for_connections(1);
    served.connect().read(0, 512);
    first.read(0, 512);
}

#[test]
fn a_client_that_never_reads_holds_up_nobody() {
    for engine in ENGINES {
        let served = serve(What {
            engine,
            ..What::default()
        });
        let mut witness = served.connect();
        let mut hog = served.connect();
        hog.0.set_nonblocking(true).unwrap();
        // Asks until the server takes no more: its socket stays full over many of the witness's requests.
        let mut asked = 0u64;
        let mut full = 0;
        while full < 50 {
            match hog.0.write(&header(cmd::READ, 0, asked, 0, 256 << 10)) {
                Ok(len) => {
                    assert_eq!(len, 28);
                    asked += 1;
                    full = 0;
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    full += 1;
                    witness.read(4096, 4096);
                }
            }
        }
        assert!(asked < 20_000, "{asked} requests of 256 KiB were taken");
        // It reads after all, and nothing was lost.
        hog.0.set_nonblocking(false).unwrap();
        for _ in 0..asked {
            assert_eq!(hog.reply().0, 0);
            hog.take(256 << 10);
        }
        witness.read(0, 512);
    }
}

#[test]
fn a_vanished_client_leaves_nothing_behind() {
    for engine in ENGINES {
        let mut served = serve(What {
            engine,
            ..What::default()
        });
        let old = pattern(5, 1 << 20);
        assert_eq!(served.connect().write(0, &old), 0);
        for _ in 0..20 {
            let mut client = served.connect();
            for cookie in 0..50 {
                client.request(cmd::READ, 0, cookie, 0, 64 << 10);
            }
            // In the middle of a write's payload.
            client.request(cmd::WRITE, 0, 99, 0, 1 << 20);
            client.send(&[0xff; 300_000]);
        }
        served.wait_for_connections(0);
        assert!(
            served.connect().read(0, 1 << 20) == old,
            "{engine}: half a write is none"
        );
        served.stop();
    }
}

#[test]
fn a_client_that_closed_one_direction_gets_its_replies() {
    let served = serve(What::default());
    let mut client = served.connect();
    client.request(cmd::READ, 0, 1, 0, 4096);
    client.request(cmd::FLUSH, 0, 2, 0, 0);
    client.0.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.take_all().len(), 16 + 4096 + 16);
    served.wait_for_connections(0);
}

#[test]
fn read_only_exports_refuse_writes() {
    for of_disk in [true, false] {
        let served = serve(What {
            disk: DiskOptions {
                read_only: of_disk,
                ..DiskOptions::default()
            },
            options: Options {
                read_only: !of_disk,
                ..Options::default()
            },
            ..What::default()
        });
        let mut client = served.connect();
        assert_eq!(client.write(0, &[1; 600]), 1);
        assert_eq!(client.ask(cmd::TRIM, 0, 0, 512), 1);
        assert_eq!(client.ask(cmd::WRITE_ZEROES, 0, 0, 512), 1);
        assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0), 0);
        assert_eq!(client.read(0, 600), [0; 600]);
    }
}

/// A flush on one connection covers what was answered on others, on other workers too: the image as it
/// is in the file then has all of it.
#[test]
fn a_flush_covers_the_writes_of_all_connections() {
    let served = serve(What {
        format: Format::Qcow2,
        workers: 2,
        ..What::default()
    });
    let mut writers: Vec<Client> = (0..4).map(|_| served.connect()).collect();
    served.wait_for_connections(4);
    for (i, writer) in writers.iter_mut().enumerate() {
        assert_eq!(writer.write(i as u64 * 100_000, &[i as u8 + 1; 70_000]), 0);
    }
    let mut flusher = served.connect();
    assert_eq!(flusher.ask(cmd::FLUSH, 0, 0, 0), 0);
    let copy = served.dir.path().join("crashed");
    fs::copy(served.image(), &copy).unwrap();
    for i in 0..4 {
        let read = format!("read -P {} {} 70000", i + 1, i * 100_000);
        let args = ["-r", "-f", "qcow2", "-c", &read, copy.to_str().unwrap()];
        let text = run("qemu-io", &args);
        assert!(text.contains("read 70000/70000"), "{text}");
        assert!(!text.contains("failed"), "{text}");
    }
}

#[test]
fn stopping_answers_what_was_taken_and_removes_the_socket() {
    let mut served = serve(What {
        workers: 2,
        ..What::default()
    });
    let mut clients: Vec<Client> = (0..4).map(|_| served.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.write(0, &[1; 4096]), 0);
        client.request(cmd::READ, 0, 1, 0, 4096);
    }
    let mut pending = Client::connect(&served.socket());
    served.server.as_mut().unwrap().stop();
    assert_eq!(served.server().connections(), 0);
    assert!(!served.socket().exists());
    for client in &mut clients {
        // Taken before the stop or not: a reply is whole or not there.
        let bytes = client.take_all();
        assert!(bytes.is_empty() || bytes.len() == 16 + 4096);
    }
    pending.take_all();
    served.stop();
}

#[test]
fn stopping_does_not_wait_for_a_client_that_never_reads() {
    let mut served = serve(What::default());
    let mut hog = served.connect();
    for cookie in 0..100 {
        hog.request(cmd::READ, 0, cookie, 0, 1 << 20);
    }
    served.connect().read(0, 512);
    let start = Instant::now();
    served.server.as_mut().unwrap().stop();
    assert!(start.elapsed() < Duration::from_secs(15));
    assert_eq!(served.server().connections(), 0);
    served.stop();
}

#[test]
fn a_worker_that_stops_takes_its_connections_with_it() {
    let mut served = serve(What::default());
    let mut hog = served.connect();
    for cookie in 0..100 {
        hog.request(cmd::READ, 0, cookie, 0, 1 << 20);
    }
    served.connect().read(0, 512);
    for worker in &served.workers {
        worker.stop();
    }
    assert_eq!(served.server().connections(), 0);
    hog.take_all();
    // The server outlives its workers: connections are refused, and it stops.
    served.workers.clear();
    let mut late = Client::connect(&served.socket());
    late.send(&3u32.to_be_bytes());
    late.send(b"IHAVEOPT\0\0\0\x01\0\0\0\0");
    late.take_all();
    served.stop();
}

#[test]
fn a_second_server_on_the_socket_is_refused() {
    let served = serve(What::default());
    let worker = Worker::spawn(WorkerOptions::new(9, EngineKind::Threads)).unwrap();
    let again = Nbd::serve(
        served.server().local_addr(),
        served.disk.clone().unwrap(),
        std::slice::from_ref(&worker),
        Options::default(),
    );
    assert_eq!(again.unwrap_err().kind(), block::ErrorKind::Locked);
    worker.stop();
    served.connect().read(0, 512);
}
