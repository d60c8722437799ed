//! What the server remembers of requests agrees with what the driver saw of them.

use crate::vhost_common;

use bench::driver::{BUFFERS, FLUSH, IN, Machine, OUT, Piece, Setup};
use disk::now_ns;
use std::{thread, time::Instant};
use trace::{Operation, Stage, breakdown::Sample};
use vhost_common::{What, serve};

/// The entries of the only queue, when there are `count`: the server notes a request after it has told of it.
fn entries(served: &vhost_common::Served, count: u64) -> Vec<trace::Entry> {
    let began = Instant::now();
    loop {
        let traces = served.disk.queue_traces();
        assert_eq!(traces.len(), 1);
        assert_eq!(traces[0].name(), "vhost-user 0");
        let read = traces[0].ring().read(0, 1000);
        if read.next == count {
            assert_eq!(read.lost, 0);
            return read.entries;
        }
        assert!(read.next < count && began.elapsed().as_secs() < 20);
        thread::yield_now();
    }
}

#[test]
fn entries_agree_with_the_driver() {
    let served = serve(What::default());
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    let mut seen = Vec::new();
    for n in 0..60u64 {
        let (kind, operation) = match n % 3 {
            0 => (OUT, Operation::Write),
            1 => (IN, Operation::Read),
            _ => (FLUSH, Operation::Flush),
        };
        let out = vec![5; if kind == OUT { 1024 } else { 0 }];
        let wanted = if kind == IN { 512 } else { 0 };
        let sector = if kind == FLUSH { 0 } else { n * 8 };
        let began = now_ns();
        let (status, _) = vm.request(0, kind, sector, &out, wanted);
        let ended = now_ns();
        assert_eq!(status, 0);
        let bytes = out.len() as u64 + u64::from(wanted);
        seen.push((operation, sector * 512, bytes, began, ended));
    }
    let found = entries(&served, 60);
    for (entry, (operation, offset, bytes, began, ended)) in found.iter().zip(seen) {
        assert_eq!(
            (entry.operation, entry.offset, entry.bytes),
            (operation, offset, bytes)
        );
        // It came after it was made, and the answer was there before the driver saw it.
        assert!(entry.begin_ns >= began, "{entry:?} {began}");
        let told = entry.begin_ns + entry.total_ns() - entry.stages_ns[Stage::Notify];
        assert!(told <= ended, "{entry:?} {ended}");
        let sample = Sample::with_client(entry, began, ended);
        assert_eq!(sample.total_ns(), ended - began);
    }
    // Who is found awake is not kicked, who is found waiting need not be called, and who is fast is looked at less.
    for stage in [Stage::Ring, Stage::Parse, Stage::Notify] {
        assert!(
            found.iter().any(|entry| entry.stages_ns[stage] > 0),
            "{stage}"
        );
    }

    // A batch: all of them are there, and taken one after the other.
    let queue = &mut vm.queues[0];
    for i in 0..32u64 {
        let at = BUFFERS + i * 0x2000;
        let mut header = [0; 16];
        header[8] = i as u8;
        vm.ram.write(at, &header);
        let data = Piece::write(at + 0x1000, 512);
        let pieces = [Piece::read(at, 16), data, Piece::write(at + 16, 1)];
        queue.add(&pieces).expect("room for 32");
    }
    queue.kick();
    for _ in 0..32 {
        queue.wait();
    }
    let mut batch = entries(&served, 92).split_off(60);
    batch.sort_by_key(|entry| entry.offset);
    let mut taken = 0;
    for (i, entry) in batch.iter().enumerate() {
        assert_eq!((entry.offset, entry.bytes), (i as u64 * 512, 512));
        let at = entry.begin_ns + entry.stages_ns[Stage::Ring];
        assert!(at >= taken, "{entry:?}");
        taken = at;
    }
}

mod control {
    use super::vhost_common::{Served, What, serve};
    use bench::driver::{IN, Machine, Setup};
    use export::control::{CLIENTS_MAX, Server, Told};
    use std::{
        fs,
        io::{BufRead, BufReader, Read, Write},
        os::unix::{fs::PermissionsExt, net::UnixStream},
        path::{Path, PathBuf},
        time::Duration,
    };
    use trace::{
        Operation,
        control::{Client, Line, REQUEST_BYTES_MAX, Request},
    };

    fn control(served: &Served) -> (Server, PathBuf) {
        let path = served.path().join("control.sock");
        let told = Told {
            file: "disk.raw".into(),
            disk: served.disk.clone(),
        };
        (Server::start(&path, vec![told]).unwrap(), path)
    }

    /// Sends bytes as they are; all that comes back until the server closes, or `lines` lines.
    fn raw(path: &Path, bytes: &[u8], lines: usize) -> Vec<String> {
        let mut stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        // A server that closed early takes no more.
        let _ = stream.write_all(bytes);
        let reader = BufReader::new(stream);
        reader.lines().map_while(Result::ok).take(lines).collect()
    }

    #[test]
    fn a_server_tells_of_its_disks() {
        let served = serve(What::default());
        let (server, path) = control(&served);
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
        for n in 0..20 {
            vm.request(0, IN, n, &[], 512);
        }
        super::entries(&served, 20);
        let mut client = Client::connect(&path).unwrap();
        assert_eq!(client.hello().pid, std::process::id());
        let disks = client.disks().unwrap();
        assert_eq!((disks.len(), disks[0].file.as_str()), (1, "disk.raw"));
        let queue = &disks[0].queues[0];
        assert_eq!((queue.recorded, queue.live), (20, true));
        let (entries, end) = client.entries(0, queue.queue, 15, 3).unwrap();
        let offsets: Vec<u64> = entries.iter().map(|entry| entry.offset / 512).collect();
        assert_eq!(offsets, [15, 16, 17]);
        assert_eq!((end.next, end.lost), (18, 0));
        let whole = served.disk.queue_traces()[0].ring().read(0, 100).entries;
        assert_eq!(client.entries(0, queue.queue, 0, 100).unwrap().0, whole);

        let (mut slowest, mut histograms, mut statistics) = (Vec::new(), Vec::new(), Vec::new());
        client
            .ask(&Request::Slowest { max: 3 }, &mut |line| match line {
                Line::Entry(traced) => slowest.push(traced),
                other => panic!("{other:?}"),
            })
            .unwrap();
        assert_eq!(slowest.len(), 3);
        assert!(slowest.iter().all(|traced| traced.queue == Some(0)));
        client
            .ask(&Request::Histograms, &mut |line| match line {
                Line::Histogram(latencies) => histograms.push(latencies),
                other => panic!("{other:?}"),
            })
            .unwrap();
        assert_eq!(histograms.len(), 9);
        for one in &histograms {
            assert_eq!((one.operation, one.latencies.count), (Operation::Read, 20));
        }
        client
            .ask(&Request::Statistics, &mut |line| match line {
                Line::Statistics(of) => statistics.push(of),
                other => panic!("{other:?}"),
            })
            .unwrap();
        assert_eq!(statistics[0].statistics["operations"][0]["count"], 20);

        // What cannot be answered is an error, and the connection goes on.
        for (disk, queue) in [(1, 0), (0, 7), (usize::MAX, u64::MAX)] {
            client.entries(disk, queue, 0, 1).unwrap_err();
        }
        let (none, end) = client.entries(0, 0, u64::MAX, usize::MAX).unwrap();
        assert_eq!((none.len(), end.next), (0, 20));
        drop(server);
        assert!(!path.exists());
        client.disks().unwrap_err();
        Client::connect(&path).unwrap_err();
    }

    #[test]
    fn hostile_clients_are_put_up_with() {
        let served = serve(What::default());
        let (_server, path) = control(&served);
        let error = |lines: &[String]| {
            assert!(lines[0].contains(r#"{"hello":{"control":1"#), "{lines:?}");
            assert!(lines[1].starts_with(r#"{"error":"#), "{lines:?}");
        };
        for wrong in [
            &b"\n"[..],
            b"quit\n",
            b"{\"command\":\"disks\"\n",
            b"{\"command\":\"entries\",\"disk\":0,\"queue\":1e99}\n",
            b"{\"command\":\"entries\",\"disk\":0,\"queue\":99,\"max\":18446744073709551615}\n",
            b"\xff\xfe\x00\n",
            "[".repeat(4000).as_bytes(),
        ] {
            let mut bytes = wrong.to_vec();
            if !bytes.ends_with(b"\n") {
                bytes.push(b'\n');
            }
            error(&raw(&path, &bytes, 2));
        }
        // Who sends no end of a line is cut off, and so is who goes in the middle of one.
        let endless = vec![b'x'; 1 << 20];
        let lines = raw(&path, &endless, 9);
        assert!(lines.len() <= 2, "{lines:?}");
        assert_eq!(endless.len() as u64 / REQUEST_BYTES_MAX, 256);
        drop(UnixStream::connect(&path).unwrap());
        let mut half = UnixStream::connect(&path).unwrap();
        half.write_all(b"{\"comm").unwrap();
        drop(half);
        // As many as it takes hold their places and say nothing; the next one is told so, and a place that is given
        // back is there for another.
        let mut idle = Vec::new();
        for _ in 0..200 {
            let mut stream = UnixStream::connect(&path).unwrap();
            let mut first = [0; 9];
            stream.read_exact(&mut first).unwrap();
            if &first == br#"{"hello":"# {
                idle.push(stream);
            } else {
                assert_eq!(&first, br#"{"error":"#);
                break;
            }
        }
        assert!((1..=CLIENTS_MAX).contains(&idle.len()), "{}", idle.len());
        let refused = Client::connect(&path).unwrap_err().to_string();
        assert!(refused.contains("16 clients"), "{refused}");
        drop(idle);
        let began = std::time::Instant::now();
        while Client::connect(&path).is_err() {
            assert!(began.elapsed().as_secs() < 20);
        }
    }
}
